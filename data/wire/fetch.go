package wire

import (
	"context"
	"fmt"

	"forerun/block"
	"forerun/internal/chunk"
)

// call is one Fetch.
type call struct {
	id      uint64
	r       *Remote
	flags   block.Flags
	deliver func(i int64, p chunk.Packed, err error)
	left    int // entries not yet delivered
	err     error
	done    chan struct{}
}

// entry is one chunk of a call.
//
//	waiting → asked → delivering → (gone)
//
// and back from asked to waiting when its connection is lost.
type entry struct {
	item   item
	call   *call
	index  int64
	pos    int // in its call
	state  entryState
	demand bool   // it goes by the demand connection
	on     *link  // where it was asked for
	also   *link  // where it was asked for before it was promoted
	charge *link  // counts it as outstanding
	same   *entry // another one of the same chunk, see Remote.wanted
}

type entryState uint8

const (
	waiting entryState = iota
	asked
	delivering
)

// Fetch gets the chunks idx, all different. It calls deliver exactly once for
// each, with its packed bytes or an error, and returns when all are delivered
// and no call of deliver is under way: nil, or the first error delivered.
//
// f is a class, Soon, and Full. Without Full a chunk that the volume's Site is
// believed to hold is answered by its signature alone: p.Codec is chunk.Known
// then, and who does not hold it asks again, with Full. deliver is called from the goroutine that receives,
// one per connection, so several calls may be under way at a time. p.Data is
// valid only during the call. While deliver does not return nothing more is
// taken from that connection: slow background holds up background only.
//
// The bytes are as the backend sent them. Who keeps or serves them verifies
// them by p.Open. Outages do not end a Fetch, only ctx, Close, or an answer do.
func (r *Remote) Fetch(ctx context.Context, idx []int64, f block.Flags, deliver func(i int64, p chunk.Packed, err error)) error {
	if len(idx) == 0 {
		return nil
	}
	c := r.c
	k := &call{r: r, flags: f, deliver: deliver, left: len(idx), done: make(chan struct{})}
	es := make([]entry, len(idx))
	c.mu.Lock()
	err := r.check(idx, f)
	if err == nil {
		k.id = c.request()
		err = r.want(k, es, idx)
	}
	if err == nil {
		c.pump()
	}
	c.mu.Unlock()
	if err != nil {
		for _, i := range idx {
			deliver(i, chunk.Packed{}, err)
		}
		return err
	}
	select {
	case <-k.done:
		return k.err
	case <-ctx.Done():
	}
	err = &block.Error{Op: "wire.fetch", Object: r.name, Kind: block.KindCanceled, Err: context.Cause(ctx)}
	c.mu.Lock()
	var mine []*entry
	for i := range es {
		if e := &es[i]; e.call == k && e.state != delivering {
			c.withdraw(e)
			mine = append(mine, e)
		}
	}
	c.pump()
	c.mu.Unlock()
	c.deliverError(mine, err)
	<-k.done
	return k.err
}

// check refuses calls that cannot be served. Client.mu is held.
func (r *Remote) check(idx []int64, f block.Flags) error {
	bad := func(k block.Kind, format string, args ...any) error {
		return &block.Error{Op: "wire.fetch", Object: r.name, Kind: k, Err: fmt.Errorf(format, args...)}
	}
	if r.err != nil {
		return r.err
	}
	if !f.Valid() || f&^(f.Class()|block.Soon|block.Full) != 0 {
		return bad(block.KindInvalid, "flags %#x are not allowed here", uint32(f))
	}
	n := r.v.chunks()
	for _, i := range idx {
		if i < 0 || i >= n {
			return bad(block.KindRange, "chunk %d of %d", i, n)
		}
	}
	return nil
}

// want makes and queues the entries of a call. Client.mu is held.
func (r *Remote) want(k *call, es []entry, idx []int64) error {
	level := levelOf(k.flags)
	for n, i := range idx {
		head := r.wanted[i]
		if head != nil && head.call == k {
			for m := range n { // undo
				r.unwant(&es[m])
				es[m].call = nil
			}
			return &block.Error{Op: "wire.fetch", Object: r.name, Kind: block.KindInvalid, Err: fmt.Errorf("chunk %d twice in one call", i)}
		}
		e := &es[n]
		*e = entry{call: k, index: i, pos: n, same: head, demand: k.flags.Class() == block.Demand}
		e.item = item{level: level, volume: r.handle, index: i, of: e}
		r.wanted[i] = e
	}
	for n := range es {
		r.c.q.push(&r.own, &es[n].item, false)
	}
	return nil
}

