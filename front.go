// What speaks TLS, HTTP/2 and HTTP/3 to clients. The first bytes of a connection tell which: TLS, HTTP/2's preface, or HTTP/1. Over TLS
// the loop of client.serve runs as it does in plain. HTTP/2 and 3 are those of net/http and quic-go; a request of theirs, a stream,
// becomes an exchange by being written as the head of an HTTP/1.1 message and read by the parser that reads all others, and its answer
// is taken back from what the exchange writes. So policy, pool, limits, timeouts, records and metrics are the same for all versions.
//
// Contents: First bytes · TLS · Streams · Tunnels through buffers · UDP (RFC 9298) · QUIC.
package main

import (
	"bytes"
	"cmp"
	"context"
	crand "crypto/rand"
	"crypto/sha1"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/textproto"
	"net/url"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/quic-go/quic-go/quicvarint"
	"golang.org/x/time/rate"
)

// stream is what a wire reads and writes: a socket, TLS over one, or a stream of HTTP/2 or 3.
type stream interface {
	io.ReadWriteCloser
	syscall.Conn
	CloseRead() error
	CloseWrite() error
	SetLinger(seconds int) error
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
}

// front is what a server has for it.
type front struct {
	identity *identity // nil = no certificate: TLS is not spoken
	h2       *http.Server
	handed   chan net.Conn // on their way to h2
	closed   chan struct{} // closed when h2 takes no more
	h3       *http3.Server
	carriers sync.Map // the *client of a *quic.Conn, from when that is served
	udp      []*quic.Transport
}

// openFront begins to serve HTTP/2 and 3. Its listeners for TCP are the server's.
func (s *server) openFront(ctx context.Context) error {
	f, cfg := &s.front, s.cfg
	if cfg.TLSCert != "" {
		f.identity = &identity{pem: cfg.pem(), vars: s.vars, log: s.log.process}
		f.identity.current, _ = newTLS(f.identity.pem) // was found good when the configuration was checked
		f.identity.stamp = f.identity.stamps()
	}
	quiet := slog.NewLogLogger(s.log.process.Handler(), slog.LevelDebug) // of clients that break the protocol
	most := 2 * int(cfg.MaxHeader)                                       // what is too large but not by much gets an answer that says so, and a record
	f.handed, f.closed = make(chan net.Conn), make(chan struct{})
	f.h2 = &http.Server{Handler: http.HandlerFunc(s.serveStream), ErrorLog: quiet, MaxHeaderBytes: most, IdleTimeout: cfg.IdleTimeout,
		DisableGeneralOptionsHandler: true, Protocols: new(http.Protocols), ConnContext: carrierOf, HTTP2: &http.HTTP2Config{MaxConcurrentStreams: s.streamsEach(), MaxReceiveBufferPerStream: s.streamWindow(),
			MaxReceiveBufferPerConnection: s.window(), MaxReadFrameSize: 16 << 10 /* a connection keeps the largest */}}
	f.h2.Protocols.SetHTTP2(true)
	f.h2.Protocols.SetUnencryptedHTTP2(true)
	s.run(&s.behind, func() { f.h2.Serve(handover{f, new(sync.Once)}) })
	if !cfg.HTTP3 {
		return nil
	}
	f.h3 = &http3.Server{Handler: http.HandlerFunc(s.serveStream), EnableDatagrams: true, MaxHeaderBytes: most, // quicConn knows when it is idle
		Logger: slog.New(slog.DiscardHandler), ConnContext: func(ctx context.Context, conn *quic.Conn) context.Context {
			c, _ := f.carriers.Load(conn)
			return context.WithValue(ctx, carrier{}, c)
		}}
	for _, addr := range s.own {
		if err := s.openQUIC(ctx, addr); err != nil {
			return err
		}
	}
	return nil
}

// maxStreams is how many streams a connection may have open.
const maxStreams = 250

// streamsEach is that number where descriptors or memory are enough for few: net/http makes much of each before it is asked for.
func (s *server) streamsEach() int {
	if s.limits.most == 0 {
		return maxStreams
	}
	return int(max(16, min(maxStreams, s.limits.most/32)))
}

// window is how many bytes of requests a connection may have on the way that their origins have not taken: they are held in memory. A
// stream may have a sixteenth, so that those of origins which take nothing leave something to the others.
func (s *server) window() int {
	return int(max(64<<10, min(2<<20, debug.SetMemoryLimit(-1)/1024)))
}

func (s *server) streamWindow() int { return max(32<<10, s.window()/16) }

// drain tells clients that their connections take no more streams (GOAWAY); those that are open go on.
func (f *front) drain() {
	go f.h2.Shutdown(context.Background()) // returns when the connections have ended
	if f.h3 != nil {
		go f.h3.Shutdown(context.Background())
	}
	for _, c := range f.carriers.Range {
		c.(*client).tcp.(*quicConn).hurry()
	}
}

