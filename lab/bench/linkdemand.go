package bench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"time"

	"forerun/api"
	"forerun/api/client"
	"forerun/lab/guest"
	"forerun/lab/load"
)

// Part b: how long a read of one cold chunk takes, one at a time, while the
// fill has the link, against the same while it rests.
const (
	demandDisk  = 3 << 30            // bytes of the disk
	demandFrom  = demandDisk / 8 * 5 // the sweep does not come this far
	demandChunk = 64 << 10           // one read in each
	demandReads = 300                // in each phase, at least
	demandLeast = 8 * time.Second    // of the loaded phase: shorter ones say nothing about the link
	demandMost  = 60 * time.Second   // of either phase, with as many reads as that gives
	demandWarm  = 5 * time.Second    // until the fill has the link
)

// phase is one series of cold reads.
type phase struct {
	waits   []time.Duration
	warm    int     // reads that turned out not to need the link: not counted
	share   float64 // of the line that was used meanwhile
	up      float64 // of the way to the source
	machine string
}

// coldReads reads 4 KiB at the beginning of chunk after chunk of *chunks, and
// takes those it used off. reads, if set, counts the reads that needed the link.
func (b *linkBench) coldReads(p point, c *load.Client, chunks *[]int64, least time.Duration, reads func() (int64, error)) (ph phase, err error) {
	start, was, before := time.Now(), lookAtMachine(), b.line.Stats()
	buf := make([]byte, 4096)
	var last int64
	if reads != nil {
		if last, err = reads(); err != nil {
			return ph, err
		}
	}
	for len(*chunks) > 0 && (len(ph.waits) < demandReads || time.Since(start) < least) && time.Since(start) < demandMost {
		off := (*chunks)[0] * demandChunk
		*chunks = (*chunks)[1:]
		t := time.Now()
		if _, err := c.ReadAt(buf, off); err != nil {
			return ph, fmt.Errorf("read at %d: %w", off, err)
		}
		took := time.Since(t)
		if reads != nil {
			n, err := reads()
			if err != nil {
				return ph, err
			}
			if n == last {
				ph.warm++
				continue
			}
			last = n
		}
		ph.waits = append(ph.waits, took)
		if err := b.ctx.Err(); err != nil {
			return ph, err
		}
	}
	down, up := b.crossed(before)
	ph.machine = was.since()
	if p.rate > 0 {
		ph.share = float64(down) / time.Since(start).Seconds() / float64(p.rate)
		ph.up = float64(up) / time.Since(start).Seconds() / float64(p.rate)
	}
	if len(ph.waits) == 0 {
		return ph, fmt.Errorf("none of %d reads needed the link", ph.warm)
	}
	return ph, nil
}

// demandServer is a disk whose cold reads can be watched with its background at rest and at work.
type demandServer struct {
	socket, export string
	reads          func() (int64, error) // reads that needed the link so far; nil: nobody counts
	load           func() error          // starts the background
	stop           func()
}

// contender makes a demandServer over the line that is open; each phase gets a new one.
type contender struct {
	name  string
	start func(source, dir string, loaded bool) (*demandServer, error)
}

// demandRun is both phases of one contender on a line of its own.
func (b *linkBench) demandRun(p point, rep int, k contender, source string) (idle, loaded phase, err error) {
	one := func(busy bool) (ph phase, err error) {
		err = b.over(p, rep, func() error {
			dir, err := b.dir("demand")
			if err != nil {
				return err
			}
			defer os.RemoveAll(dir)
			d, err := k.start(source, dir, busy)
			if err != nil {
				return err
			}
			defer d.stop()
			c, err := load.Dial(b.ctx, d.socket, d.export)
			if err != nil {
				return err
			}
			defer c.Close()
			chunks := coldChunks(b.Seed + uint64(rep))
			least := time.Duration(0)
			if busy {
				if err := d.load(); err != nil {
					return err
				}
				least = demandLeast
				select {
				case <-b.ctx.Done():
					return b.ctx.Err()
				case <-time.After(demandWarm + max(p.queue, 10*p.rtt)):
				}
			}
			ph, err = b.coldReads(p, c, &chunks, least, d.reads)
			return err
		})
		return ph, err
	}
	// By turns, so that neither is always the first.
	for i := range 2 {
		if busy := (i+rep)%2 == 1; busy {
			loaded, err = one(true)
		} else {
			idle, err = one(false)
		}
		if err != nil {
			return idle, loaded, fmt.Errorf("%s: %w", k.name, err)
		}
	}
	return idle, loaded, nil
}

