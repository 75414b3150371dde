package volume

import (
	"context"
	"errors"
	"fmt"

	"forerun/block"
)

const (
	// maxExtents bounds one answer of Extents.
	maxExtents = 4096
	// askBytes is the longest stretch the source is asked about at once.
	askBytes = 1 << 40
	// fetchBatch is how many chunks Prefetch asks for in one fetch.
	fetchBatch = 256
)

// Extents tells state and kind chunk by chunk: zero chunks are holes, untouched
// ones may be free, all others are data. Of untouched ones the source is asked, unless f has Local; those it
// calls zero are zero from then on, so it is asked once.
func (v *Volume) Extents(ctx context.Context, dst []block.Extent, off, n int64, f block.Flags) ([]block.Extent, error) {
	if err := v.enter("volume.extents"); err != nil {
		return dst, err
	}
	defer v.gate.leave()
	if err := v.check("volume.extents", off, n); err != nil {
		return dst, err
	}
	t := v.table
	end, had := off+n, len(dst)
	last := (end + int64(t.chunkBytes()) - 1) >> t.shift
	known := int64(0) // chunks below it were asked for, or need not be
	for off < end && len(dst)-had < maxExtents {
		i := off >> t.shift
		cat, run := t.run(i, last)
		free := false
		if cat == catUntouched {
			free, run = t.markedRun(i, i+run)
		}
		if cat == catUntouched && !free && i >= known && !f.Has(block.Local) && v.getRemote() != nil {
			next, err := v.ask(ctx, i, i+run, f)
			if err != nil {
				if len(dst) > had {
					return dst, nil
				}
				return dst, err
			}
			known = next
			continue
		}
		to := i + run
		if cat == catUntouched && !free && known > i {
			to = min(to, known)
		}
		stop := min(end, to<<t.shift)
		e := block.Extent{Off: off, Len: stop - off, Kind: block.Data, State: stateOf(cat)}
		switch {
		case cat == catZero:
			e.Kind = block.Hole
		case free:
			e.Kind = block.Free
		}
		dst = block.AppendExtent(dst, e)
		off = stop
	}
	return dst, nil
}

// Survey asks the source about a long stretch from the given chunk on, makes
// the chunks zero that are zeros or holes there, marks those that are free, and
// returns the first chunk it does not know more of: ask again from there until it is Chunks().
func (v *Volume) Survey(ctx context.Context, from int64) (next int64, err error) {
	if err := v.enter("volume.survey"); err != nil {
		return from, err
	}
	defer v.gate.leave()
	if from < 0 {
		return from, block.E("volume.survey", v.chunkName(from), block.KindRange, nil)
	}
	need := v.table.absent(nil, from, v.table.chunks, 1)
	if len(need) == 0 {
		return v.table.chunks, nil
	}
	return v.ask(ctx, need[0], v.table.chunks, block.Background)
}

