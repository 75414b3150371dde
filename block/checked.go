package block

import (
	"context"
	"fmt"
	"math"
	"sync"
)

// Checked stands between two storeys and holds both to the contract: callers
// to range, alignment, flags and capability, the device to error kinds and
// extents. It costs a few comparisons a call and allocates nothing, so it
// stays in production. A caller's fault is an error of KindInvalid, KindRange
// or KindReadOnly; a device's fault is turned into one of KindIO.
//
// Checked also counts calls under way, so that Close waits for them and calls
// after it are refused with KindClosed, whatever the device below does.
type Checked struct {
	dev  Device
	name string
	info Info

	mu     sync.RWMutex // held for reading during each call, for writing by Close
	closed bool
}

var _ Device = (*Checked)(nil)

// NewChecked puts a checker above dev. name is the storey's, for errors.
func NewChecked(name string, dev Device) *Checked {
	return &Checked{dev: dev, name: name, info: dev.Info()}
}

func (c *Checked) fault(op string, k Kind, format string, args ...any) error {
	return &Error{Op: c.name + "." + op, Kind: k, Err: fmt.Errorf(format, args...)}
}

func (c *Checked) enter(op string) error {
	c.mu.RLock()
	if c.closed {
		c.mu.RUnlock()
		return &Error{Op: c.name + "." + op, Kind: KindClosed}
	}
	return nil
}

func (c *Checked) check(op string, off, n int64, f, allowed Flags) error {
	if f&^(allowed|classMask) != 0 || f&classMask > Background {
		return c.fault(op, KindInvalid, "flags %#x are not allowed here", uint32(f))
	}
	if off < 0 || n <= 0 || off > math.MaxInt64-n {
		return c.fault(op, KindInvalid, "%d bytes at %d is not a range", n, off)
	}
	if off+n > c.info.Size {
		return c.fault(op, KindRange, "%d bytes at %d end beyond the device's %d bytes", n, off, c.info.Size)
	}
	if b := int64(c.info.BlockSize); b > 1 && (off|n)&(b-1) != 0 {
		return c.fault(op, KindInvalid, "%d bytes at %d are not aligned to blocks of %d", n, off, b)
	}
	return nil
}

func (c *Checked) transfer(op string, n int) error {
	if c.info.MaxIO > 0 && n > c.info.MaxIO {
		return c.fault(op, KindInvalid, "%d bytes in one call, at most %d are allowed", n, c.info.MaxIO)
	}
	return nil
}

func (c *Checked) writable(op string) error {
	if c.info.ReadOnly {
		return c.fault(op, KindReadOnly, "the device is read-only")
	}
	return nil
}

// Info returns the Info of the device as it was when the checker was made.
func (c *Checked) Info() Info { return c.info }

// ReadAt checks and passes on.
func (c *Checked) ReadAt(ctx context.Context, p []byte, off int64, f Flags) error {
	if err := c.check("read", off, int64(len(p)), f, Soon); err != nil {
		return err
	}
	if err := c.transfer("read", len(p)); err != nil {
		return err
	}
	if err := c.enter("read"); err != nil {
		return err
	}
	defer c.mu.RUnlock()
	return c.dev.ReadAt(ctx, p, off, f)
}

// WriteAt checks and passes on.
func (c *Checked) WriteAt(ctx context.Context, p []byte, off int64, f Flags) error {
	if err := c.check("write", off, int64(len(p)), f, FUA); err != nil {
		return err
	}
	if err := c.transfer("write", len(p)); err != nil {
		return err
	}
	if err := c.writable("write"); err != nil {
		return err
	}
	if err := c.enter("write"); err != nil {
		return err
	}
	defer c.mu.RUnlock()
	return c.dev.WriteAt(ctx, p, off, f)
}

// Zero checks and passes on.
func (c *Checked) Zero(ctx context.Context, off, n int64, f Flags) error {
	if err := c.check("zero", off, n, f, FUA|MayTrim|FastZero); err != nil {
		return err
	}
	if err := c.writable("zero"); err != nil {
		return err
	}
	if err := c.enter("zero"); err != nil {
		return err
	}
	defer c.mu.RUnlock()
	return c.dev.Zero(ctx, off, n, f)
}

// Trim checks and passes on.
func (c *Checked) Trim(ctx context.Context, off, n int64, f Flags) error {
	if err := c.check("trim", off, n, f, FUA); err != nil {
		return err
	}
	if err := c.writable("trim"); err != nil {
		return err
	}
	if err := c.enter("trim"); err != nil {
		return err
	}
	defer c.mu.RUnlock()
	return c.dev.Trim(ctx, off, n, f)
}

// Flush checks and passes on.
func (c *Checked) Flush(ctx context.Context, f Flags) error {
	if f&^classMask != 0 || f > Background {
		return c.fault("flush", KindInvalid, "flags %#x are not allowed here", uint32(f))
	}
	if err := c.enter("flush"); err != nil {
		return err
	}
	defer c.mu.RUnlock()
	return c.dev.Flush(ctx, f)
}

// Extents checks, passes on, and checks the answer.
func (c *Checked) Extents(ctx context.Context, dst []Extent, off, n int64, f Flags) ([]Extent, error) {
	if err := c.check("extents", off, n, f, Local); err != nil {
		return dst, err
	}
	if err := c.enter("extents"); err != nil {
		return dst, err
	}
	defer c.mu.RUnlock()
	// The device gets the free part of dst only: with what the caller has in
	// front of it in sight, AppendExtent would join the two, and the answer
	// would not begin at off any more.
	out, err := c.dev.Extents(ctx, dst[len(dst):], off, n, f)
	if err != nil {
		return dst, err
	}
	at := off
	for _, e := range out {
		if e.Off != at || e.Len <= 0 || e.Len > off+n-at {
			return dst, c.fault("extents", KindIO, "the device answered %d bytes at %d where %d was due", e.Len, e.Off, at)
		}
		at = e.End()
	}
	if at == off {
		return dst, c.fault("extents", KindIO, "the device answered no extent for %d bytes at %d", n, off)
	}
	return append(dst, out...), nil
}

// Prefetch checks and passes on.
func (c *Checked) Prefetch(ctx context.Context, off, n int64, f Flags) error {
	if err := c.check("prefetch", off, n, f, Soon); err != nil {
		return err
	}
	if err := c.enter("prefetch"); err != nil {
		return err
	}
	defer c.mu.RUnlock()
	return c.dev.Prefetch(ctx, off, n, f)
}

// Close waits for calls under way, then closes the device, once.
func (c *Checked) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	c.mu.Unlock()
	return c.dev.Close()
}
