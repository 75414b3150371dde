package writeback

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"forerun/block"
	"forerun/internal/chunk"
)

// kind says what an extent of a piece does to the source. The numbers stand in
// checkpoint files and messages and never change.
type kind uint8

const (
	kindData kind = 0 // bytes
	kindZero kind = 1 // zeros that keep their space
	kindHole kind = 2 // zeros that may give it back
)

const (
	extentLen  = 20        // bytes of one entry of a piece's table
	packedLen  = 40        // bytes before the packed bytes of a piece
	pieceBytes = 256 << 10 // plain bytes after which a piece is sent
	maxExtents = 4096      // most extents of one piece
	maxPlain   = pieceBytes + maxExtents*extentLen + 4
	maxVolumes = 256 // of a group
)

// extent is one change to one volume of a group.
type extent struct {
	vol  int // index into the checkpoint's volumes
	kind kind
	off  int64
	n    int64
}

func (e extent) end() int64 { return e.off + e.n }

// builder collects changes until they fill a piece. Extents of one piece never
// overlap: whoever adds must cut before a range comes again.
type builder struct {
	table []extent
	data  []byte
}

func (b *builder) empty() bool { return len(b.table) == 0 }
func (b *builder) full() bool  { return len(b.table) >= maxExtents || len(b.data) >= pieceBytes }
func (b *builder) room() int   { return pieceBytes - len(b.data) }

func (b *builder) reset() { b.table, b.data = b.table[:0], b.data[:0] }

// add appends an extent, joining it with the last one where they touch.
func (b *builder) add(e extent, p []byte) {
	b.data = append(b.data, p...)
	if i := len(b.table) - 1; i >= 0 {
		if l := &b.table[i]; l.vol == e.vol && l.kind == e.kind && l.end() == e.off {
			l.n += e.n
			return
		}
	}
	b.table = append(b.table, e)
}

// plain appends the piece's plain bytes to dst: the table, then the data.
func (b *builder) plain(dst []byte) []byte {
	be := binary.BigEndian
	dst = be.AppendUint32(dst, uint32(len(b.table)))
	for _, e := range b.table {
		dst = be.AppendUint16(dst, uint16(e.vol))
		dst = append(dst, byte(e.kind), 0)
		dst = be.AppendUint64(dst, uint64(e.off))
		dst = be.AppendUint64(dst, uint64(e.n))
	}
	return append(dst, b.data...)
}

// appendPacked appends a sealed piece as it crosses the link and lies in a
// checkpoint file.
func appendPacked(dst []byte, p chunk.Packed) []byte {
	dst = append(dst, byte(p.Codec), chunk.AlgoSHA256, 0, 0)
	dst = binary.BigEndian.AppendUint32(dst, uint32(p.Plain))
	dst = append(dst, p.Sig[:]...)
	return append(dst, p.Data...)
}

func parsePacked(b []byte) (chunk.Packed, error) {
	var p chunk.Packed
	if len(b) < packedLen {
		return p, fmt.Errorf("a piece of %d bytes", len(b))
	}
	p.Codec, p.Plain = chunk.Codec(b[0]), int(binary.BigEndian.Uint32(b[4:]))
	copy(p.Sig[:], b[8:])
	p.Data = b[packedLen:]
	switch {
	case b[1] != chunk.AlgoSHA256 || b[2] != 0 || b[3] != 0:
		return p, fmt.Errorf("a piece signed with algorithm %d", b[1])
	case !p.Codec.Packs():
		return p, fmt.Errorf("a piece packed with codec %d", p.Codec)
	case p.Plain < 4+extentLen || p.Plain > maxPlain || len(p.Data) > maxPlain:
		return p, fmt.Errorf("a piece of %d plain and %d packed bytes", p.Plain, len(p.Data))
	}
	return p, nil
}

// bounds is what a piece may touch: the size and block size of each volume.
type bounds struct {
	size, block int64
}

var errOverlap = errors.New("extents of a piece overlap")

// parsePlain reads the plain bytes of a piece. All extents are within bounds,
// aligned and do not overlap. data is the part of b behind the table.
func parsePlain(dst []extent, b []byte, vols []bounds) (table []extent, data []byte, err error) {
	if len(b) < 4 {
		return dst, nil, fmt.Errorf("a piece of %d plain bytes", len(b))
	}
	be := binary.BigEndian
	n := be.Uint32(b)
	if b = b[4:]; n == 0 || n > maxExtents || len(b) < int(n)*extentLen {
		return dst, nil, fmt.Errorf("a piece of %d extents in %d bytes", n, len(b))
	}
	t, data := b[:n*extentLen], b[n*extentLen:]
	need := int64(0)
	for ; len(t) > 0; t = t[extentLen:] {
		e := extent{vol: int(be.Uint16(t)), kind: kind(t[2])}
		off, k := be.Uint64(t[4:]), be.Uint64(t[12:])
		if e.vol >= len(vols) || e.kind > kindHole || t[3] != 0 {
			return dst, nil, fmt.Errorf("an extent of kind %d for volume %d of %d", e.kind, e.vol, len(vols))
		}
		v := vols[e.vol]
		if k == 0 || off > uint64(v.size) || k > uint64(v.size)-off {
			return dst, nil, block.E("writeback.piece", "", block.KindRange, fmt.Errorf("%d bytes at %d of a volume of %d bytes", k, off, v.size))
		}
		e.off, e.n = int64(off), int64(k)
		if v.block > 1 && (e.off|e.n)&(v.block-1) != 0 {
			return dst, nil, fmt.Errorf("%d bytes at %d are not aligned to blocks of %d", k, off, v.block)
		}
		if e.kind == kindData {
			need += e.n
			if need > int64(len(data)) {
				break
			}
		}
		dst = append(dst, e)
	}
	if need != int64(len(data)) {
		return dst, nil, fmt.Errorf("a piece with %d bytes of data for %d", len(data), need)
	}
	sorted := slices.Clone(dst)
	slices.SortFunc(sorted, func(a, b extent) int {
		if a.vol != b.vol {
			return a.vol - b.vol
		}
		if a.off < b.off {
			return -1
		}
		return 1
	})
	for i := 1; i < len(sorted); i++ {
		if a, b := sorted[i-1], sorted[i]; a.vol == b.vol && a.end() > b.off {
			return dst, nil, errOverlap
		}
	}
	return dst, data, nil
}
