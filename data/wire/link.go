package wire

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
	"forerun/internal/pki"
)

// link is one living connection of a session at the client.
type link struct {
	c      *Client
	slot   int // 0 demand, else background
	nc     net.Conn
	tc     *tls.Conn
	pr     *patientReader
	br     *bufio.Reader
	server string
	ping   time.Duration
	wake   chan struct{}
	room   chan struct{} // out was taken
	done   chan struct{}
	rtt    rtt
	frames atomic.Int64

	roams bool // answers may come on it that were asked for on another one

	partial map[partialKey]*partial // the reader's
	served  bool                    // the reader's: it was of some use

	// Under Client.mu.
	credit      int
	outstanding int
	ready       map[*Remote]bool
	out         []byte // whole frames
	tail        tail
	pongDue     bool
	pong        uint64
	leaving     bool // close when out is written
	dead        bool
}

// tail is the last frame in out, as long as runs can be added to it.
type tail struct {
	typ    frameType
	volume uint16
	req    uint64
	flags  block.Flags
	at     int // where it begins
	last   run // its last run
}

type partialKey struct {
	req   uint64
	index int64
}

type partial struct {
	head  piece
	bytes *lease
	n     int
}

func unavailable(addr string, err error) error {
	return &block.Error{Op: "wire.dial", Object: addr, Kind: block.KindUnavailable, Err: err}
}

// connect makes one connection, up to the welcome. try counts the attempts.
func (c *Client) connect(ctx context.Context, slot, try int) (*link, error) {
	dctx, cancel := context.WithTimeout(ctx, c.o.DialTimeout)
	defer cancel()
	addr := c.o.Addr
	if slot > 0 && try%2 == 0 {
		addr = c.BackgroundAddr()
	}
	nc, err := c.o.Dial(dctx, "tcp", addr)
	if err != nil {
		if ctx.Err() != nil {
			return nil, block.E("wire.dial", c.o.Addr, block.KindCanceled, ctx.Err())
		}
		return nil, unavailable(addr, fmt.Errorf("the backend cannot be reached: %w", err))
	}
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	l, err := c.greet(ctx, nc, slot)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		nc.Close()
		if ctx.Err() != nil {
			return nil, block.E("wire.dial", c.o.Addr, block.KindCanceled, ctx.Err())
		}
		err = pki.Explain(err)
		var be *block.Error
		if errors.As(err, &be) {
			return nil, block.E("wire.dial", c.o.Addr, be.Kind, err)
		}
		return nil, unavailable(c.o.Addr, fmt.Errorf("the connection broke before the backend answered: %w", err))
	}
	return l, nil
}

func (c *Client) greet(ctx context.Context, nc net.Conn, slot int) (*link, error) {
	nc.SetDeadline(time.Now().Add(c.o.DialTimeout))
	h := hello{min: minVersion, max: maxVersion, features: featureRoams, session: c.id, node: c.o.Node}
	if slot > 0 {
		h.role, h.index = roleBackground, uint8(slot-1)
	}
	c.o.Socket.apply(nc, h.role)
	tc := tls.Client(&countedConn{Conn: nc, t: &c.count}, c.tls)
	if err := tc.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	pr := &patientReader{conn: tc}
	l := &link{c: c, slot: slot, nc: nc, tc: tc, pr: pr, br: newFrameReader(pr),
		wake: make(chan struct{}, 1), room: make(chan struct{}, 1), done: make(chan struct{}),
		partial: map[partialKey]*partial{}, ready: map[*Remote]bool{}}
	if _, err := tc.Write(appendHello(nil, h)); err != nil {
		return nil, err
	}
	w, err := readWelcome(l.br)
	if err != nil {
		return nil, err
	}
	nc.SetDeadline(time.Time{})
	pr.idle = c.o.Dead
	c.mu.Lock()
	c.ports = w
	c.mu.Unlock()
	l.roams = slot > 0 && w.features&featureRoams != 0
	l.credit, l.server, l.ping = int(min(w.credit, 1<<20)), w.node, c.o.Ping
	if w.idle > 0 {
		l.ping = max(min(l.ping, w.idle/4), 10*time.Millisecond)
	}
	return l, nil
}

