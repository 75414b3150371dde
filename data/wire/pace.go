package wire

import (
	"math"
	"time"
)

// pacer says how fast a session's background may go so that the link is full
// and its queue is short. It listens to what the kernel measures anyway, the
// round trip and what was acknowledged, and is pure: no clock, no I/O.
//
//	startup → (drain → cruise)
//
// In startup it allows twice what arrives, as slow start does, until the round
// trip shows a queue; while nobody reads on demand so much that the connections'
// own slow start is what limits. In drain it lets that queue pass. In cruise the rate is
// what the path was seen to deliver, corrected in proportion to how far the
// queue is from its target: a queue above it is drained within a few round
// trips, and without one the rate grows.
//
// Demand is never held back. It is charged, so background makes room for it:
// together they do not exceed the rate.
type pacer struct {
	state   paceState
	rate    float64 // bytes a second for demand and background together
	tokens  float64 // bytes that may go now; below 0: what was sent too much
	last    time.Time
	demand  time.Time // when demand was last sent
	limited bool      // background waited for tokens since the last step

	sampled time.Time
	base    [paceSpans]time.Duration // least round trip of each span
	span    int
	spanEnd time.Time
	rtt     time.Duration // the least of the newest samples
	recent  [paceRecent]time.Duration
	seen    int
	noise   time.Duration // how far the samples are above the least of their neighbours, on average
	above   int           // samples in a row that showed a queue

	// What arrived lately: marks a window apart, and the best rates between them.
	markAt    time.Time
	markBytes int64
	best      [paceWindows]float64
	newest    int
	low       time.Duration // the least queue in this window
	full      float64       // the rate of windows in which there was a queue throughout: what the path carries
	streak    int           // windows in a row without a queue in which background was held back

	drainNext time.Time // when the queue is let run dry to see the base
	drainEnd  time.Time
}

type paceState uint8

const (
	paceStartup paceState = iota
	paceDrain
	paceCruise
)

const (
	// paceRecent is how many samples the round trip is the least of: a busy
	// machine or a radio delays some answers, a queue delays all.
	paceRecent = 6

	paceSpans = 6
	paceSpan  = 10 * time.Second
	// paceWindows is how many windows the best rate is taken of: long enough
	// that one in which little was asked for does not count as a slow path,
	// short enough to follow a path that has become slower.
	paceWindows = 20
	// paceGain is how much of a queue that is off its target is put right in a
	// round trip. The answer to a change comes a round trip late; at 0.5 it
	// settles without ringing.
	paceGain = 0.5
	// paceMin is the least rate, bytes a second: background never starves, however
	// long others keep the queue full.
	paceMin = 64 << 10
	// paceShare is the part of the best rate lately that is kept against others.
	paceShare = 1.0 / 4
	// paceBurst is how much time's worth of bytes may go at once, when the
	// sender was late.
	paceBurst = 5 * time.Millisecond
	// paceCareful is how long after a demand read the next one is reckoned with.
	paceCareful = 5 * time.Second
	// paceQuantum is the least that is written at once, bytes.
	paceQuantum = 4 << 10
	// paceStart is what a new path is tried with, bytes a second, while somebody reads.
	paceStart = 512 << 10
	// paceFree is how many times what arrives is allowed in startup while nobody
	// reads on demand. What arrives is known a round trip late and as a mean over
	// another one: a slow start that doubles in each is 6 times ahead of it.
	paceFree = 8
)

// target is the queue that is aimed at: a tenth of the round trip, between
// what a busy machine can tell from none and what nobody notices; half of that
// while somebody reads on demand, who would wait in it.
func (p *pacer) target() time.Duration {
	t := min(max(p.baseRTT()/10, 4*time.Millisecond), 20*time.Millisecond)
	if p.careful() {
		t /= 2
	}
	t += p.noise * 3 / 2          // no queue can be told from noise below that
	if c := p.capacity(); c > 0 { // a slow line shows a queue with each write
		t = max(t, time.Duration(2*paceQuantum/c*float64(time.Second)))
	}
	return t
}

// baseRTT is the least round trip of the last minute, 0 when none is known.
func (p *pacer) baseRTT() time.Duration {
	var m time.Duration
	for _, b := range p.base {
		if b > 0 && (m == 0 || b < m) {
			m = b
		}
	}
	return m
}

// delay is the queueing delay of the newest sample.
func (p *pacer) delay() time.Duration { return max(p.rtt-p.baseRTT(), 0) }

// horizon is the time in which a queue is put right.
func (p *pacer) horizon() time.Duration { return max(p.rtt, 20*time.Millisecond) }

// due says whether a sample is wanted.
func (p *pacer) due(now time.Time) bool {
	return now.Sub(p.sampled) >= min(max(p.rtt/8, 3*time.Millisecond), 20*time.Millisecond)
}

// capacity is the best rate at which bytes arrived lately.
func (p *pacer) capacity() float64 {
	var m float64
	for _, b := range p.best {
		m = max(m, b)
	}
	return m
}

