package msg

import (
	"context"
	"crypto/tls"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"forerun/block"
	"forerun/internal/pki"
)

// serveTLS serves protocols by their names until ctx ends, as whoever listens
// does (package wire).
func serveTLS(ctx context.Context, ln net.Listener, cfg *tls.Config, protocols map[string]func(ctx context.Context, nc net.Conn, role, name string)) {
	cfg = cfg.Clone()
	for p := range protocols {
		cfg.NextProtos = append(cfg.NextProtos, p)
	}
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		nc, err := ln.Accept()
		if err != nil {
			return
		}
		wg.Go(func() {
			defer nc.Close()
			tc := tls.Server(nc, cfg)
			if tc.HandshakeContext(ctx) != nil {
				return
			}
			cs := tc.ConnectionState()
			role, name := pki.PeerIdentity(cs)
			protocols[cs.NegotiatedProtocol](ctx, tc, role, name)
		})
	}
}

// TestDialByProtocol: real sockets and certificates, two protocols on one port.
func TestDialByProtocol(t *testing.T) {
	dir := t.TempDir()
	if err := pki.Init(dir); err != nil {
		t.Fatal(err)
	}
	for _, r := range []pki.Request{{Role: pki.RoleBackend, Name: "b1", Hosts: []string{"127.0.0.1"}},
		{Role: pki.RoleFrontend, Name: "f1"}, {Role: pki.RoleOperator, Name: "o1"}} {
		if err := pki.Issue(dir, r); err != nil {
			t.Fatal(err)
		}
	}
	settings := func(c *tls.Config, err error) *tls.Config {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	server := settings(pki.ServerTLS(dir, "b1", pki.RoleFrontend))
	client := settings(pki.ClientTLS(dir, "f1", pki.RoleBackend))
	stranger := settings(pki.ClientTLS(dir, "o1", pki.RoleBackend))

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	says := func(what string) func(ctx context.Context, nc net.Conn, role, name string) {
		return func(ctx context.Context, nc net.Conn, role, name string) {
			c := New(nc, Options{Serve: func(context.Context, uint8, []byte) ([]byte, error) { return []byte(what + role + name), nil }})
			c.Run(ctx)
			c.Wait()
		}
	}
	ctx, cancel := context.WithCancel(bg)
	var wg sync.WaitGroup
	wg.Go(func() {
		serveTLS(ctx, ln, server, map[string]func(ctx context.Context, nc net.Conn, role, name string){
			ProtoPeer: says("peer "), ProtoArbiter: says("arbiter ")})
	})
	defer wg.Wait()
	defer cancel()
	for proto, want := range map[string]string{ProtoPeer: "peer frontendf1", ProtoArbiter: "arbiter frontendf1"} {
		c := NewClient(ClientOptions{Addr: addr, Dial: DialTLS(addr, proto, client)})
		wg.Go(func() { c.Run(ctx) })
		up, done := context.WithTimeout(bg, 10*time.Second)
		if err := c.WaitUp(up); err != nil {
			t.Fatal(err, c.Stats())
		}
		done()
		if p, err := c.Call(bg, 1); err != nil || string(p) != want {
			t.Errorf("%s: %q, %v", proto, p, err)
		}
	}
	// A protocol that is not served, and a role that is not let in: the second
	// is only told after the client's part of the handshake.
	if _, err := DialTLS(addr, ProtoWriteBack, client)(bg); err == nil || !strings.Contains(err.Error(), "no application protocol") {
		t.Error(err)
	}
	c := NewClient(ClientOptions{Addr: addr, Dial: DialTLS(addr, ProtoPeer, stranger)})
	wg.Go(func() { c.Run(ctx) })
	wait, done := context.WithTimeout(bg, 300*time.Millisecond)
	defer done()
	if err := c.WaitUp(wait); block.KindOf(err) != block.KindCanceled {
		t.Error(err)
	}
	if s := c.Stats().Error; s == "" {
		t.Error("no reason")
	}
	// A dead address.
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead.Close()
	if _, err := DialTLS(dead.Addr().String(), ProtoPeer, client)(bg); block.KindOf(err) != block.KindUnavailable {
		t.Error(err)
	}
}
