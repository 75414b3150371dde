package volume

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
)

const cb = chunk.DefaultSize

// TestSmallWriteIntoUntouchedChunk: 512 bytes are taken at once, without the
// source, and a read of the whole chunk then has both.
func TestSmallWriteIntoUntouchedChunk(t *testing.T) {
	content := source(1, 8<<20)
	g := newRig(t, twinFS(1), content, 1<<20)
	want := bytes.Clone(content)
	g.remote.down.Store(true)
	p := bytes.Repeat([]byte{7}, 512)
	g.write(t, 3<<20+512*5, p)
	copy(want[3<<20+512*5:], p)
	if len(g.remote.fetches) != 0 {
		t.Fatal("a write asked the source")
	}
	if !g.v.Near(3<<20+512*5, 512) || g.v.Near(3<<20+512*4, 512) {
		t.Fatal("Near is wrong about the sector or its neighbour")
	}
	if got := g.read(t, 3<<20+512*5, 512); !bytes.Equal(got, p) {
		t.Fatal("the sector is not as written")
	}
	err := g.v.ReadAt(context.Background(), make([]byte, 1<<20), 3<<20, 0)
	wantKind(t, err, block.KindUnavailable)
	g.remote.down.Store(false)
	if got := g.read(t, 3<<20, 1<<20); !bytes.Equal(got, want[3<<20:4<<20]) {
		t.Fatal("the chunk is not what source and write make of it")
	}
	st := g.v.Stats()
	if st.Modified != 1 || st.PartlyAbsent != 0 || st.OverlayBytes != 512 {
		t.Fatalf("%+v", st)
	}
	consistent(t, g.v)
}

// TestWriteWhileFetched: what the workload writes or zeroes while its chunk is
// on the way stays.
func TestWriteWhileFetched(t *testing.T) {
	content := source(2, 1<<20)
	for i := range content {
		content[i] |= 1
	}
	for _, zero := range []bool{false, true} {
		g := newRig(t, twinFS(1), content, cb)
		want := bytes.Clone(content)
		g.remote.hold = make(chan struct{})
		done := make(chan []byte, 1)
		go func() { done <- g.read(t, 0, 2*cb) }()
		for {
			g.remote.mu.Lock()
			n := len(g.remote.fetches)
			g.remote.mu.Unlock()
			if n > 0 {
				break
			}
			time.Sleep(time.Millisecond)
		}
		if zero {
			must(t, g.v.Zero(context.Background(), 0, cb, 0))
			clear(want[:cb])
		} else {
			g.write(t, 1024, bytes.Repeat([]byte{0}, 3000/512*512))
			clear(want[1024 : 1024+3000/512*512])
		}
		close(g.remote.hold)
		if got := <-done; !bytes.Equal(got, want[:2*cb]) {
			t.Fatal("the read that waited does not have what was written meanwhile")
		}
		g.same(t, want)
		consistent(t, g.v)
		if st := g.v.Stats(); zero && st.Zero != 1 {
			t.Fatalf("%+v", st)
		}
	}
}

func TestOneFetchPerRead(t *testing.T) {
	content := source(3, 4<<20)
	for i := range content {
		content[i] |= 2
	}
	g := newRig(t, twinFS(1), content, cb)
	g.read(t, 5*cb, cb)
	g.read(t, 512, 2<<20)
	if len(g.remote.fetches) != 2 || len(g.remote.fetches[1]) != 32 {
		t.Fatalf("fetches %v", g.remote.fetches)
	}
	for i, n := range g.remote.brought {
		if n != 1 {
			t.Fatalf("chunk %d was asked for %d times", i, n)
		}
	}
	g.read(t, 0, 2<<20)
	if len(g.remote.fetches) != 2 {
		t.Fatal("held chunks were asked for again")
	}
}

func TestDamagedStoreIsRefetched(t *testing.T) {
	content := source(4, 2<<20)
	g := newRig(t, twinFS(1), content, cb)
	g.same(t, content)
	held := g.v.Stats().Held
	g.store.damage()
	g.same(t, content)
	st := g.v.Stats()
	if st.Refetched == 0 || st.Held != held {
		t.Fatalf("held %d before, %+v", held, st)
	}
	g.same(t, content)
	if n := g.v.Stats().Refetched; n != st.Refetched {
		t.Fatalf("refetched %d, then %d", st.Refetched, n)
	}
	must(t, g.v.Commit())
	g.reopen(t)
	g.v.SetRemote(nil)
	g.same(t, content)
	g.store.damage()
	wantKind(t, g.v.ReadAt(context.Background(), make([]byte, len(content)), 0, 0), block.KindCorrupt)
	if g.v.Stats().Held != held {
		t.Fatal("a volume without a source forgot what it held")
	}
	consistent(t, g.v)
}

