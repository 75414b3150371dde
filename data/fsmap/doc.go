// Package fsmap knows which parts of a disk its file systems do not use.
//
// Free finds the partition table and in each partition, or on the whole disk,
// an ext2, ext3, ext4, XFS or NTFS file system, and gives a Map of what is free
// in them. Watch is the storey that tells it: its Extents call data that is
// free block.Free, which still reads as whatever is there. What it does not
// know (other file systems, LVM, RAID, encryption, swap, gaps between
// partitions) is data.
//
// # Invariants
//
//   - A file system counts only when it is certainly consistent: unmounted
//     cleanly, all checksums and counts right, no feature that is not known, one
//     signature and no other. Else its space is data and the reason is kept.
//   - The map is of one moment at which nobody wrote. A write during the
//     reading throws it away; a write after it takes the range out of the map
//     before the bytes change. So a range that the map calls free has not been
//     written since no file system used it.
//   - Nothing here changes what a read returns.
//   - Memory is bounded: a bit for each unit where units differ, in pages of
//     32768, and nothing where they are alike. Reading is bounded by the size of
//     the file systems' own maps, and ends with its context.
//
// The parsers are pure readers of bytes that a stranger may have written. They
// check every offset before they use it, and are fuzzed.
//
// Locks: Map.mu, held for a few words at a time. Watched.mu, never while the
// device below is called.
package fsmap
