package converge

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
	"forerun/block/blocktest"
	"forerun/disk"
	"forerun/disk/disktest"
)

func TestDecide(t *testing.T) {
	const m = 1 << 20
	for _, c := range []struct {
		name  string
		sizes []int64
		now   int64
		want  verdict
	}{
		{"nothing copied yet", nil, 100 * m, another},
		{"nothing copied yet and little to do", nil, m, another},
		{"small enough", []int64{100 * m}, 4 * m, cut},
		{"shrinking", []int64{100 * m, 50 * m, 20 * m}, 10 * m, another},
		{"one bad round", []int64{100 * m, 10 * m, 12 * m}, 11 * m, another},
		{"three bad rounds", []int64{100 * m, 10 * m, 12 * m, 11 * m}, 10 * m, giveUp},
		{"three bad rounds, then a good one", []int64{100 * m, 10 * m, 12 * m, 11 * m}, 9 * m, another},
		{"everything is written again each time", []int64{100 * m, 100 * m, 100 * m}, 100 * m, giveUp},
		{"small enough after bad rounds", []int64{9 * m, 9 * m, 9 * m, 9 * m}, 4 * m, cut},
		{"bound", []int64{100 * m, 90 * m, 80 * m, 70 * m, 60 * m}, 50 * m, giveUp},
	} {
		if got := decide(c.sizes, c.now, 4*m, 5); got != c.want {
			t.Errorf("%s: verdict %d, %d expected", c.name, got, c.want)
		}
	}
}

func TestBitmap(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 1))
		a, b := newBitmap(), newBitmap()
		const n = 5 * pageBits
		want := map[int64]bool{}
		for range 60 {
			from := r.Int64N(n)
			to := min(from+r.Int64N(1+r.Int64N(3*pageBits)), n)
			m := a
			if r.IntN(2) == 0 {
				m = b
			}
			m.set(from, to)
			for i := from; i < to; i++ {
				want[i] = true
			}
		}
		a.merge(b)
		got, last := int64(0), int64(-2)
		for from, to := range a.runs() {
			if from <= last {
				t.Fatalf("seed %d: run at %d touches the one before", seed, from)
			}
			for i := from; i < to; i++ {
				if !want[i] {
					t.Fatalf("seed %d: %d is set", seed, i)
				}
			}
			got, last = got+to-from, to
		}
		if got != int64(len(want)) || a.n != got {
			t.Fatalf("seed %d: %d set, %d counted, %d expected", seed, got, a.n, len(want))
		}
	}
}

