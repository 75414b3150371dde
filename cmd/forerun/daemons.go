package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"forerun/api"
	"forerun/daemon"
	"forerun/daemon/backend"
	"forerun/daemon/frontend"
	"forerun/data/replica"
	"forerun/data/sched"
	"forerun/data/wire"

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

// qosFlags are what both daemons know about the network's part in keeping
// classes apart.
type qosFlags struct{ dscp string }

func (q *qosFlags) add(cmd *cobra.Command, mode *string) {
	cmd.Flags().StringVar(mode, "qos", api.QoSLess, "ready: the network keeps the classes apart, by port or mark; less: it does not, and background makes room here")
	cmd.Flags().StringVar(&q.dscp, "dscp", wire.DefaultDSCP, "marks of packets by class, names or numbers; none for no marks")
}

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
		qos     qosFlags
		volumes []string

		sizes, chunking []string
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
			if err := cfg.SetChunks(sizes, chunking); err != nil {
				return err
			}
			if cfg.Log, err = logs.logger(); err != nil {
				return err
			}
			if err := cfg.Socket.SetDSCP(qos.dscp); err != nil {
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
	f.StringVar(&cfg.ListenBackground, "listen-background", "", "HOST:PORT for background, besides --listen, for networks that know classes by their port")
	f.StringVar(&cfg.ListenWriteBack, "listen-writeback", "", "HOST:PORT for write-back, besides --listen")
	qos.add(cmd, &cfg.QoS)
	f.StringArrayVar(&volumes, "volume", nil, "NAME=SOURCE; may be given again")
	f.BoolVar(&cfg.ReadOnly, "read-only", false, "never change a source: nothing is written back")
	f.StringArrayVar(&sizes, "chunk", nil, "[NAME=]BYTES: chunk size of all volumes or of one, a power of two from 16384 to 1048576; may be given again (default 65536)")
	f.StringArrayVar(&chunking, "chunking", nil, "[NAME=]fixed or [NAME=]content: chunks are cut at fixed places, or into pieces by their content, which finds bytes again that moved; may be given again (default fixed)")
	f.BoolVar(&cfg.NoFSMap, "no-fsmap", false, "do not look for file systems on the sources: frontends cannot leave out what those do not use")
	logs.add(cmd)
	required(cmd, "pki", "name", "state", "listen", "volume")
	return cmd
}

