package volume

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"path"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
	"forerun/disk"
	"forerun/internal/chunk"
)

// Store keeps sealed chunks by signature, for all volumes of a site.
type Store interface {
	// Put keeps p, copying its data, and says whether it was new. A full disk is KindNoSpace.
	Put(p chunk.Packed) (bool, error)
	// Get fills dst with the plain bytes of the chunk, verified. A chunk that
	// is not there is KindNotFound, a damaged one KindCorrupt.
	Get(sig chunk.Sig, dst []byte) error
	// PutBundle keeps a chunk that comes in pieces, and fills dst with its
	// plain bytes, verified; also if it can then not be kept (KindNoSpace, KindIO).
	// KindNotFound: a piece is not there that came without its bytes.
	PutBundle(p chunk.Packed, dst []byte) error
	// Has says whether the chunk is there, as far as that can be said without
	// reading it. One that is said to be there stays until it is referred to,
	// unless space has to be made.
	Has(sig chunk.Sig) bool
	// Sync makes every chunk put before durable.
	Sync() error
}

// Tier is a cache of plain chunks of this volume. It may forget anything at any time.
type Tier interface {
	// ReadAt fills p with the bytes of the chunk at off and says whether it could.
	ReadAt(p []byte, chunk int64, off int) bool
	// Put offers the plain bytes of a chunk, which stay the caller's.
	Put(chunk int64, plain []byte, f block.Flags)
	// Drop forgets a chunk.
	Drop(chunk int64)
}

// Remote asks the source.
type Remote interface {
	// Fetch has the chunks brought: it returns nil when each of them was handed
	// to Deliver by it or by a fetch under way for another caller, and else an
	// error, after some perhaps were.
	Fetch(ctx context.Context, idx []int64, f block.Flags) error
	// Extents appends what the source knows of [off, off+n), as block.Device does.
	Extents(ctx context.Context, dst []block.Extent, off, n int64, f block.Flags) ([]block.Extent, error)
}

// Options say what a volume is and what it stands on.
type Options struct {
	Name       string // for errors and logs
	Size       int64  // bytes, a multiple of BlockSize
	BlockSize  int    // a power of two up to 4096; 512 when it is less
	ChunkBytes int    // chunk.DefaultSize when 0
	SourceID   string // names the content's origin; a volume made for another one is not opened
	Store      Store
	Key        chunk.Key // of the dedup domain, whose signatures chunks come with
	Tier       Tier      // nil for none
	// SkipFree leaves chunks at the source that its file systems do not use:
	// they are not absent, Extents calls them block.Free, and reading one still asks the source.
	SkipFree bool
	Log      *slog.Logger
	Tune     Tuning
}

// Tuning are the figures of a volume that measurement decides. Zero values
// stand for the defaults.
type Tuning struct {
	// CommitEvery is how long what arrived may stay unrecorded: 500 ms.
	CommitEvery time.Duration
	// LogBytes is how long the map log grows before a checkpoint: 16 MiB, or
	// the length of the last snapshot if that is more.
	LogBytes int64
	// AheadFirst is how many chunks are asked for beyond a miss that continues
	// nothing: 1.
	AheadFirst int
	// AheadMax bounds the window of a run, in chunks: 16. Negative: no read-ahead.
	AheadMax int
	// AheadStreams is how many runs are followed at once: 32.
	AheadStreams int
}

