package frontend

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"

	"forerun/block"
	"forerun/daemon"
	"forerun/data/fence"
	"forerun/data/replica"
	"forerun/data/stack"
	"forerun/data/wire"
	"forerun/data/writeback"
	"forerun/internal/msg"
	"forerun/internal/pki"
)

// pair is how this node reaches its peer.
type pair struct {
	peer    *msg.Client // nil without a peer
	forward *msg.Client // calls of clients on their way to the primary
	mux     replica.Mux
	server  *wire.Server // for the peer
}

// Messages between the two daemons, beside those of package replica.
const (
	typAbout uint8 = 96 // volume → about, JSON
	typEnded uint8 = 97 // about with Ended: the primary has called the volume off
)

// about is what one node tells the other of a volume.
type about struct {
	Volume string `json:"volume"`
	Whole  bool   `json:"whole,omitempty"` // nothing is absent here
	Ended  string `json:"ended,omitempty"` // the phase it ended in
}

// openPair makes the clients of the peer, and of the backends and arbiters;
// runPair dials.
func (f *Frontend) openPair() error {
	client := func(addr, proto string, role pki.Role, up func(bool), to *backendLink) (*msg.Client, error) {
		c, err := pki.ClientTLS(f.cfg.PKI, f.cfg.Name, role)
		if err != nil {
			return nil, err
		}
		dial := msg.DialTLS(addr, proto, c)
		if to != nil {
			dial = f.dialWriteBack(to, c)
		}
		return msg.NewClient(msg.ClientOptions{Addr: addr, Dial: dial, Up: up,
			Conn: msg.Options{Idle: peerIdle, Log: f.log}, Log: f.log}), nil
	}
	var err error
	for i, b := range f.links {
		if b.back, err = client(b.addr, msg.ProtoWriteBack, pki.RoleBackend, nil, b); err != nil {
			return err
		}
		addr := b.addr
		switch {
		case f.cfg.Peer == "":
			continue
		case f.cfg.Arbiter != "" && i > 0:
			b.arbiter = f.links[0].arbiter
			continue
		case f.cfg.Arbiter != "":
			addr = f.cfg.Arbiter
		}
		if b.arbiter, err = client(addr, msg.ProtoArbiter, pki.RoleBackend, nil, nil); err != nil {
			return err
		}
	}
	if f.cfg.Peer == "" {
		return nil
	}
	if f.pair.peer, err = client(f.cfg.Peer, msg.ProtoPeer, pki.RoleFrontend, f.peerUp, nil); err != nil {
		return err
	}
	if f.pair.forward, err = client(f.cfg.Peer, msg.ProtoPeer, pki.RoleFrontend, nil, nil); err != nil {
		return err
	}
	serverTLS, err := pki.ServerTLS(f.cfg.PKI, f.cfg.Name, pki.RoleFrontend)
	if err != nil {
		return err
	}
	f.pair.server, err = wire.NewServer(wire.ServerOptions{TLS: serverTLS, Log: f.log, Node: f.cfg.Name, Lookup: f.chunks,
		Also: map[string]func(ctx context.Context, nc net.Conn, role, name string){msg.ProtoPeer: f.attend}})
	return err
}

// peerIdle is how long the peer, an arbiter and a backend may be silent on a
// connection before another one is made.
const peerIdle = 2 * time.Second

// runPair keeps the connections of the pair.
func (f *Frontend) runPair(ctx context.Context) error {
	var parts []func(context.Context) error
	for i, b := range f.links {
		parts = append(parts, b.back.Run, func(ctx context.Context) error { return f.watchSources(ctx, b) })
		if b.arbiter != nil && (i == 0 || b.arbiter != f.links[0].arbiter) {
			parts = append(parts, b.arbiter.Run)
		}
	}
	if f.pair.server != nil {
		ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", f.cfg.PeerListen)
		if err != nil {
			return block.E("listen", f.cfg.PeerListen, block.KindNone, err)
		}
		f.log.Info("serving the peer", "listen", ln.Addr().String(), "peer", f.cfg.Peer, "arbiter", cmp.Or(f.cfg.Arbiter, "each volume's backend"), "zone", f.cfg.Zone)
		parts = append(parts, f.pair.peer.Run, f.pair.forward.Run,
			func(ctx context.Context) error { return f.pair.server.Serve(ctx, ln) }, f.askPeer, f.fetchFromPeer, f.gather)
	}
	return daemon.Tree(ctx, parts...)
}

