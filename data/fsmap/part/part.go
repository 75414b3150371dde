// Package part reads partition tables: MBR with its extended partitions, and
// GPT. It is a pure reader over an io.ReaderAt and never guesses: a table that
// contradicts itself, its backup or the size of the disk is an error, and then
// nobody knows where a file system lies.
//
// Invariants: what is returned lies inside the disk, in order, without overlap;
// time and memory are bounded whatever the bytes say; nothing panics.
package part

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"unicode/utf16"

	"forerun/data/fsmap/internal/layout"
)

// Table says which kind of table a disk has.
type Table string

// The kinds.
const (
	None Table = "none"
	MBR  Table = "mbr"
	GPT  Table = "gpt"
)

// Partition is a range of the disk that its table names.
type Partition struct {
	Off, Size int64  // bytes
	Type      string // "83", or a GUID in capitals
	Name      string // of a GPT partition
	// FileSystem says that the type is one of those that hold a plain file
	// system, rather than a member of something.
	FileSystem bool
}

const (
	maxLogical  = 256     // partitions in one extended partition
	maxEntries  = 4096    // of a GPT
	maxEntryLen = 4096    // bytes
	maxTable    = 4 << 20 // bytes of a GPT's entries
)

// Read reads the table of a disk of size bytes. sector is the unit the disk
// is addressed in, 512 or 4096 bytes; a GPT is also found with the other one.
// An error means that there is a table, or remains of one, that cannot be
// trusted, or that reading failed.
func Read(r io.ReaderAt, size int64, sector int) (Table, []Partition, error) {
	if sector != 4096 {
		sector = 512
	}
	if size < 2*int64(sector) {
		return None, nil, nil
	}
	boot := make([]byte, 512)
	if err := layout.Read(r, boot, 0); err != nil {
		return None, nil, err
	}
	mbr, isMBR := parseMBR(boot)
	var gptSector int
	for _, s := range []int{512, 4096} {
		var magic [8]byte
		if size < 2*int64(s) {
			continue
		}
		if err := layout.Read(r, magic[:], int64(s)); err != nil {
			return None, nil, err
		}
		if string(magic[:]) == gptMagic {
			if gptSector != 0 {
				return GPT, nil, errors.New("the disk has two partition tables, for sectors of 512 and of 4096 bytes")
			}
			gptSector = s
		}
	}
	protective := isMBR && slices.ContainsFunc(mbr[:], func(e mbrEntry) bool { return e.kind == 0xee })
	switch {
	case gptSector != 0 && !protective:
		return GPT, nil, errors.New("there is a GPT, but the boot sector does not say so: one of the two is out of date")
	case protective && gptSector == 0:
		return GPT, nil, errors.New("the boot sector announces a GPT that is not there or is damaged")
	case protective:
		for _, e := range mbr {
			if e.kind != 0 && e.kind != 0xee {
				return GPT, nil, errors.New("the disk has a GPT and partitions in its boot sector too")
			}
		}
		p, err := readGPT(r, size, int64(gptSector))
		return GPT, trusted(p, err), err
	case !isMBR:
		return None, nil, nil
	}
	p, err := readMBR(r, size, int64(sector), mbr)
	return MBR, trusted(p, err), err
}

func trusted(p []Partition, err error) []Partition {
	if err != nil {
		return nil
	}
	return p
}

type mbrEntry struct {
	status, kind byte
	start, count uint32 // sectors
}

func (e mbrEntry) extended() bool { return e.kind == 0x05 || e.kind == 0x0f || e.kind == 0x85 }

// parseMBR takes a boot sector apart and says whether it holds a table at all:
// the signature is also that of the boot sectors of file systems.
func parseMBR(b []byte) (t [4]mbrEntry, ok bool) {
	if b[510] != 0x55 || b[511] != 0xaa {
		return t, false
	}
	for i := range t {
		e := b[446+16*i:]
		t[i] = mbrEntry{e[0], e[4], binary.LittleEndian.Uint32(e[8:]), binary.LittleEndian.Uint32(e[12:])}
		if t[i].status&0x7f != 0 || t[i].kind != 0 && (t[i].start == 0 || t[i].count == 0) {
			return t, false
		}
		ok = ok || t[i].kind != 0
	}
	return t, ok
}

