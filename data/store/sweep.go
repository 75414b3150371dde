package store

import (
	"errors"
	"fmt"
	"slices"

	"forerun/block"
	"forerun/data/store/internal/runs"
	"forerun/internal/chunk"
)

// maxGuard bounds the chunks that a sweep remembers as put or confirmed while
// it runs. Beyond it, the packs they are in are left alone this time.
const maxGuard = 1 << 16

// sweep is a Sweep under way, as Put and Has see it; mu guards it.
type sweep struct {
	guarded map[chunk.Sig]runs.Loc
}

// guard keeps a chunk that somebody was told is held.
func (w *sweep) guard(sig *chunk.Sig, p *pack, l runs.Loc) {
	if !p.scope {
		return
	}
	if _, ok := w.guarded[*sig]; !ok && len(w.guarded) >= maxGuard {
		p.pin = true
		return
	}
	w.guarded[*sig] = l
}

// moved follows a guarded chunk to its new place.
func (w *sweep) moved(sig *chunk.Sig, to runs.Loc) {
	if _, ok := w.guarded[*sig]; ok {
		w.guarded[*sig] = to
	}
}

// candidate is a pack as a sweep judges it.
type candidate struct {
	*pack
	entries   int64 // the map has in it
	live      int64 // of those, live
	liveBytes int64
}

// Sweep frees the space of chunks for which live answers false. It removes
// packs without a live chunk, and rewrites those of which less than
// Options.SweepBelow is live. Chunks in other packs stay, dead or not: they can
// be read, and found by Put, until their pack's turn comes.
//
// live is called with each signature a few times, from this goroutine,
// without a lock that Get, Put or Sync wait for; it must answer true for all
// that a map refers to and for all that was put, or that Has confirmed, before
// Sweep was called and is to be referred to. What is put or confirmed while
// Sweep runs is kept whatever live says. Get, Put and Sync go on meanwhile.
//
// A piece is live with any region that consists of it, and needs no answer of
// its own; about two in a thousand dead ones are taken for live.
//
// It returns the bytes of the packs it removed less those of the records it
// copied, also with an error. It
// begins with what needs no space, so that it helps on a full disk. KindCorrupt: the
// block map is damaged and being repaired; try again.
func (s *Store) Sweep(live func(chunk.Sig) bool) (freedBytes int64, err error) {
	const op = "store.sweep"
	if err := s.enter(op); err != nil {
		return 0, err
	}
	defer s.gate.RUnlock()
	s.maint.Lock()
	defer s.maint.Unlock()
	freedBytes, err = s.sweepLocked(live)
	s.count.swept.Add(freedBytes)
	if err == nil {
		return freedBytes, nil
	}
	if errors.Is(err, runs.ErrDamaged) {
		s.noteDamage(err)
		s.kickKeeper()
		return freedBytes, block.E(op, s.dir, block.KindCorrupt, err)
	}
	return freedBytes, block.E(op, s.dir, block.KindNone, err)
}

func (s *Store) sweepLocked(live func(chunk.Sig) bool) (freed int64, err error) {
	w := &sweep{guarded: map[chunk.Sig]runs.Loc{}}
	s.beginSweep(w)
	defer s.endSweep()
	todo, live, err := s.judge(live)
	if err != nil {
		return 0, err
	}
	// Packs without a live chunk need no space to go; then those that need least.
	slices.SortFunc(todo, func(a, b *candidate) int { return int(a.liveBytes - b.liveBytes) })
	for _, c := range todo {
		if s.closing.Load() {
			return freed, &block.Error{Op: "store.sweep", Object: s.dir, Kind: block.KindClosed}
		}
		n, err := s.reclaim(c, live)
		freed += n
		if err != nil {
			return freed, err
		}
	}
	if len(todo) > 0 {
		s.syncMu.Lock()
		err = s.checkpointLocked()
		s.syncMu.Unlock()
	}
	return freed, err
}

