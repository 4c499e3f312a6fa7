// tunload PORT TARGET PATH PARALLEL SECONDS
//
// Opens tunnels through the proxy on 127.0.0.1:PORT, PARALLEL at a time: connect, CONNECT TARGET, one GET of PATH, the whole
// response read, then an orderly close: this side ends its writing and waits until the proxy has ended too. A tunnel counts as
// ok only when all of that has happened, so that its end is paid for within the run, not after it. Prints
//
//	ok=… bad=… per_s=… bytes=…
//
// where bytes are those of response bodies. One thread and epoll: the load must cost less than the proxy it measures.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MAX_PARALLEL = 4096, HEAD = 4096, STUCK = 5 }; // STUCK: seconds after which a tunnel is given up as bad

enum phase { CONNECTING, ASKED_FOR_TUNNEL, ASKED_FOR_PAGE, IN_BODY, CLOSING };

struct tunnel {
	int fd; // -1: not running
	enum phase phase;
	double since;
	int len; // bytes in head
	long body; // bytes of the body still to come
	char head[HEAD + 1];
};

static struct tunnel tunnels[MAX_PARALLEL];
static struct sockaddr_in proxy = {.sin_family = AF_INET};
static char ask_tunnel[512], ask_page[1024];
static int poller, running;
static long ok, bad, bytes;

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void finish(struct tunnel *t, int good)
{
	close(t->fd); // which takes it out of the poller too
	t->fd = -1;
	running--;
	if (good)
		ok++;
	else
		bad++;
}

static int say(struct tunnel *t, const char *text)
{
	size_t n = strlen(text);
	return send(t->fd, text, n, MSG_NOSIGNAL) == (ssize_t)n; // a short write of so few bytes means that something is wrong
}

static void start(struct tunnel *t)
{
	t->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	if (t->fd < 0) {
		bad++;
		return;
	}
	running++;
	t->phase = CONNECTING;
	t->since = now();
	t->len = 0;
	struct epoll_event e = {.events = EPOLLIN | EPOLLOUT, .data.ptr = t};
	if ((connect(t->fd, (struct sockaddr *)&proxy, sizeof proxy) != 0 && errno != EINPROGRESS) ||
	    epoll_ctl(poller, EPOLL_CTL_ADD, t->fd, &e) != 0)
		finish(t, 0);
}

// connected asks for the tunnel. Its return value, as of the others below: 1 go on, 0 the tunnel has failed.
static int connected(struct tunnel *t)
{
	struct epoll_event e = {.events = EPOLLIN, .data.ptr = t};
	t->phase = ASKED_FOR_TUNNEL;
	return epoll_ctl(poller, EPOLL_CTL_MOD, t->fd, &e) == 0 && say(t, ask_tunnel);
}

static int body_came(struct tunnel *t, long n)
{
	bytes += n;
	t->body -= n;
	if (t->body < 0)
		return 0;
	if (t->body == 0) {
		t->phase = CLOSING;
		return shutdown(t->fd, SHUT_WR) == 0;
	}
	return 1;
}

// head_came is called when a head may be whole: of the answer to CONNECT, then of the page.
static int head_came(struct tunnel *t)
{
	t->head[t->len] = 0;
	char *end = strstr(t->head, "\r\n\r\n");
	if (!end)
		return t->len < HEAD;
	if (t->len < 12 || strncmp(t->head + 8, " 200", 4) != 0)
		return 0;
	int rest = t->len - (int)(end + 4 - t->head);
	if (t->phase == ASKED_FOR_TUNNEL) {
		t->phase = ASKED_FOR_PAGE;
		t->len = 0;
		return rest == 0 && say(t, ask_page); // the origin speaks second: bytes after the head would not be its own
	}
	char *length = strcasestr(t->head, "\r\nContent-Length:");
	if (!length || length > end)
		return 0;
	t->body = strtol(length + strlen("\r\nContent-Length:"), NULL, 10);
	t->phase = IN_BODY;
	return body_came(t, rest);
}

static int readable(struct tunnel *t)
{
	static char scrap[65536];
	int in_head = t->phase == ASKED_FOR_TUNNEL || t->phase == ASKED_FOR_PAGE;
	ssize_t n = in_head ? recv(t->fd, t->head + t->len, HEAD - t->len, 0) : recv(t->fd, scrap, sizeof scrap, 0);
	if (n < 0)
		return errno == EAGAIN;
	if (t->phase == CLOSING) {
		if (n == 0)
			finish(t, 1);
		return n == 0;
	}
	if (n == 0)
		return 0;
	if (!in_head)
		return body_came(t, n);
	t->len += n;
	return head_came(t);
}

static void event(struct tunnel *t, unsigned events)
{
	int good = t->phase == CONNECTING ? !(events & (EPOLLERR | EPOLLHUP)) && connected(t) : readable(t);
	if (!good && t->fd >= 0)
		finish(t, 0);
}

int main(int argc, char **argv)
{
	int parallel = argc == 6 ? atoi(argv[4]) : 0;
	if (parallel < 1 || parallel > MAX_PARALLEL) {
		fprintf(stderr, "usage: tunload PORT TARGET PATH PARALLEL SECONDS (at most %d parallel)\n", MAX_PARALLEL);
		return 2;
	}
	proxy.sin_port = htons(atoi(argv[1]));
	proxy.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	snprintf(ask_tunnel, sizeof ask_tunnel, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", argv[2], argv[2]);
	snprintf(ask_page, sizeof ask_page, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", argv[3], argv[2]);
	poller = epoll_create1(0);
	for (int i = 0; i < parallel; i++)
		tunnels[i].fd = -1;

	double begun = now(), until = begun + atof(argv[5]), swept = begun;
	for (;;) {
		double t = now();
		if (t < until)
			for (int i = 0; i < parallel; i++)
				if (tunnels[i].fd < 0)
					start(&tunnels[i]);
		if (t >= until && running == 0)
			break;
		struct epoll_event events[256];
		int n = epoll_wait(poller, events, 256, 100);
		long failed = bad;
		for (int i = 0; i < n; i++)
			event(events[i].data.ptr, events[i].events);
		if (t - swept > 0.5) {
			swept = t;
			for (int i = 0; i < parallel; i++)
				if (tunnels[i].fd >= 0 && t - tunnels[i].since > STUCK)
					finish(&tunnels[i], 0);
		}
		if (bad > failed)
			usleep(5000); // a proxy that refuses everything is not to be hammered
	}
	printf("ok=%ld bad=%ld per_s=%.0f bytes=%ld\n", ok, bad, ok / (now() - begun), bytes);
	return 0;
}
