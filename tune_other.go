//go:build !linux

// The platform contract of proxy.go where the kernel is not Linux: portable, or without effect.
package main

import (
	"errors"
	"syscall"
	"time"
)

const canReusePort = false

type sockets struct{ deadPeer time.Duration }

func (*sockets) listening(network, address string, c syscall.RawConn) error { return nil }
func (*sockets) dialling(network, address string, c syscall.RawConn) error  { return nil }
func (*sockets) close()                                                     {}

func tuneKernel(*config) []finding { return nil }
func openFiles() int               { return 0 }

type watcher struct{}
type watched struct{}

func newWatcher() (*watcher, error)                            { return &watcher{}, nil }
func (*watcher) add(*watched, syscall.RawConn, hangupListener) {}
func (*watcher) remove(*watched)                               {}
func (*watcher) run()                                          {}
func (*watcher) close()                                        {}
func isQuiet(syscall.RawConn) bool                             { return true }
func (w *wire) readIdle(uintptr) bool                          { return true }
func (w *wire) fillIdle() error                                { return w.fill() }
func canSplice(dst, src *wire) bool                            { return false }
func (m *move) splice(limit int64) (int64, error)              { return 0, errors.ErrUnsupported }