// stackPair is the volume's part in the pair, nil for a node alone.
func (f *Frontend) stackPair(volume string) *stack.Pair {
	if f.pair.peer == nil {
		return nil
	}
	return &stack.Pair{Node: f.cfg.Name, Fence: fence.NewClient(f.link(volume).arbiter, volume, f.cfg.Name),
		Peer: f.pair.peer, Forward: f.pair.forward, OnPeerLoss: f.cfg.OnPeerLoss, FailBackAfter: f.cfg.FailBackAfter}
}

// attend serves one connection of the peer.
func (f *Frontend) attend(ctx context.Context, nc net.Conn, _, name string) {
	c := msg.New(nc, msg.Options{Idle: peerIdle, Log: f.log, Serve: func(ctx context.Context, typ uint8, p []byte) ([]byte, error) {
		if replica.Serves(typ) {
			return f.pair.mux.Serve(ctx, name, typ, p)
		}
		var a about
		if err := json.Unmarshal(p, &a); err != nil {
			return nil, block.E("peer.serve", name, block.KindInvalid, fmt.Errorf("message type %d: %w", typ, err))
		}
		switch typ {
		case typAbout:
			return f.aboutVolume(a.Volume)
		case typEnded:
			return nil, f.endedAtPeer(a)
		}
		return nil, block.E("peer.serve", name, block.KindUnsupported, fmt.Errorf("message type %d is not known; do both nodes run the same version?", typ))
	}})
	_ = c.Run(ctx) // how it ended is the dialling side's to say
	c.Wait()
}

func (f *Frontend) aboutVolume(name string) ([]byte, error) {
	a := about{Volume: name, Ended: f.ended(name)}
	if v := f.volume(name); v != nil {
		a.Whole = !v.Switched() && v.Whole() // a native target is not a place to fill from
	}
	return json.Marshal(a)
}

// chunks finds a volume for the peer.
func (f *Frontend) chunks(name string) (wire.Served, error) {
	v := f.volume(name)
	if v == nil {
		return wire.Served{}, block.E("peer.open", name, block.KindUnavailable, errors.New("the volume is not open here"))
	}
	return wire.Served{Device: v.Chunks(), ChunkBytes: v.ChunkBytes()}, nil
}

func (f *Frontend) peerUp(up bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.peerIsUp = up
	for _, v := range f.volumes {
		v.SetPeerUp(up)
	}
}

// askEvery is how often a secondary asks whether the primary has everything.
const askEvery = 2 * time.Second

