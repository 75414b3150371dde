package wire

import (
	"time"

	"forerun/block"
	"forerun/internal/chunk"
)

// job is one chunk somebody asked for, at the server.
//
//	queued → running → ready → sending → gone
//
// drop ends it from any state; who holds its bytes then (the reader of a
// running one, the sender of a sending one) gives them back.
type job struct {
	item   item
	key    jobKey
	sess   *session
	charge *sconn // counts it as outstanding; nil when that connection is gone
	target *sconn // the connection it goes out on
	vol    *servedVolume
	flags  block.Flags
	state  jobState
	packed chunk.Packed
	bytes  *lease     // that packed.Data lies in
	sum    *chunk.Sig // of the plain bytes, if it was known before they were read
	token  uint64     // of Signatures
	rush   bool       // wanted as demand since it began to be sent
}

type jobKey struct {
	req   uint64
	index int64
}

type jobState uint8

const (
	queued jobState = iota
	running
	ready
	sending
	gone
)

func (j *job) plain() int { return j.vol.length(j.key.index) }

// A connection's budget: plain bytes that may be between queue and socket.
// Enough to hide the source's latency, small enough that a slow peer holds
// little memory and that little background stands ahead of a change of mind.
const (
	budgetDemand     = 8 << 20
	budgetBackground = 4 << 20
	// maxDemandRead is smaller than maxRead: what belongs to one read is sealed
	// one after the other, which demand would wait for.
	maxDemandRead = 256 << 10
)

// ask makes a job, or, when the client asks again after it lost a connection,
// points the one that is there to c. Server.mu is held.
func (s *Server) ask(c *sconn, v *servedVolume, req uint64, index int64, f block.Flags) {
	k := jobKey{req, index}
	ss := c.sess
	if j := ss.jobs[k]; j != nil && j.state != sending {
		if j.charge != c {
			if j.charge != nil {
				j.charge.outstanding--
			}
			j.charge = c
			c.outstanding++
		}
		s.retarget(j, c, levelOf(f))
		return
	}
	j := &job{key: k, sess: ss, charge: c, vol: v, flags: f}
	j.item = item{level: levelOf(f), volume: v.handle, index: index, of: j}
	if t := ss.told[v.handle]; t != nil {
		t.set(index) // the answer will tell
	}
	ss.jobs[k] = j // one that is being sent on a dying connection loses its place
	c.outstanding++
	to := c
	if c.role == roleDemand {
		s.stats.DemandAsked++
	} else {
		s.stats.BackgroundAsked++
		if _, ok := ss.early[k]; ok {
			delete(ss.early, k)
			if d := ss.conns[0]; d != nil {
				to, j.item.level = d, levelOf(block.Demand)
				s.stats.Promoted++
			}
		}
	}
	s.aim(j, to)
	s.q.push(&to.own, &j.item, false)
}

// aim sets the connection a job goes out on and keeps count of demand.
func (s *Server) aim(j *job, to *sconn) {
	due := 0 // it waits for the link, or is on its way into it
	if j.state == ready || j.state == sending {
		due = 1
	}
	if j.target != nil {
		if j.target.role == roleDemand {
			s.demandDue -= due
			s.demandLess()
		}
		if j.state != queued {
			j.target.inflight -= j.plain()
		}
	}
	if j.target = to; to == nil {
		return
	}
	if to.role == roleDemand {
		s.demandDue += due
		s.demandBusy++
		s.lastDemand = time.Now()
	}
	if j.state != queued {
		to.inflight += j.plain()
	}
}

// demandLess counts one demand job less; with the last one background may go on.
func (s *Server) demandLess() {
	s.lastDemand = time.Now()
	if s.demandBusy--; s.demandBusy > 0 {
		return
	}
	for _, ss := range s.sessions {
		for _, c := range ss.conns[1:] {
			if c != nil && len(c.out) > 0 {
				c.poke()
			}
		}
	}
}

