package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"forerun/api/serve"
	"forerun/block"
	"forerun/daemon"
	"forerun/data/export/nbd"
	"forerun/data/failover"
	"forerun/data/replica"
	source "forerun/data/source/nbd"
	"forerun/disk"
	"forerun/internal/version"
)

const (
	// lookupTime is how long a client's greeting waits for a target.
	lookupTime = 15 * time.Second
	drainTime  = 5 * time.Second
	listTime   = time.Second // for one target to list its exports
	listAge    = 2 * time.Second
	maxExports = 1024
	maxConns   = 128
	maxBuffer  = 32 << 20 // bytes of requests under way, for each client
)

// Proxy is the daemon.
type Proxy struct {
	cfg     Config
	log     *slog.Logger
	started time.Time
	targets []source.Target
	export  string // the one that is served, empty for all the targets have
	nbd     *nbd.Server
	ctx     context.Context // of Run
	drain   time.Duration   // how long requests under way may take at the end

	mu     sync.Mutex
	closed bool               // guarded by mu
	open   map[string]*volume // guarded by mu: by name
	wg     sync.WaitGroup     // openings; Add under mu while not closed
	names  []string           // guarded by mu: what the targets listed last
	listed time.Time          // guarded by mu
	uris   []string           // guarded by mu: what is listened on
}

// volume is an export that was asked for.
type volume struct {
	name  string
	ready chan struct{} // closed when dev or err is set
	dev   *block.Checked
	fail  *failover.Device
	err   error
}

// New checks cfg and returns the daemon, which has done nothing yet.
func New(cfg Config) (*Proxy, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	targets, export, err := cfg.parse()
	if err != nil {
		return nil, err
	}
	return &Proxy{cfg: cfg, log: cfg.Log, targets: targets, export: export, open: map[string]*volume{}, drain: drainTime}, nil
}

// Run serves until ctx ends, then lets requests under way finish and hangs up.
func (p *Proxy) Run(ctx context.Context) (err error) {
	p.started = time.Now()
	if p.cfg.StateDir != "" {
		lock, err := daemon.Own(disk.OS(), p.cfg.StateDir)
		if err != nil {
			return err
		}
		defer lock.Close()
	}
	serverTLS, err := p.cfg.exportTLS()
	if err != nil {
		return err
	}
	// What was promised to clients is kept while they drain, so the devices
	// outlive ctx.
	var end context.CancelFunc
	p.ctx, end = context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		err = errors.Join(err, p.closeAll())
		end()
		p.wg.Wait()
	}()
	p.nbd = nbd.NewServer(nbd.Options{Exports: p, TLS: serverTLS, Log: p.log, MaxConns: maxConns, MaxBuffer: maxBuffer, DrainTimeout: p.drain})
	var lns []*nbd.Listener
	for _, e := range p.cfg.Exports {
		ln, err := p.nbd.Listen(e)
		if err != nil {
			for _, l := range lns {
				l.Close()
			}
			return err
		}
		lns = append(lns, ln)
	}
	p.mu.Lock()
	for _, l := range lns {
		p.uris = append(p.uris, l.URI())
	}
	p.mu.Unlock()
	p.log.Info("proxy starts", "targets", p.cfg.Targets, "export", p.export, "version", version.String())
	defer daemon.Stopping()
	parts := []func(context.Context) error{
		func(ctx context.Context) error { return p.nbd.Serve(ctx, lns...) },
		p.first,
	}
	if p.cfg.StateDir != "" {
		handler := serve.Handler(p, nil, version.String(), daemon.Metrics(p.Volumes))
		parts = append(parts, func(ctx context.Context) error { return serve.Run(ctx, p.cfg.StateDir, handler) })
	}
	return daemon.Tree(ctx, parts...)
}

// first opens the export that is named, before anybody asks for it. What no
// target could ever serve ends the daemon: waiting would not help.
func (p *Proxy) first(ctx context.Context) error {
	if p.export == "" {
		daemon.Ready(p.log, "serving what "+strings.Join(p.cfg.Targets, ", ")+" have")
		return nil
	}
	for {
		v, err := p.volume(p.export)
		if err == nil {
			select {
			case <-v.ready:
				err = v.err
			case <-ctx.Done():
				return nil
			}
		}
		switch {
		case err == nil:
			daemon.Ready(p.log, "serving "+p.export)
			return nil
		case ctx.Err() != nil:
			return nil
		case block.KindOf(err) != block.KindUnavailable:
			return err
		}
	}
}

