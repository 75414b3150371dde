package bench

import (
	"context"
	"errors"

	"forerun/lab/crash"
)

// CrashOptions are what Crash needs beside Options.
type CrashOptions struct {
	Options
	crash.Config
	// Line puts the line between the daemons.
	Line bool
}

// Crash runs a campaign of package crash and reports it.
func Crash(ctx context.Context, o CrashOptions, r *Report) (err error) {
	s, err := newStage(ctx, o.Options, r)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			s.Keep = true // the evidence
		}
		err = errors.Join(err, s.close())
	}()
	if err := s.buildForerun(); err != nil {
		return err
	}
	c := o.Config
	c.Bin, c.Dir, c.Seed, c.Say = s.bin, s.path("crash"), s.Options.Seed, s.Say
	if o.Line {
		if err := s.openLine(); err != nil {
			return err
		}
		c.AtSource, c.AtTarget, c.Host = s.line.Source.Command, s.line.Target.Command, s.line.Source.Addr
	}
	res, err := crash.Run(ctx, c)
	s.AtLeast("kills survived", float64(res.Rounds), float64(c.N), "")
	s.Measure("writes acknowledged", float64(res.History.Acked), "")
	s.Measure("flushes", float64(res.History.Flushes), "")
	s.Measure("sectors judged", float64(res.History.Checked), "")
	s.AtMost("sectors that lost an acknowledged, not flushed write", float64(res.History.Rewound), 0, "")
	s.AtMost("fill older than 1 s that was lost", float64(res.FillLost), 0, "B")
	s.Measure("longest restart of a frontend", res.LongestRestart.Seconds(), "s")
	s.Measure("longest request of a living workload", res.LongestStall.Seconds(), "s")
	if c.Target == crash.Cutover {
		s.Measure("kills after which the native disk was primary", float64(res.Switched), "")
		s.Measure("kills that came too late", float64(res.LateKills), "")
	}
	return err
}
