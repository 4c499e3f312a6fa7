// What only Linux can do, by system calls and /proc alone: SO_REUSEPORT, the descriptor limit, sysctls, hang-ups by epoll,
// splice(2). What each function promises stands in proxy.go, "Platform contract".
package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ---------------------------------------------------------------------------------------------------------------------
// Sockets

const canReusePort = true

// sockets sets options on sockets before they listen or connect.
type sockets struct {
	deadPeer time.Duration

	mu    sync.Mutex
	pipes []*[2]int // empty, for reuse; guarded by mu
}

// listening sets what accepted sockets inherit (tcp(7): the options of a listening socket are copied), so that no system
// call per connection is spent on it.
func (s *sockets) listening(network, address string, c syscall.RawConn) error {
	return control(c, func(fd int) error {
		return errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1), s.keepAlive(fd))
	})
}

func (s *sockets) dialling(network, address string, c syscall.RawConn) error {
	return control(c, s.keepAlive)
}

// keepAlive has the kernel look for peers that lost power. TCP_USER_TIMEOUT overrides the count of probes, and also ends a
// connection whose reader lets its window stay shut for that long, so it is no shorter than the limit for idle tunnels.
func (s *sockets) keepAlive(fd int) error {
	return errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1),
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 30),
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 15),
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(min(s.deadPeer.Milliseconds(), math.MaxInt32))))
}

// control runs f on the descriptor of c.
func control(c syscall.RawConn, f func(fd int) error) (err error) {
	if e := c.Control(func(fd uintptr) { err = f(int(fd)) }); e != nil {
		return e
	}
	return err
}

