// Package disktest is the twin of package disk: a file system in memory that
// can lose power, kill its process, run full and fail call N.
//
// What is on the platter and what a reader sees are kept apart. For each file
// there are the pages a reader sees and, for every page written since the last
// Sync, what the platter held before (and one version in between, when it was
// written more than once). For names there are the durable names and the list
// of changes since. A power cut (Crash, Image) then chooses by seed, for each
// 512-byte sector, whether the platter has the old bytes, the new ones, some
// in between or a torn mix; for each length, the old, the new or one between;
// for each changed name, whether the change happened. Changes that touch the
// same name happen in order, and a rename happens whole or not at all, as file
// systems with a metadata journal do; nothing else is ordered.
//
// A failed Sync is as treacherous as Linux makes it: the pages it should have
// written count as clean afterwards, so that a later successful Sync does not
// save them unless they are written again (see "Can Applications Recover from
// fsync Failures?", Rebello et al., USENIX ATC 2020).
//
// Invariants:
//
//   - With the same seed and the same calls in the same order, everything
//     comes out the same.
//   - What package disk promises after a power cut holds in every image.
//   - A page that is not in inode.dirty is never changed in place, so images
//     share pages with the FS they came from.
//   - Directories are durable at once, as MkdirAll of disk.OS makes them.
//
// Lock order: there is one lock, FS.mu. Hooks run without it.
package disktest
