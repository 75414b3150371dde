package chunk

import (
	"encoding/binary"
	"fmt"
)

// A recipe is a version byte, then for each piece, in order, 4 bytes
// little-endian, length and pieceZeros, and its signature unless it is zeros.
// There is one recipe for a list of pieces: pieces of zeros that follow each
// other are one, and a region of zeros has no recipe.
const (
	recipeVersion = 1
	pieceZeros    = 1 << 31 // the piece is all zero and has no signature
	pieceWord     = 4
)

// maxPieces is how many pieces a region of that many bytes can have.
func maxPieces(plain int) int { return max(1, plain/MinPiece) }

// appendRecipe appends the recipe of pieces, of which those with codec Zeros
// are zeros.
func appendRecipe(dst []byte, pieces []Packed) []byte {
	dst = append(dst, recipeVersion)
	for i := range pieces {
		p := &pieces[i]
		if p.Codec == Zeros {
			dst = binary.LittleEndian.AppendUint32(dst, uint32(p.Plain)|pieceZeros)
			continue
		}
		dst = binary.LittleEndian.AppendUint32(dst, uint32(p.Plain))
		dst = append(dst, p.Sig[:]...)
	}
	return dst
}

// ParseRecipe verifies p, which has codec Recipe, under key, and appends the
// pieces it lists to dst: with codec Zeros, or Known and a signature. Their
// lengths add up to p.Plain. Its errors wrap ErrMismatch.
func ParseRecipe(key *Key, p Packed, dst []Packed) ([]Packed, error) {
	if p.Codec != Recipe {
		return dst, fmt.Errorf("chunk %s: codec %d is no recipe: %w", p.Sig, p.Codec, ErrMismatch)
	}
	return parseRecipe(key, p.Sig, p.Plain, p.Data, dst)
}

func parseRecipe(key *Key, sig Sig, plain int, data []byte, dst []Packed) ([]Packed, error) {
	wrong := func(format string, a ...any) ([]Packed, error) {
		return dst, fmt.Errorf("recipe %s: %s: %w", sig, fmt.Sprintf(format, a...), ErrMismatch)
	}
	if plain < 1 || plain > MaxSize {
		return wrong("a plain length of %d", plain)
	}
	if len(data) < 1 || data[0] != recipeVersion {
		return wrong("not version %d", recipeVersion)
	}
	if found := key.recipeSum(data); found != sig {
		return wrong("found %s", found)
	}
	begin, sum := len(dst), 0
	for at := 1; at < len(data); {
		if at+pieceWord > len(data) {
			return wrong("cut at %d of %d bytes", at, len(data))
		}
		w := binary.LittleEndian.Uint32(data[at:])
		at += pieceWord
		p := Packed{Codec: Known, Plain: int(w &^ pieceZeros)}
		if p.Plain < 1 || p.Plain > plain-sum || len(dst)-begin == maxPieces(plain) {
			return wrong("piece %d of %d bytes at %d of %d", len(dst)-begin, p.Plain, sum, plain)
		}
		if w&pieceZeros != 0 {
			p.Codec = Zeros
			if p.Plain == plain || sum > 0 && dst[len(dst)-1].Codec == Zeros {
				return wrong("piece %d of zeros is not of its own", len(dst)-begin)
			}
		} else {
			if at+SigLen > len(data) {
				return wrong("cut at %d of %d bytes", at, len(data))
			}
			at += copy(p.Sig[:], data[at:at+SigLen])
		}
		sum += p.Plain
		dst = append(dst, p)
	}
	if sum != plain {
		return wrong("its pieces have %d bytes of %d", sum, plain)
	}
	return dst, nil
}
