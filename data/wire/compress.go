package wire

import (
	"math"
	"runtime"
	"sync/atomic"
	"time"

	"forerun/internal/chunk"
)

// chooser finds the level at which a session's chunks are packed. What limits a
// session decides: while the link does, time is spent to make chunks smaller;
// while the processors do, bytes are. It is a plain value without a clock or
// a goroutine, but for the two results, which are read without a lock.
//
// Each background chunk that was packed is a sample: how long it took, what
// it became, and whether as much was ready to be sent as was not. How much of the time
// all places for packing were taken tells whether packing is what limits:
// chunks that wait for a place or come when nothing else is ready tell little,
// since they are asked for, and read, by the dozen. After a quarter of a second
// it decides:
//
//   - The machine has no processor to spare, whoever keeps them busy: one level
//     down, though not below zstd's fastest.
//   - The places for packing are taken nearly all the time and the link is not
//     full, or packing takes more than cores processors, or the machine has no
//     processor to spare while chunks wait to be packed for a link that is not full:
//     one level down. The level that was left is not tried again for a while,
//     longer each time.
//   - Else, if the link is full, and the next level would keep fewer than cores
//     busy at the rate at which packed bytes leave now: one level up.
//
// A demand read takes the level with the least time to pack and cross the link
// together, once the rate of the link is known.
type chooser struct {
	level  atomic.Uint32 // of background
	demand atomic.Uint32
	cores  float64
	fixed  bool // it does not choose

	began  time.Time // of the samples
	n      int
	held   time.Duration // at began; see sample
	behind int           // the link was
	queue  int           // others were waiting to be read
	plain  int64
	packed int64
	took   time.Duration

	rest [chunk.Tight + 1]time.Duration // how long a level is left alone once it was too much
	till [chunk.Tight + 1]time.Time
	rose time.Time // when it came to this level from below
	rate float64   // packed bytes a second of the link, 0 while it was never what limits

	// Means over the time that decisions look back over.
	seen             int     // decisions
	busy, taken, out float64 // processors kept busy; share of the time places were taken; packed bytes a second
	full             float64 // share of the chunks that found the link behind
	wanted           float64 // share of those that left others to be read and packed
	spare            float64 // processors of the machine that had nothing to do

	// idle says how many processors had nothing to do since it was asked last;
	// nil: nobody can tell.
	idle func() (processors float64, ok bool)
}

// packCores is how many processors packing for one session may keep busy on
// a machine that has so many: most of them, and not all, for it has other work.
func packCores(processors int) float64 { return max(0.9, 0.6*float64(processors)) }

// sample is one background chunk that was packed.
type sample struct {
	plain, packed int
	took          time.Duration // of a processor, signing and packing
	held          time.Duration // that places for packing were taken, of all sessions and since ever, a place
	behind        bool          // what is ready waits for the link
	queue         bool          // others wait to be read and packed
}

const (
	chooseEvery = 250 * time.Millisecond
	// chooseMost bounds samples that lie too far apart to say anything of a rate.
	chooseMost = 4 * time.Second
	// mostTaken is the share of the time from which on packing is what limits.
	mostTaken = 0.85
	// leastSpare is how many processors have nothing to do, at the least, on a
	// machine where there is time for harder packing.
	leastSpare = 0.04
	// chooseOver is the time that decisions look back over.
	chooseOver = time.Second
	restFirst  = 2 * time.Second
	restMost   = 2 * time.Minute
)

// levelCost and levelSize are how the levels compare, by internal/chunk's
// measurements: seconds for some bytes, signature included, and bytes made of
// them. Only quotients of them are used.
var (
	levelCost = [...]float64{chunk.Plain: 1, chunk.Quick: 2.3, chunk.Fast: 5.5, chunk.Good: 8, chunk.Tight: 14}
	levelSize = [...]float64{chunk.Plain: 1, chunk.Quick: .49, chunk.Fast: .39, chunk.Good: .357, chunk.Tight: .337}
)

// firstLevel is where a session begins.
const firstLevel = chunk.Fast

// newChooser returns a chooser, or with a codec of S2 or Zstd one that always
// takes that.
func newChooser(fixed chunk.Codec, off bool) *chooser {
	c := &chooser{cores: packCores(runtime.GOMAXPROCS(0)), idle: idleProcessors()}
	level := firstLevel
	if fixed != chunk.Raw || off {
		level, c.fixed = chunk.LevelOf(fixed), true
	}
	c.level.Store(uint32(level))
	c.demand.Store(uint32(level))
	return c
}

