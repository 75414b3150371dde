// Package nbd is an NBD client that is a block.Device: a disk exported by
// qemu-nbd, nbdkit, nbd-server, a storage array or another Forerun. It follows
// the NBD project's doc/proto.md (fixed newstyle) and doc/uri.md.
//
// # One flow
//
// A call (client.go) is cut into pieces the server accepts (pieces.go), each
// piece is a request that takes a place on a connection (conn.go), the
// connection's receiver answers it (reply.go), and if the connection breaks
// before, the same goroutine takes it to the next connection (lane.go). The
// goroutine that made the call owns the buffer all the time, so there is no
// queue of copies and nothing to hand over.
//
// A lane is the place of one connection: its goroutine dials, receives until
// the connection breaks, and dials again with back-off. There is one lane, or
// Options.Connections when the server says that its connections are coherent
// (CAN_MULTI_CONN). After a reconnect the export must be what it was: another
// size ends the client for good, with KindCorrupt.
//
// # What a lost connection means
//
// Requests under way are sent again: all NBD requests are idempotent. Two
// things the protocol cannot tell the client are handled thus:
//
//   - Writes acknowledged but not yet flushed are lost if the server restarted.
//     So the first Flush after losing a connection that had any fails with
//     KindIO, and whoever wrote since the last good Flush must write again (a
//     checkpoint journal does). Flushes go to the oldest connection: one that
//     succeeds there was not preceded by a restart that went unnoticed.
//   - A server that is alive but could no longer be reached may carry out an old
//     copy of a write after a newer one to the same bytes. Connections are
//     therefore given up late (TCP keepalive, about a minute) and never for
//     slowness; a server that died took its old requests with it. Whoever
//     needs certainty over a link that fails flushes before writing the same
//     bytes twice.
//
// Whoever has another way to the same disk need not wait for any of that: Ping
// (alive.go) asks whether the server still answers, Abort gives it up at once,
// and Options.KeepsWrites says that its acknowledgements outlive it.
//
// A caller whose context ends leaves a read at once; a request that changes
// the disk is waited for a little longer (graceChange), so that it rarely
// happens after the caller went on.
//
// # Hostile servers
//
// Every length the server sends is bounded before memory is given; the bytes of
// a read must be covered exactly once, by whatever chunks; violations drop the
// connection, and a request that meets them again and again fails with KindIO.
//
// # Locks, in order
//
// Client.gate (calls against Close) → Client.edges (writes of part of a
// server's block against all others) → Client.mu (lanes) → conn.wlock (sending)
// → conn.mu (the table). flushState.mu is a leaf.
package nbd
