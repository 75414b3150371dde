package volume

import (
	"bytes"
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"forerun/block"
)

func freeRig(t *testing.T, size int, skip bool, free func(off int64) bool) (*rig, []byte) {
	content := bytes.Repeat([]byte("free or not, it is what it is..."), size/32)
	g := newRig(t, twinFS(1), content, cb)
	must(t, g.v.Close())
	g.opt.SkipFree = skip
	g.remote.free = free
	g.open(t)
	return g, content
}

// TestFreeChunksStay: what the source calls free is not absent, is shown as
// free, reads as what the source has, and loses the mark when it is anything else.
func TestFreeChunksStay(t *testing.T) {
	// Chunks 4 to 19 are free, 20 in part, 30 and 31 beside holes.
	g, content := freeRig(t, 64*cb, true, func(off int64) bool {
		return off >= 4*cb && off < 20*cb+cb/2 || off >= 30*cb && off < 32*cb
	})
	clear(content[31*cb : 31*cb+8192])
	clear(content[40*cb : 44*cb])
	ctx := context.Background()
	next, err := g.v.Survey(ctx, 0)
	if err != nil || next != 64 {
		t.Fatal(next, err)
	}
	consistent(t, g.v)
	if st := g.v.Stats(); st.Free != 18 || st.Zero != 4 || st.Untouched != 42 {
		t.Fatalf("%+v", st)
	}
	absent := g.v.Absent(nil, 0, 100)
	for _, i := range absent {
		if i >= 4 && i < 20 || i == 30 || i == 31 {
			t.Errorf("chunk %d is absent", i)
		}
	}
	if len(absent) != 42 {
		t.Errorf("%d chunks are absent: %v", len(absent), absent)
	}
	if got := g.v.Absent(nil, 5, 1); len(got) != 1 || got[0] != 20 {
		t.Errorf("%v after 5", got)
	}
	asked := g.remote.asked.Load()
	ext, err := g.v.Extents(ctx, nil, 4*cb+512, 16*cb, 0)
	must(t, err)
	if len(ext) < 2 || ext[0] != (block.Extent{Off: 4*cb + 512, Len: 16*cb - 512, Kind: block.Free, State: block.Untouched}) ||
		ext[1].Kind != block.Data {
		t.Fatalf("%+v", ext)
	}
	if n := g.remote.asked.Load() - asked; n != 1 {
		t.Errorf("the source was asked %d times about one chunk that is not free", n)
	}
	// Fill brings the rest; the volume is filled then.
	must(t, g.v.Fetch(ctx, absent, block.Background))
	if !g.v.Filled() || g.v.Stats().Untouched != 0 || g.v.Stats().Free != 18 {
		t.Fatalf("%+v", g.v.Stats())
	}
	if g.v.Near(4*cb, cb) {
		t.Error("a free chunk is said to be near")
	}
	// Read: the source's bytes, held from then on.
	if got := g.read(t, 5*cb, 512); !bytes.Equal(got, content[5*cb:5*cb+512]) {
		t.Errorf("%q", got[:32])
	}
	// Written in part: wanted again. Written whole, zeroed, trimmed: not free any more.
	g.write(t, 6*cb+512, make([]byte, 512))
	g.write(t, 7*cb, make([]byte, cb))
	must(t, g.v.Zero(ctx, 8*cb, cb, 0))
	must(t, g.v.Trim(ctx, 9*cb, 2*cb, 0))
	consistent(t, g.v)
	if st := g.v.Stats(); st.Free != 12 || st.PartlyAbsent != 1 || st.Zero != 7 || st.Held != 43 || st.Modified != 2 {
		t.Errorf("%+v", st)
	}
	if got := g.v.Absent(nil, 0, 10); !slices.Equal(got, []int64{6}) || g.v.Filled() {
		t.Errorf("%v is absent", got)
	}
	if _, err := g.v.Survey(ctx, 0); err != nil {
		t.Fatal(err)
	}
	if st := g.v.Stats(); st.Free != 12 {
		t.Errorf("asked again: %+v", st)
	}
	// After a start the source is asked again.
	g.flush(t)
	g.reopen(t)
	if st := g.v.Stats(); st.Free != 0 || st.Untouched != 12 {
		t.Errorf("%+v", st)
	}
	if _, err := g.v.Survey(ctx, 0); err != nil {
		t.Fatal(err)
	}
	consistent(t, g.v)
	if st := g.v.Stats(); st.Free != 12 || st.Untouched != 0 {
		t.Errorf("%+v", st)
	}
	// Without SkipFree everything is wanted.
	must(t, g.v.Close())
	g.opt.SkipFree = false
	g.open(t)
	if _, err := g.v.Survey(ctx, 0); err != nil {
		t.Fatal(err)
	}
	if st := g.v.Stats(); st.Free != 0 || len(g.v.Absent(nil, 0, 100)) != 13 {
		t.Errorf("%+v", st)
	}
	ext, err = g.v.Extents(ctx, nil, 12*cb, cb, 0)
	if err != nil || ext[0].Kind != block.Data {
		t.Errorf("%v %v", ext, err)
	}
}

