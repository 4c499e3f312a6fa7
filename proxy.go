// Sluice is a forward HTTP proxy that runs as a sidecar: the one way out of a container, a CI job or an agent's sandbox.
// It is started by environment variables alone, forwards HTTP/1.1 and CONNECT tunnels, refuses private destinations
// unless told otherwise, and explains every refusal in the answer, in the log and in Proxy-Status with one token.
//
// The life of a connection:
//
//	listener (one per CPU, SO_REUSEPORT) → is the client's address allowed → client.serve, one goroutine
//	  → wait for a request without holding a buffer → read its head → parse it strictly, in place
//	  → admit: port, host, loops → answer a refusal, or
//	  → forward: a pooled connection, or resolve → judge every address → dial the allowed ones → pool
//	      → write the head re-made from slices of the old one → response head → body moved, not held → log
//	  → CONNECT: resolve, judge, dial → 200 → one goroutine per direction moves bytes in the kernel → log
//
// Contents, as data flows: Entry · Configuration · Server · Clients · Wires and buffers · Heads · Requests · Policy ·
// Names and dialling · Pool · Forwarding · Bodies · Tunnels · Answers · Logs · Admin · Platform contract (tune_linux.go, tune_other.go).
//
// What it deliberately does not do: cache, rewrite, intercept TLS, serve files, act as a reverse proxy, take flags.
//
// Invariants:
//
//   - A client connection belongs to the goroutine of client.serve. While it runs, exchange.sendBody owns the client's reading
//     side and the upstream's writing side.
//   - Slices into a wire's buffer are valid until that wire is filled again.
//   - A connection between requests holds no buffer, an idle tunnel neither buffer nor pipe.
//   - The address that policy judged is the address that is dialled.
//   - Every lock is a leaf: none is taken while another is held.
package main

import (
	"bytes"
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"reflect"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/caarlos0/env/v11"
	"github.com/lmittmann/tint"
)

// version is set at build time with -ldflags "-X main.version=…".
var version = "dev"

// source is this file: `sluice env` and the README's table are made from the comments of the config struct below.
//
//go:embed proxy.go
var source string

// ---------------------------------------------------------------------------------------------------------------------
// Entry

func main() {
	signal.Ignore(syscall.SIGPIPE) // a closed stdout must not end the proxy (os/signal: "SIGPIPE")
	if len(os.Args) > 1 {
		os.Exit(command(os.Args[1:], os.Environ(), os.Stdout, os.Stderr))
	}
	ctx, drain := context.WithCancel(context.Background())
	go awaitSignals(drain)
	os.Exit(exitStatus(run(ctx, os.Environ(), os.Stdout), os.Stderr))
}

// awaitSignals drains at the first SIGTERM or SIGINT and exits at the second: process 1 of a container has no default action.
func awaitSignals(drain func()) {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, os.Interrupt)
	<-signals
	drain()
	<-signals
	os.Exit(0)
}

// exitStatus reports err and gives the status to exit with: 2 for a configuration that cannot be used, 1 for the rest.
func exitStatus(err error, stderr io.Writer) int {
	if err == nil {
		return 0
	}
	fmt.Fprintln(stderr, "sluice:", err)
	if bad := (configErrors)(nil); errors.As(err, &bad) {
		return 2
	}
	return 1
}

// command runs a sub-command and returns its exit status.
func command(args, environ []string, stdout, stderr io.Writer) int {
	switch args[0] {
	case "version":
		fmt.Fprintf(stdout, "sluice %s %s %s/%s\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
		return 0
	case "health":
		return min(exitStatus(askHealth(environ), stderr), 1) // the two that Docker knows
	case "env":
		return exitStatus(printEnv(environ, stdout), stderr)
	}
	fmt.Fprintf(stderr, "sluice: no command %q; without one it serves, and there are: health, env, version\n", args[0])
	return 2
}

// run serves until ctx is done, then drains. Its error is a configErrors for a bad environment. Logs go to stdout.
func run(ctx context.Context, environ []string, stdout io.Writer) error {
	cfg, _, err := loadConfig(environ)
	if err != nil {
		return err
	}
	log := newLogger(cfg, stdout)
	defer log.queue.close(time.Second)
	s, err := newServer(cfg, log)
	if err != nil {
		return err
	}
	tuneKernel(cfg, log.process) // before listening: the backlog is read from somaxconn when a socket starts to listen
	if err := s.listen(ctx); err != nil {
		s.close()
		return err
	}
	s.logStart()
	s.start()
	<-ctx.Done()
	s.drain()
	return nil
}

// ---------------------------------------------------------------------------------------------------------------------
// Configuration

const envPrefix = "SLUICE_"

// config is what the environment sets, a variable a line. The comments are the manual: `sluice env` and the README print them.
type config struct {
	Listen                 []string      `env:"LISTEN" envDefault:"127.0.0.1:3128"`          // Addresses to serve on; an empty host means every interface. The image sets `:3128`.
	Listeners              int           `env:"LISTENERS" envDefault:"0"`                    // SO_REUSEPORT listeners per address; 0 = one per usable CPU.
	Admin                  string        `env:"ADMIN" envDefault:"127.0.0.1:3129"`           // Address of `/healthz` and `/readyz`; `off` = none.
	Name                   string        `env:"NAME"`                                        // This hop's name in Via and Proxy-Status; a request that carries it in Via has come back and is refused. The default is the host name.
	AllowClients           prefixes      `env:"ALLOW_CLIENTS" envDefault:"loopback,private"` // Who may connect: CIDRs, addresses, `loopback`, `private`, `all`.
	AllowPorts             portSet       `env:"ALLOW_PORTS" envDefault:"80,443"`             // Destination ports and ranges, as in `80,443,8000-8099`; `*` = all.
	AllowPrivateHosts      hostRules     `env:"ALLOW_PRIVATE_HOSTS"`                         // Names that may resolve to private addresses (compose service names): `example.com` that name, `*.example.com` names below it, `.example.com` both, an IP, a CIDR, each with an optional `:port`.
	AllowCIDRs             prefixes      `env:"ALLOW_CIDRS"`                                 // Addresses allowed although they are not public, as in `10.20.0.0/16,127.0.0.1`.
	MaxHeader              size          `env:"MAX_HEADER" envDefault:"64KiB"`               // Bytes of a request or response head. At most 256 fields are taken whatever its size.
	MaxRequestBody         size          `env:"MAX_REQUEST_BODY" envDefault:"0"`             // Bytes of a request body; 0 = no limit.
	MaxResponseBody        size          `env:"MAX_RESPONSE_BODY" envDefault:"0"`            // Bytes of a response body; 0 = no limit.
	HeaderTimeout          time.Duration `env:"HEADER_TIMEOUT" envDefault:"10s"`             // From a request's first byte to the end of its head.
	IdleTimeout            time.Duration `env:"IDLE_TIMEOUT" envDefault:"75s"`               // A client connection between requests, and before the first.
	DialTimeout            time.Duration `env:"DIAL_TIMEOUT" envDefault:"10s"`               // Looking a name up and connecting.
	ResponseTimeout        time.Duration `env:"RESPONSE_TIMEOUT" envDefault:"60s"`           // From the request's end to the response head.
	BodyTimeout            time.Duration `env:"BODY_TIMEOUT" envDefault:"60s"`               // Without a byte moving in a body.
	TunnelIdleTimeout      time.Duration `env:"TUNNEL_IDLE_TIMEOUT" envDefault:"10m"`        // A tunnel without a byte in either direction.
	TunnelHalfCloseTimeout time.Duration `env:"TUNNEL_HALF_CLOSE_TIMEOUT" envDefault:"30s"`  // A tunnel without a byte after one side closed.
	TunnelMaxAge           time.Duration `env:"TUNNEL_MAX_AGE" envDefault:"0"`               // Whole life of a tunnel.
	DrainTimeout           time.Duration `env:"DRAIN_TIMEOUT" envDefault:"8s"`               // From SIGTERM to the end; `docker stop` kills after 10s. 0 = end at once.
	PoolIdle               int           `env:"POOL_IDLE" envDefault:"1024"`                 // Idle upstream connections kept in all; 0 = none.
	PoolIdlePerHost        int           `env:"POOL_IDLE_PER_HOST" envDefault:"128"`         // Idle upstream connections kept per host and port; 0 = none.
	PoolIdleTimeout        time.Duration `env:"POOL_IDLE_TIMEOUT" envDefault:"30s"`          // How long an idle upstream connection is kept.
	DNSCacheTTL            time.Duration `env:"DNS_CACHE_TTL" envDefault:"5s"`               // How long a DNS answer is reused; 0 = not at all.
	DNSStale               time.Duration `env:"DNS_STALE" envDefault:"5m"`                   // How long an answer may still serve when its refresh fails; 0 = not at all.
	DNSTimeout             time.Duration `env:"DNS_TIMEOUT" envDefault:"5s"`                 // One lookup.
	DNSServers             []string      `env:"DNS_SERVERS"`                                 // Resolvers, `host:port` with an IP address as host; by default the system's.
	LogLevel               slog.Level    `env:"LOG_LEVEL" envDefault:"info"`                 // Least level that is logged: `debug`, `info`, `warn`, `error`.
	LogFormat              string        `env:"LOG_FORMAT" envDefault:"auto"`                // `json`; `text` (for people); `auto` = text on a terminal, else json.
	LogSample              shares        `env:"LOG_SAMPLE"`                                  // Share of connection, request and tunnel records kept per level, as in `debug=0.01,info=0.1`; levels not named are kept. Records about the process itself are never sampled.
	LogBuffer              int           `env:"LOG_BUFFER" envDefault:"8192"`                // Records waiting to be written; when full, new ones are dropped and counted, never waited for.
	LogQuery               bool          `env:"LOG_QUERY" envDefault:"false"`                // Log query strings, in `url.query`. User info and credentials are never logged.
	Tune                   string        `env:"TUNE" envDefault:"check"`                     // Kernel settings: `check` warns of those that fall short, `apply` also writes them where the container may, `off`.
	NOFILE                 int           `env:"NOFILE" envDefault:"0"`                       // Descriptor limit to ask for; 0 = the hard limit, at most 1,048,576.
}

// variable describes one field of config: its name without the prefix, the texts of its default and its value, where that came
// from (`default`, `environment`, `host name` or the path of a file), and its manual.
type variable struct{ field, name, def, value, origin, doc string }

// configErrors is every fault of an environment, one a line: variable, value and reason.
type configErrors []string

func (e configErrors) Error() string {
	return "the environment cannot be used:\n  " + strings.Join(e, "\n  ")
}

// loadConfig reads environ ("NAME=value"), and says where each value came from. Its error is a configErrors with every fault.
func loadConfig(environ []string) (*config, []variable, error) {
	cfg := &config{LogSample: shares{1, 1, 1, 1}}
	vars := variables()
	values, bad := gather(environ, vars)
	complain := func(i int, reason string) { // once per variable
		line := fmt.Sprintf("%s%s=%q: ", envPrefix, vars[i].name, vars[i].value)
		if !slices.ContainsFunc(bad, func(b string) bool { return strings.HasPrefix(b, line) }) {
			bad = append(bad, line+reason)
		}
	}
	err := env.ParseWithOptions(cfg, env.Options{Prefix: envPrefix, Environment: values})
	var all env.AggregateError
	errors.As(err, &all)
	for _, err := range all.Errors {
		var pe env.ParseError // names the field, not the variable
		if !errors.As(err, &pe) {
			return nil, nil, err
		}
		complain(slices.IndexFunc(vars, func(v variable) bool { return v.field == pe.Name }), pe.Err.Error())
	}
	cfg.check(func(ok bool, name, reason string) {
		if !ok {
			complain(slices.IndexFunc(vars, func(v variable) bool { return v.name == name }), reason)
		}
	})
	if len(bad) > 0 {
		return nil, nil, bad
	}
	return cfg, vars, nil
}

// variables lists the fields of config in order, with the comments that stand behind them in the source.
func variables() []variable {
	var vars []variable
	docs := map[string]string{}
	_, block, _ := strings.Cut(source, "\ntype config struct {\n")
	block, _, _ = strings.Cut(block, "\n}\n")
	for line := range strings.Lines(block) {
		_, docs[strings.Fields(line)[0]], _ = strings.Cut(strings.TrimSpace(line), " // ")
	}
	for f := range reflect.TypeFor[config]().Fields() {
		vars = append(vars, variable{field: f.Name, name: f.Tag.Get("env"), def: f.Tag.Get("envDefault"), doc: docs[f.Name]})
	}
	return vars
}

// gather picks Sluice's variables out of environ and reads those given as files. An empty one counts as unset: compose's `${X:-}`.
func gather(environ []string, vars []variable) (map[string]string, configErrors) {
	given, values, bad := map[string]string{}, map[string]string{}, configErrors(nil)
	for _, kv := range environ {
		if k, v, _ := strings.Cut(kv, "="); strings.HasPrefix(k, envPrefix) && v != "" {
			given[k] = v
		}
	}
	for i := range vars {
		v := &vars[i]
		key := envPrefix + v.name
		text, direct := given[key]
		path, byFile := given[key+"_FILE"]
		delete(given, key)
		delete(given, key+"_FILE")
		v.value, v.origin = v.def, "default"
		switch {
		case direct && byFile:
			bad = append(bad, fmt.Sprintf("%s: given twice, directly and as %s_FILE", key, key))
			continue
		case direct:
			v.value, v.origin = text, "environment"
		case byFile:
			b, err := os.ReadFile(path)
			if err != nil {
				bad = append(bad, fmt.Sprintf("%s_FILE=%q: %v", key, path, err))
				continue
			}
			v.value, v.origin = strings.TrimSpace(string(b)), path
		case v.name == "NAME":
			v.value, v.origin = "sluice", "fallback"
			if name, _ := os.Hostname(); isToken([]byte(name)) {
				v.value, v.origin = name, "host name"
			}
		}
		values[key] = v.value
	}
	links := regexp.MustCompile("^SLUICE_(SERVICE_HOST|SERVICE_PORT.*|PORT|PORT_.*)$") // injected for a service named sluice
	for key := range given {
		if !links.MatchString(key) {
			bad = append(bad, fmt.Sprintf("%s: unknown variable; the nearest is %s", key, nearest(key, vars)))
		}
	}
	return values, bad
}

// nearest names the variable that shares the longest beginning and end with key, relative to their lengths.
func nearest(key string, vars []variable) string {
	alike := func(v variable) int {
		name, n := envPrefix+v.name, 0
		for n < min(len(name), len(key)) && name[n] == key[n] {
			n++
		}
		for i := 1; n+i <= min(len(name), len(key)) && name[len(name)-i] == key[len(key)-i]; i++ {
			n++
		}
		return 2*n - len(name)
	}
	return envPrefix + slices.MaxFunc(vars, func(a, b variable) int { return alike(a) - alike(b) }).name
}

// check demands what the types of the fields cannot.
func (c *config) check(demand func(ok bool, name, reason string)) {
	for f, v := range reflect.ValueOf(c).Elem().Fields() {
		demand(!v.CanInt() || v.Int() >= 0 || f.Name == "LogLevel", f.Tag.Get("env"), "must not be negative")
	}
	for _, a := range c.Listen {
		demand(isAddress(a, 0), "LISTEN", fmt.Sprintf("%q is not an IP address and a port, as in 127.0.0.1:3128 or :3128", a))
	}
	for _, a := range c.DNSServers {
		demand(isAddress(a, 1), "DNS_SERVERS", fmt.Sprintf("%q is not an IP address and a port, as in 10.0.0.2:53", a))
	}
	demand(c.Admin == "off" || isAddress(c.Admin, 0), "ADMIN", "is neither an IP address and a port nor off")
	demand(isToken([]byte(c.Name)), "NAME", "may hold letters, digits and !#$%&'*+-.^_`|~ only (RFC 9110, Via pseudonym)")
	demand(c.MaxHeader >= 1024 && c.MaxHeader <= 16<<20, "MAX_HEADER", "must be between 1KiB and 16MiB")
	demand(c.LogBuffer > 0, "LOG_BUFFER", "must be at least 1")
	demand(slices.Contains([]string{"auto", "json", "text"}, c.LogFormat), "LOG_FORMAT", "is none of json, text, auto")
	demand(slices.Contains([]string{"check", "apply", "off"}, c.Tune), "TUNE", "is none of check, apply, off")
}

// isAddress reports whether text is host:port with an IP address, "localhost" or nothing as its host, and a port from least.
func isAddress(text string, least uint64) bool {
	host, port, err := net.SplitHostPort(text)
	n, bad := strconv.ParseUint(port, 10, 16)
	return err == nil && bad == nil && n >= least && (host == "" || host == "localhost" || net.ParseIP(host) != nil)
}

// printEnv writes a table of every variable: default, value in force, where it came from, meaning.
func printEnv(environ []string, out io.Writer) error {
	_, vars, err := loadConfig(environ)
	if err != nil {
		return err
	}
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "VARIABLE\tDEFAULT\tVALUE\tFROM\tMEANING")
	for _, v := range vars {
		fmt.Fprintf(t, "%s%s\t%s\t%s\t%s\t%s\n", envPrefix, v.name, v.def, strings.Join(strings.Fields(v.value), " "), v.origin, v.doc)
	}
	return t.Flush()
}

