package fill

import (
	"cmp"
	"context"
	"log/slog"
	"sync"
	"time"

	"forerun/block"
)

// Volume is what the pump fills.
type Volume interface {
	// Survey asks the source what is hole from chunk on and marks it; next is
	// the first chunk it did not look at.
	Survey(ctx context.Context, chunk int64) (next int64, err error)
	// Absent appends up to most chunks, at or after from and ascending, whose
	// data is not here.
	Absent(dst []int64, from int64, most int) []int64
	// Fetch brings the chunks and returns when they are here, or failed.
	Fetch(ctx context.Context, idx []int64, f block.Flags) error
}

// Limiter holds the background back; the scheduler is one.
type Limiter interface {
	Pause()
	Resume()
	SetBackgroundRate(bytesPerSecond int64)
}

// Options of a Pump; zero values take the defaults.
type Options struct {
	Chunks     int64 // of the volume; required
	ChunkBytes int64 // plain; required
	// BatchChunks is how many chunks one call asks for (64).
	BatchChunks int
	// Outstanding is how many calls are under way at once (32): with the
	// defaults 128 MiB plain, beyond any window.
	Outstanding int
	Paused      bool  // begin paused
	Limit       int64 // bytes a second on the link, 0 for none
	// Hold, if set, says why nothing more should be brought for now, or nothing.
	Hold func() string
	Log  *slog.Logger
}

// State of a pump.
type State string

// The states.
const (
	Running State = "running"
	Paused  State = "paused"
	Waiting State = "waiting" // for Reason to pass
	Filled  State = "filled"  // nothing is absent
	Stopped State = "stopped" // Run has returned, or was not called
)

// recheck is how often a filled volume is looked at again.
const recheck = 2 * time.Second

// Backoff of a pump that met an obstacle.
const (
	backoffMin = 200 * time.Millisecond
	backoffMax = 5 * time.Second
)

// Pump fills one volume.
type Pump struct {
	v    Volume
	lim  Limiter
	opts Options

	order    *Order
	surveyed int64 // chunks before it have been surveyed; only Run uses it

	mu      sync.Mutex
	state   State
	reason  string
	paused  bool
	limit   int64
	resumed chan struct{} // closed when paused ends
	brought int64         // chunks, since start
	cursor  int64         // copy of the order's, for Stats
	rate    rate
}

// New returns a pump, which does nothing until Run.
func New(v Volume, lim Limiter, o Options) *Pump {
	if o.BatchChunks <= 0 {
		o.BatchChunks = 64
	}
	if o.Outstanding <= 0 {
		o.Outstanding = 32
	}
	p := &Pump{v: v, lim: lim, opts: o, order: NewOrder(o.Chunks), state: Stopped, resumed: make(chan struct{})}
	close(p.resumed)
	lim.SetBackgroundRate(o.Limit)
	p.limit = o.Limit
	if o.Paused {
		p.Pause()
	}
	return p
}

// Run fills until ctx ends; it returns when its calls have.
func (p *Pump) Run(ctx context.Context) {
	defer p.set(Stopped, "")
	backoff := backoffMin
	for ctx.Err() == nil {
		if !p.awaitResume(ctx) {
			return
		}
		if why := p.hold(); why != "" {
			if p.set(Waiting, why) {
				p.opts.Log.Info("the fill is held back", "why", why)
			}
			sleep(ctx, recheck)
			continue
		}
		p.set(Running, "")
		swept, err := p.sweep(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			p.set(Waiting, err.Error())
			p.opts.Log.Warn("the fill waits", "err", err, "again_in", backoff)
			sleep(ctx, backoff)
			backoff = min(2*backoff, backoffMax)
		case swept && len(p.v.Absent(nil, 0, 1)) == 0:
			backoff = backoffMin
			if p.set(Filled, "") {
				p.opts.Log.Info("everything is here")
			}
			sleep(ctx, recheck)
			for ctx.Err() == nil && len(p.v.Absent(nil, 0, 1)) == 0 {
				sleep(ctx, recheck)
			}
		default:
			backoff = backoffMin
		}
	}
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// sweep goes from the cursor to the end of the volume once. It ends early, not
// swept, when it is paused or meets an error.
func (p *Pump) sweep(ctx context.Context) (swept bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		calls sync.WaitGroup
		slots = make(chan struct{}, p.opts.Outstanding)
		mu    sync.Mutex
		first error
	)
	failed := func() error { mu.Lock(); defer mu.Unlock(); return first }
	defer func() {
		cancel() // after an error or a pause, what is queued need not be waited for
		calls.Wait()
	}()
	for !p.order.Wrap() {
		if err := failed(); err != nil {
			return false, err
		}
		if p.isPaused() || p.hold() != "" {
			return false, nil
		}
		if p.order.Cursor() >= p.surveyed {
			next, err := p.v.Survey(ctx, p.order.Cursor())
			if err != nil {
				return false, cmp.Or(failed(), err) // a call that failed ended ctx
			}
			p.surveyed = next
		}
		batch := p.order.Next(nil, p.surveyed, p.opts.BatchChunks, p.v.Absent)
		p.mu.Lock()
		p.cursor = p.order.Cursor()
		p.mu.Unlock()
		if len(batch) == 0 {
			continue
		}
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			if err := failed(); err != nil {
				return false, err // it ended ctx
			}
			return false, context.Cause(ctx)
		}
		calls.Go(func() {
			defer func() { <-slots }()
			err := p.v.Fetch(ctx, batch, block.Background)
			if err == nil {
				p.count(len(batch))
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if first == nil && ctx.Err() == nil {
				first = err
				cancel()
			}
		})
	}
	p.surveyed = p.opts.Chunks
	done := make(chan struct{})
	go func() { calls.Wait(); close(done) }()
	for {
		select {
		case <-done:
			return true, failed()
		case <-time.After(100 * time.Millisecond):
			if p.isPaused() {
				cancel()
				<-done
				return false, failed()
			}
		}
	}
}

func (p *Pump) hold() string {
	if p.opts.Hold == nil {
		return ""
	}
	return p.opts.Hold()
}

// count notes that n more chunks are here.
func (p *Pump) count(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.brought += int64(n)
	p.rate.note(time.Now(), int64(n)*p.opts.ChunkBytes)
}

// set changes the state and says whether it was another one.
func (p *Pump) set(s State, reason string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	changed := p.state != s
	p.state, p.reason = s, reason
	return changed
}

func (p *Pump) isPaused() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.paused
}

func (p *Pump) awaitResume(ctx context.Context) bool {
	p.mu.Lock()
	ch := p.resumed
	if p.paused {
		p.state, p.reason = Paused, ""
	}
	p.mu.Unlock()
	select {
	case <-ch:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}

// Pause stops asking; what is on its way still arrives.
func (p *Pump) Pause() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.paused {
		p.paused = true
		p.resumed = make(chan struct{})
		p.lim.Pause()
	}
}

// Resume goes on where the sweep stands; nothing is asked for twice.
func (p *Pump) Resume() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.paused {
		p.paused = false
		if p.state == Paused {
			p.state = Running // before Run has seen it: who asks next is told
		}
		close(p.resumed)
		p.lim.Resume()
	}
}

// SetLimit bounds the background in bytes a second on the link, live; 0 for none.
func (p *Pump) SetLimit(bytesPerSecond int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.limit = bytesPerSecond
	p.lim.SetBackgroundRate(bytesPerSecond)
}
