package pair

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"forerun/lab/netns"
	"forerun/lab/rig"
)

// WriteOptions are what Write needs beside Options.
type WriteOptions struct {
	Options
	// Apart is the round trip between the frontends, 0 is 1 ms.
	Apart time.Duration
	// Each is how long one job runs, 0 is 4 s. N is how many rounds there are.
	Each time.Duration
	// Lab is the program that serves the floor: forerun-lab.
	Lab string
}

// Write measures replicated 4 KiB random writes against the floor under them,
// in the same run over the same line, and a frontend without a peer beside.
func Write(ctx context.Context, o WriteOptions, r Report) (err error) {
	if o.Apart == 0 {
		o.Apart = time.Millisecond
	}
	if o.Each == 0 {
		o.Each = 4 * time.Second
	}
	k, err := begin(ctx, o.Options, r)
	if err != nil {
		return err
	}
	defer k.end(&err)
	line, err := netns.Open(netns.Config{Link: netns.Link{Delay: o.Apart / 2}, Offload: true, Tick: 20 * time.Microsecond, Seed: k.Seed})
	if err != nil {
		return err
	}
	k.atEnd(line.Close)
	w := writeRun{run: k, o: o, line: line, got: map[string][]fioWrites{}, cpu: map[string][]float64{}, raw: map[int][]float64{}}
	if err := w.measure(); err != nil {
		return err
	}
	w.judge()
	return nil
}

type writeRun struct {
	*run
	o    WriteOptions
	line *netns.Line
	got  map[string][]fioWrites
	cpu  map[string][]float64 // us a write
	raw  map[int][]float64    // of the floor without a client, p50 in us, by depth
}

// What is measured.
const (
	onFloor = "floor"
	onPair  = "pair"
	onAlone = "alone"
)

var depths = []int{1, 32}

const writeDisk = 64 << 20

// server is something fio can write to.
type server struct {
	name, uri string
	procs     []*rig.Proc // what it is made of
}

// cpu is the processor time of a server so far.
func (s server) cpu() (d time.Duration) {
	for _, p := range s.procs {
		d += p.CPU()
	}
	return d
}

func (w *writeRun) measure() error {
	floor, err := w.floor()
	if err != nil {
		return fmt.Errorf("floor: %w", err)
	}
	p, err := w.frontends(onPair, Config{AtBackend: w.line.Source.Command, HostBackend: w.line.Source.Addr,
		AtA: w.line.Source.Command, HostA: w.line.Source.Addr, AtB: w.line.Target.Command, HostB: w.line.Target.Addr})
	if err != nil {
		return err
	}
	alone, err := w.frontends(onAlone, Config{Single: true})
	if err != nil {
		return err
	}
	servers := []server{floor, {onPair, p.A.Export("vol"), []*rig.Proc{p.A.Proc, p.B.Proc}},
		{onAlone, alone.A.Export("vol"), []*rig.Proc{alone.A.Proc}}}
	for round := range max(1, w.N) {
		for _, depth := range depths {
			said := ""
			for i := range servers {
				s := servers[(i+round)%len(servers)]
				before := s.cpu()
				f, err := fioWrite(w.ctx, s.uri, "4k", depth, fmt.Sprintf("--size=%d", writeDisk), "--norandommap", "--randrepeat=0",
					"--time_based", "--runtime="+seconds(w.o.Each), "--ramp_time=1")
				if err != nil {
					return errors.Join(fmt.Errorf("%s: %w", s.name, err), p.Words())
				}
				key := fmt.Sprintf("%s, depth %d", s.name, depth)
				w.got[key] = append(w.got[key], f)
				// The job's first second is not in its numbers, but in the time.
				w.cpu[key] = append(w.cpu[key], float64((s.cpu()-before).Microseconds())/(f.IOPS*(w.o.Each+time.Second).Seconds()))
				said += fmt.Sprintf("  %s p50 %.0f us, %.0f IO/s", s.name, f.p50(), f.IOPS)
			}
			raw, err := output(w.ctx, "nsenter", "--net=/run/netns/"+w.line.Source.Name, "--", w.o.Lab, "floor-raw", w.line.Target.Addr+":7500",
				w.path("raw.log"), fmt.Sprint(depth), w.o.Each.String())
			if err != nil {
				return err
			}
			var p50 float64
			if _, err := fmt.Sscan(raw, &p50); err != nil {
				return fmt.Errorf("floor-raw printed %q: %w", raw, err)
			}
			w.raw[depth] = append(w.raw[depth], p50)
			w.Say("round %d, depth %d:%s  raw p50 %.0f us", round+1, depth, said, p50)
		}
	}
	if first, _, err := p.Primary(w.ctx, "vol"); err != nil || first != p.A {
		return errors.Join(errors.New("frontend a was not primary to the end: what was measured is something else"), err)
	}
	return errors.Join(p.Stop(), alone.Stop())
}

