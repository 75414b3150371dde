package wire

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
	"forerun/lab/wan"
)

// TestBackgroundReadsUnderSaturatingDemand: whoever asks for more than the
// source gives leaves background its floor, and no more.
func TestBackgroundReadsUnderSaturatingDemand(t *testing.T) {
	src := newSource(64<<20, 5, "disk-1")
	src.latency = 10 * time.Millisecond
	inWorld(t, wan.Link{Delay: time.Millisecond}, src, func(w *world) {
		w.opts.Workers, w.opts.BackgroundFloor, w.opts.NoCompression = 4, 1, true
		w.serve()
		c := w.dial()
		defer c.Close()
		r := must(c.Open(w.ctx, "disk"))
		ctx, cancel := context.WithCancel(w.ctx)
		var g sync.WaitGroup
		var demand, back atomic.Int64
		for k := range 64 {
			g.Go(func() {
				for i := int64(k); ctx.Err() == nil; i = (i + 97) % 512 {
					r.Fetch(ctx, []int64{i}, block.Demand, func(_ int64, _ chunk.Packed, err error) {
						if err == nil {
							demand.Add(1)
						}
					})
				}
			})
		}
		time.Sleep(time.Second)
		begin := demand.Load()
		g.Go(func() {
			for i := int64(512); ctx.Err() == nil; i = 512 + (i-511)%512 {
				r.Fetch(ctx, []int64{i}, block.Background, func(_ int64, _ chunk.Packed, err error) {
					if err == nil {
						back.Add(1)
					}
				})
			}
		})
		const d = 4 * time.Second
		most := 0
		for range int(d / (50 * time.Millisecond)) {
			time.Sleep(50 * time.Millisecond)
			most = max(most, w.server.Stats().BackgroundReads)
		}
		demands, backs := demand.Load()-begin, back.Load()
		cancel()
		g.Wait()
		t.Logf("%d demand and %d background chunks in %v", demands, backs, d)
		// A chunk each 50 ms is the floor of the sender.
		if backs < int64(d/(75*time.Millisecond)) {
			t.Errorf("%d background chunks in %v, the floor is one in 50 ms", backs, d)
		}
		if backs > demands/4 || most > 1 {
			t.Errorf("background got %d chunks beside %d of demand, and %d of 4 reads", backs, demands, most)
		}
	})
}
