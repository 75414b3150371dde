package frontend

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"forerun/api"
	"forerun/api/serve"
	"forerun/block"
	"forerun/daemon"
	"forerun/data/cache"
	"forerun/data/export/nbd"
	"forerun/data/sched"
	"forerun/data/stack"
	"forerun/data/store"
	"forerun/data/wire"
	"forerun/data/writeback"
	"forerun/disk"
	"forerun/internal/pki"
	"forerun/internal/version"

	"golang.org/x/sync/errgroup"
)

// Frontend is the daemon.
type Frontend struct {
	cfg     Config
	fs      disk.FS
	log     *slog.Logger
	started time.Time

	store  *store.Store
	memory *cache.Memory
	nbd    *nbd.Server

	mu      sync.Mutex
	volumes map[string]*stack.Volume // guarded by mu: those that are open
	client  *wire.Client             // guarded by mu: nil until the backend has answered
	// problems say why the backend, under "", or a volume cannot be used.
	problems map[string]string // guarded by mu
	uris     []string          // guarded by mu: what is listened on

	allOpen sync.Once // what serve and connect tell each other
	rates   rates

	qos      qos
	pair     pair
	base     context.Context               // of what Run started
	work     sync.WaitGroup                // aborts under way
	peerIsUp bool                          // guarded by mu
	shippers map[string]*writeback.Shipper // guarded by mu: by volume
	aborts   map[string]*abort             // guarded by mu
	over     map[string]string             // guarded by mu: volumes that have ended, and how
}

