// What Sluice tells of itself: how records are sampled, encoded and written, what is counted, and the admin listener that serves
// health, metrics, profiles and the status page.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"reflect"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"github.com/lmittmann/tint"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
)

// ---------------------------------------------------------------------------------------------------------------------
// Logger

// logger stands before a writer that may block: sampler (wants) → encoder → queue → drain. A goroutine writes what waits in one piece;
// what finds LOG_BUFFER full, or waiting longer than its bytes may be, is dropped: clients choose much of a record, and stdout may be
// blocked for ever. Records about traffic are sampled by level before they are built, those about the process never.
type logger struct {
	cfg     *config
	process *slog.Logger
	drops   *slog.Logger // for what is said of records that were dropped: there is always room
	out     io.Writer
	done    chan struct{}   // closed when everything is written after close
	sampled [4]atomic.Int64 // records left out, by rank of their level
	batch   queue           // being written; owned by drain

	mu      sync.Mutex // guards what follows
	work    sync.Cond  // there may be something to do
	waiting queue
	records int       // waiting or being written
	bytes   int       // of these
	most    int       // bytes
	written [4]int64  // so far, by rank
	dropped [4]int64  // so far, by rank
	unsaid  int64     // dropped since that was last said
	said    time.Time // when
	closed  bool
}

// queue is encoded records, one behind the other.
type queue struct {
	text  []byte
	marks []uint32 // of each: length << 2 | rank
}

func (q *queue) add(p []byte, rank int) {
	q.text, q.marks = append(q.text, p...), append(q.marks, uint32(len(p)<<2|rank))
}

// skip takes n bytes from the front, and tells of how many records, by rank, those were the end.
func (q *queue) skip(n int) (ended [4]int64) {
	for q.text = q.text[n:]; len(q.marks) > 0; q.marks = q.marks[1:] {
		m := q.marks[0]
		if n < int(m>>2) {
			q.marks[0] -= uint32(n << 2)
			break
		}
		n -= int(m >> 2)
		ended[m&3]++
	}
	return ended
}

// emptied is the memory of q, unless a burst has made that large.
func (q *queue) emptied() queue {
	if cap(q.text) > 1<<20 {
		return queue{}
	}
	return queue{q.text[:0], q.marks[:0]}
}

// rank numbers the levels from 0 (debug) to 3 (error).
func rank(level slog.Level) int { return max(0, min(int(level+4)/4, 3)) }

func newLogger(cfg *config, stdout io.Writer) *logger {
	l := &logger{cfg: cfg, out: stdout, done: make(chan struct{}), most: max(1<<20, 512*min(cfg.LogBuffer, math.MaxInt/512))}
	encoder := encoderFor(cfg, stdout)
	l.drops, l.work.L = slog.New(encoder(rankWriter{l, rank(l.dropLevel()), true})), &l.mu
	var byRank ranked
	for i := range byRank {
		byRank[i] = encoder(rankWriter{l, i, false})
	}
	l.process = slog.New(byRank)
	go l.drain()
	return l
}

// bound keeps what waits within a number of bytes, or what it was within, if that is less.
func (l *logger) bound(most int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.most = int(min(int64(l.most), most))
}

// encoderFor gives what makes the handlers that LOG_FORMAT asks for.
func encoderFor(cfg *config, stdout io.Writer) func(io.Writer) slog.Handler {
	file, _ := stdout.(*os.File)
	info, err := file.Stat() // fails on nil
	terminal := err == nil && info.Mode()&os.ModeCharDevice != 0
	switch format := cfg.LogFormat; {
	case format == "text" || format == "auto" && terminal:
		return func(w io.Writer) slog.Handler {
			return tint.NewTextHandler(w, &tint.Options{Level: cfg.LogLevel, NoColor: !terminal || os.Getenv("NO_COLOR") != ""})
		}
	case format == "cbor":
		return func(w io.Writer) slog.Handler { return newCBORHandler(w, cfg.LogLevel) }
	}
	return func(w io.Writer) slog.Handler {
		return slog.NewJSONHandler(w, &slog.HandlerOptions{Level: cfg.LogLevel})
	}
}

// ranked has each record encoded by the handler of its level, so that what is written and what is dropped is counted by level.
type ranked [4]slog.Handler

func (h ranked) Enabled(ctx context.Context, level slog.Level) bool { return h[0].Enabled(ctx, level) }

func (h ranked) Handle(ctx context.Context, r slog.Record) error {
	return h[rank(r.Level)].Handle(ctx, r)
}

func (h ranked) WithAttrs(attrs []slog.Attr) slog.Handler {
	for i := range h {
		h[i] = h[i].WithAttrs(attrs)
	}
	return h
}

func (h ranked) WithGroup(name string) slog.Handler {
	for i := range h {
		h[i] = h[i].WithGroup(name)
	}
	return h
}

// wants decides whether a record about traffic is written. luck is the decision that all records of one request or connection share,
// from 0 to 1; always = whatever the sampling.
func (l *logger) wants(level slog.Level, luck float64, always bool) bool {
	if !l.process.Enabled(context.Background(), level) {
		return false
	}
	if share, named := l.cfg.LogSample[level]; !always && named && luck >= share {
		l.sampled[rank(level)].Add(1)
		return false
	}
	return true
}

