package wire

import (
	"maps"
	"math"
	"math/bits"
	"time"

	"forerun/block"
)

// load bounds the background reads of one source by how busy it is. When
// reads take much longer than its best of late, whoever else uses that disk
// suffers too: background halves, and comes back one by one. Pure: the time is
// an argument. Server.mu guards it.
type load struct {
	running int // background reads under way
	floor   int
	most    int
	allowed float64

	// The best time of each size of reads: powers of two, in two spans, so that
	// a source that has become slower for good is not held against it for ever.
	best    [32][2]time.Duration
	span    int
	spanEnd time.Time
	slow    float64       // how many times the best reads take, lately
	delay   time.Duration // what they take, lately
	cut     time.Time     // when it was last halved
}

const (
	loadSpan = 30 * time.Second
	// loadSlow is how many times the best a read may take. Reads that are under
	// way together take longer, by some; a disk that has to seek between
	// others' reads takes longer by much.
	loadSlow = 4
	// loadQuick is a time that nobody minds, however quick the best was.
	loadQuick = 5 * time.Millisecond
	// loadRest is the time a cut has to show its effect.
	loadRest = 200 * time.Millisecond
)

func newLoad(floor, most int) *load {
	return &load{floor: floor, most: most, allowed: float64(most)}
}

// limit is how many background reads may be under way.
func (l *load) limit() int { return max(l.floor, int(l.allowed)) }

// sample tells how long a read of n bytes took.
func (l *load) sample(now time.Time, took time.Duration, n int) {
	if now.After(l.spanEnd) {
		l.spanEnd, l.span = now.Add(loadSpan), 1-l.span
		for i := range l.best {
			l.best[i][l.span] = 0
		}
	}
	took = max(took, time.Microsecond)
	b := &l.best[min(bits.Len(uint(n)), len(l.best)-1)]
	if b[l.span] == 0 || took < b[l.span] {
		b[l.span] = took
	}
	best := b[l.span]
	if o := b[1-l.span]; o > 0 {
		best = min(best, o)
	}
	l.slow += (float64(took)/float64(best) - l.slow) / 8
	l.delay += (took - l.delay) / 8
	if l.slow > loadSlow && l.delay > loadQuick {
		if now.Sub(l.cut) >= loadRest {
			l.cut = now
			l.allowed = math.Max(l.allowed/2, float64(l.floor))
		}
		return
	}
	l.allowed = math.Min(l.allowed+1/l.allowed, float64(l.most))
}

// loadOf finds the load of a source, which is shared by all who read it.
func (s *Server) loadOf(dev block.Device) *load {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.loads[dev]
	if l == nil {
		if len(s.loads) >= 1024 { // test clones come and go
			maps.DeleteFunc(s.loads, func(_ block.Device, l *load) bool { return l.running == 0 })
		}
		l = newLoad(s.o.BackgroundFloor, s.mostBackground())
		s.loads[dev] = l
	}
	return l
}
