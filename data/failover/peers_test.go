package failover_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"forerun/block"
	export "forerun/data/export/nbd"
	"forerun/data/failover"
	"forerun/data/source/nbd"
	"forerun/lab/load"
	"forerun/lab/oracle"
)

// server is a program that serves one file over NBD on a unix socket.
type server struct {
	t    *testing.T
	argv []string
	sock string
	cmd  *exec.Cmd
}

func newServer(t *testing.T, sock string, argv ...string) *server {
	t.Helper()
	if _, err := exec.LookPath(argv[0]); err != nil {
		t.Skipf("%s is not installed; make setup installs it", argv[0])
	}
	s := &server{t: t, argv: argv, sock: sock}
	s.start()
	t.Cleanup(s.kill)
	return s
}

// start returns when the server has greeted: one that was killed still takes
// connections while it dies.
func (s *server) start() {
	s.t.Helper()
	os.Remove(s.sock)
	s.cmd = exec.Command(s.argv[0], s.argv[1:]...)
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		c, err := net.Dial("unix", s.sock)
		if err == nil {
			_, err = c.Read(make([]byte, 1))
			c.Close()
		}
		if err == nil {
			return
		}
		if time.Now().After(end) {
			s.t.Fatal(err)
		}
	}
}

func (s *server) kill() {
	if s.cmd != nil {
		s.cmd.Process.Kill()
		s.cmd.Wait()
		s.cmd = nil
	}
}

func (s *server) target(t *testing.T) failover.Target {
	t.Helper()
	tg, err := nbd.ParseURI("nbd+unix:///d?socket=" + s.sock)
	if err != nil {
		t.Fatal(err)
	}
	return failover.Target{Name: s.sock, Open: func(ctx context.Context) (failover.Door, error) {
		c, err := nbd.Open(ctx, tg, nbd.Options{KeepsWrites: true, ReconnectTimeout: time.Millisecond})
		if err != nil {
			return nil, err
		}
		return c, nil
	}}
}

// one is an export with one device.
type one struct{ dev block.Device }

func (o one) Lookup(string) (block.Device, string, error) { return o.dev, "", nil }
func (o one) List() []string                              { return []string{"d"} }

// TestServersDieUnderLoad kills and stops qemu-nbd and nbdkit, which serve one
// file, while a client writes and checks every byte through the device. The
// client sees no error, and each byte is the newest that was acknowledged. A
// server that was stopped is killed before it goes on: these two know of no fence.
func TestServersDieUnderLoad(t *testing.T) {
	const seed, size = 11, 16 << 20
	dir, err := os.MkdirTemp("", "failover") // a short path for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	disk := filepath.Join(dir, "disk")
	if err := oracle.WriteBase(disk, seed, size); err != nil {
		t.Fatal(err)
	}
	a := newServer(t, filepath.Join(dir, "a"), "qemu-nbd", "-t", "-e", "16", "-x", "d", "-k", filepath.Join(dir, "a"), "--discard=unmap",
		"--image-opts", "driver=raw,file.driver=file,file.locking=off,file.filename="+disk)
	b := newServer(t, filepath.Join(dir, "b"), "nbdkit", "-f", "--exit-with-parent", "-U", filepath.Join(dir, "b"), "file", disk)
	servers := map[string]*server{a.sock: a, b.sock: b}
	dev, err := failover.Open(t.Context(), failover.Options{Volume: "d", Targets: []failover.Target{a.target(t), b.target(t)}})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	srv := export.NewServer(export.Options{Exports: one{dev}})
	sock := filepath.Join(dir, "s")
	ln, err := srv.Listen("nbd+unix:///?socket=" + sock)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ctx, ln) }()
	defer func() { stop(); <-served }()

	c, err := load.Dial(t.Context(), sock, "d")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	h := oracle.New(seed, size)
	loading, done := context.WithCancel(t.Context())
	defer done()
	type result struct {
		st  load.Stats
		err error
	}
	loaded := make(chan result, 1)
	go func() {
		st, err := load.Run(loading, c, h, load.Config{Seed: seed, Depth: 16})
		loaded <- result{st, err}
	}()
	rnd := rand.New(rand.NewPCG(seed, 1))
	rounds := 6
	if testing.Short() {
		rounds = 4
	}
	for i := range rounds {
		time.Sleep(time.Duration(100+rnd.IntN(200)) * time.Millisecond)
		before := dev.Status()
		s := servers[before.Target]
		if s == nil {
			t.Fatalf("nobody serves: %+v", before)
		}
		began := time.Now()
		hang := i%3 == 1
		if hang {
			s.cmd.Process.Signal(syscall.SIGSTOP)
		} else {
			s.kill()
		}
		for moved(dev, before.Moves) != nil {
			if time.Since(began) > 30*time.Second {
				t.Fatalf("hang %v: %v", hang, moved(dev, before.Moves))
			}
			time.Sleep(5 * time.Millisecond)
		}
		t.Logf("%s, hang %v: moved after %v", filepath.Base(s.argv[0]), hang, time.Since(began).Round(time.Millisecond))
		s.kill()
		s.start()
	}
	done()
	r := <-loaded
	if r.err != nil {
		t.Fatal(r.err)
	}
	if err := h.Verify(c); err != nil {
		t.Fatal(err)
	}
	st := dev.Status()
	t.Logf("%+v %+v moves %d repeated %d longest %v", r.st, h.Stats(), st.Moves, st.Repeated, st.Longest)
	if st.Moves < int64(rounds+1) || r.st.Writes == 0 || r.st.Reads == 0 || r.st.Flushes == 0 {
		t.Errorf("the test did not test: %+v %+v", st, r.st)
	}
}

func moved(dev *failover.Device, moves int64) error {
	if st := dev.Status(); st.Moves == moves || st.Target == "" {
		return fmt.Errorf("nobody else serves: %+v", st)
	}
	return nil
}