// coldChunks are the chunks to read, each once, shuffled, none beside another.
func coldChunks(seed uint64) (c []int64) {
	for i := int64(demandFrom / demandChunk); i < demandDisk/demandChunk; i += 2 {
		c = append(c, i)
	}
	rand.New(rand.NewPCG(seed, 0x64656d616e64)).Shuffle(len(c), func(i, k int) { c[i], c[k] = c[k], c[i] })
	return c
}

// contenders are the product and, where p wants them, the peers.
func (b *linkBench) contenders(p point) []contender {
	all := []contender{{"forerun", func(source, dir string, loaded bool) (*demandServer, error) {
		g, err := b.linkRig(dir, source, "--fill-paused")
		if err != nil {
			return nil, err
		}
		if p.writes {
			if g.Source, err = b.writable(dir, source); err != nil {
				return nil, err
			}
			g.Policy = "write-back"
		}
		if p.ready {
			g.FrontendArgs = append(g.FrontendArgs, "--qos=ready")
			g.BackendArgs = append(slices.Clone(g.BackendArgs), "--qos=ready")
		}
		if err := g.Start(b.ctx); err != nil {
			g.Kill()
			return nil, err
		}
		status := client.New(g.FrontendState())
		stop, quit := context.WithCancel(b.ctx)
		return &demandServer{
			socket: g.Socket(), export: g.Volume, stop: func() { quit(); g.Kill() },
			reads: func() (int64, error) {
				v, err := status.Volume(b.ctx, g.Volume)
				return v.Demand.Reads, err
			},
			load: func() error {
				if p.writes {
					c, err := load.Dial(b.ctx, g.Socket(), g.Volume)
					if err == nil {
						go b.overwrite(stop, c)
					}
					return err
				}
				_, err := status.Fill(b.ctx, g.Volume, api.FillRequest{Action: "resume"})
				return err
			},
		}, nil
	}}}
	if !p.peers {
		return all
	}
	nothing := func() error { return nil }
	return append(all, contender{"nbdkit cow+scan", func(source, dir string, loaded bool) (*demandServer, error) {
		srv, addr, err := b.nbdkit(source)
		if err != nil {
			return nil, err
		}
		socket := filepath.Join(dir, "s")
		near, err := b.cached(dir, addr, socket, loaded)
		if err != nil {
			srv.Kill()
			return nil, err
		}
		return &demandServer{socket: socket, load: nothing, stop: func() { near.Kill(); srv.Kill() }}, nil
	}}, contender{"qemu block-stream", func(source, dir string, loaded bool) (*demandServer, error) {
		srv, addr, err := b.nbdkit(source)
		if err != nil {
			return nil, err
		}
		socket := filepath.Join(dir, "s")
		q, err := b.startQSD(context.WithoutCancel(b.ctx), dir, addr, socket)
		if err != nil {
			srv.Kill()
			return nil, err
		}
		return &demandServer{socket: socket, export: "vol", stop: func() { q.kill(); srv.Kill() },
			load: func() error { return q.stream(0) }}, nil
	}})
}

// writable is a copy of source for a rig that writes back to it.
func (b *linkBench) writable(dir, source string) (string, error) {
	own := filepath.Join(dir, "source.raw")
	return own, guest.Copy(own, source)
}

