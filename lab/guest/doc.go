// Package guest makes and runs real virtual machines: a Debian disk image
// built from packages, with a boot loader, a kernel and services, and QEMU to
// boot it from a file or over NBD.
//
// An image is a raw disk with an MBR partition table and one ext4 partition,
// booted by extlinux inside the image, so that everything from the first
// sector on is read from the disk under test. Images are built once per
// recipe, cached read-only and copied sparsely.
//
// Inside the guest an agent (files/agent) listens on a virtio serial port,
// says READY when multi-user.target is reached, and runs commands for the
// host; files/load writes and verifies files and keeps a write load.
//
// Invariants:
//
//   - A cached image is never written: its file is read-only and its name
//     holds the hash of all that went into it.
//   - A cache entry is complete or absent: it is built beside and renamed.
//   - A QEMU that was started here is waited for, and dies with this process.
//
// Building needs root, loop devices and mmdebstrap, mkfs.ext4, sfdisk and extlinux.
package guest