func frontendCommand() *cobra.Command {
	var (
		cfg    frontend.Config
		logs   logFlags
		qos    qosFlags
		limits []string
		onLoss string
		groups []string

		domains []string

		volumes []string
	)
	cmd := &cobra.Command{
		Use:   "frontend --pki DIR --name NAME --state DIR --backend HOST:PORT --volume NAME[=HOST:PORT] … --export URI …",
		Short: "Serve volumes over NBD while their data is still elsewhere",
		Long: "Serve volumes of one or more backends over NBD at once: read on demand, fill in the background, journal\n" +
			"what is written, cut over to a native disk when told to. The export name is the volume's.\n\n" +
			"An export URI is nbd+unix:///?socket=PATH, nbd://HOST:PORT, nbds://HOST:PORT or nbds+unix:///?socket=PATH.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if cfg.Log, err = logs.logger(); err != nil {
				return err
			}
			if cfg.OnPeerLoss, err = replica.ParsePolicy(onLoss); err != nil {
				return err
			}
			if err := cfg.Socket.SetDSCP(qos.dscp); err != nil {
				return err
			}
			if cfg.Limits, err = sched.ParseLimits(limits); err != nil {
				return err
			}
			cfg.Backends = map[string]string{}
			for _, v := range volumes {
				name, at, err := frontend.ParseVolume(v)
				if err != nil {
					return err
				}
				cfg.Volumes = append(cfg.Volumes, name)
				if at != "" {
					cfg.Backends[name] = at
				}
			}
			cfg.Groups = map[string][]string{}
			for _, g := range groups {
				name, vols, err := frontend.ParseGroup(g)
				if err != nil {
					return err
				}
				cfg.Groups[name] = vols
			}
			cfg.Domains = map[string]string{}
			for _, d := range domains {
				vol, name, err := frontend.ParseDomain(d)
				if err != nil {
					return err
				}
				cfg.Domains[vol] = name
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
	f.StringVar(&cfg.Backend, "backend", "", "HOST:PORT of the backend of the volumes that name none")
	f.StringArrayVar(&volumes, "volume", nil, "NAME of a volume of the backend, or NAME=HOST:PORT of one of another backend; may be given again")
	f.StringArrayVar(&cfg.Exports, "export", nil, "NBD URI to listen on; may be given again")
	f.Int64Var(&cfg.MemoryBytes, "memory", frontend.DefaultMemoryBytes, "memory tier of all volumes together, bytes")
	f.Int64Var(&cfg.ScratchBytes, "scratch", frontend.DefaultScratchBytes, "scratch tier of each volume, bytes; 0 for none")
	f.IntVar(&cfg.BackgroundConns, "background-connections", 0, "connections for the background; 0: two, and more as they are needed")
	f.StringVar(&cfg.BackendBackground, "backend-background", "", "HOST:PORT of the backend for background; default what the backend says")
	f.StringVar(&cfg.BackendWriteBack, "backend-writeback", "", "HOST:PORT of the backend for write-back; default what the backend says")
	qos.add(cmd, &cfg.QoS)
	f.StringArrayVar(&limits, "limit", nil, "[CLASS][@HH:MM-HH:MM]=RATE: limit of background and write-back (or of the class background or writeback) of all volumes together, as in 20mbit or background@08:00-18:00=20mbit; may be given again")
	f.BoolVar(&cfg.FillPaused, "fill-paused", false, "begin with the background transfer paused")
	f.Int64Var(&cfg.StoreLimit, "store-limit", 0, "most bytes of chunks kept on disk, for each dedup domain; what was read least lately is dropped and fetched again when needed; 0 for no limit")
	f.StringArrayVar(&domains, "domain", nil, "VOLUME=DOMAIN: keep the volume's chunks apart from those of other domains, under a key of their own; may be given again")
	f.Int64Var(&cfg.FillLimit, "fill-limit", 0, "limit of the background transfer, bytes a second on the link; 0 for none")
	f.BoolVar(&cfg.SkipFree, "skip-free", false, "blocks that the file systems of the source do not use are not copied; reading one still asks the source until cut-over, afterwards it reads as zeros")
	f.StringVar(&cfg.Peer, "peer", "", "HOST:PORT of the other frontend, which holds every write too")
	f.StringVar(&cfg.PeerListen, "peer-listen", "", "HOST:PORT where the other frontend finds this one")
	f.StringVar(&cfg.Zone, "zone", "", "where this node stands, for status; its peer should stand elsewhere")
	f.StringVar(&cfg.Arbiter, "arbiter", "", "HOST:PORT of the backend that decides which frontend is primary; default each volume's own")
	f.StringVar(&onLoss, "on-peer-loss", "degrade", "degrade: writes go on, each synced before it is acknowledged; wait: they wait for the peer")
	f.DurationVar(&cfg.FailBackAfter, "failback-after", 30*time.Second, "give a volume back to its preferred node once that was in sync for so long; 0 for never")
	f.BoolVar(&cfg.Isolated, "isolated", false, "run test clones: the volumes as they are now; nothing goes back, forerun discard removes them")
	f.StringVar(&cfg.Policy, "policy", "", "write-back or isolated, for volumes that are new; default write-back where the source can be written")
	f.DurationVar(&cfg.CheckpointInterval, "checkpoint-interval", 10*time.Second, "longest time between checkpoints at the source while there are writes")
	f.Int64Var(&cfg.CheckpointBytes, "checkpoint-bytes", 64<<20, "bytes of writes that make a checkpoint earlier")
	f.StringArrayVar(&groups, "group", nil, "NAME=VOLUME,VOLUME: disks of one workload, whose checkpoints are one moment; they are of one backend; its others are one group together; may be given again")
	f.BoolVar(&cfg.VerifyClients, "verify-clients", true, "nbds: ask clients for a certificate of the same CA")
	logs.add(cmd)
	required(cmd, "pki", "name", "state", "volume", "export")
	return cmd
}
