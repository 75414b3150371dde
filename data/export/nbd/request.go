package nbd

import (
	"context"
	"errors"
	"time"

	"forerun/block"
	"forerun/internal/nbdproto"
)

// request is one request from when its header was read until its reply was
// sent. It has one owner at a time: the leader, a worker, the outbox, the sender.
type request struct {
	c          *conn
	typ, flags uint16
	cookie     uint64
	off, n     int64 // bytes
	errno      uint32
	text       string // what is wrong with it, with errno

	buf  *buffer // holds the data of a read, or a payload; may be nil
	data []byte  // a write's payload
	hold uint64  // on the blocks of an aligned write, if held
	held bool
	cost int64 // what it counts against the connection's buffers

	taken time.Duration // when its header was read, since Server.epoch
	began time.Time
	reply []byte // what is sent
	head  [nbdproto.StructuredReplyLen]byte
	long  []byte // a reply that does not fit in head or buf
	spans []block.Extent
}

// commandFlags are the flags that each command may carry. FUA may stand on all
// of them, because clients are known to set it where it means nothing.
var commandFlags = [...]uint16{
	nbdproto.CmdRead:        nbdproto.CmdFlagFUA | nbdproto.CmdFlagDF,
	nbdproto.CmdWrite:       nbdproto.CmdFlagFUA,
	nbdproto.CmdDisc:        nbdproto.CmdFlagFUA,
	nbdproto.CmdFlush:       nbdproto.CmdFlagFUA,
	nbdproto.CmdTrim:        nbdproto.CmdFlagFUA,
	nbdproto.CmdCache:       nbdproto.CmdFlagFUA,
	nbdproto.CmdWriteZeroes: nbdproto.CmdFlagFUA | nbdproto.CmdFlagNoHole | nbdproto.CmdFlagFastZero,
	nbdproto.CmdBlockStatus: nbdproto.CmdFlagFUA | nbdproto.CmdFlagReqOne,
}

// reset makes r the request h, refused if it makes no sense.
func (r *request) reset(c *conn, h nbdproto.Request) {
	r.c, r.typ, r.flags, r.cookie = c, h.Type, h.Flags, h.Cookie
	r.off, r.n = int64(h.Offset), int64(h.Length)
	r.errno, r.text = r.check(h)
	if r.errno != 0 {
		r.off, r.n = 0, 0
	}
}

func (r *request) check(h nbdproto.Request) (uint32, string) {
	c := r.c
	if int(h.Type) >= len(commandFlags) || h.Type == nbdproto.CmdDisc {
		return nbdproto.EINVAL, "unknown command"
	}
	allowed := commandFlags[h.Type]
	if !c.structured {
		allowed &^= nbdproto.CmdFlagDF
	}
	if h.Flags&^allowed != 0 {
		return nbdproto.EINVAL, "a flag is set that the command does not have"
	}
	beyond := nbdproto.EINVAL
	switch h.Type {
	case nbdproto.CmdFlush:
		if h.Offset != 0 || h.Length != 0 {
			return nbdproto.EINVAL, "a flush has no offset and no length"
		}
		return 0, ""
	case nbdproto.CmdRead:
		if h.Length > nbdproto.MaxPayload {
			if c.structured {
				return nbdproto.EOVERFLOW, "the read is too long"
			}
			return nbdproto.EINVAL, "the read is too long"
		}
	case nbdproto.CmdWrite, nbdproto.CmdWriteZeroes, nbdproto.CmdTrim:
		if c.export.info.ReadOnly {
			return nbdproto.EPERM, "the export is read-only"
		}
		if h.Type == nbdproto.CmdWrite && h.Length > nbdproto.MaxPayload {
			return nbdproto.EINVAL, "the write is too long"
		}
		if h.Type != nbdproto.CmdTrim {
			beyond = nbdproto.ENOSPC
		}
	case nbdproto.CmdBlockStatus:
		if len(c.contexts) == 0 {
			return nbdproto.EINVAL, "no metadata context was selected"
		}
		if h.Length == 0 {
			return nbdproto.EINVAL, "a block status of nothing"
		}
	}
	size := uint64(c.export.info.Size)
	if h.Offset > size || uint64(h.Length) > size-h.Offset {
		return beyond, "the request goes beyond the end of the export"
	}
	return 0, ""
}

