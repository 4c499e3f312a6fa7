package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	encoding "encoding/pem"
	"fmt"
	"image/color"
	"image/png"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Clients as they are installed, on the TLS side of front.go.

// loopbackIdentity makes a certificate for 127.0.0.1 that has signed itself, and the hash by which Chromium can be told to trust it.
func loopbackIdentity(t *testing.T) (cert, key, hash string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "sluice-test"}, IPAddresses: []net.IP{{127, 0, 0, 1}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	parsed, _ := x509.ParseCertificate(der)
	return string(encoding.EncodeToMemory(&encoding.Block{Type: "CERTIFICATE", Bytes: der})),
		string(encoding.EncodeToMemory(&encoding.Block{Type: "PRIVATE KEY", Bytes: secret})), keyHash(parsed)
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
