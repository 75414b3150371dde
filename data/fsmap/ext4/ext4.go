// Package ext4 tells which blocks an ext2, ext3 or ext4 file system does not
// use, from its group descriptors and block bitmaps.
//
// It is a pure reader and prefers silence to a guess. A file system that was
// not unmounted cleanly, one with a feature it does not know, a checksum that
// does not match, a count that its bitmap contradicts: an error, and what was
// emitted before it is worth nothing.
//
// The format is that of the kernel's Documentation/filesystems/ext4. Time is
// that of reading each bitmap once; memory is three blocks.
package ext4

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"forerun/data/fsmap/internal/layout"
)

// ErrOther means that there is no such file system.
var ErrOther = errors.New("not ext2, ext3 or ext4")

// ErrDirty means that the file system was not unmounted cleanly.
var ErrDirty = errors.New("it was not unmounted cleanly")

// Info describes a file system.
type Info struct {
	Type        string // ext2, ext3 or ext4
	Label, UUID string
	Size        int64 // bytes
	BlockBytes  int
}

const (
	superAt  = 1024
	superLen = 1024
	magic    = 0xef53

	stateValid = 1

	compatJournal     = 0x4
	compatLazyBG      = 0x40
	compatExclude     = 0x80 | 0x100
	compatSparse2     = 0x200
	incompatRecover   = 0x4
	incompatMetaBG    = 0x10
	incompatExtents   = 0x40
	incompat64        = 0x80
	incompatFlexBG    = 0x200
	incompatCsumSeed  = 0x2000
	knownIncompat     = 0x2 | incompatMetaBG | incompatExtents | incompat64 | incompatFlexBG | 0x400 | incompatCsumSeed | 0x4000 | 0x8000 | 0x10000 | 0x20000
	roSparse          = 0x1
	roGDTCsum         = 0x10
	roBigalloc        = 0x200
	roMetaCsum        = 0x400
	roOrphans         = 0x10000
	knownRO           = roSparse | 0x2 | 0x4 | 0x8 | roGDTCsum | 0x20 | 0x40 | 0x100 | roBigalloc | roMetaCsum | 0x1000 | 0x2000 | 0x8000
	ext4Only          = incompatExtents | incompat64 | incompatFlexBG | 0x400 | incompatCsumSeed | 0x4000 | 0x8000 | 0x10000 | 0x20000
	ext4OnlyRO        = 0x8 | roGDTCsum | 0x20 | 0x40 | roBigalloc | roMetaCsum | 0x2000 | 0x8000
	groupBlockUninit  = 0x2
	descBitmapCsumEnd = 0x3a
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// crc32c is the kernel's: no inversion, neither before nor after.
func crc32c(crc uint32, p []byte) uint32 { return ^crc32.Update(^crc, castagnoli, p) }

// fs is a superblock that was found good, and what follows from it.
type fs struct {
	r    io.ReaderAt
	Info Info

	block, blocks, first          int64 // bytes of a block; blocks; the first that groups count from
	ratio                         int64 // blocks per cluster
	perGroup, clusters            int64 // blocks and clusters per group
	groups                        int64
	descLen, perBlock             int64 // bytes of a descriptor; descriptors per block
	tables, reserved, firstMeta   int64 // blocks of descriptors, reserved for more; first meta group
	inodeTable                    int64 // blocks of a group's inode table
	free                          int64 // blocks, as the superblock says
	seed                          uint32
	compat, incompat, ro          uint32
	backups                       [2]int64
	uuid                          [16]byte
	metaCsum, gdtCsum, metaGroups bool
}

// Probe says whether head, at least 2048 bytes from the beginning, has the mark of an
// ext file system.
func Probe(head []byte) bool {
	return len(head) >= superAt+0x3a && binary.LittleEndian.Uint16(head[superAt+0x38:]) == magic
}

// Free emits the free ranges of the file system in the first size bytes of r,
// in bytes and in order. An error of emit ends it. ErrOther: there is no such
// file system; any other error is why its free space cannot be known, also after some of it was emitted.
func Free(r io.ReaderAt, size int64, emit func(off, n int64) error) (Info, error) {
	f := &fs{r: r}
	if err := f.super(size); err != nil {
		return f.Info, err
	}
	return f.Info, f.walk(emit)
}

func (f *fs) super(size int64) error {
	if size < superAt+superLen {
		return ErrOther
	}
	b := make([]byte, superLen)
	if err := layout.Read(f.r, b, superAt); err != nil {
		return err
	}
	le := binary.LittleEndian
	if le.Uint16(b[0x38:]) != magic {
		return ErrOther
	}
	f.compat, f.incompat, f.ro = le.Uint32(b[0x5c:]), le.Uint32(b[0x60:]), le.Uint32(b[0x64:])
	f.uuid = [16]byte(b[0x68:0x78])
	u := f.uuid
	f.Info = Info{Type: f.kind(), Label: layout.Text(b[0x78:0x88]), UUID: fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])}
	if err := f.geometry(b, size); err != nil {
		return err
	}
	if f.metaCsum {
		if b[0x175] != 1 {
			return fmt.Errorf("checksums of type %d are not known", b[0x175])
		}
		if crc32c(^uint32(0), b[:0x3fc]) != le.Uint32(b[0x3fc:]) {
			return errors.New("the superblock does not match its checksum")
		}
		f.seed = crc32c(^uint32(0), f.uuid[:])
		if f.incompat&incompatCsumSeed != 0 {
			f.seed = le.Uint32(b[0x270:])
		}
	}
	return f.clean(b)
}

