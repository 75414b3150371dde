package store

import (
	"maps"
	"math/rand/v2"
	"sync"
	"testing"

	"forerun/block"
	"forerun/disk/disktest"
	"forerun/internal/chunk"
)

// told is what OnAdd and OnGone leave: what a listener takes for held.
type told struct {
	mu   sync.Mutex
	held map[chunk.Sig]bool
	gone int
	// ask has the callbacks call the store.
	ask *Store
}

func (l *told) listen(o *Options) {
	l.held = map[chunk.Sig]bool{}
	o.OnAdd = func(sig chunk.Sig) {
		if l.ask != nil {
			l.ask.Has(sig)
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		l.held[sig] = true
	}
	o.OnGone = func(sigs []chunk.Sig) {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, sig := range sigs {
			if l.ask != nil {
				l.ask.Has(sig)
			}
			delete(l.held, sig)
			l.gone++
		}
	}
}

func each(t testing.TB, s *Store) map[chunk.Sig]bool {
	t.Helper()
	all := map[chunk.Sig]bool{}
	if err := s.Each(func(sig chunk.Sig) bool { all[sig] = true; return true }); err != nil {
		t.Fatal(err)
	}
	return all
}

func bounded(limit int64) Options {
	o := tiny()
	o.PackBytes, o.LimitBytes = limit/16, limit
	return o
}

// TestBound: the packs stay within the bound, what is read stays, and what went
// is told and can be put again.
func TestBound(t *testing.T) {
	fs := disktest.New(1)
	o := bounded(128 << 10)
	var l told
	l.listen(&o)
	s := mustOpen(t, fs, o)
	hot := samples()[:3]
	for i, x := range samples() {
		mustPut(t, s, x, true)
		for _, h := range hot[:min(i+1, len(hot))] {
			mustGet(t, s, h)
		}
		if st := s.Stats(); st.DiskBytes > o.LimitBytes+o.PackBytes || st.DiskBytes != s.size.Load() {
			t.Fatalf("%d bytes of %d, counted %d", st.DiskBytes, o.LimitBytes, s.size.Load())
		}
	}
	st := s.Stats()
	if st.EvictedChunks < 100 || st.EvictedBytes < 100<<10 || st.DiskBytes < o.LimitBytes/2 || st.Chunks+st.EvictedChunks != int64(len(samples())) {
		t.Fatalf("%+v", st)
	}
	held := 0
	for _, x := range samples() {
		switch err := check(s, x); block.KindOf(err) {
		case block.KindNone:
			held++
		case block.KindNotFound:
		default:
			t.Fatal(err)
		}
	}
	all := each(t, s)
	if int64(held) != st.Chunks || len(all) != held {
		t.Fatalf("%d chunks are held, Each has %d: %+v", held, len(all), st)
	}
	if err := s.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(l.held, all) {
		t.Fatalf("told of %d chunks, %d are held", len(l.held), len(all))
	}
	// A smaller bound holds from the start.
	o = bounded(64 << 10)
	s = mustOpen(t, fs, o)
	defer s.Close()
	if st := s.Stats(); st.DiskBytes > o.LimitBytes || st.EvictedChunks == 0 {
		t.Fatalf("%+v", st)
	}
	for _, x := range samples() {
		if s.Has(x.Sig) {
			mustGet(t, s, x)
		} else {
			wantKind(t, check(s, x), block.KindNotFound)
			mustPut(t, s, x, true)
		}
	}
}

func TestBoundOptions(t *testing.T) {
	for limit, want := range map[int64]int64{0: 256 << 20, 1 << 40: 256 << 20, 1 << 30: 64 << 20, 1 << 20: 64 << 10, 16 << 10: 4096} {
		if o, err := (Options{LimitBytes: limit}).withDefaults(); err != nil || o.PackBytes != want {
			t.Errorf("limit %d: packs of %d bytes: %v", limit, o.PackBytes, err)
		}
	}
	for _, o := range []Options{{LimitBytes: -1}, {LimitBytes: 4096}, {LimitBytes: 1 << 20, PackBytes: 1 << 20}} {
		if _, err := o.withDefaults(); err == nil {
			t.Errorf("%+v was accepted", o)
		}
	}
}

// TestBoundOnFullDisk: where the disk is smaller than the bound, the store
// gives way and goes on.
func TestBoundOnFullDisk(t *testing.T) {
	fs := disktest.New(3)
	fs.SetCapacity(100 << 10)
	o := bounded(1 << 20)
	o.PackBytes = 8 << 10
	s := mustOpen(t, fs, o)
	defer s.Close()
	failed := 0
	for _, x := range samples() {
		if _, err := s.Put(x.Packed); err != nil {
			wantKind(t, err, block.KindNoSpace)
			failed++
			continue
		}
		mustGet(t, s, x)
	}
	if st := s.Stats(); failed > len(samples())/10 || st.EvictedChunks == 0 {
		t.Fatalf("%d of %d failed: %+v", failed, len(samples()), st)
	}
}

// TestNoticesAreExact: after any life a listener that began with Each takes for
// held what is held.
func TestNoticesAreExact(t *testing.T) {
	for _, limit := range []int64{0, 96 << 10} {
		for seed := range uint64(6) {
			fs := disktest.New(seed)
			r := rand.New(rand.NewPCG(seed, 4))
			o := bounded(limit)
			if limit == 0 {
				o = tiny()
			}
			o.inline = seed%2 == 0
			var l told
			l.listen(&o)
			s := mustOpen(t, fs, o)
			if !o.inline {
				l.mu.Lock()
				l.ask = s
				l.mu.Unlock()
			}
			xs := regions(seed, 8)
			for range 500 {
				x := samples()[r.IntN(150)]
				switch c := r.IntN(40); {
				case c < 20:
					if _, err := s.Put(x.Packed); err != nil {
						t.Fatal(err)
					}
				case c < 25:
					if err := putRegion(s, xs[r.IntN(len(xs))]); err != nil {
						t.Fatal(err)
					}
				case c < 28:
					if err := getRegion(s, xs[r.IntN(len(xs))]); err != nil && block.KindOf(err) != block.KindNotFound {
						t.Fatal(err)
					}
				case c < 34:
					if err := check(s, x); err != nil && block.KindOf(err) != block.KindNotFound {
						t.Fatal(err)
					}
				case c < 37:
					if err := s.Delete(x.Sig); err != nil && block.KindOf(err) != block.KindNotFound {
						t.Fatal(err)
					}
				case c < 38:
					if err := s.Sync(); err != nil {
						t.Fatal(err)
					}
				default:
					if _, err := s.Sweep(func(sig chunk.Sig) bool { return sig[0]%3 > 0 }); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if limit > 0 && s.Stats().EvictedChunks == 0 {
				t.Error("nothing was evicted")
			}
			// Only now all callbacks are over; they can find that a region lacks a piece.
			heard := maps.Clone(l.held)
			o.OnAdd, o.OnGone = nil, nil
			s = mustOpen(t, fs, o)
			if all := each(t, s); !maps.Equal(heard, all) || l.gone == 0 {
				t.Fatalf("limit %d, seed %d: told that %d chunks are held, Each has %d", limit, seed, len(heard), len(all))
			}
			s.Close()
		}
	}
}

// TestEach: it ends when told, and finds what a damaged page does not hide.
func TestEach(t *testing.T) {
	fs := disktest.New(1)
	o := tiny()
	o.PackBytes = 1 << 20
	s := mustOpen(t, fs, o)
	defer s.Close()
	want := map[chunk.Sig]bool{}
	for i := range uint64(2000) {
		x := makeTiny(i)
		mustPut(t, s, x, true)
		want[x.Sig] = true
	}
	if !maps.Equal(each(t, s), want) {
		t.Fatal("Each has others than were put")
	}
	n := 0
	if err := s.Each(func(chunk.Sig) bool { n++; return n < 7 }); err != nil || n != 7 {
		t.Fatal(n, err)
	}
	// What it calls may use the store.
	if err := s.Each(func(sig chunk.Sig) bool {
		if n++; n%500 == 0 {
			mustPut(t, s, makeTiny(uint64(10000+n)), true)
		}
		return s.Has(sig)
	}); err != nil || n < 2000 {
		t.Fatal(n, err)
	}
	s.mu.RLock()
	oldest := s.ver.runs[len(s.ver.runs)-1]
	s.mu.RUnlock()
	fs.Flip(oldest.Path(), 100)
	found := 0
	wantKind(t, s.Each(func(chunk.Sig) bool { found++; return true }), block.KindCorrupt)
	if found < 1900 {
		t.Fatalf("%d of 2000 were found", found)
	}
	s.keep()
	if got := len(each(t, s)); got < 2000 {
		t.Fatalf("%d after the repair", got)
	}
	// A store that closes ends it.
	if err := s.Each(func(chunk.Sig) bool { s.Close(); return true }); block.KindOf(err) != block.KindClosed {
		t.Fatal(err)
	}
}

// TestBoundConcurrent: everything at once in a store that evicts all the time.
func TestBoundConcurrent(t *testing.T) {
	fs := disktest.New(5)
	o := bounded(128 << 10)
	o.inline = false
	var l told
	l.listen(&o)
	s := mustOpen(t, fs, o)
	xs := regions(1, 8)
	var workers, others sync.WaitGroup
	stop := make(chan struct{})
	rounds := 400
	if raceEnabled {
		rounds = 100
	}
	for w := range 4 {
		workers.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 9))
			for range rounds {
				x, y := samples()[r.IntN(300)], xs[r.IntN(len(xs))]
				var err error
				switch c := r.IntN(10); {
				case c < 4:
					_, err = s.Put(x.Packed)
				case c < 6:
					err = check(s, x)
				case c < 7:
					err = putRegion(s, y)
				case c < 8:
					err = getRegion(s, y)
				default:
					err = s.Sync()
				}
				if err != nil && block.KindOf(err) != block.KindNotFound {
					t.Error(err)
				}
			}
		})
	}
	others.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			// The caller of live may be in a Put that evicts.
			n := 0
			if _, err := s.Sweep(func(sig chunk.Sig) bool {
				if n++; n%50 == 0 {
					s.Put(samples()[300+n%100].Packed)
				}
				return sig[0]&1 == 0
			}); err != nil {
				t.Error(err)
			}
			s.Each(func(chunk.Sig) bool { return true })
		}
	})
	workers.Wait()
	close(stop)
	others.Wait()
	if st := s.Stats(); st.EvictedChunks == 0 || st.DiskBytes > 2*o.LimitBytes || st.DiskBytes != s.size.Load() {
		t.Errorf("%+v, counted %d", st, s.size.Load())
	}
	s.evictOver()
	all := each(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for sig := range all {
		if !l.held[sig] {
			t.Error("a chunk is held that nobody was told of")
		}
	}
	for sig := range l.held {
		if !all[sig] {
			t.Error("a chunk went that nobody was told of")
		}
	}
}
