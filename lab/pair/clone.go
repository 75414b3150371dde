package pair

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"forerun/lab/load"
	"forerun/lab/oracle"
)

// Clone runs an isolated clone beside the real volume, N times: written all
// over, it leaves the source as it was; and while the real one is written back
// to the source, it keeps what it had.
func Clone(ctx context.Context, o Options, r Report) (err error) {
	k, err := begin(ctx, o, r)
	if err != nil {
		return err
	}
	defer k.end(&err)
	d, err := k.newDisk("vol", 48<<20)
	if err != nil {
		return err
	}
	d.hist.TrackCuts()
	p, err := k.pair(Config{Volumes: []Volume{d.volume()}, Interval: time.Second})
	if err != nil {
		return err
	}
	if err := p.Start(k.ctx); err != nil {
		return err
	}
	if err := d.dial(p.Proxy); err != nil {
		return err
	}
	for i := range o.N {
		c := cloneRun{run: k, p: p, d: d}
		if err := c.round(i + 1); err != nil {
			return fmt.Errorf("clone %d: %w", i+1, errors.Join(err, p.Words()))
		}
	}
	d.report()
	d.leave()
	return p.Stop()
}

type cloneRun struct {
	*run
	p *Pair
	d *disk
}

func (c *cloneRun) round(i int) error {
	// The real one rests at a checkpoint; what the clone begins with is known.
	if err := c.d.judge("before the clone"); err != nil {
		return err
	}
	if err := c.checkpoint(); err != nil {
		return err
	}
	first := c.path(fmt.Sprintf("first%d.raw", i))
	if _, err := output(c.ctx, "cp", "--sparse=always", c.d.source, first); err != nil {
		return err
	}
	defer os.Remove(first)
	before, err := hash(c.d.source)
	if err != nil {
		return err
	}
	n := c.p.Frontend("clone", c.p.AtA, "--isolated", "--fill-paused")
	n.log = c.p.path("clone.log")
	if err := n.Start(c.ctx); err != nil {
		return err
	}
	defer func() {
		if n.Alive() {
			n.Proc.Kill()
		}
	}()
	// Half of the clone is written, with holes between, so that the rest must
	// still come from the source as it was.
	o := &overlaid{base: first, size: c.d.size}
	if err := c.writeAllOver(n, o); err != nil {
		return errors.Join(err, n.Trouble("was the clone"))
	}
	if err := c.unchanged(c.d, before); err != nil {
		return err
	}
	c.Check("the source is unchanged after writes all over the clone", true, before[:16])
	// The real one goes on.
	c.d.work(load.Config{Pause: time.Millisecond})
	c.sleep(4 * time.Second)
	if err := c.d.rest(); err != nil {
		return err
	}
	if err := c.checkpoint(); err != nil {
		return err
	}
	after, err := hash(c.d.source)
	if err != nil {
		return err
	}
	if after == before {
		return errors.New("nothing was written back")
	}
	if err := o.compare(c.ctx, n, c.d.name); err != nil {
		return errors.Join(fmt.Errorf("the clone after the source had changed: %w", err), n.Trouble("was the clone"))
	}
	c.Check("the clone keeps its content while the source changes", true, "")
	if err := c.d.judge("beside a clone"); err != nil {
		return err
	}
	if out, err := c.p.Order(c.ctx, n, "discard", c.d.name); err != nil {
		return errors.Join(fmt.Errorf("discard: %w: %s", err, out), n.Trouble("was the clone"))
	}
	if _, err := c.p.Order(c.ctx, n, "discard", c.d.name); err != nil {
		return fmt.Errorf("a second discard: %w", err)
	}
	if err := n.Stop(30 * time.Second); err != nil {
		return err
	}
	kept := int64(0)
	filepath.WalkDir(filepath.Join(c.p.Backend.State, "clones"), func(_ string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			if i, err := e.Info(); err == nil {
				kept += i.Size()
			}
		}
		return nil
	})
	c.AtMost("bytes kept for the clone at the backend after discard", float64(kept), 0, "B")
	now, err := hash(c.d.source)
	if err == nil && now != after {
		err = errors.New("discard changed the source")
	}
	return errors.Join(err, os.RemoveAll(n.State))
}

func (c *cloneRun) checkpoint() error {
	n, _, err := c.p.Primary(c.ctx, c.d.name)
	if err != nil {
		return err
	}
	if _, err := c.p.Order(c.ctx, n, "checkpoint", c.d.name); err != nil {
		return err
	}
	if err := c.p.Settled(c.ctx); err != nil {
		return err
	}
	if err := c.d.judgeFile(c.d.source); err != nil {
		return fmt.Errorf("the source after a checkpoint of a resting volume: %w", err)
	}
	return nil
}

// overlaid is what a clone must hold: a base, with known bytes over a part of it.
type overlaid struct {
	base string
	size int64
	over map[int64]byte // piece → the byte it is filled with
}

const cloneBit = 12 << 10 // not a divisor of chunks, so that most are half written

// writeAllOver fills every other piece of the clone with a byte of its own.
func (c *cloneRun) writeAllOver(n *Node, o *overlaid) error {
	l, err := load.Dial(c.ctx, n.Socket, c.d.name)
	if err != nil {
		return err
	}
	defer l.Close()
	o.over = map[int64]byte{}
	p := make([]byte, cloneBit)
	for i := int64(0); (i+1)*cloneBit <= o.size; i += 1 + c.rng.Int64N(3) {
		b := byte(1 + c.rng.IntN(255))
		for j := range p {
			p[j] = b
		}
		if err := l.WriteAt(p, i*cloneBit, false); err != nil {
			return err
		}
		o.over[i] = b
	}
	return l.Flush()
}

// compare reads all of the clone.
func (o *overlaid) compare(ctx context.Context, n *Node, volume string) error {
	l, err := load.Dial(ctx, n.Socket, volume)
	if err != nil {
		return err
	}
	defer l.Close()
	f, err := os.Open(o.base)
	if err != nil {
		return err
	}
	defer f.Close()
	got, want := make([]byte, cloneBit), make([]byte, cloneBit)
	for i := int64(0); i*cloneBit < o.size; i++ {
		m := min(cloneBit, o.size-i*cloneBit)
		if _, err := l.ReadAt(got[:m], i*cloneBit); err != nil {
			return err
		}
		if b, ok := o.over[i]; ok {
			for j := range want {
				want[j] = b
			}
		} else if _, err := f.ReadAt(want[:m], i*cloneBit); err != nil {
			return err
		}
		for j := int64(0); j < m; j += oracle.Sector {
			if string(got[j:j+oracle.Sector]) != string(want[j:j+oracle.Sector]) {
				_, own := o.over[i]
				return fmt.Errorf("byte %d is not what it was (the clone's own: %v)", i*cloneBit+j, own)
			}
		}
	}
	return nil
}