func readMBR(r io.ReaderAt, size, sector int64, t [4]mbrEntry) ([]Partition, error) {
	var all, outer []Partition
	for _, e := range t {
		if e.kind == 0 {
			continue
		}
		p := mbrPartition(e, int64(e.start), sector)
		if p.Off+p.Size > size {
			return nil, fmt.Errorf("a partition ends at %d, beyond the disk's %d bytes", p.Off+p.Size, size)
		}
		outer = append(outer, p)
		if !e.extended() {
			all = append(all, p)
			continue
		}
		inner, err := readExtended(r, p, int64(e.start), sector)
		if err != nil {
			return nil, err
		}
		all = append(all, inner...)
	}
	if err := apart(outer); err != nil {
		return nil, err
	}
	return all, apart(all)
}

func mbrPartition(e mbrEntry, start, sector int64) Partition {
	return Partition{Off: start * sector, Size: int64(e.count) * sector, Type: fmt.Sprintf("%02x", e.kind),
		FileSystem: e.kind == 0x83 || e.kind == 0x07 || e.kind == 0x17 || e.kind == 0x27}
}

// readExtended follows the chain of boot records in the extended partition p,
// which begins at sector base. Offsets of data are relative to their record,
// those of the next record to base.
func readExtended(r io.ReaderAt, p Partition, base, sector int64) ([]Partition, error) {
	var all []Partition
	b := make([]byte, 512)
	at := base
	for range maxLogical {
		if err := layout.Read(r, b, at*sector); err != nil {
			return nil, err
		}
		if b[510] != 0x55 || b[511] != 0xaa {
			return nil, fmt.Errorf("the extended partition has no boot record at sector %d", at)
		}
		t, _ := parseMBR(b)
		data, next := t[0], t[1]
		if t[2].kind != 0 || t[3].kind != 0 || data.extended() || next.kind != 0 && !next.extended() {
			return nil, fmt.Errorf("the boot record at sector %d of the extended partition is of no known form", at)
		}
		if data.kind != 0 {
			l := mbrPartition(data, at+int64(data.start), sector)
			if data.start == 0 || data.count == 0 || l.Off+l.Size > p.Off+p.Size {
				return nil, fmt.Errorf("a logical partition at %d does not lie inside the extended one", l.Off)
			}
			all = append(all, l)
		}
		if next.kind == 0 {
			return all, nil
		}
		at = base + int64(next.start)
		if next.start == 0 || (at+1)*sector > p.Off+p.Size {
			return nil, errors.New("the chain of logical partitions leaves the extended one")
		}
	}
	return nil, fmt.Errorf("more than %d logical partitions, or a chain without end", maxLogical)
}

// apart sorts partitions and refuses those that overlap.
func apart(all []Partition) error {
	slices.SortFunc(all, func(a, b Partition) int {
		switch {
		case a.Off < b.Off:
			return -1
		case a.Off > b.Off:
			return 1
		}
		return 0
	})
	for i := 1; i < len(all); i++ {
		if q := all[i-1]; q.Off+q.Size > all[i].Off {
			return fmt.Errorf("the partitions at %d and %d overlap", q.Off, all[i].Off)
		}
	}
	return nil
}

const gptMagic = "EFI PART"

// gptHeader is what counts of one header.
type gptHeader struct {
	self, other, first, last uint64 // sectors
	guid                     [16]byte
	entries                  uint64 // sector
	count, length            uint32
	sum                      uint32 // of the entries
}

func readGPTHeader(r io.ReaderAt, size, sector int64, at uint64) (h gptHeader, err error) {
	if at == 0 || at >= uint64(size/sector) {
		return h, fmt.Errorf("a header of the GPT would be at sector %d, outside the disk", at)
	}
	b := make([]byte, sector)
	if err := layout.Read(r, b, int64(at)*sector); err != nil {
		return h, err
	}
	le := binary.LittleEndian
	n := le.Uint32(b[12:])
	if string(b[:8]) != gptMagic || le.Uint32(b[8:]) != 0x10000 || n < 92 || int64(n) > sector {
		return h, fmt.Errorf("there is no GPT header at sector %d", at)
	}
	want := le.Uint32(b[16:])
	clear(b[16:20])
	if crc32.ChecksumIEEE(b[:n]) != want {
		return h, fmt.Errorf("the GPT header at sector %d does not match its checksum", at)
	}
	h = gptHeader{self: le.Uint64(b[24:]), other: le.Uint64(b[32:]), first: le.Uint64(b[40:]), last: le.Uint64(b[48:]),
		guid: [16]byte(b[56:72]), entries: le.Uint64(b[72:]), count: le.Uint32(b[80:]), length: le.Uint32(b[84:]), sum: le.Uint32(b[88:])}
	sectors := uint64(size / sector)
	switch {
	case h.self != at:
		return h, fmt.Errorf("the GPT header at sector %d says it is at %d", at, h.self)
	case h.count > maxEntries, h.length < 128, h.length > maxEntryLen, h.length%8 != 0, h.count*h.length > maxTable:
		return h, fmt.Errorf("a GPT of %d entries of %d bytes", h.count, h.length)
	case h.first > h.last, h.last >= sectors, h.entries < 2, h.entries >= sectors:
		return h, errors.New("the GPT reaches beyond the disk")
	}
	return h, nil
}

