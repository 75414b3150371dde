package converge

import (
	"bytes"
	"context"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
)

// pieceBytes is the largest read of the copier: long enough that a seek does
// not count, short enough that demand is not held up behind it.
const pieceBytes = 1 << 20

// piece is a range to be copied.
type piece struct {
	off, n int64
	zero   bool // it is known to read as zeros, or need not be had
}

// copier moves ranges from one device to another with a few reads in flight.
type copier struct {
	src, dst block.Device
	unit     int64 // zeros are looked for in units of so many bytes
	piece    int64
	inFlight int
	blind    bool // zeros are written even where the target shows zeros
	urgent   bool // the gate is closed: no pacing, no pause, no waiting for space
	pace     *pacer
	idle     func(context.Context) error // waits while the copier is paused
	wait     func(error)                 // told why it waits; nil when it goes on
	done     *atomic.Int64               // bytes settled
	written  *atomic.Int64               // bytes written to the target
}

// run copies what feed emits. It returns when all is done or the first error.
func (c *copier) run(ctx context.Context, feed func(emit func(piece) error) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	pieces := make(chan piece)
	var wg sync.WaitGroup
	for range c.inFlight {
		wg.Go(func() {
			buf := make([]byte, c.piece)
			var ext []block.Extent
			for p := range pieces {
				if ctx.Err() != nil {
					continue // drain
				}
				var err error
				if ext, err = c.one(ctx, buf, ext[:0], p); err != nil {
					cancel(err)
				}
			}
		})
	}
	err := feed(func(p piece) error {
		for p.n > 0 {
			q := p
			if !q.zero {
				q.n = min(p.n, c.piece)
			}
			if !c.urgent {
				if err := c.idle(ctx); err != nil {
					return err
				}
			}
			select {
			case pieces <- q:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			p.off, p.n = p.off+q.n, p.n-q.n
		}
		return nil
	})
	close(pieces)
	wg.Wait()
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

func (c *copier) one(ctx context.Context, buf []byte, ext []block.Extent, p piece) ([]block.Extent, error) {
	if p.zero {
		err := c.clear(ctx, p.off, p.n)
		c.done.Add(p.n)
		return ext, err
	}
	for end := p.off + p.n; p.off < end; {
		var err error
		err = c.retry(ctx, func() error {
			var err error
			ext, err = c.src.Extents(ctx, ext[:0], p.off, end-p.off, block.Background|block.Local)
			return err
		})
		if err != nil {
			return ext, err
		}
		for _, e := range ext {
			if spared(e) {
				err = c.clear(ctx, e.Off, e.Len)
			} else {
				err = c.data(ctx, buf[:e.Len], e.Off)
			}
			if err != nil {
				return ext, err
			}
			p.off = e.End()
			c.done.Add(e.Len)
		}
	}
	return ext, nil
}

// data copies a range that must be read. Units of zeros are not written where
// the target has zeros.
func (c *copier) data(ctx context.Context, buf []byte, off int64) error {
	if !c.urgent {
		if err := c.pace.wait(ctx, int64(len(buf))); err != nil {
			return err
		}
	}
	if err := c.retry(ctx, func() error { return c.src.ReadAt(ctx, buf, off, block.Background) }); err != nil {
		return err
	}
	for len(buf) > 0 {
		n, zero := c.alike(buf)
		var err error
		if zero {
			err = c.clear(ctx, off, int64(n))
		} else {
			p := buf[:n]
			err = c.retry(ctx, func() error { return c.dst.WriteAt(ctx, p, off, block.Background) })
			c.written.Add(int64(n))
		}
		if err != nil {
			return err
		}
		buf, off = buf[n:], off+int64(n)
	}
	return nil
}

// spared says whether the target need not have the bytes of an extent of the
// volume. What the volume calls free it was told to leave at the source.
func spared(e block.Extent) bool { return e.Kind.Zero() || e.Kind == block.Free }

var zeros [64 << 10]byte

// alike measures how many bytes at the beginning of buf are all units of zeros
// or all units of something else.
func (c *copier) alike(buf []byte) (n int, zero bool) {
	for n < len(buf) {
		u := min(int(c.unit), len(buf)-n)
		z := bytes.Equal(buf[n:n+u], zeros[:u])
		if n > 0 && z != zero {
			return n, zero
		}
		zero, n = z, n+u
	}
	return n, zero
}

// clear makes a range of the target zero where it is not known to be.
func (c *copier) clear(ctx context.Context, off, n int64) error {
	if c.blind {
		return c.retry(ctx, func() error { return c.dst.Zero(ctx, off, n, block.Background|block.MayTrim) })
	}
	var ext []block.Extent
	for end := off + n; off < end; {
		err := c.retry(ctx, func() error {
			var err error
			ext, err = c.dst.Extents(ctx, ext[:0], off, end-off, block.Background)
			return err
		})
		if err != nil {
			return err
		}
		for _, e := range ext {
			if !e.Kind.Zero() {
				e := e
				if err := c.retry(ctx, func() error {
					return c.dst.Zero(ctx, e.Off, e.Len, block.Background|block.MayTrim)
				}); err != nil {
					return err
				}
			}
			off = e.End()
		}
	}
	return nil
}

// retry repeats f while it fails for a reason that may pass: the target is
// full, or one side cannot be reached.
func (c *copier) retry(ctx context.Context, f func() error) error {
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
		err := f()
		if err == nil {
			if pause > 100*time.Millisecond {
				c.wait(nil)
			}
			return nil
		}
		switch block.KindOf(err) {
		case block.KindNoSpace, block.KindUnavailable, block.KindBusy:
		default:
			return err
		}
		if c.urgent {
			return err
		}
		c.wait(err)
		if serr := sleep(ctx, pause); serr != nil {
			c.wait(nil)
			return serr
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// pacer spaces bytes out to a rate.
type pacer struct {
	rate atomic.Int64 // bytes per second, 0 for no limit
	mu   sync.Mutex
	next time.Time // when what has been let through so far is paid for
}

func (p *pacer) wait(ctx context.Context, n int64) error {
	rate := p.rate.Load()
	if rate <= 0 {
		return nil
	}
	p.mu.Lock()
	now := time.Now()
	if p.next.Before(now) {
		p.next = now
	}
	d := p.next.Sub(now)
	p.next = p.next.Add(time.Duration(float64(n) / float64(rate) * float64(time.Second)))
	p.mu.Unlock()
	if d <= 0 {
		return nil
	}
	return sleep(ctx, d)
}
