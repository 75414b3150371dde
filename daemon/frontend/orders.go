package frontend

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"forerun/api"
	"forerun/block"
	"forerun/data/stack"
	"forerun/data/writeback"
)

// abort is how the calling off of a volume goes.
type abort struct {
	state string
	err   error
}

// ended is the phase in which a volume of this node was ended, empty while it lives.
func (f *Frontend) ended(name string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.over[name]
}

// primaryHere refuses orders that only the primary of a pair can carry out.
func primaryHere(op string, v *stack.Volume) error {
	if s := v.Replica().Status(); s.Role != "alone" && s.Role != "primary" {
		return block.E(op, v.Name(), block.KindFenced, fmt.Errorf("this node is %s for the volume; ask the primary %s", s.Role, s.Primary))
	}
	return nil
}

// Checkpoint is serve.PairController.
func (f *Frontend) Checkpoint(ctx context.Context, name string) error {
	v, err := f.opened(name)
	if err != nil {
		return err
	}
	s, err := f.writesBack("checkpoint", v)
	if err != nil {
		return err
	}
	_, err = s.Checkpoint(ctx)
	return err
}

// writesBack finds who ships the changes of a volume.
func (f *Frontend) writesBack(op string, v *stack.Volume) (*writeback.Shipper, error) {
	s := f.shipper(v.Name())
	switch {
	case v.Switched():
		return nil, block.E(op, v.Name(), block.KindExists, errors.New("the volume was cut over; its source is not primary any more"))
	case s == nil && f.cfg.Isolated:
		return nil, block.E(op, v.Name(), block.KindUnsupported, errors.New("this is a test clone: nothing goes back to the source; forerun discard removes it"))
	case s == nil:
		return nil, block.E(op, v.Name(), block.KindUnavailable, errors.New("the write-back has not begun; the volume is being opened"))
	case v.Isolated():
		return nil, block.E(op, v.Name(), block.KindUnsupported, errors.New("the policy is isolated: nothing goes back to the source; forerun policy --set write-back changes that"))
	}
	return s, primaryHere(op, v)
}

// SetPolicy is serve.PairController. The volumes of a consistency group share it.
func (f *Frontend) SetPolicy(_ context.Context, name string, req api.PolicyRequest) error {
	v, err := f.opened(name)
	if err != nil {
		return err
	}
	if f.cfg.Isolated && req.Policy != api.PolicyIsolated {
		return block.E("policy", name, block.KindUnsupported, errors.New("this is a test clone; its changes never go back to the source"))
	}
	if req.Policy == api.PolicyWriteBack && v.Meta().ReadOnly {
		return block.E("policy", name, block.KindReadOnly, errors.New("the source cannot be written, so nothing can be written back to it"))
	}
	for _, o := range f.groupOf(v) {
		if err := o.SavePolicy(req.Policy == api.PolicyIsolated); err != nil {
			return err
		}
		f.log.Info("policy", "volume", o.Name(), "policy", req.Policy)
	}
	return nil
}

// groupOf returns the open volumes of v's consistency group.
func (f *Frontend) groupOf(v *stack.Volume) []*stack.Volume {
	for _, g := range f.cfg.groups() {
		in := false
		var all []*stack.Volume
		for _, n := range g.volumes {
			in = in || n == v.Name()
			if o := f.volume(n); o != nil {
				all = append(all, o)
			}
		}
		if in {
			return all
		}
	}
	return []*stack.Volume{v}
}

