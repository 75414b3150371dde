package msg

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"forerun/block"
)

const (
	backoffMin = 20 * time.Millisecond
	backoffMax = 500 * time.Millisecond
)

// ClientOptions says whom a Client talks to.
type ClientOptions struct {
	Addr string // for errors and the log
	// Dial makes a connection, ready for messages: see DialTLS. It is given
	// Conn.Idle, and the hello the same once more.
	Dial func(ctx context.Context) (net.Conn, error)
	Conn Options
	// Up is told when the connection has come up or is gone, in order, on the
	// goroutine that would make the next one: it must not wait.
	Up  func(up bool)
	Log *slog.Logger // changes of state; none if nil
}

// Client keeps one connection to an address alive. It is a Caller.
type Client struct {
	o      ClientOptions
	log    *slog.Logger
	closed chan struct{}
	once   sync.Once

	mu   sync.Mutex
	conn *Conn // the living one, nil while there is none
	why  error // why there is none
	ups  int   // connections there were
	wait chan struct{}
}

// ClientStats is how a Client is.
type ClientStats struct {
	Up          bool
	Connections int    // that came up so far
	Error       string // why it is down
}

// NewClient makes a Client. Nothing happens before Run.
func NewClient(o ClientOptions) *Client {
	o.Conn.fill()
	c := &Client{o: o, log: o.Log, closed: make(chan struct{}), why: errors.New("no connection was made yet"), wait: make(chan struct{})}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Close ends Run and the connection.
func (c *Client) Close() error {
	c.once.Do(func() { close(c.closed) })
	return nil
}

// Run makes a connection, again whenever it is lost, until ctx ends or Close
// is called. It returns nil when all requests it was serving have ended.
func (c *Client) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-c.closed:
			cancel()
		case <-stop:
		}
	}()
	var serving sync.WaitGroup
	defer serving.Wait()
	var backoff time.Duration
	var told time.Time
	for ctx.Err() == nil {
		up, err := c.session(ctx, &serving)
		if ctx.Err() != nil {
			break
		}
		now := time.Now()
		if up {
			backoff, told = 0, now
			c.log.Warn("connection lost, making another", "addr", c.o.Addr, "err", err)
		} else if told.IsZero() || now.Sub(told) >= time.Minute {
			told = now
			c.log.Warn("connection cannot be made, trying on", "addr", c.o.Addr, "err", err)
		}
		c.mu.Lock()
		c.why = err
		c.mu.Unlock()
		backoff = min(max(2*backoff, backoffMin), backoffMax)
		// Spread by a quarter, so that many clients of one server do not knock in step.
		t := time.NewTimer(backoff - time.Duration(rand.Int64N(int64(backoff)/4+1)))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
	c.mu.Lock()
	c.why = &block.Error{Op: "msg.client", Object: c.o.Addr, Kind: block.KindClosed}
	c.mu.Unlock()
	return nil
}

// session makes one connection and stays with it until it ends. up says whether
// the other side said hello.
func (c *Client) session(ctx context.Context, serving *sync.WaitGroup) (up bool, err error) {
	dctx, cancel := context.WithTimeout(ctx, c.o.Conn.Idle)
	nc, err := c.o.Dial(dctx)
	cancel()
	if err != nil {
		return false, err
	}
	conn := New(nc, c.o.Conn)
	ended := make(chan error, 1)
	go func() { ended <- conn.Run(ctx) }()
	serving.Go(conn.serve.Wait)
	select {
	case <-conn.Ready():
	case err := <-ended:
		return false, err
	}
	c.log.Info("connection up", "addr", c.o.Addr)
	c.set(conn)
	err = <-ended
	c.set(nil)
	return true, err
}

func (c *Client) set(conn *Conn) {
	c.mu.Lock()
	if c.conn = conn; conn != nil {
		c.ups++
		close(c.wait)
	} else {
		c.wait = make(chan struct{})
	}
	c.mu.Unlock()
	if c.o.Up != nil {
		c.o.Up(conn != nil)
	}
}

// Up says whether there is a connection.
func (c *Client) Up() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.conn != nil
}

// WaitUp waits until there is a connection.
func (c *Client) WaitUp(ctx context.Context) error {
	c.mu.Lock()
	w := c.wait
	c.mu.Unlock()
	select {
	case <-w:
		return nil
	case <-c.closed:
		return &block.Error{Op: "msg.client", Object: c.o.Addr, Kind: block.KindClosed}
	case <-ctx.Done():
		return canceled(ctx)
	}
}

// Stats tells how it is.
func (c *Client) Stats() ClientStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := ClientStats{Up: c.conn != nil, Connections: c.ups}
	if !s.Up && c.why != nil {
		s.Error = c.why.Error()
	}
	return s
}

// Call is Conn.Call on the living connection. While there is none it fails at
// once with KindUnavailable.
func (c *Client) Call(ctx context.Context, typ uint8, parts ...[]byte) ([]byte, error) {
	c.mu.Lock()
	conn, why := c.conn, c.why
	c.mu.Unlock()
	if conn == nil {
		return nil, &block.Error{Op: "msg.call", Object: c.o.Addr, Kind: block.KindUnavailable,
			Err: fmt.Errorf("it cannot be reached: %w", why)}
	}
	return conn.Call(ctx, typ, parts...)
}
