package linktest

import (
	"context"
	"crypto/tls"
	"errors"
	"math"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
	"forerun/internal/msg"
	"forerun/internal/pki"
	"forerun/lab/wan"

	"go.uber.org/goleak"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func certificates(t testing.TB) string {
	dir := t.TempDir()
	if err := pki.Init(dir); err != nil {
		t.Fatal(err)
	}
	for _, r := range []pki.Request{
		{Role: pki.RoleBackend, Name: "b1", Hosts: []string{"backend", "127.0.0.1"}},
		{Role: pki.RoleFrontend, Name: "f1"}, {Role: pki.RoleOperator, Name: "o1"},
	} {
		if err := pki.Issue(dir, r); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// serve hands connections of ln over after TLS, as a backend does, until stop is called.
func serve(ln net.Listener, cfg *tls.Config, attend func(ctx context.Context, nc net.Conn, role, name string)) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer nc.Close()
				tc := tls.Server(nc, cfg)
				if tc.HandshakeContext(ctx) != nil {
					return
				}
				role, name := pki.PeerIdentity(tc.ConnectionState())
				if attend != nil {
					attend(ctx, tc, role, name)
				}
			})
		}
	})
	return func() {
		cancel()
		ln.Close()
		wg.Wait()
	}
}

func serverTLS(dir, alpn string) *tls.Config {
	c := must(pki.ServerTLS(dir, "b1", pki.RoleFrontend)).Clone()
	c.NextProtos = []string{alpn}
	c.DynamicRecordSizingDisabled = true
	return c
}

// overWAN runs f in virtual time with a backend at the far end of a line.
func overWAN(t *testing.T, l wan.Link, so ServerOptions, f func(t *testing.T, w *wan.WAN, s *Server, o Options)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		dir := certificates(t)
		w := wan.New(l)
		defer w.Close()
		s := NewServer(so)
		defer serve(must(w.Listen("backend:1")), serverTLS(dir, msg.ProtoLinkTest), s.Attend)()
		f(t, w, s, Options{Addr: "backend:1", TLS: must(pki.ClientTLS(dir, "f1", pki.RoleBackend)), Dial: w.DialContext,
			Connections: 2, Time: 3 * time.Second, Say: func(l string) { t.Log(l) }})
	})
}

func within(t *testing.T, what string, got, want, tolerance float64) {
	t.Helper()
	if math.Abs(got-want) > tolerance*want {
		t.Errorf("%s: %.4g, want %.4g", what, got, want)
	}
}

// mbit is a million bits a second in bytes.
const mbit = 1e6 / 8

