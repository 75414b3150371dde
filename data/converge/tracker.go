package converge

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"forerun/block"
	"forerun/disk"
)

// DefaultGrain is the unit of marks in bytes. Small random writes converge
// the better the smaller it is; a TiB written all over takes 8 MiB of marks.
const DefaultGrain = 16 << 10

// TrackerOptions of a Tracker.
type TrackerOptions struct {
	// Grain is the unit of marks: a power of two from 4 KiB to 1 MiB; default DefaultGrain.
	Grain int64
	// BootID names the run of the operating system (/proc/sys/kernel/random/boot_id).
	// Marks of an unclean stop are trusted only within the same run. Empty
	// means unknown: then only those of a clean stop are.
	BootID string
	Log    *slog.Logger // changes of state; nil for none
}

// Tracker is a storey that remembers what is written while a copy is under
// way. It is a block.Device and stands below the journal and above the volume:
// what the journal replays is marked again. While nothing is tracked it costs
// one comparison a write.
type Tracker struct {
	below block.Device
	info  block.Info
	fs    disk.FS
	path  string
	opt   TrackerOptions
	log   *slog.Logger

	on atomic.Bool

	save sync.Mutex // one writer of the file at a time; before mu

	mu      sync.Mutex
	id      planID
	dirty   *bitmap // written since the last Take
	taken   *bitmap // being copied, not yet flushed on the target
	claimed int64   // the first pass has begun to read below this offset; what is behind needs no mark
	swept   int64   // the first pass has copied and flushed below this offset
	gen     uint64  // changes with what the file should say
	saved   uint64  // gen of the file
	lost    bool    // the file could not be written and was removed
}

var _ block.Device = (*Tracker)(nil)

// OpenTracker puts a tracker above below, with its marks in the file at path.
// When the file says that a copy was under way and can be trusted, tracking
// goes on at once; else the file is removed and Job copies anew.
func OpenTracker(fsys disk.FS, path string, below block.Device, opt TrackerOptions) (*Tracker, error) {
	if opt.Grain == 0 {
		opt.Grain = DefaultGrain
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	if !validGrain(opt.Grain) {
		return nil, block.E("tracker.open", path, block.KindInvalid, errGrain)
	}
	t := &Tracker{below: below, info: below.Info(), fs: fsys, path: path, opt: opt,
		log: opt.Log.With("tracker", path), dirty: newBitmap(), taken: newBitmap()}
	m, err := loadMarks(fsys, path)
	switch {
	case block.KindOf(err) == block.KindNotFound:
		return t, nil
	case block.KindOf(err) == block.KindCorrupt:
		t.log.Warn("the marks of an unfinished copy are damaged; it begins anew", "error", err)
		return t, t.remove()
	case err != nil:
		return nil, err
	case m.size != t.info.Size:
		t.log.Warn("the marks of an unfinished copy are those of a volume of another size; it begins anew")
		return t, t.remove()
	case !m.clean && (m.boot != opt.BootID || opt.BootID == ""):
		t.log.Info("the machine was restarted during a copy; it begins anew")
		return t, t.remove()
	}
	t.opt.Grain = m.grain
	t.id, t.taken, t.swept, t.claimed = m.id, m.bits, m.swept, m.swept
	t.on.Store(true)
	// Before anything is written: this run of the system is in the file, and that it is open.
	t.gen++
	if err := t.persist(false); err != nil {
		return nil, err
	}
	return t, nil
}

func (t *Tracker) remove() error {
	err := t.fs.Remove(t.path)
	if block.KindOf(err) == block.KindNotFound {
		return nil
	}
	if err == nil {
		err = t.fs.SyncDir(dirOf(t.path))
	}
	if err != nil {
		return block.E("tracker.remove", t.path, 0, err)
	}
	return nil
}

// persist writes the file if it should say something else than it does. When
// it cannot be written, it is removed: a missing file means a copy from the
// beginning, an old one would mean lost marks.
func (t *Tracker) persist(clean bool) error {
	t.save.Lock()
	defer t.save.Unlock()
	if !t.on.Load() {
		return nil
	}
	t.mu.Lock()
	gen := t.gen
	if gen == t.saved && !clean {
		t.mu.Unlock()
		return nil
	}
	m := marksHeader{id: t.id, clean: clean, boot: t.opt.BootID, grain: t.opt.Grain, size: t.info.Size, swept: t.swept}
	keys := slices.Collect(maps.Keys(t.dirty.pages))
	for k := range t.taken.pages {
		if t.dirty.pages[k] == nil {
			keys = append(keys, k)
		}
	}
	t.mu.Unlock()
	slices.Sort(keys)
	// Pages are read while writes go on. A mark made meanwhile may be in the file
	// or not; all that were there at the beginning are, unless their grains have
	// been copied since.
	err := saveMarks(t.fs, t.path, m, keys, func(k int64, p *page) {
		t.mu.Lock()
		defer t.mu.Unlock()
		*p = page{}
		for _, b := range [...]*bitmap{t.dirty, t.taken} {
			if q := b.pages[k]; q != nil {
				for i, w := range q {
					p[i] |= w
				}
			}
		}
	})
	if err == nil {
		t.mu.Lock()
		t.saved = gen
		if t.lost {
			t.lost = false
			t.log.Info("the marks can be kept again")
		}
		t.mu.Unlock()
		return nil
	}
	if rerr := t.remove(); rerr != nil {
		return rerr
	}
	t.mu.Lock()
	if !t.lost {
		t.lost = true
		t.log.Warn("the marks of the copy cannot be kept; after a restart it would begin anew", "error", err)
	}
	t.mu.Unlock()
	return nil
}

// mark remembers [off, off+n) if it is tracked. It is called after the bytes
// were handed to the device below, whether that succeeded or not.
func (t *Tracker) mark(off, n int64) {
	if !t.on.Load() {
		return
	}
	t.mu.Lock()
	if end := min(off+n, t.claimed); off < end {
		if t.dirty.set(off/t.opt.Grain, (end+t.opt.Grain-1)/t.opt.Grain) > 0 {
			t.gen++
		}
	}
	t.mu.Unlock()
}

// begin tracks from now on for the plan with that id, with nothing copied yet.
func (t *Tracker) begin(id planID) error {
	if err := t.end(); err != nil {
		return err
	}
	t.mu.Lock()
	t.id, t.dirty, t.taken, t.claimed, t.swept = id, newBitmap(), newBitmap(), 0, 0
	t.gen++
	t.mu.Unlock()
	t.on.Store(true) // a write that has not seen this is applied, and will be read
	return t.persist(false)
}

// end stops tracking and forgets the marks.
func (t *Tracker) end() error {
	t.save.Lock()
	defer t.save.Unlock()
	t.on.Store(false)
	t.mu.Lock()
	t.dirty, t.taken, t.id = newBitmap(), newBitmap(), planID{}
	t.mu.Unlock()
	return t.remove()
}

// tracks says whether marks are kept for the plan with that id.
func (t *Tracker) tracks(id planID) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.on.Load() && t.id == id
}

