package wire

import (
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
	"forerun/lab/wan"
)

// TestOutages breaks the link in the middle of transfers in each way there is.
// Nobody sees an error, each chunk is delivered once, and what was delivered
// before is not read again at the source.
func TestOutages(t *testing.T) {
	for _, tc := range []struct {
		name   string
		hit    func(w *world)
		lasts  time.Duration // at least
		within time.Duration // the rest takes at most so much longer
	}{
		{"cut", func(w *world) { w.wan.Cut() }, 0, 2 * time.Second},
		{"stall 3 s", func(w *world) { w.wan.Stall(3 * time.Second) }, 3 * time.Second, 2 * time.Second},
		{"stall 3 min", func(w *world) { w.wan.Stall(3 * time.Minute) }, 3 * time.Minute, 10 * time.Second},
		{"no way back 1 min", func(w *world) {
			w.wan.Partition(wan.Backward, true)
			time.AfterFunc(time.Minute, func() { w.wan.Partition(wan.Backward, false) })
		}, time.Minute, 10 * time.Second},
		{"no way forth 1 min", func(w *world) {
			w.wan.Partition(wan.Forward, true)
			time.AfterFunc(time.Minute, func() { w.wan.Partition(wan.Forward, false) })
		}, 0, time.Minute + 10*time.Second},
		{"backend restarts", func(w *world) { w.stop(); time.Sleep(20 * time.Second); w.serve() }, 20 * time.Second, 5 * time.Second},
		{"backend restarts after a power cut", func(w *world) {
			w.wan.Partition(wan.Both, true)
			w.stop()
			time.Sleep(20 * time.Second)
			w.wan.Partition(wan.Both, false)
			w.wan.Cut()
			w.serve()
		}, 20 * time.Second, 10 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			src := newSource(6<<20, 21, "disk-1")
			src.unit = 16 * kib
			src.extents = []block.Extent{{Len: 6 << 20}}
			inWorld(t, slow, src, func(w *world) {
				c, r := w.start()
				defer c.Close()
				time.Sleep(time.Second)
				bg, fg := w.sink(), w.sink()
				done := make(chan error, 3)
				began := time.Now()
				go func() { done <- r.Fetch(w.ctx, upTo(0, 256), block.Background, bg.deliver) }()
				go func() { done <- r.Fetch(w.ctx, upTo(256, 320), block.Demand, fg.deliver) }()
				time.Sleep(time.Second)
				src.mu.Lock()
				before := map[int64]bool{}
				bg.mu.Lock()
				for i := range bg.got {
					before[i] = true
				}
				bg.mu.Unlock()
				src.mu.Unlock()
				if len(before) == 0 || len(before) == 256 {
					t.Fatalf("%d of 256 chunks were there when the link broke", len(before))
				}
				tc.hit(w)
				go func() { // new calls during the outage wait too
					if _, err := r.Extents(w.ctx, nil, 0, 1<<20, 0); err != nil {
						done <- err
						return
					}
					r.Promote([]int64{250, 251})
					done <- w.read(r, 5<<20+512, 256*kib)
				}()
				for range 3 {
					if err := <-done; err != nil {
						t.Fatal(err)
					}
				}
				took := time.Since(began)
				bg.once(upTo(0, 256))
				fg.once(upTo(256, 320))
				rest := time.Duration(float64(6<<20)/float64(slow.Rate)*1e9) + time.Second
				t.Logf("%v; %d chunks before, %d duplicates, %+v", took, len(before), c.Stats().DuplicateChunks, c.Stats().Reconnects)
				if took < tc.lasts || took > tc.lasts+rest+tc.within {
					t.Errorf("took %v", took)
				}
				src.mu.Lock()
				for i := range before {
					if src.reads[i] != 1 {
						t.Errorf("chunk %d was delivered before the link broke and read %d times", i, src.reads[i])
					}
				}
				src.mu.Unlock()
				time.Sleep(15 * time.Second) // what the old connections left is gone
				if st := w.server.Stats(); st.Conns != 3 || st.Sessions != 1 || st.Queued != 0 || w.server.demandBusy != 0 {
					t.Errorf("server: %+v, demand %d", st, w.server.demandBusy)
				}
				if st := c.Stats(); st.DemandOutstanding != 0 || st.BackgroundOutstanding != 0 || st.DemandQueued+st.BackgroundQueued != 0 || !st.Up || len(r.wanted) != 0 {
					t.Errorf("client: %+v", st)
				}
			})
		})
	}
}