// TestKnownLine: rate and round trip of a line with a queue of a second come
// out as they are, in both directions.
func TestKnownLine(t *testing.T) {
	overWAN(t, wan.Link{Delay: 20 * time.Millisecond, Rate: 8 * mbit, Queue: 8 * mbit}, ServerOptions{}, func(t *testing.T, w *wan.WAN, s *Server, o Options) {
		r, err := Run(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		within(t, "idle round trip", r.Idle.MedianMS, 40, 0.1)
		if r.Idle.Samples < 20 || r.Idle.JitterMS > 4 {
			t.Errorf("%+v", r.Idle)
		}
		if len(r.Downloads) != 2 || len(r.Uploads) != 2 {
			t.Fatalf("%+v", r)
		}
		for _, p := range append(r.Downloads, r.Uploads...) {
			what := string(p.Direction)
			within(t, what+" rate", p.Rate, 8*mbit, 0.1)
			within(t, what+" round trip", p.RTT.MedianMS, 1040, 0.1)
			within(t, what+" bloat", p.BloatMS, 1000, 0.1)
			if p.Grade != "severe" || p.Loss != nil || p.Congestion != "" || p.Seconds < 0.7 || p.Moved == 0 || p.RTT.Samples < 10 {
				t.Errorf("%+v", p)
			}
		}
		if e := r.Expect(Plan{SizeBytes: 1 << 30, Ratio: 2}); e.Connections != 1 || !e.QoS || e.More {
			t.Errorf("%+v", e)
		}
		time.Sleep(time.Second)
		if s.mu.Lock(); len(s.tests)+len(s.peers) != 0 || w.Stats().Conns != 0 {
			t.Errorf("%d tests and %d connections are left", len(s.tests), w.Stats().Conns)
		}
		s.mu.Unlock()
	})
}

// TestOneConnectionIsNotEnough: a window of a quarter of what the line holds, a
// short queue.
func TestOneConnectionIsNotEnough(t *testing.T) {
	l := wan.Link{Delay: 100 * time.Millisecond, Rate: 16 * mbit, Queue: 8 << 10}
	l.Window = int(16*mbit) / 15 // a third of what 200 ms hold
	overWAN(t, l, ServerOptions{}, func(t *testing.T, _ *wan.WAN, _ *Server, o Options) {
		o.Connections, o.Time = 8, 4*time.Second
		r, err := Run(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		d := r.Downloads
		if len(d) != 4 || d[1].Connections != 2 || d[2].Connections != 4 {
			t.Fatalf("%+v", d)
		}
		within(t, "rate of one", d[0].Rate, 16*mbit/3, 0.15)
		within(t, "rate of four", d[2].Rate, 16*mbit, 0.1)
		within(t, "rate of eight", d[3].Rate, 16*mbit, 0.1)
		within(t, "idle round trip", r.Idle.MedianMS, 200, 0.1)
		if d[3].BloatMS > 30 || len(r.Uploads) != 2 {
			t.Errorf("%+v", r)
		}
		if e := r.Expect(Plan{SizeBytes: 1 << 30, Ratio: 2}); e.Connections != 4 || e.More || e.QoS {
			t.Errorf("%+v", e)
		}
	})
}

func TestBusy(t *testing.T) {
	var busy atomic.Bool
	busy.Store(true)
	so := ServerOptions{Busy: func() string {
		if busy.Load() {
			return "3 sessions are open"
		}
		return ""
	}}
	overWAN(t, wan.Link{Delay: 5 * time.Millisecond, Rate: 8 * mbit}, so, func(t *testing.T, w *wan.WAN, s *Server, o Options) {
		o.Connections, o.Time = 1, 500*time.Millisecond
		refused := func(want string) {
			t.Helper()
			_, err := Run(t.Context(), o)
			if block.KindOf(err) != block.KindBusy || !strings.Contains(err.Error(), want) {
				t.Errorf("%v, want %q", err, want)
			}
		}
		refused("3 sessions are open; test at another time, or with --force")
		o.Force = true
		if _, err := Run(t.Context(), o); err != nil {
			t.Error(err)
		}
		o.Force = false

		// A workload comes while a test is under way: it ends before its next phase.
		busy.Store(false)
		say := o.Say
		o.Say = func(l string) {
			busy.Store(busy.Load() || strings.HasPrefix(l, "download"))
			say(l)
		}
		refused("3 sessions are open")
		busy.Store(false)
		o.Say = say

		// Others test already.
		var held []*conn
		for i := range maxTests {
			held = append(held, must(o.dial(t.Context(), hello{id: testID{byte(i)}})))
		}
		refused("link tests are under way already")
		for len(held) < MaxConns {
			held = append(held, must(o.dial(t.Context(), hello{})))
		}
		if _, err := o.dial(t.Context(), hello{}); block.KindOf(err) != block.KindBusy || !strings.Contains(err.Error(), "16 link test connections") {
			t.Error(err)
		}
		for _, c := range held {
			c.close()
		}
		time.Sleep(time.Second)
		if _, err := Run(t.Context(), o); err != nil {
			t.Error(err)
		}
	})
}

// TestEnds: of the caller's patience, of the server, of the line, of the time a
// test may take.
func TestEnds(t *testing.T) {
	l := wan.Link{Delay: 5 * time.Millisecond, Rate: 2 * mbit}
	overWAN(t, l, ServerOptions{}, func(t *testing.T, w *wan.WAN, _ *Server, o Options) {
		o.Time = 10 * time.Second
		ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
		defer cancel()
		began := time.Now()
		if _, err := Run(ctx, o); block.KindOf(err) != block.KindCanceled || time.Since(began) > 5*time.Second {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		time.AfterFunc(6*time.Second, w.Cut)
		if _, err := Run(t.Context(), o); block.KindOf(err) != block.KindUnavailable {
			t.Error(err)
		}
		w.Partition(wan.Both, true)
		if _, err := Run(t.Context(), o); block.KindOf(err) == block.KindNone {
			t.Error("a line that carries nothing was measured")
		}
		w.Partition(wan.Both, false)
	})
	overWAN(t, l, ServerOptions{}, func(t *testing.T, _ *wan.WAN, s *Server, o Options) {
		c := must(o.dial(t.Context(), hello{}))
		defer c.close()
		// Pings keep a connection, though not for ever.
		var err error
		began := time.Now()
		for err == nil {
			c.nc.SetDeadline(time.Now().Add(time.Minute))
			if _, err = c.nc.Write(append(appendHeader(nil, tPing, 8), "12345678"...)); err == nil {
				_, err = c.expect(tPong)
			}
			time.Sleep(time.Minute)
		}
		if d := time.Since(began); d < testLife || d > testLife+3*time.Minute {
			t.Errorf("ended after %v: %v", d, err)
		}
	})
}

// TestServerStops: Attend returns though its peer reads nothing.
func TestServerStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		defer b.Close()
		s := NewServer(ServerOptions{})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); s.Attend(ctx, a, "frontend", "f") }()
		b.Write(appendHello(nil, hello{}))
		b.Read(make([]byte, 16))
		b.Write(appendOrder(nil, tSend, order{duration: time.Minute}))
		synctest.Wait()
		cancel()
		began := time.Now()
		<-done
		if time.Since(began) > 0 {
			t.Errorf("it took %v", time.Since(began))
		}
	})
}

