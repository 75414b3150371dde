package volume

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"time"

	"forerun/block"
	"forerun/disk/disktest"
	"forerun/internal/chunk"
)

// model is what each sector may hold after a crash: what it held at the last
// Flush, and everything written to it since.
type model struct {
	now     []byte
	flushed []byte
	since   map[int64][][]byte // by sector
}

func newModel(content []byte) *model {
	return &model{bytes.Clone(content), bytes.Clone(content), map[int64][][]byte{}}
}

func (m *model) write(off int64, p []byte) {
	copy(m.now[off:], p)
	for at := int64(0); at < int64(len(p)); at += 512 {
		s := (off + at) / 512
		m.since[s] = append(m.since[s], bytes.Clone(p[at:at+512]))
	}
}

func (m *model) flush() {
	copy(m.flushed, m.now)
	clear(m.since)
}

func (m *model) clone() *model {
	c := &model{bytes.Clone(m.now), bytes.Clone(m.flushed), map[int64][][]byte{}}
	for s, v := range m.since {
		c.since[s] = append([][]byte(nil), v...)
	}
	return c
}

// judge says what is wrong with got, if anything. Sectors written since the
// flush may be torn, but each byte is of one of the versions.
func (m *model) judge(got []byte) error {
	for s := int64(0); s*512 < int64(len(got)); s++ {
		g, f := got[s*512:s*512+512], m.flushed[s*512:s*512+512]
		if bytes.Equal(g, f) {
			continue
		}
		vs, ok := m.since[s]
		if !ok {
			return fmt.Errorf("sector %d was flushed and is another now", s)
		}
		for i := range g {
			good := g[i] == f[i]
			for _, v := range vs {
				good = good || g[i] == v[i]
			}
			if !good {
				return fmt.Errorf("sector %d byte %d is %#x: neither what was flushed nor written since", s, i, g[i])
			}
		}
	}
	return nil
}

// adopt goes on with what is there after a crash.
func (m *model) adopt(got []byte) {
	copy(m.now, got)
	copy(m.flushed, got)
	clear(m.since)
}

