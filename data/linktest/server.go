package linktest

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"forerun/block"
)

// Bounds of what a server does for its clients.
const (
	// MaxDuration is the longest that one phase may take.
	MaxDuration = 60 * time.Second
	// MaxConns is how many connections one peer may have.
	MaxConns = 16

	// maxTests are served at a time: more would measure one another.
	maxTests = 2
	// testLife ends a test that does not end itself.
	testLife = 15 * time.Minute
	// idle is how long a connection may be silent, more than any phase takes.
	idle = MaxDuration + 30*time.Second
	// grace is for what was under way when a phase ended.
	grace = 30 * time.Second
	// telling is the interval of progress.
	telling = 100 * time.Millisecond
)

// ServerOptions say what a Server heeds. The zero value is a server that is
// never busy.
type ServerOptions struct {
	Log *slog.Logger // of each test; none if nil
	// Busy says what a test would disturb, as a clause like "2 sessions are
	// open", empty when nothing. It is asked at each hello and order, from any
	// goroutine; nil is never busy.
	Busy func() string
}

// Server is the backend's side of link tests.
type Server struct {
	o     ServerOptions
	noise [][]byte // data frames, whole; nobody writes them

	mu    sync.Mutex
	tests map[testKey]*test
	peers map[string]int // connections by peer
}

type testKey struct {
	peer string
	id   testID
}

type test struct {
	born  time.Time
	conns int
	force bool
}

// NewServer makes a Server, which holds half a megabyte of noise to send.
func NewServer(o ServerOptions) *Server {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{o: o, noise: noise(), tests: map[testKey]*test{}, peers: map[string]int{}}
	return s
}

// noise makes data frames that do not compress.
func noise() [][]byte {
	out := make([][]byte, 32)
	for i := range out {
		b := appendHeader(make([]byte, 0, headerLen+maxData), tData, maxData)[:headerLen+maxData]
		rand.Read(b[headerLen:])
		out[i] = b
	}
	return out
}

// shorter is a data frame with n bytes of f's.
func shorter(f []byte, n int) []byte {
	return append(appendHeader(make([]byte, 0, headerLen+n), tData, n), f[headerLen:headerLen+n]...)
}

// Attend serves a connection until the client ends it, breaks the rules, or ctx
// ends. It has the form of wire.ServerOptions.Also: role and name are those of
// the client's certificate, and closing nc is the caller's.
func (s *Server) Attend(ctx context.Context, nc net.Conn, role, name string) {
	c := &served{s: s, nc: nc, raw: bottom(nc), br: bufio.NewReaderSize(nc, 64<<10)}
	// Below TLS, whose own Close would wait for a peer that does not read.
	defer context.AfterFunc(ctx, func() { c.raw.Close() })()
	err := c.run(role + " " + name)
	var e *block.Error
	if err == nil || ctx.Err() != nil || !errors.As(err, &e) {
		return
	}
	s.o.Log.Info("link test refused", "peer", name, "err", err)
	nc.SetWriteDeadline(time.Now().Add(time.Second))
	nc.Write(appendError(nil, err))
}

// bottom is the connection that has the socket.
func bottom(nc net.Conn) net.Conn {
	for {
		w, ok := nc.(interface{ NetConn() net.Conn })
		if !ok {
			return nc
		}
		nc = w.NetConn()
	}
}