func (o *Options) complete() error {
	if o.BlockSize < sectorBytes {
		o.BlockSize = sectorBytes
	}
	if o.ChunkBytes == 0 {
		o.ChunkBytes = chunk.DefaultSize
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Tier == nil {
		o.Tier = noTier{}
	}
	t := &o.Tune
	orDefault(&t.CommitEvery, 500*time.Millisecond)
	orDefault(&t.LogBytes, 16<<20)
	orDefault(&t.AheadFirst, 1)
	orDefault(&t.AheadMax, 16)
	orDefault(&t.AheadStreams, 32)
	switch {
	case o.Store == nil:
		return errors.New("a volume needs a store")
	case !power(o.BlockSize, sectorBytes, 1<<blockShift):
		return fmt.Errorf("block size %d is not a power of two up to 4096", o.BlockSize)
	case !power(o.ChunkBytes, chunk.MinSize, chunk.MaxSize):
		return fmt.Errorf("chunk size %d is not a power of two from %d to %d", o.ChunkBytes, chunk.MinSize, chunk.MaxSize)
	case o.Size <= 0 || o.Size%int64(o.BlockSize) != 0 || o.Size > maxSize:
		return fmt.Errorf("size %d is not a multiple of %d from there to %d", o.Size, o.BlockSize, int64(maxSize))
	case len(o.SourceID) > maxSourceID:
		return fmt.Errorf("the source's identity has %d bytes, at most %d are kept", len(o.SourceID), maxSourceID)
	}
	return nil
}

const (
	maxSize     = 1 << 50
	maxSourceID = 1024
)

func orDefault[T int | int64 | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

func power(n, lo, hi int) bool { return n >= lo && n <= hi && bits.OnesCount(uint(n)) == 1 }

type noTier struct{}

func (noTier) ReadAt([]byte, int64, int) bool { return false }
func (noTier) Put(int64, []byte, block.Flags) {}
func (noTier) Drop(int64)                     {}

const (
	stripes     = 1024
	regionBytes = 1 << 20
	arrivals    = 64
)

// stripe is the lock of the regions whose number modulo stripes is its index.
// seq counts in its low half the writers that are at it and in its high half those that were.
type stripe struct {
	mu  sync.RWMutex
	seq atomic.Uint64
	_   [32]byte // a cache line of its own
}

// Volume is a block.Device made of overlay, store, tier and source.
type Volume struct {
	opt     Options
	id      identity
	dir     string
	fs      disk.FS
	table   *table
	overlay *overlay
	sigs    *sigs
	lock    disk.File
	remote  atomic.Pointer[Remote]

	gate    gate
	regions []stripe
	arrive  [arrivals]sync.Mutex
	bufs    sync.Pool // *[]byte of a chunk
	misses  sync.Pool // *misses

	waitMu sync.Mutex
	waits  map[int64]*miss

	ahead ahead

	commitMu sync.Mutex
	maplog   mapLog

	stop context.CancelFunc // ends what runs by itself
	bg   sync.WaitGroup

	n counters
}

var _ block.Device = (*Volume)(nil)

// Open opens the volume in dir, or makes one there. It reads the map and cuts
// what a crash left torn; nothing of the source is needed.
//
// A directory that was made for another size, chunk size or source is
// KindInvalid; one that somebody else has open is KindBusy; a map or overlay that lost what was
// flushed is KindCorrupt.
func Open(fs disk.FS, dir string, o Options) (*Volume, error) {
	if err := o.complete(); err != nil {
		return nil, block.E("volume.open", o.Name, block.KindInvalid, err)
	}
	g := newGeometry(o.Size, o.ChunkBytes)
	v := &Volume{opt: o, dir: dir, fs: fs,
		id:      identity{size: o.Size, chunkBytes: o.ChunkBytes, source: o.SourceID},
		table:   newTable(g),
		overlay: newOverlay(fs, dir, o.Size),
		regions: make([]stripe, stripes),
		waits:   make(map[int64]*miss),
	}
	v.gate.init()
	v.bufs.New = func() any { b := make([]byte, o.ChunkBytes); return &b }
	v.misses.New = func() any { return new(misses) }
	if err := v.open(); err != nil {
		v.closeFiles()
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	v.stop = stop
	v.ahead.init(v, ctx)
	v.bg.Add(1)
	go v.commitLoop(ctx)
	return v, nil
}

func (v *Volume) open() (err error) {
	if err := v.fs.MkdirAll(v.dir); err != nil {
		return block.E("volume.open", v.dir, 0, err)
	}
	if err := v.fs.SyncDir(path.Dir(v.dir)); err != nil && block.KindOf(err) != block.KindDenied {
		return block.E("volume.open", path.Dir(v.dir), 0, err)
	}
	if v.lock, err = v.fs.Lock(path.Join(v.dir, "lock")); err != nil {
		return block.E("volume.open", v.dir, 0, fmt.Errorf("locking the volume's directory: %w", err))
	}
	if v.sigs, err = openSigs(v.fs, v.dir); err != nil {
		return err
	}
	if err := v.loadMap(); err != nil {
		return err
	}
	used := v.table.written()
	for n := range v.overlay.files {
		if err := v.overlay.adopt(n, used[n]); err != nil {
			return err
		}
	}
	return nil
}

// written returns, per overlay file, the end of what the masks say is in it.
func (t *table) written() []int64 {
	used := make([]int64, (t.size+1<<fileShift-1)>>fileShift)
	for pi := range t.pages {
		p := t.pages[pi].Load()
		if p == nil || p == t.zero {
			continue
		}
		for c := t.pageLen(pi) - 1; c >= 0; c-- {
			if n := p.nib(c); n&nibMod != 0 {
				i := int64(pi)<<pageShift + int64(c)
				start := i << t.shift
				end := start + int64(t.length(i))
				if n&nibFull == 0 {
					var m mask
					t.blockMask(p, c, 0, t.blocks, &m)
					s := t.sectors(i)
					for s > 0 && m[(s-1)>>6]>>uint((s-1)&63)&1 == 0 {
						s--
					}
					end = start + int64(s)<<sectorShift
				}
				f := start >> fileShift
				used[f] = max(used[f], end-f<<fileShift)
				break
			}
		}
	}
	return used
}

// SetRemote says whom to ask for what is not here. Nil: nobody, the volume
// stands alone.
func (v *Volume) SetRemote(r Remote) {
	if r == nil {
		v.remote.Store(nil)
		return
	}
	v.remote.Store(&r)
}

func (v *Volume) getRemote() Remote {
	if r := v.remote.Load(); r != nil {
		return *r
	}
	return nil
}

// Info describes the volume.
func (v *Volume) Info() block.Info {
	return block.Info{Size: v.opt.Size, BlockSize: v.opt.BlockSize, PreferredIO: v.opt.ChunkBytes,
		CanTrim: true, CanExtents: true, ID: v.opt.SourceID}
}

// ChunkBytes is the length of a chunk in bytes; the last may be shorter.
func (v *Volume) ChunkBytes() int { return v.opt.ChunkBytes }

// Chunks is the number of chunks.
func (v *Volume) Chunks() int64 { return v.table.chunks }

func (v *Volume) stripe(off int64) *stripe { return &v.regions[off/regionBytes%stripes] }

// regionEnd is the end of the region of off.
func regionEnd(off int64) int64 { return (off/regionBytes + 1) * regionBytes }

// lockChunk takes the region of chunk i shared.
func (v *Volume) lockChunk(i int64) *sync.RWMutex {
	mu := &v.stripe(i << v.table.shift).mu
	mu.RLock()
	return mu
}

func (v *Volume) enter(op string) error {
	if v.gate.enter() {
		return nil
	}
	return block.E(op, v.opt.Name, block.KindClosed, nil)
}

// check refuses what a map of sectors cannot express.
func (v *Volume) check(op string, off, n int64) error {
	if off < 0 || n <= 0 || off > v.opt.Size || n > v.opt.Size-off {
		return block.E(op, v.opt.Name, block.KindRange, fmt.Errorf("%d bytes at %d are not inside %d", n, off, v.opt.Size))
	}
	if (off|n)&int64(v.opt.BlockSize-1) != 0 {
		return block.E(op, v.opt.Name, block.KindInvalid, fmt.Errorf("%d bytes at %d are not aligned to %d", n, off, v.opt.BlockSize))
	}
	return nil
}

func (v *Volume) chunkName(i int64) string { return v.opt.Name + " chunk " + strconv.FormatInt(i, 10) }

func (v *Volume) buf(i int64) *[]byte {
	b := v.bufs.Get().(*[]byte)
	*b = (*b)[:v.table.length(i)]
	return b
}

// Close waits for calls under way and for the volume's own work, records what
// arrived, and closes the files. Writes since the last Flush stay the journal's.
func (v *Volume) Close() error {
	if !v.gate.close() {
		return nil
	}
	v.stop()
	v.ahead.wait()
	v.bg.Wait()
	err := v.commit(false)
	if err != nil {
		v.opt.Log.Warn("volume closed with chunks that arrived unrecorded; they are fetched again", "volume", v.opt.Name, "err", err)
	}
	return v.closeFiles()
}

func (v *Volume) closeFiles() error {
	err := v.overlay.close()
	if v.maplog.file != nil {
		err = errors.Join(err, v.maplog.file.Close())
	}
	if v.sigs != nil {
		err = errors.Join(err, v.sigs.Close())
	}
	if v.lock != nil {
		err = errors.Join(err, v.lock.Close())
	}
	if err != nil {
		return block.E("volume.close", v.opt.Name, 0, err)
	}
	return nil
}
