package nbd

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"net"

	"forerun/block"
	p "forerun/internal/nbdproto"
)

// Ping asks for an answer on every connection that lives, and waits for it
// until ctx ends. A server that lives gives it at once, however long its disk
// takes: what is asked for is a read of nothing, and that it be refused is an
// answer too. It is KindUnavailable when there is no connection.
func (cl *Client) Ping(ctx context.Context) error {
	cl.gate.RLock()
	defer cl.gate.RUnlock()
	if cl.closed {
		return block.E("source.ping", cl.target.URI, block.KindClosed, nil)
	}
	cl.mu.Lock()
	live := make([]*conn, 0, len(cl.lanes))
	for _, c := range cl.lanes {
		if c != nil {
			live = append(live, c)
		}
	}
	why := cl.why
	cl.mu.Unlock()
	if len(live) == 0 {
		return block.E("source.ping", cl.target.URI, block.KindUnavailable, why)
	}
	answers := make(chan error, len(live))
	for _, c := range live {
		go func() { answers <- c.do(ctx, newRequest(p.CmdRead, 0, 0, 0)) }()
	}
	var bad error
	for range live {
		err := <-answers
		var said *serverError
		if err != nil && !errors.As(err, &said) && bad == nil {
			bad = err
		}
	}
	switch {
	case bad == nil:
		return nil
	case ctx.Err() != nil:
		return block.E("source.ping", cl.target.URI, block.KindCanceled, fmt.Errorf("the server gives no sign of life: %w", bad))
	}
	return block.E("source.ping", cl.target.URI, block.KindUnavailable, bad)
}

var errAborted = errors.New("given up here")

// Abort breaks all connections: calls under way fail with KindClosed at once,
// and so do calls from now on. Close is still to be called, and does not wait.
func (cl *Client) Abort() {
	cl.cancel()
	cl.mu.Lock()
	cl.broadcast()
	cl.mu.Unlock()
	cl.mu.Lock()
	for _, c := range cl.lanes {
		if c != nil {
			c.reset()
		}
	}
	cl.mu.Unlock()
	cl.hangUp(errAborted)
}

// reset closes the socket at once. Over TCP what was not sent yet is dropped,
// and not sent by the kernel when the way to the server opens again: by then
// the caller has had it done elsewhere, and perhaps something else after it.
func (c *conn) reset() {
	nc := c.nc
	if t, ok := nc.(*tls.Conn); ok {
		nc = t.NetConn() // whose Close waits for nobody
	}
	if t, ok := nc.(*net.TCPConn); ok {
		_ = t.SetLinger(0) // else it is sent after all
	}
	_ = nc.Close() // it is given up
}

// List names the exports that the server at t tells of. The name in t does not matter.
func List(ctx context.Context, t Target) ([]string, error) {
	var names []string
	nc, err := connect(ctx, t, func(ctx context.Context, h *handshake) error {
		fixed, _, err := h.greet(ctx)
		if err != nil {
			return err
		}
		if !fixed {
			return refused(block.KindUnsupported, "the server cannot list its exports")
		}
		if err := h.send(p.OptList, nil); err != nil {
			return err
		}
		err = h.replies(p.OptList, func(rep uint32, data []byte) error {
			if rep != p.RepServer || len(data) < 4 {
				return nil
			}
			n := binary.BigEndian.Uint32(data)
			if int64(n) > int64(len(data)-4) {
				return errors.New("the list of exports is cut short")
			}
			names = append(names, string(data[4:4+n]))
			return nil
		})
		if err == nil {
			_ = h.send(p.OptAbort, nil) // a courtesy
		}
		return err
	})
	if err != nil {
		var r *refusal
		var oe *optionError
		kind := block.KindUnavailable
		switch {
		case errors.As(err, &r):
			kind = r.kind
		case errors.As(err, &oe):
			kind = block.KindDenied
		}
		return nil, block.E("source.list", t.URI, kind, err)
	}
	_ = nc.Close() // nothing was changed
	return names, nil
}
