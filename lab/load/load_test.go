package load

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"forerun/lab/oracle"
)

// serve runs qemu-nbd on a fresh base image and returns its socket.
func serve(t *testing.T, seed uint64, size int64) (cmd *exec.Cmd, disk, sock string) {
	t.Helper()
	if _, err := exec.LookPath("qemu-nbd"); err != nil {
		t.Skip("qemu-nbd is missing: install qemu-utils")
	}
	disk = filepath.Join(t.TempDir(), "disk.raw")
	if err := oracle.WriteBase(disk, seed, size); err != nil {
		t.Fatal(err)
	}
	cmd, sock = restart(t, disk)
	return cmd, disk, sock
}

// restart runs another server on disk. The one before it has ended: while a
// killed process dies, its socket still takes connections, and resets them.
func restart(t *testing.T, disk string) (*exec.Cmd, string) {
	t.Helper()
	sock := filepath.Join(filepath.Dir(disk), "s")
	os.Remove(sock)
	cmd := exec.Command("qemu-nbd", "-f", "raw", "-t", "-e", "4", "-x", "d", "-k", sock, disk)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		c, err := Dial(t.Context(), sock, "d")
		if err == nil {
			c.Close()
			return cmd, sock
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// TestRightServer loads a real server, kills it, and finds everything in order.
func TestRightServer(t *testing.T) {
	const seed, size = 3, 16 << 20
	cmd, disk, sock := serve(t, seed, size)
	h := oracle.New(seed, size)
	c, err := Dial(t.Context(), sock, "d")
	if err != nil {
		t.Fatal(err)
	}
	if c.Size != size {
		t.Fatalf("size %d", c.Size)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	st, err := Run(ctx, c, h, Config{Seed: 1})
	if err != nil || st.Writes == 0 || st.Reads == 0 || st.Flushes == 0 {
		t.Fatalf("%+v %v", st, err)
	}
	timer := time.AfterFunc(300*time.Millisecond, func() { cmd.Process.Kill() })
	defer timer.Stop()
	if st, err = Run(t.Context(), c, h, Config{Seed: 2}); err == nil {
		t.Fatal("the server was killed and nobody noticed")
	}
	var w *oracle.Wrong
	if errors.As(err, &w) {
		t.Fatal(err)
	}
	<-c.Done()
	cmd.Wait()
	h.Crash()
	_, sock = restart(t, disk)
	if c, err = Dial(t.Context(), sock, "d"); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := h.Verify(c); err != nil {
		t.Error(err)
	}
	t.Logf("%+v %+v", st, h.Stats())
}

// TestWrongByteIsFound turns one byte behind the server's back.
func TestWrongByteIsFound(t *testing.T) {
	const seed, size = 4, 4 << 20
	_, _, sock := serve(t, seed, size)
	h := oracle.New(seed, size)
	c, err := Dial(t.Context(), sock, "d")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := h.Verify(c); err != nil {
		t.Fatal(err)
	}
	if err := c.WriteAt([]byte{0xff}, 100_000, true); err != nil {
		t.Fatal(err)
	}
	var w *oracle.Wrong
	if err := h.Verify(c); !errors.As(err, &w) || w.Sector != 100_000/512 {
		t.Error(err)
	}
	if _, err := c.ReadAt(make([]byte, 512), size); !errors.Is(err, ErrRefused) {
		t.Errorf("a read beyond the end: %v", err)
	}
	if _, err := Dial(t.Context(), sock, "other"); err == nil {
		t.Error("an export that is not there was opened")
	}
}
