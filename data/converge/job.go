package converge

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
	"forerun/disk"
)

// Options of a Job: what it works on.
type Options struct {
	FS      disk.FS
	Dir     string // where the plan is kept
	Switch  *Switch
	Tracker *Tracker
	// OpenTarget opens native storage exclusively. With create it makes a file
	// that is not there and gives one that is shorter the size, both durably;
	// on a block device, and otherwise, it changes nothing. The device is closed by the Job, or by the Switch once
	// it is primary.
	OpenTarget func(path string, size int64, create bool) (block.Device, error)
	// Ready says why the copy may not begin yet; nil when all data is here.
	Ready func() error
	// BeforeSwitch, if set, is called before the gate closes: what must be so
	// when the target is primary. Its error, with KindUnavailable, puts the
	// cut-over off. NotSwitched is called when the switch was not made after all.
	BeforeSwitch func(ctx context.Context) error
	NotSwitched  func()
	// Reserved are files and directories a target must not be, or be in.
	Reserved []string
	// PauseLimit bounds how long the gate may be closed before the cut-over is
	// put off; default 2 s.
	PauseLimit time.Duration
	Log        *slog.Logger // changes of state; nil for none
}

// DefaultThreshold is the changeset in bytes below which the gate is closed.
const DefaultThreshold = 4 << 20

// Request says what Run is to do.
type Request struct {
	Target    string // path; may be empty to go on with the plan there is
	Threshold int64  // bytes; default DefaultThreshold
	MaxRounds int    // before the state is NotConverging; default 30
	InFlight  int    // pieces at once, default 4, at most 8
	Force     bool   // overwrite a target that holds data
	// KeepSyncing goes on with rounds when they do not converge, until they do
	// or ctx ends: the operator's choice, never the default.
	KeepSyncing bool
}

func (r Request) withDefaults() Request {
	if r.Threshold <= 0 {
		r.Threshold = DefaultThreshold
	}
	if r.MaxRounds <= 0 {
		r.MaxRounds = 30
	}
	if r.InFlight <= 0 {
		r.InFlight = 4
	}
	r.InFlight = min(r.InFlight, 8)
	return r
}

// syncEvery is how long a round waits before the next one when KeepSyncing
// goes on without converging.
const syncEvery = 5 * time.Second

// settleBytes is how much the first pass copies between two flushes of the
// target, after which a restart need not copy it again.
const settleBytes = 1 << 30

// maxCuts is how often in a row the gate may fail to drain in time.
const maxCuts = 3

// Job is the copier and the cut-over of one volume.
type Job struct {
	opt  Options
	log  *slog.Logger
	pace pacer

	run sync.Mutex // one Run or Cancel at a time; before mu

	mu     sync.Mutex
	plan   Plan
	state  State
	reason string
	cancel context.CancelCauseFunc // ends the Run under way, nil without one
	held   chan struct{}           // closed when the pause of the copier ends; nil while it runs
	rounds []Round
	size   int64 // bytes to copy in the round under way
	began  time.Time
	pause  time.Duration

	done    atomic.Int64 // bytes settled in the round under way
	written atomic.Int64
}

// NewJob loads the plan, and finishes a cancel that was interrupted. When the
// plan says that the target is primary, the stack must be built on it (see
// Restore) and Run is refused.
func NewJob(opt Options) (*Job, error) {
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	if opt.PauseLimit <= 0 {
		opt.PauseLimit = 2 * time.Second
	}
	if err := opt.FS.MkdirAll(opt.Dir); err != nil {
		return nil, block.E("converge.open", opt.Dir, 0, err)
	}
	p, err := LoadPlan(opt.FS, opt.Dir)
	if err != nil {
		return nil, err
	}
	j := &Job{opt: opt, log: opt.Log.With("converge", opt.Dir), plan: p, state: Idle}
	switch p.Phase {
	case PhaseSwitched, PhaseDone:
		j.state = Switched
	case PhaseCanceling:
		return j, j.dismantle()
	}
	return j, nil
}

