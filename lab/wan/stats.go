package wan

// LaneStats counts what one direction did.
type LaneStats struct {
	Bytes    int64 // accepted from writers, each byte once
	Segments int64
	Lost     int64 // segments that needed another try
	Queued   int64 // bytes that wait before the bottleneck now
}

// Stats counts what a WAN did.
type Stats struct {
	Forward, Backward LaneStats
	Dials             int64 // connections made
	Conns             int   // connections with at least one end open
}

// Stats returns the counters.
func (w *WAN) Stats() Stats {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := Stats{Dials: w.dials, Conns: len(w.pairs)}
	for i, out := range []*LaneStats{&s.Forward, &s.Backward} {
		l := &w.lanes[i]
		*out = l.stats
		if d := l.free.Sub(l.clock.now()); d > 0 && l.Rate > 0 {
			out.Queued = int64(d.Seconds() * float64(l.Rate))
		}
	}
	return s
}
