package linktest

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// readTCP asks the system about a connection; false when it does not tell.
func readTCP(nc net.Conn) (t tcpInfo, ok bool) {
	tc, isTCP := nc.(*net.TCPConn)
	if !isTCP {
		return t, false
	}
	rc, err := tc.SyscallConn()
	if err != nil {
		return t, false
	}
	err = rc.Control(func(fd uintptr) {
		i, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		// Kernels before 4.6 do not count data segments.
		if err != nil || i.Data_segs_out == 0 && i.Bytes_acked > 1 {
			return
		}
		ok = true
		t.segments, t.again = i.Data_segs_out, i.Total_retrans
		t.minRTT, t.rtt = time.Duration(i.Min_rtt)*time.Microsecond, time.Duration(i.Rtt)*time.Microsecond
		t.congestion, _ = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	})
	return t, ok && err == nil
}
