package stack

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
	"forerun/data/cache"
	"forerun/data/converge"
	"forerun/data/fill"
	"forerun/data/journal"
	"forerun/data/replica"
	"forerun/data/sched"
	"forerun/data/store"
	"forerun/data/volume"
	"forerun/data/wire"
	"forerun/data/writeback"
	"forerun/disk"
	"forerun/internal/chunk"
)

// Options says what a volume is put together from.
type Options struct {
	FS         disk.FS
	Dir        string // the volume's directory
	ScratchDir string // where its scratch file goes; may be emptied while stopped
	Store      *store.Store
	Key        chunk.Key     // of the store's signatures
	Memory     *cache.Memory // shared by the volumes of a frontend
	// ScratchBytes is the quota of the scratch tier, 0 for none.
	ScratchBytes int64
	FillPaused   bool
	// Hold, if set, says why the fill should bring nothing more for now.
	Hold      func() string
	FillLimit int64 // bytes a second on the link, 0 for none
	// SkipFree leaves at the source what its file systems do not use.
	SkipFree bool
	// Limiter bounds the background of all volumes of the node; nil: nothing does.
	Limiter *sched.Limiter
	// Ready says that the network keeps background from hurting demand.
	Ready bool
	// Reserved are files and directories that a cut-over must not write to.
	Reserved []string
	// OnSwitched is called, if set, when the native target has become primary
	// and the source side has been closed.
	OnSwitched func()
	// Pair keeps the volume at two frontends; nil at one.
	Pair *Pair
	// Isolated begins with changes staying here.
	Isolated bool
	Log      *slog.Logger
}

// Volume is one volume of a frontend: its stack of devices and what runs
// beside them. It is the block.Device that exports serve.
type Volume struct {
	*block.Checked // over the door

	meta Meta
	opts Options
	sw   *converge.Switch
	rep  *replica.Volume

	exact    bool        // the journal names everything that was written here
	isolated atomic.Bool // changes stay here
	shut     atomic.Bool // clients are refused
	stopRep  context.CancelFunc
	group    sync.WaitGroup // the replica's Run

	fillMu  sync.Mutex
	paused  bool // guarded by fillMu: by the user
	standby bool // guarded by fillMu: another node fills

	// source is the source side of the switch, nil when the volume opened on
	// its target.
	source *sourceSide
	cutover

	seen atomic.Bool // a client has been here
}

var _ block.Device = (*Volume)(nil)

// sourceSide is everything below the switch before the cut-over.
type sourceSide struct {
	*patience // the top of the stack

	journal *journal.Journal
	tracker *converge.Tracker
	volume  *volume.Volume
	cache   *cache.Cache
	sched   *sched.Scheduler
	link    *link
	pump    *fill.Pump

	cancel context.CancelFunc // ends the pump
	group  sync.WaitGroup
	once   sync.Once // close
	err    error     // of close
}

// Names inside a volume's directory.
const (
	mapDir     = "map"
	journalDir = "journal"
	marksName  = "marks"
)

// yieldTime bounds the handing over of an orderly stop.
const yieldTime = 3 * time.Second

// spaceRetry is how often a write that found no space tries again.
const spaceRetry = time.Second

// checkChange refuses a source that is not the one the volume was made from.
func (m Meta) checkChange(r *wire.Remote) error {
	i := r.Info()
	switch {
	case i.Size != m.SizeBytes:
		return block.E("stack.attach", m.Volume, block.KindInvalid,
			fmt.Errorf("the source has %d bytes now, the volume was made from one of %d; was the disk changed?", i.Size, m.SizeBytes))
	case r.ChunkBytes() != m.ChunkBytes:
		return block.E("stack.attach", m.Volume, block.KindInvalid,
			fmt.Errorf("the backend serves chunks of %d bytes now, the volume was made with %d; start the backend with --chunk %d", r.ChunkBytes(), m.ChunkBytes, m.ChunkBytes))
	case i.ID != m.SourceID:
		return block.E("stack.attach", m.Volume, block.KindInvalid,
			fmt.Errorf("the source is %q now, the volume was made from %q; give the old source back, or a new --state", i.ID, m.SourceID))
	}
	return nil
}

