package volume

import (
	"errors"
	"fmt"

	"forerun/block"
	"forerun/internal/chunk"
)

// Deliver takes chunk i from the source. It verifies it, gives its bytes to
// the readers who wait for them, keeps it in the store, and only then says that
// it is held; if the workload made the chunk zero meanwhile, that stays.
//
// A chunk that comes as its signature alone (chunk.Known) is looked for in the
// store.
//
// KindCorrupt: p is not the chunk it says. KindNotFound: it came as a signature
// of what is not here; its bytes must be asked for. KindNoSpace: nothing could
// keep it; waiting readers were served, the chunk stays untouched.
func (v *Volume) Deliver(i int64, p chunk.Packed) error {
	if !v.gate.enterLate() {
		return block.E("volume.deliver", v.opt.Name, block.KindClosed, nil)
	}
	defer v.gate.leave()
	if i < 0 || i >= v.table.chunks {
		return block.E("volume.deliver", v.chunkName(i), block.KindRange, errors.New("there is no such chunk"))
	}
	if p.Codec == chunk.Known {
		return v.deliverKnown(i, p.Sig)
	}
	buf := v.buf(i)
	defer v.bufs.Put(buf)
	stored, err := v.unpack(p, *buf)
	switch block.KindOf(err) {
	case block.KindNone:
	case block.KindNotFound:
		v.n.unknown.Add(1)
		return block.E("volume.deliver", v.chunkName(i), block.KindNotFound, err)
	case block.KindCorrupt:
		v.n.corrupt.Add(1)
		return block.E("volume.deliver", v.chunkName(i), block.KindCorrupt, err)
	default:
		// It could not be kept, but the bytes are right.
		v.hand(i, *buf)
		v.n.refused.Add(1)
		return block.E("volume.deliver", v.chunkName(i), 0, err)
	}
	v.n.delivered.Add(1)
	f := block.Background
	if soon := v.ahead.brought(i); v.hand(i, *buf) {
		f = block.Demand
	} else if soon {
		f |= block.Soon
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
	if !stored {
		_, err = v.opt.Store.Put(p)
	}
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

// unpack opens p into dst and verifies it. A bundle is kept by that already.
func (v *Volume) unpack(p chunk.Packed, dst []byte) (stored bool, err error) {
	if p.Codec == chunk.Bundle {
		return true, v.opt.Store.PutBundle(p, dst)
	}
	if err := p.OpenUnder(&v.opt.Key, dst); err != nil {
		return false, block.E("volume.deliver", "", block.KindCorrupt, err)
	}
	return false, nil
}

// deliverKnown is Deliver of a signature.
func (v *Volume) deliverKnown(i int64, sig chunk.Sig) error {
	missing := func(err error) error {
		v.n.unknown.Add(1)
		return block.E("volume.deliver", v.chunkName(i), block.KindNotFound,
			fmt.Errorf("the source takes chunk %s to be here and it is not: %w", sig, err))
	}
	v.waitMu.Lock()
	wanted := v.waits[i] != nil
	v.waitMu.Unlock()
	if wanted {
		buf := v.buf(i)
		defer v.bufs.Put(buf)
		if err := v.opt.Store.Get(sig, *buf); err != nil {
			return missing(err)
		}
		v.hand(i, *buf)
		v.opt.Tier.Put(i, *buf, block.Demand)
	}
	here, err := v.adopt(i, sig)
	if err != nil {
		v.n.refused.Add(1)
		return block.E("volume.deliver", v.chunkName(i), 0, err)
	}
	if !here {
		return missing(errors.New("the store does not have it"))
	}
	v.n.delivered.Add(1)
	return nil
}

// adopt makes chunk i held by a signature that the store has, and says whether
// the chunk is here.
func (v *Volume) adopt(i int64, sig chunk.Sig) (here bool, err error) {
	mu := &v.arrive[i%arrivals]
	mu.Lock()
	defer mu.Unlock()
	if !absent(v.table.nib(i)) {
		return true, nil
	}
	if !v.opt.Store.Has(sig) {
		return false, nil
	}
	if err := v.sigs.writeRun(sig[:], i); err != nil {
		return false, err
	}
	defer v.lockChunk(i).RUnlock()
	if v.table.setBase(i, baseUntouched, baseHeld) {
		v.n.adopted.Add(1)
	}
	return true, nil
}

// Same takes the source's word that chunk i is the one with that signature. If
// the store has it, the chunk is held from now on, and nothing needs to cross
// the link for it. Otherwise nothing changes.
func (v *Volume) Same(i int64, sig chunk.Sig) {
	if !v.gate.enterLate() {
		return
	}
	defer v.gate.leave()
	if i < 0 || i >= v.table.chunks || !absent(v.table.nib(i)) {
		return
	}
	// What cannot be noted now is asked for later like any other chunk.
	if _, err := v.adopt(i, sig); err != nil {
		v.opt.Log.Warn("a chunk that is here already could not be noted", "volume", v.opt.Name, "chunk", i, "err", err)
	}
}

// Zeros takes the source's word that n chunks from first on are zeros.
func (v *Volume) Zeros(first, n int64) {
	if !v.gate.enterLate() {
		return
	}
	defer v.gate.leave()
	if first < 0 || n <= 0 || n > v.table.chunks-first {
		return
	}
	for i := first; i < first+n; i++ {
		v.zeroBase(i)
	}
}

func (v *Volume) zeroBase(i int64) {
	mu := &v.arrive[i%arrivals]
	mu.Lock()
	defer mu.Unlock()
	defer v.lockChunk(i).RUnlock()
	v.table.setBase(i, baseUntouched, baseZero)
}
