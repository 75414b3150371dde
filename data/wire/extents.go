package wire

import (
	"context"
	"slices"

	"forerun/block"
)

// aside is an EXTENTS request under way.
type aside struct {
	id   uint64
	r    *Remote
	f    block.Flags
	off  int64
	end  int64
	on   *link // where it was asked, nil: nowhere yet
	got  []block.Extent
	err  error
	done chan struct{}
}

func (a *aside) finish(err error) {
	a.err = err
	close(a.done)
}

// sendAside asks on the connection of its class, if that is there. Client.mu is held.
func (c *Client) sendAside(a *aside) {
	links := c.slots[:1]
	if a.f.Class() != block.Demand {
		links = c.slots[1:]
	}
	for _, l := range links {
		if l != nil && l.ready[a.r] {
			a.on = l
			l.say(header{typ: tExtents, volume: a.r.handle, req: a.id}, appendExtentsOrder(nil, a.f, a.off, a.end-a.off))
			return
		}
	}
}

// ranges takes one frame of an answer to EXTENTS.
func (l *link) ranges(h header, p []byte) error {
	c := l.c
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.asides[h.req]
	if a == nil || a.on != l {
		return nil // given up meanwhile
	}
	at := a.off
	if n := len(a.got); n > 0 {
		at = a.got[n-1].End()
	}
	got, err := parseRanges(a.got, p, at, a.end)
	if err != nil {
		return err
	}
	if len(got) > maxExtents+rangesPerFrame {
		return protocol("an answer of more than %d extents", maxExtents)
	}
	a.got = got
	if h.flags&flagMore == 0 {
		delete(c.asides, a.id)
		a.finish(nil)
	}
	return nil
}

// Extents asks the backend, in batches of up to 16384 extents. With Local, or
// when the source knows nothing of extents, all is data and nothing is asked.
func (r *Remote) Extents(ctx context.Context, dst []block.Extent, off, n int64, f block.Flags) ([]block.Extent, error) {
	if err := r.enter("wire.extents", off, n); err != nil {
		return dst, err
	}
	defer r.calls.Done()
	if n == 0 {
		return dst, nil
	}
	if f.Has(block.Local) || !r.v.info.CanExtents {
		return append(dst, block.Extent{Off: off, Len: n, Kind: block.Data}), nil
	}
	c := r.c
	canceled := func() error { return block.E("wire.extents", r.name, block.KindCanceled, context.Cause(ctx)) }
	select {
	case c.asking <- struct{}{}:
		defer func() { <-c.asking }()
	case <-ctx.Done():
		return dst, canceled()
	}
	a := &aside{r: r, f: f.Class(), off: off, end: off + n, done: make(chan struct{})}
	c.mu.Lock()
	if err := r.err; err != nil {
		c.mu.Unlock()
		return dst, err
	}
	a.id = c.request()
	c.asides[a.id] = a
	c.sendAside(a)
	c.mu.Unlock()
	select {
	case <-a.done:
	case <-ctx.Done():
		c.mu.Lock()
		delete(c.asides, a.id)
		c.mu.Unlock()
		return dst, canceled()
	}
	if a.err != nil {
		return dst, a.err
	}
	dst = slices.Grow(dst, len(a.got))
	return append(dst, a.got...), nil
}
