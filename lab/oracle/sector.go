package oracle

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
)

// Sector is the unit of the history, in bytes.
const Sector = 512

var le = binary.LittleEndian

const magic = 0x656c6361726f6672

func mix(x uint64) uint64 { // splitmix64
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// fill writes the content of one sector to p. A quarter of it repeats, as
// real data does.
func fill(p []byte, seed, sector, version uint64) {
	le.PutUint64(p, magic)
	le.PutUint64(p[8:], seed)
	le.PutUint64(p[16:], sector)
	le.PutUint64(p[24:], version)
	x := mix(seed ^ mix(sector^mix(version)))
	for i := 32; i < Sector; i += 8 {
		if i&0x60 != 0x60 {
			x += 0x9e3779b97f4a7c15
		}
		le.PutUint64(p[i:], x*0xbf58476d1ce4e5b9)
	}
}

// zeroBase says whether a sector of the untouched disk is zero: in runs of
// 256 KiB, about a third of them.
func zeroBase(seed, sector uint64) bool { return mix(seed+sector/512)%3 == 0 }

// WriteBase makes the untouched disk of size bytes at path; zero runs are holes.
func WriteBase(path string, seed uint64, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return err
	}
	run := make([]byte, 512*Sector)
	for off := int64(0); off < size; off += int64(len(run)) {
		p := run[:min(int64(len(run)), size-off)]
		if zeroBase(seed, uint64(off/Sector)) {
			continue
		}
		for i := 0; i < len(p); i += Sector {
			fill(p[i:], seed, uint64(off/Sector)+uint64(i/Sector), 0)
		}
		if _, err := f.WriteAt(p, off); err != nil {
			return err
		}
	}
	return f.Close()
}

// describe says what the bytes of a sector are.
func describe(p []byte, seed, sector uint64) string {
	zero := true
	for _, b := range p {
		zero = zero && b == 0
	}
	if zero {
		return "zeros"
	}
	if le.Uint64(p) != magic {
		return fmt.Sprintf("foreign bytes %x...", p[:16])
	}
	s, at, v := le.Uint64(p[8:]), le.Uint64(p[16:]), le.Uint64(p[24:])
	want := make([]byte, Sector)
	fill(want, s, at, v)
	whole := "whole"
	if string(want) != string(p) {
		whole = "torn"
	}
	text := fmt.Sprintf("version %d, %s", v, whole)
	if at != sector {
		text += fmt.Sprintf(", of sector %d", at)
	}
	if s != seed {
		text += fmt.Sprintf(", of the disk with seed %d", s)
	}
	return text
}

// Verify checks all of r, a disk of the history's size.
func (h *History) Verify(r io.ReaderAt) error {
	p := make([]byte, 1<<20)
	for off := int64(0); off < h.size; off += int64(len(p)) {
		q := p[:min(int64(len(p)), h.size-off)]
		if _, err := r.ReadAt(q, off); err != nil {
			return fmt.Errorf("read %d bytes at %d: %w", len(q), off, err)
		}
		if err := h.Check(off, q); err != nil {
			return err
		}
	}
	return nil
}

// VerifyTouched checks what was ever written, and of the pieces of 64 KiB
// those whose number is phase modulo every, all of r when every is 1. So most
// of the disk stays as untouched as it was.
func (h *History) VerifyTouched(r io.ReaderAt, every, phase int64) error {
	const piece = 64 << 10
	p := make([]byte, piece)
	check := func(off, n int64) error {
		if _, err := r.ReadAt(p[:n], off); err != nil {
			return fmt.Errorf("read %d bytes at %d: %w", n, off, err)
		}
		return h.Check(off, p[:n])
	}
	for off := int64(0); off < h.size; off += piece {
		end := min(off+piece, h.size)
		if off/piece%every == phase {
			if err := check(off, end-off); err != nil {
				return err
			}
			continue
		}
		for at := off; at < end; {
			n := h.run(at, end)
			if n == 0 {
				at += Sector
				continue
			}
			if err := check(at, n); err != nil {
				return err
			}
			at += n
		}
	}
	return nil
}

// run is how many bytes from off on, up to end, were written.
func (h *History) run(off, end int64) (n int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for ; off+n < end && h.sectors[(off+n)/Sector] != nil; n += Sector {
	}
	return n
}
