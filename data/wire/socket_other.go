//go:build !linux

package wire

import (
	"context"
	"net"
)

// Listen listens for a Server.
func Listen(ctx context.Context, addr string) (net.Listener, error) {
	return (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
}

func (o SocketOptions) system(*net.TCPConn, int, bool) {}

type tcpSocket struct{}

func newTCPSocket(net.Conn) *tcpSocket          { return nil }
func (*tcpSocket) info() (tcpState, bool)       { return tcpState{}, false }
func (*tcpSocket) limit(bytesPerSecond float64) {}
func (*tcpSocket) congestion(name string)       {}