// volume returns the volume of that name, which may be about to be opened.
func (p *Proxy) volume(name string) (*volume, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	v := p.open[name]
	switch {
	case p.closed:
		return nil, block.E("proxy", name, block.KindClosed, errors.New("the proxy is shutting down"))
	case v != nil:
		return v, nil
	case len(p.open) >= maxExports:
		return nil, block.E("proxy", name, block.KindBusy, fmt.Errorf("%d volumes are open already", maxExports))
	}
	v = &volume{name: name, ready: make(chan struct{})}
	p.open[name] = v
	p.wg.Go(func() { p.connect(v) })
	return v, nil
}

// connect opens v at any target. A volume that cannot be opened is forgotten.
func (p *Proxy) connect(v *volume) {
	ctx := p.ctx
	if p.export == "" { // else it is the only one there is, and tried for ever
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, lookupTime)
		defer cancel()
	}
	log := p.log.With("export", v.name)
	var ts []failover.Target
	for _, t := range p.targets {
		if p.export == "" {
			t.Export = v.name
		}
		ts = append(ts, failover.Target{Name: t.URI, Open: func(ctx context.Context) (failover.Door, error) {
			// A connection that was lost is for the device to replace, at whichever target.
			c, err := source.Open(ctx, t, source.Options{KeepsWrites: true, ReconnectTimeout: time.Millisecond, Log: log})
			if err != nil {
				return nil, err
			}
			return c, nil
		}})
	}
	// A copy of a change that a frontend has forwarded may still be on its way
	// when the change is repeated elsewhere; nothing may overwrite that before
	// the copy is too old to be carried out.
	dev, err := failover.Open(ctx, failover.Options{Volume: v.name, Targets: ts, ID: "proxy:" + v.name,
		Settle: replica.Stale + 100*time.Millisecond, Log: log})
	p.mu.Lock()
	defer p.mu.Unlock()
	defer close(v.ready)
	if err == nil && p.closed {
		p.wg.Go(func() { _ = dev.Close() }) // Run waits, and nobody else knows of it
		err = block.E("proxy", v.name, block.KindClosed, errors.New("the proxy is shutting down"))
	}
	if err != nil {
		v.err = err
		delete(p.open, v.name)
		return
	}
	v.fail, v.dev = dev, block.NewChecked("proxy "+v.name, dev)
}

// closeAll closes what is open.
func (p *Proxy) closeAll() error {
	p.mu.Lock()
	p.closed = true
	var devs []*block.Checked
	for _, v := range p.open {
		if v.dev != nil {
			devs = append(devs, v.dev)
		}
	}
	p.mu.Unlock()
	var errs []error
	for _, d := range devs {
		errs = append(errs, d.Close())
	}
	return errors.Join(errs...)
}

// Lookup is nbd.Exports.
func (p *Proxy) Lookup(name string) (block.Device, string, error) {
	if p.export != "" {
		if name != "" && name != p.export {
			return nil, "", block.E("export", name, block.KindNotFound, fmt.Errorf("there is no such export; there is %s", p.export))
		}
		name = p.export
	}
	v, err := p.volume(name)
	if err != nil {
		return nil, "", err
	}
	t := time.NewTimer(lookupTime)
	defer t.Stop()
	select {
	case <-v.ready:
	case <-p.ctx.Done():
		return nil, "", block.E("export", name, block.KindClosed, errors.New("the proxy is shutting down"))
	case <-t.C:
		return nil, "", block.E("export", name, block.KindUnavailable, errors.New("no target can be reached; its log says why"))
	}
	if v.err != nil {
		return nil, "", v.err
	}
	return v.dev, "volume " + name + " through a proxy", nil
}

// List is nbd.Exports: the export that is named, or those of the first target
// that tells.
func (p *Proxy) List() []string {
	if p.export != "" {
		return []string{p.export}
	}
	p.mu.Lock()
	names, fresh := p.names, time.Since(p.listed) < listAge
	p.mu.Unlock()
	if fresh {
		return names
	}
	for _, t := range p.targets {
		ctx, cancel := context.WithTimeout(p.ctx, listTime)
		got, err := source.List(ctx, t)
		cancel()
		if err != nil {
			p.log.Debug("a target does not list its exports", "target", t.URI, "err", err)
			continue
		}
		p.mu.Lock()
		p.names, p.listed = got, time.Now()
		p.mu.Unlock()
		return got
	}
	return names // as they were
}
