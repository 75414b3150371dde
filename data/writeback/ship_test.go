package writeback

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
	"forerun/block/blocktest"
	"forerun/data/journal"
	"forerun/disk"
	"forerun/disk/disktest"
)

// scene is a backend and a frontend with some volumes, in one process.
type scene struct {
	t    *testing.T
	ctx  context.Context
	rnd  *rand.Rand
	bfs  *disktest.FS
	ffs  *disktest.FS
	b    *back
	link *link
	vols []*front
	s    *Shipper
	size int64
}

func newScene(t *testing.T, size int64, names ...string) *scene {
	sc := &scene{t: t, ctx: within(t), rnd: rand.New(rand.NewPCG(7, 7)), bfs: disktest.New(1), ffs: disktest.New(2), size: size}
	sc.b = must[*back](t)(openBack(sc.bfs, size, names...))
	for _, n := range names {
		sc.vols = append(sc.vols, must[*front](t)(openFront(sc.ffs, n, size, true)))
	}
	sc.link = &link{node: "f1", to: sc.b.Receiver}
	sc.s = ship(t, sc.link, sc.vols...)
	t.Cleanup(func() {
		sc.b.Close()
		for _, v := range sc.vols {
			v.Close()
		}
	})
	return sc
}

func (sc *scene) scribble(n int) {
	for _, v := range sc.vols {
		scribble(sc.t, sc.rnd, v, n)
	}
}

func (sc *scene) checkpoint() Result {
	sc.t.Helper()
	return must[Result](sc.t)(sc.s.Checkpoint(sc.ctx))
}

func (sc *scene) equal(what string) {
	sc.t.Helper()
	for _, v := range sc.vols {
		same(sc.t, what+": "+v.name, sc.b.sources[v.name].bytes(sc.t), v.below.bytes(sc.t))
	}
}

func (sc *scene) restartBackend(fs *disktest.FS) {
	sc.t.Helper()
	sc.link.set(nil)
	sc.b.Close()
	if fs == nil {
		fs = sc.bfs.Kill()
	}
	sc.bfs = fs
	sc.b = must[*back](sc.t)(openBack(fs, sc.size, slices.Collect(func(yield func(string) bool) {
		for _, v := range sc.vols {
			if !yield(v.name) {
				return
			}
		}
	})...))
	sc.link.set(sc.b.Receiver)
}

func kindIs(t testing.TB, err error, k block.Kind) {
	t.Helper()
	if block.KindOf(err) != k {
		t.Fatalf("%v where %v was due: %v", block.KindOf(err), k, err)
	}
}

// TestGroupIsCutAtOneMoment: a writer puts a number into one volume, then into
// the other. Whatever the sources hold, the second is never ahead and at most
// one behind.
func TestGroupIsCutAtOneMoment(t *testing.T) {
	sc := newScene(t, testSize, "a", "b")
	stop, ended, begun := make(chan struct{}), make(chan struct{}), make(chan struct{})
	for _, v := range sc.vols {
		v.marked = func() { time.Sleep(time.Millisecond) } // time for a write, if it could
	}
	go func() {
		defer close(ended)
		p := make([]byte, 512)
		for i := uint64(1); ; i++ {
			if i == 2 {
				close(begun)
			}
			select {
			case <-stop:
				return
			default:
			}
			binary.LittleEndian.PutUint64(p, i)
			for _, v := range sc.vols {
				if err := v.write(p, int64(i%16)*4096, 0); err != nil {
					t.Error(err)
					return
				}
				if err := v.write(p, testSize-512, 0); err != nil {
					t.Error(err)
					return
				}
			}
		}
	}()
	<-begun
	last := uint64(0)
	for range 10 {
		sc.checkpoint()
		var n [2]uint64
		for i, v := range sc.vols {
			n[i] = binary.LittleEndian.Uint64(sc.b.sources[v.name].bytes(t)[testSize-512:])
		}
		if n[1] > n[0] || n[0] > n[1]+1 || n[0] < last {
			t.Errorf("the sources hold %d and %d after %d", n[0], n[1], last)
		}
		last = n[0]
	}
	close(stop)
	<-ended
	sc.checkpoint()
	sc.equal("at the end")
	if last == 0 {
		t.Fatal("nothing was written")
	}
}