func (f *front) close() {
	if f.h2 == nil {
		return
	}
	f.h2.Close()
	if f.h3 != nil {
		f.h3.Close()
	}
	for _, t := range f.udp {
		t.Close()
		t.Conn.Close()
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// First bytes

const (
	tlsRecord = 0x16                               // the type of a handshake record (RFC 8446, 5.1): how TLS begins
	preface   = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" // how HTTP/2 begins (RFC 9113, 3.4)
)

// speaksOther reports whether a new connection speaks something else than HTTP/1 in plain, or may, when only the front of the
// preface is here.
func (c *client) speaksOther() bool {
	b := c.unused()
	if len(b) == 0 {
		return false
	}
	n := min(len(b), len(preface))
	other := b[0] == tlsRecord && c.srv.front.identity != nil || c.srv.cfg.HTTP2 && string(b[:n]) == preface[:n]
	c.settled = !other
	return other
}

// settle has a new connection served by what it speaks. It reports whether that is HTTP/1.
func (c *client) settle() (http1 bool) {
	limit := c.srv.cfg.HeaderTimeout
	for c.readBy(limit); c.speaksOther(); {
		if c.unused()[0] == tlsRecord {
			return c.startTLS(limit)
		} else if c.buffered() >= len(preface) {
			c.handOver(&netConn{stream: c.tcp, c: c, early: bytes.Clone(c.unused())})
			return false
		} else if err := c.fill(); err != nil {
			x := c.newExchange()
			x.lingers, x.failure = true, x.clientFailure(err, "head", limit, "SLUICE_HEADER_TIMEOUT")
			c.finish(x)
			return false
		}
	}
	return true
}

// handOver has HTTP/2's server serve the connection, and end it.
func (c *client) handOver(conn net.Conn) {
	c.drop()
	if f := c.carry(); f != nil {
		c.over = true
		c.newExchange().conclude(f)
		return
	}
	c.over, c.detached = true, true
	c.srv.watcher.remove(&c.watch)
	conn.SetDeadline(time.Time{})
	if t, ok := conn.(*tls.Conn); ok {
		t.NetConn().(*netConn).gather()
	} else {
		conn.(*netConn).gather()
	}
	select {
	case c.srv.front.handed <- conn:
	case <-c.srv.front.closed:
		conn.Close()
	}
}

// carrierCost is what a connection of HTTP/2 or 3 takes besides its streams, in connections: the buffers of net/http and netConn.
const carrierCost = 8

// carry counts a connection among those that carry streams. One in sixteen may, so that there is something left for the streams. A
// failure says why it must not, to nobody: an answer would have to be one of HTTP/2.
func (c *client) carry() *failure {
	l := &c.srv.limits
	if n := l.carriers.Add(1); l.most > 0 && n > max(1, l.most/16) {
		l.carriers.Add(-1)
		return fail(0, tokenLimit, "%d connections of HTTP/2 and 3 are open, as many as descriptors and memory are enough for (SLUICE_NOFILE, SLUICE_MEMORY_LIMIT)", n-1)
	}
	c.carries = true
	return nil
}

// units is what is open, in connections.
func (s *server) units() int64 {
	return s.metrics.clients.Load() + s.limits.streams.Load() + (carrierCost-1)*s.limits.carriers.Load()
}

// handover is the listener of HTTP/2's server.
type handover struct {
	*front
	once *sync.Once
}

func (l handover) Accept() (net.Conn, error) {
	select {
	case conn := <-l.handed:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l handover) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l handover) Addr() net.Addr { return &net.TCPAddr{} }

// netConn is a client's socket for libraries. early was read before they ask for it.
//
// What HTTP/2's server writes is gathered while other goroutines run that may have more: it writes each frame on its own, and a system
// call for each would be a third of what a stream costs.
type netConn struct {
	stream
	c     *client
	early []byte
	ahead [512]byte // net/http asks for the nine bytes that a frame begins with, which are not worth a system call
	once  sync.Once

	gathers bool       // HTTP/2's server has it
	mu      sync.Mutex // guards what follows
	room    sync.Cond
	waiting []byte // to be sent; in a buffer of gathered, nil = none
	sending bool   // send runs
	closing bool   // the connection ends when all is sent
	err     error
}

// gatherSize is how much may wait to be sent.
const gatherSize = 32 << 10

var gathered = sync.Pool{New: func() any { return new([gatherSize]byte) }}

func (n *netConn) Read(p []byte) (int, error) {
	if len(n.early) == 0 {
		if n.gathers && n.c.srv.limits.full.Load() { // heads that net/http reads become garbage faster than half a CPU collects
			time.Sleep(50 * time.Millisecond)
		}
		if len(p) >= len(n.ahead) {
			return n.stream.Read(p)
		}
		k, err := n.stream.Read(n.ahead[:])
		if k <= 0 {
			return k, err
		}
		n.early = n.ahead[:k] // an error comes again
	}
	k := copy(p, n.early)
	n.early = n.early[k:]
	return k, nil
}

// gather has what is written from now on gathered.
func (n *netConn) gather() { n.room.L, n.gathers = &n.mu, true }

func (n *netConn) Write(p []byte) (size int, err error) {
	if !n.gathers {
		return n.stream.Write(p)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for n.err == nil && !n.closing {
		if n.waiting == nil {
			n.waiting = gathered.Get().(*[gatherSize]byte)[:0]
		}
		k := min(len(p)-size, cap(n.waiting)-len(n.waiting))
		n.waiting = append(n.waiting, p[size:size+k]...)
		if !n.sending {
			n.sending = true
			go n.send()
		}
		if size += k; size == len(p) {
			return size, nil
		}
		n.room.Wait()
	}
	return size, cmp.Or(n.err, net.ErrClosed)
}

// send sends what was gathered, until there is no more.
func (n *netConn) send() {
	for {
		runtime.Gosched() // to who may have more
		n.mu.Lock()
		if len(n.waiting) == 0 {
			break
		}
		p := n.waiting
		n.waiting = nil
		n.room.Broadcast()
		n.mu.Unlock()
		err := n.sendAll(p)
		gathered.Put((*[gatherSize]byte)(p[:gatherSize]))
		if err != nil {
			n.stream.Close() // which who reads finds
			n.mu.Lock()
			n.err = err
			break
		}
	}
	if n.waiting != nil {
		gathered.Put((*[gatherSize]byte)(n.waiting[:gatherSize]))
		n.waiting = nil
	}
	n.sending = false
	n.room.Broadcast()
	closing := n.closing
	n.mu.Unlock()
	if closing {
		n.once.Do(n.c.end)
	}
}

// sendAll sends p, unless the client takes nothing for too long.
func (n *netConn) sendAll(p []byte) error {
	for begun := time.Now(); ; {
		n.stream.SetWriteDeadline(deadline(time.Second))
		k, err := n.stream.Write(p)
		if p = p[max(k, 0):]; k > 0 {
			begun = time.Now()
		}
		if err == nil || !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		limit := cmp.Or(n.c.srv.cfg.BodyTimeout, never)
		n.mu.Lock()
		if n.closing || n.c.srv.limits.full.Load() { // those whose answers are not taken hold much of what is short
			limit = time.Second
		}
		n.mu.Unlock()
		if time.Since(begun) >= limit {
			return err
		}
	}
}

// Close is called where the library owns the client. What is being sent has a second.
func (n *netConn) Close() error {
	n.mu.Lock()
	n.closing = true
	sending := n.sending
	if sending {
		n.stream.SetWriteDeadline(deadline(time.Second))
		n.room.Broadcast()
	}
	n.mu.Unlock()
	if !sending {
		n.once.Do(n.c.end)
	}
	return nil
}

// SetWriteDeadline is no need where sendAll sets them.
func (n *netConn) SetWriteDeadline(t time.Time) error {
	if n.gathers {
		return nil
	}
	return n.stream.SetWriteDeadline(t)
}

func (n *netConn) LocalAddr() net.Addr { return &net.TCPAddr{} }
func (n *netConn) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(n.c.addr, 0))
}
func (n *netConn) SetDeadline(t time.Time) error {
	return errors.Join(n.SetReadDeadline(t), n.SetWriteDeadline(t))
}

// ---------------------------------------------------------------------------------------------------------------------
// TLS

// pem is what an identity is made of.
type pem struct {
	cert, key, clientCA string
	http2               bool
}

func (c *config) pem() pem { return pem{c.TLSCert, c.TLSKey, c.TLSClientCA, c.HTTP2} }

// newTLS makes what TLS needs, nil where there is no certificate.
func newTLS(p pem) (*tls.Config, error) {
	switch {
	case p.cert == "" && p.key == "" && p.clientCA == "":
		return nil, nil
	case p.cert == "" || p.key == "":
		return nil, errors.New("SLUICE_TLS_CERT and SLUICE_TLS_KEY go together, and SLUICE_TLS_CLIENT_CA needs both")
	}
	pair, err := tls.X509KeyPair([]byte(p.cert), []byte(p.key))
	if err != nil {
		return nil, fmt.Errorf("with SLUICE_TLS_KEY: %w", err)
	}
	t := &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2", "http/1.1"}}
	if !p.http2 {
		t.NextProtos = t.NextProtos[1:]
	}
	if p.clientCA != "" {
		t.ClientCAs, t.ClientAuth = x509.NewCertPool(), tls.RequireAndVerifyClientCert
		if !t.ClientCAs.AppendCertsFromPEM([]byte(p.clientCA)) {
			return nil, errors.New("SLUICE_TLS_CLIENT_CA holds no certificate in PEM")
		}
	}
	return t, nil
}

// identity is the certificate in force. Files it came from are looked at when a client comes, at most once a second.
type identity struct {
	vars []variable
	log  *slog.Logger

	mu      sync.Mutex // guards what follows
	pem     pem
	current *tls.Config // which holds the keys of session tickets: it stays while the files do
	checked time.Time
	stamp   string // of the files that current, or the last complaint, was made of
}

// config is for a listener that takes one for good.
func (i *identity) config() *tls.Config {
	return &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return i.inForce(), nil }}
}

