package pair

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"time"

	"forerun/api"
	"forerun/lab/load"
	"forerun/lab/oracle"
)

// LostOptions are what Lost needs beside Options.
type LostOptions struct {
	Options
	// Interval between checkpoints, 0 is 3 s.
	Interval time.Duration
}

// Lost destroys both frontends' machines N times: their processes and all their
// state. What is left is the source, at a checkpoint no older than an interval;
// an abort by force at the backend gives it back and says what is lost.
func Lost(ctx context.Context, o LostOptions, r Report) (err error) {
	if o.Interval == 0 {
		o.Interval = 3 * time.Second
	}
	k, err := begin(ctx, o.Options, r)
	if err != nil {
		return err
	}
	defer k.end(&err)
	l := lostRun{run: k, interval: o.Interval}
	for i := range o.N {
		if err := l.round(i + 1); err != nil {
			return fmt.Errorf("round %d: %w", i+1, err)
		}
	}
	k.AtLeast("times that both machines were destroyed", float64(o.N), float64(o.N), "")
	k.AtMost("most that a source was behind", l.behind.Seconds(), o.Interval.Seconds()+1, "s")
	k.AtMost("most that the stated loss was wrong by", l.wrong.Seconds(), 0.25, "s")
	return nil
}

type lostRun struct {
	*run
	interval time.Duration
	behind   time.Duration
	wrong    time.Duration
}

func (l *lostRun) round(i int) error {
	d, err := l.newDisk(fmt.Sprintf("vol%d", i), 32<<20)
	if err != nil {
		return err
	}
	d.hist.TrackCuts()
	f, err := l.newFS(fmt.Sprintf("fs%d", i), 96<<20)
	if err != nil {
		return err
	}
	p, err := l.pair(Config{Dir: l.path(fmt.Sprintf("pair%d", i)), Volumes: []Volume{d.volume(), f.volume()}, Interval: l.interval})
	if err != nil {
		return err
	}
	defer p.Kill()
	if err := p.Start(l.ctx); err != nil {
		return err
	}
	if err := d.dial(p.Proxy); err != nil {
		return err
	}
	if err := f.work(p.Proxy); err != nil {
		return err
	}
	d.work(load.Config{Pause: 8 * time.Millisecond})
	l.sleep(l.between(2*l.interval, 4*l.interval))
	if err := d.failed(); err != nil {
		return errors.Join(err, p.Words())
	}
	if i%2 == 0 {
		// Whoever reports what is unwritten has the time to: then it is known exactly.
		if err := d.rest(); err != nil {
			return errors.Join(err, p.Words())
		}
		l.sleep(1500 * time.Millisecond)
		d.resting = true
	}
	primary, _, err := p.Primary(l.ctx, d.name)
	if err != nil {
		return err
	}
	said, err := primary.Status(l.ctx, d.name)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	for _, n := range p.Frontends() {
		wg.Go(n.Proc.Kill)
	}
	wg.Wait()
	gone := time.Now()
	p.Proxy.Proc.Kill()
	if err := d.rest(); wrong(err) {
		return err
	}
	d.leave()
	f.lose()
	for _, n := range p.Frontends() {
		if err := os.RemoveAll(n.State); err != nil {
			return err
		}
	}
	if err := l.given(p, d, f, gone, said); err != nil {
		return errors.Join(err, p.Backend.Trouble("was all that was left"))
	}
	return p.Stop()
}

// forceAbort aborts a volume at the backend and returns what that said.
func (p *Pair) forceAbort(ctx context.Context, volume string) (a api.Abort, err error) {
	out, err := p.Order(ctx, p.Backend, "abort", volume, "--force", "--json")
	if err != nil {
		return a, err
	}
	var v api.Volume
	if err := json.Unmarshal([]byte(out), &v); err != nil || v.Abort == nil {
		return a, errors.Join(fmt.Errorf("abort --json printed %q", out), err)
	}
	return *v.Abort, nil
}

// given aborts by force, and compares what is stated with what is there.
func (l *lostRun) given(p *Pair, d *disk, f *fsDisk, gone time.Time, said api.Volume) error {
	a, err := p.forceAbort(l.ctx, d.name)
	if err != nil {
		return err
	}
	if _, err := p.forceAbort(l.ctx, f.name); err != nil {
		return err
	}
	for _, v := range p.Volumes {
		if err := unlocked(l.ctx, v.Source); err != nil {
			return fmt.Errorf("the source of %s after the abort: %w", v.Name, err)
		}
	}
	c, err := d.judgeCut()
	if err != nil {
		return err
	}
	off, err := stated(a, c)
	if err != nil {
		return err
	}
	l.wrong = max(l.wrong, off)
	if !c.Oldest.IsZero() {
		l.behind = max(l.behind, gone.Sub(c.Oldest))
	}
	n, err := f.judgeSource()
	if err != nil {
		return err
	}
	had, at := f.files.synced(n)
	if !at.IsZero() {
		l.behind = max(l.behind, gone.Sub(at))
	}
	lost := gone.Sub(c.Oldest)
	if c.Oldest.IsZero() {
		lost = 0
	}
	if d.resting && c.Written > 1<<20 {
		// Each write is a record with a head, so a little more is stated than was written.
		l.AtLeast("stated bytes lost / bytes written and lost", float64(a.LostBytes)/float64(c.Written), 1, "x")
		l.AtMost("stated bytes lost / bytes written and lost", float64(a.LostBytes)/float64(c.Written), 1.1, "x")
	}
	l.Say("the source is %.2f s behind and lacks %d writes of %d bytes; stated were checkpoint %d of %s, %d bytes and %.2f s (%s); status had said %d bytes unwritten, %.2f s; "+
		"the list has %d of %d lines", lost.Seconds(), c.Missing, c.Written, a.LastID, a.LastCheckpoint, a.LostBytes, a.LostS, a.Loss,
		said.Writeback.UnwrittenBytes, said.Writeback.RPOS, n, had)
	return nil
}

// stated is by how much the moment that an abort states differs from the one
// that the source shows: it must lie after the newest write that is there began
// and before the oldest that is missing was acknowledged.
func stated(a api.Abort, c oracle.Cut) (time.Duration, error) {
	if a.LastCheckpoint == "" {
		if c.Newest.IsZero() {
			return 0, nil
		}
		return math.MaxInt64, errors.New("the abort states no checkpoint, and the source holds writes")
	}
	at, err := time.Parse(time.RFC3339Nano, a.LastCheckpoint)
	if err != nil {
		return 0, err
	}
	var off time.Duration
	if !c.Newest.IsZero() {
		off = max(off, c.Newest.Sub(at))
	}
	if !c.Oldest.IsZero() {
		off = max(off, at.Sub(c.Oldest))
	}
	return off, nil
}

// unlocked says whether another program gets the source for itself.
func unlocked(ctx context.Context, path string) error {
	_, err := output(ctx, "qemu-io", "-f", "raw", "-c", "read 0 512", path)
	return err
}