// sample tells what the kernel measured: the round trip of a connection that
// was busy, and the bytes that have arrived so far on all together.
func (p *pacer) sample(now time.Time, rtt time.Duration, arrived int64) {
	p.sampled = now
	if rtt <= 0 {
		return
	}
	if now.After(p.spanEnd) {
		p.spanEnd = now.Add(paceSpan)
		p.span = (p.span + 1) % paceSpans
		p.base[p.span] = 0
	}
	p.recent[p.seen%paceRecent] = rtt
	p.seen++
	for _, r := range p.recent[:min(p.seen, paceRecent)] {
		rtt = min(rtt, r)
	}
	p.noise += (p.recent[(p.seen-1)%paceRecent] - rtt - p.noise) / 64
	p.rtt = rtt
	if b := p.base[p.span]; b == 0 || rtt < b {
		p.base[p.span] = rtt
	}
	if p.markAt.IsZero() || arrived < p.markBytes {
		p.markAt, p.markBytes = now, arrived
		return
	}
	round := false
	if d := now.Sub(p.markAt); d >= max(p.baseRTT(), 100*time.Millisecond) {
		round = true
		p.newest = (p.newest + 1) % paceWindows
		if d < 4*p.baseRTT()+time.Second {
			r := float64(arrived-p.markBytes) / d.Seconds()
			p.best[p.newest] = r
			if p.low > p.target()/4 && p.state == paceCruise {
				switch {
				case p.full == 0 || r > 1.25*p.full:
					p.full = r
				case r < p.full/1.25:
					p.full += (r - p.full) / 2
				default:
					p.full += (r - p.full) / 4
				}
			}
		} // else nothing was sent for a while; it says nothing about the path
		p.markAt, p.markBytes, p.low = now, arrived, p.delay()
	}
	p.low = min(p.low, p.delay())
	if p.delay() > p.target() {
		p.above++
	} else {
		p.above = 0
	}
	p.step(now, round)
}

// startup is how many times what arrives is allowed in startup.
func (p *pacer) startup() float64 {
	if p.careful() {
		return 2
	}
	return paceFree
}

// careful says whether somebody read on demand lately.
func (p *pacer) careful() bool { return p.sampled.Sub(p.demand) < paceCareful }

// heap is how many bytes may lie unsent in the kernel before no more is written
// to a connection: its window is shut, and what is written to it meanwhile leaves
// at once when it opens. In startup the windows are what limits.
func (p *pacer) heap() int {
	if p.state == paceStartup {
		return math.MaxInt
	}
	return max(64<<10, int(p.rate*paceBurst.Seconds()))
}

func (p *pacer) step(now time.Time, round bool) {
	c, off := p.capacity(), float64(p.target()-p.delay())/float64(p.horizon())
	switch p.state {
	case paceStartup:
		if p.above >= 2 {
			p.state, p.drainEnd = paceDrain, now.Add(2*p.rtt)
			p.step(now, round)
			return
		}
		p.rate = max(p.rate, p.startup()*c)
		return
	case paceDrain:
		if p.above > 0 && now.Before(p.drainEnd) {
			p.rate = c / 2
			return
		}
		p.state, p.rate = paceCruise, c
		p.drainNext = now.Add(paceSpan)
	case paceCruise:
		if now.After(p.drainNext) {
			p.state, p.drainEnd = paceDrain, now.Add(p.rtt+p.target())
			p.rate = c * 3 / 4
			return
		}
	}
	switch {
	case off < 0:
		p.streak = 0
		if p.full > 0 {
			c = min(c, p.full) // the best window is a little luckier than the rest
		}
		p.rate = c * max(1+paceGain*off, paceShare)
	case round:
		if p.limited {
			p.streak++
			grow := min(paceGain*off*(1+float64(p.streak)/4), 0.25)
			p.rate = max(p.rate, c*(1+grow))
		} else {
			p.streak = 0
		}
		p.limited = false
	}
	p.rate = max(p.rate, paceMin)
}

func (p *pacer) fill(now time.Time) {
	p.rate = max(p.rate, paceMin)
	if p.last.IsZero() {
		p.rate = max(p.rate, paceStart*p.startup()/2)
	}
	if d := now.Sub(p.last).Seconds(); !p.last.IsZero() && d > 0 {
		p.tokens = min(p.tokens+d*p.rate, max(p.rate*paceBurst.Seconds(), paceQuantum))
	}
	p.last = now
}

// wait says how long background has to wait, 0 for not at all.
func (p *pacer) wait(now time.Time) time.Duration {
	p.fill(now)
	if p.tokens >= 0 {
		return 0
	}
	p.limited = true
	return max(time.Duration(-p.tokens/p.rate*float64(time.Second)), 100*time.Microsecond)
}

// spend charges what was sent, of whatever class. What demand sends beyond the
// rate is remembered up to one horizon: its queue is gone by then.
func (p *pacer) spend(now time.Time, n int, demand bool) {
	p.fill(now)
	if demand {
		p.demand = now
	}
	p.tokens = max(p.tokens-float64(n), -p.rate*max(p.horizon(), 100*time.Millisecond).Seconds())
}

