package frontend

import (
	"context"
	"slices"
	"time"
)

// gatherEvery is how often a node looks whether its groups are in one place.
const gatherEvery = 500 * time.Millisecond

// gather keeps the volumes of each consistency group at one node, for only the
// primary of all of them can cut through them at one moment. They follow the
// primary of the first one by name: at a start each node becomes primary of
// what it opened first, and a fail-back moves one volume at a time.
func (f *Frontend) gather(ctx context.Context) error {
	tick := time.NewTicker(gatherEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		for _, g := range f.cfg.groups() {
			f.gatherGroup(ctx, slices.Sorted(slices.Values(g.volumes)))
		}
	}
}

func (f *Frontend) gatherGroup(ctx context.Context, names []string) {
	lead := f.volume(names[0])
	if lead == nil {
		return
	}
	first := lead.Replica().Status()
	if first.Role != "secondary" || !first.InSync {
		return // the others come here, or it is not settled who is primary
	}
	for _, n := range names[1:] {
		v := f.volume(n)
		if v == nil || v.Switched() {
			continue
		}
		if s := v.Replica().Status(); s.Role != "primary" || !s.InSync || s.Peer != first.Primary {
			continue
		}
		f.log.Info("the volume follows the first one of its group", "volume", n, "first", names[0], "to", first.Primary)
		if err := v.Replica().Handover(ctx); err != nil && ctx.Err() == nil {
			f.log.Warn("the volume could not be handed over; trying on", "volume", n, "err", err)
		}
	}
}