// items splits a list at commas and white space.
func items(text []byte) []string {
	return strings.FieldsFunc(string(text), func(r rune) bool { return strings.ContainsRune(", \t\r\n", r) })
}

// size is a number of bytes: 65536, 64KiB, 10MB.
type size int64

func (s *size) UnmarshalText(text []byte) error {
	t := string(text)
	digits := strings.TrimRight(t, "BKMGTikmgtb ")
	units := map[string]float64{"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
		"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
	unit, known := units[strings.ToLower(strings.TrimSpace(t[len(digits):]))]
	n, err := strconv.ParseFloat(digits, 64)
	if !known || err != nil || strings.Trim(digits, "0123456789.") != "" || n*unit >= math.MaxInt64 {
		return errors.New("is not a size, as in 65536, 64KiB or 10MB")
	}
	*s = size(n * unit)
	return nil
}

// portSet is a set of TCP ports, a bit each.
type portSet [1024]uint64

func (p *portSet) has(port uint16) bool { return p[port>>6]&(1<<(port&63)) != 0 }

func (p *portSet) UnmarshalText(text []byte) error {
	*p = portSet{}
	for _, item := range items(text) {
		from, to, ranged := strings.Cut(item, "-")
		if !ranged {
			to = from
		}
		if item == "*" {
			from, to = "1", "65535"
		}
		low, err1 := strconv.ParseUint(from, 10, 16)
		high, err2 := strconv.ParseUint(to, 10, 16)
		if err1 != nil || err2 != nil || low == 0 || high < low {
			return fmt.Errorf("%q is not a port or range within 1-65535", item)
		}
		for port := low; port <= high; port++ {
			p[port>>6] |= 1 << (port & 63)
		}
	}
	return nil
}

// prefixes is a list of address blocks; a bare address is a block of one, and some sets have a name.
type prefixes []netip.Prefix

func (p *prefixes) UnmarshalText(text []byte) error {
	sets := map[string]string{"all": "0.0.0.0/0 ::/0", "loopback": "127.0.0.0/8 ::1", "private": "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7"}
	*p = nil
	for _, item := range items(text) {
		for block := range strings.FieldsSeq(cmp.Or(sets[item], item)) {
			prefix, err := parsePrefix(block)
			if err != nil {
				return err
			}
			*p = append(*p, prefix)
		}
	}
	return nil
}

func (p prefixes) contains(a netip.Addr) bool {
	return slices.ContainsFunc(p, func(block netip.Prefix) bool { return block.Contains(a) })
}

// blocks reads a list that is part of this program.
func blocks(text string) (list prefixes) {
	for _, block := range strings.Fields(text) {
		list = append(list, netip.MustParsePrefix(block))
	}
	return list
}

func parsePrefix(text string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(text); err == nil && a.Zone() == "" {
		return netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()), nil
	}
	block, err := netip.ParsePrefix(text)
	if err != nil || block.Addr().Is4In6() {
		return block, fmt.Errorf("%q is not an address, a CIDR, loopback, private or all", text)
	}
	return block.Masked(), nil
}

// shares is the share of records kept per level, indexed by shareOf.
type shares [4]float64

// shareOf maps a level to its place in shares: debug 0, info 1, warn 2, error 3.
func shareOf(l slog.Level) int { return min(max(int(l)/4+1, 0), 3) }

func (s *shares) UnmarshalText(text []byte) error {
	*s = shares{1, 1, 1, 1}
	for _, item := range items(text) {
		name, value, _ := strings.Cut(item, "=")
		var level slog.Level
		share, err := strconv.ParseFloat(value, 64)
		if level.UnmarshalText([]byte(name)) != nil || err != nil || !(share >= 0 && share <= 1) {
			return fmt.Errorf("%q is not level=share with a share from 0 to 1, as in info=0.1", item)
		}
		s[shareOf(level)] = share
	}
	return nil
}

// hostRules matches destinations by name, address and port; port 0 stands for every port.
type hostRules struct {
	names map[string][]uint16 // "example.com": that name; ".example.com": the names below it
	nets  map[netip.Prefix][]uint16
}

func (r *hostRules) UnmarshalText(text []byte) error {
	*r = hostRules{map[string][]uint16{}, map[netip.Prefix][]uint16{}}
	for _, item := range items(text) {
		if !r.add(strings.ToLower(item)) {
			return fmt.Errorf("rule %q is not a name, *.name, .name, address or CIDR, with or without :port", item)
		}
	}
	return nil
}

// add takes one rule. An IPv6 address or CIDR that has a port stands in brackets.
func (r *hostRules) add(rule string) bool {
	host, port := rule, uint64(0)
	if _, err := parsePrefix(rule); err != nil { // a bare IPv6 address has colons, but no port
		if i := strings.LastIndexByte(rule, ':'); i >= 0 {
			host = rule[:i]
			if port, err = strconv.ParseUint(rule[i+1:], 10, 16); err != nil || port == 0 {
				return false
			}
		}
	}
	if block, err := parsePrefix(strings.Trim(host, "[]")); err == nil {
		r.nets[block] = append(r.nets[block], uint16(port))
		return true
	}
	host = strings.TrimSuffix(host, ".")
	name, below := strings.CutPrefix(host, "*.")
	if !below {
		name, below = strings.CutPrefix(host, ".")
		r.names[name] = append(r.names[name], uint16(port))
	}
	if below {
		r.names["."+name] = append(r.names["."+name], uint16(port))
	}
	return isHostName([]byte(name))
}

// match reports whether a rule covers host (lower case, no trailing dot) or ip, and port. A name costs a lookup per label.
func (r *hostRules) match(host []byte, ip netip.Addr, port uint16) bool {
	covers := func(ports []uint16) bool { return slices.Contains(ports, 0) || slices.Contains(ports, port) }
	for block, ports := range r.nets {
		if block.Contains(ip) && covers(ports) {
			return true
		}
	}
	for at := 0; at >= 0 && len(r.names) > 0; {
		if covers(r.names[string(host)]) {
			return true
		}
		if at = bytes.IndexByte(host[1:], '.'); at >= 0 {
			host = host[at+1:]
		}
	}
	return false
}

// ---------------------------------------------------------------------------------------------------------------------
// Server

// server is one running proxy.
type server struct {
	cfg       config
	log       *logger
	buffers   sync.Pool // of *[bufferSize]byte
	exchanges sync.Pool // of *exchange
	names     *resolver
	pool      *pool
	watcher   *watcher
	sockets   sockets
	hop       []byte // "NAME\r\n", the end of the Via field that this hop adds

	listeners []*net.TCPListener
	own       []netip.AddrPort // where this process listens, the admin listener included
	admin     *http.Server
	adminOn   net.Listener // nil when ADMIN=off
	draining  atomic.Bool
	clients   sync.Map // of *client, while they are open

	accepting, serving, behind sync.WaitGroup // accept loops; client connections; watcher and admin
}

func newServer(cfg *config, log *logger) (s *server, err error) {
	s = &server{cfg: *cfg, log: log, names: newResolver(cfg), pool: newPool(cfg)}
	s.hop = []byte(cfg.Name + "\r\n")
	s.buffers.New = func() any { return new([bufferSize]byte) }
	s.exchanges.New = func() any {
		x := &exchange{srv: s}
		x.awaitClient, x.awaitOrigin = x.armClient, x.armOrigin
		return x
	}
	const long = 15 * time.Minute
	s.sockets.deadPeer = max(cmp.Or(cfg.TunnelIdleTimeout, long), cmp.Or(cfg.BodyTimeout, long), time.Minute)
	s.watcher, err = newWatcher()
	return s, err
}

// listen opens the admin listener and, per address and CPU, a client listener: the kernel spreads connections over them.
func (s *server) listen(ctx context.Context) error {
	lc := net.ListenConfig{Control: s.sockets.listening, KeepAlive: -1} // accepted sockets inherit what Control sets
	lc.SetMultipathTCP(false)                                           // splice(2) and the socket options want plain TCP
	count := 1
	if canReusePort {
		count = cmp.Or(s.cfg.Listeners, runtime.GOMAXPROCS(0)) // which minds the affinity mask and the cgroup's CPU quota
	}
	for _, addr := range s.cfg.Listen {
		for i := range count {
			l, err := lc.Listen(ctx, "tcp", addr)
			if err != nil {
				return err
			}
			s.listeners = append(s.listeners, l.(*net.TCPListener))
			if i == 0 {
				s.own = append(s.own, addrPort(l.Addr()))
				addr = l.Addr().String() // port 0 is chosen once
			}
		}
	}
	if s.cfg.Admin != "off" {
		l, err := net.Listen("tcp", s.cfg.Admin)
		if err != nil {
			return fmt.Errorf("SLUICE_ADMIN: %w", err)
		}
		s.own = append(s.own, addrPort(l.Addr()))
		s.adminOn, s.admin, s.cfg.Admin = l, newAdmin(s), l.Addr().String()
	}
	return nil
}

// start begins to accept.
func (s *server) start() {
	s.behind.Go(s.watcher.run)
	if s.adminOn != nil {
		s.behind.Go(s.serveAdmin)
	}
	for _, l := range s.listeners {
		s.accepting.Go(func() { s.accept(l) })
	}
}

// accept serves connections until the drain. An error, such as a lack of descriptors, is said once and waited out.
func (s *server) accept(l *net.TCPListener) {
	var pause time.Duration
	for {
		conn, err := l.AcceptTCP()
		if errors.Is(err, net.ErrClosed) || err != nil && s.draining.Load() {
			return
		}
		if err != nil {
			if pause == 0 {
				s.log.process.Warn("accept failed, retrying", "address", l.Addr().String(), logMessage, err.Error())
			}
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			time.Sleep(pause)
			continue
		}
		pause = 0
		s.serving.Add(1)
		go s.newClient(conn).serve()
	}
}

// drain stops accepting, closes idle connections, lets what runs finish, and cuts what is left when DRAIN_TIMEOUT is over.
func (s *server) drain() {
	begun := time.Now()
	s.draining.Store(true)
	s.log.process.Info("draining", "timeout", s.cfg.DrainTimeout.String())
	for _, l := range s.listeners {
		l.Close()
	}
	s.accepting.Wait()
	s.eachClient((*client).closeIdle)
	finished := make(chan struct{})
	time.AfterFunc(0, func() { s.serving.Wait(); close(finished) })
	cut := 0
	select {
	case <-finished:
	case <-time.After(s.cfg.DrainTimeout):
		cut = s.eachClient((*client).sever)
		<-finished
	}
	s.close()
	s.log.process.Info("stopped", "cut", cut, logDuration, milliseconds(time.Since(begun)))
}

// close ends everything but client connections.
func (s *server) close() {
	for _, l := range s.listeners {
		l.Close()
	}
	if s.adminOn != nil {
		s.admin.Close()
		s.adminOn.Close()
	}
	s.watcher.close()
	s.pool.close()
	s.behind.Wait()
	s.sockets.close()
}

// eachClient calls f for every open client connection and returns how many there were.
func (s *server) eachClient(f func(*client)) (n int) {
	for c := range s.clients.Range {
		f(c.(*client))
		n++
	}
	return n
}

// isOwn reports whether ap is where this process listens: a connection there would come back to it.
func (s *server) isOwn(ap netip.AddrPort) bool {
	return slices.ContainsFunc(s.own, func(o netip.AddrPort) bool {
		return o.Port() == ap.Port() && (o.Addr() == ap.Addr() || ap.Addr().IsUnspecified() || o.Addr().IsUnspecified() && isLocal(ap.Addr()))
	})
}