// retarget moves a job to another connection and level, wherever it is by now,
// and says whether it still could.
func (s *Server) retarget(j *job, to *sconn, level uint8) bool {
	if j.state == sending && level < 2 && !j.rush {
		j.rush = true // it stays where it is, but waits no more
		if j.target != nil {
			j.target.poke()
		}
	}
	if j.target == to && j.item.level <= level || j.state == sending {
		return false
	}
	switch j.state {
	case queued:
		s.q.remove(&j.item)
		j.item.level = level
		s.aim(j, to)
		s.q.push(&to.own, &j.item, false)
	case running:
		s.aim(j, to)
	case ready:
		s.move(j, to)
	}
	return true
}

// drop ends a job that is no longer wanted.
func (s *Server) drop(j *job) {
	switch j.state {
	case gone:
		return
	case queued:
		s.q.remove(&j.item)
	case ready:
		j.target.unqueue(j)
		j.bytes.release()
		j.bytes = nil
	}
	s.forget(j)
}

// forget takes a job out of all counts.
func (s *Server) forget(j *job) {
	if j.charge != nil {
		j.charge.outstanding--
		j.charge = nil
	}
	s.aim(j, nil)
	j.state = gone
	if j.sess.jobs[j.key] == j {
		delete(j.sess.jobs, j.key)
	}
}

// mayGo says how many chunks of a connection's next run may be read now.
func mayGo(o *owner, it *item) int {
	c, v := o.of.(*sconn), it.of.(*job).vol
	budget, most := budgetBackground, maxRead
	if c.role == roleDemand {
		budget, most = budgetDemand, maxDemandRead
	}
	if c.inflight >= budget || it.level >= 2 && v.load.running >= v.load.limit() {
		return 0
	}
	return max(1, most/v.chunk)
}

// mostBackground is how many background reads may be under way, of all sources.
func (s *Server) mostBackground() int { return max(s.o.BackgroundFloor, s.o.Workers*3/4) }

// dispatch starts as many reads as may run. Server.mu is held. It is called
// whenever something changed that could let one more start.
func (s *Server) dispatch() {
	for s.running[0]+s.running[1] < s.o.Workers {
		kept := 0 // the floor: places that demand does not take
		if s.running[1] < s.o.BackgroundFloor && s.q.waiting(2, numLevels) > 0 {
			kept = min(s.o.BackgroundFloor-s.running[1], s.o.Workers-1)
		}
		class := 0
		s.scratch = s.scratch[:0]
		if s.running[0]+s.running[1]+kept < s.o.Workers {
			s.scratch = s.q.take(s.scratch, 0, 2, mayGo)
		}
		if len(s.scratch) == 0 && s.running[1] < s.mostBackground() {
			class = 1
			s.scratch = s.q.take(s.scratch, 2, numLevels, mayGo)
		}
		if len(s.scratch) == 0 && kept > 0 { // background cannot use its places now
			class = 0
			s.scratch = s.q.take(s.scratch, 0, 2, mayGo)
		}
		if len(s.scratch) == 0 {
			return
		}
		batch := make([]*job, len(s.scratch))
		for i, it := range s.scratch {
			j := it.of.(*job)
			j.state = running
			j.target.inflight += j.plain()
			batch[i] = j
		}
		s.running[class]++
		load := batch[0].vol.load
		if class == 1 {
			load.running++
		}
		c := batch[0].target
		c.wg.Go(func() {
			s.work(c, batch, class)
			s.mu.Lock()
			s.running[class]--
			if class == 1 {
				load.running--
			}
			s.dispatch()
			s.mu.Unlock()
		})
	}
}

