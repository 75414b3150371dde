package pair

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"forerun/lab/load"
)

// What Failover does to a frontend.
const (
	killPrimary     = "the primary is killed"
	killSecondary   = "the secondary is killed"
	freezePrimary   = "the primary stands still, and wakes"
	freezeSecondary = "the secondary stands still, and wakes"
	cutPeers        = "the frontends do not reach each other"
	cutPrimary      = "the primary reaches nobody"
	cutSecondary    = "the secondary reaches nobody"
	cutArbiter      = "nobody reaches the arbiter"
	cutOneWay       = "a line carries one way only"
)

var failures = []string{killPrimary, killPrimary, killSecondary, freezePrimary, freezeSecondary,
	cutPeers, cutPrimary, cutSecondary, cutArbiter, cutOneWay}

// Failover kills and freezes frontends and cuts them off, one at a time, under
// a verifying load behind the proxy. The load must see no error, and all that was
// acknowledged must be there at every moment, flushed or not: one node always
// lived. Two nodes that serve at once would be found out by the load's reads.
func Failover(ctx context.Context, o Options, r Report) (err error) {
	k, err := begin(ctx, o, r)
	if err != nil {
		return err
	}
	defer k.end(&err)
	d, err := k.newDisk("vol", 64<<20)
	if err != nil {
		return err
	}
	p, err := k.pair(Config{Volumes: []Volume{d.volume()}, Gated: true})
	if err != nil {
		return err
	}
	if err := p.Start(k.ctx); err != nil {
		return err
	}
	var longest, cut, resync time.Duration
	for i := range o.N {
		how := failures[k.rng.IntN(len(failures))]
		took, err := k.fail(p, d, how)
		if err != nil {
			return fmt.Errorf("round %d, %s: %w", i+1, how, errors.Join(err, p.Words()))
		}
		resync = max(resync, took)
		if slices.Index(failures, how) < slices.Index(failures, cutPeers) {
			longest = max(longest, d.stats.Longest)
		} else {
			cut = max(cut, d.stats.Longest)
		}
		k.Say("round %d of %d: %s; longest request %.2f s, in sync again after %.1f s", i+1, o.N, how, d.stats.Longest.Seconds(), took.Seconds())
		d.stats.Longest = 0
	}
	k.AtLeast("frontends that failed", float64(o.N), float64(o.N), "")
	k.AtMost("longest request, a node killed or standing still", longest.Seconds(), bestFailover, "s")
	// Whoever is cut off does not know for how long; a line that is back may be
	// what ends a wait.
	k.AtMost("longest request, lines cut for up to 4 s", cut.Seconds(), 4+bestFailover, "s")
	k.Measure("longest time until both were in sync again", resync.Seconds(), "s")
	d.report()
	d.leave()
	return p.Stop()
}

// fail lets one frontend fail under load, mends it, and judges everything.
func (k *run) fail(p *Pair, d *disk, how string) (resync time.Duration, err error) {
	first, second, err := p.Primary(k.ctx, d.name)
	if err != nil {
		return 0, err
	}
	// A client of the node that lives, without a proxy, sees no error either.
	at := p.Proxy
	if (how == killPrimary || how == freezePrimary) && k.rng.IntN(3) == 0 {
		at = second
	}
	if err := d.dial(at); err != nil {
		return 0, err
	}
	d.work(load.Config{Pause: 2 * time.Millisecond})
	k.sleep(k.between(200*time.Millisecond, 1500*time.Millisecond))
	n := first
	if how == killSecondary || how == freezeSecondary {
		n = second
	}
	away := k.between(0, 3*time.Second)
	switch how {
	case killPrimary, killSecondary:
		n.Proc.Kill()
		k.sleep(away)
		err = n.Start(k.ctx)
	case freezePrimary, freezeSecondary:
		n.Signal(syscall.SIGSTOP)
		k.sleep(away)
		n.Signal(syscall.SIGCONT)
	default:
		k.cut(p, how, first.Name, second.Name)
		k.sleep(away + time.Second)
		for _, g := range p.Ways {
			g.Open()
		}
	}
	if err != nil {
		return 0, errors.Join(err, d.rest())
	}
	if resync, err = p.WaitInSync(k.ctx, time.Minute); err != nil {
		return 0, errors.Join(err, d.rest())
	}
	k.sleep(300 * time.Millisecond)
	if err := d.rest(); err != nil {
		return 0, fmt.Errorf("at %s: %w", at.Name, err)
	}
	return resync, d.judge("after " + how)
}

// cut holds back what goes over some of the ways.
func (k *run) cut(p *Pair, how, first, second string) {
	whole := func(ways ...string) {
		for _, w := range ways {
			p.Ways[w].Hold(true, true)
		}
	}
	switch how {
	case cutPeers:
		whole("a-peer", "b-peer")
	case cutPrimary:
		whole("a-peer", "b-peer", first+"-backend")
	case cutSecondary:
		whole("a-peer", "b-peer", second+"-backend")
	case cutArbiter:
		whole("a-backend", "b-backend")
	case cutOneWay:
		// Frontend to frontend has two ways, each connected by one of them.
		to := k.rng.IntN(2) == 0
		switch k.rng.IntN(4) {
		case 0:
			p.Ways[first+"-peer"].Hold(to, !to)
			p.Ways[second+"-peer"].Hold(!to, to)
		case 1:
			p.Ways["a-peer"].Hold(to, !to)
		case 2:
			p.Ways["b-peer"].Hold(to, !to)
		case 3:
			p.Ways[first+"-backend"].Hold(to, !to)
		}
	}
}

// pair lays a pair out below the run's directory, and ends it with the run.
func (k *run) pair(c Config) (*Pair, error) {
	c.Bin, c.Args = k.bin, append(c.Args, k.Args...)
	if c.Dir == "" {
		c.Dir = k.path("pair")
	}
	p, err := New(k.ctx, c)
	if err != nil {
		return nil, err
	}
	k.atEnd(func() error {
		p.Kill()
		return nil
	})
	return p, nil
}

// Words are the last ones of all daemons, for an error.
func (p *Pair) Words() error {
	var errs []error
	for _, n := range []*Node{p.Backend, p.A, p.B, p.Proxy} {
		if n == nil || n.Proc == nil {
			continue
		}
		text, _ := os.ReadFile(n.Log)
		lines := strings.SplitAfter(strings.TrimSpace(string(text)), "\n")
		errs = append(errs, fmt.Errorf("the end of %s:\n%s", n.Log, strings.Join(lines[max(0, len(lines)-5):], "")))
	}
	return errors.Join(errs...)
}
