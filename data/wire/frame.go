package wire

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"

	"forerun/block"
	"forerun/internal/chunk"
)

// Limits of the protocol, in bytes or items. SPEC.md section 3.
const (
	headerLen  = 16
	MaxPayload = 16 << 10 // bytes of one frame after its header

	chunkHead = 52 // bytes of a CHUNK payload before the data
	moreHead  = 12 // bytes of a MORE payload before the data
	runLen    = 12

	maxName    = 255
	maxID      = 1024
	maxText    = 1024
	maxVolumes = 1024
	maxAsides  = maxVolumes + 64 // OPEN and EXTENTS under way on one connection
	maxPartial = 8               // chunks begun and not finished on one connection
	maxExtents = 16384           // extents of one answer

	chunksPerRead = 64 // chunks of one run, see queue.take
	maxRead       = chunk.MaxSize
)

// frameType numbers never change their meaning and are never reused. A type
// with the high bit set may be skipped by who does not know it.
type frameType uint8

const (
	tHello   frameType = 1
	tWelcome frameType = 2
	tError   frameType = 3
	tPing    frameType = 4
	tPong    frameType = 5
	tBye     frameType = 6
	tCredit  frameType = 7
	tOpen    frameType = 16
	tVolume  frameType = 17
	tClose   frameType = 18
	tFetch   frameType = 19
	tChunk   frameType = 20
	tMore    frameType = 21
	tZeros   frameType = 22
	tPromote frameType = 23
	tCancel  frameType = 24
	tExtents frameType = 25
	tRanges  frameType = 26
	tHave    frameType = 27
	tGone    frameType = 28
	tSame    frameType = 29
	tTell    frameType = 30
	tHeard   frameType = 31

	optional frameType = 0x80
	tWish    frameType = 0x81
)

const (
	flagMore  = 1 // on a RANGES frame: another one follows
	flagAnew  = 1 // on a HAVE frame: what was said before is void
	flagWhole = 2 // on a HAVE frame: all has been said
)

// header is the fixed part of each frame, 16 bytes, big endian.
type header struct {
	n      uint32 // payload bytes
	typ    frameType
	flags  uint8
	volume uint16 // handle, 0 where there is none
	req    uint64 // request id, 0 where there is none
}

// errProtocol is wrapped by every error that means the peer broke the rules.
var errProtocol = errors.New("protocol error")

func protocol(format string, args ...any) error {
	return &block.Error{Op: "wire.frame", Kind: block.KindInvalid, Err: fmt.Errorf("%w: "+format, append([]any{errProtocol}, args...)...)}
}

func parseHeader(b []byte) (header, error) {
	h := header{
		n:      binary.BigEndian.Uint32(b),
		typ:    frameType(b[4]),
		flags:  b[5],
		volume: binary.BigEndian.Uint16(b[6:]),
		req:    binary.BigEndian.Uint64(b[8:]),
	}
	if h.n > MaxPayload {
		return h, protocol("frame type %d of %d bytes, at most %d are allowed", h.typ, h.n, MaxPayload)
	}
	return h, nil
}

func appendHeader(b []byte, h header) []byte {
	b = binary.BigEndian.AppendUint32(b, h.n)
	b = append(b, byte(h.typ), h.flags)
	b = binary.BigEndian.AppendUint16(b, h.volume)
	return binary.BigEndian.AppendUint64(b, h.req)
}

// appendFrame appends a whole frame; the payload's length is filled in.
func appendFrame(b []byte, h header, payload []byte) []byte {
	h.n = uint32(len(payload))
	return append(appendHeader(b, h), payload...)
}

// newFrameReader returns a reader large enough to hold one frame.
func newFrameReader(r io.Reader) *bufio.Reader { return bufio.NewReaderSize(r, 64<<10) }

// readFrame reads one frame. The payload lies in br's buffer and is valid
// until the next call; nothing is allocated for it.
func readFrame(br *bufio.Reader) (header, []byte, error) {
	b, err := br.Peek(headerLen)
	if err != nil {
		if err == io.EOF && len(b) > 0 {
			err = io.ErrUnexpectedEOF
		}
		return header{}, nil, err
	}
	h, err := parseHeader(b)
	if err != nil {
		return h, nil, err
	}
	b, err = br.Peek(headerLen + int(h.n))
	if err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return h, nil, err
	}
	br.Discard(len(b)) // cannot fail: the bytes were peeked
	return h, b[headerLen:], nil
}

