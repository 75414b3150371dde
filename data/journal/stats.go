package journal

import (
	"sync/atomic"
	"time"
)

// counters are added to without a lock.
type counters struct {
	records, bytes, groups      atomic.Int64
	syncs, synced, syncFailures atomic.Int64
	rescues, refused, waits     atomic.Int64
	checkpoints                 atomic.Int64
	checkpointNanos             atomic.Int64
	brokenHolds, replayed       atomic.Int64
}

// Stats is what the journal did since it was opened and how it stands.
type Stats struct {
	Records int64 // appended
	Bytes   int64 // appended, headers included
	Groups  int64 // appends to the file; Records/Groups writers shared one

	Syncs        int64 // successful syncs of a segment
	Synced       int64 // records they made durable; Synced/Syncs shared one
	SyncFailures int64
	Rescues      int64 // failed syncs answered by flushing the device below

	Replayed       int64 // records applied when the journal was opened
	Checkpoints    int64
	LastCheckpoint time.Duration // how long the last one took
	Refused        int64         // appends that met a full disk
	Waits          int64         // writes that had to wait for space
	BrokenHolds    int64

	Retained int64 // bytes of segment files, spares not included
	Segments int
	Unsynced int64 // records a power cut could lose
	Position Position
	Applied  uint64   // the device below has everything up to here durably
	Holds    []string // names, in no order
	// Waiting says why writers wait or are refused now; empty when they are not.
	Waiting string
}

// Stats returns a snapshot.
func (j *Journal) Stats() Stats {
	c := &j.stats
	s := Stats{
		Records: c.records.Load(), Bytes: c.bytes.Load(), Groups: c.groups.Load(),
		Syncs: c.syncs.Load(), Synced: c.synced.Load(), SyncFailures: c.syncFailures.Load(), Rescues: c.rescues.Load(),
		Replayed: c.replayed.Load(), Checkpoints: c.checkpoints.Load(), LastCheckpoint: time.Duration(c.checkpointNanos.Load()),
		Refused: c.refused.Load(), Waits: c.waits.Load(), BrokenHolds: c.brokenHolds.Load(),
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, g := range j.segs {
		s.Retained += g.size
	}
	s.Segments, s.Position, s.Applied = len(j.segs), j.pos, j.applied
	s.Unsynced = int64(j.pos.Sequence - min(j.safe, j.pos.Sequence))
	for name := range j.holds {
		s.Holds = append(s.Holds, name)
	}
	switch {
	case j.failed != nil:
		s.Waiting = "failed: " + j.failed.Error()
	case j.waiting > 0 && j.stuck != nil:
		s.Waiting = "journal full; the checkpoint fails: " + j.stuck.Error()
	case j.waiting > 0:
		s.Waiting = "journal full; a checkpoint is under way"
	}
	return s
}