// TestManyCuts cuts at random moments while random requests of all kinds run.
func TestManyCuts(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	src := newSource(4<<20, 22, "disk-1")
	src.unit = 16 * kib
	clear(src.data[1<<20 : 5<<18])
	src.latency = time.Millisecond
	inWorld(t, wan.Link{Delay: 15 * time.Millisecond, Rate: 1e6, Loss: 0.01, Seed: seed}, src, func(w *world) {
		w.opts.Credit = 50
		rng := rand.New(rand.NewPCG(seed, 0))
		c, r := w.start()
		defer c.Close()
		done := make(chan error, 6)
		for k := range 6 {
			rng := rand.New(rand.NewPCG(seed, uint64(k+1)))
			go func() {
				for range 8 {
					idx := rng.Perm(256)[:1+rng.IntN(40)]
					var want []int64
					for _, i := range idx {
						want = append(want, int64(i))
					}
					s := w.sink()
					over := make(chan struct{})
					later := time.Duration(rng.IntN(300)) * time.Millisecond
					go func() {
						time.Sleep(later)
						r.Promote(want[:len(want)/2])
						close(over)
					}()
					if err := r.Fetch(w.ctx, want, block.Flags(rng.IntN(3)), s.deliver); err != nil {
						done <- err
						return
					}
					s.once(want)
					<-over
				}
				done <- nil
			}()
		}
		for left, cuts := 6, 0; left > 0; cuts++ {
			if cuts == 40 {
				time.Sleep(time.Minute) // all must be through by now
				if left > len(done) {
					w.dump(c, r)
				}
			}
			select {
			case err := <-done:
				if err != nil {
					t.Fatal(err)
				}
				left--
			case <-time.After(time.Duration(50+rng.IntN(2500)) * time.Millisecond):
				w.wan.Cut()
			}
		}
		time.Sleep(15 * time.Second)
		t.Logf("%+v", c.Stats())
		w.nothingLeft(c, r)
	})
}

// TestAnotherDisk swaps the source while the link is down.
func TestAnotherDisk(t *testing.T) {
	for name, other := range map[string]struct {
		size int64
		id   string
		kind block.Kind
	}{"other content": {4 << 20, "disk-2", block.KindCorrupt}, "other size": {8 << 20, "disk-1", block.KindCorrupt}} {
		t.Run(name, func(t *testing.T) {
			src := newSource(4<<20, 23, "disk-1")
			inWorld(t, line, src, func(w *world) {
				c, r := w.start()
				defer c.Close()
				if err := w.read(r, 0, 4096); err != nil {
					t.Fatal(err)
				}
				w.stop()
				swapped := newSource(other.size, 24, other.id)
				f := func(string) (Served, error) { return Served{Device: swapped, ChunkBytes: 64 * kib}, nil }
				w.lookup.Store(&f)
				done := make(chan error)
				go func() { done <- r.ReadAt(w.ctx, make([]byte, 4096), 1<<20, 0) }()
				time.Sleep(time.Minute)
				w.serve()
				if err := <-done; block.KindOf(err) != other.kind {
					t.Errorf("read under way: %v", err)
				}
				if err := r.ReadAt(w.ctx, make([]byte, 4096), 0, 0); block.KindOf(err) != other.kind {
					t.Errorf("next read: %v", err)
				} else {
					t.Log(err)
				}
				n := 0
				r.Fetch(w.ctx, upTo(0, 3), block.Background, func(_ int64, _ chunk.Packed, err error) {
					if block.KindOf(err) == other.kind {
						n++
					}
				})
				if n != 3 {
					t.Errorf("%d chunks refused", n)
				}
			})
		})
	}
}

