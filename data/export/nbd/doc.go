// Package nbd serves block devices over the NBD protocol, fixed newstyle, as
// the NBD project's doc/proto.md defines it, on TCP and Unix sockets, with and
// without TLS.
//
// The idea: a request that can be answered at once is answered by the
// goroutine that read it, because a hand-over costs more than a local read of
// 4 KiB; a request that may wait (for the link, for a sync, for another
// request) is handed to a worker, so that it holds up nobody. Who reads the
// socket is the connection's leader. Whether a request can be answered at once
// is said by Options.Near and by how long the last ones took, and may be said
// wrongly: a watch looks at every leader once a millisecond and, finding one
// held up, lets another goroutine lead. The leader held up finishes its request
// and goes.
//
// Replies are queued per connection, and whoever queues one while nobody sends
// sends all there are with one system call. The leader sends when it has no
// further whole request at hand.
//
// Invariants:
//
//   - A write's payload is read whole before the device sees any of it, and
//     a write once begun is not cancelled when its connection ends. One that has
//     lain for long (the process stood still) is not begun when the client has
//     gone meanwhile, and devices can ask the same (block.OriginGone): the
//     client may have had it made elsewhere, and written anew.
//   - Nothing is sent for a read before the device has given all its bytes, so
//     an error is always reported as one.
//   - A device with blocks is only called with whole blocks. Parts of blocks are
//     read, changed and written under a hold on those blocks that also
//     excludes whole writes to them, on any connection (holds).
//   - Per connection, requests and their buffers are bounded; beyond the
//     bound the leader stops reading. What the client claims is never allocated
//     before it is checked.
//   - Every byte of a request is consumed even when it is refused, or the
//     connection ends.
//   - The goroutines of a connection have all ended when its handler returns,
//     and all handlers have ended when Serve returns.
//
// SPEC.md lists what the server does where the specification leaves a choice.
//
// Lock order: Server.mu, then conn.mu; watch.mu and holds.mu are taken with
// none of them held and hold none.
package nbd
