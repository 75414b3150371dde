package nbd

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"forerun/internal/nbdproto"
)

// client speaks the protocol byte by byte, well or badly as a test likes.
type client struct {
	t      testing.TB
	nc     net.Conn
	cookie uint64
}

type optReply struct {
	typ  uint32
	data []byte
}

// reply is one message of the transmission phase.
type reply struct {
	structured bool
	flags, typ uint16
	cookie     uint64
	errno      uint32
	data       []byte // of a simple reply to a read, or the payload of a chunk
}

func dial(t testing.TB, l *Listener) *client {
	t.Helper()
	nc, err := net.Dial(l.Addr().Network(), l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return greet(t, nc, nbdproto.FlagCFixedNewstyle|nbdproto.FlagCNoZeroes)
}

// greet does the part before the options.
func greet(t testing.TB, nc net.Conn, flags uint32) *client {
	t.Helper()
	t.Cleanup(func() { nc.Close() })
	c := &client{t: t, nc: nc}
	_ = nc.SetDeadline(time.Now().Add(15 * time.Second))
	h := c.read(nbdproto.ServerHelloLen)
	if be.Uint64(h) != nbdproto.Magic || be.Uint64(h[8:]) != nbdproto.OptMagic || be.Uint16(h[16:]) != 3 {
		t.Fatalf("the server greets with %x", h)
	}
	c.write(be.AppendUint32(nil, flags))
	return c
}

func (c *client) read(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c.nc, b); err != nil {
		c.t.Fatalf("reading %d bytes: %v", n, err)
	}
	return b
}

func (c *client) write(b []byte) {
	c.t.Helper()
	if _, err := c.nc.Write(b); err != nil {
		c.t.Fatal(err)
	}
}

// ended fails the test unless the server has closed the connection.
func (c *client) ended() {
	c.t.Helper()
	_ = c.nc.SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, err := io.Copy(io.Discard, c.nc); n != 0 {
		c.t.Fatalf("%d bytes came where the connection was to end", n)
	} else if ne, ok := err.(net.Error); ok && ne.Timeout() {
		c.t.Fatal("the connection does not end")
	}
}

// option sends an option and reads replies until the final one.
func (c *client) option(opt uint32, data []byte) []optReply {
	c.t.Helper()
	c.write(nbdproto.AppendOption(nil, opt, data))
	var rs []optReply
	for {
		h := c.read(nbdproto.OptionReplyLen)
		o, typ, n, ok := nbdproto.ParseOptionReply(h)
		if !ok || o != opt {
			c.t.Fatalf("reply %x to option %d", h, opt)
		}
		rs = append(rs, optReply{typ, c.read(int(n))})
		if typ == nbdproto.RepAck || typ&nbdproto.RepFlagError != 0 {
			return rs
		}
	}
}

// last is the type of the final reply to an option.
func (c *client) last(opt uint32, data []byte) uint32 {
	c.t.Helper()
	rs := c.option(opt, data)
	return rs[len(rs)-1].typ
}

func (c *client) acked(opt uint32, data []byte) []optReply {
	c.t.Helper()
	rs := c.option(opt, data)
	if l := rs[len(rs)-1]; l.typ != nbdproto.RepAck {
		c.t.Fatalf("option %d: %#x %s", opt, l.typ, l.data)
	}
	return rs[:len(rs)-1]
}

// open goes on to transmission with the usual options.
func (c *client) open(name string, structured bool, contexts ...string) {
	c.t.Helper()
	if structured {
		c.acked(nbdproto.OptStructuredReply, nil)
	}
	if len(contexts) > 0 {
		c.acked(nbdproto.OptSetMetaContext, nbdproto.AppendMetaContext(nil, name, contexts...))
	}
	c.acked(nbdproto.OptGo, nbdproto.AppendInfo(nil, name, nbdproto.InfoBlockSize))
}

func (c *client) startTLS(cfg *tls.Config) {
	c.t.Helper()
	c.acked(nbdproto.OptStartTLS, nil)
	t := tls.Client(c.nc, cfg)
	if err := t.Handshake(); err != nil {
		c.t.Fatal(err)
	}
	c.nc = t
}

