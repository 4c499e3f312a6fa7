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
// Contents, in the order in which data flows:
//
//	Entry · Configuration · Server · Clients · Wires and buffers · Heads · Requests · Policy · Names · Dialling · Pool ·
//	Forwarding · Bodies · Tunnels · Answers · Logs · Admin · Platform contract (tune_linux.go, tune_other.go)
//
// What it deliberately does not do: cache, rewrite, intercept TLS, serve files, act as a reverse proxy, take flags.
//
// Invariants:
//
//   - A client connection belongs to the goroutine of client.serve. While a request body is being sent, exchange.upload
//     owns the client's reading side and the upstream's writing side; serve joins it before it touches either again.
//   - Slices into a wire's buffer are valid until that wire is filled again. What must live longer is copied.
//   - A wire that waits for bytes holds no buffer, an idle tunnel no pipe.
//   - The address that policy judged is the address that is dialled: a name is resolved once per attempt.
//   - Locks: server.mu, client.mu and pool.mu are leaves; none is taken while another is held.
package main

import (
	"bytes"
	"context"
	_ "embed"
	"encoding"
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
	"runtime"
	"runtime/debug"
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

// awaitSignals drains at the first SIGTERM or SIGINT and ends the process at the second. As process 1 of a container
// there is no default action to fall back to, so both are handled here.
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
	var bad configErrors
	if errors.As(err, &bad) {
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
		return exitStatus(askHealth(environ), stderr)
	case "env":
		return exitStatus(printEnv(environ, stdout), stderr)
	}
	fmt.Fprintf(stderr, "sluice: no command %q; without one it serves, and there are: health, env, version\n", args[0])
	return 2
}

// run serves until ctx is done, then drains. It returns nil after a drain, configErrors for a bad environment, and any
// other error when it could not listen. Logs go to stdout.
func run(ctx context.Context, environ []string, stdout io.Writer) error {
	cfg, err := loadConfig(environ)
	if err != nil {
		return err
	}
	log := newLogger(&cfg.config, stdout)
	defer log.close()
	s, err := newServer(&cfg.config, log)
	if err != nil {
		return err
	}
	findings := tuneKernel(&s.cfg) // before listening: the backlog is read from somaxconn when a socket starts to listen
	if err := s.listen(ctx); err != nil {
		s.close()
		return err
	}
	s.logStart(findings)
	s.start()
	<-ctx.Done()
	s.drain()
	return nil
}

// ---------------------------------------------------------------------------------------------------------------------
// Configuration

const envPrefix = "SLUICE_"

// config is what the environment sets. Each field's comment is the manual: `sluice env` and the README print it.
type config struct {
	// Addresses to serve on; an empty host means every interface. The image sets `:3128`.
	Listen addresses `env:"LISTEN" envDefault:"127.0.0.1:3128"`
	// SO_REUSEPORT listeners per address; 0 = one per usable CPU.
	Listeners int `env:"LISTENERS" envDefault:"0"`
	// Address of `/healthz` and `/readyz`; `off` = none.
	Admin string `env:"ADMIN" envDefault:"127.0.0.1:3129"`
	// This hop's name in Via and Proxy-Status; a request that carries it in Via has come back and is refused. The default
	// is the host name.
	Name string `env:"NAME"`
	// Who may connect: CIDRs, addresses, `loopback`, `private`, `all`.
	AllowClients clientSet `env:"ALLOW_CLIENTS" envDefault:"loopback,private"`
	// Destination ports and ranges, as in `80,443,8000-8099`; `*` = all.
	AllowPorts portSet `env:"ALLOW_PORTS" envDefault:"80,443"`
	// Names that may resolve to private addresses (compose service names): `example.com` that name, `*.example.com` names
	// below it, `.example.com` both, an IP, a CIDR, each with an optional `:port`.
	AllowPrivateHosts hostRules `env:"ALLOW_PRIVATE_HOSTS"`
	// Addresses allowed although they are not public, as in `10.20.0.0/16,127.0.0.1`.
	AllowCIDRs prefixes `env:"ALLOW_CIDRS"`
	// Bytes of a request or response head. At most 256 fields are taken whatever its size.
	MaxHeader size `env:"MAX_HEADER" envDefault:"64KiB"`
	// Bytes of a request body; 0 = no limit.
	MaxRequestBody size `env:"MAX_REQUEST_BODY" envDefault:"0"`
	// Bytes of a response body; 0 = no limit.
	MaxResponseBody size `env:"MAX_RESPONSE_BODY" envDefault:"0"`
	// From a request's first byte to the end of its head.
	HeaderTimeout time.Duration `env:"HEADER_TIMEOUT" envDefault:"10s"`
	// A client connection between requests, and before the first.
	IdleTimeout time.Duration `env:"IDLE_TIMEOUT" envDefault:"75s"`
	// Looking a name up and connecting.
	DialTimeout time.Duration `env:"DIAL_TIMEOUT" envDefault:"10s"`
	// From the request's end to the response head.
	ResponseTimeout time.Duration `env:"RESPONSE_TIMEOUT" envDefault:"60s"`
	// Without a byte moving in a body.
	BodyTimeout time.Duration `env:"BODY_TIMEOUT" envDefault:"60s"`
	// A tunnel without a byte in either direction.
	TunnelIdleTimeout time.Duration `env:"TUNNEL_IDLE_TIMEOUT" envDefault:"10m"`
	// A tunnel without a byte after one side closed.
	TunnelHalfCloseTimeout time.Duration `env:"TUNNEL_HALF_CLOSE_TIMEOUT" envDefault:"30s"`
	// Whole life of a tunnel.
	TunnelMaxAge time.Duration `env:"TUNNEL_MAX_AGE" envDefault:"0"`
	// From SIGTERM to the end; `docker stop` kills after 10s. 0 = end at once.
	DrainTimeout time.Duration `env:"DRAIN_TIMEOUT" envDefault:"8s"`
	// Idle upstream connections kept in all; 0 = none.
	PoolIdle int `env:"POOL_IDLE" envDefault:"1024"`
	// Idle upstream connections kept per host and port; 0 = none.
	PoolIdlePerHost int `env:"POOL_IDLE_PER_HOST" envDefault:"128"`
	// How long an idle upstream connection is kept.
	PoolIdleTimeout time.Duration `env:"POOL_IDLE_TIMEOUT" envDefault:"30s"`
	// How long a DNS answer is reused; 0 = not at all.
	DNSCacheTTL time.Duration `env:"DNS_CACHE_TTL" envDefault:"5s"`
	// How long an answer may still serve when its refresh fails; 0 = not at all.
	DNSStale time.Duration `env:"DNS_STALE" envDefault:"5m"`
	// One lookup.
	DNSTimeout time.Duration `env:"DNS_TIMEOUT" envDefault:"5s"`
	// Resolvers, `host:port` with an IP address as host; by default the system's.
	DNSServers addresses `env:"DNS_SERVERS"`
	// Least level that is logged: `debug`, `info`, `warn`, `error`.
	LogLevel slog.Level `env:"LOG_LEVEL" envDefault:"info"`
	// `json`; `text` (for people); `auto` = text on a terminal, else json.
	LogFormat string `env:"LOG_FORMAT" envDefault:"auto"`
	// Share of connection, request and tunnel records kept per level, as in `debug=0.01,info=0.1`; levels not named are
	// kept. Records about the process itself are never sampled.
	LogSample shares `env:"LOG_SAMPLE"`
	// Records waiting to be written; when full, new ones are dropped and counted, never waited for.
	LogBuffer int `env:"LOG_BUFFER" envDefault:"8192"`
	// Log query strings, in `url.query`. User info and credentials are never logged.
	LogQuery bool `env:"LOG_QUERY" envDefault:"false"`
	// Kernel settings: `check` warns of those that fall short, `apply` also writes them where the container may, `off`.
	Tune string `env:"TUNE" envDefault:"check"`
	// Descriptor limit to ask for; 0 = the hard limit, at most 1,048,576.
	NOFILE int `env:"NOFILE" envDefault:"0"`
}

// loadedConfig is a config and where each value came from, for `sluice env`.
type loadedConfig struct {
	config
	vars []variable
}

// variable describes one field of config: its name without the prefix, its texts, and its origin: `default`,
// `environment`, the path of a file, or `host name`.
type variable struct{ field, name, def, value, origin, doc string }

// configErrors is every fault of an environment, one a line: variable, value and reason.
type configErrors []string

func (e configErrors) Error() string {
	return "the environment cannot be used:\n  " + strings.Join(e, "\n  ")
}

// loadConfig reads environ ("NAME=value") into a config. Its error is a configErrors with every fault at once.
func loadConfig(environ []string) (*loadedConfig, error) {
	cfg := &loadedConfig{vars: variables()}
	cfg.LogSample = shares{1, 1, 1, 1}
	values, bad := cfg.gather(environ)
	err := env.ParseWithOptions(&cfg.config, env.Options{Prefix: envPrefix, Environment: values})
	var all env.AggregateError
	if errors.As(err, &all) {
		for _, e := range all.Errors {
			bad = append(bad, cfg.explain(e))
		}
	}
	if len(all.Errors) == 0 {
		bad = append(bad, cfg.config.faults()...)
	}
	if len(bad) > 0 {
		return nil, bad
	}
	return cfg, nil
}

// variables lists the fields of config in order, with the comments that stand above them in the source.
func variables() []variable {
	docs, comment := map[string]string{}, ""
	_, block, _ := strings.Cut(source, "\ntype config struct {\n")
	block, _, _ = strings.Cut(block, "\n}\n")
	for line := range strings.Lines(block) {
		line = strings.TrimSpace(line)
		if text, ok := strings.CutPrefix(line, "// "); ok {
			comment += text + " "
			continue
		}
		name, _, _ := strings.Cut(line, " ")
		docs[name], comment = strings.TrimSpace(comment), ""
	}
	var vars []variable
	for f := range reflect.TypeFor[config]().Fields() {
		vars = append(vars, variable{field: f.Name, name: f.Tag.Get("env"), def: f.Tag.Get("envDefault"), doc: docs[f.Name]})
	}
	return vars
}

// gather picks Sluice's variables out of environ, reads those given as files, and notes origins. An empty value counts
// as unset, since compose files pass `${X:-}` on.
func (cfg *loadedConfig) gather(environ []string) (map[string]string, configErrors) {
	given, values, bad := map[string]string{}, map[string]string{}, configErrors(nil)
	for _, kv := range environ {
		if k, v, _ := strings.Cut(kv, "="); strings.HasPrefix(k, envPrefix) && v != "" {
			given[k] = v
		}
	}
	for i := range cfg.vars {
		v := &cfg.vars[i]
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
			v.value, v.origin = hostName(), "host name"
		}
		values[key] = v.value
	}
	for key := range given {
		if !isServiceLink(key) {
			bad = append(bad, fmt.Sprintf("%s: unknown variable; the nearest is %s", key, nearest(key, cfg.vars)))
		}
	}
	return values, bad
}

// hostName is the default for NAME: the host's, or "sluice" where that cannot stand in a Via field.
func hostName() string {
	name, err := os.Hostname()
	if err != nil || !isToken([]byte(name)) {
		return "sluice"
	}
	return name
}

// isServiceLink reports whether key is one that an orchestrator injects for a service called "sluice".
func isServiceLink(key string) bool {
	rest := strings.TrimPrefix(key, envPrefix)
	return rest == "SERVICE_HOST" || rest == "PORT" || strings.HasPrefix(rest, "PORT_") || strings.HasPrefix(rest, "SERVICE_PORT")
}

// nearest names the variable closest to key by edit distance (Levenshtein).
func nearest(key string, vars []variable) string {
	best, least := "", math.MaxInt
	for _, v := range vars {
		name := envPrefix + v.name
		row := make([]int, len(name)+1)
		for j := range row {
			row[j] = j
		}
		for i := range len(key) {
			diagonal := row[0]
			row[0] = i + 1
			for j := range len(name) {
				change := diagonal
				if key[i] != name[j] {
					change++
				}
				diagonal = row[j+1]
				row[j+1] = min(change, row[j]+1, row[j+1]+1)
			}
		}
		if d := row[len(name)]; d < least {
			best, least = name, d
		}
	}
	return best
}

// explain turns an error of the env package, which names struct fields, into one that names the variable and its value.
func (cfg *loadedConfig) explain(err error) string {
	var pe env.ParseError
	if errors.As(err, &pe) {
		for _, v := range cfg.vars {
			if v.field == pe.Name {
				return fmt.Sprintf("%s%s=%q: %v", envPrefix, v.name, v.value, pe.Err)
			}
		}
	}
	return err.Error()
}

// faults checks what the types of the fields cannot.
func (c *config) faults() (bad configErrors) {
	complain := func(name string, value any, reason string) {
		bad = append(bad, fmt.Sprintf("%s%s=%q: %s", envPrefix, name, fmt.Sprint(value), reason))
	}
	v := reflect.ValueOf(*c)
	for i := range v.NumField() {
		if f := v.Field(i); f.CanInt() && f.Type() != reflect.TypeFor[slog.Level]() && f.Int() < 0 {
			complain(v.Type().Field(i).Tag.Get("env"), f.Interface(), "must not be negative")
		}
	}
	if len(c.Listen) == 0 {
		complain("LISTEN", "", "names no address")
	}
	if c.Admin != "off" {
		if _, err := netip.ParseAddrPort(anyHost(c.Admin)); err != nil {
			complain("ADMIN", c.Admin, "is neither an IP address and port nor off")
		}
	}
	for _, a := range c.DNSServers {
		if ap, err := netip.ParseAddrPort(a); err != nil || ap.Port() == 0 {
			complain("DNS_SERVERS", a, "a resolver is an IP address and a port, as in 10.0.0.2:53")
		}
	}
	if !isToken([]byte(c.Name)) {
		complain("NAME", c.Name, "may hold letters, digits and !#$%&'*+-.^_`|~ only (RFC 9110, Via pseudonym)")
	}
	if c.MaxHeader < 1024 || c.MaxHeader > 16<<20 {
		complain("MAX_HEADER", int64(c.MaxHeader), "must be between 1KiB and 16MiB")
	}
	if c.LogBuffer == 0 {
		complain("LOG_BUFFER", c.LogBuffer, "must be at least 1")
	}
	switch c.LogFormat {
	case "auto", "json", "text":
	default:
		complain("LOG_FORMAT", c.LogFormat, "is none of json, text, auto")
	}
	switch c.Tune {
	case "check", "apply", "off":
	default:
		complain("TUNE", c.Tune, "is none of check, apply, off")
	}
	return bad
}

// printEnv writes a table of every variable: default, value in force, where it came from, meaning.
func printEnv(environ []string, out io.Writer) error {
	cfg, err := loadConfig(environ)
	if err != nil {
		return err
	}
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "VARIABLE\tDEFAULT\tVALUE\tFROM\tMEANING")
	for _, v := range cfg.vars {
		fmt.Fprintf(t, "%s%s\t%s\t%s\t%s\t%s\n", envPrefix, v.name, v.def, strings.Join(strings.Fields(v.value), " "), v.origin, v.doc)
	}
	return t.Flush()
}

