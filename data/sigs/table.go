package sigs

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path"
	"sync"
	"sync/atomic"

	"forerun/block"
	"forerun/disk"
	"forerun/internal/chunk"
)

// Kind is what is known of a chunk.
type Kind uint8

// The kinds. The numbers stand in the file.
const (
	Unknown Kind = 0
	Zero    Kind = 1 // reads as zeros
	Data    Kind = 2 // has a signature
)

// String names the kind.
func (k Kind) String() string {
	switch k {
	case Zero:
		return "zero"
	case Data:
		return "data"
	}
	return "unknown"
}

// Options of Open. Chunks and ChunkBytes are needed.
type Options struct {
	Chunks     int64 // how many the source has, the last one perhaps shorter
	ChunkBytes int64 // length of a chunk in bytes
	// Params says whatever else a signature depends on, such as how chunks are
	// cut, in at most 1024 bytes. What was learned with others is forgotten.
	Params string
	// State is the source's change state now (FileState), at most 1024 bytes. It
	// is taken when the source is open, nobody else can change it any more, and
	// what a predecessor wrote has been flushed (a state that no power cut
	// outlives, as FileState's, can do without). Empty: nothing is believed, or
	// kept for the next process unless Settle or Close are told a state.
	State string
	Log   *slog.Logger // nil is silent
}

// Token is a moment before a read of the source, as Learn needs it.
type Token uint64

const (
	stripeCount = 256
	maxChunks   = 1 << 40
)

// Table is what is known of the chunks of a source. All methods may be called
// from many goroutines at once.
type Table struct {
	o     Options
	fs    disk.FS
	name  string
	log   *slog.Logger
	f     disk.File
	id    tableID
	pages int64
	first int64 // offset of page 0 of the chunks

	groups  []atomic.Pointer[group]
	stripes []stripe

	data, zero atomic.Int64 // chunks known
	changes    atomic.Int64 // begun
	active     atomic.Int64 // under way
	shut       atomic.Bool  // off, or Close was called: it answers nothing
	off        atomic.Bool  // the file is given up
	learned    bell
	forgot     bell
	count      counters

	settling sync.Mutex // one Settle or Close
	saving   sync.Mutex // one writer of the summary

	head struct {
		sync.RWMutex
		dirty bool   // the file says so, durably
		gone  bool   // the file is given up or closed: there is nothing left to mark
		ended bool   // and its handle was closed
		state string // recorded
		why   string // it is off
	}
}

// group is a page of the summary. An entry is guarded by the stripe of its page.
type group struct {
	stale atomic.Bool  // not written to the file as it is
	known atomic.Int64 // chunks
	e     [perGroup]entry
}

// stripe guards the pages whose number is its own modulo the number of stripes.
type stripe struct {
	mu     sync.Mutex
	gen    uint64
	active int
	cached int64 // which page buf holds, as it is in the file; -1 for none
	buf    *page
}

// Open opens or makes the table in the file name, and its directory. It
// believes the file only if the source's state and all else are as they were.
// An error is one of the options (KindInvalid); a file that cannot be used makes
// a table that is off, see Stats.
func Open(fs disk.FS, name string, o Options) (*Table, error) {
	const op = "sigs.open"
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	switch {
	case o.Chunks < 0 || o.Chunks > maxChunks || o.ChunkBytes <= 0:
		return nil, block.E(op, name, block.KindInvalid, fmt.Errorf("%d chunks of %d bytes", o.Chunks, o.ChunkBytes))
	case len(o.Params) > maxString || len(o.State) > maxString:
		return nil, block.E(op, name, block.KindInvalid, fmt.Errorf("%d bytes of parameters and %d of state; there is room for %d each",
			len(o.Params), len(o.State), maxString))
	}
	t := &Table{o: o, fs: fs, name: name, log: o.Log, pages: (o.Chunks + perPage - 1) / perPage}
	groups := (t.pages + perGroup - 1) / perGroup
	t.first = (1 + groups) * pageBytes
	t.groups = make([]atomic.Pointer[group], groups)
	t.stripes = make([]stripe, min(stripeCount, max(1, t.pages)))
	for i := range t.stripes {
		t.stripes[i].cached = -1
	}
	if err := t.start(); err != nil {
		t.fail(err)
	}
	return t, nil
}

