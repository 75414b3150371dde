package failover

import (
	"context"
	"errors"
	"fmt"
	"time"

	"forerun/block"
)

// lose gives up a target: its calls fail and go elsewhere. quiet is how long
// it had answered nothing. Of those who lose the same target the first counts.
func (d *Device) lose(dr *door, cause error, quiet time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed || d.at.Load() != dr {
		return
	}
	d.at.Store(nil)
	d.since = time.Now().Add(-quiet)
	d.left(dr, cause)
	d.wg.Go(func() { d.search(dr.target + 1) })
}

// left notes why a target was left and lets it go. mu is held.
func (d *Device) left(dr *door, cause error) {
	t := &d.targets[dr.target]
	t.phase, t.err = phaseFailed, cause
	if time.Since(dr.opened) >= steady {
		t.backoff = 0
	} else {
		t.backoff = d.slower(t.backoff)
	}
	t.notBefore = time.Now().Add(t.backoff)
	d.log.Warn("left a target; its calls go to the next one", "target", d.opt.Targets[dr.target].Name, "calls", d.waiting.Load(), "err", cause)
	d.wg.Go(func() { d.discard(dr) })
}

// discard closes a target without waiting for it.
func (d *Device) discard(dr *door) {
	dr.Abort()
	_ = dr.Close() // nobody has a use for it
}

// shift leaves a target for an error about bytes, and says whether the call is
// worth another try.
func (d *Device) shift(dr *door, cause error) bool {
	if len(d.targets) == 1 {
		return false
	}
	d.mu.Lock()
	if d.at.Load() == dr {
		now := time.Now()
		if !d.lastHard.IsZero() && now.Sub(d.lastHard) < hardPause {
			d.mu.Unlock()
			return false
		}
		d.lastHard = now
	}
	d.mu.Unlock()
	d.lose(dr, cause, 0)
	return true
}

// search opens a target, however long it takes.
func (d *Device) search(from int) {
	for wait := d.opt.Retry; ; wait = d.slower(wait) {
		if dr := d.race(from, -1); dr != nil {
			d.install(dr)
			return
		}
		if !d.sleep(wait) {
			return
		}
	}
}

// install makes an open target the one in use, if there is none.
func (d *Device) install(dr *door) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		d.wg.Go(func() { d.discard(dr) }) // this goroutine is counted, so Close still waits
		return
	}
	gap := time.Since(d.since)
	if d.stats.moves > 0 {
		d.stats.longest = max(d.stats.longest, gap)
	}
	d.use(dr)
	d.log.Info("the volume is served", "target", d.opt.Targets[dr.target].Name, "after", gap.Round(time.Millisecond))
	close(d.changed)
	d.changed = make(chan struct{})
}

// use sets the target in use. mu is held.
func (d *Device) use(dr *door) {
	dr.opened = time.Now()
	d.at.Store(dr)
	d.stats.moves++
	d.targets[dr.target] = state{phase: phaseServing, backoff: d.targets[dr.target].backoff}
}

// race opens targets in turn, from one on and but one: the next when the one
// before has failed or takes long. The first to open wins, nil if none does.
func (d *Device) race(from, but int) *door {
	type result struct {
		dr  *door
		err error
	}
	ctx, cancel := context.WithCancel(d.ctx)
	defer cancel()
	n := len(d.targets)
	order := make([]int, 0, n)
	for i := range n {
		if t := (from + i) % n; t != but {
			order = append(order, t)
		}
	}
	results := make(chan result, n)
	pending := 0
	launch := func() {
		t := order[0]
		order = order[1:]
		pending++
		go func() {
			dr, err := d.open(ctx, t)
			results <- result{dr, err}
		}()
	}
	stagger := time.NewTimer(0)
	defer stagger.Stop()
	for {
		var next <-chan time.Time
		if len(order) > 0 {
			next = stagger.C
		} else if pending == 0 {
			return nil
		}
		select {
		case <-next:
			launch()
			stagger.Reset(d.opt.Stagger)
		case r := <-results:
			pending--
			if r.dr == nil {
				stagger.Reset(0)
				continue
			}
			cancel()
			for range pending { // those that lost end at once, their context has
				if r := <-results; r.dr != nil {
					d.discard(r.dr)
				}
			}
			return r.dr
		}
	}
}

// open opens one target, not before its time, and sees whether it fits.
func (d *Device) open(ctx context.Context, i int) (*door, error) {
	d.mu.Lock()
	wait := time.Until(d.targets[i].notBefore)
	d.mu.Unlock()
	if wait > 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	d.note(i, phaseTrying, nil)
	limited, cancel := context.WithTimeout(ctx, d.opt.ConnectTimeout)
	defer cancel()
	dev, err := d.opt.Targets[i].Open(limited)
	if err == nil && d.info.Size != 0 {
		if err = fits(d.info, dev.Info()); err != nil {
			err = block.E("failover.open", d.opt.Targets[i].Name, block.KindCorrupt, err)
			d.discard(&door{Door: dev})
			if d.note(i, phaseRefused, err) {
				d.log.Error("a target is not the volume and is not used", "target", d.opt.Targets[i].Name, "err", err)
			}
			return nil, err
		}
	}
	if err != nil {
		if ctx.Err() != nil && d.ctx.Err() == nil {
			d.note(i, phaseStandby, nil) // another one was faster
		} else if d.note(i, phaseFailed, err) {
			d.log.Warn("a target cannot be opened", "target", d.opt.Targets[i].Name, "err", err)
		}
		return nil, err
	}
	return &door{Door: dev, target: i, opened: time.Now()}, nil
}

// note keeps what is known of a target, and says whether it is news.
func (d *Device) note(i int, p phase, err error) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	t := &d.targets[i]
	if p == phaseTrying || d.ctx.Err() != nil && t.err != nil {
		t.phase = p // what went wrong before stays until it is known better
		return false
	}
	news := t.err == nil || err == nil || t.err.Error() != err.Error()
	t.phase, t.err = p, err
	if p == phaseFailed || p == phaseRefused {
		t.backoff = d.slower(t.backoff)
		t.notBefore = time.Now().Add(t.backoff)
	}
	return news
}

// fits says why a target cannot stand in for the volume that was.
func fits(was, now block.Info) error {
	switch {
	case now.Size != was.Size:
		return fmt.Errorf("it has %d bytes, the volume has %d: it is another disk, or one was resized", now.Size, was.Size)
	case now.ReadOnly && !was.ReadOnly:
		return errors.New("it is read-only, the volume is not")
	case max(now.BlockSize, 1) > max(was.BlockSize, 1):
		return fmt.Errorf("its blocks are %d bytes, the volume's are %d", now.BlockSize, was.BlockSize)
	case now.MaxIO != 0 && (was.MaxIO == 0 || now.MaxIO < was.MaxIO):
		return fmt.Errorf("it takes %d bytes in a call, the volume takes %d (0 is any number)", now.MaxIO, was.MaxIO)
	}
	return nil
}
