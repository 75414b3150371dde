package wire

import (
	"encoding/binary"
	"slices"

	"forerun/internal/chunk"
)

// mark is the first 40 bits of a signature. It stands for the signature where
// a wrong guess costs a round trip and no more: of 2^24 chunks, a TiB of
// 64 KiB, one in 65,536 that are asked for is guessed wrong.
type mark uint64

const markBytes = 5

func markOf(s *chunk.Sig) mark {
	return mark(s[0])<<32 | mark(binary.BigEndian.Uint32(s[1:]))
}

// appendMarks appends marks in ascending order, which it puts them in, as the
// differences from one to the next in unsigned LEB128: of a whole site 3 to 4 bytes each.
func appendMarks(b []byte, ms []mark) []byte {
	slices.Sort(ms)
	last := mark(0)
	for _, m := range ms {
		b = binary.AppendUvarint(b, uint64(m-last))
		last = m
	}
	return b
}

// parseMarks appends what appendMarks wrote to dst.
func parseMarks(dst []mark, b []byte) ([]mark, error) {
	last := uint64(0)
	for len(b) > 0 {
		d, n := binary.Uvarint(b)
		if n <= 0 || d >= 1<<(8*markBytes) || last+d >= 1<<(8*markBytes) {
			return dst, protocol("a list of marks that goes wrong after %d of them", len(dst))
		}
		last += d
		dst = append(dst, mark(last))
		b = b[n:]
	}
	return dst, nil
}

// holdings is what a client said it holds in one dedup domain: a set of marks
// in open addressing with linear probing. It is a plain value without a lock.
type holdings struct {
	slots []uint64 // mark+1, 0 for empty
	n     int
	// version counts additions, so that who walked a volume knows whether to walk it again.
	version uint64
}

// home is where a mark would stand in a table of n slots, a power of two. The
// marks of hashes are spread evenly already.
func (h *holdings) home(m mark) int { return int(uint64(m)>>4) & (len(h.slots) - 1) }

func (h *holdings) find(m mark) (at int, ok bool) {
	if len(h.slots) == 0 {
		return 0, false
	}
	for at = h.home(m); ; at = (at + 1) & (len(h.slots) - 1) {
		switch h.slots[at] {
		case uint64(m) + 1:
			return at, true
		case 0:
			return at, false
		}
	}
}

func (h *holdings) has(m mark) bool {
	if h == nil {
		return false
	}
	_, ok := h.find(m)
	return ok
}

// add enters m unless there are most marks already.
func (h *holdings) add(m mark, most int) {
	if 4*(h.n+1) > 3*len(h.slots) {
		if _, ok := h.find(m); ok || h.n >= most {
			return
		}
		old := h.slots
		h.slots = make([]uint64, max(1024, 2*len(old)))
		for _, s := range old {
			if s != 0 {
				at, _ := h.find(mark(s - 1))
				h.slots[at] = s
			}
		}
	}
	at, ok := h.find(m)
	if ok || h.n >= most {
		return
	}
	h.slots[at] = uint64(m) + 1
	h.n++
	h.version++
}

// remove takes m out and moves up those behind it that its slot kept away
// from their place (Knuth, The Art of Computer Programming 3, 6.4, algorithm R).
func (h *holdings) remove(m mark) {
	at, ok := h.find(m)
	if !ok {
		return
	}
	h.n--
	size := len(h.slots)
	for next := (at + 1) & (size - 1); ; next = (next + 1) & (size - 1) {
		s := h.slots[next]
		if s == 0 {
			break
		}
		home := h.home(mark(s - 1))
		if (next-home)&(size-1) >= (next-at)&(size-1) {
			h.slots[at] = s
			at = next
		}
	}
	h.slots[at] = 0
}

// carried remembers the latest chunks that one connection brought, a few
// thousand: until its client says that it holds them, a second copy on the same
// connection can be answered by signature, because it comes behind the first.
type carried struct {
	set   map[mark]struct{}
	order []mark
	next  int
}

const maxCarried = 4096

func (c *carried) add(m mark) {
	if c.set == nil {
		c.set = make(map[mark]struct{})
	}
	if _, ok := c.set[m]; ok {
		return
	}
	if len(c.order) < maxCarried {
		c.order = append(c.order, m)
	} else {
		delete(c.set, c.order[c.next])
		c.order[c.next] = m
		c.next = (c.next + 1) % maxCarried
	}
	c.set[m] = struct{}{}
}

// forget is for a chunk that goes on another connection after all.
func (c *carried) forget(m mark) { delete(c.set, m) }

func (c *carried) has(m mark) bool {
	_, ok := c.set[m]
	return ok
}
