package sched

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
	"forerun/internal/hist"
)

// Link asks the other side for chunks.
type Link interface {
	// Fetch asks for the chunks idx in one request of class f and blocks until
	// each was handed to deliver once, as it arrives, in any order; p.Data is
	// valid during the call only. An error means that the request failed as a
	// whole: what was not delivered will not be.
	Fetch(ctx context.Context, idx []int64, f block.Flags, deliver func(i int64, p chunk.Packed, err error)) error
	// Promote tells that chunks asked for in a lower class are waited for now.
	Promote(idx []int64)
}

// Options of a Scheduler; zero values take the defaults.
type Options struct {
	// DemandChunks bounds demand and write-back chunks in flight (256).
	DemandChunks int
	// BatchChunks bounds one request (8).
	BatchChunks int
	// ChunkBytes is the plain size of a chunk, the first guess of its wire size.
	ChunkBytes int
	// Target is how much queueing the background may cause (25 ms); a part of
	// that while demand is active.
	Target time.Duration
	// MaxWindow bounds background wire bytes in flight (64 MiB).
	MaxWindow int64
	// Floor is how many background requests may always be under way (1).
	Floor int
	// Limiter bounds the background of several schedulers together; nil: nothing does.
	Limiter *Limiter
	// Here, if set, says that a chunk need not be fetched any more: what background
	// asked for may turn out to be here while it waits. It must not block.
	Here func(i int64) bool
	// Ready says that the network keeps background from hurting demand: the
	// window is MaxWindow.
	Ready bool
}

// pacedTarget is the queueing that is aimed at when it waits at the far end,
// where demand overtakes it: enough to keep that end busy.
const pacedTarget = 100 * time.Millisecond

// attempts bounds how often a chunk that arrives damaged is asked for again.
const attempts = 4

// demandLinger is how long after a demand read the background stays careful:
// a workload that reads once mostly reads again.
const demandLinger = 50 * time.Millisecond

// perChunkBytes is what a chunk costs on the wire beside its packed bytes.
const perChunkBytes = 64

// Scheduler waits, joins and asks. It is a volume's way to the link.
type Scheduler struct {
	link Link
	sink func(i int64, p chunk.Packed) error
	opts Options

	ctx    context.Context // of the requests; ends with Close
	cancel context.CancelFunc
	group  sync.WaitGroup

	mu         sync.Mutex
	q          *Queue
	flights    map[int64]*flight
	window     *Window
	avg        float64 // wire bytes of a chunk, lately
	rate       bucket
	paused     bool
	bgRequests int         // background requests under way
	lastDemand time.Time   // when demand was last asked for or answered
	wake       *time.Timer // set while the rate limit holds work back
	closed     bool

	wait      hist.H
	delivered atomic.Int64
	wire      [3]atomic.Int64 // packed bytes by class
	joined    atomic.Int64
	raised    atomic.Int64
	corrupt   atomic.Int64
	repaired  atomic.Int64
	fetches   atomic.Int64
}

// flight is a chunk that is wanted, and the calls that wait for it.
type flight struct {
	calls []*call
	tries int
	full  bool // its bytes are needed, a signature has not helped
}

// call is one Fetch. Its fields are guarded by Scheduler.mu until done is closed.
type call struct {
	left int
	err  error
	done chan struct{}
}

// New returns a scheduler over link. sink takes each chunk that arrives; it
// runs on the link's goroutine, and its error is that of whoever waits for the
// chunk, but KindCorrupt has the chunk asked for again, and so has KindNotFound,
// which means that a signature alone was not enough; then with block.Full.
func New(link Link, sink func(i int64, p chunk.Packed) error, o Options) *Scheduler {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&o.DemandChunks, 256)
	def(&o.BatchChunks, 8)
	def(&o.Floor, 1)
	def(&o.ChunkBytes, chunk.DefaultSize)
	if o.Target <= 0 {
		o.Target = 25 * time.Millisecond
	}
	if o.MaxWindow <= 0 {
		o.MaxWindow = 64 << 20
	}
	s := &Scheduler{link: link, sink: sink, opts: o, q: NewQueue(), flights: map[int64]*flight{},
		avg: float64(o.ChunkBytes) / 2}
	least := min(int64(2*o.ChunkBytes), o.MaxWindow)
	if o.Ready {
		least = o.MaxWindow
	}
	s.window = NewWindow(WindowOptions{Min: least, Max: o.MaxWindow, Target: o.Target})
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Fetch returns when each chunk of idx has been handed to the sink, or failed;
// the error is the first one's. A ctx that ends abandons the wait: what is on
// its way still arrives, what only this call wanted and was not sent is dropped.
func (s *Scheduler) Fetch(ctx context.Context, idx []int64, f block.Flags) error {
	if len(idx) == 0 {
		return nil
	}
	c := &call{left: len(idx), done: make(chan struct{})}
	began := time.Now()
	var promote []int64
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return block.E("sched.fetch", "", block.KindClosed, nil)
	}
	for _, i := range idx {
		switch s.q.Add(i, f) {
		case Fresh:
			s.flights[i] = &flight{}
		case Joined:
			s.joined.Add(1)
		case Raised:
			s.raised.Add(1)
		case Promote:
			s.raised.Add(1)
			promote = append(promote, i)
		}
		s.flights[i].calls = append(s.flights[i].calls, c)
	}
	demand := f.Class() == block.Demand
	if demand {
		s.lastDemand = began
	}
	s.dispatch(began)
	s.mu.Unlock()
	if len(promote) > 0 {
		s.link.Promote(promote)
	}
	select {
	case <-c.done:
	case <-ctx.Done():
		if !s.abandon(c, idx) {
			return block.E("sched.fetch", fmt.Sprintf("%d chunks from %d", len(idx), idx[0]), block.KindCanceled, context.Cause(ctx))
		}
		<-c.done
	}
	if demand {
		s.wait.Observe(time.Since(began))
	}
	return c.err
}

