//go:build !portable

// What only Linux can do, by system calls and /proc alone: SO_REUSEPORT, the descriptor limit, sysctls, hang-ups by epoll,
// splice(2). What each function promises stands in proxy.go, "Platform contract".
package main

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"os"
	"path"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ---------------------------------------------------------------------------------------------------------------------
// Sockets

// sockets makes connections, sets options on sockets before they listen or connect, and keeps pipes.
type sockets struct {
	reserved int // descriptors from this number on are for the admin listener, resolvers and files; the lowest free one is given first

	most  int // pipes there may be
	large int // pipes of pipeSize there may be

	short     atomic.Bool   // half of the container's memory is in use
	full      atomic.Bool   // what waits in sockets leaves no memory for more
	heldMost  int64         // of its memory the container may hold; 0 = there is no limit, or none of version 2 of cgroups
	looking   sync.Mutex    // guards the next three
	held      int           // memory.current, what the container holds
	stat      int           // memory.stat, of what that is made up
	text      []byte        // room for what is read of both
	top       atomic.Int64  // the highest descriptor of a connection so far
	each      int64         // bytes that a transfer fills when its reader is slow, as the kernel has it
	unseen    atomic.Int64  // bytes that have moved since somebody looked
	cut       atomic.Int64  // connections that were cut since it was last told of
	stirred   chan struct{} // has something when bytes may have begun to flow
	transfers atomic.Int64  // bodies, and directions of tunnels, that carry more than a buffer's worth
	bounded   atomic.Int64  // bytes asked for as the buffers of each connection, either way; 0 = the kernel's choice

	mu    sync.Mutex
	pipes []*[2]int            // empty, for reuse; guarded by mu
	open  int                  // pipes there are, in use too; guarded by mu
	said  map[string]time.Time // when each shortage was last told of; guarded by mu
}

func (s *server) openListeners(ctx context.Context, addr string) error {
	s.sockets.size(openFiles(), debug.SetMemoryLimit(-1))
	lc := net.ListenConfig{Control: s.sockets.listening, KeepAlive: -1} // accepted sockets inherit what Control sets
	lc.SetMultipathTCP(false)                                           // splice(2) and the socket options want plain TCP
	for range cmp.Or(s.cfg.Listeners, runtime.GOMAXPROCS(0)) {          // which minds the affinity mask and the cgroup's CPU quota
		l, err := lc.Listen(ctx, "tcp", addr)
		if err != nil {
			return err
		}
		file, err := l.(*net.TCPListener).File()
		addr = l.Addr().String() // port 0 is chosen once
		l.Close()
		if err != nil {
			return err
		}
		raw, _ := file.SyscallConn() // fails on nil only
		control(raw, func(fd int) error {
			if info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
				s.backlog = int(info.Sacked) // of a listening socket (tcp_get_info in tcp.c)
			}
			return nil
		})
		s.listeners = append(s.listeners, &listener{file, raw, l.Addr()})
	}
	return nil
}

// listener is a listening socket. Package net's lends its descriptor neither for waiting nor when it is about to close.
type listener struct {
	*os.File
	raw  syscall.RawConn
	addr net.Addr
}

func (l *listener) Addr() net.Addr { return l.addr }

func (s *server) accept(ctx context.Context, l *listener) {
	stop := context.AfterFunc(ctx, func() { l.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	defer l.Close()
	var pause time.Duration
	for failed := error(nil); ; failed = nil {
		begun := time.Now()
		err := l.raw.Read(func(fd uintptr) (more bool) {
			more, failed = s.takeIn(int(fd), 128)
			return more || failed != nil
		})
		if err != nil { // the drain: those who wait in the queue would be reset with it
			control(l.raw, func(fd int) error { s.takeIn(fd, 1<<16); return nil })
			return
		} else if failed == nil {
			continue
		}
		s.sayShort("accept failed, retrying", failed)
		if time.Since(begun) > 2*time.Second {
			pause = 0
		}
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// takeIn accepts the connections that wait, up to most, and reports whether there may be more. When it comes to the reserve of
// descriptors it sheds one: the others keep waiting.
func (s *server) takeIn(fd, most int) (more bool, err error) {
	for range most {
		conn, from, err := unix.Accept4(fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		switch err {
		case nil:
		case unix.EAGAIN:
			return false, nil
		case unix.EINTR, unix.ECONNABORTED:
			continue
		default:
			return false, os.NewSyscallError("accept4", err)
		}
		s.sockets.bindBuffers(conn)
		c, f := s.newClient(newSocket(conn), peerOf(from))
		switch {
		case conn >= s.sockets.reserved:
			c.shed(cmp.Or(f, fail(503, tokenLimit, "no descriptor is left for a connection (SLUICE_NOFILE)")), 0)
			return false, unix.EMFILE
		case f != nil && conn >= s.sockets.reserved/16*15: // one that lingers would take a descriptor from those that are served
			c.shed(f, 0)
		case f != nil:
			c.shed(f, time.Second)
		default:
			go c.serve()
		}
	}
	return true, nil
}

// sayShort warns of a shortage, of each kind once a minute at most, and lets idle connections go.
func (s *server) sayShort(msg string, err error) {
	k := &s.sockets
	k.mu.Lock()
	said := time.Since(k.said[msg]) < time.Minute
	if !said {
		if k.said == nil {
			k.said = map[string]time.Time{}
		}
		k.said[msg] = time.Now()
	}
	k.mu.Unlock()
	if !said {
		s.log.process.Warn(msg, logMessage, err.Error())
	}
	s.letGo()
}

// letGo closes idle connections, to clients and to origins.
func (s *server) letGo() {
	for k := range s.clients.Range {
		c := k.(*client)
		c.mu.Lock()
		parked := c.parked // idle for a while: the request of one that has just come may be on its way
		c.mu.Unlock()
		if parked {
			c.closeIdle()
		}
	}
	s.pool.letGo()
}

// peerOf is the address in what accept4 tells.
func peerOf(from unix.Sockaddr) netip.Addr {
	switch a := from.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrFrom4(a.Addr)
	case *unix.SockaddrInet6:
		addr := netip.AddrFrom16(a.Addr).Unmap()
		if a.ZoneId == 0 {
			return addr
		} else if link, err := net.InterfaceByIndex(int(a.ZoneId)); err == nil {
			return addr.WithZone(link.Name)
		}
		return addr
	}
	return netip.Addr{}
}

// size shares descriptors and memory out: pipes get an eighth of both, and connections leave some descriptors. What pipes hold counts as
// memory of the container (cgroups(7)), and one whose reader is slow is full.
func (s *sockets) size(files int, memory int64) {
	s.reserved = files - min(reservedFiles, files/4)
	s.most = int(min(int64(files/16), memory/8/(64<<10)))
	s.large = int(min(largePipes, memory/16/pipeSize))
	most, _ := cgroupLimit("memory", "memory.max")
	if most == 0 || s.heldMost > 0 { // whatever is listened on
		return
	}
	dirs, _ := cgroups("memory")
	held, err := unix.Open(path.Join(dirs[0], "memory.current"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	stat, bad := unix.Open(path.Join(dirs[0], "memory.stat"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	receive, _ := readSetting(sysctlFile("net.ipv4.tcp_rmem"))
	send, _ := readSetting(sysctlFile("net.ipv4.tcp_wmem"))
	s.each = cmp.Or(number(receive, 2)+number(send, 2), 10<<20)
	if err == nil && bad == nil {
		s.heldMost, s.held, s.stat, s.text, s.stirred = most, held, stat, make([]byte, 4<<10), make(chan struct{}, 1)
	}
}

// listening sets what accepted sockets inherit (tcp(7): the options of a listening socket are copied), so that no system
// call per connection is spent on it.
func (s *sockets) listening(network, address string, c syscall.RawConn) error {
	return control(c, func(fd int) error {
		return errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1), unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1), keepAlive(fd))
	})
}

// keepAlive has the kernel look for peers that lost power. One that is idle is given up after 165 s: nine probes (tcp_keepalive_probes), 15 s
// apart. One that does not acknowledge what it was sent is given up after 940 s as the kernel comes (tcp_retries2), and from Linux 6.15 on,
// which can be told to send again every 60 s rather than 120 (RFC 6298, 2.5 allows no less), after 539 s. TCP_USER_TIMEOUT would be sooner,
// but it overrides the count of probes, so that an idle one stays as long, and it ends a connection whose reader is alive and pauses.
func keepAlive(fd int) error {
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_RTO_MAX_MS, 60_000) // older kernels do not know it
	return errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1),
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 30),
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 15))
}

// look keeps what waits in connections from using up the container's memory: with version 2 of cgroups it counts, and where a send finds none
// left the process is killed. A transfer whose reader is slow fills tcp_rmem and tcp_wmem, 10 MB as the kernel comes, so that 20 of them
// used up 64 MiB. So many transfers share half of the memory. What fewer take, and what waits in connections that have none, is looked
// at: from half of the memory on the buffers of all connections are bounded, from three quarters on more so, from seven eighths on nobody is
// let in, and before there is none left connections are cut. Always, bounds would be slow: 4 transfers over 20 ms have 88 rather than 270 Mbit/s.
//
// Nothing here tells Go's scheduler that it may block, as its calls cannot: it might be the turn of others then, whose bytes fill the memory.
func (s *sockets) look() {
	if s.heldMost == 0 {
		return
	}
	s.looking.Lock()
	defer s.looking.Unlock()
	most, used, bounded, transfers := s.heldMost, s.inUse(), s.bounded.Load(), s.transfers.Load()
	fits, ample, least := s.share(transfers), s.share(2*transfers), most>>12
	s.unseen.Store(0)
	s.short.Store(used > most/2)
	switch s.full.Store(used > most/8*7); {
	case used > most/16*15:
		s.shed(used - most/8*7)
		fallthrough
	case used > most/4*3 && bounded != least:
		s.bound(least)
	case fits > 0 && (bounded == 0 || bounded > fits):
		s.bound(ample) // that is often enough
	case used > most/2 && bounded == 0:
		s.bound(max(least, (most-used)/4/int64(len(s.conns())+1)))
	case bounded > 0 && used < most/2 && used-inHeap() < most/32*9 && (ample == 0 || ample > 2*bounded): // the program's text may be a quarter
		s.bound(ample)
	}
}

// share is what each of so many transfers may ask for as a buffer; it fills two, each twice as large (socket(7)). 0 = what the kernel chooses:
// while all together could take twice the memory at most, looks are soon enough, with 24 transfers in 64 MiB, too.
func (s *sockets) share(transfers int64) int64 {
	if transfers*s.each <= 2*s.heldMost {
		return 0
	}
	return max(s.heldMost/8/transfers, s.heldMost>>12)
}

// inUse is what the container holds and the kernel cannot take back: files that it has read or written are kept while there is room.
func (s *sockets) inUse() int64 {
	used := number(s.reading(s.held), 0)
	if used <= s.heldMost/2 {
		return used
	}
	for line := range strings.Lines(s.reading(s.stat)) {
		if strings.HasPrefix(line, "active_file ") || strings.HasPrefix(line, "inactive_file ") {
			used -= number(line, 1)
		}
	}
	return used
}

