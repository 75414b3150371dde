package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"forerun/lab/netns"
)

// LinkParts are the parts of Link, in the order they run.
var LinkParts = []string{"a", "a2", "b", "c", "d", "e", "f"}

// LinkOptions are what Link needs beside Options.
type LinkOptions struct {
	Options
	// Parts to run, of LinkParts; empty is all, without a2 when Quick is set.
	Parts []string
	// N is how often each measurement is repeated, 0 is 5, or 1 when Quick is set.
	N int
	// Quick takes a handful of points.
	Quick bool
	// One makes Rate, RTT, Queue and Loss the only point of parts a and b.
	One   bool
	Queue time.Duration
	Loss  float64
	// Alone leaves out the peers that no bar is about.
	Alone bool
	// Congestion is the TCP congestion control of both sites, empty is the host's.
	Congestion string
	// FrontendArgs and BackendArgs are appended to the daemons' command lines.
	FrontendArgs, BackendArgs []string
}

// Link measures what the link is used for: how full the fill keeps it, what
// demand reads wait meanwhile, how many bytes cross it, and what that costs in
// processor time. What it is compared with runs over the same line in the same
// run, by turns. Every repetition is reported with the state of the machine,
// then the medians.
func Link(ctx context.Context, o LinkOptions, r *Report) (err error) {
	switch {
	case o.N == 0 && o.Quick:
		o.N = 1
	case o.N == 0:
		o.N = 5
	}
	if len(o.Parts) == 0 {
		o.Parts = LinkParts
		if o.Quick {
			o.Parts = slices.DeleteFunc(slices.Clone(LinkParts), func(p string) bool { return p == "a2" })
		}
	}
	for _, p := range o.Parts {
		if !slices.Contains(LinkParts, p) {
			return fmt.Errorf("there is no part %q; there are %s", p, strings.Join(LinkParts, ", "))
		}
	}
	s, err := newStage(ctx, o.Options, r)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.buildForerun(); err != nil {
		return err
	}
	b := &linkBench{stage: s, o: o}
	for _, part := range []struct {
		name, what string
		do         func() error
	}{
		{"a", "how full an idle link is kept", b.fillRate},
		{"a2", "a guest boots while its disk fills", b.fillUnderGuest},
		{"b", "demand reads while the fill has the link", b.demand},
		{"c", "starvation, in virtual time", b.starvation},
		{"d", "bytes on the line", b.lineBytes},
		{"e", "demand reads of what the site holds", b.duplicates},
		{"f", "processor time", b.cost},
	} {
		if !slices.Contains(o.Parts, part.name) {
			continue
		}
		s.Say("-- part %s: %s", part.name, part.what)
		if err := part.do(); err != nil {
			return fmt.Errorf("part %s: %w", part.name, err)
		}
	}
	return nil
}

// peerRounds is how often those run that no bar is about.
const peerRounds = 3

type linkBench struct {
	*stage
	o    LinkOptions
	runs int    // for names
	cc   string // TCP congestion control of the sites, once it is known
}

// point is one line.
type point struct {
	rate       int64 // bytes a second, 0 for no limit
	rtt, queue time.Duration
	loss       float64
	info       bool // no bar
	writes     bool // write-back is the load, not the fill
	ready      bool // the line knows the classes apart by their marks
	peers      bool // those without a bar run here
}

// demandMark is AF31, what the product marks demand with.
const demandMark = 26

const (
	mbit100 = 12_500_000
	gbit    = 125_000_000
)

func (p point) String() string {
	s := "unlimited"
	if p.rate > 0 {
		s = fmt.Sprintf("%g Mbit/s", float64(p.rate)/125e3)
	}
	s += fmt.Sprintf(", %d ms", p.rtt.Milliseconds())
	if p.queue > 0 {
		s += fmt.Sprintf(", queue %d ms", p.queue.Milliseconds())
	}
	if p.ready {
		s += ", QoS-ready"
	}
	if p.writes {
		s += ", write-back"
	}
	if p.loss > 0 {
		s += fmt.Sprintf(", loss %g %%", p.loss*100)
	}
	return s
}

