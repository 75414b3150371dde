package pair

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"forerun/lab/load"
)

// BackendOptions are what Backend needs beside Options.
type BackendOptions struct {
	Options
	// Interval between checkpoints, 0 is 1 s.
	Interval time.Duration
}

// Backend kills the backend N times while it applies a checkpoint. After each
// restart, and before a frontend can reach it, the sources are read: one of
// them against the history of all writes, of which it must show one moment,
// and the other one as the file system that it holds.
func Backend(ctx context.Context, o BackendOptions, r Report) (err error) {
	if o.Interval == 0 {
		o.Interval = time.Second
	}
	k, err := begin(ctx, o.Options, r)
	if err != nil {
		return err
	}
	defer k.end(&err)
	d, err := k.newDisk("vol", 48<<20)
	if err != nil {
		return err
	}
	d.hist.TrackCuts()
	f, err := k.newFS("fs", 96<<20)
	if err != nil {
		return err
	}
	p, err := k.pair(Config{Volumes: []Volume{d.volume(), f.volume()}, Interval: o.Interval, Gated: true})
	if err != nil {
		return err
	}
	if err := p.Start(k.ctx); err != nil {
		return err
	}
	if err := d.dial(p.Proxy); err != nil {
		return err
	}
	if err := f.work(p.Proxy); err != nil {
		return err
	}
	d.work(load.Config{Pause: 8 * time.Millisecond})
	b := backendRun{run: k, p: p, d: d, f: f, interval: o.Interval}
	for i := range o.N {
		if err := b.round(); err != nil {
			return fmt.Errorf("round %d: %w", i+1, errors.Join(err, p.Words()))
		}
		k.Say("round %d of %d: %s; %d writes acknowledged, the source lacks %d, list of %d lines",
			i+1, o.N, b.hit, d.hist.Stats().Acked, b.missing, b.lines)
	}
	if err := b.finish(); err != nil {
		return errors.Join(err, p.Words())
	}
	k.AtLeast("kills of the backend survived", float64(o.N), float64(o.N), "")
	k.AtLeast("kills with a checkpoint stored and not wholly applied", float64(b.redone), float64(o.N)/2, "")
	k.AtMost("longest request of the workload", d.stats.Longest.Seconds(), bestFailover, "s")
	k.AtMost("oldest write that a source lacked", b.behind.Seconds(), o.Interval.Seconds()+bestFailover, "s")
	d.report()
	d.leave()
	return p.Stop()
}

type backendRun struct {
	*run
	p        *Pair
	d        *disk
	f        *fsDisk
	interval time.Duration

	hit     string
	redone  int
	missing int64
	lines   int
	behind  time.Duration // the most that a source was behind, at its backend's death
}

// stored are the checkpoints that lie at the backend and are not wholly applied.
func stored(n *Node) []string {
	found, _ := filepath.Glob(filepath.Join(n.State, "writeback", "*.ckpt"))
	return found
}

// lastCheckpoint is when the last stored checkpoint was cut, as the primary says.
func (p *Pair) lastCheckpoint(ctx context.Context, volume string) (time.Time, uint64, error) {
	n, _, err := p.Primary(ctx, volume)
	if err != nil {
		return time.Time{}, 0, err
	}
	s, err := n.Status(ctx, volume)
	if err != nil || s.Writeback.LastCheckpoint == "" {
		return time.Time{}, 0, err
	}
	t, err := time.Parse(time.RFC3339Nano, s.Writeback.LastCheckpoint)
	return t, s.Writeback.LastID, err
}

