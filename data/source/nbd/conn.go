package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
	p "forerun/internal/nbdproto"
)

const (
	// graceChange is how long a caller whose context ended still waits for the
	// answer to a request that changes the disk.
	graceChange = 5 * time.Second
	// graceStream is how long a half-sent request or half-received answer may
	// take after its caller left, before the connection is given up for it.
	graceStream = time.Second
)

// request is one NBD request. Its fields belong to the caller until it is put
// in a connection's table, then those below the line to the receiver.
type request struct {
	cmd, flags uint16
	off        int64
	n          uint32
	buf        []byte     // a read's destination, nil once the caller left; a write's source
	done       chan error // one answer

	// The receiver's.
	cookie uint64
	cover  cover
	ext    []block.Extent
	told   bool // a block status came
	err    error

	// Under conn.mu.
	busy bool          // the receiver is using buf
	gone bool          // the caller left
	left chan struct{} // not nil while a leaving caller waits for !busy
}

// changes says whether the request changes the disk.
func (r *request) changes() bool {
	return r.cmd == p.CmdWrite || r.cmd == p.CmdWriteZeroes || r.cmd == p.CmdTrim
}

// lostError ends a request whose connection broke before the answer came.
type lostError struct{ cause error }

func (e *lostError) Error() string { return "the connection was lost: " + e.cause.Error() }
func (e *lostError) Unwrap() error { return e.cause }

// conn is one connection in the transmission phase.
type conn struct {
	nc net.Conn
	br *bufio.Reader
	ex export

	load     atomic.Int32 // requests in the table
	answered atomic.Bool  // a request was answered

	wlock chan struct{} // of length 1: held while a request's bytes go out
	hdr   [p.RequestLen]byte
	bufs  [2][]byte
	sent  atomic.Uint64 // requests sent, to know that one went out

	mu    sync.Mutex
	table []*request // by the low 32 bits of the cookie
	free  []uint32
	turn  uint32 // the high 32 bits: a late reply to an old cookie is noticed
	dead  error
	// acked is told of every change of the disk the server acknowledged,
	// before the caller is.
	acked func(r *request)
	ended chan struct{} // closed once the connection has been taken away

	born    uint64 // order of connections, set by install
	lastAck uint64 // under flushState.mu
}

// newConn is a connection for at most depth requests at once.
func newConn(nc net.Conn, ex export, depth int) *conn {
	c := &conn{nc: nc, br: newReader(nc), ex: ex, table: make([]*request, depth), wlock: make(chan struct{}, 1), free: make([]uint32, depth), acked: func(*request) {},
		ended: make(chan struct{})}
	for i := range c.free {
		c.free[i] = uint32(depth - 1 - i)
	}
	return c
}

// fail breaks the connection; the receiver ends and cleans up.
func (c *conn) fail(err error) {
	c.mu.Lock()
	if c.dead == nil {
		c.dead = err
	}
	c.mu.Unlock()
	_ = c.nc.Close() // it is broken already
}

// drain answers everything in the table once the receiver has ended.
func (c *conn) drain(err error) {
	c.fail(err)
	c.mu.Lock()
	defer c.mu.Unlock()
	close(c.ended)
	for i, r := range c.table {
		if r == nil {
			continue
		}
		c.table[i] = nil
		c.load.Add(-1)
		c.release(r)
		if !r.gone {
			r.done <- &lostError{c.dead}
		}
	}
}