// TestUnderWriters cuts over while writers write: afterwards the target has
// what the guest last read, and the source side is not touched any more.
func TestUnderWriters(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			const size = 8<<20 + 512 // an odd end
			b := newBare(t, size, nil)
			m := &model{b: make([]byte, size)}
			r := rand.New(rand.NewPCG(seed, 2))
			for i := 0; i < size/2; i += 512 { // half is zeros
				m.b[i] = byte(r.Uint32())
			}
			b.source.Fill(0, m.b)
			b.target.Fill(0, bytes.Repeat([]byte{0xee}, size)) // and holds something else
			stop := make(chan struct{})
			var wg sync.WaitGroup
			var writes, pace atomic.Int64
			pace.Store(300)
			for w := range 3 {
				wg.Go(func() {
					r := rand.New(rand.NewPCG(seed, uint64(w)+10))
					for {
						select {
						case <-stop:
							return
						default:
						}
						off := r.Int64N(size/512) * 512
						p := bytes.Repeat([]byte{byte(r.Uint32())}, int(min((1+r.Int64N(16))*512, size-off)))
						if err := m.write(b.sw, p, off); err != nil {
							t.Error(err)
							return
						}
						writes.Add(1)
						time.Sleep(time.Duration(r.Int64N(pace.Load())) * time.Microsecond)
					}
				})
			}
			state, err := NotConverging, error(nil)
			for i := 0; i < 12 && state == NotConverging; i++ {
				pace.Store(300 << i) // a busy machine favours the writers
				state, err = b.job.Run(bg, Request{Target: "/target", Threshold: 128 << 10})
			}
			if err != nil || state != Switched {
				t.Fatal(state, err)
			}
			calls := b.source.Calls()
			at := writes.Load()
			for writes.Load() < at+20 {
				time.Sleep(time.Millisecond)
			}
			close(stop)
			wg.Wait()
			m.check(t, b.target.Bytes(), "the target")
			if b.source.Calls() != calls {
				t.Error("the source side was used after the switch")
			}
			s := b.job.Stats()
			if s.State != Switched || len(s.Rounds) < 2 || !s.Rounds[len(s.Rounds)-1].Last {
				t.Errorf("%+v", s)
			}
			if p, err := LoadPlan(b.fs, "/state"); err != nil || !p.OnTarget() {
				t.Errorf("%+v %v", p, err)
			}
			t.Logf("%d writes, pause %v, rounds %v", writes.Load(), s.Pause, s.Rounds)
			if _, err := b.job.Run(bg, Request{}); block.KindOf(err) != block.KindInvalid {
				t.Error("a second cut-over:", err)
			}
			if err := b.job.Cancel(bg); block.KindOf(err) != block.KindInvalid {
				t.Error("cancel after the switch:", err)
			}
			if err := b.job.Finish(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestHeavyWriter: a writer that outruns the copy ends it in a reported state,
// and the operator's choices work.
func TestHeavyWriter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 1 << 20
		b := newBare(t, size, nil)
		b.source.Fill(0, bytes.Repeat([]byte{1}, size))
		b.slow = func(d block.Device) block.Device { return blocktest.Slow(d, 50*time.Millisecond) }
		m := &model{b: bytes.Repeat([]byte{1}, size)}
		ctx, cancel := context.WithCancel(bg)
		var wg sync.WaitGroup
		wg.Go(func() { // 512 KiB of grains are written in 128 ms, over and over
			p := make([]byte, 512)
			for i := 0; ctx.Err() == nil; i++ {
				p[0] = byte(i)
				if err := m.write(b.sw, p, int64(i%128)*grain); err != nil {
					t.Error(err)
				}
				time.Sleep(time.Millisecond)
			}
		})
		req := Request{Target: "/target", Threshold: 16 << 10}
		state, err := b.job.Run(bg, req)
		if err != nil || state != NotConverging {
			t.Fatal(state, err)
		}
		s := b.job.Stats()
		if n := len(s.Rounds); n > 10 || s.Changeset <= req.Threshold {
			t.Errorf("%+v", s)
		}
		t.Log(s.Rounds)
		if state, err = b.job.Run(bg, req); err != nil || state != NotConverging {
			t.Fatal("again:", state, err)
		}
		syncing, stop := context.WithTimeout(bg, time.Minute)
		req.KeepSyncing = true
		if state, err = b.job.Run(syncing, req); state != Stopped || block.KindOf(err) != block.KindCanceled {
			t.Fatal("keep syncing:", state, err)
		}
		stop()
		req.KeepSyncing, req.Threshold = false, 600<<10
		if state, err = b.job.Run(bg, req); err != nil || state != Switched {
			t.Fatal("with a higher threshold:", state, err)
		}
		cancel()
		wg.Wait()
		m.check(t, b.target.Bytes(), "the target")
	})
}

// TestGate: what began before the gate closed lands before the switch; what
// comes later waits, and gives up when its ctx does.
func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		source := blocktest.NewTwin(1<<20, 512)
		slow := blocktest.Hook(source, func(ctx context.Context, c blocktest.Call) error {
			if c.Op == "write" {
				<-release
			}
			return nil
		})
		target := blocktest.NewTwin(1<<20, 512)
		sw := NewSwitch(slow)
		one := bytes.Repeat([]byte{1}, 512)
		var landed, switched, late atomic.Bool
		go func() {
			if err := sw.WriteAt(bg, one, 0, 0); err != nil {
				t.Error(err)
			}
			landed.Store(true)
		}()
		synctest.Wait()
		go func() {
			_, err := sw.Pause(bg, func(context.Context) (block.Device, error) {
				if source.Bytes()[0] != 1 {
					t.Error("the gate did not drain")
				}
				time.Sleep(10 * time.Millisecond)
				return target, nil
			})
			if err != nil {
				t.Error(err)
			}
			switched.Store(true)
		}()
		synctest.Wait()
		go func() {
			if err := sw.WriteAt(bg, one, 512, 0); err != nil {
				t.Error(err)
			}
			late.Store(true)
		}()
		short, cancel := context.WithTimeout(bg, time.Millisecond)
		defer cancel()
		if err := sw.ReadAt(short, make([]byte, 512), 0, 0); block.KindOf(err) != block.KindCanceled {
			t.Error("a read at the closed gate:", err)
		}
		synctest.Wait()
		if landed.Load() || switched.Load() || late.Load() {
			t.Fatal("somebody passed")
		}
		close(release)
		time.Sleep(time.Second)
		if !landed.Load() || !switched.Load() || !late.Load() {
			t.Fatal(landed.Load(), switched.Load(), late.Load())
		}
		if source.Bytes()[512] != 0 || target.Bytes()[512] != 1 {
			t.Fatal("the late write went to the wrong side")
		}
		sw.Close()
		if err := sw.Flush(bg, 0); block.KindOf(err) != block.KindClosed {
			t.Fatal(err)
		}
		if !target.Closed() || source.Closed() {
			t.Fatal("Close closes the side in use")
		}
	})
}

