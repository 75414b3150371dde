package fence

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"path"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"forerun/block"
	"forerun/disk"
	"forerun/disk/disktest"
	"forerun/internal/msg"
)

var bg = context.Background()

// clock is one that is set by hand.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func arbiter(t *testing.T, fs disk.FS, c *clock) *Arbiter {
	t.Helper()
	a, err := Open(Options{FS: fs, Dir: "/fence", Now: c.Now})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// direct calls an arbiter without anything in between.
type direct struct {
	a    *Arbiter
	node string
}

func (d direct) Call(ctx context.Context, typ uint8, parts ...[]byte) ([]byte, error) {
	p, err := d.a.Serve(ctx, "frontend", d.node, typ, bytes.Join(parts, nil))
	if err != nil { // what a message does to an error
		return nil, &block.Error{Op: "msg.answer", Kind: block.KindOf(err), Err: errors.New(err.Error())}
	}
	return p, nil
}

func TestArbiterRemembers(t *testing.T) {
	fs, c := disktest.New(1), &clock{now: t0}
	a := arbiter(t, fs, c)
	x, y := NewClient(direct{a, "x"}, "v", "x"), NewClient(direct{a, "y"}, "v", "y")
	if _, err := x.Get(bg); block.KindOf(err) != block.KindNotFound || !Decided(err) {
		t.Fatal(err)
	}
	if r, err := x.Claim(bg); err != nil || r.Epoch != 1 || r.Primary != "x" || !r.Alone("x") {
		t.Fatal(r, err)
	}
	if r, err := y.Claim(bg); err != nil || r.Epoch != 1 || r.Primary != "x" || r.Version != 2 {
		t.Fatal(r, err)
	}
	if r, err := x.SetMembers(bg, 1, "y", "x"); err != nil || !r.Member("y") { // y's claim made a version x has not seen
		t.Fatal(r, err)
	}
	if _, err := Open(Options{FS: fs, Dir: "/fence"}); block.KindOf(err) != block.KindBusy {
		t.Fatal(err)
	}
	c.add(10 * time.Second)
	want, _ := a.Record("v")
	a.Close()
	if _, err := x.Get(bg); block.KindOf(err) != block.KindUnavailable || Decided(err) {
		t.Fatal(err)
	}
	a = arbiter(t, fs.Crash(), c)
	if got, ok := a.Record("v"); !ok || !got.equal(want) || a.Epoch("v") != 1 {
		t.Fatal(got, want)
	}
	// The arbiter may have answered a renewal just before it restarted.
	y = NewClient(direct{a, "y"}, "v", "y")
	if _, err := y.Takeover(bg, 1, false); block.KindOf(err) != block.KindBusy {
		t.Fatal(err)
	}
	c.add(Grace)
	r, err := y.Takeover(bg, 1, false)
	if err != nil || r.Epoch != 2 || r.Primary != "y" || r.Member("x") || r.Cause != CauseTakeover {
		t.Fatal(r, err)
	}
	x = NewClient(direct{a, "x"}, "v", "x")
	if _, err := x.Renew(bg, 1); block.KindOf(err) != block.KindFenced || !Decided(err) {
		t.Fatal(err)
	}
	if r, ok := x.Record(); !ok || r.Primary != "y" {
		t.Fatal("a refusal brought no record", r)
	}
	if r, err := y.SetMembers(bg, 2, "x", "y"); err != nil {
		t.Fatal(r, err)
	}
	if r, err := y.Handover(bg, 2, "x", false); err != nil || r.Primary != "x" || r.Epoch != 3 || !r.Member("y") {
		t.Fatal(r, err)
	}
	if err := y.Drop(bg, 3); block.KindOf(err) != block.KindFenced {
		t.Fatal(err)
	}
	x.Get(bg)
	if err := x.Drop(bg, 3); err != nil {
		t.Fatal(err)
	}
	if _, ok := a.Record("v"); ok || a.Epoch("v") != 4 || len(a.Records()) != 0 {
		t.Fatal("it is still there")
	}
	if _, err := x.Renew(bg, 3); block.KindOf(err) != block.KindNotFound {
		t.Fatal(err)
	}
	if r, err := y.Claim(bg); err != nil || r.Epoch != 5 || r.Primary != "y" {
		t.Fatal(r, err)
	}
	if err := a.Drop(bg, "v"); err != nil || a.Epoch("v") != 6 {
		t.Fatal(err)
	}
	if err := a.Drop(bg, "other"); err != nil {
		t.Fatal(err)
	}
	a.Close()
}

