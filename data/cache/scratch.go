package cache

import (
	"hash/crc32"
	"sync"
	"sync/atomic"

	"forerun/block"
	"forerun/disk"
)

const (
	crcShift = 12 // a checksum per 4 KiB
	none     = int32(-1)
	// patience is how many writes in a row may fail before the file is left alone.
	patience = 8
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// scratch is a file of slots of one chunk each.
type scratch struct {
	file  disk.File
	shift uint // of a chunk's bytes
	crcs  int  // checksums per slot

	mu      sync.RWMutex
	index   map[int64]int32 // chunk to slot
	slots   []slot
	sums    []uint32
	free    []int32
	limit   int // slots the file may have
	demand  list
	filler  list // brought by the background
	failing int  // writes in a row that failed
	off     bool

	failures atomic.Int64
	corrupt  atomic.Int64
	evicted  atomic.Int64
}

type slot struct {
	gen        atomic.Uint32
	touched    atomic.Bool
	chunk      int64
	length     int32
	state      uint8
	background bool
	prev, next int32
}

const (
	slotFree    = 0
	slotWriting = 1
	slotFull    = 2
	slotDoomed  = 3 // dropped while it was being written
)

// list is a queue of slots by index; head leaves next.
type list struct{ head, tail int32 }

func newScratch(f disk.File, chunkShift uint, bytes int64) *scratch {
	n := int(min(bytes>>chunkShift, 1<<30))
	return &scratch{file: f, shift: chunkShift, crcs: 1 << (chunkShift - crcShift), limit: n,
		index: make(map[int64]int32), demand: list{none, none}, filler: list{none, none}}
}

func (s *scratch) queue(i int32) *list {
	if s.slots[i].background {
		return &s.filler
	}
	return &s.demand
}

func (s *scratch) push(i int32) {
	q, e := s.queue(i), &s.slots[i]
	e.prev, e.next = q.tail, none
	if q.tail == none {
		q.head = i
	} else {
		s.slots[q.tail].next = i
	}
	q.tail = i
}

func (s *scratch) unlink(i int32) {
	q, e := s.queue(i), &s.slots[i]
	if e.prev == none {
		q.head = e.next
	} else {
		s.slots[e.prev].next = e.next
	}
	if e.next == none {
		q.tail = e.prev
	} else {
		s.slots[e.next].prev = e.prev
	}
}

// found is a slot at the moment it was looked up.
type found struct {
	slot   int32
	gen    uint32
	length int
}

// find looks a chunk up and copies the checksums of its blocks [b0, b1) to sums.
func (s *scratch) find(chunk int64, b0, b1 int, sums *[256]uint32) (found, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	i, ok := s.index[chunk]
	if !ok || s.slots[i].state != slotFull {
		return found{}, false
	}
	e := &s.slots[i]
	if !e.touched.Load() {
		e.touched.Store(true)
	}
	copy(sums[b0:b1], s.sums[int(i)*s.crcs+b0:int(i)*s.crcs+b1])
	return found{i, e.gen.Load(), int(e.length)}, true
}

// verified says whether p, which was read from slot f and begins at its block b0, is
// what was put. A mismatch drops the chunk, unless the slot was given up meanwhile.
func (s *scratch) verified(chunk int64, f found, p []byte, b0 int, sums *[256]uint32) bool {
	good := true
	for b := b0; len(p) > 0 && good; b++ {
		n := min(len(p), 1<<crcShift)
		good = crc32.Checksum(p[:n], castagnoli) == sums[b]
		p = p[n:]
	}
	same := s.same(f)
	if good && same {
		return true
	}
	if same {
		s.corrupt.Add(1)
		s.drop(chunk)
	}
	return false
}

// read fills p, whole blocks of the chunk from off on, or all of the chunk's end.
func (s *scratch) read(p []byte, chunk int64, off int, f found, sums *[256]uint32) bool {
	if _, err := s.file.ReadAt(p, int64(f.slot)<<s.shift+int64(off)); err != nil {
		s.failures.Add(1)
		s.drop(chunk)
		return false
	}
	return s.verified(chunk, f, p, off>>crcShift, sums)
}

// put writes a chunk into a slot; in the background only into a free one.
func (s *scratch) put(chunk int64, plain []byte, background bool) {
	i := s.reserve(chunk, len(plain), background)
	if i == none {
		return
	}
	_, err := s.file.WriteAt(plain, int64(i)<<s.shift)
	var sums [256]uint32
	n := 0
	for p := plain; len(p) > 0 && err == nil; n++ {
		m := min(len(p), 1<<crcShift)
		sums[n] = crc32.Checksum(p[:m], castagnoli)
		p = p[m:]
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e := &s.slots[i]
	switch {
	case err != nil:
		s.failed(i, err)
	case e.state == slotDoomed:
		e.state = slotFree
		s.free = append(s.free, i)
	default:
		s.failing = 0
		copy(s.sums[int(i)*s.crcs:], sums[:n])
		e.state = slotFull
		s.push(i)
	}
}

// reserve finds a slot to write the chunk to, or none.
func (s *scratch) reserve(chunk int64, n int, background bool) int32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.index[chunk]; ok || s.off {
		return none
	}
	i := none
	switch {
	case len(s.free) > 0:
		i = s.free[len(s.free)-1]
		s.free = s.free[:len(s.free)-1]
	case len(s.slots) < s.limit:
		i = s.grow()
	case background:
		return none
	default:
		if i = s.victim(); i == none {
			return none
		}
	}
	e := &s.slots[i]
	e.gen.Add(1)
	e.chunk, e.length, e.state, e.background = chunk, int32(n), slotWriting, background
	e.touched.Store(false)
	s.index[chunk] = i
	return i
}

// grow makes one more slot. Slots move when their array does, which nobody
// notices: they are used with mu held, shared at least.
func (s *scratch) grow() int32 {
	i := int32(len(s.slots))
	if len(s.slots) == cap(s.slots) {
		c := min(max(2*cap(s.slots), 64), s.limit)
		slots := make([]slot, len(s.slots), c)
		for k := range s.slots {
			from, to := &s.slots[k], &slots[k]
			to.gen.Store(from.gen.Load())
			to.touched.Store(from.touched.Load())
			to.chunk, to.length, to.state, to.background = from.chunk, from.length, from.state, from.background
			to.prev, to.next = from.prev, from.next
		}
		s.slots = slots
		sums := make([]uint32, len(s.sums), c*s.crcs)
		copy(sums, s.sums)
		s.sums = sums
	}
	s.slots = s.slots[:i+1]
	s.sums = s.sums[:int(i+1)*s.crcs]
	return i
}

// victim takes a chunk out of its slot: the oldest the background brought, or
// else the first of the others that was not touched since it was last looked at.
func (s *scratch) victim() int32 {
	for s.filler.head != none {
		i := s.filler.head
		s.unlink(i)
		e := &s.slots[i]
		if !e.touched.Swap(false) {
			return s.vacate(i)
		}
		e.background = false // demand wants it
		s.push(i)
	}
	for s.demand.head != none {
		i := s.demand.head
		s.unlink(i)
		if !s.slots[i].touched.Swap(false) {
			return s.vacate(i)
		}
		s.push(i)
	}
	return none
}

func (s *scratch) vacate(i int32) int32 {
	e := &s.slots[i]
	e.gen.Add(1)
	e.state = slotFree
	delete(s.index, e.chunk)
	s.evicted.Add(1)
	return i
}

// failed gives up slot i, whose write failed. On a full disk the file takes
// no more; the slot was perhaps beyond what it can have.
func (s *scratch) failed(i int32, err error) {
	s.failures.Add(1)
	e := &s.slots[i]
	if e.state == slotWriting {
		delete(s.index, e.chunk)
	}
	e.gen.Add(1)
	e.state = slotFree
	if s.failing++; s.failing >= patience {
		s.off = true
	}
	if block.KindOf(err) == block.KindNoSpace {
		s.limit = min(s.limit, len(s.slots)) // the slot itself is not used again
		return
	}
	s.free = append(s.free, i)
}

func (s *scratch) drop(chunk int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, ok := s.index[chunk]
	if !ok {
		return
	}
	delete(s.index, chunk)
	e := &s.slots[i]
	e.gen.Add(1)
	if e.state == slotWriting {
		e.state = slotDoomed
		return
	}
	s.unlink(i)
	e.state = slotFree
	s.free = append(s.free, i)
}

// touched says whether the chunk is here and was read before.
func (s *scratch) touched(chunk int64) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	i, ok := s.index[chunk]
	return ok && s.slots[i].touched.Load()
}

// same says whether the slot still is what was found in it.
func (s *scratch) same(f found) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.slots[f.slot].gen.Load() == f.gen
}

func (s *scratch) isOff() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.off
}
