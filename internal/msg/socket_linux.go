package msg

import (
	"net"

	"golang.org/x/sys/unix"
)

// lowat bounds the bytes the kernel holds that were not yet sent: more would
// only be a queue in front of every ping. What is in flight is not bounded.
const lowat = 128 << 10

func tune(nc net.Conn) {
	tc, ok := nc.(*net.TCPConn)
	if !ok {
		return
	}
	tc.SetNoDelay(true)
	rc, err := tc.SyscallConn()
	if err != nil {
		return
	}
	rc.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, lowat) })
}
