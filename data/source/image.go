package source

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
	"forerun/data/source/nbd"
	"forerun/data/source/raw"

	"golang.org/x/sys/unix"
)

const (
	socketName = "nbd.sock"
	// firstStart bounds how long qemu-nbd may take to open the image.
	firstStart   = 60 * time.Second
	firstRestart = 100 * time.Millisecond
	lastRestart  = 5 * time.Second
	// steadyRun is how long qemu-nbd must run for the back-off to begin anew.
	steadyRun = 10 * time.Second
	// askNicely is how long qemu-nbd has between SIGTERM and SIGKILL: it writes
	// the metadata of a writable image on its way out.
	askNicely = 10 * time.Second
	// spare connections that the server accepts besides the client's: a lost
	// one may not be cleared away there when its successor comes.
	spare = 8
)

// Image is a disk image served by a qemu-nbd of our own. It implements
// block.Device.
type Image struct {
	*nbd.Client
	claim *raw.Claim
	srv   *server
	once  sync.Once
	err   error
}

var _ block.Device = (*Image)(nil)

func openImage(ctx context.Context, path, format string, o Options) (*Image, error) {
	const op = "source.open"
	bin := o.QEMUNBD
	if bin == "" {
		found, err := exec.LookPath("qemu-nbd")
		if err != nil {
			return nil, block.E(op, path, block.KindUnsupported, errNoQEMU)
		}
		bin = found
	}
	// An absolute path is never taken for a protocol ("nbd:…") or options ("json:…").
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, block.E(op, path, 0, err)
	}
	write := o.WriteImages && !o.ReadOnly
	claim, err := raw.NewClaim(abs, raw.ClaimOptions{ReadOnly: !write, Writer: write, Log: o.Log})
	if err != nil {
		return nil, err
	}
	if claim.ReadOnly() {
		write = false
	}
	conns := o.Connections
	if conns == 0 {
		conns = nbd.DefaultConnections
	}
	srv, err := newServer(bin, abs, format, write, conns, o)
	if err != nil {
		_ = claim.Close() // the error to tell is the first one
		return nil, err
	}
	c, err := srv.connect(ctx, nbd.Target{
		URI:     path + "?format=" + format, // what the user knows it as
		Network: "unix", Address: srv.socket(),
	}, nbd.Options{
		Connections: conns, ReadOnly: !write, ReconnectTimeout: o.ReconnectTimeout, Log: o.Log,
		OnState: o.OnState,
		ID:      claim.ID() + ":" + format,
	})
	if err == nil {
		return &Image{Client: c, claim: claim, srv: srv}, nil
	}
	srv.stop()
	_ = claim.Close() // the error to tell is the first one
	return nil, err
}

// Restarts is how often qemu-nbd had to be started again.
func (m *Image) Restarts() int64 { return m.srv.restarts.Load() }

// Close waits for calls under way, ends qemu-nbd and gives the image back.
func (m *Image) Close() error {
	m.once.Do(func() {
		m.err = m.Client.Close()
		m.srv.stop()
		m.err = errors.Join(m.err, m.claim.Close())
	})
	return m.err
}

// server keeps a qemu-nbd running.
type server struct {
	path string
	argv []string
	dir  string // private, holds the socket
	log  *slog.Logger

	cancel   context.CancelFunc
	ended    chan struct{} // supervise has returned
	restarts atomic.Int64
	ready    atomic.Bool // it has served once: from now on it is restarted

	mu   sync.Mutex
	last string // what the last one said before it ended
}

func newServer(bin, path, format string, write bool, conns int, o Options) (*server, error) {
	dir, err := privateDir(o.StateDir)
	if err != nil {
		return nil, block.E("source.open", path, 0, fmt.Errorf("a directory for the socket of qemu-nbd: %w", err))
	}
	s := &server{path: path, dir: dir, log: o.Log, ended: make(chan struct{})}
	s.argv = []string{bin, "--persistent", "--shared=" + strconv.Itoa(conns+spare), "--format=" + format, "--socket=" + s.socket()}
	// The page cache would keep a second copy of what is read once.
	if direct(path) {
		s.argv = append(s.argv, "--cache=none", "--aio=native")
	} else {
		s.argv = append(s.argv, "--cache=writeback", "--aio=threads")
	}
	if write {
		s.argv = append(s.argv, "--discard=unmap")
	} else {
		s.argv = append(s.argv, "--read-only")
	}
	s.argv = append(s.argv, "--", path)
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	go s.supervise(ctx)
	return s, nil
}

