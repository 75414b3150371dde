package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"forerun/block"
	"forerun/disk"
	"forerun/disk/disktest"
	"forerun/internal/chunk"
)

// memStore is a store in memory that remembers what was synced.
type memStore struct {
	mu     sync.Mutex
	all    map[chunk.Sig]chunk.Packed
	synced map[chunk.Sig]bool
	// of chunks cut by content
	pieces, regions map[chunk.Sig][]byte

	full   bool
	noSync error
	puts   int
	trace  func(string)
}

func newMemStore() *memStore {
	return &memStore{all: map[chunk.Sig]chunk.Packed{}, synced: map[chunk.Sig]bool{},
		pieces: map[chunk.Sig][]byte{}, regions: map[chunk.Sig][]byte{}}
}

func (s *memStore) Put(p chunk.Packed) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.full {
		return false, block.E("store.put", "", block.KindNoSpace, nil)
	}
	s.puts++
	_, had := s.all[p.Sig]
	p.Data = bytes.Clone(p.Data)
	s.all[p.Sig] = p
	return !had, nil
}

func (s *memStore) Get(sig chunk.Sig, dst []byte) error {
	s.mu.Lock()
	p, ok := s.all[sig]
	region, cut := s.regions[sig]
	s.mu.Unlock()
	if cut {
		copy(dst, region)
		return nil
	}
	if !ok {
		return block.E("store.get", sig.String(), block.KindNotFound, nil)
	}
	if err := p.Open(dst); err != nil {
		s.mu.Lock()
		delete(s.all, sig)
		s.mu.Unlock()
		return block.E("store.get", sig.String(), block.KindCorrupt, err)
	}
	return nil
}

// PutBundle keeps the whole chunk, packed anew; real pieces are the store's affair.
func (s *memStore) PutBundle(p chunk.Packed, dst []byte) error {
	_, pieces, err := chunk.ParseBundle(&chunk.Key{}, p, nil)
	if err != nil {
		return block.E("store.put", "", block.KindCorrupt, err)
	}
	s.mu.Lock()
	full := s.full
	for at, to := 0, 0; at < len(pieces); at++ {
		q := pieces[at]
		from := to
		to += q.Plain
		if q.Codec == chunk.Known {
			had, ok := s.pieces[q.Sig]
			if !ok {
				s.mu.Unlock()
				return block.E("store.put", "", block.KindNotFound, nil)
			}
			copy(dst[from:to], had)
		} else if err := q.Open(dst[from:to]); err != nil {
			s.mu.Unlock()
			return block.E("store.put", "", block.KindCorrupt, err)
		}
		if !full {
			s.pieces[q.Sig] = bytes.Clone(dst[from:to])
		}
	}
	defer s.mu.Unlock()
	if full {
		return block.E("store.put", "", block.KindNoSpace, nil)
	}
	s.puts++
	s.regions[p.Sig] = bytes.Clone(dst)
	return nil
}

func (s *memStore) Has(sig chunk.Sig) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.all[sig]
	_, region := s.regions[sig]
	return ok || region
}

func (s *memStore) Sync() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.trace != nil {
		s.trace("store.sync")
	}
	if s.noSync != nil {
		return s.noSync
	}
	for k := range s.all {
		s.synced[k] = true
	}
	return nil
}

// image is the store after a power cut: what was synced, and some of the rest.
func (s *memStore) image(seed uint64) *memStore {
	r := rand.New(rand.NewPCG(seed, 77))
	s.mu.Lock()
	defer s.mu.Unlock()
	n := newMemStore()
	for k, p := range s.all {
		if s.synced[k] || r.IntN(2) == 0 {
			n.all[k], n.synced[k] = p, true
		}
	}
	return n
}

// damage flips a byte of every chunk.
func (s *memStore) damage() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, p := range s.all {
		p.Data = bytes.Clone(p.Data)
		p.Data[len(p.Data)/2] ^= 1
		s.all[k] = p
	}
}

