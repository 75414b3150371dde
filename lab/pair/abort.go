package pair

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"forerun/lab/load"
	"forerun/lab/netns"
)

// AbortOptions are what Abort needs beside Options.
type AbortOptions struct {
	Options
	// Write is how long the workload writes before the abort, 0 is 15 s.
	Write time.Duration
	// Rate and RTT of the line to the backend, bytes a second; 0 are 4 MB/s and 20 ms.
	Rate int64
	RTT  time.Duration
}

// Abort calls moves off, N times each way: with everything drained, and by
// force at the backend while the line is cut.
func Abort(ctx context.Context, o AbortOptions, r Report) (err error) {
	if o.Write == 0 {
		o.Write = 15 * time.Second
	}
	if o.Rate == 0 {
		o.Rate = 4_000_000
	}
	if o.RTT == 0 {
		o.RTT = 20 * time.Millisecond
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
	for i := range o.N {
		a := abortRun{run: k, o: o, line: line}
		if err := a.drained(i + 1); err != nil {
			return fmt.Errorf("abort %d: %w", i+1, err)
		}
		if err := a.forced(i + 1); err != nil {
			return fmt.Errorf("abort %d by force: %w", i+1, err)
		}
	}
	return nil
}

type abortRun struct {
	*run
	o    AbortOptions
	line *netns.Line
}

// start runs a pair on the far side of the line and writes to its volume.
func (a *abortRun) start(name string, size int64) (p *Pair, d *disk, err error) {
	if d, err = a.newDisk(name, size); err != nil {
		return nil, nil, err
	}
	d.hist.TrackCuts()
	p, err = a.pair(Config{Dir: a.path("pair-" + name), Volumes: []Volume{d.volume()}, Interval: time.Hour,
		AtBackend: a.line.Source.Command, HostBackend: a.line.Source.Addr,
		AtA: a.line.Target.Command, AtB: a.line.Target.Command, HostA: a.line.Target.Addr, HostB: a.line.Target.Addr})
	if err != nil {
		return nil, nil, err
	}
	if err := p.Start(a.ctx); err != nil {
		return p, nil, err
	}
	if err := d.dial(p.Proxy); err != nil {
		return p, nil, err
	}
	d.work(load.Config{Pause: 10 * time.Millisecond})
	a.sleep(a.o.Write)
	return p, d, d.rest()
}

func (a *abortRun) drained(i int) error {
	p, d, err := a.start(fmt.Sprintf("vol%d", i), 128<<20)
	if p != nil {
		defer p.Kill()
	}
	if err != nil {
		return err
	}
	primary, other, err := p.Primary(a.ctx, d.name)
	if err != nil {
		return err
	}
	s, err := primary.Status(a.ctx, d.name)
	if err != nil {
		return err
	}
	start := time.Now()
	if _, err := p.Order(a.ctx, primary, "abort", d.name); err != nil {
		return errors.Join(err, p.Words())
	}
	took := time.Since(start)
	bar := 1.5*float64(s.Writeback.UnwrittenBytes)/float64(a.o.Rate) + 2
	a.Measure("unwritten before the abort", float64(s.Writeback.UnwrittenBytes)/1e6, "MB")
	a.AtMost("abort", took.Seconds(), bar, "s")
	if err := d.judgeFile(d.source); err != nil {
		return errors.Join(fmt.Errorf("the source after the abort is not the volume: %w", err), p.Words())
	}
	a.Check("the source is the volume byte for byte", true, "")
	before, err := hash(d.source)
	if err != nil {
		return err
	}
	start = time.Now()
	for _, n := range []*Node{primary, other} {
		if _, err := p.Order(a.ctx, n, "abort", d.name); err != nil {
			return errors.Join(fmt.Errorf("a second abort, at %s: %w", n.Name, err), p.Words())
		}
	}
	a.AtMost("two more aborts, one at each frontend", time.Since(start).Seconds(), 4, "s")
	if err := unlocked(a.ctx, d.source); err != nil {
		return fmt.Errorf("the source after the abort: %w", err)
	}
	a.Check("the source is unlocked", true, "")
	left := int64(0)
	for _, n := range p.Frontends() {
		b, err := heldBy(n, d.name)
		if err != nil {
			return err
		}
		left += b
	}
	a.AtMost("bytes of the volume left at the frontends", float64(left), 64<<10, "B")
	d.leave()
	if err := p.Stop(); err != nil {
		return err
	}
	return a.unchanged(d, before)
}

// heldBy is how much a frontend's directory for a volume takes.
func heldBy(n *Node, volume string) (bytes int64, err error) {
	err = filepath.WalkDir(filepath.Join(n.State, "volumes", volume), func(_ string, e os.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || e.IsDir() {
			return err
		}
		if i, err := e.Info(); err == nil {
			bytes += i.Size()
		}
		return nil
	})
	return bytes, err
}

// unchanged compares a source with what it was.
func (k *run) unchanged(d *disk, before string) error {
	after, err := hash(d.source)
	if err == nil && after != before {
		err = fmt.Errorf("the source of %s was changed: SHA-256 %s, then %s", d.name, before, after)
	}
	return err
}

func hash(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// forced cuts the line and aborts at the backend. When the line is back, no
// frontend may write to the source again.
func (a *abortRun) forced(i int) error {
	p, d, err := a.start(fmt.Sprintf("forced%d", i), 32<<20)
	if p != nil {
		defer p.Kill()
	}
	if err != nil {
		return err
	}
	// Reads of what is not here would wait while the line is cut.
	if err := p.waitFilled(a.ctx); err != nil {
		return err
	}
	primary, _, err := p.Primary(a.ctx, d.name)
	if err != nil {
		return err
	}
	if _, err := p.Order(a.ctx, primary, "checkpoint", d.name); err != nil {
		return errors.Join(err, p.Words())
	}
	at := d.hist.Tick()
	d.work(load.Config{Pause: 10 * time.Millisecond})
	a.sleep(2 * time.Second)
	a.line.Partition(true)
	defer a.line.Partition(false)
	a.sleep(time.Second)
	if err := d.rest(); err != nil {
		return errors.Join(fmt.Errorf("while the line is cut: %w", err), p.Words())
	}
	start := time.Now()
	said, err := p.forceAbort(a.ctx, d.name)
	if err != nil {
		return errors.Join(err, p.Words())
	}
	a.AtMost("abort by force", time.Since(start).Seconds(), 2, "s")
	c, err := d.judgeCut()
	if err != nil {
		return err
	}
	if !c.Covers(at) {
		return errors.New("the source lacks what a checkpoint had stored")
	}
	off, err := stated(said, c)
	if err != nil {
		return err
	}
	a.AtMost("the stated loss is wrong by", off.Seconds(), 0.25, "s")
	a.Say("stated: checkpoint %d of %s, %d bytes and %.2f s lost; the source lacks %d writes, %d bytes", said.LastID, said.LastCheckpoint,
		said.LostBytes, said.LostS, c.Missing, c.MissingBytes)
	before, err := hash(d.source)
	if err != nil {
		return err
	}
	again, err := p.forceAbort(a.ctx, d.name)
	if err != nil {
		return fmt.Errorf("a second abort by force: %w", err)
	}
	if again.LastID != said.LastID || again.LastCheckpoint != said.LastCheckpoint {
		return fmt.Errorf("a second abort by force states something else: %+v, then %+v", said, again)
	}
	a.line.Partition(false)
	a.sleep(5 * time.Second)
	if err := a.unchanged(d, before); err != nil {
		return errors.Join(fmt.Errorf("after the line was back: %w", err), p.Words())
	}
	a.Check("no frontend writes to a source that was given back", true, "")
	d.leave()
	p.Kill()
	return nil
}
