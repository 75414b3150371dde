package replica

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"forerun/block"
	"forerun/block/blocktest"
	"forerun/data/fence"
	"forerun/data/journal"
	"forerun/disk"
	"forerun/disk/disktest"
	"forerun/internal/msg"
	"forerun/lab/oracle"
	"forerun/lab/wan"
)

const worldSize = 1 << 20

// fileDevice is a stack's bottom: a file. Runs of zeros are holes.
type fileDevice struct {
	f    disk.File
	size int64
	*unsynced
}

// unsynced is what each sector was since the last sync: a power cut leaves one
// of these. The twin of the disk tears inside of sectors too, for which no
// history has a word.
type unsynced struct {
	mu  sync.Mutex
	was map[int64][]string
}

func (u *unsynced) note(f disk.File, p []byte, off int64) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	for at := int64(0); at < int64(len(p)); at += 512 {
		s := (off + at) / 512
		if u.was[s] == nil {
			old := make([]byte, 512)
			if _, err := f.ReadAt(old, off+at); err != nil {
				return err
			}
			u.was[s] = []string{string(old)}
		}
		u.was[s] = append(u.was[s], string(p[at:at+512]))
	}
	_, err := f.WriteAt(p, off)
	return err
}

func (u *unsynced) sync(f disk.File) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := f.Sync(); err != nil {
		return err
	}
	clear(u.was)
	return nil
}

// mend makes torn sectors whole after a power cut.
func (u *unsynced) mend(f disk.File, r *rand.Rand) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	p := make([]byte, 512)
	for _, s := range slices.Sorted(maps.Keys(u.was)) {
		if _, err := f.ReadAt(p, s*512); err != nil {
			return err
		}
		if was := u.was[s]; !slices.Contains(was, string(p)) {
			if _, err := f.WriteAt([]byte(was[r.IntN(len(was))]), s*512); err != nil {
				return err
			}
		}
	}
	clear(u.was)
	return f.Sync()
}

func (d *fileDevice) Info() block.Info {
	return block.Info{Size: d.size, BlockSize: 512, CanTrim: true, CanExtents: true, ID: "file"}
}
func (d *fileDevice) ReadAt(_ context.Context, p []byte, off int64, _ block.Flags) error {
	_, err := d.f.ReadAt(p, off)
	return err
}
func (d *fileDevice) WriteAt(_ context.Context, p []byte, off int64, _ block.Flags) error {
	return d.note(d.f, p, off)
}
func (d *fileDevice) Zero(ctx context.Context, off, n int64, f block.Flags) error {
	return d.WriteAt(ctx, make([]byte, n), off, f)
}
func (d *fileDevice) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	return d.Zero(ctx, off, n, f)
}
func (d *fileDevice) Flush(context.Context, block.Flags) error { return d.sync(d.f) }
func (d *fileDevice) Extents(_ context.Context, dst []block.Extent, off, n int64, _ block.Flags) ([]block.Extent, error) {
	p := make([]byte, 4096)
	for end := off + n; off < end; {
		to := min(off&^4095+4096, end)
		if _, err := d.f.ReadAt(p[:to-off], off); err != nil {
			return dst, err
		}
		e := block.Extent{Off: off, Len: to - off}
		if zero(p[:to-off]) {
			e.Kind = block.Hole
		}
		dst = block.AppendExtent(dst, e)
		off = to
	}
	return dst, nil
}
func (d *fileDevice) Prefetch(context.Context, int64, int64, block.Flags) error { return nil }
func (d *fileDevice) Close() error                                              { return d.f.Close() }

// world is two nodes, an arbiter, and lines between them.
type world struct {
	t     testing.TB
	rng   *rand.Rand
	base  []byte
	log   *slog.Logger
	links map[string]*wan.WAN // "a>b": what a dials to b
	nodes [2]*node
	conf  func(*Config)

	arbFS   *disktest.FS
	arb     *fence.Arbiter
	arbStop func()
}

type node struct {
	w       *world
	name    string
	other   string
	fs      *disktest.FS
	unclean bool

	mu   sync.Mutex
	vol  *Volume // nil: down
	stop func()
	raw  *fileDevice
	un   *unsynced
	slow atomic.Int64  // each call of the stack takes up to so many nanoseconds
	dead chan struct{} // closed when the process is killed
	// hook, when set, is called before each call of the stack; dead is closed
	// when the process is killed.
	hook atomic.Pointer[func(c blocktest.Call, dead <-chan struct{})]
}

