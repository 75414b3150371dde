package msg

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
	"forerun/lab/wan"
)

var bg = context.Background()

// pair runs two Conns over a line until the test ends.
func pair(t *testing.T, w *wan.WAN, a, b Options) (*Conn, *Conn) {
	t.Helper()
	na, nb := sockets(t, w)
	ca, cb := New(na, a), New(nb, b)
	var wg sync.WaitGroup
	for _, c := range []*Conn{ca, cb} {
		wg.Go(func() { c.Run(bg); c.Wait() })
	}
	t.Cleanup(func() { ca.Close(); cb.Close(); wg.Wait() })
	return ca, cb
}

func sockets(t *testing.T, w *wan.WAN) (a, b net.Conn) {
	t.Helper()
	ln, err := w.Listen("x:1")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if a, err = w.Dial("x:1"); err != nil {
		t.Fatal(err)
	}
	if b, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	return a, b
}

func lan() *wan.WAN { return wan.New(wan.Link{Rate: 100 << 20, Delay: time.Millisecond}) }

func echo(_ context.Context, _ uint8, p []byte) ([]byte, error) { return p, nil }

func TestEcho(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := pair(t, lan(), Options{Serve: echo}, Options{Serve: echo})
		var wg sync.WaitGroup
		for i := range 500 {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(i), 1))
				c, typ := a, uint8(i)
				if i%2 == 1 {
					c = b
				}
				n := r.IntN(3000)
				if r.IntN(20) == 0 && typ < Urgent {
					n = r.IntN(defaultMax + 1)
				}
				p := make([]byte, n)
				for k := range p {
					p[k] = byte(r.Uint32())
				}
				cut := r.IntN(n + 1)
				got, err := c.Call(bg, typ, p[:cut], nil, p[cut:])
				if err != nil || !bytes.Equal(got, p) {
					t.Errorf("call %d: %d bytes of %d, %v", i, len(got), n, err)
				}
			})
		}
		wg.Wait()
	})
}

func TestErrorsKeepTheirKind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := pair(t, lan(), Options{}, Options{Serve: func(_ context.Context, typ uint8, p []byte) ([]byte, error) {
			switch typ {
			case 1:
				return nil, &block.Error{Op: "x.y", Kind: block.KindFenced, Err: errors.New("line\none " + strings.Repeat("ä", 2000))}
			case 2:
				return make([]byte, defaultMax+1), nil
			case 3:
				return nil, &block.Error{Op: "x.y", Kind: 99}
			}
			return nil, nil
		}})
		for typ, want := range map[uint8]block.Kind{1: block.KindFenced, 2: block.KindInvalid, 3: block.KindIO, 4: block.KindNone} {
			_, err := a.Call(bg, typ)
			if block.KindOf(err) != want {
				t.Errorf("type %d: %v", typ, err)
			}
			var be *block.Error
			if err != nil && (!errors.As(err, &be) || strings.Contains(err.Error(), "\n") || len(err.Error()) > 2*maxText) {
				t.Errorf("type %d: %q", typ, err)
			}
		}
		if _, err := a.Call(bg, 5, make([]byte, defaultMax+1)); block.KindOf(err) != block.KindInvalid {
			t.Error(err)
		}
		if _, err := a.Call(bg, Urgent, make([]byte, MaxUrgent+1)); block.KindOf(err) != block.KindInvalid {
			t.Error(err)
		}
	})
}

// TestRequestsInBothDirectionsDoNotBlockEachOther: every request served needs
// one in the other direction, more of them than either side serves at once.
func TestRequestsInBothDirectionsDoNotBlockEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var a, b *Conn
		a, b = pair(t, lan(),
			Options{Limit: 4, Serve: func(ctx context.Context, typ uint8, p []byte) ([]byte, error) {
				if typ == 1 {
					return a.Call(ctx, 2, p)
				}
				return p, nil
			}}, Options{Limit: 4, Serve: echo})
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				if _, err := b.Call(bg, 1, make([]byte, 5000)); err != nil {
					t.Error(err)
				}
			})
			wg.Go(func() {
				if _, err := a.Call(bg, 2, make([]byte, 5000)); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	})
}

func TestLimitAndUrgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hold := make(chan struct{})
		var busy, most atomic.Int64
		a, _ := pair(t, lan(), Options{}, Options{Limit: 8, Serve: func(ctx context.Context, typ uint8, p []byte) ([]byte, error) {
			if typ < Urgent {
				n := busy.Add(1)
				defer busy.Add(-1)
				for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
				}
				<-hold
			}
			return p, nil
		}})
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if _, err := a.Call(bg, 1, []byte("x")); err != nil {
					t.Error(err)
				}
			})
		}
		// Callers that give up keep their place until the answer has come.
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		for range 20 {
			wg.Go(func() {
				if _, err := a.Call(ctx, 1); block.KindOf(err) != block.KindCanceled {
					t.Error(err)
				}
			})
		}
		time.Sleep(2 * time.Second)
		if busy.Load() != 8 {
			t.Errorf("%d at once", busy.Load())
		}
		if p, err := a.Call(bg, Urgent, []byte("beat")); err != nil || string(p) != "beat" {
			t.Error(string(p), err)
		}
		close(hold)
		wg.Wait()
		if _, err := a.Call(bg, 1); err != nil || most.Load() != 8 {
			t.Error(err, most.Load())
		}
	})
}

// TestUrgentOvertakes: on a slow line with much queued, an urgent call waits
// for one piece, not for the queue.
func TestUrgentOvertakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := pair(t, wan.New(wan.Link{Rate: 1 << 20, Delay: time.Millisecond, Queue: 32 << 10}), Options{}, Options{Serve: echo})
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() { a.Call(bg, 1, make([]byte, 4<<10)) })
		}
		time.Sleep(100 * time.Millisecond)
		begin := time.Now()
		if _, err := a.Call(bg, Urgent); err != nil {
			t.Error(err)
		}
		if d := time.Since(begin); d > 500*time.Millisecond {
			t.Errorf("an urgent call took %v", d)
		}
		wg.Wait()
	})
}

func TestDeadPeer(t *testing.T) {
	for _, way := range []wan.Way{wan.Forward, wan.Backward, wan.Both} {
		for _, load := range []bool{false, true} {
			t.Run(fmt.Sprintf("way %d load %v", way, load), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := lan()
					o := Options{Idle: time.Second, Serve: echo}
					na, nb := sockets(t, w)
					// Neither side hears the other close: each has to find out itself.
					a, b := New(deaf{na}, o), New(deaf{nb}, o)
					var wg sync.WaitGroup
					var ends [2]time.Time
					for i, c := range []*Conn{a, b} {
						wg.Go(func() {
							err := c.Run(bg)
							ends[i] = time.Now()
							if block.KindOf(err) != block.KindUnavailable {
								t.Error(err)
							}
							c.Wait()
						})
					}
					for _, c := range []*Conn{a, b} {
						if !load {
							continue
						}
						for range 2 {
							wg.Go(func() {
								for {
									if _, err := c.Call(bg, 1, make([]byte, 10<<10)); err != nil {
										if block.KindOf(err) != block.KindUnavailable {
											t.Error(err)
										}
										return
									}
								}
							})
						}
					}
					time.Sleep(time.Second + 9*time.Second*time.Duration(1-sign(load)))
					select {
					case <-a.Done():
						t.Error("a died on a good line")
					case <-b.Done():
						t.Error("b died on a good line")
					default:
					}
					cut := time.Now()
					w.Partition(way, true)
					<-a.Done()
					<-b.Done()
					na.Close()
					nb.Close()
					w.Close()
					wg.Wait()
					for i, e := range ends {
						if d := e.Sub(cut); d > 1800*time.Millisecond {
							t.Errorf("side %d noticed after %v", i, d)
						}
					}
				})
			})
		}
	}
}

func sign(b bool) int {
	if b {
		return 1
	}
	return 0
}

// deaf does not tell the other side that it was closed.
type deaf struct{ net.Conn }

func (d deaf) Close() error { return d.SetDeadline(time.Unix(1, 0)) }

// TestSlowLine: a line that is slow but works is not given up.
func TestSlowLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := wan.New(wan.Link{Rate: 256 << 10, Delay: 100 * time.Millisecond, Queue: 64 << 10})
		o := Options{Idle: 2 * time.Second, Serve: echo}
		a, b := pair(t, w, o, o)
		var wg sync.WaitGroup
		for i := range 20 {
			c := a
			if i%2 == 0 {
				c = b
			}
			wg.Go(func() {
				if _, err := c.Call(bg, 1, make([]byte, 200<<10)); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	})
}

func TestLostConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := lan()
		var ended atomic.Bool
		a, b := pair(t, w, Options{}, Options{Serve: func(ctx context.Context, _ uint8, _ []byte) ([]byte, error) {
			<-ctx.Done()
			ended.Store(true)
			return nil, ctx.Err()
		}})
		go func() {
			time.Sleep(time.Second)
			w.Cut()
		}()
		if _, err := a.Call(bg, 1); block.KindOf(err) != block.KindUnavailable {
			t.Error(err)
		}
		b.Wait()
		if !ended.Load() {
			t.Error("the request outlived its connection")
		}
		if _, err := a.Call(bg, 1); block.KindOf(err) != block.KindUnavailable {
			t.Error(err)
		}
	})
}

func TestCallsBeforeTheHello(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		na, nb := sockets(t, lan())
		a := New(na, Options{})
		var wg sync.WaitGroup
		wg.Go(func() { a.Run(bg) })
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		if _, err := a.Call(ctx, 1); block.KindOf(err) != block.KindCanceled {
			t.Error(err)
		}
		wg.Go(func() {
			if _, err := a.Call(bg, 1); block.KindOf(err) != block.KindUnavailable {
				t.Error(err)
			}
		})
		wg.Wait() // nobody says hello: given up
		nb.Close()
	})
}

func TestClientComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := lan()
		serve := func() (stop func()) {
			ln, err := w.Listen("s:1")
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(bg)
			var wg sync.WaitGroup
			wg.Go(func() {
				for {
					nc, err := ln.Accept()
					if err != nil {
						return
					}
					wg.Go(func() { New(nc, Options{Serve: echo}).Run(ctx) })
				}
			})
			return func() { ln.Close(); cancel(); wg.Wait() }
		}
		var ups []bool
		c := NewClient(ClientOptions{Addr: "s:1", Dial: func(ctx context.Context) (net.Conn, error) { return w.DialContext(ctx, "", "s:1") },
			Up: func(up bool) { ups = append(ups, up) }})
		if _, err := c.Call(bg, 1); block.KindOf(err) != block.KindUnavailable {
			t.Error(err)
		}
		ran := make(chan error, 1)
		go func() { ran <- c.Run(bg) }()
		time.Sleep(3 * time.Second)
		if c.Up() || c.Stats().Error == "" {
			t.Error("up without a server")
		}
		for range 3 {
			stop := serve()
			ctx, cancel := context.WithTimeout(bg, time.Second)
			if err := c.WaitUp(ctx); err != nil {
				t.Error(err)
			}
			cancel()
			if p, err := c.Call(bg, 1, []byte("x")); err != nil || string(p) != "x" {
				t.Error(p, err)
			}
			w.Cut()
			time.Sleep(100 * time.Millisecond)
			if p, err := c.Call(bg, 1, []byte("x")); err != nil || string(p) != "x" {
				t.Error(p, err)
			}
			stop()
			time.Sleep(time.Second)
			if _, err := c.Call(bg, 1); block.KindOf(err) != block.KindUnavailable {
				t.Error(err)
			}
		}
		c.Close()
		if err := <-ran; err != nil {
			t.Error(err)
		}
		if len(ups) != 12 || c.Stats().Connections != 6 {
			t.Error(ups, c.Stats())
		}
		if err := c.WaitUp(bg); block.KindOf(err) != block.KindClosed {
			t.Error(err)
		}
	})
}

// stream plays bytes to a Conn and swallows what it says.
type stream struct {
	net.Conn
	r *bytes.Reader
}

func (s stream) Read(p []byte) (int, error)  { return s.r.Read(p) }
func (s stream) Write(p []byte) (int, error) { return len(p), nil }
func (s stream) Close() error                { return nil }
func (s stream) RemoteAddr() net.Addr        { return wan.Addr("fuzz") }

func play(b []byte) error {
	c := New(stream{r: bytes.NewReader(b)}, Options{Max: MaxUrgent, Limit: 4, Serve: echo})
	go c.Call(bg, 7, []byte("a call that may be answered"))
	err := c.Run(bg)
	c.Wait()
	return err
}

