package sigs

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"forerun/block"
	"forerun/disk"
	"forerun/disk/disktest"
	"forerun/internal/chunk"
)

// tell learns what the source holds of [first, first+n).
func tell(t *Table, s *twin, first, n int64) {
	for i := first; i < first+n; i++ {
		kind, sig := kindOf(s.now[i])
		t.Learn(i, t.Token(i), kind, sig)
	}
}

// change writes v to [first, first+n).
func change(t *Table, s *twin, first, n int64, v uint64) {
	done := t.Change(first, n)
	for i := first; i < first+n; i++ {
		s.write(i, v)
	}
	done()
}

func settle(t *testing.T, tab *Table, s *twin) {
	t.Helper()
	if done, err := tab.Settle(func() (string, error) { s.flush(); return s.state(), nil }); !done || err != nil {
		t.Fatal(done, err)
	}
}

// TestPowerCutAtEveryCall goes through what makes old pages dangerous: pages of
// a summary that lags behind, forgotten as a whole, learned again. At each call
// the power is cut in many ways.
func TestPowerCutAtEveryCall(t *testing.T) {
	fs, s := disktest.New(3), newTwin()
	for i := range s.now[:400] {
		s.now[i] = uint64(i + 1)
	}
	s.flush()
	r := rand.New(rand.NewPCG(1, 1))
	cuts, knew := 0, 0
	hook := func() {
		fs.OnCall(func(n int64, _ disktest.Op) {
			for k := range uint64(12) {
				after, left := fs.Image(uint64(n)<<8|k), s.cut(r, true)
				tab := openTwin(t, after, left)
				known, err := left.checkAll(tab)
				if err != nil {
					t.Fatalf("before call %d: %v\n%s", n, err, fs.Trace())
				}
				if cuts++; known > 0 {
					knew++
				}
			}
		})
	}
	hook()
	tab := openTwin(t, fs, s)
	var life int
	restart := func(kill bool) {
		if !kill {
			if err := tab.Close(func() (string, error) { s.flush(); return s.state(), nil }); err != nil {
				t.Fatal(err)
			}
		}
		fs.OnCall(nil)
		fs = fs.Kill()
		hook()
		life++
		if tab = openTwin(t, fs, s); !tab.Stats().Kept {
			t.Fatalf("life %d: the table was not believed", life)
		}
	}
	tell(tab, s, 0, 10)
	tab.save()
	tell(tab, s, perPage, 20) // the summary in the file knows nothing of this page
	restart(true)
	change(tab, s, perPage, perPage, 7)
	settle(t, tab, s)
	tell(tab, s, perPage, 1)
	tab.save()
	tab.learnZeros(400, 200, tab.tokens())
	tab.save()
	restart(true)
	tell(tab, s, 0, 400)
	restart(false)
	change(tab, s, perPage-1, 2*perPage+2, 8)
	settle(t, tab, s)
	tell(tab, s, 2*perPage+3, 4)
	tab.save()
	change(tab, s, 500, 1, 9) // in a page of zeros
	tell(tab, s, 500, 1)
	settle(t, tab, s)
	change(tab, s, 0, 600, 0)
	tab.learnZeros(0, 600, tab.tokens())
	restart(false)
	if data, zero := tab.Known(); data != 0 || zero != 600 {
		t.Errorf("%d and %d are known at the end", data, zero)
	}
	change(tab, s, 3, 1, 5)
	fs.OnCall(nil)
	fs = fs.Kill()
	hook() // what was cut to nothing may come back
	if openTwin(t, fs, s).Stats().Kept {
		t.Error("a table was believed whose source was changed since it was settled")
	}
	if cuts < 500 || knew < cuts/10 {
		t.Errorf("%d cuts, after %d of them something was known", cuts, knew)
	}
}

