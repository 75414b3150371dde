package sigs

import (
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"

	"forerun/block"
	"forerun/disk"
)

// localFS are the file systems (statfs(2)) that stamp a change with this
// machine's clock, to the nanosecond or, with small inodes, to the second. One
// that another machine serves may show what it cached, by another clock.
var localFS = map[uint32]bool{
	0xef53:     true, // ext2, ext3, ext4
	0x58465342: true, // XFS
	0x9123683e: true, // btrfs
	0x01021994: true, // tmpfs
	0xf2f52010: true, // F2FS
	0x2fc12fc1: true, // ZFS
	0xca451a4e: true, // bcachefs
	0x794c7630: true, // overlay
}

const (
	// A time stamp is up to one tick (10 ms) behind the clock: a file that was
	// changed within the last one can change again and look the same.
	tick     = 30 * time.Millisecond
	longTick = 1100 * time.Millisecond // where stamps are whole seconds
	mostWait = 100 * time.Millisecond
)

// FileState is the change state of a source that is the regular file path: two
// calls answer the same only if nobody changed it in between. It is "" where
// that cannot be told: for block devices, URIs and images with ?format=, for
// files on network file systems, and for one that somebody goes on changing. A
// change of the last moments is waited for to be past, at most about 100 ms.
//
// The state is of this boot of the system only. After a power cut a file can
// have newer bytes than its time stamps say, so stamps of another boot prove
// nothing about what others wrote. Errors are those of stat(2).
func FileState(path string) (string, error) {
	if strings.Contains(path, "://") {
		return "", nil
	}
	if name, format, ok := strings.Cut(path, "?format="); ok {
		if format != "raw" { // other files may belong to the image
			return "", nil
		}
		path = name
	}
	boot, err := bootID()
	if err != nil {
		return "", block.E("sigs.state", path, 0, err)
	}
	for end := time.Now().Add(mostWait); ; {
		info, err := os.Stat(path)
		if err != nil {
			return "", block.E("sigs.state", path, 0, err)
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok || !info.Mode().IsRegular() {
			return "", nil
		}
		var fs syscall.Statfs_t
		if err := syscall.Statfs(path, &fs); err != nil {
			return "", block.E("sigs.state", path, 0, &os.PathError{Op: "statfs", Path: path, Err: err})
		}
		if !localFS[uint32(fs.Type)] {
			return "", nil
		}
		// Every change sets ctime to the clock; mtime can be set to anything.
		past := tick
		if st.Ctim.Nsec == 0 {
			past = longTick
		}
		wait := time.Until(time.Unix(st.Ctim.Unix()).Add(past))
		if wait <= 0 {
			return fmt.Sprintf("file dev=%d ino=%d size=%d mtime=%d ctime=%d boot=%s",
				st.Dev, st.Ino, st.Size, st.Mtim.Nano(), st.Ctim.Nano(), boot), nil
		}
		if time.Now().Add(wait).After(end) {
			return "", nil
		}
		time.Sleep(wait)
	}
}

func bootID() (string, error) {
	f, err := disk.OS().Open("/proc/sys/kernel/random/boot_id", disk.Read)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b := make([]byte, 64)
	n, err := f.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		return "", err
	}
	if n == 0 {
		return "", io.ErrUnexpectedEOF
	}
	return strings.TrimSpace(string(b[:n])), nil
}
