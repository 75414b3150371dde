package sched

import "forerun/block"

// rank is the order of service; lower goes first.
type rank uint8

const (
	rankDemand rank = iota
	rankWriteBack
	rankSoon
	rankSweep
	ranks
)

func rankOf(f block.Flags) rank {
	switch f.Class() {
	case block.Demand:
		return rankDemand
	case block.WriteBack:
		return rankWriteBack
	}
	if f.Has(block.Soon) {
		return rankSoon
	}
	return rankSweep
}

// flags is the class a batch of that rank travels with.
func (r rank) flags() block.Flags {
	switch r {
	case rankDemand:
		return block.Demand
	case rankWriteBack:
		return block.WriteBack
	case rankSoon:
		return block.Background | block.Soon
	}
	return block.Background
}

// item is a chunk that somebody wants.
type item struct {
	rank rank
	sent bool
	seq  uint64 // of its place in line
}

// place is a place in line. It is void once its item has been sent, raised or
// dropped; it stays until it is met and skipped.
type place struct {
	idx int64
	seq uint64
}

// Queue orders the chunks that are wanted. It is pure: no clock, no goroutine.
// The zero value is not usable; see NewQueue.
type Queue struct {
	items  map[int64]*item
	order  [ranks][]place // as they came
	seq    uint64
	queued [ranks]int
	sent   [ranks]int
}

// NewQueue returns an empty queue.
func NewQueue() *Queue { return &Queue{items: map[int64]*item{}} }

// Added says what Add found.
type Added uint8

// The answers of Add.
const (
	Fresh   Added = iota // it was not wanted before
	Joined               // it was on its way or queued, in the same class or a better one
	Raised               // it was queued in a lower class and goes earlier now
	Promote              // it was sent in a lower class: the other side should be told
)

// Add wants chunk idx with the class of f.
func (q *Queue) Add(idx int64, f block.Flags) Added {
	r := rankOf(f)
	it := q.items[idx]
	switch {
	case it == nil:
		q.items[idx] = &item{rank: r}
		q.push(idx, r)
		return Fresh
	case it.rank <= r:
		return Joined
	case it.sent:
		q.sent[it.rank]--
		q.sent[r]++
		it.rank = r
		return Promote
	default:
		q.queued[it.rank]--
		it.rank = r
		q.push(idx, r)
		return Raised
	}
}

func (q *Queue) push(idx int64, r rank) {
	q.seq++
	q.items[idx].seq = q.seq
	q.order[r] = append(q.order[r], place{idx, q.seq})
	q.queued[r]++
}

// Next takes up to most chunks of rank r, the oldest first, and with it its
// successors on the disk that wait in the same rank, so that one request asks
// for a run. They count as sent until Done.
func (q *Queue) Next(r rank, most int) []int64 {
	for q.queued[r] > 0 {
		head := q.order[r][0]
		q.order[r] = q.order[r][1:]
		idx := head.idx
		if !q.waits(idx, r) || q.items[idx].seq != head.seq {
			continue
		}
		batch := make([]int64, 0, most)
		for len(batch) < most && q.waits(idx, r) {
			q.items[idx].sent = true
			q.queued[r]--
			q.sent[r]++
			batch = append(batch, idx)
			idx++
		}
		return batch
	}
	q.order[r] = nil // only leftovers
	return nil
}

func (q *Queue) waits(idx int64, r rank) bool {
	it := q.items[idx]
	return it != nil && !it.sent && it.rank == r
}

// Done forgets a chunk that was sent or queued.
func (q *Queue) Done(idx int64) {
	it := q.items[idx]
	if it == nil {
		return
	}
	if it.sent {
		q.sent[it.rank]--
	} else {
		q.queued[it.rank]--
	}
	delete(q.items, idx)
}

// Sent says whether the chunk is wanted and on its way.
func (q *Queue) Sent(idx int64) bool {
	it := q.items[idx]
	return it != nil && it.sent
}
