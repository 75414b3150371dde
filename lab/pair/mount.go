package pair

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"forerun/lab/rig"
)

// mountRoot holds the mount points of all runs, each under the id of its process.
const mountRoot = "/run/forerun-lab"

var mounts atomic.Int64

// Mount is a disk as the kernel of this machine sees it: nbdfuse makes an
// export a file, a loop device makes a file a disk, and the disk's file system
// is mounted.
type Mount struct {
	// Dir is where the file system is, Device the loop device.
	Dir, Device string

	root, file string
	fuse       *rig.Proc
	mounted    bool
}

// output runs a program of the system.
func output(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

// MountExport mounts the file system on the export at uri. log takes what
// nbdfuse says.
func MountExport(ctx context.Context, uri, log string) (*Mount, error) {
	return mountDisk(ctx, uri, log)
}

// MountFile mounts the file system in the raw image at path.
func MountFile(ctx context.Context, path string) (*Mount, error) { return mountDisk(ctx, path, "") }

func mountDisk(ctx context.Context, what, log string) (m *Mount, err error) {
	m = &Mount{root: filepath.Join(mountRoot, strconv.Itoa(os.Getpid()), strconv.FormatInt(mounts.Add(1), 10))}
	m.Dir, m.file = filepath.Join(m.root, "fs"), filepath.Join(m.root, "fuse", "disk")
	for _, d := range []string{m.Dir, filepath.Dir(m.file)} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
			m = nil
		}
	}()
	if log == "" {
		m.file = what
	} else if err = m.export(ctx, what, log); err != nil {
		return m, err
	}
	// Direct: what the file system flushes is in the export, not in the page cache of the file.
	dev, err := output(ctx, "losetup", "--find", "--show", "--direct-io=on", m.file)
	if err != nil {
		return m, err
	}
	m.Device = strings.TrimSpace(dev)
	return m, m.Attach(ctx)
}

// export runs nbdfuse.
func (m *Mount) export(ctx context.Context, uri, log string) (err error) {
	if m.fuse, err = rig.Launch(rig.Local(context.WithoutCancel(ctx), "nbdfuse", m.file, uri), "nbdfuse", log); err != nil {
		return err
	}
	return m.fuse.Until(ctx, 30*time.Second, "serving the export as a file", func() bool {
		st, err := os.Stat(m.file)
		return err == nil && st.Size() > 0
	})
}

// Attach mounts the file system again after Detach.
func (m *Mount) Attach(ctx context.Context) error {
	if _, err := output(ctx, "mount", "-t", "ext4", "-o", "errors=remount-ro", m.Device, m.Dir); err != nil {
		return err
	}
	m.mounted = true
	return nil
}

// Detach unmounts the file system and keeps the disk.
func (m *Mount) Detach(ctx context.Context) error {
	if !m.mounted {
		return nil
	}
	if _, err := output(ctx, "umount", m.Dir); err != nil {
		return err
	}
	m.mounted = false
	return nil
}

// Check is e2fsck on the detached disk, which must find nothing.
func (m *Mount) Check(ctx context.Context) error { return fsck(ctx, m.Device) }

// fsck looks for damage and mends nothing. The journal of the file system has
// been replayed by mounting it: e2fsck would mend what it finds beside it.
func fsck(ctx context.Context, disk string) error {
	if _, err := output(ctx, "e2fsck", "-f", "-n", disk); err != nil {
		return fmt.Errorf("the file system is damaged: %w", err)
	}
	return nil
}

// Close takes everything apart: gently when the export answers, else by force.
func (m *Mount) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	err := m.Detach(ctx)
	if err != nil && m.fuse != nil {
		m.fuse.Kill() // what hangs on it fails now
	}
	return errors.Join(err, m.clear())
}

func (m *Mount) clear() error {
	if m.mounted {
		syscall.Unmount(m.Dir, syscall.MNT_DETACH)
		m.mounted = false
	}
	var errs []error
	if m.Device != "" {
		_, err := output(context.Background(), "losetup", "--detach", m.Device)
		errs = append(errs, err)
		m.Device = ""
	}
	if m.fuse != nil {
		// The loop device lets go of the file in its own time.
		for end := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			err := syscall.Unmount(filepath.Dir(m.file), 0)
			if err == nil || errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.ENOENT) {
				break
			}
			if time.Now().After(end) {
				syscall.Unmount(filepath.Dir(m.file), syscall.MNT_DETACH)
				break
			}
		}
		select {
		case <-m.fuse.Exited():
		case <-time.After(5 * time.Second):
			m.fuse.Kill()
		}
		m.fuse = nil
	}
	errs = append(errs, os.RemoveAll(m.root))
	os.Remove(filepath.Dir(m.root)) // when it was the last
	return errors.Join(errs...)
}

// Clean removes mounts and loop devices of runs whose process is gone.
func Clean() error {
	runs, err := os.ReadDir(mountRoot)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range runs {
		id, err := strconv.Atoi(r.Name())
		if err != nil || syscall.Kill(id, 0) != syscall.ESRCH {
			continue
		}
		errs = append(errs, cleanRun(filepath.Join(mountRoot, r.Name())))
	}
	return errors.Join(errs...)
}

func cleanRun(dir string) error {
	table, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	var points []string
	for _, l := range strings.Split(string(table), "\n") {
		if f := strings.Fields(l); len(f) > 1 && strings.HasPrefix(f[1], dir+"/") {
			points = append(points, f[1])
		}
	}
	for i := len(points) - 1; i >= 0; i-- { // newest first
		syscall.Unmount(points[i], syscall.MNT_DETACH)
	}
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err == nil && strings.HasPrefix(string(b), dir+"/") {
			exec.Command("losetup", "--detach", "/dev/"+strings.Split(f, "/")[3]).Run()
		}
	}
	return os.RemoveAll(dir)
}
