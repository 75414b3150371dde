package converge

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
)

// shut is set in Switch.state while the gate is closed; the lower bits count
// the calls under way.
const shut = int64(1) << 62

// Switch is the topmost storey: it passes calls to the source stack, and to
// the target once Pause was told so. It is a block.Device. A call that meets
// the closed gate waits; it never fails because of a cut-over.
type Switch struct {
	info  block.Info
	state atomic.Int64
	dev   atomic.Pointer[block.Device]

	closing chan struct{} // closed when Close begins
	once    sync.Once
	turn    sync.Mutex // one Pause or Close at a time; before mu

	mu      sync.Mutex
	gate    chan struct{} // closed when the gate opens; nil while it is open
	closed  bool
	drained chan struct{} // capacity 1: the last call left a closed gate
}

var _ block.Device = (*Switch)(nil)

// NewSwitch makes a switch that passes to dev. Its Info is that of dev for
// ever.
func NewSwitch(dev block.Device) *Switch {
	s := &Switch{info: dev.Info(), drained: make(chan struct{}, 1), closing: make(chan struct{})}
	s.dev.Store(&dev)
	return s
}

// ErrStayShut tells Pause not to open the gate again.
var ErrStayShut = errors.New("the gate stays closed")

// Pause closes the gate, waits until the calls under way have returned, calls
// fn, and opens the gate: on the device fn returned, or, when that is nil or
// fn failed, on the same side as before. It returns how long the gate was
// closed. When ctx ends before all calls have returned, fn is not called.
//
// If fn's error wraps ErrStayShut the gate stays closed: calls wait until
// their own ctx ends or the Switch is closed.
func (s *Switch) Pause(ctx context.Context, fn func(context.Context) (block.Device, error)) (time.Duration, error) {
	s.turn.Lock()
	defer s.turn.Unlock()
	s.mu.Lock()
	if s.closed || s.gate != nil {
		s.mu.Unlock()
		return 0, block.E("switch.pause", "", block.KindClosed, nil)
	}
	begin := time.Now()
	if err := s.drain(ctx); err != nil {
		s.open()
		return time.Since(begin), err
	}
	to, err := fn(ctx)
	if errors.Is(err, ErrStayShut) {
		return time.Since(begin), err
	}
	if err == nil && to != nil {
		s.dev.Store(&to)
	}
	s.open()
	return time.Since(begin), err
}

// drain closes the gate and waits until nobody is inside. mu is held, and
// released.
func (s *Switch) drain(ctx context.Context) error {
	select {
	case <-s.drained: // left over from a pause that was given up
	default:
	}
	s.gate = make(chan struct{})
	inside := s.state.Add(shut) - shut
	s.mu.Unlock()
	for inside > 0 {
		select {
		case <-s.drained:
			inside = s.state.Load() - shut
		case <-ctx.Done():
			inside = s.state.Load() - shut
			if inside > 0 {
				return block.E("switch.pause", "", 0, fmt.Errorf("%d calls have not returned: %w", inside, context.Cause(ctx)))
			}
		}
	}
	return nil
}

func (s *Switch) open() {
	s.mu.Lock()
	s.state.Add(-shut)
	close(s.gate)
	s.gate = nil
	s.mu.Unlock()
}

// enter counts a call in and answers whom to ask; every nil error is followed
// by leave.
func (s *Switch) enter(ctx context.Context, op string) (block.Device, error) {
	for {
		if s.state.Add(1) < shut {
			return *s.dev.Load(), nil
		}
		s.leave()
		s.mu.Lock()
		gate, closed := s.gate, s.closed
		s.mu.Unlock()
		if closed {
			return nil, block.E("switch."+op, "", block.KindClosed, nil)
		}
		if gate == nil {
			continue
		}
		select {
		case <-gate:
		case <-ctx.Done():
			return nil, block.E("switch."+op, "", 0, ctx.Err())
		}
	}
}

func (s *Switch) leave() {
	if s.state.Add(-1) == shut {
		select {
		case s.drained <- struct{}{}:
		default:
		}
	}
}

// within keeps calls inside the volume: the target may be larger.
func (s *Switch) within(op string, off, n int64) error {
	if off < 0 || n < 0 || off > s.info.Size-n {
		return block.E("switch."+op, "", block.KindRange, fmt.Errorf("%d bytes at %d end beyond the device's %d bytes", n, off, s.info.Size))
	}
	return nil
}

// Info is that of the source, before and after the switch.
func (s *Switch) Info() block.Info { return s.info }

// ReadAt passes on.
func (s *Switch) ReadAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	if err := s.within("read", off, int64(len(p))); err != nil {
		return err
	}
	d, err := s.enter(ctx, "read")
	if err != nil {
		return err
	}
	defer s.leave()
	return d.ReadAt(ctx, p, off, f)
}

// WriteAt passes on.
func (s *Switch) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	if err := s.within("write", off, int64(len(p))); err != nil {
		return err
	}
	d, err := s.enter(ctx, "write")
	if err != nil {
		return err
	}
	defer s.leave()
	return d.WriteAt(ctx, p, off, f)
}

// Zero passes on.
func (s *Switch) Zero(ctx context.Context, off, n int64, f block.Flags) error {
	if err := s.within("zero", off, n); err != nil {
		return err
	}
	d, err := s.enter(ctx, "zero")
	if err != nil {
		return err
	}
	defer s.leave()
	return d.Zero(ctx, off, n, f)
}

// Trim passes on.
func (s *Switch) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	if err := s.within("trim", off, n); err != nil {
		return err
	}
	d, err := s.enter(ctx, "trim")
	if err != nil {
		return err
	}
	defer s.leave()
	return d.Trim(ctx, off, n, f)
}

// Flush passes on.
func (s *Switch) Flush(ctx context.Context, f block.Flags) error {
	d, err := s.enter(ctx, "flush")
	if err != nil {
		return err
	}
	defer s.leave()
	return d.Flush(ctx, f)
}

// Extents passes on.
func (s *Switch) Extents(ctx context.Context, dst []block.Extent, off, n int64, f block.Flags) ([]block.Extent, error) {
	if err := s.within("extents", off, n); err != nil {
		return dst, err
	}
	d, err := s.enter(ctx, "extents")
	if err != nil {
		return dst, err
	}
	defer s.leave()
	return d.Extents(ctx, dst, off, n, f)
}

// Prefetch passes on.
func (s *Switch) Prefetch(ctx context.Context, off, n int64, f block.Flags) error {
	if err := s.within("prefetch", off, n); err != nil {
		return err
	}
	d, err := s.enter(ctx, "prefetch")
	if err != nil {
		return err
	}
	defer s.leave()
	return d.Prefetch(ctx, off, n, f)
}

// Close waits for a Pause and for calls under way, then closes the device
// calls go to. Calls that wait at the gate end with KindClosed. The other side
// is closed by whoever opened it.
func (s *Switch) Close() error {
	s.once.Do(func() { close(s.closing) })
	s.turn.Lock()
	defer s.turn.Unlock()
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	if s.gate != nil { // it stayed shut, and is drained
		close(s.gate)
		s.mu.Unlock()
	} else {
		s.drain(context.Background())
	}
	return (*s.dev.Load()).Close()
}
