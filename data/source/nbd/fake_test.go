package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"forerun/block"
	p "forerun/internal/nbdproto"
)

// fake is a server that does what a test says, for what real ones never do.
type fake struct {
	t       *testing.T
	l       net.Listener
	wg      sync.WaitGroup
	mu      sync.Mutex
	conns   []net.Conn
	n       atomic.Int64 // connections so far
	size    atomic.Int64
	flags   uint16
	opts    func(opt uint32, data []byte) (rep uint32, ok bool) // answers an option with an error
	handler func(c net.Conn, q query)
}

// query is a request as the fake got it.
type query struct {
	conn       int64
	flags, cmd uint16
	cookie     uint64
	off        int64
	n          uint32
	data       []byte
}

func newFake(t *testing.T, flags uint16, handler func(c net.Conn, q query)) (*fake, Target) {
	sock := socketPath(t)
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{t: t, l: l, flags: p.FlagHasFlags | flags, handler: handler}
	f.size.Store(1 << 20)
	f.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f.mu.Lock()
			f.conns = append(f.conns, c)
			f.mu.Unlock()
			f.wg.Go(func() {
				defer c.Close()
				f.serve(c, f.n.Add(1))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		f.hangUp()
		f.wg.Wait()
	})
	return f, target(t, "nbd+unix:///x?socket="+sock)
}

// hangUp breaks all connections.
func (f *fake) hangUp() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.conns {
		c.Close()
	}
	f.conns = nil
}

var be = binary.BigEndian

func (f *fake) serve(c net.Conn, n int64) {
	b := be.AppendUint64(nil, p.Magic)
	b = be.AppendUint64(b, p.OptMagic)
	b = be.AppendUint16(b, p.FlagFixedNewstyle|p.FlagNoZeroes)
	c.Write(b)
	h := make([]byte, 16)
	if _, err := io.ReadFull(c, h[:4]); err != nil {
		return
	}
	reply := func(opt, rep uint32, data []byte) {
		b := be.AppendUint64(nil, p.RepMagic)
		b = be.AppendUint32(b, opt)
		b = be.AppendUint32(b, rep)
		b = be.AppendUint32(b, uint32(len(data)))
		c.Write(append(b, data...))
	}
	for open := false; !open; {
		if _, err := io.ReadFull(c, h); err != nil {
			return
		}
		opt := be.Uint32(h[8:])
		data := make([]byte, be.Uint32(h[12:]))
		if _, err := io.ReadFull(c, data); err != nil {
			return
		}
		if f.opts != nil {
			if rep, ok := f.opts(opt, data); ok {
				reply(opt, rep, nil)
				continue
			}
		}
		switch opt {
		case p.OptStructuredReply:
			reply(opt, p.RepAck, nil)
		case p.OptSetMetaContext:
			reply(opt, p.RepMetaContext, append(be.AppendUint32(nil, 77), p.ContextAllocation...))
			reply(opt, p.RepAck, nil)
		case p.OptGo:
			b := be.AppendUint16(nil, p.InfoExport)
			b = be.AppendUint64(b, uint64(f.size.Load()))
			reply(opt, p.RepInfo, be.AppendUint16(b, f.flags))
			reply(opt, p.RepAck, nil)
			open = true
		case p.OptExportName:
			b := be.AppendUint64(nil, uint64(f.size.Load()))
			c.Write(be.AppendUint16(b, f.flags))
			open = true
		default:
			reply(opt, p.RepErrUnsup, nil)
		}
	}
	q := make([]byte, p.RequestLen)
	for {
		if _, err := io.ReadFull(c, q); err != nil {
			return
		}
		r := query{n, be.Uint16(q[4:]), be.Uint16(q[6:]), be.Uint64(q[8:]), int64(be.Uint64(q[16:])), be.Uint32(q[24:]), nil}
		if r.cmd == p.CmdDisc {
			return
		}
		if r.cmd == p.CmdWrite {
			r.data = make([]byte, r.n)
			if _, err := io.ReadFull(c, r.data); err != nil {
				return
			}
		}
		f.handler(c, r)
	}
}

