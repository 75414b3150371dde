package wire

import (
	"encoding/binary"
	"slices"
	"time"

	"forerun/internal/chunk"
)

// sendBatch is about how much one write to the socket holds.
const sendBatch = 64 << 10

// stale is how long demand may be under way without any progress before
// background stops waiting for it: that client is not reading.
const stale = 500 * time.Millisecond

// soonDue is how long the link is kept free for demand that is still read or
// packed: most is ready by then. A slow source must not leave the link unused.
const soonDue = 4 * time.Millisecond

// shutWindow is how soon it is looked again whether a connection takes more.
const shutWindow = 3 * time.Millisecond

// send writes what is due, until the connection ends. Control frames go
// first, also between the pieces of a chunk.
func (c *sconn) send() {
	s := c.s
	ping := time.NewTicker(s.o.Ping)
	defer ping.Stop()
	hold := time.NewTimer(time.Hour)
	defer hold.Stop()
	var (
		buf  = make([]byte, 0, sendBatch+2*MaxPayload)
		sent []*job // whole in buf
		cur  *job   // being cut into pieces
		off  int
	)
	defer func() {
		c.nc.Close() // the reader sees it and cleans up
		s.mu.Lock()
		defer s.mu.Unlock()
		if cur != nil {
			sent = append(sent, cur)
		}
		s.finish(sent, false)
	}()
	quantum := sendBatch
	wrote := 0 // bytes of data since the pacer was told
	for {
		var wait time.Duration
		full := false
		s.mu.Lock()
		if c.dead {
			s.mu.Unlock()
			return
		}
		if wrote > 0 {
			c.sess.spend(wrote, c.role == roleDemand)
			wrote = 0
		}
		buf = append(buf, c.ctrl...)
		c.ctrl = c.ctrl[:0]
		if c.pongDue {
			c.pongDue = false
			buf = appendFrame(buf, header{typ: tPong}, binary.BigEndian.AppendUint64(nil, c.pong))
		}
		leaving := c.leaving
		if cur == nil && len(c.out) == 0 && !leaving {
			s.relieve(c)
		}
		data := cur != nil || len(c.out) > 0 || c.hints != nil
		if data && !leaving {
			if wait, quantum = s.yield(c, cur); wait == 0 && cur == nil && c.hints == nil {
				wait = c.gather()
			}
			switch {
			case wait > 0 || cur != nil:
			case c.hints != nil:
				buf = c.takeHints(buf)
			default:
				cur, sent, buf = c.next(sent, buf)
				off = 0
			}
		}
		more := len(c.out) > 0 && wait == 0 && !leaving
		s.mu.Unlock()

		for cur != nil && !full && !leaving && wait == 0 {
			buf, off = appendPiece(buf, cur, off, quantum)
			if off == len(cur.packed.Data) {
				sent, cur = append(sent, cur), nil
			}
			full = len(buf) >= quantum
		}
		if more && !full && len(buf) < quantum {
			continue // there is room for the next chunk
		}
		if len(buf) > 0 {
			if data && wait == 0 {
				wrote = len(buf)
			}
			_, err := c.tc.Write(buf)
			if buf = buf[:0]; cap(buf) > 16*sendBatch {
				buf = make([]byte, 0, sendBatch+2*MaxPayload) // a burst of answers passed
			}
			if err != nil {
				return
			}
			if leaving {
				return
			}
			if len(sent) > 0 {
				s.mu.Lock()
				if c.role == roleBackground {
					c.sess.lastData = time.Now()
				}
				s.finish(sent, true)
				s.dispatch()
				s.mu.Unlock()
				clear(sent)
				sent = sent[:0]
			}
			continue
		}
		if wait == 0 {
			wait = time.Hour
		}
		hold.Reset(wait)
		select {
		case <-c.done:
			return
		case <-c.wake:
		case <-hold.C:
		case <-ping.C:
			buf = appendFrame(buf, header{typ: tPing}, binary.BigEndian.AppendUint64(nil, c.rtt.ping()))
		}
	}
}

// gatherFor is how long signatures are waited for that go into the same frame.
const gatherFor = 2 * time.Millisecond

