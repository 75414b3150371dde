package fill

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
)

// fake is a volume whose chunks arrive after a while.
type fake struct {
	mu      sync.Mutex
	absent  map[int64]bool
	holes   map[int64]bool
	size    int64
	asked   []int64
	err     error
	took    time.Duration
	surveys int
	limit   int64
	held    bool
	// fetchErr, if set, is what Fetch fails with after took.
	fetchErr error
}

func newFake(n int64) *fake {
	f := &fake{absent: map[int64]bool{}, holes: map[int64]bool{}, size: n, took: 10 * time.Millisecond}
	for i := range n {
		f.absent[i] = true
	}
	return f
}

func (f *fake) Survey(_ context.Context, c int64) (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.surveys++
	if f.err != nil {
		return 0, f.err
	}
	next := min(c+100, f.size)
	for ; c < next; c++ {
		if f.holes[c] {
			delete(f.absent, c)
		}
	}
	return next, nil
}

func (f *fake) Absent(dst []int64, from int64, most int) []int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := from; i < f.size && len(dst) < most; i++ {
		if f.absent[i] {
			dst = append(dst, i)
		}
	}
	return dst
}

func (f *fake) Fetch(ctx context.Context, idx []int64, _ block.Flags) error {
	f.mu.Lock()
	err := f.err
	f.asked = append(f.asked, idx...)
	f.mu.Unlock()
	if err != nil {
		return err
	}
	select {
	case <-time.After(f.took):
	case <-ctx.Done():
		return ctx.Err()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fetchErr != nil {
		return f.fetchErr
	}
	for _, i := range idx {
		delete(f.absent, i)
	}
	return nil
}

func (f *fake) Pause()                    { f.locked(func() { f.held = true }) }
func (f *fake) Resume()                   { f.locked(func() { f.held = false }) }
func (f *fake) SetBackgroundRate(n int64) { f.locked(func() { f.limit = n }) }

// locked runs what a test looks at while the pump works.
func (f *fake) locked(do func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	do()
}

func (f *fake) counts() (absent, asked int, held bool) {
	f.locked(func() { absent, asked, held = len(f.absent), len(f.asked), f.held })
	return absent, asked, held
}

func start(t *testing.T, f *fake, o Options) (*Pump, func()) {
	o.Chunks, o.ChunkBytes = f.size, 64<<10
	o.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	p := New(f, f, o)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { p.Run(ctx); close(done) }()
	return p, func() {
		cancel()
		<-done
		if p.Stats().State != Stopped {
			t.Error("not stopped")
		}
	}
}

func TestFillBringsEverythingOnceAndNoHoles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(1000)
		r := rand.New(rand.NewPCG(1, 1))
		for range 400 {
			f.holes[r.Int64N(1000)] = true
		}
		f.holes[999] = true
		p, stop := start(t, f, Options{BatchChunks: 16})
		defer stop()
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if len(f.absent) != 0 || p.Stats().State != Filled {
			t.Fatalf("%d absent, %+v", len(f.absent), p.Stats())
		}
		slices.Sort(f.asked)
		if len(slices.Compact(slices.Clone(f.asked))) != len(f.asked) {
			t.Error("a chunk was asked for twice")
		}
		for _, i := range f.asked {
			if f.holes[i] {
				t.Errorf("hole %d was asked for", i)
			}
		}
		// What becomes absent again is brought again.
		f.mu.Lock()
		f.absent[5] = true
		f.mu.Unlock()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if len(f.absent) != 0 || p.Stats().State != Filled {
			t.Errorf("after damage: %d absent, %+v", len(f.absent), p.Stats())
		}
	})
}

func TestFillPausesResumesAndLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(2000)
		f.took = 100 * time.Millisecond
		p, stop := start(t, f, Options{BatchChunks: 4, Outstanding: 2, Limit: 9})
		defer stop()
		time.Sleep(5 * time.Second)
		if s := p.Stats(); s.State != Running || s.RateBytes < 1 || s.ETA(1<<20) <= 0 || f.limit != 9 {
			t.Fatalf("%+v, limit %d", s, f.limit)
		}
		p.Pause()
		time.Sleep(time.Second)
		n, _, _ := f.counts()
		time.Sleep(time.Hour)
		now, asked, held := f.counts()
		if p.Stats().State != Paused || now != n || !held {
			t.Fatalf("paused, yet %d became %d; %+v", n, now, p.Stats())
		}
		p.SetLimit(0)
		p.Resume()
		if s := p.Stats(); s.State != Running {
			t.Errorf("resumed, and at once %+v", s)
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		left, all, held := f.counts()
		if p.Stats().State != Filled || left != 0 || held {
			t.Fatalf("%+v", p.Stats())
		}
		if extra := asked + n - all; extra < -16 {
			t.Errorf("%d chunks were asked for again after the pause", -extra)
		}
	})
}

func TestFillOutlastsObstacles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(300)
		f.err = block.E("store.put", "disk", block.KindNoSpace, errors.New("no space left"))
		p, stop := start(t, f, Options{})
		defer stop()
		time.Sleep(time.Minute)
		if s := p.Stats(); s.State != Waiting || s.Reason == "" {
			t.Fatalf("%+v", s)
		}
		if f.surveys > 40 {
			t.Errorf("%d tries in a minute", f.surveys)
		}
		f.mu.Lock()
		f.err = nil
		f.mu.Unlock()
		time.Sleep(time.Minute)
		synctest.Wait()
		if p.Stats().State != Filled {
			t.Fatalf("%+v", p.Stats())
		}
	})
}

func TestOrderAgainstSorting(t *testing.T) {
	for seed := range uint64(100) {
		r := rand.New(rand.NewPCG(seed, 2))
		n := 1 + r.Int64N(500)
		var want []int64
		for i := range n {
			if r.IntN(3) > 0 {
				want = append(want, i)
			}
		}
		o := NewOrder(n)
		var got []int64
		for !o.Wrap() {
			limit := min(n, o.Cursor()+1+r.Int64N(60))
			got = o.Next(got, limit, len(got)+1+r.IntN(20), func(dst []int64, from int64, most int) []int64 {
				for _, i := range want {
					if i >= from && len(dst) < most {
						dst = append(dst, i)
					}
				}
				return dst
			})
		}
		if !slices.Equal(got, want) {
			t.Fatalf("seed %d: %v, want %v", seed, got, want)
		}
	}
}

// TestFillSaysWhyItWaits: the reason is what failed, not that the calls beside
// it were called back.
func TestFillSaysWhyItWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(4000)
		f.fetchErr = block.E("store.put", "disk", block.KindNoSpace, errors.New("no space left"))
		p, stop := start(t, f, Options{BatchChunks: 4, Outstanding: 2})
		defer stop()
		for range 100 {
			time.Sleep(100 * time.Millisecond)
			if s := p.Stats(); s.State == Waiting && s.Reason != f.fetchErr.Error() {
				t.Fatalf("%+v", s)
			}
		}
	})
}

// TestFillIsHeldBack: it says why, asks for nothing, and goes on where it was.
func TestFillIsHeldBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(4000)
		f.took = 100 * time.Millisecond
		var why atomic.Value
		why.Store("")
		p, stop := start(t, f, Options{BatchChunks: 4, Outstanding: 2, Hold: func() string { return why.Load().(string) }})
		defer stop()
		time.Sleep(5 * time.Second)
		why.Store("the store is at its limit")
		time.Sleep(time.Second)
		n, asked, _ := f.counts()
		time.Sleep(time.Hour)
		if now, more, _ := f.counts(); now != n || more != asked || p.Stats().State != Waiting || p.Stats().Reason != "the store is at its limit" {
			t.Fatalf("held back, yet %d became %d; %+v", n, now, p.Stats())
		}
		why.Store("")
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if left, all, _ := f.counts(); left != 0 || all > 4000+16 || p.Stats().State != Filled {
			t.Fatalf("%d left, %d asked, %+v", left, all, p.Stats())
		}
	})
}
