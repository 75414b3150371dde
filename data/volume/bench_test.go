package volume

import (
	"context"
	"testing"

	"forerun/disk"
)

// BenchmarkLocal: what does a 4 KiB hit in the overlay cost beside its system call?
func BenchmarkLocal(b *testing.B) {
	b.Chdir(b.TempDir())
	content := make([]byte, 64<<20)
	g := newRig(b, disk.OS(), content, cb)
	ctx := context.Background()
	p := make([]byte, 1<<20)
	for off := int64(0); off < 64<<20; off += 1 << 20 {
		g.write(b, off, p)
	}
	f := g.v.overlay.files[0].Load()
	for _, c := range []struct {
		name string
		n    int
		do   func(p []byte, off int64) error
	}{
		{"pread-4k", 4096, func(p []byte, off int64) error { _, err := f.ReadAt(p, off); return err }},
		{"read-4k", 4096, func(p []byte, off int64) error { return g.v.ReadAt(ctx, p, off, 0) }},
		{"pwrite-4k", 4096, func(p []byte, off int64) error { _, err := f.WriteAt(p, off); return err }},
		{"write-4k", 4096, func(p []byte, off int64) error { return g.v.WriteAt(ctx, p, off, 0) }},
		{"pread-1m", 1 << 20, func(p []byte, off int64) error { _, err := f.ReadAt(p, off); return err }},
		{"read-1m", 1 << 20, func(p []byte, off int64) error { return g.v.ReadAt(ctx, p, off, 0) }},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(c.n))
			n := int64(0)
			for b.Loop() {
				n++
				off := n * 7919 * 4096 % (64 << 20)
				if off+int64(c.n) > 64<<20 {
					off = 0
				}
				if err := c.do(p[:c.n], off); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
