package writeback

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"path"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"forerun/block"
	"forerun/data/journal"
	"forerun/disk"
	"forerun/disk/disktest"
	"forerun/internal/chunk"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	// The compressor's channels must not be born in a bubble.
	p := chunk.Seal(nil, bytes.Repeat([]byte("forerun"), 1000), chunk.Zstd)
	if err := p.Open(make([]byte, p.Plain)); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// fileDevice is a device in a file of a disk that crashes: what was not
// flushed may be lost or torn.
type fileDevice struct {
	f    disk.File
	name string
	size int64
	ro   bool

	mu     sync.Mutex
	broken error // what the next changes answer
}

func newFileDevice(fs disk.FS, name string, size int64) (*fileDevice, error) {
	if err := fs.MkdirAll(path.Dir(name)); err != nil {
		return nil, err
	}
	f, err := fs.Open(name, disk.Write|disk.Create)
	if err != nil {
		return nil, err
	}
	if st, err := f.Stat(); err != nil || st.Size < size {
		if err := errors.Join(err, f.Truncate(size), f.Sync(), fs.SyncDir(path.Dir(name))); err != nil {
			return nil, err
		}
	}
	return &fileDevice{f: f, name: name, size: size}, nil
}

func (d *fileDevice) fail(err error) {
	d.mu.Lock()
	d.broken = err
	d.mu.Unlock()
}

func (d *fileDevice) wrap(op string, err error) error {
	d.mu.Lock()
	if err == nil {
		err = d.broken
	}
	d.mu.Unlock()
	if err != nil {
		return block.E("file."+op, d.name, 0, err)
	}
	return nil
}

func (d *fileDevice) Info() block.Info {
	return block.Info{Size: d.size, BlockSize: 512, ReadOnly: d.ro, ID: d.name}
}

func (d *fileDevice) ReadAt(_ context.Context, p []byte, off int64, _ block.Flags) error {
	_, err := d.f.ReadAt(p, off)
	if err == io.EOF {
		err = nil
	}
	if err != nil {
		return block.E("file.read", d.name, 0, err)
	}
	return nil
}

func (d *fileDevice) WriteAt(_ context.Context, p []byte, off int64, _ block.Flags) error {
	if err := d.wrap("write", nil); err != nil {
		return err
	}
	_, err := d.f.WriteAt(p, off)
	return d.wrap("write", err)
}

func (d *fileDevice) Zero(ctx context.Context, off, n int64, _ block.Flags) error {
	return d.WriteAt(ctx, make([]byte, n), off, 0)
}

func (d *fileDevice) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	return d.Zero(ctx, off, n, f)
}

func (d *fileDevice) Flush(context.Context, block.Flags) error {
	if err := d.f.Sync(); err != nil {
		return block.E("file.flush", d.name, block.KindIO, err)
	}
	return d.wrap("flush", nil)
}

func (d *fileDevice) Extents(_ context.Context, dst []block.Extent, off, n int64, _ block.Flags) ([]block.Extent, error) {
	return append(dst, block.Extent{Off: off, Len: n, State: block.Modified}), nil
}
func (d *fileDevice) Prefetch(context.Context, int64, int64, block.Flags) error { return nil }
func (d *fileDevice) Close() error                                              { return d.f.Close() }

