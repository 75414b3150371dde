package store

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"forerun/block"
	"forerun/internal/chunk"
)

// Has says whether a chunk is held. It reads no pack; a chunk that turns out
// damaged when it is read is not held from then on. Of a region it reads the
// recipe, and answers true if all its pieces are held in the same sense: some
// ten lookups.
func (s *Store) Has(sig chunk.Sig) bool {
	if s.enter("store.has") != nil {
		return false
	}
	defer s.gate.RUnlock()
	for {
		at, err := s.lookup(&sig)
		if err != nil || at.pack == nil {
			s.count.misses.Add(1)
			return false
		}
		if at.Codec == chunk.Recipe {
			if ok, again := s.hasRegion(&sig); !again {
				if ok {
					s.count.hits.Add(1)
				} else {
					s.count.misses.Add(1)
				}
				return ok
			}
			continue
		}
		if s.confirm(&sig, at) {
			s.count.hits.Add(1)
			return true
		}
	}
}

// Get fills dst, whose length must be the plain length, with the plain bytes
// of a chunk, verified against its signature. A region is put together from its
// pieces; one that lacks a piece, or has a damaged one, is not held any more either.
//
// KindNotFound: it is not held. KindCorrupt: what is stored is not the chunk, or
// cannot be read; it is not held any more, fetch it again and Put it. The cause is
// a *Damage. KindInvalid: dst has another length. On error the content of dst is undefined.
func (s *Store) Get(sig chunk.Sig, dst []byte) error {
	const op = "store.get"
	if err := s.enter(op); err != nil {
		return err
	}
	defer s.gate.RUnlock()
	at, err := s.get(op, sig, dst)
	if err == nil && at.Codec == chunk.Recipe {
		err = s.getRegion(op, sig, dst)
	}
	if err == nil {
		s.count.hits.Add(1)
	}
	return err
}

// get fills dst with the plain bytes of a chunk; of a recipe it only says where it is.
func (s *Store) get(op string, sig chunk.Sig, dst []byte) (place, error) {
	for try := 0; ; try++ {
		at, err := s.find(op, &sig)
		if err != nil {
			return at, err
		}
		if int(at.Plain) != len(dst) {
			return at, block.E(op, "chunk "+sig.String(), block.KindInvalid,
				fmt.Errorf("its plain length is %d, the buffer's %d", at.Plain, len(dst)))
		}
		if at.Codec == chunk.Recipe {
			return at, nil
		}
		buf := s.bufs.get(int(at.Len))
		err = s.read(&sig, at, (*buf)[:at.Len])
		if err == nil {
			p := chunk.Packed{Sig: sig, Codec: at.Codec, Plain: len(dst), Data: (*buf)[:at.Len]}
			if err = p.OpenUnder(&s.opt.Key, dst); err != nil {
				err = &Damage{Sig: sig, Pack: packName(at.Pack), Off: at.At(), Expected: "signature " + sig.String(),
					Found: err.Error(), Err: err}
			}
		}
		s.bufs.put(buf)
		if err == nil {
			return at, nil
		}
		if err = s.failed(op, &sig, at, err, try); err != nil {
			return at, err
		}
	}
}

// GetPacked returns a chunk as it is stored, its checksum verified but not its
// signature; of a region that is its recipe, with codec Recipe. Its bytes are in buf's space if they fit (buf may be nil), else
// in new memory; they are the caller's. Errors are those of Get.
func (s *Store) GetPacked(sig chunk.Sig, buf []byte) (chunk.Packed, error) {
	const op = "store.get packed"
	if err := s.enter(op); err != nil {
		return chunk.Packed{}, err
	}
	defer s.gate.RUnlock()
	for try := 0; ; try++ {
		at, err := s.find(op, &sig)
		if err != nil {
			return chunk.Packed{}, err
		}
		if cap(buf) < int(at.Len) {
			buf = make([]byte, at.Len)
		}
		buf = buf[:at.Len]
		if err = s.read(&sig, at, buf); err == nil {
			s.count.hits.Add(1)
			return chunk.Packed{Sig: sig, Codec: at.Codec, Plain: int(at.Plain), Data: buf}, nil
		}
		if err = s.failed(op, &sig, at, err, try); err != nil {
			return chunk.Packed{}, err
		}
	}
}

