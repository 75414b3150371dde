package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"forerun/block"
	"forerun/internal/nbdproto"
)

// Exports is where a Server finds its devices.
type Exports interface {
	// Lookup finds the device of an export and a line about it for people. It
	// is called once for each client that opens or inspects the export; name may
	// be empty, which is the default export. The server never closes the device;
	// when its owner does, clients are told to go.
	Lookup(name string) (dev block.Device, description string, err error)
	// List names the exports that clients may be told of.
	List() []string
}

// Options say what a Server serves and how much of the machine it may use.
type Options struct {
	// Exports is required.
	Exports Exports
	// TLS holds the server's certificate, and whether and how clients are
	// verified. With it, clients may use TLS on nbd and must on nbds.
	TLS *tls.Config
	// Near says cheaply and without waiting whether a read of n bytes at off
	// would be answered from here, without crossing a link. It is asked before
	// each small aligned read and may be wrong. nil is "unknown": then what the
	// last requests took is all there is to go by.
	Near func(dev block.Device, off, n int64) bool
	// Observe, if set, is told of each answered request. It must not wait.
	Observe func(Observation)
	// Log is told of connections. nil for none.
	Log *slog.Logger

	MaxConns         int           // connections at once; 0 is 256
	MaxRequests      int           // requests under way per connection; 0 is 128
	MaxBuffer        int64         // bytes of their buffers per connection; 0 is 64 MiB
	HandshakeTimeout time.Duration // for the whole handshake; 0 is 30 s
	DrainTimeout     time.Duration // for requests under way at shutdown; 0 is 10 s
}

// Server serves exports to any number of clients. Make one with NewServer.
type Server struct {
	opt     Options
	tls     *tls.Config
	log     *slog.Logger
	exports exports
	buffers buffers
	pool    sync.Pool // of *request
	watch   watch
	epoch   time.Time // what the server measures from

	mu       sync.Mutex
	sessions map[*session]struct{} // guarded by mu
	stats    Stats                 // guarded by mu: what ended connections counted
	closing  bool                  // guarded by mu
	wg       sync.WaitGroup        // sessions; Add under mu while not closing

	// hard ends even writes: when draining took too long.
	hard context.Context
	end  context.CancelFunc
}

// session is one accepted connection.
type session struct {
	nc   net.Conn
	conn *conn // guarded by Server.mu: nil during the handshake
}

// NewServer makes a server. It serves when Serve is called.
func NewServer(opt Options) *Server {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&opt.MaxConns, 256)
	def(&opt.MaxRequests, 128)
	if opt.MaxBuffer <= 0 {
		opt.MaxBuffer = 64 << 20
	}
	if opt.HandshakeTimeout <= 0 {
		opt.HandshakeTimeout = 30 * time.Second
	}
	if opt.DrainTimeout <= 0 {
		opt.DrainTimeout = 10 * time.Second
	}
	s := &Server{opt: opt, log: opt.Log, epoch: time.Now(), sessions: map[*session]struct{}{}}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if opt.TLS != nil {
		s.tls = opt.TLS.Clone()
		if s.tls.MinVersion == 0 {
			s.tls.MinVersion = tls.VersionTLS12
		}
		// Whole records from the start: a disk moves more than a page of text.
		s.tls.DynamicRecordSizingDisabled = true
	}
	s.pool.New = func() any { return new(request) }
	s.hard, s.end = context.WithCancel(context.Background())
	s.watch.init(opt.Near != nil)
	return s
}

// Serve accepts and serves connections until ctx ends or a listener fails.
// Then it closes the listeners, lets requests under way finish for up to
// Options.DrainTimeout, ends all connections, and returns nil or the failure.
// It is called once.
func (s *Server) Serve(ctx context.Context, listeners ...*Listener) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var accepting sync.WaitGroup
	for _, l := range listeners {
		accepting.Go(func() {
			if err := s.accept(l); err != nil {
				cancel(block.E("nbd.accept", l.URI(), block.KindNone, err))
			}
		})
		s.log.Info("nbd: listening", "uri", l.URI())
	}
	watching := make(chan struct{})
	go func() { defer close(watching); s.watch.run() }()

	<-ctx.Done()
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	for _, l := range listeners {
		_ = l.Close()
	}
	accepting.Wait()
	s.drain()
	s.watch.stop()
	<-watching
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

// accept takes connections until the listener is closed.
func (s *Server) accept(l *Listener) error {
	wait := 5 * time.Millisecond
	for {
		nc, err := l.Accept()
		if err != nil {
			s.mu.Lock()
			closing := s.closing
			s.mu.Unlock()
			if closing || errors.Is(err, net.ErrClosed) {
				return nil
			}
			// Out of descriptors or memory: it passes, or it does not and is said again.
			if wait > time.Second {
				return err
			}
			s.log.Warn("nbd: accept failed, trying again", "uri", l.URI(), "err", err)
			time.Sleep(wait)
			wait *= 2
			continue
		}
		wait = 5 * time.Millisecond
		if !s.Attach(nc, l.uri.TLS) {
			_ = nc.Close()
		}
	}
}

