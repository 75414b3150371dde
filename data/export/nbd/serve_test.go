package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"forerun/block"
	"forerun/internal/nbdproto"
)

// both runs a test with simple and with structured replies.
func both(t *testing.T, f func(t *testing.T, structured bool)) {
	for _, s := range []bool{false, true} {
		t.Run(map[bool]string{false: "simple", true: "structured"}[s], func(t *testing.T) { f(t, s) })
	}
}

func TestCommands(t *testing.T) {
	for _, bs := range []int{1, 512, 4096} {
		both(t, func(t *testing.T, structured bool) {
			m := newMem(4<<20, bs)
			var fua, flushes atomic.Int32
			var zeroFlags, prefetch atomic.Int64
			m.gate = func(_ context.Context, op string, off, n int64, f block.Flags) error {
				if f.Has(block.FUA) {
					fua.Add(1)
				}
				switch op {
				case "flush":
					flushes.Add(1)
				case "zero":
					zeroFlags.Store(int64(f))
				case "prefetch":
					prefetch.Store(n)
				}
				return nil
			}
			s, l := start(t, Options{Exports: table{"": m.checked()}})
			c := dial(t, l)
			c.open("", structured)

			p := pattern(70000, 1)
			c.ok(nbdproto.CmdWrite, 0, 12345, 70000, p)
			if !bytes.Equal(c.bytes(12345, 70000), p) {
				t.Error("what was written is not read")
			}
			m.mu.Lock()
			if !bytes.Equal(m.data[12345:82345], p) || m.data[12344] != 0 || m.data[82345] != 0 {
				t.Error("what was written is not what the device has")
			}
			m.mu.Unlock()
			big := pattern(3<<20, 9)
			c.ok(nbdproto.CmdWrite, 0, 1<<20, 3<<20, big)
			if !bytes.Equal(c.bytes(1<<20, 3<<20), big) {
				t.Error("a large write is not read")
			}
			c.ok(nbdproto.CmdWrite, nbdproto.CmdFlagFUA, 0, 4096, p[:4096])
			if fua.Load() != 1 {
				t.Errorf("%d calls with FUA", fua.Load())
			}
			c.ok(nbdproto.CmdFlush, 0, 0, 0, nil)
			if flushes.Load() != 1 {
				t.Errorf("%d flushes", flushes.Load())
			}
			c.ok(nbdproto.CmdWriteZeroes, nbdproto.CmdFlagNoHole, 100, 9000, nil)
			if f := block.Flags(zeroFlags.Load()); f.Has(block.MayTrim) {
				t.Errorf("flags %v with NO_HOLE", f)
			}
			if b := c.bytes(0, 10000); !bytes.Equal(b[:100], p[:100]) || !bytes.Equal(b[100:9100], make([]byte, 9000)) {
				t.Error("zeroes are wrong")
			}
			c.ok(nbdproto.CmdWriteZeroes, 0, 8192, 8192, nil)
			if f := block.Flags(zeroFlags.Load()); !f.Has(block.MayTrim) {
				t.Errorf("flags %v without NO_HOLE", f)
			}
			if bs > 1 {
				c.fails(nbdproto.ENOTSUP, nbdproto.CmdWriteZeroes, nbdproto.CmdFlagFastZero, 1, 8192, nil)
			}
			c.ok(nbdproto.CmdWriteZeroes, nbdproto.CmdFlagFastZero, 0, 8192, nil)
			if f := block.Flags(zeroFlags.Load()); !f.Has(block.FastZero) {
				t.Errorf("flags %v with FAST_ZERO", f)
			}
			c.ok(nbdproto.CmdTrim, 0, 1<<20+1, 8192+4096, nil)
			if got := c.bytes(1<<20, 1); got[0] != big[0] {
				t.Error("trim reached before its range")
			}
			if got := c.bytes(1<<20+4096, 4096); !bytes.Equal(got, make([]byte, 4096)) {
				t.Error("trim of whole blocks left them")
			}
			c.ok(nbdproto.CmdTrim, 0, 1, 1, nil)
			c.ok(nbdproto.CmdCache, 0, 5000, 10, nil)
			if n := prefetch.Load(); n < 10 || n%int64(bs) != 0 {
				t.Errorf("prefetched %d", n)
			}

			// Nothing, and nonsense.
			c.ok(nbdproto.CmdRead, 0, 0, 0, nil)
			c.ok(nbdproto.CmdRead, 0, 4<<20, 0, nil)
			c.ok(nbdproto.CmdWrite, 0, 3, 0, nil)
			c.ok(nbdproto.CmdTrim, 0, 3, 0, nil)
			c.ok(nbdproto.CmdCache, 0, 3, 0, nil)
			c.ok(nbdproto.CmdWriteZeroes, 0, 3, 0, nil)
			const end = 4 << 20
			c.fails(nbdproto.EINVAL, nbdproto.CmdRead, 0, end-1, 2, nil)
			c.fails(nbdproto.EINVAL, nbdproto.CmdRead, 0, 1<<63, 512, nil)
			c.fails(nbdproto.EINVAL, nbdproto.CmdRead, 0, ^uint64(0), 512, nil)
			c.fails(nbdproto.ENOSPC, nbdproto.CmdWrite, 0, end-1, 2, []byte("ab"))
			c.fails(nbdproto.ENOSPC, nbdproto.CmdWrite, 0, ^uint64(0)-1, 2, []byte("ab"))
			c.fails(nbdproto.ENOSPC, nbdproto.CmdWriteZeroes, 0, end-1, 2, nil)
			c.fails(nbdproto.EINVAL, nbdproto.CmdTrim, 0, end-1, 2, nil)
			c.fails(nbdproto.EINVAL, nbdproto.CmdCache, 0, end, 1, nil)
			c.fails(nbdproto.EINVAL, nbdproto.CmdBlockStatus, 0, 0, 512, nil)
			c.fails(nbdproto.EINVAL, nbdproto.CmdFlush, 0, 0, 512, nil)
			c.fails(nbdproto.EINVAL, nbdproto.CmdFlush, 0, 512, 0, nil)
			c.fails(nbdproto.EINVAL, 77, 0, 0, 0, nil)
			for bit := range 16 {
				f := uint16(1) << bit
				if f != nbdproto.CmdFlagFUA && (f != nbdproto.CmdFlagDF || !structured) {
					c.fails(nbdproto.EINVAL, nbdproto.CmdRead, f, 0, 512, nil)
				}
				if f != nbdproto.CmdFlagFUA {
					c.fails(nbdproto.EINVAL, nbdproto.CmdWrite, f, 0, 5, []byte("hello"))
				}
			}
			c.ok(nbdproto.CmdRead, nbdproto.CmdFlagFUA, 0, 0, nil)
			long := uint32(nbdproto.MaxPayload + 1)
			if structured {
				c.fails(nbdproto.EOVERFLOW, nbdproto.CmdRead, 0, 0, long, nil)
			} else {
				c.fails(nbdproto.EINVAL, nbdproto.CmdRead, 0, 0, long, nil)
			}
			c.fails(nbdproto.EINVAL, nbdproto.CmdWrite, 0, 0, long, make([]byte, long))
			c.bytes(0, 512) // still in step

			st := s.Stats()
			if r := st.Command[Flush]; r.Requests != 3 || r.Errors != 2 {
				t.Errorf("flushes are counted as %+v", r)
			}
			if w := st.Command[Write]; w.Bytes != 70000+3<<20+4096 {
				t.Errorf("writes are counted as %+v", w)
			}
			c.send(nbdproto.CmdDisc, 0, 0, 0, nil)
			c.ended()
		})
	}
}

