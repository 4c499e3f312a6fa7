// Sluice is a forward HTTP proxy that runs as a sidecar: the one way out of a container, a CI job or an agent's sandbox.
// It is started by environment variables alone, forwards HTTP and CONNECT tunnels, refuses private destinations
// unless told otherwise, and explains every refusal in the answer, in the log and in Proxy-Status with one token.
//
// The life of a connection:
//
//	listener (one per CPU, SO_REUSEPORT) → client policy: address, connection limits → client.serve, one goroutine
//	  → the first bytes tell TLS, HTTP/2 and HTTP/1 apart; a stream of HTTP/2 or 3 comes in as one request of a client of its own
//	  → wait for a request without holding a buffer → read its head → parse it strictly, in place
//	  → admit: credentials, loops, hosts, ports → answer a refusal, or
//	  → forward: a pooled connection, or resolve → judge every address → dial the allowed ones → pool
//	      → write the head re-made from slices of the old one → response head → body moved, not held → log
//	  → CONNECT: resolve, judge, dial → 200 → relay both ways in the kernel → log
//
// Contents, as data flows: Entry · Configuration · Server · Clients · Wires and buffers · Heads · Requests · Policy ·
// Names and dialling · Forwarding · Bodies · Tunnels · Answers · Logs ·
// Platform contract (tune_linux.go, tune_other.go). TLS, HTTP/2, HTTP/3 and UDP tunnels stand in front.go; what is told of it all,
// records, metrics and the admin listener, in observe.go.
//
// What it deliberately does not do: cache, rewrite, intercept TLS, serve files, act as a reverse proxy, take flags.
//
// Invariants:
//
//   - A client connection belongs to the goroutine of client.serve. While it runs, exchange.sendBody owns the client's reading
//     side and the upstream's writing side.
//   - Slices into a wire's buffer are valid until that wire is filled again.
//   - A connection between requests holds no buffer, an idle tunnel neither buffer nor pipe, and neither a goroutine after parkAfter.
//   - The address that policy judged is the address that is dialled.
//   - Every lock is a leaf: none is taken while another is held, but that of a wire's timer under client.mu.
package main

import (
	"bytes"
	"cmp"
	"context"
	crand "crypto/rand"
	"crypto/sha256"
	"embed"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
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

	"github.com/agnivade/levenshtein"
	"github.com/caarlos0/env/v11"
	"github.com/dustin/go-humanize"
	"github.com/gaissmai/bart"
	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/crypto/bcrypt"
	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"
)

// version is set at build time with -ldflags "-X main.version=…".
var version = "dev"

// files are the table of address classes, the status page, and this file: the comments of the config struct are what `sluice env` prints.
//
//go:embed addresses.txt proxy.go status.html
var files embed.FS

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
	if _, bad := errors.AsType[configErrors](err); bad {
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
	case "tune":
		return printTune(environ, stdout, stderr)
	case "logs":
		return exitStatus(printLogs(os.Stdin, stdout), stderr)
	}
	fmt.Fprintf(stderr, "sluice: no command %q; without one it serves, and there are: health, env, tune, logs, version\n", args[0])
	return 2
}

// run serves until ctx is done, then drains. Its error is a configErrors for a bad environment. Logs go to stdout.
func run(ctx context.Context, environ []string, stdout io.Writer) error {
	cfg, vars, err := loadConfig(environ)
	if err != nil {
		return err
	}
	log := newLogger(cfg, stdout)
	defer log.close(time.Second)
	findings := tuneKernel(cfg, log.process) // first: limits are made from descriptors and memory, and the backlog from somaxconn
	s, err := newServer(cfg, log)
	if err != nil {
		return err
	}
	defer s.close()
	s.vars, s.findings = vars, findings
	ctx, s.stop = context.WithCancel(ctx)
	if err := s.listen(ctx); err != nil {
		return err
	}
	<-ctx.Done()
	s.drain()
	return nil
}

// ---------------------------------------------------------------------------------------------------------------------
// Configuration

const envPrefix = "SLUICE_"

// config is what the environment sets, a variable a line. The comments are the manual: `sluice env` and the README print them.
type config struct {
	Listen                 list          `env:"LISTEN" envDefault:"127.0.0.1:3128"`          // Addresses to serve on; an empty host means every interface. The image sets `:3128`.
	Listeners              int           `env:"LISTENERS" envDefault:"0"`                    // SO_REUSEPORT listeners per address; 0 = one per usable CPU.
	Admin                  string        `env:"ADMIN" envDefault:"127.0.0.1:3129"`           // Address of the status page, `/metrics`, `/healthz`, `/readyz`, `/debug/pprof/` and `POST /drain`; `off` = none.
	Name                   string        `env:"NAME"`                                        // This hop's name in Via and Proxy-Status; a request that carries it in Via has come back and is refused. The default is the host name.
	TLSCert                string        `env:"TLS_CERT"`                                    // Certificate chain, PEM: TLS is then accepted on SLUICE_LISTEN, too. A file (SLUICE_TLS_CERT_FILE) is read again when it changes.
	TLSKey                 string        `env:"TLS_KEY"`                                     // Its private key, PEM.
	TLSClientCA            string        `env:"TLS_CLIENT_CA"`                               // Certificates, PEM: clients must come over TLS, with a certificate that one of these has signed; its name is `user.name` in logs.
	HTTP2                  bool          `env:"HTTP2" envDefault:"true"`                     // Offer HTTP/2 to clients, over TLS and in plain (prior knowledge).
	HTTP3                  bool          `env:"HTTP3" envDefault:"false"`                    // Offer HTTP/3 to clients, on the UDP ports of SLUICE_LISTEN; it needs a certificate.
	AllowClients           prefixes      `env:"ALLOW_CLIENTS" envDefault:"loopback,private"` // Who may connect: CIDRs, addresses, `loopback`, `private`, `all`.
	Users                  users         `env:"USERS"`                                       // `name:password` or `name:bcrypt-hash`, separated by commas or lines: require Basic proxy authentication.
	Mode                   string        `env:"MODE" envDefault:"enforce"`                   // `enforce`; `audit` lets pass what SLUICE_ALLOW_HOSTS, SLUICE_DENY_HOSTS and SLUICE_ALLOW_PORTS would deny, and logs it.
	AllowHosts             hostRules     `env:"ALLOW_HOSTS"`                                 // Destinations: `example.com` that name, `*.example.com` names below it, `.example.com` both, an IP, a CIDR, each with an optional `:port`. By default every host.
	DenyHosts              hostRules     `env:"DENY_HOSTS"`                                  // Destinations that are denied, in the same grammar; wins over SLUICE_ALLOW_HOSTS. IPs and CIDRs also stand for the names that resolve to them.
	AllowPorts             portSet       `env:"ALLOW_PORTS" envDefault:"80,443"`             // Destination ports and ranges, as in `80,443,8000-8099`; `*` = all.
	AllowPrivateHosts      hostRules     `env:"ALLOW_PRIVATE_HOSTS"`                         // Names that may resolve to addresses that are not public (compose service names), in the grammar of SLUICE_ALLOW_HOSTS: to private, unique-local, shared, site-local, loopback, documentation and benchmarking ones. Others, such as link-local, need SLUICE_ALLOW_CIDRS.
	AllowCIDRs             prefixes      `env:"ALLOW_CIDRS"`                                 // Addresses allowed although they are not public, as in `10.20.0.0/16,127.0.0.1`.
	DenyCIDRs              prefixes      `env:"DENY_CIDRS"`                                  // Addresses denied although they are public; wins over SLUICE_ALLOW_CIDRS and SLUICE_ALLOW_PRIVATE_HOSTS.
	MaxConns               int           `env:"MAX_CONNS" envDefault:"0"`                    // Client connections; the newest above that get a 503. 0 = from the descriptor limit (two for each, and a reserve) and the memory limit.
	MaxConnsPerClient      int           `env:"MAX_CONNS_PER_CLIENT" envDefault:"0"`         // Connections per client address (IPv6: per /64); 0 = no limit.
	MaxTunnels             int           `env:"MAX_TUNNELS" envDefault:"0"`                  // Open tunnels, WebSockets among them; 0 = no limit of its own.
	Rate                   int           `env:"RATE" envDefault:"0"`                         // Requests per second and client address (IPv6: per /64), tunnels among them; those above get a 429 with Retry-After. 0 = any number.
	RateBurst              int           `env:"RATE_BURST" envDefault:"0"`                   // Requests that an address may make at once after a pause; 0 = 2 × SLUICE_RATE.
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
	DrainTimeout           time.Duration `env:"DRAIN_TIMEOUT" envDefault:"8s"`               // From SIGTERM to the end; `docker stop` kills after 10s. 0 = until the last request and tunnel has ended.
	PoolIdle               int           `env:"POOL_IDLE" envDefault:"1024"`                 // Idle upstream connections kept in all; 0 = none.
	PoolIdlePerHost        int           `env:"POOL_IDLE_PER_HOST" envDefault:"128"`         // Idle upstream connections kept per host and port; 0 = none.
	PoolIdleTimeout        time.Duration `env:"POOL_IDLE_TIMEOUT" envDefault:"30s"`          // How long an idle upstream connection is kept.
	MaxConnsPerHost        int           `env:"MAX_CONNS_PER_HOST" envDefault:"0"`           // Connections to one origin, by host and port, idle and tunnels' among them; a request that needs one more gets a 503. 0 = no limit.
	DNSCacheTTL            time.Duration `env:"DNS_CACHE_TTL" envDefault:"5s"`               // How long a DNS answer is reused; 0 = not at all.
	DNSStale               time.Duration `env:"DNS_STALE" envDefault:"5m"`                   // How long an answer may still serve when its refresh fails; 0 = not at all.
	DNSTimeout             time.Duration `env:"DNS_TIMEOUT" envDefault:"5s"`                 // One lookup.
	DNSServers             list          `env:"DNS_SERVERS"`                                 // Resolvers, `host:port` with an IP address as host; by default the system's.
	LogLevel               slog.Level    `env:"LOG_LEVEL" envDefault:"info"`                 // Least level that is logged: `debug`, `info`, `warn`, `error`.
	LogFormat              string        `env:"LOG_FORMAT" envDefault:"auto"`                // `json`; `cbor` (a sequence of maps, which `sluice logs` turns into lines of JSON); `text` (for people); `auto` = text on a terminal, else json.
	LogSample              shares        `env:"LOG_SAMPLE"`                                  // Share of connection, request and tunnel records kept per level, as in `debug=0.01,info=0.1`; levels not named are kept. Records about the process itself are never sampled.
	LogBuffer              int           `env:"LOG_BUFFER" envDefault:"8192"`                // Records waiting to be written, 512 bytes of each on average, but 1 MiB in all at least and a sixteenth of SLUICE_MEMORY_LIMIT at most; when full, new ones are dropped and counted, never waited for.
	LogQuery               bool          `env:"LOG_QUERY" envDefault:"false"`                // Log query strings, in `url.query`. User info and credentials are never logged.
	Tune                   string        `env:"TUNE" envDefault:"check"`                     // Kernel settings: `check` warns of those that fall short, `apply` first writes those of the network namespace that are not as wanted, where it may; `off`.
	MemoryLimit            size          `env:"MEMORY_LIMIT" envDefault:"0"`                 // Soft limit of the heap; 0 = 90% of the cgroup's, if it has one, but at least 24 MiB less than that. GOMEMLIMIT, where it is set, wins.
	NOFILE                 int           `env:"NOFILE" envDefault:"0"`                       // Descriptor limit to ask for, beyond the hard limit where CAP_SYS_RESOURCE allows it; 0 = the hard limit, at most 1,048,576 or what SLUICE_MAX_CONNS needs.
}

// variable describes one field of config: its name without the prefix, the texts of its default and its value, where that came
// from (`default`, `environment`, `host name` or the path of a file), and its manual.
type variable struct{ field, name, def, value, origin, doc string }

// shown is the value as it may be told: one line, and not if it holds secrets.
func (v *variable) shown() string {
	if (v.name == "USERS" || v.name == "TLS_KEY") && v.value != "" {
		return "(redacted)"
	} else if strings.HasPrefix(v.value, "-----BEGIN ") {
		return "(PEM)"
	}
	return strings.Join(strings.Fields(v.value), " ")
}

// configErrors is every fault of an environment, one a line: variable, value and reason.
type configErrors []string

func (e configErrors) Error() string {
	return "the environment cannot be used:\n  " + strings.Join(e, "\n  ")
}

// loadConfig reads environ ("NAME=value"), and says where each value came from. Its error is a configErrors with every fault.
func loadConfig(environ []string) (*config, []variable, error) {
	cfg, vars := &config{}, variables()
	values, bad := gather(environ, vars)
	demand := func(ok bool, name, reason string) { // names a variable or its field; complains once of each
		v := vars[slices.IndexFunc(vars, func(v variable) bool { return v.name == name || v.field == name })]
		line := fmt.Sprintf("%s%s=%q: ", envPrefix, v.name, v.shown())
		if !ok && !slices.ContainsFunc(bad, func(b string) bool { return strings.HasPrefix(b, line) }) {
			bad = append(bad, line+reason)
		}
	}
	err := env.ParseWithOptions(cfg, env.Options{Prefix: envPrefix, Environment: values})
	all, _ := errors.AsType[env.AggregateError](err)
	for _, err := range all.Errors {
		pe, _ := errors.AsType[env.ParseError](err) // nothing else comes, unless config's tags are wrong
		demand(false, pe.Name, pe.Err.Error())
	}
	if cfg.check(demand); len(bad) > 0 {
		return nil, nil, bad
	}
	return cfg, vars, nil
}

// variables lists the fields of config in order, with the comments that stand behind them in the source.
func variables() (vars []variable) {
	line := regexp.MustCompile(`(?m)^\t(\w+) .*\x60env:"(\w+)"(?: envDefault:"(.*?)")?\x60(?: *// (.*))?$`) // \x60 is a backquote
	source, _ := files.ReadFile("proxy.go")
	for _, m := range line.FindAllStringSubmatch(string(source), -1) {
		vars = append(vars, variable{field: m[1], name: m[2], def: m[3], doc: m[4]})
	}
	return vars
}

