package nbd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"forerun/block"
	"forerun/data/source/internal/sector"
	p "forerun/internal/nbdproto"
)

const (
	// DefaultConnections is how many connections are made where the server allows it.
	DefaultConnections = 4
	maxConnections     = 16
	perConnection      = 64 // requests under way at once, for each connection
	closeGrace         = 5 * time.Second
	defaultIO          = 256 << 10
)

// Options of Open.
type Options struct {
	// Connections is how many connections are made when the server says they
	// are coherent, 1 to 16. 0 is DefaultConnections.
	Connections int
	// ReadOnly never changes the export.
	ReadOnly bool
	// OnState, if set, is told why calls wait for a server out of reach, and
	// with an empty text when they do not any more. It must not call the client.
	OnState func(why string)
	// ReconnectTimeout is how long calls wait for a server out of reach before
	// they fail with KindUnavailable. 0 waits until the caller's context ends.
	ReconnectTimeout time.Duration
	// KeepsWrites says that what the server acknowledged outlives it (others
	// hold it too): then a lost connection is no doubt, and no Flush fails for it.
	KeepsWrites bool
	// ID replaces the server's address and the export's name in Info.ID. The
	// size is added to either.
	ID string
	// Log gets changes of state. Nil is silent.
	Log *slog.Logger
}

// Client is an NBD export. It implements block.Device.
type Client struct {
	target Target
	opt    Options
	log    *slog.Logger
	ex     export // of the first connection
	info   block.Info

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup // lanes

	gate   sync.RWMutex
	closed bool
	edges  sync.RWMutex // see client.write

	slots chan struct{} // bounds requests under way

	mu        sync.Mutex
	lanes     []*conn // nil while down
	alive     int
	born      uint64        // connections so far
	changed   chan struct{} // closed when lanes, fatal or ctx change
	downSince time.Time
	why       error // the last reason of being down
	fatal     error // nothing can be served any more

	flushed flushState
	stats   counters
	narrow  narrowing
}

var _ block.Device = (*Client)(nil)

// Open connects to the export at t. ctx bounds the connecting only. A server
// that cannot be reached is KindUnavailable, an export that does not exist
// KindNotFound, a refusal KindDenied.
func Open(ctx context.Context, t Target, o Options) (*Client, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Connections == 0 {
		o.Connections = DefaultConnections
	}
	if o.Connections < 1 || o.Connections > maxConnections {
		return nil, block.E("source.open", t.URI, block.KindInvalid, fmt.Errorf("%d connections; 1 to %d are possible", o.Connections, maxConnections))
	}
	if t.NoVerify {
		o.Log.Warn("the NBD server's certificate is not verified", "uri", t.URI)
	}
	nc, ex, err := dial(ctx, t)
	if err != nil {
		var r *refusal
		kind := block.KindUnavailable
		switch {
		case errors.As(err, &r):
			kind = r.kind
		case ctx.Err() != nil:
			kind = block.KindCanceled
		}
		return nil, block.E("source.open", t.URI, kind, err)
	}
	cl := &Client{target: t, opt: o, log: o.Log, ex: ex, changed: make(chan struct{}), downSince: time.Time{}}
	cl.info = block.Info{
		Size: sector.Up(ex.size), BlockSize: sector.Size, PreferredIO: int(max(ex.preferred, min(defaultIO, ex.maxBlock))),
		ReadOnly: o.ReadOnly || ex.has(p.FlagReadOnly), CanTrim: ex.has(p.FlagSendTrim | p.FlagSendWriteZeroes), CanExtents: ex.status,
	}
	cl.info.CanTrim = cl.info.CanTrim && !cl.info.ReadOnly
	if o.ID == "" {
		o.ID = fmt.Sprintf("nbd:%s:%q", t.Address, t.Export)
	}
	cl.info.ID = fmt.Sprintf("%s:%d", o.ID, ex.size)
	n := 1
	if ex.has(p.FlagCanMultiConn) {
		n = o.Connections
	}
	cl.lanes = make([]*conn, n)
	cl.slots = make(chan struct{}, n*perConnection)
	cl.ctx, cl.cancel = context.WithCancel(context.Background())
	cl.narrow.init(&ex)
	first := cl.wrap(nc, ex)
	cl.install(0, first)
	for i := range n {
		c := first
		if i > 0 {
			c = nil
		}
		cl.wg.Go(func() { cl.lane(i, c) })
	}
	cl.log.Info("connected to the NBD server", "uri", t.URI, "bytes", ex.size, "connections", n,
		"readonly", cl.info.ReadOnly, "structured", ex.structured, "extents", ex.status)
	return cl, nil
}

