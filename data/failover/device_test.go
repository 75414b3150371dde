package failover

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
	"forerun/block/blocktest"
)

func TestSuite(t *testing.T) {
	blocktest.Test(t, func(t *testing.T) block.Device {
		vol := blocktest.NewTwin(256<<10, 512)
		d, err := Open(ctx, Options{Targets: []Target{newServer("a", vol).target(), newServer("b", vol).target()}})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}, blocktest.Options{Ops: 80})
}

func TestSuiteReadOnly(t *testing.T) {
	blocktest.Test(t, func(t *testing.T) block.Device {
		vol := blocktest.NewTwin(1<<20, 512).Describe(func(i *block.Info) { i.ReadOnly, i.CanExtents = true, false })
		d, err := Open(ctx, Options{Targets: []Target{newServer("a", vol).target()}})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}, blocktest.Options{Ops: 80})
}

// TestSuiteWhileTargetsDie kills the target in use again and again under the
// suite, which sees nothing of it.
func TestSuiteWhileTargetsDie(t *testing.T) {
	var moves atomic.Int64
	blocktest.Test(t, func(t *testing.T) block.Device {
		vol := blocktest.NewTwin(256<<10, 512)
		a, b := newServer("a", vol), newServer("b", vol)
		for i, s := range []*server{a, b} {
			rnd := rand.New(rand.NewPCG(7, uint64(i)))
			var mu sync.Mutex
			s.rule = func(c call, before bool) error {
				mu.Lock()
				dies := rnd.IntN(150) == 0
				mu.Unlock()
				if !dies {
					return nil
				}
				s.kill()
				s.start()
				return block.E("fake", s.name, block.KindUnavailable, nil)
			}
		}
		d, err := Open(ctx, Options{Targets: []Target{a.target(), b.target()}, Settle: time.Millisecond, Retry: 100 * time.Microsecond})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { moves.Add(d.Status().Moves) })
		return d
	}, blocktest.Options{Ops: 80})
	if moves.Load() < 20 {
		t.Errorf("only %d moves: the test did not test", moves.Load())
	}
}

// TestKinds tells which errors are the volume's answer and which the target's.
func TestKinds(t *testing.T) {
	for k := block.KindInvalid; k <= block.KindExists; k++ {
		want := block.KindNone
		switch k {
		case block.KindInvalid, block.KindRange, block.KindNoSpace, block.KindUnsupported, block.KindExists:
			want = k
		}
		t.Run(k.String(), func(t *testing.T) {
			d, a, b, vol := pair(t)
			a.set(func() { a.rule = func(call, bool) error { return block.E("fake", "a", k, nil) } })
			p := bytes.Repeat([]byte{5}, 512)
			kindIs(t, d.WriteAt(ctx, p, 512, block.FUA), want)
			if want != block.KindNone {
				if d.Status().Target != "a" {
					t.Error("an answer of the volume moved the device")
				}
				return
			}
			if !bytes.Equal(vol.Durable()[512:1024], p) || d.Status().Target != "b" || b.opens != 1 {
				t.Errorf("the write was not made through b: %+v", d.Status())
			}
		})
	}
	t.Run("a read is never read-only", func(t *testing.T) {
		d, a, _, _ := pair(t)
		a.set(func() { a.rule = func(call, bool) error { return block.E("fake", "a", block.KindReadOnly, nil) } })
		kindIs(t, d.ReadAt(ctx, make([]byte, 512), 0, 0), block.KindReadOnly)
	})
}

