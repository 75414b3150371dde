package stack

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
	"forerun/data/wire"
	"forerun/internal/chunk"
)

// link is the far end of a volume that may not be there yet: a frontend that
// restarts while the backend is away serves what it holds, and what it does
// not hold waits. It is the scheduler's Link and the volume's extents.
//
// With a second frontend beside this one, chunks are asked for there first:
// what one node of a site has need not cross the WAN again.
type link struct {
	ready  chan struct{} // closed when remote is set
	once   sync.Once
	remote *wire.Remote
	peer   atomic.Pointer[wire.Remote] // nil while there is none to ask
	peerUp atomic.Bool

	fromPeer atomic.Int64 // chunks that came from the peer
}

// peerPatience is how long the peer may take to hand out what it has. It is
// near: one that does not answer is gone, and the backend is asked.
const peerPatience = time.Second

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
	if p := l.peer.Load(); p != nil && l.peerUp.Load() {
		if idx = l.fetchNear(ctx, p, idx, f, deliver); len(idx) == 0 {
			return nil
		}
	}
	r, err := l.wait(ctx)
	if err != nil {
		return err
	}
	return r.Fetch(ctx, idx, f, deliver)
}

// fetchNear asks the peer and returns what it could not give.
func (l *link) fetchNear(ctx context.Context, p *wire.Remote, idx []int64, f block.Flags, deliver func(int64, chunk.Packed, error)) []int64 {
	ctx, cancel := context.WithTimeout(ctx, peerPatience)
	defer cancel()
	var mu sync.Mutex
	var rest []int64
	// Each chunk is delivered once, with its bytes or an error; the error of the
	// whole says nothing more.
	_ = p.Fetch(ctx, idx, f, func(i int64, c chunk.Packed, err error) {
		if err != nil {
			mu.Lock()
			rest = append(rest, i)
			mu.Unlock()
			return
		}
		l.fromPeer.Add(1)
		deliver(i, c, nil)
	})
	return rest
}

// Promote is sched.Link.
func (l *link) Promote(idx []int64) {
	if p := l.peer.Load(); p != nil {
		p.Promote(idx)
	}
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
