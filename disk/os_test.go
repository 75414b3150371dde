package disk_test

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"forerun/block"
	"forerun/disk"
)

func TestOSFiles(t *testing.T) {
	d, dir := disk.OS(), t.TempDir()
	p := filepath.Join(dir, "sub", "a")
	if _, err := d.Open(p, disk.Write|disk.Create); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("a file in no directory: %v", err)
	}
	if err := d.MkdirAll(filepath.Dir(p)); err != nil {
		t.Fatal(err)
	}
	f, err := d.Open(p, disk.Write|disk.Create|disk.Excl)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := d.Open(p, disk.Write|disk.Create|disk.Excl); !errors.Is(err, fs.ErrExist) {
		t.Fatalf("made twice: %v", err)
	}
	data := bytes.Repeat([]byte{7}, 1<<20)
	if _, err := f.WriteAt(data, 8<<20); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if s, e, err := f.Data(0); err != nil || s > 8<<20 || e != 9<<20 {
		t.Fatalf("data at %d..%d, %v", s, e, err)
	}
	if _, _, err := f.Data(9 << 20); err != io.EOF {
		t.Fatalf("data after the end: %v", err)
	}
	if err := f.Punch(8<<20, 1<<19); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 1<<20)
	if n, err := f.ReadAt(got, 8<<20); n != len(got) || err != nil {
		t.Fatal(n, err)
	}
	if !bytes.Equal(got[:1<<19], make([]byte, 1<<19)) || !bytes.Equal(got[1<<19:], data[1<<19:]) {
		t.Fatal("punching changed other bytes")
	}
	st, err := f.Stat()
	if err != nil || st.Size != 9<<20 || st.Allocated > 2<<20 {
		t.Fatalf("%+v, %v", st, err)
	}
	if err := f.Allocate(9<<20, 1<<20); err != nil {
		t.Fatal(err)
	}
	if st, _ = f.Stat(); st.Size != 10<<20 {
		t.Fatalf("allocated to %d", st.Size)
	}
	if err := d.Rename(p, p+"2"); err != nil {
		t.Fatal(err)
	}
	if err := d.SyncDir(filepath.Dir(p)); err != nil {
		t.Fatal(err)
	}
	if names, err := d.List(filepath.Dir(p)); err != nil || len(names) != 1 || names[0] != "a2" {
		t.Fatal(names, err)
	}
	if n, err := d.Free(dir); err != nil || n <= 0 {
		t.Fatal(n, err)
	}
}

func TestOSLockIsExclusive(t *testing.T) {
	d, p := disk.OS(), filepath.Join(t.TempDir(), "lock")
	l, err := d.Lock(p)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Lock(p); !errors.Is(err, syscall.EBUSY) || block.KindOf(err) != block.KindBusy {
		t.Fatalf("locked twice: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l, err = d.Lock(p)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

// TestOSClosedFileTouchesNothing: the number of a closed descriptor belongs to
// the next file that is opened; no late call may hit that one.
func TestOSClosedFileTouchesNothing(t *testing.T) {
	d, dir := disk.OS(), t.TempDir()
	a, err := d.Open(filepath.Join(dir, "a"), disk.Write|disk.Create)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := d.Open(filepath.Join(dir, "b"), disk.Write|disk.Create)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	data := bytes.Repeat([]byte{1}, 8192)
	if _, err := b.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	_, _, seek := a.Data(0)
	for what, err := range map[string]error{"punch": a.Punch(0, 8192), "sync": a.Sync(), "allocate": a.Allocate(0, 1<<20), "data": seek, "truncate": a.Truncate(0)} {
		if block.KindOf(err) != block.KindClosed {
			t.Errorf("%s of a closed file: %v", what, err)
		}
	}
	got := make([]byte, 8192)
	if _, err := b.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
		t.Fatal("a call on a closed file changed another one", err)
	}
}

func TestOSMakesDirectories(t *testing.T) {
	d, dir := disk.OS(), t.TempDir()
	p := filepath.Join(dir, "a", "b", "c")
	for range 2 {
		if err := d.MkdirAll(p); err != nil {
			t.Fatal(err)
		}
	}
	if s, err := d.Stat(p); err != nil || !s.Dir {
		t.Fatal(s, err)
	}
	f, err := d.Open(filepath.Join(dir, "file"), disk.Write|disk.Create)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := d.MkdirAll(filepath.Join(dir, "file", "x")); err == nil {
		t.Fatal("made a directory in a file")
	}
}

// TestPublish replaces a file whole, and leaves the old one when writing fails.
func TestPublish(t *testing.T) {
	host, name := disk.OS(), filepath.Join(t.TempDir(), "f")
	if err := disk.PublishBytes(host, name, []byte("old, and longer")); err != nil {
		t.Fatal(err)
	}
	broken := errors.New("no")
	if err := disk.Publish(host, name, func(f disk.File) error { f.WriteAt([]byte("half"), 0); return broken }); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(name); err != nil || string(b) != "old, and longer" {
		t.Fatalf("%q %v", b, err)
	}
	if err := disk.PublishBytes(host, name, []byte("new")); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(name); err != nil || string(b) != "new" {
		t.Fatalf("%q %v", b, err)
	}
	if _, err := os.Stat(name + disk.TmpSuffix); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the temporary file is still there: %v", err)
	}
}