// send sends a request and returns its cookie.
func (c *client) send(typ, flags uint16, off uint64, n uint32, payload []byte) uint64 {
	c.t.Helper()
	c.cookie++
	r := nbdproto.Request{Flags: flags, Type: typ, Cookie: c.cookie, Offset: off, Length: n}
	c.write(append(r.Append(nil), payload...))
	return c.cookie
}

// next reads one message. want is how much data a simple reply without error has.
func (c *client) next(want int) reply {
	c.t.Helper()
	h := c.read(nbdproto.SimpleReplyLen)
	if s, ok := nbdproto.ParseSimpleReply(h); ok {
		r := reply{cookie: s.Cookie, errno: s.Errno}
		if s.Errno == 0 {
			r.data = c.read(want)
		}
		return r
	}
	h = append(h, c.read(nbdproto.StructuredReplyLen-nbdproto.SimpleReplyLen)...)
	k, ok := nbdproto.ParseChunk(h)
	if !ok || k.Length > nbdproto.MaxPayload+8 {
		c.t.Fatalf("reply %x", h)
	}
	r := reply{structured: true, flags: k.Flags, typ: k.Type, cookie: k.Cookie, data: c.read(int(k.Length))}
	if k.Type == nbdproto.ReplyTypeError {
		r.errno = be.Uint32(r.data)
		if int(be.Uint16(r.data[4:])) != len(r.data)-6 || len(r.data) == 6 {
			c.t.Fatalf("error chunk %q", r.data)
		}
	}
	return r
}

// do sends a request and reads its one reply, which must be final.
func (c *client) do(typ, flags uint16, off uint64, n uint32, payload []byte) reply {
	c.t.Helper()
	cookie := c.send(typ, flags, off, n, payload)
	want := 0
	if typ == nbdproto.CmdRead {
		want = int(n)
	}
	r := c.next(want)
	if r.cookie != cookie || r.structured && r.flags&nbdproto.ReplyFlagDone == 0 {
		c.t.Fatalf("request %d was answered by %+v", cookie, r)
	}
	return r
}

// bytes reads through a request.
func (c *client) bytes(off uint64, n uint32) []byte {
	c.t.Helper()
	r := c.do(nbdproto.CmdRead, 0, off, n, nil)
	if r.errno != 0 {
		c.t.Fatalf("read of %d at %d: error %d", n, off, r.errno)
	}
	if !r.structured {
		return r.data
	}
	if r.typ != nbdproto.ReplyTypeOffsetData || be.Uint64(r.data) != off || len(r.data) != int(n)+8 {
		c.t.Fatalf("read of %d at %d: chunk %d with %d bytes", n, off, r.typ, len(r.data))
	}
	return r.data[8:]
}

func (c *client) ok(typ, flags uint16, off uint64, n uint32, payload []byte) {
	c.t.Helper()
	if r := c.do(typ, flags, off, n, payload); r.errno != 0 {
		c.t.Fatalf("%v of %d at %d: error %d %q", Command(typ), n, off, r.errno, r.data)
	}
}

func (c *client) fails(errno uint32, typ, flags uint16, off uint64, n uint32, payload []byte) {
	c.t.Helper()
	if r := c.do(typ, flags, off, n, payload); r.errno != errno {
		c.t.Fatalf("%v flags %#x of %d at %d: error %d, want %d", Command(typ), flags, n, off, r.errno, errno)
	}
}

type span struct {
	n     uint32
	flags uint32
}

func spansOf(b []byte) (id uint32, s []span) {
	id = be.Uint32(b)
	for b = b[4:]; len(b) > 0; b = b[8:] {
		s = append(s, span{be.Uint32(b), be.Uint32(b[4:])})
	}
	return id, s
}

func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7+i>>8) ^ seed
	}
	return b
}

func (s span) String() string { return fmt.Sprintf("%d:%d", s.n, s.flags) }
