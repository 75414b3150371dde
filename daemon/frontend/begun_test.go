package frontend

import (
	"context"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"forerun/data/stack"
)

// TestAwaitOpen: a volume whose backend is away holds the others back for
// newGrace, from when the first one is open, and no longer.
func TestAwaitOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &Frontend{cfg: Config{Volumes: []string{"a", "b"}}, log: slog.New(slog.DiscardHandler), volumes: map[string]*stack.Volume{},
			begun: begun{first: true, some: make(chan struct{}), all: make(chan struct{})}}
		open := func(name string) {
			f.mu.Lock()
			f.volumes[name] = nil
			f.mu.Unlock()
			f.told()
		}
		await := func(want time.Duration) {
			t.Helper()
			began := time.Now()
			if !f.awaitOpen(t.Context()) || time.Since(began) != want {
				t.Errorf("served after %v, want %v", time.Since(began), want)
			}
		}
		f.told()
		time.AfterFunc(time.Hour, func() { open("a") })
		await(time.Hour + newGrace)
		time.AfterFunc(time.Second, func() { open("b") })
		await(time.Second)
		await(0)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		f.begun.some, f.begun.all = make(chan struct{}), make(chan struct{})
		if f.awaitOpen(ctx) {
			t.Error("it was told to stop, and serves")
		}
		if !f.strict() {
			t.Error("nothing is served at a first start, and a mistake is a wait")
		}
		f.begun.serving.Store(true)
		if f.strict() {
			t.Error("workloads run, and a mistake of one volume ends the daemon")
		}
	})
}