// gather gives vars their values, from environ or from files. An empty one counts as unset: compose's `${X:-}`.
func gather(environ []string, vars []variable) (values map[string]string, bad configErrors) {
	given, values := env.ToMap(environ), map[string]string{}
	// Orchestrators inject these for services named sluice, and sluice-metrics, say. SLUICE_ALLOW_PORT=443 is none of them, but a mistake.
	links := regexp.MustCompile(`^SLUICE_(.+_)?(SERVICE_HOST=|SERVICE_PORT[_=]|PORT=(tcp|udp|sctp)://|PORT_\d+_(TCP|UDP|SCTP)[_=])|^SLUICE_PORT[_=]`)
	maps.DeleteFunc(given, func(key, value string) bool {
		return !strings.HasPrefix(key, envPrefix) || links.MatchString(key+"="+value)
	})
	for i := range vars {
		v, key := &vars[i], envPrefix+vars[i].name
		path := given[key+"_FILE"]
		v.value, v.origin = given[key], "environment"
		delete(given, key)
		delete(given, key+"_FILE")
		if v.value != "" && path != "" {
			bad = append(bad, fmt.Sprintf("%s: given twice, directly and as %s_FILE", key, key))
		} else if path != "" {
			text, err := os.ReadFile(path)
			if pe, _ := errors.AsType[*os.PathError](err); pe != nil {
				err = pe.Err // without the path, which may be a secret in the wrong place
			} else if len(bytes.TrimSpace(text)) == 0 && slices.Contains([]string{"USERS", "ALLOW_HOSTS", "TLS_CERT", "TLS_KEY", "TLS_CLIENT_CA"}, v.name) {
				err = errors.New("is empty, which must not mean that there is no restriction")
			}
			if v.value = path; err != nil {
				bad = append(bad, fmt.Sprintf("%s_FILE=%q: %v", key, v.shown(), err))
			}
			v.value, v.origin = strings.TrimSpace(string(text)), path
		}
		if v.value == "" {
			v.value, v.origin = v.def, "default"
		}
		if v.value == "" && v.name == "NAME" {
			v.value, v.origin = "sluice", "fallback"
			if name, _ := os.Hostname(); isToken([]byte(name)) {
				v.value, v.origin = name, "host name"
			}
		}
		values[key] = v.value
	}
	for key := range given {
		bad = append(bad, fmt.Sprintf("%s: unknown variable; the nearest is %s", key, nearest(key, vars)))
	}
	return values, bad
}

// nearest names the variable that the fewest edits of key lead to.
func nearest(key string, vars []variable) string {
	edits := func(v variable) int { return levenshtein.ComputeDistance(key, envPrefix+v.name) }
	return envPrefix + slices.MinFunc(vars, func(a, b variable) int { return edits(a) - edits(b) }).name
}

// check demands what the types of the fields cannot.
func (c *config) check(demand func(ok bool, name, reason string)) {
	for f, v := range reflect.ValueOf(c).Elem().Fields() {
		demand(!v.CanInt() || v.Int() >= 0 || f.Name == "LogLevel", f.Tag.Get("env"), "must not be negative")
	}
	demand(len(c.Listen) > 0, "LISTEN", "names no address")
	for _, a := range c.Listen {
		demand(isAddress(a, 0), "LISTEN", fmt.Sprintf("%q is not an IP address and a port, as in 127.0.0.1:3128 or :3128", a))
	}
	for _, a := range c.DNSServers {
		demand(isAddress(a, 1), "DNS_SERVERS", fmt.Sprintf("%q is not an IP address and a port, as in 10.0.0.2:53", a))
	}
	demand(c.Admin == "off" || isAddress(c.Admin, 0), "ADMIN", "is neither an IP address and a port nor off")
	demand(isToken([]byte(c.Name)), "NAME", "may hold letters, digits and !#$%&'*+-.^_`|~ only (RFC 9110, Via pseudonym)")
	_, err := newTLS(c.pem())
	demand(err == nil, "TLS_CERT", fmt.Sprint(err))
	demand(!c.HTTP3 || c.TLSCert != "", "HTTP3", "needs SLUICE_TLS_CERT and SLUICE_TLS_KEY")
	demand(c.MaxHeader >= 1024 && c.MaxHeader <= 16<<20, "MAX_HEADER", "must be between 1KiB and 16MiB")
	demand(hasName(c.LogLevel), "LOG_LEVEL", "is none of debug, info, warn, error")
	demand(c.LogBuffer > 0, "LOG_BUFFER", "must be at least 1")
	demand(slices.Contains([]string{"auto", "json", "text", "cbor"}, c.LogFormat), "LOG_FORMAT", "is none of json, text, cbor, auto")
	demand(slices.Contains([]string{"enforce", "audit"}, c.Mode), "MODE", "is neither enforce nor audit")
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
		fmt.Fprintf(t, "%s%s\t%s\t%s\t%s\t%s\n", envPrefix, v.name, v.def, v.shown(), v.origin, v.doc)
	}
	return t.Flush()
}

// list is a list of texts.
type list []string

func (l *list) UnmarshalText(text []byte) error {
	return each(text, "", func(item string) bool { *l = append(*l, item); return true })
}

// each has add take the items of a list, split at commas and white space. The error for one that it refuses is made by format.
func each(text []byte, format string, add func(item string) bool) error {
	for item := range strings.FieldsFuncSeq(string(text), func(r rune) bool { return strings.ContainsRune(", \t\r\n", r) }) {
		if !add(item) {
			return fmt.Errorf(format, item)
		}
	}
	return nil
}

// size is a number of bytes: 65536, 64KiB, 10MB.
type size int64

func (s *size) UnmarshalText(text []byte) error {
	n, err := humanize.ParseBytes(string(text))
	if err != nil || n > math.MaxInt64 {
		return errors.New("is not a size, as in 65536, 64KiB or 10MB")
	}
	*s = size(n)
	return nil
}

// portSet is a set of TCP ports: ranges, with their ends.
type portSet [][2]uint64

func (p portSet) has(port uint16) bool {
	return slices.ContainsFunc(p, func(r [2]uint64) bool { return r[0] <= uint64(port) && uint64(port) <= r[1] })
}

func (p *portSet) UnmarshalText(text []byte) error {
	return each(text, "%q is not a port or range within 1-65535", func(item string) bool {
		from, to, ranged := strings.Cut(item, "-")
		if item == "*" {
			from, to = "1", "65535"
		} else if !ranged {
			to = from
		}
		low, _ := strconv.ParseUint(from, 10, 64) // an error gives 0 or too much
		high, _ := strconv.ParseUint(to, 10, 64)
		*p = append(*p, [2]uint64{low, high})
		return 0 < low && low <= high && high <= 65535
	})
}

// prefixes is a set of address blocks, each with what it was called; a bare address is a block of one, and some sets have a name.
type prefixes struct{ bart.Table[string] }

func (p *prefixes) UnmarshalText(text []byte) error {
	sets := map[string]string{"all": "0.0.0.0/0 ::/0", "loopback": "127.0.0.0/8 ::1", "private": "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7"}
	return each(text, "%q is not an address, a CIDR, loopback, private or all", func(item string) (ok bool) {
		for text := range strings.FieldsSeq(cmp.Or(sets[item], item)) {
			var block netip.Prefix
			if block, ok = parsePrefix(text); ok {
				p.Insert(block, item)
			}
		}
		return ok
	})
}

// find gives what the smallest block that a is in was called, "" if a is in none.
func (p *prefixes) find(a netip.Addr) string {
	name, _ := p.Lookup(a)
	return name
}

func parsePrefix(text string) (netip.Prefix, bool) {
	if a, err := netip.ParseAddr(text); err == nil && a.Zone() == "" {
		return netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()), true
	}
	block, err := netip.ParsePrefix(text)
	return block.Masked(), err == nil && !block.Addr().Is4In6()
}

// hasName reports whether level is one of the four that records have.
func hasName(level slog.Level) bool { return level == slog.Level(4*rank(level)-4) }

// shares is the share of records kept per level; levels that are not named are kept.
type shares map[slog.Level]float64

func (s *shares) UnmarshalText(text []byte) error {
	*s = shares{}
	return each(text, "%q is not level=share with a share from 0 to 1, as in info=0.1", func(item string) bool {
		name, value, _ := strings.Cut(item, "=")
		var level slog.Level
		share, err := strconv.ParseFloat(value, 64)
		ok := level.UnmarshalText([]byte(name)) == nil && hasName(level) && err == nil && share >= 0 && share <= 1
		(*s)[level] = share
		return ok
	})
}

// hostRules are rules for destinations by name, address and port, as they were written. Port 0 stands for every port.
type hostRules struct {
	names map[hostPort]string // host "example.com": that name; ".example.com": the names below it
	nets  bart.Table[map[uint16]string]
}

type hostPort struct {
	host string
	port uint16
}

func (r *hostRules) UnmarshalText(text []byte) error {
	*r = hostRules{names: map[hostPort]string{}}
	return each(text, "rule %q is not a name (ASCII: xn--…), *.name, .name, address or CIDR, with or without :port", r.add)
}

// add takes one rule. An IPv6 address or CIDR that has a port stands in brackets.
func (r *hostRules) add(text string) bool {
	host, port := strings.ToLower(text), uint16(0)
	_, bare := parsePrefix(host) // an IPv6 address has colons, but no port
	if i := strings.LastIndexByte(host, ':'); i > strings.LastIndexByte(host, ']') && !bare {
		if port = uint16(max(0, parseDecimal([]byte(host[i+1:]), 65535))); port == 0 {
			return false
		}
		host = host[:i]
	}
	bracketed := strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]")
	if bracketed {
		host = host[1 : len(host)-1]
	}
	if block, ok := parsePrefix(host); ok && (bracketed || bare || block.Addr().Is4()) {
		rules, known := r.nets.Get(block)
		if !known {
			rules = map[uint16]string{}
			r.nets.Insert(block, rules)
		}
		rules[port] = text
		return !bracketed || block.Addr().Is6()
	}
	key, below := strings.CutPrefix(strings.TrimSuffix(host, "."), "*") // "*.x" and ".x" have the same key
	name, dotted := strings.CutPrefix(key, ".")
	r.names[hostPort{key, port}] = text
	if dotted && !below {
		r.names[hostPort{name, port}] = text
	}
	ip, valid := parseHost([]byte(name))
	return valid && !ip.IsValid() && !strings.HasSuffix(name, ".") && all([]byte(text), targetOctet) && !bracketed && (dotted || !below)
}

// match gives the rule that covers host (lower case, no trailing dot; may be nil) or ip (may be invalid), and port, "" if none does.
// It takes a look-up per label of a name, and one for an address.
func (r *hostRules) match(host []byte, ip netip.Addr, port uint16) string {
	for _, rules := range r.nets.Supernets(netip.PrefixFrom(ip, ip.BitLen())) { // the smallest block first
		if rule := cmp.Or(rules[port], rules[0]); rule != "" {
			return rule
		}
	}
	for i := range host { // the name, and ".above" for each that it is below
		if i == 0 || host[i] == '.' {
			if rule := cmp.Or(r.names[hostPort{string(host[i:]), port}], r.names[hostPort{string(host[i:]), 0}]); rule != "" {
				return rule
			}
		}
	}
	return ""
}

// users are the passwords or bcrypt hashes of those who may use the proxy, by name.
type users map[string]string

func (u *users) UnmarshalText(text []byte) error {
	*u = users{}
	for item := range strings.FieldsFuncSeq(string(text), func(r rune) bool { return strings.ContainsRune(",\r\n", r) }) {
		name, secret, _ := strings.Cut(strings.TrimSpace(item), ":")
		cost, err := bcrypt.Cost([]byte(secret))
		foreign := err != nil && (strings.HasPrefix(secret, "$") || strings.HasPrefix(secret, "{")) // as htpasswd makes by default
		if _, twice := (*u)[name]; name == "" || secret == "" || twice || foreign || cost > 14 {
			return fmt.Errorf("entry %d is not name:password or name:bcrypt-hash of cost 4 to 14, or its name stands twice", len(*u)+1) // no word of a secret
		}
		(*u)[name] = secret
	}
	if len(*u) == 0 {
		return errors.New("names nobody")
	}
	return nil
}

// ---------------------------------------------------------------------------------------------------------------------
// Server

// server is one running proxy.
type server struct {
	cfg       *config
	log       *logger
	metrics   *telemetry
	buffers   sync.Pool // of *[bufferSize]byte
	exchanges sync.Pool // of *exchange
	names     *resolver
	pool      *pool
	watcher   *watcher
	sockets   sockets
	gate      *gatekeeper
	hop       []byte // "NAME\r\n", the end of the Via field that this hop adds

	listeners []*listener
	own       []netip.AddrPort // where this process listens, the admin listener included
	admin     *http.Server
	front     front           // what speaks TLS, HTTP/2 and HTTP/3 to clients
	stop      func()          // begins the drain, as SIGTERM does
	life      context.Context // ends in close, by end
	end       func()
	started   time.Time
	vars      []variable // the configuration in force
	findings  []finding  // what was found of the kernel's settings
	backlog   int        // of each listener, 0 where it is not known
	limits    limits
	accepts   atomic.Bool  // connections
	draining  atomic.Bool  // since SIGTERM
	closing   atomic.Bool  // since the drain's grace is over
	panics    atomic.Int64 // so far
	reached   contacts     // destinations that were connected to
	doubtful  contacts     // those that only MODE=audit lets through
	clients   sync.Map     // of *client, while they are open

	accepting, serving, behind sync.WaitGroup // accept loops; client connections; watcher and admin
}

func newServer(cfg *config, log *logger) (s *server, err error) {
	s = &server{cfg: cfg, log: log, metrics: newTelemetry(), started: time.Now(), reached: contacts{keys: map[string]*atomic.Int64{}},
		doubtful: contacts{keys: map[string]*atomic.Int64{}, all: true},
		pool:     newPool(cfg), gate: newGatekeeper(cfg.Users), hop: []byte(cfg.Name + "\r\n")}
	s.life, s.end = context.WithCancel(context.Background())
	s.names, s.admin = &resolver{cfg: cfg, metrics: s.metrics}, newAdmin(s)
	s.names.answers, _ = lru.New[string, dnsAnswer](4096) // fails on sizes below 1 only
	s.limits.conns.most, s.limits.clients.most = cmp.Or(cfg.MaxConns, connLimit()), cfg.MaxConnsPerClient
	s.limits.tunnels.most, s.limits.hosts.most, s.limits.most = cfg.MaxTunnels, cfg.MaxConnsPerHost, int64(connLimit())
	s.limits.mostLarge = max(1, debug.SetMemoryLimit(-1)/8/int64(cfg.MaxHeader))
	log.bound(debug.SetMemoryLimit(-1) / 16)
	s.limits.rates = rates{limit: rate.Limit(cfg.Rate), burst: cmp.Or(cfg.RateBurst, 2*cfg.Rate)}
	s.limits.rates.buckets, _ = lru.New[netip.Addr, *rate.Limiter](1 << 14) // of 200 bytes each
	s.buffers.New = func() any { return new([bufferSize]byte) }
	s.exchanges.New = func() any {
		x := &exchange{summary: summary{srv: s}}
		x.awaitClient, x.awaitOrigin = x.armClient, x.armOrigin
		return x
	}
	s.metrics.watch(s)
	s.watcher, err = newWatcher()
	return s, err
}