// refused says whether r is answered with an error without being served.
func (r *request) refused() bool { return r.errno != 0 }

// refuse makes the reply of a refused request.
func (r *request) refuse() {
	r.count(false)
	r.fail(r.errno, r.text)
}

// needs is what r counts against the connection's buffers, in bytes.
func (r *request) needs() int64 {
	switch {
	case r.refused():
		return 0
	case r.typ == nbdproto.CmdWrite:
		return capacity(int(r.n))
	case r.typ == nbdproto.CmdRead:
		lo, hi := r.outward()
		return capacity(int(hi - lo))
	case r.typ == nbdproto.CmdBlockStatus:
		return maxSpans * 32
	}
	return 0
}

// outward is the range of whole blocks that r touches.
func (r *request) outward() (lo, hi int64) {
	b := r.c.export.block() - 1
	return r.off &^ b, (r.off + r.n + b) &^ b
}

// quick says whether r is of the kind that a device answers at once if it can:
// a small aligned transfer.
func (r *request) quick() bool {
	return r.n > 0 && r.n <= inlineMax && r.c.export.aligned(r.off, r.n) &&
		(r.typ == nbdproto.CmdRead || r.typ == nbdproto.CmdWrite && r.flags&nbdproto.CmdFlagFUA == 0)
}

// changes says whether r changes the device.
func (r *request) changes() bool {
	return r.typ == nbdproto.CmdWrite || r.typ == nbdproto.CmdWriteZeroes || r.typ == nbdproto.CmdTrim
}

// free gives r and what it holds back.
func (r *request) free() {
	s := r.c.s
	if r.held {
		r.c.export.holds.drop(r.hold)
	}
	if r.buf != nil {
		s.buffers.give(r.buf)
	}
	if cap(r.spans) > 1024 {
		r.long, r.spans = nil, nil
	}
	*r = request{long: r.long[:0], spans: r.spans[:0]}
	s.pool.Put(r)
}

// serve does what r asks for and makes its reply.
func (r *request) serve() {
	c := r.c
	var err error
	began := time.Since(c.s.epoch)
	switch {
	case began-r.taken > stale && r.changes() && c.left():
		err = errGone
	case r.quick():
		if r.typ == nbdproto.CmdRead {
			err = r.read()
		} else {
			err = r.write()
		}
		c.learn(time.Since(c.s.epoch)-began, r.n)
	default:
		err = r.rest()
	}
	if c.s.opt.Observe != nil {
		c.s.opt.Observe(Observation{Command: Command(r.typ), Bytes: r.n, Took: time.Since(r.began), Kind: block.KindOf(err)})
	}
	r.count(err == nil)
	if err != nil {
		r.fail(r.number(err), err.Error())
	}
}

// rest serves what is not quick. Bytes for a client that is gone are not read.
func (r *request) rest() error {
	switch r.typ {
	case nbdproto.CmdRead, nbdproto.CmdCache, nbdproto.CmdBlockStatus:
		if r.c.ctx.Err() != nil {
			return context.Cause(r.c.ctx)
		}
	}
	switch r.typ {
	case nbdproto.CmdRead:
		if r.n == 0 {
			if r.c.structured {
				nbdproto.Chunk{Flags: nbdproto.ReplyFlagDone, Type: nbdproto.ReplyTypeNone, Cookie: r.cookie}.Put(r.head[:])
				r.reply = r.head[:nbdproto.StructuredReplyLen]
				return nil
			}
			break
		}
		return r.read()
	case nbdproto.CmdWrite:
		if r.n == 0 {
			break
		}
		return r.write()
	case nbdproto.CmdFlush:
		if err := r.c.export.dev.Flush(r.c.s.hard, block.Demand); err != nil {
			return err
		}
	case nbdproto.CmdTrim:
		if err := r.trim(); err != nil {
			return err
		}
	case nbdproto.CmdCache:
		if lo, hi := r.outward(); lo < hi {
			// Read-ahead: never before what a client waits for.
			if err := r.c.export.dev.Prefetch(r.c.ctx, lo, hi-lo, block.Background|block.Soon); err != nil {
				return err
			}
		}
	case nbdproto.CmdWriteZeroes:
		if r.n > 0 {
			if err := r.zero(); err != nil {
				return err
			}
		}
	case nbdproto.CmdBlockStatus:
		return r.blockStatus()
	}
	r.succeed()
	return nil
}

