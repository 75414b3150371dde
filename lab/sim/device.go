package sim

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"path"
	"sync"
	"time"

	"forerun/block"
	"forerun/disk"
)

// chunkBytes is what is fetched from the source at once.
const chunkBytes = 4096

// States of a sector, in the file mask.
const (
	untouched_ = iota
	held       // its base is here
	zeroed
	written
)

// overlay is a volume as data/volume is one, small: what was written lies over
// what the source had, and between two flushes anything may be lost or torn.
//
// Data is synced before the mask that tells of it. The base of a chunk is
// fetched when it is first read, and is kept as well.
type overlay struct {
	size  int64
	fetch func(ctx context.Context, p []byte, off int64) error
	data  disk.File
	base  disk.File
	file  disk.File // of mask

	mu    sync.RWMutex
	mask  []byte
	dirty bool
}

// newOverlay opens the one in dir, or makes it, full of base when that is given.
func newOverlay(fs disk.FS, dir string, size int64, base []byte, fetch func(context.Context, []byte, int64) error) (*overlay, error) {
	o := &overlay{size: size, fetch: fetch, mask: make([]byte, size/Sector)}
	if err := fs.MkdirAll(dir); err != nil {
		return nil, err
	}
	fresh := false
	for _, f := range []struct {
		to   *disk.File
		name string
		size int64
	}{{&o.data, "overlay", size}, {&o.base, "base", size}, {&o.file, "mask", size / Sector}} {
		h, err := fs.Open(path.Join(dir, f.name), disk.Write|disk.Create)
		if err != nil {
			return nil, err
		}
		*f.to = h
		if st, err := h.Stat(); err != nil {
			return nil, err
		} else if st.Size < f.size {
			fresh = true
			if err := h.Truncate(f.size); err != nil {
				return nil, err
			}
			if err := h.Sync(); err != nil {
				return nil, err
			}
		}
	}
	if fresh {
		if err := fs.SyncDir(dir); err != nil {
			return nil, err
		}
		if base != nil {
			if _, err := o.base.WriteAt(base, 0); err != nil {
				return nil, err
			}
			for i := range o.mask {
				o.mask[i] = held
			}
			o.dirty = true
			return o, o.Flush(context.Background(), 0)
		}
		return o, nil
	}
	_, err := o.file.ReadAt(o.mask, 0)
	return o, whole(err)
}

func whole(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func (o *overlay) fail(op string, err error) error {
	if err == nil {
		return nil
	}
	return block.E("overlay."+op, "", 0, err)
}

// Info is block.Device.Info.
func (o *overlay) Info() block.Info {
	return block.Info{Size: o.size, BlockSize: Sector, CanTrim: true, CanExtents: true}
}

// ReadAt is block.Device.ReadAt.
func (o *overlay) ReadAt(ctx context.Context, p []byte, off int64, _ block.Flags) error {
	for {
		miss, err := o.read(p, off)
		if err != nil || miss < 0 {
			return o.fail("read", err)
		}
		at := miss &^ (chunkBytes - 1)
		b := make([]byte, min(chunkBytes, o.size-at))
		if err := o.fetch(ctx, b, at); err != nil {
			return o.fail("read", err)
		}
		o.mu.Lock()
		for s := range b[:len(b)/Sector] {
			if i := at/Sector + int64(s); o.mask[i] == untouched_ {
				if _, err := o.base.WriteAt(b[s*Sector:][:Sector], i*Sector); err != nil {
					o.mu.Unlock()
					return o.fail("read", err)
				}
				o.mask[i], o.dirty = held, true
			}
		}
		o.mu.Unlock()
	}
}

// read fills p, or names a byte that is not here.
func (o *overlay) read(p []byte, off int64) (miss int64, err error) {
	o.mu.RLock()
	defer o.mu.RUnlock()
	for at := int64(0); at < int64(len(p)); at += Sector {
		q := p[at : at+Sector]
		switch o.mask[(off+at)/Sector] {
		case untouched_:
			return off + at, nil
		case held:
			_, err = o.base.ReadAt(q, off+at)
		case zeroed:
			clear(q)
		case written:
			_, err = o.data.ReadAt(q, off+at)
		}
		if err := whole(err); err != nil {
			return 0, err
		}
	}
	return -1, nil
}

// WriteAt is block.Device.WriteAt.
func (o *overlay) WriteAt(_ context.Context, p []byte, off int64, f block.Flags) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.write(p, off)
}

