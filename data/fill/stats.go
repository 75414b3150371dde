package fill

import "time"

// Stats is where a pump stands.
type Stats struct {
	State     State
	Reason    string  // why it waits
	Cursor    int64   // chunk the sweep has reached
	Brought   int64   // chunks since start
	RateBytes float64 // plain bytes a second, over the last seconds
	Limit     int64   // bytes a second on the link, 0 for none
}

// Stats returns the numbers now.
func (p *Pump) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := Stats{State: p.state, Reason: p.reason, Brought: p.brought, Limit: p.limit, Cursor: p.cursor}
	if p.paused && s.State != Stopped {
		s.State = Paused
	}
	if s.State == Running || s.State == Waiting {
		s.RateBytes = p.rate.now(time.Now())
	}
	return s
}

// ETA says how long remaining bytes take at the rate of now, -1 when that
// cannot be said.
func (s Stats) ETA(remaining int64) time.Duration {
	switch {
	case remaining == 0:
		return 0
	case s.RateBytes < 1:
		return -1
	}
	return time.Duration(float64(remaining) / s.RateBytes * float64(time.Second))
}

// rate is a moving average over a few seconds, as a ring of one-second sums.
type rate struct {
	sums  [rateSeconds]int64
	at    int64 // the second of the newest sum, Unix time
	began int64
}

const rateSeconds = 8

func (r *rate) roll(now time.Time) {
	s := now.Unix()
	if r.began == 0 {
		r.began, r.at = s, s
	}
	for ; r.at < s && s-r.at <= rateSeconds; r.at++ {
		r.sums[(r.at+1)%rateSeconds] = 0
	}
	if s > r.at {
		r.sums, r.at = [rateSeconds]int64{}, s
	}
}

func (r *rate) note(now time.Time, n int64) {
	r.roll(now)
	r.sums[r.at%rateSeconds] += n
}

// now is the average over the full seconds the ring holds, without the one that runs.
func (r *rate) now(now time.Time) float64 {
	r.roll(now)
	var sum int64
	for i, n := range r.sums {
		if int64(i) != r.at%rateSeconds {
			sum += n
		}
	}
	span := min(r.at-r.began, rateSeconds-1)
	if span <= 0 {
		return float64(r.sums[r.at%rateSeconds])
	}
	return float64(sum) / float64(span)
}
