package fsmap

import (
	"context"
	"errors"
	"sync"
	"time"

	"forerun/block"
)

const (
	// maxExtents bounds one answer of Extents.
	maxExtents = 4096
	// patience is how long after the first question of the background such a
	// one waits for the map: what it is told is data meanwhile will be fetched.
	patience = 15 * time.Second
)

// Watched is a device whose Extents know what its file systems do not use.
// Everything else passes through.
type Watched struct {
	block.Device
	known chan struct{} // closed when the map is there, or never will be
	once  sync.Once     // closes known

	mu     sync.Mutex
	m      *Map      // nil while there is none
	begun  uint64    // writes that have begun
	active int       // writes under way
	why    string    // there is no map
	until  time.Time // after it nobody waits for the map; zero before anybody did
}

var _ block.Device = (*Watched)(nil)

// Watch puts the storey above dev. It knows nothing before Learn has ended.
func Watch(dev block.Device) *Watched {
	return &Watched{Device: dev, known: make(chan struct{})}
}

// Learn reads the file systems below, in units of unit bytes, and from then on
// Extents tells. It is called once, at a moment when the content is that of a
// disk nobody uses; a write before it has ended is an error of KindBusy, and nothing is
// free then. Other errors are those of Free.
func (w *Watched) Learn(ctx context.Context, unit int64) (*Map, error) {
	defer w.once.Do(func() { close(w.known) })
	w.mu.Lock()
	begun, active := w.begun, w.active
	w.mu.Unlock()
	m, err := Free(ctx, w.Device, unit)
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil && (active > 0 || w.begun != begun) {
		err = block.E("fsmap.learn", "", block.KindBusy, errors.New("the disk was written to while its file systems were read"))
	}
	if err != nil {
		w.why = err.Error()
		return nil, err
	}
	w.m = m
	return m, nil
}

// Map is what is known now, nil before Learn has ended well.
func (w *Watched) Map() *Map {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.m
}

// Problem says why there is no map, empty while Learn has not failed.
func (w *Watched) Problem() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.why
}

// begin notes that [off, off+n) will be written, before it is.
func (w *Watched) begin(off, n int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.begun++
	w.active++
	if w.m != nil && n > 0 {
		w.m.Use(off, n)
	}
}

func (w *Watched) end() {
	w.mu.Lock()
	w.active--
	w.mu.Unlock()
}

// Info is that of the device below; Extents may know more than it does.
func (w *Watched) Info() block.Info {
	i := w.Device.Info()
	i.CanExtents = true
	return i
}

// WriteAt takes the range out of the map and writes it.
func (w *Watched) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	w.begin(off, int64(len(p)))
	defer w.end()
	return w.Device.WriteAt(ctx, p, off, f)
}

// Zero takes the range out of the map and makes it zeros.
func (w *Watched) Zero(ctx context.Context, off, n int64, f block.Flags) error {
	w.begin(off, n)
	defer w.end()
	return w.Device.Zero(ctx, off, n, f)
}

// Trim passes on. Who trims a range does not use it.
func (w *Watched) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	w.begin(off, 0) // it changes bytes all the same
	defer w.end()
	return w.Device.Trim(ctx, off, n, f)
}

// Extents calls data that is free so. A question of the background waits a
// while for a map that is being made.
func (w *Watched) Extents(ctx context.Context, dst []block.Extent, off, n int64, f block.Flags) ([]block.Extent, error) {
	if f.Class() == block.Background && !f.Has(block.Local) {
		if err := w.await(ctx); err != nil {
			return dst, err
		}
	}
	m := w.Map()
	if m == nil || m.FreeBytes() == 0 {
		return w.Device.Extents(ctx, dst, off, n, f)
	}
	below, err := w.Device.Extents(ctx, nil, off, n, f)
	if err != nil {
		return dst, err
	}
	had := len(dst)
	for _, e := range below {
		if e.Kind != block.Data {
			dst = block.AppendExtent(dst, e)
			continue
		}
		if dst = m.split(dst, e, had+maxExtents); len(dst) >= had+maxExtents {
			return dst, nil
		}
	}
	return dst, nil
}

// split appends e with the free parts of it called so, until dst is as long as most.
func (m *Map) split(dst []block.Extent, e block.Extent, most int) []block.Extent {
	for at := e.Off; at < e.End() && len(dst) < most; {
		from, to, ok := m.Next(at)
		if !ok || from >= e.End() {
			from, to = e.End(), e.End()
		}
		from, to = max(from, at), min(to, e.End())
		dst = block.AppendExtent(dst, block.Extent{Off: at, Len: from - at, Kind: e.Kind, State: e.State})
		dst = block.AppendExtent(dst, block.Extent{Off: from, Len: to - from, Kind: block.Free, State: e.State})
		at = to
	}
	return dst
}

func (w *Watched) await(ctx context.Context) error {
	select {
	case <-w.known:
		return nil
	default:
	}
	w.mu.Lock()
	if w.until.IsZero() {
		w.until = time.Now().Add(patience)
	}
	left := time.Until(w.until)
	w.mu.Unlock()
	if left <= 0 {
		return nil
	}
	t := time.NewTimer(left)
	defer t.Stop()
	select {
	case <-w.known:
	case <-t.C:
	case <-ctx.Done():
		return block.E("fsmap.extents", "", block.KindCanceled, context.Cause(ctx))
	}
	return nil
}
