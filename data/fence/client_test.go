package fence

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
	"forerun/disk/disktest"
)

// wire is a line to an arbiter that a test can cut, before the arbiter or
// behind it, and that keeps what was lost so that it can come late.
type wire struct {
	direct
	mu         sync.Mutex
	lose, mute bool // requests, answers
	late       []func()
}

func (w *wire) set(lose, mute bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lose, w.mute = lose, mute
}

func (w *wire) Call(ctx context.Context, typ uint8, parts ...[]byte) ([]byte, error) {
	w.mu.Lock()
	lose, mute := w.lose, w.mute
	p := bytes.Join(parts, nil)
	if lose {
		w.late = append(w.late, func() { w.direct.Call(bg, typ, p) })
	}
	w.mu.Unlock()
	lost := &block.Error{Op: "test", Kind: block.KindUnavailable, Err: errors.New("the line is cut")}
	if lose {
		return nil, lost
	}
	ans, err := w.direct.Call(ctx, typ, p)
	if mute {
		return nil, lost
	}
	return ans, err
}

// deliver lets everything arrive that was lost.
func (w *wire) deliver() {
	w.mu.Lock()
	late := w.late
	w.late = nil
	w.mu.Unlock()
	for _, f := range late {
		f()
	}
}

type duo struct {
	c      *clock
	a      *Arbiter
	lx, ly *wire
	x, y   *Client
}