// New checks cfg and returns the daemon, which has done nothing yet.
func New(cfg Config) (*Frontend, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	// Absolute, because a cut-over's target is compared with it.
	dir, err := filepath.Abs(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	cfg.StateDir = dir
	return &Frontend{cfg: cfg, qos: qos{limiter: sched.NewLimiter(cfg.Limits)}, fs: disk.OS(), log: cfg.Log, volumes: map[string]*stack.Volume{}, problems: map[string]string{},
		shippers: map[string]*writeback.Shipper{}, aborts: map[string]*abort{}, over: map[string]string{}}, nil
}

// Run serves until ctx ends, then closes everything in order: exports, then
// volumes, then the store.
func (f *Frontend) Run(ctx context.Context) (err error) {
	f.started = time.Now()
	lock, err := daemon.Own(f.fs, f.cfg.StateDir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := pki.CheckOwn(f.cfg.PKI, f.cfg.Name, pki.RoleFrontend); err != nil {
		return err
	}
	clientTLS, err := pki.ClientTLS(f.cfg.PKI, f.cfg.Name, pki.RoleBackend)
	if err != nil {
		return err
	}
	nbdTLS, err := f.exportTLS()
	if err != nil {
		return err
	}
	if err := f.openPair(); err != nil {
		return err
	}
	if f.store, err = store.Open(f.fs, filepath.Join(f.cfg.StateDir, "store"), store.Options{Log: f.log}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.store.Close()) }()
	f.memory = cache.NewMemory(f.cfg.MemoryBytes)
	f.nbd = nbd.NewServer(nbd.Options{Exports: f, TLS: nbdTLS, Near: near, Log: f.log})
	// The link goes last: a read that waits for it may still be answered while
	// the exports drain.
	defer f.hangUp()
	// The peer is spoken to until the volumes are closed: they are handed over.
	pairCtx, endPair := context.WithCancel(context.WithoutCancel(ctx))
	var pairing sync.WaitGroup
	paired := make(chan error, 1)
	defer func() { endPair(); pairing.Wait() }()
	defer func() { err = errors.Join(err, f.closeVolumes()) }()

	base, cancel := context.WithCancel(ctx)
	f.base = base
	defer func() { cancel(); f.work.Wait() }()

	handler := serve.Handler(f, f, version.String(), daemon.Metrics(f.Volumes), f)
	f.log.Info("frontend starts", "backend", f.cfg.Backend, "volumes", f.cfg.Volumes, "version", version.String())
	defer daemon.Stopping()
	return daemon.Tree(ctx,
		func(ctx context.Context) error { return serve.Run(ctx, f.cfg.StateDir, handler) },
		func(ctx context.Context) error { return f.serve(ctx, clientTLS) },
		func(ctx context.Context) error {
			pairing.Go(func() { paired <- f.runPair(pairCtx) })
			select {
			case err := <-paired:
				return err
			case <-ctx.Done():
				return nil
			}
		},
	)
}

// exportTLS are the settings of nbds listeners, nil when there is none.
func (f *Frontend) exportTLS() (*tls.Config, error) {
	for _, e := range f.cfg.Exports {
		if strings.HasPrefix(e, "nbds") {
			return pki.NBDServerTLS(f.cfg.PKI, f.cfg.Name, f.cfg.VerifyClients)
		}
	}
	return nil, nil
}

// near asks the volume behind dev whether a read needs the link.
func near(dev block.Device, off, n int64) bool {
	v, ok := dev.(*stack.Volume)
	return ok && v.Near(off, n)
}

// newGrace is how long the exports wait for volumes that are new, where there
// are others that can be served already.
const newGrace = 5 * time.Second

// serve opens the volumes, those known from before at once and new ones when
// the backend has described them, and then the exports: a client that can
// connect finds its disk. A new volume does not hold back those that are known
// for longer than newGrace; its workload has not begun, theirs have.
func (f *Frontend) serve(ctx context.Context, clientTLS *tls.Config) error {
	for _, name := range f.cfg.Volumes {
		phase, err := stack.Ended(f.fs, f.volumeDir(name))
		if err != nil {
			return fmt.Errorf("volume %s: %w", name, err)
		}
		if phase != "" {
			f.log.Warn("this volume is over and is not opened; for another move of it, take another --state", "volume", name, "phase", phase)
			f.mu.Lock()
			f.over[name] = phase
			f.mu.Unlock()
			continue
		}
		meta, err := stack.ReadMeta(f.fs, f.volumeDir(name))
		if block.KindOf(err) == block.KindNotFound {
			continue
		}
		if err == nil {
			err = f.openVolume(ctx, meta)
		}
		if err != nil {
			return fmt.Errorf("volume %s: %w", name, err)
		}
	}
	missing := f.missing()
	first := missing > 0 && f.openCount() == 0
	opened := make(chan struct{})
	var grace <-chan time.Time
	switch {
	case missing == 0:
		f.allOpen.Do(func() { close(opened) }) // a restart: what is held is served even if the backend is away
	case !first:
		grace = time.After(newGrace)
	}
	return daemon.Tree(ctx,
		func(ctx context.Context) error { return f.connect(ctx, clientTLS, first, opened) },
		func(ctx context.Context) error {
			select {
			case <-opened:
			case <-grace:
				f.log.Warn("a new volume waits for the backend; serving the others")
			case <-ctx.Done():
				return nil
			}
			return daemon.Tree(ctx, f.exports, f.ship)
		})
}

func (f *Frontend) openCount() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.volumes)
}

// missing is how many volumes the backend has yet to describe.
func (f *Frontend) missing() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.cfg.Volumes) - len(f.volumes) - len(f.over)
}

func (f *Frontend) volumeDir(name string) string {
	return filepath.Join(f.cfg.StateDir, "volumes", pathName(name))
}

// pathName is a volume's name as that of a file.
func pathName(name string) string { return url.PathEscape(name) }

func (f *Frontend) openVolume(ctx context.Context, meta stack.Meta) error {
	log := f.log.With("volume", meta.Volume)
	v, err := stack.Open(ctx, meta, stack.Options{
		FS: f.fs, Dir: f.volumeDir(meta.Volume),
		ScratchDir: f.scratchDir(meta.Volume),
		Store:      f.store, Memory: f.memory, ScratchBytes: f.cfg.ScratchBytes,
		FillPaused: f.cfg.FillPaused, FillLimit: f.cfg.FillLimit,
		Limiter: f.qos.limiter, Ready: f.cfg.QoS == api.QoSReady,
		Reserved: []string{f.cfg.StateDir}, OnSwitched: f.switched, Log: log,
		Pair: f.stackPair(meta.Volume), Isolated: f.cfg.Policy == api.PolicyIsolated,
	})
	if err != nil {
		return err
	}
	f.mu.Lock()
	f.volumes[meta.Volume] = v
	v.SetPeerUp(f.peerIsUp)
	f.mu.Unlock()
	f.pair.mux.Add(v.Replica())
	log.Info("volume is open", "size", meta.SizeBytes, "chunk", meta.ChunkBytes, "primary", v.Status().Primary)
	return nil
}