func (s *Store) beginSweep(w *sweep) {
	s.bundles.Lock()
	defer s.bundles.Unlock()
	s.syncMu.Lock()
	s.appendMu.Lock()
	s.mu.Lock()
	for _, p := range s.packs {
		p.scope, p.pin = p.bad == 0, false
	}
	s.sweep = w
	s.mu.Unlock()
	s.appendMu.Unlock()
	s.syncMu.Unlock()
}

func (s *Store) endSweep() {
	s.mu.Lock()
	for _, p := range s.packs {
		p.scope = false
	}
	s.sweep = nil
	s.mu.Unlock()
}

// census is the map at one moment, for walks that take long.
type census struct {
	recent map[chunk.Sig]runs.Loc // what was in memory
	v      *version               // the caller releases it
}

// censusLocked wants mu held.
func (s *Store) censusLocked() census {
	c := census{recent: make(map[chunk.Sig]runs.Loc, len(s.imm)+len(s.mem)), v: s.ver}
	for _, m := range []map[chunk.Sig]runs.Loc{s.imm, s.mem} {
		for sig, l := range m {
			c.recent[sig] = l
		}
	}
	c.v.refs.Add(1)
	return c
}

// size is how many entries a walk can meet.
func (c *census) size() int {
	n := len(c.recent)
	for _, r := range c.v.runs {
		n += r.Count()
	}
	return n
}

// walk calls yield for each entry that is not dead. The errors are those of
// yield and of damaged pages.
func (c *census) walk(yield func(sig *chunk.Sig, l runs.Loc) error) error {
	for sig, l := range c.recent {
		if l.Flags&runs.Dead == 0 {
			if err := yield(&sig, l); err != nil {
				return err
			}
		}
	}
	all, err := runs.Merge(c.v.plainRuns(), false)
	for err == nil {
		var e *runs.Entry
		if e, err = all.Next(); err != nil || e == nil {
			break
		}
		if _, newer := c.recent[e.Sig]; !newer && e.Flags&runs.Dead == 0 {
			err = yield(&e.Sig, e.Loc)
		}
	}
	return err
}

// judge walks the whole map and returns the packs worth reclaiming, and what of
// them is live: what the caller says, and the pieces of the regions that it says.
func (s *Store) judge(live func(chunk.Sig) bool) ([]*candidate, func(chunk.Sig) bool, error) {
	cands := map[uint32]*candidate{}
	s.mu.RLock()
	c := s.censusLocked() // what comes later is guarded
	for id, p := range s.packs {
		if p.scope {
			cands[id] = &candidate{pack: p}
		}
	}
	s.mu.RUnlock()
	defer s.release(c.v)

	var pieces *runs.Filter // of live regions
	alive := live
	n := 0
	count := func(regions bool) error {
		for _, c := range cands {
			c.entries, c.live, c.liveBytes = 0, 0, 0
		}
		return c.walk(func(sig *chunk.Sig, l runs.Loc) error {
			if n++; n%1024 == 0 && s.closing.Load() {
				return &block.Error{Op: "store.sweep", Object: s.dir, Kind: block.KindClosed}
			}
			is := alive(*sig)
			if regions && is && l.Codec == chunk.Recipe {
				if pieces == nil {
					pieces = runs.NewFilter(c.size())
				}
				if err := s.addPieces(sig, pieces); err != nil {
					return err
				}
			}
			if c := cands[l.Pack]; c != nil {
				c.entries++
				if is {
					c.live++
					c.liveBytes += span(l)
				}
			}
			return nil
		})
	}
	err := count(true)
	if err == nil && pieces != nil {
		alive = func(sig chunk.Sig) bool { return pieces.Has(&sig) || live(sig) }
		err = count(false)
	}
	if err != nil {
		return nil, nil, err
	}
	var todo []*candidate
	s.mu.RLock()
	for _, c := range cands {
		if s.packs[c.id] == c.pack && (float64(c.liveBytes) < s.opt.SweepBelow*float64(c.end-packHeader) || c.live == 0) {
			todo = append(todo, c)
		}
	}
	s.mu.RUnlock()
	return todo, alive, nil
}

