package volume

import (
	"context"
	"sync"
	"sync/atomic"

	"forerun/block"
)

// ahead asks for what a run of reads will want next, below demand and above
// the rest of the background. A run is known by its misses at first; once its
// next chunks are asked for, the first of them is marked, and the read that
// reaches the mark asks for the window after it. So a run that is served here
// all the time still goes on ahead of its reader.
type ahead struct {
	v     *Volume
	ctx   context.Context
	marks [256]atomic.Int64  // chunk+1, at the chunk modulo 256
	soon  [1024]atomic.Int64 // chunks on their way for it: chunk+1, at the chunk modulo 1024

	mu      sync.Mutex
	streams []stream
	clock   uint64

	slots chan struct{}
	wg    sync.WaitGroup
}

// stream is one ascending run.
type stream struct {
	last   int64 // the last chunk read
	asked  int64 // the first chunk not asked for
	window int
	used   uint64
}

// gap is how many chunks a run may skip and still be one.
const gap = 4

// aheadFetches bounds the fetches under way for read-ahead; more are dropped.
const aheadFetches = 8

func (a *ahead) init(v *Volume, ctx context.Context) {
	a.v, a.ctx = v, ctx
	if v.opt.Tune.AheadMax > 0 {
		a.streams = make([]stream, max(v.opt.Tune.AheadStreams, 1))
	}
	a.slots = make(chan struct{}, aheadFetches)
}

func (a *ahead) wait() { a.wg.Wait() }

// reached is told of every demand read of the chunks [from, to].
func (a *ahead) reached(from, to int64) {
	for i := from; i <= to; i++ {
		if m := &a.marks[i&255]; m.Load() == i+1 && m.CompareAndSwap(i+1, 0) {
			a.missed(i, to)
		}
	}
}

// brought says whether a chunk that arrived was asked for here lately.
func (a *ahead) brought(i int64) bool {
	m := &a.soon[i&1023]
	return m.Load() == i+1 && m.CompareAndSwap(i+1, 0)
}

// missed is told of a demand read of the chunks [from, to] that starts or
// continues a run, and asks for what follows.
func (a *ahead) missed(from, to int64) {
	if a.streams == nil {
		return
	}
	first, n := a.next(from, to)
	if n == 0 {
		return
	}
	idx := a.v.table.absent(nil, first, first+int64(n), n)
	a.marks[first&255].Store(first + 1)
	if len(idx) == 0 {
		return
	}
	remote := a.v.getRemote()
	if remote == nil {
		return
	}
	select {
	case a.slots <- struct{}{}:
	default:
		return
	}
	for _, i := range idx {
		a.soon[i&1023].Store(i + 1)
	}
	a.wg.Add(1)
	go func() {
		defer a.wg.Done()
		a.v.n.ahead.Add(int64(len(idx)))
		// Nobody waits for it: what fails is asked for again on demand.
		_ = remote.Fetch(a.ctx, idx, block.Background|block.Soon)
		<-a.slots
	}()
}

// next finds the run that [from, to] continues, or begins one, and returns
// which chunks to ask for.
func (a *ahead) next(from, to int64) (first int64, n int) {
	tune := &a.v.opt.Tune
	a.mu.Lock()
	defer a.mu.Unlock()
	a.clock++
	oldest := &a.streams[0]
	for k := range a.streams {
		s := &a.streams[k]
		if s.used != 0 && to >= s.last && from <= s.asked+gap && from >= s.last-gap {
			s.used = a.clock
			if to == s.last {
				return 0, 0
			}
			s.last = to
			s.window = min(max(2*s.window, 2), tune.AheadMax)
			return a.ask(s)
		}
		if s.used < oldest.used {
			oldest = s
		}
	}
	*oldest = stream{last: to, asked: to + 1, window: min(tune.AheadFirst, tune.AheadMax), used: a.clock}
	return a.ask(oldest)
}

func (a *ahead) ask(s *stream) (first int64, n int) {
	first = max(s.asked, s.last+1)
	end := min(s.last+1+int64(s.window), a.v.table.chunks)
	// Beyond the window that is on its way, one more: the reader is at its start.
	if first > s.last+1 {
		end = min(first+int64(s.window), a.v.table.chunks)
	}
	if end <= first {
		return 0, 0
	}
	s.asked = end
	return first, int(end - first)
}
