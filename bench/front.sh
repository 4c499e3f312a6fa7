#!/usr/bin/env bash
# What streams cost over HTTP/2 and HTTP/3: Sluice beside nghttpx as forward proxy and beside a bare proxy made of Go's own servers, each
# over h2c, HTTP/2 over TLS and HTTP/3, as far as they speak it. Over loopback; prints one Markdown table.
# Needs Linux, Go, nginx (the origin), h2load and openssl; nghttpx where it is there (Debian: nghttp2-client, nghttp2-proxy).
#
#   bench/front.sh                       about three minutes
#   ROUNDS=1 SECS=1 bench/front.sh       a quick look
#
# ROUNDS (5)           rounds; in each every proxy and protocol has its turn, so that a noisy minute hits them all; medians are printed
# SECS (2)             seconds of each load; 5 at most
# CONNS, STREAMS (8, 16)   connections, and streams at a time on each, with small bodies
# BULK (4, 1)          the same with large ones, in MB: LARGE (64)
# PORT (17400)         first port to try; the next free ones are taken
# ONLY                 what to measure, as in "Sluice/h2c nghttpx/h2c"; by default everything
#
# The table goes to stdout, everything else to stderr. SLUICE_ variables in the environment reach Sluice, to try a setting.
set -euo pipefail

ROUNDS=${ROUNDS:-5} SECS=${SECS:-2} CONNS=${CONNS:-8} STREAMS=${STREAMS:-16} BULK=${BULK:-4,1} LARGE=${LARGE:-64} PORT=${PORT:-17400} ONLY=${ONLY:-}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PATH=$PATH:/usr/sbin:/usr/local/sbin # where Debian keeps the servers

say() { printf '%s\n' "$*" >&2; }
die() { say "bench/front.sh: $*"; exit 1; }
have() { command -v "$1" >/dev/null; }

# ---------------------------------------------------------------------------------------------------------------------
# Processes: each is known by its pid, and ended by it

children=()
work=

# tree PID prints the CPU ticks that PID and its descendants have used, then their pids.
tree() {
  { cat /proc/[0-9]*/stat 2>/dev/null || true; } | sed 's/^\([0-9]*\) (.*) /\1 /' | awk -v root="$1" '
    { parent[$1] = $3; ticks[$1] = $13 + $14 + $15 + $16 }
    END {
      found[root] = 1
      do { more = 0
        for (p in parent) if (!(p in found) && parent[p] in found) { found[p] = 1; more = 1 }
      } while (more)
      for (p in found) if (p in ticks) { sum += ticks[p]; list = list " " p }
      print sum + 0 list
    }'
}

ticks() { local all; all=$(tree "$1"); echo "${all%% *}"; }

cleanup() {
  local c _ pids p all=()
  trap '' INT TERM
  for c in "${children[@]}"; do
    read -r _ pids <<<"$(tree "$c")"
    for p in $pids; do all+=("$p"); done
    kill -TERM "$c" 2>/dev/null || true
  done
  for _ in {1..30}; do
    sleep 0.1
    kill -0 "${all[@]}" 2>/dev/null || break
  done
  for p in "${all[@]}"; do
    if kill -0 "$p" 2>/dev/null; then kill -KILL "$p" 2>/dev/null || true; fi
  done
  wait 2>/dev/null || true
  if [ -n "$work" ]; then rm -rf "$work"; fi
}

# ---------------------------------------------------------------------------------------------------------------------
# What is there

[ -r /proc/self/stat ] || die "needs Linux: CPU time is read from /proc"
for tool in go nginx h2load openssl awk timeout; do have "$tool" || die "needs $tool"; done
[ "$SECS" -le 5 ] || die "SECS is 5 at most"
hz=$(getconf CLK_TCK)

# The first two CPUs that this process may use: one for the proxy under test, one for load and origin.
proxy_cpu=() load_cpu=()
read -r cpu_a cpu_b <<<"$(awk '/^Cpus_allowed_list/ { n = split($2, part, ",")
  for (i = 1; i <= n; i++) { split(part[i] "-" part[i], r, "-"); for (c = r[1]; c <= r[2]; c++) printf "%d ", c } }' /proc/self/status | cut -d' ' -f1,2)"
