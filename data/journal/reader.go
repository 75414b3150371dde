package journal

import (
	"context"
	"fmt"
	"hash/crc32"

	"forerun/block"
)

// Record is one change, as it was appended.
type Record struct {
	Position
	Type    Type
	Flags   block.Flags
	Off     int64  // bytes; for TypeVoid the sequence of the record that has no effect
	Len     int64  // bytes
	Payload []byte // of TypeWrite, else nil; valid until the next call of Next
}

// Reader reads records in order. It keeps the segment it is in, not those
// ahead of it: take a Hold for them. It is used by one goroutine at a time.
type Reader struct {
	j   *Journal
	seg *segment
	at  int64
	pos Position
	mem []byte
}

// Reader begins behind from. Errors: KindNotFound when the journal no longer
// has what follows, KindInvalid when from is ahead of it, KindCorrupt when
// from is a position of another history.
func (j *Journal) Reader(from Position) (*Reader, error) {
	if err := j.enter("reader"); err != nil {
		return nil, err
	}
	defer j.life.RUnlock()
	j.mu.Lock()
	if from.Sequence > j.pos.Sequence {
		defer j.mu.Unlock()
		return nil, block.E("journal.reader", j.dir, block.KindInvalid, fmt.Errorf("position %v is ahead of the journal's %v", from, j.pos))
	}
	var seg *segment
	for _, s := range j.segs {
		if s.first <= from.Sequence+1 && !s.leaving {
			seg = s
		}
	}
	if seg == nil {
		defer j.mu.Unlock()
		return nil, gap("journal.reader", j.dir, from, j.segs[0].first)
	}
	seg.hold()
	tail := seg.tail
	j.mu.Unlock()

	r := &Reader{j: j, seg: seg, at: segHeader, pos: Position{seg.first - 1, seg.prev}, mem: make([]byte, recHeader)}
	for r.pos.Sequence < from.Sequence {
		h, err := r.header(tail)
		if err != nil {
			r.Close()
			return nil, err
		}
		r.at, r.pos = r.at+h.size(), Position{h.seq, h.sum}
	}
	if r.pos != from {
		r.Close()
		return nil, block.E("journal.reader", j.dir, block.KindCorrupt,
			fmt.Errorf("position %v is of another history: the journal has %v; copy the volume anew", from, r.pos))
	}
	return r, nil
}

// Position is that of the last record Next returned.
func (r *Reader) Position() Position { return r.pos }

func (r *Reader) header(tail int64) (recInfo, error) {
	var h recInfo
	ok := r.at+recHeader <= tail
	if ok {
		if _, err := r.seg.file.ReadAt(r.mem[:recHeader], r.at); err != nil {
			return h, block.E("journal.reader", r.seg.path, 0, err)
		}
		h, ok = parseRec(r.mem[:recHeader], r.seg.seed)
	}
	if !ok || h.seq != r.pos.Sequence+1 || h.prev != r.pos.Checksum {
		return h, block.E("journal.reader", r.seg.path, block.KindCorrupt,
			fmt.Errorf("no valid record at byte %d, where %d was due", r.at, r.pos.Sequence+1))
	}
	return h, nil
}

// Next waits for the next record. It returns ctx's error when that ends first,
// KindClosed when the journal is closed, and KindNotFound when the segment
// that follows is gone.
func (r *Reader) Next(ctx context.Context) (Record, error) { return r.read(ctx, true) }

// Skim is Next without the payload, which is neither read nor verified.
func (r *Reader) Skim(ctx context.Context) (Record, error) { return r.read(ctx, false) }

func (r *Reader) read(ctx context.Context, payload bool) (Record, error) {
	j := r.j
	if err := j.enter("reader"); err != nil {
		return Record{}, err
	}
	defer j.life.RUnlock()
	tail, err := r.wait(ctx)
	if err != nil {
		return Record{}, err
	}
	h, err := r.header(tail)
	if err != nil {
		return Record{}, err
	}
	rec := Record{Position: Position{h.seq, h.sum}, Type: h.typ, Flags: block.Flags(h.flags), Off: int64(h.off), Len: int64(h.length)}
	if h.typ == TypeWrite && payload {
		if n := recHeader + int(h.length); cap(r.mem) < n {
			r.mem = make([]byte, n)
		}
		rec.Payload = r.mem[recHeader : recHeader+int(h.length)]
		if _, err := r.seg.file.ReadAt(rec.Payload, r.at+recHeader); err != nil {
			return Record{}, block.E("journal.reader", r.seg.path, 0, err)
		}
		if crc32.Checksum(rec.Payload, castagnoli) != h.payload {
			return Record{}, block.E("journal.reader", r.seg.path, block.KindCorrupt,
				fmt.Errorf("the payload of record %d at byte %d is damaged", h.seq, r.at))
		}
	}
	r.at, r.pos = r.at+h.size(), rec.Position
	return rec, nil
}

// wait returns the tail of the segment in which the next record is.
func (r *Reader) wait(ctx context.Context) (int64, error) {
	j := r.j
	j.mu.Lock()
	defer j.mu.Unlock()
	for {
		if r.at < r.seg.tail {
			return r.seg.tail, nil
		}
		if r.pos.Sequence < j.pos.Sequence {
			var next *segment
			for _, s := range j.segs {
				if s != r.seg && !s.leaving && s.first == r.pos.Sequence+1 && s.tail > segHeader {
					next = s
				}
			}
			if next == nil {
				return 0, gap("journal.reader", j.dir, r.pos, j.segs[0].first)
			}
			next.hold()
			r.seg.drop()
			r.seg, r.at = next, segHeader
			continue
		}
		j.readers++
		ch := j.arrived.wait()
		j.mu.Unlock()
		var err error
		select {
		case <-ch:
		case <-ctx.Done():
			err = block.E("journal.reader", j.dir, 0, ctx.Err())
		case <-j.stop:
			err = block.E("journal.reader", j.dir, block.KindClosed, nil)
		}
		j.mu.Lock()
		j.readers--
		if err != nil {
			return 0, err
		}
	}
}

// Close gives the segment back. The Reader is of no use afterwards.
func (r *Reader) Close() {
	r.j.mu.Lock()
	defer r.j.mu.Unlock()
	if r.seg != nil {
		r.seg.drop()
		r.seg = nil
	}
}
