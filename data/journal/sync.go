package journal

import (
	"context"

	"forerun/block"
)

// Flush makes every acknowledged write durable by syncing the journal. Flushes
// that come while a sync runs share the next one.
func (j *Journal) Flush(ctx context.Context, _ block.Flags) error {
	if err := j.enter("flush"); err != nil {
		return err
	}
	defer j.life.RUnlock()
	j.mu.Lock()
	upto := j.pos.Sequence
	j.mu.Unlock()
	return j.syncTo(ctx, upto)
}

// syncTo returns when everything up to that sequence is durable.
func (j *Journal) syncTo(ctx context.Context, upto uint64) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	for {
		if j.safe >= upto {
			return nil
		}
		if j.failed != nil {
			return j.failed
		}
		if !j.syncing {
			break
		}
		ch := j.synced.wait()
		j.mu.Unlock()
		select {
		case <-ch:
		case <-ctx.Done():
			j.mu.Lock()
			return block.E("journal.flush", j.dir, 0, ctx.Err())
		}
		j.mu.Lock()
	}
	j.syncing = true
	err := j.syncNow()
	j.syncing = false
	j.synced.ring()
	return err
}

// syncNow syncs the segments with records not yet synced, oldest first. mu is
// held and released meanwhile; syncing is set.
func (j *Journal) syncNow() error {
	covers := j.pos.Sequence
	segs := j.syncSegs[:0]
	for _, s := range j.segs {
		if s.tail > s.syncedTail {
			s.hold()
			segs = append(segs, s)
		}
	}
	j.syncSegs = segs
	type mark struct {
		tail  int64
		named bool
	}
	var few [4]mark
	marks := few[:0]
	for _, s := range segs {
		marks = append(marks, mark{s.tail, s.named})
	}
	j.mu.Unlock()

	var err error
	var bad *segment
	for i, s := range segs {
		if err = s.file.Sync(); err == nil && !marks[i].named {
			err = j.fs.SyncDir(j.dir)
		}
		if err != nil {
			bad = s
			break
		}
		marks[i].named = true
		j.stats.syncs.Add(1)
	}
	if err != nil {
		j.stats.syncFailures.Add(1)
		return j.rescue(segs, bad, err)
	}

	j.mu.Lock()
	for i, s := range segs {
		s.syncedTail, s.named = max(s.syncedTail, marks[i].tail), true
		s.drop()
	}
	j.stats.synced.Add(int64(covers - min(covers, j.safe)))
	j.safe = max(j.safe, covers)
	j.claim.Store(max(j.claim.Load(), covers))
	return nil
}

// rescue makes durable by a flush of the device below what a failed sync of
// the journal left in doubt. It returns with mu held.
func (j *Journal) rescue(segs []*segment, bad *segment, cause error) error {
	j.mu.Lock()
	for _, s := range segs {
		s.broken = true
	}
	name := bad.path
	j.mu.Unlock()
	j.log.Error("sync of the journal failed; flushing the device below instead", "segment", name, "error", cause)
	err := j.checkpoint(true)
	j.mu.Lock()
	for _, s := range segs {
		s.drop()
	}
	if err == nil {
		j.stats.rescues.Add(1)
		return nil
	}
	j.failed = block.E("journal.flush", bad.path, block.KindIO, &syncError{cause, err})
	j.space.ring()
	j.log.Error("the journal has failed: writes are refused until it is opened again", "error", j.failed)
	return j.failed
}

// syncError says why a flush could not be answered in either way.
type syncError struct{ sync, rescue error }

func (e *syncError) Error() string {
	return "sync failed (" + e.sync.Error() + ") and so did the way around it (" + e.rescue.Error() +
		"); check the disk that holds the journal, then restart the volume: what was flushed before is safe"
}

func (e *syncError) Unwrap() error { return e.sync }
