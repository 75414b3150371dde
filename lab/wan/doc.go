// Package wan is a long thin line in memory: connections between two sites
// that share a rate, a delay, a queue and their bad days, for tests of
// everything that talks over the WAN.
//
// One WAN has two directions. Each direction is one bottleneck: bytes of all
// connections enter a first-in-first-out queue in segments, leave it at Rate,
// and arrive Delay later. A writer blocks while the queue is full or while
// its connection has a full window in flight, as a sender with a short kernel
// buffer does. So a bulk transfer delays everything behind it by the length
// of the queue, which is what demand reads suffer on a real line.
//
// There is no goroutine and no clock of its own: a segment gets its arrival
// time when it is sent, readers and writers sleep on timers until it is
// reached. All waiting is on sync.Cond, so that a testing/synctest bubble
// sees it as durably blocked and runs minutes of line time in microseconds.
//
// Invariants:
//
//   - Bytes arrive in order, once, unchanged; a lost segment only comes later,
//     and those behind it on its connection with it.
//   - No byte arrives earlier than Delay after it was written, and no more
//     than Rate bytes a second pass one direction.
//   - A halted direction (Stall, Partition) loses nothing: its clock stands
//     still and goes on where it stood. Cut is the one that loses.
//
// Lock order: there is one lock, WAN.mu.
package wan
