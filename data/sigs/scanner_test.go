package sigs

import (
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
	"forerun/block/blocktest"
	"forerun/disk/disktest"
	"forerun/internal/chunk"
)

// scene is a scanner over a twin, in a bubble of virtual time.
type scene struct {
	t    *testing.T
	twin *blocktest.Twin
	dev  *blocktest.Hooked
	tab  *Table
	s    *Scanner

	latency atomic.Int64 // of a read
	hash    time.Duration
	busy    time.Duration // hashing, so far
	hold    atomic.Bool
	fail    atomic.Int64 // offset that cannot be read; -1 for none

	mu    sync.Mutex
	reads []block.Extent
}

func newScene(t *testing.T, chunks int64, fill func(b []byte)) *scene {
	sc := &scene{t: t, twin: blocktest.NewTwin(chunks*cb-512, 512)}
	sc.fail.Store(-1)
	b := make([]byte, chunks*cb-512)
	fill(b)
	sc.twin.Fill(0, b)
	sc.dev = blocktest.Hook(sc.twin, func(_ context.Context, c blocktest.Call) error {
		if c.Op == "read" && c.Before {
			sc.mu.Lock()
			sc.reads = append(sc.reads, block.Extent{Off: c.Off, Len: c.Len})
			sc.mu.Unlock()
			if c.Flags.Class() != block.Background {
				t.Errorf("a read of class %s", c.Flags)
			}
			time.Sleep(time.Duration(sc.latency.Load()))
			if at := sc.fail.Load(); at >= c.Off && at < c.Off+c.Len {
				return block.E("test.read", "", block.KindIO, nil)
			}
		}
		return nil
	})
	sc.tab = openFor(t, sc.dev, disktest.New(1))
	sc.s = NewScanner(sc.dev, sc.tab, ScanOptions{Hold: sc.hold.Load, Sum: func(p []byte) chunk.Sig {
		time.Sleep(sc.hash)
		sc.busy += sc.hash
		return chunk.Sum(p)
	}})
	return sc
}

func noise(b []byte) {
	r := rand.New(rand.NewPCG(5, 5))
	for i := 0; i < len(b); i += 512 {
		b[i] = byte(1 + r.IntN(255))
	}
}

// run runs the scanner until stop is called, which waits for it.
func (sc *scene) run() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { sc.s.Run(ctx); close(ended) }()
	return func() {
		cancel()
		<-ended
		if st := sc.s.Stats().State; st != ScanStopped {
			sc.t.Errorf("it returned and is %s", st)
		}
	}
}

func (sc *scene) until(what string, ok func(ScanStats) bool) time.Duration {
	sc.t.Helper()
	began := time.Now()
	for !ok(sc.s.Stats()) {
		if time.Since(began) > time.Hour {
			sc.t.Fatalf("not %s after an hour: %+v", what, sc.s.Stats())
		}
		time.Sleep(time.Millisecond)
	}
	return time.Since(began)
}

func (sc *scene) done() time.Duration {
	sc.t.Helper()
	return sc.until("done", func(s ScanStats) bool { return s.State == ScanDone })
}

// check wants every chunk known and right.
func (sc *scene) check() {
	sc.t.Helper()
	b := sc.twin.Bytes()
	n, _ := sc.tab.Chunks()
	for i := range n {
		p := b[i*cb : min((i+1)*cb, int64(len(b)))]
		kind, sig := sc.tab.Get(i)
		if chunk.AllZero(p) && kind != Zero || !chunk.AllZero(p) && (kind != Data || sig != chunk.Sum(p)) {
			sc.t.Fatalf("chunk %d: %s %s", i, kind, sig)
		}
	}
}

func TestScanReadsOnceInOrderAndSkipsHoles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sc := newScene(t, 300, func(b []byte) {
			noise(b)
			clear(b[20*cb : 100*cb])
			clear(b[200*cb : 201*cb-4096]) // a hole that is not a whole chunk
		})
		token := sc.tab.Token(3)
		sc.tab.Learn(3, token, Data, chunk.Sum(sc.twin.Bytes()[3*cb:4*cb]))
		stop := sc.run()
		sc.done()
		sc.check()
		at, bytes := int64(0), int64(0)
		for _, r := range sc.reads {
			if r.Off < at || r.Len > 1<<20 || r.Off%cb != 0 {
				t.Errorf("read %d+%d after %d", r.Off, r.Len, at)
			}
			if at = r.End(); r.Off < 100*cb && r.End() > 20*cb || r.Off < 4*cb && r.End() > 3*cb {
				t.Errorf("read what is known or a hole: %d+%d", r.Off, r.Len)
			}
			bytes += r.Len
		}
		if want := int64(300-80-1)*cb - 512; bytes != want || sc.s.Stats().Hashed != want {
			t.Errorf("%d bytes read, %d hashed, %d expected", bytes, sc.s.Stats().Hashed, want)
		}
		if n := len(sc.reads); n > 20 {
			t.Errorf("%d reads of 14 MiB", n)
		}
		// What is written afterwards is hashed again, and nothing else.
		dev := Watch(sc.dev, sc.tab)
		sc.reads = nil
		for range 3 {
			if err := dev.WriteAt(context.Background(), []byte{512: 7, 1023: 7}, 150*cb-512, 0); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second / 2)
		}
		sc.until("known", func(s ScanStats) bool { return s.Known == s.Total })
		sc.check()
		if len(sc.reads) != 1 || sc.reads[0].Off != 149*cb || sc.reads[0].Len != 2*cb {
			t.Errorf("reads after a write: %v", sc.reads)
		}
		stop()
	})
}

