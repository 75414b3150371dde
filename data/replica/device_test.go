package replica

import (
	"context"
	"testing"
	"time"

	"forerun/block"
	"forerun/block/blocktest"
	"forerun/data/fence"
	"forerun/data/journal"
	"forerun/disk/disktest"
)

// wire gives calls to another volume in the same process, as if by message.
type wire struct {
	to    *Mux
	from  string
	delay time.Duration
}

func (w *wire) Call(ctx context.Context, typ uint8, parts ...[]byte) ([]byte, error) {
	var p []byte
	for _, q := range parts {
		p = append(p, q...)
	}
	if w.delay > 0 {
		time.Sleep(w.delay)
	}
	if w.to == nil {
		return nil, block.E("wire", "", block.KindUnavailable, nil)
	}
	// The other side serves on a goroutine of its own and does not see ctx.
	type answer struct {
		p   []byte
		err error
	}
	ch := make(chan answer, 1)
	go func() {
		out, err := w.to.Serve(context.Background(), w.from, typ, p)
		ch <- answer{out, err}
	}()
	select {
	case a := <-ch:
		return a.p, a.err
	case <-ctx.Done():
		return nil, block.E("wire", "", block.KindCanceled, ctx.Err())
	}
}

// court is an arbiter in the same process.
type court struct {
	arb  *fence.Arbiter
	node string
}

func (c court) Call(ctx context.Context, typ uint8, parts ...[]byte) ([]byte, error) {
	var p []byte
	for _, q := range parts {
		p = append(p, q...)
	}
	return c.arb.Serve(ctx, "frontend", c.node, typ, p)
}

func newCourt(t testing.TB) *fence.Arbiter {
	arb, err := fence.Open(fence.Options{FS: disktest.New(9), Dir: "arb"})
	must(t, err)
	t.Cleanup(func() { arb.Close() })
	return arb
}

// stub is a volume with an arbiter and nobody else, not running.
func stub(t testing.TB) *Volume {
	j, err := journal.Open(disktest.New(1), "j", blocktest.NewTwin(1<<20, 512), journal.Options{SegmentBytes: 64 << 10})
	must(t, err)
	v, err := Open(Config{Volume: "v", Node: "a", Local: j, Log: j, CleanStart: true, Fence: fence.NewClient(court{newCourt(t), "a"}, "v", "a")})
	must(t, err)
	return v
}

// couple is two running volumes in one process, with a twin below each; the
// first is primary.
func couple(t testing.TB, size int64, conf func(*Config)) (vols [2]*Volume, twins [2]*blocktest.Twin) {
	arb := newCourt(t)
	var muxes [2]Mux
	names := []string{"a", "b"}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{}, 2)
	for i := range vols {
		twins[i] = blocktest.NewTwin(size, 512)
		j, err := journal.Open(disktest.New(uint64(i)), "j", twins[i], journal.Options{SegmentBytes: 4 << 20, MaxBytes: 64 << 20})
		must(t, err)
		c := Config{Volume: "v", Node: names[i], Local: j, Log: j, CleanStart: true,
			Fence: fence.NewClient(court{arb, names[i]}, "v", names[i]), Peer: &wire{to: &muxes[1-i], from: names[i]}}
		if conf != nil {
			conf(&c)
		}
		vols[i], err = Open(c)
		must(t, err)
		muxes[i].Add(vols[i])
		go func() { vols[i].Run(ctx); done <- struct{}{} }()
		for vols[i].Status().Role == "undecided" {
			time.Sleep(time.Millisecond)
		}
	}
	t.Cleanup(func() {
		cancel()
		<-done
		<-done
		vols[0].Close()
		vols[1].Close()
	})
	for vols[0].Status().Mode != "pair" {
		time.Sleep(5 * time.Millisecond)
	}
	return vols, twins
}

// TestDevice runs the suite over a volume alone, one with an arbiter only, the
// primary of a pair, and its secondary.
func TestDevice(t *testing.T) {
	const size = 2 << 20
	o := blocktest.Options{Ops: 200, MaxLen: 64 << 10}
	t.Run("alone", func(t *testing.T) {
		blocktest.Test(t, func(t *testing.T) block.Device {
			v, err := Open(Config{Volume: "v", Local: blocktest.NewTwin(size, 512)})
			must(t, err)
			return v
		}, o)
	})
	t.Run("arbiter", func(t *testing.T) {
		blocktest.Test(t, func(t *testing.T) block.Device {
			twin := blocktest.NewTwin(size, 512)
			j, err := journal.Open(disktest.New(1), "j", twin, journal.Options{SegmentBytes: 1 << 20})
			must(t, err)
			v, err := Open(Config{Volume: "v", Node: "a", Local: j, Log: j, Fence: fence.NewClient(court{newCourt(t), "a"}, "v", "a")})
			must(t, err)
			done := make(chan struct{})
			go func() { v.Run(context.Background()); close(done) }()
			t.Cleanup(func() { v.Close(); <-done })
			return v
		}, o)
	})
	for i, name := range []string{"primary", "secondary"} {
		t.Run(name, func(t *testing.T) {
			blocktest.Test(t, func(t *testing.T) block.Device {
				vols, twins := couple(t, size, nil)
				t.Cleanup(func() {
					// Both are closed by now; each acknowledged write is at both.
					if string(twins[0].Bytes()) != string(twins[1].Bytes()) {
						t.Error("the nodes differ")
					}
				})
				return vols[i]
			}, o)
		})
	}
}
