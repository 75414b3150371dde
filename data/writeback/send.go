package writeback

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
)

// inFlight is how many pieces are under way at once. Each takes two buffers of
// maxPlain, so together about 11 MiB.
const inFlight = 16

// sender brings one checkpoint to the backend. Its methods are called from one
// goroutine; pieces go out on others.
type sender struct {
	s      *Shipper
	ctx    context.Context
	cancel context.CancelCauseFunc
	cut    *cut
	build  builder
	slots  chan struct{}
	work   sync.WaitGroup
	digest digest
	index  uint32 // of the next piece

	plain, sent atomic.Int64

	dial chan struct{} // one place: one renewal of the handle at a time

	mu      sync.Mutex
	handle  uint64
	life    int             // grows with each renewal
	unacked map[uint32]bool // indices
}

func (s *Shipper) newSender(ctx context.Context, c *cut) *sender {
	d := &sender{s: s, cut: c, slots: make(chan struct{}, inFlight), digest: newDigest(), unacked: map[uint32]bool{},
		dial: make(chan struct{}, 1)}
	d.ctx, d.cancel = context.WithCancelCause(ctx)
	return d
}

// stop ends what is under way.
func (d *sender) stop() {
	d.cancel(errors.New("the checkpoint was given up"))
	d.work.Wait()
}

// broken is the error that ended the sender, if one did.
func (d *sender) broken() error {
	if d.ctx.Err() != nil {
		return context.Cause(d.ctx)
	}
	return nil
}

func (d *sender) request() beginRequest {
	q := beginRequest{Version: version, Group: d.s.o.Group, checkpointID: d.cut.checkpointID}
	for _, w := range d.cut.volumes {
		q.Volumes = append(q.Volumes, beginVolume{w.name, w.epoch, w.size, w.full})
	}
	return q
}

// begin announces the checkpoint.
func (d *sender) begin() error {
	var a beginAnswer
	if err := d.s.call(d.ctx, typBegin, d.request(), &a); err != nil {
		return again(err)
	}
	if a.Stored || a.Next != 0 {
		return errAgain
	}
	d.handle = a.Handle
	return nil
}

// again marks answers that say that there is nothing to go on with.
func again(err error) error {
	switch block.KindOf(err) {
	case block.KindNotFound, block.KindExists, block.KindCorrupt:
		return fmt.Errorf("%w: %w", errAgain, err)
	}
	return err
}

