package disk

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Files and directories hold the bytes of guests, so only their owner may look.
const (
	filePerm = 0o600
	dirPerm  = 0o700
)

// OS returns the host's files. It needs Linux: holes, punching and reservation
// have no portable calls. Relative paths are taken from
// the working directory. Beyond what FS promises, directories made by MkdirAll
// are durable when it returns, so that a caller needs SyncDir only for the
// directory it puts names in.
func OS() FS { return osFS{} }

type osFS struct{}

func (osFS) Open(path string, mode Mode) (File, error) {
	flag := os.O_RDONLY
	if mode&Write != 0 {
		flag = os.O_RDWR
		if mode&Create != 0 {
			flag |= os.O_CREATE
			if mode&Excl != 0 {
				flag |= os.O_EXCL
			}
		}
		if mode&Trunc != 0 {
			flag |= os.O_TRUNC
		}
	}
	f, err := os.OpenFile(path, flag, filePerm)
	if err != nil {
		return nil, err
	}
	return &osFile{f: f}, nil
}

func (osFS) Rename(from, to string) error { return os.Rename(from, to) }

func (osFS) Remove(path string) error { return os.Remove(path) }

func (o osFS) MkdirAll(path string) error {
	path = filepath.Clean(path)
	switch s, err := os.Stat(path); {
	case err == nil && s.IsDir():
		return nil
	case err == nil:
		return &fs.PathError{Op: "mkdir", Path: path, Err: syscall.ENOTDIR}
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	parent := filepath.Dir(path)
	if parent != path {
		if err := o.MkdirAll(parent); err != nil {
			return err
		}
	}
	if err := os.Mkdir(path, dirPerm); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return o.SyncDir(parent)
}

func (osFS) List(path string) ([]string, error) {
	all, err := os.ReadDir(path) // sorted
	if err != nil {
		return nil, err
	}
	names := make([]string, len(all))
	for i, e := range all {
		names[i] = e.Name()
	}
	return names, nil
}

func (osFS) Stat(path string) (Stat, error) {
	s, err := os.Stat(path)
	if err != nil {
		return Stat{}, err
	}
	if s.Mode()&fs.ModeDevice != 0 { // its size is only known to an open file
		f, err := OS().Open(path, Read)
		if err != nil {
			return Stat{}, err
		}
		defer f.Close()
		return f.Stat()
	}
	return statOf(s), nil
}

func statOf(s fs.FileInfo) Stat {
	st := Stat{Size: s.Size(), Dir: s.IsDir(), ModTime: s.ModTime()}
	if u, ok := s.Sys().(*syscall.Stat_t); ok {
		st.Allocated = u.Blocks * 512 // stat(2): always in units of 512
	}
	return st
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
	// The file may be removed between open and flock; then the lock held is on
	// a nameless file and the next one would get another. Try again until the
	// locked file is the one that has the name.
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, filePerm)
		if err != nil {
			return nil, err
		}
		of := &osFile{f: f}
		err = of.control("lock", func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
		if err != nil {
			f.Close()
			if errors.Is(err, syscall.EWOULDBLOCK) {
				err = &fs.PathError{Op: "lock", Path: path, Err: syscall.EBUSY}
			}
			return nil, err
		}
		mine, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, err
		}
		if named, err := os.Stat(path); err == nil && os.SameFile(mine, named) {
			return of, nil
		}
		f.Close()
	}
}

func (osFS) Free(path string) (int64, error) {
	var s unix.Statfs_t
	for {
		err := unix.Statfs(path, &s)
		if err == nil {
			return int64(s.Bavail) * s.Frsize, nil
		}
		if err != unix.EINTR {
			return 0, &fs.PathError{Op: "statfs", Path: path, Err: err}
		}
	}
}

// osFile is a file of the operating system. os.File already repeats
// interrupted and short calls and keeps the descriptor alive during each.
type osFile struct {
	f *os.File
	// extend is held for reading by writers and for writing by what sets a
	// length it computed from the length found, lest it cut off what a
	// writer appended in between.
	extend sync.RWMutex
}

