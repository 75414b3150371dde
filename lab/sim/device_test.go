package sim

import (
	"context"
	"testing"

	"forerun/block"
	"forerun/block/blocktest"
	"forerun/disk/disktest"
)

// TestDevices: the small stand-ins are devices like any other.
func TestDevices(t *testing.T) {
	const size = 256 << 10
	base := untouched(0, size)
	fetch := func(_ context.Context, p []byte, off int64) error {
		copy(p, base[off:])
		return nil
	}
	var fs *disktest.FS
	for _, full := range []bool{false, true} {
		open := func(t *testing.T) block.Device {
			var b []byte
			if full {
				b = base
			}
			o, err := newOverlay(fs, "/v", size, b, fetch)
			if err != nil {
				t.Fatal(err)
			}
			return block.NewChecked("overlay", o)
		}
		blocktest.Test(t, func(t *testing.T) block.Device {
			fs = disktest.New(1)
			return open(t)
		}, blocktest.Options{Content: base, Ops: 100, Reopen: func(t *testing.T, dev block.Device) block.Device {
			dev.Close()
			fs = fs.Crash()
			return open(t)
		}})
	}
	open := func(t *testing.T) block.Device {
		d, err := newImage(fs, "/image", base)
		if err != nil {
			t.Fatal(err)
		}
		return block.NewChecked("image", d)
	}
	blocktest.Test(t, func(t *testing.T) block.Device {
		fs = disktest.New(1)
		return open(t)
	}, blocktest.Options{Content: base, Ops: 100, Reopen: func(t *testing.T, dev block.Device) block.Device {
		dev.Close()
		fs = fs.Crash()
		return open(t)
	}})
}
