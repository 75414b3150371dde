package wire

import (
	"context"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
	"forerun/lab/wan"
)

func TestHoldingsAgainstAMap(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 3))
		var h holdings
		twin := map[mark]bool{}
		for range 20000 {
			// Few values that stand close together, so that runs form and wrap.
			m := mark(r.Uint64N(3000)<<4 | r.Uint64N(2)<<39)
			if r.IntN(3) == 0 {
				h.remove(m)
				delete(twin, m)
			} else if len(twin) < 2500 || twin[m] {
				h.add(m, 2500)
				twin[m] = true
			} else {
				h.add(m, 2500)
			}
			if q := mark(r.Uint64N(3000) << 4); h.has(q) != twin[q] {
				t.Fatalf("seed %d: %x is there: %v, want %v", seed, q, h.has(q), twin[q])
			}
		}
		if h.n != len(twin) {
			t.Fatalf("seed %d: %d marks, want %d", seed, h.n, len(twin))
		}
		for m := range twin {
			if !h.has(m) {
				t.Fatalf("seed %d: %x is lost", seed, m)
			}
		}
	}
}

// shelf is what a site holds, and its Site.
type shelf struct {
	mu   sync.Mutex
	held map[chunk.Sig]bool
	*Site
}

func newShelf(key chunk.Key, sigs ...chunk.Sig) *shelf {
	s := &shelf{held: map[chunk.Sig]bool{}}
	for _, x := range sigs {
		s.held[x] = true
	}
	s.Site = NewSite(key, func(f func(chunk.Sig) bool) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		for x := range s.held {
			if !f(x) {
				break
			}
		}
		return nil
	})
	return s
}

// memory is Signatures in memory.
type memory struct {
	mu    sync.Mutex
	known map[int64]chunk.Sig
	zero  map[int64]bool
	more  chan struct{}
	n     uint64
}

func newMemory() *memory {
	return &memory{known: map[int64]chunk.Sig{}, zero: map[int64]bool{}, more: make(chan struct{})}
}

