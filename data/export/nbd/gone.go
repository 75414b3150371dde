//go:build unix

package nbd

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// hungUp says whether the other side has closed the connection behind fd,
// whatever of it is still to be read.
func hungUp(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: rdhup}}
	for {
		n, err := unix.Poll(p, 0)
		if err == unix.EINTR {
			continue
		}
		return err == nil && n > 0 && p[0].Revents&(rdhup|unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) != 0
	}
}

// connGone is hungUp of any net.Conn, false where that cannot be known.
func connGone(nc net.Conn) bool {
	if t, ok := nc.(interface{ NetConn() net.Conn }); ok {
		nc = t.NetConn() // TLS
	}
	c, ok := nc.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return true // closed here
	}
	gone := false
	if raw.Control(func(fd uintptr) { gone = hungUp(int(fd)) }) != nil {
		return true
	}
	return gone
}
