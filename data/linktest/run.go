package linktest

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"net"
	"sync"
	"time"

	"forerun/block"
)

// Options say what Run measures. Addr and TLS are needed, zero elsewhere means
// the default.
type Options struct {
	// Addr is HOST:PORT of the backend, and TLS the settings of a client that the
	// backend lets in (pki.ClientTLS).
	Addr string
	TLS  *tls.Config
	// Dial makes the connections below TLS; net.Dialer's if nil.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// Connections is how many carry bulk at once, at most, default 4, up to 15.
	Connections int
	// Time is how long a download phase takes, default 5 s, from 100 ms to
	// MaxDuration; upload phases take three fifths of it.
	Time time.Duration
	// Bytes bounds what each connection moves in a phase, 0 for no bound.
	Bytes int64
	// Force tests although the backend serves workloads.
	Force bool
	// Say is told what happens, a line at a time; nil for nobody.
	Say func(line string)
}

const (
	defaultConnections = 4
	defaultTime        = 5 * time.Second
	shortest           = 100 * time.Millisecond
	coldPings          = 3
	idlePings          = 30
	// nearBest is the share of the best rate that counts as reaching it.
	nearBest = 0.95
)

// Direction says which way bulk went.
type Direction string

// The directions, as the new home sees them: a download is what reads and
// fill are, an upload is write-back.
const (
	Download Direction = "download"
	Upload   Direction = "upload"
)

// RTT describes round trips, in milliseconds.
type RTT struct {
	Samples  int     `json:"samples"`
	MinMS    float64 `json:"min_ms"`
	MedianMS float64 `json:"median_ms"`
	P95MS    float64 `json:"p95_ms"`
	MaxMS    float64 `json:"max_ms"`
	// JitterMS is the mean difference between neighbours.
	JitterMS float64 `json:"jitter_ms"`
}

// Loss is what the sender's TCP sent again.
type Loss struct {
	Segments int64   `json:"segments"` // sent, each time counted
	Again    int64   `json:"retransmitted"`
	Share    float64 `json:"share"` // 0 to 1
}

// Phase is bulk in one direction over some connections at once.
type Phase struct {
	Direction   Direction `json:"direction"`
	Connections int       `json:"connections"`
	// Seconds is the length of the window that was measured.
	Seconds float64 `json:"measured_s"`
	// Rate is payload bytes a second, without what TLS, TCP and IP add.
	Rate float64 `json:"rate_bytes_s"`
	// Moved is all payload bytes of the phase.
	Moved int64 `json:"moved_bytes"`
	// RTT is that of pings meanwhile, BloatMS how far its median is above the
	// idle line's, and Grade that in a word.
	RTT     RTT     `json:"rtt"`
	BloatMS float64 `json:"bloat_ms"`
	Grade   string  `json:"bloat"`
	// Loss is nil where the sender's system does not tell.
	Loss *Loss `json:"loss"`
	// Congestion is the sender's congestion control, empty where unknown.
	Congestion string `json:"congestion_control,omitempty"`
}

// Result is what Run found.
type Result struct {
	Backend   string  `json:"backend"`
	Idle      RTT     `json:"idle"`
	Downloads []Phase `json:"downloads"` // by rising number of connections
	Uploads   []Phase `json:"uploads"`
}

// Grade says in a word how much longer the round trip of a full line is, in
// milliseconds: none, slight, noticeable, heavy or severe.
func Grade(bloatMS float64) string {
	switch {
	case bloatMS < 5:
		return "none"
	case bloatMS < 30:
		return "slight"
	case bloatMS < 100:
		return "noticeable"
	case bloatMS < 400:
		return "heavy"
	}
	return "severe"
}

// Run measures the line to a backend. It takes about 2.5 s and 3.2 to 4.2 times
// Options.Time. Errors: KindInvalid for options that make no sense,
// KindUnavailable when the backend cannot be reached, KindDenied when a
// certificate is not accepted, KindUnsupported when the backend is older than
// this protocol, KindBusy when it has workloads or tests under way,
// KindCanceled when ctx ends.
func Run(ctx context.Context, o Options) (res Result, err error) {
	if err := o.check(); err != nil {
		return res, err
	}
	outer := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(errEnough)
	r := &run{o: o, hello: hello{force: o.Force}, t0: time.Now(), noise: noise()}
	rand.Read(r.hello.id[:])
	c, err := o.dial(ctx, r.hello)
	if err != nil {
		return res, err
	}
	r.pings = newPinger(ctx, c, r.t0, func(err error) { cancel(err) })
	defer r.pings.close()
	switch {
	case o.Connections > c.welcome.conns-1:
		return res, invalid("%d connections are too many, the backend allows %d", o.Connections, c.welcome.conns-1)
	case o.Time > c.welcome.longest:
		return res, invalid("%s a phase are too long, the backend allows %s", o.Time, c.welcome.longest)
	}
	if res, err = r.all(ctx); err != nil && outer.Err() == nil && context.Cause(ctx) != nil {
		err = context.Cause(ctx) // the first thing that went wrong
	}
	return res, err
}

func invalid(format string, args ...any) error {
	return &block.Error{Op: "linktest", Kind: block.KindInvalid, Err: fmt.Errorf(format, args...)}
}