// luck draws what wants decides by.
func (c *config) luck() float64 {
	if len(c.LogSample) == 0 {
		return 0
	}
	return rand.Float64()
}

// debug records that a connection opened or closed.
func (l *logger) debug(msg string, c *client) {
	if l.wants(slog.LevelDebug, c.luck, false) {
		l.process.Debug(msg, logClient, c.addr.String())
	}
}

// rankWriter takes in the encoded records of one level.
type rankWriter struct {
	l      *logger
	rank   int
	always bool // whatever waits
}

// Write takes one encoded record. It never blocks.
func (w rankWriter) Write(p []byte) (int, error) {
	l := w.l
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.records < l.cfg.LogBuffer && l.bytes < l.most || w.always {
		l.waiting.add(p, w.rank)
		l.records, l.bytes = l.records+1, l.bytes+len(p)
	} else {
		l.dropped[w.rank]++
		if l.unsaid++; l.unsaid == 1 {
			time.AfterFunc(time.Second, l.work.Signal)
		}
	}
	l.work.Signal()
	return len(p), nil
}

// drain writes until the logger is closed and nothing waits. After a write more may come for a while: a write(2) for each record
// would double what it costs.
func (l *logger) drain() {
	defer close(l.done)
	for closed := false; !closed; time.Sleep(time.Millisecond) {
		closed = l.take()
		if left := l.write(closed); len(left.text) > 0 {
			l.giveUp(left)
			return
		}
	}
}

// take makes what waits the batch, as soon as there is something to do.
func (l *logger) take() (closed bool) {
	owes := func() bool { return l.unsaid > 0 && (l.closed || time.Since(l.said) >= time.Second) } // so it says once a second at most
	l.mu.Lock()
	for len(l.waiting.text) == 0 && !l.closed && !owes() {
		l.work.Wait()
	}
	closed, unsaid := l.closed, int64(0)
	if owes() {
		unsaid, l.unsaid, l.said = l.unsaid, 0, time.Now()
	}
	l.mu.Unlock()
	if unsaid > 0 {
		l.drops.Log(context.Background(), l.dropLevel(), "log records dropped", "count", unsaid)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.batch, l.waiting = l.waiting, l.batch.emptied()
	return closed
}

// dropLevel is that of the record about drops, which LOG_LEVEL must not keep back.
func (l *logger) dropLevel() slog.Level { return max(slog.LevelWarn, l.cfg.LogLevel) }

// write writes the batch. What an error leaves of it still waits, and is tried again before anything else: a record that is torn spoils
// the next one in JSON, and all that follow in CBOR. A stdout that is gone is no reason to stop, so there is an end to that, and
// something left, only after the logger was closed.
func (l *logger) write(last bool) (left queue) {
	for left = l.batch; len(left.text) > 0; time.Sleep(100 * time.Millisecond) {
		n, _ := l.out.Write(left.text)
		l.mu.Lock()
		l.bytes -= n
		for i, n := range left.skip(n) {
			l.records -= int(n)
			l.written[i] += n
		}
		over := last || len(left.text) == 0
		last = l.closed
		l.mu.Unlock()
		if over {
			break
		}
	}
	return left
}

// giveUp counts what cannot be written as dropped.
func (l *logger) giveUp(left queue) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, q := range []*queue{&left, &l.waiting} {
		for i, n := range q.skip(len(q.text)) {
			l.dropped[i] += n
		}
	}
}

// count tells how many records of a rank were written and how many dropped so far.
func (l *logger) count(rank int) (written, dropped int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.written[rank], l.dropped[rank]
}

// close has drain write what is left, and waits for that while patience lasts.
func (l *logger) close(patience time.Duration) {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.work.Signal()
	select {
	case <-l.done:
	case <-time.After(patience):
	}
}

// lastWords is deferred by the goroutines whose panic ends the process: what waits is written before that.
func (l *logger) lastWords() {
	if p := recover(); p != nil {
		l.process.Error("panic", logType, tokenInternal, logMessage, fmt.Sprint(p), "stack", string(debug.Stack()))
		l.close(time.Second)
		panic(p)
	}
}

// record writes the one record of an exchange: info when served or given up by the client, warn when refused or not possible.
func (x *summary) record(f *failure) {
	level, msg := slog.LevelInfo, "request"
	if x.connect {
		msg = "tunnel"
	}
	if f != nil && f.token == tokenInternal {
		level = slog.LevelError
	} else if f != nil && f.token != tokenClient {
		level = slog.LevelWarn
	}
	x.srv.metrics.count(x, f)
	if log := x.srv.log; log.wants(level, x.luck, x.first) {
		x.describe(f)
		r := slog.NewRecord(x.end, level, msg, 0)
		r.AddAttrs(slog.Attr{Value: slog.GroupValue(x.attrs...)}) // a group without a name stands for its members, uncopied
		log.process.Handler().Handle(context.Background(), r)
	}
}

