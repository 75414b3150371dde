// Package hist counts durations in buckets, so that a quantile can be asked
// for at any time. Buckets are logarithmic with eight steps to each power of
// two, as HDR histograms have them: a quantile is right to an eighth.
// Observing is one atomic addition and allocates nothing.
package hist

import (
	"math/bits"
	"sync/atomic"
	"time"
)

const (
	subBits = 3
	sub     = 1 << subBits
	buckets = (64 - subBits) * sub
)

// H is a histogram. The zero value is empty and ready; it must not be copied.
type H struct {
	counts [buckets]atomic.Int64
	total  atomic.Int64
}

// bucket maps microseconds to a bucket: 0..7 one each, then eight per power of two.
func bucket(us uint64) int {
	if us < sub {
		return int(us)
	}
	e := bits.Len64(us) - 1 - subBits
	return (e+1)<<subBits + int(us>>e)&(sub-1)
}

// upper is the largest number of microseconds in a bucket.
func upper(b int) uint64 {
	if b < sub {
		return uint64(b)
	}
	e := b>>subBits - 1
	return (uint64(b&(sub-1)|sub)+1)<<e - 1
}

// Observe counts one duration. Negative ones count as zero.
func (h *H) Observe(d time.Duration) {
	h.counts[min(bucket(uint64(max(d, 0)/time.Microsecond)), buckets-1)].Add(1)
	h.total.Add(1)
}

// Count is how many were observed.
func (h *H) Count() int64 { return h.total.Load() }

// Quantile is the duration that a share q (0 to 1) of what was observed did
// not exceed, 0 when nothing was.
func (h *H) Quantile(q float64) time.Duration {
	n := h.total.Load()
	if n == 0 {
		return 0
	}
	want := max(int64(q*float64(n)+0.5), 1)
	var seen int64
	last := 0
	for b := range h.counts {
		if c := h.counts[b].Load(); c > 0 {
			seen += c
			last = b
			if seen >= want {
				break
			}
		}
	}
	return time.Duration(upper(last)) * time.Microsecond
}
