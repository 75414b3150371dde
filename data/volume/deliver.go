package volume

import (
	"errors"

	"forerun/block"
	"forerun/internal/chunk"
)

// Deliver takes chunk i from the source. It verifies it, gives its bytes to
// the readers who wait for them, keeps it in the store, and only then says that
// it is held; if the workload made the chunk zero meanwhile, that stays.
//
// KindCorrupt: p is not the chunk it says. KindNoSpace: nothing could keep it;
// waiting readers were served, the chunk stays untouched.
func (v *Volume) Deliver(i int64, p chunk.Packed) error {
	if !v.gate.enterLate() {
		return block.E("volume.deliver", v.opt.Name, block.KindClosed, nil)
	}
	defer v.gate.leave()
	if i < 0 || i >= v.table.chunks {
		return block.E("volume.deliver", v.chunkName(i), block.KindRange, errors.New("there is no such chunk"))
	}
	buf := v.buf(i)
	defer v.bufs.Put(buf)
	if err := p.Open(*buf); err != nil {
		v.n.corrupt.Add(1)
		return block.E("volume.deliver", v.chunkName(i), block.KindCorrupt, err)
	}
	v.n.delivered.Add(1)
	f := block.Background
	if v.hand(i, *buf) {
		f = block.Demand
	}
	mu := &v.arrive[i%arrivals]
	mu.Lock()
	defer mu.Unlock()
	if !absent(v.table.nib(i)) {
		return nil
	}
	if p.Codec == chunk.Zeros {
		defer v.lockChunk(i).RUnlock()
		v.table.setBase(i, baseUntouched, baseZero)
		return nil
	}
	v.opt.Tier.Put(i, *buf, f)
	_, err := v.opt.Store.Put(p)
	if err == nil {
		err = v.sigs.writeRun(p.Sig[:], i)
	}
	if err != nil {
		v.n.refused.Add(1)
		return block.E("volume.deliver", v.chunkName(i), 0, err)
	}
	defer v.lockChunk(i).RUnlock()
	v.table.setBase(i, baseUntouched, baseHeld)
	return nil
}
