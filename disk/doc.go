// Package disk is the only door to the files that Forerun keeps: open, read,
// write, sync, rename, punch. Rooms that own bytes take an FS and never call
// package os for them, so that the twin in disk/disktest can stand in, crash,
// tear writes and fail any call.
//
// What a caller may rely on after a crash or power cut: bytes of a file are
// there after Sync returned; a name (created, renamed or removed) is there
// after SyncDir of its directory returned. Anything later may be there, in
// part, or not at all.
package disk
