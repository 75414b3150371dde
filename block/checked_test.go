package block_test

import (
	"context"
	"errors"
	"math"
	"sync"
	"testing"
	"time"

	"forerun/block"
	"forerun/block/blocktest"
)

func TestCheckedRefuses(t *testing.T) {
	ctx := context.Background()
	const size, bs = 1 << 20, 512
	rw := block.NewChecked("c", blocktest.NewTwin(size, bs).Describe(func(i *block.Info) { i.MaxIO = 64 << 10 }))
	ro := block.NewChecked("c", blocktest.NewTwin(size, bs).Describe(func(i *block.Info) { i.ReadOnly = true }))
	p := make([]byte, bs)
	read := func(p []byte, off int64, f block.Flags) error { return rw.ReadAt(ctx, p, off, f) }
	write := func(p []byte, off int64, f block.Flags) error { return rw.WriteAt(ctx, p, off, f) }
	extents := func(c *block.Checked, off, n int64, f block.Flags) error {
		_, err := c.Extents(ctx, nil, off, n, f)
		return err
	}
	for _, c := range []struct {
		what string
		err  error
		want block.Kind
	}{
		{"read", read(p, 0, 0), block.KindNone},
		{"read soon", read(p, 0, block.Background|block.Soon), block.KindNone},
		{"last block", read(p, size-bs, 0), block.KindNone},
		{"empty", read(nil, 0, 0), block.KindInvalid},
		{"negative", read(p, -bs, 0), block.KindInvalid},
		{"overflow", read(p, math.MaxInt64-bs+1, 0), block.KindInvalid},
		{"beyond", read(p, size, 0), block.KindRange},
		{"across the end", read(make([]byte, 2*bs), size-bs, 0), block.KindRange},
		{"odd offset", read(p, 1, 0), block.KindInvalid},
		{"odd length", read(p[1:], 0, 0), block.KindInvalid},
		{"too long", read(make([]byte, 64<<10+bs), 0, 0), block.KindInvalid},
		{"as long as may be", read(make([]byte, 64<<10), 0, 0), block.KindNone},
		{"class 3", read(p, 0, 3), block.KindInvalid},
		{"read with FUA", read(p, 0, block.FUA), block.KindInvalid},
		{"unknown flag", read(p, 0, 1<<20), block.KindInvalid},
		{"write with FUA", write(p, 0, block.FUA), block.KindNone},
		{"write with MayTrim", write(p, 0, block.MayTrim), block.KindInvalid},
		{"write too long", write(make([]byte, 64<<10+bs), 0, 0), block.KindInvalid},
		{"zero longer than MaxIO", rw.Zero(ctx, 0, size, block.FUA|block.MayTrim|block.FastZero), block.KindNone},
		{"zero with Local", rw.Zero(ctx, 0, bs, block.Local), block.KindInvalid},
		{"zero beyond", rw.Zero(ctx, bs, size, 0), block.KindRange},
		{"trim all", rw.Trim(ctx, 0, size, block.FUA), block.KindNone},
		{"trim with MayTrim", rw.Trim(ctx, 0, bs, block.MayTrim), block.KindInvalid},
		{"trim nothing", rw.Trim(ctx, 0, 0, 0), block.KindInvalid},
		{"flush", rw.Flush(ctx, block.Background), block.KindNone},
		{"flush with FUA", rw.Flush(ctx, block.FUA), block.KindInvalid},
		{"flush class 3", rw.Flush(ctx, 3), block.KindInvalid},
		{"extents", extents(rw, 0, size, block.Local), block.KindNone},
		{"extents with FUA", extents(rw, 0, size, block.FUA), block.KindInvalid},
		{"extents beyond", extents(rw, size, bs, 0), block.KindRange},
		{"prefetch", rw.Prefetch(ctx, 0, size, block.Background|block.Soon), block.KindNone},
		{"prefetch with Local", rw.Prefetch(ctx, 0, size, block.Local), block.KindInvalid},
		{"read-only write", ro.WriteAt(ctx, p, 0, 0), block.KindReadOnly},
		{"read-only zero", ro.Zero(ctx, 0, bs, 0), block.KindReadOnly},
		{"read-only trim", ro.Trim(ctx, 0, bs, 0), block.KindReadOnly},
		{"read-only flush", ro.Flush(ctx, 0), block.KindNone},
		{"misuse before read-only", ro.WriteAt(ctx, p, size, 0), block.KindRange},
	} {
		if block.KindOf(c.err) != c.want {
			t.Errorf("%s: %v (%v), should be %v", c.what, c.err, block.KindOf(c.err), c.want)
		}
		var e *block.Error
		if c.err != nil && !errors.As(c.err, &e) {
			t.Errorf("%s: %v is no *block.Error", c.what, c.err)
		}
	}
}

