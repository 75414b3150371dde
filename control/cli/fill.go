package cli

import (
	"fmt"
	"strconv"
	"strings"

	"forerun/api"

	"github.com/spf13/cobra"
)

func fillCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "fill pause|resume|limit --state DIR --volume NAME [--rate BYTES/s]",
		Short: "Pause, resume or limit a volume's background transfer",
		Args:  cobra.NoArgs, // and so an action that is not there is an error
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	for _, a := range []struct{ action, short string }{
		{"pause", "Stop the background transfer; the workload goes on reading on demand"},
		{"resume", "Go on where it stopped; nothing is fetched twice"},
		{"limit", "Limit the background transfer on the link; demand is never limited"},
	} {
		var (
			t    target
			rate string
		)
		sub := &cobra.Command{Use: a.action, Short: a.short, Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				req := api.FillRequest{Action: a.action}
				if a.action == "limit" {
					n, err := parseBytes(rate)
					if err != nil {
						return err
					}
					req.RateBytes = n
				}
				v, err := t.client().Fill(cmd.Context(), t.volume, req)
				if err != nil {
					return err
				}
				limit := "no limit"
				if v.Fill.LimitBytes > 0 {
					limit = "limit " + bytesText(float64(v.Fill.LimitBytes)) + "/s"
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s: fill %s, %s, %s left\n", v.Volume, v.Fill.State, limit, bytesText(float64(v.Fill.RemainingBytes)))
				return nil
			}}
		t.addFlags(sub, true)
		if a.action == "limit" {
			sub.Flags().StringVar(&rate, "rate", "", "bytes a second, with K, M or G for powers of 1024; 0 for no limit")
			_ = sub.MarkFlagRequired("rate")
		}
		cmd.AddCommand(sub)
	}
	return cmd
}

// parseBytes reads a number of bytes, perhaps with a binary suffix and "/s".
func parseBytes(s string) (int64, error) {
	n := strings.TrimSuffix(strings.TrimSuffix(strings.TrimSpace(s), "/s"), "iB")
	shift := 0
	if n != "" {
		if i := strings.IndexByte("KMGT", n[len(n)-1]&^0x20); i >= 0 {
			shift, n = 10*(i+1), n[:len(n)-1]
		}
	}
	v, err := strconv.ParseInt(n, 10, 64)
	if err != nil || v < 0 || v > 1<<62>>shift {
		return 0, fmt.Errorf("%q is not a number of bytes; examples: 1048576, 512K, 10M, 1G", s)
	}
	return v << shift, nil
}
