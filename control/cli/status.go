package cli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"forerun/api"

	"github.com/spf13/cobra"
)

func statusCommand() *cobra.Command {
	var (
		t        target
		asJSON   bool
		watch    bool
		interval time.Duration
	)
	cmd := &cobra.Command{
		Use:   "status --state DIR [--volume NAME] [--json] [--watch]",
		Short: "Show where each volume stands",
		Long: "Show where each volume of a running backend or frontend stands: what is here, what crosses\n" +
			"the link, what the workload waits for. With --json, one object for one volume, an array for several.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			once := func() error { return printStatus(cmd.Context(), cmd.OutOrStdout(), &t, asJSON, watch) }
			if !watch {
				return once()
			}
			tick := time.NewTicker(interval)
			defer tick.Stop()
			for {
				if err := once(); err != nil {
					return err
				}
				select {
				case <-cmd.Context().Done():
					return nil
				case <-tick.C:
				}
			}
		},
	}
	t.addFlags(cmd, false)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&watch, "watch", false, "go on, a line per volume and interval")
	cmd.Flags().DurationVar(&interval, "interval", time.Second, "with --watch: how often")
	return cmd
}

func printStatus(ctx context.Context, w io.Writer, t *target, asJSON, line bool) error {
	c := t.client()
	var vols []api.Volume
	if t.volume != "" {
		v, err := c.Volume(ctx, t.volume)
		if err != nil {
			return err
		}
		vols = []api.Volume{v}
	} else {
		var err error
		if vols, err = c.Volumes(ctx); err != nil {
			return err
		}
	}
	if asJSON {
		if len(vols) == 1 {
			return writeJSON(w, vols[0])
		}
		return writeJSON(w, vols)
	}
	for i, v := range vols {
		if line {
			fmt.Fprintln(w, statusLine(v))
			continue
		}
		if i > 0 {
			fmt.Fprintln(w)
		}
		printVolume(w, v)
	}
	return nil
}

// statusLine is a volume on one line, for --watch.
func statusLine(v api.Volume) string {
	total := (v.SizeBytes + v.ChunkBytes - 1) / max(v.ChunkBytes, 1)
	done := 100.0
	if total > 0 {
		done = 100 * float64(total-v.Chunks.Absent) / float64(total)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s  %s  %.1f%% here  fill %s %s/s eta %s  link %s/s", v.Volume, v.Phase, done,
		v.Fill.State, bytesText(v.Fill.RateBytes), etaText(v.Fill.ETAS), bytesText(v.WAN.RateBytes))
	if v.WAN.RTTUs > 0 {
		fmt.Fprintf(&b, " rtt %s", microsText(v.WAN.RTTUs))
	}
	fmt.Fprintf(&b, "  demand p50 %s p99 %s, %d waiting", microsText(v.Demand.P50Us), microsText(v.Demand.P99Us), v.Demand.Waiting)
	if v.Cutover.State != "" && v.Cutover.State != "idle" {
		fmt.Fprintf(&b, "  cut-over %s round %d changeset %s", v.Cutover.State, v.Cutover.Rounds, bytesText(float64(v.Cutover.ChangesetBytes)))
	}
	if v.Waiting != "" {
		fmt.Fprintf(&b, "  waiting: %s", v.Waiting)
	}
	return b.String()
}

func printVolume(w io.Writer, v api.Volume) {
	row := func(name, format string, args ...any) {
		fmt.Fprintf(w, "  %-10s "+format+"\n", append([]any{name}, args...)...)
	}
	fmt.Fprintf(w, "%s: %s, primary is the %s\n", v.Volume, v.Phase, v.Primary)
	row("size", "%s in chunks of %s", bytesText(float64(v.SizeBytes)), bytesText(float64(v.ChunkBytes)))
	if v.Source != "" {
		row("source", "%s", v.Source)
	}
	row("clients", "%d", v.Clients)
	if v.Role == api.RoleBackend {
		row("link", "%s received, %s sent", bytesText(float64(v.WAN.ReceivedBytes)), bytesText(float64(v.WAN.SentBytes)))
		return
	}
	row("chunks", "%d untouched, %d held, %d zero, %d modified; %d absent", v.Chunks.Untouched, v.Chunks.Held, v.Chunks.Zero, v.Chunks.Modified, v.Chunks.Absent)
	link := "up"
	if !v.WAN.Connected {
		link = "down"
		if v.WAN.LastError != "" {
			link += " (" + v.WAN.LastError + ")"
		}
	}
	row("link", "%s, rtt %s, %s/s; %s for demand, %s in the background, %s sent, %d reconnects", link, microsText(v.WAN.RTTUs),
		bytesText(v.WAN.RateBytes), bytesText(float64(v.WAN.DemandBytes)), bytesText(float64(v.WAN.BackgroundBytes)),
		bytesText(float64(v.WAN.SentBytes)), v.WAN.Reconnects)
	row("demand", "%d reads over the link, p50 %s, p99 %s, %d waiting now", v.Demand.Reads, microsText(v.Demand.P50Us), microsText(v.Demand.P99Us), v.Demand.Waiting)
	fill := v.Fill.State
	if v.Fill.Reason != "" {
		fill += " (" + v.Fill.Reason + ")"
	}
	row("fill", "%s, %s left, %s/s, eta %s", fill, bytesText(float64(v.Fill.RemainingBytes)), bytesText(v.Fill.RateBytes), etaText(v.Fill.ETAS))
	row("store", "%s on disk", bytesText(float64(v.StoreBytes)))
	row("cache", "%d memory hits, %d scratch hits, %d misses", v.Cache.MemoryHits, v.Cache.ScratchHits, v.Cache.Misses)
	row("journal", "%d writes, %s retained", v.Journal.Records, bytesText(float64(v.Journal.RetainedBytes)))
	if v.Cutover.State != "" && v.Cutover.State != "idle" {
		row("cut-over", "%s", cutoverLine(v.Cutover))
	}
	if v.Waiting != "" {
		row("waiting", "%s", v.Waiting)
	}
	for _, s := range v.Warnings {
		row("warning", "%s", s)
	}
}
