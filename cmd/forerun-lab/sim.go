package main

import (
	"runtime"

	"github.com/spf13/cobra"

	"forerun/lab/sim"
)

func simCmd() *cobra.Command {
	o := sim.Options{}
	c := &cobra.Command{
		Use:   "sim",
		Short: "Run seeded simulations of two frontends, their arbiter and a backend",
		Long: `Run seeded simulations of two frontends, their arbiter and a backend in one process and in virtual time,
through partitions, crashes and slow disks, each judged by a history of every sector.

It needs the go command and is run inside the module. A seed that fails leaves its schedule and what happened in --dir;
FORERUN_SIM_FROM=SEED FORERUN_SIM_SEEDS=1 FORERUN_SIM_SHRINK=1 go test -run TestSim -cpu 1 -v ./lab/sim repeats it and leaves
out what it does not need.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Out = cmd.OutOrStdout()
			return sim.Campaign(cmd.Context(), o)
		},
	}
	f := c.Flags()
	f.IntVar(&o.Seeds, "seeds", 10000, "how many")
	f.IntVar(&o.From, "from", 0, "the first one")
	f.IntVar(&o.Jobs, "jobs", runtime.NumCPU(), "processes at once")
	f.IntVar(&o.Batch, "batch", 250, "seeds of one process")
	f.IntVar(&o.Failures, "failures", 5, "failed batches after which it ends")
	f.StringVar(&o.Dir, "dir", "bin/sim-failures", "where schedules and logs of failed seeds go")
	f.BoolVar(&o.Shrink, "shrink", false, "shrink the schedules that fail")
	f.StringVar(&o.Go, "go", "go", "the go command")
	return c
}
