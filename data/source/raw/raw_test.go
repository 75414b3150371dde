package raw

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"forerun/block"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var ctx = context.Background()

// image makes a file of size bytes, and returns its path.
func image(t *testing.T, size int64, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t *testing.T, path string, o Options) *Device {
	t.Helper()
	d, err := Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// kindIs fails unless err has kind k.
func kindIs(t *testing.T, err error, k block.Kind) {
	t.Helper()
	if block.KindOf(err) != k {
		t.Fatalf("%v is of kind %v, want %v", err, block.KindOf(err), k)
	}
}

// TestTwin runs random calls against a byte slice.
func TestTwin(t *testing.T) {
	const size = 3<<20 + 700 // not whole sectors
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	d := open(t, image(t, size, nil), Options{})
	twin := make([]byte, d.Info().Size)
	if len(twin) != 3<<20+1024 {
		t.Fatalf("size %d", len(twin))
	}
	for range 400 {
		off := r.Int64N(d.Info().Size/512) * 512
		n := min((1+r.Int64N(300))*512, d.Info().Size-off)
		f := []block.Flags{0, block.FUA, block.MayTrim, block.FUA | block.MayTrim}[r.IntN(4)]
		switch r.IntN(6) {
		case 0, 1:
			p := make([]byte, n)
			for i := range p {
				p[i] = byte(r.Uint32())
			}
			if off+n > size {
				clear(p[size-off:])
			}
			if err := d.WriteAt(ctx, p, off, f&block.FUA); err != nil {
				t.Fatal(err)
			}
			copy(twin[off:], p)
		case 2:
			if err := d.Zero(ctx, off, n, f); err != nil {
				t.Fatal(err)
			}
			clear(twin[off : off+n])
		case 3:
			if err := d.Trim(ctx, off, n, f&block.FUA); err != nil {
				t.Fatal(err)
			}
			clear(twin[off : off+n]) // this file system punches
		case 4:
			if r.IntN(10) == 0 {
				if err := d.Flush(ctx, 0); err != nil {
					t.Fatal(err)
				}
			}
			ext, err := d.Extents(ctx, nil, off, n, 0)
			if err != nil {
				t.Fatal(err)
			}
			at := off
			for _, e := range ext {
				if e.Off != at || e.Len <= 0 || e.Off%512 != 0 || e.Len%512 != 0 {
					t.Fatalf("extent %+v where %d was due", e, at)
				}
				at = e.End()
				if e.Kind.Zero() && !bytes.Equal(twin[e.Off:e.End()], make([]byte, e.Len)) {
					t.Fatalf("%+v holds data", e)
				}
			}
			if at != off+n {
				t.Fatalf("extents end at %d, not %d", at, off+n)
			}
		case 5:
			p := bytes.Repeat([]byte{0xee}, int(n))
			if err := d.ReadAt(ctx, p, off, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(p, twin[off:off+n]) {
				t.Fatalf("%d bytes at %d differ", n, off)
			}
		}
	}
	if st, err := os.Stat(d.claim.path); err != nil || st.Size() != size {
		t.Fatalf("the file has another length now: %v %v", st.Size(), err)
	}
}

func TestPad(t *testing.T) {
	d := open(t, image(t, 1000, bytes.Repeat([]byte{7}, 1000)), Options{})
	p := make([]byte, 1024)
	if err := d.ReadAt(ctx, p, 0, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p, append(bytes.Repeat([]byte{7}, 1000), make([]byte, 24)...)) {
		t.Fatal("wrong bytes")
	}
	if err := d.WriteAt(ctx, p, 0, 0); err != nil {
		t.Fatal(err)
	}
	p[1023] = 1
	kindIs(t, d.WriteAt(ctx, p, 0, 0), block.KindRange)
}

func TestRefusals(t *testing.T) {
	path := image(t, 4096, nil)
	d := open(t, path, Options{})
	p := make([]byte, 512)
	kindIs(t, d.ReadAt(ctx, p, 4096, 0), block.KindRange)
	kindIs(t, d.ReadAt(ctx, p, 100, 0), block.KindInvalid)
	kindIs(t, d.WriteAt(ctx, p[:0], 0, 0), block.KindInvalid)
	done, cancel := context.WithCancel(ctx)
	cancel()
	kindIs(t, d.ReadAt(done, p, 0, 0), block.KindCanceled)
	if _, err := Open(path, Options{}); block.KindOf(err) != block.KindBusy {
		t.Fatalf("a second open: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	kindIs(t, d.ReadAt(ctx, p, 0, 0), block.KindClosed)
	ro := open(t, path, Options{ReadOnly: true})
	if !ro.Info().ReadOnly {
		t.Fatal("not read-only")
	}
	kindIs(t, ro.WriteAt(ctx, p, 0, 0), block.KindReadOnly)
	kindIs(t, ro.Zero(ctx, 0, 512, 0), block.KindReadOnly)
	kindIs(t, ro.Trim(ctx, 0, 512, 0), block.KindReadOnly)
	if ro.Info().ID != d.Info().ID || ro.Info().ID == "" {
		t.Fatalf("IDs %q and %q", ro.Info().ID, d.Info().ID)
	}
	_, err := Open(path+"x", Options{})
	kindIs(t, err, block.KindNotFound)
	_, err = Open(t.TempDir(), Options{})
	kindIs(t, err, block.KindInvalid)
	_, err = Open("/dev/null", Options{})
	kindIs(t, err, block.KindInvalid)
	_, err = Open(image(t, 0, nil), Options{})
	kindIs(t, err, block.KindInvalid)
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = Open(fifo, Options{})
	kindIs(t, err, block.KindInvalid)
}

// TestReadOnlyWhereNotPermitted opens what may not be written.
func TestReadOnlyWhereNotPermitted(t *testing.T) {
	path := image(t, 4096, nil)
	if err := os.Chmod(path, 0o400); err != nil {
		t.Fatal(err)
	}
	if unix.Geteuid() == 0 {
		t.Skip("root may write everything")
	}
	if d := open(t, path, Options{}); !d.Info().ReadOnly {
		t.Fatal("not read-only")
	}
}

func TestExtentsOfASparseFile(t *testing.T) {
	path := image(t, 1<<40, nil)
	d := open(t, path, Options{})
	p := bytes.Repeat([]byte{1}, 64<<10)
	for i := int64(0); i < 50; i++ {
		if err := d.WriteAt(ctx, p, i<<34, 0); err != nil {
			t.Fatal(err)
		}
	}
	mine := []block.Extent{{Off: -1, Len: 1, Kind: block.Data}} // touches, must not be joined
	ext, err := d.Extents(ctx, mine, 0, 1<<40, 0)
	if err != nil {
		t.Fatal(err)
	}
	if ext[0] != mine[0] {
		t.Fatal("the caller's extent was changed")
	}
	var data int64
	for _, e := range ext[1:] {
		if e.Kind == block.Data {
			data += e.Len
		}
	}
	if data != 50*64<<10 || len(ext) != 101 {
		t.Fatalf("%d bytes of data in %d extents", data, len(ext))
	}
	ext, err = d.Extents(ctx, nil, 1<<39, 512, block.Local)
	if err != nil || len(ext) != 1 || ext[0].Kind != block.Data {
		t.Fatalf("Local: %v %v", ext, err)
	}
}

// TestFailedSyncSticks breaks the descriptor under the device.
func TestFailedSyncSticks(t *testing.T) {
	d := open(t, image(t, 4096, nil), Options{})
	d.lost(unix.EIO)
	kindIs(t, d.Flush(ctx, 0), block.KindIO)
	kindIs(t, d.Flush(ctx, 0), block.KindIO)
	p := make([]byte, 512)
	kindIs(t, d.WriteAt(ctx, p, 0, block.FUA), block.KindIO)
	kindIs(t, d.Zero(ctx, 0, 512, block.FUA), block.KindIO)
	if err := d.WriteAt(ctx, p, 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.ReadAt(ctx, p, 0, 0); err != nil {
		t.Fatal(err)
	}
}

// TestFallbacks serves a file system that can neither punch, zero, sync one
// write nor read uncached.
func TestFallbacks(t *testing.T) {
	d := open(t, image(t, 8<<20, bytes.Repeat([]byte{5}, 8<<20)), Options{})
	d.noPunch.Store(true)
	d.noZero.Store(true)
	d.noDSync.Store(true)
	d.uncached.Store(false)
	kindIs(t, d.Zero(ctx, 0, 1<<20, block.FastZero|block.MayTrim), block.KindUnsupported)
	if err := d.Zero(ctx, 512, 4<<20, block.MayTrim|block.FUA); err != nil {
		t.Fatal(err)
	}
	if err := d.Trim(ctx, 5<<20, 1<<20, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.WriteAt(ctx, bytes.Repeat([]byte{6}, 512), 0, block.FUA); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 8<<20)
	if err := d.ReadAt(ctx, p, 0, 0); err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{5}, 8<<20)
	copy(want, bytes.Repeat([]byte{6}, 512))
	clear(want[512 : 512+4<<20])
	if !bytes.Equal(p, want) {
		t.Fatal("wrong bytes")
	}
}

// TestCloseAmongReaders closes while others read.
func TestCloseAmongReaders(t *testing.T) {
	d := open(t, image(t, 1<<20, nil), Options{})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			p := make([]byte, 4096)
			for {
				err := d.ReadAt(ctx, p, 4096, 0)
				if block.KindOf(err) == block.KindClosed {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	wg.Wait()
}

// TestShrunkFile fails reads of bytes that are gone, and serves the others.
func TestShrunkFile(t *testing.T) {
	path := image(t, 1<<20, nil)
	d := open(t, path, Options{})
	if err := os.Truncate(path, 4096); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 8192)
	err := d.ReadAt(ctx, p, 0, 0)
	kindIs(t, err, block.KindIO)
	if errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	if err := d.ReadAt(ctx, p[:4096], 0, 0); err != nil {
		t.Fatal(err)
	}
}