// TestOverTCP: sockets tell of loss, and who is in the way is told.
func TestOverTCP(t *testing.T) {
	defer goleak.VerifyNone(t)
	dir := certificates(t)
	listen := func() net.Listener { return must(net.Listen("tcp", "127.0.0.1:0")) }
	cfg := must(pki.ClientTLS(dir, "f1", pki.RoleBackend))
	run := func(addr string, cfg *tls.Config) (Result, error) {
		return Run(t.Context(), Options{Addr: addr, TLS: cfg, Connections: 3, Time: time.Second, Bytes: 4 << 20})
	}

	ln := listen()
	stop := serve(ln, serverTLS(dir, msg.ProtoLinkTest), NewServer(ServerOptions{}).Attend)
	r, err := run(ln.Addr().String(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range append(r.Downloads, r.Uploads...) {
		if p.Moved != 4<<20*int64(p.Connections) && p.Seconds < 0.2 {
			t.Errorf("%+v", p)
		}
		if runtime.GOOS == "linux" && (p.Loss == nil || p.Loss.Segments == 0 || p.Congestion == "") {
			t.Errorf("%+v", p)
		}
	}
	// An operator's certificate is none of a frontend.
	if _, err := run(ln.Addr().String(), must(pki.ClientTLS(dir, "o1", pki.RoleBackend))); block.KindOf(err) != block.KindDenied {
		t.Error(err)
	}
	stop()
	if _, err := run(ln.Addr().String(), cfg); block.KindOf(err) != block.KindUnavailable || !strings.Contains(err.Error(), "cannot be reached") {
		t.Error(err)
	}

	for _, alpn := range []string{"forerun-wire", ""} {
		c := serverTLS(dir, alpn)
		if alpn == "" {
			c.NextProtos = nil
		}
		ln = listen()
		stop = serve(ln, c, nil)
		if _, err := run(ln.Addr().String(), cfg); block.KindOf(err) != block.KindUnsupported || !strings.Contains(err.Error(), "older than link test") {
			t.Errorf("%q: %v", alpn, err)
		}
		stop()
	}

	// Another authority's backend is not taken for an old one.
	ln = listen()
	stop = serve(ln, serverTLS(certificates(t), "forerun-wire"), nil)
	if _, err := run(ln.Addr().String(), cfg); block.KindOf(err) != block.KindDenied {
		t.Error(err)
	}
	stop()
}

func TestOptions(t *testing.T) {
	for _, o := range []Options{
		{}, {Addr: "x", TLS: &tls.Config{}, Connections: 16}, {Addr: "x", TLS: &tls.Config{}, Time: time.Hour},
		{Addr: "x", TLS: &tls.Config{}, Time: 1}, {Addr: "x", TLS: &tls.Config{}, Bytes: -1}, {Addr: "x", TLS: &tls.Config{}, Connections: -1},
	} {
		o.Dial = func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("dialled") }
		if _, err := Run(t.Context(), o); block.KindOf(err) != block.KindInvalid {
			t.Errorf("%+v: %v", o, err)
		}
	}
}