// enter counts a connection in.
func (s *Server) enter(k testKey, force bool) (*test, error) {
	busy := func(format string, args ...any) (*test, error) {
		return nil, &block.Error{Op: "linktest.hello", Kind: block.KindBusy, Err: fmt.Errorf(format, args...)}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.tests[k]
	switch {
	case t == nil && len(s.tests) >= maxTests:
		return busy("busy: %d link tests are under way already; try again in a minute", len(s.tests))
	case s.peers[k.peer] >= MaxConns:
		return busy("busy: %s has %d link test connections already, no more are allowed", k.peer, MaxConns)
	}
	if t == nil {
		t = &test{born: time.Now(), force: force}
		s.tests[k] = t
		s.o.Log.Info("link test begins", "peer", k.peer, "force", force)
	}
	t.conns++
	s.peers[k.peer]++
	return t, nil
}

func (s *Server) leave(k testKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.tests[k]
	if t.conns--; t.conns == 0 {
		delete(s.tests, k)
		s.o.Log.Info("link test ends", "peer", k.peer, "took", time.Since(t.born).Round(time.Millisecond))
	}
	if s.peers[k.peer]--; s.peers[k.peer] == 0 {
		delete(s.peers, k.peer)
	}
}

// disturbs refuses what would disturb a workload.
func (s *Server) disturbs(force bool) error {
	if force || s.o.Busy == nil {
		return nil
	}
	why := s.o.Busy()
	if why == "" {
		return nil
	}
	return &block.Error{Op: "linktest", Kind: block.KindBusy,
		Err: fmt.Errorf("a test fills the line, and would slow down what this backend does: %s; test at another time, or with --force", why)}
}

// served is one connection at the server.
type served struct {
	s   *Server
	nc  net.Conn
	raw net.Conn
	br  *bufio.Reader
	t   *test
}

// run serves from hello to end. An error with a kind is one to tell the client.
func (c *served) run(peer string) error {
	c.nc.SetDeadline(time.Now().Add(10 * time.Second))
	var b [helloLen]byte
	if _, err := io.ReadFull(c.br, b[:]); err != nil {
		return err
	}
	h, err := parseHello(b[:])
	if err != nil {
		return err
	}
	if err := c.s.disturbs(h.force); err != nil {
		return err
	}
	k := testKey{peer, h.id}
	if c.t, err = c.s.enter(k, h.force); err != nil {
		return err
	}
	defer c.s.leave(k)
	if _, err := c.nc.Write(appendWelcome(nil, welcome{MaxDuration, MaxConns})); err != nil {
		return err
	}
	out := make([]byte, 0, 64)
	for {
		c.until(idle)
		typ, n, err := readHeader(c.br)
		if err != nil {
			return err
		}
		switch typ {
		case tPing:
			out = appendHeader(out[:0], tPong, n)[:headerLen+n]
			if _, err = io.ReadFull(c.br, out[headerLen:]); err == nil {
				_, err = c.nc.Write(out)
			}
		case tSend, tTake:
			var o order
			if o, err = c.order(n); err != nil {
				return err
			}
			c.until(o.duration + grace)
			if typ == tSend {
				err = c.send(o)
			} else {
				err = c.take(o)
			}
		default:
			err = protocol("a frame of type %d from a client", typ)
		}
		if err != nil {
			return err
		}
	}
}

// order reads an order, and refuses what is not to be.
func (c *served) order(n int) (o order, err error) {
	p, err := readPayload(c.br, n)
	if err != nil {
		return o, err
	}
	if o, err = parseOrder(p); err != nil {
		return o, err
	}
	if time.Since(c.t.born)+o.duration > testLife {
		return o, &block.Error{Op: "linktest.order", Kind: block.KindBusy,
			Err: fmt.Errorf("a test may take %s in all; begin another one, with shorter phases", testLife)}
	}
	return o, c.s.disturbs(c.t.force)
}

// until gives the connection d from now, and its test no more than its life.
func (c *served) until(d time.Duration) {
	t := time.Now().Add(d)
	if end := c.t.born.Add(testLife); t.After(end) {
		t = end
	}
	c.nc.SetDeadline(t)
}

func (c *served) send(o order) error {
	r, err := push(c.nc, c.raw, c.s.noise, o)
	if err != nil {
		return err
	}
	_, err = c.nc.Write(appendReport(nil, r))
	return err
}

// push sends noise as an order says. The counters of the report are of the time
// after the skip.
func push(nc, raw net.Conn, noise [][]byte, o order) (r report, err error) {
	began := time.Now()
	base, _ := readTCP(raw)
	skip := o.skip
	for i := 0; ; i++ {
		r.at = time.Since(began)
		if r.at >= o.duration || o.bytes > 0 && r.bytes >= o.bytes {
			break
		}
		if skip > 0 && r.at >= skip {
			base, _ = readTCP(raw)
			skip = 0
		}
		f := noise[i%len(noise)]
		if left := o.bytes - r.bytes; o.bytes > 0 && left < maxData {
			f = shorter(f, int(left))
		}
		if _, err := nc.Write(f); err != nil {
			return r, err
		}
		r.bytes += uint64(len(f) - headerLen)
	}
	if r.tcp, r.known = readTCP(raw); r.known {
		r.tcp = r.tcp.since(base)
	}
	return r, nil
}

// take reads what the client sends and tells it how far that has come.
func (c *served) take(o order) error {
	began := time.Now()
	var r report
	var told time.Time
	for {
		typ, n, err := readHeader(c.br)
		if err != nil {
			return err
		}
		switch {
		case typ == tEnd:
			r.tcp, r.known = readTCP(c.raw)
			r.tcp.segments, r.tcp.again = 0, 0 // the client's were those that carried data
			_, err = c.nc.Write(appendReport(nil, r))
			return err
		case typ != tData:
			return protocol("a frame of type %d inside data", typ)
		case o.bytes > 0 && r.bytes+uint64(n) > o.bytes:
			return protocol("more than the %d bytes that were announced", o.bytes)
		}
		var failed error
		err = drain(c.br, n, func(k int) {
			r.bytes += uint64(k)
			now := time.Now()
			r.at = now.Sub(began)
			if failed == nil && now.Sub(told) >= telling {
				told = now
				_, failed = c.nc.Write(appendProgress(nil, r.progress))
			}
		})
		if err := errors.Join(err, failed); err != nil {
			return err
		}
	}
}
