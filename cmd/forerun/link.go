package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"text/tabwriter"
	"time"

	"forerun/data/linktest"
	"forerun/internal/pki"

	"github.com/spf13/cobra"
)

func linkCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "link test --pki DIR --name NAME --backend HOST:PORT",
		Short: "Look at the line between two sites",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(linkTestCommand())
	return cmd
}

// linkReport is what link test prints with --json.
type linkReport struct {
	linktest.Result
	Expect linktest.Expectation `json:"expect"`
}

func linkTestCommand() *cobra.Command {
	var (
		o            linktest.Options
		dir, name    string
		size, ratio  float64
		asJSON, mute bool
	)
	cmd := &cobra.Command{
		Use:   "test --pki DIR --name NAME --backend HOST:PORT",
		Short: "Measure rate, round trip, loss and queue of the line to a backend, and say what to expect",
		Long: "Measure the line to a running backend, from where the frontend will stand and with its certificate, and\n" +
			"say what a migration over it will be like. It fills the line in both directions for about half a minute\n" +
			"(--time, --limit); a backend that serves a frontend refuses it unless told --force.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			switch {
			case size < 0 || size > 1<<30 || math.IsNaN(size):
				return fmt.Errorf("--size %g is not a size in GiB; example: 100", size)
			case !(ratio >= 0.5 && ratio <= 1000):
				return fmt.Errorf("--ratio %g is not a compression ratio between 0.5 and 1000; 1 is data that does not compress", ratio)
			case o.Connections < 1:
				return fmt.Errorf("--connections %d: at least 1 is needed", o.Connections)
			}
			if err := pki.CheckOwn(dir, name, pki.RoleFrontend); err != nil {
				return err
			}
			if o.TLS, err = pki.ClientTLS(dir, name, pki.RoleBackend); err != nil {
				return err
			}
			if !mute {
				o.Say = func(line string) { fmt.Fprintln(cmd.ErrOrStderr(), line) }
			}
			res, err := linktest.Run(cmd.Context(), o)
			if err != nil {
				return err
			}
			rep := linkReport{res, res.Expect(linktest.Plan{SizeBytes: int64(size * (1 << 30)), Ratio: ratio})}
			if asJSON {
				e := json.NewEncoder(cmd.OutOrStdout())
				e.SetIndent("", "  ")
				return e.Encode(rep)
			}
			return printLink(cmd.OutOrStdout(), rep)
		},
	}
	f := cmd.Flags()
	f.StringVar(&dir, "pki", "", "directory with ca.crt, NAME.crt and NAME.key")
	f.StringVar(&name, "name", "", "name of this node, as in its certificate")
	f.StringVar(&o.Addr, "backend", "", "HOST:PORT of the backend")
	f.IntVar(&o.Connections, "connections", 4, "how many connections to try at once, at most; up to 15")
	f.DurationVar(&o.Time, "time", 5*time.Second, "how long each download takes, up to 1m; uploads take three fifths of it")
	f.Int64Var(&o.Bytes, "limit", 0, "most bytes that one connection moves in one phase, for lines that are paid by volume; 0 for no limit")
	f.Float64Var(&size, "size", 10, "data to be moved, GiB")
	f.Float64Var(&ratio, "ratio", 2, "how well that compresses: plain bytes over bytes on the line")
	f.BoolVar(&o.Force, "force", false, "test although the backend serves frontends, which are slowed down meanwhile")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	f.BoolVar(&mute, "quiet", false, "no progress on standard error")
	required(cmd, "pki", "name", "backend")
	return cmd
}

// printLink shows what was measured as a table, and what it means below it.
func printLink(out io.Writer, r linkReport) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "line to %s\n\n", r.Backend)
	fmt.Fprintf(w, "idle round trip\t%.1f ms\tfrom %.1f to %.1f ms, jitter %.1f ms, %d pings\n\n",
		r.Idle.MedianMS, r.Idle.MinMS, r.Idle.MaxMS, r.Idle.JitterMS, r.Idle.Samples)
	fmt.Fprint(w, "\trate\tround trip\t95 %\tlonger by\tqueue\tsent again\tcontrol\n")
	for _, p := range append(r.Downloads, r.Uploads...) {
		loss := "unknown"
		if p.Loss != nil {
			loss = fmt.Sprintf("%.2g %%", 100*p.Loss.Share)
		}
		control := p.Congestion
		if control == "" {
			control = "unknown"
		}
		trip, p95, bloat := "unknown", "unknown", "unknown"
		if p.RTT.Samples > 0 {
			trip, p95, bloat = fmt.Sprintf("%.1f ms", p.RTT.MedianMS), fmt.Sprintf("%.1f ms", p.RTT.P95MS), fmt.Sprintf("%.1f ms", p.BloatMS)
		}
		fmt.Fprintf(w, "%s, %d conn\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n",
			p.Direction, p.Connections, linktest.Mbit(p.Rate), trip, p95, bloat, p.Grade, loss, control)
	}
	fmt.Fprint(w, "\nexpect\n")
	if err := w.Flush(); err != nil {
		return err
	}
	for _, l := range r.Expect.Lines {
		if _, err := fmt.Fprintln(out, "  "+l); err != nil {
			return err
		}
	}
	return nil
}