// unknown is the answer to a frame of a type this end does not know: nil if it may be skipped.
func unknown(h header) error {
	if h.typ&optional != 0 {
		return nil
	}
	return protocol("unknown frame type %d", h.typ)
}

// run is a run of chunks.
type run struct {
	first int64
	n     int64 // at least 1
}

func appendRun(b []byte, r run) []byte {
	b = binary.BigEndian.AppendUint64(b, uint64(r.first))
	return binary.BigEndian.AppendUint32(b, uint32(r.n))
}

// parseRuns appends the runs in b to dst. All chunks must be below limit, and
// not more than most in number.
func parseRuns(dst []run, b []byte, limit, most int64) ([]run, error) {
	if len(b) == 0 || len(b)%runLen != 0 {
		return dst, protocol("%d bytes are not runs", len(b))
	}
	var total int64
	for ; len(b) > 0; b = b[runLen:] {
		first, n := binary.BigEndian.Uint64(b), int64(binary.BigEndian.Uint32(b[8:]))
		if n == 0 || first > math.MaxInt64 || int64(first) >= limit || n > limit-int64(first) {
			return dst, protocol("%d chunks from %d on, the volume has %d", n, first, limit)
		}
		if total += n; total > most {
			return dst, protocol("%d chunks in one frame where at most %d can be meant", total, most)
		}
		dst = append(dst, run{int64(first), n})
	}
	return dst, nil
}

// piece is the begin of a chunk: what it is, and its first packed bytes.
type piece struct {
	index  int64
	plain  int
	packed int
	codec  chunk.Codec
	sig    chunk.Sig
	data   []byte
}

func appendChunkHead(b []byte, p *piece) []byte {
	b = binary.BigEndian.AppendUint64(b, uint64(p.index))
	b = binary.BigEndian.AppendUint32(b, uint32(p.plain))
	b = binary.BigEndian.AppendUint32(b, uint32(p.packed))
	b = append(b, byte(p.codec), 0, 0, 0)
	return append(b, p.sig[:]...)
}

func parseChunk(b []byte) (piece, error) {
	if len(b) < chunkHead {
		return piece{}, protocol("a chunk frame of %d bytes", len(b))
	}
	p := piece{
		index:  int64(binary.BigEndian.Uint64(b)),
		plain:  int(binary.BigEndian.Uint32(b[8:])),
		packed: int(binary.BigEndian.Uint32(b[12:])),
		codec:  chunk.Codec(b[16]),
		sig:    chunk.Sig(b[20:52]),
		data:   b[chunkHead:],
	}
	most := p.plain
	if p.codec == chunk.Bundle {
		most = chunk.MaxPacked(p.plain)
	}
	if p.index < 0 || p.plain < 1 || p.plain > chunk.MaxSize || p.packed < 1 || p.packed > most || len(p.data) > p.packed {
		return piece{}, protocol("chunk %d: %d plain, %d packed, %d bytes here", p.index, p.plain, p.packed, len(p.data))
	}
	return p, nil
}

func parseMore(b []byte) (index int64, off int, data []byte, err error) {
	if len(b) <= moreHead {
		return 0, 0, nil, protocol("a continuation frame of %d bytes", len(b))
	}
	off = int(binary.BigEndian.Uint32(b[8:]))
	if off > chunk.MaxPacked(chunk.MaxSize) {
		return 0, 0, nil, protocol("a continuation at %d", off)
	}
	return int64(binary.BigEndian.Uint64(b)), off, b[moreHead:], nil
}

// fetchOrder is the payload of FETCH: class and flags, then runs.
func parseFetch(dst []run, b []byte, limit, most int64) (block.Flags, []run, error) {
	if len(b) < 4 {
		return 0, dst, protocol("a fetch frame of %d bytes", len(b))
	}
	f := block.Flags(binary.BigEndian.Uint32(b))
	if !f.Valid() || f&^(f.Class()|block.Soon|block.Full) != 0 {
		return 0, dst, protocol("fetch with flags %#x", uint32(f))
	}
	dst, err := parseRuns(dst, b[4:], limit, most)
	return f, dst, err
}

// openOrder is the payload of OPEN.
type openOrder struct {
	site uint8 // number of the dedup domain at the client, 0 for none
	key  chunk.Key
	name string
}

const openHead = 1 + len(chunk.Key{})

func appendOpen(b []byte, o openOrder) []byte {
	b = append(b, o.site)
	b = append(b, o.key[:]...)
	return append(b, o.name...)
}