// describe lists what a record tells of x.
func (x *summary) describe(f *failure) {
	add := func(name, value string) {
		if value != "" {
			x.attrs = append(x.attrs, slog.String(name, value))
		}
	}
	add(logClient, x.c.addr.String())
	add(logUser, cut(x.user, mostTold))
	add(logMethod, cut(x.method, mostTold))
	add(logServer, string(x.dst.host))
	if path, query, _ := bytes.Cut(x.target, []byte("?")); !x.connect && len(x.dst.host) > 0 {
		add(logScheme, "http")
		add(logPath, cmp.Or(cut(path, mostTold), "/"))
		if x.srv.cfg.LogQuery {
			add(logQuery, cut(query, mostTold))
		}
	}
	if len(x.dst.host) > 0 {
		x.attrs = append(x.attrs, slog.Int(logPort, int(x.dst.port)), slog.String(logVersion, x.version))
	}
	if x.udp {
		add(logTransport, "udp")
	}
	if x.peer != "" {
		x.attrs = append(x.attrs, slog.String(logPeer, x.peer), slog.Bool(logReused, x.reused))
	}
	if x.status != 0 {
		x.attrs = append(x.attrs, slog.Int(logStatus, x.status))
	}
	x.attrs = append(x.attrs, slog.Int64(logUpSize, x.upBytes), slog.Int64(logDownSize, x.downSize),
		slog.Float64(logDuration, milliseconds(x.end.Sub(x.start))))
	if f != nil {
		add(logType, f.token)
		add(logMessage, cut(f.logged(), mostTold))
	}
	add(logClose, x.closed)
	add(logTrace, x.trace)
}

// traceID is the trace-id of a traceparent, "" when that is not well-formed (W3C Trace Context, 3.2): version-trace-parent-flags in
// lower-case hexadecimal, not all zero. Versions after 00 may add to it.
func traceID(parent string) string {
	if len(parent) < 55 || len(parent) > 55 && (parent[:2] == "00" || parent[55] != '-') {
		return ""
	}
	shaped := parent[2] == '-' && parent[35] == '-' && parent[52] == '-' && strings.Count(parent[:55], "-") == 3
	hex := strings.Trim(parent[:55], "-0123456789abcdef") == ""
	if !shaped || !hex || parent[:2] == "ff" || strings.Trim(parent[3:35], "0") == "" || strings.Trim(parent[36:52], "0") == "" {
		return ""
	}
	return parent[3:35]
}

// mostTold is how many bytes are told of what clients and origins choose.
const mostTold = 1024

// cut is text up to most bytes, and keeps nothing alive beyond these.
func cut[T string | []byte](text T, most int) string {
	if len(text) > most {
		return strings.Clone(string(text[:most]))
	}
	return string(text)
}

func milliseconds(d time.Duration) float64 { return math.Round(d.Seconds()*1e6) / 1e3 }

// cborHandler encodes a record as a map of CBOR (RFC 8949), its length left open; stdout carries a sequence of these (RFC 8742). Values
// are what JSON would have: times and addresses are texts, durations nanoseconds. Names are flat here, so groups are not told apart.
type cborHandler struct {
	level slog.Level
	out   io.Writer
	attrs []slog.Attr
	room  *sync.Pool // of *[]byte
}

func newCBORHandler(out io.Writer, level slog.Level) *cborHandler {
	return &cborHandler{level: level, out: out, room: &sync.Pool{New: func() any { return new([]byte) }}}
}

func (h *cborHandler) Enabled(_ context.Context, level slog.Level) bool { return level >= h.level }
func (h *cborHandler) WithGroup(string) slog.Handler                    { return h }

func (h *cborHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := *h
	with.attrs = append(slices.Clip(with.attrs), attrs...)
	return &with
}

func (h *cborHandler) Handle(_ context.Context, r slog.Record) error {
	room := h.room.Get().(*[]byte)
	defer h.room.Put(room)
	b := append((*room)[:0], cborMap|cborOpen)
	b = appendCBOR(b, slog.Time(slog.TimeKey, r.Time))
	b = appendCBOR(b, slog.String(slog.LevelKey, r.Level.String()))
	b = appendCBOR(b, slog.String(slog.MessageKey, r.Message))
	for _, a := range h.attrs {
		b = appendCBOR(b, a)
	}
	r.Attrs(func(a slog.Attr) bool { b = appendCBOR(b, a); return true })
	*room = append(b, cborBreak)
	_, err := h.out.Write(*room)
	return err
}

// The first byte of a data item: major type, and how long it is or what it is (RFC 8949, 3).
const (
	cborUint, cborNegative, cborText, cborArray, cborMap = 0 << 5, 1 << 5, 3 << 5, 4 << 5, 5 << 5
	cborFalse, cborTrue, cborNull, cborFloat, cborBreak  = 7<<5 | 20, 7<<5 | 21, 7<<5 | 22, 7<<5 | 27, 7<<5 | 31

	cborOpen = 31 // a length that is not told: cborBreak ends it
)

