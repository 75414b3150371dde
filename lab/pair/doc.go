// Package pair puts two frontends, their backend and a proxy to the proof, as
// processes: campaigns that kill, destroy, abort and clone them while real
// workloads write, and measurements beside what others offer.
//
//	PostgreSQL ─ ext4 ─ loop ─ nbdfuse ─┐                 ┌─ frontend a ─┐
//	                                    ├─ NBD ─ proxy ─┤      ║        ├─ gate ─ backend ─ source
//	load with oracle ───────────────────┘                 └─ frontend b ─┘
//
// A campaign takes Options, tells a Report what it finds, and ends with an
// error at the first promise that is broken; its directory then holds the
// evidence: every daemon's log, all state, the sources.
//
// Invariants: what a campaign starts it ends, by its own id, also when it
// fails; processes die with this one; mounts and loop devices that a killed run
// left behind are removed by the next one (Clean). A workload sits behind the
// proxy and never sees an error: one that does fails the campaign.
//
// Mounting needs root, /dev/fuse, nbdfuse and e2fsprogs; the database needs
// PostgreSQL; links of a given rate or delay are those of lab/netns.
package pair
