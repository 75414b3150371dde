package store

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"

	"forerun/data/store/internal/runs"
	"forerun/internal/chunk"
)

// The pack format; FORMAT.md has the tables.
const (
	packMagic    = 0x4b415046 // "FPAK"
	packVersion  = 2          // 1 had no key id and no recipes
	packHeader   = 64
	recordMagic  = 0x4b4e4843 // "CHNK"
	recordHeader = 64
	kindChunk    = 1
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

type storeID [16]byte

// recordSize is how many bytes of a pack n packed bytes take.
func recordSize(n int) int64 { return (int64(recordHeader+n) + runs.Align - 1) &^ (runs.Align - 1) }

// span is the size of the record of a place.
func span(l runs.Loc) int64 { return recordSize(int(l.Len)) }

func putPackHeader(b []byte, id storeID, key chunk.KeyID, pack uint32) {
	_ = b[packHeader-1]
	clear(b[:packHeader])
	le := binary.LittleEndian
	le.PutUint32(b[0:], packMagic)
	le.PutUint32(b[4:], packVersion)
	le.PutUint32(b[8:], pack)
	le.PutUint32(b[12:], packHeader)
	copy(b[16:32], id[:])
	copy(b[32:40], key[:])
	le.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
}

// parsePackHeader returns the id of the store and that of its key. newer says
// that the header is whole but of a version this program does not know.
func parsePackHeader(b []byte, pack uint32) (id storeID, key chunk.KeyID, newer bool, err error) {
	le := binary.LittleEndian
	switch {
	case len(b) < packHeader:
		return id, key, false, io.ErrUnexpectedEOF
	case le.Uint32(b[0:]) != packMagic:
		return id, key, false, fmt.Errorf("no pack header")
	case le.Uint32(b[60:]) != crc32.Checksum(b[:60], castagnoli):
		return id, key, false, fmt.Errorf("the pack header does not match its checksum")
	case le.Uint32(b[4:]) < 1 || le.Uint32(b[4:]) > packVersion:
		return id, key, true, fmt.Errorf("pack version %d, this program reads versions up to %d", le.Uint32(b[4:]), packVersion)
	case le.Uint32(b[8:]) != pack:
		return id, key, false, fmt.Errorf("the header is that of pack %08x", le.Uint32(b[8:]))
	}
	copy(id[:], b[16:32])
	if le.Uint32(b[4:]) > 1 {
		copy(key[:], b[32:40])
	}
	return id, key, false, nil
}

// saltOf seeds the checksums of a pack's record headers, so that bytes of
// another pack, or of another store (a guest's disk can hold one) that lie in a
// payload are not taken for records.
func saltOf(id storeID, pack uint32) uint32 {
	var b [20]byte
	copy(b[:], id[:])
	binary.LittleEndian.PutUint32(b[16:], pack)
	return crc32.Checksum(b[:], castagnoli)
}

// putRecord writes header, payload and padding of l's record into b, which is
// recordSize(len(data)) long.
func putRecord(b []byte, salt uint32, sig *chunk.Sig, l runs.Loc, data []byte) {
	le := binary.LittleEndian
	clear(b[:recordHeader])
	le.PutUint32(b[0:], recordMagic)
	b[4], b[5], b[6] = kindChunk, byte(l.Codec), l.Algo
	le.PutUint32(b[8:], l.Len)
	le.PutUint32(b[12:], l.Plain)
	le.PutUint32(b[16:], l.Key)
	le.PutUint32(b[20:], l.Pack)
	copy(b[24:56], sig[:])
	le.PutUint32(b[56:], l.CRC)
	le.PutUint32(b[60:], crc32.Update(salt, castagnoli, b[:60]))
	n := recordHeader + copy(b[recordHeader:], data)
	clear(b[n:])
}

// parseRecord reads a record header at off of pack; ok is false for anything
// that is not one.
func parseRecord(b []byte, salt, pack uint32, off int64) (e runs.Entry, ok bool) {
	le := binary.LittleEndian
	if len(b) < recordHeader || le.Uint32(b) != recordMagic ||
		le.Uint32(b[60:]) != crc32.Update(salt, castagnoli, b[:60]) {
		return e, false
	}
	e.Loc = runs.Loc{Pack: pack, Off: uint32(off / runs.Align), Len: le.Uint32(b[8:]), Plain: le.Uint32(b[12:]),
		CRC: le.Uint32(b[56:]), Key: le.Uint32(b[16:]), Codec: chunk.Codec(b[5]), Algo: b[6]}
	copy(e.Sig[:], b[24:56])
	ok = b[4] == kindChunk && le.Uint32(b[20:]) == pack && (e.Algo == chunk.AlgoSHA256 || e.Algo == chunk.AlgoHMAC) &&
		(e.Codec.Packs() || e.Codec == chunk.Recipe) && e.Len >= 1 && e.Len <= chunk.MaxSize && e.Plain >= 1 && e.Plain <= chunk.MaxSize
	return e, ok
}

// scanned is what a scan found.
type scanned struct {
	End        int64 // end of the last valid record, at least where the scan began
	Records    int
	Gaps       int  // stretches, or records, that are not valid
	Unreadable bool // some of it could not be read
}

// scan walks the records of a pack from byte from to size and calls yield for
// each whose header and payload match their checksums. Where there is none it
// looks for the next one, eight bytes at a time, so that damage in the middle
// costs only what it covers. Only an error of yield ends it early.
func scan(r io.ReaderAt, size, from int64, salt, pack uint32, buf []byte, yield func(e runs.Entry, data []byte) error) (scanned, error) {
	s := scanned{End: from}
	w := window{r: r, size: size, buf: buf}
	gap := false
	for off := from; off+recordHeader <= size; {
		b, err := w.at(off, recordHeader)
		if err != nil {
			s.Unreadable = true
			s.miss(&gap)
			off = (off + 4096) &^ 4095
			continue
		}
		e, ok := parseRecord(b, salt, pack, off)
		if !ok || off+recordHeader+int64(e.Len) > size {
			s.miss(&gap)
			off += runs.Align
			continue
		}
		b, err = w.at(off, recordHeader+int(e.Len))
		if err != nil {
			s.Unreadable = true
		}
		if err != nil || crc32.Checksum(b[recordHeader:], castagnoli) != e.CRC {
			// The header may be whole and its payload torn, with the next
			// record anywhere behind: look everywhere.
			s.miss(&gap)
			off += runs.Align
			continue
		}
		gap = false
		if err := yield(e, b[recordHeader:]); err != nil {
			return s, err
		}
		s.Records++
		off += span(e.Loc)
		s.End = min(off, size)
	}
	return s, nil
}

// headers walks the record headers of a pack up to size without reading what
// is between them, so it does not see whether payloads are whole.
func headers(r io.ReaderAt, size int64, salt, pack uint32, yield func(e *runs.Entry)) {
	w := window{r: r, size: size, buf: make([]byte, 4096)}
	for off := int64(packHeader); off+recordHeader <= size; {
		b, err := w.at(off, recordHeader)
		if err != nil {
			off = (off + 4096) &^ 4095
			continue
		}
		e, ok := parseRecord(b, salt, pack, off)
		if !ok {
			off += runs.Align
			continue
		}
		yield(&e)
		off += span(e.Loc)
	}
}

func (s *scanned) miss(gap *bool) {
	if !*gap {
		s.Gaps++
		*gap = true
	}
}

// scanBuffer holds any record, with room to read ahead.
const scanBuffer = 2 << 20

// scanMemory is the buffer for a scan of a pack of n bytes.
func scanMemory(n int64) []byte { return make([]byte, min(n, scanBuffer)) }

// window reads forward in large pieces.
type window struct {
	r    io.ReaderAt
	size int64
	buf  []byte
	base int64
	n    int
}

// at returns n bytes at off, which end at or before size. They are valid until
// the next call.
func (w *window) at(off int64, n int) ([]byte, error) {
	if off >= w.base && off+int64(n) <= w.base+int64(w.n) {
		i := int(off - w.base)
		return w.buf[i : i+n], nil
	}
	want := int(min(int64(len(w.buf)), w.size-off))
	got, err := w.r.ReadAt(w.buf[:want], off)
	if got < n {
		// One bad sector far ahead must not hide what is here; and an error
		// that passes must not cost a record.
		got, err = w.r.ReadAt(w.buf[:n], off)
	}
	w.base, w.n = off, got
	if got < n {
		w.n = 0
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return w.buf[:n], nil
}
