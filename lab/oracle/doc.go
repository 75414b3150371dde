// Package oracle knows what a disk may answer: it keeps the history of every
// sector that a load wrote, with what was acknowledged and what was flushed,
// and judges each byte that is read.
//
// The content of a sector is a function of the seed, the sector's number and
// the version that wrote it, and names all three, so that a wrong sector tells
// where its bytes came from: an older version, another place, another disk,
// or nowhere.
//
// The rules are those of package block and of every disk:
//
//   - While nothing crashed, a read answers the newest acknowledged write. A
//     write whose outcome is unknown (its connection ended) may have happened.
//   - After a crash a sector holds the newest write that was flushed (or had
//     FUA), or any one issued after it, whole.
//   - What was once read after a crash stays: newer versions are gone for good.
//
// Writes to one sector never overlap in time; Begin refuses them.
//
// Lock order: History.mu is the only lock.
package oracle
