// Package backend is the daemon beside the source disk: it owns the disk,
// verifies who calls, and sends chunks, what is waited for first.
package backend

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
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
	"forerun/data/fsmap"
	"forerun/data/source"
	"forerun/data/wire"
	"forerun/data/writeback"
	"forerun/disk"
	"forerun/internal/chunk"
	"forerun/internal/pki"
	"forerun/internal/version"
)

// Config is what the daemon is told.
type Config struct {
	PKI      string // directory with ca.crt, NAME.crt, NAME.key
	Name     string // the node's, as in its certificate
	StateDir string
	Listen   string // HOST:PORT
	// ListenBackground and ListenWriteBack are more ports, for networks that
	// tell classes by their port; frontends learn them. Empty for none.
	ListenBackground, ListenWriteBack string
	// QoS is api.QoSReady or api.QoSLess, the default.
	QoS string
	// Socket marks the packets of each class.
	Socket  wire.SocketOptions
	Volumes []Volume
	// ChunkBytes is the chunk size of volumes that name none, 0 for
	// chunk.DefaultSize. Content has chunks cut into pieces by content where a
	// volume does not say.
	ChunkBytes int
	Content    bool
	// ReadOnly never changes a source: nothing is written back.
	ReadOnly bool
	// NoFSMap does not look for file systems on the sources.
	NoFSMap bool
	Log     *slog.Logger
}

// Volume names a source.
type Volume struct {
	Name   string
	Source string // what source.Open takes
	// ChunkBytes is the chunk size, 0 for the backend's.
	ChunkBytes int
	// Content has chunks cut by content, so that bytes that moved are found
	// again; nil is as the backend has it.
	Content *bool
}

// ParseVolume reads NAME=SOURCE.
func ParseVolume(s string) (Volume, error) {
	name, src, ok := strings.Cut(s, "=")
	if !ok || name == "" || src == "" {
		return Volume{}, fmt.Errorf("--volume %q is not NAME=SOURCE; example: web=/srv/images/web.raw", s)
	}
	if strings.ContainsAny(name, "/\x00") || name == "." || name == ".." || len(name) > 255 {
		return Volume{}, fmt.Errorf("--volume %q: a volume's name has no slash, is not . or .., and has at most 255 bytes", name)
	}
	return Volume{Name: name, Source: src}, nil
}

// Backend is the daemon.
type Backend struct {
	serve.Unsupported // of the orders for pairs, what only a frontend can carry out

	cfg     Config
	started time.Time
	open    map[string]*served // set before anything reads it
	names   []string
	server  *wire.Server
	addr    string // listened on; set before anything reads them
	bgAddr  string
	wbAddr  string
	home    home
	mu      sync.Mutex
}

type served struct {
	spec  Volume
	away  atomic.Pointer[string] // why calls of dev wait for its server, nil or empty when they do not
	dev   block.Device           // nil: it was given back in an earlier life
	watch *fsmap.Watched         // what the file systems do not use; nil without dev or with NoFSMap
	loss  *writeback.Loss        // guarded by Backend.mu: of an abort by force

	cutter *chunk.Cutter // nil: chunks are fixed
	memory *memory       // nil with dev
}

// New checks cfg and returns the daemon, which has done nothing yet.
func New(cfg Config) (*Backend, error) {
	if len(cfg.Volumes) == 0 {
		return nil, errors.New("no volume is given; say --volume NAME=SOURCE")
	}
	for _, m := range []struct{ flag, value string }{{"pki", cfg.PKI}, {"name", cfg.Name}, {"state", cfg.StateDir}, {"listen", cfg.Listen}} {
		if m.value == "" {
			return nil, fmt.Errorf("--%s is empty", m.flag)
		}
	}
	var err error
	if cfg.QoS, err = daemon.QoS(cfg.QoS); err != nil {
		return nil, err
	}
	if cfg.ChunkBytes == 0 {
		cfg.ChunkBytes = chunk.DefaultSize
	}
	for i := range cfg.Volumes {
		v := &cfg.Volumes[i]
		if v.ChunkBytes == 0 {
			v.ChunkBytes = cfg.ChunkBytes
		}
		if v.Content == nil {
			v.Content = &cfg.Content
		}
		if c := v.ChunkBytes; c < chunk.MinSize || c > chunk.MaxSize || c&(c-1) != 0 {
			return nil, fmt.Errorf("--chunk: the chunk size of volume %s, %d, is not a power of two from %d to %d", v.Name, c, chunk.MinSize, chunk.MaxSize)
		}
	}
	return &Backend{cfg: cfg, open: map[string]*served{}}, nil
}

