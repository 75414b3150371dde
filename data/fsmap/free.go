package fsmap

import (
	"context"
	"fmt"
	"io"
	"strings"

	"forerun/block"
	"forerun/data/fsmap/ext4"
	"forerun/data/fsmap/ntfs"
	"forerun/data/fsmap/part"
	"forerun/data/fsmap/xfs"
)

// Free reads the partition table and the file systems of dev and returns what
// they do not use, in whole units of unit bytes, a power of two from 512 on.
// Nobody may write to dev meanwhile.
//
// What is not known, not certain or cannot be read is in the map's FileSystems
// with the reason, and is data. So an error is only KindCanceled when ctx
// ended, or KindInvalid for a unit that is none.
func Free(ctx context.Context, dev block.Device, unit int64) (*Map, error) {
	if unit < 512 || unit&(unit-1) != 0 {
		return nil, block.E("fsmap.free", "", block.KindInvalid, fmt.Errorf("%d is not a unit: a power of two from 512 on", unit))
	}
	i := dev.Info()
	m := newMap(i.Size, unit)
	r := newView(ctx, dev)
	table, parts, err := part.Read(r, i.Size, i.BlockSize)
	m.table = string(table)
	whole := area{r: r, size: i.Size}
	switch {
	case err != nil:
		m.systems = []FileSystem{{Size: i.Size, Type: "partition table", Reason: err.Error()}}
	case table == part.None:
		m.look(whole, "", true)
	default:
		kinds, err := whole.kinds()
		if err != nil || len(kinds) > 0 {
			// One of the two is out of date, and nobody knows which.
			f := FileSystem{Size: i.Size, Type: strings.Join(kinds, ", "), Reason: "the disk has a partition table too"}
			if err != nil {
				f.Reason = err.Error()
			}
			m.systems = []FileSystem{f}
			break
		}
		for _, p := range parts {
			name := p.Name
			if name == "" {
				name = p.Type
			}
			m.look(area{r: r, off: p.Off, size: p.Size}, name, p.FileSystem)
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, block.E("fsmap.free", "", block.KindCanceled, err)
	}
	return m, nil
}

// area is a part of the disk that may hold a file system.
type area struct {
	r         *view
	off, size int64
}

// ReadAt is io.ReaderAt, relative to the area.
func (a area) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > a.size {
		return 0, io.ErrUnexpectedEOF
	}
	short := int64(len(p)) > a.size-off
	if short {
		p = p[:a.size-off]
	}
	n, err := a.r.ReadAt(p, a.off+off)
	if err == nil && short {
		err = io.EOF
	}
	return n, err
}

// look reads the file system of an area, of which nothing is free unless its
// parser reads it to the end.
func (m *Map) look(a area, partition string, plain bool) {
	f := FileSystem{Off: a.off, Size: a.size, Partition: partition}
	kinds, err := a.kinds()
	f.Type = strings.Join(kinds, ", ")
	switch {
	case err != nil:
		f.Reason = err.Error()
	case len(kinds) == 0:
		f.Reason = "it holds no file system that is known"
	case len(kinds) > 1:
		f.Reason = "it has the marks of more than one"
	case !known[kinds[0]]:
		f.Reason = "its free space is not known"
	case !plain:
		f.Reason = "the type of its partition is not one of a plain file system"
	default:
		if err := m.parse(a, &f); err != nil {
			m.Use(a.off, a.size)
			f.FreeBytes, f.Reason = 0, err.Error()
		}
	}
	m.systems = append(m.systems, f)
}

var known = map[string]bool{"ext": true, "xfs": true, "ntfs": true}