func (o *overlay) write(p []byte, off int64) error {
	if _, err := o.data.WriteAt(p, off); err != nil {
		return o.fail("write", err)
	}
	for i := off / Sector; i < (off+int64(len(p)))/Sector; i++ {
		o.mask[i] = written
	}
	o.dirty = true
	return nil
}

// Zero is block.Device.Zero: whole chunks lose what they had.
func (o *overlay) Zero(_ context.Context, off, n int64, _ block.Flags) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	for n > 0 {
		l := min(n, chunkBytes-off%chunkBytes)
		if l == chunkBytes {
			for i := off / Sector; i < (off+l)/Sector; i++ {
				o.mask[i] = zeroed
			}
			o.dirty = true
		} else if err := o.write(make([]byte, l), off); err != nil {
			return err
		}
		off, n = off+l, n-l
	}
	return nil
}

// Trim is Zero.
func (o *overlay) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	return o.Zero(ctx, off, n, f)
}

// Flush is block.Device.Flush.
func (o *overlay) Flush(context.Context, block.Flags) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.dirty {
		return nil
	}
	for _, f := range []disk.File{o.data, o.base} {
		if err := f.Sync(); err != nil {
			return block.E("overlay.flush", "", block.KindIO, err)
		}
	}
	if _, err := o.file.WriteAt(o.mask, 0); err != nil {
		return o.fail("flush", err)
	}
	if err := o.file.Sync(); err != nil {
		return block.E("overlay.flush", "", block.KindIO, err)
	}
	o.dirty = false
	return nil
}

// Extents is block.Device.Extents, chunk by chunk.
func (o *overlay) Extents(_ context.Context, dst []block.Extent, off, n int64, _ block.Flags) ([]block.Extent, error) {
	o.mu.RLock()
	defer o.mu.RUnlock()
	for at := off; at < off+n; {
		end := min((at/chunkBytes+1)*chunkBytes, off+n)
		from := at / chunkBytes * chunkBytes / Sector
		var has [4]int
		all := o.mask[from:min(from+chunkBytes/Sector, int64(len(o.mask)))]
		for _, s := range all {
			has[s]++
		}
		e := block.Extent{Off: at, Len: end - at, State: block.Untouched}
		switch {
		case has[written] > 0:
			e.State = block.Modified
		case has[zeroed] == len(all):
			e.Kind, e.State = block.ZeroData, block.ZeroState
		case has[zeroed] > 0:
			e.State = block.Modified
		case has[held] == len(all):
			e.State = block.Held
		}
		dst = block.AppendExtent(dst, e)
		at = end
	}
	return dst, nil
}

// Prefetch is block.Device.Prefetch.
func (o *overlay) Prefetch(context.Context, int64, int64, block.Flags) error { return nil }

// Close is block.Device.Close.
func (o *overlay) Close() error {
	return errors.Join(o.data.Close(), o.base.Close(), o.file.Close())
}

// image is a source: a disk in a file.
type image struct {
	f    disk.File
	size int64
	id   string
}

// newImage opens or makes it.
func newImage(fs disk.FS, name string, content []byte) (*image, error) {
	f, err := fs.Open(name, disk.Write|disk.Create)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size == 0 {
		if _, err = f.WriteAt(content, 0); err == nil {
			if err = f.Sync(); err == nil {
				err = fs.SyncDir(path.Dir(name))
			}
		}
	}
	return &image{f, int64(len(content)), name}, err
}

// Info is block.Device.Info.
func (d *image) Info() block.Info { return block.Info{Size: d.size, BlockSize: Sector, ID: d.id} }