func TestSettleRefusesWhatIsNotQuiet(t *testing.T) {
	fs, s := disktest.New(1), newTwin()
	tab := openTwin(t, fs, s)
	never := func() (string, error) { t.Error("asked for a state"); return "", nil }
	if done, err := tab.Settle(never); !done || err != nil { // nothing was changed
		t.Fatal(done, err)
	}
	done := tab.Change(5, 1)
	if ok, err := tab.Settle(never); ok || err != nil {
		t.Fatal("settled while a change is under way", err)
	}
	done()
	done() // again is nothing
	state := func() (string, error) { change(tab, s, 9, 1, 1); return s.state(), nil }
	if ok, err := tab.Settle(state); ok || err != nil {
		t.Fatal("settled although the source was changed after its state was taken", err)
	}
	if ok, err := tab.Settle(func() (string, error) { return "", nil }); ok || err != nil {
		t.Fatal("settled without a state", err)
	}
	boom := block.E("x", "", block.KindIO, nil)
	if ok, err := tab.Settle(func() (string, error) { return "x", boom }); ok || block.KindOf(err) != block.KindIO {
		t.Fatal(ok, err)
	}
	if ok, err := tab.Settle(func() (string, error) { return strings.Repeat("x", maxString+1), nil }); ok || err == nil {
		t.Fatal("recorded a state that has no room")
	}
	if !tab.Stats().Dirty {
		t.Fatal("clean, and never settled")
	}
	settle(t, tab, s)
	if tab.Stats().Dirty {
		t.Fatal("dirty, and settled")
	}
	late := tab.Change(1, 1)
	if err := tab.Close(never); err != nil {
		t.Fatal(err)
	}
	late()
	if openTwin(t, fs, s).Stats().Kept {
		t.Fatal("closed in the middle of a change, and believed")
	}
}

