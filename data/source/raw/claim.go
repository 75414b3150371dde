package raw

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"forerun/block"

	"golang.org/x/sys/unix"
)

// ClaimOptions say how a file is to be owned.
type ClaimOptions struct {
	// ReadOnly opens for reading even where writing is permitted.
	ReadOnly bool
	// Writer says that a child process (qemu-nbd) will write the file under
	// QEMU's own locks: the claim then holds flock and O_EXCL only, since the
	// byte locks would keep the child out.
	Writer bool
	// Log gets what could not be locked. Nil is silent.
	Log *slog.Logger
}

// Claim is exclusive ownership of a file or block device, and the descriptor
// it hangs on. It ends with Close or with the process.
type Claim struct {
	path   string
	fd     int
	size   int64
	device bool // a block device
	ro     bool
	nfs    bool
	id     string
}

// NewClaim opens path and takes every lock on it. It fails with KindBusy when
// somebody else uses it, KindNotFound, KindDenied, or KindInvalid when path is
// neither a regular file nor a block device.
func NewClaim(path string, o ClaimOptions) (*Claim, error) {
	const op = "source.open"
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	// Looked at before it is opened: opening a fifo would wait for a writer,
	// and opening some character devices does something.
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nil, block.E(op, path, 0, err)
	}
	c := &Claim{path: path, ro: o.ReadOnly, fd: -1}
	flags := unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFBLK:
		c.device = true
		flags |= unix.O_EXCL
	case unix.S_IFDIR:
		return nil, block.E(op, path, block.KindInvalid, errors.New("it is a directory; name a disk image or a block device"))
	default:
		return nil, block.E(op, path, block.KindInvalid, errors.New("it is neither a regular file nor a block device"))
	}
	if err := c.open(flags); err != nil {
		if errors.Is(err, unix.EBUSY) {
			err = errors.New("the device is in use: mounted, part of a volume group, or held by another program; release it there first")
			return nil, block.E(op, path, block.KindBusy, err)
		}
		return nil, block.E(op, path, 0, err)
	}
	err := c.lock(o, st)
	if err == nil {
		err = c.measure()
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// open opens for writing where that is wanted and permitted, else for reading.
func (c *Claim) open(flags int) (err error) {
	if !c.ro {
		c.fd, err = openRetry(c.path, flags|unix.O_RDWR)
		switch {
		case err == nil:
			// Newer kernels refuse only the first write to a read-only device.
			if c.device {
				ro, err := unix.IoctlGetInt(c.fd, unix.BLKROGET)
				c.ro = err == nil && ro != 0
			}
			return nil
		case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM), errors.Is(err, unix.EROFS):
			c.ro = true
		default:
			return err
		}
	}
	c.fd, err = openRetry(c.path, flags|unix.O_RDONLY)
	return err
}

func openRetry(path string, flags int) (int, error) {
	for {
		fd, err := unix.Open(path, flags, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// lock takes the locks, and makes sure that what was opened is what was looked at.
func (c *Claim) lock(o ClaimOptions, want unix.Stat_t) error {
	const op = "source.open"
	var st unix.Stat_t
	if err := unix.Fstat(c.fd, &st); err != nil {
		return block.E(op, c.path, 0, err)
	}
	if st.Dev != want.Dev || st.Ino != want.Ino || st.Mode&unix.S_IFMT != want.Mode&unix.S_IFMT {
		return block.E(op, c.path, block.KindBusy, errors.New("it was replaced by another file while it was opened"))
	}
	// NFS turns flock into a byte lock over the whole file, which would keep a
	// child's QEMU locks out and needs a descriptor open for writing.
	var fs unix.Statfs_t
	c.nfs = unix.Fstatfs(c.fd, &fs) == nil && fs.Type == unix.NFS_SUPER_MAGIC
	if c.nfs {
		o.Log.Warn("the file is on NFS: only QEMU's byte locks protect it, not flock", "path", c.path)
	} else if err := unix.Flock(c.fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return block.E(op, c.path, block.KindBusy, errors.New("another program holds a lock on it (flock), perhaps another Forerun backend; stop that one first"))
		}
		return block.E(op, c.path, 0, fmt.Errorf("flock: %w", err))
	}
	perm, share := permRead, permRead|permWriteUnchanged
	if !c.ro {
		perm |= permWrite
	}
	err := error(nil)
	if !o.Writer {
		err = lockQEMU(c.fd, perm, share)
	}
	if err == nil {
		err = heldQEMU(c.fd, perm, share)
	}
	var held *heldError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &held):
		return block.E(op, c.path, block.KindBusy, err)
	case c.nfs:
		return block.E(op, c.path, 0, err) // nothing would be left
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOLCK), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
		o.Log.Warn("the file system has no byte locks: a QEMU that opens the image is not kept out", "path", c.path, "err", err)
		return nil
	}
	return block.E(op, c.path, 0, err)
}

