package blocktest

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
)

// Null is a device of zeros that forgets what is written: the cheapest device
// there is, to measure what is above it. It never refuses anything.
type Null struct{ info block.Info }

var _ block.Device = (*Null)(nil)

// NewNull makes a device of size bytes in blocks of 512.
func NewNull(size int64) *Null {
	return &Null{block.Info{Size: size, BlockSize: 512, CanTrim: true, CanExtents: true, ID: "null"}}
}

// Info is block.Device.Info.
func (d *Null) Info() block.Info { return d.info }

// ReadAt gives zeros.
func (d *Null) ReadAt(_ context.Context, p []byte, _ int64, _ block.Flags) error {
	clear(p)
	return nil
}

// WriteAt forgets p.
func (d *Null) WriteAt(context.Context, []byte, int64, block.Flags) error { return nil }

// Zero does nothing.
func (d *Null) Zero(context.Context, int64, int64, block.Flags) error { return nil }

// Trim does nothing.
func (d *Null) Trim(context.Context, int64, int64, block.Flags) error { return nil }

// Flush does nothing.
func (d *Null) Flush(context.Context, block.Flags) error { return nil }

// Extents says that all is a hole.
func (d *Null) Extents(_ context.Context, dst []block.Extent, off, n int64, _ block.Flags) ([]block.Extent, error) {
	return append(dst, block.Extent{Off: off, Len: n, Kind: block.Hole}), nil
}

// Prefetch does nothing.
func (d *Null) Prefetch(context.Context, int64, int64, block.Flags) error { return nil }

// Close does nothing.
func (d *Null) Close() error { return nil }

// Call is one call of a device, as a Hook sees it.
type Call struct {
	Op     string // "read", "write", "zero", "trim", "flush", "extents", "prefetch"
	N      int64  // counts the calls of the hooked device from 1
	Off    int64
	Len    int64
	Flags  block.Flags
	Before bool // false: the device has served it, the answer can still be spoilt
}

// Hooked runs a hook around every call of a device but Info and Close.
type Hooked struct {
	block.Device
	n    atomic.Int64
	hook func(ctx context.Context, c Call) error
}

// Hook puts a hook around dev. An error from it fails the call: before the
// device is asked, or after it has done what was asked.
func Hook(dev block.Device, hook func(ctx context.Context, c Call) error) *Hooked {
	return &Hooked{Device: dev, hook: hook}
}

// Calls is how many calls there were.
func (h *Hooked) Calls() int64 { return h.n.Load() }

func (h *Hooked) around(ctx context.Context, op string, off, n int64, f block.Flags, do func() error) error {
	c := Call{Op: op, N: h.n.Add(1), Off: off, Len: n, Flags: f, Before: true}
	if err := h.hook(ctx, c); err != nil {
		return err
	}
	if err := do(); err != nil {
		return err
	}
	c.Before = false
	return h.hook(ctx, c)
}

// ReadAt is block.Device.ReadAt.
func (h *Hooked) ReadAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	return h.around(ctx, "read", off, int64(len(p)), f, func() error { return h.Device.ReadAt(ctx, p, off, f) })
}

// WriteAt is block.Device.WriteAt.
func (h *Hooked) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	return h.around(ctx, "write", off, int64(len(p)), f, func() error { return h.Device.WriteAt(ctx, p, off, f) })
}

// Zero is block.Device.Zero.
func (h *Hooked) Zero(ctx context.Context, off, n int64, f block.Flags) error {
	return h.around(ctx, "zero", off, n, f, func() error { return h.Device.Zero(ctx, off, n, f) })
}

// Trim is block.Device.Trim.
func (h *Hooked) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	return h.around(ctx, "trim", off, n, f, func() error { return h.Device.Trim(ctx, off, n, f) })
}

// Flush is block.Device.Flush.
func (h *Hooked) Flush(ctx context.Context, f block.Flags) error {
	return h.around(ctx, "flush", 0, 0, f, func() error { return h.Device.Flush(ctx, f) })
}

// Extents is block.Device.Extents.
func (h *Hooked) Extents(ctx context.Context, dst []block.Extent, off, n int64, f block.Flags) (out []block.Extent, err error) {
	out = dst
	err = h.around(ctx, "extents", off, n, f, func() (err error) {
		out, err = h.Device.Extents(ctx, dst, off, n, f)
		return err
	})
	if err != nil {
		return dst, err
	}
	return out, nil
}

// Prefetch is block.Device.Prefetch.
func (h *Hooked) Prefetch(ctx context.Context, off, n int64, f block.Flags) error {
	return h.around(ctx, "prefetch", off, n, f, func() error { return h.Device.Prefetch(ctx, off, n, f) })
}

// Slow makes every call of dev take at least delay, or end with KindCanceled
// when its context does.
func Slow(dev block.Device, delay time.Duration) *Hooked {
	return Hook(dev, func(ctx context.Context, c Call) error {
		if !c.Before {
			return nil
		}
		t := time.NewTimer(delay)
		defer t.Stop()
		select {
		case <-t.C:
			return nil
		case <-ctx.Done():
			return block.E("slow."+c.Op, "", block.KindCanceled, context.Cause(ctx))
		}
	})
}

// Failing is a device that can be told to fail.
type Failing struct {
	*Hooked
	mu   sync.Mutex
	rule func(Call) error
}

// Fail makes a Failing device over dev; it fails nothing until Set.
func Fail(dev block.Device) *Failing {
	f := &Failing{}
	f.Hooked = Hook(dev, func(_ context.Context, c Call) error {
		f.mu.Lock()
		rule := f.rule
		f.mu.Unlock()
		if rule == nil {
			return nil
		}
		return rule(c)
	})
	return f
}

// Set makes rule decide about each call from now on, before and after the
// device served it; nil fails nothing.
func (f *Failing) Set(rule func(Call) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rule = rule
}

// Always fails every call of op ("" for all) with kind from now on, before the
// device sees it.
func (f *Failing) Always(op string, kind block.Kind) {
	f.Set(func(c Call) error {
		if c.Before && (op == "" || op == c.Op) {
			return block.E("failing."+c.Op, "", kind, nil)
		}
		return nil
	})
}

// Once fails the n-th call of op from now on ("" for all; the first is 1) with kind.
func (f *Failing) Once(op string, n int64, kind block.Kind) {
	var seen atomic.Int64
	f.Set(func(c Call) error {
		if c.Before && (op == "" || op == c.Op) && seen.Add(1) == n {
			return block.E("failing."+c.Op, "", kind, nil)
		}
		return nil
	})
}
