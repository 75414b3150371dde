package wan

import (
	"math/rand/v2"
	"time"
)

// Link says how one direction of a line behaves. The zero Link is a perfect one.
type Link struct {
	// Delay is the time a byte travels, one way.
	Delay time.Duration
	// Rate is the bottleneck in bytes per second, 0 for none.
	Rate int64
	// Loss is the share of segments that need another try, 0 to below 1. A
	// lost segment arrives one round trip later, is sent twice, and holds
	// back what follows it on its connection.
	Loss float64
	// Queue is how many bytes wait before the bottleneck, shared by all
	// connections of the direction. 0 is 100 ms of Rate, at least 64 KiB.
	Queue int
	// Jitter is added to Delay per segment, uniformly from 0 to Jitter.
	Jitter time.Duration
	// Window is how many bytes one connection may have sent that its reader
	// has not taken. 0 is twice what is needed to fill the line, at least 4 MiB.
	Window int
	// Seed makes loss and jitter repeatable.
	Seed uint64
}

func (l Link) queue() int {
	if l.Queue > 0 {
		return l.Queue
	}
	return max(64<<10, int(l.Rate/10))
}

func (l Link) window() int {
	if l.Window > 0 {
		return l.Window
	}
	bdp := float64(l.Rate) * (2 * l.Delay).Seconds()
	return max(4<<20, 2*int(bdp)+l.queue())
}

// segment is the largest piece that enters the queue at once: one packet on
// slow lines, about 100 microseconds of line on fast ones.
func (l Link) segment() int {
	if l.Rate == 0 {
		return 64 << 10
	}
	return int(min(max(l.Rate/10000, 1448), 64<<10))
}

// clock is the time of one direction. It stands still while the direction is
// halted, so that everything on the way keeps its place.
type clock struct {
	halts  int // reasons to stand still
	since  time.Time
	behind time.Duration // how much line time is behind real time
}

func (c *clock) now() time.Time {
	if c.halts > 0 {
		return c.since.Add(-c.behind)
	}
	return time.Now().Add(-c.behind)
}

// real says when line time reaches t, and false when nobody knows.
func (c *clock) real(t time.Time) (time.Time, bool) {
	return t.Add(c.behind), c.halts == 0
}

func (c *clock) halt() {
	if c.halts == 0 {
		c.since = time.Now()
	}
	c.halts++
}

func (c *clock) resume() {
	c.halts--
	if c.halts == 0 {
		c.behind += time.Since(c.since)
	}
}

// lane is one direction of the line: its clock, its bottleneck, its waiters.
type lane struct {
	Link
	clock       clock
	free        time.Time // line time at which the bottleneck has sent all it was given
	rng         *rand.Rand
	line        []*flow // flows that wait to enter the queue, first come first served
	partitioned bool
	stats       LaneStats
}

func (l *lane) set(n Link) {
	if l.Rate > 0 && n.Rate > 0 && l.Rate != n.Rate {
		if now := l.clock.now(); l.free.After(now) {
			left := float64(l.free.Sub(now)) * float64(l.Rate) / float64(n.Rate)
			l.free = now.Add(time.Duration(left))
		}
	}
	if l.rng == nil || n.Seed != l.Seed {
		l.rng = rand.New(rand.NewPCG(n.Seed, 0x77616e))
	}
	l.Link = n
}

func (l *lane) serial(n int) time.Duration {
	if l.Rate == 0 {
		return 0
	}
	return time.Duration(float64(n) / float64(l.Rate) * float64(time.Second))
}

// room says when n more bytes fit into the queue, in line time.
func (l *lane) room(n int) time.Time {
	if l.Rate == 0 {
		return time.Time{}
	}
	n = min(n, l.queue())
	return l.free.Add(-l.serial(l.queue() - n))
}

// send puts n bytes into the queue now and says when they arrive.
func (l *lane) send(n int) time.Time {
	now := l.clock.now()
	if l.free.Before(now) {
		l.free = now
	}
	l.free = l.free.Add(l.serial(n))
	at := l.free.Add(l.Delay)
	if l.Jitter > 0 {
		at = at.Add(time.Duration(l.rng.Int64N(int64(l.Jitter))))
	}
	for l.Loss > 0 && l.rng.Float64() < l.Loss {
		l.free = l.free.Add(l.serial(n))
		at = at.Add(max(2*l.Delay, time.Millisecond))
		l.stats.Lost++
	}
	l.stats.Bytes += int64(n)
	l.stats.Segments++
	return at
}
