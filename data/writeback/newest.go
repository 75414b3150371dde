package writeback

import (
	"cmp"
	"container/heap"
	"slices"
)

// change is where one record of a journal, or what is left of it, lies.
type change struct {
	seq  uint64
	off  int64
	n    int64
	kind kind
}

func (c change) end() int64 { return c.off + c.n }

// bySeq is a heap of indices of changes, the newest first.
type bySeq struct {
	idx []int32
	all []change
}

func (h *bySeq) Len() int           { return len(h.idx) }
func (h *bySeq) Less(i, j int) bool { return h.all[h.idx[i]].seq > h.all[h.idx[j]].seq }
func (h *bySeq) Swap(i, j int)      { h.idx[i], h.idx[j] = h.idx[j], h.idx[i] }
func (h *bySeq) Push(x any)         { h.idx = append(h.idx, x.(int32)) }
func (h *bySeq) Pop() any {
	x := h.idx[len(h.idx)-1]
	h.idx = h.idx[:len(h.idx)-1]
	return x
}

// newest answers which parts of the changes are not overwritten by a later
// one, in order of sequence, then offset. It sorts in place: a sweep over the
// offsets, with the changes that cover the current one in a heap.
func newest(all []change) []change {
	slices.SortFunc(all, func(a, b change) int { return cmp.Compare(a.off, b.off) })
	out := make([]change, 0, len(all))
	h := &bySeq{all: all}
	x := int64(0)
	for i := 0; i < len(all) || h.Len() > 0; {
		if h.Len() == 0 {
			x = all[i].off
		}
		for ; i < len(all) && all[i].off <= x; i++ {
			heap.Push(h, int32(i))
		}
		top := all[h.idx[0]]
		if top.end() <= x {
			heap.Pop(h)
			continue
		}
		to := top.end()
		if i < len(all) {
			to = min(to, all[i].off)
		}
		if k := len(out) - 1; k >= 0 && out[k].seq == top.seq && out[k].end() == x {
			out[k].n += to - x
		} else {
			out = append(out, change{top.seq, x, to - x, top.kind})
		}
		x = to
	}
	slices.SortFunc(out, func(a, b change) int {
		return cmp.Or(cmp.Compare(a.seq, b.seq), cmp.Compare(a.off, b.off))
	})
	return out
}