// start opens the file and reads or makes its header.
func (t *Table) start() error {
	dir := path.Dir(t.name)
	if err := t.fs.MkdirAll(dir); err != nil {
		return err
	}
	var err error
	if t.f, err = t.fs.Open(t.name, disk.Write|disk.Create); err != nil {
		return err
	}
	var b [pageBytes]byte
	if _, err := t.f.ReadAt(b[:], 0); err != nil && err != io.EOF {
		return err
	}
	h, ok := parseHeader(&b)
	ok = ok && h.status != dirty && t.o.State != "" && h.state == t.o.State &&
		h.params == t.o.Params && h.chunks == t.o.Chunks && h.chunkBytes == t.o.ChunkBytes
	t.head.state = t.o.State
	if ok {
		t.id = h.id
		if err := t.load(h.status == closed); err != nil {
			return err
		}
		t.count.kept.Store(true)
	} else {
		if _, err := rand.Read(t.id[:]); err != nil {
			return err
		}
		if err := t.f.Truncate(0); err != nil {
			return err
		}
	}
	// Durable before anything is learned: a summary that is no longer exact
	// must not be taken for one. A predecessor that was killed may have left a
	// header, or a name, that is not.
	if err := t.writeHeader(open, t.o.State); err != nil {
		return err
	}
	return t.fs.SyncDir(dir)
}

func (t *Table) writeHeader(status uint32, state string) error {
	h := header{id: t.id, chunks: t.o.Chunks, chunkBytes: t.o.ChunkBytes, status: status, params: t.o.Params, state: state}
	if _, err := t.f.WriteAt(h.encode(), 0); err != nil {
		return err
	}
	return t.f.Sync()
}

// fail turns the table off, once.
func (t *Table) fail(err error) {
	t.head.Lock()
	defer t.head.Unlock()
	t.failLocked(err)
}

// failLocked wants head locked. What was learned is true still, but changes to
// come will not be noted, so the file must not be believed again.
func (t *Table) failLocked(err error) {
	if t.head.why != "" || t.head.gone {
		return
	}
	t.head.why, t.head.gone = err.Error(), true
	t.off.Store(true)
	t.shut.Store(true)
	t.learned.ring()
	t.forgot.ring()
	t.log.Warn("the file of signatures cannot be used; chunks of this source are hashed as they are asked for until the next start",
		"file", t.name, "err", err)
	if gerr := t.giveUp(); gerr != nil && !t.head.dirty {
		t.log.Error("the file of signatures can neither be removed nor marked as outdated; remove it before the next start",
			"file", t.name, "err", gerr)
	}
}

// giveUp sees to it that the file is not believed again. Either way is enough;
// a file that was never made is as good as removed.
func (t *Table) giveUp() error {
	mark := errors.New("it is not open")
	if t.f != nil {
		mark = t.writeHeader(dirty, t.head.state)
	}
	err := t.fs.Remove(t.name)
	if err == nil || block.KindOf(err) == block.KindNotFound {
		err = t.fs.SyncDir(path.Dir(t.name))
	}
	if err == nil || mark == nil {
		return nil
	}
	return errors.Join(mark, err)
}

// at finds the page, the place in it and the stripe of a chunk.
func (t *Table) at(i int64) (p int64, k int, s *stripe) {
	p = i / perPage
	return p, int(i % perPage), t.stripe(p)
}

func (t *Table) stripe(p int64) *stripe { return &t.stripes[p%int64(len(t.stripes))] }

// chunksOf is how many chunks a page has.
func (t *Table) chunksOf(p int64) int { return int(min(perPage, t.o.Chunks-p*perPage)) }

// Get answers what is known of chunk i, without reading the source. The
// signature means something for Data only.
func (t *Table) Get(i int64) (Kind, chunk.Sig) {
	if i < 0 || i >= t.o.Chunks {
		return Unknown, chunk.Sig{}
	}
	p, k, s := t.at(i)
	s.mu.Lock()
	defer s.mu.Unlock()
	return t.get(s, p, k)
}

