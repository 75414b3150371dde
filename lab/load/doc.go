// Package load writes to a disk over NBD as a busy guest does, and remembers
// what it was promised.
//
// Client is a small NBD client with nothing between the caller and the wire:
// no retry, no reconnect, no cache. When its connection ends, every request
// under way fails, and whether it happened is unknown: that is what a guest
// sees when a server dies, and what package lab/oracle judges by.
//
// Run drives a Client with a random mix of writes, writes of zeros, reads and
// flushes, reports each step to the oracle, and ends at the first error.
//
// Invariants: a request is reported begun before it is sent and acknowledged
// after its reply; a read is judged against the history with no write to the
// same sectors under way.
package load