// TestDrainTooLong: a call that does not return puts the cut-over off; I/O goes
// on meanwhile.
func TestDrainTooLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBare(t, 1<<20, func(o *Options) { o.PauseLimit = 100 * time.Millisecond })
		release := make(chan struct{})
		inner := b.track.below
		b.track.below = blocktest.Hook(inner, func(ctx context.Context, c blocktest.Call) error {
			if c.Op == "prefetch" {
				<-release
			}
			return nil
		})
		done := make(chan error)
		go func() { done <- b.sw.Prefetch(bg, 0, 512, 0) }()
		synctest.Wait()
		state, err := b.job.Run(bg, Request{Target: "/target"})
		if err != nil || state != NotConverging {
			t.Fatal(state, err)
		}
		if err := b.sw.WriteAt(bg, make([]byte, 512), 0, 0); err != nil {
			t.Fatal(err)
		}
		close(release)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if state, err = b.job.Run(bg, Request{}); err != nil || state != Switched {
			t.Fatal(state, err)
		}
	})
}

func TestRefusals(t *testing.T) {
	ready := errors.New("12345 chunks are untouched")
	b := newBare(t, 1<<20, func(o *Options) {
		o.Ready = func() error { return ready }
		o.Reserved = []string{"/store"}
	})
	refused := func(what string, req Request, kind block.Kind) {
		t.Helper()
		state, err := b.job.Run(bg, req)
		if state != Failed || block.KindOf(err) != kind {
			t.Errorf("%s: %s, %v", what, state, err)
		}
		if p, err := LoadPlan(b.fs, "/state"); err != nil || p.Phase != PhaseNone {
			t.Errorf("%s leaves a plan: %+v, %v", what, p, err)
		}
		if err := b.sw.WriteAt(bg, make([]byte, 512), 0, 0); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	refused("not ready", Request{Target: "/target"}, block.KindUnavailable)
	if s := b.job.Stats(); !strings.Contains(s.Reason, "12345") {
		t.Errorf("%+v", s)
	}
	ready = nil
	refused("no target", Request{}, block.KindInvalid)
	refused("in the state", Request{Target: "/state/x"}, block.KindInvalid)
	refused("in the store", Request{Target: "/store/./x"}, block.KindInvalid)
	f, err := b.fs.Open("/full", disk.Write|disk.Create)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteAt([]byte("x"), 0)
	f.Close()
	refused("a file with content", Request{Target: "/full"}, block.KindExists)
	whole := b.target
	b.target = blocktest.NewTwin(1<<20-512, 512)
	refused("too small", Request{Target: "/target"}, block.KindInvalid)
	b.target = blocktest.NewTwin(1<<20, 4096)
	refused("large blocks", Request{Target: "/target"}, block.KindUnsupported)
	b.target = whole
	if state, err := b.job.Run(bg, Request{Target: "/full", Force: true}); err != nil || state != Switched {
		t.Fatal(state, err)
	}
}

// TestPreparedTarget: a file that has its size and nothing in it is no reason
// to ask, and the figures of the cut-over outlive the process.
func TestPreparedTarget(t *testing.T) {
	b := newBare(t, 1<<20, nil)
	f, err := b.fs.Open("/target", disk.Write|disk.Create)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	if state, err := b.job.Run(bg, Request{Target: "/target"}); err != nil || state != Switched {
		t.Fatal(state, err)
	}
	if err := b.job.Finish(); err != nil {
		t.Fatal(err)
	}
	was := b.job.Stats()
	again, err := NewJob(Options{FS: b.fs, Dir: "/state", Switch: b.sw})
	if err != nil {
		t.Fatal(err)
	}
	now := again.Stats()
	if now.Pause != was.Pause.Truncate(time.Microsecond) || now.Pause == 0 || again.Plan().Rounds != len(was.Rounds) {
		t.Errorf("pause %v became %v, rounds %d became %d", was.Pause, now.Pause, len(was.Rounds), again.Plan().Rounds)
	}
}

// TestFullTarget: the copy waits and says so, the guest goes on, and it ends
// when there is space.
func TestFullTarget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 1 << 20
		fs := disktest.New(1)
		s, err := build(fs, size, "a")
		if err != nil {
			t.Fatal(err)
		}
		p := bytes.Repeat([]byte{7}, 64<<10)
		for off := int64(0); off < size; off += int64(len(p)) {
			if err := s.sw.WriteAt(bg, p, off, 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.j.Checkpoint(bg); err != nil {
			t.Fatal(err)
		}
		fs.SetCapacity(fs.Used() + 400<<10)
		done := make(chan State)
		go func() {
			state, err := s.job.Run(bg, Request{Target: "/target", Threshold: grain})
			if err != nil {
				t.Error(err)
			}
			done <- state
		}()
		time.Sleep(time.Minute)
		if st := s.job.Stats(); st.State != Waiting || !strings.Contains(st.Reason, "space") {
			t.Fatalf("%+v", st)
		}
		got := make([]byte, 512)
		if err := s.sw.ReadAt(bg, got, 0, 0); err != nil {
			t.Fatal(err)
		}
		fs.SetCapacity(0)
		if state := <-done; state != Switched {
			t.Fatal(state)
		}
		if got := s.read(t); !bytes.Equal(got, bytes.Repeat([]byte{7}, size)) {
			t.Fatal("the target differs")
		}
		s.close()
	})
}