// gather says how long a background frame of signatures waits for more, 0: it
// goes. There are only signatures to send, and the connection has others in
// work. A frame, a record and a packet for each would be twice the bytes.
// Server.mu is held.
func (c *sconn) gather() time.Duration {
	n := len(c.out)
	if c.role == roleDemand || n == 0 || n >= gatherMost || c.out[0].packed.Codec != chunk.Known ||
		c.out[n-1].packed.Codec != chunk.Known || c.inflight <= n*c.out[0].vol.chunk {
		c.gathers = time.Time{}
		return 0
	}
	now := time.Now()
	if c.gathers.IsZero() {
		c.gathers = now
	}
	wait := gatherFor - now.Sub(c.gathers)
	if wait <= 0 {
		c.gathers = time.Time{}
	}
	return max(wait, 0)
}

// gatherMost is how many signatures are enough for a frame.
const gatherMost = 32

// relieve lets c, which has nothing to send, take over a chunk that waits on
// another connection of its session: one whose window is small, after losses,
// must not hold up what others have room for. Server.mu is held.
func (s *Server) relieve(c *sconn) {
	if !c.roams {
		return
	}
	var from *sconn
	for _, o := range c.sess.conns[1:] {
		if o != nil && o.roams && len(o.out) > 1 && (from == nil || len(o.out) > len(from.out)) {
			from = o
		}
	}
	if from == nil {
		return
	}
	// The last one that carries bytes: those before it may be referred to by what follows them.
	at := len(from.out) - 1
	for at > 0 && (from.out[at].packed.Codec == chunk.Known || from.out[at].packed.Codec == chunk.Zeros) {
		at--
	}
	j := from.out[at]
	refers := func(o *job) bool { return o.packed.Codec == chunk.Known && o.packed.Sig == j.packed.Sig }
	if at == 0 || c.volumes[j.vol.handle] == nil || slices.ContainsFunc(from.out[at+1:], refers) {
		return
	}
	s.stats.Relieved++
	s.move(j, c)
	s.dispatch()
}

// move puts a chunk that is ready on another connection. Server.mu is held.
func (s *Server) move(j *job, to *sconn) {
	from := j.target
	from.unqueue(j)
	if j.vol.view != nil {
		from.carried.forget(markOf(&j.packed.Sig))
	}
	s.aim(j, to)
	to.out = append(to.out, j)
	to.poke()
}

// yield says how long background on c waits, for demand and for its pace; 0:
// it may go, up to so many bytes in one write. Server.mu is held.
func (s *Server) yield(c *sconn, cur *job) (wait time.Duration, quantum int) {
	if c.role == roleDemand || s.o.Ready || cur != nil && cur.rush {
		return 0, sendBatch
	}
	now, ss := time.Now(), c.sess
	quantum = sendBatch
	floor := s.o.Floor
	if ss.paced {
		ss.look(now)
		wait, quantum = ss.pace.wait(now), ss.pace.quantum()
		if wait == 0 && c.unsent > ss.pace.heap() {
			wait = shutWindow
		}
		if len(c.out) > 0 {
			floor = max(floor, ss.pace.floor(len(c.out[0].packed.Data)))
		}
	}
	switch past := now.Sub(s.lastDemand); {
	case s.demandDue > 0 && past < stale:
		wait = max(wait, stale)
	case s.demandBusy > 0 && past < soonDue:
		wait = max(wait, soonDue-past)
	}
	if wait == 0 {
		return 0, quantum
	}
	if ss.lastData.IsZero() {
		ss.lastData = now
	}
	if wait = min(wait, floor-now.Sub(ss.lastData)); wait > 0 {
		s.stats.Yielded++
		return wait, quantum
	}
	return 0, quantum
}

