// Package journal makes acknowledged writes durable cheaply: an ordered log
// beside a device that is slow to sync.
//
// A write is appended to the log (one pwrite for all writers waiting), applied
// to the device below at once, and acknowledged. Nothing is held in memory:
// reads pass through. A flush syncs the log only, never the device below; many
// flushes share one sync. Now and then a checkpoint flushes the device below
// and gives back the segments that are no longer needed. When the journal is
// opened, every retained record is applied to the device below again (redo,
// idempotent; Mohan et al., "ARIES", 1992, without the undo).
//
// What that promises:
//
//   - kill -9 keeps every acknowledged write: records are in the page cache.
//   - A power cut keeps every write acknowledged before a flush that returned
//     nil, and every FUA write. Any other sector holds its old bytes or those
//     of one of the writes made to it since, never anything else.
//   - The order of records in the journal is the order of application for all
//     writes that overlap: a range is locked from before the append until after
//     the application. Writes that do not overlap run in parallel.
//   - A write that the device below refused is voided by a record behind it, so
//     that it does not appear after a restart.
//
// Invariants:
//
//   - A record claims (its field durable) only what a successful sync of the
//     journal covered. So replay can tell a torn tail, which a power cut makes
//     and which is cut off, from damage to bytes that had been promised, which
//     is refused.
//   - Segments are removed oldest first, each removal made durable before the
//     next: what is left is always a suffix of the log, and the device below
//     has everything before it.
//   - A flush is answered from a sync of the journal, never from a checkpoint
//     whose segments may still be replayed.
//
// A failed sync (the pages may be gone and the next sync may lie: Rebello et
// al., "Can Applications Recover from fsync Failures?", ATC 2020) is answered
// by making the data durable another way: the current segment is closed, the
// device below is flushed, the doubtful segments are removed, holds on them
// are broken, and only then does the flush succeed. If that fails too, the
// journal stays failed: writes and flushes are refused with KindIO until it
// is opened again; reads go on.
//
// A failed flush of the device below is not forgotten either: no checkpoint is
// made any more, so that the next opening replays everything since the last
// good one. Writes and flushes go on until the journal is full and are then
// refused. (KindNoSpace and KindUnavailable say that the flush may be tried
// again, and it is.)
//
// A full disk: segments are reserved whole, a spare one is kept, and a
// checkpoint recycles old ones, so that the journal does not need new space in
// steady state. When there is none at all, the write is refused with
// KindNoSpace, leaves no trace in the log, and later writes succeed as soon as
// there is space.
//
// Lock order: ckpt (one checkpoint at a time), then mu (the list of segments,
// positions, queue). ranges.mu is a leaf and never held with the others. The
// leader of a group owns the tail of the current segment without a lock; there
// is one leader at a time (leading, guarded by mu).
package journal
