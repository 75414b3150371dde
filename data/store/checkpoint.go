package store

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"forerun/block"
	"forerun/data/store/internal/runs"
	"forerun/internal/chunk"
)

// A map in memory may grow to hardFactor times MapEntries while checkpoints
// fail. Then Put fails with their error.
const hardFactor = 4

// checkpointBackoff is how long a failed checkpoint is not tried again unasked.
const checkpointBackoff = time.Second

// checkpointLocked writes the map in memory to a run, and a manifest that says
// up to where the log is in runs. It wants syncMu held.
func (s *Store) checkpointLocked() error {
	s.appendMu.Lock()
	s.mu.Lock()
	sn := s.snapshotLocked()
	if len(s.mem) == 0 && sn.pos == s.last.pos && len(sn.packs) == len(s.last.packs) {
		seq := s.seq
		s.mu.Unlock()
		s.appendMu.Unlock()
		if err := s.syncPacks(); err != nil {
			return err
		}
		s.durable = max(s.durable, seq)
		return nil
	}
	seq, drops, tail := s.seq, s.drops, s.tail.Swap(0)
	s.imm, s.mem, s.drops = s.mem, map[chunk.Sig]runs.Loc{}, 0
	s.mu.Unlock()
	s.appendMu.Unlock()

	err := s.writeCheckpoint(sn)
	if err == nil {
		s.durable = max(s.durable, seq)
		s.count.checkpoints.Add(1)
		if s.ckptFailed {
			s.ckptFailed = false
			s.log.Info("store: the block map can be written again")
		}
		return nil
	}
	// Back to how it was, under what came since.
	s.appendMu.Lock()
	s.mu.Lock()
	newer := s.mem
	s.mem = s.imm
	for sig, l := range newer {
		s.mem[sig] = l
	}
	s.imm = nil
	s.drops += drops
	s.tail.Add(tail)
	s.mu.Unlock()
	s.appendMu.Unlock()
	s.retryAt.Store(time.Now().Add(checkpointBackoff).UnixNano())
	if !s.ckptFailed {
		s.ckptFailed = true
		s.log.Warn("store: the block map cannot be written; it is tried again", "error", err)
	}
	return err
}

func (s *Store) writeCheckpoint(sn snapshot) error {
	if err := s.syncPacks(); err != nil {
		return err
	}
	rs := slices.Clone(s.ver.runs) // s.ver changes only with syncMu held
	var fresh *runs.Run
	if len(s.imm) > 0 {
		entries := make([]runs.Entry, 0, len(s.imm))
		s.mu.RLock()
		for sig, l := range s.imm {
			entries = append(entries, runs.Entry{Sig: sig, Loc: l})
		}
		s.mu.RUnlock()
		id := s.nextRun
		s.nextRun++
		var err error
		if fresh, err = runs.Write(s.fs, s.runPath(id), id, entries); err != nil {
			return fmt.Errorf("block map: %w", err)
		}
		rs = append([]*sharedRun{{Run: fresh}}, rs...)
	}
	return s.adopt(sn, rs, fresh, func() {
		s.imm = nil
		s.last = sn
	})
}

// due says whether enough was written for a checkpoint.
func (s *Store) due() bool {
	s.mu.RLock()
	n := len(s.mem)
	s.mu.RUnlock()
	return n >= s.opt.MapEntries || n > 0 && s.tail.Load() >= s.opt.CheckpointBytes
}

// checkpointIfDue asks the keeper for a checkpoint when enough was written.
func (s *Store) checkpointIfDue() {
	if !s.due() || time.Now().UnixNano() < s.retryAt.Load() {
		return
	}
	if s.opt.inline {
		s.keep()
		return
	}
	s.kickKeeper()
}

// makeRoom refuses a Put while the map in memory is at its bound and cannot be
// written.
func (s *Store) makeRoom() error {
	s.mu.RLock()
	n := len(s.mem) + len(s.imm)
	s.mu.RUnlock()
	if n < hardFactor*s.opt.MapEntries {
		return nil
	}
	s.syncMu.Lock()
	defer s.syncMu.Unlock()
	s.mu.RLock()
	n = len(s.mem)
	s.mu.RUnlock()
	if n < s.opt.MapEntries {
		return nil // somebody else did it
	}
	return s.checkpointLocked()
}

func (s *Store) kickKeeper() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// keeper does what may wait: checkpoints, merges, repair.
func (s *Store) keeper() {
	defer close(s.kept)
	for {
		select {
		case <-s.stop:
			return
		case <-s.kick:
			s.keep()
		}
	}
}

