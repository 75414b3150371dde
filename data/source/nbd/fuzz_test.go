package nbd

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"

	p "forerun/internal/nbdproto"
)

// bytesConn is a server whose whole answer is known before.
type bytesConn struct{ io.Reader }

func (bytesConn) Write(b []byte) (int, error)      { return len(b), nil }
func (bytesConn) Close() error                     { return nil }
func (bytesConn) LocalAddr() net.Addr              { return nil }
func (bytesConn) RemoteAddr() net.Addr             { return nil }
func (bytesConn) SetDeadline(time.Time) error      { return nil }
func (bytesConn) SetReadDeadline(time.Time) error  { return nil }
func (bytesConn) SetWriteDeadline(time.Time) error { return nil }

// fuzzRequests are put in a connection in this order, so cookies are known.
func fuzzRequests() []*request {
	r := []*request{
		newRequest(p.CmdRead, 0, 4096, 2048), newRequest(p.CmdRead, 0, 0, 512), newRequest(p.CmdFlush, 0, 0, 0),
		newRequest(p.CmdBlockStatus, 0, 8192, 65536), newRequest(p.CmdWrite, 0, 0, 512),
	}
	for _, q := range r {
		if q.cmd == p.CmdRead || q.cmd == p.CmdWrite {
			q.buf = bytes.Repeat([]byte{0xee}, int(q.n))
		}
	}
	return r
}

// FuzzReplies feeds a server's bytes to the receiver. Whatever they are: it
// ends, every request is answered once, a read that succeeds has had each byte
// delivered (a twin counts them), and extents lie in order inside what was asked.
func FuzzReplies(f *testing.F) {
	cookie := func(i uint64) uint64 { return (i+1)<<32 | i }
	f.Add(true, dataChunk(cookie(0), 1, 4096, bytes.Repeat([]byte{7}, 2048)))
	f.Add(true, append(dataChunk(cookie(0), 0, 5120, bytes.Repeat([]byte{7}, 1024)), holeChunk(cookie(0), 1, 4096, 1024)...))
	f.Add(true, append(simple(cookie(2), 0), simple(cookie(4), 28)...))
	f.Add(false, append(simple(cookie(1), 0), make([]byte, 512)...))
	f.Add(true, structured(cookie(3), 1, p.ReplyTypeBlockStatus, []byte{0, 0, 0, 77, 0, 0, 16, 0, 0, 0, 0, 3, 255, 0, 0, 0, 0, 0, 0, 0}))
	f.Add(true, structured(cookie(0), 1, p.ReplyTypeErrorOffset, []byte{0, 0, 0, 5, 0, 2, 'h', 'i', 0, 0, 0, 0, 0, 0, 0, 1}))
	f.Fuzz(func(t *testing.T, structured bool, in []byte) {
		c := newConn(bytesConn{bytes.NewReader(in)}, export{structured: structured, status: structured, statusID: 77}, 8)
		reqs := fuzzRequests()
		for _, r := range reqs {
			if err := c.put(r); err != nil {
				t.Fatal(err)
			}
		}
		err := c.receive()
		if err == nil {
			t.Fatal("the receiver ended without a reason")
		}
		c.drain(err)
		for i, r := range reqs {
			var err error
			select {
			case err = <-r.done:
			default:
				t.Fatalf("request %d was not answered", i)
			}
			if err != nil {
				continue
			}
			switch r.cmd {
			case p.CmdRead:
				if n := delivered(in, r, structured); n != int(r.n) {
					t.Fatalf("a read of %d bytes succeeded, the server sent %d", r.n, n)
				}
			case p.CmdBlockStatus:
				at := r.off
				for _, e := range r.ext {
					if e.Off != at || e.Len <= 0 {
						t.Fatalf("extent %+v where %d was due", e, at)
					}
					at = e.End()
				}
				if at == r.off || at > r.off+int64(r.n) {
					t.Fatalf("extents to %d of %d bytes at %d", at, r.n, r.off)
				}
			}
		}
	})
}