// TestHoldGivenUp: more is written than the journal keeps.
func TestHoldGivenUp(t *testing.T) {
	sc := newScene(t, 1<<20, "a", "b")
	sc.scribble(50)
	if res := sc.checkpoint(); res.Full != 0 {
		t.Fatal("compared too early")
	}
	scribble(t, sc.rnd, sc.vols[0], 2000)
	if _, ok := sc.vols[0].Held(Hold); ok {
		t.Fatal("the hold is there still; the test is too small")
	}
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		rnd := rand.New(rand.NewPCG(1, 9))
		for {
			select {
			case <-stop:
				return
			default:
				scribble(t, rnd, sc.vols[0], 1)
				time.Sleep(100 * time.Microsecond)
			}
		}
	}()
	res := sc.checkpoint()
	close(stop)
	<-ended
	if res.Full != 1 {
		t.Fatalf("%d volumes were compared", res.Full)
	}
	if res := sc.checkpoint(); res.Full != 0 {
		t.Fatal("compared again")
	}
	sc.equal("after it was compared")
}

// TestComparingKeepsUp: while a volume is compared, so much is written that the
// journal cannot keep it.
func TestComparingKeepsUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sc := newScene(t, 8<<20, "a")
		v := sc.vols[0]
		said := &bytes.Buffer{}
		sc.s.follow, sc.s.log = 512<<10, slog.New(slog.NewTextHandler(said, nil))
		sc.scribble(100)
		sc.checkpoint()
		if err := v.Release(Hold); err != nil {
			t.Fatal(err)
		}
		sc.link.trouble = func(typ uint8, _ []byte) (bool, bool) {
			if n := sc.link.calls[typProbe].Load(); typ == typProbe && n <= 4 {
				rnd := rand.New(rand.NewPCG(5, uint64(n)))
				for range 4 {
					scribble(t, rnd, v, 100) // about 600 KiB
					time.Sleep(100 * time.Millisecond)
				}
			}
			return false, false
		}
		res := sc.checkpoint()
		if res.Full != 1 || !strings.Contains(said.String(), "read again") || strings.Contains(said.String(), "anew") {
			t.Fatalf("%+v\n%s", res, said)
		}
		sc.equal("after it was compared")
		for _, name := range v.Stats().Holds {
			if name == scanHold {
				t.Fatal("a hold stays behind")
			}
		}
	})
}

// TestComparingSendsWhatDiffers and nothing else.
func TestComparingSendsWhatDiffers(t *testing.T) {
	sc := newScene(t, 8<<20, "a")
	p := make([]byte, 1<<20)
	for off := int64(0); off < 3<<20; off += 1 << 20 {
		for i := range p {
			p[i] = byte(sc.rnd.Uint32())
		}
		if err := sc.vols[0].write(p, off, 0); err != nil {
			t.Fatal(err)
		}
	}
	sc.checkpoint()
	if err := sc.vols[0].write(p[:64<<10], 5<<20, 0); err != nil {
		t.Fatal(err)
	}
	if err := sc.vols[0].zero(0, 64<<10, 0); err != nil {
		t.Fatal(err)
	}
	if err := sc.vols[0].Release(Hold); err != nil {
		t.Fatal(err)
	}
	before := sc.link.bytes.Load()
	res := sc.checkpoint()
	sc.equal("after it was compared")
	if sent := sc.link.bytes.Load() - before; res.Full != 1 || sent > 80<<10 {
		t.Fatalf("%d bytes sent for 64 KiB that differ, %+v", sent, res)
	}
}

// TestVoidedWrites: a write that the volume refused is not sent, wherever the
// windows end.
func TestVoidedWrites(t *testing.T) {
	for window := range 5 {
		sc := newScene(t, testSize, "a")
		sc.s.window = 1 + window
		v := sc.vols[0]
		for i := range 40 {
			scribble(t, sc.rnd, v, 3)
			if i%3 == 0 {
				v.below.fail(syscall.EIO)
				p := bytes.Repeat([]byte{0xee}, 4096)
				// The file takes the bytes before it fails, and gets the old ones back:
				// what a refused write leaves behind is not defined.
				old := v.below.bytes(t)
				if err := v.write(p, int64(i)*4096, 0); err == nil {
					t.Fatal("no error")
				}
				v.below.fail(nil)
				if err := v.below.WriteAt(sc.ctx, old[i*4096:(i+1)*4096], int64(i)*4096, 0); err != nil {
					t.Fatal(err)
				}
			}
		}
		sc.checkpoint()
		sc.equal(fmt.Sprint("windows of ", sc.s.window))
	}
}

