// Package xfs tells which blocks an XFS file system, version 4 or 5, does not
// use, from the free-space B+trees by block number of its allocation groups.
//
// It is a pure reader and prefers silence to a guess. Only a file system whose
// log ends in an unmount record, with nothing newer around it, is believed; an
// unknown feature, a checksum that does not match, a tree that contradicts its
// header: an error, and what was emitted before it is worth nothing.
//
// The format is that of "XFS Algorithms & Data Structures" and the kernel's
// fs/xfs/libxfs. Each block of a tree is read once; memory is one block a level.
package xfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/bits"

	"forerun/data/fsmap/internal/layout"
)

// ErrOther means that there is no such file system.
var ErrOther = errors.New("not XFS")

// ErrDirty means that the file system was not unmounted cleanly.
var ErrDirty = errors.New("it was not unmounted cleanly")

// Info describes a file system.
type Info struct {
	Label, UUID string
	Size        int64 // bytes
	BlockBytes  int
	Version     int // 4 or 5
}

const (
	magic         = "XFSB"
	minSector     = 512
	knownIncompat = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80 // ftype, sparse inodes, meta uuid, big time, large extent counts, exchange, parent
	knownRO       = 0x1 | 0x2 | 0x4 | 0x8                      // finobt, rmapbt, reflink, inode counts
	metaUUID      = 0x4
	maxLevels     = 16
	maxAGs        = 1 << 24
	nullBlock     = 0xffffffff
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var be = binary.BigEndian

// fs is a superblock that was found good.
type fs struct {
	r                   io.ReaderAt
	Info                Info
	block, sector       int64 // bytes
	blocks              int64
	agBlocks, ags       int64
	agShift             uint
	logStart, logBlocks int64 // in blocks from the beginning
	free                int64 // blocks, as the superblock says
	v5                  bool
	uuid, meta          [16]byte
}

// Probe says whether head, the beginning of a device, has the mark of XFS.
func Probe(head []byte) bool { return len(head) >= 4 && string(head[:4]) == magic }

// Free emits the free ranges of the file system in the first size bytes of r,
// in bytes and in order. An error of emit ends it. ErrOther: there is no such
// file system; any other error is why its free space cannot be known, also
// after some of it was emitted.
func Free(r io.ReaderAt, size int64, emit func(off, n int64) error) (Info, error) {
	f := &fs{r: r}
	if err := f.super(size); err != nil {
		return f.Info, err
	}
	if err := f.cleanLog(); err != nil {
		return f.Info, err
	}
	var free int64
	for ag := range f.ags {
		n, err := f.group(ag, emit)
		if err != nil {
			return f.Info, fmt.Errorf("allocation group %d: %w", ag, err)
		}
		free += n
	}
	if free != f.free {
		return f.Info, fmt.Errorf("its groups have %d free blocks, its superblock says %d", free, f.free)
	}
	return f.Info, nil
}

// sumAt says whether the checksum at offset at of b, which is little-endian
// and counts as zero itself, matches.
func sumAt(b []byte, at int) bool {
	crc := crc32.Update(0, castagnoli, b[:at])
	crc = crc32.Update(crc, castagnoli, []byte{0, 0, 0, 0})
	crc = crc32.Update(crc, castagnoli, b[at+4:])
	return crc == binary.LittleEndian.Uint32(b[at:])
}

func (f *fs) super(size int64) error {
	if size < 4096 {
		return ErrOther
	}
	b := make([]byte, minSector)
	if err := layout.Read(f.r, b, 0); err != nil {
		return err
	}
	if !Probe(b) {
		return ErrOther
	}
	f.uuid = [16]byte(b[32:48])
	f.meta = f.uuid
	u := f.uuid
	f.Info = Info{Label: layout.Text(b[108:120]), UUID: fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])}
	f.block, f.sector = int64(be.Uint32(b[4:])), int64(be.Uint16(b[102:]))
	version := be.Uint16(b[100:])
	f.Info.Version, f.v5 = int(version&15), version&15 == 5
	switch {
	case f.Info.Version != 4 && !f.v5:
		return fmt.Errorf("its version is %d, known are 4 and 5", f.Info.Version)
	case !layout.Power(f.sector, 512, 32768) || !layout.Power(f.block, f.sector, 65536):
		return fmt.Errorf("it has blocks of %d and sectors of %d bytes", f.block, f.sector)
	}
	if f.v5 {
		if b = make([]byte, f.sector); size < f.sector {
			return ErrOther
		}
		if err := layout.Read(f.r, b, 0); err != nil {
			return err
		}
		if !sumAt(b, 224) {
			return errors.New("the superblock does not match its checksum")
		}
		if u := be.Uint32(b[216:]) &^ knownIncompat; u != 0 {
			return fmt.Errorf("it has features (incompat %#x) that are not known", u)
		}
		if u := be.Uint32(b[212:]) &^ knownRO; u != 0 {
			return fmt.Errorf("it has features (ro_compat %#x) that are not known", u)
		}
		if be.Uint32(b[220:]) != 0 { // the log may hold what an older kernel cannot replay
			return ErrDirty
		}
		if be.Uint32(b[216:])&metaUUID != 0 {
			f.meta = [16]byte(b[248:264])
		}
	}
	if b[126] != 0 {
		return ErrDirty // mkfs has not ended
	}
	return f.geometry(b, size)
}

