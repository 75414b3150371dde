package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"forerun/api"
	"forerun/api/client"
	"forerun/lab/load"
	"forerun/lab/oracle"
	"forerun/lab/pair"
)

// twoBackends is a site with another backend beside its own.
type twoBackends struct {
	*site
	addr2  string
	second *proc
}

func newTwoBackends(t *testing.T) *twoBackends {
	t.Helper()
	s := &twoBackends{site: newSite(t), addr2: freePort(t)}
	output(t, binary, "pki", "issue", "--dir", s.path("pki"), "--role", "backend", "--name", "older", "--host", "localhost,127.0.0.1")
	t.Cleanup(func() {
		if s.second != nil {
			s.second.end(t, syscall.SIGKILL)
		}
	})
	return s
}

func (s *twoBackends) startSecond(volume string) {
	s.t.Helper()
	s.second = start(s.t, s.path("second.log"), binary, "backend", "--pki", s.path("pki"), "--name", "older",
		"--state", s.path("b2state"), "--listen", s.addr2, "--volume", volume)
	s.await(s.second, func() bool {
		_, err := client.New(s.path("b2state")).Node(context.Background())
		return err == nil
	})
}

// atBackend is what a backend says of a volume.
func (s *twoBackends) atBackend(state, volume string) api.Volume {
	s.t.Helper()
	v, err := client.New(s.path(state)).Volume(s.t.Context(), volume)
	if err != nil {
		s.t.Fatal(err)
	}
	return v
}

// reads fails unless the volume has there what the file has.
func (s *twoBackends) reads(volume, file string, off, n int64) {
	s.t.Helper()
	c, err := load.Dial(s.t.Context(), s.sock, volume)
	if err != nil {
		s.t.Fatal(err)
	}
	defer c.Close()
	got := make([]byte, n)
	if _, err := c.ReadAt(got, off); err != nil {
		s.t.Fatal(err)
	}
	f, err := os.Open(file)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	want := make([]byte, n)
	if _, err := f.ReadAt(want, off); err != nil {
		s.t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		s.t.Fatalf("%s at %d is not what the source has", volume, off)
	}
}

// copied fails unless the whole volume is what the file is.
func (s *twoBackends) copied(volume, file string) {
	s.t.Helper()
	out := s.path(volume + ".out")
	output(s.t, "nbdcopy", s.uri(volume), out)
	same(s.t, out, file)
}

func (s *twoBackends) write(volume string, b byte) {
	s.t.Helper()
	c, err := load.Dial(s.t.Context(), s.sock, volume)
	if err != nil {
		s.t.Fatal(err)
	}
	defer c.Close()
	p := bytes.Repeat([]byte{b}, 12345)
	for off := int64(1 << 20); off < 8*mib; off += mib + 512 {
		if err := c.WriteAt(p[:8192+512], off, false); err != nil {
			s.t.Fatal(err)
		}
	}
	if err := c.Flush(); err != nil {
		s.t.Fatal(err)
	}
}

// written makes a checkpoint and waits until the source is what the volume is.
func (s *twoBackends) written(volume, file string) {
	s.t.Helper()
	output(s.t, binary, "checkpoint", "--state", s.path("fstate"), "--volume", volume)
	out := s.path(volume + ".out")
	output(s.t, "nbdcopy", s.uri(volume), out)
	s.await(s.frontend, func() bool { return exec.Command("cmp", "-s", out, file).Run() == nil })
}

func (s *twoBackends) fill(action, volume string) {
	s.t.Helper()
	output(s.t, binary, "fill", action, "--state", s.path("fstate"), "--volume", volume)
}

