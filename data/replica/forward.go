package replica

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"forerun/block"
)

// Forwarding. A call that changes something is sent again until somebody says
// that it was done, so an old copy of it must never be carried out after a
// newer change was acknowledged. Changes therefore belong to a session too: its
// token is the primary's choice, a new session begins when nothing of the old
// one is under way there, and a call whose outcome is not known ends it. The
// primary never forwards what was forwarded to it.

//
// A client that has gone to the other node may not wait for what this one has
// under way for it, and so a copy on a line that stands still could come behind
// newer changes all the same. So each forwarded change has a time, by the
// primary's clock, after which it is refused: Stale after it was sent, at the
// latest. Whoever repeats at one node what it sent to the other waits that long
// after it has left.

// Stale is how long a change that was forwarded can be carried out for a client
// that has gone.
const Stale = time.Second

// clockAge is how long a reading of the primary's clock is good for: after that
// the clocks may have gone apart.
const clockAge = time.Minute

// forwarder is the secondary's side.
type forwarder struct {
	opening chan struct{} // one place
	mu      sync.Mutex
	epoch   uint64
	token   uint64 // 0: none
	// The primary's clock showed clock at some time before read.
	clock time.Duration
	read  time.Time
}

// guests is the primary's side: the session of the node that forwards.
type guests struct {
	mu  sync.Mutex
	cur *inbound
}

// get returns the token of the session of that epoch, and until when, by the
// primary's clock, what is sent now may be done.
func (fw *forwarder) get(epoch uint64) (token uint64, until time.Duration) {
	fw.mu.Lock()
	defer fw.mu.Unlock()
	since := time.Since(fw.read)
	if fw.epoch != epoch || since > clockAge {
		return 0, 0
	}
	return fw.token, fw.clock + since + Stale
}

// show takes in what the primary's clock showed when it answered.
func (fw *forwarder) show(token uint64, p []byte) {
	fw.mu.Lock()
	defer fw.mu.Unlock()
	if len(p) == clockLen && fw.token == token {
		fw.clock, fw.read = time.Duration(binary.BigEndian.Uint64(p)), time.Now()
	}
}

// clockLen is the length of a time in messages: nanoseconds since the volume
// was opened at the primary.
const clockLen = 8

func (v *Volume) showClock() []byte {
	return binary.BigEndian.AppendUint64(nil, uint64(v.ticks()))
}

func (fw *forwarder) drop(token uint64) {
	fw.mu.Lock()
	defer fw.mu.Unlock()
	if fw.token == token {
		fw.token = 0
	}
}

// bounded bounds a call to the primary: it ends with ctx, after d, or when this
// node's role changes.
func (v *Volume) bounded(ctx context.Context, st *standing, d time.Duration) (context.Context, context.CancelFunc) {
	c, cancel := context.WithTimeout(ctx, d)
	stop := context.AfterFunc(st.term, cancel)
	return c, func() { stop(); cancel() }
}

// token returns that of the session with the primary, and makes one if need be.
func (v *Volume) token(ctx context.Context, st *standing) (uint64, time.Duration, error) {
	fw := &v.forward
	if t, until := fw.get(st.rec.Epoch); t != 0 {
		return t, until, nil
	}
	select {
	case fw.opening <- struct{}{}:
	case <-ctx.Done():
		return 0, 0, ctx.Err()
	}
	defer func() { <-fw.opening }()
	if t, until := fw.get(st.rec.Epoch); t != 0 {
		return t, until, nil
	}
	c, done := v.bounded(ctx, st, fwdTime)
	defer done()
	t := rand.Uint64() | 1
	out, err := v.cfg.Forward.Call(c, typFwdOpen, body{token: t, off: int64(st.rec.Epoch)}.append(slices.Clone(v.name)))
	if err != nil {
		return 0, 0, err
	}
	if len(out) != clockLen {
		return 0, 0, errShort
	}
	fw.mu.Lock()
	fw.epoch, fw.token = st.rec.Epoch, t
	fw.mu.Unlock()
	fw.show(t, out)
	t, until := fw.get(st.rec.Epoch)
	return t, until, nil
}

