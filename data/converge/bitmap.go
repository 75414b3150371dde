package converge

import (
	"iter"
	"maps"
	"math/bits"
	"slices"
)

// pageBits is how many grains one page of a bitmap covers.
const (
	pageWords = 128
	pageBits  = pageWords * 64
	pageBytes = pageWords * 8
)

type page [pageWords]uint64

// full stands for a page with all bits set; it is never changed.
var full = func() *page {
	p := new(page)
	for i := range p {
		p[i] = ^uint64(0)
	}
	return p
}()

// bitmap is a sparse set of grain numbers. Only pages with a bit set take
// space, and full ones share it: a volume of 64 TiB costs nothing until
// written. It is not safe for concurrent use.
type bitmap struct {
	pages map[int64]*page
	n     int64 // bits set
}

func newBitmap() *bitmap { return &bitmap{pages: map[int64]*page{}} }

// set adds [from, to) and answers how many were new.
func (b *bitmap) set(from, to int64) int64 {
	was := b.n
	for from < to {
		k, i := from/pageBits, from%pageBits
		end := min(to, (k+1)*pageBits)
		p := b.pages[k]
		switch {
		case p == full:
		case i == 0 && end-from == pageBits:
			b.n += pageBits - p.count()
			b.pages[k] = full
		default:
			if p == nil {
				p = new(page)
				b.pages[k] = p
			}
			for j := i; j < i+end-from; {
				w := j / 64
				upto := min((w+1)*64, i+end-from)
				mask := (^uint64(0) >> (64 - (upto - j))) << (j % 64)
				b.n += int64(bits.OnesCount64(mask &^ p[w]))
				p[w] |= mask
				j = upto
			}
		}
		from = end
	}
	return b.n - was
}

func (p *page) count() int64 {
	if p == nil {
		return 0
	}
	n := 0
	for _, w := range p {
		n += bits.OnesCount64(w)
	}
	return int64(n)
}

// merge adds all of o, whose pages b may keep.
func (b *bitmap) merge(o *bitmap) {
	for k, q := range o.pages {
		p := b.pages[k]
		switch {
		case p == full:
			continue
		case p == nil || q == full:
			b.n += q.count() - p.count()
			b.pages[k] = q
		default:
			for i, w := range q {
				b.n += int64(bits.OnesCount64(w &^ p[i]))
				p[i] |= w
			}
		}
	}
}

// runs yields the maximal runs [from, to) in order.
func (b *bitmap) runs() iter.Seq2[int64, int64] {
	return func(yield func(from, to int64) bool) {
		start, end := int64(-1), int64(-1)
		for _, k := range slices.Sorted(maps.Keys(b.pages)) {
			p, base := b.pages[k], k*pageBits
			for i := int64(0); i < pageBits; {
				w := p[i/64] >> (i % 64)
				if w == 0 {
					i = (i/64 + 1) * 64
					continue
				}
				if z := int64(bits.TrailingZeros64(w)); z > 0 {
					i += z
					continue
				}
				// ^w has zeros shifted in on top as ones, so the run stays in the word.
				n := min(int64(bits.TrailingZeros64(^w)), 64-i%64)
				if base+i == end {
					end += n
				} else {
					if start >= 0 && !yield(start, end) {
						return
					}
					start, end = base+i, base+i+n
				}
				i += n
			}
		}
		if start >= 0 {
			yield(start, end)
		}
	}
}
