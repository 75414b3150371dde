package writeback

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
	"forerun/disk/disktest"
)

// cuts are the contents of a group's volumes at every cut that was made.
type cuts struct {
	mu    sync.Mutex
	all   [][][]byte // by cut, then volume
	acked int        // the newest that a Checkpoint answered
}

// witness is a volume whose content is noted at each cut: MarkPeer is called
// while all volumes stand still.
type witness struct {
	*front
	t     testing.TB
	c     *cuts
	index int
	of    int
}

func (w *witness) MarkPeer(ctx context.Context) (string, bool) {
	p := make([]byte, w.below.size)
	if err := w.below.ReadAt(ctx, p, 0, 0); err == nil {
		w.c.mu.Lock()
		if w.index == 0 {
			w.c.all = append(w.c.all, make([][]byte, w.of))
		}
		w.c.all[len(w.c.all)-1][w.index] = p
		w.c.mu.Unlock()
	}
	return w.front.MarkPeer(ctx)
}

func newCuts(size int64, of int) *cuts {
	zero := make([][]byte, of)
	for i := range zero {
		zero[i] = make([]byte, size)
	}
	return &cuts{all: [][][]byte{zero}}
}

func (c *cuts) ack() {
	c.mu.Lock()
	c.acked = len(c.all) - 1
	c.mu.Unlock()
}

func (c *cuts) state() (acked, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.acked, len(c.all)
}

// match finds the cut that the sources are, not older than the one acknowledged.
func (c *cuts) match(acked int, sources ...[]byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for k := len(c.all) - 1; k >= 0; k-- {
		ok := true
		for i, s := range sources {
			ok = ok && bytes.Equal(s, c.all[k][i])
		}
		switch {
		case ok && k < acked && !c.equal(k, acked):
			return k, fmt.Errorf("the sources are cut %d, but %d was acknowledged", k, acked)
		case ok:
			return k, nil
		}
	}
	return 0, fmt.Errorf("the sources are no cut of the %d that were made (%d acknowledged)", len(c.all), acked)
}

func (c *cuts) equal(a, b int) bool {
	for i := range c.all[a] {
		if !bytes.Equal(c.all[a][i], c.all[b][i]) {
			return false
		}
	}
	return true
}

const crashSize = 64 << 10

func crashShipper(t testing.TB, c *cuts, l *link, vols ...*front) *Shipper {
	o := ShipperOptions{Group: "g", Backend: l}
	for i, v := range vols {
		o.Volumes = append(o.Volumes, &witness{v, t, c, i, len(vols)})
	}
	s, err := NewShipper(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestPowerCutAtEverySyncOfTheBackend takes an image of the backend's disk
// before each sync, and recovers from it.
func TestPowerCutAtEverySyncOfTheBackend(t *testing.T) {
	ctx := within(t)
	seeds := uint64(2)
	if testing.Short() {
		seeds = 1
	}
	for seed := range seeds {
		rnd := rand.New(rand.NewPCG(seed, 3))
		fs, ff := disktest.New(seed), disktest.New(seed+100)
		b := must[*back](t)(openBack(fs, crashSize, "a", "b"))
		va := must[*front](t)(openFront(ff, "a", crashSize, true))
		vb := must[*front](t)(openFront(ff, "b", crashSize, true))
		c := newCuts(crashSize, 2)
		s := crashShipper(t, c, &link{node: "f1", to: b.Receiver}, va, vb)
		scribble(t, rnd, va, 10)
		if _, err := s.Checkpoint(ctx); err != nil {
			t.Fatal(err)
		}
		c.ack()
		kept := b.content(t, "a", "test")
		var images atomic.Int64
		look := func(what string) {
			acked, _ := c.state()
			image := fs.Image(rand.Uint64())
			nb, err := openBack(image, crashSize, "a", "b")
			if err != nil {
				t.Errorf("seed %d, %s: %v", seed, what, err)
				return
			}
			defer nb.Close()
			images.Add(1)
			if _, err := c.match(acked, nb.sources["a"].bytes(t), nb.sources["b"].bytes(t)); err != nil {
				t.Errorf("seed %d, %s: %v", seed, what, err)
			}
			clone, err := nb.OpenClone(ctx, "a", "test")
			if err != nil {
				t.Errorf("seed %d, %s: %v", seed, what, err)
				return
			}
			p := make([]byte, crashSize)
			if err := clone.ReadAt(ctx, p, 0, 0); err != nil || !bytes.Equal(p, kept) {
				t.Errorf("seed %d, %s: the clone changed (%v)", seed, what, err)
			}
		}
		fs.OnCall(func(n int64, op disktest.Op) { look(fmt.Sprintf("call %d (%s)", n, op)) })
		for range 5 {
			scribble(t, rnd, va, rnd.IntN(20))
			scribble(t, rnd, vb, rnd.IntN(20))
			if _, err := s.Checkpoint(ctx); err != nil {
				t.Fatal(err)
			}
			c.ack()
			look("after a checkpoint")
			if t.Failed() {
				t.FailNow()
			}
		}
		fs.OnCall(nil)
		if n := images.Load(); n < 50 {
			t.Fatalf("only %d images", n)
		}
		b.Close()
		va.Close()
		vb.Close()
	}
}

// TestCrashesOnBothSides runs seeded histories in which either side loses
// power or its process at some call, in the middle of whatever goes on.
func TestCrashesOnBothSides(t *testing.T) {
	seeds := uint64(40)
	if testing.Short() {
		seeds = 8
	}
	for seed := range seeds {
		if !t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { crashHistory(t, seed) })
		}) {
			break
		}
	}
}