// addPieces adds the pieces of a region. One that is gone or damaged has none.
func (s *Store) addPieces(sig *chunk.Sig, to *runs.Filter) error {
	list := s.lists.Get().(*[]chunk.Packed)
	defer s.lists.Put(list)
	_, pieces, err := s.recipe("store.sweep", sig, (*list)[:0])
	*list = pieces[:0]
	switch block.KindOf(err) {
	case block.KindNone:
		for i := range pieces {
			if pieces[i].Codec != chunk.Zeros {
				to.Add(&pieces[i].Sig)
			}
		}
		return nil
	case block.KindNotFound:
		return nil
	case block.KindCorrupt:
		// With a damaged map it may be there all the same, and need its pieces.
		if !s.mapDamaged.Load() {
			return nil
		}
	}
	return err
}

// reclaim copies what is live in a pack to the end of the log and removes it.
func (s *Store) reclaim(c *candidate, live func(chunk.Sig) bool) (freed int64, err error) {
	s.appendMu.Lock()
	s.retire(c.pack)
	s.appendMu.Unlock()
	if c.live == 0 {
		if n, ok := s.sweepPack(c.pack); ok {
			return n, nil
		}
	}
	seen, copied, err := s.copyLive(c, live)
	if err != nil {
		return -copied, err
	}
	if seen < c.entries {
		// The map has chunks here that the scan did not meet: they were deleted or
		// moved meanwhile, or their records are damaged. Ask the map for each.
		n, err := s.copyMapped(c.pack, live)
		copied += n
		if err != nil {
			return -copied, err
		}
	}
	for range maxGuard {
		s.syncMu.Lock()
		err := s.syncPacks()
		s.syncMu.Unlock()
		if err != nil {
			return -copied, err
		}
		if n, ok := s.sweepPack(c.pack); ok {
			return n - copied, nil
		}
		n, more, err := s.copyGuarded(c.pack)
		copied += n
		if err != nil || !more {
			return -copied, err
		}
	}
	return -copied, nil
}

// sweepPack removes a pack unless it holds a chunk that somebody was told of.
func (s *Store) sweepPack(p *pack) (bytes int64, ok bool) {
	sigs := s.sigsIn(p)
	bytes, _, ok = s.removePack(p, false)
	if ok {
		s.noteGone(sigs)
	}
	return bytes, ok
}

// removePack takes a pack out of the store, removes its file, and returns its
// bytes and how many chunks the map had in it. Unless evicting, one that holds a
// chunk which somebody was told of stays.
func (s *Store) removePack(p *pack, evicting bool) (bytes, chunks int64, ok bool) {
	s.syncMu.Lock() // no sync may have it in hand
	defer s.syncMu.Unlock()
	s.appendMu.Lock()
	s.mu.Lock()
	if s.packs[p.id] != p {
		// Somebody else removed it.
		s.mu.Unlock()
		s.appendMu.Unlock()
		return 0, 0, true
	}
	ok = p != s.active && p.bad == 0
	if !evicting {
		ok = ok && !p.pin
		for _, l := range s.sweep.guarded {
			ok = ok && l.Pack != p.id
		}
	}
	if ok {
		bytes, chunks = p.end, p.live.chunks
		delete(s.packs, p.id)
	}
	s.mu.Unlock()
	if ok {
		s.dirty = slices.DeleteFunc(s.dirty, func(q *pack) bool { return q == p })
		if p.w != nil {
			p.w.Close()
			p.w = nil
		}
	}
	s.appendMu.Unlock()
	if !ok {
		return 0, 0, false
	}
	s.size.Add(-bytes)
	// A sweep holds packs while it asks its caller, who may be in a Put that evicts.
	if err := s.unlink(p, !evicting); err != nil {
		s.log.Warn("store: a pack could not be removed; the next start tries again", "pack", packName(p.id), "error", err)
		return 0, chunks, true
	}
	return bytes, chunks, true
}

