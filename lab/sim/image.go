package sim

import "fmt"

// Image judges the content of all volumes of the group, as one state: it must
// be a cut of the history. Everything acknowledged before a write began that
// is in it must be in it too, and each write is in it whole. So must be what
// was acknowledged before the moment after; nothing begun behind the moment
// before may be. (0 and never ask for neither.)
func (h *History) Image(images [][]byte, after, before int64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tick()
	h.stats.Images++
	type place struct {
		w    *write
		zero bool
		torn bool // by a loss: nothing is known of it
	}
	reach := after
	got := make([][]place, len(images))
	in := map[*write]bool{}
	for vol, p := range images {
		got[vol] = make([]place, len(p)/Sector)
		for s := range got[vol] {
			id, zero, err := unstamp(p[s*Sector:][:Sector], vol, int64(s))
			switch {
			case err != nil && h.vols[vol].sectors[s].mayTear:
				got[vol][s] = place{torn: true}
				continue
			case err != nil:
				return fmt.Errorf("volume %d sector %d of the image holds %w", vol, s, err)
			case zero || id == 0:
				got[vol][s] = place{zero: zero}
				continue
			case id > len(h.writes):
				return fmt.Errorf("volume %d sector %d of the image holds write %d, which was never begun", vol, s, id)
			}
			w := h.writes[id-1]
			if w.begin > before {
				return fmt.Errorf("volume %d sector %d of the image holds %s, which began after the cut at %d", vol, s, w, before)
			}
			got[vol][s] = place{w: w}
			in[w] = true
			reach = max(reach, w.begin)
		}
	}
	// behind says that w must be in the image at this place, which holds
	// something that is surely older.
	behind := func(p place, w *write) bool {
		switch {
		case w.lost, p.torn:
			return false
		case p.w == w || p.zero && w.zero:
			return false
		case p.w != nil:
			return p.w.end < w.begin
		case p.zero:
			return !h.zeroBehind(w)
		}
		return true // the untouched disk
	}
	for _, w := range h.writes {
		must := w.end < reach
		if !must && !in[w] {
			continue
		}
		for s := w.from; s < w.to; s++ {
			if p := got[w.vol][s]; behind(p, w) {
				old := "the untouched disk"
				if p.zero {
					old = "zeros"
				} else if p.w != nil {
					old = p.w.String()
				}
				if in[w] {
					return fmt.Errorf("volume %d sector %d of the image holds %s, though other sectors hold %s: it is in it in part", w.vol, s, old, w)
				}
				return fmt.Errorf("volume %d sector %d of the image holds %s, though it must hold %s, acknowledged before %d", w.vol, s, old, w, reach)
			}
		}
	}
	return nil
}

// zeroBehind says whether a write of zeros may have come behind w at one of
// its sectors; as all zeros are alike, any one excuses.
func (h *History) zeroBehind(w *write) bool {
	for _, z := range h.writes {
		if z.zero && z.vol == w.vol && z.from < w.to && w.from < z.to && z.end > w.begin {
			return true
		}
	}
	return false
}