// control runs call on the descriptor until it is not interrupted.
func (o *osFile) control(op string, call func(fd int) error) error {
	c, err := o.f.SyscallConn()
	if err != nil {
		return err
	}
	var errno error
	err = c.Control(func(fd uintptr) {
		for {
			if errno = call(int(fd)); errno != unix.EINTR {
				return
			}
		}
	})
	if err != nil { // the one reason there is
		return &fs.PathError{Op: op, Path: o.f.Name(), Err: fs.ErrClosed}
	}
	if errno != nil {
		return &fs.PathError{Op: op, Path: o.f.Name(), Err: errno}
	}
	return nil
}

func (o *osFile) ReadAt(p []byte, off int64) (int, error) { return o.f.ReadAt(p, off) }

func (o *osFile) WriteAt(p []byte, off int64) (int, error) {
	o.extend.RLock()
	defer o.extend.RUnlock()
	return o.f.WriteAt(p, off)
}

func (o *osFile) Sync() error { return o.control("fdatasync", unix.Fdatasync) }

func (o *osFile) Truncate(size int64) error {
	o.extend.Lock()
	defer o.extend.Unlock()
	return o.f.Truncate(size)
}

// cannot says that the file system, or the kind of file, does not know the call.
func cannot(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.ENODEV)
}

func (o *osFile) Allocate(off, n int64) error {
	if n == 0 {
		return nil
	}
	err := o.control("fallocate", func(fd int) error { return unix.Fallocate(fd, 0, off, n) })
	if !cannot(err) {
		return err
	}
	o.extend.Lock()
	defer o.extend.Unlock()
	s, err := o.Stat()
	if err != nil || s.Size >= off+n {
		return err
	}
	return o.f.Truncate(off + n)
}

func (o *osFile) Punch(off, n int64) error {
	if n == 0 {
		return nil
	}
	err := o.control("punch", func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
	if !cannot(err) {
		return err
	}
	s, err := o.Stat()
	if err != nil {
		return err
	}
	return o.writeZeros(off, min(n, s.Size-off))
}

func (o *osFile) writeZeros(off, n int64) error {
	var zeros [64 << 10]byte
	for n > 0 {
		w, err := o.f.WriteAt(zeros[:min(n, int64(len(zeros)))], off)
		if err != nil {
			return err
		}
		off, n = off+int64(w), n-int64(w)
	}
	return nil
}

func (o *osFile) Data(off int64) (start, end int64, err error) {
	size, err := o.size()
	if err != nil {
		return 0, 0, err
	}
	if off >= size {
		return 0, 0, io.EOF
	}
	err = o.control("seek", func(fd int) (err error) {
		if start, err = unix.Seek(fd, off, unix.SEEK_DATA); err == nil {
			end, err = unix.Seek(fd, start, unix.SEEK_HOLE)
		}
		return err
	})
	switch {
	case errors.Is(err, unix.ENXIO):
		return 0, 0, io.EOF
	case errors.Is(err, unix.EINVAL) || cannot(err): // this file system does not know: all is data
		return off, size, nil
	}
	return start, end, err
}

// size is the length of a file or of a block device, which stat(2) reports as 0.
func (o *osFile) size() (int64, error) {
	s, err := o.f.Stat()
	if err != nil {
		return 0, err
	}
	if s.Mode()&fs.ModeDevice == 0 {
		return s.Size(), nil
	}
	var n int64
	err = o.control("seek", func(fd int) (err error) {
		n, err = unix.Seek(fd, 0, unix.SEEK_END)
		return err
	})
	return n, err
}

func (o *osFile) Stat() (Stat, error) {
	s, err := o.f.Stat()
	if err != nil {
		return Stat{}, err
	}
	st := statOf(s)
	if s.Mode()&fs.ModeDevice != 0 {
		if st.Size, err = o.size(); err != nil {
			return Stat{}, err
		}
		st.Allocated = st.Size
	}
	return st, nil
}

func (o *osFile) Close() error { return o.f.Close() }
