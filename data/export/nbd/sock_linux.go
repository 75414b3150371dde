//go:build linux && (amd64 || arm64)

package nbd

import (
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

// socket is the transport over a plain socket. It makes the system calls
// itself. Several replies go with one sendmsg. A read waits in three ways, one
// after the other, because at depth 1 waiting is most of what a request costs:
//
//   - It looks again for a moment, while that pays off: the next request follows
//     the reply by a few microseconds, and sleeping and waking cost more (the
//     kernel does the same with net.core.busy_read, KVM with halt_poll_ns).
//   - It waits in the kernel for some milliseconds, so that the request wakes the
//     thread that serves it and not one that looks for something to run. That
//     long it may keep a processor of the runtime to itself.
//   - It sleeps like any goroutine; see sleeper.
//
// The descriptor is not in the runtime's poller, which would wake a thread for
// every request that arrives while the leader is awake.
type socket struct {
	mu     sync.RWMutex // held for reading by stop and kill, for writing by close
	fd     int          // -1 when closed
	closed bool         // guarded by mu

	// Of the reader.
	in    []byte
	n     int
	rerr  error
	awake sleeper
	eager int  // how often looking again paid off lately
	stays bool // waiting in the kernel ends by itself
	try   func(uintptr) bool

	// Of the sender.
	iov   []syscall.Iovec
	left  []syscall.Iovec
	head  syscall.Msghdr
	werr  error
	space sleeper
	push  func(uintptr) bool
}

const (
	// lookFor is how long a read looks again before it sleeps.
	lookFor = 20 * time.Microsecond
	// stayFor is how long a read or a send waits in the kernel before it sleeps.
	stayFor = 4 * time.Millisecond
	// eagerMax bounds how long the memory of a good run lasts.
	eagerMax = 16
	// maxIovec is what the kernel takes in one sendmsg (UIO_MAXIOV).
	maxIovec = 1024
	// buffered is what a Unix socket is asked to buffer, in bytes.
	buffered = 1 << 20
)

// newTransport picks the transport for a connection and owns it from then on.
func newTransport(nc net.Conn) transport {
	var raw syscall.RawConn
	var err error
	switch c := nc.(type) {
	case *net.UnixConn:
		_ = c.SetWriteBuffer(buffered)
		raw, err = c.SyscallConn()
	case *net.TCPConn:
		// TCP sizes its buffers itself; small replies must not wait.
		_ = c.SetNoDelay(true)
		raw, err = c.SyscallConn()
	}
	if raw == nil || err != nil {
		return &stream{nc: nc}
	}
	s := &socket{fd: -1, eager: eagerMax / 2}
	_ = raw.Control(func(fd uintptr) {
		n, _, e := syscall.Syscall(syscall.SYS_FCNTL, fd, syscall.F_DUPFD_CLOEXEC, 0)
		if e == 0 {
			s.fd = int(n)
		}
	})
	if s.fd < 0 || s.awake.init(s.fd, syscall.EPOLLIN|syscall.EPOLLRDHUP) != nil {
		s.awake.close()
		if s.fd >= 0 {
			_ = syscall.Close(s.fd)
		}
		return &stream{nc: nc}
	}
	_ = nc.Close()
	// Calls that are to return at once say so; the others return after a while.
	_ = syscall.SetNonblock(s.fd, false)
	wait := syscall.NsecToTimeval(stayFor.Nanoseconds())
	s.stays = syscall.SetsockoptTimeval(s.fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &wait) == nil &&
		syscall.SetsockoptTimeval(s.fd, syscall.SOL_SOCKET, syscall.SO_SNDTIMEO, &wait) == nil
	if runtime.GOMAXPROCS(0) == 1 {
		s.eager = never
	}
	s.try = func(uintptr) bool { return s.receive() }
	s.push = func(uintptr) bool { return s.transmit(syscall.MSG_DONTWAIT) }
	return s
}

const never = -1 << 30 // an eager that does not come back

func (s *socket) gone() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.closed || hungUp(s.fd)
}

// receive says whether the read is over, with bytes or with an error.
func (s *socket) receive() bool {
	for {
		// MSG_DONTWAIT: the call returns at once, so the scheduler need not know of it.
		n, _, e := syscall.RawSyscall6(syscall.SYS_RECVFROM, uintptr(s.fd), uintptr(unsafe.Pointer(unsafe.SliceData(s.in))),
			uintptr(len(s.in)), syscall.MSG_DONTWAIT, 0, 0)
		if e != syscall.EINTR {
			return s.received(n, e)
		}
	}
}

// stay is receive that waits for up to stayFor.
func (s *socket) stay() bool {
	n, _, e := syscall.Syscall6(syscall.SYS_RECVFROM, uintptr(s.fd), uintptr(unsafe.Pointer(unsafe.SliceData(s.in))),
		uintptr(len(s.in)), 0, 0, 0)
	if e == syscall.EINTR {
		return false
	}
	return s.received(n, e)
}

func (s *socket) received(n uintptr, e syscall.Errno) bool {
	switch e {
	case 0:
		s.n, s.rerr = int(n), nil
		if n == 0 {
			s.rerr = io.EOF
		}
		return true
	case syscall.EAGAIN:
		return false
	}
	s.n, s.rerr = 0, e
	return true
}