func TestHostileHeaders(t *testing.T) {
	_, l := start(t, Options{Exports: table{"": newMem(1<<20, 1)}})
	c := dial(t, l)
	c.open("", true)
	c.write(make([]byte, nbdproto.RequestLen))
	c.ended()
	c = dial(t, l)
	c.open("", true)
	c.send(nbdproto.CmdWrite, 0, 0, 0xffffffff, nil)
	c.ended()
}

func TestReadOnly(t *testing.T) {
	m := newMem(1<<20, 1)
	m.info.ReadOnly = true
	_, l := start(t, Options{Exports: table{"": m.checked()}})
	c := dial(t, l)
	c.open("", true)
	c.fails(nbdproto.EPERM, nbdproto.CmdWrite, 0, 0, 3, []byte("abc"))
	c.fails(nbdproto.EPERM, nbdproto.CmdTrim, 0, 0, 3, nil)
	c.fails(nbdproto.EPERM, nbdproto.CmdWriteZeroes, 0, 0, 3, nil)
	c.bytes(0, 512)
}

func TestDeviceErrors(t *testing.T) {
	for kind, want := range map[block.Kind]uint32{
		block.KindIO: nbdproto.EIO, block.KindCorrupt: nbdproto.EIO, block.KindUnavailable: nbdproto.EIO,
		block.KindNoSpace: nbdproto.ENOSPC, block.KindClosed: nbdproto.ESHUTDOWN, block.KindFenced: nbdproto.EPERM,
		block.KindUnsupported: nbdproto.EINVAL, block.KindCanceled: nbdproto.EIO,
	} {
		both(t, func(t *testing.T, structured bool) {
			m := newMem(1<<20, 512)
			var broken atomic.Bool
			m.gate = func(context.Context, string, int64, int64, block.Flags) error {
				if broken.Load() {
					return block.E("test", "", kind, errors.New(strings.Repeat("it broke ", 300)))
				}
				return nil
			}
			_, l := start(t, Options{Exports: table{"": m}})
			c := dial(t, l)
			c.open("", structured)
			broken.Store(true)
			c.fails(want, nbdproto.CmdRead, 0, 0, 4096, nil)
			c.fails(want, nbdproto.CmdRead, 0, 1, 4096, nil)
			c.fails(want, nbdproto.CmdRead, 0, 0, 1<<20, nil)
			c.fails(want, nbdproto.CmdWrite, 0, 0, 4096, make([]byte, 4096))
			c.fails(want, nbdproto.CmdWrite, 0, 1, 4096, make([]byte, 4096))
			c.fails(want, nbdproto.CmdWriteZeroes, 0, 0, 4096, nil)
			c.fails(want, nbdproto.CmdTrim, 0, 0, 4096, nil)
			c.fails(want, nbdproto.CmdFlush, 0, 0, 0, nil)
			c.fails(want, nbdproto.CmdCache, 0, 0, 4096, nil)
			broken.Store(false)
			c.bytes(0, 4096)
		})
	}
}

