package journal

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
	"forerun/disk"
)

// Options of a Journal. The zero value of each field means its default.
type Options struct {
	SegmentBytes       int64         // size of a segment file; default 64 MiB, rounded up to 4 KiB, at least 64 KiB
	MaxBytes           int64         // most bytes of segments retained before writers wait; default 1 GiB, at least 4 segments
	CheckpointBytes    int64         // appended bytes after which a checkpoint is made; default 256 MiB, at most MaxBytes/4
	CheckpointInterval time.Duration // longest time between checkpoints while there are writes; default 30 s
	InFlight           int           // most writes under way; default 256
	Log                *slog.Logger  // changes of state; nil for none
}

func (o Options) withDefaults() Options {
	set := func(v *int64, d int64) {
		if *v <= 0 {
			*v = d
		}
	}
	set(&o.SegmentBytes, 64<<20)
	o.SegmentBytes = max(64<<10, (o.SegmentBytes+4095)&^4095)
	set(&o.MaxBytes, 1<<30)
	o.MaxBytes = max(o.MaxBytes, 4*o.SegmentBytes)
	set(&o.CheckpointBytes, 256<<20)
	o.CheckpointBytes = min(o.CheckpointBytes, o.MaxBytes/4)
	if o.CheckpointInterval <= 0 {
		o.CheckpointInterval = 30 * time.Second
	}
	if o.InFlight <= 0 {
		o.InFlight = 256
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

// Journal is a storey that makes writes durable by a log. It is a block.Device;
// see the package comment for what it promises.
type Journal struct {
	fs    disk.FS
	dir   string
	below block.Device
	info  block.Info
	opt   Options
	piece int // most payload bytes in one record
	log   *slog.Logger
	lock  disk.File

	life   sync.RWMutex // held for reading during each call
	closed bool         // guarded by life
	stop   chan struct{}
	base   context.Context // ends when Close begins
	end    context.CancelFunc
	keeper sync.WaitGroup
	kick   chan struct{} // asks the keeper to look

	free   chan *op
	ranges ranges

	ckpt sync.Mutex // one checkpoint at a time; before mu

	mu       sync.Mutex
	segs     []*segment // oldest first; the last one is the newest
	spares   []spare
	nextID   uint64
	pos      Position // of the last record appended; written by the leader only
	applied  uint64   // durable in the device below up to here
	safe     uint64   // a flush up to here needs nothing more
	reserved int64    // bytes of records admitted but not yet appended
	leading  bool
	wanted   bool // the keeper waits to lead next
	queue    []*op
	batch    []*op // the queue's other slice, owned by the leader
	syncing  bool
	syncSegs []*segment // owned by whoever set syncing
	failed   error      // set once, refuses writes and flushes
	doubtful error      // set once: the device below failed to flush
	stuck    error      // why the last checkpoint failed, nil when it did not
	holds    map[string]Position
	waiting  int // writers waiting for space

	lead1    bell // leading became false or was handed to the keeper
	synced   bell // a sync ended
	space    bell // segments were removed, a checkpoint failed, or it closes
	arrived  bell // records were appended
	drained  bell // a segment has no pending records left
	readers  int  // waiting for arrived
	holdsNow bool // the holds file differs from holds

	// Owned by the leader.
	cur *segment
	buf []byte

	claim atomic.Uint64 // the journal is synced up to here
	tight atomic.Bool   // the disk is full: holds give way
	since atomic.Int64  // bytes appended since the last checkpoint
	stats counters
}

var _ block.Device = (*Journal)(nil)

// bell wakes all who wait on it. It is guarded by the mutex of what it tells
// about, and allocates only when somebody waits.
type bell struct{ ch chan struct{} }

func (b *bell) wait() <-chan struct{} {
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}

func (b *bell) ring() {
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}

// Open opens the journal in dir of fs, creating it when there is none, and
// replays what it retains into below before it returns. The journal owns below
// from then on: nobody else may write to it, and Close closes it. When Open
// fails, below stays the caller's.
//
// Errors: KindBusy when another process has the journal open, KindCorrupt
// when bytes that had been promised are damaged, KindUnsupported for a format
// of a newer version, and whatever below answers to the replay.
func Open(fsys disk.FS, dir string, below block.Device, opt Options) (*Journal, error) {
	j := &Journal{
		fs: fsys, dir: dir, below: below, info: below.Info(), opt: opt.withDefaults(),
		stop: make(chan struct{}), kick: make(chan struct{}, 1),
		holds: map[string]Position{}, nextID: 1,
	}
	j.log = j.opt.Log.With("journal", dir)
	j.piece = int(min(maxPayload, (j.opt.SegmentBytes-segHeader)/4)) &^ 4095
	j.buf = make([]byte, 0, min(groupBytes, j.opt.SegmentBytes)+recHeader+2*pageSize)
	j.free = make(chan *op, j.opt.InFlight)
	for range j.opt.InFlight {
		o := &op{wake: make(chan struct{}, 1)}
		o.self[0] = o
		j.free <- o
	}
	j.base, j.end = context.WithCancel(context.Background())
	if err := fsys.MkdirAll(dir); err != nil {
		return nil, block.E("journal.open", dir, 0, err)
	}
	lock, err := fsys.Lock(path.Join(dir, "lock"))
	if err != nil {
		if block.KindOf(err) == block.KindBusy {
			err = errors.New("another process has this journal open; stop it first")
			return nil, block.E("journal.open", dir, block.KindBusy, err)
		}
		return nil, block.E("journal.open", dir, 0, err)
	}
	j.lock = lock
	if err := j.recover(); err != nil {
		j.end()
		j.release()
		return nil, err
	}
	j.keeper.Go(j.keep)
	return j, nil
}

// release closes all files.
func (j *Journal) release() {
	for _, s := range j.segs {
		s.file.Close()
	}
	for _, s := range j.spares {
		s.file.Close()
	}
	j.segs, j.spares = nil, nil
	j.lock.Close()
}

// enter begins a call; every nil answer is followed by life.RUnlock.
func (j *Journal) enter(op string) error {
	j.life.RLock()
	if j.closed {
		j.life.RUnlock()
		return block.E("journal."+op, j.dir, block.KindClosed, nil)
	}
	return nil
}

// Info returns that of the device below.
func (j *Journal) Info() block.Info { return j.info }

// ReadAt passes to the device below, which has every acknowledged write.
func (j *Journal) ReadAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	if err := j.enter("read"); err != nil {
		return err
	}
	defer j.life.RUnlock()
	return j.below.ReadAt(ctx, p, off, f)
}

// Extents passes to the device below.
func (j *Journal) Extents(ctx context.Context, dst []block.Extent, off, n int64, f block.Flags) ([]block.Extent, error) {
	if err := j.enter("extents"); err != nil {
		return dst, err
	}
	defer j.life.RUnlock()
	return j.below.Extents(ctx, dst, off, n, f)
}

// Prefetch passes to the device below.
func (j *Journal) Prefetch(ctx context.Context, off, n int64, f block.Flags) error {
	if err := j.enter("prefetch"); err != nil {
		return err
	}
	defer j.life.RUnlock()
	return j.below.Prefetch(ctx, off, n, f)
}

// Position is that of the last record appended.
func (j *Journal) Position() Position {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.pos
}

// Close waits for calls under way, then closes the files and the device
// below. It syncs nothing: opening replays.
func (j *Journal) Close() error {
	j.mu.Lock()
	select {
	case <-j.stop:
	default:
		j.end()
		close(j.stop) // ends the waits of writers and of the keeper
	}
	j.mu.Unlock()
	j.keeper.Wait()
	j.life.Lock()
	defer j.life.Unlock()
	if j.closed {
		return nil
	}
	j.closed = true
	j.release()
	return j.below.Close()
}

// segName is the name of the segment with that id.
func segName(id uint64) string { return fmt.Sprintf("%016x.seg", id) }
