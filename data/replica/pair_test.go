package replica

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"forerun/lab/wan"
)

var worldSeeds = flag.Int("worlds", 2, "how many seeds TestPair tries")

type reader struct{ v *Volume }

func (r reader) ReadAt(p []byte, off int64) (int, error) {
	if err := r.v.ReadAt(context.Background(), p, off, 0); err != nil {
		return 0, err
	}
	return len(p), nil
}

var _ io.ReaderAt = reader{}

// TestPair lets two nodes and an arbiter run for some minutes of their time,
// with clients at both, and kills, cuts and partitions them by seed. No client
// sees an error, every read is judged, and in the end both nodes are equal.
func TestPair(t *testing.T) {
	base, err := baseOnce()
	must(t, err)
	first := uint64(1)
	n := *worldSeeds
	if s, err := strconv.ParseUint(os.Getenv("FORERUN_SEED"), 10, 64); err == nil {
		first, n = s, 1
	} else if testing.Short() {
		n = 1
	}
	for seed := first; seed < first+uint64(n); seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { pairTest(t, seed, base) })
		})
	}
}

func pairTest(t *testing.T, seed uint64, base []byte) {
	w := newWorld(t, seed, base)
	if seed%4 == 3 {
		w.conf = func(c *Config) { c.OnPeerLoss = Wait }
	} else if seed%4 == 2 {
		w.conf = func(c *Config) { c.FailBackAfter = 5 * time.Second }
	}
	if seed%3 == 1 {
		for _, l := range w.links {
			l.Set(wan.Both, wan.Link{Delay: time.Millisecond, Jitter: 20 * time.Millisecond, Loss: 0.02, Seed: seed})
		}
	}
	r := w.rng
	w.nodes[0].start()
	w.nodes[1].start()
	l := newLoad(w, seed)
	nap := func(d time.Duration) { time.Sleep(time.Duration(r.Int64N(int64(d)))) }
	events := 25
	if testing.Short() {
		events = 10
	}
	for range events {
		nap(3 * time.Second)
		n := w.nodes[r.IntN(2)]
		power := r.IntN(3) == 0
		way := wan.Way(1 + r.IntN(3))
		what := r.IntN(12)
		w.log.Info("world", "event", what, "node", n.name, "power", power, "way", way)
		switch what {
		case 0, 1:
			if power {
				w.pair(5 * time.Minute) // a power cut of one node while the other is not in sync is a loss of both
			}
			n.kill(power)
			nap(8 * time.Second)
			n.start()
		case 2: // the restarted one dies again at once
			if power {
				w.pair(5 * time.Minute)
			}
			for range 3 {
				n.kill(power)
				power = false
				nap(2 * time.Second)
				n.start()
				nap(time.Second)
			}
		case 3: // between the nodes
			a, b := w.links["a>b"], w.links["b>a"]
			if r.IntN(2) == 0 {
				a.Partition(way, true)
			}
			b.Partition(way, true)
			nap(8 * time.Second)
			a.Partition(wan.Both, false)
			b.Partition(wan.Both, false)
		case 4: // to the arbiter
			l := w.links[n.name+">arb"]
			l.Partition(way, true)
			nap(8 * time.Second)
			l.Partition(wan.Both, false)
		case 5: // a node from everybody
			names := []string{"a>b", "b>a", n.name + ">arb"}
			for _, name := range names {
				w.links[name].Partition(wan.Both, true)
			}
			nap(8 * time.Second)
			for _, name := range names {
				w.links[name].Partition(wan.Both, false)
			}
		case 6:
			if v := n.volume(); v != nil {
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				v.Handover(ctx)
				cancel()
			}
		case 7:
			w.restartArbiter(power)
		case 8: // both at once
			if power {
				l.halt()
			}
			for _, n := range w.nodes {
				n.kill(power)
			}
			if power {
				l.h.Crash()
				l.resume()
			}
			nap(3 * time.Second)
			for _, n := range w.nodes {
				n.start()
				nap(2 * time.Second)
			}
		case 9:
			w.links["a>b"].Cut()
			w.links["b>a"].Stall(time.Duration(r.IntN(3000)) * time.Millisecond)
		case 11: // the one that is alone loses its power
			m := w.nodes[1]
			if n == m {
				m = w.nodes[0]
			}
			v := m.volume()
			w.pair(5 * time.Minute)
			n.kill(false)
			for range 100 {
				if v.Status().Mode == "degraded" {
					nap(3 * time.Second)
					m.kill(true)
					nap(time.Second)
					m.start()
					break
				}
				time.Sleep(50 * time.Millisecond)
			}
			nap(3 * time.Second)
			n.start()
		case 10: // a slow disk, up to a hanging one
			n.slow.Store(int64(time.Millisecond) << r.IntN(14))
			nap(8 * time.Second)
			n.slow.Store(0)
		}
		if len(l.fails) > 0 {
			break
		}
	}
	v := w.pair(5 * time.Minute)
	l.end()
	for _, err := range l.fails {
		t.Error(err)
	}
	w.pair(5 * time.Minute)
	if err := l.h.Verify(reader{v}); err != nil {
		t.Error(err)
	}
	time.Sleep(2 * time.Second)
	w.equal()
	t.Logf("%d calls, the longest took %v; %+v", l.ops, l.worst, l.h.Stats())
	w.close()
}
