package store

import (
	"fmt"
	"hash/crc32"

	"forerun/block"
	"forerun/data/store/internal/runs"
	"forerun/disk"
	"forerun/internal/chunk"
)

// flight is a Put under way; others of the same signature wait for it.
type flight struct{ done chan struct{} }

// Put stores a packed chunk and says whether it was new. p.Data is copied. The
// chunk can be read at once and is durable after Sync. A signature that is
// held already costs a lookup; of several Puts of one signature at once, one
// stores.
//
// The packed bytes are stored as they are: the caller has opened them, which
// verified the signature (Options.Verify makes Put do it again). A chunk of
// zeros, without a signature of its own, is refused with KindInvalid, and so is
// a Bundle: see PutBundle.
//
// With KindNoSpace nothing changed, and Put works again when there is space.
func (s *Store) Put(p chunk.Packed) (added bool, err error) {
	const op = "store.put"
	if err := s.enter(op); err != nil {
		return false, err
	}
	defer s.gate.RUnlock()
	if !p.Codec.Packs() || p.Plain < 1 || p.Plain > chunk.MaxSize || len(p.Data) < 1 || len(p.Data) > chunk.MaxSize {
		return false, block.E(op, "chunk "+p.Sig.String(), block.KindInvalid, fmt.Errorf(
			"codec %d with %d packed and %d plain bytes cannot be stored; zeros are a state of a map, lengths end at %d",
			p.Codec, len(p.Data), p.Plain, chunk.MaxSize))
	}
	if s.opt.Verify {
		buf := s.bufs.get(p.Plain)
		err := p.OpenUnder(&s.opt.Key, (*buf)[:p.Plain])
		s.bufs.put(buf)
		if err != nil {
			return false, block.E(op, "chunk "+p.Sig.String(), block.KindCorrupt, err)
		}
	}
	added, err = s.put(p)
	if err != nil {
		return false, block.E(op, "chunk "+p.Sig.String(), block.KindNone, advice(err))
	}
	s.countPut(added)
	return added, nil
}

func (s *Store) put(p chunk.Packed) (bool, error) {
	f := s.fly(&p.Sig)
	defer s.land(&p.Sig, f)
	return s.keepChunk(p)
}

// fly waits until nobody else is at sig, and keeps others away until land.
func (s *Store) fly(sig *chunk.Sig) *flight {
	f := &flight{}
	for {
		s.mu.Lock()
		other := s.flights[*sig]
		if other == nil {
			s.flights[*sig] = f
			s.mu.Unlock()
			return f
		}
		if other.done == nil {
			other.done = make(chan struct{})
		}
		done := other.done
		s.mu.Unlock()
		<-done
	}
}

func (s *Store) land(sig *chunk.Sig, f *flight) {
	s.mu.Lock()
	delete(s.flights, *sig)
	if f.done != nil {
		close(f.done)
	}
	s.mu.Unlock()
}

// giveWay is how many packs a bounded store removes for one Put on a full disk.
const giveWay = 3

// keepChunk stores a chunk unless it is there; the caller flies. On a full disk a bounded
// store gives way.
func (s *Store) keepChunk(p chunk.Packed) (bool, error) {
	for try := 0; ; try++ {
		added, err := s.keepOnce(p)
		if block.KindOf(err) != block.KindNoSpace || s.opt.LimitBytes == 0 || try == giveWay || !s.evict() {
			return added, err
		}
	}
}

