package wire

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
)

// session is what the connections of one client share. It ends with its last
// connection; the client brings everything again when it comes back.
type session struct {
	id         sessionID
	role, name string // of the certificate
	conns      [1 + maxBackground]*sconn
	live       int
	jobs       map[jobKey]*job
	pack       *chooser
	// early remembers promotions that overtook the FETCH they are about, for a
	// short while: the two travel on different connections.
	early map[jobKey]time.Time
	held  map[uint8]*view // by the number of a dedup domain
	told  map[uint16]told // by the handle of a volume
	pacing
	lastData time.Time // when a background chunk was last sent, for the floor
}

const (
	maxEarly  = 4096
	earlyLife = 5 * time.Second
)

// sconn is one connection of a session at the server. The reader (run) and
// the sender (send.go) are its goroutines.
type sconn struct {
	s                  *Server
	ctx                context.Context
	wg                 *sync.WaitGroup // of its Serve
	nc                 net.Conn
	tc                 *tls.Conn
	pr                 *patientReader
	br                 *bufio.Reader
	role               connRole
	index              uint8
	node               string
	peerRole, peerName string
	wake               chan struct{} // the sender has something to look at
	done               chan struct{}
	rtt                rtt
	runs               []run  // the reader's
	marked             []mark // the reader's

	// Under Server.mu.
	sess        *session
	own         owner
	volumes     map[uint16]*servedVolume
	opening     int
	asides      int // OPEN and EXTENTS under way
	outstanding int // jobs asked for on this connection
	inflight    int // plain bytes between queue and socket that go out here
	out         []*job
	ctrl        []byte        // whole frames that go before data
	hints       []byte        // a whole frame that goes before the next chunk, nil: room for one
	hinted      chan struct{} // hints was taken
	carried     carried
	pongDue     bool
	pong        uint64
	gathers     time.Time  // since when signatures wait for more
	roams       bool       // it may take over what was asked for on another one
	tcp         *tcpSocket // nil: the kernel does not tell
	unsent      int        // as tcp said last
	control     control
	arrived     int64 // bytes acknowledged, of what tcp said last
	leaving     bool  // close when ctrl is written
	dead        bool
}

type servedVolume struct {
	volumeInfo
	dev     block.Device
	sigs    Signatures    // nil: nothing is remembered
	cutter  *chunk.Cutter // nil: chunks are fixed
	name    string
	handle  uint16
	site    uint8 // dedup domain, 0 for none
	key     chunk.Key
	view    *view // of the site, nil for domain 0
	telling bool  // the client is told of what it holds, under Server.mu
	load    *load
}

func (c *sconn) slot() int {
	if c.role == roleDemand {
		return 0
	}
	return 1 + int(c.index)
}

// poke lets the sender look again.
func (c *sconn) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// run reads frames until the connection ends.
func (c *sconn) run() {
	c.s.log.Info("connection up", "node", c.node, "peer", c.nc.RemoteAddr().String(), "carries", c.role.String())
	var wg sync.WaitGroup
	wg.Go(c.send)
	c.pr.idle = c.s.o.Idle
	err := c.read()
	if errors.Is(err, errProtocol) {
		c.s.mu.Lock()
		c.s.stats.Violations++
		c.s.mu.Unlock()
		c.leave(appendError(nil, 0, 0, wireError{kind: block.KindOf(err), text: err.Error()}), time.Second)
		wg.Wait()
	}
	c.nc.Close()
	c.s.detach(c)
	wg.Wait()
	if c.ctx.Err() == nil {
		c.s.log.Info("connection down", "node", c.node, "peer", c.nc.RemoteAddr().String(), "carries", c.role.String(), "err", err)
	}
}

// leave has the sender write a last frame, if it can within d, and close.
func (c *sconn) leave(frame []byte, d time.Duration) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.ctrl = append(c.ctrl, frame...)
	c.leaving = true
	c.nc.SetWriteDeadline(time.Now().Add(d))
	c.poke()
}

// bye tells the client that the server ends.
func (c *sconn) bye() {
	c.leave(appendFrame(nil, header{typ: tBye}, appendText(nil, block.KindClosed, "the backend is stopping")), 100*time.Millisecond)
}

