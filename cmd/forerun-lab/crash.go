package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"log/slog"

	"forerun/lab/bench"
	"forerun/lab/crash"
)

func crashCmd(log *slog.Logger) *cobra.Command {
	var s scenario
	var cfg crash.Config
	var onLine bool
	c := &cobra.Command{
		Use:   "crash --target backend|frontend|cutover",
		Short: "Kill daemons under a verifying write load and judge what is left",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !onLine {
				s.opt.Rate, s.opt.RTT = 0, 0
			} else {
				s.opt.Rate, s.opt.RTT, s.opt.Offload = 12_500_000, 40*time.Millisecond, true
			}
			return s.run(cmd, "crash-"+cfg.Target, func(ctx context.Context, o bench.Options, r *bench.Report) error {
				return bench.Crash(ctx, bench.CrashOptions{Options: o, Config: cfg, Line: onLine}, r)
			})
		},
	}
	s.flags(c, log)
	f := c.Flags()
	f.StringVar(&cfg.Target, "target", crash.Frontend, "what is killed: backend, frontend, or the frontend in a cutover")
	f.IntVar(&cfg.N, "n", 50, "how many kills")
	f.Int64Var(&cfg.Size, "size", 0, "bytes of the disk, 0 for the default")
	f.Int64Var(&cfg.FillRate, "fill-rate", 0, "background in bytes a second, 0 for the default, -1 for no limit")
	f.BoolVar(&onLine, "line", false, "with 100 Mbit/s and 40 ms between the daemons")
	return c
}
