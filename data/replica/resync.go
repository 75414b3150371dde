package replica

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"forerun/block"
)

const (
	copyPiece   = 256 << 10 // bytes copied under one lock of their range
	copyWorkers = 4
	hashPiece   = 64 << 10
	copyTime    = 5 * time.Second
	scanTime    = time.Minute
	flushTime   = 30 * time.Second
	window      = 1 << 30 // bytes whose extents are asked for at once
)

// keep holds a session: brings the other node up to date while writes go on,
// has it recorded as a member, and moves the holds. It returns why it ended.
func (v *Volume) keep(r *reign, s *session) error {
	v.mu.Lock()
	if v.now.Load().reign != r {
		v.mu.Unlock()
		return r.ctx.Err()
	}
	member := v.known.rec.Member(s.node) && !v.cfg.Fence.Doubt()
	r.beaten = time.Now()
	v.reason = "the other node is being brought up to date"
	// It has agreed to this epoch, so it is not the primary any more to which this
	// one may have given its word.
	r.free = true
	v.updateLocked(func(n *standing) {
		// Until the other node has everything, nobody takes over from this one: what
		// is acknowledged has to be here after a power cut.
		n.ship, n.inSync, n.alone, n.sync = s, false, false, !member || !s.whole
		n.open = n.settled && !n.leaving
	})
	v.mu.Unlock()
	v.log.Info("replica: session", "with", s.node, "member", member)
	// From here on every write goes to both. Those that began before must be in
	// the journal when it is asked what was changed.
	if err := v.ranges.barrier(s.ctx); err != nil {
		return err
	}
	if err := v.resync(s); err != nil {
		return err
	}
	if _, err := v.call(s, flushTime, typSettle, body{}); err != nil {
		return err
	}
	if !member {
		v.update(func(n *standing) { n.sole = false }) // from here on the other may take over
	}
	for !member {
		if member = v.setMembers(r, v.cfg.Node, s.node); !member {
			nap(s.ctx, renewEvery)
		}
		if err := s.ctx.Err(); err != nil {
			return err
		}
	}
	v.mu.Lock()
	if v.now.Load().ship == s {
		v.reason = ""
		v.updateLocked(func(n *standing) { n.inSync, n.sync, n.settled, n.open = true, false, true, r.free && !n.leaving })
	}
	v.mu.Unlock()
	v.log.Info("replica: in sync", "with", s.node)
	v.beat(r)
	return v.attend(r, s)
}

// attend moves the holds while a session is in sync, and hands over to the
// preferred node when it is time.
func (v *Volume) attend(r *reign, s *session) error {
	began, done := time.Now(), ^uint64(0)
	for {
		// A hold that the journal gave up, when it was short of space, is taken anew.
		_, held := v.cfg.Log.Held(holdName)
		if now := v.writes.Load(); now != done || !held {
			if err := v.moveHolds(s); err == nil {
				done = now
			} else if s.ctx.Err() == nil {
				v.log.Info("replica: the holds stay where they are", "err", err)
			}
		}
		nap(s.ctx, holdEvery)
		if err := s.ctx.Err(); err != nil {
			return err
		}
		rec := v.now.Load().rec
		if after := v.cfg.FailBackAfter; after > 0 && rec.Preferred == s.node && time.Since(began) >= after {
			if err := v.handOver(s.ctx, false); err != nil {
				v.setReason("handing back to %s: %v", s.node, err)
				began = time.Now()
			}
		}
	}
}

// moveHolds moves both nodes' holds to where the other durably has everything.
func (v *Volume) moveHolds(s *session) error {
	there, err := v.call(s, callTime, typMark, body{})
	if err != nil {
		return err
	}
	here := v.cfg.Log.Position()
	// What the other node has appended up to there is here when the writes under
	// way have ended; one that did not end well has ended the session.
	if err := v.ranges.barrier(s.ctx); err != nil {
		return err
	}
	if err := v.cfg.Local.Flush(s.ctx, block.Background); err != nil {
		return err
	}
	if err := s.ctx.Err(); err != nil {
		return err
	}
	if err := v.holdThere(s, holdName, there); err != nil {
		return err
	}
	return v.cfg.Log.Hold(holdName, here)
}

func (v *Volume) holdThere(s *session, name string, pos []byte) error {
	_, err := v.call(s, flushTime, typHold, body{}, append(append([]byte(name), 0), pos...)...)
	return err
}

// MarkPeer answers the position of the other node's journal, when it is in
// sync. Inside Freeze it is the same moment as this node's own.
func (v *Volume) MarkPeer(ctx context.Context) (pos string, ok bool) {
	st := v.now.Load()
	if st.ship == nil || !st.inSync {
		return "", false
	}
	c, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	p, err := v.cfg.Peer.Call(c, typMark, body{token: st.ship.token}.append(slices.Clone(v.name)))
	return string(p), err == nil
}