func TestWrongBytesAreRefused(t *testing.T) {
	content := source(5, 1<<20)
	for i := range content {
		content[i] |= 1
	}
	g := newRig(t, twinFS(1), content, cb)
	g.remote.lie.Store(true)
	wantKind(t, g.v.ReadAt(context.Background(), make([]byte, 512), 0, 0), block.KindCorrupt)
	st := g.v.Stats()
	if st.Corrupt == 0 || st.Held != 0 || st.Untouched != 16 {
		t.Fatalf("%+v", st)
	}
	wantKind(t, g.v.Deliver(0, chunk.Seal(nil, content[:cb/2], chunk.Raw)), block.KindCorrupt)
	wantKind(t, g.v.Deliver(16, chunk.Seal(nil, content[:cb], chunk.Raw)), block.KindRange)
	wantKind(t, g.v.Deliver(-1, chunk.Seal(nil, content[:cb], chunk.Raw)), block.KindRange)
	g.remote.lie.Store(false)
	g.same(t, content)
}

func TestFullStoreServesReaders(t *testing.T) {
	content := source(6, 1<<20)
	for i := range content {
		content[i] |= 1
	}
	g := newRig(t, twinFS(1), content, cb)
	g.store.full = true
	g.same(t, content)
	if st := g.v.Stats(); st.Held != 0 || st.Refused == 0 || st.Untouched != st.Chunks {
		t.Fatalf("%+v", st)
	}
	wantKind(t, g.v.Fetch(context.Background(), []int64{1, 2}, block.Background), block.KindNoSpace)
	wantKind(t, g.v.Prefetch(context.Background(), 0, 1<<20, block.Background), block.KindNoSpace)
	g.store.full = false
	must(t, g.v.Prefetch(context.Background(), 0, 1<<20, block.Background))
	if !g.v.Filled() {
		t.Fatal("not filled")
	}
}

func TestDetached(t *testing.T) {
	content := source(7, 1<<20)
	g := newRig(t, twinFS(1), content, cb)
	g.v.SetRemote(nil)
	p := make([]byte, 512)
	wantKind(t, g.v.ReadAt(context.Background(), p, 0, 0), block.KindUnavailable)
	wantKind(t, g.v.Fetch(context.Background(), []int64{0}, 0), block.KindUnavailable)
	_, err := g.v.Survey(context.Background(), 0)
	wantKind(t, err, block.KindUnavailable)
	g.write(t, 0, p)
	must(t, g.v.ReadAt(context.Background(), p, 0, 0))
	ext, err := g.v.Extents(context.Background(), nil, 0, 1<<20, 0)
	if err != nil || len(ext) != 2 || ext[0].State != block.Modified || ext[1].State != block.Untouched {
		t.Fatal(ext, err)
	}
}

func TestCanceledReadLeavesNoTrace(t *testing.T) {
	content := source(8, 1<<20)
	for i := range content {
		content[i] |= 1
	}
	g := newRig(t, twinFS(1), content, cb)
	g.remote.hold = make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(5*time.Millisecond, cancel)
	p := make([]byte, 2*cb)
	wantKind(t, g.v.ReadAt(ctx, p, 0, 0), block.KindCanceled)
	if len(g.v.waits) != 0 {
		t.Fatal("the reader still waits")
	}
	close(g.remote.hold)
	must(t, g.remote.deliver(0))
	if !bytes.Equal(p, make([]byte, 2*cb)) {
		t.Fatal("bytes were put into a buffer that was given back")
	}
	g.same(t, content)
}

