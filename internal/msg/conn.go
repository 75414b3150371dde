package msg

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
)

const (
	defaultMax   = 1<<20 + 64<<10
	defaultLimit = 256
	defaultIdle  = 5 * time.Second
	urgentLimit  = 64
	// budget is how many bytes of requests are taken at once.
	budget = 16 << 20
	// ticks of Idle/ticks each: four pings before a connection is given up.
	ticks = 4
)

// Options of a Conn. Zero means the default.
type Options struct {
	// Max is the largest payload accepted, default 1 MiB + 64 KiB, at least MaxUrgent.
	Max int
	// Limit is how many requests of the other side are served at once, default
	// 256; more wait at the other side. Urgent ones have 64 of their own.
	Limit int
	// Idle: no byte, no progress of a write, or no answer to a ping for so long,
	// and the connection is dead. Default 5 s; pings go out four times as often.
	Idle time.Duration
	// Serve answers a request of the other side, on a goroutine of its own. p is
	// valid until it returns; the reply is copied before p is used again, so it
	// may lie in p. The context ends with the connection. Without Serve requests
	// are answered with KindUnsupported.
	Serve func(ctx context.Context, typ uint8, p []byte) ([]byte, error)
	Log   *slog.Logger // the end of the connection, for debugging; none if nil
}