// TestTakeover: the node that takes over sends what the source lacks, and the
// old one can do nothing any more.
func TestTakeover(t *testing.T) {
	sc := newScene(t, testSize, "a")
	va := sc.vols[0]
	pfs := disktest.New(9)
	peer := must[*front](t)(openFront(pfs, "a", testSize, true))
	defer peer.Close()
	va.peer = peer
	sc.scribble(20)
	sc.checkpoint()
	if pos, ok := peer.Held(Hold); !ok || pos != peer.Position() {
		t.Fatalf("the secondary holds %v of %v", pos, peer.Position())
	}
	sc.scribble(20)
	// The old primary is in the middle of a checkpoint.
	old := ship(t, sc.link, va)
	c := &cut{volumes: []cutVolume{{shipped: old.vols[0], epoch: 1, size: testSize}}}
	c.ID, c.Nonce[0] = 2, 1
	send := old.newSender(sc.ctx, c)
	defer send.stop()
	if err := send.begin(); err != nil {
		t.Fatal(err)
	}
	if err := send.data(extent{0, kindData, 0, 4096}, bytes.Repeat([]byte{0xbd}, 4096)); err != nil {
		t.Fatal(err)
	}
	if err := send.drain(); err != nil {
		t.Fatal(err)
	}

	peer.epoch.Store(2)
	nl := &link{node: "f2", to: sc.b.Receiver}
	ns := ship(t, nl, peer)
	res, err := ns.Checkpoint(sc.ctx)
	if err != nil || res.Full != 0 {
		t.Fatalf("%+v, %v", res, err)
	}
	same(t, "after the takeover", sc.b.sources["a"].bytes(t), peer.below.bytes(t))
	if err := send.commit(); err == nil {
		t.Fatal("a checkpoint of the old primary was stored")
	}
	if err := va.write(make([]byte, 512), 0, 0); err != nil {
		t.Fatal(err)
	}
	_, err = sc.s.Checkpoint(sc.ctx)
	kindIs(t, err, block.KindFenced)
	same(t, "after the old primary tried", sc.b.sources["a"].bytes(t), peer.below.bytes(t))
}

// TestArbiterDecides: its record counts, not what frontends say.
func TestArbiterDecides(t *testing.T) {
	sc := newScene(t, testSize, "a")
	epoch, node := uint64(5), "f2"
	sc.b.o.Owner = func(string) (uint64, string, bool) { return epoch, node, true }
	sc.scribble(3)
	_, err := sc.s.Checkpoint(sc.ctx)
	kindIs(t, err, block.KindFenced)
	epoch, node = 1, "f1"
	sc.checkpoint()
	// The record changes while pieces are under way.
	sc.scribble(3)
	sc.link.trouble = func(typ uint8, _ []byte) (bool, bool) {
		if typ == typData {
			epoch, node = 6, "f2"
		}
		return false, false
	}
	before := sc.b.sources["a"].bytes(t)
	_, err = sc.s.Checkpoint(sc.ctx)
	kindIs(t, err, block.KindFenced)
	same(t, "the source", sc.b.sources["a"].bytes(t), before)
}

// TestBackendWithoutItsState: what was stored is not known there any more, so
// everything is compared.
func TestBackendWithoutItsState(t *testing.T) {
	sc := newScene(t, testSize, "a")
	sc.scribble(20)
	sc.checkpoint()
	sc.link.set(nil)
	sc.b.Close()
	fs := sc.bfs.Kill()
	if err := fs.Remove("state/writeback/state"); err != nil {
		t.Fatal(err)
	}
	// And somebody wrote to the source.
	sc.bfs = fs
	sc.b = must[*back](t)(openBack(fs, testSize, "a"))
	if err := sc.b.sources["a"].WriteAt(sc.ctx, bytes.Repeat([]byte{1}, 4096), 8192, 0); err != nil {
		t.Fatal(err)
	}
	sc.link.set(sc.b.Receiver)
	sc.scribble(1)
	if res := sc.checkpoint(); res.Full != 1 {
		t.Fatalf("not compared: %+v", res)
	}
	sc.equal("after it was compared")
}

