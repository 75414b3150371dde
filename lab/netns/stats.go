package netns

// LaneStats counts what one direction did. Bytes are those of IP packets, as
// a provider would bill them.
type LaneStats struct {
	Packets, Bytes int64 // accepted into the queue: they crossed, or are on their way
	Dropped        int64 // packets that found the queue full
	Lost           int64 // packets lost by Loss or a partition
	Queued         int64 // bytes that wait before the bottleneck now
}

// Stats counts what a line did.
type Stats struct {
	ToTarget, ToSource LaneStats
}

// Stats returns the counters.
func (l *Line) Stats() Stats {
	return Stats{ToTarget: l.lanes[0].read(), ToSource: l.lanes[1].read()}
}

func (r *relay) read() LaneStats {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.stats
	s.Queued = r.backlog(r.free, r.clock())
	return s
}
