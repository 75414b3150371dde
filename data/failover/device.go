package failover

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
)

// Door is a target that is open. Of its Device, Close is quick after Abort.
type Door interface {
	block.Device
	// Ping returns nil as soon as the target has given a sign of life, which one
	// that lives does at once, however long its calls take.
	Ping(ctx context.Context) error
	// Abort makes calls under way, and later ones, fail at once, and does not
	// touch their buffers any more. It does not wait for the other side.
	Abort()
}

// Target is a way to the volume.
type Target struct {
	// Name is how people know it: an address. It stands in logs and status.
	Name string
	// Open connects to it. ctx bounds the connecting only.
	Open func(ctx context.Context) (Door, error)
}

// Options of Open. Times of 0 mean their default.
type Options struct {
	// Volume names the disk, for errors and logs.
	Volume string
	// Targets are tried in turn, at least 1 and at most 64.
	Targets []Target
	// ID replaces that of the first target in Info.ID.
	ID string
	// Depth bounds the calls under way, 0 for 112.
	Depth int
	// ConnectTimeout bounds the opening of one target: 1 s.
	ConnectTimeout time.Duration
	// Stagger is how long one target may take to open before the next one is
	// opened as well: 250 ms.
	Stagger time.Duration
	// PingAfter without any answer, a target is asked for a sign of life, and
	// given up after PingTimeout without one: 500 ms, 1 s.
	PingAfter, PingTimeout time.Duration
	// Patience with a target that lives and answers nothing: 2 s at first.
	Patience time.Duration
	// Settle is how long after it was lost a target may still carry out a change
	// that was repeated elsewhere, so that its range takes no other one: 1.1 s, a
	// little more than a forwarded change can be under way (replica.Stale).
	Settle time.Duration
	// Retry is the first pause before a target is opened again that failed or
	// served for a moment only; it doubles, up to 25 times as much: 20 ms.
	Retry time.Duration
	// Log gets changes of state. Nil is silent.
	Log *slog.Logger
}

const (
	maxTargets  = 64
	depth       = 112 // below the 128 requests a Forerun export reads from one connection
	tick        = 100 * time.Millisecond
	maxPatience = time.Minute
	idlePing    = 5 * time.Second // how often a target is asked while nobody calls
	hardPause   = 5 * time.Second
	retryGrowth = 25
	// steady is how long a target must have served to be opened again at once
	// after it was lost.
	steady = time.Second
)

func (o *Options) check() error {
	if len(o.Targets) == 0 || len(o.Targets) > maxTargets {
		return block.E("failover.open", o.Volume, block.KindInvalid, fmt.Errorf("%d targets; 1 to %d are possible", len(o.Targets), maxTargets))
	}
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&o.ConnectTimeout, time.Second)
	def(&o.Stagger, 250*time.Millisecond)
	def(&o.PingAfter, 500*time.Millisecond)
	def(&o.PingTimeout, time.Second)
	def(&o.Patience, 2*time.Second)
	def(&o.Settle, 1100*time.Millisecond)
	def(&o.Retry, 20*time.Millisecond)
	if o.Depth <= 0 {
		o.Depth = depth
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Device is the volume. It implements block.Device.
type Device struct {
	opt  Options
	log  *slog.Logger
	info block.Info // of the first target that could be opened

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup // Add under mu while not closed

	gate   sync.RWMutex
	slots  chan struct{}
	ranges ranges
	at     atomic.Pointer[door] // the target in use, nil while there is none; changed under mu

	waiting atomic.Int64 // calls at the target
	answers atomic.Int64 // calls it answered

	mu       sync.Mutex
	closed   bool
	changed  chan struct{} // closed when at is set
	targets  []state
	lastHard time.Time
	since    time.Time // when at became nil
	stats    counts
}

// state is what is known of a target.
type state struct {
	phase     phase
	err       error
	backoff   time.Duration
	notBefore time.Time
}

// door is one opening of a target.
type door struct {
	Door
	target int
	opened time.Time
}

var _ block.Device = (*Device)(nil)

var errClosed = errors.New("the device was closed")

// Open opens the volume through the first target that can be. It tries until
// ctx ends, unless no target but those out of reach could ever do.
func Open(ctx context.Context, o Options) (*Device, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	d := &Device{opt: o, log: o.Log.With("volume", o.Volume), slots: make(chan struct{}, o.Depth), changed: make(chan struct{}),
		targets: make([]state, len(o.Targets)), since: time.Now()}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	stop := context.AfterFunc(ctx, d.cancel)
	first, err := d.first()
	if !stop() {
		err = errors.Join(err, ctx.Err())
	}
	if err != nil {
		d.cancel()
		if first != nil {
			d.discard(first)
		}
		d.wg.Wait()
		return nil, err
	}
	d.info = first.Info()
	if o.ID != "" {
		d.info.ID = o.ID
	}
	d.install(first)
	d.wg.Go(d.watch)
	return d, nil
}

// first opens any target.
func (d *Device) first() (*door, error) {
	for wait := d.opt.Retry; ; wait = d.slower(wait) {
		if dr := d.race(0, -1); dr != nil {
			return dr, nil
		}
		if err := d.hopeless(); err != nil {
			return nil, err
		}
		if !d.sleep(wait) {
			return nil, block.E("failover.open", d.opt.Volume, block.KindUnavailable, d.why())
		}
	}
}

// hopeless is why trying on would not help: a target could be reached and has
// no such volume, or all refuse.
func (d *Device) hopeless() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	refused := 0
	for i := range d.targets {
		err := d.targets[i].err
		switch block.KindOf(err) {
		case block.KindNotFound:
			return err
		case block.KindDenied, block.KindInvalid, block.KindUnsupported:
			refused++
		}
	}
	if refused == len(d.targets) {
		return d.targets[0].err
	}
	return nil
}

