package nbd

import (
	"sync"
	"sync/atomic"
	"time"
)

// watch looks at the leaders of all connections once a tick while any is
// serving, and replaces those that a request holds up. It sleeps when nothing
// has moved for a while; a leader that serves wakes it.
type watch struct {
	mu    sync.Mutex
	conns map[*conn]struct{} // guarded by mu

	tick      time.Duration
	dormant   atomic.Bool
	wake      chan struct{}
	quit      chan struct{}
	takeovers atomic.Int64
}

const (
	// A leader that serves without being told what is near is looked at often.
	tickBlind = time.Millisecond
	// One that is told is seldom wrong, and looking wakes threads.
	tickTold = 5 * time.Millisecond
	still    = 20 // ticks without a request before the watch sleeps
)

func (w *watch) init(told bool) {
	w.tick = tickBlind
	if told {
		w.tick = tickTold
	}
	w.conns = map[*conn]struct{}{}
	w.wake = make(chan struct{}, 1)
	w.quit = make(chan struct{})
	w.dormant.Store(true)
}

func (w *watch) stop() { close(w.quit) }

// rouse is called by a leader after it has said that it serves.
func (w *watch) rouse() {
	if w.dormant.Load() && w.dormant.CompareAndSwap(true, false) {
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
}

func (w *watch) add(c *conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.conns[c] = struct{}{}
}

// remove returns when the watch will not touch c any more.
func (w *watch) remove(c *conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.conns, c)
}

func (w *watch) run() {
	t := time.NewTimer(time.Hour)
	defer t.Stop()
	for {
		select {
		case <-w.quit:
			return
		case <-w.wake:
		}
		for quiet := 0; ; {
			t.Reset(w.tick)
			select {
			case <-w.quit:
				return
			case <-t.C:
			}
			if w.look() {
				quiet = 0
				continue
			}
			if quiet++; quiet < still {
				continue
			}
			w.dormant.Store(true)
			// A leader that began before it could see that the watch sleeps is seen here.
			if !w.look() || !w.dormant.CompareAndSwap(true, false) {
				break
			}
			quiet = 0
		}
	}
}

// look says whether any leader has moved or serves.
func (w *watch) look() (moved bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for c := range w.conns {
		v := c.lead.Load()
		if v != c.seen {
			c.seen = v
			moved = true
			continue
		}
		if v&serving == 0 {
			continue
		}
		moved = true
		c.wg.Add(1)
		if c.lead.CompareAndSwap(v, v+1) {
			w.takeovers.Add(1)
			c.slow.Store(slowMax)
			go func() { defer c.wg.Done(); c.leader() }()
		} else {
			c.wg.Done()
		}
	}
	return moved
}