// next takes the chunk that goes next from the out list. Chunks of zeros are
// put into buf at once, as runs. Server.mu is held.
func (c *sconn) next(sent []*job, buf []byte) (*job, []*job, []byte) {
	j := c.out[0]
	switch j.packed.Codec {
	case chunk.Zeros:
	case chunk.Known:
		return c.nextSame(sent, buf)
	default:
		c.pop()
		return j, sent, buf
	}
	at := len(buf)
	buf = appendHeader(buf, header{typ: tZeros, volume: j.vol.handle, req: j.key.req})
	body := len(buf)
	r := run{first: j.key.index}
	for len(c.out) > 0 && len(buf)-body+2*runLen <= MaxPayload {
		z := c.out[0]
		if z.packed.Codec != chunk.Zeros || z.key.req != j.key.req || z.vol != j.vol {
			break
		}
		if z.key.index != r.first+r.n {
			buf = appendRun(buf, r)
			r = run{first: z.key.index}
		}
		r.n++
		c.pop()
		sent = append(sent, z)
		c.s.stats.ZeroChunks++
	}
	buf = appendRun(buf, r)
	binary.BigEndian.PutUint32(buf[at:], uint32(len(buf)-body))
	return nil, sent, buf
}

// nextSame puts the chunk that goes next, which is answered by its signature,
// into buf, with those that follow it.
func (c *sconn) nextSame(sent []*job, buf []byte) (*job, []*job, []byte) {
	first := c.out[0]
	at := len(buf)
	buf = appendHeader(buf, header{typ: tSame, volume: first.vol.handle, req: first.key.req})
	buf = binary.BigEndian.AppendUint64(buf, uint64(first.key.index))
	n := 0
	for ; len(c.out) > 0 && n < sigsPerFrame; n++ {
		j := c.out[0]
		if j.packed.Codec != chunk.Known || j.key.req != first.key.req || j.vol != first.vol || j.key.index != first.key.index+int64(n) {
			break
		}
		buf = append(buf, j.packed.Sig[:]...)
		c.pop()
		sent = append(sent, j)
	}
	c.s.stats.SameChunks += int64(n)
	binary.BigEndian.PutUint32(buf[at:], uint32(8+n*chunk.SigLen))
	return nil, sent, buf
}

// unqueue takes a chunk that is ready off the out list.
func (c *sconn) unqueue(j *job) {
	if i := slices.Index(c.out, j); i >= 0 {
		c.out = slices.Delete(c.out, i, i+1)
	}
}

func (c *sconn) pop() {
	c.out[0].state = sending
	c.out[0] = nil
	if c.out = c.out[1:]; len(c.out) == 0 {
		c.out = nil
	}
}

// appendPiece appends the frame that carries a chunk's bytes from off on, at
// most that many, and returns where the next one begins.
func appendPiece(buf []byte, j *job, off, most int) ([]byte, int) {
	data := j.packed.Data
	most = min(most, MaxPayload)
	h := header{typ: tMore, volume: j.vol.handle, req: j.key.req}
	if off == 0 {
		n := min(len(data), most-chunkHead)
		h.typ, h.n = tChunk, uint32(chunkHead+n)
		buf = appendHeader(buf, h)
		buf = appendChunkHead(buf, &piece{index: j.key.index, plain: j.packed.Plain, packed: len(data), codec: j.packed.Codec, sig: j.packed.Sig})
		return append(buf, data[:n]...), n
	}
	n := min(len(data)-off, most-moreHead)
	h.n = uint32(moreHead + n)
	buf = appendHeader(buf, h)
	buf = binary.BigEndian.AppendUint64(buf, uint64(j.key.index))
	buf = binary.BigEndian.AppendUint32(buf, uint32(off))
	return append(buf, data[off:off+n]...), off + n
}

// finish ends jobs that were written to the socket or, if not ok, never will
// be. Server.mu is held.
func (s *Server) finish(jobs []*job, ok bool) {
	for _, j := range jobs {
		if j.state == sending && !ok {
			s.forget(j)
		}
		if j.state == sending {
			n := int64(len(j.packed.Data))
			if j.target.role == roleDemand {
				s.stats.DemandBytes += n
			} else {
				s.stats.BackgroundBytes += n
			}
			s.stats.ChunksSent++
			s.stats.PlainBytes += int64(j.packed.Plain)
			s.stats.Codecs[j.packed.Codec].add(j.packed.Plain, len(j.packed.Data))
			if t := j.sess.told[j.vol.handle]; t != nil {
				t.set(j.key.index)
			}
			s.forget(j)
		}
		j.bytes.release()
		j.bytes = nil
	}
}
