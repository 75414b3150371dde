package disktest

import (
	"maps"
	"math/rand/v2"
	"slices"
	"time"
)

const (
	pageSize   = 4096
	sectorSize = 512
	sectors    = pageSize / sectorSize
)

type page [pageSize]byte

var zeroPage page

// inode is the content of a file, as read now and as on the platter.
type inode struct {
	id       int64
	pages    map[int64]*page // as read now; none means zeros and no space
	size     int64
	platter  int64 // size on the platter
	dirty    map[int64]*unsynced
	reserved []run // pages that have space without content
	used     int64 // pages that take space
	links    int   // names and handles; at 0 its space is free
	mtime    time.Time
}

// unsynced is a page that the platter may not have.
type unsynced struct {
	old, mid *page // on the platter; one version in between; nil for zeros
	writes   int
	mask     uint8 // sectors that differ
	lost     bool  // a Sync failed: it counts as clean and is not
}

// run is a range of pages [from, to).
type run struct{ from, to int64 }

func newInode(id int64) *inode {
	return &inode{id: id, pages: map[int64]*page{}, dirty: map[int64]*unsynced{}, mtime: time.Now()}
}

func orZero(p *page) *page {
	if p == nil {
		return &zeroPage
	}
	return p
}

// touch notes that sectors [s, e) of page i are about to change. salt decides
// which version in between is remembered.
func (n *inode) touch(i int64, s, e int, salt uint64) {
	u := n.dirty[i]
	if u == nil {
		u = &unsynced{old: n.pages[i]}
		n.dirty[i] = u
	} else {
		// Reservoir of one: the k-th overwrite replaces it with odds 1/k.
		u.writes++
		if (salt^uint64(i)*0x9e3779b97f4a7c15)%uint64(u.writes) == 0 {
			if p := n.pages[i]; p != nil {
				c := *p
				u.mid = &c
			} else {
				u.mid = &zeroPage
			}
		}
	}
	u.lost = false
	for b := s; b < e; b++ {
		u.mask |= 1 << b
	}
}

// write stores p at off inside one page; there must be space.
func (n *inode) write(p []byte, off int64, salt uint64) {
	i, at := off/pageSize, int(off%pageSize)
	first := n.dirty[i] == nil
	n.touch(i, at/sectorSize, (at+len(p)+sectorSize-1)/sectorSize, salt)
	pg := n.pages[i]
	if pg == nil {
		if !n.isReserved(i) {
			n.used++
		}
		pg = new(page)
		n.pages[i] = pg
	} else if first {
		c := *pg
		pg = &c
		n.pages[i] = pg
	}
	copy(pg[at:], p)
	n.size = max(n.size, off+int64(len(p)))
}

// needs says how many pages of new space a write into page i takes.
func (n *inode) needs(i int64) int64 {
	if n.pages[i] != nil || n.isReserved(i) {
		return 0
	}
	return 1
}

// punch makes [off, end) read as zeros; whole pages lose their space.
func (n *inode) punch(off, end int64, salt uint64) {
	if end <= off {
		return
	}
	n.eachPage(off/pageSize, (end+pageSize-1)/pageSize, func(i int64) {
		a, b := max(off, i*pageSize)-i*pageSize, min(end, (i+1)*pageSize)-i*pageSize
		if a == 0 && b == pageSize {
			n.touch(i, 0, sectors, salt)
			if !n.isReserved(i) {
				n.used--
			}
			delete(n.pages, i)
			return
		}
		n.write(make([]byte, b-a), i*pageSize+a, salt)
	})
	n.unreserve(run{(off + pageSize - 1) / pageSize, end / pageSize})
}

// eachPage calls f for the pages in [from, to) that have content, in order.
func (n *inode) eachPage(from, to int64, f func(i int64)) {
	var at []int64
	if to-from < int64(len(n.pages)) {
		for i := from; i < to; i++ {
			if n.pages[i] != nil {
				at = append(at, i)
			}
		}
	} else {
		for i := range n.pages {
			if i >= from && i < to {
				at = append(at, i)
			}
		}
		slices.Sort(at)
	}
	for _, i := range at {
		f(i)
	}
}

func (n *inode) truncate(size int64, salt uint64) {
	if size < n.size {
		was := n.size
		n.punch(size, max(was, size+pageSize), salt)
		// Space reserved behind the end goes too.
		n.unreserve(run{(size + pageSize - 1) / pageSize, 1 << 52})
	}
	n.size = size
}

