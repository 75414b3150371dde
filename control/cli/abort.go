package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"forerun/api"
	"forerun/api/client"
	"forerun/block"

	"github.com/spf13/cobra"
)

// followEvery is how often progress is asked for.
const followEvery = 500 * time.Millisecond

func abortCommand() *cobra.Command {
	var (
		t      target
		force  bool
		asJSON bool
	)
	cmd := &cobra.Command{
		Use:   "abort --state DIR --volume NAME [--force]",
		Short: "Call a move off: the source is primary again, and up to date",
		Long: "Call a move off before its cut-over. What the workload changed and is not at the source yet is written\n" +
			"there, the source is synced and unlocked, and what the move left at the target is removed. Stop the\n" +
			"workload first, else what it writes meanwhile is written back too. Interrupted, the command may be given\n" +
			"again and goes on.\n\n" +
			"With --force nothing is waited for: the source stays at its last checkpoint, and what is lost is said.\n" +
			"When the target site is gone, give it to the backend, with the backend's state directory.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v, err := followAbort(cmd.Context(), t.client(), t.volume, api.AbortRequest{Force: force}, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			if asJSON {
				return writeJSON(cmd.OutOrStdout(), v)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", v.Volume, abortedText(v))
			return nil
		},
	}
	t.addFlags(cmd, true)
	cmd.Flags().BoolVar(&force, "force", false, "do not wait for unwritten changes: lose them, and say so")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the volume's status as JSON at the end")
	return cmd
}

// during does order while it shows how the volume stands, and returns when
// order has. The status it returns is the order's.
func during(ctx context.Context, c *client.Client, volume string, w io.Writer, line func(api.Volume) string,
	order func(context.Context) (api.Volume, error)) (api.Volume, error) {
	type answer struct {
		v   api.Volume
		err error
	}
	done := make(chan answer, 1)
	go func() {
		v, err := order(ctx)
		done <- answer{v, err}
	}()
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	for last := ""; ; {
		select {
		case a := <-done:
			return a.v, a.err
		case <-tick.C:
		}
		v, err := c.Volume(ctx, volume)
		if err != nil {
			continue // the order's own error says it
		}
		if l := line(v); l != last {
			fmt.Fprintf(w, "%s: %s\n", v.Volume, l)
			last = l
		}
	}
}

// followAbort asks for the abort and shows progress until it is over.
func followAbort(ctx context.Context, c *client.Client, volume string, req api.AbortRequest, w io.Writer) (api.Volume, error) {
	interrupted := errors.New("the abort may go on without this command; see forerun status, or give it again")
	v, err := during(ctx, c, volume, w, abortLine, func(ctx context.Context) (api.Volume, error) { return c.Abort(ctx, volume, req) })
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	for last := ""; ; {
		switch {
		case ctx.Err() != nil:
			return v, interrupted
		case err != nil:
			return v, err
		case v.Phase == api.PhaseAborted, v.Abort != nil && v.Abort.State == api.AbortDone:
			return v, nil
		case v.Abort != nil && v.Abort.State == api.AbortFailed:
			return v, &block.Error{Op: "abort", Object: volume, Kind: block.KindIO, Err: fmt.Errorf("it stopped: %s; the source is not released, give the command again to go on", v.Abort.Error)}
		case v.Abort == nil:
			return v, &block.Error{Op: "abort", Object: volume, Kind: block.KindIO, Err: errors.New("the daemon took the order and does not know of it; see its log")}
		}
		if l := abortLine(v); l != last {
			fmt.Fprintf(w, "%s: %s\n", v.Volume, l)
			last = l
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
			v, err = c.Volume(ctx, volume)
		}
	}
}

func abortLine(v api.Volume) string {
	if v.Abort == nil {
		return "abort: not begun"
	}
	s := fmt.Sprintf("abort: %s, %s left to write to the source", v.Abort.State, bytesText(float64(v.Abort.RemainingBytes)))
	if v.Waiting != "" {
		s += ", waiting: " + v.Waiting
	}
	return s
}

// abortedText says what the source holds after an abort, and what it does not.
func abortedText(v api.Volume) string {
	a := v.Abort
	if a == nil || !a.Forced {
		return "aborted; the source is up to date, synced and free"
	}
	s := "aborted by force; the source is as it was when it was taken over"
	if a.LastCheckpoint != "" {
		s = fmt.Sprintf("aborted by force; the source is at checkpoint %d, cut at %s", a.LastID, a.LastCheckpoint)
	}
	switch {
	case a.LostBytes < 0 || a.LostS < 0:
		return s + "; what was changed after that is lost, and how much that is nobody here knows"
	case a.LostBytes == 0:
		return s + "; nothing is lost"
	}
	return s + fmt.Sprintf("; lost are %s of changes, made in the %s before", bytesText(float64(a.LostBytes)), secondsText(a.LostS))
}
