// Package raw serves a raw disk image or a block device of this machine as a
// block.Device, and owns it while it does.
//
// # Ownership
//
// A source that two programs write is lost, so a Claim comes before the first
// read. It is three locks, each against another kind of neighbour:
//
//   - flock(2) LOCK_EX against another Forerun and every tool that uses flock;
//   - the byte locks QEMU takes on its images (block/file-posix.c: byte 100+n is
//     held by who uses permission n, byte 200+n by who does not share it, all as
//     open-file-description read locks), so that a QEMU that wants to write
//     fails with `Failed to get "write" lock` and one that writes already is
//     noticed here;
//   - O_EXCL on block devices, which the kernel refuses while the device is
//     mounted or part of a volume group.
//
// All three end with the process, also with kill -9.
//
// # Content
//
// The device has the bytes of the file. A length that is not a multiple of 512
// is rounded up: the rest of the last sector reads as zeros and takes nothing
// but zeros, so the file keeps its length.
//
// Reads go through the page cache but do not stay in it (RWF_DONTCACHE, or
// POSIX_FADV_DONTNEED behind the reader), since a source is read once and the
// host's own workloads need the memory more. Measured against O_DIRECT with 64
// KiB and 1 MiB reads, sequential and random, all three were within the noise
// of the disk, and this one has no rules about alignment and keeps the kernel's
// read-ahead.
//
// # Invariants
//
//   - A failed fdatasync is remembered: the kernel forgets which pages it could
//     not write, so a later one would answer "durable" for bytes that are lost.
//     Every later Flush and FUA fails until the device is opened again.
//   - Trim leaves bytes as they were or makes them zero. Block devices are
//     never sent a plain discard, after which a read may give anything.
//
// Locks: Device.gate is held for reading by each call and for writing by Close.
// There is no other.
package raw
