package linktest

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"forerun/block"
	"forerun/internal/msg"
	"forerun/internal/pki"
)

// patience is how long the client waits for a connection and its welcome.
const patience = 15 * time.Second

// conn is one connection at the client.
type conn struct {
	addr    string
	nc, raw net.Conn
	br      *bufio.Reader
	welcome welcome
	release func() bool
}

// close ends a connection; it may be called again.
func (c *conn) close() {
	c.release()
	c.raw.Close()
}

// dial makes a connection and says hello. It ends with ctx.
func (o *Options) dial(ctx context.Context, h hello) (c *conn, err error) {
	during, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	nc, err := o.handshake(during)
	if err != nil {
		return nil, err
	}
	c = &conn{addr: o.Addr, nc: nc, raw: bottom(nc), br: bufio.NewReaderSize(nc, 64<<10)}
	c.release = context.AfterFunc(ctx, func() { c.raw.Close() })
	nc.SetDeadline(time.Now().Add(patience))
	if _, err = nc.Write(appendHello(nil, h)); err == nil {
		var p []byte
		if p, err = c.expect(tWelcome); err == nil {
			c.welcome, err = parseWelcome(p)
		}
	}
	if err != nil {
		c.close()
		return nil, c.explain(ctx, err)
	}
	return c, nil
}

// handshake dials and agrees on the protocol, or says who is in the way.
func (o *Options) handshake(ctx context.Context) (net.Conn, error) {
	raw, err := o.connect(ctx)
	if err != nil {
		return nil, err
	}
	nc, err := msg.ClientTLS(ctx, raw, o.Addr, msg.ProtoLinkTest, o.TLS)
	if err == nil {
		return nc, nil
	}
	old := block.KindOf(err) == block.KindUnsupported
	if !old && ctx.Err() == nil {
		// A server that knows none of the protocols offered ends the handshake with
		// an alert, as one does that dislikes a certificate. If the handshake
		// works without a protocol, it was the protocol.
		if raw, e := o.connect(ctx); e == nil {
			cfg := o.TLS.Clone()
			cfg.NextProtos = nil
			if host, _, e := net.SplitHostPort(o.Addr); e == nil && cfg.ServerName == "" {
				cfg.ServerName = host
			}
			old = tls.Client(raw, cfg).HandshakeContext(ctx) == nil
			raw.Close()
		}
	}
	if old {
		return nil, &block.Error{Op: "linktest.dial", Object: o.Addr, Kind: block.KindUnsupported,
			Err: errors.New("this backend is older than link test: it does not speak " + msg.ProtoLinkTest + "; install this version there")}
	}
	return nil, err
}

func (o *Options) connect(ctx context.Context) (net.Conn, error) {
	dial := o.Dial
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	nc, err := dial(ctx, "tcp", o.Addr)
	if err != nil {
		return nil, &block.Error{Op: "linktest.dial", Object: o.Addr, Kind: block.KindUnavailable,
			Err: fmt.Errorf("the backend cannot be reached; does it run, and is the port open? (%w)", err)}
	}
	return nc, nil
}

// explain says what an error of the connection means.
func (c *conn) explain(ctx context.Context, err error) error {
	var e *block.Error
	if err = pki.Explain(err); errors.As(err, &e) {
		return err
	}
	if ctx.Err() != nil {
		return block.E("linktest", c.addr, block.KindCanceled, context.Cause(ctx))
	}
	var t net.Error
	why := err
	switch {
	case errors.As(err, &t) && t.Timeout():
		why = fmt.Errorf("nothing was heard from the backend in time (%w)", err)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		why = errors.New("the backend closed the connection; its log may say why")
	default:
		why = fmt.Errorf("the connection was lost (%w)", err)
	}
	return &block.Error{Op: "linktest", Object: c.addr, Kind: block.KindUnavailable, Err: why}
}

// next reads a header; an error frame is the error it carries.
func (c *conn) next() (frameType, int, error) {
	t, n, err := readHeader(c.br)
	if err != nil || t != tError {
		return t, n, err
	}
	p, err := readPayload(c.br, n)
	if err != nil {
		return 0, 0, err
	}
	return 0, 0, parseError(p)
}

// expect reads a whole frame of type t.
func (c *conn) expect(t frameType) ([]byte, error) {
	got, n, err := c.next()
	if err != nil {
		return nil, err
	}
	if got != t {
		return nil, protocol("a frame of type %d where %d was due", got, t)
	}
	return readPayload(c.br, n)
}

// download has the server send, and notes what arrives when, since t0.
func (c *conn) download(ctx context.Context, t0 time.Time, o order) (t track, r report, err error) {
	c.nc.SetDeadline(time.Now().Add(o.duration + grace))
	if _, err := c.nc.Write(appendOrder(nil, tSend, o)); err != nil {
		return t, r, c.explain(ctx, err)
	}
	for {
		typ, n, err := c.next()
		if err != nil {
			return t, r, c.explain(ctx, err)
		}
		switch typ {
		case tData:
			err = drain(c.br, n, func(k int) { t.add(time.Since(t0), t.total+int64(k)) })
		case tReport:
			var p []byte
			if p, err = readPayload(c.br, n); err == nil {
				if r, err = parseReport(p); err == nil {
					t.end()
					return t, r, nil
				}
			}
		default:
			err = protocol("a frame of type %d inside a download", typ)
		}
		if err != nil {
			return t, r, c.explain(ctx, err)
		}
	}
}

// upload sends, and notes what the server says has arrived, since t0. The
// counters of the report are this side's.
func (c *conn) upload(ctx context.Context, t0 time.Time, noise [][]byte, o order) (t track, r report, err error) {
	c.nc.SetDeadline(time.Now().Add(o.duration + grace))
	if _, err := c.nc.Write(appendOrder(nil, tTake, o)); err != nil {
		return t, r, c.explain(ctx, err)
	}
	type sent struct {
		report
		err error
	}
	done := make(chan sent, 1)
	go func() {
		r, err := push(c.nc, c.raw, noise, o)
		if err == nil {
			_, err = c.nc.Write(appendHeader(nil, tEnd, 0))
		}
		done <- sent{r, err}
	}()
	t, err = c.taken(t0)
	if err != nil {
		c.raw.Close() // the writer sees it
		<-done
		return t, r, c.explain(ctx, err)
	}
	s := <-done
	if s.err != nil {
		return t, r, c.explain(ctx, s.err)
	}
	if s.bytes != uint64(t.total) {
		return t, r, protocol("%d bytes were sent, the backend took %d", s.bytes, t.total)
	}
	return t, s.report, nil
}

// taken reads progress until the report.
func (c *conn) taken(t0 time.Time) (t track, err error) {
	for {
		typ, n, err := c.next()
		if err != nil {
			return t, err
		}
		if typ != tProgress && typ != tReport {
			return t, protocol("a frame of type %d inside an upload", typ)
		}
		p, err := readPayload(c.br, n)
		if err != nil {
			return t, err
		}
		if typ == tProgress {
			g, err := parseProgress(p)
			if err != nil {
				return t, err
			}
			t.add(time.Since(t0), int64(g.bytes))
			continue
		}
		r, err := parseReport(p)
		if err != nil {
			return t, err
		}
		t.add(time.Since(t0), int64(r.bytes))
		t.end()
		return t, nil
	}
}
