package pair

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
)

// Gate passes TCP connections on to an address while it is open. Shut, it ends
// those it has and refuses new ones, as if nobody were there.
type Gate struct {
	ln net.Listener
	to string

	mu    sync.Mutex
	shut  bool
	conns map[net.Conn]struct{}
	wg    sync.WaitGroup

	bytes atomic.Int64
}

// NewGate listens on a port of this host and passes on to the address to.
func NewGate(to string) (*Gate, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	g := &Gate{ln: ln, to: to, conns: map[net.Conn]struct{}{}}
	g.wg.Go(g.accept)
	return g, nil
}

// Addr is where the gate listens.
func (g *Gate) Addr() string { return g.ln.Addr().String() }

// Bytes that went through, in both directions.
func (g *Gate) Bytes() int64 { return g.bytes.Load() }

func (g *Gate) accept() {
	for {
		c, err := g.ln.Accept()
		if err != nil {
			return
		}
		if g.hold(c) {
			g.wg.Go(func() { g.pass(c) })
		}
	}
}

// hold notes a connection, or closes it when the gate is shut.
func (g *Gate) hold(c net.Conn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.shut {
		c.Close()
		return false
	}
	g.conns[c] = struct{}{}
	return true
}

func (g *Gate) drop(c net.Conn) {
	c.Close()
	g.mu.Lock()
	delete(g.conns, c)
	g.mu.Unlock()
}

func (g *Gate) pass(a net.Conn) {
	defer g.drop(a)
	b, err := net.Dial("tcp", g.to)
	if err != nil || !g.hold(b) {
		return
	}
	defer g.drop(b)
	done := make(chan struct{})
	one := func(dst, src net.Conn) {
		n, _ := io.Copy(dst, src)
		g.bytes.Add(n)
		a.Close()
		b.Close()
	}
	go func() {
		one(b, a)
		close(done)
	}()
	one(a, b)
	<-done
}

// Shut closes the gate: nothing goes through until Open.
func (g *Gate) Shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut = true
	for c := range g.conns {
		c.Close()
	}
}

// Open opens the gate again.
func (g *Gate) Open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut = false
}

// Close ends the gate.
func (g *Gate) Close() error {
	err := g.ln.Close()
	g.Shut()
	g.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
