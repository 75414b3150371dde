package journal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"forerun/block"
	"forerun/disk"
)

// recover finds the segments, verifies all that is to be replayed before it
// changes anything, replays, and begins a new segment.
func (j *Journal) recover() error {
	begin := time.Now()
	if err := j.loadHolds(); err != nil {
		return err
	}
	if err := j.list(); err != nil {
		return err
	}
	pl, err := j.plan()
	if err != nil {
		return err
	}
	n, err := j.redo(pl)
	if err != nil {
		return err
	}
	if len(j.segs) > 0 {
		if err := j.below.Flush(context.Background(), block.Demand); err != nil {
			return block.E("journal.replay", j.dir, 0, fmt.Errorf("%d records were applied, but the device below cannot be flushed: %w", n, err))
		}
	}
	j.pos = pl.last
	j.applied, j.safe = pl.last.Sequence, pl.last.Sequence
	j.claim.Store(pl.last.Sequence)
	if err := j.begin(pl); err != nil {
		return err
	}
	if n > 0 {
		j.stats.replayed.Store(int64(n))
		j.log.Info("journal replayed", "records", n, "position", pl.last.String(), "took", time.Since(begin))
	}
	return nil
}

// list opens the segments of the directory, in order of their ids, into
// j.segs.
func (j *Journal) list() error {
	names, err := j.fs.List(j.dir)
	if err != nil {
		return block.E("journal.open", j.dir, 0, err)
	}
	for _, name := range names {
		full := path.Join(j.dir, name)
		base, isSpare := strings.CutSuffix(name, ".spare")
		digits, isSeg := strings.CutSuffix(base, ".seg")
		id, err := strconv.ParseUint(digits, 16, 64)
		if !isSeg || err != nil || len(digits) != 16 {
			if strings.HasSuffix(name, ".tmp") {
				j.fs.Remove(full)
			}
			continue
		}
		j.nextID = max(j.nextID, id+1)
		if isSpare {
			if err := j.fs.Remove(full); err != nil {
				return block.E("journal.open", full, 0, err)
			}
			continue
		}
		f, err := j.fs.Open(full, disk.Write)
		if err != nil {
			return block.E("journal.open", full, 0, err)
		}
		s := &segment{path: full, file: f, named: true}
		s.sealed.Store(true)
		j.segs = append(j.segs, s)
		if err := s.load(id); err != nil {
			return err
		}
	}
	slices.SortFunc(j.segs, func(a, b *segment) int { return int(a.id) - int(b.id) })
	return nil
}

// load reads the header.
func (s *segment) load(id uint64) error {
	st, err := s.file.Stat()
	if err != nil {
		return block.E("journal.open", s.path, 0, err)
	}
	s.size = st.Size
	b := make([]byte, segFields)
	if n, err := s.file.ReadAt(b, 0); err != nil && err != io.EOF {
		return block.E("journal.open", s.path, 0, err)
	} else {
		b = b[:n]
	}
	h, ok, newer := parseSegInfo(b)
	switch {
	case newer:
		return block.E("journal.open", s.path, block.KindUnsupported,
			errors.New("the segment was written by a newer version of forerun; use that version"))
	case !ok || h.id != id:
		return damaged(s.path, 0, "its header is damaged")
	}
	s.segInfo, s.seed = h, h.seed()
	return nil
}

func damaged(path string, off int64, what string) error {
	return block.E("journal.open", path, block.KindCorrupt, fmt.Errorf(
		"%s (at byte %d); writes that had been flushed are in it and cannot be replayed. Nothing was changed. "+
			"Copy the journal's directory aside, restore the file from a good copy if there is one; "+
			"to go on without the lost writes, move all its files away and check the volume's file system", what, off))
}

// replayPlan is what plan found.
type replayPlan struct {
	segs  []*segment // to be replayed, in order
	from  uint64     // first sequence to be applied
	last  Position   // where the log ends
	voids map[uint64]bool
	drop  []*segment // behind a torn tail
	old   []*segment // before the first of segs; applied
}

