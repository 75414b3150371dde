package journal

import (
	"context"
	"testing"

	"forerun/block"
	"forerun/block/blocktest"
	"forerun/disk/disktest"
)

// TestSkimSeesWhatNextSees: the same records in the same order, without bytes.
func TestSkimSeesWhatNextSees(t *testing.T) {
	ctx := context.Background()
	j, err := Open(disktest.New(1), "j", blocktest.NewTwin(1<<20, 512), Options{SegmentBytes: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	if err := j.Hold("it", Position{}); err != nil {
		t.Fatal(err)
	}
	total := int64(0)
	for i := range int64(40) {
		n := 512 * (1 + i%9)
		total += n
		if err := j.WriteAt(ctx, make([]byte, n), i*512, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.Zero(ctx, 0, 4096, block.MayTrim); err != nil {
		t.Fatal(err)
	}
	if got := j.Appended(); got != total {
		t.Fatalf("%d bytes appended, counted %d", total, got)
	}
	if p, ok := j.Held("it"); !ok || p != (Position{}) {
		t.Fatal(p, ok)
	}
	if _, ok := j.Held("other"); ok {
		t.Fatal("a hold nobody took")
	}
	a, err := j.Reader(Position{})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := j.Reader(Position{})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	for a.Position() != j.Position() {
		x, err := a.Next(ctx)
		if err != nil {
			t.Fatal(err)
		}
		y, err := b.Skim(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if y.Payload != nil || x.Position != y.Position || x.Type != y.Type || x.Off != y.Off || x.Len != y.Len || x.Flags != y.Flags {
			t.Fatalf("%+v, skimmed %+v", x.Position, y)
		}
	}
}
