package sched

import "time"

// Window says how many background bytes may be on their way. It follows the
// idea of LEDBAT (RFC 6817): the delay of an answer, above the smallest seen
// lately, is what waits in queues; grow while that is below a target, shrink
// when it is above. So the link is full and its queue is short, and a demand
// read finds the queue short. It is pure: the time is an argument.
type Window struct {
	opts  WindowOptions
	bytes float64
	start bool // slow start: double each round trip until a queue shows
	far   bool // see SetFar

	base    [baseSpans]time.Duration // smallest delay in each span
	span    int
	spanEnd time.Time
	delay   time.Duration // the least of the newest samples, above the base
	recent  [delayFilter]time.Duration
	newest  int

	probeNext, probeEnd time.Time // of looking at the link without its queue
	before              float64   // the window to go back to after it
}

// WindowOptions bound a Window, in wire bytes.
type WindowOptions struct {
	Min, Max int64
	Target   time.Duration // of queueing
}

// delayFilter is how many samples the delay is the least of (CURRENT_FILTER of
// RFC 6817): a busy processor delays some answers, a queue delays all.
const delayFilter = 8

const (
	baseSpans = 6
	baseSpan  = 10 * time.Second

	// probeEvery is how often the window steps back for two round trips, so
	// that the queue it keeps drains and the true base shows. Without it the
	// queue counts as base once every sample of the last minute had it, the
	// window grows by another target on top, and so on without end: the
	// latecomer problem, solved as LEDBAT++ does by periodic slowdowns
	// (draft-irtf-iccrg-ledbat-plus-plus, section 4.2).
	probeEvery = baseSpan
	// probeShare is the part of the link's own capacity in flight meanwhile.
	probeShare = 0.8
)

// NewWindow returns a window at its minimum.
func NewWindow(o WindowOptions) *Window {
	return &Window{opts: o, bytes: float64(o.Min), start: true}
}

// Bytes is the window now.
func (w *Window) Bytes() int64 { return int64(w.bytes) }

// Delay is the queueing delay of the newest sample.
func (w *Window) Delay() time.Duration { return w.delay }

// Base is the smallest delay of the last minute, 0 when none is known.
func (w *Window) Base() time.Duration {
	var m time.Duration
	for _, b := range w.base {
		if b > 0 && (m == 0 || b < m) {
			m = b
		}
	}
	return m
}

// SetFar says whether the queue is at the far end, where demand overtakes it and
// the link is kept short of one. Then a window is only to keep that end busy: it
// is aimed at a longer queue, on top of the time in which a connection
// mends a loss, somebody who waits on the link changes nothing, and it
// grows faster.
func (w *Window) SetFar(far bool, target time.Duration) {
	w.far, w.opts.Target = far, target
	if far {
		w.bytes = max(w.bytes, min(farStart, float64(w.opts.Max)))
	}
}

const (
	// farStart is the window to begin with, and farGrowth how many times what
	// arrives is added to it in slow start: it has to stay ahead of the far end's.
	farStart  = 1 << 20
	farGrowth = 3
)

// Sample tells of an answer: how long after its request its first byte was
// there, how many wire bytes it had, whether the window was what limited
// (growing while it is not would promise what was never tried), and whether
// somebody waits on the same link, who is owed a shorter queue.
func (w *Window) Sample(now time.Time, took time.Duration, bytes int64, limited, careful bool) {
	if now.After(w.spanEnd) {
		w.spanEnd = now.Add(baseSpan)
		w.span = (w.span + 1) % baseSpans
		w.base[w.span] = 0
	}
	took = max(took, 1)
	if b := w.base[w.span]; b == 0 || took < b {
		w.base[w.span] = took
	}
	w.recent[w.newest%delayFilter] = took
	w.newest++
	for _, d := range w.recent[:min(w.newest, delayFilter)] {
		took = min(took, d)
	}
	w.delay = took - w.Base()
	switch {
	case !w.probeEnd.IsZero():
		if now.Before(w.probeEnd) {
			return
		}
		w.probeEnd, w.probeNext = time.Time{}, now.Add(probeEvery)
		return // it tells of the probe
	case w.probeNext.IsZero():
		w.probeNext = now.Add(probeEvery)
	case now.After(w.probeNext) && !w.start:
		w.before = w.bytes
		w.probeEnd = now.Add(2 * took)
		w.bytes *= probeShare * float64(w.Base()) / float64(took)
		return
	}
	target := w.opts.Target
	growth := 1.0
	switch {
	case w.far:
		target += 2 * w.Base()
		growth = farGrowth
	case careful:
		target /= carefulShare
	}
	off := max(1-float64(w.delay)/float64(target), -1)
	if off < 0 && w.start {
		// Doubling went up to a round trip too far; go back to what the link
		// holds without a queue, rather than creep there while others wait.
		w.start = false
		w.bytes *= float64(w.Base()) / float64(took)
	}
	// Over one round trip the samples add up to one window. A step of that
	// size would overshoot by a round trip's worth of queue; the step is so
	// small that the queue moves by half its target in one.
	step := float64(bytes) * min(float64(w.opts.Target)/float64(took), 1) / 2
	if off < 0 || w.bytes >= w.before {
		w.before = 0
	}
	switch {
	case w.before > 0: // after a probe: over a few round trips, not in a burst
		w.bytes = min(w.bytes+float64(bytes)/4, w.before)
	case w.start && limited:
		w.bytes += growth * float64(bytes) // doubles in a round trip, or more
	case off < 0 || limited:
		w.bytes += off * step
	}
	w.bytes = min(max(w.bytes, float64(w.opts.Min)), float64(w.opts.Max))
}

// carefulShare is the part of the target that is left for queueing while
// demand is active.
const carefulShare = 3

// bucket is a token bucket that may be overdrawn: what was asked for is
// charged by an estimate and put right when it arrives. Pure.
type bucket struct {
	rate   float64 // bytes a second, 0 for no limit
	tokens float64
	last   time.Time
}

// setRate changes the limit; it holds at once.
func (b *bucket) setRate(now time.Time, rate int64) {
	b.fill(now)
	b.rate = float64(rate)
	b.tokens = min(b.tokens, 0)
}

func (b *bucket) fill(now time.Time) {
	if d := now.Sub(b.last).Seconds(); !b.last.IsZero() && d > 0 {
		b.tokens = min(b.tokens+d*b.rate, b.rate/20) // a burst of 50 ms
	}
	b.last = now
}

// wait says how long nothing may be asked for, 0 for not at all.
func (b *bucket) wait(now time.Time) time.Duration {
	if b.rate == 0 {
		return 0
	}
	b.fill(now)
	if b.tokens >= 0 {
		return 0
	}
	return max(time.Duration(-b.tokens/b.rate*float64(time.Second)), time.Millisecond)
}

func (b *bucket) take(now time.Time, n int64) {
	b.fill(now)
	b.tokens -= float64(n)
}
