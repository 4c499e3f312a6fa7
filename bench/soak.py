"""The load of bench/soak and the origin that it is asked of. Python's standard library only.

    soak.py origin                                 serves until it is ended; prints its three ports: HTTP, HTTP with faults, echo
    soak.py load PROXY HTTP FAULTY ECHO NONE SECS FAILURES

Requests say in their query what the origin is to do, faults too, so that the load knows for each one what must come of it. Bodies are
stretches of one block of random bytes, the same in both processes. An outcome that was not to be expected is written to the file
FAILURES, as "SECONDS-SINCE-1970 KIND: what"; the sums go to stdout.
"""

import collections
import hashlib
import random
import socket
import struct
import sys
import threading
import time
import urllib.parse

BLOCK = memoryview(random.Random(1).randbytes(8 << 20))
HOST = "127.0.0.1"
HANG = 12  # seconds without a byte: Sluice's limits, 4 seconds here, must have ended it long before


def reset(sock):
    """Closes with a reset instead of an orderly end."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Ended(Exception):
    """The peer ended the connection; how: "closed", "reset" or "hang"."""

    def __init__(self, how):
        super().__init__(how)
        self.how = how


class Wire:
    """A connection with a buffer for what was read and not yet used."""

    def __init__(self, sock):
        self.sock, self.held = sock, b""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def more(self, size=262144):
        try:
            got = self.sock.recv(size)
        except TimeoutError:
            raise Ended("hang") from None
        except OSError:
            raise Ended("reset") from None
        if not got:
            raise Ended("closed")
        return got

    def send(self, data):
        try:
            self.sock.sendall(data)
        except TimeoutError:
            raise Ended("hang") from None
        except OSError:
            raise Ended("reset") from None

    def until(self, mark):
        while mark not in self.held:
            self.held += self.more()
        got, self.held = self.held.split(mark, 1)
        return got

    def pieces(self, n):
        """Yields what comes of the next n bytes; n < 0: to the connection's end."""
        while n:
            got = self.held or self.more()
            if n < 0:
                self.held = b""
            else:
                got, self.held = got[:n], got[n:]
                n -= len(got)
            yield got

    def head(self):
        lines = self.until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        fields = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            fields[name.lower()] = value.strip()
        return lines[0], fields

    def body(self, fields, to_end=False):
        """Yields a body's pieces. That it is whole is known when it ends without Ended."""
        if "chunked" in fields.get("transfer-encoding", ""):
            while size := int(self.until(b"\r\n").split(b";")[0], 16):
                yield from self.pieces(size)
                if self.until(b"\r\n"):
                    raise ValueError("no line end behind a chunk")
            while self.until(b"\r\n"):
                pass
        elif "content-length" in fields:
            yield from self.pieces(int(fields["content-length"]))
        elif to_end:
            try:
                yield from self.pieces(-1)
            except Ended as e:
                if e.how != "closed":
                    raise

    def close(self):
        self.sock.close()


# ----------------------------------------------------------------------------------------------------------------------
# The origin


def serve_http(wire):
    while True:
        line, fields = wire.head()
        method, target, _ = line.split(" ")
        ask = {k: v[0] for k, v in urllib.parse.parse_qs(target.partition("?")[2]).items()}
        fault, at, size, pause = ask.get("fault", ""), int(ask.get("at", 0)), int(ask.get("size", 0)), float(ask.get("pause", 0))
        if fields.get("upgrade") == "websocket":
            wire.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
            return echo(wire)
        if fault == "413":  # answers before the body is here, and ends in order
            wire.send(b"HTTP/1.1 413 No\r\nConnection: close\r\nContent-Length: 3\r\n\r\nno\n")
            wire.sock.shutdown(socket.SHUT_WR)
            for _ in wire.pieces(-1):
                pass
        if "100-continue" in fields.get("expect", ""):
            wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        sum, count = hashlib.sha256(), 0
        for piece in wire.body(fields):
            sum.update(piece)
            count += len(piece)
        if fault == "early":
            return None
        if fault == "reset early":
            return reset(wire.sock)
        if fault == "stall":
            return wire.more()  # until the proxy gives up
        if fault == "garbage":
            return wire.send(b"HTTP/1.1 OK\r\n\r\nhello")
        if pause and not at:
            time.sleep(pause)
        data = BLOCK[:size]
        if method == "POST":
            data = f"{sum.hexdigest()} {count}".encode()
        framing = ask.get("framing", "length")
        head = {"length": f"Content-Length: {len(data)}\r\n", "chunked": "Transfer-Encoding: chunked\r\n", "close": "Connection: close\r\n"}[framing]
        wire.send(f"HTTP/1.1 200 OK\r\n{head}\r\n".encode())
        step = 1 << 20 if framing != "chunked" else random.randint(1, 30000)
        place = 0
        while place < len(data):
            if at and place >= at:
                if fault == "truncate":
                    return None
                if fault == "reset":
                    return reset(wire.sock)
                if fault == "stall in body":
                    return wire.more()
                if fault == "bad chunk":
                    return wire.send(b"xyz\r\n")
                at = time.sleep(pause) or 0
            end = min(place + step, len(data), at if at > place else len(data))
            piece = data[place:end]
            wire.send(b"%x\r\n%b\r\n" % (len(piece), piece) if framing == "chunked" else piece)
            place = end
        if framing == "chunked":
            wire.send(b"0\r\n\r\n")
        if framing == "close":
            return None
        if fault == "close later":  # without having said so
            return time.sleep(random.random() * 0.03)


