// Package layout reads what the parsers of partition tables and file systems all
// meet: bytes at a place, texts that end with a zero, and bitmaps.
package layout

import (
	"fmt"
	"io"
	"math/bits"
)

// Read fills p with the bytes at off. Fewer are an error.
func Read(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("reading %d bytes at %d: %w", len(p), off, err)
}

// Text is b up to its first zero byte.
func Text(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

// Power says whether n is a power of two from lo to hi.
func Power(n, lo, hi int64) bool { return n >= lo && n <= hi && n&(n-1) == 0 }

// Next is the first bit at or after from that is want, 0 or 1, or n. Bit 0 is the
// lowest of the first byte.
func Next(b []byte, from, n int64, want byte) int64 {
	for from < n {
		v := b[from>>3]
		if want == 0 {
			v = ^v
		}
		if v >>= from & 7; v != 0 {
			return min(n, from+int64(bits.TrailingZeros8(v)))
		}
		from = (from>>3 + 1) << 3
		for skip := byte(want - 1); from < n && b[from>>3] == skip; { // want 1: 0x00, want 0: 0xff
			from += 8
		}
	}
	return n
}
