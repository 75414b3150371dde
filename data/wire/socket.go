package wire

import "net"

// SocketOptions are set on TCP sockets where the system has them; a system
// that refuses one goes on without it.
type SocketOptions struct {
	// DSCP code points (RFC 2474) of demand and background packets, 0 to 63,
	// for networks that treat classes differently. RFC 8622 names 1 (LE) for
	// background.
	DemandDSCP, BackgroundDSCP int
	// Congestion names a congestion control, such as "bbr"; empty leaves the system's.
	Congestion string
	// NotSentLowat bounds the bytes the kernel holds that were not yet sent,
	// default 128 KiB, negative for no bound. More would only be a queue
	// nobody can re-order; the window in flight is not bounded by it.
	NotSentLowat int
}

func (o SocketOptions) apply(nc net.Conn, r connRole) {
	tc, ok := nc.(*net.TCPConn)
	if !ok {
		return
	}
	tc.SetNoDelay(true)
	if o.NotSentLowat == 0 {
		o.NotSentLowat = 128 << 10
	}
	dscp := o.DemandDSCP
	if r == roleBackground {
		dscp = o.BackgroundDSCP
	}
	o.system(tc, dscp)
}
