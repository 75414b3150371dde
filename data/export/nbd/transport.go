package nbd

import (
	"crypto/tls"
	"io"
	"net"
	"time"
)

// transport carries the bytes of a connection in the transmission phase. One
// goroutine reads and one sends at a time; stop and kill may come from any.
type transport interface {
	// read waits for at least one byte.
	read(p []byte) (int, error)
	// fill reads all of p, or fails with io.ErrUnexpectedEOF or another error.
	fill(p []byte) error
	// send sends all pieces, in order. It may change the slice.
	send(pieces [][]byte) error
	// stop makes read fail once what has arrived is read. Sending goes on.
	stop()
	// kill makes reads and sends under way and later ones fail.
	kill()
	// gone says whether the other side is known to have closed the connection,
	// whatever of it is still to be read. It costs a system call.
	gone() bool
	// close ends the connection in order. Nobody reads or sends any more.
	close()
}

// stream is the transport over any net.Conn: TLS, and pipes in tests.
type stream struct {
	nc      net.Conn
	scratch []byte // what is gathered to be sent with one call
}

const gather = 64 << 10 // bytes: larger pieces are sent by themselves

func (s *stream) read(p []byte) (int, error) { return s.nc.Read(p) }

func (s *stream) fill(p []byte) error {
	_, err := io.ReadFull(s.nc, p)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

func (s *stream) send(pieces [][]byte) error {
	out := s.scratch[:0]
	defer func() { s.scratch = out[:0] }()
	for _, p := range pieces {
		if len(p) <= gather-len(out) {
			out = append(out, p...)
			continue
		}
		if len(out) > 0 {
			if _, err := s.nc.Write(out); err != nil {
				return err
			}
			out = out[:0]
		}
		if len(p) < gather {
			out = append(out, p...)
			continue
		}
		if _, err := s.nc.Write(p); err != nil {
			return err
		}
	}
	if len(out) > 0 {
		if _, err := s.nc.Write(out); err != nil {
			return err
		}
	}
	return nil
}

func (s *stream) stop() { _ = s.nc.SetReadDeadline(time.Unix(1, 0)) }

func (s *stream) kill() {
	// Not Close: on a TLS connection it would wait for a sender.
	_ = s.nc.SetDeadline(time.Unix(1, 0))
}

func (s *stream) gone() bool { return connGone(s.nc) }

func (s *stream) close() {
	if t, ok := s.nc.(*tls.Conn); ok {
		_ = t.SetDeadline(time.Now().Add(time.Second))
		_ = t.CloseWrite()
	}
	_ = s.nc.Close()
}
