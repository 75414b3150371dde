package sigs

import (
	"encoding/binary"
	"hash/crc32"

	"forerun/internal/chunk"
)

// See FORMAT.md.
const (
	magic       = "FRSIGTAB"
	version     = 1
	pageBytes   = 4096
	perPage     = 126  // chunks of a page
	perGroup    = 2032 // pages of a page of the summary
	maxString   = 1024
	typeSummary = 1
	typeChunks  = 2

	kindsAt = 32
	sigsAt  = 64
)

// The status in the header.
const (
	closed = 1 // as it was left by Close: the summary is exact
	open   = 2 // in use, or it was when its process ended
	dirty  = 3 // the source was changed since the state was recorded
)

type tableID [16]byte

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	le         = binary.LittleEndian
)

// sum is the checksum of a page with the four bytes at off taken as zeros.
func sum(b *[pageBytes]byte, off int) uint32 {
	var none [4]byte
	c := crc32.Update(0, castagnoli, b[:off])
	c = crc32.Update(c, castagnoli, none[:])
	return crc32.Update(c, castagnoli, b[off+4:])
}

type header struct {
	id         tableID
	chunks     int64
	chunkBytes int64
	status     uint32
	params     string
	state      string
}

const headerSum = 12

func (h *header) encode() []byte {
	b := new([pageBytes]byte)
	copy(b[:], magic)
	le.PutUint32(b[8:], version)
	copy(b[16:], h.id[:])
	le.PutUint64(b[32:], uint64(h.chunks))
	le.PutUint64(b[40:], uint64(h.chunkBytes))
	le.PutUint32(b[48:], h.status)
	le.PutUint16(b[52:], uint16(len(h.params)))
	le.PutUint16(b[54:], uint16(len(h.state)))
	n := copy(b[64:], h.params)
	copy(b[64+n:], h.state)
	le.PutUint32(b[headerSum:], sum(b, headerSum))
	return b[:]
}

// parseHeader says false for anything but a whole header of this version.
func parseHeader(b *[pageBytes]byte) (h header, ok bool) {
	if string(b[:8]) != magic || le.Uint32(b[8:]) != version || le.Uint32(b[headerSum:]) != sum(b, headerSum) {
		return h, false
	}
	copy(h.id[:], b[16:])
	h.chunks, h.chunkBytes = int64(le.Uint64(b[32:])), int64(le.Uint64(b[40:]))
	h.status = le.Uint32(b[48:])
	p, s := int(le.Uint16(b[52:])), int(le.Uint16(b[54:]))
	if h.status < closed || h.status > dirty || p > maxString || s > maxString {
		return h, false
	}
	h.params, h.state = string(b[64:64+p]), string(b[64+p:64+p+s])
	return h, true
}

// page is a page of the summary or of chunks, as it lies in the file.
type page [pageBytes]byte

// begin makes an empty page.
func (p *page) begin(kind uint32, number int64, id *tableID) {
	clear(p[:])
	le.PutUint32(p[4:], kind)
	le.PutUint64(p[8:], uint64(number))
	copy(p[16:], id[:])
}

func (p *page) seal() { le.PutUint32(p[:], sum((*[pageBytes]byte)(p), 0)) }

// valid says whether it is that page, whole, of the table with that id.
func (p *page) valid(kind uint32, number int64, id *tableID) bool {
	return le.Uint32(p[4:]) == kind && le.Uint64(p[8:]) == uint64(number) && tableID(p[16:32]) == *id &&
		le.Uint32(p[:]) == sum((*[pageBytes]byte)(p), 0)
}

// get answers about the k-th chunk of a page. A kind of a later version, or
// nonsense, is unknown.
func (p *page) get(k int) (Kind, chunk.Sig) {
	switch kind := Kind(p[kindsAt+k/4] >> (k % 4 * 2) & 3); kind {
	case Zero:
		return Zero, chunk.Sig{}
	case Data:
		return Data, chunk.Sig(p[sigsAt+k*chunk.SigLen:])
	}
	return Unknown, chunk.Sig{}
}

// set says whether that changed anything.
func (p *page) set(k int, kind Kind, sig chunk.Sig) bool {
	if kind != Data {
		sig = chunk.Sig{}
	}
	if was, had := p.get(k); was == kind && had == sig {
		return false
	}
	at, shift := kindsAt+k/4, k%4*2
	p[at] = p[at]&^(3<<shift) | byte(kind)<<shift
	copy(p[sigsAt+k*chunk.SigLen:], sig[:])
	return true
}

// count says what the first n chunks are.
func (p *page) count(n int) (data, zero int) {
	for k := range n {
		switch Kind(p[kindsAt+k/4] >> (k % 4 * 2) & 3) {
		case Zero:
			zero++
		case Data:
			data++
		}
	}
	return data, zero
}

// entry is what the summary says of a page.
type entry uint16

// The top two bits of an entry; below are seven bits each of how many chunks
// are zero and how many are data.
const (
	none   = 0 // nothing is known, the page is void
	allNil = 1 // every chunk is zero, the page is void
	inPage = 2 // see the page
	maybe  = 3 // see the page, which may be void; nothing is counted
)

func makeEntry(where, data, zero int) entry { return entry(where<<14 | zero<<7 | data) }

func (e entry) where() int { return int(e >> 14) }
func (e entry) data() int  { return int(e & 127) }
func (e entry) zero() int  { return int(e >> 7 & 127) }
func (e entry) known() int { return e.data() + e.zero() }
