package store

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"forerun/block"
	"forerun/data/store/internal/runs"
	"forerun/disk"
	"forerun/internal/chunk"
)

// recover brings the map to the state of the packs: the manifest's runs, then
// the part of the log that came after them, or all of it.
func (s *Store) recover() error {
	files, err := s.packFiles()
	if err != nil {
		return err
	}
	m, rs, err := s.loadMap()
	if err != nil && !mapLost(err) {
		return err
	}
	if m == nil {
		// A log as short as the part that has no checkpoint may be just that.
		n, err := s.logBytes(files)
		if err != nil {
			return err
		}
		s.building = n > hardFactor*s.opt.CheckpointBytes
	} else {
		s.building = m.building
	}
	if err != nil && block.KindOf(err) != block.KindNotFound {
		s.log.Warn("store: the block map is damaged", "error", err)
	}
	if m != nil {
		s.id, s.mapGen = m.id, m.gen
		err = s.checkKey(m.key)
	} else {
		err = s.idFromPacks(files)
	}
	if err != nil {
		return err
	}
	if err := s.tidyMap(rs); err != nil {
		return err
	}

	from := position{}
	known := map[uint32]packState{}
	if m != nil {
		from, s.nextPack, s.nextRun = m.pos, max(1, m.nextPack), max(s.nextRun, m.nextRun)
		for _, p := range m.packs {
			known[p.id] = p
		}
		s.ver = newVersion(rs)
	}
	for _, id := range files {
		p, err := s.adoptPack(id, known, from)
		if err != nil {
			return err
		}
		if p != nil {
			s.packs[id] = p
		}
		s.nextPack = max(s.nextPack, id+1)
	}
	s.last = snapshot{pos: from, nextPack: s.nextPack}
	if m != nil {
		s.last.packs = m.packs
	}
	for id, k := range known {
		if s.packs[id] == nil && k.live.chunks > 0 {
			s.log.Info("store: a pack is gone; its chunks are not held any more", "pack", packName(id), "chunks", k.live.chunks)
		}
	}
	if !s.building {
		return s.replay(files, from)
	}
	err = s.replay(files, from)
	s.building = false
	if err == nil {
		s.syncMu.Lock()
		defer s.syncMu.Unlock()
		if err := s.checkpointLocked(); err != nil {
			s.log.Warn("store: the new block map could not be written whole yet", "error", err)
		}
	}
	return err
}