// get wants the stripe locked.
func (t *Table) get(s *stripe, p int64, k int) (Kind, chunk.Sig) {
	if t.shut.Load() {
		return Unknown, chunk.Sig{}
	}
	switch t.entry(p).where() {
	case none:
		return Unknown, chunk.Sig{}
	case allNil:
		return Zero, chunk.Sig{}
	}
	b := t.fetch(s, p)
	if b == nil {
		return Unknown, chunk.Sig{}
	}
	return b.get(k)
}

// fetch returns a page that the summary says is in the file, or nil when it is
// void after all. The stripe is locked.
func (t *Table) fetch(s *stripe, p int64) *page {
	if s.cached == p {
		return s.buf
	}
	if s.buf == nil {
		s.buf = new(page)
	}
	s.cached = -1
	n, err := t.f.ReadAt(s.buf[:], t.first+p*pageBytes)
	if err != nil && err != io.EOF {
		t.fail(err)
		return nil
	}
	clear(s.buf[n:])
	if !s.buf.valid(typeChunks, p, &t.id) {
		t.count.torn.Add(1)
		t.setEntry(p, 0)
		return nil
	}
	s.cached = p
	data, zero := s.buf.count(t.chunksOf(p))
	t.setEntry(p, makeEntry(inPage, data, zero))
	return s.buf
}

// edit is fetch for a page that is to be changed: one that is void is begun.
func (t *Table) edit(s *stripe, p int64) *page {
	where := t.entry(p).where()
	if where == inPage || where == maybe {
		if b := t.fetch(s, p); b != nil || t.off.Load() {
			return b
		}
	}
	if s.buf == nil {
		s.buf = new(page)
	}
	s.cached = p
	s.buf.begin(typeChunks, p, &t.id)
	if where == allNil {
		for k := range t.chunksOf(p) {
			s.buf.set(k, Zero, chunk.Sig{})
		}
	}
	return s.buf
}

// store writes the page that edit returned.
func (t *Table) store(s *stripe, p int64) {
	s.buf.seal()
	data, zero := s.buf.count(t.chunksOf(p))
	t.setEntry(p, makeEntry(inPage, data, zero))
	if _, err := t.f.WriteAt(s.buf[:], t.first+p*pageBytes); err != nil {
		s.cached = -1
		t.fail(err)
	}
}

// Token is taken before the bytes of chunk i are read from the source.
func (t *Table) Token(i int64) Token {
	if i < 0 || i >= t.o.Chunks {
		return 0
	}
	_, _, s := t.at(i)
	s.mu.Lock()
	defer s.mu.Unlock()
	return Token(s.gen)
}

// tokens returns those of all stripes, for a run of chunks.
func (t *Table) tokens() []Token {
	all := make([]Token, len(t.stripes))
	for i := range t.stripes {
		s := &t.stripes[i]
		s.mu.Lock()
		all[i] = Token(s.gen)
		s.mu.Unlock()
	}
	return all
}

// Learn notes that chunk i is zero, or data with the signature sig of its plain
// bytes, read after token was taken. It is ignored, and answers false, if the
// chunk was or is being changed since.
func (t *Table) Learn(i int64, token Token, kind Kind, sig chunk.Sig) bool {
	return t.learn(i, []fact{{token, kind, sig}}) == 1
}

// fact is what Learn is told of a chunk.
type fact struct {
	token Token
	kind  Kind
	sig   chunk.Sig
}

// learn takes in facts about adjacent chunks and says how many were. Unknown ones
// are passed over.
func (t *Table) learn(first int64, facts []fact) (taken int) {
	for len(facts) > 0 && first >= 0 && first < t.o.Chunks {
		p, k, s := t.at(first)
		n := min(len(facts), t.chunksOf(p)-k)
		taken += t.learnPage(s, p, k, facts[:n])
		first, facts = first+int64(n), facts[n:]
	}
	if taken > 0 {
		t.count.learned.Add(int64(taken))
		t.learned.ring()
	}
	return taken
}

