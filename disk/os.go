package disk

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// OS returns the host's files. It needs Linux: holes, punching and
// reservation have no portable calls.
func OS() FS { return osFS{} }

type osFS struct{}

// Permissions of what is made: the owner only, because volumes hold a
// workload's data.
const (
	filePerm = 0o600
	dirPerm  = 0o700
)

func pathError(op, path string, err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return err
	}
	return &fs.PathError{Op: op, Path: path, Err: err}
}

// again repeats a system call that a signal interrupted.
func again(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

func (osFS) Open(path string, mode Mode) (File, error) {
	flag := os.O_RDONLY
	if mode&Write != 0 {
		flag = os.O_RDWR
		if mode&Create != 0 {
			flag |= os.O_CREATE
		}
		if mode&Excl != 0 {
			flag |= os.O_EXCL
		}
		if mode&Trunc != 0 {
			flag |= os.O_TRUNC
		}
	}
	f, err := os.OpenFile(path, flag, filePerm)
	if err != nil {
		return nil, err
	}
	return &osFile{f: f, fd: int(f.Fd())}, nil
}

func (osFS) Rename(from, to string) error { return os.Rename(from, to) }
func (osFS) Remove(path string) error     { return os.Remove(path) }
func (osFS) MkdirAll(path string) error   { return os.MkdirAll(path, dirPerm) }

func (osFS) List(path string) ([]string, error) {
	d, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}

func (osFS) Stat(path string) (Stat, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return Stat{}, err
	}
	return statOf(fi), nil
}

func statOf(fi fs.FileInfo) Stat {
	s := Stat{Size: fi.Size(), Dir: fi.IsDir(), ModTime: fi.ModTime()}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		s.Allocated = st.Blocks * 512 // st_blocks counts 512-byte units, stat(2)
	}
	return s
}

func (osFS) SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func (osFS) Lock(path string) (File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, filePerm)
	if err != nil {
		return nil, err
	}
	fd := int(f.Fd())
	if err := again(func() error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) }); err != nil {
		f.Close()
		if err == unix.EWOULDBLOCK {
			err = unix.EBUSY
		}
		return nil, pathError("lock", path, err)
	}
	return &osFile{f: f, fd: fd}, nil
}

func (osFS) Free(path string) (int64, error) {
	var st unix.Statfs_t
	if err := again(func() error { return unix.Statfs(path, &st) }); err != nil {
		return 0, pathError("statfs", path, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// osFile keeps the descriptor beside the *os.File: regular files never go
// through the poller, so reads and writes may be plain system calls.
type osFile struct {
	f  *os.File
	fd int
}

func (f *osFile) ReadAt(p []byte, off int64) (int, error) { return f.f.ReadAt(p, off) }

func (f *osFile) WriteAt(p []byte, off int64) (int, error) { return f.f.WriteAt(p, off) }

func (f *osFile) Sync() error {
	return pathError("fdatasync", f.f.Name(), again(func() error { return unix.Fdatasync(f.fd) }))
}

func (f *osFile) Truncate(size int64) error { return f.f.Truncate(size) }

func (f *osFile) Allocate(off, n int64) error {
	if n <= 0 {
		return nil
	}
	err := again(func() error { return unix.Fallocate(f.fd, 0, off, n) })
	if err == unix.EOPNOTSUPP || err == unix.ENOSYS {
		fi, serr := f.f.Stat()
		if serr != nil {
			return serr
		}
		if fi.Size() < off+n {
			return f.f.Truncate(off + n)
		}
		return nil
	}
	return pathError("fallocate", f.f.Name(), err)
}

func (f *osFile) Punch(off, n int64) error {
	if n <= 0 {
		return nil
	}
	err := again(func() error {
		return unix.Fallocate(f.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
	if err != unix.EOPNOTSUPP && err != unix.ENOSYS {
		return pathError("punch", f.f.Name(), err)
	}
	fi, err := f.f.Stat()
	if err != nil {
		return err
	}
	zeros := make([]byte, 64<<10)
	for end := min(off+n, fi.Size()); off < end; {
		m := min(int64(len(zeros)), end-off)
		if _, err := f.f.WriteAt(zeros[:m], off); err != nil {
			return err
		}
		off += m
	}
	return nil
}

func (f *osFile) Data(off int64) (start, end int64, err error) {
	seek := func(off int64, whence int) (at int64, err error) {
		err = again(func() error { at, err = unix.Seek(f.fd, off, whence); return err })
		return at, err
	}
	start, err = seek(off, unix.SEEK_DATA)
	if err == unix.ENXIO { // nothing but holes, or the end
		return 0, 0, io.EOF
	}
	if err == nil {
		end, err = seek(start, unix.SEEK_HOLE)
	}
	return start, end, pathError("seek", f.f.Name(), err)
}

func (f *osFile) Stat() (Stat, error) {
	fi, err := f.f.Stat()
	if err != nil {
		return Stat{}, err
	}
	return statOf(fi), nil
}

func (f *osFile) Close() error { return f.f.Close() }
