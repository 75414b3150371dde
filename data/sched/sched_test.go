package sched

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
)

// line is a far end with a round trip and a rate, in virtual time: demand goes
// ahead of background at the far end, then both share one pipe in order.
type line struct {
	rtt   time.Duration
	rate  float64 // bytes a second
	size  int     // packed bytes of a chunk
	fail  func(i int64, try int) error
	mu    sync.Mutex
	free  time.Time // when the pipe has sent what it has
	asked map[int64]int
	sent  int64
	prom  []int64

	signed chunk.Sig      // of what is delivered
	full   map[int64]bool // asked for with Full
	demand int            // requests in that class, with Full
}

func newLine(rtt time.Duration, rate float64, size int) *line {
	return &line{rtt: rtt, rate: rate, size: size, asked: map[int64]int{}, full: map[int64]bool{}}
}

func (l *line) Fetch(ctx context.Context, idx []int64, f block.Flags, deliver func(int64, chunk.Packed, error)) error {
	time.Sleep(l.rtt / 2)
	l.mu.Lock()
	if now := time.Now(); l.free.Before(now) {
		l.free = now
	}
	at := make([]time.Time, len(idx))
	tries := make([]int, len(idx))
	for k, i := range idx {
		l.asked[i]++
		if f.Has(block.Full) {
			l.full[i] = true
			if f.Class() == block.Demand {
				l.demand++
			}
		}
		tries[k] = l.asked[i]
		l.free = l.free.Add(time.Duration(float64(l.size) / l.rate * float64(time.Second)))
		at[k] = l.free.Add(l.rtt / 2)
	}
	l.mu.Unlock()
	for k, i := range idx {
		select {
		case <-time.After(time.Until(at[k])):
		case <-ctx.Done():
			return ctx.Err()
		}
		l.mu.Lock()
		l.sent += int64(l.size)
		l.mu.Unlock()
		var err error
		if l.fail != nil {
			err = l.fail(i, tries[k])
		}
		deliver(i, chunk.Packed{Sig: l.signed, Plain: 64 << 10, Data: make([]byte, l.size)}, err)
	}
	return nil
}

func (l *line) Promote(idx []int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.prom = append(l.prom, idx...)
}

func (l *line) total() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.sent
}

func run(from, n int64) (idx []int64) {
	for i := range n {
		idx = append(idx, from+i)
	}
	return idx
}

func TestEqualRequestsAreJoined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLine(40*time.Millisecond, 12.5e6, 20<<10)
		sunk := map[int64]int{}
		var mu sync.Mutex
		s := New(l, func(i int64, _ chunk.Packed) error { mu.Lock(); sunk[i]++; mu.Unlock(); return nil }, Options{})
		defer s.Close()
		var g sync.WaitGroup
		for k := range 20 {
			f := block.Background
			if k >= 10 {
				f = block.Demand
				synctest.Wait()
			}
			g.Go(func() {
				if err := s.Fetch(context.Background(), run(int64(k%5), 30), f); err != nil {
					t.Error(err)
				}
			})
		}
		g.Wait()
		for i, n := range l.asked {
			if n != 1 || sunk[i] != 1 {
				t.Errorf("chunk %d was asked for %d times and sunk %d times", i, n, sunk[i])
			}
		}
		st := s.Stats()
		if len(l.asked) != 34 || st.Joined == 0 || st.Delivered != 34 || len(l.prom)+int(st.Raised) == 0 {
			t.Errorf("%d chunks, %+v", len(l.asked), st)
		}
		if st.Requests >= 34 {
			t.Errorf("%d requests for 34 chunks", st.Requests)
		}
	})
}

