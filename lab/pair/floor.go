package pair

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"forerun/block"
	"forerun/data/export/nbd"
)

// The floor under a replicated write: nothing but one round trip with the
// bytes to the other node and one append to a file of this one. It keeps
// nothing that could be read again, survives nothing, and encrypts nothing. It
// is served by the same NBD server as the product's volumes, so that the
// difference is what the product does.

// floorHead is before the bytes of a write: number and length; the answer is the number.
const floorHead = 12

// FloorPeer answers writes that arrive on addr, until ctx ends.
func FloorPeer(ctx context.Context, addr string) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	for {
		c, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		go floorAnswer(c)
	}
}

func floorAnswer(c net.Conn) {
	defer c.Close()
	in, out := bufio.NewReaderSize(c, 1<<20), bufio.NewWriterSize(c, 64<<10)
	var head [floorHead]byte
	p := make([]byte, 1<<20)
	for {
		if _, err := io.ReadFull(in, head[:]); err != nil {
			return
		}
		n := binary.BigEndian.Uint32(head[8:])
		if int(n) > len(p) {
			return
		}
		if _, err := io.ReadFull(in, p[:n]); err != nil {
			return
		}
		out.Write(head[:8])
		// As many answers in one packet as there are questions here.
		if in.Buffered() < floorHead {
			if out.Flush() != nil {
				return
			}
		}
	}
}

// Floor serves a disk of size bytes, called vol, on the NBD socket, until ctx
// ends. Its writes go to the peer at addr, and are appended to file.
func Floor(ctx context.Context, socket, addr, file string, size int64) error {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	d := &floorDevice{conn: conn, file: f, size: size, waiting: map[uint64]chan struct{}{}}
	go d.receive()
	s := nbd.NewServer(nbd.Options{Exports: floorExports{d}, Log: slog.New(slog.DiscardHandler)})
	ln, err := s.Listen("nbd+unix:///?socket=" + socket)
	if err != nil {
		return err
	}
	return s.Serve(ctx, ln)
}

// FloorRaw is the floor without a disk and a client around it: a loop with
// depth writes of 4 KiB under way to the peer at addr, each of which is appended
// to file when it is answered. It tells the median and the 99th percentile.
func FloorRaw(addr, file string, depth int, length time.Duration) (p50, p99 time.Duration, err error) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return 0, 0, err
	}
	defer c.Close()
	f, err := os.Create(file)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	msg := make([]byte, floorHead+4096)
	binary.BigEndian.PutUint32(msg[8:], 4096)
	sent := make([]time.Time, depth)
	send := func(i int) error {
		binary.BigEndian.PutUint64(msg, uint64(i))
		sent[i] = time.Now()
		_, err := c.Write(msg)
		return err
	}
	for i := range depth {
		if err := send(i); err != nil {
			return 0, 0, err
		}
	}
	in := bufio.NewReader(c)
	var took []time.Duration
	var id [8]byte
	at := int64(0)
	for end := time.Now().Add(length); time.Now().Before(end); {
		if _, err := io.ReadFull(in, id[:]); err != nil {
			return 0, 0, err
		}
		i := int(binary.BigEndian.Uint64(id[:]))
		if i >= depth {
			return 0, 0, errors.New("an answer to nothing")
		}
		if _, err := f.WriteAt(msg[floorHead:], at%(256<<20)); err != nil {
			return 0, 0, err
		}
		at += 4096
		took = append(took, time.Since(sent[i]))
		if err := send(i); err != nil {
			return 0, 0, err
		}
	}
	slices.Sort(took)
	if len(took) == 0 {
		return 0, 0, errors.New("no answer came")
	}
	return took[len(took)/2], took[len(took)*99/100], nil
}

type floorExports struct{ d *floorDevice }

func (e floorExports) Lookup(string) (block.Device, string, error) { return e.d, "the floor", nil }
func (e floorExports) List() []string                              { return []string{"vol"} }

type floorDevice struct {
	conn net.Conn
	size int64

	out     sync.Mutex
	queue   net.Buffers // heads and bytes to be sent
	sending bool

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan struct{}
	file    *os.File
	end     int64 // of the file
}

func (d *floorDevice) receive() {
	in := bufio.NewReader(d.conn)
	var b [8]byte
	for {
		if _, err := io.ReadFull(in, b[:]); err != nil {
			return
		}
		id := binary.BigEndian.Uint64(b[:])
		d.mu.Lock()
		c := d.waiting[id]
		delete(d.waiting, id)
		d.mu.Unlock()
		if c != nil {
			close(c)
		}
	}
}

// send puts a write on the wire, with those of others that come meanwhile:
// whoever finds nobody sending sends for all.
func (d *floorDevice) send(head, p []byte) error {
	d.out.Lock()
	d.queue = append(d.queue, head, p)
	if d.sending {
		d.out.Unlock()
		return nil
	}
	d.sending = true
	for len(d.queue) > 0 {
		b := d.queue
		d.queue = nil
		d.out.Unlock()
		if _, err := b.WriteTo(d.conn); err != nil {
			return err
		}
		d.out.Lock()
	}
	d.sending = false
	d.out.Unlock()
	return nil
}

func (d *floorDevice) Info() block.Info {
	return block.Info{Size: d.size, BlockSize: 512, MaxIO: 1 << 20}
}

func (d *floorDevice) WriteAt(_ context.Context, p []byte, _ int64, _ block.Flags) error {
	answered := make(chan struct{})
	d.mu.Lock()
	d.next++
	id := d.next
	d.waiting[id] = answered
	at := d.end
	d.end = (d.end + int64(len(p))) % (1 << 30)
	d.mu.Unlock()
	head := make([]byte, floorHead)
	binary.BigEndian.PutUint64(head, id)
	binary.BigEndian.PutUint32(head[8:], uint32(len(p)))
	if err := d.send(head, p); err != nil {
		return block.E("floor.write", "peer", block.KindUnavailable, err)
	}
	<-answered // p is on the wire until then
	if _, err := d.file.WriteAt(p, at); err != nil {
		return block.E("floor.write", d.file.Name(), block.KindIO, err)
	}
	return nil
}

func (d *floorDevice) ReadAt(_ context.Context, p []byte, _ int64, _ block.Flags) error {
	clear(p)
	return nil
}

func (d *floorDevice) Zero(context.Context, int64, int64, block.Flags) error     { return errFloor }
func (d *floorDevice) Trim(context.Context, int64, int64, block.Flags) error     { return errFloor }
func (d *floorDevice) Flush(context.Context, block.Flags) error                  { return nil }
func (d *floorDevice) Prefetch(context.Context, int64, int64, block.Flags) error { return nil }
func (d *floorDevice) Close() error                                              { return nil }
func (d *floorDevice) Extents(_ context.Context, dst []block.Extent, off, n int64, _ block.Flags) ([]block.Extent, error) {
	return block.AppendExtent(dst, block.Extent{Off: off, Len: n, Kind: block.Data}), nil
}

var errFloor = block.E("floor", "vol", block.KindUnsupported, errors.New("only writes reach the floor"))