func (s *socket) read(p []byte) (int, error) {
	s.in = p
	err := s.wait()
	s.in = nil
	if err != nil {
		return 0, err
	}
	return s.n, s.rerr
}

func (s *socket) wait() error {
	if s.eager > 0 {
		if s.receive() {
			return nil
		}
		for began := time.Now(); time.Since(began) < lookFor; {
			if s.receive() {
				s.eager = min(s.eager+1, eagerMax)
				return nil
			}
		}
		s.eager = max(s.eager-2, 0)
	}
	if s.stays {
		began := time.Now()
		if s.stay() {
			if s.eager == 0 && time.Since(began) < lookFor {
				s.eager = 2 // it would have paid off to look
			}
			return nil
		}
	}
	return s.awake.sleep(s.try)
}

// fill reads all of p. What is large the kernel gathers, with as few calls as it
// takes; what is small follows its header at once, and is looked for.
func (s *socket) fill(p []byte) error {
	for len(p) > 0 {
		n := 0
		if s.stays && len(p) >= gather {
			r, _, e := syscall.Syscall6(syscall.SYS_RECVFROM, uintptr(s.fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))),
				uintptr(len(p)), syscall.MSG_WAITALL, 0, 0)
			switch e {
			case 0:
				if n = int(r); n == 0 {
					return io.ErrUnexpectedEOF
				}
			case syscall.EINTR:
				continue
			case syscall.EAGAIN:
			default:
				return e
			}
		}
		if n == 0 {
			var err error
			if n, err = s.read(p); err != nil {
				if err == io.EOF {
					err = io.ErrUnexpectedEOF
				}
				return err
			}
		}
		p = p[n:]
	}
	return nil
}

// transmit says whether the send is over, with all sent or with an error. With
// MSG_DONTWAIT in flags it does not wait, else for as long as a read stays.
func (s *socket) transmit(flags uintptr) bool {
	for len(s.left) > 0 {
		n := min(len(s.left), maxIovec)
		s.head.Iov = &s.left[0]
		s.head.Iovlen = uint64(n)
		w, _, e := syscall.Syscall(syscall.SYS_SENDMSG, uintptr(s.fd), uintptr(unsafe.Pointer(&s.head)),
			flags|syscall.MSG_NOSIGNAL)
		switch e {
		case 0:
		case syscall.EINTR:
			continue
		case syscall.EAGAIN:
			return false
		default:
			s.werr = e
			return true
		}
		for done := uint64(w); done > 0; {
			v := &s.left[0]
			if done < uint64(v.Len) {
				v.Base = (*byte)(unsafe.Add(unsafe.Pointer(v.Base), done))
				v.SetLen(int(uint64(v.Len) - done))
				break
			}
			done -= uint64(v.Len)
			s.left = s.left[1:]
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
	s.iov, s.left = iov, iov
	err := s.sendLeft()
	clear(s.iov)
	s.left, s.head.Iov = nil, nil
	runtime.KeepAlive(pieces)
	return err
}

func (s *socket) sendLeft() error {
	if s.transmit(syscall.MSG_DONTWAIT) || s.stays && s.transmit(0) {
		return s.werr
	}
	if s.space.file == nil {
		if err := s.space.init(s.fd, syscall.EPOLLOUT); err != nil {
			return err
		}
	}
	if err := s.space.sleep(s.push); err != nil {
		return err
	}
	return s.werr
}

func (s *socket) shut(how int) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if !s.closed {
		_ = syscall.Shutdown(s.fd, how)
	}
}

func (s *socket) stop() { s.shut(syscall.SHUT_RD) }
func (s *socket) kill() { s.shut(syscall.SHUT_RDWR) }

func (s *socket) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.closed = true
	s.awake.close()
	s.space.close()
	_ = syscall.Close(s.fd)
}

// sleeper lets a goroutine sleep until a descriptor is ready: an epoll of its
// own in the runtime's epoll, armed only while somebody sleeps.
type sleeper struct {
	fd     int
	events uint32
	ep     int
	file   *os.File // ep, in the runtime's poller
	raw    syscall.RawConn
}

func (w *sleeper) init(fd int, events uint32) error {
	ep, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		return err
	}
	if err := syscall.SetNonblock(ep, true); err != nil {
		_ = syscall.Close(ep)
		return err
	}
	w.fd, w.events, w.ep = fd, events, ep
	w.file = os.NewFile(uintptr(ep), "epoll")
	if w.raw, err = w.file.SyscallConn(); err != nil {
		return err
	}
	return syscall.EpollCtl(ep, syscall.EPOLL_CTL_ADD, fd, &syscall.EpollEvent{Fd: int32(fd)})
}

func (w *sleeper) arm(events uint32) error {
	return syscall.EpollCtl(w.ep, syscall.EPOLL_CTL_MOD, w.fd, &syscall.EpollEvent{Events: events, Fd: int32(w.fd)})
}

// sleep calls try until it answers true, whenever the descriptor may be ready.
func (w *sleeper) sleep(try func(uintptr) bool) error {
	if err := w.arm(w.events); err != nil {
		return err
	}
	if err := w.raw.Read(try); err != nil {
		return err
	}
	return w.arm(0)
}

func (w *sleeper) close() {
	if w.file != nil {
		_ = w.file.Close()
	}
}