// TestFreeMarksAgainstArray compares the marks with a plain array under random
// changes, over pages that are all free and such that are not.
func TestFreeMarksAgainstArray(t *testing.T) {
	for seed := range uint64(20) {
		tb := newTable(newGeometry(5*pageChunks*(16<<10)-512, 16<<10))
		r := rand.New(rand.NewPCG(seed, 8))
		want := make([]bool, tb.chunks)
		lock := func(int64) *sync.RWMutex { m := new(sync.RWMutex); m.RLock(); return m }
		for range 400 {
			i := r.Int64N(tb.chunks)
			n := min(1+r.Int64N(int64(1)<<r.IntN(15)), tb.chunks-i)
			if r.IntN(8) == 0 { // whole pages
				i, n = i>>pageShift<<pageShift, pageChunks
				n = min(n, tb.chunks-i)
			}
			switch r.IntN(6) {
			case 0:
				tb.setBase(i, baseUntouched, baseHeld)
				n = 1
			case 1:
				tb.setMask(i, 0, 1)
				n = 1
			case 2:
				if n < 100 || r.IntN(4) == 0 {
					tb.markZero(i, i+n, lock)
				} else {
					n = 0
				}
			case 3:
				tb.zeroChunk(i)
				n = 1
			case 4:
				if i&(pageChunks-1) == 0 && n > 100 && r.IntN(3) == 0 {
					tb.zeroPage(int(i >> pageShift))
					n = int64(tb.pageLen(int(i >> pageShift)))
				} else {
					n = 0
				}
			default:
				tb.markFree(i, i+n)
				for k := i; k < i+n; k++ {
					want[k] = tb.nib(k) == 0
				}
				n = 0
			}
			for k := i; k < i+n; k++ {
				want[k] = want[k] && tb.nib(k) == 0
			}
		}
		free := int64(0)
		var absents []int64
		for i := range want {
			if got := tb.marked(int64(i)); got != want[i] {
				t.Fatalf("seed %d: chunk %d is marked %v, should be %v", seed, i, got, want[i])
			}
			if want[i] {
				free++
			} else if absent(tb.nib(int64(i))) {
				absents = append(absents, int64(i))
			}
		}
		if got := tb.stats().free; got != free {
			t.Fatalf("seed %d: %d marks are counted, %d are there", seed, got, free)
		}
		if got := tb.absent(nil, 0, tb.chunks, int(tb.chunks)); !slices.Equal(got, absents) {
			t.Fatalf("seed %d: %d chunks are absent, should be %d", seed, len(got), len(absents))
		}
		for range 200 {
			i := r.Int64N(tb.chunks)
			if tb.nib(i) != 0 {
				continue
			}
			_, run := tb.run(i, tb.chunks)
			got, n := tb.markedRun(i, i+run)
			m := int64(1)
			for m < run && want[i+m] == want[i] {
				m++
			}
			if got != want[i] || n != m {
				t.Fatalf("seed %d: %d chunks from %d on are marked %v, should be %d, %v", seed, n, i, got, m, want[i])
			}
		}
	}
}

// TestMarkWhileWritten: marks and writes at the same time leave no chunk both.
func TestMarkWhileWritten(t *testing.T) {
	g, _ := freeRig(t, 64*cb, true, func(int64) bool { return true })
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 3))
			for range 200 {
				if w < 2 {
					if _, err := g.v.Survey(context.Background(), 0); err != nil {
						t.Error(err)
					}
					g.v.table.markFree(0, 64)
					continue
				}
				off := r.Int64N(64) * cb
				if err := g.v.WriteAt(context.Background(), make([]byte, 512), off, 0); err != nil {
					t.Error(err)
				}
				if r.IntN(8) == 0 {
					if err := g.v.ReadAt(context.Background(), make([]byte, 4096), r.Int64N(64)*cb, 0); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	consistent(t, g.v)
}