func (s *sockets) reading(fd int) string {
	n, _, e := unix.RawSyscall6(unix.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(&s.text[0])), uintptr(len(s.text)), 0, 0, 0)
	if e != 0 {
		return ""
	}
	return string(s.text[:n])
}

// inHeap is what of a container's memory the runtime has.
func inHeap() int64 {
	m := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(m)
	return int64(m[0].Value.Uint64() - m[1].Value.Uint64())
}

// bound has n bytes asked for as the buffers of each connection from now on, either way; 0 = the kernel's choice.
func (s *sockets) bound(n int64) {
	s.bounded.Store(n)
	for _, fd := range s.conns() {
		setBuffers(fd, int(n)) // it may be closed, and given again, meanwhile: to a connection, which it suits, or to what refuses it
	}
}

// shed resets connections until what they held is n bytes, beginning with those that hold the most: their readers are the slowest. Who holds
// less than what was bounded may hold is not to blame.
func (s *sockets) shed(n int64) {
	type conn struct {
		fd    int
		holds int64
	}
	var conns []conn
	for _, fd := range s.conns() {
		var info [9]uint32 // SK_MEMINFO_VARS: what waits to be read is the first, what to be sent the sixth
		getOption(fd, unix.SO_MEMINFO, info[:])
		if holds := int64(info[0]) + int64(info[5]); holds > s.heldMost>>12 { // a listener holds nothing
			conns = append(conns, conn{fd, holds})
		}
	}
	slices.SortFunc(conns, func(a, b conn) int { return cmp.Compare(b.holds, a.holds) })
	for _, c := range conns {
		if n <= 0 {
			break
		}
		var none [16]byte // AF_UNSPEC dissolves a connection, and what waits in it goes at once (connect(2))
		unix.RawSyscall(unix.SYS_CONNECT, uintptr(c.fd), uintptr(unsafe.Pointer(&none)), uintptr(len(none)))
		n -= c.holds
		s.cut.Add(1)
	}
}

// conns are the connections' descriptors, and some more.
func (s *sockets) conns() (fds []int) {
	for fd := range int(s.top.Load()) + 1 {
		var protocol [1]uint32
		if getOption(fd, unix.SO_PROTOCOL, protocol[:]); protocol[0] == unix.IPPROTO_TCP {
			fds = append(fds, fd)
		}
	}
	return fds
}

// getOption reads an option of a socket into value, and leaves it alone where it cannot.
func getOption(fd, option int, value []uint32) {
	size := uint32(4 * len(value))
	unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, uintptr(option), uintptr(unsafe.Pointer(&value[0])), uintptr(unsafe.Pointer(&size)), 0)
}

// passed takes note that n bytes of a body or tunnel were read from w and sent on. From a buffer's worth on they are a transfer, until w has
// rested.
func (w *wire) passed(n int) {
	k := &w.srv.sockets
	if w.io.carried += n; k.heldMost == 0 || w.io.carried <= bufferSize {
		return
	}
	begins := !w.io.transfer
	if begins {
		w.io.transfer = true
		k.transfers.Add(1)
		k.stir()
	}
	if k.unseen.Add(int64(n)) > k.heldMost>>6 || begins { // whoever moves much may keep the watch from its turn
		k.look()
	}
}

// rested ends a transfer.
func (w *wire) rested() {
	if w.io.carried = 0; w.io.transfer {
		w.io.transfer = false
		w.srv.sockets.transfers.Add(-1)
	}
}

// bindBuffers does so for a new connection: one that has waited to be accepted has the buffers of before.
func (s *sockets) bindBuffers(fd int) {
	for top := s.top.Load(); int64(fd) > top && !s.top.CompareAndSwap(top, int64(fd)); {
		top = s.top.Load()
	}
	s.look()
	s.stir()
	if n := s.bounded.Load(); n > 0 {
		setBuffers(fd, int(n))
	}
}

// stir has watchSockets look more often.
func (s *sockets) stir() {
	select {
	case s.stirred <- struct{}{}:
	default: // it does, or there is nothing to look at
	}
}

// setBuffers has a connection send what fits into n bytes, twice that with the kernel's overhead (socket(7)), and drop what comes beyond as
// much: its peer sends that again. 0: the kernel finds its sizes by itself, as at first.
func setBuffers(fd, n int) {
	set := func(option, value int32) {
		unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, uintptr(option), uintptr(unsafe.Pointer(&value)), 4, 0)
	}
	if n == 0 {
		set(unix.SO_BUF_LOCK, 0) // from Linux 5.15 on
		return
	}
	set(unix.SO_SNDBUF, int32(n))
	set(unix.SO_RCVBUF, int32(n))
}

// socket is a connection. Package net spends more on one: six system calls that tell nothing new, a goroutine that waits for ctx, and
// so many frames that the stack has to grow; together 5% of what a tunnel costs.
type socket struct {
	*os.File
	raw syscall.RawConn
}

func newSocket(fd int) *socket {
	k := &socket{File: os.NewFile(uintptr(fd), "")}
	k.raw, _ = k.File.SyscallConn() // fails on nil only
	return k
}

// SyscallConn is called once more by wire.attach.
func (k *socket) SyscallConn() (syscall.RawConn, error) { return k.raw, nil }

func (k *socket) CloseRead() error {
	return control(k.raw, func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RD) })
}

func (k *socket) CloseWrite() error {
	return control(k.raw, func(fd int) error { return unix.Shutdown(fd, unix.SHUT_WR) })
}

func (k *socket) SetLinger(seconds int) error {
	return control(k.raw, func(fd int) error {
		return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: int32(seconds)})
	})
}

// interleave orders addresses so that the families take turns, beginning with that of the first (RFC 8305, 4).
func interleave(addrs []netip.AddrPort) []netip.AddrPort {
	rank, next := map[netip.AddrPort]int{}, map[bool]int{true: 0, false: 1} // by whether an address is of the family of the first
	for _, a := range addrs {
		first := a.Addr().Is4() == addrs[0].Addr().Is4()
		rank[a] = next[first]
		next[first] += 2
	}
	slices.SortFunc(addrs, func(a, b netip.AddrPort) int { return rank[a] - rank[b] })
	return slices.Compact(addrs)
}

// dial has the addresses race (RFC 8305), each with a head start, the next at once when one fails.
func (s *server) dial(ctx context.Context, addrs []netip.AddrPort) (*upstream, error) {
	if len(addrs) == 1 {
		return s.dialOne(ctx, addrs[0])
	}
	addrs = interleave(addrs)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	winner, losers := make(chan *upstream), make(chan error, len(addrs)) // every loser is counted, also when nobody waits
	start := time.NewTimer(0)
	var worst error
	for next, lost := 0, 0; lost < len(addrs); {
		select {
		case <-start.C:
			if next < len(addrs) {
				go s.attempt(ctx, addrs[next], winner, losers)
				next++
				start.Reset(250 * time.Millisecond) // RFC 8305, 5
			}
		case up := <-winner:
			return up, nil
		case err := <-losers:
			lost++
			if worst == nil || isUnroutable(worst) { // a family without a route says least
				worst = err
			}
			start.Reset(0)
		}
	}
	return nil, worst
}

// attempt connects to one address. What connects when the race is over is closed, and lost.
func (s *server) attempt(ctx context.Context, addr netip.AddrPort, winner chan<- *upstream, losers chan<- error) {
	up, err := s.dialOne(ctx, addr)
	if err == nil {
		select {
		case winner <- up:
			return
		case <-ctx.Done():
			up.close()
			err = &net.OpError{Op: "dial", Net: "tcp", Err: ctx.Err()}
		}
	}
	losers <- err
}

func (s *server) dialOne(ctx context.Context, addr netip.AddrPort) (*upstream, error) {
	k, err := s.sockets.connect(ctx, newSockaddr(addr))
	if errors.Is(err, unix.EMFILE) { // the pool's idle connections hold some
		s.pool.letGo()
		k, err = s.sockets.connect(ctx, newSockaddr(addr))
	}
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(addr), Err: cmp.Or(ctx.Err(), err)}
	}
	up := &upstream{peer: addr.Addr().String()}
	up.attach(s, k)
	return up, nil
}

// connect connects until ctx ends.
func (s *sockets) connect(ctx context.Context, to *sockaddr) (*socket, error) {
	fd, err := unix.Socket(int(to.family), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	k := newSocket(fd)
	stop := context.AfterFunc(ctx, func() { k.SetWriteDeadline(time.Unix(1, 0)) })
	if err = errors.Join(unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1), keepAlive(fd)); fd >= s.reserved {
		err = unix.EMFILE
	} else if err == nil {
		s.bindBuffers(fd)
		err = k.connect(to)
	}
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		k.Close()
		return nil, err
	}
	return k, nil
}

// connect is connect(2), raw, as sendNow is: a handshake over loopback is made within it. Called again it tells what became of
// the first call.
func (k *socket) connect(to *sockaddr) error {
	var e syscall.Errno
	err := k.raw.Write(func(fd uintptr) bool {
		_, _, e = unix.RawSyscall(unix.SYS_CONNECT, fd, uintptr(unsafe.Pointer(to)), to.size())
		if e == 0 && to.metBy(fd) {
			e = unix.ECONNREFUSED
		}
		return e != unix.EINPROGRESS && e != unix.EALREADY && e != unix.EINTR
	})
	if err == nil && e != 0 {
		err = os.NewSyscallError("connect", e)
	}
	return err
}

// sockaddr has the layout of struct sockaddr_in6, the beginning of which is also that of sockaddr_in but for the place of the
// address (ip(7), ipv6(7)).
type sockaddr struct {
	family   uint16
	port     [2]byte // in network byte order
	address4 [4]byte // flow information in IPv6
	address6 [16]byte
	scope    uint32
}

func newSockaddr(addr netip.AddrPort) *sockaddr {
	a, ip := &sockaddr{family: unix.AF_INET}, addr.Addr()
	binary.BigEndian.PutUint16(a.port[:], addr.Port())
	if ip.Is4() {
		a.address4 = ip.As4()
		return a
	}
	a.family, a.address6 = unix.AF_INET6, ip.As16()
	if link, err := net.InterfaceByName(ip.Zone()); err == nil {
		a.scope = uint32(link.Index)
	} else if n, err := strconv.ParseUint(ip.Zone(), 10, 32); err == nil {
		a.scope = uint32(n)
	}
	return a
}

func (a *sockaddr) size() uintptr {
	if a.family == unix.AF_INET {
		return unix.SizeofSockaddrInet4
	}
	return unix.SizeofSockaddrInet6
}