// TestErrorsAboutBytes are told when each target has said so, and move the
// device rarely.
func TestErrorsAboutBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, a, b, _ := pair(t)
		var calls [2]atomic.Int64
		fail := func(i int, on bool) func(call, bool) error {
			return func(call, bool) error {
				calls[i].Add(1)
				if on {
					return block.E("fake", "", block.KindIO, errors.New("bad sector"))
				}
				return nil
			}
		}
		a.set(func() { a.rule = fail(0, true) })
		b.set(func() { b.rule = fail(1, true) })
		p := make([]byte, 512)
		kindIs(t, d.ReadAt(ctx, p, 0, 0), block.KindIO)
		if calls[0].Load() != 1 || calls[1].Load() != 1 || d.Status().Target != "b" {
			t.Fatalf("%d and %d calls, %+v", calls[0].Load(), calls[1].Load(), d.Status())
		}
		for range 5 { // the device does not run to and fro for a bad sector
			kindIs(t, d.ReadAt(ctx, p, 0, 0), block.KindIO)
		}
		if m := d.Status().Moves; m != 2 {
			t.Errorf("%d moves", m)
		}
		time.Sleep(hardPause)
		a.set(func() { a.rule = nil })
		kindIs(t, d.ReadAt(ctx, p, 0, 0), block.KindNone)
		if d.Status().Target != "a" {
			t.Errorf("%+v", d.Status())
		}
		// The other one is away: the error is told, not waited for.
		a.set(func() { a.rule = fail(0, true) })
		b.kill()
		time.Sleep(hardPause)
		within(t, 5*time.Second, "a bad sector with nobody else to ask", func() error {
			kindIs(t, d.ReadAt(ctx, p, 0, 0), block.KindIO)
			return nil
		})
	})
}

// TestHang: a target that gives no sign of life is left within two seconds,
// whatever is under way, and takes nothing with it.
func TestHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, a, b, vol := pair(t)
		p := bytes.Repeat([]byte{7}, 4096)
		within(t, 0, "a write", func() error { return d.WriteAt(ctx, p, 0, 0) })
		a.hang(true)
		var wg sync.WaitGroup
		for i := range 32 {
			wg.Go(func() {
				within(t, 2*time.Second, "a call to a hanging target", func() error {
					switch i % 4 {
					case 0:
						return d.WriteAt(ctx, p, int64(i)*4096, block.FUA)
					case 1:
						return d.ReadAt(ctx, make([]byte, 4096), int64(i)*4096, 0)
					case 2:
						return d.Flush(ctx, 0)
					}
					return d.Zero(ctx, int64(i)*4096, 4096, 0)
				})
			})
		}
		wg.Wait()
		st := d.Status()
		if st.Target != "b" || st.Moves != 2 || st.Stalls != 1 || st.Repeated != 32 || st.Longest > 2*time.Second {
			t.Errorf("%+v", st)
		}
		if !bytes.Equal(vol.Durable()[4*4096:][:4096], p) {
			t.Error("a repeated write is not there")
		}
		// And back, while the other one still hangs: it is not waited for.
		b.kill()
		b.start()
		within(t, 2*time.Second, "a lost connection while the other target hangs", func() error { return d.Flush(ctx, 0) })
		if d.Status().Target != "b" {
			t.Errorf("%+v", d.Status())
		}
		a.wake()
	})
}

// TestGoneWhileIdle: a target that dies or hangs while nobody calls is left
// before anybody does.
func TestGoneWhileIdle(t *testing.T) {
	for _, hangs := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			d, a, _, _ := pair(t)
			time.Sleep(time.Minute)
			if d.Status().Moves != 1 {
				t.Errorf("%+v", d.Status())
			}
			if hangs {
				a.hang(true)
			} else {
				a.kill()
			}
			time.Sleep(idlePing + 2*time.Second)
			within(t, 0, "the first call", func() error { return d.Flush(ctx, 0) })
			if st := d.Status(); st.Target != "b" || st.Repeated != 0 {
				t.Errorf("%+v", st)
			}
			if hangs {
				a.wake()
			}
		})
	}
}

