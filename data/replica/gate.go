package replica

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"forerun/block"
)

// shut is set in gate.state while the gate is closed; the lower bits count
// those inside.
const shut = int64(1) << 62

// gate lets writes pass, or none: a cut needs a moment without any. Open, it
// costs a writer two atomic additions.
type gate struct {
	state   atomic.Int64
	drained chan struct{} // one place: the last one left a closed gate
	turn    chan struct{} // one place: who closes it
	mu      sync.Mutex
	opens   chan struct{} // closed when the gate opens; nil while it is open
}

func newGate() *gate {
	return &gate{drained: make(chan struct{}, 1), turn: make(chan struct{}, 1)}
}

// enter waits for an open gate; nil is followed by leave.
func (g *gate) enter(ctx context.Context, closing <-chan struct{}) error {
	for {
		if g.state.Add(1) < shut {
			return nil
		}
		g.leave()
		g.mu.Lock()
		opens := g.opens
		g.mu.Unlock()
		if opens == nil {
			continue
		}
		select {
		case <-opens:
		case <-ctx.Done():
			return ctx.Err()
		case <-closing:
			return errClosed
		}
	}
}

func (g *gate) leave() {
	if g.state.Add(-1) == shut {
		select {
		case g.drained <- struct{}{}:
		default:
		}
	}
}

// during closes the gate, waits until nobody is inside, calls fn and opens it
// again. When ctx ends before all have left, fn is not called.
func (g *gate) during(ctx context.Context, fn func() error) error {
	select {
	case g.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-g.turn }()
	select {
	case <-g.drained: // left over from one that was given up
	default:
	}
	opens := make(chan struct{})
	g.mu.Lock()
	g.opens = opens
	inside := g.state.Add(shut) - shut
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		g.state.Add(-shut)
		g.opens = nil
		g.mu.Unlock()
		close(opens)
	}()
	for inside > 0 {
		select {
		case <-g.drained:
			inside = g.state.Load() - shut
		case <-ctx.Done():
			if inside = g.state.Load() - shut; inside > 0 {
				return fmt.Errorf("%d writes have not ended: %w", inside, ctx.Err())
			}
		}
	}
	return fn()
}

var errClosed = &block.Error{Op: "replica", Kind: block.KindClosed, Err: errors.New("the volume was closed")}
