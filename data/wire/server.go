package wire

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
	"forerun/internal/msg"
	"forerun/internal/pki"
)

// ServerOptions says what a Server serves and how much it takes on. TLS and
// Lookup are needed, zero elsewhere means the default.
type ServerOptions struct {
	// TLS must ask for and verify client certificates (pki.ServerTLS does).
	TLS *tls.Config
	Log *slog.Logger // changes of state; none if nil
	// Node is this backend's name, told to clients.
	Node string
	// Lookup finds a volume. It is called at each OPEN, also again after a
	// reconnect. What it returns stays the caller's; the device must not be
	// closed while the server runs.
	Lookup func(volume string) (Served, error)
	// Authorize says whether a peer, known by its certificate's role and name,
	// may open a volume; nil allows all peers TLS lets in.
	Authorize func(role, name, volume string) error
	// Workers is how many reads of a source may be under way, default 32. Up to
	// three quarters of them serve background.
	Workers int
	// Codec packs chunks; the zero value leaves the choice to what limits a
	// session, its link or the processors. NoCompression sends
	// all but zeros as they are.
	Codec         chunk.Codec
	NoCompression bool
	// Credit is how many chunks may be outstanding on one connection, default 4096.
	Credit int
	// Floor is the longest that the next background chunk of a session waits for
	// demand, default 50 ms: background never starves. Where that is more than a
	// sixteenth of what the way to the client carries, it is that sixteenth.
	Floor time.Duration
	// Ready says that the network keeps the classes apart, by port or mark:
	// background is sent as it comes. Without it background makes room here.
	Ready bool
	// BackgroundFloor is how many background reads of sources may always be
	// under way, default 2, however much demand there is.
	BackgroundFloor int
	// BackgroundPort and WriteBackPort are told to clients as the ports for these
	// classes, for networks that know traffic by its port; 0: the same port.
	BackgroundPort, WriteBackPort uint16
	// Ping is the interval of pings, default 1 s; a connection without a byte
	// for Idle, default 10 s, is given up.
	Ping, Idle time.Duration
	// Handshake bounds TLS handshake and hello together, default 5 s. At most
	// MaxPending connections, default 64, may be in it: a newer one pushes the
	// oldest out.
	Handshake  time.Duration
	MaxPending int
	// MaxSessions is the number of sessions at a time, default 256.
	MaxSessions int
	// MaxHeld is how many chunks of a client's site are kept in mind, default
	// 32 Mi at 10 to 22 bytes each. What is beyond is sent as data.
	MaxHeld int
	Socket  SocketOptions
	// Also are other protocols on the same port, by their names in the TLS
	// handshake: a connection of theirs is handed over after it, with role and
	// name of the client's certificate, and closed when the function returns.
	// That has to be soon after ctx has ended.
	Also map[string]func(ctx context.Context, nc net.Conn, role, name string)
}

// Served is a volume as a Server serves it.
type Served struct {
	Device     block.Device
	ChunkBytes int // a power of two from chunk.MinSize to chunk.MaxSize
	// Signatures remembers what chunks hold; nil remembers nothing.
	Signatures Signatures
	// Cutter cuts chunks into pieces by content, nil does not. It was made for
	// ChunkBytes. Signatures are those of recipes then, with the zero key.
	Cutter *chunk.Cutter
}

// Signatures remembers the SHA-256 of chunks (with a Cutter, Cutter.Sum), so that what is known needs
// neither be read nor hashed again. It may forget at any time, and must
// when a chunk changes. It may be called from many goroutines.
type Signatures interface {
	// Get returns what chunk i holds: zeros only, or bytes of that SHA-256;
	// not ok when it is not known.
	Get(i int64) (sig chunk.Sig, zero, ok bool)
	// Token is taken before chunk i is read, for Learn.
	Token(i int64) uint64
	// Learn remembers what was read of chunk i, unless it changed since the token was taken.
	Learn(i int64, token uint64, sig chunk.Sig, zero bool)
	// Wait returns when more is known than was when it last returned seen, 0
	// for never, with a new value for seen. Its callers want to know of chunks
	// that nobody reads: it is the sign to read ahead of them.
	Wait(ctx context.Context, seen uint64) (now uint64, err error)
}