func TestOpenRefuses(t *testing.T) {
	content := source(9, 1<<20)
	fs := twinFS(1)
	g := newRig(t, fs, content, cb)
	if _, err := Open(fs, "vol", g.opt); block.KindOf(err) != block.KindBusy {
		t.Fatalf("opened twice: %v", err)
	}
	g.write(t, 0, make([]byte, 512))
	g.flush(t)
	must(t, g.v.Close())
	for _, c := range []struct {
		change func(*Options)
		kind   block.Kind
		says   string
	}{
		{func(o *Options) { o.Size += cb }, block.KindInvalid, "bytes"},
		{func(o *Options) { o.ChunkBytes *= 2 }, block.KindInvalid, "chunks"},
		{func(o *Options) { o.SourceID = "disk-2" }, block.KindInvalid, "source"},
		{func(o *Options) { o.Size = 100 }, block.KindInvalid, "multiple"},
		{func(o *Options) { o.BlockSize = 768 }, block.KindInvalid, "block size"},
		{func(o *Options) { o.ChunkBytes = 12345 }, block.KindInvalid, "chunk size"},
		{func(o *Options) { o.Store = nil }, block.KindInvalid, "store"},
	} {
		o := g.opt
		c.change(&o)
		_, err := Open(fs, "vol", o)
		if block.KindOf(err) != c.kind || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%v (%v), should be %v and speak of %q", err, block.KindOf(err), c.kind, c.says)
		}
	}
	g.open(t)
	g.same(t, append(make([]byte, 512), content[512:]...))
}

// TestLostFiles: whatever file goes missing or is damaged, what the workload
// wrote is never silently replaced by what the source has.
func TestLostFiles(t *testing.T) {
	content := source(10, 1<<20)
	for i := range content {
		content[i] |= 1
	}
	for _, name := range []string{"map", "map.log", "overlay.0000", "sigs"} {
		for _, harm := range []string{"remove", "flip", "cut"} {
			fs := twinFS(1)
			g := newRig(t, fs, content, cb)
			g.opt.Tune.LogBytes = 1
			g.reopen(t)
			g.write(t, 0, make([]byte, 512))
			g.flush(t)
			g.read(t, cb, cb)
			g.write(t, 2*cb, make([]byte, 512))
			g.flush(t)
			g.opt.Tune.LogBytes = 0
			g.reopen(t)
			g.write(t, 4*cb, make([]byte, cb))
			g.flush(t)
			g.write(t, 6*cb, make([]byte, cb))
			g.flush(t)
			must(t, g.v.Close())
			path := "vol/" + name
			switch harm {
			case "remove":
				must(t, fs.Remove(path))
			case "flip":
				fs.Flip(path, 40)
			case "cut":
				f, err := fs.Open(path, 1)
				must(t, err)
				must(t, f.Truncate(60))
				f.Close()
			}
			v, err := Open(fs, "vol", g.opt)
			if name == "sigs" || name == "overlay.0000" && harm == "flip" {
				if err != nil {
					t.Fatalf("%s %s: %v", harm, name, err)
				}
				if name == "sigs" {
					g.v, g.remote.v = v, v
					v.SetRemote(g.remote)
					want := bytes.Clone(content)
					clear(want[:512])
					clear(want[2*cb : 2*cb+512])
					clear(want[4*cb : 5*cb])
					clear(want[6*cb : 7*cb])
					g.same(t, want)
				}
				v.Close()
				continue
			}
			if err == nil {
				t.Fatalf("%s %s: opened", harm, name)
			}
			if block.KindOf(err) != block.KindCorrupt {
				t.Fatalf("%s %s: %v (%v)", harm, name, err, block.KindOf(err))
			}
		}
	}
}