// delivered counts the different bytes of r that a well-formed stream brings.
func delivered(in []byte, r *request, structured bool) int {
	have := make([]bool, r.n)
	for len(in) >= 16 {
		if be.Uint32(in) == p.SimpleReplyMagic {
			cookie, errno := be.Uint64(in[8:]), be.Uint32(in[4:])
			in = in[16:]
			if structured || errno != 0 {
				continue
			}
			if cookie == r.cookie {
				return int(r.n)
			}
			for _, q := range fuzzRequests() { // the payload of the other read
				if q.cmd == p.CmdRead && q.n != r.n {
					if uint32(cookie) == 0 || uint32(cookie) == 1 {
						in = in[min(len(in), int(q.n)):]
					}
				}
			}
			continue
		}
		if len(in) < 20 {
			break
		}
		kind, cookie, n := be.Uint16(in[6:]), be.Uint64(in[8:]), int(be.Uint32(in[16:]))
		if n > len(in)-20 {
			break
		}
		payload := in[20 : 20+n]
		in = in[20+n:]
		if cookie != r.cookie || len(payload) < 8 {
			continue
		}
		off := int64(be.Uint64(payload)) - r.off
		size := int64(len(payload) - 8)
		if kind == p.ReplyTypeOffsetHole && len(payload) == 12 {
			size = int64(be.Uint32(payload[8:]))
		} else if kind != p.ReplyTypeOffsetData {
			continue
		}
		for i := off; i < off+size && i >= 0 && i < int64(r.n); i++ {
			have[i] = true
		}
	}
	n := 0
	for _, h := range have {
		if h {
			n++
		}
	}
	return n
}

// FuzzGreeting feeds a server's greeting. Whatever it is: no panic, no great
// allocation, and what is negotiated makes sense.
func FuzzGreeting(f *testing.F) {
	good := append(be.AppendUint64(be.AppendUint64(nil, p.Magic), p.OptMagic), 0, 3)
	rep := func(b []byte, opt, rep uint32, data []byte) []byte {
		b = be.AppendUint32(be.AppendUint32(be.AppendUint64(b, p.RepMagic), opt), rep)
		return append(be.AppendUint32(b, uint32(len(data))), data...)
	}
	b := rep(bytes.Clone(good), p.OptStructuredReply, p.RepAck, nil)
	b = rep(b, p.OptSetMetaContext, p.RepMetaContext, append([]byte{0, 0, 0, 1}, p.ContextAllocation...))
	b = rep(b, p.OptSetMetaContext, p.RepAck, nil)
	b = rep(b, p.OptGo, p.RepInfo, []byte{0, 3, 0, 0, 2, 0, 0, 0, 16, 0, 2, 0, 0, 0})
	b = rep(b, p.OptGo, p.RepInfo, []byte{0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 1, 1})
	f.Add(rep(b, p.OptGo, p.RepAck, nil))
	u := rep(bytes.Clone(good), p.OptStructuredReply, p.RepErrUnsup, nil)
	u = rep(u, p.OptGo, p.RepErrUnknown, []byte("none"))
	f.Add(rep(u, p.OptList, p.RepServer, []byte{0, 0, 0, 1, 'x'}))
	f.Add(append(rep(rep(bytes.Clone(good), p.OptStructuredReply, p.RepErrUnsup, nil), p.OptGo, p.RepErrUnsup, nil), make([]byte, 10)...))
	f.Fuzz(func(t *testing.T, in []byte) {
		h := &handshake{t: Target{Export: "x"}, nc: bytesConn{bytes.NewReader(in)}}
		ex, err := h.run(t.Context())
		if err != nil {
			return
		}
		m := ex.minBlock
		if ex.size <= 0 || m == 0 || m&(m-1) != 0 || ex.maxBlock < m || ex.maxBlock > p.MaxPayload || ex.maxBlock%512 != 0 || ex.size%int64(m) != 0 {
			t.Fatalf("negotiated %+v", ex)
		}
	})
}
