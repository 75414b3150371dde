//go:build !linux

package msg

import "net"

func tune(net.Conn) {}
