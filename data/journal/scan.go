package journal

import (
	"encoding/binary"
	"hash/crc32"
	"io"
)

// window reads a file forward in large pieces.
type window struct {
	r    io.ReaderAt
	size int64
	base int64
	b    []byte // what is in memory, at base
	mem  []byte
}

func newWindow(r io.ReaderAt, size int64) *window {
	return &window{r: r, size: size, mem: make([]byte, min(max(size, 0), maxPayload+2*pageSize))}
}

// at returns n bytes at off, fewer at the end of the file. They stay valid
// until the next call.
func (w *window) at(off, n int64) ([]byte, error) {
	if off >= w.size {
		return nil, nil
	}
	n = min(n, w.size-off)
	if off < w.base || off+n > w.base+int64(len(w.b)) {
		w.b = w.mem[:min(int64(len(w.mem)), w.size-off)]
		w.base = off
		k, err := w.r.ReadAt(w.b, off)
		if err == io.EOF {
			w.b = w.b[:k]
			w.size = min(w.size, off+int64(k))
			n = min(n, int64(k))
		} else if err != nil {
			w.b = nil
			return nil, err
		}
	}
	i := off - w.base
	return w.b[i : i+n], nil
}

// walk calls fn for each valid record of a segment, beginning with the one at
// sequence h.first, and returns where the first bytes that are no valid record
// lie and the position before them. An error is one of reading or of fn; bytes
// that are no record are none. payload is valid during fn only.
func walk(w *window, h *segInfo, fn func(at int64, r *recInfo, payload []byte) error) (end int64, last Position, err error) {
	seed := h.seed()
	end, last = segHeader, Position{h.first - 1, h.prev}
	for {
		b, err := w.at(end, recHeader)
		if err != nil {
			return end, last, err
		}
		r, ok := parseRec(b, seed)
		if !ok || r.seq != last.Sequence+1 || r.prev != last.Checksum {
			return end, last, nil
		}
		var payload []byte
		if r.typ == TypeWrite {
			if payload, err = w.at(end+recHeader, int64(r.length)); err != nil {
				return end, last, err
			}
			if uint64(len(payload)) < r.length || crc32.Checksum(payload, castagnoli) != r.payload {
				return end, last, nil
			}
		}
		if err := fn(end, &r, payload); err != nil {
			return end, last, err
		}
		last = Position{r.seq, r.sum}
		end += r.size()
	}
}

// promised searches the rest of a segment, from off, for headers of records
// and returns the highest sequence that one of them claims to have been
// durable. Only records of this life of the file count.
func promised(w *window, h *segInfo, off int64) (uint64, error) {
	seed, claim := h.seed(), uint64(0)
	off = (off + recAlign - 1) &^ (recAlign - 1)
	for off < w.size {
		b, err := w.at(off, maxPayload)
		if err != nil {
			return 0, err
		}
		if len(b) < recHeader {
			break
		}
		i := 0
		for ; i+recHeader <= len(b); i += recAlign {
			if binary.LittleEndian.Uint32(b[i:]) != recMagic {
				continue
			}
			if r, ok := parseRec(b[i:], seed); ok {
				claim = max(claim, r.durable)
			}
		}
		off += int64(i)
	}
	return claim, nil
}
