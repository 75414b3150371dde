package store

import (
	"errors"
	"sync/atomic"

	"forerun/data/store/internal/runs"
	"forerun/internal/chunk"
)

// errGone: the pack was taken away meanwhile; look the chunk up again.
var errGone = errors.New("the pack is gone")

// version is a list of runs, the newest first. It never changes; who reads it
// holds a reference, so that runs merged away stay open until nobody looks.
type version struct {
	refs atomic.Int64
	runs []*sharedRun
}

// sharedRun is a run that several versions can hold.
type sharedRun struct {
	*runs.Run
	refs     atomic.Int64
	obsolete atomic.Bool // no durable manifest names it: remove it at the end
}

func newVersion(rs []*sharedRun) *version {
	v := &version{runs: rs}
	v.refs.Store(1)
	for _, r := range rs {
		r.refs.Add(1)
	}
	return v
}

func (s *Store) release(v *version) {
	if v.refs.Add(-1) > 0 {
		return
	}
	for _, r := range v.runs {
		if r.refs.Add(-1) == 0 {
			r.Close()
			if r.obsolete.Load() {
				s.fs.Remove(r.Path()) // else the next Open does
			}
		}
	}
}

func (v *version) find(sig *chunk.Sig) (runs.Loc, bool, error) {
	for _, r := range v.runs {
		if l, ok, err := r.Find(sig); ok || err != nil {
			return l, ok, err
		}
	}
	return runs.Loc{}, false, nil
}

func (v *version) plainRuns() []*runs.Run {
	out := make([]*runs.Run, len(v.runs))
	for i, r := range v.runs {
		out[i] = r.Run
	}
	return out
}

// recent looks in memory; it wants mu held. An entry that says Dead is found.
func (s *Store) recent(sig *chunk.Sig) (runs.Loc, bool) {
	if l, ok := s.mem[*sig]; ok {
		return l, true
	}
	l, ok := s.imm[*sig]
	return l, ok
}

// place is where the map had a chunk, and when: unchanged can tell later
// whether it still does.
type place struct {
	runs.Loc
	pack *pack
	gen  uint64
}

// lookup finds a chunk's place. Without one, pack is nil. The error is that of
// a damaged page of the map.
func (s *Store) lookup(sig *chunk.Sig) (place, error) {
	for {
		s.mu.RLock()
		if l, ok := s.recent(sig); ok {
			p := s.placeOf(l)
			s.mu.RUnlock()
			return p, nil
		}
		v, gen := s.ver, s.gen
		v.refs.Add(1)
		s.mu.RUnlock()

		l, ok, err := v.find(sig)
		s.release(v)
		if err != nil {
			s.count.damaged.Add(1)
			s.mapDamaged.Store(true)
			s.kickKeeper()
			return place{}, err
		}

		// What was not in memory then may be now, and what was in the version
		// may be in another: only if neither moved, the answer stands.
		s.mu.RLock()
		if n, again := s.recent(sig); again {
			p := s.placeOf(n)
			s.mu.RUnlock()
			return p, nil
		}
		if s.gen != gen {
			s.mu.RUnlock()
			continue
		}
		p := place{gen: gen}
		if ok {
			p = s.placeOf(l)
		}
		s.mu.RUnlock()
		return p, nil
	}
}

// placeOf wants mu held.
func (s *Store) placeOf(l runs.Loc) place {
	p := place{Loc: l, gen: s.gen}
	if l.Flags&runs.Dead == 0 {
		p.pack = s.packs[l.Pack]
	}
	return p
}

// Answers of unchanged.
const (
	same    = iota // the place holds
	changed        // another place, or none, is in the map
	unknown        // a checkpoint came between: look again
)

// unchanged says whether the map still has sig at p; it wants mu held.
func (s *Store) unchanged(sig *chunk.Sig, p place) int {
	if l, ok := s.recent(sig); ok {
		if l == p.Loc && s.packs[l.Pack] == p.pack {
			return same
		}
		return changed
	}
	if s.gen != p.gen {
		return unknown
	}
	if s.packs[p.Pack] != p.pack {
		return changed
	}
	return same
}

// replace puts to in the map in place of from, which lookup gave, and says
// whether from still stood. A to that says Dead deletes.
func (s *Store) replace(sig *chunk.Sig, from place, to runs.Loc) bool {
	for {
		s.mu.Lock()
		switch s.unchanged(sig, from) {
		case same:
			from.pack.live.add(from.Loc, -1)
			s.mem[*sig] = to
			if to.Flags&runs.Dead != 0 {
				s.drops++
				s.seq++
				s.news.note(sig, true)
			} else {
				s.packs[to.Pack].live.add(to, 1)
				if s.sweep != nil {
					s.sweep.moved(sig, to)
					s.sweep.guard(sig, s.packs[to.Pack], to)
				}
			}
			s.mu.Unlock()
			return true
		case changed:
			s.mu.Unlock()
			return false
		}
		s.mu.Unlock()
		now, err := s.lookup(sig)
		if err != nil || now.pack != from.pack || now.Loc != from.Loc {
			return false
		}
		from = now
	}
}

// dead is the entry of a deleted chunk.
var dead = runs.Loc{Flags: runs.Dead}

// drop deletes a chunk whose bytes are not its own.
func (s *Store) drop(sig *chunk.Sig, from place) {
	if s.replace(sig, from, dead) {
		s.count.corrupt.Add(1)
	}
}
