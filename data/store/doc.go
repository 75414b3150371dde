// Package store keeps the chunks of a site: each once, whatever volume or
// machine it came from, compressed as it came over the link, found by the
// signature of its plain bytes.
//
// The idea: a pack is a log of self-describing records, and the block map
// (signature -> pack, offset, length, codec, ...) is only a faster way to find
// them. So a chunk is durable with one fdatasync of its pack. The map is
// written behind the log now and then (a checkpoint); Open reads what the log
// holds after the last checkpoint, and can build the whole map from the packs
// when it is missing or damaged. FORMAT.md has the bytes.
//
// # Regions
//
// A region is a chunk that was cut by its content (internal/chunk). Under its
// signature lies its recipe, which lists pieces, and these are chunks like all
// others: shared by regions, moved, swept and evicted one by one. What holds a
// region together is checked when it is used: Get and Has of one that lacks a
// piece find that it is not held, and forget it. Has true means that recipe and
// pieces are all in the map, and a Sweep under way keeps them.
//
// # Bound
//
// With Options.LimitBytes the store is a cache: whole packs go, those first that
// were read longest ago. It writes nothing for it, so a full disk is no hindrance, and a Put
// that finds the disk full has packs go too. Whoever refers to chunks of a bounded
// store must be able to fetch them again.
//
// # Invariants
//
//   - No wrong byte: every Get opens the chunk and verifies its signature.
//     What fails is dropped from the map, so that a later Put stores it again.
//   - Durable after Sync: Sync returns nil only after every record put before
//     it, and the name of its pack, was synced without an error. A record that
//     a failed sync may have lost (Linux calls its pages clean afterwards;
//     Rebello et al., "Can Applications Recover from fsync Failures?", USENIX
//     ATC 2020) is suspect: it is read back, checked and written to another pack
//     before the next Sync may succeed. Records found beyond the checkpoint by
//     Open are suspect too, because the process that wrote them may have seen
//     such a failure. (Not when the map is lost and the log longer than four
//     checkpoints: then its records are synced once more where they are.)
//   - Data before map: a run holds only records that were synced before it,
//     a manifest names only runs that were synced before it.
//   - A record is never overwritten and a pack's number never used again. A
//     map entry of a pack that is gone counts as no entry. That is why a pack
//     may go before the map has forgotten it, and Sweep works on a full disk.
//   - Bytes that may be torn are never appended to: after anything but a clean
//     Close, Open begins a new pack. After a failed write the next one goes
//     over what it left.
//
// # The block map
//
// The newest entries are in memory (mem, and imm while a checkpoint writes
// it); older ones are in sorted runs, see internal/runs. It is not
// pebble, which was tried first: pebble v2.1.7 ends in Logger.Fatalf, which must
// not return, when a write of its log or of its MANIFEST fails with ENOSPC (with
// DisableWAL too), so a store on a full disk could neither refuse a Put nor go
// on when space returns. The log that a database needs exists here already:
// it is the packs. What remains is small because keys are hashes of one length
// and entries have one size. It costs 60 bytes of disk and 1.1 bytes of memory
// per chunk, 18 MiB per TiB of 64 KiB chunks; a checkpoint every 64 MiB keeps
// what Open has to read small.
//
// Deletions are not in the log. They are durable through a checkpoint, which
// Sync makes when there are any; building the map anew from the packs brings
// deleted chunks back until the next Sweep. They are the right bytes, so this
// costs space only.
//
// # Locks, in this order
//
//	gate     held for reading by every call, for writing by Close
//	maint    merges, Sweep, repair: who takes runs away or rewrites packs
//	bundles  held for reading by PutBundle, for writing where a sweep begins
//	flights  one Put of a signature at a time; that of a region before its pieces
//	evictMu  one eviction at a time
//	syncMu   syncs, checkpoints, the manifest; who takes packs away
//	appendMu the end of the log: the active pack, the lists of unsynced packs
//	mu       the map in memory, the version (list of runs), the table of packs
//	fileMu   the cache of files open for reading
//	notices  the queue for OnAdd and OnGone
//
// live, the callback of Sweep, is called without any but gate and maint; that of Each,
// OnAdd and OnGone without any.
package store
