package load

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"forerun/internal/nbdproto"
)

// Client is one connection to an NBD export. Its methods may be called from
// many goroutines; requests are pipelined.
type Client struct {
	// Size of the export in bytes, and its transmission flags.
	Size  int64
	Flags uint16

	conn net.Conn

	send sync.Mutex // one request at a time on the wire; before mu

	mu     sync.Mutex
	next   uint64
	calls  map[uint64]*call
	failed error
	done   chan struct{}
}

type call struct {
	read  []byte
	reply chan error
}

// ErrRefused is in the chain of an error the server answered; the connection stands.
var ErrRefused = errors.New("the server answered an error")

// Dial connects to the export of that name on a unix socket.
func Dial(ctx context.Context, socket, export string) (*Client, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	c, err := Connect(ctx, conn, export)
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("nbd %s: %w", socket, err)
	}
	return c, nil
}

// Connect does the handshake on conn, which belongs to the Client afterwards.
func Connect(ctx context.Context, conn net.Conn, export string) (*Client, error) {
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Now()) })
	defer stop()
	c := &Client{conn: conn, calls: map[uint64]*call{}, done: make(chan struct{})}
	in := bufio.NewReaderSize(conn, 256<<10)
	if err := c.handshake(in, export); err != nil {
		return nil, err
	}
	if !stop() {
		return nil, ctx.Err()
	}
	go c.receive(in)
	return c, nil
}

func (c *Client) handshake(in *bufio.Reader, export string) error {
	be := binary.BigEndian
	hello := make([]byte, nbdproto.ServerHelloLen)
	if _, err := io.ReadFull(in, hello); err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	if be.Uint64(hello) != nbdproto.Magic || be.Uint64(hello[8:]) != nbdproto.OptMagic {
		return errors.New("handshake: this is not a newstyle NBD server")
	}
	out := be.AppendUint32(nil, nbdproto.FlagCFixedNewstyle|nbdproto.FlagCNoZeroes)
	out = nbdproto.AppendOption(out, nbdproto.OptGo, nbdproto.AppendInfo(nil, export))
	if _, err := c.conn.Write(out); err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	for {
		head := make([]byte, nbdproto.OptionReplyLen)
		if _, err := io.ReadFull(in, head); err != nil {
			return fmt.Errorf("handshake: %w", err)
		}
		_, typ, n, ok := nbdproto.ParseOptionReply(head)
		if !ok || n > nbdproto.MaxPayload {
			return errors.New("handshake: this is not an answer to an option")
		}
		data := make([]byte, n)
		if _, err := io.ReadFull(in, data); err != nil {
			return fmt.Errorf("handshake: %w", err)
		}
		switch {
		case typ == nbdproto.RepAck:
			if c.Size == 0 {
				return errors.New("handshake: the server did not tell the size")
			}
			return nil
		case typ&nbdproto.RepFlagError != 0:
			return fmt.Errorf("export %q: option error %#x: %s", export, typ, data)
		case typ == nbdproto.RepInfo && len(data) >= 12 && be.Uint16(data) == nbdproto.InfoExport:
			c.Size, c.Flags = int64(be.Uint64(data[2:])), be.Uint16(data[10:])
		}
	}
}

func (c *Client) receive(in *bufio.Reader) {
	var head [nbdproto.SimpleReplyLen]byte
	for {
		if _, err := io.ReadFull(in, head[:]); err != nil {
			c.end(fmt.Errorf("connection ended: %w", err))
			return
		}
		r, ok := nbdproto.ParseSimpleReply(head[:])
		if !ok {
			c.end(fmt.Errorf("not a simple reply: %x", head))
			return
		}
		c.mu.Lock()
		k := c.calls[r.Cookie]
		delete(c.calls, r.Cookie)
		c.mu.Unlock()
		if k == nil {
			c.end(fmt.Errorf("reply to request %d, which is not under way", r.Cookie))
			return
		}
		var err error
		if r.Errno != 0 {
			err = fmt.Errorf("%w: errno %d", ErrRefused, r.Errno)
		} else if k.read != nil {
			if _, e := io.ReadFull(in, k.read); e != nil {
				k.reply <- e
				c.end(fmt.Errorf("connection ended: %w", e))
				return
			}
		}
		k.reply <- err
	}
}

func (c *Client) end(err error) {
	c.conn.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failed = err
	for id, k := range c.calls {
		k.reply <- err
		delete(c.calls, id)
	}
	close(c.done)
}

func (c *Client) do(typ, flags uint16, off, n int64, write, read []byte) error {
	k := &call{read: read, reply: make(chan error, 1)}
	c.mu.Lock()
	if c.failed != nil {
		c.mu.Unlock()
		return c.failed
	}
	c.next++
	id := c.next
	c.calls[id] = k
	c.mu.Unlock()
	req := nbdproto.Request{Flags: flags, Type: typ, Cookie: id, Offset: uint64(off), Length: uint32(n)}
	c.send.Lock()
	bufs := net.Buffers{req.Append(make([]byte, 0, nbdproto.RequestLen))}
	if len(write) > 0 {
		bufs = append(bufs, write)
	}
	if _, err := bufs.WriteTo(c.conn); err != nil {
		c.conn.Close() // receive ends, and answers all
	}
	c.send.Unlock()
	return <-k.reply
}

// ReadAt is a read of len(p) bytes.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	if err := c.do(nbdproto.CmdRead, 0, off, int64(len(p)), nil, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// WriteAt is a write.
func (c *Client) WriteAt(p []byte, off int64, fua bool) error {
	return c.do(nbdproto.CmdWrite, fuaFlag(fua), off, int64(len(p)), p, nil)
}

// Zero writes n zeros; the server may unmap.
func (c *Client) Zero(off, n int64, fua bool) error {
	return c.do(nbdproto.CmdWriteZeroes, fuaFlag(fua), off, n, nil, nil)
}

// Flush makes what was acknowledged durable.
func (c *Client) Flush() error { return c.do(nbdproto.CmdFlush, 0, 0, 0, nil, nil) }

func fuaFlag(on bool) uint16 {
	if on {
		return nbdproto.CmdFlagFUA
	}
	return 0
}

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close tells the server and ends the connection.
func (c *Client) Close() error {
	c.send.Lock()
	c.conn.Write(nbdproto.Request{Type: nbdproto.CmdDisc}.Append(nil))
	c.send.Unlock()
	c.conn.Close()
	<-c.done
	return nil
}
