package replica

import (
	"context"
	"time"

	"forerun/block"
)

// change is a write, zero or trim.
type change struct {
	typ    uint8 // typWrite, typZero, typTrim
	p      []byte
	off, n int64
	f      block.Flags
}

// do makes the change at a device.
func (c *change) do(ctx context.Context, d block.Device, f block.Flags) error {
	switch c.typ {
	case typZero:
		return d.Zero(ctx, c.off, c.n, f)
	case typTrim:
		return d.Trim(ctx, c.off, c.n, f)
	}
	return d.WriteAt(ctx, c.p, c.off, f)
}

// piece takes the first part off c that one message can carry.
func (c *change) piece() change {
	most := int64(bigRange)
	if c.typ == typWrite {
		most = bigPiece
	}
	head := *c
	if head.n > most {
		head.n = most
		if head.p != nil {
			head.p = c.p[:most]
			c.p = c.p[most:]
		}
	}
	c.off += head.n
	c.n -= head.n
	return head
}

func opName(typ uint8) string {
	switch typ {
	case typZero, typFwdZero:
		return "zero"
	case typTrim, typFwdTrim:
		return "trim"
	}
	return "write"
}

// WriteAt stores p at both nodes.
func (v *Volume) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	if v.solo {
		if err := v.gate.enter(ctx, v.closing); err != nil {
			return v.tell("write", err)
		}
		err := v.cfg.Local.WriteAt(ctx, p, off, f)
		v.gate.leave()
		return err
	}
	return v.change(ctx, change{typWrite, p, off, int64(len(p)), f})
}

// Zero zeroes at both nodes.
func (v *Volume) Zero(ctx context.Context, off, n int64, f block.Flags) error {
	if !v.solo {
		f &^= block.FastZero // what one node can do fast must not fail at the other
	}
	return v.change(ctx, change{typZero, nil, off, n, f})
}

// Trim trims at both nodes.
func (v *Volume) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	return v.change(ctx, change{typTrim, nil, off, n, f})
}

func (v *Volume) change(ctx context.Context, c change) error {
	if v.solo {
		if err := v.gate.enter(ctx, v.closing); err != nil {
			return v.tell(opName(c.typ), err)
		}
		err := c.do(ctx, v.cfg.Local, c.f)
		v.gate.leave()
		return err
	}
	if err := v.enter(opName(c.typ)); err != nil {
		return err
	}
	defer v.life.RUnlock()
	if err := v.writable(c.typ, c.off, c.n); err != nil {
		return err
	}
	again := false
	for {
		// A change that is routed again may be older than what its client has
		// done since by way of another node: when it has gone there, this one is over.
		if again && block.OriginGone(ctx) {
			return v.fault(opName(c.typ), block.KindCanceled, "the client has gone")
		}
		st := v.now.Load()
		var err error
		switch st.role {
		case primary:
			again, err = v.lead(ctx, st.reign, c)
		case secondary:
			again, err = v.forwardChange(ctx, st, c)
		default:
			again, err = true, v.pause(ctx, st, 0)
		}
		if err != nil || !again {
			return v.tell(opName(c.typ), err)
		}
	}
}

// tell gives an error of ours a name; those of devices have one.
func (v *Volume) tell(op string, err error) error {
	switch err {
	case nil:
		return nil
	case context.Canceled, context.DeadlineExceeded:
		return block.E("replica."+op, v.cfg.Volume, block.KindCanceled, err)
	case errClosed:
		return block.E("replica."+op, v.cfg.Volume, block.KindClosed, nil)
	}
	return err
}

// writable refuses what Local would refuse, before the other node sees it.
func (v *Volume) writable(typ uint8, off, n int64) error {
	if v.info.ReadOnly {
		return v.fault(opName(typ), block.KindReadOnly, "the volume is read-only")
	}
	return v.within(opName(typ), off, n)
}

func (v *Volume) within(op string, off, n int64) error {
	if off < 0 || n <= 0 {
		return v.fault(op, block.KindInvalid, "%d bytes at %d is not a range", n, off)
	}
	if off > v.info.Size-n {
		return v.fault(op, block.KindRange, "%d bytes at %d end beyond the device's %d bytes", n, off, v.info.Size)
	}
	return nil
}

// lead makes a change as the primary of reign r. again: the reign is over and
// the change is not acknowledged; it is to be routed anew. Nothing of it is
// under way any more when lead returns, unless the session ended, and then the
// next session waits for it.
func (v *Volume) lead(ctx context.Context, r *reign, c change) (again bool, err error) {
	fua := c.f.Has(block.FUA)
	if err := v.gate.enter(ctx, v.closing); err != nil {
		return false, err
	}
	defer v.gate.leave()
	// Before its range is taken: what opens the volume may have to wait for that.
	if again, err := v.opened(ctx, r); again || err != nil {
		return again, err
	}
	var o *op
	select {
	case o = <-v.slots:
	default:
		select {
		case o = <-v.slots:
		case <-ctx.Done():
			return false, ctx.Err()
		case <-v.closing:
			return false, errClosed
		}
	}
	o.off, o.n = c.off, c.n
	if err := v.ranges.lock(ctx, v.closing, o); err != nil {
		v.slots <- o
		return false, err
	}
	for c.n > 0 && !again && err == nil {
		again, err = v.leadPiece(ctx, r, o, c.piece())
	}
	v.ranges.unlock(o)
	v.slots <- o
	if err == nil && !again && fua {
		again, err = v.leadFlush(ctx, r, block.Demand)
	}
	return again, err
}