// TestTwoBackends serves a volume from each of two backends. Whatever becomes
// of one concerns its volume alone.
func TestTwoBackends(t *testing.T) {
	need(t, "nbdcopy", "cmp")
	s := newTwoBackends(t)
	a, b := s.disk("a.raw", 16*mib, 21), s.disk("b.raw", 16*mib, 22)
	volumes := []string{"a", "b=" + s.addr2}
	s.startBackend("a=" + a)
	s.startSecond("b=" + b)
	s.startFrontend(volumes, "--fill-paused", "--checkpoint-interval", "1h")
	for volume, addr := range map[string]string{"a": s.addr, "b": s.addr2} {
		if v := s.status(volume); v.Backend != addr || v.Waiting != "" || !v.WAN.Connected {
			t.Errorf("%s: backend %s, waiting %q, %+v", volume, v.Backend, v.Waiting, v.WAN)
		}
	}
	n, err := client.New(s.path("fstate")).Node(t.Context())
	if err != nil || strings.Join(n.Backends, " ") != s.addr+" "+s.addr2 || n.Backend != s.addr {
		t.Errorf("%+v %v", n, err)
	}
	if text := output(t, binary, "status", "--state", s.path("fstate")); !strings.Contains(text, s.addr) || !strings.Contains(text, s.addr2) {
		t.Errorf("the status does not name both backends:\n%s", text)
	}

	// One goes: the other's volume fills, and what is here of its own is read.
	s.reads("b", b, 0, 2*mib)
	s.second.end(t, syscall.SIGTERM)
	s.await(s.frontend, func() bool { return !s.status("b").WAN.Connected })
	s.fill("resume", "a")
	s.awaitFilled("a")
	s.write("a", 0x61)
	s.written("a", a)
	s.reads("b", b, 0, 2*mib)
	s.copied("a", a)
	if v := s.status("b"); !strings.Contains(v.Waiting, s.addr2) || v.Chunks.Absent == 0 {
		t.Errorf("its backend is away: waiting %q, %+v", v.Waiting, v.Chunks)
	}
	if v := s.status("a"); v.Waiting != "" || !v.WAN.Connected {
		t.Errorf("the other backend is away: %q %+v", v.Waiting, v.WAN)
	}
	// What is not here waits for it, and comes when it does.
	late := start(t, s.path("late.log"), "nbdcopy", s.uri("b"), s.path("late.out"))
	s.startSecond("b=" + b)
	if err := <-late.done; err != nil {
		t.Fatal(err)
	}
	same(t, s.path("late.out"), b)
	s.fill("resume", "b")
	s.awaitFilled("b")
	s.write("b", 0x62)
	s.written("b", b)
	if one, two := s.atBackend("bstate", "a").Writeback, s.atBackend("b2state", "b").Writeback; one.LastID == 0 || two.LastID == 0 {
		t.Errorf("checkpoints %d and %d", one.LastID, two.LastID)
	}

	// A restart without one of them.
	s.frontend.end(t, syscall.SIGTERM)
	s.second.end(t, syscall.SIGKILL)
	s.startFrontend(volumes, "--checkpoint-interval", "1h")
	s.copied("b", b)
	s.await(s.frontend, func() bool { return s.status("a").WAN.Connected })
	s.write("a", 0x63)
	s.write("b", 0x64)
	// An end of one is none of the other, and its backend is left.
	output(t, binary, "abort", "--state", s.path("fstate"), "--volume", "a")
	if p := s.status("a").Phase; p != api.PhaseAborted {
		t.Errorf("aborted, and the phase is %s", p)
	}
	f, err := os.ReadFile(a)
	if err != nil || !bytes.Equal(f[mib:mib+8192], bytes.Repeat([]byte{0x63}, 8192)) {
		t.Errorf("the last write is not in the source of the volume that was called off: %v", err)
	}
	s.await(s.backend, func() bool { return s.atBackend("bstate", "a").Clients == 0 })
	s.startSecond("b=" + b)
	s.written("b", b)
	s.frontend.end(t, syscall.SIGTERM)
}

