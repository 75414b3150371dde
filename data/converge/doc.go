// Package converge replicates a volume to native storage while the workload
// goes on, and cuts over to it: copy everything, then what was written
// meanwhile, and again, until what is left is below a threshold; then the gate
// closes, the rest is copied, the switch is recorded, and the gate opens on the
// other side. It is the pre-copy of live migration (Clark et al., "Live
// Migration of Virtual Machines", NSDI 2005) applied to a disk. The pause grows
// with the threshold and nothing else.
//
// Three parts, wired by whoever builds the stack:
//
//	Switch    on top, below the export: counts calls, holds them at a closed
//	          gate, passes them to the source stack and later to the target
//	Tracker   below the journal, above the volume: remembers which grains were
//	          written while a copy is under way, and keeps that across restarts
//	Job       the copier: reads below the Tracker, writes to the target
//
// Invariants:
//
//   - A grain is marked after the write into it was applied and before it is
//     acknowledged. So whatever the copier read before or during the write is
//     copied again. Marks of a round are dropped only after the target was
//     flushed.
//   - The plan on disk says which side is primary, and it says "switched" only
//     after the target holds, flushed, what the guest last read. Until that is
//     durable no write reaches the target from the guest; from then on none
//     reaches the source.
//   - If it is not known whether "switched" reached the disk, the gate stays
//     closed until the record has been taken back durably.
//   - The file of marks is trusted only if every write it does not know will be
//     replayed through the Tracker by the journal above: after a kill, or a
//     clean close. After a power cut the volume may hold writes whose journal
//     records were lost with the page cache; then everything is copied again.
//
// The copier is apart from the path that serves I/O: it can be paused, slowed
// down, killed and run again.
//
// Lock order: Job.mu and Tracker.save are never held together; Tracker.save,
// then Tracker.mu; Switch.turn, then Switch.mu. None is held during I/O of the
// guest; Tracker.save is held while the marks are written.
package converge