func (i *identity) inForce() *tls.Config {
	i.mu.Lock()
	defer i.mu.Unlock()
	if time.Since(i.checked) < time.Second {
		return i.current
	}
	i.checked = time.Now()
	stamp := i.stamps()
	if stamp == i.stamp {
		return i.current
	}
	i.stamp = stamp
	if fresh, err := i.read(); err != nil {
		i.log.Warn("certificate not renewed: the one before stays in force", logMessage, err.Error())
	} else {
		i.current = fresh
		i.log.Info("certificate renewed")
	}
	return i.current
}

// files calls visit for what came from a file.
func (i *identity) files(visit func(path string, text *string)) {
	for _, v := range i.vars {
		text := map[string]*string{"TLS_CERT": &i.pem.cert, "TLS_KEY": &i.pem.key, "TLS_CLIENT_CA": &i.pem.clientCA}[v.name]
		if text != nil && v.origin != "environment" && v.origin != "default" {
			visit(v.origin, text)
		}
	}
}

// stamps changes when one of the files does.
func (i *identity) stamps() (stamps string) {
	i.files(func(path string, _ *string) {
		if info, err := os.Stat(path); err == nil {
			stamps += fmt.Sprintln(info.ModTime().UnixNano(), info.Size())
		}
	})
	return stamps
}

func (i *identity) read() (t *tls.Config, err error) {
	i.files(func(path string, text *string) {
		b, failed := os.ReadFile(path)
		if len(bytes.TrimSpace(b)) == 0 && failed == nil {
			failed = fmt.Errorf("%s is empty", path)
		}
		*text, err = string(b), cmp.Or(err, failed)
	})
	if err != nil {
		return nil, err
	}
	return newTLS(i.pem)
}

// startTLS has a connection that begins with TLS shake hands, and reports whether it speaks HTTP/1 then.
func (c *client) startTLS(limit time.Duration) (http1 bool) {
	socket := &netConn{stream: c.tcp, c: c, early: bytes.Clone(c.unused())}
	conn := tls.Server(socket, c.srv.front.identity.inForce()) // itself: tickets are sealed with keys that it holds
	c.drop()
	socket.SetDeadline(deadline(limit))
	if err := conn.Handshake(); err != nil {
		x := c.newExchange()
		x.failure = fail(0, tokenRequest, "no TLS").because(err)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			x.failure = fail(0, tokenRequest, "no TLS within %v (SLUICE_HEADER_TIMEOUT)", limit)
		}
		c.finish(x)
		return false
	}
	state := conn.ConnectionState()
	c.name, c.proven = subject(state.PeerCertificates), true
	if state.NegotiatedProtocol == "h2" {
		c.handOver(conn)
		return false
	}
	c.mu.Lock() // the drain may sever it meanwhile
	c.tcp, c.coded, c.settled = &secured{stream: c.tcp, tls: conn}, true, true
	c.mu.Unlock()
	return true
}

// subject is the name in a client's certificate: the common name, or else the first alternative name.
func subject(chain []*x509.Certificate) string {
	if len(chain) == 0 {
		return ""
	}
	leaf := chain[0]
	names := append([]string{leaf.Subject.CommonName}, append(leaf.DNSNames, leaf.EmailAddresses...)...)
	for _, u := range leaf.URIs {
		names = append(names, u.String())
	}
	for _, a := range leaf.IPAddresses {
		names = append(names, a.String())
	}
	return cmp.Or(names...)
}

// secured is TLS over a socket.
type secured struct {
	stream
	tls *tls.Conn
	cut atomic.Bool // the end is not to look like a good one
}

func (s *secured) Read(p []byte) (int, error)  { return s.tls.Read(p) }
func (s *secured) Write(p []byte) (int, error) { return s.tls.Write(p) }

// CloseWrite tells the client that this was all (RFC 8446, 6.1).
func (s *secured) CloseWrite() error {
	if s.cut.Load() {
		return net.ErrClosed
	}
	return errors.Join(s.tls.CloseWrite(), s.stream.CloseWrite())
}

func (s *secured) SetLinger(seconds int) error {
	s.cut.Store(true)
	return s.stream.SetLinger(seconds)
}

// writeCoded sends pieces through what is no plain socket, as one where they are small.
func (w *wire) writeCoded(limit time.Duration, a, b, c []byte) error {
	w.tcp.SetWriteDeadline(deadline(limit))
	if len(a)+len(b)+len(c) <= bufferSize && len(b)+len(c) > 0 {
		p := w.srv.buffers.Get().(*[bufferSize]byte)
		defer w.srv.buffers.Put(p)
		a, b, c = append(append(append(p[:0], a...), b...), c...), nil, nil
	}
	for _, piece := range [][]byte{a, b, c} {
		if len(piece) > 0 {
			if _, err := w.tcp.Write(piece); err != nil {
				return err
			}
		}
	}
	return nil
}

// awaitCoded waits for a request through what is no plain socket.
func (c *client) awaitCoded() (more bool) {
	if c.buffered() > 0 {
		return true
	}
	c.drop()
	c.readBy(c.srv.cfg.IdleTimeout)
	c.idle.Store(true)
	if c.srv.closing.Load() || c.fill() != nil {
		return false
	}
	c.idle.Store(false)
	return true
}

// ---------------------------------------------------------------------------------------------------------------------
// Streams

// carrier is the key of a context for the *client whose connection a stream came on.
type carrier struct{}

func carrierOf(ctx context.Context, conn net.Conn) context.Context {
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	return context.WithValue(ctx, carrier{}, conn.(*netConn).c)
}

// serveStream serves a request of HTTP/2 or 3.
func (s *server) serveStream(w http.ResponseWriter, r *http.Request) {
	conn := r.Context().Value(carrier{}).(*client)
	if !conn.hold() {
		panic(http.ErrAbortHandler) // it has ended
	}
	defer conn.release()
	m := &muxed{w: w, r: r, control: http.NewResponseController(w), limit: s.cfg.BodyTimeout, version: strconv.Itoa(r.ProtoMajor), protocol: r.Header.Get(":protocol")}
	if r.ProtoMajor == 3 && r.Method == "CONNECT" && r.Proto != "HTTP/3.0" {
		m.protocol = r.Proto
	}
	c := &client{addr: conn.addr, site: conn.site, name: conn.name, proven: conn.proven, luck: conn.luck, conn: conn, settled: true}
	c.attach(s, m)
	if q, ok := conn.tcp.(*quicConn); ok {
		q.busy(1)
		defer q.busy(-1)
	}
	s.limits.streams.Add(1)
	context.AfterFunc(r.Context(), c.lose) // which comes when the stream has ended: its answer may wait here after serveOne
	whole := c.serveOne(m)
	if whole && m.h3 == nil && m.limit > 0 {
		m.control.SetWriteDeadline(time.Now().Add(m.limit)) // what is held back is sent when the handler has returned
	}
	m.mu.Lock()
	m.over = true // c.lose and timers are to come
	m.mu.Unlock()
	if !whole {
		m.abort()
	} else if m.h3 != nil {
		m.h3.CancelRead(quic.StreamErrorCode(http3.ErrCodeNoError))
		m.h3.Close()
	}
}

