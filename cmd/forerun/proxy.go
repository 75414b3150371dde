package main

import (
	"forerun/daemon/proxy"

	"github.com/spf13/cobra"
)

func proxyCommand() *cobra.Command {
	var (
		cfg  proxy.Config
		logs logFlags
	)
	cmd := &cobra.Command{
		Use:   "proxy --export URI … --to URI --to URI …",
		Short: "Serve volumes over NBD through whichever frontend works",
		Long: "Serve volumes over NBD and pass each request to the first target that works. When that is lost, requests\n" +
			"under way and all that follow go to the next one: clients see a slow request and no error. Run it on the\n" +
			"workload's host.\n\n" +
			"The targets are the frontends of one pair. With an export's name in each --to URI, that one volume is\n" +
			"served, under that name and as the default; without, all volumes are, under their own names. For nbds,\n" +
			"--pki and --name say which certificate is shown and whose are taken; tls-certificates= in the URI\n" +
			"replaces them. With --state, forerun status shows how each volume is reached.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if cfg.Log, err = logs.logger(); err != nil {
				return err
			}
			p, err := proxy.New(cfg)
			if err != nil {
				return err
			}
			return clean(cmd.Context(), p.Run(cmd.Context()))
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&cfg.Exports, "export", nil, "NBD URI to listen on; may be given again")
	f.StringArrayVar(&cfg.Targets, "to", nil, "NBD URI of a frontend, tried in the order given; may be given again")
	f.StringVar(&cfg.PKI, "pki", "", "directory with ca.crt, NAME.crt and NAME.key, for nbds")
	f.StringVar(&cfg.Name, "name", "", "name of this node, as in its certificate")
	f.StringVar(&cfg.StateDir, "state", "", "directory of the API socket; none without")
	f.BoolVar(&cfg.VerifyClients, "verify-clients", true, "nbds: ask clients for a certificate of the same CA")
	logs.add(cmd)
	required(cmd, "export", "to")
	return cmd
}