func (c *sconn) read() error {
	for {
		h, p, err := readFrame(c.br)
		if err != nil {
			return err
		}
		switch h.typ {
		case tPing:
			if len(p) != 8 {
				return protocol("a ping of %d bytes", len(p))
			}
			c.s.mu.Lock()
			c.pong, c.pongDue = binary.BigEndian.Uint64(p), true
			c.s.mu.Unlock()
			c.poke()
		case tPong:
			if len(p) != 8 {
				return protocol("a pong of %d bytes", len(p))
			}
			c.rtt.pong(binary.BigEndian.Uint64(p))
		case tOpen:
			err = c.open(h, p)
		case tClose:
			c.s.mu.Lock()
			delete(c.volumes, h.volume)
			delete(c.sess.told, h.volume)
			c.s.mu.Unlock()
		case tFetch:
			err = c.fetch(h, p)
		case tPromote:
			err = c.promote(h, p)
		case tCancel:
			err = c.cancel(h, p)
		case tExtents:
			err = c.extents(h, p)
		case tHave, tGone:
			err = c.marks(h, p)
		case tTell:
			err = c.tell(h)
		case tBye:
			return io.EOF
		case tError:
			e, err := parseError(p, 0, 0)
			if err != nil {
				return err
			}
			return &block.Error{Op: "wire.session", Object: c.node, Kind: e.kind, Err: fmt.Errorf("the client says: %s", e.text)}
		default:
			err = unknown(h)
		}
		if err != nil {
			return err
		}
	}
}

// volume finds a handle. A client that uses one it did not open breaks the rules.
func (c *sconn) volume(h header) (*servedVolume, error) {
	v := c.volumes[h.volume]
	if v == nil {
		return nil, protocol("volume handle %d was not opened on this connection", h.volume)
	}
	return v, nil
}

// aside starts f, which may take long, beside the reader.
func (c *sconn) aside(f func()) error {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if c.asides >= maxAsides {
		return protocol("more than %d open and extents requests at once", maxAsides)
	}
	c.asides++
	c.wg.Go(func() {
		f()
		c.s.mu.Lock()
		c.asides--
		c.s.mu.Unlock()
	})
	return nil
}

// say queues whole frames for the sender, before data.
func (c *sconn) say(frames []byte) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.sayLocked(frames)
}

// maxCtrl bounds what waits for a client that does not read.
const maxCtrl = 4 << 20

func (c *sconn) sayLocked(frames []byte) {
	if c.dead {
		return
	}
	if len(c.ctrl)+len(frames) > maxCtrl {
		c.s.stats.Violations++
		c.s.kill(c)
		c.wg.Go(func() { c.nc.Close() }) // wakes its reader, which cleans up
		return
	}
	c.ctrl = append(c.ctrl, frames...)
	c.poke()
}

func (c *sconn) fail(h header, err error) {
	c.say(appendError(nil, h.volume, h.req, wireError{kind: block.KindOf(err), text: err.Error()}))
}

func (c *sconn) open(h header, p []byte) error {
	o, err := parseOpen(p)
	if err != nil {
		return err
	}
	if h.volume == 0 {
		return protocol("open of volume %q without a handle", o.name)
	}
	c.s.mu.Lock()
	full := len(c.volumes)+c.opening >= maxVolumes
	if !full {
		c.opening++
	}
	c.s.mu.Unlock()
	if full {
		return protocol("more than %d volumes open on one connection", maxVolumes)
	}
	return c.aside(func() {
		v, err := c.lookup(o, h.volume)
		c.s.mu.Lock()
		c.opening--
		if err == nil {
			v.view = c.sess.view(v.site)
			c.volumes[h.volume] = v
			// At once: chunks of the volume may be sent here from now on.
			c.sayLocked(appendFrame(nil, header{typ: tVolume, volume: h.volume, req: h.req}, appendVolume(nil, v.volumeInfo)))
		}
		c.s.mu.Unlock()
		if err != nil {
			c.fail(h, err)
		}
	})
}

func (c *sconn) lookup(o openOrder, handle uint16) (*servedVolume, error) {
	name := printable([]byte(o.name))
	if a := c.s.o.Authorize; a != nil {
		if err := a(c.peerRole, c.peerName, o.name); err != nil {
			c.s.log.Warn("volume refused", "volume", name, "node", c.peerName, "role", c.peerRole, "err", err)
			return nil, block.E("wire.open", name, block.KindDenied, err)
		}
	}
	found, err := c.s.o.Lookup(o.name)
	if err != nil {
		return nil, block.E("wire.open", name, 0, err)
	}
	v := &servedVolume{volumeInfo: volumeInfo{info: found.Device.Info(), chunk: found.ChunkBytes}, dev: found.Device,
		sigs: found.Signatures, cutter: found.Cutter, name: name, handle: handle, site: o.site, key: o.key,
		load: c.s.loadOf(found.Device)}
	if v.cutter != nil && v.key != (chunk.Key{}) {
		v.sigs = nil // recipes are made of signatures under the key, which cannot be had from others
	}
	if err := checkVolume(v.volumeInfo); err != nil {
		return nil, &block.Error{Op: "wire.open", Object: name, Kind: block.KindUnsupported, Err: err}
	}
	return v, nil
}