// block holds up the next write to off at this node, whatever its context,
// until it is let go or the process dies. caught is closed when it is there.
func (n *node) block(off int64) (caught chan struct{}, let func()) {
	caught, open := make(chan struct{}), make(chan struct{})
	var once sync.Once
	f := func(c blocktest.Call, dead <-chan struct{}) {
		if c.Op != "write" || c.Off != off {
			return
		}
		first := false
		once.Do(func() { first = true })
		if !first {
			return
		}
		close(caught)
		select {
		case <-open:
		case <-dead:
		}
	}
	n.hook.Store(&f)
	return caught, func() { close(open) }
}

// drag is a slow disk.
func (n *node) drag(ctx context.Context, dead chan struct{}, c blocktest.Call) error {
	if !c.Before {
		return nil
	}
	if f := n.hook.Load(); f != nil {
		(*f)(c, dead)
	}
	d := n.slow.Load()
	if d == 0 {
		return nil
	}
	t := time.NewTimer(time.Duration(rand.Int64N(d)))
	defer t.Stop()
	select {
	case <-t.C:
	case <-dead:
	case <-ctx.Done():
		return block.E("slow", "", block.KindCanceled, ctx.Err())
	}
	return nil
}

func (n *node) volume() *Volume {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.vol
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newWorld makes both nodes with the disk that oracle.WriteBase makes.
func newWorld(t testing.TB, seed uint64, base []byte) *world {
	w := &world{t: t, rng: rand.New(rand.NewPCG(seed, 77)), base: base, links: map[string]*wan.WAN{}, arbFS: disktest.New(seed + 100)}
	w.log = slog.New(slog.DiscardHandler)
	if os.Getenv("FORERUN_LOG") != "" {
		w.log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	for _, l := range []string{"a>b", "b>a"} {
		w.links[l] = wan.New(wan.Link{Delay: 500 * time.Microsecond, Seed: seed})
	}
	for _, l := range []string{"a>arb", "b>arb"} {
		w.links[l] = wan.New(wan.Link{Delay: 5 * time.Millisecond, Seed: seed})
	}
	for i, name := range []string{"a", "b"} {
		n := &node{w: w, name: name, other: []string{"b", "a"}[i], fs: disktest.New(seed*2 + uint64(i)), unclean: false}
		n.un = &unsynced{was: map[int64][]string{}}
		w.nodes[i] = n
		f, err := n.fs.Open("disk", disk.Write|disk.Create)
		must(t, err)
		_, err = f.WriteAt(base, 0)
		must(t, err)
		must(t, f.Sync())
		must(t, f.Close())
		must(t, n.fs.SyncDir("."))
	}
	w.startArbiter()
	return w
}

// listen serves connections on a line until stop.
func listen(ctx context.Context, wg *sync.WaitGroup, l *wan.WAN, addr string, serve func(nc net.Conn)) {
	ln, err := l.Listen(addr)
	if err != nil {
		panic(err)
	}
	context.AfterFunc(ctx, func() { ln.Close() })
	wg.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { serve(nc) })
		}
	})
}

