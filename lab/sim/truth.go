package sim

import (
	"slices"
	"time"

	"forerun/data/fence"
)

// truth is what a run knows about who has what, beside what the nodes believe.
// It tells when an acknowledged write may be lost: when the last copy that had
// everything is gone.
type truth struct {
	h    *History
	log  *Log
	vols []*standing
	// away says since when node cannot be reached by anybody who needs it, zero
	// when it can.
	away func(node int) time.Time
}

// standing is that of one volume.
type standing struct {
	rec     fence.Record
	whole   [2]bool // this node has everything that was acknowledged
	killed  [2]bool // its process ended since it was last in sync
	life    [2]int  // power cuts
	settled [2]int  // life of the other node when this one had it brought up to date
	once    [2]bool // that was done
}

// giveUp is how long a node that lost power must have waited for the other
// before it may go on with what it has.
const giveUp = 4 * time.Second

func nodeOf(name string) int { return slices.Index(machineNames[:2], name) }

// granted notes the newest record of a volume, before anybody is told of it.
func (t *truth) granted(vol int, rec fence.Record) {
	s := t.vols[vol]
	if !rec.Newer(s.rec) {
		return
	}
	old := s.rec
	s.rec = rec
	if rec.Epoch > old.Epoch {
		t.h.Granted(vol, int64(rec.Epoch))
	}
	t.log.Add("arbiter: %s", rec)
	if old.Epoch == 0 {
		s.whole[nodeOf(rec.Primary)] = true
		return
	}
	had := s.whole
	for n := range s.whole {
		if !rec.Member(machineNames[n]) {
			s.whole[n] = false
		}
	}
	p := nodeOf(rec.Primary)
	if s.whole[0] || s.whole[1] {
		// The primary has everything, and so has whom it says has.
		if o := 1 - p; s.whole[p] && rec.Member(machineNames[o]) && rec.Epoch == old.Epoch && s.once[p] && s.settled[p] == s.life[o] && rec.Version > old.Version {
			s.whole[o], s.killed[o] = true, false
		}
		return
	}
	for n := range had {
		if !had[n] || s.killed[n] {
			continue
		}
		if since := t.away(n); since.IsZero() || time.Since(since) < giveUp {
			t.h.Fail("volume %d: %s goes on without %s, which has writes that it lacks and could be reached (%s)", vol, rec.Primary, machineNames[n], rec)
			return
		}
	}
	t.log.Add("%s goes on without what is lost", rec.Primary)
	t.lose(vol, s)
}

// lose: what the members have now is all there is.
func (t *truth) lose(vol int, s *standing) {
	t.h.Lose(vol)
	for n := range s.whole {
		s.whole[n] = s.rec.Member(machineNames[n])
	}
}

// down notes that a process ended, and with it, when power is set, what the
// node had not synced. A node that was only killed still has all, but together
// with the loss of the other one it counts as lost: it need not know that it has.
func (t *truth) down(node int, power bool) {
	for vol, s := range t.vols {
		s.killed[node] = true
		if !power {
			continue
		}
		s.life[node]++
		if !s.whole[node] {
			continue
		}
		s.whole[node] = false
		if o := 1 - node; !s.whole[o] || s.killed[o] {
			t.log.Add("volume %d: the last copy that had everything is gone", vol)
			t.lose(vol, s)
		}
	}
}
