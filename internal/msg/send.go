package msg

import (
	"context"
	"slices"
)

// piece is how many bytes are given to the socket at a time, unless one frame
// is longer: between two pieces urgent frames may go.
const piece = 64 << 10

// queue is frames one after the other, and where each ends.
type queue struct {
	b    []byte
	ends []int
}

func (q *queue) add(h header, parts ...[]byte) {
	q.b = appendHeader(q.b, h)
	for _, p := range parts {
		q.b = append(q.b, p...)
	}
	q.ends = append(q.ends, len(q.b))
}

func (q *queue) empty() bool { return len(q.ends) == 0 }
func (q *queue) reset()      { q.b, q.ends = q.b[:0], q.ends[:0] }

// write is the writer: it takes what is queued as a whole, so that what comes
// in while it writes goes out together the next time.
func (c *Conn) write() {
	var now, first queue
	var at, frame int // in now: bytes written, frames written
	var pinged uint64
	if !c.send(appendHello(nil, hello{max: uint32(c.o.Max), limit: uint32(c.o.Limit), urgent: urgentLimit, bytes: budget})) {
		return
	}
	for {
		c.mu.Lock()
		for c.err == nil && c.first.empty() && c.out.empty() && frame == len(now.ends) {
			c.mu.Unlock()
			select {
			case <-c.wake:
			case <-c.done:
			}
			c.mu.Lock()
		}
		if c.err != nil {
			c.mu.Unlock()
			return
		}
		first.reset()
		first, c.first = c.first, first
		ping := c.ping
		if frame == len(now.ends) {
			now.reset()
			now, c.out = c.out, now
			at, frame, c.answers = 0, 0, 0
			c.room.Broadcast()
		}
		c.mu.Unlock()
		if !first.empty() && !c.send(first.b) {
			return
		}
		if ping > pinged {
			pinged = ping
			c.mu.Lock()
			c.written = ping
			c.mu.Unlock()
		}
		end := at
		for frame < len(now.ends) && (end == at || now.ends[frame]-at <= piece) {
			end = now.ends[frame]
			frame++
		}
		if end > at && !c.send(now.b[at:end]) {
			return
		}
		at = end
	}
}

// send writes p in pieces, so that progress can be seen.
func (c *Conn) send(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), piece)
		c.wrote.Add(1)
		_, err := c.nc.Write(p[:n])
		c.wrote.Add(1)
		if err != nil {
			c.fail(err)
			return false
		}
		p = p[n:]
	}
	return true
}

// credit is what may still be under way at the other side, and who waits for
// it, first come first served. Conn.mu guards it.
type credit struct {
	calls, bytes int // left
	busy         int // calls under way
	waiters      []*waiter
}

type waiter struct {
	granted chan struct{}
	n       int
	has     bool
}

func (c *credit) fits(n int) bool { return c.calls > 0 && (n <= c.bytes || c.busy == 0) }

func (c *credit) use(n int) {
	c.calls--
	c.bytes -= n
	c.busy++
}

func (c *credit) take(n int) bool {
	if len(c.waiters) > 0 || !c.fits(n) {
		return false
	}
	c.use(n)
	return true
}

func (c *credit) wait(n int) *waiter {
	w := &waiter{granted: make(chan struct{}), n: n}
	c.waiters = append(c.waiters, w)
	return w
}

func (c *credit) give(n int) {
	c.calls++
	c.bytes += n
	c.busy--
	c.grant()
}

func (c *credit) grant() {
	for len(c.waiters) > 0 && c.fits(c.waiters[0].n) {
		w := c.waiters[0]
		c.waiters = slices.Delete(c.waiters, 0, 1)
		c.use(w.n)
		w.has = true
		close(w.granted)
	}
}

// leave takes a waiter out that gave up, whether it was granted meanwhile or not.
func (c *credit) leave(w *waiter) {
	if w.has {
		c.give(w.n)
		return
	}
	if i := slices.Index(c.waiters, w); i >= 0 {
		c.waiters = slices.Delete(c.waiters, i, i+1)
	}
	c.grant()
}

// Caller is who can send a request: a Conn, a Client, or a twin of theirs.
type Caller interface {
	Call(ctx context.Context, typ uint8, parts ...[]byte) ([]byte, error)
}
