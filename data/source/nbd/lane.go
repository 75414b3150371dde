package nbd

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"forerun/block"
	p "forerun/internal/nbdproto"
)

const (
	firstRetry = 20 * time.Millisecond
	lastRetry  = 5 * time.Second
	// lastRetryLocal is lastRetry over a unix socket: a try costs nothing there.
	lastRetryLocal = 500 * time.Millisecond
	// maxLosses bounds how often one request may lose its connection before an
	// answer, and maxViolations how often to a violation: it is then the
	// request that breaks it.
	maxLosses     = 64
	maxViolations = 3
)

// lane keeps one connection: c is the first one, or nil to dial. The back-off
// between tries begins anew after a connection that answered anything.
func (cl *Client) lane(i int, c *conn) {
	wait := firstRetry
	top := lastRetry
	if cl.target.Network == "unix" {
		top = lastRetryLocal
	}
	for again := c != nil; ; again = true {
		if c == nil {
			var err error
			if c, err = cl.connect(); err != nil {
				if cl.ctx.Err() != nil || !cl.unreachable(err) {
					return
				}
			} else if again {
				cl.stats.reconnects.Add(1)
			}
		}
		if c != nil {
			if !cl.install(i, c) {
				c.disconnect()
				c.drain(errClosed)
				return
			}
			err := c.receive()
			cl.uninstall(i, c, err)
			c.drain(err)
			if cl.ctx.Err() != nil {
				return
			}
			if c.answered.Load() {
				wait = firstRetry
			}
			c = nil
		}
		t := time.NewTimer(wait/2 + rand.N(wait))
		select {
		case <-cl.ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
		wait = min(wait*2, top)
	}
}

var errClosed = errors.New("the client was closed")

// connect makes a connection that can replace the first one.
func (cl *Client) connect() (*conn, error) {
	nc, ex, err := dial(cl.ctx, cl.target)
	if err != nil {
		return nil, err
	}
	if err := cl.ex.sameAs(ex); err != nil {
		_ = nc.Close() // of no use
		err = block.E("source.reconnect", cl.target.URI, block.KindCorrupt, err)
		cl.mu.Lock()
		if cl.fatal == nil {
			cl.fatal = err
			cl.log.Error("the NBD export is not what it was; it must be opened again", "uri", cl.target.URI, "err", err)
			cl.tell(err.Error())
			cl.broadcast()
		}
		cl.mu.Unlock()
		return nil, err
	}
	return cl.wrap(nc, ex), nil
}

// sameAs says why now cannot stand in for e.
func (e *export) sameAs(now export) error {
	const needed = p.FlagSendFlush | p.FlagSendFUA | p.FlagSendTrim | p.FlagSendWriteZeroes | p.FlagSendFastZero | p.FlagSendCache
	switch {
	case now.size != e.size:
		return fmt.Errorf("the export had %d bytes and has %d after reconnecting: it is another disk or was resized; open it again", e.size, now.size)
	case now.has(p.FlagReadOnly) && !e.has(p.FlagReadOnly):
		return errors.New("the export became read-only after reconnecting; open it again")
	case e.flags&^now.flags&needed != 0:
		return fmt.Errorf("the export lost abilities after reconnecting (transmission flags were %#x, are %#x); open it again", e.flags, now.flags)
	case now.minBlock > e.minBlock || now.maxBlock < e.maxBlock:
		return fmt.Errorf("the export's block sizes were %d to %d and are %d to %d after reconnecting; open it again", e.minBlock, e.maxBlock, now.minBlock, now.maxBlock)
	}
	return nil
}

// install makes c available; false when the client is closing or failed.
func (cl *Client) install(i int, c *conn) bool {
	cl.mu.Lock()
	defer cl.mu.Unlock()
	if cl.ctx.Err() != nil {
		return false
	}
	if cl.lanes[i] == c {
		return true // the first one is installed by Open
	}
	cl.born++
	c.born = cl.born
	cl.lanes[i] = c
	cl.alive++
	if cl.alive == 1 && !cl.downSince.IsZero() {
		cl.log.Info("the NBD server is back", "uri", cl.target.URI, "after", time.Since(cl.downSince).Round(time.Millisecond))
	}
	if !cl.downSince.IsZero() {
		cl.tell("")
	}
	cl.downSince, cl.why = time.Time{}, nil
	cl.broadcast()
	return true
}

// uninstall takes a broken connection away, and notes what its loss means for
// writes that were acknowledged but not flushed.
func (cl *Client) uninstall(i int, c *conn, err error) {
	cl.mu.Lock()
	defer cl.mu.Unlock()
	cl.lanes[i] = nil
	cl.alive--
	if cl.ctx.Err() != nil {
		return
	}
	if !cl.opt.KeepsWrites {
		cl.flushed.lost(c)
	}
	cl.log.Warn("lost a connection to the NBD server", "uri", cl.target.URI, "err", err, "others", cl.alive)
	if cl.alive == 0 {
		cl.downSince, cl.why = time.Now(), err
		cl.tell("the NBD server was lost: " + err.Error())
		cl.broadcast()
	}
}

// unreachable notes why no connection could be made, and says whether to try again.
func (cl *Client) unreachable(err error) bool {
	cl.mu.Lock()
	defer cl.mu.Unlock()
	if cl.alive == 0 {
		if cl.why == nil || cl.why.Error() != err.Error() {
			cl.log.Warn("the NBD server cannot be reached", "uri", cl.target.URI, "err", err)
		}
		cl.why = err
		if cl.fatal == nil {
			cl.tell("the NBD server cannot be reached: " + err.Error())
		}
	}
	return cl.fatal == nil
}

// tell passes a change of state on. cl.mu is held.
func (cl *Client) tell(why string) {
	if cl.opt.OnState != nil {
		cl.opt.OnState(why)
	}
}

// broadcast wakes everybody in pick. cl.mu is held.
func (cl *Client) broadcast() {
	close(cl.changed)
	cl.changed = make(chan struct{})
}

// pick waits for a live connection and returns the least loaded one, or the oldest.
func (cl *Client) pick(ctx context.Context, op string, oldest bool) (*conn, error) {
	for {
		cl.mu.Lock()
		if cl.fatal != nil {
			cl.mu.Unlock()
			return nil, cl.fatal
		}
		var best *conn
		for _, c := range cl.lanes {
			switch {
			case c == nil:
			case best == nil, oldest && c.born < best.born, !oldest && c.load.Load() < best.load.Load():
				best = c
			}
		}
		changed, since, why := cl.changed, cl.downSince, cl.why
		cl.mu.Unlock()
		if best != nil {
			return best, nil
		}
		if cl.ctx.Err() != nil {
			return nil, block.E("source."+op, cl.target.URI, block.KindClosed, errClosed)
		}
		var expired <-chan time.Time
		if cl.opt.ReconnectTimeout > 0 {
			left := cl.opt.ReconnectTimeout - time.Since(since)
			if left <= 0 {
				return nil, block.E("source."+op, cl.target.URI, block.KindUnavailable,
					fmt.Errorf("the NBD server has been out of reach for %v: %w", time.Since(since).Round(time.Millisecond), why))
			}
			t := time.NewTimer(left)
			defer t.Stop()
			expired = t.C
		}
		select {
		case <-ctx.Done():
			err := ctx.Err()
			if why != nil {
				err = fmt.Errorf("%w while the NBD server is out of reach: %w", err, why)
			}
			return nil, block.E("source."+op, cl.target.URI, block.KindCanceled, err)
		case <-expired:
		case <-changed:
		case <-cl.ctx.Done():
		}
	}
}
