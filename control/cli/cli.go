// Package cli is what an operator types: one file per command. It knows only
// the API's client and prints to the writers it is given.
package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"time"

	"forerun/api/client"

	"github.com/spf13/cobra"
)

// Commands returns the commands that speak to a running daemon.
func Commands() []*cobra.Command {
	return []*cobra.Command{statusCommand(), fillCommand(), limitCommand(), cutoverCommand(), abortCommand(),
		checkpointCommand(), discardCommand(), failoverCommand(), policyCommand()}
}

// target is the pair of flags that says which daemon and which volume.
type target struct {
	state, volume string
}

func (t *target) addFlags(cmd *cobra.Command, volumeRequired bool) {
	cmd.Flags().StringVar(&t.state, "state", "", "state directory of the daemon")
	cmd.Flags().StringVar(&t.volume, "volume", "", "name of the volume")
	_ = cmd.MarkFlagRequired("state")
	if volumeRequired {
		_ = cmd.MarkFlagRequired("volume")
	}
}

func (t *target) client() *client.Client { return client.New(t.state) }

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// bytesText shows a number of bytes with three significant digits.
func bytesText(n float64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%.0f B", n)
	}
	i := -1
	for n >= 1024 && i+1 < len(units) {
		n /= 1024
		i++
	}
	return fmt.Sprintf("%.3g %ciB", n, units[i])
}

func etaText(s int64) string {
	if s < 0 {
		return "unknown"
	}
	return (time.Duration(s) * time.Second).String()
}

// secondsText shows seconds to a tenth while they are few.
func secondsText(s float64) string {
	d := time.Duration(s * float64(time.Second))
	if d < time.Minute {
		return d.Round(100 * time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}

func microsText(us int64) string {
	return (time.Duration(us) * time.Microsecond).String()
}
