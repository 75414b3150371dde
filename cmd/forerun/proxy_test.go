package main

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"forerun/api"
	"forerun/lab/load"
	"forerun/lab/oracle"
)

// TestProxy runs the proxy before two servers of one file, kills one and stops
// the other under a load that checks every byte, and asks for the status.
func TestProxy(t *testing.T) {
	need(t, "nbdkit")
	const seed, size = 21, 8 << 20
	dir, err := os.MkdirTemp("", "proxy") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	at := func(n string) string { return filepath.Join(dir, n) }
	if err := oracle.WriteBase(at("disk"), seed, size); err != nil {
		t.Fatal(err)
	}
	server := func(sock string) *proc {
		os.Remove(at(sock))
		p := start(t, at(sock+".log"), "nbdkit", "-f", "-U", at(sock), "file", at("disk"))
		t.Cleanup(func() { p.end(t, syscall.SIGKILL) })
		return p
	}
	greets := func(sock string) bool {
		c, err := net.Dial("unix", at(sock))
		if err == nil {
			_, err = c.Read(make([]byte, 1))
			c.Close()
		}
		return err == nil
	}
	a, b := server("a"), server("b")
	s := &site{t: t, dir: dir}
	s.await(a, func() bool { return greets("a") })
	s.await(b, func() bool { return greets("b") })
	proxy := start(t, at("proxy.log"), binary, "proxy", "--export", "nbd+unix:///?socket="+at("s"), "--state", at("state"),
		"--to", "nbd+unix:///disk?socket="+at("a"), "--to", "nbd+unix:///disk?socket="+at("b"))
	t.Cleanup(func() {
		proxy.end(t, syscall.SIGTERM)
		if t.Failed() {
			log, _ := os.ReadFile(at("proxy.log"))
			t.Logf("%s", tail(log))
		}
	})
	s.await(proxy, func() bool { return greets("s") })

	c, err := load.Dial(t.Context(), at("s"), "disk")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	h := oracle.New(seed, size)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	loaded := make(chan error, 1)
	go func() {
		_, err := load.Run(ctx, c, h, load.Config{Seed: seed})
		loaded <- err
	}()
	status := func() api.Volume {
		return decode[api.Volume](t, output(t, binary, "status", "--state", at("state"), "--volume", "disk", "--json"))
	}
	serves := func(name string) func() bool {
		return func() bool { return strings.HasSuffix(status().Failover.Target, at(name)) }
	}
	s.await(proxy, serves("a"))
	time.Sleep(200 * time.Millisecond)
	a.end(t, syscall.SIGKILL)
	s.await(proxy, serves("b"))
	a = server("a")
	s.await(a, func() bool { return greets("a") })
	time.Sleep(200 * time.Millisecond)
	_ = b.cmd.Process.Signal(syscall.SIGSTOP)
	s.await(proxy, serves("a"))
	b.end(t, syscall.SIGKILL) // it knows of no fence
	time.Sleep(200 * time.Millisecond)
	stop()
	if err := <-loaded; err != nil {
		t.Fatal(err)
	}
	if err := h.Verify(c); err != nil {
		t.Fatal(err)
	}
	v := status()
	if v.Role != api.RoleProxy || v.SizeBytes != size || v.Failover.Moves < 3 || v.Failover.Stalls < 1 || v.Waiting != "" || v.Clients == 0 {
		t.Errorf("%+v %+v", v, v.Failover)
	}
	text := output(t, binary, "status", "--state", at("state"))
	for _, want := range []string{"disk: served through nbd+unix:///disk?socket=" + at("a"), "serving", "failed", "moves"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in\n%s", want, text)
		}
	}
	out, err := exec.Command(binary, "abort", "--state", at("state"), "--volume", "disk").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "this daemon has nothing to call off") {
		t.Errorf("a proxy was told to abort: %v\n%s", err, out)
	}
}
