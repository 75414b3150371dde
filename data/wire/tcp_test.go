package wire

import (
	"bytes"
	"context"
	"net"
	"testing"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
	"forerun/internal/pki"

	"go.uber.org/goleak"
)

// overTCP is a backend and a client over the loopback, in real time.
func overTCP(t testing.TB, src *source, so ServerOptions, f func(c *Client, r *Remote, s *Server)) {
	t.Helper()
	dir := t.TempDir()
	if err := pki.Init(dir); err != nil {
		t.Fatal(err)
	}
	for _, r := range []pki.Request{{Role: pki.RoleBackend, Name: "b1", Hosts: []string{"127.0.0.1"}}, {Role: pki.RoleFrontend, Name: "f1"}} {
		if err := pki.Issue(dir, r); err != nil {
			t.Fatal(err)
		}
	}
	so.TLS = must(pki.ServerTLS(dir, "b1", pki.RoleFrontend))
	so.Lookup = func(string) (Served, error) { return Served{Device: src, ChunkBytes: 64 * kib}, nil }
	s := must(NewServer(so))
	ln := must(net.Listen("tcp", "127.0.0.1:0"))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, ln) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	}()
	c, err := Dial(ctx, ClientOptions{Addr: ln.Addr().String(), TLS: must(pki.ClientTLS(dir, "f1", pki.RoleBackend)),
		Socket: SocketOptions{DemandDSCP: 18, BackgroundDSCP: 1}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	f(c, must(c.Open(ctx, "disk")), s)
}

func TestOverTCP(t *testing.T) {
	defer goleak.VerifyNone(t)
	src := newSource(32<<20, 41, "disk-1")
	src.latency = time.Millisecond
	overTCP(t, src, ServerOptions{}, func(c *Client, r *Remote, s *Server) {
		got := make([]byte, len(src.data))
		err := r.Fetch(t.Context(), upTo(0, 512), block.Background, func(i int64, p chunk.Packed, err error) {
			if err == nil {
				if err := p.Open(got[i*64*kib:][:p.Plain]); err != nil {
					t.Error(err)
				}
			}
		})
		if err != nil || !bytes.Equal(got, src.data) {
			t.Errorf("fetched: %v, same bytes %v", err, bytes.Equal(got, src.data))
		}
		clear(got)
		if err := r.ReadAt(t.Context(), got[512:20<<20], 512, 0); err != nil || !bytes.Equal(got[512:20<<20], src.data[512:20<<20]) {
			t.Errorf("read: %v", err)
		}
	})
}

// BenchmarkFill is the whole path over the loopback: source in memory, both
// ends' TLS and codec in one process.
func BenchmarkFill(b *testing.B) {
	for name, data := range map[string]func(*source){
		"noise": func(*source) {},
		"half": func(s *source) { // a pattern in every second kilobyte
			for i := 0; i < len(s.data); i += 2 * kib {
				copy(s.data[i:i+kib], bytes.Repeat([]byte("forerun "), kib/8))
			}
		},
	} {
		b.Run(name, func(b *testing.B) {
			src := newSource(64<<20, 42, "")
			data(src)
			overTCP(b, src, ServerOptions{}, func(c *Client, r *Remote, s *Server) {
				b.SetBytes(64 << 20)
				for b.Loop() {
					if err := r.Fetch(context.Background(), upTo(0, 1024), block.Background, func(int64, chunk.Packed, error) {}); err != nil {
						b.Fatal(err)
					}
				}
			})
		})
	}
}

// BenchmarkDemand is one chunk at a time.
func BenchmarkDemand(b *testing.B) {
	src := newSource(64<<20, 43, "")
	overTCP(b, src, ServerOptions{}, func(c *Client, r *Remote, s *Server) {
		b.SetBytes(64 * kib)
		b.ReportAllocs()
		i := int64(0)
		for b.Loop() {
			if err := r.Fetch(context.Background(), []int64{i % 1024}, block.Demand, func(int64, chunk.Packed, error) {}); err != nil {
				b.Fatal(err)
			}
			i++
		}
	})
}
