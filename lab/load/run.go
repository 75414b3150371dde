package load

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"forerun/internal/nbdproto"
	"forerun/lab/oracle"
)

// Config is the mix.
type Config struct {
	// Depth is how many requests are under way, 0 is 8.
	Depth int
	// From and To bound the bytes that are touched; To 0 is the whole disk.
	From, To int64
	// MaxSectors bounds one request, 0 is 256 (128 KiB).
	MaxSectors int
	// Pause is slept after each request of each of the Depth workers.
	Pause time.Duration
	// Seed decides everything but the timing.
	Seed uint64
}

// Stats is what Run did.
type Stats struct {
	Writes, Zeros, Reads, Flushes int64
	Bytes                         int64         // written
	Longest                       time.Duration // slowest request that was answered
}

// Run works until ctx ends, which is success, or something fails. An error
// that is a *oracle.Wrong means wrong bytes; others are the connection's.
func Run(ctx context.Context, c *Client, h *oracle.History, cfg Config) (Stats, error) {
	if cfg.Depth == 0 {
		cfg.Depth = 8
	}
	if cfg.To == 0 {
		cfg.To = c.Size
	}
	if cfg.MaxSectors == 0 {
		cfg.MaxSectors = 256
	}
	r := runner{Config: cfg, c: c, h: h}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for i := range cfg.Depth {
		wg.Go(func() {
			if err := r.work(ctx, rand.New(rand.NewPCG(cfg.Seed, uint64(i)))); err != nil {
				cancel(err)
			}
		})
	}
	wg.Wait()
	err := context.Cause(ctx)
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		err = nil
	}
	return Stats{Writes: r.writes.Load(), Zeros: r.zeros.Load(), Reads: r.reads.Load(), Flushes: r.flushes.Load(),
		Bytes: r.bytes.Load(), Longest: time.Duration(r.longest.Load())}, err
}

type runner struct {
	Config
	c *Client
	h *oracle.History

	writes, zeros, reads, flushes, bytes, longest atomic.Int64
}

func (r *runner) work(ctx context.Context, rng *rand.Rand) error {
	for ctx.Err() == nil {
		start := time.Now()
		if err := r.one(rng); err != nil {
			return err
		}
		took := int64(time.Since(start))
		for old := r.longest.Load(); took > old && !r.longest.CompareAndSwap(old, took); old = r.longest.Load() {
		}
		if r.Pause > 0 {
			select {
			case <-ctx.Done():
			case <-time.After(r.Pause):
			}
		}
	}
	return nil
}

// span picks a range: mostly whole 4 KiB blocks and small, as file systems do.
func (r *runner) span(rng *rand.Rand) (off, n int64) {
	const s = oracle.Sector
	sectors := int64(8)
	switch rng.IntN(8) {
	case 0:
		sectors = 1 + rng.Int64N(int64(r.MaxSectors))
	case 1, 2:
		sectors = 8 * (1 + rng.Int64N(max(1, int64(r.MaxSectors)/8)))
	}
	first, last := r.From/s, r.To/s
	sectors = min(sectors, last-first)
	at := first + rng.Int64N(last-first-sectors+1)
	if sectors%8 == 0 && (at&^7) >= first {
		at &^= 7
	}
	return at * s, sectors * s
}

func (r *runner) one(rng *rand.Rand) (err error) {
	k := rng.IntN(100)
	if k < 6 {
		op := r.h.BeginFlush()
		if err := r.c.Flush(); err != nil {
			op.Failed()
			return fmt.Errorf("flush: %w", err)
		}
		op.Done()
		r.flushes.Add(1)
		return nil
	}
	off, n := r.span(rng)
	if k < 30 {
		op := r.h.BeginRead(off, n)
		if op == nil {
			return nil // somebody is there; another one next time
		}
		defer op.Done()
		p := make([]byte, n)
		if _, err := r.c.ReadAt(p, off); err != nil {
			return fmt.Errorf("read %d bytes at %d: %w", n, off, err)
		}
		r.reads.Add(1)
		return r.h.Check(off, p)
	}
	fua := k >= 92
	zero := k < 36 && r.c.Flags&nbdproto.FlagSendWriteZeroes != 0
	var p []byte
	if !zero {
		p = make([]byte, n)
	}
	op := r.h.BeginWrite(off, n, p, fua)
	if op == nil {
		return nil
	}
	if zero {
		err = r.c.Zero(off, n, fua)
		r.zeros.Add(1)
	} else {
		err = r.c.WriteAt(p, off, fua)
		r.writes.Add(1)
	}
	if err != nil {
		op.Failed()
		return fmt.Errorf("write %d bytes at %d: %w", n, off, err)
	}
	op.Done()
	r.bytes.Add(n)
	return nil
}
