package volume

import (
	"math/bits"
	"sync/atomic"
)

// Free marks say of untouched chunks that the source's file systems do not use
// them. They are only in memory, and the source is asked again after a start.
// A mark means something only while its chunk is untouched and unwritten: a
// chunk that becomes anything else loses it in table.note, for good.
//
// Marks are changed under table.mu and read without a lock.

// freePage has the marks of the chunks of a page.
type freePage [pageChunks / 64]atomic.Uint64

// allFree stands for a page of which every chunk is marked; it is never changed.
var allFree = new(freePage)

// freeLen is how many marks the page at index pi has.
func (t *table) freeLen(pi int) int64 {
	p := t.free[pi].Load()
	if p == nil {
		return 0
	}
	if p == allFree {
		return int64(t.pageLen(pi))
	}
	n := 0
	for w := range p {
		n += bits.OnesCount64(p[w].Load())
	}
	return int64(n)
}

// ownFree returns the marks of a page as ones that may be changed. The caller
// holds t.mu.
func (t *table) ownFree(pi int) *freePage {
	p := t.free[pi].Load()
	if p != nil && p != allFree {
		return p
	}
	n := new(freePage)
	if p == allFree {
		for c := range t.pageLen(pi) {
			n[c>>6].Store(n[c>>6].Load() | 1<<(c&63))
		}
	}
	t.free[pi].Store(n)
	return n
}

// markFree marks those of the chunks [from, to) that are untouched and unwritten.
func (t *table) markFree(from, to int64) {
	for from < to {
		pi := int(from >> pageShift)
		first := int64(pi) << pageShift
		end := min(to, first+int64(t.pageLen(pi)))
		t.mu.Lock()
		// Who changes a chunk changes its state first and then takes t.mu, to
		// note it: what is seen untouched here is either left so or loses its mark there.
		if from == first && end == first+int64(t.pageLen(pi)) && t.pages[pi].Load() == nil {
			t.counts.free += end - first - t.freeLen(pi)
			t.free[pi].Store(allFree)
			from = end
		}
		for ; from < end; from++ {
			if t.nib(from) == baseUntouched && !t.marked(from) {
				c := from & (pageChunks - 1)
				w := &t.ownFree(pi)[c>>6]
				w.Store(w.Load() | 1<<(c&63))
				t.counts.free++
			}
		}
		t.mu.Unlock()
	}
}

// marked says whether chunk i is untouched and marked as free.
func (t *table) marked(i int64) bool {
	p := t.free[i>>pageShift].Load()
	if p == nil || t.nib(i) != baseUntouched {
		return false
	}
	c := i & (pageChunks - 1)
	return p == allFree || p[c>>6].Load()>>(c&63)&1 != 0
}

// unmark takes the mark of chunk i away. The caller holds t.mu.
func (t *table) unmark(i int64) {
	pi := int(i >> pageShift)
	p := t.free[pi].Load()
	c := i & (pageChunks - 1)
	if p == nil || p != allFree && p[c>>6].Load()>>(c&63)&1 == 0 {
		return
	}
	w := &t.ownFree(pi)[c>>6]
	w.Store(w.Load() &^ (1 << (c & 63)))
	t.counts.free--
}

// unmarkPage takes the marks of a page away. The caller holds t.mu.
func (t *table) unmarkPage(pi int) {
	t.counts.free -= t.freeLen(pi)
	t.free[pi].Store(nil)
}

// markedRun says whether chunk i, which is untouched, is marked as free, and
// how many of the chunks [i, limit), which are untouched too, are like it.
func (t *table) markedRun(i, limit int64) (free bool, n int64) {
	free = t.marked(i)
	at := i + 1
	for at < limit {
		p := t.free[at>>pageShift].Load()
		if p == nil || p == allFree {
			if (p == allFree) != free {
				break
			}
			at = (at>>pageShift + 1) << pageShift
			continue
		}
		w := p[at&(pageChunks-1)>>6].Load()
		if free {
			w = ^w
		}
		if w >>= at & 63; w != 0 {
			at += int64(bits.TrailingZeros64(w))
			break
		}
		at = (at>>6 + 1) << 6
	}
	return free, max(1, min(at, limit)-i)
}