// clean refuses what was not unmounted cleanly, and features it does not know.
func (f *fs) clean(b []byte) error {
	le := binary.LittleEndian
	if f.incompat&incompatRecover != 0 || le.Uint16(b[0x3a:]) != stateValid || f.ro&roOrphans != 0 || le.Uint32(b[0xe8:]) != 0 {
		return ErrDirty
	}
	if u := f.incompat &^ knownIncompat; u != 0 {
		return fmt.Errorf("it has features (incompat %#x) that are not known", u)
	}
	if u := f.ro &^ (knownRO | roOrphans); u != 0 {
		return fmt.Errorf("it has features (ro_compat %#x) that are not known", u)
	}
	if u := f.compat & (compatLazyBG | compatExclude); u != 0 {
		return fmt.Errorf("it has features (compat %#x) that are not known", u)
	}
	return nil
}

func (f *fs) kind() string {
	switch {
	case f.incompat&ext4Only != 0 || f.ro&ext4OnlyRO != 0:
		return "ext4"
	case f.compat&compatJournal != 0:
		return "ext3"
	}
	return "ext2"
}

func (f *fs) geometry(b []byte, size int64) error {
	le := binary.LittleEndian
	u32 := func(at int) int64 { return int64(le.Uint32(b[at:])) }
	bad := func(what string, v int64) error { return fmt.Errorf("its superblock says %s %d", what, v) }
	logBlock, logCluster := u32(0x18), u32(0x1c)
	if logBlock > 6 {
		return bad("block size 2^10+", logBlock)
	}
	f.block = 1024 << logBlock
	f.Info.BlockBytes = int(f.block)
	f.first, f.ratio = u32(0x14), 1
	bigalloc := f.ro&roBigalloc != 0
	if bigalloc {
		if logCluster < logBlock || logCluster > logBlock+20 {
			return bad("cluster size 2^10+", logCluster)
		}
		f.ratio = 1 << (logCluster - logBlock)
	}
	f.blocks, f.free = u32(0x04), u32(0x0c)
	f.descLen = 32
	if f.incompat&incompat64 != 0 {
		f.blocks |= u32(0x150) << 32
		f.free |= u32(0x158) << 32
		f.descLen = int64(le.Uint16(b[0xfe:]))
	}
	f.perGroup, f.clusters = u32(0x20), u32(0x20)
	if bigalloc {
		f.clusters = u32(0x24)
	}
	perGroupInodes, inodeLen := u32(0x28), int64(128)
	if u32(0x4c) > 0 {
		inodeLen = int64(le.Uint16(b[0x58:]))
	}
	switch {
	case u32(0x4c) > 1:
		return bad("revision", u32(0x4c))
	case le.Uint16(b[0x5a:]) != 0:
		return bad("that it is the copy of group", int64(le.Uint16(b[0x5a:])))
	case f.blocks <= f.first || f.blocks > size/f.block:
		return fmt.Errorf("it has %d blocks of %d bytes, where %d bytes are", f.blocks, f.block, size)
	case f.first > 1 || f.first == 1 && f.block != 1024 || f.first == 0 && f.block == 1024 && !bigalloc:
		return bad("first data block", f.first)
	case f.clusters < 8 || f.clusters%8 != 0 || f.clusters > 8*f.block || f.perGroup != f.clusters*f.ratio:
		return bad("clusters per group", f.clusters)
	case f.descLen < 32 || f.incompat&incompat64 != 0 && f.descLen < 64 || f.descLen&(f.descLen-1) != 0 || f.descLen > 1024:
		return bad("descriptor size", f.descLen)
	case inodeLen < 128 || inodeLen&(inodeLen-1) != 0 || inodeLen > f.block:
		return bad("inode size", inodeLen)
	case perGroupInodes == 0 || perGroupInodes > 8*f.block:
		return bad("inodes per group", perGroupInodes)
	}
	f.groups = (f.blocks - f.first + f.perGroup - 1) / f.perGroup
	f.perBlock = f.block / f.descLen
	f.tables = (f.groups + f.perBlock - 1) / f.perBlock
	f.reserved = int64(le.Uint16(b[0xce:]))
	f.inodeTable = (perGroupInodes*inodeLen + f.block - 1) / f.block
	f.metaGroups = f.incompat&incompatMetaBG != 0
	f.firstMeta = u32(0x104)
	if f.metaGroups && f.firstMeta > f.tables {
		return bad("first meta group", f.firstMeta)
	}
	f.backups = [2]int64{u32(0x24c), u32(0x250)}
	f.Info.Size = f.blocks * f.block
	f.metaCsum = f.ro&roMetaCsum != 0
	f.gdtCsum = !f.metaCsum && f.ro&roGDTCsum != 0
	return nil
}

