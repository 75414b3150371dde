package volume

import (
	"bytes"
	"context"
	"runtime"
	"syscall"
	"testing"
	"time"

	"forerun/block"
	"forerun/disk"
)

func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// spent is the processor time of this process: other than the clock, it does not
// depend on who else uses the machine.
func spent(t *testing.T) time.Duration {
	t.Helper()
	var u syscall.Rusage
	must(t, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// TestSparse64TiB opens, surveys, writes, flushes, reopens and zeroes 64 TiB on
// real files, and bounds memory and time.
func TestSparse64TiB(t *testing.T) {
	if raceEnabled {
		t.Skip("measures time and memory")
	}
	t.Chdir(t.TempDir())
	const size = 64 << 40
	before := heap()
	g := &rig{fs: disk.OS(), store: newMemStore(), remote: &remote{}}
	g.opt = Options{Name: "v", Size: size, Tune: Tuning{CommitEvery: time.Hour}}
	start := time.Now()
	g.open(t)
	g.v.SetRemote(sparseRemote{g.v})
	ctx := context.Background()
	for at := int64(0); at < g.v.Chunks(); {
		next, err := g.v.Survey(ctx, at)
		must(t, err)
		if next <= at {
			t.Fatal("no progress")
		}
		at = next
	}
	surveyed := time.Since(start)
	if st := g.v.Stats(); st.Zero != st.Chunks || !g.v.Filled() {
		t.Fatalf("%+v", st)
	}
	for tib := int64(0); tib < 64; tib += 9 {
		g.write(t, tib<<40+512*7, bytes.Repeat([]byte{9}, 4096+512))
	}
	g.flush(t)
	used := heap() - before
	t.Logf("opened and surveyed in %v, %d MiB, log %d bytes", surveyed, used>>20, g.v.Stats().LogBytes)
	if used > 32<<20 {
		t.Errorf("64 TiB of zeros take %d MiB", used>>20)
	}
	start = time.Now()
	cpu := spent(t)
	g.reopen(t)
	t.Logf("reopened in %v", time.Since(start))
	if d := spent(t) - cpu; d > 2*time.Second {
		t.Errorf("reopening took %v", d)
	}
	g.v.SetRemote(nil)
	got := g.read(t, 63<<40, 8192)
	want := make([]byte, 8192)
	copy(want[512*7:], bytes.Repeat([]byte{9}, 4096+512))
	if !bytes.Equal(got, want) {
		t.Fatal("other bytes")
	}
	start = time.Now()
	must(t, g.v.Zero(ctx, 0, size, block.MayTrim))
	took := time.Since(start)
	t.Logf("zeroed 64 TiB in %v", took)
	if st := g.v.Stats(); st.Zero != st.Chunks || st.OverlayBytes != 0 {
		t.Fatalf("%+v", st)
	}
	g.flush(t)
	ext, err := g.v.Extents(ctx, nil, 0, size, 0)
	if err != nil || len(ext) != 1 || ext[0].Len != size {
		t.Fatal(len(ext), err)
	}
}

// TestMapped1TiB has every chunk of 1 TiB held and every other one written in
// part, and bounds memory and the time to be ready again.
func TestMapped1TiB(t *testing.T) {
	if testing.Short() || raceEnabled {
		t.Skip("large")
	}
	t.Chdir(t.TempDir())
	const size = 1 << 40
	before := heap()
	g := &rig{fs: disk.OS(), store: newMemStore(), remote: &remote{}}
	g.opt = Options{Name: "v", Size: size, Tune: Tuning{CommitEvery: time.Hour}}
	g.open(t)
	v := g.v
	for pi := range v.table.pages {
		start := int64(pi) << pageShift
		p := v.table.own(start)
		for c := range pageChunks {
			n := uint8(baseHeld)
			if c%2 == 0 {
				n |= nibMod
				v.table.addSectors(p, start+int64(c), c%13*8, c%13*8+8)
			}
			p.setNib(c, n)
		}
		v.table.dirty.page(pi, true, true)
	}
	v.table.mu.Lock()
	dirty := v.table.dirty
	v.table.settle()
	v.table.dirty = dirty
	v.table.mu.Unlock()
	_, err := v.overlay.file(0) // the map says something is written there
	must(t, err)
	start := time.Now()
	g.flush(t)
	took := time.Since(start)
	used := heap() - before
	t.Logf("%d MiB of memory, checkpoint in %v", used>>20, took)
	if used > 64<<20 {
		t.Errorf("1 TiB takes %d MiB", used>>20)
	}
	st := v.Stats()
	must(t, v.Close())
	start = time.Now()
	cpu := spent(t)
	g.open(t)
	took = time.Since(start)
	t.Logf("ready in %v, %v of processor time", took, spent(t)-cpu)
	if d := spent(t) - cpu; d > 2*time.Second {
		t.Errorf("getting ready took %v", d)
	}
	if now := g.v.Stats(); now.Held != st.Held || now.Modified != st.Modified || now.OverlayBytes != st.OverlayBytes {
		t.Fatalf("%+v, was %+v", now, st)
	}
}

// TestLocalHitDoesNotAllocate: the read path of what is here.
func TestLocalHitDoesNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	t.Chdir(t.TempDir())
	content := source(1, 4<<20)
	g := newRig(t, disk.OS(), content, cb)
	must(t, g.v.Close())
	g.opt.Tier = newMapTier(1, 4)
	g.opt.Tune.AheadMax = 0
	g.open(t)
	ctx := context.Background()
	g.same(t, content)
	g.write(t, 0, make([]byte, 1<<20))           // full
	g.write(t, 2<<20+4096, make([]byte, 8192))   // in part, whole blocks
	g.write(t, 3<<20+512, make([]byte, 512))     // in part, a sector
	must(t, g.v.Zero(ctx, 1<<20+512<<10, cb, 0)) // zeros
	p := make([]byte, 128<<10)
	for name, c := range map[string]struct{ off, n int64 }{
		"overlay": {4096, 4096}, "overlay over chunks": {0, 128 << 10}, "tier": {1 << 20, 4096}, "zero": {1<<20 + 512<<10, 4096},
		"partly, mixed": {2 << 20, 16 << 10}, "partly, sectors": {3 << 20, 4096},
	} {
		if n := testing.AllocsPerRun(200, func() { must(t, g.v.ReadAt(ctx, p[:c.n], c.off, 0)) }); n != 0 {
			t.Errorf("a read of %s allocates %v times", name, n)
		}
	}
	if n := testing.AllocsPerRun(200, func() { must(t, g.v.WriteAt(ctx, p[:4096], 4096, 0)) }); n != 0 {
		t.Errorf("a write over what is written allocates %v times", n)
	}
}
