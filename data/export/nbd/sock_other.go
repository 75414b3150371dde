//go:build !(linux && (amd64 || arm64))

package nbd

import "net"

// newTransport picks the transport for a connection.
func newTransport(nc net.Conn) transport { return &stream{nc: nc} }
