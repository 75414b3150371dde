// Package sim runs a pair of frontends, their arbiter and a backend in one
// process, in virtual time, through everything that can go wrong, and judges
// what their clients saw.
//
// A run is made from a seed. Plan turns it into a Schedule, a plain value: how
// many volumes and clients, how long the lines are, how fast the nodes' clocks
// run, and which faults happen when. The rooms under test are the real ones:
// data/replica over data/journal over a device on a crashing disk
// (disk/disktest), data/fence, data/writeback, internal/msg over lab/wan. Time
// is that of a testing/synctest bubble, so a minute of timeouts costs nothing.
// Only what the scheduler of Go decides is left to chance: a seed that failed
// may have to be run a few times until it fails again, and Shrink counts on it.
//
// Clients send reads, writes, zeros, trims and flushes to either node, one at a
// time each, and repeat what is not answered, as a proxy does. History is what
// they did and saw, on one scale of moments. It demands:
//
//   - Each sector is a register, and the register is linearizable, across
//     failovers: a read gives the newest acknowledged write or one that was
//     under way at the same time, and what was once read is never unread.
//   - While one node is left that had all, nothing acknowledged is lost. When
//     both are lost, a sector holds the newest write that was durable (flushed,
//     FUA, or acknowledged by a node that was alone under the policy degrade) or
//     one behind it; which, the first read decides for good. As the disk tears
//     sectors, it may also be none of them whole, and then stays so.
//   - Whoever acknowledges does so in an epoch that was granted, and that was
//     the newest in force at some moment while the request was under way. An
//     epoch is in force from when the node that got it knows.
//   - The sources, all volumes of the group together, are one cut of the
//     history: what is in them has everything in front of it that was
//     acknowledged before it began, and each write is in them whole. When
//     both nodes are gone, the cut is the one that the backend states.
//   - When all faults have ended, everybody is answered, the nodes are in sync,
//     both give the same bytes, and so does the source when all is written back.
//   - No client is ever answered with an error.
//
// The judge is judged itself: the tests run a toy that is a pair in one moment,
// honest, or lying in one of a dozen ways.
//
// Locks: History.mu and Log.mu are leaves. A cluster's own lock is held while an
// answer is noted, so that no node goes down between the answer and the note.
package sim
