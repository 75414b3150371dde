package linktest

import (
	"slices"
	"sort"
	"time"
)

// step is the distance of the points of a track.
const step = 10 * time.Millisecond

// track is how many bytes of a connection had arrived at what time.
type track struct {
	points []point
	last   point
	total  int64
}

type point struct {
	at time.Duration
	n  int64
}

// add says that n bytes in all have arrived at a time, which is not before the last one.
func (t *track) add(at time.Duration, n int64) {
	t.last, t.total = point{at, n}, n
	if l := len(t.points); l == 0 || at-t.points[l-1].at >= step {
		t.points = append(t.points, t.last)
	}
}

// end keeps the last point.
func (t *track) end() {
	if l := len(t.points); l > 0 && t.points[l-1] != t.last {
		t.points = append(t.points, t.last)
	}
}

// at is how many bytes had arrived at a time, on a line between the points around it.
func (t *track) at(x time.Duration) float64 {
	i := sort.Search(len(t.points), func(i int) bool { return t.points[i].at >= x })
	switch {
	case i == len(t.points):
		return float64(t.total)
	case i == 0:
		if t.points[0].at == x {
			return float64(t.points[0].n)
		}
		return 0
	}
	a, b := t.points[i-1], t.points[i]
	return float64(a.n) + float64(b.n-a.n)*float64(x-a.at)/float64(b.at-a.at)
}

// window is the part of a phase that counts: from skip after its first byte,
// at most half way, to when the first of its connections was done.
func window(tracks []track, skip, longest time.Duration) (from, to time.Duration) {
	var first, end time.Duration
	for i, t := range tracks {
		if len(t.points) == 0 {
			return 0, 0
		}
		if a := t.points[0].at; i == 0 || a < first {
			first = a
		}
		if b := t.last.at; i == 0 || b < end {
			end = b
		}
	}
	end = min(end, first+longest)
	return first + min(skip, max(end-first, 0)/2), end
}

// rate is bytes a second of all tracks in a window, 0 when it is empty.
func rate(tracks []track, from, to time.Duration) float64 {
	if to <= from {
		return 0
	}
	var n float64
	for i := range tracks {
		n += tracks[i].at(to) - tracks[i].at(from)
	}
	return n / (to - from).Seconds()
}

// summary describes round trips, in the order they were made.
func summary(all []time.Duration) RTT {
	if len(all) == 0 {
		return RTT{}
	}
	var jitter time.Duration
	for i := range all[1:] {
		jitter += (all[i+1] - all[i]).Abs()
	}
	s := slices.Sorted(slices.Values(all))
	q := func(p float64) float64 { return ms(s[min(int(p*float64(len(s))), len(s)-1)]) }
	return RTT{Samples: len(s), MinMS: ms(s[0]), MedianMS: q(0.5), P95MS: q(0.95), MaxMS: ms(s[len(s)-1]),
		JitterMS: ms(jitter) / float64(max(len(all)-1, 1))}
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