// The types of config's fields. Each reads one variable's whole text.
var _ = []encoding.TextUnmarshaler{(*addresses)(nil), (*size)(nil), (*portSet)(nil), (*clientSet)(nil), (*prefixes)(nil), (*hostRules)(nil), (*shares)(nil)}

// items splits a comma-separated list, dropping space and empty items.
func items(text []byte) []string {
	return strings.FieldsFunc(string(text), func(r rune) bool { return r == ',' || r == ' ' || r == '\n' || r == '\t' || r == '\r' })
}

// addresses is a list of host:port.
type addresses []string

func (a *addresses) UnmarshalText(text []byte) error {
	*a = nil
	for _, item := range items(text) {
		if _, err := netip.ParseAddrPort(anyHost(item)); err != nil {
			return fmt.Errorf("%q is not an IP address and a port, as in 127.0.0.1:3128 or :3128", item)
		}
		*a = append(*a, item)
	}
	return nil
}

// anyHost gives addr an explicit host: ":3128" becomes "[::]:3128", "localhost:1" becomes "127.0.0.1:1".
func anyHost(addr string) string {
	if port, ok := strings.CutPrefix(addr, "localhost:"); ok {
		return "127.0.0.1:" + port
	}
	if strings.HasPrefix(addr, ":") {
		return "[::]" + addr
	}
	return addr
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
	if !known || err != nil || n < 0 || n*unit >= math.MaxInt64 {
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

// prefixes is a list of address blocks; a bare address is a block of one.
type prefixes []netip.Prefix

func (p *prefixes) UnmarshalText(text []byte) error {
	*p = nil
	for _, item := range items(text) {
		block, err := parsePrefix(item)
		if err != nil {
			return err
		}
		*p = append(*p, block)
	}
	return nil
}

func (p prefixes) contains(a netip.Addr) bool {
	for _, block := range p {
		if block.Contains(a) {
			return true
		}
	}
	return false
}

func parsePrefix(text string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(text); err == nil && a.Zone() == "" {
		return netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()), nil
	}
	block, err := netip.ParsePrefix(text)
	if err != nil || block.Addr().Is4In6() {
		return block, fmt.Errorf("%q is not an address or a CIDR", text)
	}
	return block.Masked(), nil
}

// clientSet says who may connect.
type clientSet struct {
	all    bool
	blocks prefixes
}

func (c *clientSet) UnmarshalText(text []byte) error {
	words := map[string]string{
		"all":      "0.0.0.0/0 ::/0",
		"loopback": "127.0.0.0/8 ::1",
		"private":  "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7", // RFC 1918, RFC 4193
	}
	*c = clientSet{}
	for _, item := range items(text) {
		c.all = c.all || item == "all"
		if word, ok := words[item]; ok {
			item = word
		}
		var blocks prefixes
		if err := blocks.UnmarshalText([]byte(item)); err != nil {
			return fmt.Errorf("%w, and not one of loopback, private, all", err)
		}
		c.blocks = append(c.blocks, blocks...)
	}
	return nil
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

// hostRules matches destinations by name, address and port.
type hostRules struct {
	exact map[string][]uint16 // name → ports; port 0 stands for every port
	below map[string][]uint16 // domain → ports, for the names under it
	nets  []netRule
}

type netRule struct {
	block netip.Prefix
	port  uint16
}

func (r *hostRules) UnmarshalText(text []byte) error {
	*r = hostRules{exact: map[string][]uint16{}, below: map[string][]uint16{}}
	for _, item := range items(text) {
		if err := r.add(strings.ToLower(item)); err != nil {
			return err
		}
	}
	return nil
}

// add takes one rule: name, *.name, .name, address or CIDR, each with an optional :port; an IPv6 address or CIDR with a
// port stands in brackets.
func (r *hostRules) add(rule string) error {
	host, port := rule, uint16(0)
	if _, err := parsePrefix(rule); err != nil { // a bare IPv6 address has colons, but no port
		if i := strings.LastIndexByte(rule, ':'); i >= 0 {
			n, err := strconv.ParseUint(rule[i+1:], 10, 16)
			if err != nil || n == 0 {
				return fmt.Errorf("rule %q: bad port", rule)
			}
			host, port = rule[:i], uint16(n)
		}
	}
	if block, err := parsePrefix(strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")); err == nil {
		r.nets = append(r.nets, netRule{block, port})
		return nil
	}
	name, under := strings.CutPrefix(host, "*.")
	if !under {
		name = strings.TrimPrefix(host, ".")
		under = name != host
	}
	name = strings.TrimSuffix(name, ".")
	if !isHostName([]byte(name)) {
		return fmt.Errorf("rule %q: not a name, an address or a CIDR", rule)
	}
	if under {
		r.below[name] = append(r.below[name], port)
	}
	if !strings.HasPrefix(host, "*.") {
		r.exact[name] = append(r.exact[name], port)
	}
	return nil
}

// match reports whether a rule covers host (lower case, no trailing dot; ip set where it is an address) and port. It costs
// one hash lookup per label, whatever the number of rules by name.
func (r *hostRules) match(host []byte, ip netip.Addr, port uint16) bool {
	if ip.IsValid() {
		for _, n := range r.nets {
			if n.block.Contains(ip) && (n.port == 0 || n.port == port) {
				return true
			}
		}
		return false
	}
	if hasPort(r.exact[string(host)], port) {
		return true
	}
	for i := bytes.IndexByte(host, '.'); i >= 0 && len(r.below) > 0; {
		host = host[i+1:]
		if hasPort(r.below[string(host)], port) {
			return true
		}
		i = bytes.IndexByte(host, '.')
	}
	return false
}

func hasPort(ports []uint16, port uint16) bool {
	for _, p := range ports {
		if p == 0 || p == port {
			return true
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
	buffers   bufferPool
	exchanges sync.Pool // of *exchange
	names     *resolver
	pool      *pool
	watcher   *watcher
	sockets   sockets
	hop       []byte // "NAME\r\n", the end of the Via field this hop adds
	status    string // "NAME; error=", the start of its Proxy-Status

	listeners []*net.TCPListener
	own       []netip.AddrPort // where this process listens, the admin listener included
	admin     *http.Server     // nil when ADMIN=off
	adminOn   net.Listener
	draining  atomic.Bool
	stopping  chan struct{}  // closed when the background goroutines are to end
	accepting sync.WaitGroup // accept loops
	serving   sync.WaitGroup // client connections
	behind    sync.WaitGroup // janitor, watcher, admin

	mu      sync.Mutex
	clients map[*client]struct{} // guarded by mu
}

func newServer(cfg *config, log *logger) (*server, error) {
	s := &server{cfg: *cfg, log: log, clients: map[*client]struct{}{}, stopping: make(chan struct{})}
	s.hop = []byte(cfg.Name + "\r\n")
	s.status = sfItem(cfg.Name) + "; error="
	s.exchanges.New = func() any {
		x := &exchange{srv: s}
		x.awaitClient, x.awaitOrigin = x.armClient, x.armOrigin
		return x
	}
	s.sockets.deadPeer = cfg.TunnelIdleTimeout
	if s.sockets.deadPeer == 0 {
		s.sockets.deadPeer = 15 * time.Minute
	}
	s.names = newResolver(cfg)
	s.pool = newPool(cfg)
	var err error
	s.watcher, err = newWatcher()
	return s, err
}

// listen opens the client listeners, one socket per CPU and address so that the kernel spreads connections over accept
// queues, and the admin listener.
func (s *server) listen(ctx context.Context) error {
	lc := net.ListenConfig{Control: s.sockets.listening, KeepAlive: -1} // accepted sockets inherit what Control sets
	lc.SetMultipathTCP(false)                                           // splice(2) and the socket options want plain TCP
	count := 1
	if canReusePort && s.cfg.Listeners == 0 {
		count = runtime.GOMAXPROCS(0) // minds the affinity mask and the cgroup's CPU quota
	} else if canReusePort {
		count = s.cfg.Listeners
	}
	for _, addr := range s.cfg.Listen {
		for i := range count {
			l, err := lc.Listen(ctx, "tcp", addr)
			if err != nil {
				return err
			}
			s.listeners = append(s.listeners, l.(*net.TCPListener))
			if i == 0 {
				s.own = append(s.own, addrPortOf(l.Addr()))
				addr = l.Addr().String() // port 0 is chosen once
			}
		}
	}
	if s.cfg.Admin != "off" {
		l, err := net.Listen("tcp", s.cfg.Admin)
		if err != nil {
			return fmt.Errorf("ADMIN: %w", err)
		}
		s.own = append(s.own, addrPortOf(l.Addr()))
		s.adminOn, s.admin = l, newAdmin(s)
	}
	return nil
}

// start begins to accept.
func (s *server) start() {
	s.behind.Go(s.watcher.run)
	s.behind.Go(s.janitor)
	if s.admin != nil {
		s.behind.Go(s.serveAdmin)
	}
	for _, l := range s.listeners {
		s.accepting.Go(func() { s.accept(l) })
	}
}

// accept serves connections until its listener is closed. An error, such as a lack of descriptors, is said once and
// waited out: nothing but the drain ends it.
func (s *server) accept(l *net.TCPListener) {
	var pause time.Duration
	for {
		conn, err := l.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			if pause == 0 {
				s.log.process.Warn("accept failed, retrying", "address", l.Addr().String(), logMessage, err.Error())
			}
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			select {
			case <-time.After(pause):
			case <-s.stopping:
			}
			continue
		}
		pause = 0
		s.serving.Add(1)
		go s.newClient(conn).serve()
	}
}

// janitor closes pooled connections that have been idle for too long.
func (s *server) janitor() {
	every := time.Second
	if t := s.cfg.PoolIdleTimeout; t > 0 {
		every = min(every, t)
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case now := <-tick.C:
			s.pool.expire(now)
		case <-s.stopping:
			return
		}
	}
}

// drain ends the server within DRAIN_TIMEOUT: it stops accepting, lets what runs finish, closes idle connections at once,
// and cuts what is left when the time is over.
func (s *server) drain() {
	begun := time.Now()
	s.draining.Store(true)
	s.log.process.Info("draining", "timeout", s.cfg.DrainTimeout.String())
	for _, l := range s.listeners {
		l.Close()
	}
	s.accepting.Wait()
	s.eachClient((*client).wakeIdle)
	finished := make(chan struct{})
	go s.awaitServing(finished)
	cut := 0
	select {
	case <-finished:
	case <-time.After(s.cfg.DrainTimeout):
		cut = s.eachClient((*client).cut)
		<-finished
	}
	s.close()
	s.log.process.Info("stopped", "cut", cut, logDuration, milliseconds(time.Since(begun)))
}

func (s *server) awaitServing(finished chan struct{}) {
	s.serving.Wait()
	close(finished)
}

// close ends everything but client connections.
func (s *server) close() {
	close(s.stopping)
	for _, l := range s.listeners {
		l.Close()
	}
	if s.admin != nil {
		s.admin.Close()
		s.adminOn.Close()
	}
	s.watcher.close()
	s.pool.close()
	s.behind.Wait()
	s.sockets.close()
}

// eachClient calls f for every open client connection and returns how many there were.
func (s *server) eachClient(f func(*client)) int {
	s.mu.Lock()
	open := make([]*client, 0, len(s.clients))
	for c := range s.clients {
		open = append(open, c)
	}
	s.mu.Unlock()
	for _, c := range open {
		f(c)
	}
	return len(open)
}

// isOwn reports whether ap is where this process listens: a connection there would come back to it.
func (s *server) isOwn(ap netip.AddrPort) bool {
	for _, o := range s.own {
		if o.Port() != ap.Port() {
			continue
		}
		if o.Addr() == ap.Addr() || ap.Addr().IsUnspecified() || o.Addr().IsUnspecified() && isLocal(ap.Addr()) {
			return true
		}
	}
	return false
}

// isLocal reports whether an address belongs to this host. It is asked only about ports that Sluice listens on, so the
// interfaces are listed afresh each time.
func isLocal(a netip.Addr) bool {
	if a.IsLoopback() {
		return true
	}
	addrs, _ := net.InterfaceAddrs()
	for _, i := range addrs {
		if p, err := netip.ParsePrefix(i.String()); err == nil && p.Addr().Unmap() == a {
			return true
		}
	}
	return false
}

func addrPortOf(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// logStart says what is in force, and each kernel setting that falls short.
func (s *server) logStart(findings []finding) {
	listen := make([]string, 0, len(s.own))
	for _, l := range s.listeners {
		if a := l.Addr().String(); len(listen) == 0 || listen[len(listen)-1] != a {
			listen = append(listen, a)
		}
	}
	admin := "off"
	if s.adminOn != nil {
		admin = s.adminOn.Addr().String()
	}
	s.log.process.Info("listening", "version", version, "addresses", listen, "admin", admin, "name", s.cfg.Name,
		"listeners", len(s.listeners), "cpus", runtime.GOMAXPROCS(0), "nofile", openFiles(),
		"max_header", int64(s.cfg.MaxHeader), "pool_idle", s.cfg.PoolIdle, "drain_timeout", s.cfg.DrainTimeout.String())
	for _, f := range findings {
		s.log.process.Warn("kernel setting falls short", "setting", f.setting, "found", f.found, "wanted", f.wanted,
			"why", f.why, "mend", f.mend)
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Clients

// hangupGrace is how long a client that has closed its sending side still gets for the answer it waits for. Whether it
// has left or only half-closed (`printf … | nc -N`) cannot be told without sending.
const hangupGrace = time.Second

// client is one client connection and the state of the exchange it is in.
type client struct {
	wire
	srv   *server
	addr  netip.Addr
	watch watched

	mu       sync.Mutex
	idle     bool      // between requests; guarded by mu
	gone     bool      // has hung up; guarded by mu
	upstream *upstream // carries this client's request or tunnel; guarded by mu
	tunneled bool      // upstream carries a tunnel, which sees hang-ups itself; guarded by mu
	giveUp   func()    // ends the lookup or dial under way; guarded by mu
	failed   *failure  // why the request's body could not be sent on; guarded by mu
	severed  bool      // the drain ran out; guarded by mu
}

func (s *server) newClient(conn *net.TCPConn) *client {
	c := &client{srv: s, addr: addrPortOf(conn.RemoteAddr()).Addr()}
	c.wire.init(conn, &s.buffers, smallBuffer)
	s.mu.Lock()
	s.clients[c] = struct{}{}
	s.mu.Unlock()
	return c
}

// serve answers a client's requests, one after the other, until the connection ends.
func (c *client) serve() {
	defer c.srv.serving.Done()
	defer c.end()
	c.srv.log.debug("client connected", c.addr)
	if !c.srv.cfg.AllowClients.blocks.contains(c.addr) && !c.srv.cfg.AllowClients.all {
		c.refuse()
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
	}
	c.srv.watcher.remove(&c.watch)
	c.conn.Close()
	c.drop()
	c.srv.mu.Lock()
	delete(c.srv.clients, c)
	c.srv.mu.Unlock()
	c.srv.log.debug("client closed", c.addr)
}

// refuse answers a client whose address is not allowed, before a byte of it is read.
func (c *client) refuse() {
	x := c.srv.exchanges.Get().(*exchange)
	x.begin(c)
	x.failure = fail(403, tokenDenied, "client address %s is not allowed (SLUICE_ALLOW_CLIENTS)", c.addr)
	x.answer(x.failure)
	x.record()
	c.linger()
}

// awaitRequest returns when a request has begun, false when none will. It holds no buffer while it waits.
func (c *client) awaitRequest() bool {
	c.want = smallBuffer
	if c.buffered() > 0 {
		return true
	}
	c.release()
	if !c.setIdle(true) {
		return false
	}
	err := c.fillIdle()
	c.setIdle(false)
	return err == nil
}

// setIdle marks the connection as between requests or not; false means that it is not to wait, since a drain has begun.
func (c *client) setIdle(idle bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.idle = idle
	if !idle {
		return true
	}
	c.conn.SetReadDeadline(deadline(c.srv.cfg.IdleTimeout))
	return !c.srv.draining.Load()
}

// wakeIdle ends the wait of a connection that is between requests.
func (c *client) wakeIdle() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.idle {
		c.conn.SetReadDeadline(longAgo())
	}
}

// cut ends the connection and what runs on it.
func (c *client) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.severed, c.gone = true, true
	if c.giveUp != nil {
		c.giveUp()
	}
	if c.upstream != nil {
		c.upstream.conn.Close()
	}
	c.conn.Close()
}

// hungUp is called by the watcher when the client has closed its sending side (reset: the whole connection). The wait for
// an upstream, of which the client's goroutine knows nothing while it lasts, is ended here.
func (c *client) hungUp(reset bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gone = true
	grace := hangupGrace
	if reset {
		grace = 0
	}
	if c.upstream != nil && !c.tunneled {
		c.upstream.conn.SetReadDeadline(time.Now().Add(grace))
	}
	if c.giveUp != nil {
		time.AfterFunc(grace, c.giveUp)
	}
}

// setUpstream notes the connection that carries the client's request, nil when none does any more. It reports whether the
// drain has cut them.
func (c *client) setUpstream(up *upstream, tunneled bool) (severed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.upstream, c.tunneled, c.failed = up, tunneled, nil
	if c.severed && up != nil {
		up.conn.Close()
	}
	return c.severed
}

// setGiveUp notes how to end the lookup or dial under way, nil when there is none.
func (c *client) setGiveUp(f func()) {
	c.mu.Lock()
	c.giveUp = f
	if f != nil && c.gone {
		time.AfterFunc(hangupGrace, f)
	}
	c.mu.Unlock()
}

// hasLeft reports whether the client hung up.
func (c *client) hasLeft() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gone
}

// linger closes the sending side and reads on for a while, so that the answer is not destroyed by the reset that unread
// bytes would cause (RFC 9112, 9.6).
func (c *client) linger() {
	if c.tcp == nil || c.tcp.CloseWrite() != nil {
		return
	}
	c.conn.SetReadDeadline(time.Now().Add(hangupGrace))
	for discarded := 0; discarded < 16<<20; {
		c.r = c.w
		if c.fill() != nil {
			return
		}
		discarded += c.buffered()
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Wires and buffers

const (
	smallBuffer = 4 << 10  // request heads
	largeBuffer = 32 << 10 // responses and bodies
)

// bufferPool hands out buffers of smallBuffer and largeBuffer bytes; larger ones are left to the collector.
type bufferPool struct{ small, large sync.Pool }

func (p *bufferPool) get(n int) []byte {
	switch {
	case n <= smallBuffer:
		if b, ok := p.small.Get().(*[smallBuffer]byte); ok {
			return b[:]
		}
		return make([]byte, smallBuffer)
	case n <= largeBuffer:
		if b, ok := p.large.Get().(*[largeBuffer]byte); ok {
			return b[:]
		}
		return make([]byte, largeBuffer)
	}
	return make([]byte, n)
}

func (p *bufferPool) put(b []byte) {
	switch cap(b) {
	case smallBuffer:
		p.small.Put((*[smallBuffer]byte)(b[:smallBuffer]))
	case largeBuffer:
		p.large.Put((*[largeBuffer]byte)(b[:largeBuffer]))
	}
}

// wire is one connection and the bytes that were read from it and not used yet.
type wire struct {
	conn    net.Conn
	tcp     *net.TCPConn    // conn where it is plain TCP, for splice and half-close; nil otherwise
	raw     syscall.RawConn // of tcp
	buffers *bufferPool
	want    int    // size of the next buffer
	buf     []byte // nil while nothing is held
	r, w    int    // buf[r:w] is unused
	vec     [3][]byte
	vecs    net.Buffers

	idleRead func(uintptr) bool // readIdle, stored since a method value would be allocated at each wait
	idleErr  error
}

func (w *wire) init(conn net.Conn, buffers *bufferPool, want int) {
	w.conn, w.buffers, w.want = conn, buffers, want
	if tcp, ok := conn.(*net.TCPConn); ok {
		w.tcp = tcp
		w.raw, _ = tcp.SyscallConn() // fails on nil only
		w.idleRead = w.readIdle
	}
}

func (w *wire) buffered() int  { return w.w - w.r }
func (w *wire) unused() []byte { return w.buf[w.r:w.w] }

// fill reads once, into what room there is or is made. It returns an error only when nothing was read.
func (w *wire) fill() error {
	w.makeRoom()
	n, err := w.conn.Read(w.buf[w.w:])
	w.w += n
	if n > 0 {
		return nil
	}
	return err
}

// makeRoom sees to it that buf[w:] is not empty: unused bytes move to the front, a full buffer is replaced by a larger one.
func (w *wire) makeRoom() {
	if w.r == w.w {
		w.r, w.w = 0, 0
		if len(w.buf) < w.want {
			w.drop()
			w.buf = w.buffers.get(w.want)
		}
	}
	if w.w < len(w.buf) {
		return
	}
	b := w.buf
	if w.r == 0 {
		b = w.buffers.get(2 * len(w.buf))
	}
	n := copy(b, w.unused())
	if w.r == 0 {
		w.buffers.put(w.buf)
	}
	w.buf, w.r, w.w = b, 0, n
}

// release gives an empty buffer back.
func (w *wire) release() {
	if w.r == w.w {
		w.drop()
	}
}

// drop gives the buffer back whatever it holds.
func (w *wire) drop() {
	if w.buf != nil {
		w.buffers.put(w.buf)
		w.buf, w.r, w.w = nil, 0, 0
	}
}

// abort makes the close that follows a reset.
func (w *wire) abort() {
	if w.tcp != nil {
		w.tcp.SetLinger(0)
	}
}

// write sends up to three pieces with one system call. The time limit is for each of them to be taken by the kernel.
func (w *wire) write(limit time.Duration, a, b, c []byte) error {
	w.conn.SetWriteDeadline(deadline(limit))
	if len(b) == 0 && len(c) == 0 {
		_, err := w.conn.Write(a)
		return err
	}
	w.vec = [3][]byte{a, b, c}
	w.vecs = w.vec[:]
	_, err := w.vecs.WriteTo(w.conn)
	w.vec = [3][]byte{}
	return err
}

// readHead reads until a whole head stands at the front of the unused bytes, and returns its length including the empty
// line that ends it. Empty lines before it are skipped (RFC 9112, 2.2). limit is the most bytes it may have; until is when
// a head that is not here yet must be, zero if a deadline is set already. Errors: headFault, or that of the read.
func (w *wire) readHead(limit int, until time.Time) (int, error) {
	line, pos := 0, 0 // where the line under way began, and up to where it was searched
	for {
		b := w.unused()
		if len(b) > 0 && line == 0 && b[0] != '\r' && octets[b[0]]&tokenOctet == 0 {
			return 0, faultBadStart // TLS, SOCKS and the like: no line end may ever come
		}
		for i := bytes.IndexByte(b[pos:], '\n'); i >= 0; i = bytes.IndexByte(b[pos:], '\n') {
			pos += i + 1
			if pos < 2 || b[pos-2] != '\r' {
				return 0, faultBareLF
			}
			if pos == line+2 && line > 0 {
				return pos, nil
			}
			if pos == line+2 { // an empty line before the first
				w.r += pos
				b, pos = w.unused(), 0
				continue
			}
			line = pos
		}
		pos = len(b)
		if len(b) >= limit && line == 0 {
			return 0, faultLineTooLong
		}
		if len(b) >= limit {
			return 0, faultHeadTooLarge
		}
		if !until.IsZero() {
			w.conn.SetReadDeadline(until)
			until = time.Time{}
		}
		if err := w.fill(); err != nil {
			return 0, err
		}
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

// longAgo is a deadline that ends a wait at once.
func longAgo() time.Time { return time.Unix(1, 0) }

// ---------------------------------------------------------------------------------------------------------------------
// Heads

// What an octet may be part of.
const (
	tokenOctet  = 1 << iota // field names, methods (RFC 9110, 5.6.2)
	valueOctet              // field values: visible, obs-text, space and tab (RFC 9110, 5.5)
	targetOctet             // request-targets: visible ASCII but "#", more than RFC 3986 grants since browsers send "|" and "{" raw
	hostOctet               // names in an authority; "_" stands in many container names
)

var octets = octetTable()

func octetTable() (t [256]uint8) {
	for i := range 256 {
		b := byte(i)
		alnum := b >= '0' && b <= '9' || b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z'
		if alnum || strings.IndexByte("!#$%&'*+-.^_`|~", b) >= 0 {
			t[i] |= tokenOctet
		}
		if b >= 0x20 && b != 0x7f || b == '\t' {
			t[i] |= valueOctet
		}
		if b > 0x20 && b < 0x7f && b != '#' {
			t[i] |= targetOctet
		}
		if alnum || b == '-' || b == '.' || b == '_' {
			t[i] |= hostOctet
		}
	}
	return t
}

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

// headFault is what is wrong with a message's framing or head.
type headFault string

func (f headFault) Error() string { return string(f) }

const (
	faultBadStart      headFault = "the first byte cannot begin an HTTP/1 message"
	faultBareLF        headFault = "a line does not end with CRLF"
	faultLineTooLong   headFault = "the first line is too long"
	faultHeadTooLarge  headFault = "the head is too large"
	faultManyFields    headFault = "the head has more than 256 fields"
	faultFirstLine     headFault = "malformed first line"
	faultVersion       headFault = "the version is neither HTTP/1.0 nor HTTP/1.1"
	faultFold          headFault = "a field line begins with a space (obs-fold)"
	faultName          headFault = "a field name is empty, holds an invalid byte, or is not followed by a colon"
	faultValue         headFault = "a field value holds an invalid byte"
	faultLength        headFault = "invalid Content-Length"
	faultLengths       headFault = "Content-Length fields differ"
	faultCoding        headFault = "Transfer-Encoding other than a single chunked"
	faultBothFramings  headFault = "both Content-Length and Transfer-Encoding"
	faultCodingIn10    headFault = "Transfer-Encoding in an HTTP/1.0 message"
	faultHost          headFault = "Host is missing, repeated or invalid"
	faultOptions       headFault = "too many options in Connection"
	faultMaxForwards   headFault = "invalid Max-Forwards"
	faultTarget        headFault = "the request-target holds an invalid byte, a fragment or user info"
	faultAuthority     headFault = "invalid host or port in the request-target"
	faultChunk         headFault = "malformed chunk"
	faultStatus        headFault = "malformed status line"
	faultUnasked       headFault = "a 101 response that was not asked for"
	faultInformational headFault = "too many informational responses"
)

const maxFields = 256

// fieldKind tells apart the fields that Sluice acts upon.
type fieldKind uint8

const (
	fieldOther           fieldKind = iota // passed on
	fieldVia                              // passed on; looked at for loops
	fieldDate                             // passed on
	fieldExpect                           // passed on, but not from HTTP/1.0
	fieldTrace                            // traceparent: passed on and logged
	fieldHop                              // hop-by-hop: ends here (RFC 9110, 7.6.1)
	fieldHost                             // re-made from the target
	fieldLength                           // re-made from the framing
	fieldCoding                           // re-made from the framing
	fieldConnection                       // ends here
	fieldProxyConnection                  // ends here, but "close" is heeded
	fieldTE                               // only "trailers" is passed on
	fieldUpgrade                          // only "websocket" is passed on
	fieldMaxForwards                      // counted down for OPTIONS and TRACE
)

func kindOf(name []byte) fieldKind {
	is := func(known string) bool { return equalFold(name, known) }
	switch len(name) {
	case 2:
		if is("te") {
			return fieldTE
		}
	case 3:
		if is("via") {
			return fieldVia
		}
	case 4:
		if is("host") {
			return fieldHost
		} else if is("date") {
			return fieldDate
		}
	case 6:
		if is("expect") {
			return fieldExpect
		}
	case 7:
		if is("upgrade") {
			return fieldUpgrade
		}
	case 10:
		if is("connection") {
			return fieldConnection
		} else if is("keep-alive") {
			return fieldHop
		}
	case 11:
		if is("traceparent") {
			return fieldTrace
		}
	case 12:
		if is("max-forwards") {
			return fieldMaxForwards
		}
	case 14:
		if is("content-length") {
			return fieldLength
		}
	case 16:
		if is("proxy-connection") {
			return fieldProxyConnection
		}
	case 17:
		if is("transfer-encoding") {
			return fieldCoding
		}
	case 18:
		if is("proxy-authenticate") {
			return fieldHop
		}
	case 19:
		if is("proxy-authorization") {
			return fieldHop
		}
	}
	return fieldOther
}

// equalFold compares b with a lower-case ASCII word, ignoring case.
func equalFold(b []byte, lower string) bool {
	if len(b) != len(lower) {
		return false
	}
	for i, o := range b {
		if o >= 'A' && o <= 'Z' {
			o += 'a' - 'A'
		}
		if o != lower[i] {
			return false
		}
	}
	return true
}

// field is one field line of a head, as offsets into it: raw[start:end] with its CRLF, the name before colon, the value
// without white space around it.
type field struct {
	start, colon, value, valueEnd, end uint32
	kind                               fieldKind
}

// head is a parsed message head. It points into the wire's buffer and is valid until that is filled again.
type head struct {
	raw    []byte
	fields []field
	named  [][]byte // options of Connection that name fields

	minor     int   // HTTP/1.minor
	length    int64 // Content-Length, -1 without
	chunked   bool
	close     bool // Connection: close
	keepAlive bool // Connection: keep-alive
	upgrade   bool // Connection: upgrade
	websocket bool // Upgrade: websocket
	trailers  bool // TE: trailers
	expect    bool
	dated     bool
	looped    bool // Via names this hop
	hosts     int
	host      []byte
	forwards  int64 // Max-Forwards, -1 without
	trace     []byte
}

func (h *head) reset(raw []byte) {
	*h = head{raw: raw, fields: h.fields[:0], named: h.named[:0], length: -1, forwards: -1}
}

// name and valueOf are slices of a field line.
func (h *head) name(f *field) []byte    { return h.raw[f.start:f.colon] }
func (h *head) valueOf(f *field) []byte { return h.raw[f.value:f.valueEnd] }

// parseFields reads the field lines of raw from at up to the empty line. hop is this hop's Via name. unfold turns obs-fold
// into spaces, as RFC 9112, 5.2 asks of a proxy for responses; without it obs-fold is a fault.
func (h *head) parseFields(at int, hop []byte, unfold bool) error {
	for at < len(h.raw)-2 {
		end := h.lineEnd(at, unfold)
		line := h.raw[at : end-2]
		colon := 0
		for colon < len(line) && octets[line[colon]]&tokenOctet != 0 {
			colon++
		}
		switch {
		case line[0] == ' ' || line[0] == '\t':
			return faultFold
		case colon == 0 || colon == len(line) || line[colon] != ':':
			return faultName
		case len(h.fields) == maxFields:
			return faultManyFields
		}
		from, to := colon+1, len(line)
		for from < to && (line[from] == ' ' || line[from] == '\t') {
			from++
		}
		for to > from && (line[to-1] == ' ' || line[to-1] == '\t') {
			to--
		}
		value := line[from:to]
		if !all(value, valueOctet) {
			return faultValue
		}
		kind := kindOf(line[:colon])
		h.fields = append(h.fields, field{uint32(at), uint32(at + colon), uint32(at + from), uint32(at + to), uint32(end), kind})
		if kind != fieldOther {
			if err := h.note(kind, value, hop); err != nil {
				return err
			}
		}
		at = end
	}
	return h.conclude()
}

// lineEnd finds the end of the line at at, past its CRLF, joining folded lines where that is wanted.
func (h *head) lineEnd(at int, unfold bool) int {
	end := at + bytes.IndexByte(h.raw[at:], '\n') + 1
	for unfold && end < len(h.raw)-2 && (h.raw[end] == ' ' || h.raw[end] == '\t') {
		h.raw[end-2], h.raw[end-1] = ' ', ' '
		end += bytes.IndexByte(h.raw[end:], '\n') + 1
	}
	return end
}

// note takes in what a field that matters says.
func (h *head) note(kind fieldKind, value, hop []byte) error {
	switch kind {
	case fieldLength:
		n, ok := parseDecimal(value)
		if !ok {
			return faultLength
		}
		if h.length >= 0 && h.length != n {
			return faultLengths
		}
		h.length = n
	case fieldCoding:
		if h.chunked || !equalFold(value, "chunked") {
			return faultCoding
		}
		h.chunked = true
	case fieldConnection, fieldProxyConnection:
		return h.noteOptions(value, kind == fieldConnection)
	case fieldHost:
		h.hosts++
		h.host = value
	case fieldTE:
		h.trailers = h.trailers || listHas(value, "trailers")
	case fieldUpgrade:
		h.websocket = equalFold(value, "websocket")
	case fieldVia:
		h.looped = h.looped || viaNames(value, hop)
	case fieldMaxForwards:
		n, ok := parseDecimal(value)
		if !ok {
			return faultMaxForwards
		}
		h.forwards = n
	case fieldExpect:
		h.expect = true
	case fieldDate:
		h.dated = true
	case fieldTrace:
		h.trace = value
	}
	return nil
}

// noteOptions takes in a Connection field, or a Proxy-Connection field, of which only close counts.
func (h *head) noteOptions(value []byte, genuine bool) error {
	for option := range listItems(value) {
		switch {
		case equalFold(option, "close"):
			h.close = true
		case !genuine || equalFold(option, "te"):
		case equalFold(option, "keep-alive"):
			h.keepAlive = true
		case equalFold(option, "upgrade"):
			h.upgrade = true
		case len(h.named) == 32: // each is compared with every field
			return faultOptions
		default:
			h.named = append(h.named, option)
		}
	}
	return nil
}

// conclude checks what depends on several fields, and marks those that Connection names as hop-by-hop. It never removes
// framing, Host, Via or the other fields with a rule of their own.
func (h *head) conclude() error {
	if h.chunked && h.length >= 0 {
		return faultBothFramings
	}
	if h.chunked && h.minor == 0 {
		return faultCodingIn10
	}
	for _, named := range h.named {
		for i := range h.fields {
			if f := &h.fields[i]; f.kind <= fieldTrace && f.kind != fieldVia && bytes.EqualFold(h.name(f), named) {
				f.kind = fieldHop
			}
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

// parseVersion reads "HTTP/1.0" or "HTTP/1.1".
func (h *head) parseVersion(b []byte) error {
	switch string(b) {
	case "HTTP/1.1":
		h.minor = 1
	case "HTTP/1.0":
		h.minor = 0
	default:
		return faultVersion
	}
	return nil
}

// parseDecimal reads digits alone: no sign, no space, no overflow.
func parseDecimal(b []byte) (int64, bool) {
	n := int64(0)
	for _, d := range b {
		if d < '0' || d > '9' || n > (math.MaxInt64-9)/10 {
			return 0, false
		}
		n = n*10 + int64(d-'0')
	}
	return n, len(b) > 0
}

// listItems yields the elements of a comma-separated field value, without white space and empty ones.
func listItems(value []byte) func(func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for len(value) > 0 {
			item, rest, _ := bytes.Cut(value, []byte{','})
			value = rest
			if item = bytes.Trim(item, " \t"); len(item) > 0 && !yield(item) {
				return
			}
		}
	}
}

// listHas reports whether a list has an element, parameters aside.
func listHas(value []byte, lower string) bool {
	for item := range listItems(value) {
		item, _, _ = bytes.Cut(item, []byte{';'})
		if equalFold(bytes.TrimRight(item, " \t"), lower) {
			return true
		}
	}
	return false
}

// viaNames reports whether a Via value has an entry received by hop: "1.1 name", "HTTP/1.1 name (comment)".
func viaNames(value, hop []byte) bool {
	for item := range listItems(value) {
		if _, by, ok := bytes.Cut(item, []byte{' '}); ok {
			by, _, _ = bytes.Cut(bytes.TrimLeft(by, " \t"), []byte{' '})
			if bytes.EqualFold(by, hop) {
				return true
			}
		}
	}
	return false
}

// ---------------------------------------------------------------------------------------------------------------------
// Requests

// destination is where a request wants to go.
type destination struct {
	key  []byte     // host:port, lower case, without brackets and trailing dot: the name of its pool
	host []byte     // the front of key
	port uint16     //
	ip   netip.Addr // set where host is an address
}

// exchange is one request and its answer. It is pooled; begin makes it new.
type exchange struct {
	srv *server
	c   *client

	start   time.Time
	line    []byte // the request line, copied: the slices below point into it
	method  []byte
	target  []byte // what the origin gets: path and query, "*", or for CONNECT nothing
	auth    []byte // host[:port] as the client wrote it: the Host field
	connect bool
	dst     destination
	req     head
	reqBody body

	out      []byte // the head for the origin; kept for a retry
	in       []byte // the head for the client
	resp     head
	respBody body
	status   int
	keep     bool // the client connection serves another request
	begun    bool // a byte of the final response has been sent
	lingers  bool // the connection is to be closed with care, since unread bytes are about

	failure                  *failure
	reused                   bool
	peer                     netip.AddrPort
	closed                   string // why a tunnel ended
	upBytes                  int64  // body or tunnel bytes from the client
	trace                    [32]byte
	traced                   bool
	awaitClient, awaitOrigin func() // armClient and armOrigin, stored since a method value is allocated each time

	upload   sync.WaitGroup // the goroutine that sends the request's body
	sent     bool           // it sent all of it; owned by it until it ends
	received atomic.Bool    // the client has sent all of its body
	headSeen bool           // a final response has begun; guarded by client.mu
}

func (x *exchange) begin(c *client) {
	x.c, x.start = c, time.Now()
	x.line, x.method, x.target, x.auth, x.connect = x.line[:0], nil, nil, nil, false
	x.dst = destination{key: x.dst.key[:0]}
	x.reqBody, x.respBody = body{}, body{}
	x.status, x.keep, x.begun, x.lingers = 0, false, false, false
	x.failure, x.reused, x.peer, x.closed, x.upBytes, x.traced, x.headSeen, x.sent = nil, false, netip.AddrPort{}, "", 0, false, false, false
	x.req.reset(nil)
	x.resp.reset(nil)
	x.received.Store(false)
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
	case x.req.forwards == 0 && (string(x.method) == "OPTIONS" || string(x.method) == "TRACE"):
		f = x.answerSelf()
	default:
		f = x.forward()
	}
	x.failure = f
	if f != nil && !x.begun {
		x.answer(f)
	}
	x.record()
	if x.lingers {
		x.c.linger()
	}
	return x.keep && !x.srv.draining.Load()
}

// readRequest reads and parses a request head.
func (x *exchange) readRequest() *failure {
	c := x.c
	n, err := c.readHead(int(x.srv.cfg.MaxHeader), deadline(x.srv.cfg.HeaderTimeout))
	if err != nil {
		return x.unreadable(err)
	}
	raw := c.unused()[:n]
	c.r += n // the bytes stay where they are until the wire is filled again
	x.req.reset(raw)
	lineEnd := bytes.IndexByte(raw, '\n') + 1
	x.line = append(x.line, raw[:lineEnd-2]...)
	if err := x.parseLine(); err != nil {
		return x.malformed(err)
	}
	if err := x.req.parseFields(lineEnd, x.srv.hop[:len(x.srv.hop)-2], false); err != nil {
		return x.malformed(err)
	}
	if t := x.req.trace; len(t) >= 55 && t[2] == '-' && t[35] == '-' && all(t[3:35], tokenOctet) {
		x.traced = true
		copy(x.trace[:], t[3:35])
	}
	if err := x.parseTarget(); err != nil {
		return x.malformed(err)
	}
	x.keep = x.req.minor == 1 && !x.req.close // a proxy does not persist with HTTP/1.0 clients (RFC 9112, 9.3)
	x.reqBody.init(&c.wire, &x.req, bodyNone, int64(x.srv.cfg.MaxRequestBody))
	if x.reqBody.framing != bodyNone {
		c.want = largeBuffer
	}
	return nil
}

// unreadable says why no head could be read.
func (x *exchange) unreadable(err error) *failure {
	var fault headFault
	switch {
	case errors.As(err, &fault):
		return x.malformed(err)
	case errors.Is(err, os.ErrDeadlineExceeded):
		x.lingers = true
		return fail(408, tokenRequest, "the request's head was not complete within %v (SLUICE_HEADER_TIMEOUT)", x.srv.cfg.HeaderTimeout)
	}
	return fail(0, tokenClient, "the client left in the middle of a request's head").because(err)
}

// malformed gives the answer to a request that is not understood. Its connection is closed: where it ends is not known.
func (x *exchange) malformed(err error) *failure {
	x.keep, x.lingers = false, true
	switch {
	case errors.Is(err, faultLineTooLong):
		return fail(414, tokenRequest, "the request-target is longer than %d bytes (SLUICE_MAX_HEADER)", x.srv.cfg.MaxHeader)
	case errors.Is(err, faultHeadTooLarge):
		return fail(431, tokenRequest, "the request's head is larger than %d bytes (SLUICE_MAX_HEADER)", x.srv.cfg.MaxHeader)
	case errors.Is(err, faultManyFields):
		return fail(431, tokenRequest, "%v", err)
	}
	return fail(400, tokenRequest, "%v", err)
}

// parseLine splits "METHOD target HTTP/1.1", single spaces and nothing else (RFC 9112, 3).
func (x *exchange) parseLine() error {
	method, rest, ok1 := bytes.Cut(x.line, []byte{' '})
	target, version, ok2 := bytes.Cut(rest, []byte{' '})
	if !ok1 || !ok2 || !isToken(method) {
		return faultFirstLine
	}
	if err := x.req.parseVersion(version); err != nil {
		return err
	}
	if len(target) == 0 || !all(target, targetOctet) {
		return faultTarget
	}
	x.method, x.target, x.connect = method, target, string(method) == "CONNECT"
	return nil
}

// parseTarget reads the request-target, absolute-form or for CONNECT authority-form, and checks Host against it.
func (x *exchange) parseTarget() error {
	if x.req.hosts > 1 || x.req.hosts == 0 && x.req.minor == 1 {
		return faultHost
	}
	if x.req.hosts == 1 {
		if _, _, err := splitAuthority(x.req.host, 80); err != nil {
			return faultHost
		}
	}
	if x.connect {
		x.auth, x.target = x.target, nil
		return x.dst.parse(x.auth, 0)
	}
	const scheme = "http://"
	if len(x.target) <= len(scheme) || !equalFold(x.target[:len(scheme)], scheme) {
		return errors.New(unsupportedTarget(x.target))
	}
	rest := x.target[len(scheme):]
	end := bytes.IndexAny(rest, "/?")
	if end < 0 {
		end = len(rest)
	}
	x.auth, x.target = rest[:end], rest[end:]
	if bytes.IndexByte(x.auth, '@') >= 0 {
		return faultTarget
	}
	return x.dst.parse(x.auth, 80)
}

// unsupportedTarget explains to a person how a forward proxy is spoken to.
func unsupportedTarget(target []byte) string {
	switch {
	case target[0] == '/' || target[0] == '*':
		return "this is a forward proxy: set http_proxy and https_proxy to its address, or send an absolute URL"
	case len(target) > 8 && equalFold(target[:8], "https://"):
		return "https URLs go through a tunnel: send CONNECT host:443"
	}
	return "the request-target is not an http:// URL"
}

// parse reads an authority; std is the port where it names none, 0 if it must.
func (d *destination) parse(authority []byte, std uint16) error {
	host, port, err := splitAuthority(authority, std)
	if err != nil {
		return err
	}
	d.port = port
	if host[0] == '[' {
		host = host[1 : len(host)-1]
		d.ip, _ = netip.ParseAddr(string(host)) // checked by splitAuthority
		d.ip = d.ip.Unmap()
		d.key = d.ip.AppendTo(d.key[:0])
	} else {
		d.ip, _ = parseIPv4(host)
		d.key = append(d.key[:0], host...)
		for i, o := range d.key {
			if o >= 'A' && o <= 'Z' {
				d.key[i] = o + 'a' - 'A'
			}
		}
		d.key = bytes.TrimSuffix(d.key, []byte{'.'})
	}
	n := len(d.key)
	d.key = append(d.key, ':')
	d.key = strconv.AppendUint(d.key, uint64(port), 10)
	d.host = d.key[:n]
	return nil
}

// splitAuthority splits host[:port] and checks both. std is the port where none stands, 0 if one must. An IPv6 address keeps
// its brackets.
func splitAuthority(b []byte, std uint16) (host []byte, port uint16, err error) {
	host, port = b, std
	if i := bytes.LastIndexByte(b, ':'); i > bytes.LastIndexByte(b, ']') {
		n, ok := parseDecimal(b[i+1:])
		if !ok || n < 1 || n > 65535 {
			return nil, 0, faultAuthority
		}
		host, port = b[:i], uint16(n)
	}
	if port == 0 {
		return nil, 0, faultAuthority
	}
	if len(host) > 2 && host[0] == '[' && host[len(host)-1] == ']' {
		a, err := netip.ParseAddr(string(host[1 : len(host)-1]))
		if err != nil || a.Is4() || a.Zone() != "" {
			return nil, 0, faultAuthority
		}
		return host, port, nil
	}
	if !isHostName(host) {
		return nil, 0, faultAuthority
	}
	return host, port, nil
}

// isHostName accepts names of letters, digits, "-" and "_" in labels of 1 to 63 bytes, 253 in all, with or without a
// trailing dot, and dotted-quad IPv4. A last label that is a number means an IPv4 address to resolvers and browsers (WHATWG
// URL, "ends in a number"), in octal, hexadecimal or short forms too; only the plain form is taken.
func isHostName(b []byte) bool {
	b = bytes.TrimSuffix(b, []byte{'.'})
	if len(b) == 0 || len(b) > 253 || !all(b, hostOctet) {
		return false
	}
	label := b
	for rest, more := b, true; more; {
		label, rest, more = bytes.Cut(rest, []byte{'.'})
		if len(label) == 0 || len(label) > 63 {
			return false
		}
	}
	digits, hex := true, len(label) >= 2 && label[0] == '0' && label[1]|0x20 == 'x'
	for _, o := range label {
		digits = digits && o >= '0' && o <= '9'
	}
	if digits || hex {
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
	case x.srv.cfg.MaxRequestBody > 0 && x.req.length > int64(x.srv.cfg.MaxRequestBody):
		x.lingers = true
		return fail(413, tokenRequest, "the request body is larger than %d bytes (SLUICE_MAX_REQUEST_BODY)", x.srv.cfg.MaxRequestBody)
	}
	return nil
}

// addressClass says what kind of destination an address is.
type addressClass uint8

const (
	classPublic addressClass = iota
	classUnspecified
	classLoopback
	classPrivate
	classShared
	classLinkLocal
	classMulticast
	classReserved
)

func (c addressClass) String() string {
	return [...]string{"public", "unspecified", "loopback", "private", "shared (carrier-grade NAT)", "link-local", "multicast", "reserved"}[c]
}

// specialBlocks are the blocks that are not public (IANA special-purpose address registries, RFC 6890).
var specialBlocks = []struct {
	class  addressClass
	blocks []netip.Prefix
}{
	{classUnspecified, blocks("0.0.0.0/8 ::/128")},
	{classLoopback, blocks("127.0.0.0/8 ::1/128")},
	{classPrivate, blocks("10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7")},
	{classShared, blocks("100.64.0.0/10")},
	{classLinkLocal, blocks("169.254.0.0/16 fe80::/10")}, // cloud metadata services live here
	{classMulticast, blocks("224.0.0.0/4 ff00::/8")},
	{classReserved, blocks("192.0.0.0/24 192.0.2.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 240.0.0.0/4 " +
		"::/96 64:ff9b:1::/48 100::/64 2001::/23 2001:db8::/32 3fff::/20 5f00::/16 fec0::/10")},
}

func blocks(text string) (list []netip.Prefix) {
	for _, block := range strings.Fields(text) {
		list = append(list, netip.MustParsePrefix(block))
	}
	return list
}

// classify tells the class of an address. One that carries an IPv4 address to which a translator or a relay on the way would
// send (NAT64, RFC 6052; 6to4, RFC 3056) has that address's class.
func classify(a netip.Addr) addressClass {
	a = a.Unmap()
	if b := a.As16(); a.Is6() && string(b[:12]) == "\x00\x64\xff\x9b\x00\x00\x00\x00\x00\x00\x00\x00" {
		a = netip.AddrFrom4([4]byte(b[12:]))
	} else if a.Is6() && b[0] == 0x20 && b[1] == 0x02 {
		a = netip.AddrFrom4([4]byte(b[2:6]))
	}
	for _, special := range specialBlocks {
		for _, block := range special.blocks {
			if block.Contains(a) {
				return special.class
			}
		}
	}
	return classPublic
}

// judge picks those of a destination's addresses that may be dialled. Only public ones may, but for ALLOW_CIDRS and, short
// of unspecified and multicast ones, ALLOW_PRIVATE_HOSTS.
func (s *server) judge(d *destination, addrs []netip.Addr) ([]netip.AddrPort, *failure) {
	allowed := make([]netip.AddrPort, 0, len(addrs))
	private := s.cfg.AllowPrivateHosts.match(d.host, d.ip, d.port)
	var refused *failure
	for _, a := range addrs {
		a = a.Unmap()
		class := classify(a)
		switch ap := netip.AddrPortFrom(a, d.port); {
		case s.isOwn(ap):
			refused = fail(502, tokenLoop, "%s is this proxy itself", d.key)
		case class == classPublic || s.cfg.AllowCIDRs.contains(a),
			private && class != classUnspecified && class != classMulticast:
			allowed = append(allowed, ap)
		case refused == nil:
			refused = fail(403, tokenProhibited, "%s is at a %v address, %v (SLUICE_ALLOW_CIDRS, SLUICE_ALLOW_PRIVATE_HOSTS)", d.host, class, a)
		}
	}
	if len(allowed) == 0 {
		return nil, refused
	}
	return allowed, nil
}

// ---------------------------------------------------------------------------------------------------------------------
// Names

const (
	maxNames     = 4096 // answers kept
	maxAddresses = 16   // of one name, so that a hostile answer does not start a thousand connections
)

// resolver looks names up and remembers the answers for a while.
type resolver struct {
	lookup  func(ctx context.Context, network, host string) ([]netip.Addr, error)
	ttl     time.Duration
	stale   time.Duration
	timeout time.Duration

	mu      sync.Mutex
	answers map[string]*dnsAnswer // guarded by mu
}

// dnsAnswer is what is known of one name; its fields are guarded by resolver.mu.
type dnsAnswer struct {
	addrs   []netip.Addr  // never changed once set
	err     error         // of the last lookup
	learned time.Time     // when addrs were true
	next    time.Time     // when to ask again
	done    chan struct{} // closed when the lookup under way ends; nil when there is none
}

func newResolver(cfg *config) *resolver {
	// PreferGo: cgo's getaddrinfo reads "0x7f.1" as an address, which policy has not judged.
	system := &net.Resolver{PreferGo: true}
	if servers := cfg.DNSServers; len(servers) > 0 {
		var turn atomic.Uint32
		system.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
			var d net.Dialer // the resolver's next try comes here again, and gets the next server
			return d.DialContext(ctx, network, servers[int(turn.Add(1)-1)%len(servers)])
		}
	}
	return &resolver{lookup: system.LookupNetIP, ttl: cfg.DNSCacheTTL, stale: cfg.DNSStale, timeout: cfg.DNSTimeout,
		answers: map[string]*dnsAnswer{}}
}

// resolve returns the addresses of a name. Lookups of one name at one time are one lookup. ctx ends the wait alone: the
// lookup goes on for others that wait for it.
func (r *resolver) resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	r.mu.Lock()
	a := r.answers[host]
	if a == nil {
		r.makeRoomLocked()
		a = &dnsAnswer{}
		r.answers[host] = a
	}
	if a.done == nil && time.Now().Before(a.next) {
		defer r.mu.Unlock()
		return a.addrs, nil
	}
	if a.done == nil {
		a.done = make(chan struct{})
		go r.refresh(host, a)
	}
	done := a.done
	r.mu.Unlock()
	select {
	case <-done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(a.addrs) > 0 {
		return a.addrs, nil
	}
	return nil, a.err
}

// refresh looks host up and keeps the answer. When it fails, the old one serves on while it is not too stale, except where
// the name is known to be gone.
func (r *resolver) refresh(host string, a *dnsAnswer) {
	ctx, cancel := within(r.timeout)
	addrs, err := r.lookup(ctx, "ip", host)
	cancel()
	if err == nil && len(addrs) == 0 {
		err = &net.DNSError{Err: "no addresses", Name: host, IsNotFound: true}
	}
	var dns *net.DNSError
	gone := errors.As(err, &dns) && dns.IsNotFound
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	a.err = err
	switch {
	case err == nil:
		a.addrs, a.learned = interleave(addrs[:min(len(addrs), maxAddresses)]), now
	case gone || now.Sub(a.learned) >= r.stale:
		a.addrs = nil
		delete(r.answers, host)
	}
	a.next = now.Add(r.ttl)
	close(a.done)
	a.done = nil
}

// makeRoomLocked forgets one answer, any, when there are too many.
func (r *resolver) makeRoomLocked() {
	if len(r.answers) < maxNames {
		return
	}
	for host, a := range r.answers {
		if a.done == nil {
			delete(r.answers, host)
			return
		}
	}
}

// interleave orders addresses so that the families take turns, beginning with that of the first (RFC 8305, 4).
func interleave(addrs []netip.Addr) []netip.Addr {
	var first, other, mixed []netip.Addr
	for _, a := range addrs {
		a = a.Unmap()
		if a.Is4() == addrs[0].Unmap().Is4() {
			first = append(first, a)
		} else {
			other = append(other, a)
		}
	}
	for i := range max(len(first), len(other)) {
		if i < len(first) {
			mixed = append(mixed, first[i])
		}
		if i < len(other) {
			mixed = append(mixed, other[i])
		}
	}
	return mixed
}

// ---------------------------------------------------------------------------------------------------------------------
// Dialling

// attemptDelay is how long one address has before the next is tried beside it (RFC 8305, 5).
const attemptDelay = 250 * time.Millisecond

// dialUpstream resolves, judges and connects. The whole of it ends when DIAL_TIMEOUT is over or the client has left.
func (x *exchange) dialUpstream() (*upstream, *failure) {
	ctx, cancel := within(x.srv.cfg.DialTimeout)
	defer cancel()
	x.c.setGiveUp(cancel)
	defer x.c.setGiveUp(nil)
	addrs := []netip.Addr{x.dst.ip}
	if !x.dst.ip.IsValid() {
		var err error
		if addrs, err = x.srv.names.resolve(ctx, string(x.dst.host)); err != nil {
			return nil, x.unresolved(err)
		}
	}
	allowed, f := x.srv.judge(&x.dst, addrs)
	if f != nil {
		return nil, f
	}
	conn, err := x.srv.race(ctx, allowed)
	if err != nil {
		return nil, x.undialled(err)
	}
	up := &upstream{srv: x.srv, key: string(x.dst.key), peer: addrPortOf(conn.RemoteAddr())}
	up.wire.init(conn, &x.srv.buffers, largeBuffer)
	return up, nil
}

// unresolved says why a name has no addresses.
func (x *exchange) unresolved(err error) *failure {
	var dns *net.DNSError
	switch {
	case errors.Is(err, context.Canceled):
		return fail(0, tokenClient, "the client left while %s was looked up", x.dst.host)
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &dns) && dns.IsTimeout:
		return fail(504, tokenDNSTimeout, "no answer from the resolver for %s (SLUICE_DNS_TIMEOUT, SLUICE_DIAL_TIMEOUT)", x.dst.host).because(err)
	case errors.As(err, &dns) && dns.IsNotFound:
		return fail(502, tokenDNS, "no such name: %s", x.dst.host).because(err)
	}
	return fail(502, tokenDNS, "the resolver failed for %s", x.dst.host).because(err)
}

// undialled says why no connection came about.
func (x *exchange) undialled(err error) *failure {
	var timeout net.Error
	switch {
	case errors.Is(err, context.Canceled) || x.c.hasLeft() && errors.Is(err, os.ErrDeadlineExceeded):
		return fail(0, tokenClient, "the client left while %s was dialled", x.dst.key)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fail(502, tokenRefused, "%s refused the connection", x.dst.key).because(err)
	case errors.As(err, &timeout) && timeout.Timeout():
		return fail(504, tokenConnectTimeout, "%s did not accept a connection within %v (SLUICE_DIAL_TIMEOUT)", x.dst.key, x.srv.cfg.DialTimeout).because(err)
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.EADDRNOTAVAIL):
		return fail(503, tokenLimit, "no descriptor or port is left for a connection to %s (SLUICE_NOFILE)", x.dst.key).because(err)
	case isUnroutable(err):
		return fail(502, tokenUnroutable, "there is no route to %s", x.dst.key).because(err)
	}
	return fail(502, tokenRefused, "%s could not be connected to", x.dst.key).because(err)
}

func isUnroutable(err error) bool {
	return errors.Is(err, syscall.EHOSTUNREACH) || errors.Is(err, syscall.ENETUNREACH) || errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EINVAL)
}

type dialed struct {
	conn *net.TCPConn
	err  error
}

// race connects to the first of addrs that answers (RFC 8305, Happy Eyeballs): one after the other, each with a head start
// of attemptDelay, the next at once when one fails.
func (s *server) race(ctx context.Context, addrs []netip.AddrPort) (*net.TCPConn, error) {
	dialer := &net.Dialer{Control: s.sockets.dialling, KeepAlive: -1}
	dialer.SetMultipathTCP(false)
	if len(addrs) == 1 {
		return dialer.DialTCP(ctx, "tcp", netip.AddrPort{}, addrs[0])
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan dialed, len(addrs))
	start := time.NewTimer(0)
	defer start.Stop()
	var worst error
	for next, running := 0, 0; ; {
		select {
		case <-start.C:
			if next < len(addrs) {
				go attempt(ctx, dialer, addrs[next], results)
				next, running = next+1, running+1
				start.Reset(attemptDelay)
			}
		case r := <-results:
			running--
			if r.err == nil {
				go closeLosers(results, running)
				return r.conn, nil
			}
			if worst == nil || isUnroutable(worst) { // a family without a route says least
				worst = r.err
			}
			if next == len(addrs) && running == 0 {
				return nil, worst
			}
			start.Reset(0)
		}
	}
}

func attempt(ctx context.Context, dialer *net.Dialer, addr netip.AddrPort, results chan<- dialed) {
	conn, err := dialer.DialTCP(ctx, "tcp", netip.AddrPort{}, addr)
	results <- dialed{conn, err}
}

// closeLosers closes what connects after the race is won.
func closeLosers(results <-chan dialed, running int) {
	for range running {
		if r := <-results; r.err == nil {
			r.conn.Close()
		}
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Pool

// probeAfter is the idle time after which a pooled connection is looked at before it is used: a server may have sent a
// farewell (408) that is not the answer to what comes next. Before that, the watcher's word is taken.
const probeAfter = 100 * time.Millisecond

// upstream is one connection to an origin.
type upstream struct {
	wire
	srv   *server
	key   string // host:port it was dialled for; it is reused for no other
	peer  netip.AddrPort
	watch watched
	hung  atomic.Bool // the origin has closed its side
	since time.Time   // idle since; guarded by pool.mu
	idle  bool        // guarded by pool.mu
}

// hungUp is called by the watcher when the origin has closed its side.
func (up *upstream) hungUp(bool) {
	up.hung.Store(true)
	if up.srv.pool.remove(up) {
		up.close()
	}
}

func (up *upstream) close() {
	up.srv.watcher.remove(&up.watch)
	up.conn.Close()
	up.drop()
}

// pool keeps idle connections to origins, by host and port.
type pool struct {
	limit, perHost int
	ttl            time.Duration

	mu     sync.Mutex
	hosts  map[string]*idleList // guarded by mu
	idle   int                  // in all lists; guarded by mu
	closed bool                 // guarded by mu
}

// idleList has the oldest connection first; the youngest is reused first.
type idleList struct{ conns []*upstream }

func newPool(cfg *config) *pool {
	return &pool{limit: cfg.PoolIdle, perHost: cfg.PoolIdlePerHost, ttl: cfg.PoolIdleTimeout, hosts: map[string]*idleList{}}
}

// get takes a connection that was dialled for key, or nil.
func (p *pool) get(key []byte) *upstream {
	for {
		up, age := p.take(key)
		if up == nil || !up.hung.Load() && (age < probeAfter || isQuiet(up.raw)) {
			return up
		}
		up.close()
	}
}

func (p *pool) take(key []byte) (*upstream, time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := p.hosts[string(key)]
	if list == nil || len(list.conns) == 0 {
		return nil, 0
	}
	last := len(list.conns) - 1
	up := list.conns[last]
	list.conns[last] = nil
	list.conns = list.conns[:last]
	p.idle--
	up.idle = false
	return up, time.Since(up.since)
}

// put keeps a connection for later, or closes it. When the pool is full, the oldest of some host makes room.
func (p *pool) put(up *upstream) {
	up.release()
	p.mu.Lock()
	list := p.hosts[up.key]
	if list == nil {
		list = &idleList{}
		p.hosts[up.key] = list
	}
	if p.closed || up.hung.Load() || p.limit == 0 || len(list.conns) >= p.perHost {
		p.mu.Unlock()
		up.close()
		return
	}
	var evicted *upstream
	if p.idle >= p.limit {
		evicted = p.oldestLocked()
	}
	up.since, up.idle = time.Now(), true
	list.conns = append(list.conns, up)
	p.idle++
	p.mu.Unlock()
	if evicted != nil {
		evicted.close()
	}
	if up.hung.Load() { // the watcher may have looked before it was idle
		up.hungUp(false)
	}
}

// oldestLocked takes the longest idle connection of some host out.
func (p *pool) oldestLocked() *upstream {
	for _, list := range p.hosts {
		if len(list.conns) > 0 {
			up := list.conns[0]
			p.removeLocked(list, 0)
			return up
		}
	}
	return nil
}

func (p *pool) removeLocked(list *idleList, i int) {
	list.conns[i].idle = false
	list.conns = append(list.conns[:i], list.conns[i+1:]...)
	p.idle--
}

// remove takes up out if it is idle; then its caller owns it.
func (p *pool) remove(up *upstream) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !up.idle {
		return false
	}
	list := p.hosts[up.key]
	for i, other := range list.conns {
		if other == up {
			p.removeLocked(list, i)
			return true
		}
	}
	return false
}

// expire closes connections idle for longer than POOL_IDLE_TIMEOUT and forgets hosts without any.
func (p *pool) expire(now time.Time) {
	var old []*upstream
	p.mu.Lock()
	for key, list := range p.hosts {
		for p.ttl > 0 && len(list.conns) > 0 && now.Sub(list.conns[0].since) >= p.ttl {
			old = append(old, list.conns[0])
			p.removeLocked(list, 0)
		}
		if len(list.conns) == 0 {
			delete(p.hosts, key)
		}
	}
	p.mu.Unlock()
	for _, up := range old {
		up.close()
	}
}

// close closes all idle connections; those in use are closed when they come back.
func (p *pool) close() {
	p.mu.Lock()
	p.closed = true
	p.ttl = 1
	p.mu.Unlock()
	p.expire(time.Now().Add(time.Hour))
}

// ---------------------------------------------------------------------------------------------------------------------
// Forwarding

// spliceFrom is the length from which a body is moved in the kernel rather than through a buffer.
const spliceFrom = 64 << 10

// maxInterim is the most 1xx responses that one request may have.
const maxInterim = 100

// forward sends the request to its origin and the response back. A reused connection that died before a byte of response
// is replaced once, by a new one, if the request can be repeated (RFC 9110, 9.2.2).
func (x *exchange) forward() *failure {
	x.out = x.appendRequest(x.out[:0])
	up := x.srv.pool.get(x.dst.key)
	if up != nil && !x.repeatable() && !isQuiet(up.raw) {
		up.close()
		up = nil
	}
	for x.reused = up != nil; ; {
		if up == nil {
			var f *failure
			if up, f = x.dialUpstream(); f != nil {
				return f
			}
			x.srv.watcher.add(&up.watch, up.raw, up)
		}
		x.peer = up.peer
		f := x.roundTrip(up)
		if f == nil || !f.stale || !x.reused || !x.repeatable() {
			return f
		}
		up, x.reused = nil, false
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
	return x.req.upgrade && x.req.websocket && x.req.minor == 1 && string(x.method) == "GET" && x.reqBody.framing == bodyNone
}

// appendRequest makes the head for the origin.
func (x *exchange) appendRequest(b []byte) []byte {
	b = append(b, x.method...)
	b = append(b, ' ')
	switch {
	case len(x.target) == 0 && string(x.method) == "OPTIONS":
		b = append(b, '*') // RFC 9112, 3.2.4
	case len(x.target) == 0 || x.target[0] == '?':
		b = append(b, '/')
	}
	b = append(b, x.target...)
	b = append(b, " HTTP/1.1\r\nHost: "...)
	b = append(b, x.auth...)
	b = append(b, "\r\n"...)
	b = x.req.appendKept(b)
	b = x.appendVia(b, &x.req)
	switch {
	case x.reqBody.framing == bodyChunked:
		b = append(b, "Transfer-Encoding: chunked\r\n"...)
	case x.req.length >= 0:
		b = appendLength(b, x.req.length)
	}
	if x.req.forwards >= 0 {
		n := x.req.forwards
		if string(x.method) == "OPTIONS" || string(x.method) == "TRACE" {
			n-- // RFC 9110, 7.6.2; 0 is answered by answerSelf
		}
		b = append(b, "Max-Forwards: "...)
		b = strconv.AppendInt(b, n, 10)
		b = append(b, "\r\n"...)
	}
	if x.req.trailers && x.req.minor == 1 {
		b = append(b, "TE: trailers\r\n"...)
	}
	switch {
	case x.upgrades():
		b = append(b, "Connection: Upgrade\r\nUpgrade: websocket\r\n"...)
	case x.req.trailers && x.req.minor == 1:
		b = append(b, "Connection: TE\r\n"...) // RFC 9110, 10.1.4
	}
	return append(b, "\r\n"...)
}

func (x *exchange) appendVia(b []byte, h *head) []byte {
	b = append(b, "Via: 1."...)
	b = append(b, '0'+byte(h.minor), ' ')
	return append(b, x.srv.hop...)
}

func appendLength(b []byte, n int64) []byte {
	b = append(b, "Content-Length: "...)
	b = strconv.AppendInt(b, n, 10)
	return append(b, "\r\n"...)
}

// roundTrip carries the request over up and the response back, and leaves up in the pool or closed.
func (x *exchange) roundTrip(up *upstream) *failure {
	x.headSeen = false
	x.c.setUpstream(up, false)
	sending := x.reqBody.framing != bodyNone && !(x.reqBody.framing == bodyLength && x.reqBody.left <= int64(x.c.buffered()))
	var f *failure
	if sending {
		up.conn.SetReadDeadline(time.Time{}) // sendBody sets one when the body is sent
		x.upload.Add(1)
		go x.sendBody(up)
	} else {
		f = x.sendWhole(up)
	}
	if f == nil {
		f = x.receive(up)
	}
	x.c.setUpstream(nil, false)
	complete := f == nil
	if sending {
		complete = x.joinUpload(up, f) && complete
	}
	x.upBytes = x.reqBody.size
	if complete && x.respBody.reusable() && !x.resp.close && (x.resp.minor == 1 || x.resp.keepAlive) && up.buffered() == 0 {
		x.srv.pool.put(up)
	} else {
		up.close()
	}
	return f
}

// joinUpload ends sendBody, and reports whether it sent everything. When the response is complete a last piece that is
// still being written gets a moment; a body that is not all here is given up, and since its rest cannot be told from a next
// request, the client connection too.
func (x *exchange) joinUpload(up *upstream, f *failure) bool {
	if f == nil && x.received.Load() {
		moment := time.AfterFunc(hangupGrace, func() { up.conn.Close() })
		x.upload.Wait()
		return moment.Stop() && x.sent
	}
	up.conn.Close()
	x.armClient()
	x.upload.Wait()
	if !x.received.Load() {
		x.keep, x.lingers = false, true
	}
	return false
}

// sendWhole sends a request whose body, if any, is already in the client's buffer.
func (x *exchange) sendWhole(up *upstream) *failure {
	body, _, err := x.reqBody.nextBuffered()
	if err != nil {
		return x.badBody(err)
	}
	x.received.Store(true)
	x.c.mu.Lock()
	x.armLocked(up, x.srv.cfg.ResponseTimeout)
	x.c.mu.Unlock()
	if err := up.write(x.srv.cfg.BodyTimeout, x.out, body, nil); err != nil {
		return x.upstreamLost(up, err, true)
	}
	return nil
}

// sendBody sends the request while exchange.receive waits for the response on the same connection, since an origin may
// answer before it has read everything. It runs in a goroutine of its own.
func (x *exchange) sendBody(up *upstream) {
	defer x.upload.Done()
	f := x.copyRequest(up)
	x.c.mu.Lock()
	defer x.c.mu.Unlock()
	x.c.failed = f
	if f != nil || !x.headSeen {
		x.armLocked(up, x.srv.cfg.ResponseTimeout)
	}
}

// copyRequest returns a failure when the client's part of the request is at fault. That the origin takes no more is none:
// it may have answered.
func (x *exchange) copyRequest(up *upstream) *failure {
	b := &x.reqBody
	out := bodyWriter{dst: &up.wire, limit: x.srv.cfg.BodyTimeout, head: x.out, chunked: b.framing == bodyChunked}
	if x.c.buffered() == 0 && out.flush() != nil {
		return nil
	}
	for {
		data, done, err := b.next(x.awaitClient)
		if err != nil {
			return x.badBody(err)
		}
		x.received.Store(done)
		if err := out.write(data, done, b); err != nil {
			return x.unsent(err)
		}
		if b.spliceable(&up.wire) {
			m := move{dst: &up.wire, src: &x.c.wire, limit: b.left, writeLimit: x.srv.cfg.BodyTimeout, beforeRead: x.awaitClient}
			n, err := m.run()
			done = b.skip(n)
			x.received.Store(done)
			if err != nil && m.readFailed {
				return x.badBody(err)
			} else if err != nil {
				return x.unsent(err)
			}
		}
		if done {
			x.sent = true
			return nil
		}
	}
}

// unsent is called when the origin takes no more of the body.
func (x *exchange) unsent(err error) *failure {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fail(504, tokenResponseTimeout, "%s took no more of the request body for %v (SLUICE_BODY_TIMEOUT)", x.dst.key, x.srv.cfg.BodyTimeout)
	}
	return nil
}

// badBody says what is wrong with the client's body.
func (x *exchange) badBody(err error) *failure {
	var fault headFault
	switch {
	case errors.Is(err, errBodyLimit):
		return fail(413, tokenRequest, "the request body is larger than %d bytes (SLUICE_MAX_REQUEST_BODY)", x.srv.cfg.MaxRequestBody)
	case errors.As(err, &fault):
		return fail(400, tokenRequest, "%v in the request body", err)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fail(408, tokenRequest, "nothing came of the request body for %v (SLUICE_BODY_TIMEOUT)", x.srv.cfg.BodyTimeout)
	}
	return fail(0, tokenClient, "the client left in the middle of the request body").because(err)
}

// armClient sets the limit for the client's next bytes of a body. Once the exchange is over, that is at once.
func (x *exchange) armClient() {
	x.c.mu.Lock()
	defer x.c.mu.Unlock()
	if x.c.upstream == nil {
		x.c.conn.SetReadDeadline(longAgo())
	} else {
		x.c.conn.SetReadDeadline(deadline(x.srv.cfg.BodyTimeout))
	}
}

// armOrigin sets the limit for the origin's next bytes of a body.
func (x *exchange) armOrigin() {
	x.c.mu.Lock()
	defer x.c.mu.Unlock()
	x.armLocked(x.c.upstream, x.srv.cfg.BodyTimeout)
}

// armLocked sets the limit for the origin's next bytes. The client may have hung up, or its body turned out bad, at any
// time; the lock, client.mu, sees to it that neither is overlooked.
func (x *exchange) armLocked(up *upstream, limit time.Duration) {
	switch {
	case x.c.failed != nil:
		up.conn.SetReadDeadline(longAgo())
	case x.c.gone && (limit == 0 || limit > hangupGrace):
		up.conn.SetReadDeadline(deadline(hangupGrace))
	default:
		up.conn.SetReadDeadline(deadline(limit))
	}
}

// receive reads the origin's answer and passes it on.
func (x *exchange) receive(up *upstream) *failure {
	for interim := 0; ; interim++ {
		n, err := up.readHead(int(x.srv.cfg.MaxHeader), time.Time{})
		if err != nil {
			return x.upstreamLost(up, err, interim == 0 && up.buffered() == 0)
		}
		raw := up.unused()[:n]
		up.r += n
		x.resp.reset(raw)
		status, err := x.resp.parseStatus()
		if err == nil && status == 101 && !x.upgrades() {
			err = faultUnasked
		} else if err == nil && interim == maxInterim {
			err = faultInformational
		}
		if err != nil {
			return x.badUpstream(err)
		}
		switch {
		case status == 101:
			return x.switchProtocols(up)
		case status >= 200:
			x.status = status
			return x.respond(up)
		case x.req.minor == 1: // 1xx are not for HTTP/1.0 clients (RFC 9110, 15.2)
			x.in = append(x.appendResponse(x.in[:0]), "\r\n"...)
			if err := x.c.write(x.srv.cfg.BodyTimeout, x.in, nil, nil); err != nil {
				return x.clientLost(err)
			}
		}
	}
}

// parseStatus parses a response head: its first line, "HTTP/1.1 200 reason", and its fields.
func (h *head) parseStatus() (int, error) {
	end := bytes.IndexByte(h.raw, '\n') + 1
	line := h.raw[:end-2]
	if len(line) < 12 || line[8] != ' ' || len(line) > 12 && line[12] != ' ' || !all(line, valueOctet) {
		return 0, faultStatus
	}
	status, ok := parseDecimal(line[9:12])
	if !ok || status < 100 {
		return 0, faultStatus
	}
	if err := h.parseVersion(line[:8]); err != nil {
		return 0, err
	}
	return int(status), h.parseFields(end, nil, true)
}

// upstreamLost says why no (or no whole) response head came.
func (x *exchange) upstreamLost(up *upstream, err error, nothing bool) *failure {
	x.c.mu.Lock()
	gone, failed := x.c.gone, x.c.failed
	x.c.mu.Unlock()
	var fault headFault
	switch {
	case failed != nil:
		return failed
	case errors.As(err, &fault):
		return x.badUpstream(err)
	case errors.Is(err, os.ErrDeadlineExceeded) && gone, errors.Is(err, net.ErrClosed):
		x.keep = false
		return fail(0, tokenClient, "the client left before %s answered", x.dst.key)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fail(504, tokenResponseTimeout, "%s did not answer within %v (SLUICE_RESPONSE_TIMEOUT)", x.dst.key, x.srv.cfg.ResponseTimeout)
	}
	f := fail(502, tokenTerminated, "%s closed the connection before its answer was complete", x.dst.key).because(err)
	f.stale = nothing
	return f
}

// badUpstream says what is wrong with the origin's message.
func (x *exchange) badUpstream(err error) *failure {
	switch {
	case errors.Is(err, faultLineTooLong), errors.Is(err, faultHeadTooLarge), errors.Is(err, faultManyFields):
		return fail(502, tokenHeadSize, "the response head of %s is too large: %v (SLUICE_MAX_HEADER)", x.dst.key, err)
	case errors.Is(err, errBodyLimit):
		return fail(502, tokenBodySize, "the response body of %s is larger than %d bytes (SLUICE_MAX_RESPONSE_BODY)", x.dst.key, x.srv.cfg.MaxResponseBody)
	}
	return fail(502, tokenProtocol, "malformed response from %s: %v", x.dst.key, err)
}

func (x *exchange) clientLost(err error) *failure {
	x.keep, x.begun = false, true
	return fail(0, tokenClient, "the client left before the answer was complete").because(err)
}

// appendResponse makes the head for the client from the origin's, but for its framing and end.
func (x *exchange) appendResponse(b []byte) []byte {
	h := &x.resp
	line := h.raw[len("HTTP/1.x"):bytes.IndexByte(h.raw, '\r')]
	b = append(b, "HTTP/1.1"...)
	b = append(b, line...)
	if len(line) == len(" 200") {
		b = append(b, ' ') // the space stands also before an empty reason (RFC 9112, 4)
	}
	b = append(b, "\r\n"...)
	b = h.appendKept(b)
	return x.appendVia(b, h)
}

// respond passes a final response on.
func (x *exchange) respond(up *upstream) *failure {
	x.c.mu.Lock()
	x.headSeen = true
	x.c.mu.Unlock()
	bodiless := string(x.method) == "HEAD" || x.status == 204 || x.status == 304
	limit := int64(x.srv.cfg.MaxResponseBody)
	if limit > 0 && !bodiless && x.resp.length > limit {
		return x.badUpstream(errBodyLimit)
	}
	x.respBody.init(&up.wire, &x.resp, bodyClose, limit)
	if bodiless {
		x.respBody.framing = bodyNone
	}
	x.keep = x.keep && x.received.Load() && !x.srv.draining.Load()
	out := bodyWriter{dst: &x.c.wire, limit: x.srv.cfg.BodyTimeout, started: &x.begun}
	b := x.appendResponse(x.in[:0])
	switch {
	case x.status == 204: // RFC 9110, 8.6: no Content-Length
	case x.resp.length >= 0:
		b = appendLength(b, x.resp.length)
	case bodiless:
	case x.req.minor == 1:
		out.chunked = true
		b = append(b, "Transfer-Encoding: chunked\r\n"...)
	default: // the end of the connection is the end of the body
		x.keep = false
	}
	if !x.resp.dated {
		b = append(b, "Date: "...) // RFC 9110, 6.6.1
		b = time.Now().UTC().AppendFormat(b, http.TimeFormat)
		b = append(b, "\r\n"...)
	}
	if !x.keep {
		b = append(b, "Connection: close\r\n"...)
	}
	x.in = append(b, "\r\n"...)
	out.head = x.in
	return x.copyResponse(up, &out)
}

// copyResponse streams the response: its head together with what is here of the body, then the rest as it comes.
func (x *exchange) copyResponse(up *upstream, out *bodyWriter) *failure {
	b := &x.respBody
	if b.framing != bodyNone && up.buffered() == 0 {
		if err := out.flush(); err != nil {
			return x.clientLost(err)
		}
	}
	for {
		data, done, err := b.next(x.awaitOrigin)
		if err != nil {
			return x.cutShort(up, out, err)
		}
		if err := out.write(data, done, b); err != nil {
			return x.clientLost(err)
		}
		if b.spliceable(out.dst) {
			m := move{dst: out.dst, src: &up.wire, limit: b.left, writeLimit: out.limit, beforeRead: x.awaitOrigin}
			n, err := m.run()
			done = b.skip(n)
			if err != nil && m.readFailed {
				return x.cutShort(up, out, err)
			} else if err != nil {
				return x.clientLost(err)
			}
		}
		if done {
			return nil
		}
	}
}

// cutShort says why a response body did not end well. If it has begun, the client learns from the connection's end: its
// framing is not complete, and where there is none, the connection is reset.
func (x *exchange) cutShort(up *upstream, out *bodyWriter, err error) *failure {
	if x.begun {
		x.keep = false
		if !out.chunked && x.resp.length < 0 {
			x.c.abort()
		}
	}
	if errors.Is(err, errBodyLimit) {
		return x.badUpstream(err)
	}
	f := x.upstreamLost(up, err, false)
	if f.token == tokenResponseTimeout && f.status == 504 && x.c.failed == nil {
		f.text = fmt.Sprintf("nothing came of the response of %s for %v (SLUICE_BODY_TIMEOUT)", x.dst.key, x.srv.cfg.BodyTimeout)
	}
	return f
}

// switchProtocols passes a 101 on and carries what follows as a tunnel.
func (x *exchange) switchProtocols(up *upstream) *failure {
	if !x.resp.upgrade || !x.resp.websocket {
		return x.badUpstream(faultUnasked)
	}
	x.status, x.keep, x.begun = 101, false, true
	x.in = x.appendResponse(x.in[:0])
	x.in = append(x.in, "Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"...)
	if err := x.c.write(x.srv.cfg.BodyTimeout, x.in, nil, nil); err != nil {
		return x.clientLost(err)
	}
	x.relay(up)
	return nil
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

// chunkState is what comes next in a chunked body (RFC 9112, 7.1).
type chunkState uint8

const (
	chunkSize chunkState = iota
	chunkData
	chunkEnd // the CRLF after the data
	chunkTrailers
	chunkDone
)

// errBodyLimit is returned when a body is larger than its limit.
const errBodyLimit = headFault("the body is too large")

// maxChunkLine bounds a chunk's size line with its extensions, which are dropped.
const maxChunkLine = 256

// body reads the body of one message from a wire.
type body struct {
	w       *wire
	framing framing
	state   chunkState
	left    int64 // bodyLength: bytes to come; bodyChunked: bytes to come of the chunk
	size    int64 // bytes of body so far
	limit   int64 // most bytes, 0 = any
	trailer head  // parsed when the body is done
}

// init reads a head's framing; other is what a body without any has.
func (b *body) init(w *wire, h *head, other framing, limit int64) {
	*b = body{w: w, framing: other, left: h.length, limit: limit}
	switch {
	case h.chunked:
		b.framing, b.left = bodyChunked, 0
	case h.length > 0:
		b.framing = bodyLength
	case h.length == 0:
		b.framing = bodyNone
	}
}

// reusable reports whether a wire whose body is done can carry another message.
func (b *body) reusable() bool { return b.framing != bodyClose }

// next returns the next bytes of the body, valid until the wire is filled again, and whether it is done; then there may be
// none. beforeRead is called before each wait, to set its deadline.
func (b *body) next(beforeRead func()) (data []byte, done bool, err error) {
	for {
		data, done, err = b.nextBuffered()
		if done || err != nil || len(data) > 0 {
			return data, done, err
		}
		beforeRead()
		if err := b.w.fill(); err == io.EOF && b.framing == bodyClose {
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
		return nil, true, nil
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
		return nil, false, errBodyLimit
	}
	return data, done, err
}

// nextChunks decodes all chunks that are here into one run of bytes: what follows the first chunk's data is moved up to it, over
// the size lines between, so that many small chunks leave as one.
func (b *body) nextChunks() ([]byte, error) {
	w := b.w
	start, end := w.r, w.r
	for b.state != chunkDone {
		if b.state == chunkData {
			n := int(min(b.left, int64(w.buffered())))
			if n == 0 {
				break
			}
			if end == start {
				start, end = w.r, w.r
			}
			if end != w.r {
				copy(w.buf[end:], w.buf[w.r:w.r+n])
			}
			end += n
			w.r += n
			if b.left -= int64(n); b.left == 0 {
				b.state = chunkEnd
			}
			continue
		}
		more, err := b.chunkFraming(w.unused())
		if err != nil {
			return nil, err
		}
		if !more {
			break
		}
	}
	return w.buf[start:end], nil
}

// chunkFraming reads what stands between chunks from in. It returns false when not all of it is here.
func (b *body) chunkFraming(in []byte) (bool, error) {
	switch b.state {
	case chunkSize:
		i := bytes.IndexByte(in[:min(len(in), maxChunkLine)], '\n')
		if i < 0 && len(in) < maxChunkLine {
			return false, nil
		}
		n, ok := parseChunkSize(in[:max(i, 0)])
		if !ok {
			return false, faultChunk
		}
		b.w.r += i + 1
		b.left, b.state = n, chunkData
		if n == 0 {
			b.state = chunkTrailers
		}
	case chunkEnd:
		if len(in) < 2 && (len(in) == 0 || in[0] == '\r') {
			return false, nil
		}
		if in[0] != '\r' || in[1] != '\n' {
			return false, faultChunk
		}
		b.w.r += 2
		b.state = chunkSize
	case chunkTrailers:
		n, err := trailersEnd(in)
		if n == 0 || err != nil {
			return false, err
		}
		b.w.r += n
		b.state = chunkDone
		b.trailer.reset(in[:n])
		b.trailer.minor = 1
		return true, b.trailer.parseFields(0, nil, false)
	}
	return true, nil
}

// parseChunkSize reads a chunk-size line up to its LF: 1 to 15 hex digits, then CR or an extension, which may hold only what
// a field value may.
func parseChunkSize(line []byte) (int64, bool) {
	n, digits := int64(0), 0
	for ; digits < len(line); digits++ {
		d := strings.IndexByte("0123456789abcdef", line[digits]|0x20)
		if d < 0 || line[digits] < '0' {
			break
		}
		n = n<<4 | int64(d)
	}
	if digits == 0 || digits > 15 || line[len(line)-1] != '\r' {
		return 0, false
	}
	ext := line[digits : len(line)-1]
	return n, len(ext) == 0 || ext[0] == ';' && all(ext, valueOctet)
}

// trailersEnd finds the length of a trailer section with the empty line that ends it; 0 when it is not all here.
func trailersEnd(in []byte) (int, error) {
	for at := 0; ; {
		i := bytes.IndexByte(in[at:], '\n')
		switch {
		case i < 0 && len(in) > largeBuffer:
			return 0, faultChunk
		case i < 0:
			return 0, nil
		case i == 0 || in[at+i-1] != '\r':
			return 0, faultBareLF
		case i == 1:
			return at + 2, nil
		}
		at += i + 1
	}
}

// spliceable reports whether the rest of the body is large enough, and both connections plain enough, for the kernel to
// move it.
func (b *body) spliceable(dst *wire) bool {
	return b.framing == bodyLength && b.left >= spliceFrom && b.w.buffered() == 0 && canSplice(dst, b.w)
}

// skip notes that n bytes of the body went another way, and reports whether it is done.
func (b *body) skip(n int64) bool {
	b.left -= n
	b.size += n
	return b.left == 0
}

// bodyWriter sends the body of one message, its head with the first piece.
type bodyWriter struct {
	dst     *wire
	limit   time.Duration
	chunked bool
	head    []byte // not sent yet; its room is used again for chunk sizes
	started *bool  // set when the first byte is on its way
}

func (o *bodyWriter) flush() error { return o.send(o.head, nil, nil) }

// write sends the next piece of from; done says that it is the last.
func (o *bodyWriter) write(data []byte, done bool, from *body) error {
	b := o.head
	if o.chunked && len(data) > 0 {
		b = strconv.AppendUint(b, uint64(len(data)), 16)
		b = append(b, "\r\n"...)
	}
	before := len(b)
	small := len(data) <= 2048 // copying costs less than a vector
	if small {
		b = append(b, data...)
		data, before = nil, len(b)
	}
	if o.chunked && (small && before > len(o.head) || !small) {
		b = append(b, "\r\n"...)
	}
	if o.chunked && done {
		b = append(b, "0\r\n"...)
		b = from.trailer.appendKept(b)
		b = append(b, "\r\n"...)
	}
	if small {
		return o.send(b, nil, nil)
	}
	return o.send(b[:before], data, b[before:])
}

func (o *bodyWriter) send(a, b, c []byte) error {
	o.head = a[:0]
	if len(a)+len(b)+len(c) == 0 {
		return nil
	}
	if o.started != nil {
		*o.started = true
	}
	return o.dst.write(o.limit, a, b, c)
}

// ---------------------------------------------------------------------------------------------------------------------
// Tunnels

// Why a tunnel ended, as logged in close_reason.
const (
	closedByClient   = "client_closed"
	closedByUpstream = "upstream_closed"
	closedByError    = "connection_error"
	closedIdle       = "idle_timeout"
	closedHalf       = "half_close_timeout"
	closedAge        = "max_age"
	closedDrain      = "drain"
)

// tunnel serves a CONNECT request: it dials, says 200 and carries bytes until both sides are done.
func (x *exchange) tunnel() *failure {
	x.keep = false
	up, f := x.dialUpstream()
	if f != nil {
		return f
	}
	defer up.close()
	x.peer, x.status, x.begun = up.peer, 200, true
	if err := x.c.write(x.srv.cfg.BodyTimeout, []byte("HTTP/1.1 200 Connection Established\r\n\r\n"), nil, nil); err != nil {
		return x.clientLost(err)
	}
	x.relay(up)
	return nil
}

// tunnel is two moves between a client and an origin, one in each direction. Both see the same clock: bytes in either
// direction keep both alive.
type tunnel struct {
	cfg        *config
	client, up *wire
	since      time.Time
	last       atomic.Int64           // when a byte last moved, in ns after since
	reason     atomic.Pointer[string] // why it ended: the first reason stays
	down       int64                  // bytes to the client; owned by download until it ends
	other      sync.WaitGroup

	mu   sync.Mutex
	half bool // one side has closed; guarded by mu
}

// relay carries bytes both ways until both directions have ended (RFC 9110, 9.3.6).
func (x *exchange) relay(up *upstream) {
	t := &tunnel{cfg: &x.srv.cfg, client: &x.c.wire, up: &up.wire, since: time.Now()}
	x.c.setUpstream(up, true)
	t.other.Add(1)
	go t.download()
	x.upBytes = t.carry(t.up, t.client, closedByClient)
	t.other.Wait()
	x.respBody.size, x.closed = t.down, *t.reason.Load()
	if x.c.setUpstream(nil, false) {
		x.closed = closedDrain
	}
}

func (t *tunnel) download() {
	defer t.other.Done()
	t.down = t.carry(t.client, t.up, closedByUpstream)
}

// carry moves bytes from src to dst until src ends, and passes that end on. It returns how many there were.
func (t *tunnel) carry(dst, src *wire, reason string) (total int64) {
	m := move{dst: dst, src: src, moved: t.touch, beforeRead: func() { t.arm(src) }}
	for {
		m.limit, m.writeLimit = math.MaxInt64, t.cfg.TunnelIdleTimeout
		n, err := m.run()
		total += n
		switch {
		case err == io.ErrUnexpectedEOF:
			t.reason.CompareAndSwap(nil, &reason)
			if t.halfClose(dst) != nil {
				t.end(reason)
			}
			return total
		case errors.Is(err, os.ErrDeadlineExceeded):
			over := t.over()
			if over == "" {
				continue // bytes went the other way meanwhile
			}
			t.end(over)
			return total
		default:
			if t.reason.Load() == nil { // pass it on as what it is: neither side shall take what it got for everything
				t.client.abort()
				t.up.abort()
			}
			t.end(closedByError)
			return total
		}
	}
}

// end notes why the tunnel ends, and ends the waits of both directions.
func (t *tunnel) end(reason string) {
	t.reason.CompareAndSwap(nil, &reason)
	t.client.conn.Close()
	t.up.conn.Close()
}

// halfClose passes the end of one direction on; the other has less patience from now on.
func (t *tunnel) halfClose(dst *wire) error {
	if dst.tcp == nil {
		return errors.ErrUnsupported
	}
	err := dst.tcp.CloseWrite()
	t.mu.Lock()
	t.half = true
	t.mu.Unlock()
	t.arm(dst)
	return err
}

// arm sets the deadline for the next bytes of src.
func (t *tunnel) arm(src *wire) {
	t.mu.Lock()
	src.conn.SetReadDeadline(t.deadlineLocked())
	t.mu.Unlock()
}

func (t *tunnel) touch() { t.last.Store(int64(time.Since(t.since))) }

// patienceLocked is how long the tunnel may go without a byte.
func (t *tunnel) patienceLocked() time.Duration {
	if t.half {
		return t.cfg.TunnelHalfCloseTimeout
	}
	return t.cfg.TunnelIdleTimeout
}

// deadlineLocked is when the tunnel ends if no byte moves; zero when never.
func (t *tunnel) deadlineLocked() time.Time {
	var at time.Time
	if p := t.patienceLocked(); p > 0 {
		at = t.since.Add(time.Duration(t.last.Load()) + p)
	}
	if age := t.cfg.TunnelMaxAge; age > 0 && (at.IsZero() || t.since.Add(age).Before(at)) {
		at = t.since.Add(age)
	}
	return at
}

// over gives the reason to end now, or "".
func (t *tunnel) over() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch at := t.deadlineLocked(); {
	case at.IsZero() || time.Now().Before(at):
		return ""
	case t.cfg.TunnelMaxAge > 0 && time.Since(t.since) >= t.cfg.TunnelMaxAge:
		return closedAge
	case t.half:
		return closedHalf
	}
	return closedIdle
}

// move is one transfer of bytes from a wire to another.
type move struct {
	dst, src   *wire
	limit      int64         // most bytes to move
	writeLimit time.Duration // for dst to take a piece
	beforeRead func()        // called before each wait for src, to set its deadline
	moved      func()        // called when bytes have moved; may be nil
	readFailed bool          // the error came from src
}

// run moves bytes, what is buffered of src first, until the limit is reached (nil), src ends (io.ErrUnexpectedEOF) or a side
// fails. It returns how many were moved.
func (m *move) run() (n int64, err error) {
	for n < m.limit {
		if data := m.src.unused(); len(data) > 0 {
			data = data[:min(int64(len(data)), m.limit-n)]
			if err := m.dst.write(m.writeLimit, data, nil, nil); err != nil {
				return n, err
			}
			m.src.r += len(data)
			n += int64(len(data))
			m.note()
			continue
		}
		m.src.release()
		if canSplice(m.dst, m.src) {
			more, err := m.splice(m.limit - n)
			return n + more, err
		}
		m.beforeRead()
		if err := m.src.fillIdle(); err != nil {
			m.readFailed = true
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return n, err
		}
	}
	return n, nil
}

func (m *move) note() {
	if m.moved != nil {
		m.moved()
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Answers

// Tokens say why a request failed, in Proxy-Status (RFC 9209, 2.3), in the log and in metrics. tokenClient stands in the
// log alone: nobody is left to be answered.
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

// answer sends the response that a failure maps to (DESIGN: one vocabulary for answer, log and metrics).
func (x *exchange) answer(f *failure) {
	if x.connect || x.reqBody.framing != bodyNone && !x.received.Load() {
		x.keep, x.lingers = false, true // what follows is not a request
	}
	if f.status == 0 {
		x.keep, x.lingers = false, false
		return
	}
	x.status = f.status
	body := "sluice: " + f.text + "\n"
	b := x.appendAnswer(x.in[:0], f.status, "text/plain", len(body))
	b = append(b, "Proxy-Status: "+x.srv.status+f.token+"; details="+sfString(f.text)+"\r\n\r\n"...)
	x.in = b
	if string(x.method) != "HEAD" {
		b = append(b, body...)
		x.respBody.size = int64(len(body))
	}
	if err := x.c.write(x.srv.cfg.BodyTimeout, b, nil, nil); err != nil {
		x.keep = false
	}
}

// appendAnswer begins a response of Sluice's own.
func (x *exchange) appendAnswer(b []byte, status int, mediaType string, length int) []byte {
	b = fmt.Appendf(b, "HTTP/1.1 %d %s\r\nDate: %s\r\nVia: 1.1 %sContent-Type: %s\r\n", status, http.StatusText(status),
		time.Now().UTC().Format(http.TimeFormat), x.srv.hop, mediaType)
	b = appendLength(b, int64(length))
	if !x.keep {
		b = append(b, "Connection: close\r\n"...)
	}
	return b
}

// answerSelf answers OPTIONS and TRACE whose Max-Forwards has run out here (RFC 9110, 7.6.2, 9.3.7, 9.3.8).
func (x *exchange) answerSelf() *failure {
	var echo []byte
	mediaType := "text/plain"
	if string(x.method) == "TRACE" {
		mediaType = "message/http"
		echo = append(append(echo, x.line...), "\r\n"...)
		for i := range x.req.fields {
			if f := &x.req.fields[i]; f.kind < fieldHop && !bytes.EqualFold(x.req.name(f), []byte("Cookie")) && !bytes.EqualFold(x.req.name(f), []byte("Authorization")) {
				echo = append(echo, x.req.raw[f.start:f.end]...)
			}
		}
		echo = append(echo, "\r\n"...)
	}
	if x.reqBody.framing != bodyNone {
		x.keep, x.lingers = false, true
	}
	x.status, x.begun = 200, true
	b := x.appendAnswer(x.in[:0], 200, mediaType, len(echo))
	b = append(append(b, "\r\n"...), echo...)
	x.respBody.size = int64(len(echo))
	if err := x.c.write(x.srv.cfg.BodyTimeout, b, nil, nil); err != nil {
		return x.clientLost(err)
	}
	return nil
}

// sfString writes an RFC 8941 string.
func sfString(s string) string {
	b := []byte{'"'}
	for _, o := range []byte(s) {
		switch {
		case o == '"' || o == '\\':
			b = append(b, '\\', o)
		case o >= 0x20 && o < 0x7f:
			b = append(b, o)
		default:
			b = append(b, '?')
		}
	}
	return string(append(b, '"'))
}

// sfItem writes name as an RFC 8941 token where it can be one, as a string otherwise.
func sfItem(name string) string {
	if c := name[0] | 0x20; c >= 'a' && c <= 'z' && isToken([]byte(name)) {
		return name
	}
	return sfString(name)
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

// maxLogged is the most bytes of a client's text in one field.
const maxLogged = 1024

// logger writes structured records through a queue. Records about traffic are sampled by level before their attributes are
// built; records about the process are not.
type logger struct {
	process *slog.Logger
	handler slog.Handler
	shares  shares
	queue   *logQueue
}

func newLogger(cfg *config, stdout io.Writer) *logger {
	text := cfg.LogFormat == "text"
	f, isFile := stdout.(*os.File)
	if isFile && cfg.LogFormat == "auto" {
		info, err := f.Stat()
		text = err == nil && info.Mode()&os.ModeCharDevice != 0
	}
	encoder := func(w io.Writer) slog.Handler {
		if text {
			return tint.NewHandler(w, &tint.Options{Level: cfg.LogLevel, NoColor: !isFile || os.Getenv("NO_COLOR") != ""})
		}
		return slog.NewJSONHandler(w, &slog.HandlerOptions{Level: cfg.LogLevel})
	}
	l := &logger{shares: cfg.LogSample, queue: &logQueue{out: stdout, room: cfg.LogBuffer, more: make(chan struct{}, 1), done: make(chan struct{})}}
	l.queue.direct = slog.New(encoder(stdout))
	l.handler = encoder(l.queue)
	l.process = slog.New(l.handler)
	go l.queue.drain()
	return l
}

// wants decides whether a record about traffic is written.
func (l *logger) wants(level slog.Level) bool {
	if !l.handler.Enabled(context.Background(), level) {
		return false
	}
	share := l.shares[shareOf(level)]
	return share == 1 || share > 0 && rand.Float64() < share
}

// debug records that a connection opened or closed.
func (l *logger) debug(msg string, client netip.Addr) {
	if l.wants(slog.LevelDebug) {
		l.process.Debug(msg, logClient, client.String())
	}
}

// close writes what waits, for a second at the most.
func (l *logger) close() { l.queue.close(time.Second) }

// record writes the one record of an exchange. What Sluice served or the client gave up is info, what it refused or could
// not do is warn, its own fault is error.
func (x *exchange) record() {
	level, f := slog.LevelInfo, x.failure
	if f != nil && f.token == tokenInternal {
		level = slog.LevelError
	} else if f != nil && f.token != tokenClient {
		level = slog.LevelWarn
	}
	if !x.srv.log.wants(level) {
		return
	}
	msg := "request"
	if x.connect {
		msg = "tunnel"
	}
	r := slog.NewRecord(time.Now(), level, msg, 0)
	r.AddAttrs(slog.String(logClient, x.c.addr.String()))
	if len(x.method) > 0 {
		r.AddAttrs(slog.String(logMethod, clip(x.method)), slog.String(logVersion, "1."+strconv.Itoa(x.req.minor)))
	}
	if len(x.dst.key) > 0 {
		r.AddAttrs(slog.String(logServer, clip(x.dst.host)), slog.Int(logPort, int(x.dst.port)))
	}
	if len(x.dst.key) > 0 && !x.connect {
		path, query, _ := bytes.Cut(x.target, []byte{'?'})
		r.AddAttrs(slog.String(logScheme, "http"), slog.String(logPath, clip(path)))
		if x.srv.cfg.LogQuery && len(query) > 0 {
			r.AddAttrs(slog.String(logQuery, clip(query)))
		}
	}
	if x.peer.IsValid() {
		r.AddAttrs(slog.String(logPeer, x.peer.Addr().String()), slog.Bool(logReused, x.reused))
	}
	if x.status != 0 {
		r.AddAttrs(slog.Int(logStatus, x.status))
	}
	r.AddAttrs(slog.Int64(logUpSize, x.upBytes), slog.Int64(logDownSize, x.respBody.size), slog.Float64(logDuration, milliseconds(time.Since(x.start))))
	if f != nil {
		r.AddAttrs(slog.String(logType, f.token), slog.String(logMessage, f.describe()))
	}
	if x.closed != "" {
		r.AddAttrs(slog.String(logClose, x.closed))
	}
	if x.traced {
		r.AddAttrs(slog.String(logTrace, string(x.trace[:])))
	}
	x.srv.log.handler.Handle(context.Background(), r)
}

func (f *failure) describe() string {
	if f.cause != nil {
		return f.text + ": " + f.cause.Error()
	}
	return f.text
}

func clip(b []byte) string { return string(b[:min(len(b), maxLogged)]) }

func milliseconds(d time.Duration) float64 { return math.Round(d.Seconds()*1e6) / 1e3 }

// logQueue is a bounded queue of encoded records before a writer that may block: a goroutine writes what waits in one piece,
// and a record that finds the queue full is dropped and counted.
type logQueue struct {
	out    io.Writer
	direct *slog.Logger // past the queue
	room   int
	more   chan struct{} // has an element when there is something to write
	done   chan struct{} // closed when everything is written after close

	mu      sync.Mutex
	waiting []byte // guarded by mu
	records int    // waiting or being written; guarded by mu
	dropped int    // since it was last said; guarded by mu
	closed  bool   // guarded by mu
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
	for range q.more {
		q.mu.Lock()
		batch, q.waiting = q.waiting, batch[:0]
		count, closed, dropped := q.records, q.closed, q.dropped
		if dropped > 0 && (closed || time.Since(said) >= time.Second) {
			q.dropped, said = 0, time.Now()
		} else {
			dropped = 0
		}
		q.mu.Unlock()
		q.out.Write(batch) // a stdout that is gone is no reason to stop
		if dropped > 0 {
			q.direct.Warn("log records dropped", "count", dropped)
		}
		q.mu.Lock()
		q.records -= count
		q.mu.Unlock()
		if closed {
			return
		}
	}
}

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
		ErrorLog: slog.NewLogLogger(s.log.handler, slog.LevelDebug)}
}

func (s *server) serveAdmin() {
	if err := s.admin.Serve(s.adminOn); !errors.Is(err, http.ErrServerClosed) {
		s.log.process.Error("admin listener failed", logType, tokenInternal, logMessage, err.Error())
	}
}

// askHealth asks a running Sluice, found by the same environment, whether it is ready.
func askHealth(environ []string) error {
	cfg, err := loadConfig(environ)
	if err != nil {
		return err
	}
	if cfg.Admin == "off" {
		return errors.New("SLUICE_ADMIN is off: there is nobody to ask")
	}
	at, _ := netip.ParseAddrPort(anyHost(cfg.Admin)) // checked by loadConfig
	if at.Addr().IsUnspecified() {
		at = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), at.Port())
	}
	// Not http.DefaultClient: HTTP_PROXY may well point at the proxy that is being asked about.
	client := http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{}}
	resp, err := client.Get("http://" + at.String() + "/readyz")
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
//	sockets                      options for sockets: deadPeer is the time after which a peer that acknowledges nothing is
//	                             given up; listening and dialling are Control functions; close frees what was kept
//	tuneKernel(cfg) []finding    raises RLIMIT_NOFILE, checks (TUNE=apply: writes) sysctls, and lists what falls short
//	openFiles() int              the descriptor limit in force, 0 where there is none
//	watcher, watched             tells hung-up connections: add(&watched, raw, listener) calls listener.hungUp(reset) at most a
//	                             few times, from its own goroutine, until remove; elsewhere it never does
//	isQuiet(raw) bool            whether a connection at rest has neither bytes nor an end to be read; elsewhere always true
//	(*wire).readIdle, fillIdle   fill, but without holding a buffer while waiting; elsewhere with one
//	canSplice(dst, src) bool     whether move.splice can be used; elsewhere never
//	(*move).splice(limit)        moves bytes in the kernel, holding no pipe while waiting for src

// finding is one kernel setting that falls short.
type finding struct{ setting, found, wanted, why, mend string }

// hangupListener is told that its peer closed its sending side; reset: the whole connection.
type hangupListener interface{ hungUp(reset bool) }