// aim waits until a checkpoint lies at the backend, and a little longer.
func (b *backendRun) aim() error {
	idle := stored(b.p.Backend)
	deadline := time.After(30*time.Second + 3*b.interval)
	for {
		now := stored(b.p.Backend)
		if len(now) > 0 && fmt.Sprint(now) != fmt.Sprint(idle) {
			break
		}
		idle = now
		select {
		case <-deadline:
			return errors.New("no checkpoint came to the backend")
		case <-b.ctx.Done():
			return b.ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
	b.sleep(b.between(0, 25*time.Millisecond))
	return nil
}

func (b *backendRun) round() error {
	if !b.sleep(b.between(0, b.interval)) {
		return b.ctx.Err()
	}
	if err := b.aim(); err != nil {
		return err
	}
	at, id, err := b.p.lastCheckpoint(b.ctx, b.d.name)
	if err != nil {
		return err
	}
	b.p.Backend.Proc.Kill()
	killed := time.Now()
	b.p.Ways["a-backend"].Shut()
	b.p.Ways["b-backend"].Shut()
	left := stored(b.p.Backend)
	b.hit = fmt.Sprintf("killed with %d checkpoints to be applied", len(left))
	if len(left) > 0 {
		b.redone++
	}
	if err := b.p.Backend.Start(b.ctx); err != nil {
		return err
	}
	if err := b.judge(at, id, killed); err != nil {
		return err
	}
	b.p.Ways["a-backend"].Open()
	b.p.Ways["b-backend"].Open()
	if err := b.d.failed(); err != nil {
		return err
	}
	// On to the next one: the pair has found the backend again.
	deadline := time.Now().Add(time.Minute)
	for {
		_, now, err := b.p.lastCheckpoint(b.ctx, b.d.name)
		if err == nil && now != id {
			return nil
		}
		if time.Now().After(deadline) {
			return errors.Join(fmt.Errorf("checkpoint %d was the last; none in a minute since the backend is back", id), err)
		}
		if !b.sleep(50 * time.Millisecond) {
			return b.ctx.Err()
		}
	}
}

// judge reads both sources. A checkpoint that the primary called stored before
// the kill must be in them.
func (b *backendRun) judge(at time.Time, id uint64, killed time.Time) error {
	c, err := b.d.judgeCut()
	if err != nil {
		return err
	}
	if !c.Oldest.IsZero() && c.Oldest.Before(at) {
		return fmt.Errorf("checkpoint %d of %v was said to be stored, and the source lacks what was acknowledged at %v",
			id, at.Format(time.StampMilli), c.Oldest.Format(time.StampMilli))
	}
	b.missing = c.Missing
	if !c.Oldest.IsZero() {
		b.behind = max(b.behind, killed.Sub(c.Oldest))
	}
	b.lines, err = b.f.judgeSource()
	return err
}

// finish asks for a checkpoint of what is there now, and finds it in the sources.
func (b *backendRun) finish() error {
	if err := errors.Join(b.d.rest(), b.f.rest()); err != nil {
		return err
	}
	if err := b.d.judge("at the end"); err != nil {
		return err
	}
	want, _ := b.f.files.synced(0)
	if err := b.f.mount.Close(); err != nil {
		return err
	}
	b.f.mount = nil
	for _, v := range b.p.Volumes {
		n, _, err := b.p.Primary(b.ctx, v.Name)
		if err != nil {
			return err
		}
		if _, err := b.p.Order(b.ctx, n, "checkpoint", v.Name); err != nil {
			return err
		}
	}
	if err := b.p.Settled(b.ctx); err != nil {
		return err
	}
	if err := b.d.judgeFile(b.d.source); err != nil {
		return fmt.Errorf("the source after a last checkpoint: %w", err)
	}
	b.Check("the source is the volume after a last checkpoint", true, "")
	n, err := b.f.judgeSource()
	if err == nil && n != want {
		err = fmt.Errorf("the list has %d lines at the source after a last checkpoint, %d were synced", n, want)
	}
	return err
}

// Settled waits until nothing stored is left to be applied.
func (p *Pair) Settled(ctx context.Context) error {
	for end := time.Now().Add(time.Minute); ; {
		busy := false
		for _, v := range p.Volumes {
			s, err := p.Backend.Status(ctx, v.Name)
			if err != nil {
				return err
			}
			busy = busy || s.Writeback.State == "applying"
		}
		if !busy {
			return nil
		}
		if time.Now().After(end) {
			return errors.New("checkpoints are still being applied after a minute")
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}
