package replica

import (
	"context"
	"time"

	"forerun/block"
)

// Part leaves the other node behind: the arbiter records that this one is the
// only member, and no session is begun until Rejoin. It is for a volume that
// is about to move to storage that only this node reaches, so that the other
// must never take it over. Calls of clients go on, also those that the other
// node forwards.
func (v *Volume) Part(ctx context.Context) error {
	if v.solo || v.cfg.Peer == nil {
		return nil
	}
	v.parted.Store(true)
	for {
		st := v.now.Load()
		switch {
		case st.role != primary:
			v.parted.Store(false)
			return v.fault("part", block.KindFenced, "this node is %s for the volume; the primary is %s", st.role, st.rec.Primary)
		case st.ship == nil && st.alone && st.rec.Alone(v.cfg.Node) && !v.cfg.Fence.Doubt():
			v.update(func(s *standing) { s.sync = false })
			return nil
		case st.ship != nil:
			v.lose(st.ship, v.fault("part", block.KindClosed, "the volume leaves it behind"))
		}
		if err := ctx.Err(); err != nil {
			v.parted.Store(false)
			return v.fault("part", block.KindCanceled, "the other node could not be left behind: %w", err)
		}
		nap(ctx, 20*time.Millisecond)
	}
}

// Rejoin takes Part back: the other node may be in sync again.
func (v *Volume) Rejoin() {
	if v.parted.Swap(false) {
		v.update(func(s *standing) { s.sync = s.role == primary && s.ship == nil })
	}
}
