package netns

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	prefix = "forerun-lab-" // names are prefix, pid, number, side
	runDir = "/run/netns"
	device = "wan0"
)

// Site is one end of the line: a network namespace.
type Site struct {
	// Name is the namespace's, as ip netns knows it.
	Name string
	// Addr is the site's address on the line.
	Addr string
}

// Command is exec.CommandContext inside the site. The program is killed when
// this process dies. Its process id is the program's own.
func (s Site) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	all := append([]string{"--net=" + filepath.Join(runDir, s.Name), "--", name}, args...)
	c := exec.CommandContext(ctx, "nsenter", all...)
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return c
}

// Do calls f on a thread that is inside the site: sockets f opens belong
// there. Goroutines that f starts do not.
func (s Site) Do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			done <- err
			return
		}
		err = func() error {
			fd, err := unix.Open(filepath.Join(runDir, s.Name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return fmt.Errorf("open namespace %s: %w", s.Name, err)
			}
			defer unix.Close(fd)
			if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter namespace %s: %w", s.Name, err)
			}
			return f()
		}()
		// The thread must come home and live: a thread that ends takes the
		// programs with it that it started with a parent-death signal. Only
		// one that cannot come home stays locked, and ends.
		if unix.Setns(home, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		unix.Close(home)
		done <- err
	}()
	return <-done
}

func ip(args ...string) error {
	out, err := exec.Command("ip", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// openTUN makes the site's line device and returns the descriptor of its near side.
func (s Site) openTUN(mtu int, offload bool) (int, error) {
	tun := -1
	err := s.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("open /dev/net/tun: %w", err)
		}
		req, err := unix.NewIfreq(device)
		if err != nil {
			unix.Close(fd)
			return err
		}
		flags := uint16(unix.IFF_TUN | unix.IFF_NO_PI)
		if offload {
			flags |= unix.IFF_VNET_HDR
		}
		req.SetUint16(flags)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
			unix.Close(fd)
			return fmt.Errorf("make %s in %s: %w", device, s.Name, err)
		}
		if offload {
			const csum, tso4 = 1, 2 // linux/if_tun.h: TUN_F_CSUM, TUN_F_TSO4
			if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, csum|tso4); err != nil {
				unix.Close(fd)
				return fmt.Errorf("set offloads of %s in %s: %w", device, s.Name, err)
			}
		}
		tun = fd
		return nil
	})
	if err != nil {
		return -1, err
	}
	peer := addrTarget
	if s.Addr == addrTarget {
		peer = addrSource
	}
	for _, args := range [][]string{
		{"-n", s.Name, "link", "set", "lo", "up"},
		{"-n", s.Name, "link", "set", device, "addrgenmode", "none", "mtu", strconv.Itoa(mtu), "txqueuelen", "2000"},
		{"-n", s.Name, "link", "set", device, "up"},
		{"-n", s.Name, "addr", "add", s.Addr, "peer", peer, "dev", device},
	} {
		if err := ip(args...); err != nil {
			unix.Close(tun)
			return -1, err
		}
	}
	return tun, nil
}

// Clean removes namespaces of runs whose process is gone. Open calls it.
func Clean() error {
	names, err := os.ReadDir(runDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range names {
		rest, ok := strings.CutPrefix(n.Name(), prefix)
		if !ok {
			continue
		}
		pid, _, _ := strings.Cut(rest, "-")
		id, err := strconv.Atoi(pid)
		if err != nil || syscall.Kill(id, 0) != syscall.ESRCH {
			continue
		}
		if err := ip("netns", "delete", n.Name()); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// congestion selects the TCP congestion control of the site.
func (s Site) congestion(name string) error {
	return s.Do(func() error {
		// The file under /proc/sys/net shows the namespace of the thread that opens it.
		return os.WriteFile("/proc/thread-self/root/proc/sys/net/ipv4/tcp_congestion_control", []byte(name), 0)
	})
}