func (t *Table) learnPage(s *stripe, p int64, k int, facts []fact) (taken int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var b *page
	changed := false
	for i, f := range facts {
		if f.kind != Zero && f.kind != Data || t.shut.Load() {
			continue
		}
		if s.active > 0 || uint64(f.token) != s.gen {
			t.count.ignored.Add(1)
			continue
		}
		if b == nil {
			if b = t.edit(s, p); b == nil {
				return 0
			}
		}
		changed = b.set(k+i, f.kind, f.sig) || changed
		taken++
	}
	if changed {
		t.store(s, p)
	}
	if t.shut.Load() {
		return 0
	}
	return taken
}

// learnZeros notes that what is unknown in [first, first+n) is zero, if it was
// not changed since tokens, which are those of all stripes.
func (t *Table) learnZeros(first, n int64, tokens []Token) (taken int64) {
	end := min(first+n, t.o.Chunks)
	for i := first; i < end && !t.shut.Load(); {
		p, k, s := t.at(i)
		m := int(min(end-i, int64(t.chunksOf(p)-k)))
		taken += int64(t.zeroPage(s, p, k, m, tokens[p%int64(len(t.stripes))]))
		i += int64(m)
	}
	if taken > 0 {
		t.count.learned.Add(taken)
		t.learned.ring()
	}
	return taken
}

func (t *Table) zeroPage(s *stripe, p int64, k, n int, token Token) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.active > 0 || uint64(token) != s.gen {
		t.count.ignored.Add(int64(n))
		return 0
	}
	e, all := t.entry(p), t.chunksOf(p)
	switch {
	case e.known() == all || t.shut.Load():
		return 0
	case e.where() == none && n == all:
		t.setEntry(p, makeEntry(allNil, 0, all))
		return n
	}
	b := t.edit(s, p)
	if b == nil {
		return 0
	}
	taken := 0
	for j := k; j < k+n; j++ {
		if kind, _ := b.get(j); kind == Unknown {
			b.set(j, Zero, chunk.Sig{})
			taken++
		}
	}
	if taken > 0 {
		t.store(s, p)
	}
	return taken
}

// Chunks is how many chunks the table is about, and how long each is in bytes.
func (t *Table) Chunks() (n, bytes int64) { return t.o.Chunks, t.o.ChunkBytes }

// Known is how many chunks are known to be data and zero. Pages of a table
// whose process was killed count when they have been looked at.
func (t *Table) Known() (data, zero int64) {
	if t.shut.Load() {
		return 0, 0
	}
	return t.data.Load(), t.zero.Load()
}

// Version grows whenever something is learned.
func (t *Table) Version() int64 { return t.learned.n.Load() }

// Wait waits until the version is another than v and answers it. Errors:
// KindCanceled when ctx ends, KindClosed when nothing will be learned any more.
func (t *Table) Wait(ctx context.Context, v int64) (int64, error) {
	if t.shut.Load() {
		return v, block.E("sigs.wait", t.name, block.KindClosed, nil)
	}
	n, err := t.learned.wait(ctx, v)
	switch {
	case err != nil:
		return n, block.E("sigs.wait", t.name, block.KindCanceled, err)
	case t.shut.Load():
		return n, block.E("sigs.wait", t.name, block.KindClosed, nil)
	}
	return n, nil
}

// bell counts, and wakes who waits for the count to change.
type bell struct {
	n  atomic.Int64
	mu sync.Mutex
	ch chan struct{} // closed by the next ring; nil when nobody waits
}

func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.n.Add(1)
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}

func (b *bell) wait(ctx context.Context, v int64) (int64, error) {
	for {
		b.mu.Lock()
		if n := b.n.Load(); n != v {
			b.mu.Unlock()
			return n, nil
		}
		if b.ch == nil {
			b.ch = make(chan struct{})
		}
		ch := b.ch
		b.mu.Unlock()
		select {
		case <-ch:
		case <-ctx.Done():
			return v, ctx.Err()
		}
	}
}