// metBy reports whether a socket has connected to itself: on a closed port of this host that was given to it as its own
// (RFC 9293, 3.5, simultaneous open). Given ports are 1024 and up.
func (a *sockaddr) metBy(fd uintptr) bool {
	if binary.BigEndian.Uint16(a.port[:]) < 1024 {
		return false
	}
	var own sockaddr
	size := uint32(unsafe.Sizeof(own))
	unix.RawSyscall(unix.SYS_GETSOCKNAME, fd, uintptr(unsafe.Pointer(&own)), uintptr(unsafe.Pointer(&size)))
	return own.port == a.port && own.address4 == a.address4 && own.address6 == a.address6
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

// bytesAcked is how many bytes the peer has acknowledged. A peer that has closed its socket acknowledges nothing, but resets.
func bytesAcked(raw syscall.RawConn) (n uint64) {
	control(raw, func(fd int) error {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err == nil {
			n = info.Bytes_acked
		}
		return err
	})
	return n
}

// ---------------------------------------------------------------------------------------------------------------------
// Wires
//
// What a request costs here is mostly system calls, so there are as few as can be: a wait for an answer begins with the question,
// not with a read that finds nothing (ask); requests are served inside the wait for the next (await), which therefore begins
// without such a read too. Both stand on RawConn.Read, which calls a function, waits for readability when that returns false,
// and calls it again. It forgets readiness that came before it began, so that only what a first read would not find may come then.
// Timers are moved only when they would fire too late; when they fire early, the wait goes on.

// wireIO is owned by whoever reads the wire, but for the timer.
type wireIO struct {
	fd       int         // while its use is safe without a lock: within answered and served; else 0
	asking   []byte      // what ask has not sent yet
	err      error       // of the last call of answered, filled or served
	alarm    *time.Timer // ends a parked client's idleness; nil = none
	carried  int         // bytes of the body or tunnel that is read; this and transfer are owned by whoever reads
	transfer bool        // counts in sockets.transfers
	writing  [3][]byte   // what write has not sent yet; this and writeErr are owned by whoever writes
	writeErr error       // of the last call of written

	answered, filled, served, written func(uintptr) bool // stored since a method value would be allocated at each wait

	mu    sync.Mutex
	until time.Time // when the wait for bytes is to end; zero = never; guarded by mu
	timer time.Time // when the timer fires; zero = never; guarded by mu
}

func (o *wireIO) prepare(w *wire) {
	o.answered, o.filled, o.written = w.readAnswer, w.readRest, w.writeNow
}

func (w *wire) readWithin(now time.Time, limit time.Duration) {
	o := &w.io
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.until = now.Add(limit); limit == 0 {
		o.until = time.Time{}
	}
	if w.coded { // a stream that was told of the end of its time has ended: the timer must not fire early
		w.tcp.SetReadDeadline(o.until)
	} else if limit != 0 && (o.timer.IsZero() || o.until.Before(o.timer)) {
		o.timer = o.until
		w.tcp.SetReadDeadline(o.timer)
	}
}

func (w *wire) firedEarly() bool {
	o := &w.io
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.until.IsZero() && !time.Now().Before(o.until) {
		return false
	}
	o.timer = o.until
	w.tcp.SetReadDeadline(o.timer)
	return true
}

func (w *wire) fill() error {
	for {
		w.makeRoom()
		had := w.w
		err := w.readSome()
		if w.w > had {
			return nil
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || w.coded || !w.firedEarly() {
			return err
		}
	}
}

func (w *wire) readSome() error {
	if !w.coded && w.raw != nil {
		return cmp.Or(w.raw.Read(w.io.filled), w.io.err)
	}
	n, err := w.tcp.Read(w.buf[w.w:])
	w.w += n
	return err
}

// readRest reads what is here of a message that is not whole. When that is nothing it acknowledges what came before at once: a peer
// that does not set TCP_NODELAY and sends head and body apart holds the body back until then (Nagle), and the kernel waits 40 ms for an
// answer to send the acknowledgement with. Measured for a POST, and for a GET of Python's http.server: 44 ms without this, 0.2 ms with it.
// It is set each time since it lasts until something is sent (tcp(7): TCP_QUICKACK), and not where a message begins: the answer is near.
func (w *wire) readRest(fd uintptr) bool {
	n, err := receiveNow(int(fd), w.buf[w.w:])
	if w.io.err = err; err == unix.EAGAIN {
		acknowledge(fd)
		return false
	} else if err == nil && n == 0 {
		w.io.err = io.EOF
	}
	w.w += n
	return true
}

// acknowledge is setsockopt(2), raw, as sendNow is. Should it fail, the kernel takes its time.
func acknowledge(fd uintptr) {
	now := int32(1)
	unix.RawSyscall6(unix.SYS_SETSOCKOPT, fd, unix.IPPROTO_TCP, unix.TCP_QUICKACK, uintptr(unsafe.Pointer(&now)), unsafe.Sizeof(now), 0)
}

func (w *wire) write(limit time.Duration, a, b, c []byte) error {
	if w.coded {
		return w.writeCoded(limit, a, b, c)
	}
	single := len(b) == 0 && len(c) == 0
	if single && w.io.fd > 0 {
		if a = a[sendNow(w.io.fd, a):]; len(a) == 0 {
			return nil
		}
	}
	w.tcp.SetWriteDeadline(deadline(limit))
	w.io.writing = [3][]byte{a, b, c}
	err := w.raw.Write(w.io.written)
	w.io.writing = [3][]byte{}
	return cmp.Or(err, w.io.writeErr)
}

// writeNow is writev(2), raw, as sendNow is. false: there is more than the socket takes now.
func (w *wire) writeNow(fd uintptr) bool {
	o := &w.io
	o.writeErr = nil
	for {
		var pieces [3]unix.Iovec
		n := 0
		for _, p := range o.writing {
			if len(p) > 0 {
				pieces[n].Base = &p[0]
				pieces[n].SetLen(len(p))
				n++
			}
		}
		if n == 0 {
			return true
		}
		r, _, e := unix.RawSyscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&pieces)), uintptr(n))
		switch e {
		case 0:
			o.wrote(int(r))
		case unix.EAGAIN:
			return false
		case unix.EINTR:
		default:
			o.writeErr = os.NewSyscallError("writev", e)
			return true
		}
	}
}

func (o *wireIO) wrote(n int) {
	for i, p := range o.writing {
		part := min(n, len(p))
		o.writing[i] = p[part:]
		n -= part
	}
}

func (w *wire) ask(limit time.Duration, p []byte) error {
	w.io.asking = p
	for {
		err := w.raw.Read(w.io.answered)
		if err == nil {
			err = w.io.err
		}
		if rest := w.io.asking; len(rest) > 0 && err == nil {
			w.io.asking = nil
			if err := w.write(limit, rest, nil, nil); err != nil {
				return err
			}
			return w.fill()
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || !w.firedEarly() {
			return err
		}
	}
}

// readAnswer sends the question at its first call and reads at the next.
func (w *wire) readAnswer(fd uintptr) bool {
	if len(w.io.asking) == 0 {
		return w.readNow(fd)
	}
	w.io.err = nil
	w.io.asking = w.io.asking[sendNow(int(fd), w.io.asking):]
	return len(w.io.asking) > 0
}

// sendNow sends what the socket takes, perhaps nothing, and leaves errors to be found by the write that follows then. It, and
// receiveNow, are send(2) and recv(2) rather than write(2) and read(2), which go through the kernel's file layer; raw, since a
// call that cannot block need not be announced to Go's scheduler.
func sendNow(fd int, p []byte) int {
	n, _, e := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
	if e != 0 {
		return 0
	}
	return int(n)
}

func receiveNow(fd int, p []byte) (int, error) {
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), unix.MSG_DONTWAIT, 0, 0)
		if e != unix.EINTR {
			return outcome(n, e)
		}
	}
}

// outcome is that of a raw system call, without an allocation when there was nothing to do.
func outcome(n uintptr, e syscall.Errno) (int, error) {
	switch e {
	case 0:
		return int(n), nil
	case unix.EAGAIN:
		return 0, unix.EAGAIN // boxed beforehand
	}
	return 0, e
}

// readNow reads what is here; false: nothing, and no buffer is held. An error or end is in io.err.
func (w *wire) readNow(fd uintptr) bool {
	w.makeRoom()
	var n int
	n, w.io.err = receiveNow(int(fd), w.buf[w.w:])
	switch {
	case w.io.err == unix.EAGAIN:
		w.drop()
		return false
	case w.io.err == nil && n == 0:
		w.io.err = io.EOF
	}
	w.w += n
	return true
}

// parkAfter is how long a client or a direction of a tunnel waits for bytes in a goroutine of its own. After that the watcher
// waits for it: a goroutine holds 4 to 8 kB for its stack, and many connections are idle for minutes.
const parkAfter = time.Second

func (c *client) await() (more, parked bool) {
	if c.coded {
		return c.awaitCoded(), false
	} else if c.io.served == nil {
		c.io.served = c.serveNow
	}
	c.now = time.Now()
	c.readWithin(c.now, c.patience())
	for {
		err := c.raw.Read(c.io.served)
		if err == nil {
			return !c.over && c.io.err == nil, false
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return false, false
		}
		if !c.firedEarly() { // where it cannot be parked, its time is over
			return false, c.patience() != c.srv.cfg.IdleTimeout && c.park()
		}
	}
}

// patience is how long the client's goroutine waits for a request.
func (c *client) patience() time.Duration {
	if idle := c.srv.cfg.IdleTimeout; idle > 0 && idle <= parkAfter {
		return idle
	}
	return parkAfter
}

// park has the watcher wait in the goroutine's place. When it returns true, the client is not the caller's any more.
func (c *client) park() bool {
	c.readBy(0)
	if idle := c.srv.cfg.IdleTimeout; idle > 0 {
		c.io.alarm = time.AfterFunc(idle-parkAfter, c.closeIdle)
	}
	c.mu.Lock()
	c.parked = true
	c.mu.Unlock()
	return c.srv.watcher.awaitReadable(&c.watch, c.raw, c) || !c.unpark()
}

func (c *client) unpark() (was bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	was, c.parked = c.parked, false
	return was
}

// wake is called by the watcher.
func (c *client) wake() {
	if c.unpark() {
		if c.io.alarm != nil {
			c.io.alarm.Stop()
		}
		go c.serve()
	}
}

// serveNow serves the requests that are here and to be read; false asks to be called again when there are more bytes. A read that
// did not fill its room found all there was: what comes later, also while step runs, calls again.
func (c *client) serveNow(fd uintptr) bool {
	c.idle.Store(false)
	c.io.fd = int(fd)
	defer func() { c.io.fd = 0 }()
	for {
		c.io.err = nil
		if c.buffered() > 0 && !c.step() {
			return true
		}
		if !c.readNow(fd) {
			return c.rest()
		}
		full := c.w == len(c.buf)
		if c.io.err != nil || !c.step() {
			return true
		}
		if !full && !c.hasLeft() {
			return c.rest()
		}
	}
}