func TestBlockStatus(t *testing.T) {
	for _, bs := range []int{1, 512} {
		m := newMem(1<<20, bs)
		m.info.CanExtents = true
		m.state = func(off int64) (block.ExtentKind, block.State) {
			i := off / 4096
			return block.ExtentKind(i / 2 % 4), block.State(i / 4 % 5)
		}
		var local, asked atomic.Int32
		m.gate = func(_ context.Context, op string, _, _ int64, f block.Flags) error {
			if f.Has(block.Local) {
				local.Add(1)
			}
			asked.Add(1)
			return nil
		}
		_, l := start(t, Options{Exports: table{"": m.checked()}})
		c := dial(t, l)
		c.open("", true, "base:allocation", "forerun:state")
		ask := func(off uint64, n uint32, flags uint16) map[uint32][]span {
			cookie := c.send(nbdproto.CmdBlockStatus, flags, off, n, nil)
			got := map[uint32][]span{}
			for {
				r := c.next(0)
				if r.cookie != cookie || r.typ != nbdproto.ReplyTypeBlockStatus {
					t.Fatalf("reply %+v", r)
				}
				id, s := spansOf(r.data)
				got[id] = s
				if r.flags&nbdproto.ReplyFlagDone != 0 {
					return got
				}
			}
		}
		// data, data, zero, zero, hole, hole, free, free, data...
		got := ask(100, 40000, 0)
		want := map[uint32][]span{
			1: {{8092, 0}, {8192, 2}, {8192, 3}, {15524, 0}},
			2: {{16284, 0}, {16384, 1}, {7332, 2}},
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("blocks of %d: %v, want %v", bs, got, want)
		}
		got = ask(8192, 40000, nbdproto.CmdFlagReqOne)
		want = map[uint32][]span{1: {{8192, 2}}, 2: {{8192, 0}}}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("one, blocks of %d: %v, want %v", bs, got, want)
		}
		if a, n := asked.Load(), local.Load(); a != 4 || n != 2 {
			t.Errorf("%d times asked, %d of them local", a, n)
		}
		got = ask(8193, 3, nbdproto.CmdFlagReqOne)
		want = map[uint32][]span{1: {{3, 2}}, 2: {{3, 0}}}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("little, blocks of %d: %v, want %v", bs, got, want)
		}
		c.fails(nbdproto.EINVAL, nbdproto.CmdBlockStatus, 0, 0, 0, nil)
		c.fails(nbdproto.EINVAL, nbdproto.CmdBlockStatus, 0, 1<<20, 1, nil)
	}
}

