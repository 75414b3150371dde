package replica

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
	"forerun/data/fence"
)

// Volume is one volume at one node, whatever its role. It is the block.Device
// that exports serve.
type Volume struct {
	cfg   Config
	info  block.Info
	solo  bool
	clean bool // at the start all that was acknowledged was here
	log   *slog.Logger
	name  []byte // how messages begin
	clock time.Time

	gate   *gate
	ranges ranges
	slots  chan *op

	now     atomic.Pointer[standing]
	inbound atomic.Pointer[inbound]
	opening chan struct{} // one place: who begins a session here
	forward forwarder
	guests  guests
	parted  atomic.Bool   // the other node is left behind
	writes  atomic.Uint64 // replicated ones that ended

	life    sync.RWMutex // held for reading during calls of clients and of the peer
	closed  bool         // guarded by life
	closing chan struct{}
	once    sync.Once
	base    context.Context // ends when Close begins
	stop    context.CancelFunc
	running sync.WaitGroup

	mu       sync.Mutex // guards changes of now, and:
	known    knowledge
	endTerm  context.CancelFunc // of now.term; may be nil
	decided  bool               // the arbiter has answered since the start
	slowness int                // times in a row that the peer was lost because it was slow
	reason   string
	left     int64 // bytes a resynchronisation has yet to copy
}

// standing is how things stand; it is replaced as a whole.
type standing struct {
	role    role
	rec     fence.Record
	changed chan struct{} // closed when it is replaced

	term context.Context // of a secondary: ends with its role

	// Of a primary:
	reign  *reign
	ship   *session // writes go through it; nil: there is none
	inSync bool     // the session's node is a member and has everything
	alone  bool     // without a session, writes are acknowledged
	sync   bool     // writes are synced before they are acknowledged
	sole   bool     // nobody else may take over: reads need no lease
	// settled: what is here may be shown to clients. open: it is, that is, the
	// word given to the primary before has been kept and no hand-over is under way.
	settled, open, leaving bool
}

// reign is one time in office.
type reign struct {
	epoch uint64
	ctx   context.Context // ends with it
	end   context.CancelFunc
	group sync.WaitGroup

	// Guarded by Volume.mu.
	lost time.Time // since when there is no session
	next time.Time // no session before
	// beaten is when the other node was heard last.
	beaten time.Time
	free   bool // the word given to the primary before has been kept
}

// ticks is the monotonic time since the volume was opened.
func (v *Volume) ticks() time.Duration { return time.Since(v.clock) }

var _ block.Device = (*Volume)(nil)

// Open makes a Volume. It serves when Run runs; without an arbiter at once.
func Open(c Config) (*Volume, error) {
	if err := c.fill(); err != nil {
		return nil, err
	}
	v := &Volume{cfg: c, info: c.Local.Info(), solo: c.Fence == nil, name: prefix(c.Volume), clock: time.Now(),
		gate: newGate(), closing: make(chan struct{}), opening: make(chan struct{}, 1)}
	v.forward.opening = make(chan struct{}, 1)
	v.log = c.Logger.With("volume", c.Volume, "node", c.Node)
	v.base, v.stop = context.WithCancel(context.Background())
	v.now.Store(&standing{changed: make(chan struct{})})
	if !c.CleanStart && c.Log != nil {
		// A power cut can leave bytes here that no journal knows of any more.
		if err := c.Log.Release(holdName); err != nil {
			v.stop()
			return nil, err
		}
	}
	if v.solo {
		return v, nil
	}
	// A node without the hold has not been in sync since it may have lost
	// something, however often its process was restarted since.
	_, held := c.Log.Held(holdName)
	v.clean = c.CleanStart && held
	v.known = knowledge{me: c.Node, whole: v.clean, heard: time.Now()}
	v.reason = "waiting for the arbiter"
	v.slots = make(chan *op, c.InFlight)
	for range c.InFlight {
		v.slots <- v.newOp()
	}
	return v, nil
}