func TestHostile(t *testing.T) {
	hi := appendHello(nil, hello{max: MaxUrgent, limit: 1, urgent: 1, bytes: 1})
	with := func(h header, p int) []byte { return append(appendHeader(bytes.Clone(hi), h), make([]byte, p)...) }
	bad := bytes.Clone(hi)
	bad[headerLen] = 'X'
	newer := bytes.Clone(hi)
	newer[headerLen+7] = 2
	small := bytes.Clone(hi)
	binary.BigEndian.PutUint32(small[headerLen+8:], 10)
	for what, c := range map[string]struct {
		b    []byte
		want block.Kind
	}{
		"nothing":                   {nil, block.KindUnavailable},
		"no hello":                  {appendHeader(nil, header{}), block.KindInvalid},
		"another magic":             {bad, block.KindInvalid},
		"a newer version":           {newer, block.KindUnsupported},
		"a hello that takes little": {small, block.KindInvalid},
		"a second hello":            {append(bytes.Clone(hi), hi...), block.KindInvalid},
		"too long":                  {with(header{n: MaxUrgent + 1}, 0), block.KindInvalid},
		"longer than memory":        {with(header{n: 1<<32 - 1}, 0), block.KindInvalid},
		"an answer to nothing":      {with(header{flags: flagAnswer, id: 1 << 40}, 0), block.KindInvalid},
		"a pong to nothing":         {with(header{flags: flagAnswer | flagControl, id: 5}, 0), block.KindInvalid},
		"a ping with bytes":         {with(header{n: 1, flags: flagControl}, 1), block.KindInvalid},
		"unknown flags":             {with(header{flags: 8}, 0), block.KindInvalid},
		"unknown control":           {with(header{flags: flagControl, typ: 9}, 0), block.KindInvalid},
		"a long text":               {with(header{n: 5000, flags: flagAnswer | flagError}, 0), block.KindInvalid},
		"kind without error":        {with(header{kind: 3}, 0), block.KindInvalid},
		"cut short":                 {with(header{n: 10}, 5), block.KindUnavailable},
	} {
		if err := play(c.b); block.KindOf(err) != c.want {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestMoreThanAgreed: a peer that does not keep to the limit is cut off.
func TestMoreThanAgreed(t *testing.T) {
	for _, typ := range []uint8{1, Urgent} {
		na, nb := net.Pipe()
		hold := make(chan struct{})
		c := New(na, Options{Limit: 4, Serve: func(context.Context, uint8, []byte) ([]byte, error) { <-hold; return nil, nil }})
		go func() {
			b := appendHello(nil, hello{max: MaxUrgent, limit: 1, urgent: 1, bytes: 1})
			for i := range uint64(4 + 1 + 60*uint64(typ>>7)) {
				b = appendHeader(b, header{typ: typ, id: i})
			}
			nb.Write(b)
		}()
		go func() {
			for p := make([]byte, 1000); ; {
				if _, err := nb.Read(p); err != nil {
					return
				}
			}
		}()
		if err := c.Run(bg); block.KindOf(err) != block.KindInvalid {
			t.Error(typ, err)
		}
		close(hold)
		c.Wait()
		nb.Close()
	}
}

func FuzzConn(f *testing.F) {
	hi := appendHello(nil, hello{max: MaxUrgent, limit: 100, urgent: 10, bytes: 1 << 20})
	f.Add(hi)
	f.Add(append(appendHeader(bytes.Clone(hi), header{n: 3, typ: 1, id: 9}), "abc"...))
	f.Add(append(appendHeader(bytes.Clone(hi), header{n: 2, typ: 7, flags: 1, id: 1}), "ab"...))
	f.Add(append(appendHeader(bytes.Clone(hi), header{n: 2, typ: 7, flags: 3, kind: 9, id: 1}), "ab"...))
	f.Add(appendHeader(bytes.Clone(hi), header{flags: 4, id: 7}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := play(b); err == nil {
			t.Fatal("the stream ended and nobody noticed")
		}
	})
}

func BenchmarkCall(b *testing.B) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	na, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	nb, err := ln.Accept()
	if err != nil {
		b.Fatal(err)
	}
	ln.Close()
	x, y := New(na, Options{}), New(nb, Options{Serve: func(context.Context, uint8, []byte) ([]byte, error) { return nil, nil }})
	var wg sync.WaitGroup
	wg.Go(func() { x.Run(bg) })
	wg.Go(func() { y.Run(bg) })
	p := make([]byte, 4096)
	for _, depth := range []int{1, 32} {
		b.Run(fmt.Sprint("depth ", depth), func(b *testing.B) {
			b.ReportAllocs()
			b.SetParallelism(max(1, depth/runtime.GOMAXPROCS(0)))
			if depth == 1 {
				for b.Loop() {
					if _, err := x.Call(bg, 1, p); err != nil {
						b.Fatal(err)
					}
				}
				return
			}
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if _, err := x.Call(bg, 1, p); err != nil {
						b.Error(err)
					}
				}
			})
		})
	}
	x.Close()
	wg.Wait()
}