// isQuiet looks at a connection's queue without taking from it.
func isQuiet(raw syscall.RawConn) bool {
	return control(raw, func(fd int) error {
		var one [1]byte
		_, _, err := unix.Recvfrom(fd, one[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return err
	}) == unix.EAGAIN
}

// fillIdle is fill for a wire that may wait long: the buffer is taken when there is something to read.
func (w *wire) fillIdle() error {
	if err := w.raw.Read(w.idleRead); err != nil {
		return err
	}
	return w.idleErr
}

// readIdle tries to read; false asks to be called again when the socket is readable.
func (w *wire) readIdle(fd uintptr) bool {
	w.makeRoom()
	var n int
	var err error
	for {
		if n, err = unix.Read(int(fd), w.buf[w.w:]); err != unix.EINTR {
			break
		}
	}
	w.idleErr = nil
	switch {
	case err == unix.EAGAIN:
		w.drop()
		return false
	case err != nil:
		w.idleErr = os.NewSyscallError("read", err)
	case n == 0:
		w.idleErr = io.EOF
	default:
		w.w += n
	}
	return true
}

// ---------------------------------------------------------------------------------------------------------------------
// Hang-ups

// watcher is an epoll instance of its own on which connections are registered for the peer's end (EPOLLRDHUP), edge-
// triggered: one epoll_ctl(2) per connection, and nothing while bytes flow. It is itself waited for by Go's poller, so it
// costs no thread.
type watcher struct {
	file *os.File
	raw  syscall.RawConn

	mu    sync.Mutex
	slots []slot  // guarded by mu
	free  []int32 // guarded by mu
}

// slot is a registered connection. Events carry its index and generation, since an event may be read after the connection it
// was for is gone and its place is taken.
type slot struct {
	generation int32
	listener   hangupListener
}

// watched is a connection's registration; owned by whoever adds and removes it. The zero value is none.
type watched struct {
	place, generation int32
	on                bool
}

func newWatcher() (*watcher, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // os.NewFile hands only such to the poller
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	w := &watcher{file: os.NewFile(uintptr(fd), "epoll")}
	w.raw, err = w.file.SyscallConn()
	return w, err
}

// add registers a connection. Failure (descriptors or max_user_watches used up) only means that hang-ups are noticed later.
func (w *watcher) add(h *watched, raw syscall.RawConn, l hangupListener) {
	w.mu.Lock()
	if n := len(w.free); n > 0 {
		h.place = w.free[n-1]
		w.free = w.free[:n-1]
	} else {
		h.place = int32(len(w.slots))
		w.slots = append(w.slots, slot{})
	}
	w.slots[h.place].listener = l
	h.generation, h.on = w.slots[h.place].generation, true
	w.mu.Unlock()
	event := unix.EpollEvent{Events: unix.EPOLLRDHUP | unix.EPOLLET, Fd: h.place, Pad: h.generation}
	control(w.raw, func(epfd int) error {
		return control(raw, func(fd int) error { return unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, fd, &event) })
	})
}

// remove forgets a connection; the kernel does when its descriptor is closed.
func (w *watcher) remove(h *watched) {
	if !h.on {
		return
	}
	h.on = false
	w.mu.Lock()
	w.slots[h.place] = slot{generation: h.generation + 1}
	w.free = append(w.free, h.place)
	w.mu.Unlock()
}

// run tells listeners until the watcher is closed.
func (w *watcher) run() {
	events := make([]unix.EpollEvent, 128)
	for {
		n := 0
		err := w.raw.Read(func(fd uintptr) bool {
			n, _ = unix.EpollWait(int(fd), events, 0)
			return n > 0
		})
		if err != nil {
			return
		}
		for _, e := range events[:n] {
			w.mu.Lock()
			s := w.slots[e.Fd]
			w.mu.Unlock()
			if s.generation == e.Pad && s.listener != nil {
				s.listener.hungUp(e.Events&(unix.EPOLLERR|unix.EPOLLHUP) != 0)
			}
		}
	}
}

func (w *watcher) close() { w.file.Close() }

// hangupListener is told that its peer closed its sending side; reset: the whole connection.
type hangupListener interface{ hungUp(reset bool) }

// hungUp gives up what the client's goroutine waits for meanwhile: it would not notice while that lasts.
func (c *client) hungUp(reset bool) {
	c.mu.Lock()
	c.gone = true
	c.mu.Unlock()
	if reset {
		c.abandon()
	} else {
		time.AfterFunc(hangupGrace, c.abandon)
	}
}

// hungUp takes an idle connection out of the pool; one in use does not come back to it.
func (up *upstream) hungUp(bool) {
	up.hung.Store(true)
	if up.srv.pool.remove(up) {
		up.close()
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Splice

// pipeSize is asked for as the capacity of a pipe; the kernel may give less.
const pipeSize = 256 << 10

const kernelMoves = true

// run is flush and then, through a pipe that is held only while src is being read or bytes are in it, splice(2).
func (m *move) run() (int64, error) {
	n, err := m.flush(m.limit)
	m.src.drop()
	s := &splicer{move: m, total: n}
	defer s.dropPipe()
	in, out := s.in, s.out // stored: a method value would be allocated at each wait
	for s.total < m.limit && err == nil {
		reading := s.held == 0
		if reading {
			m.beforeRead() // each time: a deadline may pass while there is always something to read, but dst is slow
			err = m.src.raw.Read(in)
		} else {
			m.beforeWrite()
			err = m.dst.raw.Write(out)
		}
		if err == nil {
			err, s.err = s.err, nil
		}
		if m.readFailed = reading && err != nil; m.mayRetry(err) {
			err = nil
		}
	}
	return s.total, err
}

// splicer is one run of a move.
type splicer struct {
	*move
	pipe  *[2]int
	held  int   // bytes in the pipe
	total int64 // bytes moved
	err   error // of the last splice(2)
}

// in reads into the pipe; false asks to be called again when src is readable.
func (s *splicer) in(fd uintptr) bool {
	if s.err = s.takePipe(); s.err != nil {
		return true
	}
	n, err := splice(int(fd), s.pipe[1], int(min(s.limit-s.total, pipeSize)))
	switch {
	case err == unix.EAGAIN:
		s.dropPipe()
		return false
	case err != nil:
		s.err = os.NewSyscallError("splice", err)
	case n == 0:
		s.err = io.ErrUnexpectedEOF
	}
	s.held = n
	return true
}

// out writes from the pipe; false asks to be called again when dst is writable.
func (s *splicer) out(fd uintptr) bool {
	n, err := splice(s.pipe[0], int(fd), s.held)
	if err == unix.EAGAIN {
		return false
	}
	s.err = os.NewSyscallError("splice", err)
	s.held -= n
	s.total += int64(n)
	s.moved()
	return true
}

func splice(from, to, most int) (int, error) {
	for {
		n, err := unix.Splice(from, nil, to, nil, most, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		if err != unix.EINTR {
			return int(max(n, 0)), err
		}
	}
}

// takePipe takes a pipe from the list or makes one.
func (s *splicer) takePipe() error {
	if s.pipe != nil {
		return nil
	}
	k := &s.src.srv.sockets
	k.mu.Lock()
	defer k.mu.Unlock()
	if n := len(k.pipes); n > 0 {
		s.pipe = k.pipes[n-1]
		k.pipes = k.pipes[:n-1]
		return nil
	}
	p := new([2]int)
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return os.NewSyscallError("pipe2", err)
	}
	unix.FcntlInt(uintptr(p[1]), unix.F_SETPIPE_SZ, pipeSize) // past pipe-user-pages-soft the default stays
	s.pipe = p
	return nil
}

// dropPipe gives an empty pipe back; one with bytes in it, or one too many, is closed. (A sync.Pool would leak descriptors.)
func (s *splicer) dropPipe() {
	p := s.pipe
	if p == nil {
		return
	}
	s.pipe = nil
	k := &s.src.srv.sockets
	k.mu.Lock()
	defer k.mu.Unlock()
	if s.held == 0 && len(k.pipes) < 64 {
		k.pipes = append(k.pipes, p)
		return
	}
	unix.Close(p[0])
	unix.Close(p[1])
}

// close closes the pipes that are kept.
func (s *sockets) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.pipes {
		unix.Close(p[0])
		unix.Close(p[1])
	}
	s.pipes = nil
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernel settings

// maxFiles is the most descriptors asked for: some container engines set a limit of a billion, and what is sized by it
// follows.
const maxFiles = 1 << 20

// sysctl is a setting that is checked: its file below /proc/sys, and whether its value will do.
type sysctl struct {
	name, wanted, why string
	enough            func(value string) bool
}

func atLeast(n int) func(string) bool {
	return func(value string) bool {
		v, err := strconv.Atoi(value)
		return err == nil && v >= n
	}
}

// sysctls are the settings that decide how many connections can be waiting or open.
func sysctls() []sysctl {
	return []sysctl{
		{"net.core.somaxconn", "4096", "it bounds the queue of connections not accepted yet", atLeast(4096)},
		{"net.ipv4.tcp_max_syn_backlog", "4096", "it bounds the connections whose handshake is under way", atLeast(4096)},
		{"net.ipv4.ip_local_port_range", "1024 65535", "each connection to one origin needs a local port", func(value string) bool {
			var low, high int
			n, _ := fmt.Sscan(value, &low, &high)
			return n == 2 && high-low >= 28000
		}},
	}
}

// tuneKernel raises the descriptor limit and checks the sysctls. With TUNE=apply it writes those that fall short first.
func tuneKernel(cfg *config, log *slog.Logger) {
	raiseFiles(cfg.NOFILE)
	if cfg.Tune == "off" {
		return
	}
	warn := func(setting, found, wanted, why, mend string) {
		log.Warn("kernel setting falls short", "setting", setting, "found", found, "wanted", wanted, "why", why, "mend", mend)
	}
	if n := openFiles(); n < 65536 && (cfg.NOFILE == 0 || n < cfg.NOFILE) {
		warn("RLIMIT_NOFILE", strconv.Itoa(n), "65536", "a tunnel needs two descriptors", "ulimits: {nofile: 65536}")
	}
	for _, s := range sysctls() {
		path := "/proc/sys/" + strings.ReplaceAll(s.name, ".", "/")
		value, err := readSetting(path)
		if err == nil && !s.enough(value) && cfg.Tune == "apply" {
			os.WriteFile(path, []byte(s.wanted), 0o644) // what could not be written is found when it is read back
			value, err = readSetting(path)
		}
		if err != nil {
			value = "unreadable: " + err.Error()
		}
		if err != nil || !s.enough(value) {
			warn(s.name, value, s.wanted, s.why, fmt.Sprintf("sysctls: {%s: %q}", s.name, s.wanted))
		}
	}
}

func readSetting(path string) (string, error) {
	b, err := os.ReadFile(path)
	return strings.Join(strings.Fields(string(b)), " "), err
}

// raiseFiles sets the soft descriptor limit to want, or to the hard limit when want is 0 or more than that.
func raiseFiles(want int) {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return
	}
	limit.Cur = min(limit.Max, maxFiles)
	if want > 0 {
		limit.Cur = min(limit.Max, uint64(want))
	}
	unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
}

func openFiles() int {
	var limit unix.Rlimit
	unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
	return int(min(limit.Cur, maxFiles))
}
