package journal

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// See FORMAT.md for the tables.
const (
	segMagic  = "FRJRNSEG"
	segVer    = 1
	segHeader = 4096 // bytes kept for the header of a segment; records begin here
	segFields = 72   // bytes of it that are used

	recMagic  = 0x6c4a5246 // "FRJl"
	recHeader = 56
	recAlign  = 8

	// maxPayload is the most bytes one record carries. Longer writes take
	// several records, under one range lock.
	maxPayload = 1 << 20
)

// Type says what a record does to the device.
type Type uint8

// The types of record. The numbers stand in segments and never change.
const (
	// TypeWrite stores the payload.
	TypeWrite Type = 1
	// TypeZero makes a range read as zeros.
	TypeZero Type = 2
	// TypeTrim drops a range.
	TypeTrim Type = 3
	// TypeVoid says that the record with sequence Off was refused by the
	// device below and has no effect.
	TypeVoid Type = 4
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Position names a place in the log: the last record that is behind it. Two
// logs that agree on a position agree on everything before it, as far as a
// chain of 32-bit checksums can tell.
type Position struct {
	// Sequence of the record, counted from 1; 0 is the beginning of the log.
	Sequence uint64
	// Checksum of the record's header, which covers the payload's checksum
	// and, by the chain, all records before.
	Checksum uint32
}

// String gives sequence and checksum.
func (p Position) String() string { return fmt.Sprintf("%d/%08x", p.Sequence, p.Checksum) }

// MarshalText gives what String gives, for files and status.
func (p Position) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText reads what MarshalText gives.
func (p *Position) UnmarshalText(b []byte) error {
	var q Position
	if n, err := fmt.Sscanf(string(b), "%d/%08x", &q.Sequence, &q.Checksum); n != 2 || err != nil || q.String() != string(b) {
		return fmt.Errorf("%q is not a position of a journal", b)
	}
	*p = q
	return nil
}

// segInfo is the header of a segment.
type segInfo struct {
	id      uint64
	salt    uint64 // makes records of an earlier life of the file invalid
	first   uint64 // sequence of its first record
	prev    uint32 // checksum of the record before that
	applied uint64 // the device below had this and everything before durably when the segment began
	durable uint64 // as in records
}

func (h *segInfo) encode(b []byte) {
	clear(b[:segFields])
	copy(b, segMagic)
	le := binary.LittleEndian
	le.PutUint32(b[8:], segVer)
	le.PutUint64(b[16:], h.id)
	le.PutUint64(b[24:], h.salt)
	le.PutUint64(b[32:], h.first)
	le.PutUint32(b[40:], h.prev)
	le.PutUint64(b[48:], h.applied)
	le.PutUint64(b[56:], h.durable)
	le.PutUint32(b[12:], crc32.Checksum(b[:segFields], castagnoli))
}

// parseSegInfo reads a segment's header. known is false when the bytes are
// those of a newer version, which must not be taken for damage.
func parseSegInfo(b []byte) (h segInfo, ok, newer bool) {
	if len(b) < segFields || string(b[:8]) != segMagic {
		return h, false, false
	}
	var c [segFields]byte
	copy(c[:], b)
	le := binary.LittleEndian
	sum := le.Uint32(c[12:])
	clear(c[12:16])
	if crc32.Checksum(c[:], castagnoli) != sum {
		return h, false, false
	}
	if le.Uint32(c[8:]) != segVer {
		return h, false, true
	}
	h = segInfo{
		id: le.Uint64(c[16:]), salt: le.Uint64(c[24:]), first: le.Uint64(c[32:]),
		prev: le.Uint32(c[40:]), applied: le.Uint64(c[48:]), durable: le.Uint64(c[56:]),
	}
	return h, h.first > 0, false
}

// seed starts the checksum of each record header in the segment.
func (h *segInfo) seed() uint32 {
	var b [16]byte
	binary.LittleEndian.PutUint64(b[:], h.salt)
	binary.LittleEndian.PutUint64(b[8:], h.id)
	return crc32.Checksum(b[:], castagnoli)
}

// recInfo is the header of a record.
type recInfo struct {
	typ     Type
	flags   uint32 // the block.Flags of the request
	sum     uint32 // checksum of this header
	payload uint32 // checksum of the payload
	prev    uint32 // checksum of the record before
	seq     uint64
	durable uint64 // the journal was synced up to this sequence when the record was made
	off     uint64
	length  uint64
}

// encode writes the header, computes its checksum with the segment's seed and
// returns it.
func (r *recInfo) encode(b []byte, seed uint32) uint32 {
	_ = b[recHeader-1]
	le := binary.LittleEndian
	le.PutUint32(b[0:], recMagic)
	le.PutUint32(b[4:], 0)
	le.PutUint32(b[8:], uint32(r.typ))
	le.PutUint32(b[12:], r.flags)
	le.PutUint32(b[16:], r.payload)
	le.PutUint32(b[20:], r.prev)
	le.PutUint64(b[24:], r.seq)
	le.PutUint64(b[32:], r.durable)
	le.PutUint64(b[40:], r.off)
	le.PutUint64(b[48:], r.length)
	r.sum = crc32.Update(seed, castagnoli, b[:recHeader])
	le.PutUint32(b[4:], r.sum)
	return r.sum
}

// parseRec reads and verifies a record's header, not its payload.
func parseRec(b []byte, seed uint32) (r recInfo, ok bool) {
	le := binary.LittleEndian
	if len(b) < recHeader || le.Uint32(b) != recMagic {
		return r, false
	}
	var c [recHeader]byte
	copy(c[:], b)
	r.sum = le.Uint32(c[4:])
	clear(c[4:8])
	if crc32.Update(seed, castagnoli, c[:]) != r.sum {
		return r, false
	}
	typ := le.Uint32(c[8:])
	r.typ, r.flags = Type(typ), le.Uint32(c[12:])
	r.payload, r.prev = le.Uint32(c[16:]), le.Uint32(c[20:])
	r.seq, r.durable = le.Uint64(c[24:]), le.Uint64(c[32:])
	r.off, r.length = le.Uint64(c[40:]), le.Uint64(c[48:])
	if typ < uint32(TypeWrite) || typ > uint32(TypeVoid) || r.seq == 0 || r.durable >= r.seq {
		return r, false
	}
	if r.typ == TypeWrite && (r.length == 0 || r.length > maxPayload) {
		return r, false
	}
	if r.off > 1<<62 || r.length > 1<<62 {
		return r, false
	}
	return r, true
}

// size is the number of bytes the record takes in a segment.
func (r *recInfo) size() int64 {
	if r.typ != TypeWrite {
		return recHeader
	}
	return recSize(int(r.length))
}

func recSize(payload int) int64 {
	return (recHeader + int64(payload) + recAlign - 1) &^ (recAlign - 1)
}
