package replica

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"forerun/block"
	"forerun/data/fence"
	"forerun/data/journal"
	"forerun/internal/msg"
)

// Log is the local journal, as far as replication needs it. *journal.Journal is one.
type Log interface {
	// Position is that of the last record appended.
	Position() journal.Position
	// Hold keeps what follows pos, durably, under that name.
	Hold(name string, pos journal.Position) error
	// Held says whether there is a hold of that name.
	Held(name string) (journal.Position, bool)
	// Release ends a hold, durably.
	Release(name string) error
	// Changed visits the ranges of all records behind a hold; known is false
	// when the hold was given up or never taken.
	Changed(ctx context.Context, hold string, visit func(off, n int64)) (known bool, err error)
}

var _ Log = (*journal.Journal)(nil)

// Policy says what the primary does with writes while the other node is away.
type Policy uint8

// The policies.
const (
	// Degrade: the arbiter records that the other is out, then writes go on,
	// each synced before it is acknowledged.
	Degrade Policy = iota
	// Wait: writes wait until the other is back.
	Wait
)

// String is the policy as flags and status spell it.
func (p Policy) String() string {
	if p == Wait {
		return "wait"
	}
	return "degrade"
}

// ParsePolicy reads what String gives.
func ParsePolicy(s string) (Policy, error) {
	switch s {
	case "degrade":
		return Degrade, nil
	case "wait":
		return Wait, nil
	}
	return 0, block.E("replica.policy", s, block.KindInvalid, fmt.Errorf("%q is no policy for the loss of the peer: say wait or degrade", s))
}

// Config says what a Volume is made of.
type Config struct {
	Volume string // its name, the same at both nodes and at the arbiter
	Node   string // this node's name, as its certificate says
	// Local is the volume's stack at this node. The Volume closes it.
	Local block.Device
	// Log is Local's journal.
	Log Log
	// Fence is the arbiter. Without one the volume is alone for ever.
	Fence *fence.Client
	// Peer sends to the other node; nil: there is none.
	Peer msg.Caller
	// Forward sends calls of clients to the other node, on a connection of its
	// own, so that calls that wait there never keep replication waiting. nil: as Peer.
	Forward msg.Caller
	// OnPeerLoss is what writes do while the other node is away.
	OnPeerLoss Policy
	// CleanStart: the last stop was clean, or only the process died since the
	// machine was started. What is here is all that was acknowledged.
	CleanStart bool
	// Compared, if set, is called at a node that joins, before it is compared
	// with the primary whole: ranges that are found equal never come by its
	// journal, so other holds on that are worth nothing any more.
	Compared func() error
	// FailBackAfter is how long the preferred node must have been in sync before
	// the primary hands over to it; 0 never does.
	FailBackAfter time.Duration
	// InFlight is the most writes under way; default 256.
	InFlight int
	Logger   *slog.Logger // changes of state; nil for none
}

// The times of the protocol. Those that safety rests on are package fence's.
const (
	beatEvery  = 200 * time.Millisecond
	renewEvery = 250 * time.Millisecond
	askAfter   = time.Second            // silence after which a member asks to take over
	askEvery   = 150 * time.Millisecond // and how often
	lookEvery  = 500 * time.Millisecond // how often a node that hears nothing asks for the record
	callTime   = time.Second            // bound of a call that does no work

	slowWrite = time.Second     // a write without an answer for so long: the peer is lost
	slowFlush = 3 * time.Second // a flush
	grace     = time.Second     // between losing the peer and going on without
	recovery  = 5 * time.Second // how long a restarted primary gives the other the chance
	holdEvery = time.Second
	fwdTime   = 2 * time.Second // after which a forwarded call is answered "not now"
	fwdLimit  = 5 * time.Second // after which its sender gives up the session
	bigPiece  = 1 << 20         // most payload bytes in one message
	bigRange  = 64 << 20        // most bytes zeroed or trimmed by one message
)

func (c *Config) fill() error {
	switch {
	case c.Local == nil:
		return block.E("replica.open", c.Volume, block.KindInvalid, fmt.Errorf("a volume needs a local stack"))
	case c.Fence != nil && (c.Volume == "" || c.Node == "" || c.Log == nil):
		return block.E("replica.open", c.Volume, block.KindInvalid, fmt.Errorf("a volume with an arbiter needs a name, a node and a journal"))
	case len(c.Volume) > 255 || len(c.Node) > 255:
		return block.E("replica.open", c.Volume, block.KindInvalid, fmt.Errorf("names have at most 255 bytes"))
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.InFlight <= 0 {
		c.InFlight = 256
	}
	if c.Forward == nil {
		c.Forward = c.Peer
	}
	return nil
}
