package oracle

import (
	"bytes"
	"fmt"
	"slices"
	"sync"
)

// version is one write to one sector, or to many: sectors share it.
type version struct {
	id    uint64 // in the order of issue; 0 is the untouched disk
	zero  bool   // wrote zeros
	acked uint64 // position in the order of acknowledgements, 0 for none
	fua   bool
	// lost: a crash, or the end of its connection, left open whether it happened.
	lost bool
}

// History is what was written to one disk. Its methods may be called from
// many goroutines.
type History struct {
	seed uint64
	size int64

	mu       sync.Mutex
	sectors  map[int64][]*version // oldest first; the untouched disk is implied when absent
	busy     map[int64]struct{}   // sectors with a write or read under way
	next     uint64               // version
	acks     uint64
	flushed  uint64 // all acknowledged up to here are durable
	inFlight map[*Op]struct{}
	stats    Stats
	cuts     *cutLog // nil unless TrackCuts was called
}

// Stats counts what a history saw.
type Stats struct {
	Writes, Acked, Flushes, Crashes int64
	Checked                         int64 // sectors judged
	Rewound                         int64 // sectors that lost an acknowledged, not flushed write in a crash
}

// New is the history of a disk that WriteBase made.
func New(seed uint64, size int64) *History {
	return &History{seed: seed, size: size, sectors: map[int64][]*version{}, busy: map[int64]struct{}{}, inFlight: map[*Op]struct{}{}}
}

// Stats returns the counters.
func (h *History) Stats() Stats {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.stats
}

// Op is a request under way.
type Op struct {
	h       *History
	off, n  int64
	v       *version // nil for a read
	cut     *cutWrite
	flushTo uint64
	flush   bool
}

// reserve takes the sectors of a range, all or none.
func (h *History) reserve(off, n int64) bool {
	for s := off / Sector; s < (off+n)/Sector; s++ {
		if _, ok := h.busy[s]; ok {
			return false
		}
	}
	for s := off / Sector; s < (off+n)/Sector; s++ {
		h.busy[s] = struct{}{}
	}
	return true
}

// BeginWrite notes that a write is about to be issued, and fills p with what
// it must write; p nil means a request that writes n zeros. It answers nil
// when a request to one of the sectors is under way.
func (h *History) BeginWrite(off, n int64, p []byte, fua bool) *Op {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.reserve(off, n) {
		return nil
	}
	h.next++
	h.stats.Writes++
	v := &version{id: h.next, zero: p == nil, fua: fua}
	op := &Op{h: h, off: off, n: n, v: v}
	h.inFlight[op] = struct{}{}
	if h.cuts != nil {
		op.cut = h.cuts.begin(v, off, n)
	}
	for s := off / Sector; s < (off+n)/Sector; s++ {
		vs, ok := h.sectors[s]
		if !ok {
			vs = []*version{{zero: zeroBase(h.seed, uint64(s)), acked: 1, fua: true}}
		}
		// Older than the newest durable one never comes back.
		for i := len(vs) - 1; i > 0; i-- {
			if h.durable(vs[i]) {
				vs = slices.Delete(vs, 0, i)
				break
			}
		}
		h.sectors[s] = append(vs, v)
		if p != nil {
			fill(p[s*Sector-off:][:Sector], h.seed, uint64(s), v.id)
		}
	}
	return op
}

// BeginRead reserves the range for a read that is to be judged exactly. It
// answers nil when a request to one of the sectors is under way.
func (h *History) BeginRead(off, n int64) *Op {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.reserve(off, n) {
		return nil
	}
	op := &Op{h: h, off: off, n: n}
	h.inFlight[op] = struct{}{}
	return op
}

// BeginFlush notes that a flush is about to be issued.
func (h *History) BeginFlush() *Op {
	h.mu.Lock()
	defer h.mu.Unlock()
	op := &Op{h: h, flush: true, flushTo: h.acks}
	h.inFlight[op] = struct{}{}
	return op
}