// do sends r and waits for its answer. It fails with *lostError when the
// connection breaks first, and with ctx's error when the caller gives up; the
// connection does not use r.buf after either.
func (c *conn) do(ctx context.Context, r *request) error {
	if err := c.put(r); err != nil {
		select { // until the lane has noticed, this connection would be picked again
		case <-c.ended:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if err := c.send(ctx, r); err != nil {
		return err
	}
	select {
	case err := <-r.done:
		return err
	case <-ctx.Done():
		return c.leave(ctx, r)
	}
}

// put gives r a cookie and a place in the table.
func (c *conn) put(r *request) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead != nil {
		return &lostError{c.dead}
	}
	if len(c.free) == 0 {
		return &lostError{errors.New("too many requests at once")} // depth is above the caller's own bound
	}
	i := c.free[len(c.free)-1]
	c.free = c.free[:len(c.free)-1]
	c.turn++
	r.cookie = uint64(c.turn)<<32 | uint64(i)
	r.cover = cover{spans: r.cover.spans[:0]}
	r.ext, r.told, r.err, r.busy, r.gone, r.left = r.ext[:0], false, nil, false, false, nil
	c.table[i] = r
	c.load.Add(1)
	return nil
}

// unput takes back a request that was not sent. The connection's end may have
// answered it already.
func (c *conn) unput(r *request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if i := uint32(r.cookie); c.table[i] == r {
		c.table[i] = nil
		c.free = append(c.free, i)
		c.load.Add(-1)
	}
}

// send writes the request. If that fails the connection is dead, and the
// receiver answers r. An error means that r was not sent: ctx ended before.
func (c *conn) send(ctx context.Context, r *request) error {
	select {
	case c.wlock <- struct{}{}:
	case <-ctx.Done():
		c.unput(r)
		return ctx.Err()
	}
	defer func() { <-c.wlock }()
	if ctx.Done() != nil {
		// A server that stopped reading must not hold a caller who gave up.
		mark := c.sent.Load()
		stop := context.AfterFunc(ctx, func() {
			time.AfterFunc(graceStream, func() {
				if c.sent.Load() == mark {
					c.fail(errors.New("the server does not take requests"))
				}
			})
		})
		defer stop()
	}
	b := c.hdr[:]
	binary.BigEndian.PutUint32(b, p.RequestMagic)
	binary.BigEndian.PutUint16(b[4:], r.flags)
	binary.BigEndian.PutUint16(b[6:], r.cmd)
	binary.BigEndian.PutUint64(b[8:], r.cookie)
	binary.BigEndian.PutUint64(b[16:], uint64(r.off))
	binary.BigEndian.PutUint32(b[24:], r.n)
	var err error
	if r.cmd == p.CmdWrite {
		c.bufs = [2][]byte{b, r.buf}
		v := net.Buffers(c.bufs[:])
		_, err = v.WriteTo(c.nc)
		c.bufs = [2][]byte{}
	} else {
		_, err = c.nc.Write(b)
	}
	c.sent.Add(1)
	if err != nil {
		c.fail(err)
	}
	return nil
}

// leave ends the caller's interest in r: the receiver will take the answer
// from the stream and drop it.
func (c *conn) leave(ctx context.Context, r *request) error {
	if r.changes() {
		t := time.NewTimer(graceChange)
		defer t.Stop()
		select {
		case err := <-r.done:
			return err
		case <-t.C:
		}
	}
	c.mu.Lock()
	select {
	case err := <-r.done: // it came while we took the lock
		c.mu.Unlock()
		return err
	default:
	}
	r.gone = true
	if !r.busy {
		r.buf = nil
		c.mu.Unlock()
		return ctx.Err()
	}
	left := make(chan struct{})
	r.left = left
	c.mu.Unlock()
	// The receiver is filling buf at this moment.
	t := time.NewTimer(graceStream)
	defer t.Stop()
	select {
	case <-left:
	case <-t.C:
		c.fail(errors.New("the server stopped in the middle of a reply"))
		<-left
	}
	return ctx.Err()
}

// begin finds the request a reply is for and keeps its buffer from being taken away.
func (c *conn) begin(cookie uint64) (*request, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := cookie & (1<<32 - 1)
	if i >= uint64(len(c.table)) || c.table[i] == nil || c.table[i].cookie != cookie {
		return nil, violated("a reply to a request that was not made (cookie %#x)", cookie)
	}
	r := c.table[i]
	r.busy = true
	return r, nil
}

// end lets the buffer go, and if done answers the request.
func (c *conn) end(r *request, done bool) error {
	var err error
	if done {
		err = r.result()
		if v := (violation{}); errors.As(err, &v) {
			return err // the connection's end answers it
		}
		if err == nil && r.changes() {
			c.acked(r)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.release(r)
	if !done {
		return nil
	}
	c.answered.Store(true)
	i := uint32(r.cookie)
	c.table[i] = nil
	c.free = append(c.free, i)
	c.load.Add(-1)
	if !r.gone {
		r.done <- err
	}
	return nil
}

// release says that the receiver does not use the buffer now. c.mu is held.
func (c *conn) release(r *request) {
	r.busy = false
	if r.gone {
		r.buf = nil
	}
	if r.left != nil {
		close(r.left)
		r.left = nil
	}
}

// disconnect says goodbye, as the protocol asks, and closes.
func (c *conn) disconnect() {
	_ = c.nc.SetWriteDeadline(time.Now().Add(graceStream)) // also ends a write under way
	c.wlock <- struct{}{}
	binary.BigEndian.PutUint32(c.hdr[:], p.RequestMagic)
	binary.BigEndian.PutUint16(c.hdr[4:], 0)
	binary.BigEndian.PutUint16(c.hdr[6:], p.CmdDisc)
	clear(c.hdr[8:])
	_, _ = c.nc.Write(c.hdr[:]) // a courtesy
	<-c.wlock
	c.fail(fmt.Errorf("closed here: %w", net.ErrClosed))
}