def echo(wire):
    for piece in wire.pieces(-1):
        wire.send(piece)


def serve_echo(wire):
    """The first byte says what is to be done: e = echo; f, r = send a part of the block, then an orderly end or a reset."""
    what = next(wire.pieces(1))
    if what == b"e":
        return echo(wire)
    wire.send(BLOCK[:100000])
    if what == b"r":
        time.sleep(0.2)  # else the reset overtakes the bytes
        reset(wire.sock)


def origin():
    def run(serve, sock):
        wire = Wire(sock)
        try:
            serve(wire)
        except (Ended, ValueError, OSError):
            pass
        wire.close()

    def accept(listener, serve):
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=run, args=(serve, sock), daemon=True).start()

    ports = []
    for serve in serve_http, serve_http, serve_echo:
        listener = socket.create_server((HOST, 0), backlog=1024)
        ports.append(listener.getsockname()[1])
        threading.Thread(target=accept, args=(listener, serve), daemon=True).start()
    print(*ports, flush=True)
    threading.Event().wait()


# ----------------------------------------------------------------------------------------------------------------------
# The load. Each kind is a function that does one thing and notes one outcome or several.


class Load:
    def __init__(self, proxy, http, faulty, none_port, echo_port, until, failures):
        self.proxy, self.http, self.faulty, self.echo, self.none = proxy, f"{HOST}:{http}", f"{HOST}:{faulty}", f"{HOST}:{echo_port}", f"{HOST}:{none_port}"
        self.until, self.failures = until, failures
        self.sums, self.worst, self.lock = collections.Counter(), collections.Counter(), threading.Lock()

    def note(self, kind, outcome, good, since=None, detail=""):
        with self.lock:
            self.sums[kind, outcome, good] += 1
            if since:
                self.worst[kind] = max(self.worst[kind], time.time() - since)
            if not good:
                self.failures.write(f"{time.time():.3f} {kind}: {outcome}{detail}\n")
                self.failures.flush()

    def connect(self):
        sock = socket.create_connection((HOST, self.proxy), timeout=HANG)
        return Wire(sock)

    def url(self, host, **ask):
        return f"http://{host}/b?{urllib.parse.urlencode(ask)}"

    def ask(self, wire, method, host, ask, version="1.1", fields="", body=()):
        """Sends one request and reads its answer: status, fields, the body's length, how it ended. The body's bytes must be those of
        the block, or the text that a POST expects; if they are not, the end is "wrong bytes"."""
        try:
            wire.send(f"{method} {self.url(host, **ask)} HTTP/{version}\r\nHost: {host}\r\n{fields}\r\n".encode())
            for piece in body:
                wire.send(piece)
        except Ended as e:
            if e.how == "hang":
                return 0, {}, b"", "hang in sending"
            # The answer may be here nevertheless.
        return self.answer(wire)

    def answer(self, wire, read=None):
        got, status, fields = bytearray(), 0, {}
        try:
            line, fields = wire.head()
            while line.split(" ")[1].startswith("1"):
                line, fields = wire.head()
            status = int(line.split(" ")[1])
            for piece in wire.body(fields, to_end=True):
                got += piece
            return status, fields, got, "whole"
        except Ended as e:
            return status, fields, got, e.how
        except (ValueError, IndexError) as e:
            return status, fields, got, f"malformed answer ({e})"

    def describe(self, status, fields, got, end):
        text = f"{status} {end}" if status else f"no answer, {end}"
        if status >= 400 and end == "whole":
            text += f" ({bytes(got[:150]).decode('latin-1').strip()})" if fields.get("proxy-status") else " (the origin's)"
        return text

    def check_get(self, kind, answer, size, since, fresh=True):
        status, fields, got, end = answer
        where = "" if fresh else " on a kept connection"
        if (status, end) == (200, "whole") and len(got) == size and got == BLOCK[:size]:
            self.note(kind, "200", True, since)
            return fields.get("connection", "") != "close"
        if status == 200 and end == "whole":
            text = f"a clean end after {len(got)} of {size} bytes" if len(got) < size else "wrong bytes"
        else:
            text = self.describe(*answer)
        self.note(kind, text + where, False, since)
        return False

    # Kept connections. One that the proxy has closed before a request is sent may be replaced; a request that was sent must be answered.
    def kept(self):
        wire, served = None, 0
        while time.time() < self.until:
            if wire:
                try:
                    wire.sock.setblocking(False)
                    early = wire.sock.recv(1, socket.MSG_PEEK)
                    if early:
                        self.note("GET, kept", "bytes out of turn", False)
                    else:
                        self.note("GET, kept", "closed while idle, replaced", True)
                    wire.close()
                    wire = None
                except BlockingIOError:
                    wire.sock.settimeout(HANG)
                except OSError:
                    self.note("GET, kept", "reset while idle", False)
                    wire.close()
                    wire = None
            since = time.time()
            if not wire:
                wire, served = self.connect(), 0
            size = random.choice((0, 1, 100, 5000, 70000))
            answer = self.ask(wire, "GET", self.http, {"size": size, "framing": random.choice(("length", "chunked"))})
            if not self.check_get("GET, kept", answer, size, since, not served):
                wire.close()
                wire = None
            served += 1
            time.sleep(random.random() * (3 if random.random() < 0.02 else 0.02))

    def new(self):
        since, size, version = time.time(), random.randint(0, 30000), random.choice(("1.1", "1.1", "1.0"))
        wire = self.connect()
        answer = self.ask(wire, "GET", self.http, {"size": size, "framing": random.choice(("length", "chunked", "close"))}, version)
        self.check_get("GET, new connection", answer, size, since)
        wire.close()

    def pipelined(self):
        since, wire, sizes = time.time(), self.connect(), [random.randint(0, 3000) for _ in range(5)]
        wire.send("".join(f"GET {self.url(self.http, size=n)} HTTP/1.1\r\nHost: {self.http}\r\n\r\n" for n in sizes).encode())
        for n, size in enumerate(sizes):
            if not self.check_get("GET, pipelined", self.answer(wire), size, since, n == 0):
                break  # a drain may end the connection here, and says so
        wire.close()

    def download(self):
        since, size, wire, kind = time.time(), random.randint(2 << 20, len(BLOCK)), self.connect(), "GET of 2 to 8 MB"
        wire.send(f"GET {self.url(self.http, size=size)} HTTP/1.1\r\nHost: {self.http}\r\n\r\n".encode())
        rest, sum, count = random.randint(0, size), hashlib.sha256(), 0
        try:
            line, fields = wire.head()
            for piece in wire.body(fields):
                sum.update(piece)
                count += len(piece)
                if count > rest:
                    time.sleep(random.random())
                    rest = size
        except Ended as e:
            self.note(kind, f"{e.how} after {count} of {size} bytes", False, since)
        else:
            good = sum.digest() == hashlib.sha256(BLOCK[:size]).digest()
            self.note(kind, "200" if good else f"{line}: {count} of {size} bytes, other ones than sent", good, since)
        wire.close()

    def upload(self, ask, host):
        """Returns the answer to a POST, and what it must be."""
        size = random.choice((0, 10, 1000, 40000, 300000, 1 << 20))
        data, chunked = BLOCK[:size], random.random() < 0.5
        fields = "Transfer-Encoding: chunked\r\n" if chunked else f"Content-Length: {size}\r\n"
        if random.random() < 0.1:
            fields += "Expect: 100-continue\r\n"  # and does not wait for it, as it may

        def pieces():
            place = 0
            while place < size:
                piece = data[place : place + random.choice((100, 5000, 100000))] if size < 50000 else data[place : place + random.randint(5000, 200000)]
                place += len(piece)
                yield b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece
                if random.random() < 0.05:
                    time.sleep(random.random() * 0.3)
            if chunked:
                yield b"0\r\n\r\n"

        wire = self.connect()
        answer = self.ask(wire, "POST", host, ask, fields=fields, body=pieces())
        wire.close()
        return answer, f"{hashlib.sha256(data).hexdigest()} {size}".encode()

    def post(self):
        since = time.time()
        answer, want = self.upload({}, self.http)
        good = answer[0] == 200 and answer[3] == "whole" and answer[2] == want
        self.note("POST", "200" if good else "other bytes than sent" if answer[0] == 200 else self.describe(*answer), good, since)

    def post_faulty(self):
        since, fault = time.time(), random.choice(("early", "reset early", "garbage", "413"))
        # The 413 comes from where kept connections are good: elsewhere the origin may close one as the request comes.
        answer, _ = self.upload({"fault": fault}, self.http if fault == "413" else self.faulty)
        good = answer[0] == (413 if fault == "413" else 502) and answer[3] == "whole"
        self.note("POST, faulty origin", f"{fault}: {answer[0] if good else self.describe(*answer)}", good, since)

    def stalled(self):
        """A request of which a part never comes: it must be answered 408 when Sluice's limit is over."""
        since, wire, size = time.time(), self.connect(), random.choice((1000, 30000, 100000, 1 << 20))
        part, way = random.randint(1, size - 1), random.choice(("head", "body", "chunked body"))
        if way == "head":
            wire.send(f"GET {self.url(self.http)} HTTP/1.1\r\nHost: ".encode())
        elif way == "body":
            wire.send(f"POST {self.url(self.http)} HTTP/1.1\r\nHost: {self.http}\r\nContent-Length: {size}\r\n\r\n".encode())
            wire.send(BLOCK[:part])
        else:
            wire.send(f"POST {self.url(self.http)} HTTP/1.1\r\nHost: {self.http}\r\nTransfer-Encoding: chunked\r\n\r\n{size:x}\r\n".encode())
            wire.send(BLOCK[:part])
        answer = self.answer(wire)
        wire.close()
        good = (answer[0], answer[3]) == (408, "whole")
        self.note("stalled request", f"{way}: {408 if good else self.describe(*answer)}", good, since, f", {part} of {size} bytes sent")

    # What a fault may lead to. "cut": the response has begun and ends so that the client can tell.
    FAULTS = {
        "early": ("502",), "reset early": ("502",), "garbage": ("502",), "truncate": ("cut", "502"), "reset": ("cut", "502"), "stall": ("504",),
        "stall in body": ("cut",), "bad chunk": ("cut", "502"), "close later": ("200",), "slow head": ("200",), "slow body": ("200",),
    }  # fmt: skip

    def get_faulty(self):
        since, fault, size = time.time(), random.choice(list(self.FAULTS)), random.choice((3000, 100000, 4 << 20))
        if "stall" in fault and random.random() < 0.7:
            return  # they take long
        ask = {"size": size, "framing": random.choice(("length", "chunked")), "fault": fault}
        version = random.choice(("1.1", "1.1", "1.0"))
        if fault in ("truncate", "reset", "stall in body", "bad chunk", "slow body"):
            ask["at"] = random.randint(1, size - 1)
        if fault == "bad chunk":
            ask["framing"] = "chunked"
        if fault == "reset" and random.random() < 0.3:
            ask["framing"] = "close"
        if fault.startswith("slow"):
            ask["pause"] = random.random() * 2
        wire = self.connect()
        status, fields, got, end = answer = self.ask(wire, "GET", self.faulty, ask, version)
        wire.close()
        right, detail = got == BLOCK[: len(got)], f", HTTP/{version}, {ask}"
        if status == 200 and right and end == "whole":
            outcome = "200" if len(got) == size else "a clean end with too few bytes"
        elif status == 200 and right and end in ("closed", "reset"):
            outcome = "cut"
        elif status == 200:
            outcome = f"{end}, bytes {'right' if right else 'wrong'}"
        else:
            outcome = str(status) if status in (502, 504) and end == "whole" else self.describe(*answer)
        self.note("GET, faulty origin", f"{fault}: {outcome}", outcome in self.FAULTS[fault], since, detail)

    def open_tunnel(self, kind, head, want):
        wire = self.connect()
        try:
            wire.send(head.encode())
            line, _ = wire.head()
        except Ended as e:
            line = f"no answer, {e.how}"
        if want not in line:
            self.note(kind, line, False)
            wire.close()
            return None
        return wire

    def through(self, kind, wire, since, first, leave=None, half_close=True):
        """Sends bytes that are echoed while it reads them; leave: where it vanishes."""
        size, back, end = random.choice((10, 3000, 200000, 2 << 20)), hashlib.sha256(), ["hang"]
        data = BLOCK[:size]

        def send():
            try:
                wire.send(first)
                for place in range(0, size, 65536):
                    wire.send(data[place : place + 65536])
                    if leave is not None and place >= leave * size:
                        return reset(wire.sock)
                if half_close:
                    wire.sock.shutdown(socket.SHUT_WR)
            except (Ended, OSError):
                pass

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        count = 0
        try:
            for piece in wire.pieces(-1 if half_close else size):
                back.update(piece)
                count += len(piece)
            end = "whole"
        except Ended as e:
            end = e.how
        sender.join()
        wire.close()
        if leave is not None:
            return self.note(kind, "left", True)
        whole = count == size and back.digest() == hashlib.sha256(data).digest() and end == ("closed" if half_close else "whole")
        self.note(kind, "echoed" if whole else f"{end} after {count} of {size} bytes", whole, since)

    def tunnel(self):
        since, leave = time.time(), random.random() if random.random() < 0.3 else None
        kind = "tunnel" if leave is None else "tunnel, reset by the client"
        if wire := self.open_tunnel(kind, f"CONNECT {self.echo} HTTP/1.1\r\nHost: {self.echo}\r\n\r\n", " 200 "):
            self.through(kind, wire, since, b"e", leave)

    def tunnel_ended(self):
        since, what = time.time(), random.choice((b"f", b"r"))
        kind = "tunnel, closed by the origin" if what == b"f" else "tunnel, reset by the origin"
        if wire := self.open_tunnel(kind, f"CONNECT {self.echo} HTTP/1.1\r\nHost: {self.echo}\r\n\r\n", " 200 "):
            got, end = bytearray(), ""
            try:
                wire.send(what)
                for piece in wire.pieces(-1):
                    got += piece
            except Ended as e:
                end = e.how
            wire.close()
            good = got == BLOCK[:100000] and end == ("closed" if what == b"f" else "reset")
            self.note(kind, f"all bytes, {end}" if good else f"{end} after {len(got)} of 100000 bytes", good, since)

    def websocket(self):
        since, kind = time.time(), "WebSocket"
        head = f"GET {self.url(self.http)} HTTP/1.1\r\nHost: {self.http}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: c29ha3NvYWtzb2Frc29hayE=\r\n\r\n"
        if wire := self.open_tunnel(kind, head, " 101 "):
            self.through(kind, wire, since, b"", half_close=False)

    def refused(self):
        kind, wire, since = "refused", self.connect(), time.time()
        host, status = random.choice(((f"{HOST}:1", 403), ("10.1.2.3", 403), ("[fe80::1]", 403), ("denied.test", 403), (self.none, 502)))
        if random.random() < 0.5:
            answer = self.ask(wire, "GET", host, {})
            good = answer[0] == status and answer[3] == "whole"
            self.note(kind, f"GET: {status}" if good else f"GET {host}: " + self.describe(*answer), good, since)
            if good and answer[1].get("connection") != "close":  # the connection must be as good as new
                self.check_get("GET, after a refusal", self.ask(wire, "GET", self.http, {"size": 500}), 500, since, False)
        else:
            host += "" if host.startswith(HOST) else ":443"
            wire.send(f"CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            answer = self.answer(wire)
            good = answer[0] == status and answer[3] == "whole"
            self.note(kind, f"CONNECT: {status}" if good else f"CONNECT {host}: " + self.describe(*answer), good, since)
        wire.close()

    def malformed(self):
        kind, since, wire, url = "malformed", time.time(), self.connect(), self.url(self.http)
        good_head = f"GET {url} HTTP/1.1\r\nHost: {self.http}\r\n"
        text, want = random.choice((
            ("hello\r\n\r\n", 400), ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", 400), (good_head + "A b: c\r\n\r\n", 400), (good_head + "A: b\nC: d\r\n\r\n", 400),
            (good_head + "Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400), (good_head + "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
            (good_head + "A: b\r\n c\r\n\r\n", 400), (good_head + "Transfer-Encoding: gzip\r\n\r\n", 400), (good_head + "A: " + "b" * 70000 + "\r\n\r\n", 431),
            ("GET http://" + "a" * 70000 + "/ HTTP/1.1\r\n\r\n", 414), (good_head + "A: b\r\n" * 300 + "\r\n", 431), ("\x16\x03\x01\x02\x00\x01\x00" * 20, 400),
            (f"POST {url} HTTP/1.1\r\nHost: {self.http}\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello", 400), (f"CONNECT {self.http}/ HTTP/1.1\r\nHost: {self.http}\r\n\r\n", 400),
            (f"GET {url} HTTP/3.7\r\nHost: {self.http}\r\n\r\n", 400), ("GET http://127.0.0.1:99999/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ))  # fmt: skip
        try:
            wire.send(text.encode("latin-1"))
        except Ended:
            pass
        answer = self.answer(wire)
        good = (answer[0], answer[3]) == (want, "whole")
        if good:  # what follows must not be read as a request
            try:
                wire.more()
                good, want = False, f"{want}, then more"
            except Ended as e:
                if e.how == "hang":
                    good, want = False, f"{want}, then a hang"
        self.note(kind, str(want) if good or "then" in str(want) else f"{text[:60]!r}…: {self.describe(*answer)}", good, since)
        wire.close()

    def vanish(self):
        wire, way = self.connect(), random.choice(("in the head", "in the body", "before the answer", "in the answer", "while dialling", "at once"))
        url, end = self.url(self.http), random.choice((wire.close, lambda: reset(wire.sock)))
        try:
            if way == "in the head":
                wire.send(f"GET {url} HTTP/1.1\r\nHo".encode())
            elif way == "in the body":
                wire.send(f"POST {url} HTTP/1.1\r\nHost: {self.http}\r\nContent-Length: 100000\r\n\r\n".encode() + bytes(random.randint(0, 60000)))
            elif way == "before the answer":
                wire.send(f"GET {self.url(self.http, size=100000, pause=1)} HTTP/1.1\r\nHost: {self.http}\r\n\r\n".encode())
            elif way == "in the answer":
                wire.send(f"GET {self.url(self.http, size=len(BLOCK))} HTTP/1.1\r\nHost: {self.http}\r\n\r\n".encode())
                for _ in range(random.randint(1, 20)):
                    wire.more(65536)
            elif way == "while dialling":
                wire.send(f"CONNECT {self.echo} HTTP/1.1\r\nHost: {self.echo}\r\n\r\n".encode())
            time.sleep(random.choice((0, 0, 0.01, 0.2)))
            end()
            self.note("vanishing client", way, True)
        except Ended as e:
            self.note("vanishing client", f"{way}: {e.how}", False)

    def run(self):
        def again(do, pause):
            while time.time() < self.until:
                try:
                    do()
                except Ended as e:
                    self.note(do.__name__, f"in sending: {e.how}", False)
                except OSError as e:
                    self.note(do.__name__, f"no connection: {e}", False)
                time.sleep(random.random() * 2 * pause)

        # Function, threads, mean pause between two of a thread in seconds
        plan = (
            (self.kept, 6, 0), (self.new, 4, 0.01), (self.pipelined, 1, 0.1), (self.download, 1, 0.15), (self.post, 3, 0.05), (self.post_faulty, 1, 0.1),
            (self.get_faulty, 4, 0.05), (self.tunnel, 3, 0.05), (self.tunnel_ended, 1, 0.1), (self.websocket, 1, 0.1), (self.refused, 1, 0.05),
            (self.malformed, 1, 0.05), (self.stalled, 2, 0.2), (self.vanish, 2, 0.05),
        )  # fmt: skip
        threads = [threading.Thread(target=again, args=(do, pause), daemon=True) for do, n, pause in plan for _ in range(n)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(max(0, self.until - time.time()) + 3 * HANG)
            if t.is_alive():
                self.note("load", "a thread did not end", False)
        print("| what | outcome | times |")
        print("|---|---|---:|")
        for (kind, outcome, good), n in sorted(self.sums.items(), key=lambda item: (item[0][0], not item[0][2], item[0][1])):
            print(f"| {kind} | {'' if good else '**unexpected:** '}{outcome.replace('|', '/')[:160]} | {n} |")
        print()
        print("Slowest, seconds: " + ", ".join(f"{kind} {worst:.1f}" for kind, worst in sorted(self.worst.items())))


def main():
    if sys.argv[1:] == ["origin"]:
        origin()
    elif sys.argv[1:2] == ["load"] and len(sys.argv) == 9:
        proxy, http, faulty, echo_port, none_port, secs = (int(a) for a in sys.argv[2:8])
        with open(sys.argv[8], "w", encoding="utf-8") as failures:
            Load(proxy, http, faulty, none_port, echo_port, time.time() + secs, failures).run()
    else:
        sys.exit(__doc__)


main()
