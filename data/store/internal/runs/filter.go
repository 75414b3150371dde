package runs

import (
	"encoding/binary"
	"math/bits"

	"forerun/internal/chunk"
)

// filter is a blocked Bloom filter (Putze, Sanders, Singler 2007): all probes
// of a key fall into one cache line of 512 bits. Eight bits an entry and six
// probes let about three in a hundred absent keys through. The key is a hash already
// and is used as it is.
type filter []byte

const (
	filterBlock = 64 // bytes
	filterBits  = 8  // bits an entry
	probes      = 6  // of 9 bits each
)

// Filter is the filter of a run, for a set of signatures that is too large to
// keep exactly. Add and Has must not be called at once.
type Filter struct{ f filter }

// NewFilter makes a filter for n signatures, two bytes each: of those never
// added, Has answers true for about two in a thousand.
func NewFilter(n int) *Filter { return &Filter{newFilter(2 * n)} }

// Add adds a signature.
func (f *Filter) Add(s *chunk.Sig) { f.f.add(s) }

// Has says whether a signature may have been added; false is certain.
func (f *Filter) Has(s *chunk.Sig) bool { return f.f.has(s) }

func newFilter(n int) filter {
	blocks := max(1, (n*filterBits+filterBlock*8-1)/(filterBlock*8))
	return make(filter, blocks*filterBlock)
}

func (f filter) block(s *chunk.Sig) []byte {
	i, _ := bits.Mul64(binary.LittleEndian.Uint64(s[8:]), uint64(len(f)/filterBlock))
	return f[i*filterBlock : (i+1)*filterBlock]
}

func (f filter) add(s *chunk.Sig) {
	b, h := f.block(s), binary.LittleEndian.Uint64(s[16:])
	for range probes {
		b[h>>3&63] |= 1 << (h & 7)
		h >>= 9
	}
}

func (f filter) has(s *chunk.Sig) bool {
	b, h := f.block(s), binary.LittleEndian.Uint64(s[16:])
	for range probes {
		if b[h>>3&63]&(1<<(h&7)) == 0 {
			return false
		}
		h >>= 9
	}
	return true
}
