package fsmap

import (
	"fmt"
	"math/bits"
	"sync"
)

const (
	pageUnits = 1 << 15
	pageWords = pageUnits / 64
)

// page has a bit for each unit that is free.
type page [pageWords]uint64

// full stands for every page of free units; it is never changed.
var full = func() *page {
	p := new(page)
	for i := range p {
		p[i] = ^uint64(0)
	}
	return p
}()

// FileSystem describes what was found in a partition, or on the whole disk.
type FileSystem struct {
	Off, Size   int64  // bytes, of the partition
	Partition   string // its name or type in the table, empty on a whole disk
	Type        string // "ext4", "xfs", "ntfs", the name of something else, or empty
	Label, UUID string
	// FreeBytes is what it does not use, also in pieces smaller than a unit.
	FreeBytes int64
	// Reason says why none of it counts as free, empty when it does.
	Reason string
}

// String is one line for a log.
func (f FileSystem) String() string {
	t := f.Type
	if t == "" {
		t = "nothing known"
	}
	if f.Reason != "" {
		return fmt.Sprintf("%s at %d: %s", t, f.Off, f.Reason)
	}
	return fmt.Sprintf("%s at %d: %d of %d bytes are free", t, f.Off, f.FreeBytes, f.Size)
}

// Map says which units of a disk no file system uses. It may be used by many
// goroutines at once.
type Map struct {
	systems []FileSystem
	table   string
	unit    int64
	units   int64

	mu    sync.RWMutex
	pages []*page // nil: none is free
	count int64   // units that are free
}

func newMap(size, unit int64) *Map {
	m := &Map{unit: unit, units: size / unit} // what is left of a last unit is data
	m.pages = make([]*page, (m.units+pageUnits-1)/pageUnits)
	return m
}

// FileSystems is what was found, in the order of the disk.
func (m *Map) FileSystems() []FileSystem { return m.systems }

// Table is the kind of partition table: "gpt", "mbr" or "none".
func (m *Map) Table() string { return m.table }

// Unit is the length in bytes of the pieces the map is in. They begin at its multiples.
func (m *Map) Unit() int64 { return m.unit }

// FreeBytes is how many bytes, in whole units, are free now.
func (m *Map) FreeBytes() int64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.count * m.unit
}

// Next returns the first free range that ends after off, or ok false when
// there is none.
func (m *Map) Next(off int64) (from, to int64, ok bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	u := m.find(max(off, 0)/m.unit, true)
	if u >= m.units {
		return 0, 0, false
	}
	return u * m.unit, m.find(u, false) * m.unit, true
}

// find is the first unit at or after u that is, or is not, free; units when
// there is none.
func (m *Map) find(u int64, free bool) int64 {
	for u < m.units {
		p := m.pages[u/pageUnits]
		if p == nil || p == full {
			if (p == full) == free {
				return u
			}
			u = (u/pageUnits + 1) * pageUnits
			continue
		}
		w := p[u%pageUnits/64]
		if !free {
			w = ^w
		}
		if w >>= u & 63; w != 0 {
			return min(m.units, u+int64(bits.TrailingZeros64(w)))
		}
		u = (u/64 + 1) * 64
	}
	return m.units
}

// set makes the units [from, to) free or not.
func (m *Map) set(from, to int64, free bool) {
	to = min(to, m.units)
	for from < to {
		pi := from / pageUnits
		end := min(to, (pi+1)*pageUnits)
		p := m.pages[pi]
		last := min(m.units, (pi+1)*pageUnits)
		switch {
		case p == nil && !free || p == full && free:
			from = end
			continue
		case p == nil && free && from == pi*pageUnits && end == last:
			m.pages[pi] = full
			m.count += end - from
			from = end
			continue
		case p == nil:
			p = new(page)
			m.pages[pi] = p
		case p == full:
			c := *full
			p = &c
			m.pages[pi] = p
		}
		for from < end {
			n := min(end-from, 64-from&63)
			mask := ^uint64(0) >> (64 - n) << (from & 63)
			w := &p[from%pageUnits/64]
			had := bits.OnesCount64(*w & mask)
			if free {
				*w |= mask
				m.count += n - int64(had)
			} else {
				*w &^= mask
				m.count -= int64(had)
			}
			from += n
		}
	}
}

// free makes the units free that lie wholly in [off, off+n).
func (m *Map) free(off, n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.set((off+m.unit-1)/m.unit, (off+n)/m.unit, true)
}

// Use takes every unit out of the map that [off, off+n) touches.
func (m *Map) Use(off, n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.set(off/m.unit, (off+n+m.unit-1)/m.unit, false)
}