// step serves the requests that are here as far as they need nothing more from the client, so that it can run inside the wait
// for that. It returns false when something is left to serve (left, or the beginning of a request), or nothing is to come (over).
func (c *client) step() bool {
	if !c.settled && c.speaksOther() {
		return false
	}
	for c.buffered() > 0 && !c.over {
		end, _, err := sectionEnd(c.unused(), 0)
		if end == 2 { // a stray empty line is no request (RFC 9112, 2.2)
			c.r += 2
			continue
		} else if end == 0 && err == nil {
			return false
		}
		x := c.newExchange()
		if x.failure = x.readRequest(); x.needsMore() {
			c.left = x
			return false
		}
		c.finish(x)
	}
	c.drop()
	c.over = c.over || c.srv.closing.Load()
	return !c.over
}

// needsMore reports whether more of the client's bytes are needed to serve the request.
func (x *exchange) needsMore() bool {
	return x.failure == nil && (x.connect || x.upgrades() || x.reqBody.framing == bodyChunked || x.reqBody.left > int64(x.c.buffered()))
}

// hasLeft reports whether the client's end is in the socket, where no further call would tell of it.
func (c *client) hasLeft() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gone
}

// rest notes that the client is between requests, and reports whether that is to end at once. Whoever wants to end it later, the
// watcher or the drain, sees idle and calls closeIdle.
func (c *client) rest() bool {
	c.readWithin(c.now, c.patience())
	c.idle.Store(true)
	if c.hasLeft() {
		c.endWait()
	}
	c.over = c.srv.closing.Load()
	return c.over
}

// ---------------------------------------------------------------------------------------------------------------------
// Hang-ups

// watcher is an epoll instance of its own on which connections are registered for the peer's end (EPOLLRDHUP), edge-
// triggered: one epoll_ctl(2) per connection, and nothing while bytes flow. Parked clients and tunnels are registered for bytes (EPOLLIN), once.
// It is itself waited for by Go's poller, so it costs no thread.
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
	sleeper    sleeper // to be woken instead
}

// sleeper is woken when there is something to read.
type sleeper interface{ wake() }

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
	w.watch(h, raw, slot{listener: l}, unix.EPOLLRDHUP|unix.EPOLLET)
}

// awaitReadable has s woken, once, when there is something to read. It returns false where that cannot be.
func (w *watcher) awaitReadable(h *watched, raw syscall.RawConn, s sleeper) bool {
	return w.watch(h, raw, slot{sleeper: s}, unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLONESHOT) == nil
}

// watch registers a connection, or changes what it is registered for.
func (w *watcher) watch(h *watched, raw syscall.RawConn, s slot, events uint32) error {
	op := unix.EPOLL_CTL_MOD
	w.mu.Lock()
	if !h.on {
		op = unix.EPOLL_CTL_ADD
		if n := len(w.free); n > 0 {
			h.place = w.free[n-1]
			w.free = w.free[:n-1]
		} else {
			h.place = int32(len(w.slots))
			w.slots = append(w.slots, slot{})
		}
		h.generation, h.on = w.slots[h.place].generation, true
	}
	s.generation = h.generation
	w.slots[h.place] = s
	event := unix.EpollEvent{Events: events, Fd: h.place, Pad: h.generation}
	w.mu.Unlock()
	err := control(w.raw, func(epfd int) error {
		return control(raw, func(fd int) error { return unix.EpollCtl(epfd, op, fd, &event) })
	})
	if err != nil && op == unix.EPOLL_CTL_ADD { // it may have been removed, and closed, meanwhile
		w.remove(h)
	}
	return err
}

// remove forgets a connection; the kernel does when its descriptor is closed.
func (w *watcher) remove(h *watched) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !h.on {
		return
	}
	h.on = false
	w.slots[h.place] = slot{generation: h.generation + 1}
	w.free = append(w.free, h.place)
}

// run tells listeners until the watcher is closed.
func (w *watcher) run() {
	events := make([]unix.EpollEvent, 128)
	var cycles uint64
	var timer *time.Timer
	timer = time.AfterFunc(never, func() { cycles = giveBack(cycles); timer.Reset(calm) })
	timer.Reset(calm) // not before timer is set, which the function reads
	defer timer.Stop()
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
			if s.generation != e.Pad {
				continue
			}
			if s.sleeper != nil {
				s.sleeper.wake()
			} else if s.listener != nil {
				s.listener.hungUp(e.Events&(unix.EPOLLERR|unix.EPOLLHUP) != 0)
			}
		}
	}
}

func (w *watcher) close() { w.file.Close() }

// calm is how long no garbage was collected when memory is given back.
const calm = 2 * time.Second

