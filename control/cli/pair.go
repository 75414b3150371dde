package cli

import (
	"context"
	"fmt"
	"io"

	"forerun/api"
	"forerun/api/client"

	"github.com/spf13/cobra"
)

// order is a command that tells a daemon to do one thing to one volume, shows
// progress while it does, and says what came of it.
type order struct {
	use, short, long string
	flags            func(*cobra.Command)
	do               func(ctx context.Context, c *client.Client, volume string) (api.Volume, error)
	line             func(api.Volume) string // progress
	said             func(api.Volume) string // the end
}

func (o order) command() *cobra.Command {
	var (
		t      target
		asJSON bool
	)
	cmd := &cobra.Command{Use: o.use, Short: o.short, Long: o.long, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c := t.client()
			v, err := during(cmd.Context(), c, t.volume, cmd.ErrOrStderr(), o.line, func(ctx context.Context) (api.Volume, error) {
				return o.do(ctx, c, t.volume)
			})
			if err != nil {
				return err
			}
			if asJSON {
				return writeJSON(cmd.OutOrStdout(), v)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", v.Volume, o.said(v))
			printWarnings(cmd.ErrOrStderr(), v)
			return nil
		}}
	t.addFlags(cmd, true)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the volume's status as JSON at the end")
	if o.flags != nil {
		o.flags(cmd)
	}
	return cmd
}

func printWarnings(w io.Writer, v api.Volume) {
	for _, s := range v.Warnings {
		fmt.Fprintf(w, "%s: warning: %s\n", v.Volume, s)
	}
}

func checkpointCommand() *cobra.Command {
	return order{
		use:   "checkpoint --state DIR --volume NAME",
		short: "Write what has changed back to the source now",
		long: "Cut a checkpoint of the volume, and of the others in its group at the same moment, and wait until it is\n" +
			"stored at the source's site. From then on the source is at that moment even if the target site is lost.",
		do: func(ctx context.Context, c *client.Client, volume string) (api.Volume, error) {
			return c.Checkpoint(ctx, volume)
		},
		line: func(v api.Volume) string { return "write-back " + writebackText(v.Writeback) },
		said: func(v api.Volume) string {
			if v.Writeback == nil {
				return "the checkpoint is stored"
			}
			return fmt.Sprintf("checkpoint %d, cut at %s, is stored", v.Writeback.LastID, v.Writeback.LastCheckpoint)
		},
	}.command()
}

func discardCommand() *cobra.Command {
	var force bool
	return order{
		use:   "discard --state DIR --volume NAME [--force]",
		short: "Remove a test clone and everything it wrote",
		long: "Remove a volume that runs isolated: what it wrote, what was fetched for it, and what the backend kept\n" +
			"so that its content stands still. The source is not touched.",
		flags: func(cmd *cobra.Command) {
			cmd.Flags().BoolVar(&force, "force", false, "although a client is connected")
		},
		do: func(ctx context.Context, c *client.Client, volume string) (api.Volume, error) {
			return c.Discard(ctx, volume, api.DiscardRequest{Force: force})
		},
		line: func(v api.Volume) string { return v.Phase },
		said: func(api.Volume) string { return "discarded; the source was never written" },
	}.command()
}

func failoverCommand() *cobra.Command {
	var force bool
	return order{
		use:   "failover --state DIR --volume NAME [--force]",
		short: "Hand a volume over to the other frontend",
		long: "Make the other frontend of the pair primary for the volume, in order: nothing is lost, and clients see one\n" +
			"slow request. Either frontend takes the command. Failure needs no command, the pair sees to it by itself.\n\n" +
			"With --force, at the frontend that lives: it becomes primary although it may lack writes that the other\n" +
			"one acknowledged, when that one will not come back.",
		flags: func(cmd *cobra.Command) {
			cmd.Flags().BoolVar(&force, "force", false, "take over although acknowledged writes may be lost with the other frontend")
		},
		do: func(ctx context.Context, c *client.Client, volume string) (api.Volume, error) {
			return c.Failover(ctx, volume, api.FailoverRequest{Force: force})
		},
		line: func(v api.Volume) string { return replicaText(v.Replica) },
		said: func(v api.Volume) string { return replicaText(v.Replica) },
	}.command()
}

func policyCommand() *cobra.Command {
	var policy string
	return order{
		use:   "policy --state DIR --volume NAME --set write-back|isolated",
		short: "Say whether changes go back to the source",
		long: "With write-back, changes go back to the source, a checkpoint at a time; everything that was changed while\n" +
			"the volume was isolated goes with the first. With isolated the source stays as it is from now on.",
		flags: func(cmd *cobra.Command) {
			cmd.Flags().StringVar(&policy, "set", "", "write-back or isolated")
			_ = cmd.MarkFlagRequired("set")
		},
		do: func(ctx context.Context, c *client.Client, volume string) (api.Volume, error) {
			return c.Policy(ctx, volume, api.PolicyRequest{Policy: policy})
		},
		line: func(v api.Volume) string { return "write-back " + writebackText(v.Writeback) },
		said: func(v api.Volume) string {
			if v.Writeback == nil {
				return "the policy is " + policy
			}
			return "write-back " + writebackText(v.Writeback)
		},
	}.command()
}