// at is the level of a class: 0 demand, 1 background.
func (c *chooser) at(class int) chunk.Level {
	if class == 0 {
		return chunk.Level(c.demand.Load())
	}
	return chunk.Level(c.level.Load())
}

// add takes a sample, and decides if it is time to.
func (c *chooser) add(now time.Time, s sample) {
	if c.fixed {
		return
	}
	if c.n > 0 && now.Sub(c.began) > chooseMost {
		c.reset()
	}
	if c.n == 0 {
		// The first one only begins the time that the others are counted in.
		c.began, c.held, c.n = now, s.held, 1
		return
	}
	c.n++
	c.plain += int64(s.plain)
	c.packed += int64(s.packed)
	c.took += s.took
	if s.behind {
		c.behind++
	}
	if s.queue {
		c.queue++
	}
	if d := now.Sub(c.began); d >= chooseEvery {
		c.decide(now, (s.held-c.held).Seconds()/d.Seconds())
		c.reset()
	}
}

func (c *chooser) reset() {
	c.n, c.behind, c.queue, c.plain, c.packed, c.took = 0, 0, 0, 0, 0, 0
}

// decide takes the share of the time that places for packing were taken.
func (c *chooser) decide(now time.Time, taken float64) {
	level, n := c.at(1), c.n-1
	seconds := now.Sub(c.began).Seconds()
	// Chunks come in bursts, as budgets are used up and filled again: what a
	// quarter of a second shows is no more than a part of one.
	weight := 1 - math.Exp(-seconds/chooseOver.Seconds())
	if c.seen == 0 {
		weight = 1
	}
	c.seen++
	mean := func(m *float64, x float64) float64 { *m += weight * (x - *m); return *m }
	busy := mean(&c.busy, c.took.Seconds()/seconds)
	taken = mean(&c.taken, taken)
	rate := mean(&c.out, float64(c.packed)/seconds)
	// Where most chunks find so much ready the link is full, however long they took.
	full := mean(&c.full, float64(c.behind)/float64(max(n, 1))) > 0.5
	if full {
		c.rate = rate
	}
	wanted := mean(&c.wanted, float64(c.queue)/float64(max(n, 1))) > 0.5
	short, room := false, c.cores // of what the whole machine has
	if c.idle != nil {
		if n, ok := c.idle(); ok {
			room = mean(&c.spare, n)
			short = room < leastSpare
		}
	}
	scale := func(by float64) { c.busy *= by; c.taken = min(c.taken*by, 1) }
	c.demand.Store(uint32(c.quickest(level)))
	switch {
	case level > chunk.Quick && (taken > mostTaken && !full || busy > c.cores*1.2 || short && (level > chunk.Fast || wanted && !full)):
		if now.Sub(c.rose) > restMost {
			c.rest[level] = 0 // it was right for long
		}
		c.rest[level] = min(max(2*c.rest[level], restFirst), restMost)
		c.till[level] = now.Add(c.rest[level])
		level--
		scale(levelCost[level] / levelCost[level+1])
	case level < chunk.Tight && !now.Before(c.till[level+1]):
		// The same packed bytes a second, of more plain ones, each at a higher cost.
		more := (levelSize[level] / levelSize[level+1]) * (levelCost[level+1] / levelCost[level])
		if full && busy*more <= c.cores && busy*(more-1) <= room {
			level++
			c.rose = now
			scale(more)
		}
	}
	c.level.Store(uint32(level))
}

// quickest is the level at which a demand read is over soonest, Tight aside.
// The samples, made at level, say how fast this machine is.
func (c *chooser) quickest(level chunk.Level) chunk.Level {
	if c.rate == 0 || c.plain == 0 {
		return firstLevel
	}
	best, least := firstLevel, 0.0
	for l := chunk.Quick; l < chunk.Tight; l++ {
		cost := c.took.Seconds() / float64(c.plain) * levelCost[l] / levelCost[level]
		size := float64(c.packed) / float64(c.plain) * levelSize[l] / levelSize[level]
		if t := cost + size/c.rate; least == 0 || t < least {
			best, least = l, t
		}
	}
	return best
}

// stopwatch measures what a goroutine takes of a processor. Where that cannot
// be told, or it was moved to another thread meanwhile, the time that passed counts.
type stopwatch struct {
	cpu  time.Duration
	wall time.Time
}

func startWatch() stopwatch { return stopwatch{threadTime(), time.Now()} }

func (w stopwatch) stop() time.Duration {
	wall, cpu := time.Since(w.wall), threadTime()-w.cpu
	if cpu <= 0 || cpu > wall {
		return wall
	}
	return cpu
}
