// Package source opens the disk a workload had at its old home, whatever holds
// it, and owns it: nobody else writes it while it is open.
//
// A source is named by one string:
//
//	/path/to/disk.img, /dev/vg/lv             a raw image or block device (package raw)
//	/path/to/disk.qcow2?format=qcow2          an image read by a qemu-nbd of our own; also
//	                                          vmdk, vpc (VHD) and vhdx; raw says "the bytes as they are"
//	nbd://host:port/export, nbd+unix:///export?socket=/path,
//	nbds://…?tls-certificates=DIR             an NBD server (package nbd)
//
// The format is never guessed. A guest can write anything to the first sector
// of its raw disk, so guessing would let it choose which files of the host are
// opened as backing files; and an image served as raw by mistake is a corrupt
// disk. A file that looks like an image and has no ?format= is refused.
//
// # Images
//
// Parsers of other people's formats are large and meet hostile bytes, so they
// run in a process of their own: qemu-nbd, the reference for all of them, on a
// unix socket in a directory nobody else may enter. Image starts it, starts it
// again if it dies (the NBD client waits and sends its requests again), and
// ends it with Close; it ends by itself if this process dies. Images are read
// only unless Options.WriteImages says otherwise.
//
// While an image is served read-only this process holds QEMU's byte locks
// against writers itself, so a restart of qemu-nbd leaves no gap. While it is
// written, qemu-nbd holds them.
//
// # Goroutines
//
// An Image has one goroutine (supervise), locked to its thread because the
// kernel ties the child's death signal to the thread that started it. Close
// waits for it. Everything else belongs to the packages below.
package source
