package store

import (
	"sync"

	"forerun/internal/chunk"
)

// notices carries what changed to the callbacks OnAdd and OnGone, in order, by a
// goroutine of its own: so they may call the store, and slow ones delay nobody.
type notices struct {
	add  func(chunk.Sig)
	gone func([]chunk.Sig)

	mu   sync.Mutex // innermost: taken with Store.mu held
	more *sync.Cond
	list []change
	over bool
	done chan struct{}
}

type change struct {
	sig  chunk.Sig
	gone bool
}

// newNotices returns nil when nobody listens.
func newNotices(add func(chunk.Sig), gone func([]chunk.Sig)) *notices {
	if add == nil && gone == nil {
		return nil
	}
	n := &notices{add: add, gone: gone, done: make(chan struct{})}
	n.more = sync.NewCond(&n.mu)
	go n.run()
	return n
}

// note wants Store.mu held, so that the order is that of the map.
func (n *notices) note(sig *chunk.Sig, gone bool) {
	if n == nil || gone && n.gone == nil || !gone && n.add == nil {
		return
	}
	n.mu.Lock()
	n.list = append(n.list, change{*sig, gone})
	n.mu.Unlock()
	n.more.Signal()
}

// listens says whether anybody wants to know what goes.
func (n *notices) listens() bool { return n != nil && n.gone != nil }

// end returns when all was told.
func (n *notices) end() {
	if n == nil {
		return
	}
	n.mu.Lock()
	n.over = true
	n.mu.Unlock()
	n.more.Signal()
	<-n.done
}

func (n *notices) run() {
	defer close(n.done)
	var told []change
	var sigs []chunk.Sig
	for {
		n.mu.Lock()
		for len(n.list) == 0 && !n.over {
			n.more.Wait()
		}
		told, n.list = n.list, told[:0]
		n.mu.Unlock()
		if len(told) == 0 {
			return
		}
		for _, c := range told {
			if c.gone {
				sigs = append(sigs, c.sig)
				continue
			}
			sigs = n.tellGone(sigs)
			n.add(c.sig)
		}
		sigs = n.tellGone(sigs)
	}
}

// tellGone hands the signatures over; they are the callback's from then on.
func (n *notices) tellGone(sigs []chunk.Sig) []chunk.Sig {
	if len(sigs) > 0 {
		n.gone(sigs)
	}
	return nil
}
