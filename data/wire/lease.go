package wire

import (
	"math/bits"
	"sync"
	"sync/atomic"

	"forerun/internal/chunk"
)

// leases lends buffers. A lease has one owner for each reference; whoever
// gives back the last one must not touch the bytes again.
type leases struct {
	pools [8]sync.Pool // 16 KiB << i
}

type lease struct {
	b    []byte
	refs atomic.Int32
	from *sync.Pool
}

// slack lets a compressor run a little over before it is found not to pay, and a
// bundle have its heads.
const slack = 32 << 10

// get lends a buffer with room for n bytes, at most maxRead.
func (l *leases) get(n int) *lease {
	i := bits.Len(uint(max(n, chunk.MinSize)-1) / chunk.MinSize)
	p := &l.pools[i]
	x, _ := p.Get().(*lease)
	if x == nil {
		x = &lease{b: make([]byte, chunk.MinSize<<i+slack), from: p}
	}
	x.refs.Store(1)
	return x
}

func (x *lease) retain() { x.refs.Add(1) }

func (x *lease) release() {
	if x != nil && x.refs.Add(-1) == 0 {
		x.from.Put(x)
	}
}
