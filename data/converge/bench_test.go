package converge

import (
	"bytes"
	"context"
	"fmt"
	"testing"
	"time"

	"forerun/block"
	"forerun/block/blocktest"
	"forerun/disk"
)

// What does the Switch and an idle or busy Tracker add to a 4 KiB read or write?
func BenchmarkPass(b *testing.B) {
	for _, on := range []bool{false, true} {
		b.Run(fmt.Sprintf("tracking=%v", on), func(b *testing.B) {
			tr, err := OpenTracker(disk.OS(), b.TempDir()+"/marks", blocktest.NewNull(1<<40), TrackerOptions{})
			if err != nil {
				b.Fatal(err)
			}
			if on {
				if err := tr.begin(planID{1}); err != nil {
					b.Fatal(err)
				}
				tr.claim(1 << 40)
			}
			sw := NewSwitch(tr)
			p := make([]byte, 4096)
			b.ReportAllocs()
			off := int64(0)
			for b.Loop() {
				if err := sw.WriteAt(bg, p, off, 0); err != nil {
					b.Fatal(err)
				}
				off = (off + 7919<<12) & (1<<32 - 1)
			}
		})
	}
}

// How does the pause grow with the threshold? The changeset behind the gate is
// all of it, in scattered grains; both sides are files of the host.
func BenchmarkPause(b *testing.B) {
	for _, changeset := range []int64{256 << 10, 4 << 20, 16 << 20} {
		b.Run(fmt.Sprintf("changeset=%dK", changeset>>10), func(b *testing.B) {
			const size = 256 << 20
			var total time.Duration
			for range b.N {
				dir := b.TempDir()
				fs := disk.OS()
				vol, err := openFile(fs, dir+"/vol", size, true)
				if err != nil {
					b.Fatal(err)
				}
				for off := int64(0); off < size; off += 1 << 20 {
					vol.WriteAt(bg, bytes.Repeat([]byte{1}, 1<<20), off, 0)
				}
				tr, err := OpenTracker(fs, dir+"/marks", vol, TrackerOptions{})
				if err != nil {
					b.Fatal(err)
				}
				sw := NewSwitch(tr)
				job, err := NewJob(Options{FS: fs, Dir: dir, Switch: sw, Tracker: tr, PauseLimit: time.Minute,
					OpenTarget: lastRound(fs, sw, tr, changeset)})
				if err != nil {
					b.Fatal(err)
				}
				state, err := job.Run(bg, Request{Target: b.TempDir() + "/target", Threshold: changeset})
				if err != nil || state != Switched {
					b.Fatal(state, err)
				}
				total += job.Stats().Pause
				sw.Close()
				tr.Close()
			}
			b.ReportMetric(float64(total.Microseconds())/float64(b.N), "pause-us")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// lastRound wraps a target so that changeset bytes are written, in scattered
// grains, at the last flush of the first round.
func lastRound(fs disk.FS, sw *Switch, tr *Tracker, changeset int64) func(string, int64, bool) (block.Device, error) {
	return func(p string, n int64, create bool) (block.Device, error) {
		d, err := openFile(fs, p, n, create)
		if err != nil {
			return nil, err
		}
		done := false
		return blocktest.Hook(d, func(_ context.Context, c blocktest.Call) error {
			if c.Op == "flush" && !done && tr.changeset() == 0 {
				done = true
				q := bytes.Repeat([]byte{2}, 4096)
				for i := int64(0); i < changeset/DefaultGrain; i++ {
					if err := sw.WriteAt(bg, q, i*(n/(changeset/DefaultGrain))&^4095, 0); err != nil {
						return err
					}
				}
			}
			return nil
		}), nil
	}
}
