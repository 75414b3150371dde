package guest

import (
	"bufio"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Drive is where the guest's disk comes from: exactly one of File, Unix and Host is set.
type Drive struct {
	// File is the path of a raw image. The guest writes to it.
	File string
	// Unix is the path of the socket of an NBD server.
	Unix string
	// Host is the "host:port" of an NBD server.
	Host string
	// Export is the name the NBD server knows the disk by.
	Export string
}

func (d Drive) blockdev() (string, error) {
	switch {
	case d.File != "":
		return "driver=raw,node-name=disk,discard=unmap,file.driver=file,file.filename=" + escape(d.File), nil
	case d.Unix != "":
		return "driver=nbd,node-name=disk,discard=unmap,server.type=unix,server.path=" + escape(d.Unix) + ",export=" + escape(d.Export), nil
	case d.Host != "":
		host, port, err := net.SplitHostPort(d.Host)
		if err != nil {
			return "", err
		}
		return "driver=nbd,node-name=disk,discard=unmap,server.type=inet,server.host=" + escape(host) + ",server.port=" + port + ",export=" + escape(d.Export), nil
	}
	return "", errors.New("the drive names no disk")
}

// escape doubles commas, as QEMU's option syntax wants it.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// Command makes a command to run; exec.CommandContext, or a site's.
type Command func(ctx context.Context, name string, args ...string) *exec.Cmd

// Config says how to boot.
type Config struct {
	Drive Drive
	// Dir takes the console log and the sockets; it must have a short path.
	Dir string
	// MemMB is the memory, 0 is 512.
	MemMB int
	// Accel is "tcg" or "kvm"; empty is $FORERUN_LAB_ACCEL, else tcg.
	Accel string
	// Command runs QEMU, nil is on this host.
	Command Command
}

// VM is a running guest. Its methods are for one goroutine, Kill and Exited excepted.
type VM struct {
	// Started is when QEMU was started, Ready when the guest said that
	// multi-user.target is reached, Uptime what its own clock said then.
	Started, Ready time.Time
	Uptime         time.Duration

	cmd     *exec.Cmd
	conn    net.Conn
	in      *bufio.Reader
	serial  int
	console string
	log     *os.File
	exited  chan struct{}
	err     error // how QEMU ended, after exited
	kill    sync.Once
}

// Start starts QEMU and returns at once; WaitReady waits for the guest.
func Start(ctx context.Context, c Config) (*VM, error) {
	if c.MemMB == 0 {
		c.MemMB = 512
	}
	if c.Accel == "" {
		c.Accel = os.Getenv("FORERUN_LAB_ACCEL")
	}
	cpu := "host"
	if c.Accel != "kvm" {
		c.Accel, cpu = "tcg", "qemu64"
	}
	if c.Command == nil {
		c.Command = func(ctx context.Context, name string, args ...string) *exec.Cmd {
			cmd := exec.CommandContext(ctx, name, args...)
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			return cmd
		}
	}
	disk, err := c.Drive.blockdev()
	if err != nil {
		return nil, err
	}
	sock := filepath.Join(c.Dir, "agent.sock")
	os.Remove(sock)
	ln, err := net.Listen("unix", sock)
	if err != nil {
		return nil, err
	}
	defer ln.Close()
	v := &VM{console: filepath.Join(c.Dir, "console.log"), exited: make(chan struct{})}
	if v.log, err = os.Create(filepath.Join(c.Dir, "qemu.log")); err != nil {
		return nil, err
	}
	v.cmd = c.Command(ctx, "qemu-system-x86_64",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "pc", "-accel", c.Accel, "-cpu", cpu, "-smp", "1", "-m", strconv.Itoa(c.MemMB),
		"-chardev", "file,id=console,path="+escape(v.console), "-serial", "chardev:console",
		"-blockdev", disk, "-device", "virtio-blk-pci,drive=disk,bootindex=0",
		"-device", "virtio-rng-pci",
		"-chardev", "socket,id=agent,path="+escape(sock),
		"-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=forerun")
	v.cmd.Stdout, v.cmd.Stderr = v.log, v.log
	v.Started = time.Now()
	if err := v.cmd.Start(); err != nil {
		v.log.Close()
		return nil, fmt.Errorf("start qemu: %w", err)
	}
	go func() {
		v.err = v.cmd.Wait()
		close(v.exited)
	}()
	ln.(*net.UnixListener).SetDeadline(time.Now().Add(30 * time.Second))
	accepted := make(chan struct{})
	go func() {
		// A QEMU that fails at once never connects.
		select {
		case <-v.exited:
			ln.Close()
		case <-accepted:
		}
	}()
	v.conn, err = ln.Accept()
	close(accepted)
	if err != nil {
		v.Kill()
		return nil, fmt.Errorf("qemu did not come up: %w%s", err, v.tail())
	}
	v.in = bufio.NewReaderSize(v.conn, 64<<10)
	return v, nil
}

// Boot is Start and WaitReady; a guest that does not get ready is killed.
func Boot(ctx context.Context, c Config, limit time.Duration) (*VM, error) {
	v, err := Start(ctx, c)
	if err != nil {
		return nil, err
	}
	if err := v.WaitReady(limit); err != nil {
		v.Kill()
		return nil, err
	}
	return v, nil
}

// WaitReady waits until the guest is ready, at most limit after Started.
func (v *VM) WaitReady(limit time.Duration) error {
	v.conn.SetReadDeadline(v.Started.Add(limit))
	for {
		line, err := v.in.ReadString('\n')
		if err != nil {
			return fmt.Errorf("the guest is not ready %.0f s after its start: %w%s", time.Since(v.Started).Seconds(), err, v.tail())
		}
		if up, ok := strings.CutPrefix(strings.TrimSpace(line), "FORERUN-READY "); ok {
			v.Ready = time.Now()
			s, _ := strconv.ParseFloat(up, 64)
			v.Uptime = time.Duration(s * float64(time.Second))
			return nil
		}
	}
}

// ToReady is the time from the start of QEMU to the ready guest.
func (v *VM) ToReady() time.Duration { return v.Ready.Sub(v.Started) }

// Run runs a shell command in the guest and returns what it printed. A status
// other than 0 is an error that holds the output.
func (v *VM) Run(command string, limit time.Duration) (string, error) {
	v.serial++
	id := strconv.Itoa(v.serial)
	v.conn.SetDeadline(time.Now().Add(limit))
	if _, err := fmt.Fprintf(v.conn, "%s %s\n", id, base64.StdEncoding.EncodeToString([]byte(command))); err != nil {
		return "", fmt.Errorf("guest: %s: %w%s", command, err, v.tail())
	}
	for {
		line, err := v.in.ReadString('\n')
		if err != nil {
			return "", fmt.Errorf("guest: %s: %w%s", command, err, v.tail())
		}
		f := strings.Split(strings.TrimSpace(line), " ")
		if len(f) < 2 || f[0] != id {
			continue // a late answer, or the agent was restarted
		}
		var out []byte
		if len(f) > 2 {
			if out, err = base64.StdEncoding.DecodeString(f[2]); err != nil {
				return "", fmt.Errorf("guest: %s: answer: %w", command, err)
			}
		}
		if f[1] != "0" {
			return string(out), fmt.Errorf("guest: %s: status %s: %s", command, f[1], strings.TrimSpace(string(out)))
		}
		return string(out), nil
	}
}

// Poweroff shuts the guest down cleanly and waits until QEMU has ended.
func (v *VM) Poweroff(limit time.Duration) error {
	v.conn.SetDeadline(time.Now().Add(limit))
	v.serial++
	order := base64.StdEncoding.EncodeToString([]byte("sync; systemctl --no-block poweroff"))
	if _, err := fmt.Fprintf(v.conn, "%d %s\n", v.serial, order); err != nil {
		return fmt.Errorf("guest: poweroff: %w", err)
	}
	select {
	case <-v.exited:
		v.Kill()
		if v.err != nil {
			return fmt.Errorf("qemu: %w%s", v.err, v.tail())
		}
		return nil
	case <-time.After(limit):
		v.Kill()
		return fmt.Errorf("the guest did not power off in %v%s", limit, v.tail())
	}
}

// Exited is closed when QEMU has ended.
func (v *VM) Exited() <-chan struct{} { return v.exited }

// Kill ends QEMU if it runs, waits for it, and releases what belongs to the VM.
func (v *VM) Kill() {
	v.kill.Do(func() {
		select {
		case <-v.exited:
		default:
			v.cmd.Process.Kill()
			<-v.exited
		}
		if v.conn != nil {
			v.conn.Close()
		}
		v.log.Close()
	})
}

// tail is the end of QEMU's and the guest's last words, for errors.
func (v *VM) tail() string {
	var b strings.Builder
	for _, f := range []string{v.log.Name(), v.console} {
		text, err := os.ReadFile(f)
		if err != nil || len(text) == 0 {
			continue
		}
		fmt.Fprintf(&b, "\n--- end of %s\n%s", f, text[max(0, len(text)-1500):])
	}
	return b.String()
}
