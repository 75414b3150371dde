package wire

import (
	"context"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"forerun/block"
	"forerun/lab/wan"
)

// gated is a connection whose reader can be held up.
type gated struct {
	net.Conn
	mu   sync.Mutex
	cond *sync.Cond
	shut bool
}

func (g *gated) Read(p []byte) (int, error) {
	n, err := g.Conn.Read(p)
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.shut {
		g.cond.Wait()
	}
	return n, err
}

func (g *gated) set(shut bool) {
	g.mu.Lock()
	g.shut = shut
	g.mu.Unlock()
	g.cond.Broadcast()
}

// gates makes all connections of w's client gated, and returns them in order.
func gates(w *world) func() []*gated {
	var mu sync.Mutex
	var all []*gated
	dial := w.client.Dial
	w.client.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		nc, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		g := &gated{Conn: nc}
		g.cond = sync.NewCond(&g.mu)
		mu.Lock()
		defer mu.Unlock()
		all = append(all, g)
		return g, nil
	}
	return func() []*gated {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(all)
	}
}

// TestSlowConnectionHoldsUpLittle: what waits on a connection that does not move
// goes on the other one, but for what was begun there and the next chunk.
func TestSlowConnectionHoldsUpLittle(t *testing.T) {
	src := newSource(8<<20, 31, "disk-1")
	inWorld(t, wan.Link{Delay: 20 * time.Millisecond, Rate: 12.5e6, Window: 256 << 10}, src, func(w *world) {
		all := gates(w)
		c, r := w.start()
		defer c.Close()
		time.Sleep(time.Second)
		s := w.sink()
		done := make(chan error, 1)
		stuck := all()[2]
		stuck.set(true)
		go func() { done <- r.Fetch(w.ctx, upTo(0, 128), block.Background, s.deliver) }()
		time.Sleep(3 * time.Second) // half of that would do for all of it
		s.mu.Lock()
		got := len(s.got)
		s.mu.Unlock()
		st := w.server.Stats()
		t.Logf("%d of 128 chunks came past the connection that is stuck, %d of them taken over", got, st.Relieved)
		if got < 128-10 || st.Relieved < 30 {
			t.Errorf("%d of 128 chunks came, %d were taken over", got, st.Relieved)
		}
		stuck.set(false)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		s.once(upTo(0, 128))
		if n := c.Stats().DuplicateChunks; n != 0 {
			t.Errorf("%d chunks came twice", n)
		}
	})
}

// TestSingleConnectionsBreak holds up and breaks connections one by one, while
// others bring what was asked for on them.
func TestSingleConnectionsBreak(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	src := newSource(4<<20, 32, "disk-1")
	src.unit = 16 * kib
	inWorld(t, wan.Link{Delay: 15 * time.Millisecond, Rate: 2e6, Window: 128 << 10, Loss: 0.01, Seed: seed}, src, func(w *world) {
		rng := rand.New(rand.NewPCG(seed, 0))
		all := gates(w)
		w.client.BackgroundConns = 4
		c, r := w.start()
		defer c.Close()
		over := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				select {
				case <-over:
					for _, g := range all() {
						g.set(false)
					}
					return
				case <-time.After(time.Duration(rng.IntN(400)) * time.Millisecond):
				}
				gs := all()
				g := gs[len(gs)-1-rng.IntN(min(len(gs), 5))] // one of the latest
				if rng.IntN(3) == 0 {
					g.Close()
				} else {
					g.set(true)
					time.AfterFunc(time.Duration(rng.IntN(1000))*time.Millisecond, func() { g.set(false) })
				}
			}
		})
		for round := range 12 {
			s := w.sink()
			idx := upTo(0, 256)
			rng := rand.New(rand.NewPCG(seed, uint64(round+1)))
			later := time.Duration(rng.IntN(1500)) * time.Millisecond
			wg.Go(func() { time.Sleep(later); r.Promote(idx[:20]) })
			ctx, cancel := context.WithTimeout(w.ctx, 5*time.Minute)
			if err := r.Fetch(ctx, idx, block.Background, s.deliver); err != nil {
				w.dump(c, r)
				t.Fatal(err)
			}
			cancel()
			s.once(idx)
		}
		close(over)
		wg.Wait()
		time.Sleep(15 * time.Second)
		st, cs := w.server.Stats(), c.Stats()
		t.Logf("%d taken over, %d came twice, %d reconnects", st.Relieved, cs.DuplicateChunks, cs.Reconnects)
		if st.Relieved == 0 || cs.Reconnects == 0 {
			t.Error("nothing was tested")
		}
		w.nothingLeft(c, r)
	})
}