func simple(cookie uint64, errno uint32) []byte {
	b := be.AppendUint32(nil, p.SimpleReplyMagic)
	b = be.AppendUint32(b, errno)
	return be.AppendUint64(b, cookie)
}

func structured(cookie uint64, flags, kind uint16, payload []byte) []byte {
	b := be.AppendUint32(nil, p.StructuredReplyMagic)
	b = be.AppendUint16(b, flags)
	b = be.AppendUint16(b, kind)
	b = be.AppendUint64(b, cookie)
	b = be.AppendUint32(b, uint32(len(payload)))
	return append(b, payload...)
}

func dataChunk(cookie uint64, flags uint16, off int64, data []byte) []byte {
	return structured(cookie, flags, p.ReplyTypeOffsetData, append(be.AppendUint64(nil, uint64(off)), data...))
}

func holeChunk(cookie uint64, flags uint16, off int64, n uint32) []byte {
	return structured(cookie, flags, p.ReplyTypeOffsetHole, be.AppendUint32(be.AppendUint64(nil, uint64(off)), n))
}

// zeroServer answers everything well; reads with sevens.
func zeroServer(c net.Conn, q query) {
	switch q.cmd {
	case p.CmdRead:
		c.Write(dataChunk(q.cookie, p.ReplyFlagDone, q.off, bytes.Repeat([]byte{7}, int(q.n))))
	case p.CmdBlockStatus:
		b := be.AppendUint32(nil, 77)
		b = be.AppendUint32(b, 1<<20)
		c.Write(structured(q.cookie, p.ReplyFlagDone, p.ReplyTypeBlockStatus, be.AppendUint32(b, 0)))
	default:
		c.Write(simple(q.cookie, 0))
	}
}

func TestChangedExportIsFatal(t *testing.T) {
	f, tg := newFake(t, 0, zeroServer)
	c := open(t, tg, Options{})
	b := make([]byte, 512)
	if err := c.ReadAt(ctx, b, 0, 0); err != nil {
		t.Fatal(err)
	}
	f.size.Store(2 << 20)
	f.hangUp()
	err := c.ReadAt(ctx, b, 0, 0)
	kindIs(t, err, block.KindCorrupt)
	t.Log(err)
	f.size.Store(1 << 20)
	kindIs(t, c.ReadAt(ctx, b, 0, 0), block.KindCorrupt)
}

// TestPieces answers a read in pieces out of order, with a hole.
func TestPieces(t *testing.T) {
	_, tg := newFake(t, 0, func(c net.Conn, q query) {
		k := q.cookie
		c.Write(dataChunk(k, 0, q.off+1024, bytes.Repeat([]byte{3}, 512)))
		c.Write(holeChunk(k, 0, q.off+512, 512))
		c.Write(dataChunk(k, 0, q.off+1536, bytes.Repeat([]byte{4}, 512)))
		c.Write(dataChunk(k, 0, q.off, bytes.Repeat([]byte{1}, 512)))
		c.Write(structured(k, p.ReplyFlagDone, p.ReplyTypeNone, nil))
	})
	c := open(t, tg, Options{})
	b := bytes.Repeat([]byte{0xee}, 2048)
	if err := c.ReadAt(ctx, b, 4096, 0); err != nil {
		t.Fatal(err)
	}
	for i, want := range []byte{1, 0, 3, 4} {
		if !bytes.Equal(b[i*512:][:512], bytes.Repeat([]byte{want}, 512)) {
			t.Fatalf("sector %d is wrong", i)
		}
	}
}

