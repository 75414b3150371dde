package wire

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// pipe is a path in arithmetic: a bottleneck with a queue, a round trip, and
// somebody else's traffic; the pacer is played against it step by step.
type pipe struct {
	rate  func(t time.Duration) float64 // bytes a second
	rtt   func(t time.Duration) time.Duration
	queue time.Duration // of the bottleneck, at its first rate; more is dropped
	other func(t time.Duration, queued float64) float64
	// stall says from when to when nothing is heard of the far end.
	stall  func(t time.Duration) time.Duration
	jitter func() time.Duration
	// background is at most so fast: the source, or the receiver.
	most func(t time.Duration) float64
	read time.Duration // mean time between demand reads of 64 KiB, 0: none
	seed uint64
}

type played struct {
	use     float64         // of the bottleneck by us
	mine    float64         // bytes of background a second
	late    []time.Duration // how much longer than an empty line demand took
	queue   []time.Duration
	dropped float64
	rate    float64
	longest time.Duration // the queue ever
}

func (r played) q(f float64) time.Duration    { return quantile(r.queue, f) }
func (r played) wait(f float64) time.Duration { return quantile(r.late, f) }

func quantile(l []time.Duration, f float64) time.Duration {
	if len(l) == 0 {
		return 0
	}
	s := slices.Clone(l)
	slices.Sort(s)
	return s[min(len(s)-1, int(f*float64(len(s))))]
}

// play runs for d, and counts from warm on.
func (w pipe) play(p *pacer, warm, d time.Duration) (r played) {
	const dt = 500 * time.Microsecond
	type ack struct {
		at  time.Duration
		n   float64
		rtt time.Duration
	}
	rng := rand.New(rand.NewPCG(w.seed, 7))
	zero := time.Unix(1000, 0)
	var acks []ack
	var ours, others float64 // bytes in the queue
	var arrived, served, bg, capacity float64
	srtt := w.rtt(0)
	nextRead := time.Duration(-1)
	if w.read > 0 {
		nextRead = time.Duration(rng.ExpFloat64() * float64(w.read))
	}
	limit := w.queue.Seconds() * w.rate(0)
	var flying float64 // not acknowledged
	put := func(n float64) {
		if over := ours + others + n - limit; over > 0 {
			over = min(over, n)
			n -= over
			r.dropped += over
		}
		ours += n
		flying += n
	}
	var credit float64
	// The connections' own window: a slow start to three times what the path
	// holds, as BBR's is.
	window := 29e3
	most := max(3*w.rate(0)*w.rtt(0).Seconds(), 4<<20)
	for t := time.Duration(0); t < d; t += dt {
		now := zero.Add(t)
		c := w.rate(t)
		for len(acks) > 0 && acks[0].at <= t {
			a := acks[0]
			acks = acks[1:]
			arrived += a.n
			flying -= a.n
			window = min(window+a.n, most)
			for k := a.n; k > 0; k -= 2896 {
				srtt += (a.rtt - srtt) / 8
			}
		}
		if w.other != nil {
			n := w.other(t, ours+others) * dt.Seconds()
			others += max(0, min(n, limit-ours-others))
		}
		if nextRead >= 0 && t >= nextRead {
			wait := time.Duration((ours + others) / c * 1e9)
			if t >= warm {
				r.late = append(r.late, wait)
			}
			put(64 << 10)
			p.spend(now, 64<<10, true)
			nextRead = t + w.rtt(t) + wait + time.Duration(65536/c*1e9) + time.Duration(rng.ExpFloat64()*float64(w.read))
		}
		if w.most != nil {
			credit = min(credit+w.most(t)*dt.Seconds(), 64<<10)
		}
		for k := 0; k < 1000; k++ {
			if p.due(now) {
				p.sample(now, srtt, int64(arrived))
			}
			if w.most != nil && credit < 0 || flying > window || p.wait(now) > 0 {
				break
			}
			n := p.quantum()
			put(float64(n))
			p.spend(now, n, false)
			credit -= float64(n)
			if t >= warm {
				bg += float64(n)
			}
		}
		depth := time.Duration((ours + others) / c * 1e9)
		r.longest = max(r.longest, depth)
		if t >= warm {
			r.queue = append(r.queue, depth)
			capacity += c * dt.Seconds()
		}
		out := min(c*dt.Seconds(), ours+others)
		if out > 0 {
			mine := out * ours / (ours + others)
			ours -= mine
			others -= out - mine
			if t >= warm {
				served += mine
			}
			at := t + w.rtt(t)
			if w.stall != nil {
				at = max(at, w.stall(t+w.rtt(t)))
			}
			if w.jitter != nil {
				at += w.jitter()
			}
			if k := len(acks); k > 0 {
				at = max(at, acks[k-1].at)
			}
			if mine > 0 {
				acks = append(acks, ack{at, mine, at - t + depth})
			}
		}
	}
	span := (d - warm).Seconds()
	r.use, r.mine, r.rate = served/capacity, bg/span, p.rate
	return r
}