// HoldPeer makes the other node keep what follows pos in its journal, under a
// name; pos is one that MarkPeer gave.
func (v *Volume) HoldPeer(ctx context.Context, name, pos string) error {
	st := v.now.Load()
	if st.ship == nil {
		return v.fault("hold", block.KindUnavailable, "there is no session with the other node")
	}
	more := append(append([]byte(name), 0), pos...)
	c, cancel := context.WithTimeout(ctx, flushTime)
	defer cancel()
	_, err := v.cfg.Peer.Call(c, typHold, body{token: st.ship.token}.append(slices.Clone(v.name)), more)
	return err
}

// changed is what this node's content may differ in from the other's: behind
// the hold, or, with full, everything that is not as it came from the source.
func (v *Volume) changed(ctx context.Context, full bool) (list []block.Extent, known bool, err error) {
	s := newSpans(v.info.Size, v.info.BlockSize)
	if !full {
		known, err = v.cfg.Log.Changed(ctx, holdName, s.add)
		return s.all(), known, err
	}
	var buf []block.Extent
	for at := int64(0); at < v.info.Size; {
		if buf, err = v.cfg.Local.Extents(ctx, buf[:0], at, min(v.info.Size-at, window), block.Local|block.Background); err != nil {
			return nil, false, err
		}
		for _, e := range buf {
			if e.State == block.Modified || e.State == block.ZeroState || e.State == block.NoState && !e.Kind.Zero() {
				s.add(e.Off, e.Len)
			}
			at = e.End()
		}
	}
	return s.all(), true, nil
}

// theirs asks the other node the same.
func (v *Volume) theirs(s *session, full bool) (list []block.Extent, known bool, err error) {
	b := body{}
	if full {
		b.n = 1
	}
	p, err := v.call(s, scanTime, typRanges, b)
	if err != nil {
		return nil, false, err
	}
	if len(p) < 1 {
		return nil, false, errShort
	}
	list, err = parseExtents(nil, p[1:])
	return list, p[0] == 1, err
}

// resync copies to the other node all ranges in which the two may differ.
func (v *Volume) resync(s *session) error {
	all := newSpans(v.info.Size, v.info.BlockSize)
	collect := func(full bool) (bool, error) {
		mine, known, err := v.changed(s.ctx, full)
		if err != nil || !known {
			return false, err
		}
		their, known, err := v.theirs(s, full)
		if err != nil || !known {
			return false, err
		}
		for _, list := range [][]block.Extent{mine, their} {
			for _, e := range list {
				all.add(e.Off, e.Len)
			}
		}
		return true, nil
	}
	known, err := collect(false)
	if err != nil {
		return err
	}
	compare := !known
	if compare {
		v.log.Info("replica: it is not known what the nodes differ in; they are compared")
		if _, err := collect(true); err != nil {
			return err
		}
	}
	list := all.all()
	left := all.bytes()
	v.progress(left)
	defer v.progress(0)
	var done atomic.Int64
	g, ctx := errgroup.WithContext(s.ctx)
	pieces := make(chan block.Extent)
	for range copyWorkers {
		g.Go(func() error {
			o := v.newOp()
			buf := make([]byte, copyPiece)
			for e := range pieces {
				if err := v.copyPiece(ctx, s, o, buf, e, compare); err != nil {
					return err
				}
				v.progress(left - done.Add(e.Len))
			}
			return nil
		})
	}
	g.Go(func() error {
		defer close(pieces)
		for _, e := range list {
			for at := e.Off; at < e.End(); {
				to := min((at/copyPiece+1)*copyPiece, e.End())
				select {
				case pieces <- block.Extent{Off: at, Len: to - at}:
				case <-ctx.Done():
					return ctx.Err()
				}
				at = to
			}
		}
		return nil
	})
	return g.Wait()
}

func (v *Volume) progress(left int64) {
	v.mu.Lock()
	v.left = left
	v.mu.Unlock()
}

// copyPiece makes one range of the other node equal to this one's. No write
// touches it meanwhile.
func (v *Volume) copyPiece(ctx context.Context, s *session, o *op, buf []byte, e block.Extent, compare bool) error {
	// What only the source has is fetched before anybody has to wait for the lock.
	for tries := 0; ; tries++ {
		near, err := v.near(ctx, e.Off, e.Len)
		if near || err == nil && tries > 3 { // it cannot be kept near, but perhaps read
			break
		}
		if err == nil {
			err = v.cfg.Local.Prefetch(ctx, e.Off, e.Len, block.Background)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			v.setReason("bringing the other node up to date waits for the source: %v", err)
			tries = 0
		}
		if err != nil || tries > 0 {
			nap(ctx, time.Second)
		}
	}
	o.off, o.n = e.Off, e.Len
	if err := v.ranges.lock(ctx, v.closing, o); err != nil {
		return err
	}
	defer v.ranges.unlock(o)
	if !compare {
		return v.copyRange(ctx, s, buf, e.Off, e.Len)
	}
	their, err := v.call(s, copyTime, typHash, body{off: e.Off, n: e.Len})
	if err != nil {
		return err
	}
	mine, err := v.hashes(ctx, e.Off, e.Len)
	if err != nil {
		return err
	}
	if len(mine) != len(their) {
		return errShort
	}
	for at := e.Off; at < e.End(); {
		to := min((at/hashPiece+1)*hashPiece, e.End())
		a, b := mine[:hashLen], their[:hashLen]
		mine, their = mine[hashLen:], their[hashLen:]
		if b[0] == hashNone || !bytes.Equal(a, b) {
			if err := v.copyRange(ctx, s, buf, at, to-at); err != nil {
				return err
			}
		}
		at = to
	}
	return nil
}

