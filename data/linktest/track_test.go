package linktest

import (
	"math"
	"testing"
	"time"
)

// TestWindow: a slow beginning and a slow end are outside, and between points
// bytes came evenly.
func TestWindow(t *testing.T) {
	var a, b track
	for i := range 401 { // 4 s, 1000 bytes a second after the first one
		at := time.Duration(i) * step
		a.add(time.Second+at, max(0, int64(i-100))*10)
		b.add(2*time.Second+at, int64(i)*20)
	}
	a.end()
	b.end()
	from, to := window([]track{a, b}, 2*time.Second, time.Minute)
	if from != 3*time.Second || to != 5*time.Second {
		t.Errorf("%v to %v", from, to)
	}
	if r := rate([]track{a, b}, from, to); math.Abs(r-3000) > 1 {
		t.Errorf("rate %v", r)
	}
	if from, to = window([]track{a}, time.Minute, 3*time.Second); from != 2500*time.Millisecond || to != 4*time.Second {
		t.Errorf("%v to %v: the skip takes at most half", from, to)
	}
	if from, to = window([]track{a, {}}, 0, time.Minute); from != to {
		t.Error("a connection without a byte has a window")
	}
	var c track
	c.add(time.Second, 100)
	c.add(2*time.Second, 300)
	c.end()
	for at, want := range map[time.Duration]float64{0: 0, time.Second: 100, 1500 * time.Millisecond: 200, 3 * time.Second: 300} {
		if got := c.at(at); got != want {
			t.Errorf("%v: %v, want %v", at, got, want)
		}
	}
	if r := rate([]track{c}, time.Second, time.Second); r != 0 {
		t.Error(r)
	}
}

func TestSummary(t *testing.T) {
	r := summary([]time.Duration{3e6, 1e6, 2e6})
	if want := (RTT{3, 1, 2, 3, 3, 1.5}); r != want {
		t.Errorf("%+v", r)
	}
	if r := summary(nil); r != (RTT{}) {
		t.Errorf("%+v", r)
	}
}