// floor is the longest that a background chunk of n bytes waits for demand: a
// sixteenth of the path is background's whatever demand there is.
func (p *pacer) floor(n int) time.Duration {
	return min(time.Duration(16*float64(n)/max(p.rate, paceMin)*float64(time.Second)), 5*time.Second)
}

// quantum is how much background goes in one write: little enough that demand
// finds the line soon, enough that a fast line is not slowed by waking up.
func (p *pacer) quantum() int {
	return min(max(int(p.rate/500), paceQuantum), sendBatch)
}

// pacing is a session's pacer and what feeds it. Server.mu guards it.
type pacing struct {
	pace    pacer
	paced   bool      // the kernel tells what the pacer needs to know
	chooses bool      // nobody named a congestion control
	arrived int64     // bytes acknowledged on all connections so far
	behind  time.Time // since when the connections take less than the pace allows
}

// wishAfter is how long connections must be the limit before more are wished
// for, and how long the new ones have to show what they can.
const wishAfter = 2 * time.Second

// wish says how many background connections there should be, 0 for as many as
// there are. When each has much to send, the pace allows it and there is no
// queue, then the connections' windows are what limits: the kernel's buffers
// on a long way, or losses. More connections are more windows.
func (ss *session) wish(now time.Time) int {
	n, full := 0, true
	for _, c := range ss.conns[1:] {
		if c != nil {
			n++
			full = full && (c.unsent >= MaxPayload || len(c.out) > 1)
		}
	}
	if !full || n == 0 || ss.pace.above > 0 || ss.pace.best[ss.pace.newest] > 0.75*ss.pace.rate {
		ss.behind = time.Time{}
		return 0
	}
	if ss.behind.IsZero() {
		ss.behind = now
	}
	if n >= maxBackground || now.Sub(ss.behind) < wishAfter {
		return 0
	}
	ss.behind = now
	return min(n+(n+1)/2, maxBackground)
}

// look feeds the pacer, if it is time.
func (ss *session) look(now time.Time) {
	if !ss.pace.due(now) {
		return
	}
	var rtt time.Duration
	for i, c := range ss.conns {
		if c == nil || c.tcp == nil {
			continue
		}
		t, ok := c.tcp.info()
		if !ok {
			continue
		}
		n := t.arrived - c.arrived
		c.arrived, c.unsent = t.arrived, t.unsent
		if i > 0 && ss.chooses {
			if name := c.control.look(now, t.lost, ss.pace.state == paceCruise); name != "" {
				c.tcp.congestion(name)
			}
		}
		ss.arrived += n
		if i > 0 && n > 0 && (rtt == 0 || t.rtt < rtt) {
			rtt = t.rtt
		}
	}
	ss.pace.sample(now, rtt, ss.arrived)
	if n, d := ss.wish(now), ss.conns[0]; n > 0 && d != nil {
		d.sayLocked(appendFrame(nil, header{typ: tWish}, []byte{byte(n)}))
	}
	for _, c := range ss.conns[1:] {
		if c != nil && c.tcp != nil {
			c.tcp.limit(ss.pace.rate * 1.25)
		}
	}
}

// spend charges what was sent.
func (ss *session) spend(n int, demand bool) {
	if ss.paced {
		ss.pace.spend(time.Now(), n, demand)
	}
}

// tcpState is what the kernel says about a connection.
type tcpState struct {
	rtt     time.Duration // smoothed
	arrived int64         // bytes that the peer has, also out of order
	unsent  int           // bytes in the kernel that its window does not let go
	lost    int           // packets sent again so far
}

// control chooses the congestion control of a background connection. BBR keeps
// its rate where packets are lost; every ten seconds it shuts its window for two
// hundred milliseconds to see the round trip, and what was held back meanwhile
// makes a queue afterwards. Where nothing is lost, because the pacer keeps the
// queue short, there is no need for that. It is pure; the zero value is BBR.
type control struct {
	calm  bool // cubic is in use
	since time.Time
	lost  int
	wait  time.Duration // without a loss, until it is called calm
}

const (
	calmFirst = 3 * time.Second
	calmMost  = 10 * time.Minute
)

// look takes the packets sent again so far and whether the pacer has found its
// rate, and returns the control to change to, if any.
func (k *control) look(now time.Time, lost int, cruise bool) string {
	if k.since.IsZero() || lost != k.lost || !cruise && !k.calm {
		k.since = now
	}
	worse := lost != k.lost
	k.lost = lost
	switch {
	case k.calm && worse:
		k.calm, k.wait = false, min(2*k.wait, calmMost)
		return "bbr"
	case !k.calm && now.Sub(k.since) >= max(k.wait, calmFirst):
		k.calm, k.wait = true, max(k.wait, calmFirst)
		return "cubic"
	}
	return ""
}
