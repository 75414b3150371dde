//go:build !linux

package nbd

import "net"

// newTransport picks the transport for a connection.
func newTransport(nc net.Conn) transport { return &stream{nc: nc} }