// Restore opens the target if the plan in dir says that it is primary, and
// returns nil otherwise.
func Restore(fsys disk.FS, dir string, open func(path string, size int64, create bool) (block.Device, error)) (block.Device, Plan, error) {
	p, err := LoadPlan(fsys, dir)
	if err != nil || !p.OnTarget() {
		return nil, p, err
	}
	d, err := open(p.Target, p.Size, false)
	if err != nil {
		return nil, p, block.E("converge.restore", p.Target, 0, fmt.Errorf("the target is primary and cannot be opened: %w", err))
	}
	if got := d.Info().Size; got < p.Size {
		d.Close()
		return nil, p, block.E("converge.restore", p.Target, block.KindInvalid,
			fmt.Errorf("the target is primary and has %d bytes, the volume %d; is it the right one?", got, p.Size))
	}
	return d, p, nil
}

var errCanceled = errors.New("the cut-over was canceled")

// Run copies and cuts over. It returns Switched when the target is primary;
// the source stack is not used any more then and may be closed. It returns
// NotConverging, without an error, when the workload writes faster than the
// copy: Run again, perhaps with a higher threshold or with KeepSyncing, or
// Cancel. With an error, or when ctx ends, the source side is primary and Run
// goes on later from where it was.
//
// Errors: KindUnavailable before all data is here, KindExists for a target that
// holds data, KindInvalid for one that does not fit, KindBusy while another
// Run is under way.
func (j *Job) Run(ctx context.Context, req Request) (State, error) {
	if !j.run.TryLock() {
		return j.Stats().State, block.E("converge.run", j.opt.Dir, block.KindBusy, errors.New("the cut-over of this volume is under way already"))
	}
	defer j.run.Unlock()
	req = req.withDefaults()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	j.mu.Lock()
	j.cancel, j.rounds, j.reason, j.size, j.pause = cancel, nil, "", 0, 0
	if j.state != Switched {
		j.state = Copying
	}
	j.mu.Unlock()
	j.done.Store(0)
	state, err := j.converge(ctx, req)
	j.mu.Lock()
	j.cancel, j.state = nil, state
	if err != nil {
		j.reason = err.Error()
	}
	j.mu.Unlock()
	j.log.Info("copy ended", "state", string(state), "error", err)
	return state, err
}

func (j *Job) converge(ctx context.Context, req Request) (State, error) {
	target, err := j.prepare(ctx, req)
	if err != nil {
		if j.currentPlan().OnTarget() {
			return Switched, err
		}
		return Failed, err
	}
	c := j.copier(target, req)
	fail := func(err error) (State, error) {
		target.Close()
		if cause := context.Cause(ctx); cause != nil {
			return Stopped, block.E("converge.run", j.opt.Dir, block.KindCanceled, cause)
		}
		return Failed, block.E("converge.run", j.opt.Dir, 0, err)
	}
	var sizes []int64
	late := 0
	for {
		now := j.opt.Tracker.changeset()
		v := decide(sizes, now, req.Threshold, req.MaxRounds)
		if v == giveUp || late >= maxCuts {
			if !req.KeepSyncing {
				target.Close()
				return NotConverging, nil
			}
			j.setState(NotConverging, "")
			sizes, late = nil, 0
			if err := sleep(ctx, syncEvery); err != nil {
				return fail(err)
			}
			continue
		}
		if v == cut {
			state, again, err := j.cutOver(ctx, c, target, req)
			if state == Switched {
				return state, nil
			}
			if !again {
				if state == Undecided {
					return state, err // the target stays open: it may be primary
				}
				return fail(err)
			}
			late++
			j.setState(Copying, err.Error())
			now = j.opt.Tracker.changeset()
		}
		if err := j.round(ctx, c, now); err != nil {
			return fail(err)
		}
		sizes = append(sizes, now)
	}
}

func (j *Job) copier(target block.Device, req Request) *copier {
	src := j.opt.Tracker.below
	c := &copier{src: src, dst: target, blind: j.currentPlan().Doubt, unit: min(j.opt.Tracker.opt.Grain, int64(len(zeros))), piece: pieceBytes, inFlight: req.InFlight,
		pace: &j.pace, idle: j.idle, wait: j.wait, done: &j.done, written: &j.written}
	for _, m := range []int{src.Info().MaxIO, target.Info().MaxIO} {
		if m > 0 {
			c.piece = min(c.piece, int64(m))
		}
	}
	return c
}