// TestDamagedCheckpoint: the file of a stored checkpoint rots before it was
// carried out.
func TestDamagedCheckpoint(t *testing.T) {
	n := int64(24)
	if testing.Short() {
		n = 6
	}
	for i := range n {
		synctest.Test(t, func(t *testing.T) {
			sc := newScene(t, testSize, "a", "b")
			sc.scribble(10)
			sc.checkpoint()
			sc.scribble(10)
			sc.b.sources["a"].fail(syscall.EIO)
			ctx, cancel := context.WithTimeout(sc.ctx, 15*time.Second)
			_, err := sc.s.Checkpoint(ctx)
			cancel()
			kindIs(t, err, block.KindCanceled)
			st, err := sc.b.Status("a")
			if err != nil || st.StoredID != 2 || st.Reason == "" {
				t.Fatalf("%+v, %v", st, err)
			}
			sc.link.set(nil)
			sc.b.Close()
			fs := sc.bfs.Kill()
			names := must[[]string](t)(fs.List("state/writeback"))
			at := slices.IndexFunc(names, func(n string) bool { return path.Ext(n) == storedEnd })
			file := path.Join("state/writeback", names[at])
			size := must[int64](t)(func() (int64, error) { s, err := fs.Stat(file); return s.Size, err }())
			fs.Flip(file, size*i/n)
			sc.restartBackend(fs)
			st = must[VolumeStatus](t)(sc.b.Status("a"))
			if !st.Damaged {
				t.Fatalf("byte %d of %d was flipped and nobody saw it", size*i/n, size)
			}
			if _, err := sc.b.OpenClone(sc.ctx, "a", "x"); block.KindOf(err) != block.KindCorrupt {
				t.Fatalf("a clone of a damaged source: %v", err)
			}
			sc.scribble(1)
			if res := sc.checkpoint(); res.Full != 2 {
				t.Fatalf("not compared: %+v", res)
			}
			sc.equal("after it was compared")
			if st = must[VolumeStatus](t)(sc.b.Status("a")); st.Damaged {
				t.Fatal("damaged still")
			}
		})
	}
}

// TestFullDiskAtTheBackend is a wait with a reason, and nothing is lost.
func TestFullDiskAtTheBackend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sc := newScene(t, testSize, "a")
		sc.scribble(5)
		sc.checkpoint()
		sc.scribble(30)
		sc.bfs.SetCapacity(sc.bfs.Used() + 16<<10)
		res := make(chan error, 1)
		go func() {
			_, err := sc.s.Checkpoint(sc.ctx)
			res <- err
		}()
		time.Sleep(30 * time.Second)
		if st := sc.s.Status(); st.State != "waiting" || !strings.Contains(st.Reason, "no space") {
			t.Errorf("status %+v", st)
		}
		sc.bfs.SetCapacity(0)
		if err := <-res; err != nil {
			t.Fatal(err)
		}
		sc.equal("with space")
	})
}

// TestSourceFailsForAWhile: the checkpoint is carried out again from its first
// byte, after a failed flush too.
func TestSourceFailsForAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sc := newScene(t, testSize, "a", "b")
		sc.scribble(30)
		sc.b.sources["b"].fail(syscall.EIO)
		res := make(chan error, 1)
		go func() {
			_, err := sc.s.Checkpoint(sc.ctx)
			res <- err
		}()
		time.Sleep(time.Minute)
		if st := sc.s.Status(); st.State != "applying" || st.Reason == "" {
			t.Errorf("status %+v", st)
		}
		ctx, cancel := context.WithTimeout(sc.ctx, time.Second)
		_, err := sc.b.OpenClone(ctx, "a", "x")
		cancel()
		kindIs(t, err, block.KindBusy)
		sc.b.sources["b"].fail(nil)
		if err := <-res; err != nil {
			t.Fatal(err)
		}
		sc.equal("when it works again")
	})
}

