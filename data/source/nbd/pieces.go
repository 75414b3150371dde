package nbd

import (
	"context"
	"sync"
	"sync/atomic"

	"forerun/block"
	p "forerun/internal/nbdproto"
)

const (
	width = 16 // pieces of one call under way at once
	// maxLength is the longest request without payload: the protocol has 32
	// bits, and a round number keeps servers on their own boundaries.
	maxLength = 1<<32 - 64<<10
)

func newRequest(cmd, flags uint16, off int64, n uint32) *request {
	return &request{cmd: cmd, flags: flags, off: off, n: n, done: make(chan error, 1)}
}

// narrowing is the longest request without payload the server takes. By the
// protocol that is any; some servers hold them to their largest block too.
type narrowing struct{ max atomic.Int64 }

func (w *narrowing) init(ex *export) { w.max.Store(maxLength &^ (int64(ex.minBlock) - 1)) }

// split calls f for the pieces of [off, off+n), at most width at a time, and
// returns the first error. Pieces are limit long and begin at multiples of it.
func split(off, n, limit int64, f func(off, n int64) error) error {
	step := func(at int64) int64 { return min(limit-at%limit, off+n-at) }
	if step(off) == n {
		return f(off, n)
	}
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		next = off
		bad  error
	)
	take := func() (at, k int64) {
		mu.Lock()
		defer mu.Unlock()
		if bad != nil || next >= off+n {
			return 0, 0
		}
		at = next
		k = step(at)
		next += k
		return at, k
	}
	for range min(width, (n+limit-1)/limit+1) {
		wg.Go(func() {
			for {
				at, k := take()
				if k == 0 {
					return
				}
				if err := f(at, k); err != nil {
					mu.Lock()
					if bad == nil {
						bad = err
					}
					mu.Unlock()
					return
				}
			}
		})
	}
	wg.Wait()
	return bad
}

// aligned widens [off, off+n) to the server's blocks.
func (cl *Client) aligned(off, n int64) (int64, int64) {
	b := int64(cl.ex.minBlock)
	from := off &^ (b - 1)
	to := min((off+n+b-1)&^(b-1), cl.ex.size)
	return from, to - from
}

// read fills b from off, reading around it where the server's blocks are larger.
func (cl *Client) read(ctx context.Context, b []byte, off int64) error {
	if len(b) == 0 {
		return nil
	}
	if from, n := cl.aligned(off, int64(len(b))); n != int64(len(b)) {
		wide := make([]byte, n)
		if err := cl.read(ctx, wide, from); err != nil {
			return err
		}
		copy(b, wide[off-from:])
		return nil
	}
	return split(off, int64(len(b)), int64(cl.ex.maxBlock), func(at, n int64) error {
		cl.stats.reads.Add(1)
		cl.stats.readBytes.Add(n)
		r := newRequest(p.CmdRead, 0, at, uint32(n))
		r.buf = b[at-off : at-off+n : at-off+n]
		return cl.ask(ctx, "read", r)
	})
}

// write stores b at off. Where the server's blocks are larger than a sector a
// write of part of one reads the rest first, and must be alone: a write to
// another sector of the block that came between would be undone.
func (cl *Client) write(ctx context.Context, b []byte, off int64, flags uint16) error {
	if len(b) == 0 {
		return nil
	}
	from, n := cl.aligned(off, int64(len(b)))
	if n == int64(len(b)) {
		cl.edges.RLock()
		defer cl.edges.RUnlock()
		return cl.writePieces(ctx, b, off, flags)
	}
	cl.edges.Lock()
	defer cl.edges.Unlock()
	wide := make([]byte, n)
	if err := cl.read(ctx, wide, from); err != nil {
		return err
	}
	copy(wide[off-from:], b)
	return cl.writePieces(ctx, wide, from, flags)
}

