package wire

import (
	"net"
	"sync"
	"sync/atomic"
	"time"

	"forerun/internal/chunk"
)

// ClientStats is the state of a session as its client sees it.
type ClientStats struct {
	Up         bool      // the demand connection is there
	Since      time.Time // Up is as it is since then
	Reconnects int64     // connections that were made again
	Conns      int       // connections that are there
	// BackgroundConns is how many background connections there should be.
	BackgroundConns int
	RTTMin          time.Duration // of the demand connection, 0 before the first pong
	RTT             time.Duration // smoothed as in RFC 6298
	// SentBytes and ReceivedBytes are what crossed the link, below TLS, without
	// what TCP and IP add.
	SentBytes, ReceivedBytes int64
	FramesReceived           int64
	DemandBytes              int64 // packed bytes of chunks delivered that came on the demand connection
	BackgroundBytes          int64 // packed bytes of chunks delivered that came on the others
	PlainBytes               int64 // what these chunks hold
	ChunksDelivered          int64
	ZeroChunks               int64 // delivered without bytes
	SameChunks               int64 // delivered as a signature alone
	Announced                int64 // chunks the server told of unasked
	DuplicateChunks          int64 // arrived, but were not wanted any more
	Promoted, Canceled       int64 // chunks
	DemandOutstanding        int   // chunks asked for and not delivered
	BackgroundOutstanding    int
	DemandQueued             int // chunks wanted and not yet asked for
	BackgroundQueued         int
}

// ServerStats counts what a server did and does.
type ServerStats struct {
	Sessions, Conns          int // now
	SessionsBegun            int64
	Refused                  int64 // connections that did not get through the handshake
	Violations               int64 // connections closed because the peer broke the rules
	SentBytes, ReceivedBytes int64 // below TLS
	DemandAsked              int64 // chunks
	BackgroundAsked          int64
	Promoted, Canceled       int64
	ChunksSent               int64
	ZeroChunks               int64
	SameChunks               int64 // answered by their signature alone
	Announced                int64 // chunks that clients were told of unasked
	Remembered               int64 // chunks answered without reading the source
	HashedBytes              int64 // plain bytes that a signature was computed of
	PlainBytes               int64 // what the chunks sent hold
	DemandBytes              int64 // their packed bytes, by connection
	BackgroundBytes          int64
	SourceReads, SourceBytes int64
	ReadErrors               int64
	Queued                   int // chunks waiting for a read
	DemandReads              int // source reads under way
	BackgroundReads          int
	// The limits of background, as they are now; see ServerOptions.
	QueuedBackground     int           // of Queued, those in no hurry
	Workers              int           // source reads that may be under way
	BackgroundReadsLimit int           // of them background: less where a source is busy
	BackgroundReadsFloor int           // and that many always
	PaceBytes            int64         // bytes a second that background and demand together may take, of all sessions; 0: nothing is known
	PaceDelay            time.Duration // the longest queue seen on the way to a client
	PaceTarget           time.Duration // the queue that is aimed at there
	FloorInterval        time.Duration // a background chunk waits no longer for demand
	SendQueueBytes       int64         // between source and socket
	Yielded              int64         // times background waited for demand or for its pace
	Relieved             int64         // background chunks that went on another connection than they were asked for on
	SourceDelay          time.Duration // of reads of the busiest source, lately
	// Codecs are the chunks sent, by codec.
	Codecs [chunk.Branch + 1]CodecStats
	// Levels are the sessions now, by the level their background is packed at.
	Levels [chunk.Tight + 1]int
}

// CodecStats counts chunks of one codec, and their bytes.
type CodecStats struct{ Chunks, PlainBytes, PackedBytes int64 }

func (c *CodecStats) add(plain, packed int) {
	c.Chunks++
	c.PlainBytes += int64(plain)
	c.PackedBytes += int64(packed)
}

// Stats returns the counters.
func (s *Server) Stats() ServerStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	st.Sessions = len(s.sessions)
	for _, ss := range s.sessions {
		st.Conns += ss.live
		st.Levels[ss.pack.at(1)]++
	}
	st.Queued, st.QueuedBackground = s.q.n, s.q.waiting(2, numLevels)
	st.Workers, st.BackgroundReadsFloor, st.FloorInterval = s.o.Workers, s.o.BackgroundFloor, s.o.Floor
	st.BackgroundReadsLimit = s.mostBackground()
	for _, l := range s.loads {
		st.BackgroundReadsLimit = min(st.BackgroundReadsLimit, l.limit())
		st.SourceDelay = max(st.SourceDelay, l.delay)
	}
	for _, ss := range s.sessions {
		for _, c := range ss.conns {
			if c != nil {
				st.SendQueueBytes += int64(c.inflight)
			}
		}
		if !ss.paced || s.o.Ready || ss.pace.sampled.IsZero() {
			continue
		}
		st.PaceBytes += int64(ss.pace.rate)
		if d := ss.pace.delay(); d >= st.PaceDelay {
			st.PaceDelay, st.PaceTarget = d, ss.pace.target()
		}
	}
	st.DemandReads, st.BackgroundReads = s.running[0], s.running[1]
	st.SentBytes, st.ReceivedBytes = s.traffic.sent.Load(), s.traffic.received.Load()
	st.HashedBytes = s.hashed.Load()
	return st
}

// traffic counts bytes below TLS.
type traffic struct{ sent, received atomic.Int64 }

type countedConn struct {
	net.Conn
	t *traffic
}

// NetConn is the connection below, as tls.Conn has it: a protocol that was
// handed over may ask the socket what TCP knows of the line.
func (c *countedConn) NetConn() net.Conn { return c.Conn }

func (c *countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.t.received.Add(int64(n))
	return n, err
}

func (c *countedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.t.sent.Add(int64(n))
	return n, err
}

// patientReader gives each Read a deadline of its own, so that a peer is
// silent only while somebody listens: a reader that was busy elsewhere finds
// what came meanwhile. Zero idle sets no deadlines.
type patientReader struct {
	conn net.Conn
	idle time.Duration
	set  time.Time
}

func (r *patientReader) Read(p []byte) (int, error) {
	if r.idle > 0 {
		// Moving the deadline at each read would cost more than the read.
		if now := time.Now(); now.Sub(r.set) > r.idle/16 {
			r.conn.SetReadDeadline(now.Add(r.idle))
			r.set = now
		}
	}
	return r.conn.Read(p)
}

// rtt estimates the round trip time of a connection from its pings.
type rtt struct {
	mu            sync.Mutex
	token         uint64
	at            time.Time
	min, smoothed time.Duration
}

// ping returns the token of a ping sent now. Only the latest counts.
func (r *rtt) ping() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.token++
	r.at = time.Now()
	return r.token
}

func (r *rtt) pong(token uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if token != r.token || r.at.IsZero() {
		return
	}
	d := max(time.Since(r.at), 1)
	r.at = time.Time{}
	if r.min == 0 || d < r.min {
		r.min = d
	}
	if r.smoothed == 0 {
		r.smoothed = d
	} else {
		r.smoothed += (d - r.smoothed) / 8 // RFC 6298, section 2.3
	}
}

func (r *rtt) get() (min, smoothed time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.min, r.smoothed
}
