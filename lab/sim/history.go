package sim

import (
	"fmt"
	"math"
	"sort"
	"sync"
	"time"
)

const never = math.MaxInt64

// History is what the clients of a group of volumes did and saw, on one scale
// of moments. It judges reads, acknowledgements and images; see the package
// comment for the rules. The first violation stays.
type History struct {
	mu     sync.Mutex
	now    int64       // moments: one for each thing that happened
	times  []time.Time // of the moments
	size   int64
	vols   []*record
	writes []*write // by id - 1
	err    error
	stats  HistoryStats
}

// HistoryStats counts what a history saw.
type HistoryStats struct {
	Writes, Acked, Reads, Flushes, Losses, Images int64
	Sectors                                       int64 // judged
}

// record is the history of one volume.
type record struct {
	sectors []cell
	flushed int64   // writes acknowledged before this moment are durable
	grants  []grant // in order
	oneDisk bool    // a write that one node synced is not durable for that
}

// grant is an epoch: when it was granted, known to who has it, and answered in.
type grant struct{ epoch, at, took, served int64 }

// write is one write of a client, whatever it took to get it acknowledged.
type write struct {
	id         int
	vol        int
	from, to   int64 // sectors
	zero       bool
	fua        bool
	synced     bool  // promised to be durable for another reason
	begin, end int64 // end is never until it is acknowledged
	lost       bool  // not durable in a loss: it may be gone
}

// version is a write as one sector sees it, with the reads that saw it there.
type version struct {
	w         *write
	firstRead int64 // end of the read that ended first
	lastRead  int64 // beginning of the read that began last
}

// cell is the history of one sector since the last loss.
type cell struct {
	versions []*version
	since    int64    // moment of the last loss
	old      []*write // what the loss may have left; the first read of one decides
	seen     *version // that one
	torn     string   // what the loss left when it was none of old whole
	mayTear  bool     // a write to it was not durable in a loss
}

// zone is what the sector's register says about one value: with first < last it
// surely had the value between the two, else it had it at some moment between.
func (v *version) zone() (first, last int64) {
	return min(v.w.end, v.firstRead), max(v.w.begin, v.lastRead)
}

// NewHistory is the history of n untouched volumes of size bytes.
func NewHistory(n int, size int64) *History {
	h := &History{size: size}
	for i := range n {
		r := &record{sectors: make([]cell, size/Sector)}
		base := &write{vol: i, to: size / Sector, fua: true}
		for s := range r.sectors {
			r.sectors[s].versions = []*version{{w: base, firstRead: never}}
		}
		h.vols = append(h.vols, r)
	}
	return h
}

// Err is the first violation.
func (h *History) Err() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.err
}

// Fail notes a violation that something else found.
func (h *History) Fail(format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fail(format, args...)
}

func (h *History) fail(format string, args ...any) {
	if h.err == nil {
		h.err = fmt.Errorf(format, args...)
	}
}

// Stats returns the counters.
func (h *History) Stats() HistoryStats {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.stats
}

func (h *History) tick() {
	h.now++
	h.times = append(h.times, time.Now())
}

// Around gives the last moment that is surely before a time, and the first one
// that is surely behind it.
func (h *History) Around(t time.Time) (before, behind int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := sort.Search(len(h.times), func(i int) bool { return !h.times[i].Before(t) })
	j := sort.Search(len(h.times), func(i int) bool { return h.times[i].After(t) })
	return int64(i), int64(j) + 1
}

// Now is the present moment; everything noted later is behind it.
func (h *History) Now() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tick()
	return h.now
}

// BeginWrite notes a write that is about to be tried for the first time; p is
// filled with what it must write, nil for zeros. With alone set it answers nil
// when another write to one of the sectors is under way.
func (h *History) BeginWrite(vol int, off, n int64, p []byte, fua, alone bool) *write {
	h.mu.Lock()
	defer h.mu.Unlock()
	for s := off / Sector; alone && s < (off+n)/Sector; s++ {
		for _, v := range h.vols[vol].sectors[s].versions {
			if v.w.end == never {
				return nil
			}
		}
	}
	h.tick()
	h.stats.Writes++
	w := &write{id: len(h.writes) + 1, vol: vol, from: off / Sector, to: (off + n) / Sector,
		zero: p == nil, fua: fua, begin: h.now, end: never}
	h.writes = append(h.writes, w)
	for s := w.from; s < w.to; s++ {
		c := &h.vols[vol].sectors[s]
		c.versions = append(c.versions, &version{w: w, firstRead: never})
		if p != nil {
			stamp(p[s*Sector-off:][:Sector], vol, s, w.id)
		}
	}
	return w
}

