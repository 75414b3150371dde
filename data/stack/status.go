package stack

import (
	"forerun/api"
	"forerun/data/fill"
)

// Status says where the volume stands. What only the daemon knows (the link's
// session, the store, the clients) it leaves out.
func (v *Volume) Status() api.Volume {
	m := v.meta
	s := api.Volume{
		Volume: m.Volume, Role: api.RoleFrontend, Phase: api.PhaseSwitched, Primary: api.PrimaryTarget,
		SizeBytes: m.SizeBytes, ChunkBytes: int64(m.ChunkBytes), Source: m.SourceID,
		Fill:    api.Fill{State: string(fill.Stopped), ETAS: -1},
		Cutover: v.cutoverStatus(),
	}
	s.Replica = v.replicaStatus()
	src := v.source
	if v.Switched() || src == nil {
		s.Source = ""
		if src == nil {
			return s
		}
	} else {
		s.Primary = api.PrimarySource
	}
	src.status(&s)
	if s.Primary == api.PrimaryTarget {
		s.Waiting = ""
		return s
	}
	s.Phase = v.phase(s)
	return s
}

func (v *Volume) phase(s api.Volume) string {
	switch {
	case s.Cutover.State == "copying" || s.Cutover.State == "paused" || s.Cutover.State == "switching":
		return api.PhaseConverging
	case s.Chunks.Absent == 0:
		return api.PhaseFilled
	case v.seen.Load():
		return api.PhaseRunning
	}
	return api.PhaseStarting
}

// status adds what the source side knows.
func (src *sourceSide) status(s *api.Volume) {
	vs, qs, fs, js, cs := src.volume.Stats(), src.sched.Stats(), src.pump.Stats(), src.journal.Stats(), src.cache.Stats()
	s.Chunks = api.Chunks{Untouched: vs.Untouched, Free: vs.Free, Held: vs.Held, Zero: vs.Zero, Modified: vs.Modified,
		Absent: vs.Untouched + vs.PartlyAbsent, Corrupt: vs.Corrupt + vs.Refetched}
	s.WAN.DemandBytes, s.WAN.BackgroundBytes = qs.DemandBytes, qs.BackgroundBytes
	s.Demand = api.Demand{Reads: qs.DemandWaits, Waiting: int64(qs.DemandQueued + qs.DemandInFlight),
		P50Us: qs.DemandP50.Microseconds(), P99Us: qs.DemandP99.Microseconds(), Joined: qs.Joined}
	s.Dedup.Chunks, s.Dedup.Repairs = vs.Adopted, qs.Repaired
	remaining := s.Chunks.Absent * s.ChunkBytes
	s.Fill = api.Fill{State: string(fs.State), Reason: fs.Reason, RateBytes: fs.RateBytes, LimitBytes: fs.Limit,
		RemainingBytes: remaining, ETAS: -1, WindowBytes: qs.WindowBytes, InFlight: int64(qs.BackgroundInFlight),
		InFlightBytes: qs.InFlightBytes, Requests: int64(qs.BackgroundRequests), RequestsFloor: int64(qs.BackgroundFloor),
		Queued: int64(qs.BackgroundQueued), CursorChunk: fs.Cursor, QueueDelayUs: qs.Delay.Microseconds()}
	s.Demand.InFlight, s.Demand.InFlightLimit = int64(qs.DemandInFlight), int64(qs.DemandLimit)
	if eta := fs.ETA(remaining); eta >= 0 {
		s.Fill.ETAS = int64(eta.Seconds())
	}
	s.Cache = api.Cache{MemoryHits: cs.MemoryHits, ScratchHits: cs.ScratchHits, Misses: cs.Misses,
		MemoryBytes: cs.MemoryBytes, ScratchBytes: cs.ScratchChunks * s.ChunkBytes}
	s.Journal = api.Journal{Records: js.Records, Bytes: js.Bytes, Syncs: js.Syncs, RetainedBytes: js.Retained,
		Position: int64(js.Position.Sequence)}
	for _, w := range []string{src.Waiting(), js.Waiting} {
		if w != "" {
			s.Waiting = w
			break
		}
	}
	if cs.ScratchOff {
		s.Warnings = append(s.Warnings, "the scratch tier is off: its disk failed or is full; reads of held data are slower")
	}
	if js.Rescues > 0 {
		s.Warnings = append(s.Warnings, "a sync of the journal failed and the data was made durable another way; look at the disk")
	}
}