func (o *Options) fill() {
	if o.Max <= 0 {
		o.Max = defaultMax
	}
	o.Max = max(o.Max, MaxUrgent)
	if o.Limit <= 0 {
		o.Limit = defaultLimit
	}
	if o.Idle <= 0 {
		o.Idle = defaultIdle
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Serve == nil {
		o.Serve = func(_ context.Context, typ uint8, _ []byte) ([]byte, error) {
			return nil, &block.Error{Op: "msg.serve", Kind: block.KindUnsupported, Err: fmt.Errorf("nothing is served here (request type %d)", typ)}
		}
	}
}

// Conn is one connection. Make it with New, then Run it.
type Conn struct {
	nc    net.Conn
	o     Options
	done  chan struct{} // closed when it has ended; err is set before
	ready chan struct{} // closed when the other side's hello is here
	wake  chan struct{} // for the writer
	work  chan request  // to idle workers
	serve sync.WaitGroup
	ctx   context.Context // of the requests served, under mu
	got   atomic.Uint64   // reads that brought bytes
	wrote atomic.Uint64   // writes that ended, and one more while one is under way: odd

	mu      sync.Mutex
	err     error
	peer    hello
	normal  credit
	urgent  credit
	calls   map[uint64]*call
	idle    []*call // to be used again
	next    uint64
	out     queue // frames to be written
	first   queue // urgent and control frames
	answers int   // bytes of answers in out
	room    *sync.Cond
	serving [2]int // requests under way: normal, urgent
	bytes   int    // of those
	workers int
	ping    uint64 // last one queued
	written uint64 // last one written
	pong    uint64 // last one answered
}

// request is one of the other side's.
type request struct {
	h header
	p *[]byte
}

type call struct {
	ch   chan answer // one place
	n    int
	h    header
	left bool // nobody waits any more
}

type answer struct {
	p   []byte
	err error
}

// New makes a Conn of a connection. Nothing happens before Run.
func New(nc net.Conn, o Options) *Conn {
	o.fill()
	c := &Conn{nc: nc, o: o, done: make(chan struct{}), ready: make(chan struct{}), wake: make(chan struct{}, 1),
		work: make(chan request), calls: map[uint64]*call{}}
	c.room = sync.NewCond(&c.mu)
	return c
}

// Done is closed when the connection has ended.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Ready is closed when the other side has said hello: calls do not wait for it any more.
func (c *Conn) Ready() <-chan struct{} { return c.ready }

// Wait returns when no request of the other side is being served any more. It
// is for after Run.
func (c *Conn) Wait() { c.serve.Wait() }

// Close ends the connection.
func (c *Conn) Close() error {
	c.fail(&block.Error{Op: "msg.close", Kind: block.KindClosed, Err: errors.New("the connection was closed here")})
	return nil
}

// Run reads, writes and pings until the connection ends, and closes it. It
// returns why it ended: KindClosed when ctx ended or Close was called,
// KindInvalid when the other side broke the protocol, KindUnavailable for all
// else. It is called once.
func (c *Conn) Run(ctx context.Context) error {
	sctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c.mu.Lock()
	c.ctx = sctx
	c.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	var wg sync.WaitGroup
	wg.Go(c.write)
	wg.Go(c.watch)
	err := c.read()
	c.fail(err)
	cancel()
	wg.Wait()
	return c.err
}

// fail ends the connection, once: everybody who waits is told.
func (c *Conn) fail(err error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	if k := block.KindOf(err); k != block.KindInvalid && k != block.KindClosed && k != block.KindUnsupported {
		err = &block.Error{Op: "msg.run", Object: address(c.nc), Kind: block.KindUnavailable, Err: err}
	}
	c.err = err
	lost := c.lost()
	for id, k := range c.calls {
		delete(c.calls, id)
		if !k.left {
			k.ch <- answer{err: lost}
		}
	}
	close(c.done)
	c.room.Broadcast()
	c.mu.Unlock()
	abort(c.nc)
	c.o.Log.Debug("connection ended", "peer", address(c.nc), "err", err)
}

// lost is what callers are told; c.err is set.
func (c *Conn) lost() error {
	return &block.Error{Op: "msg.call", Object: address(c.nc), Kind: block.KindUnavailable,
		Err: fmt.Errorf("the connection ended: %w", c.err)}
}

func address(nc net.Conn) string {
	if a := nc.RemoteAddr(); a != nil {
		return a.String()
	}
	return ""
}

// abort closes without the goodbye of TLS, which could wait for a full socket.
func abort(nc net.Conn) {
	if t, ok := nc.(*tls.Conn); ok {
		nc = t.NetConn()
	}
	nc.Close()
}

// Call sends a request, the parts as one payload, and waits for the answer,
// which is the caller's. An error of the other side comes back with its kind.
// KindUnavailable means that the connection was lost: the request may have
// been carried out. KindCanceled means that ctx ended, and the same.
func (c *Conn) Call(ctx context.Context, typ uint8, parts ...[]byte) ([]byte, error) {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	select {
	case <-c.ready:
	default:
		select {
		case <-c.ready:
		case <-c.done:
			return nil, c.lost()
		case <-ctx.Done():
			return nil, canceled(ctx)
		}
	}
	h := header{n: uint32(n), typ: typ}
	if err := c.fits(h, n); err != nil {
		return nil, err
	}
	k, err := c.begin(ctx, h, parts)
	if err != nil {
		return nil, err
	}
	select {
	case a := <-k.ch:
		c.recycle(k)
		return a.p, a.err
	case <-ctx.Done():
	}
	c.mu.Lock()
	select {
	case a := <-k.ch: // it came at the same moment
		c.mu.Unlock()
		c.recycle(k)
		return a.p, a.err
	default:
		k.left = true
		c.mu.Unlock()
		return nil, canceled(ctx)
	}
}

func canceled(ctx context.Context) error {
	return &block.Error{Op: "msg.call", Kind: block.KindCanceled, Err: ctx.Err()}
}

// fits says whether the other side accepts a frame of n bytes. The hello is there.
func (c *Conn) fits(h header, n int) error {
	most := int(min(c.peer.max, 1<<30))
	if h.typ >= Urgent {
		most = MaxUrgent
	}
	if n > most {
		return &block.Error{Op: "msg.send", Object: address(c.nc), Kind: block.KindInvalid,
			Err: fmt.Errorf("%d bytes in one message of type %d, the other side takes at most %d", n, h.typ, most)}
	}
	return nil
}

func (c *Conn) credit(h header) *credit {
	if h.urgent() {
		return &c.urgent
	}
	return &c.normal
}

// begin waits for credit and queues a request.
func (c *Conn) begin(ctx context.Context, h header, parts [][]byte) (*call, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return nil, c.lost()
	}
	cr := c.credit(h)
	if !cr.take(int(h.n)) {
		w := cr.wait(int(h.n))
		c.mu.Unlock()
		var err error
		select {
		case <-w.granted:
		case <-c.done:
			err = c.err
		case <-ctx.Done():
			err = ctx.Err()
		}
		c.mu.Lock()
		if c.err != nil {
			return nil, c.lost()
		}
		if err != nil {
			cr.leave(w)
			return nil, canceled(ctx)
		}
	}
	var k *call
	if l := len(c.idle); l > 0 {
		k, c.idle = c.idle[l-1], c.idle[:l-1]
	} else {
		k = &call{ch: make(chan answer, 1)}
	}
	c.next++
	h.id = c.next
	k.h, k.n, k.left = h, int(h.n), false
	c.calls[h.id] = k
	c.enqueue(h, parts...)
	return k, nil
}

