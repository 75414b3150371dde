package disktest

import (
	"bytes"
	"io"
	"math/rand/v2"
	"path"
	"testing"

	"forerun/block"
	"forerun/disk"
)

// TestSameAsTheHost does the same random calls here and on the host's file
// system: bytes, lengths, names and kinds of errors must agree.
func TestSameAsTheHost(t *testing.T) {
	for seed := range uint64(12) {
		r := rand.New(rand.NewPCG(seed, 20))
		sides := [2]struct {
			fs   disk.FS
			root string
			open map[string]disk.File
		}{{fs: disk.OS(), root: t.TempDir()}, {fs: New(seed), root: "/x"}}
		must(t, sides[1].fs.MkdirAll("/x"))
		for i := range sides {
			sides[i].open = map[string]disk.File{}
		}
		names := []string{"a", "b", "d/a", "d/b", "d", "d/e"}
		for step := range 500 {
			n, m := names[r.IntN(len(names))], names[r.IntN(len(names))]
			op, off, l := r.IntN(14), r.Int64N(30000), 1+r.Int64N(9000)
			mode := disk.Mode(r.IntN(16)) | disk.Write
			fill := byte(1 + r.IntN(255))
			var out [2]any
			var errs [2]error
			for i := range sides {
				s := &sides[i]
				p, q := path.Join(s.root, n), path.Join(s.root, m)
				h := s.open[n]
				if h == nil && op >= 6 {
					continue
				}
				var err error
				switch op {
				case 0, 1:
					if s.open[n] != nil {
						continue
					}
					var f disk.File
					if f, err = s.fs.Open(p, mode); err == nil {
						s.open[n] = f
					}
				case 2:
					if n == "d" || n == "d/e" || m == "d" || m == "d/e" { // files only
						continue
					}
					err = s.fs.Rename(p, q)
				case 3:
					err = s.fs.Remove(p)
				case 4:
					if n == "d" || n == "d/e" {
						err = s.fs.MkdirAll(p)
					}
				case 5:
					out[i], err = func() (any, error) { l, err := s.fs.List(s.root); return len(l), err }()
				case 6, 7, 8:
					out[i], err = h.WriteAt(bytes.Repeat([]byte{fill}, int(l)), off)
				case 9:
					err = h.Truncate(off)
				case 10:
					err = h.Punch(off, l)
				case 11:
					err = h.Allocate(off, l)
				case 12:
					buf := make([]byte, l)
					var k int
					k, err = h.ReadAt(buf, off)
					out[i] = string(buf[:k])
					if err == io.EOF {
						out[i], err = out[i].(string)+"|eof", nil
					}
				case 13:
					err = h.Close()
					delete(s.open, n)
				}
				errs[i] = err
			}
			if out[0] != out[1] || block.KindOf(errs[0]) != block.KindOf(errs[1]) {
				t.Fatalf("seed %d step %d op %d %s %s: host %v, twin %v", seed, step, op, n, m, errs[0], errs[1])
			}
			if h := sides[0].open[n]; h != nil && op >= 6 {
				a, err := h.Stat()
				must(t, err)
				b, err := sides[1].open[n].Stat()
				must(t, err)
				if a.Size != b.Size {
					t.Fatalf("seed %d step %d op %d %s: host has %d bytes, twin %d", seed, step, op, n, a.Size, b.Size)
				}
				x, y := make([]byte, a.Size), make([]byte, a.Size)
				if _, err := h.ReadAt(x, 0); err != nil && err != io.EOF {
					t.Fatal(err)
				}
				if _, err := sides[1].open[n].ReadAt(y, 0); err != nil && err != io.EOF {
					t.Fatal(err)
				}
				if !bytes.Equal(x, y) {
					t.Fatalf("seed %d step %d op %d %s: other bytes", seed, step, op, n)
				}
			}
		}
		for i := range sides {
			for _, h := range sides[i].open {
				h.Close()
			}
		}
	}
}