// isLocal reports whether an address is this host's. It is asked about ports that Sluice listens on alone, so it may be slow.
func isLocal(a netip.Addr) bool {
	addrs, _ := net.InterfaceAddrs()
	return a.IsLoopback() || slices.ContainsFunc(addrs, func(i net.Addr) bool {
		p, err := netip.ParsePrefix(i.String())
		return err == nil && p.Addr().Unmap() == a
	})
}

func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// logStart says what is in force.
func (s *server) logStart() {
	s.log.process.Info("listening", "version", version, "addresses", s.own[:len(s.cfg.Listen)], "listeners", len(s.listeners),
		"admin", s.cfg.Admin, "name", s.cfg.Name, "cpus", runtime.GOMAXPROCS(0), "nofile", openFiles(),
		"max_header", int64(s.cfg.MaxHeader), "pool_idle", s.cfg.PoolIdle, "drain_timeout", s.cfg.DrainTimeout.String())
}

// ---------------------------------------------------------------------------------------------------------------------
// Clients

// client is one client connection and what others need to know of the exchange it is in.
type client struct {
	wire
	addr  netip.Addr
	watch watched
	idle  atomic.Bool // between requests

	mu       sync.Mutex // guards what follows
	gone     bool       // has hung up
	severed  bool       // the drain has cut it
	upstream *upstream  // carries this client's request or tunnel
	tunneled bool       // upstream carries a tunnel, which sees hang-ups itself
	giveUp   func()     // ends the lookup or dial under way
	failed   *failure   // why the request's body could not be sent on
}

func (s *server) newClient(conn *net.TCPConn) *client {
	c := &client{addr: addrPort(conn.RemoteAddr()).Addr()}
	c.attach(s, conn)
	s.clients.Store(c, nil)
	return c
}

// serve answers a client's requests, one after the other, until the connection ends.
func (c *client) serve() {
	defer c.srv.serving.Done()
	defer c.end()
	c.srv.log.debug("client connected", c.addr)
	if !c.srv.cfg.AllowClients.contains(c.addr) { // before a byte is read
		x := c.srv.exchanges.Get().(*exchange)
		x.begin(c)
		x.conclude(fail(403, tokenDenied, "client address %s is not allowed (SLUICE_ALLOW_CLIENTS)", c.addr))
		c.linger()
		return
	}
	c.srv.watcher.add(&c.watch, c.raw, c)
	for keep := true; keep && c.awaitRequest(); {
		x := c.srv.exchanges.Get().(*exchange)
		x.begin(c)
		keep = x.serve()
		c.srv.exchanges.Put(x)
	}
}

// end frees what the connection holds, also after a panic, which ends this connection alone.
func (c *client) end() {
	if p := recover(); p != nil {
		c.srv.log.process.Error("panic", logType, tokenInternal, logMessage, fmt.Sprint(p), "stack", string(debug.Stack()))
		c.sever()
	}
	c.srv.watcher.remove(&c.watch)
	c.tcp.Close()
	c.drop()
	c.srv.clients.Delete(c)
	c.srv.log.debug("client closed", c.addr)
}

// awaitRequest returns when a request has begun, false when none will. It holds no buffer while it waits.
func (c *client) awaitRequest() bool {
	if c.buffered() > 0 {
		return true
	}
	c.drop()
	c.tcp.SetReadDeadline(deadline(c.srv.cfg.IdleTimeout))
	c.idle.Store(true)
	defer c.idle.Store(false)
	return !c.srv.draining.Load() && c.fillIdle() == nil // draining is looked at last: closeIdle may have been here before
}

// closeIdle ends the wait of a connection that is between requests.
func (c *client) closeIdle() {
	if c.idle.Load() {
		c.tcp.CloseRead()
	}
}

// abandon ends the lookup, the dial or the exchange with an origin that is under way; a tunnel sees hang-ups itself.
func (c *client) abandon() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.giveUp != nil {
		c.giveUp()
	}
	if c.upstream != nil && (c.severed || !c.tunneled) {
		c.upstream.tcp.Close()
	}
}

// sever ends the connection and what runs on it: the drain's time is over.
func (c *client) sever() {
	c.mu.Lock()
	c.severed, c.gone = true, true
	c.mu.Unlock()
	c.abandon()
	c.tcp.Close()
}

// track notes what carries the client's request or tunnel, or how to end the dial under way. It reports whether the drain cut it.
func (c *client) track(up *upstream, tunneled bool, giveUp func()) (severed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.upstream, c.tunneled, c.giveUp, c.failed = up, tunneled, giveUp, nil
	if c.gone && (up != nil || giveUp != nil) {
		time.AfterFunc(hangupGrace, c.abandon)
	}
	return c.severed
}

