package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"forerun/lab/bench"
)

func linkCmd(log *slog.Logger) *cobra.Command {
	var s scenario
	var o bench.LinkOptions
	var ahead bool
	c := &cobra.Command{
		Use:   "bench-link",
		Short: "How full the fill keeps the link, what demand waits meanwhile, what crosses it and what that costs",
		Long: "Measure the link beside its peers, which run over the same line in the same run, by turns.\n" +
			"Each result is a line of JSON on standard output; the same in words goes to standard error.\n\n" +
			"  a   idle link fill, against iperf3 with as many connections, nbdcopy and qemu block-stream\n" +
			"  a2  a guest boots while its disk fills\n" +
			"  b   demand reads while the fill has the link, beside nbdkit and qemu block-stream\n" +
			"  c   the test of starvation in virtual time\n" +
			"  d   bytes on the line: a system disk, a similar one, a clone, zeros, a shifted file\n" +
			"  e   demand reads of what the site holds already\n" +
			"  f   processor time and memory, against zstd, openssl and a pipe\n\n" +
			"With any of --rate, --rtt, --queue and --loss, parts a and b run at that one point.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if ahead {
				if err := realtime(); err != nil {
					return err
				}
			}
			for _, f := range []string{"rate", "rtt", "queue", "loss"} {
				o.One = o.One || cmd.Flags().Changed(f)
			}
			s.out, s.lines = os.Stderr, os.Stdout
			return s.run(cmd, "bench-link", func(ctx context.Context, opt bench.Options, r *bench.Report) error {
				o.Options = opt
				return bench.Link(ctx, o, r)
			})
		},
	}
	s.flags(c, log)
	f := c.Flags()
	f.StringVar(&s.opt.Guest, "guest", "small", "guest image: small or large")
	f.StringSliceVar(&o.Parts, "part", nil, "parts to run, of "+strings.Join(bench.LinkParts, ", ")+"; default all")
	f.IntVar(&o.N, "n", 0, "how often each measurement is repeated; 0 is 5, or 1 with --quick")
	f.BoolVar(&o.Quick, "quick", false, "a handful of points, and no guest unless part a2 is named")
	f.BoolVar(&o.Alone, "alone", false, "only the peers that a bar is about")
	f.StringVar(&s.rate, "rate", "100mbit", "rate of the one line")
	f.DurationVar(&s.opt.RTT, "rtt", 40*time.Millisecond, "its round trip")
	f.DurationVar(&o.Queue, "queue", 0, "its queue, as time at its rate; 0 is 100 ms")
	f.Float64Var(&o.Loss, "loss", 0, "share of packets it loses, 0 to below 1")
	f.StringVar(&o.Congestion, "congestion", "", "TCP congestion control of both sites; default is the host's")
	f.StringArrayVar(&o.FrontendArgs, "frontend-arg", nil, "argument for each frontend; may be given again")
	f.StringArrayVar(&o.BackendArgs, "backend-arg", nil, "argument for each backend; may be given again")
	f.BoolVar(&ahead, "realtime", false, "the line and all contenders alike before all other work on the machine; for rates that leave a processor free")
	return c
}

// realtime starts this program anew in the real-time class of sched(7), and so
// all that it starts, unless it is in it already. A class is a thread's: only
// that of the thread that calls exec survives it.
func realtime() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	now, err := unix.SchedGetAttr(0, 0)
	if err != nil {
		return fmt.Errorf("ask for the scheduling class: %w", err)
	}
	if now.Policy == unix.SCHED_RR {
		return nil
	}
	if err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_RR, Priority: 1}, 0); err != nil {
		return fmt.Errorf("enter the real-time class (are you root?): %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return unix.Exec(self, os.Args, os.Environ())
}
