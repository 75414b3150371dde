package disktest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"

	"forerun/block"
	"forerun/disk"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func create(t *testing.T, f *FS, name string) disk.File {
	t.Helper()
	h, err := f.Open(name, disk.Write|disk.Create)
	must(t, err)
	return h
}

func put(t *testing.T, h disk.File, off int64, p []byte) {
	t.Helper()
	if n, err := h.WriteAt(p, off); n != len(p) || err != nil {
		t.Fatalf("wrote %d of %d: %v", n, len(p), err)
	}
}

func content(t *testing.T, f *FS, name string) []byte {
	t.Helper()
	h, err := f.Open(name, disk.Read)
	must(t, err)
	defer h.Close()
	s, err := h.Stat()
	must(t, err)
	p := make([]byte, s.Size)
	if n, err := h.ReadAt(p, 0); int64(n) != s.Size || err != nil {
		t.Fatal(n, err)
	}
	return p
}

// TestAgainstTwin does random calls and compares with plain byte slices.
func TestAgainstTwin(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 7))
		f := New(seed)
		h := create(t, f, "a")
		var twin []byte
		grow := func(n int64) {
			if n > int64(len(twin)) {
				twin = append(twin, make([]byte, n-int64(len(twin)))...)
			}
		}
		for step := range 400 {
			off, n := r.Int64N(40000), 1+r.Int64N(9000)
			switch r.IntN(7) {
			case 0, 1, 2:
				p := bytes.Repeat([]byte{byte(1 + r.IntN(255))}, int(n))
				put(t, h, off, p)
				grow(off + n)
				copy(twin[off:], p)
			case 3:
				must(t, h.Punch(off, n))
				if off < int64(len(twin)) {
					clear(twin[off:min(off+n, int64(len(twin)))])
				}
			case 4:
				must(t, h.Truncate(off))
				if off < int64(len(twin)) {
					twin = twin[:off]
				} else {
					grow(off)
				}
				twin = bytes.Clone(twin)
			case 5:
				must(t, h.Allocate(off, n))
				grow(off + n)
			case 6:
				must(t, h.Sync())
				f = f.Image(r.Uint64())
				if len(f.names) == 0 { // the name was not durable
					f = New(seed)
				}
				if _, err := f.Stat("a"); err != nil {
					h = create(t, f, "a")
					put(t, h, 0, twin)
				} else {
					h = create(t, f, "a")
				}
				must(t, f.SyncDir("."))
			}
			if got := content(t, f, "a"); !bytes.Equal(got, twin) {
				t.Fatalf("seed %d step %d: content differs from the twin's (%d, %d bytes)", seed, step, len(got), len(twin))
			}
			var used int64
			for _, n := range f.names {
				var u int64
				for i := range int64(60) {
					if n.pages[i] != nil || n.isReserved(i) {
						u++
					}
				}
				if u != n.used {
					t.Fatalf("seed %d step %d: %d pages used, %d counted", seed, step, u, n.used)
				}
				used += u
			}
			if used*pageSize != f.Used() {
				t.Fatalf("seed %d step %d: %d bytes used, Used says %d", seed, step, used*pageSize, f.Used())
			}
			at := int64(0)
			for {
				s, e, err := h.Data(at)
				if err == io.EOF {
					s, e = int64(len(twin)), int64(len(twin))
				}
				if at < s && len(bytes.Trim(twin[at:s], "\x00")) > 0 {
					t.Fatalf("seed %d step %d: Data skips bytes in [%d, %d)", seed, step, at, s)
				}
				if at = e; err == io.EOF {
					break
				}
			}
		}
	}
}

func TestFarOffsetsAreCheap(t *testing.T) {
	f := New(1)
	h := create(t, f, "far")
	put(t, h, 8<<40, []byte("there"))
	if s, _ := h.Stat(); s.Size != 8<<40+5 || s.Allocated != pageSize {
		t.Fatalf("%+v", s)
	}
	if s, e, err := h.Data(0); s != 8<<40 || e != 8<<40+5 || err != nil {
		t.Fatal(s, e, err)
	}
	must(t, h.Punch(0, 9<<40))
	must(t, h.Truncate(0))
	if f.Used() != 0 {
		t.Fatal(f.Used())
	}
	must(t, h.Allocate(0, 1<<40))
	if f.Used() != 1<<40 {
		t.Fatal(f.Used())
	}
}

