package nbd

import (
	"forerun/block"
	"forerun/internal/nbdproto"
)

// maxSpans bounds the extents of one reply per context. The protocol allows
// many more; a client asks again from where the answer ends.
const maxSpans = 16 << 10

// allocation is the status of base:allocation for an extent.
func allocation(e block.Extent) uint32 {
	switch e.Kind {
	case block.ZeroData:
		return nbdproto.StateZero
	case block.Hole:
		return nbdproto.StateHole | nbdproto.StateZero
	}
	// Free space still reads as whatever is there: it is data to a copier.
	return 0
}

// blockStatus answers with one chunk for each selected context.
func (r *request) blockStatus() error {
	r.long = r.long[:0]
	for i, id := range r.c.contexts {
		// What the map says is known here; what the source says may have to be asked.
		f, status := block.Demand, allocation
		if id == stateID {
			f, status = block.Local, func(e block.Extent) uint32 { return uint32(e.State) }
		}
		chunk := nbdproto.Chunk{Type: nbdproto.ReplyTypeBlockStatus, Cookie: r.cookie}
		if i == len(r.c.contexts)-1 {
			chunk.Flags = nbdproto.ReplyFlagDone
		}
		at := len(r.long)
		r.long = append(r.long, make([]byte, nbdproto.StructuredReplyLen)...)
		r.long = be.AppendUint32(r.long, id)
		if err := r.spansOf(f, status); err != nil {
			return err
		}
		chunk.Length = uint32(len(r.long) - at - nbdproto.StructuredReplyLen)
		chunk.Put(r.long[at:])
	}
	r.reply = r.long
	return nil
}

// spansOf appends the descriptors of one context: neighbours that mean the
// same are one, and with REQ_ONE there is one.
func (r *request) spansOf(f block.Flags, status func(block.Extent) uint32) error {
	var (
		e      = r.c.export
		lo, hi = r.outward()
		end    = r.off + r.n
		one    = r.flags&nbdproto.CmdFlagReqOne != 0
		count  = 0
		length int64
		last   uint32
	)
	put := func() {
		r.long = be.AppendUint32(r.long, uint32(length))
		r.long = be.AppendUint32(r.long, last)
		count++
	}
	for at := lo; at < hi; {
		var err error
		if r.spans, err = e.extents(r.c, r.spans[:0], at, hi-at, f); err != nil {
			return err
		}
		if len(r.spans) == 0 {
			return block.E("nbd.status", "", block.KindIO, nil)
		}
		for _, x := range r.spans {
			from, to := max(x.Off, r.off), min(x.End(), end)
			s := status(x)
			switch {
			case to <= from:
			case length > 0 && s == last:
				length += to - from
			case length > 0 && (one || count == maxSpans-1):
				put()
				return nil
			default:
				if length > 0 {
					put()
				}
				length, last = to-from, s
			}
			at = x.End()
		}
	}
	put()
	return nil
}

// extents asks the device, or says that all is data where it knows no more.
func (e *export) extents(c *conn, dst []block.Extent, off, n int64, f block.Flags) ([]block.Extent, error) {
	if !e.info.CanExtents {
		return append(dst, block.Extent{Off: off, Len: n}), nil
	}
	out, err := e.dev.Extents(c.ctx, dst, off, n, f)
	if block.KindOf(err) == block.KindUnsupported {
		return append(dst, block.Extent{Off: off, Len: n}), nil
	}
	return out, err
}