// round copies what is marked and what the first pass has not reached, and
// flushes the target.
func (j *Job) round(ctx context.Context, c *copier, changeset int64) error {
	t := j.opt.Tracker
	j.mu.Lock()
	j.size, j.began = changeset, time.Now()
	j.mu.Unlock()
	j.done.Store(0)
	begin := time.Now()
	if err := c.run(ctx, j.marked(t.take())); err != nil {
		return err
	}
	if err := j.settle(ctx, c, 0, true); err != nil {
		return err
	}
	for at := t.rewind(); at < t.info.Size; {
		to := at
		err := c.run(ctx, func(emit func(piece) error) error {
			var err error
			to, err = j.sweep(ctx, c, at, emit)
			return err
		})
		if err != nil {
			return err
		}
		if err := j.settle(ctx, c, to, false); err != nil {
			return err
		}
		at = to
	}
	j.mu.Lock()
	r := Round{Bytes: changeset, Took: time.Since(begin)}
	if len(j.rounds) >= maxRoundsKept {
		j.rounds = append(j.rounds[:1], j.rounds[2:]...)
	}
	j.rounds = append(j.rounds, r)
	j.plan.Rounds++
	j.mu.Unlock()
	j.log.Info("round copied", "bytes", r.Bytes, "took", r.Took)
	return nil
}

// settle flushes the target and then lets go of marks.
func (j *Job) settle(ctx context.Context, c *copier, swept int64, all bool) error {
	if err := c.dst.Flush(ctx, block.Background); err != nil {
		j.distrust(err)
		return err
	}
	j.opt.Tracker.settle(swept, all)
	return j.opt.Tracker.persist(false)
}

// distrust notes that the target failed to flush: what it shows may not be
// what it has. The next Run begins anew and asks it nothing.
func (j *Job) distrust(err error) {
	switch block.KindOf(err) {
	case block.KindCanceled, block.KindClosed:
		return
	}
	j.mu.Lock()
	j.plan.Doubt, j.plan.ID = true, newID() // the marks are of another id then
	p := j.plan
	j.mu.Unlock()
	if err := savePlan(j.opt.FS, j.opt.Dir, p); err != nil {
		j.log.Warn("the plan cannot be written", "error", err)
	}
}

// marked feeds the grains of a set.
func (j *Job) marked(set *bitmap) func(func(piece) error) error {
	t := j.opt.Tracker
	return func(emit func(piece) error) error {
		for from, to := range set.runs() {
			off := from * t.opt.Grain
			n := min(to*t.opt.Grain, t.info.Size) - off
			if n <= 0 {
				continue // a full page may reach beyond the end
			}
			if err := emit(piece{off: off, n: n}); err != nil {
				return err
			}
		}
		return nil
	}
}

// sweep feeds the first pass from at, a window at a time, until settleBytes
// of data have been fed, and answers how far it came.
func (j *Job) sweep(ctx context.Context, c *copier, at int64, emit func(piece) error) (int64, error) {
	const window = 256 << 20
	t := j.opt.Tracker
	var ext []block.Extent
	for fed := int64(0); at < t.info.Size && fed < settleBytes; {
		to := min(at+window, t.info.Size)
		t.claim(to) // before anything is known of it
		for at < to {
			err := c.retry(ctx, func() error {
				var err error
				ext, err = c.src.Extents(ctx, ext[:0], at, to-at, block.Background|block.Local)
				return err
			})
			if err != nil {
				return at, err
			}
			for _, e := range ext {
				if err := emit(piece{off: e.Off, n: e.Len, zero: spared(e)}); err != nil {
					return at, err
				}
				if !spared(e) {
					fed += e.Len
				}
				at = e.End()
			}
		}
	}
	return at, nil
}

// errGrown says that too much was written while the gate was closing.
var errGrown = errors.New("the changeset grew while the gate was closing")

