package pair

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"forerun/lab/netns"
	"forerun/lab/rig"
)

// Report takes what a campaign finds; a *bench.Report is one.
type Report interface {
	Say(format string, args ...any)
	Measure(name string, v float64, unit string)
	AtMost(name string, v, bar float64, unit string)
	AtLeast(name string, v, bar float64, unit string)
	Check(name string, ok bool, note string)
}

// Options are common to the campaigns.
type Options struct {
	// Dir takes everything a run writes; empty is a new temporary directory.
	Dir string
	// Keep leaves Dir in place. A failed run leaves it anyway.
	Keep bool
	Seed uint64
	// N is how often the campaign does what it is about.
	N int
	// Args are given to every frontend.
	Args []string
}

// run is what a campaign stands on. close ends it.
type run struct {
	Options
	Report
	ctx  context.Context
	rng  *rand.Rand
	bin  string
	temp bool
	ends []func() error
}

// keptMark is the file in a temporary directory that is to stay; package bench
// sweeps those without.
const keptMark = "kept"

func begin(ctx context.Context, o Options, r Report) (*run, error) {
	if err := Clean(); err != nil {
		return nil, fmt.Errorf("remove mounts of earlier runs: %w", err)
	}
	k := &run{Options: o, Report: r, ctx: ctx, rng: rand.New(rand.NewPCG(o.Seed, 0x70616972))}
	if k.Dir == "" {
		d, err := os.MkdirTemp("", fmt.Sprintf("forerun-lab-%d-", os.Getpid()))
		if err != nil {
			return nil, err
		}
		k.Dir, k.temp = d, true
	}
	d, err := filepath.Abs(k.Dir)
	if err != nil {
		return nil, err
	}
	k.Dir = d
	// The database runs as another user and must get through to its files.
	if err := errors.Join(os.MkdirAll(k.Dir, 0o755), os.Chmod(k.Dir, 0o755)); err != nil {
		return nil, err
	}
	var load float64
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		fmt.Sscan(string(b), &load)
	}
	k.Measure("load average of the machine before", load, "")
	if k.bin, err = rig.Binary(ctx, k.Dir); err != nil {
		return nil, err
	}
	return k, nil
}

func (k *run) path(name string) string { return filepath.Join(k.Dir, name) }

// atEnd registers what close does, last first.
func (k *run) atEnd(f func() error) { k.ends = append(k.ends, f) }

// end closes the run; it is deferred with the campaign's error.
func (k *run) end(err *error) {
	errs := []error{*err}
	for i := len(k.ends) - 1; i >= 0; i-- {
		errs = append(errs, k.ends[i]())
	}
	if k.temp && !k.Keep && *err == nil {
		errs = append(errs, os.RemoveAll(k.Dir))
	} else {
		errs = append(errs, os.WriteFile(k.path(keptMark), nil, 0o644))
		k.Say("kept %s", k.Dir)
	}
	*err = errors.Join(errs...)
}

// sleep waits, and returns false when the run is over.
func (k *run) sleep(d time.Duration) bool {
	select {
	case <-k.ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// between is a seeded duration in [least, most).
func (k *run) between(least, most time.Duration) time.Duration {
	return least + time.Duration(k.rng.Int64N(int64(most-least)))
}

// openLine makes the line between two sites, of that rate in bytes a second and
// that round trip; it is closed at the end.
func (k *run) openLine(rate int64, rtt time.Duration) (*netns.Line, error) {
	line, err := netns.Open(netns.Config{Link: netns.Link{Delay: rtt / 2, Rate: rate}, Offload: true, Seed: k.Seed})
	if err != nil {
		return nil, err
	}
	k.atEnd(line.Close)
	return line, nil
}
