package journal

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"forerun/block"
	"forerun/disk"
	"forerun/disk/disktest"
)

// memory is the device below: a byte slice that survives the journal, like a
// volume whose page cache survives a kill.
type memory struct {
	mu      sync.Mutex
	b       []byte
	flushes int
	fail    func(op string) error // asked before each change, may be nil
	slow    func()                // called in the middle of a write, without the lock
}

func newMemory(n int) *memory { return &memory{b: make([]byte, n)} }

func (m *memory) Info() block.Info {
	return block.Info{Size: int64(len(m.b)), BlockSize: 1, CanTrim: true}
}
func (m *memory) ask(op string) error {
	if m.fail != nil {
		return m.fail(op)
	}
	return nil
}
func (m *memory) ReadAt(_ context.Context, p []byte, off int64, _ block.Flags) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	copy(p, m.b[off:])
	return nil
}
func (m *memory) WriteAt(_ context.Context, p []byte, off int64, _ block.Flags) error {
	if err := m.ask("write"); err != nil {
		return err
	}
	if m.slow != nil { // half a write, then others, then the rest: overlap must be kept away
		h := len(p) / 2
		m.mu.Lock()
		copy(m.b[off:], p[:h])
		m.mu.Unlock()
		m.slow()
		p, off = p[h:], off+int64(h)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	copy(m.b[off:], p)
	return nil
}
func (m *memory) Zero(_ context.Context, off, n int64, f block.Flags) error {
	if err := m.ask("zero"); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.b[off : off+n])
	return nil
}
func (m *memory) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	return m.Zero(ctx, off, n, f)
}
func (m *memory) Flush(context.Context, block.Flags) error {
	if err := m.ask("flush"); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flushes++
	return nil
}
func (m *memory) Extents(_ context.Context, dst []block.Extent, off, n int64, _ block.Flags) ([]block.Extent, error) {
	return append(dst, block.Extent{Off: off, Len: n}), nil
}
func (m *memory) Prefetch(context.Context, int64, int64, block.Flags) error { return nil }
func (m *memory) Close() error                                              { return nil }
func (m *memory) snapshot() []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return bytes.Clone(m.b)
}

func open(t testing.TB, fs disk.FS, dir string, below block.Device, opt Options) *Journal {
	t.Helper()
	j, err := Open(fs, dir, below, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return j
}

var bg = context.Background()

func fill(p []byte, tag uint32) {
	for i := range p {
		p[i] = byte(tag>>(8*(i&3))) ^ byte(i>>9)
	}
}

// TestTwin makes random changes, kills and reopens over a device that has lost
// everything since some checkpoint's flush, and compares with a byte slice.
func TestTwin(t *testing.T) {
	for seed := range uint64(8) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 7))
			const size = 1 << 20
			fs, dir := disk.FS(disktest.New(seed)), "/journal"
			if seed == 0 {
				fs, dir = disk.OS(), t.TempDir()
			}
			live := newMemory(size)
			twin := make([]byte, size)
			durable := make([]byte, size) // the device as of its last flush
			opt := Options{SegmentBytes: 64 << 10, MaxBytes: 1 << 20, CheckpointBytes: 200 << 10}
			live.fail = func(op string) error {
				if op == "flush" {
					durable = live.snapshot()
				}
				return nil
			}
			j := open(t, fs, dir, live, opt)
			ops := 3000
			if seed == 0 {
				ops = 400
			}
			for i := range ops {
				off := r.Int64N(size)
				n := min(1+r.Int64N(20000), size-off)
				var err error
				switch r.IntN(20) {
				case 0:
					err = j.Zero(bg, off, n, block.MayTrim)
					clear(twin[off : off+n])
				case 1:
					err = j.Trim(bg, off, n, 0)
					clear(twin[off : off+n])
				case 2:
					err = j.Flush(bg, 0)
				default:
					if r.IntN(50) == 0 {
						n = min(300000, size-off) // several records
					}
					p := make([]byte, n)
					fill(p, r.Uint32())
					err = j.WriteAt(bg, p, off, block.FUA*block.Flags(r.IntN(2)&r.IntN(2)))
					copy(twin[off:], p)
				}
				if err != nil {
					t.Fatal(i, err)
				}
				if r.IntN(300) == 0 {
					if !bytes.Equal(live.snapshot(), twin) {
						t.Fatal(i, "the device differs from the twin before the restart")
					}
					if err := j.Close(); err != nil {
						t.Fatal(err)
					}
					live.b = bytes.Clone(durable) // what was not flushed is lost; the journal has it
					j = open(t, fs, dir, live, opt)
					if !bytes.Equal(live.snapshot(), twin) {
						t.Fatal(i, "the device differs from the twin after replay")
					}
				}
			}
			s := j.Stats()
			if s.Retained > opt.MaxBytes {
				t.Errorf("%d bytes retained, %d allowed", s.Retained, opt.MaxBytes)
			}
			t.Logf("%+v", s)
		})
	}
}

// TestOverlap has writers race for the same ranges over a device that tears
// writes apart: what was read before a kill is what replay gives.
func TestOverlap(t *testing.T) {
	const size = 256 << 10
	dir := t.TempDir()
	live := newMemory(size)
	live.slow = func() { time.Sleep(time.Microsecond) }
	opt := Options{SegmentBytes: 1 << 20, MaxBytes: 64 << 20, CheckpointInterval: time.Hour}
	j := open(t, disk.OS(), dir, live, opt)
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 3))
			p := make([]byte, 16<<10)
			for i := range 150 {
				off := r.Int64N(size/512-1) * 512
				n := min((1+r.Int64N(32))*512, size-off)
				fill(p[:n], uint32(w<<16|i))
				var err error
				switch r.IntN(12) {
				case 0:
					err = j.Zero(bg, off, n, 0)
				case 1:
					err = j.Flush(bg, 0)
				case 2:
					ctx, cancel := context.WithTimeout(bg, time.Duration(r.IntN(300))*time.Microsecond)
					err = j.WriteAt(ctx, p[:n], off, 0)
					cancel()
					if block.KindOf(err) == block.KindCanceled {
						err = nil
					}
				default:
					err = j.WriteAt(bg, p[:n], off, block.FUA*block.Flags(r.IntN(8)/7))
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	before := live.snapshot()
	s := j.Stats()
	j.Close()
	after := newMemory(size)
	open(t, disk.OS(), dir, after, opt)
	if !bytes.Equal(before, after.b) {
		t.Fatal("replay gives another content than was read")
	}
	t.Logf("%d records in %d groups, %d syncs for %d records", s.Records, s.Groups, s.Syncs, s.Synced)
}

// TestRefusedBelow checks that what the device refused does not come back.
func TestRefusedBelow(t *testing.T) {
	dir := t.TempDir()
	live := newMemory(64 << 10)
	j := open(t, disk.OS(), dir, live, Options{})
	p := bytes.Repeat([]byte{1}, 4096)
	if err := j.WriteAt(bg, p, 0, 0); err != nil {
		t.Fatal(err)
	}
	live.fail = func(op string) error {
		if op == "flush" {
			return nil
		}
		return block.E("memory."+op, "", block.KindUnsupported, nil)
	}
	if err := j.Zero(bg, 0, 4096, block.FastZero); block.KindOf(err) != block.KindUnsupported {
		t.Fatal(err)
	}
	j.Close()
	after := newMemory(64 << 10)
	open(t, disk.OS(), dir, after, Options{})
	if !bytes.Equal(after.b[:4096], p) {
		t.Fatal("a refused zero was replayed")
	}
}
