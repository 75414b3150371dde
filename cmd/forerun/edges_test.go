package main

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"forerun/api"
	"forerun/api/client"
)

// TestOneVolumeDoesNotHoldBackAnother: a volume that the backend does not have
// (yet, or any more) is that volume's problem alone.
func TestOneVolumeDoesNotHoldBackAnother(t *testing.T) {
	need(t, "nbdcopy")
	s := newSite(t)
	a, b := s.disk("a.raw", 8*mib, 1), s.disk("b.raw", 8*mib, 2)
	s.startBackend("a="+a, "b="+b)
	s.startFrontend([]string{"a"})
	s.awaitFilled("a")
	s.frontend.end(t, syscall.SIGTERM)
	s.backend.end(t, syscall.SIGTERM)
	// With no backend, a new volume waits, and what is here is served.
	s.startFrontend([]string{"b", "a"})
	output(t, "nbdcopy", s.uri("a"), s.path("a.out"))
	same(t, a, s.path("a.out"))
	if v := s.status("b"); v.Phase != api.PhaseStarting || v.Waiting == "" {
		t.Errorf("%s, waiting %q", v.Phase, v.Waiting)
	}
	// With a backend that has the one and not the other, both go on.
	s.startBackend("b=" + b)
	s.await(s.frontend, func() bool { return s.status("b").Phase == api.PhaseFilled })
	output(t, "nbdcopy", s.uri("b"), s.path("b.out"))
	same(t, b, s.path("b.out"))
	output(t, "nbdcopy", s.uri("a"), s.path("a.out"))
	s.frontend.end(t, syscall.SIGTERM)
}

// TestMistakesAreToldAtOnce: what can be seen from the command line alone does
// not wait for the backend.
func TestMistakesAreToldAtOnce(t *testing.T) {
	s := newSite(t)
	front := []string{"frontend", "--pki", s.path("pki"), "--name", "new", "--state", s.path("f"), "--backend", "127.0.0.1:1", "--volume", "v"}
	for _, c := range []struct {
		args []string
		want string
	}{
		{append(front, "--export", "tcp://x"), "NBD URI"},
		{append(front, "--export", "nbd+unix:///"), "socket"},
		{append(front, "--export", "nbd+unix:///?socket=/"+strings.Repeat("x", 120)), "107"},
		{append(front, "--export", "nbd://localhost/v"), "names no export"},
		{append(front, "--export", "nbd://localhost", "--state", ""), "--state"},
		{append(front, "--export", "nbd://localhost", "--volume", "w=/srv/w.raw"), "NAME=HOST:PORT"},
		{append(front, "--export", "nbd://localhost", "--backend", ""), "--volume v=HOST:PORT"},
		{append(front, "--export", "nbd://localhost", "--volume", "w=127.0.0.1:2", "--group", "db=v,w"), "a group of their own"},
		{[]string{"backend", "--pki", s.path("pki"), "--name", "old", "--state", s.path("b"), "--listen", "", "--volume", "v=x"}, "--listen"},
		{[]string{"backend", "--pki", s.path("pki"), "--name", "old", "--state", s.path("b"), "--listen", ":0", "--volume", "..=x"}, ".."},
		{[]string{"pki", "issue", "--dir", s.path("pki"), "--role", "backend", "--name", "x", "--host", ""}, "--host"},
		{[]string{"pki", "issue", "--dir", s.path("pki"), "--role", "backend", "--name", "x", "--host", "a.example:7410"}, "without a port"},
		{[]string{"fill", "stop"}, "stop"},
		{[]string{"pki", "issues"}, "issues"},
		{[]string{"status", "--state", s.dir, "--watch", "--interval", "0"}, "--interval"},
	} {
		done := make(chan struct{})
		cmd := exec.Command(binary, c.args...)
		go func() {
			select {
			case <-done:
			case <-time.After(30 * time.Second):
				_ = cmd.Process.Kill()
			}
		}()
		out, err := cmd.CombinedOutput()
		close(done)
		if err == nil || !strings.Contains(string(out), c.want) || strings.Contains(string(out), "panic") {
			t.Errorf("%q: %v\n%s", c.args, err, out)
		}
	}
}

