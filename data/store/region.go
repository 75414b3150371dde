package store

import (
	"errors"
	"fmt"

	"forerun/block"
	"forerun/internal/chunk"
)

// A region is a chunk that is cut by its content. What is stored under its
// signature is its recipe, which lists pieces; these are chunks of the store
// like all others, and several recipes can list one.

// PutBundle takes a region that came over the link: it verifies everything,
// puts the region's bytes together in dst, whose length must be the plain
// length, and keeps the pieces that came and then the recipe. The region can be
// read at once and is durable after Sync.
//
// KindNotFound: a piece that came as a signature only is not held, or cannot be
// read; nothing was kept, ask for all bytes. KindCorrupt: p is not what it
// says. KindInvalid: p is no Bundle, or dst has another length. KindClosed. After
// these the content of dst is undefined. KindNoSpace, KindIO: the region could
// not be kept, but dst holds its bytes, verified.
func (s *Store) PutBundle(p chunk.Packed, dst []byte) error {
	const op = "store.put bundle"
	if err := s.enter(op); err != nil {
		return err
	}
	defer s.gate.RUnlock()
	if p.Codec != chunk.Bundle || len(dst) != p.Plain {
		return block.E(op, "chunk "+p.Sig.String(), block.KindInvalid,
			fmt.Errorf("codec %d with %d plain bytes for a buffer of %d", p.Codec, p.Plain, len(dst)))
	}
	recipe, pieces, err := chunk.ParseBundle(&s.opt.Key, p, nil)
	if err != nil {
		return block.E(op, "chunk "+p.Sig.String(), block.KindCorrupt, err)
	}
	// A sweep that began between a piece and the recipe would take the piece.
	s.bundles.RLock()
	defer s.bundles.RUnlock()
	if err := s.openPieces(op, &p, pieces, dst); err != nil {
		return err
	}
	if err := s.keepRegion(&p, pieces, recipe); err != nil {
		kind := block.KindIO
		if block.KindOf(err) == block.KindNoSpace {
			kind = block.KindNoSpace
		}
		return block.E(op, "chunk "+p.Sig.String(), kind, advice(err))
	}
	return nil
}

// openPieces fills dst with the bytes of the pieces of a bundle.
func (s *Store) openPieces(op string, p *chunk.Packed, pieces []chunk.Packed, dst []byte) error {
	at := 0
	for i := range pieces {
		q := &pieces[i]
		part := dst[at : at+q.Plain]
		at += q.Plain
		if q.Codec == chunk.Known {
			if same := earlier(pieces[:i], q, dst); same != nil {
				copy(part, same)
			} else if err := s.heldPiece(op, q.Sig, part); err != nil {
				return block.E(op, "chunk "+p.Sig.String(), block.KindNotFound,
					fmt.Errorf("its sender takes a piece for held that is not; ask for all bytes: %w", err))
			}
			continue
		}
		if err := q.OpenUnder(&s.opt.Key, part); err != nil {
			return block.E(op, "chunk "+p.Sig.String(), block.KindCorrupt, fmt.Errorf("piece %d: %w", i, err))
		}
	}
	return nil
}

// earlier returns the bytes of the piece q if it stands among pieces, whose bytes
// are in dst already.
func earlier(pieces []chunk.Packed, q *chunk.Packed, dst []byte) []byte {
	at := 0
	for i := range pieces {
		e := &pieces[i]
		if e.Codec != chunk.Zeros && e.Sig == q.Sig && e.Plain == q.Plain {
			return dst[at : at+e.Plain]
		}
		at += e.Plain
	}
	return nil
}

// heldPiece reads a piece, and has a sweep under way keep it.
func (s *Store) heldPiece(op string, sig chunk.Sig, part []byte) error {
	if err := s.confirmPiece(&sig, len(part)); err != nil {
		return err
	}
	at, err := s.get(op, sig, part)
	if err == nil && at.Codec == chunk.Recipe {
		err = errNoPiece
	}
	return err
}

func (s *Store) keepRegion(p *chunk.Packed, pieces []chunk.Packed, recipe []byte) error {
	f := s.fly(&p.Sig) // keeps those away who find that it lacks a piece
	defer s.land(&p.Sig, f)
	for i := range pieces {
		if q := pieces[i]; len(q.Data) > 0 {
			added, err := s.put(q)
			if err != nil {
				return fmt.Errorf("piece %d: %w", i, err)
			}
			s.countPut(added)
		}
	}
	added, err := s.keepChunk(chunk.Packed{Sig: p.Sig, Codec: chunk.Recipe, Plain: p.Plain, Data: recipe})
	if err == nil {
		s.countPut(added)
	}
	return err
}

func (s *Store) countPut(added bool) {
	if added {
		s.count.puts.Add(1)
	} else {
		s.count.dups.Add(1)
	}
}

// errNoPiece: a piece of a region is not held.
var errNoPiece = errors.New("the piece is not held")

