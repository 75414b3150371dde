package journal

import (
	"context"
	"fmt"
	"time"

	"forerun/block"
)

// keep is the keeper: it makes a checkpoint when one is due.
func (j *Journal) keep() {
	timer := time.NewTimer(j.opt.CheckpointInterval)
	defer timer.Stop()
	for {
		timed := false
		select {
		case <-j.stop:
			return
		case <-j.kick:
		case <-timer.C:
			timed = true
		}
		next := j.opt.CheckpointInterval
		if j.due(timed) {
			if err := j.checkpoint(false); err != nil {
				next = min(next, time.Second)
			}
		}
		timer.Reset(next)
	}
}

// due says whether a checkpoint should be made: after the interval when there
// was a write, else by bytes, or when half of the space is used.
func (j *Journal) due(timed bool) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.pos.Sequence == j.applied && len(j.segs) <= 1 || j.failed != nil {
		return false
	}
	if timed && j.pos.Sequence > j.applied || j.waiting > 0 || j.since.Load() >= j.opt.CheckpointBytes {
		return true
	}
	sealed := int64(len(j.segs)-1) * j.opt.SegmentBytes
	return j.pos.Sequence > j.applied && sealed >= j.opt.MaxBytes/2
}

// Checkpoint makes the device below durable up to the last record and gives
// back the segments that nobody holds.
func (j *Journal) Checkpoint(context.Context) error {
	if err := j.enter("checkpoint"); err != nil {
		return err
	}
	defer j.life.RUnlock()
	return j.checkpoint(false)
}

// checkpoint begins a new segment, waits until all records in older ones are
// applied, flushes the device below and removes the older segments. With unsynced
// set a sync of them has failed: holds do not keep them, and success means
// that a flush is answered.
func (j *Journal) checkpoint(unsynced bool) error {
	j.ckpt.Lock()
	defer j.ckpt.Unlock()
	begin := time.Now()
	if err := j.doubt(nil); err != nil {
		j.settleCheckpoint(begin, err)
		return err
	}
	var rolled error
	if unsynced || !j.again() {
		rolled = j.turn()
	}
	if unsynced && rolled != nil {
		return rolled // the segment in doubt must go, and there is nothing to go on with
	}
	j.since.Store(0)

	j.mu.Lock()
	var cover Position
	segs := 0
	for _, s := range j.segs {
		if s.sealed.Load() {
			cover, segs = s.last, segs+1
		}
	}
	if segs == 0 {
		j.mu.Unlock()
		return rolled
	}
	for _, s := range j.segs[:segs] {
		for s.pending.Load() > 0 {
			ch := j.drained.wait()
			if s.pending.Load() == 0 {
				break
			}
			j.mu.Unlock()
			<-ch
			j.mu.Lock()
		}
	}
	flushed := cover.Sequence <= j.applied
	j.mu.Unlock()

	if !flushed || unsynced {
		ctx := j.base
		if unsynced {
			ctx = context.Background() // a caller waits for it, and Close for the caller
		}
		if err := j.below.Flush(ctx, block.Background); err != nil {
			err = j.doubt(err)
			j.settleCheckpoint(begin, err)
			return err
		}
	}
	j.mu.Lock()
	j.applied = max(j.applied, cover.Sequence)
	j.mu.Unlock()
	err := j.trim(cover, unsynced)
	if err == nil && unsynced {
		j.mu.Lock()
		j.safe = max(j.safe, cover.Sequence)
		j.claim.Store(max(j.claim.Load(), cover.Sequence))
		j.mu.Unlock()
	}
	j.settleCheckpoint(begin, err)
	return err
}

// doubt notes that the device below failed to flush, and answers the error to
// tell. A device that lost pages may well succeed the next time, so no segment
// is removed any more: opening the journal again replays them all. Only kinds
// that say "it may be tried again" may be.
func (j *Journal) doubt(err error) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	switch block.KindOf(err) {
	case block.KindNone, block.KindNoSpace, block.KindUnavailable:
	default:
		if j.doubtful == nil {
			j.doubtful = block.E("journal.checkpoint", j.dir, block.KindIO, fmt.Errorf(
				"the device below failed to flush and may have lost writes the journal still has; check its disk, then restart the volume: %w", err))
		}
	}
	if j.doubtful != nil {
		return j.doubtful
	}
	return err
}

// settleCheckpoint notes how a checkpoint ended and wakes the writers that
// wait for it.
func (j *Journal) settleCheckpoint(begin time.Time, err error) {
	if err == nil {
		j.stats.checkpoints.Add(1)
		j.stats.checkpointNanos.Store(int64(time.Since(begin)))
	}
	j.mu.Lock()
	if (err == nil) != (j.stuck == nil) {
		if err != nil {
			j.log.Error("checkpoint failed; the journal keeps growing until one succeeds", "error", err)
		} else {
			j.log.Info("checkpoints succeed again")
		}
	}
	j.stuck = err
	j.space.ring()
	j.mu.Unlock()
}

// again says whether this checkpoint repeats one that failed: then it does not
// seal one more segment, however little is in it.
func (j *Journal) again() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.stuck != nil && j.segs[0].sealed.Load()
}

// turn takes the lead for a moment and begins a new segment, unless the
// current one is empty.
func (j *Journal) turn() error {
	j.mu.Lock()
	j.wanted = true
	for j.leading {
		ch := j.lead1.wait()
		j.mu.Unlock()
		<-ch
		j.mu.Lock()
	}
	j.leading, j.wanted = true, false
	j.mu.Unlock()
	var err error
	if j.cur == nil || j.cur.tail > segHeader {
		err = j.roll()
	}
	j.mu.Lock()
	j.handOver()
	j.mu.Unlock()
	return err
}

// trim removes segments, oldest first, that end at or before cover and that no
// hold needs. The newest segment always stays, durably: it carries the
// position on.
func (j *Journal) trim(cover Position, unsynced bool) error {
	for {
		j.mu.Lock()
		s, n := j.segs[0], len(j.segs)
		if n < 2 || s.last.Sequence > cover.Sequence || s.pending.Load() > 0 || j.closedNow() && !unsynced {
			j.mu.Unlock()
			return j.saveHolds()
		}
		if name, held := j.holder(s.last.Sequence); held && !unsynced {
			why := "it kept more than half of the space"
			if int64(n)*j.opt.SegmentBytes <= j.opt.MaxBytes/2 {
				if !j.tight.Load() {
					j.mu.Unlock()
					return j.saveHolds()
				}
				why = "the disk is full, and a write needs its space"
			}
			j.breakHolds(s.last.Sequence)
			j.log.Warn("a hold on the journal was given up: "+why,
				"hold", name, "bytes", int64(n)*j.opt.SegmentBytes)
		} else if held {
			j.breakHolds(s.last.Sequence)
			j.log.Warn("a hold on the journal was given up: the segment could not be synced", "hold", name)
		}
		next := j.segs[1]
		next.hold()
		named := next.named
		j.mu.Unlock()
		var err error
		if !named {
			err = j.fs.SyncDir(j.dir) // its header is durable since it has that name
		}
		if err == nil {
			err = j.discard(s)
		}
		j.mu.Lock()
		next.named = next.named || err == nil
		next.drop()
		j.mu.Unlock()
		if err != nil {
			return block.E("journal.checkpoint", s.path, 0, err)
		}
	}
}

// closedNow says whether Close has begun: then the rest is left to the next
// opening. mu is held.
func (j *Journal) closedNow() bool {
	select {
	case <-j.stop:
		return true
	default:
		return false
	}
}