func TestSyncedSurvivesUnsyncedVaries(t *testing.T) {
	old, mid, now := bytes.Repeat([]byte{1}, 8192), bytes.Repeat([]byte{2}, 8192), bytes.Repeat([]byte{3}, 8192)
	saw := map[string]bool{}
	for seed := range uint64(400) {
		f := New(seed)
		h := create(t, f, "a")
		put(t, h, 0, old)
		put(t, h, 8192, []byte("kept"))
		must(t, h.Sync())
		must(t, f.SyncDir("."))
		put(t, h, 0, mid)
		put(t, h, 0, now)
		put(t, h, 20000, []byte("tail"))
		g := f.Crash()
		if _, err := h.WriteAt(old, 0); err == nil {
			t.Fatal("a file outlived the crash")
		}
		if err := h.Sync(); err == nil {
			t.Fatal("synced after the crash")
		}
		if _, err := f.Stat("a"); err == nil {
			t.Fatal("the file system outlived the crash")
		}
		got := content(t, g, "a")
		if string(got[8192:8196]) != "kept" {
			t.Fatalf("seed %d: synced bytes are gone", seed)
		}
		saw[fmt.Sprint("length ", len(got) == 20004, len(got) == 8196)] = true
		for at := 0; at < 8192; at += sectorSize {
			s := got[at : at+sectorSize]
			switch {
			case bytes.Equal(s, old[:sectorSize]):
				saw["old"] = true
			case bytes.Equal(s, mid[:sectorSize]):
				saw["between"] = true
			case bytes.Equal(s, now[:sectorSize]):
				saw["new"] = true
			default:
				saw["torn"] = true
			}
		}
	}
	for _, w := range []string{"old", "between", "new", "torn", "length true false", "length false true", "length false false"} {
		if !saw[w] {
			t.Errorf("no crash gave %q", w)
		}
	}
}

// TestNames checks the promises on names in every image, and that each
// permitted outcome turns up.
func TestNames(t *testing.T) {
	saw := map[string]bool{}
	for seed := range uint64(300) {
		f := New(seed)
		must(t, f.MkdirAll("d/e"))
		for _, n := range []string{"d/final", "d/gone", "d/stays"} {
			h := create(t, f, n)
			put(t, h, 0, []byte("old"))
			must(t, h.Sync())
			must(t, h.Close())
		}
		must(t, f.SyncDir("d"))
		h := create(t, f, "d/tmp")
		put(t, h, 0, []byte("new"))
		must(t, h.Sync())
		must(t, f.Rename("d/tmp", "d/final"))
		must(t, f.Remove("d/gone"))
		create(t, f, "d/made")
		g := f.Crash()
		if string(content(t, g, "d/stays")) != "old" {
			t.Fatal("a durable file changed")
		}
		if s, err := g.Stat("d/e"); err != nil || !s.Dir {
			t.Fatal("the directory is gone")
		}
		c := string(content(t, g, "d/final"))
		if c != "old" && c != "new" {
			t.Fatalf("seed %d: %q", seed, c)
		}
		_, tmp := g.Stat("d/tmp")
		if c == "new" && tmp == nil {
			t.Fatalf("seed %d: the rename happened in half", seed)
		}
		_, gone := g.Stat("d/gone")
		_, made := g.Stat("d/made")
		saw["final "+c] = true
		saw[fmt.Sprint("tmp ", tmp == nil)] = true
		saw[fmt.Sprint("gone ", gone == nil)] = true
		saw[fmt.Sprint("made ", made == nil)] = true
	}
	if len(saw) != 8 {
		t.Errorf("only these were seen: %v", saw)
	}
	f := New(1)
	h := create(t, f, "tmp")
	put(t, h, 0, []byte("new"))
	must(t, h.Sync())
	must(t, f.Rename("tmp", "final"))
	must(t, f.SyncDir("."))
	for seed := range uint64(50) {
		g := f.Image(seed)
		if names, _ := g.List("."); len(names) != 1 || string(content(t, g, "final")) != "new" {
			t.Fatalf("seed %d: %v after SyncDir", seed, names)
		}
	}
}