func fixed[T any](v T) func(time.Duration) T { return func(time.Duration) T { return v } }

// sleepy is a machine or a radio that hears nothing for long, now and then.
func sleepy(every, long time.Duration) func(time.Duration) time.Duration {
	return func(t time.Duration) time.Duration {
		if in := t % every; in < long {
			return t - in + long
		}
		return t
	}
}

func TestPacerFillsTheLinkAndKeepsItsQueueShort(t *testing.T) {
	for _, mbit := range []float64{5, 100, 1000} {
		for _, rtt := range []time.Duration{time.Millisecond, 40 * time.Millisecond, 200 * time.Millisecond} {
			for _, read := range []time.Duration{0, 20 * time.Millisecond} {
				for _, weather := range []string{"clear", "jitter", "stalls"} {
					w := pipe{rate: fixed(mbit * 125e3), rtt: fixed(rtt), queue: time.Second, read: read}
					use, wait := 0.98, max(rtt/5, 5*time.Millisecond)
					switch weather {
					case "jitter":
						rng := rand.New(rand.NewPCG(1, 1))
						w.jitter = func() time.Duration { return time.Duration(rng.ExpFloat64() * 2e6) }
						use, wait = 0.7, wait+10*time.Millisecond
					case "stalls":
						w.stall = sleepy(173*time.Millisecond, 20*time.Millisecond)
						use, wait = 0.95, wait+20*time.Millisecond
					}
					if mbit == 5 { // a write is 6.5 ms there, a chunk read on demand 105 ms
						use, wait = min(use, 0.85), wait+70*time.Millisecond
					}
					var p pacer
					r := w.play(&p, 5*time.Second, 25*time.Second)
					text := []any{mbit, rtt, read, weather, r.use, r.q(.5), r.q(.99), r.longest, r.wait(.5), r.wait(.99)}
					t.Logf("%v Mbit/s, %v, reads every %v, %s: use %.3f, queue p50 %v p99 %v longest %v, demand late p50 %v p99 %v", text...)
					if r.use < use {
						t.Errorf("%v Mbit/s, %v, reads every %v, %s: only %.3f of the link is used", text[:5]...)
					}
					if r.wait(.99) > wait {
						t.Errorf("%v Mbit/s, %v, reads every %v, %s: demand waits %v at p99", mbit, rtt, read, weather, r.wait(.99))
					}
					chunk := time.Duration(64 << 10 / (mbit * 125e3) * 1e9) // that is read on demand
					if most := 2*rtt + 100*time.Millisecond + chunk; r.longest > most {
						t.Errorf("%v Mbit/s, %v, reads every %v, %s: the start fills the queue with %v", mbit, rtt, read, weather, r.longest)
					}
				}
			}
		}
	}
}

func TestPacerFollowsThePath(t *testing.T) {
	// 100, then 20, then 100 Mbit/s, and a round trip that grows from 40 to 90 ms.
	rate := func(t time.Duration) float64 {
		if t > 20*time.Second && t < 40*time.Second {
			return 20 * 125e3
		}
		return 100 * 125e3
	}
	var p pacer
	r := pipe{rate: rate, rtt: fixed(40 * time.Millisecond), queue: 2 * time.Second}.play(&p, 5*time.Second, 60*time.Second)
	t.Logf("changing rate: use %.3f, queue p50 %v p99 %v", r.use, r.q(.5), r.q(.99))
	if r.use < 0.9 || r.q(.5) > 15*time.Millisecond {
		t.Errorf("use %.3f, queue %v", r.use, r.q(.5))
	}
	rtt := func(t time.Duration) time.Duration {
		if t > 20*time.Second {
			return 90 * time.Millisecond
		}
		return 40 * time.Millisecond
	}
	p = pacer{}
	r = pipe{rate: fixed(100 * 125e3), rtt: rtt, queue: time.Second}.play(&p, 100*time.Second, 130*time.Second)
	t.Logf("longer way: use %.3f, queue p50 %v p99 %v", r.use, r.q(.5), r.q(.99))
	if r.use < 0.9 {
		t.Errorf("a minute after the way became longer only %.3f of the link is used", r.use)
	}
}