// Create describes a volume for the first time, from what the source says.
func Create(fs disk.FS, dir, name string, r *wire.Remote) (Meta, error) {
	i := r.Info()
	m := Meta{Volume: name, SizeBytes: i.Size, BlockBytes: i.BlockSize, ChunkBytes: r.ChunkBytes(), SourceID: i.ID,
		ReadOnly: r.SourceReadOnly()}
	return m, writeMeta(fs, dir, m)
}

// TargetError says that the native target of a volume that was cut over cannot
// be opened. It is the disk now: nothing else may be served in its place, and
// once it is there again Open succeeds.
type TargetError struct {
	Target string // its path
	Err    error
}

// Error says which target it is, and what is wrong with it.
func (e *TargetError) Error() string {
	return fmt.Sprintf("the volume was cut over to %s, which is its disk now: %v", e.Target, e.Err)
}

// Unwrap returns what is wrong with the target.
func (e *TargetError) Unwrap() error { return e.Err }

// Open puts the volume in o.Dir together and replays its journal. It needs no
// backend: Attach gives it one, and until then reads of what is not here wait.
// A native target that cannot be opened is a TargetError.
func Open(ctx context.Context, m Meta, o Options) (*Volume, error) {
	plan, err := converge.LoadPlan(o.FS, o.Dir)
	if err != nil {
		return nil, err
	}
	v := &Volume{meta: m, opts: o, paused: o.FillPaused}
	if err := v.loadPolicy(); err != nil {
		return nil, err
	}
	fresh := false
	if _, err := o.FS.Stat(path.Join(o.Dir, journalDir)); block.KindOf(err) == block.KindNotFound {
		fresh = true
	}
	if v.exact, err = sameBoot(o.FS, o.Dir, fresh); err != nil {
		return nil, err
	}
	var side block.Device
	if plan.OnTarget() {
		if side, _, err = converge.Restore(o.FS, o.Dir, func(path string, size int64, create bool) (block.Device, error) {
			return openTarget(ctx, path, size, create)
		}); err != nil {
			return nil, &TargetError{Target: plan.Target, Err: err}
		}
	} else {
		if v.source, err = openSource(m, o); err != nil {
			return nil, err
		}
		side = v.source
	}
	v.sw = converge.NewSwitch(side)
	if v.source != nil {
		err = writeback.Prepare(v.source.journal, v.exact)
	}
	if err == nil {
		err = v.openReplica(v.exact)
	}
	if err != nil {
		return nil, errors.Join(err, v.sw.Close())
	}
	v.Checked = block.NewChecked("volume "+m.Volume, door{v.rep, v.shutWhy})
	if err := v.openCutover(plan); err != nil {
		return nil, errors.Join(err, v.Close())
	}
	if v.source != nil {
		v.source.start()
	}
	ctx, cancel := context.WithCancel(context.Background())
	v.stopRep = cancel
	v.group.Go(func() { v.noteBoot(ctx) })
	v.group.Go(func() {
		if err := v.rep.Run(ctx); err != nil {
			o.Log.Error("the replica has ended", "err", err)
		}
	})
	return v, nil
}