func (f *fs) groupStart(g int64) int64 { return f.first + g*f.perGroup }

func (f *fs) groupBlocks(g int64) int64 { return min(f.perGroup, f.blocks-f.groupStart(g)) }

// hasSuper says whether group g has a copy of the superblock.
func (f *fs) hasSuper(g int64) bool {
	switch {
	case g == 0:
		return true
	case f.compat&compatSparse2 != 0:
		return g == f.backups[0] || g == f.backups[1]
	case g == 1 || f.ro&roSparse == 0:
		return true
	case g%2 == 0:
		return false
	}
	for _, base := range []int64{3, 5, 7} {
		n := base
		for n < g {
			n *= base
		}
		if n == g {
			return true
		}
	}
	return false
}

// tableBlock is where the nth block of descriptors is.
func (f *fs) tableBlock(n int64) int64 {
	super := int64(superAt / f.block)
	if !f.metaGroups || n < f.firstMeta {
		return super + n + 1
	}
	g := n * f.perBlock
	at := f.groupStart(g)
	if f.hasSuper(g) {
		at++
	}
	if f.block == 1024 && n == 0 && f.first == 0 {
		at++
	}
	return at
}

// baseBlocks is how many blocks at the beginning of group g hold copies of
// superblock and descriptors.
func (f *fs) baseBlocks(g int64) (n int64) {
	if f.hasSuper(g) {
		n = 1
	}
	meta := g / f.perBlock
	if !f.metaGroups || meta < f.firstMeta {
		if n == 0 {
			return 0
		}
		if f.metaGroups {
			return n + f.firstMeta + f.reserved
		}
		return n + f.tables + f.reserved
	}
	if at := g % f.perBlock; at == 0 || at == 1 || at == f.perBlock-1 {
		n++
	}
	return n
}

// group is one descriptor.
type group struct {
	bitmap, inodes, table int64 // blocks
	free                  int64 // clusters
	flags                 uint16
	sum                   uint32 // of the bitmap
	wide                  bool   // sum has 32 bits
}

func (f *fs) descriptor(d []byte, g int64) (group, error) {
	le := binary.LittleEndian
	if f.metaCsum || f.gdtCsum {
		if f.descSum(d, g) != le.Uint16(d[0x1e:]) {
			return group{}, fmt.Errorf("the descriptor of group %d does not match its checksum", g)
		}
	}
	x := group{bitmap: int64(le.Uint32(d)), inodes: int64(le.Uint32(d[4:])), table: int64(le.Uint32(d[8:])),
		free: int64(le.Uint16(d[0xc:])), flags: le.Uint16(d[0x12:]), sum: uint32(le.Uint16(d[0x18:]))}
	if f.incompat&incompat64 != 0 && f.descLen >= 64 {
		x.bitmap |= int64(le.Uint32(d[0x20:])) << 32
		x.inodes |= int64(le.Uint32(d[0x24:])) << 32
		x.table |= int64(le.Uint32(d[0x28:])) << 32
		x.free |= int64(le.Uint16(d[0x2c:])) << 16
	}
	if f.descLen >= descBitmapCsumEnd {
		x.sum |= uint32(le.Uint16(d[0x38:])) << 16
		x.wide = true
	}
	for _, at := range []int64{x.bitmap, x.inodes, x.table + f.inodeTable - 1} {
		if at <= f.first || at >= f.blocks {
			return group{}, fmt.Errorf("the descriptor of group %d names block %d, which there is not", g, at)
		}
	}
	return x, nil
}