// linger reads on for a while, so that the reset that unread bytes cause does not destroy the answer (RFC 9112, 9.6).
func (c *client) linger() {
	if c.tcp.CloseWrite() != nil {
		return
	}
	c.tcp.SetReadDeadline(time.Now().Add(hangupGrace))
	for n := 0; n < 16<<20; n += c.buffered() {
		if c.r = c.w; c.fill() != nil {
			return
		}
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Wires and buffers

// bufferSize is that of pooled buffers: it holds nearly every head, and a head with a common API response.
const bufferSize = 16 << 10

// wire is one connection and the bytes that were read from it and not used yet.
type wire struct {
	srv  *server
	tcp  *net.TCPConn
	raw  syscall.RawConn // of tcp
	buf  []byte          // nil while nothing is held
	r, w int             // buf[r:w] is unused
	vec  [3][]byte       // used by write
	vecs net.Buffers     // used by write

	idleRead func(uintptr) bool // readIdle, stored since a method value would be allocated at each wait
	idleErr  error
}

func (w *wire) attach(srv *server, conn *net.TCPConn) {
	w.srv, w.tcp = srv, conn
	w.raw, _ = conn.SyscallConn() // fails on nil only
	w.idleRead = w.readIdle
}

func (w *wire) buffered() int  { return w.w - w.r }
func (w *wire) unused() []byte { return w.buf[w.r:w.w] }

// fill reads once, into what room there is or is made. It returns an error only when nothing was read.
func (w *wire) fill() error {
	w.makeRoom()
	n, err := w.tcp.Read(w.buf[w.w:])
	w.w += n
	if n > 0 {
		return nil
	}
	return err
}

// makeRoom sees to it that buf[w:] is not empty: unused bytes move to the front, a full buffer gives way to a larger one.
func (w *wire) makeRoom() {
	switch {
	case w.buf == nil:
		w.buf = w.srv.buffers.Get().(*[bufferSize]byte)[:]
	case w.r > 0:
		w.r, w.w = 0, copy(w.buf, w.unused())
	case w.w == len(w.buf):
		b := make([]byte, 2*len(w.buf))
		n := copy(b, w.buf)
		w.drop()
		w.buf, w.w = b, n
	}
}

// drop gives the buffer back whatever it holds.
func (w *wire) drop() {
	if len(w.buf) == bufferSize {
		w.srv.buffers.Put((*[bufferSize]byte)(w.buf))
	}
	w.buf, w.r, w.w = nil, 0, 0
}

// write sends up to three pieces with one system call. The limit is for the kernel to take them.
func (w *wire) write(limit time.Duration, a, b, c []byte) error {
	w.tcp.SetWriteDeadline(deadline(limit))
	if len(b) == 0 && len(c) == 0 {
		_, err := w.tcp.Write(a)
		return err
	}
	w.vec = [3][]byte{a, b, c}
	w.vecs = w.vec[:]
	_, err := w.vecs.WriteTo(w.tcp)
	w.vec = [3][]byte{}
	return err
}

// readHead reads until a whole head stands at the front of the unused bytes, and takes it, with the empty line that ends it.
// Empty lines before it are skipped (RFC 9112, 2.2). limit is the most bytes it may have; until is when a head that is not here
// yet must be, zero if a deadline is set already. Errors: a fault, or that of the read. The head is valid until the wire is
// filled again.
func (w *wire) readHead(limit int, until time.Time) ([]byte, error) {
	for line := 0; ; { // where the line under way begins
		b := w.unused()
		if len(b) > 0 && line == 0 && b[0] != '\r' && octets[b[0]]&tokenOctet == 0 {
			return nil, fault("the first byte cannot begin an HTTP/1 message") // TLS, SOCKS: no line end may ever come
		}
		end, next, err := sectionEnd(b, line)
		switch {
		case err != nil:
			return nil, err
		case end == 2:
			w.r += 2
			continue
		case end > limit || end == 0 && len(b) >= limit:
			if i := bytes.IndexByte(b, '\n'); i < 0 || i >= limit {
				return nil, faultLineTooLong
			}
			return nil, faultHeadTooLarge
		case end > 0:
			w.r += end
			return b[:end], nil
		}
		line = next
		if !until.IsZero() {
			w.tcp.SetReadDeadline(until)
			until = time.Time{}
		}
		if err := w.fill(); err != nil {
			return nil, err
		}
	}
}

// sectionEnd finds the end of lines that an empty one ends, past that; 0 while it is not here, then the unfinished line is at next.
func sectionEnd(b []byte, line int) (end, next int, err error) {
	for {
		i := bytes.IndexByte(b[line:], '\n')
		switch {
		case i < 0:
			return 0, line, nil
		case i == 0 || b[line+i-1] != '\r':
			return 0, 0, fault("a line does not end with CRLF")
		case i == 1:
			return line + 2, 0, nil
		}
		line += i + 1
	}
}

// deadline is the instant d from now, or none when d is 0.
func deadline(d time.Duration) time.Time {
	if d == 0 {
		return time.Time{}
	}
	return time.Now().Add(d)
}

// within is a context that ends after d, or only when cancelled when d is 0.
func within(d time.Duration) (context.Context, context.CancelFunc) {
	if d == 0 {
		return context.WithCancel(context.Background())
	}
	return context.WithTimeout(context.Background(), d)
}

// ---------------------------------------------------------------------------------------------------------------------
// Heads

// What an octet may be part of.
const (
	tokenOctet  = 1 << iota // field names, methods (RFC 9110, 5.6.2)
	valueOctet              // field values: visible, obs-text, space and tab (RFC 9110, 5.5)
	targetOctet             // request-targets: visible ASCII but "#", more than RFC 3986 grants since browsers send "|" and "{" raw
	hostOctet               // names in an authority; "_" stands in many container names
)

var octets = func() (t [256]uint8) {
	for i := range 256 {
		b := byte(i)
		alnum := b >= '0' && b <= '9' || b|0x20 >= 'a' && b|0x20 <= 'z'
		if alnum || strings.IndexByte("!#$%&'*+-.^_`|~", b) >= 0 {
			t[i] |= tokenOctet
		}
		if b >= 0x20 && b != 0x7f || b == '\t' {
			t[i] |= valueOctet
		}
		if b > 0x20 && b < 0x7f && b != '#' {
			t[i] |= targetOctet
		}
		if alnum || strings.IndexByte("-._", b) >= 0 {
			t[i] |= hostOctet
		}
	}
	return t
}()

// all reports whether b is made of octets of one kind only.
func all(b []byte, kind uint8) bool {
	for _, o := range b {
		if octets[o]&kind == 0 {
			return false
		}
	}
	return true
}

func isToken(b []byte) bool { return len(b) > 0 && all(b, tokenOctet) }

// fault is what is wrong with a message's framing or head.
type fault string

func (f fault) Error() string { return string(f) }

const (
	faultLineTooLong  = fault("the first line is too long")
	faultHeadTooLarge = fault("the head is too large")
	faultManyFields   = fault("the head has more than 256 fields")
	faultBodyTooLarge = fault("the body is too large")
	faultAuthority    = fault("invalid host or port in the request-target, or user info")
	faultChunk        = fault("malformed chunk")
)

// fieldKind tells apart the fields that Sluice acts upon.
type fieldKind uint8

const (
	fieldOther           fieldKind = iota // passed on
	fieldVia                              // passed on; looked at for loops
	fieldDate                             // passed on
	fieldTrace                            // passed on and logged
	fieldTrailer                          // passed on, unless it names framing
	fieldExpect                           // passed on, but not from HTTP/1.0
	fieldHop                              // hop-by-hop: it and all that follow end here (RFC 9110, 7.6.1)
	fieldHost                             // re-made from the target
	fieldLength                           // re-made from the framing
	fieldCoding                           // re-made from the framing
	fieldConnection                       //
	fieldProxyConnection                  // only its "close" is heeded
	fieldTE                               // its "trailers" is sent on
	fieldUpgrade                          // its "websocket" is sent on
	fieldMaxForwards                      // counted down for OPTIONS and TRACE
)

var fieldNames = [...]struct {
	name string
	kind fieldKind
}{
	{"via", fieldVia}, {"date", fieldDate}, {"traceparent", fieldTrace}, {"trailer", fieldTrailer}, {"expect", fieldExpect}, {"keep-alive", fieldHop},
	{"proxy-authenticate", fieldHop}, {"proxy-authorization", fieldHop}, {"host", fieldHost}, {"content-length", fieldLength},
	{"transfer-encoding", fieldCoding}, {"connection", fieldConnection}, {"proxy-connection", fieldProxyConnection},
	{"te", fieldTE}, {"upgrade", fieldUpgrade}, {"max-forwards", fieldMaxForwards},
}

// kindOf looks a name up. Few names agree in length and first letter, so the scan is mostly of numbers.
func kindOf(name []byte) fieldKind {
	for i := range fieldNames {
		f := &fieldNames[i]
		if len(name) == len(f.name) && name[0]|0x20 == f.name[0] && equalFold(name, f.name) {
			return f.kind
		}
	}
	return fieldOther
}

// equalFold compares b with a lower-case ASCII word, ignoring case. What folds to ASCII from outside it is longer.
func equalFold(b []byte, lower string) bool {
	return len(b) == len(lower) && strings.EqualFold(string(b), lower)
}

// field is one field line of a head, as offsets into it: raw[start:end] with its CRLF, the name before colon.
type field struct {
	start, colon, end uint32
	kind              fieldKind
}

// head is a parsed message head. It points into the wire's buffer and is valid until that is filled again.
type head struct {
	raw    []byte
	fields []field
	named  [][]byte // options of Connection that name fields

	minor, hosts                 int   // HTTP/1.minor; number of Host fields
	length, forwards             int64 // Content-Length, Max-Forwards; -1 without
	chunked                      bool
	close, keepAlive, switchOver bool   // Connection: close, keep-alive, upgrade
	websocket                    bool   // Upgrade: websocket
	trailers                     bool   // TE: trailers
	dated                        bool   // has a Date
	looped                       bool   // Via names this hop
	host, trace                  []byte // values of Host and traceparent
}

func (h *head) reset(raw []byte) {
	*h = head{raw: raw, fields: h.fields[:0], named: h.named[:0], minor: 1, length: -1, forwards: -1}
}

// parseFields reads the field lines of raw from at up to the empty line. hop is this hop's Via name. unfold turns obs-fold into
// spaces, as RFC 9112, 5.2 asks of a proxy for responses; without it obs-fold is a fault.
func (h *head) parseFields(at int, hop []byte, unfold bool) error {
	for at < len(h.raw)-2 {
		end := at + bytes.IndexByte(h.raw[at:], '\n') + 1
		for unfold && end < len(h.raw)-2 && (h.raw[end] == ' ' || h.raw[end] == '\t') {
			h.raw[end-2], h.raw[end-1] = ' ', ' '
			end += bytes.IndexByte(h.raw[end:], '\n') + 1
		}
		line, colon := h.raw[at:end-2], 0
		for colon < len(line) && octets[line[colon]]&tokenOctet != 0 {
			colon++
		}
		switch {
		case line[0] == ' ' || line[0] == '\t':
			return fault("a field line begins with a space (obs-fold)")
		case colon == 0 || colon == len(line) || line[colon] != ':':
			return fault("a field name is empty, holds an invalid byte, or is not followed by a colon")
		case !all(line[colon+1:], valueOctet):
			return fault("a field value holds an invalid byte")
		case len(h.fields) == 256:
			return faultManyFields
		}
		kind := kindOf(line[:colon])
		h.fields = append(h.fields, field{uint32(at), uint32(at + colon), uint32(end), kind})
		if kind != fieldOther {
			if err := h.note(kind, bytes.Trim(line[colon+1:], " \t"), hop); err != nil {
				return err
			}
		}
		at = end
	}
	if h.chunked && h.length >= 0 {
		return fault("both Content-Length and Transfer-Encoding")
	}
	// What Connection names ends here too, but not Via nor the fields with a rule of their own, framing and Host among them.
	for _, named := range h.named {
		for i := range h.fields {
			if f := &h.fields[i]; f.kind < fieldHop && f.kind != fieldVia && bytes.EqualFold(h.raw[f.start:f.colon], named) {
				f.kind = fieldHop
			}
		}
	}
	return nil
}

// note takes in what a field that matters says.
func (h *head) note(kind fieldKind, value, hop []byte) error {
	switch kind {
	case fieldLength:
		n, ok := parseDecimal(value)
		if !ok || h.length >= 0 && h.length != n {
			return fault("invalid or differing Content-Length")
		}
		h.length = n
	case fieldCoding:
		if h.chunked || !equalFold(value, "chunked") || h.minor == 0 {
			return fault("Transfer-Encoding other than a single chunked, or in HTTP/1.0")
		}
		h.chunked = true
	case fieldConnection, fieldProxyConnection, fieldTE, fieldVia, fieldTrailer:
		return h.noteList(kind, value, hop)
	case fieldHost:
		h.hosts++
		h.host = value
	case fieldUpgrade:
		h.websocket = equalFold(value, "websocket")
	case fieldMaxForwards:
		n, ok := parseDecimal(value)
		if !ok {
			return fault("invalid Max-Forwards")
		}
		h.forwards = n
	case fieldDate:
		h.dated = true
	case fieldTrace:
		h.trace = value
	}
	return nil
}

// noteList takes in the elements of a comma-separated value.
func (h *head) noteList(kind fieldKind, value, hop []byte) error {
	for item := range bytes.SplitSeq(value, []byte{','}) {
		switch item = bytes.Trim(item, " \t"); {
		case kind == fieldVia: // "1.1 name (comment)"
			if by := bytes.Fields(item); len(by) > 1 && bytes.EqualFold(by[1], hop) {
				h.looped = true
			}
		case kind == fieldTrailer:
			if k := kindOf(item); k == fieldLength || k == fieldCoding || k == fieldTrailer {
				return fault("Trailer names a field of framing")
			}
		case kind == fieldTE:
			item, _, _ = bytes.Cut(item, []byte{';'})
			h.trailers = h.trailers || equalFold(bytes.TrimRight(item, " \t"), "trailers")
		case equalFold(item, "close"):
			h.close = true
		case kind == fieldProxyConnection || len(item) == 0 || equalFold(item, "te"):
		case equalFold(item, "keep-alive"):
			h.keepAlive = true
		case equalFold(item, "upgrade"):
			h.switchOver = true
		case len(h.named) == 32: // each is compared with every field
			return fault("too many options in Connection")
		default:
			h.named = append(h.named, item)
		}
	}
	return nil
}

// appendKept appends the field lines that pass through: whole runs of bytes between those that do not.
func (h *head) appendKept(dst []byte) []byte {
	from, to := uint32(0), uint32(0)
	for i := range h.fields {
		f := &h.fields[i]
		if f.kind >= fieldHop || f.kind == fieldExpect && h.minor == 0 {
			continue
		}
		if f.start != to {
			dst = append(dst, h.raw[from:to]...)
			from = f.start
		}
		to = f.end
	}
	return append(dst, h.raw[from:to]...)
}

// setVersion reads "HTTP/1.0" or "HTTP/1.1".
func (h *head) setVersion(b []byte) bool {
	h.minor = int(b[len(b)-1] - '0')
	return string(b) == "HTTP/1.1" || string(b) == "HTTP/1.0"
}

// parseStatus parses a response head: its first line, "HTTP/1.1 200 reason", and its fields.
func (h *head) parseStatus() (int, error) {
	end := bytes.IndexByte(h.raw, '\n') + 1
	line := h.raw[:end-2]
	if len(line) < 12 || line[8] != ' ' || len(line) > 12 && line[12] != ' ' || !h.setVersion(line[:8]) || !all(line, valueOctet) {
		return 0, fault("malformed status line")
	}
	status, ok := parseDecimal(line[9:12])
	if !ok || status < 100 {
		return 0, fault("malformed status line")
	}
	return int(status), h.parseFields(end, nil, true)
}

// parseDecimal reads digits alone: no sign, no space, no overflow.
func parseDecimal(b []byte) (n int64, ok bool) {
	for _, d := range b {
		if d -= '0'; d > 9 || n > (math.MaxInt64-int64(d))/10 {
			return 0, false
		}
		n = n*10 + int64(d)
	}
	return n, len(b) > 0
}

// ---------------------------------------------------------------------------------------------------------------------
// Requests

// destination is where a request wants to go.
type destination struct {
	key  []byte // host:port, lower case, without brackets and trailing dot: the name of its pool
	host []byte // the front of key
	port uint16
	ip   netip.Addr // set where host is an address
}

// exchange is one request and its answer. It belongs to the client's goroutine, and is pooled.
type exchange struct {
	srv   *server
	c     *client
	start time.Time

	line, out, in []byte // copies: the request line, the head for the origin (kept for a retry), the head for the client
	method, auth  []byte // slices of line; auth is host[:port] as the client wrote it, the Host field
	target        []byte // slice of line: what the origin gets, path and query, "*", for CONNECT nothing
	connect       bool
	dst           destination
	reused        bool           // the upstream connection came from the pool
	peer          netip.AddrPort // where it goes

	req, resp         head
	reqBody, respBody body
	status            int
	begun             bool   // a byte of the final response is on its way
	keep, lingers     bool   // the client connection serves another request; is closed with care, since unread bytes are about
	closed            string // why a tunnel ended
	upBytes           int64  // of the body or tunnel, from the client
	trace             string // traceparent's trace-id

	upload   sync.WaitGroup // the goroutine of sendBody
	sent     atomic.Bool    // it has sent all
	headSeen bool           // the final response has begun; guarded by client.mu

	awaitClient, awaitOrigin func() // armClient and armOrigin, stored since a method value is allocated each time
}

// begin makes x new, but for the memory it has.
func (x *exchange) begin(c *client) {
	*x = exchange{srv: x.srv, c: c, start: time.Now(), line: x.line[:0], dst: destination{key: x.dst.key[:0]}, out: x.out[:0], in: x.in[:0],
		req: head{fields: x.req.fields, named: x.req.named}, resp: head{fields: x.resp.fields, named: x.resp.named},
		awaitClient: x.awaitClient, awaitOrigin: x.awaitOrigin}
	x.req.reset(nil)
}

// serve handles one request from head to log record, and reports whether the connection can serve another.
func (x *exchange) serve() bool {
	f := x.readRequest()
	if f == nil {
		f = x.admit()
	}
	switch {
	case f != nil:
	case x.connect:
		f = x.tunnel()
	case x.req.forwards == 0 && x.countsForwards():
		f = x.answerSelf()
	default:
		f = x.forward()
	}
	x.conclude(f)
	if x.lingers {
		x.c.linger()
	}
	return x.keep
}

// conclude answers a failure where that is still possible, and writes the record.
func (x *exchange) conclude(f *failure) {
	if f != nil && !x.begun && f.status != 0 {
		x.answer(f)
	} else if f != nil {
		x.keep = false
	}
	x.record(f)
}

// readRequest reads and parses a request head.
func (x *exchange) readRequest() *failure {
	raw, err := x.c.readHead(int(x.srv.cfg.MaxHeader), deadline(x.srv.cfg.HeaderTimeout))
	if err == nil {
		end := bytes.IndexByte(raw, '\n') + 1
		x.req.reset(raw)
		x.line = append(x.line, raw[:end-2]...)
		if err = x.parseLine(); err == nil {
			err = x.req.parseFields(end, x.srv.hop[:len(x.srv.hop)-2], false)
		}
		if err == nil {
			err = x.parseTarget()
		}
	}
	if err != nil {
		x.lingers = true
		return x.clientFailure(err, "head", x.srv.cfg.HeaderTimeout, "SLUICE_HEADER_TIMEOUT")
	}
	x.keep = x.req.minor == 1 && !x.req.close // a proxy does not persist with HTTP/1.0 clients (RFC 9112, 9.3)
	x.reqBody.begin(&x.c.wire, &x.req, bodyNone, int64(x.srv.cfg.MaxRequestBody))
	x.trace = traceID(string(x.req.trace))
	return nil
}

// traceID is the trace-id of a traceparent, "" when that is not well-formed (W3C Trace Context, 3.2): version-trace-parent-flags in
// lower-case hexadecimal, not all zero.
func traceID(parent string) string {
	var part [4]string
	for i, n := range []int{2, 32, 16, 2} {
		text, rest, more := strings.Cut(parent, "-")
		if len(text) != n || strings.Trim(text, "0123456789abcdef") != "" || more != (i < 3) && (i < 3 || part[0] == "00") {
			return ""
		}
		part[i], parent = text, rest
	}
	if part[0] == "ff" || strings.Trim(part[1], "0") == "" || strings.Trim(part[2], "0") == "" {
		return ""
	}
	return part[1]
}

// parseLine splits "METHOD target HTTP/1.1", single spaces and nothing else (RFC 9112, 3).
func (x *exchange) parseLine() error {
	method, rest, ok1 := bytes.Cut(x.line, []byte{' '})
	target, version, ok2 := bytes.Cut(rest, []byte{' '})
	if !ok1 || !ok2 || !isToken(method) {
		return fault("malformed request line")
	}
	if len(version) == 0 || !x.req.setVersion(version) {
		return fault("the version is neither HTTP/1.0 nor HTTP/1.1")
	}
	if len(target) == 0 || !all(target, targetOctet) {
		return fault("the request-target is empty, or holds an invalid byte or a fragment")
	}
	x.method, x.target, x.connect = method, target, string(method) == "CONNECT"
	return nil
}

// parseTarget reads the request-target, absolute-form or for CONNECT authority-form. It overrides Host (RFC 9112, 3.2.2).
func (x *exchange) parseTarget() error {
	_, _, err := splitAuthority(x.req.host, 80)
	if x.req.hosts > 1 || x.req.hosts == 0 && x.req.minor == 1 || x.req.hosts == 1 && err != nil {
		return fault("Host is missing, repeated or invalid")
	}
	if x.connect && (x.req.chunked || x.req.length > 0) {
		return fault("a CONNECT request with a body")
	} else if x.connect {
		x.auth, x.target = x.target, nil
		return x.dst.parse(x.auth, 0)
	}
	const scheme = "http://"
	switch n := min(len(scheme), len(x.target)); {
	case equalFold(x.target[:n], scheme):
	case x.target[0] == '/' || x.target[0] == '*':
		return fault("this is a forward proxy: set http_proxy and https_proxy to its address, or send an absolute URL")
	case equalFold(x.target[:n], "https:/"):
		return fault("https URLs go through a tunnel: send CONNECT host:443")
	default:
		return fault("the request-target is not an http:// URL")
	}
	x.auth, x.target = x.target[len(scheme):], nil
	if end := bytes.IndexAny(x.auth, "/?"); end >= 0 {
		x.auth, x.target = x.auth[:end], x.auth[end:]
	}
	return x.dst.parse(x.auth, 80)
}

// countsForwards reports whether Max-Forwards means something to the method (RFC 9110, 7.6.2).
func (x *exchange) countsForwards() bool {
	return string(x.method) == "OPTIONS" || string(x.method) == "TRACE"
}

// parse reads an authority; std is the port where it names none, 0 if it must.
func (d *destination) parse(authority []byte, std uint16) error {
	host, port, err := splitAuthority(authority, std)
	if err != nil {
		return err
	}
	if host[0] == '[' {
		ip, _ := netip.ParseAddr(string(host[1 : len(host)-1])) // checked by splitAuthority
		d.ip = ip.Unmap()
		d.key = d.ip.AppendTo(d.key)
	} else {
		d.ip, _ = parseIPv4(host)
		d.key = bytes.TrimSuffix(append(d.key, host...), []byte{'.'})
		for i, o := range d.key {
			if o >= 'A' && o <= 'Z' {
				d.key[i] = o | 0x20
			}
		}
	}
	n := len(d.key)
	d.key = strconv.AppendUint(append(d.key, ':'), uint64(port), 10)
	d.host, d.port = d.key[:n], port
	return nil
}

// splitAuthority checks host[:port]; std is the port where none stands, 0 if one must. An IPv6 address keeps its brackets.
func splitAuthority(b []byte, std uint16) (host []byte, port uint16, err error) {
	host, port = b, std
	if i := bytes.LastIndexByte(b, ':'); i > bytes.LastIndexByte(b, ']') {
		n, ok := parseDecimal(b[i+1:])
		if !ok || n > 65535 {
			return nil, 0, faultAuthority
		}
		host, port = b[:i], uint16(n)
	}
	ok := isHostName(host)
	if len(host) > 2 && host[0] == '[' && host[len(host)-1] == ']' {
		ip, err := netip.ParseAddr(string(host[1 : len(host)-1]))
		ok = err == nil && ip.Is6() && ip.Zone() == ""
	}
	if !ok || port == 0 {
		return nil, 0, faultAuthority
	}
	return host, port, nil
}

// isHostName accepts names of letters, digits, "-" and "_" in labels of 1 to 63 bytes, 253 in all, with or without a trailing
// dot, and dotted-quad IPv4. A last label that is a number means an IPv4 address to resolvers and browsers (WHATWG URL, "ends
// in a number"), in octal, hexadecimal or short forms too; only the plain form is taken.
func isHostName(b []byte) bool {
	b = bytes.TrimSuffix(b, []byte{'.'})
	if len(b) == 0 || len(b) > 253 || !all(b, hostOctet) {
		return false
	}
	label := b
	for rest, more := b, true; more; {
		if label, rest, more = bytes.Cut(rest, []byte{'.'}); len(label) == 0 || len(label) > 63 {
			return false
		}
	}
	if len(bytes.Trim(label, "0123456789")) == 0 || label[0] == '0' && len(label) > 1 && label[1]|0x20 == 'x' {
		_, ok := parseIPv4(b)
		return ok
	}
	return true
}

// parseIPv4 reads a dotted quad of plain decimals. Unlike netip.ParseAddr it takes bytes, so nothing is allocated.
func parseIPv4(b []byte) (netip.Addr, bool) {
	var quad [4]byte
	b = bytes.TrimSuffix(b, []byte{'.'})
	for i := range quad {
		part, rest, more := bytes.Cut(b, []byte{'.'})
		n, ok := parseDecimal(part)
		if !ok || n > 255 || len(part) > 1 && part[0] == '0' || more != (i < 3) {
			return netip.Addr{}, false
		}
		quad[i], b = byte(n), rest
	}
	return netip.AddrFrom4(quad), true
}

// ---------------------------------------------------------------------------------------------------------------------
// Policy

// admit decides what can be decided before a name is resolved. (Credentials and host rules will stand here.)
func (x *exchange) admit() *failure {
	limit := int64(x.srv.cfg.MaxRequestBody)
	switch {
	case x.srv.draining.Load():
		x.keep = false
		return fail(503, tokenLimit, "this proxy is draining: it takes no more requests")
	case x.req.looped:
		return fail(502, tokenLoop, "the request came back to this proxy: Via names %s (SLUICE_NAME)", x.srv.cfg.Name)
	case x.dst.ip.IsValid() && x.srv.isOwn(netip.AddrPortFrom(x.dst.ip, x.dst.port)):
		return fail(502, tokenLoop, "%s is this proxy itself", x.dst.key)
	case !x.srv.cfg.AllowPorts.has(x.dst.port):
		return fail(403, tokenDenied, "destination port %d is not allowed (SLUICE_ALLOW_PORTS)", x.dst.port)
	case limit > 0 && x.req.length > limit:
		return fail(413, tokenRequest, "the request body is larger than %d bytes (SLUICE_MAX_REQUEST_BODY)", limit)
	}
	return nil
}

// addressClass says what kind of destination an address is.
type addressClass string

const (
	classPublic      addressClass = "public"
	classUnspecified addressClass = "unspecified"
	classMulticast   addressClass = "multicast"
)

// specialBlocks are the blocks that are not public (IANA special-purpose address registries, RFC 6890).
var specialBlocks = []struct {
	class  addressClass
	blocks prefixes
}{
	{classUnspecified, blocks("0.0.0.0/8 ::/128")},
	{"loopback", blocks("127.0.0.0/8 ::1/128")},
	{"private", blocks("10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7")},
	{"shared", blocks("100.64.0.0/10")},
	{"link-local", blocks("169.254.0.0/16 fe80::/10")}, // cloud metadata services live here
	{classMulticast, blocks("224.0.0.0/4 ff00::/8")},
	{"reserved", blocks("192.0.0.0/24 192.0.2.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 240.0.0.0/4 " +
		"::/96 64:ff9b:1::/48 100::/64 2001::/23 2001:db8::/32 3fff::/20 5f00::/16 fec0::/10")},
}

// classify tells the class of an address. One that carries an IPv4 address to which a translator or a relay on the way would
// send (NAT64, RFC 6052; 6to4, RFC 3056) has that address's class.
func classify(a netip.Addr) addressClass {
	if b := a.As16(); a.Is6() && string(b[:12]) == "\x00\x64\xff\x9b\x00\x00\x00\x00\x00\x00\x00\x00" {
		a = netip.AddrFrom4([4]byte(b[12:]))
	} else if a.Is6() && b[0] == 0x20 && b[1] == 0x02 {
		a = netip.AddrFrom4([4]byte(b[2:6]))
	}
	for _, special := range specialBlocks {
		if special.blocks.contains(a.Unmap()) {
			return special.class
		}
	}
	return classPublic
}

// judge picks the addresses that may be dialled: public ones, and what ALLOW_CIDRS and ALLOW_PRIVATE_HOSTS let through.
func (s *server) judge(d *destination, addrs []netip.Addr) (allowed []netip.AddrPort, refused *failure) {
	private := s.cfg.AllowPrivateHosts.match(d.host, d.ip, d.port)
	for _, a := range addrs {
		class := classify(a)
		switch ap := netip.AddrPortFrom(a, d.port); {
		case s.isOwn(ap):
			refused = fail(502, tokenLoop, "%s is this proxy itself", d.key)
		case class == classPublic || s.cfg.AllowCIDRs.contains(a), private && class != classUnspecified && class != classMulticast:
			allowed = append(allowed, ap)
		case refused == nil:
			refused = fail(403, tokenProhibited, "%s is at a %s address, %s (SLUICE_ALLOW_CIDRS, SLUICE_ALLOW_PRIVATE_HOSTS)", d.host, class, a)
		}
	}
	if len(allowed) > 0 {
		return allowed, nil
	}
	return nil, refused
}

// ---------------------------------------------------------------------------------------------------------------------
// Names and dialling

const (
	maxNames     = 4096 // answers kept
	maxAddresses = 16   // of one name, so that a hostile answer does not start a thousand connections
)

// resolver looks names up and remembers the answers for a while.
type resolver struct {
	lookup              func(ctx context.Context, network, host string) ([]netip.Addr, error)
	ttl, stale, timeout time.Duration

	mu      sync.Mutex
	answers map[string]*dnsAnswer // guarded by mu
}

// dnsAnswer is what is known of one name; guarded by resolver.mu.
type dnsAnswer struct {
	addrs   []netip.Addr  // never changed once set
	err     error         // of the last lookup
	learned time.Time     // when addrs were true
	next    time.Time     // when to ask again
	done    chan struct{} // closed when the lookup under way ends; nil when there is none
}

func newResolver(cfg *config) *resolver {
	system := &net.Resolver{PreferGo: true} // cgo's getaddrinfo reads "0x7f.1" as an address, which policy has not judged
	var turn atomic.Uint32
	system.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if n := len(cfg.DNSServers); n > 0 { // the resolver's next try comes here again, and gets the next server
			addr = cfg.DNSServers[int(turn.Add(1)-1)%n]
		}
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err == nil { // the resolver itself would read on, for 5 s, when nobody waits any more
			context.AfterFunc(ctx, func() { conn.Close() })
		}
		return conn, err
	}
	return &resolver{lookup: system.LookupNetIP, ttl: cfg.DNSCacheTTL, stale: cfg.DNSStale, timeout: cfg.DNSTimeout, answers: map[string]*dnsAnswer{}}
}

// resolve returns the addresses of a name. Lookups of one name at one time are one, which goes on when ctx ends this wait.
func (r *resolver) resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	a := r.answers[host]
	if a == nil {
		for other, o := range r.answers { // any may go when there are too many
			if len(r.answers) < maxNames {
				break
			} else if o.done == nil {
				delete(r.answers, other)
			}
		}
		a = &dnsAnswer{}
		r.answers[host] = a
	}
	if a.done != nil || !time.Now().Before(a.next) {
		if a.done == nil {
			a.done = make(chan struct{})
			go r.refresh(host, a)
		}
		done := a.done
		r.mu.Unlock()
		select {
		case <-done:
		case <-ctx.Done():
		}
		r.mu.Lock()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	if len(a.addrs) == 0 {
		return nil, a.err
	}
	return a.addrs, nil
}

// refresh looks host up. When that fails, the old answer serves until it is too stale, unless the name is known to be gone.
func (r *resolver) refresh(host string, a *dnsAnswer) {
	ctx, cancel := within(r.timeout)
	addrs, err := r.lookup(ctx, "ip", host)
	cancel()
	var dns *net.DNSError
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if a.err = err; err == nil {
		a.addrs, a.learned = interleave(addrs[:min(len(addrs), maxAddresses)]), now
	} else if errors.As(err, &dns) && dns.IsNotFound || now.Sub(a.learned) >= r.stale {
		a.addrs = nil
		delete(r.answers, host)
	}
	a.next = now.Add(r.ttl)
	close(a.done)
	a.done = nil
}

// interleave orders addresses so that the families take turns, beginning with that of the first (RFC 8305, 4).
func interleave(addrs []netip.Addr) []netip.Addr {
	rank, seen := map[netip.Addr]int{}, [2]int{}
	for i, a := range addrs {
		family := 0
		if addrs[i] = a.Unmap(); addrs[i].Is4() != addrs[0].Is4() {
			family = 1
		}
		rank[addrs[i]] = 2*seen[family] + family
		seen[family]++
	}
	slices.SortFunc(addrs, func(a, b netip.Addr) int { return rank[a] - rank[b] })
	return slices.Compact(addrs)
}

// dialUpstream resolves, judges and connects. The whole of it ends when DIAL_TIMEOUT is over or the client has left.
func (x *exchange) dialUpstream() (*upstream, *failure) {
	ctx, cancel := within(x.srv.cfg.DialTimeout)
	defer cancel()
	x.c.track(nil, false, cancel)
	defer x.c.track(nil, false, nil)
	addrs := []netip.Addr{x.dst.ip}
	if !x.dst.ip.IsValid() {
		var err error
		if addrs, err = x.srv.names.resolve(ctx, string(x.dst.host)); err != nil {
			return nil, x.dialFailure(err)
		}
	}
	allowed, f := x.srv.judge(&x.dst, addrs)
	if f != nil {
		return nil, f
	}
	conn, err := x.srv.race(ctx, allowed)
	if err != nil {
		return nil, x.dialFailure(err)
	}
	up := &upstream{key: string(x.dst.key), peer: addrPort(conn.RemoteAddr())}
	up.attach(x.srv, conn)
	return up, nil
}

// dialFailure says why there is no connection.
func (x *exchange) dialFailure(err error) *failure {
	host, key := x.dst.host, x.dst.key
	var dns *net.DNSError
	var op *net.OpError
	isDNS, dialled := errors.As(err, &dns), errors.As(err, &op)
	timeout := errors.Is(err, context.DeadlineExceeded) || isDNS && dns.IsTimeout || dialled && op.Timeout()
	switch {
	case errors.Is(err, context.Canceled):
		return fail(0, tokenClient, "the client left while %s was dialled", key)
	case timeout && (isDNS || !dialled):
		return fail(504, tokenDNSTimeout, "no answer from the resolver for %s (SLUICE_DNS_TIMEOUT, SLUICE_DIAL_TIMEOUT)", host).because(err)
	case isDNS && dns.IsNotFound:
		return fail(502, tokenDNS, "no such name: %s", host).because(err)
	case isDNS || !dialled:
		return fail(502, tokenDNS, "the resolver failed for %s", host).because(err)
	case timeout:
		return fail(504, tokenConnectTimeout, "%s did not accept a connection within %v (SLUICE_DIAL_TIMEOUT)", key, x.srv.cfg.DialTimeout).because(err)
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.EADDRNOTAVAIL):
		return fail(503, tokenLimit, "no descriptor or port is left for a connection to %s (SLUICE_NOFILE)", key).because(err)
	case isUnroutable(err):
		return fail(502, tokenUnroutable, "there is no route to %s", key).because(err)
	}
	return fail(502, tokenRefused, "%s refused the connection", key).because(err)
}

