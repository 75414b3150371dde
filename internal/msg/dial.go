package msg

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"

	"forerun/block"
	"forerun/internal/pki"
)

// The protocols, by their names in the TLS handshake (RFC 7301).
const (
	ProtoArbiter   = "forerun-arbiter"
	ProtoPeer      = "forerun-peer"
	ProtoWriteBack = "forerun-writeback"
	ProtoLinkTest  = "forerun-linktest"
)

// DialTLS returns a Dial for ClientOptions: TCP to addr, then ClientTLS. The
// server must be one for the host in addr.
func DialTLS(addr, alpn string, cfg *tls.Config) func(ctx context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		nc, err := d.DialContext(ctx, "tcp", addr)
		if err != nil {
			return nil, &block.Error{Op: "msg.dial", Object: addr, Kind: block.KindUnavailable, Err: err}
		}
		return ClientTLS(ctx, nc, addr, alpn, cfg)
	}
}

// ClientTLS does the handshake of a client on nc, which it closes on error. The
// host in addr is the server's name unless cfg has one; alpn is the protocol
// that is to be spoken.
func ClientTLS(ctx context.Context, nc net.Conn, addr, alpn string, cfg *tls.Config) (net.Conn, error) {
	cfg = cfg.Clone()
	cfg.NextProtos = []string{alpn}
	cfg.DynamicRecordSizingDisabled = true
	if cfg.ServerName == "" {
		cfg.ServerName = addr
		if host, _, err := net.SplitHostPort(addr); err == nil {
			cfg.ServerName = host
		}
	}
	tune(nc)
	tc := tls.Client(nc, cfg)
	err := tc.HandshakeContext(ctx)
	if err == nil && tc.ConnectionState().NegotiatedProtocol != alpn {
		err = &block.Error{Op: "msg.handshake", Kind: block.KindUnsupported,
			Err: fmt.Errorf("the other side does not speak %s; is it an older version?", alpn)}
	}
	if err != nil {
		nc.Close()
		err = pki.Explain(err)
		var be *block.Error
		if errors.As(err, &be) {
			return nil, block.E("msg.dial", addr, be.Kind, err)
		}
		return nil, &block.Error{Op: "msg.dial", Object: addr, Kind: block.KindUnavailable, Err: err}
	}
	return tc, nil
}
