package volume

import (
	"math/bits"
	"sync"
	"sync/atomic"

	"forerun/block"
)

// What one chunk is: two bits of base, then whether the overlay has any of its
// sectors, then whether it has all of them.
const (
	baseUntouched = 0
	baseHeld      = 1
	baseZero      = 2
	baseMask      = 3
	nibMod        = 4
	nibFull       = 8
)

const (
	sectorBytes = 512
	sectorShift = 9
	blockShift  = 12 // masks are kept per 4 KiB block, and per sector where a block is partly written
	pageShift   = 12
	pageChunks  = 1 << pageShift
	pageWords   = pageChunks / 16

	// maskWords holds the sectors of the largest chunk.
	maskWords = (1 << 20) / sectorBytes / 64
)

// geometry turns offsets into chunks, pages and regions.
type geometry struct {
	size   int64
	shift  uint // of a chunk's bytes
	chunks int64
	blocks int // 4 KiB blocks per chunk
}

func newGeometry(size int64, chunkBytes int) geometry {
	g := geometry{size: size, shift: uint(bits.TrailingZeros64(uint64(chunkBytes)))}
	g.chunks = (size + int64(chunkBytes) - 1) >> g.shift
	g.blocks = chunkBytes >> blockShift
	return g
}

func (g *geometry) chunkBytes() int { return 1 << g.shift }

// length is the plain length of chunk i: less than the others' for the last one, perhaps.
func (g *geometry) length(i int64) int {
	return int(min(int64(1)<<g.shift, g.size-i<<g.shift))
}

func (g *geometry) pages() int { return int((g.chunks + pageChunks - 1) >> pageShift) }

// pageLen is the number of chunks of page pi that exist.
func (g *geometry) pageLen(pi int) int {
	return int(min(pageChunks, g.chunks-int64(pi)<<pageShift))
}

// sectors is the number of sectors of chunk i.
func (g *geometry) sectors(i int64) int { return g.length(i) >> sectorShift }

// validSectors is the mask of the sectors that block b of chunk i has.
func (g *geometry) validSectors(i int64, b int) uint8 {
	left := g.sectors(i) - b*8
	if left >= 8 {
		return 0xff
	}
	return uint8(1<<max(left, 0) - 1)
}

// page holds the states of pageChunks chunks.
//
// state is loaded without a lock and stored under mu. Masks are in two grains:
// coarse has a bit per 4 KiB block that is written whole, fine has the sectors
// of blocks that are written in part. Volumes are written in 4 KiB and more
// nearly always; one bit per sector for all would cost eight times the memory.
type page struct {
	mu     sync.Mutex
	state  [pageWords]atomic.Uint64
	coarse atomic.Pointer[[]uint64] // words are loaded atomically, stored under mu
	nfine  atomic.Int32             // len(fine)
	fine   map[uint32]uint8         // chunk in page * blocks + block; under mu
}

func (p *page) nib(c int) uint8 {
	return uint8(p.state[c>>4].Load()>>(uint(c&15)*4)) & 15
}

func (p *page) setNib(c int, n uint8) {
	w, s := &p.state[c>>4], uint(c&15)*4
	w.Store(w.Load()&^(15<<s) | uint64(n)<<s)
}

// counts are the chunks of a volume by what they are, and what is between.
type counts struct {
	cat     [4]int64 // by category
	partial int64    // modified chunks of which the source still has sectors that are not here
	sectors int64    // sectors the overlay has
	free    int64    // untouched chunks that are marked as free
}

const (
	catUntouched = iota
	catHeld
	catZero
	catModified
)

func category(n uint8) int {
	if n&nibMod != 0 {
		return catModified
	}
	return int(n & baseMask)
}

// absent says whether a chunk of this state needs the source to be read whole.
func absent(n uint8) bool { return n&(baseMask|nibFull) == 0 }

func (c *counts) add(n uint8, by int64) {
	c.cat[category(n)] += by
	if n&nibMod != 0 && absent(n) {
		c.partial += by
	}
}

// table is the volume map in memory: an array of pages, where nil stands for a
// page of untouched chunks and one shared page for all that are zero.
//
// Whoever changes a page that is neither holds the region of the chunk, at
// least shared; a page is replaced only by one who holds all regions of it alone, or
// by a compare-and-swap from one of the two that stand for many.
type table struct {
	geometry
	pages []atomic.Pointer[page]
	zero  *page                      // all chunks zero; never changed
	free  []atomic.Pointer[freePage] // marks, see free.go

	mu     sync.Mutex
	counts counts
	dirty  dirtySet
}

func newTable(g geometry) *table {
	t := &table{geometry: g, pages: make([]atomic.Pointer[page], g.pages()), zero: new(page),
		free: make([]atomic.Pointer[freePage], g.pages())}
	for i := range t.zero.state {
		t.zero.state[i].Store(baseZero * 0x1111111111111111)
	}
	t.counts.cat[catUntouched] = g.chunks
	t.dirty.pages = len(t.pages)
	return t
}

func (t *table) nib(i int64) uint8 {
	p := t.pages[i>>pageShift].Load()
	if p == nil {
		return baseUntouched
	}
	return p.nib(int(i & (pageChunks - 1)))
}

// own returns the page of chunk i as one that may be changed.
func (t *table) own(i int64) *page {
	slot := &t.pages[i>>pageShift]
	for {
		p := slot.Load()
		if p != nil && p != t.zero {
			return p
		}
		n := new(page)
		if p == t.zero {
			for w := range n.state {
				n.state[w].Store(t.zero.state[w].Load())
			}
		}
		if slot.CompareAndSwap(p, n) {
			return n
		}
	}
}