// mapTier keeps some of what it is given.
type mapTier struct {
	mu   sync.Mutex
	m    map[int64][]byte
	rnd  *rand.Rand
	keep int // of four puts
}

func newMapTier(seed uint64, keep int) *mapTier {
	return &mapTier{m: map[int64][]byte{}, rnd: rand.New(rand.NewPCG(seed, 5)), keep: keep}
}

func (t *mapTier) ReadAt(p []byte, i int64, off int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	b, ok := t.m[i]
	if !ok {
		return false
	}
	return copy(p, b[off:]) == len(p)
}

func (t *mapTier) Put(i int64, plain []byte, _ block.Flags) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.rnd.IntN(4) < t.keep {
		t.m[i] = bytes.Clone(plain)
	} else if len(t.m) > 0 && t.rnd.IntN(2) == 0 {
		for k := range maps.Keys(t.m) {
			delete(t.m, k)
			break
		}
	}
}

func (t *mapTier) Drop(i int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.m, i)
}

// remote is a source in memory.
type remote struct {
	v       *Volume
	content []byte
	cb      int
	codec   chunk.Codec
	down    atomic.Bool
	lie     atomic.Bool   // deliver other bytes
	bySig   atomic.Bool   // deliver signatures first, as a source that takes everything to be here
	delay   time.Duration // of each fetch
	bundles func(i int, held func(chunk.Sig) bool) chunk.Packed
	hold    chan struct{}        // fetches wait for it, when set
	free    func(off int64) bool // says which 4 KiB are free, when set

	mu      sync.Mutex
	fetches [][]int64
	flags   []block.Flags
	asked   atomic.Int64 // extents
	brought map[int64]int
}

func (r *remote) Fetch(ctx context.Context, idx []int64, f block.Flags) error {
	r.mu.Lock()
	r.fetches = append(r.fetches, append([]int64(nil), idx...))
	r.flags = append(r.flags, f)
	if r.brought == nil {
		r.brought = map[int64]int{}
	}
	for _, i := range idx {
		r.brought[i]++
	}
	hold := r.hold
	r.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return block.E("remote.fetch", "", 0, ctx.Err())
		}
	}
	if r.delay > 0 {
		time.Sleep(r.delay)
	}
	if r.down.Load() {
		return block.E("remote.fetch", "", block.KindUnavailable, errors.New("the link is down"))
	}
	var wg sync.WaitGroup
	errs := make([]error, len(idx))
	for k := range rand.Perm(len(idx)) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			errs[k] = r.deliver(idx[k])
		}()
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return ctx.Err()
}

func (r *remote) deliver(i int64) error {
	p := chunk.Seal(nil, r.content[i*int64(r.cb):min((i+1)*int64(r.cb), int64(len(r.content)))], r.codec)
	if r.bundles != nil {
		return r.v.Deliver(i, r.bundles(int(i), nil))
	}
	if r.bySig.Load() && p.Codec != chunk.Zeros {
		err := r.v.Deliver(i, chunk.Packed{Sig: p.Sig, Codec: chunk.Known, Plain: p.Plain})
		if block.KindOf(err) != block.KindNotFound {
			return err
		}
	}
	if r.lie.Load() && len(p.Data) > 0 {
		p.Data = bytes.Clone(p.Data)
		p.Data[0] ^= 0x55
	}
	return r.v.Deliver(i, p)
}

func (r *remote) Extents(_ context.Context, dst []block.Extent, off, n int64, _ block.Flags) ([]block.Extent, error) {
	r.asked.Add(1)
	if r.down.Load() {
		return dst, block.E("remote.extents", "", block.KindUnavailable, nil)
	}
	const grain = 4096
	for end := off + n; off < end; {
		stop := min(end, off&^(grain-1)+grain)
		e := block.Extent{Off: off, Len: stop - off}
		if chunk.AllZero(r.content[off:stop]) {
			e.Kind = block.Hole
			if off%(8*grain) == 0 {
				e.Kind = block.ZeroData
			}
		} else if r.free != nil && r.free(off) {
			e.Kind = block.Free
		}
		dst = block.AppendExtent(dst, e)
		off = stop
	}
	return dst, nil
}

