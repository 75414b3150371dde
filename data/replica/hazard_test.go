package replica

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
	"forerun/block/blocktest"
	"forerun/lab/wan"
)

// hazard runs a test in a world of two nodes whose disks are zeros; a is
// primary, and b in sync if up.
func hazard(t *testing.T, conf func(*Config), test func(t *testing.T, w *world, a, b *node)) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, make([]byte, worldSize))
		w.conf = conf
		a, b := w.nodes[0], w.nodes[1]
		a.start()
		time.Sleep(100 * time.Millisecond)
		b.start()
		if v := w.pair(time.Minute); v != a.volume() {
			t.Fatal("the first is not primary")
		}
		test(t, w, a, b)
		w.close()
	})
}

var bg = context.Background()

func put(t *testing.T, n *node, c byte, off int64, f block.Flags) {
	t.Helper()
	must(t, n.volume().WriteAt(bg, bytes.Repeat([]byte{c}, 4096), off, f))
}

// get reads at a node's volume, here below at its stack.
func get(t *testing.T, d block.Device, off int64) byte {
	t.Helper()
	p := make([]byte, 4096)
	must(t, d.ReadAt(bg, p, off, 0))
	for _, c := range p {
		if c != p[0] {
			t.Fatal("a mix")
		}
	}
	return p[0]
}