// TestSlowIsNotDead: a target that lives and answers nothing is left for
// another one, at ever longer intervals, and not while others get answers.
func TestSlowIsNotDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, a, b, _ := pair(t)
		a.hang(false)
		b.hang(false)
		began := time.Now()
		done := make(chan error, 1)
		go func() { done <- d.ReadAt(ctx, make([]byte, 512), 0, 0) }()
		for i, at := range []time.Duration{0, 3 * time.Second, 7 * time.Second, 16 * time.Second} {
			time.Sleep(at - time.Since(began))
			if m := d.Status().Moves; m != int64(i+1) {
				t.Errorf("%d moves after %v", m, at)
			}
		}
		time.Sleep(time.Hour)
		if m := d.Status().Moves; m > 80 {
			t.Errorf("%d moves in an hour of waiting", m)
		}
		a.wake()
		b.wake()
		within(t, 0, "the read", func() error { return <-done })
	})
	synctest.Test(t, func(t *testing.T) {
		d, a, _, _ := pair(t)
		// One read waits for a link while the rest is served.
		a.set(func() {
			a.rule = func(c call, before bool) error {
				if c.off == 0 && before {
					time.Sleep(time.Minute)
				}
				return nil
			}
		})
		done := make(chan error, 1)
		go func() { done <- d.ReadAt(ctx, make([]byte, 512), 0, 0) }()
		for range 300 {
			time.Sleep(100 * time.Millisecond)
			within(t, 0, "another read", func() error { return d.ReadAt(ctx, make([]byte, 512), 512, 0) })
		}
		if st := d.Status(); st.Moves != 1 {
			t.Errorf("%+v", st)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		// Nobody else to ask: it is waited for.
		d, a, b, _ := pair(t)
		b.kill()
		a.hang(false)
		done := make(chan error, 1)
		go func() { done <- d.Flush(ctx, 0) }()
		time.Sleep(10 * time.Minute)
		if st := d.Status(); st.Moves != 1 || st.Target != "a" {
			t.Errorf("%+v", st)
		}
		a.wake()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestAllGone: with no target for an hour calls wait, and then go on.
func TestAllGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, a, b, vol := pair(t)
		a.kill()
		b.kill()
		var wg sync.WaitGroup
		p := bytes.Repeat([]byte{3}, 512)
		for i := range 200 { // more than Depth
			wg.Go(func() {
				if err := d.WriteAt(ctx, p, int64(i)*512, 0); err != nil {
					t.Error(err)
				}
			})
		}
		short, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		kindIs(t, d.Flush(short, 0), block.KindCanceled)
		time.Sleep(time.Hour)
		if st := d.Status(); st.Target != "" || st.Without < time.Hour || st.Waiting != 0 || st.Targets[0].Err == nil {
			t.Errorf("%+v", st)
		}
		if a.opens+b.opens > 2*2*3600+500 { // each one twice a second
			t.Errorf("%d tries in an hour", a.opens+b.opens)
		}
		b.start()
		within(t, 2*time.Second, "going on", func() error { wg.Wait(); return nil })
		if !bytes.Equal(vol.Bytes()[:200*512], bytes.Repeat([]byte{3}, 200*512)) {
			t.Error("the writes are not all there")
		}
	})
}

func TestRefusesAnotherDisk(t *testing.T) {
	for what, change := range map[string]func(*block.Info){
		"size":      func(i *block.Info) { i.Size *= 2 },
		"read-only": func(i *block.Info) { i.ReadOnly = true },
		"blocks":    func(i *block.Info) { i.BlockSize = 4096 },
		"max":       func(i *block.Info) { i.MaxIO = 4096 },
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d, a, b, _ := pair(t)
				b.info = change
				a.kill()
				done := make(chan error, 1)
				go func() { done <- d.Flush(ctx, 0) }()
				time.Sleep(time.Minute)
				st := d.Status()
				if st.Target != "" || st.Targets[1].State != "refused" && st.Targets[1].State != "trying" || block.KindOf(st.Targets[1].Err) != block.KindCorrupt {
					t.Errorf("%+v", st)
				}
				a.start()
				if err := <-done; err != nil {
					t.Error(err)
				}
				if len(b.doors) != 0 {
					t.Error("the refused target was left open")
				}
			})
		})
	}
}

func TestOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		vol := blocktest.NewTwin(size, 512)
		a, b := newServer("a", vol), newServer("b", vol)
		o := Options{Volume: "v", Targets: []Target{a.target(), b.target()}}
		a.up, b.up = false, false
		short, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		_, err := Open(short, o)
		kindIs(t, err, block.KindUnavailable)
		// The first one hangs: the second one is not waited for long.
		a.up, b.up = true, true
		a.hang(true)
		within(t, 300*time.Millisecond, "opening beside a target that hangs", func() error {
			d, err := Open(ctx, o)
			if err == nil {
				err = d.Close()
			}
			return err
		})
		a.wake()
		unknown := Target{Name: "c", Open: func(context.Context) (Door, error) {
			return nil, block.E("fake.open", "c", block.KindNotFound, errors.New("no such export"))
		}}
		b.up = false
		_, err = Open(ctx, Options{Targets: []Target{b.target(), unknown}})
		kindIs(t, err, block.KindNotFound)
		denied := Target{Name: "c", Open: func(context.Context) (Door, error) {
			return nil, block.E("fake.open", "c", block.KindDenied, errors.New("the certificate is unknown"))
		}}
		_, err = Open(ctx, Options{Targets: []Target{denied, denied}})
		kindIs(t, err, block.KindDenied)
		_, err = Open(ctx, Options{})
		kindIs(t, err, block.KindInvalid)
		if n := len(a.doors) + len(b.doors); n != 0 {
			t.Errorf("%d connections were left open", n)
		}
	})
}