// ReadAt is block.Device.ReadAt.
func (d *image) ReadAt(_ context.Context, p []byte, off int64, _ block.Flags) error {
	_, err := d.f.ReadAt(p, off)
	return d.wrap("read", whole(err))
}

func (d *image) wrap(op string, err error) error {
	if err == nil {
		return nil
	}
	return block.E("image."+op, d.id, 0, err)
}

// WriteAt is block.Device.WriteAt.
func (d *image) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	_, err := d.f.WriteAt(p, off)
	if err == nil && f.Has(block.FUA) {
		err = d.f.Sync()
	}
	return d.wrap("write", err)
}

// Zero is block.Device.Zero.
func (d *image) Zero(ctx context.Context, off, n int64, f block.Flags) error {
	return d.WriteAt(ctx, make([]byte, n), off, f&block.FUA)
}

// Trim is block.Device.Trim.
func (d *image) Trim(context.Context, int64, int64, block.Flags) error { return nil }

// Flush is block.Device.Flush.
func (d *image) Flush(context.Context, block.Flags) error { return d.wrap("flush", d.f.Sync()) }

// Extents is block.Device.Extents.
func (d *image) Extents(_ context.Context, dst []block.Extent, off, n int64, _ block.Flags) ([]block.Extent, error) {
	return append(dst, block.Extent{Off: off, Len: n}), nil
}

// Prefetch is block.Device.Prefetch.
func (d *image) Prefetch(context.Context, int64, int64, block.Flags) error { return nil }

// Close is block.Device.Close.
func (d *image) Close() error { return d.f.Close() }

// local is a node's stack below the replica: it waits while the disk is full,
// and is slow when told to. It sleeps above the journal, which holds locks while
// it works.
type local struct {
	block.Device
	life context.Context
	slow func() time.Duration
}

const spaceRetry = 500 * time.Millisecond

func (d *local) do(ctx context.Context, op string, f func() error) error {
	for {
		if t := d.slow(); t > 0 {
			if err := d.sleep(ctx, op, t); err != nil {
				return err
			}
		}
		err := f()
		if block.KindOf(err) != block.KindNoSpace {
			return err
		}
		if err := d.sleep(ctx, op, spaceRetry); err != nil {
			return err
		}
	}
}

func (d *local) sleep(ctx context.Context, op string, t time.Duration) error {
	timer := time.NewTimer(t)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return block.E("local."+op, "", block.KindCanceled, ctx.Err())
	case <-d.life.Done():
		return block.E("local."+op, "", block.KindClosed, d.life.Err())
	}
}

// ReadAt is block.Device.ReadAt.
func (d *local) ReadAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	return d.do(ctx, "read", func() error { return d.Device.ReadAt(ctx, p, off, f) })
}

// WriteAt is block.Device.WriteAt.
func (d *local) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	return d.do(ctx, "write", func() error { return d.Device.WriteAt(ctx, p, off, f) })
}

// Zero is block.Device.Zero.
func (d *local) Zero(ctx context.Context, off, n int64, f block.Flags) error {
	return d.do(ctx, "zero", func() error { return d.Device.Zero(ctx, off, n, f) })
}

// Trim is block.Device.Trim.
func (d *local) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	return d.do(ctx, "trim", func() error { return d.Device.Trim(ctx, off, n, f) })
}

// Flush is block.Device.Flush.
func (d *local) Flush(ctx context.Context, f block.Flags) error {
	return d.do(ctx, "flush", func() error { return d.Device.Flush(ctx, f) })
}

// slowness is how slow a disk is now.
type slowness struct {
	mu    sync.Mutex
	r     *rand.Rand
	until time.Time
	most  time.Duration
}

func (s *slowness) now() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.most == 0 || !time.Now().Before(s.until) {
		return 0
	}
	return time.Duration(s.r.Int64N(int64(s.most)))
}

func (s *slowness) set(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.until = time.Now().Add(d)
	s.most = []time.Duration{time.Millisecond, 30 * time.Millisecond, 300 * time.Millisecond, 3 * time.Second}[s.r.IntN(4)]
}
