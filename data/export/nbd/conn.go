package nbd

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
	"forerun/internal/nbdproto"
)

const (
	// inputSize is the space in bytes that a leader reads into: many small
	// requests with their payloads at once.
	inputSize = 128 << 10
	// inputAfterLarge is what is asked for after a large payload: the next one
	// goes to a buffer of its own, and what is read here of it has to be copied.
	inputAfterLarge = 4 << 10
	// inlineMax is the largest transfer in bytes that a leader does itself.
	inlineMax = 128 << 10
	// batch is how many replies wait at most for the leader to send them.
	batch = 16
	// maxDrain is the longest payload in bytes that is read past and refused; with
	// a longer one the connection ends.
	maxDrain = 4 * nbdproto.MaxPayload

	// A request that took longer than this to serve counts as slow, and leaders
	// serve by themselves while few are.
	slowBase    = 30 * time.Microsecond
	slowPerByte = 8 // bytes in a nanosecond
	slowAlways  = time.Millisecond
	slowStep    = 8
	slowLimit   = 16
	slowMax     = 64

	// serving is the bit of conn.lead that says that the leader is held by a request.
	serving uint64 = 1
)

// input is what was read from the socket and not looked at yet: buf[r:w].
type input struct {
	buf  []byte
	r, w int
}

// conn is a connection in the transmission phase.
type conn struct {
	s *Server
	*chosen
	t     transport
	count counters

	ctx    context.Context // of reads and the like; ends when the client is gone
	cancel context.CancelCauseFunc
	// changing is the context of changes: it outlives the client, and knows
	// whether that has gone.
	changing context.Context

	// lead changes when the leader begins to serve (odd) and ends it, and when
	// the watch takes the lead from it. in belongs to whoever leads.
	lead  atomic.Uint64
	seen  uint64 // by the watch
	in    input
	large bool // the last payload was large
	slow  atomic.Int32
	taken time.Duration // since Server.epoch: of the leader, when it took a request last

	done chan struct{} // closed when the last leader has gone
	gone chan struct{} // closed when all is over
	wg   sync.WaitGroup

	work    chan *request
	workers int // of the leader: how many there are
	out     outbox

	draining atomic.Bool
	fault    error // of the last leader, before done: why it went, nil if in order
}

func newConn(s *Server, ch *chosen, t transport) *conn {
	c := &conn{s: s, chosen: ch, t: t,
		done: make(chan struct{}), gone: make(chan struct{}),
		work: make(chan *request, s.opt.MaxRequests),
	}
	c.ctx, c.cancel = context.WithCancelCause(s.hard)
	c.changing = block.WithOrigin(s.hard, c.left)
	c.in.buf = make([]byte, inputSize)
	c.out.room.L = &c.out.mu
	return c
}

// run serves until the connection ends. The error is nil if it ended in order.
func (c *conn) run() error {
	defer close(c.gone)
	defer c.cancel(errGone)
	c.s.watch.add(c)
	c.leader()
	<-c.done
	c.s.watch.remove(c)
	// Requests that were read are finished; workers end when there are no more.
	close(c.work)
	c.wg.Wait()
	c.flush()
	c.t.close()
	return c.fault
}

// left says whether the client is known to have gone.
func (c *conn) left() bool { return c.ctx.Err() != nil || c.t.gone() }

// stale is how long a request may lie before it is looked whether its client
// is still there. A process that stood still for so long finds requests that
// their clients have had answered by another server since, and that must not be
// carried out after what those clients asked for next.
const stale = 250 * time.Millisecond

var (
	errGone = block.E("nbd", "", block.KindClosed, errors.New("the client is gone"))
	errDisc = errors.New("the client disconnected")
	errLost = errors.New("the lead was lost")
)

// drain ends the connection in order: no more is read, what was read is served.
func (c *conn) drain() {
	c.draining.Store(true)
	c.t.stop()
}

// hangup ends the connection at once; writes under way are still finished.
func (c *conn) hangup(err error) {
	c.cancel(err)
	c.t.kill()
	c.out.abandon()
}

// leader reads and serves until the connection ends or the lead is lost.
func (c *conn) leader() {
	err := c.follow()
	if err == errLost {
		return
	}
	switch {
	case err == errDisc:
		err = nil
	case c.draining.Load():
		err = nil
	default:
		if errors.Is(err, io.EOF) && err != io.ErrUnexpectedEOF {
			err = nil
		}
		// Without the word that ends a session nobody waits for its answers.
		c.cancel(errGone)
	}
	if err != nil {
		c.hangup(errGone)
	}
	c.fault = err
	close(c.done)
}

// begin says that the leader does something that may hold it up. Between begin
// and end it does not touch what belongs to the lead.
func (c *conn) begin() uint64 {
	v := c.lead.Load() + 1
	c.lead.Store(v)
	c.s.watch.rouse()
	return v
}

// end says whether the lead is still with the caller.
func (c *conn) end(v uint64) bool { return c.lead.CompareAndSwap(v, v+1) }

// inherit copies what is unread: the former leader may still use the buffer.
func (c *conn) inherit() {
	if c.lead.Load() == 0 {
		return
	}
	buf := make([]byte, inputSize)
	c.in.w = copy(buf, c.in.buf[c.in.r:c.in.w])
	c.in.r, c.in.buf = 0, buf
}

// fill reads until n bytes, at most inputSize, are at hand.
func (c *conn) fill(n int) error {
	for c.in.w-c.in.r < n {
		if c.in.r == c.in.w {
			c.in.r, c.in.w = 0, 0
		} else if len(c.in.buf)-c.in.r < n || c.in.w == len(c.in.buf) {
			c.in.w = copy(c.in.buf, c.in.buf[c.in.r:c.in.w])
			c.in.r = 0
		}
		to := c.in.buf[c.in.w:]
		if c.large {
			to = to[:min(len(to), inputAfterLarge)]
		}
		m, err := c.t.read(to)
		if err != nil {
			if err == io.EOF && c.in.w > c.in.r {
				return io.ErrUnexpectedEOF
			}
			return err
		}
		c.in.w += m
	}
	return nil
}