func (m *Map) parse(a area, f *FileSystem) error {
	var from, to int64 // not in the map yet
	emit := func(off, n int64) error {
		if off < to || n <= 0 || off+n > a.size {
			return fmt.Errorf("free space of %d bytes at %d is out of order", n, off)
		}
		f.FreeBytes += n
		if off == to {
			to += n
			return nil
		}
		m.free(a.off+from, to-from)
		from, to = off, off+n
		return a.r.ctx.Err()
	}
	var err error
	switch f.Type {
	case "ext":
		var i ext4.Info
		i, err = ext4.Free(a, a.size, emit)
		f.Type, f.Label, f.UUID = i.Type, i.Label, i.UUID
	case "xfs":
		var i xfs.Info
		i, err = xfs.Free(a, a.size, emit)
		f.Label, f.UUID = i.Label, i.UUID
	case "ntfs":
		var i ntfs.Info
		i, err = ntfs.Free(a, a.size, emit)
		f.Label, f.UUID = i.Label, i.Serial
	}
	if err == nil {
		m.free(a.off+from, to-from)
	}
	return err
}

// marks are what lies at a fixed place of something that is not a file system
// we read. The list need not be complete: it guards against what is left of a
// file system beneath something else.
var marks = []struct {
	kind string
	at   int64
	what string
}{
	{"LUKS", 0, "LUKS\xba\xbe"}, {"BitLocker", 3, "-FVE-FS-"}, {"exFAT", 3, "EXFAT   "}, {"ReFS", 3, "ReFS\x00\x00\x00\x00"},
	{"FAT", 54, "FAT1"}, {"FAT", 82, "FAT32"},
	{"LVM", 0x018, "LVM2 001"}, {"LVM", 0x218, "LVM2 001"}, {"LVM", 0x418, "LVM2 001"}, {"LVM", 0x618, "LVM2 001"},
	{"Linux RAID", 0, "\xfc\x4e\x2b\xa9"}, {"Linux RAID", 4096, "\xfc\x4e\x2b\xa9"},
	{"swap", 4086, "SWAPSPACE2"}, {"swap", 65526, "SWAPSPACE2"}, {"hibernated swap", 4086, "S1SUSPEND"},
	{"bcache", 4096 + 24, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca"},
	{"btrfs", 64<<10 + 64, "_BHRfS_M"}, {"F2FS", 1024, "\x10\x20\xf5\xf2"}, {"ReiserFS", 64<<10 + 52, "ReIsEr"}, {"JFS", 32 << 10, "JFS1"},
	{"ISO 9660", 32<<10 + 1, "CD001"}, {"Oracle ASM", 32, "ORCLDISK"},
}

// kinds are the names of what the marks in an area say it is. An error is
// that of reading: a mark that cannot be read may be there.
func (a area) kinds() (all []string, err error) {
	add := func(k string) {
		if len(all) == 0 || all[len(all)-1] != k {
			all = append(all, k)
		}
	}
	read := func(n int, at int64) []byte {
		if at < 0 || at > a.size-int64(n) {
			return nil
		}
		b := make([]byte, n)
		if got, rerr := a.ReadAt(b, at); got < n {
			err = fmt.Errorf("reading %d bytes at %d: %w", n, at, rerr)
			return nil
		}
		return b
	}
	has := func(at int64, what string) bool { return string(read(len(what), at)) == what }
	for _, m := range marks {
		if has(m.at, m.what) {
			add(m.kind)
		}
	}
	// Members of an array may have their mark at the end, and a file system
	// that looks whole at the beginning.
	for _, at := range []int64{a.size&^(64<<10-1) - 64<<10, (a.size - 8<<10) &^ (4<<10 - 1)} {
		if has(at, "\xfc\x4e\x2b\xa9") || has(at, "\xa9\x2b\x4e\xfc") {
			add("Linux RAID")
		}
	}
	if has(a.size&^511-1024, "Intel Raid ISM Cfg Sig. ") {
		add("Intel RAID")
	}
	if has(a.size&^511-512, "\xde\x11\xde\x11") || has(a.size&^511-512, "\x11\xde\x11\xde") {
		add("DDF RAID")
	}
	head := read(2048, 0)
	if ext4.Probe(head) {
		add("ext")
	}
	if xfs.Probe(head) {
		add("xfs")
	}
	if ntfs.Probe(head) {
		add("ntfs")
	}
	return all, err
}