// hold has the drain wait for a stream, too: its record is written when the connection has ended. false: that has.
func (c *client) hold() bool {
	for n := c.held.Load(); n > 0; n = c.held.Load() {
		if c.held.CompareAndSwap(n, n+1) {
			return true
		}
	}
	return false
}

func (c *client) release() {
	if c.held.Add(-1) == 0 {
		c.srv.serving.Done()
	}
}

// received is the version of HTTP that a head came with.
func (x *exchange) received(h *head) string {
	if h == &x.req && x.c.conn != nil {
		return x.c.tcp.(*muxed).version
	} else if h.minor == 0 {
		return "1.0"
	}
	return "1.1"
}

// lose ends what a stream does that its client has given up, or that went down with its connection.
func (c *client) lose() {
	c.srv.limits.streams.Add(-1)
	m := c.tcp.(*muxed)
	m.mu.Lock()
	over := m.over || m.finished.Load()
	m.mu.Unlock()
	if !over {
		c.sever(c.severedBy())
	}
}

// severedBy is why a tunnel ends before its time: the drain has cut the connection, or else it is broken.
func (c *client) severedBy() string {
	conn := cmp.Or(c.conn, c)
	conn.mu.Lock()
	defer conn.mu.Unlock()
	if conn.severed {
		return "drain"
	}
	return "connection_error"
}

// serveOne serves the one exchange of a stream, and reports whether that came to a good end.
func (c *client) serveOne(m *muxed) (whole bool) {
	parked := false
	defer c.leave(&parked)
	x := c.newExchange()
	if open, most := c.srv.units(), c.srv.limits.most; most > 0 && open > most {
		x.failure = fail(503, tokenLimit, "%d connections and streams are open, as many as descriptors and memory are enough for (SLUICE_NOFILE, SLUICE_MEMORY_LIMIT)", most)
		if open > most+most/4 {
			x.failure.status = 0 // answers that nobody takes would wait for ever
		}
		clear(m.r.Header)
	} else if head, f := m.head(c.srv); f != nil {
		x.failure = f
	} else {
		c.load(head)
		x.failure = x.readRequest()
	}
	x.udp = m.protocol == "connect-udp"
	if x.serve(); c.detached {
		return !m.cut.Load()
	}
	if whole = m.begun && !x.broken && !m.cut.Load(); whole {
		m.setTrailers(x.respBody.trailer)
	}
	c.under = nil
	c.srv.exchanges.Put(x)
	return whole
}

// load puts b where it would be if it had been read, or takes it over where it is large.
func (w *wire) load(b []byte) {
	if len(b) > bufferSize {
		w.srv.limits.large.Add(1)
		w.buf, w.w = b, len(b)
		return
	}
	for len(b) > 0 {
		w.makeRoom()
		n := copy(w.buf[w.w:], b)
		w.w, b = w.w+n, b[n:]
	}
}

// muxed is a stream as the wire of an exchange. What is read from it is the body of an HTTP/1.1 message, chunked where its length is
// not known; what is written to it is heads as HTTP/1.1 has them, and the body behind the last as it is.
type muxed struct {
	w        http.ResponseWriter
	r        *http.Request
	control  *http.ResponseController
	version  string // "2" or "3"
	protocol string // of extended CONNECT (RFC 8441, RFC 9220)

	chunked bool   // the body is to be read in chunks
	ended   bool   // all of it was read
	first   []byte // of the body, not in a chunk yet
	early   []byte // the next bytes that are read
	key     string // Sec-WebSocket-Key, of this hop's own

	begun   bool // the final head was written
	tunnel  bool // bytes are not held back
	h3      *http3.Stream
	limit   time.Duration // for a write; 0 = any time
	held    int           // bytes written, up to heldBack
	alarm   *time.Timer   // ends a write
	writing atomic.Bool
	closed  atomic.Bool
	cut     atomic.Bool // the end is not to look like a good one

	mu       sync.Mutex
	over     bool        // the handler returns: w must not be used any more; guarded by mu
	finished atomic.Bool // all is sent: the request's context ends with that, the client's side may go on
}

// head writes the request as the head of an HTTP/1.1 message. Since that is what is parsed, a line more than those meant would be a
// smuggled one.
func (m *muxed) head(s *server) ([]byte, *failure) {
	r, method, target := m.r, m.r.Method, m.r.Host
	switch path := r.RequestURI; {
	case (method != "CONNECT" || m.protocol != "") && !strings.HasPrefix(path, "/") && (path != "*" || method != "OPTIONS"): // RFC 9113, 8.3.1
		return nil, fail(400, tokenRequest, ":path does not begin with a slash") // it would go on with the host's name
	case m.protocol == "connect-udp":
		var ok bool
		if target, ok = udpTarget(r.RequestURI); !ok {
			return nil, fail(400, tokenRequest, "a UDP tunnel's path is /.well-known/masque/udp/HOST/PORT/ (RFC 9298)")
		}
	case m.protocol == "websocket":
		method, target = "GET", "http://"+r.Host+r.RequestURI
	case m.protocol != "":
		return nil, fail(501, tokenRequest, "the protocol of an extended CONNECT is neither websocket nor connect-udp")
	case method == "CONNECT":
	case r.RequestURI == "*":
		target = "http://" + r.Host
	default:
		target = "http://" + r.Host + r.RequestURI
	}
	size, fields := len(target)+len(r.Host), 0
	for name, values := range r.Header {
		for _, v := range values {
			size, fields = size+len(name)+len(v)+len(": \r\n"), fields+1
		}
	}
	switch {
	case size > int(s.cfg.MaxHeader): // said now, since what follows may wait
		return nil, fail(431, tokenRequest, "the head is larger than %d bytes (SLUICE_MAX_HEADER)", s.cfg.MaxHeader)
	case fields > maxFields:
		return nil, fail(431, tokenRequest, "%v", faultManyFields)
	case size > bufferSize && s.limits.noRoom():
		clear(r.Header) // the answer may have to wait
		return nil, fail(431, tokenRequest, "%v", faultNoMemory)
	}
	b := fmt.Appendf(make([]byte, 0, size+256), "%s %s HTTP/1.1\r\nHost: %s\r\n", method, target, r.Host)
	lines := 3
	for name, values := range r.Header {
		if name == ":protocol" || name == "Host" || name == "Sec-Websocket-Key" && m.protocol == "websocket" { // which has no meaning there
			continue
		}
		for _, v := range values {
			b = append(append(append(append(b, name...), ": "...), v...), "\r\n"...)
			lines++
		}
	}
	if m.protocol == "websocket" { // RFC 8441, 5.1: what HTTP/1.1 has besides
		m.key = base64.StdEncoding.EncodeToString(binary16())
		b = fmt.Appendf(b, "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: %s\r\n", m.key)
		lines += 3
	} else if method != "CONNECT" {
		var f *failure
		if m.chunked, f = m.isBodyOpen(s.cfg.HeaderTimeout); f != nil {
			return nil, f
		} else if m.chunked {
			b = append(b, "Transfer-Encoding: chunked\r\n"...)
			lines++
		}
	}
	if b = append(b, "\r\n"...); bytes.Count(b, []byte{'\n'}) != lines || len(r.Header["Transfer-Encoding"])+len(r.Header["Connection"])+len(r.Header["Upgrade"]) > 0 || len(r.Header["Host"]) > 1 {
		return nil, fail(400, tokenRequest, "a field is not one of HTTP/%s", m.version)
	}
	clear(r.Header) // b has it
	return b, nil
}