func (c *Conn) recycle(k *call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.idle = append(c.idle, k)
	}
}

// enqueue puts a frame in its queue; mu is held.
func (c *Conn) enqueue(h header, parts ...[]byte) {
	if h.flags&flagControl != 0 || h.urgent() {
		c.first.add(h, parts...)
	} else {
		c.out.add(h, parts...)
	}
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// counted marks that bytes arrived.
type counted struct {
	r io.Reader
	n *atomic.Uint64
}

func (r counted) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if n > 0 {
		r.n.Add(1)
	}
	return n, err
}

// read is the reader. It returns why no more can be read.
func (c *Conn) read() error {
	br := bufio.NewReaderSize(counted{c.nc, &c.got}, 64<<10)
	var hb [headerLen]byte
	for greeted := false; ; {
		if _, err := io.ReadFull(br, hb[:]); err != nil {
			return ended(err)
		}
		h, err := parseHeader(hb[:], c.o.Max)
		if err != nil {
			return err
		}
		if !greeted {
			if h.flags != flagControl || h.typ != ctlHello {
				return protocol("the first frame is no hello")
			}
			greeted = true
			p := make([]byte, h.n)
			if _, err := io.ReadFull(br, p); err != nil {
				return ended(err)
			}
			if err := c.greet(p); err != nil {
				return err
			}
			continue
		}
		switch h.flags {
		case 0:
			err = c.receive(br, h)
		case flagControl:
			if h.typ != ctlPing {
				return protocol("a second hello")
			}
			c.mu.Lock()
			// A peer that pings faster than it reads is answered now and then.
			if len(c.first.b) < 64*headerLen+MaxUrgent {
				c.enqueue(header{typ: ctlPing, flags: flagControl | flagAnswer, id: h.id})
			}
			c.mu.Unlock()
		case flagControl | flagAnswer:
			c.mu.Lock()
			if h.id > c.ping {
				err = protocol("an answer to a ping that was not sent")
			} else {
				c.pong = max(c.pong, h.id)
			}
			c.mu.Unlock()
		default:
			err = c.answered(br, h)
		}
		if err != nil {
			return err
		}
	}
}

func ended(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return errors.New("the other side closed it")
	}
	return err
}

func (c *Conn) greet(p []byte) error {
	h, err := parseHello(p)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.peer = h
	c.normal = credit{calls: int(min(h.limit, 1<<20)), bytes: int(min(h.bytes, 1<<30))}
	c.urgent = credit{calls: int(min(h.urgent, 1<<20)), bytes: 1 << 30}
	close(c.ready)
	return nil
}

// buffers are payloads of requests, used again.
var buffers = sync.Pool{New: func() any { return new([]byte) }}