// TestViolations: a server that breaks the rules gives no wrong bytes and no
// endless loop.
func TestViolations(t *testing.T) {
	for name, h := range map[string]func(c net.Conn, q query){
		"bytes missing": func(c net.Conn, q query) { c.Write(dataChunk(q.cookie, 1, q.off, make([]byte, 100))) },
		"bytes twice": func(c net.Conn, q query) {
			c.Write(dataChunk(q.cookie, 0, q.off, make([]byte, 512)))
			c.Write(dataChunk(q.cookie, 1, q.off, make([]byte, 512)))
		},
		"beyond":           func(c net.Conn, q query) { c.Write(dataChunk(q.cookie, 1, q.off+512, make([]byte, 512))) },
		"before":           func(c net.Conn, q query) { c.Write(dataChunk(q.cookie, 1, q.off-512, make([]byte, 512))) },
		"nothing":          func(c net.Conn, q query) { c.Write(structured(q.cookie, 1, p.ReplyTypeNone, nil)) },
		"simple":           func(c net.Conn, q query) { c.Write(append(simple(q.cookie, 0), make([]byte, q.n)...)) },
		"another cookie":   func(c net.Conn, q query) { c.Write(dataChunk(q.cookie+1<<32, 1, q.off, make([]byte, q.n))) },
		"noise":            func(c net.Conn, q query) { c.Write(bytes.Repeat([]byte("noise"), 10)) },
		"a status":         func(c net.Conn, q query) { c.Write(structured(q.cookie, 1, p.ReplyTypeBlockStatus, make([]byte, 12))) },
		"a long error":     func(c net.Conn, q query) { c.Write(structured(q.cookie, 1, p.ReplyTypeError, make([]byte, 70000))) },
		"an unknown chunk": func(c net.Conn, q query) { c.Write(structured(q.cookie, 1, 99, nil)) },
	} {
		t.Run(name, func(t *testing.T) {
			_, tg := newFake(t, 0, h)
			c := open(t, tg, Options{})
			err := c.ReadAt(ctx, make([]byte, 512), 1024, 0)
			kindIs(t, err, block.KindIO)
			t.Log(err)
		})
	}
}

func TestErrorTextIsTold(t *testing.T) {
	_, tg := newFake(t, 0, func(c net.Conn, q query) {
		b := be.AppendUint32(nil, p.EPERM)
		b = append(be.AppendUint16(b, 4), "no\x1b!"...)
		c.Write(structured(q.cookie, 1, p.ReplyTypeErrorOffset, append(b, make([]byte, 8)...)))
	})
	err := open(t, tg, Options{}).ReadAt(ctx, make([]byte, 512), 0, 0)
	kindIs(t, err, block.KindReadOnly)
	if !strings.Contains(err.Error(), `no\x1b!`) {
		t.Fatal(err)
	}
}

// TestCancel: a caller leaves a read that is not answered, its buffer is left
// alone, and the late answer disturbs nobody.
func TestCancel(t *testing.T) {
	var late sync.Map
	_, tg := newFake(t, 0, func(c net.Conn, q query) {
		if q.off == 0 {
			late.Store(q.cookie, q)
			return
		}
		late.Range(func(k, v any) bool {
			old := v.(query)
			c.Write(dataChunk(old.cookie, p.ReplyFlagDone, old.off, bytes.Repeat([]byte{9}, int(old.n))))
			late.Delete(k)
			return true
		})
		zeroServer(c, q)
	})
	c := open(t, tg, Options{})
	b := make([]byte, 4096)
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	kindIs(t, c.ReadAt(short, b, 0, 0), block.KindCanceled)
	d := make([]byte, 512)
	if err := c.ReadAt(ctx, d, 512, 0); err != nil || d[0] != 7 {
		t.Fatal(err, d[0])
	}
	if !bytes.Equal(b, make([]byte, 4096)) {
		t.Fatal("the buffer was written after the call")
	}
	if s := c.Stats(); s.Reconnects != 0 {
		t.Fatalf("%+v", s)
	}
}

