// Package ntfs tells which clusters an NTFS volume does not use, from its
// $Bitmap.
//
// It is a pure reader and prefers silence to a guess. The volume must not be
// marked dirty, its $LogFile must say that it was dismounted, in the version
// that Windows leaves behind only then, and Windows must not be hibernated on
// it. A driver that keeps no log leaves an empty one, which says nothing: then
// the clusters of every file are compared with the bitmap. Anything of unknown
// form is an error, and what was emitted before it is worth nothing.
//
// Time is that of reading the bitmap once, and the MFT where the log is empty;
// memory is a few clusters.
package ntfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf16"

	"forerun/data/fsmap/internal/layout"
)

// ErrOther means that there is no such file system.
var ErrOther = errors.New("not NTFS")

// ErrDirty means that the volume was not unmounted cleanly.
var ErrDirty = errors.New("it was not unmounted cleanly")

// Info describes a volume.
type Info struct {
	Label, Serial string
	Size          int64 // bytes
	ClusterBytes  int
}

// Numbers of the files that describe the volume.
const (
	fileMFT    = 0
	fileLog    = 2
	fileVolume = 3
	fileRoot   = 5
	fileBitmap = 6
	systemMost = 16 // files that are always looked at
)

// Types of attributes.
const (
	attrList       = 0x20
	attrVolumeName = 0x60
	attrVolumeInfo = 0x70
	attrData       = 0x80
	attrIndexRoot  = 0x90
	attrIndex      = 0xa0
	attrEnd        = 0xffffffff
)

// unsafeFlags of a volume: dirty, log to be resized, to be upgraded, a journal
// being deleted, and being or having been repaired.
const unsafeFlags = 0x1 | 0x2 | 0x4 | 0x10 | 0x20 | 0x4000 | 0x8000

const (
	maxRecord  = 64 << 10 // bytes of a file record or index block
	maxRuns    = 1 << 20  // of one attribute
	filesMost  = 4 << 20  // that are compared with the bitmap
	indexMost  = 4096     // blocks of the root directory
	bitmapPart = 64 << 10 // bytes of the bitmap that are read at once
)

var le = binary.LittleEndian

// volume is a boot sector that was found good.
type volume struct {
	r                 io.ReaderAt
	Info              Info
	cluster, clusters int64 // bytes, number
	record, index     int64 // bytes of a file record, of an index block
	mft               runs
	files             int64 // records of the MFT
	bitmap            stream
}

// Probe says whether head, the beginning of a device, has the mark of NTFS.
func Probe(head []byte) bool { return len(head) >= 11 && string(head[3:11]) == "NTFS    " }

// Free emits the free ranges of the volume in the first size bytes of r, in
// bytes and in order. An error of emit ends it. ErrOther: there is no such
// volume; any other error is why its free space cannot be known, also after some of it was emitted.
func Free(r io.ReaderAt, size int64, emit func(off, n int64) error) (Info, error) {
	v := &volume{r: r}
	if err := v.boot(size); err != nil {
		return v.Info, err
	}
	if err := v.open(); err != nil {
		return v.Info, err
	}
	empty, err := v.cleanLog()
	if err != nil {
		return v.Info, err
	}
	if err := v.awake(); err != nil {
		return v.Info, err
	}
	files := int64(systemMost)
	if empty {
		files = v.files
	}
	if err := v.compare(min(files, v.files)); err != nil {
		return v.Info, err
	}
	return v.Info, v.emit(emit)
}