func (w *world) startArbiter() {
	arb, err := fence.Open(fence.Options{FS: w.arbFS, Dir: "arb"})
	must(w.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, n := range []string{"a", "b"} {
		listen(ctx, &wg, w.links[n+">arb"], "arb:1", func(nc net.Conn) {
			c := msg.New(nc, msg.Options{Serve: func(ctx context.Context, typ uint8, p []byte) ([]byte, error) {
				return arb.Serve(ctx, "frontend", n, typ, p)
			}})
			c.Run(ctx)
			c.Wait()
		})
	}
	w.arb = arb
	w.arbStop = func() {
		cancel()
		for _, n := range []string{"a", "b"} {
			w.links[n+">arb"].Cut()
		}
		wg.Wait()
		arb.Close()
	}
}

// restartArbiter kills the arbiter, perhaps with its machine.
func (w *world) restartArbiter(power bool) {
	for _, n := range []string{"a", "b"} {
		w.links[n+">arb"].Cut()
	}
	old := w.arbFS
	if power {
		w.arbFS = old.Crash()
	} else {
		w.arbFS = old.Kill()
	}
	w.arbStop()
	w.startArbiter()
}

func (n *node) start() {
	w := n.w
	f, err := n.fs.Open("disk", disk.Write)
	must(w.t, err)
	raw := &fileDevice{f, int64(len(w.base)), n.un}
	j, err := journal.Open(n.fs, "journal", raw, journal.Options{SegmentBytes: 256 << 10, MaxBytes: 4 << 20, CheckpointBytes: 512 << 10, Log: nil})
	must(w.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	client := func(to, addr string) *msg.Client {
		link := w.links[n.name+">"+to]
		c := msg.NewClient(msg.ClientOptions{Addr: addr, Dial: func(ctx context.Context) (net.Conn, error) { return link.DialContext(ctx, "", addr) },
			Conn: msg.Options{Idle: 2 * time.Second}})
		wg.Go(func() { c.Run(ctx) })
		return c
	}
	dead := make(chan struct{})
	local := blocktest.Hook(j, func(ctx context.Context, c blocktest.Call) error { return n.drag(ctx, dead, c) })
	conf := Config{Volume: "v", Node: n.name, Local: local, Log: j, CleanStart: !n.unclean,
		Fence: fence.NewClient(client("arb", "arb:1"), "v", n.name),
		Peer:  client(n.other, n.other+":1"), Forward: client(n.other, n.other+":1"), Logger: w.log}
	if w.conf != nil {
		w.conf(&conf)
	}
	v, err := Open(conf)
	must(w.t, err)
	mux := &Mux{}
	mux.Add(v)
	listen(ctx, &wg, w.links[n.other+">"+n.name], n.name+":1", func(nc net.Conn) {
		c := msg.New(nc, msg.Options{Idle: 2 * time.Second, Serve: func(ctx context.Context, typ uint8, p []byte) ([]byte, error) {
			return mux.Serve(ctx, n.other, typ, p)
		}})
		c.Run(ctx)
		c.Wait()
	})
	wg.Go(func() { v.Run(ctx) })
	n.mu.Lock()
	defer n.mu.Unlock()
	n.vol, n.raw, n.unclean = v, raw, false
	n.dead = dead
	n.stop = func() {
		close(dead)
		cancel()
		v.Close()
		wg.Wait()
	}
}

// cut resets all the node's connections.
func (n *node) cut() {
	for _, l := range []string{n.name + ">" + n.other, n.other + ">" + n.name, n.name + ">arb"} {
		n.w.links[l].Cut()
	}
}

// kill ends the process, or with power the machine.
func (n *node) kill(power bool) {
	n.mu.Lock()
	v := n.vol
	n.vol = nil
	n.mu.Unlock()
	if v == nil {
		return
	}
	n.cut()
	if power {
		n.fs = n.fs.Crash()
		n.unclean = true
	} else {
		n.fs = n.fs.Kill()
	}
	n.stop()
	if power {
		f, err := n.fs.Open("disk", disk.Write)
		must(n.w.t, err)
		must(n.w.t, n.un.mend(f, n.w.rng))
		must(n.w.t, f.Close())
	}
}

// close stops everything in an orderly way.
func (w *world) close() {
	for _, n := range w.nodes {
		if n.volume() != nil {
			n.stop()
		}
	}
	w.arbStop()
	for _, l := range w.links {
		l.Close()
	}
}

// pair waits until one node is primary and in sync with the other.
func (w *world) pair(limit time.Duration) *Volume {
	w.t.Helper()
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		for _, n := range w.nodes {
			if v := n.volume(); v != nil {
				if s := v.Status(); s.Role == "primary" && s.Mode == "pair" {
					return v
				}
			}
		}
	}
	for _, n := range w.nodes {
		if v := n.volume(); v != nil {
			w.t.Logf("%s: %+v", n.name, v.Status())
		}
	}
	w.t.Fatalf("the nodes are not in sync after %v", limit)
	return nil
}

// equal compares the two nodes' stacks; nothing may be under way.
func (w *world) equal() {
	w.t.Helper()
	var got [2][]byte
	for i, n := range w.nodes {
		got[i] = make([]byte, len(w.base))
		must(w.t, n.raw.ReadAt(context.Background(), got[i], 0, 0))
	}
	if !bytes.Equal(got[0], got[1]) {
		for i := range got[0] {
			if got[0][i] != got[1][i] {
				w.t.Fatalf("the nodes differ at byte %d", i)
			}
		}
	}
}

var baseOnce = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "replica")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	name := filepath.Join(dir, "base")
	if err := oracle.WriteBase(name, 5, worldSize); err != nil {
		return nil, err
	}
	return os.ReadFile(name)
})

// load is clients that write, read and flush through either node, and try again
// at any when a call fails, as a proxy does.
type load struct {
	w    *world
	h    *oracle.History
	stop chan struct{}
	wg   sync.WaitGroup

	mu     sync.Mutex
	halted bool // calamity: give up what is under way
	cond   *sync.Cond
	inside int
	worst  time.Duration
	ops    int
	fails  []error
}

func newLoad(w *world, seed uint64) *load {
	l := &load{w: w, h: oracle.New(5, worldSize), stop: make(chan struct{})}
	l.cond = sync.NewCond(&l.mu)
	for i := range 6 {
		l.wg.Go(func() { l.worker(rand.New(rand.NewPCG(seed, uint64(i)))) })
	}
	return l
}

func (l *load) end() {
	close(l.stop)
	l.wg.Wait()
}

func (l *load) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fails = append(l.fails, err)
}

// begin waits while the load is halted.
func (l *load) begin() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.halted {
		l.cond.Wait()
	}
	l.inside++
}

