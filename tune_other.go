//go:build !linux

// The platform contract of proxy.go where the kernel is not Linux: portable, or without effect.
package main

import (
	"cmp"
	"io"
	"log/slog"
	"syscall"
	"time"
)

const canReusePort = false

type sockets struct{ deadPeer time.Duration }

func (*sockets) listening(network, address string, c syscall.RawConn) error { return nil }
func (*sockets) dialling(network, address string, c syscall.RawConn) error  { return nil }
func (*sockets) close()                                                     {}

func tuneKernel(*config, *slog.Logger) {}
func openFiles() int                   { return 0 }

type watcher struct{}
type watched struct{}

func newWatcher() (*watcher, error)                 { return &watcher{}, nil }
func (*watcher) add(*watched, syscall.RawConn, any) {}
func (*watcher) remove(*watched)                    {}
func (*watcher) run()                               {}
func (*watcher) close()                             {}

func isQuiet(syscall.RawConn) bool    { return true }
func (w *wire) readIdle(uintptr) bool { return true }
func (w *wire) fillIdle() error       { return w.fill() }

const kernelMoves = false

func (m *move) run() (total int64, err error) {
	for total < m.limit && err == nil {
		if m.src.buffered() == 0 {
			m.beforeRead()
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