func (h *gptHeader) readEntries(r io.ReaderAt, size, sector int64) ([]byte, error) {
	b := make([]byte, h.count*h.length)
	if off := int64(h.entries) * sector; off > size-int64(len(b)) {
		return nil, errors.New("the entries of the GPT reach beyond the disk")
	} else if err := layout.Read(r, b, off); err != nil {
		return nil, err
	}
	if crc32.ChecksumIEEE(b) != h.sum {
		return nil, errors.New("the entries of the GPT do not match their checksum")
	}
	return b, nil
}

func readGPT(r io.ReaderAt, size, sector int64) ([]Partition, error) {
	h, err := readGPTHeader(r, size, sector, 1)
	if err != nil {
		return nil, err
	}
	entries, err := h.readEntries(r, size, sector)
	if err != nil {
		return nil, err
	}
	back, err := readGPTHeader(r, size, sector, h.other)
	if err != nil {
		return nil, fmt.Errorf("the backup: %w", err)
	}
	copied, err := back.readEntries(r, size, sector)
	if err != nil {
		return nil, fmt.Errorf("the backup: %w", err)
	}
	if back.other != 1 || back.guid != h.guid || back.first != h.first || back.last != h.last ||
		back.length != h.length || !bytes.Equal(entries, copied) {
		return nil, errors.New("the GPT and its backup differ")
	}
	var all []Partition
	for at := 0; at+int(h.length) <= len(entries); at += int(h.length) {
		e := entries[at:]
		if [16]byte(e[:16]) == [16]byte{} {
			continue
		}
		first, last := binary.LittleEndian.Uint64(e[32:]), binary.LittleEndian.Uint64(e[40:])
		if first < h.first || last > h.last || first > last {
			return nil, fmt.Errorf("a partition of sectors %d to %d, where %d to %d can be used", first, last, h.first, h.last)
		}
		g := guid(e)
		all = append(all, Partition{Off: int64(first) * sector, Size: int64(last-first+1) * sector, Type: g,
			Name: name(e[56:128]), FileSystem: plain[g]})
	}
	return all, apart(all)
}

// plain are the GPT types whose partitions hold a file system directly.
var plain = map[string]bool{
	"0FC63DAF-8483-4772-8E79-3D69D8477DE4": true, // Linux file system
	"4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709": true, // Linux root, x86-64
	"B921B045-1DF0-41C3-AF44-4C6F280D3FAE": true, // Linux root, arm64
	"44479540-F297-41B2-9AF7-D131D5F0458A": true, // Linux root, x86
	"933AC7E1-2EB4-4F13-B844-0E14E2AEF915": true, // Linux /home
	"3B8F8425-20E0-4F3B-907F-1A25A76F98E8": true, // Linux /srv
	"4D21B016-B534-45C2-A9FB-5C16E091FD2D": true, // Linux /var
	"7EC6F557-3BC5-4ACA-B293-16EF5DF639D1": true, // Linux /var/tmp
	"8484680C-9521-48C6-9C11-B0720656F69E": true, // Linux /usr, x86-64
	"BC13C2FF-59E6-4262-A352-B275FD6F7172": true, // Linux /boot
	"EBD0A0A2-B9E5-4433-87C0-68B6B72699C7": true, // Microsoft basic data
	"DE94BBA4-06D1-4D40-A16A-BFD50179D6AC": true, // Windows recovery
}

// guid prints a GUID as it lies on disk: three parts little-endian, two not.
func guid(b []byte) string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08X-%04X-%04X-%X-%X", le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:]), b[8:10], b[10:16])
}

func name(b []byte) string {
	u := make([]uint16, 0, len(b)/2)
	for ; len(b) >= 2; b = b[2:] {
		c := binary.LittleEndian.Uint16(b)
		if c == 0 {
			break
		}
		u = append(u, c)
	}
	return string(utf16.Decode(u))
}