// measure finds the length and the identity.
func (c *Claim) measure() error {
	const op = "source.open"
	if c.device {
		n, err := unix.Seek(c.fd, 0, unix.SEEK_END)
		if err != nil {
			return block.E(op, c.path, 0, err)
		}
		c.size = n
	} else {
		var st unix.Stat_t
		if err := unix.Fstat(c.fd, &st); err != nil {
			return block.E(op, c.path, 0, err)
		}
		c.size = st.Size
	}
	if c.size == 0 {
		return block.E(op, c.path, block.KindInvalid, errors.New("it is empty: a disk of 0 bytes cannot be served"))
	}
	c.id = identify(c.path, c.fd, c.device)
	return nil
}

// Path is the path the claim was made with.
func (c *Claim) Path() string { return c.path }

// Size is the length in bytes of the file or device.
func (c *Claim) Size() int64 { return c.size }

// ReadOnly says that the file cannot be written through this claim.
func (c *Claim) ReadOnly() bool { return c.ro }

// ID names the file independently of its content and length, see block.Info.ID.
// It is empty if nothing is known.
func (c *Claim) ID() string { return c.id }

// ReadAt reads the bytes of the file as they are.
func (c *Claim) ReadAt(p []byte, off int64) (int, error) { return pread(c.fd, p, off) }

// Close gives the file back.
func (c *Claim) Close() error {
	if c.fd < 0 {
		return nil
	}
	err := unix.Close(c.fd)
	c.fd = -1
	if err != nil {
		return block.E("source.close", c.path, 0, err)
	}
	return nil
}

// identify gives a name that follows the file through renames and reboots, but
// not to another file: inode and time of birth; a device's own serial number.
// Device numbers may change between boots and are the last resort.
func identify(path string, fd int, device bool) string {
	if !device {
		var sx unix.Statx_t
		err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_INO|unix.STATX_BTIME, &sx)
		if err == nil && sx.Mask&unix.STATX_BTIME != 0 {
			return fmt.Sprintf("file:%d:%d.%09d", sx.Ino, sx.Btime.Sec, sx.Btime.Nsec)
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err == nil {
			return fmt.Sprintf("file:%d:dev%d", st.Ino, st.Dev)
		}
		return ""
	}
	sys := sysfs(fd)
	for _, d := range []string{"", ".."} { // a partition's serial is its disk's
		for _, f := range []string{"dm/uuid", "md/uuid", "wwid", "device/wwid", "device/serial", "serial"} {
			if b, err := os.ReadFile(filepath.Join(sys, d, f)); err == nil && len(b) > 1 {
				part, _ := os.ReadFile(filepath.Join(sys, "partition"))
				return fmt.Sprintf("device:%q:%q", bytes.TrimSpace(b), bytes.TrimSpace(part))
			}
		}
	}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	return fmt.Sprintf("device:%s", path)
}

// sysfs is the directory of a block device in sysfs, resolved so that ".." is
// the disk of a partition.
func sysfs(fd int) string {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return ""
	}
	dir, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev))))
	if err != nil {
		return ""
	}
	return dir
}