func (l *load) done() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.inside--
	l.cond.Broadcast()
}

// halt makes all give up and waits for it; resume lets them go on.
func (l *load) halt() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.halted = true
	for l.inside > 0 {
		l.cond.Wait()
	}
}

func (l *load) resume() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.halted = false
	l.cond.Broadcast()
}

func (l *load) over() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.halted
}

var errGaveUp = errors.New("gave up")

// try makes a call at some node until one answers.
func (l *load) try(r *rand.Rand, call func(ctx context.Context, v *Volume) error) error {
	begin := time.Now()
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.ops++
		l.worst = max(l.worst, time.Since(begin))
	}()
	for i := r.IntN(2); ; i++ {
		if l.over() {
			return errGaveUp
		}
		v := l.w.nodes[i%2].volume()
		if v == nil {
			time.Sleep(5 * time.Millisecond)
			continue
		}
		// Half of the tries are given up after a while, for the other node.
		ctx, cancel := context.WithCancel(context.Background())
		if r.IntN(2) == 0 {
			ctx, cancel = context.WithTimeout(ctx, time.Duration(100+r.IntN(2000))*time.Millisecond)
		}
		err := call(ctx, v)
		late := ctx.Err() != nil
		cancel()
		if err == nil {
			return nil
		}
		if late && block.KindOf(err) == block.KindCanceled {
			time.Sleep(Stale)
			continue
		}
		// A node that lives must not fail a call; one that was killed does.
		if k := block.KindOf(err); l.w.nodes[i%2].volume() == v && k != block.KindClosed {
			time.Sleep(time.Millisecond)
			if l.w.nodes[i%2].volume() == v {
				return err
			}
		}
		time.Sleep(Stale)
	}
}

func (l *load) worker(r *rand.Rand) {
	buf := make([]byte, 64<<10)
	for {
		select {
		case <-l.stop:
			return
		default:
		}
		l.begin()
		l.one(r, buf)
		l.done()
		time.Sleep(time.Duration(r.IntN(20)) * time.Millisecond)
	}
}

func (l *load) one(r *rand.Rand, buf []byte) {
	n := int64(1+r.IntN(16)) * 512
	if r.IntN(20) == 0 {
		n = int64(1+r.IntN(100)) * 512
	}
	// Most of the load meets in a small part of the disk.
	off := r.Int64N((worldSize-n)/512) * 512
	if r.IntN(3) > 0 {
		off = r.Int64N(64) * 512
	}
	p := buf[:n]
	switch k := r.IntN(20); {
	case k == 0:
		op := l.h.BeginFlush()
		err := l.try(r, func(ctx context.Context, v *Volume) error { return v.Flush(ctx, 0) })
		l.settle(op, "flush", err)
	case k < 7:
		op := l.h.BeginRead(off, n)
		if op == nil {
			return
		}
		err := l.try(r, func(ctx context.Context, v *Volume) error { return v.ReadAt(ctx, p, off, 0) })
		if err == nil {
			if err := l.h.Check(off, p); err != nil {
				l.fail(fmt.Errorf("read at %v: %w", time.Now().Format("05.000"), err))
			}
		}
		l.settle(op, "read", err)
	default:
		zeroes := k < 9
		fua := block.Flags(0)
		if r.IntN(8) == 0 {
			fua = block.FUA
		}
		q := p
		if zeroes {
			q = nil
		}
		op := l.h.BeginWrite(off, n, q, fua != 0)
		if op == nil {
			return
		}
		write := func(ctx context.Context, v *Volume) error {
			if zeroes {
				if n%1024 == 0 {
					return v.Trim(ctx, off, n, fua)
				}
				return v.Zero(ctx, off, n, fua)
			}
			return v.WriteAt(ctx, p, off, fua)
		}
		if r.IntN(10) == 0 {
			// The client gives up at some time, and writes again.
			d := time.Duration(r.IntN(3000)) * time.Microsecond
			if r.IntN(2) == 0 {
				d *= 1000
			}
			err := l.try(r, func(ctx context.Context, v *Volume) error {
				ctx, cancel := context.WithTimeout(ctx, d)
				defer cancel()
				if err := write(ctx, v); block.KindOf(err) != block.KindCanceled {
					return err
				}
				return nil
			})
			op.Failed()
			if err != nil && err != errGaveUp {
				l.fail(err)
			}
			if op = l.h.BeginWrite(off, n, q, fua != 0); op == nil {
				return
			}
		}
		l.settle(op, "write", l.try(r, write))
	}
}

func (l *load) settle(op *oracle.Op, what string, err error) {
	if err == nil {
		op.Done()
		return
	}
	op.Failed()
	if err != errGaveUp {
		l.fail(fmt.Errorf("%s at a living node: %w", what, err))
	}
}