// renew begins again after the connection, or the backend, was lost: pieces
// that were acknowledged must still be there.
func (d *sender) renew(life int) error {
	select {
	case d.dial <- struct{}{}:
	case <-d.ctx.Done():
		return d.broken()
	}
	defer func() { <-d.dial }()
	d.mu.Lock()
	newer := d.life != life
	d.mu.Unlock()
	if newer {
		return nil
	}
	var a beginAnswer
	if err := d.s.call(d.ctx, typBegin, d.request(), &a); err != nil {
		return again(err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	low := d.index
	for i := range d.unacked {
		low = min(low, i)
	}
	if a.Stored || a.Next < low {
		return errAgain
	}
	d.handle = a.Handle
	d.life++
	return nil
}

// data sends bytes.
func (d *sender) data(e extent, p []byte) error {
	for len(p) > 0 {
		if d.build.full() {
			if err := d.flush(); err != nil {
				return err
			}
		}
		n := min(len(p), d.build.room())
		d.build.add(extent{e.vol, e.kind, e.off, int64(n)}, p[:n])
		p, e.off = p[n:], e.off+int64(n)
	}
	return nil
}

// zero sends a range of zeros.
func (d *sender) zero(e extent) error {
	if d.build.full() {
		if err := d.flush(); err != nil {
			return err
		}
	}
	d.build.add(e, nil)
	return nil
}

// pieceMem is what one piece on its way needs.
type pieceMem struct{ plain, packed, head []byte }

var pieceMems = sync.Pool{New: func() any {
	return &pieceMem{plain: make([]byte, 0, maxPlain), packed: make([]byte, 0, maxPlain)}
}}

// flush sends what was collected as a piece.
func (d *sender) flush() error {
	if err := d.broken(); err != nil || d.build.empty() {
		return err
	}
	select {
	case d.slots <- struct{}{}:
	case <-d.ctx.Done():
		return d.broken()
	}
	m := pieceMems.Get().(*pieceMem)
	m.plain = d.build.plain(m.plain[:0])
	d.build.reset()
	p := chunk.Seal(m.packed, m.plain, d.s.o.Codec)
	if p.Codec != chunk.Raw {
		m.packed = p.Data[:0]
	}
	d.digest.add(p.Sig)
	d.mu.Lock()
	index := d.index
	d.index++
	d.unacked[index] = true
	d.mu.Unlock()
	d.plain.Add(int64(p.Plain))
	d.work.Go(func() {
		defer func() {
			pieceMems.Put(m)
			<-d.slots
		}()
		if err := d.deliver(index, m, p); err != nil {
			d.cancel(err)
		}
	})
	return nil
}

// deliver sends one piece until the backend has it.
func (d *sender) deliver(index uint32, m *pieceMem, p chunk.Packed) error {
	pk := appendPacked(nil, chunk.Packed{Sig: p.Sig, Codec: p.Codec, Plain: p.Plain})
	for wait := retryFirst; ; wait = min(2*wait, retryLast) {
		d.mu.Lock()
		handle, life := d.handle, d.life
		d.mu.Unlock()
		m.head = append(appendDataHead(m.head[:0], handle, index), pk...)
		n := len(m.head) + len(p.Data)
		if d.s.o.Pace != nil {
			if err := d.s.o.Pace(d.ctx, n); err != nil {
				return err
			}
		}
		_, err := d.s.o.Backend.Call(d.ctx, typData, m.head, p.Data)
		d.sent.Add(int64(n))
		if err == nil {
			d.mu.Lock()
			delete(d.unacked, index)
			d.mu.Unlock()
			return nil
		}
		if wait, err = d.mend(err, life, wait); err != nil {
			return err
		}
	}
}

// mend waits after an error that passes, and renews the handle when that is
// what it takes. Others it returns.
func (d *sender) mend(err error, life int, wait time.Duration) (time.Duration, error) {
	if d.ctx.Err() != nil {
		return wait, d.broken()
	}
	switch block.KindOf(err) {
	case block.KindNoSpace:
		d.s.say("waiting", err.Error())
		return wait, d.s.sleep(d.ctx, wait)
	case block.KindBusy: // it waits for pieces before it
		return wait, d.s.sleep(d.ctx, time.Millisecond)
	case block.KindUnavailable, block.KindNotFound:
	default:
		return wait, err
	}
	for {
		rerr := d.renew(life)
		switch {
		case rerr == nil:
			if block.KindOf(err) == block.KindUnavailable {
				d.s.say("sending", "")
			}
			return retryFirst, nil
		case d.ctx.Err() != nil:
			return wait, d.broken()
		case errors.Is(rerr, errAgain) || !passing(rerr):
			return wait, rerr
		}
		d.s.say("waiting", rerr.Error())
		if err := d.s.sleep(d.ctx, wait); err != nil {
			return wait, err
		}
		wait = min(2*wait, retryLast)
	}
}

// drain sends the rest and waits until the backend has every piece.
func (d *sender) drain() error {
	if err := d.flush(); err != nil {
		return err
	}
	d.work.Wait()
	return d.broken()
}

// commit has the backend store the checkpoint. When it cannot be told whether
// that happened, the next hello settles it.
func (d *sender) commit() error {
	if err := d.drain(); err != nil {
		return err
	}
	sum := d.digest.sum()
	for wait := retryFirst; ; {
		d.mu.Lock()
		handle, life := d.handle, d.life
		d.mu.Unlock()
		q := commitRequest{Group: d.s.o.Group, checkpointID: d.cut.checkpointID, Handle: handle, Pieces: d.index, Sum: sum, Cut: d.cut.at}
		d.s.pending = d.cut
		err := d.s.call(d.ctx, typCommit, q, nil)
		if err == nil {
			d.s.pending = nil
			return nil
		}
		if k := block.KindOf(err); k == block.KindUnavailable || k == block.KindNotFound {
			var a helloAnswer
			if d.s.hello(d.ctx, &a) == nil && a.Last == d.cut.checkpointID {
				return nil // it was
			}
		}
		if wait, err = d.mend(err, life, wait); err != nil {
			return err
		}
	}
}
