// Command forerun runs a workload ahead of its data: the backend beside the
// source disk, the frontend beside the workload, and the commands to watch and
// steer them.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"forerun/control/cli"
	"forerun/internal/version"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := rootCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "forerun:", err)
		stop()
		os.Exit(1)
	}
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "forerun",
		Short:         "Run a workload ahead of its data",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(pkiCommand(), backendCommand(), frontendCommand(), proxyCommand(), linkCommand(), versionCommand())
	root.AddCommand(cli.Commands()...)
	return root
}

func versionCommand() *cobra.Command {
	return &cobra.Command{Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "forerun", version.String())
			return err
		}}
}
