// Package msg carries requests and answers over one connection, in both
// directions at once. SPEC.md says what is on the wire.
//
// A Conn is one living connection: Call sends a request and waits for its
// answer, Options.Serve answers those of the other side. A Client keeps a Conn
// to one address alive; Listen is its counterpart. What the requests mean is
// up to the rooms above.
//
// Invariants:
//
//   - The reader of a connection never waits for anything but bytes: how many
//     requests and how many bytes of them may be under way is agreed at the
//     start (the hello), and the caller waits, not the socket. So a request
//     whose answer needs a request in the other direction cannot block itself,
//     and a peer that breaks the agreement is cut off.
//   - A request counts until its answer has come, even when its caller has
//     given up meanwhile.
//   - Types from Urgent up have a queue and a limit of their own and overtake
//     others between two frames: a heartbeat does not stand behind data.
//   - Payloads are copied into the queue: a caller whose context ends returns at
//     once and owns its bytes.
//   - A connection is alive as long as bytes arrive, what is written leaves, and
//     pings are answered. The last one finds a line that works one way only.
//     All three are counted in ticks of a quarter of Options.Idle that this
//     process really saw, so a machine that was stopped for a while does not
//     condemn its peers when it wakes.
//
// Goroutines: Run has a reader, a writer and a ticker, and ends when all three
// have. Each request of the other side is served on a goroutine that is kept
// for later ones; it may outlast Run (Wait waits for it), so that a slow one
// does not hold up a new connection.
//
// Locks: Conn.mu guards queues, calls and credit, Client.mu the current
// connection. Both are leaves: nothing is called and no I/O is done under them.
package msg