// TestCancelInTheMiddle: the server stops in the middle of the bytes of a read.
func TestCancelInTheMiddle(t *testing.T) {
	var once atomic.Bool
	f, tg := newFake(t, 0, func(c net.Conn, q query) {
		if once.CompareAndSwap(false, true) {
			c.Write(dataChunk(q.cookie, p.ReplyFlagDone, q.off, make([]byte, q.n))[:2000])
			return
		}
		zeroServer(c, q)
	})
	c := open(t, tg, Options{})
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	kindIs(t, c.ReadAt(short, make([]byte, 4096), 0, 0), block.KindCanceled)
	if err := c.ReadAt(ctx, make([]byte, 512), 512, 0); err != nil {
		t.Fatal(err)
	}
	if f.n.Load() != 2 {
		t.Fatalf("%d connections", f.n.Load())
	}
}

// TestServerThatDoesNotRead holds nobody who gave up.
func TestServerThatDoesNotRead(t *testing.T) {
	stop := make(chan struct{})
	_, tg := newFake(t, 0, func(c net.Conn, q query) { <-stop })
	defer close(stop)
	c := open(t, tg, Options{})
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			err := c.WriteAt(short, make([]byte, 256<<10), int64(i)*256<<10, 0)
			if k := block.KindOf(err); k != block.KindCanceled {
				t.Error(err)
			}
		})
	}
	began := time.Now()
	wg.Wait()
	if d := time.Since(began); d > graceChange+2*graceStream {
		t.Fatalf("it took %v", d)
	}
}

// TestLostFlush: a flush after a loss fails once, also for those beside it.
func TestLostFlush(t *testing.T) {
	f, tg := newFake(t, p.FlagSendFlush|p.FlagCanMultiConn|p.FlagSendFUA, zeroServer)
	c := open(t, tg, Options{Connections: 3})
	b := make([]byte, 512)
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ok(c.WriteAt(ctx, b, 0, 0))
	ok(c.Flush(ctx, 0))
	ok(c.WriteAt(ctx, b, 0, block.FUA))
	f.hangUp()
	ok(c.Flush(ctx, 0)) // nothing was in doubt
	ok(c.WriteAt(ctx, b, 0, 0))
	f.hangUp()
	ok(c.WriteAt(ctx, b, 0, 0))
	err := c.Flush(ctx, 0)
	kindIs(t, err, block.KindIO)
	if !errors.Is(err, errDoubt) {
		t.Fatal(err)
	}
	ok(c.Flush(ctx, 0))
}

func TestFlushState(t *testing.T) {
	var s flushState
	c := &conn{}
	s.wrote(c)
	a, b := s.begin(), s.begin() // two flushes at once
	s.lost(c)
	if s.end(a) == nil || s.end(b) == nil {
		t.Fatal("a flush beside the one that failed was called good")
	}
	if err := s.end(s.begin()); err != nil {
		t.Fatal(err)
	}
	s.wrote(c)
	if err := s.end(s.begin()); err != nil {
		t.Fatal(err)
	}
	s.lost(c) // all was flushed
	if err := s.end(s.begin()); err != nil {
		t.Fatal(err)
	}
	m := s.begin()
	s.wrote(c)
	s.lost(c)
	if s.endFUA(m) == nil {
		t.Fatal("a write lost before its flush was called durable")
	}
	if s.endFUA(s.begin()) != nil {
		t.Fatal("an older loss was held against a write that is durable")
	}
	if s.end(s.begin()) == nil {
		t.Fatal("the loss was not told to Flush")
	}
}

// TestOldServers: without OptGo, and without structured replies.
func TestOldServers(t *testing.T) {
	f, tg := newFake(t, 0, func(c net.Conn, q query) { c.Write(append(simple(q.cookie, 0), bytes.Repeat([]byte{7}, int(q.n))...)) })
	f.opts = func(uint32, []byte) (uint32, bool) { return p.RepErrUnsup, true }
	plain := f.opts
	f.opts = func(opt uint32, d []byte) (uint32, bool) {
		if opt == p.OptExportName {
			return 0, false
		}
		return plain(opt, d)
	}
	c := open(t, tg, Options{})
	b := make([]byte, 512)
	if err := c.ReadAt(ctx, b, 0, 0); err != nil || b[511] != 7 {
		t.Fatal(err)
	}
	if ext, err := c.Extents(ctx, nil, 0, 1<<20, 0); err != nil || len(ext) != 1 || ext[0].Kind != block.Data {
		t.Fatal(ext, err)
	}
}

