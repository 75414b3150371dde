package converge

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"path"
	"sync"
	"sync/atomic"
	"testing"

	"forerun/block"
	"forerun/block/blocktest"
	"forerun/data/journal"
	"forerun/disk"
	"forerun/disk/disktest"
)

var bg = context.Background()

// file is a device in a file of the crashing disk.
type file struct {
	f    disk.File
	size int64
	path string
	bad  atomic.Pointer[error] // a flush failed: none succeeds any more, pages may be lost
}

func openFile(fs disk.FS, name string, size int64, create bool) (block.Device, error) {
	mode := disk.Write
	if create {
		mode |= disk.Create
	}
	f, err := fs.Open(name, mode)
	if err != nil {
		return nil, block.E("file.open", name, 0, err)
	}
	if create {
		if err = f.Truncate(size); err == nil {
			if err = f.Sync(); err == nil {
				err = fs.SyncDir(path.Dir(name))
			}
		}
	}
	st, serr := f.Stat()
	if err == nil {
		err = serr
	}
	if err != nil {
		f.Close()
		return nil, block.E("file.open", name, 0, err)
	}
	return &file{f: f, size: st.Size, path: name}, nil
}

func (d *file) wrap(op string, err error) error {
	if err != nil {
		return block.E("file."+op, d.path, 0, err)
	}
	return nil
}
func (d *file) Info() block.Info {
	return block.Info{Size: d.size, BlockSize: 512, CanExtents: true, CanTrim: true}
}
func (d *file) ReadAt(_ context.Context, p []byte, off int64, _ block.Flags) error {
	n, err := d.f.ReadAt(p, off)
	if err == io.EOF {
		clear(p[n:])
		err = nil
	}
	return d.wrap("read", err)
}
func (d *file) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	if _, err := d.f.WriteAt(p, off); err != nil {
		return d.wrap("write", err)
	}
	if f.Has(block.FUA) {
		return d.Flush(ctx, f)
	}
	return nil
}
func (d *file) Zero(_ context.Context, off, n int64, _ block.Flags) error {
	return d.wrap("zero", d.f.Punch(off, n))
}
func (d *file) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	return d.Zero(ctx, off, n, f)
}
func (d *file) Flush(context.Context, block.Flags) error {
	if err := d.bad.Load(); err != nil {
		return *err
	}
	if err := d.f.Sync(); err != nil {
		err = block.E("file.flush", d.path, block.KindIO, err)
		d.bad.Store(&err)
		return err
	}
	return nil
}
func (d *file) Extents(_ context.Context, dst []block.Extent, off, n int64, _ block.Flags) ([]block.Extent, error) {
	for at, end := off, off+n; at < end; {
		s, e, err := d.f.Data(at)
		if err == io.EOF {
			s, e = end, end
		} else if err != nil {
			return dst, d.wrap("extents", err)
		}
		s, e = min(s, end), min(e, end)
		dst = block.AppendExtent(dst, block.Extent{Off: at, Len: s - at, Kind: block.Hole})
		dst = block.AppendExtent(dst, block.Extent{Off: s, Len: e - s})
		at = e
	}
	return dst, nil
}
func (d *file) Prefetch(context.Context, int64, int64, block.Flags) error { return nil }
func (d *file) Close() error                                              { return d.f.Close() }

// stack is what a frontend builds: Switch, journal, Tracker, volume; or Switch
// and target, when the plan says so.
type stack struct {
	fs    *disktest.FS
	sw    *Switch
	j     *journal.Journal
	track *Tracker
	job   *Job
	plan  Plan
}

var journalOptions = journal.Options{SegmentBytes: 64 << 10, MaxBytes: 8 << 20, CheckpointBytes: 64 << 10, CheckpointInterval: 1 << 40, InFlight: 16}

const grain = 4 << 10

func build(fs *disktest.FS, size int64, boot string) (*stack, error) {
	s := &stack{fs: fs}
	open := func(p string, n int64, create bool) (block.Device, error) { return openFile(fs, p, n, create) }
	target, plan, err := Restore(fs, "/state", open)
	if err != nil {
		return nil, err
	}
	s.plan = plan
	if target != nil {
		s.sw = NewSwitch(target)
	} else {
		_, serr := fs.Stat("/vol")
		vol, err := openFile(fs, "/vol", size, serr != nil)
		if err != nil {
			return nil, err
		}
		if s.track, err = OpenTracker(fs, "/state/marks", vol, TrackerOptions{Grain: grain, BootID: boot}); err != nil {
			return nil, fmt.Errorf("tracker: %w", err)
		}
		if s.j, err = journal.Open(fs, "/journal", s.track, journalOptions); err != nil {
			return nil, fmt.Errorf("journal: %w", err)
		}
		s.sw = NewSwitch(s.j)
	}
	s.job, err = NewJob(Options{FS: fs, Dir: "/state", Switch: s.sw, Tracker: s.track, OpenTarget: open, Reserved: []string{"/journal", "/vol"}})
	return s, err
}

func (s *stack) read(t testing.TB) []byte {
	t.Helper()
	p := make([]byte, s.sw.Info().Size)
	if err := s.sw.ReadAt(bg, p, 0, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

func (s *stack) close() {
	s.sw.Close()
	if s.j != nil {
		s.j.Close()
	}
}

// bare is a Switch over a Tracker over twins, with a target twin.
type bare struct {
	fs     *disktest.FS
	source *blocktest.Twin
	target *blocktest.Twin
	slow   func(block.Device) block.Device // wraps the target
	track  *Tracker
	sw     *Switch
	job    *Job
}

func newBare(t *testing.T, size int64, change func(*Options)) *bare {
	t.Helper()
	b := &bare{fs: disktest.New(1), source: blocktest.NewTwin(size, 512), target: blocktest.NewTwin(size, 512)}
	b.fs.MkdirAll("/state")
	var err error
	if b.track, err = OpenTracker(b.fs, "/state/marks", b.source, TrackerOptions{Grain: grain, BootID: "a"}); err != nil {
		t.Fatal(err)
	}
	b.sw = NewSwitch(b.track)
	o := Options{FS: b.fs, Dir: "/state", Switch: b.sw, Tracker: b.track,
		OpenTarget: func(string, int64, bool) (block.Device, error) {
			var d block.Device = stays{b.target}
			if b.slow != nil {
				d = b.slow(d)
			}
			return d, nil
		}}
	if change != nil {
		change(&o)
	}
	if b.job, err = NewJob(o); err != nil {
		t.Fatal(err)
	}
	return b
}

// stays is a device that outlives whoever closes it.
type stays struct{ block.Device }

func (stays) Close() error { return nil }

// model is what the guest believes: the bytes of its acknowledged writes.
type model struct {
	mu sync.Mutex
	b  []byte
}

// write writes under the model's lock, so that model and disk agree.
func (m *model) write(d block.Device, p []byte, off int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	err := d.WriteAt(bg, p, off, 0)
	if err == nil {
		copy(m.b[off:], p)
	}
	return err
}

func (m *model) check(t *testing.T, got []byte, what string) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	if !bytes.Equal(got[:len(m.b)], m.b) {
		for i := range m.b {
			if got[i] != m.b[i] {
				t.Fatalf("%s differs at byte %d: %#x, %#x expected", what, i, got[i], m.b[i])
			}
		}
	}
}
