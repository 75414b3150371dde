package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"time"

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
	var be pair.BackendOptions
	backend := campaign(log, "pair-backend", "Kill the backend while it applies a checkpoint, and read the sources", 50,
		func(ctx context.Context, o pair.Options, r *bench.Report) error {
			be.Options = o
			return pair.Backend(ctx, be, r)
		})
	backend.Flags().DurationVar(&be.Interval, "interval", 0, "between checkpoints, 0 for 1s")
	var lo pair.LostOptions
	lost := campaign(log, "pair-lost", "Destroy both frontends' machines, and use the source", 3,
		func(ctx context.Context, o pair.Options, r *bench.Report) error {
			lo.Options = o
			return pair.Lost(ctx, lo, r)
		})
	lost.Flags().DurationVar(&lo.Interval, "interval", 0, "between checkpoints, 0 for 3s")
	var bo pair.LostOptions
	boot := campaign(log, "pair-boot", "Destroy both frontends' machines under a guest, and boot it from the source", 1,
		func(ctx context.Context, o pair.Options, r *bench.Report) error {
			bo.Options = o
			return pair.Boot(ctx, bo, r)
		})
	boot.Flags().DurationVar(&bo.Interval, "interval", 0, "between checkpoints, 0 for 3s")
	var ab pair.AbortOptions
	abort := campaign(log, "pair-abort", "Call moves off: drained, and by force while the line is cut", 2,
		func(ctx context.Context, o pair.Options, r *bench.Report) error {
			ab.Options = o
			return pair.Abort(ctx, ab, r)
		})
	abort.Flags().DurationVar(&ab.Write, "write", 0, "how long is written before, 0 for 15s")
	abort.Flags().Int64Var(&ab.Rate, "rate", 0, "of the line in bytes a second, 0 for 4000000")
	var wr pair.WriteOptions
	write := campaign(log, "bench-pair", "Replicated 4 KiB writes against the floor: one round trip and one local append", 3,
		func(ctx context.Context, o pair.Options, r *bench.Report) (err error) {
			wr.Options = o
			if wr.Lab, err = os.Executable(); err != nil {
				return err
			}
			return pair.Write(ctx, wr, r)
		})
	write.Flags().DurationVar(&wr.Apart, "apart", 0, "round trip between the frontends, 0 for 1ms")
	write.Flags().DurationVar(&wr.Each, "each", 0, "length of each job, 0 for 4s")
	var li pair.LinkOptions
	link := campaign(log, "bench-writeback", "Write-back over a slow line, beside QEMU's mirror", 2,
		func(ctx context.Context, o pair.Options, r *bench.Report) error {
			li.Options = o
			return pair.Link(ctx, li, r)
		})
	link.Flags().DurationVar(&li.Each, "each", 0, "length of each job, 0 for 20s")
	link.Flags().StringVar(&li.Only, "only", "", "one server only")
	plain := func(name, short string, n int, f func(context.Context, pair.Options, pair.Report) error) *cobra.Command {
		return campaign(log, name, short, n, func(ctx context.Context, o pair.Options, r *bench.Report) error { return f(ctx, o, r) })
	}
	return []*cobra.Command{pgbench, backend, lost, boot, abort, write, link,
		plain("pair-failover", "Kill, freeze and cut off one frontend at a time under a verifying load behind the proxy", 20, pair.Failover),
		plain("pair-both", "Kill both frontends at once under a verifying load with flushes", 20, pair.Both),
		plain("pair-clone", "Write all over an isolated clone beside the real volume, and discard it", 2, pair.Clone),
		plain("pair-return", "Move a disk from A to B and back to A", 1,
			func(ctx context.Context, o pair.Options, r pair.Report) error {
				return pair.Back(ctx, pair.BackOptions{Options: o}, r)
			}),
		{
			Use:    "floor-peer HOST:PORT",
			Short:  "The far end of bench-pair's floor",
			Hidden: true,
			Args:   cobra.ExactArgs(1),
			RunE:   func(cmd *cobra.Command, args []string) error { return pair.FloorPeer(cmd.Context(), args[0]) },
		},
		{
			Use:    "floor-raw HOST:PORT FILE DEPTH DURATION",
			Short:  "The floor of bench-pair without a disk around it; prints the median and p99 in microseconds",
			Hidden: true,
			Args:   cobra.ExactArgs(4),
			RunE: func(_ *cobra.Command, args []string) error {
				depth, err1 := strconv.Atoi(args[2])
				length, err2 := time.ParseDuration(args[3])
				if err := errors.Join(err1, err2); err != nil {
					return err
				}
				p50, p99, err := pair.FloorRaw(args[0], args[1], depth, length)
				if err == nil {
					fmt.Println(p50.Microseconds(), p99.Microseconds())
				}
				return err
			},
		},
		{
			Use:    "floor SOCKET HOST:PORT FILE BYTES",
			Short:  "The near end of bench-pair's floor",
			Hidden: true,
			Args:   cobra.ExactArgs(4),
			RunE: func(cmd *cobra.Command, args []string) error {
				size, err := strconv.ParseInt(args[3], 10, 64)
				if err != nil {
					return err
				}
				return pair.Floor(cmd.Context(), args[0], args[1], args[2], size)
			},
		},
	}
}