// TestSlowOnesHoldUpNobody has reads that wait while others are served, first
// when the server is told that they will, then when it has to find out.
func TestSlowOnesHoldUpNobody(t *testing.T) {
	for _, near := range []string{"told", "unknown", "lied to"} {
		t.Run(near, func(t *testing.T) {
			m := newMem(1<<20, 1)
			open := make(chan struct{})
			var waiting atomic.Int32
			m.gate = func(ctx context.Context, op string, off, _ int64, _ block.Flags) error {
				if off < 100*4096 && op == "read" {
					waiting.Add(1)
					defer waiting.Add(-1)
					select {
					case <-open:
					case <-ctx.Done():
						return ctx.Err()
					}
				}
				return nil
			}
			o := Options{Exports: table{"": m}}
			switch near {
			case "told":
				o.Near = func(_ block.Device, off, _ int64) bool { return off >= 100*4096 }
			case "lied to":
				o.Near = func(block.Device, int64, int64) bool { return true }
			}
			s, l := start(t, o)
			c := dial(t, l)
			c.open("", true)
			slow := map[uint64]bool{}
			var batch []byte
			for i := range 100 {
				c.cookie++
				slow[c.cookie] = true
				batch = nbdproto.Request{Type: nbdproto.CmdRead, Cookie: c.cookie, Offset: uint64(i) * 4096, Length: 4096}.Append(batch)
			}
			c.write(batch)
			began := time.Now()
			for i := range 200 {
				if i%2 == 0 {
					c.bytes(uint64(100+i%50)*4096, 4096)
				} else {
					c.ok(nbdproto.CmdWrite, 0, uint64(200+i%50)*4096, 4096, pattern(4096, byte(i)))
				}
			}
			for waiting.Load() < 100 && time.Since(began) < 5*time.Second {
				time.Sleep(time.Millisecond)
			}
			if n := waiting.Load(); n != 100 {
				t.Fatalf("%d reads wait at once", n)
			}
			if d := time.Since(began); d > 2*time.Second {
				t.Errorf("it took %v", d)
			}
			takeovers := s.Stats().Takeovers
			if (near == "told") != (takeovers == 0) {
				t.Errorf("%d takeovers", takeovers)
			}
			close(open)
			for range 100 {
				r := c.next(4096)
				if !slow[r.cookie] || r.errno != 0 {
					t.Fatalf("reply %d error %d", r.cookie, r.errno)
				}
				delete(slow, r.cookie)
			}
		})
	}
}