func TestKill(t *testing.T) {
	f := New(3)
	l, err := f.Lock("lock")
	must(t, err)
	if _, err := f.Lock("lock"); block.KindOf(err) != block.KindBusy {
		t.Fatalf("locked twice: %v", err)
	}
	h := create(t, f, "a")
	put(t, h, 0, []byte("unsynced"))
	g := f.Kill()
	if _, err := l.WriteAt([]byte("x"), 0); err == nil {
		t.Fatal("the killed process writes")
	}
	if string(content(t, g, "a")) != "unsynced" {
		t.Fatal("the kernel lost a write")
	}
	l, err = g.Lock("lock")
	must(t, err)
	must(t, l.Close())
	_, err = g.Lock("lock")
	must(t, err)
	lost := false
	for seed := range uint64(50) {
		if _, err := g.Image(seed).Stat("a"); err != nil {
			lost = true
		}
	}
	if !lost {
		t.Fatal("what was never synced is durable after a kill")
	}
}

func TestFaults(t *testing.T) {
	f := New(4)
	h := create(t, f, "a")
	other := create(t, f, "b")
	f.FailAt(2, syscall.EIO)
	put(t, h, 0, make([]byte, 100))
	p := bytes.Repeat([]byte{1}, 9000)
	n, err := h.WriteAt(p, 0)
	if !errors.Is(err, syscall.EIO) || block.KindOf(err) != block.KindIO || n >= len(p) || !f.Failed() {
		t.Fatal(n, err)
	}
	if got := content(t, f, "a"); n > 0 && !bytes.Equal(got[:n], p[:n]) {
		t.Fatal("the part that was written is not there")
	}
	put(t, h, 0, p)
	f.Fail(Fault{At: 1, Ops: Syncs, Path: "a", Err: syscall.ENOSPC, Lasting: true})
	must(t, other.Sync())
	for range 3 {
		if err := h.Sync(); block.KindOf(err) != block.KindNoSpace {
			t.Fatal(err)
		}
	}
	f.Fail(Fault{At: 1, Ops: OpRead, Err: syscall.EIO})
	if _, err := h.ReadAt(p, 0); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	f.Fail(Fault{})
	must(t, h.Sync())
}

func TestFailedSyncIsNotHealedByTheNext(t *testing.T) {
	lost, healed := false, true
	for seed := range uint64(60) {
		f := New(seed)
		h := create(t, f, "a")
		must(t, f.SyncDir("."))
		put(t, h, 0, bytes.Repeat([]byte{1}, 4*pageSize))
		f.FailAt(1, syscall.EIO)
		if h.Sync() == nil {
			t.Fatal("no error")
		}
		must(t, h.Sync())
		if !bytes.Equal(content(t, f.Image(seed), "a"), bytes.Repeat([]byte{1}, 4*pageSize)) {
			lost = true
		}
		put(t, h, 0, bytes.Repeat([]byte{1}, 4*pageSize))
		must(t, h.Sync())
		if !bytes.Equal(content(t, f.Image(seed), "a"), bytes.Repeat([]byte{1}, 4*pageSize)) {
			healed = false
		}
	}
	if !lost || !healed {
		t.Fatalf("lost by the failed sync: %v, saved by writing again: %v", lost, healed)
	}
}

func TestCapacity(t *testing.T) {
	f := New(5)
	f.SetCapacity(4 * pageSize)
	h := create(t, f, "a")
	n, err := h.WriteAt(make([]byte, 6*pageSize), 0)
	if n != 4*pageSize || block.KindOf(err) != block.KindNoSpace {
		t.Fatal(n, err)
	}
	put(t, h, 0, make([]byte, 4*pageSize)) // in place
	if free, _ := f.Free("."); free != 0 {
		t.Fatal(free)
	}
	if err := h.Allocate(4*pageSize, 1); block.KindOf(err) != block.KindNoSpace {
		t.Fatal(err)
	}
	must(t, h.Punch(0, pageSize))
	put(t, h, 5*pageSize, []byte("x"))
	f.SetCapacity(8 * pageSize)
	must(t, h.Allocate(0, 8*pageSize))
	g := f.Kill()
	if g.Used() != 8*pageSize {
		t.Fatal(g.Used())
	}
	must(t, g.Remove("a"))
	if free, _ := g.Free("."); free != 8*pageSize {
		t.Fatal(free)
	}
}

