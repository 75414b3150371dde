package nbd

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"slices"

	"forerun/block"
	p "forerun/internal/nbdproto"
)

const (
	maxSpans   = 4096    // pieces of one read that may be missing between others
	maxExtents = 1 << 16 // kept of one block status reply; the rest is asked again
)

// violation is an answer the protocol does not allow. The stream cannot be
// trusted after one.
type violation struct{ error }

func (v violation) Unwrap() error { return v.error }

func violated(format string, a ...any) error { return violation{fmt.Errorf(format, a...)} }

// serverError is an error number the server answered with.
type serverError struct {
	errno uint32
	text  string
}

func (e *serverError) Error() string {
	s := fmt.Sprintf("the server answered with error %d (%s)", e.errno, p.Kind(e.errno))
	if e.text != "" {
		s += fmt.Sprintf(" and says %q", e.text)
	}
	return s
}

// cover notes which bytes of a read have arrived. Servers nearly always send
// them in order; then it is one number.
type cover struct {
	next  uint32      // [0, next) has arrived
	spans [][2]uint32 // what arrived beyond, sorted, [from, to)
}

// add notes [from, to) and fails if any of it has arrived before.
func (c *cover) add(from, to uint32) error {
	if from < c.next {
		return violated("bytes %d to %d of a read came twice", from, min(to, c.next))
	}
	i, found := slices.BinarySearchFunc(c.spans, from, func(s [2]uint32, f uint32) int {
		return int(int64(s[0]) - int64(f))
	})
	if found || i > 0 && c.spans[i-1][1] > from || i < len(c.spans) && c.spans[i][0] < to {
		return violated("bytes of a read at %d came twice", from)
	}
	if from != c.next {
		if len(c.spans) >= maxSpans {
			return violated("a read came in more than %d pieces out of order", maxSpans)
		}
		c.spans = slices.Insert(c.spans, i, [2]uint32{from, to})
		return nil
	}
	c.next = to
	n := 0
	for n < len(c.spans) && c.spans[n][0] == c.next {
		c.next = c.spans[n][1]
		n++
	}
	c.spans = slices.Delete(c.spans, 0, n)
	return nil
}

// receive reads replies until the connection breaks or the server violates the
// protocol, and returns why.
func (c *conn) receive() error {
	for {
		if err := c.reply(); err != nil {
			return err
		}
	}
}

// reply reads one simple reply or one chunk of a structured reply.
func (c *conn) reply() error {
	b, err := c.br.Peek(p.SimpleReplyLen)
	if err != nil {
		return err
	}
	switch m := binary.BigEndian.Uint32(b); m {
	case p.SimpleReplyMagic:
		errno, cookie := binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint64(b[8:])
		_, _ = c.br.Discard(p.SimpleReplyLen) // it was peeked
		return c.simple(cookie, errno)
	case p.StructuredReplyMagic:
		if !c.ex.structured {
			return violated("a structured reply that was not negotiated")
		}
		if b, err = c.br.Peek(p.StructuredReplyLen); err != nil {
			return err
		}
		ch := chunk{
			flags: binary.BigEndian.Uint16(b[4:]), kind: binary.BigEndian.Uint16(b[6:]),
			cookie: binary.BigEndian.Uint64(b[8:]), n: binary.BigEndian.Uint32(b[16:]),
		}
		_, _ = c.br.Discard(p.StructuredReplyLen) // it was peeked
		return c.chunk(ch)
	default:
		return violated("a reply begins with %#x, no magic number of NBD", m)
	}
}

// simple serves a simple reply. The bytes of a read follow at once.
func (c *conn) simple(cookie uint64, errno uint32) error {
	r, err := c.begin(cookie)
	if err != nil {
		return err
	}
	if c.ex.structured && (r.cmd == p.CmdRead || r.cmd == p.CmdBlockStatus) {
		return violated("a simple reply to command %d although structured replies were negotiated", r.cmd)
	}
	if errno != 0 {
		r.err = &serverError{errno: errno}
	} else if r.cmd == p.CmdRead {
		if err := c.payload(r, 0, r.n); err != nil {
			return err
		}
		if err := r.cover.add(0, r.n); err != nil {
			return err
		}
	}
	return c.end(r, true)
}

// chunk is the header of a chunk of a structured reply.
type chunk struct {
	flags, kind uint16
	cookie      uint64
	n           uint32 // bytes of payload
}

func (c *conn) chunk(ch chunk) error {
	r, err := c.begin(ch.cookie)
	if err != nil {
		return err
	}
	done := ch.flags&p.ReplyFlagDone != 0
	switch ch.kind {
	case p.ReplyTypeNone:
		if ch.n != 0 || !done {
			return violated("an empty chunk with %d bytes that ends nothing", ch.n)
		}
	case p.ReplyTypeOffsetData, p.ReplyTypeOffsetHole:
		err = c.content(r, ch)
	case p.ReplyTypeBlockStatus:
		err = c.status(r, ch.n)
	default:
		if ch.kind&(1<<15) == 0 {
			return violated("a chunk of unknown type %d", ch.kind)
		}
		err = c.failure(r, ch)
	}
	if err != nil {
		return err
	}
	return c.end(r, done)
}

