// Command forerun-lab runs real guests over a real, slow line on one machine:
// the demonstration of a whole migration, the benchmarks and the crash tests.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	root := &cobra.Command{
		Use:           "forerun-lab",
		Short:         "Guests, lines, loads and crashes to test Forerun with",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(setupCmd(), guestCmd(log), wanCmd(), demoCmd(log), bootCmd(log), localCmd(log), linkCmd(log), crashCmd(log), simCmd())
	root.AddCommand(pairCmds(log)...)
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "forerun-lab:", err)
		stop()
		os.Exit(1)
	}
}
