// Package proxy is the daemon between a workload and the frontends that hold
// its volumes: an NBD server that passes each call to the first target that
// works, so that the loss of a frontend is a slow call and nothing else. It
// keeps nothing; it may be killed and started again as often as its clients
// can reconnect. Run it on the workload's host.
package proxy

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"forerun/block"
	"forerun/data/source/nbd"
	"forerun/internal/pki"
)

// Config is what the daemon is told.
type Config struct {
	Exports []string // NBD URIs to listen on
	// Targets are NBD URIs in the order they are tried. If they name an export,
	// that one is served, under the name it has in the first of them; if none
	// does, whatever name a client asks for is asked of them.
	Targets []string
	// PKI and Name are for nbds: the directory with ca.crt, NAME.crt, NAME.key.
	PKI, Name string
	// StateDir is for the API's socket; empty for no API.
	StateDir string
	// VerifyClients makes nbds listeners ask clients for a certificate of the same CA.
	VerifyClients bool
	Log           *slog.Logger
}

// parse checks the configuration and returns the targets and, when they name
// an export, its name.
func (c *Config) parse() (targets []nbd.Target, export string, err error) {
	if len(c.Exports) == 0 {
		return nil, "", errors.New("no export is given; say --export 'nbd+unix:///?socket=/run/forerun/proxy.sock' or --export nbd://127.0.0.1:10809")
	}
	if len(c.Targets) == 0 {
		return nil, "", errors.New("no target is given; say --to URI for each frontend, as nbds://a.example/web or nbd+unix:///web?socket=/run/forerun/nbd.sock")
	}
	named := 0
	seen := map[string]bool{}
	for _, uri := range c.Targets {
		t, err := nbd.ParseURI(uri)
		if err != nil {
			return nil, "", err
		}
		if seen[t.Network+t.Address+"/"+t.Export] {
			return nil, "", fmt.Errorf("--to %s is given twice", uri)
		}
		seen[t.Network+t.Address+"/"+t.Export] = true
		if t.Export != "" {
			named++
			if export == "" {
				export = t.Export
			}
		}
		if t.TLS && t.CertDir == "" && !t.NoVerify && c.PKI != "" {
			if t.Config, err = pki.ClientTLS(c.PKI, c.Name, pki.RoleFrontend); err != nil {
				return nil, "", err
			}
		}
		targets = append(targets, t)
	}
	if named != 0 && named != len(targets) {
		return nil, "", errors.New("some --to name an export and some do not; name it in all (one volume), or in none (all volumes under their own names)")
	}
	return targets, export, nil
}

// exportTLS are the settings of nbds listeners, nil when there is none.
func (c *Config) exportTLS() (*tls.Config, error) {
	for _, e := range c.Exports {
		if strings.HasPrefix(e, "nbds") {
			if c.PKI == "" || c.Name == "" {
				return nil, block.E("proxy", e, block.KindInvalid, errors.New("nbds needs a certificate; say --pki DIR --name NAME"))
			}
			return pki.NBDServerTLS(c.PKI, c.Name, c.VerifyClients)
		}
	}
	return nil, nil
}
