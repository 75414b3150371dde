package pair

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"forerun/lab/rig"
)

// Volume is one disk of a pair.
type Volume struct {
	Name, Source string
}

// Config says how a pair is laid out. The zero values put all on this host.
type Config struct {
	Bin, Dir string
	Volumes  []Volume
	// Interval between checkpoints, 0 is the product's default.
	Interval time.Duration
	// Args are appended to the frontends' command lines, BackendArgs to the backend's.
	Args, BackendArgs []string
	// Gated puts a Gate on each way between the daemons.
	Gated bool
	// Single leaves frontend b, the proxy and everything about peers away.
	Single bool
	// AtBackend, AtA and AtB run the daemons, the Hosts are their addresses;
	// ports are fixed when a host is given.
	AtBackend, AtA, AtB       rig.Command
	HostBackend, HostA, HostB string
	// Port is the first of the fixed ports, 0 is 7410.
	Port int
}

// Pair is one backend, two frontends and a proxy.
type Pair struct {
	Config
	Backend, A, B, Proxy *Node
	// Ways are what the daemons reach each other by, nil unless Gated: by who
	// connects, "a" or "b", and to whom, "backend" or "peer".
	Ways map[string]*Gate
	// BackendAddr is where the backend listens.
	BackendAddr string
}

// way is the address by which from reaches what listens on addr.
func (p *Pair) way(from, to, addr string) (string, error) {
	if !p.Gated {
		return addr, nil
	}
	g, err := NewGate(addr)
	if err != nil {
		return "", err
	}
	p.Ways[from+"-"+to] = g
	return g.Addr(), nil
}

// Node is one daemon.
type Node struct {
	*rig.Proc
	Name string
	// State is its state directory, Socket that of its NBD export.
	State, Socket string

	bin, log string
	at       rig.Command
	args     []string
	ready    func(context.Context) bool
}

// Start starts the daemon and waits until it answers.
func (n *Node) Start(ctx context.Context) error {
	if err := n.Launch(ctx); err != nil {
		return err
	}
	return n.Await(ctx)
}

// Launch starts the daemon and does not wait.
func (n *Node) Launch(ctx context.Context) (err error) {
	at := n.at
	if at == nil {
		at = rig.Local
	}
	n.Proc, err = rig.Launch(at(context.WithoutCancel(ctx), n.bin, n.args...), n.Name, n.log)
	return err
}

// Await waits until the daemon answers.
func (n *Node) Await(ctx context.Context) error {
	return n.Until(ctx, time.Minute, "answering", func() bool { return n.ready(ctx) })
}

// Alive says whether the process runs.
func (n *Node) Alive() bool {
	if n == nil || n.Proc == nil {
		return false
	}
	select {
	case <-n.Exited():
		return false
	default:
		return true
	}
}

func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// addr is a fixed port of host, or a free one of this host.
func addr(host string, port int) (string, error) {
	if host == "" {
		return freeAddr()
	}
	return fmt.Sprintf("%s:%d", host, port), nil
}

// New lays a pair out and makes its certificates. Nothing runs yet.
func New(ctx context.Context, c Config) (p *Pair, err error) {
	p = &Pair{Config: c, Ways: map[string]*Gate{}}
	defer func() {
		if err != nil {
			p.Kill()
		}
	}()
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		return nil, err
	}
	if err := p.pki(ctx); err != nil {
		return nil, err
	}
	port := c.Port
	if port == 0 {
		port = 7410
	}
	listen, err1 := addr(c.HostBackend, port)
	atA, err2 := addr(c.HostA, port+1)
	atB, err3 := addr(c.HostB, port+2)
	if err := errors.Join(err1, err2, err3); err != nil {
		return nil, err
	}
	p.BackendAddr = listen
	var vols []string
	for _, v := range c.Volumes {
		vols = append(vols, "--volume", v.Name+"="+v.Source)
	}
	p.Backend = p.node("backend", c.AtBackend, append(append([]string{"backend", "--pki", p.path("pki"), "--name", "old", "--state", p.path("backend"),
		"--listen", listen}, vols...), c.BackendArgs...))
	if p.A, err = p.half("a", c.AtA, atA, atB); err == nil && !c.Single {
		p.B, err = p.half("b", c.AtB, atB, atA)
	}
	if err != nil {
		return nil, err
	}
	if !c.Single {
		p.Proxy = p.node("proxy", nil, []string{"proxy", "--state", p.path("proxy"), "--export", "nbd+unix:///?socket=" + p.path("proxy.sock"),
			"--to", "nbd+unix:///?socket=" + p.A.Socket, "--to", "nbd+unix:///?socket=" + p.B.Socket})
	}
	return p, nil
}

func (p *Pair) path(name string) string { return filepath.Join(p.Dir, name) }

// half lays out one of the two frontends.
func (p *Pair) half(name string, at rig.Command, listen, peer string) (*Node, error) {
	backend, err := p.way(name, "backend", p.BackendAddr)
	if err != nil || p.Single {
		return p.frontend(name, at, backend), err
	}
	other, err := p.way(name, "peer", peer)
	return p.frontend(name, at, backend, "--zone", name, "--peer-listen", listen, "--peer", other, "--arbiter", backend), err
}