// cutOver closes the gate, copies the rest, records the switch and opens the
// gate. again means that the source side is primary and another round may help.
func (j *Job) cutOver(ctx context.Context, c *copier, target block.Device, req Request) (state State, again bool, err error) {
	t := j.opt.Tracker
	j.setState(Cutting, "")
	if j.opt.BeforeSwitch != nil {
		if err := j.opt.BeforeSwitch(ctx); err != nil {
			j.log.Warn("cut-over put off", "error", err)
			return Failed, block.KindOf(err) == block.KindUnavailable && ctx.Err() == nil, err
		}
	}
	if j.opt.NotSwitched != nil {
		defer func() {
			if state != Switched && state != Undecided {
				j.opt.NotSwitched()
			}
		}()
	}
	urgent := *c
	urgent.urgent = true
	limited, cancel := context.WithTimeoutCause(ctx, j.opt.PauseLimit,
		fmt.Errorf("the pause would have been longer than %v", j.opt.PauseLimit))
	defer cancel()
	undecided := false
	took, err := j.opt.Switch.Pause(limited, func(ctx context.Context) (block.Device, error) {
		set := t.take()
		n := set.n * t.opt.Grain
		if n > 2*max(req.Threshold, t.opt.Grain) {
			return nil, errGrown
		}
		j.mu.Lock()
		j.size, j.began = n, time.Now()
		j.mu.Unlock()
		j.done.Store(0)
		if err := urgent.run(ctx, j.marked(set)); err != nil {
			return nil, err
		}
		if err := target.Flush(ctx, block.Demand); err != nil {
			j.distrust(err)
			return nil, err
		}
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		p := j.currentPlan()
		p.Phase = PhaseSwitched
		if err := savePlan(j.opt.FS, j.opt.Dir, p); err != nil {
			if errors.Is(err, errUnsure) {
				undecided = !j.retract(err)
			}
			if undecided {
				return nil, fmt.Errorf("%w: %w", ErrStayShut, err)
			}
			return nil, err
		}
		return target, nil
	})
	j.mu.Lock()
	j.pause = took
	j.mu.Unlock()
	switch {
	case err == nil:
		j.mu.Lock()
		j.plan.Phase = PhaseSwitched
		j.plan.Rounds++
		j.plan.PauseUs = took.Microseconds() // on disk with Finish
		j.rounds = append(j.rounds, Round{Bytes: j.size, Took: took, Last: true})
		j.mu.Unlock()
		j.log.Info("switched to the target", "target", j.plan.Target, "pause", took)
		if err := t.end(); err != nil {
			j.log.Warn("the marks could not be removed; they are of no use any more", "error", err)
		}
		return Switched, false, nil
	case undecided:
		return Undecided, false, err
	case errors.Is(err, errGrown), errors.Is(err, context.Cause(limited)) && ctx.Err() == nil && limited.Err() != nil:
		j.log.Info("cut-over put off", "error", err, "pause", took)
		return Copying, true, err
	}
	j.log.Warn("cut-over failed; the source side stays primary", "error", err, "pause", took)
	return Failed, false, err
}

// retract records durably that the source side is primary, after an attempt to
// record the switch ended so that either may be on disk. Until that succeeds
// nothing may be written to either side. It gives up, and answers false, only
// when the Switch is being closed: what the next start then finds is right,
// whichever it is.
func (j *Job) retract(cause error) bool {
	j.setState(Undecided, cause.Error())
	j.log.Error("it is not known whether the switch is recorded; the gate stays closed until it is", "error", cause)
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		err := savePlan(j.opt.FS, j.opt.Dir, j.currentPlan())
		if err == nil {
			return true
		}
		j.setState(Undecided, err.Error())
		select {
		case <-time.After(pause):
		case <-j.opt.Switch.closing:
			return false
		}
	}
}