// both makes an arbiter with a volume of x's that y is in sync with.
func both(t *testing.T) *duo {
	t.Helper()
	d := &duo{c: &clock{now: time.Now()}}
	d.a = arbiter(t, disktest.New(1), d.c)
	t.Cleanup(func() { d.a.Close() })
	d.lx, d.ly = &wire{direct: direct{d.a, "x"}}, &wire{direct: direct{d.a, "y"}}
	d.x, d.y = NewClient(d.lx, "v", "x"), NewClient(d.ly, "v", "y")
	for _, c := range []*Client{d.x, d.y} {
		c.SetClock(d.c.Now)
		if _, err := c.Claim(bg); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := d.x.SetMembers(bg, 1, "x", "y"); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *duo) record(t *testing.T) Record {
	t.Helper()
	r, _ := d.a.Record("v")
	return r
}

func TestLostAnswers(t *testing.T) {
	d := both(t)
	d.lx.set(false, true)
	if _, err := d.x.SetMembers(bg, 1, "x"); err == nil || Decided(err) || !d.x.Doubt() {
		t.Fatal(err)
	}
	if d.x.MayRead(d.c.Now()) {
		t.Error("reads without a lease, and without knowing whether it is alone")
	}
	d.lx.set(false, false)
	r, err := d.x.SetMembers(bg, 1, "x") // again
	if err != nil || !r.Alone("x") || d.x.Doubt() || !d.x.MayRead(d.c.Now()) {
		t.Fatal(r, err)
	}
	if _, err := d.x.SetMembers(bg, 1, "x", "y"); err != nil {
		t.Fatal(err)
	}
	d.c.add(Grace)
	d.ly.set(false, true)
	if _, err := d.y.Takeover(bg, 1, false); err == nil || Decided(err) {
		t.Fatal(err)
	}
	d.ly.set(false, false)
	// The first request was made for an old version and refused; the client asked
	// again by itself if the answer came, which it did not.
	r, err = d.y.Takeover(bg, 1, false)
	if err != nil || r.Primary != "y" || r.Epoch != 2 || !d.y.MayRead(d.c.Now()) {
		t.Fatal(r, err)
	}
	d.ly.set(false, true)
	if _, err := d.y.Takeover(bg, 1, false); err == nil {
		t.Fatal(err)
	}
	d.ly.set(false, false)
	if r, err = d.y.Takeover(bg, 1, false); err != nil || r.Epoch != 2 || r.Primary != "y" {
		t.Fatal("granted once, and not again", r, err)
	}
}

// TestLateRequests: what a node asked for and gave up does not happen after it
// has settled, or after its next process has claimed.
func TestLateRequests(t *testing.T) {
	for _, c := range []struct {
		what string
		ask  func(d *duo) error
		by   func(d *duo) (*wire, *Client)
	}{
		{"members", func(d *duo) error { _, err := d.x.SetMembers(bg, 1, "x"); return err }, func(d *duo) (*wire, *Client) { return d.lx, d.x }},
		{"handover", func(d *duo) error { _, err := d.x.Handover(bg, 1, "y", false); return err }, func(d *duo) (*wire, *Client) { return d.lx, d.x }},
		{"drop", func(d *duo) error { return d.x.Drop(bg, 1) }, func(d *duo) (*wire, *Client) { return d.lx, d.x }},
		{"takeover", func(d *duo) error { _, err := d.y.Takeover(bg, 1, false); return err }, func(d *duo) (*wire, *Client) { return d.ly, d.y }},
		{"force", func(d *duo) error { _, err := d.y.Takeover(bg, 1, true); return err }, func(d *duo) (*wire, *Client) { return d.ly, d.y }},
	} {
		for _, how := range []string{"nothing", "settle", "restart", "another call"} {
			d := both(t)
			d.y.Get(bg)
			line, client := c.by(d)
			line.set(true, false)
			if err := c.ask(d); err == nil || Decided(err) || !client.Doubt() {
				t.Fatal(c.what, err)
			}
			line.set(false, false)
			var err error
			switch how {
			case "settle":
				_, err = client.Settle(bg)
			case "restart":
				_, err = NewClient(line, "v", client.Node()).Claim(bg)
			case "another call":
				if client == d.x {
					_, err = client.SetMembers(bg, 1, "x", "y")
				} else if _, err = client.Takeover(bg, 1, false); block.KindOf(err) == block.KindBusy {
					err = nil // too early; the one on its way must be ended nevertheless
				}
			}
			if err != nil {
				t.Fatal(c.what, how, err)
			}
			if how != "nothing" && how != "restart" && client.Doubt() {
				t.Errorf("%s, %s: still in doubt", c.what, how)
			}
			before := d.record(t)
			d.c.add(Grace)
			line.deliver()
			if after := d.record(t); after.equal(before) != (how != "nothing") {
				t.Errorf("%s, %s: %v, then %v", c.what, how, before, after)
			}
		}
	}
}

func TestLateClaimAfterADrop(t *testing.T) {
	d := both(t)
	d.lx.set(true, false)
	NewClient(d.lx, "v", "x").Claim(bg)
	d.lx.set(false, false)
	if err := d.x.Drop(bg, 1); err != nil {
		t.Fatal(err)
	}
	d.lx.deliver()
	if r, ok := d.a.Record("v"); ok {
		t.Fatal("a claim from before the drop was granted", r)
	}
	if _, err := d.x.Settle(bg); block.KindOf(err) != block.KindNotFound {
		t.Fatal(err)
	}
	if err := d.x.Drop(bg, 1); err != nil {
		t.Fatal("dropped again", err)
	}
	if r, err := NewClient(d.ly, "v", "y").Claim(bg); err != nil || r.Primary != "y" || r.Epoch != 3 {
		t.Fatal(r, err)
	}
}

func TestHandoverEndsTheLease(t *testing.T) {
	d := both(t)
	if _, err := d.x.Renew(bg, 1); err != nil || !d.x.MayRead(d.c.Now()) {
		t.Fatal(err)
	}
	sent := d.c.Now()
	d.c.add(time.Millisecond)
	d.lx.set(true, false)
	if _, err := d.x.Handover(bg, 1, "y", false); Decided(err) || d.x.MayRead(d.c.Now()) {
		t.Fatal("reads while a handover is on its way", err)
	}
	d.x.Lease().Renewed(sent) // a heartbeat from before
	d.lx.set(false, false)
	d.c.add(time.Millisecond)
	if _, err := d.x.Renew(bg, 1); err != nil || d.x.MayRead(d.c.Now()) {
		t.Fatal("a renewal is no answer to a handover", err)
	}
	if _, err := d.x.Settle(bg); err != nil || !d.x.MayRead(d.c.Now()) {
		t.Fatal(err)
	}
	d.lx.deliver()
	if r := d.record(t); r.Primary != "x" {
		t.Fatal(r)
	}
	d.c.add(time.Millisecond)
	if r, err := d.x.Handover(bg, 1, "y", true); err != nil || r.Primary != "y" || r.Preferred != "y" || d.x.MayRead(d.c.Now()) {
		t.Fatal(r, err)
	}
	d.y.Get(bg)
	d.c.add(time.Millisecond)
	if r, err := d.y.Renew(bg, 2); err != nil || !r.Member("x") || !d.y.MayRead(d.c.Now()) {
		t.Fatal(r, err)
	}
}

func TestMayAnswer(t *testing.T) {
	d := both(t)
	if !d.y.MayAnswer(1) || d.x.MayAnswer(1) {
		t.Error("y is a secondary, x is not")
	}
	y := NewClient(d.ly, "v", "y")
	y.Get(bg)
	if y.MayAnswer(1) {
		t.Error("it does not know what its last process was")
	}
	y.Claim(bg)
	if !y.MayAnswer(1) || !y.MayAnswer(2) || y.MayAnswer(0) {
		t.Error("it knows")
	}
	r, _ := y.Record()
	r.Epoch = 7
	changed := y.Changed()
	y.Saw(Record{Volume: "w", Epoch: 9, Version: 9, Primary: "x", Members: []string{"x"}, Preferred: "x", Cause: CauseClaim})
	y.Saw(Record{Volume: "v", Epoch: 9, Version: 9, Primary: "x"})
	select {
	case <-changed:
		t.Error("nonsense was believed")
	default:
	}
	y.Saw(r)
	<-changed
	if y.MayAnswer(6) {
		t.Error("an old epoch")
	}
}

func TestLease(t *testing.T) {
	var l Lease
	now := t0.Add(time.Hour)
	at := func(d time.Duration) time.Time { return now.Add(d) }
	if l.Valid(now) || l.Left(now) != 0 {
		t.Error("a lease from nothing")
	}
	l.Renewed(now)
	if !l.Valid(at(LeaseTime-1)) || l.Valid(at(LeaseTime)) {
		t.Error("it lasts LeaseTime")
	}
	l.Renewed(at(-time.Second)) // an answer that comes late
	if !l.Valid(at(LeaseTime - 1)) {
		t.Error("shortened by a late answer")
	}
	l.Revoke(at(10))
	l.Renewed(at(5))
	l.Renewed(at(10))
	if l.Valid(at(11)) {
		t.Error("renewed by what was sent before it ended")
	}
	l.Renewed(at(11))
	if !l.Valid(at(12)) {
		t.Error("renewed")
	}
	// A machine that was suspended: the monotonic clock stood still, the other one tells.
	if woken := at(20).Round(0).Add(time.Minute); l.Valid(woken) {
		t.Error("valid after a minute of sleep")
	}
}

func TestWitness(t *testing.T) {
	now := t0.Add(time.Hour)
	w := NewWitness(now)
	if w.Clear(now.Add(Grace-1)) || !w.Clear(now.Add(Grace)) {
		t.Error("a new process waits Grace")
	}
	w.Answered(now.Add(time.Second))
	w.Answered(now)
	if w.Clear(now.Add(Grace)) || w.Left(now.Add(time.Second)) != Grace || !w.Clear(now.Add(time.Second+Grace)) {
		t.Error("a heartbeat was answered")
	}
}

// TestBlocking: the calls that wait get through outages, and say why they could not.
func TestBlocking(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := both(t)
		d.a.o.Now = time.Now
		for _, c := range []*Client{d.x, d.y} {
			c.SetClock(time.Now)
		}
		d.x.Renew(bg, 1)
		d.y.Get(bg)
		d.lx.set(true, false)
		d.ly.set(false, true)
		time.AfterFunc(5*time.Second, func() { d.lx.set(false, false); d.ly.set(false, false) })
		ctx, cancel := context.WithTimeout(bg, time.Second)
		if _, err := d.x.SetMembersWait(ctx, 1, "x"); block.KindOf(err) != block.KindCanceled || !strings.Contains(err.Error(), "cut") {
			t.Error(err)
		}
		cancel()
		begin := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() {
			if r, err := d.x.SetMembersWait(bg, 1, "x"); err != nil || !r.Alone("x") {
				// y's takeover, whose answers were lost, was first.
				if block.KindOf(err) != block.KindFenced {
					t.Error(r, err)
				}
			}
		})
		r, err := d.y.TakeoverWait(bg, 1, false)
		if err != nil || r.Primary != "y" {
			t.Error(r, err)
		}
		wg.Wait()
		if d := time.Since(begin); d > 6*time.Second {
			t.Error("took", d)
		}
		ctx, cancel = context.WithTimeout(bg, 10*time.Second)
		defer cancel()
		if err := d.x.Keep(ctx, 1); block.KindOf(err) != block.KindFenced {
			t.Error(err)
		}
		if err := d.y.Keep(ctx, 2); block.KindOf(err) != block.KindCanceled {
			t.Error(err)
		}
		if _, err := d.x.TakeoverWait(bg, 2, false); block.KindOf(err) != block.KindDenied {
			t.Error(err)
		}
		d.y.Renew(bg, 2)
		begin = time.Now()
		if r, err := d.x.TakeoverWait(bg, 2, true); err != nil || r.Cause != CauseForce || time.Since(begin) < Grace-time.Millisecond {
			t.Error(r, err, time.Since(begin))
		}
		if _, err := d.x.SetMembersWait(bg, 3, "x", "y"); err != nil {
			t.Error(err)
		}
		if r, err := d.x.HandoverWait(bg, 3, "y", false); err != nil || r.Primary != "y" {
			t.Error(r, err)
		}
		d.y.Get(bg)
		if err := d.y.DropWait(bg, 4); err != nil {
			t.Error(err)
		}
		if r, err := d.y.ClaimWait(bg); err != nil || r.Epoch != 6 {
			t.Error(r, err)
		}
	})
}