func (f *fs) geometry(b []byte, size int64) error {
	blocks, log := be.Uint64(b[8:]), be.Uint64(b[48:])
	f.agBlocks, f.ags = int64(be.Uint32(b[84:])), int64(be.Uint32(b[88:]))
	f.agShift = uint(b[124])
	f.logBlocks = int64(be.Uint32(b[96:]))
	f.free = int64(be.Uint64(b[144:]))
	f.Info.BlockBytes = int(f.block)
	switch {
	case blocks == 0 || blocks > uint64(size/f.block):
		return fmt.Errorf("it has %d blocks of %d bytes, where %d bytes are", blocks, f.block, size)
	case f.agBlocks < 64 || f.ags < 1 || f.ags > maxAGs,
		int64(blocks) <= (f.ags-1)*f.agBlocks, int64(blocks) > f.ags*f.agBlocks:
		return fmt.Errorf("%d allocation groups of %d blocks do not make %d", f.ags, f.agBlocks, blocks)
	case f.agShift != uint(bits.Len64(uint64(f.agBlocks-1))):
		return fmt.Errorf("allocation groups of %d blocks are addressed with %d bits", f.agBlocks, f.agShift)
	case int64(1)<<b[120] != f.block:
		return fmt.Errorf("blocks of %d bytes are addressed with %d bits", f.block, b[120])
	case log == 0:
		return errors.New("its log is on another device")
	}
	f.blocks = int64(blocks)
	f.Info.Size = f.blocks * f.block
	ag, at := int64(log>>f.agShift), int64(log&(1<<f.agShift-1))
	if log>>f.agShift >= uint64(f.ags) || f.logBlocks < 1 || at+f.logBlocks > f.length(ag) {
		return fmt.Errorf("its log of %d blocks at %#x is not inside it", f.logBlocks, log)
	}
	f.logStart = ag*f.agBlocks + at
	return nil
}

// length is how many blocks group ag has.
func (f *fs) length(ag int64) int64 { return min(f.agBlocks, f.blocks-ag*f.agBlocks) }

