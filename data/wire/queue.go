package wire

import "forerun/block"

// queue is a priority queue of chunks: levels first, inside a level one owner
// after the other, inside an owner in order of arrival. It is a plain value
// without a lock, a clock or a goroutine, and serves both ends: at the server
// an owner is a connection, at the client a volume.
type queue struct {
	levels [numLevels]level
	n      int
}

// The levels are two to a class: what is wanted soon, and the rest.
const numLevels = 6

func levelOf(f block.Flags) uint8 {
	l := uint8(f.Class()) * 2
	if !f.Has(block.Soon) {
		l++
	}
	return l
}

// level holds the owners that have items, in a ring, next to serve first.
type level struct {
	next *owner
	n    int
}

// owner is whoever items belong to; it has one list per level.
type owner struct {
	of   any // the connection or volume
	list [numLevels]list
	n    int
}

type list struct {
	head, tail *item
	prev, next *owner // in the level's ring, nil when the list is empty
}

// item is one chunk in the queue, embedded in what waits.
type item struct {
	in         *owner // nil when it is not queued
	prev, next *item
	level      uint8
	volume     uint16
	index      int64
	of         any // the job or entry
}

func (q *queue) link(o *owner, l uint8) {
	lv := &q.levels[l]
	s := &o.list[l]
	if lv.next == nil {
		lv.next, s.prev, s.next = o, o, o
		return
	}
	at := lv.next // before the one to be served next: last in the round
	s.next, s.prev = at, at.list[l].prev
	s.prev.list[l].next = o
	at.list[l].prev = o
}

func (q *queue) unlink(o *owner, l uint8) {
	lv := &q.levels[l]
	s := &o.list[l]
	if s.next == o {
		lv.next = nil
	} else {
		s.prev.list[l].next, s.next.list[l].prev = s.next, s.prev
		if lv.next == o {
			lv.next = s.next
		}
	}
	s.prev, s.next = nil, nil
}

// push adds it behind (or, with front, before) what o has at its level.
func (q *queue) push(o *owner, it *item, front bool) {
	l := &o.list[it.level]
	if l.head == nil {
		q.link(o, it.level)
	}
	it.in, it.prev, it.next = o, nil, nil
	switch {
	case l.head == nil:
		l.head, l.tail = it, it
	case front:
		it.next, l.head.prev, l.head = l.head, it, it
	default:
		it.prev, l.tail.next, l.tail = l.tail, it, it
	}
	o.n++
	q.n++
	q.levels[it.level].n++
}

// remove takes it out; it must be queued.
func (q *queue) remove(it *item) {
	o := it.in
	l := &o.list[it.level]
	if it.prev == nil {
		l.head = it.next
	} else {
		it.prev.next = it.next
	}
	if it.next == nil {
		l.tail = it.prev
	} else {
		it.next.prev = it.prev
	}
	it.in, it.prev, it.next = nil, nil, nil
	o.n--
	q.n--
	q.levels[it.level].n--
	if l.head == nil {
		q.unlink(o, it.level)
	}
}

// waiting is the number of items at the levels in [from, to).
func (q *queue) waiting(from, to uint8) (n int) {
	for _, l := range q.levels[from:to] {
		n += l.n
	}
	return n
}

// take removes and returns the run that goes next: the oldest item of the next
// owner at the first level in [from, to), and the items right behind it that
// are the next chunks of the same volume. may says whether an owner's items,
// of which it is shown the first, may go now and how many at most; 0 passes
// the owner over.
func (q *queue) take(dst []*item, from, to uint8, may func(*owner, *item) int) []*item {
	for l := from; l < to; l++ {
		lv := &q.levels[l]
		first := lv.next
		for o := first; o != nil; {
			most := may(o, o.list[l].head)
			if most <= 0 {
				if o = o.list[l].next; o == first {
					break
				}
				continue
			}
			lv.next = o.list[l].next // it may be o itself
			for it := o.list[l].head; it != nil && most > 0; most-- {
				next := it.next
				q.remove(it)
				dst = append(dst, it)
				if next == nil || next.volume != it.volume || next.index != it.index+1 {
					break
				}
				it = next
			}
			return dst
		}
	}
	return dst
}