// note accounts for chunk i having gone from one state to another.
func (t *table) note(i int64, from, to uint8, sectors int64, base, mask bool) {
	t.mu.Lock()
	t.counts.add(from, -1)
	t.counts.add(to, 1)
	if from == baseUntouched {
		t.unmark(i)
	}
	t.counts.sectors += sectors
	t.dirty.chunk(i, base, mask)
	t.mu.Unlock()
}

// setBase changes the base of chunk i from one to another and says whether it
// was the one. The caller holds the chunk's region.
func (t *table) setBase(i int64, from, to uint8) bool {
	if t.nib(i)&baseMask != from {
		return false
	}
	p, c := t.own(i), int(i&(pageChunks-1))
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.nib(c)
	if n&baseMask != from {
		return false
	}
	p.setNib(c, n&^baseMask|to)
	t.note(i, n, n&^baseMask|to, 0, true, false)
	return true
}

// markZero makes the untouched ones of the chunks [from, to) zero. lock
// returns holding the region of a chunk shared, and gives what ends that.
func (t *table) markZero(from, to int64, lock func(i int64) *sync.RWMutex) {
	for from < to {
		pi := int(from >> pageShift)
		n := t.pageLen(pi)
		first := int64(pi) << pageShift
		if from == first && to >= first+int64(n) && t.pages[pi].CompareAndSwap(nil, t.zero) {
			t.mu.Lock()
			t.unmarkPage(pi)
			t.counts.cat[catUntouched] -= int64(n)
			t.counts.cat[catZero] += int64(n)
			t.dirty.page(pi, true, false)
			t.mu.Unlock()
			from += int64(n)
			continue
		}
		for end := min(to, first+int64(n)); from < end; from++ {
			if t.nib(from)&baseMask == baseUntouched {
				mu := lock(from)
				t.setBase(from, baseUntouched, baseZero)
				mu.RUnlock()
			}
		}
	}
}

// zeroChunk makes chunk i zero and forgets its mask. The caller holds its
// region alone. It returns the state before.
func (t *table) zeroChunk(i int64) uint8 {
	if t.nib(i) == baseZero {
		return baseZero
	}
	p, c := t.own(i), int(i&(pageChunks-1))
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.nib(c)
	p.setNib(c, baseZero)
	gone := t.clearMask(p, i, n)
	t.note(i, n, baseZero, -gone, true, true)
	return n
}

// zeroPage makes all chunks of page pi zero and returns what was there, nil
// for a page of untouched chunks. The caller holds all its regions alone.
func (t *table) zeroPage(pi int) *page {
	var gone counts
	old := t.pages[pi].Swap(t.zero)
	n := t.pageLen(pi)
	if old == t.zero {
		return old
	}
	if old == nil {
		gone.cat[catUntouched] = int64(n)
	} else {
		gone = t.countPage(pi, old)
	}
	t.mu.Lock()
	t.unmarkPage(pi)
	for c := range gone.cat {
		t.counts.cat[c] -= gone.cat[c]
	}
	t.counts.cat[catZero] += int64(n)
	t.counts.partial -= gone.partial
	t.counts.sectors -= gone.sectors
	t.dirty.page(pi, true, true)
	t.mu.Unlock()
	return old
}

func (t *table) countPage(pi int, p *page) (sum counts) {
	for c := range t.pageLen(pi) {
		n := p.nib(c)
		sum.add(n, 1)
		i := int64(pi)<<pageShift + int64(c)
		switch {
		case n&nibFull != 0:
			sum.sectors += int64(t.sectors(i))
		case n&nibMod != 0:
			sum.sectors += int64(t.partly(p, i))
		}
	}
	return sum
}

// run returns how many of the chunks from i on, at least one and at most up to
// limit, are of the category of chunk i, which it returns too.
func (t *table) run(i, limit int64) (cat int, n int64) {
	cat = category(t.nib(i))
	at := i
	for at < limit {
		pi := int(at >> pageShift)
		p := t.pages[pi].Load()
		end := min(limit, int64(pi+1)<<pageShift)
		switch {
		case p == nil && cat == catUntouched, p == t.zero && cat == catZero:
			at = end
			continue
		case p == nil, p == t.zero:
			return cat, max(at-i, 1)
		}
		for at < end {
			if category(p.nib(int(at&(pageChunks-1)))) != cat {
				return cat, max(at-i, 1)
			}
			at++
		}
	}
	return cat, at - i
}

// absent appends to dst up to limit of the chunks [from, to) that need the
// source, without those that are marked as free.
func (t *table) absent(dst []int64, from, to int64, limit int) []int64 {
	for want := len(dst) + limit; from < to && len(dst) < want; {
		p := t.pages[from>>pageShift].Load()
		c := int(from & (pageChunks - 1))
		if p == t.zero || p == nil && t.free[from>>pageShift].Load() == allFree {
			from = (from>>pageShift + 1) << pageShift
			continue
		}
		if p != nil {
			// Any of sixteen chunks with neither base nor the full bit?
			w := p.state[c>>4].Load()
			if (w|w>>1|w>>3)&0x1111111111111111 == 0x1111111111111111 {
				from = (from>>4 + 1) << 4
				continue
			}
			if !absent(p.nib(c)) {
				from++
				continue
			}
		}
		if !t.marked(from) {
			dst = append(dst, from)
		}
		from++
	}
	return dst
}

func (t *table) stats() counts {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.counts
}

func stateOf(cat int) block.State {
	return [...]block.State{block.Untouched, block.Held, block.ZeroState, block.Modified}[cat]
}
