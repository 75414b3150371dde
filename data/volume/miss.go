package volume

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"forerun/block"
	"forerun/internal/chunk"
)

// miss is a part of a read whose base bytes are not here. While its chunk is
// asked for it stands in Volume.waits, and whoever delivers the chunk fills it.
// So a reader gets its bytes even when neither store nor tier could keep them.
type miss struct {
	chunk int64
	lo    int // first byte in the chunk
	part  []byte
	next  *miss // another reader's, of the same chunk
	got   bool  // part holds the base's bytes; under waitMu while it waits
}

type misses struct {
	list []miss
	idx  []int64
}

func (ms *misses) len() int {
	if ms == nil {
		return 0
	}
	return len(ms.list)
}

func (ms *misses) cut(n int) {
	if ms != nil {
		ms.list = ms.list[:n]
	}
}

func (v *Volume) miss(ms *misses, i int64, lo int, part []byte) *misses {
	if ms == nil {
		ms = v.misses.Get().(*misses)
	}
	ms.list = append(ms.list, miss{chunk: i, lo: lo, part: part})
	return ms
}

// rounds bounds how often one read starts over because what it was promised
// is gone again.
const rounds = 5

// readMissing fills the parts of ms.
func (v *Volume) readMissing(ctx context.Context, ms *misses, f block.Flags) error {
	for round := 0; ; round++ {
		asked, err := v.bring(ctx, ms, f)
		if asked && round == 0 && f.Class() == block.Demand {
			v.n.missed.Add(1)
		}
		left := 0
		for k := range ms.list {
			m := &ms.list[k]
			have := m.got || v.known(m.chunk)
			if !have {
				ms.list[left] = *m
				left++
				continue
			}
			var more *misses
			more, ferr := v.readRegion(m.part, m.chunk<<v.table.shift+int64(m.lo), nil, m.got)
			if ferr != nil {
				return ferr
			}
			if more != nil { // known, yet its base is needed after all
				more.cut(0)
				v.misses.Put(more)
				ms.list[left] = *m
				left++
			}
		}
		ms.list = ms.list[:left]
		switch {
		case left == 0:
			return nil
		case err != nil && (block.KindOf(err) != block.KindNoSpace || round+1 >= rounds):
			return err
		case ctx.Err() != nil:
			return block.E("volume.read", v.opt.Name, block.KindCanceled, ctx.Err())
		case round+1 >= rounds:
			return block.E("volume.read", v.chunkName(ms.list[0].chunk), block.KindIO,
				errors.New("the chunk was fetched and is not here; see the log for what refused it"))
		}
	}
}

// known says whether chunk i can be read without its base, as far as its state says.
func (v *Volume) known(i int64) bool {
	n := v.table.nib(i)
	return n&nibFull != 0 || n&baseMask == baseZero
}

// bring gets the base's bytes for the parts of ms: of held chunks from the
// store, of untouched ones from the source, all of them in one fetch, both at
// the same time. It says whether it asked the source. An error may leave some parts with their bytes.
func (v *Volume) bring(ctx context.Context, ms *misses, f block.Flags) (asked bool, err error) {
	ms.idx = ms.idx[:0]
	var held []*miss
	v.waitMu.Lock()
	for k := range ms.list {
		m := &ms.list[k]
		switch n := v.table.nib(m.chunk); {
		case n&nibFull != 0, n&baseMask == baseZero:
		case n&baseMask == baseHeld:
			held = append(held, m)
		default:
			m.next = v.waits[m.chunk]
			v.waits[m.chunk] = m
			ms.idx = append(ms.idx, m.chunk)
		}
	}
	v.waitMu.Unlock()
	if len(ms.idx) == 0 {
		return false, v.loadAll(held, f)
	}
	defer func() {
		v.waitMu.Lock()
		for k := range ms.list {
			v.unwait(&ms.list[k])
		}
		v.waitMu.Unlock()
	}()
	remote := v.getRemote()
	if remote == nil {
		return false, block.E("volume.read", v.chunkName(ms.idx[0]), block.KindUnavailable,
			errors.New("only the source has it, and the volume has no link to the source"))
	}
	// What arrived between reading the states and standing in the list is in
	// the store and was not handed over. Asking for it would bring it twice.
	late := 0
	for _, i := range ms.idx {
		if v.table.nib(i)&baseMask == baseUntouched {
			ms.idx[late] = i
			late++
		}
	}
	if ms.idx = ms.idx[:late]; late == 0 {
		return false, nil
	}
	var wg sync.WaitGroup
	var lerr error
	if len(held) > 0 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			lerr = v.loadAll(held, f)
		}()
	}
	if f.Class() == block.Demand {
		v.ahead.missed(ms.idx[0], ms.idx[late-1])
	}
	err = remote.Fetch(ctx, ms.idx, f&^(block.FUA|block.MayTrim|block.Local|block.FastZero))
	wg.Wait()
	if err != nil {
		err = block.E("volume.read", v.chunkName(ms.idx[0]), 0, err)
	}
	if err == nil {
		err = lerr
	}
	return true, err
}