// holdName is the hold behind which the two nodes may differ.
const holdName = "peer"

func (v *Volume) newOp() *op {
	return &op{wake: make(chan struct{}, 1), head: append(make([]byte, 0, len(v.name)+bodyLen), v.name...)}
}

// Info is that of the local stack.
func (v *Volume) Info() block.Info { return v.info }

// enter begins a call; nil is followed by life.RUnlock.
func (v *Volume) enter(op string) error {
	v.life.RLock()
	if v.closed {
		v.life.RUnlock()
		return block.E("replica."+op, v.cfg.Volume, block.KindClosed, nil)
	}
	return nil
}

// Close ends Run and calls that wait, waits for the others, and closes the
// local stack.
func (v *Volume) Close() error {
	v.once.Do(func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		close(v.closing)
		v.stop()
	})
	v.running.Wait()
	v.life.Lock()
	defer v.life.Unlock()
	if v.closed {
		return nil
	}
	v.closed = true
	v.update(func(s *standing) {})
	if s := v.inbound.Load(); s != nil {
		s.close()
	}
	return v.cfg.Local.Close()
}

// update replaces the standing by a copy that fn has changed.
func (v *Volume) update(fn func(*standing)) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.updateLocked(fn)
}

func (v *Volume) updateLocked(fn func(*standing)) {
	old := v.now.Load()
	next := *old
	next.changed = make(chan struct{})
	fn(&next)
	if next.role == primary && next.settled {
		// What clients are shown is all there is, whoever is asked for it later.
		v.known.whole = true
	}
	v.now.Store(&next)
	close(old.changed)
}

// setReason says in the status why something waits.
func (v *Volume) setReason(format string, args ...any) {
	s := fmt.Sprintf(format, args...)
	v.mu.Lock()
	v.reason = s
	v.mu.Unlock()
}

// pause waits until things stand differently than in st, or for d (0: no
// limit). It fails when ctx ends or the volume closes.
func (v *Volume) pause(ctx context.Context, st *standing, d time.Duration) error {
	var after <-chan time.Time
	if d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		after = t.C
	}
	select {
	case <-st.changed:
	case <-after:
	case <-ctx.Done():
		return ctx.Err()
	case <-v.closing:
		return errClosed
	}
	return nil
}

// learn takes in a record or a beat and changes role at once when it is deposed.
// Rising is left to Run.
func (v *Volume) learn(e event) {
	v.cfg.Fence.Saw(e.rec)
	v.mu.Lock()
	defer v.mu.Unlock()
	before := v.known.rec
	k, act := decide(v.known, e, time.Now())
	if k.heard != v.known.heard {
		v.reason = ""
	}
	v.known = k
	st := v.now.Load()
	if act == follow {
		if st.reign != nil {
			st.reign.end()
			v.log.Warn("replica: another node is primary now; calls go to it", "primary", k.rec.Primary, "epoch", k.rec.Epoch)
		} else {
			v.log.Info("replica: secondary", "primary", k.rec.Primary, "epoch", k.rec.Epoch)
		}
		v.reason = ""
		v.closeTerm()
		var term context.Context
		term, v.endTerm = context.WithCancel(v.base)
		v.updateLocked(func(s *standing) { *s = standing{role: secondary, rec: k.rec, changed: s.changed, term: term} })
		return
	}
	if k.rec.Newer(before) {
		v.updateLocked(func(s *standing) { s.rec = k.rec })
	}
}

// closeTerm ends calls that were forwarded. mu is held.
func (v *Volume) closeTerm() {
	if v.endTerm != nil {
		v.endTerm()
		v.endTerm = nil
	}
}

// say is what this node tells others about how things stand.
func (v *Volume) say() state {
	v.mu.Lock()
	defer v.mu.Unlock()
	return state{node: v.cfg.Node, rec: v.known.rec, inSync: v.known.whole}
}

