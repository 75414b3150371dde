package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"forerun/api"
	"forerun/api/client"
	"forerun/lab/load"
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
// of one, from a first start without it to its loss, concerns its volume alone.
func TestTwoBackends(t *testing.T) {
	need(t, "nbdcopy", "cmp")
	s := newTwoBackends(t)
	a, b := s.disk("a.raw", 16*mib, 21), s.disk("b.raw", 16*mib, 22)
	volumes := []string{"a", "b=" + s.addr2}
	s.startBackend("a=" + a)
	s.startFrontend(volumes, "--fill-paused", "--checkpoint-interval", "1h")
	s.copied("a", a)
	if v := s.status("b"); v.Backend != s.addr2 || !strings.Contains(v.Waiting, s.addr2) || v.WAN.Connected {
		t.Errorf("before its backend was there: %q %q %+v", v.Backend, v.Waiting, v.WAN)
	}
	if v := s.status("a"); v.Backend != s.addr || v.Waiting != "" || !v.WAN.Connected {
		t.Errorf("beside a backend that is not there: %q %q %+v", v.Backend, v.Waiting, v.WAN)
	}
	s.startSecond("b=" + b)
	s.await(s.frontend, func() bool { return s.status("b").SizeBytes == 16*mib && s.status("b").WAN.Connected })
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
	s.copied("a", a)
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