// content takes data or a hole of a read.
func (c *conn) content(r *request, ch chunk) error {
	if r.cmd != p.CmdRead {
		return violated("bytes in the reply to command %d", r.cmd)
	}
	if ch.n < 9 {
		return violated("a chunk of a read with %d bytes", ch.n)
	}
	var b [12]byte
	head, n := b[:8], ch.n-8
	if ch.kind == p.ReplyTypeOffsetHole {
		if ch.n != 12 {
			return violated("a hole of a read described in %d bytes", ch.n)
		}
		head = b[:]
	}
	if _, err := io.ReadFull(c.br, head); err != nil {
		return err
	}
	if ch.kind == p.ReplyTypeOffsetHole {
		n = binary.BigEndian.Uint32(head[8:])
	}
	off := binary.BigEndian.Uint64(head)
	if off < uint64(r.off) || off-uint64(r.off) > uint64(r.n) || uint64(n) > uint64(r.n)-(off-uint64(r.off)) || n == 0 {
		return violated("%d bytes at %d in the reply to a read of %d bytes at %d", n, off, r.n, r.off)
	}
	from := uint32(off - uint64(r.off))
	if err := r.cover.add(from, from+n); err != nil {
		return err
	}
	if ch.kind == p.ReplyTypeOffsetHole {
		if r.buf != nil {
			clear(r.buf[from : from+n])
		}
		return nil
	}
	return c.payload(r, from, n)
}

// payload reads n bytes into place, or nowhere if the caller has left.
func (c *conn) payload(r *request, from, n uint32) error {
	if r.buf == nil {
		_, err := c.br.Discard(int(n))
		return err
	}
	_, err := io.ReadFull(c.br, r.buf[from:from+n])
	return err
}

// status takes the extents of base:allocation. The last one may reach beyond
// what was asked, and the server may tell less.
func (c *conn) status(r *request, n uint32) error {
	if r.cmd != p.CmdBlockStatus || !c.ex.status {
		return violated("a block status that was not asked for")
	}
	if n < 12 || (n-4)%8 != 0 || n > p.MaxPayload {
		return violated("a block status of %d bytes", n)
	}
	var b [8]byte
	if _, err := io.ReadFull(c.br, b[:4]); err != nil {
		return err
	}
	if id := binary.BigEndian.Uint32(b[:]); id != c.ex.statusID {
		return violated("a block status of context %d, negotiated was %d", id, c.ex.statusID)
	}
	if r.told {
		return violated("a second block status in one reply")
	}
	r.told = true
	at, end := r.off, r.off+int64(r.n)
	for range (n - 4) / 8 {
		if _, err := io.ReadFull(c.br, b[:]); err != nil {
			return err
		}
		length, flags := int64(binary.BigEndian.Uint32(b[:])), binary.BigEndian.Uint32(b[4:])
		if length == 0 {
			return violated("an extent of 0 bytes at %d", at)
		}
		if at >= end || len(r.ext) >= maxExtents {
			continue
		}
		kind := block.Data
		switch flags & (p.StateHole | p.StateZero) {
		case p.StateHole | p.StateZero:
			kind = block.Hole
		case p.StateZero:
			kind = block.ZeroData
		} // a hole that does not read as zeros must be read
		e := block.Extent{Off: at, Len: min(length, end-at), Kind: kind}
		r.ext = block.AppendExtent(r.ext, e)
		at = e.End()
	}
	return nil
}

// failure takes an error chunk, of a known type or not.
func (c *conn) failure(r *request, ch chunk) error {
	if ch.n < 6 || ch.n > 6+p.MaxString+8 {
		return violated("an error described in %d bytes", ch.n)
	}
	b := make([]byte, ch.n)
	if _, err := io.ReadFull(c.br, b); err != nil {
		return err
	}
	errno, n := binary.BigEndian.Uint32(b), int(binary.BigEndian.Uint16(b[4:]))
	if n > len(b)-6 {
		return violated("an error text of %d bytes in a chunk of %d", n, len(b))
	}
	if errno == 0 {
		errno = p.EIO // an error it is
	}
	if r.err == nil {
		r.err = &serverError{errno, string(b[6 : 6+n])}
	}
	return nil
}

// result is what a finished request answers.
func (r *request) result() error {
	switch {
	case r.err != nil:
		return r.err
	case r.cmd == p.CmdRead && (r.cover.next != r.n || len(r.cover.spans) != 0):
		return violated("the reply to a read of %d bytes ended with bytes missing", r.n)
	case r.cmd == p.CmdBlockStatus && len(r.ext) == 0:
		return violated("the reply to a block status told nothing")
	}
	return nil
}

// newReader gives the receiver's buffer: large enough that many small replies
// come with one system call; larger payloads go past it.
func newReader(r io.Reader) *bufio.Reader { return bufio.NewReaderSize(r, 64<<10) }
