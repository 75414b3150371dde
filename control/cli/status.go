package cli

import (
	"cmp"
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
			if interval <= 0 {
				return fmt.Errorf("--interval %v is no time; example: 1s", interval)
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

// replicaText is a frontend's part in the pair.
func replicaText(r *api.Replica) string {
	if r == nil {
		return "no pair"
	}
	s := r.Role
	if r.Peer != "" {
		s += ", the other one is " + r.Peer
	}
	s += fmt.Sprintf(", epoch %d", r.Epoch)
	if r.Role != api.ReplicaAlone {
		sync := "in sync"
		if !r.InSync {
			sync = "not in sync"
		}
		s += ", " + sync
	}
	if r.Mode != "" && r.Mode != api.ModeReplicated {
		s += ", " + r.Mode
	}
	if r.ResyncBytes > 0 {
		s += fmt.Sprintf(", %s to copy", bytesText(float64(r.ResyncBytes)))
	}
	if r.Reason != "" {
		s += " (" + r.Reason + ")"
	}
	return s
}

// writebackText is what becomes of changes at the source.
func writebackText(w *api.Writeback) string {
	if w == nil {
		return "off"
	}
	if w.Policy == api.PolicyIsolated {
		s := fmt.Sprintf("isolated, %s changed here only", bytesText(float64(w.UnwrittenBytes)))
		if w.Reason != "" {
			s += " (" + w.Reason + ")"
		}
		return s
	}
	state := w.State
	if state == "" {
		state = w.Policy
	}
	s := fmt.Sprintf("%s, %s unwritten", state, bytesText(float64(w.UnwrittenBytes)))
	if w.OldestS > 0 {
		s += fmt.Sprintf(", the oldest %s ago", secondsText(w.OldestS))
	}
	if w.LastCheckpoint == "" {
		s += ", no checkpoint yet"
	} else {
		s += fmt.Sprintf(", checkpoint %d cut at %s", w.LastID, w.LastCheckpoint)
	}
	s += ", rpo " + secondsText(w.RPOS)
	if w.Reason != "" {
		s += " (" + w.Reason + ")"
	}
	return s
}

// pairLine is the pair and write-back on the line of --watch.
func pairLine(v api.Volume) string {
	var b strings.Builder
	if r := v.Replica; r != nil && r.Role != api.ReplicaAlone {
		sync := "in sync"
		if !r.InSync {
			sync = "not in sync"
		}
		if r.ResyncBytes > 0 {
			sync += " " + bytesText(float64(r.ResyncBytes)) + " to copy"
		}
		fmt.Fprintf(&b, "  %s epoch %d %s", r.Role, r.Epoch, sync)
		if r.Mode != "" && r.Mode != api.ModeReplicated {
			b.WriteString(" " + r.Mode)
		}
		if r.Reason != "" {
			b.WriteString(" (" + r.Reason + ")")
		}
	}
	if w := v.Writeback; w != nil {
		fmt.Fprintf(&b, "  %s %s unwritten", w.Policy, bytesText(float64(w.UnwrittenBytes)))
		if w.Policy != api.PolicyIsolated {
			fmt.Fprintf(&b, " rpo %s", secondsText(w.RPOS))
		}
		if w.Reason != "" {
			b.WriteString(" (" + w.Reason + ")")
		}
	}
	if a := v.Abort; a != nil {
		fmt.Fprintf(&b, "  abort %s %s left", a.State, bytesText(float64(a.RemainingBytes)))
	}
	return b.String()
}

// proxyLine is a proxy's volume on the line of --watch.
func proxyLine(v api.Volume) string {
	f := v.Failover
	at := f.Target
	if at == "" {
		at = "no target"
	}
	s := fmt.Sprintf("%s  %s  %d under way, %d moves, %d repeated, longest gap %s", v.Volume, at, f.Waiting, f.Moves, f.Repeated, microsText(f.LongestUs))
	if v.Waiting != "" {
		s += "  waiting: " + v.Waiting
	}
	return s
}

// statusLine is a volume on one line, for --watch.
func statusLine(v api.Volume) string {
	if v.Failover != nil {
		return proxyLine(v)
	}
	if v.Role == api.RoleBackend {
		s := fmt.Sprintf("%s  %s  %d sessions, %s sent", v.Volume, v.Phase, v.Clients, bytesText(float64(v.WAN.SentBytes))) + pairLine(v)
		if v.Waiting != "" {
			s += "  waiting: " + v.Waiting
		}
		return s
	}
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
	b.WriteString(pairLine(v))
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
	end := func() {
		if v.Replica != nil {
			row("replica", "%s", replicaText(v.Replica))
		}
		if v.Writeback != nil {
			row("write-back", "%s", writebackText(v.Writeback))
		}
		if v.Abort != nil && v.Abort.State == api.AbortDone {
			row("abort", "%s", abortedText(v))
		} else if v.Abort != nil {
			row("abort", "%s", strings.TrimPrefix(abortLine(v), "abort: "))
		}
		if v.Waiting != "" {
			row("waiting", "%s", v.Waiting)
		}
		for _, s := range v.Warnings {
			row("warning", "%s", s)
		}
	}
	if v.Failover != nil {
		printProxied(w, v, row)
		end()
		return
	}
	fmt.Fprintf(w, "%s: %s, primary is the %s\n", v.Volume, v.Phase, v.Primary)
	row("size", "%s in chunks of %s", bytesText(float64(v.SizeBytes)), bytesText(float64(v.ChunkBytes)))
	if v.Source != "" {
		row("source", "%s", v.Source)
	}
	if v.Backend != "" {
		row("backend", "%s", v.Backend)
	}
	row("clients", "%d", v.Clients)
	if v.Role == api.RoleBackend {
		row("link", "%s received, %s sent", bytesText(float64(v.WAN.ReceivedBytes)), bytesText(float64(v.WAN.SentBytes)))
		if s := v.Sending; s != nil && s.PackLevel != "" {
			row("packing", "%s", s.PackLevel)
		}
		row("dedup", "%s chunking; content of %d chunks known, scan %s; %d sent as signatures", v.Dedup.Chunking, v.Dedup.KnownChunks, v.Dedup.Scan, v.Dedup.Chunks)
		for _, f := range v.FileSystems {
			row("file system", "%s", fileSystemText(f))
		}
		end()
		return
	}
	if v.Chunks.Free > 0 {
		row("free", "%d chunks that the file systems of the source do not use are left there", v.Chunks.Free)
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
	store := bytesText(float64(v.StoreBytes)) + " on disk"
	if v.Dedup.LimitBytes > 0 {
		store += fmt.Sprintf(" of %s, %s dropped", bytesText(float64(v.Dedup.LimitBytes)), bytesText(float64(v.Dedup.EvictedBytes)))
	}
	if v.Dedup.Domain != "" {
		store += ", domain " + v.Dedup.Domain
	}
	row("store", "%s", store)
	row("dedup", "%d chunks were here already, %d wrong guesses", v.Dedup.Chunks, v.Dedup.Repairs)
	row("cache", "%d memory hits, %d scratch hits, %d misses", v.Cache.MemoryHits, v.Cache.ScratchHits, v.Cache.Misses)
	row("journal", "%d writes, %s retained", v.Journal.Records, bytesText(float64(v.Journal.RetainedBytes)))
	if v.Cutover.State != "" && v.Cutover.State != "idle" {
		row("cut-over", "%s", cutoverLine(v.Cutover))
	}
	end()
}

// printProxied is a volume as a proxy sees it.
func printProxied(w io.Writer, v api.Volume, row func(name, format string, args ...any)) {
	f := v.Failover
	at := f.Target
	if at == "" {
		at = "no target"
	}
	fmt.Fprintf(w, "%s: served through %s\n", v.Volume, at)
	row("size", "%s", bytesText(float64(v.SizeBytes)))
	row("clients", "%d", v.Clients)
	for _, t := range f.Targets {
		s := t.State
		if t.Error != "" {
			s += " (" + t.Error + ")"
		}
		row("target", "%s: %s", t.Target, s)
	}
	row("calls", "%d under way, %d repeated", f.Waiting, f.Repeated)
	row("moves", "%d, %d because a target answered nothing; the longest time without any was %s", f.Moves, f.Stalls, microsText(f.LongestUs))
}

// fileSystemText says what was found in a part of a source.
func fileSystemText(f api.FileSystem) string {
	s := fmt.Sprintf("%s of %s at %s", cmp.Or(f.Type, "nothing known"), bytesText(float64(f.SizeBytes)), bytesText(float64(f.OffsetBytes)))
	if f.Label != "" {
		s += fmt.Sprintf(" %q", f.Label)
	}
	if f.Reason != "" {
		return s + ": counts as data, because " + f.Reason
	}
	return s + ": " + bytesText(float64(f.FreeBytes)) + " free"
}
