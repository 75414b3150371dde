// Package cache keeps plain chunks near: in memory, and in a disposable file on
// a local disk. It stands beside one volume and loses nothing when it is
// wiped, which New does.
//
//	Memory   whole chunks, shared by the volumes of a process under one budget
//	scratch  whole chunks in the slots of one file, one per volume
//
// What demand brings goes to scratch, and to memory when it is touched again;
// without scratch it goes to memory at once. What the background brings takes
// only room that is free: it never drives out what demand brought. Scratch takes
// of it what is expected to be read soon: a write of plain bytes costs more than
// to unpack the chunk when it is read, and most of a disk never is.
//
// Memory follows S3-FIFO (Yang et al., "FIFO Queues are All You Need for Cache
// Eviction", SOSP 2023): a small queue for what is new, a main queue for what was
// touched there, and a list of names that left the small one untouched. A hit
// only counts in the entry, so readers share the lock. Scratch is a
// second-chance queue in front of which all background chunks leave first.
//
// # Invariants
//
//   - A hit returns the bytes that were put, or there is no hit: scratch keeps a
//     CRC-32C per 4 KiB in memory, checks it on each read and drops the chunk
//     when it does not match.
//   - A slot's bytes are read without a lock. Its generation changes when it
//     is given up, before it can be written again, and is compared after the read.
//   - After Drop returned, the chunk is not found until it is put again.
//   - A scratch file that cannot be written costs hits, not errors.
//
// Lock order: scratch.mu, then a shard of Memory; neither is held during file reads or writes.
package cache
