package stack

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"forerun/block"
)

// patience is the storey that makes a full disk of ours a wait rather than an
// error: a guest's file system takes ENOSPC from its disk for a broken disk,
// while a write that takes long is only slow. The call is made again until it
// succeeds or its ctx ends; every call of the contract may be repeated.
//
// It holds no data, so it passes calls on.
type patience struct {
	block.Device
	log   *slog.Logger
	retry time.Duration

	mu      sync.Mutex
	waiting int    // guarded by mu: calls that wait now
	reason  string // guarded by mu
}

func newPatience(below block.Device, log *slog.Logger, retry time.Duration) *patience {
	return &patience{Device: below, log: log, retry: retry}
}

// Waiting says why calls wait, or nothing.
func (p *patience) Waiting() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.waiting == 0 {
		return ""
	}
	return p.reason
}

// outlast is called with what a first try gave, and tries again for as long as
// there is no space.
func (p *patience) outlast(ctx context.Context, err error, again func() error) error {
	if block.KindOf(err) != block.KindNoSpace {
		return err
	}
	p.mu.Lock()
	p.waiting++
	p.reason = "writes wait for space: " + err.Error()
	first := p.waiting == 1
	p.mu.Unlock()
	if first {
		p.log.Warn("writes wait for space", "err", err)
	}
	defer func() {
		p.mu.Lock()
		p.waiting--
		last := p.waiting == 0
		p.mu.Unlock()
		if last {
			p.log.Info("writes go on")
		}
	}()
	tick := time.NewTicker(p.retry)
	defer tick.Stop()
	for block.KindOf(err) == block.KindNoSpace {
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
			err = again()
		}
	}
	return err
}

// WriteAt writes, waiting for space.
func (p *patience) WriteAt(ctx context.Context, b []byte, off int64, f block.Flags) error {
	err := p.Device.WriteAt(ctx, b, off, f)
	if err == nil {
		return nil
	}
	return p.outlast(ctx, err, func() error { return p.Device.WriteAt(ctx, b, off, f) })
}

// Zero zeroes, waiting for space.
func (p *patience) Zero(ctx context.Context, off, n int64, f block.Flags) error {
	err := p.Device.Zero(ctx, off, n, f)
	if err == nil {
		return nil
	}
	return p.outlast(ctx, err, func() error { return p.Device.Zero(ctx, off, n, f) })
}

// Trim trims, waiting for space.
func (p *patience) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	err := p.Device.Trim(ctx, off, n, f)
	if err == nil {
		return nil
	}
	return p.outlast(ctx, err, func() error { return p.Device.Trim(ctx, off, n, f) })
}

// Flush flushes, waiting for space.
func (p *patience) Flush(ctx context.Context, f block.Flags) error {
	err := p.Device.Flush(ctx, f)
	if err == nil {
		return nil
	}
	return p.outlast(ctx, err, func() error { return p.Device.Flush(ctx, f) })
}
