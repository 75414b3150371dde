// Package writeback carries what a workload changes at its new home back to
// the old one, so that the move can be called off at any time: the source is
// always exactly the content of a checkpoint, and at most one behind.
//
// A checkpoint is a cut through all volumes of a consistency group at a moment
// at which none had a write under way. The Shipper, at the frontend that is
// primary, makes it: it stops the volumes for as long as it takes to note the
// positions of their journals, reads what the journals have between the last
// cut and this one, and sends of each range only the newest bytes. The
// Receiver, at the backend, first stores the whole checkpoint in a file of its
// own (a redo log in the sense of Mohan et al., "ARIES", 1992), then carries it
// out. SPEC.md has the messages, FORMAT.md the files.
//
//	Shipper                                   Receiver
//	freeze, positions, thaw
//	flush (both nodes)                        the source has checkpoint n-1
//	journal headers: which bytes are newest
//	pieces, many under way       -------->    n.part: appended in order
//	commit                       -------->    n.part synced, renamed n.ckpt: stored
//	move the holds               <--------
//	                                          clones: keep what n will change
//	                                          write the sources, flush them
//	applied?                     -------->    note n as applied, remove the file
//
// # Invariants
//
//   - The hold "writeback" on a journal has behind it everything that the source
//     lacks, perhaps more. It moves only after the backend has stored the cut
//     it moves to. Sending more than the source lacks does no harm: the newest
//     bytes win, and all are from before the same cut.
//   - Nothing leaves a frontend that it could lose: the volumes are flushed, on
//     both nodes, between the cut and the commit. Else a power cut would leave
//     bytes at the source that no journal knows of.
//   - Without that hold (it kept too much of the journal and was given up, the
//     volume was isolated, a power cut, another backend) everything that may
//     differ is compared by signature with the source, and what differs is sent.
//     The comparison reads the live volume; the records since its beginning
//     follow, so that the sum is the content at the cut. When those would be
//     more than the journal should keep, what was written is marked instead and
//     read again, pass by pass.
//   - A checkpoint counts as stored only when its file, whole and verified, is
//     durable under its final name. It is carried out from its first byte again
//     until all sources were flushed without an error, and the next one is not
//     stored before. The state says that it was applied before its file goes.
//   - Ids of a group's checkpoints have no gaps, and a nonce tells apart two cuts
//     with the same one. So whatever arrives twice or late is recognised.
//   - Who may write a volume: the arbiter's record, and the highest epoch seen,
//     noted durably before its first piece is taken. It is asked when a
//     checkpoint begins and again when it is committed.
//   - Before a checkpoint changes a range that a clone has not kept, the old
//     bytes are copied, synced, and noted in the clone's map, durably.
//
// A checkpoint of a primary that was replaced just before it was committed does
// no harm as long as its successor has not begun one: all in it is also in the
// successor's journal, behind its hold.
//
// # When things fail
//
// A full disk at the backend, a source that fails, a link that is down: waits
// with a reason; the journal keeps what is not stored, the sources keep the last
// checkpoint. A stored checkpoint whose file is damaged later is put aside and
// everything is compared, since the source may have part of it. What is on its
// way when the backend restarts goes on where the sound part of its file ends.
//
// # Memory
//
// A Shipper: 16 pieces under way (11 MiB), the tables of a window of 65536
// records (8 MiB), or 6 MiB of questions while comparing. A Receiver: four
// pieces being opened, and what the connections hold.
//
// # Locks, outermost first
//
//	group.turn      begin, commit and release of a group, one at a time
//	content         of each volume, in order of name: carrying out, beginning a clone
//	part.mu         the file of a checkpoint on its way
//	Receiver.save   one writing of the state at a time
//	Receiver.mu     everything else in memory
//	clone.mu        bits and bytes of a clone
//
// In the Shipper: turn (one checkpoint at a time), sender.dial, then sender.mu
// or Shipper.mu, which are leaves.
//
// # Goroutines
//
// Shipper.Run is the caller's; a sender has one for each piece under way, and
// ends before the attempt it belongs to. The Receiver has one for each
// checkpoint being carried out; Close waits for them.
package writeback