// Frontend lays out one more frontend of the same backend, with arguments of its own.
func (p *Pair) Frontend(name string, at rig.Command, args ...string) *Node {
	return p.frontend(name, at, p.BackendAddr, args...)
}

func (p *Pair) frontend(name string, at rig.Command, backend string, args ...string) *Node {
	all := []string{"frontend", "--pki", p.path("pki"), "--name", name, "--state", p.path(name), "--backend", backend,
		"--export", "nbd+unix:///?socket=" + p.path(name+".sock")}
	for _, v := range p.Volumes {
		all = append(all, "--volume", v.Name)
	}
	if p.Interval > 0 {
		all = append(all, "--checkpoint-interval", p.Interval.String())
	}
	return p.node(name, at, append(append(all, args...), p.Args...))
}

func (p *Pair) node(name string, at rig.Command, args []string) *Node {
	n := &Node{Name: name, State: p.path(name), Socket: p.path(name + ".sock"), bin: p.Bin, log: p.path(name + ".log"), at: at, args: args}
	n.ready = func(ctx context.Context) bool {
		if name != "backend" {
			c, err := net.Dial("unix", n.Socket)
			if err != nil {
				return false
			}
			c.Close()
		}
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		return n.answers(ctx)
	}
	return n
}

// Export is the URI of a volume at a node.
func (n *Node) Export(volume string) string { return "nbd+unix:///" + volume + "?socket=" + n.Socket }

// pki makes the certificates, once.
func (p *Pair) pki(ctx context.Context) error {
	dir := p.path("pki")
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	hosts := "localhost,127.0.0.1"
	for _, h := range []string{p.HostBackend, p.HostA, p.HostB} {
		if h != "" && !strings.Contains(hosts, h) {
			hosts += "," + h
		}
	}
	if _, err := p.Forerun(ctx, "pki", "init", "--dir", dir); err != nil {
		return err
	}
	for _, n := range []struct{ role, name string }{{"backend", "old"}, {"frontend", "a"}, {"frontend", "b"}, {"frontend", "clone"}} {
		if _, err := p.Forerun(ctx, "pki", "issue", "--dir", dir, "--role", n.role, "--name", n.name, "--host", hosts); err != nil {
			return err
		}
	}
	return nil
}

// Forerun runs a forerun command to its end and returns what it printed.
func (p *Pair) Forerun(ctx context.Context, args ...string) (string, error) {
	c := rig.Local(ctx, p.Bin, args...)
	var out, msg bytes.Buffer
	c.Stdout, c.Stderr = &out, &msg
	if err := c.Run(); err != nil {
		return out.String(), fmt.Errorf("forerun %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(msg.String()))
	}
	return out.String(), nil
}

// Order runs abort, checkpoint, discard or another order on a volume of a node.
func (p *Pair) Order(ctx context.Context, n *Node, order, volume string, more ...string) (string, error) {
	return p.Forerun(ctx, append([]string{order, "--state", n.State, "--volume", volume}, more...)...)
}

// Start starts the backend, then both frontends at once, waits until they are
// in sync, and then starts the proxy.
func (p *Pair) Start(ctx context.Context) error {
	if err := p.Backend.Start(ctx); err != nil {
		return err
	}
	if err := p.StartFrontends(ctx); err != nil {
		return err
	}
	if p.Single {
		return nil
	}
	return p.Proxy.Start(ctx)
}

// Entry is where workloads connect: the proxy, or the only frontend.
func (p *Pair) Entry() *Node {
	if p.Single {
		return p.A
	}
	return p.Proxy
}

// StartFrontends starts those that do not run, at once, and waits until all
// volumes are in sync.
func (p *Pair) StartFrontends(ctx context.Context) error {
	var wg sync.WaitGroup
	errs := make([]error, 2)
	for i, n := range p.Frontends() {
		if !n.Alive() {
			wg.Go(func() { errs[i] = n.Start(ctx) })
		}
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	_, err := p.WaitInSync(ctx, time.Minute)
	return err
}

// Frontends are a and, unless the pair is Single, b.
func (p *Pair) Frontends() []*Node {
	if p.Single {
		return []*Node{p.A}
	}
	return []*Node{p.A, p.B}
}

// Kill ends all daemons at once.
func (p *Pair) Kill() {
	for _, n := range []*Node{p.Proxy, p.A, p.B, p.Backend} {
		if n.Alive() {
			n.Proc.Kill()
		}
	}
	for _, g := range p.Ways {
		g.Close()
	}
}

// Stop ends all daemons as a user does: workloads' side first.
func (p *Pair) Stop() error {
	var errs []error
	for _, n := range []*Node{p.Proxy, p.B, p.A, p.Backend} {
		if n.Alive() {
			errs = append(errs, n.Proc.Stop(30*time.Second))
		}
	}
	for _, g := range p.Ways {
		errs = append(errs, g.Close())
	}
	return errors.Join(errs...)
}
