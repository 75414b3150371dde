package volume

import (
	"context"

	"forerun/block"
)

// ReadAt fills p: what is here at once, then what is missing, asked for
// together in one fetch.
func (v *Volume) ReadAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	if err := v.enter("volume.read"); err != nil {
		return err
	}
	defer v.gate.leave()
	if err := v.check("volume.read", off, int64(len(p))); err != nil {
		return err
	}
	var ms *misses // only taken from its pool when something is missing
	var err error
	for q, at := p, off; len(q) > 0; {
		n := min(int64(len(q)), regionEnd(at)-at)
		if ms, err = v.readRegion(q[:n], at, ms, false); err != nil {
			break
		}
		q, at = q[n:], at+n
	}
	demand := f.Class() == block.Demand
	if demand {
		v.n.reads.Add(1)
		v.ahead.reached(off>>v.table.shift, (off+int64(len(p))-1)>>v.table.shift)
	}
	if ms == nil {
		return err
	}
	if err == nil {
		err = v.readMissing(ctx, ms, f)
	}
	clear(ms.list[:cap(ms.list)]) // forget the caller's bytes
	ms.list = ms.list[:0]
	v.misses.Put(ms)
	return err
}

// readRegion fills p, which lies in one region, and appends to ms the parts
// whose base is not here. With have, p holds the base's bytes already, where
// the base is not zero by now.
func (v *Volume) readRegion(p []byte, off int64, ms *misses, have bool) (*misses, error) {
	st := v.stripe(off)
	had := ms.len()
	st.mu.RLock()
	seq := st.seq.Load()
	ms, touched, err := v.readParts(p, off, ms, have)
	mixed := touched && (uint32(seq) != 0 || st.seq.Load() != seq)
	st.mu.RUnlock()
	if !mixed || err != nil {
		return ms, err
	}
	// A writer was at it: a sector may be half old and half new.
	ms.cut(had)
	st.mu.Lock()
	ms, _, err = v.readParts(p, off, ms, have)
	st.mu.Unlock()
	return ms, err
}

// readParts is readRegion with the region locked. It says whether it read the overlay.
func (v *Volume) readParts(p []byte, off int64, ms *misses, have bool) (_ *misses, touched bool, err error) {
	t := v.table
	r := overlayRun{v: v, p: p, off: off}
	for a := 0; a < len(p); {
		i := (off + int64(a)) >> t.shift
		lo := int(off + int64(a) - i<<t.shift)
		b := min(len(p), a+t.chunkBytes()-lo)
		n := t.nib(i)
		if n&nibFull != 0 {
			if err := r.add(a, b); err != nil {
				return ms, true, err
			}
			a = b
			continue
		}
		if n&nibMod != 0 {
			if ms, err = v.readPartial(&r, ms, i, a, b, lo, have); err != nil {
				return ms, true, err
			}
			a = b
			continue
		}
		if !v.readBase(p[a:b], i, lo, n, have) {
			ms = v.miss(ms, i, lo, p[a:b])
		}
		a = b
	}
	err = r.flush()
	return ms, r.touched, err
}

// readBase fills part with the base's bytes of chunk i at lo, if they are near.
func (v *Volume) readBase(part []byte, i int64, lo int, n uint8, have bool) bool {
	switch {
	case n&baseMask == baseZero:
		clear(part)
		return true
	case have:
		return true
	}
	return v.opt.Tier.ReadAt(part, i, lo)
}

// readPartial fills p[a:b], the bytes of chunk i from lo on, of which the
// overlay has some.
func (v *Volume) readPartial(r *overlayRun, ms *misses, i int64, a, b, lo int, have bool) (*misses, error) {
	t := v.table
	from, to := lo>>sectorShift, (lo+b-a)>>sectorShift
	pg, c := t.pages[i>>pageShift].Load(), int(i&(pageChunks-1))
	var m mask
	var n uint8
	for {
		n = pg.nib(c)
		if n&nibFull != 0 {
			return ms, r.add(a, b)
		}
		t.blockMask(pg, c, from>>3, (to+7)>>3, &m)
		if pg.nib(c) == n {
			break
		}
	}
	if m.all(from, to) {
		return ms, r.add(a, b)
	}
	if !v.readBase(r.p[a:b], i, lo, n, have) {
		return v.miss(ms, i, lo, r.p[a:b]), nil
	}
	for s := m.run(from, to, false); s < to; {
		end := m.run(s, to, true)
		if err := r.add(a+(s-from)<<sectorShift, a+(end-from)<<sectorShift); err != nil {
			return ms, err
		}
		s = m.run(end, to, false)
	}
	return ms, nil
}

// overlayRun gathers neighbouring parts of p that the overlay has, so that
// they cost one read.
type overlayRun struct {
	v        *Volume
	p        []byte
	off      int64
	from, to int
	touched  bool
}

func (r *overlayRun) add(a, b int) error {
	if r.to == a {
		r.to = b
		return nil
	}
	err := r.flush()
	r.from, r.to = a, b
	return err
}

func (r *overlayRun) flush() error {
	if r.from == r.to {
		return nil
	}
	r.touched = true
	err := r.v.overlay.readAt(r.p[r.from:r.to], r.off+int64(r.from))
	r.from = r.to
	return err
}

// Near says whether ReadAt of n bytes at off would be served without asking
// the source. It is cheap and may say no for what a tier happens to have.
func (v *Volume) Near(off, n int64) bool {
	t := v.table
	for end := min(off+n, t.size); off < end; {
		i := off >> t.shift
		next := min(end, (i+1)<<t.shift)
		if t.nib(i)&(baseMask|nibFull) == 0 {
			lo := off - i<<t.shift
			if !t.covered(i, int(lo>>sectorShift), int((lo+next-off+sectorBytes-1)>>sectorShift)) {
				return false
			}
		}
		off = next
	}
	return true
}