func TestPacerBesideOthers(t *testing.T) {
	w := pipe{rate: fixed(100 * 125e3), rtt: fixed(40 * time.Millisecond), queue: time.Second}
	w.other = func(time.Duration, float64) float64 { return 60 * 125e3 }
	var p pacer
	r := w.play(&p, 10*time.Second, 60*time.Second)
	t.Logf("beside 60 Mbit/s: use %.3f queue p50 %v p99 %v", r.use, r.q(.5), r.q(.99))
	if r.use < 0.3 || r.q(.5) > 30*time.Millisecond {
		t.Errorf("beside 60 Mbit/s of 100: use %.3f, queue p50 %v", r.use, r.q(.5))
	}
	// One who keeps the queue half full whatever we do: we get little, and never nothing.
	w.other = func(_ time.Duration, queued float64) float64 {
		if queued > 0.5*100*125e3 {
			return 0
		}
		return 1000 * 125e3
	}
	p = pacer{}
	r = w.play(&p, 10*time.Second, 120*time.Second)
	t.Logf("beside greed: use %.4f, %.0f bytes/s", r.use, r.mine)
	if r.mine < paceMin {
		t.Errorf("beside greed the background gets %.0f bytes/s, its floor is %d", r.mine, paceMin)
	}
}

// TestPacerIsNotTheLimit: a source that is slower than the link goes at its own
// pace, and the rate that the pacer allows does not shrink to it.
func TestPacerIsNotTheLimit(t *testing.T) {
	w := pipe{rate: fixed(1000 * 125e3), rtt: fixed(40 * time.Millisecond), queue: time.Second}
	w.most = func(t time.Duration) float64 {
		if t < 60*time.Second {
			return 5e6
		}
		return 1e9
	}
	var p pacer
	if r := w.play(&p, 5*time.Second, 60*time.Second); r.mine < 4.9e6 {
		t.Errorf("a source of 5 MB/s is held to %.0f bytes/s", r.mine)
	}
	p = pacer{}
	if r := w.play(&p, 62*time.Second, 70*time.Second); r.use < 0.9 {
		t.Errorf("two seconds after the source became fast only %.3f of the link is used", r.use)
	}
}

func TestControlFollowsLosses(t *testing.T) {
	var k control
	now := time.Unix(1000, 0)
	run := func(d time.Duration, cruise bool, every time.Duration) (said []string) {
		lost := k.lost
		for end, next := now.Add(d), now.Add(every); now.Before(end); now = now.Add(10 * time.Millisecond) {
			if every > 0 && !now.Before(next) {
				lost++
				next = now.Add(every)
			}
			if s := k.look(now, lost, cruise); s != "" {
				said = append(said, s)
			}
		}
		return said
	}
	for i, x := range []struct {
		d      time.Duration
		cruise bool
		every  time.Duration // a loss, 0: none
		want   []string
	}{
		{20 * time.Second, false, 0, nil},                                               // the rate is not known yet
		{time.Minute, true, time.Second, nil},                                           // losses all the time
		{20 * time.Second, true, 0, []string{"cubic"}},                                  // none any more
		{time.Minute, false, 0, nil},                                                    // a drain changes nothing
		{time.Minute, true, time.Second, []string{"bbr"}},                               // they come back
		{5 * time.Second, true, 0, nil},                                                 // and it takes longer to believe
		{5 * time.Second, true, 0, []string{"cubic"}},                                   //
		{time.Hour, true, 7 * time.Second, []string{"bbr"}},                             // seldom, but more often than it is believed
		{30 * time.Minute, true, 0, []string{"cubic"}},                                  //
		{time.Hour, true, time.Minute, []string{"bbr", "cubic", "bbr", "cubic", "bbr"}}, // the wait grows until it is not worth it
	} {
		if got := run(x.d, x.cruise, x.every); !slices.Equal(got, x.want) {
			t.Errorf("step %d: %v, want %v", i, got, x.want)
		}
	}
}
