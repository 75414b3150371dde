package pair

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
)

// Gate passes TCP connections on to an address while it is open. Shut, it ends
// those it has and refuses new ones, as if nobody were there. Held, it keeps
// everything back without a word, in one direction or both, as a broken line
// does.
type Gate struct {
	ln net.Listener
	to string

	mu    sync.Mutex
	cond  *sync.Cond
	shut  bool    // guarded by mu
	held  [2]bool // guarded by mu: towards the address, and back
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
	g.cond = sync.NewCond(&g.mu)
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

// through waits while the direction is held, and says whether the gate is open then.
func (g *Gate) through(direction int) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.held[direction] && !g.shut {
		g.cond.Wait()
	}
	return !g.shut
}

func (g *Gate) pass(a net.Conn) {
	defer g.drop(a)
	if !g.through(0) {
		return
	}
	b, err := net.Dial("tcp", g.to)
	if err != nil || !g.hold(b) {
		return
	}
	defer g.drop(b)
	done := make(chan struct{})
	one := func(dst, src net.Conn, direction int) {
		buf := make([]byte, 64<<10)
		for {
			n, err := src.Read(buf)
			if n > 0 && g.through(direction) {
				if _, e := dst.Write(buf[:n]); e != nil {
					err = e
				}
				g.bytes.Add(int64(n))
			}
			if err != nil {
				g.through(direction) // its end is held back like its bytes
				a.Close()
				b.Close()
				return
			}
		}
	}
	go func() {
		one(b, a, 0)
		close(done)
	}()
	one(a, b, 1)
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
	g.cond.Broadcast()
}

// Hold keeps back what goes to the address, what comes from it, or both.
func (g *Gate) Hold(to, from bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.held = [2]bool{to, from}
	g.cond.Broadcast()
}

// Open opens the gate again.
func (g *Gate) Open() {
	g.mu.Lock()
	g.shut = false
	g.mu.Unlock()
	g.Hold(false, false)
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