// keep holds the connection of a slot up until the session ends. l is the
// first one, if it is there already.
func (c *Client) keep(slot int, l *link) {
	var (
		up      bool // it was there once
		backoff time.Duration
		try     int
		failing time.Time // since when, zero: it is not
		told    time.Time
	)
	what := connRole(min(slot, 1)).String()
	for c.ctx.Err() == nil {
		if l == nil {
			var err error
			if l, err = c.connect(c.ctx, slot, try); err != nil {
				try++
				if c.ctx.Err() != nil {
					return
				}
				now := time.Now()
				if failing.IsZero() {
					failing = now
				}
				if told.IsZero() || now.Sub(told) >= time.Minute {
					told = now
					c.log.Warn("link cannot be made, trying on", "addr", c.o.Addr, "carries", what, "since", failing, "err", err)
				}
				backoff = min(max(2*backoff, c.o.BackoffMin), c.o.BackoffMax)
				// Spread by a quarter, so that many clients of one backend do not knock in step.
				if !c.sleep(backoff - time.Duration(rand.Int64N(int64(backoff)/4+1))) {
					return
				}
				continue
			}
		}
		failing, told, try = time.Time{}, time.Time{}, 0
		c.log.Info("link up", "addr", c.o.Addr, "carries", what, "backend", l.server)
		began := time.Now()
		err := l.run(up)
		served := l.served
		up, l = true, nil
		if c.ctx.Err() != nil {
			return
		}
		c.log.Warn("link down, connecting again", "addr", c.o.Addr, "carries", what, "err", err)
		lived := time.Since(began)
		if served {
			backoff = 0
		}
		if lived >= c.o.Dead {
			continue // at once
		}
		// One that comes up only to break again must not spin.
		backoff = min(max(2*backoff, c.o.BackoffMin), c.o.BackoffMax)
		if !c.sleep(backoff) {
			return
		}
	}
	if l != nil {
		l.nc.Close()
	}
}

func (c *Client) sleep(d time.Duration) bool {
	return pause(c.ctx, d)
}

// run makes the connection part of the session, serves it until it ends, and
// puts back what it was asked for.
func (l *link) run(again bool) error {
	c := l.c
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		l.nc.Close()
		return net.ErrClosed
	}
	c.slots[l.slot] = l
	if again {
		c.stats.Reconnects++
	}
	if l.slot == 0 {
		c.stats.Up, c.stats.Since = true, time.Now()
	}
	for _, r := range c.remotes {
		l.open(r)
	}
	if l.slot == tellSlot {
		for _, so := range c.sites {
			l.tell(so)
		}
	}
	c.mu.Unlock()
	var wg sync.WaitGroup
	wg.Go(l.send)
	err := l.read()
	if errors.Is(err, errProtocol) {
		l.leave(appendError(nil, 0, 0, wireError{kind: block.KindInvalid, text: err.Error()}), time.Second)
		wg.Wait()
	}
	l.nc.Close()
	c.mu.Lock()
	c.lost(l)
	c.mu.Unlock()
	wg.Wait()
	for _, p := range l.partial {
		p.bytes.release()
	}
	return err
}

// leave has the sender write a last frame, if it can within d, and close.
func (l *link) leave(frame []byte, d time.Duration) {
	l.c.mu.Lock()
	defer l.c.mu.Unlock()
	l.tail = tail{}
	l.out = append(l.out, frame...)
	l.leaving = true
	l.nc.SetWriteDeadline(time.Now().Add(d))
	l.poke()
}

// bye tells the server that the session ends.
func (l *link) bye() {
	l.leave(appendFrame(nil, header{typ: tBye}, appendText(nil, block.KindClosed, "the session was closed")), 100*time.Millisecond)
}

func (l *link) poke() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// say queues whole frames. Client.mu is held.
func (l *link) say(h header, payload []byte) {
	l.tail = tail{}
	l.out = appendFrame(l.out, h, payload)
	l.poke()
}

// order queues one chunk of a FETCH, PROMOTE or CANCEL, in the last frame if
// that is about the same request. Client.mu is held.
func (l *link) order(typ frameType, volume uint16, req uint64, f block.Flags, index int64) {
	t := &l.tail
	size := len(l.out) - t.at - headerLen
	switch {
	case t.typ != typ || t.volume != volume || t.req != req || t.flags != f || size+runLen > MaxPayload:
		*t = tail{typ: typ, volume: volume, req: req, flags: f, at: len(l.out)}
		l.out = appendHeader(l.out, header{typ: typ, volume: volume, req: req})
		if typ == tFetch {
			l.out = binary.BigEndian.AppendUint32(l.out, uint32(f))
		}
	case t.last.first+t.last.n == index:
		t.last.n++
		binary.BigEndian.PutUint32(l.out[len(l.out)-4:], uint32(t.last.n))
		l.poke()
		return
	}
	t.last = run{index, 1}
	l.out = appendRun(l.out, t.last)
	binary.BigEndian.PutUint32(l.out[t.at:], uint32(len(l.out)-t.at-headerLen))
	l.poke()
}