// connect reaches the backend, however long that takes, and gives each volume
// its far end. It opens the volumes that are new and closes opened when all
// are, unless all were before. At the first start of all, what waiting does not
// help with is an error. Later it is a problem of that volume alone: workloads
// run on the others, and on what is here.
func (f *Frontend) connect(ctx context.Context, clientTLS *tls.Config, first bool, opened chan struct{}) error {
	if !f.needsBackend() {
		<-ctx.Done()
		return nil
	}
	client, err := f.dial(ctx, clientTLS, first)
	if client == nil {
		return err
	}
	f.setProblem("", "")
	g, gctx := errgroup.WithContext(ctx)
	for _, name := range f.cfg.Volumes {
		if f.ended(name) != "" {
			continue
		}
		g.Go(func() error {
			err := f.attach(gctx, client, name)
			for err != nil && gctx.Err() == nil && !first {
				if f.setProblem(name, err.Error()) {
					f.log.Error("the volume cannot use the backend; serving what is here, asking again", "volume", name, "err", err)
				}
				sleep(gctx, attachRetry)
				err = f.attach(gctx, client, name)
			}
			if gctx.Err() != nil {
				return nil
			}
			if err != nil {
				return fmt.Errorf("volume %s: %w", name, err)
			}
			f.setProblem(name, "")
			if f.missing() == 0 {
				f.allOpen.Do(func() { close(opened) })
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// attachRetry is how often a backend that cannot serve a volume is asked again.
const attachRetry = 5 * time.Second

func (f *Frontend) needsBackend() bool {
	if f.missing() > 0 {
		return true
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, v := range f.volumes {
		if !v.Switched() {
			return true
		}
	}
	return false
}

// switched hangs up on the backend when no volume needs it any more.
func (f *Frontend) switched() {
	if !f.needsBackend() {
		f.log.Info("no volume needs the backend any more")
		f.hangUp()
	}
}

func (f *Frontend) hangUp() {
	f.mu.Lock()
	c := f.client
	f.client = nil
	f.mu.Unlock()
	if c != nil {
		_ = c.Close() // what it may fail with concerns nobody now
	}
}

// setProblem notes why a volume, or with no name the backend, cannot be used;
// no text ends it. It says whether that is news.
func (f *Frontend) setProblem(volume, text string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	news := f.problems[volume] != text
	f.problems[volume] = text
	return news
}

func (f *Frontend) dial(ctx context.Context, clientTLS *tls.Config, first bool) (*wire.Client, error) {
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, 2*time.Second) {
		c, err := wire.Dial(ctx, wire.ClientOptions{Addr: f.cfg.Backend, TLS: clientTLS, Node: f.cfg.Name,
			BackgroundConns: f.cfg.BackgroundConns, BackgroundAddr: f.cfg.BackendBackground, Socket: f.cfg.Socket, Log: f.log})
		if err == nil {
			f.mu.Lock()
			f.client = c
			f.mu.Unlock()
			return c, nil
		}
		if ctx.Err() != nil {
			return nil, nil
		}
		if k := block.KindOf(err); first && (k == block.KindDenied || k == block.KindInvalid || k == block.KindUnsupported) {
			return nil, err
		}
		if f.problem("") == "" {
			f.log.Warn("the backend cannot be reached; trying on", "backend", f.cfg.Backend, "err", err)
		}
		f.setProblem("", "the backend cannot be reached: "+err.Error())
		select {
		case <-ctx.Done():
			return nil, nil
		case <-time.After(wait):
		}
	}
}

// problem is what concerns a volume: its own, or the backend's.
func (f *Frontend) problem(volume string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if p := f.problems[volume]; p != "" {
		return p
	}
	return f.problems[""]
}

func (f *Frontend) attach(ctx context.Context, client *wire.Client, name string) error {
	v := f.volume(name)
	if v != nil && v.Switched() {
		return nil
	}
	asked := name
	if f.cfg.Isolated {
		asked = name + "@" + f.cfg.Name // as it is now, whatever becomes of the source
	}
	remote, err := client.Open(ctx, asked)
	if err != nil {
		return err
	}
	if remote.SourceReadOnly() && f.cfg.Policy == api.PolicyWriteBack {
		return block.E("policy", name, block.KindReadOnly, errors.New("the source cannot be written, so nothing can be written back to it; say --policy isolated"))
	}
	if v == nil {
		meta, err := stack.Create(f.fs, f.volumeDir(name), name, remote)
		if err != nil {
			return err
		}
		if err := f.openVolume(ctx, meta); err != nil {
			return err
		}
		v = f.volume(name)
	}
	return v.Attach(remote)
}

func (f *Frontend) volume(name string) *stack.Volume {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.volumes[name]
}

func (f *Frontend) closeVolumes() error {
	f.mu.Lock()
	vols := f.volumes
	f.volumes = map[string]*stack.Volume{}
	f.mu.Unlock()
	var errs []error
	for _, v := range vols {
		errs = append(errs, v.Close())
	}
	return errors.Join(errs...)
}

// exports listens and serves NBD.
func (f *Frontend) exports(ctx context.Context) error {
	var lns []*nbd.Listener
	for _, e := range f.cfg.Exports {
		ln, err := f.nbd.Listen(e)
		if err != nil {
			for _, l := range lns {
				l.Close()
			}
			return err
		}
		lns = append(lns, ln)
	}
	f.mu.Lock()
	for _, l := range lns {
		f.uris = append(f.uris, l.URI())
	}
	f.mu.Unlock()
	daemon.Ready(f.log, "serving "+strings.Join(f.cfg.Volumes, ", "))
	return f.nbd.Serve(ctx, lns...)
}

// Lookup is nbd.Exports. The empty name is the only volume, if there is one.
func (f *Frontend) Lookup(name string) (block.Device, string, error) {
	if name == "" && len(f.cfg.Volumes) == 1 {
		name = f.cfg.Volumes[0]
	}
	v := f.volume(name)
	if v == nil {
		if phase := f.ended(name); phase != "" {
			return nil, "", block.E("export", name, block.KindNotFound, fmt.Errorf("the volume is over (%s)", phase))
		}
		if slices.Contains(f.cfg.Volumes, name) {
			return nil, "", block.E("export", name, block.KindUnavailable, errors.New("the volume is not open yet"))
		}
		return nil, "", block.E("export", name, block.KindNotFound,
			fmt.Errorf("there is no such volume; there is %s", strings.Join(f.cfg.Volumes, ", ")))
	}
	v.Seen()
	return v, "volume " + name + " of " + f.cfg.Name, nil
}

// List is nbd.Exports.
func (f *Frontend) List() []string { return f.cfg.Volumes }

// Node is serve.Daemon.
func (f *Frontend) Node() api.Node {
	limits := f.limits()
	f.mu.Lock()
	defer f.mu.Unlock()
	return api.Node{QoS: f.cfg.QoS, Limits: &limits, Name: f.cfg.Name, Role: api.RoleFrontend, Version: version.String(),
		UptimeS: int64(time.Since(f.started).Seconds()), Backend: f.cfg.Backend, Exports: f.uris,
		Peer: f.cfg.Peer, Zone: f.cfg.Zone, Arbiter: f.arbiterAddr()}
}

func (f *Frontend) arbiterAddr() string {
	if f.cfg.Peer == "" {
		return ""
	}
	return f.cfg.Arbiter
}