// count counts r as answered.
func (r *request) count(ok bool) {
	if int(r.typ) >= Commands {
		return
	}
	k := &r.c.count.command[r.typ]
	k.requests.Add(1)
	if ok {
		k.bytes.Add(r.n)
	} else {
		k.errors.Add(1)
	}
}

// succeed makes a reply without data. A simple one is the shortest, and allowed
// for everything but reads.
func (r *request) succeed() {
	nbdproto.SimpleReply{Cookie: r.cookie}.Put(r.head[:])
	r.reply = r.head[:nbdproto.SimpleReplyLen]
}

// fail makes a reply that says what went wrong.
func (r *request) fail(errno uint32, text string) {
	if !r.c.structured {
		nbdproto.SimpleReply{Errno: errno, Cookie: r.cookie}.Put(r.head[:])
		r.reply = r.head[:nbdproto.SimpleReplyLen]
		return
	}
	text = clip(text, maxMessage)
	var head [nbdproto.StructuredReplyLen]byte
	nbdproto.Chunk{
		Flags: nbdproto.ReplyFlagDone, Type: nbdproto.ReplyTypeError, Cookie: r.cookie,
		Length: uint32(nbdproto.ErrorLen + len(text)),
	}.Put(head[:])
	r.long = append(r.long[:0], head[:]...)
	r.long = be.AppendUint32(r.long, errno)
	r.long = be.AppendUint16(r.long, uint16(len(text)))
	r.long = append(r.long, text...)
	r.reply = r.long
}

// number is the protocol's number for an error of the device.
func (r *request) number(err error) uint32 {
	kind := block.KindOf(err)
	switch {
	case kind == block.KindUnsupported && r.flags&nbdproto.CmdFlagFastZero == 0:
		// ENOTSUP is kept for fast zeroes.
		return nbdproto.EINVAL
	case kind == block.KindCanceled && context.Cause(r.c.ctx) == nil:
		// Somebody below gave up; the server has not.
		return nbdproto.EIO
	}
	return nbdproto.Errno(kind, r.typ == nbdproto.CmdWrite || r.typ == nbdproto.CmdWriteZeroes)
}

// read fills a buffer and puts the header before the data.
func (r *request) read() error {
	lo, hi := r.outward()
	r.buf = r.c.s.buffers.take(int(hi - lo))
	if err := r.c.export.read(r.c.ctx, r.buf.data(int(hi-lo)), lo); err != nil {
		return err
	}
	start := headroom + int(r.off-lo)
	end := start + int(r.n)
	if !r.c.structured {
		start -= nbdproto.SimpleReplyLen
		nbdproto.SimpleReply{Cookie: r.cookie}.Put(r.buf.b[start:])
	} else {
		start -= nbdproto.StructuredReplyLen + nbdproto.OffsetDataLen
		nbdproto.Chunk{
			Flags: nbdproto.ReplyFlagDone, Type: nbdproto.ReplyTypeOffsetData, Cookie: r.cookie,
			Length: uint32(nbdproto.OffsetDataLen + r.n),
		}.Put(r.buf.b[start:])
		be.PutUint64(r.buf.b[start+nbdproto.StructuredReplyLen:], uint64(r.off))
	}
	r.reply = r.buf.b[start:end]
	return nil
}

// fua is the flag for the device.
func (r *request) fua() block.Flags {
	if r.flags&nbdproto.CmdFlagFUA != 0 {
		return block.FUA
	}
	return 0
}

func (r *request) write() error {
	e, ctx := r.c.export, r.c.changing
	var err error
	switch {
	case e.block() == 1:
		err = e.write(ctx, r.data, r.off, r.fua())
	case e.aligned(r.off, r.n):
		if !r.held {
			r.hold, r.held = e.holds.take(r.off, r.off+r.n, false), true
		}
		err = e.write(ctx, r.data, r.off, r.fua())
		e.holds.drop(r.hold)
		r.held = false
	default:
		lo, hi := r.outward()
		h := e.holds.take(lo, hi, true)
		err = r.patch(ctx, r.data)
		e.holds.drop(h)
	}
	if err == nil {
		r.succeed()
	}
	return err
}