// near says whether the range can be read without the link.
func (v *Volume) near(ctx context.Context, off, n int64) (bool, error) {
	var buf [16]block.Extent
	for end := off + n; off < end; {
		list, err := v.cfg.Local.Extents(ctx, buf[:0], off, end-off, block.Local|block.Background)
		if err != nil {
			return false, err
		}
		for _, e := range list {
			if e.State == block.Untouched {
				return false, nil
			}
			off = e.End()
		}
	}
	return true, nil
}

// copyRange sends what is here to the other node; the range is locked.
func (v *Volume) copyRange(ctx context.Context, s *session, buf []byte, off, n int64) error {
	var ext [16]block.Extent
	for end := off + n; off < end; {
		list, err := v.cfg.Local.Extents(ctx, ext[:0], off, end-off, block.Local|block.Background)
		if err != nil {
			return err
		}
		e := list[0]
		b := body{token: s.token, off: e.Off, n: e.Len, flags: block.Background}
		typ, data := typWrite, buf[:0]
		if e.Kind.Zero() {
			typ, b.flags = typZero, block.Background|block.MayTrim
		} else {
			data = buf[:min(e.Len, int64(len(buf)))]
			b.n = int64(len(data))
			if err := v.cfg.Local.ReadAt(ctx, data, off, block.Background); err != nil {
				return err
			}
		}
		for {
			c, cancel := context.WithTimeout(ctx, copyTime)
			_, err = v.cfg.Peer.Call(c, typ, b.append(slices.Clone(v.name)), data)
			cancel()
			if block.KindOf(err) != block.KindNoSpace {
				break
			}
			v.setReason("bringing the other node up to date waits for space there: %v", err)
			nap(ctx, time.Second)
		}
		if err != nil {
			return err
		}
		off += b.n
	}
	return nil
}

// The answer to a hash message has, for each piece of 64 KiB, one of these
// and 32 bytes.
const (
	hashNone  = 0 // not at this node
	hashBytes = 1 // SHA-256
	hashZero  = 2 // zeros
	hashLen   = 1 + sha256.Size
)

// hashes says what is here, piece by piece; it never crosses the link.
func (v *Volume) hashes(ctx context.Context, off, n int64) ([]byte, error) {
	if n > copyPiece {
		return nil, v.fault("hash", block.KindInvalid, "%d bytes in one request, at most %d", n, copyPiece)
	}
	var out []byte
	var ext [16]block.Extent
	buf := make([]byte, hashPiece)
	for end := off + n; off < end; {
		to := min((off/hashPiece+1)*hashPiece, end)
		what := byte(hashZero)
		for at := off; at < to; {
			list, err := v.cfg.Local.Extents(ctx, ext[:0], at, to-at, block.Local|block.Background)
			if err != nil {
				return nil, err
			}
			for _, e := range list {
				if e.State == block.Untouched {
					what = hashNone
				} else if !e.Kind.Zero() && what == hashZero {
					what = hashBytes
				}
				at = e.End()
			}
		}
		out = append(out, what)
		var sum [sha256.Size]byte
		if what == hashBytes {
			p := buf[:to-off]
			if err := v.cfg.Local.ReadAt(ctx, p, off, block.Background); err != nil {
				return nil, err
			}
			if zero(p) {
				out[len(out)-1] = hashZero
			} else {
				sum = sha256.Sum256(p)
			}
		}
		out = append(out, sum[:]...)
		off = to
	}
	return out, nil
}

var zeros [4096]byte

func zero(p []byte) bool {
	for ; len(p) > len(zeros); p = p[len(zeros):] {
		if !bytes.Equal(p[:len(zeros)], zeros[:]) {
			return false
		}
	}
	return bytes.Equal(p, zeros[:len(p)])
}

// Freeze calls fn while no write is under way and none begins: a moment for a
// cut. Reads go on. At a node that is not primary it fails with KindFenced.
func (v *Volume) Freeze(ctx context.Context, fn func() error) error {
	if err := v.enter("freeze"); err != nil {
		return err
	}
	v.life.RUnlock() // fn may call, and Close must not come in between
	called := false
	err := v.gate.during(ctx, func() error {
		called = true
		if st := v.now.Load(); !v.solo && st.role != primary {
			return v.fault("freeze", block.KindFenced, "this node is %s; the primary is %s", st.role, st.rec.Primary)
		}
		return fn()
	})
	if err != nil && !called {
		err = block.E("replica.freeze", v.cfg.Volume, 0, fmt.Errorf("the volume cannot be frozen: %w", err))
	}
	return err
}