// confirmPiece says whether a piece is held: nil, errNoPiece, or that the block
// map cannot tell. A sweep under way keeps it from then on.
func (s *Store) confirmPiece(sig *chunk.Sig, plain int) error {
	for {
		at, err := s.lookup(sig)
		if err != nil {
			return err
		}
		if at.pack == nil || at.Codec == chunk.Recipe || int(at.Plain) != plain {
			return errNoPiece
		}
		if s.confirm(sig, at) {
			return nil
		}
	}
}

// readRecipe reads and verifies the recipe at a place and appends its pieces to dst.
// Errors are those of read.
func (s *Store) readRecipe(sig *chunk.Sig, at place, dst []chunk.Packed) ([]chunk.Packed, error) {
	buf := s.bufs.get(int(at.Len))
	defer s.bufs.put(buf)
	data := (*buf)[:at.Len]
	if err := s.read(sig, at, data); err != nil {
		return dst, err
	}
	pieces, err := chunk.ParseRecipe(&s.opt.Key, chunk.Packed{Sig: *sig, Codec: chunk.Recipe, Plain: int(at.Plain), Data: data}, dst)
	if err != nil {
		return dst, &Damage{Sig: *sig, Pack: packName(at.Pack), Off: at.At(), Expected: "recipe " + sig.String(), Found: err.Error(), Err: err}
	}
	return pieces, nil
}

// recipe finds a recipe and lists its pieces. Errors are those of Get;
// KindNotFound also when it is a plain chunk.
func (s *Store) recipe(op string, sig *chunk.Sig, dst []chunk.Packed) (place, []chunk.Packed, error) {
	for try := 0; ; try++ {
		at, err := s.find(op, sig)
		if err == nil && at.Codec != chunk.Recipe {
			err = &block.Error{Op: op, Object: "chunk " + sig.String(), Kind: block.KindNotFound}
		}
		if err != nil {
			return at, dst, err
		}
		pieces, err := s.readRecipe(sig, at, dst)
		if err == nil {
			return at, pieces, nil
		}
		if err = s.failed(op, sig, at, err, try); err != nil {
			return at, dst, err
		}
	}
}

// getRegion is Get of a region.
func (s *Store) getRegion(op string, sig chunk.Sig, dst []byte) error {
	list := s.lists.Get().(*[]chunk.Packed)
	defer s.lists.Put(list)
	at, pieces, err := s.recipe(op, &sig, (*list)[:0])
	*list = pieces[:0]
	if err != nil {
		return err
	}
	if int(at.Plain) != len(dst) {
		return block.E(op, "chunk "+sig.String(), block.KindInvalid,
			fmt.Errorf("its plain length is %d, the buffer's %d", at.Plain, len(dst)))
	}
	for i := range pieces {
		q := &pieces[i]
		part := dst[:q.Plain]
		dst = dst[q.Plain:]
		if q.Codec == chunk.Zeros {
			clear(part)
			continue
		}
		found, err := s.get(op, q.Sig, part)
		if err == nil && found.Codec == chunk.Recipe {
			err = errNoPiece
		}
		if err == nil {
			continue
		}
		kind := block.KindOf(err)
		switch kind {
		case block.KindNotFound, block.KindCorrupt:
		case block.KindInvalid:
			kind = block.KindCorrupt // a piece of another length
		default:
			return err
		}
		s.dropRegion(&sig, at, pieces)
		return block.E(op, "chunk "+sig.String(), kind, fmt.Errorf("piece %d: %w", i, err))
	}
	return nil
}

// hasRegion is Has of a region; again means that the recipe is elsewhere by now.
func (s *Store) hasRegion(sig *chunk.Sig) (ok, again bool) {
	list := s.lists.Get().(*[]chunk.Packed)
	defer s.lists.Put(list)
	at, pieces, err := s.recipe("store.has", sig, (*list)[:0])
	*list = pieces[:0]
	if err != nil {
		return false, false
	}
	if !s.confirm(sig, at) {
		return false, true
	}
	for i := range pieces {
		if pieces[i].Codec == chunk.Zeros {
			continue
		}
		if err := s.confirmPiece(&pieces[i].Sig, pieces[i].Plain); err != nil {
			s.dropRegion(sig, at, pieces)
			return false, false
		}
	}
	return true, false
}

// dropRegion deletes a recipe that lacks a piece. Somebody may have put the
// piece again meanwhile: then it stays. So it does while the block map cannot tell.
func (s *Store) dropRegion(sig *chunk.Sig, at place, pieces []chunk.Packed) {
	f := s.fly(sig)
	defer s.land(sig, f)
	for i := range pieces {
		if q := &pieces[i]; q.Codec != chunk.Zeros && errors.Is(s.confirmPiece(&q.Sig, q.Plain), errNoPiece) {
			s.replace(sig, at, dead)
			return
		}
	}
}