// TestStopAndResume kills the copier and later the process: the copy goes on
// from where it was, unless the machine was restarted.
func TestStopAndResume(t *testing.T) {
	const size = 4 << 20
	fs := disktest.New(1)
	s, err := build(fs, size, "a")
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 1))
	p := make([]byte, 64<<10)
	for off := int64(0); off < size; off += int64(len(p)) {
		for i := range p {
			p[i] = byte(r.Uint32())
		}
		if err := s.sw.WriteAt(bg, p, off, 0); err != nil {
			t.Fatal(err)
		}
	}
	want := s.read(t)
	write := func(s *stack, off int64) {
		t.Helper()
		q := bytes.Repeat([]byte{byte(off >> 12)}, 1024)
		if err := s.sw.WriteAt(bg, q, off, 0); err != nil {
			t.Fatal(err)
		}
		copy(want[off:], q)
	}
	// Rounds, but never the switch: the marks say that all but what is written now is there.
	ctx, cancel := context.WithCancel(bg)
	s.job.opt.PauseLimit = time.Nanosecond // it never gets to the switch
	if state, err := s.job.Run(ctx, Request{Target: "/target"}); state != NotConverging || err != nil {
		t.Fatal(state, err)
	}
	cancel()
	write(s, 8192)
	write(s, 1<<20)
	if err := s.j.Checkpoint(bg); err != nil { // the marks are kept
		t.Fatal(err)
	}
	write(s, 2<<20) // known to the journal only

	for _, c := range []struct {
		name string
		fs   *disktest.FS
		boot string
		most int64
	}{
		{"machine restarted", fs.Image(1), "b", 2 * size},
		{"killed", fs.Kill(), "a", 64 << 10},
	} {
		s, err := build(c.fs, size, c.boot)
		if err != nil {
			t.Fatal(c.name, err)
		}
		got := s.read(t)
		if c.boot == "a" && !bytes.Equal(got, want) {
			t.Fatal(c.name, "the volume lost something")
		}
		state, err := s.job.Run(bg, Request{})
		if state != Switched || err != nil {
			t.Fatal(c.name, state, err)
		}
		if w := s.job.Stats().Written; w > c.most {
			t.Errorf("%s: %d bytes were copied, %d expected at most", c.name, w, c.most)
		}
		if after := s.read(t); !bytes.Equal(after, got) {
			t.Fatal(c.name, "the target differs from the volume")
		}
		s.close()
	}
}

// TestCleanStop: after a clean stop the copy goes on even if the machine was
// restarted.
func TestCleanStop(t *testing.T) {
	const size = 1 << 20
	fs := disktest.New(1)
	s, err := build(fs, size, "a")
	if err != nil {
		t.Fatal(err)
	}
	s.sw.WriteAt(bg, bytes.Repeat([]byte{3}, size), 0, 0)
	s.job.opt.PauseLimit = time.Nanosecond
	if state, _ := s.job.Run(bg, Request{Target: "/target"}); state != NotConverging {
		t.Fatal(state)
	}
	s.sw.WriteAt(bg, bytes.Repeat([]byte{4}, 512), 8192, block.FUA)
	s.close()
	if s, err = build(fs.Crash(), size, "b"); err != nil {
		t.Fatal(err)
	}
	want := s.read(t)
	if state, err := s.job.Run(bg, Request{}); state != Switched {
		t.Fatal(state, err)
	}
	if w := s.job.Stats().Written; w > 64<<10 {
		t.Errorf("%d bytes were copied", w)
	}
	if !bytes.Equal(s.read(t), want) {
		t.Fatal("the target differs")
	}
}