// TestOverlapsGoOneByOne: no two overlapping calls of which one changes the
// disk are at a target at once, whatever happens to targets.
func TestOverlapsGoOneByOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, a, b, _ := pair(t, func(o *Options) { o.Settle = time.Millisecond })
		var mu sync.Mutex
		var at []call
		most := 0
		rule := func(c call, before bool) error {
			mu.Lock()
			if !before {
				at = slices.DeleteFunc(at, func(e call) bool { return e.op == c.op && e.off == c.off && e.n == c.n })
				mu.Unlock()
				return nil
			}
			for _, e := range at {
				if (c.changes() || e.changes()) && c.off < e.off+e.n && e.off < c.off+c.n {
					t.Errorf("%v of [%d, +%d) beside %v of [%d, +%d)", c.op, c.off, c.n, e.op, e.off, e.n)
				}
			}
			at = append(at, c)
			most = max(most, len(at))
			mu.Unlock()
			time.Sleep(time.Millisecond)
			return nil
		}
		a.set(func() { a.rule = rule })
		b.set(func() { b.rule = rule })
		var wg sync.WaitGroup
		for w := range 16 {
			wg.Go(func() {
				rnd := rand.New(rand.NewPCG(5, uint64(w)))
				for range 100 {
					off, n := rnd.Int64N(64)*512, (1+rnd.Int64N(8))*512
					var err error
					switch rnd.IntN(3) {
					case 0:
						err = d.WriteAt(ctx, make([]byte, n), off, 0)
					case 1:
						err = d.ReadAt(ctx, make([]byte, n), off, 0)
					default:
						err = d.Zero(ctx, off, n, 0)
					}
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if most < 2 {
			t.Error("nothing was ever done side by side")
		}
	})
}

// TestSettle: after a change was repeated, its range takes no other change for
// a while, and reads at once.
func TestSettle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, a, _, _ := pair(t)
		a.kill()
		p := make([]byte, 1024)
		within(t, 200*time.Millisecond, "a repeated write", func() error { return d.WriteAt(ctx, p, 0, 0) })
		within(t, 0, "a read of it", func() error { return d.ReadAt(ctx, p, 0, 0) })
		within(t, 0, "a write beside it", func() error { return d.WriteAt(ctx, p, 1024, 0) })
		began := time.Now()
		within(t, 1100*time.Millisecond, "a write to it", func() error { return d.WriteAt(ctx, p, 512, 0) })
		if took := time.Since(began); took < 900*time.Millisecond {
			t.Errorf("it waited %v only", took)
		}
		within(t, 0, "the next one", func() error { return d.WriteAt(ctx, p, 512, 0) })
	})
}