// abandon takes c from the flights it waits for, and drops those nobody wants
// any more. It says whether c was done already.
func (s *Scheduler) abandon(c *call, idx []int64) (done bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.left == 0 {
		return true
	}
	for _, i := range idx {
		fl := s.flights[i]
		if fl == nil {
			continue
		}
		kept := fl.calls[:0]
		for _, o := range fl.calls {
			if o != c {
				kept = append(kept, o)
			}
		}
		fl.calls = kept
		if len(kept) == 0 && !s.q.Sent(i) {
			s.q.Done(i)
			delete(s.flights, i)
		}
	}
	return false
}

// dispatch sends what may go now. s.mu is held.
func (s *Scheduler) dispatch(now time.Time) {
	if s.closed {
		return
	}
	for s.q.sent[rankDemand]+s.q.sent[rankWriteBack] < s.opts.DemandChunks {
		room := min(s.opts.BatchChunks, s.opts.DemandChunks-s.q.sent[rankDemand]-s.q.sent[rankWriteBack])
		r := rankDemand
		batch := s.q.Next(r, room)
		if batch == nil {
			r = rankWriteBack
			if batch = s.q.Next(r, room); batch == nil {
				break
			}
		}
		s.send(now, batch, r)
	}
	for s.mayBackground(now) {
		r := rankSoon
		most := s.backgroundBatch()
		batch := s.q.Next(r, most)
		if batch == nil {
			if s.paused {
				return
			}
			r = rankSweep
			if batch = s.q.Next(r, most); batch == nil {
				return
			}
		}
		if batch = s.without(batch); len(batch) > 0 {
			s.send(now, batch, r)
		}
	}
}

// without ends the wait for those of a background batch that are here by now,
// and returns the others. s.mu is held.
func (s *Scheduler) without(batch []int64) []int64 {
	if s.opts.Here == nil {
		return batch
	}
	kept := batch[:0]
	for _, i := range batch {
		if fl := s.flights[i]; fl != nil && !fl.full && s.opts.Here(i) {
			s.end(i, nil)
			continue
		}
		kept = append(kept, i)
	}
	return kept
}

func (s *Scheduler) demandActive(now time.Time) bool {
	return s.q.sent[rankDemand]+s.q.queued[rankDemand] > 0 || now.Sub(s.lastDemand) < demandLinger
}

// mayBackground says whether one more background request may go.
func (s *Scheduler) mayBackground(now time.Time) bool {
	if s.q.queued[rankSoon]+s.q.queued[rankSweep] == 0 {
		return false
	}
	if d := max(s.rate.wait(now), s.opts.Limiter.wait(ClassBackground, now)); d > 0 {
		s.wakeIn(d)
		return false
	}
	if s.bgRequests < s.opts.Floor {
		return true // never starved
	}
	return s.inFlight() < s.window.Bytes()
}

// backgroundBatch is how many chunks one background request asks for: an
// eighth of the window, lest one request alone outweigh a small window.
func (s *Scheduler) backgroundBatch() int {
	return min(max(int(float64(s.window.Bytes())/8/max(s.avg, 1)), 1), s.opts.BatchChunks)
}

// inFlight estimates the background wire bytes on their way. A run of zeros
// must not make the next chunks look free, so a chunk counts as something.
func (s *Scheduler) inFlight() int64 {
	return int64(float64(s.q.sent[rankSoon]+s.q.sent[rankSweep]) * max(s.avg, float64(s.opts.ChunkBytes)/8))
}

func (s *Scheduler) wakeIn(d time.Duration) {
	if s.wake != nil {
		return
	}
	s.wake = time.AfterFunc(d, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.wake = nil
		s.dispatch(time.Now())
	})
}

