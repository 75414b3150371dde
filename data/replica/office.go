package replica

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"forerun/block"
	"forerun/data/fence"
)

// reignAs is what a primary does beside the calls, until it is deposed. first:
// the process has just started and finds itself primary.
func (v *Volume) reignAs(ctx context.Context, rec fence.Record, first bool) {
	peer := v.cfg.Peer != nil
	others := !rec.Alone(v.cfg.Node)
	v.mu.Lock()
	whole := v.known.whole
	v.mu.Unlock()
	if others && peer && !whole {
		if !v.giveWay(ctx, rec) {
			return
		}
		rec, others = v.now.Load().rec, false
	}
	if s := v.inbound.Swap(nil); s != nil {
		s.close()
		if s.drain(ctx) != nil {
			return
		}
	}
	// The word given to the primary before: no calls of clients before that time.
	v.mu.Lock()
	word := time.Until(v.known.heard.Add(fence.Grace))
	v.mu.Unlock()
	if !peer || rec.Cause == fence.CauseClaim || rec.Cause == fence.CauseHandover {
		word = 0
	}
	r := &reign{epoch: rec.Epoch, lost: time.Now(), free: word <= 0}
	r.ctx, r.end = context.WithCancel(ctx)
	defer r.end()
	v.mu.Lock()
	if v.known.rec.Epoch != rec.Epoch || v.known.rec.Primary != v.cfg.Node || ctx.Err() != nil {
		v.mu.Unlock()
		return
	}
	v.known.role = primary
	v.closeTerm()
	v.reason = ""
	rec = v.known.rec
	v.updateLocked(func(s *standing) {
		*s = standing{role: primary, rec: rec, reign: r, changed: s.changed}
		// What was acknowledged is here. After a restart the other may have more
		// that nobody was told of; until that is settled nothing is answered.
		s.settled = !(first && others)
		s.open = s.settled && r.free
		s.sync, s.sole = peer, !others && !v.cfg.Fence.Doubt()
	})
	v.mu.Unlock()
	v.log.Info("replica: primary", "epoch", rec.Epoch, "members", rec.Members)
	if !r.free {
		r.group.Go(func() {
			nap(r.ctx, word)
			v.mu.Lock()
			defer v.mu.Unlock()
			r.free = true
			if st := v.now.Load(); st.reign == r && st.settled && !st.leaving {
				v.updateLocked(func(s *standing) { s.open = true })
			}
		})
	}
	r.group.Go(func() { v.renew(r) })
	if peer {
		r.group.Go(func() { v.beats(r) })
		r.group.Go(func() { v.watch(r) })
	}
	r.group.Go(func() { v.tend(r) })
	<-r.ctx.Done()
	r.group.Wait()
}

// giveWay is for a primary that comes back after a power cut, or that was made one
// while it was away: the other node has what this one may have lost, and shall
// take over. It answers true
// when the other cannot, and this node has been recorded as the only member.
func (v *Volume) giveWay(ctx context.Context, rec fence.Record) bool {
	waits := time.Now()
	for ctx.Err() == nil {
		v.look(ctx)
		r := v.now.Load().rec
		if r.Epoch != rec.Epoch || r.Primary != v.cfg.Node {
			return false
		}
		if r.Alone(v.cfg.Node) && !v.cfg.Fence.Doubt() {
			return true
		}
		v.setReason("the machine was restarted; the other node may have newer data and is given the chance to take over")
		mayGo := time.Since(waits) > recovery
		if s, err := v.ask(ctx, typAsk, v.say()); err == nil {
			mayGo = !s.inSync // it has lost as much as this one
			waits = time.Now()
		}
		if mayGo {
			c, cancel := context.WithTimeout(ctx, callTime)
			got, err := v.cfg.Fence.SetMembers(c, rec.Epoch, v.cfg.Node)
			cancel()
			v.learn(event{kind: learned, rec: got})
			if err == nil {
				continue
			}
		}
		v.sleep(ctx, beatEvery)
	}
	return false
}

// ask sends a state to the other node and returns its answer.
func (v *Volume) ask(ctx context.Context, typ uint8, s state) (state, error) {
	if v.cfg.Peer == nil {
		return state{}, block.E("replica.ask", v.cfg.Volume, block.KindUnavailable, fmt.Errorf("there is no other node"))
	}
	c, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	p, err := v.cfg.Peer.Call(c, typ, s.append(slices.Clone(v.name)))
	if err != nil {
		return state{}, err
	}
	return parseState(v.cfg.Volume, p)
}

// renew keeps the lease at the arbiter.
func (v *Volume) renew(r *reign) {
	for r.ctx.Err() == nil {
		c, cancel := context.WithTimeout(r.ctx, callTime)
		rec, err := v.cfg.Fence.Renew(c, r.epoch)
		cancel()
		v.learn(event{kind: learned, rec: rec})
		if err != nil && fence.Decided(err) {
			v.look(r.ctx)
		}
		nap(r.ctx, renewEvery)
	}
}