// unwait takes m out of the waiting list. The caller holds waitMu.
func (v *Volume) unwait(m *miss) {
	at := v.waits[m.chunk]
	if at == m {
		if m.next == nil {
			delete(v.waits, m.chunk)
		} else {
			v.waits[m.chunk] = m.next
		}
		m.next = nil
		return
	}
	for ; at != nil; at = at.next {
		if at.next == m {
			at.next, m.next = m.next, nil
			return
		}
	}
}

// hand gives the plain bytes of chunk i to those who wait for them, and says
// whether anybody did.
func (v *Volume) hand(i int64, plain []byte) bool {
	v.waitMu.Lock()
	defer v.waitMu.Unlock()
	first := v.waits[i]
	for m := first; m != nil; m = m.next {
		if !m.got {
			copy(m.part, plain[m.lo:])
			m.got = true
		}
	}
	return first != nil
}

// loaders is how many chunks of one read are unpacked at once.
const loaders = 4

func (v *Volume) loadAll(held []*miss, f block.Flags) error {
	if len(held) <= 1 {
		for _, m := range held {
			return v.load(m, f)
		}
		return nil
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var first error
	n := min(loaders, len(held))
	for w := range n {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for k := w; k < len(held); k += n {
				if err := v.load(held[k], f); err != nil {
					mu.Lock()
					if first == nil {
						first = err
					}
					mu.Unlock()
					return
				}
			}
		}()
	}
	wg.Wait()
	return first
}

// load fills m from the store. A chunk that the store lost or finds damaged
// becomes untouched, so that the next round fetches it.
func (v *Volume) load(m *miss, f block.Flags) error {
	buf := v.buf(m.chunk)
	defer v.bufs.Put(buf)
	sig, err := v.sigs.read(m.chunk)
	if err != nil {
		return err
	}
	err = v.opt.Store.Get(sig, *buf)
	switch k := block.KindOf(err); {
	case err == nil:
		v.opt.Tier.Put(m.chunk, *buf, f)
		copy(m.part, (*buf)[m.lo:])
		m.got = true
		return nil
	case k != block.KindCorrupt && k != block.KindNotFound:
		return block.E("volume.read", v.chunkName(m.chunk), k, err)
	case v.getRemote() == nil:
		v.n.corrupt.Add(1)
		return block.E("volume.read", v.chunkName(m.chunk), block.KindCorrupt,
			fmt.Errorf("the store does not have its bytes any more and there is no source to fetch them from: %w", err))
	}
	if v.invalidate(m.chunk, sig) {
		v.n.refetched.Add(1)
		v.opt.Log.Warn("a held chunk cannot be read and is fetched again", "volume", v.opt.Name, "chunk", m.chunk, "err", err)
	}
	return nil
}

// invalidate makes chunk i untouched if it is held by sig.
func (v *Volume) invalidate(i int64, sig chunk.Sig) bool {
	mu := &v.arrive[i%arrivals]
	mu.Lock()
	defer mu.Unlock()
	if now, err := v.sigs.read(i); err != nil || now != sig {
		return false
	}
	defer v.lockChunk(i).RUnlock()
	v.opt.Tier.Drop(i)
	return v.table.setBase(i, baseHeld, baseUntouched)
}
