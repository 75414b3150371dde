package nbd

import (
	"io"
	"testing"
	"time"

	"forerun/block"
	"forerun/internal/nbdproto"
)

// benchmark keeps depth requests under way over a Unix socket.
func benchmark(b *testing.B, typ uint16, size, depth int) {
	m := newMem(64<<20, 1)
	_, l := start(b, Options{Exports: table{"": m}, Near: func(block.Device, int64, int64) bool { return true }})
	c := dial(b, l)
	c.open("", false)
	_ = c.nc.SetDeadline(time.Time{})
	req := nbdproto.Request{Type: typ, Offset: 4096, Length: uint32(size)}.Append(nil)
	answer := nbdproto.SimpleReplyLen
	if typ == nbdproto.CmdRead {
		answer += size
	} else {
		req = append(req, make([]byte, size)...)
	}
	in := make([]byte, answer)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	b.ResetTimer()
	done := make(chan error, 1)
	tokens := make(chan struct{}, depth)
	go func() {
		for range b.N {
			if _, err := io.ReadFull(c.nc, in); err != nil {
				done <- err
				return
			}
			<-tokens
		}
		done <- nil
	}()
	for range b.N {
		tokens <- struct{}{}
		if _, err := c.nc.Write(req); err != nil {
			b.Fatal(err)
		}
	}
	if err := <-done; err != nil {
		b.Fatal(err)
	}
}

func BenchmarkRead4K(b *testing.B)       { benchmark(b, nbdproto.CmdRead, 4096, 1) }
func BenchmarkRead4KDeep(b *testing.B)   { benchmark(b, nbdproto.CmdRead, 4096, 32) }
func BenchmarkWrite4K(b *testing.B)      { benchmark(b, nbdproto.CmdWrite, 4096, 1) }
func BenchmarkWrite4KDeep(b *testing.B)  { benchmark(b, nbdproto.CmdWrite, 4096, 32) }
func BenchmarkRead1MDeep(b *testing.B)   { benchmark(b, nbdproto.CmdRead, 1<<20, 4) }
func BenchmarkWrite1MDeep(b *testing.B)  { benchmark(b, nbdproto.CmdWrite, 1<<20, 4) }
func BenchmarkRead64KDeep(b *testing.B)  { benchmark(b, nbdproto.CmdRead, 64<<10, 8) }
func BenchmarkWrite64KDeep(b *testing.B) { benchmark(b, nbdproto.CmdWrite, 64<<10, 8) }
