//go:build !linux || portable

// The platform contract of proxy.go where the kernel is not Linux: portable, or without effect.
package main

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"syscall"
	"time"
)

type sockets struct{}

func (*sockets) close() {}

func (s *server) openListeners(ctx context.Context, addr string) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", addr)
	if err == nil {
		s.listeners = append(s.listeners, l.(*net.TCPListener))
	}
	return err
}

type listener = net.TCPListener

func (s *server) accept(ctx context.Context, l *listener) {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for pause := time.Duration(0); ctx.Err() == nil; {
		conn, err := l.AcceptTCP()
		if err == nil {
			pause = 0
			if c, f := s.newClient(conn, addrPort(conn.RemoteAddr()).Addr()); f != nil {
				c.shed(f, time.Second)
			} else {
				go c.serve()
			}
			continue
		} else if pause == 0 && ctx.Err() == nil {
			s.log.process.Warn("accept failed, retrying", logMessage, err.Error())
		}
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

func (s *server) dial(ctx context.Context, addrs []netip.AddrPort) (up *upstream, err error) {
	until, _ := ctx.Deadline()
	for i, addr := range addrs {
		share, cancel := context.WithTimeout(ctx, time.Until(until)/time.Duration(len(addrs)-i))
		var conn net.Conn
		conn, err = (&net.Dialer{KeepAlive: -1}).DialContext(share, "tcp", addr.String())
		cancel()
		if err == nil {
			up = &upstream{peer: addr.Addr().String()}
			up.attach(s, conn.(*net.TCPConn))
			return up, nil
		}
	}
	return nil, err
}

func tuneKernel(cfg *config, _ *slog.Logger) []finding {
	if cfg.MemoryLimit > 0 && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(int64(cfg.MemoryLimit))
	}
	return nil
}

func (s *server) watchMemory(context.Context) {}

func openFiles() int { return 0 }
func connLimit() int { return 0 }

type pool struct{}

func newPool(*config) *pool                         { return &pool{} }
func (*pool) get([]byte, time.Time, bool) *upstream { return nil }
func (*pool) put(up *upstream, _ time.Time)         { up.close() }
func (*pool) size() int64                           { return 0 }
func (*pool) close()                                {}

type watcher struct{}
type watched struct{}

func newWatcher() (*watcher, error)                 { return &watcher{}, nil }
func (*watcher) add(*watched, syscall.RawConn, any) {}
func (*watcher) remove(*watched)                    {}
func (*watcher) run()                               {}
func (*watcher) close()                             {}

func (*client) graceLocked() {}
func (*client) unpark() bool { return false }

type wireIO struct{}

func (*wireIO) prepare(*wire) {}

func (w *wire) readWithin(now time.Time, limit time.Duration) {
	if limit == 0 {
		w.tcp.SetReadDeadline(time.Time{})
	} else {
		w.tcp.SetReadDeadline(now.Add(limit))
	}
}

func (*wire) passed(int) {}
func (*wire) rested()    {}

func (w *wire) fill() error {
	w.makeRoom()
	n, err := w.tcp.Read(w.buf[w.w:])
	if w.w += n; n > 0 {
		return nil
	}
	return err
}

func (w *wire) write(limit time.Duration, a, b, c []byte) error {
	if w.coded {
		return w.writeCoded(limit, a, b, c)
	}
	w.tcp.SetWriteDeadline(deadline(limit))
	_, err := (&net.Buffers{a, b, c}).WriteTo(w.tcp)
	return err
}

func (w *wire) ask(limit time.Duration, p []byte) error {
	if len(p) > 0 {
		if err := w.write(limit, p, nil, nil); err != nil {
			return err
		}
	}
	return w.fill()
}

func (c *client) await() (more, parked bool) { return c.awaitCoded(), false }

func (*bodyWriter) splice(*body, func()) (readErr, writeErr error) { return nil, nil }

func (x *exchange) relay(up *upstream) { x.relayBuffered(up) }