// receive reads a request and gives it to a worker.
func (c *Conn) receive(br *bufio.Reader, h header) error {
	c.mu.Lock()
	i, limit := 0, c.o.Limit
	if h.urgent() {
		i, limit = 1, urgentLimit
	}
	c.serving[i]++
	over := c.serving[i] > limit
	if i == 0 {
		over = over || c.bytes > 0 && c.bytes+int(h.n) > budget
		c.bytes += int(h.n)
	}
	c.mu.Unlock()
	if over {
		return protocol("more requests at once than were agreed")
	}
	p := buffers.Get().(*[]byte)
	if cap(*p) < int(h.n) {
		*p = make([]byte, h.n)
	}
	*p = (*p)[:h.n]
	if _, err := io.ReadFull(br, *p); err != nil {
		return ended(err)
	}
	r := request{h, p}
	select {
	case c.work <- r:
		return nil
	default:
	}
	if c.workers < c.o.Limit+urgentLimit { // only the reader touches it
		c.workers++
		c.serve.Go(func() { c.worker(r) })
		return nil
	}
	select { // one has answered and is about to wait
	case c.work <- r:
	case <-c.done:
	}
	return nil
}

func (c *Conn) worker(r request) {
	for {
		c.answer(r)
		select {
		case r = <-c.work:
		case <-c.done:
			return
		}
	}
}

// answer serves a request and queues the answer.
func (c *Conn) answer(r request) {
	reply, err := c.o.Serve(c.ctx, r.h.typ, *r.p)
	if err == nil {
		err = c.fits(r.h, len(reply))
	}
	h := header{typ: r.h.typ, flags: flagAnswer, id: r.h.id}
	if err != nil {
		h.flags |= flagError
		h.kind = uint16(block.KindOf(err))
		reply = []byte(clip(err.Error()))
	}
	h.n = uint32(len(reply))
	c.mu.Lock()
	i := 0
	if h.urgent() {
		i = 1
	}
	for i == 0 && c.err == nil && c.answers > 1<<20 {
		c.room.Wait()
	}
	c.serving[i]--
	if i == 0 {
		c.bytes -= len(*r.p)
		c.answers += len(reply)
	}
	if c.err == nil {
		c.enqueue(h, reply)
	}
	c.mu.Unlock()
	buffers.Put(r.p)
}

// answered reads an answer and gives it to its caller.
func (c *Conn) answered(br *bufio.Reader, h header) error {
	c.mu.Lock()
	k := c.calls[h.id]
	left := k != nil && k.left
	c.mu.Unlock()
	if k == nil || k.h.typ != h.typ {
		return protocol("an answer to nothing")
	}
	var a answer
	if left && h.flags&flagError == 0 {
		if _, err := br.Discard(int(h.n)); err != nil {
			return ended(err)
		}
	} else if h.n > 0 {
		a.p = make([]byte, h.n)
		if _, err := io.ReadFull(br, a.p); err != nil {
			return ended(err)
		}
	}
	if h.flags&flagError != 0 {
		a = answer{err: answerError(h.kind, a.p)}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.calls[h.id] != k {
		return nil // the connection has ended, the caller was told
	}
	delete(c.calls, h.id)
	c.credit(k.h).give(k.n)
	if !k.left {
		k.ch <- a
	} else {
		c.idle = append(c.idle, k)
	}
	return nil
}

// watch pings and notices when the other side is gone.
func (c *Conn) watch() {
	t := time.NewTicker(c.o.Idle / ticks)
	defer t.Stop()
	var silent, stuck, unanswered int
	var got, wrote, pong uint64
	for {
		select {
		case <-c.done:
			return
		case <-t.C:
		}
		c.mu.Lock()
		pinged := c.written > pong && c.pong == pong // one was under way at the last tick, and none was answered since
		pong = c.pong
		if c.written == c.ping {
			c.ping++
			c.enqueue(header{typ: ctlPing, flags: flagControl, id: c.ping})
		}
		c.mu.Unlock()
		count := func(n *int, on bool, what string) bool {
			if *n++; !on {
				*n = 0
			}
			if *n < ticks {
				return false
			}
			c.fail(fmt.Errorf("%s for %s", what, c.o.Idle))
			return true
		}
		g, w := c.got.Load(), c.wrote.Load()
		quiet, held := g == got, w == wrote && w&1 == 1
		got, wrote = g, w
		if count(&silent, quiet, "nothing was heard from the other side") ||
			count(&stuck, held, "the other side has taken nothing") ||
			count(&unanswered, pinged, "the other side has answered no ping") {
			return
		}
	}
}
