package wire

import (
	"fmt"
	"net"
	"strconv"
	"strings"

	"forerun/block"
)

// SocketOptions are set on TCP sockets where the system has them; a system
// that refuses one goes on without it.
type SocketOptions struct {
	// DSCP code points (RFC 2474) of each class's packets, 0 to 63, for networks
	// that treat classes differently; 0 leaves them unmarked.
	DemandDSCP, WriteBackDSCP, BackgroundDSCP int
	// Congestion names the congestion control of all connections. Empty is
	// "bbr" for what sends in bulk, which keeps its rate where packets are lost, or
	// "cubic" while none are and the sender is paced, and for demand what the
	// listener has (Listen).
	Congestion string
	// NotSentLowat bounds the bytes the kernel holds that were not yet sent,
	// default 128 KiB, negative for no bound. More would only be a queue
	// nobody can re-order; the window in flight is not bounded by it.
	NotSentLowat int
}

// bulkWindow is how many bytes a connection that sends in bulk may keep in the
// kernel until they are acknowledged: a gigabit a second for 200 ms, that again
// while something lost is sent again, and what the kernel adds. What has not left
// yet is bounded by NotSentLowat all the same.
const bulkWindow = 128 << 20

// Apply sets the options on nc, if it is a TCP connection, for what a class sends.
func (o SocketOptions) Apply(nc net.Conn, class block.Flags) {
	tc, ok := nc.(*net.TCPConn)
	if !ok {
		return
	}
	tc.SetNoDelay(true)
	if o.NotSentLowat == 0 {
		o.NotSentLowat = 128 << 10
	}
	dscp := o.DemandDSCP
	if class != block.Demand && o.Congestion == "" {
		o.Congestion = "bbr"
	}
	switch class {
	case block.WriteBack:
		dscp = o.WriteBackDSCP
	case block.Background:
		dscp = o.BackgroundDSCP
	}
	o.system(tc, dscp, class != block.Demand)
}

func (o SocketOptions) apply(nc net.Conn, r connRole) {
	class := block.Demand
	if r == roleBackground {
		class = block.Background
	}
	o.Apply(nc, class)
}

// DefaultDSCP are the usual marks (RFC 4594): low-latency data for what a
// workload waits for, high-throughput data below it, low-priority data last.
const DefaultDSCP = "demand=AF31,writeback=AF21,background=CS1"

// SetDSCP reads CLASS=MARK,… into o: classes are demand, writeback and
// background, a mark is a number from 0 to 63 or a name such as AF31, CS1, EF
// or LE (RFC 8622). "none" is no marks at all. Classes that are not named stay.
func (o *SocketOptions) SetDSCP(s string) error {
	bad := func(why string) error {
		return fmt.Errorf("dscp %q: %s; examples: %s, background=LE, none", s, why, DefaultDSCP)
	}
	if s == "none" {
		o.DemandDSCP, o.WriteBackDSCP, o.BackgroundDSCP = 0, 0, 0
		return nil
	}
	for part := range strings.SplitSeq(s, ",") {
		class, mark, ok := strings.Cut(part, "=")
		if !ok {
			return bad(fmt.Sprintf("%q is not CLASS=MARK", part))
		}
		n, ok := codePoint(mark)
		if !ok {
			return bad(fmt.Sprintf("%q is not a code point", mark))
		}
		switch class {
		case "demand":
			o.DemandDSCP = n
		case "writeback", "write-back":
			o.WriteBackDSCP = n
		case "background":
			o.BackgroundDSCP = n
		default:
			return bad(fmt.Sprintf("%q is not demand, writeback or background", class))
		}
	}
	return nil
}

// codePoint reads a number or a name of RFC 2474, 2597, 3246, 5865 or 8622.
func codePoint(s string) (int, bool) {
	if n, err := strconv.Atoi(s); err == nil {
		return n, n >= 0 && n <= 63
	}
	digit := func(i int, most byte) (int, bool) {
		return int(s[i] - '0'), s[i] >= '0' && s[i] <= most
	}
	switch s = strings.ToUpper(s); {
	case s == "EF":
		return 46, true
	case s == "VA":
		return 44, true
	case s == "LE":
		return 1, true
	case len(s) == 3 && s[:2] == "CS":
		n, ok := digit(2, '7')
		return 8 * n, ok
	case len(s) == 4 && s[:2] == "AF":
		class, ok1 := digit(2, '4')
		drop, ok2 := digit(3, '3')
		return 8*class + 2*drop, ok1 && ok2 && class > 0 && drop > 0
	}
	return 0, false
}