// why says what is wrong with each target.
func (d *Device) why() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var all []error
	for i := range d.targets {
		if err := d.targets[i].err; err != nil {
			all = append(all, err)
		}
	}
	return errors.Join(all...)
}

// slower is the pause between tries after one of t.
func (d *Device) slower(t time.Duration) time.Duration {
	return min(max(2*t, d.opt.Retry), retryGrowth*d.opt.Retry)
}

// sleep waits, and says whether the device is still open.
func (d *Device) sleep(t time.Duration) bool {
	timer := time.NewTimer(t)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-d.ctx.Done():
		return false
	}
}

// Info describes the volume as the first target did.
func (d *Device) Info() block.Info { return d.info }

type op uint8

const (
	opRead op = iota
	opWrite
	opZero
	opTrim
	opFlush
	opExtents
	opPrefetch
)

func (o op) String() string {
	return [...]string{"failover.read", "failover.write", "failover.zero", "failover.trim", "failover.flush", "failover.extents", "failover.prefetch"}[o]
}

// call is one call on its way through the targets.
type call struct {
	op     op
	off, n int64
	f      block.Flags
	p      []byte
	ext    []block.Extent

	repeats int
	left    time.Time // when the last target was lost
	tried   uint64    // targets that answered with an error about bytes
	err     error     // the last of those
}

func (c *call) changes() bool { return c.op == opWrite || c.op == opZero || c.op == opTrim }

// ordered says whether the call is about a range of bytes.
func (c *call) ordered() bool { return c.op != opFlush && c.op != opPrefetch }

// on makes the call at a target.
func (c *call) on(ctx context.Context, dev block.Device) error {
	switch c.op {
	case opRead:
		return dev.ReadAt(ctx, c.p, c.off, c.f)
	case opWrite:
		return dev.WriteAt(ctx, c.p, c.off, c.f)
	case opZero:
		return dev.Zero(ctx, c.off, c.n, c.f)
	case opTrim:
		return dev.Trim(ctx, c.off, c.n, c.f)
	case opFlush:
		return dev.Flush(ctx, c.f)
	case opExtents:
		out, err := dev.Extents(ctx, c.ext, c.off, c.n, c.f)
		if err == nil {
			c.ext = out
		}
		return err
	}
	return dev.Prefetch(ctx, c.off, c.n, c.f)
}

// run has the call answered, at as many targets as it takes.
func (d *Device) run(ctx context.Context, c *call) error {
	if c.changes() && d.info.ReadOnly {
		return block.E(c.op.String(), d.opt.Volume, block.KindReadOnly, errors.New("the volume is read-only"))
	}
	d.gate.RLock()
	defer d.gate.RUnlock()
	select {
	case d.slots <- struct{}{}:
	default:
		select {
		case d.slots <- struct{}{}:
		case <-ctx.Done():
			return block.E(c.op.String(), d.opt.Volume, block.KindCanceled, ctx.Err())
		case <-d.ctx.Done():
			return d.isClosed(c)
		}
	}
	defer func() { <-d.slots }()
	if !c.ordered() {
		return d.pass(ctx, c)
	}
	h, err := d.ranges.take(ctx, d.ctx, c.off, c.n, c.changes())
	if err == errClosed {
		return d.isClosed(c)
	}
	if err != nil {
		return block.E(c.op.String(), d.opt.Volume, block.KindCanceled, err)
	}
	err = d.pass(ctx, c)
	if c.repeats > 0 && c.changes() {
		d.ranges.settle(h, d.opt.Settle-time.Since(c.left))
	} else {
		d.ranges.drop(h)
	}
	return err
}

func (d *Device) isClosed(c *call) error {
	return block.E(c.op.String(), d.opt.Volume, block.KindClosed, errClosed)
}