func isUnroutable(err error) bool {
	return errors.Is(err, syscall.EHOSTUNREACH) || errors.Is(err, syscall.ENETUNREACH) || errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EINVAL)
}

// race connects to the first that answers (RFC 8305), each with a head start, the next at once when one fails.
func (s *server) race(ctx context.Context, addrs []netip.AddrPort) (*net.TCPConn, error) {
	dialer := &net.Dialer{Control: s.sockets.dialling, KeepAlive: -1}
	dialer.SetMultipathTCP(false)
	if len(addrs) == 1 {
		return dialer.DialTCP(ctx, "tcp", netip.AddrPort{}, addrs[0])
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	winner, losers := make(chan *net.TCPConn), make(chan error)
	start := time.NewTimer(0)
	defer start.Stop()
	var worst error
	for next, lost := 0, 0; lost < len(addrs); {
		select {
		case <-start.C:
			if next < len(addrs) {
				go attempt(ctx, dialer, addrs[next], winner, losers)
				next++
				start.Reset(250 * time.Millisecond) // RFC 8305, 5
			}
		case conn := <-winner:
			return conn, nil
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

// attempt dials one address. What connects when the race is over is closed.
func attempt(ctx context.Context, dialer *net.Dialer, addr netip.AddrPort, winner chan<- *net.TCPConn, losers chan<- error) {
	conn, err := dialer.DialTCP(ctx, "tcp", netip.AddrPort{}, addr)
	if err != nil {
		winner = nil
	} else {
		losers = nil
	}
	select {
	case winner <- conn:
	case losers <- err:
	case <-ctx.Done():
		if err == nil {
			conn.Close()
		}
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Pool

// upstream is one connection to an origin.
type upstream struct {
	wire
	key   string // host:port it was dialled for; it is reused for no other
	peer  netip.AddrPort
	watch watched
	hung  atomic.Bool // the origin has closed its side
	since time.Time   // idle since; guarded by pool.mu
}

func (up *upstream) close() {
	up.srv.watcher.remove(&up.watch)
	up.tcp.Close()
	up.drop()
}

// pool keeps idle connections to origins, by host and port, the youngest last: it is reused first.
type pool struct {
	limit, perHost int
	ttl            time.Duration

	mu     sync.Mutex
	hosts  map[string][]*upstream // guarded by mu
	idle   int                    // in all lists; guarded by mu
	expiry *time.Timer            // runs expire; guarded by mu
}

func newPool(cfg *config) *pool {
	p := &pool{limit: cfg.PoolIdle, perHost: cfg.PoolIdlePerHost, ttl: cfg.PoolIdleTimeout, hosts: map[string][]*upstream{}}
	p.expiry = time.AfterFunc(time.Hour, p.expire)
	p.expire()
	return p
}

// get takes a connection that was dialled for key, or nil. A careful caller has it probed whatever its age.
func (p *pool) get(key []byte, careful bool) *upstream {
	for {
		p.mu.Lock()
		list := p.hosts[string(key)]
		if len(list) == 0 {
			p.mu.Unlock()
			return nil
		}
		up := list[len(list)-1]
		p.removeLocked(up, len(list)-1)
		p.mu.Unlock()
		// The watcher tells of an end, but not of a farewell (408) that would be taken for the answer to what comes next.
		if !up.hung.Load() && (!careful && time.Since(up.since) < 100*time.Millisecond || isQuiet(up.raw)) {
			return up
		}
		up.close()
	}
}

// put keeps a connection for later, or closes it.
func (p *pool) put(up *upstream) {
	up.drop()
	p.mu.Lock()
	list := p.hosts[up.key]
	keep := p.idle < p.limit && len(list) < p.perHost
	if keep {
		up.since = time.Now()
		p.hosts[up.key] = append(list, up)
		p.idle++
	}
	p.mu.Unlock()
	if !keep || up.hung.Load() && p.remove(up) { // looked at last: the watcher may have come before it was idle
		up.close()
	}
}

func (p *pool) removeLocked(up *upstream, i int) {
	p.hosts[up.key] = slices.Delete(p.hosts[up.key], i, i+1)
	p.idle--
}

// remove takes up out if it is idle; then its caller owns it.
func (p *pool) remove(up *upstream) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.Index(p.hosts[up.key], up)
	if i >= 0 {
		p.removeLocked(up, i)
	}
	return i >= 0
}

// expire closes connections idle for longer than POOL_IDLE_TIMEOUT and forgets hosts without any, again and again.
func (p *pool) expire() {
	var old []*upstream
	p.mu.Lock()
	for key, list := range p.hosts {
		for len(list) > 0 && p.ttl > 0 && time.Since(list[0].since) >= p.ttl {
			old = append(old, list[0])
			p.removeLocked(list[0], 0)
			list = p.hosts[key]
		}
		if len(list) == 0 {
			delete(p.hosts, key)
		}
	}
	if p.limit > 0 {
		p.expiry.Reset(max(10*time.Millisecond, min(cmp.Or(p.ttl/4, time.Minute), 5*time.Second)))
	}
	p.mu.Unlock()
	for _, up := range old {
		up.close()
	}
}

// close closes all idle connections; those in use are closed when they come back.
func (p *pool) close() {
	p.mu.Lock()
	p.limit, p.ttl = 0, 1
	p.expiry.Stop()
	p.mu.Unlock()
	p.expire()
}

// ---------------------------------------------------------------------------------------------------------------------
// Forwarding

// forward sends the request to its origin and the response back. A reused connection that died before a byte of response is
// replaced by a new one, if the request can be repeated (RFC 9110, 9.2.2).
func (x *exchange) forward() *failure {
	x.out = x.appendRequest(x.out)
	for up := x.srv.pool.get(x.dst.key, !x.repeatable()); ; up = nil {
		x.reused = up != nil
		if !x.reused {
			var f *failure
			if up, f = x.dialUpstream(); f != nil {
				return f
			}
			x.srv.watcher.add(&up.watch, up.raw, up)
		}
		if f := x.roundTrip(up); f == nil || !f.stale || !x.reused || !x.repeatable() {
			return f
		}
	}
}

// repeatable reports whether the request may be sent twice: an idempotent method and no body.
func (x *exchange) repeatable() bool {
	switch string(x.method) {
	case "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE":
		return x.reqBody.framing == bodyNone
	}
	return false
}

// upgrades reports whether the client asks for a WebSocket (RFC 6455, 4.1), the one upgrade that is passed on.
func (x *exchange) upgrades() bool {
	return x.req.switchOver && x.req.websocket && x.req.minor == 1 && string(x.method) == "GET" && x.reqBody.framing == bodyNone
}

// appendRequest makes the head for the origin.
func (x *exchange) appendRequest(b []byte) []byte {
	b = append(append(b, x.method...), ' ')
	if len(x.target) == 0 && string(x.method) == "OPTIONS" {
		b = append(b, '*') // RFC 9112, 3.2.4
	} else if len(x.target) == 0 || x.target[0] == '?' {
		b = append(b, '/')
	}
	b = append(append(b, x.target...), " HTTP/1.1\r\nHost: "...)
	b = append(append(b, x.auth...), "\r\n"...)
	b = x.req.appendKept(b)
	b = x.appendVia(b, &x.req)
	if x.reqBody.framing == bodyChunked {
		b = append(b, "Transfer-Encoding: chunked\r\n"...)
	} else if x.req.length >= 0 {
		b = appendNumber(b, "Content-Length: ", x.req.length)
	}
	if n := x.req.forwards; n >= 0 {
		if x.countsForwards() {
			n-- // 0 is answered by answerSelf
		}
		b = appendNumber(b, "Max-Forwards: ", n)
	}
	if x.upgrades() {
		b = append(b, "Connection: Upgrade\r\nUpgrade: websocket\r\n"...)
	} else if x.req.trailers && x.req.minor == 1 {
		b = append(b, "TE: trailers\r\nConnection: TE\r\n"...) // RFC 9110, 10.1.4
	}
	return append(b, "\r\n"...)
}

func (x *exchange) appendVia(b []byte, h *head) []byte {
	b = append(append(b, "Via: 1."...), '0'+byte(h.minor), ' ')
	return append(b, x.srv.hop...)
}

func appendNumber(b []byte, name string, n int64) []byte {
	b = strconv.AppendInt(append(b, name...), n, 10)
	return append(b, "\r\n"...)
}

// roundTrip carries the request over up and the response back, and leaves up in the pool or closed.
func (x *exchange) roundTrip(up *upstream) (f *failure) {
	x.peer = up.peer
	x.c.track(up, false, nil)
	sending := x.reqBody.framing == bodyChunked || x.reqBody.framing == bodyLength && x.reqBody.left > int64(x.c.buffered())
	if sending {
		up.tcp.SetReadDeadline(time.Time{}) // sendBody sets one when the body is sent
		x.upload.Add(1)
		go x.sendBody(up)
	} else {
		f = x.sendWhole(up)
	}
	if f == nil {
		f = x.receive(up)
	}
	x.c.track(nil, false, nil)
	complete := f == nil
	if sending {
		complete = x.joinUpload(up) && complete
	}
	x.upBytes += x.reqBody.size
	persists := !x.resp.close && (x.resp.minor == 1 || x.resp.keepAlive) && x.respBody.framing != bodyClose
	if complete && persists && x.closed == "" && up.buffered() == 0 {
		x.srv.pool.put(up)
	} else {
		up.close()
	}
	return f
}

// sendWhole sends a request whose body, if any, is already in the client's buffer.
func (x *exchange) sendWhole(up *upstream) *failure {
	body, _, _ := x.reqBody.nextBuffered() // cannot fail: its length is known and within the limit
	up.tcp.SetReadDeadline(deadline(x.srv.cfg.ResponseTimeout))
	if err := up.write(x.srv.cfg.BodyTimeout, x.out, body, nil); err != nil {
		return x.upstreamFailure(err, true)
	}
	return nil
}

// sendBody sends the request while receive waits for the response on the same connection, since an origin may answer before it
// has read everything. It runs in a goroutine of its own. That the origin closed is no failure: it may have answered.
func (x *exchange) sendBody(up *upstream) {
	defer x.upload.Done()
	out := bodyWriter{dst: &up.wire, limit: x.srv.cfg.BodyTimeout, head: x.out, chunked: x.reqBody.framing == bodyChunked, started: new(bool)}
	readErr, writeErr := out.copy(&x.reqBody, x.awaitClient)
	x.sent.Store(readErr == nil && writeErr == nil)
	x.c.mu.Lock()
	defer x.c.mu.Unlock()
	if readErr != nil {
		x.c.failed = x.clientFailure(readErr, "body", out.limit, "SLUICE_BODY_TIMEOUT")
	} else if errors.Is(writeErr, os.ErrDeadlineExceeded) {
		x.c.failed = fail(504, tokenResponseTimeout, "%s took no more of the request body for %v (SLUICE_BODY_TIMEOUT)", x.dst.key, out.limit)
	}
	if x.c.failed != nil {
		up.tcp.Close()
	} else if !x.headSeen {
		up.tcp.SetReadDeadline(deadline(x.srv.cfg.ResponseTimeout))
	}
}

// joinUpload ends sendBody. A body that is not all here is given up, and since its rest cannot be told from a next request, the
// client connection too. An upstream connection on which it has not sent everything cannot be used again.
func (x *exchange) joinUpload(up *upstream) (complete bool) {
	if complete = x.sent.Load(); !complete {
		up.tcp.Close()
		x.armClient()
	}
	x.upload.Wait()
	if !x.reqBody.ended.Load() {
		x.keep, x.lingers = false, true
	}
	return complete
}

// armClient sets the limit for the client's next bytes of a body. Once the exchange is over, that is at once.
func (x *exchange) armClient() {
	x.c.mu.Lock()
	defer x.c.mu.Unlock()
	if x.c.upstream == nil {
		x.c.tcp.SetReadDeadline(time.Unix(1, 0))
	} else {
		x.c.tcp.SetReadDeadline(deadline(x.srv.cfg.BodyTimeout))
	}
}

// armOrigin sets the limit for the origin's next bytes of a body.
func (x *exchange) armOrigin() { x.c.upstream.tcp.SetReadDeadline(deadline(x.srv.cfg.BodyTimeout)) }

// receive reads the origin's answer and passes it on.
func (x *exchange) receive(up *upstream) *failure {
	for interim := 0; ; interim++ {
		raw, err := up.readHead(int(x.srv.cfg.MaxHeader), time.Time{})
		if err != nil {
			return x.upstreamFailure(err, interim == 0 && up.buffered() == 0)
		}
		x.resp.reset(raw)
		status, err := x.resp.parseStatus()
		if err == nil && status == 101 && !(x.upgrades() && x.resp.switchOver && x.resp.websocket) {
			err = fault("a 101 response that was not asked for")
		} else if err == nil && interim == 100 {
			err = fault("too many informational responses")
		}
		switch {
		case err != nil:
			return x.upstreamFailure(err, false)
		case status == 101:
			x.status, x.keep, x.begun = 101, false, true
			f := x.tell(append(x.appendResponse(x.in[:0]), "Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"...))
			if f == nil {
				x.relay(up)
			}
			return f
		case status >= 200:
			x.status = status
			return x.respond(up)
		case x.req.minor == 1: // 1xx are not for HTTP/1.0 clients (RFC 9110, 15.2)
			if f := x.tell(append(x.appendResponse(x.in[:0]), "\r\n"...)); f != nil {
				return f
			}
		}
	}
}

// appendResponse makes the head for the client from the origin's, but for its framing and end.
func (x *exchange) appendResponse(b []byte) []byte {
	line := x.resp.raw[len("HTTP/1.x"):bytes.IndexByte(x.resp.raw, '\r')]
	b = append(append(b, "HTTP/1.1"...), line...)
	if len(line) == len(" 200") {
		b = append(b, ' ') // the space stands also before an empty reason (RFC 9112, 4)
	}
	b = x.resp.appendKept(append(b, "\r\n"...))
	return x.appendVia(b, &x.resp)
}

// respond passes a final response on: its head together with what is here of the body, then the rest as it comes.
func (x *exchange) respond(up *upstream) *failure {
	x.c.mu.Lock()
	x.headSeen = true
	x.c.mu.Unlock()
	limit := int64(x.srv.cfg.MaxResponseBody)
	x.respBody.begin(&up.wire, &x.resp, bodyClose, limit)
	bodiless := string(x.method) == "HEAD" || x.status == 204 || x.status == 304
	if bodiless {
		x.respBody.framing = bodyNone
	} else if limit > 0 && x.resp.length > limit {
		return x.upstreamFailure(faultBodyTooLarge, false)
	}
	x.keep = x.keep && x.reqBody.ended.Load() && !x.srv.draining.Load()
	out := bodyWriter{dst: &x.c.wire, limit: x.srv.cfg.BodyTimeout, started: &x.begun}
	b := x.appendResponse(x.in[:0])
	switch {
	case x.status == 204: // no Content-Length (RFC 9110, 8.6)
	case x.resp.length >= 0:
		b = appendNumber(b, "Content-Length: ", x.resp.length)
	case bodiless:
	case x.req.minor == 1:
		out.chunked = true
		b = append(b, "Transfer-Encoding: chunked\r\n"...)
	default: // the end of the connection is the end of the body
		x.keep = false
	}
	if !x.resp.dated {
		b = time.Now().UTC().AppendFormat(append(b, "Date: "...), http.TimeFormat+"\r\n") // RFC 9110, 6.6.1
	}
	if !x.keep {
		b = append(b, "Connection: close\r\n"...)
	}
	x.in = append(b, "\r\n"...)
	out.head = x.in
	readErr, writeErr := out.copy(&x.respBody, x.awaitOrigin)
	if writeErr != nil {
		return x.clientFailure(writeErr, "", 0, "")
	} else if readErr == nil {
		return nil
	}
	if x.begun && !out.chunked && x.resp.length < 0 {
		x.c.tcp.SetLinger(0) // a plain close would look like the end of the body
	}
	return x.upstreamFailure(readErr, false)
}

// clientFailure says what is wrong with the client's connection or message, the part of it that was awaited within limit.
func (x *exchange) clientFailure(err error, part string, limit time.Duration, variable string) *failure {
	var bad fault
	switch {
	case errors.Is(err, faultLineTooLong):
		return fail(414, tokenRequest, "the request-target is longer than %d bytes (SLUICE_MAX_HEADER)", x.srv.cfg.MaxHeader)
	case errors.Is(err, faultHeadTooLarge), errors.Is(err, faultManyFields):
		return fail(431, tokenRequest, "%v: it may have %d bytes (SLUICE_MAX_HEADER)", err, x.srv.cfg.MaxHeader)
	case errors.Is(err, faultBodyTooLarge):
		return fail(413, tokenRequest, "the request body is larger than %d bytes (SLUICE_MAX_REQUEST_BODY)", x.srv.cfg.MaxRequestBody)
	case errors.As(err, &bad):
		return fail(400, tokenRequest, "%v", bad)
	case limit > 0 && errors.Is(err, os.ErrDeadlineExceeded):
		return fail(408, tokenRequest, "the request's %s did not come within %v (%s)", part, limit, variable)
	}
	return fail(0, tokenClient, "the client left").because(err)
}

// upstreamFailure says what is wrong with the origin's connection or message, or that the client left or sent a bad body.
func (x *exchange) upstreamFailure(err error, nothing bool) *failure {
	x.c.mu.Lock()
	failed := x.c.failed
	x.c.mu.Unlock()
	awaited, limit := "SLUICE_RESPONSE_TIMEOUT", x.srv.cfg.ResponseTimeout
	if x.headSeen {
		awaited, limit = "SLUICE_BODY_TIMEOUT", x.srv.cfg.BodyTimeout
	}
	var bad fault
	switch {
	case failed != nil:
		return failed
	case errors.Is(err, faultLineTooLong), errors.Is(err, faultHeadTooLarge), errors.Is(err, faultManyFields):
		return fail(502, tokenHeadSize, "response of %s: %v (SLUICE_MAX_HEADER)", x.dst.key, err)
	case errors.Is(err, faultBodyTooLarge):
		return fail(502, tokenBodySize, "response of %s: %v (SLUICE_MAX_RESPONSE_BODY)", x.dst.key, err)
	case errors.As(err, &bad):
		return fail(502, tokenProtocol, "response of %s: %v", x.dst.key, err)
	case errors.Is(err, net.ErrClosed): // by client.abandon
		return fail(0, tokenClient, "the client left before %s had answered", x.dst.key)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fail(504, tokenResponseTimeout, "nothing came from %s for %v (%s)", x.dst.key, limit, awaited)
	}
	f := fail(502, tokenTerminated, "%s closed the connection before its answer was complete", x.dst.key).because(err)
	f.stale = nothing
	return f
}

// ---------------------------------------------------------------------------------------------------------------------
// Bodies

// framing is how the end of a body is told (RFC 9112, 6.3).
type framing uint8

const (
	bodyNone framing = iota
	bodyLength
	bodyChunked
	bodyClose // ends with the connection
)

// What comes next in a chunked body (RFC 9112, 7.1).
const (
	chunkSize = iota
	chunkData
	chunkEnd // the CRLF after the data
	chunkTrailers
	chunkDone
)

const (
	spliceFrom   = 64 << 10 // from this length on a body is moved in the kernel rather than through a buffer
	smallPiece   = 2 << 10  // up to this length a piece is copied behind its head: that costs less than a vector
	maxChunkLine = 256      // a chunk's size with its extensions, which are dropped
)

// body reads the body of one message from a wire.
type body struct {
	w       *wire
	framing framing
	state   int
	left    int64       // bodyLength: bytes to come; bodyChunked: bytes to come of the chunk
	size    int64       // bytes of body so far
	limit   int64       // most bytes, 0 = any
	ended   atomic.Bool // nothing more is to be read of it
	trailer head        // parsed when a chunked body is done
}

// begin reads a head's framing; other is what a body without any has.
func (b *body) begin(w *wire, h *head, other framing, limit int64) {
	*b = body{w: w, framing: other, limit: limit}
	if h.chunked {
		b.framing = bodyChunked
	} else if h.length > 0 {
		b.framing, b.left = bodyLength, h.length
	} else if h.length == 0 {
		b.framing = bodyNone
	}
	b.ended.Store(b.framing == bodyNone)
}

// next returns the next bytes of the body, valid until the wire is filled again, and whether they are the last. There may be
// none then. beforeRead is called before each wait, to set its deadline.
func (b *body) next(beforeRead func()) (data []byte, done bool, err error) {
	for {
		data, done, err = b.nextBuffered()
		if done || err != nil || len(data) > 0 {
			return data, done, err
		}
		beforeRead()
		if err = b.w.fill(); err == io.EOF && b.framing == bodyClose {
			return nil, true, nil
		} else if err == io.EOF {
			return nil, false, io.ErrUnexpectedEOF
		} else if err != nil {
			return nil, false, err
		}
	}
}

// nextBuffered is next for what is already here: it returns nothing when more must be read.
func (b *body) nextBuffered() (data []byte, done bool, err error) {
	switch b.framing {
	case bodyNone:
		done = true
	case bodyChunked:
		data, err = b.nextChunks()
		done = b.state == chunkDone
	case bodyLength:
		data = b.w.unused()[:min(int64(b.w.buffered()), b.left)]
		b.w.r += len(data)
		b.left -= int64(len(data))
		done = b.left == 0
	case bodyClose:
		data = b.w.unused()
		b.w.r = b.w.w
	}
	b.size += int64(len(data))
	if b.limit > 0 && b.size > b.limit {
		return nil, false, faultBodyTooLarge
	}
	b.ended.Store(done)
	return data, done, err
}

// nextChunks decodes all chunks that are here into one run of bytes: what follows the first chunk's data is moved up to it,
// over the size lines between, so that many small chunks leave as one.
func (b *body) nextChunks() ([]byte, error) {
	w := b.w
	start, end := w.r, w.r
	for more := true; more && b.state != chunkDone; {
		if b.state != chunkData {
			var err error
			if more, err = b.chunkFraming(w.unused()); err != nil {
				return nil, err
			}
			continue
		}
		n := int(min(b.left, int64(w.buffered())))
		if end == start {
			start, end = w.r, w.r
		} else {
			copy(w.buf[end:], w.buf[w.r:w.r+n])
		}
		end += n
		w.r += n
		if b.left -= int64(n); b.left == 0 {
			b.state = chunkEnd
		}
		more = n > 0
	}
	return w.buf[start:end], nil
}

// chunkFraming reads what stands between chunks from in. It returns false when not all of it is here.
func (b *body) chunkFraming(in []byte) (bool, error) {
	n := 0
	switch b.state {
	case chunkSize:
		if n = bytes.IndexByte(in[:min(len(in), maxChunkLine)], '\n') + 1; n == 0 && len(in) < maxChunkLine {
			return false, nil
		}
		var ok bool
		if b.left, ok = parseChunkSize(in[:n]); !ok {
			return false, faultChunk
		}
		b.state = chunkData
		if b.left == 0 {
			b.state = chunkTrailers
		}
	case chunkEnd:
		if n = 2; len(in) < n {
			return false, nil
		}
		if string(in[:n]) != "\r\n" {
			return false, faultChunk
		}
		b.state = chunkSize
	case chunkTrailers:
		var err error
		if n, _, err = sectionEnd(in, 0); n == 0 && len(in) > bufferSize {
			err = faultChunk
		}
		if n == 0 || err != nil {
			return false, err
		}
		b.trailer.reset(in[:n])
		if err := b.trailer.parseFields(0, nil, false); err != nil {
			return false, err
		}
		b.state = chunkDone
	}
	b.w.r += n
	return true, nil
}

// parseChunkSize reads a chunk-size line: 1 to 15 hex digits, then an extension, which may hold only what a field value may.
func parseChunkSize(line []byte) (int64, bool) {
	line, ended := bytes.CutSuffix(line, []byte("\r\n"))
	size, ext, _ := bytes.Cut(line, []byte{';'})
	n, err := strconv.ParseUint(string(size), 16, 63)
	return int64(n), ended && err == nil && len(size) < 16 && all(ext, valueOctet)
}

// bodyWriter sends the body of one message, its head with the first piece.
type bodyWriter struct {
	dst     *wire
	limit   time.Duration // for each piece to be taken
	chunked bool
	head    []byte // not sent yet; its room is used again for chunk sizes
	started *bool  // set when the first byte is on its way
}

// copy sends all of b. The head goes out at once when none of the body is here.
func (o *bodyWriter) copy(b *body, beforeRead func()) (readErr, writeErr error) {
	if b.framing != bodyNone && b.w.buffered() == 0 {
		writeErr = o.send(o.head, nil, nil)
	}
	for done := false; !done && writeErr == nil; {
		var data []byte
		if data, done, readErr = b.next(beforeRead); readErr != nil {
			return readErr, nil
		}
		writeErr = o.write(data, done, b)
		if b.framing == bodyLength && b.left >= spliceFrom && writeErr == nil && kernelMoves {
			m := move{dst: o.dst, src: b.w, limit: b.left, beforeRead: beforeRead, patient: func() bool { return false }, moved: func() {}}
			m.beforeWrite = func() { o.dst.tcp.SetWriteDeadline(deadline(o.limit)) }
			n, err := m.run()
			b.size += n
			b.left -= n
			done = b.left == 0
			b.ended.Store(done)
			if m.readFailed {
				return err, nil
			}
			writeErr = err
		}
	}
	return nil, writeErr
}

// write sends the next piece; done says that it is the last of b.
func (o *bodyWriter) write(data []byte, done bool, b *body) error {
	out := o.head
	if o.chunked && len(data) > 0 {
		out = append(strconv.AppendUint(out, uint64(len(data)), 16), "\r\n"...)
	}
	before := len(out)
	if len(data) <= smallPiece {
		out = append(out, data...)
	}
	if o.chunked && len(data) > 0 {
		out = append(out, "\r\n"...)
	}
	if o.chunked && done {
		out = b.trailer.appendKept(append(out, "0\r\n"...))
		out = append(out, "\r\n"...)
	}
	if len(data) <= smallPiece {
		return o.send(out, nil, nil)
	}
	return o.send(out[:before], data, out[before:])
}

func (o *bodyWriter) send(a, b, c []byte) error {
	o.head = a[:0]
	if len(a)+len(b) == 0 {
		return nil
	}
	*o.started = true
	return o.dst.write(o.limit, a, b, c)
}

// move is one transfer of bytes from a wire to another; run does it.
type move struct {
	dst, src                *wire
	limit                   int64       // most bytes to move
	beforeRead, beforeWrite func()      // called before each wait, to set its deadline
	patient                 func() bool // called when that is over, to know whether to wait on
	moved                   func()      // called when bytes have moved
	readFailed              bool        // set when the error is that of src
}

// mayRetry reports whether what err stopped is to be tried again.
func (m *move) mayRetry(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) && m.patient() }

// flush moves what is buffered of src.
func (m *move) flush(limit int64) (total int64, err error) {
	for total < limit && m.src.buffered() > 0 && err == nil {
		m.beforeWrite()
		var n int
		n, err = m.dst.tcp.Write(m.src.unused()[:min(int64(m.src.buffered()), limit-total)])
		m.src.r += n
		total += int64(n)
		m.moved()
		if m.mayRetry(err) {
			err = nil
		}
	}
	return total, err
}

// ---------------------------------------------------------------------------------------------------------------------
// Tunnels

// tunnel is two moves, one in each direction. Both see the same clock: bytes in either direction keep both alive.
type tunnel struct {
	cfg        *config
	client, up *wire
	since      time.Time
	last       atomic.Int64           // when a byte last moved, in ns after since
	reason     atomic.Pointer[string] // why it ended, or which side closed first
	down       int64                  // bytes to the client; owned by download until it ends
	half       atomic.Bool            // one side has closed
	ended      atomic.Bool            // end was called
	other      sync.WaitGroup
}

// tunnel serves a CONNECT request: it dials, says 200 and carries bytes until both sides are done.
func (x *exchange) tunnel() *failure {
	x.keep = false
	up, f := x.dialUpstream()
	if f != nil {
		return f
	}
	defer up.close()
	x.status, x.begun = 200, true
	if f := x.tell([]byte("HTTP/1.1 200 Connection Established\r\n\r\n")); f != nil {
		return f
	}
	x.relay(up)
	return nil
}

// relay carries bytes both ways until both directions have ended (RFC 9110, 9.3.6).
func (x *exchange) relay(up *upstream) {
	t := &tunnel{cfg: &x.srv.cfg, client: &x.c.wire, up: &up.wire, since: time.Now()}
	x.peer = up.peer
	x.c.track(up, true, nil)
	t.other.Add(1)
	go t.download()
	x.upBytes = t.carry(t.up, t.client, "client_closed")
	t.other.Wait()
	x.respBody.size, x.closed = t.down, *t.reason.Load()
	if x.c.track(nil, false, nil) {
		x.closed = "drain"
	}
}

func (t *tunnel) download() {
	defer t.other.Done()
	t.down = t.carry(t.client, t.up, "upstream_closed")
}

// carry moves bytes from src to dst until src ends, and passes that end on. It returns how many there were.
func (t *tunnel) carry(dst, src *wire, reason string) int64 {
	m := move{dst: dst, src: src, limit: math.MaxInt64, moved: t.touch, patient: t.isAlive}
	m.beforeRead = func() { t.arm(src.tcp.SetReadDeadline) }
	m.beforeWrite = func() { t.arm(dst.tcp.SetWriteDeadline) }
	n, err := m.run()
	switch {
	case err == io.ErrUnexpectedEOF:
		t.reason.CompareAndSwap(nil, &reason)
		t.half.Store(true)
		t.arm(dst.tcp.SetReadDeadline) // the other direction has less patience now
		t.arm(src.tcp.SetWriteDeadline)
		if dst.tcp.CloseWrite() != nil {
			t.end(reason)
		}
	case errors.Is(err, os.ErrDeadlineExceeded):
		_, over := t.deadline()
		t.end(over)
	default: // passed on as what it is: neither side shall take what it got for everything
		t.client.tcp.SetLinger(0)
		t.up.tcp.SetLinger(0)
		t.end("connection_error")
	}
	return n
}

// end ends the tunnel; the first reason to do so stays.
func (t *tunnel) end(reason string) {
	if !t.ended.Swap(true) {
		t.reason.Store(&reason)
	}
	t.client.tcp.Close()
	t.up.tcp.Close()
}

func (t *tunnel) touch() { t.last.Store(int64(time.Since(t.since))) }

// arm sets a deadline, again if a half-close came in between.
func (t *tunnel) arm(set func(time.Time) error) {
	for half := !t.half.Load(); half != t.half.Load(); {
		half = t.half.Load()
		at, _ := t.deadline()
		set(at)
	}
}

// isAlive reports whether bytes went the other way while one waited.
func (t *tunnel) isAlive() bool {
	at, _ := t.deadline()
	return at.IsZero() || time.Now().Before(at)
}

// deadline is when the tunnel ends if no byte moves, zero when never, and why.
func (t *tunnel) deadline() (at time.Time, reason string) {
	patience, reason := t.cfg.TunnelIdleTimeout, "idle_timeout"
	if t.half.Load() {
		patience, reason = t.cfg.TunnelHalfCloseTimeout, "half_close_timeout"
	}
	if patience > 0 {
		at = t.since.Add(time.Duration(t.last.Load()) + patience)
	}
	if age := t.cfg.TunnelMaxAge; age > 0 && (at.IsZero() || t.since.Add(age).Before(at)) {
		at, reason = t.since.Add(age), "max_age"
	}
	return at, reason
}

// ---------------------------------------------------------------------------------------------------------------------
// Answers

// Tokens say why a request failed, in Proxy-Status (RFC 9209, 2.3), log and metrics; tokenClient in the log alone.
const (
	tokenRequest         = "http_request_error"
	tokenDenied          = "http_request_denied"
	tokenProhibited      = "destination_ip_prohibited"
	tokenDNS             = "dns_error"
	tokenDNSTimeout      = "dns_timeout"
	tokenRefused         = "connection_refused"
	tokenUnroutable      = "destination_ip_unroutable"
	tokenConnectTimeout  = "connection_timeout"
	tokenTerminated      = "connection_terminated"
	tokenProtocol        = "http_protocol_error"
	tokenHeadSize        = "http_response_header_section_size"
	tokenBodySize        = "http_response_body_size"
	tokenResponseTimeout = "http_response_timeout"
	tokenLimit           = "connection_limit_reached"
	tokenLoop            = "proxy_loop_detected"
	tokenInternal        = "proxy_internal_error"
	tokenClient          = "client_disconnected"
)

// failure is why a request was not served.
type failure struct {
	status int    // of the answer; 0 when nobody is left to be answered
	token  string // one of the tokens above
	text   string // one line for the client
	cause  error  // for the log alone; may be nil
	stale  bool   // the upstream connection ended before a byte of response
}

func fail(status int, token, format string, args ...any) *failure {
	return &failure{status: status, token: token, text: fmt.Sprintf(format, args...)}
}

func (f *failure) because(err error) *failure {
	f.cause = err
	return f
}

// answer sends the response that stands for f.
func (x *exchange) answer(f *failure) {
	body := "sluice: " + f.text + "\n"
	if x.connect {
		x.keep, x.lingers = false, true // what follows is not a request
	}
	b := x.appendAnswer(f.status, "text/plain", len(body))
	name := x.srv.cfg.Name
	if c := name[0] | 0x20; c < 'a' || c > 'z' {
		name = strconv.Quote(name) // a token begins with a letter; both texts are printable ASCII (RFC 8941, 3.3)
	}
	b = fmt.Appendf(b, "Proxy-Status: %s; error=%s; details=%q\r\n\r\n", name, f.token, f.text)
	if string(x.method) != "HEAD" {
		b = append(b, body...)
		x.respBody.size = int64(len(body))
	}
	x.keep = x.tell(b) == nil && x.keep
}

// tell sends a message without a body to be streamed.
func (x *exchange) tell(b []byte) *failure {
	if err := x.c.write(x.srv.cfg.BodyTimeout, b, nil, nil); err != nil {
		return x.clientFailure(err, "", 0, "")
	}
	return nil
}

// appendAnswer begins a response of Sluice's own. A request body that has not been read ends the connection.
func (x *exchange) appendAnswer(status int, mediaType string, length int) []byte {
	if !x.reqBody.ended.Load() {
		x.keep, x.lingers = false, true
	}
	x.status = status
	b := fmt.Appendf(x.in[:0], "HTTP/1.1 %d %s\r\nDate: %s\r\nVia: 1.1 %sContent-Type: %s\r\nContent-Length: %d\r\n", status, http.StatusText(status),
		time.Now().UTC().Format(http.TimeFormat), x.srv.hop, mediaType, length)
	if !x.keep {
		b = append(b, "Connection: close\r\n"...)
	}
	return b
}

// answerSelf answers OPTIONS and TRACE whose Max-Forwards has run out here (RFC 9110, 7.6.2), TRACE without fields: they hold secrets.
func (x *exchange) answerSelf() *failure {
	mediaType, echo := "text/plain", ""
	if string(x.method) == "TRACE" {
		mediaType, echo = "message/http", string(x.line)+"\r\n\r\n"
	}
	b := append(x.appendAnswer(200, mediaType, len(echo)), "\r\n"+echo...)
	x.begun, x.respBody.size = true, int64(len(echo))
	return x.tell(b)
}

// ---------------------------------------------------------------------------------------------------------------------
// Logs

// Field names, after OpenTelemetry's semantic conventions.
const (
	logClient   = "client.address"
	logMethod   = "http.request.method"
	logScheme   = "url.scheme"
	logPath     = "url.path"
	logQuery    = "url.query"
	logServer   = "server.address"
	logPort     = "server.port"
	logVersion  = "network.protocol.version"
	logPeer     = "network.peer.address"
	logStatus   = "http.response.status_code"
	logUpSize   = "http.request.body.size"
	logDownSize = "http.response.body.size"
	logDuration = "duration_ms"
	logReused   = "upstream_reused"
	logType     = "error.type"
	logMessage  = "error.message"
	logClose    = "close_reason"
	logTrace    = "trace_id"
)

// logger writes through a queue. Records about traffic are sampled by level before they are built, those about the process never.
type logger struct {
	process *slog.Logger
	shares  shares
	queue   *logQueue
}

func newLogger(cfg *config, stdout io.Writer) *logger {
	file, terminal := stdout.(*os.File)
	if terminal {
		info, err := file.Stat()
		terminal = err == nil && info.Mode()&os.ModeCharDevice != 0
	}
	encoder := func(w io.Writer) slog.Handler {
		if cfg.LogFormat == "text" || cfg.LogFormat == "auto" && terminal {
			return tint.NewTextHandler(w, &tint.Options{Level: cfg.LogLevel, NoColor: !terminal || os.Getenv("NO_COLOR") != ""})
		}
		return slog.NewJSONHandler(w, &slog.HandlerOptions{Level: cfg.LogLevel})
	}
	l := &logger{shares: cfg.LogSample, queue: &logQueue{out: stdout, room: cfg.LogBuffer, more: make(chan struct{}, 1), done: make(chan struct{})}}
	l.queue.direct = slog.New(encoder(stdout))
	l.process = slog.New(encoder(l.queue))
	go l.queue.drain()
	return l
}

// wants decides whether a record about traffic is written.
func (l *logger) wants(level slog.Level) bool {
	share := l.shares[shareOf(level)]
	return l.process.Enabled(context.Background(), level) && (share == 1 || share > 0 && rand.Float64() < share)
}

// debug records that a connection opened or closed.
func (l *logger) debug(msg string, client netip.Addr) {
	if l.wants(slog.LevelDebug) {
		l.process.Debug(msg, logClient, client.String())
	}
}

// record writes the one record of an exchange: info when served or given up by the client, warn when refused or not possible.
func (x *exchange) record(f *failure) {
	level, msg := slog.LevelInfo, "request"
	if f != nil && f.token == tokenInternal {
		level = slog.LevelError
	} else if f != nil && f.token != tokenClient {
		level = slog.LevelWarn
	}
	if !x.srv.log.wants(level) {
		return
	}
	attrs := make([]slog.Attr, 0, 18)
	add := func(name, value string) {
		if value != "" {
			attrs = append(attrs, slog.String(name, value[:min(len(value), 1024)])) // some are a client's choice
		}
	}
	add(logClient, x.c.addr.String())
	add(logMethod, string(x.method))
	add(logServer, string(x.dst.host))
	if x.connect {
		msg = "tunnel"
	} else if len(x.dst.host) > 0 {
		path, query, _ := strings.Cut(string(x.target), "?")
		add(logScheme, "http")
		add(logPath, cmp.Or(path, "/"))
		if x.srv.cfg.LogQuery {
			add(logQuery, query)
		}
	}
	if len(x.dst.host) > 0 {
		attrs = append(attrs, slog.Int(logPort, int(x.dst.port)), slog.String(logVersion, "1."+strconv.Itoa(x.req.minor)))
	}
	if x.peer.IsValid() {
		attrs = append(attrs, slog.String(logPeer, x.peer.Addr().String()), slog.Bool(logReused, x.reused))
	}
	if x.status != 0 {
		attrs = append(attrs, slog.Int(logStatus, x.status))
	}
	attrs = append(attrs, slog.Int64(logUpSize, x.upBytes), slog.Int64(logDownSize, x.respBody.size), slog.Float64(logDuration, milliseconds(time.Since(x.start))))
	if f != nil {
		add(logType, f.token)
		add(logMessage, f.text)
		if f.cause != nil {
			attrs[len(attrs)-1] = slog.String(logMessage, f.text+": "+f.cause.Error())
		}
	}
	add(logClose, x.closed)
	add(logTrace, x.trace)
	x.srv.log.process.LogAttrs(context.Background(), level, msg, attrs...)
}

func milliseconds(d time.Duration) float64 { return math.Round(d.Seconds()*1e6) / 1e3 }

// logQueue stands before a writer that may block. A goroutine writes what waits in one piece; what finds it full is dropped.
type logQueue struct {
	out    io.Writer
	direct *slog.Logger // past the queue
	room   int
	more   chan struct{} // has an element when there is something to do
	done   chan struct{} // closed when everything is written after close

	mu      sync.Mutex // guards what follows
	waiting []byte
	records int // waiting or being written
	dropped int // since it was last said
	closed  bool
}

// Write takes one encoded record. It never blocks.
func (q *logQueue) Write(p []byte) (int, error) {
	q.mu.Lock()
	if q.records >= q.room {
		q.dropped++
	} else {
		q.waiting = append(q.waiting, p...)
		q.records++
	}
	q.mu.Unlock()
	q.wake()
	return len(p), nil
}

func (q *logQueue) wake() {
	select {
	case q.more <- struct{}{}:
	default:
	}
}

// drain writes until the queue is closed and empty. Once a second at the most it says how many records were dropped.
func (q *logQueue) drain() {
	defer close(q.done)
	var batch []byte
	var said time.Time
	for closed := false; !closed; {
		<-q.more
		q.mu.Lock()
		batch, q.waiting = q.waiting, batch[:0]
		count, dropped := q.records, 0
		closed = q.closed
		if closed || time.Since(said) >= time.Second {
			dropped, q.dropped = q.dropped, 0
		}
		q.mu.Unlock()
		q.out.Write(batch) // a stdout that is gone is no reason to stop
		if dropped > 0 {
			said = time.Now()
			q.direct.Warn("log records dropped", "count", dropped)
		}
		q.mu.Lock()
		q.records -= count
		q.mu.Unlock()
	}
}

// close has drain write what is left, and waits for that while patience lasts.
func (q *logQueue) close(patience time.Duration) {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.wake()
	select {
	case <-q.done:
	case <-time.After(patience):
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Admin

// newAdmin serves what orchestrators ask. It is never served on LISTEN.
func newAdmin(s *server) *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if s.draining.Load() {
			http.Error(w, "draining", http.StatusServiceUnavailable)
			return
		}
		io.WriteString(w, "ready\n")
	})
	return &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute,
		ErrorLog: slog.NewLogLogger(s.log.process.Handler(), slog.LevelDebug)}
}

func (s *server) serveAdmin() {
	if err := s.admin.Serve(s.adminOn); !errors.Is(err, http.ErrServerClosed) {
		s.log.process.Error("admin listener failed", logType, tokenInternal, logMessage, err.Error())
	}
}

// askHealth asks a running Sluice, found by the same environment, whether it is ready.
func askHealth(environ []string) error {
	cfg, _, err := loadConfig(environ)
	if err != nil {
		return err
	}
	if cfg.Admin == "off" {
		return errors.New("SLUICE_ADMIN is off: there is nobody to ask")
	}
	host, port, _ := net.SplitHostPort(cfg.Admin) // checked by loadConfig
	if ip := net.ParseIP(host); host == "" || ip.IsUnspecified() {
		host = "localhost"
	}
	// Not http.DefaultTransport: HTTP_PROXY may well name the proxy that is asked about.
	client := http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{}}
	resp, err := client.Get("http://" + net.JoinHostPort(host, port) + "/readyz")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("not ready: %s", resp.Status)
	}
	return nil
}

