package stack

import (
	"context"
	"io"
	"log/slog"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
)

// full is a device whose disk has no space until a moment.
type full struct {
	block.Device
	until time.Time
	tries int
}

func (f *full) WriteAt(context.Context, []byte, int64, block.Flags) error {
	f.tries++
	if time.Now().Before(f.until) {
		return block.E("write", "disk", block.KindNoSpace, syscall.ENOSPC)
	}
	return nil
}

func TestPatienceOutlastsAFullDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &full{until: time.Now().Add(10 * time.Second)}
		p := newPatience(f, slog.New(slog.NewTextHandler(io.Discard, nil)), time.Second)
		done := make(chan error)
		go func() { done <- p.WriteAt(context.Background(), make([]byte, 512), 0, 0) }()
		time.Sleep(5*time.Second + time.Millisecond)
		synctest.Wait()
		if p.Waiting() == "" {
			t.Error("nothing says that a write waits")
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if p.Waiting() != "" || f.tries < 10 {
			t.Errorf("after %d tries still waiting: %q", f.tries, p.Waiting())
		}
	})
}

func TestPatienceEndsWithItsCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &full{until: time.Now().Add(time.Hour)}
		p := newPatience(f, slog.New(slog.NewTextHandler(io.Discard, nil)), time.Second)
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		if err := p.WriteAt(ctx, make([]byte, 512), 0, 0); block.KindOf(err) != block.KindNoSpace {
			t.Fatalf("the caller gave up and got %v", err)
		}
	})
}
