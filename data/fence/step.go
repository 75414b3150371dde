package fence

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"forerun/block"
)

// op is a type of request. The numbers are those on the wire.
type op uint8

const (
	opGet        op = 1
	opClaim      op = 2
	opRenew      op = 3
	opSetMembers op = 4
	opTakeover   op = 5
	opHandover   op = 6
	opDrop       op = 7
)

var opNames = [...]string{1: "get", 2: "claim", 3: "renew", 4: "set-members", 5: "takeover", 6: "handover", 7: "drop"}

func (o op) String() string {
	if int(o) < len(opNames) && opNames[o] != "" {
		return opNames[o]
	}
	return fmt.Sprintf("op %d", uint8(o))
}

// request is what a node asks for.
type request struct {
	op      op
	volume  string
	node    string   // who asks
	epoch   uint64   // the one it acts in
	version uint64   // the one it decided on; of set-members, takeover and handover
	flag    bool     // takeover: force. handover: to is preferred from now on
	members []string // of set-members; handover: the one it goes to
}

// state is what the arbiter knows of a volume. The record of one that was
// never claimed has epoch 0, of one that was dropped no primary.
type state struct {
	rec     Record
	renewed time.Time // when the primary was heard of last, or could have been
}

// answer is what the arbiter decided. The record goes with it in any case.
type answer struct {
	kind block.Kind
	text string
	wait time.Duration // with KindBusy: after that it may be granted
}

// step is the arbiter: it decides a request at a moment. The record it returns
// has to be durable before the answer is given, if it is another one. Requests
// that come twice, because an answer was lost, are answered as the first time.
func step(s state, q request, now time.Time) (state, answer) {
	r := s.rec
	refuse := func(k block.Kind, format string, args ...any) (state, answer) {
		return s, answer{kind: k, text: fmt.Sprintf(format, args...)}
	}
	grant := func(n Record) (state, answer) {
		n.Version++
		return state{n, now}, answer{}
	}
	if q.op == opClaim {
		if r.Primary == "" {
			if q.version != r.Version { // a request from before the drop
				return refuse(block.KindBusy, "nobody holds the volume at version %d, the request was made for %d; look again", r.Version, q.version)
			}
			return grant(Record{Volume: q.volume, Epoch: r.Epoch + 1, Version: r.Version, Primary: q.node, Members: []string{q.node},
				Preferred: q.node, Cause: CauseClaim})
		}
		// A new version: what the node asked for earlier and is still on its way,
		// perhaps from a process that has ended, will not take effect any more.
		n := r.clone()
		n.Version++
		s.rec = n
		return s, answer{}
	}
	if r.Primary == "" {
		if q.op == opDrop {
			return s, answer{}
		}
		return refuse(block.KindNotFound, "nobody has claimed the volume")
	}
	switch q.op {
	case opGet:
		return s, answer{}
	case opTakeover, opHandover:
		to := q.node
		if q.op == opHandover {
			to = q.members[0]
		}
		if r.Epoch == q.epoch+1 && r.Primary == to && q.epoch > 0 { // again
			if q.op == opTakeover {
				s.renewed = now
			}
			return s, answer{}
		}
	case opSetMembers:
		if r.Epoch == q.epoch && r.Primary == q.node && r.Version == q.version+1 && slices.Equal(r.Members, q.members) {
			return s, answer{} // again
		}
	}
	if r.Epoch != q.epoch {
		return refuse(block.KindFenced, "%s acts in epoch %d, but in epoch %d the primary is %s", q.node, q.epoch, r.Epoch, r.Primary)
	}
	if q.op != opTakeover && r.Primary != q.node {
		return refuse(block.KindFenced, "%s is not the primary in epoch %d, %s is", q.node, r.Epoch, r.Primary)
	}
	switch q.op {
	case opRenew:
		s.renewed = now
		return s, answer{}
	case opTakeover:
		if r.Primary == q.node {
			s.renewed = now
			return s, answer{}
		}
		if !r.Member(q.node) && !q.flag {
			return refuse(block.KindDenied, "%s is not in sync, it may lack writes that %s has acknowledged (in sync: %s); bring %s back, or, "+
				"when it is gone for good, force the takeover and lose them", q.node, r.Primary, strings.Join(r.Members, ", "), r.Primary)
		}
		if left := Grace - now.Sub(s.renewed); left > 0 {
			st, a := refuse(block.KindBusy, "the primary %s was heard of %d ms ago; ask again in %d ms", r.Primary,
				now.Sub(s.renewed).Milliseconds(), left.Milliseconds()+1)
			a.wait = left
			return st, a
		}
	}
	if r.Version != q.version {
		return refuse(block.KindBusy, "the record is at version %d, the request was made for %d; look again", r.Version, q.version)
	}
	n := r.clone()
	switch q.op {
	case opDrop:
		s.rec = r.dropped()
		return s, answer{}
	case opSetMembers:
		n.Members = q.members
		st, a := grant(n)
		st.renewed = s.renewed
		return st, a
	case opTakeover:
		n.Epoch++
		n.Primary, n.Members, n.Cause = q.node, []string{q.node}, CauseTakeover
		if !r.Member(q.node) {
			n.Cause = CauseForce
		}
		return grant(n)
	case opHandover:
		to := q.members[0]
		if to == q.node {
			return s, answer{}
		}
		if !r.Member(to) {
			return refuse(block.KindDenied, "%s is not in sync yet (in sync: %s); wait for it, or choose another one", to, strings.Join(r.Members, ", "))
		}
		n.Epoch++
		n.Primary, n.Cause = to, CauseHandover
		if q.flag {
			n.Preferred = to
		}
		return grant(n)
	}
	return refuse(block.KindUnsupported, "request %d is not known here", q.op)
}

// String is for logs.
func (q request) String() string {
	s := fmt.Sprintf("%s by %s in epoch %d", q.op, q.node, q.epoch)
	if len(q.members) > 0 {
		s += " (" + strings.Join(q.members, ", ") + ")"
	}
	return s
}