// Done notes that the request was acknowledged.
func (op *Op) Done() {
	h := op.h
	h.mu.Lock()
	defer h.mu.Unlock()
	if !op.end() {
		return
	}
	switch {
	case op.flush:
		h.flushed = max(h.flushed, op.flushTo)
		h.stats.Flushes++
	case op.v != nil:
		h.acks++
		op.v.acked = h.acks + 1 // 1 is the untouched disk's
		h.stats.Acked++
		if op.cut != nil {
			h.cuts.end(op.cut)
		}
	}
}

// Failed notes that the request got an error or no answer: it may have
// happened or not.
func (op *Op) Failed() {
	op.h.mu.Lock()
	defer op.h.mu.Unlock()
	if op.end() && op.v != nil {
		op.v.lost = true
	}
}

func (op *Op) end() bool {
	if _, ok := op.h.inFlight[op]; !ok {
		return false
	}
	delete(op.h.inFlight, op)
	for s := op.off / Sector; s < (op.off+op.n)/Sector; s++ {
		delete(op.h.busy, s)
	}
	return true
}

func (h *History) durable(v *version) bool {
	return v.acked > 0 && (v.fua || v.acked <= h.flushed+1)
}

// Crash notes that the process below has died: what is not durable may be
// gone. Requests under way must have been ended by Done or Failed before.
func (h *History) Crash() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stats.Crashes++
	for _, vs := range h.sectors {
		for _, v := range vs {
			if !h.durable(v) {
				v.lost = true
			}
		}
	}
}

// Wrong is a sector that holds what it must not.
type Wrong struct {
	Sector  int64
	Got     string
	Allowed string
}

// Error says where, what is there and what might be.
func (w *Wrong) Error() string {
	return fmt.Sprintf("sector %d (byte %d) holds %s; allowed are %s", w.Sector, w.Sector*Sector, w.Got, w.Allowed)
}

// Check judges what was read at off. Writes under way to the range make it
// lenient; use BeginRead to keep them away. A wrong sector is a *Wrong.
func (h *History) Check(off int64, p []byte) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	want := make([]byte, Sector)
	zeros := make([]byte, Sector)
	for at := int64(0); at < int64(len(p)); at += Sector {
		s := (off + at) / Sector
		got := p[at : at+Sector]
		h.stats.Checked++
		vs := h.sectors[s]
		if vs == nil {
			if zeroBase(h.seed, uint64(s)) {
				if bytes.Equal(got, zeros) {
					continue
				}
			} else if fill(want, h.seed, uint64(s), 0); bytes.Equal(got, want) {
				continue
			}
			return h.wrong(s, got, []*version{{zero: zeroBase(h.seed, uint64(s))}})
		}
		// The newest that surely happened, and everything after it.
		first := len(vs) - 1
		for first > 0 && (vs[first].lost || vs[first].acked == 0) {
			first--
		}
		seen := -1
		for i := len(vs) - 1; i >= first && seen < 0; i-- {
			if vs[i].zero {
				if bytes.Equal(got, zeros) {
					seen = i
				}
			} else if fill(want, h.seed, uint64(s), vs[i].id); bytes.Equal(got, want) {
				seen = i
			}
		}
		if seen < 0 {
			return h.wrong(s, got, vs[first:])
		}
		// What was skipped is gone; what was seen stays until the next crash.
		// A write still under way may yet happen.
		rest := vs[: seen+1 : seen+1]
		rewound := false
		for _, v := range vs[seen+1:] {
			if v.acked == 0 && !v.lost {
				rest = append(rest, v)
			}
			rewound = rewound || v.acked > 0
		}
		if rewound {
			h.stats.Rewound++
		}
		if seen > 0 && len(rest) == seen+1 && vs[seen].lost {
			// Shared with other sectors, so a copy: here it is known to have happened.
			v := *vs[seen]
			v.lost = false
			if v.acked == 0 {
				h.acks++
				v.acked = h.acks + 1
			}
			rest[seen] = &v
		}
		h.sectors[s] = rest
	}
	return nil
}

func (h *History) wrong(s int64, got []byte, allowed []*version) error {
	w := &Wrong{Sector: s, Got: describe(got, h.seed, uint64(s))}
	for i, v := range allowed {
		if i > 0 {
			w.Allowed += ", "
		}
		w.Allowed += fmt.Sprintf("version %d", v.id)
		if v.zero {
			w.Allowed += " (zeros)"
		}
	}
	return w
}
