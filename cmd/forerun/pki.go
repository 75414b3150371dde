package main

import (
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"forerun/internal/pki"

	"github.com/spf13/cobra"
)

func pkiCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "pki", Short: "Make the certificates that both sides verify", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(pkiInitCommand(), pkiIssueCommand())
	return cmd
}

func pkiInitCommand() *cobra.Command {
	var dir string
	cmd := &cobra.Command{Use: "init --dir DIR", Short: "Make a certificate authority: ca.crt and ca.key", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := pki.Init(dir); err != nil {
				return err
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "wrote %s and %s; keep the key where certificates are issued, nowhere else\n",
				filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key"))
			return err
		}}
	cmd.Flags().StringVar(&dir, "dir", "", "directory to write to")
	_ = cmd.MarkFlagRequired("dir")
	return cmd
}

func pkiIssueCommand() *cobra.Command {
	var (
		dir  string
		req  pki.Request
		role string
		days int
	)
	cmd := &cobra.Command{Use: "issue --dir DIR --role ROLE --name NAME --host HOST[,HOST]",
		Short: "Issue a certificate: NAME.crt and NAME.key", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			req.Role = pki.Role(role)
			if len(strings.TrimSpace(strings.Join(req.Hosts, ""))) == 0 {
				return fmt.Errorf("--host is empty: others verify the host they reach a node at; give a name or an address")
			}
			req.Lifetime = time.Duration(days) * 24 * time.Hour
			if err := pki.Issue(dir, req); err != nil {
				return err
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "wrote %s and %s\n",
				filepath.Join(dir, req.Name+".crt"), filepath.Join(dir, req.Name+".key"))
			return err
		}}
	f := cmd.Flags()
	f.StringVar(&dir, "dir", "", "directory with ca.crt and ca.key, written to")
	f.StringVar(&role, "role", "", "backend, frontend or operator: what the holder may do")
	f.StringVar(&req.Name, "name", "", "name of the node or person")
	f.StringSliceVar(&req.Hosts, "host", nil, "host names and addresses it is reached at")
	f.BoolVar(&req.Renew, "renew", false, "replace a certificate of that name; daemons that run read the new one by themselves")
	f.IntVar(&days, "days", 397, "days it is valid")
	for _, n := range []string{"dir", "role", "name", "host"} {
		_ = cmd.MarkFlagRequired(n)
	}
	return cmd
}
