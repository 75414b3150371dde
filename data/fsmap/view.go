package fsmap

import (
	"context"
	"io"

	"forerun/block"
)

const (
	viewBlock  = 64 << 10
	viewBlocks = 16
)

// view reads a device at any offset, through a few blocks that it keeps:
// bitmaps lie side by side, and directories of them are read again and again.
// One goroutine uses it.
type view struct {
	ctx  context.Context
	dev  block.Device
	size int64
	max  int64 // bytes of one call
	kept [viewBlocks]struct {
		off  int64 // -1 for none
		used uint64
		b    []byte
	}
	clock uint64
}

func newView(ctx context.Context, dev block.Device) *view {
	i := dev.Info()
	v := &view{ctx: ctx, dev: dev, size: i.Size, max: viewBlock}
	if i.MaxIO > 0 {
		v.max = min(v.max, int64(i.MaxIO)&^(int64(max(i.BlockSize, 1))-1))
	}
	for k := range v.kept {
		v.kept[k].off = -1
	}
	return v
}

// ReadAt is io.ReaderAt.
func (v *view) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, io.ErrUnexpectedEOF
	}
	for n < len(p) {
		at := off + int64(n)
		if at >= v.size {
			return n, io.EOF
		}
		b, err := v.block(at &^ (viewBlock - 1))
		if err != nil {
			return n, err
		}
		n += copy(p[n:], b[at&(viewBlock-1):])
	}
	return n, nil
}

// block returns the bytes of the block at off.
func (v *view) block(off int64) ([]byte, error) {
	v.clock++
	old := 0
	for k := range v.kept {
		c := &v.kept[k]
		if c.off == off {
			c.used = v.clock
			return c.b, nil
		}
		if c.used < v.kept[old].used {
			old = k
		}
	}
	if err := v.ctx.Err(); err != nil {
		return nil, block.E("fsmap.read", "", block.KindCanceled, err)
	}
	c := &v.kept[old]
	if c.b == nil {
		c.b = make([]byte, viewBlock)
	}
	c.off, c.b = -1, c.b[:min(viewBlock, v.size-off)]
	for done := int64(0); done < int64(len(c.b)); {
		n := min(v.max, int64(len(c.b))-done)
		if err := v.dev.ReadAt(v.ctx, c.b[done:done+n], off+done, block.Background); err != nil {
			return nil, err
		}
		done += n
	}
	c.off, c.used = off, v.clock
	return c.b, nil
}
