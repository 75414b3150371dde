package replica

import (
	"context"
	"math"
	"sync"
	"sync/atomic"
)

// op is a write on its way, or a piece of a resynchronisation: its range, its
// turn and its message. Ops of writes come from a fixed pool.
type op struct {
	wake     chan struct{} // one place: its turn
	off, n   int64
	blockers int  // guarded by ranges.mu
	passive  bool // waits for others, nobody waits for it

	sent  atomic.Int64 // when its message was sent, in ticks of Volume.clock; 0: none is under way
	head  []byte       // the message's header; its first bytes, the volume's name, never change
	parts [2][]byte
}

// ranges orders writes that overlap by arrival, as the journal's does. It is
// scanned: the list is as long as there are writes in flight.
type ranges struct {
	mu   sync.Mutex
	list []*op
}

func (o *op) overlaps(p *op) bool { return o.off < p.off+p.n && p.off < o.off+o.n }

// lock waits for o's turn, or until ctx or closing ends: then o is not in the
// list, and an error is returned.
func (r *ranges) lock(ctx context.Context, closing <-chan struct{}, o *op) error {
	r.mu.Lock()
	o.blockers = 0
	for _, e := range r.list {
		if !e.passive && e.overlaps(o) {
			o.blockers++
		}
	}
	r.list = append(r.list, o)
	free := o.blockers == 0
	r.mu.Unlock()
	if free {
		return nil
	}
	var err error
	select {
	case <-o.wake:
		return nil
	case <-ctx.Done():
		err = ctx.Err()
	case <-closing:
		err = errClosed
	}
	if r.unlock(o) {
		<-o.wake // the turn came meanwhile
	}
	return err
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
	if !o.passive {
		for _, e := range r.list[i+1:] {
			if e.overlaps(o) {
				if e.blockers--; e.blockers == 0 {
					e.wake <- struct{}{} // never blocks: one turn an op
				}
			}
		}
	}
	r.list = append(r.list[:i], r.list[i+1:]...)
	return o.blockers == 0
}

// barrier waits until all that are in the list now have left it.
func (r *ranges) barrier(ctx context.Context) error {
	o := &op{wake: make(chan struct{}, 1), n: math.MaxInt64, passive: true}
	if err := r.lock(ctx, nil, o); err != nil {
		return err
	}
	r.unlock(o)
	return nil
}

// oldest is the earliest sent of all ops, 0 when nothing is under way.
func (r *ranges) oldest() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	first := int64(0)
	for _, o := range r.list {
		if s := o.sent.Load(); s != 0 && (first == 0 || s < first) {
			first = s
		}
	}
	return first
}
