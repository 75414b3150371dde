package pair

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"forerun/lab/load"
	"forerun/lab/rig"
)

// notes is a Report that fails the test for each bar that is missed.
type notes struct{ *testing.T }

func (n notes) Say(format string, args ...any)              { n.Logf(format, args...) }
func (n notes) Measure(name string, v float64, unit string) { n.Logf("%s: %g %s", name, v, unit) }
func (n notes) AtMost(name string, v, bar float64, unit string) {
	n.Check(name, v <= bar, strconv.FormatFloat(v, 'g', 6, 64)+" "+unit)
}
func (n notes) AtLeast(name string, v, bar float64, unit string) {
	n.Check(name, v >= bar, strconv.FormatFloat(v, 'g', 6, 64)+" "+unit)
}
func (n notes) Check(name string, ok bool, note string) {
	n.Helper()
	if !ok {
		n.Errorf("%s: %s", name, note)
	} else {
		n.Logf("%s: %s", name, note)
	}
}

// TestCampaigns does each of them a little, against the real binary.
func TestCampaigns(t *testing.T) {
	if os.Getenv("FORERUN_LAB_PAIR") == "" {
		t.Skip("kills daemons for minutes; set FORERUN_LAB_PAIR=1")
	}
	bin, err := rig.Binary(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("FORERUN_BIN", bin)
	for name, f := range map[string]func(context.Context, Options, Report) error{
		"pgbench": func(ctx context.Context, o Options, r Report) error {
			return Pgbench(ctx, PgbenchOptions{Options: o}, r)
		},
		"failover": Failover,
		"both":     Both,
		"backend": func(ctx context.Context, o Options, r Report) error {
			return Backend(ctx, BackendOptions{Options: o}, r)
		},
		"lost": func(ctx context.Context, o Options, r Report) error { return Lost(ctx, LostOptions{Options: o}, r) },
		"abort": func(ctx context.Context, o Options, r Report) error {
			return Abort(ctx, AbortOptions{Options: o, Write: 4 * time.Second}, r)
		},
		"clone":  Clone,
		"return": func(ctx context.Context, o Options, r Report) error { return Back(ctx, BackOptions{Options: o}, r) },
	} {
		t.Run(name, func(t *testing.T) {
			if err := f(t.Context(), Options{Dir: t.TempDir(), Seed: 1, N: 1}, notes{t}); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestGate(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	g, err := NewGate(ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	dial := func() net.Conn {
		c, err := net.Dial("tcp", g.Addr())
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(20 * time.Second))
		return c
	}
	pass := func(c net.Conn) error {
		if _, err := c.Write([]byte("word")); err != nil {
			return err
		}
		_, err := io.ReadFull(c, make([]byte, 4))
		return err
	}
	a := dial()
	if err := pass(a); err != nil {
		t.Fatal(err)
	}
	g.Shut()
	if err := pass(a); err == nil {
		t.Error("a word went through a shut gate")
	}
	b := dial()
	if err := pass(b); err == nil {
		t.Error("a connection went through a shut gate")
	}
	g.Open()
	c := dial()
	if err := pass(c); err != nil {
		t.Error(err)
	}
	for _, held := range [][2]bool{{true, false}, {false, true}, {true, true}} {
		g.Hold(held[0], held[1])
		d := dial()
		d.SetDeadline(time.Now().Add(100 * time.Millisecond))
		if err := pass(d); err == nil {
			t.Errorf("a word went through a gate that is held: %v", held)
		}
		g.Open()
		d.SetDeadline(time.Now().Add(20 * time.Second))
		if _, err := io.ReadFull(d, make([]byte, 4)); err != nil {
			t.Errorf("a word that was held back is lost: %v", err)
		}
	}
	if err := g.Close(); err != nil {
		t.Error(err)
	}
	if g.Bytes() != 16+3*8 {
		t.Errorf("%d bytes went through", g.Bytes())
	}
}

// TestFloor writes to the floor and finds the bytes in its file, after its
// peer had them.
func TestFloor(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	addr, err := freeAddr()
	if err != nil {
		t.Fatal(err)
	}
	sock, file := filepath.Join(t.TempDir(), "s"), filepath.Join(t.TempDir(), "log")
	ends := make(chan error, 2)
	go func() { ends <- FloorPeer(ctx, addr) }()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	go func() { ends <- Floor(ctx, sock, addr, file, 1<<20) }()
	var c *load.Client
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if c, err = load.Dial(ctx, sock, "vol"); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	for i := range 20 {
		p := make([]byte, 4096)
		p[0] = byte(i)
		if err := c.WriteAt(p, int64(19-i)*4096, false); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(file)
	if err != nil || len(b) != 20*4096 || b[7*4096] != 7 {
		t.Errorf("%d bytes were appended: %v", len(b), err)
	}
	c.Close()
	stop()
	for range 2 {
		if err := <-ends; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
}

func TestRows(t *testing.T) {
	row, err := parseRow([]byte{0, 2, 0, 0, 0, 1, 'x', 0xff, 0xff, 0xff, 0xff})
	if err != nil || len(row) != 2 || row[0] != "x" || row[1] != "" {
		t.Error(row, err)
	}
	for _, b := range [][]byte{nil, {0, 1}, {0, 1, 0, 0, 0, 2, 'x'}} {
		if _, err := parseRow(b); err == nil {
			t.Errorf("%x is a row", b)
		}
	}
}

func needMounts(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("there is no /dev/fuse")
	}
	for _, p := range []string{"nbdfuse", "qemu-nbd", "mkfs.ext4", "losetup"} {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s is not installed; make setup installs it", p)
		}
	}
}

// TestMount works on a file system through the whole chain above an export,
// loses the machine that did, and finds what was synced.
func TestMount(t *testing.T) {
	needMounts(t)
	var err error
	t.Setenv("FORERUN_BIN", "/bin/true") // nothing of the product runs here
	k, e := begin(t.Context(), Options{Dir: t.TempDir(), Seed: 1}, notes{t})
	if e != nil {
		t.Fatal(e)
	}
	defer func() {
		if k.end(&err); err != nil {
			t.Error(err)
		}
	}()
	d, e := k.newFS("fs", 64<<20)
	if e != nil {
		t.Fatal(e)
	}
	n := &Node{Name: "qemu-nbd", Socket: k.path("s")}
	server, e := k.peerServer("qemu-nbd", "-f", "raw", "-t", "-e", "4", "-x", "fs", "-k", n.Socket, d.source)
	if e != nil {
		t.Fatal(e)
	}
	if e := server.Until(t.Context(), 10*time.Second, "listening", func() bool { _, err := os.Stat(n.Socket); return err == nil }); e != nil {
		t.Fatal(e)
	}
	if e := d.work(n); e != nil {
		t.Fatal(e)
	}
	for had := 0; had < 20; had, _ = d.files.synced(0) {
		time.Sleep(20 * time.Millisecond)
		select {
		case e := <-d.done:
			t.Fatal(e)
		default:
		}
	}
	had, at := d.files.synced(3)
	if at.IsZero() {
		t.Error("nobody knows when line 3 was synced")
	}
	dir := d.mount.root
	d.lose()
	if _, e := os.Stat(dir); !errors.Is(e, os.ErrNotExist) {
		t.Error("the mount left something behind:", e)
	}
	got, e := d.judgeSource()
	if all, _ := d.files.synced(0); e != nil || got < had || got > all+1 {
		t.Errorf("%d lines of %d to %d: %v", got, had, all+1, e)
	}
	// And a damaged one is found out.
	f, e := os.OpenFile(d.source, os.O_RDWR, 0)
	if e != nil {
		t.Fatal(e)
	}
	defer f.Close()
	if _, e := f.WriteAt(make([]byte, 512<<10), 8<<10); e != nil {
		t.Fatal(e)
	}
	if _, e := d.judgeSource(); e == nil {
		t.Error("a file system with a hole in it was called whole")
	}
}

// TestClean finds what a dead process left.
func TestClean(t *testing.T) {
	needMounts(t)
	dead := exec.Command("true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(mountRoot, strconv.Itoa(dead.Process.Pid))
	if err := os.MkdirAll(filepath.Join(dir, "1", "fs"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := output(t.Context(), "mount", "-t", "tmpfs", "none", filepath.Join(dir, "1", "fs")); err != nil {
		t.Fatal(err)
	}
	if err := Clean(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Error("it is still there:", err)
	}
}
