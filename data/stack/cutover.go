package stack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"forerun/api"
	"forerun/block"
	"forerun/data/converge"
	"forerun/data/source/raw"
	"forerun/disk"
)

// CutoverOptions says where a volume goes.
type CutoverOptions struct {
	Target    string // absolute path of a raw file or block device
	Threshold int64  // bytes, 0 for the default
	Wait      bool   // for the fill, rather than refuse
	Force     bool   // overwrite a target that holds data
}

// cutover is the part of a Volume that moves it to its native target.
type cutover struct {
	job *converge.Job

	mu      sync.Mutex
	running bool   // guarded by mu: a run was started and has not ended
	waiting string // guarded by mu: what it waits for before it begins
	asked   string // guarded by mu: the target it was started for
	ended   bool   // guarded by mu: nothing may be started any more
	cancel  context.CancelFunc
	group   sync.WaitGroup
}

// readyCheck is how often a cut-over that waits for the fill looks.
const readyCheck = 500 * time.Millisecond

// bootID names this run of the operating system, empty if that is unknown.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// openTarget opens native storage exclusively; with create it makes a file
// that is not there and gives an empty one the size, both durably.
func openTarget(_ context.Context, path string, size int64, create bool) (block.Device, error) {
	const op = "target.open"
	if create {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, block.E(op, path, block.KindNone, err)
		}
		fi, err := f.Stat()
		if err == nil && fi.Mode().IsRegular() && fi.Size() == 0 {
			if err = f.Truncate(size); err == nil {
				err = f.Sync()
			}
			if err == nil {
				err = disk.OS().SyncDir(filepath.Dir(path))
			}
		}
		if err = errors.Join(err, f.Close()); err != nil {
			return nil, block.E(op, path, block.KindNone, err)
		}
	}
	d, err := raw.Open(path, raw.Options{})
	if err != nil {
		return nil, err
	}
	if d.Info().ReadOnly {
		return nil, errors.Join(block.E(op, path, block.KindReadOnly, errors.New("the target cannot be written; check its permissions")), d.Close())
	}
	return block.NewChecked("target", d), nil
}

// openCutover makes the job, and goes on with a copy that a restart cut short.
func (v *Volume) openCutover(plan converge.Plan) (err error) {
	o := converge.Options{
		FS: v.opts.FS, Dir: v.opts.Dir, Switch: v.sw, Log: v.opts.Log,
		Reserved: v.opts.Reserved,
		Ready:    v.ready,
		// The target is this node's alone: the other must not take over.
		BeforeSwitch: v.rep.Part, NotSwitched: v.rep.Rejoin,
		OpenTarget: func(path string, size int64, create bool) (block.Device, error) {
			return openTarget(context.Background(), path, size, create)
		},
	}
	if v.source != nil {
		o.Tracker = v.source.tracker
	}
	if v.job, err = converge.NewJob(o); err != nil {
		return err
	}
	if plan.Phase == converge.PhaseCopying {
		v.opts.Log.Info("going on with a cut-over that was cut short", "target", plan.Target)
		return v.launch(CutoverOptions{Wait: true}, plan.Target)
	}
	return nil
}

// ready says why a copy may not begin yet.
func (v *Volume) ready() error {
	s := v.source.volume.Stats()
	if absent := s.Untouched + s.PartlyAbsent; absent > 0 {
		return block.E("cutover", v.meta.Volume, block.KindUnavailable,
			fmt.Errorf("%d of %d chunks are still at the source only; wait for the fill (forerun status), or cut over with --wait", absent, s.Chunks))
	}
	return nil
}

// StartCutover begins to replicate the volume to its target, in the
// background; Status shows how it goes. It is refused before everything is
// here, unless o.Wait.
func (v *Volume) StartCutover(o CutoverOptions) error {
	if v.Switched() {
		return block.E("cutover", v.meta.Volume, block.KindExists, fmt.Errorf("the volume was cut over to %s already", v.plan().Target))
	}
	if !filepath.IsAbs(o.Target) {
		return block.E("cutover", v.meta.Volume, block.KindInvalid, fmt.Errorf("the target %q is not an absolute path; after a restart elsewhere it would be another one", o.Target))
	}
	if err := v.reserved(o.Target); err != nil {
		return err
	}
	if !o.Wait {
		if err := v.ready(); err != nil {
			return err
		}
	}
	return v.launch(o, o.Target)
}

// reserved refuses a target that leads into a directory of ours, also through
// symbolic links. The name that is kept is the one that was given: a link such
// as those in /dev/disk/by-id may be what survives a reboot.
func (v *Volume) reserved(target string) error {
	real := resolve(target)
	for _, dir := range v.opts.Reserved {
		if rel, err := filepath.Rel(resolve(dir), real); err == nil && rel != ".." && !strings.HasPrefix(rel, "../") {
			return block.E("cutover", v.meta.Volume, block.KindInvalid, fmt.Errorf("the target %s lies in %s, which is in use; choose another place", target, dir))
		}
	}
	return nil
}

// resolve follows symbolic links, also those that lead to what is not there yet.
func resolve(p string) string {
	const most = 40 // links in a row, as in the kernel
	p = filepath.Clean(p)
	for range most {
		if r, err := filepath.EvalSymlinks(p); err == nil {
			return r
		}
		l, err := os.Readlink(p)
		if err != nil {
			break
		}
		if !filepath.IsAbs(l) {
			l = filepath.Join(filepath.Dir(p), l)
		}
		p = l
	}
	dir := filepath.Dir(p)
	if dir == p {
		return p
	}
	return filepath.Join(resolve(dir), filepath.Base(p))
}

