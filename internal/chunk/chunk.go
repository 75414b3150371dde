// Package chunk is the unit of transfer, signature and storage: a run of plain
// bytes, its signature, and its packed (perhaps compressed) form.
//
// A chunk is sealed once, at the source: signature over the plain bytes, then
// compression. The packed form crosses the link and lies in the store as it
// is; whoever wants the bytes opens it, and opening verifies the signature, so
// no wrong byte passes here. Codec and algorithm are one byte each, so that
// another can be added without changing a format.
//
// The chunks of a volume have one size. Where content moves by other distances
// than that, equal bytes are found all the same when a chunk is a region that
// is cut by what is in it: a Cutter yields pieces, a recipe lists them, and a
// bundle is the recipe with those of the pieces that the receiver lacks. A
// region is still asked for, delivered and read as a whole; its signature is
// that of its recipe, so equal regions have equal signatures.
//
// Recipes and plain bytes are signed in different ways, so that no disk can
// hold plain bytes with the signature of a recipe.
package chunk

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// Limits of the plain length of a chunk, in bytes. Chunk sizes of a volume are
// powers of two between the two; DefaultSize is used where nothing is said.
const (
	MinSize     = 16 << 10
	MaxSize     = 1 << 20
	DefaultSize = 64 << 10
)

// SigLen is the length of a signature in bytes.
const SigLen = sha256.Size

// Sig is a chunk's signature: SHA-256 (FIPS 180-4) of its plain bytes, under
// the key of its dedup domain if that has one.
type Sig [SigLen]byte

// String is the signature in hexadecimal.
func (s Sig) String() string { return hex.EncodeToString(s[:]) }

// The algorithm byte of formats that hold signatures.
const (
	AlgoSHA256 = 1 // SHA-256
	AlgoHMAC   = 2 // HMAC-SHA256, under the key of the dedup domain, of the SHA-256
)

// Sum computes the signature of plain bytes in the common domain.
func Sum(plain []byte) Sig { return sha256.Sum256(plain) }

// Codec says how the packed bytes of a chunk are made. The numbers stand in
// the wire protocol and in packs and never change.
type Codec uint8

// The codecs.
const (
	Raw  Codec = 0 // the plain bytes
	Zstd Codec = 1 // RFC 8878, one frame
	S2   Codec = 2 // one S2 block
	// Zeros: the plain bytes are all zero. There are no packed bytes and the
	// signature is not used; such a chunk is a state of a map, never stored.
	Zeros Codec = 3
	// Known is a signature alone, for a receiver that is believed to hold the
	// chunk: there are no packed bytes. Only on the wire.
	Known Codec = 4
	// Recipe: the packed bytes list the pieces that a content-defined chunk
	// consists of, which are chunks of the store themselves. The signature is
	// that of the list. Only in the store.
	Recipe Codec = 5
	// Bundle is a Recipe as it crosses the link, with the packed bytes of those
	// pieces that the receiver does not hold. Only on the wire.
	Bundle Codec = 6
	// Branch is Zstd of the plain bytes with the distances of x86 branches made
	// absolute.
	Branch Codec = 7
)

// Packs says whether c makes packed bytes that alone give the plain ones, and
// so may be stored.
func (c Codec) Packs() bool { return c <= S2 || c == Branch }

// Packed is a sealed chunk. Data belongs to whoever made it; who receives a
// Packed must copy Data to keep it.
type Packed struct {
	Sig   Sig
	Codec Codec
	Plain int    // length of the plain bytes
	Data  []byte // the packed bytes
}

// ErrMismatch is wrapped by the errors of Open: the packed bytes are not those
// of the chunk with that signature.
var ErrMismatch = errors.New("content does not match its signature")

var decoder = sync.OnceValue(func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0),
		zstd.WithDecoderMaxMemory(4*MaxSize), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		panic(err) // the options are constants
	}
	return d
})

