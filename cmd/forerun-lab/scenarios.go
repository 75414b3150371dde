package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"

	"forerun/lab/bench"
	"forerun/lab/netns"
)

// scenario is what all of them have in common: options, a report, a verdict.
type scenario struct {
	opt    bench.Options
	rate   string
	result string
	out    io.Writer // of the report in words, nil is standard output
	lines  io.Writer // of each result as a line of JSON, if any
}

func (s *scenario) flags(c *cobra.Command, log *slog.Logger) {
	s.opt.Log = log
	f := c.Flags()
	f.StringVar(&s.opt.Dir, "dir", "", "directory to work in, kept; default is a temporary one")
	f.BoolVar(&s.opt.Keep, "keep", false, "keep the temporary directory")
	f.StringVar(&s.result, "result", "", "file to which the report is added as one line of JSON")
	f.Uint64Var(&s.opt.Seed, "seed", 1, "seed of everything random")
}

func (s *scenario) lineFlags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&s.opt.Guest, "guest", "small", "guest image: small or large")
	f.StringVar(&s.rate, "rate", "100mbit", "rate of the line")
	f.DurationVar(&s.opt.RTT, "rtt", 40*time.Millisecond, "round trip of the line")
	f.BoolVar(&s.opt.Offload, "offload", true, "packets of up to 64 KiB on the line, for less CPU")
}

// run runs one scenario; missing a bar is a failure.
func (s *scenario) run(cmd *cobra.Command, name string, f func(context.Context, bench.Options, *bench.Report) error) error {
	if s.rate != "" {
		var err error
		if s.opt.Rate, err = netns.ParseRate(s.rate); err != nil {
			return err
		}
	}
	if s.out == nil {
		s.out = os.Stdout
	}
	r := bench.NewReport(name, s.out)
	if s.lines != nil {
		r.Lines(s.lines)
	}
	err := f(cmd.Context(), s.opt, r)
	r.End(err)
	if s.result != "" {
		err = errors.Join(err, r.Append(s.result))
	}
	if err == nil && r.Failed() {
		err = fmt.Errorf("%s: not everything was as promised", name)
	}
	return err
}

func demoCmd(log *slog.Logger) *cobra.Command {
	var s scenario
	c := &cobra.Command{
		Use:   "demo",
		Short: "Move a running guest over a slow line, cut over, and boot it from its new disk",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.run(cmd, "demo", bench.Demo)
		},
	}
	s.flags(c, log)
	s.lineFlags(c)
	return c
}

func bootCmd(log *slog.Logger) *cobra.Command {
	var s scenario
	var only []string
	var rounds int
	c := &cobra.Command{
		Use:   "bench-boot",
		Short: "Time to a ready guest and to a whole disk: local, qemu-nbd and nbdcopy over the line, forerun",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.run(cmd, "bench-boot", func(ctx context.Context, o bench.Options, r *bench.Report) error {
				return bench.Boot(ctx, bench.BootOptions{Options: o, Only: only, Rounds: rounds}, r)
			})
		},
	}
	s.flags(c, log)
	s.lineFlags(c)
	c.Flags().IntVar(&rounds, "rounds", 1, "rounds of all parts; ratios are those of the medians")
	c.Flags().StringSliceVar(&only, "only", nil, "parts to run: local, qemu, nbdcopy, forerun")
	return c
}

func localCmd(log *slog.Logger) *cobra.Command {
	var s scenario
	var o bench.LocalOptions
	c := &cobra.Command{
		Use:   "bench-local",
		Short: "Local input and output against qemu-nbd and nbdkit, and writes to what is not here yet",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.run(cmd, "bench-local", func(ctx context.Context, opt bench.Options, r *bench.Report) error {
				o.Options = opt
				return bench.Local(ctx, o, r)
			})
		},
	}
	s.flags(c, log)
	f := c.Flags()
	f.IntVar(&o.Rounds, "rounds", 3, "rounds of all jobs on all servers")
	f.IntVar(&o.Seconds, "seconds", 4, "length of each job")
	f.Int64Var(&o.Memory, "memory", 32<<20, "the frontend's memory tier in bytes; the working set is four times that")
	f.StringSliceVar(&o.Only, "only", nil, "parts to run: io, write-latency")
	return c
}
