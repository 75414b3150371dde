package sched

import (
	"time"

	"forerun/block"
)

// Stats is what a scheduler has done and what it waits for.
type Stats struct {
	DemandQueued, DemandInFlight         int // chunks
	BackgroundQueued, BackgroundInFlight int // chunks
	DemandLimit                          int // chunks that may be in flight
	WindowBytes                          int64
	InFlightBytes                        int64 // background, estimated
	BackgroundRequests                   int   // under way
	BackgroundFloor                      int   // so many may always be
	Delay, BaseDelay                     time.Duration
	RateBytes                            int64 // limit a second, 0 for none
	Paused                               bool
	Requests                             int64 // sent over the link
	Delivered                            int64 // chunks
	Joined, Raised, Corrupt              int64 // chunks
	Repaired                             int64 // chunks that came as a signature of what is not here, and were asked for again
	DemandBytes                          int64 // wire bytes of demand and write-back chunks
	BackgroundBytes                      int64
	DemandWaits                          int64 // Fetch calls of class demand that ended
	DemandP50, DemandP99                 time.Duration
}

// Stats returns the numbers now.
func (s *Scheduler) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Stats{
		DemandQueued:       s.q.queued[rankDemand] + s.q.queued[rankWriteBack],
		DemandInFlight:     s.q.sent[rankDemand] + s.q.sent[rankWriteBack],
		BackgroundQueued:   s.q.queued[rankSoon] + s.q.queued[rankSweep],
		BackgroundInFlight: s.q.sent[rankSoon] + s.q.sent[rankSweep],
		DemandLimit:        s.opts.DemandChunks,
		WindowBytes:        s.window.Bytes(),
		InFlightBytes:      s.inFlight(),
		BackgroundRequests: s.bgRequests,
		BackgroundFloor:    s.opts.Floor,
		Delay:              s.window.Delay(),
		BaseDelay:          s.window.Base(),
		RateBytes:          int64(s.rate.rate),
		Paused:             s.paused,
		Requests:           s.fetches.Load(),
		Delivered:          s.delivered.Load(),
		Joined:             s.joined.Load(),
		Raised:             s.raised.Load(),
		Corrupt:            s.corrupt.Load(),
		Repaired:           s.repaired.Load(),
		DemandBytes:        s.wire[block.Demand].Load() + s.wire[block.WriteBack].Load(),
		BackgroundBytes:    s.wire[block.Background].Load(),
		DemandWaits:        s.wait.Count(),
		DemandP50:          s.wait.Quantile(0.5),
		DemandP99:          s.wait.Quantile(0.99),
	}
}

// DemandWaits says whether anything in demand's class or write-back's is under
// way: what Stats counts as DemandQueued and DemandInFlight, for those who ask often.
func (s *Scheduler) DemandWaits() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.q.queued[rankDemand]+s.q.queued[rankWriteBack]+s.q.sent[rankDemand]+s.q.sent[rankWriteBack] > 0
}