// ---------------------------------------------------------------------------------------------------------------------
// Platform contract
//
// tune_linux.go and tune_other.go each define:
//
//	canReusePort                 whether several sockets may listen on one address
//	sockets                      options: listening and dialling are Control functions, deadPeer is when a peer that acknowledges
//	                             nothing is given up; close frees what is kept
//	tuneKernel(cfg, log)         raises RLIMIT_NOFILE, checks (TUNE=apply: writes) sysctls, and warns of what falls short
//	openFiles() int              the descriptor limit in force, 0 where there is none
//	watcher, watched             after add(&watched, raw, owner) of a client or upstream, run calls owner.hungUp when its peer has
//	                             hung up, perhaps more than once, until remove; elsewhere never
//	isQuiet(raw) bool            whether a connection at rest has neither bytes nor an end to be read; elsewhere always true
//	(*wire).readIdle, fillIdle   fill, but without holding a buffer while waiting; elsewhere with one
//	(*move).run                  moves bytes until the limit is reached (nil), src ends (io.ErrUnexpectedEOF) or a side fails, and
//	                             returns how many; kernelMoves: in the kernel, holding nothing while it waits for src

// hangupGrace is how long a client that has closed its sending side still gets for the answer it waits for. Whether it has left
// or only half-closed (`printf … | nc -N`) cannot be told without sending.
const hangupGrace = time.Second