func (r *request) zero() error {
	e, ctx := r.c.export, r.c.changing
	f := r.fua()
	if r.flags&nbdproto.CmdFlagNoHole == 0 {
		f |= block.MayTrim
	}
	if r.flags&nbdproto.CmdFlagFastZero != 0 {
		f |= block.FastZero
	}
	if e.block() == 1 {
		return e.dev.Zero(ctx, r.off, r.n, f)
	}
	lo, hi := r.outward()
	whole := e.aligned(r.off, r.n)
	if !whole && f.Has(block.FastZero) {
		return block.E("nbd.zero", "", block.KindUnsupported, errors.New("parts of blocks are not zeroed faster than they are written"))
	}
	h := e.holds.take(lo, hi, !whole)
	defer e.holds.drop(h)
	if whole {
		return e.dev.Zero(ctx, r.off, r.n, f)
	}
	b := e.block()
	inLo, inHi := (r.off+b-1)&^(b-1), (r.off+r.n)&^(b-1)
	if inLo < inHi {
		if err := e.dev.Zero(ctx, inLo, inHi-inLo, f); err != nil {
			return err
		}
	}
	return r.patchEdges(ctx, nil)
}

// trim rounds inward to whole blocks, as the protocol allows.
func (r *request) trim() error {
	e := r.c.export
	b := e.block()
	lo, hi := (r.off+b-1)&^(b-1), (r.off+r.n)&^(b-1)
	if lo >= hi {
		return nil
	}
	if b > 1 {
		h := e.holds.take(lo, hi, false)
		defer e.holds.drop(h)
	}
	return e.dev.Trim(r.c.changing, lo, hi-lo, r.fua())
}

// patch writes p, which begins or ends inside a block, at r.off.
func (r *request) patch(ctx context.Context, p []byte) error {
	b := r.c.export.block()
	lo, hi := (r.off+b-1)&^(b-1), (r.off+r.n)&^(b-1)
	if lo < hi {
		if err := r.c.export.write(ctx, p[lo-r.off:hi-r.off], lo, r.fua()); err != nil {
			return err
		}
	}
	return r.patchEdges(ctx, p)
}

// patchEdges changes the first and the last block of r as far as r covers them
// in part, to the bytes of p or, without p, to zeros.
func (r *request) patchEdges(ctx context.Context, p []byte) error {
	e := r.c.export
	b := e.block()
	buf := r.c.s.buffers.take(int(b))
	defer r.c.s.buffers.give(buf)
	blk := buf.data(int(b))
	lo, hi := r.outward()
	for _, at := range [...]int64{lo, hi - b} {
		from, to := max(r.off, at), min(r.off+r.n, at+b)
		if to-from == b {
			continue
		}
		if err := e.read(ctx, blk, at); err != nil {
			return err
		}
		if p == nil {
			clear(blk[from-at : to-at])
		} else {
			copy(blk[from-at:to-at], p[from-r.off:to-r.off])
		}
		if err := e.write(ctx, blk, at, r.fua()); err != nil {
			return err
		}
		if hi-lo == b {
			break
		}
	}
	return nil
}

// read reads in pieces that the device takes.
func (e *export) read(ctx context.Context, p []byte, off int64) error {
	m := e.info.MaxIO
	if m <= 0 || len(p) <= m {
		return e.dev.ReadAt(ctx, p, off, block.Demand)
	}
	m = e.piece()
	for len(p) > 0 {
		n := min(len(p), m)
		if err := e.dev.ReadAt(ctx, p[:n], off, block.Demand); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// write writes in pieces that the device takes.
func (e *export) write(ctx context.Context, p []byte, off int64, f block.Flags) error {
	m := e.info.MaxIO
	if m <= 0 || len(p) <= m {
		return e.dev.WriteAt(ctx, p, off, f)
	}
	m = e.piece()
	for len(p) > 0 {
		n := min(len(p), m)
		if err := e.dev.WriteAt(ctx, p[:n], off, f); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// piece is the device's largest transfer in whole blocks.
func (e *export) piece() int {
	b := int(e.block())
	return max(e.info.MaxIO&^(b-1), b)
}
