package replica

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
	"forerun/data/fence"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestSpans adds many ranges and compares with a bitmap: what was added is
// covered, in bounded memory, and exactly so while there are few.
func TestSpans(t *testing.T) {
	for seed := range uint64(4) {
		r := rand.New(rand.NewPCG(seed, 1))
		const size, unit = 1 << 30, 512
		s := newSpans(size, unit)
		marks := make([]bool, size/unit)
		n := []int{10, 1000, 3 * maxSpans, 5 * maxSpans}[seed]
		for range n {
			at := r.Int64N(size / unit)
			k := 1 + r.Int64N(8)
			if r.IntN(10) == 0 {
				k = r.Int64N(1000)
			}
			s.add(at*unit, k*unit)
			for i := at; i < min(at+k, size/unit); i++ {
				marks[i] = true
			}
			if len(s.list) > 2*maxSpans {
				t.Fatalf("%d ranges kept", len(s.list))
			}
		}
		list := s.all()
		if len(list) > maxSpans {
			t.Fatalf("%d ranges", len(list))
		}
		at, more := int64(0), int64(0)
		for _, e := range list {
			if e.Off < at || e.Len <= 0 || e.End() > size || e.Off%unit != 0 {
				t.Fatalf("seed %d: %+v after %d", seed, e, at)
			}
			for ; at < e.Off; at += unit {
				if marks[at/unit] {
					t.Fatalf("seed %d: byte %d is not covered", seed, at)
				}
			}
			for ; at < e.End(); at += unit {
				if !marks[at/unit] {
					more++
				}
			}
		}
		for ; at < size; at += unit {
			if marks[at/unit] {
				t.Fatalf("seed %d: byte %d is not covered", seed, at)
			}
		}
		if seed < 2 && more > 0 {
			t.Errorf("seed %d: %d units too many", seed, more)
		}
	}
}

func TestMessages(t *testing.T) {
	s := state{node: "a", token: 77, inSync: true, agreed: true, rec: fence.Record{Volume: "v", Epoch: 3, Version: 9, Primary: "a",
		Members: []string{"a", "b"}, Preferred: "b", Cause: fence.CauseHandover}}
	got, err := parseState("v", s.append(nil))
	if err != nil || !reflect.DeepEqual(got, s) {
		t.Fatalf("%+v %v", got, err)
	}
	p := s.append(nil)
	for i := range p {
		if _, err := parseState("v", p[:i]); err == nil {
			t.Fatalf("%d of %d bytes are taken for a message", i, len(p))
		}
	}
	b := body{token: 5, off: 1 << 40, n: 4096, flags: block.FUA | block.Background}
	c, rest, err := parseBody(append(b.append(nil), "rest"...))
	if err != nil || c != b || string(rest) != "rest" {
		t.Fatal(c, rest, err)
	}
	list := []block.Extent{{Off: 0, Len: 4096, Kind: block.Hole, State: block.Untouched}, {Off: 4096, Len: 1, State: block.Modified}}
	back, err := parseExtents(nil, appendExtents(nil, list))
	if err != nil || !slices.Equal(back, list) {
		t.Fatal(back, err)
	}
}

// FuzzServe offers any message to a node that is alone in its world; it may
// refuse, not fall.
func FuzzServe(f *testing.F) {
	s := state{node: "b", rec: fence.Record{Volume: "v", Epoch: 3, Version: 9, Primary: "b", Members: []string{"a", "b"}, Preferred: "b", Cause: "claim"}}
	f.Add(uint8(typBeat), s.append(nil))
	f.Add(uint8(typOpen), s.append(nil))
	f.Add(uint8(typWrite), body{token: 1, off: 512, n: 3}.append(nil))
	f.Add(uint8(typFwdRead), body{off: 512, n: 512}.append(nil))
	f.Add(uint8(typHold), append(body{token: 1}.append(nil), "peer\x001/00000000"...))
	f.Fuzz(func(t *testing.T, typ uint8, p []byte) {
		v := stub(t)
		defer v.Close()
		v.decided = true
		v.inbound.Store(&inbound{token: 1, idle: make(chan struct{}), ctx: context.Background(), stop: func() {}})
		if _, err := v.ServePeer(t.Context(), "b", typ, p); err != nil && block.KindOf(err) == block.KindNone {
			t.Fatal("an error without a kind")
		}
		parseExtents(nil, p)
		Split(p)
	})
}

// TestRanges: overlapping ones go by turn, others at once; a barrier waits for
// those before it and for none behind; a waiter that gives up is in nobody's way.
func TestRanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var rs ranges
		mk := func(off, n int64) *op { return &op{wake: make(chan struct{}, 1), off: off, n: n} }
		a, b, c := mk(0, 10), mk(5, 10), mk(20, 5)
		ctx := context.Background()
		must(t, rs.lock(ctx, nil, a))
		must(t, rs.lock(ctx, nil, c))
		var order []string
		go func() {
			must(t, rs.lock(ctx, nil, b))
			order = append(order, "b")
		}()
		synctest.Wait()
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if err := rs.lock(short, nil, mk(0, 100)); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		go func() {
			must(t, rs.barrier(ctx))
			order = append(order, "barrier")
		}()
		synctest.Wait()
		d := mk(30, 5)
		must(t, rs.lock(ctx, nil, d)) // behind the barrier, and not held up
		if order != nil {
			t.Fatal(order)
		}
		rs.unlock(a)
		synctest.Wait()
		rs.unlock(c)
		synctest.Wait()
		if !slices.Equal(order, []string{"b"}) {
			t.Fatal(order)
		}
		rs.unlock(b)
		synctest.Wait()
		if !slices.Equal(order, []string{"b", "barrier"}) {
			t.Fatal(order)
		}
		rs.unlock(d)
		if len(rs.list) != 0 {
			t.Fatal(len(rs.list))
		}
	})
}

// TestGate: during waits for who is inside, keeps others out, and opens again
// when it was given up.
func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		ctx := context.Background()
		must(t, g.enter(ctx, nil))
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if err := g.during(short, func() error { t.Error("called"); return nil }); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		var log bytes.Buffer
		go func() {
			must(t, g.during(ctx, func() error {
				log.WriteString("closed ")
				time.Sleep(time.Second)
				log.WriteString("open ")
				return nil
			}))
		}()
		synctest.Wait()
		go func() {
			must(t, g.enter(ctx, nil))
			log.WriteString("in")
			g.leave()
		}()
		synctest.Wait()
		closing := make(chan struct{})
		close(closing)
		if err := g.enter(ctx, closing); err != errClosed {
			t.Fatal(err)
		}
		synctest.Wait()
		if log.Len() > 0 {
			t.Fatal(log.String())
		}
		g.leave()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if log.String() != "closed open in" {
			t.Fatal(log.String())
		}
	})
}