// changeset is how many bytes are to be copied at least: marked grains and
// what the first pass has not reached.
func (t *Tracker) changeset() int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return (t.dirty.n+t.taken.n)*t.opt.Grain + t.info.Size - t.claimed
}

// take moves all marks to the set being copied and returns it; it is not
// changed before settle.
func (t *Tracker) take() *bitmap {
	t.mu.Lock()
	defer t.mu.Unlock()
	// A new bitmap: what was returned before may still be looked at.
	all := newBitmap()
	all.merge(t.dirty)
	all.merge(t.taken)
	t.dirty, t.taken = newBitmap(), all
	return all
}

// claim says that the first pass is about to read up to that offset.
func (t *Tracker) claim(to int64) {
	t.mu.Lock()
	t.claimed = max(t.claimed, to)
	t.mu.Unlock()
}

// rewind says that the first pass starts again where it was settled, and
// returns that offset.
func (t *Tracker) rewind() int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.claimed = t.swept
	return t.swept
}

// settle says that the target durably has what was taken (when all is set) and
// everything below swept.
func (t *Tracker) settle(swept int64, all bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.swept = max(t.swept, swept)
	if all {
		t.taken = newBitmap()
	}
	t.gen++
}

// Info is that of the device below.
func (t *Tracker) Info() block.Info { return t.info }

// ReadAt passes on.
func (t *Tracker) ReadAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	return t.below.ReadAt(ctx, p, off, f)
}

// WriteAt passes on, then marks.
func (t *Tracker) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	err := t.below.WriteAt(ctx, p, off, f)
	t.mark(off, int64(len(p)))
	return err
}

// Zero passes on, then marks.
func (t *Tracker) Zero(ctx context.Context, off, n int64, f block.Flags) error {
	err := t.below.Zero(ctx, off, n, f)
	t.mark(off, n)
	return err
}

// Trim passes on, then marks.
func (t *Tracker) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	err := t.below.Trim(ctx, off, n, f)
	t.mark(off, n)
	return err
}

// Flush keeps the marks, then passes on.
func (t *Tracker) Flush(ctx context.Context, f block.Flags) error {
	if err := t.persist(false); err != nil {
		return err
	}
	return t.below.Flush(ctx, f)
}

// Extents passes on.
func (t *Tracker) Extents(ctx context.Context, dst []block.Extent, off, n int64, f block.Flags) ([]block.Extent, error) {
	return t.below.Extents(ctx, dst, off, n, f)
}

// Prefetch passes on.
func (t *Tracker) Prefetch(ctx context.Context, off, n int64, f block.Flags) error {
	return t.below.Prefetch(ctx, off, n, f)
}

// Close keeps the marks as those of a clean stop and closes the device below.
func (t *Tracker) Close() error {
	err := t.persist(true)
	if cerr := t.below.Close(); err == nil {
		err = cerr
	}
	return err
}