// TestBackPressure keeps more requests coming than are allowed at once.
func TestBackPressure(t *testing.T) {
	m := newMem(8<<20, 1)
	var now, most atomic.Int64
	m.gate = func(_ context.Context, op string, _, n int64, _ block.Flags) error {
		v := now.Add(n)
		for o := most.Load(); v > o && !most.CompareAndSwap(o, v); o = most.Load() {
		}
		time.Sleep(200 * time.Microsecond)
		now.Add(-n)
		return nil
	}
	_, l := start(t, Options{Exports: table{"": m}, MaxRequests: 8, MaxBuffer: 1 << 20,
		Near: func(block.Device, int64, int64) bool { return false }})
	c := dial(t, l)
	c.open("", false)
	const total = 300
	go func() {
		var b []byte
		for i := range total {
			n := uint32(4096)
			if i%10 == 0 {
				n = 512 << 10
			}
			b = nbdproto.Request{Type: nbdproto.CmdRead, Cookie: uint64(i), Offset: 0, Length: n}.Append(b)
		}
		if _, err := c.nc.Write(b); err != nil {
			t.Error(err)
		}
	}()
	// The client is slow to take what it asked for.
	time.Sleep(50 * time.Millisecond)
	for range total {
		h := c.read(16)
		r, ok := nbdproto.ParseSimpleReply(h)
		if !ok || r.Errno != 0 {
			t.Fatalf("reply %x", h)
		}
		n := 4096
		if r.Cookie%10 == 0 {
			n = 512 << 10
		}
		c.read(n)
	}
	if most.Load() > 1<<20 {
		t.Errorf("%d bytes were under way at once", most.Load())
	}
}

// TestPartsOfBlocks has connections write neighbouring bytes of the same blocks
// at once. Every byte has one writer, so none may be lost.
func TestPartsOfBlocks(t *testing.T) {
	const blocks, bs = 8, 512
	m := newMem(blocks*bs, bs)
	m.gate = func(context.Context, string, int64, int64, block.Flags) error {
		if rand.IntN(4) == 0 {
			runtime.Gosched()
		}
		return nil
	}
	shared := m.checked()
	_, l := start(t, Options{Exports: table{"a": shared, "b": shared}})
	want := make([]byte, blocks*bs)
	var wg sync.WaitGroup
	// Writer 0 owns whole blocks 6 and 7 and writes them whole; the others own
	// bytes of the rest, and parts that reach into each other's blocks.
	for w := range 4 {
		c := dial(t, l)
		c.open(map[bool]string{true: "a", false: "b"}[w%2 == 0], w%2 == 0)
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(7, uint64(w)))
			if w == 0 {
				for i := range 300 {
					p := pattern(bs, byte(i))
					b := 6 + rnd.IntN(2)
					copy(want[b*bs:], p)
					c.ok(nbdproto.CmdWrite, 0, uint64(b*bs), bs, p)
				}
				return
			}
			// Bytes [1000*(w-1), 1000*w) of the first 3000.
			for range 300 {
				lo := 1000 * (w - 1)
				off := lo + rnd.IntN(990)
				n := 1 + rnd.IntN(lo+1000-off)
				if rnd.IntN(3) == 0 {
					clear(want[off : off+n])
					c.ok(nbdproto.CmdWriteZeroes, 0, uint64(off), uint32(n), nil)
					continue
				}
				p := pattern(n, byte(rnd.Uint32()))
				copy(want[off:], p)
				c.ok(nbdproto.CmdWrite, uint16(rnd.IntN(2)), uint64(off), uint32(n), p)
			}
		})
	}
	wg.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	if !bytes.Equal(m.data, want) {
		for i := range want {
			if m.data[i] != want[i] {
				t.Fatalf("byte %d is %#x, was written as %#x", i, m.data[i], want[i])
			}
		}
	}
}