// steps does random work. Errors end it.
func steps(g *rig, m *model, r *rand.Rand, n int) (err error) {
	ctx := context.Background()
	size := int64(len(m.now))
	for range n {
		k := 1 + r.Int64N(12)
		if r.IntN(5) == 0 {
			k = 1 + r.Int64N(400)
		}
		off := r.Int64N(size / 512)
		if r.IntN(3) == 0 {
			off &^= 7
		}
		if r.IntN(6) == 0 {
			off, k = off*512/int64(g.opt.ChunkBytes)*int64(g.opt.ChunkBytes)/512, int64(g.opt.ChunkBytes)/512*(1+r.Int64N(3))
		}
		k = min(k, size/512-off)
		switch r.IntN(12) {
		case 0, 1, 2, 3, 4:
			p := make([]byte, k*512)
			for i := range p {
				p[i] = byte(r.Uint32())
			}
			m.write(off*512, p) // a write that fails may be there too
			err = g.v.WriteAt(ctx, p, off*512, 0)
		case 5:
			m.write(off*512, make([]byte, k*512))
			err = g.v.Zero(ctx, off*512, k*512, block.MayTrim)
		case 6:
			err = g.v.Flush(ctx, 0)
			if err == nil {
				m.flush()
			}
		case 7:
			err = g.v.Commit()
		case 8:
			_, err = g.v.Survey(ctx, r.Int64N(g.v.Chunks()))
		case 9:
			err = g.v.Fetch(ctx, g.v.Absent(nil, r.Int64N(g.v.Chunks()), 3), block.Background)
		default:
			p := make([]byte, k*512)
			if err = g.v.ReadAt(ctx, p, off*512, 0); err == nil && !bytes.Equal(p, m.now[off*512:(off+k)*512]) {
				err = fmt.Errorf("read other bytes than were written at %d", off*512)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// after opens what a crash left and judges it.
func (g *rig) after(t *testing.T, fs *disktest.FS, store *memStore, m *model) *rig {
	t.Helper()
	n := &rig{fs: fs, store: store, opt: g.opt, remote: &remote{content: g.remote.content, cb: g.remote.cb, codec: g.remote.codec}}
	n.remote.bySig.Store(g.remote.bySig.Load())
	if g.opt.Tier != nil {
		n.opt.Tier = newMapTier(1, 2)
	}
	n.open(t)
	consistent(t, n.v)
	got := n.read(t, 0, int64(len(m.now)))
	if err := m.judge(got); err != nil {
		t.Fatal(err)
	}
	m.adopt(got)
	consistent(t, n.v)
	return n
}

// TestCrashAtEverySync cuts the power at every sync and opens what is left, twice over.
func TestCrashAtEverySync(t *testing.T) {
	seeds := uint64(4)
	if raceEnabled || testing.Short() {
		seeds = 2
	}
	for seed := range seeds {
		size, cbytes := 2<<20-512, []int{16 << 10, 64 << 10, 256 << 10, 16 << 10}[seed]
		content := source(seed, size)
		fs := twinFS(seed)
		g := newRig(t, fs, content, cbytes)
		g.remote.bySig.Store(seed%2 == 1)
		must(t, g.v.Close())
		g.opt.Tune.LogBytes = []int64{1 << 10, 8 << 10, 16 << 20, 4 << 10}[seed]
		g.opt.Tier = newMapTier(seed, 2)
		m := newModel(content)
		type cut struct {
			fs    *disktest.FS
			store *memStore
			m     *model
			n     int
		}
		var cuts []cut
		fs.OnSync(func(n int) {
			cuts = append(cuts, cut{fs.Image(seed*1000 + uint64(n)), g.store.image(uint64(n)), m.clone(), n})
		})
		g.open(t)
		r := rand.New(rand.NewPCG(seed, 3))
		if err := steps(g, m, r, 220); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		fs.OnSync(nil)
		must(t, g.v.Close())
		t.Logf("seed %d: %d cuts", seed, len(cuts))
		for _, c := range cuts {
			t.Run(fmt.Sprintf("seed %d sync %d", seed, c.n), func(t *testing.T) {
				n := g.after(t, c.fs, c.store, c.m)
				if c.n%3 != 0 {
					return
				}
				// Go on, and cut again without a warning.
				if err := steps(n, c.m, rand.New(rand.NewPCG(seed, uint64(c.n))), 30); err != nil {
					t.Fatal(err)
				}
				n.after(t, c.fs.Crash(), n.store.image(uint64(c.n)), c.m)
			})
		}
	}
}

// TestEveryCallFails lets call after call fail, kills the process there, and
// then also cuts the power.
func TestEveryCallFails(t *testing.T) {
	size := 1 << 20
	content := source(21, size)
	every := int64(7)
	if raceEnabled || testing.Short() {
		every = 31
	}
	for _, errno := range []error{syscall.EIO, syscall.ENOSPC} {
		for call := int64(1); ; call += every {
			fs := twinFS(uint64(call))
			g := newRig(t, fs, content, 16<<10)
			must(t, g.v.Close())
			g.opt.Tune.LogBytes = 2 << 10
			m := newModel(content)
			g.open(t)
			fs.FailAt(call, errno)
			err := steps(g, m, rand.New(rand.NewPCG(5, 5)), 120)
			failed := fs.Failed()
			if err != nil && !failed {
				t.Fatalf("call %d: %v", call, err)
			}
			if err != nil && strings.Contains(err.Error(), "other bytes") {
				t.Fatalf("call %d: %v", call, err)
			}
			fs.Fail(disktest.Fault{})
			// What goes on in the same process must be right as well.
			m.now = g.read(t, 0, int64(size))
			if err := m.judge(m.now); err != nil {
				t.Fatalf("call %d, in the same process: %v", call, err)
			}
			if err := steps(g, m, rand.New(rand.NewPCG(6, uint64(call))), 40); err != nil &&
				(strings.Contains(err.Error(), "other bytes") || block.KindOf(err) == block.KindCorrupt) {
				t.Fatalf("call %d, later: %v", call, err)
			}
			m2 := m.clone()
			crashed := fs.Image(uint64(call))
			store := g.store.image(uint64(call))
			killed := fs.Kill()
			t.Run(fmt.Sprintf("%v at call %d", errno, call), func(t *testing.T) {
				g.after(t, crashed, store, m)
				// A killed process loses nothing that it acknowledged, flushed or
				// not, as far as the map goes; the journal has the rest.
				g.after(t, killed, g.store, m2)
			})
			if !failed {
				break
			}
		}
	}
}

// TestFullDisk runs out of space for a while.
func TestFullDisk(t *testing.T) {
	content := source(22, 2<<20)
	fs := twinFS(22)
	g := newRig(t, fs, content, 16<<10)
	m := newModel(content)
	r := rand.New(rand.NewPCG(22, 1))
	if err := steps(g, m, r, 50); err != nil {
		t.Fatal(err)
	}
	fs.SetCapacity(fs.Used() + 32<<10)
	full := 0
	for range 200 {
		if err := steps(g, m, r, 1); block.KindOf(err) == block.KindNoSpace {
			full++
			// What failed in part is read before going on.
			m.now = g.read(t, 0, int64(len(m.now)))
			if err := m.judge(m.now); err != nil {
				t.Fatal(err)
			}
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if full == 0 {
		t.Fatal("the disk never was full")
	}
	fs.SetCapacity(0)
	g.flush(t)
	m.flush()
	if err := steps(g, m, r, 50); err != nil {
		t.Fatal(err)
	}
	g.after(t, fs.Crash(), g.store.image(1), m)
}

// TestFillSurvives: what was committed is not fetched again after a crash.
func TestFillSurvives(t *testing.T) {
	content := source(23, 4<<20)
	for i := range content {
		content[i] |= 1
	}
	fs := twinFS(23)
	g := newRig(t, fs, content, 16<<10)
	must(t, g.v.Close())
	g.opt.Tune.CommitEvery = 10 * time.Millisecond
	g.opt.Tune.LogBytes = 4 << 10
	g.open(t)
	ctx := context.Background()
	for i := int64(0); i < 200; i++ {
		must(t, g.v.Fetch(ctx, []int64{i}, block.Background))
		if i%20 == 0 {
			time.Sleep(5 * time.Millisecond)
		}
	}
	for g.v.Stats().Commits == 0 || !g.v.table.clean() {
		time.Sleep(5 * time.Millisecond)
	}
	m := newModel(content)
	n := g.after(t, fs.Crash(), g.store.image(9), m)
	if got := len(n.remote.brought); got != 56 {
		t.Fatalf("%d chunks were fetched after the crash, 56 were missing", got)
	}
}

func (t *table) clean() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.dirty.empty()
}

// TestSyncOrder is the golden order: data, then sync, then map.
func TestSyncOrder(t *testing.T) {
	content := source(24, 1<<20)
	for i := range content {
		content[i] |= 1
	}
	fs := twinFS(24)
	g := newRig(t, fs, content, cb)
	ctx := context.Background()
	at := len(fs.Trace())
	var stores []int
	g.store.trace = func(string) { stores = append(stores, len(fs.Trace())-at) }
	must(t, g.v.WriteAt(ctx, make([]byte, 512), 0, 0))
	must(t, g.v.Deliver(3, chunk.Seal(nil, content[3*cb:4*cb], chunk.Raw)))
	must(t, g.v.Flush(ctx, 0))
	got := fs.Trace()[at:]
	lines := strings.Split(strings.TrimSpace(got), "\n")
	var order []string
	pos := 0
	for _, l := range lines {
		for len(stores) > 0 && stores[0] <= pos {
			order = append(order, "store.sync")
			stores = stores[1:]
		}
		f := strings.Fields(l)
		order = append(order, f[0]+" "+strings.TrimSuffix(strings.TrimPrefix(f[1], "vol/"), tmpName))
		pos += len(l) + 1
	}
	want := "create overlay.0000, truncate overlay.0000, write overlay.0000, write sigs, " +
		"sync overlay.0000, syncdir vol, store.sync, write map.log, sync map.log"
	if s := strings.Join(order, ", "); s != want {
		t.Fatalf("order\n%s\nshould be\n%s\ntrace:\n%s", s, want, got)
	}
}