// TestReadOnlySource is refused at once, with words.
func TestReadOnlySource(t *testing.T) {
	sc := newScene(t, testSize, "a")
	sc.b.sources["a"].ro = true
	sc.scribble(1)
	_, err := sc.s.Checkpoint(sc.ctx)
	kindIs(t, err, block.KindReadOnly)
	if !strings.Contains(err.Error(), "--isolated") {
		t.Fatal(err)
	}
}

// TestRelease gives the source back with everything in it.
func TestRelease(t *testing.T) {
	sc := newScene(t, testSize, "a", "b")
	sc.scribble(20)
	sc.checkpoint()
	sc.scribble(20)
	if _, err := sc.b.OpenClone(sc.ctx, "a", "test"); err != nil {
		t.Fatal(err)
	}
	kindIs(t, func() error {
		ctx, cancel := context.WithTimeout(sc.ctx, time.Second)
		defer cancel()
		return sc.s.Release(ctx, "a")
	}(), block.KindCanceled)
	if err := sc.b.Discard(sc.ctx, "a", "test"); err != nil {
		t.Fatal(err)
	}
	lost := 0
	sc.link.trouble = func(typ uint8, _ []byte) (bool, bool) {
		if typ != typRelease {
			return false, false
		}
		lost++
		return lost == 1, lost == 2
	}
	if err := sc.s.Release(sc.ctx, "a"); err != nil {
		t.Fatal(err)
	}
	sc.link.trouble = nil
	same(t, "a", sc.b.sources["a"].bytes(t), sc.vols[0].below.bytes(t))
	if !sc.b.closed["a"] || sc.b.closed["b"] || !sc.b.Released("a") {
		t.Fatalf("closed: %v", sc.b.closed)
	}
	if err := sc.s.Release(sc.ctx, "a"); err != nil {
		t.Fatal("again:", err)
	}
	before := sc.b.sources["a"].bytes(t)
	sc.scribble(10)
	sc.checkpoint() // of b alone
	same(t, "a is left alone", sc.b.sources["a"].bytes(t), before)
	same(t, "b", sc.b.sources["b"].bytes(t), sc.vols[1].below.bytes(t))
	other := ship(t, sc.link, sc.vols...)
	if _, err := other.Checkpoint(sc.ctx); err != nil {
		t.Fatal(err)
	}
	same(t, "a is left alone by another shipper", sc.b.sources["a"].bytes(t), before)
	sc.restartBackend(nil)
	if !sc.b.Released("a") {
		t.Fatal("forgotten by a restart")
	}
	if err := sc.b.Forget(sc.ctx, "a"); err != nil || sc.b.Released("a") {
		t.Fatal(err)
	}
}

// TestForcedRelease states the loss.
func TestForcedRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sc := newScene(t, testSize, "a")
		sc.scribble(20)
		run, stop := context.WithCancel(sc.ctx)
		ended := make(chan error, 1)
		go func() { ended <- sc.s.Run(run) }()
		time.Sleep(20 * time.Second)
		sc.equal("by itself")
		if u := sc.s.Status().Volumes["a"]; u != (Unwritten{}) {
			t.Fatalf("unwritten %+v", u)
		}
		scribble(t, sc.rnd, sc.vols[0], 1)
		time.Sleep(time.Second) // the next is not due for a while
		sc.equal("once more")
		at := time.Now()
		kept := sc.b.sources["a"].bytes(t)
		if err := sc.vols[0].write(make([]byte, 8192), 0, 0); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		stop()
		<-ended
		loss, err := sc.b.Release(sc.ctx, "a", false)
		if err != nil {
			t.Fatal(err)
		}
		if loss.Unwritten.Bytes != 8192 || loss.Unwritten.Oldest.Before(at.Add(-time.Second)) || loss.LastID == 0 || !strings.Contains(loss.Text, "8192 bytes") {
			t.Fatalf("%+v", loss)
		}
		same(t, "the source", sc.b.sources["a"].bytes(t), kept)
		_, err = sc.s.Checkpoint(sc.ctx)
		kindIs(t, err, block.KindFenced)
		kindIs(t, sc.s.Release(sc.ctx, "a"), block.KindFenced)
	})
}