func (v *volume) boot(size int64) error {
	if size < 1<<16 {
		return ErrOther
	}
	b := make([]byte, 512)
	if err := layout.Read(v.r, b, 0); err != nil {
		return err
	}
	if !Probe(b) {
		return ErrOther
	}
	sector, per := int64(le.Uint16(b[11:])), int64(b[13])
	if per > 128 {
		if per < 240 { // 2^16 sectors and more
			return fmt.Errorf("it has clusters of %#x sectors", per)
		}
		per = 1 << (256 - per)
	}
	sectors := le.Uint64(b[40:])
	v.cluster = sector * per
	v.Info.Serial = fmt.Sprintf("%016X", le.Uint64(b[72:]))
	switch {
	case b[510] != 0x55 || b[511] != 0xaa:
		return errors.New("the boot sector has no signature")
	case !layout.Power(sector, 256, 4096) || !layout.Power(v.cluster, 512, 2<<20):
		return fmt.Errorf("it has sectors of %d and clusters of %d bytes", sector, v.cluster)
	case sectors < uint64(per) || sectors > uint64(size/sector):
		return fmt.Errorf("it has %d sectors of %d bytes, where %d bytes are", sectors, sector, size)
	}
	v.clusters = int64(sectors) / per
	v.Info.ClusterBytes, v.Info.Size = int(v.cluster), v.clusters*v.cluster
	v.record, v.index = v.length(b[64]), v.length(b[68])
	if !layout.Power(v.record, 512, maxRecord) || !layout.Power(v.index, 512, maxRecord) {
		return fmt.Errorf("it has file records of %d and index blocks of %d bytes", v.record, v.index)
	}
	at := le.Uint64(b[48:])
	if at == 0 || at >= uint64(v.clusters) {
		return fmt.Errorf("its file table would be at cluster %d of %d", at, v.clusters)
	}
	v.mft = runs{{0, int64(at), max(1, (v.record+v.cluster-1)/v.cluster)}} // until the first record says more
	v.files = 1
	return nil
}

// length decodes a length in clusters, or as a negative power of two in bytes.
func (v *volume) length(b byte) int64 {
	if n := int8(b); n < 0 {
		if n < -16 {
			return 0
		}
		return 1 << -n
	}
	return int64(b) * v.cluster
}

// open reads the files that describe the volume.
func (v *volume) open() error {
	m, err := v.file(fileMFT)
	if err != nil {
		return fmt.Errorf("the file table: %w", err)
	}
	a, err := v.only(m, attrData)
	if err != nil {
		return fmt.Errorf("the file table: %w", err)
	}
	if !a.away {
		return errors.New("the file table is inside itself")
	}
	complete := a.runs.end() >= (a.initialized+v.cluster-1)/v.cluster
	v.mft, v.files = a.runs, min(a.initialized, a.runs.end()*v.cluster)/v.record
	if v.files < systemMost {
		return fmt.Errorf("the file table has %d records", v.files)
	}
	info, err := v.file(fileVolume)
	if err != nil {
		return fmt.Errorf("$Volume: %w", err)
	}
	if n, err := v.only(info, attrVolumeName); err == nil && !n.away {
		v.Info.Label = wide(n.value)
	}
	n, err := v.only(info, attrVolumeInfo)
	if err != nil || n.away || len(n.value) < 12 {
		return errors.New("$Volume does not say in which state it is")
	}
	if n.value[8] != 3 {
		return fmt.Errorf("its version is %d.%d, known is 3", n.value[8], n.value[9])
	}
	if le.Uint16(n.value[10:])&unsafeFlags != 0 {
		return ErrDirty
	}
	if !complete {
		return errors.New("its file table is in more pieces than one record describes")
	}
	if v.bitmap, err = v.content(fileBitmap); err != nil {
		return fmt.Errorf("$Bitmap: %w", err)
	}
	if v.bitmap.size < (v.clusters+7)/8 {
		return fmt.Errorf("$Bitmap has %d bytes for %d clusters", v.bitmap.size, v.clusters)
	}
	return nil
}