// appendHead appends the head of a data item, in its shortest form.
func appendHead(b []byte, major byte, n uint64) []byte {
	switch {
	case n < 24:
		return append(b, major|byte(n))
	case n <= math.MaxUint8:
		return append(b, major|24, byte(n))
	case n <= math.MaxUint16:
		return binary.BigEndian.AppendUint16(append(b, major|25), uint16(n))
	case n <= math.MaxUint32:
		return binary.BigEndian.AppendUint32(append(b, major|26), uint32(n))
	}
	return binary.BigEndian.AppendUint64(append(b, major|27), n)
}

// appendText appends a text. What is no UTF-8 in it, which CBOR forbids, becomes U+FFFD, as in JSON.
func appendText(b []byte, s string) []byte {
	if !utf8.ValidString(s) {
		s = strings.ToValidUTF8(s, "\uFFFD")
	}
	return append(appendHead(b, cborText, uint64(len(s))), s...)
}

func appendInt(b []byte, n int64) []byte {
	if n < 0 {
		return appendHead(b, cborNegative, uint64(^n))
	}
	return appendHead(b, cborUint, uint64(n))
}

// appendCBOR appends an attribute, a name and a value, or the members of a group.
func appendCBOR(b []byte, a slog.Attr) []byte {
	v := a.Value.Resolve()
	if v.Kind() == slog.KindGroup {
		for _, member := range v.Group() {
			b = appendCBOR(b, member)
		}
		return b
	}
	b = appendText(b, a.Key)
	switch v.Kind() {
	case slog.KindString:
		return appendText(b, v.String())
	case slog.KindBool:
		if v.Bool() {
			return append(b, cborTrue)
		}
		return append(b, cborFalse)
	case slog.KindUint64:
		return appendHead(b, cborUint, v.Uint64())
	case slog.KindInt64:
		return appendInt(b, v.Int64())
	case slog.KindDuration:
		return appendInt(b, int64(v.Duration()))
	case slog.KindFloat64:
		return binary.BigEndian.AppendUint64(append(b, cborFloat), math.Float64bits(v.Float64()))
	case slog.KindTime:
		return appendText(b, v.Time().Format(time.RFC3339Nano))
	}
	list := reflect.ValueOf(v.Any())
	if list.Kind() != reflect.Slice {
		return appendText(b, v.String())
	}
	b = appendHead(b, cborArray, uint64(list.Len()))
	for i := range list.Len() {
		b = appendText(b, fmt.Sprint(list.Index(i)))
	}
	return b
}

// printLogs turns a sequence of what cborHandler makes into lines of JSON.
func printLogs(in io.Reader, out io.Writer) (err error) {
	r, w := bufio.NewReader(in), bufio.NewWriter(out)
	for line := []byte{}; err == nil; line = line[:0] {
		if _, err = r.Peek(1); err == io.EOF {
			return w.Flush()
		} else if line, err = appendJSON(line, r, 8); err == nil {
			_, err = w.Write(append(line, '\n'))
		}
		if r.Buffered() == 0 || err != nil { // somebody may be waiting for it
			err = cmp.Or(err, w.Flush())
		}
	}
	return fmt.Errorf("these are not CBOR logs: %w", err)
}

// appendJSON appends the next data item as JSON. It takes what cborHandler makes, nested up to depth.
func appendJSON(b []byte, r *bufio.Reader, depth int) ([]byte, error) {
	first, n, err := readHead(r)
	switch major := first &^ 31; {
	case err != nil:
		return b, err
	case major == cborUint:
		return strconv.AppendUint(b, n, 10), nil
	case major == cborNegative && n <= math.MaxInt64:
		return strconv.AppendInt(b, ^int64(n), 10), nil
	case major == cborText && n <= 1<<20 && first != cborText|cborOpen:
		text := make([]byte, n)
		_, err = io.ReadFull(r, text)
		quoted, _ := json.Marshal(string(text)) // a string never fails
		return append(b, quoted...), err
	case first == cborFalse, first == cborTrue, first == cborNull:
		return append(b, map[byte]string{cborFalse: "false", cborTrue: "true", cborNull: "null"}[first]...), nil
	case first == cborFloat:
		text, err := json.Marshal(math.Float64frombits(n))
		return append(b, text...), err
	case (major == cborArray || major == cborMap) && depth > 0:
		return appendMembers(b, r, first, n, depth-1)
	}
	return b, fmt.Errorf("a data item that begins with 0x%02x is not expected", first)
}

// appendMembers appends the n members of an array or a map, or those up to cborBreak.
func appendMembers(b []byte, r *bufio.Reader, first byte, n uint64, depth int) (_ []byte, err error) {
	open, ends := first&31 == cborOpen, map[bool]string{true: "{}", false: "[]"}[first&^31 == cborMap]
	b = append(b, ends[0])
	for i := uint64(0); err == nil && (open || i < n); i++ {
		if next, _ := r.Peek(1); open && len(next) == 1 && next[0] == cborBreak {
			r.ReadByte()
			break
		}
		if i > 0 {
			b = append(b, ',')
		}
		if ends == "{}" {
			if next, _ := r.Peek(1); len(next) == 1 && next[0]&^31 != cborText {
				return b, errors.New("a name is not a text")
			} else if b, err = appendJSON(b, r, depth); err != nil {
				return b, err
			}
			b = append(b, ':')
		}
		b, err = appendJSON(b, r, depth)
	}
	return append(b, ends[1]), err
}

