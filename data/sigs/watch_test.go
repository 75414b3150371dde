package sigs

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"forerun/block"
	"forerun/block/blocktest"
	"forerun/disk"
	"forerun/disk/disktest"
	"forerun/internal/chunk"
)

const cb = 64 << 10

func openFor(t *testing.T, dev block.Device, fs disk.FS) *Table {
	t.Helper()
	tab, err := Open(fs, tableName, Options{Chunks: (dev.Info().Size + cb - 1) / cb, ChunkBytes: cb, State: "s"})
	if err != nil {
		t.Fatal(err)
	}
	return tab
}

func TestSuite(t *testing.T) {
	blocktest.Test(t, func(t *testing.T) block.Device {
		dev := blocktest.NewTwin(3<<20+4096, 512)
		return Watch(dev, openFor(t, dev, disktest.New(1)))
	}, blocktest.Options{})
}

func TestWatchForgetsWhatIsWritten(t *testing.T) {
	ctx := context.Background()
	twin := blocktest.NewTwin(4*cb+512, 512)
	tab := openFor(t, twin, disktest.New(1))
	dev := Watch(twin, tab)
	all := func() {
		for i := range int64(5) {
			tab.Learn(i, tab.Token(i), Data, chunk.Sig{byte(i)})
		}
	}
	gone := func(what string, want ...bool) {
		t.Helper()
		for i := range int64(5) {
			if k, _ := tab.Get(i); (k == Unknown) != want[i] {
				t.Errorf("%s: chunk %d is %s", what, i, k)
			}
		}
		all()
	}
	all()
	if err := dev.WriteAt(ctx, make([]byte, 1024), cb-512, 0); err != nil {
		t.Fatal(err)
	}
	gone("write", true, true, false, false, false)
	if err := dev.Zero(ctx, 2*cb, cb, 0); err != nil {
		t.Fatal(err)
	}
	gone("zero", false, false, true, false, false)
	if err := dev.Trim(ctx, 4*cb, 512, 0); err != nil {
		t.Fatal(err)
	}
	gone("trim", false, false, false, false, true)
	if err := dev.WriteAt(ctx, nil, 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := dev.WriteAt(ctx, make([]byte, 512), 5*cb, 0); block.KindOf(err) != block.KindRange {
		t.Fatal(err)
	}
	if err := dev.Flush(ctx, 0); err != nil {
		t.Fatal(err)
	}
	if err := dev.Prefetch(ctx, 0, cb, 0); err != nil {
		t.Fatal(err)
	}
	gone("nothing", false, false, false, false, false)
}

// TestWriteThatMayStillHappen: a write whose caller gave up is never over.
func TestWriteThatMayStillHappen(t *testing.T) {
	ctx := context.Background()
	failing := blocktest.Fail(blocktest.NewTwin(300*cb, 512))
	tab := openFor(t, failing, disktest.New(1))
	dev := Watch(failing, tab)
	state := func() (string, error) { return "s2", nil }
	failing.Once("write", 1, block.KindNoSpace) // it is known what became of it
	if dev.WriteAt(ctx, make([]byte, 512), 0, 0) == nil {
		t.Fatal("no error")
	}
	if !tab.Learn(0, tab.Token(0), Zero, chunk.Sig{}) {
		t.Error("a write that failed goes on for ever")
	}
	if done, err := tab.Settle(state); !done || err != nil {
		t.Error(done, err)
	}
	for _, kind := range []block.Kind{block.KindCanceled, block.KindUnavailable} {
		failing.Once("write", 1, kind)
		if dev.WriteAt(ctx, make([]byte, 512), 0, 0) == nil {
			t.Fatal("no error")
		}
		if tab.Learn(0, tab.Token(0), Zero, chunk.Sig{}) {
			t.Errorf("%s: learned what may still be written", kind)
		}
		if !tab.Learn(200, tab.Token(200), Zero, chunk.Sig{}) {
			t.Errorf("%s: another page cannot be learned", kind)
		}
		if done, err := tab.Settle(state); done || err != nil {
			t.Error("settled", done, err)
		}
	}
}

func TestFileState(t *testing.T) {
	dir := t.TempDir()
	p := filepath.Join(dir, "disk")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	get := func(path string) string {
		t.Helper()
		s, err := FileState(path)
		must(err)
		return s
	}
	must(os.WriteFile(p, bytes.Repeat([]byte{1}, 1000), 0o600))
	a := get(p)
	if a == "" {
		t.Skip("the file system for temporary files is none whose time stamps can be trusted")
	}
	if b := get(p); b != a {
		t.Errorf("%s became %s", a, b)
	}
	if b := get(p + "?format=raw"); b != a {
		t.Errorf("%s became %s", a, b)
	}
	f, err := os.OpenFile(p, os.O_RDWR, 0)
	must(err)
	defer f.Close()
	for range 20 { // each within a tick of the state before, same length
		_, err = f.WriteAt([]byte{2}, 5)
		must(err)
		b := get(p)
		if b == a {
			t.Fatalf("a write does not show in %s", b)
		}
		a = b
	}
	old := time.Now().Add(-time.Hour)
	st, err := os.Stat(p)
	must(err)
	_, err = f.WriteAt([]byte{3}, 5)
	must(err)
	must(os.Chtimes(p, old, st.ModTime())) // who sets mtime back is seen by ctime
	if b := get(p); b == a {
		t.Error("mtime was set back and nothing shows")
	}
	must(os.Rename(p, p+"2"))
	must(os.WriteFile(p, bytes.Repeat([]byte{1}, 1000), 0o600))
	if b := get(p); b == a {
		t.Error("another file has the same state")
	}
	for _, none := range []string{dir, "nbd://host/x", "nbd+unix:///x?socket=/y", p + "?format=qcow2", "/dev/null"} {
		if s := get(none); s != "" {
			t.Errorf("%s: %s", none, s)
		}
	}
	if _, err := FileState(p + "3"); block.KindOf(err) != block.KindNotFound {
		t.Error(err)
	}
}
