package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"forerun/lab/netns"
)

func wanCmd() *cobra.Command {
	c := &cobra.Command{Use: "wan", Short: "A slow line between two network namespaces"}
	var (
		cfg     netns.Config
		rate    string
		rtt     time.Duration
		control string
		source  string
	)
	run := &cobra.Command{
		Use:   "run [flags] -- COMMAND [ARG…]",
		Short: "Run a command in the target's namespace, and another one in the source's",
		Long: "Make a line, run --source in a shell at the source (10.71.0.1) in the background and COMMAND at the\n" +
			"target (10.71.0.2), and remove all when COMMAND has ended. COMMAND sees FORERUN_SOURCE_NS and\n" +
			"FORERUN_TARGET_NS, the names of the namespaces.",
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if cfg.Rate, err = netns.ParseRate(rate); err != nil {
				return err
			}
			cfg.Delay = rtt / 2
			l, err := netns.Open(cfg)
			if err != nil {
				return err
			}
			defer func() {
				s := l.Stats()
				fmt.Fprintf(os.Stderr, "to target %+v\nto source %+v\n", s.ToTarget, s.ToSource)
				if e := l.Close(); err == nil {
					err = e
				}
			}()
			if control != "" {
				ctl, err := l.Control(control)
				if err != nil {
					return err
				}
				defer ctl.Close()
			}
			env := append(os.Environ(), "FORERUN_SOURCE_NS="+l.Source.Name, "FORERUN_TARGET_NS="+l.Target.Name)
			if source != "" {
				s := l.Source.Command(cmd.Context(), "/bin/sh", "-c", "exec "+source)
				s.Env, s.Stdout, s.Stderr = env, os.Stderr, os.Stderr
				if err := s.Start(); err != nil {
					return err
				}
				defer s.Wait()
				defer s.Process.Kill()
				time.Sleep(300 * time.Millisecond) // for it to listen
			}
			t := l.Target.Command(cmd.Context(), args[0], args[1:]...)
			t.Env, t.Stdin, t.Stdout, t.Stderr = env, os.Stdin, os.Stdout, os.Stderr
			return t.Run()
		},
	}
	f := run.Flags()
	f.StringVar(&rate, "rate", "100mbit", "rate of the line, 0 for none")
	f.DurationVar(&rtt, "rtt", 40*time.Millisecond, "round trip")
	f.DurationVar(&cfg.Queue, "queue", 100*time.Millisecond, "length of the bottleneck's queue")
	f.Float64Var(&cfg.Loss, "loss", 0, "share of packets lost, 0 to 1")
	f.IntVar(&cfg.MTU, "mtu", 1500, "MTU")
	f.BoolVar(&cfg.Offload, "offload", false, "packets of up to 64 KiB, for less CPU")
	f.StringVar(&cfg.Congestion, "congestion", "", "TCP congestion control of both sides")
	f.StringVar(&control, "control", "", "path of a unix socket that takes orders, see wan order")
	f.StringVar(&source, "source", "", "shell command to run at the source meanwhile")
	order := &cobra.Command{
		Use:   "order SOCKET ORDER…",
		Short: "Change a running line: stall 60s, rate 10mbit, delay 100ms, loss 0.01, queue 50ms, partition on|off, stats",
		Args:  cobra.MinimumNArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			answer, err := netns.Order(args[0], strings.Join(args[1:], " "))
			if err == nil {
				fmt.Println(answer)
			}
			return err
		},
	}
	clean := &cobra.Command{
		Use:   "clean",
		Short: "Remove namespaces of runs that were killed",
		Args:  cobra.NoArgs,
		RunE:  func(*cobra.Command, []string) error { return netns.Clean() },
	}
	c.AddCommand(run, order, clean)
	return c
}