// Server serves volumes to clients. Make it with NewServer.
type Server struct {
	o       ServerOptions
	tls     *tls.Config
	log     *slog.Logger
	leases  leases
	seals   chan struct{} // one token per background chunk being sealed
	fewer   chan struct{} // another one for those begun while there was demand
	held    atomic.Int64  // nanoseconds that all places for sealing were taken
	started time.Time
	traffic traffic
	hashed  atomic.Int64 // bytes

	mu         sync.Mutex
	q          queue
	scratch    []*item
	running    [2]int // source reads under way: demand, background
	loads      map[block.Device]*load
	sessions   map[sessionID]*session
	pending    []net.Conn // not yet authenticated, oldest first
	demandBusy int        // demand jobs that are queued, read, or being sent
	demandDue  int        // those of them that are ready to be sent, or being sent
	lastDemand time.Time  // when one arrived or left
	lastRefuse time.Time  // when a refused connection was logged
	stats      ServerStats
}

// NewServer checks the options and makes a Server.
func NewServer(o ServerOptions) (*Server, error) {
	bad := func(format string, args ...any) (*Server, error) {
		return nil, &block.Error{Op: "wire.server", Kind: block.KindInvalid, Err: fmt.Errorf(format, args...)}
	}
	switch {
	case o.TLS == nil:
		return bad("TLS settings are needed")
	case o.TLS.ClientAuth == tls.NoClientCert || o.TLS.ClientAuth == tls.RequestClientCert:
		return bad("the TLS settings do not ask for client certificates")
	case o.Lookup == nil:
		return bad("a Lookup function is needed")
	case o.Codec > chunk.S2:
		return bad("codec %d cannot pack", o.Codec)
	case o.Also[alpn] != nil:
		return bad("%s is this server's own protocol", alpn)
	case len(o.Node) > maxName:
		return bad("a node name of %d bytes", len(o.Node))
	}
	if o.NoCompression {
		o.Codec = chunk.Raw
	}
	def(&o.Workers, 32)
	def(&o.Credit, 4096)
	def(&o.Floor, 50*time.Millisecond)
	def(&o.BackgroundFloor, 2)
	def(&o.Ping, time.Second)
	def(&o.Idle, 10*time.Second)
	def(&o.Handshake, 5*time.Second)
	def(&o.MaxPending, 64)
	def(&o.MaxSessions, 256)
	def(&o.MaxHeld, 32<<20)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{o: o, log: o.Log, sessions: map[sessionID]*session{}, loads: map[block.Device]*load{}, started: time.Now(),
		seals: make(chan struct{}, runtime.GOMAXPROCS(0)), fewer: make(chan struct{}, max(1, runtime.GOMAXPROCS(0)-1))}
	s.tls = o.TLS.Clone()
	s.tls.MinVersion = tls.VersionTLS13
	s.tls.NextProtos = append([]string{alpn}, slices.Sorted(maps.Keys(o.Also))...)
	s.tls.DynamicRecordSizingDisabled = true
	return s, nil
}

// def sets *p to d where it is not positive.
func def[T int | time.Duration](p *T, d T) {
	if *p <= 0 {
		*p = d
	}
}

// DemandWaits says whether a chunk is under way that a workload waits for.
func (s *Server) DemandWaits() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.demandBusy > 0
}

// Serve accepts connections from ln until ctx ends, which returns nil, or ln
// fails. It closes ln and returns when everything it began has ended. Several
// listeners may be served at once.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	var pause time.Duration
	for {
		nc, err := ln.Accept()
		switch {
		case err == nil:
			pause = 0
			wg.Go(func() { s.serveConn(ctx, &wg, nc) })
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return block.E("wire.accept", ln.Addr().String(), block.KindClosed, err)
		default:
			// Out of file descriptors, or a connection that was gone before it was
			// accepted: both pass.
			if pause == 0 {
				s.log.Warn("cannot accept connections", "addr", ln.Addr().String(), "err", err)
			}
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
		}
	}
}