func binary16() []byte {
	b := make([]byte, 16)
	crand.Read(b) // never fails
	return b
}

// isBodyOpen reports whether there is a body whose length is not told. Of a method that has none as a rule that is known when the
// first byte of it has come, or its end; until then the request is not whole enough to be sent on.
func (m *muxed) isBodyOpen(limit time.Duration) (open bool, f *failure) {
	if _, told := m.r.Header["Content-Length"]; told || m.r.Body == nil || m.r.Body == http.NoBody || m.r.ContentLength == 0 && m.version == "2" {
		return false, nil
	}
	switch m.r.Method {
	case "GET", "HEAD", "OPTIONS", "TRACE", "DELETE":
	default:
		return true, nil
	}
	m.SetReadDeadline(deadline(limit))
	var first [1]byte
	n, err := m.r.Body.Read(first[:])
	m.SetReadDeadline(time.Time{})
	m.first, m.ended = first[:n], n == 0 && err == io.EOF
	switch {
	case n > 0 || err == nil: // nothing and no error: trailers
		return true, nil
	case m.ended:
		return false, nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return false, fail(408, tokenRequest, "the request's end did not come within %v (SLUICE_HEADER_TIMEOUT)", limit)
	}
	return false, fail(0, tokenClient, "the client left").because(err)
}

func (m *muxed) Read(p []byte) (n int, err error) {
	if !m.closed.Load() {
		n, err = m.read(p)
	}
	if n == 0 && m.closed.Load() {
		err = net.ErrClosed // not that a deadline has passed, which is taken for one that fires early
	}
	return n, err
}

func (m *muxed) read(p []byte) (n int, err error) {
	switch {
	case m.h3 != nil:
		return m.h3.Read(p)
	case m.r.Body == nil || m.ended && len(m.early) == 0:
		return 0, io.EOF
	case !m.chunked:
		if n, err = m.r.Body.Read(p); err != nil && err != io.EOF {
			return 0, err // what came with it may be all that is waited for: more than Content-Length has is malformed (RFC 9114, 4.1.2)
		}
		return n, err
	case len(m.early) == 0 && len(p) >= 64:
		return m.readChunk(p)
	case len(m.early) == 0:
		few := make([]byte, 512)
		n, err = m.readChunk(few)
		m.early = append(few[:n:n], m.early...) // which may hold the rest of trailers
	}
	n = copy(p, m.early)
	m.early = m.early[n:]
	return n, err
}

// readChunk reads a chunk, or the end of the body: what does not fit of the trailers goes to early.
func (m *muxed) readChunk(p []byte) (n int, err error) {
	const size = len("012345\r\n")
	if n, m.first = copy(p[size:], m.first), nil; n == 0 {
		n, err = m.r.Body.Read(p[size : len(p)-2])
	}
	if n > 0 {
		copy(p, fmt.Sprintf("%06x\r\n", n))
		return size + n + copy(p[size+n:], "\r\n"), nil
	} else if err != io.EOF {
		return 0, err
	}
	m.ended = true
	end := []byte("0\r\n")
	for name, values := range m.r.Trailer {
		for _, v := range values {
			end = append(append(append(append(end, name...), ": "...), v...), "\r\n"...)
		}
	}
	end = append(end, "\r\n"...)
	n = copy(p, end)
	m.early = end[n:]
	return n, nil
}

// Write takes heads, the final one and what follows it.
func (m *muxed) Write(p []byte) (int, error) {
	if m.held += len(p); m.held >= heldBack {
		m.arm()
		defer m.disarm()
	}
	if m.closed.Load() {
		return 0, net.ErrClosed
	}
	size := len(p)
	for !m.begun {
		end := bytes.Index(p, []byte("\r\n\r\n"))
		if end < 0 { // only between heads
			return size, nil
		}
		if err := m.writeHead(string(p[:end])); err != nil {
			return 0, err
		}
		p = p[end+4:]
	}
	var err error
	if m.h3 != nil {
		_, err = m.h3.Write(p)
	} else if len(p) > 0 {
		if _, err = m.w.Write(p); m.tunnel && err == nil {
			err = m.flush()
		}
	}
	if err != nil {
		return 0, err
	}
	return size, nil
}

// writeHead sends a head, without what means something to a connection of HTTP/1 alone.
func (m *muxed) writeHead(head string) error {
	line, fields, _ := strings.Cut(head, "\r\n")
	status, _ := strconv.Atoi(line[len("HTTP/1.1 "):][:3])
	h := m.w.Header()
	for line := range strings.SplitSeq(fields, "\r\n") {
		name, value, _ := strings.Cut(line, ":")
		switch name = textproto.CanonicalMIMEHeaderKey(name); name {
		case "", "Connection", "Upgrade", "Transfer-Encoding":
		default:
			h[name] = append(h[name], strings.Trim(value, " \t"))
		}
	}
	if status == 101 { // was checked by mistaken
		h.Del("Sec-WebSocket-Accept")
		status = 200
	} else if status < 200 {
		m.w.WriteHeader(status)
		clear(h)
		return nil
	}
	for _, name := range []string{"Content-Type", "Date"} { // which would be made up
		if _, there := h[name]; !there {
			h[name] = nil
		}
	}
	m.begun, m.tunnel = true, m.r.Method == "CONNECT" && status/100 == 2
	m.w.WriteHeader(status)
	if m.version == "2" {
		clear(h) // a copy is sent; what stays here is sent again as a trailer, where Trailer has its name
	}
	if !m.tunnel && (m.version == "2" || m.r.Method != "HEAD") { // to which quic-go would add a Content-Length of 0 in the end
		return nil
	}
	if err := m.flush(); err != nil {
		return err
	}
	if t, ok := m.w.(http3.HTTPStreamer); ok && m.tunnel {
		var err error
		m.h3, err = t.HTTPStream()
		return err
	}
	return nil
}

