package sim

import (
	"context"
	"net"
	"sync"
	"time"

	"forerun/lab/wan"
)

// network has a line of its own for the connections that each machine makes to
// each other one, so that connections between two machines overtake one
// another, and each direction can be stopped alone.
type network struct {
	mu    sync.Mutex
	lines [machines][machines]*wan.WAN // who dials, whom
	stops [machines][machines]int      // reasons why nothing gets from one to the other
	base  [machines][machines]wan.Link
}

func newNetwork(s Schedule) *network {
	n := &network{}
	for a := range machines {
		for b := range machines {
			if a == b {
				continue
			}
			l := wan.Link{Delay: s.RTT / 2, Seed: s.Seed*64 + uint64(a*8+b)}
			if a >= Backend || b >= Backend {
				l.Delay = s.WANRTT / 2
			}
			if n.same(s, a, b) {
				l.Delay = 0
			}
			l.Jitter = l.Delay / 4
			n.base[a][b], n.lines[a][b] = l, wan.New(l)
		}
	}
	return n
}

// same says whether both are one machine in this run.
func (n *network) same(s Schedule, a, b int) bool {
	return !s.Remote && a >= Backend && b >= Backend
}

// stop keeps everything that a sends from b; allow ends it.
func (n *network) stop(a, b int)  { n.change(a, b, 1) }
func (n *network) allow(a, b int) { n.change(a, b, -1) }

func (n *network) change(a, b, by int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if a == b {
		return
	}
	was := n.stops[a][b] > 0
	n.stops[a][b] += by
	if now := n.stops[a][b] > 0; now != was {
		n.lines[a][b].Partition(wan.Forward, now)
		n.lines[b][a].Partition(wan.Backward, now)
	}
}

// open says whether a and b hear each other.
func (n *network) open(a, b int) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.stops[a][b] == 0 && n.stops[b][a] == 0
}

// both does f to the two lines between a and b.
func (n *network) both(a, b int, f func(w *wan.WAN, l wan.Link)) {
	if a != b {
		f(n.lines[a][b], n.base[a][b])
		f(n.lines[b][a], n.base[b][a])
	}
}

// cut resets all connections between a and b.
func (n *network) cut(a, b int) {
	n.both(a, b, func(w *wan.WAN, _ wan.Link) { w.Cut() })
}

// far makes the way long and uneven, or as it was.
func (n *network) far(a, b int, on bool) {
	n.both(a, b, func(w *wan.WAN, l wan.Link) {
		if on {
			l.Delay += 80 * time.Millisecond
			l.Jitter, l.Loss, l.Rate = 200*time.Millisecond, 0.02, 2<<20
		}
		w.Set(wan.Both, l)
	})
}

// dial makes a connection from a to a service of b.
func (n *network) dial(ctx context.Context, a, b int, service string) (net.Conn, error) {
	return n.lines[a][b].DialContext(ctx, "wan", service)
}

// listen serves connections of a to b's service until the listener is closed.
func (n *network) listen(ctx context.Context, all *sync.WaitGroup, a, b int, service string, serve func(context.Context, net.Conn)) (net.Listener, error) {
	ln, err := n.lines[a][b].Listen(service)
	if err != nil {
		return nil, err
	}
	all.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer nc.Close()
				serve(ctx, nc)
			})
		}
	})
	return ln, nil
}

func (n *network) close() {
	for a := range machines {
		for b := range machines {
			for n.lines[a][b] != nil && n.stops[a][b] > 0 {
				n.allow(a, b)
			}
		}
	}
	for a := range n.lines {
		for _, w := range n.lines[a] {
			if w != nil {
				w.Close()
			}
		}
	}
}
