package replica

import (
	"context"
	"errors"
	"time"

	"forerun/block"
	"forerun/data/fence"
)

// Handover makes the other node primary, in a planned way: nothing is lost and
// no call fails; calls wait for as long as two round trips take.
// The volume stays there: it becomes the preferred node.
func (v *Volume) Handover(ctx context.Context) error { return v.handOver(ctx, true) }

// Yield is Handover for a node that is about to stop: the volume comes back
// when it does, if that is where it belongs.
func (v *Volume) Yield(ctx context.Context) error { return v.handOver(ctx, false) }

func (v *Volume) handOver(ctx context.Context, prefer bool) error {
	st := v.now.Load()
	switch {
	case v.solo || v.cfg.Peer == nil:
		return v.fault("handover", block.KindUnsupported, "the volume has no other node; start both frontends with --peer and --arbiter")
	case st.role == secondary:
		return v.fault("handover", block.KindFenced, "this node is secondary already; the primary is %s", st.rec.Primary)
	case st.role != primary || !st.open || st.ship == nil || !st.inSync:
		return v.fault("handover", block.KindBusy, "the other node is not in sync; wait until status says that it is")
	}
	r, s := st.reign, st.ship
	// So that little is left to be flushed by who takes over.
	if again, err := v.leadFlush(ctx, r, block.Background); err != nil || again {
		return err
	}
	c, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	err := v.gate.during(c, func() error { return v.leave(r, s, prefer) })
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return v.fault("handover", block.KindBusy, "the hand-over was called off: %w", err)
	}
	return err
}

// resign is for a primary whose own stack fails: the other node, which is in
// sync and has every change first, takes the office. It answers true when this
// reign is over, and the call is to be routed anew.
func (v *Volume) resign(ctx context.Context, r *reign, why error) bool {
	switch block.KindOf(why) {
	case block.KindIO, block.KindCorrupt, block.KindReadOnly:
	default:
		return false
	}
	v.mu.Lock()
	st := v.now.Load()
	if st.reign != r {
		v.mu.Unlock()
		return true
	}
	if !st.leaving {
		if st.ship == nil || !st.inSync || !st.open || v.base.Err() != nil {
			v.mu.Unlock()
			return false
		}
		v.running.Add(1)
		go func() {
			defer v.running.Done()
			v.log.Error("replica: this node's own stack fails; the other node shall be primary", "err", why)
			if err := v.leave(r, st.ship, true); err != nil {
				v.log.Error("replica: the other node cannot be primary", "err", err)
			}
		}()
	}
	v.mu.Unlock()
	c, cancel := context.WithTimeout(ctx, recovery)
	defer cancel()
	for begun := false; ; {
		st := v.now.Load()
		if st.reign != r {
			return true
		}
		if begun = begun || st.leaving; begun && !st.leaving {
			return false
		}
		if v.pause(c, st, 0) != nil {
			return false
		}
	}
}

// leave gives up the office. Writes may be under way: the other node refuses
// what it has not had when it begins, and they are routed anew. Once the arbiter was asked,
// this node serves nothing until it knows the answer: the request may be carried
// out at any time.
func (v *Volume) leave(r *reign, s *session, prefer bool) error {
	v.mu.Lock()
	st := v.now.Load()
	if st.reign != r || st.ship != s || !st.inSync || !st.open {
		v.mu.Unlock()
		return v.fault("handover", block.KindBusy, "the other node is not in sync any more")
	}
	v.reason = "handing over"
	v.updateLocked(func(n *standing) { n.open, n.leaving = false, true })
	v.mu.Unlock()
	defer func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		if st := v.now.Load(); st.reign == r {
			v.reason = ""
			v.updateLocked(func(n *standing) { n.leaving, n.open = false, r.free && n.settled })
		}
	}()
	for {
		c, cancel := context.WithTimeout(r.ctx, callTime)
		var rec fence.Record
		var err error
		lost := v.now.Load().ship != s
		if lost {
			// Who it was meant for may have lost what it had meanwhile: the request
			// is not made again, and what is left of it is ended.
			rec, err = v.cfg.Fence.Settle(c)
		} else {
			rec, err = v.cfg.Fence.Handover(c, r.epoch, s.node, prefer)
		}
		cancel()
		v.learn(event{kind: learned, rec: rec})
		switch {
		case r.ctx.Err() != nil && rec.Primary == s.node:
			v.log.Info("replica: handed over", "to", s.node, "epoch", rec.Epoch)
			if _, err := v.ask(v.base, typOffice, v.say()); err != nil {
				v.log.Info("replica: the new primary will hear of it from the arbiter", "err", err)
			}
			return nil
		case r.ctx.Err() != nil:
			return nil
		case lost && err == nil:
			return v.fault("handover", block.KindBusy, "the hand-over was called off: the other node was lost")
		case fence.Decided(err) && !v.cfg.Fence.Doubt():
			return err
		}
		v.setReason("handing over waits for the arbiter: %v", err)
		nap(r.ctx, renewEvery)
	}
}