// serveConn takes one connection from its first byte to its last.
func (s *Server) serveConn(ctx context.Context, wg *sync.WaitGroup, nc net.Conn) {
	s.admit(nc)
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	c, other, err := s.greet(ctx, wg, nc)
	s.settled(nc)
	if err != nil {
		stop()
		nc.Close()
		s.refused(nc, err)
		return
	}
	if !stop() {
		nc.Close() // ctx ended meanwhile
	}
	if other != nil {
		defer nc.Close()
		other(ctx)
		return
	}
	said := make(chan struct{})
	stop = context.AfterFunc(ctx, func() { defer close(said); c.bye() })
	c.run()
	if !stop() {
		<-said
	}
}

// admit counts a connection among the unauthenticated ones. When there are too
// many the oldest has to go: one that dawdles cannot keep others out.
func (s *Server) admit(nc net.Conn) {
	var out net.Conn
	s.mu.Lock()
	if s.pending = append(s.pending, nc); len(s.pending) > s.o.MaxPending {
		out = s.pending[0]
		s.pending = slices.Delete(s.pending, 0, 1)
		s.stats.Refused++
	}
	s.mu.Unlock()
	if out != nil {
		out.Close()
	}
}

func (s *Server) settled(nc net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.pending, nc); i >= 0 {
		s.pending = slices.Delete(s.pending, i, i+1)
	}
}

// refused logs why, at most once a second: anybody can cause it.
func (s *Server) refused(nc net.Conn, err error) {
	s.mu.Lock()
	s.stats.Refused++
	now := time.Now()
	say := now.Sub(s.lastRefuse) >= time.Second
	if say {
		s.lastRefuse = now
	}
	s.mu.Unlock()
	if say {
		s.log.Warn("connection refused", "peer", nc.RemoteAddr().String(), "err", err)
	}
}

// greet does the TLS handshake. A connection of another protocol is done with
// then, and the function is who takes it over.
func (s *Server) greet(ctx context.Context, wg *sync.WaitGroup, nc net.Conn) (c *sconn, other func(context.Context), err error) {
	nc.SetDeadline(time.Now().Add(s.o.Handshake))
	counted := &countedConn{Conn: nc, t: &s.traffic}
	tc := tls.Server(counted, s.tls)
	if err := tc.HandshakeContext(ctx); err != nil {
		return nil, nil, pki.Explain(err)
	}
	cs := tc.ConnectionState()
	if len(cs.PeerCertificates) == 0 || len(cs.VerifiedChains) == 0 {
		return nil, nil, &block.Error{Op: "wire.handshake", Kind: block.KindDenied, Err: errors.New("the client showed no certificate")}
	}
	if take := s.o.Also[cs.NegotiatedProtocol]; take != nil {
		class := block.Demand
		if cs.NegotiatedProtocol == msg.ProtoWriteBack {
			class = block.WriteBack
		}
		s.o.Socket.Apply(nc, class)
		nc.SetDeadline(time.Time{})
		role, name := pki.PeerIdentity(cs)
		return nil, func(ctx context.Context) { take(ctx, tc, role, name) }, nil
	}
	c, err = s.hello(ctx, wg, nc, tc, cs)
	return c, nil, err
}