// TestRunKeepsTheInterval: by time, by bytes, and not while another is primary.
func TestRunKeepsTheInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sc := newScene(t, 1<<20, "a")
		s := must[*Shipper](t)(NewShipper(ShipperOptions{Group: "g", Volumes: []Volume{sc.vols[0]}, Backend: sc.link, MaxBytes: 256 << 10}))
		run, stop := context.WithCancel(sc.ctx)
		ended := make(chan error, 1)
		go func() { ended <- s.Run(run) }()
		defer func() {
			stop()
			<-ended
		}()
		time.Sleep(15 * time.Second)
		n := sc.link.calls[typCommit].Load()
		if n != 0 {
			t.Fatal("a checkpoint of nothing")
		}
		for range 60 {
			if err := sc.vols[0].write(make([]byte, 512), 0, 0); err != nil {
				t.Fatal(err)
			}
			if age := time.Since(s.Status().Oldest()); age > 12*time.Second {
				t.Fatalf("the oldest write is %v old", age)
			}
			time.Sleep(time.Second)
		}
		if n := sc.link.calls[typCommit].Load(); n < 5 || n > 8 {
			t.Fatalf("%d checkpoints in a minute", n)
		}
		sc.vols[0].epoch.Store(0)
		time.Sleep(time.Second) // what is under way ends
		n = sc.link.calls[typCommit].Load()
		if err := sc.vols[0].write(make([]byte, 300<<10), 0, 0); err != nil {
			t.Fatal(err)
		}
		time.Sleep(30 * time.Second)
		if sc.link.calls[typCommit].Load() != n || s.Status().State != "secondary" {
			t.Fatal("a secondary shipped")
		}
		sc.vols[0].epoch.Store(1)
		time.Sleep(time.Second)
		sc.equal("primary again")
		if err := sc.vols[0].write(make([]byte, 300<<10), 0, 0); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		sc.equal("by bytes")
	})
}

// TestUnwrittenAfterARestart: what the last process left is counted.
func TestUnwrittenAfterARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sc := newScene(t, testSize, "a")
		sc.scribble(3)
		sc.checkpoint()
		for range 5 {
			if err := sc.vols[0].write(make([]byte, 4096), 0, 0); err != nil {
				t.Fatal(err)
			}
		}
		sc.vols[0].Close()
		sc.vols[0] = must[*front](t)(openFront(sc.ffs, "a", testSize, true))
		sc.link.set(nil)
		sc.s = ship(t, sc.link, sc.vols...)
		run, stop := context.WithCancel(sc.ctx)
		ended := make(chan error, 1)
		go func() { ended <- sc.s.Run(run) }()
		time.Sleep(3 * time.Second)
		if err := sc.vols[0].write(make([]byte, 512), 0, 0); err != nil {
			t.Fatal(err)
		}
		// The hold on disk may be an older one, so it may be more than it is.
		if u := sc.s.Status().Volumes["a"]; u.Bytes < 5*4096+512 || u.Oldest.IsZero() {
			t.Errorf("%+v", u)
		}
		sc.link.set(sc.b.Receiver)
		time.Sleep(20 * time.Second)
		if u := sc.s.Status().Volumes["a"]; u != (Unwritten{}) {
			t.Errorf("%+v", u)
		}
		sc.equal("by itself")
		stop()
		<-ended
	})
}

// TestMemoryIsBounded, whatever waits to be sent.
func TestMemoryIsBounded(t *testing.T) {
	if testing.Short() {
		t.Skip("it measures")
	}
	const size, backlog = 64 << 20, 160 << 20
	dir := t.TempDir()
	below := blocktest.NewTwin(size, 512)
	j := must[*journal.Journal](t)(journal.Open(disk.OS(), dir, below, journal.Options{MaxBytes: 1 << 30}))
	v := &front{Journal: j, below: &fileDevice{size: size}, name: "a"}
	defer v.Close()
	v.epoch.Store(1)
	if err := Prepare(j, true); err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(1, 1))
	p := make([]byte, 4096)
	for range backlog / len(p) {
		for i := 0; i < len(p); i += 512 {
			binary.LittleEndian.PutUint64(p[i:], rnd.Uint64())
		}
		if err := v.write(p, rnd.Int64N(size/4096)*4096, 0); err != nil {
			t.Fatal(err)
		}
	}
	s := ship(t, sink{}, v)
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before, most := heap(), int64(0)
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
				most = max(most, heap())
			}
		}
	}()
	res, err := s.Checkpoint(within(t))
	close(stop)
	<-ended
	if err != nil || res.Bytes < size/2 {
		t.Fatalf("%+v, %v", res, err)
	}
	if used := most - before; used > 32<<20 {
		t.Fatalf("%d bytes in use for a backlog of %d", used, backlog)
	}
}

