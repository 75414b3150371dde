package rig

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"forerun/api"
	"forerun/api/client"
)

// Disk is one volume and what it is at the source.
type Disk struct {
	// Volume is its name, Source what the backend is given as its source.
	Volume, Source string
}

// Rig is one backend and one frontend that carry one volume or several.
type Rig struct {
	// Bin is the forerun binary, Dir takes all state and logs.
	Bin, Dir string
	// Volume is the volume's name.
	Volume string
	// Source is what the backend is given as the volume's source.
	Source string
	// More are volumes beside it, at the same backend and frontend.
	More []Disk
	// Listen is the backend's HOST:PORT.
	Listen string
	// BackendHosts are the names and addresses in its certificate.
	BackendHosts []string
	// AtSource and AtTarget run the two daemons; nil is Local.
	AtSource, AtTarget Command
	// Policy is what becomes of changes; empty is isolated, so that the source can
	// be compared with what it was.
	Policy string
	// FrontendArgs are appended to the frontend's command line.
	FrontendArgs []string
	// BackendArgs are appended to the backend's command line.
	BackendArgs []string

	Backend, Frontend *Proc
}

// Socket is the frontend's NBD socket.
func (r *Rig) Socket() string { return filepath.Join(r.Dir, "nbd.sock") }

// FrontendState is the frontend's state directory.
func (r *Rig) FrontendState() string { return filepath.Join(r.Dir, "frontend") }

// BackendState is the backend's state directory.
func (r *Rig) BackendState() string { return filepath.Join(r.Dir, "backend") }

// URI is the frontend's export as NBD tools want it.
func (r *Rig) URI() string { return "nbd+unix:///" + r.Volume + "?socket=" + r.Socket() }

// disks are all volumes, the first one first.
func (r *Rig) disks() []Disk { return append([]Disk{{r.Volume, r.Source}}, r.More...) }