func TestArbiterRefuses(t *testing.T) {
	c := &clock{now: t0}
	a, err := Open(Options{FS: disktest.New(1), Dir: "/fence", Now: c.Now, Authorize: func(role, name, volume string) error {
		if volume != "v" {
			return &block.Error{Op: "test", Kind: block.KindDenied}
		}
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if _, err := NewClient(direct{a, "y"}, "v", "x").Claim(bg); block.KindOf(err) != block.KindDenied || Decided(err) || !strings.Contains(err.Error(), "certificate") {
		t.Error(err)
	}
	if _, err := NewClient(direct{a, "x"}, "w", "x").ClaimWait(bg); block.KindOf(err) != block.KindDenied {
		t.Error(err)
	}
	x := NewClient(direct{a, "x"}, "v", "x")
	if _, err := x.SetMembers(bg, 1, "y"); block.KindOf(err) != block.KindInvalid {
		t.Error("members without the primary", err)
	}
	if _, err := x.Claim(bg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(bg)
	cancel()
	if _, err := a.Serve(ctx, "frontend", "x", uint8(opClaim), appendRequest(nil, request{volume: "v", node: "x"})); block.KindOf(err) != block.KindCanceled {
		t.Error("a request of nobody was decided", err)
	}
}

// TestLateDecision: who was kept waiting by a slow disk is not decided upon any
// more, but renewals are taken.
func TestLateDecision(t *testing.T) {
	c := &clock{now: t0}
	asked := make(chan bool, 10)
	a, err := Open(Options{FS: disktest.New(1), Dir: "/fence", Now: func() time.Time { asked <- true; return c.Now() }})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	x := NewClient(direct{a, "x"}, "v", "x")
	if _, err := x.Claim(bg); err != nil {
		t.Fatal(err)
	}
	v := a.volumes["v"]
	for what, want := range map[string]block.Kind{"renew": block.KindNone, "set": block.KindBusy} {
		for len(asked) > 0 {
			<-asked
		}
		<-v.turn
		got := make(chan error, 1)
		go func() {
			var err error
			if what == "renew" {
				_, err = x.Renew(bg, 1)
			} else {
				_, err = x.SetMembers(bg, 1, "x", "y")
			}
			got <- err
		}()
		<-asked // it has arrived
		c.add(2 * LeaseTime)
		v.turn <- struct{}{}
		if err := <-got; block.KindOf(err) != want {
			t.Error(what, err)
		}
	}
}

// TestDamagedRecord: one volume is refused, the others go on.
func TestDamagedRecord(t *testing.T) {
	fs, c := disktest.New(1), &clock{now: t0}
	a := arbiter(t, fs, c)
	for _, v := range []string{"good", "bad"} {
		if _, err := NewClient(direct{a, "x"}, v, "x").Claim(bg); err != nil {
			t.Fatal(err)
		}
	}
	a.Close()
	fs.Flip(path.Join("/fence", fileName("bad")), 20)
	a = arbiter(t, fs, c)
	defer a.Close()
	if r, err := NewClient(direct{a, "x"}, "good", "x").Claim(bg); err != nil || r.Epoch != 1 {
		t.Error(r, err)
	}
	if _, err := NewClient(direct{a, "x"}, "bad", "x").ClaimWait(bg); block.KindOf(err) != block.KindCorrupt {
		t.Error(err)
	}
}

// play runs random requests against an arbiter and says after each answer what
// was promised. Requests go on after errors.
func play(t *testing.T, a *Arbiter, c *clock, seed uint64, n int, promised func(Record)) {
	r := rand.New(rand.NewPCG(seed, 5))
	last := Record{Volume: "v"}
	for range n {
		c.add(time.Duration(r.IntN(600)) * time.Millisecond)
		q := randomRequest(r, last)
		p, err := a.Serve(bg, "frontend", q.node, uint8(q.op), appendRequest(nil, q))
		if err != nil {
			continue
		}
		_, rec, err := parseAnswer("v", p)
		if err != nil {
			t.Fatal(err)
		}
		if last.Newer(rec) || !rec.Newer(last) && !rec.equal(last) {
			t.Fatalf("seed %d: answered %v after %v", seed, rec, last)
		}
		last = rec
		promised(rec)
	}
}

// TestPowerCut: at every call that changes something, what was answered is on
// the platter, and nothing stands there that was not decided.
func TestPowerCut(t *testing.T) {
	images := 0
	for seed := range uint64(12) {
		fs, c := disktest.New(seed), &clock{now: t0}
		a := arbiter(t, fs, c)
		told := Record{Volume: "v"}
		var cuts []*disktest.FS
		var since []Record
		fs.OnCall(func(n int64, op disktest.Op) {
			cuts, since = append(cuts, fs.Image(uint64(n))), append(since, told)
		})
		var all []Record
		play(t, a, c, seed, 60, func(r Record) { told = r; all = append(all, r) })
		fs.OnCall(nil)
		a.Close()
		for i, g := range cuts {
			images++
			b := arbiter(t, g, c)
			v := b.volumes["v"]
			got := Record{Volume: "v"}
			if v != nil {
				got = v.st.rec
			}
			if len(b.damaged) > 0 || since[i].Newer(got) {
				t.Fatalf("seed %d, cut %d: %v is there, %v was answered, damaged %v\n%s", seed, i, got, since[i], b.damaged, fs.Trace())
			}
			known := got.equal(since[i])
			for _, r := range all {
				known = known || r.equal(got)
			}
			if !known {
				t.Fatalf("seed %d, cut %d: %v was never decided", seed, i, got)
			}
			b.Close()
		}
	}
	t.Logf("%d images", images)
}

// TestEveryCallFails: whatever call to the disk fails, no answer contradicts
// one before, neither in this life nor in the next, after a kill or a power cut.
func TestEveryCallFails(t *testing.T) {
	failed := 0
	for _, lasting := range []bool{false, true} {
		for n := int64(1); n < 90; n++ {
			fs, c := disktest.New(uint64(n)), &clock{now: t0}
			a := arbiter(t, fs, c)
			fs.Fail(disktest.Fault{At: n, Err: syscall.EIO, Lasting: lasting})
			told := Record{Volume: "v"}
			at := 0
			play(t, a, c, uint64(n%9), 40, func(r Record) {
				told = r
				if at++; at == 30 && lasting {
					fs.Fail(disktest.Fault{})
				}
			})
			if fs.Failed() {
				failed++
			}
			fs.Fail(disktest.Fault{})
			for what, g := range map[string]*disktest.FS{"power cut": fs.Image(uint64(n)), "kill": fs.Kill()} {
				b := arbiter(t, g, c)
				if v := b.volumes["v"]; len(b.damaged) > 0 || told.Epoch > 0 && (v == nil || told.Newer(v.st.rec)) {
					t.Fatalf("call %d failed, then a %s: %v was answered, damaged %v\n%s", n, what, told, b.damaged, fs.Trace())
				}
				play(t, b, c, uint64(n), 20, func(Record) {})
				b.Close()
			}
		}
	}
	if failed < 50 {
		t.Errorf("only %d calls failed", failed)
	}
}

// TestNoRenewalWhileTheDiskIsUnsure: a takeover whose write failed may be on the
// disk, so the old primary must not get another second from this life.
func TestNoRenewalWhileTheDiskIsUnsure(t *testing.T) {
	fs, c := disktest.New(1), &clock{now: t0}
	a := arbiter(t, fs, c)
	defer a.Close()
	x, y := NewClient(direct{a, "x"}, "v", "x"), NewClient(direct{a, "y"}, "v", "y")
	x.Claim(bg)
	if _, err := x.SetMembers(bg, 1, "x", "y"); err != nil {
		t.Fatal(err)
	}
	c.add(Grace)
	fs.Fail(disktest.Fault{At: 1, Ops: disktest.OpSyncDir, Err: syscall.EIO, Lasting: true})
	y.Get(bg)
	if _, err := y.Takeover(bg, 1, false); err == nil || Decided(err) || !y.Doubt() {
		t.Fatal(err)
	}
	if _, err := x.Renew(bg, 1); err == nil || Decided(err) {
		t.Fatal("renewed, though the disk may say that another one is primary", err)
	}
	fs.Fail(disktest.Fault{})
	if _, err := x.Renew(bg, 1); err != nil {
		t.Fatal(err)
	}
	b := arbiter(t, fs.Crash(), c)
	defer b.Close()
	if r, _ := b.Record("v"); r.Primary != "x" {
		t.Fatal(r)
	}
}

func TestAttend(t *testing.T) {
	c := &clock{now: t0}
	a := arbiter(t, disktest.New(1), c)
	defer a.Close()
	p, q := net.Pipe()
	ctx, cancel := context.WithCancel(bg)
	var wg sync.WaitGroup
	wg.Go(func() { a.Attend(ctx, p, "frontend", "x") })
	m := msg.New(q, msg.Options{})
	wg.Go(func() { m.Run(ctx) })
	x := NewClient(m, "v", "x")
	if r, err := x.ClaimWait(bg); err != nil || r.Primary != "x" {
		t.Error(r, err)
	}
	if _, err := x.Renew(bg, 1); err != nil {
		t.Error(err)
	}
	if _, err := NewClient(m, "v", "y").Claim(bg); block.KindOf(err) != block.KindDenied {
		t.Error(err)
	}
	cancel()
	wg.Wait()
}

func TestFormat(t *testing.T) {
	long := strings.Repeat("ü", 127)
	for _, r := range []Record{rec(1, 1, "a", "a"), rec(7, 1<<40, "b", "a", "b"), {Volume: "\x00\xff/..", Epoch: 3, Version: 4},
		{Volume: long, Epoch: 1, Version: 2, Primary: long, Members: []string{"1", "2", "3", "4", "5", "6", "7", long}, Preferred: long, Cause: CauseForce}} {
		b := encodeRecord(r)
		got, err := decodeRecord(b)
		if err != nil || !got.equal(r) {
			t.Errorf("%v: %v, %v", r, got, err)
		}
		for i := range b {
			c := bytes.Clone(b)
			c[i] ^= 1 << (i % 8)
			if got, err := decodeRecord(c); err == nil {
				t.Fatalf("byte %d of %v changed: %v", i, r, got)
			}
			if _, err := decodeRecord(b[:i]); err == nil {
				t.Fatalf("%v cut at %d was taken", r, i)
			}
		}
	}
	newer := encodeRecord(rec(1, 1, "a", "a"))
	newer[7]++
	if _, err := decodeRecord(newer); block.KindOf(err) != block.KindUnsupported {
		t.Error(err)
	}
}

func FuzzRecord(f *testing.F) {
	f.Add(encodeRecord(rec(7, 9, "b", "a", "b"))[fileHead:])
	f.Add(encodeRecord(rec(7, 9, "b", "a", "b").dropped())[fileHead:])
	f.Fuzz(func(t *testing.T, body []byte) {
		// With a checksum that fits, or nothing behind it would ever be reached.
		b := seal(append(append(fileMagic[:], make([]byte, 8)...), body...))
		r, err := decodeRecord(b)
		if err != nil {
			if k := block.KindOf(err); k != block.KindCorrupt {
				t.Fatal(err)
			}
		} else if !bytes.Equal(encodeRecord(r), b) {
			t.Fatalf("%v is written in two ways", r)
		}
		decodeRecord(body)
	})
}

func FuzzRequest(f *testing.F) {
	for o := op(0); o < 9; o++ {
		f.Add(uint8(o), appendRequest(nil, request{op: o, volume: "v", node: "x", epoch: 1, version: 1}))
		f.Add(uint8(o), appendRequest(nil, request{op: o, volume: "v", node: "x", epoch: 1, version: 1, members: []string{"x"}, flag: true}))
	}
	f.Fuzz(func(t *testing.T, typ uint8, p []byte) {
		c := &clock{now: t0}
		a := arbiter(t, disktest.New(1), c)
		defer a.Close()
		NewClient(direct{a, "x"}, "v", "x").Claim(bg)
		q, err := parseRequest(typ, p)
		if err == nil && !bytes.Equal(appendRequest(nil, q), p) {
			t.Fatalf("%v is written in two ways", q)
		}
		ans, err := a.Serve(bg, "frontend", "x", typ, p)
		if err != nil {
			return
		}
		if _, r, err := parseAnswer(q.volume, ans); err != nil {
			t.Fatal(r, err)
		}
	})
}

func FuzzAnswer(f *testing.F) {
	f.Add(appendAnswer(nil, answer{}, rec(7, 9, "b", "a", "b")))
	f.Add(appendAnswer(nil, answer{kind: block.KindBusy, text: "later", wait: time.Second}, Record{}))
	f.Fuzz(func(t *testing.T, p []byte) {
		a, r, err := parseAnswer("v", p)
		if err == nil && r.Epoch > 0 && r.check() != nil {
			t.Fatal(r)
		}
		if err == nil && a.kind > block.KindExists {
			t.Fatal(a)
		}
		_ = fmt.Sprint(r)
	})
}