// opened waits until clients are served in reign r.
func (v *Volume) opened(ctx context.Context, r *reign) (again bool, err error) {
	for {
		st := v.now.Load()
		if st.reign != r || st.open {
			return st.reign != r, nil
		}
		if err := v.pause(ctx, st, 0); err != nil {
			return false, err
		}
	}
}

func (v *Volume) leadPiece(ctx context.Context, r *reign, o *op, c change) (again bool, err error) {
	for {
		st := v.now.Load()
		switch {
		case st.reign != r:
			return true, nil
		case st.ship != nil:
			// The other node first: what can be read here is there already.
			s := st.ship
			err := v.send(s, o, c.typ, c.p, c.off, c.n, c.f)
			if err == nil {
				return v.leadLocal(ctx, r, s, &c, st.sync)
			}
			if block.KindOf(err) == block.KindNoSpace {
				v.setReason("writes wait for space at the other node: %v", err)
				if err := v.pause(ctx, st, 500*time.Millisecond); err != nil {
					// It may have a part of it.
					v.lose(s, err)
					return false, err
				}
				continue
			}
			v.blame(s, err)
			continue
		case st.alone:
			f := c.f &^ block.FUA
			if st.sync {
				f |= block.FUA
			}
			if err := c.do(r.ctx, v.cfg.Local, f); err != nil {
				if r.ctx.Err() != nil {
					return true, nil
				}
				return false, err
			}
			// Without a word of the arbiter since: nobody else can be in office.
			if err, again := v.leased(ctx, r); err != nil || again {
				return again, err
			}
			return false, nil
		}
		if err := v.pause(ctx, st, 0); err != nil {
			return false, err
		}
	}
}

// blame ends a session because of what the other node answered, or did not.
func (v *Volume) blame(s *session, err error) {
	switch k := block.KindOf(err); k {
	case block.KindUnavailable, block.KindFenced:
	case block.KindCanceled:
		s.slow.Store(s.ctx.Err() == nil)
	default: // it is there and cannot: it would fail again at once
		s.slow.Store(true)
	}
	v.lose(s, err)
}

// leadLocal makes a change here that the other node has.
func (v *Volume) leadLocal(ctx context.Context, r *reign, s *session, c *change, sync bool) (again bool, err error) {
	f := c.f &^ block.FUA
	if sync {
		f |= block.FUA
	}
	if err := c.do(r.ctx, v.cfg.Local, f); err != nil {
		if r.ctx.Err() != nil || v.resign(ctx, r, err) {
			return true, nil
		}
		// The nodes differ now.
		v.lose(s, v.fault("write", block.KindIO, "the change was made there and failed here: %w", err))
		return false, err
	}
	v.writes.Add(1)
	return false, nil
}

// leased waits for a valid lease: nobody else has served until now.
func (v *Volume) leased(ctx context.Context, r *reign) (err error, again bool) {
	for {
		st := v.now.Load()
		if st.reign != r {
			return nil, true
		}
		if !st.leaving && (st.sole || v.cfg.Fence.Lease().Valid(time.Now())) {
			return nil, false
		}
		if err := v.pause(ctx, st, 20*time.Millisecond); err != nil {
			return err, false
		}
	}
}

// Flush makes durable at both nodes what was acknowledged.
func (v *Volume) Flush(ctx context.Context, f block.Flags) error {
	if v.solo {
		return v.cfg.Local.Flush(ctx, f)
	}
	if err := v.enter("flush"); err != nil {
		return err
	}
	defer v.life.RUnlock()
	for {
		st := v.now.Load()
		var again bool
		var err error
		switch st.role {
		case primary:
			again, err = v.leadFlush(ctx, st.reign, f)
		case secondary:
			again, err = v.forwardCall(ctx, st, typFwdFlush, body{flags: f}, nil, nil)
		default:
			again, err = true, v.pause(ctx, st, 0)
		}
		if err != nil || !again {
			return v.tell("flush", err)
		}
	}
}

// leadFlush flushes both nodes at once.
func (v *Volume) leadFlush(ctx context.Context, r *reign, f block.Flags) (again bool, err error) {
	for {
		st := v.now.Load()
		switch {
		case st.reign != r:
			return true, nil
		case !st.open:
		case st.ship != nil:
			s := st.ship
			there := make(chan error, 1)
			go func() {
				_, err := v.call(s, slowFlush, typFlush, body{flags: f.Class()})
				there <- err
			}()
			here := v.cfg.Local.Flush(r.ctx, f)
			err := <-there
			if here != nil {
				if r.ctx.Err() != nil || v.resign(ctx, r, here) {
					return true, nil
				}
				return false, here
			}
			if err == nil {
				return false, nil
			}
			if block.KindOf(err) == block.KindNoSpace {
				v.setReason("a flush waits for space at the other node: %v", err)
				if err := v.pause(ctx, st, 500*time.Millisecond); err != nil {
					return false, err
				}
				continue
			}
			v.blame(s, err)
			continue
		case st.alone:
			if err := v.cfg.Local.Flush(r.ctx, f); err != nil {
				if r.ctx.Err() != nil {
					return true, nil
				}
				return false, err
			}
			err, again := v.leased(ctx, r)
			return again, err
		}
		if err := v.pause(ctx, st, 0); err != nil {
			return false, err
		}
	}
}