// overwrite writes noise where no demand read goes, twice what 100 Mbit/s
// carry, until ctx ends.
func (b *linkBench) overwrite(ctx context.Context, c *load.Client) {
	defer c.Close()
	rng := rand.NewChaCha8([32]byte{7})
	buf := make([]byte, 256<<10)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for n := 0; ctx.Err() == nil; n++ {
		rng.Read(buf)
		if c.WriteAt(buf, int64(rng.Uint64()%(demandFrom/uint64(len(buf))))*int64(len(buf)), n%64 == 63) != nil {
			return
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

// demand is part b.
func (b *linkBench) demand() error {
	const ms = time.Millisecond
	all := []point{
		{rate: mbit100, rtt: 40 * ms, queue: 40 * ms, peers: true},
		{rate: mbit100, rtt: 40 * ms, queue: 1000 * ms, peers: true},
		{rate: mbit100, rtt: 40 * ms, queue: 1000 * ms, ready: true},
		{rate: mbit100, rtt: 40 * ms, queue: 1000 * ms, writes: true, info: true},
		{rate: mbit100, queue: 20 * ms, info: true},
		{rate: mbit100, queue: 200 * ms, info: true},
	}
	source, err := b.prepare("half", demandDisk, half)
	if err != nil {
		return err
	}
	quick := slices.Clone(all[:2])
	for i := range quick {
		quick[i].peers = false
	}
	for _, p := range b.points(all, quick) {
		type figures struct{ ratios, middles, shares, ups, idle, loaded []float64 }
		got := map[string]*figures{}
		kk := b.contenders(p)
		for rep := range b.o.N {
			for i, k := range kk {
				if i > 0 && rep >= peerRounds {
					continue
				}
				idle, loaded, err := b.demandRun(p, rep, k, source)
				if err != nil {
					return err
				}
				f := got[k.name]
				if f == nil {
					f = &figures{}
					got[k.name] = f
				}
				name := "b: " + p.String() + ": " + k.name
				i99, l99 := b.noteWaits(name+", idle", idle), b.noteWaits(name+", loaded", loaded)
				f.idle, f.loaded = append(f.idle, i99), append(f.loaded, l99)
				f.middles = append(f.middles, ratio(percentile(loaded.waits, 0.5).Seconds(), percentile(idle.waits, 0.5).Seconds()))
				f.ratios, f.shares = append(f.ratios, ratio(l99, i99)), append(f.shares, loaded.share)
				f.ups = append(f.ups, loaded.up)
			}
		}
		for _, k := range kk {
			name, f := "b: "+p.String()+": "+k.name, got[k.name]
			b.Measure(name+": p99 idle, median", median(f.idle), "ms")
			b.Measure(name+": p99 loaded, median", median(f.loaded), "ms")
			b.Measure(name+": p50 loaded / idle", median(f.middles), "x")
			if k.name != "forerun" || p.info {
				b.Measure(name+": p99 loaded / idle", median(f.ratios), "x")
				if p.writes {
					b.Measure(name+": share of the way to the source, loaded", median(f.ups), "x")
					continue
				}
				b.Measure(name+": share of the line, loaded", median(f.shares), "x")
				continue
			}
			b.AtMost(name+": p99 loaded / idle", median(f.ratios), 1.25, "x")
			b.AtLeast(name+": share of the line, loaded", median(f.shares), 0.90, "x")
		}
	}
	return nil
}

// noteWaits reports a phase and returns its p99 in milliseconds.
func (b *linkBench) noteWaits(name string, ph phase) float64 {
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }
	p99 := ms(percentile(ph.waits, 0.99))
	b.Noted(name+": p99", p99, "ms", fmt.Sprintf("p50 %.1f, max %.1f ms of %d cold reads (%d were warm), %.0f %% of the line used; %s",
		ms(percentile(ph.waits, 0.5)), ms(slices.Max(ph.waits)), len(ph.waits), ph.warm, ph.share*100, ph.machine))
	return p99
}