// TestLostSourceIsShown: a backend whose source's server is away says so, and
// the workload waits for it rather than fail.
func TestLostSourceIsShown(t *testing.T) {
	need(t, "nbdkit", "nbdcopy")
	s := newSite(t)
	src := s.disk("src.raw", 8*mib, 4)
	sock := s.path("kit.sock")
	kit := func() *proc {
		_ = os.Remove(sock)
		p := start(t, s.path("kit.log"), "nbdkit", "-f", "-U", sock, "-r", "file", src)
		s.await(p, func() bool { _, err := os.Stat(sock); return err == nil })
		return p
	}
	waiting := func() string {
		v, err := client.New(s.path("bstate")).Volume(t.Context(), "v")
		if err != nil {
			t.Fatal(err)
		}
		return v.Waiting
	}
	p := kit()
	s.startBackend("v=nbd+unix:///?socket=" + sock)
	s.startFrontend([]string{"v"}, "--fill-paused", "--policy", "isolated")
	if w := waiting(); w != "" {
		t.Errorf("waiting %q", w)
	}
	p.end(t, syscall.SIGKILL)
	s.await(s.backend, func() bool { return strings.Contains(waiting(), "the source does not answer") })
	s.await(s.frontend, func() bool {
		return strings.Contains(s.status("v").Waiting, "the source does not answer the backend "+s.addr)
	})
	copying := start(t, s.path("copy.log"), "nbdcopy", s.uri("v"), s.path("out.raw"))
	p = kit()
	defer p.end(t, syscall.SIGKILL)
	s.await(s.backend, func() bool { return waiting() == "" })
	if err := <-copying.done; err != nil {
		t.Fatal(err)
	}
	same(t, src, s.path("out.raw"))
	s.await(s.frontend, func() bool { return s.status("v").Waiting == "" })
}

// TestNativeDiskIsMissing: what one volume was cut over to is not there at a
// start. The other volume is served, and that one as soon as its disk is.
func TestNativeDiskIsMissing(t *testing.T) {
	need(t, "nbdcopy", "nbdinfo")
	s := newSite(t)
	a, b := s.disk("a.raw", 8*mib, 31), s.disk("b.raw", 8*mib, 32)
	volumes, native, away := []string{"a", "b"}, s.path("native.raw"), s.path("away.raw")
	s.startBackend("a="+a, "b="+b)
	s.startFrontend(volumes)
	s.awaitFilled("a")
	output(t, binary, "cutover", "--state", s.path("fstate"), "--volume", "a", "--to", native, "--wait")
	s.frontend.end(t, syscall.SIGTERM)
	if err := os.Rename(native, away); err != nil {
		t.Fatal(err)
	}
	s.startFrontend(volumes)
	output(t, "nbdcopy", s.uri("b"), s.path("b.out"))
	same(t, b, s.path("b.out"))
	v := s.status("a")
	if v.Phase != api.PhaseSwitched || v.Primary != api.PrimaryTarget || !strings.Contains(v.Waiting, native) || v.SizeBytes != 8*mib {
		t.Errorf("%s, primary %s, waiting %q", v.Phase, v.Primary, v.Waiting)
	}
	if out, err := exec.Command("nbdinfo", s.uri("a")).CombinedOutput(); err == nil {
		t.Errorf("a volume without its disk is served:\n%s", out)
	}
	if out, err := exec.Command(binary, "fill", "pause", "--state", s.path("fstate"), "--volume", "a").CombinedOutput(); err == nil || !strings.Contains(string(out), native) {
		t.Errorf("%v\n%s", err, out)
	}
	// Another file in its place is not it.
	if err := os.WriteFile(native, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	s.await(s.frontend, func() bool { return strings.Contains(s.status("a").Waiting, "4096 bytes") })
	if err := os.Rename(away, native); err != nil {
		t.Fatal(err)
	}
	s.await(s.frontend, func() bool { return s.status("a").Waiting == "" })
	output(t, "nbdcopy", s.uri("a"), s.path("a.out"))
	same(t, a, s.path("a.out"))
	s.frontend.end(t, syscall.SIGTERM)
	// Alone it is not served either, nor does the daemon give up.
	if err := os.Rename(native, away); err != nil {
		t.Fatal(err)
	}
	s.frontend = start(t, s.path("frontend.log"), binary, "frontend", "--pki", s.path("pki"), "--name", "new", "--state", s.path("fstate"),
		"--backend", s.addr, "--export", "nbd+unix:///?socket="+s.sock, "--volume", "a")
	s.await(s.frontend, func() bool {
		v, err := client.New(s.path("fstate")).Volume(t.Context(), "a")
		return err == nil && strings.Contains(v.Waiting, native)
	})
	if err := os.Rename(away, native); err != nil {
		t.Fatal(err)
	}
	s.await(s.frontend, func() bool { return exec.Command("nbdinfo", s.uri("a")).Run() == nil })
	s.frontend.end(t, syscall.SIGTERM)
}
