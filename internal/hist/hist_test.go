package hist

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

func TestBucketsAreOrderedAndTight(t *testing.T) {
	prev := -1
	for us := uint64(0); us < 1<<20; us += 1 + us/64 {
		b := bucket(us)
		if b < prev || us > upper(b) || (us >= sub && upper(b)-us > us/sub+1) {
			t.Fatalf("%d us: bucket %d after %d, upper %d", us, b, prev, upper(b))
		}
		prev = b
	}
}

func TestQuantilesAgainstSorting(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	var h H
	var all []time.Duration
	for range 10000 {
		d := time.Duration(r.ExpFloat64() * float64(20*time.Millisecond))
		h.Observe(d)
		all = append(all, d)
	}
	slices.Sort(all)
	for _, q := range []float64{0.01, 0.5, 0.9, 0.99, 1} {
		got, want := h.Quantile(q), all[max(int(q*float64(len(all)))-1, 0)]
		if got < want-want/8-2*time.Microsecond || got > want+want/6+2*time.Microsecond {
			t.Errorf("q %v: %v, sorted %v", q, got, want)
		}
	}
	if (&H{}).Quantile(0.5) != 0 {
		t.Error("an empty histogram has a median")
	}
	if n := testing.AllocsPerRun(100, func() { h.Observe(time.Second) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
