// Package fence decides who may write a volume. Two frontends hold it, one is
// primary; an arbiter beside them has the last word, so that two of three agree
// before the primary changes.
//
// The arbiter keeps a Record per volume: epoch, primary, members. A member is
// in sync: it has all that was acknowledged. Each change is durable before it
// is answered. A new primary is a new epoch, and whoever acts in an old one is
// refused: by the arbiter, by its peer, by the backend.
//
// # Why no two nodes serve
//
// Let P be primary in epoch e and S the next one, in e+1.
//
// Writes need no clock. P acknowledges a write when every member has it. While
// S is a member that takes S's word, and S gives none in epoch e once it knows
// of e+1: what it said yes to before, it has. When S is not a member, the
// arbiter gives it nothing, and P needs no word. The members are those at the
// arbiter: P acknowledges without S only after the arbiter has written down
// that S is out, and a takeover of e makes every later change by P fail. So
// every acknowledged write is at the primary that comes next.
//
// Reads need one, since P alone answers them. P may answer for LeaseTime (1 s)
// from the moment it sent a renewal that the arbiter answered, or a heartbeat
// that the member S answered. The arbiter grants a takeover only Grace (1.5 s)
// after the last renewal it answered, so that lease is over: the answer came
// after the sending, and clocks would have to differ by half in their rate. S
// serves nothing until Grace after the last heartbeat it answered (Witness), so
// that one is over too. Both count from their start when they have restarted,
// because they may have answered something just before. The moment that
// counts is when the lease is looked at, after the read was asked for: then the
// read may be answered even if the node stands still in between.
//
// A primary that is the only member needs no lease: nobody can take over,
// except by force, which is an operator's word that the primary is gone.
//
// A handover is decided by P itself, which ends its lease first and answers
// nothing until it knows the outcome. So S serves at once, without Grace.
//
// # Messages that come late or twice
//
// A request names the epoch and the version of the record it was made for, and
// takes effect on that one or never; each effect makes a new version. So a
// repeated request is granted once and answered as granted again, and a late
// one does nothing. A process that starts makes a new version by its first
// request, Claim, and so ends everything the process before it may still have
// on its way; Settle does the same in between. Until then the process answers
// no primary either (Client.MayAnswer): the one before it may have been primary
// of a later epoch. A request whose sender's
// connection has ended, or that waited long for a slow disk of the arbiter's,
// is not decided. When the arbiter cannot write a decision down, the disk may
// hold it nevertheless: it answers nothing about this volume, not even a
// renewal, until the disk holds what it knows.
//
// A dropped volume leaves an epoch of its own behind: no epoch comes twice.
//
// # Inside
//
// step is the arbiter as a function of record, request and time. Around it,
// Arbiter orders the requests of one volume one after the other (volume.turn)
// and keeps records in files (FORMAT.md). Client is a node's side; Lease and
// Witness are the two clocks. There is no goroutine.
//
// Lock order: volume.turn, then Arbiter.mu. Client.turn, then Client.mu, then
// Lease.mu. Files are written under a turn only, nothing is called under the
// other three.
package fence