// group emits what is free in one group and returns how many blocks the
// group counts as free.
func (f *fs) group(ag int64, emit func(off, n int64) error) (int64, error) {
	b := make([]byte, f.sector)
	start := ag * f.agBlocks * f.block
	if err := layout.Read(f.r, b, start+f.sector); err != nil {
		return 0, err
	}
	switch {
	case string(b[:4]) != "XAGF" || be.Uint32(b[4:]) != 1 || int64(be.Uint32(b[8:])) != ag:
		return 0, errors.New("the header of its free space is not there")
	case f.v5 && !sumAt(b, 216):
		return 0, errors.New("the header of its free space does not match its checksum")
	case f.v5 && [16]byte(b[64:80]) != f.meta:
		return 0, errors.New("the header of its free space is another file system's")
	case int64(be.Uint32(b[12:])) != f.length(ag):
		return 0, fmt.Errorf("it says it has %d blocks, there are %d", be.Uint32(b[12:]), f.length(ag))
	}
	root, levels := int64(be.Uint32(b[16:])), int(be.Uint32(b[28:]))
	if levels < 1 || levels > maxLevels {
		return 0, fmt.Errorf("a tree of %d levels", levels)
	}
	t := &tree{fs: f, ag: ag, emit: emit, last: (4*f.sector + f.block - 1) / f.block, left: f.length(ag)}
	if err := t.walk(root, levels-1, 0); err != nil {
		return 0, err
	}
	free := int64(be.Uint32(b[52:]))
	if t.free != free {
		return 0, fmt.Errorf("its tree has %d free blocks, its header says %d", t.free, free)
	}
	return free + int64(be.Uint32(b[48:])) + int64(be.Uint32(b[60:])), nil
}

// tree is a walk through the free-space tree of a group.
type tree struct {
	*fs
	ag   int64
	emit func(off, n int64) error
	last int64 // end of what was emitted, or of the headers: nothing before it is free
	free int64 // blocks
	left int64 // blocks that may still be read: a tree is no larger than its group
}

// walk goes through the subtree at block at. Its first record begins at or
// after first.
func (t *tree) walk(at int64, level int, first int64) error {
	if t.left--; t.left < 0 {
		return errors.New("a tree without end")
	}
	if at <= 0 || at >= t.length(t.ag) {
		return fmt.Errorf("a block of its tree would be block %d", at)
	}
	b := make([]byte, t.block)
	off := (t.ag*t.agBlocks + at) * t.block
	if err := layout.Read(t.r, b, off); err != nil {
		return err
	}
	head, want := int64(16), "ABTB"
	if t.v5 {
		head, want = 56, "AB3B"
	}
	n := int64(be.Uint16(b[6:]))
	switch {
	case string(b[:4]) != want || int(be.Uint16(b[4:])) != level:
		return fmt.Errorf("block %d is no block of its tree at level %d", at, level)
	case t.v5 && !sumAt(b, 52):
		return fmt.Errorf("block %d of its tree does not match its checksum", at)
	case t.v5 && (int64(be.Uint64(b[16:])) != off/512 || [16]byte(b[32:48]) != t.meta || int64(be.Uint32(b[48:])) != t.ag):
		return fmt.Errorf("block %d of its tree belongs elsewhere", at)
	}
	if level == 0 {
		if n > (t.block-head)/8 {
			return fmt.Errorf("block %d of its tree has %d records", at, n)
		}
		return t.leaf(b[head:][:n*8], first)
	}
	most := (t.block - head) / 12
	if n < 1 || n > most {
		return fmt.Errorf("block %d of its tree has %d children", at, n)
	}
	keys, kids := b[head:], b[head+most*8:]
	for i := range n {
		key := int64(be.Uint32(keys[i*8:]))
		if key < t.last || key < first {
			return fmt.Errorf("block %d of its tree is out of order", at)
		}
		if err := t.walk(int64(be.Uint32(kids[i*4:])), level-1, key); err != nil {
			return err
		}
	}
	return nil
}

func (t *tree) leaf(b []byte, first int64) error {
	for ; len(b) > 0; b = b[8:] {
		from, n := int64(be.Uint32(b)), int64(be.Uint32(b[4:]))
		if from < t.last || from < first || n == 0 || from+n > t.length(t.ag) {
			return fmt.Errorf("its tree has %d free blocks at %d, where that cannot be", n, from)
		}
		start := t.ag*t.agBlocks + from
		if start < t.logStart+t.logBlocks && t.logStart < start+n {
			return errors.New("its tree says that the log is free")
		}
		if err := t.emit(start*t.block, n*t.block); err != nil {
			return err
		}
		t.last = from + n
		t.free += n
	}
	return nil
}
