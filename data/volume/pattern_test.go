package volume

import (
	"bytes"
	"context"

	"forerun/block"
	"forerun/internal/chunk"
)

// patternRemote is a source of any size: each chunk is one byte repeated, one in four is zeros.
type patternRemote struct {
	v    *Volume
	cb   int64
	size int64
}

func patternByte(i int64) byte {
	if i%4 == 3 {
		return 0
	}
	return byte(1 + i%200)
}

func (r patternRemote) Fetch(_ context.Context, idx []int64, _ block.Flags) error {
	for _, i := range idx {
		p := bytes.Repeat([]byte{patternByte(i)}, int(min(r.cb, r.size-i*r.cb)))
		if err := r.v.Deliver(i, chunk.Seal(nil, p, chunk.S2)); err != nil {
			return err
		}
	}
	return nil
}

func (r patternRemote) Extents(_ context.Context, dst []block.Extent, off, n int64, _ block.Flags) ([]block.Extent, error) {
	for end := min(off+n, off+1000*r.cb); off < end; {
		i := off / r.cb
		stop := min(end, (i+1)*r.cb)
		e := block.Extent{Off: off, Len: stop - off}
		if patternByte(i) == 0 {
			e.Kind = block.ZeroData
		}
		dst = block.AppendExtent(dst, e)
		off = stop
	}
	return dst, nil
}

// sparseRemote is a source that is all holes.
type sparseRemote struct{ v *Volume }

func (r sparseRemote) Fetch(_ context.Context, idx []int64, _ block.Flags) error {
	for _, i := range idx {
		if err := r.v.Deliver(i, chunk.Packed{Codec: chunk.Zeros, Plain: r.v.table.length(i)}); err != nil {
			return err
		}
	}
	return nil
}

func (r sparseRemote) Extents(_ context.Context, dst []block.Extent, off, n int64, _ block.Flags) ([]block.Extent, error) {
	return append(dst, block.Extent{Off: off, Len: n, Kind: block.Hole}), nil
}