// giveBack returns to the system what a burst of connections has left behind: goroutines' stacks above all. Go would do so after
// its next garbage collection, but a process that has become idle may not have one for two minutes. It does nothing when there
// was one since cycles were counted, and returns the new count.
func giveBack(cycles uint64) uint64 {
	m := []metrics.Sample{{Name: "/gc/cycles/total:gc-cycles"}, {Name: "/memory/classes/heap/free:bytes"},
		{Name: "/memory/classes/heap/stacks:bytes"}, {Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(m)
	spare := int64(m[1].Value.Uint64()+m[2].Value.Uint64()) - int64(runtime.NumGoroutine())*8<<10
	if m[0].Value.Uint64() == cycles && spare > int64(2<<20+m[3].Value.Uint64()/4) {
		runtime.GC() // what a sync.Pool holds outlives one collection
		debug.FreeOSMemory()
		metrics.Read(m)
	}
	return m[0].Value.Uint64()
}

// hangupListener is told that its peer closed its sending side; reset: the whole connection.
type hangupListener interface{ hungUp(reset bool) }

// endWait ends the wait for a request of a client that is gone.
func (c *client) endWait() {
	if c.idle.CompareAndSwap(true, false) {
		c.tcp.CloseRead()
	}
}

// hungUp gives up what the client's goroutine waits for meanwhile: it would not notice while that lasts.
func (c *client) hungUp(reset bool) {
	c.mu.Lock()
	c.gone = true
	if !reset && c.tunnel == nil {
		c.graceLocked()
	}
	c.mu.Unlock()
	c.endWait()
	if reset {
		c.abandon()
	}
}

// hangupGrace is how long a client that has closed its sending side still gets for the answer it waits for. Whether it has left
// or only half-closed (`printf … | nc -N`) cannot be told without sending.
const hangupGrace = time.Second

func (c *client) graceLocked() {
	if !c.grace && !c.shut.Load() {
		c.grace, c.acked = true, bytesAcked(c.raw)
		time.AfterFunc(hangupGrace, c.abandonUnlessReading)
	}
}

// abandonUnlessReading ends that wait, or begins it anew when the client has taken bytes meanwhile.
func (c *client) abandonUnlessReading() {
	c.mu.Lock()
	before := c.acked
	c.acked = bytesAcked(c.raw)
	if c.grace = c.acked != before; c.grace {
		time.AfterFunc(hangupGrace, c.abandonUnlessReading)
	}
	stopped := !c.grace
	c.mu.Unlock()
	if stopped {
		c.abandon()
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
// Pool

// burstGrace is how long connections are kept that are more than the limits allow. With 1,024 clients and one origin up to a
// thousand come back between two requests: closing what is over 128 at once made each of those requests dial, at 90 times the cost.
const burstGrace = 250 * time.Millisecond

// idleList is the idle connections to one host and port.
type idleList []*upstream

// pool keeps idle connections to origins, by host and port, the youngest last: it is reused first.
type pool struct {
	limit, perHost int
	ttl            time.Duration

	mu     sync.Mutex
	hosts  map[string]*idleList // guarded by mu
	idle   int                  // in all lists; guarded by mu
	expiry *time.Timer          // runs expire; guarded by mu
	soon   bool                 // it does within burstGrace; guarded by mu
}

func newPool(cfg *config) *pool {
	p := &pool{limit: cfg.PoolIdle, perHost: cfg.PoolIdlePerHost, ttl: cfg.PoolIdleTimeout, hosts: map[string]*idleList{}}
	p.expiry = time.AfterFunc(time.Hour, p.expire)
	p.expire()
	return p
}

// get takes a connection that was dialled for key, or nil. A careful caller has it probed whatever its age.
func (p *pool) get(key []byte, now time.Time, careful bool) *upstream {
	for {
		p.mu.Lock()
		list := p.hosts[string(key)]
		if list == nil || len(*list) == 0 {
			p.mu.Unlock()
			return nil
		}
		up := p.removeLocked(list, len(*list)-1)
		p.mu.Unlock()
		// The watcher tells of an end, but not of a farewell (408) that would be taken for the answer to what comes next.
		if !up.hung.Load() && (!careful && !up.wary && now.Sub(up.since) < 100*time.Millisecond || isQuiet(up.raw)) {
			return up
		}
		up.close()
	}
}

// put keeps a connection for later, or closes it.
func (p *pool) put(up *upstream, now time.Time) {
	up.drop()
	p.mu.Lock()
	list := p.hosts[up.key]
	if list == nil {
		list = new(idleList)
		p.hosts[up.key] = list
	}
	keep := p.limit > 0 && p.perHost > 0
	if keep {
		up.since = now
		*list = append(*list, up)
		p.idle++
		if p.tooManyLocked(list) && !p.soon {
			p.soon = true
			p.expiry.Reset(burstGrace)
		}
	}
	p.mu.Unlock()
	if !keep || up.hung.Load() && p.remove(up) { // looked at last: the watcher may have come before it was idle
		up.close()
	}
}

func (p *pool) removeLocked(list *idleList, i int) *upstream {
	up := (*list)[i]
	*list = slices.Delete(*list, i, i+1)
	p.idle--
	return up
}

// remove takes up out if it is idle; then its caller owns it.
func (p *pool) remove(up *upstream) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := cmp.Or(p.hosts[up.key], new(idleList))
	i := slices.Index(*list, up)
	if i >= 0 {
		p.removeLocked(list, i)
	}
	return i >= 0
}

func (p *pool) size() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return int64(p.idle)
}

func (p *pool) tooManyLocked(list *idleList) bool { return p.idle > p.limit || len(*list) > p.perHost }

// expire closes connections that are idle for longer than POOL_IDLE_TIMEOUT, or for burstGrace where there are more than POOL_IDLE
// and POOL_IDLE_PER_HOST allow, and forgets hosts without any, again and again.
func (p *pool) expire() {
	var old []*upstream
	p.mu.Lock()
	next := max(10*time.Millisecond, min(cmp.Or(p.ttl/4, time.Minute), 5*time.Second))
	for key, list := range p.hosts {
		for len(*list) > 0 {
			age := time.Since((*list)[0].since)
			if !(p.ttl > 0 && age >= p.ttl || p.tooManyLocked(list) && age >= burstGrace) {
				break
			}
			old = append(old, p.removeLocked(list, 0))
		}
		if len(*list) == 0 {
			delete(p.hosts, key)
		} else if p.tooManyLocked(list) {
			next = min(next, burstGrace)
		}
	}
	if p.soon = next <= burstGrace; p.limit > 0 {
		p.expiry.Reset(next)
	}
	p.mu.Unlock()
	for _, up := range old {
		up.close()
	}
}

// close closes all idle connections; those in use are closed when they come back.
func (p *pool) close() {
	p.mu.Lock()
	p.limit = 0
	p.expiry.Stop()
	p.mu.Unlock()
	p.letGo()
}

// letGo closes all idle connections.
func (p *pool) letGo() {
	var all []*upstream
	p.mu.Lock()
	for _, list := range p.hosts {
		for len(*list) > 0 {
			all = append(all, p.removeLocked(list, len(*list)-1))
		}
	}
	p.mu.Unlock()
	for _, up := range all {
		up.close()
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Tunnels

// tunnel carries bytes both ways, each direction by itself, until both have ended (RFC 9110, 9.3.6). Bytes in either keep both alive.
type tunnel struct {
	x        summary // with the client's connection, which the tunnel owns, as it does up
	up       *upstream
	since    time.Time
	last     atomic.Int64 // when a byte last moved, in ns after since
	half     atomic.Bool  // one side has closed
	onward   direction    // to the origin
	backward direction    // to the client

	mu     sync.Mutex  // guards what follows
	timer  *time.Timer // runs tick
	open   int         // directions that have not ended
	reason string      // why it ended, or which side closed first
	ended  bool
}

// direction is carried by a goroutine, or parked: the watcher will wake it.
type direction struct {
	t        *tunnel
	dst, src *wire
	watch    *watched // of src
	closed   string   // the reason when src closes
	bytes    int64    // owned by carry
	parked   bool     // guarded by tunnel.mu
}

// relay hands x, its client's connection and up over to a tunnel.
func (x *exchange) relay(up *upstream) {
	if x.c.coded {
		x.relayBuffered(up)
		return
	}
	t := &tunnel{x: x.summary, up: up, since: time.Now(), open: 2}
	t.x.peer, t.x.version, t.x.attrs = up.peer, x.received(&x.req), nil
	x.line, x.dst.key = nil, nil // t has them
	c := x.c
	t.onward = direction{t: t, dst: &up.wire, src: &c.wire, watch: &c.watch, closed: "client_closed"}
	t.backward = direction{t: t, dst: &c.wire, src: &up.wire, watch: &up.watch, closed: "upstream_closed"}
	c.over, c.detached, c.under = true, true, nil // the exchange goes back
	c.tcp.SetWriteDeadline(time.Time{})           // that of the answer, or of an earlier request
	up.tcp.SetWriteDeadline(time.Time{})
	t.mu.Lock()
	at, _ := t.x.srv.cfg.tunnelEnd(t.since, t.since, false)
	t.timer = time.AfterFunc(min(parkAfter, at.Sub(t.since)), t.tick)
	t.mu.Unlock()
	if c.track(nil, nil, t) {
		t.end("drain")
	}
	c.srv.exchanges.Put(x)
	go t.backward.carry()
	t.onward.carry() // in the goroutine of client.serve
}

// carry moves bytes until src has been idle for a while, or ends: that is passed on.
func (d *direction) carry() {
	defer func() {
		if p := recover(); p != nil { // ends this tunnel alone
			d.t.x.srv.logPanic(p)
			d.src.rested()
			d.t.end("internal_error")
			d.t.leave()
		}
	}()
	for {
		m := move{dst: d.dst, src: d.src, limit: math.MaxInt64, moved: d.moved}
		n, err := m.run()
		d.src.rested()
		d.bytes += n
		if !m.readFailed || !errors.Is(err, os.ErrDeadlineExceeded) {
			d.over(err)
			return
		}
		d.src.tcp.SetReadDeadline(time.Time{}) // tick found it idle
		if d.park() {
			return
		}
	}
}

// over ends the direction.
func (d *direction) over(err error) {
	t := d.t
	if err == io.ErrUnexpectedEOF {
		t.mu.Lock()
		t.reason = cmp.Or(t.reason, d.closed)
		first := t.reason
		t.mu.Unlock()
		t.touch()
		t.half.Store(true)
		if d.dst.tcp.CloseWrite() != nil {
			t.end(first)
		}
		t.tick() // the other direction has less patience now
	} else { // passed on as what it is: neither side shall take what it got for everything
		d.src.tcp.SetLinger(0)
		d.dst.tcp.SetLinger(0)
		t.end("connection_error")
	}
	t.leave()
}

// end ends the tunnel; the first reason to do so stays.
func (t *tunnel) end(reason string) {
	t.mu.Lock()
	if t.ended {
		t.mu.Unlock()
		return
	}
	t.ended, t.reason = true, reason
	t.mu.Unlock()
	t.up.tcp.Close()
	t.x.c.tcp.Close()
	for _, d := range []*direction{&t.onward, &t.backward} {
		if d.unpark() {
			t.leave()
		}
	}
}

// leave takes note that a direction has ended. With the second the tunnel is over.
func (t *tunnel) leave() {
	t.mu.Lock()
	t.open--
	over := t.open == 0
	t.ended = t.ended || over
	t.mu.Unlock()
	if !over {
		return
	}
	t.timer.Stop()
	t.x.end, t.x.upBytes, t.x.downSize, t.x.closed = time.Now(), t.onward.bytes, t.backward.bytes, t.reason
	t.x.srv.limits.tunnels.add(struct{}{}, -1)
	t.x.record(nil)
	t.up.close()
	t.x.c.end()
}

func (d *direction) moved(n int) {
	d.t.touch()
	d.t.x.srv.metrics.moved(n, d == &d.t.backward)
}

func (t *tunnel) touch() { t.last.Store(int64(time.Since(t.since))) }

// tick ends a tunnel whose time is over, and has directions park that wait in vain.
func (t *tunnel) tick() {
	now := time.Now()
	last := time.Duration(t.last.Load())
	at, reason := t.x.srv.cfg.tunnelEnd(t.since, t.since.Add(last), t.half.Load())
	if !now.Before(at) {
		t.end(reason)
		return
	}
	quiet := now.Sub(t.since)-last >= parkAfter
	next := at.Sub(now)
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, d := range []*direction{&t.onward, &t.backward} {
		if !d.parked {
			next = min(next, parkAfter)
		}
		if !d.parked && quiet {
			d.src.tcp.SetReadDeadline(time.Unix(1, 0))
		}
	}
	if !t.ended {
		t.timer.Reset(next)
	}
}

func (d *direction) park() bool {
	t := d.t
	d.src.drop()
	t.mu.Lock()
	ended := t.ended
	d.parked = !ended
	t.mu.Unlock()
	if ended {
		t.leave()
		return true
	}
	return t.x.srv.watcher.awaitReadable(d.watch, d.src.raw, d) || !d.unpark()
}

func (d *direction) unpark() bool {
	d.t.mu.Lock()
	defer d.t.mu.Unlock()
	was := d.parked
	d.parked = false
	return was
}

// wake is called by the watcher.
func (d *direction) wake() {
	if d.unpark() {
		d.t.touch()
		d.t.tick()
		go d.carry()
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Splice

// The first pipes are as large as an unprivileged process may have them, which saves 7% of what bytes cost; the others have what the
// kernel gives. Together the large ones are half of what one user may have (pipe(7): pipe-max-size, pipe-user-pages-soft): past
// that new pipes would hold 8 kB only.
const (
	pipeSize   = 1 << 20
	largePipes = 32
)

// move is one transfer of bytes from a wire to another; run does it.
type move struct {
	dst, src   *wire
	limit      int64         // most bytes to move
	beforeRead func()        // called before each wait, to set its deadline; nil = there is none, or it is set by others
	patience   time.Duration // for each piece to be taken by dst, 0 = any
	moved      func(n int)   // called when n bytes have moved
	readFailed bool          // set when the error is that of src
}

// mayRetry reports whether what err stopped is to be tried again, since the deadline was not that of beforeRead.
func (m *move) mayRetry(err error) bool {
	return m.beforeRead != nil && errors.Is(err, os.ErrDeadlineExceeded) && m.src.firedEarly()
}

func (m *move) armWrite() {
	if m.patience > 0 {
		m.dst.tcp.SetWriteDeadline(deadline(m.patience))
	}
}

func (m *move) count(n int) {
	m.moved(n)
	m.src.passed(n)
}

// flush moves what is buffered of src, up to limit bytes.
func (m *move) flush(limit int64) (int64, error) {
	piece := m.src.take(limit)
	if len(piece) == 0 {
		return 0, nil
	}
	m.armWrite()
	n, err := m.dst.tcp.Write(piece)
	m.count(n)
	return int64(n), err
}

func (o *bodyWriter) splice(b *body, beforeRead func()) (readErr, writeErr error) {
	m := move{dst: o.dst, src: b.w, limit: b.left, beforeRead: beforeRead, patience: o.limit, moved: b.count}
	n, err := m.run()
	b.size += n
	b.left -= n
	if m.readFailed {
		return err, nil
	}
	return nil, err
}

// run moves messages through a buffer (pass) and a flow, of which more comes at once than a buffer holds, through a pipe. Either is
// held only while there is something to move.
func (m *move) run() (int64, error) {
	s := &splicer{move: m, flow: !m.endless()}
	defer s.dropPipe()
	in, out := s.in, s.out // stored: a method value would be allocated at each wait
	s.push = s.pushNow
	var err error
	for again := false; s.total < m.limit && err == nil; {
		reading := false
		switch {
		case m.src.buffered() > 0:
			var n int64
			n, err = m.flush(m.limit - s.total)
			s.total += n
		case s.held > 0:
			m.armWrite()
			err = m.dst.raw.Write(out)
		default:
			reading = true
			m.src.drop()
			if m.beforeRead != nil && !again { // each time: a deadline may pass while there is always something to read, but dst is slow
				m.beforeRead()
			}
			err = m.src.raw.Read(in)
		}
		if err == nil {
			err, s.err = s.err, nil
		}
		again = false
		if m.readFailed = reading && err != nil; m.readFailed && m.mayRetry(err) {
			err, again = nil, true
		}
	}
	if m.src.buffered() == 0 {
		m.src.drop()
	}
	return s.total, err
}

// endless tells a tunnel's bytes from a body's.
func (m *move) endless() bool { return m.limit == math.MaxInt64 }

// splicer is one run of a move.
type splicer struct {
	*move
	pipe  *[2]int
	held  int                // bytes in the pipe
	last  int                // bytes that came into it last
	total int64              // bytes moved
	flow  bool               // src sends more at once than a buffer holds
	err   error              // of the last call of in or out
	push  func(uintptr) bool // pushNow
}

// pass moves messages that are here; false asks to be called again when src is readable. It reads until there is nothing, also after
// a read that did not fill its room: an end that came with the last bytes is told of by no further call. What dst does not take at
// once is left to flush.
func (s *splicer) pass(fd uintptr) bool {
	w := s.src
	for w.readNow(fd) {
		if s.err = w.io.err; s.err != nil {
			if s.err == io.EOF {
				s.err = io.ErrUnexpectedEOF
			}
			return true
		}
		s.flow = w.w == len(w.buf) || !s.endless() // each read of a body has its deadline
		s.dst.raw.Write(s.push)
		if w.buffered() > 0 || s.flow {
			return true
		}
	}
	return false
}

// pushNow sends what dst takes of what is buffered; an error is found again by flush.
func (s *splicer) pushNow(fd uintptr) bool {
	p := s.src.unused()
	n := sendNow(int(fd), p[:min(int64(len(p)), s.limit-s.total)])
	s.src.r += n
	s.total += int64(n)
	s.count(n)
	return true
}

// in reads into the pipe, or passes a message; false asks to be called again when src is readable.
func (s *splicer) in(fd uintptr) bool {
	if !s.flow || !s.takePipe() {
		return s.pass(fd)
	}
	n, err := splice(int(fd), s.pipe[1], int(min(s.limit-s.total, pipeSize)))
	switch {
	case err == unix.EAGAIN:
		s.dropPipe()
		s.flow = s.last >= bufferSize || !s.endless()
		return false
	case err != nil:
		s.err = os.NewSyscallError("splice", err)
	case n == 0:
		s.err = io.ErrUnexpectedEOF
	}
	s.held, s.last = n, n
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
	s.count(n)
	return true
}

// splice moves what is there, without blocking: raw, as sendNow is.
func splice(from, to, most int) (int, error) {
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(most), unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		if e != unix.EINTR {
			return outcome(n, e)
		}
	}
}

// takePipe takes a pipe from the list or makes one; false: there is no descriptor left.
func (s *splicer) takePipe() bool {
	if s.pipe != nil {
		return true
	}
	k := &s.src.srv.sockets
	k.stir()
	k.mu.Lock()
	defer k.mu.Unlock()
	if n := len(k.pipes); n > 0 {
		s.pipe = k.pipes[n-1]
		k.pipes = k.pipes[:n-1]
		return true
	}
	p := new([2]int)
	if k.open >= k.most || unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK) != nil {
		return false
	} else if max(p[0], p[1]) >= k.reserved {
		unix.Close(p[0])
		unix.Close(p[1])
		return false
	}
	if k.open++; k.open <= k.large {
		unix.FcntlInt(uintptr(p[1]), unix.F_SETPIPE_SZ, pipeSize) // may be refused, which does no harm
	}
	s.pipe = p
	return true
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
	k.open--
	unix.Close(p[0])
	unix.Close(p[1])
}

// close closes what is kept.
func (s *sockets) close() {
	if s.heldMost > 0 {
		s.looking.Lock()
		unix.Close(s.held)
		unix.Close(s.stat)
		s.held, s.stat = -1, -1 // for whoever looks yet
		s.looking.Unlock()
	}
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

// maxFiles is the most descriptors taken unasked: some container engines set a limit of a billion, and what is sized by it
// follows.
const maxFiles = 1 << 20

// reservedFiles is how many descriptors connections leave for the admin listener, resolvers and files, at most.
const reservedFiles = 32

// usualConns is how many clients descriptors should be enough for where MAX_CONNS says nothing.
const usualConns = 1000

// system is what checks judge by.
type system struct {
	cfg         *config
	log         *slog.Logger // is told what was written
	files, cpus int          // in force: the descriptor limit, GOMAXPROCS
	shared      bool         // the network is the host's
}

// place is where a setting is changed. What is the network namespace's own is changed when the container is made, or from within where that may write.
type place string

const (
	byNamespace   place = "sysctls of the container"
	byContainer   place = "limits of the container"
	byEnvironment place = "environment"
	byHost        place = "host"
)

// check is a setting: how it is read, what is wanted of it and why.
type check struct {
	setting string
	where   place
	mend    string                          // a line of compose.yaml, with %s for the value
	read    func(k *system) (string, error) // nil: the sysctl of that name
	judge   func(k *system, found string) demand
	why     string // measured, or with its source
}

// demand is what is wanted of a setting: in words, the value to set, and what that makes of what was found.
type demand struct{ wanted, value, verdict string }

// demanded is met when ok is true; when not, verdict says what that means.
func demanded(ok bool, verdict, wanted string, value any) demand {
	if ok {
		return demand{wanted, "", verdictOK}
	}
	return demand{wanted, fmt.Sprint(value), verdict}
}

// checks are the settings that decide how many connections can wait or be open, and how fast they are. Where a kernel's default will do it is
// wanted, so that what falls short does so for a reason.
func checks() []check {
	const ownKeepAlive = "Sluice sets its own on each connection: 30 s, then every 15 s"
	const buffers = "no more is on its way in one connection: 4 MiB are 335 Mbit/s at most over 100 ms"
	const quic = "HTTP/3: quic-go asks for 7 MiB, since bursts that find less room are lost (its wiki, UDP Buffer Sizes)"
	return []check{
		{"RLIMIT_NOFILE", byContainer, "ulimits: {nofile: %s}", (*system).readFiles, (*system).judgeFiles,
			"a client and its origin take a descriptor each, and an eighth of all is for pipes. A rootless engine gives no more than its own hard limit"},
		{"fs.nr_open", byHost, "", nil, (*system).judgeAllFiles, "RLIMIT_NOFILE cannot be above it (getrlimit(2))"},
		{"fs.file-max", byHost, "", nil, (*system).judgeAllFiles, "all processes of the machine have no more together (proc_sys_fs(5))"},
		{"fs.pipe-user-pages-soft", byHost, "", nil, judgePipes, "pipes carry tunnels: beyond it those of a user id, in all containers together, hold a page or two each (pipe(7))"},
		{"net.core.somaxconn", byNamespace, "", nil, (*system).judgeBacklog,
			"it is the backlog of each listener. Connections that find it full try again after 1 s: of 1,000 at once 871 did with 128, none with 4096"},
		{"net.ipv4.tcp_syncookies", byNamespace, "", nil, least(1), "without them a flood of SYNs keeps clients out (RFC 4987, 3.6)"},
		{"net.ipv4.tcp_max_syn_backlog", byNamespace, "", nil, (*system).judgeHandshakes, "it bounds handshakes under way where SYN cookies are off, and only there (tcp_conn_request in tcp_input.c)"},
		{"net.ipv4.ip_local_port_range", byNamespace, "", nil, (*system).judgePorts, "each connection to one address and port of an origin takes a port"},
		{"net.ipv4.ip_local_reserved_ports", byNamespace, "", readReserved, (*system).judgeReserved,
			"a connection to an origin is given any other port of ip_local_port_range, and while it lasts nothing can listen there: a start fails with EADDRINUSE"},
		{"net.ipv4.ip_forward", byNamespace, "", nil, (*system).judgeForwarding,
			"a namespace begins with the host's value, which Docker makes 1: a container on two networks then passes packets on between them, around Sluice"},
		{"net.ipv4.tcp_tw_reuse", byNamespace, "", nil, advised("1"),
			"a port stays taken for 60 s after a connection that Sluice has ended first. With 1 another may have it after 1 s, with 2 on loopback alone (ip-sysctl.rst): so 100 ports bear 400 connections in 4 s, else 100"},
		{"net.ipv4.tcp_fin_timeout", byNamespace, "", nil, atMost(60), "what Sluice has closed and its peer has not is kept for so long (tcp(7)). Ports in TIME-WAIT stay taken for 60 s whatever it says"},
		{"net.ipv4.tcp_keepalive_time", byNamespace, "", nil, anything, ownKeepAlive},
		{"net.ipv4.tcp_keepalive_intvl", byNamespace, "", nil, anything, ownKeepAlive},
		{"net.ipv4.tcp_keepalive_probes", byNamespace, "", nil, atMost(9), "a peer that is gone and idle is given up after 30 s and 15 s for each"},
		{"net.ipv4.tcp_rmem", byNamespace, "", nil, judgeBuffers, buffers},
		{"net.ipv4.tcp_wmem", byNamespace, "", nil, judgeBuffers, buffers},
		{"net.core.rmem_max", byHost, "", readReceive, (*system).judgeDatagrams, quic},
		{"net.core.wmem_max", byHost, "", readSend, (*system).judgeDatagrams, quic},
		{"net.ipv4.tcp_migrate_req", byNamespace, "", nil, advised("1"),
			"for restarts: connections that wait at a listener that closes go to the process that takes over (ip-sysctl.rst): 7,000 restarts lost 2 of 1.2 million requests"},
		{"net.ipv4.tcp_congestion_control", byNamespace, "", nil, judgeCongestion, "for what is sent to origins: cubic is the standard (RFC 9438), bbr slows down less where packets get lost. Here those of tcp_allowed_congestion_control can be set"},
		{"net.netfilter.nf_conntrack_max", byHost, "", nil, (*system).judgeTracking, "where connections are tracked, each takes an entry on either side, and with none left packets are dropped (nf_conntrack_core.c). Entries are counted per network: those of the host show there"},
		{"cgroup pids.max", byContainer, "pids_limit: %s # or deploy.resources.limits.pids, where that is set", readThreads, (*system).judgeThreads,
			"on two CPUs 7 threads serve, and `sluice health` needs its own; where one cannot be made the process ends"},
		{"cgroup memory.max", byContainer, "mem_limit: %s # or deploy.resources.limits.memory, where that is set", readMemory, (*system).judgeMemory, "64 MiB bear floods of clients, a test shows; a busy connection takes up to 64 KiB"},
		{"cgroup cpu.max", byEnvironment, "environment: {GOMAXPROCS: %q}", (*system).readCPU, (*system).judgeCPU,
			"threads beyond the quota use it up early, and all wait for the next period (sched-bwc.rst). Go keeps to it, with two at least, unless GOMAXPROCS is set"},
		{"IPv6 route", byHost, "# on the host: %s", readRoute, judgeRoute, "origins that have no IPv4 address are out of reach without one"},
	}
}

// examine looks at each setting. With apply it first writes those of the network namespace that are not as wanted, as far as it may.
func (k *system) examine(apply bool) (all []finding) {
	for _, c := range checks() {
		if c.read == nil {
			c.read = func(*system) (string, error) { return readSysctl(c.setting) }
		}
		f, value := k.look(&c)
		if apply && c.where == byNamespace && value != "" {
			f = k.write(&c, f.Found, value)
		}
		all = append(all, f)
	}
	return all
}

// write sets what was found to be before, and looks again. Change tells who is left to change it when it may not.
func (k *system) write(c *check, before, value string) finding {
	err := os.WriteFile(sysctlFile(c.setting), []byte(value), 0o644)
	f, _ := k.look(c)
	about := []any{"setting", f.Setting, "before", before, "found", f.Found, "wanted", f.Wanted}
	if err != nil {
		f.Change = string(k.place(c)) + ", since it cannot be written: " + cause(err)
		k.log.Info("kernel setting cannot be written", append(about, logMessage, cause(err))...)
		return f
	}
	f.Before = before
	k.log.Info("kernel setting written", about...)
	return f
}

// hasHostNetwork reports whether this is the initial network namespace, which alone shows some settings (sysctl_net_core.c). There an engine
// takes no sysctls of the network: a container that asks for them does not start.
func hasHostNetwork() bool {
	_, err := os.Stat(sysctlFile("net.core.netdev_max_backlog"))
	return err == nil
}

// place is where a setting is changed.
func (k *system) place(c *check) place {
	if c.where == byNamespace && k.shared {
		return byHost
	}
	return c.where
}

// look reads a setting and judges it. What is to be set is empty where it is as wanted or could not be read.
func (k *system) look(c *check) (f finding, value string) {
	f = finding{Setting: c.setting, Change: string(k.place(c)), Why: c.why}
	found, err := c.read(k)
	if err != nil {
		f.Found, f.Verdict = "cannot be read: "+cause(err), verdictUnknown
		return f, ""
	}
	d := c.judge(k, found)
	f.Found, f.Wanted, f.Verdict = cmp.Or(found, "none"), d.wanted, d.verdict
	if c.where == byNamespace && unix.Faccessat(unix.AT_FDCWD, sysctlFile(c.setting), unix.W_OK, unix.AT_EACCESS) == nil {
		f.Change = "here, by SLUICE_TUNE=apply"
		if k.place(c) == byHost {
			f.Change += ", for the whole host"
		}
	}
	switch {
	case d.value == "":
	case c.mend != "":
		f.Mend = fmt.Sprintf(c.mend, d.value)
	case k.place(c) == byNamespace:
		f.Mend = fmt.Sprintf("sysctls: {%s: %q}", c.setting, d.value)
	case strings.Contains(d.value, " "):
		f.Mend = fmt.Sprintf("# on the host: sysctl -w %s=%q", c.setting, d.value)
	default:
		f.Mend = fmt.Sprintf("# on the host: sysctl -w %s=%s", c.setting, d.value)
	}
	return f, d.value
}

// cause is an error without what it happened to.
func cause(err error) string {
	if e, ok := errors.AsType[*os.PathError](err); ok {
		err = e.Err
	}
	return err.Error()
}

func sysctlFile(name string) string { return "/proc/sys/" + strings.ReplaceAll(name, ".", "/") }

func readSysctl(name string) (string, error) { return readSetting(sysctlFile(name)) }

// readSetting reads a file of one line, with white space made one space each.
func readSetting(path string) (string, error) {
	b, err := os.ReadFile(path)
	return strings.Join(strings.Fields(string(b)), " "), err
}

// number is the n-th number of a setting, 0 where there is none.
func number(setting string, n int) int64 {
	fields := strings.Fields(setting)
	if n >= len(fields) {
		return 0
	}
	v, _ := strconv.ParseInt(fields[n], 10, 64) // beyond 1<<63 it is 1<<63 - 1
	return v
}

func anything(*system, string) demand { return demanded(true, "", "any", "") }

func least(n int64) func(*system, string) demand {
	return func(_ *system, found string) demand {
		return demanded(number(found, 0) >= n, verdictShort, fmt.Sprint("at least ", n), n)
	}
}

// advised is a value that helps in the case that the check tells of.
func advised(value string) func(*system, string) demand {
	return func(_ *system, found string) demand { return demanded(found == value, verdictAdvice, value, value) }
}

func (k *system) readFiles() (string, error) { return strconv.Itoa(k.files), nil }

// filesWanted is what connLimit makes MAX_CONNS of, and not less than NOFILE.
func filesWanted(cfg *config) int64 {
	n := int64(cfg.MaxConns)
	if n == 0 && cfg.NOFILE == 0 {
		n = usualConns
	}
	return max(int64(cfg.NOFILE), (2*n+64)*8/7+1)
}

func (k *system) judgeAllFiles(found string) demand { return least(filesWanted(k.cfg))(k, found) }

// judgeFiles asks for nothing above fs.nr_open: with a higher limit a container does not start.
func (k *system) judgeFiles(found string) demand {
	d := k.judgeAllFiles(found)
	if most, err := readSysctl("fs.nr_open"); err == nil && number(most, 0) < filesWanted(k.cfg) {
		d.value = ""
	}
	return d
}

// judgePipes wants the kernel's default: the pipes of sockets.large take half of it. 0 = no limit.
func judgePipes(_ *system, found string) demand {
	n := number(found, 0)
	return demanded(n == 0 || n >= 16384, verdictAdvice, "at least 16384", 16384)
}

// judgeBacklog wants the kernel's default since 5.4, or what lets every client come at once.
func (k *system) judgeBacklog(found string) demand {
	return least(int64(min(cmp.Or(k.cfg.MaxConns, 4096), 4096)))(k, found)
}

func (k *system) judgeHandshakes(found string) demand {
	if cookies, err := readSysctl("net.ipv4.tcp_syncookies"); err == nil && number(cookies, 0) > 0 {
		return demanded(true, "", "any, with SYN cookies", "")
	}
	return least(4096)(k, found)
}

func (k *system) judgePorts(found string) demand {
	need := min(int64(cmp.Or(k.cfg.MaxConnsPerHost, k.cfg.MaxConns, 28000)), 65536-10240) // of the kernel's default there are 28,232
	return demanded(number(found, 1)-number(found, 0)+1 >= need, verdictShort, fmt.Sprintf("at least %d ports", need), "10240 65535")
}

// readReserved reads with a buffer for a list of every other port: the kernel tells what one read has room for and no more
// (proc_do_large_bitmap in sysctl.c). What is written replaces the list, so a part of it would not do.
func readReserved(*system) (string, error) {
	file, err := os.Open(sysctlFile("net.ipv4.ip_local_reserved_ports"))
	if err != nil {
		return "", err
	}
	defer file.Close()
	b := make([]byte, 256<<10)
	n, err := file.Read(b)
	if err == io.EOF {
		err = nil
	}
	return strings.TrimSpace(string(b[:n])), err
}

// judgeReserved wants the ports that are listened on to be kept out of ip_local_port_range, of the one that judgePorts asks for, too: what
// mends one setting is not to let another fall short.
func (k *system) judgeReserved(found string) demand {
	var reserved portSet
	reserved.UnmarshalText([]byte(found))
	given, err := readSysctl("net.ipv4.ip_local_port_range")
	asked := cmp.Or(k.judgePorts(given).value, given)
	ports := strings.FieldsFunc(found, func(r rune) bool { return r == ',' })
	there := len(ports)
	for _, addr := range append(slices.Clone(k.cfg.Listen), k.cfg.Admin) {
		_, port, _ := net.SplitHostPort(addr)
		p, _ := strconv.ParseUint(port, 10, 16)
		ranged := inRange(int64(p), given) || inRange(int64(p), asked)
		if p > 0 && err == nil && ranged && !reserved.has(uint16(p)) && !slices.Contains(ports, port) {
			ports = append(ports, port)
		}
	}
	wanted := "any, no port listened on is in the range"
	if err != nil {
		wanted = "any, since the range cannot be read"
	} else if len(ports) > 0 {
		wanted = strings.Join(ports, ",")
	}
	return demanded(len(ports) == there, verdictShort, wanted, wanted)
}

func inRange(n int64, ends string) bool { return number(ends, 0) <= n && n <= number(ends, 1) }

// judgeForwarding leaves a host alone, which may have to forward, and a container that has nowhere to forward to.
func (k *system) judgeForwarding(found string) demand {
	links, _ := net.Interfaces()
	links = slices.DeleteFunc(links, func(l net.Interface) bool { return l.Flags&net.FlagLoopback != 0 || l.Flags&net.FlagUp == 0 })
	if k.shared || len(links) < 2 {
		return demanded(true, "", "any, on one network or on a host", "")
	}
	return demanded(found == "0", verdictAdvice, "0", 0)
}

func atMost(n int64) func(*system, string) demand {
	return func(_ *system, found string) demand {
		return demanded(number(found, 0) <= n, verdictAdvice, fmt.Sprint("at most ", n), n)
	}
}

func judgeBuffers(_ *system, found string) demand {
	return demanded(number(found, 2) >= 4<<20, verdictAdvice, "a maximum of 4194304", fmt.Sprint(number(found, 0), number(found, 1), 4<<20))
}

func readReceive(*system) (string, error) { return largestBuffer(unix.SO_RCVBUF) }
func readSend(*system) (string, error)    { return largestBuffer(unix.SO_SNDBUF) }

// largestBuffer has a socket of UDP tell, since a namespace may not show the file: of what is asked for it is given the most there may be,
// doubled (socket(7)).
func largestBuffer(option int) (string, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, math.MaxInt32/2)
	n, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, option)
	return strconv.Itoa(n / 2), err
}

func (k *system) judgeDatagrams(found string) demand {
	if !k.cfg.HTTP3 {
		return demanded(true, "", "any, without SLUICE_HTTP3", "")
	}
	return least(7<<20)(k, found)
}

// judgeCongestion asks for what a namespace may set: anything else is EPERM outside the initial one since 5.13 (tcp_cong.c), and keeps a
// container from starting. Before 5.7 a namespace does not show what it may.
func judgeCongestion(_ *system, found string) demand {
	good, value := []string{"cubic", "bbr"}, ""
	allowed, _ := readSysctl("net.ipv4.tcp_allowed_congestion_control")
	if i := slices.IndexFunc(good, func(name string) bool { return slices.Contains(strings.Fields(allowed), name) }); i >= 0 {
		value = good[i]
	}
	return demanded(slices.Contains(good, found), verdictAdvice, "cubic or bbr", value)
}

// judgeTracking wants an entry on either side for each client, and a quarter of all free. 0 = no limit.
func (k *system) judgeTracking(found string) demand {
	most, need := number(found, 0), 2*int64(k.cfg.MaxConns)
	count, err := readSysctl("net.netfilter.nf_conntrack_count")
	wanted := "a quarter free"
	if need > 0 {
		wanted = fmt.Sprintf("at least %d, %s", need, wanted)
	}
	if err == nil {
		wanted += ": " + count + " are taken here"
	}
	return demanded(most == 0 || most >= need && number(count, 0) <= most/4*3, verdictShort, wanted, 2*max(most, need/2))
}

func readThreads(*system) (string, error) {
	n, err := cgroupLimit("pids", "pids.max")
	return limit(n, ""), err
}

func (k *system) judgeThreads(found string) demand {
	need := int64(32 + 4*k.cpus)
	n := number(found, 0)
	return demanded(n == 0 || n >= need, verdictShort, fmt.Sprint("at least ", need), need)
}

func readMemory(*system) (string, error) {
	n, err := cgroupMemory()
	return limit(n>>20, " MiB"), err
}

// cgroupMemory is the limit of the container's memory in bytes, 0 where there is none.
func cgroupMemory() (int64, error) {
	return cgroupLimit("memory", "memory.max", "memory.limit_in_bytes")
}

func (k *system) judgeMemory(string) demand {
	need := max(64<<20, int64(k.cfg.MaxConns)*connMemory+reservedMemory, int64(k.cfg.MemoryLimit)+reservedMemory)
	need = (need + 1<<20 - 1) >> 20
	n, _ := cgroupMemory()
	return demanded(n == 0 || n>>20 >= need, verdictShort, fmt.Sprintf("at least %d MiB", need), fmt.Sprintf("%dm", need))
}

func (k *system) readCPU() (string, error) {
	quota, err := cgroupQuota()
	if quota == 0 {
		return fmt.Sprintf("no quota, GOMAXPROCS %d", k.cpus), err
	}
	return fmt.Sprintf("%.3g CPUs, GOMAXPROCS %d", quota, k.cpus), err
}

func (k *system) judgeCPU(string) demand {
	quota, _ := cgroupQuota()
	if quota == 0 {
		return demanded(true, "", "any, without a quota", "")
	}
	most := max(2, int(math.Ceil(quota)))
	return demanded(k.cpus <= most, verdictShort, fmt.Sprint("GOMAXPROCS at most ", most), most)
}

// readRoute looks for a default route: destination ::/0, up, not one that rejects.
func readRoute(*system) (string, error) {
	text, err := os.ReadFile("/proc/self/net/ipv6_route") // as /proc/net, which not every container shows
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) == 10 && f[1] == "00" { // the length of its prefix
			if flags, err := strconv.ParseUint(f[8], 16, 32); err == nil && flags&unix.RTF_UP != 0 && flags&unix.RTF_REJECT == 0 {
				return "by " + f[9], nil
			}
		}
	}
	return "", err
}

func judgeRoute(_ *system, found string) demand {
	return demanded(found != "", verdictAdvice, "a default route", "IPv6 for the container's network (enable_ipv6: true)")
}

// tuneKernel raises the descriptor limit, sets the heap's, and examines the kernel's settings.
func tuneKernel(cfg *config, log *slog.Logger) []finding {
	raiseFiles(cfg)
	limitMemory(int64(cfg.MemoryLimit))
	if cfg.Tune == "off" {
		return nil
	}
	k := system{cfg, log, openFiles(), runtime.GOMAXPROCS(0), hasHostNetwork()}
	findings := k.examine(cfg.Tune == "apply")
	for _, f := range findings {
		about := []any{"setting", f.Setting, "found", f.Found, "wanted", f.Wanted, "verdict", f.Verdict, "why", f.Why, "change", f.Change, "mend", f.Mend}
		if f.Verdict == verdictShort {
			log.Warn("kernel setting falls short", about...)
		} else {
			log.Debug("kernel setting", about...)
		}
	}
	return findings
}

// raiseFiles sets the descriptor limit to NOFILE, as far as the hard limit and CAP_SYS_RESOURCE go, or where that is 0 to the hard limit.
func raiseFiles(cfg *config) {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return
	}
	asked := uint64(cmp.Or(int64(cfg.NOFILE), max(maxFiles, filesWanted(cfg))))
	if cfg.NOFILE > 0 && asked > limit.Max && unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: asked, Max: asked}) == nil {
		return
	}
	limit.Cur = min(limit.Max, asked)
	unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
}

