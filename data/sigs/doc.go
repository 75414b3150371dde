// Package sigs remembers what a backend learned of every chunk of a source, so
// that nothing is hashed twice: not for a second frontend, not for a volume
// that is opened again, not after a restart.
//
// A Table holds for each chunk: unknown, zero, or data with the SHA-256 of its
// plain bytes. The signature is never keyed; whoever needs one of a dedup
// domain derives it with chunk.Key.Of. A Table may forget at any time and must
// never be wrong: a signature that is not that of the source's bytes would make
// the other side serve bytes of something else. Watch keeps a table true while
// the source is written, and a Scanner learns what nobody has asked for yet.
//
// # What is believed
//
// Learning races with writing, so a Token is taken before the bytes are read
// from the source. Change moves the generation of the chunks' stripe on, at its
// beginning and at its end, and Learn ignores what has a token of another one.
//
// What lies in the file is believed by the next process only while nobody
// changed the source since. Somebody else's changes show in the source's change
// state (FileState), a string that is compared. Our own are told by the file
// itself: before the first Change goes on, the header says "dirty" durably, and
// only Settle or Close, when the source was flushed and nothing was being
// changed, make it clean again. See FORMAT.md for each moment a crash can come at.
//
// Invariants:
//
//   - While the header is clean, every version of every page that the platter
//     may hold, and every entry of the summary, says only what is true of the
//     source in the recorded state.
//   - A page whose summary entry is none or zero is void in the file: never
//     written, punched, or without a right checksum. So no old content can come
//     back below an entry that speaks of a new one.
//   - A table whose file fails turns itself off: it answers unknown, ignores what
//     it is told, and has done what it could for the file not to be believed.
//     The source's calls go on.
//
// # Memory
//
// Two bytes a page (126 chunks) for the summary, allocated where there is
// something to say, and at most one page of the file for each of 256 stripes:
// 1 MiB and 256 KiB for each TiB in chunks of 64 KiB. Get costs at most one read of 4 KiB.
//
// # Locks
//
// In this order: Table.settling, Table.saving, stripe.mu, Table.head. No two
// stripes are held at once. Settle and Close hold head alone while they decide
// that nothing was changed, so a Change registers (counters, stripes) before it
// looks at head. Calls of the source's state function are made under settling.
package sigs
