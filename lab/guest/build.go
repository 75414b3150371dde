package guest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// PartitionStart is where the one partition begins, in bytes.
const PartitionStart = 1 << 20

const mbr = "/usr/lib/EXTLINUX/mbr.bin"

// Image is a built guest disk in the cache. Its fields are also kept beside it as JSON.
type Image struct {
	// Path of the raw disk, read-only.
	Path string `json:"path"`
	// Size and Allocated are bytes of the disk and of what it takes on the host.
	Size      int64 `json:"size_bytes"`
	Allocated int64 `json:"allocated_bytes"`
	// SHA256 of the whole disk.
	SHA256 string `json:"sha256"`
	// Seconds it took to build.
	Seconds float64 `json:"build_seconds"`
}

// CacheDir is where images are kept: $FORERUN_LAB_CACHE, else forerun-lab in
// the user's cache directory.
func CacheDir() (string, error) {
	if d := os.Getenv("FORERUN_LAB_CACHE"); d != "" {
		return filepath.Abs(d)
	}
	d, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no cache directory: set FORERUN_LAB_CACHE: %w", err)
	}
	return filepath.Join(d, "forerun-lab"), nil
}

// Cached returns the recipe's image if it was built before.
func Cached(cache string, r Recipe) (Image, bool) {
	var im Image
	b, err := os.ReadFile(filepath.Join(cache, r.Key(), "image.json"))
	if err != nil || json.Unmarshal(b, &im) != nil {
		return Image{}, false
	}
	im.Path = filepath.Join(cache, r.Key(), "disk.raw")
	_, err = os.Stat(im.Path)
	return im, err == nil
}

// Build returns the recipe's image and makes it when the cache does not hold
// it. Of several builders at once one builds and the others wait.
func Build(ctx context.Context, cache string, r Recipe, log *slog.Logger) (Image, error) {
	if im, ok := Cached(cache, r); ok {
		return im, nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return Image{}, err
	}
	lock, err := os.OpenFile(filepath.Join(cache, r.Key()+".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return Image{}, err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return Image{}, fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	if im, ok := Cached(cache, r); ok {
		return im, nil
	}
	for _, p := range []string{"mmdebstrap", "mkfs.ext4", "sfdisk", "extlinux", "mount", "umount"} {
		if _, err := exec.LookPath(p); err != nil {
			return Image{}, fmt.Errorf("building a guest needs %s: run forerun-lab setup: %w", p, err)
		}
	}
	if os.Getuid() != 0 {
		return Image{}, errors.New("building a guest needs root: it mounts the image to install the boot loader")
	}
	b := builder{ctx: ctx, Recipe: r, dir: filepath.Join(cache, r.Key()+".tmp"), log: log}
	// What an interrupted build left is of no use.
	b.umount()
	if err := os.RemoveAll(b.dir); err != nil {
		return Image{}, err
	}
	start := time.Now()
	im, err := b.build()
	b.umount()
	if err != nil {
		return Image{}, errors.Join(fmt.Errorf("build guest %s: %w", r.Key(), err), os.RemoveAll(b.dir))
	}
	im.Seconds = time.Since(start).Seconds()
	j, err := json.MarshalIndent(im, "", "  ")
	if err != nil {
		return Image{}, err
	}
	if err := os.WriteFile(filepath.Join(b.dir, "image.json"), j, 0o644); err != nil {
		return Image{}, err
	}
	if err := os.RemoveAll(filepath.Join(cache, r.Key())); err != nil {
		return Image{}, err
	}
	if err := os.Rename(b.dir, filepath.Join(cache, r.Key())); err != nil {
		return Image{}, err
	}
	im.Path = filepath.Join(cache, r.Key(), "disk.raw")
	log.Info("guest image is built", "path", im.Path, "allocated", im.Allocated, "seconds", im.Seconds)
	return im, nil
}

type builder struct {
	Recipe
	ctx context.Context
	dir string
	log *slog.Logger
}

func (b *builder) path(name string) string { return filepath.Join(b.dir, name) }

func (b *builder) run(stdin string, name string, args ...string) error {
	c := exec.CommandContext(b.ctx, name, args...)
	c.Stdin = strings.NewReader(stdin)
	c.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C", "SOURCE_DATE_EPOCH=1700000000")
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) } // mmdebstrap unmounts what it mounted
	c.WaitDelay = 20 * time.Second
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	if err := c.Run(); err != nil {
		text := out.String()
		if len(text) > 4000 {
			text = "..." + text[len(text)-4000:]
		}
		return fmt.Errorf("%s: %w\n%s", name, err, text)
	}
	return nil
}

func (b *builder) umount() {
	if mnt := b.path("mnt"); exec.Command("mountpoint", "-q", mnt).Run() == nil {
		exec.Command("umount", mnt).Run()
	}
}

func (b *builder) build() (Image, error) {
	if err := os.MkdirAll(b.path("mnt"), 0o755); err != nil {
		return Image{}, err
	}
	for _, step := range []struct {
		what string
		f    func() error
	}{
		{"packages", b.debootstrap},
		{"file system", b.mkfs},
		{"boot loader", b.bootloader},
	} {
		start := time.Now()
		if err := step.f(); err != nil {
			return Image{}, fmt.Errorf("%s: %w", step.what, err)
		}
		b.log.Info("guest image", "step", step.what, "seconds", time.Since(start).Seconds())
	}
	disk := b.path("disk.raw")
	sum, err := SHA256(disk)
	if err != nil {
		return Image{}, err
	}
	var st syscall.Stat_t
	if err := syscall.Stat(disk, &st); err != nil {
		return Image{}, err
	}
	return Image{Size: st.Size, Allocated: st.Blocks * 512, SHA256: sum}, os.Chmod(disk, 0o444)
}

