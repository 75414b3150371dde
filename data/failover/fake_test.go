package failover

import (
	"context"
	"sync"
	"testing"
	"time"

	"forerun/block"
	"forerun/block/blocktest"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var ctx = context.Background()

// server is a target that tests can break. Several of them may share a volume.
type server struct {
	name string
	vol  block.Device

	mu    sync.Mutex
	up    bool
	opens int
	doors map[*fakeDoor]struct{}
	info  func(*block.Info)
	// rule decides about each call, before it is made and after; nil lets all pass.
	rule func(c call, before bool) error
	// stuck keeps calls, and pings when deaf, until the door is aborted or stuck is nil.
	stuck chan struct{}
	deaf  bool
}

func newServer(name string, vol block.Device) *server {
	return &server{name: name, vol: vol, up: true, doors: map[*fakeDoor]struct{}{}}
}

func (s *server) target() Target { return Target{Name: s.name, Open: s.open} }

func (s *server) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

func (s *server) open(ctx context.Context) (Door, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.opens++
	if stuck := s.stuck; stuck != nil && s.deaf {
		s.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-stuck:
		}
		s.mu.Lock()
	}
	if ctx.Err() != nil {
		return nil, block.E("fake.open", s.name, block.KindCanceled, ctx.Err())
	}
	if !s.up {
		return nil, block.E("fake.open", s.name, block.KindUnavailable, nil)
	}
	d := &fakeDoor{s: s, gone: make(chan struct{})}
	s.doors[d] = struct{}{}
	return d, nil
}

// kill breaks all connections, and leaves the server down until start.
func (s *server) kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.up = false
	for d := range s.doors {
		d.end(block.KindUnavailable)
	}
}

func (s *server) start() { s.set(func() { s.up = true }) }

// hang makes the server silent; deaf, to pings and connections too.
func (s *server) hang(deaf bool) { s.set(func() { s.stuck, s.deaf = make(chan struct{}), deaf }) }

func (s *server) wake() { s.set(func() { close(s.stuck); s.stuck = nil }) }

// fakeDoor is a connection to a server.
type fakeDoor struct {
	s    *server
	once sync.Once
	gone chan struct{}
	kind block.Kind // before gone is closed
}

// end breaks the connection; s.mu is held.
func (d *fakeDoor) end(k block.Kind) {
	d.once.Do(func() {
		d.kind = k
		delete(d.s.doors, d)
		close(d.gone)
	})
}

func (d *fakeDoor) Abort() { d.s.set(func() { d.end(block.KindClosed) }) }

func (d *fakeDoor) Close() error {
	d.Abort()
	return nil
}

func (d *fakeDoor) lost() error {
	select {
	case <-d.gone:
		return block.E("fake", d.s.name, d.kind, nil)
	default:
		return nil
	}
}

func (d *fakeDoor) Ping(ctx context.Context) error {
	d.s.mu.Lock()
	stuck, deaf := d.s.stuck, d.s.deaf
	d.s.mu.Unlock()
	if stuck == nil || !deaf {
		return d.lost()
	}
	select {
	case <-d.gone:
		return d.lost()
	case <-stuck:
		return nil
	case <-ctx.Done():
		return block.E("fake.ping", d.s.name, block.KindCanceled, ctx.Err())
	}
}

func (d *fakeDoor) Info() block.Info {
	i := d.s.vol.Info()
	if d.s.info != nil {
		d.s.info(&i)
	}
	return i
}

// around is one call: it may be lost before it happens, or its answer after.
func (d *fakeDoor) around(ctx context.Context, c call, do func() error) error {
	d.s.mu.Lock()
	stuck, rule := d.s.stuck, d.s.rule
	d.s.mu.Unlock()
	if stuck != nil {
		select {
		case <-stuck:
		case <-d.gone:
		case <-ctx.Done():
			return block.E("fake", d.s.name, block.KindCanceled, ctx.Err())
		}
	}
	if err := d.lost(); err != nil {
		return err
	}
	if rule != nil {
		if err := rule(c, true); err != nil {
			return err
		}
	}
	if err := do(); err != nil {
		return err
	}
	if rule != nil {
		if err := rule(c, false); err != nil {
			return err
		}
	}
	return d.lost()
}

func (d *fakeDoor) ReadAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	return d.around(ctx, call{op: opRead, off: off, n: int64(len(p)), f: f}, func() error { return d.s.vol.ReadAt(ctx, p, off, f) })
}

func (d *fakeDoor) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	return d.around(ctx, call{op: opWrite, p: p, off: off, n: int64(len(p)), f: f}, func() error { return d.s.vol.WriteAt(ctx, p, off, f) })
}

func (d *fakeDoor) Zero(ctx context.Context, off, n int64, f block.Flags) error {
	return d.around(ctx, call{op: opZero, off: off, n: n, f: f}, func() error { return d.s.vol.Zero(ctx, off, n, f) })
}

func (d *fakeDoor) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	return d.around(ctx, call{op: opTrim, off: off, n: n, f: f}, func() error { return d.s.vol.Trim(ctx, off, n, f) })
}

func (d *fakeDoor) Flush(ctx context.Context, f block.Flags) error {
	return d.around(ctx, call{op: opFlush, f: f}, func() error { return d.s.vol.Flush(ctx, f) })
}

func (d *fakeDoor) Prefetch(ctx context.Context, off, n int64, f block.Flags) error {
	return d.around(ctx, call{op: opPrefetch, off: off, n: n, f: f}, func() error { return d.s.vol.Prefetch(ctx, off, n, f) })
}

func (d *fakeDoor) Extents(ctx context.Context, dst []block.Extent, off, n int64, f block.Flags) (out []block.Extent, err error) {
	out = dst
	err = d.around(ctx, call{op: opExtents, off: off, n: n, f: f}, func() (err error) {
		out, err = d.s.vol.Extents(ctx, dst, off, n, f)
		return err
	})
	if err != nil {
		return dst, err
	}
	return out, nil
}

const size = 1 << 20

// pair makes a device over two servers of one volume.
func pair(t *testing.T, change ...func(*Options)) (d *Device, a, b *server, vol *blocktest.Twin) {
	t.Helper()
	vol = blocktest.NewTwin(size, 512)
	a, b = newServer("a", vol), newServer("b", vol)
	o := Options{Volume: "v", Targets: []Target{a.target(), b.target()}}
	for _, c := range change {
		c(&o)
	}
	d, err := Open(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d, a, b, vol
}

func kindIs(t *testing.T, err error, k block.Kind) {
	t.Helper()
	if block.KindOf(err) != k {
		t.Fatalf("%v is %v, should be %v", err, block.KindOf(err), k)
	}
}

// within fails when f takes more than limit of (virtual) time.
func within(t *testing.T, limit time.Duration, what string, f func() error) {
	t.Helper()
	began := time.Now()
	if err := f(); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if took := time.Since(began); took > limit {
		t.Errorf("%s took %v, at most %v was due", what, took, limit)
	}
}