// Run does what is to be done beside the calls, until ctx ends or the volume
// is closed.
func (v *Volume) Run(ctx context.Context) error {
	v.mu.Lock()
	if v.base.Err() != nil {
		v.mu.Unlock()
		return v.tell("run", errClosed)
	}
	v.running.Add(1)
	v.mu.Unlock()
	defer v.running.Done()
	if v.solo {
		select {
		case <-ctx.Done():
		case <-v.closing:
		}
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(v.base, cancel)()
	v.claim(ctx)
	first := true
	for ctx.Err() == nil {
		v.mu.Lock()
		k, act := decide(v.known, event{kind: tick}, time.Now())
		v.mu.Unlock()
		switch act {
		case rise:
			v.reignAs(ctx, k.rec, first)
		case takeOver:
			v.askOffice(ctx, k.rec, false)
		case look:
			v.look(ctx)
			v.sleep(ctx, lookEvery)
		default:
			v.sleep(ctx, 50*time.Millisecond)
		}
		first = first && act != rise && v.now.Load().role != secondary
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.closeTerm()
	v.known.role = undecided
	v.updateLocked(func(s *standing) { *s = standing{role: undecided, rec: s.rec, changed: s.changed} })
	return nil
}

// sleep waits for d or until the role or the record changes.
func (v *Volume) sleep(ctx context.Context, d time.Duration) {
	_ = v.pause(ctx, v.now.Load(), d) // Run looks at ctx itself
}

// claim asks the arbiter until it answers, for the first time since the start.
func (v *Volume) claim(ctx context.Context) {
	for ctx.Err() == nil {
		c, cancel := context.WithTimeout(ctx, callTime)
		rec, err := v.cfg.Fence.Claim(c)
		cancel()
		if err == nil && rec.Epoch > 0 {
			v.mu.Lock()
			v.decided = true
			v.mu.Unlock()
			v.learn(event{kind: learned, rec: rec})
			return
		}
		v.setReason("the arbiter does not say who is primary: %v", err)
		v.sleep(ctx, renewEvery)
	}
}

// look asks the arbiter for the record.
func (v *Volume) look(ctx context.Context) {
	c, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	rec, _ := v.cfg.Fence.Get(c) // without an answer it is empty, and changes nothing
	v.learn(event{kind: learned, rec: rec})
}

// askOffice asks the arbiter to make this node primary.
func (v *Volume) askOffice(ctx context.Context, rec fence.Record, force bool) error {
	c, cancel := context.WithTimeout(ctx, callTime)
	got, err := v.cfg.Fence.Takeover(c, rec.Epoch, force)
	cancel()
	if err == nil {
		v.log.Warn("replica: the primary is gone, this node takes over", "was", rec.Primary, "epoch", got.Epoch)
		v.learn(event{kind: learned, rec: got})
		return nil
	}
	v.setReason("the primary %s is silent; taking over: %v", rec.Primary, err)
	if k := block.KindOf(err); k != block.KindBusy {
		v.look(ctx)
	}
	v.sleep(ctx, askEvery)
	return err
}

// TakeOver makes this node primary on an operator's word. With force it need
// not be a member: writes that only the other node has are given up.
func (v *Volume) TakeOver(ctx context.Context, force bool) error {
	if v.solo {
		return nil
	}
	for {
		v.look(ctx)
		v.mu.Lock()
		rec, heard := v.known.rec, v.known.heard
		v.mu.Unlock()
		if rec.Epoch == 0 {
			return block.E("replica.takeover", v.cfg.Volume, block.KindUnavailable, fmt.Errorf("the arbiter has no record or cannot be reached"))
		}
		if rec.Primary == v.cfg.Node {
			return nil
		}
		if d := askAfter - time.Since(heard); d > 0 {
			return block.E("replica.takeover", v.cfg.Volume, block.KindBusy, fmt.Errorf("the primary %s is alive; use a hand-over", rec.Primary))
		}
		err := v.askOffice(ctx, rec, force)
		if k := block.KindOf(err); k != block.KindBusy && k != block.KindFenced || ctx.Err() != nil {
			return err
		}
	}
}