func (s *Store) packFiles() ([]uint32, error) {
	names, err := s.fs.List(s.packDir)
	if err != nil {
		return nil, err
	}
	var ids []uint32
	for _, n := range names {
		if id, ok := parseName(n, ".pack"); ok {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids, nil
}

func (s *Store) logBytes(files []uint32) (n int64, err error) {
	for _, id := range files {
		st, err := s.fs.Stat(s.packPath(id))
		if err != nil {
			return 0, err
		}
		n += st.Size
	}
	return n, nil
}

// loadMap opens what the manifest names.
func (s *Store) loadMap() (*manifest, []*sharedRun, error) {
	m, err := readManifest(s.fs, s.mapDir)
	if err != nil {
		return nil, nil, err
	}
	var rs []*sharedRun
	for _, id := range m.runs {
		r, err := runs.Open(s.fs, s.runPath(id), id)
		if err != nil {
			for _, r := range rs {
				r.Close()
			}
			if block.KindOf(err) == block.KindNotFound {
				err = fmt.Errorf("%v: %w", err, runs.ErrDamaged)
			}
			return nil, nil, err
		}
		rs = append(rs, &sharedRun{Run: r})
	}
	return m, rs, nil
}

// checkKey refuses a store of another dedup domain: its signatures say nothing
// under our key.
func (s *Store) checkKey(found chunk.KeyID) error {
	if ours := s.opt.Key.ID(); found != ours {
		return block.E("store.open", s.dir, block.KindInvalid, fmt.Errorf(
			"it belongs to another dedup domain: its key id is %x, that of the key given is %x; open it with its own key, or use another directory", found, ours))
	}
	return nil
}

// idFromPacks takes the store's id from the first pack whose header is whole.
func (s *Store) idFromPacks(files []uint32) error {
	for _, id := range files {
		found, key, newer, err := s.readHeader(id)
		if newer {
			return block.E("store.open", packName(id), block.KindUnsupported, err)
		}
		if err == nil {
			s.id = found
			return s.checkKey(key)
		}
	}
	return nil
}

func (s *Store) readHeader(id uint32) (found storeID, key chunk.KeyID, newer bool, err error) {
	f, err := s.fs.Open(s.packPath(id), disk.Read)
	if err != nil {
		return found, key, false, err
	}
	defer f.Close()
	var b [packHeader]byte
	if n, err := f.ReadAt(b[:], 0); n < len(b) {
		return found, key, false, err
	}
	return parsePackHeader(b[:], id)
}

// tidyMap removes runs that no manifest names and finds a number for the next.
func (s *Store) tidyMap(keep []*sharedRun) error {
	names, err := s.fs.List(s.mapDir)
	if err != nil {
		return err
	}
	for _, n := range names {
		id, ok := parseName(n, ".run")
		if !ok {
			continue
		}
		s.nextRun = max(s.nextRun, id+1)
		if !slices.ContainsFunc(keep, func(r *sharedRun) bool { return r.ID() == id }) {
			s.fs.Remove(s.runPath(id)) // else the next Open does
		}
	}
	return nil
}

// adoptPack takes a pack file that was found into the table. Packs of the
// part of the log that the map covers are as the manifest says, or were
// removed before it was written and came back with a power cut.
func (s *Store) adoptPack(id uint32, known map[uint32]packState, from position) (*pack, error) {
	st, err := s.fs.Stat(s.packPath(id))
	if err != nil {
		return nil, err
	}
	p := &pack{id: id, salt: saltOf(s.id, id), end: st.Size}
	k, inMap := known[id]
	switch {
	case id > from.Pack || id == from.Pack && from.Off == 0:
		s.dirty = append(s.dirty, p)
	case !inMap:
		s.log.Info("store: a removed pack came back and is removed again", "pack", packName(id))
		s.fs.Remove(s.packPath(id))
		return nil, nil
	default:
		p.live, p.named, p.synced = k.live, true, min(k.end, st.Size)
		if st.Size < k.end {
			s.log.Warn("store: a pack is shorter than it was; chunks beyond its end are lost", "pack", packName(id),
				"bytes", st.Size, "expected", k.end)
		}
		if id == from.Pack && st.Size > from.Off {
			s.dirty = append(s.dirty, p)
		}
	}
	return p, nil
}

// replay reads the log from a position on into the map.
func (s *Store) replay(files []uint32, from position) error {
	var total, done int64
	for _, p := range s.dirty {
		total += p.end
	}
	rebuild, limit := s.building, s.opt.MapEntries
	if !rebuild {
		// As much as a process may have had in memory, so that no checkpoint
		// comes between: see suspect.
		limit *= hardFactor + 1
	}
	if rebuild {
		s.log.Warn("store: building the block map from the packs", "packs", len(s.dirty), "bytes", total)
	}
	begin, chunks, wrote := time.Now(), 0, false
	var largest int64
	for _, p := range s.dirty {
		largest = max(largest, p.end)
	}
	buf := scanMemory(largest)
	reported := begin
	for _, p := range slices.Clone(s.dirty) {
		start := int64(packHeader)
		if p.id == from.Pack {
			start = max(start, from.Off)
		}
		sc, err := s.replayPack(p, start, buf, func() error {
			if len(s.mem) < limit {
				return nil
			}
			wrote = true
			return s.replayCheckpoint()
		})
		if err != nil {
			return err
		}
		chunks += sc.Records
		s.tail.Add(sc.End - start)
		done += p.end
		if now := time.Now(); rebuild && now.Sub(reported) > 5*time.Second {
			reported = now
			s.log.Info("store: building the block map", "bytes", done, "of", total, "chunks", chunks)
		}
	}
	s.replaying = nil
	if rebuild {
		s.log.Warn("store: the block map was built", "chunks", chunks, "bytes", total, "took", time.Since(begin).Round(time.Millisecond))
	} else if chunks > 0 {
		s.log.Info("store: recovered what came after the last checkpoint", "chunks", chunks)
	}
	if len(s.dirty) > 0 {
		s.seq++
	}
	if rebuild || wrote {
		// Records may be in runs by now, so they cannot be suspect; what the log
		// holds is synced by the next Sync as if this process had written it.
		return nil
	}
	for _, p := range slices.Clone(s.dirty) {
		s.suspect(p)
	}
	s.reopenLast(files, from)
	return nil
}

// replayPack reads one pack and cuts its torn tail.
func (s *Store) replayPack(p *pack, start int64, buf []byte, after func() error) (scanned, error) {
	if _, _, newer, err := s.readHeader(p.id); newer {
		return scanned{}, block.E("store.open", packName(p.id), block.KindUnsupported, err)
	} else if err != nil && p.end > packHeader {
		s.log.Warn("store: a pack's header is damaged; its records are read with the store's id", "pack", packName(p.id), "error", err)
	}
	f, err := s.fs.Open(s.packPath(p.id), disk.Read)
	if err != nil {
		return scanned{}, err
	}
	defer f.Close()
	size := p.end
	sc, err := scan(f, size, min(start, size), p.salt, p.id, buf, func(e runs.Entry, _ []byte) error {
		at, err := s.lookup(&e.Sig)
		if err != nil && !errors.Is(err, runs.ErrDamaged) {
			return err
		}
		if at.pack == p && at.Loc == e.Loc {
			return nil
		}
		s.mu.Lock()
		if at.pack != nil {
			at.pack.live.add(at.Loc, -1)
		}
		s.mem[e.Sig] = e.Loc
		p.live.add(e.Loc, 1)
		s.mu.Unlock()
		s.replaying = &position{p.id, e.At() + span(e.Loc)}
		return after()
	})
	if err != nil {
		return sc, err
	}
	if sc.Gaps > 0 || sc.End < size {
		s.log.Info("store: parts of a pack are no records", "pack", packName(p.id), "gaps", sc.Gaps, "records end", sc.End,
			"bytes", size, "unreadable", sc.Unreadable)
	}
	if sc.End < size && !sc.Unreadable {
		p.end = max(sc.End, min(size, packHeader))
		if w, err := s.fs.Open(s.packPath(p.id), disk.Write); err == nil {
			w.Truncate(p.end) // the log goes on in another pack: only space is lost
			w.Close()
		}
	}
	return sc, nil
}

// replayCheckpoint writes the map during a replay that is too long for memory.
func (s *Store) replayCheckpoint() error {
	s.syncMu.Lock()
	err := s.checkpointLocked()
	s.syncMu.Unlock()
	if err != nil {
		return err
	}
	for {
		again, err := s.mergeOnce()
		if !again || err != nil {
			return err
		}
	}
}

// reopenLast goes on with the last pack after a clean Close. In any other case
// its bytes may be torn, and the log goes on in a new one.
func (s *Store) reopenLast(files []uint32, from position) {
	if len(files) == 0 || len(s.suspects) > 0 {
		return
	}
	p := s.packs[files[len(files)-1]]
	if p == nil || p.id != from.Pack || p.end != from.Off || !p.named || p.synced != p.end || p.end < packHeader ||
		p.end >= s.opt.PackBytes || p.end%runs.Align != 0 {
		return
	}
	if w, err := s.fs.Open(s.packPath(p.id), disk.Write); err == nil {
		p.w = w
		s.active = p
		s.dirty = append(s.dirty, p)
	}
}
