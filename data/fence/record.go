package fence

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"forerun/block"
)

// The times of the lease argument: see the package comment.
const (
	// LeaseTime is how long a primary may answer reads after it sent a renewal
	// that was answered.
	LeaseTime = time.Second
	// Grace is how long the arbiter and a member peer wait after they answered
	// the primary before another one may serve. What it has more than LeaseTime
	// is for clocks that run at different rates.
	Grace = 1500 * time.Millisecond
)

const (
	maxName    = 255 // bytes of a volume's or node's name
	maxMembers = 8
)

// Cause is how the primary came to be one. The words stand in files.
type Cause string

// The causes.
const (
	CauseClaim    Cause = "claim"    // it was the first
	CauseTakeover Cause = "takeover" // the one before was not heard of
	CauseForce    Cause = "force"    // the same, by an operator's word and without being a member
	CauseHandover Cause = "handover" // the one before gave it away
)

// Record says who may write a volume.
type Record struct {
	Volume string
	// Epoch grows with each change of the primary and never begins anew, not
	// even when the volume is dropped and claimed again.
	Epoch uint64
	// Version grows with each change of anything. Nobody's request takes effect
	// on another version than the one it was made for.
	Version   uint64
	Primary   string
	Members   []string // in sync, sorted, the primary among them
	Preferred string   // where the volume should be when all is well
	Cause     Cause
}

// Member says whether a node is in sync.
func (r Record) Member(node string) bool { return slices.Contains(r.Members, node) }

// Alone says whether node is primary and nobody else may take over: then it
// needs no lease, and nobody else's word for a write.
func (r Record) Alone(node string) bool { return r.Primary == node && len(r.Members) == 1 }

// dropped is what is left when nobody holds the volume any more: an epoch of
// its own, so that who held it last is fenced too.
func (r Record) dropped() Record {
	return Record{Volume: r.Volume, Epoch: r.Epoch + 1, Version: r.Version + 1}
}

// Newer says whether r came after q.
func (r Record) Newer(q Record) bool {
	return r.Epoch > q.Epoch || r.Epoch == q.Epoch && r.Version > q.Version
}

func (r Record) equal(q Record) bool {
	return r.Volume == q.Volume && r.Epoch == q.Epoch && r.Version == q.Version && r.Primary == q.Primary &&
		slices.Equal(r.Members, q.Members) && r.Preferred == q.Preferred && r.Cause == q.Cause
}

func (r Record) clone() Record {
	r.Members = slices.Clone(r.Members)
	return r
}

// String is for logs.
func (r Record) String() string {
	if r.Primary == "" {
		return fmt.Sprintf("%s: nobody's after epoch %d", r.Volume, r.Epoch)
	}
	return fmt.Sprintf("%s: epoch %d.%d primary %s of %s (%s)", r.Volume, r.Epoch, r.Version, r.Primary, strings.Join(r.Members, ","), r.Cause)
}

// check says what is wrong with a record that came from outside. One without a
// primary is what a drop leaves.
func (r Record) check() error {
	bad := func(format string, args ...any) error {
		return &block.Error{Op: "fence.record", Object: r.Volume, Kind: block.KindCorrupt, Err: fmt.Errorf(format, args...)}
	}
	if !nameOK(r.Volume) || r.Epoch == 0 || r.Version == 0 {
		return bad("a record of volume %q with epoch %d, version %d", r.Volume, r.Epoch, r.Version)
	}
	if r.Primary == "" {
		if len(r.Members) > 0 || r.Preferred != "" || r.Cause != "" {
			return bad("a dropped volume with members %q, preferred %q", r.Members, r.Preferred)
		}
		return nil
	}
	if !nameOK(r.Primary) || !nameOK(r.Preferred) || !r.Member(r.Primary) || !membersOK(r.Members) {
		return bad("primary %q, members %q, preferred %q", r.Primary, r.Members, r.Preferred)
	}
	switch r.Cause {
	case CauseClaim, CauseTakeover, CauseForce, CauseHandover:
		return nil
	}
	return bad("cause %q is not known here", r.Cause)
}

func nameOK(s string) bool { return s != "" && len(s) <= maxName }

// membersOK wants them sorted and each once.
func membersOK(m []string) bool {
	if len(m) == 0 || len(m) > maxMembers {
		return false
	}
	for i, s := range m {
		if !nameOK(s) || i > 0 && m[i-1] >= s {
			return false
		}
	}
	return true
}
