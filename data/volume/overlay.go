package volume

import (
	"errors"
	"fmt"
	"io"
	"path"
	"sync"
	"sync/atomic"

	"forerun/block"
	"forerun/disk"
)

// fileShift: one overlay file per TiB of the volume, because ext4 files end at
// 16 TiB and no file system of interest ends below one.
const fileShift = 40

// overlay is what the workload wrote, in sparse raw files: byte x of the
// volume is byte x mod 1 TiB of file x div 1 TiB. Bytes whose mask bit is not set mean nothing.
type overlay struct {
	fs    disk.FS
	dir   string
	size  int64
	files []atomic.Pointer[overlayFile]

	mu    sync.Mutex   // opening
	names atomic.Bool  // a file was created since its directory was synced
	lost  atomic.Value // error: a sync failed, what was written before may be gone
}

type overlayFile struct {
	disk.File
	name  string
	dirty atomic.Bool // written since the last sync began
}

func overlayName(n int) string { return fmt.Sprintf("overlay.%04d", n) }

func newOverlay(fs disk.FS, dir string, size int64) *overlay {
	return &overlay{fs: fs, dir: dir, size: size,
		files: make([]atomic.Pointer[overlayFile], (size+1<<fileShift-1)>>fileShift)}
}

// length is how long file n is.
func (o *overlay) length(n int) int64 { return min(1<<fileShift, o.size-int64(n)<<fileShift) }

// adopt opens file n if it is there. used is the end of what the map says is
// in it; a file that does not reach as far has lost acknowledged writes.
func (o *overlay) adopt(n int, used int64) error {
	name := path.Join(o.dir, overlayName(n))
	f, err := o.fs.Open(name, disk.Write)
	if block.KindOf(err) == block.KindNotFound && used == 0 {
		return nil
	}
	if err != nil {
		return block.E("volume.open", name, lostKind(err), fmt.Errorf("the overlay file holds written data and cannot be opened: %w", err))
	}
	st, err := f.Stat()
	if err == nil && st.Size < used {
		err = block.E("volume.open", name, block.KindCorrupt,
			fmt.Errorf("the overlay file is %d bytes long, the map says data was written up to %d; restore the file", st.Size, used))
	} else if err == nil && st.Size < o.length(n) {
		err = f.Truncate(o.length(n))
	}
	if err != nil {
		f.Close()
		return err
	}
	file := &overlayFile{File: f, name: name}
	file.dirty.Store(true) // its bytes may still be on their way from before a crash of the process
	o.files[n].Store(file)
	o.names.Store(true)
	return nil
}

func lostKind(err error) block.Kind {
	if k := block.KindOf(err); k != block.KindNotFound {
		return k
	}
	return block.KindCorrupt
}

// file returns the file that has byte off, created as needed.
func (o *overlay) file(off int64) (*overlayFile, error) {
	n := int(off >> fileShift)
	if f := o.files[n].Load(); f != nil {
		return f, nil
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if f := o.files[n].Load(); f != nil {
		return f, nil
	}
	name := path.Join(o.dir, overlayName(n))
	f, err := o.fs.Open(name, disk.Write|disk.Create)
	if err != nil {
		return nil, block.E("volume.overlay", name, 0, err)
	}
	if err := f.Truncate(o.length(n)); err != nil {
		f.Close()
		return nil, block.E("volume.overlay", name, 0, err)
	}
	file := &overlayFile{File: f, name: name}
	file.dirty.Store(true)
	o.names.Store(true)
	o.files[n].Store(file)
	return file, nil
}

// readAt fills p with the overlay's bytes at off, which do not cross a file.
func (o *overlay) readAt(p []byte, off int64) error {
	f := o.files[off>>fileShift].Load()
	if f == nil {
		return block.E("volume.read", overlayName(int(off>>fileShift)), block.KindCorrupt, errors.New("the overlay file is not there"))
	}
	n, err := f.ReadAt(p, off&(1<<fileShift-1))
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		return block.E("volume.read", f.name, block.KindCorrupt, io.ErrUnexpectedEOF)
	}
	return block.E("volume.read", f.name, 0, err)
}

// writeAt stores p at off, which does not cross a file.
func (o *overlay) writeAt(p []byte, off int64) error {
	f, err := o.file(off)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(p, off&(1<<fileShift-1))
	if !f.dirty.Load() {
		f.dirty.Store(true) // even after an error: a part may be written
	}
	if err != nil {
		return block.E("volume.write", f.name, 0, err)
	}
	return nil
}

var noughts [1 << 20]byte

// punch makes [off, off+n), which does not cross a file, zeros and gives up its space if it can.
func (o *overlay) punch(off, n int64) error {
	f, err := o.file(off)
	if err != nil {
		return err
	}
	if n >= 1<<blockShift {
		err = f.Punch(off&(1<<fileShift-1), n)
	}
	if err != nil || n < 1<<blockShift {
		err = nil
		for at := int64(0); at < n && err == nil; {
			w := min(n-at, int64(len(noughts)))
			_, err = f.WriteAt(noughts[:w], (off+at)&(1<<fileShift-1))
			at += w
		}
	}
	if !f.dirty.Load() {
		f.dirty.Store(true)
	}
	if err != nil {
		return block.E("volume.zero", f.name, 0, err)
	}
	return nil
}

// release gives up the space of [off, off+n), whose bytes mean nothing any more.
func (o *overlay) release(off, n int64) {
	if f := o.files[off>>fileShift].Load(); f != nil {
		// Space that cannot be given up is space lost, not data.
		_ = f.Punch(off&(1<<fileShift-1), n)
	}
}

// sync makes durable what was written before it was called. Once a sync has
// failed, the system may have dropped the dirty pages and a later sync would
// succeed without them (Rebello et al., "Can Applications Recover from fsync
// Failures?", USENIX ATC 2020), so all later ones fail: the volume has to be
// opened again, and the journal replayed into it.
func (o *overlay) sync() error {
	if err, _ := o.lost.Load().(error); err != nil {
		return err
	}
	for i := range o.files {
		f := o.files[i].Load()
		if f == nil || !f.dirty.Swap(false) {
			continue
		}
		if err := f.Sync(); err != nil {
			err = block.E("volume.flush", f.name, block.KindIO,
				fmt.Errorf("syncing failed, writes since the last flush may be lost; restart so that the journal is replayed: %w", err))
			o.lost.CompareAndSwap(nil, err)
			return err
		}
	}
	if o.names.Swap(false) {
		if err := o.fs.SyncDir(o.dir); err != nil {
			o.names.Store(true)
			return block.E("volume.flush", o.dir, 0, err)
		}
	}
	return nil
}

func (o *overlay) close() (err error) {
	for i := range o.files {
		if f := o.files[i].Load(); f != nil {
			err = errors.Join(err, f.Close())
		}
	}
	return err
}