// sink is a backend that says yes.
type sink struct{}

func (sink) Call(ctx context.Context, typ uint8, parts ...[]byte) ([]byte, error) {
	switch typ {
	case typHello:
		return encode(helloAnswer{}), nil
	case typBegin:
		return encode(beginAnswer{Handle: 1}), nil
	case typApplied:
		return encode(appliedAnswer{Applied: true}), nil
	case typData:
		time.Sleep(time.Millisecond)
	}
	return nil, ctx.Err()
}

// TestLateCallsDoNoHarm: requests that come again, in any order, change nothing.
func TestLateCallsDoNoHarm(t *testing.T) {
	sc := newScene(t, testSize, "a")
	type call struct {
		typ uint8
		p   []byte
	}
	var mu sync.Mutex
	var all []call
	sc.link.trouble = func(typ uint8, p []byte) (bool, bool) {
		mu.Lock()
		defer mu.Unlock()
		if typ != typApplied {
			all = append(all, call{typ, bytes.Clone(p)})
		}
		return false, false
	}
	for range 5 {
		sc.scribble(15)
		sc.checkpoint()
	}
	sc.link.trouble = nil
	for range 20 {
		for _, c := range all { // once more in order, as a connection that was slow
			if sc.rnd.IntN(2) == 0 {
				_, _ = sc.b.Serve(sc.ctx, "frontend", "f1", c.typ, c.p)
			}
		}
		sc.rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		sc.equal("after late calls")
	}
	sc.scribble(5)
	sc.checkpoint()
	sc.equal("at the end")
}

// TestLinkBytes: 16 KiB random writes that do not compress.
func TestLinkBytes(t *testing.T) {
	sc := newScene(t, 4<<20, "a")
	p := make([]byte, 16<<10)
	written := map[int64]bool{}
	for range 150 {
		for i := 0; i < len(p); i += 8 {
			binary.LittleEndian.PutUint64(p[i:], sc.rnd.Uint64())
		}
		off := sc.rnd.Int64N(4<<20/4096-3) * 4096
		for i := range int64(4) {
			written[off/4096+i] = true
		}
		if err := sc.vols[0].write(p, off, 0); err != nil {
			t.Fatal(err)
		}
	}
	sc.checkpoint()
	sc.equal("the source")
	changed := int64(len(written)) * 4096
	if sent := sc.link.bytes.Load(); sent > changed*102/100+4096 {
		t.Fatalf("%d bytes on the link for %d changed", sent, changed)
	}
}

// TestPowerCutAtTheFrontendGivesTheHoldUp: without the hold nothing is known, and everything
// modified is compared.
func TestPowerCutAtTheFrontendGivesTheHoldUp(t *testing.T) {
	fs := disktest.New(1)
	v := must[*front](t)(openFront(fs, "a", testSize, true))
	if _, ok := v.Held(Hold); !ok {
		t.Fatal("a new journal has no hold")
	}
	v.Close()
	v = must[*front](t)(openFront(fs, "a", testSize, false))
	if _, ok := v.Held(Hold); ok && v.Position() != (journal.Position{}) {
		t.Fatal("held after a power cut")
	}
	if err := v.write(make([]byte, 512), 0, block.FUA); err != nil {
		t.Fatal(err)
	}
	v.Close()
	v = must[*front](t)(openFront(fs, "a", testSize, false))
	v.Close()
	v = must[*front](t)(openFront(fs, "a", testSize, true))
	defer v.Close()
	if _, ok := v.Held(Hold); ok {
		t.Fatal("the hold came back with the next start")
	}
}
