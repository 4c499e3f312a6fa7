package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	pemfile "encoding/pem"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"image/color"
	"image/png"
	"io"
	"log"
	"log/slog"
	"maps"
	"math"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/http/httputil"
	"net/netip"
	"net/textproto"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	chunks "github.com/Shopify/toxiproxy/v2/stream"
	"github.com/Shopify/toxiproxy/v2/toxics"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/quic-go/quic-go/quicvarint"
	"golang.org/x/crypto/bcrypt"
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// The tests speak to a proxy that run() started, over real sockets on loopback: raw bytes in, the bytes that the origin
// received out. They follow the order of proxy.go's sections.

var update = flag.Bool("update", false, "rewrite the README's table of variables")

var screenshots = flag.String("screenshots", "", "keep a picture of the status page in this directory")

// patience bounds every wait of a test; what takes longer has failed.
const patience = 5 * time.Second

// ---------------------------------------------------------------------------------------------------------------------
// Helpers

// What buildBinary has built once, and where.
var (
	build    sync.Once
	binaries string
)

// ports are those that freeAddr gives, of which each test process claims some for itself.
var ports = struct {
	first, count int
	last         atomic.Uint32
	claim        net.Listener // holds them
}{first: 10_000, count: 1000}

// TestMain claims ports, and has the runtime open its poller's descriptors before they are counted.
func TestMain(m *testing.M) {
	for err := error(nil); runtime.GOOS == "linux" && ports.first < 29_000; ports.first += ports.count { // elsewhere the name would be a file
		if ports.claim, err = net.Listen("unix", fmt.Sprintf("@sluice-test-%d", ports.first)); err == nil {
			break
		}
	}
	if l, err := net.Listen("tcp", "127.0.0.1:0"); err == nil {
		l.Close()
	}
	originPort.Store(uint32(time.Now().UnixNano()))
	flag.Parse()
	flag.Set("test.parallel", strconv.Itoa(3*runtime.GOMAXPROCS(0))) // what runs beside others mostly waits
	binaries, _ = os.MkdirTemp("", "sluice-test")
	status := m.Run()
	os.RemoveAll(binaries)
	os.Exit(status)
}

// logSink collects what the proxy writes to stdout.
type logSink struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logSink) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// records parses what was logged so far.
func (l *logSink) records(t testing.TB) (all []map[string]any) {
	t.Helper()
	l.mu.Lock()
	text := l.text.String()
	l.mu.Unlock()
	for line := range strings.Lines(text) {
		var r map[string]any
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("log line is not JSON: %q: %v", line, err)
		}
		all = append(all, r)
	}
	return all
}

// await waits for the nth record (from 1) whose msg is msg.
func (l *logSink) await(t testing.TB, msg string, nth int) map[string]any {
	t.Helper()
	var found map[string]any
	eventually(t, fmt.Sprintf("record %d with msg %q", nth, msg), func() bool {
		n := 0
		for _, r := range l.records(t) {
			if r["msg"] == msg {
				if n++; n == nth {
					found = r
					return true
				}
			}
		}
		return false
	})
	return found
}

// eventually polls until what holds, since what it asks about happens in other goroutines.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !holds(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %v in vain for %s", patience, what)
		}
	}
}

// testProxy is a proxy under test.
type testProxy struct {
	addr, admin string
	log         *logSink
	stop        func() // begins the drain and waits for its end
}

// startProxy runs a proxy that may reach loopback, with further variables as "NAME=value" (without SLUICE_). When the test
// ends, it is stopped, and goroutines and descriptors must be what they were.
func startProxy(t testing.TB, vars ...string) *testProxy {
	t.Helper()
	goroutines, files := runtime.NumGoroutine(), countFiles()
	environ := []string{"SLUICE_LISTEN=127.0.0.1:0", "SLUICE_ADMIN=127.0.0.1:0", "SLUICE_NAME=sluice-test", "SLUICE_LOG_LEVEL=debug",
		"SLUICE_ALLOW_PORTS=*", "SLUICE_ALLOW_CIDRS=127.0.0.0/8,::1", "SLUICE_DRAIN_TIMEOUT=200ms", "SLUICE_TUNE=off"}
	for _, v := range vars {
		name, _, _ := strings.Cut(v, "=")
		kept := environ[:0:0]
		for _, e := range environ {
			if !strings.HasPrefix(e, "SLUICE_"+name+"=") {
				kept = append(kept, e)
			}
		}
		environ = append(kept, "SLUICE_"+v)
	}
	p := &testProxy{log: &logSink{}}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, environ, p.log) }()
	var once sync.Once
	p.stop = func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-ended:
				if err != nil {
					t.Errorf("run: %v", err)
				}
			case <-time.After(2 * patience):
				t.Errorf("the proxy did not stop\n%s", stacks())
			}
		})
	}
	t.Cleanup(func() {
		p.stop()
		awaitNoLeak(t, goroutines, files)
	})
	start := p.log.await(t, "listening", 1)
	p.addr = start["addresses"].([]any)[0].(string)
	p.admin = start["admin"].(string)
	return p
}

// awaitNoLeak waits until goroutines and descriptors are down to what they were.
func awaitNoLeak(t testing.TB, goroutines, files int) {
	for end := time.Now().Add(patience); runtime.NumGoroutine() > goroutines || countFiles() > files; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			open, _ := filepath.Glob("/proc/self/fd/*")
			for i, path := range open {
				open[i], _ = os.Readlink(path)
			}
			t.Errorf("leak: %d goroutines (%d before), %d descriptors (%d before)\n%s\n%s", runtime.NumGoroutine(), goroutines, countFiles(), files, open, stacks())
			return
		}
	}
}

func stacks() string {
	b := make([]byte, 1<<20)
	return string(b[:runtime.Stack(b, true)])
}

// countFiles counts this process's descriptors, where /proc tells.
func countFiles() int {
	entries, _ := os.ReadDir("/proc/self/fd")
	return len(entries)
}

// peer is one end of a connection, driven by raw bytes: a client of the proxy or an origin.
type peer struct {
	*net.TCPConn
	speaker
}

// speaker sends text and takes what comes, over TLS or not.
type speaker struct {
	w  io.Writer
	t  *testing.T
	br *bufio.Reader
}

func newPeer(t *testing.T, c net.Conn) *peer {
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(2 * patience))
	return &peer{c.(*net.TCPConn), speaker{c, t, bufio.NewReader(c)}}
}

// dial connects a client to the proxy.
func (p *testProxy) dial(t *testing.T) *peer {
	t.Helper()
	c, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	return newPeer(t, c)
}

// send writes raw bytes.
func (p *speaker) send(format string, args ...any) {
	p.t.Helper()
	if len(args) > 0 {
		format = fmt.Sprintf(format, args...)
	}
	if _, err := io.WriteString(p.w, format); err != nil {
		p.t.Fatalf("send: %v", err)
	}
}

// wants reads exactly as many bytes as want has and compares.
func (p *speaker) wants(want string) {
	p.t.Helper()
	got := make([]byte, len(want))
	n, err := io.ReadFull(p.br, got)
	if string(got[:n]) != want {
		p.t.Fatalf("got  %q (%v)\nwant %q", got[:n], err, want)
	}
}

// head reads a message head up to and with its empty line.
func (p *peer) head() string {
	p.t.Helper()
	var b strings.Builder
	for {
		line, err := p.br.ReadString('\n')
		b.WriteString(line)
		if err != nil {
			p.t.Fatalf("head: %v after %q", err, b.String())
		}
		if line == "\r\n" {
			return b.String()
		}
	}
}

// response reads a whole response to a request with the given method.
func (p *speaker) response(method string) (*http.Response, string) {
	p.t.Helper()
	resp, err := http.ReadResponse(p.br, &http.Request{Method: method})
	if err != nil {
		p.t.Fatalf("response: %v", err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		p.t.Fatalf("response body: %v after %q", err, body)
	}
	return resp, string(body)
}

// wantsEnd expects the peer to end the connection without another byte.
func (p *peer) wantsEnd() {
	p.t.Helper()
	if b, err := p.br.ReadByte(); err == nil {
		p.t.Fatalf("got %q, want the connection's end", b)
	} else if errors.Is(err, os.ErrDeadlineExceeded) {
		p.t.Fatal("the connection was not ended")
	}
}

// testOrigin is a server that a test drives by hand.
type testOrigin struct {
	net.Listener
	t    *testing.T
	addr string // host:port
}

func startOrigin(t *testing.T) *testOrigin {
	t.Helper()
	for range 100 {
		l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", 10_000+originPort.Add(1)%22_000))
		if err == nil {
			t.Cleanup(func() { l.Close() })
			return &testOrigin{l, t, l.Addr().String()}
		}
	}
	t.Fatal("no port for an origin")
	return nil
}

// originPort counts ports, below those that the kernel chooses: it may give one again, and records are found by the port.
var originPort atomic.Uint32

// accept waits for the proxy's next connection.
func (o *testOrigin) accept() *peer {
	o.t.Helper()
	o.Listener.(*net.TCPListener).SetDeadline(time.Now().Add(patience))
	c, err := o.Accept()
	if err != nil {
		o.t.Fatalf("accept: %v", err)
	}
	return newPeer(o.t, c)
}

// wantsNone reports that no connection comes.
func (o *testOrigin) wantsNone() {
	o.t.Helper()
	o.Listener.(*net.TCPListener).SetDeadline(time.Now().Add(30 * time.Millisecond))
	if c, err := o.Accept(); err == nil {
		c.Close()
		o.t.Fatal("the origin was dialled")
	}
}

// apart reports whether the test that calls it runs in a process of its own. If not, it runs that test in one, beside others: for those
// that mostly wait.
func apart(t *testing.T) bool {
	t.Helper()
	return again(t, os.Args[0], "-test.run", "^"+t.Name()+"$", "-test.v")
}

// inNamespace is apart in a namespace of a kind, after a shell script that gets args. Where that cannot be, the test is skipped.
func inNamespace(t *testing.T, kind, script string, args ...string) bool {
	t.Helper()
	shell := script + ` && exec "$0" -test.run "^$TEST_APART\$" -test.v`
	return again(t, "unshare", append([]string{"--user", "--map-root-user", kind, "sh", "-c", shell, os.Args[0]}, args...)...)
}

// again runs the test that calls it with a command, unless that is how it was run.
func again(t *testing.T, command string, args ...string) bool {
	t.Helper()
	if os.Getenv("TEST_APART") == t.Name() {
		fmt.Println("begun")
		return true
	}
	t.Parallel()
	cmd := exec.Command(command, args...)
	cmd.Env = append(os.Environ(), "TEST_APART="+t.Name())
	out, err := cmd.CombinedOutput()
	if !bytes.Contains(out, []byte("begun\n")) {
		t.Skipf("cannot be run apart: %v, %s", err, out)
	} else if err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		passed := regexp.MustCompile(`(?m)^\s*(=== (RUN|PAUSE|CONT|NAME)|--- PASS).*\n`) // names alone: what failed would drown in them
		t.Errorf("apart: %v\n%s", err, passed.ReplaceAll(out, nil))
	}
	return false
}

// ---------------------------------------------------------------------------------------------------------------------
// Helpers for requests and responses

const (
	date   = "Date: Tue, 15 Nov 1994 08:12:31 GMT\r\n"
	viaOne = "Via: 1.1 sluice-test\r\n"

	// The plainest exchange; {o} stands for the origin's host:port.
	plainRequest = "GET http://{o}/ HTTP/1.1\r\nHost: {o}\r\n\r\n"
	plainWants   = "GET / HTTP/1.1\r\nHost: {o}\r\n" + viaOne + "\r\n"
	plainAnswer  = "HTTP/1.1 200 OK\r\n" + date + "Content-Length: 2\r\n\r\nhi"
	plainGets    = "HTTP/1.1 200 OK\r\n" + date + viaOne + "Content-Length: 2\r\n\r\nhi"
)

// fill writes the origin's address where text says {o}.
func (o *testOrigin) fill(text string) string { return strings.ReplaceAll(text, "{o}", o.addr) }

// served lists the log lines of requests and tunnels that have ended.
func (p *testProxy) served() (lines []string) {
	p.log.mu.Lock()
	text := p.log.text.String()
	p.log.mu.Unlock()
	for line := range strings.Lines(text) {
		if strings.Contains(line, `"msg":"request"`) || strings.Contains(line, `"msg":"tunnel"`) {
			lines = append(lines, line)
		}
	}
	return lines
}

// awaitServed waits for the record of the request or tunnel that follows the first n. A test that counts on it must have
// awaited those of all requests before.
func (p *testProxy) awaitServed(t *testing.T, n int) (r map[string]any) {
	t.Helper()
	var lines []string
	eventually(t, "the record of a request", func() bool {
		lines = p.served()
		return len(lines) > n
	})
	if err := json.Unmarshal([]byte(lines[n]), &r); err != nil {
		t.Fatalf("log line is not JSON: %q: %v", lines[n], err)
	}
	return r
}

// wantsRefusal reads an answer of the proxy's own: status, token and a one-line body that has every word.
func (p *peer) wantsRefusal(method string, status int, token string, words ...string) *http.Response {
	p.t.Helper()
	resp, body := p.response(method)
	if resp.StatusCode != status {
		p.t.Fatalf("status %s, want %d; body %q", resp.Status, status, body)
	}
	if ps := resp.Header.Get("Proxy-Status"); !strings.HasPrefix(ps, "sluice-test; error="+token+"; details=\"") || !strings.HasSuffix(ps, `"`) {
		p.t.Errorf("Proxy-Status: %s, want error=%s", ps, token)
	}
	if ct := resp.Header.Get("Content-Type"); !strings.HasPrefix(ct, "text/plain") {
		p.t.Errorf("Content-Type: %s", ct)
	}
	if method == "HEAD" {
		return resp
	}
	if !strings.HasSuffix(body, "\n") || strings.Count(body, "\n") != 1 {
		p.t.Errorf("body %q is not one line", body)
	}
	for _, word := range words {
		if !strings.Contains(body, word) {
			p.t.Errorf("body %q does not say %q", body, word)
		}
	}
	return resp
}

// wantsLogged compares a record's status and token with what the client was told.
func wantsLogged(t *testing.T, r map[string]any, status int, token string) {
	t.Helper()
	if r["error.type"] != token {
		t.Errorf("log says error.type=%v, want %s", r["error.type"], token)
	}
	if code, _ := r["http.response.status_code"].(float64); status != 0 && int(code) != status {
		t.Errorf("log says status %v, want %d", code, status)
	}
}

// wantsInSync expects the connection to be ready for another request: the proxy itself answers one at once.
func (p *peer) wantsInSync() {
	p.t.Helper()
	p.send("OPTIONS http://127.0.0.1:9/ HTTP/1.1\r\nHost: 127.0.0.1:9\r\nMax-Forwards: 0\r\n\r\n")
	if resp, body := p.response("OPTIONS"); resp.StatusCode != 200 || body != "" {
		p.t.Fatalf("out of step: %s %q", resp.Status, body)
	}
}

// isMessage reports whether sent begins with a whole request.
func isMessage(sent []byte) bool {
	req, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(sent)))
	if err != nil {
		return false
	}
	_, err = io.Copy(io.Discard, req.Body)
	return err == nil
}

// ---------------------------------------------------------------------------------------------------------------------
// Helpers for tunnels, logs and commands

// sluice runs a sub-command and gives its exit status and what it printed.
func sluice(args []string, environ ...string) (status int, stdout, stderr string) {
	var out, errs bytes.Buffer
	status = command(args, environ, &out, &errs)
	return status, out.String(), errs.String()
}

// prefixed makes "NAME=value" into environment entries.
func prefixed(vars ...string) (environ []string) {
	for _, v := range vars {
		environ = append(environ, "SLUICE_"+v)
	}
	return environ
}

// freeAddr is an address on which nobody listens. Its port is below those that kernels give to sockets that ask for any, so
// that nobody gets it by chance a moment later. No other test process that runs is given it, and this one not soon again.
func freeAddr(t *testing.T) string {
	t.Helper()
	for range ports.count {
		port := ports.first + int(ports.last.Add(1))%ports.count
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			defer l.Close()
			return l.Addr().String()
		}
	}
	t.Fatal("no port is free")
	return ""
}

// originFor is an origin for a subtest that listens until the whole test ends: no other subtest gets its port, by which
// recordFor tells records apart.
func originFor(t, whole *testing.T) *testOrigin {
	o := startOrigin(whole)
	o.t = t
	return o
}

// occupied is an address on which another program listens.
func occupied(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.Addr().String()
}

// runProxy is startProxy for a stdout of which nothing can be read. stop begins the drain and waits for its end.
func runProxy(t *testing.T, stdout io.Writer, vars ...string) (p *testProxy, stop func()) {
	t.Helper()
	p = &testProxy{addr: freeAddr(t), admin: freeAddr(t)}
	environ := prefixed(append([]string{"LISTEN=" + p.addr, "ADMIN=" + p.admin, "NAME=sluice-test", "ALLOW_PORTS=*", "ALLOW_CIDRS=127.0.0.0/8",
		"DRAIN_TIMEOUT=200ms", "TUNE=off"}, vars...)...)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, environ, stdout) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("run: %v", err)
			}
		case <-time.After(2 * patience):
			t.Errorf("the proxy did not stop\n%s", stacks())
		}
	})
	t.Cleanup(stop)
	eventually(t, "the proxy to be ready", func() bool {
		select {
		case err := <-ended:
			ended <- nil
			t.Fatalf("run: %v", err)
		default:
		}
		return adminStatus(p.admin, "/readyz") == 200
	})
	return p, stop
}

// adminStatus asks the admin listener; 0 means no answer.
func adminStatus(admin, path string) int {
	client := http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + admin + path)
	if err != nil {
		return 0
	}
	resp.Body.Close()
	return resp.StatusCode
}

// ask sends a request without a body and reads the answer.
func (p *peer) ask(method, target string, fields ...string) (*http.Response, string) {
	p.t.Helper()
	p.send("%s", request(method, target, fields...))
	return p.response(method)
}

func request(method, target string, fields ...string) string {
	host := target
	if u, err := url.Parse(target); err == nil && u.Host != "" {
		host = u.Host
	}
	return method + " " + target + " HTTP/1.1\r\nHost: " + host + "\r\n" + strings.Join(append(fields, ""), "\r\n") + "\r\n"
}

// wantsRefusal checks an answer of the proxy's own: its status, its token, a text of one line.
func wantsRefusal(t *testing.T, resp *http.Response, body string, status int, token string) {
	t.Helper()
	ps := resp.Header.Get("Proxy-Status")
	if resp.StatusCode != status || !strings.HasPrefix(ps, "sluice-test; error="+token+"; details=\"") {
		t.Errorf("got %d, Proxy-Status %q, %q\nwant %d, %s", resp.StatusCode, ps, body, status, token)
	}
	if ct := resp.Header.Get("Content-Type"); !strings.HasPrefix(ct, "text/plain") {
		t.Errorf("Content-Type %q", ct)
	}
	if strings.Count(body, "\n") != 1 || !strings.HasSuffix(body, "\n") {
		t.Errorf("the body is not one line: %q", body)
	}
}

// recordFor waits for the record of a request or tunnel to addr.
func (p *testProxy) recordFor(t *testing.T, msg, addr string) map[string]any {
	t.Helper()
	var found map[string]any
	eventually(t, fmt.Sprintf("a record with msg %q for %s", msg, addr), func() bool {
		for _, r := range p.log.records(t) {
			if r["msg"] == msg && fmt.Sprint(r["server.address"], ":", r["server.port"]) == addr {
				found = r
				return true
			}
		}
		return false
	})
	return found
}

// wantsFields compares some fields of a record.
func wantsFields(t *testing.T, record map[string]any, want map[string]any) {
	t.Helper()
	for name, value := range want {
		if got, ok := record[name]; !ok || got != value {
			t.Errorf("%s: got %#v, want %#v", name, got, value)
		}
	}
	if t.Failed() {
		t.Logf("record: %v", record)
	}
}

// text is everything that was logged.
func (l *logSink) all() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// serveAt answers requests on addr with the address itself, or with handler.
func serveAt(t *testing.T, addr string, handler http.HandlerFunc) string {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	if handler == nil {
		handler = func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, l.Addr().String()) }
	}
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: handler}}
	s.Start()
	t.Cleanup(s.Close)
	return l.Addr().String()
}

// openTunnel connects a client to an origin.
func (p *testProxy) openTunnel(t *testing.T, o *testOrigin) (client, origin *peer) {
	t.Helper()
	client = p.dial(t)
	client.send("CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", o.addr, o.addr)
	origin = o.accept()
	if head := client.head(); !strings.HasPrefix(head, "HTTP/1.1 200 ") {
		t.Fatalf("CONNECT: %q", head)
	}
	return client, origin
}

// all reads up to the end of the sending side.
func (p *peer) all() []byte {
	p.t.Helper()
	b, err := io.ReadAll(p.br)
	if err != nil {
		p.t.Fatalf("read: %v after %d bytes", err, len(b))
	}
	return b
}

// noise is n bytes that do not repeat.
func noise(n int, seed byte) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// sending writes data from a goroutine; the channel says how that went.
func (p *peer) sending(data []byte, closeWrite bool) <-chan error {
	done := make(chan error, 1)
	go func() {
		_, err := p.Write(data)
		if err == nil && closeWrite {
			err = p.CloseWrite()
		}
		done <- err
	}()
	return done
}

// sameBytes compares long byte strings.
func sameBytes(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	i := 0
	for i < len(got) && i < len(want) && got[i] == want[i] {
		i++
	}
	t.Errorf("%s: %d bytes, want %d; they differ from byte %d", what, len(got), len(want), i)
}

// openPipes counts this process's descriptors of pipes.
func openPipes() (n int) {
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		if target, _ := os.Readlink("/proc/self/fd/" + e.Name()); strings.HasPrefix(target, "pipe:") {
			n++
		}
	}
	return n
}

// ---------------------------------------------------------------------------------------------------------------------
// The code itself

// TestTidy holds the code to its limits: functions of at most 70 lines, no init, at most five package variables, no function
// literal as a goroutine, since a stack dump should name it, and a proxy.go that can be read in one sitting.
func TestTidy(t *testing.T) {
	fset := token.NewFileSet()
	variables := 0
	for _, name := range []string{"proxy.go", "front.go", "observe.go", "tune_linux.go", "tune_other.go"} {
		file, err := parser.ParseFile(fset, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		text, _ := os.ReadFile(name)
		if lines := bytes.Count(text, []byte("\n")); lines >= 3000 {
			t.Errorf("%s has %d lines", name, lines)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				if lines := fset.Position(n.End()).Line - fset.Position(n.Pos()).Line + 1; lines > 70 {
					t.Errorf("%s: %s has %d lines", name, n.Name.Name, lines)
				}
				if n.Name.Name == "init" && n.Recv == nil {
					t.Errorf("%s: init", name)
				}
			case *ast.GoStmt:
				if _, ok := n.Call.Fun.(*ast.FuncLit); ok {
					t.Errorf("%s: a goroutine without a name", fset.Position(n.Pos()))
				}
			}
			return true
		})
		for _, d := range file.Decls {
			if d, ok := d.(*ast.GenDecl); ok && d.Tok == token.VAR {
				for _, s := range d.Specs {
					variables += len(s.(*ast.ValueSpec).Names)
				}
			}
		}
	}
	if variables > 5 {
		t.Errorf("%d package variables", variables)
	}
}

// TestReadme compares the README's table of variables with the config struct; -update rewrites it.
func TestReadme(t *testing.T) {
	const begin, end = "<!-- variables: begin -->\n", "<!-- variables: end -->\n"
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	front, rest, ok1 := strings.Cut(string(text), begin)
	_, back, ok2 := strings.Cut(rest, end)
	if !ok1 || !ok2 {
		t.Fatal("README.md has no table of variables")
	}
	table := "| variable | default | meaning |\n|---|---|---|\n"
	for _, v := range variables() {
		if v.doc == "" || v.name == "" {
			t.Errorf("field %s has no meaning or no name", v.field)
		}
		def := "`" + v.def + "`"
		if v.def == "" {
			def = ""
		}
		table += fmt.Sprintf("| `%s%s` | %s | %s |\n", envPrefix, v.name, def, v.doc)
	}
	want := front + begin + table + end + back
	if want == string(text) {
		return
	}
	if !*update {
		t.Fatal("the README's table of variables differs from the config struct: go test -run TestReadme -update")
	}
	if err := os.WriteFile("README.md", []byte(want), 0o644); err != nil {
		t.Fatal(err)
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Configuration

// wantsFault checks that a report has a line that names a variable and its value, and gives a reason as well.
func wantsFault(t *testing.T, report, name, value string) {
	t.Helper()
	for line := range strings.Lines(report) {
		if strings.Contains(line, "SLUICE_"+name) && strings.Contains(line, value) && len(line) > len("SLUICE_"+name+value)+12 {
			return
		}
	}
	t.Errorf("no line names SLUICE_%s, %q and a reason:\n%s", name, value, report)
}

func TestBadValues(t *testing.T) {
	for name, values := range map[string][]string{
		"LISTEN":              {"proxy.test:3128", "127.0.0.1", ":99999", "127.0.0.1:x", "127.0.0.1:3128,nowhere", ","},
		"LISTENERS":           {"-1", "two", "1.5"},
		"ADMIN":               {"nowhere", "127.0.0.1", "127.0.0.1:99999", "on"},
		"NAME":                {"two words", "a,b", `"quoted"`, "naïve"},
		"ALLOW_CLIENTS":       {"everybody", "10.0.0.0/33", "loopback,10.0.0"},
		"ALLOW_PORTS":         {"0", "65536", "http", "80-", "-80", "90-80", "80,x", "+80"},
		"ALLOW_CIDRS":         {"10.0.0.0/33", "10.0.0", "fe80::1%eth0", "example.com", "10.0.0.1,bad"},
		"ALLOW_PRIVATE_HOSTS": {"a..b", "app.test:0", "app.test:99999", "app.test:http", "*.*.test", "app.*", "http://app.test", "*", "a b/c", "10.0.0.0/64", "-:"},
		"MAX_HEADER":          {"-1", "many", "10XB", "KiB", "NaN", "64 KiBs", "1", "99999TB", "1e400"},
		"MAX_REQUEST_BODY":    {"-1", "lots", "NaN", "Inf", "99999999999TB", "10 M B"},
		"HEADER_TIMEOUT":      {"-1s", "10", "soon", "1s1", "1 s"},
		"TUNNEL_MAX_AGE":      {"-1ns", "1d", "9999999999h"},
		"DNS_STALE":           {"-5m", "five"},
		"DNS_SERVERS":         {"10.0.0.2", "dns.test:53", "10.0.0.2:0", "10.0.0.2:99999"},
		"POOL_IDLE":           {"-1", "1k", "99999999999999999999"},
		"LOG_LEVEL":           {"loud", "7", "warning"},
		"LOG_FORMAT":          {"xml", "JSON5"},
		"LOG_SAMPLE":          {"info", "info=", "info=2", "info=-0.1", "loud=0.5", "info=NaN", "info=0.5,debug", "=1"},
		"LOG_BUFFER":          {"0", "-1", "big"},
		"LOG_QUERY":           {"maybe", "2"},
		"TUNE":                {"please", "on"},
		"NOFILE":              {"-1", "unlimited"},
	} {
		for _, value := range values {
			t.Run(name+"="+value, func(t *testing.T) {
				status, stdout, stderr := sluice([]string{"env"}, "SLUICE_"+name+"="+value)
				if status != 2 || stdout != "" {
					t.Errorf("status %d, stdout %q", status, stdout)
				}
				wanted := value // or the item that is at fault, which is the last one of a list
				if i := strings.LastIndexByte(value, ','); i >= 0 && name != "NAME" {
					wanted = value[i+1:]
				}
				if strings.ContainsAny(wanted, `"ï `) { // may be quoted, or be a list of two
					wanted = ""
				}
				wantsFault(t, stderr, name, wanted)
			})
		}
	}
}

func TestGoodValues(t *testing.T) {
	for name, values := range map[string][]string{
		"LISTEN":              {":3128", "[::1]:3128", "127.0.0.1:3128,[::1]:3129", "0.0.0.0:0", "localhost:3128"},
		"ADMIN":               {"off", ":3129", "[::1]:0"},
		"NAME":                {"edge-1.example", "a_b~c"},
		"ALLOW_CLIENTS":       {"all", "loopback", "private,10.9.0.0/16,192.0.2.1,2001:db8::/32"},
		"ALLOW_PORTS":         {"*", "443", "80,443,8000-8099", "1-65535", "80, 443"},
		"ALLOW_CIDRS":         {"10.0.0.0/8", "127.0.0.1,::1", "10.1.2.3/8"},
		"ALLOW_PRIVATE_HOSTS": {"app", "app.test,*.app.test,.db.test:5432", "10.0.0.0/8", "10.0.0.1:80", "[fd00::1]:443", "fd00::/8", "my_app", "App.Test."},
		"MAX_HEADER":          {"64KiB", "65536", "16MiB", "100KB", "64kib", "65536B"},
		"MAX_RESPONSE_BODY":   {"0", "10MB", "1GiB", "1TB"},
		"IDLE_TIMEOUT":        {"0", "1h30m", "500ms", "1.5s"},
		"DNS_SERVERS":         {"10.0.0.2:53", "10.0.0.2:53,[fd00::2]:53"},
		"POOL_IDLE":           {"0", "5"},
		"LOG_LEVEL":           {"debug", "info", "warn", "error", "WARN"},
		"LOG_FORMAT":          {"json", "text", "auto"},
		"LOG_SAMPLE":          {"info=0", "debug=0.01,info=0.1", "error=1"},
		"LOG_QUERY":           {"true", "false", "1"},
		"TUNE":                {"check", "apply", "off"},
	} {
		for _, value := range values {
			t.Run(name+"="+value, func(t *testing.T) {
				status, stdout, stderr := sluice([]string{"env"}, "SLUICE_"+name+"="+value)
				if status != 0 || stderr != "" {
					t.Errorf("status %d, stderr %q", status, stderr)
				}
				if row := envRow(stdout, name); !strings.Contains(row, value) || !strings.Contains(row, "environment") {
					t.Errorf("row %q", row)
				}
			})
		}
	}
}

// envRow is the line of `sluice env` for a variable.
func envRow(stdout, name string) string {
	for line := range strings.Lines(stdout) {
		if strings.HasPrefix(line, "SLUICE_"+name+" ") {
			return line
		}
	}
	return ""
}

func TestFaultsAreReportedTogether(t *testing.T) {
	listen := freeAddr(t)
	var log logSink
	files := countFiles()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err := run(ctx, prefixed("LISTEN="+listen, "ADMIN="+freeAddr(t), "MAX_HEADER=much", "IDLE_TIMEOUT=10", "POOL_IDLE=-4", "LOG_FORMAT=xml", "LISTNE=:1",
		"DNS_STALE_FILE=/does/not/exist", "ALLOW_PRIVATE_HOSTS=good.test,b@d", "PASSWORD=topsecret", "USERS=ann:topsecret"), &log)
	if err == nil {
		t.Fatal("run took a bad environment")
	}
	var report bytes.Buffer
	if status := exitStatus(err, &report); status != 2 {
		t.Errorf("exit status %d", status)
	}
	for name, value := range map[string]string{"MAX_HEADER": "much", "IDLE_TIMEOUT": "10", "POOL_IDLE": "-4", "LOG_FORMAT": "xml", "LISTNE": "SLUICE_LISTEN",
		"DNS_STALE_FILE": "/does/not/exist", "ALLOW_PRIVATE_HOSTS": "b@d", "PASSWORD": ""} {
		wantsFault(t, report.String(), name, value)
	}
	if strings.Contains(report.String(), "topsecret") {
		t.Errorf("the report has a secret:\n%s", report.String())
	}
	if c, err := net.Dial("tcp", listen); err == nil {
		c.Close()
		t.Error("it listens all the same")
	}
	if n := countFiles(); n > files || log.all() != "" {
		t.Errorf("%d descriptors, %d before; log %q", n, files, log.all())
	}
	// The environment is judged before the address is touched: it is not the address in use that is complained about.
	if err := run(ctx, prefixed("LISTEN="+occupied(t), "TUNE=never"), io.Discard); err == nil || exitStatus(err, io.Discard) != 2 {
		t.Errorf("got %v", err)
	}
}

func TestUnknownVariables(t *testing.T) {
	for unknown, nearest := range map[string]string{"LISTNE": "LISTEN", "LOGLEVEL": "LOG_LEVEL", "DNS_SERVER": "DNS_SERVERS", "DRAIN_TIMEOUTS": "DRAIN_TIMEOUT",
		"ALLOW_PORT": "ALLOW_PORTS", "PORTS": "", "SERVICE": "", "listen": ""} {
		status, _, stderr := sluice([]string{"env"}, "SLUICE_"+unknown+"=value")
		if status != 2 {
			t.Errorf("%s: status %d", unknown, status)
		}
		wantsFault(t, stderr, unknown, "SLUICE_"+nearest)
	}
	links := prefixed("SERVICE_HOST=10.0.0.1", "SERVICE_PORT=3128", "SERVICE_PORT_HTTP=3128", "SERVICE_PORT_HTTPS_ALT=1", "PORT=tcp://10.0.0.1:3128",
		"PORT_3128_TCP=tcp://10.0.0.1:3128", "PORT_3128_TCP_ADDR=10.0.0.1", "PORT_3128_TCP_PORT=3128", "PORT_3128_TCP_PROTO=tcp",
		"METRICS_SERVICE_HOST=10.0.0.2", "METRICS_SERVICE_PORT=9090", "METRICS_SERVICE_PORT_HTTP=9090", "METRICS_PORT=tcp://10.0.0.2:9090",
		"METRICS_PORT_9090_TCP=tcp://10.0.0.2:9090", "METRICS_PORT_9090_TCP_PROTO=tcp", "METRICS_PORT_9090_TCP_PORT=9090", "QUIC_V1_PORT_443_UDP_ADDR=10.0.0.2")
	if status, _, stderr := sluice([]string{"env"}, links...); status != 0 {
		t.Errorf("service links: status %d: %s", status, stderr)
	}
	if status, _, stderr := sluice([]string{"env"}, "SLUICEGATE=1", "HTTP_PROXY=http://127.0.0.1:1", "PATH=/bin", "NOVALUE"); status != 0 {
		t.Errorf("other programs' variables: status %d: %s", status, stderr)
	}
}

func TestValuesFromFiles(t *testing.T) {
	file := func(text string) string {
		path := filepath.Join(t.TempDir(), "value")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good, bad, missing := file("7m\n"), file("soon\n"), filepath.Join(t.TempDir(), "missing")
	for _, c := range []struct {
		name    string
		environ []string
		status  int
		want    []string // in the row of DNS_STALE, or in a line of the report
	}{
		{"from a file", []string{"DNS_STALE_FILE=" + good}, 0, []string{"7m", good}},
		{"empty beside a file", []string{"DNS_STALE=", "DNS_STALE_FILE=" + good}, 0, []string{"7m", good}},
		{"empty counts as unset", []string{"DNS_STALE="}, 0, []string{"5m", "default"}},
		{"empty path counts as unset", []string{"DNS_STALE=9m", "DNS_STALE_FILE="}, 0, []string{"9m", "environment"}},
		{"no such file", []string{"DNS_STALE_FILE=" + missing}, 2, []string{"SLUICE_DNS_STALE_FILE", missing, "no such file"}},
		{"a directory", []string{"DNS_STALE_FILE=" + filepath.Dir(missing)}, 2, []string{"SLUICE_DNS_STALE_FILE"}},
		{"both", []string{"DNS_STALE=9m", "DNS_STALE_FILE=" + good}, 2, []string{"SLUICE_DNS_STALE", "SLUICE_DNS_STALE_FILE", "twice"}},
		{"bad text in it", []string{"DNS_STALE_FILE=" + bad}, 2, []string{"SLUICE_DNS_STALE", "soon"}},
		{"an unknown variable's file", []string{"DNS_STAIL_FILE=" + good}, 2, []string{"SLUICE_DNS_STAIL_FILE", "SLUICE_DNS_STALE"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, stdout, stderr := sluice([]string{"env"}, prefixed(c.environ...)...)
			if status != c.status {
				t.Errorf("status %d: %s", status, stderr)
			}
			row := envRow(stdout, "DNS_STALE")
			if c.status != 0 {
				row = stderr
			}
			for _, want := range c.want {
				if !strings.Contains(row, want) {
					t.Errorf("no %q in %q", want, row)
				}
			}
		})
	}
}

func TestCommands(t *testing.T) {
	t.Run("env", func(t *testing.T) {
		host, _ := os.Hostname()
		status, stdout, _ := sluice([]string{"env"})
		if status != 0 {
			t.Errorf("status %d", status)
		}
		for name, def := range map[string]string{"LISTEN": "127.0.0.1:3128", "LISTENERS": "0", "ADMIN": "127.0.0.1:3129", "NAME": host, "ALLOW_CLIENTS": "loopback,private",
			"ALLOW_PORTS": "80,443", "ALLOW_PRIVATE_HOSTS": "", "ALLOW_CIDRS": "", "MAX_HEADER": "64KiB", "MAX_REQUEST_BODY": "0", "MAX_RESPONSE_BODY": "0",
			"HEADER_TIMEOUT": "10s", "IDLE_TIMEOUT": "75s", "DIAL_TIMEOUT": "10s", "RESPONSE_TIMEOUT": "60s", "BODY_TIMEOUT": "60s", "TUNNEL_IDLE_TIMEOUT": "10m",
			"TUNNEL_HALF_CLOSE_TIMEOUT": "30s", "TUNNEL_MAX_AGE": "0", "DRAIN_TIMEOUT": "8s", "POOL_IDLE": "1024", "POOL_IDLE_PER_HOST": "128",
			"POOL_IDLE_TIMEOUT": "30s", "DNS_CACHE_TTL": "5s", "DNS_STALE": "5m", "DNS_TIMEOUT": "5s", "DNS_SERVERS": "", "LOG_LEVEL": "info", "LOG_FORMAT": "auto",
			"LOG_SAMPLE": "", "LOG_BUFFER": "8192", "LOG_QUERY": "false", "TUNE": "check", "NOFILE": "0"} {
			row := envRow(stdout, name)
			if cells := strings.Fields(row); len(cells) < 4 || !strings.Contains(row, " "+def+" ") || name != "NAME" && !strings.Contains(row, "default") {
				t.Errorf("%s: row %q", name, row)
			}
		}
	})
	t.Run("version", func(t *testing.T) {
		if status, stdout, _ := sluice([]string{"version"}); status != 0 || !strings.HasPrefix(stdout, "sluice ") || strings.Count(stdout, "\n") != 1 {
			t.Errorf("status %d, %q", status, stdout)
		}
	})
	t.Run("unknown", func(t *testing.T) {
		for _, name := range []string{"serve", "--help", "-v", ""} {
			if status, stdout, stderr := sluice([]string{name}); status != 2 || stdout != "" || !strings.Contains(stderr, "health") {
				t.Errorf("%q: status %d, stdout %q, stderr %q", name, status, stdout, stderr)
			}
		}
	})
	t.Run("health", func(t *testing.T) {
		p := startProxy(t)
		for _, c := range []struct {
			environ string
			status  int
		}{{"ADMIN=" + p.admin, 0}, {"ADMIN=" + freeAddr(t), 1}, {"ADMIN=off", 1}, {"ADMIN=nonsense", 1}, {"ADMIN=" + strings.Replace(p.admin, "127.0.0.1", "0.0.0.0", 1), 0},
			{"ADMIN=" + strings.TrimPrefix(p.admin, "127.0.0.1"), 0}} {
			// A proxy in the environment is not to be asked: it may be the one that is asked about.
			t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
			if status, _, stderr := sluice([]string{"health"}, "SLUICE_"+c.environ); status != c.status || status != 0 && stderr == "" {
				t.Errorf("%s: status %d, want %d: %q", c.environ, status, c.status, stderr)
			}
		}
	})
}

// Sizes are in powers of 2 or of 10, and they are what is enforced.
func TestSizesAreMeant(t *testing.T) {
	origin := serveAt(t, "127.0.0.1:0", func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		n, _ := strconv.Atoi(r.URL.Path[1:])
		w.Header().Set("Content-Length", strconv.Itoa(n))
		w.Write(make([]byte, n))
	})
	p := startProxy(t, "MAX_REQUEST_BODY=1KiB", "MAX_RESPONSE_BODY=1KB")
	for _, c := range []struct {
		up, down, status int
		token            string
	}{{1024, 0, 200, ""}, {1025, 0, 413, "http_request_error"}, {0, 1000, 200, ""}, {0, 1001, 502, "http_response_body_size"}} {
		client := p.dial(t)
		client.send("POST http://%s/%d HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n%s", origin, c.down, origin, c.up, strings.Repeat("x", c.up))
		resp, body := client.response("POST")
		if c.token != "" {
			wantsRefusal(t, resp, body, c.status, c.token)
		} else if resp.StatusCode != c.status || len(body) != c.down {
			t.Errorf("%+v: got %d with %d bytes", c, resp.StatusCode, len(body))
		}
	}
}

// A limit that is as good as none must not be too large for the kernel.
func TestLongTimeouts(t *testing.T) {
	for _, idle := range []string{"0", "720h", "1200h", "100000h"} {
		t.Run(idle, func(t *testing.T) {
			o := startOrigin(t)
			p, _ := runProxy(t, io.Discard, "TUNNEL_IDLE_TIMEOUT="+idle, "IDLE_TIMEOUT="+idle, "BODY_TIMEOUT="+idle, "DIAL_TIMEOUT="+idle)
			c, up := p.openTunnel(t, o)
			c.send("ping")
			up.wants("ping")
		})
	}
}

// TestEmptyValueFile: a file without text leaves its variable unset, as an empty variable does.
func TestEmptyValueFile(t *testing.T) {
	host, _ := os.Hostname()
	if !isToken([]byte(host)) {
		host = "sluice"
	}
	for name, text := range map[string]string{"nothing": "", "an empty line": "\n", "white space": " \t\r\n"} {
		path := filepath.Join(t.TempDir(), "value")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for variable, want := range map[string]string{"NAME": host, "DNS_STALE": "5m", "LISTEN": "127.0.0.1:3128", "MAX_HEADER": "64KiB"} {
			t.Run(variable+", "+name, func(t *testing.T) {
				status, stdout, stderr := sluice([]string{"env"}, "SLUICE_"+variable+"_FILE="+path)
				if status != 0 || stderr != "" {
					t.Errorf("status %d, stderr %q", status, stderr)
				}
				if row := envRow(stdout, variable); !strings.Contains(row, want) || strings.Contains(row, path) {
					t.Errorf("row %q, want %q", row, want)
				}
			})
		}
	}
}

// TestUnknownEmptyVariables: a misspelt variable is refused whatever its value, also when that is empty.
func TestUnknownEmptyVariables(t *testing.T) {
	for unknown, nearest := range map[string]string{"LISTNERS": "LISTENERS", "LISTNE": "LISTEN", "DNS_STAIL_FILE": "DNS_STALE", "SERVICE": ""} {
		status, _, stderr := sluice([]string{"env"}, "SLUICE_"+unknown+"=")
		if status != 2 {
			t.Errorf("%s: status %d", unknown, status)
		}
		wantsFault(t, stderr, unknown, "SLUICE_"+nearest)
	}
}

// TestListsWithSpaces: every list may have spaces after its commas.
func TestListsWithSpaces(t *testing.T) {
	for name, value := range map[string]string{"LISTEN": "127.0.0.1:0, 127.0.0.1:0", "DNS_SERVERS": "10.0.0.2:53, [fd00::2]:53"} {
		status, stdout, stderr := sluice([]string{"env"}, "SLUICE_"+name+"="+value)
		if status != 0 || stderr != "" {
			t.Errorf("%s: status %d, stderr %q", name, status, stderr)
		}
		if row := envRow(stdout, name); !strings.Contains(row, value) {
			t.Errorf("row %q", row)
		}
	}
	if t.Failed() {
		return // nor does it start
	}
	d := startDNS(t)
	d.set("app.test", dnsReply{addrs: "127.0.0.1"})
	_, port, _ := net.SplitHostPort(serveAt(t, "127.0.0.1:0", nil))
	p := startProxy(t, "LISTEN=127.0.0.1:0, 127.0.0.1:0", "DNS_SERVERS="+d.addr+", "+d.addr)
	addresses := p.log.await(t, "listening", 1)["addresses"].([]any)
	if len(addresses) != 2 {
		t.Fatalf("it listens on %v", addresses)
	}
	for _, addr := range addresses {
		c, err := net.Dial("tcp", addr.(string))
		if err != nil {
			t.Fatal(err)
		}
		if resp, body := newPeer(t, c).ask("GET", "http://app.test:"+port+"/"); resp.StatusCode != 200 {
			t.Errorf("%s: %s %q", addr, resp.Status, body)
		}
	}
}

// TestLogLevelsHaveNames: a level is one of four names, not arithmetic with them, which no record has.
func TestLogLevelsHaveNames(t *testing.T) {
	for _, value := range []string{"info+3", "debug-1", "error+4", "debug-4"} {
		status, stdout, stderr := sluice([]string{"env"}, "SLUICE_LOG_LEVEL="+value)
		if status != 2 || stdout != "" {
			t.Errorf("%s: status %d, stdout %q", value, status, stdout)
		}
		wantsFault(t, stderr, "LOG_LEVEL", value)
		status, stdout, stderr = sluice([]string{"env"}, "SLUICE_LOG_SAMPLE="+value+"=0.1")
		if status != 2 || stdout != "" {
			t.Errorf("sample %s: status %d, stdout %q", value, status, stdout)
		}
		wantsFault(t, stderr, "LOG_SAMPLE", value+"=0.1")
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernel settings

// tuned has the kernel's settings examined, and gives what was found by setting, and the log.
func tuned(t *testing.T, vars ...string) (map[string]finding, *logSink) {
	t.Helper()
	cfg, _, err := loadConfig(prefixed(vars...))
	if err != nil {
		t.Fatal(err)
	}
	log := &logSink{}
	findings := tuneKernel(cfg, slog.New(slog.NewJSONHandler(log, nil)))
	if findings == nil {
		t.Skip("kernel settings are examined on Linux alone")
	}
	found := map[string]finding{}
	for _, f := range findings {
		found[f.Setting] = f
	}
	if len(found) != len(findings) || len(found) < 20 {
		t.Fatalf("%d findings: %v", len(findings), findings)
	}
	return found, log
}

// The files below are those of a kernel with the settings that it comes with, in a container of 256 MiB.
var kernelFiles = map[string]string{
	"/proc/sys/fs/nr_open": "1048576", "/proc/sys/fs/file-max": "9223372036854775807", "/proc/sys/fs/pipe-user-pages-soft": "16384",
	"/proc/sys/net/core/somaxconn": "4096", "/proc/sys/net/ipv4/tcp_syncookies": "1", "/proc/sys/net/ipv4/tcp_max_syn_backlog": "128",
	"/proc/sys/net/ipv4/ip_local_port_range": "32768\t60999", "/proc/sys/net/ipv4/ip_local_reserved_ports": "", "/proc/sys/net/ipv4/ip_forward": "1", "/proc/sys/net/ipv4/tcp_tw_reuse": "1",
	"/proc/sys/net/ipv4/tcp_fin_timeout": "60", "/proc/sys/net/ipv4/tcp_keepalive_time": "7200", "/proc/sys/net/ipv4/tcp_keepalive_intvl": "75",
	"/proc/sys/net/ipv4/tcp_keepalive_probes": "9", "/proc/sys/net/ipv4/tcp_rmem": "4096\t131072\t6291456", "/proc/sys/net/ipv4/tcp_wmem": "4096\t16384\t4194304",
	"/proc/sys/net/ipv4/tcp_migrate_req": "1", "/proc/sys/net/ipv4/tcp_congestion_control": "cubic", "/proc/sys/net/ipv4/tcp_allowed_congestion_control": "reno cubic bbr",
	"/proc/sys/net/netfilter/nf_conntrack_max": "262144", "/proc/sys/net/netfilter/nf_conntrack_count": "17",
	"/sys/fs/cgroup/cgroup.procs": "1", "/sys/fs/cgroup/pids.max": "max", "/sys/fs/cgroup/memory.max": "268435456", "/sys/fs/cgroup/cpu.max": "max 100000",
	"/proc/self/cgroup": "0::/", "/proc/self/mountinfo": cgroup2At("/"), "GOMAXPROCS": "2", "/proc/sys/net/core/netdev_max_backlog": "gone",
}

// cgroup2At is a line of mountinfo that has a cgroup at /sys/fs/cgroup; cgroup1At one with controllers of version 1, in their folder.
func cgroup2At(root string) string {
	return "42 31 0:39 " + root + " /sys/fs/cgroup ro,nosuid shared:9 - cgroup2 cgroup rw,nsdelegate\n"
}

func cgroup1At(root, controllers string) string {
	return "43 31 0:32 " + root + " /sys/fs/cgroup/" + controllers + " ro,relatime - cgroup cgroup rw," + controllers + "\n"
}

// TestKernelSettings has a kernel's files say what a case tells, and all others that all is well. Its own /proc/sys and /sys/fs/cgroup are in a
// mount namespace.
func TestKernelSettings(t *testing.T) {
	if !inNamespace(t, "-mn", `mount -t tmpfs none /sys/fs/cgroup && for f in cgroup mountinfo; do echo >/sys/fs/cgroup/own-$f && mount --bind /sys/fs/cgroup/own-$f /proc/$$/$f || exit; done &&
		ip link add eth0 type veth && ip link set eth0 up && ip -6 route add default dev eth0 && mount -t tmpfs none /proc/sys && ulimit -n 3000`) {
		return
	}
	write := func(files map[string]string) {
		for name, value := range files {
			if name == "GOMAXPROCS" {
				n, _ := strconv.Atoi(value)
				runtime.GOMAXPROCS(n)
				continue
			}
			os.MkdirAll(filepath.Dir(name), 0o755)
			if value == "gone" {
				os.Remove(name)
			} else if err := os.WriteFile(name, []byte(value+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	write(kernelFiles)
	all, _ := tuned(t)
	for setting, f := range all {
		if f.Verdict != verdictOK || f.Mend != "" || f.Found == "" || f.Wanted == "" || f.Why == "" || f.Change == "" {
			t.Errorf("%s: %+v", setting, f)
		}
	}
	for setting, change := range map[string]string{"RLIMIT_NOFILE": "limits of the container", "fs.nr_open": "host", "fs.file-max": "host", "fs.pipe-user-pages-soft": "host",
		"net.core.rmem_max": "host", "net.core.wmem_max": "host", "cgroup pids.max": "limits of the container", "cgroup memory.max": "limits of the container", "cgroup cpu.max": "environment", "IPv6 route": "host"} {
		if all[setting].Change != change {
			t.Errorf("%+v", all[setting])
		}
	}
	type files map[string]string
	v1 := files{"/proc/self/cgroup": "9:name=systemd:/\n7:pids:/a/b\n5:memory:/a/b\n3:cpu,cpuacct:/host/x\n0::/",
		"/proc/self/mountinfo":                 "30 23 0:28 / /sys/fs/cgroup rw - tmpfs none rw\n" + cgroup1At("/", "pids") + cgroup1At("/", "memory") + cgroup1At("/host/x", "cpu,cpuacct"),
		"/sys/fs/cgroup/pids/a/b/cgroup.procs": "", "/sys/fs/cgroup/pids/a/b/pids.max": "max", "/sys/fs/cgroup/pids/a/cgroup.procs": "", "/sys/fs/cgroup/pids/a/pids.max": "20",
		"/sys/fs/cgroup/memory/cgroup.procs": "", "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712", "/sys/fs/cgroup/memory/a/b/cgroup.procs": "",
		"/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "33554432", "/sys/fs/cgroup/cpu,cpuacct/cgroup.procs": "", "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000", "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000", "GOMAXPROCS": "4"}
	const unseen = "cannot be read: no cgroup is to be seen"
	hostNetwork := files{"/proc/sys/net/core/netdev_max_backlog": "1000", "/proc/sys/net/core/somaxconn": "128", "/proc/sys/net/ipv4/ip_local_port_range": "9 10"}
	for _, c := range []struct {
		setting, found, wanted, verdict, mend string
		files                                 files
		vars                                  []string
	}{
		{"RLIMIT_NOFILE", "3000", "at least 4000", "short", "ulimits: {nofile: 4000}", nil, []string{"NOFILE=4000"}},
		{"RLIMIT_NOFILE", "400", "at least 11502", "short", "ulimits: {nofile: 11502}", nil, []string{"MAX_CONNS=5000", "NOFILE=400"}},
		{"RLIMIT_NOFILE", "200", "at least 200", "ok", "", nil, []string{"NOFILE=200"}},
		{"RLIMIT_NOFILE", "3000", "at least 1200000", "short", "", nil, []string{"NOFILE=1200000"}}, // above fs.nr_open
		{"fs.nr_open", "1048576", "at least 1142931", "short", "# on the host: sysctl -w fs.nr_open=1142931", nil, []string{"MAX_CONNS=500000"}},
		{"fs.nr_open", "1024", "at least 2359", "short", "# on the host: sysctl -w fs.nr_open=2359", files{"/proc/sys/fs/nr_open": "1024"}, nil},
		{"fs.file-max", "1024", "at least 2359", "short", "# on the host: sysctl -w fs.file-max=2359", files{"/proc/sys/fs/file-max": "1024"}, nil},
		{"fs.pipe-user-pages-soft", "100", "at least 16384", "advice", "# on the host: sysctl -w fs.pipe-user-pages-soft=16384", files{"/proc/sys/fs/pipe-user-pages-soft": "100"}, nil},
		{"fs.pipe-user-pages-soft", "0", "at least 16384", "ok", "", files{"/proc/sys/fs/pipe-user-pages-soft": "0"}, nil},
		{"net.core.somaxconn", "128", "at least 4096", "short", `sysctls: {net.core.somaxconn: "4096"}`, files{"/proc/sys/net/core/somaxconn": "128"}, nil},
		{"net.core.somaxconn", "128", "at least 4096", "short", "# on the host: sysctl -w net.core.somaxconn=4096", hostNetwork, nil},
		{"net.ipv4.ip_local_port_range", "9 10", "at least 28000 ports", "short", `# on the host: sysctl -w net.ipv4.ip_local_port_range="10240 65535"`, hostNetwork, nil},
		{"net.core.somaxconn", "128", "at least 100", "ok", "", files{"/proc/sys/net/core/somaxconn": "128"}, []string{"MAX_CONNS=100"}},
		{"net.core.somaxconn", "4096", "at least 4096", "ok", "", nil, []string{"MAX_CONNS=9000"}},
		{"net.core.somaxconn", "many", "at least 4096", "short", `sysctls: {net.core.somaxconn: "4096"}`, files{"/proc/sys/net/core/somaxconn": "many"}, nil},
		{"net.core.somaxconn", "cannot be read: no such file or directory", "", "unknown", "", files{"/proc/sys/net/core/somaxconn": "gone"}, nil},
		{"net.ipv4.tcp_syncookies", "0", "at least 1", "short", `sysctls: {net.ipv4.tcp_syncookies: "1"}`, files{"/proc/sys/net/ipv4/tcp_syncookies": "0", "/proc/sys/net/ipv4/tcp_max_syn_backlog": "4096"}, nil},
		{"net.ipv4.tcp_max_syn_backlog", "128", "any, with SYN cookies", "ok", "", nil, nil},
		{"net.ipv4.tcp_max_syn_backlog", "128", "at least 4096", "short", `sysctls: {net.ipv4.tcp_max_syn_backlog: "4096"}`, files{"/proc/sys/net/ipv4/tcp_syncookies": "gone"}, nil},
		{"net.ipv4.ip_local_port_range", "40000 50000", "at least 28000 ports", "short", `sysctls: {net.ipv4.ip_local_port_range: "10240 65535"}`, files{"/proc/sys/net/ipv4/ip_local_port_range": "40000\t50000"}, nil},
		{"net.ipv4.ip_local_port_range", "40000 50000", "at least 9000 ports", "ok", "", files{"/proc/sys/net/ipv4/ip_local_port_range": "40000\t50000"}, []string{"MAX_CONNS_PER_HOST=9000"}},
		{"net.ipv4.ip_local_port_range", "40000 50000", "at least 9000 ports", "ok", "", files{"/proc/sys/net/ipv4/ip_local_port_range": "40000\t50000"}, []string{"MAX_CONNS=20000", "MAX_CONNS_PER_HOST=9000"}},
		{"net.ipv4.ip_local_port_range", "32768 60999", "at least 55296 ports", "short", `sysctls: {net.ipv4.ip_local_port_range: "10240 65535"}`, nil, []string{"MAX_CONNS=400000"}},
		{"net.ipv4.ip_local_port_range", "10240 65535", "at least 55296 ports", "ok", "", files{"/proc/sys/net/ipv4/ip_local_port_range": "10240 65535"}, []string{"MAX_CONNS=400000"}},
		{"net.ipv4.ip_local_reserved_ports", "none", "3128,3129", "short", `sysctls: {net.ipv4.ip_local_reserved_ports: "3128,3129"}`, files{"/proc/sys/net/ipv4/ip_local_port_range": "1024 65535"}, nil},
		{"net.ipv4.ip_local_reserved_ports", "8080-8081", "8080-8081,40000", "short", `sysctls: {net.ipv4.ip_local_reserved_ports: "8080-8081,40000"}`,
			files{"/proc/sys/net/ipv4/ip_local_port_range": "1024 65535", "/proc/sys/net/ipv4/ip_local_reserved_ports": "8080-8081"}, []string{"LISTEN=:8080,:40000,[::]:40000,:0", "ADMIN=off"}},
		{"net.ipv4.ip_local_reserved_ports", "3000-4000", "3000-4000", "ok", "", files{"/proc/sys/net/ipv4/ip_local_port_range": "1024 65535", "/proc/sys/net/ipv4/ip_local_reserved_ports": "3000-4000"}, nil},
		{"net.ipv4.ip_local_reserved_ports", "none", "40000", "short", `sysctls: {net.ipv4.ip_local_reserved_ports: "40000"}`, // in the range that is asked for
			files{"/proc/sys/net/ipv4/ip_local_port_range": "3000 3100"}, []string{"LISTEN=:40000"}},
		{"net.ipv4.ip_local_reserved_ports", "none", "3128,3129", "short", `sysctls: {net.ipv4.ip_local_reserved_ports: "3128,3129"}`, // in the one that is there
			files{"/proc/sys/net/ipv4/ip_local_port_range": "3128 3129"}, nil},
		{"net.ipv4.ip_local_reserved_ports", "none", "any, since the range cannot be read", "ok", "", files{"/proc/sys/net/ipv4/ip_local_port_range": "gone"}, []string{"LISTEN=:40000"}},
		{"net.ipv4.tcp_tw_reuse", "2", "1", "advice", `sysctls: {net.ipv4.tcp_tw_reuse: "1"}`, files{"/proc/sys/net/ipv4/tcp_tw_reuse": "2"}, nil},
		{"net.ipv4.tcp_fin_timeout", "600", "at most 60", "advice", `sysctls: {net.ipv4.tcp_fin_timeout: "60"}`, files{"/proc/sys/net/ipv4/tcp_fin_timeout": "600"}, nil},
		{"net.ipv4.tcp_keepalive_time", "9999", "any", "ok", "", files{"/proc/sys/net/ipv4/tcp_keepalive_time": "9999"}, nil},
		{"net.ipv4.tcp_keepalive_probes", "90", "at most 9", "advice", `sysctls: {net.ipv4.tcp_keepalive_probes: "9"}`, files{"/proc/sys/net/ipv4/tcp_keepalive_probes": "90"}, nil},
		{"net.ipv4.tcp_rmem", "4096 131072 262144", "a maximum of 4194304", "advice", `sysctls: {net.ipv4.tcp_rmem: "4096 131072 4194304"}`, files{"/proc/sys/net/ipv4/tcp_rmem": "4096\t131072\t262144"}, nil},
		{"net.ipv4.tcp_wmem", "4096 16384 262144", "a maximum of 4194304", "advice", `sysctls: {net.ipv4.tcp_wmem: "4096 16384 4194304"}`, files{"/proc/sys/net/ipv4/tcp_wmem": "4096\t16384\t262144"}, nil},
		{"net.ipv4.tcp_migrate_req", "0", "1", "advice", `sysctls: {net.ipv4.tcp_migrate_req: "1"}`, files{"/proc/sys/net/ipv4/tcp_migrate_req": "0"}, nil},
		{"net.ipv4.tcp_congestion_control", "reno", "cubic or bbr", "advice", `sysctls: {net.ipv4.tcp_congestion_control: "cubic"}`, files{"/proc/sys/net/ipv4/tcp_congestion_control": "reno"}, nil},
		{"net.ipv4.tcp_congestion_control", "bbr", "cubic or bbr", "ok", "", files{"/proc/sys/net/ipv4/tcp_congestion_control": "bbr"}, nil},
		{"net.ipv4.tcp_congestion_control", "reno", "cubic or bbr", "advice", `sysctls: {net.ipv4.tcp_congestion_control: "bbr"}`,
			files{"/proc/sys/net/ipv4/tcp_congestion_control": "reno", "/proc/sys/net/ipv4/tcp_allowed_congestion_control": "reno bbr"}, nil},
		{"net.ipv4.tcp_congestion_control", "reno", "cubic or bbr", "advice", "",
			files{"/proc/sys/net/ipv4/tcp_congestion_control": "reno", "/proc/sys/net/ipv4/tcp_allowed_congestion_control": "gone"}, nil},
		{"net.netfilter.nf_conntrack_max", "1000", "a quarter free: 751 are taken here", "short", "# on the host: sysctl -w net.netfilter.nf_conntrack_max=2000",
			files{"/proc/sys/net/netfilter/nf_conntrack_max": "1000", "/proc/sys/net/netfilter/nf_conntrack_count": "751"}, nil},
		{"net.netfilter.nf_conntrack_max", "4096", "at least 10000, a quarter free: 17 are taken here", "short", "# on the host: sysctl -w net.netfilter.nf_conntrack_max=10000", files{"/proc/sys/net/netfilter/nf_conntrack_max": "4096"}, []string{"MAX_CONNS=5000"}},
		{"net.netfilter.nf_conntrack_max", "cannot be read: no such file or directory", "", "unknown", "", files{"/proc/sys/net/netfilter/nf_conntrack_max": "gone"}, nil},
		{"cgroup pids.max", "30", "at least 40", "short", "pids_limit: 40 # or deploy.resources.limits.pids, where that is set", files{"/sys/fs/cgroup/pids.max": "30"}, nil},
		{"cgroup pids.max", "20", "at least 48", "short", "pids_limit: 48 # or deploy.resources.limits.pids, where that is set", v1, nil},
		{"cgroup memory.max", "256 MiB", "at least 64 MiB", "ok", "", nil, nil},
		{"cgroup memory.max", "32 MiB", "at least 64 MiB", "short", "mem_limit: 64m # or deploy.resources.limits.memory, where that is set", v1, nil},
		{"cgroup memory.max", "256 MiB", "at least 337 MiB", "short", "mem_limit: 337m # or deploy.resources.limits.memory, where that is set", nil, []string{"MAX_CONNS=5000"}},
		{"cgroup memory.max", "256 MiB", "at least 280 MiB", "short", "mem_limit: 280m # or deploy.resources.limits.memory, where that is set", nil, []string{"MEMORY_LIMIT=256MiB"}},
		{"cgroup memory.max", "no limit", "at least 64 MiB", "ok", "", files{"/sys/fs/cgroup/memory.max": "max"}, nil},
		{"cgroup memory.max", "no limit", "at least 64 MiB", "ok", "", files{"/proc/self/cgroup": "4:memory:/", "/proc/self/mountinfo": cgroup1At("/", "memory"),
			"/sys/fs/cgroup/memory/cgroup.procs": "", "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}, nil},
		{"cgroup memory.max", "32 MiB", "at least 64 MiB", "short", "mem_limit: 64m # or deploy.resources.limits.memory, where that is set", // of a pod, above the container
			files{"/proc/self/cgroup": "0::/pod/one", "/sys/fs/cgroup/pod/one/cgroup.procs": "", "/sys/fs/cgroup/pod/memory.max": "33554432", "/sys/fs/cgroup/pod/one/memory.max": "max"}, nil},
		{"cgroup memory.max", "32 MiB", "at least 64 MiB", "short", "mem_limit: 64m # or deploy.resources.limits.memory, where that is set", // the host's, in a cgroup namespace
			files{"/proc/self/cgroup": "0::/../two/one", "/proc/self/mountinfo": cgroup2At("/.."), "/sys/fs/cgroup/two/one/cgroup.procs": "", "/sys/fs/cgroup/two/memory.max": "33554432"}, nil},
		{"cgroup memory.max", unseen, "", "unknown", "", files{"/proc/self/mountinfo": cgroup2At("/../..")}, nil}, // its name there is not to be seen
		{"cgroup memory.max", unseen, "", "unknown", "", files{"/proc/self/cgroup": "0::/../cgroup"}, nil},        // not /sys/fs/cgroup
		{"cgroup memory.max", unseen, "", "unknown", "", files{"/proc/self/cgroup": "4:memory:/a", "/proc/self/mountinfo": cgroup1At("/", "pids"), "/sys/fs/cgroup/pids/a/cgroup.procs": ""}, nil},
		{"cgroup memory.max", unseen, "", "unknown", "", files{"/proc/self/cgroup": "0::/ab", "/proc/self/mountinfo": cgroup2At("/a")}, nil},
		{"cgroup memory.max", unseen, "", "unknown", "", files{"/proc/self/cgroup": "0::/elsewhere"}, nil},
		{"cgroup memory.max", unseen, "", "unknown", "", files{"/proc/self/mountinfo": ""}, nil},
		{"cgroup memory.max", unseen, "", "unknown", "", files{"/proc/self/cgroup": "0::/\n4:memory:/a"}, nil}, // version 2 has other controllers
		{"cgroup memory.max", "cannot be read: is a directory", "", "unknown", "",
			files{"/proc/self/cgroup": "0::/odd", "/sys/fs/cgroup/odd/cgroup.procs": "", "/sys/fs/cgroup/odd/memory.max/x": ""}, nil},
		{"cgroup cpu.max", "cannot be read: is a directory", "", "unknown", "",
			files{"/proc/self/cgroup": "0::/odd", "/sys/fs/cgroup/odd/cgroup.procs": "", "/sys/fs/cgroup/odd/cpu.max/x": ""}, nil},
		{"cgroup cpu.max", "0.5 CPUs, GOMAXPROCS 2", "GOMAXPROCS at most 2", "ok", "", files{"/sys/fs/cgroup/cpu.max": "50000 100000"}, nil},
		{"cgroup cpu.max", "0.5 CPUs, GOMAXPROCS 2", "GOMAXPROCS at most 2", "ok", "", // less than its pod's
			files{"/proc/self/cgroup": "0::/pod/one", "/sys/fs/cgroup/pod/one/cgroup.procs": "", "/sys/fs/cgroup/pod/one/cpu.max": "50000 100000", "/sys/fs/cgroup/pod/cpu.max": "400000 100000"}, nil},
		{"cgroup cpu.max", "0.5 CPUs, GOMAXPROCS 4", "GOMAXPROCS at most 2", "short", `environment: {GOMAXPROCS: "2"}`, files{"/sys/fs/cgroup/cpu.max": "50000 100000", "GOMAXPROCS": "4"}, nil},
		{"cgroup cpu.max", "2.5 CPUs, GOMAXPROCS 4", "GOMAXPROCS at most 3", "short", `environment: {GOMAXPROCS: "3"}`, v1, nil},
	} {
		write(kernelFiles)
		write(c.files)
		found, log := tuned(t, c.vars...)
		f := found[c.setting]
		if f.Found != c.found || f.Wanted != c.wanted || f.Verdict != c.verdict || f.Mend != c.mend {
			t.Errorf("%v %v: %+v", c.files, c.vars, f)
		}
		said := slices.ContainsFunc(log.records(t), func(r map[string]any) bool {
			return r["level"] == "WARN" && r["setting"] == f.Setting && r["found"] == f.Found && r["wanted"] == f.Wanted && r["mend"] == f.Mend
		})
		if said != (c.verdict == verdictShort) {
			t.Errorf("%s, %s: the log says %v", c.setting, c.verdict, log.records(t))
		}
	}
	for change, files := range map[string]files{"here, by SLUICE_TUNE=apply": nil, "here, by SLUICE_TUNE=apply, for the whole host": hostNetwork} {
		write(kernelFiles)
		write(files)
		if all, _ = tuned(t); all["net.ipv4.tcp_tw_reuse"].Change != change || all["net.netfilter.nf_conntrack_max"].Change != "host" {
			t.Errorf("%+v", all)
		}
	}
	write(kernelFiles)
	if out, err := exec.Command("ip", "link", "set", "veth0", "up").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	all, _ = tuned(t)
	if f := all["net.ipv4.ip_forward"]; f.Found != "1" || f.Wanted != "0" || f.Verdict != verdictAdvice || f.Mend != `sysctls: {net.ipv4.ip_forward: "0"}` {
		t.Errorf("on two networks: %+v", f)
	}
	write(hostNetwork)
	all, _ = tuned(t)
	if f := all["net.ipv4.ip_forward"]; f.Verdict != verdictOK || f.Mend != "" {
		t.Errorf("on a host: %+v", f)
	}
	if out, err := exec.Command("ip", "-6", "route", "replace", "unreachable", "default").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := exec.Command("ip", "-6", "route", "add", "::/1", "dev", "eth0").CombinedOutput(); err != nil { // not the default one
		t.Fatalf("%v: %s", err, out)
	}
	all, _ = tuned(t)
	if f := all["IPv6 route"]; f.Found != "none" || f.Verdict != verdictAdvice || !strings.Contains(f.Mend, "enable_ipv6") {
		t.Errorf("%+v", f)
	}
}

// TestMending: what is printed is a file that Compose takes, whatever there is to mend.
func TestMending(t *testing.T) {
	short := func(mend string) finding { return finding{Verdict: verdictShort, Mend: mend} }
	advice := func(mend string) finding { return finding{Verdict: verdictAdvice, Mend: mend} }
	for _, c := range []struct {
		findings []finding
		want     string
	}{
		{[]finding{{Verdict: verdictOK}}, ""},
		{[]finding{short("# on the host: x"), advice("# on the host: y")}, "\n# on the host: x\n# on the host: y\n"},
		{[]finding{short("sysctls: {a: \"1\"}"), short("# on the host: x"), short("pids_limit: 40"), advice("sysctls: {b: \"1 2\"}"), short("sysctls: {c: \"3\"}"), advice("mem_limit: 64m")},
			"\n# compose.override.yaml\nservices:\n  proxy:\n    sysctls:\n      a: \"1\"\n      b: \"1 2\" # advice\n      c: \"3\"\n    pids_limit: 40\n    mem_limit: 64m # advice\n\n# on the host: x\n"},
	} {
		var out strings.Builder
		if printMending(c.findings, &out); out.String() != c.want {
			t.Errorf("%v: %q, want %q", c.findings, out.String(), c.want)
		}
	}
}

// TestSocketMemory: with version 2 of cgroups what waits in sockets is the container's memory, and a send that finds none left has the process
// killed. So buffers are bounded as it fills, and let go again; memory that the kernel can take back does not count. The files that tell
// of it are made up; real ones, and a kernel that kills, are in no CI.
func TestSocketMemory(t *testing.T) {
	if !inNamespace(t, "--mount", "mount -t tmpfs none /sys/fs/cgroup && for f in cgroup mountinfo; do echo >/sys/fs/cgroup/own-$f && mount --bind /sys/fs/cgroup/own-$f /proc/$$/$f || exit; done") {
		return
	}
	if openFiles() == 0 {
		t.Skip("only Linux tells")
	}
	write := func(name, text string) {
		if err := os.WriteFile(name, []byte(text+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	holds := func(mebibytes, files int) { // the text of memory.current last: what is read then fits together
		write("/sys/fs/cgroup/memory.stat", fmt.Sprintf("anon 1\ninactive_file %d\nactive_file %d", files<<19, files<<19))
		write("/sys/fs/cgroup/memory.current", strconv.Itoa(mebibytes<<20))
	}
	write("/proc/self/cgroup", "0::/")
	write("/proc/self/mountinfo", kernelFiles["/proc/self/mountinfo"])
	write("/sys/fs/cgroup/cgroup.procs", "1")
	write("/sys/fs/cgroup/memory.max", strconv.Itoa(64<<20))
	holds(8, 0)
	debug.SetMemoryLimit(1 << 30) // without one nobody watches
	p, o := startProxy(t), startOrigin(t)
	c, _ := p.openTunnel(t, o)
	buffers := func() (sizes [4]int) {
		for i, peer := range []net.Addr{c.LocalAddr(), o.Addr()} {
			fd := socketTo(t, syscall.Getpeername, peer)
			sizes[2*i], _ = syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_RCVBUF)
			sizes[2*i+1], _ = syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_SNDBUF)
		}
		return sizes
	}
	refused := func() bool {
		conn, err := net.Dial("tcp", p.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		n := newPeer(t, conn)
		n.send("%s", request("OPTIONS", "http://any.test", "Max-Forwards: 0"))
		resp, _ := n.response("OPTIONS")
		return resp.StatusCode == 503
	}
	bounded := func(peer net.Addr) bool {
		locked, err := syscall.GetsockoptInt(socketTo(t, syscall.Getpeername, peer), syscall.SOL_SOCKET, 72) // SO_BUF_LOCK, from 5.15 on
		return err == nil && locked != 0
	}

	origin := serveAt(t, "127.0.0.1:0", nil)
	for range 20 { // clients that send little each time are no flow
		n := p.dial(t)
		for range 4 {
			n.send("POST http://%s/ HTTP/1.1\r\nHost: a\r\nContent-Length: 8000\r\n\r\n%s", origin, strings.Repeat("x", 8000))
			n.response("POST")
		}
	}
	if time.Sleep(100 * time.Millisecond); bounded(c.LocalAddr()) {
		t.Error("buffers are bounded for nothing")
	}

	// Twenty flows could fill 200 MB, which they do not: their share of the memory is kept for them.
	const much = 2 * bufferSize
	var flows []*peer
	for range 20 {
		client, up := p.openTunnel(t, o)
		client.send("%s", strings.Repeat("x", much))
		io.CopyN(io.Discard, up.br, much)
		flows = append(flows, client)
	}
	eventually(t, "the buffers to be bounded", func() bool { return bounded(c.LocalAddr()) })
	time.Sleep(300 * time.Millisecond) // three looks at least
	for _, f := range flows {
		f.Close()
	}
	eventually(t, "the kernel to choose again", func() bool { return !bounded(c.LocalAddr()) })
	if strings.Contains(p.log.all(), "memory runs short") {
		t.Error("it did not")
	}

	free := buffers()
	holds(60, 40)
	time.Sleep(300 * time.Millisecond) // three looks at least
	if got := buffers(); got != free || refused() {
		t.Errorf("files are held, and buffers are %v, not %v", got, free)
	}
	holds(40, 0)
	eventually(t, "buffers that share what is left", func() bool { got := buffers(); return slices.Min(got[:]) == slices.Max(got[:]) && got[0] > 32<<10 })
	if refused() {
		t.Error("with 40 of 64 MiB held nobody was let in")
	}
	p.log.await(t, "memory runs short, socket buffers are bounded", 1)
	holds(50, 0)
	eventually(t, "small buffers", func() bool { return buffers() == [4]int{32 << 10, 32 << 10, 32 << 10, 32 << 10} })
	holds(58, 0)
	eventually(t, "a refusal", refused)
	holds(8, 0)
	eventually(t, "nobody to be refused", func() bool { return !refused() })
	late, end := p.openTunnel(t, o)
	for _, peer := range []net.Addr{c.LocalAddr(), late.LocalAddr()} {
		if bounded(peer) {
			t.Error("buffers stay bounded")
		}
	}

	// Before nothing is left, who holds something is cut off.
	go c.Write(make([]byte, 16<<20)) // to an origin that does not read
	holds(62, 0)
	p.log.await(t, "memory runs short, connections are cut", 1)
	holds(8, 0)
	c.wantsReset()
	late.send("still here")
	end.wants("still here")
}

// TestTuneApply: TUNE=apply writes what the network namespace lets it, before the listeners open, and tells both values. What it may not write
// stays short and says why.
func TestTuneApply(t *testing.T) {
	binary := buildBinary(t)
	var list []string // longer than what os.ReadFile reads first
	for port := 20001; port < 21000; port += 2 {
		list = append(list, strconv.Itoa(port))
	}
	reserved := strings.Join(list, ",")
	if !inNamespace(t, "-mn", "ip link set lo up && echo "+reserved+" >/proc/sys/net/ipv4/ip_local_reserved_ports && echo 128 >/proc/sys/net/core/somaxconn && echo 0 >/proc/sys/net/ipv4/tcp_migrate_req && echo 3000 3300 >/proc/sys/net/ipv4/ip_local_port_range && "+
		"echo 4096 65536 65536 >/proc/sys/net/ipv4/tcp_rmem && mount --bind /proc/sys/net/ipv4/tcp_rmem /proc/sys/net/ipv4/tcp_rmem && mount -o remount,ro,bind /proc/sys/net/ipv4/tcp_rmem") {
		return
	}
	report := exec.Command(binary, "tune") // writes nothing
	report.Env = prefixed("TUNE=apply")
	if out, _ := report.Output(); !regexp.MustCompile(`(?m)^net.core.somaxconn +128 +at least 4096 +short `).Match(out) || report.ProcessState.ExitCode() != 1 {
		t.Errorf("%s", out)
	}
	p := startProcess(t, binary, "TUNE=apply", "LISTEN=127.0.0.1:31280") // a process: Go asks for somaxconn once
	if p.start["backlog"] != 4096.0 {
		t.Errorf("%v", p.start)
	}
	written := map[string][3]string{"net.core.somaxconn": {"128", "4096", "at least 4096"}, "net.ipv4.tcp_migrate_req": {"0", "1", "1"},
		"net.ipv4.ip_local_port_range": {"3000 3300", "10240 65535", "at least 28000 ports"}, "net.ipv4.ip_local_reserved_ports": {reserved, reserved + ",31280", reserved + ",31280"}}
	early := &logSink{}
	early.Write([]byte(p.early))
	for _, r := range early.records(t) {
		if want, ok := written[fmt.Sprint(r["setting"])]; r["msg"] == "kernel setting written" && ok {
			if got := [3]string{r["before"].(string), r["found"].(string), r["wanted"].(string)}; got != want {
				t.Errorf("%v, want %v", r, want)
			}
			delete(written, r["setting"].(string))
		}
	}
	if len(written) > 0 {
		t.Errorf("not told of: %v", written)
	}
	const sysctl = "/proc/sys/net/ipv4/"
	value, _ := os.ReadFile(sysctl + "ip_local_port_range")
	if strings.Join(strings.Fields(string(value)), " ") != "10240 65535" {
		t.Errorf("the range is %q", value)
	}
	var s struct{ Kernel []finding }
	if _, body := (&testProxy{admin: p.start["admin"].(string)}).adminGet(t, "GET", "/status.json", "localhost"); json.Unmarshal([]byte(body), &s) != nil || len(s.Kernel) == 0 {
		t.Fatal(body)
	}
	for _, f := range s.Kernel {
		if f.Setting == "net.ipv4.tcp_rmem" && (f.Verdict != verdictAdvice || f.Before != "" || f.Change != "sysctls of the container, since it cannot be written: read-only file system") ||
			f.Setting == "net.core.somaxconn" && (f.Verdict != verdictOK || f.Before != "128") {
			t.Errorf("%+v", f)
		}
	}
	err := os.WriteFile(sysctl+"ip_local_port_range", []byte("30000 30300"), 0o644)
	if err = errors.Join(err, os.WriteFile(sysctl+"ip_unprivileged_port_start", []byte("20000"), 0o644)); err != nil { // no range may begin below
		t.Fatal(err)
	}
	found, log := tuned(t, "TUNE=apply")
	if f := found["net.ipv4.ip_local_port_range"]; f.Found != "30000 30300" || f.Verdict != verdictShort || f.Before != "" ||
		f.Change != "sysctls of the container, since it cannot be written: invalid argument" || f.Mend == "" {
		t.Errorf("%+v", f)
	}
	refused := map[string]string{}
	for _, r := range log.records(t) {
		if r["msg"] == "kernel setting cannot be written" {
			refused[r["setting"].(string)] = r[logMessage].(string)
		}
	}
	if want := map[string]string{"net.ipv4.ip_local_port_range": "invalid argument", "net.ipv4.tcp_rmem": "read-only file system"}; !maps.Equal(refused, want) {
		t.Errorf("%v, want %v", refused, want)
	}
}

// TestTuneUnprivileged: without a capability, as any user, with /proc read-only, all that can be read is told, and what is to be set is what
// a compose file takes. The settings are the machine's.
func TestTuneUnprivileged(t *testing.T) {
	binary := buildBinary(t)
	if !inNamespace(t, "--mount", "mount --bind /proc/sys /proc/sys && mount -o remount,ro,bind /proc/sys") {
		return
	}
	run := func(shell string, vars ...string) (string, int) {
		cmd := exec.Command("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "sh", "-c", shell+` && exec "$0" tune`, binary)
		cmd.Env = prefixed(vars...)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState == nil {
			t.Skip(err)
		}
		return string(out), cmd.ProcessState.ExitCode()
	}
	out, status := run("ulimit -n 512", "MAX_CONNS=100")
	if (status == 0) == strings.Contains(out, " short ") || !regexp.MustCompile(`(?m)^RLIMIT_NOFILE +512 +at least 302 +ok `).MatchString(out) {
		t.Errorf("status %d: %s", status, out)
	}
	out, status = run("ulimit -n 512", "TUNE=apply")
	if status != 1 || strings.Contains(out, "by SLUICE_TUNE=apply") {
		t.Errorf("status %d: %s", status, out)
	}
	table, mending, _ := strings.Cut(out, "\n# compose.override.yaml\n")
	rows := strings.Split(strings.TrimSpace(table), "\n")
	if len(rows) != 27 || !regexp.MustCompile(`^RLIMIT_NOFILE +512 +at least 2359 +short +limits of the container +a client`).MatchString(rows[1]) {
		t.Errorf("%d rows: %s", len(rows), table)
	}
	if !strings.HasPrefix(mending, "services:\n  proxy:\n    ulimits:\n      nofile: 2359\n") {
		t.Errorf("%s", mending)
	}
	out, status = run("true", newAuthority(t).vars("HTTP3=true")...) // buffers are told as a socket is given them
	for _, name := range []string{"net.core.rmem_max", "net.core.wmem_max"} {
		value, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(name, ".", "/"))
		if err != nil { // a namespace of an older kernel
			continue
		}
		most, _ := strconv.Atoi(strings.TrimSpace(string(value)))
		want := fmt.Sprintf(`(?m)^%s +%d +at least 7340032 +ok `, name, most)
		if most < 7<<20 {
			want = fmt.Sprintf(`(?ms)^%s +%d +at least 7340032 +short .*^# on the host: sysctl -w %s=7340032$`, name, most, name)
		}
		if !regexp.MustCompile(want).MatchString(out) || most < 7<<20 && status != 1 {
			t.Errorf("status %d, %s is %d: %s", status, name, most, out)
		}
	}
	if out, status = run("true", "MAX_CONNS=many"); status != 2 || !strings.Contains(out, "SLUICE_MAX_CONNS") {
		t.Errorf("status %d: %s", status, out)
	}
}

// TestNofile: NOFILE lowers the descriptor limit, and with CAP_SYS_RESOURCE it raises the hard limit, too.
func TestNofile(t *testing.T) {
	if !again(t, "sh", "-c", `ulimit -n 1000 && exec "$0" "$@"`, os.Args[0], "-test.run", "^"+t.Name()+"$", "-test.v") {
		return
	}
	beyond := 1100
	if hasCapability(24) { // CAP_SYS_RESOURCE
		t.Log("the hard limit may be raised")
	} else {
		beyond = 1000
	}
	for _, c := range []struct {
		vars string
		want int
	}{{"NOFILE=0", 1000}, {"NOFILE=900", 900}, {"NOFILE=1100", beyond}} {
		cfg, _, err := loadConfig(prefixed(c.vars))
		if err != nil {
			t.Fatal(err)
		}
		findings := tuneKernel(cfg, slog.New(slog.DiscardHandler))
		if findings == nil {
			t.Skip("kernel settings are examined on Linux alone")
		}
		if n := openFiles(); n != c.want || findings[0].Setting != "RLIMIT_NOFILE" || findings[0].Found != strconv.Itoa(n) {
			t.Errorf("%s: %d descriptors, want %d; %v", c.vars, n, c.want, findings[0])
		}
	}
}

// hasCapability reports whether this process has a capability in the initial user namespace.
func hasCapability(bit int) bool {
	users, _ := os.ReadFile("/proc/self/uid_map")
	status, _ := os.ReadFile("/proc/self/status")
	_, effective, _ := strings.Cut(string(status), "CapEff:\t")
	caps, _ := strconv.ParseUint(strings.TrimSpace(effective[:min(16, len(effective))]), 16, 64)
	return strings.Join(strings.Fields(string(users)), " ") == "0 0 4294967295" && caps>>bit&1 == 1
}

// ---------------------------------------------------------------------------------------------------------------------
// Listeners

// listening counts the sockets that listen on a port of 127.0.0.1.
func listening(t *testing.T, addr string) (n int) {
	t.Helper()
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Skip(err)
	}
	ap := netip.MustParseAddrPort(addr)
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > 3 && f[3] == "0A" && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", ap.Port())) {
			n++
		}
	}
	return n
}

func TestListeners(t *testing.T) {
	second := freeAddr(t)
	p := startProxy(t, "LISTENERS=3", "LISTEN=127.0.0.1:0,"+second)
	start := p.log.await(t, "listening", 1)
	if start["listeners"] != 6.0 || len(start["addresses"].([]any)) != 2 {
		t.Errorf("start record: %v", start)
	}
	for _, addr := range []string{p.addr, second} {
		if n := listening(t, addr); n != 3 {
			t.Errorf("%d sockets listen on %s, want 3", n, addr)
		}
		for range 10 { // whichever socket the kernel picks
			c := (&testProxy{addr: addr}).dial(t)
			if resp, _ := c.ask("OPTIONS", "http://any.test", "Max-Forwards: 0"); resp.StatusCode != 200 {
				t.Errorf("status %d", resp.StatusCode)
			}
		}
	}
	if n := listening(t, p.admin); n != 1 {
		t.Errorf("%d sockets listen on %s, want 1", n, p.admin)
	}
}

func TestAddressInUse(t *testing.T) {
	taken := occupied(t)
	for _, vars := range [][]string{{"LISTEN=" + taken}, {"LISTEN=127.0.0.1:0," + taken}, {"LISTEN=127.0.0.1:0", "ADMIN=" + taken}} {
		files := countFiles()
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		err := run(ctx, prefixed(append(vars, "TUNE=off", "LISTENERS=2")...), io.Discard)
		cancel()
		if err == nil || !strings.Contains(err.Error(), taken) || exitStatus(err, io.Discard) != 1 {
			t.Errorf("%v: %v", vars, err)
		}
		eventually(t, "its descriptors to be closed", func() bool { return countFiles() <= files })
	}
}

func TestClientAddressNotAllowed(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startProxy(t, "ALLOW_CLIENTS=10.0.0.0/8,::1")
	c := p.dial(t)
	resp, body := c.response("GET") // nothing was sent
	wantsRefusal(t, resp, body, 403, "http_request_denied")
	if !resp.Close || !strings.Contains(body, "SLUICE_ALLOW_CLIENTS") {
		t.Errorf("%v %q", resp.Header, body)
	}
	c.wantsEnd()
	wantsFields(t, p.log.await(t, "request", 1), map[string]any{"level": "WARN", "client.address": "127.0.0.1", "error.type": "http_request_denied",
		"http.response.status_code": 403.0})
	c = p.dial(t)
	c.send("GET http://%s/ HTTP/1.1\r\nHost: %s\r\n\r\n", p.addr, p.addr) // does not reset the answer
	resp, body = c.response("GET")
	wantsRefusal(t, resp, body, 403, "http_request_denied")
}

// ---------------------------------------------------------------------------------------------------------------------
// Requests that are refused

// malformed lists requests that must be refused, by what is wrong.
func malformed() map[string][]string {
	const line, host = "GET http://{o}/ HTTP/1.1\r\n", "Host: {o}\r\n"
	cases := map[string][]string{
		"line": {
			"GET http://{o}/ HTTP/2.0\r\n" + host, "GET http://{o}/ HTTP/0.9\r\n" + host, "GET http://{o}/ HTTP/3.0\r\n" + host,
			"GET http://{o}/ HTTP/1.10\r\n" + host, "GET http://{o}/ HTTP/1.\r\n" + host, "GET http://{o}/ http/1.1\r\n" + host,
			"GET http://{o}/ HTTP/1,1\r\n" + host, "GET http://{o}/\r\n" + host, "GET http://{o}/ \r\n" + host, "GET\r\n" + host,
			"GET HTTP/1.1\r\n" + host, "GET  HTTP/1.1\r\n" + host, "GET  http://{o}/ HTTP/1.1\r\n" + host,
			"GET http://{o}/  HTTP/1.1\r\n" + host, "GET http://{o}/ HTTP/1.1 \r\n" + host, " GET http://{o}/ HTTP/1.1\r\n" + host,
			"GET\thttp://{o}/ HTTP/1.1\r\n" + host, "GET http://{o}/\tHTTP/1.1\r\n" + host, "GET http://{o}/ a HTTP/1.1\r\n" + host,
			"GET http://{o}/ HTTP/1.1\n" + host, "\nGET http://{o}/ HTTP/1.1\r\n" + host, "\rGET http://{o}/ HTTP/1.1\r\n" + host,
			"GET http://{o}/ HTTP/1.1\r\r\n" + host, "GET http://{o}/\r HTTP/1.1\r\n" + host, "GET http://{o}/ HTTP\r/1.1\r\n" + host,
		},
		"method": {
			"G(T http://{o}/ HTTP/1.1\r\n" + host, "G\x00T http://{o}/ HTTP/1.1\r\n" + host, "G\xe9T http://{o}/ HTTP/1.1\r\n" + host,
			"GET, http://{o}/ HTTP/1.1\r\n" + host, "G\rT http://{o}/ HTTP/1.1\r\n" + host, "\"GET\" http://{o}/ HTTP/1.1\r\n" + host,
		},
		"line end": {
			line + "Host: {o}\nA: b\r\n", line + host + "A: b\nC: d\r\n", line + host + "A: b\n", line + host + "A: b\rC: d\r\n",
			line + host + "A: b\r\r\n", line + host + "\rA: b\r\n", line + host + "A\r: b\r\n", line + host + "A:\r b\r\n", line + host + "\r",
		},
		"fold": {
			line + host + "A: b\r\n c\r\n", line + host + "A: b\r\n\tc\r\n", line + " A: b\r\n" + host, line + "\tHost: {o}\r\n",
			line + host + "A: b\r\n \r\n", line + host + "Transfer-Encoding:\r\n chunked\r\n",
		},
	}
	for _, f := range []string{"A : b", "A\t: b", "Host : {o}", "Content-Length : 5", "Transfer-Encoding : chunked"} {
		cases["space before colon"] = append(cases["space before colon"], line+host+f+"\r\n")
	}
	for _, f := range []string{": b", ":", "A", "A b: c", "A\x00: b", "A\x7f: b", "A\xe9: b", "(A): b", "A/B: c", "A@B: c", "{A}: b", "A;: b", "A\"B: c"} {
		cases["field name"] = append(cases["field name"], line+host+f+"\r\n")
	}
	for _, f := range []string{"A: b\x00", "A: \x00", "A: b\x01c", "A: b\x0bc", "A: b\x0cc", "A: b\x7f", "A: b\x1b[0m", "Host: {o}\x00"} {
		cases["field value"] = append(cases["field value"], line+host+f+"\r\n")
	}
	for _, n := range []string{"+5", "-5", "-0", "", " ", "0x5", "5 5", "5,5", "5, 5", "5,6", "5;", "5.0", "1e1", "five", "\"5\"", "5\t5",
		"9223372036854775808", "18446744073709551615", "18446744073709551616", "18446744073709551621", "99999999999999999999999999", "\xd9\xa5"} {
		cases["Content-Length"] = append(cases["Content-Length"], "POST http://{o}/ HTTP/1.1\r\n"+host+"Content-Length: "+n+"\r\n\r\nhello")
	}
	for _, f := range []string{
		"Content-Length: 5\r\nContent-Length: 6", "Content-Length: 0\r\nContent-Length: 5", "Content-Length: 5\r\nA: b\r\ncontent-length: 50",
		"Content-Length: 5\r\nContent-Length:", "Content-Length: 5\r\nContent-Length: +5",
		"Content-Length: 5\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nContent-Length: 5", "Transfer-Encoding: chunked\r\nContent-Length: 0",
		"Transfer-Encoding: chunked\r\nContent-Length: 5\r\nConnection: Content-Length", "Content-Length: 5\r\nTransfer-Encoding: identity",
		"Transfer-Encoding: gzip", "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: chunked, gzip", "Transfer-Encoding: identity",
		"Transfer-Encoding: chunked, chunked", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", "Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked",
		"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", "Transfer-Encoding: xchunked", "Transfer-Encoding: chunkedx",
		"Transfer-Encoding: chunked;a=b", "Transfer-Encoding: \"chunked\"", "Transfer-Encoding:", "Transfer-Encoding: \x0bchunked",
		"Transfer-Encoding: chunked\x00", "Transfer-Encoding: chun ked", "Transfer-Encoding\x00: chunked",
	} {
		cases["framing"] = append(cases["framing"], "POST http://{o}/ HTTP/1.1\r\n"+host+f+"\r\n\r\n0\r\n\r\n")
	}
	cases["framing"] = append(cases["framing"], "POST http://{o}/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
	for _, name := range []string{"Content-Length", "transfer-encoding", "X, Trailer"} {
		cases["framing"] = append(cases["framing"], "POST http://{o}/ HTTP/1.1\r\n"+host+"Transfer-Encoding: chunked\r\nTrailer: "+name+"\r\n\r\n0\r\n\r\n")
	}
	for _, f := range []string{"Content-Length: 5", "Transfer-Encoding: chunked"} {
		cases["framing"] = append(cases["framing"], "CONNECT {o} HTTP/1.1\r\n"+host+f+"\r\n\r\n0\r\n\r\n")
	}
	for _, h := range []string{"", "Host: {o}\r\nHost: {o}\r\n", "Host: {o}\r\nhost: other.example\r\n", "Host:\r\n", "Host: a b\r\n", "Host: a/b\r\n",
		"Host: u@{o}\r\n", "Host: {o},{o}\r\n", "Host: a:0\r\n", "Host: a:65536\r\n", "Host: a:b\r\n", "Host: a:80:80\r\n", "Host: http://{o}/\r\n",
		"Host: [::1\r\n", "Host: a#b\r\n", "Host: a?b\r\n", "Host: a%41\r\n", "Host: \xe9.example\r\n"} {
		cases["Host"] = append(cases["Host"], line+h)
	}
	cases["Host"] = append(cases["Host"], "GET http://{o}/ HTTP/1.0\r\nHost: {o}\r\nHost: {o}\r\n", "GET http://{o}/ HTTP/1.0\r\nHost: a b\r\n")
	for _, target := range malformedTargets() {
		cases["target"] = append(cases["target"], "GET "+target+" HTTP/1.1\r\n"+host)
	}
	return cases
}

// malformedTargets lists request-targets that must be refused.
func malformedTargets() []string {
	targets := []string{"/", "/path", "*", "", "{o}", "http", "http:", "http:/", "http://", "http:///", "http:///{o}/", "http:{o}/", "http:/{o}/", "//{o}/",
		"https://{o}/", "HTTPS://{o}/", "ftp://{o}/", "ws://{o}/", "file:///etc/passwd", "http+unix://{o}/", "\\\\{o}\\", "http:\\\\{o}\\",
		"http://{o}/#f", "http://{o}#f", "http://{o}/?q#f", "http://u@{o}/", "http://u:p@{o}/", "http://@{o}/", "http://:@{o}/", "http://u%40@{o}/",
		"http://{o}/\x00", "http://{o}/\x7f", "http://{o}/\xe9", "http://{o}/\x01", "http://{o}\\@a.example/", "http://{o}%2f/", "http://{o}%00/",
		"http://127.0.0.1:0/", "http://127.0.0.1:65536/", "http://127.0.0.1:/", "http://127.0.0.1:-1/", "http://127.0.0.1:+80/", "http://127.0.0.1:80a/",
		"http://127.0.0.1:0x50/", "http://127.0.0.1:4294967376/", "http://127.0.0.1:18446744073709551696/", "http://127.0.0.1:80:80/", "http://127.0.0.1:%38%30/",
		"http://a..b/", "http://.a/", "http://./", "http://../", "http://a../", "http://" + strings.Repeat("a", 64) + ".example/",
		"http://" + strings.Repeat("a.", 127) + "a/", "http://" + strings.Repeat("a.", 126) + "aa/", "http://a_b!c/", "http://a,b/", "http://a*b/", "http://a'b/", "http://a&b/",
		"http://(a)/", "http://<a>/", "http://a\"b/", "http://{a}/", "http://a|b/", "http://a^b/", "http://a`b/", "http://a~b/", "http://a=b/", "http://a$b/", "http://a+b/", "http://a;b/",
	}
	port := ":9"
	for _, h := range []string{"0x7f.1", "0x7f000001", "0X7F.0.0.1", "0x7f.0x0.0x0.0x1", "2130706433", "127.1", "127.0.1", "0177.0.0.1", "127.0.0.01", "0127.0.0.1", "017700000001",
		"127.0.0.0x1", "a.0x1", "a.0x", "127.0.0.256", "256.0.0.1", "1.2.3.4.5", "1.2.3", "a.example.1", "1", "0", "127.0.0.1..", "127..0.1", ".127.0.0.1",
		"%31%32%37.0.0.1", "127.0.0.1%00", "127%2e0.0.1", "l%6fcalhost", "localhost%2e", "localhost%20", "[127.0.0.1]", "[::1", "::1", "::1]", "[]", "[:]", "[::1]a", "a[::1]",
		"[::1%25lo]", "[::1%lo]", "[fe80::1%25eth0]", "[fe80::1%1]", "[::g]", "[1:2:3:4:5:6:7:8:9]", "[::1::]", "[v1.a]", "[::127.0.0.256]", "[::1].", "[localhost]", "\xe2\x91\xa0.0.0.1"} {
		targets = append(targets, "http://"+h+port+"/")
	}
	return targets
}

// TestMalformedRequests sends requests that break a rule, each with a good one behind it, which must never be read.
func TestMalformedRequests(t *testing.T) {
	p, o := startProxy(t), startOrigin(t)
	for kind, requests := range malformed() {
		for _, request := range requests {
			t.Run(kind, func(t *testing.T) {
				if !strings.Contains(request, "\r\n\r\n") {
					request += "\r\n"
				}
				defer func() {
					if t.Failed() {
						t.Logf("after %.200q", request)
					}
				}()
				n, c := len(p.served()), p.dial(t)
				c.send("%s", o.fill(request+plainRequest))
				if resp := c.wantsRefusal("GET", 400, "http_request_error"); !resp.Close {
					t.Error("no Connection: close")
				}
				c.wantsEnd()
				r := p.awaitServed(t, n)
				wantsLogged(t, r, 400, "http_request_error")
				if r["network.peer.address"] != nil {
					t.Errorf("dialled %v", r["network.peer.address"])
				}
			})
		}
	}
	o.wantsNone()
	if got := len(p.served()); got < 200 {
		t.Errorf("%d records", got)
	}
}

// TestNotHTTP speaks other protocols, of which no line may ever end.
func TestNotHTTP(t *testing.T) {
	p := startProxy(t, "HTTP2=false")
	for name, hello := range map[string]string{"TLS": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "SOCKS5": "\x05\x01\x00", "SOCKS4": "\x04\x01\x00\x50\x7f\x00\x00\x01\x00",
		"h2c": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "PROXY": "PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n\r\n"} {
		t.Run(name, func(t *testing.T) {
			c := p.dial(t)
			c.send("%s", hello)
			c.wantsRefusal("GET", 400, "http_request_error")
			c.wantsEnd()
		})
	}
}

// TestUsageIsExplained asks the proxy as if it were a server.
func TestUsageIsExplained(t *testing.T) {
	p := startProxy(t)
	c := p.dial(t)
	c.send("GET /healthz HTTP/1.1\r\nHost: %s\r\n\r\n", p.addr)
	c.wantsRefusal("GET", 400, "http_request_error", "proxy")
	c.wantsEnd()
	c = p.dial(t)
	c.send("GET https://example.com/ HTTP/1.1\r\nHost: example.com\r\n\r\n")
	c.wantsRefusal("GET", 400, "http_request_error", "CONNECT")
	c.wantsEnd()
}

// TestMalformedChunks sends request bodies whose chunks are wrong, at once and after a good chunk has reached the origin.
func TestMalformedChunks(t *testing.T) {
	p := startProxy(t)
	long := strings.Repeat("x", 70<<10)
	for _, bad := range []string{
		"g\r\nhello\r\n0\r\n\r\n", "-5\r\nhello\r\n0\r\n\r\n", "+5\r\nhello\r\n0\r\n\r\n", "0x5\r\nhello\r\n0\r\n\r\n", " 5\r\nhello\r\n0\r\n\r\n", "5 \r\nhello\r\n0\r\n\r\n",
		"\t5\r\nhello\r\n0\r\n\r\n", "5,\r\nhello\r\n0\r\n\r\n", "5 5\r\nhello\r\n0\r\n\r\n", "5_0\r\nhello\r\n0\r\n\r\n", "\r\nhello\r\n0\r\n\r\n", ";a\r\nhello\r\n0\r\n\r\n", "5\x00\r\nhello\r\n0\r\n\r\n",
		"5;a\x00\r\nhello\r\n0\r\n\r\n", "5;a\rb\r\nhello\r\n0\r\n\r\n", "10000000000000000\r\nhello\r\n0\r\n\r\n", "10000000000000005\r\nhello\r\n0\r\n\r\n", "ffffffffffffffff\r\nhello\r\n0\r\n\r\n",
		"8000000000000000\r\nhello\r\n0\r\n\r\n", "fffffffffffffffffffffffff\r\nhello\r\n0\r\n\r\n", strings.Repeat("0", 300) + "5\r\nhello\r\n0\r\n\r\n", "5;" + long + "\r\nhello\r\n0\r\n\r\n",
		"5\nhello\r\n0\r\n\r\n", "5\r\nhello\n0\r\n\r\n", "5\r\nhello\r\n0\n\r\n", "5\r\nhello\r\n0\n\n", "5\r\nhello\r\n0\r\n\n", "5\rhello\r\n0\r\n\r\n", "5\r\r\nhello\r\n0\r\n\r\n",
		"5\r\nhello0\r\n\r\n", "5\r\nhelloX\r\n0\r\n\r\n", "5\r\nhello\rX0\r\n\r\n", "5\r\nhello\r\r\n0\r\n\r\n", "5\r\nhello \r\n0\r\n\r\n", "4\r\nhello\r\n0\r\n\r\n",
		"0\r\nA b: c\r\n\r\n", "0\r\n: b\r\n\r\n", "0\r\nA\r\n\r\n", "0\r\nA : b\r\n\r\n", "0\r\n A: b\r\n\r\n", "0\r\nA: b\r\n c\r\n\r\n", "0\r\nA: b\n\r\n", "0\r\nA: b\r\n\n", "0\r\nA: \x00\r\n\r\n",
		"0\r\nA: b\rc\r\n\r\n", "0\r\n\r\r\n\r\n", "0\r\nA: " + long + "\r\n\r\n", "00g\r\n\r\n", "0;\x01\r\n\r\n",
	} {
		for _, first := range []string{"", "5\r\nfirst\r\n"} {
			t.Run(fmt.Sprintf("%.24q after %q", bad, first), func(t *testing.T) {
				o, n, c := startOrigin(t), len(p.served()), p.dial(t)
				var sent bytes.Buffer
				var up *peer
				head := o.fill("POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nTransfer-Encoding: chunked\r\n\r\n") + first
				if first != "" {
					c.send("%s", head)
					up = o.accept()
					sent.WriteString(up.head())
					up.wants(first)
					sent.WriteString(first)
					head = ""
				}
				c.send("%s", head+bad+o.fill(plainRequest))
				c.wantsRefusal("POST", 400, "http_request_error")
				c.wantsEnd()
				r := p.awaitServed(t, n)
				wantsLogged(t, r, 400, "http_request_error")
				if up == nil && r["network.peer.address"] != nil {
					up = o.accept()
				}
				if up != nil {
					rest, _ := io.ReadAll(up.br)
					sent.Write(rest)
				}
				if isMessage(sent.Bytes()) || strings.Contains(sent.String(), "GET /") {
					t.Errorf("the origin got %q", sent.Bytes())
				}
			})
		}
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Policy, as tables

// classify tells what keeps an address from being public: its own class, or that of the IPv4 address that it embeds.
func classify(a netip.Addr) addressClass {
	for _, face := range faces(nil, a) {
		if class := addressClass(classes.find(face)); class != classPublic {
			return class
		}
	}
	return classPublic
}

// Every block of the registries: its class, and those of its neighbours.
func TestClassify(t *testing.T) {
	for _, row := range []struct {
		block         string
		before, after addressClass // "" = there is none
		class         addressClass
	}{
		{"0.0.0.0/8", "", "public", "unspecified"},
		{"10.0.0.0/8", "public", "public", "private"},
		{"100.64.0.0/10", "public", "public", "shared"},
		{"100.100.100.200/32", "shared", "shared", "metadata"},
		{"127.0.0.0/8", "public", "public", "loopback"},
		{"168.63.129.16/32", "public", "public", "metadata"},
		{"169.254.0.0/16", "public", "public", "link-local"},
		{"169.254.169.254/32", "link-local", "link-local", "link-local"},
		{"172.16.0.0/12", "public", "public", "private"},
		{"192.0.0.0/24", "public", "public", "protocol-assignments"},
		{"192.0.0.0/29", "public", "protocol-assignments", "protocol-assignments"},
		{"192.0.0.8/30", "protocol-assignments", "protocol-assignments", "protocol-assignments"},
		{"192.0.0.170/31", "protocol-assignments", "protocol-assignments", "protocol-assignments"},
		{"192.0.0.192/32", "protocol-assignments", "protocol-assignments", "metadata"},
		{"192.0.2.0/24", "public", "public", "documentation"},
		{"192.31.196.0/24", "public", "public", "as112"},
		{"192.52.193.0/24", "public", "public", "amt"},
		{"192.88.99.0/31", "public", "6a44", "6to4"},
		{"192.88.99.2/32", "6to4", "6to4", "6a44"},
		{"192.88.99.128/25", "6to4", "public", "6to4"},
		{"192.168.0.0/16", "public", "public", "private"},
		{"192.175.48.0/24", "public", "public", "as112"},
		{"198.18.0.0/15", "public", "public", "benchmarking"},
		{"198.51.100.0/24", "public", "public", "documentation"},
		{"203.0.113.0/24", "public", "public", "documentation"},
		{"224.0.0.0/4", "public", "reserved", "multicast"},
		{"240.0.0.0/5", "multicast", "reserved", "reserved"},
		{"255.255.255.255/32", "reserved", "", "broadcast"},
		{"8.8.8.8/32", "public", "public", "public"},

		{"::/128", "", "loopback", "unspecified"},
		{"::1/128", "unspecified", "ipv4-compatible", "loopback"},
		{"::0.1.0.0/112", "ipv4-compatible", "ipv4-compatible", "ipv4-compatible"},
		{"::8.8.8.8/128", "ipv4-compatible", "ipv4-compatible", "ipv4-compatible"},
		{"::1:0:0/96", "ipv4-compatible", "reserved", "reserved"},
		{"100::/64", "reserved", "dummy", "discard-only"},
		{"100:0:0:1::/64", "discard-only", "reserved", "dummy"},
		{"64:ff9b:1::/48", "reserved", "reserved", "nat64-local"},
		{"2000::/16", "reserved", "teredo", "public"},
		{"2001::/32", "public", "protocol-assignments", "teredo"},
		{"2001:1::1/128", "protocol-assignments", "protocol-assignments", "protocol-assignments"},
		{"2001:1::2/127", "protocol-assignments", "protocol-assignments", "protocol-assignments"},
		{"2001:2::/48", "protocol-assignments", "protocol-assignments", "benchmarking"},
		{"2001:3::/32", "protocol-assignments", "protocol-assignments", "amt"},
		{"2001:4:112::/48", "protocol-assignments", "protocol-assignments", "as112"},
		{"2001:10::/28", "protocol-assignments", "orchid", "orchid"},
		{"2001:20::/28", "orchid", "drip", "orchid"},
		{"2001:30::/28", "orchid", "protocol-assignments", "drip"},
		{"2001:100::/24", "protocol-assignments", "public", "protocol-assignments"},
		{"2001:db8::/32", "public", "public", "documentation"},
		{"2002::/16", "public", "public", "6to4"},
		{"2620:4f:8000::/48", "public", "public", "as112"},
		{"3fff::/20", "public", "public", "documentation"},
		{"3fff:8000::/17", "public", "reserved", "public"},
		{"4000::/3", "public", "reserved", "reserved"},
		{"5f00::/16", "reserved", "reserved", "segment-routing"},
		{"fc00::/7", "reserved", "reserved", "unique-local"},
		{"fd00:42::42/128", "unique-local", "unique-local", "metadata"},
		{"fd00:c1::a9fe:a9fe/128", "unique-local", "unique-local", "metadata"},
		{"fd00:100::100:200/128", "unique-local", "unique-local", "metadata"},
		{"fd00:ec2::/32", "unique-local", "unique-local", "metadata"},
		{"fd00:a9fe:a9fe::1/128", "unique-local", "unique-local", "metadata"},
		{"fd20:ce::254/128", "unique-local", "unique-local", "metadata"},
		{"fe80::/10", "reserved", "site-local", "link-local"},
		{"fec0::/10", "link-local", "multicast", "site-local"},
		{"ff00::/8", "site-local", "", "multicast"},
	} {
		block := netip.MustParsePrefix(row.block)
		first, last := block.Masked().Addr(), block.Masked().Addr().AsSlice()
		for i := block.Bits(); i < len(last)*8; i++ {
			last[i/8] |= 0x80 >> (i % 8)
		}
		end, _ := netip.AddrFromSlice(last)
		for addr, want := range map[netip.Addr]addressClass{first: row.class, end: row.class, first.Prev(): row.before, end.Next(): row.after} {
			if !addr.IsValid() {
				continue
			}
			if got := classify(addr); got != want {
				t.Errorf("%s, first, last or a neighbour of %s: %s, want %s", addr, row.block, got, want)
			}
			if mapped := netip.AddrFrom16(addr.As16()); classify(mapped) != want { // ::ffff:a.b.c.d
				t.Errorf("%s: %s, want %s", mapped, classify(mapped), want)
			}
		}
	}
}

// An address that embeds an IPv4 address is judged by both.
func TestEmbeddedAddresses(t *testing.T) {
	for addr, want := range map[string]addressClass{
		"::ffff:127.0.0.1": "loopback", "::ffff:8.8.8.8": "public", "::ffff:0:8.8.8.8": "reserved", "::127.0.0.1": "ipv4-compatible",
		"64:ff9b::10.0.0.1": "private", "64:ff9b::8.8.8.8": "public", "64:ff9b::0.0.0.1": "unspecified", "64:ff9b::169.254.169.254": "link-local",
		"64:ff9b:1::8.8.8.8": "nat64-local", "2002:808:808::": "6to4", "2002:7f00:1::1": "6to4",
		"2a00::5efe:10.0.0.1": "private", "2a00::200:5efe:10.0.0.1": "private", "2a00::5efe:8.8.8.8": "public", "fe80::5efe:8.8.8.8": "link-local",
		"2a00::1:5efe:10.0.0.1": "public", "2001::7f00:1": "teredo",
	} {
		if got := classify(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s is %s, want %s", addr, got, want)
		}
	}
	// Where one of the two is allowed the other still counts.
	for vars, cases := range map[string]map[string]bool{
		"ALLOW_CIDRS=64:ff9b:1::/48": {"64:ff9b:1::8.8.8.8": true, "64:ff9b:1::10.0.0.1": false, // the layouts of prefixes of 96, 64, 56 and 48 bits
			"64:ff9b:1:0:a:0:100::": false, "64:ff9b:1:a:0:1::": false, "64:ff9b:1:a00:0:100::": false, "64:ff9b:1:808:8:800::": true},
		"ALLOW_CIDRS=10.0.0.0/8":           {"64:ff9b::10.0.0.1": true, "2002:a00:1::": false, "::ffff:10.0.0.1": true, "::10.0.0.1": false},
		"ALLOW_CIDRS=10.0.0.0/8,2002::/16": {"2002:a00:1::": true, "2002:7f00:1::": false, "2002:808:808::": true},
		"ALLOW_CIDRS=::/0":                 {"::1": true, "64:ff9b::10.0.0.1": false, "2002:a00:1::": false, "::ffff:10.0.0.1": false},
		"DENY_CIDRS=8.8.8.0/24":            {"8.8.8.8": false, "8.8.9.1": true, "64:ff9b::8.8.8.8": false, "::ffff:8.8.8.8": false, "2a00::5efe:8.8.8.8": false},
		"DENY_HOSTS=8.8.8.0/24":            {"8.8.8.8": false, "8.8.9.1": true, "64:ff9b::8.8.8.8": false, "::ffff:8.8.8.8": false},
		"DENY_HOSTS=8.8.8.0/24:8080":       {"8.8.8.8": true, "64:ff9b::8.8.8.8": true},
	} {
		s := testServer(t, vars)
		for addr, want := range cases {
			x := &exchange{summary: summary{srv: s, dst: destination{key: []byte("a.test:80"), host: []byte("a.test"), port: 80}}}
			if allowed, _ := x.judge([]netip.Addr{netip.MustParseAddr(addr)}); (len(allowed) == 1) != want {
				t.Errorf("%s with %s: allowed %v, want %v", addr, vars, len(allowed) == 1, want)
			}
		}
	}
}

func TestHostRules(t *testing.T) {
	var rules hostRules
	text := "One.example, *.below.example, .both.example:8080, last.example., 10.1.0.0/16, 192.0.2.7:81, [2001:db8::]:443, fd00::/8, [fd01::/16]:82"
	if err := rules.UnmarshalText([]byte(text)); err != nil {
		t.Fatal(err)
	}
	for authority, want := range map[string]bool{
		"one.example": true, "ONE.example.": true, "x.one.example": false, "one.example:99": true, "xone.example": false,
		"below.example": false, "a.below.example": true, "a.b.below.example": true, "abelow.example": false,
		"both.example:8080": true, "a.both.example:8080": true, "both.example": false, "last.example": true, "example": false,
		"10.1.2.3": true, "10.2.0.0": false, "192.0.2.7:81": true, "192.0.2.7": false, "[2001:db8::]:443": true, "[2001:db8::]": false,
		"[fd00::1]:9": true, "[fe00::1]:9": false,
	} {
		var d destination
		if err := d.parse([]byte(authority), 80); err != nil {
			t.Fatalf("%s: %v", authority, err)
		}
		if got := rules.match(d.host, d.ip, d.port) != ""; got != want {
			t.Errorf("%s: %v, want %v", authority, got, want)
		}
	}
	for _, bad := range []string{"*example.com", "*", "a..b", "a.example:0", "a.example:x", "a.*.example", "10.0.0.0/33", "0x7f.1", "[::1", "::1]", "[1.2.3.4", "[1.2.3.4:80", "[a.example]", "8.8.8.8.", "*.8.8.8.8", "evil.test..", "[10.0.0.1]",
		"2001:db8::/32:443", "[::1]:", "[::1]:0", "fe80::1%eth0", "bücher.example", "http://a.example", "a.example/", "user@a.example", "..", ".",
		"*.", "*..a", "10.0.0.0/8:x", "1.2.3", "a.example:65536", "a.example:+1", "::ffff:10.0.0.0/104", strings.Repeat("a", 64) + ".example"} {
		if err := rules.UnmarshalText([]byte(bad)); err == nil || !strings.Contains(err.Error(), bad) {
			t.Errorf("rule %q: error %v, want one that names it", bad, err)
		}
	}
}

// The zone of a link-local address says which interface it is on, not what it is.
func TestZones(t *testing.T) {
	for text, want := range map[string]addressClass{"fe80::1%eth0": "link-local", "::1%lo": "loopback", "2600::1%eth0": classPublic} {
		if got := classify(netip.MustParseAddr(text)); got != want {
			t.Errorf("%s is %s, want %s", text, got, want)
		}
	}
	var linkLocal prefixes
	linkLocal.UnmarshalText([]byte("fe80::/10"))
	if linkLocal.find(netip.MustParseAddr("fe80::1%eth0")) == "" {
		t.Error("fe80::/10 does not contain an address of it that has a zone")
	}
}

// Rules about hosts: denied wins over allowed, and what is refused says which rule it was.
func TestHostsAllowedAndDenied(t *testing.T) {
	origin, dns := startOrigin(t), startDNS(t)
	_, port, _ := net.SplitHostPort(origin.addr)
	for _, name := range []string{"a.test", "b.a.test", "bad.a.test", "other.test", "trusted.test"} {
		dns.set(name, dnsReply{addrs: "127.0.0.1"})
	}
	dns.set("elsewhere.test", dnsReply{addrs: "127.0.0.5"})
	dns.set("both.test", dnsReply{addrs: "127.0.0.5 127.0.0.1"})
	p := startProxy(t, "DNS_SERVERS="+dns.addr, "ALLOW_HOSTS=.a.test,elsewhere.test,both.test,trusted.test:1,127.0.0.0/29:"+port, "DENY_HOSTS=bad.a.test,127.0.0.5")
	for host, words := range map[string][]string{
		"a.test": nil, "A.Test.": nil, "b.a.test": nil, "127.0.0.1": nil, "both.test": nil, // of the two addresses one is not denied
		"bad.a.test": {"bad.a.test", "SLUICE_DENY_HOSTS"}, "BAD.a.test.": {"rule bad.a.test", "SLUICE_DENY_HOSTS"},
		"other.test": {"other.test:" + port, "SLUICE_ALLOW_HOSTS"}, "trusted.test": {"trusted.test", "SLUICE_ALLOW_HOSTS"},
		"127.0.0.5": {"rule 127.0.0.5", "SLUICE_DENY_HOSTS"}, "127.0.0.9": {"SLUICE_ALLOW_HOSTS"}, "elsewhere.test": {"rule 127.0.0.5", "SLUICE_DENY_HOSTS"},
	} {
		c := p.dial(t)
		c.send("GET http://%s:%s/ HTTP/1.1\r\nHost: x\r\n\r\n", host, port)
		if words != nil {
			c.wantsRefusal("GET", 403, tokenDenied, words...)
			continue
		}
		up := origin.accept()
		up.head()
		up.send(plainAnswer)
		if resp, _ := c.response("GET"); resp.StatusCode != 200 {
			t.Errorf("%s: %s", host, resp.Status)
		}
		up.Close()
	}
}

// A refusal keeps the client's connection where it can be told where the next request begins.
func TestConnectionAfterRefusal(t *testing.T) {
	origin := startOrigin(t)
	p := startProxy(t, "DENY_HOSTS=denied.test", "USERS=ann:secret")
	for name, e := range map[string]struct {
		request string
		kept    bool
	}{
		"GET":           {"GET http://{h}/ HTTP/1.1\r\nHost: x\r\n{a}\r\n", true},
		"HEAD":          {"HEAD http://{h}/ HTTP/1.1\r\nHost: x\r\n{a}\r\n", true},
		"small body":    {"POST http://{h}/ HTTP/1.1\r\nHost: x\r\n{a}Content-Length: 5\r\n\r\nhello", true},
		"chunks":        {"POST http://{h}/ HTTP/1.1\r\nHost: x\r\n{a}Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", true},
		"half a body":   {"POST http://{h}/ HTTP/1.1\r\nHost: x\r\n{a}Content-Length: 50\r\n\r\nhello", false},
		"half a chunk":  {"POST http://{h}/ HTTP/1.1\r\nHost: x\r\n{a}Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", false},
		"bad chunk":     {"POST http://{h}/ HTTP/1.1\r\nHost: x\r\n{a}Transfer-Encoding: chunked\r\n\r\n5\r\nhello--0\r\n\r\n", false},
		"expects":       {"POST http://{h}/ HTTP/1.1\r\nHost: x\r\n{a}Expect: 100-continue\r\nContent-Length: 5\r\n\r\n", false},
		"Connection":    {"GET http://{h}/ HTTP/1.1\r\nHost: x\r\n{a}Connection: close\r\n\r\n", false},
		"HTTP/1.0":      {"GET http://{h}/ HTTP/1.0\r\n{a}\r\n", false},
		"CONNECT":       {"CONNECT {h}:80 HTTP/1.1\r\nHost: x\r\n{a}\r\n", false},
		"CONNECT, more": {"CONNECT {h}:80 HTTP/1.1\r\nHost: x\r\n{a}\r\nGET http://" + origin.addr + "/ HTTP/1.1\r\nHost: x\r\n" + basic("ann:secret") + "\r\n", false},
	} {
		for status, auth := range map[int]string{403: basic("ann:secret"), 407: ""} {
			t.Run(fmt.Sprint(name, " ", status), func(t *testing.T) {
				method, _, _ := strings.Cut(e.request, " ")
				c := p.dial(t)
				c.send("%s", strings.NewReplacer("{h}", "denied.test", "{a}", auth).Replace(e.request))
				resp := c.wantsRefusal(method, status, tokenDenied)
				if challenge := resp.Header.Get("Proxy-Authenticate"); (challenge != "") != (status == 407) || challenge != "" && challenge != `Basic realm="sluice-test", charset="UTF-8"` {
					t.Errorf("Proxy-Authenticate: %s", challenge)
				}
				if resp.Close == e.kept {
					t.Errorf("Connection: close %v", resp.Close)
				}
				if !e.kept {
					c.wantsEnd()
					return
				}
				exchangeOver(c, origin, basic("ann:secret"))
			})
		}
	}
	origin.wantsNone()
}

// exchangeOver has a plain request with some fields answered by origin.
func exchangeOver(c *peer, origin *testOrigin, fields string) {
	c.t.Helper()
	c.send("GET http://%s/ HTTP/1.1\r\nHost: x\r\n%s\r\n", origin.addr, fields)
	up := origin.accept()
	up.wants(origin.fill(plainWants)) // no credentials among the fields
	up.send("%s", plainAnswer)
	c.wants(plainGets)
	up.Close()
}

// serveOnce has a request to a host answered by origin.
func serveOnce(c *peer, origin *testOrigin, host string) {
	c.t.Helper()
	c.send("GET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n", host)
	up := origin.accept()
	up.head()
	up.send("%s", plainAnswer)
	c.wants(plainGets)
	up.Close()
}

// basic is a field with credentials.
func basic(credentials string) string {
	return "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(credentials)) + "\r\n"
}

func hashOf(t testing.TB, password string, cost int) string {
	t.Helper()
	hash, err := bcrypt.GenerateFromPassword([]byte(password), cost)
	if err != nil {
		t.Fatal(err)
	}
	return string(hash)
}

func TestCredentials(t *testing.T) {
	origin := serveAt(t, "127.0.0.1:0", nil)
	p := startProxy(t, "USERS=ann:secret,bob:a:b,\ncy:"+hashOf(t, "pass word", 4)+",dan:"+strings.Replace(hashOf(t, "dan's", 4), "$2a$", "$2y$", 1))
	c := p.dial(t)
	for _, e := range []struct {
		field string
		user  any // nil = refused
	}{
		{"", nil}, {basic("ann:secret"), "ann"}, {basic("ann:Secret"), nil}, {basic("ann:secret2"), nil}, {basic("ann:"), nil}, {basic("ann"), nil},
		{basic(":secret"), nil}, {basic("Ann:secret"), nil}, {basic("bob:a:b"), "bob"}, {basic("bob:a"), nil}, {basic("cy:pass word"), "cy"},
		{basic("cy:pass word"), "cy"}, {basic("cy:pass"), nil}, {basic("cy:secret"), nil}, {basic("ann:pass word"), nil}, {basic("dan:dan's"), "dan"},
		{basic("nobody:secret"), nil}, {basic(""), nil}, {basic(":"), nil}, {"Proxy-Authorization: basic YW5uOnNlY3JldA==\r\n", "ann"},
		{"proxy-authorization:   BASIC   YW5uOnNlY3JldA==  \r\n", "ann"}, {"Proxy-Authorization: Bearer YW5uOnNlY3JldA==\r\n", nil},
		{"Proxy-Authorization: Basic\r\n", nil}, {"Proxy-Authorization: YW5uOnNlY3JldA==\r\n", nil}, {"Proxy-Authorization: Basic !!!\r\n", nil},
		{"Authorization: Basic YW5uOnNlY3JldA==\r\n", nil}, {"Proxy-Authorization: Basic " + strings.Repeat("QUFB", 9000) + "\r\n", nil},
	} {
		n := len(p.served())
		resp, body := c.ask("GET", "http://"+origin+"/", strings.TrimSuffix(e.field, "\r\n"))
		r := p.awaitServed(t, n)
		if e.user == nil {
			wantsRefusal(t, resp, body, 407, tokenDenied)
		} else if resp.StatusCode != 200 {
			t.Errorf("%.60q: %s", e.field, resp.Status)
		}
		if r["user.name"] != e.user {
			t.Errorf("%.60q: user.name %v, want %v", e.field, r["user.name"], e.user)
		}
	}
	for _, secret := range []string{"secret", "YW5uOnNlY3JldA", "pass word", "$2"} {
		if strings.Contains(p.log.all(), secret) {
			t.Errorf("%q is in the log", secret)
		}
	}
	tunnel := p.dial(t)
	tunnel.send("CONNECT %s HTTP/1.1\r\nHost: x\r\n%s\r\n", origin, basic("cy:pass word"))
	if head := tunnel.head(); !strings.HasPrefix(head, "HTTP/1.1 200 ") {
		t.Fatal(head)
	}
	tunnel.Close()
	wantsFields(t, p.log.await(t, "tunnel", 1), map[string]any{"user.name": "cy"})
}

// Secrets stand neither in what `sluice env` prints nor in complaints about them.
func TestSecretsAreNotShown(t *testing.T) {
	_, stdout, _ := sluice([]string{"env"}, prefixed("USERS=ann:topsecret")...)
	if row := envRow(stdout, "USERS"); !strings.Contains(row, "(redacted)") || strings.Contains(stdout, "topsecret") || strings.Contains(stdout, "ann") {
		t.Errorf("%s", row)
	}
	for _, value := range []string{"topsecret", ":topsecret", "topsecret:", "ann:topsecret,ann:topsecret", "ann:$2a$10$topsecret", "ann:$2topsecret", ",:,topsecret", "ann:$apr1$topsecret", "ann:{SHA}topsecret",
		"ann:" + strings.Replace(hashOf(t, "topsecret", 4), "$04$", "$31$", 1)} {
		status, _, stderr := sluice([]string{"env"}, prefixed("USERS="+value)...)
		if status != 2 || !strings.Contains(stderr, "SLUICE_USERS=\"(redacted)\": entry ") || strings.Contains(stderr, "topsecret") {
			t.Errorf("%s: status %d, %s", value, status, stderr)
		}
	}
}

// A list of users or hosts that never came does not mean that there is no restriction.
func TestEmptyRestrictions(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty")
	os.WriteFile(empty, []byte(" \n"), 0o600)
	for _, variable := range []string{"USERS_FILE=" + empty, "ALLOW_HOSTS_FILE=" + empty, "USERS=,", "USERS_FILE=ann:topsecret"} {
		status, _, stderr := sluice([]string{"env"}, prefixed(variable)...)
		if name, _, _ := strings.Cut(variable, "="); status != 2 || !strings.Contains(stderr, "SLUICE_"+name) || strings.Contains(stderr, "topsecret") {
			t.Errorf("%s: status %d, %s", variable, status, stderr)
		}
	}
	s := testServer(t, "ALLOW_HOSTS=,")
	var d destination
	d.parse([]byte("a.test:80"), 0)
	if s.ruleOut(&d) == nil {
		t.Error("ALLOW_HOSTS=, allows a.test")
	}
}

// What matched a bcrypt hash is remembered, for a while, and only that.
func TestVerifiedCredentials(t *testing.T) {
	s := testServer(t, "USERS=bob:plain,ann:"+hashOf(t, "secret", 4))
	g := s.gate
	field := func(text string) []byte { return []byte(base64.StdEncoding.EncodeToString([]byte(text))) }
	verify := func(token []byte, now time.Time) string {
		x := &exchange{summary: summary{srv: s, c: &client{}, start: now}}
		x.req.credentials = token
		if f := x.authenticate(); (f == nil) != (x.user != "") {
			t.Errorf("%s: user %q, %v", token, x.user, f)
		}
		return x.user
	}
	now := time.Now()
	for range 3 {
		if verify(field("ann:secret"), now) != "ann" || verify(field("ann:wrong"), now) != "" || verify(field("eve:secret"), now) != "" || verify(field("bob:plain"), now) != "bob" {
			t.Fatal("a wrong verdict")
		}
		if len(g.known) != 2 { // bob, who has no hash, and ann
			t.Fatalf("%d credentials are remembered", len(g.known))
		}
	}
	digest := g.digest(field("ann:secret"))
	if g.recall(digest, now.Add(verifiedFor+time.Second)) != "" || g.recall(digest, now.Add(verifiedFor-time.Second)) != "ann" {
		t.Errorf("not remembered for %v", verifiedFor)
	}
	if later := now.Add(2*verifiedFor - 2*time.Second); g.recall(digest, later) != "ann" || g.recall(digest, later.Add(verifiedFor+time.Second)) != "" {
		t.Error("use does not prolong it")
	}
	later := now.Add(24 * time.Hour)
	if verify(field("ann:secret"), later) != "ann" || verify(field("bob:plain"), later) != "bob" {
		t.Error("refused after a day")
	}
	// A credential has one spelling, so that no more than one is remembered for each user.
	long := strings.Repeat("p", 72)
	g.hashes["cy"] = hashOf(t, long, 4)
	for token, user := range map[string]string{string(field("ann:secret")) + "!": "", string(field("ann:secret")) + "=": "", "YW5uOnNlY3JldB==": "", "YW5uOnNlY3JldA": "",
		string(field("ann:secret\x00secret")): "", string(field("cy:" + long)): "cy", string(field("cy:" + long + "x")): "", string(field("ann")): "", "": ""} {
		if got := verify([]byte(token), now); got != user {
			t.Errorf("%s: %q, want %q", token, got, user)
		}
	}
	if len(g.known) != 3 {
		t.Errorf("%d credentials are remembered of 3 users", len(g.known))
	}
	if newGatekeeper(users{"ann": "secret"}).digest([]byte("x")) == g.digest([]byte("x")) {
		t.Error("two gatekeepers have the same secret")
	}
}

// Who waits for bcrypt gives up with his connection, at the drain too, and of many at once most are not let wait.
func TestWaitingForBcrypt(t *testing.T) {
	start := time.Now()
	hash := hashOf(t, "secret", 10)
	each := time.Since(start)
	p := startProxy(t, "USERS=ann:"+hash, "DRAIN_TIMEOUT=300ms")
	answers := make(chan string, 60)
	for n := range cap(answers) {
		c := p.dial(t)
		c.send("GET http://a.test/ HTTP/1.1\r\nHost: x\r\n%s\r\n", basic(fmt.Sprint("ann:wrong", n)))
		go func() {
			line, _ := c.br.ReadString('\n')
			answers <- line
		}()
	}
	busy := 0
	for busy < cap(answers)-33-5 { // some may have been checked by now
		if line := <-answers; strings.HasPrefix(line, "HTTP/1.1 503 ") {
			busy++
		}
	}
	if took := <-p.draining(t); took > 800*time.Millisecond+5*each {
		t.Errorf("the drain took %v, with %v for each of 33 that waited", took, each)
	}
	for _, token := range []string{"", "!", "YW5u"} { // what is no credential costs nothing
		s := testServer(t, "USERS=ann:"+hashOf(t, "secret", 4))
		if user, f := s.gate.check(t.Context(), []byte(token), [32]byte{}); user != "" || f != nil || len(s.gate.queue) != 0 {
			t.Errorf("%q: %q, %v", token, user, f)
		}
	}
}

// A name that does not exist takes as long to refuse as one that does.
func TestUnknownUsersTakeAsLong(t *testing.T) {
	g := newGatekeeper(users{"ann": hashOf(t, "secret", 8), "bob": "plain"})
	took := map[string]time.Duration{}
	for range 5 {
		for _, name := range []string{"ann", "bob", "eve", "\xff"} {
			token := []byte(base64.StdEncoding.EncodeToString([]byte(name + ":wrong")))
			start := time.Now()
			g.check(t.Context(), token, g.digest(token))
			took[name] = min(cmp.Or(took[name], time.Hour), time.Since(start))
		}
	}
	for name, d := range took {
		if d < took["ann"]/2 || d > 2*took["ann"] {
			t.Errorf("%q took %v, ann %v", name, d, took["ann"])
		}
	}
}

// MODE=audit lets pass what the rules about hosts and ports deny, says so once per destination, and lets nothing else pass.
func TestAudit(t *testing.T) {
	if !apart(t) {
		return
	}
	origin, dns := startOrigin(t), startDNS(t)
	_, port, _ := net.SplitHostPort(origin.addr)
	for name, addr := range map[string]string{"good.test": "127.0.0.1", "bad.test": "127.0.0.1", "unlisted.test": "127.0.0.1", "inner.test": "127.0.0.7", "there.test": "127.0.0.2"} {
		dns.set(name, dnsReply{addrs: addr})
	}
	elsewhere := serveAt(t, "127.0.0.2:"+port, nil)
	vars := []string{"MODE=audit", "DNS_SERVERS=" + dns.addr, "ALLOW_HOSTS=good.test,bad.test,there.test,127.0.0.0/8", "DENY_HOSTS=bad.test,127.0.0.2", "ALLOW_CIDRS=127.0.0.1,127.0.0.2"}
	p := startProxy(t, vars...)
	hosts := map[string]string{"good.test": "", "bad.test": "bad.test (SLUICE_DENY_HOSTS)", "unlisted.test": "SLUICE_ALLOW_HOSTS", "there.test": "127.0.0.2 denies (SLUICE_DENY_HOSTS)"}
	for host := range hosts {
		for range 3 {
			c := p.dial(t)
			if host == "there.test" {
				if _, body := c.ask("GET", "http://"+host+":"+port+"/"); body != elsewhere {
					t.Fatalf("%s: %q", host, body)
				}
				continue
			}
			serveOnce(c, origin, host+":"+port)
		}
	}
	for target, token := range map[string]string{"inner.test:" + port: tokenProhibited, "10.0.0.1:" + port: tokenProhibited, p.addr: tokenLoop, p.admin: tokenLoop} {
		c := p.dial(t)
		c.send("CONNECT %s HTTP/1.1\r\nHost: x\r\n\r\n", target)
		c.wantsRefusal("CONNECT", map[string]int{tokenProhibited: 403, tokenLoop: 502}[token], token)
	}
	c := p.dial(t)
	c.send("GET http://good.test:%s/ HTTP/1.1\r\nHost: x\r\nVia: 1.1 sluice-test\r\n\r\n", port)
	c.wantsRefusal("GET", 502, tokenLoop)
	p.awaitServed(t, 16)
	series, _ := p.scrape(t) // those for there.test went over one connection; what something else has denied was not let through
	if let, denied := series[`sluice_would_deny_total{reason="http_request_denied"}`], series[`sluice_denied_total{reason="destination_ip_prohibited"}`]; let != 9 || denied != 2 {
		t.Errorf("%v requests were let through, %v denied", let, denied)
	}
	p.stop()
	for host, words := range hosts {
		var said []map[string]any
		for _, r := range p.log.records(t) {
			if r["would_deny"] != nil && r["server.address"] == host {
				said = append(said, r)
			}
		}
		if words == "" && len(said) != 0 || words != "" && (len(said) != 1 || said[0]["level"] != "WARN" || !strings.Contains(said[0]["would_deny"].(string), words) ||
			fmt.Sprint(said[0]["server.port"]) != port || said[0]["client.address"] != "127.0.0.1") {
			t.Errorf("%s: %v", host, said)
		}
	}
	ports := startProxy(t, "MODE=audit", "ALLOW_PORTS=1")
	exchangeOver(ports.dial(t), origin, "")
	if r := ports.log.await(t, "would deny", 1); !strings.Contains(r["would_deny"].(string), "SLUICE_ALLOW_PORTS") {
		t.Error(r)
	}
	users := startProxy(t, "MODE=audit", "USERS=ann:secret")
	if resp, _ := users.dial(t).ask("GET", "http://"+origin.addr+"/"); resp.StatusCode != 407 {
		t.Errorf("without credentials: %s", resp.Status)
	}
	clients := startProxy(t, "MODE=audit", "ALLOW_CLIENTS=10.0.0.1")
	clients.dial(t).wantsRefusal("GET", 403, tokenDenied, "SLUICE_ALLOW_CLIENTS")
	origin.wantsNone()
}

// The first contact with a destination is logged whatever the sampling, and at the drain all of them are told of in one record.
func TestContacts(t *testing.T) {
	origin, dns := startOrigin(t), startDNS(t)
	_, port, _ := net.SplitHostPort(origin.addr)
	dns.set("z.test", dnsReply{addrs: "127.0.0.1"})
	dns.set("A.test", dnsReply{addrs: "127.0.0.1"})
	dns.set("a.test", dnsReply{addrs: "127.0.0.1"})
	p := startProxy(t, "DNS_SERVERS="+dns.addr, "LOG_LEVEL=info", "LOG_SAMPLE=info=0", "DENY_HOSTS=denied.test", "POOL_IDLE=0")
	for _, host := range []string{"z.test", "a.test", "A.TEST.", "z.test", "127.0.0.1", "z.test"} {
		serveOnce(p.dial(t), origin, host+":"+port)
	}
	client, up := p.openTunnel(t, origin)
	client.Close()
	up.Close()
	p.dial(t).ask("GET", "http://denied.test:"+port+"/")
	p.dial(t).ask("GET", "http://nowhere.test:"+port+"/")
	p.stop()
	var first []string
	for _, r := range p.log.records(t) {
		if r["level"] == "INFO" && r["server.address"] != nil {
			first = append(first, r["server.address"].(string))
		}
	}
	slices.Sort(first) // a record follows its answer, perhaps after that of the next request
	if got := strings.Join(first, " "); got != "127.0.0.1 a.test z.test" {
		t.Errorf("logged: %s", got)
	}
	wantsFields(t, p.log.await(t, "destinations", 1), map[string]any{"level": "INFO", "count": 3.0, "contacts_with_others": 0.0,
		"allow_hosts": fmt.Sprintf("SLUICE_ALLOW_HOSTS=127.0.0.1:%[1]s,a.test:%[1]s,z.test:%[1]s", port), "allow_ports": "SLUICE_ALLOW_PORTS=" + port})
}

// What the drain says can be pasted: it allows what was seen and nothing else. It is bounded.
func TestContactsArePasteReady(t *testing.T) {
	c := contacts{keys: map[string]*atomic.Int64{}}
	var d destination
	firsts := 0
	for i := range 2 * 1000 {
		d = destination{}
		if err := d.parse(fmt.Appendf(nil, "host-%d.test:%d", i%(1000+5), 80+i%2), 0); err != nil {
			t.Fatal(err)
		}
		if isNew, _ := c.first(&d); isNew {
			firsts++
		}
	}
	everything := contacts{keys: map[string]*atomic.Int64{}, all: true}
	for range 2 {
		for i := range 1005 {
			d = destination{}
			d.parse(fmt.Appendf(nil, "host-%d.test:80", i), 0)
			if first, _ := everything.first(&d); len(everything.keys) == 1000 && i > 1000 && !first {
				t.Errorf("host-%d is not told of", i)
			}
		}
	}
	if firsts != 1000 || len(c.keys) != 1000 || c.more == 0 {
		t.Errorf("%d first contacts, %d kept, %d more", firsts, len(c.keys), c.more)
	}
	c = contacts{keys: map[string]*atomic.Int64{}}
	seen := []string{"a.test:80", "[2001:db8::1]:443", "192.0.2.1:8080", "xn--bcher-kva.test:443"}
	for _, authority := range seen {
		d = destination{}
		d.parse([]byte(authority), 0)
		c.first(&d)
	}
	var out logSink
	c.list(slog.New(slog.NewJSONHandler(&out, nil)))
	value, _ := strings.CutPrefix(out.records(t)[0]["allow_hosts"].(string), "SLUICE_ALLOW_HOSTS=")
	ports, _ := strings.CutPrefix(out.records(t)[0]["allow_ports"].(string), "SLUICE_ALLOW_PORTS=")
	s := testServer(t, "ALLOW_HOSTS="+value, "ALLOW_PORTS="+ports)
	for authority, want := range map[string]bool{"a.test:80": true, "[2001:db8::1]:443": true, "192.0.2.1:8080": true, "xn--bcher-kva.test:443": true,
		"a.test:443": false, "b.a.test:80": false, "[2001:db8::2]:443": false, "192.0.2.1:80": false, "a.test:8080": false} {
		d = destination{}
		d.parse([]byte(authority), 0)
		if f := s.ruleOut(&d); (f == nil) != want {
			t.Errorf("%s: %v", authority, f)
		}
	}
}

// ALLOW_PRIVATE_HOSTS lets names lead to inner networks, and not to what gives credentials away or is no address of a service.
func TestPrivateHosts(t *testing.T) {
	s := testServer(t, "ALLOW_PRIVATE_HOSTS=db.test,192.168.0.0/16")
	for addr, want := range map[string]bool{"10.0.0.1": true, "192.168.1.1": true, "100.64.0.1": true, "fd12::1": true, "127.0.0.1": true, "::1": true, "192.0.2.1": true, "198.18.0.1": true,
		"8.8.8.8": true, "169.254.169.254": false, "169.254.1.1": false, "fe80::1": false, "100.100.100.200": false, "fd00:ec2::23": false, "fd00:ec2::254": false, "0.0.0.0": false, "224.0.0.1": false,
		"255.255.255.255": false, "240.0.0.1": false, "2002:a00:1::": false, "::10.0.0.1": false, "64:ff9b::10.0.0.1": true, "64:ff9b::169.254.169.254": false} {
		x := &exchange{summary: summary{srv: s}}
		x.dst.parse([]byte("db.test:443"), 0)
		if allowed, _ := x.judge([]netip.Addr{netip.MustParseAddr(addr)}); (len(allowed) == 1) != want {
			t.Errorf("db.test at %s: %v, want %v", addr, !want, want)
		}
	}
}

// What MODE=audit lets pass does not depend on the order of a name's addresses.
func TestAuditJudgesAllAddresses(t *testing.T) {
	s := testServer(t, "MODE=audit", "DENY_HOSTS=93.184.215.0/24")
	for _, addrs := range []string{"93.184.215.14 10.0.0.1", "10.0.0.1 93.184.215.14"} {
		x := &exchange{summary: summary{srv: s, c: &client{}}}
		x.dst.parse([]byte("a.test:443"), 0)
		var list []netip.Addr
		for text := range strings.FieldsSeq(addrs) {
			list = append(list, netip.MustParseAddr(text))
		}
		if allowed, f := x.judge(list); len(allowed) != 1 || allowed[0].String() != "93.184.215.14:443" {
			t.Errorf("%s: %v, %v", addrs, allowed, f)
		}
	}
}

// A refusal by address names the class or block and the variable; which address a name has is told in the log alone.
func TestDenialsExplainThemselves(t *testing.T) {
	dns := startDNS(t)
	dns.set("inner.test", dnsReply{addrs: "10.1.2.3"})
	dns.set("meta.test", dnsReply{addrs: "169.254.169.254"})
	dns.set("closed.test", dnsReply{addrs: "127.0.0.9"})
	p := startProxy(t, "DNS_SERVERS="+dns.addr, "DENY_CIDRS=127.0.0.8/29", "ALLOW_PRIVATE_HOSTS=meta.test,169.254.1.0/24")
	for _, e := range []struct{ host, text, logged string }{
		{"10.1.2.3", "10.1.2.3 is a private address (SLUICE_ALLOW_CIDRS, SLUICE_ALLOW_PRIVATE_HOSTS)", ""},
		{"inner.test", "inner.test resolves to a private address (SLUICE_ALLOW_CIDRS, SLUICE_ALLOW_PRIVATE_HOSTS)", ": 10.1.2.3"},
		{"meta.test", "meta.test resolves to a link-local address (SLUICE_ALLOW_CIDRS)", ": 169.254.169.254"},
		{"closed.test", "closed.test resolves to an address in 127.0.0.8/29 (SLUICE_DENY_CIDRS)", ": 127.0.0.9"},
		{"127.0.0.10", "127.0.0.10 is an address in 127.0.0.8/29 (SLUICE_DENY_CIDRS)", ""},
		{"[64:ff9b::a01:203]", "64:ff9b::a01:203 is a private address (SLUICE_ALLOW_CIDRS, SLUICE_ALLOW_PRIVATE_HOSTS)", ""},
	} {
		n := len(p.served())
		resp, body := p.dial(t).ask("GET", "http://"+e.host+":81/")
		wantsRefusal(t, resp, body, 403, tokenProhibited)
		if body != "sluice: "+e.text+"\n" {
			t.Errorf("%s: %s", e.host, body)
		}
		if r := p.awaitServed(t, n); r["error.message"] != e.text+e.logged {
			t.Errorf("%s: %v", e.host, r["error.message"])
		}
	}
}

// A connection that a request may have logged in (NTLM, Negotiate: RFC 4559) serves nobody else.
func TestLoginsOfConnections(t *testing.T) {
	origin := startOrigin(t)
	p := startProxy(t)
	for field, reused := range map[string]bool{"Authorization: NTLM TlRMTVNTUA==\r\n": false, "authorization: negotiate YII=\r\n": false, "Authorization: Negotiate\r\n": false,
		"Authorization: Basic YTpi\r\n": true, "Authorization: NTLMish x\r\n": true} {
		first, n := p.dial(t), len(p.served())
		first.send("GET http://%s/ HTTP/1.1\r\nHost: x\r\n%s\r\n", origin.addr, field)
		up := origin.accept()
		if head := up.head(); !strings.Contains(head, field) {
			t.Errorf("%q was not passed on: %q", field, head)
		}
		up.send("%s", plainAnswer)
		first.wants(plainGets)
		p.awaitServed(t, n) // an answer is sent on before its connection is free for another client
		second := p.dial(t)
		second.send("%s", origin.fill(plainRequest))
		if !reused {
			up.wantsEnd()
			up = origin.accept()
		}
		up.wants(origin.fill(plainWants))
		up.send("%s", strings.Replace(plainAnswer, "\r\n", "\r\nConnection: close\r\n", 1))
		second.response("GET")
		p.awaitServed(t, n+1)
	}
}

// Bytes of one client never come to another, whatever becomes of their requests: buffers and exchanges are pooled.
func TestClientsSeeTheirOwnBytesAlone(t *testing.T) {
	echo := serveAt(t, "127.0.0.1:0", func(w http.ResponseWriter, r *http.Request) {
		r.Write(w)
	})
	p := startProxy(t, "LOG_LEVEL=info", "LOG_SAMPLE=info=0,warn=0", "DENY_HOSTS=denied.test")
	var wg sync.WaitGroup
	for n := range 8 {
		wg.Go(func() {
			mine := fmt.Sprintf("client-%d-", n)
			dice := rand.New(rand.NewPCG(uint64(n), 1))
			var c *peer
			for range 150 {
				if c == nil {
					c = p.dial(t)
				}
				pad := strings.Repeat(mine, 1+dice.IntN(400))
				fields := "X-Mine: " + mine + "\r\nCookie: " + pad[:min(len(pad), 3000)] + "\r\n"
				method, request := "POST", ""
				switch dice.IntN(6) {
				case 0:
					request = fmt.Sprintf("POST http://%s/%s HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n%s", echo, mine, fields, len(pad), pad)
				case 1:
					request = fmt.Sprintf("POST http://%s/%s HTTP/1.1\r\nHost: x\r\n%sTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", echo, mine, fields, len(pad), pad)
				case 2:
					method, request = "TRACE", fmt.Sprintf("TRACE http://%s/%s HTTP/1.1\r\nHost: x\r\n%sMax-Forwards: 0\r\n\r\n", echo, mine, fields)
				case 3:
					request = fmt.Sprintf("POST http://denied.test/%s HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n%s", mine, fields, len(pad), pad)
				case 4:
					method, request = "GET", fmt.Sprintf("GET http://%s/%s HTTP/1.1\r\nHost: x\r\n%sBad Field: %s\r\n\r\n", echo, mine, fields, mine)
				default:
					method, request = "GET", fmt.Sprintf("GET http://%s/%s HTTP/1.1\r\nHost: x\r\n%s\r\n", echo, mine, fields)
				}
				io.WriteString(c.TCPConn, request)
				resp, err := http.ReadResponse(c.br, &http.Request{Method: method})
				if err != nil {
					t.Errorf("%s: %v", mine, err)
					return
				}
				body, _ := io.ReadAll(resp.Body)
				for other := range 8 {
					if theirs := fmt.Sprintf("client-%d-", other); other != n && (bytes.Contains(body, []byte(theirs)) || strings.Contains(fmt.Sprint(resp.Header), theirs)) {
						t.Errorf("client %d got bytes of client %d", n, other)
					}
				}
				if resp.Close {
					c.Close()
					c = nil
				}
			}
		})
	}
	wg.Wait()
}

// A search list makes no names that the rules have not judged. resolv.conf is this process's own, in a mount namespace.
func TestSearchList(t *testing.T) {
	dir := t.TempDir()
	os.WriteFile(filepath.Join(dir, "resolv.conf"), []byte("search test\nnameserver 127.0.0.1\n"), 0o644)
	os.WriteFile(filepath.Join(dir, "hosts"), []byte("127.0.0.1 short long.example\n"), 0o644)
	if !inNamespace(t, "--mount", `mount --bind "$1/resolv.conf" /etc/resolv.conf && mount --bind "$1/hosts" /etc/hosts`, dir) {
		return
	}
	dns := startHostileDNS(t)
	dns.set("evil.test", func(q *dnsQuery) { q.give("127.0.0.1") })
	_, port, _ := net.SplitHostPort(serveAt(t, "127.0.0.1:0", nil))
	p := startProxy(t, "DNS_SERVERS="+dns.addr, "DENY_HOSTS=.test")
	for host, want := range map[string]int{"evil.test": 403, "evil": 502, "evil.": 502, "short": 200, "SHORT.": 200, "long.example": 200, "long.example.": 200} {
		if status, token, text := reach(t, p, "GET", host+":"+port); status != want {
			t.Errorf("%s: %d %s %s", host, status, token, text)
		}
	}
	dns.wantsAsked(t, "evil.test", 0)
}

// A rule that is taken holds; otherwise who wrote it believes that it does.
func TestRulesThatAreNone(t *testing.T) {
	// An IPv4 address with a dot on either side is no name: as one it would not stand for the names that resolve to it, and no name
	// is below it.
	for _, item := range []string{"8.8.8.8.", "8.8.8.8.:80", ".8.8.8.8", "*.8.8.8.8", "*.8.8.8.8:80"} {
		var rules hostRules
		if rules.UnmarshalText([]byte(item)) == nil && rules.match(nil, netip.MustParseAddr("8.8.8.8"), 80) == "" {
			t.Errorf("the rule %q is taken, but does not cover the names that resolve to 8.8.8.8", item)
		}
	}
	// No host has two dots at its end, nor any spelling of one; "\u212a" is the Kelvin sign, whose lower case is "k".
	for _, item := range []string{"evil.test..", "*.evil.test..", ".evil.test..:80", "\u212aelvin.example"} {
		var rules hostRules
		if rules.UnmarshalText([]byte(item)) == nil {
			t.Errorf("the rule %+q is taken", item)
		}
	}
}

// Ten thousand rules are as quick as ten: what a decision costs depends on the labels of the name and the lengths of the prefixes in use.
func TestManyHostRules(t *testing.T) {
	build := func(n int) *hostRules {
		var list bytes.Buffer
		for i := range n {
			fmt.Fprintf(&list, "%sname-%d.example%d.test\n", []string{"", "*.", "."}[i%3], i, i%100)
			if i%2 == 0 {
				fmt.Fprintf(&list, "10.%d.%d.0/24\n", i>>8, i&255)
			} else {
				fmt.Fprintf(&list, "2001:db8:%x:%x::/64:443\n", i>>8, i&255)
			}
		}
		text := strings.NewReplacer("2001:", "[2001:", "/64:443", "/64]:443").Replace(list.String())
		rules := new(hostRules)
		if err := rules.UnmarshalText([]byte(text)); err != nil {
			t.Fatal(err)
		}
		return rules
	}
	few, many := build(10), build(10_000)
	type query struct {
		host string
		ip   netip.Addr
		port uint16
		want bool
	}
	queries := []query{
		{"name-0.example0.test", netip.Addr{}, 80, true},
		{"x.name-1.example1.test", netip.Addr{}, 80, true},
		{"a.b.name-2.example2.test", netip.Addr{}, 80, true},
		{"x.name-0.example0.test", netip.Addr{}, 80, false},
		{"a.name-of.many.labels.that.is.not.among.them.test", netip.Addr{}, 80, false},
		{"10.0.2.7", netip.MustParseAddr("10.0.2.7"), 80, true},
		{"10.0.1.7", netip.MustParseAddr("10.0.1.7"), 80, false},
		{"2001:db8:0:1::7", netip.MustParseAddr("2001:db8:0:1::7"), 443, true},
		{"2001:db8:0:1::7", netip.MustParseAddr("2001:db8:0:1::7"), 80, false},
		{"", netip.MustParseAddr("192.0.2.1"), 80, false},
	}
	if len(many.names) < 10_000 || many.nets.Size() != 10_000 {
		t.Fatalf("%d names, %d blocks", len(many.names), many.nets.Size())
	}
	for _, q := range queries {
		host := []byte(q.host)
		for _, rules := range []*hostRules{few, many} {
			if got := rules.match(host, q.ip, q.port); (got != "") != q.want {
				t.Errorf("%q %v %d: rule %q, want any %v", q.host, q.ip, q.port, got, q.want)
			}
			if n := testing.AllocsPerRun(100, func() { rules.match(host, q.ip, q.port) }); n != 0 {
				t.Errorf("%q %v: %v allocations", q.host, q.ip, n)
			}
		}
	}
	best := func(rules *hostRules) time.Duration {
		least := time.Duration(math.MaxInt64)
		for range 20 { // whatever else the machine does, it leaves one of them alone
			begun := time.Now()
			for range 200 {
				for _, q := range queries {
					rules.match([]byte(q.host), q.ip, q.port)
				}
			}
			least = min(least, time.Since(begun))
		}
		return least
	}
	if quick, slow := best(few), best(many); slow > 5*quick {
		t.Errorf("ten thousand rules take %v, ten %v", slow, quick)
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// A hostile resolver

// hostileDNS is a resolver that does to each name what that name's script says, over UDP and TCP.
type hostileDNS struct {
	addr    string
	mu      sync.Mutex
	scripts map[string]func(*dnsQuery) // guarded by mu; by name; the names below have the same
	asked   map[string]int             // UDP queries, as in "a.test. A"; guarded by mu
}

// dnsQuery is a query, and what shall become of it: answer is sent, or if raw is not nil each packet of that.
type dnsQuery struct {
	kind   dnsmessage.Type
	nth    int  // from 1, of this name and type
	tcp    bool // over TCP, since the answer over UDP said so
	answer dnsmessage.Message
	raw    [][]byte
}

var silence = [][]byte{}

// owned adds the addresses of the type that was asked for, as those of owner.
func (q *dnsQuery) owned(owner string, addrs ...string) {
	for _, text := range addrs {
		a := netip.MustParseAddr(text)
		head := dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(owner), Class: dnsmessage.ClassINET, TTL: 60}
		if a.Is4() && q.kind == dnsmessage.TypeA {
			q.answer.Answers = append(q.answer.Answers, dnsmessage.Resource{Header: head, Body: &dnsmessage.AResource{A: a.As4()}})
		} else if a.Is6() && q.kind == dnsmessage.TypeAAAA { // ::ffff:1.2.3.4 too
			q.answer.Answers = append(q.answer.Answers, dnsmessage.Resource{Header: head, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}})
		}
	}
}

func (q *dnsQuery) name() string         { return q.answer.Questions[0].Name.String() }
func (q *dnsQuery) give(addrs ...string) { q.owned(q.name(), addrs...) }
func (q *dnsQuery) alias(from, to string) { // a CNAME record
	head := dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(from), Class: dnsmessage.ClassINET, TTL: 60}
	q.answer.Answers = append(q.answer.Answers, dnsmessage.Resource{Header: head, Body: &dnsmessage.CNAMEResource{CNAME: dnsmessage.MustNewName(to)}})
}

// chain adds n CNAMEs, from the name that was asked for to "cN.test.", whose name it gives back.
func (q *dnsQuery) chain(n int) (last string) {
	last = q.name()
	for i := range n {
		next := fmt.Sprintf("c%d.test.", i+1)
		q.alias(last, next)
		last = next
	}
	return last
}

// packed is the answer as it stands, for raw.
func (q *dnsQuery) packed() []byte {
	b, err := q.answer.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

func startHostileDNS(t *testing.T) *hostileDNS {
	t.Helper()
	addr := freeAddr(t) // for TCP; nobody has a reason to use the same port for UDP
	udp, err := net.ListenPacket("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	d := &hostileDNS{addr: addr, scripts: map[string]func(*dnsQuery){}, asked: map[string]int{}}
	var serving sync.WaitGroup
	t.Cleanup(func() { udp.Close(); tcp.Close(); serving.Wait() })
	serving.Go(func() {
		query := make([]byte, 1500)
		for {
			n, from, err := udp.ReadFrom(query)
			if err != nil {
				return
			}
			for _, packet := range d.replies(query[:n], false) {
				udp.WriteTo(packet, from)
			}
		}
	})
	serving.Go(func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(patience))
				var size [2]byte
				for {
					if _, err := io.ReadFull(c, size[:]); err != nil {
						return
					}
					query := make([]byte, int(size[0])<<8|int(size[1]))
					if _, err := io.ReadFull(c, query); err != nil {
						return
					}
					for _, packet := range d.replies(query, true) {
						c.Write(append([]byte{byte(len(packet) >> 8), byte(len(packet))}, packet...))
					}
				}
			})
		}
	})
	return d
}

func (d *hostileDNS) replies(query []byte, tcp bool) [][]byte {
	q := &dnsQuery{tcp: tcp}
	if err := q.answer.Unpack(query); err != nil || len(q.answer.Questions) != 1 {
		return nil
	}
	q.kind = q.answer.Questions[0].Type
	q.answer.Response, q.answer.RecursionAvailable, q.answer.Additionals = true, true, nil
	name := strings.TrimSuffix(q.name(), ".")
	key := q.name() + " " + strings.TrimPrefix(q.kind.String(), "Type")
	d.mu.Lock()
	if !tcp {
		d.asked[key]++
	}
	q.nth = d.asked[key]
	script := d.scripts[name]
	for below := true; script == nil && below; script = d.scripts[name] {
		_, name, below = strings.Cut(name, ".")
	}
	d.mu.Unlock()
	if script == nil {
		q.answer.RCode = dnsmessage.RCodeNameError
	} else {
		script(q)
	}
	if q.raw == nil {
		q.raw = [][]byte{q.packed()}
	}
	return q.raw
}

func (d *hostileDNS) set(name string, script func(*dnsQuery)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.scripts[name] = script
}

// wantsAsked expects n lookups of a name so far: A and AAAA each, no more and no fewer.
func (d *hostileDNS) wantsAsked(t *testing.T, name string, n int) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	if a, aaaa := d.asked[name+". A"], d.asked[name+". AAAA"]; a != n || aaaa != n {
		t.Errorf("%s was asked for %d times (A) and %d times (AAAA), want %d", name, a, aaaa, n)
	}
}

// trap listens where the proxy may not connect to.
type trap struct{ net.Listener }

func setTrap(t *testing.T, addr string) *trap {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return &trap{l}
}

// wantsUntouched expects that nobody has connected so far: connections queue in their order, so the test's own comes first.
func (l *trap) wantsUntouched(t *testing.T) {
	t.Helper()
	mine, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Close()
	for {
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		if c.RemoteAddr().String() == mine.LocalAddr().String() {
			return
		}
		t.Errorf("%s was connected to by %s", l.Addr(), c.RemoteAddr())
	}
}

// reach asks for an authority by GET or CONNECT, in the latter case for what is behind the tunnel. It gives the status and token of the
// proxy's answer, and its text or that of the origin.
func reach(t *testing.T, p *testProxy, method, authority string) (status int, token, text string) {
	t.Helper()
	c := p.dial(t)
	defer c.Close()
	c.send("%s", targeted(method, authority))
	return c.reached(method)
}

func targeted(method, authority string) string {
	if method == "CONNECT" {
		return "CONNECT " + authority + " HTTP/1.1\r\nHost: x\r\n\r\n"
	}
	return method + " http://" + authority + "/ HTTP/1.1\r\nHost: x\r\n\r\n"
}

func (p *peer) reached(method string) (status int, token, text string) {
	p.t.Helper()
	if line, _ := p.br.Peek(13); method == "CONNECT" && string(line) == "HTTP/1.1 200 " {
		p.head()
		p.send("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		_, text = p.response("GET")
		return 200, "", text
	}
	resp, text := p.response(method)
	_, token, _ = strings.Cut(resp.Header.Get("Proxy-Status"), "error=")
	token, _, _ = strings.Cut(token, ";")
	return resp.StatusCode, token, text + resp.Header.Get("Proxy-Status")
}

// nthRecord waits for the nth record (from 1) of a request or tunnel to a name.
func (p *testProxy) nthRecord(t *testing.T, name string, nth int) (found map[string]any) {
	t.Helper()
	eventually(t, fmt.Sprintf("record %d for %s", nth, name), func() bool {
		n := 0
		for _, r := range p.log.records(t) {
			if r["server.address"] == name && (r["msg"] == "request" || r["msg"] == "tunnel") {
				if n++; n == nth {
					found = r
					return true
				}
			}
		}
		return false
	})
	return found
}

// 127.0.0.1 plays a public address, 127.0.0.66 one of the inner network: whatever a resolver says, nothing connects there.
func TestHostileNames(t *testing.T) {
	const public, private = "127.0.0.1", "127.0.0.66"
	dns := startHostileDNS(t)
	_, port, _ := net.SplitHostPort(freeAddr(t))
	good := serveAt(t, net.JoinHostPort(public, port), nil)
	inner := setTrap(t, net.JoinHostPort(private, port))
	vars := []string{"DNS_SERVERS=" + dns.addr, "ALLOW_CIDRS=" + public, "DNS_CACHE_TTL=0"}
	methods := []string{"GET", "CONNECT"}

	// refused checks a 403 that follows from an address: the client is not told which, the log is.
	refused := func(t *testing.T, p *testProxy, method, name string, nth, status int, token, text, addr string) {
		t.Helper()
		if status != 403 || token != tokenProhibited {
			t.Errorf("%s %s: %d %s, want 403; %s", method, name, status, token, text)
		}
		if strings.Contains(text, private) || strings.Contains(text, addr) {
			t.Errorf("%s %s: the client is told the address: %s", method, name, text)
		}
		r := p.nthRecord(t, name, nth)
		wantsLogged(t, r, 403, tokenProhibited)
		if message, _ := r["error.message"].(string); !strings.HasSuffix(message, ": "+addr) {
			t.Errorf("%s %s: the log says %q, want the address %s", method, name, message, addr)
		}
	}

	rebinds := func(q *dnsQuery) {
		if q.nth == 1 {
			q.give(public)
		} else {
			q.give(private)
		}
	}
	t.Run("rebinding", func(t *testing.T) {
		dns.set("rebinding.test", rebinds)
		p := startProxy(t, append(vars, "POOL_IDLE=0")...)
		for _, method := range methods {
			name := strings.ToLower(method) + ".rebinding.test"
			if status, token, text := reach(t, p, method, name+":"+port); status != 200 || text != good {
				t.Errorf("%s: %d %s %s, want 200 from %s", method, status, token, text, good)
			}
			dns.wantsAsked(t, name, 1) // the address that was judged is the one that was dialled
			p.nthRecord(t, name, 1)    // a tunnel's record comes at its end
			status, token, text := reach(t, p, method, name+":"+port)
			refused(t, p, method, name, 2, status, token, text, private)
			dns.wantsAsked(t, name, 2)
		}
		inner.wantsUntouched(t)
	})

	t.Run("rebinding while a connection is pooled", func(t *testing.T) {
		dns.set("pooled.test", rebinds)
		_, port, _ := net.SplitHostPort(freeAddr(t))
		l := setTrap(t, net.JoinHostPort(public, port))
		origin := &testOrigin{l.Listener, t, l.Addr().String()}
		inner := setTrap(t, net.JoinHostPort(private, port))
		p := startProxy(t, vars...)
		for i, end := range []string{"between requests", "during a request", "during a tunnel's dial"} {
			name := fmt.Sprintf("n%d.pooled.test", i)
			target := targeted("GET", name+":"+port)
			c := p.dial(t)
			c.send("%s", target)
			up := origin.accept()
			up.head()
			up.send("%s", plainAnswer)
			c.wants(plainGets)
			c.send("%s", target) // over the connection of the pool, and so to the address that was judged
			up.head()
			up.send("%s", plainAnswer)
			c.wants(plainGets)
			dns.wantsAsked(t, name, 1)
			method := "GET"
			switch end {
			case "between requests": // whether the proxy has seen the end when the next request comes or not
				up.Close()
				c.send("%s", target)
			case "during a request": // so that the request is repeated
				c.send("%s", target)
				up.head()
				up.Close()
			default: // a tunnel has no use for the connection of the pool
				method = "CONNECT"
				c.send("%s", targeted("CONNECT", name+":"+port))
			}
			status, token, text := c.reached(method)
			refused(t, p, method, name, 3, status, token, text, private)
			dns.wantsAsked(t, name, 2)
			inner.wantsUntouched(t)
			up.Close()
		}
		origin.wantsNone()
	})

	t.Run("one answer", func(t *testing.T) {
		_, closed, _ := net.SplitHostPort(freeAddr(t)) // at which only the forbidden address listens
		innerClosed := setTrap(t, net.JoinHostPort(private, closed))
		p := startProxy(t, append(vars, "POOL_IDLE=0")...)
		many := make([]string, 400)
		for i := range many {
			many[i] = private
		}
		tcpOnly := func(full func(*dnsQuery)) func(*dnsQuery) {
			return func(q *dnsQuery) {
				if q.answer.Truncated = !q.tcp; q.tcp {
					full(q)
				}
			}
		}
		for name, e := range map[string]struct {
			script func(*dnsQuery)
			port   string
			addr   string // the one that the log tells of; "" if it is reached, "-" if the connection is refused
		}{
			"public-private":   {func(q *dnsQuery) { q.give(public, private) }, port, ""},
			"private-public":   {func(q *dnsQuery) { q.give(private, public) }, port, ""},
			"refusing-private": {func(q *dnsQuery) { q.give(public, private) }, closed, "-"},
			"private-refusing": {func(q *dnsQuery) { q.give(private, public) }, closed, "-"},
			"two-families":     {func(q *dnsQuery) { q.give(public, "::ffff:"+private, "64:ff9b::7f00:42", "::1") }, port, ""},
			"refusing-mapped":  {func(q *dnsQuery) { q.give(public, "::ffff:"+private, "::1") }, closed, "-"},
			"twice":            {func(q *dnsQuery) { q.give(private, private) }, port, private},
			"mapped":           {func(q *dnsQuery) { q.give("::ffff:" + private) }, port, private},
			"nat64":            {func(q *dnsQuery) { q.give("64:ff9b::7f00:42") }, port, "64:ff9b::7f00:42"},
			"6to4":             {func(q *dnsQuery) { q.give("2002:7f00:42::") }, port, "2002:7f00:42::"},
			"compatible":       {func(q *dnsQuery) { q.give("::" + private) }, port, "::7f00:42"},
			"alias":            {func(q *dnsQuery) { q.owned(q.chain(1), private) }, port, private},
			"long-chain":       {func(q *dnsQuery) { q.owned(q.chain(50), private) }, port, private},
			"long-chain-good":  {func(q *dnsQuery) { q.owned(q.chain(50), public) }, port, ""},
			"looping-chain":    {func(q *dnsQuery) { q.alias(q.chain(3), q.name()); q.owned("c2.test.", private) }, port, private},
			"other-owner":      {func(q *dnsQuery) { q.owned("elsewhere.test.", private) }, port, private},
			"truncated":        {tcpOnly(func(q *dnsQuery) { q.give(private) }), port, private},
			"truncated-good":   {tcpOnly(func(q *dnsQuery) { q.give(public) }), port, ""},
			"many-in-one":      {func(q *dnsQuery) { q.give(many...) }, port, private}, // more than the size that the query allows: Go takes what it has read
			"many":             {tcpOnly(func(q *dnsQuery) { q.give(many...) }), port, private},
			"many-and-good":    {tcpOnly(func(q *dnsQuery) { q.give(public); q.give(many...) }), port, ""},
			"half-public": {func(q *dnsQuery) { // what is cut off counts, not what came before
				q.give(public)
				if q.answer.Truncated = !q.tcp; q.tcp {
					q.answer.Answers = nil
					q.give(private)
				}
			}, port, private},
			"forged": {func(q *dnsQuery) { // one who guesses is quicker than the resolver
				q.give(private)
				q.answer.ID++
				forged := q.packed()
				q.answer.ID--
				q.answer.Answers = nil
				q.give(public)
				q.raw = [][]byte{forged, forged, q.packed()}
			}, port, ""},
			"long-record": {func(q *dnsQuery) { // an A record of 16 bytes
				q.give(private)
				if b := q.packed(); q.kind == dnsmessage.TypeA {
					b[len(b)-5] = 16
					q.raw = [][]byte{append(b, make([]byte, 12)...)}
				}
			}, port, private},
		} {
			dns.set(name+".test", e.script)
			for _, method := range methods {
				name := strings.ToLower(method) + "." + name + ".test"
				status, token, text := reach(t, p, method, name+":"+e.port)
				switch e.addr {
				case "":
					if status != 200 || text != good {
						t.Errorf("%s %s: %d %s %s, want 200 from %s", method, name, status, token, text, good)
					}
				case "-":
					if status != 502 || token != tokenRefused {
						t.Errorf("%s %s: %d %s %s, want 502 %s", method, name, status, token, text, tokenRefused)
					}
				default:
					refused(t, p, method, name, 1, status, token, text, e.addr)
				}
				dns.wantsAsked(t, name, 1)
				inner.wantsUntouched(t)
				innerClosed.wantsUntouched(t)
			}
		}
	})

	// What is no answer is none: the client gets an error in time, and the next name is served.
	t.Run("malformed", func(t *testing.T) {
		code := func(c dnsmessage.RCode) func(*dnsQuery) {
			return func(q *dnsQuery) { q.give(private); q.answer.RCode = c }
		}
		patched := func(edit func(b []byte) []byte) func(*dnsQuery) {
			return func(q *dnsQuery) {
				q.answer.Answers = nil
				q.owned(q.name(), private, "::ffff:"+private)
				q.raw = [][]byte{edit(q.packed())}
			}
		}
		scripts := map[string]func(*dnsQuery){
			"silent":    func(q *dnsQuery) { q.raw = silence },
			"noise":     func(q *dnsQuery) { q.raw = [][]byte{noise(64, 1), noise(512, 2), {}, noise(11, 3), noise(4000, 4)} },
			"refused":   code(dnsmessage.RCodeRefused),
			"failing":   code(dnsmessage.RCodeServerFailure),
			"gone":      code(dnsmessage.RCodeNameError),
			"unversed":  code(dnsmessage.RCodeNotImplemented),
			"formless":  code(dnsmessage.RCodeFormatError),
			"empty":     func(q *dnsQuery) {},
			"loop":      func(q *dnsQuery) { q.alias(q.chain(1), q.name()) },
			"own-alias": func(q *dnsQuery) { q.alias(q.name(), q.name()) },
			"chain":     func(q *dnsQuery) { q.chain(50) },
			"wrong-id":  patched(func(b []byte) []byte { b[0] ^= 1; return b }),
			"query":     patched(func(b []byte) []byte { b[2] &^= 0x80; return b }),
			"cut":       patched(func(b []byte) []byte { return b[:len(b)-2] }),
			"headless":  patched(func(b []byte) []byte { return b[:11] }),
			"counts":    patched(func(b []byte) []byte { b[6], b[7] = 0xff, 0xff; return b[:len(b)-1] }),
			"no-question": patched(func(b []byte) []byte {
				b[5] = 0
				return b
			}),
			"other-question": func(q *dnsQuery) {
				q.answer.Questions = slices.Clone(q.answer.Questions)
				q.answer.Questions[0].Name = dnsmessage.MustNewName("other.test.")
				q.owned("other.test.", private)
			},
			"pointer-loop": func(q *dnsQuery) { // the owner's name is a pointer to itself
				b := q.packed()
				at := len(b)
				b[7] = 1
				q.raw = [][]byte{append(b, 0xc0, byte(at), 0, byte(q.kind), 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 66)}
			},
			"pointers-in-a-ring": func(q *dnsQuery) {
				b := q.packed()
				at := len(b)
				b[7] = 1
				q.raw = [][]byte{append(b, 0xc0, byte(at+2), 0xc0, byte(at), 0, byte(q.kind), 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 66)}
			},
			"pointer-out": func(q *dnsQuery) {
				b := q.packed()
				b[7] = 1
				q.raw = [][]byte{append(b, 0xff, 0xff, 0, byte(q.kind), 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 66)}
			},
			"short-record": patched(func(b []byte) []byte { return append(b[:len(b)-5], 1, 127) }),
			"truncated":    func(q *dnsQuery) { q.answer.Truncated = true; q.answer.RCode = dnsmessage.RCodeRefused },
			"truncated-then-silent": func(q *dnsQuery) {
				q.give(private)
				if q.answer.Truncated = true; q.tcp {
					q.raw = silence
				}
			},
			"truncated-then-noise": func(q *dnsQuery) {
				if q.answer.Truncated = true; q.tcp {
					q.raw = [][]byte{noise(300, 5)}
				}
			},
		}
		const limit = 300 * time.Millisecond
		dns.set("fine.test", func(q *dnsQuery) { q.give(public) })
		p := startProxy(t, append(vars, "POOL_IDLE=0", "DNS_TIMEOUT="+limit.String())...)
		type waiting struct {
			*peer
			method, name string
		}
		var clients []waiting
		for name, script := range scripts {
			dns.set(name+".test", script)
			for _, method := range methods {
				clients = append(clients, waiting{p.dial(t), method, strings.ToLower(method) + "." + name + ".test"})
			}
		}
		begun := time.Now()
		for _, c := range clients {
			c.send("%s", targeted(c.method, c.name+":"+port))
		}
		for _, c := range clients {
			status, token, text := c.reached(c.method)
			if !(status == 502 && token == tokenDNS || status == 504 && token == tokenDNSTimeout) {
				t.Errorf("%s %s: %d %s %s, want a failure of DNS", c.method, c.name, status, token, text)
			}
			if strings.Contains(text, private) {
				t.Errorf("%s %s: the client is told the address: %s", c.method, c.name, text)
			}
			wantsLogged(t, p.nthRecord(t, c.name, 1), status, token)
		}
		if took := time.Since(begun); took > limit+time.Second { // for all of them, with what the machine needs
			t.Errorf("the last answer came after %v, although DNS_TIMEOUT=%v", took, limit)
		}
		inner.wantsUntouched(t)
		for _, method := range methods {
			if status, token, text := reach(t, p, method, "fine.test:"+port); status != 200 || text != good {
				t.Errorf("%s afterwards: %d %s %s", method, status, token, text)
			}
		}
	})
}

// However a host is written, it is judged as what it means, or not taken at all. 127.0.0.2 plays the public address, which every
// name has.
func TestHostSpellings(t *testing.T) {
	dns := startHostileDNS(t)
	dns.set("test", func(q *dnsQuery) { q.give("127.0.0.2") })
	_, port, _ := net.SplitHostPort(freeAddr(t))
	good := serveAt(t, "127.0.0.2:"+port, nil)
	traps := []*trap{setTrap(t, "127.0.0.1:"+port)}
	if l, err := net.Listen("tcp", "[::1]:"+port); err == nil { // not every machine has IPv6
		t.Cleanup(func() { l.Close() })
		traps = append(traps, &trap{l})
	}
	p := startProxy(t, "DNS_SERVERS="+dns.addr, "ALLOW_CIDRS=127.0.0.2", "DENY_HOSTS=evil.test", "POOL_IDLE=0", "DNS_CACHE_TTL=0")

	label := strings.Repeat("a", 63)
	longest := strings.Repeat(label+".", 3) + label[:56] + ".test" // 253 bytes

	// The verdict for GET and CONNECT; "" is what the other says. {p} is the port at which all listen.
	type spelling struct{ authority, get, connect string }
	table := []spelling{
		{"evil.test", "denied", "400"}, // CONNECT needs a port
		{"evil.test/x", "denied", "400"},
		{"evil.test?x", "denied", "400"},
		{"evil.test:{p}/x", "denied", "400"},
		{"127.0.0.1/x", "prohibited", "400"},
		{"good.test:{p}?@evil.test", "passes", "400"}, // a query
	}
	for verdict, list := range map[string][]string{
		"passes": {"good.test:{p}", "GOOD.Test:{p}", "good.test.:{p}", "Good.TEST.:{p}", "good.test:0{p}", "good.test:000{p}", "xn--bcher-kva.test:{p}",
			"XN--Bcher-KVA.test:{p}", "a_b.test:{p}", "127.0.0.2:{p}", "127.0.0.2.:{p}", "[::ffff:127.0.0.2]:{p}", "[::FFFF:7F00:0002]:{p}",
			"0x7f.0.0.test:{p}", "127.0.0.test:{p}", "1e0.test:{p}", label + ".test:{p}", longest + ":{p}", longest + ".:{p}",
			"evil.test.good.test:{p}", "x.evil.test:{p}"}, // the rule is for evil.test alone
		"denied": {"evil.test:{p}", "EVIL.TEST:{p}", "eViL.tEsT:{p}", "evil.test.:{p}", "Evil.Test.:{p}", "evil.test:080", "evil.test:00080", "evil.test:1",
			"evil.test:65535"},
		"prohibited": {"127.0.0.1:{p}", "127.0.0.1.:{p}", "[::1]:{p}", "[0:0:0:0:0:0:0:1]:{p}", "[0000::0001]:{p}", "[::0.0.0.1]:{p}", "[::ffff:127.0.0.1]:{p}",
			"[::ffff:7f00:1]:{p}", "[::FFFF:7F00:1]:{p}", "[0:0:0:0:0:FFFF:127.0.0.1]:{p}", "[::127.0.0.1]:{p}", "[64:ff9b::127.0.0.1]:{p}", "[64:ff9b::7f00:1]:{p}",
			"[2002:7f00:1::]:{p}", "[::]:{p}", "0.0.0.0:{p}", "[::ffff:0.0.0.0]:{p}", "[fe80::1]:{p}", "169.254.169.254:{p}", "255.255.255.255:{p}", "127.0.0.1:0{p}"},
		"400": {
			// of names
			"evil.test..:{p}", "[evil.test]:{p}", "[evil.test.]:{p}", ".evil.test:{p}", "evil..test:{p}", ".:{p}", "..:{p}", "", ":{p}", ":", "@:{p}", "@evil.test:{p}",
			"%65vil.test:{p}", "evil%2etest:{p}", "evil%2Etest:{p}", "evil.test%2e:{p}", "evil.test%00:{p}", "evil.test%00.good.test:{p}", "evil%252etest:{p}",
			"ｅｖｉｌ.test:{p}", "evil．test:{p}", "evil。test:{p}", "evil｡test:{p}", "еvil.test:{p}", "evil.tést:{p}", "ⓔvil.test:{p}", "evil.teﬆ:{p}", "ev\u0131l.test:{p}",
			"evil\u00ad.test:{p}", "evil\u200b.test:{p}", "\ufeffevil.test:{p}", "evil.te\u017ft:{p}", "bücher.test:{p}", "evil.test\xff:{p}",
			"evil.test\x00:{p}", "\x00evil.test:{p}", "evil.test\r:{p}", "evil\r.test:{p}", "evil.test\n:{p}", "evil.test\t:{p}", "\tevil.test:{p}", " evil.test:{p}",
			"evil.test :{p}", "evil .test:{p}", "evil.test\x0b:{p}", "evil.test\x7f:{p}", "evil.test\\:{p}", "evil\\.test:{p}", "\\evil.test:{p}", "evil.test\\@good.test:{p}",
			"user@evil.test:{p}", "user:pw@evil.test:{p}", "good.test@evil.test:{p}", "good.test:{p}@evil.test:{p}", "evil.test:{p}@good.test:{p}",
			"good.test#@evil.test:{p}", "evil.test#:{p}", "evil.test;:{p}", "evil.test,good.test:{p}", "*.test:{p}", "evil.test!:{p}", "(evil.test):{p}", "\"evil.test\":{p}",
			"'evil.test':{p}", "evil.test&x:{p}", "evil.test=x:{p}", "evil+.test:{p}", "~evil.test:{p}", "$evil.test:{p}", "evil|test:{p}", "{evil.test}:{p}", "<evil.test>:{p}",
			"http://evil.test:{p}", "evil.test:http:{p}", label + "a.test:{p}", "a." + longest[1:] + ":{p}", "a." + longest[1:] + ".:{p}",
			// of ports
			"evil.test:0", "evil.test:00", "evil.test:65536", "evil.test:99999999999999999999", "evil.test:+80", "evil.test:-80", "evil.test:", "evil.test: 80",
			"evil.test:80 ", "evil.test:8 0", "evil.test:8_0", "evil.test:0x50", "evil.test:80.0", "evil.test:８０", "evil.test:80:80", "evil.test::80", "evil.test:80:",
			"evil.test:%38%30", "[::1]:0", "[::1]:65536", "[::1]:", "[::1]:+80", "127.0.0.1:", "127.0.0.1:+80", "[::1]::80",
			// of IPv4 addresses
			"2130706433:{p}", "0x7f000001:{p}", "0X7F000001:{p}", "017700000001:{p}", "0177.0.0.1:{p}", "127.1:{p}", "127.0.1:{p}", "127.0.0.1..:{p}", "0x7f.1:{p}",
			"0x7f.0.0.1:{p}", "127.0.0.0x1:{p}", "0x7f.0x0.0x0.0x1:{p}", "00000127.0.0.1:{p}", "127.0.0.01:{p}", "127.0.0.001:{p}", "127.00.0.1:{p}", "127.0.0.1.0:{p}",
			"256.0.0.1:{p}", "127.0.0.256:{p}", "4294967296:{p}", "6425673729:{p}", "0:{p}", "1:{p}", "0x:{p}", "0x0:{p}", "127..0.1:{p}", ".127.0.0.1:{p}",
			"[127.0.0.1]:{p}", "[2130706433]:{p}", "%31%32%37.0.0.1:{p}", "127%2e0%2e0%2e1:{p}", "１２７.0.0.1:{p}", "①②⑦.0.0.1:{p}", "127。0。0。1:{p}", "127．0．0．1:{p}",
			"127.0.0.1\x00:{p}", "127.0.0.1 :{p}", "127.0.0.1\\:{p}", "user@127.0.0.1:{p}", "good.1:{p}", "good.0x7f:{p}", "good.127.0.0.1:{p}", "1.2.3.4.127.0.0.1:{p}",
			"127.0.0.1/8:{p}x",
			// of IPv6 addresses
			"[::1%25lo]:{p}", "[::1%lo]:{p}", "[::1%251]:{p}", "[fe80::1%25eth0]:{p}", "[::1%]:{p}", "::1", "::1:{p}", "[::1", "[::1:{p}", "::1]:{p}", "[[::1]]:{p}", "[::1].:{p}",
			"[::1.]:{p}", "[]:{p}", "[:]:{p}", "[:::1]:{p}", "[::1]x:{p}", "x[::1]:{p}", "[::1]{p}", "[ ::1]:{p}", "[::1 ]:{p}", "[::1/128]:{p}", "[0:0:0:0:0:0:1]:{p}",
			"[0:0:0:0:0:0:0:0:1]:{p}", "[00000::1]:{p}", "[::1::]:{p}", "[::ffff:127.1]:{p}", "[::ffff:0177.0.0.1]:{p}", "[::ffff:0x7f000001]:{p}", "[::ffff:127.0.0.1.]:{p}",
			"[v1.x]:{p}", "[v6.::1]:{p}", "%5b::1%5d:{p}", "[%3a%3a1]:{p}", "user@[::1]:{p}", "[::1]@good.test:{p}", "0:0:0:0:0:0:0:1:{p}", "[::１]:{p}",
		},
		"no name": {"127.0.0.-1:{p}", "-.-.-:{p}", "a-.-b.test:{p}"}, // to the resolver, which nobody but Sluice asks
	} {
		for _, authority := range list {
			table = append(table, spelling{authority, verdict, verdict})
		}
	}
	for i, s := range table {
		if s.authority == "127.0.0.1/8:{p}x" { // for GET the rest is a path
			table[i].get = "prohibited"
		}
		if s.authority == "http://evil.test:{p}" { // for GET "http://http://evil.test", with an empty port
			table[i].get = "400"
		}
	}

	wants := map[string]struct {
		status int
		token  string
	}{"passes": {200, ""}, "denied": {403, tokenDenied}, "prohibited": {403, tokenProhibited}, "400": {400, tokenRequest}, "no name": {502, tokenDNS}}
	for _, s := range table {
		authority := strings.ReplaceAll(s.authority, "{p}", port)
		for method, verdict := range map[string]string{"GET": s.get, "CONNECT": s.connect} {
			want := wants[verdict]
			status, token, text := reach(t, p, method, authority)
			if status != want.status || token != want.token || status == 200 && text != good {
				t.Errorf("%s %q: %d %s %q, want %d %s", method, authority, status, token, text, want.status, want.token)
			}
		}
	}
	for _, l := range traps {
		l.wantsUntouched(t)
	}
	dns.mu.Lock()
	defer dns.mu.Unlock()
	for key := range dns.asked { // what is not taken is not looked up either
		name, _, _ := strings.Cut(key, ". ")
		if !slices.ContainsFunc(table, func(s spelling) bool {
			host, _, _ := strings.Cut(strings.ToLower(s.authority), ":")
			return s.get == "passes" && strings.TrimSuffix(host, ".") == name
		}) {
			t.Errorf("%q was looked up", name)
		}
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Names

// dnsServer answers A queries over UDP; other types have no records.
type dnsServer struct {
	net.PacketConn
	addr    string
	replies sync.WaitGroup

	mu    sync.Mutex
	zone  map[string]dnsReply // guarded by mu; a name that is not there does not exist
	asked map[string]int      // A queries; guarded by mu
	gate  chan struct{}       // not nil: replies wait until it is closed; guarded by mu
	quiet chan struct{}       // closed when silent replies are sent after all
}

type dnsReply struct {
	addrs  string // separated by spaces
	fails  bool   // SERVFAIL
	silent bool
}

func startDNS(t *testing.T) *dnsServer {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d := &dnsServer{PacketConn: conn, addr: conn.LocalAddr().String(), zone: map[string]dnsReply{}, asked: map[string]int{}, quiet: make(chan struct{})}
	done := make(chan struct{})
	go func() { defer close(done); d.serve() }()
	t.Cleanup(func() { conn.Close(); <-done; d.replies.Wait() })
	return d
}

func (d *dnsServer) set(name string, r dnsReply) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.zone[name] = r
}

func (d *dnsServer) count(name string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.asked[name]
}

// hold keeps replies back until the function it returns is called.
func (d *dnsServer) hold() (release func()) {
	gate := make(chan struct{})
	d.mu.Lock()
	d.gate = gate
	d.mu.Unlock()
	return sync.OnceFunc(func() { close(gate) })
}

func (d *dnsServer) serve() {
	packet := make([]byte, 1500)
	for {
		n, from, err := d.ReadFrom(packet)
		if err != nil {
			return
		}
		query := slices.Clone(packet[:n])
		d.replies.Go(func() {
			d.WriteTo(d.answer(query), from)
		})
	}
}

// answer makes the response to a query (RFC 1035, 4.1): header, question, and the addresses by a pointer to its name.
func (d *dnsServer) answer(query []byte) []byte {
	var labels []string
	at := 12
	for query[at] != 0 {
		labels = append(labels, string(query[at+1:at+1+int(query[at])]))
		at += 1 + int(query[at])
	}
	name, isA := strings.Join(labels, "."), binary.BigEndian.Uint16(query[at+1:]) == 1
	d.mu.Lock()
	r, known := d.zone[name]
	if isA {
		d.asked[name]++
	}
	gate := d.gate
	d.mu.Unlock()
	if gate != nil {
		<-gate
	}
	if r.silent {
		<-d.quiet
		r.fails = true
	}
	m := append([]byte{query[0], query[1], 0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0}, query[12:at+5]...)
	switch {
	case r.fails:
		m[3] |= 2
	case !known:
		m[3] |= 3
	case isA:
		for _, a := range strings.Fields(r.addrs) {
			m = append(m, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4)
			m = append(m, netip.MustParseAddr(a).AsSlice()...)
			m[7]++
		}
	}
	return m
}

// shrinkBacklog calls listen(2), whose descriptor has another type on Windows.
func shrinkBacklog[H ~int | ~uintptr](listen func(H, int) error, fd uintptr) { listen(H(fd), 0) }

// blackHole makes addr one at which connections are neither accepted nor refused: its queue is full.
func blackHole(t *testing.T, addr string) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { l.Close() })
	raw, _ := l.(*net.TCPListener).SyscallConn()
	raw.Control(func(fd uintptr) { shrinkBacklog(syscall.Listen, fd) })
	for range 5 {
		c, err := net.DialTimeout("tcp", addr, 100*time.Millisecond)
		if err != nil {
			return
		}
		t.Cleanup(func() { c.Close() })
	}
	t.Skip("this kernel accepts more connections than the backlog")
}

func TestNames(t *testing.T) {
	d := startDNS(t)
	first := serveAt(t, "127.0.0.1:0", nil)
	_, port, _ := net.SplitHostPort(first)
	second := serveAt(t, "127.0.0.2:"+port, nil) // not allowed but by ALLOW_PRIVATE_HOSTS
	p := startProxy(t, "DNS_SERVERS="+d.addr, "ALLOW_CIDRS=127.0.0.1,127.0.0.3,127.0.0.4,127.0.0.5,127.0.0.6",
		"ALLOW_PRIVATE_HOSTS=exact.test,*.below.test,.both.test,ported.test:"+port+",other.test:1,UPPER.test")
	for _, c := range []struct {
		name   string
		addrs  string // "-" for no such name, "!" for a failure
		status int
		want   string // the origin that answers, or the token
	}{
		{"plain.test", "127.0.0.1", 200, first},
		{"mixed-a.test", "127.0.0.2 127.0.0.1", 200, first},
		{"mixed-b.test", "127.0.0.1 127.0.0.2", 200, first},
		{"mixed-c.test", "10.0.0.1 169.254.169.254 127.0.0.1", 200, first},
		{"forbidden.test", "127.0.0.2 10.0.0.1 169.254.169.254", 403, "destination_ip_prohibited"},
		{"metadata.test", "169.254.169.254", 403, "destination_ip_prohibited"},
		{"zero.test", "0.0.0.0", 403, "destination_ip_prohibited"},
		{"missing.test", "-", 502, "dns_error"},
		{"empty.test", "", 502, "dns_error"},
		{"broken.test", "!", 502, "dns_error"},
		{"exact.test", "127.0.0.2", 200, second},
		{"EXACT.test.", "127.0.0.2", 200, second},
		{"upper.test", "127.0.0.2", 200, second},
		{"sub.exact.test", "127.0.0.2", 403, "destination_ip_prohibited"},
		{"notexact.test", "127.0.0.2", 403, "destination_ip_prohibited"},
		{"below.test", "127.0.0.2", 403, "destination_ip_prohibited"},
		{"x.below.test", "127.0.0.2", 200, second},
		{"x.y.below.test", "127.0.0.2", 200, second},
		{"both.test", "127.0.0.2", 200, second},
		{"x.both.test", "127.0.0.2", 200, second},
		{"xboth.test", "127.0.0.2", 403, "destination_ip_prohibited"},
		{"ported.test", "127.0.0.2", 200, second},
		{"other.test", "127.0.0.2", 403, "destination_ip_prohibited"},
		{"refusing.test", "127.0.0.3 127.0.0.4 127.0.0.5 127.0.0.1", 200, first},
		{"refused.test", "127.0.0.3 127.0.0.4", 502, "connection_refused"},
	} {
		t.Run(c.name, func(t *testing.T) {
			zone := strings.ToLower(strings.TrimSuffix(c.name, "."))
			if c.addrs != "-" {
				d.set(zone, dnsReply{addrs: strings.Trim(c.addrs, "!"), fails: c.addrs == "!"})
			}
			resp, body := p.dial(t).ask("GET", "http://"+c.name+":"+port+"/")
			if c.status != 200 {
				wantsRefusal(t, resp, body, c.status, c.want)
			} else if resp.StatusCode != 200 || body != c.want {
				t.Errorf("got %d %q, want an answer from %s", resp.StatusCode, body, c.want)
			}
		})
	}
	t.Run("itself", func(t *testing.T) {
		d.set("self.test", dnsReply{addrs: "127.0.0.1"})
		_, own, _ := net.SplitHostPort(p.addr)
		resp, body := p.dial(t).ask("GET", "http://self.test:"+own+"/")
		wantsRefusal(t, resp, body, 502, "proxy_loop_detected")
	})
	t.Run("one lookup for many", func(t *testing.T) {
		d.set("busy.test", dnsReply{addrs: "127.0.0.1"})
		release := d.hold()
		defer release()
		var clients []*peer
		for range 20 {
			c := p.dial(t)
			c.send("%s", request("GET", "http://busy.test:"+port+"/"))
			clients = append(clients, c)
		}
		eventually(t, "the lookup", func() bool { return d.count("busy.test") > 0 })
		release()
		for _, c := range clients {
			if resp, _ := c.response("GET"); resp.StatusCode != 200 {
				t.Errorf("status %d", resp.StatusCode)
			}
		}
		if n := d.count("busy.test"); n != 1 {
			t.Errorf("%d lookups", n)
		}
	})
	t.Run("one pool for all spellings", func(t *testing.T) {
		d.set("spelt.test", dnsReply{addrs: "127.0.0.1"})
		o := startOrigin(t)
		_, port, _ := net.SplitHostPort(o.addr)
		c := p.dial(t)
		var up *peer
		for _, name := range []string{"spelt.test", "SPELT.Test", "spelt.test.", "Spelt.TEST."} {
			c.send("%s", request("GET", "http://"+name+":"+port+"/"))
			if up == nil {
				up = o.accept()
			}
			up.head()
			up.send("HTTP/1.1 204 No Content\r\n\r\n")
			if resp, _ := c.response("GET"); resp.StatusCode != 204 {
				t.Errorf("status %d", resp.StatusCode)
			}
		}
		if n := d.count("spelt.test"); n != 1 {
			t.Errorf("%d lookups", n)
		}
	})
	t.Run("black hole", func(t *testing.T) {
		blackHole(t, "127.0.0.6:"+port)
		for i, addrs := range []string{"127.0.0.6 127.0.0.1", "127.0.0.1 127.0.0.6", "127.0.0.6 127.0.0.3 127.0.0.1"} {
			name := fmt.Sprintf("hole%d.test", i)
			d.set(name, dnsReply{addrs: addrs})
			begun := time.Now()
			resp, body := p.dial(t).ask("GET", "http://"+name+":"+port+"/")
			if took := time.Since(begun); resp.StatusCode != 200 || body != first || took > 900*time.Millisecond {
				t.Errorf("%s: %d %q after %v", addrs, resp.StatusCode, body, took)
			}
		}
	})
}

func TestNamesAgeing(t *testing.T) {
	if !apart(t) {
		return
	}
	const ttl, stale = 300 * time.Millisecond, 1500 * time.Millisecond
	d := startDNS(t)
	_, port, _ := net.SplitHostPort(serveAt(t, "127.0.0.1:0", nil))
	d.set("app.test", dnsReply{addrs: "127.0.0.1"})
	d.set("silent.test", dnsReply{silent: true})
	// POOL_IDLE=0, or the pool would make lookups unnecessary.
	p := startProxy(t, "DNS_SERVERS="+d.addr, "DNS_TIMEOUT=200ms", "DNS_CACHE_TTL="+ttl.String(), "DNS_STALE="+stale.String(), "POOL_IDLE=0")
	t.Cleanup(func() { close(d.quiet) }) // Go's resolver keeps a query's socket for 5 s, whatever its context says
	c := p.dial(t)
	get := func() (*http.Response, string) { return c.ask("GET", "http://app.test:"+port+"/") }
	wants200 := func() {
		t.Helper()
		if resp, body := get(); resp.StatusCode != 200 {
			t.Fatalf("got %d %q", resp.StatusCode, body)
		}
	}

	begun := time.Now()
	wants200()
	wants200()
	if n := d.count("app.test"); n != 1 && time.Since(begun) < ttl {
		t.Errorf("%d lookups within the TTL", n)
	}
	eventually(t, "a second lookup", func() bool { wants200(); return d.count("app.test") == 2 })
	learned := time.Now()

	for _, failure := range []dnsReply{{fails: true}, {silent: true}} {
		d.set("app.test", failure)
		asked := d.count("app.test")
		eventually(t, "a lookup that fails", func() bool {
			if resp, body := get(); resp.StatusCode != 200 && time.Since(learned) < stale {
				t.Fatalf("got %d %q %v after the last good answer", resp.StatusCode, body, time.Since(learned))
			}
			return d.count("app.test") > asked
		})
	}
	d.set("app.test", dnsReply{fails: true})
	var resp *http.Response
	var body string
	eventually(t, "the answer to be too old", func() bool { resp, body = get(); return resp.StatusCode != 200 })
	wantsRefusal(t, resp, body, 502, "dns_error")
	if age := time.Since(learned); age < stale-ttl {
		t.Errorf("the answer served for %v only", age)
	}
	d.set("app.test", dnsReply{addrs: "127.0.0.1"})
	eventually(t, "the name to be back", func() bool { resp, _ = get(); return resp.StatusCode == 200 })

	begun = time.Now()
	resp, body = c.ask("GET", "http://silent.test:"+port+"/")
	wantsRefusal(t, resp, body, 504, "dns_timeout")
	if took := time.Since(begun); took < 150*time.Millisecond || took > 2*time.Second {
		t.Errorf("DNS_TIMEOUT=200ms took %v", took)
	}
}

// A resolver that refuses or is silent costs time, not the answer, when the next one knows it.
func TestResolversFail(t *testing.T) {
	if !apart(t) {
		return
	}
	d := startDNS(t)
	silent, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	gone, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone.Close()
	_, port, _ := net.SplitHostPort(serveAt(t, "127.0.0.1:0", nil))
	for what, first := range map[string]net.Addr{"silent": silent.LocalAddr(), "gone": gone.LocalAddr()} {
		t.Run(what, func(t *testing.T) {
			p := startProxy(t, "DNS_SERVERS="+first.String()+","+d.addr, "DNS_TIMEOUT=1s")
			for i := range 5 {
				name := fmt.Sprintf("%s%d.test", what, i)
				d.set(name, dnsReply{addrs: "127.0.0.1"})
				if resp, body := p.dial(t).ask("GET", "http://"+name+":"+port+"/"); resp.StatusCode != 200 {
					t.Errorf("%s: %d %q", name, resp.StatusCode, body)
				}
			}
		})
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Dialling

func TestDialTimeout(t *testing.T) {
	if !apart(t) {
		return
	}
	addr := freeAddr(t)
	blackHole(t, addr)
	p := startProxy(t, "DIAL_TIMEOUT=200ms")
	begun := time.Now()
	resp, body := p.dial(t).ask("GET", "http://"+addr+"/")
	wantsRefusal(t, resp, body, 504, "connection_timeout")
	if took := time.Since(begun); took > 2*time.Second {
		t.Errorf("it took %v", took)
	}
	resp, body = p.dial(t).ask("CONNECT", addr)
	wantsRefusal(t, resp, body, 504, "connection_timeout")
}

// TestNameOfBlackHoles: when the dial's time runs out for all addresses of a name at once, every request that waits for it is
// answered; a client that leaves meanwhile ends its dial and is recorded.
func TestNameOfBlackHoles(t *testing.T) {
	if !apart(t) {
		return
	}
	_, port, _ := net.SplitHostPort(freeAddr(t))
	blackHole(t, "127.0.0.2:"+port)
	blackHole(t, "127.0.0.3:"+port)
	d := startDNS(t)
	d.set("hole.test", dnsReply{addrs: "127.0.0.2 127.0.0.3"})
	const clients = 16
	send := func(t *testing.T, p *testProxy) (all []*peer) {
		for i := range clients {
			c := p.dial(t)
			if all = append(all, c); i%2 == 0 {
				c.send("%s", request("GET", "http://hole.test:"+port+"/"))
			} else {
				c.send("%s", request("CONNECT", "hole.test:"+port))
			}
		}
		return all
	}
	t.Run("clients that wait", func(t *testing.T) {
		p := startProxy(t, "DNS_SERVERS="+d.addr, "DIAL_TIMEOUT=300ms")
		for _, c := range send(t, p) {
			c.SetReadDeadline(time.Now().Add(patience))
			c.wantsRefusal("GET", 504, "connection_timeout", "hole.test:"+port)
		}
		for i := range clients {
			wantsLogged(t, p.awaitServed(t, i), 504, "connection_timeout")
		}
	})
	t.Run("clients that leave", func(t *testing.T) {
		p := startProxy(t, "DNS_SERVERS="+d.addr, "DIAL_TIMEOUT=1m")
		files := countFiles()
		all := send(t, p)
		eventually(t, "all dials to be under way", func() bool { return countFiles() >= files+4*clients }) // both ends of a client, and two dials
		for i, c := range all {
			c.SetLinger(i/2%2 - 1) // of both methods, some close and some reset
			c.Close()
		}
		for i := range clients {
			wantsLogged(t, p.awaitServed(t, i), 0, "client_disconnected")
		}
	})
}

// TestMeetingItself: a connection to a closed port of this host may be given that very port as its own, and is then connected to
// itself: what it says would be its answer. It runs in a network namespace in which there are few ports to choose from.
func TestMeetingItself(t *testing.T) {
	if !inNamespace(t, "--net", "ip link set lo up && echo 40000 40007 > /proc/sys/net/ipv4/ip_local_port_range") {
		return
	}
	p := startProxy(t, "ADMIN=off")
	c := p.dial(t)
	for range 200 {
		for port := 40000; port < 40008; port++ {
			target := fmt.Sprintf("127.0.0.1:%d", port)
			if target == p.addr || target == c.LocalAddr().String() {
				continue
			}
			c.send("%s", request("GET", "http://"+target+"/"))
			c.wantsRefusal("GET", 502, "connection_refused", target)
		}
	}
}

// TestNoPortIsLeft: with as many connections to an origin as there are ports the answer says so, and what bounds it.
func TestNoPortIsLeft(t *testing.T) {
	if !inNamespace(t, "--net", "ip link set lo up && echo 40000 40003 > /proc/sys/net/ipv4/ip_local_port_range") {
		return
	}
	p, o := startProxy(t, "ADMIN=off"), startOrigin(t)
	for port := 50000; port < 50004; port++ { // the proxy listens at one of the four
		conn, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port}}).Dial("tcp", p.addr)
		if err != nil {
			t.Fatal(err)
		}
		c := newPeer(t, conn)
		c.send("%s", request("GET", "http://"+o.addr+"/"))
		if port < 50003 {
			defer c.Close()
			o.accept()
			continue
		}
		c.wantsRefusal("GET", 503, tokenLimit, "no local port is left", "ip_local_port_range")
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Pool

// exchange1 has the client make a request that the origin, accepted on first use, answers.
func exchange1(c *peer, o *testOrigin, up *peer) *peer {
	c.t.Helper()
	c.send("%s", request("GET", "http://"+o.addr+"/"))
	if up == nil {
		up = o.accept()
	}
	up.head()
	up.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
	if resp, body := c.response("GET"); resp.StatusCode != 200 || body != "ok" {
		c.t.Fatalf("got %d %q", resp.StatusCode, body)
	}
	return up
}

// ended reports that a peer has ended the connection, without waiting.
func (p *peer) ended() bool {
	p.SetReadDeadline(time.Now().Add(time.Millisecond))
	defer p.SetReadDeadline(time.Now().Add(2 * patience))
	_, err := p.br.Peek(1)
	return err != nil && !os.IsTimeout(err)
}

func TestPool(t *testing.T) {
	p := startProxy(t, "POOL_IDLE_PER_HOST=1")
	t.Run("one is kept per host", func(t *testing.T) {
		o := startOrigin(t)
		a, b := p.dial(t), p.dial(t)
		a.send("%s", request("GET", "http://"+o.addr+"/a"))
		upA := o.accept()
		b.send("%s", request("GET", "http://"+o.addr+"/b"))
		upB := o.accept()
		for _, pair := range [][2]*peer{{upA, a}, {upB, b}} {
			pair[0].head()
			pair[0].send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			pair[1].response("GET")
		}
		eventually(t, "one of two connections to be closed", func() bool { return upA.ended() != upB.ended() })
		kept := upA
		if upA.ended() {
			kept = upB
		}
		exchange1(a, o, kept)
		exchange1(a, o, kept) // the same client: another's request may come before the connection is back in the pool
		o.wantsNone()
	})
	t.Run("ports are not mixed", func(t *testing.T) {
		one, two := startOrigin(t), startOrigin(t)
		c := p.dial(t)
		up1 := exchange1(c, one, nil)
		up2 := exchange1(c, two, nil)
		exchange1(c, one, up1)
		exchange1(c, two, up2)
		one.wantsNone()
		two.wantsNone()
	})
	t.Run("a connection that the origin closes", func(t *testing.T) {
		o := startOrigin(t)
		c := p.dial(t)
		up := exchange1(c, o, nil)
		files := countFiles()
		up.Close()
		eventually(t, "both ends' descriptors to be gone", func() bool { return countFiles() <= files-2 })
		exchange1(c, o, nil)
	})
	t.Run("a connection on which the origin says something unasked", func(t *testing.T) {
		o := startOrigin(t)
		c := p.dial(t)
		up := exchange1(c, o, nil)
		files := countFiles()
		up.send("HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
		up.CloseWrite()
		eventually(t, "the proxy's descriptor to be gone", func() bool { return countFiles() < files })
		exchange1(c, o, nil) // its answer is not the 408
	})
}

func TestPoolLimits(t *testing.T) {
	t.Run("POOL_IDLE=0", func(t *testing.T) {
		p := startProxy(t, "POOL_IDLE=0")
		o := startOrigin(t)
		c := p.dial(t)
		for range 3 {
			exchange1(c, o, nil).wantsEnd()
		}
	})
	t.Run("POOL_IDLE_PER_HOST=0", func(t *testing.T) {
		p := startProxy(t, "POOL_IDLE_PER_HOST=0")
		exchange1(p.dial(t), startOrigin(t), nil).wantsEnd()
	})
	t.Run("POOL_IDLE=1", func(t *testing.T) {
		p := startProxy(t, "POOL_IDLE=1")
		one, two := startOrigin(t), startOrigin(t)
		c := p.dial(t)
		up1 := exchange1(c, one, nil)
		up2 := exchange1(c, two, nil)
		eventually(t, "one of two connections to be closed", func() bool { return up1.ended() != up2.ended() })
	})
	t.Run("POOL_IDLE_TIMEOUT", func(t *testing.T) {
		p := startProxy(t, "POOL_IDLE_TIMEOUT=200ms")
		o := startOrigin(t)
		c := p.dial(t)
		up := exchange1(c, o, nil)
		exchange1(c, o, up)
		begun := time.Now()
		up.wantsEnd()
		if took := time.Since(begun); took < 150*time.Millisecond || took > 1500*time.Millisecond {
			t.Errorf("it was kept for %v", took)
		}
		exchange1(c, o, nil)
	})
}

// TestLateBodies: an origin may send a body that must not be (to HEAD, with 204 or 304), and only when the connection is back in
// the pool. The next request is not answered with it, however soon it comes.
func TestLateBodies(t *testing.T) {
	p := startProxy(t)
	for name, e := range map[string][2]string{ // method and answer
		"HEAD":         {"HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 44\r\n\r\n"},
		"HEAD chunked": {"HEAD", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"},
		"204":          {"GET", "HTTP/1.1 204 No Content\r\n\r\n"},
		"304":          {"GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 44\r\n\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			o, n := startOrigin(t), len(p.served())
			c, other := p.dial(t), p.dial(t)
			c.send("%s", request(e[0], "http://"+o.addr+"/"))
			up := o.accept()
			up.head()
			up.send("%s", e[1])
			c.response(e[0])
			p.awaitServed(t, n) // it is in the pool
			time.Sleep(20 * time.Millisecond)
			up.send("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")
			time.Sleep(30 * time.Millisecond)
			other.send("%s", o.fill(plainRequest))
			other.SetReadDeadline(time.Now().Add(patience))
			answered := make(chan struct{})
			go func() { // the origin, as far as it is dialled
				defer close(answered)
				if conn, err := o.Accept(); err == nil {
					again := newPeer(t, conn)
					again.br.ReadString('\n')
					again.Write([]byte(plainAnswer))
				}
			}()
			if resp, body := other.response("GET"); resp.StatusCode != 200 || body != "hi" {
				t.Errorf("got %s %q", resp.Status, body)
			}
			o.Close()
			<-answered
		})
	}
}

// The kernel moves a large body up to its last byte; what an origin sends behind it is not the answer to a next request.
func TestSurplusBehindALargeBody(t *testing.T) {
	p, o := startProxy(t), startOrigin(t)
	c := p.dial(t)
	c.send("%s", request("GET", "http://"+o.addr+"/"))
	up := o.accept()
	up.head()
	body := strings.Repeat("x", 200_000)
	sent := make(chan error, 1)
	go func() {
		_, err := io.WriteString(up.TCPConn, "HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n"+body+"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")
		sent <- err
	}()
	c.response("GET")
	<-sent
	exchange1(p.dial(t), o, nil)
}

// ---------------------------------------------------------------------------------------------------------------------
// Connections that end

// TestStaleConnections has the origin close after each answer, at a moment that only chance chooses.
func TestStaleConnections(t *testing.T) {
	p, o := startProxy(t), startOrigin(t)
	c := p.dial(t)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := o.Accept()
			if err != nil {
				return
			}
			req, err := http.ReadRequest(bufio.NewReader(conn))
			if err == nil && req.Method == "GET" {
				io.WriteString(conn, plainAnswer)
			}
			conn.Close()
		}
	}()
	for i := range 200 {
		c.send("%s", o.fill(plainRequest))
		if resp, body := c.response("GET"); resp.StatusCode != 200 || body != "hi" {
			t.Fatalf("request %d: %s %q", i, resp.Status, body)
		}
	}
	o.Close()
	<-ended
}

// TestDeadConnections has the origin end a pooled connection at rest, and in answer to a request.
func TestDeadConnections(t *testing.T) {
	p := startProxy(t)
	const post = "POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nContent-Length: 5\r\n\r\nhello"
	// pooled has an exchange leave a connection in the pool.
	pooled := func(t *testing.T) (o *testOrigin, c, up *peer) {
		o, c = startOrigin(t), p.dial(t)
		n := len(p.served())
		c.send("%s", o.fill(plainRequest))
		up = o.accept()
		up.wants(o.fill(plainWants))
		up.send(plainAnswer)
		c.wants(plainGets)
		p.awaitServed(t, n)
		return o, c, up
	}
	for name, request := range map[string]string{"GET": plainRequest, "POST": post} {
		t.Run("at rest, then "+name, func(t *testing.T) {
			o, c, up := pooled(t)
			up.CloseWrite()
			up.wantsEnd() // it is out of the pool before anybody needs it
			c.send("%s", o.fill(request))
			up = o.accept()
			up.head()
			up.send(plainAnswer)
			c.wants(plainGets)
		})
	}
	for _, method := range []string{"GET", "HEAD", "OPTIONS", "DELETE", "PUT", "TRACE"} {
		for how, linger := range map[string]int{"closed": -1, "reset": 0} {
			t.Run(method+" upon "+how, func(t *testing.T) {
				o, c, up := pooled(t)
				n := len(p.served())
				c.send("%s", o.fill(strings.Replace(plainRequest, "GET", method, 1)))
				first := up.head()
				up.SetLinger(linger)
				up.Close()
				up = o.accept()
				up.wants(first)
				up.send("HTTP/1.1 200 OK\r\n" + date + "Content-Length: 0\r\n\r\n")
				if resp, _ := c.response(method); resp.StatusCode != 200 {
					t.Errorf("got %s", resp.Status)
				}
				if r := p.awaitServed(t, n); r["error.type"] != nil || r["upstream_reused"] != false {
					t.Errorf("logged %v", r)
				}
			})
		}
	}
	for name, request := range map[string]string{"POST": post, "POST without body": "POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\n\r\n", "PATCH": "PATCH http://{o}/ HTTP/1.1\r\nHost: {o}\r\nContent-Length: 0\r\n\r\n",
		"unknown": "BREW http://{o}/ HTTP/1.1\r\nHost: {o}\r\n\r\n", "PUT with body": strings.Replace(post, "POST", "PUT", 1)} {
		t.Run(name+" is not sent twice", func(t *testing.T) {
			o, c, up := pooled(t)
			n := len(p.served())
			c.send("%s", o.fill(request))
			up.head()
			if strings.HasSuffix(request, "hello") {
				up.wants("hello")
			}
			up.Close()
			c.wantsRefusal("POST", 502, "connection_terminated")
			wantsLogged(t, p.awaitServed(t, n), 502, "connection_terminated")
			o.wantsNone()
		})
	}
	t.Run("not after a byte of the answer", func(t *testing.T) {
		o, c, up := pooled(t)
		c.send("%s", o.fill(plainRequest))
		up.head()
		up.send("HTTP/1.1 2")
		up.Close()
		c.wantsRefusal("GET", 502, "connection_terminated")
		o.wantsNone()
	})
	t.Run("once only", func(t *testing.T) {
		o, c, up := pooled(t)
		c.send("%s", o.fill(plainRequest))
		up.head()
		up.Close()
		up = o.accept()
		up.head()
		up.Close()
		c.wantsRefusal("GET", 502, "connection_terminated")
		o.wantsNone()
	})
}

// TestVanishingClients has clients leave while their origins are slow. Upstream connections end with them.
func TestVanishingClients(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startProxy(t)
	const post = "POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\n"
	vanish := []struct{ name, request, wants, answer string }{
		{"waiting for the head", plainRequest, "", ""},
		{"waiting after a 1xx", plainRequest, "", "HTTP/1.1 103 Early Hints\r\n\r\n"},
		{"in a response with length", plainRequest, "", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello"},
		{"in a spliced response", plainRequest, "", "HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nhello"},
		{"in a chunked response", plainRequest, "", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"},
		{"in a request with length", post + "Content-Length: 100\r\n\r\nhello", "hello", ""},
		{"in a spliced request", post + "Content-Length: 1000000\r\n\r\nhello", "hello", ""},
		{"in a chunked request", post + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", "5\r\nhello\r\n", ""},
		{"after a request with a body", post + "Content-Length: 5\r\n\r\nhello", "hello", ""},
	}
	type pending struct {
		name string
		up   *peer
	}
	var all []pending
	for _, e := range vanish {
		for how, linger := range map[string]int{"closes": -1, "resets": 0} {
			o, c := startOrigin(t), p.dial(t)
			c.send("%s", o.fill(e.request))
			up := o.accept()
			up.head()
			up.wants(e.wants)
			if e.answer != "" {
				up.send("%s", e.answer)
				c.head()
				if strings.Contains(e.answer, "hello") {
					c.wants(e.answer[strings.Index(e.answer, "\r\n\r\n")+4:])
				}
			}
			c.SetLinger(linger)
			c.Close()
			all = append(all, pending{e.name + ", client " + how, up})
		}
	}
	end := time.Now().Add(2 * time.Second)
	for _, w := range all {
		w.up.SetReadDeadline(end)
		if rest, err := io.ReadAll(w.up.br); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: the upstream connection is still open", w.name)
		} else if len(rest) > 0 {
			t.Errorf("%s: the origin got %q as well", w.name, rest)
		}
	}
}

// TestStuckPeersVanish has clients leave while the proxy cannot write: to them, or to an origin that reads nothing.
func TestStuckPeersVanish(t *testing.T) {
	p := startProxy(t)
	t.Run("client reads nothing", func(t *testing.T) {
		o, c := startOrigin(t), p.dial(t)
		c.SetReadBuffer(4096)
		c.send("%s", o.fill(plainRequest))
		up := o.accept()
		up.head()
		up.send("HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
		c.head()
		stuck(up)
		c.Close()
		up.SetWriteDeadline(time.Now().Add(2 * time.Second))
		if _, err := up.Write(make([]byte, 64<<20)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the upstream connection is still open (%v)", err)
		}
	})
	t.Run("origin reads nothing", func(t *testing.T) {
		o, c := startOrigin(t), p.dial(t)
		c.send("%s", o.fill("POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nContent-Length: 1000000000\r\n\r\n"))
		up := o.accept()
		up.head()
		stuck(c)
		c.SetLinger(0)
		c.Close()
		up.SetReadDeadline(time.Now().Add(3 * time.Second))
		if _, err := io.Copy(struct{ io.Writer }{io.Discard}, up.TCPConn); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("the upstream connection is still open")
		}
	})
}

// stuck writes until nobody takes any more.
func stuck(to *peer) {
	block := make([]byte, 64<<10)
	for {
		to.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		if _, err := to.Write(block); err != nil {
			return
		}
	}
}

// TestHalfClosedClients: a client that has closed its sending side gets the whole of its answer, however long that takes, as long
// as something comes for it to take. When nothing does, it is taken for gone.
func TestHalfClosedClients(t *testing.T) {
	if !apart(t) {
		return
	}
	if runtime.GOOS != "linux" {
		t.Skip("elsewhere the end of a client's sending side is not looked for while its answer is under way")
	}
	p := startProxy(t)
	const pieces, pause = 12, 150 * time.Millisecond
	block := strings.Repeat("b", 8<<10)
	type pending struct {
		name, fields     string
		piece, last      string // of the body, from the origin
		gets, end        string // the same at the client
		before           int    // requests pipelined before it
		o                *testOrigin
		c, up            *peer
		received, wanted string
	}
	all := []*pending{{name: "nothing comes"}, {name: "nothing comes after a head", fields: "Content-Length: 12\r\n"}}
	for _, e := range []pending{
		{name: "length", fields: "Content-Length: 12\r\n", piece: "b", gets: "b"},
		{name: "spliced", fields: "Content-Length: 98304\r\n", piece: block, gets: block},
		{name: "chunked", fields: "Transfer-Encoding: chunked\r\n", piece: "1\r\nb\r\n", last: "0\r\n\r\n", gets: "1\r\nb\r\n", end: "0\r\n\r\n"},
		{name: "close-delimited", fields: "Server: a\r\n", piece: "b", gets: "1\r\nb\r\n", end: "0\r\n\r\n"},
	} {
		second := e
		second.name, second.before = e.name+", pipelined", 1
		all = append(all, &e, &second)
	}
	for _, e := range all {
		e.o, e.c = startOrigin(t), p.dial(t)
		e.c.send("%s", e.o.fill(strings.Repeat(plainRequest, e.before+1)))
		e.c.CloseWrite()
		e.up = e.o.accept()
		e.up.head()
	}
	time.Sleep(30 * time.Millisecond)
	for _, e := range all {
		if e.before > 0 {
			e.up.send(plainAnswer)
			e.c.wants(plainGets)
			e.up.head()
		}
		if e.fields != "" {
			e.up.send("HTTP/1.1 200 OK\r\n%s\r\n", e.fields)
			e.c.head()
		}
	}
	begun := time.Now()
	for range pieces {
		time.Sleep(pause)
		for _, e := range all {
			e.up.Write([]byte(e.piece)) // fails when the client was given up
			got := make([]byte, len(e.gets))
			n, _ := io.ReadFull(e.c.br, got)
			e.received += string(got[:n])
			e.wanted += e.gets
		}
	}
	for _, e := range all {
		t.Run(e.name, func(t *testing.T) {
			if e.piece == "" {
				e.up.SetReadDeadline(begun.Add(2500 * time.Millisecond))
				if b, err := e.up.br.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("the upstream connection is still open (%q, %v)", b, err)
				}
				wantsLogged(t, p.recordFor(t, "request", e.o.addr), 0, "client_disconnected")
				return
			}
			e.up.Write([]byte(e.last))
			e.up.CloseWrite()
			rest, err := io.ReadAll(e.c.br)
			if sameBytes(t, "body", []byte(e.received+string(rest)), []byte(e.wanted+e.end)); t.Failed() || err != nil {
				t.Fatalf("the client's end: %v", err)
			}
			eventually(t, "the records of all without a failure", func() bool {
				n := 0
				for _, r := range p.log.records(t) {
					if r["server.port"] == portOf(e.o.addr) && r["error.type"] == nil {
						n++
					}
				}
				return n == e.before+1
			})
		})
	}
}

// An empty line behind a request's body (old clients send one) is no request that has begun.
func TestStrayEmptyLine(t *testing.T) {
	p, o := startProxy(t, "HEADER_TIMEOUT=200ms"), startOrigin(t)
	c := p.dial(t)
	c.send("POST http://%s/ HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi\r\n", o.addr)
	up := o.accept()
	up.head()
	up.wants("hi")
	up.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	c.response("POST")
	c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	if b, err := c.br.ReadByte(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %q, %v", b, err)
	}
	c.SetReadDeadline(time.Now().Add(patience))
	exchange1(c, o, up)
}

// ---------------------------------------------------------------------------------------------------------------------
// What is forwarded

// exchangeCase is one request and its answer, byte for byte on both sides of the proxy. What is left empty is plain.
type exchangeCase struct {
	name    string
	request string // from the client
	wants   string // at the origin
	answer  string // from the origin, which then ends its side
	gets    string // at the client
	ends    bool   // the client's connection is closed afterwards
}

func (e exchangeCase) run(t *testing.T, p *testProxy) {
	o, c := startOrigin(t), p.dial(t)
	either := func(a, b string) string {
		if a == "" {
			a = b
		}
		return o.fill(a)
	}
	c.send("%s", either(e.request, plainRequest))
	up := o.accept()
	up.wants(either(e.wants, plainWants))
	up.send("%s", either(e.answer, plainAnswer))
	up.CloseWrite()
	c.wants(either(e.gets, plainGets))
	if e.ends {
		c.wantsEnd()
	} else {
		c.wantsInSync()
	}
	up.wantsEnd() // not a byte more than wanted
}

// get is a GET with fields.
func get(fields string) string { return "GET http://{o}/ HTTP/1.1\r\nHost: {o}\r\n" + fields + "\r\n" }

// gives is what the origin sees of get: before are the fields that pass, after those that Sluice adds.
func gives(before, after string) string {
	return "GET / HTTP/1.1\r\nHost: {o}\r\n" + before + viaOne + after + "\r\n"
}

func TestForwardedRequest(t *testing.T) {
	p := startProxy(t)
	closes := strings.Replace(plainGets, "\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1)
	line := func(request, wants string) (string, string) {
		return request + " HTTP/1.1\r\nHost: {o}\r\n\r\n", wants + " HTTP/1.1\r\nHost: {o}\r\n" + viaOne + "\r\n"
	}
	for name, c := range map[string][2]string{
		"path":                     {"GET http://{o}/a/b?c=d&e", "GET /a/b?c=d&e"},
		"path untouched":           {"GET http://{o}/a/../b//c/./%41%2f%zz?x=%", "GET /a/../b//c/./%41%2f%zz?x=%"},
		"raw visible bytes":        {"GET http://{o}/a|b{c}\"<d>\\^`[]?{e}|", "GET /a|b{c}\"<d>\\^`[]?{e}|"},
		"at sign in path":          {"GET http://{o}/@a:b@c", "GET /@a:b@c"},
		"URL in path":              {"GET http://{o}/http://a.example/", "GET /http://a.example/"},
		"slash in query":           {"GET http://{o}?a=/b@c", "GET /?a=/b@c"},
		"empty path":               {"GET http://{o}", "GET /"},
		"only a query":             {"GET http://{o}?a=b", "GET /?a=b"},
		"only a question mark":     {"GET http://{o}?", "GET /?"},
		"scheme in capitals":       {"GET HTTP://{o}/", "GET /"},
		"unknown method":           {"BREW http://{o}/pot", "BREW /pot"},
		"odd method":               {"!#$%&'*+-.^_`|~1aZ http://{o}/", "!#$%&'*+-.^_`|~1aZ /"},
		"lower-case method":        {"get http://{o}/", "get /"},
		"OPTIONS":                  {"OPTIONS http://{o}", "OPTIONS *"},
		"OPTIONS with slash":       {"OPTIONS http://{o}/", "OPTIONS /"},
		"OPTIONS with query":       {"OPTIONS http://{o}?a", "OPTIONS /?a"},
		"OPTIONS with a path":      {"OPTIONS http://{o}/a", "OPTIONS /a"},
		"DELETE":                   {"DELETE http://{o}/a", "DELETE /a"},
		"POST without body":        {"POST http://{o}/a", "POST /a"},
		"PRI is a method like any": {"PRI http://{o}/a", "PRI /a"},
	} {
		request, wants := line(c[0], c[1])
		t.Run(name, exchangeCase{request: request, wants: wants}.in(p))
	}
	for _, e := range []exchangeCase{
		{name: "target overrides Host", request: "GET http://{o}/ HTTP/1.1\r\nHost: other.example:81\r\n\r\n"},
		{name: "Host comes first", request: "GET http://{o}/ HTTP/1.1\r\nA: b\r\nhOST: {o}\r\n\r\n", wants: gives("A: b\r\n", "")},
		{name: "HTTP/1.0 without Host", request: "GET http://{o}/ HTTP/1.0\r\n\r\n", wants: strings.Replace(plainWants, "Via: 1.1", "Via: 1.0", 1), gets: closes, ends: true},
		{name: "HTTP/1.0 with another Host", request: "GET http://{o}/ HTTP/1.0\r\nHost: a.example\r\n\r\n", wants: strings.Replace(plainWants, "Via: 1.1", "Via: 1.0", 1), gets: closes, ends: true},
		{name: "empty lines before", request: "\r\n\r\n" + plainRequest},
		{name: "order, case and spaces", request: get("x-b: 1\r\nX-A:2\r\naccept:  a ,b \t\r\nX-b: 3\r\nUser-Agent: \r\nCOOKIE: a=b\r\nEmpty:\r\n"),
			wants: gives("x-b: 1\r\nX-A:2\r\naccept:  a ,b \t\r\nX-b: 3\r\nUser-Agent: \r\nCOOKIE: a=b\r\nEmpty:\r\n", "")},
		{name: "obs-text and odd names", request: get("A: \xe9\xff\r\n!#$%&'*+-.^_`|~: b\r\nTransfer_Encoding: chunked\r\n"), wants: gives("A: \xe9\xff\r\n!#$%&'*+-.^_`|~: b\r\nTransfer_Encoding: chunked\r\n", "")},
		{name: "Via grows", request: get("Via: 1.0 fred, 1.1 p.example.net (Apache)\r\nA: b\r\nvia: 1.1 sluice-test2\r\n"), wants: gives("Via: 1.0 fred, 1.1 p.example.net (Apache)\r\nA: b\r\nvia: 1.1 sluice-test2\r\n", "")},
		{name: "forwarding fields are left alone", request: get("X-Forwarded-For: a\r\nForwarded: for=b\r\nX-Real-IP: c\r\n"), wants: gives("X-Forwarded-For: a\r\nForwarded: for=b\r\nX-Real-IP: c\r\n", "")},
		{name: "credentials for the origin", request: get("Authorization: Basic YTpi\r\nProxy-Authorization: Basic c2VjcmV0\r\n"), wants: gives("Authorization: Basic YTpi\r\n", "")},
		{name: "hop-by-hop", request: get("Connection: keep-alive\r\nKeep-Alive: timeout=5\r\nA: b\r\nProxy-Connection: keep-alive\r\nPROXY-AUTHORIZATION: x\r\nProxy-Authenticate: Basic\r\nTE: gzip;q=0.5\r\nUpgrade: h2c\r\nTrailer: T\r\n"),
			wants: gives("A: b\r\nTrailer: T\r\n", "")},
		{name: "named in Connection", request: get("X-Early: a\r\nConnection: x-early, X-Late ,,\tCookie\r\nB: c\r\nConnection: x-more\r\nX-LATE: d\r\nX-More: e\r\nX-late: f\r\ncookie: g\r\nX-Lates: h\r\n"),
			wants: gives("B: c\r\nX-Lates: h\r\n", "")},
		{name: "Connection does not name Host and Via away", request: get("Connection: Host, Via, Connection, Max-Forwards\r\nVia: 1.1 a\r\n"), wants: gives("Via: 1.1 a\r\n", "")},
		{name: "Connection does not name Content-Length away", request: "POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nConnection: Content-Length\r\nContent-Length: 5\r\n\r\nhello",
			wants: "POST / HTTP/1.1\r\nHost: {o}\r\n" + viaOne + "Content-Length: 5\r\n\r\nhello"},
		{name: "Connection does not name Transfer-Encoding away", request: "POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nConnection: Transfer-Encoding\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
			wants: "POST / HTTP/1.1\r\nHost: {o}\r\n" + viaOne + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"},
		{name: "Connection: close is the client's", request: get("Connection: close\r\n"), gets: closes, ends: true},
		{name: "Proxy-Connection: close too", request: get("Proxy-Connection: close\r\n"), gets: closes, ends: true},
		{name: "HTTP/1.0 keep-alive is not believed", request: "GET http://{o}/ HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", wants: strings.Replace(plainWants, "Via: 1.1", "Via: 1.0", 1), gets: closes, ends: true},
		{name: "TE: trailers", request: get("Connection: TE\r\nTE: deflate, Trailers;q=0.5\r\n"), wants: gives("", "TE: trailers\r\nConnection: TE\r\n")},
		{name: "h2c is not passed on", request: get("Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n")},
		{name: "repeated Content-Length", request: "POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nContent-Length: 5\r\nA: b\r\ncontent-length: 5\r\n\r\nhello",
			wants: "POST / HTTP/1.1\r\nHost: {o}\r\nA: b\r\n" + viaOne + "Content-Length: 5\r\n\r\nhello"},
		{name: "Content-Length: 0", request: "POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nContent-Length: 0\r\n\r\n", wants: "POST / HTTP/1.1\r\nHost: {o}\r\n" + viaOne + "Content-Length: 0\r\n\r\n"},
		{name: "GET with a body", request: get("Content-Length: 2\r\n") + "hi", wants: gives("", "Content-Length: 2\r\n") + "hi"},
		{name: "HTTP/1.0 with a body", request: "POST http://{o}/ HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\nhello",
			wants: "POST / HTTP/1.1\r\nHost: {o}\r\nVia: 1.0 sluice-test\r\nContent-Length: 5\r\n\r\nhello", gets: closes, ends: true},
		{name: "chunk extensions are dropped", request: "POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nTransfer-Encoding: CHUNKED\r\n\r\n05;a=b;c=\"d e\"\r\nhello\r\n000;last\r\n\r\n",
			wants: "POST / HTTP/1.1\r\nHost: {o}\r\n" + viaOne + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"},
		{name: "empty chunked body", request: "POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
			wants: "POST / HTTP/1.1\r\nHost: {o}\r\n" + viaOne + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"},
		{name: "trailers", request: "POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\nx-other:2\r\n\r\n",
			wants: "POST / HTTP/1.1\r\nHost: {o}\r\nTrailer: X-Sum\r\n" + viaOne + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\nx-other:2\r\n\r\n"},
		{name: "trailers do not frame or route", request: "POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nContent-Length: 9\r\nA: b\r\nHost: c\r\nProxy-Authorization: d\r\nConnection: e\r\n\r\n",
			wants: "POST / HTTP/1.1\r\nHost: {o}\r\n" + viaOne + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nA: b\r\n\r\n"},
		{name: "Max-Forwards counts down", request: "OPTIONS http://{o}/ HTTP/1.1\r\nHost: {o}\r\nMax-Forwards: 10\r\n\r\n", wants: "OPTIONS / HTTP/1.1\r\nHost: {o}\r\n" + viaOne + "Max-Forwards: 9\r\n\r\n"},
		{name: "Max-Forwards to nothing", request: "TRACE http://{o}/ HTTP/1.1\r\nHost: {o}\r\nMax-Forwards: 1\r\n\r\n", wants: "TRACE / HTTP/1.1\r\nHost: {o}\r\n" + viaOne + "Max-Forwards: 0\r\n\r\n"},
		{name: "Max-Forwards of others is left alone", request: get("Max-Forwards: 0\r\n"), wants: gives("", "Max-Forwards: 0\r\n")},
	} {
		t.Run(e.name, e.in(p))
	}
}

// in makes a subtest of a case.
func (e exchangeCase) in(p *testProxy) func(*testing.T) {
	return func(t *testing.T) { e.run(t, p) }
}

// TestHostAsWritten reaches an origin by a name, which it sees as the client wrote it.
func TestHostAsWritten(t *testing.T) {
	p, o := startProxy(t), startOrigin(t)
	_, port, _ := net.SplitHostPort(o.addr)
	for _, host := range []string{"LocalHost:" + port, "localhost.:" + port, "127.0.0.1.:" + port} {
		c := p.dial(t)
		c.send("GET http://%s/ HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", host, host)
		up := o.accept()
		up.wants("GET / HTTP/1.1\r\nHost: " + host + "\r\n" + viaOne + "\r\n")
		up.send("HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
		if resp, _ := c.response("GET"); resp.StatusCode != 204 {
			t.Error(resp.Status)
		}
		up.wantsEnd()
		c.wantsEnd()
	}
}

// TestMaxForwardsSpent has the proxy answer in the origin's place (RFC 9110, 9.3.7 and 9.3.8), which tells no secret.
func TestMaxForwardsSpent(t *testing.T) {
	p, o := startProxy(t), startOrigin(t)
	c := p.dial(t)
	c.send("%s", o.fill("OPTIONS http://{o}/ HTTP/1.1\r\nHost: {o}\r\nMax-Forwards: 0\r\n\r\n"))
	if resp, body := c.response("OPTIONS"); resp.StatusCode != 200 || body != "" {
		t.Errorf("OPTIONS: %s %q", resp.Status, body)
	}
	c.send("%s", o.fill("TRACE http://{o}/p?q HTTP/1.1\r\nHost: {o}\r\nX-A:  b\r\nCOOKIE: secret\r\nAuthorization: Basic secret\r\nProxy-Authorization: Basic secret\r\nMax-Forwards: 0\r\n\r\n"))
	resp, body := c.response("TRACE")
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "message/http" {
		t.Errorf("TRACE: %s, %s", resp.Status, resp.Header.Get("Content-Type"))
	}
	if !strings.HasPrefix(body, o.fill("TRACE http://{o}/p?q HTTP/1.1\r\n")) || !strings.HasSuffix(body, "\r\n\r\n") {
		t.Errorf("TRACE echoes %q", body)
	}
	if strings.Contains(body, "secret") {
		t.Errorf("TRACE tells a secret: %q", body)
	}
	c.wantsInSync()
	o.wantsNone()
}

// TestExpectContinue passes the expectation, the 100 and then the body on.
func TestExpectContinue(t *testing.T) {
	p := startProxy(t)
	const expecting = "POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
	const wanting = "POST / HTTP/1.1\r\nHost: {o}\r\nExpect: 100-continue\r\n" + viaOne + "Content-Length: 5\r\n\r\n"
	t.Run("100", func(t *testing.T) {
		o, c := startOrigin(t), p.dial(t)
		c.send("%s", o.fill(expecting))
		up := o.accept()
		up.wants(o.fill(wanting))
		up.send("HTTP/1.1 100 Continue\r\n\r\n")
		c.wants("HTTP/1.1 100 Continue\r\n" + viaOne + "\r\n")
		c.send("hello")
		up.wants("hello")
		up.send(plainAnswer)
		c.wants(plainGets)
		c.wantsInSync()
	})
	t.Run("417", func(t *testing.T) {
		o, c := startOrigin(t), p.dial(t)
		c.send("%s", o.fill(expecting))
		up := o.accept()
		up.wants(o.fill(wanting))
		up.send("HTTP/1.1 417 Expectation Failed\r\n" + date + "Content-Length: 2\r\n\r\nno")
		c.wants("HTTP/1.1 417 Expectation Failed\r\n" + date + viaOne + "Content-Length: 2\r\nConnection: close\r\n\r\nno")
		c.wantsEnd()
		up.wantsEnd() // what it waits for will not come
	})
}

// TestWebSocket is the one upgrade that passes; what follows the 101 is a tunnel.
func TestWebSocket(t *testing.T) {
	p, o := startProxy(t), startOrigin(t)
	c := p.dial(t)
	c.send("%s", o.fill(get("Connection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Key: a\r\n")))
	up := o.accept()
	up.wants(o.fill(gives("Sec-WebSocket-Key: a\r\n", "Connection: Upgrade\r\nUpgrade: websocket\r\n")))
	up.send("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: b\r\n\r\nfirst")
	c.wants("HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: b\r\n" + viaOne + "Connection: Upgrade\r\nUpgrade: websocket\r\n\r\nfirst")
	c.send("GET / HTTP/1.1\r\n\r\n\x00")
	up.wants("GET / HTTP/1.1\r\n\r\n\x00")
	up.send("second")
	c.wants("second")
	c.CloseWrite()
	up.wantsEnd()
	up.send("last")
	up.CloseWrite()
	c.wants("last")
	c.wantsEnd()
}

// TestHeadsDoNotWait: a head is passed on at once, also when the beginning of a body has come with it that is of no use yet.
func TestHeadsDoNotWait(t *testing.T) {
	p := startProxy(t)
	const fields = "Transfer-Encoding: chunked\r\n\r\n"
	for name, cut := range map[string]int{"nothing of a chunk": 0, "half a size": 1, "half a line": 8, "a line": 9} {
		const body = "0005;a=b\r\nhello\r\n0\r\n\r\n"
		t.Run("response with "+name, func(t *testing.T) {
			o, c := startOrigin(t), p.dial(t)
			c.send("%s", o.fill(plainRequest))
			up := o.accept()
			up.head()
			up.send("HTTP/1.1 200 OK\r\n" + date + fields + body[:cut])
			c.SetReadDeadline(time.Now().Add(patience / 2))
			c.wants("HTTP/1.1 200 OK\r\n" + date + viaOne + fields)
			up.send(body[cut:])
			c.wants("5\r\nhello\r\n0\r\n\r\n")
			c.wantsInSync()
		})
		t.Run("request with "+name, func(t *testing.T) {
			o, c := startOrigin(t), p.dial(t)
			c.send("%s", o.fill("POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\n"+fields+body[:cut]))
			up := o.accept()
			up.SetReadDeadline(time.Now().Add(patience / 2))
			up.wants(o.fill("POST / HTTP/1.1\r\nHost: {o}\r\n" + viaOne + fields))
			c.send(body[cut:])
			up.wants("5\r\nhello\r\n0\r\n\r\n")
			up.send(plainAnswer)
			c.wants(plainGets)
			c.wantsInSync()
		})
	}
}

// TestFoldedTrailers: a field of a response that goes on in the next line becomes one line, in trailers as in the head.
func TestFoldedTrailers(t *testing.T) {
	p, o := startProxy(t), startOrigin(t)
	c := p.dial(t)
	c.send("%s", o.fill(plainRequest))
	up := o.accept()
	up.head()
	up.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nA: b\r\n c\r\n\t\r\n  d\r\nE: f\r\n\r\n")
	if head := c.head(); !strings.HasPrefix(head, "HTTP/1.1 200 OK\r\n") {
		t.Fatalf("head %q", head)
	}
	c.wants("5\r\nhello\r\n0\r\n")
	trailers := strings.Split(c.head(), "\r\n")
	if len(trailers) != 4 || !strings.HasPrefix(trailers[0], "A:") || strings.Join(strings.Fields(trailers[0][2:]), " ") != "b c d" || trailers[1] != "E: f" {
		t.Errorf("trailers %q", trailers)
	}
	c.wantsInSync()
}

// TestTrailersThatConnectionNames: what Connection names is for this hop alone, also when it comes as a trailer.
func TestTrailersThatConnectionNames(t *testing.T) {
	p := startProxy(t)
	const fields, chunks = "Transfer-Encoding: chunked\r\n\r\n", "5\r\nhello\r\n0\r\n"
	const ok, got = "HTTP/1.1 200 OK\r\n" + date, "HTTP/1.1 200 OK\r\n" + date + viaOne
	const post, wants = "POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\n", "POST / HTTP/1.1\r\nHost: {o}\r\n" + viaOne
	const named, trailers = "Connection: X-Hop\r\n", "X-Hop: 1\r\nX-Kept: 2\r\nx-hop: 3\r\n\r\n"
	for _, e := range []exchangeCase{
		{name: "response", answer: ok + named + fields + chunks + trailers, gets: got + fields + chunks + "X-Kept: 2\r\n\r\n"},
		{name: "request", request: post + named + fields + chunks + trailers, wants: wants + fields + chunks + "X-Kept: 2\r\n\r\n"},
		{name: "response, not named", answer: ok + fields + chunks + trailers, gets: got + fields + chunks + trailers},
		{name: "request, not named", request: post + fields + chunks + trailers, wants: wants + fields + chunks + trailers},
	} {
		t.Run(e.name, e.in(p))
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Responses and bodies

func TestForwardedResponse(t *testing.T) {
	p := startProxy(t)
	head := strings.NewReplacer("GET", "HEAD")
	const ok, got = "HTTP/1.1 200 OK\r\n" + date, "HTTP/1.1 200 OK\r\n" + date + viaOne
	const got10 = "HTTP/1.1 200 OK\r\n" + date + "Via: 1.0 sluice-test\r\n"
	const old, oldWants = "GET http://{o}/ HTTP/1.0\r\n\r\n", "GET / HTTP/1.1\r\nHost: {o}\r\nVia: 1.0 sluice-test\r\n\r\n"
	for _, e := range []exchangeCase{
		{name: "order, case and spaces", answer: "HTTP/1.1 299 Fine  by me \xe9\r\nset-cookie: a\r\n" + date + "X:  b \r\nSet-Cookie: c\r\nContent-Length: 0\r\n\r\n",
			gets: "HTTP/1.1 299 Fine  by me \xe9\r\nset-cookie: a\r\n" + date + "X:  b \r\nSet-Cookie: c\r\n" + viaOne + "Content-Length: 0\r\n\r\n"},
		{name: "empty reason", answer: "HTTP/1.1 200 \r\n" + date + "Content-Length: 0\r\n\r\n", gets: "HTTP/1.1 200 \r\n" + date + viaOne + "Content-Length: 0\r\n\r\n"},
		{name: "no reason", answer: "HTTP/1.1 200\r\n" + date + "Content-Length: 0\r\n\r\n", gets: "HTTP/1.1 200 \r\n" + date + viaOne + "Content-Length: 0\r\n\r\n"},
		{name: "odd status", answer: "HTTP/1.1 999 X\r\n" + date + "Content-Length: 0\r\n\r\n", gets: "HTTP/1.1 999 X\r\n" + date + viaOne + "Content-Length: 0\r\n\r\n"},
		{name: "Via grows", answer: ok + "Via: 1.1 a\r\nContent-Length: 0\r\n\r\n", gets: "HTTP/1.1 200 OK\r\n" + date + "Via: 1.1 a\r\n" + viaOne + "Content-Length: 0\r\n\r\n"},
		{name: "hop-by-hop", answer: ok + "Connection: X-Hop, keep-alive\r\nx-hop: a\r\nKeep-Alive: timeout=5\r\nProxy-Connection: keep-alive\r\nProxy-Authenticate: Basic\r\nUpgrade: h2c\r\nTrailer: T\r\nContent-Length: 0\r\n\r\n",
			gets: "HTTP/1.1 200 OK\r\n" + date + "Trailer: T\r\n" + viaOne + "Content-Length: 0\r\n\r\n"},
		{name: "Connection does not name framing away", answer: ok + "Connection: Content-Length, Via\r\nVia: 1.1 a\r\nContent-Length: 2\r\n\r\nhi",
			gets: "HTTP/1.1 200 OK\r\n" + date + "Via: 1.1 a\r\n" + viaOne + "Content-Length: 2\r\n\r\nhi"},
		{name: "the origin's close is its own", answer: ok + "Connection: close\r\nContent-Length: 2\r\n\r\nhi"},
		{name: "repeated Content-Length", answer: ok + "Content-Length: 2\r\nContent-Length: 2\r\n\r\nhi"},
		{name: "chunked", answer: ok + "Transfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0;c\r\n\r\n", gets: got + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"},
		{name: "trailers", answer: ok + "Trailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\nProxy-Authenticate: a\r\nx:2\r\n\r\n",
			gets: "HTTP/1.1 200 OK\r\n" + date + "Trailer: X-Sum\r\n" + viaOne + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\nx:2\r\n\r\n"},
		{name: "empty chunked", answer: ok + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", gets: got + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"},
		{name: "close-delimited", answer: ok + "\r\nhello", gets: got + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"},
		{name: "empty close-delimited", answer: ok + "\r\n", gets: got + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"},
		{name: "HTTP/1.0 close-delimited", answer: "HTTP/1.0 200 OK\r\n" + date + "\r\nhello", gets: got10 + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"},
		{name: "HTTP/1.0 with length", answer: "HTTP/1.0 200 OK\r\n" + date + "Content-Length: 2\r\n\r\nhi", gets: got10 + "Content-Length: 2\r\n\r\nhi"},
		{name: "HTTP/1.0 client", request: old, wants: oldWants, answer: ok + "Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\nT: u\r\n\r\n", gets: got + "Connection: close\r\n\r\nhello", ends: true},
		{name: "HTTP/1.0 client and origin", request: old, wants: oldWants, answer: "HTTP/1.0 200 OK\r\n" + date + "\r\nhello", gets: got10 + "Connection: close\r\n\r\nhello", ends: true},
		{name: "HTTP/1.0 client gets no 1xx", request: old, wants: oldWants, answer: "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n" + plainAnswer, gets: got + "Content-Length: 2\r\nConnection: close\r\n\r\nhi", ends: true},
		{name: "103 and 102 before 200", answer: "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\nConnection: A\r\nA: b\r\n\r\n" + plainAnswer,
			gets: "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n" + viaOne + "\r\nHTTP/1.1 102 Processing\r\n" + viaOne + "\r\n" + plainGets},
		{name: "HEAD with length", request: head.Replace(plainRequest), wants: head.Replace(plainWants), answer: ok + "Content-Length: 5\r\n\r\n", gets: got + "Content-Length: 5\r\n\r\n"},
		{name: "HEAD without", request: head.Replace(plainRequest), wants: head.Replace(plainWants), answer: ok + "\r\n", gets: got + "\r\n"},
		{name: "HEAD chunked", request: head.Replace(plainRequest), wants: head.Replace(plainWants), answer: ok + "Transfer-Encoding: chunked\r\n\r\n", gets: got + "\r\n"},
		{name: "204", answer: "HTTP/1.1 204 No Content\r\n" + date + "\r\n", gets: "HTTP/1.1 204 No Content\r\n" + date + viaOne + "\r\n"},
		{name: "204 with length", answer: "HTTP/1.1 204 No Content\r\n" + date + "Content-Length: 5\r\n\r\n", gets: "HTTP/1.1 204 No Content\r\n" + date + viaOne + "\r\n"},
		{name: "304", answer: "HTTP/1.1 304 Not Modified\r\n" + date + "ETag: \"a\"\r\n\r\n", gets: "HTTP/1.1 304 Not Modified\r\n" + date + "ETag: \"a\"\r\n" + viaOne + "\r\n"},
		{name: "304 with length", answer: "HTTP/1.1 304 Not Modified\r\n" + date + "Content-Length: 5\r\n\r\n", gets: "HTTP/1.1 304 Not Modified\r\n" + date + viaOne + "Content-Length: 5\r\n\r\n"},
	} {
		t.Run(e.name, e.in(p))
	}
	t.Run("Date is added", func(t *testing.T) {
		o, c := startOrigin(t), p.dial(t)
		c.send("%s", o.fill(plainRequest))
		up := o.accept()
		up.head()
		up.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		resp, _ := c.response("GET")
		if d, err := http.ParseTime(resp.Header.Get("Date")); err != nil || time.Since(d).Abs() > time.Minute {
			t.Errorf("Date: %q", resp.Header.Get("Date"))
		}
	})
	t.Run("obs-fold", func(t *testing.T) {
		o, c := startOrigin(t), p.dial(t)
		c.send("%s", o.fill(plainRequest))
		up := o.accept()
		up.head()
		up.send("HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\t\r\n  d\r\nE: f\r\nContent-Length:\r\n 2\r\n\r\nhi")
		head := c.head()
		for line := range strings.Lines(head) {
			if strings.HasPrefix(line, " ") || strings.HasPrefix(line, "\t") {
				t.Errorf("a fold has passed: %q", head)
			}
			if v, ok := strings.CutPrefix(line, "A:"); ok && strings.Join(strings.Fields(v), " ") != "b c d" {
				t.Errorf("A is %q", v)
			}
		}
		if !strings.Contains(head, "\r\nA:") || !strings.Contains(head, "\r\nE: f\r\n") || !strings.Contains(head, "\r\nContent-Length: 2\r\n") {
			t.Errorf("head %q", head)
		}
		c.wants("hi")
		c.wantsInSync()
	})
}

// TestByteByByte sends every byte on its own, on both sides.
func TestByteByByte(t *testing.T) {
	p, o := startProxy(t), startOrigin(t)
	c := p.dial(t)
	trickle := func(to *peer, text string) {
		for i := range len(text) {
			to.send("%s", text[i:i+1])
		}
	}
	var up *peer
	for _, framing := range []string{"Content-Length: 5\r\n\r\nhello", "Transfer-Encoding: chunked\r\n\r\n2;a\r\nhe\r\n3\r\nllo\r\n0\r\nT: u\r\n\r\n"} {
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			trickle(c, o.fill("\r\nPOST http://{o}/path HTTP/1.1\r\nHost: {o}\r\nA: b\r\n")+framing)
		}()
		if up == nil {
			up = o.accept()
		}
		req, err := http.ReadRequest(up.br)
		if err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(req.Body); string(body) != "hello" || err != nil || req.URL.Path != "/path" {
			t.Fatalf("the origin got %v %q (%v)", req.URL, body, err)
		}
		<-sent
		go trickle(up, "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\n"+framing)
		resp, body := c.response("POST")
		for resp.StatusCode < 200 { // whether http.ReadResponse reads over 1xx is not ours to say
			resp, body = c.response("POST")
		}
		if resp.StatusCode != 200 || body != "hello" {
			t.Fatalf("the client got %s %q", resp.Status, body)
		}
		if strings.HasPrefix(framing, "T") && (req.Trailer.Get("T") != "u" || resp.Trailer.Get("T") != "u") {
			t.Errorf("trailers: %v, %v", req.Trailer, resp.Trailer)
		}
	}
	c.wantsInSync()
}

// TestManyChunks sends thousands of one-byte chunks in both directions.
func TestManyChunks(t *testing.T) {
	p, o := startProxy(t), startOrigin(t)
	c := p.dial(t)
	const count = 20000
	var chunks, want strings.Builder
	for i := range count {
		fmt.Fprintf(&chunks, "1;n=%d\r\n%c\r\n", i%7, 'a'+i%26)
		want.WriteByte(byte('a' + i%26))
	}
	chunks.WriteString("0\r\n\r\n")
	go io.WriteString(c.TCPConn, o.fill("POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nTransfer-Encoding: chunked\r\n\r\n")+chunks.String())
	up := o.accept()
	req, err := http.ReadRequest(up.br)
	if err != nil {
		t.Fatal(err)
	}
	if body, err := io.ReadAll(req.Body); string(body) != want.String() || err != nil {
		t.Fatalf("the origin got %d bytes (%v)", len(body), err)
	}
	go io.WriteString(up.TCPConn, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"+chunks.String())
	if _, body := c.response("POST"); body != want.String() {
		t.Fatalf("the client got %d bytes", len(body))
	}
	c.wantsInSync()
}

// TestPipelining sends ten requests at once; they are answered in order over one upstream connection.
func TestPipelining(t *testing.T) {
	p, o := startProxy(t), startOrigin(t)
	c := p.dial(t)
	var all strings.Builder
	for i := range 10 {
		if i%3 == 2 {
			fmt.Fprintf(&all, "\r\nPOST http://%s/%d HTTP/1.1\r\nHost: %s\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n", o.addr, i, o.addr)
		} else {
			fmt.Fprintf(&all, "POST http://%s/%d HTTP/1.1\r\nHost: %s\r\nContent-Length: 1\r\n\r\nx", o.addr, i, o.addr)
		}
	}
	c.send("%s", all.String())
	up := o.accept()
	for i := range 10 {
		if head := up.head(); !strings.HasPrefix(head, fmt.Sprintf("POST /%d HTTP/1.1\r\n", i)) {
			t.Fatalf("request %d is %q", i, head)
		}
		if i%3 == 2 {
			up.wants("1\r\nx\r\n0\r\n\r\n")
		} else {
			up.wants("x")
		}
		up.send("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d", i)
	}
	for i := range 10 {
		if _, body := c.response("POST"); body != fmt.Sprint(i) {
			t.Fatalf("answer %d is %q", i, body)
		}
	}
	c.wantsInSync()
	o.wantsNone()
}

// TestKeepAlive has an origin see one connection for many requests, of several clients and kinds, HTTP/1.0 with keep-alive
// among them.
func TestKeepAlive(t *testing.T) {
	p := startProxy(t)
	for name, head := range map[string]string{"HTTP/1.1": "HTTP/1.1 200 OK\r\n", "HTTP/1.0": "HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\n"} {
		t.Run(name, func(t *testing.T) {
			o := startOrigin(t)
			clients := []*peer{p.dial(t), p.dial(t), p.dial(t)}
			var up *peer
			for i := range 30 {
				c := clients[i%3]
				n := len(p.served())
				c.send("%s", o.fill(plainRequest))
				if up == nil {
					up = o.accept()
				}
				up.wants(o.fill(plainWants))
				up.send("%sContent-Length: 5\r\n\r\nhello", head)
				if _, body := c.response("GET"); body != "hello" {
					t.Fatalf("got %q", body)
				}
				if r := p.awaitServed(t, n); r["upstream_reused"] != (i > 0) {
					t.Fatalf("request %d: upstream_reused is %v", i, r["upstream_reused"])
				}
			}
			o.wantsNone()
		})
	}
	for name, answer := range map[string]string{"HTTP/1.0 without keep-alive": "HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", "close": "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"} {
		t.Run(name, func(t *testing.T) {
			o, c := startOrigin(t), p.dial(t)
			for range 2 {
				c.send("%s", o.fill(plainRequest))
				up := o.accept()
				up.wants(o.fill(plainWants))
				up.send("%s", answer)
				c.response("GET")
				up.wantsEnd()
			}
		})
	}
}

// TestEarlyResponse has the origin refuse a body that the client is still sending. The refusal must arrive whole.
func TestEarlyResponse(t *testing.T) {
	p := startProxy(t)
	const size = 8 << 20
	body := make([]byte, size)
	bodies := map[string]string{
		"length":  fmt.Sprintf("Content-Length: %d\r\n\r\n%s", size, body),
		"chunked": fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", size, body),
	}
	ends := map[string]func(*peer){"stays": func(*peer) {}, "half-closes": func(up *peer) { up.CloseWrite() }, "closes": func(up *peer) { up.Close() }}
	for framing, text := range bodies {
		for how, end := range ends {
			t.Run(framing+", origin "+how, func(t *testing.T) {
				o, c := startOrigin(t), p.dial(t)
				sent := make(chan struct{})
				go func() {
					defer close(sent)
					io.WriteString(c.TCPConn, o.fill("POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\n")+text)
				}()
				up := o.accept()
				up.head()
				why := strings.Repeat("too large! ", 1000)
				up.send("HTTP/1.1 413 Content Too Large\r\nContent-Length: %d\r\n\r\n%s", len(why), why)
				end(up)
				if resp, got := c.response("POST"); resp.StatusCode != 413 || got != why {
					t.Errorf("got %s, %d bytes", resp.Status, len(got))
				}
				c.wantsEnd()
				<-sent
			})
		}
	}
}

// TestFullDuplex has the origin answer while the request is still being sent, each piece when it comes.
func TestFullDuplex(t *testing.T) {
	p := startProxy(t)
	t.Run("chunked", func(t *testing.T) {
		o, c := startOrigin(t), p.dial(t)
		c.send("%s", o.fill("POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nTransfer-Encoding: chunked\r\n\r\n"))
		up := o.accept()
		up.head()
		up.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
		resp, err := http.ReadResponse(c.br, nil)
		if err != nil {
			t.Fatal(err)
		}
		in, got := httputil.NewChunkedReader(up.br), make([]byte, 4)
		for i := range 20 {
			c.send("4\r\n%04d\r\n", i)
			if _, err := io.ReadFull(in, got); err != nil {
				t.Fatal(err)
			}
			up.send("4\r\n%s\r\n", got)
			if _, err := io.ReadFull(resp.Body, got); err != nil || string(got) != fmt.Sprintf("%04d", i) {
				t.Fatalf("piece %d: %q, %v", i, got, err)
			}
		}
		c.send("0\r\n\r\n")
		up.send("0\r\n\r\n")
		if rest, err := io.ReadAll(resp.Body); len(rest) > 0 || err != nil {
			t.Errorf("then %q, %v", rest, err)
		}
	})
	t.Run("length", func(t *testing.T) {
		o, c := startOrigin(t), p.dial(t)
		const pieces, size = 20, 10000 // large enough to be spliced
		c.send("%s", o.fill(fmt.Sprintf("POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nContent-Length: %d\r\n\r\n", pieces*size)))
		up := o.accept()
		up.head()
		up.send("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", pieces*size)
		c.head()
		for i := range pieces {
			piece := strings.Repeat(string(rune('a'+i)), size)
			c.send("%s", piece)
			up.wants(piece)
			up.send("%s", piece)
			c.wants(piece)
		}
	})
}

// random gives n bytes that are the same for the same seed, and their sum.
func random(seed byte, n int) ([]byte, string) {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	sum := sha256.Sum256(b)
	return b, hex.EncodeToString(sum[:])
}

// plainReader hides a body's length, so that net/http sends it chunked.
type plainReader struct{ io.Reader }

// startEcho runs an origin by net/http: it answers with what it got, chunked where the query asks for it.
func startEcho(t *testing.T) string {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), 400)
			return
		}
		w.Header().Set("X-Length", fmt.Sprint(r.ContentLength))
		if r.URL.RawQuery == "chunked" {
			w.(http.Flusher).Flush()
		} else {
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		}
		w.Write(b)
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// httpClient is a net/http client that uses the proxy.
func (p *testProxy) httpClient(t *testing.T) *http.Client {
	at := &url.URL{Scheme: "http", Host: p.addr}
	tr := &http.Transport{Proxy: http.ProxyURL(at), MaxIdleConnsPerHost: 100}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 4 * patience}
}

// TestBigBodies moves several megabytes both ways, with length (spliced) and chunked.
func TestBigBodies(t *testing.T) {
	p := startProxy(t)
	echo, client := startEcho(t), p.httpClient(t)
	data, sum := random(1, 5<<20+3)
	for _, up := range []string{"length", "chunked"} {
		for _, down := range []string{"length", "chunked"} {
			t.Run(up+" up, "+down+" down", func(t *testing.T) {
				var body io.Reader = bytes.NewReader(data)
				if up == "chunked" {
					body = plainReader{body}
				}
				resp, err := client.Post(echo+"/?"+down, "application/octet-stream", body)
				if err != nil {
					t.Fatal(err)
				}
				defer resp.Body.Close()
				h := sha256.New()
				n, err := io.Copy(h, resp.Body)
				if got := hex.EncodeToString(h.Sum(nil)); got != sum || err != nil {
					t.Errorf("%d bytes of sum %s, want %d of %s (%v)", n, got, len(data), sum, err)
				}
				if (resp.ContentLength == -1) != (down == "chunked") || (resp.Header.Get("X-Length") == "-1") != (up == "chunked") {
					t.Errorf("framing changed: up %s, down %d", resp.Header.Get("X-Length"), resp.ContentLength)
				}
			})
		}
	}
}

// TestManyClients has net/http send many requests at a time, of all framings and sizes.
func TestManyClients(t *testing.T) {
	p := startProxy(t)
	echo, client := startEcho(t), p.httpClient(t)
	var all sync.WaitGroup
	for worker := range 32 {
		all.Add(1)
		go func() {
			defer all.Done()
			for i := range 15 {
				data, _ := random(byte(worker), []int{0, 1, 100, 5000, 40000, 200000}[(worker+i)%6])
				var body io.Reader = bytes.NewReader(data)
				if i%2 == 1 {
					body = plainReader{body}
				}
				resp, err := client.Post(echo+[]string{"/", "/?chunked"}[i/2%2], "application/octet-stream", body)
				if err != nil {
					t.Errorf("worker %d, request %d: %v", worker, i, err)
					return
				}
				got, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if !bytes.Equal(got, data) || resp.StatusCode != 200 || err != nil {
					t.Errorf("worker %d, request %d: %s, %d bytes of %d (%v)", worker, i, resp.Status, len(got), len(data), err)
					return
				}
			}
		}()
	}
	all.Wait()
}

// ---------------------------------------------------------------------------------------------------------------------
// Fast paths

// A question that the socket takes in part goes out whole, also while the answer to its beginning is there already.
func TestAskInParts(t *testing.T) {
	s := testServer(t)
	question := noise(1<<20, 5)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	asked := make(chan []byte, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		io.WriteString(c, "early")
		got := make([]byte, len(question))
		io.ReadFull(c, got)
		asked <- got
	}()
	var w wire
	conn := dialTCP(t, l.Addr().String())
	conn.SetWriteBuffer(4096)
	w.attach(s, conn)
	if err := w.ask(patience, question); err != nil || string(w.unused()) != "early" {
		t.Errorf("%v, read %q", err, w.unused())
	}
	sameBytes(t, "question", <-asked, question)
	if err := w.fill(); err != io.EOF {
		t.Errorf("the end: %v", err)
	}
}

// chanceOrigin answers requests for /N with a body of N bytes, in pieces as chance will have it, and closes connections after an
// answer as chance will have it, too.
func chanceOrigin(t *testing.T, seed uint64) (addr string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for n := seed; ; n++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go answerByChance(c, rand.New(rand.NewPCG(seed, n)))
		}
	}()
	return l.Addr().String()
}

func answerByChance(c net.Conn, dice *rand.Rand) {
	defer c.Close()
	br := bufio.NewReader(c)
	for {
		r, err := http.ReadRequest(br)
		if err != nil {
			return
		}
		size, _ := strconv.Atoi(r.URL.Path[1:])
		head := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size)
		if dice.IntN(2) == 0 {
			head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
		}
		answer := []byte(head)
		if body := noise(size, byte(size)); strings.Contains(head, "chunked") {
			answer = fmt.Appendf(answer, "%x\r\n%s\r\n0\r\n\r\n", size, body)
			if size == 0 {
				answer = []byte(head + "0\r\n\r\n")
			}
		} else {
			answer = append(answer, body...)
		}
		writeByChance(c, answer, dice)
		if dice.IntN(20) == 0 {
			return
		}
	}
}

// writeByChance writes in one to four pieces.
func writeByChance(c net.Conn, p []byte, dice *rand.Rand) {
	for i := dice.IntN(4); i > 0 && len(p) > 1; i-- {
		n := 1 + dice.IntN(len(p)-1)
		c.Write(p[:n])
		p = p[n:]
		runtime.Gosched()
	}
	c.Write(p)
}

// Requests in fragments and trains of any cut, over upstream connections that close at any moment, are all answered, each with
// its own answer.
func TestRequestsByChance(t *testing.T) {
	const clients, rounds = 8, 60
	p, origin := startProxy(t, "LOG_SAMPLE=debug=0,info=0"), chanceOrigin(t, 11)
	var all sync.WaitGroup
	for i := range clients {
		all.Go(func() {
			dice := rand.New(rand.NewPCG(7, uint64(i)))
			c := p.dial(t)
			c.SetDeadline(time.Now().Add(4 * patience))
			for range rounds {
				var train []byte
				sizes := make([]int, 1+dice.IntN(8))
				for k := range sizes {
					sizes[k] = dice.IntN(3) * dice.IntN(40_000)
					train = fmt.Appendf(train, "GET http://%s/%d HTTP/1.1\r\nHost: %s\r\n\r\n", origin, sizes[k], origin)
				}
				go writeByChance(c.TCPConn, train, rand.New(rand.NewPCG(dice.Uint64(), 1)))
				for _, size := range sizes {
					resp, err := http.ReadResponse(c.br, nil)
					if err != nil {
						t.Errorf("client %d: %v", i, err)
						return
					}
					body, err := io.ReadAll(resp.Body)
					if resp.StatusCode != 200 || err != nil || !bytes.Equal(body, noise(size, byte(size))) {
						t.Errorf("client %d: %d, %d bytes of %d, %v", i, resp.StatusCode, len(body), size, err)
						return
					}
				}
			}
		})
	}
	all.Wait()
}

// TestPiecesAreAcknowledged: a peer that has not set TCP_NODELAY holds the rest of a message back until its beginning is acknowledged
// (Nagle's algorithm), and the kernel holds an acknowledgement back for 40 ms, at least, while an answer may be near to send it with.
// Even the quickest of many exchanges would take that long.
func TestPiecesAreAcknowledged(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("elsewhere the system decides when it acknowledges")
	}
	p := startProxy(t)
	post := []string{"POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nContent-Length: 5\r\n\r\n", "hello"}
	for name, pieces := range map[string]struct{ request, answer []string }{
		"body of a request":   {post, []string{plainAnswer}},
		"head of a request":   {[]string{"GET http://{o}/ HTTP/1.1\r\n", "Host: {o}\r\n\r\n"}, []string{plainAnswer}},
		"body of a response":  {[]string{plainRequest}, []string{strings.TrimSuffix(plainAnswer, "hi"), "hi"}},
		"head of a response":  {[]string{plainRequest}, []string{"HTTP/1.1 200 OK\r\n", strings.TrimPrefix(plainAnswer, "HTTP/1.1 200 OK\r\n")}},
		"chunk of a response": {[]string{plainRequest}, []string{"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n", "hi\r\n0\r\n\r\n"}},
		"both bodies":         {post, []string{strings.TrimSuffix(plainAnswer, "hi"), "hi"}},
	} {
		t.Run(name, func(t *testing.T) {
			o, c := startOrigin(t), p.dial(t)
			c.SetNoDelay(false)
			var up *peer
			quickest := patience
			for i := range 16 {
				begun := time.Now()
				for _, piece := range pieces.request {
					c.send("%s", o.fill(piece))
				}
				if up == nil {
					up = o.accept()
					up.SetNoDelay(false)
				}
				if up.head(); pieces.request[0] == post[0] {
					up.wants("hello")
				}
				for _, piece := range pieces.answer {
					up.send("%s", piece)
				}
				if resp, body := c.response("GET"); resp.StatusCode != 200 || body != "hi" {
					t.Fatalf("got %s, %q", resp.Status, body)
				}
				if i >= 4 { // the kernel acknowledges the first packets of a connection at once
					quickest = min(quickest, time.Since(begun))
				}
			}
			if quickest > 30*time.Millisecond {
				t.Errorf("the quickest exchange took %v", quickest)
			}
		})
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Responses that are refused

func TestMalformedResponses(t *testing.T) {
	p := startProxy(t, "MAX_HEADER=2KiB", "MAX_RESPONSE_BODY=1000")
	const ok = "HTTP/1.1 200 OK\r\n"
	const protocol, terminated, headSize, bodySize = "http_protocol_error", "connection_terminated", "http_response_header_section_size", "http_response_body_size"
	for _, e := range []struct{ name, answer, token, word string }{
		{"not HTTP", "220 mail.example ESMTP\r\n\r\n", protocol, ""},
		{"TLS alert", "\x15\x03\x01\x00\x02\x02\x46", protocol, ""},
		{"no status", "HTTP/1.1\r\n\r\n", protocol, ""},
		{"short status", "HTTP/1.1 20 OK\r\n\r\n", protocol, ""},
		{"long status", "HTTP/1.1 2000 OK\r\n\r\n", protocol, ""},
		{"signed status", "HTTP/1.1 +20 OK\r\n\r\n", protocol, ""},
		{"status below 100", "HTTP/1.1 099 OK\r\n\r\n", protocol, ""},
		{"two spaces", "HTTP/1.1  200 OK\r\n\r\n", protocol, ""},
		{"version 2.0", "HTTP/2.0 200 OK\r\n\r\n", protocol, ""},
		{"version in lower case", "http/1.1 200 OK\r\n\r\n", protocol, ""},
		{"control byte in reason", "HTTP/1.1 200 O\x00K\r\n\r\n", protocol, ""},
		{"bare CR in reason", "HTTP/1.1 200 OK\rSet-Cookie: a\r\n\r\n", protocol, ""},
		{"bare LF", "HTTP/1.1 200 OK\nContent-Length: 0\n\n", protocol, ""},
		{"bare LF in a field", ok + "A: b\nContent-Length: 0\r\n\r\n", protocol, ""},
		{"bare CR in a field", ok + "A: b\rContent-Length: 0\r\n\r\n", protocol, ""},
		{"length and chunked", ok + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", protocol, ""},
		{"gzip", ok + "Transfer-Encoding: gzip\r\n\r\n", protocol, ""},
		{"gzip, chunked", ok + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", protocol, ""},
		{"chunked twice", ok + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", protocol, ""},
		{"chunked in HTTP/1.0", "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", protocol, ""},
		{"differing lengths", ok + "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", protocol, ""},
		{"signed length", ok + "Content-Length: +5\r\n\r\nhello", protocol, ""},
		{"empty length", ok + "Content-Length:\r\n\r\nhello", protocol, ""},
		{"list of lengths", ok + "Content-Length: 5, 6\r\n\r\nhello", protocol, ""},
		{"overflowing length", ok + "Content-Length: 18446744073709551621\r\n\r\nhello", protocol, ""},
		{"folded differing length", ok + "Content-Length: 5\r\n 6\r\n\r\nhello", protocol, ""},
		{"invalid byte in a name", ok + "A\x00: b\r\n\r\n", protocol, ""},
		{"invalid byte in a value", ok + "A: b\x00\r\n\r\n", protocol, ""},
		{"no colon", ok + "A\r\n\r\n", protocol, ""},
		{"empty name", ok + ": b\r\n\r\n", protocol, ""},
		{"space before colon", ok + "Content-Length : 0\r\n\r\n", protocol, ""},
		{"begins with a fold", ok + " A: b\r\n\r\n", protocol, ""},
		{"an empty line before", "\r\n" + ok + "\r\n", protocol, ""},
		{"101 not asked for", "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", protocol, ""},
		{"head too large", ok + "A: " + strings.Repeat("b", 3000) + "\r\n\r\n", headSize, "SLUICE_MAX_HEADER"},
		{"many fields", ok + strings.Repeat("A:\r\n", 700) + "\r\n", headSize, "SLUICE_MAX_HEADER"},
		{"status line too large", "HTTP/1.1 200 " + strings.Repeat("b", 3000) + "\r\n\r\n", headSize, "SLUICE_MAX_HEADER"},
		{"body too large", ok + "Content-Length: 1001\r\n\r\n" + strings.Repeat("b", 1001), bodySize, "SLUICE_MAX_RESPONSE_BODY"},
		{"nothing", "", terminated, ""},
		{"half a status line", "HTTP/1.1 20", terminated, ""},
		{"half a head", ok + "Content-Length: 5\r\n", terminated, ""},
		{"only a 1xx", "HTTP/1.1 103 Early Hints\r\n\r\n", terminated, ""},
	} {
		t.Run(e.name, func(t *testing.T) {
			o, n, c := startOrigin(t), len(p.served()), p.dial(t)
			c.send("%s", o.fill(plainRequest))
			up := o.accept()
			up.wants(o.fill(plainWants))
			up.send("%s", e.answer)
			up.CloseWrite()
			if strings.HasPrefix(e.answer, "HTTP/1.1 103") {
				c.wants("HTTP/1.1 103 Early Hints\r\n" + viaOne + "\r\n")
			}
			c.wantsRefusal("GET", 502, e.token, e.word)
			wantsLogged(t, p.awaitServed(t, n), 502, e.token)
			up.wantsEnd()
		})
	}
	t.Run("reset", func(t *testing.T) {
		o, n, c := startOrigin(t), len(p.served()), p.dial(t)
		c.send("%s", o.fill(plainRequest))
		up := o.accept()
		up.wants(o.fill(plainWants))
		up.SetLinger(0)
		up.Close()
		c.wantsRefusal("GET", 502, terminated)
		wantsLogged(t, p.awaitServed(t, n), 502, terminated)
		o.wantsNone()
	})
	t.Run("HEAD", func(t *testing.T) {
		o, c := startOrigin(t), p.dial(t)
		c.send("%s", o.fill(strings.Replace(plainRequest, "GET", "HEAD", 1)))
		up := o.accept()
		up.head()
		up.Close()
		c.wantsRefusal("HEAD", 502, terminated)
		c.wantsInSync()
	})
	t.Run("limits met", func(t *testing.T) {
		o, c := startOrigin(t), p.dial(t)
		c.send("%s", o.fill(plainRequest))
		up := o.accept()
		up.head()
		up.send("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n%01000d", 7)
		if _, body := c.response("GET"); len(body) != 1000 {
			t.Errorf("%d bytes", len(body))
		}
	})
}

// TestBrokenResponseBodies breaks responses that have begun: the client can tell from the connection's end.
func TestBrokenResponseBodies(t *testing.T) {
	p := startProxy(t, "MAX_RESPONSE_BODY=1000")
	const chunked = "Transfer-Encoding: chunked\r\n"
	const protocol, terminated, bodySize = "http_protocol_error", "connection_terminated", "http_response_body_size"
	big := strings.Repeat("b", 1001)
	for _, e := range []struct {
		name, fields, rest string
		reset              bool
		token              string
	}{
		{"chunk size", chunked, "zz\r\nhello\r\n0\r\n\r\n", false, protocol},
		{"chunk too large", chunked, "fffffffffffffffff\r\nhello\r\n0\r\n\r\n", false, protocol},
		{"chunk with LF", chunked, "5\nhello\n0\n\n", false, protocol},
		{"no CRLF after data", chunked, "5\r\nhello0\r\n\r\n", false, protocol},
		{"bad trailer", chunked, "0\r\nA b: c\r\n\r\n", false, protocol},
		{"bare LF at the end", chunked, "0\r\n\n", false, protocol},
		{"chunk cut short", chunked, "9\r\nhello", false, terminated},
		{"no last chunk", chunked, "5\r\nhello\r\n", false, terminated},
		{"no end of trailers", chunked, "5\r\nhello\r\n0\r\nA: b\r\n", false, terminated},
		{"chunked reset", chunked, "5\r\nhello\r\n", true, terminated},
		{"length not met", "Content-Length: 100\r\n", "hello", false, terminated},
		{"length reset", "Content-Length: 100\r\n", "hello", true, terminated},
		{"chunked over the limit", chunked, "3e9\r\n" + big + "\r\n0\r\n\r\n", false, bodySize},
		{"close-delimited over the limit", "", big, false, bodySize},
		{"close-delimited reset", "", "hello", true, terminated},
	} {
		for _, version := range []string{"HTTP/1.1", "HTTP/1.0"} {
			t.Run(e.name+" to "+version, func(t *testing.T) {
				o, n, c := startOrigin(t), len(p.served()), p.dial(t)
				c.send("%s", o.fill("GET http://{o}/ "+version+"\r\nHost: {o}\r\n\r\n"))
				up := o.accept()
				up.head()
				up.send("HTTP/1.1 200 OK\r\n%s\r\n", e.fields)
				resp, err := http.ReadResponse(c.br, nil)
				if err != nil {
					t.Fatal(err)
				}
				up.send("%s", e.rest)
				if e.reset {
					up.SetLinger(0)
					up.Close()
				} else {
					up.CloseWrite()
				}
				if body, err := io.ReadAll(resp.Body); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("the client takes %q for everything (%v)", body, err)
				} else if len(body) > 1000 {
					t.Errorf("%d bytes have passed", len(body))
				}
				wantsLogged(t, p.awaitServed(t, n), 0, e.token)
				if !e.reset {
					up.wantsEnd()
				}
			})
		}
	}
}

// TestPoisonedConnection has origins send more than the answer: nothing of it may meet the next request.
func TestPoisonedConnection(t *testing.T) {
	p := startProxy(t)
	const poison = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"
	for name, answer := range map[string]string{
		"second response": "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi" + poison,
		"after chunks":    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n" + poison,
		"body of a 304":   "HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n" + poison,
		"body of a 204":   "HTTP/1.1 204 No Content\r\nContent-Length: 99\r\n\r\n" + poison,
	} {
		t.Run(name, func(t *testing.T) {
			o, c := startOrigin(t), p.dial(t)
			c.send("%s", o.fill(plainRequest))
			up := o.accept()
			up.head()
			up.send("%s", answer)
			c.response("GET")
			c.send("%s", o.fill(plainRequest))
			up = o.accept()
			up.wants(o.fill(plainWants))
			up.send(plainAnswer)
			if _, body := c.response("GET"); body != "hi" {
				t.Errorf("got %q", body)
			}
		})
	}
}

// An HTTP/1.0 client is told of a response's end by that of the connection: a response cut short ends in a reset, also when the
// connection is closed with care because the client's body has not been read.
func TestTruncationShows(t *testing.T) {
	for name, req := range map[string]string{"request read": "GET http://{o}/ HTTP/1.0\r\n\r\n", "request unread": "POST http://{o}/ HTTP/1.0\r\nContent-Length: 100\r\n\r\n0123456789"} {
		t.Run(name, func(t *testing.T) {
			p, o := startProxy(t), startOrigin(t)
			c := p.dial(t)
			c.send("%s", o.fill(req))
			up := o.accept()
			up.head()
			up.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
			c.head()
			c.wants("hello")
			up.Close()
			if b, err := io.ReadAll(c.br); err == nil {
				t.Errorf("a clean end after %q", b)
			}
		})
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Upgrade

const upgradeFields = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="

func TestUpgrade(t *testing.T) {
	whole := t
	p := startProxy(t)
	t.Run("websocket", func(t *testing.T) {
		o := originFor(t, whole)
		c := p.dial(t)
		c.send("%s", request("GET", "http://"+o.addr+"/chat", upgradeFields))
		up := o.accept()
		head := strings.ToLower(up.head())
		for _, want := range []string{"\r\nconnection: upgrade\r\n", "\r\nupgrade: websocket\r\n", "\r\nsec-websocket-key: dghl", "get /chat http/1.1\r\n"} {
			if !strings.Contains(head, want) {
				t.Errorf("no %q in %q", want, head)
			}
		}
		up.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n\x81\x05first")
		answer := c.head()
		for _, want := range []string{"HTTP/1.1 101 ", "\r\nUpgrade: websocket\r\n", "\r\nConnection: Upgrade\r\n", "\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"} {
			if !strings.Contains(answer, want) {
				t.Errorf("no %q in %q", want, answer)
			}
		}
		c.wants("\x81\x05first")
		for range 3 {
			c.send("\x81\x84maskping")
			up.wants("\x81\x84maskping")
			up.send("\x81\x04ping")
			c.wants("\x81\x04ping")
		}
		up.Close()
		c.wantsEnd()
		c.Close()
		wantsFields(t, p.recordFor(t, "request", o.addr), map[string]any{"http.response.status_code": 101.0, "http.request.body.size": 30.0,
			"http.response.body.size": 25.0, "close_reason": "upstream_closed", "level": "INFO", "url.path": "/chat"})
	})
	t.Run("answered with 200", func(t *testing.T) {
		o := originFor(t, whole)
		c := p.dial(t)
		c.send("%s", request("GET", "http://"+o.addr+"/", upgradeFields))
		up := o.accept()
		up.head()
		up.send("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nplain")
		if resp, body := c.response("GET"); resp.StatusCode != 200 || body != "plain" || resp.Close {
			t.Errorf("got %d %q", resp.StatusCode, body)
		}
		exchange1(c, o, up)
	})
	t.Run("h2c", func(t *testing.T) {
		o := originFor(t, whole)
		c := p.dial(t)
		c.send("%s", request("GET", "http://"+o.addr+"/", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"))
		up := o.accept()
		head := strings.ToLower(up.head())
		if strings.Contains(head, "upgrade") || strings.Contains(head, "http2-settings") {
			t.Errorf("passed on: %q", head)
		}
		up.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		c.response("GET")
		exchange1(c, o, up)
	})
	t.Run("101 unasked", func(t *testing.T) {
		o := originFor(t, whole)
		c := p.dial(t)
		c.send("%s", request("GET", "http://"+o.addr+"/"))
		up := o.accept()
		up.head()
		up.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		resp, body := c.response("GET")
		wantsRefusal(t, resp, body, 502, "http_protocol_error")
		up.wantsEnd()
	})
}

// ---------------------------------------------------------------------------------------------------------------------
// Tunnels

func TestTunnel(t *testing.T) {
	whole := t
	p := startProxy(t)
	t.Run("bytes both ways", func(t *testing.T) {
		o := originFor(t, whole)
		c, up := p.openTunnel(t, o)
		for i := range 20 {
			c.send("ping %d", i)
			up.wants(fmt.Sprintf("ping %d", i))
			up.send("pong %d", i)
			c.wants(fmt.Sprintf("pong %d", i))
		}
	})
	t.Run("large both ways at once", func(t *testing.T) {
		o := originFor(t, whole)
		c, up := p.openTunnel(t, o)
		toOrigin, toClient := noise(8<<20+1, 1), noise(9<<20+3, 2)
		sentUp, sentDown := c.sending(toOrigin, true), up.sending(toClient, true)
		received := make(chan []byte, 1)
		go func() { b, _ := io.ReadAll(up.br); received <- b }()
		sameBytes(t, "down", c.all(), toClient)
		sameBytes(t, "up", <-received, toOrigin)
		if err := <-sentUp; err != nil {
			t.Error(err)
		}
		if err := <-sentDown; err != nil {
			t.Error(err)
		}
		r := p.recordFor(t, "tunnel", o.addr)
		wantsFields(t, r, map[string]any{"http.request.body.size": float64(len(toOrigin)), "http.response.body.size": float64(len(toClient))})
		if why := r["close_reason"]; why != "client_closed" && why != "upstream_closed" {
			t.Errorf("close_reason %v", why)
		}
	})
	for _, n := range []int{1, 4000, 100_000} {
		t.Run(fmt.Sprintf("%d bytes right behind the head", n), func(t *testing.T) {
			o := originFor(t, whole)
			c := p.dial(t)
			early, late := noise(n, 3), noise(1000, 4)
			sent := c.sending(append([]byte(request("CONNECT", o.addr)), early...), false)
			up := o.accept()
			if head := c.head(); !strings.HasPrefix(head, "HTTP/1.1 200 ") {
				t.Fatalf("%q", head)
			}
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
			c.send("%s", late)
			c.CloseWrite()
			sameBytes(t, "up", up.all(), append(early, late...))
			up.Close()
			c.wantsEnd()
			wantsFields(t, p.recordFor(t, "tunnel", o.addr), map[string]any{"http.request.body.size": float64(n + 1000), "http.response.body.size": 0.0,
				"close_reason": "client_closed"})
		})
	}
	t.Run("the origin speaks first", func(t *testing.T) {
		o := originFor(t, whole)
		c := p.dial(t)
		c.send("CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", o.addr, o.addr)
		o.accept().send("220 welcome\r\n")
		if head := c.head(); !strings.HasPrefix(head, "HTTP/1.1 200 ") || strings.Contains(strings.ToLower(head), "content-length") || strings.Contains(strings.ToLower(head), "transfer-encoding") {
			t.Errorf("%q", head)
		}
		c.wants("220 welcome\r\n")
	})
	t.Run("HTTP/1.0", func(t *testing.T) {
		o := originFor(t, whole)
		c := p.dial(t)
		c.send("CONNECT %s HTTP/1.0\r\n\r\nhi", o.addr)
		up := o.accept()
		c.head()
		up.wants("hi")
	})
	t.Run("refused", func(t *testing.T) {
		addr := freeAddr(t)
		resp, body := p.dial(t).ask("CONNECT", addr)
		wantsRefusal(t, resp, body, 502, "connection_refused")
		wantsFields(t, p.recordFor(t, "tunnel", addr), map[string]any{"level": "WARN", "error.type": "connection_refused", "http.response.status_code": 502.0})
	})
	t.Run("bad targets", func(t *testing.T) {
		for _, target := range []string{"127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "http://127.0.0.1:80/", ":80", "ann:pw@127.0.0.1:80", "127.0.0.1:80/", "*"} {
			c := p.dial(t)
			c.send("CONNECT %s HTTP/1.1\r\nHost: any.test\r\n\r\n", target)
			resp, body := c.response("CONNECT")
			wantsRefusal(t, resp, body, 400, "http_request_error")
		}
	})
}

// Each side's end passes to the other side alone.
func TestTunnelEnds(t *testing.T) {
	whole := t
	p := startProxy(t)
	for _, c := range []struct {
		name   string
		end    func(client, origin *peer) (first, other *peer)
		reason string
	}{
		{"the client closes first", func(client, origin *peer) (*peer, *peer) { return client, origin }, "client_closed"},
		{"the origin closes first", func(client, origin *peer) (*peer, *peer) { return origin, client }, "upstream_closed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := originFor(t, whole)
			client, origin := p.openTunnel(t, o)
			first, other := c.end(client, origin)
			first.send("that is all")
			first.CloseWrite()
			if got := string(other.all()); got != "that is all" {
				t.Errorf("got %q", got)
			}
			for range 5 { // the other direction flows on
				other.send("more")
				first.wants("more")
			}
			big := noise(1<<20, 5)
			sent := other.sending(big, true)
			sameBytes(t, "after the half-close", first.all(), big)
			if err := <-sent; err != nil {
				t.Error(err)
			}
			up, down := 11.0, 20.0+1<<20
			if first == origin {
				up, down = down, up
			}
			wantsFields(t, p.recordFor(t, "tunnel", o.addr), map[string]any{"close_reason": c.reason, "http.request.body.size": up, "http.response.body.size": down,
				"level": "INFO", "http.response.status_code": 200.0})
		})
	}
	for _, resets := range []string{"client", "origin"} {
		t.Run("the "+resets+" resets", func(t *testing.T) {
			o := originFor(t, whole)
			client, origin := p.openTunnel(t, o)
			client.send("ping")
			origin.wants("ping")
			first, other := client, origin
			if resets == "origin" {
				first, other = origin, client
			}
			first.SetLinger(0)
			first.Close()
			if _, err := other.br.ReadByte(); err == nil || os.IsTimeout(err) || err == io.EOF {
				t.Errorf("the other side got %v, want a reset", err)
			}
			wantsFields(t, p.recordFor(t, "tunnel", o.addr), map[string]any{"close_reason": "connection_error", "http.request.body.size": 4.0})
		})
	}
	t.Run("a reset after a half-close is no plain end", func(t *testing.T) {
		o := originFor(t, whole)
		client, origin := p.openTunnel(t, o)
		client.CloseWrite()
		origin.wantsEnd()
		origin.send("half an answer")
		client.wants("half an answer")
		origin.SetLinger(0)
		origin.Close()
		if _, err := client.br.ReadByte(); err == nil || os.IsTimeout(err) || err == io.EOF {
			t.Errorf("the client got %v, want a reset", err)
		}
	})
}

// TestEndWithLastBytes: an end that comes together with bytes, of which the kernel tells once, is passed on as soon as they are.
func TestEndWithLastBytes(t *testing.T) {
	p, o := startProxy(t), startOrigin(t)
	for i := range 40 {
		c, up := p.openTunnel(t, o)
		from, to := c, up
		if i%2 == 1 {
			from, to = up, c
		}
		begun := time.Now()
		from.send("goodbye")
		from.CloseWrite()
		to.wants("goodbye")
		to.wantsEnd()
		if took := time.Since(begun); took > 500*time.Millisecond {
			t.Errorf("tunnel %d: the end came after %v", i, took)
		}
		c.Close()
		up.Close()
	}
}

// TestEndedTunnelsHoldNothing: thousands of tunnels a second begin and end in good order, so none may leave something behind for long.
func TestEndedTunnelsHoldNothing(t *testing.T) {
	p, o := startProxy(t, "LOG_SAMPLE=info=0,debug=0"), startOrigin(t)
	inUse := func(tunnels int) int64 {
		for range tunnels {
			c, up := p.openTunnel(t, o)
			c.CloseWrite()
			up.wantsEnd()
			up.Close()
			c.wantsEnd()
			c.Close()
		}
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := inUse(50)
	if grown := inUse(300) - before; grown > 750<<10 { // the test's own ends are 400 kB of that
		t.Errorf("300 tunnels that have ended hold %d bytes", grown)
	}
}

// TestMessagesAndFlows: what comes little at a time passes through a buffer, more through a pipe, and either may find the receiver full.
func TestMessagesAndFlows(t *testing.T) {
	p, o := startProxy(t), startOrigin(t)
	c, up := p.openTunnel(t, o)
	for _, end := range []*peer{c, up} {
		end.TCPConn.SetReadBuffer(32 << 10)
	}
	var total int
	for i, size := range []int{1, 100, bufferSize - 1, bufferSize, bufferSize + 1, 3, 200_000, 7, 3 << 20, 1, bufferSize, 12_000, 2} {
		data := noise(size, byte(i))
		total += size
		for _, way := range [][2]*peer{{c, up}, {up, c}} {
			sent, got := way[0].sending(data, false), make([]byte, size)
			if i%2 == 1 {
				time.Sleep(20 * time.Millisecond) // the receiver is full, for some sizes
			}
			if _, err := io.ReadFull(way[1].br, got); err != nil {
				t.Fatal(err)
			}
			sameBytes(t, fmt.Sprintf("%d bytes", size), got, data)
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
		}
	}
	c.Close()
	up.wantsEnd()
	up.Close()
	wantsFields(t, p.recordFor(t, "tunnel", o.addr), map[string]any{
		"http.request.body.size": float64(total), "http.response.body.size": float64(total), "close_reason": "client_closed"})
}

// The tunnels are opened together and then looked at one after the other, so that the limits run at the same time.
func TestTunnelTimeouts(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startProxy(t, "TUNNEL_IDLE_TIMEOUT=900ms", "TUNNEL_HALF_CLOSE_TIMEOUT=200ms", "TUNNEL_MAX_AGE=2s")
	origins := map[string]*testOrigin{}
	open := func(name string) (c, up *peer) {
		origins[name] = startOrigin(t)
		return p.openTunnel(t, origins[name])
	}
	begun := time.Now()
	wants := func(name, reason string, least, most time.Duration) {
		t.Helper()
		r := p.recordFor(t, "tunnel", origins[name].addr)
		lasted := time.Duration(r["duration_ms"].(float64) * float64(time.Millisecond))
		if r["close_reason"] != reason || lasted < least || lasted > most {
			t.Errorf("%s: close_reason %v after %v; want %s after %v to %v", name, r["close_reason"], lasted, reason, least, most)
		}
	}

	idleC, idleUp := open("idle")
	busyC, busyUp := open("bytes from the origin alone")
	halfC, halfUp := open("half-closed by the client")
	half2C, half2Up := open("half-closed by the origin")
	stuckC, stuckUp := open("half-closed, and the client does not read")
	halfC.CloseWrite()
	half2Up.CloseWrite()
	stuckC.CloseWrite()
	stuck := stuckUp.sending(make([]byte, 64<<20), false)
	var stop sync.WaitGroup
	stop.Go(func() { // the busy tunnel's origin sends until the tunnel is cut
		for err := error(nil); err == nil && time.Since(begun) < patience; time.Sleep(50 * time.Millisecond) {
			_, err = io.WriteString(busyUp, "x")
		}
	})

	halfUp.wantsEnd() // the half-close itself
	half2C.wantsEnd()
	wants("half-closed by the client", "half_close_timeout", 180*time.Millisecond, 800*time.Millisecond)
	wants("half-closed by the origin", "half_close_timeout", 180*time.Millisecond, 800*time.Millisecond)
	halfC.wantsEnd()
	wants("half-closed, and the client does not read", "half_close_timeout", 180*time.Millisecond, 800*time.Millisecond)
	if err := <-stuck; err == nil {
		t.Error("64 MiB were taken from an origin whose client does not read")
	}
	idleC.wantsEnd()
	idleUp.wantsEnd()
	wants("idle", "idle_timeout", 850*time.Millisecond, 1800*time.Millisecond)
	cpu, since := cpuTime(), time.Now()
	stop.Wait()
	if used, wall := cpuTime()-cpu, time.Since(since); used > wall/3 && wall > 200*time.Millisecond {
		t.Errorf("a tunnel whose one direction has been quiet for TUNNEL_IDLE_TIMEOUT took %v of CPU time in %v", used, wall)
	}
	if got, _ := io.ReadAll(busyC.br); len(got) < 10 {
		t.Errorf("%d bytes of the busy tunnel", len(got))
	}
	wants("bytes from the origin alone", "max_age", 1950*time.Millisecond, 3*time.Second)
}

// cpuTime is what this process has used so far, where /proc tells: fields 14 and 15 of proc_pid_stat(5), in ticks of 10 ms.
func cpuTime() time.Duration {
	stat, _ := os.ReadFile("/proc/self/stat")
	var user, system int64
	if i := bytes.LastIndexByte(stat, ')'); i > 0 {
		f := strings.Fields(string(stat[i+1:]))
		user, _ = strconv.ParseInt(f[11], 10, 64)
		system, _ = strconv.ParseInt(f[12], 10, 64)
	}
	return time.Duration(user+system) * 10 * time.Millisecond
}

// TUNNEL_IDLE_TIMEOUT is about a tunnel in which nothing moves in either direction, and about nothing else.
func TestTunnelIdleTimeoutIsNoOtherLimit(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startProxy(t, "TUNNEL_IDLE_TIMEOUT=1s") // with less, the test's own wait for a busy processor was an idle tunnel
	const pause = 2 * time.Second                // less than BODY_TIMEOUT
	big := noise(16<<20, 6)
	t.Run("one direction stalls while the other flows", func(t *testing.T) {
		o := startOrigin(t)
		c := p.dial(t)
		c.send("CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", o.addr, o.addr)
		up := o.accept()
		c.head()
		sent := up.sending(big, true)
		for begun := time.Now(); time.Since(begun) < pause; time.Sleep(30 * time.Millisecond) {
			c.send("x")
			up.wants("x")
		}
		got, err := io.ReadAll(c.br)
		if err != nil {
			t.Errorf("read: %v", err)
		}
		sameBytes(t, "down", got, big)
		<-sent
	})
	t.Run("a client that pauses in a response", func(t *testing.T) {
		o := startOrigin(t)
		c := p.dial(t)
		c.send("%s", request("GET", "http://"+o.addr+"/"))
		up := o.accept()
		up.head()
		up.send("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", len(big))
		sent := up.sending(big, false)
		c.head()
		time.Sleep(pause)
		got := make([]byte, len(big))
		n, err := io.ReadFull(c.br, got)
		if err != nil {
			t.Errorf("read: %v", err)
		}
		sameBytes(t, "body", got[:n], big)
		<-sent
	})
}

// In this process a tunnel has four ends: those of the client and the origin, and the proxy's two.
func TestIdleTunnelsHoldTwoDescriptors(t *testing.T) {
	if countFiles() == 0 {
		t.Skip("no /proc")
	}
	const tunnels = 200
	p := startProxy(t)
	o := startOrigin(t)
	files, pipes := countFiles(), openPipes()
	for i := range tunnels {
		c, up := p.openTunnel(t, o)
		data := noise(10_000+i, 7)
		sentUp, sentDown := c.sending(data, false), up.sending(data, false)
		c.wants(string(data))
		up.wants(string(data))
		<-sentUp
		<-sentDown
	}
	eventually(t, "pipes to be given back", func() bool { return openPipes()-pipes <= 160 })
	if n := countFiles() - files - (openPipes() - pipes); n > 4*tunnels+2 {
		t.Errorf("%d descriptors for %d tunnels", n, tunnels)
	}
}

// A tunnel outlives the limits of the messages that opened it, also over a connection that was used before.
func TestTunnelsOutliveOtherLimits(t *testing.T) {
	if !apart(t) {
		return
	}
	p, o := startProxy(t, "BODY_TIMEOUT=200ms", "RESPONSE_TIMEOUT=200ms", "IDLE_TIMEOUT=200ms", "HEADER_TIMEOUT=200ms"), startOrigin(t)
	ws := p.dial(t)
	up := exchange1(ws, o, nil)
	ws.send("GET http://%s/ HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", o.addr)
	up.head()
	up.send("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
	ws.head()
	c, end := p.openTunnel(t, o)
	for range 3 {
		time.Sleep(300 * time.Millisecond)
		for _, pair := range [][2]*peer{{c, end}, {end, c}, {ws, up}, {up, ws}} {
			pair[0].send("late")
			pair[1].wants("late")
		}
	}
}

// A half-close begins a wait of its own, however long the tunnel was quiet before.
func TestHalfCloseAfterQuiet(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startProxy(t, "TUNNEL_HALF_CLOSE_TIMEOUT=400ms")
	c, up := p.openTunnel(t, startOrigin(t))
	time.Sleep(600 * time.Millisecond) // longer than that wait
	c.CloseWrite()
	up.wantsEnd()
	up.send("answer")
	up.Close()
	if got, err := io.ReadAll(c.br); string(got) != "answer" {
		t.Errorf("got %q, %v", got, err)
	}
}

// Nothing waits in a goroutine of its own for a client or a tunnel that is idle, and both go on when bytes come.
func TestIdleConnectionsAreParked(t *testing.T) {
	if !apart(t) {
		return
	}
	if runtime.GOOS != "linux" {
		t.Skip("without epoll they are not")
	}
	const count = 20
	p, o := startProxy(t, "DRAIN_TIMEOUT=5s"), startOrigin(t)
	before := runtime.NumGoroutine()
	var clients, tunnels, ends, upstreams []*peer
	for range count {
		c, end := p.openTunnel(t, o)
		tunnels, ends = append(tunnels, c), append(ends, end)
	}
	for range count {
		c := p.dial(t)
		c.send("%s", request("GET", "http://"+o.addr+"/"))
		upstreams = append(upstreams, o.accept())
		clients = append(clients, c)
	}
	for i, up := range upstreams {
		up.head()
		up.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		clients[i].response("GET")
	}
	eventually(t, "goroutines to be given up", func() bool { return runtime.NumGoroutine() <= before })
	for i, c := range tunnels {
		c.send("up %d", i)
		ends[i].wants(fmt.Sprintf("up %d", i))
		ends[i].send("down %d", i)
		c.wants(fmt.Sprintf("down %d", i))
	}
	for _, c := range clients {
		c.send("%s", "OPTIONS http://any.test HTTP/1.1\r\nHost: any.test\r\nMax-Forwards: 0\r\n\r\n")
		c.response("OPTIONS")
	}
	eventually(t, "goroutines to be given up again", func() bool { return runtime.NumGoroutine() <= before })
	clients[0].Close() // is noticed
	ends[0].Close()
	tunnels[0].wantsEnd()
	tunnels[0].Close()
	for i := 1; i < count; i++ {
		tunnels[i].Close()
		ends[i].wantsEnd()
		ends[i].Close()
	}
	begun := time.Now()
	p.stop() // must find parked clients, too
	if took := time.Since(begun); took > 2*time.Second {
		t.Errorf("the drain of an idle proxy took %v", took)
	}
	clients[1].wantsEnd()
}

// A parked client is let go when its time is over, counted from its last request.
func TestParkedClientsEnd(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startProxy(t, "IDLE_TIMEOUT=1500ms")
	c := p.dial(t)
	begun := time.Now()
	c.wantsEnd()
	if took := time.Since(begun); took < 1400*time.Millisecond || took > 3*time.Second {
		t.Errorf("closed after %v", took)
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Answers that Sluice makes itself

// refusalCase is a request with the answer that it must get. {o} is an origin that is never dialled.
type refusalCase struct {
	name, request string
	status        int
	token         string
	words         []string
	dials         bool // {o} may be dialled
}

func (e refusalCase) run(t *testing.T, p *testProxy) {
	o, n, c := startOrigin(t), len(p.served()), p.dial(t)
	method, _, _ := strings.Cut(e.request, " ")
	c.SetReadDeadline(time.Now().Add(patience / 2))
	c.send("%s", o.fill(e.request))
	c.wantsRefusal(method, e.status, e.token, e.words...)
	r := p.awaitServed(t, n)
	wantsLogged(t, r, e.status, e.token)
	failed := e.token == "connection_refused" || e.token == "destination_ip_unroutable"
	if dialled := r["network.peer.address"] != nil; !e.dials && dialled != failed {
		t.Errorf("network.peer.address is %v", r["network.peer.address"])
	}
	if method == "CONNECT" {
		c.wantsEnd()
	}
}

// A connection beyond a limit is answered before it has said anything, by no goroutine of its own, and others go on.
func TestConnectionLimits(t *testing.T) {
	if !apart(t) {
		return
	}
	origin := serveAt(t, "127.0.0.1:0", nil)
	p := startProxy(t, "MAX_CONNS=4", "MAX_CONNS_PER_CLIENT=3")
	var served []*peer
	for range 3 {
		c := p.dial(t)
		c.ask("GET", "http://"+origin+"/")
		served = append(served, c)
	}
	p.awaitServed(t, 2) // a record may come later than the answer, and the next is looked for by its place
	goroutines := runtime.NumGoroutine()
	for n := range 30 {
		c := p.dial(t)
		if n%2 == 0 {
			c.send("%s", request("GET", "http://"+origin+"/")) // does not reset the answer
		}
		resp := c.wantsRefusal("GET", 503, tokenLimit, "3 connections from 127.0.0.1", "SLUICE_MAX_CONNS_PER_CLIENT")
		if !resp.Close {
			t.Error("no Connection: close")
		}
		c.wantsEnd()
	}
	if n := runtime.NumGoroutine(); n > goroutines+5 {
		t.Errorf("%d goroutines, %d before 30 connections were refused", n, goroutines)
	}
	from := func(addr string) *peer {
		c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(addr)}}).Dial("tcp", p.addr)
		if err != nil {
			t.Skip(addr, "is not here:", err)
		}
		return newPeer(t, c)
	}
	other := from("127.0.0.2")
	if resp, _ := other.ask("GET", "http://"+origin+"/"); resp.StatusCode != 200 {
		t.Errorf("another client: %s", resp.Status)
	}
	from("127.0.0.3").wantsRefusal("GET", 503, tokenLimit, "4 client connections", "SLUICE_MAX_CONNS)")
	if adminStatus(p.admin, "/readyz") != 200 || adminStatus(p.admin, "/healthz") != 200 {
		t.Error("admin does not answer at the limit")
	}
	served[0].Close()
	eventually(t, "room for one more", func() bool {
		resp, _ := p.dial(t).ask("GET", "http://"+origin+"/")
		return resp.StatusCode == 200
	})
	wantsLogged(t, p.awaitServed(t, 3), 503, tokenLimit)
}

// Who has one IPv6 address has 2^64 of them.
func TestIPv6ClientsAreCountedByPrefix(t *testing.T) {
	s := testServer(t, "MAX_CONNS_PER_CLIENT=1", "ALLOW_CLIENTS=all")
	enter := func(addr string) bool {
		c := &client{wire: wire{srv: s}, addr: netip.MustParseAddr(addr)}
		return c.enter() == nil
	}
	for _, e := range []struct {
		addr string
		in   bool
	}{{"2001:db8::1", true}, {"2001:db8::ffff:1", false}, {"2001:db8:0:1::1", true}, {"192.0.2.1", true}, {"192.0.2.2", true}, {"192.0.2.1", false}} {
		if enter(e.addr) != e.in {
			t.Errorf("%s: %v, want %v", e.addr, !e.in, e.in)
		}
	}
}

// MAX_TUNNELS counts WebSockets too, and nothing that has come to nothing.
// RATE is by client address, not by connection; a refusal says when to come again and costs no connection.
func TestRate(t *testing.T) {
	if !apart(t) {
		return
	}
	origin := serveAt(t, "127.0.0.1:0", nil)
	p := startProxy(t, "RATE=2", "RATE_BURST=3", "DENY_HOSTS=denied.test")
	first, second := p.dial(t), p.dial(t)
	first.ask("GET", "http://"+origin+"/")
	second.ask("GET", "http://"+origin+"/")
	second.ask("GET", "http://denied.test/") // counts, too
	second.send("%s", request("GET", "http://"+origin+"/"))
	resp := second.wantsRefusal("GET", 429, tokenDenied, "2 requests", "127.0.0.1", "SLUICE_RATE")
	if resp.Header.Get("Retry-After") != "1" || resp.Close {
		t.Errorf("Retry-After %q, close %v", resp.Header.Get("Retry-After"), resp.Close)
	}
	first.send("%s", request("CONNECT", origin))
	first.wantsRefusal("CONNECT", 429, tokenDenied)
	eventually(t, "a request that is allowed again", func() bool {
		resp, _ := second.ask("GET", "http://"+origin+"/")
		return resp.StatusCode == 200
	})
}

// The table of allowances is bounded, and forgets who has not asked for so long that the allowance is whole again.
func TestRatesAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := testServer(t, "RATE=10", "RATE_BURST=20")
		r := &s.limits.rates
		site := func(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}) }
		for n := range 1 << 15 {
			if wait := r.take(site(n)); wait != 0 {
				t.Fatalf("site %d waits %v for its first request", n, wait)
			}
		}
		if n := r.buckets.Len(); n != 1<<14 {
			t.Errorf("%d allowances", n)
		}
		hot := site(1 << 20)
		for n := range 25 {
			if wait := r.take(hot); (wait > 0) != (n >= 20) || wait > 100*time.Millisecond {
				t.Errorf("request %d waits %v", n, wait)
			}
		}
		time.Sleep(99 * time.Millisecond)
		if r.take(hot) == 0 {
			t.Error("a tenth of a second is not over")
		}
		time.Sleep(time.Millisecond)
		if r.take(hot) != 0 {
			t.Error("a refused request has cost something")
		}
		time.Sleep(2 * time.Second)
		r.take(site(1 << 21))
		if n := r.buckets.Len(); n != 1 {
			t.Errorf("%d allowances, 1 of which says something", n)
		}
	})
}

// Connections to one origin are counted whatever they do: carry a request, wait in the pool, or are a tunnel.
func TestConnsPerHost(t *testing.T) {
	p := startProxy(t, "MAX_CONNS_PER_HOST=1")
	o, closed, other := startOrigin(t), freeAddr(t), serveAt(t, "127.0.0.1:0", nil)
	c, late := p.dial(t), p.dial(t)
	c.send("%s", o.fill(plainRequest))
	up := o.accept()
	up.head()
	late.send("%s", o.fill(plainRequest))
	late.wantsRefusal("GET", 503, tokenLimit, "1 connections to "+o.addr, "SLUICE_MAX_CONNS_PER_HOST")
	if resp, _ := late.ask("GET", "http://"+other+"/"); resp.StatusCode != 200 {
		t.Errorf("another origin: %s", resp.Status)
	}
	up.send(plainAnswer)
	c.wants(plainGets)
	for range 3 { // what fails is not counted
		late.send("GET http://%s/ HTTP/1.1\r\nHost: a\r\n\r\n", closed)
		late.wantsRefusal("GET", 502, "connection_refused")
	}
	in, out := p.openTunnel(t, o) // takes the place of the connection in the pool
	up.wantsEnd()
	c.send("%s", o.fill(plainRequest))
	c.wantsRefusal("GET", 503, tokenLimit)
	in.Close()
	out.wantsEnd()
	out.Close()
	p.log.await(t, "tunnel", 1)
	eventually(t, "the tunnel's place to be free", func() bool {
		c.send("%s", o.fill(plainRequest))
		o.Listener.(*net.TCPListener).SetDeadline(time.Now().Add(200 * time.Millisecond))
		conn, err := o.Accept()
		if err != nil {
			c.wantsRefusal("GET", 503, tokenLimit)
			return false
		}
		up := newPeer(t, conn)
		up.head()
		up.send(plainAnswer)
		c.wants(plainGets)
		return true
	})
}

// A panic is answered, counted and ends its connection alone.
func TestPanic(t *testing.T) {
	s := testServer(t, "ALLOW_CIDRS=127.0.0.1", "ALLOW_PORTS=*", "NAME=sluice-test", "MAX_TUNNELS=5")
	s.openListeners(context.Background(), "127.0.0.1:0") // shares descriptors out
	names := s.names
	s.names = nil
	origin := serveAt(t, "127.0.0.1:0", nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	enter := func() *peer {
		near, _ := net.Dial("tcp", l.Addr().String())
		far, _ := l.Accept()
		c, f := s.newClient(far.(*net.TCPConn), netip.MustParseAddr("127.0.0.1"))
		if f != nil {
			t.Fatal(f)
		}
		go c.serve()
		return newPeer(t, near)
	}
	one, two := enter(), enter()
	for _, request := range []string{"GET http://name.test/ HTTP/1.1\r\nHost: a\r\n\r\n", "CONNECT name.test:443 HTTP/1.1\r\nHost: a\r\n\r\n"} {
		c := enter()
		c.send("%s", request)
		if resp := c.wantsRefusal("GET", 500, tokenInternal); !resp.Close {
			t.Error("no Connection: close")
		}
		c.wantsEnd()
	}
	if n := s.panics.Load(); n != 2 {
		t.Errorf("%d panics", n)
	}
	if resp, _ := one.ask("GET", "http://"+origin+"/"); resp.StatusCode != 200 {
		t.Errorf("another connection: %s", resp.Status)
	}
	s.names = names
	one.Close()
	two.Close()
	s.serving.Wait()
	if n := s.limits.tunnels.used[struct{}{}]; n != 0 {
		t.Errorf("%d tunnels are counted, none is open", n)
	}
}

// So is one of the goroutine that sends a request's body; what the request held is free again.
func TestPanicOfUpload(t *testing.T) {
	if !apart(t) {
		return
	}
	s := testServer(t, "ALLOW_CIDRS=127.0.0.1", "ALLOW_PORTS=*", "NAME=sluice-test", "MAX_CONNS_PER_HOST=1")
	s.openListeners(context.Background(), "127.0.0.1:0") // shares descriptors out
	fresh := s.exchanges.New
	s.exchanges.New = func() any {
		x := fresh().(*exchange)
		x.awaitClient = func() { panic("on purpose") }
		return x
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, _ := net.Dial("tcp", l.Addr().String())
	far, _ := l.Accept()
	c, _ := s.newClient(far.(*net.TCPConn), netip.MustParseAddr("127.0.0.1"))
	go c.serve()
	client, o := newPeer(t, near), startOrigin(t)
	client.send("POST http://%s/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n", o.addr)
	o.accept().head()
	client.wantsRefusal("POST", 500, tokenInternal)
	client.wantsEnd()
	s.serving.Wait()
	if s.panics.Load() != 1 || len(s.limits.hosts.used) != 0 {
		t.Errorf("%d panics, connections to origins: %v", s.panics.Load(), s.limits.hosts.used)
	}
}

// The allowance is that of now: neither requests that began earlier nor those that are refused at the same time change it.
func TestRateIsKept(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startProxy(t, "RATE=1", "RATE_BURST=2")
	ask := func(c *peer) int {
		resp, _ := c.ask("OPTIONS", "http://any.test", "Max-Forwards: 0")
		return resp.StatusCode
	}
	fast, slow := p.dial(t), []*peer{}
	for range 20 {
		c := p.dial(t)
		c.send("O") // begins now, and comes later
		slow = append(slow, c)
	}
	time.Sleep(2 * time.Second)
	begun, served := time.Now(), 0
	for ask(fast) == 200 {
		served++
	}
	for _, c := range slow {
		c.send("PTIONS http://any.test HTTP/1.1\r\nHost: any.test\r\nMax-Forwards: 0\r\n\r\n")
		if resp, _ := c.response("OPTIONS"); resp.StatusCode == 200 {
			served++
		}
		for ask(fast) == 200 {
			served++
		}
	}
	if most := 2 + 1 + int(time.Since(begun).Seconds()); served > most {
		t.Errorf("%d requests were served, %d may be", served, most)
	}

	s := testServer(t, "RATE=100", "RATE_BURST=1")
	site := netip.MustParseAddr("10.0.0.1")
	var granted, longest atomic.Int64
	var all sync.WaitGroup
	begun = time.Now()
	for range 8 {
		all.Go(func() {
			for time.Since(begun) < time.Second {
				if wait := s.limits.rates.take(site); wait == 0 {
					granted.Add(1)
				} else if int64(wait) > longest.Load() {
					longest.Store(int64(wait))
				}
			}
		})
	}
	all.Wait()
	took := time.Since(begun)
	if n := granted.Load(); n == 0 || float64(n) > 100*took.Seconds()+2 || longest.Load() > int64(20*time.Millisecond) {
		t.Errorf("%d were granted in %v at 100 a second, and somebody was to wait for %v", n, took, time.Duration(longest.Load()))
	}
}

// A request that comes while the drain closes idle connections is served, however long its origin takes.
func TestRequestAtTheEndOfTheGrace(t *testing.T) {
	if !apart(t) {
		return
	}
	var reached atomic.Int64
	origin := serveAt(t, "127.0.0.1:0", func(w http.ResponseWriter, r *http.Request) {
		reached.Add(1)
		time.Sleep(1500 * time.Millisecond)
		io.WriteString(w, "late")
	})
	p := startProxy(t, "DRAIN_TIMEOUT=4s", "MAX_CONNS=5000", "LOG_LEVEL=debug")
	const n = 300
	clients := []*peer{}
	for range n {
		clients = append(clients, p.dial(t))
	}
	p.log.await(t, "client connected", n)
	ended := make(chan bool)
	go func() { p.stop(); close(ended) }()
	p.log.await(t, "draining", 1)
	begun := time.Now()
	for i, c := range clients { // the grace takes 500 ms: the first come well before its end
		time.Sleep(time.Until(begun.Add(300*time.Millisecond + time.Duration(i)*time.Millisecond*4/5)))
		io.WriteString(c.TCPConn, request("GET", "http://"+origin+"/")) // some find it over
	}
	var served int64
	for _, c := range clients {
		if resp, err := http.ReadResponse(c.br, nil); err == nil && resp.StatusCode == 200 {
			served++
		}
	}
	<-ended
	if served == 0 || served < reached.Load() || strings.Contains(p.log.all(), "the client left") {
		t.Errorf("%d of %d requests came to the origin, %d were answered", reached.Load(), n, served)
	}
}

// Places are free when a client can tell that they are.
func TestPlacesAreFreeInTime(t *testing.T) {
	quiet := []string{"LOG_LEVEL=info", "LOG_SAMPLE=info=0,warn=0"}
	p := startProxy(t, append(quiet, "MAX_CONNS_PER_CLIENT=1")...)
	for i := range 500 {
		c, err := net.Dial("tcp", p.addr)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, "OPTIONS http://any.test HTTP/1.1\r\nHost: any.test\r\nMax-Forwards: 0\r\nConnection: close\r\n\r\n")
		if answer, _ := io.ReadAll(c); !strings.HasPrefix(string(answer), "HTTP/1.1 200") {
			t.Fatalf("connection %d, of one at a time: %q", i, answer)
		}
		c.Close()
	}
	origin := serveAt(t, "127.0.0.1:0", nil)
	p = startProxy(t, append(quiet, "MAX_CONNS_PER_HOST=1")...)
	a, b := p.dial(t), p.dial(t)
	for i := range 1000 {
		if resp, body := a.ask("GET", "http://"+origin+"/"); resp.StatusCode != 200 {
			t.Fatalf("request %d, of one at a time: %s %s", i, resp.Status, body)
		}
		a, b = b, a
	}
}

// The pool's idle connections do not keep descriptors from those that need them.
func TestPoolGivesDescriptorsBack(t *testing.T) {
	t.Parallel() // what is tested is a process of its own
	if runtime.GOOS != "linux" {
		t.Skip("there is a pool on Linux only")
	}
	l, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hi") })}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	_, port, _ := net.SplitHostPort(l.Addr().String())
	p := &testProxy{addr: startProcess(t, buildBinary(t), "NOFILE=256", "ALLOW_CIDRS=127.0.0.0/8", "ALLOW_PORTS=*", "LOG_SAMPLE=info=0", "LISTENERS=1").addr}
	c := p.dial(t)
	for i := range 260 {
		if resp, body := c.ask("GET", fmt.Sprintf("http://127.0.%d.%d:%s/", 1+i/200, 1+i%200, port)); resp.StatusCode != 200 {
			t.Fatalf("origin %d: %s %s", i, resp.Status, body)
		}
	}
}

// RESPONSE_TIMEOUT begins when the request is sent on, not when its head began to come.
func TestSlowHeadLeavesResponseItsTime(t *testing.T) {
	if !apart(t) {
		return
	}
	o := startOrigin(t)
	p := startProxy(t, "RESPONSE_TIMEOUT=500ms")
	c := p.dial(t)
	c.send("%s", o.fill(plainRequest))
	up := o.accept()
	up.wants(o.fill(plainWants))
	up.send(plainAnswer)
	c.wants(plainGets)
	if runtime.GOOS != "linux" {
		t.Skip("the connection is kept on Linux only")
	}
	c.send("G")
	time.Sleep(700 * time.Millisecond)
	c.send("%s", o.fill(plainRequest)[1:])
	up.wants(o.fill(plainWants))
	time.Sleep(100 * time.Millisecond)
	up.send(plainAnswer)
	c.wants(plainGets)
	if wait := p.metric(t, "sluice_response_wait_seconds_sum"); wait > 0.5 {
		t.Errorf("waits of %v s are counted", wait)
	}
}

// The request for a drain is answered before the drain takes the admin listener away.
func TestDrainIsAcknowledged(t *testing.T) {
	for range 20 {
		p := startProxy(t)
		if resp, _ := p.adminGet(t, "POST", "/drain", p.admin, "Content-Length: 0"); resp.StatusCode != 202 {
			t.Error(resp.Status)
		}
		p.stop()
	}
}

// Limits of a tunnel that are shorter than the time after which it is parked hold, too.
func TestShortTunnel(t *testing.T) {
	o := startOrigin(t)
	p := startProxy(t, "TUNNEL_MAX_AGE=200ms")
	c, _ := p.openTunnel(t, o)
	begun := time.Now()
	c.wantsEnd()
	if took := time.Since(begun); took < 150*time.Millisecond || took > 800*time.Millisecond {
		t.Errorf("ended after %v", took)
	}
}

// Each kind of shortage is told of, whatever was told of another.
func TestShortagesAreToldApart(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("Linux tells of them")
	}
	cfg, _, _ := loadConfig(nil)
	var sink logSink
	log := newLogger(cfg, &sink)
	s, _ := newServer(cfg, log)
	short := any(s).(interface{ sayShort(string, error) })
	for range 3 {
		short.sayShort("memory runs short", io.EOF)
		short.sayShort("accept failed", io.EOF)
	}
	s.close()
	log.close(time.Second)
	if n := len(sink.records(t)); n != 2 {
		t.Errorf("%d records", n)
	}
}

// When descriptors run out, those who come wait or are told so; admin answers, the log says it once, nothing spins, and all of it ends.
func TestDescriptorsRunOut(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("descriptors are reserved on Linux")
	}
	t.Parallel() // what is tested is a process of its own
	origin := serveAt(t, "127.0.0.1:0", nil)
	process := startProcess(t, buildBinary(t), "NOFILE=100", "MAX_CONNS=1000", "LISTENERS=1", "ALLOW_CIDRS=127.0.0.1", "ALLOW_PORTS=*", "LOG_SAMPLE=info=0")
	p, admin := &testProxy{addr: process.addr}, process.start["admin"].(string)
	var busy []*peer
	o := startOrigin(t)
	for range 40 { // each holds two
		c := p.dial(t)
		c.send("CONNECT %s HTTP/1.1\r\nHost: a\r\n\r\n", o.addr)
		busy = append(busy, c)
	}
	cpu := func() int {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", process.Process.Pid))
		fields := strings.Fields(string(text))
		user, _ := strconv.Atoi(fields[13])
		system, _ := strconv.Atoi(fields[14])
		return user + system
	}
	for range 100 {
		busy = append(busy, p.dial(t)) // the kernel's queue takes them
	}
	before := cpu()
	for range 10 {
		if status := adminStatus(admin, "/readyz"); status != 200 {
			t.Fatalf("/readyz: %d", status)
		}
		time.Sleep(50 * time.Millisecond) // what is measured is time
	}
	if spent := cpu() - before; spent > 10 {
		t.Errorf("%d0 ms of CPU time in half a second", spent)
	}
	for _, c := range busy {
		c.Close()
	}
	eventually(t, "a connection that is served again", func() bool {
		c := p.dial(t)
		defer c.Close()
		c.send("%s", request("GET", "http://"+origin+"/"))
		resp, err := http.ReadResponse(c.br, nil)
		return err == nil && resp.StatusCode == 200
	})
	process.Process.Signal(syscall.SIGTERM)
	rest, _ := io.ReadAll(process.lines)
	if n := strings.Count(string(rest), "accept failed"); n != 1 {
		t.Errorf("said %d times: %s", n, rest)
	}
}

func TestTunnelLimit(t *testing.T) {
	origin, closed := startOrigin(t), freeAddr(t)
	p := startProxy(t, "MAX_TUNNELS=2")
	for range 5 {
		n := len(p.served())
		if resp, _ := p.dial(t).ask("CONNECT", closed); resp.StatusCode != 502 {
			t.Errorf("%s", resp.Status)
		}
		c := p.dial(t)
		c.send("%s", request("GET", "http://"+origin.addr+"/", "Connection: Upgrade", "Upgrade: websocket"))
		up := origin.accept()
		up.head()
		up.send("%s", strings.Replace(plainAnswer, "\r\n", "\r\nConnection: close\r\n", 1)) // no upgrade
		if resp, _ := c.response("GET"); resp.StatusCode != 200 {
			t.Errorf("%s", resp.Status)
		}
		p.awaitServed(t, n+1) // by then it counts no more
	}
	first, firstUp := p.openTunnel(t, origin)
	socket := p.dial(t)
	socket.send("%s", request("GET", "http://"+origin.addr+"/", "Connection: Upgrade", "Upgrade: websocket"))
	socketUp := origin.accept()
	socketUp.head()
	socketUp.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	if head := socket.head(); !strings.HasPrefix(head, "HTTP/1.1 101 ") {
		t.Fatal(head)
	}
	third := p.dial(t)
	third.send("CONNECT %s HTTP/1.1\r\nHost: x\r\n\r\n", origin.addr)
	third.wantsRefusal("CONNECT", 503, tokenLimit, "2 tunnels", "SLUICE_MAX_TUNNELS")
	fourth := p.dial(t)
	fourth.send("%s", request("GET", "http://"+origin.addr+"/", "Connection: Upgrade", "Upgrade: websocket"))
	fourth.wantsRefusal("GET", 503, tokenLimit, "SLUICE_MAX_TUNNELS")
	exchangeOver(p.dial(t), origin, "")
	first.Close()
	firstUp.Close()
	p.log.await(t, "tunnel", 7) // five failed ones and the third before it
	_, up := p.openTunnel(t, origin)
	up.Close()
	socketUp.Close()
}

// cgroup2 tells whether cgroups are of version 2, which counts what waits in sockets as memory.
func cgroup2() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}

// smallContainer is a program that runs binary in a cgroup of 64 MiB; the test is skipped where none can be made.
func smallContainer(t *testing.T, binary string) string {
	t.Helper()
	parent, file := "/sys/fs/cgroup/memory", "memory.limit_in_bytes" // version 1
	if cgroup2() {
		parent, file = "/sys/fs/cgroup", "memory.max"
	}
	dir, err := os.MkdirTemp(parent, "sluice-test-")
	if err != nil {
		t.Skip("no cgroup can be made here:", err)
	}
	t.Cleanup(func() { eventually(t, "the cgroup to be empty", func() bool { return os.Remove(dir) == nil }) })
	if err := os.WriteFile(filepath.Join(dir, file), []byte("67108864"), 0o644); err != nil {
		t.Skip("no memory limit can be set here:", err)
	}
	script := filepath.Join(t.TempDir(), "start")
	os.WriteFile(script, []byte("#!/bin/sh\necho $$ > "+dir+"/cgroup.procs\nexec "+binary+"\n"), 0o755)
	return script
}

// A container of 64 MiB survives floods: the kernel would kill what takes more.
func TestFloodsInASmallContainer(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("Linux only")
	}
	t.Parallel() // what is tested is a process of its own
	big, over := bytes.Repeat([]byte{'x'}, 8<<20), make(chan struct{})
	origin := serveAt(t, "127.0.0.1:0", func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/stuck":
			<-over // that a client has left is not noticed while its body is not read
		case "/big":
			w.Write(big)
		default:
			io.Copy(io.Discard, r.Body)
		}
	})
	t.Cleanup(func() { close(over) })
	p := startProcess(t, smallContainer(t, buildBinary(t)), "ALLOW_CIDRS=127.0.0.1", "ALLOW_PORTS=*", "LOG_SAMPLE=info=0,warn=0", "LISTENERS=1")
	t.Cleanup(func() { p.Process.Kill(); <-p.ended })
	chunked := "POST http://" + origin + "/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
	for _, flood := range []struct {
		name  string
		conns int
		send  string
	}{
		{"connections", 2000, "G"},
		{"requests", 2000, request("GET", "http://"+origin+"/")},
		{"large heads", 900, "GET http://" + origin + "/ HTTP/1.1\r\nHost: a\r\nA: " + strings.Repeat("a", 60<<10)},
		{"large whole heads", 900, "GET http://" + origin + "/ HTTP/1.1\r\nHost: a\r\nA: " + strings.Repeat("a", 60<<10) + "\r\n\r\n"},
		{"chunks of one byte", 900, chunked + strings.Repeat("1\r\nx\r\n", 5000)},
		{"slow readers", 900, request("GET", "http://"+origin+"/big")},
		{"streams", 300, frames(250, 0, ":method", "GET", ":authority", origin, ":scheme", "http", ":path", "/stuck")},
		{"streams with large heads", 100, frames(50, 0, ":method", "GET", ":authority", origin, ":scheme", "http", ":path", "/stuck", "a", strings.Repeat("a", 60<<10))},
		{"streams of uploads that are not read", 100, frames(16, 1, ":method", "POST", ":authority", origin, ":scheme", "http", ":path", "/stuck")},
		{"streams of large responses that are not read", 100, frames(50, 0, ":method", "GET", ":authority", origin, ":scheme", "http", ":path", "/big")},
	} {
		conns := make([]net.Conn, flood.conns)
		var senders sync.WaitGroup
		for i := range conns {
			c, err := net.Dial("tcp", p.addr)
			if err != nil {
				t.Fatal(flood.name, err)
			}
			c.SetDeadline(time.Now().Add(patience))
			conns[i] = c
			senders.Go(func() { io.WriteString(c, flood.send) })
		}
		senders.Wait()
		t.Logf("%s: %d kB", flood.name, p.residentMemory()>>10)
		for _, c := range conns {
			c.Close()
		}
		p.awaitAnswer(t, origin, "the flood of "+flood.name)
	}
}

// awaitAnswer fails unless the process has outlived something and then, soon, forwards a request.
func (p *process) awaitAnswer(t *testing.T, origin, after string) {
	t.Helper()
	eventually(t, "an answer after "+after, func() bool {
		select {
		case err := <-p.ended:
			t.Fatalf("%s ended the process: %v", after, err)
		default:
		}
		c, err := net.Dial("tcp", p.addr)
		if err != nil {
			return false
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(time.Second))
		io.WriteString(c, request("GET", "http://"+origin+"/"))
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		return err == nil && resp.StatusCode == 200
	})
}

// Where the kernel counts what waits in sockets as a container's memory, peers that have read fast and stop do not have it killed: by
// itself it would keep 10 MB for each.
func TestSlowReadersInASmallContainer(t *testing.T) {
	if !cgroup2() {
		t.Skip("no cgroups of version 2") // CI has them in a guest
	}
	t.Parallel() // what is tested is a process of its own
	var stopped atomic.Bool
	block, over := make([]byte, 256<<10), make(chan struct{})
	origin := serveAt(t, "127.0.0.1:0", func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/big":
			for {
				if _, err := w.Write(block); err != nil {
					return
				}
			}
		case r.Method == "PUT":
			for b := make([]byte, len(block)); !stopped.Load(); {
				if _, err := r.Body.Read(b); err != nil {
					return
				}
			}
			<-over
		}
	})
	t.Cleanup(func() { close(over) })
	p := startProcess(t, smallContainer(t, buildBinary(t)), "ALLOW_CIDRS=127.0.0.1", "ALLOW_PORTS=*", "LOG_SAMPLE=info=0,warn=0")
	t.Cleanup(func() { p.Process.Kill(); <-p.ended })
	tunnel, get, put := request("CONNECT", origin), "GET /big HTTP/1.1\r\nHost: a\r\n\r\n", "Host: a\r\nContent-Length: 1000000000000\r\n\r\n"
	for _, readers := range []struct {
		name  string
		conns int
		send  string
	}{
		{"responses", 100, request("GET", "http://"+origin+"/big")},
		{"tunnels down", 100, tunnel + get},
		{"few tunnels down", 12, tunnel + get},
		{"uploads", 100, "PUT http://" + origin + "/ HTTP/1.1\r\n" + put},
		{"few uploads", 12, "PUT http://" + origin + "/ HTTP/1.1\r\n" + put},
		{"tunnels up", 100, tunnel + "PUT / HTTP/1.1\r\n" + put},
	} {
		stopped.Store(false)
		conns := make([]net.Conn, readers.conns)
		var moved atomic.Int64
		var clients sync.WaitGroup
		for i := range conns {
			conns[i] = dialTCP(t, p.addr)
		}
		for _, c := range conns {
			clients.Go(func() {
				io.WriteString(c, readers.send)
				move := c.Read
				if strings.Contains(readers.send, "PUT") {
					move = c.Write
				}
				for b := make([]byte, 64<<10); !stopped.Load(); {
					n, err := move(b)
					if moved.Add(int64(n)); err != nil {
						return
					}
				}
			})
		}
		begun := time.Now()
		eventually(t, "bytes to flow, so that windows grow", func() bool { return moved.Load() > 32<<20 && time.Since(begun) > time.Second })
		stopped.Store(true)
		time.Sleep(2 * time.Second) // they fill
		for _, c := range conns {
			c.Close()
		}
		clients.Wait()
		p.awaitAnswer(t, origin, "slow readers of "+readers.name)
	}
}

// When memory runs short, idle connections go, new ones are refused, and it is said once.
func TestMemoryRunsShort(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("Linux only")
	}
	t.Parallel()                                                                        // what is tested is a process of its own
	process := startProcess(t, buildBinary(t), "MEMORY_LIMIT=1MiB", "NAME=sluice-test") // less than it ever takes
	p := &testProxy{addr: process.addr}
	eventually(t, "a refusal", func() bool {
		c := p.dial(t)
		c.send("%s", request("GET", "http://192.0.2.1/"))
		resp, body := c.response("GET")
		return resp.StatusCode == 503 && strings.Contains(body, "SLUICE_MEMORY_LIMIT")
	})
	if status := adminStatus(process.start["admin"].(string), "/readyz"); status != 200 {
		t.Errorf("/readyz: %d", status)
	}
	time.Sleep(300 * time.Millisecond) // in which it is not said again
	process.Process.Signal(syscall.SIGTERM)
	rest, _ := io.ReadAll(process.lines)
	if n := strings.Count(process.early+string(rest), "memory runs short"); n != 1 {
		t.Errorf("said %d times: %s%s", n, process.early, rest)
	}
	s := testServer(t)
	if s.openListeners(context.Background(), "127.0.0.1:0"); len(s.listeners) == 0 {
		t.Fatal("no listener")
	}
	s.behind.Go(s.watcher.run)
	idle := dialTCP(t, serveAt(t, "127.0.0.1:0", nil))
	c, _ := s.newClient(idle, netip.MustParseAddr("127.0.0.1"))
	go c.serve()
	eventually(t, "the client to be parked", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.parked })
	any(s).(interface{ letGo() }).letGo() // which only Linux has
	s.serving.Wait()
}

// residentMemory is what a process holds, in bytes (proc(5): VmRSS).
func (p *process) residentMemory() int {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
	_, rest, _ := strings.Cut(string(text), "VmRSS:")
	kilobytes, _ := strconv.Atoi(strings.Fields(rest + " 0")[0])
	return kilobytes << 10
}

// The README says 3 kB for an idle client and 6 kB for an idle tunnel; with twice that and what a young process grows by it would be wrong.
func TestIdleConnectionsTakeLittle(t *testing.T) {
	if !apart(t) {
		return
	}
	if runtime.GOOS != "linux" {
		t.Skip("elsewhere they hold goroutines")
	}
	t.Parallel() // what is tested is a process of its own
	origin := serveAt(t, "127.0.0.1:0", nil)
	for method, most := range map[string]int{"GET": 6 << 10, "CONNECT": 12 << 10} {
		process := startProcess(t, buildBinary(t), "ALLOW_CIDRS=127.0.0.1", "ALLOW_PORTS=*", "LOG_SAMPLE=info=0")
		p, line := &testProxy{addr: process.addr}, request("GET", "http://"+origin+"/")
		if method == "CONNECT" {
			line = request("CONNECT", origin)
		}
		before, count := process.residentMemory()+1<<20, 1000
		for range count {
			c := dialTCP(t, p.addr)
			io.WriteString(c, line)
			if resp, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method}); err != nil || resp.StatusCode != 200 {
				t.Fatal(resp, err)
			}
		}
		each := 0
		for end := time.Now().Add(8 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) { // memory goes back late
			if each = (process.residentMemory() - before) / count; each <= most {
				break
			}
		}
		if t.Logf("%s: %d bytes each", method, each); each > most {
			t.Errorf("%s: %d bytes each, want %d at most", method, each, most)
		}
		process.Process.Kill()
	}
}

// MAX_CONNS comes from descriptors and memory, MEMORY_LIMIT from the cgroup.
func TestDerivedLimits(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("Linux only")
	}
	was := debug.SetMemoryLimit(-1)
	defer debug.SetMemoryLimit(was)
	files := (openFiles() - openFiles()/8 - 64) / 2
	for memory, want := range map[int64]int{math.MaxInt64: files, 64 << 20: min(files, 1024), 1 << 10: 1} {
		debug.SetMemoryLimit(memory)
		if got := connLimit(); got != want {
			t.Errorf("%d connections with %d bytes and %d files, want %d", got, memory, openFiles(), want)
		}
	}
	debug.SetMemoryLimit(was)
	binary := buildBinary(t)
	p := startProcess(t, binary, "MEMORY_LIMIT=64MiB")
	if r := p.start; r["memory_limit"] != float64(64<<20) || r["max_conns"] != float64(min(files, 1024)) {
		t.Errorf("with MEMORY_LIMIT=64MiB: %v", r)
	}
	p = startProcess(t, smallContainer(t, binary))
	if r := p.start; r["memory_limit"] != float64(40<<20) {
		t.Errorf("in a cgroup of 64 MiB: %v", r)
	}
	p.Process.Kill()
}

func TestSizeLimits(t *testing.T) {
	p := startProxy(t, "MAX_HEADER=2KiB", "MAX_REQUEST_BODY=1000")
	const post = "POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\n"
	long := strings.Repeat("b", 3000)
	for _, e := range []refusalCase{
		{name: "target", request: "GET http://{o}/" + long + " HTTP/1.1\r\nHost: {o}\r\n\r\n", status: 414, words: []string{"SLUICE_MAX_HEADER"}},
		{name: "target without an end", request: "GET http://{o}/" + long, status: 414, words: []string{"SLUICE_MAX_HEADER"}},
		{name: "field", request: get("A: " + long + "\r\n"), status: 431, words: []string{"SLUICE_MAX_HEADER"}},
		{name: "fields", request: get(strings.Repeat("A: b\r\n", 500)), status: 431, words: []string{"SLUICE_MAX_HEADER"}},
		{name: "fields without an end", request: "GET http://{o}/ HTTP/1.1\r\n" + strings.Repeat("A: b\r\n", 500), status: 431, words: []string{"SLUICE_MAX_HEADER"}},
		{name: "many short fields", request: get(strings.Repeat("A:\r\n", 400)), status: 431},
		{name: "length", request: post + "Content-Length: 1001\r\n\r\n" + strings.Repeat("b", 1001), status: 413, words: []string{"SLUICE_MAX_REQUEST_BODY"}},
		{name: "length alone", request: post + "Expect: 100-continue\r\nContent-Length: 9000000000000000000\r\n\r\n", status: 413, words: []string{"SLUICE_MAX_REQUEST_BODY"}},
		{name: "chunk", request: post + "Transfer-Encoding: chunked\r\n\r\n3e9\r\n" + strings.Repeat("b", 1001) + "\r\n0\r\n\r\n", status: 413, words: []string{"SLUICE_MAX_REQUEST_BODY"}, dials: true},
		{name: "chunks", request: post + "Transfer-Encoding: chunked\r\n\r\n" + strings.Repeat("1\r\nb\r\n", 1001) + "0\r\n\r\n", status: 413, words: []string{"SLUICE_MAX_REQUEST_BODY"}, dials: true},
	} {
		e.token = "http_request_error"
		t.Run(e.name, func(t *testing.T) { e.run(t, p) })
	}
	t.Run("chunks that come slowly", func(t *testing.T) {
		o, c := startOrigin(t), p.dial(t)
		c.send("%s", o.fill(post+"Transfer-Encoding: chunked\r\n\r\n"))
		up := o.accept()
		sent := bytes.NewBufferString(up.head())
		for range 10 {
			chunk := fmt.Sprintf("64\r\n%0100d\r\n", 0)
			c.send("%s", chunk)
			up.wants(chunk)
			sent.WriteString(chunk)
		}
		c.send("1\r\nb\r\n0\r\n\r\n%s", o.fill(plainRequest))
		c.wantsRefusal("POST", 413, "http_request_error", "SLUICE_MAX_REQUEST_BODY")
		c.wantsEnd()
		rest, _ := io.ReadAll(up.br)
		sent.Write(rest)
		if isMessage(sent.Bytes()) {
			t.Errorf("the origin got %q", sent.Bytes())
		}
	})
	exchangeCase{
		request: post + "Transfer-Encoding: chunked\r\n\r\n3e8\r\n" + strings.Repeat("b", 1000) + "\r\n0\r\n\r\n",
		wants:   "POST / HTTP/1.1\r\nHost: {o}\r\n" + viaOne + "Transfer-Encoding: chunked\r\n\r\n3e8\r\n" + strings.Repeat("b", 1000) + "\r\n0\r\n\r\n",
	}.run(t, p)
}

// TestTimeLimits lets each limit run out.
func TestTimeLimits(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startProxy(t, "HEADER_TIMEOUT=100ms", "RESPONSE_TIMEOUT=100ms", "BODY_TIMEOUT=100ms")
	for name, request := range map[string]string{"half a line": "GET http://{o}/", "half a head": "GET http://{o}/ HTTP/1.1\r\nHost: {o}\r\n"} {
		t.Run(name, func(t *testing.T) {
			refusalCase{request: request, status: 408, token: "http_request_error", words: []string{"SLUICE_HEADER_TIMEOUT"}}.run(t, p)
		})
	}
	t.Run("head byte by byte", func(t *testing.T) {
		n, c := len(p.served()), p.dial(t)
		answered := make(chan struct{})
		var sending sync.WaitGroup
		sending.Add(1)
		go func() {
			defer sending.Done()
			for {
				io.WriteString(c.TCPConn, "A")
				select {
				case <-answered:
					return
				case <-time.After(10 * time.Millisecond):
				}
			}
		}()
		begun := time.Now()
		c.wantsRefusal("GET", 408, "http_request_error", "SLUICE_HEADER_TIMEOUT")
		if took := time.Since(begun); took > time.Second {
			t.Errorf("took %v", took)
		}
		close(answered)
		sending.Wait()
		p.awaitServed(t, n)
	})
	t.Run("response", func(t *testing.T) {
		o, n, c := startOrigin(t), len(p.served()), p.dial(t)
		c.send("%s", o.fill(plainRequest))
		up := o.accept()
		up.head()
		c.wantsRefusal("GET", 504, "http_response_timeout", "SLUICE_RESPONSE_TIMEOUT")
		wantsLogged(t, p.awaitServed(t, n), 504, "http_response_timeout")
		up.wantsEnd()
	})
	t.Run("response to a body", func(t *testing.T) {
		o, n, c := startOrigin(t), len(p.served()), p.dial(t)
		c.send("%s", o.fill("POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nTransfer-Encoding: chunked\r\n\r\n"))
		up := o.accept()
		up.head()
		c.send("0\r\n\r\n")
		up.wants("0\r\n\r\n")
		up.send("HTTP/1.1 103 Early Hints\r\n\r\n")
		c.wants("HTTP/1.1 103 Early Hints\r\n" + viaOne + "\r\n")
		c.wantsRefusal("POST", 504, "http_response_timeout", "SLUICE_RESPONSE_TIMEOUT")
		wantsLogged(t, p.awaitServed(t, n), 504, "http_response_timeout")
		up.wantsEnd()
	})
	for name, fields := range map[string]string{"length": "Content-Length: 100\r\n", "large length": "Content-Length: 1000000\r\n", "chunked": "Transfer-Encoding: chunked\r\n", "close": ""} {
		t.Run("response body, "+name, func(t *testing.T) {
			o, n, c := startOrigin(t), len(p.served()), p.dial(t)
			c.send("%s", o.fill(plainRequest))
			up := o.accept()
			up.head()
			up.send("HTTP/1.1 200 OK\r\n%s\r\n5\r\nhello\r\n", fields)
			resp, err := http.ReadResponse(c.br, nil)
			if err != nil {
				t.Fatal(err)
			}
			if body, err := io.ReadAll(resp.Body); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the client takes %q for everything (%v)", body, err)
			}
			r := p.awaitServed(t, n)
			wantsLogged(t, r, 200, "http_response_timeout")
			if why, _ := r["error.message"].(string); !strings.Contains(why, "SLUICE_BODY_TIMEOUT") {
				t.Errorf("the log says %q", why)
			}
			up.wantsEnd()
		})
	}
	for name, body := range map[string]string{"length": "Content-Length: 100\r\n\r\nhello", "large length": "Content-Length: 1000000\r\n\r\nhello", "chunked": "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"} {
		t.Run("request body, "+name, func(t *testing.T) {
			o, n, c := startOrigin(t), len(p.served()), p.dial(t)
			c.send("%s", o.fill("POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\n"+body))
			c.wantsRefusal("POST", 408, "http_request_error", "SLUICE_BODY_TIMEOUT")
			c.wantsEnd()
			wantsLogged(t, p.awaitServed(t, n), 408, "http_request_error")
			sent, _ := io.ReadAll(o.accept().br)
			if isMessage(sent) || !strings.Contains(string(sent), "hello") {
				t.Errorf("the origin got %q", sent)
			}
		})
	}
}

// A body that stalls is given up after its limit, no matter how it is moved: deadlines that fire early are not a new beginning.
func TestStalledBodies(t *testing.T) {
	const limit = 400 * time.Millisecond
	p := startProxy(t, "HEADER_TIMEOUT=10s", "RESPONSE_TIMEOUT="+limit.String(), "BODY_TIMEOUT="+limit.String())
	var wg sync.WaitGroup
	for n := range 16 {
		o, c := startOrigin(t), p.dial(t)
		size := 1000 << (n % 2 * 8) // through a buffer, or in the kernel
		if n%4 < 2 {
			c.send("%s", o.fill(plainRequest))
			up := o.accept()
			up.head()
			up.send("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\nhello", size)
		} else {
			c.send("%s", o.fill(fmt.Sprintf("POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nContent-Length: %d\r\n\r\nhello", size)))
			o.accept().head()
		}
		wg.Go(func() {
			begun := time.Now()
			io.ReadAll(c.br)
			if took := time.Since(begun); took > limit*3/2 {
				t.Errorf("size %d, %d: it took %v", size, n, took)
			}
		})
		time.Sleep(3 * time.Millisecond) // each in another phase of its timers
	}
	wg.Wait()
}

// A link that goes away says nothing to either side: each wait ends by its limit, and is freed.
func TestLinkLoss(t *testing.T) {
	if !inNamespace(t, "--net", "ip link set lo up") {
		return
	}
	link := func(state string) {
		if out, err := exec.Command("ip", "link", "set", "lo", state).CombinedOutput(); err != nil {
			t.Fatalf("%v, %s", err, out)
		}
	}
	p := startProxy(t, "RESPONSE_TIMEOUT=300ms", "BODY_TIMEOUT=300ms", "TUNNEL_IDLE_TIMEOUT=300ms", "ADMIN=off")
	waiting, answering, taking, far := startOrigin(t), startOrigin(t), startOrigin(t), startOrigin(t)
	p.dial(t).send("%s", waiting.fill(plainRequest))
	waiting.accept().head()
	reader := p.dial(t)
	reader.send("%s", answering.fill(plainRequest))
	up := answering.accept()
	up.head()
	up.send("HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nhello")
	reader.head()
	p.dial(t).send("%s", taking.fill("POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nContent-Length: 1000000\r\n\r\nhello"))
	taking.accept().head()
	p.openTunnel(t, far)
	link("down")
	begun := time.Now()
	wantsLogged(t, p.recordFor(t, "request", waiting.addr), 504, "http_response_timeout")
	wantsLogged(t, p.recordFor(t, "request", answering.addr), 200, "http_response_timeout")
	wantsLogged(t, p.recordFor(t, "request", taking.addr), 408, "http_request_error")
	wantsFields(t, p.recordFor(t, "tunnel", far.addr), map[string]any{"close_reason": "idle_timeout"})
	if took := time.Since(begun); took > 2*time.Second {
		t.Errorf("it took %v", took)
	}
	link("up")
	if resp, _ := p.dial(t).ask("GET", "http://"+serveAt(t, "127.0.0.1:0", nil)+"/"); resp.StatusCode != 200 {
		t.Errorf("when the link is back: %s", resp.Status)
	}
}

// TestDestinations refuses ports, addresses, and what leads back to the proxy, to requests and to CONNECT alike.
func TestDestinations(t *testing.T) {
	p := startProxy(t, "ALLOW_CIDRS=", "ALLOW_PORTS=80,1024-65535")
	closed := startOrigin(t)
	_, port, _ := net.SplitHostPort(closed.addr)
	own, admin := p.addr[strings.LastIndex(p.addr, ":"):], p.admin[strings.LastIndex(p.admin, ":"):]
	cases := []struct {
		to     string
		status int
		token  string
		word   string
	}{
		{"192.0.2.1:81", 403, "http_request_denied", "SLUICE_ALLOW_PORTS"},
		{"host.invalid:1023", 403, "http_request_denied", "SLUICE_ALLOW_PORTS"},
		{p.addr, 502, "proxy_loop_detected", ""},
		{p.admin, 502, "proxy_loop_detected", ""},
		{"localhost" + own, 502, "proxy_loop_detected", ""},
		{"LOCALHOST." + admin, 502, "proxy_loop_detected", ""},
		{"0.0.0.0" + own, 502, "proxy_loop_detected", ""},
		{"[::ffff:127.0.0.1]" + own, 502, "proxy_loop_detected", ""},
	}
	for _, host := range []string{"127.0.0.1", "127.0.0.1.", "127.1.2.3", "localhost", "LocalHost.", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
		"100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
		"[::]", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::ffff:10.0.0.1]", "[::127.0.0.1]", "[::7f00:1]", "[64:ff9b::127.0.0.1]", "[64:ff9b::a00:1]", "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]",
		"[2002:a00:1::1]", "[fe80::1]", "[fec0::1]", "[fc00::1]", "[fd00:ec2::254]", "[ff02::1]", "[2001:db8::1]", "[2001::1]", "[100::1]"} {
		cases = append(cases, struct {
			to     string
			status int
			token  string
			word   string
		}{host + ":" + port, 403, "destination_ip_prohibited", "SLUICE_ALLOW_CIDRS"})
	}
	for _, e := range cases {
		words := []string{e.word}
		t.Run("GET "+e.to, func(t *testing.T) {
			refusalCase{request: "GET http://" + e.to + "/ HTTP/1.1\r\nHost: a\r\n\r\n", status: e.status, token: e.token, words: words}.run(t, p)
		})
		t.Run("CONNECT "+e.to, func(t *testing.T) {
			refusalCase{request: "CONNECT " + e.to + " HTTP/1.1\r\nHost: a\r\n\r\n" + plainRequest, status: e.status, token: e.token, words: words}.run(t, p)
		})
	}
	closed.wantsNone()
}

// TestLoopsAndFailures covers what fails on the way to an allowed origin, for requests and CONNECT.
func TestLoopsAndFailures(t *testing.T) {
	p := startProxy(t, "ALLOW_CIDRS=127.0.0.0/8,255.255.255.255/32")
	const gone = "127.0.0.1:1" // nobody listens there; the port of an origin that has closed may come again
	for _, e := range []refusalCase{
		{name: "own name in Via", request: get("Via: 1.1 sluice-test\r\n"), status: 502, token: "proxy_loop_detected", words: []string{"SLUICE_NAME"}},
		{name: "own name among others", request: get("Via: 1.0 a, HTTP/1.1 Sluice-Test (b)\r\nVia: 1.1 c\r\n"), status: 502, token: "proxy_loop_detected"},
		{name: "own name in a second Via", request: get("Via: 1.1 a\r\nVia: 1.1\tsluice-test\r\n"), status: 502, token: "proxy_loop_detected"},
		{name: "CONNECT with own name in Via", request: "CONNECT {o} HTTP/1.1\r\nHost: {o}\r\nVia: 1.1 sluice-test\r\n\r\n" + plainRequest, status: 502, token: "proxy_loop_detected"},
		{name: "refused", request: strings.ReplaceAll(plainRequest, "{o}", gone), status: 502, token: "connection_refused", words: []string{gone}},
		{name: "CONNECT refused", request: "CONNECT " + gone + " HTTP/1.1\r\nHost: a\r\n\r\n" + plainRequest, status: 502, token: "connection_refused"},
		{name: "unroutable", request: "GET http://255.255.255.255:80/ HTTP/1.1\r\nHost: a\r\n\r\n", status: 502, token: "destination_ip_unroutable"},
		{name: "CONNECT unroutable", request: "CONNECT 255.255.255.255:80 HTTP/1.1\r\nHost: a\r\n\r\n", status: 502, token: "destination_ip_unroutable"},
		{name: "CONNECT without port", request: "CONNECT 127.0.0.1 HTTP/1.1\r\nHost: a\r\n\r\n" + plainRequest, status: 400, token: "http_request_error"},
		{name: "CONNECT with port 0", request: "CONNECT 127.0.0.1:0 HTTP/1.1\r\nHost: a\r\n\r\n" + plainRequest, status: 400, token: "http_request_error"},
		{name: "CONNECT with a URL", request: "CONNECT http://{o}/ HTTP/1.1\r\nHost: a\r\n\r\n" + plainRequest, status: 400, token: "http_request_error"},
		{name: "CONNECT with a path", request: "CONNECT {o}/ HTTP/1.1\r\nHost: a\r\n\r\n" + plainRequest, status: 400, token: "http_request_error"},
		{name: "CONNECT with user info", request: "CONNECT u@{o} HTTP/1.1\r\nHost: a\r\n\r\n" + plainRequest, status: 400, token: "http_request_error"},
		{name: "CONNECT to a short address", request: "CONNECT 127.1:443 HTTP/1.1\r\nHost: a\r\n\r\n" + plainRequest, status: 400, token: "http_request_error"},
		{name: "CONNECT without Host", request: "CONNECT {o} HTTP/1.1\r\n\r\n" + plainRequest, status: 400, token: "http_request_error"},
		{name: "connect in lower case", request: "connect {o} HTTP/1.1\r\nHost: a\r\n\r\n" + plainRequest, status: 400, token: "http_request_error"},
	} {
		t.Run(e.name, func(t *testing.T) { e.run(t, p) })
	}
}

// TestRefusalsAreNotDestroyed has clients read a refusal only when all of a large body is sent: bytes that the proxy left
// unread would have reset the connection (RFC 9112, 9.6).
func TestRefusalsAreNotDestroyed(t *testing.T) {
	p := startProxy(t, "MAX_REQUEST_BODY=4MiB")
	const gone, size = "127.0.0.1:1", 4 << 20
	body := strings.Repeat("GET http://127.0.0.1:9/ HTTP/1.1\r\nHost: a\r\n\r\n", size/48+1)
	for name, e := range map[string]struct {
		request, token string
		status         int
	}{
		"length":    {fmt.Sprintf("POST http://%s/ HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n", gone, size), "connection_refused", 502},
		"chunked":   {fmt.Sprintf("POST http://%s/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n", gone, size), "connection_refused", 502},
		"malformed": {"GET /a HTTP/1.1\r\nHost: a\r\n\r\n", "http_request_error", 400},
		"too large": {fmt.Sprintf("POST http://%s/ HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n", gone, size+1), "http_request_error", 413},
		"CONNECT":   {fmt.Sprintf("CONNECT %s HTTP/1.1\r\nHost: a\r\n\r\n", gone), "connection_refused", 502},
	} {
		t.Run(name, func(t *testing.T) {
			c := p.dial(t)
			c.send("%s", e.request+body)
			c.wantsRefusal("POST", e.status, e.token)
			if b, err := c.br.ReadByte(); err != io.EOF {
				t.Errorf("then %q, %v", b, err)
			}
		})
	}
}

// TestNameFailures resolves names by a resolver of the test's own.
func TestNameFailures(t *testing.T) {
	dns := startHostileDNS(t)
	dns.set("servfail.test", func(q *dnsQuery) { q.answer.RCode = dnsmessage.RCodeServerFailure })
	dns.set("silent.test", func(q *dnsQuery) { q.raw = silence })
	for name, addrs := range map[string]string{"a10-0-0-1.test": "10.0.0.1", "a10-0-0-1a169-254-169-254.test": "10.0.0.1 169.254.169.254", "a0-0-0-0.test": "0.0.0.0",
		"a127-0-0-1.test": "127.0.0.1", "a10-0-0-1a127-0-0-1.test": "10.0.0.1 127.0.0.1"} {
		dns.set(name, func(q *dnsQuery) { q.give(strings.Fields(addrs)...) })
	}
	p := startProxy(t, "DNS_SERVERS="+dns.addr, "DNS_TIMEOUT=200ms")
	o := startOrigin(t)
	_, port, _ := net.SplitHostPort(o.addr)
	for _, e := range []struct {
		name   string
		status int
		token  string
		word   string
	}{
		{"nosuch.test", 502, "dns_error", "nosuch.test"},
		{"servfail.test", 502, "dns_error", "servfail.test"},
		{"silent.test", 504, "dns_timeout", "SLUICE_DNS_TIMEOUT"},
		{"a10-0-0-1.test", 403, "destination_ip_prohibited", "SLUICE_ALLOW_CIDRS"},
		{"a10-0-0-1a169-254-169-254.test", 403, "destination_ip_prohibited", "SLUICE_ALLOW_CIDRS"},
		{"a0-0-0-0.test", 403, "destination_ip_prohibited", "SLUICE_ALLOW_CIDRS"},
	} {
		for _, request := range []string{"GET http://%s/ HTTP/1.1\r\nHost: a\r\n\r\n", "CONNECT %s HTTP/1.1\r\nHost: a\r\n\r\n"} {
			t.Run(e.name, func(t *testing.T) {
				refusalCase{request: fmt.Sprintf(request, e.name+".:"+port), status: e.status, token: e.token, words: []string{e.word}}.run(t, p)
			})
		}
	}
	for _, name := range []string{"a127-0-0-1.test", "a10-0-0-1a127-0-0-1.test"} { // forbidden addresses are left out
		c := p.dial(t)
		c.send("GET http://%s.:%s/ HTTP/1.1\r\nHost: a\r\n\r\n", name, port)
		up := o.accept()
		up.head()
		up.send(plainAnswer)
		c.wants(plainGets)
	}
}

// TestDraining serves what has begun when the drain's grace is over, and opens no more tunnels then.
func TestDraining(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startProxy(t, "DRAIN_TIMEOUT=5s")
	o := startOrigin(t)
	c, tunnel := p.dial(t), p.dial(t)
	c.send("%s", o.fill("GET http://{o}/ HTTP/1.1\r\n"))
	tunnel.send("%s", o.fill("CONNECT {o} HTTP/1.1\r\n"))
	served := p.dial(t)
	served.send("%s", o.fill(plainRequest))
	up := o.accept()
	up.head()
	idle := p.dial(t)
	idle.wantsInSync()
	c.send("A: b\r\n")
	begun := make(chan struct{})
	go func() {
		defer close(begun)
		p.stop()
	}()
	p.log.await(t, "draining", 1)
	idle.wantsEnd() // the grace is over
	c.send("Host: a\r\n\r\n")
	late := o.accept()
	late.head()
	late.send(plainAnswer)
	if resp, _ := c.response("GET"); resp.StatusCode != 200 || !resp.Close {
		t.Errorf("got %s, close: %v", resp.Status, resp.Close)
	}
	c.wantsEnd()
	tunnel.send("Host: a\r\n\r\n")
	tunnel.wantsRefusal("CONNECT", 503, "connection_limit_reached", "drain")
	tunnel.wantsEnd()
	up.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi") // the one that is under way is served
	if resp, body := served.response("GET"); body != "hi" || !resp.Close {
		t.Errorf("got %s, %q, close: %v", resp.Status, body, resp.Close)
	}
	served.wantsEnd()
	tunnel.Close()
	c.Close()
	<-begun
}

// TestManyFieldsAreNotALimitOfBytes: the answer to a head of too many fields does not advise to raise a limit that has not been met.
func TestManyFieldsAreNotALimitOfBytes(t *testing.T) {
	p, o := startProxy(t), startOrigin(t)
	c := p.dial(t)
	c.send("%s", o.fill(get(strings.Repeat("A: b\r\n", 300))))
	resp, body := c.response("GET")
	wantsRefusal(t, resp, body, 431, "http_request_error")
	if all := body + resp.Header.Get("Proxy-Status"); strings.Contains(all, "MAX_HEADER") || !strings.Contains(body, "256") {
		t.Errorf("it says %q", all)
	}
	o.wantsNone()
}

// TestNoHeaderTimeout: with HEADER_TIMEOUT=0 a head that has begun may take any time; IDLE_TIMEOUT is for when none has.
func TestNoHeaderTimeout(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startProxy(t, "HEADER_TIMEOUT=0", "IDLE_TIMEOUT=300ms")
	cuts := []int{1, 9, len("GET http://127.0.0.1:12345/ HTTP/1.1\r\n")} // after a byte, half a line, half a head
	origins, clients, ups := make([]*testOrigin, len(cuts)), make([]*peer, len(cuts)), make([]*peer, len(cuts))
	for i := range cuts {
		origins[i], clients[i] = startOrigin(t), p.dial(t)
	}
	for range 2 { // also on a connection that has been idle
		for i, cut := range cuts {
			clients[i].send("%s", origins[i].fill(plainRequest)[:cut])
		}
		time.Sleep(600 * time.Millisecond)
		for i, cut := range cuts {
			clients[i].send("%s", origins[i].fill(plainRequest)[cut:])
			if ups[i] == nil {
				ups[i] = origins[i].accept()
			}
			ups[i].wants(origins[i].fill(plainWants))
			ups[i].send(plainAnswer)
			clients[i].wants(plainGets)
		}
	}
	begun := time.Now()
	for _, c := range clients {
		c.wantsEnd()
	}
	if took := time.Since(begun); took < 200*time.Millisecond || took > 2*time.Second {
		t.Errorf("idle for %v", took)
	}
}

// TestProxyStatusIsASCII: Proxy-Status is a structured field, whose strings are ASCII (RFC 8941, 3.3.3), whatever unit a limit is in.
func TestProxyStatusIsASCII(t *testing.T) {
	p, o := startProxy(t, "RESPONSE_TIMEOUT=500us"), startOrigin(t)
	c := p.dial(t)
	c.send("%s", o.fill(plainRequest))
	o.accept()
	status := c.wantsRefusal("GET", 504, "http_response_timeout", "SLUICE_RESPONSE_TIMEOUT").Header.Get("Proxy-Status")
	for _, b := range []byte(status) {
		if b < ' ' || b > '~' {
			t.Fatalf("Proxy-Status: %q", status)
		}
	}
	if !strings.Contains(status, "500us") {
		t.Errorf("Proxy-Status: %q does not say how long", status)
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Logs

// TestRecordOfMalformedRequest tells what was read before the fault.
func TestRecordOfMalformedRequest(t *testing.T) {
	p := startProxy(t)
	c := p.dial(t)
	c.send("GET http://origin.test/ HTTP/1.1\r\nHost: a b\r\n\r\n")
	c.wantsRefusal("GET", 400, "http_request_error", "Host is invalid")
	wantsFields(t, p.log.await(t, "request", 1), map[string]any{"server.address": "origin.test", "network.protocol.version": "1.1"})
}

func TestRecords(t *testing.T) {
	origin := serveAt(t, "127.0.0.1:0", func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		fmt.Fprintf(w, "%d bytes", n)
	})
	const trace = "4bf92f3577b34da6a3ce929d0e0e4736"
	p := startProxy(t)
	c := p.dial(t)
	for i := range 2 {
		c.send("POST http://%s/a/b?token=s3cret HTTP/1.1\r\nHost: %s\r\nTransfer-Encoding: chunked\r\ntraceparent: 00-%s-00f067aa0ba902b7-01\r\n\r\n5;x\r\nhello\r\n3\r\nyou\r\n0\r\n\r\n",
			origin, origin, trace)
		if resp, body := c.response("POST"); resp.StatusCode != 200 || body != "8 bytes" {
			t.Fatalf("got %d %q", resp.StatusCode, body)
		}
		r := p.log.await(t, "request", i+1)
		wantsFields(t, r, map[string]any{"level": "INFO", "client.address": "127.0.0.1", "http.request.method": "POST", "url.scheme": "http",
			"server.address": "127.0.0.1", "server.port": portOf(origin), "url.path": "/a/b", "network.protocol.version": "1.1", "network.peer.address": "127.0.0.1",
			"http.response.status_code": 200.0, "http.request.body.size": 8.0, "http.response.body.size": 7.0, "upstream_reused": i == 1, "trace_id": trace})
		wantsRecordShape(t, r)
		for _, absent := range []string{"url.query", "error.type", "error.message", "close_reason"} {
			if v, ok := r[absent]; ok {
				t.Errorf("%s: %v", absent, v)
			}
		}
	}
	o := startOrigin(t)
	c = p.dial(t)
	c.send("%s", request("CONNECT", o.addr, "traceparent: 00-"+trace+"-00f067aa0ba902b7-01"))
	up := o.accept()
	c.head()
	c.send("12345")
	up.wants("12345")
	up.send("123")
	c.wants("123")
	c.Close()
	up.wantsEnd()
	up.Close()
	r := p.log.await(t, "tunnel", 1)
	wantsFields(t, r, map[string]any{"level": "INFO", "client.address": "127.0.0.1", "http.request.method": "CONNECT", "server.address": "127.0.0.1",
		"server.port": portOf(o.addr), "network.protocol.version": "1.1", "network.peer.address": "127.0.0.1", "http.response.status_code": 200.0,
		"http.request.body.size": 5.0, "http.response.body.size": 3.0, "close_reason": "client_closed", "trace_id": trace})
	wantsRecordShape(t, r)

	addr := freeAddr(t)
	resp, _ := p.dial(t).ask("GET", "http://"+addr+"/")
	if resp.StatusCode != 502 {
		t.Errorf("status %d", resp.StatusCode)
	}
	r = p.recordFor(t, "request", addr)
	wantsFields(t, r, map[string]any{"level": "WARN", "error.type": "connection_refused", "http.response.status_code": 502.0})
	if text, _ := r["error.message"].(string); !strings.Contains(text, "refused") {
		t.Errorf("error.message %q", text)
	}
	wantsRecordShape(t, r)
	p.log.await(t, "client connected", 3)
	if strings.Contains(p.log.all(), "s3cret") {
		t.Error("a query string was logged")
	}
}

func portOf(addr string) float64 { return float64(netip.MustParseAddrPort(addr).Port()) }

// wantsRecordShape checks what holds for every record of a request or tunnel.
func wantsRecordShape(t *testing.T, r map[string]any) {
	t.Helper()
	if d, ok := r["duration_ms"].(float64); !ok || d < 0 || d > 60_000 {
		t.Errorf("duration_ms: %#v", r["duration_ms"])
	}
	if at, err := time.Parse(time.RFC3339Nano, fmt.Sprint(r["time"])); err != nil || time.Since(at) > time.Minute {
		t.Errorf("time: %v", r["time"])
	}
	for name, v := range r {
		switch v.(type) {
		case string, float64, bool:
		default:
			t.Errorf("%s is not flat: %#v", name, v)
		}
	}
}

// What clients send never breaks a record, and what they must keep secret never gets into one.
func TestHostileRequestsInLogs(t *testing.T) {
	origin := serveAt(t, "127.0.0.1:0", nil)
	p := startProxy(t)
	get := "GET http://" + origin
	const end = " HTTP/1.1\r\nHost: x.test\r\n\r\n"
	for _, raw := range []string{
		get + `/a"b\c%0a%00<x>` + "`{}|^'" + end,
		get + "/\x1b[31mred\x07" + end,
		get + "/\xff\xfe\xc3" + end,
		get + "/line\nbreak" + end,
		get + "/cr\rbreak" + end,
		get + "/nul\x00" + end,
		"GET http://ho\"st\x00.test/" + end,
		"GET http://ann:topsecret@" + origin + "/" + end,
		"GET https://ann:topsecret@" + origin + "/" + end,
		"GET ftp://ann:topsecret@" + origin + "/" + end,
		"GET http://ann:topsecret@" + origin + "/#f" + end,
		"GET http://127.0.0.1:99999/?q=topsecret" + end,
		"GET /?q=topsecret" + end,
		"CONNECT ann:topsecret@" + origin + end,
		"TRACE http://" + origin + "/ HTTP/1.1\r\nHost: x.test\r\nMax-Forwards: 0\r\nAuthorization: Bearer topsecret\r\n\r\n",
		get + "/ HTTP/1.1\r\nHost: x.test\r\nProxy-Authorization: Basic dG9wc2VjcmV0\r\nAuthorization: Bearer topsecret\r\nCookie: id=topsecret\r\n\r\n",
		get + "/ HTTP/1.1\r\nHost: x.test\r\nProxy-Authorization: Basic dG9wc2VjcmV0\r\nBad Field: topsecret\r\n\r\n",
		get + "/ HTTP/1.1\r\nHost: x.test\r\nProxy-Authorization : Basic dG9wc2VjcmV0\r\n\r\n",
		"GET http://" + origin + "/?q=topsecret HTTP/1.1\r\nHost: ann:topsecret@x.test\r\n\r\n",
		"GET http://127.0.0.1:1/?q=topsecret" + end,
		"G\"T http://" + origin + "/" + end,
		"GET\\\x7f http://" + origin + "/" + end,
		"\x16\x03\x01\x02\x00topsecret" + end,
		"M" + strings.Repeat("X", 5000) + " http://" + origin + "/" + end,
		get + "/" + strings.Repeat("long", 3000) + end,
	} {
		c := p.dial(t)
		c.send("%s", raw)
		c.CloseWrite()
		if answer, err := io.ReadAll(c.br); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 ") {
			t.Errorf("%q: got %q, %v", raw, answer, err)
		}
	}
	p.stop()
	n := 0
	for _, r := range p.log.records(t) { // that each line is JSON is checked there
		if r["msg"] == "request" || r["msg"] == "tunnel" {
			n++
			wantsRecordShape(t, r)
		}
	}
	if n != 25 {
		t.Errorf("%d records for 25 requests", n)
	}
	log := p.log.all()
	for _, secret := range []string{"topsecret", "dG9wc2VjcmV0"} {
		if i := strings.Index(log, secret); i >= 0 {
			t.Errorf("logged: %q", log[max(0, i-200):i+20])
		}
	}
	if r := p.log.await(t, "request", 1); r["url.path"] != `/a"b\c%0a%00<x>`+"`{}|^'" {
		t.Errorf("url.path %q", r["url.path"])
	}
	for line := range strings.Lines(log) {
		if strings.ContainsFunc(strings.TrimSuffix(line, "\n"), func(r rune) bool { return r < ' ' || r == 0x7f || r == 0xfffd }) || len(line) > 8<<10 {
			t.Errorf("control bytes or %d bytes in a line: %.300q", len(line), line)
		}
	}
}

// What clients choose is told in part, also by audit mode, and no record or failure keeps the whole of it in memory.
func TestLongRequestsAreToldInPart(t *testing.T) {
	p := startProxy(t, "MODE=audit", "ALLOW_HOSTS=origin.test")
	p.dial(t).ask("M"+strings.Repeat("X", 60_000), "http://127.0.0.1:1/")
	if n := len(p.log.await(t, "would deny", 1)["http.request.method"].(string)); n != 1024 {
		t.Errorf("the record's method has %d bytes", n)
	}
	s := testServer(t, "LOG_QUERY=true")
	heap := func() int {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc)
	}
	before, told := heap(), [][]slog.Attr{}
	for range 20 {
		x := &exchange{summary: summary{srv: s, c: &client{}, dst: destination{host: []byte("origin.test")}}}
		x.method, x.target = bytes.Repeat([]byte("M"), 1<<20), append(bytes.Repeat([]byte("/"), 1<<20), "?query"...)
		f := fail(502, tokenProtocol, "of the origin").because(errors.New(strings.Repeat("x", 1<<20)))
		x.describe(f)
		s.metrics.note(&x.summary, f)
		told = append(told, x.attrs)
	}
	if n := heap() - before; n > 10<<20 {
		t.Errorf("%d bytes are kept of 20 requests", n)
	}
	runtime.KeepAlive(told)
}

func TestTraceID(t *testing.T) {
	p := startProxy(t)
	const id, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
	for i, c := range []struct{ traceparent, want string }{
		{"00-" + id + "-" + parent + "-01", id},
		{"00-" + id + "-" + parent + "-00", id},
		{"cc-" + id + "-" + parent + "-01-what-the-future-will-be-like", id},
		{"00-" + id + "-" + parent, ""},
		{"00-" + strings.Repeat("0", 32) + "-" + parent + "-01", ""},
		{"00-" + id + "-" + strings.Repeat("0", 16) + "-01", ""},
		{"00-" + strings.Repeat("z", 32) + "-" + parent + "-01", ""},
		{"00-" + strings.ToUpper(id) + "-" + parent + "-01", ""},
		{"ff-" + id + "-" + parent + "-01", ""},
		{"zz-" + id + "-" + parent + "-01", ""},
		{"00-" + id + "-" + parent + "-01-more", ""},
		{"00_" + id + "_" + parent + "_01", ""},
		{id, ""},
		{"", ""},
	} {
		p.dial(t).ask("OPTIONS", "http://any.test", "Max-Forwards: 0", "Traceparent: "+c.traceparent)
		if got, _ := p.log.await(t, "request", i+1)["trace_id"].(string); got != c.want {
			t.Errorf("%q: trace_id %q, want %q", c.traceparent, got, c.want)
		}
	}
}

func TestLogQuery(t *testing.T) {
	origin := serveAt(t, "127.0.0.1:0", nil)
	p := startProxy(t, "LOG_QUERY=true")
	c := p.dial(t)
	for i, want := range []struct{ target, path, query string }{{"/p?a=1&b=%20?", "/p", "a=1&b=%20?"}, {"/p", "/p", ""}, {"/?only", "/", "only"}} {
		c.ask("GET", "http://"+origin+want.target)
		r := p.log.await(t, "request", i+1)
		query, _ := r["url.query"].(string)
		if r["url.path"] != want.path || query != want.query {
			t.Errorf("%s: path %q, query %q", want.target, r["url.path"], query)
		}
	}
}

func TestLogSample(t *testing.T) {
	for _, c := range []struct {
		sample      string
		least, most int // info records of 400 requests
	}{{"info=0", 0, 0}, {"info=0.5", 130, 270}, {"debug=0,info=1", 400, 400}} {
		t.Run(c.sample, func(t *testing.T) {
			p := startProxy(t, "LOG_SAMPLE="+c.sample)
			client := p.dial(t)
			one := request("OPTIONS", "http://any.test", "Max-Forwards: 0")
			sent := client.sending([]byte(strings.Repeat(one, 400)), false)
			for range 400 {
				client.response("OPTIONS")
			}
			<-sent
			for range 5 {
				p.dial(t).ask("GET", "/") // refused with 400
			}
			p.stop()
			levels := map[any]int{}
			for _, r := range p.log.records(t) {
				if r["msg"] == "request" {
					levels[r["level"]]++
				}
			}
			if levels["WARN"] != 5 || levels["INFO"] < c.least || levels["INFO"] > c.most {
				t.Errorf("%v; want 5 WARN and %d to %d INFO", levels, c.least, c.most)
			}
			p.log.await(t, "stopped", 1)
		})
	}
}

func TestLogLevelAndFormat(t *testing.T) {
	t.Run("warn", func(t *testing.T) {
		var log logSink
		p, stop := runProxy(t, &log, "LOG_LEVEL=warn")
		p.dial(t).ask("OPTIONS", "http://any.test", "Max-Forwards: 0")
		p.dial(t).ask("GET", "/")
		stop()
		records := log.records(t)
		if len(records) != 1 || records[0]["level"] != "WARN" || records[0]["http.response.status_code"] != 400.0 {
			t.Errorf("%v", records)
		}
	})
	t.Run("text", func(t *testing.T) {
		var log logSink
		origin := serveAt(t, "127.0.0.1:0", nil)
		p, stop := runProxy(t, &log, "LOG_FORMAT=text")
		p.dial(t).ask("GET", "http://"+origin+`/path"with"quotes=1?x`, "traceparent: \xff\x80")
		stop()
		text := log.all()
		if !strings.Contains(text, "request") || !strings.Contains(text, "http.response.status_code=200") || strings.HasPrefix(text, "{") || strings.Contains(text, "\x1b") {
			t.Errorf("%q", text)
		}
		if n := strings.Count(text, "\n"); n != 5 { // listening, request, draining, destinations, stopped
			t.Errorf("%d lines: %q", n, text)
		}
	})
}

// On a terminal the log is text in colour, unless NO_COLOR is set.
func TestLogOnTerminal(t *testing.T) {
	script, err := exec.LookPath("script") // of util-linux: runs a command on a terminal
	if err != nil || runtime.GOOS != "linux" {
		t.Skip("there is no script(1)")
	}
	binary := buildBinary(t)
	for set, coloured := range map[string]bool{"A=1": true, "NO_COLOR=1": false} {
		cmd := exec.Command(script, "-qec", "timeout -s TERM 0.5 "+binary+"; true", "/dev/null")
		cmd.Env = append(os.Environ(), set, "SLUICE_LISTEN=127.0.0.1:0", "SLUICE_ADMIN=off", "SLUICE_TUNE=off")
		out, err := cmd.CombinedOutput()
		if text := string(out); err != nil || !strings.Contains(text, "listening") || strings.HasPrefix(text, "{") || strings.Contains(text, "\x1b[") != coloured {
			t.Errorf("%s: %v, %q", set, err, text)
		}
	}
}

// A stdout that nobody reads any more is no reason to stop.
func TestClosedStdout(t *testing.T) {
	origin := serveAt(t, "127.0.0.1:0", nil)
	process := startProcess(t, buildBinary(t), "ALLOW_CIDRS=127.0.0.1", "ALLOW_PORTS=*")
	process.stdout.Close()
	p := &testProxy{addr: process.addr}
	for range 20 {
		if resp, _ := p.dial(t).ask("GET", "http://"+origin+"/"); resp.StatusCode != 200 {
			t.Fatal(resp.Status)
		}
	}
	process.Process.Signal(syscall.SIGTERM)
	process.wantsExit(t, patience)
}

// stuckWriter blocks until its gate is closed.
type stuckWriter struct {
	logSink
	gate chan struct{}
}

func (w *stuckWriter) Write(p []byte) (int, error) {
	<-w.gate
	return w.logSink.Write(p)
}

func TestBlockedStdout(t *testing.T) {
	log := &stuckWriter{gate: make(chan struct{})}
	release := sync.OnceFunc(func() { close(log.gate) })
	p, _ := runProxy(t, log, "LOG_BUFFER=10")
	t.Cleanup(release) // before the proxy is stopped
	c := p.dial(t)
	begun := time.Now()
	for range 100 {
		if resp, _ := c.ask("OPTIONS", "http://any.test", "Max-Forwards: 0"); resp.StatusCode != 200 {
			t.Fatalf("status %d", resp.StatusCode)
		}
	}
	if took := time.Since(begun); took > 2*time.Second {
		t.Errorf("100 requests took %v", took)
	}
	if log.all() != "" {
		t.Fatal("the writer did not block")
	}
	release()
	var written, dropped int
	eventually(t, "the number of dropped records", func() bool {
		written, dropped = 0, 0
		for _, r := range log.records(t) {
			if r["msg"] == "request" {
				written++
			} else if strings.Contains(fmt.Sprint(r["msg"]), "dropped") {
				n, _ := r["count"].(float64)
				dropped += int(n)
			}
		}
		return written+dropped == 100
	})
	if written > 11 || written < 1 { // the last request's record may come when there is room again
		t.Errorf("%d written, %d dropped with LOG_BUFFER=10", written, dropped)
	}
}

// Clients choose much of a record, and nobody may read stdout: what waits is bounded by bytes, too, and what a burst took is given back.
func TestLongRecordsWait(t *testing.T) {
	for limit, most := range map[int64]int{math.MaxInt64: 8192 * 512, 32 << 20: 2 << 20} {
		out, cfg := &stuckWriter{gate: make(chan struct{})}, &config{LogBuffer: 8192, LogFormat: "json", MaxHeader: 1 << 16}
		log := newLogger(cfg, out)
		before := debug.SetMemoryLimit(limit)
		s, err := newServer(cfg, log)
		debug.SetMemoryLimit(before)
		if err != nil {
			t.Fatal(err)
		}
		log.process.Info("short")
		eventually(t, "the writer to be stuck", func() bool { log.mu.Lock(); defer log.mu.Unlock(); return len(log.waiting.text) == 0 })
		long := strings.Repeat("x", 3000)
		for range 8000 {
			log.process.Info(long)
		}
		log.mu.Lock()
		waiting, room := len(log.waiting.text), cap(log.waiting.text)
		log.mu.Unlock()
		if waiting < most-4096 || waiting > most+4096 || room > 2*most {
			t.Errorf("with a limit of %d, %d bytes wait, in %d; want %d", limit, waiting, room, most)
		}
		close(out.gate)
		written, dropped := int64(0), int64(0)
		for i := range int64(3) { // each of these takes the other buffer
			eventually(t, "the records to be written", func() bool {
				written, dropped = log.count(rank(slog.LevelInfo))
				return written+dropped == 8001+i
			})
			log.process.Info("short")
		}
		s.close()
		log.close(time.Second)
		if room = cap(log.waiting.text); room > 1<<20 {
			t.Errorf("%d bytes are kept for what waits", room)
		}
		if n := int64(strings.Count(out.all(), long)); written != n+3 || dropped != 8000-n {
			t.Errorf("%d long records came; counted: %d written, %d dropped", n, written, dropped)
		}
	}
}

// Drops are told of whatever LOG_LEVEL is, and what counts as written is what was written.
func TestDropsAreToldOf(t *testing.T) {
	for level, told := range map[slog.Level]string{slog.LevelInfo: "WARN", slog.LevelWarn: "WARN", slog.LevelError: "ERROR"} {
		out := &stuckWriter{gate: make(chan struct{})}
		log := newLogger(&config{LogBuffer: 1, LogFormat: "json", LogLevel: level}, out)
		for range 5 {
			log.process.Error("x")
		}
		close(out.gate)
		log.close(patience)
		wrote, said := map[any]int64{}, 0.0
		for _, r := range out.records(t) {
			wrote[r["level"]]++
			if n, ok := r["count"].(float64); ok && r["level"] == told {
				said += n
			}
		}
		for i, name := range []string{"DEBUG", "INFO", "WARN", "ERROR"} {
			if n, _ := log.count(i); n != wrote[name] {
				t.Errorf("LOG_LEVEL=%v: %d records of level %s, %d counted", level, wrote[name], name, n)
			}
		}
		if _, dropped := log.count(rank(slog.LevelError)); said != float64(dropped) || dropped != 4 {
			t.Errorf("LOG_LEVEL=%v: %d dropped, of which %v said as %s", level, dropped, said, told)
		}
	}
}

// fullDisk takes some bytes, then has no room for a while.
type fullDisk struct {
	logSink
	room  int // bytes until then
	fails int // attempts that fail
	calls atomic.Int64
}

func (f *fullDisk) Write(p []byte) (n int, err error) {
	f.calls.Add(1)
	if len(p) <= f.room || f.fails == 0 {
		f.room -= len(p)
		return f.logSink.Write(p)
	}
	n, _ = f.logSink.Write(p[:f.room])
	f.room, f.fails = 0, f.fails-1
	return n, syscall.ENOSPC
}

// What a failed write has left is written when there is room again, from the byte on that it has come to.
func TestTornWrites(t *testing.T) {
	for _, format := range []string{"json", "cbor"} {
		out := &fullDisk{room: 333, fails: 3}
		log := newLogger(&config{LogBuffer: 100, LogFormat: format}, out)
		for i := range 10 {
			log.process.Info("request", "number", i, "server.address", "origin.test")
			time.Sleep(5 * time.Millisecond)
		}
		eventually(t, "the records to be written", func() bool {
			written, _ := log.count(rank(slog.LevelInfo))
			return written == 10
		})
		log.close(time.Second)
		text := out.all()
		if format == "cbor" {
			var lines bytes.Buffer
			if err := printLogs(strings.NewReader(text), &lines); err != nil {
				t.Error(err)
			}
			text = lines.String()
		}
		for i := range 10 {
			line, rest, _ := strings.Cut(text, "\n")
			if text = rest; !json.Valid([]byte(line)) || !strings.Contains(line, fmt.Sprintf(`"number":%d,`, i)) {
				t.Errorf("%s: line %d is %q", format, i, line)
			}
		}
	}
}

// As long as nothing can be written, records wait, are dropped where there is no room for them, and what is left at the end counts as dropped.
func TestWritesFail(t *testing.T) {
	out := &fullDisk{room: 300, fails: math.MaxInt} // two and a half
	log := newLogger(&config{LogBuffer: 10, LogFormat: "json"}, out)
	for range 5 {
		log.process.Info("early", "server.address", "origin.test", "filler", "0123456789")
	}
	eventually(t, "a write to fail", func() bool { return out.calls.Load() > 0 && len(out.all()) == 300 })
	eventually(t, "two records to be written", func() bool { written, _ := log.count(rank(slog.LevelInfo)); return written == 2 })
	for range 20 {
		log.process.Info("late")
	}
	if written, dropped := log.count(rank(slog.LevelInfo)); written != 2 || dropped != 13 {
		t.Errorf("%d written, %d dropped", written, dropped)
	}
	before := out.calls.Load()
	time.Sleep(250 * time.Millisecond)
	if n := out.calls.Load() - before; n < 1 || n > 4 {
		t.Errorf("%d attempts in a quarter of a second", n)
	}
	begun := time.Now()
	log.close(patience)
	written, dropped := log.count(rank(slog.LevelInfo))
	if took := time.Since(begun); took > time.Second || written != 2 || dropped != 23 {
		t.Errorf("closed in %v: %d written, %d dropped", took, written, dropped)
	}
}

// Records of one connection share a decision: a connection whose opening is told of is one whose end is told of, too.
func TestLogSampleSharesADecision(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startProxy(t, "LOG_SAMPLE=debug=0.5")
	for i := range 200 { // one after the other, so that records tell whose they are
		c := p.dial(t)
		c.Close()
		eventually(t, "the connection's end", func() bool {
			return p.metric(t, "sluice_client_connections") == 0 && p.metric(t, "sluice_client_connections_total") == float64(i+1)
		})
	}
	opened := map[bool]int{}
	records := p.log.records(t)
	for i, r := range records {
		if r["msg"] == "client connected" {
			next := i+1 < len(records) && records[i+1]["msg"] == "client closed"
			opened[next]++
		}
	}
	if opened[false] > 0 || opened[true] < 60 || opened[true] > 140 {
		t.Errorf("%d connections have both records, %d lack the second", opened[true], opened[false])
	}
	if sampled := p.metric(t, `sluice_log_records_total{level="debug",result="sampled"}`); sampled != float64(400-2*opened[true]) {
		t.Errorf("%v records were left out, of 400 of which %d were written", sampled, 2*opened[true])
	}
}

// A record in CBOR says what it says in JSON, and in the same order.
func TestLogsInCBOR(t *testing.T) {
	origin := serveAt(t, "127.0.0.1:0", nil)
	logs := map[string]string{}
	for _, format := range []string{"json", "cbor"} {
		var log logSink
		p, stop := runProxy(t, &log, "LOG_FORMAT="+format, "LOG_LEVEL=debug", "DENY_HOSTS=denied.test")
		p.dial(t).ask("GET", "http://"+origin+`/path"with"quotes=1?x`, "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
		p.dial(t).ask("GET", "http://denied.test/")
		stop()
		logs[format] = log.all()
	}
	var lines bytes.Buffer
	if err := printLogs(strings.NewReader(logs["cbor"]), &lines); err != nil {
		t.Fatal(err)
	}
	shapes := func(text string) (shapes []string) { // without what differs from run to run
		for line := range strings.Lines(text) {
			if !json.Valid([]byte(line)) {
				t.Fatalf("not JSON: %q", line)
			}
			for _, varies := range []string{`"time":"[^"]*"`, `"duration_ms":[0-9.e-]+`, `"(admin|server.port)":[^,]*`, `"addresses":\["127[^,]*`, `127.0.0.1:\d+`, `=\d+"`} {
				line = regexp.MustCompile(varies).ReplaceAllString(line, "…")
			}
			shapes = append(shapes, line)
		}
		slices.Sort(shapes) // of two connections
		return shapes
	}
	if got, want := strings.Join(shapes(lines.String()), ""), strings.Join(shapes(logs["json"]), ""); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if size := len(logs["cbor"]); size >= len(logs["json"]) {
		t.Errorf("CBOR takes %d bytes, JSON %d", size, len(logs["json"]))
	}
}

// TestCBOR has the examples of RFC 8949, appendix A, and values that the encoder never makes.
func TestCBOR(t *testing.T) {
	for text, want := range map[string]string{"00": "0", "17": "23", "1818": "24", "1903e8": "1000", "1a000f4240": "1000000", "1b000000e8d4a51000": "1000000000000",
		"1bffffffffffffffff": "18446744073709551615", "20": "-1", "3903e7": "-1000", "fb3ff199999999999a": "1.1", "fbc010666666666666": "-4.1", "f4": "false", "f5": "true", "f6": "null",
		"60": `""`, "6449455446": `"IETF"`, "62c3bc": `"ü"`, "64f0908591": `"𐅑"`, "80": "[]", "83010203": "[1,2,3]", "a0": "{}", "a26161016162820203": `{"a":1,"b":[2,3]}`,
		"9fff": "[]", "9f018202039f0405ffff": "[1,[2,3],[4,5]]", "bf61610161629f0203ffff": `{"a":1,"b":[2,3]}`, "826161bf61626163ff": `["a",{"b":"c"}]`} {
		data, _ := hex.DecodeString(text)
		if got, err := appendJSON(nil, bufio.NewReader(bytes.NewReader(data)), 8); err != nil || string(got) != want {
			t.Errorf("%s: got %s, %v, want %s", text, got, err, want)
		}
		for cut := range data { // a sequence may end anywhere
			if got, err := appendJSON(nil, bufio.NewReader(bytes.NewReader(data[:cut])), 8); err == nil {
				t.Errorf("%s up to byte %d: got %s", text, cut, got)
			}
		}
	}
	for _, text := range []string{"1c", "1f", "3f", "ff", "f7", "40", "c074", "3bffffffffffffffff", "7f6161ff", "7bffffffffffffffff", "7a00200000", "a10102", "fb7ff8000000000000", strings.Repeat("81", 9) + "00"} {
		data, _ := hex.DecodeString(text)
		if got, err := appendJSON(nil, bufio.NewReader(bytes.NewReader(data)), 8); err == nil {
			t.Errorf("%s: got %s", text, got)
		}
	}
	for text, a := range map[string]slog.Attr{"61611bffffffffffffffff": slog.Uint64("a", math.MaxUint64), "61613b7fffffffffffffff": slog.Int64("a", math.MinInt64), "616120": slog.Duration("a", -1),
		"61611903e8": slog.Int("a", 1000), "6161f5": slog.Bool("a", true), "6161fb3ff199999999999a": slog.Float64("a", 1.1), "616163efbfbd": slog.String("a", "\xff"),
		"6161816131": slog.Any("a", []int{1}), "616100626262f4": slog.Group("", slog.Int("a", 0), slog.Bool("bb", false)), "61617818": slog.String("a", strings.Repeat("x", 24))} {
		if got := hex.EncodeToString(appendCBOR(nil, a)); !strings.HasPrefix(got, text) || len(got) != len(text) && len(a.Value.String()) < 24 {
			t.Errorf("%v: got %s, want %s", a, got, text)
		}
	}
}

// FuzzCBOR never panics, and what it takes is JSON.
func FuzzCBOR(f *testing.F) {
	for _, seed := range []string{"bf6474696d6561316563636f756e7401ff", "9f018202039f0405ffff", "fb7ff8000000000000"} {
		data, _ := hex.DecodeString(seed)
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var lines bytes.Buffer
		printLogs(bytes.NewReader(data), &lines)
		for line := range strings.Lines(lines.String()) {
			if strings.HasSuffix(line, "\n") && !json.Valid([]byte(line)) {
				t.Errorf("%x: %q", data, line)
			}
		}
	})
}

// The command reads what a container's log is piped to it.
func TestLogsCommand(t *testing.T) {
	binary := buildBinary(t)
	cmd := exec.Command(binary, "logs")
	data, _ := hex.DecodeString("bf636d73676161ff" + "bf636d73676162ff")
	cmd.Stdin = bytes.NewReader(data)
	if out, err := cmd.Output(); err != nil || string(out) != "{\"msg\":\"a\"}\n{\"msg\":\"b\"}\n" {
		t.Errorf("%q, %v", out, err)
	}
	cmd = exec.Command(binary, "logs")
	cmd.Stdin = bytes.NewReader(data[:12])
	if out, err := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != 1 || !strings.HasPrefix(string(out), "{\"msg\":\"a\"}\n") || !strings.Contains(string(out), "not CBOR logs") {
		t.Errorf("cut short: %q, %v", out, err)
	}
}

// A panic that ends the process does not take along what waits to be written.
func TestLastWords(t *testing.T) {
	var out logSink
	log := newLogger(&config{LogBuffer: 100, LogFormat: "json"}, &out)
	again := func() (p any) {
		defer func() { p = recover() }()
		defer log.lastWords()
		log.process.Info("before")
		panic("on purpose")
	}()
	records := out.records(t)
	if again != "on purpose" || len(records) != 2 || records[0]["msg"] != "before" || records[1]["error.message"] != "on purpose" {
		t.Errorf("panic %v, records %v", again, records)
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Metrics

// scrape asks for the metrics in Prometheus's text format, series by name and labels.
func (p *testProxy) scrape(t *testing.T) (series map[string]float64, text string) {
	t.Helper()
	resp, err := http.Get("http://" + p.admin + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	defer http.DefaultClient.CloseIdleConnections()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 {
		t.Fatal(resp.Status, err)
	}
	series = map[string]float64{}
	for line := range strings.Lines(string(body)) {
		if i := strings.LastIndexByte(line, ' '); !strings.HasPrefix(line, "#") && i > 0 {
			if series[line[:i]], err = strconv.ParseFloat(strings.TrimSpace(line[i:]), 64); err != nil {
				t.Errorf("%q: %v", line, err)
			}
		}
	}
	return series, string(body)
}

func (p *testProxy) metric(t *testing.T, name string) float64 {
	t.Helper()
	series, _ := p.scrape(t)
	return series[name]
}

// After known traffic every series has the value that it must have, and there are no others.
func TestMetrics(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("there is a pool on Linux only")
	}
	if !apart(t) {
		return
	}
	o, refusing := startOrigin(t), freeAddr(t)
	p := startProxy(t, "LOG_LEVEL=info", "LOG_SAMPLE=info=0", "DENY_HOSTS=denied.test", "DNS_SERVERS="+freeAddr(t), "MAX_CONNS=50", "MAX_CONNS_PER_CLIENT=2", "MAX_TUNNELS=7")
	open := func(n float64) {
		eventually(t, "connections to end", func() bool { return p.metric(t, "sluice_client_connections") == n })
	}
	down := 3 // bytes of bodies; these come through the tunnel
	read := func(c *peer) {
		_, body := c.response("GET")
		down += len(body)
	}
	c := p.dial(t)
	var up *peer
	for i := range 3 { // three requests over one connection to the origin
		c.send("POST http://%s/ HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", o.addr)
		if i == 0 {
			up = o.accept()
		}
		up.head()
		up.wants("hello")
		up.send(plainAnswer)
		read(c)
	}
	for range 2 { // and two over one each
		c.send("GET http://localhost%s/ HTTP/1.1\r\nHost: x\r\n\r\n", o.addr[strings.LastIndexByte(o.addr, ':'):])
		once := o.accept()
		once.head()
		once.send("HTTP/1.1 299 Odd\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
		read(c)
	}
	for _, target := range []string{"http://denied.test/", "http://169.254.1.1/", "http://" + refusing + "/", "http://missing.test/"} {
		c.send("%s", request("GET", target))
		read(c)
	}
	c.send("%s", request("HACK", "http://denied.test/"))
	read(c)
	bad := p.dial(t)
	bad.send("%s", request("GET", "/metrics")) // not for clients
	read(bad)
	bad.Close()
	open(1)
	client, origin := p.openTunnel(t, o)
	client.send("12345")
	origin.wants("12345")
	origin.send("123")
	client.wants("123")
	series, _ := p.scrape(t)
	if series["sluice_tunnels"] != 1 || series[`sluice_bytes_total{direction="up"}`] != 20 || series[`sluice_bytes_total{direction="down"}`] != float64(down) || series[`sluice_requests_total{code="200",method="CONNECT",reason=""}`] != 1 || series["sluice_pool_active_connections"] != 0 {
		t.Error("an open tunnel is not counted as one")
	}
	read(p.dial(t)) // a third connection of one address
	client.Close()
	origin.wantsEnd()
	origin.Close()
	open(1)
	eventually(t, "the last request to be counted", func() bool { return p.metric(t, "sluice_request_duration_seconds_count") == 11 })

	series, text := p.scrape(t)
	want := map[string]float64{
		`requests_total{code="200",method="POST",reason=""}`:                         3,
		`requests_total{code="2xx",method="GET",reason=""}`:                          2,
		`requests_total{code="403",method="GET",reason="http_request_denied"}`:       1,
		`requests_total{code="403",method="GET",reason="destination_ip_prohibited"}`: 1,
		`requests_total{code="502",method="GET",reason="connection_refused"}`:        1,
		`requests_total{code="502",method="GET",reason="dns_error"}`:                 1,
		`requests_total{code="403",method="OTHER",reason="http_request_denied"}`:     1,
		`requests_total{code="400",method="GET",reason="http_request_error"}`:        1,
		`requests_total{code="200",method="CONNECT",reason=""}`:                      1,
		"request_duration_seconds_count":                                             11,
		"response_wait_seconds_count":                                                5,
		"connect_duration_seconds_count":                                             4,
		"client_connections":                                                         1,
		"client_connections_limit":                                                   50,
		"client_connections_total":                                                   4,
		`client_connections_rejected_total{reason="connection_limit_reached"}`:       1,
		`client_connections_rejected_total{reason="http_request_denied"}`:            0,
		"tunnels":                                          0,
		"tunnels_limit":                                    7,
		`tunnels_total{reason="client_closed"}`:            1,
		"tunnel_duration_seconds_count":                    1,
		`bytes_total{direction="up"}`:                      20,
		`bytes_total{direction="down"}`:                    float64(down),
		"pool_idle_connections":                            1,
		"pool_active_connections":                          0,
		`pool_requests_total{result="reused"}`:             2,
		`pool_requests_total{result="dialled"}`:            3,
		`dns_lookups_total{result="hit"}`:                  1,
		`dns_lookups_total{result="miss"}`:                 1,
		`dns_lookups_total{result="stale"}`:                0,
		`dns_lookups_total{result="error"}`:                1,
		`denied_total{reason="http_request_denied"}`:       2,
		`denied_total{reason="destination_ip_prohibited"}`: 1,
		`would_deny_total{reason="http_request_denied"}`:   0,
		"panics_total":                                     0,
		"ready":                                            1,
		`log_records_total{level="info",result="sampled"}`: 4, // and two that are first contacts
		fmt.Sprintf("build_info{goversion=%q,version=\"dev\"}", runtime.Version()): 1,
	}
	for _, level := range []string{"debug", "info", "warn", "error"} {
		for _, result := range []string{"sampled", "written", "dropped"} {
			name := fmt.Sprintf("log_records_total{level=%q,result=%q}", level, result)
			want[name] += map[string]float64{"infowritten": 3, "warnwritten": 7}[level+result]
		}
	}
	for _, reason := range []string{"upstream_closed", "idle_timeout", "half_close_timeout", "max_age", "drain", "connection_error", "internal_error"} {
		want[fmt.Sprintf("tunnels_total{reason=%q}", reason)] = 0
	}
	for name, n := range want {
		if got, ok := series["sluice_"+name]; !ok || got != n {
			t.Errorf("%s: got %v (%v), want %v", name, got, ok, n)
		}
	}
	for name := range series {
		base, _, _ := strings.Cut(name, "{")
		if _, known := want[strings.TrimPrefix(name, "sluice_")]; !known && strings.HasPrefix(name, "sluice_") && !strings.HasSuffix(base, "_bucket") && !strings.HasSuffix(base, "_sum") {
			t.Errorf("%s %v is not expected", name, series[name])
		}
	}
	for _, name := range []string{"go_goroutines", "process_open_fds", "process_resident_memory_bytes", `sluice_request_duration_seconds_bucket{le="0.005"}`} {
		if series[name] == 0 {
			t.Errorf("%s is missing", name)
		}
	}
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("promlint: %v, %v", problems, err)
	}
}

// A request that is sent again, since the connection from the pool was dead, is one request, to its destination, too; it took two connections.
func TestRequestsSentAgain(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("there is a pool on Linux only")
	}
	p, o := startProxy(t), startOrigin(t)
	c := p.dial(t)
	c.send("%s", o.fill(plainRequest))
	up := o.accept()
	up.head()
	up.send(plainAnswer)
	c.wants(plainGets)
	p.awaitServed(t, 0)
	c.send("%s", o.fill(plainRequest))
	up.head()
	up.Close()
	up = o.accept()
	up.head()
	up.send(plainAnswer)
	c.wants(plainGets)
	p.awaitServed(t, 1)
	series, _ := p.scrape(t)
	for name, want := range map[string]float64{`pool_requests_total{result="reused"}`: 1, `pool_requests_total{result="dialled"}`: 2, `requests_total{code="200",method="GET",reason=""}`: 2} {
		if got := series["sluice_"+name]; got != want {
			t.Errorf("%s: got %v, want %v", name, got, want)
		}
	}
	var s struct{ Destinations []visits }
	if _, body := p.adminGet(t, "GET", "/status.json", p.admin); json.Unmarshal([]byte(body), &s) != nil || !slices.Equal(s.Destinations, []visits{{o.addr, 2}}) {
		t.Errorf("destinations %v", s.Destinations)
	}
}

// A client that left before it was told that its tunnel is open was not answered.
func TestTunnelsThatNobodySaw(t *testing.T) {
	s, o := testServer(t, "ALLOW_CIDRS=127.0.0.1"), startOrigin(t)
	if s.openListeners(context.Background(), "127.0.0.1:0"); len(s.listeners) == 0 { // dialling needs what this finds out
		t.Fatal("no listener")
	}
	for name, serve := range map[string]func(*exchange) *failure{"tunnel": (*exchange).tunnel, "flow": (*exchange).flow} {
		l := startOrigin(t)
		far := dialTCP(t, l.addr)
		near := l.accept()
		near.SetLinger(0)
		near.Close()
		far.Read(make([]byte, 1)) // the reset has come
		c := &client{}
		c.attach(s, far)
		x, to := c.newExchange(), netip.MustParseAddrPort(o.addr)
		x.method, x.connect, x.dst = []byte("CONNECT"), true, destination{[]byte(o.addr), []byte(o.addr)[:len("127.0.0.1")], to.Port(), to.Addr()}
		f := serve(x)
		if x.conclude(f); f == nil || f.token != tokenClient || x.status != 0 {
			t.Errorf("%s: %v, status %d", name, f, x.status)
		}
		far.Close()
	}
	if n := total(s.metrics.requests.WithLabelValues("CONNECT", "0", tokenClient)); n != 2 {
		t.Errorf("%v requests count as not answered, of 2", n)
	}
}

// Native histograms go to scrapers that take them, in the protobuf format.
func TestNativeHistograms(t *testing.T) {
	p := startProxy(t)
	p.dial(t).ask("OPTIONS", "http://any.test", "Max-Forwards: 0")
	p.awaitServed(t, 0)
	req, _ := http.NewRequest("GET", "http://"+p.admin+"/metrics", nil)
	req.Header.Set("Accept", "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited")
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	for dec := expfmt.NewDecoder(resp.Body, expfmt.ResponseFormat(resp.Header)); ; {
		var f dto.MetricFamily
		if err := dec.Decode(&f); err != nil {
			t.Fatal("the histogram is missing: ", err)
		}
		if f.GetName() == "sluice_request_duration_seconds" {
			if h := f.Metric[0].Histogram; len(h.PositiveSpan) != 1 || h.GetSampleCount() != 1 || h.GetSchema() < 3 {
				t.Errorf("%v", h)
			}
			return
		}
	}
}

// Hostile clients and origins do not make series without end.
func TestSeriesAreBounded(t *testing.T) {
	origin := serveAt(t, "127.0.0.1:0", func(w http.ResponseWriter, r *http.Request) {
		status, _ := strconv.Atoi(r.URL.Path[1:])
		w.WriteHeader(status)
	})
	p := startProxy(t, "LOG_LEVEL=info", "LOG_SAMPLE=info=0,warn=0", "DENY_HOSTS=.test")
	c := p.dial(t)
	for status := 200; status < 1000; status++ {
		c.send("GET http://%s/%d HTTP/1.1\r\nHost: a\r\n\r\n", origin, status)
		c.response("GET")
	}
	for i := range 300 {
		for _, method := range []string{"M" + strconv.Itoa(i), "GET" + strings.Repeat("'", 1+i), "get"} {
			c.send("%s", request(method, fmt.Sprintf("http://name-%d.test:%d/", i, 1+i)))
			c.response("GET")
		}
	}
	n := 0
	eventually(t, "900 requests with methods that are not registered", func() bool {
		var other float64
		series, _ := p.scrape(t)
		n = 0
		for name, v := range series {
			if strings.HasPrefix(name, "sluice_requests_total") {
				if n++; strings.Contains(name, `method="OTHER"`) {
					other += v
				}
			}
		}
		return other == 900
	})
	if n > 90 {
		t.Errorf("%d series of requests_total", n)
	}
	for method, want := range map[string]string{"": "OTHER", "GET": "GET", "PROPFIND": "PROPFIND", "ETAG": "OTHER", "get": "OTHER", "VERSION-CONTROL": "VERSION-CONTROL"} {
		if got := methodLabel(method); got != want {
			t.Errorf("%q: %s", method, got)
		}
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Admin

// adminGet asks the admin listener, as host, with further fields as "Name: value".
func (p *testProxy) adminGet(t *testing.T, method, path, host string, fields ...string) (*http.Response, string) {
	t.Helper()
	c, err := net.Dial("tcp", p.admin)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	a := newPeer(t, c)
	a.send("%s %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n%s\r\n", method, path, host, strings.Join(append(fields, ""), "\r\n"))
	return a.response(method)
}

// Web pages in a browser on this host get nothing out of the admin listener, and cannot begin the drain.
func TestAdminKeepsWebPagesOut(t *testing.T) {
	p := startProxy(t)
	for host, want := range map[string]int{p.admin: 200, "localhost:3129": 200, "localhost": 200, "[::1]:3129": 200, "10.0.0.1": 200, "rebound.example:3129": 421, "rebound.example": 421, "127.0.0.1.example": 421} {
		for _, path := range []string{"/status.json", "/metrics", "/", "/debug/pprof/", "/healthz"} {
			if resp, _ := p.adminGet(t, "GET", path, host); resp.StatusCode != want {
				t.Errorf("%s as %s: %s, want %d", path, host, resp.Status, want)
			}
		}
	}
	for _, fields := range [][]string{{"Sec-Fetch-Site: cross-site"}, {"Origin: http://evil.example"}} {
		if resp, _ := p.adminGet(t, "POST", "/drain", p.admin, append(fields, "Content-Length: 0")...); resp.StatusCode != 403 {
			t.Errorf("%v: %s", fields, resp.Status)
		}
	}
	for _, site := range []string{"cross-site", "same-site", "same-origin", "none"} {
		for _, mode := range []string{"no-cors", "cors", "navigate"} {
			for _, path := range []string{"/metrics", "/", "/status.json", "/debug/pprof/", "/debug/pprof/heap?gc=1"} {
				want := 200
				if strings.HasSuffix(site, "-site") && (mode != "navigate" || strings.HasPrefix(path, "/debug/")) {
					want = 403
				}
				if resp, _ := p.adminGet(t, "GET", path, p.admin, "Sec-Fetch-Site: "+site, "Sec-Fetch-Mode: "+mode); resp.StatusCode != want {
					t.Errorf("%s %s %s: %s, want %d", site, mode, path, resp.Status, want)
				}
			}
		}
	}
	for request, want := range map[string]int{"POST 127.0.0.1:3129 browser": 200, "POST evil.example:3129 browser": 421, "POST proxy:3129 curl": 200, "GET proxy:3129 browser": 200} {
		var method, host, from string
		fmt.Sscan(request, &method, &host, &from)
		inContainer := context.WithValue(t.Context(), http.LocalAddrContextKey, &net.TCPAddr{IP: net.IPv4(172, 17, 0, 2), Port: 3129}) // to which a port is published
		r, w := httptest.NewRequestWithContext(inContainer, method, "http://"+host+"/drain", nil), httptest.NewRecorder()
		if from == "browser" && method == "POST" {
			r.Header.Set("Origin", "http://"+host)
		}
		if guard(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})).ServeHTTP(w, r); w.Code != want {
			t.Errorf("%s: %d, want %d", request, w.Code, want)
		}
	}
	if resp, _ := p.adminGet(t, "GET", "/readyz", p.admin); resp.StatusCode != 200 {
		t.Errorf("draining: %s", resp.Status)
	}
	if resp, _ := p.adminGet(t, "POST", "/drain", p.admin, "Content-Length: 0"); resp.StatusCode != 202 {
		t.Errorf("a plain client: %s", resp.Status)
	}
}

// What ADMIN serves is not to be had on LISTEN, by whatever way.
func TestAdminIsNotOnListen(t *testing.T) {
	p := startProxy(t)
	for _, path := range []string{"/healthz", "/readyz", "/metrics", "/status.json", "/debug/pprof/"} {
		p.dial(t).ask("GET", path)
		for _, target := range []string{path, "http://" + p.addr + path, "http://" + p.admin + path} {
			if resp, body := p.dial(t).ask("GET", target); resp.StatusCode != 400 && resp.StatusCode != 502 {
				t.Errorf("%s: %s %q", target, resp.Status, body)
			}
		}
	}
}

func TestProfiles(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startProxy(t)
	for path, want := range map[string]string{"/debug/pprof/": "goroutine", "/debug/pprof/goroutine?debug=2": "sluice.run", "/debug/pprof/cmdline": "test", "/debug/pprof/heap?debug=1": "heap profile",
		"/debug/pprof/symbol": "num_symbols", "/debug/pprof/profile?seconds=1": "\x1f\x8b", "/debug/pprof/trace?seconds=0.1": "go 1."} {
		if resp, body := p.adminGet(t, "GET", path, p.admin); resp.StatusCode != 200 || !strings.Contains(body, want) {
			t.Errorf("%s: %s, %.200q", path, resp.Status, body)
		}
	}
}

// TestStatus has what the status page is made of.
func TestStatus(t *testing.T) {
	origin := serveAt(t, "127.0.0.1:0", nil)
	p := startProxy(t, "DENY_HOSTS=.denied.test", "USERS=ann:s3cret", "LOG_LEVEL=info")
	c := p.dial(t)
	ann := "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte("ann:s3cret"))
	for range 3 {
		c.ask("GET", "http://"+origin+"/", ann)
	}
	for i := range 25 {
		c.ask("GET", fmt.Sprintf("http://host-%d.denied.test/?q=s3cret", i), ann)
	}
	c.ask("M'<script>", "http://x.denied.test/", ann) // not a token: 400
	p.awaitServed(t, 28)
	var s struct {
		Name, Version, State, Mode string
		Started, Now               time.Time
		Metrics                    []*dto.MetricFamily
		History                    []sample
		Failures                   []failed
		Destinations               []visits
		Kernel                     []finding
		Config                     []setting
	}
	resp, body := p.adminGet(t, "GET", "/status.json", p.admin)
	if err := json.Unmarshal([]byte(body), &s); err != nil || resp.Header.Get("Content-Type") != "application/json" {
		t.Fatalf("%v in %.500s", err, body)
	}
	if s.Name != "sluice-test" || s.State != "ready" || s.Mode != "enforce" || s.Version != "dev" || s.Now.Before(s.Started) || len(s.History) == 0 || len(s.Metrics) < 20 {
		t.Errorf("%.1000s", body)
	}
	if want := []visits{{origin, 3}}; !slices.Equal(s.Destinations, want) {
		t.Errorf("destinations %v, want %v", s.Destinations, want)
	}
	if n := len(s.Failures); n != 20 {
		t.Fatalf("%d failures", n)
	}
	last, before := s.Failures[0], s.Failures[1]
	if last.Status != 400 || last.Type != tokenRequest || before.Server != "host-24.denied.test" || before.User != "ann" || before.Method != "GET" || before.Port != 80 ||
		before.Status != 403 || before.Type != tokenDenied || !strings.Contains(before.Message, "SLUICE_DENY_HOSTS") || before.Client != "127.0.0.1" {
		t.Errorf("%+v\n%+v", last, before)
	}
	if strings.Contains(body, "s3cret") {
		t.Error("a secret is shown")
	}
	if i := slices.IndexFunc(s.Config, func(c setting) bool { return c.Name == "SLUICE_USERS" }); i < 0 || s.Config[i].Value != "(redacted)" || s.Config[i].Origin != "environment" || len(s.Config) != len(variables()) {
		t.Errorf("%+v", s.Config)
	}
}

// statusPage has headless Chromium show the status page of url for a while, and gives the document that came of it.
func statusPage(t *testing.T, url string, args ...string) string {
	t.Helper()
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("there is no chromium")
	}
	cmd := exec.Command(chromium, append([]string{"--headless=new", "--no-sandbox", "--disable-gpu", "--user-data-dir=" + t.TempDir(), "--timeout=20000", "--virtual-time-budget=5000", "--dump-dom"}, append(args, url)...)...)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

// What falls short is shown first and counted, also where no line mends it; what is as wanted stands in the table alone.
func TestStatusPageKernel(t *testing.T) {
	page, _ := files.ReadFile("status.html")
	status, _ := json.Marshal(map[string]any{"name": "a", "started": time.Now(), "now": time.Now(), "state": "ready", "kernel": []finding{
		{Setting: "tcp_advised", Found: "2", Wanted: "1", Verdict: verdictAdvice, Mend: "sysctls: {tcp_advised: \"1\"}"},
		{Setting: "RLIMIT_NOFILE", Found: "3", Wanted: "at least 9", Verdict: verdictShort}, {Setting: "fine", Found: "7", Wanted: "any", Verdict: verdictOK}}})
	shown := statusPage(t, "http://"+serveAt(t, "127.0.0.1:0", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/status.json" {
			w.Write(status)
		} else {
			w.Write(page)
		}
	}))
	_, cards, _ := strings.Cut(shown, `<ul class="findings">`)
	cards, _, _ = strings.Cut(cards, "</ul>")
	short, advice := strings.Index(cards, "<code>RLIMIT_NOFILE</code>"), strings.Index(cards, "<code>tcp_advised</code>")
	if short < 0 || advice < short || strings.Contains(cards, "fine") || strings.Count(cards, "<pre>") != 1 || !strings.Contains(shown, "1 kernel setting short") || !strings.Contains(shown, "All 3 settings") {
		t.Errorf("%s", shown)
	}
}

// What hostile clients choose is shown as text: the page runs no script but its own. Should the page fail at that, the policy it is served with
// holds the script back; so here it is served without.
func TestStatusPageShowsTextAlone(t *testing.T) {
	const hostile = `<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>"'><b id=owned>`
	page, _ := files.ReadFile("status.html")
	status, _ := json.Marshal(map[string]any{"name": hostile, "version": hostile, "started": time.Now(), "now": time.Now(), "state": hostile, "mode": hostile,
		"metrics":      []any{map[string]any{"name": "sluice_requests_total", "metric": []any{map[string]any{"label": []any{map[string]any{"name": "reason", "value": hostile}, map[string]any{"name": "method", "value": hostile}, map[string]any{"name": "code", "value": hostile}}, "counter": map[string]any{"value": 5}}}}},
		"failures":     []failed{{time.Now(), hostile, hostile, hostile, hostile, 1, 403, hostile, hostile}},
		"destinations": []visits{{hostile, 5}}, "kernel": []finding{{hostile, hostile, hostile, hostile, hostile, hostile, hostile, hostile}}, "config": []setting{{hostile, hostile, hostile, hostile, hostile}}})
	url := "http://" + serveAt(t, "127.0.0.1:0", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/status.json" {
			w.Write(status)
		} else {
			w.Write(page)
		}
	})
	shown := statusPage(t, url)
	if strings.Contains(shown, "<title>owned") || strings.Contains(shown, "<img") || strings.Contains(shown, "<b id") {
		t.Errorf("a script ran, or an element came of a text: %s", shown)
	}
	if n := strings.Count(shown, "&lt;img src=x onerror"); n < 8 || !strings.Contains(shown, "data-polls=") {
		t.Errorf("the hostile text is shown %d times: %s", n, shown)
	}
}

// The page of a running proxy shows what the proxy did. With -screenshots DIR it is kept as a picture.
func TestStatusPage(t *testing.T) {
	origin := serveAt(t, "127.0.0.1:0", nil)
	p := startProxy(t, "DENY_HOSTS=.denied.test", "LOG_LEVEL=info")
	c := p.dial(t)
	for range 50 {
		c.ask("GET", "http://"+origin+"/")
	}
	c.ask("GET", "http://api.denied.test/")
	p.awaitServed(t, 50)
	args := []string{}
	if *screenshots != "" {
		args = append(args, "--window-size=1280,1700", "--screenshot="+filepath.Join(*screenshots, "status.png"))
	}
	shown := statusPage(t, "http://"+p.admin+"/", args...)
	for _, want := range []string{"sluice-test", "api.denied.test", "SLUICE_DENY_HOSTS", origin, "http_request_denied", "data-polls="} {
		if !strings.Contains(shown, want) {
			t.Errorf("the page does not show %q: %.3000s", want, shown)
		}
	}
	resp, body := p.adminGet(t, "GET", "/", p.admin)
	if policy := resp.Header.Get("Content-Security-Policy"); !strings.Contains(policy, "default-src 'none'") || !strings.Contains(policy, "script-src 'sha256-") {
		t.Errorf("Content-Security-Policy: %s", policy)
	}
	for _, outside := range []string{"http://", "https://", "src=", "@import", "url("} {
		if text := strings.ReplaceAll(body, "http://www.w3.org/", ""); strings.Contains(text, outside) {
			t.Errorf("the page has %q: it must not ask for anything outside", outside)
		}
	}
}

// A figure of the page and what stands below it tell of the same thing, and what audit mode lets through is not told of as denied.
func TestStatusPageFigures(t *testing.T) {
	p := startProxy(t, "MODE=audit", "ALLOW_HOSTS=origin.test")
	o := startOrigin(t)
	p.openTunnel(t, o)
	c, origin := p.openTunnel(t, o)
	c.Close()
	origin.Close()
	if resp, _ := p.dial(t).ask("GET", "http://10.0.0.1/"); resp.StatusCode != 403 {
		t.Fatal(resp.Status)
	}
	p.awaitServed(t, 1)
	_, shown, _ := strings.Cut(statusPage(t, "http://"+p.admin+"/"), "<main>")
	shown, _, _ = strings.Cut(shown, "Top destinations")
	shown = regexp.MustCompile("<[^>]*>").ReplaceAllString(shown, " ")
	for _, want := range []string{`Requests\s+\S+\s+/s\s+1 since the start`, `New tunnels\s+\S+\s+/s\s+2 since the start`,
		`Denied, by rule\s+destination_ip_prohibited\s+1\s`, `Let through in audit mode, else denied\s+http_request_denied\s+2\s`} {
		if !regexp.MustCompile(want).MatchString(shown) {
			t.Errorf("the page does not show %q: %s", want, shown)
		}
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Deployment

// The dashboard and the alerts ask for series that are exported, with labels that these have.
func TestDeployedNames(t *testing.T) {
	p := startProxy(t)
	p.dial(t).ask("GET", "http://origin.test:1/")
	p.awaitServed(t, 0)
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Get("http://" + p.admin + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	families := map[string]*dto.MetricFamily{}
	for dec := expfmt.NewDecoder(resp.Body, expfmt.ResponseFormat(resp.Header)); ; {
		var f dto.MetricFamily
		if dec.Decode(&f) != nil {
			break
		}
		families[f.GetName()] = &f
	}
	used := map[string]bool{}
	for _, name := range []string{"deploy/grafana.json", "deploy/prometheus-rules.yaml"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(name, ".json") && !json.Valid(text) {
			t.Errorf("%s is not JSON", name)
		}
		for _, m := range regexp.MustCompile(`\b((?:sluice|process|go)_[a-z_]+)(?:\{([^}]*)\})?`).FindAllStringSubmatch(string(text), -1) {
			base := m[1]
			for _, suffix := range []string{"_bucket", "_sum", "_count"} {
				if f := families[strings.TrimSuffix(m[1], suffix)]; f != nil && f.GetType() == dto.MetricType_HISTOGRAM {
					base = f.GetName()
				}
			}
			f := families[base]
			if f == nil {
				t.Errorf("%s: %s is not exported", name, m[1])
				continue
			}
			used[base] = true
			for _, label := range regexp.MustCompile(`([a-z_]+)\s*(?:=|!)`).FindAllStringSubmatch(m[2], -1) {
				if !slices.Contains([]string{"job", "instance"}, label[1]) && !slices.ContainsFunc(f.Metric[0].Label, func(l *dto.LabelPair) bool { return l.GetName() == label[1] }) {
					t.Errorf("%s: %s has no label %s", name, m[1], label[1])
				}
			}
		}
	}
	for name := range families {
		if strings.HasPrefix(name, "sluice_") && !used[name] {
			t.Errorf("%s stands on no panel and in no alert", name)
		}
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Drain

// draining begins the drain and returns when it has begun; the channel tells how long it took.
func (p *testProxy) draining(t *testing.T) <-chan time.Duration {
	t.Helper()
	took, begun := make(chan time.Duration, 1), time.Now()
	go func() { p.stop(); took <- time.Since(begun) }()
	eventually(t, "/readyz to say 503", func() bool { return adminStatus(p.admin, "/readyz") == 503 })
	return took
}

func TestDrainLetsRequestsFinish(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startProxy(t, "DRAIN_TIMEOUT=8s")
	o := startOrigin(t)
	idle := p.dial(t)
	kept := exchange1(idle, o, nil)
	p.log.await(t, "request", 1) // it is in the pool
	fresh := p.dial(t)           // has not sent anything
	slow := p.dial(t)
	slow.send("%s", request("GET", "http://"+o.addr+"/slow"))
	kept.head()
	streaming := p.dial(t)
	streaming.send("%s", request("GET", "http://"+o.addr+"/streaming"))
	stream := o.accept()
	stream.head()
	stream.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nfirst")
	streaming.head()
	streaming.wants("first")
	if adminStatus(p.admin, "/readyz") != 200 || adminStatus(p.admin, "/healthz") != 200 {
		t.Error("not ready, or not alive")
	}
	p.log.await(t, "client connected", 4)

	took := p.draining(t)
	idle.wantsEnd()
	fresh.wantsEnd()
	if status := adminStatus(p.admin, "/healthz"); status != 200 {
		t.Errorf("/healthz says %d", status)
	}
	if status, _, stderr := sluice([]string{"health"}, "SLUICE_ADMIN="+p.admin); status != 1 || stderr == "" {
		t.Errorf("health: status %d, %q", status, stderr)
	}
	eventually(t, "new connections to be refused", func() bool {
		c, err := net.Dial("tcp", p.addr)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	slow.send("%s", request("GET", "http://"+o.addr+"/too-late"))
	kept.send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone")
	if resp, body := slow.response("GET"); resp.StatusCode != 200 || body != "done" || !resp.Close {
		t.Errorf("got %d %q, Connection: close %v", resp.StatusCode, body, resp.Close)
	}
	slow.wantsEnd()
	stream.send("-last")
	streaming.wants("-last")
	streaming.wantsEnd()
	kept.wantsEnd() // without the request that came too late
	if took := <-took; took > 4*time.Second {
		t.Errorf("the drain took %v", took)
	}
}

// At the beginning of the drain requests may be on their way on idle connections: they are served, and the connection ends with them.
func TestDrainServesLateRequests(t *testing.T) {
	origin := serveAt(t, "127.0.0.1:0", nil)
	p := startProxy(t, "DRAIN_TIMEOUT=8s")
	kept, fresh, tunnelled := p.dial(t), p.dial(t), p.dial(t)
	kept.ask("GET", "http://"+origin+"/")
	p.log.await(t, "client connected", 3)
	took := p.draining(t)
	for _, c := range []*peer{kept, fresh} {
		if resp, body := c.ask("GET", "http://"+origin+"/"); resp.StatusCode != 200 || body != origin || !resp.Close {
			t.Errorf("%s, %q, close %v", resp.Status, body, resp.Close)
		}
		c.wantsEnd()
	}
	tunnelled.send("%s", request("CONNECT", origin))
	if head := tunnelled.head(); !strings.HasPrefix(head, "HTTP/1.1 200 ") {
		t.Errorf("%q", head)
	}
	if resp, _ := tunnelled.ask("GET", "http://"+origin+"/"); resp.StatusCode != 200 {
		t.Errorf("in the tunnel: %s", resp.Status)
	}
	tunnelled.Close()
	if took := <-took; took > time.Second {
		t.Errorf("with nothing left the drain took %v", took)
	}
}

// restarts has a new process take over from the old one, n times, while clients send requests, and tells what failed.
func restarts(t *testing.T, n int) (requests, failed int64) {
	binary, origin, addr := buildBinary(t), serveAt(t, "127.0.0.1:0", nil), freeAddr(t)
	start := func() *process {
		return startProcess(t, binary, "LISTEN="+addr, "ALLOW_CIDRS=127.0.0.1", "ALLOW_PORTS=*", "LOG_SAMPLE=info=0", "DRAIN_TIMEOUT=2s")
	}
	old := start()
	var sent, lost atomic.Int64
	var over atomic.Bool
	var clients sync.WaitGroup
	for worker := range 12 {
		clients.Go(func() {
			get := request("GET", "http://"+origin+"/")
			var c net.Conn
			var r *bufio.Reader
			for !over.Load() {
				if c == nil {
					var err error
					if c, err = net.Dial("tcp", addr); err != nil {
						t.Log(lost.Add(1), err)
						continue
					}
					c.SetDeadline(time.Now().Add(patience))
					r = bufio.NewReader(c)
				}
				io.WriteString(c, get)
				resp, err := http.ReadResponse(r, nil)
				ok := err == nil && resp.StatusCode == 200
				if ok {
					_, err = io.Copy(io.Discard, resp.Body)
				}
				if sent.Add(1); !ok || err != nil {
					t.Log(lost.Add(1), err, resp)
				}
				if !ok || err != nil || resp.Close || worker%2 == 0 { // half of them come anew each time
					c.Close()
					c = nil
				}
			}
			if c != nil {
				c.Close()
			}
		})
	}
	for range n {
		next := start()
		old.Process.Signal(syscall.SIGTERM)
		old.wantsExit(t, patience)
		old = next
	}
	over.Store(true)
	clients.Wait()
	old.Process.Signal(syscall.SIGTERM)
	old.wantsExit(t, patience)
	return sent.Load(), lost.Load()
}

// Nothing is lost where the kernel hands on what waits at a listener that closes (tcp_migrate_req).
func TestRestartLosesNothing(t *testing.T) {
	if !inNamespace(t, "--net", "ip link set lo up && echo 1 > /proc/sys/net/ipv4/tcp_migrate_req") {
		return
	}
	sent, lost := restarts(t, 20)
	if t.Logf("%d requests, %d failed", sent, lost); lost > 0 || sent < 200 {
		t.Error("requests failed, or hardly any were made")
	}
}

func TestDrainCutsWhatIsLeft(t *testing.T) {
	if !apart(t) {
		return
	}
	const limit = 700 * time.Millisecond
	p := startProxy(t, "DRAIN_TIMEOUT="+limit.String())
	o, hanging := startOrigin(t), startOrigin(t)
	c, up := p.openTunnel(t, o)
	waiting := p.dial(t)
	waiting.send("%s", request("GET", "http://"+hanging.addr+"/"))
	hanging.accept().head()
	took := p.draining(t)
	for range 3 {
		c.send("ping")
		up.wants("ping")
		up.send("pong")
		c.wants("pong")
	}
	c.wantsEnd()
	up.wantsEnd()
	waiting.wantsEnd()
	if took := <-took; took < limit || took > limit+500*time.Millisecond {
		t.Errorf("the drain took %v", took)
	}
	wantsFields(t, p.recordFor(t, "tunnel", o.addr), map[string]any{"close_reason": "drain", "http.request.body.size": 12.0, "http.response.body.size": 12.0})
	p.recordFor(t, "request", hanging.addr)
}

// POST /drain on the admin listener does what SIGTERM does, so that a job can end its sidecar.
func TestDrainByRequest(t *testing.T) {
	p := startProcess(t, buildBinary(t))
	admin := p.start["admin"].(string)
	if status := adminStatus(admin, "/drain"); status != 405 {
		t.Errorf("GET /drain: %d", status)
	}
	resp, err := http.Post("http://"+admin+"/drain", "", nil)
	if err != nil || resp.StatusCode != 202 {
		t.Fatal(resp, err)
	}
	resp.Body.Close()
	p.wantsExit(t, patience)
	if rest, _ := io.ReadAll(p.lines); !strings.Contains(string(rest), `"msg":"draining"`) || !strings.Contains(string(rest), `"msg":"stopped"`) {
		t.Errorf("%s", rest)
	}
}

func TestDrainOfAnIdleProxy(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startProxy(t, "DRAIN_TIMEOUT=8s")
	o := startOrigin(t)
	c := p.dial(t)
	exchange1(c, o, nil)
	begun := time.Now()
	p.stop()
	if took := time.Since(begun); took < time.Second || took > 2*time.Second { // the grace, for a request that may be on its way
		t.Errorf("it took %v", took)
	}
	c.wantsEnd()
	if status := adminStatus(p.admin, "/healthz"); status != 0 {
		t.Errorf("/healthz says %d when all is over", status)
	}
}

// TestDrainWithoutLimit: with DRAIN_TIMEOUT=0 the drain ends with the last request and tunnel, and cuts nothing.
// As long as a drain takes, the status page's history goes on, and memory is watched.
func TestDrainIsWatched(t *testing.T) {
	if !apart(t) {
		return
	}
	before := debug.SetMemoryLimit(1 << 40) // without one there is nothing to watch
	p := startProxy(t, "DRAIN_TIMEOUT=0")
	watched := func() bool { return runtime.GOOS != "linux" || strings.Contains(stacks(), "watchMemory") }
	eventually(t, "memory to be watched", watched)
	debug.SetMemoryLimit(before)
	c, origin := p.openTunnel(t, startOrigin(t))
	took := p.draining(t)
	begun := time.Now().Unix()
	eventually(t, "samples of the time after the drain has begun", func() bool {
		var s struct{ History []sample }
		_, body := p.adminGet(t, "GET", "/status.json", p.admin)
		return json.Unmarshal([]byte(body), &s) == nil && s.History[len(s.History)-1].Time > begun
	})
	if !watched() {
		t.Error("memory is not watched")
	}
	c.Close()
	origin.Close()
	<-took
}

func TestDrainWithoutLimit(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startProxy(t, "DRAIN_TIMEOUT=0")
	o, far := startOrigin(t), startOrigin(t)
	c := p.dial(t)
	c.send("%s", o.fill(plainRequest))
	up := o.accept()
	up.head()
	in, out := p.openTunnel(t, far)
	const pause = 300 * time.Millisecond
	took := p.draining(t)
	time.Sleep(pause)
	up.send(plainAnswer)
	c.wants(strings.Replace(plainGets, "\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1))
	c.wantsEnd()
	in.send("ping")
	out.wants("ping")
	time.Sleep(pause)
	select {
	case took := <-took:
		t.Fatalf("the drain took %v, though a tunnel is open", took)
	default:
	}
	out.send("pong")
	in.wants("pong")
	in.Close()
	out.wantsEnd()
	out.Close()
	if took := <-took; took < 2*pause || took > patience {
		t.Errorf("the drain took %v", took)
	}
	if r := p.recordFor(t, "request", o.addr); r["error.type"] != nil {
		t.Errorf("record: %v", r)
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// The program as it is shipped

// process is the program, run by a test.
type process struct {
	*exec.Cmd
	stdout *os.File
	lines  *bufio.Reader
	ended  chan error
	addr   string
	early  string         // what it logged until it listened
	start  map[string]any // its record of that it listens
}

// buildBinary builds the program once, for the tests that run apart from then on, too.
func buildBinary(t *testing.T) string {
	t.Helper()
	binary := filepath.Join(binaries, "sluice")
	if built := os.Getenv("TEST_BINARY"); built != "" {
		return built
	}
	build.Do(func() {
		if out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
			t.Fatalf("go build: %v\n%s", err, out)
		}
		os.Setenv("TEST_BINARY", binary)
	})
	return binary
}

func startProcess(t *testing.T, binary string, vars ...string) *process {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p := &process{Cmd: exec.Command(binary), stdout: r, lines: bufio.NewReader(r), ended: make(chan error, 1)}
	p.Env = prefixed(append([]string{"LISTEN=127.0.0.1:0", "ADMIN=127.0.0.1:0", "TUNE=off"}, vars...)...)
	p.Stdout = w
	err = p.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	go func() { p.ended <- p.Wait(); close(p.ended) }()
	t.Cleanup(func() { p.Process.Kill(); r.Close() })
	r.SetReadDeadline(time.Now().Add(2 * patience))
	var line string
	for err = nil; err == nil && p.start["msg"] != "listening"; { // a first request may be quicker
		line, err = p.lines.ReadString('\n')
		p.early += line
		p.start = nil
		json.Unmarshal([]byte(line), &p.start)
	}
	if addrs, _ := p.start["addresses"].([]any); len(addrs) > 0 {
		p.addr = addrs[0].(string)
	} else {
		t.Fatalf("last line %q, %v", line, err)
	}
	return p
}

// wantsExit waits for the process to end by itself with status 0.
func (p *process) wantsExit(t *testing.T, within time.Duration) {
	t.Helper()
	select {
	case err := <-p.ended:
		if err != nil {
			t.Errorf("the process ended with %v", err)
		}
	case <-time.After(within):
		t.Errorf("the process did not end within %v", within)
	}
}

func TestProgram(t *testing.T) {
	binary := buildBinary(t)
	ask := func(t *testing.T, addr string) {
		t.Helper()
		if resp, _ := (&testProxy{addr: addr}).dial(t).ask("OPTIONS", "http://any.test", "Max-Forwards: 0"); resp.StatusCode != 200 {
			t.Errorf("status %d", resp.StatusCode)
		}
	}
	for _, signal := range []os.Signal{syscall.SIGTERM, os.Interrupt} {
		t.Run(signal.String(), func(t *testing.T) {
			p := startProcess(t, binary)
			ask(t, p.addr)
			p.Process.Signal(signal)
			p.wantsExit(t, patience)
			rest, _ := io.ReadAll(p.lines)
			if !slices.ContainsFunc(strings.Split(string(rest), "\n"), func(line string) bool { return strings.Contains(line, `"msg":"stopped"`) }) {
				t.Errorf("the last record is missing: %q", rest)
			}
		})
	}
	t.Run("a second signal", func(t *testing.T) {
		p := startProcess(t, binary, "DRAIN_TIMEOUT=1m", "ALLOW_CIDRS=127.0.0.1", "ALLOW_PORTS=*")
		c, _ := (&testProxy{addr: p.addr}).openTunnel(t, startOrigin(t))
		p.Process.Signal(syscall.SIGTERM)
		for line := ""; !strings.Contains(line, `"msg":"draining"`); {
			var err error
			if line, err = p.lines.ReadString('\n'); err != nil {
				t.Fatal(err)
			}
		}
		p.Process.Signal(syscall.SIGTERM)
		p.wantsExit(t, time.Second)
		c.wantsEnd()
	})
	t.Run("stdout is closed", func(t *testing.T) {
		p := startProcess(t, binary)
		p.stdout.Close()
		for range 20 {
			ask(t, p.addr)
		}
		p.Process.Signal(syscall.SIGTERM)
		p.wantsExit(t, patience)
	})
	t.Run("a bad environment", func(t *testing.T) {
		cmd := exec.Command(binary)
		cmd.Env = prefixed("LISTEN="+occupied(t), "IDLE_TIMEOUT=soon", "USERS_=ann:topsecret")
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		cmd.Run()
		if status := cmd.ProcessState.ExitCode(); status != 2 || stdout.Len() > 0 {
			t.Errorf("status %d, stdout %q", status, stdout.String())
		}
		wantsFault(t, stderr.String(), "IDLE_TIMEOUT", "soon")
		wantsFault(t, stderr.String(), "USERS_", "")
		if strings.Contains(stderr.String(), "topsecret") || strings.Contains(stderr.String(), "in use") {
			t.Errorf("stderr %q", stderr.String())
		}
	})
	t.Run("an address in use", func(t *testing.T) {
		cmd := exec.Command(binary)
		cmd.Env = prefixed("LISTEN="+occupied(t), "TUNE=off")
		out, _ := cmd.CombinedOutput()
		if status := cmd.ProcessState.ExitCode(); status != 1 || !strings.Contains(string(out), "in use") {
			t.Errorf("status %d, %q", status, out)
		}
	})
}

// With no descriptor left for a pipe, bytes go through a buffer: what is established goes on.
func TestNoDescriptorForPipes(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("splice(2) is Linux's")
	}
	binary := buildBinary(t)
	p := &testProxy{addr: startProcess(t, binary, "NOFILE=40", "ALLOW_CIDRS=127.0.0.1", "ALLOW_PORTS=*").addr}
	o := startOrigin(t)
	c, end := p.openTunnel(t, o)
	for range 40 {
		other := p.dial(t)
		other.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		other.send("CONNECT %s HTTP/1.1\r\nHost: a\r\n\r\n", o.addr)
		if line, _ := other.br.ReadString('\n'); !strings.Contains(line, " 200 ") {
			break // refused, or not accepted
		}
	}
	big := noise(1<<20, 3)
	sent := end.sending(big, true)
	got, err := io.ReadAll(c.br)
	if err != nil {
		t.Error(err)
	}
	sameBytes(t, "down", got, big)
	<-sent
}

// The reason of a tunnel's end is the side that closed first, also where it cannot be told any more that the other has, too.
func TestFirstToCloseStaysTheReason(t *testing.T) {
	p, o := startProxy(t), startOrigin(t)
	c, up := p.openTunnel(t, o)
	c.CloseWrite()
	up.wantsEnd()
	c.SetLinger(0)
	c.Close()
	up.Close()
	wantsFields(t, p.awaitServed(t, 0), map[string]any{"close_reason": "client_closed"})
}

// ---------------------------------------------------------------------------------------------------------------------
// Bad networks

// socketTo is the descriptor that the proxy, in this process, has for the connection to a peer: descriptors have another type on Windows.
func socketTo[H ~int | ~uintptr](t *testing.T, addressOf func(H) (syscall.Sockaddr, error), peer net.Addr) H {
	t.Helper()
	for fd := H(0); fd < 4096; fd++ {
		if a, err := addressOf(fd); err == nil {
			if a, ok := a.(*syscall.SockaddrInet4); ok && netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port)).String() == peer.String() {
				return fd
			}
		}
	}
	t.Fatalf("the proxy has no connection to %v", peer)
	return 0
}

// Options of tcp(7), by their numbers on Linux.
const (
	tcpKeepIdle     = 4
	tcpKeepInterval = 5
	tcpUserTimeout  = 18
	tcpRTOMax       = 44 // from 6.15 on
)

// TestDeadPeerOptions: what has the kernel find dead peers is set on both sides, and nothing that ends a connection whose reader pauses.
func TestDeadPeerOptions(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux has the options")
	}
	p, o := startProxy(t), startOrigin(t)
	c, _ := p.openTunnel(t, o)
	for side, peer := range map[string]net.Addr{"client": c.LocalAddr(), "origin": o.Addr()} {
		fd := socketTo(t, syscall.Getpeername, peer)
		options := map[int]int{tcpKeepIdle: 30, tcpKeepInterval: 15, tcpUserTimeout: 0}
		if _, err := syscall.GetsockoptInt(fd, syscall.IPPROTO_TCP, tcpRTOMax); err == nil {
			options[tcpRTOMax] = 60_000
		}
		for option, want := range options {
			if n, err := syscall.GetsockoptInt(fd, syscall.IPPROTO_TCP, option); n != want || err != nil {
				t.Errorf("option %d of the %s's socket is %d (%v), want %d", option, side, n, err, want)
			}
		}
	}
}

// TestDeadPeers: a tunnel to a client that vanished without a word, as one does that loses power, ends when the kernel gives the client up,
// although its origin has more and more to say, which no limit for idle tunnels ends. The test has the kernel do so after two seconds,
// by TCP_USER_TIMEOUT. It runs in a network namespace, where a client's address can be taken away.
func TestDeadPeers(t *testing.T) {
	if !inNamespace(t, "--net", "ip link set lo up && ip address add 10.9.9.1/32 dev lo") {
		return
	}
	p, o := startProxy(t, "ADMIN=off", "TUNNEL_IDLE_TIMEOUT=1s"), startOrigin(t)
	open := func(from string) (c, up *peer) {
		conn, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).Dial("tcp", p.addr)
		if err != nil {
			t.Fatal(err)
		}
		c = newPeer(t, conn)
		c.send("CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", o.addr, o.addr)
		up = o.accept()
		c.head()
		return c, up
	}
	dead, deadUp := open("10.9.9.1")
	alive, aliveUp := open("127.0.0.1")
	for _, c := range []*peer{dead, alive} {
		if err := syscall.SetsockoptInt(socketTo(t, syscall.Getpeername, c.LocalAddr()), syscall.IPPROTO_TCP, tcpUserTimeout, 2000); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("ip", "address", "del", "10.9.9.1/32", "dev", "lo").CombinedOutput(); err != nil {
		t.Skipf("%v: %s", err, out)
	}
	begun := time.Now()
	received := make(chan int64, 1)
	go func() {
		n, _ := io.Copy(io.Discard, alive)
		received <- n
	}()
	sent := int64(0)
	for ; len(p.served()) == 0 && time.Since(begun) < patience; time.Sleep(100 * time.Millisecond) {
		deadUp.Write([]byte("x")) // fails when the tunnel has ended
		aliveUp.send("x")
		sent++
	}
	wantsFields(t, p.awaitServed(t, 0), map[string]any{"client.address": "10.9.9.1", "close_reason": "connection_error"})
	if took := time.Since(begun); took < 2*time.Second {
		t.Errorf("it ended after %v", took)
	}
	aliveUp.CloseWrite()
	if n := <-received; n != sent {
		t.Errorf("the client that is alive got %d bytes of %d", n, sent)
	}
	alive.Close()
	wantsFields(t, p.awaitServed(t, 1), map[string]any{"client.address": "127.0.0.1", "close_reason": "upstream_closed"})
}

// badNet stands between two peers: each connection to it becomes one to another address, and both directions pass through a toxic
// of toxiproxy's. Not through toxiproxy's own links, which leave goroutines behind when a peer is gone: it is asked here whether any are left.
type badNet struct {
	addr  string
	mu    sync.Mutex
	toxic toxics.Toxic // guarded by mu
	ways  []*badWay    // guarded by mu
}

// badWay is one direction of a connection.
type badWay struct {
	src, dst *net.TCPConn
	in, out  chan *chunks.StreamChunk
	stub     *toxics.ToxicStub
	ended    atomic.Bool // src has, in good order
}

func startBadNet(t *testing.T, to string, toxic toxics.Toxic) *badNet {
	o := startOrigin(t)
	n := &badNet{addr: o.addr, toxic: toxic}
	go func() {
		for c, err := o.Accept(); err == nil; c, err = o.Accept() {
			if far, err := net.Dial("tcp", to); err != nil {
				c.Close()
			} else {
				n.join(c.(*net.TCPConn), far.(*net.TCPConn))
			}
		}
	}()
	return n
}

func (n *badNet) join(a, b *net.TCPConn) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var both sync.WaitGroup
	for _, w := range []*badWay{{src: a, dst: b}, {src: b, dst: a}} {
		w.in, w.out = make(chan *chunks.StreamChunk), make(chan *chunks.StreamChunk)
		w.stub = toxics.NewToxicStub(w.in, w.out)
		w.suffer(n.toxic)
		both.Go(w.pass)
		n.ways = append(n.ways, w)
	}
	go func() { both.Wait(); a.Close(); b.Close() }()
}

// become changes the toxic under the connections that are open.
func (n *badNet) become(toxic toxics.Toxic) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, w := range n.ways {
		if w.stub.InterruptToxic() {
			w.suffer(toxic)
		}
	}
}

func (w *badWay) suffer(toxic toxics.Toxic) {
	switch toxic := toxic.(type) {
	case toxics.StatefulToxic:
		w.stub.State = toxic.NewState()
	case *toxics.ResetToxic:
		w.src.SetLinger(0)
		w.dst.SetLinger(0)
	}
	go w.stub.Run(&toxics.ToxicWrapper{Toxic: toxic, Toxicity: 1})
}

// pass carries bytes until src ends, which is passed on, or the toxic or dst does, which ends the connection.
func (w *badWay) pass() {
	go func() {
		_, err := io.Copy(chunks.NewChanWriter(w.in), w.src)
		w.ended.Store(err == nil)
		close(w.in)
	}()
	if _, err := io.Copy(w.dst, chunks.NewChanReader(w.out)); err == nil && w.ended.Load() {
		w.dst.CloseWrite()
	} else {
		w.dst.Close()
		w.src.Close()
	}
	go io.Copy(io.Discard, chunks.NewChanReader(w.out)) // so that nobody is left writing
	if w.stub.InterruptToxic() {
		w.stub.Close()
	}
	io.Copy(io.Discard, chunks.NewChanReader(w.in))
}

// transfer is bytes on their way through the proxy and a bad net at one leg of it: the body of an answer (GET) or of a request (POST),
// or what one side of a tunnel sends.
type transfer struct {
	what, framing string
	size          int
	leg           string // the bad one: that to the client, or that to the origin
}

func (e transfer) tunnel() bool { return e.framing == "tunnel" }

// under names a subtest.
func (e transfer) under(toxic string) string {
	return fmt.Sprintf("%s at the %s/%s, %s of %d", toxic, e.leg, e.what, e.framing, e.size)
}

// transfers are of lengths that pass through a buffer and that the kernel moves.
func transfers() (all []transfer) {
	for _, leg := range []string{"client", "origin"} {
		all = append(all, []transfer{{"GET", "length", 60_000, leg}, {"GET", "length", 120_000, leg}, {"GET", "chunked", 60_000, leg}, {"GET", "close", 60_000, leg},
			{"POST", "length", 60_000, leg}, {"POST", "length", 120_000, leg}, {"POST", "chunked", 60_000, leg},
			{"from client", "tunnel", 120_000, leg}, {"from origin", "tunnel", 120_000, leg}}...)
	}
	return all
}

// sent is what is to be written for data, after the head.
func (e transfer) sent(data []byte) []byte {
	if e.framing == "chunked" {
		return fmt.Appendf(nil, "%x\r\n%s\r\n0\r\n\r\n", len(data), data)
	}
	return data
}

// begun is a transfer whose head has passed.
type begun struct {
	net                      *badNet
	addr, msg                string // of its record: the origin as the proxy knows it, which no other is while whole runs
	client, origin, from, to *peer
	body                     io.Reader // as it comes to the receiver
	data, held, got          []byte
}

func (e transfer) begin(t, whole *testing.T, p *testProxy, toxic toxics.Toxic) (b begun) {
	t.Helper()
	o := originFor(t, whole)
	if e.leg == "client" {
		b.net = startBadNet(whole, p.addr, toxic)
		p = &testProxy{addr: b.net.addr}
	} else {
		b.net = startBadNet(whole, o.addr, toxic)
		o.addr = b.net.addr
	}
	b.addr, b.msg = o.addr, "request"
	fields := map[string]string{"length": fmt.Sprintf("Content-Length: %d\r\n", e.size), "chunked": "Transfer-Encoding: chunked\r\n"}[e.framing]
	if e.tunnel() {
		b.msg = "tunnel"
		b.client, b.origin = p.openTunnel(t, o)
	} else {
		b.client = p.dial(t)
		b.client.send("%s", o.fill(map[string]string{"GET": plainRequest, "POST": "POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\n" + fields + "\r\n"}[e.what]))
		b.origin = o.accept()
	}
	if b.from, b.to = b.client, b.origin; e.what == "GET" || e.what == "from origin" {
		b.from, b.to = b.origin, b.client
	}
	b.body = b.to.br
	switch e.what {
	case "GET":
		b.origin.head()
		b.origin.send("HTTP/1.1 200 OK\r\n%s\r\n", fields)
		resp, err := http.ReadResponse(b.to.br, nil)
		if err != nil {
			t.Fatal(err)
		}
		b.body = resp.Body
	case "POST":
		req, err := http.ReadRequest(b.to.br)
		if err != nil {
			t.Fatal(err)
		}
		b.body = req.Body
	}
	return b
}

// beginUnder has the first bytes pass, late: deadlines are pending then that are older than they. Then the net becomes toxic, and the
// rest is sent, but for the last hold bytes.
func (e transfer) beginUnder(t, whole *testing.T, p *testProxy, toxic toxics.Toxic, hold int) (b begun) {
	t.Helper()
	data := noise(e.size, 1) // before limits run
	sent := e.sent(data)
	b = e.begin(t, whole, p, &toxics.LatencyToxic{Latency: 5})
	b.data, sent, b.held = data, sent[:len(sent)-hold], sent[len(sent)-hold:]
	b.from.send("%s", sent[:1000])
	b.got = make([]byte, 900)
	if _, err := io.ReadFull(b.body, b.got); err != nil {
		t.Fatal(err)
	}
	b.net.become(toxic)
	b.from.sending(sent[1000:], false)
	return b
}

// wantsPart wants the right bytes to have come, and the receiver to be told that they are not all, or at least of an end.
func (b *begun) wantsPart(t *testing.T, plainEnd bool) {
	t.Helper()
	rest, err := io.ReadAll(b.body)
	b.got = append(b.got, rest...)
	if !bytes.HasPrefix(b.data, b.got) || len(b.got) == len(b.data) || err == nil && !plainEnd || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%d bytes of %d, as they were sent: %v; then %v", len(b.got), len(b.data), bytes.HasPrefix(b.data, b.got), err)
	}
}

// leavesNothing runs cases, after which the proxy, still running, must hold no more than before, but for pipes that it keeps for later.
func (p *testProxy) leavesNothing(t *testing.T, cases func(t *testing.T)) {
	goroutines, files := runtime.NumGoroutine(), countFiles()-openPipes()
	t.Run("all", cases)
	eventually(t, "all clients to be let go", func() bool {
		return strings.Count(p.log.all(), `"client connected"`) == strings.Count(p.log.all(), `"client closed"`)
	})
	awaitNoLeak(t, goroutines, files+openPipes())
}

// TestToxicsThatSlow: late, in tiny pieces or with a late end, everything arrives and nothing is held to be wrong.
func TestToxicsThatSlow(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startProxy(t)
	slow := map[string]toxics.Toxic{"latency": &toxics.LatencyToxic{Latency: 10, Jitter: 10}, "bandwidth": &toxics.BandwidthToxic{Rate: 2000},
		"slicer": &toxics.SlicerToxic{AverageSize: 50, SizeVariation: 40}, "slow_close": &toxics.SlowCloseToxic{Delay: 30}}
	p.leavesNothing(t, func(whole *testing.T) {
		for name, toxic := range slow {
			for _, e := range transfers() {
				whole.Run(e.under(name), func(t *testing.T) {
					t.Parallel()
					b, data := e.begin(t, whole, p, toxic), noise(e.size, 1)
					b.from.sending(e.sent(data), e.tunnel() || e.framing == "close")
					got, err := io.ReadAll(b.body)
					if sameBytes(t, e.what, got, data); err != nil {
						t.Fatal(err)
					}
					want := map[string]any{"level": "INFO", "http.response.status_code": 200.0, "http.request.body.size": float64(e.size), "http.response.body.size": float64(e.size)}
					switch e.what {
					case "GET":
						want["http.request.body.size"] = 0.0
					case "POST":
						b.origin.send(plainAnswer)
						b.client.response("POST")
						want["http.response.body.size"] = 2.0
					default: // the other direction is still open
						b.to.sending(data, true)
						sameBytes(t, "back", b.from.all(), data)
						want["close_reason"] = map[string]string{"from client": "client_closed", "from origin": "upstream_closed"}[e.what]
					}
					wantsFields(t, p.recordFor(t, b.msg, b.addr), want)
				})
			}
		}
	})
}

// TestToxicsThatCut has connections reset, or ended as if all were well, in the middle of a body: the other side is told.
func TestToxicsThatCut(t *testing.T) {
	p := startProxy(t)
	p.leavesNothing(t, func(whole *testing.T) {
		for name, toxic := range map[string]toxics.Toxic{"reset_peer": &toxics.ResetToxic{}, "limit_data": &toxics.LimitDataToxic{Bytes: 1000}} {
			for _, e := range transfers() {
				resets := name == "reset_peer"
				if !resets && e.framing == "close" && e.leg == "origin" {
					continue // such an end is that of the body
				}
				whole.Run(e.under(name), func(t *testing.T) {
					t.Parallel()
					b := e.beginUnder(t, whole, p, toxic, 20)
					b.wantsPart(t, e.tunnel() && !resets)
					b.from.Write(b.held[:5]) // that a client which ended in good order is gone shows by what it does not take
					token, status, other := "client_disconnected", 0, b.origin
					if e.leg == "origin" {
						token, other = "connection_terminated", b.client
					}
					if e.leg == "origin" && e.what == "POST" {
						status = 502
						b.client.wantsRefusal("POST", status, token)
					}
					other.wantsEnd() // before it closes, too
					other.Close()
					r := p.recordFor(t, b.msg, b.addr)
					if !e.tunnel() {
						wantsLogged(t, r, status, token)
						return
					}
					reason, plain := r["close_reason"], map[string]string{"client": "client_closed", "origin": "upstream_closed"}[e.leg]
					// To the sender at the other leg an end can be a reset, since there are bytes that nobody takes.
					if mayFail := resets || e.what != "from "+e.leg; (resets || reason != plain) && (!mayFail || reason != "connection_error") {
						t.Errorf("close_reason %v", reason)
					}
				})
			}
		}
	})
}

// TestToxicsThatSilence: in the middle of a body a peer that seems to be there swallows everything, or takes next to nothing any more.
// What is stuck ends by its limit. All get stuck first, so that the limits run at the same time.
func TestToxicsThatSilence(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startProxy(t, "HEADER_TIMEOUT=500ms", "RESPONSE_TIMEOUT=500ms", "BODY_TIMEOUT=500ms", "TUNNEL_IDLE_TIMEOUT=500ms", "IDLE_TIMEOUT=500ms")
	const much = 32 << 20 // more than the sockets on the way hold
	p.leavesNothing(t, func(whole *testing.T) {
		var checks []func()
		begin := func(name string, toxic toxics.Toxic, list []transfer) {
			for _, e := range list {
				b := e.beginUnder(whole, whole, p, toxic, 0)
				checks = append(checks, func() { whole.Run(e.under(name), func(t *testing.T) { e.endsByLimit(t, p, &b, name) }) })
			}
		}
		begin("timeout", new(toxics.TimeoutToxic), slices.DeleteFunc(transfers(), func(e transfer) bool { return e.framing == "close" && e.leg == "client" })) // it would end
		begin("slicer", &toxics.SlicerToxic{AverageSize: 100, Delay: 100_000}, []transfer{{"GET", "length", much, "client"}, {"POST", "length", much, "origin"},
			{"from origin", "tunnel", much, "client"}, {"from client", "tunnel", much, "origin"}})
		for _, check := range checks {
			check()
		}
		whole.Run("timeout at the client/in a head", func(t *testing.T) {
			o, n := originFor(t, whole), startBadNet(whole, p.addr, new(toxics.NoopToxic))
			c := (&testProxy{addr: n.addr}).dial(t)
			c.send("%s", o.fill(plainRequest)+"GET http://") // the answer to the first shows that the second has begun
			up := o.accept()
			up.head()
			up.send(plainAnswer)
			c.wants(plainGets)
			n.become(new(toxics.TimeoutToxic))
			c.wantsEnd()
			eventually(t, "the record", func() bool { return strings.Contains(p.log.all(), "(SLUICE_HEADER_TIMEOUT)") })
		})
	})
}

// endsByLimit wants one that is stuck to end, and its record to say why.
func (e transfer) endsByLimit(t *testing.T, p *testProxy, b *begun, toxic string) {
	for _, end := range []*peer{b.client, b.origin} {
		end.t = t
		end.SetDeadline(time.Now().Add(2 * patience)) // on a busy machine the others may have taken long
	}
	r := p.recordFor(t, b.msg, b.addr)
	if toxic == "slicer" {
		b.net.become(new(toxics.NoopToxic)) // what is on the way comes out, and the end behind it
	}
	b.wantsPart(t, e.tunnel())
	end, fails := map[string]struct {
		status     int
		token, why string
	}{
		"POST, timeout at the client": {408, "http_request_error", "SLUICE_BODY_TIMEOUT"},
		"GET, timeout at the origin":  {200, "http_response_timeout", "SLUICE_BODY_TIMEOUT"},
		"POST, timeout at the origin": {504, "http_response_timeout", "SLUICE_RESPONSE_TIMEOUT"},
		"GET, slicer at the client":   {200, "client_disconnected", "the client left"},
		"POST, slicer at the origin":  {504, "http_response_timeout", "SLUICE_BODY_TIMEOUT"},
	}[fmt.Sprintf("%s, %s at the %s", e.what, toxic, e.leg)]
	switch why, _ := r["error.message"].(string); {
	case e.tunnel():
		wantsFields(t, r, map[string]any{"close_reason": "idle_timeout"})
	case !fails: // all was taken from the proxy, and the connection to the origin is kept
		wantsFields(t, r, map[string]any{"level": "INFO", "http.response.body.size": float64(e.size)})
		return
	case end.status == 504:
		b.client.wantsRefusal("POST", 504, end.token, end.why)
		fallthrough
	default:
		if wantsLogged(t, r, end.status, end.token); !strings.Contains(why, end.why) {
			t.Errorf("error.message %q", why)
		}
	}
	b.from.wantsEnd()
	if took := r["duration_ms"].(float64); took < 450 || took > 5000 {
		t.Errorf("took %v ms", took)
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory

// TestMemory moves large bodies: they pass through the proxy and are not held by it.
func TestMemory(t *testing.T) {
	p := startProxy(t)
	const block, mega = 64 << 10, 1 << 20
	source, sink := bytes.Repeat([]byte{'x'}, block), make([]byte, block)
	discard := func(t *testing.T, r io.Reader, want int) {
		got := 0
		for got < want {
			n, err := r.Read(sink)
			if got += n; err != nil {
				t.Fatalf("%v after %d bytes of %d", err, got, want)
			}
		}
	}
	pour := func(to *peer, prefix, suffix string, size int) {
		piece := append(append([]byte(prefix), source...), suffix...)
		for range size / block {
			if _, err := to.Write(piece); err != nil {
				return
			}
		}
	}
	for _, e := range []struct {
		name           string
		size           int
		field          string
		prefix, suffix string
	}{
		{"length", 256 * mega, fmt.Sprintf("Content-Length: %d", 256*mega), "", ""},
		{"chunked", 64 * mega, "Transfer-Encoding: chunked", "10000\r\n", "\r\n"},
	} {
		for _, direction := range []string{"down", "up"} {
			t.Run(e.name+" "+direction, func(t *testing.T) {
				o, c := startOrigin(t), p.dial(t)
				line, field, from, to := plainRequest, e.field, (*peer)(nil), c
				if direction == "up" {
					line = "POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\n" + field + "\r\n\r\n"
				}
				c.send("%s", o.fill(line))
				up := o.accept()
				up.head()
				if from = c; direction == "down" {
					from = up
					up.send("HTTP/1.1 200 OK\r\n%s\r\n\r\n", field)
					c.head()
				} else {
					to = up
				}
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				poured := make(chan struct{})
				go func() {
					defer close(poured)
					pour(from, e.prefix, e.suffix, e.size)
				}()
				if e.prefix == "" {
					discard(t, to.br, e.size)
				} else {
					discard(t, httputil.NewChunkedReader(to.br), e.size)
				}
				<-poured
				runtime.ReadMemStats(&after)
				if grown := int64(after.TotalAlloc - before.TotalAlloc); grown > 4*mega {
					t.Errorf("%d MB moved, %d bytes allocated", e.size/mega, grown)
				}
				if grown := int64(after.HeapInuse) - int64(before.HeapInuse); grown > 4*mega {
					t.Errorf("%d MB moved, the heap grew by %d bytes", e.size/mega, grown)
				}
			})
		}
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Fuzzing

// memoryWire is a wire that has read data and gets no more.
func memoryWire(s *server, data []byte) wire {
	return wire{srv: s, tcp: &net.TCPConn{}, buf: append([]byte{}, data...), w: len(data)}
}

// sendTo connects dst, runs f and returns what that sent to dst.
func sendTo(t *testing.T, s *server, dst *wire, f func()) []byte {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	sent := make(chan []byte)
	go func() {
		b, _ := io.ReadAll(far)
		sent <- b
	}()
	dst.attach(s, conn.(*net.TCPConn))
	f()
	conn.Close()
	return <-sent
}

// isURLError tells net/http's complaints about URLs, which are not about framing, from others: Sluice passes on what browsers send.
func isURLError(err error) bool {
	var u *url.Error
	return errors.As(err, &u)
}

// wantsHeader compares the fields that pass with what net/http read of them.
func wantsHeader(t *testing.T, h *head, got http.Header) {
	t.Helper()
	want := map[string]int{}
	for _, f := range h.fields {
		if f.kind < fieldHop && !(f.kind == fieldExpect && h.minor == 0) {
			want[textproto.CanonicalMIMEHeaderKey(string(h.raw[f.start:f.colon]))]++
		}
	}
	for name, n := range want {
		extra := 0
		if name == "Via" {
			extra = 1
		}
		if name != "Trailer" && len(got[name]) != n+extra {
			t.Errorf("%d fields %q, want %d", len(got[name]), name, n+extra)
		}
	}
}

func FuzzRequest(f *testing.F) {
	for _, seed := range []string{
		"GET http://a.example/b?c HTTP/1.1\r\nHost: a.example\r\nAccept: */*\r\n\r\n",
		"POST http://a.example/ HTTP/1.1\r\nHost: a.example\r\nContent-Length: 3\r\n\r\nabc",
		"POST http://a.example HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n3;x=y\r\nabc\r\n0\r\nX: 1\r\n\r\n",
		"OPTIONS http://a.example HTTP/1.0\r\nConnection: close, X\r\nX: 1\r\nMax-Forwards: 3\r\n\r\n",
		"GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\nConnection: upgrade\r\nUpgrade: websocket\r\nTE: trailers\r\n\r\n",
		"GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\n\r\n",
	} {
		f.Add([]byte(seed))
	}
	s := &server{hop: []byte("fuzz\r\n"), cfg: &config{MaxHeader: 64 << 10, BodyTimeout: patience}, limits: limits{mostLarge: 1}, metrics: newTelemetry()}
	f.Fuzz(func(t *testing.T, data []byte) {
		c := &client{wire: memoryWire(s, data)}
		x := &exchange{summary: summary{srv: s}}
		x.begin(c)
		if x.readRequest() != nil || x.connect || x.countsForwards() && x.req.forwards == 0 {
			return
		}
		x.out = x.appendRequest(nil)
		var readErr, writeErr error
		var dst wire
		sent := sendTo(t, s, &dst, func() {
			out := bodyWriter{dst: &dst, limit: patience, head: x.out, chunked: x.reqBody.framing == bodyChunked, started: new(bool)}
			readErr, writeErr = out.copy(&x.reqBody, func() {})
		})
		if readErr != nil || writeErr != nil {
			return // never a whole message
		}
		before, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(data)))
		var body []byte
		if err == nil {
			body, err = io.ReadAll(before.Body)
		}
		if err != nil && !isURLError(err) && !strings.Contains(err.Error(), "too many transfer encodings") {
			t.Fatalf("forwarded what net/http refuses: %v\n%q\n%q", err, data, sent)
		}
		r := bufio.NewReader(bytes.NewReader(sent))
		after, err2 := http.ReadRequest(r)
		if err2 != nil && isURLError(err2) {
			return
		} else if err2 != nil {
			t.Fatalf("net/http does not read what was forwarded: %v\n%q", err2, sent)
		}
		bodyAfter, err2 := io.ReadAll(after.Body)
		if err2 != nil || r.Buffered() > 0 {
			t.Fatalf("forwarded body: %v, %d bytes behind it\n%q", err2, r.Buffered(), sent)
		}
		if after.Method != string(x.method) || after.Host != string(x.auth) || int64(len(bodyAfter)) != x.reqBody.size {
			t.Fatalf("method %q, host %q, %d bytes of body; want %q, %q, %d", after.Method, after.Host, len(bodyAfter), x.method, x.auth, x.reqBody.size)
		}
		if err == nil && !bytes.Equal(body, bodyAfter) {
			t.Fatalf("body %q, want %q", bodyAfter, body)
		}
		x.req.raw = data[bytes.Index(data, x.line):] // the wire's copy may have been moved
		wantsHeader(t, &x.req, after.Header)
	})
}

func FuzzResponse(f *testing.F) {
	for _, seed := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
		"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
		"HTTP/1.0 404 Not here\r\nX: a\r\n  b\r\n\r\nabc",
		"HTTP/1.1 304\r\nContent-Length: 3\r\nDate: x\r\n\r\n",
	} {
		f.Add([]byte(seed))
	}
	s := &server{hop: []byte("fuzz\r\n"), cfg: &config{MaxHeader: 64 << 10, BodyTimeout: patience}, limits: limits{mostLarge: 1}, metrics: newTelemetry()}
	f.Fuzz(func(t *testing.T, data []byte) {
		up := &upstream{wire: memoryWire(s, data)}
		up.w = len(data)
		raw, err := up.readHead(64<<10, -1)
		if err != nil {
			return
		}
		x := &exchange{summary: summary{srv: s, method: []byte("GET")}, keep: true}
		x.req.reset(nil)
		x.reqBody.ended.Store(true)
		x.awaitOrigin = func() {}
		x.resp.reset(raw)
		if x.status, err = x.resp.parseStatus(); err != nil || x.status < 200 {
			return
		}
		var fail *failure
		x.c = &client{}
		sent := sendTo(t, s, &x.c.wire, func() { fail = x.respond(up) })
		untilClose := !x.resp.chunked && x.resp.length < 0 // the wire's end is an error here
		if fail != nil && !untilClose {
			return
		}
		before, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(data)), nil)
		var body []byte
		if err == nil {
			body, err = io.ReadAll(before.Body)
		}
		if err != nil {
			t.Fatalf("forwarded what net/http refuses: %v\n%q\n%q", err, data, sent)
		}
		after, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(sent)), nil)
		if err != nil {
			t.Fatalf("net/http does not read what was forwarded: %v\n%q", err, sent)
		}
		got, err := io.ReadAll(after.Body)
		if untilClose {
			err = nil
		}
		if err != nil || after.StatusCode != x.status || !bytes.Equal(got, body) {
			t.Fatalf("status %d, body %q, %v; want %d, %q", after.StatusCode, got, err, x.status, body)
		}
	})
}

// FuzzChunks feeds a chunked body in pieces of every size: what is decoded must not depend on it, nor differ from net/http.
// endsInNumber is the WHATWG's test for what is an IPv4 address, in whatever form (URL, 3.5, "ends in a number checker").
func endsInNumber(host string) bool {
	host = strings.TrimSuffix(host, ".")
	last := host[strings.LastIndexByte(host, '.')+1:]
	if last != "" && strings.Trim(last, "0123456789") == "" {
		return true
	}
	digits, hex := strings.CutPrefix(strings.ToLower(last), "0x")
	return hex && strings.Trim(digits, "0123456789abcdef") == ""
}

// FuzzHost: an authority means one thing, the same to Sluice, net/url and netip, and no way of writing one evades a rule.
func FuzzHost(f *testing.F) {
	for _, seed := range []string{"a.test", "A.Test.:80", "evil.test", "x.EVIL.test.:8080", "[::1]:80", "[::ffff:127.0.0.1]", "[64:ff9b::a00:1]:443", "10.0.0.1.", "127.0.0.1:1",
		"0x7f.1", "127.1", "a..b", "user@a.test", "a.test:065535", "[fe80::1%25eth0]:80", "xn--bcher-kva.test", "a_b-c.test:0", "[2002:7f00:1::]", "8.8.8.8", "[2600::1]",
		"[::127.0.0.1]:80", "evil.test.evil.test", "evil。test", "a:b:80", "224.0.0.1", "[ff02::1]", "0.0.0.0", "a.0x", "1.2.3.4.5"} {
		f.Add(seed)
	}
	s := testServer(f, "DENY_HOSTS=.evil.test", "ALLOW_PORTS=*")
	f.Fuzz(func(t *testing.T, authority string) {
		var d destination
		if d.parse([]byte(authority), 80) != nil {
			return
		}
		host, key := string(d.host), string(d.key)
		if key != host+":"+strconv.Itoa(int(d.port)) || d.port == 0 {
			t.Fatalf("%q: key %q, host %q, port %d", authority, key, host, d.port)
		}
		if host == "" || host != strings.ToLower(host) || strings.HasSuffix(host, ".") || strings.ContainsAny(host, "[]%@") {
			t.Fatalf("%q: host %q", authority, host)
		}
		var again destination
		if err := again.parse([]byte(net.JoinHostPort(host, strconv.Itoa(int(d.port)))), 0); err != nil {
			t.Fatalf("%q: key %q does not parse: %v", authority, key, err)
		}
		if string(again.key) != key || string(again.host) != host || again.ip != d.ip || again.port != d.port {
			t.Fatalf("%q: %q %v %d, and again: %q %v %d", authority, key, d.ip, d.port, again.key, again.ip, again.port)
		}
		a, err := netip.ParseAddr(host)
		if (err == nil) != d.ip.IsValid() || err == nil && (a != d.ip || a.Is4In6() || a.Zone() != "") {
			t.Fatalf("%q: host %q is %v (%v) to netip, ip %v", authority, host, a, err, d.ip)
		}
		if err != nil && (endsInNumber(host) || strings.Contains(host, ":")) {
			t.Fatalf("%q: host %q may be an address to others", authority, host)
		}
		u, err := url.Parse("http://" + authority + "/")
		if err != nil || u.User != nil || u.Path != "/" || u.Port() != "" && u.Port() != strings.TrimLeft(u.Port(), "+-") {
			t.Fatalf("%q is not an authority to net/url: %v", authority, err)
		}
		theirs := strings.ToLower(strings.TrimSuffix(u.Hostname(), "."))
		if b, err := netip.ParseAddr(theirs); err == nil {
			theirs = b.Unmap().String()
		}
		if theirs != host {
			t.Fatalf("%q: host %q, to net/url %q", authority, host, theirs)
		}
		if n, _ := strconv.Atoi(u.Port()); u.Port() != "" && n != int(d.port) {
			t.Fatalf("%q: port %d, to net/url %q", authority, d.port, u.Port())
		}

		below := "." + strings.ToLower(strings.TrimSuffix(u.Hostname(), "."))
		if denied := strings.HasSuffix(below, ".evil.test"); (s.ruleOut(&d) != nil) != denied {
			t.Fatalf("%q: denied %v, want %v", authority, !denied, denied)
		}
		if !d.ip.IsValid() {
			return
		}
		x := &exchange{summary: summary{srv: s, dst: d}}
		allowed, refused := x.judge([]netip.Addr{d.ip})
		if (len(allowed) == 0) != (refused != nil) {
			t.Fatalf("%q: allowed %v, refused %v", authority, allowed, refused)
		}
		for _, ap := range allowed {
			if ap.Port() != d.port {
				t.Fatalf("%q: %v", authority, ap)
			}
			for _, a := range []netip.Addr{ap.Addr(), ap.Addr().Unmap(), a} {
				if a.IsLoopback() || a.IsPrivate() || a.IsLinkLocalUnicast() || a.IsUnspecified() || a.IsMulticast() {
					t.Fatalf("%q: %v is allowed", authority, ap)
				}
			}
		}
	})
}

// plainRule reads one rule by the grammar of the manual, as slowly as one likes. covers is nil for what is no rule.
func plainRule(item string) (covers func(host string, a netip.Addr, port uint16) bool) {
	if strings.ContainsFunc(item, func(r rune) bool { return r >= utf8.RuneSelf }) {
		return nil
	}
	parse := func(text string) (p netip.Prefix, ok bool) {
		if a, err := netip.ParseAddr(text); err == nil {
			return netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()), a.Zone() == ""
		}
		p, err := netip.ParsePrefix(text)
		return p, err == nil && !p.Addr().Is4In6()
	}
	within := func(p netip.Prefix, of uint16) func(string, netip.Addr, uint16) bool {
		return func(_ string, a netip.Addr, port uint16) bool {
			return (of == 0 || of == port) && a.IsValid() && p.Contains(a.WithZone(""))
		}
	}
	if p, ok := parse(item); ok {
		return within(p, 0)
	}
	of := uint16(0)
	host, digits, ported := item, "", false
	if i := strings.LastIndex(item, ":"); i >= 0 && !strings.Contains(item[i:], "]") {
		host, digits, ported = item[:i], item[i+1:], true
	}
	if ported {
		n, err := strconv.ParseUint(digits, 10, 16)
		if err != nil || n == 0 {
			return nil
		}
		of = uint16(n)
	}
	if strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]") {
		if p, ok := parse(host[1 : len(host)-1]); ok && p.Addr().Is6() {
			return within(p, of)
		}
		return nil
	}
	if p, ok := parse(host); ok {
		if p.Addr().Is6() {
			return nil // 2001:db8::/32:443 needs brackets
		}
		return within(p, of)
	}
	name := strings.ToLower(strings.TrimSuffix(host, "."))
	self, below := true, false
	if rest, ok := strings.CutPrefix(name, "*."); ok {
		name, self, below = rest, false, true
	} else if rest, ok := strings.CutPrefix(name, "."); ok {
		name, below = rest, true
	}
	if last := name[strings.LastIndexByte(name, '.')+1:]; len(name) > 253 || endsInNumber(name) || strings.HasPrefix(last, "0x") {
		return nil // Sluice takes no last label for a name that begins as a hexadecimal number, also where "0xyz" is none
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return nil
		}
	}
	return func(host string, _ netip.Addr, port uint16) bool {
		return (of == 0 || of == port) && (self && host == name || below && strings.HasSuffix(host, "."+name))
	}
}

// FuzzRules compares the maps of hostRules with plainRule, rule by rule.
func FuzzRules(f *testing.F) {
	for _, list := range []string{"example.com", "*.example.com", ".example.com", "example.com:8080", "*.example.com:8080, .example.com:443", "One.example., a_b.example\nxn--bcher-kva.example",
		"10.1.2.3", "10.0.0.0/8", "10.1.2.3/8:81", "0.0.0.0/0", "::/0", "2001:db8::1", "2001:db8::/32", "[2001:db8::1]", "[2001:db8::1]:443", "[2001:db8::/32]:443", "[::]:1", "::ffff:10.1.2.3",
		"10.0.0.0/8:80 10.1.0.0/16:81\t10.1.2.0/24:82,10.1.2.3:83", "a.example:1,a.example:2,.a.example:3,*.a.example:4,*.example", "", ",", "*", "*.", ".", "a:0", "a:65536", "a:080", "[a.example]",
		"fe80::1%eth0", "127.1", "0x7f.1", "a.example:", "::1:80", "[::1", "*.10.0.0.1", "10.0.0.1/33", "::ffff:10.0.0.0/104", "COM", "*.Com:443", "0XX", "*.0xyz"} {
		for _, host := range []string{"example.com:8080", "a.example.com", "b.a.example:3", "one.example", "10.1.2.3:81", "[2001:db8::1]:443"} {
			f.Add(list, host, "10.1.2.3")
		}
		f.Add(list, "a.example:1", "2001:db8::5")
	}
	f.Fuzz(func(t *testing.T, list, authority, resolved string) {
		var rules hostRules
		err := rules.UnmarshalText([]byte(list))
		var plain []func(string, netip.Addr, uint16) bool
		var texts []string
		for item := range strings.FieldsFuncSeq(list, func(r rune) bool { return r == ',' || r == ' ' || r == '\t' || r == '\r' || r == '\n' }) {
			covers := plainRule(item)
			if covers == nil {
				if err == nil {
					t.Fatalf("%q in %q is taken", item, list)
				}
				return
			}
			plain, texts = append(plain, covers), append(texts, item)
		}
		if err != nil {
			t.Fatalf("%q: %v", list, err)
		}
		compare := func(host string, a netip.Addr, port uint16) {
			t.Helper()
			got, want := rules.match([]byte(host), a, port), false
			for i, covers := range plain {
				covered := covers(host, a, port)
				if want = want || covered; got == texts[i] && !covered {
					t.Fatalf("%q, %q %v %d: the rule %q does not cover it", list, host, a, port, got)
				}
			}
			if want != (got != "") || got != "" && !slices.Contains(texts, got) {
				t.Fatalf("%q, %q %v %d: rule %q, want any %v", list, host, a, port, got, want)
			}
		}
		var d destination
		if d.parse([]byte(authority), 80) != nil {
			return
		}
		compare(string(d.host), d.ip, d.port)
		if a, err := netip.ParseAddr(resolved); err == nil { // as obstacle asks
			compare("", a.Unmap(), d.port)
		}
	})
}

func FuzzChunks(f *testing.F) {
	for _, seed := range []string{"3\r\nabc\r\n0\r\n\r\n", "1;x=\"y\"\r\na\r\n2\r\nbc\r\n00\r\nX: y\r\n\r\n", "ffffffffffffffff\r\n", "3\r\nabcd\r\n", "-1\r\n", "3 \r\nabc"} {
		f.Add([]byte(seed), uint8(1))
		f.Add([]byte(seed), uint8(7))
	}
	s := &server{metrics: newTelemetry()}
	decode := func(data []byte, piece int) (got []byte, err error) {
		w := memoryWire(s, nil)
		w.buf = make([]byte, len(data)+1)
		b := body{w: &w, framing: bodyChunked}
		for {
			part, done, err := b.nextBuffered()
			got = append(got, part...)
			if done || err != nil {
				return got, err
			}
			if len(data) == 0 {
				return got, io.ErrUnexpectedEOF
			}
			n := min(piece, len(data))
			w.w += copy(w.buf[w.w:], data[:n])
			data = data[n:]
		}
	}
	f.Fuzz(func(t *testing.T, data []byte, piece uint8) {
		whole, err := decode(data, len(data)+1)
		pieces, err2 := decode(data, int(piece)+1)
		if (err == nil) != (err2 == nil) || err == nil && !bytes.Equal(whole, pieces) {
			t.Fatalf("whole: %q, %v; in pieces of %d: %q, %v", whole, err, piece+1, pieces, err2)
		}
		if err != nil {
			return
		}
		message := append([]byte("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"), data...)
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(message)))
		if err != nil {
			t.Fatal(err)
		}
		if theirs, err := io.ReadAll(r.Body); err != nil || !bytes.Equal(theirs, whole) {
			t.Fatalf("net/http: %q, %v; here %q", theirs, err, whole)
		}
	})
}

// ---------------------------------------------------------------------------------------------------------------------
// Costs: allocations are gated, times are for benchstat

// quietProxy is a running proxy whose records are sampled out, and a connection to it.
func quietProxy(t testing.TB, vars ...string) (*testProxy, *net.TCPConn) {
	p := startProxy(t, append([]string{"LOG_LEVEL=info", "LOG_SAMPLE=info=0"}, vars...)...)
	return p, dialTCP(t, p.addr)
}

func dialTCP(t testing.TB, addr string) *net.TCPConn {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

const cannedResponse = "HTTP/1.1 200 OK\r\nServer: x\r\nDate: Tue, 24 Nov 2026 18:00:00 GMT\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello"

// cannedOrigin answers whenever what it has read ends with last, and allocates nothing for it. It ends when its clients have: make it
// before the proxy.
func cannedOrigin(t testing.TB, last byte) (addr string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	t.Cleanup(func() { l.Close(); serving.Wait() })
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { answerCanned(c, last) })
		}
	})
	return l.Addr().String()
}

func answerCanned(c net.Conn, last byte) {
	defer c.Close()
	in, out := make([]byte, 64<<10), []byte(cannedResponse)
	for {
		n, err := c.Read(in)
		if err != nil {
			return
		}
		if in[n-1] == last {
			c.Write(out)
		}
	}
}

func cannedRequest(method, origin, rest string) []byte {
	return []byte(method + " http://" + origin + "/some/path?q=1 HTTP/1.1\r\nHost: " + origin + "\r\nUser-Agent: bench/1.0\r\nAccept: */*\r\n" + rest)
}

func TestForwardingAllocatesNothing(t *testing.T) {
	if info, _ := debug.ReadBuildInfo(); slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		t.Skip("with -race a sync.Pool forgets on purpose")
	}
	req, in := cannedRequest("GET", cannedOrigin(t, '\n'), "\r\n"), make([]byte, 64<<10)
	_, c := quietProxy(t)
	allocs := testing.AllocsPerRun(2000, func() {
		c.Write(req)
		if n, _ := c.Read(in); !bytes.HasPrefix(in[:n], []byte("HTTP/1.1 200 ")) {
			t.Fatalf("%q", in[:n])
		}
	})
	if allocs > 0 {
		t.Errorf("%v allocations per request", allocs)
	}
}

// testServer is a server that does not listen.
func testServer(t testing.TB, vars ...string) *server {
	cfg, _, err := loadConfig(prefixed(vars...))
	if err != nil {
		t.Fatal(err)
	}
	log := newLogger(cfg, io.Discard)
	s, err := newServer(cfg, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.close(); log.close(time.Second) })
	return s
}

func BenchmarkHead(b *testing.B) {
	s := testServer(b)
	data := cannedRequest("GET", "origin.test:8080", "Accept-Language: en\r\nCookie: a=0123456789; b=0123456789\r\n\r\n")
	c := &client{wire: memoryWire(s, data)}
	x := s.exchanges.Get().(*exchange)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		c.r = 0
		x.begin(c)
		if f := x.readRequest(); f != nil {
			b.Fatal(f.text)
		}
		x.out = x.appendRequest(x.out)
	}
}

func benchmarkRequests(b *testing.B, req []byte) {
	_, c := quietProxy(b)
	in := make([]byte, 64<<10)
	b.ReportAllocs()
	for b.Loop() {
		c.Write(req)
		if _, err := c.Read(in); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkGet(b *testing.B) {
	benchmarkRequests(b, cannedRequest("GET", cannedOrigin(b, '\n'), "\r\n"))
}

func BenchmarkPost64K(b *testing.B) {
	body := append(make([]byte, 64<<10-1), '!')
	b.SetBytes(int64(len(body)))
	benchmarkRequests(b, append(cannedRequest("POST", cannedOrigin(b, '!'), "Content-Length: 65536\r\n\r\n"), body...))
}

func openRawTunnel(b *testing.B, c net.Conn, origin string) {
	in := make([]byte, 256)
	io.WriteString(c, "CONNECT "+origin+" HTTP/1.1\r\nHost: "+origin+"\r\n\r\n")
	if n, _ := c.Read(in); !bytes.HasPrefix(in[:n], []byte("HTTP/1.1 200 ")) {
		b.Fatalf("%q", in[:n])
	}
}

func BenchmarkTunnelSetUp(b *testing.B) {
	origin, in := cannedOrigin(b, '\n'), make([]byte, 1024)
	p, _ := quietProxy(b)
	for b.Loop() {
		c := dialTCP(b, p.addr)
		openRawTunnel(b, c, origin)
		io.WriteString(c, "GET / HTTP/1.1\r\n\r\n")
		c.Read(in)
		c.Close()
	}
}

func BenchmarkTunnelBytes(b *testing.B) {
	origin := cannedOrigin(b, '!')
	_, c := quietProxy(b)
	openRawTunnel(b, c, origin)
	out, in := append(make([]byte, 1<<20-1), '!'), make([]byte, 1024)
	b.SetBytes(int64(len(out)))
	for b.Loop() {
		c.Write(out)
		c.Read(in)
	}
}

// policyDecisions are the decisions about a request, each to be made often.
func policyDecisions(t testing.TB) map[string]func() {
	decisions := map[string]func(){}
	for _, n := range []int{10, 10_000} {
		var text strings.Builder
		for i := range n {
			fmt.Fprintf(&text, "host-%d.example.com,*.below-%d.example.com,.both-%d.example.com:443,10.%d.%d.0/24,2001:db8:%x::/48\n", i, i, i, i>>8&255, i&255, i)
		}
		var name, address destination
		name.parse([]byte("api.eu.below-7.example.com:443"), 0)
		address.parse([]byte("10.0.7.1:443"), 0)
		s := testServer(t, "ALLOW_HOSTS="+text.String(), "DENY_HOSTS=other.test,"+strings.ReplaceAll(strings.ReplaceAll(text.String(), "10.", "11."), "example", "instance"))
		for kind, d := range map[string]*destination{"name": &name, "address": &address} {
			decisions[fmt.Sprintf("%s among %d rules", kind, 10*n)] = func() {
				if f := s.ruleOut(d); f != nil {
					t.Fatal(f.text)
				}
			}
		}
	}
	s := testServer(t, "USERS=ann:"+hashOf(t, "secret", 4))
	x := &exchange{summary: summary{srv: s, c: &client{}, start: time.Now()}}
	x.dst.parse([]byte("api.example.com:443"), 0)
	x.req.credentials = []byte("YW5uOnNlY3JldA==")
	decisions["credentials, hosts and ports"] = func() {
		if f := x.admit(); f != nil {
			t.Fatal(f.text)
		}
	}
	for kind, a := range map[string]netip.Addr{"IPv4": netip.MustParseAddr("93.184.215.14"), "IPv6": netip.MustParseAddr("2606:2800:21f:cb07:6820:80da:af6b:8b2c"),
		"NAT64": netip.MustParseAddr("64:ff9b::808:808")} {
		decisions[kind] = func() {
			if f := s.obstacle(&x.dst, a, &s.cfg.DenyHosts); f != nil {
				t.Fatal(f.text)
			}
		}
	}
	return decisions
}

func TestPolicyAllocatesNothing(t *testing.T) {
	for name, decide := range policyDecisions(t) {
		if allocs := testing.AllocsPerRun(200, decide); allocs > 0 {
			t.Errorf("%s: %v allocations", name, allocs)
		}
	}
}

func BenchmarkPolicy(b *testing.B) {
	decisions := policyDecisions(b)
	for _, name := range slices.Sorted(maps.Keys(decisions)) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				decisions[name]()
			}
		})
	}
}

// What is sampled out is counted, and costs nothing else.
func TestSampledRecordAllocatesNothing(t *testing.T) {
	s := testServer(t, "LOG_SAMPLE=info=0")
	x := s.exchanges.Get().(*exchange)
	x.begin(&client{wire: memoryWire(s, nil)})
	x.method, x.end, x.status = []byte("GET"), time.Now(), 200
	x.record(nil)
	before := s.log.sampled[rank(slog.LevelInfo)].Load()
	if allocs := testing.AllocsPerRun(1000, func() { x.record(nil) }); allocs > 0 || len(x.attrs) > 0 {
		t.Errorf("%v allocations, %d attributes", allocs, len(x.attrs))
	}
	if n := s.log.sampled[rank(slog.LevelInfo)].Load() - before; n != 1001 {
		t.Errorf("%d records were counted", n)
	}
}

func BenchmarkRecord(b *testing.B) {
	for name, set := range map[string][]string{"json": nil, "cbor": {"LOG_FORMAT=cbor"}, "text": {"LOG_FORMAT=text"}, "sampled out": {"LOG_SAMPLE=info=0"}} {
		b.Run(name, func(b *testing.B) {
			s := testServer(b, set...)
			c := &client{wire: memoryWire(s, cannedRequest("GET", "origin.test", "\r\n"))}
			x := s.exchanges.Get().(*exchange)
			x.begin(c)
			x.readRequest()
			x.end, x.status, x.peer = time.Now(), 200, "192.0.2.1"
			b.ReportAllocs()
			for b.Loop() {
				x.attrs = x.attrs[:0] // as begin does
				x.record(nil)
			}
		})
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Helpers: certificates, TLS

// authority signs certificates for tests.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  string
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t}
	a.pem, _ = a.issue("test authority")
	return a
}

// issue makes a certificate and its key; the first is the authority's own.
func (a *authority) issue(name string) (cert, key string) {
	a.t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	serial, _ := crand.Int(crand.Reader, big.NewInt(1<<60))
	template := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	parent, signer := a.cert, a.key
	if parent == nil {
		template.IsCA, template.BasicConstraintsValid, template.KeyUsage = true, true, x509.KeyUsageCertSign
		template.ExtKeyUsage, template.IPAddresses = nil, nil
		parent, signer = template, k
	}
	der, err := x509.CreateCertificate(crand.Reader, template, parent, k.Public(), signer)
	if err != nil {
		a.t.Fatal(err)
	}
	if a.cert == nil {
		a.key = k
		a.cert, _ = x509.ParseCertificate(der)
	}
	secret, _ := x509.MarshalPKCS8PrivateKey(k)
	encode := func(kind string, b []byte) string {
		return string(pemfile.EncodeToMemory(&pemfile.Block{Type: kind, Bytes: b}))
	}
	return encode("CERTIFICATE", der), encode("PRIVATE KEY", secret)
}

// vars give a proxy a certificate directly.
func (a *authority) vars(more ...string) []string {
	cert, key := a.issue("proxy")
	return append([]string{"TLS_CERT=" + cert, "TLS_KEY=" + key}, more...)
}

// trusting is how a client speaks TLS to a proxy with a certificate of the authority.
func (a *authority) trusting(protocols ...string) *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	return &tls.Config{RootCAs: roots, ServerName: "127.0.0.1", NextProtos: protocols}
}

// knownAs is trusting with a client certificate.
func (a *authority) knownAs(name string, protocols ...string) *tls.Config {
	pair, err := tls.X509KeyPair(func() (_, _ []byte) { c, k := a.issue(name); return []byte(c), []byte(k) }())
	if err != nil {
		a.t.Fatal(err)
	}
	conf := a.trusting(protocols...)
	conf.Certificates = []tls.Certificate{pair}
	return conf
}

// trusting12 is trusting with TLS 1.2, where it can be seen whether a record is the goodbye of TLS.
func (a *authority) trusting12() *tls.Config {
	conf := a.trusting()
	conf.MaxVersion = tls.VersionTLS12
	return conf
}

// tlsPeer is a client that speaks HTTP/1.1 over TLS, driven by raw bytes.
type tlsPeer struct {
	*tls.Conn
	socket *listening12
	speaker
}

// listening12 keeps what was read from a socket.
type listening12 struct {
	*net.TCPConn
	heard []byte
}

func (l *listening12) Read(p []byte) (n int, err error) {
	n, err = l.TCPConn.Read(p)
	l.heard = append(l.heard, p[:n]...)
	return n, err
}

// saidGoodbye reports whether the last record was an alert: close_notify. crypto/tls takes a bare FIN for an end, too; others do not.
func (l *listening12) saidGoodbye() bool {
	last := byte(0)
	for b := l.heard; len(b) >= 5; b = b[min(len(b), 5+int(b[3])<<8+int(b[4])):] {
		last = b[0]
	}
	return last == 21
}

func (p *testProxy) dialTLS(t *testing.T, conf *tls.Config) *tlsPeer {
	t.Helper()
	socket := &listening12{TCPConn: p.dial(t).TCPConn}
	conn := tls.Client(socket, conf)
	if err := conn.Handshake(); err != nil {
		t.Fatalf("handshake: %v", err)
	}
	return &tlsPeer{conn, socket, speaker{conn, t, bufio.NewReader(conn)}}
}

// wantsEnd expects the end of the connection: with TLS's own goodbye, or without, which tells that something is missing.
func (c *tlsPeer) wantsEnd(whole bool) {
	c.t.Helper()
	b, err := io.ReadAll(c.br)
	if goodbye := c.socket.saidGoodbye(); len(b) > 0 || errors.Is(err, os.ErrDeadlineExceeded) || goodbye != whole {
		c.t.Errorf("got %q, %v, goodbye: %v; want the end, whole: %v", b, err, goodbye, whole)
	}
}

// wantsReset expects the connection to be reset, at once or when it is written to.
func (p *peer) wantsReset() {
	p.t.Helper()
	if _, err := io.Copy(io.Discard, p.br); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		p.t.Errorf("got %v, want a reset", err)
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Helpers: HTTP/2 by hand

// rawH2 is an HTTP/2 client of which a test sends and sees every frame. Its windows grow only when the test says so.
type rawH2 struct {
	*http2.Framer
	conn    net.Conn
	t       *testing.T
	block   bytes.Buffer
	enc     *hpack.Encoder
	nextID  uint32
	streams map[uint32]*rawStream
	offered map[http2.SettingID]uint32
	away    *http2.GoAwayFrame
	err     error // of the last read
}

// rawStream is what came on a stream.
type rawStream struct {
	statuses []string
	head     http.Header // of the last one
	body     []byte
	trailer  http.Header
	ended    bool
	reset    bool
	code     http2.ErrCode
}

func (p *testProxy) dialH2(t *testing.T, conf *tls.Config, settings ...http2.Setting) *rawH2 {
	t.Helper()
	var conn net.Conn = p.dial(t)
	if conf != nil {
		secured := tls.Client(conn.(*peer).TCPConn, conf)
		if err := secured.Handshake(); err != nil || secured.ConnectionState().NegotiatedProtocol != "h2" {
			t.Fatalf("handshake: %v, protocol %q", err, secured.ConnectionState().NegotiatedProtocol)
		}
		conn = secured
	}
	h := &rawH2{Framer: http2.NewFramer(conn, conn), conn: conn, t: t, nextID: 1, streams: map[uint32]*rawStream{}, offered: map[http2.SettingID]uint32{}}
	h.enc = hpack.NewEncoder(&h.block)
	h.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	h.AllowIllegalWrites = true
	io.WriteString(conn, http2.ClientPreface)
	h.WriteSettings(settings...)
	return h
}

// headers sends a HEADERS frame with names and values in turn.
func (h *rawH2) headers(id uint32, end bool, fields ...string) {
	h.t.Helper()
	h.block.Reset()
	for i := 0; i < len(fields); i += 2 {
		h.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	if err := h.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: h.block.Bytes(), EndStream: end, EndHeaders: true}); err != nil {
		h.t.Fatalf("HEADERS: %v", err)
	}
}

// open begins a stream.
func (h *rawH2) open(end bool, fields ...string) (id uint32) {
	h.t.Helper()
	id = h.nextID
	h.nextID += 2
	h.headers(id, end, fields...)
	return id
}

func (h *rawH2) request(method, authority, path string, end bool, fields ...string) (id uint32) {
	h.t.Helper()
	return h.open(end, append([]string{":method", method, ":scheme", "http", ":authority", authority, ":path", path}, fields...)...)
}

func (h *rawH2) connect(authority string, fields ...string) (id uint32) {
	h.t.Helper()
	return h.open(false, append([]string{":method", "CONNECT", ":authority", authority}, fields...)...)
}

func (h *rawH2) data(id uint32, end bool, data string) {
	h.t.Helper()
	if err := h.WriteData(id, end, []byte(data)); err != nil {
		h.t.Fatalf("DATA: %v", err)
	}
}

func (h *rawH2) stream(id uint32) *rawStream {
	if h.streams[id] == nil {
		h.streams[id] = &rawStream{}
	}
	return h.streams[id]
}

// read takes one frame in.
func (h *rawH2) read() bool {
	f, err := h.ReadFrame()
	if h.err = err; err != nil {
		return false
	}
	s := h.stream(f.Header().StreamID)
	switch f := f.(type) {
	case *http2.SettingsFrame:
		f.ForeachSetting(func(one http2.Setting) error { h.offered[one.ID] = one.Val; return nil })
		if !f.IsAck() {
			h.WriteSettingsAck()
		}
	case *http2.MetaHeadersFrame:
		into := http.Header{}
		for _, field := range f.RegularFields() {
			into.Add(field.Name, field.Value)
		}
		if status := f.PseudoValue("status"); status != "" {
			s.statuses, s.head = append(s.statuses, status), into
		} else {
			s.trailer = into
		}
		s.ended = s.ended || f.StreamEnded()
	case *http2.DataFrame:
		s.body = append(s.body, f.Data()...)
		s.ended = s.ended || f.StreamEnded()
	case *http2.RSTStreamFrame:
		s.reset, s.code = true, f.ErrCode
	case *http2.GoAwayFrame:
		h.away = f
	}
	return true
}

// until reads frames until what holds.
func (h *rawH2) until(what string, holds func() bool) {
	h.t.Helper()
	for !holds() {
		if !h.read() {
			h.t.Fatalf("%v while waiting for %s; streams: %s", h.err, what, h.told())
		}
	}
}

func (h *rawH2) told() (text string) {
	for id, s := range h.streams {
		text += fmt.Sprintf("%d: %+v\n", id, *s)
	}
	return text
}

// wants waits for the whole answer on a stream.
func (h *rawH2) wants(id uint32, status int, body string) *rawStream {
	h.t.Helper()
	s := h.stream(id)
	h.until(fmt.Sprintf("the end of stream %d", id), func() bool { return s.ended || s.reset })
	if !s.ended || s.statuses[len(s.statuses)-1] != strconv.Itoa(status) || string(s.body) != body {
		h.t.Fatalf("stream %d: got %+v\nwant %d %q", id, *s, status, body)
	}
	return s
}

// wantsRefusal waits for an answer of the proxy's own.
func (h *rawH2) wantsRefusal(id uint32, status int, token string) *rawStream {
	h.t.Helper()
	s := h.stream(id)
	h.until(fmt.Sprintf("the end of stream %d", id), func() bool { return s.ended || s.reset })
	if !s.ended || len(s.statuses) == 0 {
		h.t.Fatalf("stream %d: got %+v, want %d", id, *s, status)
	}
	code, _ := strconv.Atoi(s.statuses[0])
	wantsRefusal(h.t, &http.Response{StatusCode: code, Header: s.head}, string(s.body), status, token)
	return s
}

// wantsReset waits for RST_STREAM, not for an end.
func (h *rawH2) wantsReset(id uint32) *rawStream {
	h.t.Helper()
	s := h.stream(id)
	h.until(fmt.Sprintf("the reset of stream %d", id), func() bool { return s.ended || s.reset })
	if s.ended {
		h.t.Fatalf("stream %d: got %+v, want a reset", id, *s)
	}
	return s
}

// wantsTunnel waits for the 200 to a CONNECT.
func (h *rawH2) wantsTunnel(id uint32) {
	h.t.Helper()
	s := h.stream(id)
	h.until("the tunnel", func() bool { return len(s.statuses) > 0 || s.reset })
	if s.reset || s.ended || s.statuses[0] != "200" {
		h.t.Fatalf("CONNECT: %+v", *s)
	}
}

// wantsBody waits until a stream's body so far is want.
func (h *rawH2) wantsBody(id uint32, want string) {
	h.t.Helper()
	s := h.stream(id)
	h.until(fmt.Sprintf("%q", want), func() bool { return len(s.body) >= len(want) || s.ended || s.reset })
	if string(s.body) != want {
		h.t.Fatalf("stream %d: got %+v, want %q", id, *s, want)
	}
}

// wantsAlive expects the connection to serve another request.
func (h *rawH2) wantsAlive() {
	h.t.Helper()
	h.wants(h.request("OPTIONS", "127.0.0.1:9", "*", true, "max-forwards", "0"), 200, "")
}

// bothH2 runs a test over HTTP/2 without and with TLS.
func bothH2(t *testing.T, test func(t *testing.T, p *testProxy, dial func(t *testing.T, settings ...http2.Setting) *rawH2), vars ...string) {
	a := newAuthority(t)
	p := startProxy(t, append(a.vars(), vars...)...)
	t.Run("h2c", func(t *testing.T) {
		test(t, p, func(t *testing.T, settings ...http2.Setting) *rawH2 { return p.dialH2(t, nil, settings...) })
	})
	t.Run("TLS", func(t *testing.T) {
		test(t, p, func(t *testing.T, settings ...http2.Setting) *rawH2 {
			return p.dialH2(t, a.trusting("h2"), settings...)
		})
	})
}

// throughH2 is a client that sends its http requests to the proxy over HTTP/2.
func (p *testProxy) throughH2(t *testing.T, conf *tls.Config) *http.Client {
	transport := &http.Transport{Protocols: new(http.Protocols), DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		if conf == nil {
			return net.Dial(network, p.addr)
		}
		return (&tls.Dialer{Config: conf}).DialContext(ctx, network, p.addr)
	}}
	transport.Protocols.SetUnencryptedHTTP2(true) // whatever the connection goes through
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 2 * patience}
}

// ---------------------------------------------------------------------------------------------------------------------
// TLS

// Both versions of TLS and what a client says that it speaks. The second handshake of a client is a resumption: without that each
// connection costs a signature.
func TestTLSHandshakes(t *testing.T) {
	a := newAuthority(t)
	p := startProxy(t, a.vars()...)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, offer := range []string{"", "http/1.1", "h2", "h2,http/1.1"} {
			t.Run(fmt.Sprintf("%s offering %q", tls.VersionName(version), offer), func(t *testing.T) {
				conf := a.trusting()
				if offer != "" {
					conf.NextProtos = strings.Split(offer, ",")
				}
				conf.MinVersion, conf.MaxVersion, conf.ClientSessionCache = version, version, tls.NewLRUClientSessionCache(1)
				agreed, _, _ := strings.Cut(offer, ",")
				for nth := range 2 {
					o := originFor(t, t)
					if agreed == "h2" {
						h := p.dialH2(t, conf)
						id := h.request("GET", o.addr, "/", true)
						up := o.accept()
						up.head()
						up.send(plainAnswer)
						h.wants(id, 200, "hi")
						if resumed := h.conn.(*tls.Conn).ConnectionState().DidResume; resumed != (nth == 1) {
							t.Errorf("handshake %d: resumed: %v", nth, resumed)
						}
						continue
					}
					c := p.dialTLS(t, conf)
					c.send("%s", o.fill(plainRequest))
					up := o.accept()
					up.wants(o.fill(plainWants))
					up.send(plainAnswer)
					c.wants(plainGets)
					if state := c.ConnectionState(); state.NegotiatedProtocol != agreed || state.DidResume != (nth == 1) {
						t.Errorf("handshake %d: resumed: %v, protocol %q", nth, state.DidResume, state.NegotiatedProtocol)
					}
				}
			})
		}
	}
}

// A handshake that does not come to its end is told of, and leaves nothing.
func TestTLSHandshakeFails(t *testing.T) {
	if !apart(t) {
		return
	}
	a := newAuthority(t)
	p := startProxy(t, a.vars("HEADER_TIMEOUT=300ms")...)
	recorded := func(t *testing.T, nth int, words string) {
		t.Helper()
		r := p.awaitServed(t, nth)
		wantsLogged(t, r, 0, tokenRequest)
		if text := fmt.Sprint(r["error.message"]); !strings.Contains(text, words) {
			t.Errorf("error.message %q, want %q", text, words)
		}
	}
	served := 0
	for name, hello := range map[string]string{"one byte": "\x16", "half a record": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"} {
		t.Run(name, func(t *testing.T) {
			c, begun := p.dial(t), time.Now()
			c.send("%s", hello)
			c.wantsEnd()
			if took := time.Since(begun); took < 250*time.Millisecond || took > 2*time.Second {
				t.Errorf("ended after %v", took)
			}
			recorded(t, served, "SLUICE_HEADER_TIMEOUT")
			served++
		})
	}
	t.Run("not TLS after all", func(t *testing.T) {
		p.dial(t).send("\x16\x03\x01\x00\x05GET /")
		recorded(t, served, "no TLS")
		served++
	})
	t.Run("an old version", func(t *testing.T) {
		conf := a.trusting()
		conf.MinVersion, conf.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
		if err := tls.Client(p.dial(t).TCPConn, conf).Handshake(); err == nil {
			t.Error("TLS 1.1 is spoken")
		}
		recorded(t, served, "no TLS")
		served++
	})
	t.Run("an unknown protocol", func(t *testing.T) {
		if err := tls.Client(p.dial(t).TCPConn, a.trusting("acme-tls/1")).Handshake(); err == nil {
			t.Error("a protocol was agreed on")
		}
		recorded(t, served, "no TLS")
		served++
	})
	t.Run("the client hangs up", func(t *testing.T) {
		c := p.dial(t)
		c.send("\x16\x03\x01")
		c.Close()
		recorded(t, served, "no TLS")
		served++
	})
}

// Renewed files are in force a second later, but never half of them, nor none.
func TestCertificateIsRenewed(t *testing.T) {
	if !apart(t) {
		return
	}
	a, dir := newAuthority(t), t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	write := func(path, text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cert, key := a.issue("first")
	write(certFile, cert)
	write(keyFile, key)
	p := startProxy(t, "TLS_CERT_FILE="+certFile, "TLS_KEY_FILE="+keyFile)
	shown := func() string {
		c := p.dialTLS(t, a.trusting())
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].Subject.CommonName
	}
	lines := func(msg string) int { return strings.Count(p.log.all(), `"msg":"`+msg) }
	if name := shown(); name != "first" {
		t.Fatalf("the certificate of %s", name)
	}
	cert, key = a.issue("second")
	for i, change := range []func(){
		func() { write(certFile, cert) }, // whose key is not there yet
		func() { write(keyFile, "\n") },  // truncated, and written in a moment
	} {
		change()
		eventually(t, "a warning", func() bool {
			if name := shown(); name != "first" {
				t.Fatalf("after change %d the certificate of %s", i, name)
			}
			return lines("certificate not renewed") == i+1
		})
	}
	shown()
	if n := lines("certificate not renewed"); n != 2 {
		t.Errorf("%d warnings of 2 changes", n)
	}
	write(keyFile, key)
	eventually(t, "the new certificate", func() bool { return shown() == "second" })
	eventually(t, "one record of that", func() bool { return lines("certificate renewed") == 1 })
}

// With TLS_CLIENT_CA nobody is served who does not show a certificate, in whatever protocol; who does is named in the record.
func TestClientCertificates(t *testing.T) {
	a := newAuthority(t)
	p := startProxy(t, a.vars("TLS_CLIENT_CA="+a.pem)...)
	o := startOrigin(t)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for name, conf := range map[string]*tls.Config{"none": a.trusting(), "another authority's": newAuthority(t).knownAs("mallory")} {
			conf.RootCAs, conf.MaxVersion = a.trusting().RootCAs, version
			t.Run(tls.VersionName(version)+" "+name, func(t *testing.T) {
				conn := tls.Client(p.dial(t).TCPConn, conf)
				_, err := io.WriteString(conn, o.fill(plainRequest)) // a client of 1.3 is done before the server has seen its certificate
				if err == nil {
					_, err = conn.Read(make([]byte, 1))
				}
				if err == nil {
					t.Error("was served")
				}
			})
		}
	}
	t.Run("HTTP/1.1 in plain", func(t *testing.T) {
		c := p.dial(t)
		c.send("%s", o.fill(plainRequest))
		c.wantsRefusal("GET", 403, tokenDenied, "SLUICE_TLS_CLIENT_CA")
	})
	t.Run("CONNECT in plain", func(t *testing.T) {
		c := p.dial(t)
		c.send("%s", o.fill("CONNECT {o} HTTP/1.1\r\nHost: {o}\r\n\r\n"))
		c.wantsRefusal("CONNECT", 403, tokenDenied, "SLUICE_TLS_CLIENT_CA")
	})
	t.Run("h2c", func(t *testing.T) {
		h := p.dialH2(t, nil)
		h.wantsRefusal(h.request("GET", o.addr, "/", true), 403, tokenDenied)
		h.wantsRefusal(h.connect(o.addr), 403, tokenDenied)
	})
	o.wantsNone()
	t.Run("known", func(t *testing.T) {
		o := originFor(t, t)
		c := p.dialTLS(t, a.knownAs("alice"))
		c.send("%s", o.fill(plainRequest))
		up := o.accept()
		up.head()
		up.send(plainAnswer)
		c.wants(plainGets)
		wantsFields(t, p.recordFor(t, "request", o.addr), map[string]any{"user.name": "alice", "network.protocol.version": "1.1"})
	})
	t.Run("known, h2", func(t *testing.T) {
		o := originFor(t, t)
		conf := a.knownAs("bob", "h2")
		conf.ClientSessionCache = tls.NewLRUClientSessionCache(1)
		for range 2 { // a resumed session knows the client's name, too
			h := p.dialH2(t, conf)
			id := h.request("GET", o.addr, "/", true)
			up := o.accept()
			up.head()
			up.send("HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
			h.wants(id, 204, "")
			up.Close()
		}
		eventually(t, "two records of bob's", func() bool {
			return strings.Count(strings.Join(p.served(), ""), `"user.name":"bob"`) == 2
		})
	})
}

// HTTP2=false leaves HTTP/1.1, over TLS and in plain.
func TestHTTP2SwitchedOff(t *testing.T) {
	a := newAuthority(t)
	p := startProxy(t, a.vars("HTTP2=false")...)
	c := p.dialTLS(t, a.trusting("h2", "http/1.1"))
	if protocol := c.ConnectionState().NegotiatedProtocol; protocol != "http/1.1" {
		t.Errorf("agreed on %q", protocol)
	}
	if err := tls.Client(p.dial(t).TCPConn, a.trusting("h2")).Handshake(); err == nil {
		t.Error("h2 was agreed on")
	}
	plain := p.dial(t)
	plain.send("%s", http2.ClientPreface)
	plain.wantsRefusal("GET", 400, tokenRequest)
}

// ---------------------------------------------------------------------------------------------------------------------
// HTTP/1.1 over TLS

func TestHTTP1OverTLS(t *testing.T) {
	a := newAuthority(t)
	p := startProxy(t, a.vars()...)
	t.Run("one connection, many requests", func(t *testing.T) {
		o := originFor(t, t)
		c := p.dialTLS(t, a.trusting())
		c.send("%s", strings.Repeat(o.fill(plainRequest), 3)) // pipelined
		up := o.accept()
		for range 3 {
			up.wants(o.fill(plainWants))
			up.send(plainAnswer)
			c.wants(plainGets)
		}
		for _, piece := range o.fill(plainRequest) { // a record for each byte
			c.send("%c", piece)
		}
		up.wants(o.fill(plainWants))
		up.send(plainAnswer)
		c.wants(plainGets)
	})
	t.Run("chunked both ways", func(t *testing.T) {
		o := originFor(t, t)
		c := p.dialTLS(t, a.trusting())
		c.send("%s", o.fill("POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"))
		up := o.accept()
		up.wants(o.fill("POST / HTTP/1.1\r\nHost: {o}\r\n" + viaOne + "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"))
		c.send("2\r\nde\r\n0\r\nX-Sum: 1\r\n\r\n")
		up.wants("2\r\nde\r\n0\r\nX-Sum: 1\r\n\r\n")
		up.send("HTTP/1.1 200 OK\r\n" + date + "Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n")
		c.wants("HTTP/1.1 200 OK\r\n" + date + viaOne + "Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n")
		up.send("0\r\nX-End: 2\r\n\r\n")
		c.wants("0\r\nX-End: 2\r\n\r\n")
	})
	t.Run("WebSocket", func(t *testing.T) {
		o := originFor(t, t)
		c := p.dialTLS(t, a.trusting())
		const fields = "Connection: Upgrade\r\nUpgrade: websocket\r\n"
		c.send("%s", o.fill("GET http://{o}/ HTTP/1.1\r\nHost: {o}\r\n"+fields+"\r\n"))
		up := o.accept()
		up.head()
		up.send("HTTP/1.1 101 Switching Protocols\r\n" + fields + "\r\nfirst")
		c.wants("HTTP/1.1 101 Switching Protocols\r\n" + viaOne + fields + "\r\nfirst")
		c.send("second")
		up.wants("second")
		c.CloseWrite()
		up.wantsEnd()
		up.Close()
		wantsFields(t, p.recordFor(t, "request", o.addr), map[string]any{"close_reason": "client_closed", "http.response.status_code": 101.})
	})
	t.Run("large bodies", func(t *testing.T) {
		echo := startEcho(t)
		data, sum := random(7, 3<<20)
		transport := &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "https", Host: p.addr}), TLSClientConfig: a.trusting()}
		defer transport.CloseIdleConnections()
		client := &http.Client{Transport: transport, Timeout: patience}
		for _, body := range []io.Reader{bytes.NewReader(data), plainReader{bytes.NewReader(data)}} {
			resp, err := client.Post(echo, "", body)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil {
				t.Fatal(err)
			}
			sameBytes(t, sum[:8], got, data)
		}
	})
	t.Run("CONNECT", func(t *testing.T) {
		inner := serveTLS(t, a, "secret")
		conf := a.trusting()
		transport := &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "https", Host: p.addr}), TLSClientConfig: conf}
		defer transport.CloseIdleConnections()
		resp, err := (&http.Client{Transport: transport, Timeout: patience}).Get("https://" + inner + "/")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if b, _ := io.ReadAll(resp.Body); string(b) != "secret" {
			t.Errorf("got %q", b)
		}
	})
}

// serveTLS answers https requests with text.
func serveTLS(t *testing.T, a *authority, text string) (addr string) {
	t.Helper()
	cert, key := a.issue("origin")
	pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{pair}})
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, text) })}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return l.Addr().String()
}

// openTunnelTLS connects a client over TLS to an origin.
func (p *testProxy) openTunnelTLS(t *testing.T, a *authority, o *testOrigin) (client *tlsPeer, origin *peer) {
	t.Helper()
	client = p.dialTLS(t, a.trusting12())
	client.send("CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", o.addr, o.addr)
	origin = o.accept()
	client.wants("HTTP/1.1 200 Connection Established\r\n\r\n")
	return client, origin
}

func TestTunnelOverTLS(t *testing.T) {
	a := newAuthority(t)
	p := startProxy(t, a.vars()...)
	t.Run("the client closes first", func(t *testing.T) {
		o := originFor(t, t)
		c, up := p.openTunnelTLS(t, a, o)
		c.send("question")
		c.CloseWrite() // of TLS: no FIN
		if got := up.all(); string(got) != "question" {
			t.Errorf("got %q", got)
		}
		up.send("answer")
		up.Close()
		c.wants("answer")
		c.wantsEnd(true)
		wantsFields(t, p.recordFor(t, "tunnel", o.addr), map[string]any{"close_reason": "client_closed", "http.request.body.size": 8., "http.response.body.size": 6.})
	})
	t.Run("the origin closes first", func(t *testing.T) {
		o := originFor(t, t)
		c, up := p.openTunnelTLS(t, a, o)
		up.send("greeting")
		up.CloseWrite()
		c.wants("greeting")
		c.wantsEnd(true)
		c.send("thanks")
		up.wants("thanks")
		c.Close()
		up.wantsEnd()
		wantsFields(t, p.recordFor(t, "tunnel", o.addr), map[string]any{"close_reason": "upstream_closed"})
	})
	t.Run("the origin resets", func(t *testing.T) {
		o := originFor(t, t)
		c, up := p.openTunnelTLS(t, a, o)
		up.SetLinger(0)
		up.Close()
		c.wantsEnd(false)
		wantsFields(t, p.recordFor(t, "tunnel", o.addr), map[string]any{"close_reason": "connection_error"})
	})
	t.Run("the client resets", func(t *testing.T) {
		o := originFor(t, t)
		c, up := p.openTunnelTLS(t, a, o)
		c.socket.SetLinger(0)
		c.socket.Close()
		up.wantsReset()
		wantsFields(t, p.recordFor(t, "tunnel", o.addr), map[string]any{"close_reason": "connection_error"})
	})
	t.Run("much both ways", func(t *testing.T) {
		o := originFor(t, t)
		c, up := p.openTunnelTLS(t, a, o)
		down, upward := noise(2<<20, 1), noise(1<<20, 2)
		sent := up.sending(down, true)
		go func() { c.Write(upward); c.CloseWrite() }()
		got := make(chan []byte, 1)
		go func() { b, _ := io.ReadAll(c.br); got <- b }()
		sameBytes(t, "up", up.all(), upward)
		sameBytes(t, "down", <-got, down)
		if err := <-sent; err != nil {
			t.Error(err)
		}
	})
}

// A body that ends with the connection must end with TLS's goodbye when it is whole, and must not when it is not (RFC 9112, 9.8).
func TestTLSEndsTellOfTruncation(t *testing.T) {
	a := newAuthority(t)
	p := startProxy(t, a.vars()...)
	for _, whole := range []bool{true, false} {
		t.Run(fmt.Sprint("whole: ", whole), func(t *testing.T) {
			o := originFor(t, t)
			c := p.dialTLS(t, a.trusting12())
			c.send("%s", o.fill("GET http://{o}/ HTTP/1.0\r\nHost: {o}\r\n\r\n"))
			up := o.accept()
			up.head()
			up.send("HTTP/1.1 200 OK\r\n" + date + "Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n")
			if whole {
				up.send("0\r\n\r\n")
			} else {
				up.Close()
			}
			resp, err := http.ReadResponse(c.br, nil)
			if err != nil {
				if whole {
					t.Fatal(err)
				}
				return // the reset was faster
			}
			body, err := io.ReadAll(resp.Body)
			if goodbye := c.socket.saidGoodbye(); goodbye != whole || (err == nil) != whole || string(body) != "hi" {
				t.Errorf("got %q, %v, goodbye: %v", body, err, goodbye)
			}
		})
	}
	t.Run("the origin's length is not met", func(t *testing.T) {
		o := originFor(t, t)
		c := p.dialTLS(t, a.trusting12())
		c.send("%s", o.fill(plainRequest))
		up := o.accept()
		up.head()
		up.send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhi")
		up.Close()
		resp, err := http.ReadResponse(c.br, nil)
		if err == nil {
			_, err = io.ReadAll(resp.Body)
		}
		if err == nil {
			t.Error("looks complete")
		}
	})
}

// A client that leaves frees what it holds, also while its origin is slow.
func TestTLSClientLeaves(t *testing.T) {
	a := newAuthority(t)
	p := startProxy(t, a.vars()...)
	for name, leave := range map[string]func(c *tlsPeer){
		"close": func(c *tlsPeer) { c.Close() },
		"FIN":   func(c *tlsPeer) { c.socket.Close() },
		"reset": func(c *tlsPeer) { c.socket.SetLinger(0); c.socket.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // they wait for hangupGrace
			o := originFor(t, t)
			c := p.dialTLS(t, a.trusting12())
			c.send("%s", o.fill(plainRequest))
			up := o.accept()
			up.head()
			leave(c)
			up.wantsEnd()
			wantsLogged(t, p.recordFor(t, "request", o.addr), 0, tokenClient)
		})
	}
}

// Idle connections end by IDLE_TIMEOUT, and not by another limit: the handshake's deadline is over when that is done.
func TestTLSTimeouts(t *testing.T) {
	if !apart(t) {
		return
	}
	a := newAuthority(t)
	t.Run("idle", func(t *testing.T) {
		p := startProxy(t, a.vars("IDLE_TIMEOUT=200ms")...)
		c, begun := p.dialTLS(t, a.trusting12()), time.Now()
		c.wantsEnd(true)
		if took := time.Since(begun); took < 150*time.Millisecond || took > 2*time.Second {
			t.Errorf("ended after %v", took)
		}
	})
	t.Run("none but the handshake's", func(t *testing.T) {
		p := startProxy(t, a.vars("HEADER_TIMEOUT=300ms", "IDLE_TIMEOUT=0", "BODY_TIMEOUT=0")...)
		o := originFor(t, t)
		c := p.dialTLS(t, a.trusting12())
		time.Sleep(400 * time.Millisecond)
		c.send("%s", o.fill("POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nContent-Length: 4\r\n\r\nab"))
		up := o.accept()
		up.head()
		up.wants("ab")
		time.Sleep(400 * time.Millisecond)
		c.send("cd")
		up.wants("cd")
		up.send(plainAnswer)
		c.wants(plainGets)
	})
	t.Run("body", func(t *testing.T) {
		p := startProxy(t, a.vars("BODY_TIMEOUT=200ms")...)
		o := originFor(t, t)
		c := p.dialTLS(t, a.trusting12())
		c.send("%s", o.fill("POST http://{o}/ HTTP/1.1\r\nHost: {o}\r\nContent-Length: 4\r\n\r\nab"))
		up := o.accept()
		up.head()
		up.wants("ab")
		up.wantsEnd()
		if resp, _ := c.response("POST"); resp.StatusCode != 408 {
			t.Errorf("got %s", resp.Status)
		}
		c.wantsEnd(true)
	})
	t.Run("a client that does not read", func(t *testing.T) {
		p := startProxy(t, a.vars("BODY_TIMEOUT=200ms")...)
		o := originFor(t, t)
		c := p.dialTLS(t, a.trusting())
		c.send("%s", o.fill(plainRequest))
		up := o.accept()
		up.head()
		up.send("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", 64<<20)
		up.sending(make([]byte, 64<<20), true)
		p.recordFor(t, "request", o.addr)
		begun := time.Now()
		eventually(t, "the connection's end", func() bool { return p.metric(t, "sluice_client_connections") == 0 })
		if took := time.Since(begun); took > 2*time.Second {
			t.Errorf("the connection was kept for another %v", took)
		}
	})
}

// ---------------------------------------------------------------------------------------------------------------------
// HTTP/2: requests and responses

// What a request over HTTP/2 is to its origin, and what the answer is to the client.
func TestHTTP2Forwarding(t *testing.T) {
	bothH2(t, func(t *testing.T, p *testProxy, dial func(*testing.T, ...http2.Setting) *rawH2) {
		h := dial(t)
		for _, e := range []struct {
			name, method, path string
			fields             []string
			data               string // with END_STREAM; "-" = END_STREAM comes with the head
			wants              string // what the origin gets
			sends              string
			status             int
			body               string
			head, trailer      map[string]string
		}{
			{name: "GET", method: "GET", path: "/a?b=c", data: "-", wants: "GET /a?b=c HTTP/1.1\r\nHost: {o}\r\nVia: 2 sluice-test\r\n\r\n", sends: plainAnswer,
				status: 200, body: "hi", head: map[string]string{"via": "1.1 sluice-test", "content-length": "2", "date": "Tue, 15 Nov 1994 08:12:31 GMT", "content-type": "", "connection": ""}},
			{name: "GET that ends with an empty frame", method: "GET", path: "/", wants: "GET / HTTP/1.1\r\nHost: {o}\r\nVia: 2 sluice-test\r\n\r\n", sends: plainAnswer, status: 200, body: "hi"},
			{name: "HEAD", method: "HEAD", path: "/", data: "-", wants: "HEAD / HTTP/1.1\r\nHost: {o}\r\nVia: 2 sluice-test\r\n\r\n",
				sends: "HTTP/1.1 200 OK\r\nContent-Length: 77\r\n\r\n", status: 200, head: map[string]string{"content-length": "77"}},
			{name: "POST with a length", method: "POST", path: "/", fields: []string{"content-length", "5"}, data: "12345",
				wants: "POST / HTTP/1.1\r\nHost: {o}\r\nVia: 2 sluice-test\r\nContent-Length: 5\r\n\r\n12345", sends: plainAnswer, status: 200, body: "hi"},
			{name: "POST without", method: "POST", path: "/", data: "12345",
				wants: "POST / HTTP/1.1\r\nHost: {o}\r\nVia: 2 sluice-test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n0\r\n\r\n", sends: plainAnswer, status: 200, body: "hi"},
			{name: "DELETE with a body", method: "DELETE", path: "/", data: "x",
				wants: "DELETE / HTTP/1.1\r\nHost: {o}\r\nVia: 2 sluice-test\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n", sends: plainAnswer, status: 200, body: "hi"},
			{name: "OPTIONS *", method: "OPTIONS", path: "*", data: "-", wants: "OPTIONS * HTTP/1.1\r\nHost: {o}\r\nVia: 2 sluice-test\r\n\r\n", sends: plainAnswer, status: 200, body: "hi"},
			{name: "Host beside :authority", method: "GET", path: "/", fields: []string{"host", "other.test"}, data: "-",
				wants: "GET / HTTP/1.1\r\nHost: {o}\r\nVia: 2 sluice-test\r\n\r\n", sends: plainAnswer, status: 200, body: "hi"},
			{name: "cookie crumbs", method: "GET", path: "/", fields: []string{"cookie", "a=1", "cookie", "b=2", "cookie", "c=3"}, data: "-",
				wants: "GET / HTTP/1.1\r\nHost: {o}\r\nCookie: a=1; b=2; c=3\r\nVia: 2 sluice-test\r\n\r\n", sends: plainAnswer, status: 200, body: "hi"},
			{name: "values in order", method: "GET", path: "/", fields: []string{"x-a", "1", "x-a", "2"}, data: "-",
				wants: "GET / HTTP/1.1\r\nHost: {o}\r\nX-A: 1\r\nX-A: 2\r\nVia: 2 sluice-test\r\n\r\n", sends: plainAnswer, status: 200, body: "hi"},
			{name: "TE", method: "GET", path: "/", fields: []string{"te", "trailers"}, data: "-",
				wants: "GET / HTTP/1.1\r\nHost: {o}\r\nVia: 2 sluice-test\r\nTE: trailers\r\nConnection: TE\r\n\r\n", sends: plainAnswer, status: 200, body: "hi"},
			{name: "credentials for the proxy", method: "GET", path: "/", fields: []string{"proxy-authorization", "Basic YTpi"}, data: "-",
				wants: "GET / HTTP/1.1\r\nHost: {o}\r\nVia: 2 sluice-test\r\n\r\n", sends: plainAnswer, status: 200, body: "hi"},
			{name: "204", method: "GET", path: "/", data: "-", wants: "GET / HTTP/1.1\r\nHost: {o}\r\nVia: 2 sluice-test\r\n\r\n",
				sends: "HTTP/1.1 204 No Content\r\n\r\n", status: 204, head: map[string]string{"content-length": ""}},
			{name: "304", method: "GET", path: "/", data: "-", wants: "GET / HTTP/1.1\r\nHost: {o}\r\nVia: 2 sluice-test\r\n\r\n",
				sends: "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\nETag: \"x\"\r\n\r\n", status: 304, head: map[string]string{"etag": `"x"`}},
			{name: "chunks and trailers", method: "GET", path: "/", data: "-", wants: "GET / HTTP/1.1\r\nHost: {o}\r\nVia: 2 sluice-test\r\n\r\n",
				sends:  "HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\nX-Sum: 7\r\nX-More: 8\r\n\r\n",
				status: 200, body: "abcde", trailer: map[string]string{"x-sum": "7", "x-more": "8"}},
			{name: "a field of the head is no trailer", method: "GET", path: "/", data: "-", wants: "GET / HTTP/1.1\r\nHost: {o}\r\nVia: 2 sluice-test\r\n\r\n",
				sends:  "HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nX-Sum: early\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
				status: 200, body: "a", head: map[string]string{"x-sum": "early"}, trailer: map[string]string{"x-sum": ""}},
			{name: "until the connection closes", method: "GET", path: "/", data: "-", wants: "GET / HTTP/1.1\r\nHost: {o}\r\nVia: 2 sluice-test\r\n\r\n",
				sends: "HTTP/1.0 200 OK\r\n\r\nall", status: 200, body: "all"},
			{name: "hop-by-hop fields of the origin", method: "GET", path: "/", data: "-", wants: "GET / HTTP/1.1\r\nHost: {o}\r\nVia: 2 sluice-test\r\n\r\n",
				sends:  "HTTP/1.1 200 OK\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=1\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n",
				status: 200, head: map[string]string{"connection": "", "x-hop": "", "keep-alive": "", "upgrade": ""}},
		} {
			t.Run(e.name, func(t *testing.T) {
				o := originFor(t, t)
				h.t = t
				id := h.request(e.method, o.addr, e.path, e.data == "-", e.fields...)
				if e.data != "-" {
					h.data(id, true, e.data)
				}
				up := o.accept()
				up.wants(o.fill(e.wants))
				up.send("%s", e.sends)
				up.CloseWrite()
				s := h.wants(id, e.status, e.body)
				for name, value := range e.head {
					if got := s.head.Get(name); got != value {
						t.Errorf("%s: got %q, want %q", name, got, value)
					}
				}
				for name, value := range e.trailer {
					if got := s.trailer.Get(name); got != value {
						t.Errorf("trailer %s: got %q, want %q", name, got, value)
					}
				}
				wantsFields(t, p.recordFor(t, "request", o.addr), map[string]any{"network.protocol.version": "2", "http.request.method": e.method,
					"http.response.status_code": float64(e.status), "http.response.body.size": float64(len(e.body))})
			})
		}
		h.t = t
		h.wantsAlive()
	})
}

// Bytes go on as they come, both ways at once: nothing waits for an end. What an origin says beforehand passes too.
func TestHTTP2Streaming(t *testing.T) {
	bothH2(t, func(t *testing.T, p *testProxy, dial func(*testing.T, ...http2.Setting) *rawH2) {
		o, h := startOrigin(t), dial(t)
		id := h.request("POST", o.addr, "/", false, "trailer", "x-sum")
		h.data(id, false, "one")
		up := o.accept()
		up.wants(o.fill("POST / HTTP/1.1\r\nHost: {o}\r\nVia: 2 sluice-test\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n"))
		up.send("HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n")
		s := h.stream(id)
		h.until("the 103", func() bool { return len(s.statuses) > 0 || s.reset })
		if link := s.head.Get("link"); s.statuses[0] != "103" || link != "</a>; rel=preload" {
			t.Errorf("got %+v", *s)
		}
		up.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\neins\r\n"[:len("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nein")])
		h.wantsBody(id, "ein")
		if s.head.Get("link") != "" {
			t.Error("a field of the 103 is in the 200")
		}
		h.data(id, false, "two")
		up.wants("3\r\ntwo\r\n")
		up.send("\r\n1\r\ns\r\n")
		h.wantsBody(id, "eins")
		h.headers(id, true, "x-sum", "6")
		up.wants("0\r\nX-Sum: 6\r\n\r\n")
		up.send("0\r\n\r\n")
		h.wants(id, 200, "eins")
	})
}

// What is no request of HTTP/2 (RFC 9113, 8) is not passed on, nor what would be another one in HTTP/1.1.
func TestHTTP2Malformed(t *testing.T) {
	bothH2(t, func(t *testing.T, p *testProxy, dial func(*testing.T, ...http2.Setting) *rawH2) {
		whole, o := t, startOrigin(t)
		plain := func(change ...string) (fields []string) { // the plainest request with changes
			fields = []string{":method", "GET", ":scheme", "http", ":authority", o.addr, ":path", "/"}
			for i := 0; i < len(change); i += 2 {
				at := -1
				for j := 0; j < len(fields); j += 2 {
					if fields[j] == change[i] {
						at = j
					}
				}
				if at >= 0 && strings.HasPrefix(change[i], ":") {
					fields[at+1] = change[i+1]
				} else {
					fields = append(fields, change[i], change[i+1])
				}
			}
			return fields
		}
		cases := map[string][]string{
			"a request in :path":        plain(":path", "/ HTTP/1.1\r\nHost: "+o.addr+"\r\n\r\nGET /evil"),
			"a space in :path":          plain(":path", "/ HTTP/1.1"),
			"a fragment in :path":       plain(":path", "/#x"),
			"no slash in :path":         plain(":path", "x"),
			"a URL in :path":            plain(":path", "http://"+o.addr+"/"),
			"the host goes on in :path": plain(":authority", "127.0.0.1:1", ":path", "@"+o.addr+"/"),
			"* for GET":                 plain(":path", "*"),
			"an empty :path":            plain(":path", ""),
			"another in :method":        plain(":method", "GET http://"+o.addr+"/ HTTP/1.1\r\nX: y"),
			"a space in :method":        plain(":method", "GET http://"+o.addr+"/evil HTTP/1.1"),
			"an empty :method":          plain(":method", ""),
			"a path in :authority":      plain(":authority", o.addr+"/evil?"),
			"user info in :authority":   plain(":authority", "a@"+o.addr),
			"a line in :authority":      plain(":authority", o.addr+"\r\nX: y"),
			"an empty :authority":       plain(":authority", ""),
			"a zone in :authority":      plain(":authority", "[fe80::1%25lo]:80"),
			"no :method":                plain()[2:],
			"two Hosts":                 plain("host", o.addr, "host", "other.test"),
			"two Hosts, no :authority":  {":method", "GET", ":scheme", "http", ":path", "/", "host", o.addr, "host", "other.test"},
			"a line in a value":         plain("x", "y\r\nTransfer-Encoding: chunked"),
			"LF in a value":             plain("x", "y\nz: 1"),
			"CR in a value":             plain("x", "y\rz: 1"),
			"NUL in a value":            plain("x", "y\x00"),
			"a colon in a name":         plain("x:y", "1"),
			"a line in a name":          plain("x: 1\r\ny", "1"),
			"a space in a name":         plain("content-length ", "5"),
			"capitals in a name":        plain("X-Y", "1"),
			"an empty name":             plain("", "1"),
			"Transfer-Encoding":         plain("transfer-encoding", "chunked"),
			"Connection":                plain("connection", "close"),
			"Proxy-Connection":          plain("proxy-connection", "keep-alive"),
			"Keep-Alive":                plain("keep-alive", "timeout=1"),
			"Upgrade":                   plain("upgrade", "websocket"),
			"TE of HTTP/1":              plain("te", "gzip"),
			"an unknown pseudo field":   append([]string{":evil", "1"}, plain()...),
			"a pseudo field at the end": plain("x", "y", ":status", "200"),
			"a repeated pseudo field":   append([]string{":path", "/"}, plain()...),
			"a signed Content-Length":   plain("content-length", "+5"),
			"two Content-Lengths":       plain("content-length", "0", "content-length", "5"),
			"a list as Content-Length":  plain("content-length", "5, 5"),
			"an empty Content-Length":   plain("content-length", ""),
			"a Content-Length too long": plain("content-length", "99999999999999999999"),
			"CONNECT with a path":       {":method", "CONNECT", ":authority", o.addr, ":path", "/", ":scheme", "http"},
			"CONNECT without a port":    {":method", "CONNECT", ":authority", "127.0.0.1"},
			"CONNECT to a URL":          {":method", "CONNECT", ":authority", "http://" + o.addr + "/"},
			"CONNECT with a line":       {":method", "CONNECT", ":authority", o.addr + " HTTP/1.1\r\nX: y"},
			"CONNECT with a length":     {":method", "CONNECT", ":authority", o.addr, "content-length", "5"},
		}
		for name, fields := range cases {
			t.Run(name, func(t *testing.T) {
				h := dial(t)
				id := h.open(true, fields...)
				s := h.stream(id)
				for h.read() && !s.ended && !s.reset && h.away == nil {
				}
				switch {
				case s.ended && s.statuses[0] != "400" && s.statuses[0] != "501":
					t.Errorf("answered %v %q", s.statuses, s.body)
				case errors.Is(h.err, os.ErrDeadlineExceeded):
					t.Error("nothing came")
				}
			})
		}
		o.t = whole
		o.wantsNone()
	})
}

// A body that is not as long as was said is never passed on as if it were.
func TestHTTP2BodyLengths(t *testing.T) {
	bothH2(t, func(t *testing.T, p *testProxy, dial func(*testing.T, ...http2.Setting) *rawH2) {
		for name, e := range map[string]struct{ length, data string }{"less": {"5", "123"}, "more": {"2", "123"}, "none": {"5", ""}, "none wanted": {"0", "123"}} {
			t.Run(name, func(t *testing.T) {
				o, h := originFor(t, t), dial(t)
				got := make(chan []byte, 1)
				go func() {
					c, err := o.Accept()
					if err != nil {
						got <- nil
						return
					}
					defer c.Close()
					c.SetDeadline(time.Now().Add(patience))
					b, _ := io.ReadAll(c)
					got <- b
				}()
				id := h.request("POST", o.addr, "/", false, "content-length", e.length)
				h.data(id, true, e.data)
				if s := h.stream(id); true {
					for h.read() && !s.ended && !s.reset && h.away == nil {
					}
					if s.ended && s.statuses[0] == "200" {
						t.Errorf("answered %+v", *s)
					}
				}
				h.conn.Close()
				time.AfterFunc(50*time.Millisecond, func() { o.Close() })
				if sent := <-got; e.length != "0" && isMessage(sent) {
					t.Errorf("the origin got a whole request: %q", sent)
				} else if bytes.Contains(sent, []byte("123")) && e.length == "0" {
					t.Errorf("the origin got %q", sent)
				}
			})
		}
	})
}

// Large bodies both ways at once, with many streams.
func TestHTTP2BigBodies(t *testing.T) {
	a := newAuthority(t)
	p := startProxy(t, a.vars()...)
	echo := startEcho(t)
	data, _ := random(9, 512<<10)
	for name, conf := range map[string]*tls.Config{"h2c": nil, "TLS": a.trusting("h2")} {
		t.Run(name, func(t *testing.T) {
			client := p.throughH2(t, conf)
			errs := make(chan error)
			for i := range 8 {
				go func() {
					var body io.Reader = bytes.NewReader(data)
					if i%2 == 1 {
						body = plainReader{body}
					}
					resp, err := client.Post(echo+[]string{"", "?chunked"}[i/2%2], "", body)
					if err == nil {
						defer resp.Body.Close()
						var got []byte
						if got, err = io.ReadAll(resp.Body); err == nil && !bytes.Equal(got, data) {
							err = fmt.Errorf("request %d: got %d bytes that differ", i, len(got))
						}
					}
					errs <- err
				}()
			}
			for range 8 {
				if err := <-errs; err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// Who reads slowly holds up who sends: the proxy holds no more than windows and the kernel's buffers do.
func TestHTTP2BackPressure(t *testing.T) {
	if !apart(t) {
		return
	}
	bothH2(t, func(t *testing.T, p *testProxy, dial func(*testing.T, ...http2.Setting) *rawH2) {
		const much = 64 << 20
		t.Run("of the client", func(t *testing.T) {
			o, h := originFor(t, t), dial(t)
			id := h.request("GET", o.addr, "/", true)
			up := o.accept()
			up.head()
			up.send("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", much)
			up.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
			n, err := up.Write(make([]byte, much))
			if err == nil || n > 16<<20 {
				t.Errorf("the proxy took %d bytes, %v", n, err)
			}
			h.WriteRSTStream(id, http2.ErrCodeCancel)
			up.wantsEnd()
		})
		t.Run("of the origin", func(t *testing.T) {
			o, h := originFor(t, t), dial(t)
			id := h.connect(o.addr)
			o.accept()
			h.wantsTunnel(id)
			h.until("the settings", func() bool { return h.offered[http2.SettingInitialWindowSize] > 0 })
			if window := h.offered[http2.SettingInitialWindowSize]; window > 1<<20 {
				t.Errorf("a stream may send %d bytes ahead", window)
			}
			other := originFor(t, t) // whom that must not hold up
			h.data(id, false, strings.Repeat("x", 16<<10))
			get := h.request("GET", other.addr, "/", true)
			up := other.accept()
			up.head()
			up.send(plainAnswer)
			h.wants(get, 200, "hi")
		})
	})
}

// What an origin did not finish has no end on its stream, and what a client gave up is given up.
func TestHTTP2Ends(t *testing.T) {
	if !apart(t) {
		return
	}
	bothH2(t, func(t *testing.T, p *testProxy, dial func(*testing.T, ...http2.Setting) *rawH2) {
		h := dial(t)
		for name, answer := range map[string]string{
			"a length that is not met": "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhi",
			"a last chunk missing":     "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n",
			"a chunk cut":              "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhi",
		} {
			t.Run(name, func(t *testing.T) {
				o := originFor(t, t)
				h.t = t
				id := h.request("GET", o.addr, "/", true)
				up := o.accept()
				up.head()
				up.send("%s", answer)
				up.Close()
				h.wantsReset(id)
				h.wantsAlive()
			})
		}
		t.Run("an origin that resets", func(t *testing.T) {
			o := originFor(t, t)
			h.t = t
			id := h.request("GET", o.addr, "/", true)
			up := o.accept()
			up.head()
			up.send("HTTP/1.0 200 OK\r\n\r\nhi")
			h.wantsBody(id, "hi")
			up.SetLinger(0)
			up.Close()
			h.wantsReset(id)
		})
		for name, leave := range map[string]func(h *rawH2, id uint32){
			"RST_STREAM":        func(h *rawH2, id uint32) { h.WriteRSTStream(id, http2.ErrCodeCancel) },
			"the connection":    func(h *rawH2, _ uint32) { h.conn.Close() },
			"a broken protocol": func(h *rawH2, _ uint32) { h.WriteRawFrame(http2.FrameData, 0, 0, []byte("x")) },
		} {
			t.Run("the client gives up by "+name, func(t *testing.T) {
				t.Parallel() // net/http ends a connection a second after it has said what was wrong
				o, h := originFor(t, t), dial(t)
				id := h.request("GET", o.addr, "/", true)
				up := o.accept()
				up.head()
				leave(h, id)
				up.wantsEnd()
				wantsLogged(t, p.recordFor(t, "request", o.addr), 0, tokenClient)
			})
		}
		t.Run("the client gives up its body", func(t *testing.T) {
			o := originFor(t, t)
			h.t = t
			id := h.request("POST", o.addr, "/", false, "content-length", "5")
			h.data(id, false, "123")
			up := o.accept()
			up.head()
			up.wants("123")
			h.WriteRSTStream(id, http2.ErrCodeCancel)
			up.wantsEnd()
			wantsLogged(t, p.recordFor(t, "request", o.addr), 0, tokenClient)
			h.wantsAlive()
		})
		t.Run("the origin answers before it has all", func(t *testing.T) {
			o := originFor(t, t)
			h.t = t
			id := h.request("POST", o.addr, "/", false, "content-length", "5")
			h.data(id, false, "123")
			up := o.accept()
			up.head()
			up.send("HTTP/1.1 413 Too Much\r\nContent-Length: 2\r\n\r\nno")
			h.wants(id, 413, "no")
			h.wantsAlive()
		})
	})
}

// ---------------------------------------------------------------------------------------------------------------------
// HTTP/2: tunnels

func TestHTTP2Tunnels(t *testing.T) {
	bothH2(t, func(t *testing.T, p *testProxy, dial func(*testing.T, ...http2.Setting) *rawH2) {
		h := dial(t)
		open := func(t *testing.T) (o *testOrigin, id uint32, up *peer) {
			o = originFor(t, t)
			h.t = t
			id = h.connect(o.addr)
			up = o.accept()
			h.wantsTunnel(id)
			return o, id, up
		}
		t.Run("the client ends first", func(t *testing.T) {
			o, id, up := open(t)
			h.data(id, false, "ask")
			up.wants("ask")
			h.data(id, true, " more")
			if got := up.all(); string(got) != " more" {
				t.Errorf("got %q", got)
			}
			up.send("answer")
			h.wantsBody(id, "answer") // the other way is still open
			up.Close()
			h.wants(id, 200, "answer")
			wantsFields(t, p.recordFor(t, "tunnel", o.addr), map[string]any{"close_reason": "client_closed", "network.protocol.version": "2",
				"http.request.body.size": 8., "http.response.body.size": 6.})
		})
		t.Run("the origin ends first", func(t *testing.T) {
			o, id, up := open(t)
			up.send("bye")
			up.CloseWrite()
			h.wants(id, 200, "bye")
			wantsFields(t, p.recordFor(t, "tunnel", o.addr), map[string]any{"close_reason": "upstream_closed", "http.response.body.size": 3.})
		})
		t.Run("the origin resets", func(t *testing.T) {
			o, id, up := open(t)
			up.SetLinger(0)
			up.Close()
			h.wantsReset(id)
			wantsFields(t, p.recordFor(t, "tunnel", o.addr), map[string]any{"close_reason": "connection_error"})
		})
		t.Run("the client resets", func(t *testing.T) {
			for range 20 { // what notices it first is chance
				o, id, up := open(t)
				h.data(id, false, "x")
				up.wants("x") // earlier there is a request that was given up, not a tunnel
				h.WriteRSTStream(id, http2.ErrCodeCancel)
				if up.wantsReset(); t.Failed() {
					return
				}
				wantsFields(t, p.recordFor(t, "tunnel", o.addr), map[string]any{"close_reason": "connection_error"})
			}
		})
		t.Run("END_STREAM with the request", func(t *testing.T) {
			o := originFor(t, t)
			h.t = t
			id := h.open(true, ":method", "CONNECT", ":authority", o.addr)
			up := o.accept()
			if got := up.all(); len(got) > 0 {
				t.Errorf("got %q", got)
			}
			up.send("late")
			up.Close()
			h.wants(id, 200, "late")
		})
		t.Run("many", func(t *testing.T) {
			o := originFor(t, t)
			h.t = t
			ids, ups := make([]uint32, 50), map[string]*peer{}
			for i := range ids {
				ids[i] = h.connect(o.addr)
				h.data(ids[i], false, fmt.Sprintf("%03d", i))
			}
			for range ids {
				up := o.accept()
				name := make([]byte, 3)
				io.ReadFull(up.br, name)
				ups[string(name)] = up
			}
			if len(ups) != len(ids) {
				t.Fatalf("%d tunnels of %d", len(ups), len(ids))
			}
			for i, id := range ids {
				ups[fmt.Sprintf("%03d", i)].send("<%d>", i)
				h.wantsBody(id, fmt.Sprintf("<%d>", i))
			}
			if n := p.metric(t, "sluice_tunnels"); n < float64(len(ids)) {
				t.Errorf("%v tunnels are counted", n)
			}
			h.conn.Close()
			for _, up := range ups {
				up.wantsReset()
			}
		})
	})
}

// WebSockets are tunnels of extended CONNECT (RFC 8441). net/http offers that only when asked before it starts.
func TestHTTP2WebSocket(t *testing.T) {
	if !again(t, "env", "GODEBUG=http2xconnect=1", os.Args[0], "-test.run", "^"+t.Name()+"$", "-test.v") {
		return
	}
	bothH2(t, func(t *testing.T, p *testProxy, dial func(*testing.T, ...http2.Setting) *rawH2) {
		h := dial(t)
		ask := func(o *testOrigin, path string, fields ...string) uint32 {
			return h.open(false, append([]string{":method", "CONNECT", ":protocol", "websocket", ":scheme", "http", ":authority", o.addr, ":path", path,
				"sec-websocket-version", "13", "sec-websocket-protocol", "chat"}, fields...)...)
		}
		h.until("the settings", func() bool { return len(h.offered) > 0 })
		if h.offered[http2.SettingEnableConnectProtocol] != 1 {
			t.Fatalf("extended CONNECT is not offered: %v", h.offered)
		}
		upgrade := func(t *testing.T, o *testOrigin, accepts func(key string) string) (up *peer) {
			up = o.accept()
			req, err := http.ReadRequest(up.br)
			if err != nil {
				t.Fatal(err)
			}
			if req.Method != "GET" || req.URL.Path != "/chat" || req.Host != o.addr || req.Header.Get("Upgrade") != "websocket" || req.Header.Get("Sec-Websocket-Protocol") != "chat" ||
				len(req.Header["Sec-Websocket-Key"]) != 1 {
				t.Errorf("the origin got %+v", req)
			}
			up.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Protocol: chat\r\nSec-WebSocket-Accept: %s\r\n\r\n",
				accepts(req.Header.Get("Sec-Websocket-Key")))
			return up
		}
		t.Run("accepted", func(t *testing.T) {
			o := originFor(t, t)
			h.t = t
			id := ask(o, "/chat", "sec-websocket-key", "AAAAAAAAAAAAAAAAAAAAAA==") // some clients send one: it is this hop's that counts
			up := upgrade(t, o, acceptKey)
			h.wantsTunnel(id)
			if s := h.stream(id); s.head.Get("sec-websocket-protocol") != "chat" || s.head.Get("sec-websocket-accept")+s.head.Get("upgrade")+s.head.Get("connection") != "" {
				t.Errorf("got %v", s.head)
			}
			h.data(id, false, "frame")
			up.wants("frame")
			up.send("other")
			h.wantsBody(id, "other")
			h.data(id, true, "")
			up.wantsEnd()
			up.Close()
			h.wants(id, 200, "other")
		})
		t.Run("the key is not answered", func(t *testing.T) {
			o := originFor(t, t)
			h.t = t
			id := ask(o, "/chat")
			up := upgrade(t, o, func(string) string { return "bm8=" })
			h.wantsRefusal(id, 502, "http_protocol_error")
			up.wantsEnd()
		})
		t.Run("the origin says no", func(t *testing.T) {
			o := originFor(t, t)
			h.t = t
			id := ask(o, "/")
			up := o.accept()
			up.head()
			up.send("HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno")
			h.wants(id, 404, "no")
		})
		t.Run("another protocol", func(t *testing.T) {
			h.t = t
			id := h.open(false, ":method", "CONNECT", ":protocol", "connect-ip", ":scheme", "http", ":authority", "127.0.0.1:1", ":path", "/")
			h.wantsRefusal(id, 501, tokenRequest)
		})
		t.Run("no path", func(t *testing.T) {
			o := originFor(t, t)
			h.t = t
			id := ask(o, "x:1")
			s := h.stream(id)
			h.until("an answer", func() bool { return s.ended || s.reset })
			if !s.reset && s.statuses[0] != "400" {
				t.Errorf("got %+v", *s)
			}
			o.wantsNone()
		})
	})
}

// acceptKey is what an origin answers to a WebSocket's key (RFC 6455, 4.2.2).
func acceptKey(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.EncodeToString(sum[:])
}

// ---------------------------------------------------------------------------------------------------------------------
// HTTP/2: limits

// Every refusal is told on its stream alone, with Proxy-Status, whether CONNECT or not.
func TestHTTP2Refusals(t *testing.T) {
	p := startProxy(t, "DENY_HOSTS=denied.test", "MAX_REQUEST_BODY=10", "MAX_RESPONSE_BODY=20", "MAX_TUNNELS=2", "MAX_HEADER=2KiB")
	h := p.dialH2(t, nil)
	dead := occupied(t)
	closed := freeAddr(t)
	t.Run("by rule", func(t *testing.T) {
		h.t = t
		h.wantsRefusal(h.request("GET", "denied.test", "/", true), 403, tokenDenied)
		h.wantsRefusal(h.connect("denied.test:443"), 403, tokenDenied)
		h.wantsRefusal(h.connect("10.0.0.1:443"), 403, tokenProhibited)
		h.wantsRefusal(h.request("GET", closed, "/", true), 502, tokenRefused)
		h.wantsRefusal(h.connect(closed), 502, tokenRefused)
		h.wantsRefusal(h.connect(p.addr), 502, tokenLoop)
		h.wantsRefusal(h.request("GET", dead, "/", true, "via", "1.1 sluice-test"), 502, tokenLoop)
		if s := h.wants(h.request("HEAD", "denied.test", "/", true), 403, ""); !strings.Contains(s.head.Get("proxy-status"), tokenDenied) {
			t.Errorf("HEAD was answered with %v", s.head)
		}
	})
	t.Run("MAX_TUNNELS counts streams", func(t *testing.T) {
		o, other := originFor(t, t), originFor(t, t)
		h.t = t
		first, second := h.connect(o.addr), h.connect(other.addr)
		o.accept()
		up := other.accept()
		h.wantsTunnel(first)
		h.wantsTunnel(second)
		h.wantsRefusal(h.connect(dead), 503, tokenLimit)
		h.WriteRSTStream(first, http2.ErrCodeCancel)
		p.recordFor(t, "tunnel", o.addr)
		third := h.connect(o.addr)
		o.accept()
		h.wantsTunnel(third)
		up.send("still")
		h.wantsBody(second, "still")
		h.WriteRSTStream(second, http2.ErrCodeCancel)
		h.WriteRSTStream(third, http2.ErrCodeCancel)
	})
	t.Run("MAX_REQUEST_BODY", func(t *testing.T) {
		o := originFor(t, t)
		h.t = t
		id := h.request("POST", o.addr, "/", false, "content-length", "11")
		h.wantsRefusal(id, 413, tokenRequest)
		o.wantsNone()
		id = h.request("POST", o.addr, "/", false)
		h.data(id, false, "0123456789a")
		up := o.accept()
		h.wantsRefusal(id, 413, tokenRequest)
		if sent, _ := io.ReadAll(up.br); isMessage(sent) {
			t.Errorf("the origin got a whole request: %q", sent)
		}
	})
	t.Run("MAX_RESPONSE_BODY", func(t *testing.T) {
		o := originFor(t, t)
		h.t = t
		id := h.request("GET", o.addr, "/", true)
		up := o.accept()
		up.head()
		up.send("HTTP/1.1 200 OK\r\nContent-Length: 21\r\n\r\n")
		h.wantsRefusal(id, 502, tokenBodySize)
		id = h.request("GET", o.addr, "/", true)
		up = o.accept()
		up.head()
		up.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
		h.wantsBody(id, "a")
		up.send("14\r\n01234567890123456789\r\n0\r\n\r\n")
		h.wantsReset(id)
	})
	t.Run("MAX_HEADER", func(t *testing.T) {
		h.t = t
		h.until("the settings", func() bool { return len(h.offered) > 0 })
		id := h.request("GET", dead, "/"+strings.Repeat("x", 2100), true)
		s := h.stream(id)
		h.until("an answer", func() bool { return s.ended || s.reset })
		if !s.reset && s.statuses[0] != "431" && s.statuses[0] != "414" {
			t.Errorf("got %+v", *s)
		}
	})
	h.t = t
	h.wantsAlive()
}

// Credentials are those of each stream, not of the connection; RATE counts streams.
func TestHTTP2WhoMayAsk(t *testing.T) {
	p := startProxy(t, "USERS=alice:secret", "RATE=1", "RATE_BURST=5")
	o, h := startOrigin(t), p.dialH2(t, nil)
	know := []string{"proxy-authorization", strings.TrimPrefix(basic("alice:secret"), "Proxy-Authorization: ")}
	know[1] = strings.TrimSpace(know[1])
	id := h.request("GET", o.addr, "/", true, know...)
	up := o.accept()
	if head := up.head(); strings.Contains(strings.ToLower(head), "authorization") {
		t.Errorf("the origin got %q", head)
	}
	up.send(plainAnswer)
	h.wants(id, 200, "hi")
	wantsFields(t, p.recordFor(t, "request", o.addr), map[string]any{"user.name": "alice"})
	if s := h.wantsRefusal(h.request("GET", o.addr, "/", true), 407, tokenDenied); !strings.HasPrefix(s.head.Get("proxy-authenticate"), "Basic realm=") {
		t.Errorf("got %v", s.head)
	}
	h.wantsRefusal(h.connect(o.addr), 407, tokenDenied)
	know[1] = strings.TrimSpace(strings.TrimPrefix(basic("alice:wrong"), "Proxy-Authorization: "))
	h.wantsRefusal(h.connect(o.addr, know...), 407, tokenDenied)
	h.wantsRefusal(h.connect(o.addr), 407, tokenDenied)
	if s := h.wantsRefusal(h.connect(o.addr), 429, tokenDenied); s.head.Get("retry-after") == "" {
		t.Errorf("got %v", s.head)
	}
}

func TestHTTP2Timeouts(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startProxy(t, "BODY_TIMEOUT=250ms", "RESPONSE_TIMEOUT=250ms", "TUNNEL_IDLE_TIMEOUT=250ms", "TUNNEL_HALF_CLOSE_TIMEOUT=100ms", "HEADER_TIMEOUT=300ms", "IDLE_TIMEOUT=400ms")
	patient := startProxy(t, "BODY_TIMEOUT=250ms")
	start := func(t *testing.T, settings ...http2.Setting) (*testOrigin, *rawH2, func()) {
		t.Parallel()
		o, h, begun := originFor(t, t), p.dialH2(t, nil, settings...), time.Now()
		return o, h, func() {
			t.Helper()
			if took := time.Since(begun); took < 80*time.Millisecond || took > 1500*time.Millisecond {
				t.Errorf("took %v", took)
			}
		}
	}
	t.Run("no response", func(t *testing.T) {
		o, h, timely := start(t)
		id := h.request("GET", o.addr, "/", true)
		o.accept()
		h.wantsRefusal(id, 504, tokenResponseTimeout)
		timely()
	})
	t.Run("a response that stops", func(t *testing.T) {
		o, h, timely := start(t)
		id := h.request("GET", o.addr, "/", true)
		up := o.accept()
		up.head()
		up.send("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi")
		h.wantsReset(id)
		timely()
		wantsLogged(t, p.recordFor(t, "request", o.addr), 0, tokenResponseTimeout)
	})
	t.Run("a request that stops", func(t *testing.T) {
		o, h, timely := start(t)
		id := h.request("POST", o.addr, "/", false, "content-length", "5")
		h.data(id, false, "123")
		up := o.accept()
		h.wantsRefusal(id, 408, tokenRequest)
		up.head()
		up.wants("123")
		up.wantsEnd()
		timely()
	})
	t.Run("a GET whose end does not come", func(t *testing.T) {
		_, h, timely := start(t)
		h.wantsRefusal(h.request("GET", occupied(t), "/", false), 408, tokenRequest)
		timely()
	})
	t.Run("an idle tunnel", func(t *testing.T) {
		o, h, timely := start(t)
		id := h.connect(o.addr)
		up := o.accept()
		h.wantsTunnel(id)
		up.wantsEnd()
		s := h.stream(id)
		h.until("the end", func() bool { return s.ended || s.reset })
		timely()
		wantsFields(t, p.recordFor(t, "tunnel", o.addr), map[string]any{"close_reason": "idle_timeout"})
	})
	t.Run("half a tunnel", func(t *testing.T) {
		o, h, timely := start(t)
		id := h.connect(o.addr)
		o.accept()
		h.wantsTunnel(id)
		h.data(id, true, "")
		s := h.stream(id)
		h.until("the end", func() bool { return s.ended || s.reset })
		timely()
		wantsFields(t, p.recordFor(t, "tunnel", o.addr), map[string]any{"close_reason": "half_close_timeout"})
	})
	// A client that opens no window holds a goroutine for each stream, as one of HTTP/1.1 does that does not read: not for ever.
	for name, answer := range map[string]string{
		"a short answer":            plainAnswer,
		"a long one":                "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + strings.Repeat("x", 100000),
		"the front of a short one":  "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhi",
		"chunks and trailers, too":  "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-A: b\r\n\r\n",
		"until the connection ends": "HTTP/1.0 200 OK\r\n\r\nhi",
	} {
		t.Run("a shut window and "+name, func(t *testing.T) {
			o, h, timely := start(t, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
			id := h.request("GET", o.addr, "/", true)
			up := o.accept()
			up.head()
			up.sending([]byte(answer), true)
			h.wantsReset(id)
			timely()
		})
	}
	t.Run("a shut window and a tunnel", func(t *testing.T) {
		o, h, timely := start(t, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
		id := h.connect(o.addr)
		up := o.accept()
		h.wantsTunnel(id)
		up.send("hi")
		h.wantsReset(id)
		timely()
	})
	t.Run("a tunnel whose client pauses", func(t *testing.T) { // BODY_TIMEOUT is not for it
		t.Parallel()
		o, h := originFor(t, t), patient.dialH2(t, nil, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
		id := h.connect(o.addr)
		up := o.accept()
		h.wantsTunnel(id)
		up.send("hi")
		time.Sleep(500 * time.Millisecond)
		h.WriteWindowUpdate(id, 100)
		h.wantsBody(id, "hi")
	})
	t.Run("a refusal that is not taken", func(t *testing.T) {
		_, h, timely := start(t, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
		h.wantsReset(h.connect("10.0.0.1:80"))
		timely()
	})
	t.Run("nothing asked", func(t *testing.T) {
		_, h, timely := start(t)
		h.until("GOAWAY", func() bool { return h.away != nil })
		timely()
	})
}

// The preface may be slow, but not for ever.
func TestSlowPreface(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startProxy(t, "HEADER_TIMEOUT=300ms")
	for _, n := range []int{1, 3, 10, len(http2.ClientPreface) - 1} {
		t.Run(fmt.Sprint(n, " bytes"), func(t *testing.T) {
			t.Parallel()
			c, begun := p.dial(t), time.Now()
			c.send("%s", http2.ClientPreface[:n])
			c.wantsRefusal("GET", 408, tokenRequest, "SLUICE_HEADER_TIMEOUT")
			c.wantsEnd()
			if took := time.Since(begun); took < 250*time.Millisecond || took > 1500*time.Millisecond {
				t.Errorf("took %v", took)
			}
		})
	}
	t.Run("byte by byte", func(t *testing.T) {
		c := p.dial(t)
		for _, b := range []byte(http2.ClientPreface) {
			c.send("%c", b)
		}
		h := http2.NewFramer(c, c.br)
		h.WriteSettings()
		if f, err := h.ReadFrame(); err != nil || f.Header().Type != http2.FrameSettings {
			t.Errorf("got %v, %v", f, err)
		}
	})
	t.Run("HTTP/1.1 that begins like it", func(t *testing.T) {
		o := originFor(t, t)
		c := p.dial(t)
		c.send("P")
		time.Sleep(20 * time.Millisecond)
		c.send("%s", o.fill("UT http://{o}/ HTTP/1.1\r\nHost: {o}\r\nContent-Length: 1\r\n\r\nx"))
		up := o.accept()
		up.wants(o.fill("PUT / HTTP/1.1\r\nHost: {o}\r\n" + viaOne + "Content-Length: 1\r\n\r\nx"))
		up.send(plainAnswer)
		c.wants(plainGets)
		c.wantsInSync()
	})
	t.Run("almost", func(t *testing.T) {
		c := p.dial(t)
		c.send("PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n")
		c.wantsRefusal("GET", 400, tokenRequest)
	})
}

// What costs a client little must not cost the proxy much.
func TestHTTP2Floods(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startProxy(t)
	used := func() (goroutines int, memory uint64) {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return runtime.NumGoroutine(), m.HeapInuse
	}
	// flood sends until the connection ends or enough was sent, and watches what that takes.
	flood := func(t *testing.T, h *rawH2, rounds int, send func() error) (ended bool) {
		t.Helper()
		goroutines, memory := used()
		gone := make(chan struct{})
		go func() {
			defer close(gone)
			io.Copy(io.Discard, h.conn) // what the proxy asks for, it does not get
		}()
		h.conn.SetWriteDeadline(time.Now().Add(patience))
		for i := range rounds {
			if err := send(); err != nil {
				ended = true
				break
			}
			if i%512 == 0 {
				if g, m := used(); g > goroutines+2000 || m > memory+128<<20 {
					t.Fatalf("after %d rounds: %d goroutines (%d before), %d MiB (%d before)", i, g, goroutines, m>>20, memory>>20)
				}
			}
		}
		h.conn.Close()
		<-gone
		// Frames that it has sent are read after its end, so that streams begin until the proxy has come to the last of them.
		eventually(t, "the connection to end", func() bool { return p.metric(t, "sluice_client_connections") == 0 })
		eventually(t, "goroutines to end", func() bool { g, _ := used(); return g <= goroutines+5 })
		eventually(t, "tunnels to end", func() bool { return p.metric(t, "sluice_tunnels") == 0 })
		return ended
	}
	alive := func(t *testing.T) { t.Helper(); h := p.dialH2(t, nil); h.wantsAlive(); h.conn.Close() }

	t.Run("rapid reset", func(t *testing.T) {
		o := originFor(t, t)
		var dials atomic.Int64
		go func() {
			for {
				c, err := o.Accept()
				if err != nil {
					return
				}
				dials.Add(1)
				go answerAll(c)
			}
		}()
		for _, method := range []string{"GET", "CONNECT"} {
			h, n := p.dialH2(t, nil), 0
			flood(t, h, 10_000, func() error {
				id, err := h.tryOpen(method, o.addr)
				if n++; n%3 == 0 { // some get near their end before
					runtime.Gosched()
				}
				return errors.Join(err, h.WriteRSTStream(id, http2.ErrCodeCancel))
			})
		}
		t.Logf("%d dials", dials.Load())
		alive(t)
	})
	t.Run("resets at the end", func(t *testing.T) { // when a stream's handler has just returned
		o := originFor(t, t)
		go func() {
			for {
				c, err := o.Accept()
				if err != nil {
					return
				}
				go answerAll(c)
			}
		}()
		h := p.dialH2(t, nil)
		for range 1500 {
			id := h.request("GET", o.addr, "/", true)
			s := h.stream(id)
			h.until("a head", func() bool { return len(s.statuses) > 0 || s.reset })
			h.WriteRSTStream(id, http2.ErrCodeCancel)
		}
		h.wantsAlive()
		h.conn.Close()
	})
	t.Run("resets provoked by window updates", func(t *testing.T) {
		h := p.dialH2(t, nil)
		flood(t, h, 5_000, func() error {
			id, err := h.tryOpen("GET", "10.0.0.1")
			return errors.Join(err, h.WriteWindowUpdate(id, 1<<31-1), h.WriteWindowUpdate(id, 1<<31-1))
		})
		alive(t)
	})
	t.Run("CONTINUATION without end", func(t *testing.T) {
		h := p.dialH2(t, nil)
		h.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: nil})
		if !flood(t, h, 20_000, func() error { return h.WriteContinuation(1, false, bytes.Repeat([]byte{0x40, 1, 'a', 1, 'b'}, 800)) }) {
			t.Error("80 MB of a head were taken")
		}
		alive(t)
	})
	t.Run("a header bomb", func(t *testing.T) {
		h := p.dialH2(t, nil)
		h.block.Reset()
		h.enc.WriteField(hpack.HeaderField{Name: "a", Value: strings.Repeat("x", 4000)})
		h.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: h.block.Bytes(), EndHeaders: true, EndStream: true})
		bomb := bytes.Repeat([]byte{0x80 | 62}, 16_000) // each is that field
		id := uint32(1)
		flood(t, h, 50, func() error {
			id += 2
			return h.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: bomb, EndHeaders: true, EndStream: true})
		})
		alive(t)
	})
	for name, send := range map[string]func(h *rawH2) error{
		"SETTINGS": func(h *rawH2) error {
			return h.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 15})
		},
		"PING":        func(h *rawH2) error { return h.WritePing(false, [8]byte{}) },
		"empty DATA":  func(h *rawH2) error { return h.WriteData(1, false, nil) },
		"PRIORITY":    func(h *rawH2) error { return h.WritePriority(3, http2.PriorityParam{StreamDep: 1}) },
		"an unknown":  func(h *rawH2) error { return h.WriteRawFrame(0xf0, 0, 1, []byte("x")) },
		"empty heads": func(h *rawH2) error { _, err := h.tryOpen("", ""); return err },
	} {
		t.Run(name, func(t *testing.T) {
			o, h := originFor(t, t), p.dialH2(t, nil)
			if name != "empty heads" {
				h.connect(o.addr)
			}
			flood(t, h, 10_000, func() error { return send(h) })
			alive(t)
		})
	}
}

// tryOpen begins a stream on a connection that may have ended.
func (h *rawH2) tryOpen(method, authority string) (id uint32, err error) {
	h.block.Reset()
	fields := []string{":method", method, ":authority", authority, ":scheme", "http", ":path", "/"}
	if method == "CONNECT" {
		fields = fields[:4]
	}
	for i := 0; i < len(fields) && method != ""; i += 2 {
		h.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	id = h.nextID
	h.nextID += 2
	return id, h.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: h.block.Bytes(), EndStream: method != "CONNECT", EndHeaders: true})
}

// answerAll is an origin that answers each request at once.
func answerAll(c net.Conn) {
	defer c.Close()
	c.SetDeadline(time.Now().Add(2 * patience))
	for br := bufio.NewReader(c); ; {
		if _, err := http.ReadRequest(br); err != nil {
			return
		}
		io.WriteString(c, plainAnswer)
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// HTTP/2: the drain

// A drain sends GOAWAY; what is under way ends well, tunnels live until DRAIN_TIMEOUT, and all that is told of in the end.
func TestHTTP2Drain(t *testing.T) {
	if !apart(t) {
		return
	}
	a := newAuthority(t)
	for name, conf := range map[string]*tls.Config{"h2c": nil, "TLS": a.trusting("h2")} {
		t.Run(name, func(t *testing.T) {
			p := startProxy(t, a.vars("DRAIN_TIMEOUT=800ms")...)
			slow, far, next := originFor(t, t), originFor(t, t), originFor(t, t)
			h := p.dialH2(t, conf)
			get := h.request("GET", slow.addr, "/", true)
			up := slow.accept()
			up.head()
			tunnel := h.connect(far.addr)
			end := far.accept()
			h.wantsTunnel(tunnel)
			begun, stopped := time.Now(), make(chan struct{})
			go func() { p.stop(); close(stopped) }()
			h.until("GOAWAY", func() bool { return h.away != nil })
			if h.away.ErrCode != http2.ErrCodeNo {
				t.Errorf("GOAWAY with %v", h.away.ErrCode)
			}
			up.send(plainAnswer)
			h.wants(get, 200, "hi")
			end.send("still here")
			h.wantsBody(tunnel, "still here")
			h.data(tunnel, false, "so am I")
			end.wants("so am I")
			if end.wantsEnd(); time.Since(begun) < 700*time.Millisecond {
				t.Errorf("the tunnel ended after %v", time.Since(begun))
			}
			<-stopped
			if took := time.Since(begun); took > 2*time.Second {
				t.Errorf("stopped after %v", took)
			}
			text := p.log.all() // nothing comes later
			if !strings.Contains(text, `"close_reason":"drain"`) {
				t.Errorf("the tunnel that was cut is not told of: %s", text)
			}
			if at := strings.Index(text, `"msg":"stopped"`); strings.Contains(text[at:], `"msg":"tunnel"`) {
				t.Error("the tunnel is told of after the end")
			}
			next.wantsNone()
		})
	}
	t.Run("idle connections", func(t *testing.T) {
		p := startProxy(t, a.vars("DRAIN_TIMEOUT=8s")...)
		h, c := p.dialH2(t, nil), p.dialTLS(t, a.trusting12())
		h.wantsAlive()
		c.send("%s", request("GET", "http://10.0.0.1/"))
		c.response("GET")
		begun := time.Now()
		p.stop()
		h.until("GOAWAY", func() bool { return h.away != nil })
		c.wantsEnd(true)
		if took := time.Since(begun); took > 3*time.Second {
			t.Errorf("stopped after %v", took)
		}
	})
}

// Connections of HTTP/2 count as what they are: one, whatever number of streams they carry.
func TestHTTP2ConnectionsAreCounted(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startProxy(t, "MAX_CONNS=1")
	h := p.dialH2(t, nil)
	for range 3 {
		h.wantsRefusal(h.request("GET", "10.0.0.1", "/", true), 403, tokenProhibited)
	}
	p.dial(t).wantsRefusal("GET", 503, tokenLimit)
	h.conn.Close()
	eventually(t, "the place to be free", func() bool {
		return p.metric(t, "sluice_client_connections") <= 1 && strings.Contains(p.log.all(), `"client closed"`)
	})
	again := p.dialH2(t, nil)
	again.wantsAlive()
}

// enterH2 connects a client of HTTP/2 to a server that a test has changed.
func enterH2(t *testing.T, s *server) *rawH2 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p := &testProxy{addr: l.Addr().String()}
	h := p.dialH2(t, nil)
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	c, f := s.newClient(far.(*net.TCPConn), netip.MustParseAddr("127.0.0.1"))
	if f != nil {
		t.Fatal(f)
	}
	go c.serve()
	return h
}

// A panic ends the stream that it came on, and nothing else.
func TestHTTP2Panic(t *testing.T) {
	s := testServer(t, "ALLOW_CIDRS=127.0.0.1", "ALLOW_PORTS=*", "NAME=sluice-test", "MAX_TUNNELS=5")
	s.openListeners(context.Background(), "127.0.0.1:0") // shares descriptors out
	if err := s.openFront(context.Background()); err != nil {
		t.Fatal(err)
	}
	names := s.names
	s.names = nil
	h := enterH2(t, s)
	for _, id := range []uint32{h.request("GET", "name.test", "/", true), h.connect("name.test:443"), h.request("POST", "name.test", "/", false)} {
		stream := h.stream(id)
		h.until("the end of the stream", func() bool { return stream.ended || stream.reset })
		if !stream.reset && stream.statuses[0] != "500" {
			t.Errorf("got %+v", *stream)
		}
	}
	h.wantsAlive()
	s.names = names
	h.conn.Close()
	s.serving.Wait()
	eventually(t, "the end of every stream, of which net/http's connection does not wait for the last", func() bool { return s.limits.streams.Load() == 0 })
	if n := s.panics.Load(); n != 3 || s.limits.tunnels.used[struct{}{}] != 0 {
		t.Errorf("%d panics, %d tunnels are counted", n, s.limits.tunnels.used[struct{}{}])
	}
}

// What a head may hold is what HTTP/1.1's may; one that is a little larger is told so, one that is much larger as well.
func TestHTTP2LargeHeads(t *testing.T) {
	if !apart(t) {
		return
	}
	bothH2(t, func(t *testing.T, p *testProxy, dial func(*testing.T, ...http2.Setting) *rawH2) {
		o, h := startOrigin(t), dial(t)
		large := func(size int) (id uint32) { // in a HEADERS frame and as many CONTINUATIONs as it takes
			h.block.Reset()
			for _, f := range [][2]string{{":method", "GET"}, {":scheme", "http"}, {":authority", o.addr}, {":path", "/"}, {"x-large", strings.Repeat("v", size)}} {
				h.enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]})
			}
			id = h.nextID
			h.nextID += 2
			b := h.block.Bytes()
			h.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: b[:10], EndStream: true})
			for b = b[10:]; len(b) > 0; b = b[min(len(b), 16<<10):] {
				h.WriteContinuation(id, len(b) <= 16<<10, b[:min(len(b), 16<<10)])
			}
			return id
		}
		id := large(60_000)
		up := o.accept()
		req, err := http.ReadRequest(up.br)
		if err != nil || len(req.Header.Get("X-Large")) != 60_000 {
			t.Fatalf("got %v, %v", req, err)
		}
		up.send(plainAnswer)
		h.wants(id, 200, "hi")
		h.wantsRefusal(large(70_000), 431, tokenRequest)
		s := h.stream(large(200_000))
		for h.read() && !s.ended && !s.reset && h.away == nil {
		}
		if s.ended && s.statuses[0] != "431" {
			t.Errorf("got %+v", *s)
		}
	})
}

// What a client expects is answered when its body is wanted, and not where it is refused.
func TestHTTP2Expect(t *testing.T) {
	p := startProxy(t, "DENY_HOSTS=denied.test")
	o, h := startOrigin(t), p.dialH2(t, nil)
	if s := h.wantsRefusal(h.request("POST", "denied.test", "/", false, "expect", "100-continue"), 403, tokenDenied); len(s.statuses) != 1 {
		t.Errorf("got %v", s.statuses)
	}
	id := h.request("POST", o.addr, "/", false, "expect", "100-continue", "content-length", "2")
	s := h.stream(id)
	up := o.accept()
	h.until("100", func() bool { return len(s.statuses) > 0 || s.reset })
	if s.statuses[0] != "100" {
		t.Fatalf("got %+v", *s)
	}
	h.data(id, true, "hi")
	up.head()
	up.wants("hi")
	up.send(plainAnswer)
	h.wants(id, 200, "hi")
}

// A client's half of a stream that stays open after the answer costs nothing: the connection goes on.
func TestHTTP2UploadsThatNobodyReads(t *testing.T) {
	p := startProxy(t)
	h := p.dialH2(t, nil)
	for range 300 { // more than streams may be open, and more bytes than the connection's window
		id := h.request("POST", "10.0.0.1", "/", false)
		h.data(id, false, strings.Repeat("x", 8<<10))
		h.wantsRefusal(id, 403, tokenProhibited)
	}
	h.wantsAlive()
}

// A stream that is read as an HTTP/1.1 message is read as what it said: its method, its host, its path, its field and no other.
func FuzzStream(f *testing.F) {
	f.Add("GET", "a.example", "/b?c", "Accept", "*/*")
	f.Add("OPTIONS", "a.example:80", "*", "X-A", "a, b")
	f.Add("CONNECT", "[::1]:443", "[::1]:443", "Cookie", "a=b; c=d")
	f.Add("GET", "a.example", "/ HTTP/1.1\r\nHost: b.example", "X", "y\r\nZ: z")
	f.Add("GET", "a.example", "@b.example/", "X: y\r\nZ", "z")
	cfg, _, err := loadConfig(nil)
	if err != nil {
		f.Fatal(err)
	}
	s := &server{hop: []byte("fuzz\r\n"), cfg: cfg, limits: limits{mostLarge: 1}}
	f.Fuzz(func(t *testing.T, method, host, path, name, value string) {
		m := &muxed{r: &http.Request{Method: method, Host: host, RequestURI: path, Header: http.Header{name: {value}}, Body: http.NoBody}, version: "2"}
		head, refused := m.head(s)
		if refused != nil {
			return
		}
		c := &client{}
		c.srv = s
		x := &exchange{summary: summary{srv: s}}
		x.begin(c)
		if x.parse(head) != nil {
			return
		}
		target := path
		if method == "CONNECT" || path == "*" {
			target = ""
		}
		fields := 2
		if name == "Host" || name == ":protocol" {
			fields = 1
		}
		if string(x.method) != method || string(x.auth) != host || string(x.target) != target || len(x.req.fields) != fields {
			t.Fatalf("%q was read as %q %q %q with %d fields", head, x.method, x.auth, x.target, len(x.req.fields))
		}
	})
}

// frames is what a client of HTTP/2 sends that opens streams with the same fields, and frames of 16 kB on each, without a look at answers.
func frames(streams, data int, fields ...string) string {
	var out, block bytes.Buffer
	out.WriteString(preface)
	framer, encoder := http2.NewFramer(&out, nil), hpack.NewEncoder(&block)
	framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
	for i := range streams {
		block.Reset()
		for j := 0; j < len(fields); j += 2 {
			encoder.WriteField(hpack.HeaderField{Name: fields[j], Value: fields[j+1], Sensitive: true})
		}
		id, rest := uint32(2*i+1), block.Bytes()
		first := rest[:min(len(rest), 16<<10)]
		rest = rest[len(first):]
		framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: first, EndStream: data == 0, EndHeaders: len(rest) == 0})
		for len(rest) > 0 {
			piece := rest[:min(len(rest), 16<<10)]
			rest = rest[len(piece):]
			framer.WriteContinuation(id, len(rest) == 0, piece)
		}
		for range data {
			framer.WriteData(id, false, make([]byte, 16<<10))
		}
	}
	return out.String()
}

// HTTP/3 and UDP tunnels: quic-go's client on one side, raw bytes of HTTP/1.1 or datagrams on the other. What its client would not send
// is written to QUIC streams by hand.

// ---------------------------------------------------------------------------------------------------------------------
// Helpers for HTTP/3

// h3Authority signs the certificates of a test.
type h3Authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newH3Authority(t testing.TB) *h3Authority {
	a := &h3Authority{}
	a.key, _ = ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	a.cert = a.sign(t, &x509.Certificate{Subject: pkix.Name{CommonName: "test authority"}, IsCA: true, BasicConstraintsValid: true}, a.key)
	return a
}

func (a *h3Authority) sign(t testing.TB, c *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	c.SerialNumber, c.NotBefore, c.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent := a.cert
	if parent == nil {
		parent = c
	}
	der, err := x509.CreateCertificate(crand.Reader, c, parent, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	signed, _ := x509.ParseCertificate(der)
	return signed
}

func (a *h3Authority) pem() string {
	return string(pemfile.EncodeToMemory(&pemfile.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}))
}

// issue makes a certificate for 127.0.0.1, or of a client of that name.
func (a *h3Authority) issue(t testing.TB, name string) (pair tls.Certificate, cert, key string) {
	k, _ := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	c := a.sign(t, &x509.Certificate{Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{{127, 0, 0, 1}}}, k)
	der, _ := x509.MarshalECPrivateKey(k)
	cert = string(pemfile.EncodeToMemory(&pemfile.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	key = string(pemfile.EncodeToMemory(&pemfile.Block{Type: "EC PRIVATE KEY", Bytes: der}))
	pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
	if err != nil {
		t.Fatal(err)
	}
	return pair, cert, key
}

func (a *h3Authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

// h3Proxy is a proxy that serves HTTP/3, and what clients need to trust it.
type h3Proxy struct {
	*testProxy
	ca *h3Authority
}

func startH3Proxy(t testing.TB, vars ...string) *h3Proxy {
	t.Helper()
	ca := newH3Authority(t)
	_, cert, key := ca.issue(t, "proxy")
	return &h3Proxy{startProxy(t, append([]string{"HTTP3=true", "TLS_CERT=" + cert, "TLS_KEY=" + key}, vars...)...), ca}
}

// h3Client is a connection to the proxy.
type h3Client struct {
	*http3.ClientConn
	t    *testing.T
	conn *quic.Conn
}

// dialQUIC shakes hands with the proxy, on a connection that the test ends.
func (p *h3Proxy) dialQUIC(t *testing.T, certs ...tls.Certificate) (*quic.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := quic.DialAddr(ctx, p.addr, &tls.Config{RootCAs: p.ca.pool(), NextProtos: []string{"h3"}, Certificates: certs}, &quic.Config{EnableDatagrams: true})
	if err == nil {
		t.Cleanup(func() { conn.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeNoError), "") })
	}
	return conn, err
}

func (p *h3Proxy) dialH3(t *testing.T, certs ...tls.Certificate) *h3Client {
	t.Helper()
	conn, err := p.dialQUIC(t, certs...)
	if err != nil {
		t.Fatal(err)
	}
	return speakH3(t, conn)
}

func speakH3(t *testing.T, conn *quic.Conn) *h3Client {
	c := (&http3.Transport{EnableDatagrams: true, DisableCompression: true}).NewClientConn(conn)
	select {
	case <-c.ReceivedSettings(): // extended CONNECT waits for them
	case <-time.After(patience):
		t.Fatal("no SETTINGS came")
	}
	return &h3Client{c, t, conn}
}

// h3Request is a request with fields "name: value". protocol is that of extended CONNECT.
func h3Request(method, authority, path, protocol string, fields ...string) *http.Request {
	path, query, _ := strings.Cut(path, "?")
	plain, _ := url.PathUnescape(path)
	r := &http.Request{Method: method, Host: authority, Proto: protocol, Header: http.Header{"User-Agent": {""}},
		URL: &url.URL{Scheme: "https", Host: authority, Path: plain, RawPath: path, RawQuery: query}}
	if method != "CONNECT" {
		r.URL.Scheme = "http"
	}
	for _, f := range fields {
		name, value, _ := strings.Cut(f, ": ")
		r.Header[textproto.CanonicalMIMEHeaderKey(name)] = append(r.Header[textproto.CanonicalMIMEHeaderKey(name)], value)
	}
	return r
}

// h3Stream is a request whose stream is still open for sending.
type h3Stream struct {
	*http3.RequestStream
	t *testing.T
}

func (c *h3Client) open(r *http.Request) *h3Stream {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := c.OpenRequestStream(ctx)
	if err != nil {
		c.t.Fatal(err)
	}
	s.SetDeadline(time.Now().Add(2 * patience))
	if err := s.SendRequestHeader(r); err != nil {
		c.t.Fatal(err)
	}
	return &h3Stream{s, c.t}
}

// connect opens a tunnel.
func (c *h3Client) connect(authority string) *h3Stream {
	c.t.Helper()
	s := c.open(h3Request("CONNECT", authority, "", ""))
	s.wantsStatus(200)
	return s
}

// wantsStatus reads the head of the answer.
func (s *h3Stream) wantsStatus(status int) *http.Response {
	s.t.Helper()
	resp, err := s.ReadResponse()
	if err != nil {
		s.t.Fatalf("no answer: %v", err)
	} else if resp.StatusCode != status {
		body, _ := io.ReadAll(s)
		s.t.Fatalf("status %d, want %d: %q %v", resp.StatusCode, status, body, resp.Header)
	}
	return resp
}

// wantsRefusal reads an answer of the proxy's own.
func (s *h3Stream) wantsRefusal(status int, token string) *http.Response {
	s.t.Helper()
	resp := s.wantsStatus(status)
	body, err := io.ReadAll(s)
	if err != nil {
		s.t.Errorf("the answer is not whole: %v", err)
	}
	wantsRefusal(s.t, resp, string(body), status, token)
	return resp
}

func (s *h3Stream) send(text string) {
	s.t.Helper()
	if _, err := io.WriteString(s, text); err != nil {
		s.t.Fatalf("send: %v", err)
	}
}

func (s *h3Stream) wants(want string) {
	s.t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(s, got); string(got) != want {
		s.t.Fatalf("got %q (%v), want %q", got[:n], err, want)
	}
}

// wantsEnd expects FIN.
func (s *h3Stream) wantsEnd() {
	s.t.Helper()
	if b, err := io.ReadAll(s); err != nil || len(b) > 0 {
		s.t.Fatalf("got %q (%v), want the stream's end", b, err)
	}
}

// wantsReset expects RESET_STREAM with a code, whatever came before it.
func (s *h3Stream) wantsReset(code http3.ErrCode) {
	s.t.Helper()
	_, err := io.ReadAll(s)
	wantsH3Error(s.t, err, code)
}

func wantsH3Error(t *testing.T, err error, code http3.ErrCode) {
	t.Helper()
	if e := (*http3.Error)(nil); !errors.As(err, &e) || e.ErrorCode != code || !e.Remote {
		t.Fatalf("got %v, want the reset %v", err, code)
	}
}

// cancel gives a stream up as browsers do: RESET_STREAM and STOP_SENDING.
func (s *h3Stream) cancel() {
	s.CancelWrite(quic.StreamErrorCode(http3.ErrCodeRequestCanceled))
	s.CancelRead(quic.StreamErrorCode(http3.ErrCodeRequestCanceled))
}

// roundTrip sends a whole request and reads the whole answer.
func (c *h3Client) roundTrip(r *http.Request) (*http.Response, string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(r.Context(), 2*patience)
	defer cancel()
	resp, err := c.RoundTrip(r.WithContext(ctx))
	if err != nil {
		c.t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return resp, string(body)
}

// h3Fields is a HEADERS frame of field lines "name: value", none of which QPACK compresses (RFC 9204, 4.5.6).
func h3Fields(lines ...string) []byte {
	block := []byte{0, 0}
	number := func(first, bits byte, n int) {
		if most := 1<<bits - 1; n < most {
			block = append(block, first|byte(n))
		} else {
			block = append(block, first|byte(most))
			for n -= most; n >= 128; n >>= 7 {
				block = append(block, byte(n)|128)
			}
			block = append(block, byte(n))
		}
	}
	for _, line := range lines {
		i := strings.Index(line[1:], ": ") + 1
		number(0x20, 3, i)
		block = append(block, line[:i]...)
		number(0, 7, len(line)-i-2)
		block = append(block, line[i+2:]...)
	}
	return h3Frame(1, block)
}

func h3Frame(kind uint64, payload []byte) []byte {
	return append(quicvarint.Append(quicvarint.Append(nil, kind), uint64(len(payload))), payload...)
}

// raw opens a stream and writes to it.
func (c *h3Client) raw(b ...[]byte) *quic.Stream {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := c.conn.OpenStreamSync(ctx)
	if err != nil {
		c.t.Fatal(err)
	}
	s.SetDeadline(time.Now().Add(2 * patience))
	if _, err := s.Write(slices.Concat(b...)); err != nil {
		c.t.Fatal(err)
	}
	return s
}

// ---------------------------------------------------------------------------------------------------------------------
// Requests

func TestH3Exchanges(t *testing.T) {
	p := startH3Proxy(t)
	client := p.dialH3(t)
	for name, e := range map[string]struct {
		method, path string
		fields       []string
		body         string // "-" = none; of a length that is told
		unsized      bool   // its length is not told
		trailer      string
		wants        string // at the origin, behind the request line and Host
		answer       string
		status       int
		gets         []string // "name: value" of the answer, "name:" = is not there
		getsBody     string
		getsTrailer  string
	}{
		"plain": {method: "GET", path: "/a?b=c", body: "-", wants: "Via: 3 sluice-test\r\n\r\n", answer: plainAnswer,
			status: 200, gets: []string{"Via: 1.1 sluice-test", "Content-Length: 2", "Connection:", "Content-Type:"}, getsBody: "hi"},
		"crumbs of a cookie": {method: "GET", path: "/", body: "-", fields: []string{"Cookie: a=1", "Cookie: b=2"},
			wants: "Cookie: a=1; b=2\r\nVia: 3 sluice-test\r\n\r\n", answer: plainAnswer, status: 200, getsBody: "hi"},
		"credentials stay here": {method: "GET", path: "/", body: "-", fields: []string{"Proxy-Authorization: Basic eDp5"},
			wants: "Via: 3 sluice-test\r\n\r\n", answer: plainAnswer, status: 200, getsBody: "hi"},
		"no length known to HEAD": {method: "HEAD", path: "/", body: "-", wants: "Via: 3 sluice-test\r\n\r\n",
			answer: "HTTP/1.1 200 OK\r\n" + date + "Transfer-Encoding: chunked\r\n\r\n", status: 200, gets: []string{"Content-Length:", "Transfer-Encoding:"}},
		"a length told to HEAD": {method: "HEAD", path: "/", body: "-", wants: "Via: 3 sluice-test\r\n\r\n",
			answer: "HTTP/1.1 200 OK\r\n" + date + "Content-Length: 7777\r\n\r\n", status: 200, gets: []string{"Content-Length: 7777"}},
		"sized": {method: "POST", path: "/", body: "hello", wants: "Via: 3 sluice-test\r\nContent-Length: 5\r\n\r\nhello",
			answer: "HTTP/1.1 204 No Content\r\n" + date + "\r\n", status: 204, gets: []string{"Content-Length:"}},
		"empty": {method: "POST", path: "/", body: "-", wants: "Via: 3 sluice-test\r\nContent-Length: 0\r\n\r\n",
			answer: "HTTP/1.1 304 Not Modified\r\n" + date + "\r\n", status: 304, gets: []string{"Content-Length:"}},
		"unsized": {method: "POST", path: "/", body: "hello", unsized: true, wants: "Via: 3 sluice-test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
			answer: "HTTP/1.1 200 OK\r\n" + date + "Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", status: 200, gets: []string{"Transfer-Encoding:"}, getsBody: "hi"},
		"trailers": {method: "PUT", path: "/", body: "hello", unsized: true, trailer: "X-Sum: 1", fields: []string{"Te: trailers"},
			wants:  "Via: 3 sluice-test\r\nTransfer-Encoding: chunked\r\nTE: trailers\r\nConnection: TE\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n",
			answer: "HTTP/1.1 200 OK\r\n" + date + "Trailer: X-Also\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nx-also: 2\r\n\r\n", status: 200, getsBody: "hi", getsTrailer: "X-Also: 2"},
		"until the end": {method: "GET", path: "/", body: "-", wants: "Via: 3 sluice-test\r\n\r\n",
			answer: "HTTP/1.0 200 OK\r\n" + date + "\r\nhi", status: 200, gets: []string{"Via: 1.0 sluice-test"}, getsBody: "hi"},
	} {
		t.Run(name, func(t *testing.T) {
			o := originFor(t, t)
			req := h3Request(e.method, o.addr, e.path, "", e.fields...)
			if e.body != "-" {
				req.Body, req.ContentLength = io.NopCloser(strings.NewReader(e.body)), int64(len(e.body))
			}
			if e.unsized {
				req.ContentLength = -1
			}
			if name, value, ok := strings.Cut(e.trailer, ": "); ok {
				req.Trailer = http.Header{name: {value}}
			}
			origin := make(chan bool)
			go func() {
				defer close(origin)
				c := o.accept()
				c.wants(e.method + " " + e.path + " HTTP/1.1\r\nHost: " + o.addr + "\r\n" + e.wants)
				c.send("%s", e.answer)
				c.CloseWrite()
			}()
			resp, body := (&h3Client{client.ClientConn, t, client.conn}).roundTrip(req)
			<-origin
			if resp.StatusCode != e.status || body != e.getsBody {
				t.Errorf("got %d %q, want %d %q", resp.StatusCode, body, e.status, e.getsBody)
			}
			for _, want := range e.gets {
				name, value, _ := strings.Cut(want, ":")
				if got := strings.Join(resp.Header[name], ", "); got != strings.TrimSpace(value) {
					t.Errorf("%s: %q, want %q", name, got, value)
				}
			}
			if name, value, ok := strings.Cut(e.getsTrailer, ": "); ok && resp.Trailer.Get(name) != value {
				t.Errorf("trailers: %v, want %s", resp.Trailer, e.getsTrailer)
			}
			wantsFields(t, p.recordFor(t, "request", o.addr), map[string]any{"network.protocol.version": "3", "http.response.status_code": float64(e.status),
				"http.request.method": e.method, "client.address": "127.0.0.1", "http.response.body.size": float64(len(e.getsBody)),
				"http.request.body.size": float64(max(0, len(strings.Trim(e.body, "-"))))})
		})
	}
}

// The end of a GET may come in a packet of its own: what it is must not be guessed before.
func TestH3LateEnd(t *testing.T) {
	p, o := startH3Proxy(t), startOrigin(t)
	s := p.dialH3(t).open(h3Request("GET", o.addr, "/", ""))
	o.wantsNone()
	s.Close()
	origin := o.accept()
	origin.wants(o.fill("GET / HTTP/1.1\r\nHost: {o}\r\nVia: 3 sluice-test\r\n\r\n"))
	origin.send(plainAnswer)
	s.wantsStatus(200)
	s.wants("hi")
	s.wantsEnd()

	// With a byte of a body it is one that has a body.
	s = p.dialH3(t).open(h3Request("GET", o.addr, "/", ""))
	s.send("body")
	origin.wants(o.fill("GET / HTTP/1.1\r\nHost: {o}\r\nVia: 3 sluice-test\r\nTransfer-Encoding: chunked\r\n\r\n"))
	s.Close()
	if got, err := io.ReadAll(httputilChunks(origin)); err != nil || string(got) != "body" {
		t.Errorf("got %q %v", got, err)
	}
	origin.send(plainAnswer)
	s.wantsStatus(200)

	// One that is given up before is not begun: nothing was asked.
	s = p.dialH3(t).open(h3Request("GET", o.addr, "/", ""))
	o.wantsNone() // and the head is there
	s.CancelWrite(quic.StreamErrorCode(http3.ErrCodeRequestCanceled))
	wantsLogged(t, p.awaitServed(t, 2), 0, "client_disconnected")
	if n := p.metric(t, "sluice_pool_requests_total{result=\"dialled\"}") + p.metric(t, "sluice_pool_requests_total{result=\"reused\"}"); n != 2 {
		t.Errorf("%v requests were sent on, want 2", n)
	}
}

// One that never ends is told so when HEADER_TIMEOUT is over, and not sent on as something that it is not.
func TestH3NoEnd(t *testing.T) {
	p, o := startH3Proxy(t, "HEADER_TIMEOUT=50ms"), startOrigin(t)
	p.dialH3(t).open(h3Request("GET", o.addr, "/", "")).wantsRefusal(408, "http_request_error")
	o.wantsNone()
}

func TestH3Interim(t *testing.T) {
	p, o := startH3Proxy(t), startOrigin(t)
	client := p.dialH3(t)
	go func() {
		c := o.accept()
		c.head()
		c.send("HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n%s", plainAnswer)
	}()
	var interim []string
	trace := &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
		interim = append(interim, fmt.Sprintf("%d %s %s", code, h["Link"], h["Via"]))
		return nil
	}}
	resp, body := client.roundTrip(h3Request("GET", o.addr, "/", "").WithContext(httptrace.WithClientTrace(context.Background(), trace)))
	want := []string{"103 [</a>; rel=preload] [1.1 sluice-test]", "100 [] [1.1 sluice-test]"}
	if resp.StatusCode != 200 || body != "hi" || !slices.Equal(interim, want) || resp.Header["Link"] != nil {
		t.Errorf("got %d %q %v after %q, want %q", resp.StatusCode, body, resp.Header, interim, want)
	}
}

// httputilChunks reads a chunked body, as an origin does.
func httputilChunks(p *peer) io.Reader { return httputil.NewChunkedReader(p.br) }

var _ = []any{bytes.Equal, sha1.Sum, base64.StdEncoding, netip.AddrPort{}, os.Args, runtime.GC, sync.Mutex{}, atomic.Bool{}}

// ---------------------------------------------------------------------------------------------------------------------
// Bodies

// What one side does not take is not held for it; when it does, everything is there.
func TestH3BackPressure(t *testing.T) {
	if !apart(t) {
		return
	}
	p, o := startH3Proxy(t), startOrigin(t)
	client := p.dialH3(t)
	data := noise(8<<20, 1)
	slow := func(what string, write func([]byte) (int, error)) (n int) {
		n, err := write(data)
		if !errors.Is(err, os.ErrDeadlineExceeded) || n > 7<<20 { // sockets hold some
			t.Fatalf("%s: %d bytes were taken, %v", what, n, err)
		}
		return n
	}

	up := client.open(h3Request("GET", o.addr, "/", ""))
	up.send("-")
	origin := o.accept()
	origin.SetReadBuffer(64 << 10)
	origin.SetWriteBuffer(64 << 10)
	origin.head()
	up.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	n := slow("up", up.Write)
	up.SetWriteDeadline(time.Now().Add(2 * patience))
	rest := data[n:]
	go func() {
		up.Write(rest)
		up.Close()
	}()
	got, err := io.ReadAll(httputilChunks(origin))
	if err != nil {
		t.Fatal(err)
	}
	sameBytes(t, "the upload", got[1:], data)

	origin.send("HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n", date, len(data))
	origin.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	n = slow("down", origin.Write)
	origin.SetWriteDeadline(time.Now().Add(2 * patience))
	done := origin.sending(data[n:], false)
	up.wantsStatus(200)
	got, err = io.ReadAll(up)
	if err != nil || <-done != nil {
		t.Fatal(err)
	}
	sameBytes(t, "the download", got, data)
	if up, down := p.metric(t, `sluice_bytes_total{direction="up"}`), p.metric(t, `sluice_bytes_total{direction="down"}`); up != 8<<20+1 || down != 8<<20 {
		t.Errorf("metrics: %v bytes up, %v down", up, down)
	}
}

// A body that is cut off must not look whole: the stream is reset.
func TestH3Truncated(t *testing.T) {
	p := startH3Proxy(t)
	client := p.dialH3(t)
	for name, head := range map[string]string{
		"length":  "Content-Length: 10\r\n\r\n",
		"chunked": "Transfer-Encoding: chunked\r\n\r\n10\r\n",
		"large":   "Content-Length: 100000\r\n\r\n" + strings.Repeat("x", 50_000),
		"bad":     "Transfer-Encoding: chunked\r\n\r\n8000\r\n" + strings.Repeat("x", 0x8000) + "xx",
	} {
		t.Run(name, func(t *testing.T) {
			o := originFor(t, t)
			s := (&h3Client{client.ClientConn, t, client.conn}).open(h3Request("GET", o.addr, "/", ""))
			s.Close()
			origin := o.accept()
			origin.head()
			origin.send("HTTP/1.1 200 OK\r\n%s%shello", date, head)
			origin.Close()
			if _, err := s.ReadResponse(); err == nil {
				_, err = io.ReadAll(s)
				wantsH3Error(t, err, http3.ErrCodeInternalError)
			}
			r := p.recordFor(t, "request", o.addr)
			if r["error.type"] != "connection_terminated" && r["error.type"] != "http_protocol_error" {
				t.Errorf("record: %v", r)
			}
		})
	}
}

// A body that is longer or shorter than its length, or is given up, is not whole at the origin.
func TestH3BadBodies(t *testing.T) {
	p, o := startH3Proxy(t), startOrigin(t)
	client := p.dialH3(t)
	head := h3Fields(":method: POST", ":scheme: http", ":authority: "+o.addr, ":path: /", "content-length: 5")
	for name, rest := range map[string]func(*quic.Stream){
		"short":  func(s *quic.Stream) { s.Write(h3Frame(0, []byte("hi"))); s.Close() },
		"reset":  func(s *quic.Stream) { s.Write(h3Frame(0, []byte("hi"))); s.CancelWrite(0x10c) },
		"long":   func(s *quic.Stream) { s.Write(h3Frame(0, []byte("hello world"))); s.Close() },
		"frames": func(s *quic.Stream) { s.Write(h3Frame(0, []byte("hi"))); s.Write(h3Frame(0, nil)); s.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			o.t = t
			s := client.raw(head)
			origin := o.accept()
			rest(s)
			got := origin.all()
			if isMessage(got) {
				t.Errorf("the origin got a whole message: %q", got)
			}
		})
	}
}

// A client that gives its request up ends it at the origin, however it says so.
func TestH3ClientLeaves(t *testing.T) {
	p := startH3Proxy(t)
	for name, leave := range map[string]func(*h3Client, *h3Stream){
		"stop":       func(_ *h3Client, s *h3Stream) { s.CancelRead(quic.StreamErrorCode(http3.ErrCodeRequestCanceled)) },
		"cancel":     func(_ *h3Client, s *h3Stream) { s.cancel() },
		"connection": func(c *h3Client, _ *h3Stream) { c.conn.CloseWithError(0x100, "") },
	} {
		for _, when := range []string{"before the answer", "in its body"} {
			t.Run(name+" "+when, func(t *testing.T) {
				o := originFor(t, t)
				client := p.dialH3(t)
				s := client.open(h3Request("GET", o.addr, "/", ""))
				s.Close()
				origin := o.accept()
				origin.head()
				if when == "in its body" {
					origin.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
					s.wantsStatus(200)
					s.wants("hello")
				}
				leave(client, s)
				origin.wantsEnd()
				wantsLogged(t, p.recordFor(t, "request", o.addr), 0, "client_disconnected")
			})
		}
	}
	eventually(t, "the connections to be gone", func() bool { return p.metric(t, "sluice_client_connections") <= 2*2 })
}

// An origin may answer before it has the body, and not want the rest of it.
func TestH3EarlyAnswer(t *testing.T) {
	p, o := startH3Proxy(t), startOrigin(t)
	s := p.dialH3(t).open(h3Request("GET", o.addr, "/", ""))
	s.send("some")
	origin := o.accept()
	origin.head()
	origin.send("HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\nno")
	s.wantsStatus(413)
	s.wants("no")
	s.wantsEnd()
	origin.all() // it is ended, since the body is not
	wantsFields(t, p.recordFor(t, "request", o.addr), map[string]any{"http.response.status_code": 413.0})
	eventually(t, "STOP_SENDING", func() bool { _, err := s.Write([]byte("more")); return err != nil })
}

// Limits of bodies are those of HTTP/1.
func TestH3BodyLimits(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startH3Proxy(t, "MAX_REQUEST_BODY=1000", "MAX_RESPONSE_BODY=50000", "BODY_TIMEOUT=150ms")
	client := p.dialH3(t)
	open := func(t *testing.T, path string, body string) (*h3Stream, *peer) {
		o := originFor(t, t)
		s := (&h3Client{client.ClientConn, t, client.conn}).open(h3Request("GET", o.addr, path, ""))
		if body == "" {
			s.Close()
		} else {
			s.send(body)
		}
		origin := o.accept()
		origin.head()
		return s, origin
	}
	t.Run("request", func(t *testing.T) {
		o := originFor(t, t)
		req := h3Request("PUT", o.addr, "/", "")
		req.Body, req.ContentLength = io.NopCloser(strings.NewReader(strings.Repeat("x", 2000))), 2000
		if resp, _ := client.roundTrip(req); resp.StatusCode != 413 {
			t.Errorf("status %d", resp.StatusCode)
		}
		o.wantsNone()
		s, origin := open(t, "/", strings.Repeat("x", 2000))
		if isMessage(origin.all()) {
			t.Error("the origin got a whole message")
		}
		s.wantsRefusal(413, "http_request_error")
	})
	t.Run("response", func(t *testing.T) {
		s, origin := open(t, "/", "")
		origin.send("HTTP/1.1 200 OK\r\n\r\n")
		s.wantsStatus(200) // later a reset may overtake it
		go origin.Write(noise(100_000, 1))
		s.wantsReset(http3.ErrCodeInternalError)
	})
	t.Run("slow upload", func(t *testing.T) {
		s, origin := open(t, "/", "x")
		s.wantsRefusal(408, "http_request_error")
		if isMessage(append([]byte("GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"), origin.all()...)) {
			t.Error("the origin got a whole message")
		}
	})
	t.Run("slow origin", func(t *testing.T) {
		s, origin := open(t, "/", "")
		origin.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
		s.wantsStatus(200)
		s.wants("hello")
		s.wantsReset(http3.ErrCodeInternalError)
	})
	t.Run("slow download", func(t *testing.T) {
		p := startH3Proxy(t, "BODY_TIMEOUT=150ms")
		o := originFor(t, t)
		s := p.dialH3(t).open(h3Request("GET", o.addr, "/", ""))
		s.Close()
		origin := o.accept()
		origin.head()
		origin.send("HTTP/1.1 200 OK\r\n\r\n")
		if err := <-origin.sending(noise(16<<20, 1), true); err == nil {
			t.Error("the origin could send it all")
		}
		if _, err := s.ReadResponse(); err == nil { // what is not read yet may be lost
			s.wantsReset(http3.ErrCodeInternalError)
		}
	})
}

// ---------------------------------------------------------------------------------------------------------------------
// Malformed requests

// Nothing that is malformed reaches an origin.
func TestH3Malformed(t *testing.T) {
	p, o := startH3Proxy(t), startOrigin(t)
	client := p.dialH3(t)
	full := func(lines ...string) []byte {
		return h3Fields(append([]string{":method: GET", ":scheme: http", ":authority: " + o.addr, ":path: /"}, lines...)...)
	}
	for name, b := range map[string][]byte{
		"upper case":       full("X-A: 1"),
		"connection":       full("connection: close"),
		"chunked":          full("transfer-encoding: chunked"),
		"upgrade":          full("upgrade: websocket"),
		"te":               full("te: gzip"),
		"line in a value":  full("x-a: 1\r\nx-b: 2"),
		"line in a name":   full("x\r\na: 1"),
		"NUL":              full("x-a: \x00"),
		"two lengths":      full("content-length: 1", "content-length: 2"),
		"signed length":    full("content-length: +1"),
		"two hosts":        full("host: " + o.addr + "1"),
		"repeated":         full(":path: /"),
		"late pseudo":      h3Fields(":method: GET", ":scheme: http", "x-a: 1", ":authority: "+o.addr, ":path: /"),
		"unknown pseudo":   full(":a: b"),
		"no path":          h3Fields(":method: GET", ":scheme: http", ":authority: "+o.addr),
		"no authority":     h3Fields(":method: GET", ":scheme: http", ":path: /"),
		"path with CRLF":   h3Fields(":method: GET", ":scheme: http", ":authority: "+o.addr, ":path: / HTTP/1.1\r\nX: y"),
		"path with blank":  h3Fields(":method: GET", ":scheme: http", ":authority: "+o.addr, ":path: / HTTP/1.0"),
		"method":           h3Fields(":method: G ET", ":scheme: http", ":authority: "+o.addr, ":path: /"),
		"user info":        h3Fields(":method: GET", ":scheme: x", ":authority: u@"+o.addr, ":path: /"),
		"authority's path": h3Fields(":method: GET", ":scheme: http", ":authority: "+o.addr+"/x", ":path: /"),
		"two authorities":  h3Fields(":method: GET", ":scheme: http", ":authority: "+o.addr+" a", ":path: /"),
		"CONNECT path":     h3Fields(":method: CONNECT", ":scheme: http", ":authority: "+o.addr, ":path: /"),
		"CONNECT no port":  h3Fields(":method: CONNECT", ":authority: 127.0.0.1"),
		"CONNECT twice":    h3Fields(":method: CONNECT", ":authority: "+o.addr+" HTTP/1.1\r\nHost: x\r\n\r\n"),
		"protocol of GET":  full(":protocol: websocket"),
		"absolute path":    h3Fields(":method: GET", ":scheme: http", ":authority: "+o.addr, ":path: http://"+o.addr+"/"),
		"QPACK reference":  h3Frame(1, []byte{0, 0, 0x80}),
		"QPACK table":      h3Frame(1, []byte{4, 0, 0xd1}),
		"QPACK cut":        h3Frame(1, []byte{0, 0, 0x27, 0xff, 0xff}),
	} {
		t.Run(name, func(t *testing.T) {
			s := (&h3Client{client.ClientConn, t, client.conn}).raw(b)
			s.Close()
			if got, err := io.ReadAll(s); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("neither a reset nor an answer: %q", got)
			}
		})
	}
	o.wantsNone()
	if resp, _ := client.roundTrip(h3Request("OPTIONS", "127.0.0.1:9", "/", "", "Max-Forwards: 0")); resp.StatusCode != 200 {
		t.Errorf("the connection is of no more use: %s", resp.Status)
	}
	if n := p.metric(t, "sluice_client_connections"); n != 1 {
		t.Errorf("%v connections", n)
	}
}

// What may come on a connection but not there ends the connection, and what is no connection is no burden.
func TestH3MalformedConnections(t *testing.T) {
	p := startH3Proxy(t)
	stream := func(b []byte) func(*quic.Conn) {
		return func(c *quic.Conn) {
			if s, err := c.OpenStream(); err == nil {
				s.Write(b)
			}
		}
	}
	uni := func(all ...[]byte) func(*quic.Conn) {
		return func(c *quic.Conn) {
			for _, b := range all {
				if s, err := c.OpenUniStream(); err == nil {
					s.Write(b)
				}
			}
		}
	}
	for name, speak := range map[string]func(*quic.Conn){
		"DATA first":       stream(h3Frame(0, []byte("x"))),
		"SETTINGS there":   stream(h3Frame(4, nil)),
		"HTTP/2 PING":      stream(h3Frame(6, make([]byte, 8))),
		"no SETTINGS":      uni(append([]byte{0}, h3Frame(7, []byte{0})...)),
		"two of control":   uni(append([]byte{0}, h3Frame(4, nil)...), append([]byte{0}, h3Frame(4, nil)...)),
		"push":             uni([]byte{1, 0}),
		"two SETTINGS":     uni(append([]byte{0}, append(h3Frame(4, nil), h3Frame(4, nil)...)...)),
		"endless SETTINGS": uni(append([]byte{0, 4, 0xbf, 0xff, 0xff, 0xff}, make([]byte, 1000)...)),
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := p.dialQUIC(t)
			if err != nil {
				t.Fatal(err)
			}
			speak(conn)
			select {
			case <-conn.Context().Done():
				if e := (*quic.ApplicationError)(nil); !errors.As(context.Cause(conn.Context()), &e) || !e.Remote {
					t.Errorf("ended by %v", context.Cause(conn.Context()))
				}
			case <-time.After(patience):
				t.Error("the connection goes on")
			}
		})
	}
	eventually(t, "the connections to be gone", func() bool { return p.metric(t, "sluice_client_connections") == 0 })
}

// ---------------------------------------------------------------------------------------------------------------------
// Tunnels

func TestH3Tunnel(t *testing.T) {
	p, o := startH3Proxy(t), startOrigin(t)
	s := p.dialH3(t).connect(o.addr)
	origin := o.accept()
	s.send("to the origin")
	origin.wants("to the origin")
	origin.send("to the client")
	s.wants("to the client")
	if n := p.metric(t, "sluice_tunnels"); n != 1 {
		t.Errorf("%v tunnels", n)
	}
	s.Close()
	origin.wantsEnd()
	origin.send("still there")
	origin.Close()
	s.wants("still there")
	s.wantsEnd()
	wantsFields(t, p.recordFor(t, "tunnel", o.addr), map[string]any{"http.request.method": "CONNECT", "http.response.status_code": 200.0, "network.protocol.version": "3",
		"http.request.body.size": 13.0, "http.response.body.size": 24.0, "close_reason": "client_closed", "network.peer.address": "127.0.0.1"})
	eventually(t, "the tunnel to be gone", func() bool { return p.metric(t, "sluice_tunnels") == 0 })
}

// What a client sends before it has the answer waits for the tunnel.
func TestH3TunnelEarly(t *testing.T) {
	p, o, u := startH3Proxy(t), startOrigin(t), startUDP(t)
	client := p.dialH3(t)
	s := client.open(h3Request("CONNECT", o.addr, "", ""))
	s.send("early")
	o.accept().wants("early")
	s.wantsStatus(200)
	s = client.open(h3Request("CONNECT", p.addr, udpPath(u.addr), "connect-udp"))
	s.send(capsule(0, "\x00early"))
	u.wants("early")
	s.wantsStatus(200)
}

// The origin may end its side first; the client's goes on.
func TestH3TunnelOriginFirst(t *testing.T) {
	p, o := startH3Proxy(t), startOrigin(t)
	s := p.dialH3(t).connect(o.addr)
	origin := o.accept()
	origin.CloseWrite()
	s.wantsEnd()
	data := noise(1<<20, 3)
	for i := 0; i < len(data); i += 1 << 18 {
		s.send(string(data[i : i+1<<18]))
		if got := make([]byte, 1<<18); true {
			io.ReadFull(origin.br, got)
			sameBytes(t, "what follows the origin's end", got, data[i:i+1<<18])
		}
	}
	s.Close()
	origin.wantsEnd()
	wantsFields(t, p.recordFor(t, "tunnel", o.addr), map[string]any{"http.request.body.size": float64(1 << 20), "close_reason": "upstream_closed"})
}

// isReset reports whether the connection ends by RST.
func (p *peer) isReset() bool {
	_, err := io.Copy(io.Discard, p.br)
	return errors.Is(err, syscall.ECONNRESET)
}

// A tunnel that breaks on one side breaks on the other: it does not look as if it came to its end.
func TestH3TunnelBreaks(t *testing.T) {
	p := startH3Proxy(t)
	for name, e := range map[string]struct {
		breaks func(*h3Client, *h3Stream, *peer)
		client bool // breaks it
	}{
		"origin resets":   {breaks: func(_ *h3Client, _ *h3Stream, o *peer) { o.SetLinger(0); o.Close() }},
		"client resets":   {func(_ *h3Client, s *h3Stream, _ *peer) { s.CancelWrite(0x10c) }, true},
		"client stops":    {func(_ *h3Client, s *h3Stream, _ *peer) { s.CancelRead(0x10c) }, true},
		"client gives up": {func(_ *h3Client, s *h3Stream, _ *peer) { s.cancel() }, true},
		"client leaves":   {func(c *h3Client, _ *h3Stream, _ *peer) { c.conn.CloseWithError(0x100, "") }, true},
		"client breaks a frame": {func(c *h3Client, s *h3Stream, _ *peer) {
			c.raw(h3Frame(0, nil)) // ends the connection: a request begins with HEADERS
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			o := originFor(t, t)
			client := p.dialH3(t)
			s := client.connect(o.addr)
			origin := o.accept()
			s.send("x")
			origin.wants("x")
			e.breaks(client, s, origin)
			if e.client && !origin.isReset() {
				t.Error("the origin was told a good end")
			} else if !e.client {
				s.wantsReset(http3.ErrCodeConnectError)
			}
			wantsFields(t, p.recordFor(t, "tunnel", o.addr), map[string]any{"close_reason": "connection_error"})
		})
	}
	eventually(t, "the tunnels to be gone", func() bool { return p.metric(t, "sluice_tunnels") == 0 })
}

type plainWriter struct{ io.Writer }

// echoTCP is an origin that sends back what it gets.
func echoTCP(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for c, err := l.Accept(); err == nil; c, err = l.Accept() {
			go func() { io.Copy(plainWriter{c}, plainReader{c}); c.Close() }() // no pipe, which would be counted
		}
	}()
	return l.Addr().String()
}

// A connection carries as many tunnels as the proxy lets it have at a time, and more one after the other.
func TestH3ManyTunnels(t *testing.T) {
	p, addr := startH3Proxy(t), echoTCP(t)
	client := p.dialH3(t)
	var wait sync.WaitGroup
	for i := range 200 {
		wait.Go(func() {
			s, err := client.OpenRequestStream(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			s.SetDeadline(time.Now().Add(2 * patience))
			if err := s.SendRequestHeader(h3Request("CONNECT", addr, "", "")); err != nil {
				t.Error(err)
				return
			}
			if resp, err := s.ReadResponse(); err != nil || resp.StatusCode != 200 {
				t.Error(resp, err)
				return
			}
			data := noise(5_000, byte(i))
			s.Write(data)
			s.Close()
			if got, err := io.ReadAll(s); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes came back of %d, %v", len(got), len(data), err)
			}
		})
	}
	wait.Wait()
	eventually(t, "the tunnels to be gone", func() bool { return p.metric(t, "sluice_tunnels") == 0 })
	if n := p.metric(t, `sluice_tunnels_total{reason="client_closed"}`) + p.metric(t, `sluice_tunnels_total{reason="upstream_closed"}`); n != 200 {
		t.Errorf("%v tunnels came to a good end", n)
	}
}

// What a tunnel's end does not take is not read from the other.
func TestH3TunnelBackPressure(t *testing.T) {
	if !apart(t) {
		return
	}
	p, o := startH3Proxy(t), startOrigin(t)
	s := p.dialH3(t).connect(o.addr)
	origin := o.accept()
	origin.SetReadBuffer(64 << 10)
	origin.SetWriteBuffer(64 << 10)
	data := noise(8<<20, 5)
	s.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	up, err := s.Write(data)
	if !errors.Is(err, os.ErrDeadlineExceeded) || up > 7<<20 {
		t.Fatalf("%d bytes were taken, %v", up, err)
	}
	origin.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	down, err := origin.Write(data)
	if !errors.Is(err, os.ErrDeadlineExceeded) || down > 7<<20 {
		t.Fatalf("%d bytes were taken, %v", down, err)
	}
	s.SetWriteDeadline(time.Now().Add(2 * patience))
	origin.SetWriteDeadline(time.Now().Add(2 * patience))
	go func() {
		s.Write(data[up:])
		s.Close()
	}()
	origin.sending(data[down:], true)
	var wait sync.WaitGroup
	wait.Go(func() { sameBytes(t, "up", origin.all(), data) })
	got, err := io.ReadAll(s)
	wait.Wait()
	if err != nil {
		t.Fatal(err)
	}
	sameBytes(t, "down", got, data)
}

func TestH3TunnelTimes(t *testing.T) {
	for variable, want := range map[string]string{"TUNNEL_IDLE_TIMEOUT": "idle_timeout", "TUNNEL_MAX_AGE": "max_age", "TUNNEL_HALF_CLOSE_TIMEOUT": "half_close_timeout"} {
		t.Run(variable, func(t *testing.T) {
			p, o := startH3Proxy(t, variable+"=100ms"), originFor(t, t)
			s := p.dialH3(t).connect(o.addr)
			origin := o.accept()
			if want == "half_close_timeout" {
				s.Close()
			}
			origin.wantsEnd()
			io.ReadAll(s)
			wantsFields(t, p.recordFor(t, "tunnel", o.addr), map[string]any{"close_reason": want})
		})
	}
}

// What cannot be a tunnel is answered as over HTTP/1.
func TestH3TunnelRefused(t *testing.T) {
	p := startH3Proxy(t, "ALLOW_PORTS=1-65534", "DENY_HOSTS=denied.example")
	client := p.dialH3(t)
	for authority, want := range map[string]struct {
		status int
		token  string
	}{
		freeAddr(t):          {502, "connection_refused"},
		"127.0.0.1:65535":    {403, "http_request_denied"},
		"denied.example:443": {403, "http_request_denied"},
		"10.0.0.1:80":        {403, "destination_ip_prohibited"},
		p.addr:               {502, "proxy_loop_detected"},
		"127.0.0.1":          {400, "http_request_error"},
		"[::1":               {400, "http_request_error"},
		"127.0.0.1:0":        {400, "http_request_error"},
	} {
		(&h3Client{client.ClientConn, t, client.conn}).open(h3Request("CONNECT", authority, "", "")).wantsRefusal(want.status, want.token)
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Extended CONNECT

func TestH3WebSocket(t *testing.T) {
	p, o := startH3Proxy(t), startOrigin(t)
	client := p.dialH3(t)
	s := client.open(h3Request("CONNECT", o.addr, "/chat?room=1", "websocket", "Sec-Websocket-Version: 13", "Sec-Websocket-Key: of-the-client"))
	origin := o.accept()
	req, err := http.ReadRequest(origin.br)
	if err != nil {
		t.Fatal(err)
	}
	keys := req.Header["Sec-Websocket-Key"]
	if req.Method != "GET" || req.RequestURI != "/chat?room=1" || req.Host != o.addr || req.Header.Get("Upgrade") != "websocket" || req.Header.Get("Connection") != "Upgrade" ||
		len(keys) != 1 || len(keys[0]) != 24 || req.Header.Get("Sec-Websocket-Version") != "13" || req.Header.Get("Via") != "3 sluice-test" {
		t.Errorf("the origin got %s %s %v", req.Method, req.RequestURI, req.Header)
	}
	origin.send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: %s\r\nSec-WebSocket-Protocol: chat\r\n\r\nhello", acceptKey(keys[0]))
	resp := s.wantsStatus(200)
	if resp.Header.Get("Sec-Websocket-Protocol") != "chat" || resp.Header["Sec-Websocket-Accept"] != nil || resp.Header["Upgrade"] != nil {
		t.Errorf("the client got %v", resp.Header)
	}
	s.wants("hello")
	s.send("frames")
	origin.wants("frames")
	if n := p.metric(t, "sluice_tunnels"); n != 1 {
		t.Errorf("%v tunnels", n)
	}
	s.Close()
	origin.wantsEnd()
	origin.Close()
	s.wantsEnd()
	wantsFields(t, p.recordFor(t, "request", o.addr), map[string]any{"close_reason": "client_closed", "http.request.body.size": 6.0, "http.response.body.size": 5.0,
		"network.protocol.version": "3", "url.path": "/chat"})
}

// What is no WebSocket must not look like one to the client: there, a status of 2xx means that it is.
func TestH3NoWebSocket(t *testing.T) {
	p := startH3Proxy(t)
	client := p.dialH3(t)
	for name, e := range map[string]struct {
		answer string
		status int // 0 = reset
	}{
		"wrong key":  {"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: " + acceptKey("another") + "\r\n\r\n", 502},
		"no key":     {"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 502},
		"no upgrade": {"HTTP/1.1 101 Switching Protocols\r\n\r\n", 502},
		"a page":     {plainAnswer, 502},
		"forbidden":  {"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno", 403},
	} {
		t.Run(name, func(t *testing.T) {
			o := originFor(t, t)
			s := (&h3Client{client.ClientConn, t, client.conn}).open(h3Request("CONNECT", o.addr, "/", "websocket", "Sec-Websocket-Version: 13"))
			origin := o.accept()
			origin.head()
			origin.send("%s", e.answer)
			s.wantsStatus(e.status)
			if e.status == 502 {
				wantsLogged(t, p.recordFor(t, "request", o.addr), 502, "http_protocol_error")
			}
		})
	}
	eventually(t, "no tunnel", func() bool { return p.metric(t, "sluice_tunnels") == 0 })
}

func TestH3OtherProtocols(t *testing.T) {
	p, o := startH3Proxy(t), startOrigin(t)
	client := p.dialH3(t)
	for _, protocol := range []string{"connect-ip", "webtransport", "Websocket"} {
		client.open(h3Request("CONNECT", o.addr, "/", protocol)).wantsRefusal(501, "http_request_error")
	}
	o.wantsNone()
}

// ---------------------------------------------------------------------------------------------------------------------
// Policy and limits

func TestH3Credentials(t *testing.T) {
	p, o := startH3Proxy(t, "USERS=ann:secret"), startOrigin(t)
	client := p.dialH3(t)
	for _, r := range []*http.Request{
		h3Request("GET", o.addr, "/", ""),
		h3Request("GET", o.addr, "/", "", strings.TrimSpace(basic("ann:wrong"))),
		h3Request("CONNECT", o.addr, "", ""),
		h3Request("CONNECT", o.addr, "/", "websocket"),
		h3Request("CONNECT", p.addr, udpPath(o.addr), "connect-udp"),
	} {
		s := client.open(r)
		if r.Method == "GET" {
			s.Close()
		}
		if resp := s.wantsRefusal(407, "http_request_denied"); resp.Header.Get("Proxy-Authenticate") == "" {
			t.Errorf("no challenge: %v", resp.Header)
		}
	}
	o.wantsNone()
	go func() {
		origin := o.accept()
		if head := origin.head(); strings.Contains(head, "Proxy-Auth") {
			t.Errorf("the origin got %q", head)
		}
		origin.send(plainAnswer)
	}()
	if resp, _ := client.roundTrip(h3Request("GET", o.addr, "/ok", "", strings.TrimSpace(basic("ann:secret")))); resp.StatusCode != 200 {
		t.Errorf("status %d", resp.StatusCode)
	}
	eventually(t, "the record", func() bool { return strings.Contains(p.log.all(), `"user.name":"ann"`) })
}

func TestH3Rate(t *testing.T) {
	p := startH3Proxy(t, "RATE=1", "RATE_BURST=2")
	client := p.dialH3(t)
	var got []int
	for range 4 {
		resp, _ := client.roundTrip(h3Request("OPTIONS", "127.0.0.1:9", "/", "", "Max-Forwards: 0"))
		got = append(got, resp.StatusCode)
	}
	if !slices.Equal(got, []int{200, 200, 429, 429}) {
		t.Errorf("got %v", got)
	}
}

// A client whose address is not allowed is not even shaken hands with.
func TestH3ClientNotAllowed(t *testing.T) {
	p := startH3Proxy(t, "ALLOW_CLIENTS=10.0.0.0/8")
	_, err := p.dialQUIC(t)
	if e := (*quic.TransportError)(nil); !errors.As(err, &e) || e.ErrorCode != quic.ConnectionRefused {
		t.Errorf("got %v, want CONNECTION_REFUSED", err)
	}
	if n := p.metric(t, "sluice_client_connections_total"); n != 0 {
		t.Errorf("%v connections were accepted", n)
	}
}

func TestH3MaxConns(t *testing.T) {
	for _, variable := range []string{"MAX_CONNS", "MAX_CONNS_PER_CLIENT"} {
		t.Run(variable, func(t *testing.T) {
			p := startH3Proxy(t, variable+"=1")
			first := p.dialH3(t)
			ping := func(c *h3Client) {
				if resp, _ := c.roundTrip(h3Request("OPTIONS", "127.0.0.1:9", "/", "", "Max-Forwards: 0")); resp.StatusCode != 200 {
					t.Errorf("status %d", resp.StatusCode)
				}
			}
			ping(first)
			second, err := p.dialQUIC(t)
			if err == nil { // the handshake is over before it is counted
				select {
				case <-second.Context().Done():
					err = context.Cause(second.Context())
				case <-time.After(patience):
				}
			}
			if e := (*quic.ApplicationError)(nil); !errors.As(err, &e) || e.ErrorCode != quic.ApplicationErrorCode(http3.ErrCodeExcessiveLoad) || !strings.Contains(e.ErrorMessage, "SLUICE_"+variable) {
				t.Errorf("got %v, want H3_EXCESSIVE_LOAD", err)
			}
			wantsLogged(t, p.log.await(t, "request", 2), 0, "connection_limit_reached")
			first.conn.CloseWithError(0x100, "")
			eventually(t, "the first to be gone", func() bool { return p.metric(t, "sluice_client_connections") == 0 })
			ping(p.dialH3(t))
		})
	}
}

func TestH3MaxTunnels(t *testing.T) {
	p, addr := startH3Proxy(t, "MAX_TUNNELS=2"), echoTCP(t)
	client := p.dialH3(t)
	first := client.connect(addr)
	u := startUDP(t)
	second := client.connectUDP(p, u.addr)
	client.open(h3Request("CONNECT", addr, "", "")).wantsRefusal(503, "connection_limit_reached")
	client.open(h3Request("CONNECT", p.addr, udpPath(u.addr), "connect-udp")).wantsRefusal(503, "connection_limit_reached")
	client.open(h3Request("CONNECT", addr, "/", "websocket", "Sec-Websocket-Version: 13")).wantsRefusal(503, "connection_limit_reached")
	second.Close()
	first.Close()
	eventually(t, "the tunnels to be gone", func() bool { return p.metric(t, "sluice_tunnels") == 0 })
	client.connect(addr)
	client.connectUDP(p, u.addr)
}

func TestH3ClientCertificates(t *testing.T) {
	ca, other := newH3Authority(t), newH3Authority(t)
	p, o := startH3Proxy(t, "TLS_CLIENT_CA="+ca.pem()), startOrigin(t)
	stranger, _, _ := other.issue(t, "mallory")
	for name, certs := range map[string][]tls.Certificate{"none": nil, "another authority's": {stranger}} {
		conn, err := p.dialQUIC(t, certs...)
		if err == nil { // a client takes its own Finished for the end of the handshake
			select {
			case <-conn.Context().Done():
				err = context.Cause(conn.Context())
			case <-time.After(patience):
			}
		}
		if e := (*quic.TransportError)(nil); !errors.As(err, &e) || !e.ErrorCode.IsCryptoError() || !e.Remote {
			t.Errorf("%s: got %v, want an alert", name, err)
		}
	}
	if n := p.metric(t, "sluice_client_connections_total"); n != 0 {
		t.Errorf("%v connections were accepted", n)
	}
	ann, _, _ := ca.issue(t, "ann")
	go func() {
		origin := o.accept()
		origin.head()
		origin.send(plainAnswer)
	}()
	if resp, _ := p.dialH3(t, ann).roundTrip(h3Request("GET", o.addr, "/", "")); resp.StatusCode != 200 {
		t.Errorf("status %d", resp.StatusCode)
	}
	wantsFields(t, p.recordFor(t, "request", o.addr), map[string]any{"user.name": "ann"})
}

// A client that comes again need not have its certificate checked anew.
func TestH3Resumption(t *testing.T) {
	p := startH3Proxy(t)
	config := &tls.Config{RootCAs: p.ca.pool(), NextProtos: []string{"h3"}, ClientSessionCache: tls.NewLRUClientSessionCache(1)}
	resumed := func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		conn, err := quic.DialAddr(ctx, p.addr, config, &quic.Config{EnableDatagrams: true})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.CloseWithError(0x100, "")
		(&h3Client{speakH3(t, conn).ClientConn, t, conn}).roundTrip(h3Request("OPTIONS", "127.0.0.1:9", "/", "", "Max-Forwards: 0")) // the ticket is here then
		return conn.ConnectionState().TLS.DidResume
	}
	if resumed() || !resumed() {
		t.Error("a session was not resumed")
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// UDP tunnels

// udpPath is the path of a request for a UDP tunnel (RFC 9298, 2).
func udpPath(addr string) string {
	host, port, _ := net.SplitHostPort(addr)
	return "/.well-known/masque/udp/" + strings.ReplaceAll(host, ":", "%3A") + "/" + port + "/"
}

// udpOrigin is a socket that a test drives by hand.
type udpOrigin struct {
	*net.UDPConn
	t    *testing.T
	addr string
}

func startUDP(t *testing.T) *udpOrigin { return startUDPAt(t, "127.0.0.1:0") }

func startUDPAt(t *testing.T, addr string) *udpOrigin {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr)))
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(2 * patience))
	return &udpOrigin{c, t, c.LocalAddr().String()}
}

// wants receives a datagram, and gives where it came from.
func (u *udpOrigin) wants(want string) netip.AddrPort {
	u.t.Helper()
	b := make([]byte, 1<<16)
	n, from, err := u.ReadFromUDPAddrPort(b)
	if err != nil || string(b[:n]) != want {
		u.t.Fatalf("the origin got %d bytes %.100q (%v), want %.100q", n, b[:n], err, want)
	}
	return from
}

func (u *udpOrigin) send(to netip.AddrPort, text string) {
	u.t.Helper()
	if _, err := u.WriteToUDPAddrPort([]byte(text), to); err != nil {
		u.t.Fatal(err)
	}
}

// connectUDP opens a UDP tunnel.
func (c *h3Client) connectUDP(p *h3Proxy, addr string) *h3Stream {
	c.t.Helper()
	s := c.open(h3Request("CONNECT", p.addr, udpPath(addr), "connect-udp", "Capsule-Protocol: ?1"))
	if resp := s.wantsStatus(200); resp.Header.Get("Capsule-Protocol") != "?1" {
		c.t.Errorf("the answer has %v", resp.Header)
	}
	return s
}

// datagram sends an HTTP datagram: context ID 0 and a payload.
func (s *h3Stream) datagram(payload string) {
	s.t.Helper()
	if err := s.SendDatagram([]byte("\x00" + payload)); err != nil {
		s.t.Fatal(err)
	}
}

func (s *h3Stream) wantsDatagram(want string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if b, err := s.ReceiveDatagram(ctx); err != nil || string(b) != "\x00"+want {
		s.t.Fatalf("the client got %.100q (%v), want %.100q", b, err, want)
	}
}

// capsule is a capsule as it stands in a stream (RFC 9297, 3.2).
func capsule(kind uint64, value string) string { return string(h3Frame(kind, []byte(value))) }

func TestH3UDP(t *testing.T) {
	p, u := startH3Proxy(t), startUDP(t)
	s := p.dialH3(t).connectUDP(p, u.addr)
	s.datagram("one")
	from := u.wants("one")
	u.send(from, "two")
	s.wantsDatagram("two")
	s.datagram("") // is one, too
	u.wants("")
	u.send(from, "")
	s.wantsDatagram("")

	// They may come in capsules as well. Those of unknown types, and datagrams of unknown contexts, are nothing to it.
	s.send(capsule(0x1234, strings.Repeat("?", 100_000)) + capsule(0, "\x00three") + capsule(0, "\x02four") + capsule(0, "\x40\x00five") + capsule(0, "\x00"))
	s.SendDatagram([]byte("\x02six"))
	s.SendDatagram(nil)
	u.wants("three")
	u.wants("five")
	u.wants("")
	s.datagram("seven")
	u.wants("seven")

	// Only what comes from the address that was asked for is passed on.
	startUDP(t).send(from, "from a stranger")
	u.send(from, "eight")
	s.wantsDatagram("eight")

	if n := p.metric(t, "sluice_tunnels"); n != 1 {
		t.Errorf("%v tunnels", n)
	}
	s.Close()
	s.wantsEnd()
	wantsFields(t, p.recordFor(t, "tunnel", u.addr), map[string]any{"network.transport": "udp", "http.request.method": "CONNECT", "network.protocol.version": "3",
		"http.request.body.size": float64(len("onethreefiveseven")), "http.response.body.size": float64(len("twoeight")), "close_reason": "client_closed",
		"http.response.status_code": 200.0, "network.peer.address": "127.0.0.1"})
	eventually(t, "the tunnel to be gone", func() bool { return p.metric(t, "sluice_tunnels") == 0 })
	if up, down := p.metric(t, `sluice_bytes_total{direction="up"}`), p.metric(t, `sluice_bytes_total{direction="down"}`); up != 17 || down != 8 {
		t.Errorf("metrics: %v bytes up, %v down", up, down)
	}
}

// A client without QUIC's datagrams gets what comes in capsules (RFC 9297, 3.5).
func TestH3UDPCapsulesAlone(t *testing.T) {
	p, u := startH3Proxy(t), startUDP(t)
	conn, err := p.dialQUIC(t)
	if err != nil {
		t.Fatal(err)
	}
	plain := (&http3.Transport{DisableCompression: true}).NewClientConn(conn) // its SETTINGS do not have them
	<-plain.ReceivedSettings()
	s := (&h3Client{plain, t, conn}).connectUDP(p, u.addr)
	s.send(capsule(0, "\x00ping"))
	from := u.wants("ping")
	u.send(from, "pong")
	s.wants(capsule(0, "\x00pong"))
	u.send(from, strings.Repeat("x", 9000)) // no path's limit applies
	s.wants(capsule(0, "\x00"+strings.Repeat("x", 9000)))
	s.Close()
	s.wantsEnd()
}

// TestH3UDPLateTick: a timer that fires while its tunnel ends leaves the exchange alone, which goes back then.
func TestH3UDPLateTick(t *testing.T) {
	(&flow{reason: "client_closed"}).tick() // has no exchange
}

// What is no capsule, or one that cannot be a datagram, ends the tunnel, and not well (RFC 9297, 3.3; RFC 9298, 5).
func TestH3UDPBadCapsules(t *testing.T) {
	p, u := startH3Proxy(t), startUDP(t)
	client := p.dialH3(t)
	for name, b := range map[string]string{
		"cut in its type":   "\x40",
		"cut in its length": "\x00\x80\x00",
		"cut in its value":  capsule(0, "\x00hello")[:5],
		"unknown and cut":   capsule(0x1234, "hello")[:5],
		"too long":          capsule(0, "\x00"+strings.Repeat("x", 65528)),
		"endless":           "\x00\xff\xff\xff\xff\xff\xff\xff\xff",
	} {
		t.Run(name, func(t *testing.T) {
			s := (&h3Client{client.ClientConn, t, client.conn}).connectUDP(p, u.addr)
			s.Write([]byte(b)) // may be stopped before its end
			if !strings.Contains(name, "long") && name != "endless" {
				s.Close()
			}
			s.wantsReset(http3.ErrCodeConnectError)
		})
	}
	eventually(t, "the tunnels to be gone", func() bool { return p.metric(t, "sluice_tunnels") == 0 })
	if n := p.metric(t, `sluice_tunnels_total{reason="connection_error"}`); n != 6 {
		t.Errorf("%v tunnels ended by an error", n)
	}
	u.SetReadDeadline(time.Now().Add(30 * time.Millisecond))
	if n, err := u.Read(make([]byte, 1<<16)); err == nil {
		t.Errorf("the origin got %d bytes", n)
	}
}

func TestH3UDPRefused(t *testing.T) {
	p := startH3Proxy(t, "ALLOW_PORTS=1-65534", "DENY_HOSTS=denied.example,127.0.0.9", "ALLOW_CIDRS=127.0.0.0/8", "USERS=")
	client := p.dialH3(t)
	for path, want := range map[string]struct {
		status int
		token  string
	}{
		"/":                                                 {400, "http_request_error"},
		"/.well-known/masque/udp/":                          {400, "http_request_error"},
		"/.well-known/masque/udp/127.0.0.1":                 {400, "http_request_error"},
		"/.well-known/masque/udp//53/":                      {400, "http_request_error"},
		"/.well-known/masque/udp/127.0.0.1//":               {400, "http_request_error"},
		"/.well-known/masque/udp/127.0.0.1/0/":              {400, "http_request_error"},
		"/.well-known/masque/udp/127.0.0.1/65536/":          {400, "http_request_error"},
		"/.well-known/masque/udp/127.0.0.1/+53/":            {400, "http_request_error"},
		"/.well-known/masque/udp/127.0.0.1/53/x":            {400, "http_request_error"},
		"/.well-known/masque/udp/127.0.0.1/53/?x":           {400, "http_request_error"},
		"/.well-known/masque/udp/127.0.0.1%2F53/53/":        {400, "http_request_error"},
		"/.well-known/masque/udp/a%0D%0AX:%20y/53/":         {400, "http_request_error"},
		"/.well-known/masque/udp/a%20b/53/":                 {400, "http_request_error"},
		"/.well-known/masque/udp/a%00b/53/":                 {400, "http_request_error"},
		"/.well-known/masque/udp/u@127.0.0.1/53/":           {400, "http_request_error"},
		"/.well-known/masque/udp/%5B%3A%3A1%5D/53/":         {400, "http_request_error"},
		"/.well-known/masque/udp/fe80%3A%3A1%25eth0/53/":    {400, "http_request_error"},
		"/.well-known/masque/udp/127.0.0.1/65535/":          {403, "http_request_denied"},
		"/.well-known/masque/udp/denied.example/53/":        {403, "http_request_denied"},
		"/.well-known/masque/udp/127.0.0.9/53/":             {403, "http_request_denied"},
		"/.well-known/masque/udp/10.1.2.3/53/":              {403, "destination_ip_prohibited"},
		"/.well-known/masque/udp/%3A%3Affff%3A10.1.2.3/53/": {403, "destination_ip_prohibited"},
		"/.well-known/masque/udp/%3A%3A1/53/":               {403, "destination_ip_prohibited"},
		"/.well-known/masque/udp/224.0.0.1/53/":             {403, "destination_ip_prohibited"},
		"/.well-known/masque/udp/255.255.255.255/53/":       {403, "destination_ip_prohibited"},
		udpPath(p.addr):                                     {502, "proxy_loop_detected"},
	} {
		t.Run(path, func(t *testing.T) {
			(&h3Client{client.ClientConn, t, client.conn}).open(h3Request("CONNECT", p.addr, path, "connect-udp")).wantsRefusal(want.status, want.token)
		})
	}
	if n := p.metric(t, "sluice_tunnels"); n != 0 {
		t.Errorf("%v tunnels", n)
	}
}

// Names are resolved before the answer, so that it tells what became of that.
func TestH3UDPNames(t *testing.T) {
	dns := startDNS(t)
	dns.set("here.example", dnsReply{addrs: "127.0.0.1"})
	dns.set("inside.example", dnsReply{addrs: "10.0.0.1"})
	p, u := startH3Proxy(t, "DNS_SERVERS="+dns.addr), startUDP(t)
	client := p.dialH3(t)
	port := u.addr[strings.LastIndexByte(u.addr, ':'):]
	s := client.connectUDP(p, "here.example"+port)
	s.datagram("hello")
	u.wants("hello")
	client.open(h3Request("CONNECT", p.addr, udpPath("nowhere.example"+port), "connect-udp")).wantsRefusal(502, "dns_error")
	client.open(h3Request("CONNECT", p.addr, udpPath("inside.example"+port), "connect-udp")).wantsRefusal(403, "destination_ip_prohibited")
	s.cancel()
	wantsFields(t, p.recordFor(t, "tunnel", "here.example"+port), map[string]any{"close_reason": "connection_error", "network.peer.address": "127.0.0.1"})
}

// A datagram socket that cannot be had is told of, and the next address tried.
func TestH3UDPUnroutable(t *testing.T) {
	const far = "[fe80::1]:53" // of no link
	p, u := startH3Proxy(t, "ALLOW_CIDRS=127.0.0.0/8,fe80::/10"), startUDP(t)
	p.dialH3(t).open(h3Request("CONNECT", p.addr, udpPath(far), "connect-udp")).wantsRefusal(502, "destination_ip_unroutable")
	c, err := dialUDP([]netip.AddrPort{netip.MustParseAddrPort(far), netip.MustParseAddrPort(u.addr)})
	if err != nil || c.RemoteAddr().String() != u.addr {
		t.Fatal(c, err)
	}
	c.Close()
}

func TestH3UDPOverIPv6(t *testing.T) {
	p, u := startH3Proxy(t), startUDPAt(t, "[::1]:0")
	path := udpPath(u.addr)
	if !strings.Contains(path, "/%3A%3A1/") {
		t.Fatal(path)
	}
	s := p.dialH3(t).connectUDP(p, u.addr)
	s.datagram("six")
	u.send(u.wants("six"), "6")
	s.wantsDatagram("6")
}

// Where nobody listens, the tunnel ends, and not well.
func TestH3UDPUnreachable(t *testing.T) {
	p, u := startH3Proxy(t), startUDP(t)
	s := p.dialH3(t).connectUDP(p, u.addr)
	s.datagram("hello")
	u.wants("hello")
	u.Close()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.wantsReset(http3.ErrCodeConnectError)
	}()
	for sending := true; sending; { // the first is refused, or the next
		s.SendDatagram([]byte("\x00?"))
		select {
		case <-ended:
			sending = false
		case <-time.After(5 * time.Millisecond):
		}
	}
	wantsFields(t, p.recordFor(t, "tunnel", u.addr), map[string]any{"close_reason": "connection_error"})
}

// What is too long for the client's path, or for the proxy, is dropped as routers do, and never cut.
func TestH3UDPLarge(t *testing.T) {
	p, u := startH3Proxy(t), startUDP(t)
	s := p.dialH3(t).connectUDP(p, u.addr)
	long := string(noise(60_000, 1))
	s.send(capsule(0, "\x00"+long) + capsule(0, "\x00after"))
	from := u.wants(long)
	u.wants("after")
	for _, n := range []int{3000, 16_375, 16_376, 16_377, 20_000, 65_507} {
		u.send(from, long[:min(n, len(long))])
		u.send(from, long[:1000]) // awaited each time: a socket's buffer does not hold them all
		s.wantsDatagram(long[:1000])
	}
	s.Close()
	s.wantsEnd()
	wantsFields(t, p.recordFor(t, "tunnel", u.addr), map[string]any{"http.request.body.size": 60_005.0, "http.response.body.size": 6000.0})
}

// A tunnel for datagrams is not ended sooner than after two minutes without one (RFC 9298, 3.1).
func TestH3UDPIdle(t *testing.T) {
	p, u, o := startH3Proxy(t, "TUNNEL_IDLE_TIMEOUT=30ms"), startUDP(t), startOrigin(t)
	conn := p.dialH3(t)
	s := conn.connectUDP(p, u.addr)
	conn.connect(o.addr)
	p.recordFor(t, "tunnel", o.addr) // is over by now
	s.datagram("still there")
	u.wants("still there")

	for idle, ends := range map[time.Duration]bool{119 * time.Second: false, 121 * time.Second: true} {
		srv := testServer(t, "TUNNEL_IDLE_TIMEOUT=30ms")
		f := &flow{x: &exchange{summary: summary{srv: srv, c: &client{}}}, m: &muxed{control: http.NewResponseController(httptest.NewRecorder())}, udp: startUDP(t).UDPConn,
			since: time.Now().Add(-idle), more: minUDPIdle - srv.cfg.TunnelIdleTimeout, cancel: func() {}, timer: time.NewTimer(time.Hour)}
		if f.tick(); (f.reason == "idle_timeout") != ends {
			t.Errorf("after %v: %q", idle, f.reason)
		}
		f.timer.Stop()
		srv.close()
	}
}

func TestH3UDPMaxAge(t *testing.T) {
	p, u := startH3Proxy(t, "TUNNEL_MAX_AGE=100ms"), startUDP(t)
	s := p.dialH3(t).connectUDP(p, u.addr)
	s.wantsEnd()
	wantsFields(t, p.recordFor(t, "tunnel", u.addr), map[string]any{"close_reason": "max_age"})
}

func TestH3UDPMaxConnsPerHost(t *testing.T) {
	p, u, v := startH3Proxy(t, "MAX_CONNS_PER_HOST=1"), startUDP(t), startUDP(t)
	client := p.dialH3(t)
	s := client.connectUDP(p, u.addr)
	client.open(h3Request("CONNECT", p.addr, udpPath(u.addr), "connect-udp")).wantsRefusal(503, "connection_limit_reached")
	client.connectUDP(p, v.addr)
	s.Close()
	eventually(t, "the first to be gone", func() bool { return p.metric(t, "sluice_tunnels") == 1 })
	client.connectUDP(p, u.addr)
}

// h3Packets is a UDP tunnel as a socket.
type h3Packets struct {
	*h3Stream
	to     net.Addr
	ctx    context.Context
	cancel func()
}

func (c h3Packets) ReadFrom(b []byte) (int, net.Addr, error) {
	for {
		d, err := c.ReceiveDatagram(c.ctx)
		if err != nil {
			return 0, nil, net.ErrClosed
		} else if len(d) > 0 && d[0] == 0 {
			return copy(b, d[1:]), c.to, nil
		}
	}
}

func (c h3Packets) WriteTo(b []byte, _ net.Addr) (int, error) {
	c.SendDatagram(append([]byte{0}, b...)) // what is too long is lost
	return len(b), nil
}

func (c h3Packets) Close() error {
	c.cancel()
	return c.h3Stream.Close()
}

// SetReadDeadline is how quic.Transport ends a read.
func (c h3Packets) SetReadDeadline(at time.Time) error {
	if !at.IsZero() {
		c.cancel()
	}
	return nil
}

func (c h3Packets) LocalAddr() net.Addr { return &net.UDPAddr{} }

// What UDP tunnels are for: HTTP/3 to an origin, through HTTP/3 to the proxy.
func TestH3InUDP(t *testing.T) {
	p, u := startH3Proxy(t), startUDP(t)
	pair, _, _ := p.ca.issue(t, "origin")
	data := noise(1<<20, 7)
	origin := &http3.Server{TLSConfig: http3.ConfigureTLSConfig(&tls.Config{Certificates: []tls.Certificate{pair}}), QUICConfig: &quic.Config{InitialPacketSize: 1200, DisablePathMTUDiscovery: true},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.Copy(w, r.Body)
			w.Write(data)
		})}
	u.SetDeadline(time.Time{})
	served := make(chan error, 1)
	go func() { served <- origin.Serve(u.UDPConn) }()
	t.Cleanup(func() { origin.Close(); <-served })

	ctx, cancel := context.WithCancel(context.Background())
	tunnel := p.dialH3(t).connectUDP(p, u.addr)
	transport := &quic.Transport{Conn: h3Packets{tunnel, u.LocalAddr(), ctx, cancel}}
	t.Cleanup(func() { transport.Close() })
	dialing, stop := context.WithTimeout(ctx, patience)
	defer stop()
	conn, err := transport.Dial(dialing, u.LocalAddr(), &tls.Config{RootCAs: p.ca.pool(), NextProtos: []string{"h3"}, ServerName: "127.0.0.1"},
		&quic.Config{InitialPacketSize: 1200, DisablePathMTUDiscovery: true, EnableDatagrams: true})
	if err != nil {
		t.Fatal(err)
	}
	inner := (&http3.Transport{DisableCompression: true}).NewClientConn(conn)
	req := h3Request("POST", u.addr, "/", "")
	req.Body, req.ContentLength = io.NopCloser(strings.NewReader("ping")), 4
	resp, body := (&h3Client{inner, t, conn}).roundTrip(req)
	if resp.StatusCode != 200 {
		t.Errorf("status %d", resp.StatusCode)
	}
	sameBytes(t, "the body", []byte(body), append([]byte("ping"), data...))
	conn.CloseWithError(0x100, "")
	tunnel.Close()
	if r := p.recordFor(t, "tunnel", u.addr); r["http.response.body.size"].(float64) < 1<<20 {
		t.Errorf("record: %v", r)
	}
}

// Over HTTP/2 datagrams come and go in capsules. net/http's server has extended CONNECT only where GODEBUG says so.
func TestH2UDP(t *testing.T) {
	if !again(t, "env", "GODEBUG=http2xconnect=1", os.Args[0], "-test.run", "^"+t.Name()+"$", "-test.v") {
		return
	}
	p, u := startProxy(t), startUDP(t)
	c := p.dial(t)
	c.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	f := http2.NewFramer(c, c.br)
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	f.WriteSettings()
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for _, field := range []string{":method CONNECT", ":protocol connect-udp", ":scheme https", ":authority " + p.addr, ":path " + udpPath(u.addr), "capsule-protocol ?1"} {
		name, value, _ := strings.Cut(field, " ")
		enc.WriteField(hpack.HeaderField{Name: name, Value: value})
	}
	f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true})
	var got string
	var ended bool
	next := func() {
		frame, err := f.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				f.WriteSettingsAck()
			}
		case *http2.MetaHeadersFrame:
			got += fmt.Sprintln(frame.PseudoValue("status"))
		case *http2.DataFrame:
			got, ended = got+string(frame.Data()), frame.StreamEnded()
		case *http2.RSTStreamFrame:
			t.Fatalf("reset: %v", frame.ErrCode)
		}
	}
	wants := func(want string) {
		t.Helper()
		for got = ""; len(got) < len(want); {
			next()
		}
		if got != want {
			t.Fatalf("got %.200q, want %.200q", got, want)
		}
	}
	wants("200\n")
	f.WriteData(1, false, []byte(capsule(0, "\x00one")+capsule(0x99, "?")+capsule(0, "\x00two")[:3]))
	f.WriteData(1, false, []byte(capsule(0, "\x00two")[3:]))
	from := u.wants("one")
	u.wants("two")
	u.send(from, "three")
	wants(capsule(0, "\x00three"))
	long := strings.Repeat("x", 9000)
	u.send(from, long)
	wants(capsule(0, "\x00"+long))
	f.WriteData(1, true, nil)
	for !ended {
		next()
	}
	wantsFields(t, p.recordFor(t, "tunnel", u.addr), map[string]any{"network.protocol.version": "2", "network.transport": "udp", "close_reason": "client_closed",
		"http.request.body.size": 6.0, "http.response.body.size": 9005.0})
}

// ---------------------------------------------------------------------------------------------------------------------
// Floods

// Streams that are opened and reset at once leave nothing behind, and never have more under way than a connection may.
func TestH3ResetFlood(t *testing.T) {
	p, o := startH3Proxy(t), startOrigin(t)
	client := p.dialH3(t)
	var open, most, dials atomic.Int64
	go func() { // answers nothing
		for c, err := o.Accept(); err == nil; c, err = o.Accept() {
			dials.Add(1)
			most.Store(max(most.Load(), open.Add(1)))
			go func() {
				io.Copy(io.Discard, c)
				open.Add(-1)
				c.Close()
			}()
		}
	}()
	before, peak := runtime.NumGoroutine(), 0
	for round := range 8 {
		var all []*h3Stream
		for i := range maxStreams {
			r := h3Request("GET", o.addr, "/", "")
			if i%2 == 1 {
				r = h3Request("CONNECT", o.addr, "", "")
			}
			s := client.open(r)
			if r.Method == "GET" {
				s.Close()
			}
			if all = append(all, s); round%2 == 1 { // in other rounds the requests get there first
				s.cancel()
			}
		}
		peak = max(peak, runtime.NumGoroutine())
		for _, s := range all {
			s.cancel()
		}
	}
	eventually(t, "the origin to be left alone", func() bool {
		return open.Load() == 0 && p.metric(t, "sluice_pool_active_connections") == 0 && p.metric(t, "sluice_tunnels") == 0
	})
	eventually(t, "the goroutines to be gone", func() bool { return runtime.NumGoroutine() < before+20 })
	if most.Load() > 2*maxStreams || peak > before+8*maxStreams {
		t.Errorf("%d connections at a time of %d, %d goroutines (%d before)", most.Load(), dials.Load(), peak, before)
	}
	if resp, _ := client.roundTrip(h3Request("OPTIONS", "127.0.0.1:9", "/", "", "Max-Forwards: 0")); resp.StatusCode != 200 {
		t.Errorf("the connection is of no more use: %s", resp.Status)
	}
}

// Heads that are large, or become so when QPACK is undone, are refused before they are.
func TestH3HeaderBombs(t *testing.T) {
	p, o := startH3Proxy(t, "MAX_HEADER=16KiB"), startOrigin(t)
	client := p.dialH3(t)
	begin := []string{":method: GET", ":scheme: http", ":authority: " + o.addr, ":path: /"}
	many := slices.Clone(begin)
	for range 400 {
		many = append(many, "x: ") // 34 bytes each, as they are counted
	}
	static := append([]byte{0, 0, 0xd1, 0xd6, 0xc1}, bytes.Repeat([]byte{0xff, 0}, 8000)...) // from the table, two bytes each
	for name, b := range map[string][]byte{
		"long":   h3Fields(append(begin, "x-a: "+strings.Repeat("x", 17<<10))...),
		"many":   h3Fields(append(many, many[4:]...)...),
		"table":  h3Frame(1, static),
		"told":   quicvarint.Append(quicvarint.Append(nil, 1), 1<<40),
		"toldUp": quicvarint.Append(quicvarint.Append(nil, 0x21), 1<<40), // a frame to be skipped
	} {
		t.Run(name, func(t *testing.T) {
			s := (&h3Client{client.ClientConn, t, client.conn}).raw(b)
			if name == "toldUp" {
				s.CancelWrite(0x10c)
			}
			if got, err := io.ReadAll(s); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("neither a reset nor an answer: %q", got)
			}
		})
	}
	s := client.raw(h3Fields(begin...), h3Frame(0, []byte("x")), h3Fields("x-a: "+strings.Repeat("x", 17<<10))) // trailers
	s.Close()
	o.accept().all()
	o.wantsNone()
	if resp, _ := client.roundTrip(h3Request("OPTIONS", "127.0.0.1:9", "/", "", "Max-Forwards: 0")); resp.StatusCode != 200 {
		t.Errorf("the connection is of no more use: %s", resp.Status)
	}
}

// A connection is idle also while heads stand still in its streams.
func TestH3SlowHeads(t *testing.T) {
	p := startH3Proxy(t, "IDLE_TIMEOUT=150ms")
	client := p.dialH3(t)
	for range 100 {
		client.raw([]byte{1, 0x40, 100, 0, 0})
	}
	select {
	case <-client.conn.Context().Done():
	case <-time.After(patience):
		t.Fatal("the connection goes on")
	}
	eventually(t, "the connection to be gone", func() bool { return p.metric(t, "sluice_client_connections") == 0 })

	// One with a tunnel is not idle, and one with nothing is.
	client, o := p.dialH3(t), startOrigin(t)
	s := client.connect(o.addr)
	p.dialH3(t)
	eventually(t, "the other to be gone", func() bool { return p.metric(t, "sluice_client_connections") == 1 })
	s.send("still there")
	o.accept().wants("still there")
	s.Close()
	s.cancel()
	eventually(t, "the connection to be gone", func() bool { return p.metric(t, "sluice_client_connections") == 0 })
}

// deaf is a socket that hears nothing.
type deaf struct {
	net.PacketConn
	until chan struct{}
}

func (d *deaf) ReadFrom([]byte) (int, net.Addr, error) {
	<-d.until
	return 0, nil, net.ErrClosed
}

func (d *deaf) SetReadDeadline(at time.Time) error {
	if !at.IsZero() {
		close(d.until)
	}
	return nil
}

// Handshakes that come to no end are forgotten when HEADER_TIMEOUT is over; most are held by no memory at all.
func TestH3HandshakeFlood(t *testing.T) {
	p := startH3Proxy(t, "HEADER_TIMEOUT=200ms")
	before := runtime.NumGoroutine()
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	transport := &quic.Transport{Conn: &deaf{udp, make(chan struct{})}}
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	to := net.UDPAddrFromAddrPort(netip.MustParseAddrPort(p.addr))
	var wait sync.WaitGroup
	for range 400 {
		wait.Go(func() {
			if _, err := transport.Dial(ctx, to, &tls.Config{RootCAs: p.ca.pool(), NextProtos: []string{"h3"}, ServerName: "127.0.0.1"}, nil); err == nil {
				t.Error("a handshake without an answer")
			}
		})
	}
	wait.Wait()
	cancel()
	transport.Close()
	udp.Close()
	junk, _ := net.Dial("udp", p.addr)
	for i := range 200 {
		junk.Write(noise(1200, byte(i)))
		junk.Write(append([]byte{0xc0, 0, 0, 0, 1, 8}, noise(1194, byte(i))...)) // as if of version 1
	}
	junk.Close()
	eventually(t, "the handshakes to be forgotten", func() bool { return runtime.NumGoroutine() < before+20 })
	if n := p.metric(t, "sluice_client_connections_total"); n != 0 {
		t.Errorf("%v connections were accepted", n)
	}
	p.dialH3(t)
}

// ---------------------------------------------------------------------------------------------------------------------
// Drain

func TestH3Drain(t *testing.T) {
	if !apart(t) {
		return
	}
	p, o, u := startH3Proxy(t, "DRAIN_TIMEOUT=800ms"), startOrigin(t), startUDP(t)
	client := p.dialH3(t)
	s := client.open(h3Request("GET", o.addr, "/", ""))
	s.Close()
	slow := o.accept()
	slow.head()
	tunnel := client.connect(o.addr)
	end := o.accept()
	packets := client.connectUDP(p, u.addr)
	other := p.dialH3(t)

	stopped := make(chan struct{})
	go func() { defer close(stopped); p.stop() }()
	eventually(t, "GOAWAY", func() bool {
		s, err := client.OpenRequestStream(t.Context())
		if err == nil {
			s.CancelRead(0x10c)
			s.CancelWrite(0x10c)
		}
		return err != nil
	})
	if client.conn.Context().Err() != nil {
		t.Fatal("the connection did not wait for its streams")
	}
	select {
	case <-other.conn.Context().Done(): // it had nothing to wait for
	case <-time.After(patience):
		t.Error("an idle connection goes on")
	}
	slow.send(plainAnswer)
	s.wantsStatus(200)
	s.wants("hi")
	s.wantsEnd()
	tunnel.send("still there")
	end.wants("still there")
	packets.datagram("this too")
	u.wants("this too")
	end.wantsEnd()
	<-stopped
	for _, addr := range []string{o.addr, u.addr} {
		wantsFields(t, p.recordFor(t, "tunnel", addr), map[string]any{"close_reason": "drain"})
	}
}

// The drain does not wait for a client that stays though nothing runs.
func TestH3DrainIdle(t *testing.T) {
	if !apart(t) {
		return
	}
	p := startH3Proxy(t, "DRAIN_TIMEOUT=4s")
	conn, err := p.dialQUIC(t) // nobody heeds GOAWAY on it
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the connection to be served", func() bool { return p.metric(t, "sluice_client_connections") == 1 })
	took := time.Now()
	p.stop()
	if d := time.Since(took); d > 2*time.Second {
		t.Errorf("the drain took %v", d)
	}
	if e := (*quic.ApplicationError)(nil); !errors.As(context.Cause(conn.Context()), &e) || e.ErrorCode != quic.ApplicationErrorCode(http3.ErrCodeNoError) {
		t.Errorf("ended by %v", context.Cause(conn.Context()))
	}
}

// A second process gets a UDP port when the first has let it go, and says that it waits.
func TestH3SecondProcess(t *testing.T) {
	addr := freeAddr(t)
	p1 := startH3Proxy(t, "LISTEN="+addr)
	p2 := startH3Proxy(t, "LISTEN="+addr)
	if !strings.Contains(p2.log.all(), "UDP port is in use") {
		t.Error("the second did not say that it waits")
	}
	p1.dialH3(t).conn.CloseWithError(0x100, "")
	p1.stop()
	eventually(t, "the second to serve", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
		defer cancel()
		conn, err := quic.DialAddr(ctx, addr, &tls.Config{RootCAs: p2.ca.pool(), NextProtos: []string{"h3"}}, nil)
		if err == nil {
			conn.CloseWithError(0x100, "")
		}
		return err == nil
	})
	p3 := startH3Proxy(t, "LISTEN="+addr) // stops while it waits
	p3.stop()
}

func TestH3Settings(t *testing.T) {
	if status, _, stderr := sluice([]string{"env"}, prefixed("HTTP3=true")...); status != 2 || !strings.Contains(stderr, "SLUICE_HTTP3") {
		t.Errorf("HTTP3 without a certificate: %d %s", status, stderr)
	}
	p := startH3Proxy(t, "HTTP3=false")
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if _, err := quic.DialAddr(ctx, p.addr, &tls.Config{RootCAs: p.ca.pool(), NextProtos: []string{"h3"}}, nil); err == nil {
		t.Error("HTTP/3 is spoken where it is off")
	}
}

// Clients as they are installed, on the TLS side of front.go.

// loopbackIdentity makes a certificate for 127.0.0.1 that has signed itself, and the hash by which Chromium can be told to trust it.
func loopbackIdentity(t *testing.T) (cert, key, hash string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "sluice-test"}, IPAddresses: []net.IP{{127, 0, 0, 1}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(crand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	parsed, _ := x509.ParseCertificate(der)
	return string(pemfile.EncodeToMemory(&pemfile.Block{Type: "CERTIFICATE", Bytes: der})),
		string(pemfile.EncodeToMemory(&pemfile.Block{Type: "PRIVATE KEY", Bytes: secret})), keyHash(parsed)
}

// keyHash is what --ignore-certificate-errors-spki-list takes.
func keyHash(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return base64.StdEncoding.EncodeToString(sum[:])
}

// Chromium speaks HTTP/2 to a proxy that is named by an https URL: pages of https origins come through CONNECT streams, those of http
// origins as requests, all in as few connections as it likes. The page that is shown is whole: its script has fetched what it is to
// fetch, and its colour is in the picture, which -screenshots DIR keeps.
func TestChromiumOverHTTP2(t *testing.T) {
	if _, err := exec.LookPath("chromium"); err != nil {
		t.Skip("SKIPPED: there is no chromium, so that no browser is known to speak HTTP/2 to the proxy")
	}
	const parts, size = 20, 200_000
	origin := func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/":
			w.Header().Set("Content-Type", "text/html")
			fmt.Fprintf(w, `<!doctype html><body style="margin: 0; background: #c00"><script>
				Promise.all([...Array(%d).keys()].map(async i => {
					const got = await (await fetch("/part/" + i, {method: "POST", body: "x".repeat(%d)})).text();
					return got.length == %d && new Set(got).size == 1;
				})).then(all => {
					document.body.style.background = all.every(whole => whole) ? "#0c0" : "#00c";
					document.title = "fetched " + all.filter(whole => whole).length;
				});</script>`, parts, size, size)
		case "/favicon.ico":
			http.NotFound(w, r)
		default:
			body, _ := io.ReadAll(r.Body) // HTTP/1.1 in Go reads no more once it has written
			w.Write(body)
		}
	}
	plain := serveAt(t, "127.0.0.1:0", origin)
	secure := httptest.NewUnstartedServer(http.HandlerFunc(origin))
	secure.EnableHTTP2 = true
	secure.Config.ErrorLog = log.New(io.Discard, "", 0) // Chromium gives some connections up
	secure.StartTLS()
	t.Cleanup(secure.Close)
	tunnelled := secure.Listener.Addr().String()
	cert, key, hash := loopbackIdentity(t)
	p := startProxy(t, "TLS_CERT="+cert, "TLS_KEY="+key, "ALLOW_HOSTS=127.0.0.1", "LOG_LEVEL=info") // what browsers ask for on their own is refused
	for _, test := range []struct{ url, msg, method, server string }{
		{"https://" + tunnelled + "/", "tunnel", "CONNECT", tunnelled},
		{"http://" + plain + "/", "request", "POST", plain},
	} {
		scheme, _, _ := strings.Cut(test.url, ":")
		picture := filepath.Join(t.TempDir(), "chromium-"+scheme+".png")
		if *screenshots != "" {
			picture = filepath.Join(*screenshots, filepath.Base(picture))
		}
		shown := statusPage(t, test.url, "--proxy-server=https://"+p.addr, "--proxy-bypass-list=<-loopback>", "--no-first-run",
			"--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=200,200", "--screenshot="+picture,
			"--ignore-certificate-errors-spki-list="+hash+","+keyHash(secure.Certificate()))
		if want := fmt.Sprintf("<title>fetched %d</title>", parts); !strings.Contains(shown, want) {
			t.Errorf("%s: not %s: %.2000s", test.url, want, shown)
		}
		if c := colourOf(t, picture); c != (color.RGBA{0, 0xcc, 0, 0xff}) {
			t.Errorf("%s: the picture is %v", test.url, c)
		}
		var found, moved float64
		eventually(t, "the records of "+test.url, func() bool {
			found, moved = 0, 0
			for _, r := range p.log.records(t) {
				if r["msg"] == test.msg && fmt.Sprintf("%v:%v", r["server.address"], r["server.port"]) == test.server {
					if r["network.protocol.version"] != "2" || r["http.response.status_code"] != 200.0 && r["url.path"] != "/favicon.ico" || r["error.type"] != nil {
						t.Fatalf("%v", r)
					}
					if r["http.request.method"] == test.method {
						found++
						moved += r["http.response.body.size"].(float64)
					}
				}
			}
			return found > 0 && moved >= parts*size
		})
		if test.method == "POST" && found != parts {
			t.Errorf("%v requests are in the log", found)
		}
	}
}

// colourOf is the colour in the middle of a picture.
func colourOf(t *testing.T, picture string) color.Color {
	t.Helper()
	file, err := os.Open(picture)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	img, err := png.Decode(file)
	if err != nil {
		t.Fatal(err)
	}
	at := img.Bounds()
	return color.RGBAModel.Convert(img.At(at.Dx()/2, at.Dy()/2))
}

// A client that grants no room for an answer's body is not waited for longer than BODY_TIMEOUT, however small the body is: what the
// library holds back until the handler has returned is not forgotten.
func TestBodyThatHasNoRoom(t *testing.T) {
	if !apart(t) {
		return
	}
	for _, size := range []int{1, 100, 4000, 5000, 100_000} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			origin := serveAt(t, "127.0.0.1:0", func(w http.ResponseWriter, _ *http.Request) {
				io.WriteString(w, strings.Repeat("x", size))
			})
			p := startProxy(t, "BODY_TIMEOUT=300ms")
			frames := getInFrames(p.dial(t), origin, 0)
			for began, seen := time.Now(), ""; ; {
				f, err := frames.ReadFrame()
				if err != nil {
					t.Fatalf("%v after %s", err, seen)
				}
				seen += f.Header().String()
				if settings, ok := f.(*http2.SettingsFrame); ok && !settings.IsAck() {
					frames.WriteSettingsAck()
				} else if _, ok := f.(*http2.RSTStreamFrame); ok {
					if waited := time.Since(began); waited < 200*time.Millisecond || !strings.Contains(seen, "HEADERS") {
						t.Errorf("reset after %v: %s", waited, seen)
					}
					return
				}
			}
		})
	}
}

// getInFrames asks for the origin's / in a stream that has a window of so many bytes, as has the connection, if that is more than it
// has anyway.
func getInFrames(c *peer, origin string, window uint32) *http2.Framer {
	c.t.Helper()
	c.send(http2.ClientPreface)
	frames := http2.NewFramer(c, c)
	frames.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: window})
	if window > 1<<16 {
		frames.WriteWindowUpdate(0, window-1<<16)
	}
	var block bytes.Buffer
	fields := hpack.NewEncoder(&block)
	for _, f := range [][2]string{{":method", "GET"}, {":scheme", "http"}, {":authority", origin}, {":path", "/"}} {
		fields.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]})
	}
	frames.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndStream: true, EndHeaders: true})
	return frames
}

// A client that takes nothing of what its windows have room for loses the stream after BODY_TIMEOUT, and its connection as an idle one; one
// that takes it slowly keeps both.
func TestReadersOfFrames(t *testing.T) {
	if !apart(t) {
		return
	}
	origin := serveAt(t, "127.0.0.1:0", func(w http.ResponseWriter, _ *http.Request) {
		for part := strings.Repeat("x", 1<<20); ; {
			if _, err := io.WriteString(w, part); err != nil {
				return
			}
		}
	})
	t.Run("stalled", func(t *testing.T) {
		p := startProxy(t, "BODY_TIMEOUT=300ms", "IDLE_TIMEOUT=1s")
		c := p.dial(t)
		c.SetReadBuffer(4 << 10)
		getInFrames(c, origin, 1<<30)
		if r := p.log.await(t, "request", 1); r["duration_ms"].(float64) < 250 || r["error.type"] == nil {
			t.Errorf("%v", r)
		}
		p.log.await(t, "client closed", 1)
	})
	t.Run("slow", func(t *testing.T) {
		p := startProxy(t, "BODY_TIMEOUT=300ms")
		c := p.dial(t)
		c.SetReadBuffer(16 << 10)
		getInFrames(c, origin, 1<<30)
		part := make([]byte, 32<<10)
		for began := time.Now(); time.Since(began) < 2*time.Second; time.Sleep(50 * time.Millisecond) {
			if _, err := io.ReadFull(c, part); err != nil {
				t.Fatalf("%v after %v", err, time.Since(began))
			}
		}
	})
}