// EndWrite notes that it was acknowledged; synced: with the promise that it is
// durable.
func (h *History) EndWrite(w *write, synced bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tick()
	h.stats.Acked++
	w.end, w.synced = h.now, synced
	for s := w.from; s < w.to; s++ {
		c := &h.vols[w.vol].sectors[s]
		for _, v := range c.versions {
			if v.w == w {
				h.conflict(w.vol, s, c, v)
			}
		}
	}
}

// EndFlush notes that a flush was acknowledged whose successful try began at
// that moment.
func (h *History) EndFlush(vol int, begin int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tick()
	h.stats.Flushes++
	h.vols[vol].flushed = max(h.vols[vol].flushed, begin)
}

// EndRead judges what a read gave that began at that moment.
func (h *History) EndRead(vol int, off int64, p []byte, begin int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tick()
	h.stats.Reads++
	for at := int64(0); at < int64(len(p)); at += Sector {
		h.read(vol, (off+at)/Sector, p[at:][:Sector], begin)
	}
}

func (h *History) read(vol int, s int64, p []byte, begin int64) {
	h.stats.Sectors++
	c := &h.vols[vol].sectors[s]
	id, zero, err := unstamp(p, vol, s)
	if err != nil && c.leftTorn(p, begin) {
		return
	}
	if err != nil {
		h.fail("volume %d sector %d: a read at %d gave %v", vol, s, begin, err)
		return
	}
	if zero {
		h.readZero(vol, s, c, begin)
		return
	}
	see := func(v *version) {
		v.firstRead = min(v.firstRead, h.now)
		v.lastRead = max(v.lastRead, begin)
		h.conflict(vol, s, c, v)
	}
	if c.seen != nil && c.seen.w.id == id {
		see(c.seen)
		return
	}
	for _, v := range c.versions {
		if v.w.id == id {
			see(v)
			return
		}
	}
	for _, w := range c.old {
		if w.id == id {
			if c.seen != nil {
				h.fail("volume %d sector %d: a read at %d gave %s, though %s was there after the loss at %d",
					vol, s, begin, w, c.seen.w, c.since)
				return
			}
			// From the moment of the loss on this was the content.
			c.seen = &version{w: &write{id: w.id, vol: vol, from: w.from, to: w.to, begin: c.since, end: c.since}, firstRead: never}
			c.versions = append(c.versions, c.seen)
			see(c.seen)
			return
		}
	}
	h.fail("volume %d sector %d: a read at %d gave write %d, which was gone for good since the loss at %d", vol, s, begin, id, c.since)
}

// leftTorn says whether a loss may have left bytes that are no write whole: a
// disk that loses power tears the sector it writes. They stay the same until
// somebody overwrites them.
func (c *cell) leftTorn(p []byte, begin int64) bool {
	if len(c.old) < 2 || c.seen != nil || c.torn != "" && c.torn != string(p) || c.superseded(&write{begin: c.since, end: c.since}, begin) {
		return false
	}
	c.torn = string(p)
	return true
}

// readZero judges a read of zeros. All zeros are alike, so it only asks whether
// one of the writes of zeros might still have been there.
func (h *History) readZero(vol int, s int64, c *cell, begin int64) {
	for _, v := range c.versions {
		if v.w.zero && !c.superseded(v.w, begin) {
			return
		}
	}
	for _, w := range c.old {
		if w.zero && !c.superseded(&write{begin: c.since, end: c.since}, begin) {
			return
		}
	}
	h.fail("volume %d sector %d: a read at %d gave zeros, which nobody wrote or others have overwritten; %s", vol, s, begin, c)
}

// superseded says whether some other write surely came behind w, before that moment.
func (c *cell) superseded(w *write, by int64) bool {
	for _, v := range c.versions {
		if first, _ := v.zone(); v.w != w && w.end < v.w.begin && first < by {
			return true
		}
	}
	return false
}