// readHead reads the head of a data item: its first byte, and the number that this holds or that follows.
func readHead(r io.Reader) (first byte, n uint64, err error) {
	var b [9]byte
	if _, err = io.ReadFull(r, b[:1]); err != nil {
		return 0, 0, io.ErrUnexpectedEOF
	}
	size := b[0] & 31
	if size < 24 || size == cborOpen && b[0] >= cborText { // numbers have a length
		return b[0], uint64(size), nil
	} else if size > 27 {
		return b[0], 0, fmt.Errorf("0x%02x begins no data item", b[0])
	}
	width := 1 << (size - 24)
	_, err = io.ReadFull(r, b[9-width:])
	first = b[0]
	b[0] = 0
	return first, binary.BigEndian.Uint64(b[1:]), err
}

// ---------------------------------------------------------------------------------------------------------------------
// Metrics

// telemetry counts what the forwarder does. No label takes a value that a client or an origin chooses freely.
type telemetry struct {
	registry                            *prometheus.Registry
	requests                            *prometheus.CounterVec // by method, code and reason
	rejected, denied, ended             *prometheus.CounterVec // connections, requests, tunnels; by reason
	duration, wait, connect, tunnelTime prometheus.Histogram
	accepted, up, down, reused, dialled prometheus.Counter
	audited                             prometheus.Counter // requests that would have been denied
	hits, misses, stales, errors        prometheus.Counter // of lookups
	clients, tunnels, upstreams         atomic.Int64       // connections and tunnels that are open

	mu       sync.Mutex // guards what follows
	failures []failed   // the last twenty, oldest first
	history  []sample   // of the last two minutes, oldest first
}

// newTelemetry registers what is counted as it happens.
func newTelemetry() *telemetry {
	m := &telemetry{registry: prometheus.NewRegistry()}
	m.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	auto := promauto.With(m.registry)
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		return auto.NewCounterVec(prometheus.CounterOpts{Name: "sluice_" + name, Help: help}, labels)
	}
	histogram := func(name, help string, seconds ...float64) prometheus.Histogram {
		return auto.NewHistogram(prometheus.HistogramOpts{Name: "sluice_" + name, Help: help, Buckets: seconds,
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 160, NativeHistogramMinResetDuration: time.Hour})
	}
	short := []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}

	m.requests = counters("requests_total", "Requests that were answered or given up; one for a tunnel counts when that opens.", "method", "code", "reason")
	m.duration = histogram("request_duration_seconds", "From a request's head to the end of its response, tunnels apart.", short...)
	m.wait = histogram("response_wait_seconds", "From the end of a request that was passed on to the head of its response.", short...)
	m.denied = counters("denied_total", "Requests and connections that policy denied.", "reason")
	m.audited = counters("would_deny_total", "Requests that a rule about hosts or ports would have denied, had SLUICE_MODE=audit not let them through.", "reason").WithLabelValues(tokenDenied)
	m.connect = histogram("connect_duration_seconds", "Connecting to an origin, its name's lookup apart.", short...)
	m.accepted = counters("client_connections_total", "Client connections, those that were rejected among them.").WithLabelValues()
	m.rejected = counters("client_connections_rejected_total", "Client connections that were answered before they sent a request.", "reason")
	m.ended = counters("tunnels_total", "Tunnels that have ended, by what ended them.", "reason")
	m.tunnelTime = histogram("tunnel_duration_seconds", "From the request for a tunnel to its end.", .1, .5, 1, 5, 10, 30, 60, 300, 600, 1800, 3600, 14400)
	moved := counters("bytes_total", "Bytes of bodies and tunnels, up to origins and down to clients.", "direction")
	m.up, m.down = moved.WithLabelValues("up"), moved.WithLabelValues("down")
	pool := counters("pool_requests_total", "Connections to origins that were taken for a request; one that is sent again, since a reused one was dead, takes two.", "result")
	m.reused, m.dialled = pool.WithLabelValues("reused"), pool.WithLabelValues("dialled")
	names := counters("dns_lookups_total", "Names looked up: hit = the answer was remembered, miss = a resolver was asked, stale = in vain, but an old answer served, error = in vain.", "result")
	m.hits, m.misses, m.stales, m.errors = names.WithLabelValues("hit"), names.WithLabelValues("miss"), names.WithLabelValues("stale"), names.WithLabelValues("error")
	for vec, reasons := range map[*prometheus.CounterVec]string{m.denied: tokenDenied + " " + tokenProhibited, m.rejected: tokenDenied + " " + tokenLimit,
		m.ended: "client_closed upstream_closed idle_timeout half_close_timeout max_age drain connection_error internal_error"} {
		for reason := range strings.FieldsSeq(reasons) {
			vec.WithLabelValues(reason) // so that it is there before it happens: rate() sees the first one too
		}
	}
	return m
}

