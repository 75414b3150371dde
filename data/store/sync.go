package store

import (
	"fmt"
	"slices"

	"forerun/block"
	"forerun/data/store/internal/runs"
	"forerun/disk"
	"forerun/internal/chunk"
)

// Sync makes durable what was put or deleted before the call. Callers that
// come while a sync is under way share the next one.
//
// After an error (KindNoSpace, KindIO) nothing is known to be durable that was
// not before, and everything can still be read; what the failed sync may have
// lost is written to another pack by the next Sync.
func (s *Store) Sync() error {
	const op = "store.sync"
	if err := s.enter(op); err != nil {
		return err
	}
	defer s.gate.RUnlock()
	s.mu.RLock()
	need := s.seq
	s.mu.RUnlock()
	s.syncMu.Lock()
	defer s.syncMu.Unlock()
	if s.durable >= need && len(s.suspects) == 0 {
		return nil
	}
	if err := s.syncLocked(); err != nil {
		return block.E(op, s.dir, block.KindNone, advice(err))
	}
	return nil
}

// advice says what to do about a full disk.
func advice(err error) error {
	if block.KindOf(err) == block.KindNoSpace {
		return fmt.Errorf("%w; free space on the store's disk or sweep it, then it goes on by itself", err)
	}
	return err
}

// syncLocked makes everything durable, deletions too; it wants syncMu held.
func (s *Store) syncLocked() error {
	s.mu.RLock()
	drops, seq := s.drops, s.seq
	s.mu.RUnlock()
	if drops > 0 {
		return s.checkpointLocked()
	}
	if err := s.syncPacks(); err != nil {
		return err
	}
	s.durable = max(s.durable, seq)
	return nil
}

// syncPacks makes the records in the log durable; it wants syncMu held.
func (s *Store) syncPacks() error {
	err := s.moveSuspects()
	if err == nil {
		err = s.syncDirty()
	}
	s.count.syncs.Add(1)
	if err != nil {
		s.count.syncErrors.Add(1)
		return err
	}
	s.trimMoved()
	return nil
}

// syncDirty syncs the packs that were written since they were last synced.
func (s *Store) syncDirty() error {
	s.appendMu.Lock()
	todo := slices.Clone(s.dirty)
	ends := make([]int64, len(todo))
	for i, p := range todo {
		ends[i] = p.end
	}
	s.appendMu.Unlock()

	for i, p := range todo {
		if err := s.syncPack(p, ends[i]); err != nil {
			s.appendMu.Lock()
			s.suspect(p)
			s.appendMu.Unlock()
			return fmt.Errorf("pack %s: %w", packName(p.id), err)
		}
	}
	unnamed := false
	for _, p := range todo {
		unnamed = unnamed || !p.named // written only with syncMu held
	}
	if unnamed {
		if err := s.fs.SyncDir(s.packDir); err != nil {
			s.appendMu.Lock()
			for _, p := range todo {
				if !p.named {
					s.suspect(p)
				}
			}
			s.appendMu.Unlock()
			return err
		}
	}
	s.appendMu.Lock()
	s.dirty = slices.DeleteFunc(s.dirty, func(p *pack) bool {
		i := slices.Index(todo, p)
		if i < 0 {
			return false
		}
		p.named, p.synced = true, ends[i]
		if p == s.active {
			return false
		}
		if p.synced < p.end {
			return false
		}
		if p.w != nil {
			p.w.Close()
			p.w = nil
		}
		return true
	})
	s.appendMu.Unlock()
	return nil
}

func (s *Store) syncPack(p *pack, end int64) error {
	s.appendMu.Lock()
	w, done := p.w, p.synced >= end
	s.appendMu.Unlock()
	if done {
		return nil
	}
	if w != nil {
		return w.Sync()
	}
	// Left by an earlier process.
	f, err := s.fs.Open(s.packPath(p.id), disk.Write)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// suspect notes that what p holds beyond its last good sync may never reach
// the disk; it wants appendMu held.
func (s *Store) suspect(p *pack) {
	from := max(p.synced, packHeader)
	if !p.named {
		from = packHeader
	}
	if s.active == p {
		s.active = nil
	}
	if p.w != nil {
		p.w.Close()
		p.w = nil
	}
	s.dirty = slices.DeleteFunc(s.dirty, func(q *pack) bool { return q == p })
	s.suspects = append(s.suspects, p)
	s.mu.Lock()
	p.bad = from
	s.mu.Unlock()
}

// moveSuspects writes the chunks of suspect records to a pack that has not
// failed. All of them are in memory still: a run takes only synced ones.
func (s *Store) moveSuspects() error {
	for len(s.suspects) > 0 {
		p := s.suspects[0]
		todo := map[chunk.Sig]runs.Loc{}
		s.mu.RLock()
		for _, m := range []map[chunk.Sig]runs.Loc{s.imm, s.mem} {
			for sig, l := range m {
				if l.Flags&runs.Dead == 0 && l.Pack == p.id && l.At() >= p.bad {
					todo[sig] = l
				}
			}
		}
		s.mu.RUnlock()
		for sig, l := range todo {
			at, err := s.lookup(&sig)
			if err != nil {
				return err
			}
			if at.pack != p || at.Loc != l {
				continue
			}
			if err := s.move(&sig, at); err != nil {
				return err
			}
		}
		s.log.Warn("store: chunks whose sync failed, or was not seen, were written to another pack",
			"pack", packName(p.id), "chunks", len(todo))
		s.suspects = s.suspects[1:]
		s.moved = append(s.moved, p)
	}
	return nil
}

// move copies a chunk's record to the end of the log. A chunk that cannot be
// read back as it was is dropped.
func (s *Store) move(sig *chunk.Sig, at place) error {
	buf := s.bufs.get(int(at.Len))
	defer s.bufs.put(buf)
	data := (*buf)[:at.Len]
	if err := s.read(sig, at, data); err != nil {
		if err := s.failed("store.move", sig, at, err, 0); err != nil && block.KindOf(err) == block.KindIO {
			return err
		}
		return nil
	}
	s.appendMu.Lock()
	defer s.appendMu.Unlock()
	to, err := s.appendRecord(sig, at.Loc, data)
	if err == nil {
		s.replace(sig, at, to)
	}
	return err
}

// trimMoved frees what was suspect, now that its copies are durable.
func (s *Store) trimMoved() {
	for _, p := range s.moved {
		if p.bad <= packHeader {
			s.mu.Lock()
			delete(s.packs, p.id)
			s.mu.Unlock()
			s.size.Add(-p.end)
			s.unlink(p, true)
			continue
		}
		// Should this fail, the bytes are garbage that costs space only.
		if f, err := s.fs.Open(s.packPath(p.id), disk.Write); err == nil {
			if f.Truncate(p.bad) == nil {
				s.mu.Lock()
				s.size.Add(p.bad - p.end)
				p.end = p.bad
				s.mu.Unlock()
			}
			f.Close()
		}
		s.appendMu.Lock()
		p.synced, p.named = p.end, true
		s.appendMu.Unlock()
		s.mu.Lock()
		p.bad = 0
		s.mu.Unlock()
	}
	s.moved = nil
}
