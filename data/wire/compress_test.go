package wire

import (
	"testing"
	"time"

	"forerun/internal/chunk"
)

// packWorld is a link and a machine for a chooser to find its way in.
type packWorld struct {
	c      *chooser
	now    time.Time
	link   float64 // packed bytes a second it carries
	cores  float64 // processors that pack
	second float64 // seconds a plain byte takes at levelCost 1
	noise  bool    // nothing packs, and that is noticed at once
	asked  bool    // no more is asked for than the link carries

	held    time.Duration
	changes int
	visited map[chunk.Level]time.Duration
}

func newPackWorld(link float64) *packWorld {
	w := &packWorld{c: newChooser(chunk.Raw, false), now: time.Unix(0, 0), link: link, cores: 1, second: 1e-9}
	w.c.idle = nil // not that of the machine the test runs on
	return w
}

// run lets chunks pass for d.
func (w *packWorld) run(d time.Duration) {
	const plain = 64 << 10
	w.visited = map[chunk.Level]time.Duration{}
	w.changes = 0
	for end := w.now.Add(d); w.now.Before(end); {
		l := w.c.at(1)
		packed, cost := plain*levelSize[l], plain*levelCost[l]*w.second
		if w.noise {
			packed, cost = plain, plain*w.second*1.1
		}
		pack, send := cost/w.cores, packed/w.link
		step := time.Duration(max(pack, send) * 1e9)
		w.now = w.now.Add(step)
		w.visited[l] += step
		w.held += time.Duration(pack * 1e9)
		w.c.add(w.now, sample{plain, int(packed), time.Duration(cost * 1e9), w.held, send >= pack, !w.asked || pack > send})
		if w.c.at(1) != l {
			w.changes++
		}
	}
}

func TestChooserFindsTheLevel(t *testing.T) {
	const mbit = 1e6 / 8
	for name, x := range map[string]struct {
		link, cores, second float64
		noise               bool
		background, demand  chunk.Level
	}{
		"10 Mbit/s":                     {10 * mbit, 1, 1e-9, false, chunk.Tight, chunk.Good},
		"100 Mbit/s":                    {100 * mbit, 1, 1e-9, false, chunk.Tight, chunk.Good},
		"250 Mbit/s":                    {250 * mbit, 1, 1e-9, false, chunk.Good, chunk.Quick},
		"1 Gbit/s":                      {1000 * mbit, 1, 1e-9, false, chunk.Quick, chunk.Quick},
		"1 Gbit/s, many processors":     {1000 * mbit, 16, 1e-9, false, chunk.Quick, chunk.Quick},
		"no limit but the processor":    {1e12, 1, 1e-9, false, chunk.Quick, chunk.Fast},
		"100 Mbit/s, slow machine":      {100 * mbit, 1, 3e-9, false, chunk.Good, chunk.Quick},
		"100 Mbit/s, half a processor":  {100 * mbit, .5, 1e-9, false, chunk.Good, chunk.Good},
		"1 Gbit/s, incompressible data": {1000 * mbit, 1, 1e-9, true, chunk.Tight, chunk.Quick},
	} {
		t.Run(name, func(t *testing.T) {
			w := newPackWorld(x.link)
			w.c.cores = 0.9
			w.cores, w.second, w.noise = x.cores, x.second, x.noise
			w.run(10 * time.Second)
			w.run(10 * time.Minute)
			if got := w.visited[x.background]; got < 10*time.Minute*9/10 {
				t.Errorf("%v of ten minutes were at %v: %v", got, x.background, w.visited)
			}
			if w.changes > 20 {
				t.Errorf("%d changes in ten minutes", w.changes)
			}
			if !x.noise && w.c.at(0) != x.demand {
				t.Errorf("demand is packed at %v, want %v", w.c.at(0), x.demand)
			}
		})
	}
}

func TestChooserFollows(t *testing.T) {
	w := newPackWorld(100e6 / 8)
	w.c.cores = 0.9
	w.run(5 * time.Second)
	if l := w.c.at(1); l != chunk.Tight {
		t.Fatalf("at %v where there is time", l)
	}
	w.cores = .1 // somebody else needs the processors
	w.run(5 * time.Second)
	if l := w.c.at(1); l > chunk.Fast {
		t.Errorf("at %v with a tenth of a processor", l)
	}
	w.cores = 1
	w.run(time.Minute)
	if l := w.c.at(1); l != chunk.Tight {
		t.Errorf("at %v when they are free again", l)
	}
	w.link = 1e9 / 8
	w.run(5 * time.Second)
	if l := w.c.at(1); l != chunk.Quick {
		t.Errorf("at %v on a faster link", l)
	}
}

// TestChooserLeavesTheMachineToOthers: where other programs keep all processors
// busy it packs quickly, though the link is full, and harder again afterwards.
func TestChooserLeavesTheMachineToOthers(t *testing.T) {
	w := newPackWorld(100e6 / 8)
	w.c.cores = 0.9
	spare := 1.0
	w.c.idle = func() (float64, bool) { return spare, true }
	w.run(5 * time.Second)
	if l := w.c.at(1); l != chunk.Tight {
		t.Fatalf("at %v where there is time", l)
	}
	spare = 0
	w.run(8 * time.Second)
	if l := w.c.at(1); l != chunk.Fast {
		t.Errorf("at %v on a machine that has no time", l)
	}
	spare = 1
	w.run(time.Minute)
	if l := w.c.at(1); l != chunk.Tight {
		t.Errorf("at %v when there is time again", l)
	}
}

// TestChooserOnABusyMachine: where nobody has time and the link is not full what
// is packed least is there first; but not where little is asked for, because of a limit.
func TestChooserOnABusyMachine(t *testing.T) {
	for _, x := range []struct {
		queue bool
		want  chunk.Level
	}{{true, chunk.Quick}, {false, chunk.Fast}} {
		c := newChooser(chunk.Raw, false)
		c.cores, c.idle = 1.2, func() (float64, bool) { return 0, true }
		now := time.Unix(0, 0)
		for range 3000 { // a chunk every 2 ms takes 1.5 ms, half of the time of two places
			now = now.Add(2 * time.Millisecond)
			c.add(now, sample{64 << 10, 25 << 10, 1500 * time.Microsecond, now.Sub(time.Unix(0, 0)) / 2, false, x.queue})
		}
		if l := c.at(1); l != x.want {
			t.Errorf("others waiting %v: at %v, want %v", x.queue, l, x.want)
		}
	}
}

func TestChooserTakesSilenceForNothing(t *testing.T) {
	c := newChooser(chunk.Raw, false)
	now := time.Unix(0, 0)
	for range 100 { // a chunk now and then says nothing of the link
		now = now.Add(time.Minute)
		c.add(now, sample{64 << 10, 20 << 10, time.Millisecond, now.Sub(time.Unix(0, 0)), false, false})
	}
	if l := c.at(1); l != firstLevel {
		t.Errorf("at %v", l)
	}
}

func TestChooserFixed(t *testing.T) {
	for _, x := range []struct {
		codec chunk.Codec
		off   bool
		want  chunk.Level
	}{{chunk.S2, false, chunk.Quick}, {chunk.Zstd, false, chunk.Fast}, {chunk.Raw, true, chunk.Plain}} {
		w := newPackWorld(1e6)
		w.c = newChooser(x.codec, x.off)
		w.c.idle = nil
		w.run(time.Minute)
		if w.c.at(0) != x.want || w.c.at(1) != x.want {
			t.Errorf("codec %d, off %v: %v and %v, want %v", x.codec, x.off, w.c.at(0), w.c.at(1), x.want)
		}
	}
}