// watch registers what is read when it is asked for.
func (m *telemetry) watch(s *server) {
	auto := promauto.With(m.registry)
	gauge := func(name, help string, labels prometheus.Labels, f func() float64) {
		auto.NewGaugeFunc(prometheus.GaugeOpts{Name: "sluice_" + name, Help: help, ConstLabels: labels}, f)
	}
	number := func(name, help string, n func() int64) {
		gauge(name, help, nil, func() float64 { return float64(n()) })
	}
	number("client_connections", "Client connections that are open.", m.clients.Load)
	number("client_connections_limit", "How many may be open (SLUICE_MAX_CONNS); 0 = any number.", func() int64 { return int64(s.limits.conns.most) })
	number("tunnels", "Tunnels that are open.", m.tunnels.Load)
	number("tunnels_limit", "How many may be open (SLUICE_MAX_TUNNELS); 0 = any number.", func() int64 { return int64(s.cfg.MaxTunnels) })
	number("pool_idle_connections", "Connections to origins that wait for a request.", s.pool.size)
	number("pool_active_connections", "Connections to origins that carry a request.", func() int64 { return max(0, m.upstreams.Load()-s.pool.size()-m.tunnels.Load()) })
	number("ready", "1 while connections are accepted, 0 while draining.", func() int64 { return map[bool]int64{true: 1}[s.ready()] })
	gauge("build_info", "1, of the version in the label.", prometheus.Labels{"version": version, "goversion": runtime.Version()}, func() float64 { return 1 })
	counter := func(name, help string, labels prometheus.Labels, n func() int64) {
		auto.NewCounterFunc(prometheus.CounterOpts{Name: "sluice_" + name, Help: help, ConstLabels: labels}, func() float64 { return float64(n()) })
	}
	counter("panics_total", "Faults that ended a connection.", nil, s.panics.Load)
	for i, level := range []string{"debug", "info", "warn", "error"} {
		records := func(result string, n func() int64) {
			counter("log_records_total", "Log records that were written, left out by SLUICE_LOG_SAMPLE, or dropped: they found SLUICE_LOG_BUFFER full, or could not be written until the end.",
				prometheus.Labels{"level": level, "result": result}, n)
		}
		records("sampled", s.log.sampled[i].Load)
		records("written", func() int64 { written, _ := s.log.count(i); return written })
		records("dropped", func() int64 { _, dropped := s.log.count(i); return dropped })
	}
}

// tally is the counter that an exchange last added to: to look one up by its labels takes 100 ns.
type tally struct {
	method, reason string
	status         int
	counter        prometheus.Counter
}

// answered counts a request.
func (m *telemetry) answered(x *summary, reason string) {
	o := &x.tally
	if o.counter == nil || o.method != string(x.method) || o.status != x.status || o.reason != reason {
		method := methodLabel(string(x.method))
		*o = tally{method, reason, x.status, m.requests.WithLabelValues(method, codeLabel(x.status), reason)}
	}
	o.counter.Inc()
	if x.audited && reason != tokenDenied && reason != tokenProhibited { // nothing else has denied it
		m.audited.Inc()
	}
}

// methodLabel is method if it is registered with IANA, else OTHER.
func methodLabel(method string) string {
	const registered = " GET HEAD POST PUT DELETE CONNECT OPTIONS TRACE PATCH ACL BASELINE-CONTROL BIND CHECKIN CHECKOUT COPY LABEL LINK LOCK MERGE" +
		" MKACTIVITY MKCALENDAR MKCOL MKREDIRECTREF MKWORKSPACE MOVE ORDERPATCH PRI PROPFIND PROPPATCH QUERY REBIND REPORT SEARCH UNBIND UNCHECKOUT" +
		" UNLINK UNLOCK UPDATE UPDATEREDIRECTREF VERSION-CONTROL "
	if i := strings.Index(registered, " "+method+" "); i >= 0 && method != "" {
		return registered[i+1 : i+1+len(method)]
	}
	return "OTHER"
}

// codeLabel is a status code that is registered, else its class, such as 2xx; 0 = nobody was answered.
func codeLabel(status int) string {
	if status != 0 && http.StatusText(status) == "" {
		return strconv.Itoa(status/100) + "xx"
	}
	return strconv.Itoa(status)
}

// moved counts n bytes of a body or tunnel, down to the client or up to the origin.
func (m *telemetry) moved(n int, down bool) {
	if down {
		m.down.Add(float64(n))
	} else {
		m.up.Add(float64(n))
	}
}

// opened counts a tunnel whose client has been told that it is open.
func (m *telemetry) opened(x *summary) {
	m.tunnels.Add(1)
	m.answered(x, "")
}

// count takes in what has ended: a request, a tunnel, or a connection that was rejected.
func (m *telemetry) count(x *summary, f *failure) {
	took, reason := x.end.Sub(x.start).Seconds(), ""
	if x.closed != "" {
		m.tunnels.Add(-1)
		m.ended.WithLabelValues(x.closed).Inc()
		m.tunnelTime.Observe(took)
		return
	}
	if f != nil {
		reason = f.token
		m.note(x, f)
	}
	if x.c.rejected {
		m.rejected.WithLabelValues(reason).Inc()
		return
	}
	m.answered(x, reason)
	m.duration.Observe(took)
}