// askPeer has a secondary fill from the primary once that has everything:
// until then each chunk would cross the WAN twice. It also learns that a
// volume was called off.
func (f *Frontend) askPeer(ctx context.Context) error {
	tick := time.NewTicker(askEvery)
	defer tick.Stop()
	for {
		for _, v := range f.open() {
			standby := v.Standby()
			if standby {
				var a about
				q, _ := json.Marshal(about{Volume: v.Name()}) // a string always marshals
				c, cancel := context.WithTimeout(ctx, time.Second)
				if b, err := f.pair.peer.Call(c, typAbout, q); err == nil && json.Unmarshal(b, &a) == nil {
					standby = !a.Whole
				}
				cancel()
				if a.Ended != "" {
					if err := f.endedAtPeer(a); err != nil {
						f.log.Warn("a volume that the peer called off could not be removed here; trying on", "volume", a.Volume, "err", err)
					}
					continue
				}
			}
			v.SetStandby(standby)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// fetchFromPeer keeps a session for the peer's chunks.
func (f *Frontend) fetchFromPeer(ctx context.Context) error {
	cfg, err := pki.ClientTLS(f.cfg.PKI, f.cfg.Name, pki.RoleFrontend)
	if err != nil {
		return err
	}
	for ctx.Err() == nil {
		c, err := wire.Dial(ctx, wire.ClientOptions{Addr: f.cfg.Peer, TLS: cfg, Node: f.cfg.Name, BackgroundConns: 1,
			Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			sleep(ctx, askEvery)
			continue
		}
		open := map[string]*stack.Volume{}
		for ctx.Err() == nil {
			for _, v := range f.open() {
				if open[v.Name()] == v {
					continue
				}
				o, cancel := context.WithTimeout(ctx, 5*time.Second)
				r, err := c.OpenFor(o, v.Name(), f.domain(v.Name()).site)
				cancel()
				if err != nil {
					continue
				}
				if err := v.AttachPeer(r); err != nil {
					f.log.Warn("chunks are not taken from the peer", "volume", v.Name(), "err", err)
				}
				open[v.Name()] = v
			}
			sleep(ctx, askEvery)
		}
		for _, v := range f.open() {
			_ = v.AttachPeer(nil) // it only refuses another source
		}
		_ = c.Close() // it has nothing to fail with
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// maxGroupName is the most bytes in a group's name (package writeback).
const maxGroupName = 255

// group is a consistency group. Its volumes are of one backend.
type group struct {
	name    string
	volumes []string
}

// groups puts the volumes of this node into consistency groups: those that were
// named, and one of all the others of each backend.
func (c *Config) groups() []group {
	var out []group
	rest := map[string][]string{} // by backend
	for _, v := range c.Volumes {
		addr := c.backendOf(v)
		rest[addr] = append(rest[addr], v)
	}
	for name, vols := range c.Groups {
		out = append(out, group{name, vols})
		addr := c.backendOf(vols[0])
		rest[addr] = slices.DeleteFunc(rest[addr], func(v string) bool { return slices.Contains(vols, v) })
	}
	for _, vols := range rest {
		if len(vols) == 0 {
			continue
		}
		slices.Sort(vols)
		// Both nodes of a pair name it alike.
		name := strings.Join(vols, "+")
		if len(name) > maxGroupName {
			name = fmt.Sprintf("%x", sha256.Sum256([]byte(name)))
		}
		out = append(out, group{name, vols})
	}
	return out
}

// ship makes a shipper for each group and runs them. When a volume opens late
// they are made anew, for the cuts of its group to have it.
func (f *Frontend) ship(ctx context.Context) error {
	if f.cfg.Isolated {
		<-ctx.Done()
		return nil
	}
	for ctx.Err() == nil {
		round, cancel := context.WithCancel(ctx)
		err := f.shipAll(round, cancel)
		cancel()
		if err != nil && ctx.Err() == nil {
			return err
		}
	}
	return nil
}

// shipAll runs until a volume has opened that is in no shipper; it then calls late.
func (f *Frontend) shipAll(ctx context.Context, late func()) error {
	parts := []func(context.Context) error{func(ctx context.Context) error {
		for ctx.Err() == nil {
			sleep(ctx, askEvery)
			for _, v := range f.open() {
				if v.WriteBack() != nil && f.shipper(v.Name()) == nil {
					late()
				}
			}
		}
		return nil
	}}
	for _, g := range f.cfg.groups() {
		var in []writeback.Volume
		for _, n := range g.volumes {
			if v := f.volume(n); v != nil {
				if w := v.WriteBack(); w != nil {
					in = append(in, w)
				}
			}
		}
		if len(in) == 0 {
			continue
		}
		b := f.link(g.volumes[0])
		s, err := writeback.NewShipper(writeback.ShipperOptions{Group: g.name, Volumes: in, Backend: b.back,
			Interval: f.cfg.CheckpointInterval, MaxBytes: f.cfg.CheckpointBytes, Log: f.log,
			Pace: func(ctx context.Context, n int) error { return f.pace(ctx, b, n) }})
		if err != nil {
			return err
		}
		f.mu.Lock()
		for _, v := range in {
			f.shippers[v.Name()] = s
		}
		f.mu.Unlock()
		parts = append(parts, s.Run)
	}
	return daemon.Tree(ctx, parts...)
}

// demandWaits says whether the workload waits for what the line may bring: not
// for another backend that is away.
func (f *Frontend) demandWaits(to *backendLink) bool {
	for _, v := range f.open() {
		if !v.DemandWaits() {
			continue
		}
		b := f.link(v.Name())
		if c := f.session(b); b == to || c != nil && c.Stats().Up {
			return true
		}
	}
	return false
}

func (f *Frontend) shipper(volume string) *writeback.Shipper {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.shippers[volume]
}

// open returns the volumes that are open.
func (f *Frontend) open() []*stack.Volume {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]*stack.Volume, 0, len(f.volumes))
	for _, v := range f.volumes {
		out = append(out, v)
	}
	return out
}
