package wire

import (
	"testing"
	"time"
)

// disk is a source in arithmetic: n reads at once take so long each.
func playLoad(l *load, from, to time.Duration, took func(t time.Duration, atOnce int) time.Duration) (limits []int) {
	zero := time.Unix(1000, 0)
	for t := from; t < to; {
		n := l.limit()
		d := took(t, n)
		for range n {
			l.sample(zero.Add(t+d), d, 1<<20)
		}
		t += d
		limits = append(limits, l.limit())
	}
	return limits
}

func TestBackgroundMakesRoomAtABusySource(t *testing.T) {
	const floor, most = 2, 24
	idle := func(time.Duration, int) time.Duration { return 3 * time.Millisecond }
	for _, c := range []struct {
		name     string
		took     func(time.Duration, int) time.Duration
		from, to int // the limit after it
	}{
		{"a quick source", func(_ time.Duration, n int) time.Duration { return 200 * time.Microsecond * time.Duration(n) }, most, most},
		{"a far source", func(time.Duration, int) time.Duration { return 80 * time.Millisecond }, most, most},
		{"somebody else uses the disk", func(time.Duration, int) time.Duration { return 90 * time.Millisecond }, floor, floor},
		{"a disk that seeks", func(_ time.Duration, n int) time.Duration { return 5 * time.Millisecond * time.Duration(n) }, floor, 12},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLoad(floor, most)
			if c.name != "a far source" {
				playLoad(l, 0, time.Second, idle)
			}
			playLoad(l, time.Second, 10*time.Second, c.took)
			if n := l.limit(); n < c.from || n > c.to {
				t.Errorf("%d background reads, not %d to %d (%.1f times the best, %v)", n, c.from, c.to, l.slow, l.delay)
			}
			playLoad(l, 10*time.Second, 14*time.Second, idle)
			if n := l.limit(); n != most {
				t.Errorf("%d background reads four seconds after it was over", n)
			}
		})
	}
}

func TestASourceThatBecameSlowerForGood(t *testing.T) {
	l := newLoad(2, 24)
	playLoad(l, 0, time.Second, func(time.Duration, int) time.Duration { return time.Millisecond })
	playLoad(l, time.Second, 90*time.Second, func(time.Duration, int) time.Duration { return 20 * time.Millisecond })
	if n := l.limit(); n != 24 {
		t.Errorf("after a minute and a half it is still held against the source: %d reads", n)
	}
}
