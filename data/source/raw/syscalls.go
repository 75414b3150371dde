package raw

import (
	"context"
	"errors"
	"io"

	"forerun/block"

	"golang.org/x/sys/unix"
)

// rwfDontCache is RWF_DONTCACHE (Linux 6.14): the pages a read brought in are
// dropped after it; those that were there before stay.
const rwfDontCache = 0x80

// dropBehind is how far back pages are dropped where the kernel has no
// uncached reads. Only whole folios go, and read-ahead makes folios larger than
// one read, so each read looks back this many bytes as well.
const dropBehind = 4 << 20

// zeros is what is written where nothing faster exists. It is never changed.
var zeros [1 << 20]byte

func unsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.ENODEV)
}

// pread reads at least one byte, or fails; the end of the file is io.ErrUnexpectedEOF.
func pread(fd int, p []byte, off int64) (int, error) {
	for {
		n, err := unix.Pread(fd, p, off)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 0, err
		case n == 0 && len(p) > 0:
			return 0, io.ErrUnexpectedEOF
		default:
			return n, nil
		}
	}
}

// readOnce is one read that leaves no trace in the page cache.
func (d *Device) readOnce(p []byte, off int64) (int, error) {
	if d.uncached.Load() {
		n, err := unix.Preadv2(d.claim.fd, [][]byte{p}, off, rwfDontCache)
		switch {
		case err == unix.EINTR:
			return 0, nil
		case err == nil && n > 0:
			return n, nil
		case err == nil:
			return 0, io.ErrUnexpectedEOF
		case !unsupported(err) && !errors.Is(err, unix.EINVAL):
			return 0, err
		}
		d.uncached.Store(false)
	}
	n, err := pread(d.claim.fd, p, off)
	if err == nil {
		// Advice: a failure changes nothing but the use of memory.
		from := max(0, off-dropBehind)
		_ = unix.Fadvise(d.claim.fd, from, off+int64(n)-from, unix.FADV_DONTNEED)
	}
	return n, err
}

// writeOnce is one write, durable when fua is set and noDSync is not set after it.
func (d *Device) writeOnce(p []byte, off int64, fua bool) (int, error) {
	for {
		var n int
		var err error
		if fua && !d.noDSync.Load() {
			n, err = unix.Pwritev2(d.claim.fd, [][]byte{p}, off, unix.RWF_DSYNC)
			if unsupported(err) {
				d.noDSync.Store(true)
				continue
			}
		} else {
			n, err = unix.Pwrite(d.claim.fd, p, off)
		}
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.ErrShortWrite
		default:
			return n, nil
		}
	}
}

func (d *Device) fallocate(mode uint32, off, n int64) error {
	for {
		err := unix.Fallocate(d.claim.fd, mode|unix.FALLOC_FL_KEEP_SIZE, off, n)
		if err != unix.EINTR {
			return err
		}
	}
}

// punch frees space and leaves zeros. On a block device the kernel does it with
// "write zeroes, may unmap" and never with a plain discard.
func (d *Device) punch(off, n int64) error {
	if d.noPunch.Load() {
		return unix.EOPNOTSUPP
	}
	err := d.fallocate(unix.FALLOC_FL_PUNCH_HOLE, off, n)
	if unsupported(err) {
		d.noPunch.Store(true)
	}
	return err
}

// inner is the part of a range that the device can free or zero by itself:
// whole logical blocks. A file takes any range, also one that ends with it in
// the middle of a sector.
func (d *Device) inner(off, n int64) (int64, int64) {
	from, to := (off+d.grain-1)/d.grain*d.grain, (off+n)/d.grain*d.grain
	return from, max(0, to-from)
}

// zeroOnce makes at most stepZero bytes zero in the cheapest way f allows.
func (d *Device) zeroOnce(ctx context.Context, off, n int64, f block.Flags) error {
	in, k := d.inner(off, n)
	if k == 0 {
		return d.writeZeros(ctx, off, n)
	}
	if err := d.zeroBlocks(ctx, in, k, f); err != nil {
		return err
	}
	// What is left are parts of blocks at either end.
	if err := d.writeZeros(ctx, off, in-off); err != nil {
		return err
	}
	return d.writeZeros(ctx, in+k, off+n-in-k)
}

func (d *Device) zeroBlocks(ctx context.Context, off, n int64, f block.Flags) error {
	if f.Has(block.MayTrim) {
		if err := d.punch(off, n); !unsupported(err) {
			return err
		}
	}
	// A block device may do this by writing, which is not fast.
	if !d.noZero.Load() && !(d.claim.device && f.Has(block.FastZero)) {
		err := d.fallocate(unix.FALLOC_FL_ZERO_RANGE, off, n)
		if !unsupported(err) {
			return err
		}
		d.noZero.Store(true)
	}
	if f.Has(block.FastZero) {
		return unix.EOPNOTSUPP
	}
	return d.writeZeros(ctx, off, n)
}

func (d *Device) writeZeros(ctx context.Context, off, n int64) error {
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		k, err := d.writeOnce(zeros[:min(n, int64(len(zeros)))], off, false)
		if err != nil {
			return err
		}
		off, n = off+int64(k), n-int64(k)
	}
	return nil
}

// seekExtents walks SEEK_DATA and SEEK_HOLE from off to end, or until the
// answer is long enough. What lies behind the end of the file is a hole. The
// descriptor's own offset is used by nobody, so walks may run side by side.
func (d *Device) seekExtents(ctx context.Context, dst []block.Extent, off, end int64) ([]block.Extent, error) {
	for had := len(dst); off < end && len(dst)-had < maxExtents; {
		if err := ctx.Err(); err != nil {
			return dst, err
		}
		data, err := unix.Seek(d.claim.fd, off, unix.SEEK_DATA)
		switch {
		case err == unix.EINTR:
			continue
		case errors.Is(err, unix.ENXIO): // no data up to the end of the file
			return block.AppendExtent(dst, block.Extent{Off: off, Len: end - off, Kind: block.Hole}), nil
		case err != nil:
			return dst, err
		}
		if data > off {
			to := min(data, end)
			dst = block.AppendExtent(dst, block.Extent{Off: off, Len: to - off, Kind: block.Hole})
			off = to
			continue
		}
		hole, err := unix.Seek(d.claim.fd, off, unix.SEEK_HOLE)
		switch {
		case err == unix.EINTR:
			continue
		case errors.Is(err, unix.ENXIO): // the file became shorter meanwhile
			hole = end
		case err != nil:
			return dst, err
		}
		if hole <= off { // punched between the two calls
			continue
		}
		to := min(hole, end)
		dst = block.AppendExtent(dst, block.Extent{Off: off, Len: to - off, Kind: block.Data})
		off = to
	}
	return dst, nil
}