func TestScanUsesHalfAProcessor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sc := newScene(t, 160, noise)
		sc.hash = time.Millisecond
		sc.latency.Store(int64(time.Microsecond))
		stop := sc.run()
		took := sc.done()
		if sc.busy < 150*time.Millisecond || took < 2*sc.busy || took > 3*sc.busy {
			t.Errorf("%v of hashing in %v", sc.busy, took)
		}
		stop()
	})
	synctest.Test(t, func(t *testing.T) { // what the disk takes is no work
		sc := newScene(t, 160, noise)
		sc.hash = time.Microsecond
		sc.latency.Store(int64(time.Millisecond))
		stop := sc.run()
		if took := sc.done(); took > 15*time.Millisecond {
			t.Errorf("%v for 10 reads of a millisecond", took)
		}
		stop()
	})
}

func TestScanHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sc := newScene(t, 64, noise)
		sc.hash = time.Millisecond
		sc.hold.Store(true)
		stop := sc.run()
		time.Sleep(10 * time.Second)
		if st := sc.s.Stats(); st.State != ScanHolding || len(sc.reads) > 0 {
			t.Errorf("%+v, %d reads", st, len(sc.reads))
		}
		sc.hold.Store(false)
		sc.until("begun", func(s ScanStats) bool { return s.Hashed > 0 })
		sc.hold.Store(true)
		time.Sleep(time.Second)
		n := len(sc.reads)
		time.Sleep(time.Minute)
		if len(sc.reads) != n || n == 4 {
			t.Errorf("%d reads, then %d while it holds", n, len(sc.reads))
		}
		sc.hold.Store(false)
		sc.done()
		sc.check()
		sc.hold.Store(true)
		stop()
	})
}

func TestScanBacksOffFromASlowSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sc := newScene(t, 40*16, noise)
		sc.latency.Store(int64(time.Millisecond))
		sc.hash = time.Microsecond
		stop := sc.run()
		sc.until("under way", func(s ScanStats) bool { return s.Known > 6*16 })
		if p := sc.s.Stats().Pause; p != 0 {
			t.Errorf("it pauses %v for no reason", p)
		}
		sc.latency.Store(int64(20 * time.Millisecond)) // somebody else needs the disk
		time.Sleep(30 * time.Second)
		slow := sc.s.Stats()
		if slow.Pause < time.Second || slow.Known > 30*16 {
			t.Errorf("it does not give way: %+v", slow)
		}
		sc.latency.Store(int64(time.Millisecond))
		if took := sc.done(); took > time.Minute {
			t.Errorf("it recovered after %v", took)
		}
		if p := sc.s.Stats().Pause; p != 0 {
			t.Errorf("it still pauses %v", p)
		}
		sc.check()
		stop()
	})
}

// A source that is slower than it was at first, for good, is not given way to for ever.
func TestPaceForgetsABestOfLongAgo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p pace
		for range 10 {
			p.note(maxRead, 100*time.Microsecond, 0)
		}
		began := time.Now()
		for p.note(maxRead, 10*time.Millisecond, 0); p.pause > 0 || p.n < 20; p.note(maxRead, 10*time.Millisecond, 0) {
			if time.Sleep(10*time.Millisecond + p.pause); time.Since(began) > time.Hour {
				t.Fatalf("%+v", p)
			}
		}
		if took := time.Since(began); took < bestFor || took > 3*bestFor {
			t.Errorf("it took %v", took)
		}
		// Short reads are not slow because long ones were quick.
		for range 10 {
			p.note(cb, 8*time.Millisecond, 0)
		}
		if p.pause != 0 {
			t.Errorf("pauses %v", p.pause)
		}
	})
}

func TestScanGoesOnBehindAnUnreadableChunk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sc := newScene(t, 64, noise)
		sc.fail.Store(17 * cb)
		stop := sc.run()
		sc.until("over the others", func(s ScanStats) bool { return s.Known == 63 })
		if kind, _ := sc.tab.Get(17); kind != Unknown {
			t.Error(kind)
		}
		time.Sleep(time.Minute)
		if st := sc.s.Stats(); st.Errors < 2 || st.Errors > 30 || st.State != ScanRunning {
			t.Errorf("%+v", st)
		}
		sc.fail.Store(-1)
		sc.done()
		sc.check()
		stop()
	})
}

func TestScanUnderWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sc := newScene(t, 200, noise)
		sc.hash = 100 * time.Microsecond
		sc.latency.Store(int64(time.Millisecond))
		stop := sc.run()
		dev := Watch(sc.dev, sc.tab)
		r := rand.New(rand.NewPCG(8, 8))
		for range 500 {
			p := make([]byte, 512*(1+r.IntN(200)))
			p[0] = byte(r.IntN(256))
			off := r.Int64N((200*cb-512-int64(len(p)))/512) * 512
			if err := dev.WriteAt(context.Background(), p, off, 0); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Duration(r.IntN(3)) * time.Millisecond)
		}
		sc.until("known", func(s ScanStats) bool { return s.Known == s.Total })
		sc.check()
		stop()
	})
}

func TestScanEndsWithItsTable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sc := newScene(t, 10, noise)
		ended := make(chan struct{})
		go func() { sc.s.Run(context.Background()); close(ended) }()
		sc.done()
		if err := sc.tab.Close(nil); err != nil {
			t.Fatal(err)
		}
		<-ended
	})
}
