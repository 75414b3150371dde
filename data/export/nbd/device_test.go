package nbd

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"forerun/block"
	"forerun/internal/nbdproto"
)

// mem is a device in memory, behind the checker, so that a server that breaks
// the contract fails its tests.
type mem struct {
	mu   sync.RWMutex
	data []byte
	info block.Info

	// gate, if set, is called before each transfer and may wait or fail.
	gate func(ctx context.Context, op string, off, n int64, f block.Flags) error

	state func(off int64) (block.ExtentKind, block.State) // per 4 KiB
}

func newMem(size int64, bs int) *mem {
	return &mem{data: make([]byte, size), info: block.Info{Size: size, BlockSize: bs, CanTrim: true, CanExtents: true}}
}

func (m *mem) checked() block.Device { return block.NewChecked("mem", m) }

func (m *mem) enter(ctx context.Context, op string, off, n int64, f block.Flags) error {
	if m.gate != nil {
		return m.gate(ctx, op, off, n, f)
	}
	return nil
}

func (m *mem) Info() block.Info { return m.info }

func (m *mem) ReadAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	if err := m.enter(ctx, "read", off, int64(len(p)), f); err != nil {
		return err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	copy(p, m.data[off:])
	return nil
}

func (m *mem) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	if err := m.enter(ctx, "write", off, int64(len(p)), f); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	copy(m.data[off:], p)
	return nil
}

func (m *mem) Zero(ctx context.Context, off, n int64, f block.Flags) error {
	if err := m.enter(ctx, "zero", off, n, f); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.data[off : off+n])
	return nil
}

func (m *mem) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	if err := m.enter(ctx, "trim", off, n, f); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.data[off : off+n])
	return nil
}

func (m *mem) Flush(ctx context.Context, f block.Flags) error {
	return m.enter(ctx, "flush", 0, 0, f)
}

func (m *mem) Extents(ctx context.Context, dst []block.Extent, off, n int64, f block.Flags) ([]block.Extent, error) {
	if err := m.enter(ctx, "extents", off, n, f); err != nil {
		return dst, err
	}
	const step = 4096
	for at := off; at < off+n; {
		end := min((at/step+1)*step, off+n)
		e := block.Extent{Off: at, Len: end - at}
		if m.state != nil {
			e.Kind, e.State = m.state(at)
		}
		dst = block.AppendExtent(dst, e)
		at = end
	}
	return dst, nil
}

func (m *mem) Prefetch(ctx context.Context, off, n int64, f block.Flags) error {
	return m.enter(ctx, "prefetch", off, n, f)
}

func (m *mem) Close() error { return nil }

// file is a device over a raw file, for measuring against other servers.
type file struct {
	*mem
	f *os.File
}

func (d *file) ReadAt(_ context.Context, p []byte, off int64, _ block.Flags) error {
	_, err := d.f.ReadAt(p, off)
	return err
}

func (d *file) WriteAt(_ context.Context, p []byte, off int64, _ block.Flags) error {
	_, err := d.f.WriteAt(p, off)
	return err
}

func (d *file) Flush(context.Context, block.Flags) error { return d.f.Sync() }

// table is a fixed set of exports.
type table map[string]block.Device

func (t table) Lookup(name string) (block.Device, string, error) {
	if d := t[name]; d != nil {
		return d, "the disk called " + name, nil
	}
	return nil, "", block.E("lookup", name, block.KindNotFound, errors.New("there is no export of that name"))
}

func (t table) List() []string {
	var names []string
	for n := range t {
		names = append(names, n)
	}
	return names
}

// start serves on a Unix socket and stops at the end of the test.
func start(t testing.TB, o Options) (*Server, *Listener) {
	t.Helper()
	s := NewServer(o)
	l, err := s.Listen(nbdproto.URI{Unix: true, Addr: filepath.Join(t.TempDir(), "s")}.String())
	if err != nil {
		t.Fatal(err)
	}
	serveUntilEnd(t, s, l)
	return s, l
}

func serveUntilEnd(t testing.TB, s *Server, l ...*Listener) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l...) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-done:
				if err != nil {
					t.Errorf("serve: %v", err)
				}
			case <-time.After(20 * time.Second):
				t.Error("the server does not stop")
			}
		})
	}
	t.Cleanup(stop)
	return stop
}

// TestServeFile serves the raw file NBD_FILE on NBD_URI for as long as the test
// may run, to be measured by hand. NBD_NEAR=1 says that all is near.
func TestServeFile(t *testing.T) {
	path, uri := os.Getenv("NBD_FILE"), os.Getenv("NBD_URI")
	if path == "" || uri == "" {
		t.Skip("NBD_FILE and NBD_URI are not set")
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	m := &mem{info: block.Info{Size: st.Size(), BlockSize: 1}}
	o := Options{Exports: table{"": &file{m, f}}}
	if os.Getenv("NBD_NEAR") != "" {
		o.Near = func(block.Device, int64, int64) bool { return true }
	}
	s := NewServer(o)
	l, err := s.Listen(uri)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	if err := s.Serve(ctx, l); err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", s.Stats())
}
