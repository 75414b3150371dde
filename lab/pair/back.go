package pair

import (
	"context"
	"errors"
	"fmt"
	"time"

	"forerun/lab/load"
	"forerun/lab/netns"
)

// BackOptions are what Back needs beside Options.
type BackOptions struct {
	Options
	// Rate and RTT of the line between the homes, bytes a second; 0 are 12.5 MB/s and 40 ms.
	Rate int64
	RTT  time.Duration
}

// Back moves a disk from home A to home B and back again, N times: the same
// programs with their roles swapped, under a verifying load all the while.
func Back(ctx context.Context, o BackOptions, r Report) (err error) {
	if o.Rate == 0 {
		o.Rate = 12_500_000
	}
	if o.RTT == 0 {
		o.RTT = 40 * time.Millisecond
	}
	k, err := begin(ctx, o.Options, r)
	if err != nil {
		return err
	}
	defer k.end(&err)
	line, err := k.openLine(o.Rate, o.RTT)
	if err != nil {
		return err
	}
	d, err := k.newDisk("vol", 48<<20)
	if err != nil {
		return err
	}
	b := backRun{run: k, d: d, line: line}
	homes := []netns.Site{line.Source, line.Target}
	for i := range 2 * o.N {
		from, to := homes[i%2], homes[(i+1)%2]
		what := []string{"A to B", "B to A"}[i%2]
		if err := b.move(i, what, from, to); err != nil {
			return fmt.Errorf("move %d, %s: %w", i+1, what, err)
		}
	}
	d.report()
	return nil
}

type backRun struct {
	*run
	d    *disk
	line *netns.Line
}

// move moves the disk from one home to the other and makes the native disk
// there the source of the next move.
func (b *backRun) move(i int, what string, from, to netns.Site) error {
	p, err := b.pair(Config{Dir: b.path(fmt.Sprintf("move%d", i)), Volumes: []Volume{b.d.volume()},
		AtBackend: from.Command, HostBackend: from.Addr, AtA: to.Command, HostA: to.Addr, AtB: to.Command, HostB: to.Addr})
	if err != nil {
		return err
	}
	defer p.Kill()
	before := b.line.Stats()
	start := time.Now()
	if err := p.Start(b.ctx); err != nil {
		return err
	}
	if err := b.d.dial(p.Entry()); err != nil {
		return err
	}
	b.d.work(load.Config{Pause: 20 * time.Millisecond})
	native := b.path(fmt.Sprintf("native%d.raw", i))
	primary, _, err := p.Primary(b.ctx, b.d.name)
	if err != nil {
		return err
	}
	if _, err := p.Order(b.ctx, primary, "cutover", b.d.name, "--to", native, "--wait"); err != nil {
		return errors.Join(err, b.d.rest(), p.Words())
	}
	b.sleep(500 * time.Millisecond)
	if err := b.d.rest(); err != nil {
		return errors.Join(err, p.Words())
	}
	if err := b.d.judge("after the cut-over"); err != nil {
		return err
	}
	after := b.line.Stats()
	crossed := after.ToTarget.Bytes - before.ToTarget.Bytes + after.ToSource.Bytes - before.ToSource.Bytes
	b.Measure(what+": time", time.Since(start).Seconds(), "s")
	b.Measure(what+": bytes that crossed the line", float64(crossed)/1e6, "MB")
	b.d.leave()
	if err := p.Stop(); err != nil {
		return err
	}
	if err := b.d.judgeFile(native); err != nil {
		return fmt.Errorf("the native disk: %w", err)
	}
	b.Check(what+": the native disk alone is the disk", true, "")
	b.d.source = native
	return nil
}