func TestHoldsGoInOrder(t *testing.T) {
	var h holds
	a, ok := h.try(0, 10)
	b, ok2 := h.try(5, 20)
	if !ok || !ok2 {
		t.Fatal("whole writes exclude each other")
	}
	got := make(chan string, 2)
	go func() { id := h.take(8, 12, true); got <- "alone"; h.drop(id) }()
	for {
		h.mu.Lock()
		n := len(h.list)
		h.mu.Unlock()
		if n == 3 {
			break
		}
		runtime.Gosched()
	}
	if _, ok := h.try(11, 12); ok {
		t.Error("a later write overtakes one that waits")
	}
	if id, ok := h.try(30, 40); !ok {
		t.Error("a write elsewhere waits")
	} else {
		h.drop(id)
	}
	h.drop(a)
	select {
	case <-got:
		t.Error("a part was changed under a whole write")
	case <-time.After(20 * time.Millisecond):
	}
	h.drop(b)
	<-got
}

func TestMaxIO(t *testing.T) {
	m := newMem(1<<20, 512)
	m.info.MaxIO = 5000
	_, l := start(t, Options{Exports: table{"": m.checked()}})
	c := dial(t, l)
	c.open("", true)
	p := pattern(300000, 5)
	c.ok(nbdproto.CmdWrite, 0, 512, 300032, append(p, make([]byte, 32)...))
	c.ok(nbdproto.CmdWrite, 0, 513, 100, p[1:101])
	if !bytes.Equal(c.bytes(512, 300000), p) {
		t.Error("pieces do not add up")
	}
}