// hello reads the client's hello, and enters the connection into its session.
func (s *Server) hello(ctx context.Context, wg *sync.WaitGroup, nc net.Conn, tc *tls.Conn, cs tls.ConnectionState) (*sconn, error) {
	pr := &patientReader{conn: tc}
	br := newFrameReader(pr)
	h, err := readHello(br)
	if err != nil {
		return nil, err
	}
	c := &sconn{s: s, ctx: ctx, wg: wg, nc: nc, tc: tc, pr: pr, br: br, role: h.role, index: h.index, node: h.node,
		volumes: map[uint16]*servedVolume{}, wake: make(chan struct{}, 1), done: make(chan struct{}), hinted: make(chan struct{}, 1)}
	c.own.of = c
	c.peerRole, c.peerName = pki.PeerIdentity(cs)
	refuse := func(err error) (*sconn, error) {
		tc.Write(appendError(nil, 0, 0, wireError{kind: block.KindOf(err), text: err.Error()}))
		return nil, err
	}
	version, err := chooseVersion(h)
	if err != nil {
		return refuse(err)
	}
	s.o.Socket.apply(nc, h.role)
	c.roams = c.role == roleBackground && h.features&featureRoams != 0
	if err := s.attach(c, h.session); err != nil {
		return refuse(err)
	}
	w := welcome{version: version, features: h.features & featureRoams, credit: uint32(s.o.Credit), idle: s.o.Idle, node: s.o.Node,
		backgroundPort: s.o.BackgroundPort, writeBackPort: s.o.WriteBackPort, paced: c.tcp != nil && !s.o.Ready}
	if _, err := tc.Write(appendWelcome(nil, w)); err != nil {
		s.detach(c)
		return nil, err
	}
	nc.SetDeadline(time.Time{})
	return c, nil
}

// attach enters c into its session, makes the session if there is none, and
// takes the place of an older connection with the same role and index: its
// client has given that one up.
func (s *Server) attach(c *sconn, id sessionID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	ss := s.sessions[id]
	if ss == nil {
		if len(s.sessions) >= s.o.MaxSessions {
			return &block.Error{Op: "wire.hello", Object: c.node, Kind: block.KindBusy,
				Err: fmt.Errorf("this backend has %d sessions already", len(s.sessions))}
		}
		ss = s.newSession(id, c)
		s.stats.SessionsBegun++
	}
	if ss.role != c.peerRole || ss.name != c.peerName {
		return &block.Error{Op: "wire.hello", Object: c.node, Kind: block.KindDenied, Err: errors.New("the session belongs to somebody else")}
	}
	at := c.slot()
	if old := ss.conns[at]; old != nil {
		s.kill(old)
		ss = s.sessions[id]
		if ss == nil { // old was its last connection
			ss = s.newSession(id, c)
		}
		c.wg.Go(func() { old.nc.Close() }) // wakes its reader, which cleans up
	}
	c.sess = ss
	if c.tcp = newTCPSocket(c.nc); c.tcp != nil && !s.o.Ready {
		ss.paced = true
	}
	ss.conns[at] = c
	ss.live++
	return nil
}

func (s *Server) newSession(id sessionID, c *sconn) *session {
	ss := &session{pacing: pacing{chooses: s.o.Socket.Congestion == ""}, id: id, role: c.peerRole, name: c.peerName, jobs: map[jobKey]*job{}, early: map[jobKey]time.Time{},
		pack: newChooser(s.o.Codec, s.o.NoCompression),
		held: map[uint8]*view{}, told: map[uint16]told{}}
	s.sessions[id] = ss
	return ss
}

func (s *Server) detach(c *sconn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kill(c)
}

// kill ends a connection's part in its session: what was to be sent on it is
// dropped, since its client will ask again. Server.mu is held; closing the
// socket is up to the caller.
func (s *Server) kill(c *sconn) {
	if c.dead {
		return
	}
	c.dead = true
	close(c.done)
	ss := c.sess
	for _, j := range ss.jobs {
		switch {
		case j.target == c:
			s.drop(j)
		case j.charge == c:
			j.charge = nil
		}
	}
	if ss.conns[c.slot()] == c {
		ss.conns[c.slot()] = nil
	}
	if ss.live--; ss.live == 0 {
		delete(s.sessions, ss.id)
	}
	s.dispatch()
}
