// Package replica keeps a volume on two nodes: what is acknowledged is at both,
// and when one is gone the other goes on.
//
// For each volume one node is primary. It answers reads from its local stack.
// A change goes to the other node first, then to the local stack, and is then
// acknowledged; so what can be read here is there already. The other node, the
// secondary, forwards every call of its own clients to the primary. Who is
// primary is decided by the arbiter (package fence), never here. Without an
// arbiter the volume is alone, and every call passes straight through.
//
// # Sessions
//
// A message that was sent and not answered may be carried out later, by a
// goroutine that stood still or from a connection that was thought dead. What
// it does then could overwrite something newer. So changes travel in a session:
// the receiver refuses those of any session but the newest, and begins a new
// one only when nothing of an older one is under way. A change whose outcome is
// not known ends the session; its sender sends it again in the next one, still
// holding its range, or is told that it failed, and then the nodes may differ
// until the resynchronisation with which each session begins has made them
// equal. There are two kinds: from the primary (session, inbound), and of
// clients' changes that are forwarded to it (forwarder, guests). A node never
// forwards what was forwarded to it, so two nodes that each take the other for
// the primary do not send a call in circles: both wait for the arbiter.
//
// # What may differ
//
// Each node holds its journal (the hold "peer") at a position behind which lies
// everything that the other may not have durably:
//
//  1. the secondary says its position b,
//  2. the primary notes its own, a, waits until all writes under way have ended,
//     and flushes: it has durably what the other had up to b,
//  3. the secondary flushes and holds at b: it has durably what the primary had
//     up to a, since each change was there first,
//  4. the primary holds at a.
//
// A write that did not end well has ended the session, and with it this round.
// So the ranges behind the two holds cover all differences, after any crash of
// the process. After a power cut they do not: a disk can keep bytes whose record
// it lost. Then the hold is released, and what both nodes have that the source
// has not is compared by hashes, piece by piece, and copied where it differs.
//
// A node that joins gets every write from the beginning of the session, then,
// under each range's lock, a copy of what may differ, then flushes, and only
// then is made a member at the arbiter. A node that is no member cannot take
// over, so a half-copied one never does; when either side dies in the middle,
// both holds are where they were and the copy begins anew.
//
// # When the other node is lost
//
// Writes wait for it, for a second, and go on in a new session when it is back.
// Else (Degrade) the arbiter records that it is out, what was acknowledged is
// flushed, and from then on each write is synced before it is acknowledged; or
// (Wait) writes wait and reads go on. A primary that cannot reach the arbiter
// either waits: perhaps the other one has taken over.
//
// Reads need a lease (fence.Lease), looked at after the read: nobody else has
// answered anything before. The only member needs none. A primary that comes
// back after a power cut while the other one is a member lets that one take
// over, which has in memory what the disk may have lost. One whose process was
// restarted serves nothing until a session has made both nodes equal, or the
// other is recorded as out: the other may have a write that nobody was told of,
// and it must not show after it was not there.
//
// When the primary's own stack fails, the other node, which is in sync and had
// each change first, is handed the office (resign), and calls are routed anew.
//
// # Deadlocks
//
// Order of waiting: gate, slot, range, message, local stack. Who waits for a
// range, the gate or a standing holds nothing of the other node. A message of
// the primary waits at the secondary for its local stack only; a session's end
// ends that wait. A forwarded call is answered within two seconds, if only with
// "not now", and travels on a connection of its own, so that calls which wait
// at the primary never fill the connection its replication needs.
//
// Locks: life (for reading) outside all. Volume.mu, ranges.mu, gate.mu,
// inbound.mu, forwarder.mu and guests.mu are leaves; only Volume.mu may be held
// when fence's are taken.
//
// # Goroutines
//
// Run is the one that changes roles. While primary it has renew, beats, watch
// and tend beside it (office.go); resync adds its workers. A flush adds one for
// the length of its message. All end with Run. standing is the state that calls
// look at: it is replaced as a whole, and its channel wakes who waits.
//
// decide (roles.go) is the protocol of roles as a function.
package replica