// wrap makes a connection whose acknowledgements are noted.
func (cl *Client) wrap(nc net.Conn, ex export) *conn {
	c := newConn(nc, ex, cap(cl.slots)+1) // and a ping
	c.acked = func(r *request) {
		if r.flags&p.CmdFlagFUA == 0 {
			cl.flushed.wrote(c)
		}
	}
	return c
}

// Info describes the export.
func (cl *Client) Info() block.Info { return cl.info }

func (cl *Client) enter(op string, off, n int64, writes bool) error {
	if err := sector.Check("source."+op, cl.target.URI, off, n, cl.info.Size); err != nil {
		return err
	}
	if writes && cl.info.ReadOnly {
		return block.E("source."+op, cl.target.URI, block.KindReadOnly, errors.New("the export is read-only"))
	}
	cl.gate.RLock()
	if cl.closed {
		cl.gate.RUnlock()
		return block.E("source."+op, cl.target.URI, block.KindClosed, nil)
	}
	return nil
}

func (cl *Client) leave() { cl.gate.RUnlock() }

// ask has one request answered, on as many connections as it takes.
func (cl *Client) ask(ctx context.Context, op string, r *request) error {
	select {
	case cl.slots <- struct{}{}:
		defer func() { <-cl.slots }()
	case <-ctx.Done():
		return block.E("source."+op, cl.target.URI, block.KindCanceled, ctx.Err())
	}
	violations := 0
	for tries := 1; ; tries++ {
		if err := ctx.Err(); err != nil {
			return block.E("source."+op, cl.target.URI, block.KindCanceled, err)
		}
		c, err := cl.pick(ctx, op, r.cmd == p.CmdFlush)
		if err != nil {
			return err
		}
		err = c.do(ctx, r)
		if err == nil {
			return nil
		}
		var lost *lostError
		if !errors.As(err, &lost) {
			return cl.answer(op, err)
		}
		var v violation
		if errors.As(err, &v) {
			violations++
		}
		if violations >= maxViolations || tries >= maxLosses {
			return block.E("source."+op, cl.target.URI, block.KindIO, fmt.Errorf("gave up after %d connections: %w", tries, lost.cause))
		}
		cl.stats.resent.Add(1)
	}
}

// answer gives an error of the server or of ctx its kind.
func (cl *Client) answer(op string, err error) error {
	var se *serverError
	if errors.As(err, &se) {
		cl.stats.srvError.Add(1)
		return block.E("source."+op, cl.target.URI, p.Kind(se.errno), err)
	}
	return block.E("source."+op, cl.target.URI, 0, err)
}

// ReadAt fills p with the bytes at off.
func (cl *Client) ReadAt(ctx context.Context, b []byte, off int64, _ block.Flags) error {
	if err := cl.enter("read", off, int64(len(b)), false); err != nil {
		return err
	}
	defer cl.leave()
	n := sector.Clip(off, int64(len(b)), cl.ex.size)
	clear(b[n:])
	return cl.read(ctx, b[:n], off)
}

// WriteAt stores p at off. With FUA it is durable on return.
func (cl *Client) WriteAt(ctx context.Context, b []byte, off int64, f block.Flags) error {
	if err := cl.enter("write", off, int64(len(b)), true); err != nil {
		return err
	}
	defer cl.leave()
	n := sector.Clip(off, int64(len(b)), cl.ex.size)
	if !sector.Zeros(b[n:]) {
		return block.E("source.write", cl.target.URI, block.KindRange, sector.ErrPad)
	}
	return cl.durable(ctx, "write", f, func(flags uint16) error {
		return cl.write(ctx, b[:n], off, flags)
	})
}

// Zero makes n bytes at off read as zeros.
func (cl *Client) Zero(ctx context.Context, off, n int64, f block.Flags) error {
	if err := cl.enter("zero", off, n, true); err != nil {
		return err
	}
	defer cl.leave()
	n = sector.Clip(off, n, cl.ex.size)
	return cl.durable(ctx, "zero", f, func(flags uint16) error {
		return cl.zero(ctx, off, n, f, flags)
	})
}