func (v *Volume) launch(o CutoverOptions, target string) error {
	v.cutover.mu.Lock()
	defer v.cutover.mu.Unlock()
	if v.ended {
		return block.E("cutover", v.meta.Volume, block.KindClosed, nil)
	}
	if v.running {
		return block.E("cutover", v.meta.Volume, block.KindBusy, fmt.Errorf("a cut-over to %s is under way; see forerun status", v.asked))
	}
	ctx, cancel := context.WithCancel(context.Background())
	v.running, v.asked, v.cutover.cancel = true, target, cancel
	v.cutover.group.Go(func() {
		defer cancel()
		state := v.runCutover(ctx, o)
		v.cutover.mu.Lock()
		v.running, v.waiting = false, ""
		v.cutover.mu.Unlock()
		if state == converge.Switched {
			v.leaveSource()
		}
	})
	return nil
}

func (v *Volume) runCutover(ctx context.Context, o CutoverOptions) converge.State {
	for o.Wait && ctx.Err() == nil {
		err := v.ready()
		if err == nil {
			break
		}
		v.cutover.mu.Lock()
		v.waiting = err.Error()
		v.cutover.mu.Unlock()
		select {
		case <-ctx.Done():
			return converge.Stopped
		case <-time.After(readyCheck):
		}
	}
	v.cutover.mu.Lock()
	v.waiting = ""
	v.cutover.mu.Unlock()
	state, err := v.job.Run(ctx, converge.Request{Target: o.Target, Threshold: o.Threshold, Force: o.Force})
	if err != nil && state != converge.Stopped {
		v.opts.Log.Warn("the cut-over ended early; the source is primary", "state", string(state), "err", err)
	}
	return state
}

// leaveSource closes what the workload has left behind. What is on disk stays.
func (v *Volume) leaveSource() {
	if err := v.source.Close(); err != nil {
		v.opts.Log.Warn("the source side did not close cleanly; it is of no use any more", "err", err)
	}
	if err := v.job.Finish(); err != nil {
		v.opts.Log.Warn("the plan could not be marked as done; it will be at the next start", "err", err)
	}
	if v.opts.OnSwitched != nil {
		v.opts.OnSwitched()
	}
}

// CancelCutover gives up a cut-over that has not switched; the source stays primary.
func (v *Volume) CancelCutover(ctx context.Context) error {
	v.cutover.mu.Lock()
	waits := v.waiting != ""
	if waits {
		v.cutover.cancel()
	}
	v.cutover.mu.Unlock()
	if waits {
		v.cutover.group.Wait() // so that the status tells
	}
	return v.job.Cancel(ctx)
}

// stopCutover ends a run; a restart goes on with it.
func (v *Volume) stopCutover() {
	v.cutover.mu.Lock()
	v.ended = true
	if v.cutover.cancel != nil {
		v.cutover.cancel()
	}
	v.cutover.mu.Unlock()
	v.cutover.group.Wait()
}

func (v *Volume) plan() converge.Plan {
	if v.job == nil {
		return converge.Plan{}
	}
	return v.job.Plan()
}

// PauseFill pauses or resumes the background transfer.
func (v *Volume) PauseFill(pause bool) error {
	if err := v.hasFill(); err != nil {
		return err
	}
	v.fillMu.Lock()
	defer v.fillMu.Unlock()
	v.paused = pause
	v.applyFill()
	return nil
}

// applyFill pauses or resumes the pump as the user and the pair want it.
// fillMu is held.
func (v *Volume) applyFill() {
	if v.source == nil {
		return
	}
	if v.paused || v.standby {
		v.source.pump.Pause()
	} else {
		v.source.pump.Resume()
	}
}

// LimitFill bounds the background transfer in bytes a second on the link, 0 for none.
func (v *Volume) LimitFill(bytesPerSecond int64) error {
	if err := v.hasFill(); err != nil {
		return err
	}
	v.source.pump.SetLimit(bytesPerSecond)
	return nil
}

func (v *Volume) hasFill() error {
	if v.source == nil || v.Switched() {
		return block.E("fill", v.meta.Volume, block.KindExists, errors.New("the volume has been cut over; nothing is filled any more"))
	}
	return nil
}

func (v *Volume) cutoverStatus() api.Cutover {
	if v.job == nil {
		return api.Cutover{State: "idle"}
	}
	s := v.job.Stats()
	c := api.Cutover{State: string(s.State), Target: s.Target, Error: s.Reason, Rounds: len(s.Rounds),
		ChangesetBytes: s.Changeset, CopiedBytes: s.Copied, ThresholdBytes: s.Threshold,
		RateBytes: s.Rate, ETAS: int64(s.ETA.Seconds())}
	if c.Target == "" {
		v.cutover.mu.Lock()
		c.Target = v.asked
		v.cutover.mu.Unlock()
	}
	for _, r := range s.Rounds {
		c.RoundBytes = append(c.RoundBytes, r.Bytes)
	}
	switch s.State {
	case converge.Held:
		c.State = "paused"
	case converge.Cutting, converge.Undecided:
		c.State = "switching"
	case converge.Stopped:
		c.State = "canceled"
	case converge.Switched:
		c.PauseUs, c.CopiedBytes = s.Pause.Microseconds(), s.Written
		if c.Rounds == 0 { // before a restart
			c.Rounds = v.job.Plan().Rounds
		}
	}
	v.cutover.mu.Lock()
	defer v.cutover.mu.Unlock()
	if v.waiting != "" {
		c.State, c.Error = "waiting", v.waiting
	} else if v.running {
		switch s.State {
		case converge.Idle, converge.Failed, converge.Stopped, converge.NotConverging: // the job has not begun, or has just ended
			c.State, c.Error = "copying", ""
		}
	}
	return c
}
