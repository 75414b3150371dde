package wan

import (
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"
)

// segment is a piece of the stream with the line time of its arrival. An
// empty one is the end of the stream.
type segment struct {
	at time.Time
	p  []byte
}

// ack is room in the window that comes back to the sender at a line time of
// the other direction.
type ack struct {
	at time.Time
	n  int
}

// flow is one direction of one connection.
type flow struct {
	pair *pair
	lane *lane // the way the bytes go
	back *lane // the way the acknowledgements go
	segs []segment
	acks []ack
	out  int       // bytes sent and not acknowledged
	last time.Time // arrival of the last segment: order is kept

	finSent bool       // the writer has ended the stream
	writing bool       // somebody is inside Write
	reader  *sync.Cond // readers wait here
	writer  *sync.Cond // writers wait here
}

func (f *flow) push(at time.Time, p []byte) {
	if at.Before(f.last) {
		at = f.last
	}
	f.last = at
	f.segs = append(f.segs, segment{at, p})
	f.reader.Broadcast()
}

// take collects acknowledgements that have arrived and says when the next one does.
func (f *flow) take() (next time.Time) {
	now := f.back.clock.now()
	for len(f.acks) > 0 && !f.acks[0].at.After(now) {
		f.out -= f.acks[0].n
		f.acks = f.acks[1:]
	}
	if len(f.acks) == 0 {
		return time.Time{}
	}
	if t, ok := f.back.clock.real(f.acks[0].at); ok {
		return t
	}
	return time.Time{}
}

// leave takes f out of the line for the queue.
func (f *flow) leave() {
	if i := slices.Index(f.lane.line, f); i >= 0 {
		f.lane.line = slices.Delete(f.lane.line, i, i+1)
		if i == 0 && len(f.lane.line) > 0 {
			f.lane.line[0].writer.Broadcast()
		}
	}
}

// pair is one connection: two flows and two ends.
type pair struct {
	w     *WAN
	flows [2]flow
	ends  [2]*conn
	reset bool
	open  int
}

func newPair(w *WAN, from, to Addr) *pair {
	p := &pair{w: w, open: 2}
	for i := range p.flows {
		f := &p.flows[i]
		f.pair, f.lane, f.back = p, &w.lanes[i], &w.lanes[1-i]
		f.reader, f.writer = sync.NewCond(&w.mu), sync.NewCond(&w.mu)
	}
	p.ends[0] = &conn{pair: p, out: &p.flows[0], in: &p.flows[1], local: from, remote: to}
	p.ends[1] = &conn{pair: p, out: &p.flows[1], in: &p.flows[0], local: to, remote: from}
	return p
}

func (p *pair) wake() {
	for i := range p.flows {
		p.flows[i].reader.Broadcast()
		p.flows[i].writer.Broadcast()
	}
}

// conn is one end of a connection.
type conn struct {
	pair          *pair
	in, out       *flow
	local, remote Addr
	closed        bool
	readBy        time.Time // deadlines, real time
	writeBy       time.Time
}

func (c *conn) fail(op string, err error) error {
	return &net.OpError{Op: op, Net: "wan", Source: c.local, Addr: c.remote, Err: err}
}

// gone says why no more can be done on this end, nil when it can.
func (c *conn) gone(by time.Time) error {
	switch {
	case c.closed:
		return net.ErrClosed
	case c.pair.reset:
		return syscall.ECONNRESET
	case !by.IsZero() && !time.Now().Before(by):
		return os.ErrDeadlineExceeded
	}
	return nil
}

// Read waits for the first byte that has arrived and returns all that have.
func (c *conn) Read(p []byte) (int, error) {
	w, f := c.pair.w, c.in
	w.mu.Lock()
	defer w.mu.Unlock()
	for {
		if err := c.gone(c.readBy); err != nil {
			return 0, c.fail("read", err)
		}
		if len(p) == 0 {
			return 0, nil
		}
		now := f.lane.clock.now()
		n := 0
		for n < len(p) && len(f.segs) > 0 && !f.segs[0].at.After(now) && len(f.segs[0].p) > 0 {
			s := &f.segs[0]
			k := copy(p[n:], s.p)
			n += k
			if s.p = s.p[k:]; len(s.p) == 0 {
				f.segs[0] = segment{}
				f.segs = f.segs[1:]
			}
		}
		if n > 0 {
			f.acks = append(f.acks, ack{f.back.clock.now().Add(f.back.Delay), n})
			f.writer.Broadcast()
			return n, nil
		}
		until := c.readBy
		if len(f.segs) > 0 {
			if !f.segs[0].at.After(now) {
				return 0, io.EOF
			}
			if t, ok := f.lane.clock.real(f.segs[0].at); ok {
				until = sooner(until, t)
			}
		}
		wait(f.reader, until)
	}
}