func (f *fs) descSum(d []byte, g int64) uint16 {
	n := binary.LittleEndian.AppendUint32(nil, uint32(g))
	if f.metaCsum {
		crc := crc32c(f.seed, n)
		crc = crc32c(crc, d[:0x1e])
		crc = crc32c(crc, []byte{0, 0})
		return uint16(crc32c(crc, d[0x20:f.descLen]))
	}
	crc := crc16(^uint16(0), f.uuid[:])
	crc = crc16(crc, n)
	crc = crc16(crc, d[:0x1e])
	if f.incompat&incompat64 != 0 {
		crc = crc16(crc, d[0x20:f.descLen])
	}
	return crc
}

// crc16 is CRC-16/ARC, as in the kernel's lib/crc16.
func crc16(crc uint16, p []byte) uint16 {
	for _, b := range p {
		crc ^= uint16(b)
		for range 8 {
			if crc&1 != 0 {
				crc = crc>>1 ^ 0xa001
			} else {
				crc >>= 1
			}
		}
	}
	return crc
}

// walk goes through the groups in order.
func (f *fs) walk(emit func(off, n int64) error) error {
	table, bitmap, meta := make([]byte, f.block), make([]byte, f.block), make([]byte, f.block)
	var total int64
	for g := range f.groups {
		if g%f.perBlock == 0 {
			at := f.tableBlock(g / f.perBlock)
			if at >= f.blocks {
				return fmt.Errorf("the descriptors of group %d would be in block %d, which there is not", g, at)
			}
			if err := layout.Read(f.r, table, at*f.block); err != nil {
				return err
			}
		}
		d, err := f.descriptor(table[g%f.perBlock*f.descLen:][:f.descLen], g)
		if err != nil {
			return err
		}
		if err := f.fresh(meta, g, d); err != nil {
			return err
		}
		if (f.metaCsum || f.gdtCsum) && d.flags&groupBlockUninit != 0 {
			copy(bitmap, meta)
		} else if err := f.load(bitmap, meta, g, d); err != nil {
			return err
		}
		n := (f.groupBlocks(g) + f.ratio - 1) / f.ratio
		free, err := f.emit(bitmap, g, n, emit)
		if err != nil {
			return err
		}
		if free != d.free {
			return fmt.Errorf("group %d has %d free clusters in its bitmap and %d in its descriptor", g, free, d.free)
		}
		total += free
	}
	if total*f.ratio != f.free {
		return fmt.Errorf("%d blocks are free, its superblock says %d", total*f.ratio, f.free)
	}
	return nil
}

// load reads the bitmap of group g into b. It must have what meta has.
func (f *fs) load(b, meta []byte, g int64, d group) error {
	if err := layout.Read(f.r, b, d.bitmap*f.block); err != nil {
		return err
	}
	if f.metaCsum {
		sum := crc32c(f.seed, b[:f.clusters/8])
		if !d.wide {
			sum &= 0xffff
		}
		if sum != d.sum {
			return fmt.Errorf("the block bitmap of group %d does not match its checksum", g)
		}
	}
	for i, m := range meta {
		if b[i]&m != m {
			return fmt.Errorf("the block bitmap of group %d says that the group's own metadata is free", g)
		}
	}
	return nil
}

// fresh is the bitmap that a group has before its first use: none is kept,
// and only metadata is in it.
func (f *fs) fresh(b []byte, g int64, d group) error {
	clear(b)
	start, n := f.groupStart(g), f.groupBlocks(g)
	set := func(from, to int64) { // blocks in the group
		for c := from / f.ratio; c*f.ratio < to; c++ {
			b[c>>3] |= 1 << (c & 7)
		}
	}
	base := f.baseBlocks(g)
	if f.block == 1024 && f.first == 0 && g == 0 {
		base++
	}
	if base > n {
		return fmt.Errorf("group %d of %d blocks cannot hold %d of metadata", g, n, base)
	}
	set(0, base)
	for _, r := range [][2]int64{{d.bitmap, 1}, {d.inodes, 1}, {d.table, f.inodeTable}} {
		from, to := max(r[0]-start, 0), min(r[0]+r[1]-start, n)
		if from < to {
			set(from, to)
		}
	}
	return nil
}

// emit emits the runs of zero bits among the first n and counts them. A
// cluster that the end of the file system cuts is emitted up to there.
func (f *fs) emit(b []byte, g, n int64, emit func(off, n int64) error) (free int64, err error) {
	start := f.groupStart(g)
	for at := int64(0); at < n; {
		from := layout.Next(b, at, n, 0)
		if from >= n {
			break
		}
		to := layout.Next(b, from, n, 1)
		end := min(start+to*f.ratio, f.blocks)
		if err := emit((start+from*f.ratio)*f.block, (end-start-from*f.ratio)*f.block); err != nil {
			return free, err
		}
		free += to - from
		at = to
	}
	return free, nil
}