// mistaken says what makes an answer one that the client of an extended CONNECT would take for a WebSocket, and that is none.
func (m *muxed) mistaken(status int, head []byte) error {
	if m.protocol != "websocket" || status != 101 && status/100 != 2 {
		return nil
	} else if status != 101 {
		return fault("no WebSocket, for which the request asks")
	}
	digest := sha1.Sum([]byte(m.key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11")) // RFC 6455, 4.2.2
	for line := range bytes.Lines(head) {
		name, value, _ := bytes.Cut(line, []byte{':'})
		if equalFold(name, "sec-websocket-accept") && string(bytes.TrimSpace(value)) == base64.StdEncoding.EncodeToString(digest[:]) {
			return nil
		}
	}
	return fault("the 101 does not answer this hop's key")
}

// takesDatagrams reports whether the client has said that it takes datagrams of QUIC for its stream (RFC 9297, 2.1.1).
func (m *muxed) takesDatagrams() bool {
	conn, ok := m.w.(http3.Settingser)
	if !ok || m.h3 == nil {
		return false
	}
	select {
	case <-conn.ReceivedSettings():
		return conn.Settings().EnableDatagrams
	default:
		return false
	}
}

// setTrailers has the fields sent that followed a chunked body.
func (m *muxed) setTrailers(lines []byte) {
	for line := range strings.SplitSeq(string(lines), "\r\n") {
		if name, value, ok := strings.Cut(line, ":"); ok {
			m.w.Header().Add(http.TrailerPrefix+name, strings.Trim(value, " \t"))
		}
	}
}

func (m *muxed) flush() error {
	m.held = heldBack // from now on libraries hold nothing back, or not for long
	m.arm()
	defer m.disarm()
	return m.control.Flush()
}

// heldBack is how much of a response both libraries hold before they send anything: so much can be written without a wait.
const heldBack = 4 << 10

// arm sets the limit for a write that may have to wait for the client.
func (m *muxed) arm() {
	m.writing.Store(true)
	if m.limit == 0 {
	} else if m.alarm == nil {
		m.alarm = time.AfterFunc(m.limit, m.tooSlow)
	} else {
		m.alarm.Reset(m.limit)
	}
}

func (m *muxed) disarm() {
	if m.alarm != nil {
		m.alarm.Stop()
	}
	m.writing.Store(false)
}

// tooSlow ends a Write.
func (m *muxed) tooSlow() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.over {
		m.control.SetWriteDeadline(time.Unix(1, 0))
	}
}

// SetWriteDeadline takes note that a write may take any time, as in a tunnel; else every write has the same limit.
func (m *muxed) SetWriteDeadline(t time.Time) error {
	if t.IsZero() {
		m.limit = 0
	}
	return nil
}

func (m *muxed) SetReadDeadline(t time.Time) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.over {
		return net.ErrClosed
	}
	if m.closed.Load() {
		t = time.Unix(1, 0) // it stays at that
	}
	return m.control.SetReadDeadline(t)
}

func (m *muxed) SyscallConn() (syscall.RawConn, error) { return nil, errors.ErrUnsupported }

// SetLinger is asked for where the client could not tell otherwise that something is missing.
func (m *muxed) SetLinger(int) error {
	m.cut.Store(true)
	return nil
}

func (m *muxed) CloseRead() error { return m.SetReadDeadline(time.Unix(1, 0)) }

// CloseWrite ends what is sent, if that can be: a stream of net/http's ends both ways at once.
func (m *muxed) CloseWrite() error {
	if m.h3 == nil {
		return errors.ErrUnsupported
	}
	m.finished.Store(true)
	return m.h3.Close()
}

// Close ends reads and writes that are under way. The stream ends with its handler.
func (m *muxed) Close() error {
	m.closed.Store(true)
	if m.writing.Load() && m.cut.Load() {
		m.tooSlow()
	} else if m.writing.Load() { // what is sent by now, perhaps, and not known to be: ending that at once would reset the stream
		time.AfterFunc(time.Second, m.tooSlow)
	}
	return m.CloseRead()
}

// abort resets the stream.
func (m *muxed) abort() {
	if m.h3 != nil {
		m.h3.CancelRead(quic.StreamErrorCode(http3.ErrCodeConnectError))
		m.h3.CancelWrite(quic.StreamErrorCode(http3.ErrCodeConnectError))
		return
	}
	panic(http.ErrAbortHandler) // is what net/http wants for that
}

// ---------------------------------------------------------------------------------------------------------------------
// Tunnels through buffers

// relayer is a tunnel that has taken a client over.
type relayer interface{ end(reason string) }

// buffered is a tunnel that is carried by a goroutine and a buffer per direction.
type buffered struct {
	x     summary // with the client's connection, which the tunnel owns, as it does up
	up    *upstream
	since time.Time

	mu     sync.Mutex  // guards what follows
	timer  *time.Timer // runs tick
	last   time.Time   // when a byte last moved
	half   bool        // one side has closed
	reason string      // why it ended, or which side closed first
	ended  bool
}

// relayBuffered hands x, its client's connection and up over to a tunnel, until that has ended.
func (x *exchange) relayBuffered(up *upstream) {
	now := time.Now()
	t := &buffered{x: x.summary, up: up, since: now, last: now}
	t.x.peer, t.x.version, t.x.attrs = up.peer, x.received(&x.req), nil
	x.line, x.dst.key = nil, nil // t has them
	c := x.c
	c.over, c.detached, c.under = true, true, nil // the exchange goes back
	for _, end := range []stream{c.tcp, up.tcp} { // deadlines of the answer, or of an earlier request
		end.SetReadDeadline(time.Time{})
		end.SetWriteDeadline(time.Time{})
	}
	if c.track(nil, nil, t) {
		t.end(c.severedBy())
	}
	c.srv.exchanges.Put(x)
	t.mu.Lock()
	t.timer = time.AfterFunc(0, t.tick)
	t.mu.Unlock()
	var down sync.WaitGroup
	down.Go(func() { t.x.downSize = t.carry(&c.wire, &up.wire, "upstream_closed") })
	t.x.upBytes = t.carry(&up.wire, &c.wire, "client_closed")
	down.Wait()
	t.mu.Lock()
	t.ended = true
	t.timer.Stop()
	t.x.end, t.x.closed = time.Now(), t.reason
	t.mu.Unlock()
	t.x.srv.limits.tunnels.add(struct{}{}, -1)
	t.x.record(nil)
	up.close()
	c.end()
}

// carry moves bytes until src ends, which is passed on; closed is the reason then.
func (t *buffered) carry(dst, src *wire, closed string) (total int64) {
	defer src.rested()
	defer func() {
		if p := recover(); p != nil { // ends this tunnel alone
			t.x.srv.logPanic(p)
			t.end("internal_error")
		}
	}()
	var few []byte
	if src.coded {
		few = make([]byte, 512)
	}
	for flows := false; ; {
		p, err := src.next(few, flows)
		if err == io.EOF {
			first := t.note(closed)
			if dst.tcp.CloseWrite() != nil {
				t.end(first)
			}
			return total
		} else if err != nil {
			t.end(t.x.c.severedBy())
			return total
		}
		flows = len(p) == len(few) || len(p) == bufferSize
		n, err := dst.tcp.Write(p)
		t.x.srv.metrics.moved(n, dst == &t.x.c.wire)
		src.passed(n)
		if total += int64(n); err != nil {
			t.end(t.x.c.severedBy())
			return total
		}
		t.note("")
	}
}

// next waits for bytes of a tunnel. While there are none no buffer is held, but a few bytes have room, unless many were here just now.
func (w *wire) next(few []byte, flows bool) (p []byte, err error) {
	switch {
	case w.buffered() > 0:
	case !w.coded:
		err = w.ask(0, nil)
	case flows:
		err = w.fill()
	default:
		w.drop()
		for n := 0; n == 0 && err == nil; p = few[:n] {
			n, err = w.tcp.Read(few)
		}
		if len(p) > 0 {
			err = nil // comes again
		}
		return p, err
	}
	if err != nil {
		return nil, err
	}
	return w.take(math.MaxInt64), nil
}

// note takes note that bytes have moved, or that a side has closed, and tells which did first.
func (t *buffered) note(closed string) (first string) {
	t.mu.Lock()
	t.last, t.half, t.reason = time.Now(), t.half || closed != "", cmp.Or(t.reason, closed)
	first = t.reason
	t.mu.Unlock()
	if closed != "" {
		t.tick() // the other direction has less patience now
	}
	return first
}

