package wire

import (
	"context"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Listen listens for a Server. Connections start with a congestion control that
// does not spread packets over time: BBR, where it is the system's, paces a
// connection that is mostly idle at the rate it last saw, which a demand read would
// wait for, and goes on pacing when another one is chosen later.
func Listen(ctx context.Context, addr string) (net.Listener, error) {
	c := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) error {
		return rc.Control(func(fd uintptr) {
			for _, name := range []string{"cubic", "reno"} {
				if unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, name) == nil {
					return
				}
			}
		})
	}}
	return c.Listen(ctx, "tcp", addr)
}

func (o SocketOptions) system(tc *net.TCPConn, dscp int, bulk bool) {
	rc, err := tc.SyscallConn()
	if err != nil {
		return
	}
	rc.Control(func(fd uintptr) {
		if o.NotSentLowat > 0 {
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, o.NotSentLowat)
		}
		if dscp > 0 {
			// One of the two is the socket's family; the other refuses.
			unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TOS, dscp<<2)
			unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_TCLASS, dscp<<2)
		}
		if bulk {
			// Without the right to, the kernel's own bound stays, and more
			// connections have to make up for it.
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, bulkWindow/2) // it doubles that
		}
		if o.Congestion != "" {
			unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, o.Congestion)
		}
	})
}

// tcpSocket asks the kernel about a connection, and limits it. It is used
// under one lock.
type tcpSocket struct {
	rc        syscall.RawConn
	delivered uint32 // packets, as the kernel counted them last
	arrived   int64
	limited   float64
}

// newTCPSocket returns nil when the kernel does not tell.
func newTCPSocket(nc net.Conn) *tcpSocket {
	tc, ok := nc.(*net.TCPConn)
	if !ok {
		return nil
	}
	rc, err := tc.SyscallConn()
	if err != nil {
		return nil
	}
	t := &tcpSocket{rc: rc}
	if _, ok := t.info(); !ok {
		return nil
	}
	return t
}

func (t *tcpSocket) info() (s tcpState, ok bool) {
	var i *unix.TCPInfo
	var err error
	if e := t.rc.Control(func(fd uintptr) { i, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }); e != nil || err != nil {
		return s, false
	}
	t.arrived += int64(i.Delivered-t.delivered) * int64(i.Snd_mss)
	t.delivered = i.Delivered
	return tcpState{rtt: time.Duration(i.Rtt) * time.Microsecond, arrived: t.arrived, unsent: int(i.Notsent_bytes), lost: int(i.Total_retrans)}, true
}

// congestion changes the congestion control, if the system has it and lets us.
func (t *tcpSocket) congestion(name string) {
	t.rc.Control(func(fd uintptr) {
		unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, name)
	})
}

// limit bounds the rate at which the kernel sends, so that what is written at
// once does not leave at once. It does nothing when little changes.
func (t *tcpSocket) limit(bytesPerSecond float64) {
	if d := bytesPerSecond / max(t.limited, 1); d > 0.95 && d < 1.05 {
		return
	}
	t.limited = bytesPerSecond
	t.rc.Control(func(fd uintptr) {
		unix.SetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_MAX_PACING_RATE, uint64(bytesPerSecond))
	})
}