// TestDrain shuts down with requests under way.
func TestDrain(t *testing.T) {
	m := newMem(1<<20, 1)
	entered := make(chan struct{}, 2)
	open := make(chan struct{})
	m.gate = func(_ context.Context, op string, _, _ int64, _ block.Flags) error {
		entered <- struct{}{}
		<-open
		return nil
	}
	s := NewServer(Options{Exports: table{"": m}})
	l, err := s.Listen("nbd://127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	stop := serveUntilEnd(t, s, l)
	c := dial(t, l)
	c.open("", true)
	idle := dial(t, l) // in the handshake
	p := pattern(4096, 3)
	w := c.send(nbdproto.CmdWrite, nbdproto.CmdFlagFUA, 0, 4096, p)
	r := c.send(nbdproto.CmdRead, 0, 8192, 4096, nil)
	<-entered
	<-entered
	go stop()
	idle.ended()
	if _, err := net.DialTimeout("tcp", l.Addr().String(), time.Second); err == nil {
		t.Error("the server still takes connections")
	}
	close(open)
	for range 2 {
		a := c.next(0)
		if a.errno != 0 || a.cookie != w && a.cookie != r {
			t.Errorf("reply %+v", a)
		}
	}
	c.ended()
	stop()
	m.mu.Lock()
	defer m.mu.Unlock()
	if !bytes.Equal(m.data[:4096], p) {
		t.Error("the write was lost")
	}
}

// TestDrainIsBounded gives up reads that do not come back by themselves.
func TestDrainIsBounded(t *testing.T) {
	m := newMem(1<<20, 1)
	entered := make(chan struct{}, 1)
	m.gate = func(ctx context.Context, _ string, _, _ int64, _ block.Flags) error {
		entered <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	}
	for _, typ := range []uint16{nbdproto.CmdRead, nbdproto.CmdFlush, nbdproto.CmdWrite} {
		s := NewServer(Options{Exports: table{"": m}, DrainTimeout: 50 * time.Millisecond})
		l, err := s.Listen("nbd://127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		stop := serveUntilEnd(t, s, l)
		c := dial(t, l)
		c.open("", true)
		switch typ {
		case nbdproto.CmdWrite:
			c.send(typ, 0, 0, 512, make([]byte, 512))
		case nbdproto.CmdRead:
			c.send(typ, 0, 0, 512, nil)
		default:
			c.send(typ, 0, 0, 0, nil)
		}
		<-entered
		began := time.Now()
		stop()
		if d := time.Since(began); d > 3*time.Second {
			t.Errorf("%v: shutdown took %v", Command(typ), d)
		}
	}
}

// TestClientDies cancels what waits for the link, and finishes what writes.
func TestClientDies(t *testing.T) {
	m := newMem(1<<20, 1)
	var canceled, wrote atomic.Int32
	entered := make(chan struct{}, 3)
	die := make(chan struct{})
	m.gate = func(ctx context.Context, op string, _, _ int64, _ block.Flags) error {
		entered <- struct{}{}
		if op == "write" {
			<-die
			time.Sleep(20 * time.Millisecond)
			if ctx.Err() == nil {
				wrote.Add(1)
			}
			return nil
		}
		<-ctx.Done()
		canceled.Add(1)
		return ctx.Err()
	}
	s, l := start(t, Options{Exports: table{"": m}})
	c := dial(t, l)
	c.open("", true)
	c.send(nbdproto.CmdRead, 0, 0, 4096, nil)
	c.send(nbdproto.CmdCache, 0, 0, 4096, nil)
	c.send(nbdproto.CmdWrite, 0, 0, 4096, pattern(4096, 8))
	for range 3 {
		<-entered
	}
	c.nc.Close()
	close(die)
	for i := 0; s.Stats().Connections > 0; i++ {
		if i > 500 {
			t.Fatal("the connection does not end")
		}
		time.Sleep(10 * time.Millisecond)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if canceled.Load() != 2 || wrote.Load() != 1 || !bytes.Equal(m.data[:4096], pattern(4096, 8)) {
		t.Errorf("%d canceled, %d written", canceled.Load(), wrote.Load())
	}
}

// TestDeadClientsQueue: what a client asked for before it died, and the server
// has read from the socket, is not served to nobody.
func TestDeadClientsQueue(t *testing.T) {
	m := newMem(1<<20, 1)
	var served atomic.Int32
	died := make(chan struct{})
	m.gate = func(context.Context, string, int64, int64, block.Flags) error { // as of data that is here
		<-died
		served.Add(1)
		return nil
	}
	s, l := start(t, Options{Exports: table{"": m}, MaxBuffer: 4 << 20})
	c := dial(t, l)
	c.open("", true)
	var b []byte
	for i := range 2000 {
		b = nbdproto.Request{Type: nbdproto.CmdRead, Cookie: uint64(i), Length: 1 << 20}.Append(b)
	}
	c.write(b)
	c.nc.Close()
	time.Sleep(10 * time.Millisecond)
	close(died)
	for i := 0; s.Stats().Connections > 0; i++ {
		if i > 1000 {
			t.Fatal("the connection does not end")
		}
		time.Sleep(10 * time.Millisecond)
	}
	if n := served.Load(); n > 100 {
		t.Errorf("%d requests were served after their client had died", n)
	}
}

func TestDisconnect(t *testing.T) {
	s, l := start(t, Options{Exports: table{"a": newMem(1<<20, 1), "b": newMem(1<<20, 1)}})
	a, b := dial(t, l), dial(t, l)
	a.open("a", true)
	b.open("b", false)
	a.bytes(0, 512)
	b.bytes(0, 512)
	if s.Connections("a") != 1 {
		t.Errorf("%d connections", s.Connections("a"))
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := s.Disconnect(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	a.ended()
	b.bytes(0, 512)
}

// TestAgainstTwin does random things over several connections, each in a part
// of its own, and compares every read with a slice.
func TestAgainstTwin(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for _, bs := range []int{1, 512} {
		const part = 1 << 20
		m := newMem(3*part, bs)
		m.gate = func(context.Context, string, int64, int64, block.Flags) error {
			switch rand.IntN(200) {
			case 0:
				time.Sleep(3 * time.Millisecond)
			case 1, 2, 3:
				time.Sleep(50 * time.Microsecond)
			}
			return nil
		}
		_, l := start(t, Options{Exports: table{"": m.checked()}})
		var wg sync.WaitGroup
		for k := range 3 {
			c := dial(t, l)
			c.open("", k != 1)
			wg.Go(func() {
				rnd := rand.New(rand.NewPCG(seed, uint64(k)))
				if err := randomly(c, rnd, uint64(k*part), part, k != 1); err != nil {
					t.Errorf("seed %d, blocks of %d, connection %d: %v", seed, bs, k, err)
				}
			})
		}
		wg.Wait()
	}
}

// randomly keeps several requests under way that do not touch each other's
// bytes, in [base, base+size).
func randomly(c *client, rnd *rand.Rand, base uint64, size int, structured bool) error {
	twin := make([]byte, size)
	type flight struct {
		typ    uint16
		off, n int
	}
	for range 60 {
		under := map[uint64]flight{}
		var batch []byte
		// The part is cut into stripes, one for each request of a round.
		count := 1 + rnd.IntN(20)
		stripe := size / count
		for i := range count {
			n := 1 + rnd.IntN(min(stripe, 1<<(1+rnd.IntN(17))))
			off := i*stripe + rnd.IntN(stripe-n+1)
			if rnd.IntN(2) == 0 {
				off, n = off&^4095, max(n&^4095, 512)
				if off < i*stripe || off+n > (i+1)*stripe {
					continue
				}
			}
			f := flight{uint16([]uint16{0, 0, 0, 1, 1, 1, 6}[rnd.IntN(7)]), off, n}
			c.cookie++
			under[c.cookie] = f
			r := nbdproto.Request{Type: f.typ, Cookie: c.cookie, Offset: base + uint64(off), Length: uint32(n)}
			if f.typ != nbdproto.CmdRead {
				r.Flags = uint16(rnd.IntN(2))
			}
			batch = r.Append(batch)
			if f.typ == nbdproto.CmdWrite {
				p := pattern(n, byte(rnd.Uint32()))
				copy(twin[off:], p)
				batch = append(batch, p...)
			} else if f.typ == nbdproto.CmdWriteZeroes {
				clear(twin[off : off+n])
			}
		}
		sent := make(chan error, 1)
		go func() { _, err := c.nc.Write(batch); sent <- err }()
		for len(under) > 0 {
			var h [16]byte
			copy(h[:], c.read(16))
			var cookie uint64
			var data []byte
			if s, ok := nbdproto.ParseSimpleReply(h[:]); ok {
				cookie = s.Cookie
				if s.Errno != 0 {
					return fmt.Errorf("error %d", s.Errno)
				}
				if f := under[cookie]; f.typ == nbdproto.CmdRead {
					data = c.read(f.n)
				}
			} else {
				k, _ := nbdproto.ParseChunk(append(h[:], c.read(4)...))
				cookie = k.Cookie
				data = c.read(int(k.Length))
				if k.Type != nbdproto.ReplyTypeOffsetData {
					return fmt.Errorf("chunk %d %q", k.Type, data)
				}
				data = data[8:]
			}
			f, ok := under[cookie]
			if !ok {
				return fmt.Errorf("a reply to nothing")
			}
			delete(under, cookie)
			if f.typ == nbdproto.CmdRead && !bytes.Equal(data, twin[f.off:f.off+f.n]) {
				return fmt.Errorf("wrong bytes in %d at %d", f.n, f.off)
			}
		}
		if err := <-sent; err != nil {
			return err
		}
	}
	return nil
}

// TestReadsDoNotAllocate holds the local path to its budget.
func TestReadsDoNotAllocate(t *testing.T) {
	m := newMem(1<<20, 1)
	_, l := start(t, Options{Exports: table{"": m}, Near: func(block.Device, int64, int64) bool { return true }})
	c := dial(t, l)
	c.open("", true)
	req := nbdproto.Request{Type: nbdproto.CmdRead, Cookie: 1, Offset: 4096, Length: 4096}.Append(nil)
	in := make([]byte, 4096+28)
	once := func() {
		if _, err := c.nc.Write(req); err != nil {
			t.Fatal(err)
		}
		for n := 0; n < len(in); {
			k, err := c.nc.Read(in[n:])
			if err != nil {
				t.Fatal(err)
			}
			n += k
		}
	}
	for range 100 {
		once()
	}
	if n := testing.AllocsPerRun(2000, once); n >= 0.5 {
		t.Errorf("%.2f allocations a read", n)
	}
}