// send starts one request. s.mu is held.
func (s *Scheduler) send(now time.Time, batch []int64, r rank) {
	s.fetches.Add(1)
	bg := r >= rankSoon
	var charge int64 // of the rate limit, a chunk: an estimate, put right on arrival
	if bg {
		s.bgRequests++
		charge = int64(s.avg)
		s.rate.take(now, charge*int64(len(batch)))
		s.opts.Limiter.take(ClassBackground, now, charge*int64(len(batch)))
	}
	f := r.flags()
	for _, i := range batch {
		if fl := s.flights[i]; fl != nil && fl.full {
			f |= block.Full
		}
	}
	s.group.Go(func() { s.request(now, batch, r, f, bg, charge) })
}

func (s *Scheduler) request(began time.Time, batch []int64, r rank, f block.Flags, bg bool, charge int64) {
	left := make(map[int64]bool, len(batch))
	for _, i := range batch {
		left[i] = true
	}
	var mu sync.Mutex // deliver may be called from two connections after a Promote
	var first time.Duration
	var bytes int64
	err := s.link.Fetch(s.ctx, batch, f, func(i int64, p chunk.Packed, err error) {
		mu.Lock()
		known := left[i]
		delete(left, i)
		if first == 0 {
			first = max(time.Since(began), 1)
		}
		n := int64(len(p.Data)) + perChunkBytes
		bytes += n
		mu.Unlock()
		if known {
			s.arrived(i, p, n, charge, err, r)
		}
	})
	if err == nil && len(left) > 0 {
		err = errors.New("the link ended a request without delivering it")
	}
	now := time.Now()
	for i := range left {
		s.finish(i, block.E("sched.fetch", fmt.Sprintf("chunk %d", i), block.KindNone, err))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if bg {
		limited := 2*(s.inFlight()+bytes) >= s.window.Bytes()
		s.bgRequests--
		if first > 0 {
			s.window.Sample(now, first, bytes, limited, s.demandActive(now))
		}
	}
	s.dispatch(now)
}

// arrived hands one chunk to the sink.
func (s *Scheduler) arrived(i int64, p chunk.Packed, wire, charge int64, err error, r rank) {
	class := r.flags().Class()
	s.wire[class].Add(wire)
	if err == nil {
		s.delivered.Add(1)
		err = s.sink(i, p)
	}
	now := time.Now()
	s.mu.Lock()
	s.avg += (float64(wire) - s.avg) / 32
	if class == block.Background {
		s.rate.take(now, wire-charge)
		s.opts.Limiter.take(ClassBackground, now, wire-charge)
	} else {
		s.lastDemand = now
	}
	if k := block.KindOf(err); k == block.KindCorrupt || k == block.KindNotFound && p.Sig != (chunk.Sig{}) {
		if k == block.KindCorrupt {
			s.corrupt.Add(1)
		} else {
			s.repaired.Add(1)
		}
		if fl := s.flights[i]; fl != nil && fl.tries+1 < attempts && !s.closed {
			fl.tries++
			fl.full = true
			flags := s.q.items[i].rank.flags()
			s.q.Done(i)
			s.q.Add(i, flags)
			s.dispatch(now)
			s.mu.Unlock()
			return
		}
	}
	s.mu.Unlock()
	s.finish(i, err)
}

// finish ends the wait for one chunk.
func (s *Scheduler) finish(i int64, err error) {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.end(i, err) {
		s.dispatch(now)
	}
}

// end is finish with s.mu held; it says whether anybody waited.
func (s *Scheduler) end(i int64, err error) bool {
	fl := s.flights[i]
	if fl == nil {
		return false
	}
	s.q.Done(i)
	delete(s.flights, i)
	for _, c := range fl.calls {
		c.left--
		if c.err == nil {
			c.err = err
		}
		if c.left == 0 {
			close(c.done)
		}
	}
	return true
}

// Pause holds the sweep back; demand and read-ahead go on.
func (s *Scheduler) Pause() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused = true
}

// Resume lets the sweep go on.
func (s *Scheduler) Resume() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused = false
	s.dispatch(time.Now())
}

// SetPaced says whether the far end bounds the queue on the way itself. What
// is asked for ahead waits there then, and is overtaken by demand.
func (s *Scheduler) SetPaced(paced bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	target := s.opts.Target
	if paced {
		target = max(target, pacedTarget)
	}
	s.window.SetFar(paced, target)
}

// SetBackgroundRate limits background bytes a second on the link, live; 0 for no limit.
func (s *Scheduler) SetBackgroundRate(bytesPerSecond int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rate.setRate(time.Now(), bytesPerSecond)
	if s.wake != nil {
		s.wake.Stop()
		s.wake = nil
	}
	s.dispatch(time.Now())
}

// Close fails what waits with KindClosed and returns when all requests have ended.
func (s *Scheduler) Close() error {
	s.mu.Lock()
	s.closed = true
	if s.wake != nil {
		s.wake.Stop()
	}
	var queued []int64
	for i := range s.flights {
		if !s.q.Sent(i) {
			queued = append(queued, i)
		}
	}
	s.mu.Unlock()
	s.cancel()
	for _, i := range queued {
		s.finish(i, block.E("sched.fetch", fmt.Sprintf("chunk %d", i), block.KindClosed, nil))
	}
	s.group.Wait()
	return nil
}
