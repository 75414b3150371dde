package guest

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestKeyFollowsTheRecipe(t *testing.T) {
	a, b := Small(), Small()
	if a.Key() != b.Key() {
		t.Error("the same recipe has two keys")
	}
	b.Packages = b.Packages[1:]
	if a.Key() == b.Key() {
		t.Error("a package less, the same key")
	}
	if _, err := ByName("huge"); err == nil {
		t.Error("there is a huge one")
	}
}

func TestCopyIsSparseAndExact(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	f, err := os.Create(src)
	if err != nil {
		t.Fatal(err)
	}
	f.Truncate(64 << 20)
	for _, at := range []int64{0, 4096, 10 << 20, 64<<20 - 4096} {
		f.WriteAt([]byte(strings.Repeat("forerun!", 512)), at)
	}
	f.Close()
	if err := Copy(dst, src); err != nil {
		t.Fatal(err)
	}
	want, _ := SHA256(src)
	if got, err := SHA256(dst); got != want || err != nil {
		t.Errorf("%s %v, want %s", got, err, want)
	}
	g, _ := os.Open(dst)
	defer g.Close()
	var n int64
	if err := ranges(g, func(_, k int64) error { n += k; return nil }); err != nil || n > 1<<20 {
		t.Errorf("%d bytes allocated, %v", n, err)
	}
}

// TestBoot boots the small image when it is in the cache: building takes
// minutes and is for forerun-lab guest build.
func TestBoot(t *testing.T) {
	if os.Getenv("FORERUN_LAB_BOOT") == "" {
		t.Skip("boots a guest twice, minutes without KVM; set FORERUN_LAB_BOOT=1")
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("qemu-system-x86_64 is missing: forerun-lab setup")
	}
	cache, err := CacheDir()
	if err != nil {
		t.Skip(err)
	}
	im, ok := Cached(cache, Small())
	if !ok {
		t.Skip("no small image in the cache: forerun-lab guest build small")
	}
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk.raw")
	start := time.Now()
	if err := Copy(disk, im.Path); err != nil {
		t.Fatal(err)
	}
	t.Logf("copied in %v", time.Since(start))
	run := func(f func(v *VM)) {
		v, err := Boot(t.Context(), Config{Drive: Drive{File: disk}, Dir: dir}, 5*time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		defer v.Kill()
		t.Logf("ready after %v, guest's clock %v", v.ToReady(), v.Uptime)
		f(v)
		start := time.Now()
		if err := v.Poweroff(2 * time.Minute); err != nil {
			t.Fatal(err)
		}
		t.Logf("off after %v", time.Since(start))
	}
	ok2 := func(v *VM, cmd string) string {
		out, err := v.Run(cmd, 3*time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %s", cmd, strings.TrimSpace(out))
		return out
	}
	run(func(v *VM) {
		ok2(v, "df -m / | tail -1; systemctl is-system-running; systemd-analyze; systemctl --failed --no-legend; true")
		ok2(v, "load write /root/files 7 50 100000")
		ok2(v, "load start /root/log 0.02")
		ok2(v, "load verify /root/files")
		time.Sleep(2 * time.Second)
		ok2(v, "load stop /root/log")
		if _, err := v.Run("false", time.Minute); err == nil {
			t.Error("false was true")
		}
	})
	run(func(v *VM) {
		ok2(v, "load verify /root/files")
		ok2(v, "load check /root/log")
	})
	if _, err := Build(context.Background(), cache, Small(), slog.New(slog.DiscardHandler)); err != nil {
		t.Error(err)
	}
}
