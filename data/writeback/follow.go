package writeback

import (
	"context"
	"maps"
	"math/bits"
	"slices"
	"sync"
	"time"

	"forerun/data/journal"
)

const (
	followGrain  = 16 << 10 // bytes of one mark
	followPage   = 4096     // marks of one page
	followPeriod = 50 * time.Millisecond
	// followLimit is how many bytes of records a comparison keeps in the journal.
	// Beyond them it keeps marks instead, and reads what is marked once more.
	followLimit = 64 << 20
)

// marks are ranges that were written, by grain.
type marks map[int64]*[followPage / 64]uint64

func (m marks) add(off, n int64) {
	for g := off / followGrain; g*followGrain < off+n; g++ {
		p := m[g/followPage]
		if p == nil {
			p = new([followPage / 64]uint64)
			m[g/followPage] = p
		}
		i := g % followPage
		p[i/64] |= 1 << (i % 64)
	}
}

// bytes is how much is marked.
func (m marks) bytes() int64 {
	n := 0
	for _, p := range m {
		for _, w := range p {
			n += bits.OnesCount64(w)
		}
	}
	return int64(n) * followGrain
}

// each calls fn for the marked ranges, in order.
func (m marks) each(size int64, fn func(off, n int64) error) error {
	for _, k := range slices.Sorted(maps.Keys(m)) {
		for i := int64(0); i < followPage; i++ {
			if m[k][i/64]&(1<<(i%64)) == 0 {
				continue
			}
			off := (k*followPage + i) * followGrain
			if err := fn(off, min(followGrain, size-off)); err != nil {
				return err
			}
		}
	}
	return nil
}

// follower keeps up with a journal while its volume is compared, so that the
// comparison ends however long it takes and however much is written.
type follower struct {
	log    Log
	limit  int64
	cancel context.CancelFunc
	ended  chan struct{}

	mu    sync.Mutex
	r     *journal.Reader
	dirty marks
	kept  int64 // Appended when the hold was taken
	moved bool  // the hold is not where the pass began any more
	err   error
}

// follow begins at from, where scanHold is.
func follow(ctx context.Context, log Log, from journal.Position, limit int64) (*follower, error) {
	r, err := log.Reader(from)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	f := &follower{log: log, limit: limit, cancel: cancel, ended: make(chan struct{}), r: r, dirty: marks{}, kept: log.Appended()}
	go func() {
		defer close(f.ended)
		tick := time.NewTicker(followPeriod)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				if f.catchUp(ctx) != nil {
					return
				}
			}
		}
	}()
	return f, nil
}

// stop ends it.
func (f *follower) stop() {
	f.cancel()
	<-f.ended
	f.mu.Lock()
	defer f.mu.Unlock()
	f.r.Close()
}

// catchUp marks what was written since the last time, and moves the hold when
// it keeps too much.
func (f *follower) catchUp(ctx context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for to := f.log.Position(); f.err == nil && f.r.Position().Sequence < to.Sequence; {
		var rec journal.Record
		if rec, f.err = f.r.Skim(ctx); f.err == nil && rec.Type != journal.TypeVoid {
			f.dirty.add(rec.Off, rec.Len)
		}
	}
	if n := f.log.Appended(); f.err == nil && n-f.kept > f.limit {
		f.err = f.log.Hold(scanHold, f.r.Position())
		f.kept, f.moved = n, true
	}
	return f.err
}

// turn ends a pass. The caller has stopped the writes. It answers what was
// written since the last pass; nil means that the journal has it all, from
// where that pass began. Else the next pass begins at pos.
func (f *follower) turn(ctx context.Context) (dirty marks, pos journal.Position, err error) {
	if err := f.catchUp(ctx); err != nil {
		return nil, pos, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.moved {
		return nil, pos, nil
	}
	pos = f.r.Position()
	if err := f.log.Hold(scanHold, pos); err != nil {
		return nil, pos, err
	}
	dirty, f.dirty = f.dirty, marks{}
	f.kept, f.moved = f.log.Appended(), false
	return dirty, pos, nil
}
