package rig

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Command makes a command to run: Local, or the method of a site of lab/netns.
type Command func(ctx context.Context, name string, args ...string) *exec.Cmd

// Local runs on this host. The program dies with this process.
func Local(ctx context.Context, name string, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, name, args...)
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return c
}

// Proc is a process that runs until it is told to end.
type Proc struct {
	Name string
	Log  string // file that holds its output

	cmd    *exec.Cmd
	out    *os.File
	exited chan struct{}
	err    error
}

// Launch starts cmd with its output appended to the file log.
func Launch(cmd *exec.Cmd, name, log string) (*Proc, error) {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	p := &Proc{Name: name, Log: log, cmd: cmd, out: out, exited: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		out.Close()
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		p.err = cmd.Wait()
		out.Close()
		close(p.exited)
	}()
	return p, nil
}

// Exited is closed when the process has ended.
func (p *Proc) Exited() <-chan struct{} { return p.exited }

// Kill is kill -9, and waits.
func (p *Proc) Kill() {
	p.cmd.Process.Kill()
	<-p.exited
}

// Signal sends a signal to the process.
func (p *Proc) Signal(sig syscall.Signal) { p.cmd.Process.Signal(sig) }

// Pid is the process's id.
func (p *Proc) Pid() int { return p.cmd.Process.Pid }

// Stop asks the process to end, and kills it after limit. An error says that
// it had to be killed or did not end well.
func (p *Proc) Stop(limit time.Duration) error {
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(limit):
		p.Kill()
		return p.Trouble(fmt.Sprintf("did not end within %v of SIGTERM", limit))
	}
	if p.err != nil {
		return p.Trouble("ended badly: " + p.err.Error())
	}
	return nil
}

// CPU is the processor time the process has used so far, or in all when it has ended.
func (p *Proc) CPU() time.Duration {
	select {
	case <-p.exited:
		return p.cmd.ProcessState.UserTime() + p.cmd.ProcessState.SystemTime()
	default:
	}
	return cpuOf(p.cmd.Process.Pid)
}

// Memory is the largest resident set of the running process in bytes, 0 when unknown.
func (p *Proc) Memory() int64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	var kb int64
	if i := strings.Index(string(b), "VmHWM:"); i >= 0 {
		fmt.Sscanf(string(b)[i:], "VmHWM: %d", &kb)
	}
	return kb << 10
}

func cpuOf(pid int) time.Duration {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	i := strings.LastIndexByte(string(b), ')')
	f := strings.Fields(string(b)[i+1:])
	if len(f) < 14 {
		return 0
	}
	var u, s int64
	fmt.Sscan(f[11], &u)
	fmt.Sscan(f[12], &s)
	return time.Duration(u+s) * (time.Second / 100) // USER_HZ is 100 on every Linux
}

// Trouble is an error about the process, with its last words.
func (p *Proc) Trouble(what string) error {
	text, _ := os.ReadFile(p.Log)
	return fmt.Errorf("%s %s; the end of %s:\n%s", p.Name, what, p.Log, text[max(0, len(text)-2000):])
}

// Until calls ready every 50 ms until it answers true. It fails when the
// process ends, limit has passed or ctx ends.
func (p *Proc) Until(ctx context.Context, limit time.Duration, what string, ready func() bool) error {
	timeout := time.After(limit)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !ready() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.exited:
			return p.Trouble("ended before " + what)
		case <-timeout:
			return p.Trouble(fmt.Sprintf("not %s after %v", what, limit))
		case <-tick.C:
		}
	}
	return nil
}

// Binary finds the product: $FORERUN_BIN, else it builds ./cmd/forerun of the
// module that holds the current directory into dir.
func Binary(ctx context.Context, dir string) (string, error) {
	if b := os.Getenv("FORERUN_BIN"); b != "" {
		return filepath.Abs(b)
	}
	mod, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	root := filepath.Dir(strings.TrimSpace(string(mod)))
	if err != nil || root == "." || root == "/dev" {
		return "", errors.New("no forerun binary: set FORERUN_BIN, or run inside the source tree")
	}
	bin := filepath.Join(dir, "forerun")
	c := exec.CommandContext(ctx, "go", "build", "-o", bin, "./cmd/forerun")
	c.Dir = root
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := c.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build ./cmd/forerun: %w\n%s", err, out)
	}
	return bin, nil
}
