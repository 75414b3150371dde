package wire

import (
	"context"
	"net"
	"sync/atomic"
	"testing"

	"forerun/block"
	"forerun/internal/msg"
	"forerun/internal/pki"
	"forerun/lab/wan"
)

// TestAlso: another protocol on the same port, beside a session, until the
// server ends.
func TestAlso(t *testing.T) {
	inWorld(t, wan.Link{}, newSource(64*kib, 1, "x"), func(w *world) {
		var ended atomic.Int32
		w.opts.Also = map[string]func(ctx context.Context, nc net.Conn, role, name string){
			"forerun-arbiter": func(ctx context.Context, nc net.Conn, role, name string) {
				defer ended.Add(1)
				msg.New(nc, msg.Options{Serve: func(context.Context, uint8, []byte) ([]byte, error) { return []byte(role + " " + name), nil }}).Run(ctx)
			}}
		w.serve()
		dial := func(alpn string) func(context.Context) (net.Conn, error) {
			return func(ctx context.Context) (net.Conn, error) {
				nc, err := w.wan.DialContext(ctx, "", "backend:1")
				if err != nil {
					return nil, err
				}
				return msg.ClientTLS(ctx, nc, "backend:1", alpn, must(pki.ClientTLS(w.dir, "f2", pki.RoleBackend)))
			}
		}
		c := msg.NewClient(msg.ClientOptions{Addr: "backend:1", Dial: dial("forerun-arbiter")})
		ran := make(chan error, 1)
		go func() { ran <- c.Run(w.ctx) }()
		if err := c.WaitUp(w.ctx); err != nil {
			t.Fatal(err)
		}
		if p, err := c.Call(w.ctx, 1); err != nil || string(p) != "frontend f2" {
			t.Errorf("%q, %v", p, err)
		}
		if _, err := dial("forerun-nothing")(w.ctx); err == nil {
			t.Error("a protocol nobody speaks was agreed on")
		}
		wc := must(Dial(w.ctx, w.client))
		if _, err := wc.Open(w.ctx, "disk"); err != nil {
			t.Error(err)
		}
		wc.Close()
		w.stop()
		w.stop = nil
		if ended.Load() != 1 {
			t.Error("the connection outlived its server")
		}
		c.Close()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	})
	o := ServerOptions{TLS: must(pki.ServerTLS(certificates(t), "b1")), Lookup: func(string) (Served, error) { return Served{}, nil },
		Also: map[string]func(ctx context.Context, nc net.Conn, role, name string){alpn: nil}}
	if _, err := NewServer(o); err != nil {
		t.Error("nothing is no protocol", err)
	}
	o.Also[alpn] = func(context.Context, net.Conn, string, string) {}
	if _, err := NewServer(o); block.KindOf(err) != block.KindInvalid {
		t.Error(err)
	}
}