// sendFirst sends the replies that wait, before the leader waits for something.
func (c *conn) sendFirst() error {
	if !c.out.waiting() {
		return nil
	}
	v := c.begin()
	c.flush()
	if !c.end(v) {
		return errLost
	}
	return nil
}

// payload reads n bytes into p, from what is at hand and then from the socket.
func (c *conn) payload(p []byte) error {
	m := copy(p, c.in.buf[c.in.r:c.in.w])
	c.in.r += m
	if m == len(p) {
		return nil
	}
	return c.t.fill(p[m:])
}

// skip reads past n bytes.
func (c *conn) skip(n int) error {
	for n > 0 {
		if c.in.r == c.in.w {
			if err := c.fill(1); err != nil {
				return err
			}
		}
		m := min(n, c.in.w-c.in.r)
		c.in.r += m
		n -= m
	}
	return nil
}

// whole says whether a whole request is at hand.
func (c *conn) whole() bool {
	b := c.in.buf[c.in.r:c.in.w]
	if len(b) < nbdproto.RequestLen {
		return false
	}
	r, _ := nbdproto.ParseRequest(b)
	return r.Type != nbdproto.CmdWrite || uint64(len(b)) >= nbdproto.RequestLen+uint64(r.Length)
}

// follow is the loop of a leader. It returns why it ended.
func (c *conn) follow() error {
	c.inherit()
	for {
		if !c.whole() {
			// The leader is about to wait. It is at the beginning of a request,
			// so another one could go on from here.
			if err := c.sendFirst(); err != nil {
				return err
			}
		}
		if err := c.fill(nbdproto.RequestLen); err != nil {
			return err
		}
		h, ok := nbdproto.ParseRequest(c.in.buf[c.in.r:])
		if !ok {
			return errors.New("the client sent no request where one was due")
		}
		c.in.r += nbdproto.RequestLen
		if h.Type == nbdproto.CmdDisc {
			return errDisc
		}
		if err := c.take(h); err != nil {
			return err
		}
	}
}

// take serves a request or hands it to a worker.
func (c *conn) take(h nbdproto.Request) error {
	r := c.s.pool.Get().(*request)
	r.reset(c, h)
	r.taken = time.Since(c.s.epoch)
	if last := c.taken; r.taken-last > stale && c.t.gone() {
		c.s.pool.Put(r)
		return errGone
	}
	c.taken = r.taken
	write := h.Type == nbdproto.CmdWrite
	if write && r.refused() {
		// Out of step with the stream there is no going on.
		if int64(h.Length) > maxDrain {
			c.s.pool.Put(r)
			return errors.New("the client announced too long a payload")
		}
	}
	if err := c.admit(r); err != nil {
		c.s.pool.Put(r)
		return err
	}
	if r.refused() {
		if write {
			if err := c.skip(int(h.Length)); err != nil {
				c.out.release(r)
				return err
			}
		}
		r.refuse()
		c.out.add(r)
		return nil
	}
	inline := c.inline(r)
	if write && r.n > 0 {
		n := int(r.n)
		c.large = n >= 64<<10
		if inline && c.in.w-c.in.r >= n {
			r.data = c.in.buf[c.in.r : c.in.r+n]
			c.in.r += n
		} else {
			r.buf = c.s.buffers.take(n)
			r.data = r.buf.data(n)
			if err := c.payload(r.data); err != nil {
				c.out.release(r)
				return err
			}
		}
	}
	if c.s.opt.Observe != nil {
		r.began = time.Now()
	}
	if !inline {
		return c.dispatch(r)
	}
	send := !c.whole()
	c.count.inline.Add(1)
	v := c.begin()
	r.serve()
	if c.out.add(r) >= batch || send {
		c.flush()
	}
	if !c.end(v) {
		// Whoever leads now may sleep already, and would not send this reply.
		c.flush()
		return errLost
	}
	return nil
}

// inline says whether the leader serves r by itself.
func (c *conn) inline(r *request) bool {
	if r.n == 0 {
		return r.typ == nbdproto.CmdRead || r.typ == nbdproto.CmdWrite
	}
	if !r.quick() || c.slow.Load() >= slowLimit {
		return false
	}
	if r.typ == nbdproto.CmdRead {
		return c.s.opt.Near == nil || c.s.opt.Near(c.export.dev, r.off, r.n)
	}
	if c.export.block() > 1 {
		r.hold, r.held = c.export.holds.try(r.off, r.off+r.n)
		return r.held
	}
	return true
}

// learn takes into account how long the device took over n bytes.
func (c *conn) learn(took time.Duration, n int64) {
	v := c.slow.Load()
	switch {
	case took >= slowAlways:
		if v != slowMax {
			c.slow.Store(slowMax)
		}
	case took > slowBase+time.Duration(n/slowPerByte):
		c.slow.Store(min(v+slowStep, slowMax))
	case v > 0:
		c.slow.Store(v - 1)
	}
}

// dispatch hands r to a worker. There is always one that is free or about to
// be: as many as there are requests with workers.
func (c *conn) dispatch(r *request) error {
	if int(c.out.dispatched.Add(1)) > c.workers && c.workers < cap(c.work)+1 {
		c.workers++
		c.wg.Go(c.worker)
	}
	c.work <- r
	return nil
}

func (c *conn) worker() {
	for r := range c.work {
		r.serve()
		c.out.add(r)
		c.flush()
		c.out.dispatched.Add(-1)
	}
}