func until(t *testing.T, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// A write stands still at the secondary, is thought lost, newer ones come. It
// must not come out on top.
func TestLateWriteOfAnOldSession(t *testing.T) {
	hazard(t, nil, func(t *testing.T, w *world, a, b *node) {
		caught, let := b.block(0)
		put(t, a, 1, 0, 0) // acknowledged when b has been recorded as out
		<-caught
		put(t, a, 2, 0, 0)
		time.Sleep(10 * time.Second)
		if s := a.volume().Status(); s.Mode != "degraded" {
			t.Fatalf("a new session began while a write of the old one was under way: %+v", s)
		}
		let()
		w.pair(time.Minute)
		put(t, a, 3, 4096, 0)
		time.Sleep(time.Second)
		w.equal()
	})
}

// The same, and the node at which it stands still becomes primary.
func TestLateWriteWhenRising(t *testing.T) {
	hazard(t, nil, func(t *testing.T, w *world, a, b *node) {
		put(t, a, 1, 0, 0)
		caught, let := b.block(0)
		go a.volume().WriteAt(bg, bytes.Repeat([]byte{2}, 4096), 0, 0)
		<-caught
		a.kill(false)
		done := make(chan struct{})
		go func() { put(t, b, 3, 0, 0); close(done) }()
		time.Sleep(5 * time.Second)
		let()
		<-done
		time.Sleep(time.Second)
		if c := get(t, b.volume(), 0); c != 3 {
			t.Fatalf("a late write of the old epoch came out on top: %d", c)
		}
	})
}

// A write stands still at a primary that is deposed meanwhile.
func TestLateWriteOfADeposedPrimary(t *testing.T) {
	hazard(t, nil, func(t *testing.T, w *world, a, b *node) {
		caught, let := a.block(0)
		done := make(chan struct{})
		go func() { put(t, a, 1, 0, 0); close(done) }()
		<-caught
		w.links["a>arb"].Partition(wan.Both, true)
		w.links["a>b"].Partition(wan.Both, true)
		until(t, 10*time.Second, "b takes over", func() bool { return b.volume().Status().Role == "primary" })
		put(t, b, 2, 0, 0)
		w.links["a>arb"].Partition(wan.Both, false)
		w.links["a>b"].Partition(wan.Both, false)
		time.Sleep(5 * time.Second)
		if s := b.volume().Status(); s.Mode != "degraded" {
			t.Fatalf("a session began while a write of the other one's own reign was under way: %+v", s)
		}
		let()
		<-done // routed anew
		w.pair(time.Minute)
		put(t, b, 3, 4096, 0)
		time.Sleep(time.Second)
		w.equal()
	})
}

// A primary that is cut off does not show what was true once.
func TestNoStaleRead(t *testing.T) {
	hazard(t, nil, func(t *testing.T, w *world, a, b *node) {
		put(t, a, 1, 0, 0)
		w.links["a>arb"].Partition(wan.Both, true)
		time.Sleep(10 * time.Second) // its word is b's only now
		if c := get(t, a.volume(), 0); c != 1 {
			t.Fatal(c)
		}
		cut := time.Now()
		w.links["a>b"].Partition(wan.Both, true)
		w.links["b>a"].Partition(wan.Both, true)
		answered := make(chan byte, 1)
		put(t, b, 2, 0, 0)
		if d := time.Since(cut); d < 1400*time.Millisecond {
			t.Errorf("b answered %v after its last word to a", d)
		} else if d > 3*time.Second {
			t.Errorf("the takeover took %v", d)
		}
		go func() { answered <- get(t, a.volume(), 0) }()
		time.Sleep(5 * time.Second)
		select {
		case c := <-answered:
			t.Fatalf("a answered %d while it was cut off", c)
		default:
		}
		w.links["a>b"].Partition(wan.Both, false)
		w.links["b>a"].Partition(wan.Both, false)
		w.links["a>arb"].Partition(wan.Both, false)
		if c := <-answered; c != 2 {
			t.Fatalf("a answered %d", c)
		}
	})
}

// A write is at the other node, and stands still here, when the holds are due:
// they must not pass it.
func TestHoldsWaitForWrites(t *testing.T) {
	hazard(t, nil, func(t *testing.T, w *world, a, b *node) {
		put(t, a, 1, 8192, 0)
		caught, _ := a.block(0)
		go a.volume().WriteAt(bg, bytes.Repeat([]byte{1}, 4096), 0, 0)
		<-caught
		go put(t, a, 2, 4096, 0)
		time.Sleep(3 * time.Second)
		a.kill(false)
		a.start()
		w.pair(time.Minute)
		time.Sleep(time.Second)
		w.equal()
	})
}

// A write that began without the other node and ends after that one has joined
// is there too.
func TestJoinWaitsForWrites(t *testing.T) {
	hazard(t, nil, func(t *testing.T, w *world, a, b *node) {
		b.kill(false)
		put(t, a, 1, 4096, 0)
		caught, let := a.block(0)
		done := make(chan struct{})
		go func() { put(t, a, 1, 0, 0); close(done) }()
		<-caught
		b.start()
		time.Sleep(3 * time.Second)
		if s := a.volume().Status(); s.InSync {
			t.Fatal("in sync without a write that is under way")
		}
		let()
		<-done
		w.pair(time.Minute)
		time.Sleep(time.Second)
		w.equal()
		if c := get(t, b.raw, 0); c != 1 {
			t.Fatal(c)
		}
	})
}

// What can be read at the primary is at the other node: that one goes first.
func TestOtherNodeFirst(t *testing.T) {
	hazard(t, nil, func(t *testing.T, w *world, a, b *node) {
		caught, let := b.block(0)
		done := make(chan struct{})
		go func() { put(t, a, 1, 0, 0); close(done) }()
		<-caught
		if c := get(t, a.volume(), 0); c != 0 {
			t.Fatal("a write shows that the other node lacks")
		}
		let()
		<-done
		if get(t, a.raw, 0) != 1 || get(t, b.raw, 0) != 1 {
			t.Fatal("acknowledged and not at both")
		}
	})
}

// A node that joined has durably what was flushed before it came.
func TestJoinerIsFlushed(t *testing.T) {
	hazard(t, nil, func(t *testing.T, w *world, a, b *node) {
		b.kill(false)
		for i := range int64(100) {
			put(t, a, 1, i*4096, 0)
		}
		must(t, a.volume().Flush(bg, 0))
		var flushed atomic.Bool
		f := func(c blocktest.Call, _ <-chan struct{}) {
			if c.Op != "flush" || flushed.Swap(true) {
				return
			}
			if r, _ := w.arb.Record("v"); r.Member("b") {
				t.Error("a member before it was flushed")
			}
		}
		b.hook.Store(&f)
		b.start()
		w.pair(time.Minute)
		a.kill(true)
		b.kill(true)
		b.start()
		time.Sleep(5 * time.Second)
		if s := b.volume().Status(); s.Role != "secondary" {
			t.Fatalf("took over after a power cut: %+v", s)
		}
		must(t, b.volume().TakeOver(bg, true))
		for i := range int64(100) {
			if c := get(t, b.volume(), i*4096); c != 1 {
				t.Fatalf("what was flushed is gone: %d", i)
			}
		}
	})
}

// After a power cut of the primary the other one, which has in memory what was
// acknowledged, takes over; also when the primary is back at once.
func TestPowerCutOfThePrimary(t *testing.T) {
	for _, wait := range []time.Duration{0, 300 * time.Millisecond, 5 * time.Second} {
		hazard(t, nil, func(t *testing.T, w *world, a, b *node) {
			for i := range int64(100) {
				put(t, a, 1, i*4096, 0)
			}
			a.kill(true)
			time.Sleep(wait)
			a.start()
			a.kill(false) // and its process once more: it knows no more than before
			a.start()
			for i := range int64(100) {
				if c := get(t, a.volume(), i*4096); c != 1 {
					t.Fatalf("acknowledged and gone after the loss of one node: %d", i)
				}
			}
			if v := w.pair(time.Minute); v != b.volume() {
				t.Error("the one that lost its memory is primary")
			}
			w.equal()
		})
	}
}

// The other node has a write that nobody was told of. A primary whose process
// was restarted answers nothing before both are equal again.
func TestRestartSettlesFirst(t *testing.T) {
	hazard(t, nil, func(t *testing.T, w *world, a, b *node) {
		put(t, a, 1, 0, 0)
		time.Sleep(2 * time.Second) // for the holds
		caught, _ := a.block(0)
		go a.volume().WriteAt(bg, bytes.Repeat([]byte{2}, 4096), 0, 0)
		<-caught
		w.links["a>b"].Partition(wan.Both, true)
		a.kill(false)
		a.start()
		answered := make(chan byte, 1)
		go func() { answered <- get(t, a.volume(), 0) }()
		time.Sleep(500 * time.Millisecond)
		if len(answered) > 0 {
			t.Error("answered before anything was settled")
		}
		w.links["a>b"].Partition(wan.Both, false)
		c := <-answered
		w.pair(time.Minute)
		w.equal()
		if d := get(t, b.volume(), 0); d != c {
			t.Errorf("%d was read, and now %d", c, d)
		}
	})
}

// The primary has lost its memory, and the other node, which has not, is cut off
// from it and from the arbiter for long: it is not thrown out once it is heard.
func TestTheOneThatRemembersIsWaitedFor(t *testing.T) {
	hazard(t, nil, func(t *testing.T, w *world, a, b *node) {
		for i := range int64(100) {
			put(t, a, 1, i*4096, 0)
		}
		a.kill(true)
		w.links["b>arb"].Partition(wan.Both, true)
		w.links["a>b"].Partition(wan.Both, true)
		a.start()
		time.Sleep(4 * time.Second)
		w.links["a>arb"].Partition(wan.Both, true)
		time.Sleep(4 * time.Second) // this one may go on, if the arbiter agreed
		w.links["a>b"].Partition(wan.Both, false)
		time.Sleep(3 * time.Second)
		w.links["a>arb"].Partition(wan.Both, false)
		time.Sleep(3 * time.Second)
		w.links["b>arb"].Partition(wan.Both, false)
		for i := range int64(100) {
			if c := get(t, a.volume(), i*4096); c != 1 {
				t.Fatalf("acknowledged and gone after the loss of one node: %d", i)
			}
		}
		w.pair(time.Minute)
		w.equal()
	})
}

// A secondary that knows the record only from its peer obeys nobody.
func TestNobodyIsObeyedBeforeTheArbiter(t *testing.T) {
	v := stub(t)
	defer v.Close()
	s := state{node: "b", rec: v.now.Load().rec}
	s.rec.Epoch, s.rec.Version, s.rec.Primary, s.rec.Members, s.rec.Preferred, s.rec.Cause = 3, 4, "b", []string{"a", "b"}, "b", "claim"
	for _, typ := range []uint8{typOpen, typBeat, typOffice} {
		if _, err := v.ServePeer(bg, "b", typ, s.append(nil)); block.KindOf(err) != block.KindBusy {
			t.Errorf("type %d: %v", typ, err)
		}
	}
	if v.Status().Epoch != 0 {
		t.Error("believed")
	}
}

// A forwarded change of an old session is refused, and a new session waits for
// those under way.
func TestForwardedInAnOldSession(t *testing.T) {
	hazard(t, nil, func(t *testing.T, w *world, a, b *node) {
		v := a.volume()
		send := func(typ uint8, token uint64, off int64, p []byte) error {
			m := body{token: token, off: off, n: int64(len(p))}
			if typ == typFwdOpen {
				m.off = int64(v.Status().Epoch)
				_, err := v.ServePeer(bg, "b", typ, m.append(nil))
				return err
			}
			until := binary.BigEndian.AppendUint64(nil, uint64(v.ticks()+Stale))
			_, err := v.ServePeer(bg, "b", typ, append(append(m.append(nil), until...), p...))
			return err
		}
		p := bytes.Repeat([]byte{1}, 4096)
		must(t, send(typFwdOpen, 11, 0, nil))
		must(t, send(typFwdWrite, 11, 0, p))
		caught, let := a.block(4096)
		late := make(chan error, 1)
		go func() { late <- send(typFwdWrite, 11, 4096, p) }()
		<-caught
		if err := send(typFwdOpen, 13, 0, nil); block.KindOf(err) != block.KindBusy {
			t.Fatalf("a new session while a change of the old one is under way: %v", err)
		}
		let()
		<-late
		must(t, send(typFwdOpen, 15, 0, nil))
		if err := send(typFwdWrite, 11, 0, p); block.KindOf(err) != block.KindFenced {
			t.Fatalf("a change of an old session: %v", err)
		}
		if err := send(typFwdOpen, 17, 0, nil); err != nil {
			t.Fatal(err)
		}
	})
}

// Planned: no call waits for longer than a moment, and it goes both ways.
func TestHandover(t *testing.T) {
	hazard(t, nil, func(t *testing.T, w *world, a, b *node) {
		for i := range 4 {
			from, to := a, b
			if i%2 == 1 {
				from, to = b, a
			}
			stop, done := make(chan struct{}), make(chan time.Duration, 2)
			for k, n := range []*node{a, b} {
				go func() {
					var worst time.Duration
					for {
						select {
						case <-stop:
							done <- worst
							return
						default:
						}
						begin := time.Now()
						put(t, n, byte(i), int64(k)*4096, 0)
						worst = max(worst, time.Since(begin))
					}
				}()
			}
			time.Sleep(100 * time.Millisecond)
			must(t, from.volume().Handover(bg))
			time.Sleep(200 * time.Millisecond)
			close(stop)
			for range 2 {
				if d := <-done; d > 500*time.Millisecond {
					t.Errorf("a write took %v", d)
				}
			}
			if s := to.volume().Status(); s.Role != "primary" {
				t.Fatalf("%+v", s)
			}
			if err := from.volume().Handover(bg); block.KindOf(err) != block.KindFenced {
				t.Fatal(err)
			}
			w.pair(time.Minute)
		}
	})
}

// Away for long: what the policies promise.
func TestPolicies(t *testing.T) {
	for _, p := range []Policy{Degrade, Wait} {
		hazard(t, func(c *Config) { c.OnPeerLoss = p }, func(t *testing.T, w *world, a, b *node) {
			if q, err := ParsePolicy(p.String()); err != nil || q != p {
				t.Fatal(q, err)
			}
			b.kill(false)
			begin := time.Now()
			done := make(chan time.Duration, 1)
			go func() { put(t, a, 1, 0, 0); done <- time.Since(begin) }()
			if p == Degrade {
				if d := <-done; d > 2*time.Second {
					t.Errorf("degraded after %v", d)
				}
				if s := a.volume().Status(); s.Mode != "degraded" || s.Reason == "" || len(s.Members) != 1 {
					t.Errorf("%+v", s)
				}
				// Synced before it is acknowledged.
				for round := range byte(5) {
					for i := range int64(20) {
						put(t, a, 2+round, i*4096, 0)
					}
					a.kill(true)
					a.start()
					for i := range int64(20) {
						if c := get(t, a.volume(), i*4096); c != 2+round {
							t.Fatalf("acknowledged while degraded, and gone: %d", c)
						}
					}
				}
			} else {
				time.Sleep(time.Minute)
				select {
				case <-done:
					t.Error("acknowledged at one node only")
				default:
				}
				get(t, a.volume(), 4096) // reads go on
				if s := a.volume().Status(); s.Mode != "waiting" || s.Reason == "" {
					t.Errorf("%+v", s)
				}
			}
			b.start()
			w.pair(time.Minute)
			if p == Wait {
				<-done
			}
			time.Sleep(time.Second)
			w.equal()
		})
	}
}

// A full disk at the other node is a wait with a reason, not a loss.
func TestNoSpaceAtThePeer(t *testing.T) {
	var full = make(chan struct{})
	conf := func(c *Config) {
		if c.Node != "b" {
			return
		}
		c.Local = blocktest.Hook(c.Local, func(_ context.Context, k blocktest.Call) error {
			select {
			case <-full:
			default:
				if k.Before && k.Op == "write" && k.Off == 0 {
					return block.E("test", "", block.KindNoSpace, nil)
				}
			}
			return nil
		})
	}
	hazard(t, conf, func(t *testing.T, w *world, a, b *node) {
		done := make(chan struct{})
		go func() { put(t, a, 1, 0, 0); close(done) }()
		time.Sleep(10 * time.Second)
		if s := a.volume().Status(); s.Mode != "pair" || s.Reason == "" {
			t.Errorf("%+v", s)
		}
		close(full)
		<-done
		w.equal()
	})
}

// Freeze: no write under way, positions of both journals are of one moment.
func TestFreeze(t *testing.T) {
	hazard(t, nil, func(t *testing.T, w *world, a, b *node) {
		stop := make(chan struct{})
		go func() {
			for i := int64(0); ; i++ {
				select {
				case <-stop:
					return
				default:
					put(t, a, 1, i%64*4096, 0)
				}
			}
		}()
		for range 20 {
			time.Sleep(50 * time.Millisecond)
			must(t, a.volume().Freeze(bg, func() error {
				here := a.volume().cfg.Log.Position()
				pos, ok := a.volume().MarkPeer(bg)
				if !ok {
					t.Error("no mark")
				}
				time.Sleep(100 * time.Millisecond)
				if again, _ := a.volume().MarkPeer(bg); again != pos || a.volume().cfg.Log.Position() != here {
					t.Error("a write while frozen")
				}
				must(t, a.volume().HoldPeer(bg, "writeback", pos))
				if p, ok := b.volume().cfg.Log.Held("writeback"); !ok || p.String() != pos {
					t.Error("not held")
				}
				w.equal()
				return nil
			}))
		}
		close(stop)
		if err := b.volume().Freeze(bg, func() error { return nil }); block.KindOf(err) != block.KindFenced {
			t.Error(err)
		}
		time.Sleep(time.Second)
	})
}

// How long nothing is answered when the primary's process is killed, whenever
// it comes back, and then the other's.
func TestStall(t *testing.T) {
	for _, back := range []time.Duration{0, 200 * time.Millisecond, time.Second, 1400 * time.Millisecond, 1600 * time.Millisecond, 3 * time.Second, 30 * time.Second} {
		hazard(t, nil, func(t *testing.T, w *world, a, b *node) {
			first := func() time.Duration {
				begin, done := time.Now(), make(chan time.Duration, 2)
				for i, n := range w.nodes {
					go func() {
						for n.volume() == nil || n.volume().WriteAt(bg, make([]byte, 4096), int64(i)*4096, block.FUA) != nil {
							time.Sleep(10 * time.Millisecond)
						}
						done <- time.Since(begin)
					}()
				}
				d := <-done
				go func() { <-done }()
				return d
			}
			for i, n := range []*node{a, b, a, b} {
				put(t, a, 1, 8192, 0)
				n.kill(false)
				time.AfterFunc(back, n.start)
				if d := first(); d > 2*time.Second {
					t.Errorf("back after %v, kill %d: nothing was answered for %v", back, i, d)
				} else {
					t.Logf("back after %v, kill %d: %v", back, i, d)
				}
				time.Sleep(back)
				w.pair(time.Minute)
			}
		})
	}
}

// The primary's own disk fails: the other node has everything, and nobody sees
// an error.
func TestResign(t *testing.T) {
	for _, op := range []string{"write", "read", "flush"} {
		var broken atomic.Bool
		conf := func(c *Config) {
			if c.Node == "a" {
				c.Local = blocktest.Hook(c.Local, func(_ context.Context, k blocktest.Call) error {
					if broken.Load() && k.Before && k.Op == op {
						return block.E("test", "", block.KindIO, nil)
					}
					return nil
				})
			}
		}
		hazard(t, conf, func(t *testing.T, w *world, a, b *node) {
			put(t, a, 1, 0, 0)
			broken.Store(true)
			for i, n := range []*node{a, b} {
				put(t, n, 2, int64(i)*4096, block.FUA)
				if c := get(t, n.volume(), 0); c == 0 {
					t.Error(c)
				}
			}
			if s := b.volume().Status(); s.Role != "primary" {
				t.Errorf("%s: %+v", op, s)
			}
			broken.Store(false)
			w.pair(3 * time.Minute)
			time.Sleep(time.Second)
			w.equal()
			// With nobody to turn to, the error is the caller's.
			b.kill(false)
			until(t, 10*time.Second, "a is alone", func() bool { return a.volume().Status().Mode == "degraded" })
			broken.Store(true)
			p := make([]byte, 4096)
			if err := errors.Join(a.volume().WriteAt(bg, p, 0, 0), a.volume().ReadAt(bg, p, 0, 0), a.volume().Flush(bg, 0)); block.KindOf(err) != block.KindIO {
				t.Errorf("%s: %v", op, err)
			}
		})
	}
}
