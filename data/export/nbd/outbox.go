package nbd

import (
	"sync"
	"sync/atomic"
)

// outbox holds the replies of a connection that wait to be sent, and counts
// what is under way.
type outbox struct {
	mu      sync.Mutex
	ready   []*request // guarded by mu: replies that wait, in the order they came
	spare   []*request // guarded by mu: the slice of the last sender
	sending bool       // guarded by mu: somebody is in flush
	dead    bool       // guarded by mu: nothing is sent any more
	count   int        // guarded by mu: requests under way
	bytes   int64      // guarded by mu: of their buffers
	stuck   bool       // guarded by mu: the leader waits for room
	room    sync.Cond

	pieces     [][]byte // of the sender
	dispatched atomic.Int32
}

// admit waits until there is room for r and counts it. It fails when nobody is
// left to answer: what a client that is gone has asked for may be much, and
// lies here read already.
func (c *conn) admit(r *request) error {
	o := &c.out
	r.cost = r.needs()
	o.mu.Lock()
	for o.count >= c.s.opt.MaxRequests || o.count > 0 && o.bytes+r.cost > c.s.opt.MaxBuffer {
		if len(o.ready) > 0 && !o.sending {
			o.mu.Unlock()
			// The lead cannot be lost here: r is known to nobody else, and the
			// peer that does not take its replies is the one that is held up.
			c.flush()
			o.mu.Lock()
			continue
		}
		o.stuck = true
		o.room.Wait()
		o.stuck = false
	}
	if o.dead {
		o.mu.Unlock()
		return errGone
	}
	o.count++
	o.bytes += r.cost
	o.mu.Unlock()
	return nil
}

// waiting says whether there is something to send that nobody is sending.
func (o *outbox) waiting() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.ready) > 0 && !o.sending
}

// add queues the reply of r, and says how many wait for a sender.
func (o *outbox) add(r *request) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ready = append(o.ready, r)
	if o.sending {
		return 0
	}
	return len(o.ready)
}

// release forgets a request that will not be answered.
func (o *outbox) release(r *request) {
	o.mu.Lock()
	o.count--
	o.bytes -= r.cost
	if o.stuck {
		o.room.Signal()
	}
	o.mu.Unlock()
	r.free()
}

// abandon drops what is sent from now on.
func (o *outbox) abandon() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.dead = true
}

// flush sends all replies that are ready, and those that become ready
// meanwhile, unless somebody is at it already.
func (c *conn) flush() {
	o := &c.out
	o.mu.Lock()
	if o.sending {
		o.mu.Unlock()
		return
	}
	o.sending = true
	for len(o.ready) > 0 {
		rs := o.ready
		o.ready = o.spare[:0]
		dead := o.dead
		o.mu.Unlock()
		if !dead {
			for _, r := range rs {
				o.pieces = append(o.pieces, r.reply)
			}
			err := c.t.send(o.pieces)
			clear(o.pieces)
			o.pieces = o.pieces[:0]
			if err != nil {
				c.hangup(errGone)
			}
		}
		var cost int64
		for i, r := range rs {
			cost += r.cost
			r.free()
			rs[i] = nil
		}
		o.mu.Lock()
		o.spare = rs[:0]
		o.count -= len(rs)
		o.bytes -= cost
		if o.stuck {
			o.room.Signal()
		}
	}
	o.sending = false
	o.mu.Unlock()
}
