// Package linktest measures the line between two sites with the backend's own
// port and certificates, before anything is moved: rate, round trip, loss, and
// how long the round trip gets when the line is full. SPEC.md says what is on
// the wire.
//
// The server part, Server.Attend, is one more protocol of the backend's port.
// The client part, Run, makes one connection for pings, which goes on during
// the whole test, and for each phase fresh connections that carry bulk in one
// direction. Result.Expect turns what was measured into what a migration
// over this line will be like; it is a pure function.
//
// How it is measured:
//
//   - A rate is that of a window: it begins when slow start is behind
//     (a second or ten round trips, at most half of the phase) and ends when the
//     first connection of the phase has ended. It is counted where the bytes
//     arrive: at the client for a download, at the server, which reports as it
//     reads, for an upload. So what still lies in a queue is not counted.
//   - The round trip under load is that of pings sent inside the window, on a
//     connection of their own. They are sent without waiting for one another,
//     or a long queue would be seen by few of them.
//   - Loss is what the sender's TCP sent again, of what it sent, inside the
//     window. The sender is the server for a download, so it reports its
//     counters. They include what a phase's own queue overflow caused.
//
// Invariants:
//
//   - The server sends and takes for at most MaxDuration an order, holds a
//     bounded number of tests and of connections of one peer, and allocates
//     nothing by what a client says.
//   - Nothing is begun while ServerOptions.Busy gives a reason, unless the client
//     has said that it knows.
//   - Attend returns soon after its context has ended: the connection below
//     TLS is closed, whatever it waits for.
//   - All of a client's connections and goroutines have ended when Run returns.
//
// Locks: Server.mu guards the counts of tests and connections, pinger.mu what
// was sent and answered. Both are leaves; no I/O is done under them.
package linktest