// Run serves until ctx ends, then closes everything in order.
func (b *Backend) Run(ctx context.Context) (err error) {
	log := b.cfg.Log
	b.started = time.Now()
	lock, err := daemon.Own(disk.OS(), b.cfg.StateDir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := pki.CheckOwn(b.cfg.PKI, b.cfg.Name, pki.RoleBackend); err != nil {
		return err
	}
	tlsConfig, err := pki.ServerTLS(b.cfg.PKI, b.cfg.Name, pki.RoleFrontend)
	if err != nil {
		return err
	}
	if err := disk.OS().MkdirAll(b.socketDir()); err != nil {
		return block.E("state", b.socketDir(), block.KindNone, err)
	}
	// The receiver writes to the sources until it is closed.
	defer func() { err = errors.Join(err, b.closeHome(), b.closeSources()) }()
	if err := b.openHome(); err != nil {
		return err
	}
	if err := b.openSources(ctx); err != nil {
		return err
	}
	// What was promised is in the sources before anybody reads them.
	if err := b.home.receiver.Recover(ctx); err != nil {
		return err
	}
	var lns []net.Listener
	defer func() {
		for _, ln := range lns {
			ln.Close()
		}
	}()
	listen := func(addr string, at *string) (port uint16, err error) {
		if addr == "" {
			return 0, nil
		}
		ln, err := wire.Listen(ctx, addr)
		if err != nil {
			return 0, block.E("listen", addr, block.KindNone, err)
		}
		lns = append(lns, ln)
		*at = ln.Addr().String()
		return uint16(ln.Addr().(*net.TCPAddr).Port), nil
	}
	if _, err := listen(b.cfg.Listen, &b.addr); err != nil {
		return err
	}
	bgPort, err := listen(b.cfg.ListenBackground, &b.bgAddr)
	if err != nil {
		return err
	}
	wbPort, err := listen(b.cfg.ListenWriteBack, &b.wbAddr)
	if err != nil {
		return err
	}
	server, err := wire.NewServer(wire.ServerOptions{TLS: tlsConfig, Log: log, Node: b.cfg.Name, Lookup: b.lookup, Also: b.also(),
		Ready: b.cfg.QoS == api.QoSReady, BackgroundPort: bgPort, WriteBackPort: wbPort, Socket: b.cfg.Socket})
	if err != nil {
		return err
	}
	b.server = server
	handler := serve.Handler(b, nil, version.String(), daemon.Metrics(b.Volumes), b)
	log.Info("backend serves", "listen", b.addr, "volumes", b.names, "version", version.String())
	daemon.Ready(log, "serving on "+b.addr)
	defer daemon.Stopping()
	parts := []func(context.Context) error{b.learn, func(ctx context.Context) error { return serve.Run(ctx, b.cfg.StateDir, handler) }}
	for _, ln := range lns {
		parts = append(parts, func(ctx context.Context) error { return b.server.Serve(ctx, ln) })
	}
	return daemon.Tree(ctx, parts...)
}

// socketDir is where the private sockets of supervised programs are.
func (b *Backend) socketDir() string { return filepath.Join(b.cfg.StateDir, "sources") }

func (b *Backend) openSources(ctx context.Context) error {
	for _, v := range b.cfg.Volumes {
		if b.open[v.Name] != nil {
			return fmt.Errorf("volume %s is given twice", v.Name)
		}
		if b.home.receiver.Released(v.Name) {
			b.open[v.Name] = &served{spec: v}
			b.names = append(b.names, v.Name)
			b.cfg.Log.Warn("the move of this volume was called off; its source is not opened (forerun discard forgets that)", "volume", v.Name)
			continue
		}
		s := &served{spec: v}
		dev, err := source.Open(ctx, v.Source, source.Options{
			Log:      b.cfg.Log.With("volume", v.Name),
			OnState:  func(why string) { s.away.Store(&why) },
			StateDir: b.socketDir(),
			ReadOnly: b.cfg.ReadOnly, WriteImages: !b.cfg.ReadOnly,
		})
		if err != nil {
			return fmt.Errorf("volume %s: %w", v.Name, err)
		}
		s.dev = block.NewChecked("source "+v.Name, dev)
		if !b.cfg.NoFSMap {
			s.watch = fsmap.Watch(s.dev)
			s.dev = s.watch
		}
		b.open[v.Name] = s
		b.names = append(b.names, v.Name)
		if err := b.remember(s); err != nil {
			return fmt.Errorf("volume %s: %w", v.Name, err)
		}
		i := dev.Info()
		b.cfg.Log.Info("source is owned", "volume", v.Name, "source", v.Source, "size", i.Size, "read_only", i.ReadOnly)
	}
	slices.Sort(b.names)
	return nil
}

func (b *Backend) closeSources() error {
	var errs []error
	for _, s := range b.open {
		errs = append(errs, s.close())
	}
	return errors.Join(errs...)
}

// close ends what is remembered of the source, and the source.
func (s *served) close() error {
	var err error
	if s.memory != nil {
		err = s.memory.close(s.dev)
	}
	if s.dev != nil {
		err = errors.Join(err, s.dev.Close())
	}
	return err
}

func (b *Backend) lookup(volume string) (wire.Served, error) {
	name, clone, ok := writeback.ParseClone(volume)
	if !ok || b.open[volume] != nil {
		dev, err := b.source(volume)
		if err != nil {
			return wire.Served{}, err
		}
		s := b.open[volume]
		return wire.Served{Device: dev, ChunkBytes: s.spec.ChunkBytes, Signatures: s.memory, Cutter: s.cutter}, nil
	}
	dev, err := b.clone(name, clone)
	if err != nil {
		return wire.Served{}, err
	}
	// What is remembered is of the source as it is, not as it was when the clone began.
	return wire.Served{Device: dev, ChunkBytes: b.open[name].spec.ChunkBytes, Cutter: b.open[name].cutter}, nil
}

func (b *Backend) unknown(volume string) error {
	return block.E("open", volume, block.KindNotFound,
		fmt.Errorf("this backend has no such volume; it has %s", strings.Join(b.names, ", ")))
}

// Node is serve.Daemon.
func (b *Backend) Node() api.Node {
	return api.Node{Name: b.cfg.Name, Role: api.RoleBackend, Version: version.String(),
		UptimeS: int64(time.Since(b.started).Seconds()), Listen: b.addr,
		QoS: b.cfg.QoS, ListenBackground: b.bgAddr, ListenWriteBack: b.wbAddr}
}

// Volumes is serve.Daemon.
func (b *Backend) Volumes() []api.Volume {
	out := make([]api.Volume, 0, len(b.names))
	for _, n := range b.names {
		out = append(out, b.status(b.open[n]))
	}
	return out
}

// Volume is serve.Daemon.
func (b *Backend) Volume(name string) (api.Volume, error) {
	s := b.open[name]
	if s == nil {
		return api.Volume{}, b.unknown(name)
	}
	return b.status(s), nil
}

func (b *Backend) status(s *served) api.Volume {
	var i block.Info
	if s.dev != nil {
		i = s.dev.Info()
	}
	st := b.server.Stats()
	v := api.Volume{
		Volume: s.spec.Name, Role: api.RoleBackend, Phase: api.PhaseServing, Primary: api.PrimarySource,
		SizeBytes: i.Size, ChunkBytes: int64(s.spec.ChunkBytes), Source: s.spec.Source, ReadOnly: i.ReadOnly,
		Clients: st.Sessions,
		WAN: api.WAN{DemandBytes: st.DemandBytes, BackgroundBytes: st.BackgroundBytes, SentBytes: st.SentBytes,
			ReceivedBytes: st.ReceivedBytes, Connected: st.Sessions > 0},
		Fill: api.Fill{State: "stopped", ETAS: -1}, Cutover: api.Cutover{State: "idle"},
	}
	v.Sending = &api.Sending{QoS: b.cfg.QoS,
		Queued: int64(st.Queued), QueuedBackground: int64(st.QueuedBackground),
		Reads: int64(st.DemandReads + st.BackgroundReads), ReadsLimit: int64(st.Workers),
		BackgroundReads: int64(st.BackgroundReads), BackgroundReadsLimit: int64(st.BackgroundReadsLimit),
		BackgroundReadsFloor: int64(st.BackgroundReadsFloor), SourceReadUs: st.SourceDelay.Microseconds(),
		SendQueueBytes: st.SendQueueBytes, PaceBytes: st.PaceBytes,
		QueueUs: st.PaceDelay.Microseconds(), QueueTargetUs: st.PaceTarget.Microseconds(),
		FloorUs: st.FloorInterval.Microseconds(), Yields: st.Yielded}
	packing(st, v.Sending)
	if why := b.sourceAway(s.spec.Name); why != "" {
		v.Waiting = "the source does not answer: " + why
	}
	v.Dedup = api.Dedup{Chunking: "fixed", Chunks: st.SameChunks + st.Announced, HashedBytes: st.HashedBytes}
	if s.cutter != nil {
		v.Dedup.Chunking = "content"
	}
	if s.memory != nil {
		data, zero := s.memory.table.Known()
		scan := s.memory.scan.Stats()
		v.Dedup.KnownChunks, v.Dedup.Scan = data+zero, string(scan.State)
		v.Dedup.HashedBytes += scan.Hashed
	}
	b.pairStatus(s, &v)
	fsStatus(s.watch, &v)
	return v
}
