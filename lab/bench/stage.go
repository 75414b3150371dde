package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"forerun/lab/guest"
	"forerun/lab/netns"
	"forerun/lab/rig"
)

// Options are common to the scenarios.
type Options struct {
	// Dir takes everything a run writes; empty is a new temporary directory.
	Dir string
	// Keep leaves Dir in place.
	Keep bool
	// Guest is the image, "small" or "large".
	Guest string
	// Rate is the line's in bytes a second, 0 for no limit; RTT its round trip.
	Rate int64
	RTT  time.Duration
	// Offload lets the line move packets of up to 64 KiB; see netns.Config.
	Offload bool
	Seed    uint64
	Log     *slog.Logger
}

// stage is what the scenarios stand on. Close ends it.
type stage struct {
	Options
	*Report
	ctx   context.Context
	temp  bool
	line  *netns.Line
	image guest.Image
	bin   string
	ends  []func() error
}

func newStage(ctx context.Context, o Options, r *Report) (*stage, error) {
	s := &stage{Options: o, Report: r, ctx: ctx}
	if s.Dir == "" {
		sweep()
		d, err := os.MkdirTemp("", fmt.Sprintf("forerun-lab-%d-", os.Getpid()))
		if err != nil {
			return nil, err
		}
		s.Dir, s.temp = d, true
	} else if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		return nil, err
	}
	if d, err := filepath.Abs(s.Dir); err == nil {
		s.Dir = d
	}
	// Whoever reads the numbers should know what else ran.
	var load float64
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		fmt.Sscan(string(b), &load)
	}
	s.Measure("load average of the machine before", load, "")
	return s, nil
}

// atEnd registers what Close does, last first.
func (s *stage) atEnd(f func() error) { s.ends = append(s.ends, f) }

func (s *stage) close() error {
	var errs []error
	for i := len(s.ends) - 1; i >= 0; i-- {
		errs = append(errs, s.ends[i]())
	}
	if s.temp && !s.Keep {
		errs = append(errs, os.RemoveAll(s.Dir))
	} else {
		errs = append(errs, os.WriteFile(s.path(keptMark), nil, 0o644))
		s.Say("kept %s", s.Dir)
	}
	return errors.Join(errs...)
}

// keptMark is the file in a temporary directory that is to stay.
const keptMark = "kept"

// sweep removes the temporary directories of runs that were killed: those
// that nobody wanted to keep and whose process is gone.
func sweep() {
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), "forerun-lab-*-*"))
	for _, d := range dirs {
		var pid int
		if _, err := fmt.Sscanf(filepath.Base(d), "forerun-lab-%d-", &pid); err != nil || syscall.Kill(pid, 0) != syscall.ESRCH {
			continue
		}
		if _, err := os.Stat(filepath.Join(d, keptMark)); errors.Is(err, os.ErrNotExist) {
			os.RemoveAll(d)
		}
	}
}

func (s *stage) path(name string) string { return filepath.Join(s.Dir, name) }

func (s *stage) buildGuest() error {
	r, err := guest.ByName(s.Guest)
	if err != nil {
		return err
	}
	cache, err := guest.CacheDir()
	if err != nil {
		return err
	}
	if _, ok := guest.Cached(cache, r); !ok {
		s.Say("building the guest image %s; this takes minutes, once", r.Key())
	}
	if s.image, err = guest.Build(s.ctx, cache, r, s.Log); err != nil {
		return err
	}
	s.Measure("guest image, allocated", float64(s.image.Allocated)/1e6, "MB")
	s.Measure("guest image, build time when it was built", s.image.Seconds, "s")
	return nil
}

func (s *stage) openLine() (err error) {
	s.line, err = netns.Open(netns.Config{Link: netns.Link{Delay: s.RTT / 2, Rate: s.Rate}, Offload: s.Offload, Seed: s.Seed})
	if err != nil {
		return fmt.Errorf("line: %w", err)
	}
	s.atEnd(s.line.Close)
	s.Say("line: %.0f Mbit/s, %v round trip, %s and %s", float64(s.Rate)/125e3, s.RTT, s.line.Source.Name, s.line.Target.Name)
	return nil
}

func (s *stage) buildForerun() (err error) {
	s.bin, err = rig.Binary(s.ctx, s.Dir)
	return err
}

// newRig prepares daemons across the line for the disk at source, with state in dir.
func (s *stage) newRig(dir, source string) (*rig.Rig, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	r := &rig.Rig{Bin: s.bin, Dir: dir, Volume: "vol", Source: source, Listen: "127.0.0.1:7400", BackendHosts: []string{"127.0.0.1"}}
	if s.line != nil {
		r.AtSource, r.AtTarget = s.line.Source.Command, s.line.Target.Command
		r.Listen, r.BackendHosts = s.line.Source.Addr+":7400", []string{s.line.Source.Addr}
	}
	s.atEnd(func() error { r.Kill(); return nil })
	return r, nil
}

// boot boots a guest and waits for it; the stage kills it if nobody else ends it.
func (s *stage) boot(name string, d guest.Drive, at guest.Command) (*guest.VM, error) {
	dir := s.path("vm-" + name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	v, err := guest.Start(s.ctx, guest.Config{Drive: d, Dir: dir, Command: at})
	if err != nil {
		return nil, err
	}
	s.atEnd(func() error { v.Kill(); return nil })
	if err := v.WaitReady(20 * time.Minute); err != nil {
		return nil, fmt.Errorf("boot from %s: %w", name, err)
	}
	return v, nil
}

// crossed is how many bytes went to the target since before.
func (s *stage) crossed(before netns.Stats) (toTarget, toSource int64) {
	now := s.line.Stats()
	return now.ToTarget.Bytes - before.ToTarget.Bytes, now.ToSource.Bytes - before.ToSource.Bytes
}
