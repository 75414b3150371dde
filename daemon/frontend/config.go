// Package frontend is the daemon beside the workload: it serves volumes over
// NBD whose data is still elsewhere, brings the data, keeps what is written,
// and moves each volume to a native disk in the end.
package frontend

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
)

// Defaults of Config, in bytes.
const (
	DefaultMemoryBytes  = 128 << 20
	DefaultScratchBytes = 4 << 30
)

// Config is what the daemon is told.
type Config struct {
	PKI      string // directory with ca.crt, NAME.crt, NAME.key
	Name     string // the node's, as in its certificate
	StateDir string
	Backend  string   // HOST:PORT
	Volumes  []string // names, as the backend offers them
	Exports  []string // NBD URIs to listen on
	// MemoryBytes is the memory tier of all volumes together.
	MemoryBytes int64
	// ScratchBytes is the quota of each volume's scratch tier, 0 for none.
	ScratchBytes int64
	// BackgroundConns is how many connections carry the background, 0 for the default.
	BackgroundConns int
	// FillPaused starts with the background transfer paused.
	FillPaused bool
	// FillLimit bounds the background transfer in bytes a second on the link, 0 for none.
	FillLimit int64
	// VerifyClients makes nbds listeners ask clients for a certificate of the same CA.
	VerifyClients bool
	Log           *slog.Logger
}

func (c *Config) check() error {
	if len(c.Volumes) == 0 {
		return errors.New("no volume is given; say --volume NAME, as the backend names it")
	}
	seen := map[string]bool{}
	for _, v := range c.Volumes {
		if v == "" || strings.ContainsAny(v, "/\x00") || v == "." || v == ".." || len(v) > 255 {
			return fmt.Errorf("--volume %q: a volume's name has no slash and at most 255 bytes", v)
		}
		if seen[v] {
			return fmt.Errorf("volume %s is given twice", v)
		}
		seen[v] = true
	}
	if len(c.Exports) == 0 {
		return errors.New("no export is given; say --export 'nbd+unix:///?socket=/run/forerun.sock' or --export nbds://0.0.0.0:10809")
	}
	if c.MemoryBytes < 0 || c.ScratchBytes < 0 || c.FillLimit < 0 || c.BackgroundConns < 0 {
		return errors.New("sizes, limits and numbers of connections cannot be negative")
	}
	return nil
}