// listen opens the admin listener and, per address and CPU, a client listener: the kernel spreads connections over them. It begins to
// accept when all are open, and says what is in force.
func (s *server) listen(ctx context.Context) error {
	for _, addr := range s.cfg.Listen {
		if err := s.openListeners(ctx, addr); err != nil {
			return err
		}
		s.own = append(s.own, addrPort(s.listeners[len(s.listeners)-1].Addr()))
	}
	if err := s.openFront(ctx); err != nil {
		return err
	}
	if s.cfg.Admin != "off" {
		l, err := net.Listen("tcp", s.cfg.Admin)
		if err != nil {
			return fmt.Errorf("SLUICE_ADMIN: %w", err)
		}
		s.own, s.cfg.Admin = append(s.own, addrPort(l.Addr())), l.Addr().String()
		s.run(&s.behind, func() {
			if err := s.admin.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				s.log.process.Error("admin listener failed", logType, tokenInternal, logMessage, err.Error())
			}
		})
	}
	s.run(&s.behind, s.watcher.run)
	s.run(&s.behind, func() { s.watchMemory(s.life) }) // during the drain, too
	s.run(&s.behind, func() { s.metrics.remember(s.life) })
	for _, l := range s.listeners {
		s.run(&s.accepting, func() { s.accept(ctx, l) })
	}
	s.accepts.Store(true)
	s.log.process.Info("listening", "version", version, "addresses", s.own[:len(s.cfg.Listen)], "listeners", len(s.listeners), "backlog", s.backlog,
		"admin", s.cfg.Admin, "name", s.cfg.Name, "mode", s.cfg.Mode, "users", len(s.cfg.Users), "cpus", runtime.GOMAXPROCS(0), "nofile", openFiles(),
		"max_conns", s.limits.conns.most, "memory_limit", debug.SetMemoryLimit(-1), "max_header", int64(s.cfg.MaxHeader), "pool_idle", s.cfg.PoolIdle, "drain_timeout", s.cfg.DrainTimeout.String())
	return nil
}

// run runs f in a goroutine of group. A panic of it ends the process, but not before the log is written.
func (s *server) run(group *sync.WaitGroup, f func()) {
	group.Go(func() { defer s.log.lastWords(); f() })
}

// drain stops accepting, closes connections that stay idle for the grace, lets what runs finish, and cuts what is left when
// DRAIN_TIMEOUT is over.
func (s *server) drain() {
	begun, cut, ended := time.Now(), atomic.Int64{}, make(chan struct{})
	s.draining.Store(true)
	s.log.process.Info("draining", "timeout", s.cfg.DrainTimeout.String())
	overtime := time.AfterFunc(cmp.Or(s.cfg.DrainTimeout, never), func() { // 0 = never
		for c := range s.clients.Range {
			cut.Add(1)
			go c.(*client).sever("drain") // closing waits for what is computed for the client, such as a hash
		}
	})
	s.accepting.Wait()
	s.behind.Go(func() { s.serving.Wait(); close(ended) })
	select {
	case <-ended:
	case <-time.After(min(time.Second, cmp.Or(s.cfg.DrainTimeout, never)/8)): // the grace: a request that is on its way would be lost
	}
	s.closing.Store(true)
	for c := range s.clients.Range {
		c.(*client).closeIdle()
	}
	s.front.drain()
	<-ended
	overtime.Stop()
	s.reached.list(s.log.process)
	s.log.process.Info("stopped", "cut", cut.Load(), "panics", s.panics.Load(), logDuration, milliseconds(time.Since(begun)))
}

// close ends everything but client connections.
func (s *server) close() {
	for _, l := range s.listeners {
		l.Close()
	}
	s.end()
	s.admin.Close()
	s.front.close()
	s.watcher.close()
	s.pool.close()
	s.behind.Wait()
	s.sockets.close()
}

// isOwn reports whether ap is where this process listens: a connection there would come back to it.
func (s *server) isOwn(ap netip.AddrPort) bool {
	ap = netip.AddrPortFrom(ap.Addr().WithZone(""), ap.Port())
	isLocal := func(a netip.Addr) bool { // of this host; asked about ports that Sluice listens on alone, so it may be slow
		addrs, _ := net.InterfaceAddrs()
		return a.IsLoopback() || slices.ContainsFunc(addrs, func(i net.Addr) bool { return strings.HasPrefix(i.String(), a.String()+"/") })
	}
	return slices.ContainsFunc(s.own, func(o netip.AddrPort) bool {
		return o.Port() == ap.Port() && (o.Addr() == ap.Addr() || ap.Addr().IsUnspecified() || o.Addr().IsUnspecified() && isLocal(ap.Addr()))
	})
}

func addrPort(a net.Addr) netip.AddrPort {
	return netip.AddrPortFrom(a.(*net.TCPAddr).AddrPort().Addr().Unmap(), a.(*net.TCPAddr).AddrPort().Port())
}

// ---------------------------------------------------------------------------------------------------------------------
// Clients

// client is one client connection and what others need to know of the exchange it is in.
type client struct {
	wire
	addr     netip.Addr
	site     netip.Addr // that limits go by
	counted  bool       // among limits.conns and limits.clients
	watch    watched
	idle     atomic.Bool  // between requests
	shut     atomic.Bool  // by closeIdle: what looks like a hang-up is none
	now      time.Time    // when the last request ended
	left     *exchange    // a request that await has read and left
	under    *exchange    // the request under way
	over     bool         // no further request is served
	detached bool         // a tunnel has taken over
	held     atomic.Int32 // by the connection, and by each of its streams
	lingers  bool         // the end is made with care, since unread bytes are about
	broken   bool         // the last response has not come to its end
	settled  bool         // it speaks HTTP/1
	carries  bool         // streams; is among limits.carriers
	conn     *client      // carries this one, a stream of HTTP/2 or 3; nil = this is a connection
	name     string       // in its certificate
	proven   bool         // it came over TLS, with the certificate that SLUICE_TLS_CLIENT_CA may ask for
	rejected bool         // is answered before it sent a request
	luck     float64      // decides with LOG_SAMPLE whether it is told of

	mu       sync.Mutex // guards what follows
	gone     bool       // has hung up
	grace    bool       // abandonUnlessReading is to run
	acked    uint64     // bytesAcked when that was decided
	severed  bool       // the drain has cut it
	parked   bool       // no goroutine serves it
	upstream *upstream  // carries this client's request
	tunnel   relayer    // has taken over, and sees hang-ups itself
	giveUp   func()     // ends the lookup or dial under way
	failed   *failure   // why the upstream connection was closed: the client left, or its body could not be sent on
}

// newClient takes a connection in; a failure says why it is not to be served.
func (s *server) newClient(conn stream, addr netip.Addr) (c *client, f *failure) {
	s.serving.Add(1)
	s.metrics.accepted.Inc()
	s.metrics.clients.Add(1)
	c = &client{addr: addr, luck: s.cfg.luck()}
	c.held.Store(1)
	c.attach(s, conn)
	s.clients.Store(c, nil)
	s.log.debug("client connected", c)
	return c, c.enter()
}

// shed answers a connection without reading from it, and ends it a little later, so that the reset that unread bytes cause does not
// destroy the answer. Nothing waits for that but a timer; more than 256 do not, but end at once.
func (c *client) shed(f *failure, wait time.Duration) {
	c.rejected = true
	c.newExchange().conclude(f)
	c.tcp.CloseWrite()
	if c.srv.limits.shedding.Add(1) > 256 {
		wait = 0
	}
	time.AfterFunc(wait, func() { c.srv.limits.shedding.Add(-1); c.end() })
}

// serve answers a client's requests, one after the other, until the connection ends, or is idle for so long that it is parked.
func (c *client) serve() {
	var parked bool
	defer c.leave(&parked)
	c.srv.watcher.add(&c.watch, c.raw, c)
	for more := true; more && !c.over; {
		if more, parked = c.await(); !more {
			break
		}
		if !c.settled && !c.settle() {
			break
		} else if c.coded && c.buffered() == 0 {
			continue // the handshake brought no request yet
		}
		x := c.left
		if c.left = nil; x == nil {
			x = c.newExchange()
			x.failure = x.readRequest()
		}
		c.finish(x)
	}
	if !parked && c.lingers {
		c.linger()
	} else if !parked && c.coded && !c.detached && !c.broken {
		c.tcp.CloseWrite() // TLS tells of the end
	}
}

func (c *client) newExchange() *exchange {
	c.under = c.srv.exchanges.Get().(*exchange)
	c.under.begin(c)
	return c.under
}

// finish serves a request that was read.
func (c *client) finish(x *exchange) {
	if x.serve(); c.detached {
		return
	}
	c.over, c.broken, c.lingers = !x.keep, x.broken, x.lingers && !x.truncated
	c.now, c.under = x.end, nil
	c.srv.exchanges.Put(x)
}

// leave is the end of serve, also after a panic, which ends this connection alone.
func (c *client) leave(parked *bool) {
	if *parked { // another goroutine may serve it by now
		return
	}
	if p := recover(); p != nil {
		c.srv.logPanic(p)
		x := c.under
		if x != nil && !c.detached {
			x.keep = false
			x.conclude(fail(500, tokenInternal, "a fault of the proxy's own"))
		}
		if c.sever("drain"); x != nil && !c.detached {
			x.abort()
		}
	}
	if !c.detached {
		c.end()
	}
}

// abort frees what a request held when it came to its panic, and the connection was closed.
func (x *exchange) abort() {
	if x.inTunnels {
		x.srv.limits.tunnels.add(struct{}{}, -1)
	}
	if x.uploaded != nil {
		<-x.uploaded
	}
	if up := x.c.upstream; up != nil {
		up.close()
	}
}

func (s *server) logPanic(p any) {
	s.panics.Add(1)
	s.log.process.Error("panic", logType, tokenInternal, logMessage, fmt.Sprint(p), "stack", string(debug.Stack()))
}

// end frees what the connection holds.
func (c *client) end() {
	if c.conn != nil { // a stream
		c.drop()
		return
	}
	c.srv.watcher.remove(&c.watch)
	if c.counted { // before the client can tell: it may come again at once
		c.srv.limits.conns.add(struct{}{}, -1)
		c.srv.limits.clients.add(c.site, -1)
	}
	if c.carries {
		c.srv.limits.carriers.Add(-1)
	}
	c.tcp.Close()
	c.drop()
	c.srv.clients.Delete(c)
	c.srv.metrics.clients.Add(-1)
	c.srv.log.debug("client closed", c)
	c.release()
}

// closeIdle ends the wait of a connection that is between requests.
func (c *client) closeIdle() {
	if c.idle.CompareAndSwap(true, false) && !c.shut.Swap(true) { // once: the watcher sees this as another hang-up
		c.tcp.CloseRead()
	}
}

// abandon ends the lookup, the dial or the exchange with an origin that is under way; a tunnel sees hang-ups itself.
func (c *client) abandon() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.abandonLocked()
}

func (c *client) abandonLocked() {
	if c.giveUp != nil {
		c.giveUp()
	}
	if c.upstream != nil {
		c.failed = cmp.Or(c.failed, fail(0, tokenClient, "the client left before %s had answered", c.upstream.key))
		c.upstream.tcp.Close()
	}
}

// sever ends the connection and what runs on it, a tunnel for that reason: the drain's time is over, or a stream is gone.
func (c *client) sever(reason string) {
	c.mu.Lock()
	c.severed, c.gone = true, true
	t, conn := c.tunnel, c.tcp
	c.mu.Unlock()
	if t != nil {
		t.end(reason)
		return
	}
	c.abandon()
	conn.Close()
	if c.unpark() {
		go c.serve() // finds it closed
	}
}

// track notes what carries the client's request, or how to end the dial under way, or the tunnel that has taken over. It reports
// whether the drain came first.
func (c *client) track(up *upstream, giveUp func(), t relayer) (severed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.upstream, c.giveUp, c.tunnel, c.failed = up, giveUp, t, nil
	if c.severed {
		c.abandonLocked()
	} else if c.gone && (up != nil || giveUp != nil) {
		c.graceLocked()
	}
	return c.severed
}

// linger reads on for a while, so that the reset that unread bytes cause does not destroy the answer (RFC 9112, 9.6).
func (c *client) linger() {
	if c.tcp.CloseWrite() != nil {
		return
	}
	c.readBy(time.Second)
	for n := 0; n < 16<<20; n += c.buffered() {
		if c.r = c.w; c.fill() != nil {
			return
		}
	}
}

// quota counts what is open by key, up to most of each; 0 = any number, and nothing is counted.
type quota[K comparable] struct {
	most int
	mu   sync.Mutex
	used map[K]int // guarded by mu
}

