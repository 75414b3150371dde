package fence

import (
	"sync"
	"time"
)

// Lease is the primary's leave to answer reads. It belongs to one epoch: Revoke
// it before the next. The zero value is none.
type Lease struct {
	mu    sync.Mutex
	sent  time.Time // of the newest renewal that was answered
	floor time.Time // renewals sent until then do not count
}

// Renewed notes that a renewal sent at that time was answered: by the arbiter,
// or a heartbeat by a peer that is a member. The time is taken before sending.
func (l *Lease) Renewed(sent time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if sent.After(l.floor) && sent.After(l.sent) {
		l.sent = sent
	}
}

// begin starts the lease of a new epoch with the request that was granted.
func (l *Lease) begin(sent time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sent, l.floor = sent, sent
}

// Revoke ends the lease, for renewals under way too. It comes before a handover
// is asked for, and with every change of the epoch.
func (l *Lease) Revoke(now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sent, l.floor = time.Time{}, now
}

// Valid says whether a read may be answered that was asked for before now.
func (l *Lease) Valid(now time.Time) bool { return l.Left(now) > 0 }

// Left is how long the lease is still valid.
func (l *Lease) Left(now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.sent.IsZero() {
		return 0
	}
	// The monotonic clock stands still while a machine is suspended, the other
	// one may jump. The one that has gone further counts: a lease that ends too
	// early costs a moment.
	age := max(now.Sub(l.sent), now.Round(0).Sub(l.sent.Round(0)))
	return max(0, LeaseTime-age)
}

// Witness is what a secondary owes the primary whose heartbeats it answers: the
// primary may answer reads for a while after each. A node that became primary
// by a takeover serves nothing before Clear. A new one knows nothing of what
// the process before it answered, so it waits too.
type Witness struct {
	mu   sync.Mutex
	last time.Time
}

// NewWitness makes one when the process starts.
func NewWitness(now time.Time) *Witness { return &Witness{last: now} }

// Answered notes that a heartbeat of the primary is being answered. It comes
// before the answer is sent.
func (w *Witness) Answered(now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if now.After(w.last) {
		w.last = now
	}
}

// Clear says whether no primary can count on an answer of this node any more.
func (w *Witness) Clear(now time.Time) bool { return w.Left(now) <= 0 }

// Left is how long it has to wait for that.
func (w *Witness) Left(now time.Time) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return max(0, Grace-now.Sub(w.last))
}
