package cli

import (
	"errors"
	"fmt"
	"io"

	"forerun/api"

	"github.com/spf13/cobra"
)

func limitCommand() *cobra.Command {
	var (
		t     target
		clear bool
	)
	cmd := &cobra.Command{
		Use:   "limit --state DIR [RULE…]",
		Short: "Show or replace the limits of a frontend's background and write-back",
		Long: "Show the limits that all volumes of a frontend share, or replace them until it is restarted; demand is\n" +
			"never limited. A RULE is [CLASS][@HH:MM-HH:MM]=RATE, or RATE alone. CLASS is background or writeback; without\n" +
			"one both together are meant. Times are those of the frontend's clock. RATE is 20mbit, 500kbit, 10M (bytes) or none.",
		Example: "  forerun limit --state DIR 08:00-18:00=20mbit writeback=5mbit",
		RunE: func(cmd *cobra.Command, rules []string) error {
			if clear && len(rules) > 0 {
				return errors.New("--clear and rules contradict one another")
			}
			if clear || len(rules) > 0 {
				l, err := t.client().Limits(cmd.Context(), api.LimitsRequest{Rules: append([]string{}, rules...)})
				if err != nil {
					return err
				}
				printLimits(cmd.OutOrStdout(), l.Now)
				return nil
			}
			n, err := t.client().Node(cmd.Context())
			if err != nil {
				return err
			}
			if n.Limits == nil {
				return errors.New("this daemon has no limits; ask a frontend")
			}
			printLimits(cmd.OutOrStdout(), n.Limits.Now)
			return nil
		},
	}
	cmd.Flags().StringVar(&t.state, "state", "", "state directory of the frontend")
	cmd.Flags().BoolVar(&clear, "clear", false, "remove all limits")
	_ = cmd.MarkFlagRequired("state")
	return cmd
}

func printLimits(w io.Writer, in []api.LimitInUse) {
	for _, l := range in {
		text := "no limit"
		if l.RateBytes > 0 {
			text = bytesText(float64(l.RateBytes)) + "/s"
		}
		if l.Rule != "" {
			text += " by " + l.Rule
		}
		if l.Until != "" {
			text += ", until " + l.Until
		}
		fmt.Fprintf(w, "%-11s %s\n", l.Class, text)
	}
}