// minGain is the share of the plain length that compression must save to be
// kept: below it the receiver's time costs more than the bytes.
const minGain = 32 // one 32nd

// Seal is SealUnder in the common domain.
func Seal(buf, plain []byte, codec Codec) Packed { return SealUnder(&common, buf, plain, codec) }

// SealUnder computes the signature of plain under key and packs it with codec
// into buf's space (buf may be nil; it is grown as needed and its content
// overwritten). When compression does not pay, the result is Raw and Data is
// plain itself. Plain bytes that are all zero give codec Zeros and no data.
func SealUnder(key *Key, buf, plain []byte, codec Codec) Packed {
	if AllZero(plain) {
		return Packed{Codec: Zeros, Plain: len(plain)}
	}
	p := Packed{Sig: key.Sum(plain), Plain: len(plain)}
	p.Codec, p.Data = Pack(buf, plain, codec)
	return p
}

// Pack compresses plain into buf's space as SealUnder does, without a
// signature. It returns Raw and plain itself when that does not pay, so the
// packed bytes are never more than the plain ones.
func Pack(buf, plain []byte, codec Codec) (Codec, []byte) {
	return Squeeze(buf, plain, LevelOf(codec))
}

// Open is OpenUnder in the common domain.
func (p Packed) Open(dst []byte) error { return p.OpenUnder(&common, dst) }

// OpenUnder unpacks p into dst, which must be exactly p.Plain bytes long, and
// verifies the signature under key. On error dst's content is undefined.
// Codecs that name bytes which lie elsewhere (Known, Recipe, Bundle) are not
// opened here.
func (p Packed) OpenUnder(key *Key, dst []byte) error {
	if err := p.unpack(dst); err != nil || p.Codec == Zeros {
		return err
	}
	if found := key.Sum(dst); found != p.Sig {
		return fmt.Errorf("chunk %s: found %s: %w", p.Sig, found, ErrMismatch)
	}
	return nil
}

func (p Packed) unpack(dst []byte) error {
	if len(dst) != p.Plain {
		return fmt.Errorf("chunk %s: plain length is %d, the buffer's %d", p.Sig, p.Plain, len(dst))
	}
	switch p.Codec {
	case Zeros:
		if len(p.Data) != 0 {
			return fmt.Errorf("chunk of zeros with %d packed bytes: %w", len(p.Data), ErrMismatch)
		}
		clear(dst)
	case Raw:
		if len(p.Data) != p.Plain {
			return fmt.Errorf("chunk %s: %d raw bytes for a plain length of %d: %w", p.Sig, len(p.Data), p.Plain, ErrMismatch)
		}
		copy(dst, p.Data)
	case Zstd, Branch:
		out, err := decoder().DecodeAll(p.Data, dst[:0:len(dst)])
		if err != nil {
			return fmt.Errorf("chunk %s: zstd: %v: %w", p.Sig, err, ErrMismatch)
		}
		if len(out) != len(dst) {
			return fmt.Errorf("chunk %s: %d bytes unpacked, %d expected: %w", p.Sig, len(out), len(dst), ErrMismatch)
		}
		if p.Codec == Branch {
			branches(dst, false)
		}
	case S2:
		if n, err := s2.DecodedLen(p.Data); err != nil || n != len(dst) {
			return fmt.Errorf("chunk %s: s2 length %d (%v), %d expected: %w", p.Sig, n, err, len(dst), ErrMismatch)
		}
		if _, err := s2.Decode(dst, p.Data); err != nil {
			return fmt.Errorf("chunk %s: s2: %v: %w", p.Sig, err, ErrMismatch)
		}
	default:
		return fmt.Errorf("chunk %s: codec %d cannot be opened: %w", p.Sig, p.Codec, ErrMismatch)
	}
	return nil
}

var zeros [MaxSize]byte

// AllZero says whether p, at most MaxSize bytes, holds only zeros.
func AllZero(p []byte) bool { return bytes.Equal(p, zeros[:len(p)]) }
