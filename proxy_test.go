package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// The tests speak to a proxy that run() started, over real sockets on loopback: raw bytes in, the bytes that the origin
// received out. They follow the order of proxy.go's sections.

// patience bounds every wait of a test; what takes longer has failed.
const patience = 5 * time.Second

// ---------------------------------------------------------------------------------------------------------------------
// Helpers

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
func (l *logSink) records(t *testing.T) (all []map[string]any) {
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
func (l *logSink) await(t *testing.T, msg string, nth int) map[string]any {
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
func eventually(t *testing.T, what string, holds func() bool) {
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
func startProxy(t *testing.T, vars ...string) *testProxy {
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
func awaitNoLeak(t *testing.T, goroutines, files int) {
	for end := time.Now().Add(patience); runtime.NumGoroutine() > goroutines || countFiles() > files; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("leak: %d goroutines (%d before), %d descriptors (%d before)\n%s", runtime.NumGoroutine(), goroutines, countFiles(), files, stacks())
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
	t  *testing.T
	br *bufio.Reader
}

func newPeer(t *testing.T, c net.Conn) *peer {
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(2 * patience))
	return &peer{c.(*net.TCPConn), t, bufio.NewReader(c)}
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
func (p *peer) send(format string, args ...any) {
	p.t.Helper()
	if len(args) > 0 {
		format = fmt.Sprintf(format, args...)
	}
	if _, err := io.WriteString(p.TCPConn, format); err != nil {
		p.t.Fatalf("send: %v", err)
	}
}

// wants reads exactly as many bytes as want has and compares.
func (p *peer) wants(want string) {
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
func (p *peer) response(method string) (*http.Response, string) {
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
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return &testOrigin{l, t, l.Addr().String()}
}

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

// idle reports that no connection comes.
func (o *testOrigin) wantsNone() {
	o.t.Helper()
	o.Listener.(*net.TCPListener).SetDeadline(time.Now().Add(30 * time.Millisecond))
	if c, err := o.Accept(); err == nil {
		c.Close()
		o.t.Fatal("the origin was dialled")
	}
}
