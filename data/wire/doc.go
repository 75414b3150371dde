// Package wire carries chunks from a backend to a frontend over a WAN. SPEC.md
// says what is on the wire; this page says how the two ends work.
//
// A session is one demand connection and a few background connections, each
// mutual TLS 1.3. What the workload waits for travels alone on the demand
// connection, so that it never stands behind bulk data in a socket.
//
// The server (Server) keeps every chunk asked for as a job in one priority
// queue (queue.go). Jobs leave it in runs of adjacent chunks, are read from the
// source many at a time, sealed, and put on the out list of the connection
// they go to, where the connection's sender (send.go) takes them. A
// connection has a budget of bytes between queue and socket; a peer that does
// not read stops its own jobs and nobody else's. While demand is under way the
// background senders wait, though never longer than a floor allows.
// How fast they go otherwise says the session's pacer (pace.go), from what the
// kernel measures: the link full, its queue a few milliseconds. A source that is
// busy elsewhere is noticed too (load.go). Both are pure, and are played
// against a path and a disk in arithmetic.
//
// Five rules keep background from hurting demand where the network does not:
// the pace of the server, the client's window (package sched), the bound on
// source reads, the order of the queues, and a floor for background in each.
// With ServerOptions.Ready they are left to the network.
//
// What the client's site holds need not cross (site.go, holdings.go): the
// client tells the 40-bit marks of its signatures, the server answers by
// signature what it believes to be there, and announces it unasked where the
// signatures are known before the bytes are wanted (announce.go). A wrong guess
// costs a second request, never a wrong byte: what is held is found by the
// whole signature, at the client.
//
// The client (Client) keeps every chunk wanted until it was delivered. A
// connection that dies takes nothing with it: what it had been asked for goes
// back into the client's queue and is asked for again when the link is back.
// Callers only notice that it took longer.
//
// Invariants:
//
//   - Each chunk of a Fetch is delivered exactly once, with data or with an error.
//   - No chunk is delivered from a volume whose size or content ID differs from
//     what Open returned.
//   - The number of chunks outstanding on a connection is at most the credit the
//     server gave; memory on both sides follows from that and the budgets.
//   - Nothing a peer sends makes the other side allocate more than MaxPayload
//     before it was checked against what is outstanding.
//   - The kernel holds little unsent data (TCP_NOTSENT_LOWAT), so what is sent
//     next is decided here. The send buffer itself is left to the kernel: a
//     small SO_SNDBUF would bound the window and with it the rate at a long RTT.
//
// Goroutines. Server.Serve starts two or three per connection (reader,
// sender, and one per OPEN or EXTENTS under way) and one per source read under
// way; it returns when all have ended. Dial starts one per connection
// to be kept (the dial loop), which starts reader, sender and pinger of the
// living connection and waits for them; Client.Close waits for all.
//
// Goroutines of dedup: at the client one per site on the first background
// connection; at the server one per volume that a connection was told to TELL of.
//
// Locks. A view's lock is a leaf, taken under no other; Site.mu is before
// telling.mu, both leaves of whoever calls Added and Gone. Server.mu guards queue, sessions, jobs and out lists; Client.mu
// guards the same on the other side. Under either only the leaf lock of an RTT
// estimate is taken, no I/O is waited for and no function of a caller is called.
// A connection's TLS state is written by its sender alone.
package wire
