package wire

import (
	"context"
	"net"
	"testing"

	"forerun/block"
	"forerun/block/blocktest"
	"forerun/internal/pki"
)

// both closes the session with its only volume.
type both struct {
	*Remote
	c    *Client
	stop func()
}

func (b *both) Close() error {
	err := b.Remote.Close()
	b.c.Close()
	b.stop()
	return err
}

// TestDeviceContract runs the suite of every device against a Remote.
func TestDeviceContract(t *testing.T) {
	src := newSource(3<<20+5*4096, 51, "disk-1")
	clear(src.data[1<<20 : 2<<20])
	src.block = 4096
	src.extents = []block.Extent{{Len: 1 << 20}, {Off: 1 << 20, Len: 1 << 20, Kind: block.Hole}, {Off: 2 << 20, Len: 1<<20 + 5*4096}}
	dir := certificates(t)
	blocktest.Test(t, func(t *testing.T) block.Device {
		s := must(NewServer(ServerOptions{TLS: must(pki.ServerTLS(dir, "b1")),
			Lookup: func(string) (Served, error) { return Served{Device: src, ChunkBytes: 64 * kib}, nil }}))
		ln := must(net.Listen("tcp", "127.0.0.1:0"))
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { defer close(done); s.Serve(ctx, ln) }()
		c := must(Dial(ctx, ClientOptions{Addr: ln.Addr().String(), TLS: must(pki.ClientTLS(dir, "f1", pki.RoleBackend))}))
		return &both{must(c.Open(ctx, "disk")), c, func() { cancel(); <-done }}
	}, blocktest.Options{Content: src.data})
}
