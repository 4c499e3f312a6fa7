package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/sha1"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	armor "encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/http/httputil"
	"net/netip"
	"net/textproto"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/quic-go/quic-go/quicvarint"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

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
	return string(armor.EncodeToMemory(&armor.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}))
}

// issue makes a certificate for 127.0.0.1, or of a client of that name.
func (a *h3Authority) issue(t testing.TB, name string) (pair tls.Certificate, cert, key string) {
	k, _ := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	c := a.sign(t, &x509.Certificate{Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{{127, 0, 0, 1}}}, k)
	der, _ := x509.MarshalECPrivateKey(k)
	cert = string(armor.EncodeToMemory(&armor.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	key = string(armor.EncodeToMemory(&armor.Block{Type: "EC PRIVATE KEY", Bytes: der}))
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