// TestDemandWhileTheLinkIsFull fills the link with background and reads on
// demand beside it: the link stays used, the reads stay fast.
func TestDemandWhileTheLinkIsFull(t *testing.T) {
	for _, rtt := range []time.Duration{time.Millisecond, 40 * time.Millisecond, 200 * time.Millisecond} {
		t.Run(rtt.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const rate, size = 12.5e6, 26 << 10
				l := newLine(rtt, rate, size)
				s := New(l, func(int64, chunk.Packed) error { return nil }, Options{})
				defer s.Close()
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				for k := range int64(32) { // a fill: many calls outstanding
					go func() {
						for n := int64(0); ctx.Err() == nil; n++ {
							_ = s.Fetch(ctx, run((n*32+k)*64, 64), block.Background)
						}
					}()
				}
				time.Sleep(10 * time.Second) // the window finds its size
				sent := l.total()
				began := time.Now()
				var worst, sum time.Duration
				r := rand.New(rand.NewPCG(5, 6))
				const reads = 100
				for k := range reads {
					time.Sleep(time.Duration(r.IntN(300)) * time.Millisecond)
					b := time.Now()
					if err := s.Fetch(ctx, []int64{1<<40 + int64(k)}, block.Demand); err != nil {
						t.Fatal(err)
					}
					d := time.Since(b)
					worst, sum = max(worst, d), sum+d
				}
				used := float64(l.total()-sent) / time.Since(began).Seconds() / rate
				st := s.Stats()
				t.Logf("rtt %v: link %.0f%% used, demand mean %v worst %v, window %d, delay %v over %v", rtt, 100*used, sum/reads, worst, st.WindowBytes, st.Delay, st.BaseDelay)
				if used < 0.90 {
					t.Errorf("the link was used to %.0f%% only", 100*used)
				}
				if idle := rtt + 3*time.Millisecond; worst > idle+60*time.Millisecond {
					t.Errorf("a demand read took %v where an idle link takes %v", worst, idle)
				}
			})
		})
	}
}

func TestBackgroundIsNeverStarved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLine(20*time.Millisecond, 1e6, 20<<10)
		s := New(l, func(int64, chunk.Packed) error { return nil }, Options{})
		defer s.Close()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		for k := range int64(16) {
			go func() {
				for n := int64(0); ctx.Err() == nil; n++ {
					_ = s.Fetch(ctx, []int64{1<<40 + n*16 + k}, block.Demand)
				}
			}()
		}
		brought := 0
		for n := int64(0); ctx.Err() == nil; n++ {
			if s.Fetch(ctx, run(n*16, 16), block.Background) == nil {
				brought++
			}
		}
		if brought < 20 {
			t.Errorf("%d background requests were served in a minute of demand", brought)
		}
	})
}

func TestPauseAndRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLine(10*time.Millisecond, 100e6, 10<<10)
		s := New(l, func(int64, chunk.Packed) error { return nil }, Options{})
		defer s.Close()
		s.SetBackgroundRate(1e6)
		b := time.Now()
		if err := s.Fetch(context.Background(), run(0, 500), block.Background); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(b).Seconds(); d < 4.5 || d > 6.5 { // 5.15 MB at 1 MB/s
			t.Errorf("5 MB at 1 MB/s took %.1f s", d)
		}
		s.Pause()
		s.SetBackgroundRate(0)
		done := make(chan error, 1)
		go func() { done <- s.Fetch(context.Background(), []int64{1000}, block.Background) }()
		if err := s.Fetch(context.Background(), []int64{2000}, block.Background|block.Soon); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		select {
		case <-done:
			t.Fatal("the sweep went on while paused")
		default:
		}
		s.Resume()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	})
}

func TestDamagedChunksAreAskedForAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLine(10*time.Millisecond, 100e6, 10<<10)
		tries := map[int64]int{}
		s := New(l, func(i int64, _ chunk.Packed) error {
			tries[i]++
			if i == 7 && tries[i] < 3 || i == 8 {
				return block.E("sink", "", block.KindCorrupt, chunk.ErrMismatch)
			}
			return nil
		}, Options{})
		defer s.Close()
		if err := s.Fetch(context.Background(), []int64{6, 7}, block.Demand); err != nil {
			t.Fatal(err)
		}
		err := s.Fetch(context.Background(), []int64{8}, block.Demand)
		if block.KindOf(err) != block.KindCorrupt || tries[8] != attempts || tries[7] != 3 {
			t.Fatalf("%v after %v", err, tries)
		}
		l.fail = func(i int64, _ int) error { return block.E("read", "", block.KindIO, errors.New("bad sector")) }
		if err := s.Fetch(context.Background(), []int64{9}, block.Demand); block.KindOf(err) != block.KindIO {
			t.Fatal(err)
		}
	})
}

func TestAbandonedWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLine(time.Second, 100e6, 10<<10)
		s := New(l, func(int64, chunk.Packed) error { return nil }, Options{})
		s.Pause()
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 2)
		go func() { done <- s.Fetch(ctx, run(0, 10), block.Background) }() // stays queued
		go func() { done <- s.Fetch(ctx, run(50, 3), block.Demand) }()     // is sent
		time.Sleep(100 * time.Millisecond)
		cancel()
		for range 2 {
			if err := <-done; block.KindOf(err) != block.KindCanceled {
				t.Fatal(err)
			}
		}
		s.Resume()
		time.Sleep(10 * time.Second)
		if st := s.Stats(); len(l.asked) != 3 || st.Delivered != 3 || st.BackgroundQueued != 0 {
			t.Errorf("asked for %v, %+v", l.asked, st)
		}
		go func() { done <- s.Fetch(context.Background(), []int64{99}, block.Demand) }()
		time.Sleep(100 * time.Millisecond)
		s.Close()
		if err := <-done; err == nil {
			t.Error("a fetch outlived Close")
		}
		if err := s.Fetch(context.Background(), []int64{1}, 0); block.KindOf(err) != block.KindClosed {
			t.Error(err)
		}
	})
}