// points are those of a part, or the one that was asked for.
func (b *linkBench) points(all, quick []point) []point {
	switch {
	case b.o.One:
		return []point{{rate: b.Rate, rtt: b.RTT, queue: b.o.Queue, loss: b.o.Loss, peers: !b.o.Alone}}
	case b.o.Quick:
		all = quick
	}
	all = slices.Clone(all)
	for i := range all {
		all[i].peers = all[i].peers && !b.o.Alone
	}
	return all
}

// over opens a line for f and closes it. Each contender gets a new one, or the
// kernel would remember what the connections before it learned about the path.
func (b *linkBench) over(p point, rep int, f func() error) (err error) {
	// Whole segments of 64 KiB are cheap and true to the byte, but they are
	// lost whole, and at 100 Mbit/s one of them is five milliseconds of line.
	offload := p.loss == 0 && (p.rate == 0 || p.rate > mbit100)
	link := netns.Link{Delay: p.rtt / 2, Rate: p.rate, Queue: p.queue, Loss: p.loss}
	if p.ready {
		link.First = demandMark
	}
	b.line, err = netns.Open(netns.Config{Link: link,
		Offload: offload, Congestion: b.o.Congestion, Seed: b.Seed + uint64(rep)*1000})
	if err != nil {
		return fmt.Errorf("line: %w", err)
	}
	defer func() {
		err = errors.Join(err, b.line.Close())
		b.line = nil
	}()
	if b.cc == "" {
		// The file shows the namespace of the program that opens it.
		out, err := b.line.Source.Command(b.ctx, "cat", "/proc/sys/net/ipv4/tcp_congestion_control").Output()
		if err != nil {
			return fmt.Errorf("ask for the congestion control: %w", err)
		}
		b.cc = strings.TrimSpace(string(out))
		b.Say("TCP congestion control: %s", b.cc)
	}
	return f()
}

// dir makes a directory that nobody used before.
func (b *linkBench) dir(name string) (string, error) {
	b.runs++
	d := filepath.Join(b.Dir, fmt.Sprintf("%s%d", name, b.runs))
	return d, os.MkdirAll(d, 0o755)
}

// listens says whether somebody listens on the TCP port of the site. A
// connection would be taken for a client.
func (b *linkBench) listens(s netns.Site, port string) bool {
	out, err := s.Command(b.ctx, "ss", "-Hltn", "sport", "=", ":"+port).Output()
	return err == nil && len(out) > 0
}

// machine is what the machine did up to a moment.
type machine struct {
	at         time.Time
	busy, idle float64 // ticks of all processors
	self       time.Duration
}

func lookAtMachine() machine {
	m := machine{at: time.Now(), self: selfCPU()}
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return m
	}
	var f [8]float64 // user nice system idle iowait irq softirq steal
	fmt.Sscanf(string(text), "cpu %f %f %f %f %f %f %f %f", &f[0], &f[1], &f[2], &f[3], &f[4], &f[5], &f[6], &f[7])
	for i, v := range f {
		if i == 3 || i == 4 {
			m.idle += v
		} else {
			m.busy += v
		}
	}
	return m
}

// since says how busy the machine was since the moment, and with what load.
func (m machine) since() string {
	now := lookAtMachine()
	var load float64
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		fmt.Sscan(string(b), &load)
	}
	busy := ratio(now.busy-m.busy, now.busy-m.busy+now.idle-m.idle)
	return fmt.Sprintf("load %.1f, machine %.0f %% busy, relay %.0f %% of a core", load, busy*100,
		100*ratio((now.self-m.self).Seconds(), now.at.Sub(m.at).Seconds()))
}

func ratio(x, y float64) float64 {
	if y == 0 {
		return 0
	}
	return x / y
}

// percentile is the smallest value that the share q of all does not exceed.
func percentile(v []time.Duration, q float64) time.Duration {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return v[min(len(v)-1, max(0, int(q*float64(len(v))+0.9999999)-1))]
}
