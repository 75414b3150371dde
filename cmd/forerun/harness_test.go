package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"forerun/api"
	"forerun/api/client"
)

// binary is the program under test, built once.
var binary string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "forerun-e2e")
	if err != nil {
		panic(err)
	}
	binary = filepath.Join(dir, "forerun")
	build := exec.Command("go", "build", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "%s%v\n", out, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// need skips the test, aloud, when a peer is not installed.
func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s is not installed; make setup installs it", p)
		}
	}
}

// output runs a program that must succeed and returns what it printed.
func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// site is a pair of daemons in a directory of its own.
type site struct {
	t        *testing.T
	dir      string
	addr     string // of the backend
	sock     string // of the export
	backend  *proc
	frontend *proc

	backendFlags []string // more of them, for startBackend
}

type proc struct {
	cmd  *exec.Cmd
	log  string
	done chan error
}

func start(t *testing.T, log string, name string, args ...string) *proc {
	t.Helper()
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := &proc{cmd: exec.Command(name, args...), log: log, done: make(chan error, 1)}
	p.cmd.Stdout, p.cmd.Stderr = f, f
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.done <- p.cmd.Wait() }()
	return p
}

// end sends a signal and waits; a clean daemon answers SIGTERM with success.
func (p *proc) end(t *testing.T, sig syscall.Signal) {
	t.Helper()
	_ = p.cmd.Process.Signal(sig)
	select {
	case err := <-p.done:
		p.done <- err
		if sig == syscall.SIGTERM && err != nil {
			log, _ := os.ReadFile(p.log)
			t.Errorf("ended with %v\n%s", err, tail(log))
		}
	case <-time.After(30 * time.Second):
		_ = p.cmd.Process.Signal(syscall.SIGQUIT)
		<-p.done
		log, _ := os.ReadFile(p.log)
		t.Fatalf("did not end within 30 s of signal %v\n%s", sig, log)
	}
}

func tail(b []byte) []byte { return b[max(0, len(b)-4000):] }

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{t: t, dir: t.TempDir(), addr: freePort(t)}
	s.sock = filepath.Join(s.dir, "nbd.sock")
	output(t, binary, "pki", "init", "--dir", s.path("pki"))
	output(t, binary, "pki", "issue", "--dir", s.path("pki"), "--role", "backend", "--name", "old", "--host", "localhost,127.0.0.1")
	output(t, binary, "pki", "issue", "--dir", s.path("pki"), "--role", "frontend", "--name", "new", "--host", "localhost,127.0.0.1")
	t.Cleanup(func() {
		for _, p := range []*proc{s.frontend, s.backend} {
			if p != nil {
				p.end(t, syscall.SIGKILL)
			}
		}
		if t.Failed() {
			for _, n := range []string{"backend.log", "frontend.log"} {
				b, _ := os.ReadFile(s.path(n))
				t.Logf("%s:\n%s", n, tail(b))
			}
		}
	})
	return s
}

func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

func (s *site) uri(volume string) string {
	return "nbd+unix:///" + volume + "?socket=" + s.sock
}

func (s *site) startBackend(volumes ...string) {
	s.t.Helper()
	args := []string{"backend", "--pki", s.path("pki"), "--name", "old", "--state", s.path("bstate"), "--listen", s.addr}
	for _, v := range volumes {
		if strings.HasPrefix(v, "--") { // a flag
			args = append(args, v)
			continue
		}
		args = append(args, "--volume", v)
	}
	s.backend = start(s.t, s.path("backend.log"), binary, append(args, s.backendFlags...)...)
	s.await(s.backend, func() bool {
		_, err := client.New(s.path("bstate")).Node(context.Background())
		return err == nil
	})
}

