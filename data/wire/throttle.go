package wire

import (
	"context"
	"net"
	"sync"
	"time"
)

// Throttle paces what others send in bulk over a connection of their own, as a
// Server paces background: the link full, its queue short. The zero value lets
// everything pass until it is given a connection the kernel tells about.
type Throttle struct {
	mu      sync.Mutex
	tcp     *tcpSocket // nil: nothing is known
	pace    pacer
	arrived int64 // on the connection, when it was looked at last
	total   int64 // on all connections so far
}

// ThrottleStats is what a Throttle allows.
type ThrottleStats struct {
	Bytes  int64         // a second, 0 when nothing is known
	Delay  time.Duration // the queue on the way
	Target time.Duration // the queue that is aimed at
}

// Use makes nc, a TCP connection without TLS, the one that is paced.
func (t *Throttle) Use(nc net.Conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.tcp, t.arrived = newTCPSocket(nc), 0
}

// Wait returns when n bytes may be sent, and charges them. careful halves the
// queue: somebody waits for answers. It fails when ctx ends.
func (t *Throttle) Wait(ctx context.Context, n int, careful bool) error {
	for {
		d := t.wait(time.Now(), n, careful)
		if d == 0 {
			return nil
		}
		timer := time.NewTimer(d)
		select {
		case <-ctx.Done():
			timer.Stop()
			return context.Cause(ctx)
		case <-timer.C:
		}
	}
}

func (t *Throttle) wait(now time.Time, n int, careful bool) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.tcp == nil {
		return 0
	}
	if careful {
		t.pace.demand = now
	}
	if t.pace.due(now) {
		if s, ok := t.tcp.info(); ok {
			t.total += s.arrived - t.arrived
			t.arrived = s.arrived
			t.pace.sample(now, s.rtt, t.total)
			t.tcp.limit(t.pace.rate * 1.05) // what is charged at once is large; the kernel spreads it
		}
	}
	if d := t.pace.wait(now); d > 0 {
		return min(d, 20*time.Millisecond) // and look again
	}
	t.pace.spend(now, n, false)
	return 0
}

// Stats says what is allowed.
func (t *Throttle) Stats() ThrottleStats {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.tcp == nil || t.pace.sampled.IsZero() {
		return ThrottleStats{}
	}
	return ThrottleStats{Bytes: int64(t.pace.rate), Delay: t.pace.delay(), Target: t.pace.target()}
}
