// Package daemon holds what every daemon of Forerun does alike: a state
// directory that one process owns, a tree of goroutines that ends together,
// and the notes to systemd.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"forerun/block"
	"forerun/disk"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"
)

// Own makes the state directory if needed and locks it. The lock ends with
// Close of the returned file, or with the process.
func Own(fs disk.FS, dir string) (disk.File, error) {
	if err := fs.MkdirAll(dir); err != nil {
		return nil, block.E("state", dir, block.KindNone, err)
	}
	l, err := fs.Lock(filepath.Join(dir, "lock"))
	if block.KindOf(err) == block.KindBusy {
		return nil, block.E("state", dir, block.KindBusy, errors.New("another daemon is running with this state directory; stop it or give another --state"))
	}
	if err != nil {
		return nil, block.E("state", dir, block.KindNone, err)
	}
	return l, nil
}

// Tree runs parts until one of them fails or ctx ends; then it ends the others
// and waits for all. The error is the first part's.
func Tree(ctx context.Context, parts ...func(context.Context) error) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, p := range parts {
		g.Go(func() error { return p(ctx) })
	}
	return g.Wait()
}

// Ready tells systemd, if it started us, that the daemon serves.
func Ready(log *slog.Logger, status string) {
	if _, err := sd.SdNotify(false, sd.SdNotifyReady+"\nSTATUS="+status); err != nil {
		log.Warn("systemd was not told", "err", err)
	}
}

// Stopping tells systemd that the daemon is going down cleanly.
func Stopping() { _, _ = sd.SdNotify(false, sd.SdNotifyStopping) }

// Logger writes structured logs to standard error: text for people, JSON for
// machines.
func Logger(format string, debug bool) (*slog.Logger, error) {
	o := &slog.HandlerOptions{}
	if debug {
		o.Level = slog.LevelDebug
	}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(os.Stderr, o)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(os.Stderr, o)), nil
	}
	return nil, fmt.Errorf("log format %q is not known: text or json", format)
}