// site is a file system that goes down at some call and comes back.
type site struct {
	fs    *disktest.FS
	next  chan *disktest.FS // what is there after it went down
	power bool
}

func (s *site) arm(rnd *rand.Rand, calls int64) {
	at, fs := s.fs.Calls()+1+rnd.Int64N(calls), s.fs
	s.power = rnd.IntN(3) > 0
	s.next = make(chan *disktest.FS, 1)
	var once sync.Once
	s.fs.OnCall(func(n int64, _ disktest.Op) {
		if n >= at {
			once.Do(func() {
				if s.power {
					s.next <- fs.Crash()
				} else {
					s.next <- fs.Kill()
				}
			})
		}
	})
}

func crashHistory(t *testing.T, seed uint64) {
	ctx := within(t)
	rnd := rand.New(rand.NewPCG(seed, 7))
	fsite, bsite := &site{fs: disktest.New(seed)}, &site{fs: disktest.New(seed + 1000)}
	c := newCuts(crashSize, 2)
	l := &link{node: "f1"}
	var b *back
	var vols [2]*front
	var s *Shipper
	openF := func(exact bool) {
		for i, n := range []string{"a", "b"} {
			v, err := openFront(fsite.fs, n, crashSize, exact)
			if err != nil {
				t.Fatal(err)
			}
			vols[i] = v
		}
		s = crashShipper(t, c, l, vols[:]...)
	}
	openB := func() {
		nb, err := openBack(bsite.fs, crashSize, "a", "b")
		if err != nil {
			t.Fatal(err)
		}
		b = nb
		acked, _ := c.state()
		if _, err := c.match(acked, b.sources["a"].bytes(t), b.sources["b"].bytes(t)); err != nil {
			t.Fatalf("after the backend came back: %v", err)
		}
		l.set(b.Receiver)
	}
	openF(true)
	openB()
	defer func() {
		b.Close()
		vols[0].Close()
		vols[1].Close()
	}()
	if rnd.IntN(2) == 0 {
		dice := rand.New(rand.NewPCG(rnd.Uint64(), 0)) // the link's own: it is called from other goroutines
		l.trouble = func(uint8, []byte) (bool, bool) {
			l.mu.Lock()
			defer l.mu.Unlock()
			return dice.IntN(20) == 0, dice.IntN(20) == 0
		}
	}
	for round := range 12 {
		s.window = 1 + rnd.IntN(30)
		for _, v := range vols {
			scribble(t, rnd, v, rnd.IntN(15))
		}
		which := rnd.IntN(4)
		if which&1 != 0 {
			fsite.arm(rnd, 60)
		}
		if which&2 != 0 {
			bsite.arm(rnd, 40)
		}
		fdown, bdown := fsite.next, bsite.next
		var res chan error // of the checkpoint under way
		var under struct{ cancel context.CancelFunc }
		cancel := func() { under.cancel() }
		for done := false; !done; {
			if res == nil {
				var cctx context.Context
				cctx, under.cancel = context.WithCancel(ctx)
				res = make(chan error, 1)
				go func(s *Shipper, res chan error) {
					_, err := s.Checkpoint(cctx)
					res <- err
				}(s, res)
			}
			select {
			case err := <-res:
				res = nil
				if err == nil {
					done = true
					c.ack()
				} else if ctx.Err() != nil {
					t.Fatal(err)
				}
				// Else the crash that made it fail is about to be noticed.
			case fs := <-fdown:
				cancel()
				<-res
				res = nil
				l.set(nil)
				vols[0].Close()
				vols[1].Close()
				fsite.fs = fs
				openF(!fsite.power)
				if b != nil {
					l.set(b.Receiver)
				}
				fdown = nil
			case fs := <-bdown:
				l.set(nil)
				b.Close()
				bsite.fs = fs
				openB()
				bdown = nil
				if rnd.IntN(2) == 0 {
					cancel()
					<-res
					res = nil
				}
			}
			if res == nil {
				cancel()
			}
		}
		fsite.fs.OnCall(nil)
		bsite.fs.OnCall(nil)
		select { // it came at the very end
		case fs := <-fdown:
			vols[0].Close()
			vols[1].Close()
			fsite.fs = fs
			openF(!fsite.power)
		default:
		}
		select {
		case fs := <-bdown:
			l.set(nil)
			b.Close()
			bsite.fs = fs
			openB()
		default:
		}
		if _, err := s.Checkpoint(ctx); err != nil {
			t.Fatal(err)
		}
		c.ack()
		for i, n := range []string{"a", "b"} {
			same(t, fmt.Sprintf("seed %d round %d: %s", seed, round, n), b.sources[n].bytes(t), vols[i].below.bytes(t))
		}
	}
}

