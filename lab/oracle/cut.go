package oracle

import (
	"bytes"
	"fmt"
	"io"
	"math"
	"time"
)

// cutWrite is one write as a copy that follows behind sees it: whole in it, or
// not at all.
type cutWrite struct {
	v            *version
	off, n       int64
	begun, ended uint64 // ticks; ended 0 is not acknowledged
	from, at     time.Time
}

// past is what may be in one sector of the copy, oldest first. base says
// whether the untouched disk still may.
type past struct {
	writes []*cutWrite
	base   bool
}

// cutLog is the history that copies are judged by. Unlike History.sectors it
// forgets nothing that a copy may still hold.
type cutLog struct {
	tick    uint64
	sectors map[int64]*past
	floor   uint64 // newest tick that an earlier copy is known to lie behind
}

// Cut is the moment in a history that a copy shows.
type Cut struct {
	// After is the newest tick at which a write began that is there; Before is
	// the oldest at which one was acknowledged that is not, the largest number
	// when nothing is missing. The moment lies between the two.
	After, Before uint64
	// Missing counts acknowledged writes that are not there, Written their
	// bytes, zeros apart, and MissingBytes the sectors that differ, each once.
	Missing, Written, MissingBytes int64
	// Oldest is when the oldest missing one was acknowledged, zero for none;
	// Newest when the newest one that is there began.
	Oldest, Newest time.Time
}

// Covers says whether everything acknowledged by the tick is in the copy.
func (c Cut) Covers(tick uint64) bool { return c.Before > tick }

// TrackCuts makes JudgeCut possible. It is called before the first write, and
// takes memory for each write until a judged copy has gone past it.
func (h *History) TrackCuts() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.cuts = &cutLog{sectors: map[int64]*past{}}
}

// Tick is the present, for Cut.Covers.
func (h *History) Tick() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.cuts.tick++
	return h.cuts.tick
}

func (l *cutLog) begin(v *version, off, n int64) *cutWrite {
	l.tick++
	w := &cutWrite{v: v, off: off, n: n, begun: l.tick, from: time.Now()}
	for s := off / Sector; s < (off+n)/Sector; s++ {
		p := l.sectors[s]
		if p == nil {
			p = &past{base: true}
			l.sectors[s] = p
		}
		p.writes = append(p.writes, w)
	}
	return w
}

func (l *cutLog) end(w *cutWrite) {
	l.tick++
	w.ended, w.at = l.tick, time.Now()
}

// JudgeCut reads a whole copy of the disk that follows behind, and says which
// moment of the history it shows. It is a *Wrong if it shows none: a sector
// that never was, a write of which only a part is there, a write without one
// that was acknowledged before it began, or a moment before that of a copy
// judged earlier. No write of the history may be under way to the copy itself
// meanwhile; writes to the disk may.
func (h *History) JudgeCut(r io.ReaderAt) (Cut, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	j := cutJudge{h: h, lo: h.cuts.floor, hi: math.MaxUint64, side: map[*cutWrite]int64{}, found: map[int64]int{}}
	buf := make([]byte, 1<<20)
	for off := int64(0); off < h.size; off += int64(len(buf)) {
		q := buf[:min(int64(len(buf)), h.size-off)]
		if _, err := r.ReadAt(q, off); err != nil {
			return Cut{}, fmt.Errorf("read %d bytes at %d: %w", len(q), off, err)
		}
		for at := int64(0); at < int64(len(q)); at += Sector {
			if err := j.sector((off+at)/Sector, q[at:at+Sector]); err != nil {
				return Cut{}, err
			}
		}
	}
	return j.verdict()
}

type cutJudge struct {
	h      *History
	lo, hi uint64
	last   *cutWrite // whose beginning is lo
	next   *cutWrite // whose acknowledgement is hi
	// side has for each write a sector in which it is (s+1) or is not (-s-1).
	side  map[*cutWrite]int64
	found map[int64]int // sector → index of what it holds, -1 the untouched disk
	open  []openSector  // those that cannot be told by their bytes
	want  [Sector]byte
}

type openSector struct {
	s   int64
	may []int
}

