package replica

import (
	"slices"

	"forerun/block"
)

// maxSpans is how many ranges are kept, and sent in one message.
const maxSpans = 30000

// spans collects ranges in bounded memory: when there are too many, they are
// rounded to a coarser grain and joined, so that it always covers what was
// added, and sometimes more.
type spans struct {
	size  int64 // of the device
	grain int64
	list  []block.Extent // only Off and Len
}

func newSpans(size int64, grain int) *spans {
	return &spans{size: size, grain: int64(max(grain, 512))}
}

func (s *spans) add(off, n int64) {
	if n <= 0 || off < 0 || off >= s.size {
		return
	}
	end := min(off+min(n, s.size-off)+s.grain-1, s.size+s.grain-1) / s.grain * s.grain
	off = off / s.grain * s.grain
	n = min(end, s.size) - off
	if k := len(s.list); k > 0 {
		// Most records follow or repeat the one before.
		if l := &s.list[k-1]; off >= l.Off && off <= l.End() {
			l.Len = max(l.End(), off+n) - l.Off
			return
		}
	}
	s.list = append(s.list, block.Extent{Off: off, Len: n})
	if len(s.list) >= 2*maxSpans {
		s.pack()
	}
}

// pack sorts and joins, coarser until there are at most maxSpans.
func (s *spans) pack() {
	for {
		slices.SortFunc(s.list, func(a, b block.Extent) int {
			switch {
			case a.Off < b.Off:
				return -1
			case a.Off > b.Off:
				return 1
			}
			return 0
		})
		out := s.list[:0]
		for _, e := range s.list {
			if k := len(out); k > 0 && e.Off <= out[k-1].End() {
				out[k-1].Len = max(out[k-1].End(), e.End()) - out[k-1].Off
				continue
			}
			out = append(out, e)
		}
		s.list = out
		if len(s.list) <= maxSpans {
			return
		}
		s.grain *= 2
		for i := range s.list {
			e := &s.list[i]
			end := min((e.End()+s.grain-1)/s.grain*s.grain, s.size)
			e.Off = e.Off / s.grain * s.grain
			e.Len = end - e.Off
		}
	}
}

// all returns the ranges in order, none touching another.
func (s *spans) all() []block.Extent {
	s.pack()
	return s.list
}

func (s *spans) bytes() (n int64) {
	for _, e := range s.list {
		n += e.Len
	}
	return n
}