// failed is a failure as the status page tells of it.
type failed struct {
	Time    time.Time `json:"time"`
	Client  string    `json:"client"`
	User    string    `json:"user"`
	Method  string    `json:"method"`
	Server  string    `json:"server"`
	Port    uint16    `json:"port"`
	Status  int       `json:"status"`
	Type    string    `json:"type"`
	Message string    `json:"message"`
}

// note keeps a failure for the status page, and counts a denial.
func (m *telemetry) note(x *summary, f *failure) {
	if f.token == tokenClient {
		return
	} else if f.token == tokenDenied || f.token == tokenProhibited {
		m.denied.WithLabelValues(f.token).Inc()
	}
	n := failed{x.end, x.c.addr.String(), cut(x.user, mostTold), cut(x.method, 32), string(x.dst.host), x.dst.port, x.status, f.token, cut(f.logged(), mostTold)}
	if !m.mu.TryLock() { // a flood would queue here, and only the last twenty are kept
		return
	}
	defer m.mu.Unlock()
	m.failures = append(m.failures[max(0, len(m.failures)-19):], n)
}

// sample is what had happened by a time, in s since 1970.
type sample struct {
	Time     int64   `json:"time"`
	Requests float64 `json:"requests"`
	Tunnels  float64 `json:"tunnels"`
	Up       float64 `json:"up"`
	Down     float64 `json:"down"`
}

// remember takes a sample every second, until ctx ends.
func (m *telemetry) remember(ctx context.Context) {
	for tick := time.Tick(time.Second); ; {
		now := sample{time.Now().Unix(), total(m.duration), total(m.tunnelTime) + float64(m.tunnels.Load()), total(m.up), total(m.down)}
		m.mu.Lock()
		m.history = append(m.history[max(0, len(m.history)-119):], now)
		m.mu.Unlock()
		select {
		case <-tick:
		case <-ctx.Done():
			return
		}
	}
}

// total is the value of a counter, or how much a histogram has observed.
func total(m prometheus.Metric) float64 {
	var d dto.Metric
	m.Write(&d)
	return d.GetCounter().GetValue() + float64(d.GetHistogram().GetSampleCount())
}

// ---------------------------------------------------------------------------------------------------------------------
// Admin

// newAdmin serves what orchestrators, Prometheus and people ask. It is never served on LISTEN.
func newAdmin(s *server) *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !s.ready() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		fmt.Fprintln(w, s.state())
	})
	mux.HandleFunc("POST /drain", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "0")
		w.WriteHeader(http.StatusAccepted)
		http.NewResponseController(w).Flush() // before the drain, at whose end this listener is closed
		s.stop()
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.metrics.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 8}))
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("GET /status.json", s.serveStatus)
	mux.HandleFunc("GET /{$}", servePage())
	return &http.Server{Handler: guard(mux), ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute,
		ErrorLog: slog.NewLogLogger(s.log.process.Handler(), slog.LevelDebug)}
}

// guard keeps the web pages of a browser out that can reach this listener: what they post here or load from here (CSRF; a profile costs
// seconds of CPU), and what they ask of a name that they have made resolve to it (DNS rebinding), on a loopback address whatever that is,
// on others, which may be what a container's published port leads to, if it changes something.
func guard(next http.Handler) http.Handler {
	return http.NewCrossOriginProtection().Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
		changes := r.Method == http.MethodPost && r.Header.Get("Origin") != ""
		named := r.Host != "" && !isAddress(r.Host, 0) && !isAddress(r.Host+":0", 0)
		site, follows := r.Header.Get("Sec-Fetch-Site"), r.Header.Get("Sec-Fetch-Mode") == "navigate" // a link, or an address typed in
		switch {
		case named && (changes || addrPort(local).Addr().IsLoopback()):
			http.Error(w, "on a loopback address, and to what changes anything, this answers to addresses and to localhost only", http.StatusMisdirectedRequest)
		case (site == "cross-site" || site == "same-site") && (!follows || strings.HasPrefix(r.URL.Path, "/debug/pprof/")):
			http.Error(w, "this does not answer to other web pages", http.StatusForbidden)
		default:
			next.ServeHTTP(w, r)
		}
	}))
}

// ready reports whether connections are accepted.
func (s *server) ready() bool { return s.state() == "ready" }

func (s *server) state() string {
	if s.draining.Load() {
		return "draining"
	} else if s.accepts.Load() {
		return "ready"
	}
	return "starting"
}

// servePage serves the status page, which may run its own script alone and ask nobody but this listener.
func servePage() http.HandlerFunc {
	page, _ := files.ReadFile("status.html")
	_, script, _ := bytes.Cut(page, []byte("<script>"))
	script, _, _ = bytes.Cut(script, []byte("</script>"))
	digest := sha256.Sum256(script)
	policy := "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; script-src 'sha256-" +
		base64.StdEncoding.EncodeToString(digest[:]) + "'"
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Security-Policy", policy)
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Header().Set("Cache-Control", "no-store")
		w.Write(page)
	}
}

