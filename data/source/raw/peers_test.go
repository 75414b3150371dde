package raw

import (
	"bufio"
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"forerun/block"

	"golang.org/x/sys/unix"
)

func need(t *testing.T, name string) string {
	t.Helper()
	p, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is not installed", name)
	}
	return p
}

// TestQEMUIsKeptOut holds the image and lets QEMU's tools try.
func TestQEMUIsKeptOut(t *testing.T) {
	need(t, "qemu-io")
	need(t, "qemu-img")
	path := image(t, 1<<20, nil)
	d := open(t, path, Options{})
	out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 512", path).CombinedOutput()
	if err == nil || !strings.Contains(string(out), `Failed to get "write" lock`) {
		t.Fatalf("qemu-io wrote an image we own: %v %s", err, out)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	ro := open(t, path, Options{ReadOnly: true})
	out, err = exec.Command("qemu-io", "-f", "raw", "-c", "write 0 512", path).CombinedOutput()
	if err == nil || !strings.Contains(string(out), `Failed to get "write" lock`) {
		t.Fatalf("qemu-io wrote an image we own read-only: %v %s", err, out)
	}
	if out, err := exec.Command("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", path).CombinedOutput(); err != nil {
		t.Fatalf("qemu-io cannot read beside a reader: %v %s", err, out)
	}
	if err := ro.Close(); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 512", path).CombinedOutput(); err != nil {
		t.Fatalf("after Close qemu-io cannot write: %v %s", err, out)
	}
}

// TestRunningMachineIsNoticed opens an image that a real QEMU holds.
func TestRunningMachineIsNoticed(t *testing.T) {
	qemu := need(t, "qemu-system-x86_64")
	path := image(t, 1<<20, nil)
	for _, c := range []struct {
		name, opts string
		readonly   bool
		want       block.Kind
	}{
		{"writing", "", false, block.KindBusy},
		{"writing, we only read", "", true, block.KindBusy},
		{"reading, we write", ",read-only=on,file.read-only=on", false, block.KindBusy},
		{"reading, we only read", ",read-only=on,file.read-only=on", true, block.KindNone},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.Command(qemu, "-M", "none", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio",
				"-blockdev", "driver=raw,node-name=d,file.driver=file,file.filename="+path+c.opts,
				"-M", "q35,accel=tcg", "-device", "virtio-blk-pci,drive=d", "-m", "64")
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			outp, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() {
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
			}()
			// A command is answered once the machine is built and its disks are open.
			if _, err := io.WriteString(in, `{"execute":"qmp_capabilities"}`); err != nil {
				t.Fatal(err)
			}
			for sc := bufio.NewScanner(outp); ; {
				if !sc.Scan() {
					_ = cmd.Wait()
					t.Skipf("qemu does not start here: %s", stderr.String())
				}
				if strings.Contains(sc.Text(), "return") {
					break
				}
			}
			d, err := Open(path, Options{ReadOnly: c.readonly})
			kindIs(t, err, c.want)
			if err == nil {
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			} else {
				t.Log(err)
			}
		})
	}
}

// loop makes a loop device over a file, where that is possible.
func loop(t *testing.T, size int64, options ...string) string {
	t.Helper()
	if unix.Geteuid() != 0 {
		t.Skip("loop devices need root")
	}
	need(t, "losetup")
	out, err := exec.Command("losetup", append(options, "--find", "--show", image(t, size, nil))...).CombinedOutput()
	if err != nil {
		t.Skipf("no loop devices here: %s", out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup -d: %s", out)
		}
	})
	return dev
}

func TestBlockDevice(t *testing.T) {
	dev := loop(t, 16<<20)
	d := open(t, dev, Options{})
	in := d.Info()
	t.Logf("%+v", in)
	if in.Size != 16<<20 || in.ReadOnly || in.CanExtents || in.ID == "" {
		t.Fatalf("%+v", in)
	}
	p := bytes.Repeat([]byte{3}, 1<<20)
	if err := d.WriteAt(ctx, p, 1<<20, block.FUA); err != nil {
		t.Fatal(err)
	}
	for _, f := range []block.Flags{0, block.MayTrim, block.FUA} {
		if err := d.Zero(ctx, 1<<20, 4096, f); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Trim(ctx, 1<<20+4096, 4096, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(ctx, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.ReadAt(ctx, p, 1<<20, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p[:8192], make([]byte, 8192)) || p[8192] != 3 {
		t.Fatal("wrong bytes")
	}
	ext, err := d.Extents(ctx, nil, 0, in.Size, 0)
	if err != nil || len(ext) != 1 || ext[0].Kind != block.Data {
		t.Fatal(ext, err)
	}
	_, err = Open(dev, Options{})
	kindIs(t, err, block.KindBusy)
}

// TestLargeBlocks: a device whose logical blocks are larger than a sector can
// free and zero only whole blocks, and is asked for any sectors all the same.
func TestLargeBlocks(t *testing.T) {
	d := open(t, loop(t, 4<<20, "--sector-size", "4096"), Options{})
	want := make([]byte, 64<<10)
	fill := func() {
		for i := range want {
			want[i] = byte(1 + i%255)
		}
		if err := d.WriteAt(ctx, want, 0, 0); err != nil {
			t.Fatal(err)
		}
	}
	got := make([]byte, len(want))
	for _, r := range [][2]int64{{0, 512}, {512, 1024}, {8192, 1024}, {3584, 1024}, {512, 20 << 10}, {4096, 8704}, {4096, 8192}, {0, 64 << 10}} {
		for _, f := range []block.Flags{0, block.MayTrim, block.FUA, block.MayTrim | block.FastZero} {
			fill()
			if err := d.Zero(ctx, r[0], r[1], f); err != nil {
				t.Fatalf("zero %v with %v: %v", r, f, err)
			}
			clear(want[r[0] : r[0]+r[1]])
			if err := d.ReadAt(ctx, got, 0, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Fatalf("zero %v with %v gave other bytes", r, f)
			}
		}
		fill()
		if err := d.Trim(ctx, r[0], r[1], 0); err != nil {
			t.Fatalf("trim %v: %v", r, err)
		}
		if err := d.ReadAt(ctx, got, 0, 0); err != nil {
			t.Fatal(err)
		}
		for i := range got {
			inside := int64(i) >= r[0] && int64(i) < r[0]+r[1]
			if got[i] != want[i] && !(inside && got[i] == 0) {
				t.Fatalf("trim %v changed byte %d", r, i)
			}
		}
	}
}

func TestReadOnlyDevice(t *testing.T) {
	d := open(t, loop(t, 1<<20, "--read-only"), Options{})
	if !d.Info().ReadOnly {
		t.Fatalf("%+v", d.Info())
	}
	kindIs(t, d.WriteAt(ctx, make([]byte, 512), 0, 0), block.KindReadOnly)
}

func TestMountedDeviceIsRefused(t *testing.T) {
	dev := loop(t, 16<<20)
	need(t, "mkfs.ext4")
	if out, err := exec.Command("mkfs.ext4", "-q", dev).CombinedOutput(); err != nil {
		t.Skipf("mkfs.ext4: %s", out)
	}
	dir := filepath.Join(t.TempDir(), "mnt")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(dev, dir, "ext4", 0, ""); err != nil {
		t.Skipf("mount: %v", err)
	}
	for _, ro := range []bool{false, true} {
		_, err := Open(dev, Options{ReadOnly: ro})
		kindIs(t, err, block.KindBusy)
		t.Log(err)
	}
	// The loop device may be busy for a moment after.
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond)
	d, err := Open(dev, Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}