// TestPiecesSurviveTheBackend: what had arrived of a checkpoint need not
// cross the link again, unless a power cut took it.
func TestPiecesSurviveTheBackend(t *testing.T) {
	t.Run("killed", func(t *testing.T) { piecesSurvive(t, 0, false) })
	for seed := range uint64(4) {
		t.Run(fmt.Sprint("power cut ", seed), func(t *testing.T) { piecesSurvive(t, seed, true) })
	}
}

func piecesSurvive(t *testing.T, seed uint64, power bool) {
	ctx := within(t)
	fs, ff := disktest.New(seed), disktest.New(2)
	const size = 4 << 20
	b := must[*back](t)(openBack(fs, size, "a"))
	v := must[*front](t)(openFrontMax(ff, "a", size, true, 64<<20))
	defer v.Close()
	rnd := rand.New(rand.NewPCG(1, 1))
	for off := int64(0); off < size; off += 256 << 10 {
		p := make([]byte, 256<<10)
		for i := range p {
			p[i] = byte(rnd.Uint32())
		}
		if err := v.write(p, off, 0); err != nil {
			t.Fatal(err)
		}
	}
	l := &link{node: "f1", to: b.Receiver}
	const last = 8 // pieces that arrive
	l.trouble = func(typ uint8, p []byte) (bool, bool) {
		if typ != typData {
			return l.calls[typData].Load() > 0, false
		}
		_, index, _, err := parseData(p)
		return err != nil || index >= last, false
	}
	s := ship(t, l, v)
	res := make(chan error, 1)
	go func() {
		_, err := s.Checkpoint(ctx)
		res <- err
	}()
	for {
		if st, err := b.Status("a"); err == nil && st.Arriving > last<<18 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	time.Sleep(10 * time.Millisecond) // the answers arrive
	l.set(nil)
	if power {
		b.Close()
		fs = fs.Crash()
	} else {
		b.Close()
		fs = fs.Kill()
	}
	b = must[*back](t)(openBack(fs, size, "a"))
	defer b.Close()
	l.mu.Lock()
	l.trouble, l.to = nil, b.Receiver
	l.mu.Unlock()
	before := l.bytes.Load()
	select {
	case err := <-res:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(60 * time.Second):
		t.Fatal("the checkpoint does not end")
	}
	same(t, "a", b.sources["a"].bytes(t), v.below.bytes(t))
	if sent := l.bytes.Load() - before; !power && sent > 11*size/16 {
		t.Fatalf("%d bytes sent after the restart, of %d", sent, size)
	}
}

var _ block.Device = (*fileDevice)(nil)
