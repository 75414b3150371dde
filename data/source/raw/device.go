package raw

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"forerun/block"
	"forerun/data/source/internal/sector"

	"golang.org/x/sys/unix"
)

const (
	preferredIO = 1 << 20 // bytes
	// stepIO is how much one system call may do before the caller's context is
	// looked at again.
	stepIO   = 8 << 20
	stepZero = 1 << 30
	// maxExtents bounds the answer of one Extents.
	maxExtents = 1 << 16
)

// Options of Open.
type Options struct {
	// ReadOnly opens for reading even where writing is permitted.
	ReadOnly bool
	// Log gets changes of state. Nil is silent.
	Log *slog.Logger
}

// Device is a raw image or a block device. It implements block.Device.
type Device struct {
	claim *Claim
	info  block.Info
	real  int64 // bytes of content, at most info.Size
	grain int64 // bytes: what can be freed or zeroed without writing is a multiple of it
	log   *slog.Logger

	gate   sync.RWMutex
	closed bool

	uncached  atomic.Bool // RWF_DONTCACHE works here
	noPunch   atomic.Bool // the file system cannot punch
	noZero    atomic.Bool // the file system cannot zero a range
	noDSync   atomic.Bool // RWF_DSYNC does not work here
	syncError atomic.Pointer[error]
	stats     counters
}

var _ block.Device = (*Device)(nil)

// Open claims the file or block device at path and serves it. It is opened for
// writing where that is permitted, else Info.ReadOnly is set. Errors are those
// of NewClaim.
func Open(path string, o Options) (*Device, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	c, err := NewClaim(path, ClaimOptions{ReadOnly: o.ReadOnly, Log: o.Log})
	if err != nil {
		return nil, err
	}
	d := &Device{claim: c, real: c.Size(), grain: 1, log: o.Log}
	d.info = block.Info{
		Size: sector.Up(c.Size()), BlockSize: sector.Size, PreferredIO: preferredIO,
		ReadOnly: c.ReadOnly(),
	}
	if c.ID() != "" {
		d.info.ID = fmt.Sprintf("%s:%d", c.ID(), c.Size())
	}
	d.uncached.Store(kernelAtLeast(6, 16))
	// Over NFS a lack of space is seen by the sync and not by the write, and
	// the two must be told apart.
	d.noDSync.Store(c.nfs)
	if c.device {
		if n, err := unix.IoctlGetInt(c.fd, unix.BLKSSZGET); err == nil && n > sector.Size {
			d.grain = int64(n)
		}
		d.info.CanTrim = !d.info.ReadOnly && canZeroUnmap(c.fd)
	} else {
		_, err := unix.Seek(c.fd, 0, unix.SEEK_DATA)
		d.info.CanExtents = err == nil || errors.Is(err, unix.ENXIO)
		d.info.CanTrim = !d.info.ReadOnly
	}
	if d.info.Size != d.real {
		o.Log.Warn("the image's length is not a multiple of 512: the rest of the last sector reads as zeros", "path", path, "bytes", d.real)
	}
	o.Log.Info("source opened", "path", path, "bytes", d.info.Size, "readonly", d.info.ReadOnly)
	return d, nil
}

// canZeroUnmap says whether the kernel has a fast way to make sectors of a
// block device zero, the only kind of trim that is safe.
func canZeroUnmap(fd int) bool {
	sys := sysfs(fd)
	for _, q := range []string{"queue", "../queue"} {
		if b, err := os.ReadFile(filepath.Join(sys, q, "write_zeroes_max_bytes")); err == nil {
			return strings.TrimSpace(string(b)) != "0"
		}
	}
	return false
}

// kernelAtLeast compares the running kernel's release. Uncached reads could
// drop a page that was dirtied meanwhile before 6.16 had the fixes.
func kernelAtLeast(major, minor int) bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	var a, b int
	if n, _ := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &a, &b); n != 2 {
		return false
	}
	return a > major || a == major && b >= minor
}

// Info describes the device.
func (d *Device) Info() block.Info { return d.info }

func (d *Device) fail(op string, err error) error {
	d.stats.errors.Add(1)
	return block.E("source."+op, d.claim.path, 0, err)
}

// enter checks a call and keeps the device open until leave.
func (d *Device) enter(ctx context.Context, op string, off, n int64, writes bool) error {
	if err := sector.Check("source."+op, d.claim.path, off, n, d.info.Size); err != nil {
		return err
	}
	if writes && d.info.ReadOnly {
		return block.E("source."+op, d.claim.path, block.KindReadOnly, errors.New("the source is read-only"))
	}
	if err := ctx.Err(); err != nil {
		return block.E("source."+op, d.claim.path, block.KindCanceled, err)
	}
	d.gate.RLock()
	if d.closed {
		d.gate.RUnlock()
		return block.E("source."+op, d.claim.path, block.KindClosed, nil)
	}
	return nil
}

func (d *Device) leave() { d.gate.RUnlock() }

// ReadAt fills p with the bytes at off.
func (d *Device) ReadAt(ctx context.Context, p []byte, off int64, _ block.Flags) error {
	if err := d.enter(ctx, "read", off, int64(len(p)), false); err != nil {
		return err
	}
	defer d.leave()
	d.stats.reads.Add(1)
	d.stats.readBytes.Add(int64(len(p)))
	n := int(sector.Clip(off, int64(len(p)), d.real))
	clear(p[n:])
	p = p[:n]
	for len(p) > 0 {
		if err := ctx.Err(); err != nil {
			return d.fail("read", err)
		}
		k, err := d.readOnce(p[:min(len(p), stepIO)], off)
		if err != nil {
			return d.fail("read", err)
		}
		p, off = p[k:], off+int64(k)
	}
	return nil
}

