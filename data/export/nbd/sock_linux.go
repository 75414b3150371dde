package nbd

import (
	"io"
	"net"
	"runtime"
	"syscall"
	"time"
	"unsafe"
)

// socket is the transport over a plain socket. It makes the system calls
// itself: several replies go with one writev, and a read looks again for a
// moment before it sleeps, because at depth 1 the next request follows the
// reply by a few microseconds while sleeping and waking cost more.
type socket struct {
	nc  net.Conn
	raw syscall.RawConn

	// Of the reader.
	in     []byte
	n      int
	rerr   error
	reader func(fd uintptr) bool // made once, so that a read does not allocate
	eager  int                   // how often looking again paid off lately

	// Of the sender.
	iov    []syscall.Iovec
	werr   error
	writer func(fd uintptr) bool
}

const (
	// lookFor is how long a read looks again before it sleeps.
	lookFor = 25 * time.Microsecond
	// eagerMax bounds how long the memory of a good run lasts.
	eagerMax = 16
	// maxIovec is what the kernel takes in one writev (UIO_MAXIOV).
	maxIovec = 1024
	// buffered is what a socket is asked to buffer in each direction, in bytes.
	buffered = 1 << 20
)

// newTransport picks the transport for a connection.
func newTransport(nc net.Conn) transport {
	var raw syscall.RawConn
	var err error
	switch c := nc.(type) {
	case *net.UnixConn:
		_ = c.SetWriteBuffer(buffered)
		raw, err = c.SyscallConn()
	case *net.TCPConn:
		// TCP sizes its buffers itself; requests and replies are small and must not wait.
		_ = c.SetNoDelay(true)
		raw, err = c.SyscallConn()
	}
	if raw == nil || err != nil {
		return &stream{nc: nc}
	}
	s := &socket{nc: nc, raw: raw, eager: eagerMax / 2}
	s.reader = s.tryRead
	s.writer = s.tryWrite
	return s
}

func (s *socket) tryRead(fd uintptr) bool {
	var until time.Time
	for {
		// MSG_DONTWAIT: the call returns at once, so the scheduler need not know of it.
		n, _, e := syscall.RawSyscall6(syscall.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(unsafe.SliceData(s.in))),
			uintptr(len(s.in)), syscall.MSG_DONTWAIT, 0, 0)
		switch {
		case e == 0:
			s.n, s.rerr = int(n), nil
			if n == 0 {
				s.rerr = io.EOF
			}
			if !until.IsZero() {
				s.eager = min(s.eager+1, eagerMax)
			}
			return true
		case e == syscall.EINTR:
			continue
		case e != syscall.EAGAIN:
			s.n, s.rerr = 0, e
			return true
		}
		if s.eager <= 0 {
			// Slept: when that turns out to have been short, looking pays off again.
			return false
		}
		if until.IsZero() {
			until = time.Now().Add(lookFor)
		} else if time.Now().After(until) {
			s.eager--
			return false
		}
	}
}

func (s *socket) read(p []byte) (int, error) {
	s.in = p
	var slept time.Time
	if s.eager <= 0 {
		slept = time.Now()
	}
	if err := s.raw.Read(s.reader); err != nil {
		return 0, err
	}
	if !slept.IsZero() && time.Since(slept) < lookFor {
		s.eager = 2
	}
	s.in = nil
	return s.n, s.rerr
}

func (s *socket) tryWrite(fd uintptr) bool {
	for len(s.iov) > 0 {
		n := min(len(s.iov), maxIovec)
		w, _, e := syscall.Syscall(syscall.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&s.iov[0])), uintptr(n))
		if e != 0 {
			switch e {
			case syscall.EINTR:
				continue
			case syscall.EAGAIN:
				return false
			}
			s.werr = e
			return true
		}
		left := uint64(w)
		for len(s.iov) > 0 && left >= s.iov[0].Len {
			left -= s.iov[0].Len
			s.iov = s.iov[1:]
		}
		if left > 0 {
			s.iov[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(s.iov[0].Base), left))
			s.iov[0].Len -= left
		}
	}
	s.werr = nil
	return true
}

func (s *socket) send(pieces [][]byte) error {
	iov := s.iov[:0]
	for _, p := range pieces {
		if len(p) > 0 {
			v := syscall.Iovec{Base: unsafe.SliceData(p)}
			v.SetLen(len(p))
			iov = append(iov, v)
		}
	}
	s.iov = iov
	err := s.raw.Write(s.writer)
	clear(iov)
	s.iov = iov[:0]
	runtime.KeepAlive(pieces)
	if err != nil {
		return err
	}
	return s.werr
}

func (s *socket) shut(how int) {
	_ = s.raw.Control(func(fd uintptr) { _ = syscall.Shutdown(int(fd), how) })
}

func (s *socket) stop()  { s.shut(syscall.SHUT_RD) }
func (s *socket) kill()  { s.shut(syscall.SHUT_RDWR) }
func (s *socket) close() { _ = s.nc.Close() }
