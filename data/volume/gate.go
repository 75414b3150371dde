package volume

import (
	"math"
	"sync/atomic"
)

const gateClosed = math.MinInt64

// gate counts calls under way. It is one word, because the local read path
// passes it; a lock would also make arrivals, which readers under way wait
// for, queue behind a Close that waits for those readers.
type gate struct {
	n       atomic.Int64
	closing atomic.Bool
	idle    chan struct{} // buffered, one: n may be 0
}

func (g *gate) init() { g.idle = make(chan struct{}, 1) }

// enter lets a new call in, unless the gate is closing.
func (g *gate) enter() bool {
	if g.n.Add(1) > 0 && !g.closing.Load() {
		return true
	}
	g.leave()
	return false
}

// enterLate lets in what calls under way may wait for, until all are out.
func (g *gate) enterLate() bool {
	if g.n.Add(1) > 0 {
		return true
	}
	g.leave()
	return false
}

func (g *gate) leave() {
	if g.n.Add(-1) == 0 && g.closing.Load() {
		select {
		case g.idle <- struct{}{}:
		default:
		}
	}
}

// close refuses new calls and waits for those under way. It says whether it was the first.
func (g *gate) close() bool {
	if g.closing.Swap(true) {
		return false
	}
	for !g.n.CompareAndSwap(0, gateClosed) {
		<-g.idle
	}
	return true
}