if have taskset && [ -n "$cpu_b" ]; then
  proxy_cpu=(taskset -c "$cpu_a") load_cpu=(taskset -c "$cpu_b")
else
  say "*** NOT PINNED: only one CPU, or no taskset. Only CPU per stream means anything."
fi
ulimit -n "$(ulimit -Hn)" 2>/dev/null || true

work=$(mktemp -d)
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
chmod 755 "$work" # nginx gives up root and must read the origin's files
mkdir "$work/www" "$work/tmp"
head -c "${LARGE}M" /dev/urandom >"$work/www/large"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 \
  -keyout "$work/key.pem" -out "$work/cert.pem" 2>/dev/null || die "openssl makes no certificate"

open_port() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
next_port=$PORT
take_port() { # sets port
  while open_port "$next_port"; do next_port=$((next_port + 1)); done
  port=$next_port next_port=$((next_port + 1))
}

(cd "$here/.." && CGO_ENABLED=0 go build -o "$work/sluice" . && CGO_ENABLED=0 go build -o "$work/h3" bench/h3.go) || die "Sluice or h3.go does not build"

# ---------------------------------------------------------------------------------------------------------------------
# Origin and proxies

start_origin() {
  take_port
  origin=127.0.0.1:$port
  local text
  text=$(printf '%-128s' "hello, world: a small body, of the size of an API's short answer, filled up with dots")
  cat >"$work/origin.conf" <<C
worker_processes 1; daemon off; pid $work/origin.pid; error_log $work/origin.err;
events { worker_connections 16384; multi_accept on; }
http {
  access_log off; root $work/www;
  keepalive_requests 100000000; keepalive_timeout 600s; tcp_nodelay on; sendfile on;
  client_body_temp_path $work/tmp/body; proxy_temp_path $work/tmp/proxy; fastcgi_temp_path $work/tmp/fastcgi;
  uwsgi_temp_path $work/tmp/uwsgi; scgi_temp_path $work/tmp/scgi;
  server {
    listen $origin backlog=4096;
    location = /s { default_type text/plain; return 200 "${text// /.}\n"; }
    location / { }
  }
}
C
  "${load_cpu[@]}" nginx -e "$work/origin.err" -c "$work/origin.conf" >"$work/origin.log" 2>&1 </dev/null &
  children+=($!)
  await "$port" the origin
}

await() { # PORT WHO
  for _ in {1..50}; do
    if open_port "$1"; then return; fi
    sleep 0.1
  done
  die "${*:2} does not listen"
}

names=() # NAME/PROTOCOL
declare -A pid_of port_of

# serve NAME COMMAND... starts a proxy on the proxy's core.
serve() {
  "${proxy_cpu[@]}" "${@:2}" >"$work/$1.log" 2>&1 </dev/null &
  children+=($!)
  pid_of[$1]=$!
}

# offer NAME PROTOCOL PORT puts it on the list once it has forwarded requests.
offer() {
  local entry=$1/$2
  if [ -n "$ONLY" ] && [[ " $ONLY " != *" $entry "* ]]; then return; fi
  port_of[$entry]=$3
  load "$entry" /s 1 4 1
  if [ "${good:-0}" -gt 0 ]; then
    names+=("$entry")
  else
    say "*** SKIPPED: $entry forwards nothing; its log ends:"
    tail -n 3 "$work/$1.log" >&2
  fi
}

# ---------------------------------------------------------------------------------------------------------------------
# Loads