// work answers a run of chunks: from memory those whose content the client
// has, and the others by reading and sealing them.
func (s *Server) work(c *sconn, batch []*job, class int) {
	known := make([]chunk.Packed, len(batch)) // codec Raw: not known
	for i, j := range batch {
		known[i] = j.remembered()
	}
	for at := 0; at < len(batch); {
		end := at + 1
		for end < len(batch) && (known[end].Codec == chunk.Raw) == (known[at].Codec == chunk.Raw) {
			end++
		}
		if known[at].Codec == chunk.Raw {
			s.read(c, batch[at:end], class)
		} else {
			s.mu.Lock() // once, or the sender would write a frame for each
			s.stats.Remembered += int64(end - at)
			for i := at; i < end; i++ {
				s.ready(batch[i], known[i], nil)
			}
			s.mu.Unlock()
		}
		at = end
	}
}

// remembered is the answer for a chunk that need not be read, or has codec Raw.
func (j *job) remembered() (p chunk.Packed) {
	v := j.vol
	if v.sigs == nil {
		return p
	}
	j.token = v.sigs.Token(j.key.index)
	if j.flags.Has(block.Full) {
		return p
	}
	sum, zero, ok := v.sigs.Get(j.key.index)
	switch {
	case !ok:
	case zero:
		p.Codec, p.Plain = chunk.Zeros, j.plain()
	default:
		j.sum = &sum
		if sig := v.key.Of(sum); v.view.has(markOf(&sig)) {
			p = chunk.Packed{Codec: chunk.Known, Sig: sig, Plain: j.plain()}
		}
	}
	return p
}

// read reads a run of chunks and seals each.
func (s *Server) read(c *sconn, batch []*job, class int) {
	v, first := batch[0].vol, batch[0].key.index
	total := 0
	for _, j := range batch {
		total += j.plain()
	}
	buf := s.leases.get(total)
	defer buf.release()
	plain := buf.b[:total]
	began := time.Now()
	err := v.dev.ReadAt(c.ctx, plain, first*int64(v.chunk), batch[0].flags&^block.Full)
	now := time.Now()
	s.mu.Lock()
	v.load.sample(now, now.Sub(began), total)
	s.stats.SourceReads++
	s.stats.SourceBytes += int64(total)
	s.mu.Unlock()
	for i, j := range batch {
		at := i * v.chunk
		p := plain[at : at+v.length(j.key.index)]
		e := err
		if err != nil && len(batch) > 1 {
			// One bad chunk must not fail its neighbours.
			e = v.dev.ReadAt(c.ctx, p, j.key.index*int64(v.chunk), j.flags&^block.Full)
		}
		if e != nil {
			s.unreadable(j, e)
			continue
		}
		s.seal(j, p, buf, class)
	}
}

func (s *Server) seal(j *job, plain []byte, buf *lease, class int) {
	if class == 1 {
		defer s.place()()
	}
	watch := startWatch()
	level := j.sess.pack.at(class)
	var p chunk.Packed
	var out *lease
	if j.vol.cutter != nil {
		p, out = s.bundle(j, plain, level)
	} else if p = s.sign(j, plain); p.Codec == chunk.Raw {
		out = s.leases.get(len(plain))
		if p.Codec, p.Data = chunk.Squeeze(out.b, plain, level); p.Codec == chunk.Raw {
			out.release()
			buf.retain()
			out = buf
		}
	}
	took := watch.stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	if class == 1 && out != nil && j.state == running {
		// The link is behind when at least half of what is between queue and socket
		// waits for it, with what is being sent; else packing is.
		ready := len(j.target.out)
		behind := ready > 0 && 2*(ready+1)*j.vol.chunk >= j.target.inflight
		j.sess.pack.add(time.Now(), sample{len(plain), len(p.Data), took,
			time.Duration(s.held.Load()), behind, s.q.waiting(2, numLevels) > 0})
	}
	s.ready(j, p, out)
}

// demandLinger is how long after demand a processor is left to it: who reads
// once mostly reads again.
const demandLinger = 250 * time.Millisecond

