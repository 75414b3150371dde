//go:build !linux

package linktest

import "net"

func readTCP(net.Conn) (tcpInfo, bool) { return tcpInfo{}, false }