// TestBelief opens a closed table in other ways than it was left.
func TestBelief(t *testing.T) {
	for name, alter := range map[string]func(*Options){
		"same":       func(*Options) {},
		"state":      func(o *Options) { o.State = "other" },
		"no state":   func(o *Options) { o.State = "" },
		"params":     func(o *Options) { o.Params = "cut" },
		"chunks":     func(o *Options) { o.Chunks++ },
		"chunkbytes": func(o *Options) { o.ChunkBytes *= 2 },
	} {
		fs, s := disktest.New(1), newTwin()
		o := Options{Chunks: twinChunks, ChunkBytes: 8, Params: "fixed", State: "a"}
		tab, err := Open(fs, tableName, o)
		if err != nil {
			t.Fatal(err)
		}
		tell(tab, s, 0, 300)
		if err := tab.Close(nil); err != nil {
			t.Fatal(err)
		}
		if k, _ := tab.Get(0); k != Unknown {
			t.Error("a closed table answers")
		}
		alter(&o)
		if tab, err = Open(fs, tableName, o); err != nil {
			t.Fatal(err)
		}
		_, zero := tab.Known()
		if st := tab.Stats(); st.Kept != (name == "same") || (zero == 300) != st.Kept {
			t.Errorf("%s: %+v", name, st)
		}
		// Whatever it was, what is learned now must not mix with what was there.
		if k, _ := tab.Get(200); (k == Zero) != (name == "same") {
			t.Errorf("%s: %s", name, k)
		}
	}
	for _, o := range []Options{{Chunks: -1, ChunkBytes: 8}, {Chunks: 1}, {Chunks: 1 << 50, ChunkBytes: 8},
		{Chunks: 1, ChunkBytes: 8, Params: strings.Repeat("x", 2000)}} {
		if _, err := Open(disktest.New(1), tableName, o); block.KindOf(err) != block.KindInvalid {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

// TestOffIsNotBelievedLater: after its file failed the table no longer notes
// changes, so the file must not be believed even if the source's state is as recorded.
func TestOffIsNotBelievedLater(t *testing.T) {
	for _, ops := range []disktest.Op{disktest.OpWrite, disktest.OpRemove, disktest.OpSyncDir} {
		fs, s := disktest.New(1), newTwin()
		tab := openTwin(t, fs, s)
		tell(tab, s, 0, 5)
		fs.Fail(disktest.Fault{At: 1, Ops: disktest.OpRead | ops, Err: syscall.EIO, Lasting: true})
		tell(tab, s, 5, 1) // in the page at hand
		tell(tab, s, perPage*3, 3)
		tab.stripes[0].cached = -1
		if k, _ := tab.Get(0); k != Unknown || tab.Stats().Off == "" {
			t.Fatal(ops, k, tab.Stats())
		}
		if _, err := tab.Wait(t.Context(), tab.Version()); block.KindOf(err) != block.KindClosed {
			t.Fatal(err)
		}
		change(tab, s, 0, 1, 1)
		if err := tab.Close(nil); err != nil {
			t.Fatal(err)
		}
		fs.Fail(disktest.Fault{})
		for seed := range uint64(20) {
			left := s.cut(rand.New(rand.NewPCG(seed, 3)), true)
			left.at = 1 // as recorded
			if st := openTwin(t, fs.Image(seed), left).Stats(); st.Kept && ops != disktest.OpSyncDir {
				t.Fatalf("%s: %+v", ops, st)
			} else if known := st.Data + st.Zero; known > 0 {
				t.Fatalf("%s: %+v", ops, st)
			}
		}
	}
}

func TestFullDiskTurnsItOff(t *testing.T) {
	fs, s := disktest.New(1), newTwin()
	tab := openTwin(t, fs, s)
	fs.SetCapacity(fs.Used() + pageBytes)
	tell(tab, s, 0, twinChunks)
	st := tab.Stats()
	if st.Off == "" || st.Data+st.Zero > 0 {
		t.Fatalf("%+v", st)
	}
	if _, err := fs.Stat(tableName); block.KindOf(err) != block.KindNotFound {
		t.Errorf("the file still takes space: %v", err)
	}
	change(tab, s, 0, twinChunks, 1)
}

// TestHugeHole: 16 TiB of which 1 GiB is data. Everything grows in proportion.
func TestHugeHole(t *testing.T) {
	const cb, data = int64(64) << 10, int64(1) << 30
	size := int64(16) << 40
	if racing {
		size >>= 4
	}
	fs := disktest.New(1)
	o := Options{Chunks: size / cb, ChunkBytes: cb, State: "a"}
	before := heap()
	tab, err := Open(fs, tableName, o)
	if err != nil {
		t.Fatal(err)
	}
	if used := heap() - before; used > 1<<20 {
		t.Errorf("an empty table takes %d bytes of memory", used)
	}
	at := (size / 2) / cb
	facts := make([]fact, data/cb)
	for i := range facts {
		facts[i] = fact{tab.Token(at + int64(i)), Data, chunk.Sig{byte(i), 1}}
	}
	tab.learn(at, facts)
	tab.learnZeros(0, at, tab.tokens())
	tab.learnZeros(at+data/cb, size, tab.tokens())
	if d, z := tab.Known(); d != data/cb || z != (size-data)/cb || tab.nextUnknown(0) != o.Chunks {
		t.Fatal(d, z, tab.nextUnknown(0))
	}
	if used := heap() - before - fs.Used(); used > 8<<20 {
		t.Errorf("the table takes %d MiB of memory", used>>20)
	}
	if err := tab.Close(nil); err != nil {
		t.Fatal(err)
	}
	if fs.Used() > 6<<20 {
		t.Errorf("the file takes %d MiB", fs.Used()>>20)
	}
	if tab, err = Open(fs, tableName, o); err != nil || tab.nextUnknown(0) != o.Chunks {
		t.Fatal(err, tab.Stats())
	}
	if k, sig := tab.Get(at + 77); k != Data || sig != (chunk.Sig{77, 1}) {
		t.Error(k, sig)
	}
	if k, _ := tab.Get(3); k != Zero {
		t.Error(k)
	}
	done := tab.Change(0, o.Chunks)
	done()
	if d, z := tab.Known(); d != 0 || z != 0 {
		t.Error(d, z)
	}
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func TestWait(t *testing.T) {
	fs, s := disktest.New(1), newTwin()
	tab := openTwin(t, fs, s)
	v := tab.Version()
	got := make(chan error)
	go func() {
		w, err := tab.Wait(context.Background(), v)
		if err == nil && w == v {
			err = fmt.Errorf("version %d again", w)
		}
		got <- err
	}()
	tell(tab, s, 4, 1)
	if err := <-got; err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := tab.Wait(ctx, tab.Version()); block.KindOf(err) != block.KindCanceled {
		t.Fatal(err)
	}
	go func() {
		_, err := tab.Wait(context.Background(), tab.Version())
		got <- err
	}()
	if err := tab.Close(nil); err != nil {
		t.Fatal(err)
	}
	if err := <-got; block.KindOf(err) != block.KindClosed {
		t.Fatal(err)
	}
}

// TestConcurrent: writers, learners, readers and settling at once, on a real
// file. A chunk's value only grows, so who reads it before and after Get knows
// what the answer may be.
func TestConcurrent(t *testing.T) {
	dir := t.TempDir()
	var src [twinChunks]atomic.Uint64
	sums := make([]chunk.Sig, 4000)
	for v := range sums {
		_, sums[v] = kindOf(uint64(v))
	}
	tab, err := Open(disk.OS(), dir+"/s/sigs", Options{Chunks: twinChunks, ChunkBytes: 8, State: "x"})
	if err != nil {
		t.Fatal(err)
	}
	tab.learnZeros(0, twinChunks, tab.tokens())
	var locks [twinChunks]sync.Mutex // one writer of a chunk at a time
	var wg sync.WaitGroup
	var answers atomic.Int64
	for w := range 6 {
		r := rand.New(rand.NewPCG(uint64(w), 4))
		wg.Go(func() {
			for range 1500 {
				i := r.Int64N(twinChunks)
				switch {
				case w < 2:
					n := min(1+r.Int64N(3), twinChunks-i)
					done := tab.Change(i, n)
					for j := i; j < i+n; j++ {
						locks[j].Lock()
						if v := src[j].Load(); v < 3000 {
							src[j].Store(v + 1)
						}
						locks[j].Unlock()
					}
					done()
				case w < 4:
					token := tab.Token(i)
					kind, sig := kindOf(src[i].Load())
					tab.Learn(i, token, kind, sig)
				case w == 4 && i%8 == 0:
					if _, err := tab.Settle(func() (string, error) { return "y", nil }); err != nil {
						t.Error(err)
					}
				default:
					lo := src[i].Load()
					kind, sig := tab.Get(i)
					if kind == Unknown {
						break
					}
					answers.Add(1)
					hi := src[i].Load()
					ok := false
					for v := lo; v <= hi; v++ {
						ok = ok || v == 0 && kind == Zero || v > 0 && kind == Data && sums[v] == sig
					}
					if !ok {
						t.Errorf("chunk %d was %d to %d; the table says %s %s", i, lo, hi, kind, sig)
					}
				}
			}
		})
	}
	wg.Wait()
	if answers.Load() == 0 && tab.Stats().Learned == twinChunks {
		t.Error("nothing was ever known")
	}
	for i := range src {
		kind, sig := tab.Get(int64(i))
		if want, s := kindOf(src[i].Load()); kind != Unknown && (kind != want || sig != s) {
			t.Errorf("chunk %d: %s", i, kind)
		}
	}
	if err := tab.Close(func() (string, error) { return "y", nil }); err != nil {
		t.Fatal(err)
	}
	if tab, err = Open(disk.OS(), dir+"/s/sigs", Options{Chunks: twinChunks, ChunkBytes: 8, State: "y"}); err != nil || !tab.Stats().Kept {
		t.Fatal(err, tab.Stats())
	}
	if err := tab.Close(nil); err != nil {
		t.Fatal(err)
	}
}

func BenchmarkTable(b *testing.B) {
	tab, err := Open(disk.OS(), b.TempDir()+"/sigs", Options{Chunks: 1 << 20, ChunkBytes: 64 << 10})
	if err != nil {
		b.Fatal(err)
	}
	defer tab.Close(nil)
	b.Run("learn", func(b *testing.B) {
		for n := int64(0); b.Loop(); n++ {
			i := n * 7919 % (1 << 20)
			tab.Learn(i, tab.Token(i), Data, chunk.Sig{byte(i), byte(n)})
		}
	})
	b.Run("get", func(b *testing.B) {
		for n := int64(0); b.Loop(); n++ {
			tab.Get(n * 7919 % (1 << 20))
		}
	})
	b.Run("get in order", func(b *testing.B) {
		for n := int64(0); b.Loop(); n++ {
			tab.Get(n % (1 << 20))
		}
	})
}
