package sigs

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
)

// ScanOptions of a Scanner.
type ScanOptions struct {
	// Hold, if set, says that the source or the processor is needed for something
	// else. It is asked before each read, and while it says so ten times a second.
	Hold func() bool
	// Sum is what Data is learned with; nil is chunk.Sum.
	Sum func(plain []byte) chunk.Sig
	Log *slog.Logger // nil is silent
}

// ScanState says what a Scanner does.
type ScanState string

// The states.
const (
	ScanStopped ScanState = "stopped" // Run was not called or has returned
	ScanRunning ScanState = "running" // it learns, or waits to try again what it could not
	ScanHolding ScanState = "holding" // it waits because Hold says so
	ScanDone    ScanState = "done"    // nothing is unknown
)

// ScanStats is where a Scanner stands.
type ScanStats struct {
	State        ScanState
	Known, Total int64         // chunks
	Hashed       int64         // bytes, since it was made
	Errors       int64         // chunks that could not be read, each time
	Pause        time.Duration // that it makes between reads because the source is slow
}

const (
	maxRead   = 1 << 20
	firstAsk  = 64 << 20 // bytes one question for extents is about, while there is data
	lastAsk   = 4 << 40  // and in a long hole
	holdPoll  = 100 * time.Millisecond
	firstIdle = time.Second // until what could not be learned is tried again
	lastIdle  = time.Minute
	rescan    = 2 * time.Second // from a change to its chunks being hashed: more may follow
	saveEvery = 5 * time.Second
)

// Scanner learns what is unknown of a source, in disk order, at most half of the
// time of one processor, one read at a time, and gives way.
type Scanner struct {
	dev  block.Device
	t    *Table
	o    ScanOptions
	log  *slog.Logger
	size int64
	cb   int64 // chunk length in bytes
	most int64 // chunks of one read

	mu    sync.Mutex
	stats ScanStats

	// Of Run alone.
	buf   []byte
	facts []fact
	exts  []block.Extent
	pace  pace
	saved time.Time
	said  bool // a read failed, and that was logged
}

// NewScanner makes a Scanner of the source dev, which t is about.
func NewScanner(dev block.Device, t *Table, o ScanOptions) *Scanner {
	if o.Sum == nil {
		o.Sum = chunk.Sum
	}
	if o.Hold == nil {
		o.Hold = func() bool { return false }
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Scanner{dev: dev, t: t, o: o, log: o.Log, size: dev.Info().Size, cb: t.o.ChunkBytes}
	s.most = max(1, maxRead/s.cb)
	s.stats.State = ScanStopped
	return s
}

// Stats returns the numbers now.
func (s *Scanner) Stats() ScanStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	data, zero := s.t.Known()
	st.Known, st.Total = data+zero, s.t.o.Chunks
	return st
}

func (s *Scanner) set(change func(*ScanStats)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.stats)
}

func (s *Scanner) state(now ScanState) { s.set(func(st *ScanStats) { st.State = now }) }

// Run learns until ctx ends or the table is closed or off. It may be called
// again, not twice at once.
func (s *Scanner) Run(ctx context.Context) {
	defer s.state(ScanStopped)
	s.buf = make([]byte, s.most*s.cb)
	s.facts = make([]fact, 0, s.most)
	defer func() { s.buf, s.facts, s.exts = nil, nil, nil }()
	s.saved = time.Now()
	idle := firstIdle
	for !s.t.shut.Load() && ctx.Err() == nil {
		s.state(ScanRunning)
		seen, had := s.t.forgot.n.Load(), s.t.Version()
		s.pass(ctx)
		s.t.save()
		if s.t.nextUnknown(0) < s.t.o.Chunks {
			if s.t.Version() != had {
				idle = firstIdle
			}
			s.sleep(ctx, idle)
			idle = min(2*idle, lastIdle)
			continue
		}
		idle = firstIdle
		if s.t.shut.Load() {
			return
		}
		s.state(ScanDone)
		if _, err := s.t.forgot.wait(ctx, seen); err == nil && !s.t.shut.Load() {
			s.sleep(ctx, rescan)
		}
	}
}

// sleep answers whether ctx goes on.
func (s *Scanner) sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// hold answers whether ctx goes on, once nothing else needs the source.
func (s *Scanner) hold(ctx context.Context) bool {
	if !s.o.Hold() {
		return ctx.Err() == nil && !s.t.shut.Load()
	}
	s.state(ScanHolding)
	defer s.state(ScanRunning)
	for s.o.Hold() {
		if !s.sleep(ctx, holdPoll) || s.t.shut.Load() {
			return false
		}
	}
	return ctx.Err() == nil
}

// pass goes over the source once.
func (s *Scanner) pass(ctx context.Context) {
	ask := int64(firstAsk)
	for i := s.t.nextUnknown(0); i*s.cb < s.size && i < s.t.o.Chunks; i = s.t.nextUnknown(i) {
		if !s.hold(ctx) {
			return
		}
		end, data, err := s.zeros(ctx, i, ask)
		if err != nil {
			// All is data then; whether it can be read, the read says.
			end, data = min(i+s.most, s.t.o.Chunks), true
		}
		if ask = min(4*ask, lastAsk); data {
			ask = firstAsk
		}
		if !s.reads(ctx, i, end) {
			return
		}
		i = end
		if time.Since(s.saved) > saveEvery {
			s.t.save()
			s.saved = time.Now()
		}
	}
}

