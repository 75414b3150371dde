package stack

import (
	"context"
	"sync"

	"forerun/block"
	"forerun/data/wire"
	"forerun/internal/chunk"
)

// link is the far end of a volume that may not be there yet: a frontend that
// restarts while the backend is away serves what it holds, and what it does
// not hold waits. It is the scheduler's Link and the volume's extents.
type link struct {
	ready  chan struct{} // closed when remote is set
	once   sync.Once
	remote *wire.Remote
}

func newLink() *link { return &link{ready: make(chan struct{})} }

// attach lets waiting requests go on, once.
func (l *link) attach(r *wire.Remote) {
	l.once.Do(func() {
		l.remote = r
		close(l.ready)
	})
}

func (l *link) attached() *wire.Remote {
	select {
	case <-l.ready:
		return l.remote
	default:
		return nil
	}
}

func (l *link) wait(ctx context.Context) (*wire.Remote, error) {
	select {
	case <-l.ready:
		return l.remote, nil
	case <-ctx.Done():
		return nil, block.E("link.wait", "", block.KindCanceled, context.Cause(ctx))
	}
}

// Fetch is sched.Link.
func (l *link) Fetch(ctx context.Context, idx []int64, f block.Flags, deliver func(int64, chunk.Packed, error)) error {
	r, err := l.wait(ctx)
	if err != nil {
		return err
	}
	return r.Fetch(ctx, idx, f, deliver)
}

// Promote is sched.Link.
func (l *link) Promote(idx []int64) {
	if r := l.attached(); r != nil {
		r.Promote(idx)
	}
}

// Extents asks the source.
func (l *link) Extents(ctx context.Context, dst []block.Extent, off, n int64, f block.Flags) ([]block.Extent, error) {
	r, err := l.wait(ctx)
	if err != nil {
		return dst, err
	}
	return r.Extents(ctx, dst, off, n, f)
}
