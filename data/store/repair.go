package store

import (
	"errors"
	"slices"
	"time"

	"forerun/block"
	"forerun/data/store/internal/runs"
)

// errStop ends a scan early.
var errStop = errors.New("stop")

// repairBackoff is how long after an attempt the next one may begin: each reads
// all packs.
const repairBackoff = time.Minute

// repair restores what damaged pages of the map hide. It walks the packs, the
// newest first, and enters again each record whose signature a damaged page
// covers; then it merges all runs without those pages. It wants maint held.
func (s *Store) repair() error {
	if now := time.Now(); now.Before(s.repairAt) {
		return nil
	} else {
		s.repairAt = now.Add(repairBackoff)
	}
	s.log.Error("store: the block map is damaged; it is repaired from the packs")
	s.mu.RLock()
	var todo []*pack
	for _, p := range s.packs {
		todo = append(todo, p)
	}
	s.mu.RUnlock()
	slices.SortFunc(todo, func(a, b *pack) int { return int(int64(b.id) - int64(a.id)) })
	restored := 0
	buf := scanMemory(scanBuffer)
	for _, p := range todo {
		n, err := s.repairFrom(p, buf)
		if err != nil {
			return err
		}
		restored += n
	}
	s.syncMu.Lock()
	err := s.checkpointLocked()
	s.syncMu.Unlock()
	if err != nil {
		return err
	}
	s.mu.RLock()
	v := s.ver
	v.refs.Add(1)
	s.mu.RUnlock()
	defer s.release(v)
	if err := s.mergeRuns(v, len(v.runs), true); err != nil {
		return err
	}
	s.mapDamaged.Store(false)
	s.repairAt = time.Time{}
	s.log.Info("store: the block map was repaired", "chunks", restored)
	return nil
}

func (s *Store) repairFrom(p *pack, buf []byte) (restored int, err error) {
	f, err := s.hold(p)
	if errors.Is(err, errGone) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer s.letGo(p)
	s.mu.RLock()
	end := p.end
	s.mu.RUnlock()
	_, err = scan(f, end, packHeader, p.salt, p.id, buf, func(e runs.Entry, _ []byte) error {
		if s.closing.Load() {
			return errStop
		}
		if _, err := s.lookup(&e.Sig); err == nil {
			return nil
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if _, ok := s.recent(&e.Sig); ok || s.packs[p.id] != p {
			return nil
		}
		// It was counted when it was put.
		s.mem[e.Sig] = e.Loc
		restored++
		return nil
	})
	if errors.Is(err, errStop) {
		err = block.E("store.repair", s.dir, block.KindClosed, nil)
	}
	return restored, err
}
