//go:build !linux

// The platform contract of proxy.go where the kernel is not Linux: portable, or without effect.
package main

import (
	"cmp"
	"context"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"syscall"
	"time"
)

const canReusePort = false

type sockets struct{ deadPeer time.Duration }

func (*sockets) listening(network, address string, c syscall.RawConn) error { return nil }
func (*sockets) close()                                                     {}

type stream = *net.TCPConn

func (s *server) dial(ctx context.Context, addr netip.AddrPort) (*upstream, error) {
	conn, err := (&net.Dialer{KeepAlive: -1}).DialContext(ctx, "tcp", addr.String())
	if err != nil {
		return nil, err
	}
	up := &upstream{peer: addr.Addr().String()}
	up.attach(s, conn.(*net.TCPConn))
	return up, nil
}

func tuneKernel(*config, *slog.Logger) {}
func openFiles() int                   { return 0 }

type watcher struct{}
type watched struct{}

func newWatcher() (*watcher, error)                 { return &watcher{}, nil }
func (*watcher) add(*watched, syscall.RawConn, any) {}
func (*watcher) remove(*watched)                    {}
func (*watcher) run()                               {}
func (*watcher) close()                             {}

func isQuiet(syscall.RawConn) bool { return true }
func (*client) graceLocked()       {}
func (*client) unpark() bool       { return false }
func (*direction) park() bool      { return false }
func (*direction) unpark() bool    { return false }

type wireIO struct{}

func (*wireIO) prepare(*wire) {}

func (w *wire) firedEarly() bool { return false }
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
	if c.srv.draining.Load() || c.fill() != nil {
		return false, false
	}
	c.idle.Store(false)
	return true, false
}

func (*bodyWriter) splice(*body, func()) (readErr, writeErr error) { return nil, nil }

func (m *move) run() (total int64, err error) {
	for total < m.limit && err == nil {
		if m.src.buffered() == 0 {
			if m.beforeRead != nil {
				m.beforeRead()
			}
			if err = m.src.fill(); m.mayRetry(err) {
				err = nil
				continue
			} else if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			m.readFailed = err != nil
		}
		n, failed := m.flush(m.limit - total)
		total += n
		err = cmp.Or(err, failed)
	}
	return total, err
}