func openFiles() int {
	var limit unix.Rlimit
	unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
	return int(min(limit.Cur, math.MaxInt32)) // no more than maxFiles, unless SLUICE_NOFILE or SLUICE_MAX_CONNS asks for them
}

// reservedMemory is what of a container's memory is for the program's text, what the kernel needs, and what the heap exceeds its limit by while
// garbage comes faster than it can be collected: floods in 64 MiB, beside three busy loops, had it take up to 65 MB with 16 MiB less, 54 with 24.
const reservedMemory = 24 << 20

// limitMemory sets the heap's soft limit to want, or when want is 0 to 90% of the cgroup's limit, less by reservedMemory at least.
func limitMemory(want int64) {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	if want == 0 {
		want, _ = cgroupMemory()
		want = max(want/2, want-max(want/10, reservedMemory))
	}
	if want > 0 {
		debug.SetMemoryLimit(want)
		unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0) // a huge page counts until all of it is given back: 62 MB of a heap of 45 MB, and the end
	}
}

// cgroupLimit is the least limit that a controller sets this process's cgroup and those above it, 0 where there is none. It is in one of files
// (cgroups(7), versions 2 and 1).
func cgroupLimit(controller string, files ...string) (least int64, err error) {
	dirs, err := cgroups(controller)
	for _, dir := range dirs {
		for _, file := range files {
			value, bad := readSetting(path.Join(dir, file))
			if bad != nil && !errors.Is(bad, fs.ErrNotExist) { // where there is no file there is no limit
				err = bad
			}
			if n := number(value, 0); n > 0 && n < 1<<60 && (least == 0 || n < least) { // version 1 says "no limit" with a number near 1<<63
				least = n
			}
		}
	}
	return least, err
}

