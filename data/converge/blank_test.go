package converge

import (
	"os"
	"path/filepath"
	"testing"

	"forerun/disk"
)

func TestBlank(t *testing.T) {
	const size = 64 << 20
	for _, c := range []struct {
		name string
		at   int64 // of one byte, or -1
		want bool
	}{
		{"nothing", -1, true}, {"a zero", 5 << 20, true},
		{"first byte", 0, false}, {"a superblock", 1080, false}, {"in the middle", size / 2, false}, {"last byte", size - 1, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := filepath.Join(t.TempDir(), "f")
			f, err := os.Create(p)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := f.Truncate(size); err != nil {
				t.Fatal(err)
			}
			if c.at >= 0 {
				b := byte(1)
				if c.want {
					b = 0
				}
				if _, err := f.WriteAt([]byte{b}, c.at); err != nil {
					t.Fatal(err)
				}
			}
			if got, err := blank(disk.OS(), p); err != nil || got != c.want {
				t.Errorf("%v, %v", got, err)
			}
		})
	}
}