func (d *fileDevice) bytes(t testing.TB) []byte {
	t.Helper()
	p := make([]byte, d.size)
	if err := d.ReadAt(context.Background(), p, 0, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// front is a volume at a frontend: a journal over a file.
type front struct {
	*journal.Journal
	below *fileDevice
	name  string
	epoch atomic.Uint64
	gate  sync.RWMutex
	peer  *front

	marked func() // called by MarkPeer, while all volumes stand still
}

func openFront(fs disk.FS, name string, size int64, exact bool) (*front, error) {
	return openFrontMax(fs, name, size, exact, journalMax)
}

func openFrontMax(fs disk.FS, name string, size int64, exact bool, journalMax int64) (*front, error) {
	below, err := newFileDevice(fs, "vol/"+name, size)
	if err != nil {
		return nil, err
	}
	j, err := journal.Open(fs, "journal/"+name, below, journal.Options{SegmentBytes: 64 << 10, MaxBytes: journalMax, CheckpointBytes: 64 << 10})
	if err != nil {
		below.Close()
		return nil, err
	}
	v := &front{Journal: j, below: below, name: name}
	v.epoch.Store(1)
	if err := Prepare(j, exact); err != nil {
		j.Close()
		return nil, err
	}
	return v, nil
}

func (v *front) Name() string          { return v.name }
func (v *front) Epoch() (uint64, bool) { e := v.epoch.Load(); return e, e > 0 }
func (v *front) Log() Log              { return v.Journal }
func (v *front) Freeze(_ context.Context, fn func() error) error {
	v.gate.Lock()
	defer v.gate.Unlock()
	return fn()
}

func (v *front) MarkPeer(context.Context) (string, bool) {
	if v.marked != nil {
		v.marked()
	}
	if v.peer == nil {
		return "", false
	}
	return v.peer.Position().String(), true
}

func (v *front) HoldPeer(_ context.Context, name, pos string) error {
	var p journal.Position
	if err := p.UnmarshalText([]byte(pos)); err != nil {
		return err
	}
	return v.peer.Hold(name, p)
}

func (v *front) write(p []byte, off int64, f block.Flags) error {
	v.gate.RLock()
	defer v.gate.RUnlock()
	if v.peer != nil {
		if err := v.peer.Journal.WriteAt(context.Background(), p, off, f); err != nil {
			return err
		}
	}
	return v.Journal.WriteAt(context.Background(), p, off, f)
}

func (v *front) zero(off, n int64, f block.Flags) error {
	v.gate.RLock()
	defer v.gate.RUnlock()
	if v.peer != nil {
		if err := v.peer.Journal.Zero(context.Background(), off, n, f); err != nil {
			return err
		}
	}
	return v.Journal.Zero(context.Background(), off, n, f)
}

// back is a backend: sources in files and a Receiver.
type back struct {
	*Receiver
	fs      *disktest.FS
	sources map[string]*fileDevice
	closed  map[string]bool
	mu      sync.Mutex
}

func openBack(fs *disktest.FS, size int64, names ...string) (*back, error) {
	b := &back{fs: fs, sources: map[string]*fileDevice{}, closed: map[string]bool{}}
	for _, n := range names {
		d, err := newFileDevice(fs, "src/"+n, size)
		if err != nil {
			return nil, err
		}
		b.sources[n] = d
	}
	r, err := NewReceiver(ReceiverOptions{FS: fs, Dir: "state", Grain: 4096,
		Source: func(v string) (block.Device, error) {
			if d := b.sources[v]; d != nil {
				return d, nil
			}
			return nil, block.E("source", v, block.KindNotFound, nil)
		},
		Close: func(_ context.Context, v string) error {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.closed[v] = true
			return nil
		}})
	if err != nil {
		return nil, err
	}
	b.Receiver = r
	if err := r.Recover(context.Background()); err != nil {
		r.Close()
		return nil, err
	}
	return b, nil
}

// link is a Caller that reaches whatever backend there is now.
type link struct {
	node string
	mu   sync.Mutex
	to   *Receiver
	// trouble, if set, is asked about each call; it may lose the request or the answer.
	trouble func(typ uint8, p []byte) (request, answer bool)
	bytes   atomic.Int64
	calls   [16]atomic.Int64
}

func (l *link) set(r *Receiver) {
	l.mu.Lock()
	l.to = r
	l.mu.Unlock()
}

func (l *link) Call(ctx context.Context, typ uint8, parts ...[]byte) ([]byte, error) {
	l.mu.Lock()
	r, trouble := l.to, l.trouble
	l.mu.Unlock()
	down := block.E("link", "", block.KindUnavailable, errors.New("down"))
	if r == nil {
		return nil, down
	}
	p := bytes.Join(parts, nil)
	l.bytes.Add(int64(len(p)))
	l.calls[typ].Add(1)
	loseRequest, loseAnswer := false, false
	if trouble != nil {
		loseRequest, loseAnswer = trouble(typ, p)
	}
	if loseRequest {
		return nil, down
	}
	a, err := r.Serve(ctx, "frontend", l.node, typ, p)
	if loseAnswer || block.KindOf(err) == block.KindClosed {
		return nil, down
	}
	return bytes.Clone(a), err
}

func ship(t testing.TB, l Caller, vols ...*front) *Shipper {
	t.Helper()
	o := ShipperOptions{Group: "g", Backend: l}
	for _, v := range vols {
		o.Volumes = append(o.Volumes, v)
	}
	s, err := NewShipper(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// scribble makes random changes.
func scribble(t testing.TB, rnd *rand.Rand, v *front, n int) {
	t.Helper()
	for range n {
		off := rnd.Int64N(v.below.size/512) * 512
		k := min(512*(1+rnd.Int64N(24)), v.below.size-off)
		var err error
		switch rnd.IntN(8) {
		case 0:
			err = v.zero(off, k, block.MayTrim)
		case 1:
			err = v.zero(off, k, 0)
		default:
			p := make([]byte, k)
			for i := range p {
				p[i] = byte(rnd.Uint32())
			}
			err = v.write(p, off, 0)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func same(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		i := 0
		for got[i] == want[i] {
			i++
		}
		n := 0
		for j := range got {
			if got[j] != want[j] {
				n++
			}
		}
		t.Fatalf("%s: %d bytes differ, the first at %d (sector %d)", what, n, i, i/512)
	}
}

const testSize = 256 << 10

// journalMax is the limit of a journal; half of it may be held.
const journalMax = 8 << 20

func TestSourceFollowsTheVolume(t *testing.T) {
	ctx := within(t)
	rnd := rand.New(rand.NewPCG(1, 2))
	fs := disktest.New(1)
	b := must[*back](t)(openBack(fs, testSize, "a", "b"))
	defer b.Close()
	va := must[*front](t)(openFront(fs, "a", testSize, true))
	defer va.Close()
	vb := must[*front](t)(openFront(fs, "b", testSize, true))
	defer vb.Close()
	s := ship(t, &link{node: "f1", to: b.Receiver}, va, vb)
	for round := range 20 {
		s.window = 1 + rnd.IntN(40)
		scribble(t, rnd, va, rnd.IntN(60))
		scribble(t, rnd, vb, rnd.IntN(60))
		res, err := s.Checkpoint(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if res.Full != 0 {
			t.Fatal("everything was compared")
		}
		same(t, fmt.Sprint("a in round ", round), b.sources["a"].bytes(t), va.below.bytes(t))
		same(t, fmt.Sprint("b in round ", round), b.sources["b"].bytes(t), vb.below.bytes(t))
		if u := s.Status().Volumes["a"]; u != (Unwritten{}) {
			t.Fatalf("unwritten after a checkpoint: %+v", u)
		}
	}
	again, err := s.Checkpoint(ctx)
	if err != nil || again.Bytes != 0 {
		t.Fatalf("nothing changed: %+v, %v", again, err)
	}
}