// send writes what is queued, and pings.
func (l *link) send() {
	c := l.c
	defer l.nc.Close() // the reader sees it and cleans up
	tick := time.NewTicker(l.ping)
	defer tick.Stop()
	var buf []byte
	ping := true // the first one at once, to know the round trip early
	for {
		c.mu.Lock()
		if l.dead {
			c.mu.Unlock()
			return
		}
		buf, l.out = l.out, buf[:0]
		l.tail = tail{}
		select {
		case l.room <- struct{}{}:
		default:
		}
		if l.pongDue {
			l.pongDue = false
			buf = appendFrame(buf, header{typ: tPong}, binary.BigEndian.AppendUint64(nil, l.pong))
		}
		leaving := l.leaving
		if len(buf) > 0 && !leaving {
			c.pump() // there may be room for more now
		}
		c.mu.Unlock()
		if ping {
			ping = false
			buf = appendFrame(buf, header{typ: tPing}, binary.BigEndian.AppendUint64(nil, l.rtt.ping()))
		}
		if len(buf) > 0 {
			if _, err := l.tc.Write(buf); err != nil || leaving {
				return
			}
			continue
		}
		select {
		case <-l.done:
			return
		case <-l.wake:
		case <-tick.C:
			ping = true
			c.mu.Lock()
			for _, r := range c.remotes {
				l.open(r) // one that the server refused when the link came back is tried again
			}
			c.mu.Unlock()
		}
	}
}

// read takes frames until the connection ends.
func (l *link) read() error {
	for {
		h, p, err := readFrame(l.br)
		if err != nil {
			return err
		}
		l.frames.Add(1)
		l.served = l.served || h.typ >= tOpen
		switch h.typ {
		case tChunk:
			err = l.begin(h, p)
		case tMore:
			err = l.more(h, p)
		case tZeros:
			err = l.zeros(h, p)
		case tSame:
			err = l.same(h, p)
		case tHeard:
			l.heard(h)
		case tPing, tPong:
			if len(p) != 8 {
				return protocol("a ping of %d bytes", len(p))
			}
			if t := binary.BigEndian.Uint64(p); h.typ == tPong {
				l.rtt.pong(t)
			} else {
				l.c.mu.Lock()
				l.pong, l.pongDue = t, true
				l.c.mu.Unlock()
				l.poke()
			}
		case tCredit:
			if len(p) != 4 {
				return protocol("a credit of %d bytes", len(p))
			}
			l.c.mu.Lock()
			l.credit = int(min(max(binary.BigEndian.Uint32(p), 1), 1<<20))
			l.c.pump()
			l.c.mu.Unlock()
		case tWish:
			if len(p) == 1 {
				l.c.grow(int(p[0]))
			}
		case tVolume:
			err = l.volume(h, p)
		case tRanges:
			err = l.ranges(h, p)
		case tError:
			err = l.failed(h, p)
		case tBye:
			_, text, err := parseText(p)
			if err != nil {
				return err
			}
			return fmt.Errorf("the backend says: %s: %w", text, io.EOF)
		default:
			err = unknown(h)
		}
		if err != nil {
			return err
		}
	}
}

// begin takes the first frame of a chunk, which may be all of it.
func (l *link) begin(h header, p []byte) error {
	pc, err := parseChunk(p)
	if err != nil {
		return err
	}
	k := partialKey{h.req, pc.index}
	if old := l.partial[k]; old != nil {
		return protocol("chunk %d begins twice", pc.index)
	}
	if len(pc.data) == pc.packed {
		return l.arrived(h, pc.index, chunk.Packed{Sig: pc.sig, Codec: pc.codec, Plain: pc.plain, Data: pc.data}, nil)
	}
	if len(l.partial) >= maxPartial {
		return protocol("more than %d chunks begun and not finished", maxPartial)
	}
	l.c.mu.Lock()
	wanted := l.c.find(h, pc.index) != nil
	l.c.mu.Unlock()
	part := &partial{head: pc, n: len(pc.data)}
	part.head.data = nil
	if wanted { // else only its frames are followed
		part.bytes = l.c.leases.get(pc.packed)
		copy(part.bytes.b, pc.data)
	}
	l.partial[k] = part
	return nil
}

