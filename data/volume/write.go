package volume

import (
	"context"

	"forerun/block"
)

// WriteAt stores p in the overlay. It never waits for the source. With FUA it
// flushes before it returns.
func (v *Volume) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	if err := v.enter("volume.write"); err != nil {
		return err
	}
	defer v.gate.leave()
	if err := v.check("volume.write", off, int64(len(p))); err != nil {
		return err
	}
	for len(p) > 0 {
		n := min(int64(len(p)), regionEnd(off)-off)
		if err := v.writeRegion(p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	if f.Has(block.FUA) {
		return v.commit(true)
	}
	return nil
}

// writeRegion stores p, which lies in one region: bytes, then mask.
func (v *Volume) writeRegion(p []byte, off int64) error {
	st := v.stripe(off)
	st.mu.RLock()
	defer st.mu.RUnlock()
	st.seq.Add(1)
	err := v.overlay.writeAt(p, off)
	st.seq.Add(1<<32 - 1)
	if err != nil {
		return err
	}
	t := v.table
	for end := off + int64(len(p)); off < end; {
		i := off >> t.shift
		next := min(end, (i+1)<<t.shift)
		if t.nib(i)&nibFull == 0 {
			from := int(off-i<<t.shift) >> sectorShift
			t.setMask(i, from, from+int(next-off)>>sectorShift)
		}
		off = next
	}
	return nil
}

// Zero makes n bytes at off read as zeros: whole chunks by a change of the
// map, and the rest as a write. It is always fast.
func (v *Volume) Zero(ctx context.Context, off, n int64, f block.Flags) error {
	return v.zero(ctx, "volume.zero", off, n, f)
}

// Trim does what Zero does.
func (v *Volume) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	return v.zero(ctx, "volume.trim", off, n, f)
}

func (v *Volume) zero(ctx context.Context, op string, off, n int64, f block.Flags) error {
	if err := v.enter(op); err != nil {
		return err
	}
	defer v.gate.leave()
	if err := v.check(op, off, n); err != nil {
		return err
	}
	pageBytes := int64(pageChunks) << v.table.shift
	for end := off + n; off < end; {
		if off%pageBytes == 0 {
			if err := ctx.Err(); err != nil {
				return block.E(op, v.opt.Name, block.KindCanceled, err)
			}
			if stop := min(off+pageBytes, v.opt.Size); stop <= end {
				v.zeroPage(int(off / pageBytes))
				off = stop
				continue
			}
		}
		next := min(end, regionEnd(off))
		if err := v.zeroRegion(off, next); err != nil {
			return err
		}
		off = next
	}
	if f.Has(block.FUA) {
		return v.commit(true)
	}
	return nil
}

// zeroRegion makes [off, end), which lies in one region, zeros.
func (v *Volume) zeroRegion(off, end int64) error {
	t := v.table
	st := v.stripe(off)
	st.mu.Lock()
	defer st.mu.Unlock()
	var from, to int64 // of the overlay, that nothing needs any more
	for off < end {
		i := off >> t.shift
		next := min(end, (i+1)<<t.shift, t.size)
		lo := off - i<<t.shift
		n := t.nib(i)
		switch {
		case n == baseZero: // and nothing written: zeros already
		case lo == 0 && next-off == int64(t.length(i)):
			t.zeroChunk(i)
			v.opt.Tier.Drop(i)
			if n&nibMod == 0 {
				break
			}
			if to != off {
				v.giveUp(from, to)
				from = off
			}
			to = next
		default:
			if err := v.overlay.punch(off, next-off); err != nil {
				return err
			}
			t.setMask(i, int(lo>>sectorShift), int((lo+next-off)>>sectorShift))
		}
		off = next
	}
	v.giveUp(from, to)
	return nil
}

func (v *Volume) giveUp(from, to int64) {
	if to > from {
		v.overlay.release(from, to-from)
	}
}

// zeroPage makes the chunks of a whole page zeros at once.
func (v *Volume) zeroPage(pi int) {
	t := v.table
	start := int64(pi) * pageChunks << t.shift
	end := min(start+pageChunks<<t.shift, t.size)
	first, n := start/regionBytes%stripes, (end-start+regionBytes-1)/regionBytes
	if n >= stripes {
		first, n = 0, stripes
	}
	// A page has a power of two regions and begins at a multiple of it, so
	// they do not wrap and this order is ascending.
	locked := v.regions[first : first+n]
	for k := range locked {
		locked[k].mu.Lock()
	}
	defer func() {
		for k := range locked {
			locked[k].mu.Unlock()
		}
	}()
	old := t.zeroPage(pi)
	if old == nil || old == t.zero {
		return
	}
	written := false
	for c := range t.pageLen(pi) {
		n := old.nib(c)
		written = written || n&nibMod != 0
		if n&baseMask != baseZero {
			v.opt.Tier.Drop(int64(pi)<<pageShift + int64(c))
		}
	}
	if written {
		v.overlay.release(start, end-start)
	}
}

// Flush makes all that was written before it durable: the overlay, then the map.
func (v *Volume) Flush(ctx context.Context, f block.Flags) error {
	if err := v.enter("volume.flush"); err != nil {
		return err
	}
	defer v.gate.leave()
	return v.commit(true)
}