// awake is nil when Windows is not hibernated on this volume.
func (v *volume) awake() error {
	n, err := v.lookup("hiberfil.sys")
	if err != nil {
		return fmt.Errorf("its root directory: %w", err)
	}
	if n < 0 {
		return nil
	}
	b, err := v.beginning(n)
	if err != nil {
		return fmt.Errorf("hiberfil.sys: %w", err)
	}
	if len(b) >= 4 && strings.EqualFold(string(b[:4]), "wake") {
		return nil
	}
	for _, c := range b {
		if c != 0 {
			return errors.New("a Windows is hibernated on it, or ended for a fast start")
		}
	}
	return nil
}

// beginning reads up to 4 KiB of a file.
func (v *volume) beginning(i int64) ([]byte, error) {
	b, err := v.file(i)
	if err != nil {
		return nil, err
	}
	a, err := v.only(b, attrData)
	switch {
	case err != nil:
		return nil, err
	case !a.away:
		return a.value[:min(4096, len(a.value))], nil
	}
	p := make([]byte, min(4096, a.initialized))
	if len(p) == 0 {
		return nil, nil
	}
	return p, v.read(a.runs, p, 0)
}

// emit emits the runs of zero bits of the bitmap.
func (v *volume) emit(emit func(off, n int64) error) error {
	b := make([]byte, bitmapPart)
	for first := int64(0); first < v.clusters; first += 8 * bitmapPart {
		n := min(v.clusters-first, 8*bitmapPart)
		p := b[:(n+7)/8]
		if err := v.bitmap.readAt(p, first/8); err != nil {
			return fmt.Errorf("$Bitmap: %w", err)
		}
		for at := int64(0); at < n; {
			from := layout.Next(p, at, n, 0)
			if from >= n {
				break
			}
			at = layout.Next(p, from, n, 1)
			if err := emit((first+from)*v.cluster, (at-from)*v.cluster); err != nil {
				return err
			}
		}
	}
	return nil
}

// compare is nil when the bitmap has the clusters of the first n files as used.
func (v *volume) compare(n int64) error {
	if n > filesMost {
		return fmt.Errorf("its log is empty, and its %d files are too many to be compared with the bitmap", n)
	}
	u := &used{v: v, at: -1}
	if err := u.check(0, 1); err != nil { // the boot sector
		return err
	}
	for i := range n {
		b, inUse, err := v.raw(i)
		if err != nil {
			if i >= systemMost && errors.Is(err, errNotRecord) {
				continue // never used, or not any more
			}
			return fmt.Errorf("file %d: %w", i, err)
		}
		if !inUse {
			continue
		}
		err = v.attributes(b, func(a attribute) error {
			for _, r := range a.runs {
				if r.to < 0 {
					continue
				}
				if err := u.check(r.to, r.n); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("file %d: %w", i, err)
		}
	}
	return nil
}

// used looks into the bitmap, a part at a time.
type used struct {
	v  *volume
	at int64 // which part b is, -1 for none
	b  []byte
}

// check is nil when all clusters of [from, from+n) are used.
func (u *used) check(from, n int64) error {
	for n > 0 {
		part := from / (8 * bitmapPart)
		if part != u.at {
			size := min(bitmapPart, (u.v.clusters+7)/8-part*bitmapPart)
			if u.b == nil {
				u.b = make([]byte, bitmapPart)
			}
			if err := u.v.bitmap.readAt(u.b[:size], part*bitmapPart); err != nil {
				return fmt.Errorf("$Bitmap: %w", err)
			}
			u.at = part
		}
		lo := from - part*8*bitmapPart
		hi := min(lo+n, 8*bitmapPart)
		if layout.Next(u.b, lo, hi, 0) != hi {
			return errors.New("has clusters that $Bitmap says are free: " + ErrDirty.Error())
		}
		from, n = from+hi-lo, n-(hi-lo)
	}
	return nil
}

func wide(b []byte) string {
	u := make([]uint16, 0, len(b)/2)
	for ; len(b) >= 2; b = b[2:] {
		u = append(u, le.Uint16(b))
	}
	return string(utf16.Decode(u))
}
