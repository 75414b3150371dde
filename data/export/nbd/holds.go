package nbd

import (
	"reflect"
	"sync"

	"forerun/block"
)

// export is what the connections to one device share.
type export struct {
	dev   block.Device
	info  block.Info
	holds holds
	users int // guarded by exports.mu
}

// block is the device's block size in bytes, at least 1.
func (e *export) block() int64 { return int64(max(e.info.BlockSize, 1)) }

// aligned says whether a range is one of whole blocks.
func (e *export) aligned(off, n int64) bool { return (off|n)&(e.block()-1) == 0 }

// exports finds the export of a device, so that all connections to it, under
// whatever name, hold its blocks against each other.
type exports struct {
	mu  sync.Mutex
	dev map[block.Device]*export
}

func (x *exports) open(dev block.Device) *export {
	if !reflect.TypeOf(dev).Comparable() {
		return &export{dev: dev, info: dev.Info()}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	e := x.dev[dev]
	if e == nil {
		e = &export{dev: dev, info: dev.Info()}
		if x.dev == nil {
			x.dev = map[block.Device]*export{}
		}
		x.dev[dev] = e
	}
	e.users++
	return e
}

func (x *exports) close(e *export) {
	if !reflect.TypeOf(e.dev).Comparable() {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if e.users--; e.users == 0 {
		delete(x.dev, e.dev)
	}
}

// holds keeps a change of a part of a block (read, change, write) apart from
// every other change of that block. Whole writes do not exclude each other.
// Of two that exclude each other the one that came first goes first. Devices
// whose blocks are single bytes need none of it.
type holds struct {
	mu   sync.Mutex
	list []hold // guarded by mu: in order of arrival
	next uint64 // guarded by mu
	gone sync.Cond
	wait int // guarded by mu: how many wait for gone
}

type hold struct {
	id       uint64
	off, end int64
	alone    bool
}

// blocked says whether an earlier hold stands in the way. mu is held.
func (h *holds) blocked(id uint64, off, end int64, alone bool) bool {
	for i := range h.list {
		l := &h.list[i]
		if l.id >= id {
			return false
		}
		if (alone || l.alone) && off < l.end && l.off < end {
			return true
		}
	}
	return false
}

// try takes a hold on [off, end) shared with other whole writes, if that needs no waiting.
func (h *holds) try(off, end int64) (id uint64, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.blocked(h.next, off, end, false) {
		return 0, false
	}
	id = h.next
	h.next++
	h.list = append(h.list, hold{id, off, end, false})
	return id, true
}

// take takes a hold on [off, end), waiting for those before it. Those it waits
// for wait for none that came after them, so there is no deadlock.
func (h *holds) take(off, end int64, alone bool) (id uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.gone.L = &h.mu
	id = h.next
	h.next++
	h.list = append(h.list, hold{id, off, end, alone})
	for h.blocked(id, off, end, alone) {
		h.wait++
		h.gone.Wait()
		h.wait--
	}
	return id
}

func (h *holds) drop(id uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range h.list {
		if h.list[i].id == id {
			h.list = append(h.list[:i], h.list[i+1:]...)
			break
		}
	}
	if h.wait > 0 {
		h.gone.Broadcast()
	}
}
