// Package frontend is the daemon beside the workload: it serves volumes over
// NBD whose data is still elsewhere, brings the data, keeps what is written,
// and moves each volume to a native disk in the end.
package frontend

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"

	"forerun/api"
	"forerun/daemon"
	"forerun/data/export/nbd"
	"forerun/data/replica"
	"forerun/data/sched"
	"forerun/data/wire"
)

// Defaults of Config, in bytes.
const (
	DefaultMemoryBytes  = 128 << 20
	DefaultScratchBytes = 4 << 30
	minStoreLimit       = 16 << 20
)

// Config is what the daemon is told.
type Config struct {
	PKI      string // directory with ca.crt, NAME.crt, NAME.key
	Name     string // the node's, as in its certificate
	StateDir string
	Backend  string   // HOST:PORT of the volumes that Backends does not name
	Volumes  []string // names, as their backends offer them
	// Backends are the HOST:PORT of volumes, by name, that are elsewhere.
	Backends map[string]string
	Exports  []string // NBD URIs to listen on
	// MemoryBytes is the memory tier of all volumes together.
	MemoryBytes int64
	// ScratchBytes is the quota of each volume's scratch tier, 0 for none.
	ScratchBytes int64
	// BackgroundConns is how many connections carry the background, 0 for the default.
	BackgroundConns int
	// Domains are the dedup domains by volume: volumes share chunks inside one
	// only. What is in none is in the common one.
	Domains map[string]string
	// StoreLimit bounds each domain's store in bytes, 0 for no bound. What was
	// read least lately is dropped, and fetched again when it is needed.
	StoreLimit int64
	// QoS is api.QoSReady or api.QoSLess, the default.
	QoS string
	// BackendBackground and BackendWriteBack are where these classes go,
	// HOST:PORT; empty: where the backend says.
	BackendBackground, BackendWriteBack string
	// Socket marks the packets of each class.
	Socket wire.SocketOptions
	// Limits bound background and write-back of all volumes together.
	Limits sched.Limits
	// FillPaused starts with the background transfer paused.
	FillPaused bool
	// FillLimit bounds the background transfer in bytes a second on the link, 0 for none.
	FillLimit int64
	// SkipFree leaves at the source what its file systems do not use: reading it
	// asks the source until cut-over, afterwards it reads as zeros.
	SkipFree bool
	// VerifyClients makes nbds listeners ask clients for a certificate of the same CA.
	VerifyClients bool

	// Peer is the other frontend's HOST:PORT, empty for a node alone; PeerListen
	// is where it finds this one. Zone says where this one stands.
	Peer, PeerListen, Zone string
	// Arbiter decides which of the two is primary: a backend, by default each
	// volume's own.
	Arbiter string
	// OnPeerLoss is what writes do while the peer is away.
	OnPeerLoss replica.Policy
	// FailBackAfter is how long the preferred node is in sync before it gets its
	// volumes back, 0 for never.
	FailBackAfter time.Duration
	// Isolated makes test clones: the volumes as they are now, whatever becomes
	// of the source; nothing goes back.
	Isolated bool
	// Policy is api.PolicyWriteBack or api.PolicyIsolated for volumes that have
	// none yet; empty: write-back where the source can be written.
	Policy string
	// A checkpoint is made every CheckpointInterval, or after CheckpointBytes of
	// writes; 0 for the defaults.
	CheckpointInterval time.Duration
	CheckpointBytes    int64
	// Groups are the consistency groups by name, each of volumes of one backend;
	// what is in none is in one together with the others of its backend.
	Groups map[string][]string

	Log *slog.Logger
}

// ParseVolume reads NAME or NAME=HOST:PORT; backend is empty where the text
// names none.
func ParseVolume(s string) (name, backend string, err error) {
	name, backend, named := strings.Cut(s, "=")
	if named && (name == "" || checkAddress(backend) != nil) {
		return "", "", fmt.Errorf("--volume %q is not NAME or NAME=HOST:PORT; example: web=old.example:7410", s)
	}
	return name, backend, nil
}

func checkAddress(s string) error {
	host, port, err := net.SplitHostPort(s)
	if err != nil || host == "" || port == "" {
		return fmt.Errorf("%q is not HOST:PORT; example: old.example:7410", s)
	}
	return nil
}

// backendOf is the address of a volume's backend.
func (c *Config) backendOf(volume string) string {
	if a := c.Backends[volume]; a != "" {
		return a
	}
	return c.Backend
}

// ParseGroup reads NAME=VOLUME,VOLUME.
func ParseGroup(s string) (name string, volumes []string, err error) {
	name, list, ok := strings.Cut(s, "=")
	volumes = strings.Split(list, ",")
	if !ok || name == "" || slices.Contains(volumes, "") {
		return "", nil, fmt.Errorf("--group %q is not NAME=VOLUME,VOLUME; example: db=data,log", s)
	}
	return name, volumes, nil
}

