package nbd

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"forerun/block"
)

// image makes an empty disk in a file.
func image(t *testing.T, size int64) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestPingAndAbort: a server whose disk takes its time answers pings; one that
// was stopped does not, and is given up without waiting for it.
func TestPingAndAbort(t *testing.T) {
	for name, argv := range map[string][]string{
		"nbdkit":   {"nbdkit", "-f", "--exit-with-parent", "-U", "SOCKET", "--filter=delay", "memory", "4M", "rdelay=30"},
		"qemu-nbd": {"qemu-nbd", "-f", "raw", "-t", "-e", "16", "-k", "SOCKET", "FILE"},
	} {
		t.Run(name, func(t *testing.T) {
			need(t, argv[0])
			for i, a := range argv {
				if a == "FILE" {
					argv[i] = image(t, 4<<20)
				}
			}
			s, tg := serve(t, argv...)
			c := open(t, tg, Options{})
			reads := make(chan error, 8)
			if name == "nbdkit" { // each read takes 30 s
				for range 8 {
					go func() { reads <- c.ReadAt(ctx, make([]byte, 4096), 0, 0) }()
				}
				time.Sleep(50 * time.Millisecond)
			}
			long, cancel := context.WithTimeout(ctx, 20*time.Second)
			defer cancel()
			if err := c.Ping(long); err != nil {
				t.Fatal(err)
			}
			if err := s.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			if name != "nbdkit" {
				for range 8 {
					go func() { reads <- c.WriteAt(ctx, make([]byte, 256<<10), 0, 0) }()
				}
			}
			// All its threads stop in a moment, not at once.
			var err error
			for end := time.Now().Add(20 * time.Second); err == nil && time.Now().Before(end); {
				short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
				err = c.Ping(short)
				cancel()
			}
			kindIs(t, err, block.KindCanceled)
			began := time.Now()
			c.Abort()
			for range 8 {
				kindIs(t, <-reads, block.KindClosed)
			}
			kindIs(t, c.Ping(ctx), block.KindUnavailable)
			kindIs(t, c.ReadAt(ctx, make([]byte, 512), 0, 0), block.KindClosed)
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			kindIs(t, c.Ping(ctx), block.KindClosed)
			if took := time.Since(began); took > closeGrace {
				t.Errorf("giving a stopped server up took %v", took)
			}
		})
	}
}

// TestKeepsWrites: a flush after a lost connection is no doubt when the
// server's acknowledgements outlive it.
func TestKeepsWrites(t *testing.T) {
	need(t, "qemu-nbd")
	s, tg := serve(t, "qemu-nbd", "-f", "raw", "-t", "-e", "16", "-k", "SOCKET", image(t, 4<<20))
	c := open(t, tg, Options{KeepsWrites: true})
	for range 3 {
		if err := c.WriteAt(ctx, make([]byte, 512), 0, 0); err != nil {
			t.Fatal(err)
		}
		s.kill()
		s.start()
		if err := c.Flush(ctx, 0); err != nil {
			t.Fatal(err)
		}
	}
}

func TestList(t *testing.T) {
	need(t, "qemu-nbd")
	_, tg := serve(t, "qemu-nbd", "-f", "raw", "-t", "-x", "some/disk", "-k", "SOCKET", image(t, 1<<20))
	names, err := List(ctx, tg)
	if err != nil || !slices.Equal(names, []string{"some/disk"}) {
		t.Errorf("%q %v", names, err)
	}
	tg.Address += "x"
	_, err = List(ctx, tg)
	kindIs(t, err, block.KindUnavailable)
}