func openSource(m Meta, o Options) (s *sourceSide, err error) {
	s = &sourceSide{link: newLink()}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
			s = nil
		}
	}()
	if s.cache, err = cache.New(o.FS, o.ScratchDir, cache.Options{
		ChunkBytes: m.ChunkBytes, Size: m.SizeBytes, Memory: o.Memory, ScratchBytes: o.ScratchBytes}); err != nil {
		return s, err
	}
	if s.volume, err = volume.Open(o.FS, path.Join(o.Dir, mapDir), volume.Options{
		Name: m.Volume, Size: m.SizeBytes, BlockSize: m.BlockBytes, ChunkBytes: m.ChunkBytes, SourceID: m.SourceID,
		Store: o.Store, Key: o.Key, Tier: s.cache, SkipFree: o.SkipFree, Log: o.Log}); err != nil {
		return s, err
	}
	s.sched = sched.New(s.link, s.volume.Deliver, sched.Options{ChunkBytes: m.ChunkBytes, Limiter: o.Limiter, Ready: o.Ready,
		Here: s.volume.Here})
	s.volume.SetRemote(remote{s.sched, s.link})
	if s.tracker, err = converge.OpenTracker(o.FS, path.Join(o.Dir, marksName), block.NewChecked("map "+m.Volume, s.volume),
		converge.TrackerOptions{BootID: bootID(), Log: o.Log}); err != nil {
		return s, err
	}
	if s.journal, err = journal.Open(o.FS, path.Join(o.Dir, journalDir), s.tracker, journal.Options{Log: o.Log}); err != nil {
		return s, err
	}
	s.patience = newPatience(s.journal, o.Log, spaceRetry)
	s.pump = fill.New(s.volume, s.sched, fill.Options{Chunks: s.volume.Chunks(), ChunkBytes: int64(m.ChunkBytes),
		Paused: o.FillPaused, Limit: o.FillLimit, Hold: o.Hold, Log: o.Log})
	return s, nil
}

// remote is a volume's way to its source: chunks through the scheduler,
// extents straight through the link, which keeps them apart from the queue.
type remote struct {
	*sched.Scheduler
	link *link
}

// Extents asks the source.
func (r remote) Extents(ctx context.Context, dst []block.Extent, off, n int64, f block.Flags) ([]block.Extent, error) {
	return r.link.Extents(ctx, dst, off, n, f)
}

func (s *sourceSide) start() {
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	s.group.Go(func() { s.pump.Run(ctx) })
}

// stop ends the fill and the way to the link; the disk side stays.
func (s *sourceSide) stop() {
	if s.cancel != nil {
		s.cancel()
	}
	if s.sched != nil {
		_ = s.sched.Close() // it has nothing to fail with
	}
	s.group.Wait()
}

// Close ends what runs beside the stack, then closes it from the top; the
// journal closes what is below it. It may be called again.
func (s *sourceSide) Close() error {
	s.once.Do(func() {
		s.stop()
		var errs []error
		switch {
		case s.journal != nil:
			errs = append(errs, s.journal.Close())
		case s.tracker != nil:
			errs = append(errs, s.tracker.Close())
		case s.volume != nil:
			errs = append(errs, s.volume.Close())
		}
		if s.cache != nil {
			errs = append(errs, s.cache.Close())
		}
		s.err = errors.Join(errs...)
	})
	return s.err
}

// Attach gives the volume its far end. A source that is not the one the volume
// was made from is refused, and the volume goes on without.
func (v *Volume) Attach(r *wire.Remote) error {
	if v.source == nil {
		return nil
	}
	if err := v.meta.checkChange(r); err != nil {
		return err
	}
	v.source.sched.SetPaced(r.Paced())
	v.source.link.attach(r)
	if !v.source.volume.Filled() {
		r.Announce(v.source.volume)
	}
	return nil
}

// Switched says whether the native target is primary.
func (v *Volume) Switched() bool { return v.plan().OnTarget() }

// Seen notes that a client has come.
func (v *Volume) Seen() { v.seen.Store(true) }

// Near says cheaply whether a read would be answered without the link.
func (v *Volume) Near(off, n int64) bool {
	return v.source == nil || v.Switched() || v.source.volume.Near(off, n)
}

// Close ends everything that runs, makes what is written durable and closes.
func (v *Volume) Close() error {
	v.stopCutover()
	if v.rep != nil && v.opts.Pair != nil && !v.Switched() && !v.shut.Load() {
		// An orderly stop: the other node goes on at once, rather than find out.
		ctx, cancel := context.WithTimeout(context.Background(), yieldTime)
		if err := v.rep.Yield(ctx); err != nil {
			v.opts.Log.Info("the volume was not handed over before the stop", "why", err)
		}
		cancel()
	}
	if v.source != nil {
		v.source.stop() // readers that wait for the link are told, and let the gate drain
	}
	if v.stopRep != nil {
		v.stopRep()
		v.group.Wait()
	}
	var err error
	if v.Checked != nil {
		err = v.Checked.Close()
	}
	return err
}