// end ends both sides. After an error neither is to take what it got for everything.
func (t *buffered) end(reason string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.ended {
		if t.ended, t.reason = true, reason; reason == "connection_error" {
			t.up.tcp.SetLinger(0)
			t.x.c.tcp.SetLinger(0)
		}
		t.up.tcp.Close()
		t.x.c.tcp.Close()
	}
}

// tick ends a tunnel whose time is over.
func (t *buffered) tick() {
	t.mu.Lock()
	at, reason := t.x.srv.cfg.tunnelEnd(t.since, t.last, t.half)
	left := time.Until(at)
	if left > 0 && !t.ended {
		t.timer.Reset(left)
	}
	t.mu.Unlock()
	if left <= 0 {
		t.end(reason)
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// UDP (RFC 9298)

// udpTarget is the destination in the path of a request for a UDP tunnel, as RFC 9298, 2 has it by default.
func udpTarget(path string) (hostPort string, ok bool) {
	rest, begins := strings.CutPrefix(path, "/.well-known/masque/udp/")
	host, rest, _ := strings.Cut(rest, "/")
	port, end, _ := strings.Cut(rest, "/")
	host, err := url.PathUnescape(host)
	if !begins || err != nil || host == "" || port == "" || end != "" || strings.ContainsAny(host, "%/[] ") {
		return "", false
	}
	return net.JoinHostPort(host, port), true
}

// minUDPIdle is how long a UDP tunnel without a datagram stays at least (RFC 9298, 3.1: two minutes).
const minUDPIdle = 2 * time.Minute

// flow is a UDP tunnel: a socket that is connected to the one address it was asked for, so that the kernel drops what comes from others.
type flow struct {
	x     *exchange
	m     *muxed
	udp   *net.UDPConn
	since time.Time
	more  time.Duration // of patience than other tunnels have
	last  atomic.Int64  // when a datagram last passed, in ns after since
	up    atomic.Int64  // bytes to the origin
	down  atomic.Int64  // bytes to the client

	mu     sync.Mutex  // guards what follows
	timer  *time.Timer // runs tick
	reason string      // why it ended
	cancel func()      // of waits for datagrams
}

// flow serves a request for a UDP tunnel to its end.
func (x *exchange) flow() *failure {
	key := string(x.dst.key)
	if f := x.takePlace(key); f != nil {
		return f
	}
	defer x.srv.limits.hosts.add(key, -1)
	udp, f := x.openUDP()
	if f != nil {
		return f
	}
	defer udp.Close()
	x.begun = true
	if f := x.tell([]byte("HTTP/1.1 200 OK\r\nCapsule-Protocol: ?1\r\n\r\n")); f != nil {
		return f
	}
	x.status = 200
	x.srv.metrics.opened(&x.summary)
	t := &flow{x: x, m: x.c.tcp.(*muxed), udp: udp, since: time.Now(), more: max(0, minUDPIdle-x.srv.cfg.TunnelIdleTimeout)}
	t.carry()
	x.upBytes, x.respBody.size, x.closed = t.up.Load(), t.down.Load(), t.reason
	return nil
}

// openUDP resolves and judges as dialUpstream does.
func (x *exchange) openUDP() (*net.UDPConn, *failure) {
	ctx, cancel := within(x.srv.cfg.DialTimeout)
	defer cancel()
	x.c.track(nil, cancel, nil)
	defer x.c.track(nil, nil, nil)
	allowed, f := x.locate(ctx)
	if f != nil {
		return nil, f
	}
	udp, err := dialUDP(allowed)
	if err != nil {
		return nil, x.dialFailure(err)
	}
	x.peer = udpPeer(udp.RemoteAddr()).String()
	var requests *atomic.Int64
	x.first, requests = x.srv.reached.first(&x.dst)
	requests.Add(1)
	return udp, nil
}

// dialUDP connects a socket to the first address to which there is a route.
func dialUDP(addrs []netip.AddrPort) (udp *net.UDPConn, err error) {
	for _, a := range addrs {
		if udp, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(a)); err == nil {
			break
		}
	}
	return udp, err
}

// carry passes datagrams on until one end is gone, or the time is over.
func (t *flow) carry() {
	ctx, cancel := context.WithCancel(context.Background())
	t.mu.Lock()
	t.cancel, t.timer = cancel, time.AfterFunc(0, t.tick)
	t.mu.Unlock()
	if t.x.c.track(nil, nil, t) {
		t.end(t.x.c.severedBy())
	}
	var others sync.WaitGroup
	others.Go(t.fromOrigin)
	if t.m.h3 != nil {
		others.Go(func() { t.datagrams(ctx) })
	}
	t.capsules()
	others.Wait()
	t.x.c.track(nil, nil, nil)
	t.timer.Stop()
}

// end ends the tunnel; the first reason to do so stays.
func (t *flow) end(reason string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.reason == "" {
		t.reason = reason
		if reason == "connection_error" {
			t.m.SetLinger(0)
		}
		t.cancel()
		t.udp.Close()
		t.m.Close()
	}
}

// tick ends a tunnel whose time is over.
func (t *flow) tick() {
	t.mu.Lock()
	if t.reason != "" { // the exchange may serve another request by now
		t.mu.Unlock()
		return
	}
	at, reason := t.x.srv.cfg.tunnelEnd(t.since, t.since.Add(time.Duration(t.last.Load())+t.more), false)
	left := time.Until(at)
	if left > 0 {
		t.timer.Reset(left)
	}
	t.mu.Unlock()
	if left <= 0 {
		t.end(reason)
	}
}

// recovered ends this tunnel alone after a panic.
func (t *flow) recovered() {
	if p := recover(); p != nil {
		t.x.srv.logPanic(p)
		t.end("internal_error")
	}
}

// toOrigin sends an HTTP datagram on: a context ID, of which 0 = a UDP payload, and that (RFC 9298, 5). Others are dropped.
func (t *flow) toOrigin(datagram []byte) {
	id, n, err := quicvarint.Parse(datagram)
	if err != nil || id != 0 {
		return
	} else if len(datagram)-n > maxUDP {
		t.end(t.x.c.severedBy())
	} else if n, err = t.udp.Write(datagram[n:]); err == nil { // what it may refuse, such as one that is too long, is lost as datagrams are
		t.moved(n, &t.up)
	} else if errors.Is(err, syscall.ECONNREFUSED) { // that of one before, of which the reader is not told then
		t.end(t.x.c.severedBy())
	}
}

func (t *flow) moved(n int, total *atomic.Int64) {
	t.last.Store(int64(time.Since(t.since)))
	total.Add(int64(n))
	t.x.srv.metrics.moved(n, total == &t.down)
}

// datagrams takes those of QUIC.
func (t *flow) datagrams(ctx context.Context) {
	defer t.recovered()
	for {
		b, err := t.m.h3.ReceiveDatagram(ctx)
		if err != nil {
			return // the stream has ended, which capsules finds too
		}
		t.toOrigin(b)
	}
}

// capsules takes those that come in capsules (RFC 9297, 3.5), until the client ends the stream. Other capsules are skipped.
func (t *flow) capsules() {
	defer t.recovered()
	parser := http3.NewCapsuleParser(t.m)
	for {
		kind, capsule, err := parser.Next()
		if err == io.EOF {
			t.end("client_closed")
			return
		} else if err == nil && kind == capsuleDatagram && capsule.Remaining() > maxUDP+8 {
			err = errors.New("a capsule that is too long for a datagram")
		} else if err == nil && kind == capsuleDatagram {
			var b []byte
			if b, err = io.ReadAll(capsule); err == nil {
				t.toOrigin(b)
			}
		} else if err == nil {
			err = capsule.Discard()
		}
		if err != nil {
			t.end(t.x.c.severedBy())
			return
		}
	}
}

const (
	capsuleDatagram = 0     // RFC 9297, 5.4
	maxUDP          = 65527 // bytes of a payload; more ends the tunnel (RFC 9298, 5)
)

// fromOrigin passes on what comes. What is too long for the client's path is dropped, as routers do.
func (t *flow) fromOrigin() {
	defer t.recovered()
	buf := t.x.srv.buffers.Get().(*[bufferSize]byte)
	defer t.x.srv.buffers.Put(buf)
	const room = 8 // for what stands before the payload in a capsule: type, length, context ID
	for {
		n, err := t.udp.Read(buf[room:])
		if err != nil { // refused, as an ICMP message said, or closed by end
			t.end(t.x.c.severedBy())
			return
		} else if n == len(buf)-room {
			continue // there may be more of it
		}
		buf[room-1] = 0
		if t.m.takesDatagrams() {
			if err = t.m.h3.SendDatagram(buf[room-1 : room+n]); err != nil {
				continue
			}
		} else {
			head := quicvarint.Append([]byte{capsuleDatagram}, uint64(n+1))
			at := room - 1 - len(head)
			copy(buf[at:], head)
			if t.x.c.write(t.x.srv.cfg.BodyTimeout, buf[at:room+n], nil, nil) != nil { // a part may have been sent: no capsule can follow
				t.end(t.x.c.severedBy())
				return
			}
		}
		t.moved(n, &t.down)
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// QUIC

// openQUIC serves HTTP/3 on a UDP port. Where another process has it, which may be one that drains, it waits until that lets it go: if
// both had it, the kernel would give packets to either.
func (s *server) openQUIC(ctx context.Context, addr netip.AddrPort) error {
	os.Setenv("QUIC_GO_DISABLE_RECEIVE_BUFFER_WARNING", "true") // it goes to stderr
	listener, err := s.listenQUIC(addr)
	if err == nil {
		s.run(&s.accepting, func() { s.acceptQUIC(ctx, listener) })
		return nil
	} else if !errors.Is(err, syscall.EADDRINUSE) {
		return err
	}
	s.log.process.Warn("UDP port is in use: HTTP/3 waits for it", logMessage, err.Error())
	s.run(&s.accepting, func() { // the drain waits for this to have ended before it looks for clients
		for ctx.Err() == nil {
			if listener, err := s.listenQUIC(addr); err == nil {
				s.acceptQUIC(ctx, listener)
				return
			} else if !errors.Is(err, syscall.EADDRINUSE) {
				s.log.process.Error("no HTTP/3", logType, tokenInternal, logMessage, err.Error())
				return
			}
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	})
	return nil
}

func (s *server) listenQUIC(addr netip.AddrPort) (*quic.Listener, error) {
	conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr))
	if err != nil {
		return nil, err
	}
	unproven := rate.NewLimiter(100, 100) // handshakes a second that go without a proof of the address (RFC 9000, 8.1.2)
	t := &quic.Transport{Conn: conn, VerifySourceAddress: func(net.Addr) bool { return !unproven.Allow() },
		ConnContext: func(ctx context.Context, info *quic.ClientInfo) (context.Context, error) {
			if s.cfg.AllowClients.find(udpPeer(info.RemoteAddr)) == "" {
				return nil, errors.New("not allowed")
			}
			return ctx, nil
		}}
	s.front.udp = append(s.front.udp, t)
	return t.Listen(http3.ConfigureTLSConfig(s.front.identity.config()), &quic.Config{EnableDatagrams: true, HandshakeIdleTimeout: s.cfg.HeaderTimeout,
		MaxIncomingStreams: int64(s.streamsEach()), MaxIncomingUniStreams: 8, MaxIdleTimeout: time.Minute, KeepAlivePeriod: 20 * time.Second, // for tunnels; finds the dead
		InitialStreamReceiveWindow: uint64(s.streamWindow()), MaxStreamReceiveWindow: uint64(s.streamWindow()),
		InitialConnectionReceiveWindow: uint64(s.window()), MaxConnectionReceiveWindow: uint64(s.window())})
}

// acceptQUIC has connections served until ctx ends.
func (s *server) acceptQUIC(ctx context.Context, l *quic.Listener) {
	defer l.Close()
	for {
		conn, err := l.Accept(ctx)
		if err != nil {
			return
		}
		q := &quicConn{conn: conn}
		q.patience.Store(int64(cmp.Or(s.cfg.IdleTimeout, never)))
		c, f := s.newClient(q, udpPeer(conn.RemoteAddr())) // here, so that the drain knows of it
		go s.serveQUIC(conn, c, f)
	}
}

func udpPeer(a net.Addr) netip.Addr { return a.(*net.UDPAddr).AddrPort().Addr().Unmap() }

// serveQUIC serves a connection of HTTP/3.
func (s *server) serveQUIC(conn *quic.Conn, c *client, f *failure) {
	defer c.end()
	if f = cmp.Or(f, c.carry()); f != nil {
		f.status, c.rejected = 0, true // nobody has asked yet
		c.newExchange().conclude(f)
		conn.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeExcessiveLoad), f.text)
		return
	}
	q := c.tcp.(*quicConn)
	q.timer = time.AfterFunc(time.Duration(q.patience.Load()), q.tick)
	defer q.timer.Stop()
	c.name, c.proven = subject(conn.ConnectionState().TLS.PeerCertificates), true
	s.front.carriers.Store(conn, c)
	defer s.front.carriers.Delete(conn)
	s.front.h3.ServeQUICConn(conn)
}