// floor starts both ends of the floor.
func (w *writeRun) floor() (server, error) {
	addr := w.line.Target.Addr + ":7500"
	peer, err := w.peerAt(w.line.Target.Command, w.o.Lab, "floor-peer", addr)
	if err != nil {
		return server{}, err
	}
	if err := peer.Until(w.ctx, 10*time.Second, "listening", func() bool {
		return w.line.Source.Do(func() error {
			c, err := net.Dial("tcp", addr)
			if err == nil {
				c.Close()
			}
			return err
		}) == nil
	}); err != nil {
		return server{}, err
	}
	sock := w.path("floor.sock")
	serve, err := w.peerAt(w.line.Source.Command, w.o.Lab, "floor", sock, addr, w.path("floor.log"), fmt.Sprint(writeDisk))
	if err != nil {
		return server{}, err
	}
	return server{onFloor, "nbd+unix:///vol?socket=" + sock, []*rig.Proc{peer, serve}}, serve.Until(w.ctx, 10*time.Second, "listening", func() bool {
		_, err := os.Stat(sock)
		return err == nil
	})
}

// frontends starts frontends whose changes stay with them: write-back is
// measured elsewhere.
func (w *writeRun) frontends(name string, c Config) (*Pair, error) {
	source := w.path(name + ".raw")
	f, err := os.Create(source)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(f.Truncate(writeDisk), f.Close()); err != nil {
		return nil, err
	}
	c.Dir, c.Volumes, c.Args = w.path(name), []Volume{{"vol", source}}, []string{"--policy", "isolated"}
	p, err := w.pair(c)
	if err != nil {
		return nil, err
	}
	// a first: it shall be primary.
	for _, n := range append([]*Node{p.Backend}, p.Frontends()...) {
		if err := n.Start(w.ctx); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	_, err = p.WaitInSync(w.ctx, time.Minute)
	return p, err
}

func (w *writeRun) judge() {
	p50 := func(name string, depth int) float64 {
		var v []float64
		for _, f := range w.got[fmt.Sprintf("%s, depth %d", name, depth)] {
			v = append(v, f.p50())
		}
		return median(v)
	}
	for _, depth := range depths {
		for _, name := range []string{onFloor, onPair, onAlone} {
			var iops, p99 []float64
			for _, f := range w.got[fmt.Sprintf("%s, depth %d", name, depth)] {
				iops, p99 = append(iops, f.IOPS), append(p99, f.p99())
			}
			w.Measure(fmt.Sprintf("depth %d: %s p50", depth, name), p50(name, depth), "us")
			w.Measure(fmt.Sprintf("depth %d: %s p99", depth, name), median(p99), "us")
			w.Measure(fmt.Sprintf("depth %d: %s", depth, name), median(iops), "IO/s")
			w.Measure(fmt.Sprintf("depth %d: %s, processor time a write", depth, name), median(w.cpu[fmt.Sprintf("%s, depth %d", name, depth)]), "us")
		}
		w.AtMost(fmt.Sprintf("depth %d: p50 pair / floor", depth), p50(onPair, depth)/p50(onFloor, depth), 1.3, "x")
		w.Measure(fmt.Sprintf("depth %d: raw floor p50", depth), median(w.raw[depth]), "us")
		w.Measure(fmt.Sprintf("depth %d: p50 pair / raw floor", depth), p50(onPair, depth)/median(w.raw[depth]), "x")
		w.Measure(fmt.Sprintf("depth %d: p50 pair / (alone + round trip)", depth),
			p50(onPair, depth)/(p50(onAlone, depth)+float64(w.o.Apart.Microseconds())), "x")
	}
}