func (cl *Client) writePieces(ctx context.Context, b []byte, off int64, flags uint16) error {
	return split(off, int64(len(b)), int64(cl.ex.maxBlock), func(at, n int64) error {
		cl.stats.writes.Add(1)
		cl.stats.writeBytes.Add(n)
		r := newRequest(p.CmdWrite, flags, at, uint32(n))
		r.buf = b[at-off : at-off+n : at-off+n]
		return cl.ask(ctx, "write", r)
	})
}

// command sends a request without payload for each piece of an aligned range.
// A server that calls a long one invalid gets shorter ones from then on.
func (cl *Client) command(ctx context.Context, op string, cmd, flags uint16, off, n int64) error {
	limit := cl.narrow.max.Load()
	err := split(off, n, limit, func(at, k int64) error {
		return cl.ask(ctx, op, newRequest(cmd, flags, at, uint32(k)))
	})
	if short := int64(cl.ex.maxBlock); block.KindOf(err) == block.KindInvalid && limit > short && n > short {
		cl.narrow.max.Store(short)
		return cl.command(ctx, op, cmd, flags, off, n)
	}
	return err
}

// inner is the part of [off, off+n) made of whole blocks of the server, and
// what is left before and behind it.
func (cl *Client) inner(off, n int64) (from, to int64) {
	b := int64(cl.ex.minBlock)
	from = min((off+b-1)&^(b-1), off+n)
	to = off + n
	if to != cl.ex.size {
		to = max(to&^(b-1), from)
	}
	return from, to
}

// zeros is what is written where the server cannot zero. It is never changed.
var zeros [1 << 20]byte

func (cl *Client) zero(ctx context.Context, off, n int64, f block.Flags, flags uint16) error {
	if n == 0 {
		return nil
	}
	if f.Has(block.FastZero) && !cl.ex.has(p.FlagSendFastZero) {
		return block.E("source.zero", cl.target.URI, block.KindUnsupported, errSlowZero)
	}
	from, to := off, off
	if cl.ex.has(p.FlagSendWriteZeroes) {
		from, to = cl.inner(off, n)
	}
	if to > from {
		zf := flags
		if !f.Has(block.MayTrim) {
			zf |= p.CmdFlagNoHole
		}
		if f.Has(block.FastZero) {
			zf |= p.CmdFlagFastZero
		}
		cl.edges.RLock()
		err := cl.command(ctx, "zero", p.CmdWriteZeroes, zf, from, to-from)
		cl.edges.RUnlock()
		if err != nil {
			return err
		}
	}
	if err := cl.zeroByWriting(ctx, off, from, flags); err != nil {
		return err
	}
	return cl.zeroByWriting(ctx, to, off+n, flags)
}

func (cl *Client) zeroByWriting(ctx context.Context, off, end int64, flags uint16) error {
	for off < end {
		k := min(end-off, int64(len(zeros)))
		if err := cl.write(ctx, zeros[:k], off, flags); err != nil {
			return err
		}
		off += k
	}
	return nil
}

func (cl *Client) trim(ctx context.Context, off, n int64, flags uint16) error {
	if !cl.info.CanTrim {
		return nil
	}
	from, to := cl.inner(off, n)
	if to <= from {
		return nil
	}
	// With FAST_ZERO the server says rather than writes; without, it was asked
	// for a hole and most make one.
	if cl.ex.has(p.FlagSendFastZero) {
		flags |= p.CmdFlagFastZero
	}
	cl.edges.RLock()
	defer cl.edges.RUnlock()
	err := cl.command(ctx, "trim", p.CmdWriteZeroes, flags, from, to-from)
	if block.KindOf(err) == block.KindUnsupported {
		return nil
	}
	return err
}

// cache prefetches; that the server cannot is no failure of the caller's.
func (cl *Client) cache(ctx context.Context, off, n int64) error {
	if n == 0 {
		return nil
	}
	off, n = cl.aligned(off, n)
	err := cl.command(ctx, "prefetch", p.CmdCache, 0, off, n)
	switch block.KindOf(err) {
	case block.KindCanceled, block.KindClosed:
		return err
	}
	return nil
}
