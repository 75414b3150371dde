package disktest

import (
	"io"
	"io/fs"
	"math"
	"syscall"

	"forerun/disk"
)

// file is an open file; its fields but closed never change.
type file struct {
	fs     *FS
	n      *inode
	name   string
	write  bool
	locks  bool
	closed bool
}

func (h *file) err(op string, err error) error { return pathErr(op, h.name, err) }

// usable wants fs.mu held.
func (h *file) usable(write bool) error {
	switch {
	case h.fs.dead != nil:
		return h.fs.dead
	case h.closed:
		return fs.ErrClosed
	case write && !h.write:
		return syscall.EBADF
	}
	return nil
}

// begin counts a call; fs.mu is held on return in any case.
func (h *file) begin(op Op, off, n int64) error {
	h.fs.mu.Lock()
	err := h.usable(op&(OpRead|OpSync) == 0)
	if err == nil && (off < 0 || n < 0 || off > math.MaxInt64-n) {
		err = syscall.EINVAL
	}
	if err != nil {
		return err
	}
	h.fs.mu.Unlock()
	if err := h.fs.begin(step{op: op, a: h.name, off: off, n: n}); err != nil {
		return err
	}
	return h.usable(op&(OpRead|OpSync) == 0)
}

// ReadAt is disk.File.ReadAt.
func (h *file) ReadAt(p []byte, off int64) (int, error) {
	err := h.begin(OpRead, off, int64(len(p)))
	defer h.fs.mu.Unlock()
	if err != nil {
		return 0, h.err("read", err)
	}
	n := 0
	for n < len(p) && off+int64(n) < h.n.size {
		at := off + int64(n)
		l := int(min(int64(len(p)-n), h.n.size-at, pageSize-at%pageSize))
		copy(p[n:n+l], orZero(h.n.pages[at/pageSize])[at%pageSize:])
		n += l
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt is disk.File.WriteAt. A failing write stores a part, as real ones do.
func (h *file) WriteAt(p []byte, off int64) (int, error) {
	fail := h.begin(OpWrite, off, int64(len(p)))
	defer h.fs.mu.Unlock()
	if err := h.usable(true); err != nil || fail != nil && off < 0 {
		return 0, h.err("write", fail)
	}
	f := h.fs
	limit := len(p)
	if fail != nil && limit > 0 {
		limit = f.rnd.IntN(limit)
	}
	salt, n := f.salt(), 0
	var full error
	f.account(h.n, func() {
		was := h.n.used
		for n < limit {
			at := off + int64(n)
			if f.capacity > 0 && h.n.needs(at/pageSize) > 0 && f.used+h.n.used-was >= f.capacity {
				full = syscall.ENOSPC
				return
			}
			l := min(limit-n, int(pageSize-at%pageSize))
			h.n.write(p[n:n+l], at, salt)
			n += l
		}
	})
	if fail == nil {
		fail = full
	}
	return n, h.err("write", fail)
}

// Sync is disk.File.Sync. When it fails, what it should have written is not
// saved by a later one either.
func (h *file) Sync() error {
	err := h.begin(OpSync, 0, 0)
	defer h.fs.mu.Unlock()
	if h.usable(false) != nil {
		return h.err("fdatasync", err)
	}
	if err != nil {
		h.n.failSync(h.fs.rnd)
		return h.err("fdatasync", err)
	}
	h.n.sync()
	return nil
}

// Truncate is disk.File.Truncate.
func (h *file) Truncate(size int64) error {
	err := h.begin(OpTruncate, size, 0)
	defer h.fs.mu.Unlock()
	if err == nil {
		h.fs.account(h.n, func() { h.n.truncate(size, h.fs.salt()) })
	}
	return h.err("truncate", err)
}

// Allocate is disk.File.Allocate.
func (h *file) Allocate(off, n int64) error {
	err := h.begin(OpAllocate, off, n)
	defer h.fs.mu.Unlock()
	if err != nil || n == 0 {
		return h.err("fallocate", err)
	}
	r := run{off / pageSize, (off + n + pageSize - 1) / pageSize}
	if c := h.fs.capacity; c > 0 && h.fs.used+h.n.missing(r) > c {
		return h.err("fallocate", syscall.ENOSPC)
	}
	h.fs.account(h.n, func() { h.n.reserve(r) })
	h.n.size = max(h.n.size, off+n)
	return nil
}

// Punch is disk.File.Punch.
func (h *file) Punch(off, n int64) error {
	err := h.begin(OpPunch, off, n)
	defer h.fs.mu.Unlock()
	if err == nil {
		size := h.n.size
		h.fs.account(h.n, func() { h.n.punch(off, off+n, h.fs.salt()) })
		h.n.size = size
	}
	return h.err("punch", err)
}

// Data is disk.File.Data, in pages of 4 KiB. Reserved space without content
// is no data, as on ext4 and XFS.
func (h *file) Data(off int64) (start, end int64, err error) {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if err := h.usable(false); err != nil {
		return 0, 0, h.err("seek", err)
	}
	start, end = -1, -1
	h.n.eachPage(off/pageSize, (h.n.size+pageSize-1)/pageSize, func(i int64) {
		switch {
		case start < 0:
			start, end = max(off, i*pageSize), (i+1)*pageSize
		case end == i*pageSize:
			end += pageSize
		}
	})
	end = min(end, h.n.size)
	if start < 0 || start >= end {
		return 0, 0, io.EOF
	}
	return start, end, nil
}

// Stat is disk.File.Stat.
func (h *file) Stat() (disk.Stat, error) {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if err := h.usable(false); err != nil {
		return disk.Stat{}, h.err("stat", err)
	}
	return h.n.stat(), nil
}

// Close is disk.File.Close; it releases the lock.
func (h *file) Close() error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if h.closed {
		return h.err("close", fs.ErrClosed)
	}
	h.closed = true
	if h.fs.dead != nil {
		return nil
	}
	if h.locks {
		delete(h.fs.locks, h.n)
	}
	h.fs.unlink(h.n)
	return nil
}
