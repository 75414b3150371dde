package main

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"forerun/lab/load"
	"forerun/lab/oracle"
	"forerun/lab/pair"
)

// twoFrontends is a pair behind a proxy, with a load on its volume that knows
// what must be there.
type twoFrontends struct {
	*pair.Pair
	t      *testing.T
	hist   *oracle.History
	source string
	client *load.Client
}

func newTwoFrontends(t *testing.T, size int64, c pair.Config) *twoFrontends {
	t.Helper()
	s := &twoFrontends{t: t, hist: oracle.New(7, size), source: t.TempDir() + "/source.raw"}
	if err := oracle.WriteBase(s.source, 7, size); err != nil {
		t.Fatal(err)
	}
	c.Bin, c.Dir, c.Volumes = binary, t.TempDir(), []pair.Volume{{Name: "vol", Source: s.source}}
	p, err := pair.New(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	s.Pair = p
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(p.Words())
		}
		p.Kill()
	})
	if err := p.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s.client, err = load.Dial(t.Context(), p.Proxy.Socket, "vol"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.client.Close() })
	return s
}

// during runs the load while f does something; the load must see no error.
func (s *twoFrontends) during(seed uint64, f func()) load.Stats {
	s.t.Helper()
	ctx, stop := context.WithCancel(s.t.Context())
	defer stop()
	type end struct {
		st  load.Stats
		err error
	}
	done := make(chan end, 1)
	go func() {
		st, err := load.Run(ctx, s.client, s.hist, load.Config{Seed: seed, Depth: 4, Pause: 2 * time.Millisecond})
		done <- end{st, err}
	}()
	f()
	stop()
	e := <-done
	if e.err != nil {
		s.t.Fatalf("the workload: %v", e.err)
	}
	return e.st
}

func (s *twoFrontends) must(out string, err error) string {
	s.t.Helper()
	if err != nil {
		s.t.Fatalf("%v\n%s", err, out)
	}
	return out
}

func (s *twoFrontends) primary() (first, second *pair.Node) {
	s.t.Helper()
	first, second, err := s.Primary(s.t.Context(), "vol")
	if err != nil {
		s.t.Fatal(err)
	}
	return first, second
}