// Write puts p on the line. It returns when the last byte is in the queue.
func (c *conn) Write(p []byte) (int, error) {
	w, f := c.pair.w, c.out
	w.mu.Lock()
	defer w.mu.Unlock()
	for f.writing {
		if err := c.gone(c.writeBy); err != nil {
			return 0, c.fail("write", err)
		}
		wait(f.writer, c.writeBy)
	}
	f.writing = true
	defer func() {
		f.writing = false
		f.writer.Broadcast()
	}()
	done := 0
	for {
		if err := c.writable(); err != nil {
			return done, c.fail("write", err)
		}
		if done == len(p) {
			return done, nil
		}
		k := min(len(p)-done, f.lane.segment())
		if err := c.admit(k); err != nil {
			return done, c.fail("write", err)
		}
		f.push(f.lane.send(k), slices.Clone(p[done:done+k]))
		f.out += k
		done += k
	}
}

// writable is gone, and also fails when the stream was ended here, or the
// other end has closed and word of it has come.
func (c *conn) writable() error {
	if err := c.gone(c.writeBy); err != nil {
		return err
	}
	if c.out.finSent {
		return syscall.EPIPE
	}
	if c.peer().closed && !c.in.last.After(c.in.lane.clock.now()) {
		return syscall.EPIPE
	}
	return nil
}

func (c *conn) peer() *conn {
	if c.pair.ends[0] == c {
		return c.pair.ends[1]
	}
	return c.pair.ends[0]
}

// admit waits until k bytes fit in the connection's window and then in the
// queue, in turn with all others that wait for the queue.
func (c *conn) admit(k int) error {
	f, ln := c.out, c.out.lane
	inLine := false
	defer func() {
		if inLine {
			f.leave()
		}
	}()
	for {
		until := c.writeBy
		next := f.take()
		if f.out > 0 && f.out+k > ln.window() {
			if inLine {
				f.leave()
				inLine = false
			}
			until = sooner(until, next)
		} else {
			if !inLine {
				ln.line = append(ln.line, f)
				inLine = true
			}
			if ln.line[0] == f {
				at := ln.room(k)
				if !at.After(ln.clock.now()) {
					return nil
				}
				if t, ok := ln.clock.real(at); ok {
					until = sooner(until, t)
				}
			}
		}
		if c.peer().closed {
			if t, ok := c.in.lane.clock.real(c.in.last); ok {
				until = sooner(until, t)
			}
		}
		wait(f.writer, until)
		if err := c.writable(); err != nil {
			return err
		}
	}
}

// CloseWrite ends the stream this end sends; the other end reads io.EOF after
// the last byte.
func (c *conn) CloseWrite() error {
	w := c.pair.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if c.closed {
		return c.fail("close", net.ErrClosed)
	}
	c.fin()
	return nil
}

func (c *conn) fin() {
	if f := c.out; !f.finSent && !c.pair.reset {
		f.finSent = true
		f.push(f.lane.send(0), nil)
		c.pair.wake()
	}
}

// Close ends both streams. What was written still arrives.
func (c *conn) Close() error {
	w := c.pair.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if c.closed {
		return c.fail("close", net.ErrClosed)
	}
	c.fin()
	c.closed = true
	c.in.segs = nil
	if c.pair.open--; c.pair.open == 0 {
		delete(w.pairs, c.pair)
	}
	c.pair.wake()
	return nil
}

// LocalAddr names this end.
func (c *conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr names the other end.
func (c *conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline sets both deadlines.
func (c *conn) SetDeadline(t time.Time) error { return c.deadline(t, true, true) }

// SetReadDeadline sets the time after which Read fails.
func (c *conn) SetReadDeadline(t time.Time) error { return c.deadline(t, true, false) }

// SetWriteDeadline sets the time after which Write fails.
func (c *conn) SetWriteDeadline(t time.Time) error { return c.deadline(t, false, true) }

func (c *conn) deadline(t time.Time, read, write bool) error {
	w := c.pair.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if c.closed {
		return c.fail("set", net.ErrClosed)
	}
	if read {
		c.readBy = t
	}
	if write {
		c.writeBy = t
	}
	c.pair.wake()
	return nil
}
