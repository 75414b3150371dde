// Package runs is the sorted half of a block map: immutable files of entries
// in order of signature, each with a filter and a fence in memory, as in the
// tables of a log-structured merge tree (O'Neil et al., 1996) cut down to what
// a map of hashes needs.
//
// A run is written once, front to back, synced, and never changed. Keys are
// hashes of fixed length, so entries have a fixed size, a page is a sorted
// array, and the first eight bytes of each page's first key are enough to find
// the page: one read per lookup that gets past the filter. Memory per entry is
// one byte of filter and an eighth of a byte of fence.
//
// Every page carries its own checksum, its number and the run's number, so a
// torn, stale or misplaced page is an error (ErrDamaged), never an answer.
package runs

import (
	"encoding/binary"
	"errors"
	"hash/crc32"

	"forerun/internal/chunk"
)

// EntrySize, PageSize and PerPage are the arithmetic of a run file.
const (
	EntrySize  = 60                                  // bytes of an entry in a page
	PageSize   = 4096                                // bytes of a page
	pageHeader = 16                                  // bytes before the first entry
	PerPage    = (PageSize - pageHeader) / EntrySize // 68 entries, no byte left over
)

// ErrDamaged is wrapped by the errors of damaged files and pages.
var ErrDamaged = errors.New("the block map is damaged")

// Loc says where a chunk lies and how it is packed.
type Loc struct {
	Pack  uint32 // number of the pack
	Off   uint32 // offset of the record in the pack, in units of Align
	Len   uint32 // length of the packed bytes
	Plain uint32 // length of the plain bytes
	CRC   uint32 // CRC32C of the packed bytes
	Key   uint32 // id of the key the packed bytes are encrypted with; 0: plain
	Codec chunk.Codec
	Algo  uint8 // signature algorithm, chunk.AlgoSHA256
	Flags uint8 // Dead or 0
}

// Align is the unit of Loc.Off in bytes.
const Align = 8

// Dead in Loc.Flags: the signature is not held, whatever older runs say.
const Dead uint8 = 1

// At is the offset of the record in bytes.
func (l Loc) At() int64 { return int64(l.Off) * Align }

// Entry is a signature with its place.
type Entry struct {
	Sig chunk.Sig
	Loc
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func putEntry(b []byte, e *Entry) {
	_ = b[EntrySize-1]
	copy(b, e.Sig[:])
	le := binary.LittleEndian
	le.PutUint32(b[32:], e.Pack)
	le.PutUint32(b[36:], e.Off)
	le.PutUint32(b[40:], e.Len)
	le.PutUint32(b[44:], e.Plain)
	le.PutUint32(b[48:], e.CRC)
	le.PutUint32(b[52:], e.Key)
	b[56], b[57], b[58], b[59] = byte(e.Codec), e.Algo, e.Flags, 0
}

func getLoc(b []byte) Loc {
	_ = b[EntrySize-1]
	le := binary.LittleEndian
	return Loc{
		Pack: le.Uint32(b[32:]), Off: le.Uint32(b[36:]), Len: le.Uint32(b[40:]),
		Plain: le.Uint32(b[44:]), CRC: le.Uint32(b[48:]), Key: le.Uint32(b[52:]),
		Codec: chunk.Codec(b[56]), Algo: b[57], Flags: b[58],
	}
}

// sealPage completes the header of a page that holds n entries.
func sealPage(p []byte, run, number uint32, n int) {
	le := binary.LittleEndian
	le.PutUint32(p[4:], run)
	le.PutUint32(p[8:], number)
	le.PutUint32(p[12:], uint32(n))
	le.PutUint32(p[0:], crc32.Checksum(p[4:], castagnoli))
}

// checkPage returns how many entries a page holds, or false when it is not
// that page of that run as it was written.
func checkPage(p []byte, run, number uint32) (int, bool) {
	le := binary.LittleEndian
	n := le.Uint32(p[12:])
	ok := le.Uint32(p) == crc32.Checksum(p[4:], castagnoli) &&
		le.Uint32(p[4:]) == run && le.Uint32(p[8:]) == number && n >= 1 && n <= PerPage
	return int(n), ok
}

func prefix(s *chunk.Sig) uint64 { return binary.BigEndian.Uint64(s[:8]) }
