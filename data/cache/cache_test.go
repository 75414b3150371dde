package cache

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"time"

	"forerun/block"
	"forerun/disk"
	"forerun/disk/disktest"
	"forerun/internal/chunk"
)

const cb = 64 << 10

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func plain(i int64, n int) []byte {
	r := rand.New(rand.NewPCG(uint64(i), 1))
	b := make([]byte, n)
	for k := 0; k+8 <= n; k += 8 {
		binary.LittleEndian.PutUint64(b[k:], r.Uint64())
	}
	return b
}

func open(t testing.TB, fs disk.FS, o Options) *Cache {
	t.Helper()
	o.Size = 1 << 40
	c, err := New(fs, "cache", o)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// hit says whether n bytes at off of chunk i are there, and fails if they are wrong.
func hit(t testing.TB, c *Cache, i int64, off, n int) bool {
	t.Helper()
	p := make([]byte, n)
	if !c.ReadAt(p, i, off) {
		return false
	}
	if !bytes.Equal(p, plain(i, cb)[off:off+n]) {
		t.Fatalf("chunk %d at %d: other bytes", i, off)
	}
	return true
}

func TestMemoryOnly(t *testing.T) {
	c := open(t, disktest.New(1), Options{MemoryBytes: 8 * cb})
	for i := range int64(40) {
		c.Put(i, plain(i, cb), block.Demand)
		if !hit(t, c, i, 512*3, 4096) {
			t.Fatalf("chunk %d was just put", i)
		}
	}
	st := c.Stats()
	if st.MemoryBytes != 8*cb || st.MemoryHits != 40 {
		t.Fatalf("%+v", st)
	}
	c.Drop(39)
	if hit(t, c, 39, 0, 512) {
		t.Fatal("dropped and found")
	}
	if c.ReadAt(make([]byte, 512), 38, cb-256) || c.ReadAt(make([]byte, 512), 38, -512) {
		t.Fatal("read beyond a chunk")
	}
}

// TestHotSurvivesScan: what is touched again stays while a scan passes.
func TestHotSurvivesScan(t *testing.T) {
	c := open(t, disktest.New(1), Options{MemoryBytes: 64 * cb})
	for range 3 {
		for i := range int64(20) {
			if !hit(t, c, i, 0, 512) {
				c.Put(i, plain(i, cb), block.Demand)
			}
		}
	}
	for i := range int64(1000) {
		c.Put(1000+i, plain(0, cb), block.Demand)
	}
	hits := 0
	for i := range int64(20) {
		if hit(t, c, i, 0, 512) {
			hits++
		}
	}
	if hits < 18 {
		t.Fatalf("%d of 20 hot chunks survived a scan", hits)
	}
}

// TestBackgroundTakesOnlyFreeRoom, in both tiers.
func TestBackgroundTakesOnlyFreeRoom(t *testing.T) {
	for _, o := range []Options{{MemoryBytes: 8 * cb}, {ScratchBytes: 8 * cb}} {
		c := open(t, disktest.New(1), o)
		for i := range int64(6) {
			c.Put(i, plain(i, cb), block.Demand)
		}
		for i := int64(100); i < 120; i++ {
			c.Put(i, plain(i, cb), block.Background|block.Soon)
		}
		for i := range int64(6) {
			if !hit(t, c, i, 0, 4096) {
				t.Fatalf("%+v: chunk %d was driven out by the background", o, i)
			}
		}
		if !hit(t, c, 100, 0, 4096) || !hit(t, c, 101, 0, 4096) || hit(t, c, 102, 0, 4096) {
			t.Fatalf("%+v: free room was not used, or more than that", o)
		}
	}
	// What the sweep brings is worth room in memory, but not a write.
	for _, o := range []Options{{MemoryBytes: 8 * cb}, {ScratchBytes: 8 * cb}} {
		c := open(t, disktest.New(1), o)
		c.Put(1, plain(1, cb), block.Background)
		if got, want := hit(t, c, 1, 0, 512), o.ScratchBytes == 0; got != want {
			t.Errorf("%+v: a chunk of the sweep is kept: %v", o, got)
		}
	}
	// Demand drives out the background's first.
	c := open(t, disktest.New(1), Options{ScratchBytes: 8 * cb})
	for i := range int64(4) {
		c.Put(i, plain(i, cb), block.Demand)
		c.Put(100+i, plain(100+i, cb), block.Background|block.Soon)
	}
	for i := range int64(4) {
		c.Put(10+i, plain(10+i, cb), block.Demand)
	}
	for i := range int64(4) {
		if !hit(t, c, i, 0, 512) || !hit(t, c, 10+i, 0, 512) || hit(t, c, 100+i, 0, 512) {
			t.Fatal("demand drove out demand while the background had room")
		}
	}
}

func TestScratchPromotesOnSecondTouch(t *testing.T) {
	c := open(t, disktest.New(1), Options{MemoryBytes: 8 * cb, ScratchBytes: 32 * cb})
	last := plain(7, cb)[:3*4096+512]
	c.Put(7, last, block.Demand) // the short last chunk of a volume
	for n, want := range []Stats{{ScratchHits: 1}, {ScratchHits: 2, Promoted: 1}, {ScratchHits: 2, Promoted: 1, MemoryHits: 1}} {
		if !hit(t, c, 7, 3*4096, 512) {
			t.Fatal("not found")
		}
		st := c.Stats()
		if st.ScratchHits != want.ScratchHits || st.Promoted != want.Promoted || st.MemoryHits != want.MemoryHits {
			t.Fatalf("touch %d: %+v", n+1, st)
		}
	}
	if c.ReadAt(make([]byte, 1024), 7, 3*4096) {
		t.Fatal("read beyond the end of a short chunk")
	}
	for i := range int64(100) {
		c.Put(100+i, plain(100+i, cb), block.Demand)
	}
	if st := c.Stats(); st.ScratchChunks != 32 || st.Evicted != 69 {
		t.Fatalf("%+v", st)
	}
}

func TestDamagedScratchIsAMiss(t *testing.T) {
	fs := disktest.New(1)
	c := open(t, fs, Options{ScratchBytes: 8 * cb})
	for i := range int64(8) {
		c.Put(i, plain(i, cb), block.Demand)
	}
	for i := range int64(8) {
		fs.Flip("cache/scratch", i*cb+int64(i)*4096+17)
	}
	for i := range int64(8) {
		if !hit(t, c, i, (int(i)*4096+8192)%cb, 4096) { // another block of it
			t.Fatal("a whole block was refused")
		}
		if hit(t, c, i, int(i)*4096, 512) {
			t.Fatal("a damaged block was served")
		}
		if hit(t, c, i, (int(i)*4096+8192)%cb, 512) {
			t.Fatal("a damaged chunk was kept")
		}
	}
	if st := c.Stats(); st.Corrupt != 8 || st.ScratchChunks != 0 {
		t.Fatalf("%+v", st)
	}
	c.Put(3, plain(3, cb), block.Demand)
	if !hit(t, c, 3, 0, cb) {
		t.Fatal("its slot is not used again")
	}
}

func TestScratchFailures(t *testing.T) {
	fs := disktest.New(1)
	c := open(t, fs, Options{MemoryBytes: 4 * cb, ScratchBytes: 64 * cb})
	fs.SetCapacity(fs.Used() + 8*cb)
	for i := range int64(64) {
		c.Put(i, plain(i, cb), block.Demand)
	}
	st := c.Stats()
	if st.Failures == 0 || st.ScratchSlots > 16 {
		t.Fatalf("%+v", st)
	}
	n := 0
	for i := range int64(64) {
		if hit(t, c, i, 0, 512) {
			n++
		}
	}
	if n < 4 {
		t.Fatalf("%d chunks of the 8 that fit are there", n)
	}
	fs.SetCapacity(0)
	fs.Fail(disktest.Fault{At: 1, Ops: disktest.OpRead, Path: "cache/scratch", Err: syscall.EIO, Lasting: true})
	for i := range int64(64) {
		hit(t, c, i, 0, 512)
	}
	fs.Fail(disktest.Fault{At: 1, Ops: disktest.OpWrite, Path: "cache/scratch", Err: syscall.EIO, Lasting: true})
	for i := int64(100); i < 150; i++ {
		c.Put(i, plain(i, cb), block.Demand)
	}
	if st = c.Stats(); !st.ScratchOff {
		t.Fatalf("%+v", st)
	}
	if !hit(t, c, 149, 0, 512) {
		t.Fatal("without scratch, memory takes what demand brings")
	}
}

func TestWipedAtNew(t *testing.T) {
	fs := disktest.New(1)
	c := open(t, fs, Options{ScratchBytes: 8 * cb})
	c.Put(1, plain(1, cb), block.Demand)
	must(t, c.Close())
	c = open(t, fs, Options{ScratchBytes: 8 * cb})
	if hit(t, c, 1, 0, 512) {
		t.Fatal("found after a restart")
	}
	if st, err := fs.Stat("cache/scratch"); err != nil || st.Size != 0 {
		t.Fatal(st, err)
	}
	if _, err := New(fs, "cache", Options{ChunkBytes: 1000, Size: 1}); block.KindOf(err) != block.KindInvalid {
		t.Fatal(err)
	}
}

func TestSharedMemory(t *testing.T) {
	m := NewMemory(8 * cb)
	a := open(t, disktest.New(1), Options{Memory: m})
	b := open(t, disktest.New(2), Options{Memory: m, ChunkBytes: 16 << 10})
	a.Put(1, plain(1, cb), 0)
	b.Put(1, plain(2, 16<<10), 0)
	p, q := make([]byte, 512), make([]byte, 512)
	if !a.ReadAt(p, 1, 0) || !b.ReadAt(q, 1, 0) || bytes.Equal(p, q) {
		t.Fatal("volumes see each other's chunks")
	}
	must(t, a.Close())
	if m.Bytes() != 16<<10 || !b.ReadAt(q, 1, 0) {
		t.Fatal("closing one volume's cache took another's chunks", m.Bytes())
	}
}

// TestAgainstTwin: random calls; what is found is what was put last, and what
// was dropped is not found.
func TestAgainstTwin(t *testing.T) {
	for seed := range uint64(6) {
		r := rand.New(rand.NewPCG(seed, 2))
		fs := disktest.New(seed)
		c := open(t, fs, Options{ChunkBytes: 16 << 10, MemoryBytes: int64(seed%3) * 10 * (16 << 10), ScratchBytes: int64(seed%4) * 20 * (16 << 10)})
		if seed == 5 {
			fs.Fail(disktest.Fault{At: 40, Ops: disktest.OpWrite, Err: syscall.EIO})
		}
		put := map[int64][]byte{}
		for step := range 3000 {
			i := r.Int64N(60)
			switch r.IntN(8) {
			case 0:
				c.Drop(i)
				delete(put, i)
			case 1, 2, 3:
				if put[i] == nil {
					put[i] = plain(int64(r.Uint32()), 16<<10)
				}
				c.Put(i, put[i], []block.Flags{block.Demand, block.Background, block.Background | block.Soon}[r.IntN(3)])
			default:
				off := r.IntN(32) * 512
				p := make([]byte, 512*(1+r.IntN(32-off/512)))
				if c.ReadAt(p, i, off) && (put[i] == nil || !bytes.Equal(p, put[i][off:off+len(p)])) {
					t.Fatalf("seed %d step %d: chunk %d at %d: other bytes, or dropped (%v)", seed, step, i, off, put[i] == nil)
				}
			}
		}
		st := c.Stats()
		if st.MemoryBytes > c.opt.MemoryBytes || st.ScratchChunks > st.ScratchSlots {
			t.Fatalf("seed %d: %+v", seed, st)
		}
	}
}

// TestConcurrent has readers race with eviction, promotion and drops on real
// files. Each chunk has a version in all its words; a reader never sees two
// chunks, or two versions, in one.
func TestConcurrent(t *testing.T) {
	t.Chdir(t.TempDir())
	c := open(t, disk.OS(), Options{ChunkBytes: 16 << 10, MemoryBytes: 6 * (16 << 10), ScratchBytes: 10 * (16 << 10)})
	var wg sync.WaitGroup
	stop := time.Now().Add(300 * time.Millisecond)
	for w := range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			r := rand.New(rand.NewPCG(uint64(w), 3))
			b := make([]byte, 16<<10)
			for time.Now().Before(stop) {
				i := r.Int64N(24)
				switch r.IntN(6) {
				case 0:
					c.Drop(i)
				case 1, 2:
					v := uint64(i)<<32 | uint64(r.Uint32())
					for k := 0; k < len(b); k += 8 {
						binary.LittleEndian.PutUint64(b[k:], v)
					}
					c.Put(i, b, block.Flags(r.IntN(2)*2))
				default:
					off := r.IntN(32) * 512
					p := b[:512*(1+r.IntN(32-off/512))]
					if !c.ReadAt(p, i, off) {
						continue
					}
					v := binary.LittleEndian.Uint64(p)
					for k := 0; k < len(p); k += 8 {
						if binary.LittleEndian.Uint64(p[k:]) != v || v>>32 != uint64(i) {
							t.Errorf("chunk %d at %d: %#x, %#x", i, off+k, v, binary.LittleEndian.Uint64(p[k:]))
							return
						}
					}
				}
			}
		}()
	}
	wg.Wait()
	st := c.Stats()
	if st.Corrupt != 0 {
		t.Fatalf("eviction was taken for damage: %+v", st)
	}
	t.Logf("%+v", st)
}

func TestHitsDoNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	t.Chdir(t.TempDir())
	mem := open(t, disk.OS(), Options{MemoryBytes: 8 * cb})
	mem.Put(1, plain(1, cb), 0)
	scratch, err := New(disk.OS(), "scratch", Options{Size: 1 << 40, ScratchBytes: 8 * cb})
	must(t, err)
	defer scratch.Close()
	scratch.Put(1, plain(1, cb), 0)
	for name, c := range map[string]*Cache{"memory": mem, "scratch": scratch} {
		for _, n := range []int{512, 4096, cb} {
			p := make([]byte, n)
			if a := testing.AllocsPerRun(100, func() {
				if !c.ReadAt(p, 1, 0) {
					t.Fatal("missed")
				}
			}); a != 0 {
				t.Errorf("%s: a hit of %d bytes allocates %v times", name, n, a)
			}
		}
	}
}

// BenchmarkHit: what does a 4 KiB hit cost, by tier?
func BenchmarkHit(b *testing.B) {
	b.Chdir(b.TempDir())
	for _, o := range []Options{{MemoryBytes: 64 << 20}, {ScratchBytes: 64 << 20}} {
		name := "memory"
		if o.ScratchBytes > 0 {
			name = "scratch"
		}
		b.Run(name, func(b *testing.B) {
			c := open(b, disk.OS(), o)
			for i := range int64(512) {
				c.Put(i, plain(i, chunk.DefaultSize), 0)
			}
			p := make([]byte, 4096)
			b.ReportAllocs()
			n := int64(0)
			for b.Loop() {
				n++
				if !c.ReadAt(p, n*7919%512, int(n%16)*4096) {
					b.Fatal("missed")
				}
			}
		})
	}
}
