package journal

import (
	"context"
	"sync"
)

// ranges orders writes that overlap by arrival. An op is blocked while an
// earlier one that overlaps it, under way or blocked itself, is in the list.
// The list is at most Options.InFlight long, and a scan of it is cheaper than
// a tree at such a length.
type ranges struct {
	mu   sync.Mutex
	list []*op
}

func (a *op) overlaps(b *op) bool { return a.off < b.off+b.n && b.off < a.off+a.n }

// lock waits for o's turn. It returns ctx's error, and the range is not held,
// when ctx ends first.
func (r *ranges) lock(ctx context.Context, o *op) error {
	blockers := 0
	r.mu.Lock()
	for _, e := range r.list {
		if e.overlaps(o) {
			blockers++
		}
	}
	o.blockers = blockers
	r.list = append(r.list, o)
	r.mu.Unlock()
	if blockers == 0 {
		return nil
	}
	select {
	case <-o.wake:
		return nil
	case <-ctx.Done():
		if r.unlock(o) {
			<-o.wake // the turn came meanwhile; the channel must be empty for the next use of o
		}
		return ctx.Err()
	}
}

// unlock takes o out and wakes those whose turn it is. It answers whether o
// had its turn.
func (r *ranges) unlock(o *op) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := 0
	for r.list[i] != o {
		i++
	}
	for _, e := range r.list[i+1:] {
		if e.overlaps(o) {
			if e.blockers--; e.blockers == 0 {
				e.wake <- struct{}{} // never blocks: capacity 1, one turn per op
			}
		}
	}
	r.list = append(r.list[:i], r.list[i+1:]...)
	return o.blockers == 0
}
