package volume

import (
	"math/bits"
	"sync/atomic"
)

// mask has a bit for each sector of a chunk.
type mask [maskWords]uint64

// spread has, for eight blocks of 4 KiB as bits, their 64 sectors as bits.
var spread = func() (s [256]uint64) {
	for v := range s {
		for b := range 8 {
			if v>>b&1 != 0 {
				s[v] |= 0xff << (8 * b)
			}
		}
	}
	return s
}()

// all says whether all of the sectors [from, to) are set.
func (m *mask) all(from, to int) bool { return m.run(from, to, true) == to }

// run returns the first sector at or after from that is not as set says, or to.
func (m *mask) run(from, to int, set bool) int {
	for from < to {
		w := m[from>>6]
		if set {
			w = ^w
		}
		if w >>= uint(from & 63); w != 0 {
			return min(to, from+bits.TrailingZeros64(w))
		}
		from = (from>>6 + 1) << 6
	}
	return to
}

// count returns how many of the sectors [from, to) are set.
func (m *mask) count(from, to int) (n int) {
	for from < to {
		end := m.run(from, to, true)
		n += end - from
		from = m.run(end, to, false)
	}
	return n
}

// setRange sets the sectors [from, to).
func (m *mask) setRange(from, to int) {
	for ; from < to && from&63 != 0; from++ {
		m[from>>6] |= 1 << uint(from&63)
	}
	for ; from+64 <= to; from += 64 {
		m[from>>6] = ^uint64(0)
	}
	for ; from < to; from++ {
		m[from>>6] |= 1 << uint(from&63)
	}
}

// blockMask loads the sectors of the blocks [b0, b1) of chunk c of page p into
// m; words of m beside them are undefined. It takes no lock unless the page has blocks written
// in part, and is exact for what was set before it was called, as long as the
// caller finds the state of the chunk the same after it.
//
// The order matters: a block that becomes whole has its coarse bit set before
// its fine bits go. So whoever finds no fine bits left finds the coarse ones.
func (t *table) blockMask(p *page, c, b0, b1 int, m *mask) {
	fine := p.nfine.Load() > 0
	if fine {
		p.mu.Lock()
		defer p.mu.Unlock()
	}
	t.loadMask(p, c, b0, b1, m, fine)
}

// loadMask is blockMask for one who holds p.mu where fine bits are asked for.
func (t *table) loadMask(p *page, c, b0, b1 int, m *mask, fine bool) {
	clear(m[b0>>3 : (b1+7)>>3])
	if words := p.coarse.Load(); words != nil {
		for b := b0 &^ 7; b < b1; b += 8 {
			bit := c*t.blocks + b // blocks of a chunk are a multiple of four
			w := atomic.LoadUint64(&(*words)[bit>>6]) >> uint(bit&63)
			if t.blocks < 8 {
				w &= 1<<t.blocks - 1
			}
			m[b>>3] = spread[uint8(w)]
		}
	}
	if fine {
		for b := b0; b < b1; b++ {
			if s := p.fine[uint32(c*t.blocks+b)]; s != 0 {
				m[b>>3] |= uint64(s) << uint(b&7*8)
			}
		}
	}
}

// covered says whether the overlay has the sectors [from, to) of chunk i.
func (t *table) covered(i int64, from, to int) bool {
	p := t.pages[i>>pageShift].Load()
	if p == nil {
		return false
	}
	c := int(i & (pageChunks - 1))
	n := p.nib(c)
	if n&nibMod == 0 || n&nibFull != 0 {
		return n&nibFull != 0
	}
	var m mask
	t.blockMask(p, c, from>>3, (to+7)>>3, &m)
	return m.all(from, to) || p.nib(c)&nibFull != 0
}

// setMask says that the overlay has the sectors [from, to) of chunk i now. The
// caller holds the chunk's region, at least shared.
func (t *table) setMask(i int64, from, to int) {
	if t.covered(i, from, to) {
		return
	}
	p, c := t.own(i), int(i&(pageChunks-1))
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.nib(c)
	if n&nibFull != 0 {
		return
	}
	total := t.sectors(i)
	if from == 0 && to == total {
		fresh := total
		if n&nibMod != 0 {
			var m mask
			t.loadMask(p, c, 0, t.blocks, &m, true)
			fresh -= m.count(0, total)
		}
		p.setNib(c, n|nibMod|nibFull)
		t.dropFine(p, c)
		t.note(i, n, n|nibMod|nibFull, int64(fresh), false, true)
		return
	}
	fresh := t.addSectors(p, i, from, to)
	to4 := n | nibMod
	if t.wholeBlocks(p, i) {
		to4 |= nibFull
	}
	p.setNib(c, to4)
	t.note(i, n, to4, int64(fresh), false, true)
}