// privateDir makes a directory that only we may enter, in dir if the path of a
// socket in it is short enough for the system.
func privateDir(dir string) (string, error) {
	const maxPath = 107 // sockaddr_un(7)
	if dir == "" || len(dir)+len("/forerun-source-0123456789/"+socketName) > maxPath {
		dir = os.TempDir()
	}
	return os.MkdirTemp(dir, "forerun-source-")
}

// direct says whether the file can be read around the page cache.
func direct(path string) bool {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	_ = unix.Close(fd) // it was only a question
	return true
}

func (s *server) socket() string { return filepath.Join(s.dir, socketName) }

// connect waits until qemu-nbd listens and connects to it. When qemu-nbd ends
// before, its own words are the error.
func (s *server) connect(ctx context.Context, t nbd.Target, o nbd.Options) (*nbd.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, firstStart)
	defer cancel()
	for wait := time.Millisecond; ; wait = min(wait*2, 50*time.Millisecond) {
		c, err := nbd.Open(ctx, t, o)
		if err == nil {
			s.ready.Store(true)
			return c, nil
		}
		if k := block.KindOf(err); k != block.KindUnavailable {
			return nil, err
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-s.ended:
			timer.Stop()
			s.mu.Lock()
			defer s.mu.Unlock()
			return nil, block.E("source.open", t.URI, block.KindInvalid, fmt.Errorf("qemu-nbd cannot open the image; it says: %s", s.last))
		case <-ctx.Done():
			timer.Stop()
			return nil, block.E("source.open", t.URI, block.KindCanceled, fmt.Errorf("qemu-nbd did not begin to serve: %w", ctx.Err()))
		}
	}
}

// stop ends qemu-nbd and waits for it.
func (s *server) stop() {
	s.cancel()
	<-s.ended
	if err := os.RemoveAll(s.dir); err != nil {
		s.log.Warn("the directory of a socket stays behind", "dir", s.dir, "err", err)
	}
}

// supervise runs qemu-nbd until ctx ends, or until it fails before it served.
func (s *server) supervise(ctx context.Context) {
	defer close(s.ended)
	// PDEATHSIG is sent when the thread that forked ends, not the process.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for wait := firstRestart; ; {
		began := time.Now()
		said, err := s.run(ctx)
		if said == "" {
			said = fmt.Sprint(err)
		}
		s.mu.Lock()
		s.last = said
		s.mu.Unlock()
		if ctx.Err() != nil || !s.ready.Load() {
			return
		}
		s.log.Warn("qemu-nbd ended and is started again", "path", s.path, "err", err, "says", said)
		s.restarts.Add(1)
		if time.Since(began) > steadyRun {
			wait = firstRestart
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
		wait = min(wait*2, lastRestart)
	}
}

// run starts qemu-nbd once and waits for its end. It returns what it said.
func (s *server) run(ctx context.Context) (string, error) {
	// One left by a killed predecessor would answer connects with "refused".
	if err := os.Remove(s.socket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	said := &tail{log: s.log, path: s.path}
	cmd := exec.CommandContext(ctx, s.argv[0], s.argv[1:]...)
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = askNicely
	cmd.Stderr = said
	cmd.Dir = "/" // no file system is kept from being unmounted
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL, Setpgid: true}
	err := cmd.Run()
	if err == nil {
		err = errors.New("it ended by itself")
	}
	return said.String(), err
}

// tail logs the lines a child writes and keeps the last ones. exec.Cmd writes
// to it from one goroutine, and String is called after that ended.
type tail struct {
	log  *slog.Logger
	path string
	b    []byte
}

const tailLen = 2048

func (t *tail) Write(p []byte) (int, error) {
	for line := range strings.Lines(string(p)) {
		if line = strings.TrimSpace(line); line != "" {
			t.log.Warn("qemu-nbd says", "path", t.path, "line", line)
		}
	}
	t.b = append(t.b, p...)
	if n := len(t.b) - tailLen; n > 0 {
		t.b = append(t.b[:0], t.b[n:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	return strings.Join(strings.Fields(string(t.b)), " ")
}