func parseOpen(b []byte) (openOrder, error) {
	if len(b) <= openHead || len(b) > openHead+maxName {
		return openOrder{}, protocol("an open frame of %d bytes", len(b))
	}
	return openOrder{site: b[0], key: chunk.Key(b[1:openHead]), name: string(b[openHead:])}, nil
}

// sigsPerFrame is how many signatures one SAME frame holds.
const sigsPerFrame = (MaxPayload - 8) / chunk.SigLen

// parseSame takes a SAME payload apart: the first chunk, and the signatures of
// it and those that follow it.
func parseSame(b []byte, limit int64) (first int64, sigs []byte, err error) {
	n := int64(len(b)-8) / chunk.SigLen
	if len(b) < 8+chunk.SigLen || (len(b)-8)%chunk.SigLen != 0 {
		return 0, nil, protocol("a frame of signatures of %d bytes", len(b))
	}
	f := binary.BigEndian.Uint64(b)
	if f > math.MaxInt64 || int64(f) >= limit || n > limit-int64(f) {
		return 0, nil, protocol("signatures of %d chunks from %d on, the volume has %d", n, f, limit)
	}
	return int64(f), b[8:], nil
}

// wireError is the payload of ERROR.
type wireError struct {
	kind block.Kind
	runs []run // chunks it is about; none: the whole request
	text string
}

func appendError(b []byte, volume uint16, req uint64, e wireError) []byte {
	text := e.text[:min(len(e.text), maxText)]
	e.runs = e.runs[:min(len(e.runs), (MaxPayload-maxText-4)/runLen)]
	b = appendHeader(b, header{n: uint32(4 + runLen*len(e.runs) + len(text)), typ: tError, volume: volume, req: req})
	b = binary.BigEndian.AppendUint16(b, uint16(e.kind))
	b = binary.BigEndian.AppendUint16(b, uint16(len(e.runs)))
	for _, r := range e.runs {
		b = appendRun(b, r)
	}
	return append(b, text...)
}

func parseError(b []byte, limit, most int64) (wireError, error) {
	if len(b) < 4 {
		return wireError{}, protocol("an error frame of %d bytes", len(b))
	}
	e := wireError{kind: block.Kind(binary.BigEndian.Uint16(b))}
	n := int(binary.BigEndian.Uint16(b[2:])) * runLen
	if b = b[4:]; n > len(b) || len(b)-n > maxText {
		return wireError{}, protocol("an error frame with %d bytes of runs and %d bytes in all", n, len(b))
	}
	if n > 0 {
		var err error
		if e.runs, err = parseRuns(nil, b[:n], limit, most); err != nil {
			return wireError{}, err
		}
	}
	if e.kind == block.KindNone || e.kind > block.KindExists {
		e.kind = block.KindIO // a kind newer than this end
	}
	e.text = printable(b[n:])
	return e, nil
}

// printable keeps a peer's text from writing control characters into logs.
func printable(b []byte) string {
	out := []rune(string(b))
	for i, r := range out {
		if r < ' ' || r == 0x7f || r == 0xfffd {
			out[i] = '?'
		}
	}
	return string(out)
}

// volumeInfo is the payload of VOLUME.
type volumeInfo struct {
	info  block.Info
	chunk int
}

// chunks is the number of chunks, the last of which may be short.
func (v volumeInfo) chunks() int64 {
	return (v.info.Size + int64(v.chunk) - 1) / int64(v.chunk)
}

// length is the plain length of chunk i.
func (v volumeInfo) length(i int64) int {
	return int(min(int64(v.chunk), v.info.Size-i*int64(v.chunk)))
}

const (
	volCanExtents = 1 << 0
	volReadOnly   = 1 << 1 // the source cannot be written; a remote never can
)

func appendVolume(b []byte, v volumeInfo) []byte {
	b = binary.BigEndian.AppendUint64(b, uint64(v.info.Size))
	b = binary.BigEndian.AppendUint32(b, uint32(v.info.BlockSize))
	b = binary.BigEndian.AppendUint32(b, uint32(v.chunk))
	b = binary.BigEndian.AppendUint32(b, uint32(v.info.PreferredIO))
	var f uint32
	if v.info.CanExtents {
		f |= volCanExtents
	}
	if v.info.ReadOnly {
		f |= volReadOnly
	}
	b = binary.BigEndian.AppendUint32(b, f)
	return append(b, v.info.ID...)
}

