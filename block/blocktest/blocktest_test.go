package blocktest_test

import (
	"bytes"
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
	"forerun/block/blocktest"
)

func TestTwin(t *testing.T) {
	for _, bs := range []int{1, 512, 4096} {
		t.Run(fmt.Sprint("blocks of ", bs), func(t *testing.T) {
			blocktest.Test(t, func(*testing.T) block.Device { return blocktest.NewTwin(1<<20, bs) }, blocktest.Options{})
		})
	}
	t.Run("small", func(t *testing.T) {
		blocktest.Test(t, func(*testing.T) block.Device { return blocktest.NewTwin(512, 512) }, blocktest.Options{})
	})
	t.Run("windows", func(t *testing.T) {
		blocktest.Test(t, func(*testing.T) block.Device {
			return blocktest.NewTwin(4<<20, 512).Describe(func(i *block.Info) { i.MaxIO = 96 << 10 })
		}, blocktest.Options{Window: 1 << 20})
	})
	content := bytes.Repeat([]byte("forerun "), 1<<13)
	t.Run("read-only", func(t *testing.T) {
		blocktest.Test(t, func(*testing.T) block.Device {
			return blocktest.NewTwin(1<<17, 512).Fill(0, content).Describe(func(i *block.Info) { i.ReadOnly = true })
		}, blocktest.Options{Content: content})
	})
	t.Run("without trim and extents", func(t *testing.T) {
		blocktest.Test(t, func(*testing.T) block.Device {
			return blocktest.NewTwin(1<<18, 512).Describe(func(i *block.Info) { i.CanTrim, i.CanExtents = false, false })
		}, blocktest.Options{})
	})
	t.Run("slow", func(t *testing.T) {
		blocktest.Test(t, func(*testing.T) block.Device {
			return blocktest.Slow(blocktest.NewTwin(1<<18, 512), 50*time.Microsecond)
		}, blocktest.Options{Ops: 60})
	})
	t.Run("reopen", func(t *testing.T) {
		blocktest.Test(t, func(*testing.T) block.Device { return blocktest.NewTwin(1<<18, 512) },
			blocktest.Options{Reopen: func(t *testing.T, d block.Device) block.Device {
				old := d.(*blocktest.Twin)
				d.Close()
				return blocktest.NewTwin(1<<18, 512).Fill(0, old.Durable())
			}})
	})
}

func TestDurable(t *testing.T) {
	ctx := t.Context()
	d := blocktest.NewTwin(4096, 512)
	p := bytes.Repeat([]byte{9}, 512)
	for i, f := range []block.Flags{0, block.FUA} {
		if err := d.WriteAt(ctx, p, int64(i)*512, f); err != nil {
			t.Fatal(err)
		}
	}
	if got := d.Durable(); !bytes.Equal(got[512:1024], p) || bytes.Equal(got[:512], p) {
		t.Fatal("FUA makes its own range durable and no other")
	}
	if err := d.Flush(ctx, 0); err != nil || !bytes.Equal(d.Durable(), d.Bytes()) {
		t.Fatal("flush makes all durable")
	}
	if c := d.Calls(); c.Writes != 2 || c.WriteBytes != 1024 || c.Flushes != 1 {
		t.Fatalf("%+v", c)
	}
}

func TestSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := blocktest.Slow(blocktest.NewNull(1<<20), time.Second)
		began := time.Now()
		if err := d.ReadAt(t.Context(), make([]byte, 512), 0, 0); err != nil || time.Since(began) != time.Second {
			t.Fatal(err, time.Since(began))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := d.Flush(ctx, 0); block.KindOf(err) != block.KindCanceled || time.Since(began) != time.Second+time.Millisecond {
			t.Fatal(err, time.Since(began))
		}
	})
}

func TestFailing(t *testing.T) {
	ctx, p := t.Context(), make([]byte, 512)
	twin := blocktest.NewTwin(1<<20, 512)
	d := blocktest.Fail(twin)
	d.Once("write", 2, block.KindNoSpace)
	for i, want := range []block.Kind{block.KindNone, block.KindNoSpace, block.KindNone} {
		if err := d.WriteAt(ctx, p, 0, 0); block.KindOf(err) != want {
			t.Fatal(i, err)
		}
	}
	d.Always("", block.KindUnavailable)
	if _, err := d.Extents(ctx, nil, 0, 512, 0); block.KindOf(err) != block.KindUnavailable {
		t.Fatal(err)
	}
	d.Set(func(c blocktest.Call) error { // done, and then said to have failed
		if !c.Before {
			return block.E("test", "", block.KindIO, nil)
		}
		return nil
	})
	if err := d.Flush(ctx, 0); block.KindOf(err) != block.KindIO || twin.Calls().Flushes != 1 {
		t.Fatal(err)
	}
	d.Set(nil)
	if err := d.Flush(ctx, 0); err != nil || d.Calls() != 6 {
		t.Fatal(err, d.Calls())
	}
}