func (s *site) startFrontend(volumes []string, more ...string) {
	s.t.Helper()
	args := []string{"frontend", "--pki", s.path("pki"), "--name", "new", "--state", s.path("fstate"), "--backend", s.addr,
		"--export", "nbd+unix:///?socket=" + s.sock}
	for _, v := range volumes {
		args = append(args, "--volume", v)
	}
	s.frontend = start(s.t, s.path("frontend.log"), binary, append(args, more...)...)
	s.await(s.frontend, func() bool {
		c, err := net.Dial("unix", s.sock)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// await polls until ok, and fails when the process ends first or it takes too long.
func (s *site) await(p *proc, ok func() bool) {
	s.t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
		select {
		case err := <-p.done:
			p.done <- err
			b, _ := os.ReadFile(p.log)
			s.t.Fatalf("%v\n%s", err, tail(b))
		default:
		}
	}
	s.t.Fatal("not ready after a minute")
}

func (s *site) status(volume string) api.Volume {
	s.t.Helper()
	v, err := client.New(s.path("fstate")).Volume(context.Background(), volume)
	if err != nil {
		s.t.Fatal(err)
	}
	return v
}

func (s *site) awaitFilled(volume string) api.Volume {
	s.t.Helper()
	s.await(s.frontend, func() bool { return s.status(volume).Chunks.Absent == 0 })
	return s.status(volume)
}

// disk writes a raw image: runs of noise, text, zeros and holes, by seed.
func (s *site) disk(name string, size int64, seed uint64) string {
	s.t.Helper()
	p := s.path(name)
	f, err := os.Create(p)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		s.t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(seed, 9))
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size; {
		n := min(4096*(1+r.Int64N(256)), size-off)
		b := buf[:n]
		switch r.IntN(5) {
		case 0, 1:
			fillNoise(r, b)
		case 2:
			copy(b, bytes.Repeat([]byte(fmt.Sprintf("line %d of a text that compresses well\n", off)), int(n)/30+1))
		case 3:
			clear(b)
		case 4:
			off += n
			continue
		}
		if _, err := f.WriteAt(b, off); err != nil {
			s.t.Fatal(err)
		}
		off += n
	}
	return p
}

func fillNoise(r *rand.Rand, b []byte) {
	for i := 0; i+8 <= len(b); i += 8 {
		x := r.Uint64()
		for k := range 8 {
			b[i+k] = byte(x >> (8 * k))
		}
	}
}

// same fails unless two files hold the same bytes.
func same(t *testing.T, a, b string) {
	t.Helper()
	if out, err := exec.Command("cmp", a, b).CombinedOutput(); err != nil {
		t.Fatalf("%s", out)
	}
}

func sum(t *testing.T, p string) string {
	t.Helper()
	return strings.Fields(output(t, "sha256sum", p))[0]
}

// peakMemory is a process's VmHWM in bytes.
func peakMemory(t *testing.T, p *proc) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range strings.Split(string(b), "\n") {
		if f := strings.Fields(l); len(f) == 3 && f[0] == "VmHWM:" {
			n, _ := strconv.ParseInt(f[1], 10, 64)
			return n << 10
		}
	}
	t.Fatal("no VmHWM")
	return 0
}

// relay passes TCP connections on and can hold everything back, as a cut link does.
type relay struct {
	ln   net.Listener
	to   string
	mu   sync.Mutex
	cond *sync.Cond
	held bool
}

func newRelay(t *testing.T, to string) *relay {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{ln: ln, to: to}
	r.cond = sync.NewCond(&r.mu)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go r.pass(c)
		}
	}()
	t.Cleanup(func() { r.hold(false); ln.Close() })
	return r
}

func (r *relay) pass(a net.Conn) {
	b, err := net.Dial("tcp", r.to)
	if err != nil {
		a.Close()
		return
	}
	one := func(dst, src net.Conn) {
		buf := make([]byte, 64<<10)
		for {
			n, err := src.Read(buf)
			r.mu.Lock()
			for r.held {
				r.cond.Wait()
			}
			r.mu.Unlock()
			if n > 0 {
				if _, werr := dst.Write(buf[:n]); werr != nil {
					err = werr
				}
			}
			if err != nil {
				if !errors.Is(err, io.EOF) {
					src.Close()
				}
				dst.Close()
				return
			}
		}
	}
	go one(a, b)
	one(b, a)
}

func (r *relay) hold(on bool) {
	r.mu.Lock()
	r.held = on
	r.mu.Unlock()
	r.cond.Broadcast()
}

// decode reads JSON that a command printed.
func decode[T any](t *testing.T, s string) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(s), &v); err != nil {
		t.Fatalf("%v in %s", err, s)
	}
	return v
}