// pass makes the call at one target after the other.
func (d *Device) pass(ctx context.Context, c *call) error {
	for {
		dr, err := d.door(ctx, c)
		if err != nil {
			return err
		}
		if c.err != nil && c.tried&(1<<dr.target) != 0 {
			return c.err
		}
		d.waiting.Add(1)
		err = c.on(ctx, dr)
		d.waiting.Add(-1)
		if err == nil {
			d.answers.Add(1)
			return nil
		}
		if ctx.Err() != nil {
			return block.E(c.op.String(), d.opt.Volume, block.KindCanceled, err)
		}
		switch d.judge(c, err) {
		case isAnswer:
			d.answers.Add(1)
			return err
		case isHard:
			c.tried |= 1 << dr.target
			c.err = err
			if !d.shift(dr, err) {
				return err
			}
		case isLost:
			d.lose(dr, err, 0)
		}
		c.repeats++
		c.left = time.Now()
		d.stats.repeated.Add(1)
	}
}

// verdict is what an error of a target means.
type verdict uint8

const (
	isAnswer verdict = iota // the volume's answer
	isHard                  // about bytes; another target may do better
	isLost                  // about the target
)

func (d *Device) judge(c *call, err error) verdict {
	switch block.KindOf(err) {
	case block.KindUnavailable, block.KindFenced, block.KindClosed, block.KindBusy, block.KindCanceled, block.KindDenied, block.KindNotFound:
		return isLost
	case block.KindReadOnly:
		// The volume can be written, so this is about the target.
		if c.changes() {
			return isLost
		}
	case block.KindIO, block.KindCorrupt:
		return isHard
	}
	return isAnswer
}

// door waits for a target.
func (d *Device) door(ctx context.Context, c *call) (*door, error) {
	for {
		if dr := d.at.Load(); dr != nil && c.repeats == 0 {
			return dr, nil // a closed one says so
		}
		d.mu.Lock()
		dr, changed := d.at.Load(), d.changed
		d.mu.Unlock()
		if dr != nil && d.ctx.Err() == nil {
			return dr, nil
		}
		select {
		case <-changed:
		case <-d.ctx.Done():
			return nil, d.isClosed(c)
		case <-ctx.Done():
			err := ctx.Err()
			if why := d.why(); why != nil {
				err = fmt.Errorf("%w while no target works: %w", err, why)
			}
			return nil, block.E(c.op.String(), d.opt.Volume, block.KindCanceled, err)
		}
	}
}

// ReadAt fills p with the bytes at off.
func (d *Device) ReadAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	c := call{op: opRead, p: p, off: off, n: int64(len(p)), f: f}
	return d.run(ctx, &c)
}

// WriteAt stores p at off. With FUA it is durable on return.
func (d *Device) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	c := call{op: opWrite, p: p, off: off, n: int64(len(p)), f: f}
	return d.run(ctx, &c)
}

// Zero makes n bytes at off read as zeros.
func (d *Device) Zero(ctx context.Context, off, n int64, f block.Flags) error {
	c := call{op: opZero, off: off, n: n, f: f}
	return d.run(ctx, &c)
}

// Trim says that n bytes at off are not needed.
func (d *Device) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	c := call{op: opTrim, off: off, n: n, f: f}
	return d.run(ctx, &c)
}

// Flush makes every write acknowledged before the call durable, through
// whichever target it was acknowledged.
func (d *Device) Flush(ctx context.Context, f block.Flags) error {
	c := call{op: opFlush, f: f}
	return d.run(ctx, &c)
}

// Extents asks the target.
func (d *Device) Extents(ctx context.Context, dst []block.Extent, off, n int64, f block.Flags) ([]block.Extent, error) {
	c := call{op: opExtents, ext: dst, off: off, n: n, f: f}
	if err := d.run(ctx, &c); err != nil {
		return dst, err
	}
	if !d.info.CanExtents { // though this target could tell, the first one could not
		return append(dst, block.Extent{Off: off, Len: n, Kind: block.Data}), nil
	}
	return c.ext, nil
}

// Prefetch asks the target to bring the range near.
func (d *Device) Prefetch(ctx context.Context, off, n int64, f block.Flags) error {
	c := call{op: opPrefetch, off: off, n: n, f: f}
	return d.run(ctx, &c)
}

// Close waits for the calls at the target as long as the target's own Close
// does; calls that wait for a target end with KindClosed.
func (d *Device) Close() error {
	d.mu.Lock()
	first := !d.closed
	d.closed = true
	dr := d.at.Load()
	d.mu.Unlock()
	d.cancel()
	var err error
	if first && dr != nil {
		err = dr.Close()
	}
	d.gate.Lock() // the calls have ended
	defer d.gate.Unlock()
	d.wg.Wait()
	return err
}