// sector notes what one sector says about the moment.
func (j *cutJudge) sector(s int64, got []byte) error {
	h := j.h
	h.stats.Checked++
	p := h.cuts.sectors[s]
	if p == nil {
		p = &past{base: true}
	}
	var may []int
	for i := len(p.writes) - 1; i >= -1; i-- {
		if i < 0 && !p.base {
			break
		}
		id, zero := uint64(0), zeroBase(h.seed, uint64(s))
		if i >= 0 {
			id, zero = p.writes[i].v.id, p.writes[i].v.zero
		}
		clear(j.want[:])
		if !zero {
			fill(j.want[:], h.seed, uint64(s), id)
		}
		if bytes.Equal(j.want[:], got) {
			may = append(may, i)
		}
	}
	switch {
	case len(may) == 0:
		w := &Wrong{Sector: s, Got: describe(got, h.seed, uint64(s)), Allowed: "any version"}
		if n := len(p.writes); n > 0 {
			w.Allowed = fmt.Sprintf("versions %d to %d", p.writes[0].v.id, p.writes[n-1].v.id)
		}
		return w
	case len(may) > 1:
		j.open = append(j.open, openSector{s, may})
		return nil
	}
	if len(p.writes) == 0 {
		return nil
	}
	return j.holds(s, p, may[0])
}

// holds notes that sector s holds the write with index k, and so each one
// before it, and none after it.
func (j *cutJudge) holds(s int64, p *past, k int) error {
	j.found[s] = k
	for i, w := range p.writes {
		mark := s + 1
		if i > k {
			mark = -mark
		}
		// One that nobody answered may have been torn by a crash.
		if old := j.side[w]; w.ended != 0 && old != 0 && (old > 0) != (mark > 0) {
			in, out := max(old, mark)-1, -min(old, mark)-1
			return &Wrong{Sector: out, Got: fmt.Sprintf("what was before version %d, of which sector %d has come", w.v.id, in),
				Allowed: "all of a write or nothing of it"}
		}
		j.side[w] = mark
		if i <= k && w.begun > j.lo {
			j.lo, j.last = w.begun, w
		}
		if i > k && w.ended != 0 && w.ended < j.hi {
			j.hi, j.next = w.ended, w
		}
	}
	return nil
}

func (j *cutJudge) verdict() (Cut, error) {
	if j.lo >= j.hi {
		got := "what an earlier copy had gone past"
		if j.last != nil {
			got = fmt.Sprintf("no version %d, which was acknowledged before version %d began, and that is there (sector %d)",
				j.next.v.id, j.last.v.id, j.last.off/Sector)
		}
		return Cut{}, &Wrong{Sector: j.next.off / Sector, Got: got, Allowed: "one moment of the history"}
	}
	// A sector whose bytes fit several versions must fit the moment with one of them.
	for _, o := range j.open {
		p, fits := j.h.cuts.sectors[o.s], false
		if p == nil {
			continue
		}
		for _, k := range o.may {
			ok := true
			for i, w := range p.writes {
				if i <= k {
					ok = ok && w.begun < j.hi && j.side[w] >= 0
				} else {
					ok = ok && (w.ended == 0 || w.ended > j.lo) && j.side[w] <= 0
				}
			}
			fits = fits || ok
		}
		if !fits {
			return Cut{}, &Wrong{Sector: o.s, Got: "bytes of another moment than the rest of the copy", Allowed: "one moment of the history"}
		}
	}
	c := Cut{After: j.lo, Before: j.hi}
	if j.last != nil {
		c.Newest = j.last.from
	}
	j.h.cuts.floor = max(j.h.cuts.floor, j.lo)
	missing := map[*cutWrite]struct{}{}
	for s, k := range j.found {
		p := j.h.cuts.sectors[s]
		gone := false
		for _, w := range p.writes[k+1:] {
			if w.ended == 0 {
				continue
			}
			missing[w] = struct{}{}
			gone = true
			if c.Oldest.IsZero() || w.at.Before(c.Oldest) {
				c.Oldest = w.at
			}
		}
		if gone {
			c.MissingBytes += Sector
		}
		// A copy never goes back.
		if k >= 0 {
			p.writes, p.base = append([]*cutWrite(nil), p.writes[k:]...), false
		}
	}
	c.Missing = int64(len(missing))
	for w := range missing {
		if !w.v.zero {
			c.Written += w.n
		}
	}
	return c, nil
}
