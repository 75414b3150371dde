package main

import (
	"context"
	"fmt"
	"log/slog"

	"forerun/daemon"
	"forerun/daemon/backend"
	"forerun/daemon/frontend"
	"forerun/internal/chunk"

	"github.com/spf13/cobra"
)

// logFlags are what both daemons know about logging.
type logFlags struct {
	format string
	debug  bool
}

func (l *logFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&l.format, "log-format", "text", "text or json, on standard error")
	cmd.Flags().BoolVar(&l.debug, "debug", false, "log more")
}

func (l *logFlags) logger() (*slog.Logger, error) { return daemon.Logger(l.format, l.debug) }

// clean turns the end that a signal asked for into success.
func clean(ctx context.Context, err error) error {
	if ctx.Err() != nil && (err == nil || context.Cause(ctx) == err) {
		return nil
	}
	return err
}

func required(cmd *cobra.Command, names ...string) {
	for _, n := range names {
		if err := cmd.MarkFlagRequired(n); err != nil {
			panic(fmt.Sprintf("flag %s is not defined", n))
		}
	}
}

func backendCommand() *cobra.Command {
	var (
		cfg     backend.Config
		logs    logFlags
		volumes []string
	)
	cmd := &cobra.Command{
		Use:   "backend --pki DIR --name NAME --state DIR --listen HOST:PORT --volume NAME=SOURCE …",
		Short: "Own source disks and send them, what is waited for first",
		Long: "Own one or more source disks and send their chunks to frontends over mutual TLS.\n\n" +
			"A SOURCE is a raw file or block device; an image with ?format=qcow2, vmdk, vpc or vhdx, read through\n" +
			"a supervised qemu-nbd; or an NBD URI (nbd://, nbds://, nbd+unix://).",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			for _, v := range volumes {
				p, err := backend.ParseVolume(v)
				if err != nil {
					return err
				}
				cfg.Volumes = append(cfg.Volumes, p)
			}
			if cfg.Log, err = logs.logger(); err != nil {
				return err
			}
			b, err := backend.New(cfg)
			if err != nil {
				return err
			}
			return clean(cmd.Context(), b.Run(cmd.Context()))
		},
	}
	f := cmd.Flags()
	f.StringVar(&cfg.PKI, "pki", "", "directory with ca.crt, NAME.crt and NAME.key")
	f.StringVar(&cfg.Name, "name", "", "name of this node, as in its certificate")
	f.StringVar(&cfg.StateDir, "state", "", "directory of this daemon's state and API socket")
	f.StringVar(&cfg.Listen, "listen", "", "HOST:PORT that frontends connect to")
	f.StringArrayVar(&volumes, "volume", nil, "NAME=SOURCE; may be given again")
	f.BoolVar(&cfg.ReadOnly, "read-only", false, "never change a source: nothing is written back")
	f.IntVar(&cfg.ChunkBytes, "chunk", chunk.DefaultSize, "chunk size in bytes, a power of two from 16384 to 1048576")
	logs.add(cmd)
	required(cmd, "pki", "name", "state", "listen", "volume")
	return cmd
}

func frontendCommand() *cobra.Command {
	var (
		cfg  frontend.Config
		logs logFlags
	)
	cmd := &cobra.Command{
		Use:   "frontend --pki DIR --name NAME --state DIR --backend HOST:PORT --volume NAME … --export URI …",
		Short: "Serve volumes over NBD while their data is still elsewhere",
		Long: "Serve volumes of a backend over NBD at once: read on demand, fill in the background, journal what\n" +
			"is written, cut over to a native disk when told to. The export name is the volume's.\n\n" +
			"An export URI is nbd+unix:///?socket=PATH, nbd://HOST:PORT, nbds://HOST:PORT or nbds+unix:///?socket=PATH.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if cfg.Log, err = logs.logger(); err != nil {
				return err
			}
			fe, err := frontend.New(cfg)
			if err != nil {
				return err
			}
			return clean(cmd.Context(), fe.Run(cmd.Context()))
		},
	}
	f := cmd.Flags()
	f.StringVar(&cfg.PKI, "pki", "", "directory with ca.crt, NAME.crt and NAME.key")
	f.StringVar(&cfg.Name, "name", "", "name of this node, as in its certificate")
	f.StringVar(&cfg.StateDir, "state", "", "directory of what this node holds, and of its API socket")
	f.StringVar(&cfg.Backend, "backend", "", "HOST:PORT of the backend")
	f.StringArrayVar(&cfg.Volumes, "volume", nil, "name of a volume of the backend; may be given again")
	f.StringArrayVar(&cfg.Exports, "export", nil, "NBD URI to listen on; may be given again")
	f.Int64Var(&cfg.MemoryBytes, "memory", frontend.DefaultMemoryBytes, "memory tier of all volumes together, bytes")
	f.Int64Var(&cfg.ScratchBytes, "scratch", frontend.DefaultScratchBytes, "scratch tier of each volume, bytes; 0 for none")
	f.IntVar(&cfg.BackgroundConns, "background-connections", 0, "connections for the background; 0 for the default")
	f.BoolVar(&cfg.FillPaused, "fill-paused", false, "begin with the background transfer paused")
	f.Int64Var(&cfg.FillLimit, "fill-limit", 0, "limit of the background transfer, bytes a second on the link; 0 for none")
	f.BoolVar(&cfg.VerifyClients, "verify-clients", true, "nbds: ask clients for a certificate of the same CA")
	logs.add(cmd)
	required(cmd, "pki", "name", "state", "backend", "volume", "export")
	return cmd
}