// quicConn is a connection as the stream of a client that is not read from itself. It is closed when no request is served for a while:
// http3.Server has a time for that which stands still as soon as a stream is open, even if the head of a request never comes on it.
type quicConn struct {
	stream
	conn     *quic.Conn
	patience atomic.Int64 // in ns
	served   atomic.Int64 // requests under way
	timer    *time.Timer
}

// busy counts requests. The timer may be left running by two at a time; it is stopped by none while there is no request.
func (q *quicConn) busy(n int64) {
	switch now := q.served.Add(n); {
	case n > 0 && now == 1:
		q.timer.Stop()
	case now == 0:
		q.timer.Reset(time.Duration(q.patience.Load()))
	}
}

// hurry has the connection closed soon when it is idle: GOAWAY is on its way, but clients may stay.
func (q *quicConn) hurry() {
	const soon = 100 * time.Millisecond
	q.patience.Store(int64(soon))
	if q.served.Load() == 0 {
		q.timer.Reset(soon)
	}
}

func (q *quicConn) tick() {
	if q.served.Load() == 0 {
		q.Close()
	}
}

func (q *quicConn) SyscallConn() (syscall.RawConn, error) { return nil, errors.ErrUnsupported }
func (q *quicConn) Close() error {
	return q.conn.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeNoError), "")
}
