//go:build ignore

// What bench/front.sh has no installed program for: a load over HTTP/3, and the reference, a proxy made of Go's and quic-go's servers
// and net/http's ReverseProxy alone.
//
//	h3 load ADDRESS AUTHORITY PATH CONNECTIONS STREAMS SECONDS    prints requests=N errors=E bytes=B us=T
//	h3 relay PLAIN TLS ORIGIN CERT KEY                            h2c on PLAIN; HTTP/2 over TLS and, on UDP, HTTP/3 on TLS
package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httputil"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

func main() {
	os.Setenv("QUIC_GO_DISABLE_RECEIVE_BUFFER_WARNING", "true")
	switch args := os.Args[1:]; {
	case len(args) == 7 && args[0] == "load":
		connections, _ := strconv.Atoi(args[4])
		streams, _ := strconv.Atoi(args[5])
		seconds, err := strconv.ParseFloat(args[6], 64)
		if err != nil || seconds > 60 {
			log.Fatalf("%s seconds: %v", args[6], err)
		}
		load(args[1], args[2], args[3], connections, streams, time.Duration(seconds*1e9))
	case len(args) == 6 && args[0] == "relay":
		relay(args[1], args[2], args[3], args[4], args[5])
	default:
		log.Fatalf("unknown: %q", args)
	}
}

// load asks for the path again and again on each of connections × streams, until the time is over.
func load(address, authority, path string, connections, streams int, limit time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	var requests, errors, bytes atomic.Int64
	var all sync.WaitGroup
	began := time.Now()
	for range connections {
		conn, err := quic.DialAddr(ctx, address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{http3.NextProtoH3}}, nil)
		if err != nil {
			log.Fatal(err)
		}
		client := new(http3.Transport).NewClientConn(conn)
		for range streams {
			all.Go(func() {
				for ctx.Err() == nil {
					r, _ := http.NewRequestWithContext(ctx, "GET", "http://"+authority+path, nil)
					resp, err := client.RoundTrip(r)
					if err == nil {
						var n int64
						n, err = io.Copy(counter{&bytes}, resp.Body)
						if resp.Body.Close(); err == nil && (resp.StatusCode != 200 || n == 0) {
							err = fmt.Errorf("%s with %d bytes", resp.Status, n)
						}
					}
					if err == nil {
						requests.Add(1)
					} else if ctx.Err() == nil && errors.Add(1) == 1 {
						log.Print(err)
					}
				}
			})
		}
		defer conn.CloseWithError(0, "")
	}
	all.Wait()
	fmt.Printf("requests=%d errors=%d bytes=%d us=%d\n", requests.Load(), errors.Load(), bytes.Load(), time.Since(began).Microseconds())
}

// counter counts bytes as they come, so that those of a response that is cut by the time count too.
type counter struct{ n *atomic.Int64 }

func (c counter) Write(p []byte) (int, error) {
	c.n.Add(int64(len(p)))
	return len(p), nil
}

func relay(plain, secure, origin, cert, key string) {
	proxy := &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", origin },
		Transport: &http.Transport{MaxIdleConnsPerHost: 1024, DisableCompression: true},
		ErrorLog:  log.New(io.Discard, "", 0),
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		log.Fatal(err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{pair}}
	h3 := &http3.Server{Addr: secure, Handler: proxy, TLSConfig: http3.ConfigureTLSConfig(config), QUICConfig: &quic.Config{MaxIncomingStreams: 250}}
	h2 := &http.Server{Addr: secure, Handler: proxy, TLSConfig: config, ErrorLog: proxy.ErrorLog}
	h2c := &http.Server{Addr: plain, Handler: proxy, Protocols: new(http.Protocols), ErrorLog: proxy.ErrorLog}
	h2c.Protocols.SetHTTP1(true)
	h2c.Protocols.SetUnencryptedHTTP2(true)
	go func() { log.Fatal(h3.ListenAndServe()) }()
	go func() { log.Fatal(h2.ListenAndServeTLS("", "")) }()
	log.Fatal(h2c.ListenAndServe())
}