// prepare checks, writes the plan and opens the target.
func (j *Job) prepare(ctx context.Context, req Request) (block.Device, error) {
	fail := func(kind block.Kind, format string, args ...any) error {
		return block.E("converge.start", req.Target, kind, fmt.Errorf(format, args...))
	}
	p := j.currentPlan()
	if p.OnTarget() {
		return nil, fail(block.KindInvalid, "the volume was cut over to %s already", p.Target)
	}
	if j.opt.Ready != nil {
		if err := j.opt.Ready(); err != nil {
			return nil, fail(block.KindUnavailable, "not all data is here yet: %w", err)
		}
	}
	if req.Target == "" {
		req.Target = p.Target
	}
	if req.Target == "" {
		return nil, fail(block.KindInvalid, "no target is given and no cut-over is under way")
	}
	for _, r := range append([]string{j.opt.Dir}, j.opt.Reserved...) {
		if within(req.Target, r) {
			return nil, fail(block.KindInvalid, "the target lies in %s, which is in use; choose another place", r)
		}
	}
	st, err := j.opt.FS.Stat(req.Target)
	missing := block.KindOf(err) == block.KindNotFound
	if err != nil && !missing {
		return nil, fail(0, "%w", err)
	}
	size := j.opt.Tracker.info.Size
	resume := p.Phase == PhaseCopying
	switch {
	case resume && p.Target != req.Target:
		return nil, fail(block.KindExists, "a cut-over to %s is under way; cancel it first", p.Target)
	case resume && p.Size != size:
		return nil, fail(block.KindInvalid, "the plan is for a volume of %d bytes, this one has %d; cancel it first", p.Size, size)
	case st.Dir:
		return nil, fail(block.KindInvalid, "the target is a directory")
	case !resume && st.Size > 0 && !req.Force:
		empty, err := blank(j.opt.FS, req.Target)
		if err != nil {
			return nil, fail(0, "it cannot be seen whether the target is empty: %w", err)
		}
		if !empty {
			return nil, fail(block.KindExists, "the target holds data (its size is %d bytes); use another one, or force", st.Size)
		}
	}
	// A power cut may have come while the target was made.
	short := resume && p.Created && st.Size < size
	if !resume || missing || short {
		p = Plan{Phase: PhaseCopying, ID: newID(), Target: req.Target, Created: missing || short, Size: size}
	}
	p.Threshold = req.Threshold
	if err := savePlan(j.opt.FS, j.opt.Dir, p); err != nil {
		return nil, fail(0, "the plan cannot be written: %w", err)
	}
	j.mu.Lock()
	j.plan = p
	j.mu.Unlock()
	target, err := j.opt.OpenTarget(req.Target, size, missing || short || st.Size == 0)
	if err == nil {
		if err = fits(j.opt.Tracker.info, target.Info()); err == nil && !j.opt.Tracker.tracks(p.planID()) {
			err = j.opt.Tracker.begin(p.planID())
		}
		if err != nil {
			target.Close()
		}
	}
	if err != nil {
		if !resume {
			err = errors.Join(err, j.dismantle())
		}
		return nil, fail(block.KindOf(err), "%w", err)
	}
	return target, nil
}

func newID() string {
	var id planID
	rand.Read(id[:]) // never fails
	return hex.EncodeToString(id[:])
}

// fits says why a target cannot take the place of a source.
func fits(src, dst block.Info) error {
	switch {
	case dst.Size < src.Size:
		return block.E("converge.target", "", block.KindInvalid, fmt.Errorf("it has %d bytes, the volume %d", dst.Size, src.Size))
	case dst.ReadOnly:
		return block.E("converge.target", "", block.KindReadOnly, nil)
	case dst.BlockSize > max(src.BlockSize, 1):
		return block.E("converge.target", "", block.KindUnsupported,
			fmt.Errorf("its blocks have %d bytes, the workload addresses blocks of %d", dst.BlockSize, src.BlockSize))
	case dst.MaxIO > 0 && (src.MaxIO == 0 || dst.MaxIO < src.MaxIO):
		return block.E("converge.target", "", block.KindUnsupported,
			fmt.Errorf("it takes at most %d bytes in one call, the workload may send %d", dst.MaxIO, src.MaxIO))
	}
	return nil
}

// within says whether p is dir or lies in it.
func within(p, dir string) bool {
	p, dir = path.Clean(p), path.Clean(dir)
	return p == dir || len(p) > len(dir) && p[:len(dir)] == dir && p[len(dir)] == '/'
}

