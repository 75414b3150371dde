package bench

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"forerun/lab/rig"
)

// fillCap is how long a transfer of part a goes on at most.
const fillCap = 10 * time.Second

// transfer is one copy over the line.
type transfer struct {
	crossing
	conns       int     // connections that carried a twentieth of it or more
	front, back float64 // seconds of processor time at the target and at the source
	frontMemory int64   // largest resident set of either side
	backMemory  int64
	complete    bool
	machine     string
}

// fill lets the product fill a volume from source for at most limit and stops it.
func (b *linkBench) fill(source string, limit time.Duration) (t transfer, err error) {
	dir, err := b.dir("fill")
	if err != nil {
		return t, err
	}
	defer os.RemoveAll(dir)
	g, err := b.linkRig(dir, source)
	if err != nil {
		return t, err
	}
	defer g.Kill()
	if err := g.PKI(b.ctx); err != nil {
		return t, err
	}
	if err := g.StartBackend(b.ctx); err != nil {
		return t, err
	}
	was, m := lookAtMachine(), watch(b.line)
	defer func() { t.crossing, t.machine = m.end(), was.since() }()
	if _, err := g.StartFrontend(b.ctx); err != nil {
		return t, err
	}
	for tick := time.Tick(50 * time.Millisecond); !t.complete; <-tick {
		v, err := g.Status(b.ctx)
		if err != nil {
			return t, g.Frontend.Trouble("answers no status: " + err.Error())
		}
		t.complete = rig.Filled(v)
		if at := m.crossed().first; at > 0 && m.crossed().last-at > limit.Seconds() {
			break
		}
		if b.ctx.Err() != nil {
			return t, b.ctx.Err()
		}
	}
	t.conns = b.connections("7400")
	t.front, t.back = g.Frontend.CPU().Seconds(), g.Backend.CPU().Seconds()
	t.frontMemory, t.backMemory = g.Frontend.Memory(), g.Backend.Memory()
	return t, nil
}

// linkRig is newRig with the arguments the user gave.
func (b *linkBench) linkRig(dir, source string, frontend ...string) (*rig.Rig, error) {
	g, err := b.newRig(dir, source)
	if err != nil {
		return nil, err
	}
	g.FrontendArgs = append(frontend, b.o.FrontendArgs...)
	g.BackendArgs = b.o.BackendArgs
	return g, nil
}

// connections counts those of the port at the source that sent a twentieth or
// more of what all of them sent.
func (b *linkBench) connections(port string) (n int) {
	out, err := b.line.Source.Command(b.ctx, "ss", "-Htin", "state", "established", "sport", "=", ":"+port).Output()
	if err != nil {
		return 0
	}
	var sent []float64
	var all float64
	for in := bufio.NewScanner(bytes.NewReader(out)); in.Scan(); {
		for _, f := range strings.Fields(in.Text()) {
			if s, ok := strings.CutPrefix(f, "bytes_sent:"); ok {
				v, _ := strconv.ParseFloat(s, 64)
				sent = append(sent, v)
				all += v
			}
		}
	}
	for _, v := range sent {
		if v >= all/20 && v > 0 {
			n++
		}
	}
	return n
}

// fillRate is part a.
func (b *linkBench) fillRate() error {
	var all []point
	for _, rate := range []int64{mbit100, gbit} {
		for _, rtt := range []time.Duration{0, 40 * time.Millisecond, 200 * time.Millisecond} {
			for _, loss := range []float64{0, 0.001, 0.01} {
				all = append(all, point{rate: rate, rtt: rtt, loss: loss,
					peers: rtt == 40*time.Millisecond && loss == 0 || rate == mbit100 && rtt == 200*time.Millisecond && loss == 0.001})
			}
		}
	}
	quick := []point{
		{rate: mbit100, rtt: 40 * time.Millisecond, peers: true},
		{rate: mbit100, rtt: 200 * time.Millisecond, loss: 0.01},
		{rate: gbit, rtt: 40 * time.Millisecond},
	}
	b.Say("desync is not among the peers: its module cannot be verified by the checksum database; iperf3 runs at each point, the others at some")
	for _, p := range b.points(all, quick) {
		rate := p.rate
		if rate == 0 {
			rate = gbit
		}
		source, err := b.prepare("noise", (rate*8+(1<<20)-1)>>20<<20, noise)
		if err != nil {
			return err
		}
		var ours, bare []float64
		name := "a: " + p.String() + ": "
		others := map[string][]float64{}
		for rep := range b.o.N {
			var t transfer
			err := b.over(p, rep, func() (err error) { t, err = b.fill(source, fillCap); return err })
			if err != nil {
				return err
			}
			ours = append(ours, t.rate())
			b.noteRate(name+"fill", p, t)
			conns := max(t.conns, 1)
			err = b.over(p, rep, func() (err error) { t, err = b.iperf(conns, t.seconds); return err })
			if err != nil {
				return err
			}
			bare = append(bare, t.rate())
			b.noteRate(name+"iperf3", p, t)
			if !p.peers || rep >= peerRounds {
				continue
			}
			for _, peer := range b.copiers() {
				err = b.over(p, rep, func() (err error) { t, err = b.copyWith(peer, source, fillCap); return err })
				if err != nil {
					return fmt.Errorf("%s: %w", peer.name, err)
				}
				others[peer.name] = append(others[peer.name], t.rate())
				b.noteRate(name+peer.name, p, t)
			}
		}
		b.Measure(name+"fill, median", median(ours)/125e3, "Mbit/s")
		b.Measure(name+"iperf3, median", median(bare)/125e3, "Mbit/s")
		for _, peer := range b.copiers() {
			if v := others[peer.name]; len(v) > 0 {
				b.Measure(name+"fill / "+peer.name, ratio(median(ours), median(v)), "x")
			}
		}
		if p.rate > 0 {
			b.Measure(name+"fill, share of the line", ratio(median(ours), float64(p.rate)), "x")
		}
		b.AtLeast(name+"fill / iperf3", ratio(median(ours), median(bare)), 0.95, "x")
	}
	return nil
}