// place waits for one of the places that background is packed in, and returns
// what gives it back. There are as many as processors, but one less while there
// is demand, which must not stand behind bulk packing in the scheduler's queue.
func (s *Server) place() func() {
	s.mu.Lock()
	shy := s.demandBusy > 0 || time.Since(s.lastDemand) < demandLinger
	s.mu.Unlock()
	places := cap(s.seals)
	if shy {
		places = cap(s.fewer)
		s.fewer <- struct{}{}
	}
	s.seals <- struct{}{}
	began := time.Now()
	return func() {
		s.held.Add(int64(time.Since(began)) / int64(places))
		<-s.seals
		if shy {
			<-s.fewer
		}
	}
}

// bundle packs a chunk that is cut by content.
func (s *Server) bundle(j *job, plain []byte, level chunk.Level) (chunk.Packed, *lease) {
	v := j.vol
	var held func(chunk.Sig) bool
	if !j.flags.Has(block.Full) && v.view != nil {
		held = func(sig chunk.Sig) bool { return v.view.has(markOf(&sig)) }
	}
	out := s.leases.get(len(plain))
	p := chunk.BuildBundle(out.b, plain, v.cutter, &v.key, func(buf, piece []byte) (chunk.Codec, []byte) {
		return chunk.Squeeze(buf, piece, level)
	}, held)
	if p.Codec != chunk.Zeros {
		s.hashed.Add(int64(len(plain)))
	}
	if v.sigs != nil {
		v.sigs.Learn(j.key.index, j.token, p.Sig, p.Codec == chunk.Zeros)
	}
	if p.Codec != chunk.Bundle {
		out.release()
		out = nil
	}
	return p, out
}

// sign finds out what plain holds: zeros, a chunk that the client has, or one
// to be packed (Raw).
func (s *Server) sign(j *job, plain []byte) chunk.Packed {
	v, i := j.vol, j.key.index
	p := chunk.Packed{Codec: chunk.Raw, Plain: len(plain)}
	if chunk.AllZero(plain) {
		p.Codec = chunk.Zeros
		if v.sigs != nil {
			v.sigs.Learn(i, j.token, chunk.Sig{}, true)
		}
		return p
	}
	if j.sum == nil {
		sum := chunk.Sum(plain)
		j.sum = &sum
		s.hashed.Add(int64(len(plain)))
		if v.sigs != nil {
			v.sigs.Learn(i, j.token, sum, false)
		}
	}
	p.Sig = v.key.Of(*j.sum)
	if !j.flags.Has(block.Full) && v.view.has(markOf(&p.Sig)) {
		p.Codec = chunk.Known
	}
	return p
}

// ready puts a sealed chunk where its connection's sender takes it, bytes with
// it. Server.mu is held.
func (s *Server) ready(j *job, p chunk.Packed, bytes *lease) {
	if j.state != running {
		bytes.release()
		return
	}
	to := j.target
	if j.vol.view != nil && p.Codec != chunk.Zeros && p.Codec != chunk.Known {
		// What stands before it in the same connection is there before it.
		switch m := markOf(&p.Sig); {
		case to.carried.has(m) && !j.flags.Has(block.Full):
			bytes.release()
			p, bytes = chunk.Packed{Codec: chunk.Known, Sig: p.Sig, Plain: p.Plain}, nil
		default:
			to.carried.add(m)
		}
	}
	j.state, j.packed, j.bytes = ready, p, bytes
	if to.role == roleDemand {
		s.demandDue++
	}
	to.out = append(to.out, j)
	to.poke()
	if to.roams && len(to.out) > 1 {
		for _, c := range j.sess.conns[1:] {
			if c != nil && c.roams && len(c.out) == 0 {
				c.poke() // it may take over something
			}
		}
	}
}

func (s *Server) unreadable(j *job, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if j.state != running {
		return
	}
	s.stats.ReadErrors++
	e := wireError{kind: block.KindOf(err), runs: []run{{j.key.index, 1}}, text: err.Error()}
	c := j.target
	s.forget(j)
	c.sayLocked(appendError(nil, j.vol.handle, j.key.req, e))
}
