package store

import (
	"crypto/rand"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
	"forerun/data/store/internal/runs"
	"forerun/disk"
	"forerun/internal/chunk"
)

// Options of Open; the zero value means the defaults.
type Options struct {
	// PackBytes is how large a pack grows, 256 MiB by default, at most 16 GiB.
	PackBytes int64
	// CheckpointBytes is how much is written to packs between two writes of the
	// block map, 64 MiB by default. After a crash Open reads about that much.
	CheckpointBytes int64
	// MapEntries is how many new entries the block map keeps in memory at most
	// before it is written, 32768 by default (about 5 MiB, twice that while writing).
	MapEntries int
	// OpenPacks is how many packs are kept open for reading, 128 by default.
	OpenPacks int
	// LimitBytes bounds the packs together; 0 for no bound. When they are larger,
	// the packs that were read longest ago are removed with all their chunks, so
	// whoever refers to a chunk must be able to fetch it again. With a bound,
	// PackBytes is by default at most a 16th of it; it must not be more than half. The
	// bound may be exceeded by a pack for a moment, and the block map comes on top.
	LimitBytes int64
	// SweepBelow is the share of a pack, between 0 and 1, that must be live for
	// Sweep to leave it alone; 0.5 by default.
	SweepBelow float64
	// Key is that of the store's dedup domain; the zero Key is the common one. A
	// store is one domain: opened with another key it is refused (KindInvalid).
	Key chunk.Key
	// Verify has Put open each chunk, which verifies its signature.
	Verify bool
	// OnAdd is told of each chunk that is held from now on, a recipe after its
	// pieces; OnGone of those that are not held any more: deleted, swept, evicted
	// or found damaged. The slice is the callback's. A region whose pieces went
	// counts as gone when somebody asks for it. What Open finds is not told, see
	// Each, nor what went with a damaged part of a pack.
	//
	// Both are called by one goroutine of the store, in the order of the changes
	// and soon after them. They may call the store, but not Close, which returns
	// after the last of them.
	OnAdd  func(chunk.Sig)
	OnGone func([]chunk.Sig)
	// Log gets changes of state; nil for none.
	Log *slog.Logger

	inline bool // tests: no goroutine, work that may wait is done in Put
}

