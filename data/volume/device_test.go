package volume

import (
	"fmt"
	"testing"
	"time"

	"forerun/block"
	"forerun/block/blocktest"
	"forerun/disk"
	"forerun/internal/chunk"
)

func TestDevice(t *testing.T) {
	for _, c := range []struct {
		cb, size, bs int
		tier         int
	}{{16 << 10, 3<<20 + 512, 512, 2}, {64 << 10, 3<<20 - 4096, 4096, 4}, {1 << 20, 2<<20 + 512, 512, -1}} {
		t.Run(fmt.Sprint(c.cb), func(t *testing.T) {
			content := source(uint64(c.cb), c.size)
			var g *rig
			open := func(t *testing.T) block.Device {
				g = newRig(t, twinFS(1), content, c.cb)
				must(t, g.v.Close())
				g.opt.BlockSize = c.bs
				g.opt.Tune = Tuning{CommitEvery: 5 * time.Millisecond}
				if c.tier >= 0 {
					g.opt.Tier = newMapTier(1, c.tier)
				}
				g.open(t)
				return g.v
			}
			blocktest.Test(t, open, blocktest.Options{Content: content, Ops: 150, Reopen: func(t *testing.T, dev block.Device) block.Device {
				must(t, dev.Close())
				if c.tier >= 0 {
					g.opt.Tier = newMapTier(2, c.tier)
				}
				g.open(t)
				consistent(t, g.v)
				return g.v
			}})
		})
	}
}

func TestDeviceOnRealFiles(t *testing.T) {
	content := source(3, 2<<20)
	blocktest.Test(t, func(t *testing.T) block.Device {
		t.Chdir(t.TempDir())
		return newRig(t, disk.OS(), content, chunk.DefaultSize).v
	}, blocktest.Options{Content: content, Ops: 80, Window: 512 << 10})
}
