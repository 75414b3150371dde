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
	"sync/atomic"
	"time"

	"forerun/api"
	"forerun/api/serve"
	"forerun/block"
	"forerun/daemon"
	"forerun/data/cache"
	"forerun/data/export/nbd"
	"forerun/data/sched"
	"forerun/data/stack"
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

	domains map[string]*domain // by name, set before anything reads it
	memory  *cache.Memory
	nbd     *nbd.Server

	links []*backendLink // one for each backend, set by New

	mu       sync.Mutex
	volumes  map[string]*stack.Volume // guarded by mu: those that are open
	problems map[string]string        // guarded by mu: why a volume cannot be used
	stranded map[string]stranded      // guarded by mu: volumes that were cut over to what is not there
	uris     []string                 // guarded by mu: what is listened on

	begun begun // what serve and connect tell each other

	limiter  *sched.Limiter // of background and write-back, of all volumes
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
	return &Frontend{cfg: cfg, limiter: sched.NewLimiter(cfg.Limits), fs: disk.OS(), log: cfg.Log, links: newLinks(&cfg), volumes: map[string]*stack.Volume{}, problems: map[string]string{}, stranded: map[string]stranded{},
		begun: begun{some: make(chan struct{}), all: make(chan struct{})}, shippers: map[string]*writeback.Shipper{}, aborts: map[string]*abort{}, over: map[string]string{}}, nil
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
	defer func() { err = errors.Join(err, f.closeDomains()) }()
	if err := f.openDomains(); err != nil {
		return err
	}
	f.memory = cache.NewMemory(f.cfg.MemoryBytes)
	f.nbd = nbd.NewServer(nbd.Options{Exports: f, TLS: nbdTLS, Near: near, Log: f.log})
	// The link goes last: a read that waits for it may still be answered while
	// the exports drain.
	defer func() {
		for _, b := range f.links {
			f.hangUp(b)
		}
	}()
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
	f.log.Info("frontend starts", "backends", f.addresses(), "volumes", f.cfg.Volumes, "version", version.String())
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

// begun is what serve and connect tell each other.
type begun struct {
	first   bool          // no volume was open at the start
	serving atomic.Bool   // workloads may have come
	some    chan struct{} // closed when a volume is open
	all     chan struct{} // closed when every one is
	once    struct{ some, all sync.Once }
}

// told notes how many volumes are open.
func (f *Frontend) told() {
	if f.openCount() > 0 {
		f.begun.once.some.Do(func() { close(f.begun.some) })
	}
	if f.missing() == 0 {
		f.begun.once.all.Do(func() { close(f.begun.all) })
	}
}

// strict says whether what waiting does not help with ends the daemon: at the
// first start of all, until workloads may have come to what is served.
func (f *Frontend) strict() bool { return f.begun.first && !f.begun.serving.Load() }

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
		if err == nil && meta.Volume != name {
			err = block.E("volume", f.volumeDir(name), block.KindCorrupt, fmt.Errorf("this directory is of the volume %s; was it moved or copied by hand?", meta.Volume))
		}
		if err == nil {
			err = f.openVolume(ctx, meta)
		}
		if f.strand(meta, err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("volume %s: %w", name, err)
		}
	}
	f.begun.first = f.missing() > 0 && f.openCount() == 0 && len(f.allStranded()) == 0
	f.told() // after a restart what is held is served even if a backend is away
	parts := []func(context.Context) error{func(ctx context.Context) error {
		if !f.awaitOpen(ctx) {
			return nil
		}
		f.begun.serving.Store(true)
		return daemon.Tree(ctx, f.exports, f.ship)
	}}
	for _, b := range f.links {
		parts = append(parts, func(ctx context.Context) error { return f.connect(ctx, clientTLS, b) })
	}
	for _, p := range f.allStranded() {
		parts = append(parts, func(ctx context.Context) error { return f.awaitTarget(ctx, p) })
	}
	return daemon.Tree(ctx, parts...)
}

// awaitOpen waits until the volumes can be served, and says whether ctx let it.
func (f *Frontend) awaitOpen(ctx context.Context) bool {
	select {
	case <-f.begun.some:
	case <-f.begun.all:
	case <-ctx.Done():
		return false
	}
	grace := time.NewTimer(newGrace)
	defer grace.Stop()
	select {
	case <-f.begun.all:
	case <-grace.C:
		f.log.Warn("a new volume waits for its backend; serving the others")
	case <-ctx.Done():
		return false
	}
	return true
}

func (f *Frontend) openCount() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.volumes)
}

// missing is how many volumes are still to be waited for: those that their
// backends have yet to describe. What was cut over to a disk that is not there
// holds nothing back but itself.
func (f *Frontend) missing() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, name := range f.cfg.Volumes {
		_, stranded := f.stranded[name]
		_, open := f.volumes[name]
		if !open && f.over[name] == "" && !(stranded && len(f.volumes) > 0) {
			n++
		}
	}
	return n
}

