//go:build !linux || portable

// The platform contract of proxy.go where the kernel is not Linux: portable, or without effect.
package main

import (
	"cmp"
	"context"
	"io"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"sync"
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

type stream = *net.TCPConn

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

func (w *wire) fill() error {
	w.makeRoom()
	n, err := w.tcp.Read(w.buf[w.w:])
	if w.w += n; n > 0 {
		return nil
	}
	return err
}

func (w *wire) write(limit time.Duration, a, b, c []byte) error {
	w.tcp.SetWriteDeadline(deadline(limit))
	_, err := (&net.Buffers{a, b, c}).WriteTo(w.tcp)
	return err
}

func (w *wire) ask(limit time.Duration, p []byte) error {
	if err := w.write(limit, p, nil, nil); err != nil {
		return err
	}
	return w.fill()
}

func (c *client) await() (more, parked bool) {
	if c.buffered() > 0 {
		return true, false
	}
	c.drop()
	c.readWithin(time.Now(), c.srv.cfg.IdleTimeout)
	c.idle.Store(true)
	if c.srv.closing.Load() || c.fill() != nil {
		return false, false
	}
	c.idle.Store(false)
	return true, false
}

func (*bodyWriter) splice(*body, func()) (readErr, writeErr error) { return nil, nil }

// tunnel is carried by a goroutine and a buffer per direction.
type tunnel struct {
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

func (x *exchange) relay(up *upstream) {
	now := time.Now()
	t := &tunnel{x: x.summary, up: up, since: now, last: now}
	t.x.peer, t.x.minor, t.x.attrs = up.peer, x.req.minor, nil
	x.line, x.dst.key = nil, nil // t has them
	c := x.c
	c.over, c.detached, c.under = true, true, nil // the exchange goes back
	c.tcp.SetDeadline(time.Time{})                // those of the answer, or of an earlier request
	up.tcp.SetDeadline(time.Time{})
	if c.track(nil, nil, t) {
		t.end("drain")
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
func (t *tunnel) carry(dst, src *wire, closed string) (total int64) {
	defer func() {
		if p := recover(); p != nil { // ends this tunnel alone
			t.x.srv.logPanic(p)
			t.end("internal_error")
		}
	}()
	for {
		if src.buffered() == 0 {
			if err := src.fill(); err == io.EOF {
				first := t.note(closed)
				if dst.tcp.CloseWrite() != nil {
					t.end(first)
				}
				return total
			} else if err != nil {
				t.fail()
				return total
			}
		}
		p := src.take(math.MaxInt64)
		n, err := dst.tcp.Write(p)
		t.x.srv.metrics.moved(n, dst == &t.x.c.wire)
		if total += int64(n); err != nil {
			t.fail()
			return total
		}
		t.note("")
	}
}

// note takes note that bytes have moved, or that a side has closed, and tells which did first.
func (t *tunnel) note(closed string) (first string) {
	t.mu.Lock()
	t.last, t.half, t.reason = time.Now(), t.half || closed != "", cmp.Or(t.reason, closed)
	first = t.reason
	t.mu.Unlock()
	if closed != "" {
		t.tick() // the other direction has less patience now
	}
	return first
}

// fail ends the tunnel so that neither side takes what it got for everything.
func (t *tunnel) fail() {
	t.mu.Lock()
	ended := t.ended
	t.mu.Unlock()
	if !ended {
		t.up.tcp.SetLinger(0)
		t.x.c.tcp.SetLinger(0)
		t.end("connection_error")
	}
}

func (t *tunnel) end(reason string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.ended {
		t.ended, t.reason = true, reason
		t.up.tcp.Close()
		t.x.c.tcp.Close()
	}
}

// tick ends a tunnel whose time is over.
func (t *tunnel) tick() {
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