// Attach serves a connection that was made elsewhere, in a goroutine of its
// own, and owns it from then on. forceTLS is that of nbds. It answers false,
// and leaves the connection to the caller, when there are too many connections
// or the server is shutting down.
func (s *Server) Attach(nc net.Conn, forceTLS bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	if len(s.sessions) >= s.opt.MaxConns {
		s.stats.Refused++
		s.log.Warn("nbd: connection refused, there are too many", "limit", s.opt.MaxConns)
		return false
	}
	s.stats.Accepted++
	ss := &session{nc: nc}
	s.sessions[ss] = struct{}{}
	s.wg.Add(1)
	go func() {
		defer s.wg.Done()
		s.serve(ss, forceTLS)
	}()
	return true
}

// serve is the life of a connection.
func (s *Server) serve(ss *session, forceTLS bool) {
	h := handshake{s: s, nc: ss.nc, forceTLS: forceTLS}
	_ = ss.nc.SetDeadline(time.Now().Add(s.opt.HandshakeTimeout))
	chosen, err := h.run()
	if err != nil || chosen == nil {
		if err != nil && !errors.Is(err, io.EOF) {
			s.log.Warn("nbd: a client was not let in", "peer", peer(ss.nc), "err", err)
		}
		s.forget(ss)
		(&stream{nc: h.nc}).close()
		return
	}
	_ = h.nc.SetDeadline(time.Time{})
	c := newConn(s, chosen, newTransport(h.nc))
	s.mu.Lock()
	closing := s.closing
	ss.conn = c
	s.stats.Handshakes++
	s.mu.Unlock()
	if closing {
		c.drain()
	}
	log := s.log.With("export", chosen.name, "peer", peer(ss.nc))
	log.Info("nbd: client connected", "tls", h.secure, "structured", chosen.structured)
	err = c.run()
	s.forget(ss)
	s.exports.close(chosen.export)
	if err != nil {
		log.Warn("nbd: client lost", "err", err)
		return
	}
	log.Info("nbd: client left")
}

func peer(nc net.Conn) string {
	if a := nc.RemoteAddr(); a != nil && a.String() != "" {
		return a.String()
	}
	return "unix"
}

// forget keeps what the session counted and drops it.
func (s *Server) forget(ss *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sessions, ss)
	if ss.conn != nil {
		ss.conn.count.addTo(&s.stats)
	}
}

// each calls f for every session, holding mu.
func (s *Server) each(f func(*session)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ss := range s.sessions {
		f(ss)
	}
}

// drain ends all connections: in order if they can, by force if they take too long.
func (s *Server) drain() {
	s.each(func(ss *session) {
		if ss.conn != nil {
			ss.conn.drain()
		} else {
			_ = ss.nc.SetDeadline(time.Unix(1, 0))
		}
	})
	done := make(chan struct{})
	go func() { s.wg.Wait(); close(done) }()
	t := time.NewTimer(s.opt.DrainTimeout)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
		s.log.Warn("nbd: requests under way took too long, giving them up", "after", s.opt.DrainTimeout)
		s.each(func(ss *session) {
			if ss.conn != nil {
				ss.conn.hangup(errShutdown)
			}
		})
	}
	s.end()
	<-done
}

var errShutdown = block.E("nbd", "", block.KindClosed, errors.New("the server is shutting down"))

// Disconnect ends the connections to the export of that name after their
// requests under way have been answered, and waits until they have ended or ctx
// does. New connections are not kept out: let Lookup refuse the name first.
func (s *Server) Disconnect(ctx context.Context, name string) error {
	var gone []<-chan struct{}
	s.each(func(ss *session) {
		if ss.conn != nil && ss.conn.name == name {
			ss.conn.drain()
			gone = append(gone, ss.conn.gone)
		}
	})
	for _, g := range gone {
		select {
		case <-g:
		case <-ctx.Done():
			return block.E("nbd.disconnect", name, block.KindCanceled, context.Cause(ctx))
		}
	}
	return nil
}

// Connections says how many clients are connected to the export of that name.
func (s *Server) Connections(name string) int {
	n := 0
	s.each(func(ss *session) {
		if ss.conn != nil && ss.conn.name == name {
			n++
		}
	})
	return n
}

// Stats says what the server has done so far.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	st.Connections = int64(len(s.sessions))
	st.Takeovers = s.watch.takeovers.Load()
	for ss := range s.sessions {
		if ss.conn != nil {
			ss.conn.count.addTo(&st)
		}
	}
	return st
}

// flags are the transmission flags of an export.
func flags(info block.Info, structured bool) uint16 {
	f := nbdproto.FlagHasFlags | nbdproto.FlagSendFlush | nbdproto.FlagSendFUA |
		nbdproto.FlagCanMultiConn | nbdproto.FlagSendCache
	if structured {
		f |= nbdproto.FlagSendDF
	}
	if info.ReadOnly {
		return f | nbdproto.FlagReadOnly
	}
	if info.CanTrim {
		f |= nbdproto.FlagSendTrim
	}
	return f | nbdproto.FlagSendWriteZeroes | nbdproto.FlagSendFastZero
}