func (s *Store) keepOnce(p chunk.Packed) (bool, error) {
	for {
		at, err := s.lookup(&p.Sig)
		if err != nil || at.pack == nil {
			// A damaged page hides the chunk, or there is none: store it. A second
			// record of a chunk does no harm.
			break
		}
		if s.confirm(&p.Sig, at) {
			return false, nil
		}
	}
	if err := s.makeRoom(); err != nil {
		return false, err
	}
	l := runs.Loc{Len: uint32(len(p.Data)), Plain: uint32(p.Plain), Codec: p.Codec, Algo: s.opt.Key.Algo(),
		CRC: crc32.Checksum(p.Data, castagnoli)}
	s.appendMu.Lock()
	to, err := s.appendRecord(&p.Sig, l, p.Data)
	if err == nil {
		// With appendMu held: a checkpoint that says the map has all records
		// before a position must find this one in it.
		s.mu.Lock()
		s.mem[p.Sig] = to
		s.packs[to.Pack].live.add(to, 1)
		s.news.note(&p.Sig, false)
		if s.sweep != nil {
			s.sweep.guard(&p.Sig, s.packs[to.Pack], to)
		}
		s.mu.Unlock()
	}
	s.appendMu.Unlock()
	if err != nil {
		return false, err
	}
	s.evictIfOver()
	s.checkpointIfDue()
	return true, nil
}

// confirm tells a caller that a chunk is held. From then on a sweep under way
// must keep it. It is false when the place is gone.
func (s *Store) confirm(sig *chunk.Sig, at place) bool {
	s.mu.RLock()
	ok, sweeping := s.packs[at.Pack] == at.pack, s.sweep != nil
	s.mu.RUnlock()
	if !ok || !sweeping {
		return ok
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.packs[at.Pack] != at.pack {
		return false
	}
	if s.sweep != nil {
		s.sweep.guard(sig, at.pack, at.Loc)
	}
	return true
}

// appendRecord writes a record at the end of the log and returns its place;
// it wants appendMu held. A record that fails leaves the end where it was.
func (s *Store) appendRecord(sig *chunk.Sig, l runs.Loc, data []byte) (runs.Loc, error) {
	n := recordSize(len(data))
	p := s.active
	if p != nil && p.end > packHeader && p.end+n > s.opt.PackBytes {
		s.retire(p)
		s.touch(p)
		p = nil
	}
	if p == nil {
		var err error
		if p, err = s.newPack(); err != nil {
			return l, err
		}
	}
	l.Pack, l.Off = p.id, uint32(p.end/runs.Align)
	buf := s.bufs.get(int(n))
	defer s.bufs.put(buf)
	b := (*buf)[:n]
	putRecord(b, p.salt, sig, l, data)
	if _, err := p.w.WriteAt(b, p.end); err != nil {
		// What it left is written over by the next record, or cut here.
		cut := p.w.Truncate(p.end)
		if cut != nil || block.KindOf(err) != block.KindNoSpace {
			s.retire(p)
		}
		return l, fmt.Errorf("pack %s: %w", packName(p.id), err)
	}
	s.mu.Lock()
	p.end += n
	s.seq++
	s.mu.Unlock()
	s.tail.Add(n)
	s.size.Add(n)
	return l, nil
}

// retire ends appending to a pack; it wants appendMu held. The next sync still
// has it in its list.
func (s *Store) retire(p *pack) {
	if s.active == p {
		s.active = nil
	}
	if p.w != nil && p.synced == p.end && p.named {
		p.w.Close()
		p.w = nil
	}
}

// newPack begins a pack and makes it the active one; it wants appendMu held.
func (s *Store) newPack() (*pack, error) {
	id := s.nextPack
	path := s.packPath(id)
	// A file of that name can only be what a failed attempt left.
	w, err := s.fs.Open(path, disk.Write|disk.Create|disk.Trunc)
	if err != nil {
		return nil, err
	}
	var h [packHeader]byte
	putPackHeader(h[:], s.id, s.opt.Key.ID(), id)
	if _, err := w.WriteAt(h[:], 0); err != nil {
		w.Close()
		s.fs.Remove(path)
		return nil, err
	}
	p := &pack{id: id, salt: saltOf(s.id, id), end: packHeader, w: w}
	s.mu.Lock()
	s.packs[id] = p
	s.nextPack++
	s.mu.Unlock()
	s.active = p
	s.dirty = append(s.dirty, p)
	s.size.Add(packHeader)
	return p, nil
}