func (m *memory) Get(i int64) (chunk.Sig, bool, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s, ok := m.known[i]
	return s, m.zero[i], ok || m.zero[i]
}
func (m *memory) Token(int64) uint64 { return 7 }
func (m *memory) Learn(i int64, token uint64, s chunk.Sig, zero bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if token != 7 {
		panic("a token that was not given")
	}
	if m.zero[i] = zero; !zero {
		m.known[i] = s
	}
	m.n++
	close(m.more)
	m.more = make(chan struct{})
}
func (m *memory) Wait(ctx context.Context, seen uint64) (uint64, error) {
	m.mu.Lock()
	n, more := m.n, m.more
	m.mu.Unlock()
	if n > seen {
		return n, nil
	}
	select {
	case <-more:
		return seen + 1, nil
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// fetched is what a Fetch delivered.
type fetched struct {
	mu   sync.Mutex
	got  map[int64]chunk.Packed
	errs int
}

func fetch(w *world, r *Remote, f block.Flags, idx ...int64) map[int64]chunk.Packed {
	w.t.Helper()
	g := fetched{got: map[int64]chunk.Packed{}}
	if err := r.Fetch(w.ctx, idx, f, func(i int64, p chunk.Packed, err error) {
		g.mu.Lock()
		defer g.mu.Unlock()
		p.Data = append([]byte(nil), p.Data...)
		if _, twice := g.got[i]; twice || err != nil {
			g.errs++
		}
		g.got[i] = p
	}); err != nil {
		w.t.Fatal(err)
	}
	if g.errs > 0 || len(g.got) != len(idx) {
		w.t.Fatalf("%d chunks for %d, %d of them wrong", len(g.got), len(idx), g.errs)
	}
	return g.got
}

func TestWhatTheSiteHoldsIsAnsweredBySignature(t *testing.T) {
	for _, key := range []chunk.Key{{}, {1, 2, 3}} {
		src := newSource(64*64*kib, 1, "id")
		plain := func(i int64) []byte { return src.data[i*64*kib : (i+1)*64*kib] }
		sig := func(i int64) chunk.Sig { return key.Of(chunk.Sum(plain(i))) }
		inWorld(t, wan.Link{Delay: 10 * time.Millisecond, Rate: 12.5e6}, src, func(w *world) {
			mem := newMemory()
			look := func(string) (Served, error) {
				return Served{Device: block.NewChecked("source", src), ChunkBytes: 64 * kib, Signatures: mem}, nil
			}
			w.lookup.Store(&look)
			w.serve()
			c := must(Dial(w.ctx, w.client))
			defer c.Close()
			sh := newShelf(key)
			for i := int64(0); i < 32; i++ {
				sh.held[sig(i)] = true
			}
			r := must(c.OpenFor(w.ctx, "disk", sh.Site))
			check := func(got map[int64]chunk.Packed, same func(i int64) bool) {
				t.Helper()
				for i, p := range got {
					switch {
					case p.Sig != sig(i):
						t.Fatalf("chunk %d has signature %s, want %s", i, p.Sig, sig(i))
					case same(i) != (p.Codec == chunk.Known):
						t.Fatalf("chunk %d: codec %d, by signature: want %v", i, p.Codec, same(i))
					case p.Codec == chunk.Known && len(p.Data) > 0:
						t.Fatalf("chunk %d: a signature with %d bytes", i, len(p.Data))
					}
				}
			}
			under32 := func(i int64) bool { return i < 32 }
			check(fetch(w, r, block.Background, 0, 1, 2, 3, 40, 41), under32)
			check(fetch(w, r, block.Demand, 5, 31, 32), under32)
			check(fetch(w, r, block.Demand|block.Full, 0, 5), func(int64) bool { return false })
			check(fetch(w, r, block.Background|block.Full, 1), func(int64) bool { return false })
			// What is known by now is not read again.
			before := src.reads[2]
			check(fetch(w, r, block.Demand, 2, 3), under32)
			if src.reads[2] != before || w.server.Stats().Remembered != 2 {
				t.Errorf("%d reads of a chunk that was known, %+v", src.reads[2]-before, w.server.Stats())
			}
			// Gone and added are heard.
			sh.Gone([]chunk.Sig{sig(7)})
			sh.Added(sig(50))
			time.Sleep(time.Second)
			check(fetch(w, r, block.Demand, 7, 8, 50), func(i int64) bool { return i != 7 })
			if st := c.Stats(); st.SameChunks != 4+2+2+2 {
				t.Errorf("%+v", st)
			}
			// A device's reads are always bytes.
			p := make([]byte, 2*64*kib)
			if err := r.ReadAt(w.ctx, p, 0, block.Demand); key == (chunk.Key{}) && err != nil {
				t.Error(err)
			}
		})
	}
}

// TestEqualChunksCrossOnce: the first copy on a connection is data, the others
// behind it are signatures, though nobody has said yet that it is held.
func TestEqualChunksCrossOnce(t *testing.T) {
	src := newSource(64*64*kib, 1, "id")
	for i := 1; i < 64; i++ {
		copy(src.data[i*64*kib:], src.data[:64*kib])
	}
	inWorld(t, wan.Link{Delay: 10 * time.Millisecond, Rate: 12.5e6}, src, func(w *world) {
		w.serve()
		c := must(Dial(w.ctx, w.client))
		defer c.Close()
		r := must(c.OpenFor(w.ctx, "disk", newShelf(chunk.Key{}).Site))
		time.Sleep(time.Second)
		data := 0
		var idx []int64
		for i := range int64(64) {
			idx = append(idx, i)
		}
		for _, p := range fetch(w, r, block.Background, idx...) {
			if p.Codec != chunk.Known {
				data++
			}
		}
		if data < 1 || data > 2 { // one for each background connection
			t.Errorf("%d copies of one chunk crossed", data)
		}
	})
}

// heardOf gathers what the server said unasked.
type heardOf struct {
	mu    sync.Mutex
	same  map[int64]chunk.Sig
	zeros map[int64]bool
	twice int
}

func (h *heardOf) Same(i int64, s chunk.Sig) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, ok := h.same[i]; ok {
		h.twice++
	}
	h.same[i] = s
}
func (h *heardOf) Zeros(first, n int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := first; i < first+n; i++ {
		if h.zeros[i] {
			h.twice++
		}
		h.zeros[i] = true
	}
}

// TestSignaturesRunAhead: what the site holds, and zeros, are told of before
// anybody asks, as the signatures become known; each once, also when the site
// grows, and the rest not at all.
func TestSignaturesRunAhead(t *testing.T) {
	src := newSource(2000*64*kib, 1, "id")
	src.unit = 64 * kib
	sums := make([]chunk.Sig, 2000)
	for i := range sums {
		if i%10 == 3 {
			clear(src.data[i*64*kib : (i+1)*64*kib])
		}
		sums[i] = chunk.Sum(src.data[i*64*kib : (i+1)*64*kib])
	}
	inWorld(t, wan.Link{Delay: 10 * time.Millisecond, Rate: 12.5e6}, src, func(w *world) {
		mem := newMemory()
		look := func(string) (Served, error) {
			return Served{Device: block.NewChecked("source", src), ChunkBytes: 64 * kib, Signatures: mem}, nil
		}
		w.lookup.Store(&look)
		w.serve()
		c := must(Dial(w.ctx, w.client))
		defer c.Close()
		sh := newShelf(chunk.Key{})
		for i := 0; i < 1500; i++ {
			sh.held[sums[i]] = true
		}
		r := must(c.OpenFor(w.ctx, "disk", sh.Site))
		h := &heardOf{same: map[int64]chunk.Sig{}, zeros: map[int64]bool{}}
		r.Announce(h)
		time.Sleep(time.Second)
		for i := range int64(2000) { // a scan learns
			mem.Learn(i, 7, sums[i], i%10 == 3)
		}
		time.Sleep(10 * time.Second)
		counts := func() (int, int) { h.mu.Lock(); defer h.mu.Unlock(); return len(h.same), len(h.zeros) }
		if s, z := counts(); s != 1350 || z != 200 {
			t.Errorf("told of %d signatures and %d chunks of zeros, want 1350 and 200", s, z)
		}
		for i, s := range h.same {
			if s != sums[i] {
				t.Fatalf("told of a wrong signature of chunk %d", i)
			}
		}
		sh.Added(sums[1999])
		time.Sleep(10 * time.Second)
		if s, _ := counts(); s != 1351 || h.twice > 0 {
			t.Errorf("%d signatures after the site grew, %d told twice", s, h.twice)
		}
		if src.calls != 0 || w.server.Stats().Announced != 1551 {
			t.Errorf("%d reads, %+v", src.calls, w.server.Stats())
		}
	})
}

// TestBundles: a volume cut by content is read as any other, and what the site
// holds of a chunk's pieces does not cross.
func TestBundles(t *testing.T) {
	src := newSource(16*256*kib, 1, "id")
	src.unit = 256 * kib
	clear(src.data[5*256*kib : 6*256*kib])
	copy(src.data[7*256*kib+4096:8*256*kib], src.data[:256*kib]) // chunk 0, moved
	cut := must(chunk.NewCutter(256 * kib))
	for _, key := range []chunk.Key{{}, {9}} {
		inWorld(t, wan.Link{Delay: 10 * time.Millisecond, Rate: 12.5e6}, src, func(w *world) {
			mem := newMemory()
			look := func(string) (Served, error) {
				return Served{Device: block.NewChecked("source", src), ChunkBytes: 256 * kib, Signatures: mem, Cutter: cut}, nil
			}
			w.lookup.Store(&look)
			w.serve()
			c := must(Dial(w.ctx, w.client))
			defer c.Close()
			sh := newShelf(key)
			r := must(c.OpenFor(w.ctx, "disk", sh.Site))
			if err := w.read(r, 1000*512, 3*mib); err != nil {
				t.Fatal(err)
			}
			first := fetch(w, r, block.Demand, 0)[0]
			_, pieces, err := chunk.ParseBundle(&key, first, nil)
			if err != nil || first.Sig != cut.Sum(&key, src.data[:256*kib]) {
				t.Fatalf("%v, %s", err, first.Sig)
			}
			for _, p := range pieces {
				sh.Added(p.Sig)
			}
			time.Sleep(time.Second)
			moved := fetch(w, r, block.Background, 7, 5)
			if n := len(moved[7].Data); moved[7].Codec != chunk.Bundle || n > 256*kib/4 {
				t.Errorf("of a chunk that moved %d bytes crossed, codec %d", n, moved[7].Codec)
			}
			if moved[5].Codec != chunk.Zeros {
				t.Errorf("zeros came as codec %d", moved[5].Codec)
			}
			sh.Added(first.Sig)
			time.Sleep(time.Second)
			if p := fetch(w, r, block.Demand, 0)[0]; p.Codec != chunk.Known || p.Sig != first.Sig {
				t.Errorf("a chunk whose recipe is held came as codec %d", p.Codec)
			}
			if p := fetch(w, r, block.Demand|block.Full, 0)[0]; p.Codec != chunk.Bundle || len(p.Data) < 256*kib {
				t.Errorf("with all its bytes it came as codec %d with %d", p.Codec, len(p.Data))
			}
		})
	}
}

const mib = 1 << 20