// fetch makes a job of each chunk asked for.
func (c *sconn) fetch(h header, p []byte) error {
	s := c.s
	s.mu.Lock()
	defer s.mu.Unlock()
	v, err := c.volume(h)
	if err != nil {
		return err
	}
	hard := int64(2 * s.o.Credit) // requests and their cancels cross; see SPEC.md section 6
	f, runs, err := parseFetch(c.runs[:0], p, v.chunks(), hard)
	if err != nil {
		return err
	}
	c.runs = runs
	if (f.Class() == block.Demand) != (c.role == roleDemand) {
		return protocol("%s on a %s connection", f, c.role)
	}
	if c.dead {
		return nil
	}
	for _, r := range runs {
		for i := r.first; i < r.first+r.n; i++ {
			s.ask(c, v, h.req, i, f)
			if int64(c.outstanding) > hard {
				return protocol("%d chunks outstanding, the credit is %d", c.outstanding, s.o.Credit)
			}
		}
	}
	s.dispatch()
	return nil
}

func (c *sconn) eachKey(h header, p []byte, f func(jobKey)) error {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	v, err := c.volume(h)
	if err != nil {
		return err
	}
	if c.runs, err = parseRuns(c.runs[:0], p, v.chunks(), int64(2*c.s.o.Credit)*(1+maxBackground)); err != nil {
		return err
	}
	if c.dead {
		return nil
	}
	for _, r := range c.runs {
		for i := r.first; i < r.first+r.n; i++ {
			f(jobKey{h.req, i})
		}
	}
	c.s.dispatch()
	return nil
}

func (c *sconn) promote(h header, p []byte) error {
	if c.role != roleDemand {
		return protocol("a promotion on a background connection")
	}
	s, now := c.s, time.Now()
	return c.eachKey(h, p, func(k jobKey) {
		if j := c.sess.jobs[k]; j != nil {
			if s.retarget(j, c, levelOf(block.Demand)) {
				s.stats.Promoted++
			}
			return
		}
		// Sent already, or its FETCH has not arrived yet.
		if len(c.sess.early) >= maxEarly {
			for k, t := range c.sess.early {
				if now.Sub(t) > earlyLife {
					delete(c.sess.early, k)
				}
			}
			if len(c.sess.early) >= maxEarly {
				return
			}
		}
		c.sess.early[k] = now
	})
}

func (c *sconn) cancel(h header, p []byte) error {
	return c.eachKey(h, p, func(k jobKey) {
		if j := c.sess.jobs[k]; j != nil && j.state != sending {
			c.s.drop(j)
			c.s.stats.Canceled++
		}
	})
}

// extents answers with as many RANGES frames as it takes, all but the last flagged.
func (c *sconn) extents(h header, p []byte) error {
	c.s.mu.Lock()
	v, err := c.volume(h)
	c.s.mu.Unlock()
	if err != nil {
		return err
	}
	f, off, n, err := parseExtentsOrder(p, v.volumeInfo)
	if err != nil {
		return err
	}
	return c.aside(func() {
		var es []block.Extent
		for at := off; at < off+n && len(es) < maxExtents; {
			more, err := v.dev.Extents(c.ctx, nil, at, off+n-at, f)
			if err == nil && len(more) == 0 {
				err = errors.New("the source answered no extents")
			}
			if err != nil {
				if len(es) > 0 {
					break // what is known goes; the rest will be asked again
				}
				c.fail(h, block.E("wire.extents", v.name, 0, err))
				return
			}
			for _, e := range more {
				es = block.AppendExtent(es, block.Extent{Off: e.Off, Len: e.Len, Kind: e.Kind})
			}
			at = more[len(more)-1].End()
		}
		es = es[:min(len(es), maxExtents)]
		var frames, body []byte
		for len(es) > 0 {
			part := es[:min(len(es), rangesPerFrame)]
			es = es[len(part):]
			var more uint8
			if len(es) > 0 {
				more = flagMore
			}
			body = appendRanges(body[:0], part)
			frames = appendFrame(frames, header{typ: tRanges, flags: more, volume: h.volume, req: h.req}, body)
		}
		c.say(frames)
	})
}