// Failover is serve.PairController: at the primary a planned hand-over of the
// whole consistency group; with force, at a secondary whose primary is lost for
// good, a takeover.
func (f *Frontend) Failover(ctx context.Context, name string, req api.FailoverRequest) error {
	v, err := f.opened(name)
	if err != nil {
		return err
	}
	if f.pair.peer == nil {
		return block.E("failover", name, block.KindUnsupported, errors.New("this frontend has no peer; start both with --peer"))
	}
	for _, o := range f.groupOf(v) {
		if req.Force {
			err = o.Replica().TakeOver(ctx, true)
		} else if o.Replica().Status().Role != "primary" && o != v {
			continue // it is where the group goes
		} else {
			err = o.Replica().Handover(ctx)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Abort is serve.PairController: clients are refused, the last changes go to
// the source, the backend unlocks it, and what was kept here is removed. Asked
// again it goes on where it stopped.
func (f *Frontend) Abort(ctx context.Context, name string, req api.AbortRequest) error {
	if f.ended(name) == api.PhaseAborted {
		return nil
	}
	v, err := f.opened(name)
	if err != nil {
		return err
	}
	switch {
	case f.cfg.Isolated:
		return block.E("abort", name, block.KindUnsupported, errors.New("this is a test clone: there is nothing to call off; forerun discard removes it"))
	case v.Switched():
		return block.E("abort", name, block.KindExists, errors.New("the volume was cut over; its old source is not up to date any more"))
	case req.Force:
		return block.E("abort", name, block.KindInvalid, errors.New("force is for a backend whose frontends are lost; this one still has the changes: abort without it"))
	}
	if err := primaryHere("abort", v); err != nil {
		return err
	}
	f.mu.Lock()
	if a := f.aborts[name]; a != nil && a.state != api.AbortFailed {
		f.mu.Unlock()
		return nil
	}
	f.aborts[name] = &abort{state: api.AbortDraining}
	f.mu.Unlock()
	f.work.Go(func() {
		if err := f.callOff(f.base, v); err != nil {
			f.log.Error("the abort has stopped", "volume", name, "err", err)
			f.setAbort(name, api.AbortFailed, err)
		}
	})
	return nil
}

func (f *Frontend) setAbort(name, state string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.aborts[name] = &abort{state, err}
}

func (f *Frontend) callOff(ctx context.Context, v *stack.Volume) error {
	name := v.Name()
	v.Shut()
	if err := v.CancelCutover(ctx); err != nil {
		return err
	}
	// Whatever the policy was: the old home gets everything.
	if err := v.SavePolicy(false); err != nil {
		return err
	}
	s := f.shipper(name)
	if s == nil {
		return block.E("abort", name, block.KindUnavailable, errors.New("the write-back has not begun; try again when the volume is open"))
	}
	if err := s.Release(ctx, name); err != nil {
		return err
	}
	f.setAbort(name, api.AbortReleasing, nil)
	// The other node, which may not hear of the end for long, must not take
	// over what has none. Before the source had everything it had to be able to.
	c, cancel := context.WithTimeout(ctx, partTime)
	defer cancel()
	if err := v.Replica().Part(c); err != nil {
		return err
	}
	if err := f.finish(ctx, v, api.PhaseAborted); err != nil {
		return err
	}
	f.setAbort(name, api.AbortDone, nil)
	f.log.Info("the move was called off; the source has everything and is unlocked", "volume", name)
	return nil
}

// partTime is how long an abort waits for the arbiter, until it says that it
// has stopped there.
const partTime = 30 * time.Second

// withdraw takes a volume out of service: nobody finds it any more.
func (f *Frontend) withdraw(v *stack.Volume) {
	f.mu.Lock()
	delete(f.volumes, v.Name())
	f.mu.Unlock()
	f.pair.mux.Remove(v.Replica())
}

// bury closes a volume that was withdrawn for good, and removes what it held.
func (f *Frontend) bury(v *stack.Volume, phase string) error {
	name := v.Name()
	if err := v.Close(); err != nil {
		f.log.Warn("a volume that is over did not close cleanly", "volume", name, "err", err)
	}
	if err := stack.End(f.fs, f.volumeDir(name), f.scratchDir(name), phase); err != nil {
		return err
	}
	f.mu.Lock()
	f.over[name] = phase
	f.mu.Unlock()
	f.leave(f.link(name))
	return nil
}

// finish ends a volume here and at the peer.
func (f *Frontend) finish(ctx context.Context, v *stack.Volume, phase string) error {
	name := v.Name()
	f.withdraw(v)
	if err := f.bury(v, phase); err != nil || f.pair.peer == nil {
		return err
	}
	q, err := json.Marshal(about{Volume: name, Ended: phase})
	if err != nil {
		return err
	}
	c, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if _, err := f.pair.peer.Call(c, typEnded, q); err != nil {
		f.log.Warn("the peer does not know yet that the volume is over; it asks for itself", "volume", name, "err", err)
	}
	return nil
}

// endedAtPeer removes a volume that the primary has ended.
func (f *Frontend) endedAtPeer(a about) error {
	if a.Ended != api.PhaseAborted && a.Ended != api.PhaseDiscarded {
		return block.E("peer.ended", a.Volume, block.KindInvalid, fmt.Errorf("%q is no end of a volume", a.Ended))
	}
	v := f.volume(a.Volume)
	if v == nil {
		return nil
	}
	if !v.Standby() {
		return block.E("peer.ended", a.Volume, block.KindDenied, errors.New("this node is primary for the volume"))
	}
	f.log.Info("the peer has ended the volume", "volume", a.Volume, "phase", a.Ended)
	v.Shut()
	f.withdraw(v)
	f.work.Go(func() {
		if err := f.bury(v, a.Ended); err != nil {
			f.log.Error("what a volume held cannot be removed", "volume", a.Volume, "err", err)
		}
	})
	return nil
}

// Discard is serve.PairController.
func (f *Frontend) Discard(ctx context.Context, name string, req api.DiscardRequest) error {
	if f.ended(name) != "" {
		return nil
	}
	v, err := f.opened(name)
	if err != nil {
		return err
	}
	if !f.cfg.Isolated {
		return block.E("discard", name, block.KindUnsupported, errors.New("this is no test clone; forerun abort gives its changes back to the source"))
	}
	if n := f.nbd.Stats().Connections; n > 0 && !req.Force {
		return block.E("discard", name, block.KindBusy, fmt.Errorf("%d clients are connected; stop the workload first, or discard with --force", n))
	}
	v.Shut()
	// The backend first: it keeps old content for as long as there is a clone.
	if err := writeback.DiscardClone(ctx, f.link(name).back, name, f.cfg.Name); err != nil {
		return err
	}
	return f.finish(ctx, v, api.PhaseDiscarded)
}

// scratchDir is where a volume's scratch file goes.
func (f *Frontend) scratchDir(name string) string {
	return filepath.Join(f.cfg.StateDir, "scratch", pathName(name))
}

// pairStatus adds what the daemon knows of pair, write-back and abort.
func (f *Frontend) pairStatus(name string, v *stack.Volume, s *api.Volume) {
	f.mu.Lock()
	a, phase := f.aborts[name], f.over[name]
	f.mu.Unlock()
	if phase != "" {
		s.Phase = phase
	}
	w := &api.Writeback{Policy: api.PolicyWriteBack}
	if f.cfg.Isolated || v != nil && v.Isolated() {
		w.Policy = api.PolicyIsolated
	}
	// At a secondary it is the primary's to say.
	if sh := f.shipper(name); sh != nil && v != nil && phase == "" && s.Primary == api.PrimarySource && !v.Standby() {
		st := sh.Status()
		u := st.Volumes[name]
		w.UnwrittenBytes, w.LastID, w.State, w.Reason = u.Bytes, st.LastID, st.State, st.Reason
		if !u.Oldest.IsZero() {
			w.OldestS = time.Since(u.Oldest).Seconds()
		}
		if o := st.Oldest(); !o.IsZero() {
			w.RPOS = time.Since(o).Seconds()
		}
		if !st.LastCut.IsZero() {
			w.LastCheckpoint = st.LastCut.UTC().Format(time.RFC3339Nano)
		}
	}
	if s.Replica != nil {
		s.Replica.Arbiter = cmp.Or(f.cfg.Arbiter, s.Backend)
	}
	s.Writeback = w
	if phase == api.PhaseAborted && a == nil {
		a = &abort{state: api.AbortDone}
	}
	if a != nil {
		s.Abort = &api.Abort{State: a.state, LastCheckpoint: w.LastCheckpoint, LastID: w.LastID, RemainingBytes: w.UnwrittenBytes}
		if a.err != nil {
			s.Abort.Error = a.err.Error()
		}
	}
}