func (l *link) more(h header, p []byte) error {
	index, off, data, err := parseMore(p)
	if err != nil {
		return err
	}
	k := partialKey{h.req, index}
	part := l.partial[k]
	if part == nil || off != part.n || off+len(data) > part.head.packed {
		return protocol("chunk %d goes on at %d where it cannot", index, off)
	}
	if part.bytes != nil {
		copy(part.bytes.b[off:], data)
	}
	if part.n += len(data); part.n < part.head.packed {
		return nil
	}
	delete(l.partial, k)
	if part.bytes == nil {
		return nil
	}
	defer part.bytes.release()
	return l.arrived(h, index, chunk.Packed{Sig: part.head.sig, Codec: part.head.codec, Plain: part.head.plain,
		Data: part.bytes.b[:part.head.packed]}, nil)
}

func (l *link) zeros(h header, p []byte) error {
	v, ok := l.c.known(h)
	if !ok {
		return nil // closed meanwhile
	}
	runs, err := parseRuns(nil, p, v.chunks(), 1<<21)
	if err != nil {
		return err
	}
	if h.req == 0 {
		l.told(h, func(a Announced) {
			for _, r := range runs {
				a.Zeros(r.first, r.n)
			}
		}, runs)
		return nil
	}
	for _, r := range runs {
		for i := r.first; i < r.first+r.n; i++ {
			if err := l.arrived(h, i, chunk.Packed{Codec: chunk.Zeros, Plain: v.length(i)}, nil); err != nil {
				return err
			}
		}
	}
	return nil
}

// same takes signatures: the answer to a request, or unasked.
func (l *link) same(h header, p []byte) error {
	v, ok := l.c.known(h)
	if !ok {
		return nil // closed meanwhile
	}
	first, sigs, err := parseSame(p, v.chunks())
	if err != nil {
		return err
	}
	n := int64(len(sigs)) / chunk.SigLen
	if h.req == 0 {
		l.told(h, func(a Announced) {
			for i := range n {
				a.Same(first+i, chunk.Sig(sigs[i*chunk.SigLen:]))
			}
		}, []run{{first, n}})
		return nil
	}
	for i := range n {
		q := chunk.Packed{Sig: chunk.Sig(sigs[i*chunk.SigLen:]), Codec: chunk.Known, Plain: v.length(first + i)}
		if err := l.arrived(h, first+i, q, nil); err != nil {
			return err
		}
	}
	return nil
}

// told hands on what the server said unasked.
func (l *link) told(h header, f func(Announced), runs []run) {
	c := l.c
	c.mu.Lock()
	r := c.remotes[h.volume]
	if r == nil || !l.ready[r] || r.announced == nil || r.closing {
		c.mu.Unlock()
		return
	}
	for _, x := range runs {
		c.stats.Announced += x.n
	}
	a := r.announced
	r.calls.Add(1)
	c.mu.Unlock()
	defer r.calls.Done()
	f(a)
}

// failed takes an ERROR: of an OPEN, an EXTENTS, some chunks, or the connection.
func (l *link) failed(h header, p []byte) error {
	c := l.c
	limit := int64(0)
	v, ok := c.known(h)
	if ok {
		limit = v.chunks()
	} else if h.req != 0 {
		limit = 1<<63 - 1 // closed meanwhile: it is parsed and forgotten
	}
	e, err := parseError(p, limit, 1<<21)
	if err != nil {
		return err
	}
	said := &block.Error{Op: "wire.backend", Object: c.o.Addr, Kind: e.kind, Err: errors.New(e.text)}
	if h.req == 0 {
		return fmt.Errorf("the backend closed the connection: %w", said)
	}
	c.mu.Lock()
	if o, ok := c.opens[h.req]; ok && o.on == l {
		delete(c.opens, h.req)
		news := o.refused(said)
		c.mu.Unlock()
		if news {
			c.log.Warn("the backend does not open the volume again, trying on", "volume", o.r.name, "err", said)
		}
		return nil
	}
	if a := c.asides[h.req]; a != nil && a.on == l {
		delete(c.asides, h.req)
		a.finish(said)
		c.mu.Unlock()
		return nil
	}
	var all []int64
	if r := c.remotes[h.volume]; r != nil && len(e.runs) == 0 {
		for i, en := range r.wanted {
			for ; en != nil; en = en.same {
				if en.call.id == h.req && en.on == l {
					all = append(all, i)
				}
			}
		}
	}
	c.mu.Unlock()
	for _, i := range all {
		if err := l.arrived(h, i, chunk.Packed{}, said); err != nil {
			return err
		}
	}
	for _, r := range e.runs {
		for i := r.first; i < r.first+r.n; i++ {
			if err := l.arrived(h, i, chunk.Packed{}, said); err != nil {
				return err
			}
		}
	}
	return nil
}
