package main

import (
	"context"
	"log/slog"

	"github.com/spf13/cobra"

	"forerun/lab/bench"
	"forerun/lab/pair"
)

// campaign is one command about two frontends.
func campaign(log *slog.Logger, name, short string, n int, f func(context.Context, pair.Options, *bench.Report) error) *cobra.Command {
	var s scenario
	var o pair.Options
	c := &cobra.Command{
		Use:   name,
		Short: short,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.run(cmd, name, func(ctx context.Context, b bench.Options, r *bench.Report) error {
				o.Dir, o.Keep, o.Seed = b.Dir, b.Keep, b.Seed
				return f(ctx, o, r)
			})
		},
	}
	s.flags(c, log)
	c.Flags().IntVar(&o.N, "n", n, "how often it is done")
	c.Flags().StringArrayVar(&o.Args, "frontend-arg", nil, "argument for both frontends; may be given again")
	return c
}

func pairCmds(log *slog.Logger) []*cobra.Command {
	var pg pair.PgbenchOptions
	pgbench := campaign(log, "pair-pgbench", "Kill the primary frontend under PostgreSQL, and look for each commit", 20,
		func(ctx context.Context, o pair.Options, r *bench.Report) error {
			pg.Options = o
			return pair.Pgbench(ctx, pg, r)
		})
	pgbench.Flags().IntVar(&pg.Clients, "clients", 0, "clients of the database, 0 for 4")
	pgbench.Flags().BoolVar(&pg.Plain, "plain", false, "qemu-nbd in the pair's place for n seconds, to try the chain above it")
	return []*cobra.Command{pgbench}
}