// unwant takes an entry out of the volume's table. Client.mu is held.
func (r *Remote) unwant(e *entry) {
	head := r.wanted[e.index]
	switch {
	case head == e && e.same == nil:
		delete(r.wanted, e.index)
	case head == e:
		r.wanted[e.index] = e.same
	default:
		for p := head; p != nil; p = p.same {
			if p.same == e {
				p.same = e.same
				break
			}
		}
	}
	e.same = nil
}

// find returns the entry a frame is about, nil if it is not wanted (any
// more). Client.mu is held.
func (c *Client) find(h header, index int64) *entry {
	r := c.remotes[h.volume]
	if r == nil {
		return nil
	}
	for e := r.wanted[index]; e != nil; e = e.same {
		if e.call.id == h.req && e.state != delivering {
			return e
		}
	}
	return nil
}

// claim makes e the caller's to deliver. Client.mu is held.
func (c *Client) claim(e *entry) {
	if e.item.in != nil {
		c.q.remove(&e.item)
	}
	if e.charge != nil {
		e.charge.outstanding--
	}
	e.state, e.on, e.also, e.charge = delivering, nil, nil, nil
}

// claimAll claims what is wanted of r, and appends it to es.
func (c *Client) claimAll(es []*entry, r *Remote) []*entry {
	for _, e := range r.wanted {
		for ; e != nil; e = e.same {
			if e.state != delivering {
				c.claim(e)
				es = append(es, e)
			}
		}
	}
	return es
}

// withdraw claims e and tells the server that it is not wanted any more.
func (c *Client) withdraw(e *entry) {
	for _, l := range [2]*link{e.on, e.also} {
		if l != nil && !l.dead {
			l.order(tCancel, e.call.r.handle, e.call.id, 0, e.index)
		}
	}
	if e.on != nil || e.also != nil {
		c.stats.Canceled++
	}
	c.claim(e)
}

// settle ends an entry that was delivered. Client.mu is held.
func (c *Client) settle(e *entry, err error) {
	k := e.call
	k.r.unwant(e)
	if k.err == nil {
		k.err = err
	}
	if k.left--; k.left == 0 {
		close(k.done)
	}
}

func (c *Client) deliverError(es []*entry, err error) {
	for _, e := range es {
		e.call.deliver(e.index, chunk.Packed{}, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range es {
		c.settle(e, err)
	}
}

// arrived delivers what came for a chunk, if it is wanted.
func (l *link) arrived(h header, index int64, p chunk.Packed, err error) error {
	c := l.c
	c.mu.Lock()
	e := c.find(h, index)
	if e == nil {
		c.stats.DuplicateChunks++
		c.mu.Unlock()
		return nil
	}
	r := e.call.r
	if !l.ready[r] {
		c.mu.Unlock()
		return protocol("chunk %d of a volume that is not open on this connection", index)
	}
	if err == nil && p.Plain != r.v.length(index) {
		err = &block.Error{Op: "wire.fetch", Object: r.name, Kind: block.KindCorrupt,
			Err: fmt.Errorf("the backend sent %d bytes for chunk %d, which has %d", p.Plain, index, r.v.length(index))}
		p = chunk.Packed{}
	}
	c.claim(e)
	c.stats.ChunksDelivered++
	c.stats.PlainBytes += int64(p.Plain)
	switch {
	case p.Codec == chunk.Zeros:
		c.stats.ZeroChunks++
	case p.Codec == chunk.Known:
		c.stats.SameChunks++
	case l.slot == 0:
		c.stats.DemandBytes += int64(len(p.Data))
	default:
		c.stats.BackgroundBytes += int64(len(p.Data))
	}
	c.pump()
	c.mu.Unlock()
	e.call.deliver(index, p, err)
	c.mu.Lock()
	c.settle(e, err)
	c.mu.Unlock()
	return nil
}

// Promote makes chunks that were asked for in a lower class go as demand, on
// the demand connection. Chunks that are not wanted, or come already, stay as
// they are.
func (r *Remote) Promote(idx []int64) {
	c := r.c
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, i := range idx {
		for e := r.wanted[i]; e != nil; e = e.same {
			if e.demand || e.state == delivering {
				continue
			}
			e.demand = true
			c.stats.Promoted++
			if e.item.in != nil {
				c.q.remove(&e.item)
			}
			e.item.level = levelOf(block.Demand | e.call.flags&block.Soon) // also for when it is lost and queued again
			d := c.slots[0]
			if e.state == asked && d != nil && d.ready[r] {
				e.also, e.on = e.on, d
				d.order(tPromote, r.handle, e.call.id, 0, i)
				continue
			}
			if e.state == asked {
				// The demand connection will ask for it when it is back; until
				// then it may still come where it was asked for.
				e.also, e.on, e.state = e.on, nil, waiting
			}
			c.q.push(&r.own, &e.item, false)
		}
	}
	c.pump()
}
