package blocktest

import (
	"bytes"
	"context"
	"sync"

	"forerun/block"
)

// Twin is a device in memory that does what the contract says in the plainest
// way, to compare others with and to stand in for them. It remembers which
// bytes would survive a power cut.
type Twin struct {
	info block.Info

	mu      sync.RWMutex
	data    []byte
	durable []byte
	dirty   bool
	closed  bool
	calls   Calls
}

// Calls counts the calls of a Twin that were served.
type Calls struct {
	Reads, Writes, Zeros, Trims, Flushes, Extents, Prefetches int64
	ReadBytes, WriteBytes                                     int64
}

var _ block.Device = (*Twin)(nil)

// NewTwin makes a device of size zero bytes, a multiple of blockSize.
func NewTwin(size int64, blockSize int) *Twin {
	return &Twin{
		info: block.Info{Size: size, BlockSize: blockSize, CanTrim: true, CanExtents: true, ID: "twin"},
		data: make([]byte, size), durable: make([]byte, size),
	}
}

// Describe changes what Info says; call it before the twin is used.
func (t *Twin) Describe(change func(*block.Info)) *Twin {
	change(&t.info)
	return t
}

// Fill sets the content, durably, from off on, and returns the twin.
func (t *Twin) Fill(off int64, p []byte) *Twin {
	t.mu.Lock()
	defer t.mu.Unlock()
	copy(t.data[off:], p)
	copy(t.durable[off:], p)
	return t
}

// Bytes returns a copy of the content.
func (t *Twin) Bytes() []byte {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return bytes.Clone(t.data)
}

// Durable returns a copy of the bytes that were there at the last Flush, and
// those of later writes with FUA.
func (t *Twin) Durable() []byte {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return bytes.Clone(t.durable)
}

// Calls returns how often each method was served.
func (t *Twin) Calls() Calls {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.calls
}

// Closed says whether Close was called.
func (t *Twin) Closed() bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.closed
}

// may refuses what the contract refuses; mu is held.
func (t *Twin) may(ctx context.Context, op string, off, n int64, write bool) error {
	switch {
	case t.closed:
		return block.E("twin."+op, "", block.KindClosed, nil)
	case ctx.Err() != nil:
		return block.E("twin."+op, "", block.KindCanceled, ctx.Err())
	case write && t.info.ReadOnly:
		return block.E("twin."+op, "", block.KindReadOnly, nil)
	case off < 0 || n < 0 || off > t.info.Size-n:
		return block.E("twin."+op, "", block.KindRange, nil)
	}
	return nil
}

// Info is block.Device.Info.
func (t *Twin) Info() block.Info { return t.info }

// ReadAt is block.Device.ReadAt.
func (t *Twin) ReadAt(ctx context.Context, p []byte, off int64, _ block.Flags) error {
	t.mu.Lock() // counts
	defer t.mu.Unlock()
	if err := t.may(ctx, "read", off, int64(len(p)), false); err != nil {
		return err
	}
	t.calls.Reads++
	t.calls.ReadBytes += int64(len(p))
	copy(p, t.data[off:])
	return nil
}

// change runs do on the content of [off, off+n), and on the durable copy with FUA.
func (t *Twin) change(ctx context.Context, op string, off, n int64, f block.Flags, do func(p []byte), count *int64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.may(ctx, op, off, n, true); err != nil {
		return err
	}
	*count++
	do(t.data[off : off+n])
	if f.Has(block.FUA) {
		copy(t.durable[off:off+n], t.data[off:])
	} else {
		t.dirty = true
	}
	return nil
}

// WriteAt is block.Device.WriteAt.
func (t *Twin) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	return t.change(ctx, "write", off, int64(len(p)), f, func(q []byte) {
		t.calls.WriteBytes += int64(len(p))
		copy(q, p)
	}, &t.calls.Writes)
}

// Zero is block.Device.Zero.
func (t *Twin) Zero(ctx context.Context, off, n int64, f block.Flags) error {
	return t.change(ctx, "zero", off, n, f, func(q []byte) { clear(q) }, &t.calls.Zeros)
}

// Trim is block.Device.Trim: trimmed bytes read as zeros, unless Info says
// that the device cannot trim.
func (t *Twin) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	return t.change(ctx, "trim", off, n, f, func(q []byte) {
		if t.info.CanTrim {
			clear(q)
		}
	}, &t.calls.Trims)
}

// Flush is block.Device.Flush.
func (t *Twin) Flush(ctx context.Context, _ block.Flags) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.may(ctx, "flush", 0, 0, false); err != nil {
		return err
	}
	t.calls.Flushes++
	if t.dirty {
		copy(t.durable, t.data)
		t.dirty = false
	}
	return nil
}

// Extents is block.Device.Extents: each 4 KiB that holds only zeros is a hole.
func (t *Twin) Extents(ctx context.Context, dst []block.Extent, off, n int64, _ block.Flags) ([]block.Extent, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.may(ctx, "extents", off, n, false); err != nil {
		return dst, err
	}
	t.calls.Extents++
	if !t.info.CanExtents {
		return append(dst, block.Extent{Off: off, Len: n}), nil
	}
	had := len(dst)
	for at := off; at < off+n; {
		to := min(at&^4095+4096, off+n)
		e := block.Extent{Off: at, Len: to - at}
		if allZero(t.data[at:to]) {
			e.Kind = block.Hole
		}
		if len(dst) == had { // never joined to what the caller has
			dst = append(dst, e)
		} else {
			dst = block.AppendExtent(dst, e)
		}
		at = to
	}
	return dst, nil
}

// Prefetch is block.Device.Prefetch.
func (t *Twin) Prefetch(ctx context.Context, off, n int64, _ block.Flags) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.may(ctx, "prefetch", off, n, false); err != nil {
		return err
	}
	t.calls.Prefetches++
	return nil
}

// Close is block.Device.Close. Bytes and Durable can still be asked for.
func (t *Twin) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	return nil
}

var zeros [4096]byte

func allZero(p []byte) bool {
	for len(p) > len(zeros) {
		if !bytes.Equal(p[:len(zeros)], zeros[:]) {
			return false
		}
		p = p[len(zeros):]
	}
	return bytes.Equal(p, zeros[:len(p)])
}
