//go:build !linux

package wire

import "net"

func (o SocketOptions) system(*net.TCPConn, int) {}