// cgroupQuota is how many CPUs the cgroup may use, 0 for all.
func cgroupQuota() (least float64, err error) {
	dirs, err := cgroups("cpu")
	for _, dir := range dirs {
		value, bad := readSetting(path.Join(dir, "cpu.max"))
		if bad != nil && !errors.Is(bad, fs.ErrNotExist) {
			err = bad
		} else if bad != nil {
			most, _ := readSetting(path.Join(dir, "cpu.cfs_quota_us"))
			period, _ := readSetting(path.Join(dir, "cpu.cfs_period_us"))
			value = most + " " + period
		}
		if n := float64(number(value, 0)) / float64(number(value, 1)); n > 0 && (least == 0 || n < least) {
			least = n
		}
	}
	return least, err
}

// cgroups are the folders of this process's cgroup and those above it, as far as they can be seen. In a container the own one is usually seen
// as the root, and with version 1 under a path that only the host has; a mount of the host's there shows another cgroup as the root. So the
// folder is where a mount's root (mountinfo, proc_pid_mountinfo(5)) begins the path of the cgroup.
func cgroups(controller string) (dirs []string, err error) {
	text, err := os.ReadFile("/proc/self/cgroup")
	mounts, bad := os.ReadFile("/proc/self/mountinfo")
	var own, kind string // a controller that has a hierarchy of version 1 is in no other (cgroups(7))
	for line := range strings.Lines(string(text)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		} else if slices.Contains(strings.Split(parts[1], ","), controller) {
			own, kind = parts[2], "cgroup"
		} else if parts[1] == "" && kind == "" {
			own, kind = parts[2], "cgroup2"
		}
	}
	for mount := range strings.Lines(string(mounts)) {
		before, after, _ := strings.Cut(mount, " - ")
		at, of := strings.Fields(before), strings.Fields(after)
		if len(at) < 5 || len(of) < 3 || of[0] != kind || kind == "cgroup" && !slices.Contains(strings.Split(of[2], ","), controller) {
			continue
		}
		below, ok := strings.CutPrefix(own+"/", strings.TrimSuffix(at[3], "/")+"/")
		if _, err := os.Stat(path.Join(at[4], below, "cgroup.procs")); !ok || err != nil || strings.HasPrefix(below, "../") {
			continue
		}
		for dir := path.Join(at[4], below); len(dir) >= len(at[4]) && dir != "/"; dir = path.Dir(dir) {
			dirs = append(dirs, dir)
		}
	}
	if err = cmp.Or(err, bad); err == nil && dirs == nil {
		err = errors.New("no cgroup is to be seen")
	}
	return dirs, err
}

