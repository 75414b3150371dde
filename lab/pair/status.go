package pair

import (
	"context"
	"errors"
	"fmt"
	"time"

	"forerun/api"
	"forerun/api/client"
)

// Status is what a daemon says about a volume. What a daemon leaves out is
// there as zero values.
func (n *Node) Status(ctx context.Context, volume string) (api.Volume, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	v, err := client.New(n.State).Volume(ctx, volume)
	if err != nil {
		return v, fmt.Errorf("status of %s: %w", n.Name, err)
	}
	if v.Replica == nil {
		v.Replica = &api.Replica{}
	}
	if v.Writeback == nil {
		v.Writeback = &api.Writeback{}
	}
	if v.Abort == nil {
		v.Abort = &api.Abort{}
	}
	return v, nil
}

func (n *Node) answers(ctx context.Context) bool {
	_, err := client.New(n.State).Node(ctx)
	return err == nil
}

// Primary is the frontend that is primary of a volume, and the other one. It
// fails when none, or both, say so.
func (p *Pair) Primary(ctx context.Context, volume string) (primary, other *Node, err error) {
	if p.Single {
		return p.A, nil, nil
	}
	var found []*Node
	for i, n := range p.Frontends() {
		if !n.Alive() {
			continue
		}
		if s, err := n.Status(ctx, volume); err == nil && s.Replica.Role == api.ReplicaPrimary {
			found = append(found, n)
			other = p.Frontends()[1-i]
		}
	}
	if len(found) != 1 {
		return nil, nil, fmt.Errorf("volume %s has %d primaries", volume, len(found))
	}
	return found[0], other, nil
}

// WaitInSync waits until each volume has a primary and a secondary in sync,
// and returns how long that took.
func (p *Pair) WaitInSync(ctx context.Context, limit time.Duration) (time.Duration, error) {
	start := time.Now()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		why := p.outOfSync(ctx)
		if why == nil {
			return time.Since(start), nil
		}
		for _, n := range p.Frontends() {
			if !n.Alive() {
				return 0, n.Trouble("is not there to be in sync")
			}
		}
		if time.Since(start) > limit {
			return 0, errors.Join(fmt.Errorf("not in sync after %v: %w", limit, why), p.A.Trouble("was one side"), p.B.Trouble("was the other"))
		}
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-tick.C:
		}
	}
}

func (p *Pair) outOfSync(ctx context.Context) error {
	if p.Single {
		return nil
	}
	for _, v := range p.Volumes {
		first, second, err := p.Primary(ctx, v.Name)
		if err != nil {
			return err
		}
		for _, n := range []*Node{first, second} {
			s, err := n.Status(ctx, v.Name)
			if err != nil {
				return err
			}
			if !s.Replica.InSync {
				return fmt.Errorf("volume %s at %s: %+v", v.Name, n.Name, *s.Replica)
			}
		}
	}
	return nil
}

// waitFilled waits until the frontends hold all of all volumes.
func (p *Pair) waitFilled(ctx context.Context) error {
	for end := time.Now().Add(5 * time.Minute); ; {
		absent := int64(0)
		for _, v := range p.Volumes {
			n, _, err := p.Primary(ctx, v.Name)
			if err != nil {
				return err
			}
			s, err := n.Status(ctx, v.Name)
			if err != nil {
				return err
			}
			absent += s.Chunks.Absent
		}
		if absent == 0 {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%d chunks are still not here", absent)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}
