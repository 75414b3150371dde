package volume

import (
	"sync/atomic"
	"time"
)

// counters are what a volume counts as it goes.
type counters struct {
	reads, missed, ahead        atomic.Int64
	delivered, refused          atomic.Int64
	adopted, unknown            atomic.Int64
	refetched, corrupt          atomic.Int64
	commits, commitFailures     atomic.Int64
	checkpoints                 atomic.Int64
	commitNanos, commitMaxNanos atomic.Int64
	logBytes                    atomic.Int64
}

// Stats is what a volume is and has done since it was opened. Untouched, Free,
// Held, Zero and Modified sum to Chunks.
type Stats struct {
	Chunks     int64 // chunks of the volume
	ChunkBytes int   // bytes
	Untouched  int64 // chunks only the source has, without those that are Free
	Free       int64 // chunks only the source has, whose file systems do not use them; see Options.SkipFree
	Held       int64 // chunks kept here as they were at the source
	Zero       int64 // chunks that read as zeros and take no space
	Modified   int64 // chunks the workload wrote into
	// PartlyAbsent are the modified chunks of which the source still has
	// sectors that are not here.
	PartlyAbsent int64
	OverlayBytes int64 // bytes the workload wrote and the overlay has

	DemandReads  int64 // reads of class Demand
	DemandMissed int64 // those that had to ask the source
	AheadChunks  int64 // chunks asked for by read-ahead
	Delivered    int64 // chunks that came and matched their signature
	Adopted      int64 // chunks that were held already, by content, when they were asked for or announced
	Unknown      int64 // signatures of chunks that were not here; their bytes were asked for
	Refused      int64 // chunks that came and could not be kept
	Refetched    int64 // held chunks that were lost or damaged here and asked for again
	Corrupt      int64 // chunks that came with, or had, other bytes than their signature says

	Commits        int64         // of the map
	CommitFailures int64         // commits that failed; what they held is in a later one
	Checkpoints    int64         // snapshots of the map
	CommitTime     time.Duration // spent in all commits
	CommitLongest  time.Duration
	LogBytes       int64 // length of the map log
}

// Stats returns the figures of this moment.
func (v *Volume) Stats() Stats {
	c := v.table.stats()
	n := &v.n
	return Stats{
		Chunks: v.table.chunks, ChunkBytes: v.opt.ChunkBytes,
		Untouched: c.cat[catUntouched] - c.free, Free: c.free, Held: c.cat[catHeld], Zero: c.cat[catZero], Modified: c.cat[catModified],
		PartlyAbsent: c.partial, OverlayBytes: c.sectors << sectorShift,
		DemandReads: n.reads.Load(), DemandMissed: n.missed.Load(), AheadChunks: n.ahead.Load(),
		Delivered: n.delivered.Load(), Adopted: n.adopted.Load(), Unknown: n.unknown.Load(), Refused: n.refused.Load(), Refetched: n.refetched.Load(), Corrupt: n.corrupt.Load(),
		Commits: n.commits.Load(), CommitFailures: n.commitFailures.Load(), Checkpoints: n.checkpoints.Load(),
		CommitTime: time.Duration(n.commitNanos.Load()), CommitLongest: time.Duration(n.commitMaxNanos.Load()),
		LogBytes: n.logBytes.Load(),
	}
}