// forwardCall sends one call to the primary and waits for the answer. again:
// ask whoever is primary then; nothing is acknowledged. get takes the answer.
func (v *Volume) forwardCall(ctx context.Context, st *standing, typ uint8, b body, p []byte, get func(p []byte) error) (again bool, err error) {
	if v.cfg.Forward == nil {
		v.setReason("this node is secondary and has no way to the primary %s; start it with a peer", st.rec.Primary)
		return true, v.pause(ctx, st, 0)
	}
	changes := typ >= typFwdWrite && typ <= typFwdTrim
	wait := func() (bool, error) { return true, v.pause(ctx, st, 50*time.Millisecond) }
	use := ctx
	parts := [3][]byte{nil, nil, p}
	if changes {
		var until time.Duration
		if b.token, until, err = v.token(ctx, st); err != nil {
			if ctx.Err() != nil {
				return false, ctx.Err()
			}
			return wait()
		}
		// The caller's bytes and order count until the outcome is known; the
		// primary answers soon, if only to say "not now".
		use = context.WithoutCancel(ctx)
		parts[1] = binary.BigEndian.AppendUint64(nil, uint64(until))
	}
	parts[0] = b.append(slices.Clone(v.name))
	c, done := v.bounded(use, st, fwdLimit)
	out, err := v.cfg.Forward.Call(c, typ, parts[:]...)
	done()
	switch block.KindOf(err) {
	case block.KindNone:
		if changes {
			v.forward.show(b.token, out)
		}
		if get != nil {
			if err := get(out); err != nil {
				return false, err
			}
		}
		return false, nil
	case block.KindUnavailable, block.KindCanceled, block.KindClosed:
		if changes {
			v.forward.drop(b.token)
		}
	case block.KindFenced:
		if changes {
			v.forward.drop(b.token)
		}
	case block.KindBusy, block.KindNotFound:
	default:
		return false, err
	}
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	return wait()
}

func (v *Volume) forwardChange(ctx context.Context, st *standing, c change) (again bool, err error) {
	// FUA goes with the last piece: it makes all before it durable too.
	f := c.f
	for c.n > 0 && err == nil && !again {
		if again = v.now.Load().role != secondary; again {
			break
		}
		q := c.piece()
		q.f = f
		if c.n > 0 {
			q.f &^= block.FUA
		}
		again, err = v.forwardCall(ctx, st, q.typ-typWrite+typFwdWrite, body{off: q.off, n: q.n, flags: q.f}, q.p, nil)
	}
	return again, err
}

func (v *Volume) forwardRead(ctx context.Context, st *standing, p []byte, off int64, f block.Flags) (again bool, err error) {
	for len(p) > 0 && !again && err == nil {
		q := p[:min(len(p), bigPiece)]
		again, err = v.forwardCall(ctx, st, typFwdRead, body{off: off, n: int64(len(q)), flags: f}, nil, func(got []byte) error {
			if len(got) != len(q) {
				return errShort
			}
			copy(q, got)
			return nil
		})
		p, off = p[len(q):], off+int64(len(q))
	}
	return again, err
}

func (v *Volume) forwardExtents(ctx context.Context, st *standing, dst []block.Extent, off, n int64, f block.Flags) (out []block.Extent, again bool, err error) {
	out = dst
	again, err = v.forwardCall(ctx, st, typFwdExtents, body{off: off, n: n, flags: f}, nil, func(p []byte) error {
		list, err := parseExtents(nil, p)
		out = append(dst, list...)
		return err
	})
	return out, again, err
}

// maxExtents is how many extents one answer carries.
const maxExtents = 4096