// zeros learns what the device knows to be zero in the n bytes from chunk i on.
// It answers where what was described ends, at least one chunk further, and
// whether there is data in it.
func (s *Scanner) zeros(ctx context.Context, i, n int64) (end int64, data bool, err error) {
	off := i * s.cb
	n = min(n, s.size-off)
	if !s.dev.Info().CanExtents {
		return i + (n+s.cb-1)/s.cb, true, nil
	}
	tokens := s.t.tokens()
	if s.exts, err = s.dev.Extents(ctx, s.exts[:0], off, n, block.Background); err != nil {
		return 0, false, err
	}
	at, from := off, off // [from, at) is zero
	learn := func() {
		first, last := (from+s.cb-1)/s.cb, at/s.cb
		if at == s.size {
			last = s.t.o.Chunks
		}
		if last > first {
			s.t.learnZeros(first, last-first, tokens)
		}
	}
	for _, e := range s.exts {
		if !e.Kind.Zero() {
			learn()
			from, data = e.End(), true
		}
		at = e.End()
	}
	learn()
	if end = at / s.cb; at == s.size {
		end = s.t.o.Chunks
	}
	return max(end, i+1), data, nil
}

// reads reads and hashes what is unknown in [i, end). It answers whether to go on.
func (s *Scanner) reads(ctx context.Context, i, end int64) bool {
	for {
		if i = s.t.nextUnknown(i); i >= end || i*s.cb >= s.size {
			return ctx.Err() == nil
		}
		if !s.hold(ctx) {
			return false
		}
		n := max(1, s.t.unknownRun(i, min(s.most, end-i)))
		err := s.read(ctx, i, n)
		if err != nil && n > 1 { // one bad chunk must not hide its neighbours
			for k := range n {
				if err = s.read(ctx, i+k, 1); ctx.Err() != nil {
					return false
				}
				s.failed(err, i+k)
			}
		} else {
			s.failed(err, i)
		}
		s.set(func(st *ScanStats) { st.Pause = s.pace.pause })
		if !s.sleep(ctx, s.pace.rest+s.pace.pause) {
			return false
		}
		i += n
	}
}

// failed notes how the read of a chunk went.
func (s *Scanner) failed(err error, i int64) {
	if err == nil || block.KindOf(err) == block.KindCanceled {
		return
	}
	s.set(func(st *ScanStats) { st.Errors++ })
	s.pace.slower()
	if !s.said {
		s.said = true
		s.log.Warn("a chunk of the source cannot be read ahead of need; it is tried again later, and others go on",
			"chunk", i, "offset", i*s.cb, "err", err)
	}
}

// read reads n adjacent chunks and learns them.
func (s *Scanner) read(ctx context.Context, i, n int64) error {
	s.facts = s.facts[:0]
	for k := range n {
		s.facts = append(s.facts, fact{token: s.t.Token(i + k)})
	}
	p := s.buf[:min(n*s.cb, s.size-i*s.cb)]
	began := time.Now()
	if err := s.readAll(ctx, p, i*s.cb); err != nil {
		return err
	}
	took := time.Since(began)
	hashed := int64(0)
	for k := range s.facts {
		q := p[int64(k)*s.cb : min(int64(k+1)*s.cb, int64(len(p)))]
		f := &s.facts[k]
		if kind, _ := s.t.Get(i + int64(k)); kind != Unknown {
			continue // somebody else needed it meanwhile
		}
		if int64(len(q)) <= chunk.MaxSize && chunk.AllZero(q) {
			f.kind = Zero
			continue
		}
		f.kind, f.sig = Data, s.o.Sum(q)
		hashed += int64(len(q))
	}
	s.t.learn(i, s.facts)
	s.set(func(st *ScanStats) { st.Hashed += hashed })
	s.pace.note(len(p), took, time.Since(began)-took)
	return nil
}

// readAll reads, in pieces the device allows.
func (s *Scanner) readAll(ctx context.Context, p []byte, off int64) error {
	step := len(p)
	if m := s.dev.Info().MaxIO; m > 0 {
		step = min(step, m)
	}
	for len(p) > 0 {
		n := min(step, len(p))
		if err := s.dev.ReadAt(ctx, p[:n], off, block.Background); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

const (
	lastReads   = 5 // that the median is of
	slowFactor  = 4
	slowAtLeast = 2 * time.Millisecond
	firstPause  = 50 * time.Millisecond
	lastPause   = 5 * time.Second
	bestFor     = 5 * time.Minute // a best is forgotten after once to twice that
)

// pace decides how long to rest between reads.
type pace struct {
	rest  time.Duration // for the time of the processor
	pause time.Duration // for the source

	reads [lastReads]time.Duration
	n     int
	best  time.Duration // of the medians since then
	older time.Duration // of the bestFor before; 0: there is none
	since time.Time
}

// note takes in a read of n bytes that took so long, and the work on what it brought.
func (p *pace) note(n int, read, work time.Duration) {
	// A read from memory is work too; the disk's time is not.
	p.rest = work + min(read, work)
	// As long as a read of maxRead bytes would have taken, when a quarter of its
	// time does not depend on the length.
	p.reads[p.n%lastReads] = time.Duration(float64(read) / (0.25 + 0.75*float64(n)/maxRead))
	if p.n++; p.n < lastReads {
		return
	}
	sorted := p.reads
	slices.Sort(sorted[:])
	median := sorted[lastReads/2]
	switch now := time.Now(); {
	case p.since.IsZero():
		p.best, p.since = median, now
	case now.Sub(p.since) > bestFor:
		p.older, p.best, p.since = p.best, median, now
	}
	p.best = min(p.best, median)
	best := p.best
	if p.older > 0 {
		best = min(best, p.older)
	}
	if median > slowAtLeast && median > slowFactor*best {
		p.slower()
	} else if p.pause /= 2; p.pause < firstPause {
		p.pause = 0
	}
}

func (p *pace) slower() { p.pause = min(max(2*p.pause, firstPause), lastPause) }
