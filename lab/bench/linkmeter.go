package bench

import (
	"sync"
	"time"

	"forerun/lab/netns"
)

// bulk is how many bytes a transfer has before it counts as begun, and how
// many short of the last it counts as over: greetings before and pings after
// it are no part of it.
const bulk = 64 << 10

// meter writes down how many bytes the line took, and when.
type meter struct {
	stop chan struct{}
	wg   sync.WaitGroup

	mu      sync.Mutex
	samples []sample
}

type sample struct {
	at           time.Duration
	target, back int64
}

// watch begins to measure the line.
func watch(l *netns.Line) *meter {
	m := &meter{stop: make(chan struct{})}
	start := time.Now()
	look := func() {
		s := l.Stats()
		m.mu.Lock()
		m.samples = append(m.samples, sample{time.Since(start), s.ToTarget.Bytes, s.ToSource.Bytes})
		m.mu.Unlock()
	}
	look()
	m.wg.Go(func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-m.stop:
				look()
				return
			case <-tick.C:
				look()
			}
		}
	})
	return m
}

// end stops the meter and says what crossed.
func (m *meter) end() crossing {
	close(m.stop)
	m.wg.Wait()
	return m.crossed()
}

// crossed is what crossed so far.
func (m *meter) crossed() crossing {
	m.mu.Lock()
	defer m.mu.Unlock()
	return crossed(m.samples)
}

// crossing is one transfer over the line, as the line saw it.
type crossing struct {
	target, back int64   // all bytes to the target and to the source
	bulk         int64   // those to the target between its beginning and its end
	seconds      float64 // between those two
	first, last  float64 // when they were, in seconds after the meter's start
}

func (c crossing) rate() float64 { return ratio(float64(c.bulk), c.seconds) }

func crossed(s []sample) (c crossing) {
	if len(s) == 0 {
		return c
	}
	from, to := s[0].target, s[len(s)-1].target
	c.target, c.back = to-from, s[len(s)-1].back-s[0].back
	if c.target <= 2*bulk {
		return c
	}
	i, k := 0, len(s)-1
	for s[i].target < from+bulk {
		i++
	}
	for s[k-1].target >= to-bulk {
		k--
	}
	// The line took the first bytes of a sample at some time since the one before.
	i = max(i-1, 0)
	c.bulk = s[k].target - s[i].target
	c.first, c.last = s[i].at.Seconds(), s[k].at.Seconds()
	c.seconds = c.last - c.first
	return c
}