// TestHostileGreetings: no greeting, of any length, makes Open hang or panic.
func TestHostileGreetings(t *testing.T) {
	good := append(be.AppendUint64(be.AppendUint64(nil, p.Magic), p.OptMagic), 0, 3)
	for name, b := range map[string][]byte{
		"http":      []byte("HTTP/1.1 400 Bad Request\r\n\r\n"),
		"old style": be.AppendUint64(be.AppendUint64(nil, p.Magic), oldstyleMagic),
		"short":     good[:9],
		"a reply of 4 GiB": be.AppendUint32(be.AppendUint32(be.AppendUint32(be.AppendUint64(bytes.Clone(good), p.RepMagic),
			p.OptStructuredReply), p.RepAck), 1<<32-1),
	} {
		t.Run(name, func(t *testing.T) {
			sock := socketPath(t)
			l, err := net.Listen("unix", sock)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			done := make(chan struct{})
			go func() {
				defer close(done)
				if c, err := l.Accept(); err == nil {
					c.Write(b)
					c.(*net.UnixConn).CloseWrite()
					io.Copy(io.Discard, c)
					c.Close()
				}
			}()
			_, err = Open(ctx, target(t, "nbd+unix:///?socket="+sock), Options{})
			<-done
			if err == nil {
				t.Fatal("opened")
			}
			t.Log(err)
		})
	}
	// A server that accepts and says nothing.
	sock := socketPath(t)
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	short, cancel := context.WithTimeout(ctx, 30*time.Millisecond)
	defer cancel()
	_, err = Open(short, target(t, "nbd+unix:///?socket="+sock), Options{})
	kindIs(t, err, block.KindCanceled)
	t.Log(err)
}

func TestParseURI(t *testing.T) {
	for _, c := range []struct {
		uri, network, address, export string
		tls                           bool
	}{
		{"nbd://host", "tcp", "host:10809", "", false},
		{"nbd://host/", "tcp", "host:10809", "", false},
		{"nbd://host:1234/a%20b/c", "tcp", "host:1234", "a b/c", false},
		{"nbd://[::1]:99/x", "tcp", "[::1]:99", "x", false},
		{"nbd:///x", "tcp", "localhost:10809", "x", false},
		{"nbds://host//x", "tcp", "host:10809", "/x", true},
		{"nbd+unix:///x?socket=/a%3fb", "unix", "/a?b", "x", false},
		{"nbds+unix:///?socket=/s&tls-verify-peer=false", "unix", "/s", "", true},
	} {
		g, err := ParseURI(c.uri)
		if err != nil || g.Network != c.network || g.Address != c.address || g.Export != c.export || g.TLS != c.tls {
			t.Errorf("%s: %+v %v", c.uri, g, err)
		}
	}
	for _, uri := range []string{"", "host", "http://x", "nbd:host", "nbd+unix:///x", "nbd+unix://host/x?socket=/s", "nbd://h:0/", "nbd://h:99999/",
		"nbd://h/?socket=/s", "nbd://h/?tls-certificates=/d", "nbd://u@h/", "nbd://h/#x", "nbds://h/?tls-verify-peer=perhaps", "nbd://h/?x=1",
		"nbd+unix:///?socket=/" + strings.Repeat("x", 107), "nbd://h/" + strings.Repeat("x", 5000), "nbd://%zz"} {
		if _, err := ParseURI(uri); block.KindOf(err) != block.KindInvalid {
			t.Errorf("%.60s: %v", uri, err)
		}
	}
}