func (o Options) withDefaults() (Options, error) {
	def := func(v *int64, d int64) {
		if *v == 0 {
			*v = d
		}
	}
	if o.LimitBytes > 0 {
		def(&o.PackBytes, max(4096, min(256<<20, o.LimitBytes/16)))
	}
	def(&o.PackBytes, 256<<20)
	def(&o.CheckpointBytes, 64<<20)
	if o.MapEntries == 0 {
		o.MapEntries = 32 << 10
	}
	if o.OpenPacks == 0 {
		o.OpenPacks = 128
	}
	if o.SweepBelow == 0 {
		o.SweepBelow = 0.5
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.PackBytes < 4096 || o.PackBytes > 16<<30 || o.CheckpointBytes < 0 || o.MapEntries < 1 || o.OpenPacks < 1 ||
		o.LimitBytes < 0 || o.LimitBytes > 0 && o.PackBytes > o.LimitBytes/2 || !(o.SweepBelow > 0 && o.SweepBelow <= 1) {
		return o, fmt.Errorf("options out of range: packs of %d bytes (4096 to 16 GiB) of at most %d together (0, or twice a pack or more), checkpoints after %d bytes or %d entries, %d open packs, sweep below %v",
			o.PackBytes, o.LimitBytes, o.CheckpointBytes, o.MapEntries, o.OpenPacks, o.SweepBelow)
	}
	return o, nil
}

// Store is the chunks of a site. All methods may be called from many
// goroutines; after Close they fail with KindClosed (Has answers false).
type Store struct {
	fs      disk.FS
	dir     string
	packDir string
	mapDir  string
	opt     Options
	log     *slog.Logger
	lock    disk.File
	id      storeID
	bufs    buffers
	count   counters

	gate    sync.RWMutex
	closed  bool // gate
	closing atomic.Bool
	evictMu sync.Mutex
	size    atomic.Int64 // bytes of all packs
	news    *notices     // nil: nobody listens
	maint   sync.Mutex
	bundles sync.RWMutex // PutBundle holds it for reading, the begin of a sweep for writing
	lists   sync.Pool    // *[]chunk.Packed, the pieces of a recipe

	repairAt time.Time // maint

	// Guarded by syncMu; ver, imm and last change with mu held too.
	syncMu     sync.Mutex
	durable    uint64  // seq up to which everything is durable
	suspects   []*pack // packs with records that a failed sync may have lost; appends also with appendMu
	moved      []*pack // those whose chunks were copied, to be cut after the next good sync
	nextRun    uint32
	mapGen     uint64
	last       snapshot // of the last checkpoint
	ckptFailed bool

	// Guarded by appendMu.
	appendMu sync.Mutex
	active   *pack
	dirty    []*pack // written, or left by an earlier process, since they were synced

	// Guarded by mu.
	mu       sync.RWMutex
	packs    map[uint32]*pack
	nextPack uint32 // and appendMu
	mem, imm map[chunk.Sig]runs.Loc
	ver      *version
	gen      uint64 // counts changes of ver and imm
	seq      uint64 // counts what a Sync has to make durable
	drops    int    // deletions in mem
	flights  map[chunk.Sig]*flight
	sweep    *sweep

	tail       atomic.Int64 // bytes appended since the last checkpoint
	retryAt    atomic.Int64 // when a failed checkpoint is tried again, Unix nanoseconds
	mapDamaged atomic.Bool
	replaying  *position // Open only: up to where the log was read
	building   bool      // Open only: the map is being built from the packs

	fileMu sync.Mutex
	idle   *sync.Cond // a removed pack has no reader any more
	open   []*pack
	tick   uint64

	kick chan struct{}
	stop chan struct{}
	kept chan struct{}
}

// Open opens the store in dir and makes one if there is none. It locks dir:
// KindBusy means that another process has it. What an earlier process put is
// there, after a power cut at least what it had synced. A block map that is
// missing or damaged is built from the packs, which reads all of them.
func Open(fs disk.FS, dir string, opt Options) (*Store, error) {
	const op = "store.open"
	opt, err := opt.withDefaults()
	if err != nil {
		return nil, block.E(op, dir, block.KindInvalid, err)
	}
	s := &Store{
		fs: fs, dir: dir, packDir: dir + "/packs", mapDir: dir + "/map", opt: opt, log: opt.Log.With("store", dir),
		packs: map[uint32]*pack{}, mem: map[chunk.Sig]runs.Loc{}, ver: newVersion(nil), flights: map[chunk.Sig]*flight{},
		nextPack: 1, nextRun: 1,
		kick: make(chan struct{}, 1), stop: make(chan struct{}), kept: make(chan struct{}),
	}
	s.idle = sync.NewCond(&s.fileMu)
	s.lists.New = func() any { return new([]chunk.Packed) }
	if _, err := rand.Read(s.id[:]); err != nil {
		return nil, block.E(op, dir, block.KindIO, err)
	}
	for _, d := range []string{dir, s.packDir, s.mapDir} {
		if err := fs.MkdirAll(d); err != nil {
			return nil, block.E(op, dir, block.KindNone, err)
		}
	}
	if s.lock, err = fs.Lock(dir + "/lock"); err != nil {
		if block.KindOf(err) == block.KindBusy {
			err = fmt.Errorf("another process has this store open: %w", err)
		}
		return nil, block.E(op, dir, block.KindNone, err)
	}
	if err := s.recover(); err != nil {
		s.closeFiles()
		return nil, block.E(op, dir, block.KindNone, err)
	}
	for _, p := range s.packs {
		s.size.Add(p.end)
	}
	s.news = newNotices(opt.OnAdd, opt.OnGone)
	if opt.inline {
		close(s.kept)
	} else {
		go s.keeper()
	}
	s.evictIfOver()
	return s, nil
}

// enter begins a call; the caller unlocks gate for reading when it is over.
func (s *Store) enter(op string) error {
	s.gate.RLock()
	if s.closed {
		s.gate.RUnlock()
		return &block.Error{Op: op, Object: s.dir, Kind: block.KindClosed}
	}
	return nil
}

// Close waits for calls under way (a Sweep ends early), makes everything
// durable and closes the store. An error means that the last part could not
// be made durable; the store is closed in any case.
func (s *Store) Close() error {
	s.closing.Store(true)
	err := s.closeAll()
	s.news.end() // without the gate: a callback may be waiting for it
	return err
}

func (s *Store) closeAll() error {
	s.gate.Lock()
	defer s.gate.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	s.stopKeeper()
	s.syncMu.Lock()
	err := s.checkpointLocked()
	s.syncMu.Unlock()
	s.closeFiles()
	if err != nil {
		return block.E("store.close", s.dir, block.KindNone, err)
	}
	return nil
}

func (s *Store) stopKeeper() {
	close(s.stop)
	<-s.kept
}

func (s *Store) closeFiles() {
	for _, p := range s.packs {
		if p.w != nil {
			p.w.Close()
			p.w = nil
		}
		if p.file != nil {
			p.file.Close()
			p.file = nil
		}
	}
	s.open = nil
	if s.ver != nil {
		s.release(s.ver)
		s.ver = nil
	}
	s.lock.Close()
}
