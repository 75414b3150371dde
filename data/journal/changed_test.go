package journal

import (
	"context"
	"math/rand/v2"
	"testing"

	"forerun/block"
	"forerun/block/blocktest"
	"forerun/disk/disktest"
)

// TestChanged: the ranges behind a hold are those of the records, in order,
// over segments and openings; a hold that is not there is not known.
func TestChanged(t *testing.T) {
	const size = 1 << 20
	r := rand.New(rand.NewPCG(3, 3))
	fs, below := disktest.New(1), newMemory(size)
	opt := Options{SegmentBytes: 64 << 10, MaxBytes: 1 << 20}
	j := open(t, fs, "j", below, opt)
	var want [][2]int64
	check := func(hold string, known bool) {
		t.Helper()
		var got [][2]int64
		k, err := j.Changed(bg, hold, func(off, n int64) { got = append(got, [2]int64{off, n}) })
		if err != nil || k != known {
			t.Fatal(k, err)
		}
		if !known {
			return
		}
		if len(got) != len(want) {
			t.Fatalf("%d ranges, should be %d", len(got), len(want))
		}
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("range %d is %v, should be %v", i, got[i], want[i])
			}
		}
	}
	change := func(times int) {
		for range times {
			n := 512 * (1 + r.Int64N(20))
			off := r.Int64N(size-n) &^ 511
			var err error
			switch r.IntN(4) {
			case 0:
				err = j.Zero(bg, off, n, block.MayTrim)
			case 1:
				err = j.Trim(bg, off, n, 0)
			default:
				err = j.WriteAt(bg, make([]byte, n), off, 0)
			}
			if err != nil {
				t.Fatal(err)
			}
			want = append(want, [2]int64{off, n})
		}
	}
	check("peer", false)
	change(10)
	want = nil
	if err := j.Hold("peer", j.Position()); err != nil {
		t.Fatal(err)
	}
	check("peer", true)
	change(60) // several segments
	if err := j.Checkpoint(bg); err != nil {
		t.Fatal(err)
	}
	check("peer", true)
	if err := j.Flush(bg, 0); err != nil {
		t.Fatal(err)
	}
	j.Close()
	fs = fs.Crash()
	j = open(t, fs, "j", below, opt)
	check("peer", true)
	change(5)
	check("peer", true)
	ctx, cancel := context.WithCancel(bg)
	cancel()
	if _, err := j.Changed(ctx, "peer", func(int64, int64) {}); err != nil && block.KindOf(err) != block.KindCanceled {
		t.Fatal(err)
	}
	if err := j.Release("peer"); err != nil {
		t.Fatal(err)
	}
	check("peer", false)
}

// TestChangedWhenAHoldIsGivenUp: a hold that cost too much is not known, and
// nobody takes a part of it for all.
func TestChangedWhenAHoldIsGivenUp(t *testing.T) {
	j := open(t, disktest.New(1), "j", blocktest.NewTwin(1<<20, 512), Options{SegmentBytes: 64 << 10, MaxBytes: 256 << 10})
	if err := j.Hold("peer", j.Position()); err != nil {
		t.Fatal(err)
	}
	for i := range int64(100) {
		if err := j.WriteAt(bg, make([]byte, 8192), i%100*8192, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.Checkpoint(bg); err != nil {
		t.Fatal(err)
	}
	if known, err := j.Changed(bg, "peer", func(int64, int64) {}); known || err != nil {
		t.Fatal(known, err)
	}
}
