package sched

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
)

// TestFloorThroughAnHourOfDemand: 20 readers take all a line of 1 Mbit/s has,
// for an hour, and a window of nothing is left to background. Its floor is.
func TestFloorThroughAnHourOfDemand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const floor, size = 2, 20 << 10
		l := newLine(40*time.Millisecond, 125e3, size)
		s := New(l, func(int64, chunk.Packed) error { return nil }, Options{Floor: floor, MaxWindow: 1, DemandChunks: 16})
		defer s.Close()
		ctx, cancel := context.WithCancel(context.Background())
		var g sync.WaitGroup
		defer func() { cancel(); g.Wait() }()
		var back atomic.Int64
		for k := range int64(20) {
			g.Go(func() {
				for i := k << 32; ctx.Err() == nil; i++ {
					s.Fetch(ctx, []int64{i}, block.Demand)
				}
			})
			g.Go(func() {
				for i := k<<32 + 1<<31; ctx.Err() == nil; i++ {
					if s.Fetch(ctx, []int64{i}, block.Background) == nil {
						back.Add(1)
					}
				}
			})
		}
		last := int64(0)
		for minute := range 60 {
			for range 60 {
				time.Sleep(time.Second)
				if st := s.Stats(); st.BackgroundRequests != floor || st.BackgroundFloor != floor || st.BackgroundInFlight != floor {
					t.Fatalf("%d background requests of %d chunks under way, the floor is %d", st.BackgroundRequests, st.BackgroundInFlight, floor)
				}
			}
			now := back.Load()
			if now == last {
				t.Fatalf("no background in minute %d", minute)
			}
			last = now
		}
		// The line serves what is asked for in turn: 16 of demand, 2 of background.
		carried := int64(3600 * 125000 / size)
		if want := carried * floor / (16 + floor); last < want*9/10 || last > want*11/10 {
			t.Errorf("%d background chunks in an hour, not about %d of %d", last, want, carried)
		}
	})
}
