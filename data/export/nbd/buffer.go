package nbd

import "sync"

// headroom is the space in bytes before the data of a buffer, where a reply's
// header goes, so that header and data are sent as one piece.
const headroom = 64

// sizes are the capacities in bytes of pooled buffers, without headroom.
var sizes = [...]int{4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 32 << 20}

// buffer holds the data of one request. It has one owner at a time: the
// request that it was taken for.
type buffer struct {
	b     []byte // headroom, then the data
	class int    // index in sizes, len(sizes) for one that is not pooled
}

// buffers is a pool of buffers by size.
type buffers struct{ pools [len(sizes)]sync.Pool }

// capacity is what a buffer for n bytes costs.
func capacity(n int) int64 {
	for _, s := range sizes {
		if n <= s {
			return int64(s)
		}
	}
	return int64(n)
}

// take gives a buffer for n bytes, of any content, to the caller.
func (p *buffers) take(n int) *buffer {
	for i, s := range sizes {
		if n > s {
			continue
		}
		if b, ok := p.pools[i].Get().(*buffer); ok {
			return b
		}
		return &buffer{b: make([]byte, headroom+s), class: i}
	}
	return &buffer{b: make([]byte, headroom+n), class: len(sizes)}
}

// give takes b back from its owner.
func (p *buffers) give(b *buffer) {
	if b.class < len(sizes) {
		p.pools[b.class].Put(b)
	}
}

// data is the first n bytes of the buffer's data.
func (b *buffer) data(n int) []byte { return b.b[headroom : headroom+n] }