func TestCancelAndHold(t *testing.T) {
	const size = 1 << 20
	fs := disktest.New(1)
	s, err := build(fs, size, "a")
	if err != nil {
		t.Fatal(err)
	}
	s.sw.WriteAt(bg, bytes.Repeat([]byte{3}, size), 0, 0)
	s.job.Hold()
	done := make(chan error)
	go func() {
		state, err := s.job.Run(bg, Request{Target: "/target"})
		if state != Stopped {
			t.Error(state)
		}
		done <- err
	}()
	for s.job.Stats().State != Held {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(5 * time.Millisecond)
	if w := s.job.Stats().Written; w != 0 {
		t.Errorf("%d bytes were copied while held", w)
	}
	if _, err := s.job.Run(bg, Request{}); block.KindOf(err) != block.KindBusy {
		t.Error("a second Run:", err)
	}
	if err := s.job.Cancel(bg); err != nil {
		t.Fatal(err)
	}
	if err := <-done; block.KindOf(err) != block.KindCanceled {
		t.Error(err)
	}
	for _, p := range []string{"/target", "/state/cutover", "/state/marks"} {
		if _, err := fs.Stat(p); block.KindOf(err) != block.KindNotFound {
			t.Errorf("%s is left: %v", p, err)
		}
	}
	if s.track.on.Load() {
		t.Error("writes are still tracked")
	}
	s.job.Continue()
	s.job.SetRate(64 << 20)
	if state, err := s.job.Run(bg, Request{Target: "/other"}); err != nil || state != Switched {
		t.Fatal(state, err)
	}
	s.close()
}

// TestUndecided: when it is not known whether the switch is on disk, nobody
// writes until it has been taken back.
func TestUndecided(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBare(t, 1<<20, nil)
		done := make(chan error)
		state := Idle
		fail := func() {
			b.fs.Fail(disktest.Fault{At: 1, Ops: disktest.OpSyncDir, Path: "/state", Err: syscall.EIO, Lasting: true})
		}
		b.slow = func(d block.Device) block.Device {
			return blocktest.Hook(d, func(_ context.Context, c blocktest.Call) error {
				if c.Op == "flush" && b.job.Stats().State == Cutting {
					fail()
				}
				return nil
			})
		}
		go func() {
			var err error
			state, err = b.job.Run(bg, Request{Target: "/target"})
			done <- err
		}()
		time.Sleep(time.Minute)
		if s := b.job.Stats(); s.State != Undecided {
			t.Fatalf("%+v", s)
		}
		short, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		if err := b.sw.WriteAt(short, make([]byte, 512), 0, 0); block.KindOf(err) != block.KindCanceled {
			t.Fatal("a write passed the gate:", err)
		}
		b.fs.Fail(disktest.Fault{})
		if err := <-done; err == nil || state != Failed {
			t.Fatal(state, err)
		}
		if err := b.sw.WriteAt(bg, bytes.Repeat([]byte{9}, 512), 0, 0); err != nil {
			t.Fatal(err)
		}
		if p, err := LoadPlan(b.fs.Image(1), "/state"); err != nil || p.Phase != PhaseCopying {
			t.Fatal(p, err)
		}
		if b.source.Bytes()[0] != 9 || b.target.Bytes()[0] == 9 {
			t.Fatal("the write went to the wrong side")
		}
		b.slow = nil
		if state, err := b.job.Run(bg, Request{}); err != nil || state != Switched || b.target.Bytes()[0] != 9 {
			t.Fatal(state, err)
		}
	})
}

func TestSwitchSuite(t *testing.T) {
	blocktest.Test(t, func(t *testing.T) block.Device {
		return block.NewChecked("switch", NewSwitch(blocktest.NewTwin(4<<20, 512)))
	}, blocktest.Options{})
}

func TestTrackerSuite(t *testing.T) {
	blocktest.Test(t, func(t *testing.T) block.Device {
		tr, err := OpenTracker(disktest.New(1), "/marks", blocktest.NewTwin(4<<20, 512), TrackerOptions{BootID: "a"})
		if err != nil {
			t.Fatal(err)
		}
		if err := tr.begin(planID{1}); err != nil {
			t.Fatal(err)
		}
		tr.claim(4 << 20)
		return block.NewChecked("tracker", tr)
	}, blocktest.Options{})
}