# load NAME/PROTOCOL PATH CONNECTIONS STREAMS SECONDS sets good, bad (requests) and bytes (of bodies, cut ones among them).
load() {
  local port=${port_of[$1]} out scheme=http
  good=0 bad=0 bytes=0
  case $1 in
    */h3)
      out=$(GOMAXPROCS=1 timeout 20 "${load_cpu[@]}" "$work/h3" load "127.0.0.1:$port" "$origin" "$2" "$3" "$4" "$5" 2>&1) || true
      if [[ $out =~ requests=([0-9]+)\ errors=([0-9]+)\ bytes=([0-9]+) ]]; then good=${BASH_REMATCH[1]} bad=${BASH_REMATCH[2]} bytes=${BASH_REMATCH[3]}; fi
      ;;
    *)
      if [[ $1 = */tls ]]; then scheme=https; fi
      # All proxies would choose a cipher of their own; this one is what browsers and servers with AES in hardware agree on.
      out=$(timeout 20 "${load_cpu[@]}" h2load -t1 "-c$3" "-m$4" "-D$5" --tls13-ciphers=TLS_AES_128_GCM_SHA256 \
        -H ":scheme: http" -H ":authority: $origin" "$scheme://127.0.0.1:$port$2" 2>&1) || true
      if [[ $out =~ requests:.*\ ([0-9]+)\ succeeded,\ ([0-9]+)\ failed ]]; then good=${BASH_REMATCH[1]} bad=${BASH_REMATCH[2]}; fi
      if [[ $out =~ status\ codes:\ ([0-9]+)\ 2xx && ${BASH_REMATCH[1]} -lt $good ]]; then bad=$((bad + good - BASH_REMATCH[1])) good=${BASH_REMATCH[1]}; fi
      if [[ $out =~ \(([0-9]+)\)\ data ]]; then bytes=${BASH_REMATCH[1]}; fi
      ;;
  esac
}

row() { printf '%s %s %s\n' "$1" "$2" "$3" >>"$work/rows"; }