// checkpoint makes one and waits until the source has it.
func (s *twoFrontends) checkpoint(primary *pair.Node) {
	s.t.Helper()
	s.must(s.Order(s.t.Context(), primary, "checkpoint", "vol"))
	if err := s.Settled(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
}

// TestPairLosesNothing kills the primary under load twice, the second time for
// good, and then calls the move off: the source has every write.
func TestPairLosesNothing(t *testing.T) {
	s := newTwoFrontends(t, 16*mib, pair.Config{})
	first, second := s.primary()
	st := s.during(1, func() {
		time.Sleep(500 * time.Millisecond)
		first.Proc.Kill()
		time.Sleep(3 * time.Second) // longer than its lease: the other one takes over
		if err := first.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := s.WaitInSync(t.Context(), time.Minute); err != nil {
			t.Fatal(err)
		}
		time.Sleep(300 * time.Millisecond)
	})
	t.Logf("%d writes, the longest request took %v", st.Writes, st.Longest)
	if st.Writes == 0 || st.Longest > 15*time.Second {
		t.Errorf("%+v", st)
	}
	now, other := s.primary()
	if now == first || now != second {
		t.Errorf("%s was killed, and %s is primary", first.Name, now.Name)
	}
	if err := s.hist.Verify(s.client); err != nil {
		t.Fatal(err)
	}
	s.during(2, func() {
		time.Sleep(300 * time.Millisecond)
		now.Proc.Kill()
		time.Sleep(3 * time.Second)
	})
	if err := s.hist.Verify(s.client); err != nil {
		t.Fatal(err)
	}
	if v, err := other.Status(t.Context(), "vol"); err != nil || v.Replica.Role != "primary" || v.Replica.InSync {
		t.Errorf("%+v %v", v.Replica, err)
	}
	s.must(s.Order(t.Context(), other, "abort", "vol"))
	same := func(what string) {
		t.Helper()
		if err := verifyFile(s.hist, s.source); err != nil {
			t.Fatalf("the source %s: %v", what, err)
		}
	}
	same("after the abort")
	s.must(s.Order(t.Context(), other, "abort", "vol"))
	same("after a second abort")
	if v, err := other.Status(t.Context(), "vol"); err != nil || v.Phase != "aborted" {
		t.Errorf("phase %q after the abort: %v", v.Phase, err)
	}
}

// TestCloneBesideThePair writes to an isolated clone and to the volume it is a
// clone of, and finds neither in the other.
func TestCloneBesideThePair(t *testing.T) {
	s := newTwoFrontends(t, 16*mib, pair.Config{})
	s.during(1, func() { time.Sleep(500 * time.Millisecond) })
	first, _ := s.primary()
	s.checkpoint(first)
	if err := verifyFile(s.hist, s.source); err != nil {
		t.Fatalf("the source after a checkpoint: %v", err)
	}
	before := sum(t, s.source)
	clone := s.Frontend("clone", nil, "--isolated")
	if err := clone.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if clone.Alive() {
			clone.Proc.Kill()
		}
	})
	c, err := load.Dial(t.Context(), clone.Socket, "vol")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Repeat("the clone's own ", 256)
	for off := int64(0); off < 16*mib; off += 32 << 10 {
		if err := c.WriteAt([]byte(text), off, false); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	// What is between belongs to the volume as it was when the clone began.
	was := make([]byte, 16*mib)
	if _, err := c.ReadAt(was[4096:8192], 4096); err != nil {
		t.Fatal(err)
	}
	if err := s.hist.Check(4096, was[4096:8192]); err != nil {
		t.Errorf("the clone does not begin with the volume: %v", err)
	}
	if got := sum(t, s.source); got != before {
		t.Fatal("the clone's writes are in the source")
	}
	// It goes on while the volume does.
	s.during(2, func() { time.Sleep(500 * time.Millisecond) })
	s.checkpoint(first)
	if err := verifyFile(s.hist, s.source); err != nil {
		t.Fatalf("the source after a checkpoint beside a clone: %v", err)
	}
	if err := s.hist.Verify(s.client); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 4096)
	for off := int64(0); off < 16*mib; off += 32 << 10 {
		if _, err := c.ReadAt(p, off); err != nil || string(p) != text {
			t.Fatalf("the clone at %d: %.20q %v", off, p, err)
		}
	}
	c.Close()
	s.must(s.Order(t.Context(), clone, "discard", "vol"))
	if err := s.Stop(); err != nil {
		t.Error(err)
	}
}

// TestGroupIsOneMoment starts a pair with two volumes, each of which either
// frontend may get first, and finds them at one node and in one checkpoint.
func TestGroupIsOneMoment(t *testing.T) {
	const size = 4 * mib
	dir := t.TempDir()
	var vols []pair.Volume
	for _, n := range []string{"data", "log"} {
		vols = append(vols, pair.Volume{Name: n, Source: dir + "/" + n})
		if err := oracle.WriteBase(dir+"/"+n, 9, size); err != nil {
			t.Fatal(err)
		}
	}
	p, err := pair.New(t.Context(), pair.Config{Bin: binary, Dir: t.TempDir(), Volumes: vols, Args: []string{"--group", "db=data,log"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(p.Words())
		}
		p.Kill()
	})
	if err := p.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	hist := map[string]*oracle.History{}
	for _, v := range vols {
		c, err := load.Dial(t.Context(), p.Proxy.Socket, v.Name)
		if err != nil {
			t.Fatal(err)
		}
		hist[v.Name] = oracle.New(9, size)
		ctx, stop := context.WithTimeout(t.Context(), 300*time.Millisecond)
		_, err = load.Run(ctx, c, hist[v.Name], load.Config{Seed: 3, Depth: 2})
		stop()
		c.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
	var at *pair.Node
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		a, _, err1 := p.Primary(t.Context(), "data")
		b, _, err2 := p.Primary(t.Context(), "log")
		if err1 == nil && err2 == nil && a == b {
			at = a
			break
		}
		if time.Now().After(end) {
			t.Fatal("the volumes of a group do not come together:", err1, err2)
		}
	}
	// Asked of one volume, it is of both.
	if out, err := p.Order(t.Context(), at, "checkpoint", "data"); err != nil {
		t.Fatal(err, out)
	}
	if err := p.Settled(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, v := range vols {
		if err := verifyFile(hist[v.Name], v.Source); err != nil {
			t.Errorf("%s: %v", v.Name, err)
		}
	}
}

func verifyFile(h *oracle.History, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return h.Verify(f)
}
