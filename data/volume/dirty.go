package volume

import "math/bits"

// dirtySet names the chunks whose base or mask changed since it was last
// taken. What they changed to is read from the table when a commit is made of
// it, so a chunk that changes often costs one record, and the set is bounded by
// the size of the map: whole pages are one bit, parts of a page 1 KiB.
type dirtySet struct {
	pages     int
	wholeBase []uint64
	wholeMask []uint64
	parts     map[int32]*dirtyPage
}

type dirtyPage struct{ base, mask [pageChunks / 64]uint64 }

func (d *dirtySet) chunk(i int64, base, mask bool) {
	if d.parts == nil {
		d.parts = make(map[int32]*dirtyPage)
	}
	pi := int32(i >> pageShift)
	p := d.parts[pi]
	if p == nil {
		p = new(dirtyPage)
		d.parts[pi] = p
	}
	c := uint(i & (pageChunks - 1))
	if base {
		p.base[c>>6] |= 1 << (c & 63)
	}
	if mask {
		p.mask[c>>6] |= 1 << (c & 63)
	}
}

func (d *dirtySet) page(pi int, base, mask bool) {
	if base {
		setBit(&d.wholeBase, d.pages, pi)
	}
	if mask {
		setBit(&d.wholeMask, d.pages, pi)
	}
}

func setBit(words *[]uint64, n, i int) {
	if *words == nil {
		*words = make([]uint64, (n+63)/64)
	}
	(*words)[i>>6] |= 1 << uint(i&63)
}

func getBit(words []uint64, i int) bool {
	return words != nil && words[i>>6]>>uint(i&63)&1 != 0
}

func (d *dirtySet) empty() bool {
	return d.wholeBase == nil && d.wholeMask == nil && len(d.parts) == 0
}

// take moves everything out of d, or only the bases.
func (d *dirtySet) take(masks bool) dirtySet {
	out := dirtySet{pages: d.pages, wholeBase: d.wholeBase}
	d.wholeBase = nil
	if masks {
		out.wholeMask, out.parts = d.wholeMask, d.parts
		d.wholeMask, d.parts = nil, nil
		return out
	}
	for pi, p := range d.parts {
		if p.base == [pageChunks / 64]uint64{} {
			continue
		}
		if out.parts == nil {
			out.parts = make(map[int32]*dirtyPage)
		}
		if p.mask == [pageChunks / 64]uint64{} {
			out.parts[pi] = p
			delete(d.parts, pi)
			continue
		}
		out.parts[pi] = &dirtyPage{base: p.base}
		p.base = [pageChunks / 64]uint64{}
	}
	return out
}

// merge puts back what could not be committed.
func (d *dirtySet) merge(o dirtySet) {
	orWords(&d.wholeBase, o.wholeBase)
	orWords(&d.wholeMask, o.wholeMask)
	for pi, p := range o.parts {
		q := d.parts[pi]
		if q == nil {
			if d.parts == nil {
				d.parts = make(map[int32]*dirtyPage)
			}
			d.parts[pi] = p
			continue
		}
		for w := range p.base {
			q.base[w] |= p.base[w]
			q.mask[w] |= p.mask[w]
		}
	}
}

func orWords(dst *[]uint64, src []uint64) {
	if *dst == nil {
		*dst = src
		return
	}
	for i, w := range src {
		(*dst)[i] |= w
	}
}

// each calls f for every chunk of page pi that is in words, or for all n when whole.
func each(words *[pageChunks / 64]uint64, whole bool, n int, f func(c int)) {
	if whole {
		for c := range n {
			f(c)
		}
		return
	}
	if words == nil {
		return
	}
	for w, v := range words {
		for ; v != 0; v &= v - 1 {
			f(w<<6 + bits.TrailingZeros64(v))
		}
	}
}