// copyLive copies the live chunks of a pack. It returns how many of the map's
// entries it met and the bytes it wrote.
func (s *Store) copyLive(c *candidate, live func(chunk.Sig) bool) (seen, copied int64, err error) {
	f, err := s.hold(c.pack)
	if errors.Is(err, errGone) {
		return c.entries, 0, nil // evicted
	}
	if err != nil {
		return 0, 0, fmt.Errorf("pack %s: %w", packName(c.id), err)
	}
	defer s.letGo(c.pack)
	s.mu.RLock()
	end := c.end
	s.mu.RUnlock()
	_, err = scan(f, end, packHeader, c.salt, c.id, scanMemory(end), func(e runs.Entry, _ []byte) error {
		if s.closing.Load() {
			return &block.Error{Op: "store.sweep", Object: s.dir, Kind: block.KindClosed}
		}
		at, err := s.lookup(&e.Sig)
		if err != nil {
			return err
		}
		if at.pack != c.pack || at.Loc != e.Loc {
			return nil
		}
		seen++
		if !live(e.Sig) {
			return nil
		}
		if err := s.move(&e.Sig, at); err != nil {
			return err
		}
		copied += span(e.Loc)
		return nil
	})
	return seen, copied, err
}

// copyMapped does what copyLive does from the map's side.
func (s *Store) copyMapped(p *pack, live func(chunk.Sig) bool) (copied int64, err error) {
	s.mu.RLock()
	var todo []chunk.Sig
	for _, m := range []map[chunk.Sig]runs.Loc{s.imm, s.mem} {
		for sig, l := range m {
			if l.Pack == p.id && l.Flags&runs.Dead == 0 {
				todo = append(todo, sig)
			}
		}
	}
	v := s.ver
	v.refs.Add(1)
	s.mu.RUnlock()
	defer s.release(v)
	one := func(sig chunk.Sig) error {
		at, err := s.lookup(&sig)
		if err != nil || at.pack != p || !live(sig) {
			return err
		}
		copied += span(at.Loc)
		return s.move(&sig, at)
	}
	for _, sig := range todo {
		if err := one(sig); err != nil {
			return copied, err
		}
	}
	all, err := runs.Merge(v.plainRuns(), false)
	for err == nil {
		var e *runs.Entry
		if e, err = all.Next(); e == nil || err != nil {
			break
		}
		if e.Pack == p.id && e.Flags&runs.Dead == 0 {
			err = one(e.Sig)
		}
	}
	return copied, err
}

// copyGuarded copies the chunks of p that were confirmed since copyLive.
func (s *Store) copyGuarded(p *pack) (copied int64, more bool, err error) {
	var sigs []chunk.Sig
	s.mu.RLock()
	pinned := p.pin
	for sig, l := range s.sweep.guarded {
		if l.Pack == p.id {
			sigs = append(sigs, sig)
		}
	}
	s.mu.RUnlock()
	if pinned {
		return 0, false, nil
	}
	for _, sig := range sigs {
		at, err := s.lookup(&sig)
		if err != nil {
			return copied, false, err
		}
		if at.pack == p {
			if err := s.move(&sig, at); err != nil {
				return copied, false, err
			}
			copied += span(at.Loc)
		}
		// Moved before it was guarded, deleted, or dropped as damaged: the pack
		// need not stay for it.
		s.mu.Lock()
		if l, ok := s.sweep.guarded[sig]; ok && l.Pack == p.id {
			now, ok := s.recent(&sig)
			if !ok || now.Pack != p.id || now.Flags&runs.Dead != 0 {
				delete(s.sweep.guarded, sig)
			}
		}
		s.mu.Unlock()
	}
	return copied, true, nil
}
