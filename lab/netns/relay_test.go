package netns

import (
	"testing"
	"time"
)

// TestFirstOvertakes: a marked packet leaves at once however long the queue is,
// what waits leaves later by it, and nothing is sent twice at a time.
func TestFirstOvertakes(t *testing.T) {
	const rate, size = 1_000_000, 1000
	r := newRelay(-1, -1, Config{MTU: 1500, Link: Link{Rate: rate, Queue: time.Second, First: 26}})
	r.stalled, r.stalledAt = 1, now() // the line's clock stands still
	put := func(mark byte) {
		p := make([]byte, size, 1500)
		p[0], p[1] = 0x45, mark<<2
		r.admit(p, size)
	}
	for range 100 {
		put(8)
	}
	before := r.rest.at(99).at
	for range 3 {
		put(26)
	}
	took := int64(size) * 1e9 / rate
	t0 := r.clock()
	for i := range 3 {
		if got := r.first.at(i).at - t0; got != int64(i+1)*took {
			t.Errorf("marked packet %d leaves after %v", i, time.Duration(got))
		}
	}
	if d := r.rest.at(99).at - before; d != 3*took {
		t.Errorf("the last of the others leaves %v later", time.Duration(d))
	}
	put(8)
	if d := r.rest.at(100).at - r.rest.at(99).at; d != took {
		t.Errorf("the next one leaves %v after it", time.Duration(d))
	}
	for range 2000 {
		put(8)
	}
	if r.stats.Dropped == 0 || r.rest.count > 1001 {
		t.Errorf("%d packets wait, %d were dropped", r.rest.count, r.stats.Dropped)
	}
	put(26)
	if r.first.count != 4 {
		t.Error("a marked packet was dropped because others wait")
	}
}