// TestVolumeComesLater restarts a backend that does not have its volumes yet.
func TestVolumeComesLater(t *testing.T) {
	src := newSource(4<<20, 25, "disk-1")
	inWorld(t, line, src, func(w *world) {
		c, r := w.start()
		defer c.Close()
		w.stop()
		f := func(v string) (Served, error) {
			return Served{}, &block.Error{Op: "test.lookup", Object: v, Kind: block.KindNotFound}
		}
		w.lookup.Store(&f)
		w.serve()
		time.AfterFunc(30*time.Second, func() { w.lookup.Store(nil) })
		began := time.Now()
		if err := w.read(r, 0, 1<<20); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took < 30*time.Second || took > 35*time.Second {
			t.Errorf("the read took %v", took)
		}
	})
}

func TestCloseDuringOutage(t *testing.T) {
	src := newSource(4<<20, 26, "disk-1")
	inWorld(t, line, src, func(w *world) {
		c, r := w.start()
		w.wan.Partition(wan.Both, true)
		done := make(chan error)
		go func() { done <- r.ReadAt(w.ctx, make([]byte, 4096), 0, 0) }()
		go func() {
			n := 0
			err := r.Fetch(w.ctx, upTo(0, 10), block.Background, func(int64, chunk.Packed, error) { n++ })
			if n != 10 {
				err = errors.New("not all were delivered")
			}
			done <- err
		}()
		go func() { _, err := c.Open(w.ctx, "another"); done <- err }()
		time.Sleep(20 * time.Second)
		began := time.Now()
		c.Close()
		for range 3 {
			if err := <-done; block.KindOf(err) != block.KindClosed {
				t.Error(err)
			}
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("Close took %v", took)
		}
		w.wan.Partition(wan.Both, false)
	})
}

func TestRoundTripTime(t *testing.T) {
	src := newSource(1<<20, 27, "")
	inWorld(t, wan.Link{Delay: 35 * time.Millisecond}, src, func(w *world) {
		c, _ := w.start()
		defer c.Close()
		time.Sleep(10 * time.Second)
		if st := c.Stats(); st.RTTMin < 70*time.Millisecond || st.RTTMin > 72*time.Millisecond || st.RTT < st.RTTMin || st.RTT > 80*time.Millisecond || st.Conns != 3 {
			t.Errorf("%+v", st)
		}
	})
}

// dump logs what both ends hold, to see why something does not end.
func (w *world) dump(c *Client, r *Remote) {
	w.t.Helper()
	w.t.Errorf("client %+v\nserver %+v", c.Stats(), w.server.Stats())
	c.mu.Lock()
	for i, e := range r.wanted {
		for ; e != nil; e = e.same {
			w.t.Logf("chunk %d of request %d: state %d, demand %v, queued %v, level %d, on %p, also %p, charge %p", i, e.call.id, e.state, e.demand, e.item.in != nil, e.item.level, e.on, e.also, e.charge)
		}
	}
	for i, l := range c.slots {
		if l != nil {
			w.t.Logf("slot %d %p: outstanding %d, credit %d, ready %v, %d bytes to send", i, l, l.outstanding, l.credit, l.ready[r], len(l.out))
		}
	}
	c.mu.Unlock()
	w.server.mu.Lock()
	for _, ss := range w.server.sessions {
		for k, j := range ss.jobs {
			w.t.Logf("job %v: state %d, level %d, target %d, queued %v", k, j.state, j.item.level, j.target.slot(), j.item.in != nil)
		}
	}
	w.server.mu.Unlock()
	w.t.FailNow()
}
