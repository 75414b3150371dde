package journal

import (
	"bytes"
	"testing"

	"forerun/block"
	"forerun/block/blocktest"
	"forerun/disk"
	"forerun/disk/disktest"
)

// FuzzReplay opens a journal whose one segment holds any bytes: it opens or
// refuses, and never applies what no valid record says.
func FuzzReplay(f *testing.F) {
	build := func(n int) []byte {
		fs := disktest.New(1)
		j, err := Open(fs, "/journal", blocktest.NewTwin(64<<10, 512), crashOptions)
		if err != nil {
			f.Fatal(err)
		}
		for i := range n {
			if err := j.WriteAt(bg, bytes.Repeat([]byte{byte(i + 1)}, 512), int64(i)*512, 0); err != nil {
				f.Fatal(err)
			}
		}
		j.Zero(bg, 0, 512, 0)
		j.Flush(bg, 0)
		j.Trim(bg, 512, 512, 0)
		s := j.cur
		b := make([]byte, s.tail+200)
		s.file.ReadAt(b, 0)
		j.Close()
		return b
	}
	f.Add(build(0), 0, byte(0))
	f.Add(build(3), 4200, byte(1))
	f.Add(build(3), 20, byte(255))
	f.Add([]byte("FRJRNSEG"), 3, byte(7))
	f.Fuzz(func(t *testing.T, b []byte, at int, x byte) {
		if len(b) > 64<<10 {
			return
		}
		b = bytes.Clone(b)
		if at >= 0 && at < len(b) {
			b[at] ^= x
		}
		// What a reader of the format by hand would apply.
		var want [][2]int64
		if h, ok, _ := parseSegInfo(b); ok {
			walk(newWindow(bytes.NewReader(b), int64(len(b))), &h, func(_ int64, r *recInfo, p []byte) error {
				want = append(want, [2]int64{int64(r.off), int64(r.length)})
				return nil
			})
		}
		fs := disktest.New(1)
		fs.MkdirAll("/journal")
		w, err := fs.Open("/journal/0000000000000001.seg", disk.Write|disk.Create)
		if err != nil {
			t.Fatal(err)
		}
		w.WriteAt(b, 0)
		w.Close()
		twin := blocktest.NewTwin(64<<10, 512)
		j, err := Open(fs, "/journal", twin, crashOptions)
		if err != nil {
			if block.KindOf(err) == block.KindNone {
				t.Fatal("an error without a kind")
			}
			return
		}
		defer j.Close()
		got := twin.Bytes()
		for _, w := range want {
			if w[0] >= 0 && w[0]+w[1] <= int64(len(got)) {
				clear(got[w[0] : w[0]+w[1]])
			}
		}
		if !bytes.Equal(got, make([]byte, len(got))) {
			t.Fatal("bytes were written that no record covers")
		}
	})
}

// FuzzHolds parses any bytes as the file of holds.
func FuzzHolds(f *testing.F) {
	f.Add([]byte("{\"version\":1,\"holds\":{}}\n00000000\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, ok := parseHolds(b); ok && h == nil {
			t.Fatal("no holds and no error")
		}
	})
}
