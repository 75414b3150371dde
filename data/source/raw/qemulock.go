package raw

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// The permissions of QEMU's block layer that have a byte in its lock protocol
// (include/block/block-common.h), as bits.
const (
	permRead           = 1 << 0
	permWrite          = 1 << 1
	permWriteUnchanged = 1 << 2
	permResize         = 1 << 3
	permCount          = 4

	lockPermBase   = 100 // RAW_LOCK_PERM_BASE
	lockSharedBase = 200 // RAW_LOCK_SHARED_BASE
)

var permNames = [permCount]string{"consistent read", "write", "write unchanged", "resize"}

// heldError says that another open file has what we will not share, or does
// not share what we need.
type heldError struct {
	perm   int
	shared bool
}

func (e *heldError) Error() string {
	if e.shared {
		return fmt.Sprintf("another program (a running QEMU?) allows nobody else %q on the image; shut that machine down first", permNames[e.perm])
	}
	return fmt.Sprintf("another program (a running QEMU?) has the image open for %q; shut that machine down first", permNames[e.perm])
}

// lockQEMU takes the locks of QEMU's protocol for the permissions perm, while
// others may have those in share. As in QEMU, all are taken first and looked
// for (heldQEMU) afterwards, so that of two who start at once one notices.
func lockQEMU(fd, perm, share int) error {
	for i := range permCount {
		if perm&(1<<i) != 0 {
			if err := setByte(fd, lockPermBase+int64(i)); err != nil {
				return err
			}
		}
		if share&(1<<i) == 0 {
			if err := setByte(fd, lockSharedBase+int64(i)); err != nil {
				return err
			}
		}
	}
	return nil
}

// heldQEMU fails with a *heldError if another open file does not share one of
// the permissions perm, or uses one that is not in share.
func heldQEMU(fd, perm, share int) error {
	for i := range permCount {
		if perm&(1<<i) != 0 {
			if held, err := byteHeld(fd, lockSharedBase+int64(i)); err != nil {
				return err
			} else if held {
				return &heldError{i, true}
			}
		}
		if share&(1<<i) == 0 {
			if held, err := byteHeld(fd, lockPermBase+int64(i)); err != nil {
				return err
			} else if held {
				return &heldError{i, false}
			}
		}
	}
	return nil
}

func setByte(fd int, at int64) error {
	l := unix.Flock_t{Type: unix.F_RDLCK, Whence: unix.SEEK_SET, Start: at, Len: 1}
	for {
		err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l)
		switch err {
		case nil:
			return nil
		case unix.EINTR:
		case unix.EAGAIN, unix.EACCES: // a write lock; QEMU takes none
			return fmt.Errorf("another program holds a write lock on the image: %w", unix.EBUSY)
		default:
			return fmt.Errorf("byte lock: %w", err)
		}
	}
}

func byteHeld(fd int, at int64) (bool, error) {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Start: at, Len: 1}
	for {
		err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l)
		switch err {
		case nil:
			return l.Type != unix.F_UNLCK, nil
		case unix.EINTR:
		default:
			return false, fmt.Errorf("byte lock: %w", err)
		}
	}
}
