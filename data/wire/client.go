package wire

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	"forerun/block"
)

// ClientOptions says where a Client connects to and how. Addr and TLS are
// needed, zero elsewhere means the default.
type ClientOptions struct {
	Addr string // host:port of the backend
	// TLS must show a certificate and verify the server's (pki.ClientTLS does).
	// Without ServerName the host of Addr is taken.
	TLS  *tls.Config
	Node string // this frontend's name, told to the server for its log
	// BackgroundConns is the number of background connections, at most 16.
	// Default are 2, and more, up to 16, as the backend wishes for when they do
	// not fill the way to it.
	BackgroundConns int
	// BackgroundAddr is where background connections go, host:port; empty is the
	// port that the backend names, at the host of Addr. Every other attempt at
	// a named port that does not answer goes to Addr.
	BackgroundAddr string
	Log            *slog.Logger // changes of state; none if nil
	// Dial makes a connection, default net.Dialer's DialContext.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// Ping is the interval of pings, default 1 s. A connection without a byte
	// for Dead, default 5 s, is given up and made again.
	Ping, Dead time.Duration
	// DialTimeout, default 3 s, bounds making a connection, and then again the
	// handshake on it. Between attempts it waits BackoffMin, default 50 ms,
	// doubling up to BackoffMax, default 1 s.
	DialTimeout            time.Duration
	BackoffMin, BackoffMax time.Duration
	Socket                 SocketOptions
}

// Client is one session with a backend. It keeps its connections alive until
// Close, across outages of any length.
type Client struct {
	o      ClientOptions
	tls    *tls.Config
	log    *slog.Logger
	id     sessionID
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	leases leases
	asking chan struct{} // one token per EXTENTS under way
	count  traffic
	grows  bool // more background connections are made when the backend wishes for them

	mu         sync.Mutex
	q          queue   // chunks wanted and not asked for
	scratch    []*item // pump's
	slots      []*link // the living connections, demand first; nil: down
	ports      welcome // what the backend said last of its ports
	remotes    map[uint16]*Remote
	sites      map[*Site]*siteOf
	opens      map[uint64]opening
	asides     map[uint64]*aside
	nextReq    uint64
	nextHandle uint16
	closed     bool
	stats      ClientStats
}

// Dial makes the demand connection and returns. Background connections follow
// by themselves. A backend that cannot be reached now is KindUnavailable, a
// certificate that is refused by either side KindDenied; neither is tried
// again here.
func Dial(ctx context.Context, o ClientOptions) (*Client, error) {
	bad := func(format string, args ...any) (*Client, error) {
		return nil, &block.Error{Op: "wire.dial", Object: o.Addr, Kind: block.KindInvalid, Err: fmt.Errorf(format, args...)}
	}
	host, _, err := net.SplitHostPort(o.Addr)
	switch {
	case err != nil:
		return bad("the address must be host:port: %w", err)
	case o.TLS == nil:
		return bad("TLS settings are needed")
	case o.BackgroundConns < 0 || o.BackgroundConns > maxBackground:
		return bad("%d background connections, there can be 1 to %d", o.BackgroundConns, maxBackground)
	case len(o.Node) > maxName:
		return bad("a node name of %d bytes", len(o.Node))
	}
	grows := o.BackgroundConns == 0
	def(&o.BackgroundConns, firstBackground)
	def(&o.Ping, time.Second)
	def(&o.Dead, 5*time.Second)
	def(&o.DialTimeout, 3*time.Second)
	def(&o.BackoffMin, 50*time.Millisecond)
	def(&o.BackoffMax, time.Second)
	if o.Dial == nil {
		o.Dial = (&net.Dialer{}).DialContext
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	c := &Client{o: o, log: o.Log, grows: grows, slots: make([]*link, 1+o.BackgroundConns), asking: make(chan struct{}, 32),
		remotes: map[uint16]*Remote{}, sites: map[*Site]*siteOf{}, opens: map[uint64]opening{}, asides: map[uint64]*aside{}}
	rand.Read(c.id[:]) // never fails, see its documentation
	c.tls = o.TLS.Clone()
	c.tls.MinVersion = tls.VersionTLS13
	c.tls.NextProtos = []string{alpn}
	c.tls.DynamicRecordSizingDisabled = true
	if c.tls.ServerName == "" {
		c.tls.ServerName = host
	}
	c.stats.Since = time.Now()
	l, err := c.connect(ctx, 0, 0)
	if err != nil {
		return nil, err
	}
	c.ctx, c.cancel = context.WithCancel(context.WithoutCancel(ctx))
	c.wg.Go(func() { c.keep(0, l) })
	for i := range o.BackgroundConns {
		c.wg.Go(func() { c.keep(1+i, nil) })
	}
	return c, nil
}

// grow makes background connections until there are n.
func (c *Client) grow(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.grows || c.closed {
		return
	}
	for len(c.slots) < 1+min(n, maxBackground) {
		slot := len(c.slots)
		c.slots = append(c.slots, nil)
		c.wg.Go(func() { c.keep(slot, nil) })
	}
}

// BackgroundAddr is where background connections go, and WriteBackAddr where
// the backend wants write-back, host:port.
func (c *Client) BackgroundAddr() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return cmp.Or(c.o.BackgroundAddr, c.at(c.ports.backgroundPort))
}

// WriteBackAddr: see BackgroundAddr.
func (c *Client) WriteBackAddr() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at(c.ports.writeBackPort)
}

// at is the backend's host with another port; 0: with the one of Addr.
func (c *Client) at(port uint16) string {
	host, _, err := net.SplitHostPort(c.o.Addr)
	if port == 0 || err != nil {
		return c.o.Addr
	}
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
}

// Paced says whether the backend bounds the queue on the way itself, so that
// what is asked for ahead waits there and not in the network.
func (c *Client) Paced() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ports.paced
}