// TestNothingAcknowledgedIsUndone drives the device from many goroutines over
// targets that die before or after what they do, and holds each sector to the
// newest write that was acknowledged.
func TestNothingAcknowledgedIsUndone(t *testing.T) {
	seeds := uint64(20)
	if testing.Short() {
		seeds = 4
	}
	for seed := range seeds {
		synctest.Test(t, func(t *testing.T) {
			d, a, b, _ := pair(t, func(o *Options) { o.Settle = time.Millisecond })
			for i, s := range []*server{a, b} {
				rnd := rand.New(rand.NewPCG(seed, uint64(i)))
				var mu sync.Mutex
				s.set(func() {
					s.rule = func(c call, before bool) error {
						mu.Lock()
						k, nap := rnd.IntN(60), time.Duration(rnd.IntN(2000))*time.Microsecond
						mu.Unlock()
						time.Sleep(nap)
						switch k {
						case 0:
							s.kill()
							s.start()
						case 1:
							s.kill()
							time.AfterFunc(time.Duration(k)*time.Second, s.start)
						case 2:
							return block.E("fake", s.name, block.KindFenced, nil)
						}
						return nil
					}
				})
			}
			var wg sync.WaitGroup
			for w := range 8 { // each has sectors of its own, between those of the others
				wg.Go(func() {
					rnd := rand.New(rand.NewPCG(seed, 100+uint64(w)))
					newest := map[int64]byte{}
					for range 150 {
						s := rnd.Int64N(16)
						off := (s*8 + int64(w)) * 512
						if rnd.IntN(2) == 0 {
							v := byte(rnd.Uint32())
							if err := d.WriteAt(ctx, bytes.Repeat([]byte{v}, 512), off, 0); err != nil {
								t.Error(err)
							}
							newest[s] = v
							continue
						}
						p := make([]byte, 512)
						if err := d.ReadAt(ctx, p, off, 0); err != nil {
							t.Error(err)
						}
						if p[0] != newest[s] {
							t.Errorf("seed %d: the sector at %d is %d, written was %d", seed, off, p[0], newest[s])
						}
					}
				})
			}
			wg.Wait()
			if st := d.Status(); st.Moves < 3 || st.Repeated < 3 {
				t.Errorf("seed %d tested nothing: %+v", seed, st)
			}
		})
	}
}

func TestDepthBoundsWhatIsUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, a, b, _ := pair(t, func(o *Options) { o.Depth = 5 })
		var now, most atomic.Int64
		rule := func(_ call, before bool) error {
			if before {
				n := now.Add(1)
				for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
				}
				time.Sleep(time.Millisecond)
			} else {
				now.Add(-1)
			}
			return nil
		}
		a.set(func() { a.rule = rule })
		b.set(func() { b.rule = rule })
		var wg sync.WaitGroup
		for i := range 50 {
			wg.Go(func() { d.ReadAt(ctx, make([]byte, 512), int64(i)*512, 0) })
		}
		wg.Wait()
		if most.Load() != 5 {
			t.Errorf("%d calls at once", most.Load())
		}
	})
}

func TestCloseEndsWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, a, b, _ := pair(t)
		a.kill()
		b.kill()
		var wg sync.WaitGroup
		for i := range 150 { // some wait for a target, some for a slot, some for a range
			wg.Go(func() { kindIs(t, d.WriteAt(ctx, make([]byte, 1024), int64(i)*512, 0), block.KindClosed) })
		}
		time.Sleep(3 * time.Second)
		within(t, time.Second, "closing", d.Close)
		wg.Wait()
		kindIs(t, d.Flush(ctx, 0), block.KindClosed)
	})
}

func TestNoAllocations(t *testing.T) {
	vol := blocktest.NewNull(size)
	a := newServer("a", vol)
	d, err := Open(ctx, Options{Targets: []Target{{Name: "a", Open: func(ctx context.Context) (Door, error) {
		return plain{vol}, nil
	}}, a.target()}})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	p := make([]byte, 4096)
	if n := testing.AllocsPerRun(100, func() {
		if d.ReadAt(ctx, p, 0, 0) != nil || d.WriteAt(ctx, p, 4096, block.FUA) != nil || d.Flush(ctx, 0) != nil {
			t.Fatal("refused")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

type plain struct{ block.Device }

func (plain) Ping(context.Context) error { return nil }
func (plain) Abort()                     {}

// TestErrorsSayWhat holds the texts to what an operator needs.
func TestErrorsSayWhat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, a, b, _ := pair(t)
		a.kill()
		b.kill()
		short, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		err := d.ReadAt(short, make([]byte, 512), 0, 0)
		text := fmt.Sprint(err)
		for _, w := range []string{"failover.read v", "no target works", "fake.open a", "fake.open b"} {
			if !bytes.Contains([]byte(text), []byte(w)) {
				t.Errorf("%q does not say %q", text, w)
			}
		}
	})
}

func BenchmarkRead(b *testing.B) {
	vol := blocktest.NewNull(1 << 30)
	d, err := Open(ctx, Options{Targets: []Target{{Name: "a", Open: func(context.Context) (Door, error) { return plain{vol}, nil }}}})
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		p := make([]byte, 4096)
		off := rand.Int64N(1<<17) * 4096
		for pb.Next() {
			d.ReadAt(ctx, p, off, 0)
		}
	})
}
