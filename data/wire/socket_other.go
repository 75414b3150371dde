//go:build !linux

package wire

import (
	"net"
	"time"
)

func (o SocketOptions) system(*net.TCPConn, int) {}

type tcpSocket struct{}

func newTCPSocket(net.Conn) *tcpSocket          { return nil }
func (*tcpSocket) info() (tcpState, bool)       { return tcpState{}, false }
func (*tcpSocket) limit(bytesPerSecond float64) {}