func (c *Config) checkPair() error {
	if (c.Peer == "") != (c.PeerListen == "") {
		return errors.New("--peer and --peer-listen belong together: where the other frontend is, and where it finds this one")
	}
	if c.Isolated {
		if c.Policy == api.PolicyWriteBack {
			return errors.New("--isolated makes test clones, whose changes never go back: --policy write-back contradicts it")
		}
		if c.Peer != "" {
			return errors.New("a test clone lives on one frontend: leave out --peer, or --isolated")
		}
		c.Policy = api.PolicyIsolated
	}
	switch c.Policy {
	case "", api.PolicyWriteBack, api.PolicyIsolated:
	default:
		return fmt.Errorf("--policy %q is not known: write-back or isolated", c.Policy)
	}
	return c.checkGroups()
}

func (c *Config) checkGroups() error {
	seen := map[string]bool{}
	for name, vols := range c.Groups {
		for _, v := range vols {
			if !slices.Contains(c.Volumes, v) {
				return fmt.Errorf("--group %s: there is no volume %s here; say --volume %s too", name, v, v)
			}
			if seen[v] {
				return fmt.Errorf("--group: volume %s is in two groups", v)
			}
			seen[v] = true
			if a, b := c.backendOf(vols[0]), c.backendOf(v); a != b {
				return fmt.Errorf("--group %s: volume %s is at the backend %s and %s at %s, and a checkpoint is one transaction at one backend; give each backend's volumes a group of their own",
					name, vols[0], a, v, b)
			}
		}
	}
	names := map[[2]string]bool{}
	for _, g := range c.groups() {
		at := [2]string{g.name, c.backendOf(g.volumes[0])}
		if names[at] {
			return fmt.Errorf("--group %s: the volumes that are in no group are one of that name; choose another", g.name)
		}
		names[at] = true
	}
	return nil
}

func (c *Config) checkBackends() error {
	if c.Backend != "" {
		if err := checkAddress(c.Backend); err != nil {
			return fmt.Errorf("--backend: %w", err)
		}
	}
	for _, v := range c.Volumes {
		a := c.backendOf(v)
		if a == "" {
			return fmt.Errorf("nothing says which backend has the volume %s; say --backend HOST:PORT, or --volume %s=HOST:PORT", v, v)
		}
		if err := checkAddress(a); err != nil {
			return fmt.Errorf("--volume %s: the backend %w", v, err)
		}
	}
	return nil
}

func (c *Config) check() error {
	if len(c.Volumes) == 0 {
		return errors.New("no volume is given; say --volume NAME, as the backend names it")
	}
	seen := map[string]bool{}
	for _, v := range c.Volumes {
		if v == "" || strings.ContainsAny(v, "/\x00") || v == "." || v == ".." || len(v) > 255 {
			return fmt.Errorf("--volume %q: a volume's name has no slash, is not . or .., and has 1 to 255 bytes", v)
		}
		if seen[v] {
			return fmt.Errorf("volume %s is given twice", v)
		}
		seen[v] = true
	}
	if len(c.Exports) == 0 {
		return errors.New("no export is given; say --export 'nbd+unix:///?socket=/run/forerun.sock' or --export nbds://0.0.0.0:10809")
	}
	for _, e := range c.Exports {
		if err := nbd.CheckAddress(e); err != nil {
			return err
		}
	}
	for _, m := range []struct{ flag, value string }{{"pki", c.PKI}, {"name", c.Name}, {"state", c.StateDir}} {
		if m.value == "" {
			return fmt.Errorf("--%s is empty", m.flag)
		}
	}
	if err := c.checkBackends(); err != nil {
		return err
	}
	var err error
	if c.QoS, err = daemon.QoS(c.QoS); err != nil {
		return err
	}
	if err := c.checkPair(); err != nil {
		return err
	}
	if c.FailBackAfter < 0 || c.CheckpointInterval < 0 || c.CheckpointBytes < 0 {
		return errors.New("intervals and sizes of checkpoints cannot be negative")
	}
	for v, d := range c.Domains {
		if !slices.Contains(c.Volumes, v) {
			return fmt.Errorf("--domain %s=%s: there is no volume %s here; say --volume %s too", v, d, v, v)
		}
		if err := checkDomain(d); err != nil {
			return err
		}
	}
	if c.StoreLimit != 0 && c.StoreLimit < minStoreLimit {
		return fmt.Errorf("--store-limit %d is less than %d bytes, which cannot work; 0 is no limit", c.StoreLimit, minStoreLimit)
	}
	if c.MemoryBytes < 0 || c.ScratchBytes < 0 || c.FillLimit < 0 || c.BackgroundConns < 0 {
		return errors.New("sizes, limits and numbers of connections cannot be negative")
	}
	return nil
}
