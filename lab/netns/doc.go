// Package netns is a real WAN for real programs: two network namespaces
// joined by a relay in this process that delays, paces, queues, drops, stalls
// and cuts. It stands in for the netem queueing discipline, which many test
// machines lack.
//
//	namespace "source"            this process              namespace "target"
//	10.71.0.1  wan0 (TUN) ── read ─ bottleneck ─ delay ─ write ── wan0 (TUN)  10.71.0.2
//
// Each packet that is read gets the time at which a line of this rate would
// have finished sending it, or is dropped when the queue is full, and is
// written when that time and the delay have passed. The bottleneck is a clock,
// not a token bucket, so it is exact to the byte and a burst costs nothing
// extra. One thread does all of it: what costs is waking up, not packets.
//
// Invariants:
//
//   - A packet is delivered once, unchanged and in order, or not at all.
//   - Delivery is never early; it is late by at most two of
//     Config.Tick and what the scheduler adds.
//   - The names of namespaces hold the process id. Open removes those whose
//     process is gone, so a killed run leaves nothing behind for long.
//   - Programs started with Site.Command die with this process.
//
// It needs root, /dev/net/tun and the programs ip and nsenter.
//
// Lock order: relay.mu alone; Line.mu before it.
package netns