func TestExtentsAndSurvey(t *testing.T) {
	content := make([]byte, 4<<20+512)
	copy(content[10*cb:], bytes.Repeat([]byte{1}, 6*cb))
	g := newRig(t, twinFS(1), content, cb)
	ctx := context.Background()
	ext, err := g.v.Extents(ctx, nil, 0, int64(len(content)), block.Local)
	if err != nil || len(ext) != 1 || ext[0].State != block.Untouched || ext[0].Kind != block.Data || g.remote.asked.Load() != 0 {
		t.Fatal(ext, err)
	}
	g.write(t, 12*cb+512, make([]byte, 512))
	g.read(t, 11*cb, 512)
	ext, err = g.v.Extents(ctx, nil, 512, int64(len(content))-512, 0)
	must(t, err)
	want := []block.Extent{
		{Off: 512, Len: 10*cb - 512, Kind: block.Hole, State: block.ZeroState},
		{Off: 10 * cb, Len: cb, State: block.Untouched},
		{Off: 11 * cb, Len: cb, State: block.Held},
		{Off: 12 * cb, Len: cb, State: block.Modified},
		{Off: 13 * cb, Len: 3 * cb, State: block.Untouched},
		{Off: 16 * cb, Len: 48*cb + 512, Kind: block.Hole, State: block.ZeroState},
	}
	for k, e := range ext {
		if k >= len(want) || e != want[k] {
			t.Fatalf("%+v, should be %+v", ext, want)
		}
	}
	consistent(t, g.v)
	if got := g.v.Absent(nil, 0, 100); len(got) != 5 || got[0] != 10 || got[1] != 12 {
		t.Fatal(got)
	}
	if got := g.v.Absent(nil, 11, 2); len(got) != 2 || got[0] != 12 || got[1] != 13 {
		t.Fatal(got)
	}
	asked := g.remote.asked.Load()
	next, err := g.v.Survey(ctx, 0)
	if err != nil || next != 65 || g.remote.asked.Load() != asked+1 {
		t.Fatal(next, err)
	}
	must(t, g.v.Prefetch(ctx, 0, int64(len(content)), block.Background))
	if !g.v.Filled() || !g.v.Near(0, int64(len(content))) {
		t.Fatalf("%+v", g.v.Stats())
	}
	if next, err = g.v.Survey(ctx, 0); err != nil || next != 65 || g.remote.asked.Load() != asked+1 {
		t.Fatal("a filled volume asked again", next, err)
	}
	g.flush(t)
	g.reopen(t)
	g.v.SetRemote(nil)
	clear(content[12*cb+512 : 12*cb+1024])
	g.same(t, content)
	st := g.v.Stats()
	if st.Zero != 59 || st.Held != 5 || st.Modified != 1 {
		t.Fatalf("%+v", st)
	}
}

func TestReadAhead(t *testing.T) {
	content := source(11, 8<<20)
	for i := range content {
		content[i] |= 1
	}
	g := newRig(t, twinFS(1), content, cb)
	must(t, g.v.Close())
	g.opt.Tune.AheadMax = 0
	g.open(t)
	for off := int64(0); off < 8<<20; off += 16 << 10 {
		if got := g.read(t, off, 16<<10); !bytes.Equal(got, content[off:off+16<<10]) {
			t.Fatal("other bytes")
		}
		g.v.ahead.wait()
	}
	st := g.v.Stats()
	if st.DemandMissed > 2 || st.AheadChunks < 120 {
		t.Fatalf("a run missed %d times, %d chunks came ahead", st.DemandMissed, st.AheadChunks)
	}
	widest := 0
	for k, f := range g.remote.flags {
		if f.Class() == block.Background {
			if f != block.Background|block.Soon {
				t.Fatalf("read-ahead as %v", f)
			}
			widest = max(widest, len(g.remote.fetches[k]))
		}
	}
	if widest != 16 {
		t.Fatalf("the widest window was %d chunks", widest)
	}
	for i, n := range g.remote.brought {
		if n != 1 {
			t.Fatalf("chunk %d was asked for %d times", i, n)
		}
	}
}

func TestCommitFailsAndIsTriedAgain(t *testing.T) {
	content := source(12, 1<<20)
	g := newRig(t, twinFS(1), content, cb)
	g.same(t, content)
	held := g.v.Stats().Held
	g.store.noSync = errors.New("no")
	if g.v.Commit() == nil {
		t.Fatal("committed what the store did not sync")
	}
	g.write(t, 0, bytes.Repeat([]byte{1}, 512))
	g.flush(t) // writes do not depend on the store
	g.store.noSync = nil
	must(t, g.v.Commit())
	g.reopen(t)
	if st := g.v.Stats(); st.Held+1 < held || st.Modified != 1 {
		t.Fatalf("held %d, then %+v", held, st)
	}
	g.v.SetRemote(nil)
	g.same(t, append(bytes.Repeat([]byte{1}, 512), content[512:]...))
}

func TestClosed(t *testing.T) {
	g := newRig(t, twinFS(1), source(13, 1<<20), cb)
	must(t, g.v.Close())
	must(t, g.v.Close())
	wantKind(t, g.v.ReadAt(context.Background(), make([]byte, 512), 0, 0), block.KindClosed)
	wantKind(t, g.v.Deliver(0, chunk.Packed{Codec: chunk.Zeros, Plain: cb}), block.KindClosed)
}
