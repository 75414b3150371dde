package replica

import (
	"context"
	"sync"
	"testing"
	"time"

	"forerun/block"
)

// lazy is a stack whose chunks are at the source until they are fetched or
// written, over a line that may be down.
type lazy struct {
	block.Device
	mu    sync.Mutex
	state map[int64]block.State
	down  bool
	reads int // of untouched chunks
}

const lazyChunk = 64 << 10

func (d *lazy) each(off, n int64, fn func(c int64)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for c := off / lazyChunk; c <= (off+n-1)/lazyChunk; c++ {
		fn(c)
	}
}

func (d *lazy) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	d.each(off, int64(len(p)), func(c int64) { d.state[c] = block.Modified })
	return d.Device.WriteAt(ctx, p, off, f)
}

func (d *lazy) ReadAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	d.each(off, int64(len(p)), func(c int64) {
		if d.state[c] == block.NoState {
			d.reads++
		}
	})
	return d.Device.ReadAt(ctx, p, off, f)
}

func (d *lazy) Extents(_ context.Context, dst []block.Extent, off, n int64, _ block.Flags) ([]block.Extent, error) {
	end := min(off+n, (off/lazyChunk+1)*lazyChunk)
	e := block.Extent{Off: off, Len: end - off, State: block.Untouched}
	d.each(off, 1, func(c int64) {
		if s := d.state[c]; s != block.NoState {
			e.State = s
		}
	})
	return append(dst, e), nil
}

func (d *lazy) Prefetch(ctx context.Context, off, n int64, _ block.Flags) error {
	d.mu.Lock()
	down := d.down
	d.mu.Unlock()
	if down {
		return block.E("lazy", "", block.KindUnavailable, nil)
	}
	d.each(off, n, func(c int64) {
		if d.state[c] == block.NoState {
			d.state[c] = block.Held
		}
	})
	return nil
}

// The joining node has changed what is still at the source here, and the line
// to the source is down: the copy waits, and nobody waits for the copy.
func TestResyncOfWhatIsAtTheSource(t *testing.T) {
	stacks := map[string]*lazy{}
	conf := func(c *Config) {
		d := stacks[c.Node]
		if d == nil {
			d = &lazy{state: map[int64]block.State{}}
			stacks[c.Node] = d
		}
		d.Device = c.Local
		c.Local = d
	}
	hazard(t, conf, func(t *testing.T, w *world, a, b *node) {
		put(t, a, 1, 0, 0)
		b.kill(true)
		// As if a write had come to the disk there whose record was lost.
		f := stacks["b"]
		f.each(3*lazyChunk, 1, func(c int64) { f.state[c] = block.Modified })
		f.each(5*lazyChunk, 1, func(c int64) { f.state[c] = block.Modified })
		da := stacks["a"]
		da.mu.Lock()
		da.down = true
		da.mu.Unlock()
		b.start()
		raw := b.raw
		must(t, raw.WriteAt(bg, make([]byte, 512), 3*lazyChunk, 0))
		time.Sleep(10 * time.Second)
		if s := a.volume().Status(); s.Mode != "resync" || s.Reason == "" || s.ResyncBytes == 0 {
			t.Errorf("%+v", s)
		}
		begin := time.Now()
		put(t, a, 7, 3*lazyChunk, 0)
		if d := time.Since(begin); d > 100*time.Millisecond {
			t.Errorf("a write waited %v for the source", d)
		}
		time.Sleep(3 * time.Second)
		if a.volume().Status().InSync {
			t.Error("in sync, and a piece is missing")
		}
		da.mu.Lock()
		da.down = false
		da.mu.Unlock()
		w.pair(time.Minute)
		if da.reads > 0 || stacks["b"].reads > 0 {
			t.Errorf("%d and %d reads across the line", da.reads, stacks["b"].reads)
		}
		time.Sleep(time.Second)
		w.equal()
		if get(t, b.raw, 0) != 1 || get(t, b.raw, 3*lazyChunk) != 7 {
			t.Error("not copied")
		}
	})
}
