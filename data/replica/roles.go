package replica

import (
	"time"

	"forerun/data/fence"
)

// role is what a node is for one volume.
type role uint8

const (
	undecided role = iota // the arbiter has not been asked yet
	secondary
	primary
)

// String is the role as status shows it.
func (r role) String() string { return [...]string{"undecided", "secondary", "primary"}[r] }

// knowledge is all that decide needs.
type knowledge struct {
	me   string
	role role
	rec  fence.Record // the newest known
	// whole: what is here holds every write that was acknowledged while this
	// node was a member. It is false after a power cut until the node has been
	// in sync again; a node that is not whole does not take over by itself.
	whole bool
	// heard is when the primary was last answered: until heard+fence.Grace this
	// node has given its word not to serve. Before the first time it is the
	// start of the process, which may have given its word just before it died.
	heard time.Time
}

// event is what a node learns.
type event struct {
	kind eventKind
	rec  fence.Record // learned, beat
	from string       // beat
}

type eventKind uint8

const (
	tick    eventKind = iota // time has passed
	learned                  // a record, from the arbiter or from the other node
	beat                     // the primary was heard
)

// action is what it does about it.
type action uint8

const (
	nothing  action = iota
	follow          // become secondary: it was primary and is deposed, or was undecided
	rise            // become primary of rec's epoch
	takeOver        // ask the arbiter for it
	look            // ask the arbiter for the record
)

// decide is the whole protocol of roles, without clocks, locks or network.
func decide(k knowledge, e event, now time.Time) (knowledge, action) {
	switch e.kind {
	case learned, beat:
		if e.rec.Epoch == 0 {
			return k, nothing
		}
		deposed := e.rec.Epoch > k.rec.Epoch
		if e.rec.Newer(k.rec) {
			k.rec = e.rec
		}
		if e.kind == beat && e.rec.Epoch == k.rec.Epoch && e.from == k.rec.Primary && e.from != k.me {
			k.heard = now
		}
		switch {
		case k.rec.Primary == k.me && (k.role != primary || deposed):
			// Risen or not, an office of an older epoch is over.
			if k.role == primary {
				k.role = secondary
				return k, follow
			}
			return k, rise
		case k.rec.Primary != k.me && k.role != secondary:
			if k.role == primary {
				k.heard = now // the other one is given its time to be heard
			}
			k.role = secondary
			return k, follow
		}
	case tick:
		silent := now.Sub(k.heard)
		switch {
		case k.role == primary || k.rec.Epoch == 0:
		case k.rec.Primary == k.me:
			return k, rise
		case silent < askAfter:
		case k.whole && k.rec.Member(k.me):
			return k, takeOver
		default:
			return k, look
		}
	}
	return k, nothing
}
