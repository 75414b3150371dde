package chunk

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/klauspost/compress/s2"
)

// A bundle is 4 bytes, the length of the recipe and bundleVersion above it; the
// recipe; for each piece that is not zeros 4 bytes, the length of its packed
// bytes and the codec above it; then these bytes, back to back. A piece that
// is Known, or that stands earlier in the bundle, has none.
const (
	bundleVersion = 1
	bundleHeader  = 4
	codecShift    = 24
	lengthMask    = 1<<codecShift - 1
)

// MaxPacked is the most bytes that a chunk of that many plain bytes has in any
// packed form.
func MaxPacked(plain int) int {
	return plain + bundleHeader + 1 + maxPieces(plain)*(pieceWord+SigLen+pieceWord)
}

// BuildBundle packs a region, at most a chunk long, for a receiver that is
// believed to hold those pieces for whose signatures held answers true (nil:
// none). The signature, under key, is that of the region's recipe. pack packs
// a piece, as Pack does.
//
// The result is a Bundle, in buf's space if it is large enough; or Known, if
// held answers true for the recipe; or Zeros.
func BuildBundle(buf, plain []byte, cut *Cutter, key *Key, pack func(buf, plain []byte) (Codec, []byte), held func(Sig) bool) Packed {
	if AllZero(plain) {
		return Packed{Codec: Zeros, Plain: len(plain)}
	}
	pieces := cut.pieces(plain, key)
	recipe := appendRecipe(make([]byte, 0, 1+len(pieces)*(pieceWord+SigLen)), pieces)
	out := Packed{Sig: key.recipeSum(recipe), Codec: Bundle, Plain: len(plain)}
	if held != nil && held(out.Sig) {
		out.Codec = Known
		return out
	}
	// Room behind the bundle too, where packers that need more than the result may write.
	b := slices.Grow(buf[:0], MaxPacked(len(plain))+s2.MaxEncodedLen(len(plain))-len(plain))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(recipe))|bundleVersion<<codecShift)
	b = append(b, recipe...)
	table := len(b)
	for i := range pieces {
		if pieces[i].Codec != Zeros {
			b = append(b, 0, 0, 0, 0)
		}
	}
	for i := range pieces {
		p := &pieces[i]
		if p.Codec == Zeros {
			continue
		}
		codec, n := Known, 0
		if !slices.ContainsFunc(pieces[:i], func(q Packed) bool { return q.Sig == p.Sig && q.Codec != Zeros }) &&
			(held == nil || !held(p.Sig)) {
			var data []byte
			codec, data = pack(b[len(b):], p.Data)
			n = len(data)
			b = append(b, data...) // they lie there already, or are copied
		}
		binary.LittleEndian.PutUint32(b[table:], uint32(n)|uint32(codec)<<codecShift)
		table += pieceWord
	}
	out.Data = b
	return out
}

// pieces cuts plain, which is not all zero, and signs the pieces. Their Data
// are the plain bytes.
func (c *Cutter) pieces(plain []byte, key *Key) []Packed {
	lengths := c.Cut(make([]int, 0, 32), plain)
	pieces := make([]Packed, 0, len(lengths))
	for _, n := range lengths {
		p := Packed{Plain: n, Data: plain[:n]}
		plain = plain[n:]
		if AllZero(p.Data) {
			p.Codec, p.Data = Zeros, nil
			if k := len(pieces) - 1; k >= 0 && pieces[k].Codec == Zeros {
				pieces[k].Plain += n
				continue
			}
		} else {
			p.Sig = key.Sum(p.Data)
		}
		pieces = append(pieces, p)
	}
	return pieces
}

// ParseBundle takes a packed region apart: p has codec Bundle. It verifies the
// recipe under key and appends the pieces to dst: Zeros, or with a signature and
// packed bytes, which OpenUnder verifies, or Known, which means that it stands earlier in
// the bundle or that the sender believes the receiver to hold it. The pieces' lengths
// add up to p.Plain. recipe, and the pieces' bytes, lie in p.Data. Its errors
// wrap ErrMismatch.
func ParseBundle(key *Key, p Packed, dst []Packed) (recipe []byte, pieces []Packed, err error) {
	wrong := func(format string, a ...any) ([]byte, []Packed, error) {
		return nil, dst, fmt.Errorf("bundle %s: %s: %w", p.Sig, fmt.Sprintf(format, a...), ErrMismatch)
	}
	if p.Codec != Bundle || p.Plain < 1 || p.Plain > MaxSize || len(p.Data) < bundleHeader || len(p.Data) > MaxPacked(p.Plain) {
		return wrong("codec %d with %d packed and %d plain bytes", p.Codec, len(p.Data), p.Plain)
	}
	w := binary.LittleEndian.Uint32(p.Data)
	n, data := int(w&lengthMask), p.Data[bundleHeader:]
	if w>>codecShift != bundleVersion || n > len(data) {
		return wrong("version %d with a recipe of %d bytes in %d", w>>codecShift, n, len(data))
	}
	recipe, data = data[:n], data[n:]
	pieces, err = parseRecipe(key, p.Sig, p.Plain, recipe, dst)
	if err != nil {
		return nil, dst, err
	}
	mine := pieces[len(dst):]
	words := 0
	for i := range mine {
		if mine[i].Codec != Zeros {
			words++
		}
	}
	if words*pieceWord > len(data) {
		return wrong("%d pieces in %d bytes", words, len(data))
	}
	table, data := data[:words*pieceWord], data[words*pieceWord:]
	for i := range mine {
		q := &mine[i]
		if q.Codec == Zeros {
			continue
		}
		w := binary.LittleEndian.Uint32(table)
		table = table[pieceWord:]
		n := int(w & lengthMask)
		q.Codec = Codec(w >> codecShift)
		// Packed bytes are never more than the plain ones, and no others than Known has none.
		if !q.Codec.Packs() && q.Codec != Known || (q.Codec == Known) != (n == 0) || n > q.Plain || n > len(data) {
			return wrong("piece %d: codec %d with %d of %d packed and %d plain bytes", i, q.Codec, n, len(data), q.Plain)
		}
		q.Data, data = data[:n:n], data[n:]
	}
	if len(data) != 0 {
		return wrong("%d bytes behind the last piece", len(data))
	}
	return recipe, pieces, nil
}

// Sum is the signature, under key, of a region that is not all zero: that of its recipe.
func (c *Cutter) Sum(key *Key, plain []byte) Sig {
	pieces := c.pieces(plain, key)
	return key.recipeSum(appendRecipe(make([]byte, 0, 1+len(pieces)*(pieceWord+SigLen)), pieces))
}
