package store

import (
	"forerun/block"
	"forerun/data/store/internal/runs"
	"forerun/internal/chunk"
)

// eachBatch is how many signatures Each takes at once.
const eachBatch = 512

// Each calls yield with the signature of each chunk that is held, recipes and
// pieces too, in no order, until it answers false. What comes or goes
// meanwhile may be among them or not, and one that moves may come twice. It
// holds no lock while it calls, and none for long that others wait for.
//
// KindCorrupt: a part of the block map is damaged and being repaired; all that
// can be found has been told. KindClosed: the store was closed before the end.
func (s *Store) Each(yield func(chunk.Sig) bool) error {
	const op = "store.each"
	if err := s.enter(op); err != nil {
		return err
	}
	in := true // the gate
	defer func() {
		if in {
			s.gate.RUnlock()
		}
	}()
	// In this order: entries go from mem to imm to a run, so none is missed.
	s.mu.RLock()
	mem, imm, v := s.mem, s.imm, s.ver
	v.refs.Add(1)
	s.mu.RUnlock()
	defer s.release(v)

	batch := make([]chunk.Sig, 0, eachBatch)
	ended := false
	// flush hands the batch over, outside of the gate: a callback that enters it
	// again while Close waits would never return.
	flush := func() error {
		s.gate.RUnlock()
		in = false
		for _, sig := range batch {
			if ended = !yield(sig); ended {
				return nil
			}
		}
		batch = batch[:0]
		err := s.enter(op)
		in = err == nil
		return err
	}
	for _, m := range []map[chunk.Sig]runs.Loc{mem, imm} {
		if err := s.eachRecent(m, &batch, &ended, flush); err != nil || ended {
			return err
		}
	}
	all, err := runs.Merge(v.plainRuns(), true)
	for err == nil {
		var e *runs.Entry
		if e, err = all.Next(); err != nil || e == nil {
			break
		}
		s.mu.RLock()
		l, newer := s.recent(&e.Sig)
		if !newer {
			l = e.Loc
		}
		held := l.Flags&runs.Dead == 0 && s.packs[l.Pack] != nil
		s.mu.RUnlock()
		if !held {
			continue
		}
		if batch = append(batch, e.Sig); len(batch) == eachBatch {
			if err := flush(); err != nil || ended {
				return err
			}
		}
	}
	if err == nil && all.Damaged() > 0 {
		s.count.damaged.Add(int64(all.Damaged()))
		err = s.noteDamage(block.E(op, s.dir, block.KindCorrupt, runs.ErrDamaged))
	}
	flush() // all is told then: that the store closes does not matter
	return err
}

// eachRecent walks a part of the map in memory. The lock is given back after
// every batch; a walk over a Go map bears that it changes in between.
func (s *Store) eachRecent(m map[chunk.Sig]runs.Loc, batch *[]chunk.Sig, ended *bool, flush func() error) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for sig := range m {
		l, ok := s.recent(&sig)
		if !ok { // a checkpoint has written it since
			l = m[sig]
		}
		if l.Flags&runs.Dead != 0 || s.packs[l.Pack] == nil {
			continue
		}
		if *batch = append(*batch, sig); len(*batch) < eachBatch {
			continue
		}
		s.mu.RUnlock()
		err := flush()
		s.mu.RLock()
		if err != nil || *ended {
			return err
		}
	}
	return nil
}
