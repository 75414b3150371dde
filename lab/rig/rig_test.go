package rig

import (
	"context"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"forerun/api"
)

func launch(t *testing.T, script string) *Proc {
	t.Helper()
	p, err := Launch(Local(context.WithoutCancel(t.Context()), "sh", "-c", script), "it", filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	return p
}

func TestStop(t *testing.T) {
	good := launch(t, `trap 'exit 0' TERM; while :; do sleep 0.05; done`)
	time.Sleep(100 * time.Millisecond)
	if err := good.Stop(5 * time.Second); err != nil {
		t.Error(err)
	}
	bad := launch(t, `trap 'echo last words; exit 3' TERM; while :; do sleep 0.05; done`)
	time.Sleep(100 * time.Millisecond)
	if err := bad.Stop(5 * time.Second); err == nil || !strings.Contains(err.Error(), "last words") {
		t.Error(err)
	}
	deaf := launch(t, `trap '' TERM; while :; do sleep 0.05; done`)
	time.Sleep(100 * time.Millisecond)
	if err := deaf.Stop(200 * time.Millisecond); err == nil {
		t.Error("a process that does not end was stopped without a word")
	}
	<-deaf.Exited()
}

func TestUntil(t *testing.T) {
	p := launch(t, "echo no luck; exit 1")
	if err := p.Until(t.Context(), 5*time.Second, "ready", func() bool { return false }); err == nil || !strings.Contains(err.Error(), "no luck") {
		t.Error(err)
	}
	p = launch(t, "sleep 30")
	if err := p.Until(t.Context(), 100*time.Millisecond, "ready", func() bool { return false }); err == nil {
		t.Error("it was ready")
	}
	n := 0
	if err := p.Until(t.Context(), 5*time.Second, "ready", func() bool { n++; return n == 3 }); err != nil {
		t.Error(err)
	}
	if p.Memory() <= 0 || p.CPU() < 0 {
		t.Error(p.Memory(), p.CPU())
	}
}

func TestHere(t *testing.T) {
	v := api.Volume{SizeBytes: 10 << 16, ChunkBytes: 1 << 16, Chunks: api.Chunks{Absent: 4}}
	if Here(v) != 6<<16 || Filled(v) {
		t.Error(Here(v))
	}
}
