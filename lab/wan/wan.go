package wan

import (
	"context"
	"fmt"
	"net"
	"sync"
	"syscall"
	"time"
)

// Way names one direction of the line, or both.
type Way uint8

// The ways. Forward is from the side that dialled to the side that listened.
const (
	Forward  Way = 1
	Backward Way = 2
	Both     Way = 3
)

// WAN is a line between two sites. All methods may be called at any time from
// any goroutine.
type WAN struct {
	mu        sync.Mutex
	lanes     [2]lane // 0 forward, 1 backward
	listeners map[string]*listener
	pairs     map[*pair]struct{}
	dialling  *sync.Cond // dials wait here for line time to pass
	dials     int64
}

// New makes a line whose directions both behave as l says.
func New(l Link) *WAN {
	w := &WAN{listeners: map[string]*listener{}, pairs: map[*pair]struct{}{}}
	w.dialling = sync.NewCond(&w.mu)
	w.lanes[0].set(l)
	l.Seed++
	w.lanes[1].set(l)
	return w
}

// Set changes how the line behaves from now on. What is on its way arrives as
// it would have; what waits in the queue leaves at the new rate for those who
// queue behind it.
func (w *WAN) Set(way Way, l Link) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.each(way, func(ln *lane) { ln.set(l) })
	w.wakeAll()
}

// Stall halts both directions for d. Nothing is lost.
func (w *WAN) Stall(d time.Duration) {
	if d <= 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.each(Both, func(ln *lane) { ln.clock.halt() })
	w.wakeAll()
	time.AfterFunc(d, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.each(Both, func(ln *lane) { ln.clock.resume() })
		w.wakeAll()
	})
}

// Partition halts the directions of way until it is called again with false.
// Connections stay; writers block when the queue is full.
func (w *WAN) Partition(way Way, on bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.each(way, func(ln *lane) {
		if ln.partitioned == on {
			return
		}
		ln.partitioned = on
		if on {
			ln.clock.halt()
		} else {
			ln.clock.resume()
		}
	})
	w.wakeAll()
}

// Cut resets all connections. Bytes on their way are lost; both ends see
// ECONNRESET at once. New connections can be made immediately.
func (w *WAN) Cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for p := range w.pairs {
		p.reset = true
		for i := range p.flows {
			p.flows[i].segs = nil
		}
		delete(w.pairs, p)
		p.wake()
	}
	for i := range w.lanes {
		w.lanes[i].free = time.Time{}
	}
	w.wakeAll()
}

// Close resets all connections and closes all listeners.
func (w *WAN) Close() error {
	w.mu.Lock()
	for _, l := range w.listeners {
		l.closeLocked()
	}
	w.mu.Unlock()
	w.Cut()
	return nil
}

func (w *WAN) each(way Way, f func(*lane)) {
	for i := range w.lanes {
		if way&(1<<i) != 0 {
			f(&w.lanes[i])
		}
	}
}

// wakeAll makes everybody look again. It is for rare events.
func (w *WAN) wakeAll() {
	w.dialling.Broadcast()
	for p := range w.pairs {
		p.wake()
	}
	for i := range w.lanes {
		for _, f := range w.lanes[i].line {
			f.pair.wake()
		}
	}
	for _, l := range w.listeners {
		l.cond.Broadcast()
	}
}

// wait sleeps on c, at most until the real time until when it is not zero.
func wait(c *sync.Cond, until time.Time) {
	if until.IsZero() {
		c.Wait()
		return
	}
	t := time.AfterFunc(time.Until(until), func() {
		c.L.Lock()
		defer c.L.Unlock()
		c.Broadcast()
	})
	c.Wait()
	t.Stop()
}

// sooner returns the earlier of two times of which zero means never.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// Addr is the name of one end of a connection.
type Addr string

// Network is "wan".
func (Addr) Network() string { return "wan" }

// String is the name itself.
func (a Addr) String() string { return string(a) }

// Listen waits for connections to addr, any string; "host:port" lets TLS find
// the server's name in it.
func (w *WAN) Listen(addr string) (net.Listener, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.listeners[addr] != nil {
		return nil, &net.OpError{Op: "listen", Net: "wan", Addr: Addr(addr), Err: syscall.EADDRINUSE}
	}
	l := &listener{w: w, addr: Addr(addr)}
	l.cond = sync.NewCond(&w.mu)
	w.listeners[addr] = l
	return l, nil
}

// Dial makes a connection to the listener of that name. It takes one round trip.
func (w *WAN) Dial(addr string) (net.Conn, error) {
	return w.DialContext(context.Background(), "wan", addr)
}

// DialContext is Dial with a context, in the shape of net.Dialer's method. The
// network is ignored. A name nobody listens to is ECONNREFUSED after the
// round trip.
func (w *WAN) DialContext(ctx context.Context, _, addr string) (net.Conn, error) {
	stop := context.AfterFunc(ctx, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.dialling.Broadcast()
	})
	defer stop()
	fail := func(err error) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: "wan", Addr: Addr(addr), Err: err}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range w.lanes {
		ln := &w.lanes[i]
		at := ln.send(64)
		for ln.clock.now().Before(at) {
			if err := ctx.Err(); err != nil {
				return fail(err)
			}
			until, ok := ln.clock.real(at)
			if !ok {
				until = time.Time{}
			}
			wait(w.dialling, until)
		}
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	l := w.listeners[addr]
	if l == nil || len(l.queue) >= 128 {
		return fail(syscall.ECONNREFUSED)
	}
	w.dials++
	p := newPair(w, Addr(fmt.Sprintf("dialer:%d", w.dials)), l.addr)
	w.pairs[p] = struct{}{}
	l.queue = append(l.queue, p.ends[1])
	l.cond.Signal()
	return p.ends[0], nil
}

type listener struct {
	w      *WAN
	addr   Addr
	cond   *sync.Cond
	queue  []*conn
	closed bool
}

// Accept waits for the next connection.
func (l *listener) Accept() (net.Conn, error) {
	l.w.mu.Lock()
	defer l.w.mu.Unlock()
	for len(l.queue) == 0 && !l.closed {
		l.cond.Wait()
	}
	if l.closed {
		return nil, &net.OpError{Op: "accept", Net: "wan", Addr: l.addr, Err: net.ErrClosed}
	}
	c := l.queue[0]
	l.queue = l.queue[1:]
	return c, nil
}

// Close closes the listener. Connections nobody accepted are reset.
func (l *listener) Close() error {
	l.w.mu.Lock()
	defer l.w.mu.Unlock()
	if l.closed {
		return &net.OpError{Op: "close", Net: "wan", Addr: l.addr, Err: net.ErrClosed}
	}
	l.closeLocked()
	return nil
}

func (l *listener) closeLocked() {
	l.closed = true
	delete(l.w.listeners, string(l.addr))
	for _, c := range l.queue {
		c.pair.reset = true
		delete(l.w.pairs, c.pair)
		c.pair.wake()
	}
	l.queue = nil
	l.cond.Broadcast()
}

// Addr returns the name listened to.
func (l *listener) Addr() net.Addr { return l.addr }