// source is content with noise, text and zeros.
func source(seed uint64, size int) []byte {
	r := rand.New(rand.NewPCG(seed, 99))
	b := make([]byte, size)
	for at := 0; at < size; {
		n := min(size-at, 512*(1+r.IntN(200)))
		switch r.IntN(3) {
		case 0:
			for k := at; k < at+n; k++ {
				b[k] = byte(r.Uint32())
			}
		case 1:
			copy(b[at:at+n], bytes.Repeat([]byte(fmt.Sprintf("block %d ", at)), n/8+1))
		}
		at += n
	}
	return b
}

type rig struct {
	fs     disk.FS
	opt    Options
	store  *memStore
	remote *remote
	v      *Volume
}

func newRig(t testing.TB, fs disk.FS, content []byte, cb int) *rig {
	t.Helper()
	g := &rig{fs: fs, store: newMemStore()}
	g.remote = &remote{content: content, cb: cb, codec: chunk.S2}
	g.opt = Options{Name: "v", Size: int64(len(content)), ChunkBytes: cb, SourceID: "disk-1", Store: g.store,
		Tune: Tuning{CommitEvery: time.Hour, AheadMax: -1}}
	g.open(t)
	return g
}

func (g *rig) open(t testing.TB) {
	t.Helper()
	g.opt.Store = g.store
	v, err := Open(g.fs, "vol", g.opt)
	if err != nil {
		t.Fatal(err)
	}
	g.v, g.remote.v = v, v
	v.SetRemote(g.remote)
	t.Cleanup(func() { v.Close() })
}

func (g *rig) reopen(t testing.TB) {
	t.Helper()
	must(t, g.v.Close())
	g.open(t)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantKind(t testing.TB, err error, k block.Kind) {
	t.Helper()
	if block.KindOf(err) != k {
		t.Fatalf("got %v (%v), should be %v", err, block.KindOf(err), k)
	}
}

func (g *rig) write(t testing.TB, off int64, p []byte) {
	t.Helper()
	must(t, g.v.WriteAt(context.Background(), p, off, 0))
}

func (g *rig) read(t testing.TB, off, n int64) []byte {
	t.Helper()
	p := bytes.Repeat([]byte{0xa5}, int(n))
	must(t, g.v.ReadAt(context.Background(), p, off, 0))
	return p
}

func (g *rig) same(t testing.TB, want []byte) {
	t.Helper()
	got := g.read(t, 0, int64(len(want)))
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("byte %d is %#x, should be %#x", i, got[i], want[i])
		}
	}
}

func (g *rig) flush(t testing.TB) {
	t.Helper()
	must(t, g.v.Flush(context.Background(), 0))
}

// consistent checks the counters against the map, and the map against itself.
func consistent(t testing.TB, v *Volume) {
	t.Helper()
	var want counts
	for pi := range v.table.pages {
		p := v.table.pages[pi].Load()
		n := int64(v.table.pageLen(pi))
		switch p {
		case nil:
			want.cat[catUntouched] += n
		case v.table.zero:
			want.cat[catZero] += n
		default:
			s := v.table.countPage(pi, p)
			for c := range s.cat {
				want.cat[c] += s.cat[c]
			}
			want.partial += s.partial
			want.sectors += s.sectors
		}
	}
	for i := range v.table.chunks {
		if v.table.marked(i) {
			want.free++
		}
	}
	if got := v.table.stats(); got != want {
		t.Fatalf("counted %+v, the map has %+v", got, want)
	}
	st := v.Stats()
	if st.Untouched+st.Free+st.Held+st.Zero+st.Modified != st.Chunks {
		t.Fatalf("the states of %+v do not sum to its chunks", st)
	}
}

var _ io.Writer = (*appender)(nil)

func twinFS(seed uint64) *disktest.FS { return disktest.New(seed) }
