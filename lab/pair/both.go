package pair

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"forerun/lab/load"
)

// Both kills both frontends at once, N times, under a verifying load with
// flushes. In every other round the load hangs directly on the primary, and
// its requests are lost with it; in the others it sits behind the proxy, and
// sees a long request and no error.
func Both(ctx context.Context, o Options, r Report) (err error) {
	k, err := begin(ctx, o, r)
	if err != nil {
		return err
	}
	defer k.end(&err)
	d, err := k.newDisk("vol", 64<<20)
	if err != nil {
		return err
	}
	p, err := k.pair(Config{Volumes: []Volume{d.volume()}})
	if err != nil {
		return err
	}
	if err := p.Start(k.ctx); err != nil {
		return err
	}
	var back time.Duration
	for i := range o.N {
		behind := i%2 == 1
		took, err := k.bothOnce(p, d, behind)
		if err != nil {
			return fmt.Errorf("round %d: %w", i+1, errors.Join(err, p.Words()))
		}
		back = max(back, took)
		h := d.hist.Stats()
		k.Say("round %d of %d: serving in sync %.1f s after the kill; %d writes acknowledged, %d sectors judged, %d went back",
			i+1, o.N, took.Seconds(), h.Acked, h.Checked, h.Rewound)
	}
	k.AtLeast("kills of both survived", float64(o.N), float64(o.N), "")
	k.Measure("longest time until both were in sync again", back.Seconds(), "s")
	k.Measure("sectors that lost an acknowledged, not flushed write", float64(d.hist.Stats().Rewound), "")
	d.report()
	d.leave()
	return p.Stop()
}

func (k *run) bothOnce(p *Pair, d *disk, behind bool) (time.Duration, error) {
	first, _, err := p.Primary(k.ctx, d.name)
	if err != nil {
		return 0, err
	}
	at := first
	if behind {
		at = p.Proxy
	}
	if err := d.dial(at); err != nil {
		return 0, err
	}
	d.work(load.Config{})
	k.sleep(k.between(300*time.Millisecond, 2*time.Second))
	var wg sync.WaitGroup
	for _, n := range p.Frontends() {
		wg.Go(n.Proc.Kill)
	}
	wg.Wait()
	if !behind {
		<-d.client.Done()
		if err := d.rest(); wrong(err) {
			return 0, err
		}
		d.hist.Crash()
	}
	// One may well be there before the other.
	start := time.Now()
	nodes := p.Frontends()
	k.rng.Shuffle(2, func(i, j int) { nodes[i], nodes[j] = nodes[j], nodes[i] })
	if err := nodes[0].Launch(k.ctx); err != nil {
		return 0, err
	}
	k.sleep(k.between(0, 2*time.Second))
	if err := nodes[1].Launch(k.ctx); err != nil {
		return 0, err
	}
	for _, n := range nodes {
		if err := n.Await(k.ctx); err != nil {
			return 0, err
		}
	}
	if _, err := p.WaitInSync(k.ctx, 2*time.Minute); err != nil {
		return 0, err
	}
	took := time.Since(start)
	if behind {
		k.sleep(300 * time.Millisecond)
		if err := d.rest(); err != nil {
			return 0, err
		}
		return took, d.judge("after both were killed, behind the proxy")
	}
	if first, _, err = p.Primary(k.ctx, d.name); err != nil {
		return 0, err
	}
	if err := d.dial(first); err != nil {
		return 0, err
	}
	return took, d.judge("after both were killed")
}