func (o *Options) check() error {
	if o.Connections == 0 {
		o.Connections = defaultConnections
	}
	if o.Time == 0 {
		o.Time = defaultTime
	}
	if o.Say == nil {
		o.Say = func(string) {}
	}
	switch {
	case o.TLS == nil || o.Addr == "":
		return invalid("an address and TLS settings are needed")
	case o.Connections < 1 || o.Connections >= MaxConns:
		return invalid("%d connections: there can be 1 to %d", o.Connections, MaxConns-1)
	case o.Time < shortest || o.Time > MaxDuration:
		return invalid("a phase of %s: it can take %s to %s", o.Time, shortest, MaxDuration)
	case o.Bytes < 0:
		return invalid("a bound of %d bytes", o.Bytes)
	}
	return nil
}

type run struct {
	o     Options
	hello hello
	t0    time.Time
	pings *pinger
	noise [][]byte
	idle  RTT
}

// all is the test from idle to the last upload.
func (r *run) all(ctx context.Context) (res Result, err error) {
	res.Backend = r.o.Addr
	r.o.Say("measuring the round trip of the idle line")
	// The first ones find a cold path.
	begin := time.Since(r.t0) + coldPings*pingEvery
	d, err := r.pings.between(ctx, begin, begin+idlePings*pingEvery)
	if err != nil {
		return res, err
	}
	r.idle = summary(d)
	res.Idle = r.idle
	r.o.Say(fmt.Sprintf("round trip %.1f ms", r.idle.MedianMS))
	if res.Downloads, err = r.direction(ctx, Download, r.o.Time); err != nil {
		return res, err
	}
	res.Uploads, err = r.direction(ctx, Upload, max(r.o.Time*3/5, shortest))
	return res, err
}

// direction measures with one connection and with all. Where one is not enough,
// a download also shows how many are.
func (r *run) direction(ctx context.Context, way Direction, d time.Duration) (out []Phase, err error) {
	one, err := r.phase(ctx, way, 1, d)
	if err != nil || r.o.Connections == 1 {
		return []Phase{one}, err
	}
	all, err := r.phase(ctx, way, r.o.Connections, d)
	if err != nil {
		return nil, err
	}
	out = []Phase{one}
	if way == Download {
		for k := 2; k < r.o.Connections && out[len(out)-1].Rate < nearBest*all.Rate; k *= 2 {
			p, err := r.phase(ctx, way, k, d)
			if err != nil {
				return nil, err
			}
			out = append(out, p)
		}
	}
	return append(out, all), nil
}

// phase is bulk over k new connections.
func (r *run) phase(ctx context.Context, way Direction, k int, d time.Duration) (p Phase, err error) {
	rtt := time.Duration(r.idle.MedianMS * float64(time.Millisecond))
	o := order{duration: d, skip: min(max(time.Second, 10*rtt), d/2), bytes: uint64(r.o.Bytes)}
	noun := "connections"
	if k == 1 {
		noun = "connection"
	}
	r.o.Say(fmt.Sprintf("%s over %d %s, %s", way, k, noun, d))
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(errEnough)
	each := func(f func(i int) error) error {
		var wg sync.WaitGroup
		for i := range k {
			wg.Go(func() {
				if err := f(i); err != nil {
					cancel(err) // the others end, and the first error is the cause
				}
			})
		}
		wg.Wait()
		return context.Cause(ctx)
	}
	conns, tracks, reports := make([]*conn, k), make([]track, k), make([]report, k)
	defer func() {
		for _, c := range conns {
			if c != nil {
				c.close()
			}
		}
	}()
	err = each(func(i int) (err error) {
		conns[i], err = r.o.dial(ctx, r.hello)
		return err
	})
	if err != nil {
		return p, err
	}
	err = each(func(i int) (err error) {
		if way == Download {
			tracks[i], reports[i], err = conns[i].download(ctx, r.t0, o)
		} else {
			tracks[i], reports[i], err = conns[i].upload(ctx, r.t0, r.noise, o)
		}
		return err
	})
	if err != nil {
		return p, err
	}
	from, to := window(tracks, o.skip, d)
	p = Phase{Direction: way, Connections: k, Seconds: max(to-from, 0).Seconds(), Rate: rate(tracks, from, to)}
	loss := &Loss{}
	for i := range reports {
		p.Moved += tracks[i].total
		if loss != nil && reports[i].known {
			loss.Segments += int64(reports[i].tcp.segments)
			loss.Again += int64(reports[i].tcp.again)
			p.Congestion = reports[i].tcp.congestion
		} else {
			loss = nil
		}
	}
	if loss != nil && loss.Segments > 0 {
		loss.Share = float64(loss.Again) / float64(loss.Segments)
		p.Loss = loss
	}
	if p.Rate <= 0 {
		return p, &block.Error{Op: "linktest", Object: r.o.Addr, Kind: block.KindInvalid,
			Err: fmt.Errorf("%d bytes in %s are too few to tell a rate; give it more time or a larger bound", p.Moved, way)}
	}
	under, err := r.pings.between(ctx, from, to)
	if err != nil {
		return p, err
	}
	if len(under) > 0 {
		p.RTT = summary(under)
		p.BloatMS = max(p.RTT.MedianMS-r.idle.MedianMS, 0)
		p.Grade = Grade(p.BloatMS)
	} else {
		p.Grade = "unknown" // over before the next ping
	}
	r.o.Say(fmt.Sprintf("%s over %d %s: %s, round trip %.1f ms", way, k, noun, Mbit(p.Rate), p.RTT.MedianMS))
	return p, nil
}