# measure NAME/PROTOCOL KEY PATH CONNECTIONS STREAMS
measure() {
  local pid=${pid_of[${1%/*}]} before used began us
  before=$(ticks "$pid") began=${EPOCHREALTIME/./}
  load "$1" "$3" "$4" "$5" "$SECS"
  us=$((${EPOCHREALTIME/./} - began)) used=$(($(ticks "$pid") - before))
  row "$1" errors "$bad"
  if [ "$used" = 0 ] || [ "$bytes" = 0 ]; then say "*** $1 answered nothing"; return; fi
  case $2 in
    small)
      row "$1" rate $((good * 1000000 / (SECS * 1000000)))
      row "$1" cpu "$(awk -v t="$used" -v hz="$hz" -v n="$good" 'BEGIN { printf "%.2f", t / hz * 1e6 / n }')"
      row "$1" busy "$((used * 100 * 1000000 / hz / us))"
      ;;
    large) row "$1" gb "$(awk -v t="$used" -v hz="$hz" -v b="$bytes" 'BEGIN { printf "%.3f", b / 1e9 / (t / hz) }')" ;;
  esac
}

# ---------------------------------------------------------------------------------------------------------------------

start_origin

take_port
serve Sluice env GOMAXPROCS=1 SLUICE_LISTEN="127.0.0.1:$port" SLUICE_ADMIN=off SLUICE_ALLOW_PORTS='*' SLUICE_ALLOW_CIDRS=127.0.0.0/8 \
  SLUICE_LOG_SAMPLE=info=0 SLUICE_TLS_CERT_FILE="$work/cert.pem" SLUICE_TLS_KEY_FILE="$work/key.pem" SLUICE_HTTP3=true "$work/sluice"
await "$port" Sluice
for protocol in h2c tls h3; do offer Sluice "$protocol" "$port"; done

# A forward proxy's backend is one that takes absolute URLs, which nginx does: nghttpx is told once where to go. Its limit of 8
# connections to a host would have streams wait for each other.
if have nghttpx; then
  take_port; plain=$port
  take_port
  serve nghttpx nghttpx --conf=/dev/null --http2-proxy --workers=1 --no-ocsp --errorlog-file="$work/nghttpx.err" -b "127.0.0.1,${origin#*:}" \
    --backend-connections-per-host=1024 -f "127.0.0.1,$plain;no-tls" -f "127.0.0.1,$port" "$work/key.pem" "$work/cert.pem"
  await "$port" nghttpx
  offer nghttpx h2c "$plain"
  offer nghttpx tls "$port"
else
  say "*** SKIPPED: nghttpx is not installed"
fi

take_port; plain=$port
take_port
serve Go env GOMAXPROCS=1 "$work/h3" relay "127.0.0.1:$plain" "127.0.0.1:$port" "$origin" "$work/cert.pem" "$work/key.pem"
await "$port" "the proxy of h3.go"
offer Go h2c "$plain"
for protocol in tls h3; do offer Go "$protocol" "$port"; done

[ ${#names[@]} -gt 0 ] || die "nothing to measure"
# machine prints ticks: all that have passed, those used, those used by this script's processes, those stolen by the hypervisor.
machine() { awk -v ours="$(ticks $$)" '$1 == "cpu" { for (i = 2; i <= 9; i++) all += $i; print all, all - $5 - $6 - $9, ours, $9 }' /proc/stat; }
before=$(machine)

for ((round = 0; round < ROUNDS; round++)); do
  for ((i = 0; i < ${#names[@]}; i++)); do # each round begins with another one
    name=${names[(round + i) % ${#names[@]}]}
    say "round $((round + 1)) of $ROUNDS: $name"
    measure "$name" small /s "$CONNS" "$STREAMS"
    sleep 0.3
    measure "$name" large /large "${BULK%,*}" "${BULK#*,}"
    sleep 0.3
  done
done

noise=$(awk '{ all = $5 - $1; printf "%.0f%% of the CPUs used by other processes, %.1f%% stolen by the hypervisor", 100 * ($6 - $2 - $7 + $3) / all, 100 * ($8 - $4) / all }' <<<"$before $(machine)")

awk -v names="${names[*]}" '
  function median(list,   v, n, i, j, t) {
    n = split(list, v, " ")
    for (i = 2; i <= n; i++) for (j = i; j > 1 && v[j] + 0 < v[j - 1] + 0; j--) { t = v[j]; v[j] = v[j - 1]; v[j - 1] = t }
    return n % 2 ? v[(n + 1) / 2] : (v[n / 2] + v[n / 2 + 1]) / 2
  }
  function grouped(x,   s, out) { # 12345 → 12,345
    s = sprintf("%.0f", x)
    for (out = ""; length(s) > 3; s = substr(s, 1, length(s) - 3)) out = "," substr(s, length(s) - 2) out
    return s out
  }
  function value(n, k) { return (n, k) in all ? median(all[n, k]) : 0 }
  function shown(n, k, digits,   v, peer) { # with the ratio to nghttpx over the same protocol behind it
    if (!(v = value(n, k))) return "–"
    peer = n; sub(/^[^\/]*/, "nghttpx", peer)
    return (digits ? sprintf("%.*f", digits, v) : grouped(v)) (value(peer, k) ? sprintf(" (%.2f)", v / value(peer, k)) : "")
  }
  { all[$1, $2] = all[$1, $2] " " $3; sum[$1, $2] += $3 }
  END {
    print "| proxy, protocol (ratio to nghttpx) | streams/s | CPU µs/stream | core busy | GB per CPU second | errors |"
    print "|---|---:|---:|---:|---:|---:|"
    n = split(names, name, " ")
    for (i = 1; i <= n; i++) { p = name[i]; split(p, part, "/")
      print "| " part[1] (part[1] == "Go" ? " (ReverseProxy)" : "") ", " (part[2] == "tls" ? "h2 over TLS" : part[2]) " | " shown(p, "rate", 0) " | " shown(p, "cpu", 1) " | " \
        value(p, "busy") "% | " shown(p, "gb", 2) " | " sum[p, "errors"] + 0 " |"
    }
  }' "$work/rows"
say "Linux $(uname -r | cut -d- -f1), $(go version "$work/sluice" | sed 's/.*: //'), $(nginx -v 2>&1 | sed 's/.*: //; s,/, ,'), $(h2load --version)"
say "$ROUNDS × $SECS s on $(nproc) CPUs; meanwhile $noise"
