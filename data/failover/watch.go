package failover

import (
	"context"
	"fmt"
	"time"
)

// watch looks at the target in use and leaves it when it is dead, or when it
// answers nothing and another one can be opened.
func (d *Device) watch() {
	t := time.NewTicker(tick)
	defer t.Stop()
	var (
		last     *door
		seen     int64
		idle     time.Duration // no call was at the target for so long
		quiet    time.Duration // calls wait, and none was answered for so long
		asked    time.Duration // quiet when a ping was last answered
		patience = d.opt.Patience
	)
	for {
		select {
		case <-d.ctx.Done():
			return
		case <-t.C:
		}
		dr, n := d.at.Load(), d.answers.Load()
		if n != seen {
			patience = d.opt.Patience
		}
		if dr == nil || dr != last || n != seen || d.waiting.Load() == 0 {
			if dr != last || n != seen {
				idle = 0
			}
			last, seen, quiet, asked = dr, n, 0, 0
			if idle += tick; idle >= idlePing && dr != nil {
				// Nobody waits: a target that has gone is left before anybody does.
				idle = 0
				if err := d.ping(dr); err != nil && d.ctx.Err() == nil && d.answers.Load() == seen {
					d.lose(dr, err, 0)
				}
			}
			continue
		}
		idle = 0
		quiet += tick
		if quiet-asked < d.opt.PingAfter {
			continue
		}
		asked = quiet
		began := time.Now()
		err := d.ping(dr)
		quiet += time.Since(began)
		asked = quiet
		switch {
		case d.ctx.Err() != nil:
			return
		case d.answers.Load() != seen:
		case err != nil:
			d.noteStall()
			d.lose(dr, err, quiet)
		case quiet >= patience && d.tryOther(dr, quiet):
			patience = min(2*patience, maxPatience)
		}
	}
}

// ping asks a target for a sign of life.
func (d *Device) ping(dr *door) error {
	ctx, cancel := context.WithTimeout(d.ctx, d.opt.PingTimeout)
	defer cancel()
	return dr.Ping(ctx)
}

// tryOther leaves a target that lives and answers nothing, if another one opens.
func (d *Device) tryOther(dr *door, quiet time.Duration) bool {
	if len(d.targets) == 1 {
		return false
	}
	other := d.race(dr.target+1, dr.target)
	if other == nil {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed || d.at.Load() != dr {
		d.wg.Go(func() { d.discard(other) })
		return false
	}
	d.stats.stalls++
	d.stats.longest = max(d.stats.longest, quiet)
	d.use(other)
	d.log.Info("the volume is served", "target", d.opt.Targets[other.target].Name)
	d.left(dr, fmt.Errorf("it lives and has answered nothing for %v", quiet.Round(tick)))
	return true
}

func (d *Device) noteStall() {
	d.mu.Lock()
	d.stats.stalls++
	d.mu.Unlock()
}