// TestPairOfTwoBackends: each backend arbitrates its own volumes, so that with
// one gone the pair still changes the primary of the other's.
func TestPairOfTwoBackends(t *testing.T) {
	dir, addr2 := t.TempDir(), freePort(t)
	for _, n := range []string{"a", "b"} {
		if err := oracle.WriteBase(dir+"/"+n, 5, 4*mib); err != nil {
			t.Fatal(err)
		}
	}
	p, err := pair.New(t.Context(), pair.Config{Bin: binary, Dir: t.TempDir(), Volumes: []pair.Volume{{Name: "a", Source: dir + "/a"}},
		Args: []string{"--volume", "b=" + addr2, "--arbiter", "", "--failback-after", "0"}})
	if err != nil {
		t.Fatal(err)
	}
	pki := filepath.Join(p.Dir, "pki")
	output(t, binary, "pki", "issue", "--dir", pki, "--role", "backend", "--name", "older", "--host", "localhost,127.0.0.1")
	launch := func() *proc {
		return start(t, dir+"/second.log", binary, "backend", "--pki", pki, "--name", "older", "--state", dir+"/state",
			"--listen", addr2, "--volume", "b="+dir+"/b")
	}
	second := launch()
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(p.Words())
		}
		p.Kill()
		second.end(t, syscall.SIGKILL)
	})
	if err := p.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	// at waits until a volume is in sync and returns who is primary, and who not.
	at := func(volume string) (first, other *pair.Node) {
		t.Helper()
		for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
			first, other, err := p.Primary(t.Context(), volume)
			if err == nil {
				if v, verr := first.Status(t.Context(), volume); verr == nil && v.Replica.InSync {
					return first, other
				}
			}
			if time.Now().After(end) {
				t.Fatalf("%s is not in sync: %v", volume, err)
			}
		}
	}
	failover := func(volume string) {
		t.Helper()
		first, other := at(volume)
		if out, err := p.Order(t.Context(), first, "failover", volume); err != nil {
			t.Fatalf("%s: %v\n%s", volume, err, out)
		}
		if now, _ := at(volume); now != other {
			t.Errorf("%s was handed over, and %s is primary", volume, now.Name)
		}
	}
	first, _ := at("b")
	for volume, addr := range map[string]string{"a": p.BackendAddr, "b": addr2} {
		at(volume)
		if v, err := first.Status(t.Context(), volume); err != nil || v.Replica.Arbiter != addr || v.Backend != addr {
			t.Errorf("%s: arbiter %q, backend %q, want %s: %v", volume, v.Replica.Arbiter, v.Backend, addr, err)
		}
	}
	second.end(t, syscall.SIGKILL)
	failover("a")
	// What is in sync needs no arbiter to go on.
	c, err := load.Dial(t.Context(), first.Socket, "b")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.WriteAt(bytes.Repeat([]byte{7}, 4096), 0, true); err != nil {
		t.Errorf("a write without its backend: %v", err)
	}
	second = launch()
	failover("b")
}

// TestAbortLeavesThePeerBehind: once a volume is called off, the arbiter would
// not grant it to the other node either.
func TestAbortLeavesThePeerBehind(t *testing.T) {
	s := newTwoFrontends(t, 4*mib, pair.Config{})
	first, other := s.primary()
	if v, err := s.Backend.Status(t.Context(), "vol"); err != nil || v.Replica == nil || !v.Replica.InSync {
		t.Fatalf("before: %+v %v", v.Replica, err)
	}
	s.client.Close()
	s.must(s.Order(t.Context(), first, "abort", "vol"))
	if v, err := s.Backend.Status(t.Context(), "vol"); err != nil || v.Replica == nil || v.Replica.InSync || v.Replica.Peer != first.Name {
		t.Errorf("after: %+v %v", v.Replica, err)
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		v, err := other.Status(t.Context(), "vol")
		if err == nil && v.Phase == api.PhaseAborted {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the other node: %s %v", v.Phase, err)
		}
	}
}