func (n *inode) isReserved(i int64) bool {
	for _, r := range n.reserved {
		if i >= r.from && i < r.to {
			return true
		}
	}
	return false
}

// missing is how many pages of [r.from, r.to) have no space yet.
func (n *inode) missing(r run) int64 {
	m := r.to - r.from
	for _, q := range n.reserved {
		if a, b := max(q.from, r.from), min(q.to, r.to); a < b {
			m -= b - a
		}
	}
	n.eachPage(r.from, r.to, func(i int64) {
		if !n.isReserved(i) {
			m--
		}
	})
	return m
}

func (n *inode) reserve(r run) {
	n.used += n.missing(r)
	keep := n.reserved[:0]
	for _, q := range n.reserved {
		if q.to < r.from || q.from > r.to {
			keep = append(keep, q)
			continue
		}
		r = run{min(r.from, q.from), max(r.to, q.to)}
	}
	n.reserved = append(keep, r)
}

func (n *inode) unreserve(r run) {
	if r.to <= r.from {
		return
	}
	var keep []run
	for _, q := range n.reserved {
		a, b := max(q.from, r.from), min(q.to, r.to)
		if a >= b {
			keep = append(keep, q)
			continue
		}
		n.used -= b - a
		n.eachPage(a, b, func(int64) { n.used++ })
		if q.from < a {
			keep = append(keep, run{q.from, a})
		}
		if b < q.to {
			keep = append(keep, run{b, q.to})
		}
	}
	n.reserved = keep
}

// sync puts everything but the lost pages on the platter.
func (n *inode) sync() {
	for i, u := range n.dirty {
		if !u.lost {
			delete(n.dirty, i)
		}
	}
	n.platter = n.size
}

// failSync lets some pages reach the platter and calls the others clean.
func (n *inode) failSync(r *rand.Rand) {
	for _, i := range slices.Sorted(maps.Keys(n.dirty)) {
		if r.IntN(4) == 0 {
			delete(n.dirty, i)
		} else {
			n.dirty[i].lost = true
		}
	}
}

// afterPowerCut is what the platter might hold.
func (n *inode) afterPowerCut(r *rand.Rand) *inode {
	c := newInode(n.id)
	c.mtime = n.mtime
	c.reserved = slices.Clone(n.reserved)
	maps.Copy(c.pages, n.pages)
	luck := r.IntN(4) // 0: nothing was written, 1: everything, else each for itself
	for _, i := range slices.Sorted(maps.Keys(n.dirty)) {
		u := n.dirty[i]
		out := *orZero(n.pages[i])
		any := n.pages[i] != nil
		for s := range sectors {
			if u.mask&(1<<s) == 0 {
				continue
			}
			at := s * sectorSize
			from := u.old
			switch what := r.IntN(8); {
			case luck == 0:
			case luck == 1 && !u.lost, what < 3:
				continue
			case what == 3 && u.mid != nil:
				from = u.mid
			case what == 4: // torn: new up to somewhere, old behind, or the other way round
				cut := r.IntN(sectorSize)
				if r.IntN(2) == 0 {
					copy(out[at:at+cut], orZero(u.old)[at:])
				} else {
					copy(out[at+cut:at+sectorSize], orZero(u.old)[at+cut:])
				}
				any = any || u.old != nil
				continue
			}
			copy(out[at:at+sectorSize], orZero(from)[at:])
			any = any || from != nil
		}
		if any {
			c.pages[i] = &out
		} else {
			delete(c.pages, i)
		}
	}
	switch {
	case luck == 0:
		c.size = n.platter
	case luck == 1:
		c.size = n.size
	case n.size > n.platter && r.IntN(3) == 0:
		c.size = n.platter + r.Int64N(n.size-n.platter+1)
	case r.IntN(2) == 0:
		c.size = n.platter
	default:
		c.size = n.size
	}
	end := (c.size + pageSize - 1) / pageSize
	for i, p := range c.pages {
		if i >= end {
			delete(c.pages, i)
		} else if tail := c.size - i*pageSize; tail < pageSize {
			cut := *p
			clear(cut[tail:])
			c.pages[i] = &cut
		}
	}
	c.platter = c.size
	c.used = 0
	held := c.reserved
	c.reserved = nil
	c.used = int64(len(c.pages))
	for _, q := range held {
		if q.to = min(q.to, end); q.from < q.to {
			c.reserve(q)
		}
	}
	return c
}