// limit is a cgroup's limit as the report has it.
func limit(n int64, unit string) string {
	if n == 0 {
		return "no limit"
	}
	return strconv.FormatInt(n, 10) + unit
}

// watchMemory looks ten times a second what is in use of the memory limit, until ctx ends. From three quarters on idle connections are let
// go, from nine tenths on new ones, and heads that need more than a pooled buffer, are refused.
func (s *server) watchMemory(ctx context.Context) {
	s.run(&s.behind, func() { s.watchSockets(ctx) })
	limit := uint64(debug.SetMemoryLimit(-1))
	if limit == math.MaxInt64 {
		return
	}
	collected := time.Now()
	for tick := time.Tick(100 * time.Millisecond); ctx.Err() == nil; {
		used := memoryInUse()
		if (used > limit/10*9 || s.sockets.full.Load()) && time.Since(collected) > time.Second {
			debug.FreeOSMemory() // what was let go does not show before, which may be far off when nothing is taken in
			used, collected = memoryInUse(), time.Now()
		}
		if s.limits.full.Store(used > limit/10*9 || s.sockets.full.Load()); used > limit/4*3 {
			s.sayShort("memory runs short, idle connections are closed", fmt.Errorf("%d of %d bytes are in use (SLUICE_MEMORY_LIMIT)", used, limit))
		}
		if s.sockets.look(); s.sockets.short.Load() {
			s.sayShort("memory runs short, socket buffers are bounded", fmt.Errorf("half of the container's %d bytes are in use", s.sockets.heldMost))
		}
		if n := s.sockets.cut.Swap(0); n > 0 {
			s.sayShort("memory runs short, connections are cut", fmt.Errorf("%d of them held the most of the container's %d bytes", n, s.sockets.heldMost))
		}
		select {
		case <-tick:
		case <-ctx.Done():
		}
	}
}

// watchSockets looks fifty times a second for a second after bytes may have begun to flow, until ctx ends: always would take 0.7% of a CPU.
func (s *server) watchSockets(ctx context.Context) {
	for tick := time.Tick(20 * time.Millisecond); s.sockets.heldMost > 0 && ctx.Err() == nil; {
		select {
		case <-s.sockets.stirred:
		case <-ctx.Done():
		}
		for n := 0; n < 50 && ctx.Err() == nil; n++ {
			s.sockets.look()
			<-tick
		}
	}
}

// memoryInUse is what of the runtime's memory would be left after a garbage collection, as far as the last one can tell.
func memoryInUse() uint64 {
	m := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}, {Name: "/memory/classes/heap/free:bytes"},
		{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/gc/heap/live:bytes"}}
	metrics.Read(m)
	total, spare := m[0].Value.Uint64(), m[1].Value.Uint64()+m[2].Value.Uint64()
	if objects, live := m[3].Value.Uint64(), m[4].Value.Uint64(); objects > live {
		spare += objects - live
	}
	return total - min(total, spare)
}

// connMemory is what a busy connection may take: a buffer of 16 kB on either side, twice that while a large head is read, stacks,
// and the garbage that goes with them.
const connMemory = 64 << 10

// connLimit leaves an eighth of the descriptors for pipes and some for listeners, epoll, the admin listener, resolvers and files, and
// takes two for each client.
func connLimit() int {
	n := max(1, (openFiles()-openFiles()/8-64)/2)
	if memory := debug.SetMemoryLimit(-1); memory < math.MaxInt64 {
		n = min(n, max(1, int(memory/connMemory)))
	}
	return n
}
