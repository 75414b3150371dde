package cli

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"forerun/api"
	"forerun/api/client"
	"forerun/block"

	"github.com/spf13/cobra"
)

func cutoverCommand() *cobra.Command {
	var (
		t         target
		to        string
		threshold string
		wait      bool
		force     bool
		asJSON    bool
		cancel    bool
	)
	cmd := &cobra.Command{
		Use:   "cutover --state DIR --volume NAME --to PATH [--threshold BYTES]",
		Short: "Replicate a volume to a native disk and switch to it",
		Long: "Replicate a volume to a raw file or block device while the workload runs, in rounds, until what\n" +
			"is left is below the threshold; then hold I/O, copy the rest, make the native disk primary and go\n" +
			"on. Progress is shown, then the pause it took. Interrupting this command does not stop the cut-over;\n" +
			"--cancel does, as long as it has not switched.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c := t.client()
			if cancel {
				v, err := c.CancelCutover(cmd.Context(), t.volume)
				if err == nil {
					fmt.Fprintf(cmd.OutOrStdout(), "%s: cut-over %s; the source is primary\n", v.Volume, v.Cutover.State)
				}
				return err
			}
			if to == "" {
				return fmt.Errorf("--to says which raw file or block device becomes the disk; it is required")
			}
			abs, err := filepath.Abs(to)
			if err != nil {
				return err
			}
			req := api.CutoverRequest{To: abs, Wait: wait, Force: force}
			if req.ThresholdBytes, err = parseBytes(threshold); err != nil {
				return err
			}
			if _, err := c.Cutover(cmd.Context(), t.volume, req); err != nil {
				return err
			}
			v, err := followCutover(cmd.Context(), c, t.volume, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			if asJSON {
				return writeJSON(cmd.OutOrStdout(), v)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s: %s is primary now, after %d rounds; the pause was %s\n",
				v.Volume, v.Cutover.Target, v.Cutover.Rounds, microsText(v.Cutover.PauseUs))
			return nil
		},
	}
	t.addFlags(cmd, true)
	cmd.Flags().StringVar(&to, "to", "", "raw file (made if needed) or block device that becomes the disk")
	cmd.Flags().StringVar(&threshold, "threshold", "0", "switch when fewer bytes than this are left; 0 for the default")
	cmd.Flags().BoolVar(&wait, "wait", false, "wait for the fill to complete rather than refuse")
	cmd.Flags().BoolVar(&force, "force", false, "overwrite a target that holds data")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the volume's status as JSON at the end")
	cmd.Flags().BoolVar(&cancel, "cancel", false, "give up a cut-over that has not switched yet")
	return cmd
}

// followCutover prints progress until the cut-over has switched or ended.
func followCutover(ctx context.Context, c *client.Client, volume string, w io.Writer) (api.Volume, error) {
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	last := ""
	for {
		v, err := c.Volume(ctx, volume)
		if err != nil {
			return v, err
		}
		if l := cutoverLine(v.Cutover); l != last {
			fmt.Fprintf(w, "%s: %s; %s\n", v.Volume, l, demandLine(v))
			last = l
		}
		switch v.Cutover.State {
		case "switched":
			return v, nil
		case "not-converging", "failed", "canceled", "stopped", "idle":
			state, text := v.Cutover.State, v.Cutover.Error
			if state == "idle" { // it was under way, so somebody called it off
				state = "canceled"
			}
			if text == "" {
				text = "the source is primary"
			}
			return v, &block.Error{Op: "cutover", Object: volume, Kind: block.KindBusy,
				Err: fmt.Errorf("%s: %s", state, text)}
		}
		select {
		case <-ctx.Done():
			return v, fmt.Errorf("the cut-over goes on without this command; see forerun status, or stop it with --cancel")
		case <-tick.C:
		}
	}
}

func cutoverLine(c api.Cutover) string {
	s := fmt.Sprintf("%s to %s, round %d, changeset %s, copied %s", c.State, c.Target, c.Rounds,
		bytesText(float64(c.ChangesetBytes)), bytesText(float64(c.CopiedBytes)))
	if c.RateBytes > 0 {
		s += fmt.Sprintf(", %s/s, eta %s", bytesText(c.RateBytes), etaText(c.ETAS))
	}
	if c.PauseUs > 0 {
		s += ", pause " + microsText(c.PauseUs)
	}
	if c.Error != "" {
		s += ", " + c.Error
	}
	return s
}

func demandLine(v api.Volume) string {
	s := fmt.Sprintf("link %s/s, demand p99 %s, %d waiting", bytesText(v.WAN.RateBytes), microsText(v.Demand.P99Us), v.Demand.Waiting)
	if v.Waiting != "" {
		s += ", waiting: " + v.Waiting
	}
	return s
}