// nap sleeps.
func nap(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// beats tells the other node that this one is alive, and how things stand.
func (v *Volume) beats(r *reign) {
	for r.ctx.Err() == nil {
		v.beat(r)
		nap(r.ctx, beatEvery)
	}
}

func (v *Volume) beat(r *reign) {
	st := v.now.Load()
	if st.reign != r {
		return
	}
	say := v.say()
	say.inSync = st.inSync
	if st.ship != nil {
		say.token = st.ship.token
	}
	sent := time.Now()
	s, err := v.ask(r.ctx, typBeat, say)
	if err != nil {
		v.mu.Lock()
		silent := time.Since(r.beaten)
		v.mu.Unlock()
		if st.ship != nil && silent > slowWrite {
			st.ship.slow.Store(true)
			v.lose(st.ship, v.fault("beat", block.KindUnavailable, "the other node has not been heard of for %v: %w", silent, err))
		}
		return
	}
	if s.rec.Epoch > r.epoch {
		v.learn(event{kind: learned, rec: s.rec})
		return
	}
	v.mu.Lock()
	r.beaten = time.Now()
	v.mu.Unlock()
	if s.agreed && s.rec.Epoch == r.epoch && st.rec.Member(s.node) {
		// It has given its word not to take over for a while, and nobody else could.
		v.cfg.Fence.Lease().Renewed(sent)
	}
	if st.ship != nil && s.token != st.ship.token {
		v.lose(st.ship, block.E("replica.beat", v.cfg.Volume, block.KindUnavailable, fmt.Errorf("the other node has left the session")))
	}
}

// watch breaks the session when a message is without an answer for too long.
func (v *Volume) watch(r *reign) {
	for r.ctx.Err() == nil {
		nap(r.ctx, slowWrite/8)
		st := v.now.Load()
		if st.ship == nil {
			continue
		}
		if first := v.ranges.oldest(); first != 0 && v.ticks()-time.Duration(first) > slowWrite {
			st.ship.slow.Store(true)
			v.lose(st.ship, block.E("replica.write", v.cfg.Volume, block.KindUnavailable,
				fmt.Errorf("the other node has not answered a write for %v", slowWrite)))
		}
	}
}

// lose ends a session, once.
func (v *Volume) lose(s *session, why error) {
	v.mu.Lock()
	st := v.now.Load()
	if st.ship != s {
		v.mu.Unlock()
		s.cancel()
		return
	}
	r := st.reign
	r.lost = time.Now()
	if s.slow.Load() {
		// It was waited for long enough, and it is not asked again at once.
		r.lost = r.lost.Add(-grace)
		v.slowness = min(v.slowness+1, 5)
		r.next = time.Now().Add(time.Second << v.slowness >> 1)
	} else {
		v.slowness = 0
	}
	v.reason = "the other node is lost: " + why.Error()
	v.updateLocked(func(n *standing) { n.ship, n.inSync, n.sync = nil, false, true })
	v.mu.Unlock()
	s.cancel()
	v.log.Warn("replica: the other node is lost", "err", why)
}

// tend keeps a session with the other node, and decides what to do without.
func (v *Volume) tend(r *reign) {
	told := false
	for r.ctx.Err() == nil {
		v.goAlone(r)
		v.mu.Lock()
		next := r.next
		v.mu.Unlock()
		if v.cfg.Peer != nil && !v.parted.Load() && !time.Now().Before(next) {
			s, err := v.open(r)
			if err == nil {
				told = false
				err = v.keep(r, s)
				v.lose(s, err)
			} else if !told {
				told = true
				v.log.Info("replica: no session with the other node", "err", err)
			}
		}
		nap(r.ctx, 50*time.Millisecond)
	}
}

// goAlone records at the arbiter that the other node is out, when it is time
// and the policy allows it, and lets calls go on without it.
func (v *Volume) goAlone(r *reign) {
	v.mu.Lock()
	st := v.now.Load()
	lost, rec := r.lost, v.known.rec
	v.mu.Unlock()
	if st.reign != r || st.ship != nil || st.alone {
		return
	}
	peer := v.cfg.Peer != nil
	parted := v.parted.Load()
	degrade := !peer || parted || v.cfg.OnPeerLoss == Degrade
	patience := grace
	if !degrade {
		if st.settled {
			return // writes wait, reads go on
		}
		patience = recovery
	}
	sole := rec.Alone(v.cfg.Node) && !v.cfg.Fence.Doubt()
	if !peer || sole || parted {
		patience = 0
	}
	if time.Since(lost) < patience {
		return
	}
	if !sole && !v.setMembers(r, v.cfg.Node) {
		return
	}
	// What was acknowledged until now is in two memories; from now on it is in one.
	if peer {
		if err := v.cfg.Local.Flush(r.ctx, block.Demand); err != nil {
			v.setReason("the journal cannot be flushed: %v", err)
			return
		}
	}
	v.mu.Lock()
	if now := v.now.Load(); now.reign == r && now.ship == nil {
		if peer {
			v.reason = strings.TrimSuffix("the other node is out: "+v.reason, ": ")
		}
		v.updateLocked(func(s *standing) {
			s.alone, s.sync, s.sole, s.settled, s.open = degrade, peer && !parted, true, true, r.free && !s.leaving
		})
	}
	v.mu.Unlock()
	if peer && degrade {
		v.log.Warn("replica: degraded: writes are synced here and not replicated until the other node is back")
	}
}

// setMembers makes one try. It answers whether the arbiter has it; when it
// does not, the client of the arbiter is in doubt, or has been refused.
func (v *Volume) setMembers(r *reign, members ...string) bool {
	c, cancel := context.WithTimeout(r.ctx, callTime)
	rec, err := v.cfg.Fence.SetMembers(c, r.epoch, members...)
	cancel()
	v.learn(event{kind: learned, rec: rec})
	if err == nil {
		return r.ctx.Err() == nil
	}
	v.setReason("the arbiter must record who is in sync: %v", err)
	return false
}