// Cancel ends a Run, removes the plan, the marks, and the target if it was
// made for it. The source side stays primary. After the switch it is refused
// with KindInvalid; without a plan it does nothing.
func (j *Job) Cancel(ctx context.Context) error {
	j.mu.Lock()
	if j.cancel != nil {
		j.cancel(errCanceled)
	}
	j.mu.Unlock()
	j.run.Lock()
	defer j.run.Unlock()
	p := j.currentPlan()
	switch {
	case p.Phase == PhaseNone:
		j.setState(Idle, "")
		return nil
	case p.OnTarget():
		return block.E("converge.cancel", p.Target, block.KindInvalid, errors.New("the target is primary already; there is nothing to cancel"))
	}
	return j.dismantle()
}

// dismantle takes a plan back: first it says so, then marks and target go,
// then the plan. It may be run again at any point.
func (j *Job) dismantle() error {
	p := j.currentPlan()
	p.Phase = PhaseCanceling
	fail := func(err error) error { return block.E("converge.cancel", p.Target, 0, err) }
	if err := savePlan(j.opt.FS, j.opt.Dir, p); err != nil {
		return fail(err)
	}
	j.mu.Lock()
	j.plan = p
	j.mu.Unlock()
	if j.opt.Tracker != nil {
		if err := j.opt.Tracker.end(); err != nil {
			return fail(err)
		}
	}
	if p.Created {
		if err := j.opt.FS.Remove(p.Target); err != nil && block.KindOf(err) != block.KindNotFound {
			return fail(err)
		}
	}
	name := path.Join(j.opt.Dir, PlanName)
	if err := j.opt.FS.Remove(name); err != nil && block.KindOf(err) != block.KindNotFound {
		return fail(err)
	}
	if err := j.opt.FS.SyncDir(j.opt.Dir); err != nil {
		return fail(err)
	}
	j.mu.Lock()
	j.plan, j.state, j.reason = Plan{}, Idle, ""
	j.mu.Unlock()
	return nil
}

// Finish records that the source side has been taken down: the plan is done.
func (j *Job) Finish() error {
	j.run.Lock()
	defer j.run.Unlock()
	p := j.currentPlan()
	if !p.OnTarget() {
		return block.E("converge.finish", p.Target, block.KindInvalid, errors.New("the volume has not been cut over"))
	}
	p.Phase = PhaseDone
	if err := savePlan(j.opt.FS, j.opt.Dir, p); err != nil {
		return block.E("converge.finish", p.Target, 0, err)
	}
	j.mu.Lock()
	j.plan = p
	j.mu.Unlock()
	return nil
}

// Hold stops the copier before its next piece; the guest's I/O goes on. It
// lasts until Continue, across Runs.
func (j *Job) Hold() {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.held == nil {
		j.held = make(chan struct{})
	}
}

// Continue ends a Hold.
func (j *Job) Continue() {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.held != nil {
		close(j.held)
		j.held = nil
	}
}

// SetRate limits the copier to so many bytes per second of data read; 0 for no
// limit. The copy behind the closed gate is never limited.
func (j *Job) SetRate(bytesPerSecond int64) { j.pace.rate.Store(max(0, bytesPerSecond)) }

// Plan is the plan as it is on disk.
func (j *Job) Plan() Plan { return j.currentPlan() }

func (j *Job) currentPlan() Plan {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.plan
}

func (j *Job) setState(s State, reason string) {
	j.mu.Lock()
	j.state, j.reason = s, reason
	j.mu.Unlock()
}

// idle waits while the copier is held.
func (j *Job) idle(ctx context.Context) error {
	for {
		j.mu.Lock()
		ch := j.held
		j.mu.Unlock()
		if ch == nil {
			return nil
		}
		select {
		case <-ch:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// wait notes that a piece waits for a reason that may pass, or goes on.
func (j *Job) wait(err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err == nil {
		j.state, j.reason = Copying, ""
		return
	}
	if j.state != Waiting {
		j.log.Warn("the copy waits", "error", err)
	}
	j.state, j.reason = Waiting, err.Error()
}