// WriteAt stores p at off. With FUA it is durable on return.
func (d *Device) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	if err := d.enter(ctx, "write", off, int64(len(p)), true); err != nil {
		return err
	}
	defer d.leave()
	n := int(sector.Clip(off, int64(len(p)), d.real))
	if !sector.Zeros(p[n:]) {
		return block.E("source.write", d.claim.path, block.KindRange, sector.ErrPad)
	}
	d.stats.writes.Add(1)
	d.stats.writeBytes.Add(int64(len(p)))
	p = p[:n]
	for len(p) > 0 {
		if err := ctx.Err(); err != nil {
			return d.fail("write", err)
		}
		k, err := d.writeOnce(p[:min(len(p), stepIO)], off, f.Has(block.FUA))
		if err != nil {
			if f.Has(block.FUA) && block.KindOf(err) != block.KindNoSpace {
				err = d.lost(err) // it may be the news of other writes that failed
			}
			return d.fail("write", err)
		}
		p, off = p[k:], off+int64(k)
	}
	if f.Has(block.FUA) && d.noDSync.Load() {
		return d.sync("write")
	}
	return d.broken("write", f)
}

// broken reports an earlier failed sync to a write that asks for durability.
func (d *Device) broken(op string, f block.Flags) error {
	if e := d.syncError.Load(); e != nil && f.Has(block.FUA) {
		return d.fail(op, *e)
	}
	return nil
}

// Zero makes n bytes at off read as zeros.
func (d *Device) Zero(ctx context.Context, off, n int64, f block.Flags) error {
	if err := d.enter(ctx, "zero", off, n, true); err != nil {
		return err
	}
	defer d.leave()
	d.stats.zeros.Add(1)
	n = sector.Clip(off, n, d.real)
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return d.fail("zero", err)
		}
		step := min(n, stepZero)
		if err := d.zeroOnce(ctx, off, step, f); err != nil {
			return d.fail("zero", err)
		}
		off, n = off+step, n-step
	}
	if f.Has(block.FUA) {
		return d.sync("zero")
	}
	return nil
}

// Trim frees the space of n bytes at off where that makes them zero, and else
// does nothing.
func (d *Device) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	if err := d.enter(ctx, "trim", off, n, true); err != nil {
		return err
	}
	defer d.leave()
	d.stats.trims.Add(1)
	n = sector.Clip(off, n, d.real)
	for n > 0 && !d.noPunch.Load() {
		if err := ctx.Err(); err != nil {
			return d.fail("trim", err)
		}
		step := min(n, stepZero)
		if in, k := d.inner(off, step); k > 0 {
			if err := d.punch(in, k); err != nil && !unsupported(err) {
				return d.fail("trim", err)
			}
		}
		off, n = off+step, n-step
	}
	if f.Has(block.FUA) {
		return d.sync("trim")
	}
	return nil
}

// Flush makes every write acknowledged before the call durable.
func (d *Device) Flush(ctx context.Context, _ block.Flags) error {
	if err := d.enter(ctx, "flush", 0, sector.Size, false); err != nil {
		return err
	}
	defer d.leave()
	d.stats.flushes.Add(1)
	if d.info.ReadOnly {
		return nil
	}
	return d.sync("flush")
}

func (d *Device) sync(op string) error {
	if e := d.syncError.Load(); e != nil {
		return d.fail(op, *e)
	}
	for {
		err := unix.Fdatasync(d.claim.fd)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return d.fail(op, d.lost(err))
		}
		// A sync that failed at the same time may have taken the news of our
		// writes with it.
		if e := d.syncError.Load(); e != nil {
			return d.fail(op, *e)
		}
		return nil
	}
}

// lost remembers that a sync failed, and returns what every later one answers.
func (d *Device) lost(err error) error {
	sticky := error(&block.Error{Op: "source.sync", Object: d.claim.path, Kind: block.KindOf(err),
		Err: fmt.Errorf("%w; bytes written before may be lost, so the source must be checked and opened again", err)})
	if d.syncError.CompareAndSwap(nil, &sticky) {
		d.log.Error("the source failed to make writes durable", "path", d.claim.path, "err", err)
	}
	return sticky
}

// Extents lists data and holes.
func (d *Device) Extents(ctx context.Context, dst []block.Extent, off, n int64, f block.Flags) ([]block.Extent, error) {
	if err := d.enter(ctx, "extents", off, n, false); err != nil {
		return dst, err
	}
	defer d.leave()
	if !d.info.CanExtents || f.Has(block.Local) {
		return append(dst, block.Extent{Off: off, Len: n, Kind: block.Data}), nil
	}
	d.stats.extents.Add(1)
	// Built behind dst, so that nothing joins with what the caller had.
	ext, err := d.seekExtents(ctx, dst[len(dst):], off, off+n)
	if err != nil {
		return dst, d.fail("extents", err)
	}
	return append(dst, sector.Align(ext, d.real)...), nil
}

// Prefetch returns at once: the source is near.
func (d *Device) Prefetch(ctx context.Context, off, n int64, _ block.Flags) error {
	if err := d.enter(ctx, "prefetch", off, n, false); err != nil {
		return err
	}
	d.leave()
	return nil
}

// Close waits for calls under way and gives the file back.
func (d *Device) Close() error {
	d.gate.Lock()
	defer d.gate.Unlock()
	if d.closed {
		return nil
	}
	d.closed = true
	d.log.Info("source closed", "path", d.claim.path)
	return d.claim.Close()
}