// conflict says whether v's zone contradicts another's. The content of a
// sector is a register; with a value of its own for each write, a history is
// linearizable exactly when no two zones that are intervals of certainty
// overlap, and none of the others lies within one (Gibbons and Korach,
// "Testing Shared Memories", SIAM J. Comput. 1997). Writes that were under way
// at the same time are not held against each other: each may be carried out
// again until it is acknowledged, and so come in front and behind.
func (h *History) conflict(vol int, s int64, c *cell, v *version) {
	if v.w.zero {
		return
	}
	f, l := v.zone()
	if f == never {
		return
	}
	for _, o := range c.versions {
		if o == v || o.w.zero || v.w.begin < o.w.end && o.w.begin < v.w.end {
			continue
		}
		g, m := o.zone()
		if g == never {
			continue
		}
		if (f < l || g < m) && f < m && g < l {
			h.fail("volume %d sector %d: no order explains what was read: %s there at %d and at %d, %s at %d and at %d",
				vol, s, v.w, f, l, o.w, g, m)
			return
		}
	}
}

// String names the write for messages.
func (w *write) String() string {
	t := fmt.Sprintf("write %d", w.id)
	if w.zero {
		t += " (zeros)"
	}
	if w.id == 0 {
		return "the untouched disk"
	}
	if w.end == never {
		return fmt.Sprintf("%s (%d-)", t, w.begin)
	}
	return fmt.Sprintf("%s (%d-%d)", t, w.begin, w.end)
}

// String lists what is known of the sector.
func (c *cell) String() string {
	t := "known are"
	for _, v := range c.versions {
		t += " " + v.w.String()
	}
	if len(c.old) > 0 {
		t += fmt.Sprintf("; left by the loss at %d may be", c.since)
		for _, w := range c.old {
			t += " " + w.String()
		}
	}
	return t
}

func (r *record) durable(w *write) bool {
	return w.end < never && (w.fua || w.synced && !r.oneDisk || w.end < r.flushed)
}

// OneDisk notes that the node whose promise to have synced may be all there was
// is about to be gone with its disk: from now on only what was flushed counts.
func (h *History) OneDisk() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, r := range h.vols {
		r.oneDisk = true
	}
}

// Lose notes that every node that had all of the volume is gone: of each
// sector the newest durable write is left, or any behind it.
func (h *History) Lose(vol int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tick()
	h.stats.Losses++
	r := h.vols[vol]
	for s := range r.sectors {
		c := &r.sectors[s]
		var left []*write
		sure := false
		for _, v := range c.versions {
			if v == c.seen {
				continue
			}
			gone := false
			for _, o := range c.versions {
				gone = gone || o != v && o != c.seen && r.durable(o.w) && v.w.end < o.w.begin
			}
			sure = sure || r.durable(v.w)
			if !gone {
				left = append(left, v.w)
			}
			if !r.durable(v.w) {
				v.w.lost = true
			}
		}
		switch {
		case sure:
		case c.seen != nil:
			left = append(left, c.seen.w)
		default:
			left = append(left, c.old...)
		}
		old := c.versions
		*c = cell{since: h.now, old: left, mayTear: c.mayTear || len(left) > 1}
		for _, v := range old {
			if v.w.end == never { // its client goes on trying
				c.versions = append(c.versions, &version{w: v.w, firstRead: never})
			}
		}
	}
}

// Granted notes that the arbiter made epoch the newest of the volume.
func (h *History) Granted(vol int, epoch int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tick()
	r := h.vols[vol]
	if n := len(r.grants); n > 0 && r.grants[n-1].epoch >= epoch {
		if r.grants[n-1].epoch > epoch {
			h.fail("volume %d: epoch %d was granted after epoch %d", vol, epoch, r.grants[n-1].epoch)
		}
		return
	}
	r.grants = append(r.grants, grant{epoch, h.now, never, never})
}

// Took notes that the node which was granted an epoch knows of it. Until then
// nobody can act in it, and the node itself keeps its word to the one before.
func (h *History) Took(vol int, epoch int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i, g := range h.vols[vol].grants {
		if g.epoch == epoch && g.took == never {
			h.tick()
			h.vols[vol].grants[i].took = h.now
		}
	}
}

// Served judges the epoch in which a node answered something that began at
// that moment: it was granted, the next one was not in force before that
// moment, and nothing had been answered in a later one.
func (h *History) Served(vol int, node string, epoch, begin int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.vols[vol]
	known := false
	for i, g := range r.grants {
		switch {
		case g.epoch == epoch:
			known = true
			r.grants[i].served = min(g.served, h.now)
		case g.epoch < epoch:
		case g.took < begin, g.served < begin:
			h.fail("volume %d: node %s acknowledged at %d in epoch %d what began at %d, when epoch %d was in force since %d and answered since %d",
				vol, node, h.now, epoch, begin, g.epoch, g.took, g.served)
		}
	}
	if !known {
		h.fail("volume %d: node %s acknowledged at %d in epoch %d, which nobody granted", vol, node, h.now, epoch)
	}
}
