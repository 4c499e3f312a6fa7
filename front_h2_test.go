package main

import (
	"bufio"
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
	pemfile "encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

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
	t      *testing.T
	br     *bufio.Reader
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
	return &tlsPeer{conn, socket, t, bufio.NewReader(conn)}
}

func (c *tlsPeer) send(format string, args ...any) {
	c.t.Helper()
	if len(args) > 0 {
		format = fmt.Sprintf(format, args...)
	}
	if _, err := io.WriteString(c.Conn, format); err != nil {
		c.t.Fatalf("send: %v", err)
	}
}

func (c *tlsPeer) wants(want string) {
	c.t.Helper()
	got := make([]byte, len(want))
	n, err := io.ReadFull(c.br, got)
	if string(got[:n]) != want {
		c.t.Fatalf("got  %q (%v)\nwant %q", got[:n], err, want)
	}
}

func (c *tlsPeer) response(method string) (*http.Response, string) {
	c.t.Helper()
	resp, err := http.ReadResponse(c.br, &http.Request{Method: method})
	if err != nil {
		c.t.Fatalf("response: %v", err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatalf("response body: %v after %q", err, body)
	}
	return resp, string(body)
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
		eventually(t, "goroutines to end", func() bool { g, _ := used(); return g <= goroutines+5 })
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
		if n := p.metric(t, "sluice_tunnels"); n != 0 {
			t.Errorf("%v tunnels are left", n)
		}
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
	if n := s.panics.Load(); n != 3 || s.limits.tunnels.used[struct{}{}] != 0 || s.limits.streams.Load() != 0 {
		t.Errorf("%d panics, %d tunnels and %d streams are counted", n, s.limits.tunnels.used[struct{}{}], s.limits.streams.Load())
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