func (b *linkBench) noteRate(name string, p point, t transfer) {
	note := fmt.Sprintf("%.1f MB in %.2f s, begun after %.2f s", float64(t.bulk)/1e6, t.seconds, t.first)
	if t.conns > 0 {
		note += fmt.Sprintf(", %d connections", t.conns)
	}
	if t.front+t.back > 0 {
		note += fmt.Sprintf(", target %.1f s and source %.1f s of processor", t.front, t.back)
	}
	b.Noted(name, t.rate()/125e3, "Mbit/s", note+"; "+t.machine)
}

// iperf sends with the kernel alone over so many connections for about so long.
func (b *linkBench) iperf(conns int, seconds float64) (t transfer, err error) {
	srv, err := rig.Launch(b.line.Source.Command(context.WithoutCancel(b.ctx), "iperf3", "-s", "-1"), "iperf3", b.path("iperf3.log"))
	if err != nil {
		return t, err
	}
	defer srv.Kill()
	if err := srv.Until(b.ctx, 10*time.Second, "listening", func() bool { return b.listens(b.line.Source, "5201") }); err != nil {
		return t, err
	}
	s := max(2, int(math.Round(seconds)))
	was, m := lookAtMachine(), watch(b.line)
	// On a line with much loss the end of the test may not come through.
	ctx, cancel := context.WithTimeout(b.ctx, time.Duration(s)*time.Second+10*time.Second)
	defer cancel()
	out, err := b.line.Target.Command(ctx, "iperf3", "-c", b.line.Source.Addr, "-R", "-P", strconv.Itoa(conns), "-t", strconv.Itoa(s)).CombinedOutput()
	t.crossing, t.conns, t.machine = m.end(), conns, was.since()
	if err != nil && (ctx.Err() == nil || b.ctx.Err() != nil || t.bulk == 0) {
		return t, fmt.Errorf("iperf3: %w: %s", err, bytes.TrimSpace(out))
	}
	return t, nil
}

// copier is a program that copies a disk over the line.
type copier struct {
	name string
	do   func(ctx context.Context, addr, dst string) error
}

// copiers are those that are installed.
func (b *linkBench) copiers() []copier {
	nbdcopy := func(args ...string) func(ctx context.Context, addr, dst string) error {
		return func(ctx context.Context, addr, dst string) error {
			out, err := b.line.Target.Command(ctx, "nbdcopy", append(args, "nbd://"+addr+"/vol", dst)...).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%w: %s", err, bytes.TrimSpace(out))
			}
			return nil
		}
	}
	return []copier{
		{"nbdcopy", nbdcopy()},
		{"nbdcopy, 16 connections of 128 requests", nbdcopy("--connections=16", "--requests=128")},
		{"qemu block-stream", func(ctx context.Context, addr, dst string) error {
			q, err := b.startQSD(ctx, filepath.Dir(dst), addr, "")
			if err != nil {
				return err
			}
			defer q.kill()
			if err := q.stream(0); err != nil {
				return err
			}
			return q.wait(ctx)
		}},
	}
}

// copyWith lets a peer copy the disk at source for at most limit.
func (b *linkBench) copyWith(c copier, source string, limit time.Duration) (t transfer, err error) {
	dir, err := b.dir("copy")
	if err != nil {
		return t, err
	}
	defer os.RemoveAll(dir)
	srv, addr, err := b.nbdkit(source)
	if err != nil {
		return t, err
	}
	defer srv.Kill()
	was, m := lookAtMachine(), watch(b.line)
	ctx, cancel := context.WithTimeout(b.ctx, limit)
	defer cancel()
	err = c.do(ctx, addr, filepath.Join(dir, "dst.raw"))
	t.complete = err == nil
	t.crossing, t.machine = m.end(), was.since()
	if err != nil && (ctx.Err() == nil || b.ctx.Err() != nil) {
		return t, err
	}
	return t, nil
}
