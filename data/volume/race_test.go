package volume

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"forerun/block"
	"forerun/disk"
)

// TestConcurrent has each of some goroutines own a part of every chunk, while
// chunks arrive in random order, the store is damaged and the map committed.
func TestConcurrent(t *testing.T) {
	const size, cbytes, parts = 3 << 20, 64 << 10, 4
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	content := source(seed, size)
	g := newRig(t, twinFS(seed), content, cbytes)
	g.remote.bySig.Store(seed%2 == 1)
	must(t, g.v.Close())
	g.opt.Tune = Tuning{CommitEvery: 2 * time.Millisecond, LogBytes: 32 << 10}
	g.opt.Tier = newMapTier(seed, 2)
	g.open(t)
	ctx := context.Background()
	want := bytes.Clone(content)
	var wg, bg sync.WaitGroup
	var stop atomic.Bool
	bg.Add(2)
	go func() { // fill
		defer bg.Done()
		r := rand.New(rand.NewPCG(seed, 1))
		for !stop.Load() {
			idx := g.v.Absent(nil, r.Int64N(size/cbytes), 1+r.IntN(5))
			if err := g.v.Fetch(ctx, idx, block.Background); err != nil {
				t.Error(err)
			}
			if r.IntN(40) == 0 {
				_, _ = g.v.Survey(ctx, r.Int64N(size/cbytes))
			}
			time.Sleep(100 * time.Microsecond)
		}
	}()
	go func() {
		defer bg.Done()
		for n := 0; !stop.Load(); n++ {
			time.Sleep(3 * time.Millisecond)
			if err := g.v.Flush(ctx, 0); err != nil {
				t.Error(err)
			}
			if n%5 == 4 {
				g.store.damage()
			}
		}
	}()
	for w := range parts {
		wg.Add(1)
		go func() {
			defer wg.Done()
			r := rand.New(rand.NewPCG(seed, uint64(w)+10))
			const part = cbytes / parts
			for range 500 {
				// My quarter of a chunk, so no other goroutine changes what I look at.
				base := r.Int64N(size/cbytes)*cbytes + int64(w)*part
				off := base + r.Int64N(part/512)*512
				n := 512 * (1 + r.Int64N((base+part-off)/512))
				switch r.IntN(4) {
				case 0, 1:
					p := make([]byte, n)
					for i := range p {
						p[i] = byte(r.Uint32())
					}
					if err := g.v.WriteAt(ctx, p, off, 0); err != nil {
						t.Error(err)
					}
					copy(want[off:], p)
				case 2:
					if err := g.v.Zero(ctx, off, n, 0); err != nil {
						t.Error(err)
					}
					clear(want[off : off+n])
				default:
					p := make([]byte, n)
					if err := g.v.ReadAt(ctx, p, off, 0); err != nil {
						t.Error(err)
					} else if !bytes.Equal(p, want[off:off+n]) {
						t.Errorf("seed %d: other bytes at %d", seed, off)
						return
					}
				}
			}
		}()
	}
	wg.Wait()
	stop.Store(true)
	bg.Wait()
	g.same(t, want)
	consistent(t, g.v)
	g.flush(t)
	g.reopen(t)
	g.same(t, want)
	consistent(t, g.v)
}

// TestSectorsAreNotMixed writes and zeroes the same sectors from two sides while others read.
func TestSectorsAreNotMixed(t *testing.T) {
	t.Chdir(t.TempDir())
	content := make([]byte, 1<<20)
	g := newRig(t, disk.OS(), content, cb)
	ctx := context.Background()
	var stop atomic.Bool
	var wg sync.WaitGroup
	for w := range 2 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			p := make([]byte, 2048)
			for n := uint64(1); !stop.Load(); n++ {
				for at := 0; at < len(p); at += 8 {
					binary.LittleEndian.PutUint64(p[at:], n<<1|uint64(w))
				}
				if err := g.v.WriteAt(ctx, p, 512, 0); err != nil {
					t.Error(err)
				}
				if w == 0 && n%50 == 0 {
					if err := g.v.Zero(ctx, 0, cb, 0); err != nil {
						t.Error(err)
					}
				}
			}
		}()
	}
	p := make([]byte, 4096)
	for range 4000 {
		must(t, g.v.ReadAt(ctx, p, 0, 0))
		for s := 0; s < len(p); s += 512 {
			for at := s; at < s+512; at += 8 {
				if !bytes.Equal(p[s:s+8], p[at:at+8]) {
					stop.Store(true)
					t.Fatal("a sector has bytes of two writes")
				}
			}
		}
	}
	stop.Store(true)
	wg.Wait()
	consistent(t, g.v)
}

// TestPagesUnderZero makes whole pages zero while chunks of them are written, arrive and are surveyed.
func TestPagesUnderZero(t *testing.T) {
	const cbytes = 16 << 10
	const size = 3*pageChunks*cbytes + 5*cbytes + 512
	fs := twinFS(1)
	g := &rig{fs: fs, store: newMemStore(), remote: &remote{}}
	g.opt = Options{Name: "v", Size: size, ChunkBytes: cbytes, Tune: Tuning{CommitEvery: 3 * time.Millisecond, AheadMax: -1}}
	g.open(t)
	g.v.SetRemote(patternRemote{g.v, cbytes, size})
	ctx := context.Background()
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			r := rand.New(rand.NewPCG(uint64(w), 8))
			for range 300 {
				off := r.Int64N(size/512-8) * 512
				var err error
				switch r.IntN(8) {
				case 0:
					a := r.Int64N(3) * pageChunks * cbytes
					err = g.v.Zero(ctx, a, min(size-a, pageChunks*cbytes*(1+r.Int64N(3))), 0)
				case 1:
					err = g.v.Trim(ctx, off, min(size-off, 512*(1+r.Int64N(5000))), 0)
				case 2:
					err = g.v.Flush(ctx, 0)
				case 3:
					_, err = g.v.Survey(ctx, r.Int64N(g.v.Chunks()))
				case 4, 5:
					err = g.v.WriteAt(ctx, bytes.Repeat([]byte{0xee}, 4096), off, 0)
				default:
					p := make([]byte, 4096)
					err = g.v.ReadAt(ctx, p, off, 0)
					for s := 0; s < 4096 && err == nil; s += 512 {
						v := p[s]
						want := patternByte((off + int64(s)) / cbytes)
						if !bytes.Equal(p[s:s+512], bytes.Repeat([]byte{v}, 512)) || v != 0 && v != 0xee && v != want {
							err = fmt.Errorf("%#x at %d", v, off+int64(s))
						}
					}
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		}()
	}
	wg.Wait()
	consistent(t, g.v)
	before := g.v.Stats()
	g.flush(t)
	must(t, g.v.Close())
	g.open(t)
	consistent(t, g.v)
	after := g.v.Stats()
	if before.Held != after.Held || before.Zero != after.Zero || before.Modified != after.Modified || before.OverlayBytes != after.OverlayBytes {
		t.Fatalf("before %+v\nafter %+v", before, after)
	}
	must(t, g.v.Zero(ctx, 0, size, 0))
	if st := g.v.Stats(); st.Zero != st.Chunks || st.OverlayBytes != 0 || !g.v.Filled() {
		t.Fatalf("%+v", st)
	}
	g.flush(t)
	g.reopen(t)
	if st := g.v.Stats(); st.Zero != st.Chunks {
		t.Fatalf("%+v", st)
	}
	for pi := range g.v.table.pages {
		if g.v.table.pages[pi].Load() != g.v.table.zero {
			t.Fatalf("page %d of zeros has memory of its own", pi)
		}
	}
}
