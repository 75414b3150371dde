package writeback

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"forerun/block"
	"forerun/data/source"
	"forerun/disk/disktest"
)

func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s is not installed", p)
		}
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// TestRealSources writes back to each kind of source there is, and reads with
// other programs what has come.
func TestRealSources(t *testing.T) {
	if testing.Short() {
		t.Skip("other programs are slow")
	}
	const size = 4 << 20
	kinds := map[string]func(t *testing.T, dir string) (spec string, read func() []byte){
		"raw file": func(t *testing.T, dir string) (string, func() []byte) {
			path := filepath.Join(dir, "d.raw")
			if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
				t.Fatal(err)
			}
			return path + "?format=raw", func() []byte { return must[[]byte](t)(os.ReadFile(path)) }
		},
		"qcow2": func(t *testing.T, dir string) (string, func() []byte) {
			need(t, "qemu-img", "qemu-nbd")
			path, out := filepath.Join(dir, "d.qcow2"), filepath.Join(dir, "out")
			run(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
			return path + "?format=qcow2", func() []byte {
				run(t, "qemu-img", "check", "-q", "-f", "qcow2", path)
				run(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, out)
				return must[[]byte](t)(os.ReadFile(out))
			}
		},
		"NBD": func(t *testing.T, dir string) (string, func() []byte) {
			need(t, "qemu-nbd")
			path, sock := filepath.Join(dir, "d.raw"), filepath.Join(dir, "sock")
			if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("qemu-nbd", "-t", "-f", "raw", "-k", sock, path)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				_ = cmd.Process.Signal(syscall.SIGTERM)
				_ = cmd.Wait()
			})
			return "nbd+unix:///?socket=" + sock, func() []byte { return must[[]byte](t)(os.ReadFile(path)) }
		},
		"block device": func(t *testing.T, dir string) (string, func() []byte) {
			need(t, "losetup")
			path := filepath.Join(dir, "d.raw")
			if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := exec.Command("losetup", "--find", "--show", path).CombinedOutput()
			if err != nil {
				t.Skipf("no loop device: %s", out)
			}
			dev := strings.TrimSpace(string(out))
			t.Cleanup(func() { run(t, "losetup", "-d", dev) })
			return dev, func() []byte { return must[[]byte](t)(os.ReadFile(path)) }
		},
	}
	for name, make := range kinds {
		t.Run(name, func(t *testing.T) { realSource(t, size, make) })
	}
}

func realSource(t *testing.T, size int64, make func(t *testing.T, dir string) (string, func() []byte)) {
	ctx := within(t)
	spec, read := make(t, t.TempDir())
	var dev block.Device
	for range 500 { // an NBD server may still be starting
		var err error
		if dev, err = source.Open(ctx, spec, source.Options{WriteImages: true}); err == nil {
			break
		}
		if block.KindOf(err) != block.KindUnavailable {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if dev.Info().ReadOnly || dev.Info().Size != size {
		t.Fatalf("%+v", dev.Info())
	}
	closed := false
	r := must[*Receiver](t)(NewReceiver(ReceiverOptions{FS: disktest.New(1), Dir: "state",
		Source: func(string) (block.Device, error) { return block.NewChecked("source", dev), nil },
		Close: func(context.Context, string) error {
			closed = true
			return dev.Close()
		}}))
	defer r.Close()
	if err := r.Recover(ctx); err != nil {
		t.Fatal(err)
	}
	v := must[*front](t)(openFront(disktest.New(2), "a", size, true))
	defer v.Close()
	s := ship(t, &link{node: "f1", to: r}, v)
	rnd := rand.New(rand.NewPCG(3, 3))
	got := bytes.Clone(v.below.bytes(t))
	for range 3 {
		scribble(t, rnd, v, 60)
		if _, err := s.Checkpoint(ctx); err != nil {
			t.Fatal(err)
		}
		if err := dev.ReadAt(ctx, got, 0, 0); err != nil {
			t.Fatal(err)
		}
		same(t, "through the source", got, v.below.bytes(t))
	}
	scribble(t, rnd, v, 50)
	if err := s.Release(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if !closed {
		t.Fatal("the source was not closed")
	}
	same(t, "for other programs", read(), v.below.bytes(t))
}
