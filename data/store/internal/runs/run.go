package runs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"sort"
	"sync"

	"forerun/disk"
	"forerun/internal/chunk"
)

// Run is one run, open for reading. All methods but Close may be called from
// many goroutines.
type Run struct {
	id     uint32
	path   string
	f      disk.File
	size   int64
	pages  uint32
	count  int
	fence  []uint64
	filter filter
}

// Open opens the run with the number id at path. It reads the footer, the
// filter and the fence; pages are checked when they are read.
func Open(fs disk.FS, path string, id uint32) (*Run, error) {
	f, err := fs.Open(path, disk.Read)
	if err != nil {
		return nil, err
	}
	r, err := load(f, path, id)
	if err != nil {
		f.Close()
		return nil, err
	}
	return r, nil
}

func load(f disk.File, path string, id uint32) (*Run, error) {
	damaged := func(what string) error { return fmt.Errorf("run %s: %s: %w", path, what, ErrDamaged) }
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size < footerSize {
		return nil, damaged("shorter than a footer")
	}
	var foot [footerSize]byte
	if err := readFull(f, foot[:], st.Size-footerSize); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if le.Uint32(foot[60:]) != crc32.Checksum(foot[:60], castagnoli) || le.Uint32(foot[0:]) != magic {
		return nil, damaged("footer does not match its checksum")
	}
	if v := le.Uint32(foot[4:]); v != version {
		return nil, damaged(fmt.Sprintf("version %d, this program reads version %d", v, version))
	}
	if got := le.Uint32(foot[8:]); got != id {
		return nil, damaged(fmt.Sprintf("it is run %d", got))
	}
	r := &Run{id: id, path: path, f: f, size: st.Size, pages: le.Uint32(foot[12:]), count: int(le.Uint64(foot[16:]))}
	flen := le.Uint64(foot[24:])
	want := uint64(r.pages)*(PageSize+8) + footerSize
	if uint64(st.Size) < want || uint64(st.Size)-want != flen || flen == 0 || flen%filterBlock != 0 {
		return nil, damaged("its length does not fit its footer")
	}
	r.filter = make(filter, flen)
	if err := readFull(f, r.filter, int64(r.pages)*PageSize); err != nil {
		return nil, err
	}
	fence := make([]byte, 8*int(r.pages))
	if err := readFull(f, fence, int64(r.pages)*PageSize+int64(flen)); err != nil {
		return nil, err
	}
	if crc32.Checksum(r.filter, castagnoli) != le.Uint32(foot[32:]) ||
		crc32.Checksum(fence, castagnoli) != le.Uint32(foot[36:]) {
		return nil, damaged("filter or fence does not match its checksum")
	}
	r.fence = make([]uint64, r.pages)
	for i := range r.fence {
		r.fence[i] = le.Uint64(fence[8*i:])
	}
	return r, nil
}

// readFull reads exactly p. disk.File.ReadAt may give io.EOF with the last byte.
func readFull(f disk.File, p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	n, err := f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil {
		err = fmt.Errorf("%d of %d bytes at %d", n, len(p), off)
	}
	return err
}

// ID is the run's number.
func (r *Run) ID() uint32 { return r.id }

// Path is where its file is.
func (r *Run) Path() string { return r.path }

// Count is how many entries it holds, dead ones too.
func (r *Run) Count() int { return r.count }

// Size is the length of its file in bytes.
func (r *Run) Size() int64 { return r.size }

// Memory is what it keeps in memory, in bytes.
func (r *Run) Memory() int64 { return int64(len(r.filter) + 8*len(r.fence)) }

// Close closes the file.
func (r *Run) Close() error { return r.f.Close() }

var pagePool = sync.Pool{New: func() any { return new([PageSize]byte) }}

// Find looks a signature up. An entry that says Dead is found too. A page that
// cannot be read or is damaged is an error that wraps ErrDamaged.
func (r *Run) Find(s *chunk.Sig) (Loc, bool, error) {
	if len(r.fence) == 0 || !r.filter.has(s) {
		return Loc{}, false, nil
	}
	k := prefix(s)
	lo, hi := 0, len(r.fence) // the first fence above k
	for lo < hi {
		if m := int(uint(lo+hi) >> 1); r.fence[m] > k {
			hi = m
		} else {
			lo = m + 1
		}
	}
	buf := pagePool.Get().(*[PageSize]byte)
	defer pagePool.Put(buf)
	// Pages before the last one count only while their successor begins with
	// the same eight bytes, which hashes do about never.
	for i := lo - 1; i >= 0; i-- {
		n, err := r.page(buf[:], uint32(i))
		if err != nil {
			return Loc{}, false, err
		}
		if l, ok := search(buf[:], n, s); ok {
			return l, true, nil
		}
		if r.fence[i] != k {
			break
		}
	}
	return Loc{}, false, nil
}

func search(p []byte, n int, s *chunk.Sig) (Loc, bool) {
	lo, hi := 0, n
	for lo < hi {
		m := int(uint(lo+hi) >> 1)
		e := p[pageHeader+m*EntrySize:]
		switch c := bytes.Compare(e[:chunk.SigLen], s[:]); {
		case c == 0:
			return getLoc(e), true
		case c < 0:
			lo = m + 1
		default:
			hi = m
		}
	}
	return Loc{}, false
}

func (r *Run) page(p []byte, i uint32) (int, error) {
	if err := readFull(r.f, p, int64(i)*PageSize); err != nil {
		return 0, &pageError{r.path, i, err}
	}
	n, ok := checkPage(p, r.id, i)
	if !ok {
		return 0, &pageError{r.path, i, nil}
	}
	return n, nil
}

// pageError says which page failed. It always is ErrDamaged: a page that
// cannot be read is as lost as one with the wrong bytes.
type pageError struct {
	path string
	page uint32
	err  error
}

func (e *pageError) Error() string {
	if e.err != nil {
		return fmt.Sprintf("run %s page %d: %v", e.path, e.page, e.err)
	}
	return fmt.Sprintf("run %s page %d does not match its checksum", e.path, e.page)
}

func (e *pageError) Unwrap() []error { return []error{ErrDamaged, e.err} }

// Write writes entries, which it sorts in place, as one run.
func Write(fs disk.FS, path string, id uint32, entries []Entry) (*Run, error) {
	sort.Slice(entries, func(i, j int) bool { return bytes.Compare(entries[i].Sig[:], entries[j].Sig[:]) < 0 })
	w, err := Create(fs, path, id, len(entries))
	if err != nil {
		return nil, err
	}
	for i := range entries {
		if err := w.Add(&entries[i]); err != nil {
			w.Abort()
			return nil, err
		}
	}
	return w.Finish()
}