// Close ends the session: what is under way fails with KindClosed. It waits
// for deliveries that have begun.
func (c *Client) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		c.wg.Wait()
		return nil
	}
	c.closed = true
	err := &block.Error{Op: "wire.client", Object: c.o.Addr, Kind: block.KindClosed, Err: errors.New("the session was closed")}
	var es []*entry
	for _, r := range c.remotes {
		es = c.claimAll(es, r)
		r.fail(err)
	}
	for _, a := range c.asides {
		a.finish(err)
	}
	clear(c.asides)
	links := slices.Clone(c.slots)
	c.mu.Unlock()
	c.deliverError(es, err)
	c.cancel()
	for _, l := range links {
		if l != nil {
			l.bye()
		}
	}
	c.wg.Wait()
	return nil
}

// Stats returns the state of the session and its counters.
func (c *Client) Stats() ClientStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	st := c.stats
	st.SentBytes, st.ReceivedBytes = c.count.sent.Load(), c.count.received.Load()
	for i, l := range c.slots {
		if l == nil {
			continue
		}
		st.Conns++
		st.FramesReceived += l.frames.Load()
		if i == 0 {
			if min, smoothed := l.rtt.get(); min != 0 {
				st.RTT = smoothed
				if st.RTTMin == 0 || min < st.RTTMin {
					st.RTTMin = min
				}
			}
			st.DemandOutstanding += l.outstanding
		} else {
			st.BackgroundOutstanding += l.outstanding
		}
	}
	st.BackgroundConns = len(c.slots) - 1
	st.DemandQueued, st.BackgroundQueued = c.q.waiting(0, 2), c.q.waiting(2, numLevels)
	return st
}

// The client's request ids count up and are never used twice in a session.
func (c *Client) request() uint64 {
	c.nextReq++
	return c.nextReq
}

// pump asks for as much of what is queued as credit and connections allow.
// Client.mu is held.
func (c *Client) pump() {
	for _, a := range c.asides {
		if a.on == nil {
			c.sendAside(a)
		}
	}
	if d := c.slots[0]; d != nil {
		for c.askOn(d, 0, 2) {
		}
	}
	var tried uint32
	for c.q.waiting(2, numLevels) > 0 {
		// The connection with least to do gets the next run, so that one that
		// is slower than the others is asked for less.
		best := 0
		for i, l := range c.slots {
			if i > 0 && l != nil && tried&(1<<i) == 0 && (best == 0 || l.outstanding < c.slots[best].outstanding) {
				best = i
			}
		}
		if best == 0 {
			return
		}
		if !c.askOn(c.slots[best], 2, numLevels) {
			tried |= 1 << best
		}
	}
}

// maxUnsent bounds what waits to be written to a connection that does not
// take it; more waits in the queue, from where it can still go elsewhere.
const maxUnsent = 256 << 10

// askOn asks for the next run on l and says whether there was one.
func (c *Client) askOn(l *link, from, to uint8) bool {
	free := l.credit - l.outstanding
	if free <= 0 || l.leaving || len(l.out) >= maxUnsent {
		return false
	}
	c.scratch = c.q.take(c.scratch[:0], from, to, func(o *owner, _ *item) int {
		r := o.of.(*Remote)
		if !l.ready[r] || l.slot > 0 && r.site != nil && !r.site.heard {
			return 0
		}
		return min(free, max(1, maxRead/r.v.chunk))
	})
	for _, it := range c.scratch {
		e := it.of.(*entry)
		if e.charge != nil {
			e.charge.outstanding--
		}
		e.state, e.on, e.charge = asked, l, l
		l.outstanding++
		f := e.call.flags
		if e.demand {
			f = block.Demand | f&(block.Soon|block.Full)
		}
		l.order(tFetch, e.call.r.handle, e.call.id, f, e.index)
	}
	return len(c.scratch) > 0
}

// lost puts back what a dead connection was asked for. Client.mu is held.
func (c *Client) lost(l *link) {
	l.dead = true
	close(l.done)
	if c.slots[l.slot] == l {
		c.slots[l.slot] = nil
	}
	c.stats.FramesReceived += l.frames.Load()
	if l.slot == 0 {
		if min, smoothed := l.rtt.get(); min != 0 {
			c.stats.RTT = smoothed
			if c.stats.RTTMin == 0 || min < c.stats.RTTMin {
				c.stats.RTTMin = min
			}
		}
		c.stats.Up, c.stats.Since = false, time.Now()
	}
	for id, o := range c.opens {
		if o.on == l {
			delete(c.opens, id)
		}
	}
	for _, a := range c.asides {
		if a.on == l {
			a.on, a.got = nil, a.got[:0]
		}
	}
	var again []*entry
	for _, r := range c.remotes {
		delete(r.retry, l)
		for _, e := range r.wanted {
			for ; e != nil; e = e.same {
				if e.charge == l {
					e.charge = nil
				}
				on, also := e.on == l, e.also == l
				if l.roams { // who knows what it was to bring
					on = on || e.on != nil && e.on.roams
					also = also || e.also != nil && e.also.roams
				}
				if also {
					e.also = nil
				}
				// A promoted chunk that the other connection had in its hands
				// already is asked for again too; two copies are one too many,
				// none would be one too few.
				if e.state == asked && (on || also) {
					again = append(again, e)
				}
			}
		}
	}
	slices.SortFunc(again, func(a, b *entry) int {
		return cmp.Or(cmp.Compare(b.call.id, a.call.id), cmp.Compare(b.pos, a.pos))
	})
	for _, e := range again {
		e.state, e.on = waiting, nil
		c.q.push(&e.call.r.own, &e.item, true)
	}
	if !c.closed {
		c.pump()
	}
}