// add counts n more (1) or less (-1), or reports that there are as many as there may be.
func (q *quota[K]) add(key K, n int) bool {
	if q.most == 0 {
		return true
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if n > 0 && q.used[key] >= q.most {
		return false
	} else if q.used == nil {
		q.used = map[K]int{}
	}
	if q.used[key] += n; q.used[key] == 0 {
		delete(q.used, key)
	}
	return true
}

// limits are how many there may be of what clients make.
type limits struct {
	conns           quota[struct{}]
	clients         quota[netip.Addr] // connections by client.site
	tunnels         quota[struct{}]
	streams         atomic.Int64  // of HTTP/2 and 3
	carriers        atomic.Int64  // connections that carry these
	most            int64         // streams and connections that descriptors and memory are enough for; 0 = not known
	hosts           quota[string] // connections to origins by upstream.key
	rates           rates
	shedding, large atomic.Int64 // connections that are being shed; buffers that are larger than pooled ones
	full            atomic.Bool  // there is no memory for more
	mostLarge       int64        // of them, so that heads, with what is made of them, take a quarter of the memory limit
}

// noRoom reports whether there is none for another large head.
func (l *limits) noRoom() bool { return l.full.Load() || l.large.Load() >= l.mostLarge }

// rates is how many requests client addresses may still make.
type rates struct {
	limit   rate.Limit // a second; 0 = any number
	burst   int
	buckets *lru.Cache[netip.Addr, *rate.Limiter] // by client.site
}

// take takes one request off a site's allowance, or tells how long it must wait for that.
func (r *rates) take(site netip.Addr) (wait time.Duration) {
	if r.limit == 0 {
		return 0
	}
	now := time.Now() // not when the request began: an earlier time would turn the limiter's clock back
	b, known := r.buckets.Get(site)
	if !known {
		for key, old, any := r.buckets.GetOldest(); any && old.TokensAt(now) >= float64(r.burst); key, old, any = r.buckets.GetOldest() {
			r.buckets.Remove(key) // it is as good as new
		}
		b = rate.NewLimiter(r.limit, r.burst)
		r.buckets.Add(site, b) // two first requests at one time may have one each, once
	}
	if b.AllowN(now, 1) { // a reservation that is cancelled is not given back whole if others were made meanwhile
		return 0
	}
	return max(1, time.Duration((1-b.TokensAt(now))/float64(r.limit)*float64(time.Second)))
}

// enter counts a client connection in, or says why it must not be.
func (c *client) enter() *failure {
	l := &c.srv.limits
	if c.site = c.addr; c.site.Is6() {
		block, _ := c.addr.Prefix(64) // fits; who has one IPv6 address has its /64
		c.site = block.Addr()
	}
	if c.srv.cfg.AllowClients.find(c.addr) == "" {
		return fail(403, tokenDenied, "client address %s is not allowed (SLUICE_ALLOW_CLIENTS)", c.addr)
	} else if l.full.Load() {
		return fail(503, tokenLimit, "there is no memory for another connection (SLUICE_MEMORY_LIMIT)")
	} else if !l.conns.add(struct{}{}, 1) {
		return fail(503, tokenLimit, "%d client connections are open, as many as there may be (SLUICE_MAX_CONNS)", l.conns.most)
	} else if !l.clients.add(c.site, 1) {
		l.conns.add(struct{}{}, -1)
		return fail(503, tokenLimit, "%d connections from %s are open, as many as there may be (SLUICE_MAX_CONNS_PER_CLIENT)", l.clients.most, c.site)
	}
	c.counted = true
	return nil
}

// ---------------------------------------------------------------------------------------------------------------------
// Wires and buffers

// bufferSize is that of pooled buffers: it holds nearly every head, and a head with a common API response.
const bufferSize = 16 << 10

// wire is one connection and the bytes that were read from it and not used yet.
type wire struct {
	srv  *server
	tcp  stream
	raw  syscall.RawConn // of the socket below
	buf  []byte          // nil while nothing is held
	r, w int             // buf[r:w] is unused
	io   wireIO

	coded bool // bytes go through tcp, never directly to raw: TLS, or a stream of HTTP/2 or 3
}

func (w *wire) attach(srv *server, conn stream) {
	w.srv, w.tcp = srv, conn
	w.raw, _ = conn.SyscallConn()
	if w.coded = w.raw == nil; !w.coded {
		w.io.prepare(w)
	}
}

func (w *wire) buffered() int  { return w.w - w.r }
func (w *wire) unused() []byte { return w.buf[w.r:w.w] }

// take uses what is here, up to limit bytes.
func (w *wire) take(limit int64) []byte {
	b := w.buf[w.r : w.r+int(min(int64(w.buffered()), limit))]
	w.r += len(b)
	return b
}

// readBy sets the time for the next bytes, from now on: 0 = any, less = none.
func (w *wire) readBy(limit time.Duration) { w.readWithin(time.Now(), limit) }

// makeRoom sees to it that buf[w:] is not empty: unused bytes move to the front, a full buffer gives way to a larger one.
func (w *wire) makeRoom() {
	switch {
	case w.buf == nil:
		w.buf = w.srv.buffers.Get().(*[bufferSize]byte)[:]
	case w.r > 0:
		w.r, w.w = 0, copy(w.buf, w.unused())
	case w.w == len(w.buf):
		w.srv.limits.large.Add(1)
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
	} else if w.buf != nil {
		w.srv.limits.large.Add(-1)
	}
	w.buf, w.r, w.w = nil, 0, 0
}

// readHead reads until a whole head stands at the front of the unused bytes, and takes it, with the empty line that ends it.
// Empty lines before a request are skipped (RFC 9112, 2.2). limit is the most bytes it may have, within the time for what is not here yet;
// 0 = any, less = what is set already. Errors: a fault, or that of the read. The head is valid until the wire is filled again.
func (w *wire) readHead(limit int, within time.Duration) ([]byte, error) {
	for line, request := 0, within >= 0; ; { // where the line under way begins
		b := w.unused()
		if len(b) > 0 && line == 0 && b[0] != '\r' && octets[b[0]]&tokenOctet == 0 {
			return nil, fault("the first byte cannot begin an HTTP/1 message") // TLS, SOCKS: no line end may ever come
		}
		end, next, err := sectionEnd(b, line)
		switch {
		case err != nil:
			return nil, err
		case end == 2 && request:
			w.r += 2
			continue
		case end > limit || end == 0 && len(b) >= limit:
			if i := bytes.IndexByte(b, '\n'); i < 0 || i >= limit {
				return nil, faultLineTooLong
			}
			return nil, faultHeadTooLarge
		case end > 0:
			return w.take(int64(end)), nil
		}
		line = next
		if within >= 0 {
			w.readBy(within)
			within = -1
		}
		if w.buffered() == bufferSize && w.srv.limits.noRoom() {
			return nil, faultNoMemory
		} else if err := w.fill(); err != nil {
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

// never is a duration that does not end in practice: 146 years. What is set for it needs no special case.
const never = time.Duration(1 << 62)

// deadline is the instant d from now, 0 = never.
func deadline(d time.Duration) time.Time { return time.Now().Add(cmp.Or(d, never)) }

// within is a context that ends after d, 0 = only when cancelled.
func within(d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), cmp.Or(d, never))
}

// ---------------------------------------------------------------------------------------------------------------------
// Heads

// What an octet may be part of.
const (
	tokenOctet  = uint8(1 << iota) // field names, methods (RFC 9110, 5.6.2)
	valueOctet                     // field values: visible, obs-text, space and tab (RFC 9110, 5.5)
	targetOctet                    // request-targets: visible ASCII but "#", more than RFC 3986 grants since browsers send "|" and "{" raw
	hostOctet                      // names in an authority; "_" stands in many container names
	digitOctet                     // decimals in an authority
)

var octets = func() (t [256]uint8) {
	for i := range 256 {
		b := byte(i)
		alnum := b >= '0' && b <= '9' || b|0x20 >= 'a' && b|0x20 <= 'z'
		for kind, member := range map[uint8]bool{
			tokenOctet:  alnum || strings.IndexByte("!#$%&'*+-.^_`|~", b) >= 0,
			valueOctet:  b >= 0x20 && b != 0x7f || b == '\t',
			targetOctet: b > 0x20 && b < 0x7f && b != '#',
			hostOctet:   alnum || strings.IndexByte("-._", b) >= 0,
			digitOctet:  b >= '0' && b <= '9',
		} {
			if member {
				t[i] |= kind
			}
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

// allValue is all for field values, eight bytes at a time: nearly all of a head is such bytes.
func allValue(b []byte) bool {
	const ones = 0x0101010101010101
	for ; len(b) >= 8; b = b[8:] {
		v := binary.LittleEndian.Uint64(b)
		d := v ^ 0x7f*ones
		if ((v-0x20*ones)&^v|(d-ones)&^d)&(0x80*ones) != 0 && !all(b[:8], valueOctet) { // some byte is below 0x20, or 0x7f
			return false
		}
	}
	return all(b, valueOctet)
}

// trim removes optional white space (RFC 9110, 5.6.3).
func trim(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t') {
		b = b[1:]
	}
	for len(b) > 0 && (b[len(b)-1] == ' ' || b[len(b)-1] == '\t') {
		b = b[:len(b)-1]
	}
	return b
}

func isToken(b []byte) bool { return len(b) > 0 && all(b, tokenOctet) }

// fault is what is wrong with a message's framing or head.
type fault string

func (f fault) Error() string { return string(f) }

const (
	faultLineTooLong  = fault("the first line is too long (SLUICE_MAX_HEADER)")
	faultHeadTooLarge = fault("the head is too large (SLUICE_MAX_HEADER)")
	faultManyFields   = fault("the head has more than 256 fields")
	faultBodyTooLarge = fault("the body is too large")
	faultChunk        = fault("malformed chunk")
	faultNoMemory     = fault("there is no memory for a large head (SLUICE_MEMORY_LIMIT)")
)

// fieldKind is what becomes of a field.
type fieldKind uint8

const (
	fieldOther  fieldKind = iota // passed on
	fieldVia                     // passed on, whatever Connection says
	fieldExpect                  // passed on, but not from HTTP/1.0
	fieldHop                     // ends here: hop-by-hop (RFC 9110, 7.6.1), or re-made from what is noted of it
)

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

	first                        uint32 // where the field lines begin
	minor, hosts                 int    // HTTP/1.minor; number of Host fields
	length, forwards             int64  // Content-Length, Max-Forwards; -1 without
	chunked, websocket, trailers bool   // Transfer-Encoding: chunked; Upgrade: websocket; TE: trailers
	close, keepAlive, switchOver bool   // Connection: close, keep-alive, upgrade
	dated, looped, login         bool   // has a Date; Via names this hop; logs the connection in, not the request
	host, trace, credentials     []byte // values of Host, traceparent, Proxy-Authorization: Basic
}

func (h *head) reset(raw []byte) {
	*h = head{raw: raw, fields: h.fields[:0], named: h.named[:0], minor: 1, length: -1, forwards: -1}
}

// maxFields is how many fields a head may have.
const maxFields = 256

// parseFields reads the field lines of raw from at up to the empty line. hop is this hop's Via name. unfold turns obs-fold into
// spaces, as RFC 9112, 5.2 asks of a proxy for responses; without it obs-fold is a fault.
func (h *head) parseFields(at int, hop []byte, unfold bool) error {
	h.first = uint32(at)
	for at < len(h.raw)-2 {
		end := at + bytes.IndexByte(h.raw[at:], '\n') + 1
		for unfold && end < len(h.raw)-2 && (h.raw[end] == ' ' || h.raw[end] == '\t') {
			h.raw[end-2], h.raw[end-1] = ' ', ' '
			end += bytes.IndexByte(h.raw[end:], '\n') + 1
		}
		line := h.raw[at : end-2]
		colon := bytes.IndexByte(line, ':')
		switch {
		case line[0] == ' ' || line[0] == '\t':
			return fault("a field line begins with a space (obs-fold)")
		case colon < 0 || !isToken(line[:colon]):
			return fault("a field name is empty, holds an invalid byte, or is not followed by a colon")
		case !allValue(line[colon+1:]):
			return fault("a field value holds an invalid byte")
		case len(h.fields) == maxFields:
			return faultManyFields
		}
		kind, err := h.note(line[:colon], line[colon+1:], hop)
		if err != nil {
			return err
		}
		h.fields = append(h.fields, field{uint32(at), uint32(at + colon), uint32(end), kind})
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

// note takes in what a field says that matters here, and tells its kind.
func (h *head) note(name, value, hop []byte) (kind fieldKind, err error) {
	var lower [len("proxy-authorization")]byte
	if len(name) > len(lower) {
		return fieldOther, nil
	}
	for i, o := range name {
		lower[i] = o | 0x20 // makes letters and hyphens of nothing else that a token may hold
	}
	kind, name, value = fieldHop, lower[:len(name)], trim(value)
	switch string(name) {
	case "keep-alive", "proxy-authenticate":
	case "proxy-authorization":
		if scheme, token, _ := bytes.Cut(value, []byte{' '}); equalFold(scheme, "basic") {
			h.credentials = trim(token)
		}
	case "host":
		h.hosts++
		h.host = value
	case "content-length":
		n := parseDecimal(value, math.MaxInt64)
		if n < 0 || h.length >= 0 && h.length != n {
			err = fault("invalid or differing Content-Length")
		}
		h.length = n
	case "transfer-encoding":
		if h.chunked || !equalFold(value, "chunked") || h.minor == 0 {
			err = fault("Transfer-Encoding other than a single chunked, or in HTTP/1.0")
		}
		h.chunked = true
	case "connection", "proxy-connection", "te":
		err = h.noteList(name, value, hop)
	case "upgrade":
		h.websocket = equalFold(value, "websocket")
	case "max-forwards":
		if h.forwards = parseDecimal(value, math.MaxInt64); h.forwards < 0 {
			err = fault("invalid Max-Forwards")
		}
	case "trailer":
		kind, err = fieldOther, h.noteList(name, value, hop)
	case "via":
		kind, err = fieldVia, h.noteList(name, value, hop)
	case "date":
		kind, h.dated = fieldOther, true
	case "traceparent":
		kind, h.trace = fieldOther, value
	case "expect":
		kind = fieldExpect
	case "authorization":
		scheme, _, _ := bytes.Cut(value, []byte{' '})
		kind, h.login = fieldOther, h.login || equalFold(scheme, "ntlm") || equalFold(scheme, "negotiate") // RFC 4559, 6
	default:
		kind = fieldOther
	}
	return kind, err
}

// noteList takes in the elements of a comma-separated value.
func (h *head) noteList(name, value, hop []byte) error {
	for item := range bytes.SplitSeq(value, []byte{','}) {
		switch item = trim(item); {
		case string(name) == "via": // "1.1 name (comment)"
			by := bytes.Fields(item)
			h.looped = h.looped || len(by) > 1 && bytes.EqualFold(by[1], hop)
		case string(name) == "trailer":
			if equalFold(item, "content-length") || equalFold(item, "transfer-encoding") || equalFold(item, "trailer") {
				return fault("Trailer names a field of framing")
			}
		case string(name) == "te":
			item, _, _ = bytes.Cut(item, []byte{';'})
			h.trailers = h.trailers || equalFold(trim(item), "trailers")
		case equalFold(item, "close"):
			h.close = true
		case string(name) == "proxy-connection" || len(item) == 0 || equalFold(item, "te"): // of the former only "close" is heeded
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
	from, end := h.first, h.first
	for i := range h.fields {
		f := &h.fields[i]
		if end = f.end; f.kind >= fieldHop || f.kind == fieldExpect && h.minor == 0 {
			dst = append(dst, h.raw[from:f.start]...)
			from = end
		}
	}
	return append(dst, h.raw[from:end]...)
}

// setVersion reads "HTTP/1.0" or "HTTP/1.1".
func (h *head) setVersion(b []byte) bool {
	h.minor = slices.Index([]string{"HTTP/1.0", "HTTP/1.1"}, string(b))
	return h.minor >= 0
}

// parseStatus parses a response head: its first line, "HTTP/1.1 200 reason", and its fields.
func (h *head) parseStatus() (int, error) {
	end := bytes.IndexByte(h.raw, '\n') + 1
	line := h.raw[:end-2]
	version, rest, _ := bytes.Cut(line, []byte{' '})
	code, _, _ := bytes.Cut(rest, []byte{' '})
	status := parseDecimal(code, 999)
	if len(code) != 3 || status < 100 || !h.setVersion(version) || !allValue(line) {
		return 0, fault("malformed status line")
	}
	return int(status), h.parseFields(end, nil, true)
}

// parseDecimal reads digits alone, no sign and no space, of a number up to most; -1 is a fault.
func parseDecimal(b []byte, most uint64) int64 {
	n, err := strconv.ParseUint(string(b), 10, 63)
	if err != nil || n > most {
		return -1
	}
	return int64(n)
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

// summary is what is told of an exchange when it ends, and all that a tunnel keeps of it.
type summary struct {
	srv               *server
	c                 *client
	start, asked, end time.Time // asked = when the request was sent on
	line              []byte    // a copy of the request line
	method, target    []byte    // slices of line; target is what the origin gets: path and query, "*", for CONNECT nothing
	dst               destination
	connect, reused   bool        // the method is CONNECT; the upstream connection came from the pool
	version           string      // of HTTP in the request
	status            int         // what it was answered with
	upBytes, downSize int64       // of the bodies or the tunnel
	peer, trace, user string      // the address it went to; traceparent's trace-id; who was authenticated
	udp               bool        // the tunnel is one for datagrams (RFC 9298)
	first             bool        // the first contact with its destination
	closed            string      // why a tunnel ended
	audited           bool        // would have been denied, but for MODE=audit
	luck              float64     // decides with LOG_SAMPLE whether it is told of
	attrs             []slog.Attr // for the record
	tally             tally       // of the exchange that had this memory before
}

// exchange is one request and its answer. It belongs to the client's goroutine, and is pooled.
type exchange struct {
	summary
	out, in []byte    // heads: for the origin (kept for a retry), for the client
	auth    []byte    // slice of line: host[:port] as the client wrote it, the Host field
	onward  *upstream // where a tunnel is to lead: the 200 or 101 is on its way

	req, resp         head
	reqBody, respBody body
	down              bodyWriter // sends respBody
	failure           *failure   // why the request could not be read
	begun             bool       // a byte of the final response is on its way
	inTunnels         bool       // is counted in limits.tunnels
	keep, lingers     bool       // the client connection serves another request; is closed with care, since unread bytes are about
	truncated         bool       // the client is to be reset, since it could not tell otherwise
	broken            bool       // the response has not come to its end

	uploaded chan struct{} // closed when sendBody ends
	sent     atomic.Bool   // it has sent all

	awaitClient, awaitOrigin func() // armClient and armOrigin, stored since a method value is allocated each time
}

// begin makes x new, but for the memory it has.
func (x *exchange) begin(c *client) {
	*x = exchange{summary: summary{srv: x.srv, c: c, start: time.Now(), line: x.line[:0], dst: destination{key: x.dst.key[:0]},
		luck: x.srv.cfg.luck(), attrs: x.attrs[:0], tally: x.tally},
		out: x.out[:0], in: x.in[:0], req: head{fields: x.req.fields, named: x.req.named}, resp: head{fields: x.resp.fields, named: x.resp.named},
		awaitClient: x.awaitClient, awaitOrigin: x.awaitOrigin}
	x.req.reset(nil)
}

// serve handles one request that was read, up to its log record.
func (x *exchange) serve() {
	f := x.admit()
	x.inTunnels = f == nil && (x.connect || x.upgrades())
	switch {
	case f != nil:
	case x.inTunnels && !x.srv.limits.tunnels.add(struct{}{}, 1):
		f, x.inTunnels = fail(503, tokenLimit, "%d tunnels are open, as many as there may be (SLUICE_MAX_TUNNELS)", x.srv.cfg.MaxTunnels), false
	case x.connect && x.udp:
		f = x.flow()
	case x.connect:
		f = x.tunnel()
	case x.req.forwards == 0 && x.countsForwards():
		f = x.answerSelf()
	default:
		f = x.forward()
	}
	if x.onward != nil {
		x.srv.metrics.opened(&x.summary)
		x.relay(x.onward)
		return
	}
	if x.inTunnels {
		x.srv.limits.tunnels.add(struct{}{}, -1)
	}
	x.conclude(f)
}

// conclude answers a failure where that is still possible, and writes the record.
func (x *exchange) conclude(f *failure) {
	if f != nil && !x.begun && f.status != 0 {
		x.answer(f)
	} else if f != nil {
		x.keep, x.broken = false, true
	}
	if x.end.IsZero() {
		x.end = time.Now()
	}
	x.version, x.downSize = x.received(&x.req), x.respBody.size
	x.record(f)
}

// readRequest reads and parses a request head.
func (x *exchange) readRequest() *failure {
	raw, err := x.c.readHead(int(x.srv.cfg.MaxHeader), x.srv.cfg.HeaderTimeout)
	if err == nil {
		err = x.parse(raw)
	}
	if err != nil {
		x.lingers = true
		return x.clientFailure(err, "head", x.srv.cfg.HeaderTimeout, "SLUICE_HEADER_TIMEOUT")
	}
	x.keep = x.req.minor == 1 && !x.req.close && !x.srv.draining.Load() // a proxy does not persist with HTTP/1.0 clients (RFC 9112, 9.3)
	x.reqBody.begin(&x.c.wire, &x.req, bodyLength, int64(x.srv.cfg.MaxRequestBody))
	x.trace = traceID(cut(x.req.trace, 56)) // a tunnel keeps it
	return nil
}

// parse reads a request head: "METHOD target HTTP/1.1", single spaces and nothing else (RFC 9112, 3), and its fields.
func (x *exchange) parse(raw []byte) error {
	end := bytes.IndexByte(raw, '\n') + 1
	x.req.reset(raw)
	x.line = append(x.line, raw[:end-2]...)
	method, rest, _ := bytes.Cut(x.line, []byte{' '})
	target, version, ok := bytes.Cut(rest, []byte{' '})
	switch {
	case !ok || !isToken(method):
		return fault("malformed request line")
	case !x.req.setVersion(version):
		return fault("the version is neither HTTP/1.0 nor HTTP/1.1")
	case len(target) == 0 || !all(target, targetOctet):
		return fault("the request-target is empty, or holds an invalid byte or a fragment")
	}
	x.method, x.target, x.connect = method, target, string(method) == "CONNECT"
	if err := x.req.parseFields(end, x.srv.hop[:len(x.srv.hop)-2], false); err != nil {
		return err
	}
	return x.parseTarget()
}

// parseTarget reads the request-target, absolute-form or for CONNECT authority-form. It overrides Host, which must be valid none
// the less (RFC 9112, 3.2).
func (x *exchange) parseTarget() error {
	const scheme = "http://"
	n, std := min(len(scheme), len(x.target)), uint16(80)
	switch {
	case x.req.hosts > 1 || x.req.hosts == 0 && x.req.minor == 1:
		return fault("Host is missing or repeated")
	case x.connect && (x.req.chunked || x.req.length > 0):
		return fault("a CONNECT request with a body")
	case x.connect:
		x.auth, x.target, std = x.target, nil, 0
	case equalFold(x.target[:n], scheme):
		x.auth, x.target = x.target[n:], nil
		if end := bytes.IndexAny(x.auth, "/?"); end >= 0 {
			x.auth, x.target = x.auth[:end], x.auth[end:]
		}
	case x.target[0] == '/' || x.target[0] == '*':
		return fault("this is a forward proxy: set http_proxy and https_proxy to its address, or send an absolute URL")
	case equalFold(x.target[:n], "https:/"):
		return fault("https URLs go through a tunnel: send CONNECT host:443")
	default:
		return fault("the request-target is not an http:// URL")
	}
	if err := x.dst.parse(x.auth, std); err != nil {
		return err
	}
	if x.req.hosts == 1 && !bytes.Equal(x.req.host, x.auth) {
		if _, _, _, ok := splitAuthority(x.req.host, 80); !ok {
			return fault("Host is invalid")
		}
	}
	return nil
}

// countsForwards reports whether Max-Forwards means something to the method (RFC 9110, 7.6.2).
func (x *exchange) countsForwards() bool {
	return string(x.method) == "OPTIONS" || string(x.method) == "TRACE"
}

// parse reads an authority; std is the port where it names none, 0 if it must.
func (d *destination) parse(authority []byte, std uint16) error {
	host, ip, port, ok := splitAuthority(authority, std)
	if !ok {
		return fault("invalid host or port in the request-target, or user info")
	}
	if ip.IsValid() {
		d.key = ip.AppendTo(d.key)
	} else {
		d.key = append(d.key, bytes.TrimSuffix(host, []byte{'.'})...)
	}
	for i, o := range d.key {
		if o >= 'A' && o <= 'Z' {
			d.key[i] = o | 0x20
		}
	}
	n := len(d.key)
	d.key = strconv.AppendUint(append(d.key, ':'), uint64(port), 10)
	d.host, d.ip, d.port = d.key[:n], ip, port
	return nil
}

// splitAuthority checks host[:port]; std is the port where none stands, 0 if one must. ip is set where the host is an address.
func splitAuthority(b []byte, std uint16) (host []byte, ip netip.Addr, port uint16, ok bool) {
	host, port = b, std
	if i := bytes.LastIndexByte(b, ':'); i > bytes.LastIndexByte(b, ']') {
		host, port = b[:i], uint16(max(0, parseDecimal(b[i+1:], 65535)))
	}
	if len(host) > 2 && host[0] == '[' && host[len(host)-1] == ']' {
		v6, err := netip.ParseAddr(string(host[1 : len(host)-1]))
		return host, v6.Unmap(), port, port > 0 && err == nil && v6.Is6() && v6.Zone() == ""
	}
	ip, ok = parseHost(host)
	return host, ip, port, ok && port > 0
}

// parseHost accepts names of letters, digits, "-" and "_" in labels of 1 to 63 bytes, 253 in all, with or without a trailing
// dot, and dotted-quad IPv4. A last label that is a number means an IPv4 address to resolvers and browsers (WHATWG URL, "ends
// in a number"), in octal, hexadecimal or short forms too; only the plain form is taken, and is ip. Unlike netip.ParseAddr this
// takes bytes, so nothing is allocated.
func parseHost(b []byte) (ip netip.Addr, ok bool) {
	b = bytes.TrimSuffix(b, []byte{'.'})
	if len(b) > 253 || !all(b, hostOctet) {
		return ip, false
	}
	quad, label := make([]byte, 0, 4), b
	for label = range bytes.SplitSeq(b, []byte{'.'}) {
		if len(label) == 0 || len(label) > 63 {
			return ip, false
		}
		if all(label, digitOctet) && (label[0] != '0' || len(label) == 1) {
			if n := parseDecimal(label, 255); n >= 0 {
				quad = append(quad, byte(n))
			}
		}
	}
	if all(label, digitOctet) || label[0] == '0' && len(label) > 1 && label[1]|0x20 == 'x' {
		ip, ok = netip.AddrFromSlice(quad)
		return ip, ok && bytes.Count(b, []byte{'.'}) == 3
	}
	return ip, true
}

// ---------------------------------------------------------------------------------------------------------------------
// Policy

// admit decides what can be decided before a name is resolved.
func (x *exchange) admit() *failure {
	limit := int64(x.srv.cfg.MaxRequestBody)
	switch wait := x.srv.limits.rates.take(x.c.site); {
	case x.failure != nil:
		return x.failure
	case x.srv.cfg.TLSClientCA != "" && !x.c.proven:
		return fail(403, tokenDenied, "clients must come over TLS, with a certificate (SLUICE_TLS_CLIENT_CA)")
	case wait > 0:
		f := fail(429, tokenDenied, "more than %d requests a second come from %s (SLUICE_RATE, SLUICE_RATE_BURST)", x.srv.cfg.Rate, x.c.site)
		f.fields = fmt.Sprintf("Retry-After: %.0f\r\n", math.Ceil(wait.Seconds()))
		return f
	case x.srv.closing.Load() && (x.connect || x.upgrades()):
		return fail(503, tokenLimit, "this proxy is draining: it opens no more tunnels")
	}
	if f := x.authenticate(); f != nil {
		return f
	}
	switch {
	case x.req.looped:
		return fail(502, tokenLoop, "the request came back to this proxy: Via names %s (SLUICE_NAME)", x.srv.cfg.Name)
	case x.dst.ip.IsValid() && x.srv.isOwn(netip.AddrPortFrom(x.dst.ip, x.dst.port)):
		return fail(502, tokenLoop, "%s is this proxy itself", x.dst.key)
	case limit > 0 && x.req.length > limit:
		return fail(413, tokenRequest, "the request body is larger than %d bytes (SLUICE_MAX_REQUEST_BODY)", limit)
	}
	return x.unlessAudited(x.srv.ruleOut(&x.dst))
}

// ruleOut says which rule about hosts and ports denies a destination, if any.
func (s *server) ruleOut(d *destination) *failure {
	allow, deny := &s.cfg.AllowHosts, &s.cfg.DenyHosts
	if rule := deny.match(d.host, d.ip, d.port); rule != "" {
		return fail(403, tokenDenied, "%s is denied by the rule %s (SLUICE_DENY_HOSTS)", d.key, rule)
	} else if allow.names != nil && allow.match(d.host, d.ip, d.port) == "" {
		return fail(403, tokenDenied, "%s is not among the hosts that are allowed (SLUICE_ALLOW_HOSTS)", d.key)
	} else if !s.cfg.AllowPorts.has(d.port) {
		return fail(403, tokenDenied, "destination port %d is not allowed (SLUICE_ALLOW_PORTS)", d.port)
	}
	return nil
}

// unlessAudited gives back what a rule about hosts and ports denies. With MODE=audit that is said, once per destination, and let pass.
func (x *exchange) unlessAudited(f *failure) *failure {
	if f == nil || x.srv.cfg.Mode != "audit" {
		return f
	}
	x.audited = true
	if isNew, _ := x.srv.doubtful.first(&x.dst); isNew {
		x.srv.log.process.Warn("would deny", logClient, x.c.addr.String(), logMethod, cut(x.method, mostTold), logServer, string(x.dst.host),
			logPort, int(x.dst.port), "would_deny", f.text)
	}
	return nil
}

// contacts remembers destinations, so that the first contact with each can be told of, and how many requests each had.
type contacts struct {
	mu   sync.Mutex
	keys map[string]*atomic.Int64 // by destination.key; guarded by mu
	more int                      // contacts with destinations for which there was no room; guarded by mu
	all  bool                     // those are taken for new
}

// first reports whether d is new here, and where its requests are counted.
func (c *contacts) first(d *destination) (isNew bool, requests *atomic.Int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if requests = c.keys[string(d.key)]; requests != nil {
		return false, requests
	}
	requests = new(atomic.Int64)
	if len(c.keys) == 1000 { // hostile clients may choose them, 260 bytes each
		c.more++
		return c.all, requests
	}
	c.keys[string(d.key)] = requests
	return true, requests
}

// list says where connections went, as values to be pasted into an environment.
func (c *contacts) list(log *slog.Logger) {
	c.mu.Lock()
	defer c.mu.Unlock()
	rules, ports := []string{}, map[string]bool{}
	for key := range c.keys {
		i := strings.LastIndexByte(key, ':')
		rules, ports[key[i+1:]] = append(rules, net.JoinHostPort(key[:i], key[i+1:])), true
	}
	if slices.Sort(rules); len(rules) > 0 { // an empty value would allow everything
		log.Info("destinations", "allow_hosts", envPrefix+"ALLOW_HOSTS="+strings.Join(rules, ","), "count", len(rules), "contacts_with_others", c.more,
			"allow_ports", envPrefix+"ALLOW_PORTS="+strings.Join(slices.Sorted(maps.Keys(ports)), ","))
	}
}

// authenticate takes note of who asks, where SLUICE_USERS wants to know.
func (x *exchange) authenticate() (f *failure) {
	if x.user = x.c.name; len(x.srv.cfg.Users) == 0 {
		return nil
	}
	g, token, digest := x.srv.gate, x.req.credentials, x.srv.gate.digest(x.req.credentials)
	if x.user = g.recall(digest, x.start); x.user == "" && g.decoy != "" {
		ctx, cancel := context.WithCancel(context.Background())
		x.c.track(nil, cancel, nil) // the client may leave, or the drain cut it, while others are checked
		x.user, f = g.check(ctx, token, digest)
		x.c.track(nil, nil, nil)
		cancel()
	}
	if x.user == "" && f == nil {
		f = fail(407, tokenDenied, "the credentials for this proxy are missing or wrong (SLUICE_USERS)")
	}
	return f
}

// verifiedFor is how long credentials are remembered that matched a bcrypt hash, from when they were last used.
const verifiedFor = 10 * time.Minute

// gatekeeper checks Basic credentials (RFC 7617). It knows them by a digest with a secret of its own, so that how long a look-up
// takes says nothing about a password.
type gatekeeper struct {
	secret [32]byte
	hashes map[string]string // bcrypt hashes by user
	decoy  string            // the slowest of them, for names without one: these take as long as those, where all have the same cost
	queue  chan struct{}     // those who wait for bcrypt, or run it
	slow   chan struct{}     // the one who runs it: guessing takes one CPU at most

	mu    sync.RWMutex
	known map[[32]byte]*verified // by digest, no more than one for each user; guarded by mu
}

type verified struct {
	user  string
	until atomic.Int64 // Unix time in ns
}

func newGatekeeper(list users) *gatekeeper {
	g := &gatekeeper{hashes: map[string]string{}, known: map[[32]byte]*verified{}, queue: make(chan struct{}, 32), slow: make(chan struct{}, 1)}
	crand.Read(g.secret[:]) // never fails (crypto/rand)
	slowest := 0
	for user, secret := range list {
		cost, err := bcrypt.Cost([]byte(secret))
		if err != nil {
			g.remember(g.digest(base64.StdEncoding.AppendEncode(nil, []byte(user+":"+secret))), user, math.MaxInt64)
		} else if g.hashes[user] = secret; cost > slowest {
			slowest, g.decoy = cost, secret
		}
	}
	return g
}

func (g *gatekeeper) digest(token []byte) [32]byte {
	var room [256]byte // enough for nearly all
	return sha256.Sum256(append(append(room[:0], g.secret[:]...), token...))
}

func (g *gatekeeper) remember(digest [32]byte, user string, until int64) {
	v := &verified{user: user}
	v.until.Store(until)
	g.mu.Lock()
	g.known[digest] = v
	g.mu.Unlock()
}

// recall gives the user whose credentials have this digest, "" if that is not known.
func (g *gatekeeper) recall(digest [32]byte, now time.Time) string {
	g.mu.RLock()
	v := g.known[digest]
	g.mu.RUnlock()
	if v == nil || v.until.Load() < now.UnixNano() {
		return ""
	}
	if next := now.Add(verifiedFor).UnixNano(); next-v.until.Load() > int64(verifiedFor/2) {
		v.until.Store(next)
	}
	return v.user
}

// check asks bcrypt, until ctx ends. One spelling of one password matches a hash: bcrypt sees no more than 72 bytes, up to a NUL.
func (g *gatekeeper) check(ctx context.Context, token []byte, digest [32]byte) (user string, f *failure) {
	text, err := base64.StdEncoding.Strict().DecodeString(string(token))
	name, password, whole := strings.Cut(string(text), ":")
	if err != nil || !whole || len(password) > 72 || strings.Contains(password, "\x00") {
		return "", nil
	}
	select {
	case g.queue <- struct{}{}:
		defer func() { <-g.queue }()
	default:
		return "", fail(503, tokenLimit, "too many credentials wait to be checked")
	}
	select {
	case g.slow <- struct{}{}:
		defer func() { <-g.slow }()
	case <-ctx.Done():
		return "", fail(0, tokenClient, "the client left while its credentials waited to be checked")
	}
	if user = g.recall(digest, time.Now()); user != "" { // verified while this waited
		return user, nil
	}
	hash, known := g.hashes[name]
	if bcrypt.CompareHashAndPassword([]byte(cmp.Or(hash, g.decoy)), []byte(password)) != nil || !known {
		return "", nil
	}
	g.remember(digest, name, time.Now().Add(verifiedFor).UnixNano())
	return name, nil
}

// addressClass says what kind of destination an address is.
type addressClass string

const classPublic addressClass = "public"

// classes are the address blocks of addresses.txt, each with its class. The smallest block that an address is in decides.
var classes = func() *prefixes {
	p := new(prefixes)
	table, _ := files.ReadFile("addresses.txt")
	for line := range strings.Lines(string(table)) {
		if words := strings.Fields(line); len(words) > 0 && words[0] != "#" {
			p.Insert(netip.MustParsePrefix(words[1]), words[0])
		}
	}
	return p
}()

// faces appends the addresses that a packet to a may end up at, each of which is judged: a itself (unmapped, without its zone) and the
// IPv4 addresses that it embeds, to which a translator, relay or tunnel on the way would send it.
func faces(list []netip.Addr, a netip.Addr) []netip.Addr {
	a = a.Unmap().WithZone("")
	list = append(list, a)
	if a.Is4() {
		return list
	}
	b := a.As16()
	within := func(block string) bool { return string(b[:len(block)]) == block }
	at := [][4]int{}
	switch zeros := "\x00\x00\x00\x00\x00\x00\x00\x00"; {
	case within("\x00\x64\xff\x9b" + zeros), within(zeros+"\x00\x00\x00\x00") && b[12] != 0: // NAT64 (RFC 6052), IPv4-compatible
		at = [][4]int{{12, 13, 14, 15}}
	case within("\x00\x64\xff\x9b\x00\x01"): // local-use NAT64: any of the layouts of RFC 6052, 2.2 that fit
		at = [][4]int{{12, 13, 14, 15}, {9, 10, 11, 12}, {7, 9, 10, 11}, {6, 7, 9, 10}}
	case within("\x20\x02"): // 6to4 (RFC 3056, 2)
		at = [][4]int{{2, 3, 4, 5}}
	}
	if b[8]&^2|b[9] == 0 && b[10] == 0x5e && b[11] == 0xfe { // ISATAP (RFC 5214, 6.1)
		at = append(at, [4]int{12, 13, 14, 15})
	}
	for _, i := range at {
		if v4 := [4]byte{b[i[0]], b[i[1]], b[i[2]], b[i[3]]}; len(at) == 1 || v4[0] != 0 { // with zeros it is another layout
			list = append(list, netip.AddrFrom4(v4))
		}
	}
	return list
}

// judge picks the addresses that may be dialled, and says why the first that may not is refused.
func (x *exchange) judge(addrs []netip.Addr) (allowed []netip.AddrPort, refused *failure) {
	deny, denied := &x.srv.cfg.DenyHosts, (*failure)(nil)
	for {
		for _, a := range addrs {
			if f := x.srv.obstacle(&x.dst, a, deny); f == nil {
				allowed = append(allowed, netip.AddrPortFrom(a.Unmap(), x.dst.port))
			} else if refused = cmp.Or(refused, f); f.token == tokenDenied {
				denied = f
			}
		}
		if len(allowed) > 0 || denied == nil || x.unlessAudited(denied) != nil {
			return allowed, refused
		}
		deny, refused, denied = &hostRules{}, nil, nil
	}
}

// obstacle is why an address of d may not be dialled, nil if it may: by a block of DENY_CIDRS or deny, or because it is not public
// and neither ALLOW_CIDRS nor ALLOW_PRIVATE_HOSTS let it through.
func (s *server) obstacle(d *destination, a netip.Addr, deny *hostRules) *failure {
	var room [6]netip.Addr // no address has more
	for _, face := range faces(room[:0], a) {
		class := addressClass(classes.find(face))
		if s.isOwn(netip.AddrPortFrom(face, d.port)) {
			return fail(502, tokenLoop, "%s is this proxy itself", d.key)
		} else if block := s.cfg.DenyCIDRs.find(face); block != "" {
			return d.refuse(tokenProhibited, a, "an address in "+block+" (SLUICE_DENY_CIDRS)")
		} else if rule := deny.match(nil, face, d.port); rule != "" {
			return d.refuse(tokenDenied, a, "an address that the rule "+rule+" denies (SLUICE_DENY_HOSTS)")
		} else if class == classPublic || s.cfg.AllowCIDRs.find(face) != "" {
			continue
		}
		variables := "SLUICE_ALLOW_CIDRS"
		if slices.Contains([]addressClass{"private", "unique-local", "shared", "site-local", "loopback", "documentation", "benchmarking"}, class) {
			if s.cfg.AllowPrivateHosts.match(d.host, d.ip, d.port) != "" {
				continue
			}
			variables += ", SLUICE_ALLOW_PRIVATE_HOSTS"
		}
		return d.refuse(tokenProhibited, a, fmt.Sprintf("a %s address (%s)", class, variables))
	}
	return nil
}

// refuse says that d is at an address it must not be at. Which one a name has is for the log alone: the resolver may know names of an
// inner network that the client has no way to look up.
func (d *destination) refuse(token string, a netip.Addr, what string) *failure {
	f := fail(403, token, "%s is %s", d.host, what)
	if !d.ip.IsValid() {
		f = fail(403, token, "%s resolves to %s", d.host, what).because(errors.New(a.Unmap().String()))
	}
	return f
}

// ---------------------------------------------------------------------------------------------------------------------
// Names and dialling

// resolver looks names up and remembers the answers for a while.
type resolver struct {
	cfg     *config
	metrics *telemetry
	lookups singleflight.Group // by name
	answers *lru.Cache[string, dnsAnswer]
}

// dnsAnswer is what one lookup found.
type dnsAnswer struct {
	addrs         []netip.Addr
	learned, next time.Time // when that was true, when to ask again
}

// ask asks the resolvers in turn, each for its share of the time, until one answers, if only that the name is gone.
func (r *resolver) ask(host string) (addrs []netip.Addr, gone bool, err error) {
	servers := r.cfg.DNSServers
	if len(servers) == 0 {
		servers = list{""} // those of the system
	}
	for _, server := range servers {
		addrs, err = r.askOne(host, server, r.cfg.DNSTimeout/time.Duration(len(servers)))
		dns, isDNS := errors.AsType[*net.DNSError](err)
		if gone = isDNS && dns.IsNotFound; err == nil || gone {
			break
		}
	}
	return addrs, gone, err
}

// askOne asks one resolver within limit, or those of the system, of which the next is asked when one is silent for half of the
// time. Not cgo's: getaddrinfo reads "0x7f.1" as an address, which policy has not judged.
func (r *resolver) askOne(host, server string, limit time.Duration) ([]netip.Addr, error) {
	ctx, cancel := within(limit)
	defer cancel()
	var silent atomic.Bool
	system := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, cmp.Or(server, addr))
		if err == nil { // net.Resolver itself would wait for 5 s, also when nobody waits for it any more
			patience := time.AfterFunc(cmp.Or(r.cfg.DNSTimeout/2, time.Hour), func() { silent.Store(true); conn.Close() })
			context.AfterFunc(ctx, func() { patience.Stop(); conn.Close() })
		}
		return conn, err
	}}
	hostsFile := net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) { return nil, net.ErrClosed }}
	if addrs, err := hostsFile.LookupNetIP(ctx, "ip", host); err == nil { // it has short names without a final dot
		return addrs, nil
	}
	addrs, err := system.LookupNetIP(ctx, "ip", host+".") // as it is: rules have not judged what a search list would make of it
	if dns, isDNS := errors.AsType[*net.DNSError](err); isDNS && !dns.IsNotFound && silent.Load() {
		dns.IsTimeout = true
	}
	return addrs, err
}

// resolve returns the addresses of a name. Lookups of one name at one time are one, which goes on when ctx ends this wait.
func (r *resolver) resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	if a, known := r.answers.Get(host); known && time.Now().Before(a.next) {
		r.metrics.hits.Inc()
		return a.addrs, nil
	}
	select {
	case found := <-r.lookups.DoChan(host, func() (any, error) { return r.refresh(host) }):
		return found.Val.([]netip.Addr), found.Err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// refresh looks host up. When that fails, the old answer serves until it is too stale, unless the name is known to be gone.
func (r *resolver) refresh(host string) ([]netip.Addr, error) {
	addrs, gone, err := r.ask(host)
	a, known := r.answers.Peek(host)
	now := time.Now()
	if err == nil {
		r.metrics.misses.Inc()
		a.addrs, a.learned = addrs[:min(len(addrs), 16)], now // so that a hostile answer does not start a thousand connections
	} else if !known || gone || now.Sub(a.learned) >= r.cfg.DNSStale {
		r.metrics.errors.Inc()
		r.answers.Remove(host)
		return nil, err
	} else {
		r.metrics.stales.Inc()
	}
	a.next = now.Add(r.cfg.DNSCacheTTL)
	r.answers.Add(host, a)
	return a.addrs, nil
}

// dialUpstream resolves, judges and connects. The whole of it ends when DIAL_TIMEOUT is over or the client has left.
func (x *exchange) dialUpstream() (*upstream, *failure) {
	ctx, cancel := within(x.srv.cfg.DialTimeout)
	defer cancel()
	x.c.track(nil, cancel, nil)
	defer x.c.track(nil, nil, nil)
	allowed, f := x.locate(ctx)
	if f != nil {
		return nil, f
	}
	key := string(x.dst.key)
	if f := x.takePlace(key); f != nil {
		return nil, f
	}
	begun := time.Now()
	up, err := x.srv.dial(ctx, allowed)
	if err != nil {
		x.srv.limits.hosts.add(key, -1)
		return nil, x.dialFailure(err)
	}
	up.key, x.asked = key, time.Now()
	x.srv.metrics.connect.Observe(x.asked.Sub(begun).Seconds())
	x.srv.metrics.upstreams.Add(1)
	x.first, up.requests = x.srv.reached.first(&x.dst) // a connection of the pool is to one that is known
	up.audited = x.audited
	return up, nil
}

// takePlace takes one of the connections that there may be to a destination.
func (x *exchange) takePlace(key string) *failure {
	hosts := &x.srv.limits.hosts
	for wait := time.Duration(0); !hosts.add(key, 1); time.Sleep(wait) { // one may be on its way back: its client has its answer already
		if idle := x.srv.pool.get(x.dst.key, x.start, false); idle != nil { // of no use for a tunnel
			idle.close()
		} else if wait += time.Millisecond; wait > 5*time.Millisecond {
			return fail(503, tokenLimit, "%d connections to %s are open, as many as there may be (SLUICE_MAX_CONNS_PER_HOST)", hosts.most, key)
		}
	}
	return nil
}

// locate gives the addresses of the destination that may be dialled.
func (x *exchange) locate(ctx context.Context) (allowed []netip.AddrPort, f *failure) {
	addrs, err := []netip.Addr{x.dst.ip}, error(nil)
	if !x.dst.ip.IsValid() {
		if addrs, err = x.srv.names.resolve(ctx, string(x.dst.host)); err != nil {
			return nil, x.dialFailure(err)
		}
	}
	if allowed, f = x.judge(addrs); len(allowed) > 0 {
		f = nil // of one that was not
	}
	return allowed, f
}

// dialFailure says why there is no connection.
func (x *exchange) dialFailure(err error) *failure {
	host, key := x.dst.host, x.dst.key
	dns, isDNS := errors.AsType[*net.DNSError](err)
	op, dialled := errors.AsType[*net.OpError](err)
	if dialled && !isDNS && op.Addr != nil { // of TCP or UDP
		if peer, err := netip.ParseAddrPort(op.Addr.String()); err == nil {
			x.peer = peer.Addr().Unmap().String()
		}
	}
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
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		return fail(503, tokenLimit, "no descriptor is left for a connection to %s (SLUICE_NOFILE)", key).because(err)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fail(503, tokenLimit, "no local port is left for a connection to %s (net.ipv4.ip_local_port_range and tcp_tw_reuse, see `sluice tune`)", key).because(err)
	case isUnroutable(err):
		return fail(502, tokenUnroutable, "there is no route to %s", key).because(err)
	}
	return fail(502, tokenRefused, "%s refused the connection", key).because(err)
}

func isUnroutable(err error) bool {
	return errors.Is(err, syscall.EHOSTUNREACH) || errors.Is(err, syscall.ENETUNREACH) || errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EINVAL)
}

// upstream is one connection to an origin.
type upstream struct {
	wire
	key   string // host:port it was dialled for; it is reused for no other
	peer  string // its address
	watch watched
	hung  atomic.Bool // the origin has closed its side
	since time.Time   // idle since; guarded by pool.mu
	wary  bool        // there may be more than its last response: that had no body by rule, or was moved by the kernel unseen

	requests *atomic.Int64 // of all to its destination
	audited  bool          // these would be denied, but for MODE=audit
}

func (up *upstream) close() {
	up.srv.watcher.remove(&up.watch)
	up.tcp.Close()
	up.drop()
	if up.key != "" { // it did not only lose a race
		up.srv.metrics.upstreams.Add(-1)
		up.srv.limits.hosts.add(up.key, -1)
	}
}

// ---------------------------------------------------------------------------------------------------------------------
// Forwarding

// forward sends the request to its origin and the response back. A reused connection that died before a byte of response is
// replaced by a new one, if the request can be repeated (RFC 9110, 9.2.2).
func (x *exchange) forward() *failure {
	x.out = x.appendRequest(x.out)
	for up, again := x.srv.pool.get(x.dst.key, x.start, !x.repeatable()), false; ; up, again = nil, true {
		if x.reused = up != nil; !x.reused {
			var f *failure
			if up, f = x.dialUpstream(); f != nil {
				return f
			}
			x.srv.watcher.add(&up.watch, up.raw, up)
			x.srv.metrics.dialled.Inc()
		} else {
			x.asked, x.audited = time.Now(), up.audited // addresses were judged when it was dialled
			x.srv.metrics.reused.Inc()
		}
		if !again {
			up.requests.Add(1)
		}
		if f := x.roundTrip(up); f == nil || !f.stale || !x.reused || !x.repeatable() {
			return f
		}
	}
}

func (h *head) hasBody() bool { return h.chunked || h.length > 0 }

// repeatable reports whether the request may be sent twice: an idempotent method and no body.
func (x *exchange) repeatable() bool {
	switch string(x.method) {
	case "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE":
		return !x.req.hasBody()
	}
	return false
}

// upgrades reports whether the client asks for a WebSocket (RFC 6455, 4.1), the one upgrade that is passed on.
func (x *exchange) upgrades() bool {
	return x.req.switchOver && x.req.websocket && x.req.minor == 1 && string(x.method) == "GET" && !x.req.hasBody()
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
	b = x.appendFields(b, &x.req, x.req.chunked, x.req.length)
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

// appendFields appends what passes through of h, this hop's Via, and framing.
func (x *exchange) appendFields(b []byte, h *head, chunked bool, length int64) []byte {
	b = append(append(append(h.appendKept(b), "Via: "...), x.received(h)...), ' ')
	b = append(b, x.srv.hop...)
	if chunked {
		return append(b, "Transfer-Encoding: chunked\r\n"...)
	} else if length >= 0 {
		return appendNumber(b, "Content-Length: ", length)
	}
	return b
}

func appendNumber(b []byte, name string, n int64) []byte {
	b = strconv.AppendInt(append(b, name...), n, 10)
	return append(b, "\r\n"...)
}

// roundTrip carries the request over up and the response back, and leaves up in the pool or closed.
func (x *exchange) roundTrip(up *upstream) (f *failure) {
	x.peer = up.peer
	x.c.track(up, nil, nil)
	sending := x.reqBody.framing == bodyChunked || x.reqBody.left > int64(x.c.buffered())
	if sending {
		up.readBy(0) // sendBody sets one when the body is sent
		x.uploaded = make(chan struct{})
		go x.sendBody(up)
	} else {
		f = x.sendWhole(up)
	}
	if f == nil {
		f = x.receive(up)
	}
	if x.onward != nil {
		return nil
	}
	x.c.track(nil, nil, nil)
	x.end = time.Now()
	persists := f == nil && !x.resp.close && !x.req.login && (x.resp.minor == 1 || x.resp.keepAlive) && x.respBody.framing != bodyClose
	if sending {
		persists = x.joinUpload(up) && persists
	}
	x.upBytes += x.reqBody.size
	if persists && up.buffered() == 0 {
		x.srv.pool.put(up, x.end)
	} else {
		up.close()
	}
	return f
}

// sendWhole sends a request whose body, if any, is already in the client's buffer.
func (x *exchange) sendWhole(up *upstream) *failure {
	body, _, _ := x.reqBody.nextBuffered() // cannot fail: its length is known and within the limit
	x.out = append(x.out, body...)
	if x.c.buffered() == 0 {
		x.c.drop() // the answer may take its time, and comes into the same buffer while the cache has it
	}
	up.readWithin(x.asked, x.srv.cfg.ResponseTimeout)
	if err := up.ask(x.srv.cfg.BodyTimeout, x.out); err != nil {
		return x.upstreamFailure(err)
	}
	return nil
}

// sendBody sends the request while receive waits for the response on the same connection, since an origin may answer before it
// has read everything. It runs in a goroutine of its own. That the origin closed is no failure: it may have answered.
func (x *exchange) sendBody(up *upstream) {
	defer close(x.uploaded)
	defer func() {
		if p := recover(); p != nil { // ends this exchange alone
			x.srv.logPanic(p)
			x.c.mu.Lock()
			x.c.failed = fail(500, tokenInternal, "a fault of the proxy's own")
			x.c.mu.Unlock()
			up.tcp.Close()
		}
	}()
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
	} else if x.respBody.w == nil { // the final response has not begun
		x.asked = time.Now()
		up.readWithin(x.asked, x.srv.cfg.ResponseTimeout)
	}
}

// joinUpload ends sendBody. A body that is not all here is given up, and since its rest cannot be told from a next request, the
// client connection too. An upstream connection on which it has not sent everything cannot be used again.
func (x *exchange) joinUpload(up *upstream) (complete bool) {
	if x.reqBody.ended.Load() { // its last write is over, or waits for an origin that answered and takes no more
		select {
		case <-x.uploaded:
		case <-time.After(50 * time.Millisecond):
		}
	}
	if complete = x.sent.Load(); !complete {
		up.tcp.Close()
		x.armClient()
	}
	<-x.uploaded
	if !x.reqBody.ended.Load() {
		x.keep, x.lingers = false, true
	}
	return complete
}

// armClient sets the limit for the client's next bytes of a body. Once the exchange is over, that is at once.
func (x *exchange) armClient() {
	x.c.mu.Lock()
	defer x.c.mu.Unlock()
	limit := x.srv.cfg.BodyTimeout
	if x.c.upstream == nil {
		limit = -1
	}
	x.c.readBy(limit)
}

// armOrigin sets the limit for the origin's next bytes of a body.
func (x *exchange) armOrigin() {
	if m, ok := x.c.tcp.(*muxed); ok {
		m.flush() // what is written so far need not wait, too
	}
	x.c.upstream.readBy(x.srv.cfg.BodyTimeout)
}

// receive reads the origin's answer and passes it on.
func (x *exchange) receive(up *upstream) *failure {
	for interim := 0; ; interim++ {
		raw, err := up.readHead(int(x.srv.cfg.MaxHeader), -1)
		if err != nil {
			return x.upstreamFailure(err)
		}
		x.resp.reset(raw)
		status, err := x.resp.parseStatus()
		if m, ok := x.c.tcp.(*muxed); ok && err == nil {
			err = m.mistaken(status, raw)
		}
		switch {
		case err != nil:
			return x.upstreamFailure(err)
		case status == 101 && !(x.upgrades() && x.resp.switchOver && x.resp.websocket):
			return x.upstreamFailure(fault("a 101 response that was not asked for"))
		case interim == 100:
			return x.upstreamFailure(fault("too many informational responses"))
		case status >= 200:
			x.status = status
			return x.respond(up)
		case x.req.minor == 0: // 1xx are not for HTTP/1.0 clients (RFC 9110, 15.2)
			continue
		}
		b := x.appendHead(x.in[:0], false, -1)
		if status == 101 {
			x.keep, x.begun = false, true
			b = append(b, "Connection: Upgrade\r\nUpgrade: websocket\r\n"...)
		}
		if f := x.tell(append(b, "\r\n"...)); f != nil {
			return f
		} else if status == 101 {
			x.status, x.onward = 101, up
			return nil
		}
	}
}

// appendHead makes the head for the client from the origin's, but for its end.
func (x *exchange) appendHead(b []byte, chunked bool, length int64) []byte {
	line := x.resp.raw[len("HTTP/1.x"):bytes.IndexByte(x.resp.raw, '\r')]
	b = append(append(b, "HTTP/1.1"...), line...)
	if len(line) == len(" 200") {
		b = append(b, ' ') // the space stands also before an empty reason (RFC 9112, 4)
	}
	return x.appendFields(append(b, "\r\n"...), &x.resp, chunked, length)
}

// respond passes a final response on: its head together with what is here of the body, then the rest as it comes.
func (x *exchange) respond(up *upstream) *failure {
	limit, length := int64(x.srv.cfg.MaxResponseBody), x.resp.length
	x.c.mu.Lock() // sendBody asks whether it has begun
	x.respBody.begin(&up.wire, &x.resp, bodyClose, limit)
	x.srv.metrics.wait.Observe(time.Since(x.asked).Seconds())
	x.c.mu.Unlock()
	bodiless := string(x.method) == "HEAD" || x.status == 204 || x.status == 304
	up.wary = bodiless || length >= spliceFrom
	if bodiless {
		x.respBody.framing, x.respBody.left = bodyLength, 0
	} else if limit > 0 && length > limit {
		return x.upstreamFailure(faultBodyTooLarge)
	}
	if x.status == 204 {
		length = -1 // RFC 9110, 8.6
	}
	chunked := x.respBody.framing != bodyLength && x.req.minor == 1 && x.c.conn == nil // streams have an end of their own
	untilClose := x.respBody.framing != bodyLength && !chunked                         // the end of the connection is the end of the body
	x.keep = x.keep && !untilClose && x.reqBody.ended.Load() && !x.srv.draining.Load()
	b := x.appendHead(x.in[:0], chunked, length)
	if !x.resp.dated {
		b = time.Now().UTC().AppendFormat(append(b, "Date: "...), http.TimeFormat+"\r\n") // RFC 9110, 6.6.1
	}
	if !x.keep {
		b = append(b, "Connection: close\r\n"...)
	}
	b = append(b, "\r\n"...)
	x.down = bodyWriter{dst: &x.c.wire, limit: x.srv.cfg.BodyTimeout, head: b, chunked: chunked, started: &x.begun}
	readErr, writeErr := x.down.copy(&x.respBody, x.awaitOrigin)
	x.in = x.down.head // which may have grown
	if readErr == nil {
		return x.clientFailure(writeErr, "", 0, "")
	}
	if x.begun && untilClose {
		x.c.tcp.SetLinger(0) // a plain close would look like the end of the body
		x.truncated = true
	}
	return x.upstreamFailure(readErr)
}

// clientFailure says what is wrong with the client's connection or message, if anything, the part of it awaited within limit.
func (x *exchange) clientFailure(err error, part string, limit time.Duration, variable string) *failure {
	if err == nil {
		return nil
	}
	var bad fault // escapes: it is allocated here
	switch {
	case errors.Is(err, faultLineTooLong):
		return fail(414, tokenRequest, "the request-target is longer than %d bytes (SLUICE_MAX_HEADER)", x.srv.cfg.MaxHeader)
	case errors.Is(err, faultManyFields), errors.Is(err, faultNoMemory):
		return fail(431, tokenRequest, "%v", err)
	case errors.Is(err, faultHeadTooLarge):
		return fail(431, tokenRequest, "the head is larger than %d bytes (SLUICE_MAX_HEADER)", x.srv.cfg.MaxHeader)
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
func (x *exchange) upstreamFailure(err error) *failure {
	x.c.mu.Lock()
	failed, up := x.c.failed, x.c.upstream
	x.c.mu.Unlock()
	var bad fault
	switch {
	case failed != nil:
		return failed
	case errors.Is(err, faultLineTooLong), errors.Is(err, faultHeadTooLarge), errors.Is(err, faultManyFields), errors.Is(err, faultNoMemory):
		return fail(502, tokenHeadSize, "response of %s: %v", x.dst.key, err)
	case errors.Is(err, faultBodyTooLarge):
		return fail(502, tokenBodySize, "response of %s: %v (SLUICE_MAX_RESPONSE_BODY)", x.dst.key, err)
	case errors.As(err, &bad):
		return fail(502, tokenProtocol, "response of %s: %v", x.dst.key, err)
	case errors.Is(err, os.ErrDeadlineExceeded) && x.respBody.w == nil:
		return fail(504, tokenResponseTimeout, "nothing came from %s for %v (SLUICE_RESPONSE_TIMEOUT)", x.dst.key, x.srv.cfg.ResponseTimeout)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fail(504, tokenResponseTimeout, "nothing came from %s for %v (SLUICE_BODY_TIMEOUT)", x.dst.key, x.srv.cfg.BodyTimeout)
	}
	f := fail(502, tokenTerminated, "%s closed the connection before its answer was complete", x.dst.key).because(err)
	f.stale = x.resp.raw == nil && up.buffered() == 0
	return f
}

// ---------------------------------------------------------------------------------------------------------------------
// Bodies

// framing is how the end of a body is told (RFC 9112, 6.3).
type framing uint8

const (
	bodyLength framing = iota // also none: 0
	bodyChunked
	bodyClose // ends with the connection
)

// What comes next in a chunked body (RFC 9112, 7.1).
const (
	chunkSize = iota
	chunkEnd  // the CRLF after the data, of which left is still to come
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
	w       *wire // nil before begin
	framing framing
	state   int
	left    int64       // bytes to come; bodyChunked: of the chunk; bodyClose: more than can come, until the end has
	size    int64       // bytes of body so far
	limit   int64       // most bytes, 0 = any
	unfold  bool        // it is of a response, where obs-fold becomes a space
	ended   atomic.Bool // nothing more is to be read of it
	named   [][]byte    // what Connection named; of a chunked body
	trailer []byte      // the field lines that follow a chunked body, as they are sent on
}

// begin reads a head's framing; other is what a body without any has.
func (b *body) begin(w *wire, h *head, other framing, limit int64) {
	*b = body{w: w, framing: other, left: max(h.length, 0), limit: limit, unfold: other == bodyClose}
	if h.chunked {
		b.framing = bodyChunked
		for _, name := range h.named {
			b.named = append(b.named, bytes.Clone(name)) // the head is gone when the trailers come
		}
	} else if h.length >= 0 {
		b.framing = bodyLength
	} else if other == bodyClose {
		b.left = math.MaxInt64
	}
	b.ended.Store(b.framing == bodyLength && b.left == 0)
}

// nextBuffered returns what is here of the body, valid until the wire is filled again, and whether it is the last. When it is nothing,
// more must be read.
func (b *body) nextBuffered() (data []byte, done bool, err error) {
	if b.framing == bodyChunked {
		data, err = b.nextChunks()
		done = b.state == chunkDone
	} else {
		data = b.w.take(b.left)
		b.left -= int64(len(data))
		done = b.left == 0
	}
	if b.size += int64(len(data)); b.limit > 0 && b.size > b.limit {
		return nil, false, faultBodyTooLarge
	}
	b.count(len(data))
	b.ended.Store(done)
	return data, done, err
}

// count takes n bytes into the metrics.
func (b *body) count(n int) {
	if n > 0 {
		b.w.srv.metrics.moved(n, b.unfold)
	}
}

// fill waits for more of the body.
func (b *body) fill() error {
	err := b.w.fill()
	if err == io.EOF && b.framing == bodyClose {
		b.left, err = 0, nil
	} else if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// nextChunks decodes all chunks that are here into one run of bytes: what follows the first chunk's data is moved up to it,
// over the size lines between, so that many small chunks leave as one.
func (b *body) nextChunks() (data []byte, err error) {
	for more := true; more && b.state != chunkDone; {
		if b.left == 0 {
			if more, err = b.chunkFraming(b.w.unused()); err != nil {
				return nil, err
			}
			continue
		}
		piece := b.w.take(b.left)
		b.left -= int64(len(piece))
		more = len(piece) > 0
		if len(data) == 0 {
			data = piece
		} else {
			data = append(data, piece...) // within the buffer: data ends before piece begins
		}
	}
	return data, nil
}

// chunkFraming reads what stands between chunks from in. It returns false when not all of it is here.
func (b *body) chunkFraming(in []byte) (more bool, err error) {
	n, next := 0, chunkDone
	switch b.state {
	case chunkSize:
		in = in[:min(len(in), maxChunkLine)]
		if n = bytes.IndexByte(in, '\n') + 1; n > 0 || len(in) == maxChunkLine {
			b.left, err = parseChunkSize(in[:n])
		}
		if next = chunkEnd; b.left == 0 {
			next = chunkTrailers
		}
	case chunkEnd:
		if n, next = 2, chunkSize; len(in) < n {
			return false, nil
		} else if string(in[:n]) != "\r\n" {
			err = faultChunk
		}
	case chunkTrailers:
		if n, _, err = sectionEnd(in, 0); err == nil && max(n, len(in)) > bufferSize && (n == 0 || n > bufferSize) {
			err = faultChunk // the trailers are too large
		} else if n > 2 {
			var t head
			t.reset(in[:n])
			t.named = b.named
			err = t.parseFields(0, nil, b.unfold)
			b.trailer = t.appendKept(nil)
		}
	}
	if n == 0 || err != nil {
		return false, err
	}
	b.w.r += n
	b.state = next
	return true, nil
}

// parseChunkSize reads a chunk-size line: 1 to 15 hex digits, then an extension, which may hold only what a field value may.
func parseChunkSize(line []byte) (int64, error) {
	line, ended := bytes.CutSuffix(line, []byte("\r\n"))
	size, ext, _ := bytes.Cut(line, []byte{';'})
	n, err := strconv.ParseUint(string(size), 16, 63)
	if !ended || err != nil || len(size) > 15 || !all(ext, valueOctet) {
		return 0, faultChunk
	}
	return int64(n), nil
}

// bodyWriter sends the body of one message, its head with the first piece.
type bodyWriter struct {
	dst     *wire
	limit   time.Duration // for each piece to be taken
	chunked bool
	head    []byte // not sent yet; its room is used again for chunk sizes
	started *bool  // set when the first byte is on its way
}

// copy sends all of b. The head does not wait for the body. beforeRead is called before each wait, to set its deadline.
func (o *bodyWriter) copy(b *body, beforeRead func()) (readErr, writeErr error) {
	defer b.w.rested()
	for {
		data, done, err := b.nextBuffered()
		if err != nil {
			return err, nil
		}
		if err = o.write(data, done, b); err != nil || done {
			return nil, err
		}
		b.w.passed(len(data))
		if len(data) == 0 {
			beforeRead()
			if err = b.fill(); err != nil {
				return err, nil
			}
		}
		if b.framing == bodyLength && b.left >= spliceFrom && !b.w.coded && !o.dst.coded {
			if readErr, writeErr = o.splice(b, beforeRead); readErr != nil || writeErr != nil {
				return readErr, writeErr
			}
		}
	}
}

// write sends the next piece; done says that it is the last of b.
func (o *bodyWriter) write(data []byte, done bool, b *body) error {
	out, after := o.head, ""
	if o.chunked && len(data) > 0 {
		out, after = append(strconv.AppendUint(out, uint64(len(data)), 16), "\r\n"...), "\r\n"
	}
	before := len(out)
	if len(data) <= smallPiece {
		out, data = append(out, data...), nil
	}
	out = append(out, after...)
	if o.chunked && done {
		out = append(append(append(out, "0\r\n"...), b.trailer...), "\r\n"...)
	}
	o.head = out[:0]
	if len(data) == 0 {
		before = len(out) // a single piece
	}
	if before+len(data) == 0 {
		return nil
	}
	*o.started = true
	return o.dst.write(o.limit, out[:before], data, out[before:])
}

// ---------------------------------------------------------------------------------------------------------------------
// Tunnels

// tunnel serves a CONNECT request up to the 200.
func (x *exchange) tunnel() *failure {
	x.keep = false
	if x.c.buffered() == 0 {
		x.c.drop() // dialling may take long
	}
	up, f := x.dialUpstream()
	if f != nil {
		return f
	}
	up.requests.Add(1)
	x.begun = true
	if f := x.tell([]byte("HTTP/1.1 200 Connection Established\r\n\r\n")); f != nil {
		up.close()
		return f
	}
	x.status, x.onward = 200, up
	return nil
}

// tunnelEnd is when a tunnel ends that was opened at since, if no byte moves after last, and why. half = one side has closed.
func (c *config) tunnelEnd(since, last time.Time, half bool) (at time.Time, reason string) {
	patience, reason := c.TunnelIdleTimeout, "idle_timeout"
	if half {
		patience, reason = c.TunnelHalfCloseTimeout, "half_close_timeout"
	}
	at = last.Add(cmp.Or(patience, never))
	if end := since.Add(cmp.Or(c.TunnelMaxAge, never)); end.Before(at) {
		at, reason = end, "max_age"
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
	fields string // lines that its answer has besides
}

func fail(status int, token, format string, args ...any) *failure {
	return &failure{status: status, token: token, text: fmt.Sprintf(format, args...)}
}

func (f *failure) because(err error) *failure {
	f.cause = err
	return f
}

// logged is what is told of f beyond the client.
func (f *failure) logged() string {
	if f.cause == nil {
		return f.text
	}
	return f.text + ": " + f.cause.Error()
}

// answer sends the response that stands for f.
func (x *exchange) answer(f *failure) {
	name := x.srv.cfg.Name
	if c := name[0] | 0x20; c < 'a' || c > 'z' {
		name = strconv.Quote(name) // a token begins with a letter; both texts are printable ASCII (RFC 8941, 3.3)
	}
	ascii := strings.ReplaceAll(f.text, "µ", "u") // of a duration
	why := fmt.Sprintf("Proxy-Status: %s; error=%s; details=%q\r\n%s", name, f.token, ascii, f.fields)
	if f.status == 407 {
		why += fmt.Sprintf("Proxy-Authenticate: Basic realm=%q, charset=\"UTF-8\"\r\n", x.srv.cfg.Name) // RFC 7617, 2
	}
	x.keep = x.reply(f.status, "text/plain", why, "sluice: "+f.text+"\n") == nil && x.keep
}

// answerSelf answers OPTIONS and TRACE whose Max-Forwards has run out here (RFC 9110, 7.6.2), TRACE without fields: they hold secrets.
func (x *exchange) answerSelf() *failure {
	if string(x.method) == "TRACE" {
		return x.reply(200, "message/http", "", string(x.line)+"\r\n\r\n")
	}
	return x.reply(200, "text/plain", "", "")
}

// reply sends a response of Sluice's own. A request body that has not been read, or a tunnel's bytes, end the connection.
func (x *exchange) reply(status int, mediaType, fields, body string) *failure {
	if x.keep && !x.reqBody.ended.Load() {
		x.reqBody.nextBuffered() // a small body is here already, and not worth a connection
	}
	if x.connect || !x.reqBody.ended.Load() {
		x.keep, x.lingers = false, true
	}
	if !x.keep {
		fields += "Connection: close\r\n"
	}
	x.status, x.begun = status, true
	b := fmt.Appendf(x.in[:0], "HTTP/1.1 %d %s\r\nDate: %s\r\nVia: 1.1 %sContent-Type: %s\r\nContent-Length: %d\r\n%s\r\n", status,
		http.StatusText(status), time.Now().UTC().Format(http.TimeFormat), x.srv.hop, mediaType, len(body), fields)
	if string(x.method) != "HEAD" {
		b = append(b, body...)
		x.respBody.size = int64(len(body))
		x.srv.metrics.moved(len(body), true)
	}
	return x.tell(b)
}

// tell sends a message without a body to be streamed.
func (x *exchange) tell(b []byte) *failure {
	return x.clientFailure(x.c.write(x.srv.cfg.BodyTimeout, b, nil, nil), "", 0, "")
}

// ---------------------------------------------------------------------------------------------------------------------
// Logs

// Field names, after OpenTelemetry's semantic conventions.
const (
	logClient    = "client.address"
	logUser      = "user.name"
	logMethod    = "http.request.method"
	logScheme    = "url.scheme"
	logPath      = "url.path"
	logQuery     = "url.query"
	logServer    = "server.address"
	logPort      = "server.port"
	logVersion   = "network.protocol.version"
	logTransport = "network.transport" // of a tunnel for datagrams; else it is TCP
	logPeer      = "network.peer.address"
	logStatus    = "http.response.status_code"
	logUpSize    = "http.request.body.size"
	logDownSize  = "http.response.body.size"
	logDuration  = "duration_ms"
	logReused    = "upstream_reused"
	logType      = "error.type"
	logMessage   = "error.message"
	logClose     = "close_reason"
	logTrace     = "trace_id"
)

// ---------------------------------------------------------------------------------------------------------------------
// Platform contract
//
// tune_linux.go and tune_other.go each define:
//
//	(*server).openListeners      appends to server.listeners one listener for an address, or where they can share it, one per CPU; sets backlog
//	(*server).accept(ctx, l)     has connections served until ctx ends, and those that wait then. Errors are said once and waited out
//	sockets                      what they need; close frees what is kept
//	(*server).dial(ctx, addrs)   connects to the first address that answers, until ctx ends; an error is a *net.OpError, with that of ctx
//	tuneKernel(cfg, log)         raises RLIMIT_NOFILE, sets the heap's limit, examines the kernel's settings (TUNE=apply: writes some), warns of
//	                             those that fall short and gives all as []finding, nil where none was looked at
//	openFiles() int              the descriptor limit in force, 0 where there is none
//	(*server).watchMemory(ctx)   lets idle connections go and sets limits.full while memory is short, until ctx ends; elsewhere not
//	connLimit() int              how many client connections descriptors and memory are enough for, 0 where that is not known
//	watcher, watched             after add(&watched, raw, owner) of a client or upstream, run calls owner.hungUp when its peer has
//	                             hung up, perhaps more than once, until remove; elsewhere never
//	(*client).graceLocked        has a client abandoned whose sending side is closed, unless it takes what it is sent; elsewhere not
//	pool                         keeps idle connections to origins by host and port: newPool(cfg), get(key, now, careful), put(up, now),
//	                             size(), close(); elsewhere none, since it cannot be told there whether an idle one is dead
//	wireIO                       what a wire needs for these:
//	(*wire).fill                 reads once, into what room there is or is made; an error only when nothing was read
//	(*wire).readWithin           sets the time for the next bytes, as readBy does, from a given one on. It may fire early
//	(*wire).write(limit, a,b,c)  sends up to three pieces with one system call, within limit
//	(*wire).passed(n), rested()  take note of n bytes of a body or tunnel that went on, and of its end; elsewhere not
//	(*wire).ask(limit, p)        sends p, if any, and waits for the first bytes that come (back)
//	(*client).await              waits for a request, holding no buffer, and may serve those that need nothing more from the client;
//	                             more = there is one to be read, or left. After parkAfter it may have the watcher call serve when
//	                             there is something to read: parked, until unpark returns true
//	(*exchange).relay(up)        hands the exchange, its client's connection and up over to a relayer, perhaps until that has ended, which
//	                             carries bytes both ways until both have ended (RFC 9110, 9.3.6), passing half-closes on
//	(*bodyWriter).splice         moves the rest of a body in the kernel, or nothing
