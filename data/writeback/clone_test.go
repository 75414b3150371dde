package writeback

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
	"forerun/disk/disktest"
)

func (b *back) content(t testing.TB, volume, name string) []byte {
	t.Helper()
	d := must[block.Device](t)(b.OpenClone(within(t), volume, name))
	p := make([]byte, d.Info().Size)
	if err := d.ReadAt(context.Background(), p, 0, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestClonesKeepTheirContent while checkpoints change the source below them,
// over restarts, and when they are read at any moment.
func TestClonesKeepTheirContent(t *testing.T) {
	sc := newScene(t, testSize, "a", "b")
	want := map[string][]byte{}
	ids := map[string]bool{}
	for round := range 12 {
		sc.scribble(8)
		sc.checkpoint()
		if round%3 == 0 {
			name := fmt.Sprint("c", round)
			d := must[block.Device](t)(sc.b.OpenClone(sc.ctx, "a", name))
			if ids[d.Info().ID] || !d.Info().ReadOnly {
				t.Fatalf("%+v", d.Info())
			}
			ids[d.Info().ID] = true
			want["a@"+name] = sc.b.sources["a"].bytes(t)
			want["b@"+name] = sc.b.sources["b"].bytes(t) // opened later, begun now
		}
		stop := make(chan struct{})
		var readers sync.WaitGroup
		for key, w := range want {
			volume, name, _ := ParseClone(key)
			if volume == "b" && round%3 != 2 {
				continue
			}
			d := must[block.Device](t)(sc.b.OpenClone(sc.ctx, volume, name))
			readers.Go(func() {
				rnd := rand.New(rand.NewPCG(uint64(round), 1))
				for {
					select {
					case <-stop:
						return
					default:
					}
					off := rnd.Int64N(testSize/512) * 512
					p := make([]byte, min(512*(1+rnd.Int64N(64)), testSize-off))
					if err := d.ReadAt(context.Background(), p, off, 0); err != nil || !bytes.Equal(p, w[off:off+int64(len(p))]) {
						t.Errorf("%s changed at %d (%v)", key, off, err)
						return
					}
					exts, err := d.Extents(context.Background(), nil, off, int64(len(p)), 0)
					if err != nil || len(exts) == 0 || exts[0].Off != off || exts[len(exts)-1].End() > off+int64(len(p)) {
						t.Errorf("extents of %s: %v, %v", key, exts, err)
						return
					}
				}
			})
		}
		sc.scribble(8)
		sc.checkpoint()
		close(stop)
		readers.Wait()
		if round%4 == 3 {
			sc.restartBackend(nil)
		}
		for key, w := range want {
			if volume, name, _ := ParseClone(key); volume == "a" || round == 11 {
				same(t, key, sc.b.content(t, volume, name), w)
			}
		}
		sc.equal("the sources")
	}
	for key := range want {
		volume, name, _ := ParseClone(key)
		if err := sc.b.Discard(sc.ctx, volume, name); err != nil {
			t.Fatal(err)
		}
	}
	if left := must[[]string](t)(sc.bfs.List("state/clones")); len(left) != 0 {
		t.Fatalf("left behind: %v", left)
	}
	if err := sc.b.Discard(sc.ctx, "a", "c0"); err != nil {
		t.Fatal("again:", err)
	}
}

// TestDiscardTakesWhatNobodyOpened of the group along.
func TestDiscardTakesWhatNobodyOpened(t *testing.T) {
	sc := newScene(t, testSize, "a", "b")
	sc.scribble(3)
	sc.checkpoint()
	d := must[block.Device](t)(sc.b.OpenClone(sc.ctx, "a", "x"))
	if st := must[VolumeStatus](t)(sc.b.Status("b")); len(st.Clones) != 1 {
		t.Fatalf("%+v", st)
	}
	if err := d.WriteAt(sc.ctx, make([]byte, 512), 0, 0); block.KindOf(err) != block.KindReadOnly {
		t.Fatal(err)
	}
	if err := sc.b.Discard(sc.ctx, "a", "x"); err != nil {
		t.Fatal(err)
	}
	if st := must[VolumeStatus](t)(sc.b.Status("b")); len(st.Clones) != 0 {
		t.Fatalf("%+v", st)
	}
	kindIs(t, d.ReadAt(sc.ctx, make([]byte, 512), 0, 0), block.KindClosed)
	sc.scribble(3)
	sc.checkpoint()
	// The next one of that name is another.
	same(t, "a@x", sc.b.content(t, "a", "x"), sc.b.sources["a"].bytes(t))
}

// TestFullDiskForAClone keeps the checkpoint waiting, and discarding the clone
// lets it go on.
func TestFullDiskForAClone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sc := newScene(t, testSize, "a")
		p := bytes.Repeat([]byte{1}, testSize)
		if err := sc.vols[0].write(p, 0, 0); err != nil {
			t.Fatal(err)
		}
		sc.checkpoint()
		_ = sc.b.content(t, "a", "x")
		if err := sc.vols[0].write(bytes.Repeat([]byte{2}, testSize), 0, 0); err != nil {
			t.Fatal(err)
		}
		sc.bfs.SetCapacity(sc.bfs.Used() + 64<<10)
		res := make(chan error, 1)
		go func() {
			_, err := sc.s.Checkpoint(sc.ctx)
			res <- err
		}()
		time.Sleep(time.Minute)
		st := must[VolumeStatus](t)(sc.b.Status("a"))
		if st.StoredID == 0 || st.Reason == "" {
			t.Fatalf("%+v", st)
		}
		same(t, "the clone while it waits", sc.b.content(t, "a", "x"), p)
		same(t, "the source while it waits", sc.b.sources["a"].bytes(t), p)
		if err := sc.b.Discard(sc.ctx, "a", "x"); err != nil {
			t.Fatal(err)
		}
		if err := <-res; err != nil {
			t.Fatal(err)
		}
		sc.equal("after it was discarded")
	})
}

// TestCloneFailures: any call on the clone's files may fail; the checkpoint
// waits, and the clone has its content.
func TestCloneFailures(t *testing.T) {
	for n := range int64(40) {
		synctest.Test(t, func(t *testing.T) {
			sc := newScene(t, crashSize, "a")
			sc.scribble(10)
			sc.checkpoint()
			want := sc.b.content(t, "a", "x")
			sc.scribble(10)
			sc.bfs.Fail(disktest.Fault{At: n + 1, Err: []error{syscall.EIO, syscall.ENOSPC}[n%2]})
			for done := false; !done; {
				ctx, cancel := context.WithTimeout(sc.ctx, time.Minute)
				_, err := sc.s.Checkpoint(ctx)
				cancel()
				done = err == nil
				if sc.ctx.Err() != nil {
					t.Fatal(err)
				}
			}
			sc.equal("the source")
			same(t, "the clone", sc.b.content(t, "a", "x"), want)
			sc.restartBackend(nil)
			same(t, "the clone after a restart", sc.b.content(t, "a", "x"), want)
			sc.equal("the source after a restart")
		})
	}
}