func (f *Frontend) volumeDir(name string) string {
	return filepath.Join(f.cfg.StateDir, "volumes", pathName(name))
}

// pathName is a volume's name as that of a file.
func pathName(name string) string { return url.PathEscape(name) }

func (f *Frontend) openVolume(ctx context.Context, meta stack.Meta) error {
	log := f.log.With("volume", meta.Volume)
	d := f.domain(meta.Volume)
	v, err := stack.Open(ctx, meta, stack.Options{
		FS: f.fs, Dir: f.volumeDir(meta.Volume),
		ScratchDir: f.scratchDir(meta.Volume),
		Store:      d.store, Key: d.key, Memory: f.memory, ScratchBytes: f.cfg.ScratchBytes,
		FillPaused: f.cfg.FillPaused, FillLimit: f.cfg.FillLimit, Hold: d.full(f.cfg.StoreLimit), SkipFree: f.cfg.SkipFree,
		Limiter: f.limiter, Ready: f.cfg.QoS == api.QoSReady,
		Reserved: []string{f.cfg.StateDir}, OnSwitched: func() { f.leave(f.link(meta.Volume)) }, Log: log,
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

// connect reaches a backend, however long that takes, and gives each of its
// volumes its far end; it opens those that are new. At the first start of all,
// what waiting does not help with is an error. Later it is a problem of that
// volume alone: workloads run on the others, and on what is here.
func (f *Frontend) connect(ctx context.Context, clientTLS *tls.Config, b *backendLink) error {
	client, err := f.dial(ctx, clientTLS, b)
	if err != nil {
		return err
	}
	if client == nil {
		<-ctx.Done()
		return nil
	}
	g, gctx := errgroup.WithContext(ctx)
	for _, name := range b.volumes {
		if f.ended(name) != "" || f.isStranded(name) {
			continue
		}
		g.Go(func() error {
			err := f.attach(gctx, client, name)
			for err != nil && gctx.Err() == nil && !f.strict() && f.ended(name) == "" {
				if f.setProblem(name, err.Error()) {
					f.log.Error("the volume cannot use the backend; serving what is here, asking again", "volume", name, "backend", b.addr, "err", err)
				}
				sleep(gctx, attachRetry)
				err = f.attach(gctx, client, name)
			}
			if gctx.Err() != nil {
				return nil
			}
			if err != nil && f.ended(name) == "" {
				return fmt.Errorf("volume %s: %w", name, err)
			}
			f.setProblem(name, "")
			f.told()
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	f.leave(b) // the last of them may have switched while it was dialled
	<-ctx.Done()
	return nil
}

// attachRetry is how often a backend that cannot serve a volume is asked again.
const attachRetry = 5 * time.Second

// setProblem notes why a volume cannot be used; no text ends it. It says
// whether that is news.
func (f *Frontend) setProblem(volume, text string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	news := f.problems[volume] != text
	f.problems[volume] = text
	return news
}

// dial makes the session with a backend, nil when no volume needs it (any
// more) or ctx ends.
func (f *Frontend) dial(ctx context.Context, clientTLS *tls.Config, b *backendLink) (*wire.Client, error) {
	for wait := 100 * time.Millisecond; f.needs(b); wait = min(2*wait, 2*time.Second) {
		c, err := wire.Dial(ctx, wire.ClientOptions{Addr: b.addr, TLS: clientTLS, Node: f.cfg.Name,
			BackgroundConns: f.cfg.BackgroundConns, BackgroundAddr: b.background, Socket: f.cfg.Socket, Log: f.log})
		if err == nil {
			f.mu.Lock()
			b.client, b.problem = c, ""
			f.mu.Unlock()
			return c, nil
		}
		if ctx.Err() != nil {
			return nil, nil
		}
		if k := block.KindOf(err); f.strict() && (k == block.KindDenied || k == block.KindInvalid || k == block.KindUnsupported) {
			return nil, err
		}
		if f.setDown(b, fmt.Sprintf("the backend %s cannot be reached: %v", b.addr, err)) {
			f.log.Warn("the backend cannot be reached; trying on", "backend", b.addr, "err", err)
		}
		sleep(ctx, wait)
	}
	return nil, nil
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
	remote, err := client.OpenFor(ctx, asked, f.domain(name).site)
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
			return nil, "", block.E("export", name, block.KindUnavailable, f.notOpen(name))
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
		UptimeS: int64(time.Since(f.started).Seconds()), Backend: f.links[0].addr, Backends: f.addresses(), Exports: f.uris,
		Peer: f.cfg.Peer, Zone: f.cfg.Zone, Arbiter: f.arbiterAddr()}
}

// arbiterAddr is who decides for all volumes, empty when there is no one such.
func (f *Frontend) arbiterAddr() string {
	switch {
	case f.cfg.Peer == "" || f.cfg.Arbiter == "" && len(f.links) > 1:
		return ""
	case f.cfg.Arbiter != "":
		return f.cfg.Arbiter
	}
	return f.links[0].addr
}