// finding is what was found of a kernel setting and what is wanted of it.
type finding struct {
	Setting string `json:"setting"`
	Before  string `json:"before,omitempty"` // what TUNE=apply has overwritten
	Found   string `json:"found"`
	Wanted  string `json:"wanted"`
	Verdict string `json:"verdict"`
	Change  string `json:"change"` // who can change it
	Why     string `json:"why"`
	Mend    string `json:"mend,omitempty"` // of compose.yaml: `section: {key: value}` or `key: value`; or a comment
}

// What becomes of a setting.
const (
	verdictOK      = "ok"
	verdictShort   = "short"   // of what the configuration needs
	verdictAdvice  = "advice"  // another value helps in the case that Why tells of
	verdictUnknown = "unknown" // it cannot be read
)

// printTune prints what there is of kernel settings and the lines for a compose file that mend them, and gives the exit status: 1 when
// something falls short. It writes no setting.
func printTune(environ []string, stdout, stderr io.Writer) int {
	cfg, _, err := loadConfig(environ)
	if err != nil {
		return exitStatus(err, stderr)
	}
	cfg.Tune = "check"
	findings, status := tuneKernel(cfg, slog.New(slog.DiscardHandler)), 0
	t := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "SETTING\tFOUND\tWANTED\tVERDICT\tCHANGED BY\tWHY")
	for _, f := range findings {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", f.Setting, f.Found, f.Wanted, f.Verdict, f.Change, f.Why)
		if f.Verdict == verdictShort {
			status = 1
		}
	}
	if err := t.Flush(); err != nil {
		return exitStatus(err, stderr)
	}
	if findings == nil {
		fmt.Fprintln(stdout, "They are examined on Linux alone.")
	}
	printMending(findings, stdout)
	return status
}

// printMending prints a file that, after compose.yaml, mends findings, and as comments what no such file can. A service with nothing in it
// would be no mapping to Compose.
func printMending(findings []finding, out io.Writer) {
	var sections, comments []string
	lines := map[string]string{} // by section
	for _, f := range findings {
		section, line, nested := strings.Cut(f.Mend, ": {")
		switch {
		case f.Mend == "":
			continue
		case strings.HasPrefix(f.Mend, "#"):
			comments = append(comments, f.Mend)
			continue
		case nested:
			section, line = section+":", "\n      "+strings.TrimSuffix(line, "}")
		}
		if f.Verdict == verdictAdvice {
			line += " # advice"
		}
		if lines[section] == "" {
			sections = append(sections, section)
		}
		lines[section] += line
	}
	if sections != nil {
		fmt.Fprint(out, "\n# compose.override.yaml\nservices:\n  proxy:\n")
	}
	for _, section := range sections {
		fmt.Fprintf(out, "    %s%s\n", section, lines[section])
	}
	if comments != nil {
		fmt.Fprintf(out, "\n%s\n", strings.Join(comments, "\n"))
	}
}

// setting is a variable as the status page tells of it.
type setting struct {
	Name    string `json:"name"`
	Value   string `json:"value"`
	Default string `json:"default"`
	Origin  string `json:"origin"`
	Meaning string `json:"meaning"`
}

// visits is how many requests and tunnels went to a destination.
type visits struct {
	Host     string `json:"host"`
	Requests int64  `json:"requests"`
}

// serveStatus serves what the status page shows. Metrics are in the form of Prometheus's data model.
func (s *server) serveStatus(w http.ResponseWriter, _ *http.Request) {
	families, err := s.metrics.registry.Gather()
	families = slices.DeleteFunc(families, func(f *dto.MetricFamily) bool { // what the page has no use for
		name := f.GetName()
		return !strings.HasPrefix(name, "sluice_") && !strings.HasPrefix(name, "process_") && name != "go_goroutines" && name != "go_gc_gomemlimit_bytes"
	})
	m := s.metrics
	m.mu.Lock()
	history, failures := slices.Clone(m.history), slices.Clone(m.failures)
	m.mu.Unlock()
	slices.Reverse(failures)
	settings := []setting{}
	for _, v := range s.vars {
		settings = append(settings, setting{envPrefix + v.name, v.shown(), v.def, v.origin, v.doc})
	}
	text, bad := json.Marshal(map[string]any{"name": s.cfg.Name, "version": version, "started": s.started, "now": time.Now(), "state": s.state(), "mode": s.cfg.Mode,
		"metrics": families, "history": history, "failures": failures, "destinations": s.reached.top(10), "kernel": s.findings, "config": settings})
	if err = cmp.Or(err, bad); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Write(text)
}

// top lists the destinations with the most requests, at most n.
func (c *contacts) top(n int) []visits {
	c.mu.Lock()
	all := make([]visits, 0, len(c.keys))
	for key, requests := range c.keys {
		all = append(all, visits{key, requests.Load()})
	}
	c.mu.Unlock()
	slices.SortFunc(all, func(a, b visits) int {
		return cmp.Or(cmp.Compare(b.Requests, a.Requests), strings.Compare(a.Host, b.Host))
	})
	return all[:min(n, len(all))]
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
	// Not http.DefaultTransport: HTTP_PROXY may well name the proxy that is asked about.
	client := http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{}}
	resp, err := client.Head("http://" + cfg.Admin + "/readyz") // no host, or an unspecified one, is this host to net.Dial
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("not ready: %s", resp.Status)
	}
	return err
}