// Trim tells the server that n bytes at off are not needed. NBD allows a
// server to return anything there afterwards, this contract does not: where the
// server can zero, Trim is a write of zeros that may make a hole, else nothing.
func (cl *Client) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	if err := cl.enter("trim", off, n, true); err != nil {
		return err
	}
	defer cl.leave()
	n = sector.Clip(off, n, cl.ex.size)
	return cl.durable(ctx, "trim", f, func(flags uint16) error {
		return cl.trim(ctx, off, n, flags)
	})
}

// durable carries out a change, with FUA as the server has it: a flag, or a
// flush behind. A server with neither promises nothing and is believed.
func (cl *Client) durable(ctx context.Context, op string, f block.Flags, change func(flags uint16) error) error {
	switch {
	case !f.Has(block.FUA):
		return change(0)
	case cl.ex.has(p.FlagSendFUA):
		return change(p.CmdFlagFUA)
	}
	m := cl.flushed.begin()
	if err := change(0); err != nil {
		return err
	}
	if !cl.ex.has(p.FlagSendFlush) {
		return nil
	}
	if err := cl.ask(ctx, op, newRequest(p.CmdFlush, 0, 0, 0)); err != nil {
		return err
	}
	if err := cl.flushed.endFUA(m); err != nil {
		return block.E("source."+op, cl.target.URI, block.KindIO, err)
	}
	return nil
}

// Flush makes every write acknowledged before the call durable. After a
// connection was lost it fails once with KindIO, see the package comment.
func (cl *Client) Flush(ctx context.Context, _ block.Flags) error {
	if err := cl.enter("flush", 0, sector.Size, false); err != nil {
		return err
	}
	defer cl.leave()
	if cl.info.ReadOnly {
		return nil
	}
	m := cl.flushed.begin()
	if cl.ex.has(p.FlagSendFlush) {
		if err := cl.ask(ctx, "flush", newRequest(p.CmdFlush, 0, 0, 0)); err != nil {
			return err
		}
	}
	if err := cl.flushed.end(m); err != nil {
		return block.E("source.flush", cl.target.URI, block.KindIO, err)
	}
	return nil
}

// Extents lists data, zeros and holes as the server's base:allocation tells.
func (cl *Client) Extents(ctx context.Context, dst []block.Extent, off, n int64, f block.Flags) ([]block.Extent, error) {
	if err := cl.enter("extents", off, n, false); err != nil {
		return dst, err
	}
	defer cl.leave()
	if !cl.ex.status || f.Has(block.Local) {
		return append(dst, block.Extent{Off: off, Len: n, Kind: block.Data}), nil
	}
	ext, err := cl.extents(ctx, off, min(off+n, cl.ex.size))
	if err != nil {
		return dst, err
	}
	return append(dst, sector.Align(ext, cl.ex.size)...), nil
}

// Prefetch asks the server to bring the range into its cache, if it can.
func (cl *Client) Prefetch(ctx context.Context, off, n int64, _ block.Flags) error {
	if err := cl.enter("prefetch", off, n, false); err != nil {
		return err
	}
	defer cl.leave()
	if !cl.ex.has(p.FlagSendCache) {
		return nil
	}
	return cl.cache(ctx, off, sector.Clip(off, n, cl.ex.size))
}

// Close waits for calls under way, at most closeGrace for those the server does
// not answer, and disconnects. Calls that wait for a server out of reach end
// with KindClosed.
func (cl *Client) Close() error {
	// Those waiting to reconnect are sent away first; those on a connection
	// get their answer if it comes in time.
	t := time.AfterFunc(closeGrace, func() { cl.hangUp(errClosed) })
	cl.cancel()
	cl.mu.Lock()
	cl.broadcast()
	cl.mu.Unlock()
	cl.gate.Lock()
	t.Stop()
	first := !cl.closed
	cl.closed = true
	cl.gate.Unlock()
	if first {
		cl.hangUp(nil)
		cl.log.Info("disconnected from the NBD server", "uri", cl.target.URI)
	}
	cl.wg.Wait()
	return nil
}

// hangUp ends all connections, politely if err is nil.
func (cl *Client) hangUp(err error) {
	cl.mu.Lock()
	live := make([]*conn, 0, len(cl.lanes))
	for _, c := range cl.lanes {
		if c != nil {
			live = append(live, c)
		}
	}
	cl.mu.Unlock()
	for _, c := range live {
		if err != nil {
			c.fail(err)
		} else {
			c.disconnect()
		}
	}
}
