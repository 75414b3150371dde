package nbd

import (
	"context"
	"errors"
	"sync"

	"forerun/block"
	p "forerun/internal/nbdproto"
)

const (
	// windows is how many block status requests are under way in one call:
	// enough to hide the round trip over the thousands that a disk of terabytes
	// takes at 4 GiB each.
	windows = 32
	// maxAnswer bounds the extents of one call; the caller asks for the rest.
	maxAnswer = 1 << 16
)

var errSlowZero = errors.New("the server has no fast way to zero")

// extents lists [off, end), or the beginning of it when that is long already.
// The range is cut into windows; each is asked for by one goroutine until it is
// complete, and they are put together in order.
func (cl *Client) extents(ctx context.Context, off, end int64) ([]block.Extent, error) {
	var out []block.Extent
	for off < end && len(out) < maxAnswer {
		limit := cl.narrow.max.Load()
		var parts [windows][]block.Extent
		var errs [windows]error
		var wg sync.WaitGroup
		var ends [windows]int64
		n := 0
		for ; n < windows && off < end; n++ {
			i, at, k := n, off, min(limit, end-off)
			off += k
			ends[i] = off
			if i == 0 && off >= end { // the usual short question needs no goroutine
				parts[0], errs[0] = cl.window(ctx, at, k)
				continue
			}
			wg.Go(func() { parts[i], errs[i] = cl.window(ctx, at, k) })
		}
		wg.Wait()
		for i := range n {
			if errs[i] != nil {
				return nil, errs[i]
			}
			for _, e := range parts[i] {
				out = block.AppendExtent(out, e)
			}
			if out[len(out)-1].End() < ends[i] { // it became too long
				return out, nil
			}
		}
	}
	return out, nil
}

// window lists [off, off+n) completely, unless the answer becomes too long.
func (cl *Client) window(ctx context.Context, off, n int64) ([]block.Extent, error) {
	end := off + n
	var out []block.Extent
	for at := off; at < end && len(out) < maxAnswer; {
		from, k := cl.aligned(at, end-at)
		k = min(k, cl.narrow.max.Load())
		cl.stats.statusReqs.Add(1)
		r := newRequest(p.CmdBlockStatus, 0, from, uint32(k))
		err := cl.ask(ctx, "extents", r)
		if short := int64(cl.ex.maxBlock); block.KindOf(err) == block.KindInvalid && k > short {
			cl.narrow.max.Store(short)
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, e := range r.ext {
			from, to := max(e.Off, at), min(e.End(), end)
			if to > from {
				out = block.AppendExtent(out, block.Extent{Off: from, Len: to - from, Kind: e.Kind})
				at = to
			}
		}
	}
	return out, nil
}
