package store

import (
	"forerun/data/store/internal/runs"
	"forerun/internal/chunk"
)

// A bounded store removes whole packs, those first that were read longest ago.
// That takes one unlink: nothing is copied and nothing is written, so it works
// on a full disk. What the map still says about a pack that is gone counts as
// no entry.

// over says whether the packs are larger than they may be together, by more
// than slack bytes.
func (s *Store) over(slack int64) bool {
	return s.opt.LimitBytes > 0 && s.size.Load() > s.opt.LimitBytes+slack
}

// evictIfOver has packs removed when the limit is exceeded: by the keeper, or
// here if it does not keep up.
func (s *Store) evictIfOver() {
	switch {
	case !s.over(0):
	case s.opt.inline || s.over(s.opt.PackBytes):
		s.evictOver()
	default:
		s.kickKeeper()
	}
}

func (s *Store) evictOver() {
	s.evictMu.Lock() // two who see the same excess must not both remove it
	defer s.evictMu.Unlock()
	for s.over(0) && s.evictLocked() {
	}
}

func (s *Store) evict() bool {
	s.evictMu.Lock()
	defer s.evictMu.Unlock()
	return s.evictLocked()
}

// evictLocked removes the pack that was read longest ago. It is false when there is
// none to remove: the active one stays, those that are being read, and those
// with a sync that failed. It wants evictMu held.
func (s *Store) evictLocked() bool {
	p := s.coldest()
	if p == nil {
		return false
	}
	sigs := s.sigsIn(p)
	bytes, chunks, ok := s.removePack(p, true)
	if !ok {
		return true // a sync of it failed meanwhile: try another one
	}
	s.count.evictedChunks.Add(chunks)
	s.count.evictedBytes.Add(bytes)
	s.noteGone(sigs)
	return true
}

func (s *Store) coldest() *pack {
	s.appendMu.Lock()
	defer s.appendMu.Unlock()
	s.mu.RLock()
	defer s.mu.RUnlock()
	s.fileMu.Lock()
	defer s.fileMu.Unlock()
	var cold *pack
	for _, p := range s.packs {
		if p == s.active || p.bad != 0 || p.refs > 0 {
			continue
		}
		if cold == nil || p.used < cold.used || p.used == cold.used && p.id < cold.id {
			cold = p
		}
	}
	return cold
}

// touch counts a pack as read now: one that was just written is not cold.
func (s *Store) touch(p *pack) {
	s.fileMu.Lock()
	s.tick++
	p.used = s.tick
	s.fileMu.Unlock()
}

// sigsIn lists the chunks that the map has in a pack, for those who want to
// know what goes. Of damaged parts it knows nothing.
func (s *Store) sigsIn(p *pack) (sigs []chunk.Sig) {
	if !s.news.listens() {
		return nil
	}
	f, err := s.hold(p)
	if err != nil {
		return nil
	}
	defer s.letGo(p)
	s.mu.RLock()
	end := p.end
	s.mu.RUnlock()
	headers(f, end, p.salt, p.id, func(e *runs.Entry) {
		if at, err := s.lookup(&e.Sig); err == nil && at.pack == p && at.Loc == e.Loc {
			sigs = append(sigs, e.Sig)
		}
	})
	return sigs
}

// noteGone tells which of the chunks of a pack that was removed are not held
// any more: those that nobody moved or put again meanwhile.
func (s *Store) noteGone(sigs []chunk.Sig) {
	for i := range sigs {
		for {
			at, err := s.lookup(&sigs[i])
			if err != nil || at.pack != nil {
				break
			}
			s.mu.Lock()
			l, recent := s.recent(&sigs[i])
			moved := recent && l.Flags&runs.Dead == 0 && s.packs[l.Pack] != nil
			again := !recent && s.gen != at.gen
			if !moved && !again {
				s.news.note(&sigs[i], true)
			}
			s.mu.Unlock()
			if !again {
				break
			}
		}
	}
}
