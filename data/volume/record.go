package volume

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"forerun/internal/chunk"
)

// The parts of the map log; FORMAT.md has the offsets.
const (
	logMagic    = "FRVMLOG1"
	logVersion  = 1
	logHeader   = 64
	batchMagic  = 0x42565246 // "FRVB"
	batchHeader = 32
	maxBatch    = 64 << 20 // bytes of records in one batch

	recHeld      = 1
	recUntouched = 2
	recZero      = 3
	recEmpty     = 4
	recFull      = 5
	recBits      = 6
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// identity is what a map belongs to.
type identity struct {
	size       int64
	chunkBytes int
	source     string
}

func (id identity) sum() uint32 {
	var b [12]byte
	binary.LittleEndian.PutUint64(b[:], uint64(id.size))
	binary.LittleEndian.PutUint32(b[8:], uint32(id.chunkBytes))
	return crc32.Update(crc32.Checksum(b[:], castagnoli), castagnoli, []byte(id.source))
}

// span is a run of chunks.
type span struct{ start, n int64 }

func addSpan(s []span, start, n int64) []span {
	if k := len(s); k > 0 && s[k-1].start+s[k-1].n == start {
		s[k-1].n += n
		return s
	}
	return append(s, span{start, n})
}

// changes are the states of changed chunks at one moment, to be encoded: runs
// of each base and of uniform masks, and the masks that are neither.
type changes struct {
	untouched, zero, held []span
	empty, full           []span
	bits                  []byte // records
	heldChunks            int64
}

// collect reads the states of the chunks of d from the table, and stops where
// they are more than a batch takes, for then a snapshot is made. A mask is never
// taken without a base that became zero: if it were made durable alone, sectors
// that were cleared would show the source again.
func (t *table) collect(d *dirtySet) *changes {
	ch := new(changes)
	for pi := range t.pages {
		part := d.parts[int32(pi)]
		wb, wm := getBit(d.wholeBase, pi), getBit(d.wholeMask, pi)
		if part != nil || wb || wm {
			t.collectPage(ch, pi, part, wb, wm)
			if ch.bytes() > maxBatch/2 {
				break
			}
		}
	}
	return ch
}

func (t *table) collectPage(ch *changes, pi int, part *dirtyPage, wb, wm bool) {
	p, n := t.pages[pi].Load(), t.pageLen(pi)
	start := int64(pi) << pageShift
	switch {
	case p == nil:
		return // nothing of it ever changed
	case p == t.zero && (wb || wm):
		ch.zero = addSpan(ch.zero, start, int64(n))
		if wm || part != nil {
			ch.empty = addSpan(ch.empty, start, int64(n))
		}
		return
	case p != t.zero:
		p.mu.Lock()
		defer p.mu.Unlock()
	}
	if part == nil {
		part = new(dirtyPage)
	}
	each(&part.mask, wm, n, func(c int) {
		s := p.nib(c)
		t.collectMask(ch, p, start+int64(c), s)
		if s&baseMask == baseZero {
			ch.zero = addSpan(ch.zero, start+int64(c), 1)
		}
	})
	each(&part.base, wb, n, func(c int) {
		i := start + int64(c)
		switch p.nib(c) & baseMask {
		case baseZero:
			ch.zero = addSpan(ch.zero, i, 1)
		case baseHeld:
			ch.held = addSpan(ch.held, i, 1)
			ch.heldChunks++
		default:
			ch.untouched = addSpan(ch.untouched, i, 1)
		}
	})
}

// collectMask takes the mask of chunk i, of state n, with p.mu held.
func (t *table) collectMask(ch *changes, p *page, i int64, n uint8) {
	switch {
	case n&nibMod == 0:
		ch.empty = addSpan(ch.empty, i, 1)
	case n&nibFull != 0:
		ch.full = addSpan(ch.full, i, 1)
	default:
		var m mask
		t.loadMask(p, int(i&(pageChunks-1)), 0, t.blocks, &m, true)
		ch.bits = append(ch.bits, recBits)
		ch.bits = binary.AppendUvarint(ch.bits, uint64(i))
		for b := range (t.sectors(i) + 7) / 8 {
			ch.bits = append(ch.bits, byte(m[b>>3]>>(uint(b&7)*8)))
		}
	}
}

func (ch *changes) none() bool {
	return len(ch.untouched)+len(ch.zero)+len(ch.held)+len(ch.empty)+len(ch.full)+len(ch.bits) == 0
}

// bytes is about how long the records will be.
func (ch *changes) bytes() int64 {
	spans := len(ch.untouched) + len(ch.zero) + len(ch.held) + len(ch.empty) + len(ch.full)
	return int64(len(ch.bits)) + int64(spans)*20 + ch.heldChunks*chunk.SigLen
}

// encode appends the records: bases before masks.
func (ch *changes) encode(b []byte, s *sigs) ([]byte, error) {
	runs := func(typ byte, spans []span) {
		for _, r := range spans {
			b = append(b, typ)
			b = binary.AppendUvarint(b, uint64(r.start))
			b = binary.AppendUvarint(b, uint64(r.n))
		}
	}
	runs(recUntouched, ch.untouched)
	runs(recZero, ch.zero)
	for _, r := range ch.held {
		runs(recHeld, []span{r})
		at := len(b)
		b = append(b, make([]byte, r.n*chunk.SigLen)...)
		if err := s.readRun(b[at:], r.start); err != nil {
			return nil, err
		}
	}
	runs(recEmpty, ch.empty)
	runs(recFull, ch.full)
	return append(b, ch.bits...), nil
}

// newBatch begins a batch in b's space.
func newBatch(b []byte) []byte { return append(b[:0], make([]byte, batchHeader)...) }

// seal completes a batch: b has a header's space and the records.
func sealBatch(b []byte, gen, seq uint64) []byte {
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	le := binary.LittleEndian
	le.PutUint32(b, batchMagic)
	le.PutUint32(b[4:], uint32(len(b)-batchHeader))
	le.PutUint64(b[8:], gen)
	le.PutUint64(b[16:], seq)
	le.PutUint32(b[24:], 0)
	le.PutUint32(b[28:], batchSum(b))
	return b
}

func batchSum(b []byte) uint32 {
	return crc32.Update(crc32.Checksum(b[:28], castagnoli), castagnoli, b[batchHeader:])
}

// batchAt returns the length of the valid batch at the start of b, with its
// sequence, or 0.
func batchAt(b []byte, gen uint64) (n int, seq uint64) {
	if len(b) < batchHeader {
		return 0, 0
	}
	le := binary.LittleEndian
	l := le.Uint32(b[4:])
	if le.Uint32(b) != batchMagic || l > maxBatch || l%8 != 0 || int(l) > len(b)-batchHeader || le.Uint64(b[8:]) != gen {
		return 0, 0
	}
	b = b[:batchHeader+int(l)]
	if batchSum(b) != le.Uint32(b[28:]) {
		return 0, 0
	}
	return len(b), le.Uint64(b[16:])
}

func encodeLogHeader(id identity, gen uint64) []byte {
	b := make([]byte, logHeader)
	copy(b, logMagic)
	le := binary.LittleEndian
	le.PutUint32(b[8:], logVersion)
	le.PutUint32(b[12:], id.sum())
	le.PutUint64(b[16:], gen)
	le.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
	return b
}

func parseLogHeader(b []byte, id identity) (gen uint64, err error) {
	le := binary.LittleEndian
	switch {
	case len(b) < logHeader || string(b[:8]) != logMagic || crc32.Checksum(b[:60], castagnoli) != le.Uint32(b[60:]):
		return 0, errors.New("the header of the map log is damaged")
	case le.Uint32(b[8:]) != logVersion:
		return 0, fmt.Errorf("the map log has version %d, this program reads %d", le.Uint32(b[8:]), logVersion)
	case le.Uint32(b[12:]) != id.sum():
		return 0, errors.New("the map log belongs to another volume than the map")
	}
	return le.Uint64(b[16:]), nil
}

// replayer takes what a log says. Chunks are in range and spans not empty.
type replayer interface {
	held(start int64, sigs []byte) error
	base(start, n int64, to uint8)
	masks(start, n int64, full bool)
	bits(i int64, m *mask)
}

// replayLog gives the records of all batches of the log data, header
// included, to r in order and returns where the log ends and the last
// sequence. What is torn at the end is not part of it: a batch is synced before the
// next is begun, so anything valid after something that is not was damaged, and
// that is an error.
func replayLog(data []byte, gen uint64, g *geometry, r replayer) (end int64, seq uint64, err error) {
	at := logHeader
	for at < len(data) {
		n, s := batchAt(data[at:], gen)
		if n == 0 || s != seq+1 {
			break
		}
		if err := replayBatch(data[at+batchHeader:at+n], g, r); err != nil {
			return 0, 0, fmt.Errorf("batch %d at %d of the map log: %w", s, at, err)
		}
		at, seq = at+n, s
	}
	for later := at; later+batchHeader <= len(data); later += 8 {
		if n, s := batchAt(data[later:], gen); n != 0 {
			return 0, 0, fmt.Errorf("the map log is damaged at %d: batch %d is missing and batch %d is there at %d", at, seq+1, s, later)
		}
	}
	return int64(at), seq, nil
}

var errRecord = errors.New("a record makes no sense")

func replayBatch(b []byte, g *geometry, r replayer) error {
	number := func() (int64, bool) {
		x, n := binary.Uvarint(b)
		if n <= 0 || x > maxSize {
			return 0, false
		}
		b = b[n:]
		return int64(x), true
	}
	for len(b) > 0 {
		typ := b[0]
		b = b[1:]
		if typ == 0 {
			for _, x := range b {
				if x != 0 || len(b) > 7 {
					return errRecord
				}
			}
			return nil
		}
		start, ok := number()
		if !ok || start >= g.chunks {
			return errRecord
		}
		if typ == recBits {
			var m mask
			n := (g.sectors(start) + 7) / 8
			if len(b) < n {
				return errRecord
			}
			for k, x := range b[:n] {
				m[k>>3] |= uint64(x) << (uint(k&7) * 8)
			}
			b = b[n:]
			r.bits(start, &m)
			continue
		}
		n, ok := number()
		if !ok || n == 0 || n > g.chunks-start {
			return errRecord
		}
		switch typ {
		case recHeld:
			if int64(len(b)) < n*chunk.SigLen {
				return errRecord
			}
			if err := r.held(start, b[:n*chunk.SigLen]); err != nil {
				return err
			}
			b = b[n*chunk.SigLen:]
		case recUntouched:
			r.base(start, n, baseUntouched)
		case recZero:
			r.base(start, n, baseZero)
		case recEmpty, recFull:
			r.masks(start, n, typ == recFull)
		default:
			return errRecord
		}
	}
	return nil
}
