// Package sector fits content of any length and extents of any granularity to
// the 512-byte sectors that every source is addressed in.
//
// A file of 1000 bytes is a disk of two sectors whose last 24 bytes are zero
// and stay zero: nothing can be stored there, so nothing but zeros is accepted.
package sector

import (
	"slices"

	"forerun/block"
)

// Size is the length of a sector in bytes.
const Size = 512

// Up rounds n bytes up to whole sectors.
func Up(n int64) int64 { return (n + Size - 1) &^ (Size - 1) }

// Clip returns how many of n bytes at off lie before real, the end of the content.
func Clip(off, n, real int64) int64 {
	return max(0, min(n, real-off))
}

// Zeros says whether p holds nothing but zero bytes.
func Zeros(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// Align makes the extents, which lie without gaps and begin at a sector, begin
// and end at sectors: a sector that is only partly zero is data. What lies
// behind real, the end of the content, counts as zero, and the last extent
// grows to a whole sector. It returns the new list.
func Align(ext []block.Extent, real int64) []block.Extent {
	if !slices.ContainsFunc(ext, func(e block.Extent) bool { return e.End()&(Size-1) != 0 }) {
		return ext
	}
	out := make([]block.Extent, 0, len(ext))
	at := ext[0].Off
	put := func(end int64, k block.ExtentKind) {
		if end > at {
			out = block.AppendExtent(out, block.Extent{Off: at, Len: end - at, Kind: k})
			at = end
		}
	}
	for _, e := range ext {
		if e.Kind.Zero() {
			to := e.End() &^ (Size - 1)
			if e.End() >= real {
				to = Up(e.End())
			}
			put(Up(e.Off), block.Data)
			put(to, e.Kind)
			put(Up(e.End()), block.Data)
			continue
		}
		put(Up(e.End()), e.Kind)
	}
	return out
}

// Check refuses what no source can serve: a range that is none, is not whole
// sectors, or ends beyond size.
func Check(op, object string, off, n, size int64) error {
	switch {
	case off < 0 || n <= 0 || off > 1<<61 || n > 1<<61:
		return block.E(op, object, block.KindInvalid, errRange)
	case off+n > size:
		return block.E(op, object, block.KindRange, errBeyond)
	case (off|n)&(Size-1) != 0:
		return block.E(op, object, block.KindInvalid, errAlign)
	}
	return nil
}