// addSectors sets the sectors [from, to) of chunk i in p and returns how many
// are new. The caller holds p.mu.
func (t *table) addSectors(p *page, i int64, from, to int) (fresh int) {
	c := int(i & (pageChunks - 1))
	words := t.needCoarse(p)
	for b := from >> 3; b<<3 < to; b++ {
		bit := c*t.blocks + b
		w, one := &(*words)[bit>>6], uint64(1)<<uint(bit&63)
		if *w&one != 0 {
			continue
		}
		lo, hi := max(from-b<<3, 0), min(to-b<<3, 8)
		had := p.fine[uint32(bit)]
		now := had | uint8(1<<hi-1)&^uint8(1<<lo-1)
		fresh += bits.OnesCount8(now) - bits.OnesCount8(had)
		switch {
		case now == t.validSectors(i, b):
			atomic.StoreUint64(w, *w|one)
			if had != 0 {
				delete(p.fine, uint32(bit))
				p.nfine.Add(-1)
			}
		case now != had:
			if p.fine == nil {
				p.fine = make(map[uint32]uint8)
			}
			p.fine[uint32(bit)] = now
			if had == 0 {
				p.nfine.Add(1)
			}
		}
	}
	return fresh
}

// partly counts the sectors of chunk i, written in part, that the overlay has.
// The caller holds p.mu, or is alone.
func (t *table) partly(p *page, i int64) (n int) {
	c := int(i & (pageChunks - 1))
	if len(p.fine) == 0 && i+1 < t.chunks {
		words := *p.coarse.Load()
		for b := 0; b < t.blocks; b += 64 {
			bit := c*t.blocks + b
			w := words[bit>>6] >> uint(bit&63)
			if t.blocks < 64 {
				w &= 1<<t.blocks - 1
			}
			n += 8 * bits.OnesCount64(w)
		}
		return n
	}
	var m mask
	t.loadMask(p, c, 0, t.blocks, &m, true)
	return m.count(0, t.sectors(i))
}

func (t *table) needCoarse(p *page) *[]uint64 {
	words := p.coarse.Load()
	if words == nil {
		w := make([]uint64, pageChunks*t.blocks/64)
		words = &w
		p.coarse.Store(words)
	}
	return words
}

// wholeBlocks says whether all blocks of chunk i have their coarse bits.
func (t *table) wholeBlocks(p *page, i int64) bool {
	c := int(i & (pageChunks - 1))
	words := *p.coarse.Load()
	for b := range (t.sectors(i) + 7) >> 3 {
		bit := c*t.blocks + b
		if words[bit>>6]>>uint(bit&63)&1 == 0 {
			return false
		}
	}
	return true
}

// clearMask forgets which sectors of chunk i, of state n, the overlay has, and
// returns how many they were. The caller holds p.mu and the region alone.
func (t *table) clearMask(p *page, i int64, n uint8) (gone int64) {
	if n&nibMod == 0 {
		return 0
	}
	c := int(i & (pageChunks - 1))
	gone = int64(t.sectors(i))
	if n&nibFull == 0 {
		gone = int64(t.partly(p, i))
	}
	t.dropFine(p, c)
	if words := p.coarse.Load(); words != nil {
		for b := range t.blocks {
			bit := c*t.blocks + b
			w := &(*words)[bit>>6]
			if *w>>uint(bit&63)&1 != 0 {
				atomic.StoreUint64(w, *w&^(1<<uint(bit&63)))
			}
		}
	}
	return gone
}

func (t *table) dropFine(p *page, c int) {
	if len(p.fine) == 0 {
		return
	}
	for b := range t.blocks {
		k := uint32(c*t.blocks + b)
		if _, ok := p.fine[k]; ok {
			delete(p.fine, k)
			p.nfine.Add(-1)
		}
	}
}
