package raw

import (
	"os"
	"testing"

	"forerun/block"
	"forerun/block/blocktest"
)

func TestSuite(t *testing.T) {
	for name, size := range map[string]int64{"whole sectors": 4 << 20, "sparse": 1 << 40} {
		t.Run(name, func(t *testing.T) {
			var path string
			open := func(t *testing.T) block.Device {
				d, err := Open(path, Options{})
				if err != nil {
					t.Fatal(err)
				}
				return d
			}
			blocktest.Test(t, func(t *testing.T) block.Device {
				path = image(t, size, nil)
				return open(t)
			}, blocktest.Options{Ops: 200, Reopen: func(t *testing.T, d block.Device) block.Device {
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
				return open(t)
			}})
		})
	}
}

func TestSuiteReadOnly(t *testing.T) {
	content := make([]byte, 1<<20)
	for i := range content {
		content[i] = byte(i >> 9)
	}
	blocktest.Test(t, func(t *testing.T) block.Device {
		path := image(t, 1<<20, content)
		if err := os.Chmod(path, 0o400); err != nil {
			t.Fatal(err)
		}
		d, err := Open(path, Options{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}, blocktest.Options{Content: content})
}