// liar answers Extents with what the test wants.
type liar struct {
	block.Device
	answer []block.Extent
}

func (l liar) Extents(_ context.Context, dst []block.Extent, _, _ int64, _ block.Flags) ([]block.Extent, error) {
	return append(dst, l.answer...), nil
}

func TestCheckedFindsBadExtents(t *testing.T) {
	ctx := context.Background()
	for _, c := range []struct {
		answer []block.Extent
		want   block.Kind
	}{
		{[]block.Extent{{Off: 512, Len: 512}}, block.KindNone},
		{[]block.Extent{{Off: 512, Len: 512}, {Off: 1024, Len: 1024}}, block.KindNone},
		{nil, block.KindIO},
		{[]block.Extent{{Off: 0, Len: 512}}, block.KindIO},
		{[]block.Extent{{Off: 512, Len: 0}}, block.KindIO},
		{[]block.Extent{{Off: 512, Len: -512}}, block.KindIO},
		{[]block.Extent{{Off: 512, Len: 4096}}, block.KindIO},
		{[]block.Extent{{Off: 512, Len: 512}, {Off: 2048, Len: 512}}, block.KindIO},
		{[]block.Extent{{Off: 512, Len: math.MaxInt64}}, block.KindIO},
	} {
		d := block.NewChecked("c", liar{blocktest.NewNull(1 << 20), c.answer})
		had := []block.Extent{{Off: 7, Len: 7}}
		out, err := d.Extents(ctx, had, 512, 2048, 0)
		if block.KindOf(err) != c.want || len(out) < 1 || out[0] != had[0] {
			t.Errorf("%v: %v, %v", c.answer, out, err)
		}
		if err != nil && len(out) != 1 {
			t.Errorf("%v: a refused answer was passed on: %v", c.answer, out)
		}
	}
}

func TestCheckedKeepsExtentsOfTheCaller(t *testing.T) {
	// Callers collect extents over several calls: what they have touches what comes.
	c := block.NewChecked("c", blocktest.NewNull(1<<20))
	dst := make([]block.Extent, 0, 4)
	for at := int64(0); at < 2048; at += 512 {
		var err error
		if dst, err = c.Extents(context.Background(), dst, at, 512, 0); err != nil {
			t.Fatal(err)
		}
	}
	if len(dst) != 4 || dst[3] != (block.Extent{Off: 1536, Len: 512, Kind: block.Hole}) {
		t.Fatalf("%v", dst)
	}
	if n := testing.AllocsPerRun(100, func() { c.Extents(context.Background(), dst[:1], 512, 512, 0) }); n != 0 {
		t.Errorf("%v allocations though dst had room", n)
	}
}

// held is a device whose reads wait until it is let go.
type held struct {
	*blocktest.Twin
	inside sync.WaitGroup
	let    chan struct{}
}

func (h *held) ReadAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	h.inside.Done()
	<-h.let
	return h.Twin.ReadAt(ctx, p, off, f)
}

func TestCheckedCloseWaitsForCalls(t *testing.T) {
	ctx := context.Background()
	h := &held{Twin: blocktest.NewTwin(1<<20, 512), let: make(chan struct{})}
	h.inside.Add(3)
	c := block.NewChecked("c", h)
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			if err := c.ReadAt(ctx, make([]byte, 512), 0, 0); err != nil {
				t.Error(err) // the twin refuses once it is closed
			}
		})
	}
	h.inside.Wait()
	closed := make(chan error)
	go func() { closed <- c.Close() }()
	select {
	case <-closed:
		t.Error("closed under calls")
	case <-time.After(20 * time.Millisecond):
	}
	close(h.let)
	if err := <-closed; err != nil {
		t.Error(err)
	}
	wg.Wait()
	if err := c.Close(); err != nil || !h.Closed() {
		t.Error(err)
	}
	if err := c.ReadAt(ctx, make([]byte, 512), 0, 0); block.KindOf(err) != block.KindClosed {
		t.Error(err)
	}
}

func TestCheckedDoesNotAllocate(t *testing.T) {
	ctx := context.Background()
	c := block.NewChecked("c", blocktest.NewNull(1<<20))
	p := make([]byte, 4096)
	if n := testing.AllocsPerRun(100, func() {
		if c.ReadAt(ctx, p, 4096, 0) != nil || c.WriteAt(ctx, p, 0, block.FUA) != nil {
			t.Fatal("refused")
		}
	}); n != 0 {
		t.Errorf("%v allocations a call", n)
	}
}

func BenchmarkCheckedRead(b *testing.B) {
	ctx := context.Background()
	c := block.NewChecked("c", blocktest.NewNull(1<<20))
	p := make([]byte, 512)
	b.ReportAllocs()
	for b.Loop() {
		c.ReadAt(ctx, p, 512, 0)
	}
}