// plan verifies every record to be replayed and finds where the log ends. It
// changes nothing.
func (j *Journal) plan() (*replayPlan, error) {
	pl := &replayPlan{voids: map[uint64]bool{}}
	valid := j.segs
	applied := uint64(0)
	for _, s := range valid {
		applied = max(applied, s.applied)
	}
	if len(valid) == 0 {
		return pl, nil
	}
	start := 0
	for i, s := range valid {
		if s.first <= applied+1 {
			start = i
		}
	}
	pl.old = valid[:start]
	pl.from = max(applied+1, valid[start].first)
	pl.last = Position{valid[start].first - 1, valid[start].prev}

	size := j.info.Size
	stop := -1 // index of the segment in which the log ends, when it ends before the last
	for i := start; i < len(valid); i++ {
		s := valid[i]
		if s.first != pl.last.Sequence+1 || s.prev != pl.last.Checksum {
			stop = i
			break
		}
		w := newWindow(s.file, s.size)
		end, last, err := walk(w, &s.segInfo, func(at int64, r *recInfo, _ []byte) error {
			if r.typ == TypeVoid {
				pl.voids[r.off] = true
			} else if r.seq >= pl.from && (r.length == 0 || r.off+r.length > uint64(size)) {
				return block.E("journal.open", s.path, block.KindRange, fmt.Errorf(
					"record %d at byte %d changes bytes %d to %d of a device of %d bytes; is this journal that of another volume?",
					r.seq, at, r.off, r.off+r.length, size))
			}
			return nil
		})
		if err != nil {
			if block.KindOf(err) != block.KindRange {
				err = block.E("journal.open", s.path, 0, fmt.Errorf("reading the journal: %w", err))
			}
			return nil, err
		}
		s.tail, s.last, s.syncedTail = end, last, end
		pl.segs, pl.last = append(pl.segs, s), last
	}

	// The log ends here by right only if nothing behind it says that it was durable.
	tail := pl.segs[len(pl.segs)-1]
	claim, err := promised(newWindow(tail.file, tail.size), &tail.segInfo, tail.tail)
	if stop >= 0 && err == nil {
		for _, s := range valid[stop:] {
			var c uint64
			if c, err = promised(newWindow(s.file, s.size), &s.segInfo, segHeader); err != nil {
				break
			}
			claim = max(claim, c, s.durable)
			pl.drop = append(pl.drop, s)
		}
	}
	if err != nil {
		return nil, block.E("journal.open", tail.path, 0, fmt.Errorf("reading the journal: %w", err))
	}
	if claim > pl.last.Sequence && claim > applied {
		return nil, damaged(tail.path, tail.tail, fmt.Sprintf("record %d is damaged or missing, though it was durable once (as were all up to %d)",
			pl.last.Sequence+1, claim))
	}
	if pl.last.Sequence < applied {
		pl.last = Position{Sequence: applied} // the records are gone, what they did is below
	}
	return pl, nil
}

// redo applies the records of the plan and answers how many.
func (j *Journal) redo(pl *replayPlan) (n int, err error) {
	ctx := context.Background()
	for _, s := range pl.segs {
		if s.last.Sequence < pl.from {
			continue
		}
		_, _, err := walk(newWindow(s.file, s.tail), &s.segInfo, func(at int64, r *recInfo, payload []byte) error {
			if r.seq < pl.from || r.typ == TypeVoid || pl.voids[r.seq] {
				return nil
			}
			f := block.Flags(r.flags) & block.MayTrim
			var err error
			switch r.typ {
			case TypeWrite:
				err = j.below.WriteAt(ctx, payload, int64(r.off), f)
			case TypeZero:
				err = j.below.Zero(ctx, int64(r.off), int64(r.length), f)
			case TypeTrim:
				err = j.below.Trim(ctx, int64(r.off), int64(r.length), f)
			}
			if err != nil {
				return fmt.Errorf("record %d (%d bytes at %d) cannot be applied again; nothing is lost, correct the cause and open again: %w",
					r.seq, r.length, r.off, err)
			}
			n++
			return nil
		})
		if err != nil {
			return n, block.E("journal.replay", s.path, 0, err)
		}
	}
	return n, nil
}

// begin removes what is behind the end of the log, begins a new segment
// durably, and removes what nobody holds.
func (j *Journal) begin(pl *replayPlan) error {
	for _, s := range slices.Backward(pl.drop) {
		if err := j.fs.Remove(s.path); err != nil {
			return block.E("journal.open", s.path, 0, err)
		}
		s.file.Close()
	}
	if len(pl.drop) > 0 {
		if err := j.fs.SyncDir(j.dir); err != nil {
			return block.E("journal.open", j.dir, 0, err)
		}
	}
	// What a hold may still read must be one unbroken chain to the new segment.
	keep := append(slices.Clone(pl.old), pl.segs...)
	chained := len(keep)
	for i := len(keep) - 1; i >= 0; i-- {
		s := keep[i]
		if i < len(pl.old) {
			end, last, err := walk(newWindow(s.file, s.size), &s.segInfo, func(int64, *recInfo, []byte) error { return nil })
			if err != nil {
				break
			}
			s.tail, s.last, s.syncedTail = end, last, end
		}
		next := pl.last
		if i+1 < len(keep) {
			next = Position{keep[i+1].first - 1, keep[i+1].prev}
		}
		if s.last != next {
			break
		}
		chained = i
	}
	j.segs = keep
	if err := j.roll(); err != nil {
		return err
	}
	if err := j.fs.SyncDir(j.dir); err != nil {
		return block.E("journal.open", j.dir, 0, err)
	}
	j.cur.named = true
	for ; chained > 0; chained-- {
		if err := j.discard(j.segs[0]); err != nil {
			return block.E("journal.open", j.dir, 0, err)
		}
	}
	for name, p := range j.holds {
		if p.Sequence > j.pos.Sequence || p.Sequence+1 < j.segs[0].first {
			delete(j.holds, name)
			j.holdsNow = true
			j.log.Warn("a hold on the journal cannot be kept", "hold", name, "position", p.String())
		}
	}
	if err := j.trim(j.pos, false); err != nil {
		return err
	}
	j.stock()
	return nil
}