// TestQueueOfTheFillDoesNotCreep: a fill of hours keeps its queue at the
// target; it must not come to count as the link's own delay.
func TestQueueOfTheFillDoesNotCreep(t *testing.T) {
	for _, rtt := range []time.Duration{40 * time.Millisecond, 200 * time.Millisecond} {
		synctest.Test(t, func(t *testing.T) {
			const rate = 12.5e6
			l := newLine(rtt, rate, 40<<10)
			s := New(l, func(int64, chunk.Packed) error { return nil }, Options{})
			defer s.Close()
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			for k := range int64(32) {
				go func() {
					for n := int64(0); ctx.Err() == nil; n++ {
						_ = s.Fetch(ctx, run((n*32+k)*64, 64), block.Background)
					}
				}()
			}
			time.Sleep(10 * time.Second)
			sent, began := l.total(), time.Now()
			time.Sleep(5 * time.Minute)
			st := s.Stats()
			used := float64(l.total()-sent) / time.Since(began).Seconds() / rate
			t.Logf("rtt %v: link %.1f%% used, window %d, delay %v over %v", rtt, 100*used, st.WindowBytes, st.Delay, st.BaseDelay)
			if used < 0.95 {
				t.Errorf("the link was used to %.1f%% only", 100*used)
			}
			if st.BaseDelay > rtt+10*time.Millisecond {
				t.Errorf("the base crept to %v on a line of %v", st.BaseDelay, rtt)
			}
		})
	}
}

// TestASignatureThatDoesNotHelp: what came as a signature of a chunk that is
// not here is asked for again with its bytes, in its class, once.
func TestASignatureThatDoesNotHelp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLine(10*time.Millisecond, 12.5e6, 20<<10)
		l.signed = chunk.Sig{1}
		var mu sync.Mutex
		sunk := map[int64]int{}
		s := New(l, func(i int64, p chunk.Packed) error {
			mu.Lock()
			defer mu.Unlock()
			if sunk[i]++; i%3 == 0 && sunk[i] == 1 {
				return block.E("volume.deliver", "", block.KindNotFound, nil)
			}
			return nil
		}, Options{})
		defer s.Close()
		for _, f := range []block.Flags{block.Demand, block.Background} {
			if err := s.Fetch(context.Background(), run(int64(f)*100, 30), f); err != nil {
				t.Fatal(err)
			}
		}
		for i, n := range sunk {
			if want := 1 + (1 - min(i%3, 1)); int64(n) != want {
				t.Errorf("chunk %d came %d times, want %d", i, n, want)
			}
			if l.full[i] != (i%3 == 0) {
				t.Errorf("chunk %d was asked for with its bytes: %v", i, l.full[i])
			}
		}
		if st := s.Stats(); st.Repaired != 20 || st.Corrupt != 0 || l.demand == 0 {
			t.Errorf("%+v", st)
		}
	})
}

// TestWhatIsHereMeanwhileIsNotAskedFor: background that waits for the link and
// turns out to be here is over, and nothing of it crosses; demand is always asked for.
func TestWhatIsHereMeanwhileIsNotAskedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLine(40*time.Millisecond, 1e6, 20<<10)
		var here atomic.Bool
		s := New(l, func(int64, chunk.Packed) error { return nil }, Options{Here: func(i int64) bool { return here.Load() && i >= 100 }})
		defer s.Close()
		var g sync.WaitGroup
		g.Go(func() {
			if err := s.Fetch(context.Background(), run(0, 1000), block.Background); err != nil {
				t.Error(err)
			}
		})
		time.Sleep(100 * time.Millisecond)
		here.Store(true)
		if err := s.Fetch(context.Background(), run(500, 3), block.Demand); err != nil {
			t.Error(err)
		}
		g.Wait()
		for i, n := range l.asked {
			if i >= 150 && (i < 500 || i > 502) || n != 1 {
				t.Errorf("chunk %d was asked for %d times", i, n)
			}
		}
		if l.asked[500] != 1 || l.asked[99] != 1 {
			t.Error("what is not here was not asked for")
		}
		if st := s.Stats(); st.Delivered < 100 || st.Delivered > 160 {
			t.Errorf("%+v", st)
		}
	})
}
