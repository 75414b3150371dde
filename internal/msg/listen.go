package msg

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"forerun/block"
	"forerun/internal/pki"
)

// The protocols, by their names in the TLS handshake (RFC 7301).
const (
	ProtoArbiter   = "forerun-arbiter"
	ProtoPeer      = "forerun-peer"
	ProtoWriteBack = "forerun-writeback"
)

const (
	handshakeTime = 5 * time.Second
	maxPending    = 64
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

// Serve accepts connections from ln, does the TLS handshake and hands each to
// the function of the protocol that was agreed on, with role and name of the
// other side's certificate; the connection is closed when that returns. Serve
// ends when ctx ends, which returns nil, or ln fails; it closes ln, and returns
// when all functions have. At most 64 connections may be in the handshake, a
// newer one pushes the oldest out.
func Serve(ctx context.Context, ln net.Listener, tlsConfig *tls.Config,
	protocols map[string]func(ctx context.Context, nc net.Conn, role, name string), log *slog.Logger) error {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	cfg := tlsConfig.Clone()
	cfg.MinVersion = tls.VersionTLS13
	cfg.DynamicRecordSizingDisabled = true
	cfg.NextProtos = slices.Sorted(maps.Keys(protocols))
	l := &listener{log: log, cfg: cfg, protocols: protocols}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	defer ln.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	var pause time.Duration
	for {
		nc, err := ln.Accept()
		switch {
		case err == nil:
			pause = 0
			wg.Go(func() { l.serve(ctx, nc) })
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return block.E("msg.accept", ln.Addr().String(), block.KindClosed, err)
		default:
			// Out of file descriptors, or a connection that was gone before it was
			// accepted: both pass.
			if pause == 0 {
				log.Warn("cannot accept connections", "addr", ln.Addr().String(), "err", err)
			}
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
		}
	}
}

type listener struct {
	log       *slog.Logger
	cfg       *tls.Config
	protocols map[string]func(ctx context.Context, nc net.Conn, role, name string)

	mu      sync.Mutex
	pending []net.Conn // in the handshake, oldest first
	told    time.Time  // when a refused one was logged
}

func (l *listener) serve(ctx context.Context, nc net.Conn) {
	defer nc.Close()
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	l.admit(nc)
	tc, err := l.greet(ctx, nc)
	l.settled(nc)
	if err != nil {
		stop()
		l.refused(nc, err)
		return
	}
	if !stop() {
		return
	}
	cs := tc.ConnectionState()
	role, name := pki.PeerIdentity(cs)
	l.protocols[cs.NegotiatedProtocol](ctx, tc, role, name)
}

func (l *listener) greet(ctx context.Context, nc net.Conn) (*tls.Conn, error) {
	nc.SetDeadline(time.Now().Add(handshakeTime))
	tune(nc)
	tc := tls.Server(nc, l.cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		return nil, pki.Explain(err)
	}
	cs := tc.ConnectionState()
	if len(cs.PeerCertificates) == 0 || len(cs.VerifiedChains) == 0 {
		return nil, &block.Error{Op: "msg.handshake", Kind: block.KindDenied, Err: errors.New("the client showed no certificate")}
	}
	if l.protocols[cs.NegotiatedProtocol] == nil {
		return nil, &block.Error{Op: "msg.handshake", Kind: block.KindUnsupported,
			Err: fmt.Errorf("the client named no protocol that is spoken here (%s)", strings.Join(l.cfg.NextProtos, ", "))}
	}
	nc.SetDeadline(time.Time{})
	return tc, nil
}

func (l *listener) admit(nc net.Conn) {
	var out net.Conn
	l.mu.Lock()
	if l.pending = append(l.pending, nc); len(l.pending) > maxPending {
		out = l.pending[0]
		l.pending = slices.Delete(l.pending, 0, 1)
	}
	l.mu.Unlock()
	if out != nil {
		out.Close()
	}
}

func (l *listener) settled(nc net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if i := slices.Index(l.pending, nc); i >= 0 {
		l.pending = slices.Delete(l.pending, i, i+1)
	}
}

// refused logs why, at most once a second: anybody can cause it.
func (l *listener) refused(nc net.Conn, err error) {
	now := time.Now()
	l.mu.Lock()
	say := l.told.IsZero() || now.Sub(l.told) >= time.Second
	if say {
		l.told = now
	}
	l.mu.Unlock()
	if say {
		l.log.Warn("connection refused", "peer", address(nc), "err", err)
	}
}
