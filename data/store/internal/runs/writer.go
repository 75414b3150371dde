package runs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"forerun/disk"
	"forerun/internal/chunk"
)

const (
	footerSize = 64
	magic      = 0x4e555246 // "FRUN"
	version    = 1
	writeBatch = 64 * PageSize
)

// Writer writes one run.
type Writer struct {
	fs   disk.FS
	path string
	id   uint32
	f    disk.File

	buf    []byte // whole pages not written yet, then the page being filled
	fill   int    // entries in the page being filled
	off    int64
	pages  uint32
	count  int
	last   chunk.Sig
	fence  []uint64
	filter filter
}

// Create begins the run with the number id at path, for at most n entries
// (the size of its filter). A file that is there is replaced: a run is
// nobody's before a manifest names it.
func Create(fs disk.FS, path string, id uint32, n int) (*Writer, error) {
	f, err := fs.Open(path, disk.Write|disk.Create|disk.Trunc)
	if err != nil {
		return nil, err
	}
	return &Writer{fs: fs, path: path, id: id, f: f, filter: newFilter(n),
		fence: make([]uint64, 0, n/PerPage+1), buf: make([]byte, 0, min(writeBatch, (n/PerPage+1)*PageSize))}, nil
}

// Add appends an entry. Signatures must rise.
func (w *Writer) Add(e *Entry) error {
	if w.count > 0 && bytes.Compare(e.Sig[:], w.last[:]) <= 0 {
		return fmt.Errorf("run %s: signature %s after %s is out of order", w.path, e.Sig, w.last)
	}
	if w.fill == 0 {
		if len(w.buf) == writeBatch {
			if err := w.write(); err != nil {
				return err
			}
		}
		w.buf = append(w.buf, emptyPage[:]...)
		w.fence = append(w.fence, prefix(&e.Sig))
	}
	page := w.buf[len(w.buf)-PageSize:]
	putEntry(page[pageHeader+w.fill*EntrySize:], e)
	w.filter.add(&e.Sig)
	w.last = e.Sig
	w.count++
	if w.fill++; w.fill == PerPage {
		w.endPage()
	}
	return nil
}

var emptyPage [PageSize]byte

func (w *Writer) endPage() {
	if w.fill > 0 {
		sealPage(w.buf[len(w.buf)-PageSize:], w.id, w.pages, w.fill)
		w.pages++
		w.fill = 0
	}
}

func (w *Writer) write() error {
	if len(w.buf) == 0 {
		return nil
	}
	if _, err := w.f.WriteAt(w.buf, w.off); err != nil {
		return err
	}
	w.off += int64(len(w.buf))
	w.buf = w.buf[:0]
	return nil
}

// Count is how many entries were added.
func (w *Writer) Count() int { return w.count }

// Finish writes filter, fence and footer, makes the bytes durable (not the
// name: that takes SyncDir) and returns the run, open for reading. After an
// error the file is removed as far as possible.
func (w *Writer) Finish() (*Run, error) {
	r, err := w.finish()
	if err != nil {
		w.Abort()
		return nil, err
	}
	return r, nil
}

func (w *Writer) finish() (*Run, error) {
	w.endPage()
	if err := w.write(); err != nil {
		return nil, err
	}
	fence := make([]byte, 8*len(w.fence))
	for i, v := range w.fence {
		binary.LittleEndian.PutUint64(fence[8*i:], v)
	}
	var foot [footerSize]byte
	le := binary.LittleEndian
	le.PutUint32(foot[0:], magic)
	le.PutUint32(foot[4:], version)
	le.PutUint32(foot[8:], w.id)
	le.PutUint32(foot[12:], w.pages)
	le.PutUint64(foot[16:], uint64(w.count))
	le.PutUint64(foot[24:], uint64(len(w.filter)))
	le.PutUint32(foot[32:], crc32.Checksum(w.filter, castagnoli))
	le.PutUint32(foot[36:], crc32.Checksum(fence, castagnoli))
	le.PutUint32(foot[60:], crc32.Checksum(foot[:60], castagnoli))
	for _, part := range [][]byte{w.filter, fence, foot[:]} {
		if len(part) == 0 {
			continue
		}
		if _, err := w.f.WriteAt(part, w.off); err != nil {
			return nil, err
		}
		w.off += int64(len(part))
	}
	if err := w.f.Sync(); err != nil {
		return nil, err
	}
	return &Run{id: w.id, path: w.path, f: w.f, size: w.off, pages: w.pages, count: w.count,
		fence: w.fence, filter: w.filter}, nil
}

// Abort closes and removes the file. Its errors do not matter: the file is
// nobody's.
func (w *Writer) Abort() {
	if w.f != nil {
		w.f.Close()
		w.f = nil
		w.fs.Remove(w.path)
	}
}