// serveForward does what a client of the other node asks for, here, as primary.
func (v *Volume) serveForward(ctx context.Context, typ uint8, b body, p []byte) ([]byte, error) {
	st := v.now.Load()
	if st.role != primary {
		return nil, v.fault("forward", block.KindFenced, "this node is not primary")
	}
	r := st.reign
	ctx, cancel := context.WithTimeout(ctx, fwdTime)
	defer cancel()
	if typ == typFwdOpen {
		if uint64(b.off) != r.epoch {
			return nil, v.fault("forward", block.KindFenced, "this is epoch %d", r.epoch)
		}
		if err := v.admit(ctx, b.token); err != nil {
			return nil, err
		}
		return v.showClock(), nil
	}
	if typ >= typFwdWrite && typ <= typFwdTrim {
		if len(p) < clockLen {
			return nil, errShort
		}
		left := time.Duration(binary.BigEndian.Uint64(p)) - v.ticks()
		if p = p[clockLen:]; left <= 0 || left > Stale+clockAge {
			return nil, v.fault("forward", block.KindFenced, "it comes too late")
		}
		var late context.CancelFunc
		ctx, late = context.WithTimeout(ctx, left)
		defer late()
	}
	if typ != typFwdFlush {
		if err := v.inside(b); err != nil {
			return nil, err
		}
	}
	var out []byte
	var again bool
	var err error
	switch typ {
	case typFwdWrite, typFwdZero, typFwdTrim:
		if typ == typFwdWrite && int64(len(p)) != b.n {
			return nil, errShort
		}
		if err := v.writable(typ, b.off, b.n); err != nil {
			return nil, err
		}
		v.guests.mu.Lock()
		s := v.guests.cur
		v.guests.mu.Unlock()
		if s == nil || s.token != b.token || !s.enter() {
			return nil, v.fault("forward", block.KindFenced, "this session is over")
		}
		defer s.leave()
		defer context.AfterFunc(s.ctx, cancel)()
		c := change{typ: typ - typFwdWrite + typWrite, p: p, off: b.off, n: b.n, f: b.flags}
		if typ != typFwdWrite {
			c.p = nil
		}
		if again, err = v.lead(ctx, r, c); err == nil {
			out = v.showClock()
		}
	case typFwdFlush:
		again, err = v.leadFlush(ctx, r, b.flags)
	default:
		if !st.open {
			return nil, v.fault("forward", block.KindBusy, "not now")
		}
		switch typ {
		case typFwdRead:
			if b.n > bigPiece {
				return nil, errShort
			}
			out = make([]byte, b.n)
			err = v.cfg.Local.ReadAt(ctx, out, b.off, b.flags)
		case typFwdExtents:
			var list []block.Extent
			list, err = v.cfg.Local.Extents(ctx, nil, b.off, min(b.n, window), b.flags)
			out = appendExtents(nil, list[:min(len(list), maxExtents)])
		case typFwdPrefetch:
			err = v.cfg.Local.Prefetch(ctx, b.off, b.n, b.flags)
		}
		if err == nil {
			err, again = v.leased(ctx, r)
		} else if v.resign(ctx, r, err) {
			err, again = nil, true
		}
	}
	switch {
	case again:
		return nil, v.fault("forward", block.KindFenced, "this node is not primary any more")
	case err == nil:
		return out, nil
	case ctx.Err() != nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || block.KindOf(err) == block.KindCanceled):
		return nil, v.fault("forward", block.KindBusy, "not now: %w", err)
	}
	return nil, v.tell("forward", err)
}

// admit begins a session of the node that forwards, when nothing of an earlier
// one can still happen.
func (v *Volume) admit(ctx context.Context, token uint64) error {
	n := &inbound{token: token, idle: make(chan struct{})}
	n.ctx, n.stop = context.WithCancel(v.base)
	v.guests.mu.Lock()
	old := v.guests.cur
	if old != nil {
		old.close()
	}
	v.guests.mu.Unlock()
	if old != nil {
		if err := old.drain(ctx); err != nil {
			n.stop()
			return err
		}
	}
	v.guests.mu.Lock()
	defer v.guests.mu.Unlock()
	if v.guests.cur != old {
		n.stop()
		return v.fault("forward", block.KindBusy, "another session is being opened")
	}
	v.guests.cur = n
	return nil
}