// Run runs a forerun command to its end and returns what it printed.
func (r *Rig) Run(ctx context.Context, args ...string) (string, error) {
	c := Local(ctx, r.Bin, args...)
	var out, msg bytes.Buffer
	c.Stdout, c.Stderr = &out, &msg
	if err := c.Run(); err != nil {
		return out.String(), fmt.Errorf("forerun %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(msg.String()))
	}
	return out.String(), nil
}

// PKI makes the certificates, once.
func (r *Rig) PKI(ctx context.Context) error {
	dir := filepath.Join(r.Dir, "pki")
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	for _, args := range [][]string{
		{"pki", "init", "--dir", dir},
		{"pki", "issue", "--dir", dir, "--role", "backend", "--name", "source", "--host", strings.Join(r.BackendHosts, ",")},
		{"pki", "issue", "--dir", dir, "--role", "frontend", "--name", "target", "--host", "localhost,127.0.0.1"},
	} {
		if _, err := r.Run(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}

func local(c Command) Command {
	if c == nil {
		return Local
	}
	return c
}

// StartBackend starts the backend and waits until it answers.
func (r *Rig) StartBackend(ctx context.Context) (err error) {
	args := append([]string{"backend", "--pki", filepath.Join(r.Dir, "pki"), "--name", "source", "--state", r.BackendState(),
		"--listen", r.Listen}, r.BackendArgs...)
	for _, d := range r.disks() {
		args = append(args, "--volume", d.Volume+"="+d.Source)
	}
	r.Backend, err = Launch(local(r.AtSource)(context.WithoutCancel(ctx), r.Bin, args...), "backend", filepath.Join(r.Dir, "backend.log"))
	if err != nil {
		return err
	}
	return r.Backend.Until(ctx, 30*time.Second, "answering", func() bool { return r.answers(ctx, r.BackendState()) })
}

// StartFrontend starts the frontend and waits until its NBD socket takes
// connections. It returns how long that took.
func (r *Rig) StartFrontend(ctx context.Context) (took time.Duration, err error) {
	start := time.Now()
	policy := r.Policy
	if policy == "" {
		policy = "isolated"
	}
	args := append([]string{"frontend", "--policy", policy, "--pki", filepath.Join(r.Dir, "pki"), "--name", "target", "--state", r.FrontendState(),
		"--backend", r.Listen, "--export", "nbd+unix:///?socket=" + r.Socket()}, r.FrontendArgs...)
	for _, d := range r.disks() {
		args = append(args, "--volume", d.Volume)
	}
	r.Frontend, err = Launch(local(r.AtTarget)(context.WithoutCancel(ctx), r.Bin, args...), "frontend", filepath.Join(r.Dir, "frontend.log"))
	if err != nil {
		return 0, err
	}
	err = r.Frontend.Until(ctx, 60*time.Second, "serving", func() bool {
		c, err := net.Dial("unix", r.Socket())
		if err == nil {
			c.Close()
		}
		return err == nil && r.answers(ctx, r.FrontendState())
	})
	return time.Since(start), err
}

func (r *Rig) answers(ctx context.Context, state string) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for _, d := range r.disks() {
		if _, err := client.New(state).Volume(ctx, d.Volume); err != nil {
			return false
		}
	}
	return true
}

// Start makes the certificates and starts both daemons.
func (r *Rig) Start(ctx context.Context) error {
	if err := r.PKI(ctx); err != nil {
		return err
	}
	if err := r.StartBackend(ctx); err != nil {
		return err
	}
	_, err := r.StartFrontend(ctx)
	return err
}

// Status is what the frontend says about the volume.
func (r *Rig) Status(ctx context.Context) (api.Volume, error) {
	return r.StatusOf(ctx, r.Volume)
}

// StatusOf is what the frontend says about any of the volumes.
func (r *Rig) StatusOf(ctx context.Context, volume string) (api.Volume, error) {
	return client.New(r.FrontendState()).Volume(ctx, volume)
}

// Filled says whether nothing is left to be fetched.
func Filled(v api.Volume) bool { return v.Fill.State == "filled" }

// Here is how many bytes of the volume need not be fetched any more.
func Here(v api.Volume) int64 { return v.SizeBytes - v.Chunks.Absent*v.ChunkBytes }

// WaitFilled polls until the volume is filled and calls seen with each status.
func (r *Rig) WaitFilled(ctx context.Context, limit time.Duration, seen func(api.Volume)) (v api.Volume, err error) {
	return r.WaitFilledOf(ctx, r.Volume, limit, seen)
}

// WaitFilledOf is WaitFilled for any of the volumes.
func (r *Rig) WaitFilledOf(ctx context.Context, volume string, limit time.Duration, seen func(api.Volume)) (v api.Volume, err error) {
	timeout := time.After(limit)
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		if v, err = r.StatusOf(ctx, volume); err != nil {
			return v, err
		}
		if seen != nil {
			seen(v)
		}
		if Filled(v) {
			return v, nil
		}
		select {
		case <-ctx.Done():
			return v, ctx.Err()
		case <-r.Frontend.Exited():
			return v, r.Frontend.Trouble("ended while it filled")
		case <-timeout:
			return v, r.Frontend.Trouble(fmt.Sprintf("not filled after %v: %+v %+v", limit, v.Fill, v.Chunks))
		case <-tick.C:
		}
	}
}

// Fill is forerun fill with one of pause, resume and limit (bytes a second).
func (r *Rig) Fill(ctx context.Context, action string, rate int64) error {
	return r.FillOf(ctx, r.Volume, action, rate)
}

// FillOf is Fill for any of the volumes.
func (r *Rig) FillOf(ctx context.Context, volume, action string, rate int64) error {
	args := []string{"fill", action, "--state", r.FrontendState(), "--volume", volume}
	if action == "limit" {
		args = append(args, "--rate", strconv.FormatInt(rate, 10))
	}
	_, err := r.Run(ctx, args...)
	return err
}

// Knows says whether a command of the binary ("backend") has the flag ("--chunk").
func (r *Rig) Knows(ctx context.Context, command, flag string) bool {
	out, err := r.Run(ctx, command, "--help")
	return err == nil && strings.Contains(out, flag+" ")
}

// Cutover runs forerun cutover to its end.
func (r *Rig) Cutover(ctx context.Context, to string) error {
	_, err := r.CutoverCommand(ctx, to).Output()
	if e, ok := err.(*exec.ExitError); ok {
		return fmt.Errorf("forerun cutover: %w: %s", err, bytes.TrimSpace(e.Stderr))
	}
	return err
}

// CutoverCommand is the command of Cutover, for those who do not want to wait for it.
func (r *Rig) CutoverCommand(ctx context.Context, to string) *exec.Cmd {
	return Local(ctx, r.Bin, "cutover", "--state", r.FrontendState(), "--volume", r.Volume, "--to", to)
}

// Stop ends both daemons as a user does.
func (r *Rig) Stop() error {
	var first error
	for _, p := range []*Proc{r.Frontend, r.Backend} {
		if p == nil {
			continue
		}
		select {
		case <-p.Exited():
		default:
			if err := p.Stop(30 * time.Second); err != nil && first == nil {
				first = err
			}
		}
	}
	return first
}

// Kill ends both daemons at once.
func (r *Rig) Kill() {
	for _, p := range []*Proc{r.Frontend, r.Backend} {
		if p != nil {
			p.Kill()
		}
	}
}