func TestTraceAndHooks(t *testing.T) {
	f := New(6)
	var at []string
	f.OnSync(func(n int) {
		g := f.Image(uint64(n))
		names, _ := g.List("/s")
		at = append(at, fmt.Sprint(n, len(names)))
	})
	must(t, f.MkdirAll("/s"))
	h := create(t, f, "/s/a")
	put(t, h, 512, []byte("xyz"))
	must(t, h.Sync())
	must(t, h.Truncate(9))
	must(t, h.Punch(0, 8))
	must(t, h.Allocate(0, 8))
	must(t, f.Rename("/s/a", "/s/b"))
	must(t, f.SyncDir("/s"))
	f.FailAt(1, syscall.EIO)
	if f.Remove("/s/b") == nil {
		t.Fatal("no error")
	}
	want := "mkdir /s\ncreate /s/a\nwrite /s/a 512+3\nsync /s/a\ntruncate /s/a 9\npunch /s/a 0+8\n" +
		"allocate /s/a 0+8\nrename /s/a -> /s/b\nsyncdir /s\nremove /s/b: input/output error\n"
	if got := f.Trace(); got != want {
		t.Fatalf("trace:\n%s", got)
	}
	if f.Calls() != 10 || len(at) != 2 {
		t.Fatal(f.Calls(), at)
	}
	var g *FS
	f.OnSync(func(int) { g = f.Crash() })
	f.OnCall(nil)
	if err := h.Sync(); err == nil || g == nil {
		t.Fatal("the hook pulled the plug, the call succeeded")
	}
	if _, err := g.List("/s"); err != nil {
		t.Fatal(err)
	}
}

func TestMisuse(t *testing.T) {
	f := New(7)
	if _, err := f.Open("no/such", disk.Write|disk.Create); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if _, err := f.Open("a", disk.Read|disk.Create); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	h := create(t, f, "a")
	if _, err := f.Open("a", disk.Write|disk.Create|disk.Excl); !errors.Is(err, fs.ErrExist) {
		t.Fatal(err)
	}
	ro, err := f.Open("a", disk.Read)
	must(t, err)
	if _, err := ro.WriteAt([]byte("x"), 0); !errors.Is(err, syscall.EBADF) {
		t.Fatal(err)
	}
	must(t, h.Close())
	if err := h.Sync(); !errors.Is(err, fs.ErrClosed) || block.KindOf(err) != block.KindClosed {
		t.Fatal(err)
	}
	if err := f.MkdirAll("a/b"); !errors.Is(err, syscall.ENOTDIR) {
		t.Fatal(err)
	}
	must(t, f.MkdirAll("d"))
	create(t, f, "d/x")
	if err := f.Remove("d"); !errors.Is(err, syscall.ENOTEMPTY) {
		t.Fatal(err)
	}
	must(t, f.Remove("d/x"))
	must(t, f.Remove("d"))
	if err := f.Rename("a", "d/x"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if _, err := ro.ReadAt(make([]byte, 1), 0); err != io.EOF {
		t.Fatal(err)
	}
	put(t, create(t, f, "a"), 0, []byte("abc"))
	f.Flip("a", 1)
	if got := content(t, f, "a"); got[1] != 'b'^0xff {
		t.Fatalf("%q", got)
	}
	if !strings.Contains(Op(OpWrite|OpSync).String(), "write+sync") {
		t.Fatal(Op(OpWrite | OpSync))
	}
}

// TestSameSeedSameImage: two runs alike give the same bytes and the same trace.
func TestSameSeedSameImage(t *testing.T) {
	run := func() (string, []byte) {
		f := New(99)
		h := create(t, f, "a")
		must(t, f.SyncDir("."))
		r := rand.New(rand.NewPCG(1, 1))
		for range 200 {
			put(t, h, r.Int64N(60000), bytes.Repeat([]byte{byte(r.IntN(256))}, 1+r.IntN(6000)))
			if r.IntN(20) == 0 {
				must(t, h.Sync())
			}
		}
		tr := f.Trace()
		return tr, content(t, f.Crash(), "a")
	}
	ta, a := run()
	tb, b := run()
	if ta != tb || !bytes.Equal(a, b) {
		t.Fatal("the same seed gave two outcomes")
	}
}