// Damage says what was found in place of a chunk.
type Damage struct {
	Sig      chunk.Sig
	Pack     string // file name of the pack, "" when the block map is damaged
	Off      int64  // of the record, bytes
	Expected string
	Found    string
	Err      error // the cause, may be nil
}

// Error tells it in one line.
func (d *Damage) Error() string {
	if d.Pack == "" {
		return fmt.Sprintf("%s: expected %s, found %s; the map is repaired from the packs, until then fetch the chunk again", d.Sig, d.Expected, d.Found)
	}
	return fmt.Sprintf("%s in pack %s at %d: expected %s, found %s; the chunk was dropped, fetch it again", d.Sig, d.Pack, d.Off, d.Expected, d.Found)
}

// Unwrap returns the cause.
func (d *Damage) Unwrap() error { return d.Err }

// find is lookup with the errors of Get.
func (s *Store) find(op string, sig *chunk.Sig) (place, error) {
	at, err := s.lookup(sig)
	if err != nil {
		return at, block.E(op, "chunk "+sig.String(), block.KindCorrupt,
			&Damage{Sig: *sig, Expected: "a page of the block map", Found: err.Error(), Err: err})
	}
	if at.pack == nil {
		s.count.misses.Add(1)
		return at, &block.Error{Op: op, Object: "chunk " + sig.String(), Kind: block.KindNotFound}
	}
	return at, nil
}

// read reads the packed bytes of a chunk and checks their checksum. Errors: a
// *Damage, errGone, or one of opening the pack.
func (s *Store) read(sig *chunk.Sig, at place, dst []byte) error {
	f, err := s.hold(at.pack)
	if err != nil {
		if block.KindOf(err) == block.KindNotFound {
			err = &Damage{Sig: *sig, Pack: packName(at.Pack), Off: at.At(), Expected: "a pack", Found: "no file", Err: err}
		}
		return err
	}
	n, err := f.ReadAt(dst, at.At()+recordHeader)
	s.letGo(at.pack)
	if n == len(dst) {
		crc := crc32.Checksum(dst, castagnoli)
		if crc == at.CRC {
			return nil
		}
		return &Damage{Sig: *sig, Pack: packName(at.Pack), Off: at.At(),
			Expected: fmt.Sprintf("CRC32C %08x", at.CRC), Found: fmt.Sprintf("%08x", crc)}
	}
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return &Damage{Sig: *sig, Pack: packName(at.Pack), Off: at.At(),
		Expected: fmt.Sprintf("%d bytes", len(dst)), Found: fmt.Sprintf("%d (%v)", n, err), Err: err}
}

// failed decides what a failed read means: nil to try again, because the chunk
// is elsewhere now, or the error for the caller. Damage drops the chunk.
func (s *Store) failed(op string, sig *chunk.Sig, at place, err error, try int) error {
	now, lookErr := s.lookup(sig)
	if lookErr == nil && (now.pack != at.pack || now.Loc != at.Loc) && try < 8 {
		return nil
	}
	var d *Damage
	switch {
	case errors.As(err, &d):
		s.drop(sig, at)
		s.log.Warn("store: a chunk is damaged and was dropped", "chunk", *sig, "pack", d.Pack, "offset", d.Off,
			"expected", d.Expected, "found", d.Found)
		return block.E(op, "chunk "+sig.String(), block.KindCorrupt, err)
	case errors.Is(err, errGone):
		s.count.misses.Add(1)
		return &block.Error{Op: op, Object: "chunk " + sig.String(), Kind: block.KindNotFound}
	}
	return block.E(op, "chunk "+sig.String(), block.KindIO, fmt.Errorf("pack %s cannot be opened: %w", packName(at.Pack), err))
}

// Delete forgets a chunk. It is durable after Sync; its space comes back with
// Sweep. KindNotFound: it was not held.
func (s *Store) Delete(sig chunk.Sig) error {
	const op = "store.delete"
	if err := s.enter(op); err != nil {
		return err
	}
	defer s.gate.RUnlock()
	for {
		at, err := s.find(op, &sig)
		if err != nil {
			return err
		}
		if s.replace(&sig, at, dead) {
			return nil
		}
	}
}
