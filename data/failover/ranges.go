package failover

import (
	"context"
	"sync"
	"time"
)

// ranges lets overlapping calls go one after the other, in the order they
// came, if either of them changes the disk.
type ranges struct {
	mu      sync.Mutex
	list    []*hold // guarded by mu: in order of arrival, waiting and granted
	waiting int     // guarded by mu: how many are not granted
	free    []*hold // guarded by mu
}

// hold is a call's claim on [off, end).
type hold struct {
	off, end int64
	change   bool
	granted  bool
	wake     chan struct{} // of length 1
}

// maxFree bounds the holds kept for later.
const maxFree = 256

// inTheWay says whether an earlier hold keeps list[i] waiting. mu is held.
func (r *ranges) inTheWay(i int) bool {
	h := r.list[i]
	for _, e := range r.list[:i] {
		if (h.change || e.change) && h.off < e.end && e.off < h.end {
			return true
		}
	}
	return false
}

// take waits until nothing earlier is in the way of a call on n bytes at off.
// It fails when a context ends first.
func (r *ranges) take(ctx, dev context.Context, off, n int64, change bool) (*hold, error) {
	r.mu.Lock()
	var h *hold
	if k := len(r.free); k > 0 {
		h, r.free = r.free[k-1], r.free[:k-1]
	} else {
		h = &hold{wake: make(chan struct{}, 1)}
	}
	h.off, h.end, h.change = off, off+n, change
	r.list = append(r.list, h)
	h.granted = !r.inTheWay(len(r.list) - 1)
	if h.granted {
		r.mu.Unlock()
		return h, nil
	}
	r.waiting++
	r.mu.Unlock()
	var err error
	select {
	case <-h.wake:
		return h, nil
	case <-ctx.Done():
		err = ctx.Err()
	case <-dev.Done():
		err = errClosed
	}
	r.mu.Lock()
	if h.granted {
		<-h.wake
	} else {
		r.waiting--
	}
	r.remove(h)
	r.mu.Unlock()
	return nil, err
}

// drop ends a hold.
func (r *ranges) drop(h *hold) {
	r.mu.Lock()
	r.remove(h)
	r.mu.Unlock()
}

// settle turns a hold into one that keeps only changes away, and ends it after d.
func (r *ranges) settle(h *hold, d time.Duration) {
	if d <= 0 {
		r.drop(h)
		return
	}
	r.mu.Lock()
	h.change = false
	r.grant()
	r.mu.Unlock()
	time.AfterFunc(d, func() { r.drop(h) })
}

// remove takes h off the list and lets those go that waited for it. mu is held.
func (r *ranges) remove(h *hold) {
	for i, e := range r.list {
		if e == h {
			copy(r.list[i:], r.list[i+1:])
			r.list[len(r.list)-1] = nil
			r.list = r.list[:len(r.list)-1]
			break
		}
	}
	if len(r.free) < maxFree {
		r.free = append(r.free, h)
	}
	r.grant()
}

// grant wakes those that nothing is in the way of any more. mu is held.
func (r *ranges) grant() {
	if r.waiting == 0 {
		return
	}
	for i, h := range r.list {
		if !h.granted && !r.inTheWay(i) {
			h.granted = true
			r.waiting--
			h.wake <- struct{}{}
		}
	}
}
