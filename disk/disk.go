package disk

import "time"

// FS is a directory tree. Paths use slashes. All errors are those of package
// os (fs.PathError with a syscall.Errno), so block.KindOf understands them.
type FS interface {
	// Open opens or creates the file at path.
	Open(path string, mode Mode) (File, error)
	// Rename moves a file over another name, atomically for a running
	// system; it survives a power cut after SyncDir.
	Rename(from, to string) error
	// Remove removes a file or an empty directory.
	Remove(path string) error
	// MkdirAll makes a directory and its parents.
	MkdirAll(path string) error
	// List returns the names in a directory, sorted.
	List(path string) ([]string, error)
	// Stat describes a file or directory.
	Stat(path string) (Stat, error)
	// SyncDir makes the names in a directory durable.
	SyncDir(path string) error
	// Lock takes an exclusive lock named by the file at path and creates it if
	// needed. The lock ends with Close of what is returned or with the process.
	// Somebody else's lock is syscall.EBUSY.
	Lock(path string) (File, error)
	// Free returns how many bytes the file system under path can still take.
	Free(path string) (int64, error)
}

// File is an open file. ReadAt and WriteAt may be called from many goroutines.
type File interface {
	// ReadAt is io.ReaderAt: it returns io.EOF with fewer bytes at the end.
	ReadAt(p []byte, off int64) (int, error)
	// WriteAt is io.WriterAt and extends the file as needed.
	WriteAt(p []byte, off int64) (int, error)
	// Sync makes the bytes and the length durable (fdatasync).
	Sync() error
	// Truncate sets the length.
	Truncate(size int64) error
	// Allocate reserves space for [off, off+n) without changing what reads
	// give, and extends the file to off+n. Where the file system cannot
	// reserve, it only extends.
	Allocate(off, n int64) error
	// Punch makes [off, off+n) read as zeros and frees the space it covers;
	// the length stays.
	Punch(off, n int64) error
	// Data finds the next range of bytes at or after off that is allocated
	// (SEEK_DATA, SEEK_HOLE). It answers io.EOF when there is none.
	Data(off int64) (start, end int64, err error)
	// Stat describes the file.
	Stat() (Stat, error)
	// Close closes it, without Sync.
	Close() error
}

// Mode says how Open opens.
type Mode uint8

// The bits of Mode.
const (
	Read   Mode = 0      // reading only
	Write  Mode = 1 << 0 // reading and writing
	Create Mode = 1 << 1 // create it when it is not there (with Write)
	Excl   Mode = 1 << 2 // with Create: fail when it is there
	Trunc  Mode = 1 << 3 // with Write: begin empty
)

// Stat is what is known of a file.
type Stat struct {
	Size      int64 // bytes
	Allocated int64 // bytes that take space
	Dir       bool
	ModTime   time.Time
}