// debootstrap fills root with packages and the lab's own files.
func (b *builder) debootstrap() error {
	for _, f := range []string{"agent", "load", "forerun-ready.service", "forerun.target", "setup.sh"} {
		data, err := files.ReadFile("files/" + f)
		if err != nil {
			return err
		}
		if err := os.WriteFile(b.path(f), data, 0o755); err != nil {
			return err
		}
	}
	args := []string{"--mode=root", "--format=directory", "--variant=important",
		"--include=" + strings.Join(b.Packages, ","),
		`--aptopt=Acquire::Retries "5"`,
		"--customize-hook=copy-in " + b.path("forerun-ready.service") + " " + b.path("forerun.target") + " /etc/systemd/system/",
		"--customize-hook=install -m 755 " + b.path("agent") + ` "$1/usr/local/sbin/forerun-agent"`,
		"--customize-hook=install -m 755 " + b.path("load") + ` "$1/usr/local/bin/load"`,
		"--customize-hook=chmod 644 \"$1/etc/systemd/system/forerun-ready.service\" \"$1/etc/systemd/system/forerun.target\"",
		"--customize-hook=" + b.path("setup.sh") + ` "$1" ` + b.UUID,
		b.Suite, b.path("root")}
	return b.run("", "mmdebstrap", args...)
}

// mkfs makes the disk: a partition table, and a file system filled with root.
func (b *builder) mkfs() error {
	disk := b.path("disk.raw")
	f, err := os.OpenFile(disk, os.O_CREATE|os.O_RDWR|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(b.Size); err != nil {
		return err
	}
	// extlinux cannot read file systems with the 64bit feature.
	if err := b.run("", "mkfs.ext4", "-q", "-F", "-O", "^64bit", "-L", "root", "-U", b.UUID,
		"-E", fmt.Sprintf("offset=%d,hash_seed=%s,lazy_itable_init=0,lazy_journal_init=0", PartitionStart, b.UUID),
		"-d", b.path("root"), disk, fmt.Sprintf("%dk", (b.Size-PartitionStart)>>10)); err != nil {
		return err
	}
	return os.RemoveAll(b.path("root"))
}

func (b *builder) bootloader() error {
	disk := b.path("disk.raw")
	table := fmt.Sprintf("label: dos\nlabel-id: 0x464f5245\nstart=%d, size=%d, type=83, bootable\n", PartitionStart/512, (b.Size-PartitionStart)/512)
	if err := b.run(table, "sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", disk); err != nil {
		return err
	}
	code, err := os.ReadFile(mbr)
	if err != nil {
		return fmt.Errorf("%w: run forerun-lab setup", err)
	}
	f, err := os.OpenFile(disk, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(code[:min(len(code), 440)], 0); err != nil {
		return err
	}
	if err := b.run("", "mount", "-o", fmt.Sprintf("loop,offset=%d,sizelimit=%d", PartitionStart, b.Size-PartitionStart), disk, b.path("mnt")); err != nil {
		return err
	}
	err = b.run("", "extlinux", "--install", b.path("mnt/boot/extlinux"))
	if e := b.run("", "umount", b.path("mnt")); err == nil {
		err = e
	}
	if err == nil {
		err = os.Remove(b.path("mnt"))
	}
	return err
}

// Copy makes a private, sparse copy of src at dst: a reflink where the file
// system can, else the allocated ranges.
func Copy(dst, src string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	st, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer out.Close()
	if unix.IoctlFileClone(int(out.Fd()), int(in.Fd())) == nil {
		return nil
	}
	if err := out.Truncate(st.Size()); err != nil {
		return err
	}
	return ranges(in, func(off, n int64) error {
		if _, err := in.Seek(off, io.SeekStart); err != nil {
			return err
		}
		if _, err := out.Seek(off, io.SeekStart); err != nil {
			return err
		}
		_, err := io.CopyN(out, in, n)
		return err
	})
}

// ranges calls f for each allocated range of file.
func ranges(file *os.File, f func(off, n int64) error) error {
	fd := int(file.Fd())
	for at := int64(0); ; {
		data, err := unix.Seek(fd, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return err
		}
		hole, err := unix.Seek(fd, data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if err := f(data, hole-data); err != nil {
			return err
		}
		at = hole
	}
}

// SHA256 is the hash of a whole file in hexadecimal.
func SHA256(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.CopyBuffer(h, f, make([]byte, 1<<20)); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Zstd is the size in bytes of the whole image under zstd -1, what a plain
// compressed copy of it would send. It is computed once and kept in the cache.
func (im Image) Zstd(ctx context.Context) (int64, error) {
	note := filepath.Join(filepath.Dir(im.Path), "zstd1")
	var n int64
	if b, err := os.ReadFile(note); err == nil {
		if _, err := fmt.Sscan(string(b), &n); err == nil {
			return n, nil
		}
	}
	c := exec.CommandContext(ctx, "zstd", "-1", "-q", "-c", im.Path)
	c.Stdout = counter{&n}
	if err := c.Run(); err != nil {
		return 0, fmt.Errorf("zstd -1 %s: %w", im.Path, err)
	}
	return n, os.WriteFile(note, fmt.Appendln(nil, n), 0o644)
}

type counter struct{ n *int64 }

func (c counter) Write(p []byte) (int, error) {
	*c.n += int64(len(p))
	return len(p), nil
}
