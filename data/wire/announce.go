package wire

import (
	"context"
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
)

// view is what a session's client holds in one dedup domain.
type view struct {
	count atomic.Int64 // of marks
	mu    sync.RWMutex
	holdings
}

func (v *view) has(m mark) bool {
	if v == nil {
		return false
	}
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.holdings.has(m)
}

func (v *view) at() uint64 {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.version
}

// view returns the session's view of a domain, nil for domain 0. Server.mu is held.
func (ss *session) view(site uint8) *view {
	if site == 0 {
		return nil
	}
	v := ss.held[site]
	if v == nil {
		v = &view{}
		ss.held[site] = v
	}
	return v
}

// marks takes a HAVE or GONE.
func (c *sconn) marks(h header, p []byte) error {
	if h.volume == 0 || h.volume > 255 {
		return protocol("marks of domain %d", h.volume)
	}
	ms, err := parseMarks(c.marked[:0], p)
	if err != nil {
		return err
	}
	c.marked = ms
	s := c.s
	s.mu.Lock()
	v := c.sess.view(uint8(h.volume))
	others := 0
	for _, o := range c.sess.held {
		if o != v {
			others += int(o.count.Load())
		}
	}
	s.mu.Unlock()
	v.mu.Lock()
	switch {
	case h.typ == tGone:
		for _, m := range ms {
			v.remove(m)
		}
	case h.flags&flagAnew != 0:
		v.holdings = holdings{version: v.version + 1}
		fallthrough
	default:
		for _, m := range ms {
			v.add(m, s.o.MaxHeld-others)
		}
	}
	v.count.Store(int64(v.n))
	v.mu.Unlock()
	if h.typ == tHave && h.flags&flagWhole != 0 {
		c.say(appendFrame(nil, header{typ: tHeard, volume: h.volume}, nil))
	}
	return nil
}

// told remembers which chunks of a volume a client has heard of, so that it is
// not told again. Pages of it appear as they are needed.
type told map[int64]*[512]uint64

const toldPage = 512 * 64

func (t told) set(i int64) {
	p := t[i/toldPage]
	if p == nil {
		p = new([512]uint64)
		t[i/toldPage] = p
	}
	p[i%toldPage/64] |= 1 << (i % 64)
}

func (t told) has(i int64) bool {
	p := t[i/toldPage]
	return p != nil && p[i%toldPage/64]&(1<<(i%64)) != 0
}

// tell takes a TELL: from now on the client is told which chunks of a volume
// hold what it holds already.
func (c *sconn) tell(h header) error {
	s := c.s
	s.mu.Lock()
	defer s.mu.Unlock()
	v, err := c.volume(h)
	if err != nil {
		return err
	}
	if c.role == roleDemand {
		return protocol("a tell on the demand connection")
	}
	if v.view == nil || v.sigs == nil || v.telling || c.dead {
		return nil
	}
	v.telling = true
	if c.sess.told[v.handle] == nil {
		c.sess.told[v.handle] = told{}
	}
	c.wg.Go(func() {
		ctx, cancel := until(c.ctx, c.wg, c.done)
		defer cancel()
		(&announcer{c: c, v: v}).run(ctx)
	})
	return nil
}

// announcer tells a client, unasked, of chunks that it holds by content and
// not by place. It walks the volume again when the client's holdings have grown.
type announcer struct {
	c    *sconn
	v    *servedVolume
	seen uint64 // of Signatures.Wait

	first int64 // of sigs
	sigs  []byte
	zeros []run
}

const (
	// announceAgain is the least time between two walks of a volume.
	announceAgain = 2 * time.Second
	// announceIdle is how often it is looked whether there is something new.
	announceIdle = 250 * time.Millisecond
)

// until is a context that also ends when done is closed; wg waits for who
// watches that. The caller cancels it.
func until(ctx context.Context, wg *sync.WaitGroup, done <-chan struct{}) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	wg.Go(func() {
		select {
		case <-done:
		case <-ctx.Done():
		}
		cancel()
	})
	return ctx, cancel
}

// pause waits for d and says whether ctx lasted as long.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

func (a *announcer) run(ctx context.Context) {
	var walked uint64
	for {
		now := a.v.view.at()
		if now == walked {
			if !pause(ctx, announceIdle) {
				return
			}
			continue
		}
		walked = now
		if !a.walk(ctx) || !pause(ctx, announceAgain) {
			return
		}
	}
}