func parseVolume(b []byte) (volumeInfo, error) {
	if len(b) < 24 || len(b) > 24+maxID {
		return volumeInfo{}, protocol("a volume frame of %d bytes", len(b))
	}
	f := binary.BigEndian.Uint32(b[20:])
	v := volumeInfo{
		info: block.Info{
			Size:       int64(binary.BigEndian.Uint64(b)),
			BlockSize:  int(binary.BigEndian.Uint32(b[8:])),
			CanExtents: f&volCanExtents != 0,
			ReadOnly:   f&volReadOnly != 0,
			ID:         string(b[24:]),
		},
		chunk: int(binary.BigEndian.Uint32(b[12:])),
	}
	if pref := binary.BigEndian.Uint32(b[16:]); pref <= 1<<30 {
		v.info.PreferredIO = int(pref)
	}
	return v, checkVolume(v)
}

// checkVolume holds a volume's numbers to what both ends can work with.
func checkVolume(v volumeInfo) error {
	pow2 := func(n int) bool { return n > 0 && n&(n-1) == 0 }
	switch {
	case !pow2(v.chunk) || v.chunk < chunk.MinSize || v.chunk > chunk.MaxSize:
		return protocol("chunks of %d bytes", v.chunk)
	case !pow2(v.info.BlockSize) || v.info.BlockSize > chunk.MinSize:
		return protocol("blocks of %d bytes", v.info.BlockSize)
	case v.info.Size < 1 || v.info.Size > math.MaxInt64-chunk.MaxSize || v.info.Size%int64(v.info.BlockSize) != 0:
		return protocol("a size of %d bytes with blocks of %d", v.info.Size, v.info.BlockSize)
	case len(v.info.ID) > maxID:
		return protocol("a content ID of %d bytes, at most %d are allowed", len(v.info.ID), maxID)
	}
	return nil
}

func appendExtentsOrder(b []byte, f block.Flags, off, n int64) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(f))
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	return binary.BigEndian.AppendUint64(b, uint64(n))
}

func parseExtentsOrder(b []byte, v volumeInfo) (f block.Flags, off, n int64, err error) {
	if len(b) != 20 {
		return 0, 0, 0, protocol("an extents frame of %d bytes", len(b))
	}
	f = block.Flags(binary.BigEndian.Uint32(b))
	off, n = int64(binary.BigEndian.Uint64(b[4:])), int64(binary.BigEndian.Uint64(b[12:]))
	mask := int64(v.info.BlockSize) - 1
	if f != f.Class() || !f.Valid() || off < 0 || n <= 0 || off > v.info.Size || n > v.info.Size-off || (off|n)&mask != 0 {
		return 0, 0, 0, protocol("extents of %d bytes at %d with flags %#x", n, off, uint32(f))
	}
	return f, off, n, nil
}

const rangeLen = 9

// rangesPerFrame is how many extents one RANGES frame holds.
const rangesPerFrame = (MaxPayload - 8) / rangeLen

// appendRanges appends one RANGES payload for extents that follow each other.
func appendRanges(b []byte, es []block.Extent) []byte {
	b = binary.BigEndian.AppendUint64(b, uint64(es[0].Off))
	for _, e := range es {
		b = binary.BigEndian.AppendUint64(b, uint64(e.Len))
		b = append(b, byte(e.Kind))
	}
	return b
}

// parseRanges appends the extents of a RANGES payload, which must begin at
// off and end at or before end.
func parseRanges(dst []block.Extent, b []byte, off, end int64) ([]block.Extent, error) {
	if len(b) < 8+rangeLen || (len(b)-8)%rangeLen != 0 {
		return dst, protocol("a ranges frame of %d bytes", len(b))
	}
	if at := int64(binary.BigEndian.Uint64(b)); at != off {
		return dst, protocol("ranges from %d on where %d was due", at, off)
	}
	for b = b[8:]; len(b) > 0; b = b[rangeLen:] {
		n := int64(binary.BigEndian.Uint64(b))
		k := block.ExtentKind(b[8])
		if n <= 0 || n > end-off {
			return dst, protocol("an extent of %d bytes at %d, asked was up to %d", n, off, end)
		}
		if k > block.Free {
			k = block.Data // a kind newer than this end: it must be read to be known
		}
		dst = append(dst, block.Extent{Off: off, Len: n, Kind: k})
		off += n
	}
	return dst, nil
}

func appendText(b []byte, k block.Kind, text string) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(k))
	return append(b, text[:min(len(text), maxText)]...)
}

func parseText(b []byte) (block.Kind, string, error) {
	if len(b) < 2 || len(b) > 2+maxText {
		return 0, "", protocol("a text of %d bytes", len(b))
	}
	return block.Kind(binary.BigEndian.Uint16(b)), printable(b[2:]), nil
}