// ask has the source describe the chunks [from, to), marks those that are
// zeros, with SkipFree those that are free in whole or beside zeros, and
// returns the first that was not described, at least from+1.
func (v *Volume) ask(ctx context.Context, from, to int64, f block.Flags) (next int64, err error) {
	remote := v.getRemote()
	if remote == nil {
		return from, block.E("volume.extents", v.opt.Name, block.KindUnavailable, errors.New("the volume has no link to the source"))
	}
	t := v.table
	at, end := from<<t.shift, min(to<<t.shift, t.size)
	// All from there to at is zeros, or is zeros or free; -1: at is neither.
	zeroFrom, idleFrom := int64(-1), int64(-1)
	whole := func(from int64) (a, b int64) { // the chunks in [from, at)
		a, b = (from+int64(t.chunkBytes())-1)>>t.shift, at>>t.shift
		if at == t.size {
			b = t.chunks
		}
		return a, b
	}
	markZero := func() {
		if zeroFrom < 0 {
			return
		}
		if a, b := whole(zeroFrom); a < b {
			t.markZero(a, b, v.lockChunk)
		}
		zeroFrom = -1
	}
	markIdle := func() { // after the zeros: they are not marked
		if idleFrom < 0 {
			return
		}
		if a, b := whole(idleFrom); a < b && v.opt.SkipFree {
			t.markFree(a, b)
		}
		idleFrom = -1
	}
	for next = from; next == from; {
		exts, err := remote.Extents(ctx, nil, at, min(end-at, askBytes), f)
		if err != nil {
			return from, block.E("volume.extents", v.chunkName(from), 0, err)
		}
		if len(exts) == 0 {
			return from, block.E("volume.extents", v.chunkName(from), block.KindIO, errors.New("the source described nothing"))
		}
		for _, e := range exts {
			if e.Off != at || e.Len <= 0 || e.Len > end-at {
				return from, block.E("volume.extents", v.chunkName(from), block.KindIO,
					fmt.Errorf("the source described %d bytes at %d where %d was due", e.Len, e.Off, at))
			}
			if !e.Kind.Zero() {
				markZero()
			} else if zeroFrom < 0 {
				zeroFrom = at
			}
			if !e.Kind.Zero() && e.Kind != block.Free {
				markIdle()
			} else if idleFrom < 0 {
				idleFrom = at
			}
			at = e.End()
		}
		next = at >> t.shift
		if at == t.size {
			next = t.chunks
		}
	}
	markZero()
	markIdle()
	return next, nil
}

// Here says whether nothing of chunk i has to be fetched. It does not block.
func (v *Volume) Here(i int64) bool { return !absent(v.table.nib(i)) }

// Absent appends to dst up to limit chunks, from the given one on in order,
// that only the source has and that are wanted: neither held nor zero nor free
// nor overwritten whole.
func (v *Volume) Absent(dst []int64, from int64, limit int) []int64 {
	return v.table.absent(dst, max(from, 0), v.table.chunks, limit)
}

// Filled says whether nothing is left that only the source has and is wanted.
func (v *Volume) Filled() bool {
	c := v.table.stats()
	return c.cat[catUntouched] == c.free && c.partial == 0
}

// Fetch has those of the chunks brought that are still absent, and returns
// when they are here or could not be brought.
func (v *Volume) Fetch(ctx context.Context, idx []int64, f block.Flags) error {
	if err := v.enter("volume.fetch"); err != nil {
		return err
	}
	defer v.gate.leave()
	return v.fetch(ctx, idx, f)
}

func (v *Volume) fetch(ctx context.Context, idx []int64, f block.Flags) error {
	want := make([]int64, 0, len(idx))
	for _, i := range idx {
		if i < 0 || i >= v.table.chunks {
			return block.E("volume.fetch", v.chunkName(i), block.KindRange, errors.New("there is no such chunk"))
		}
		if absent(v.table.nib(i)) {
			want = append(want, i)
		}
	}
	if len(want) == 0 {
		return nil
	}
	remote := v.getRemote()
	if remote == nil {
		return block.E("volume.fetch", v.chunkName(want[0]), block.KindUnavailable, errors.New("the volume has no link to the source"))
	}
	if err := remote.Fetch(ctx, want, f); err != nil {
		return block.E("volume.fetch", v.opt.Name, 0, err)
	}
	return nil
}

// Prefetch has the absent chunks of [off, off+n) brought, and returns when
// they are here or could not be brought.
func (v *Volume) Prefetch(ctx context.Context, off, n int64, f block.Flags) error {
	if err := v.enter("volume.prefetch"); err != nil {
		return err
	}
	defer v.gate.leave()
	if err := v.check("volume.prefetch", off, n); err != nil {
		return err
	}
	t := v.table
	to := (off+n-1)>>t.shift + 1
	idx := make([]int64, 0, fetchBatch)
	for from := off >> t.shift; from < to; {
		idx = t.absent(idx[:0], from, to, fetchBatch)
		if len(idx) == 0 {
			return nil
		}
		if err := v.fetch(ctx, idx, f); err != nil {
			return err
		}
		from = idx[len(idx)-1] + 1
	}
	return nil
}