// walk goes through the volume's data once.
func (a *announcer) walk(ctx context.Context) bool {
	size, unit := a.v.info.Size, int64(a.v.chunk)
	for off := int64(0); off < size; {
		es := []block.Extent{{Off: off, Len: size - off, Kind: block.Data}}
		if a.v.info.CanExtents {
			more, err := a.v.dev.Extents(ctx, nil, off, size-off, block.Background)
			if err == nil && len(more) > 0 {
				es = more
			} else if ctx.Err() != nil {
				return false
			}
		}
		for _, e := range es {
			if e.Kind != block.Data {
				continue // the client surveys holes itself
			}
			for i := e.Off / unit; i*unit < e.End(); i++ {
				if !a.chunk(ctx, i) {
					return false
				}
			}
		}
		off = es[len(es)-1].End()
	}
	return a.flush(ctx)
}

// chunk announces chunk i, if the client has what is in it. It waits until
// that is known.
func (a *announcer) chunk(ctx context.Context, i int64) bool {
	sig, zero, ok := a.v.sigs.Get(i)
	for !ok {
		if !a.flush(ctx) {
			return false
		}
		var err error
		if a.seen, err = a.v.sigs.Wait(ctx, a.seen); err != nil {
			return false
		}
		if sig, zero, ok = a.v.sigs.Get(i); !ok && !pause(ctx, 10*time.Millisecond) {
			return false
		}
	}
	if zero {
		if a.heard(i) {
			return true
		}
		if n := len(a.zeros); n > 0 && a.zeros[n-1].first+a.zeros[n-1].n == i {
			a.zeros[n-1].n++
			return true
		}
		if a.zeros = append(a.zeros, run{i, 1}); len(a.zeros) >= 256 {
			return a.flush(ctx)
		}
		return true
	}
	sig = a.v.key.Of(sig)
	if !a.v.view.has(markOf(&sig)) || a.heard(i) {
		return true
	}
	if n := int64(len(a.sigs) / chunk.SigLen); n > 0 && (a.first+n != i || n == sigsPerFrame) {
		if !a.flush(ctx) {
			return false
		}
	}
	if len(a.sigs) == 0 {
		a.first = i
	}
	a.sigs = append(a.sigs, sig[:]...)
	return true
}

// heard says whether the client has heard of chunk i, and that it now will have.
func (a *announcer) heard(i int64) bool {
	s := a.c.s
	s.mu.Lock()
	defer s.mu.Unlock()
	t := a.c.sess.told[a.v.handle]
	if t == nil || t.has(i) {
		return true
	}
	t.set(i)
	return false
}

// flush hands what has gathered to the sender and waits until that has room.
func (a *announcer) flush(ctx context.Context) bool {
	if n := len(a.sigs) / chunk.SigLen; n > 0 {
		f := appendHeader(nil, header{n: uint32(8 + len(a.sigs)), typ: tSame, volume: a.v.handle})
		f = binary.BigEndian.AppendUint64(f, uint64(a.first))
		if !a.c.hint(ctx, append(f, a.sigs...), n) {
			return false
		}
		a.sigs = a.sigs[:0]
	}
	if len(a.zeros) > 0 {
		f := appendHeader(nil, header{n: uint32(runLen * len(a.zeros)), typ: tZeros, volume: a.v.handle})
		n := 0
		for _, r := range a.zeros {
			f = appendRun(f, r)
			n += int(r.n)
		}
		if !a.c.hint(ctx, f, n) {
			return false
		}
		a.zeros = a.zeros[:0]
	}
	return ctx.Err() == nil
}

// hint has the sender send a frame about n chunks when it would send data.
func (c *sconn) hint(ctx context.Context, frame []byte, n int) bool {
	for {
		c.s.mu.Lock()
		if c.dead {
			c.s.mu.Unlock()
			return false
		}
		if c.hints == nil {
			c.hints = frame
			c.s.stats.Announced += int64(n)
			c.s.mu.Unlock()
			c.poke()
			return true
		}
		c.s.mu.Unlock()
		select {
		case <-ctx.Done():
			return false
		case <-c.hinted:
		}
	}
}

// takeHints appends the frame that waits to buf. Server.mu is held.
func (c *sconn) takeHints(buf []byte) []byte {
	if c.hints == nil {
		return buf
	}
	buf = append(buf, c.hints...)
	c.hints = nil
	select {
	case c.hinted <- struct{}{}:
	default:
	}
	return buf
}