func (s *Store) keep() {
	s.evictOver()
	if s.due() {
		s.syncMu.Lock()
		err := s.checkpointLocked()
		s.syncMu.Unlock()
		if err != nil {
			return
		}
	}
	if s.mapDamaged.Load() {
		s.maint.Lock()
		err := s.repair()
		s.maint.Unlock()
		if err != nil && !s.closing.Load() {
			s.log.Error("store: the damaged block map could not be repaired; a restart builds it from the packs when its directory is removed",
				"directory", s.mapDir, "error", err)
		}
	}
	for !s.closing.Load() {
		s.maint.Lock()
		again, err := s.mergeOnce()
		s.maint.Unlock()
		if err != nil && !s.closing.Load() {
			s.log.Warn("store: merging the block map failed; it is tried again later", "error", err)
		}
		if !again || err != nil {
			return
		}
	}
}

// A merge takes the newest runs as long as the next one is at most mergeRatio
// times as large as those before it together, if that makes at least mergeWidth
// of them; so sizes grow geometrically and an entry is written a few times.
const (
	mergeRatio = 3
	mergeWidth = 4
	maxRuns    = 24
)

func pickMerge(sizes []int) int {
	k, sum := 0, 0
	for ; k < len(sizes); k++ {
		if k > 0 && sizes[k] > mergeRatio*sum {
			break
		}
		sum += sizes[k]
	}
	if k < mergeWidth {
		k = 0
		if len(sizes) > maxRuns {
			k = len(sizes) / 2
		}
	}
	return k
}

// mergeOnce merges some runs if that is worth it; it wants maint held.
func (s *Store) mergeOnce() (again bool, err error) {
	s.mu.RLock()
	v := s.ver
	v.refs.Add(1)
	s.mu.RUnlock()
	defer s.release(v)
	sizes := make([]int, len(v.runs))
	for i, r := range v.runs {
		sizes[i] = r.Count()
	}
	k := pickMerge(sizes)
	if k == 0 {
		return false, nil
	}
	return true, s.mergeRuns(v, k, false)
}

// mergeRuns merges the k newest runs of v into one; it wants maint held. With
// skip, damaged pages are left out.
func (s *Store) mergeRuns(v *version, k int, skip bool) error {
	in := v.runs[:k]
	oldest := k == len(v.runs)
	total := 0
	for _, r := range in {
		total += r.Count()
	}
	m, err := runs.Merge(v.plainRuns()[:k], skip)
	if err != nil {
		return s.noteDamage(err)
	}
	s.syncMu.Lock()
	id := s.nextRun
	s.nextRun++
	s.syncMu.Unlock()
	w, err := runs.Create(s.fs, s.runPath(id), id, total)
	if err != nil {
		return err
	}
	for n := 0; ; n++ {
		e, err := m.Next()
		if err != nil {
			w.Abort()
			return s.noteDamage(err)
		}
		if e == nil {
			break
		}
		if n%4096 == 0 && s.closing.Load() {
			w.Abort()
			return block.E("store.merge", s.dir, block.KindClosed, nil)
		}
		if e.Flags&runs.Dead == 0 {
			s.mu.RLock()
			gone := s.packs[e.Pack] == nil
			s.mu.RUnlock()
			if gone {
				e.Loc = dead
			}
		}
		if e.Flags&runs.Dead != 0 && oldest {
			continue
		}
		if err := w.Add(e); err != nil {
			w.Abort()
			return err
		}
	}
	var fresh *runs.Run
	var merged []*sharedRun
	if w.Count() == 0 {
		w.Abort()
	} else {
		if fresh, err = w.Finish(); err != nil {
			return err
		}
		merged = []*sharedRun{{Run: fresh}}
	}
	s.syncMu.Lock()
	defer s.syncMu.Unlock()
	// Checkpoints may have put runs in front meanwhile; nothing else changes the list.
	i := slices.Index(s.ver.runs, in[0])
	rs := slices.Concat(s.ver.runs[:i], merged, s.ver.runs[i+k:])
	if err := s.adopt(s.last, rs, fresh, func() {}); err != nil {
		return err
	}
	s.count.merges.Add(1)
	return nil
}

// noteDamage has the keeper repair the map.
func (s *Store) noteDamage(err error) error {
	if errors.Is(err, runs.ErrDamaged) {
		s.mapDamaged.Store(true)
		s.kickKeeper()
	}
	return err
}
