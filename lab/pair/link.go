package pair

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"forerun/lab/netns"
)

// LinkOptions are what Link needs beside Options.
type LinkOptions struct {
	Options
	// Each is how long one job runs, 0 is 20 s. N is how many rounds there are.
	Each time.Duration
	// Rate of the line in bytes a second and its round trip, 0 are 25 MB/s and 20 ms.
	Rate int64
	RTT  time.Duration
	// Only names one of the servers; empty is all.
	Only string
}

// Link writes 8 MiB a second in random pieces of 16 KiB, each once, to a pair
// that writes back over a slow line, to one that does not, and to QEMU's
// storage daemon with a mirror over the same line. It measures what crosses
// the line and what the writer feels.
func Link(ctx context.Context, o LinkOptions, r Report) (err error) {
	if o.Each == 0 {
		o.Each = 20 * time.Second
	}
	if o.Rate == 0 {
		o.Rate = 25_000_000
	}
	if o.RTT == 0 {
		o.RTT = 20 * time.Millisecond
	}
	k, err := begin(ctx, o.Options, r)
	if err != nil {
		return err
	}
	defer k.end(&err)
	line, err := k.openLine(o.Rate, o.RTT)
	if err != nil {
		return err
	}
	l := linkRun{run: k, o: o, line: line, got: map[string][]linkResult{}}
	for round := range max(1, o.N) {
		for i := range linkServers {
			name := linkServers[(i+round)%len(linkServers)]
			if o.Only != "" && o.Only != name {
				continue
			}
			if err := l.one(round, name); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	l.judge()
	return nil
}

const (
	isolated      = "pair, isolated"
	writtenBack   = "pair, write-back"
	qemuAlone     = "qemu, no mirror"
	qemuBehind    = "qemu, mirror in the background"
	qemuBlocking  = "qemu, mirror write-blocking"
	linkDisk      = 512 << 20
	linkPace      = 8 << 20
	linkSettled   = 200_000 // bytes a second on the line that count as nothing
	linkMostDrain = 2 * time.Minute
)

var linkServers = []string{isolated, writtenBack, qemuAlone, qemuBehind, qemuBlocking}

type linkResult struct {
	fioWrites
	crossed int64
	drain   time.Duration
}

type linkRun struct {
	*run
	o    LinkOptions
	line *netns.Line
	got  map[string][]linkResult
}

// write runs the job and lets drain empty what it left behind.
func (l *linkRun) write(uri string, drain func() error) (r linkResult, err error) {
	before := l.line.Stats().ToSource.Bytes
	r.fioWrites, err = fioWrite(l.ctx, uri, "16k", 16, fmt.Sprintf("--size=%d", linkDisk),
		fmt.Sprintf("--rate=%d", linkPace), "--randrepeat=1", fmt.Sprintf("--io_size=%d", int64(linkPace*l.o.Each.Seconds())))
	if err != nil {
		return r, err
	}
	start := time.Now()
	if err := drain(); err != nil {
		return r, fmt.Errorf("drain: %w", err)
	}
	r.drain = time.Since(start)
	r.crossed = l.line.Stats().ToSource.Bytes - before
	return r, nil
}

// quiet waits until the line carries nothing worth mentioning.
func (l *linkRun) quiet() error {
	for end := time.Now().Add(linkMostDrain); time.Now().Before(end); {
		before := l.line.Stats().ToSource.Bytes
		if !l.sleep(time.Second) {
			return l.ctx.Err()
		}
		if l.line.Stats().ToSource.Bytes-before < linkSettled {
			return nil
		}
	}
	return errors.New("the line does not come to rest")
}

func (l *linkRun) one(round int, name string) error {
	dir := l.path(fmt.Sprintf("round%d", round))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var r linkResult
	var err error
	switch name {
	case isolated:
		r, err = l.product(dir, "isolated")
	case writtenBack:
		r, err = l.product(dir, "write-back")
	default:
		r, err = l.qemu(dir, name)
	}
	if err != nil {
		return err
	}
	l.got[name] = append(l.got[name], r)
	l.Say("round %d: %s: %.2f MiB/s, p50 %.0f us, p99 %.0f us, longest %.1f ms, %.1f MB written, %.1f MB crossed, drained in %.1f s", round+1, name,
		r.rate()/(1<<20), r.p50(), r.p99(), r.Clat.Max/1e6, float64(r.Bytes)/1e6, float64(r.crossed)/1e6, r.drain.Seconds())
	return nil
}

func (l *linkRun) empty(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(linkDisk), f.Close())
}

func (l *linkRun) product(dir, policy string) (r linkResult, err error) {
	source := dir + "/source.raw"
	if err := l.empty(source); err != nil {
		return r, err
	}
	p, err := l.pair(Config{Dir: dir + "/pair", Volumes: []Volume{{"vol", source}}, Args: []string{"--policy", policy},
		AtBackend: l.line.Source.Command, HostBackend: l.line.Source.Addr,
		AtA: l.line.Target.Command, AtB: l.line.Target.Command, HostA: l.line.Target.Addr, HostB: l.line.Target.Addr})
	if err != nil {
		return r, err
	}
	defer p.Kill()
	if err := p.Backend.Start(l.ctx); err != nil {
		return r, err
	}
	if err := p.StartFrontends(l.ctx); err != nil {
		return r, err
	}
	if err := l.quiet(); err != nil {
		return r, err
	}
	primary, _, err := p.Primary(l.ctx, "vol")
	if err != nil {
		return r, err
	}
	r, err = l.write(primary.Export("vol"), func() error {
		if policy == "isolated" {
			return nil
		}
		if _, err := p.Order(l.ctx, primary, "checkpoint", "vol"); err != nil {
			return err
		}
		return p.Settled(l.ctx)
	})
	if err != nil {
		return r, errors.Join(err, p.Words())
	}
	return r, p.Stop()
}

func (l *linkRun) qemu(dir, name string) (r linkResult, err error) {
	disk, far := dir+"/disk.raw", dir+"/far.raw"
	if err := errors.Join(l.empty(disk), l.empty(far)); err != nil {
		return r, err
	}
	sock, control := dir+"/disk.sock", dir+"/control.sock"
	daemon, err := l.peerAt(l.line.Target.Command, "qemu-storage-daemon", "--blockdev", "driver=file,node-name=file,aio=threads,filename="+disk,
		"--blockdev", "driver=raw,node-name=disk,file=file", "--nbd-server", "addr.type=unix,addr.path="+sock,
		"--export", "type=nbd,id=e,node-name=disk,name=vol,writable=on",
		"--chardev", "socket,id=c,server=on,wait=off,path="+control, "--monitor", "chardev=c")
	if err != nil {
		return r, err
	}
	defer daemon.Kill()
	if err := daemon.Until(l.ctx, 10*time.Second, "listening", func() bool { _, err := os.Stat(sock); return err == nil }); err != nil {
		return r, err
	}
	drain := func() error { return nil }
	if name != qemuAlone {
		server, err := l.peerAt(l.line.Source.Command, "qemu-nbd", "--format=raw", "--persistent", "--shared=4", "--cache=writeback",
			"--aio=threads", "--export-name=vol", "--bind="+l.line.Source.Addr, "--port=7600", far)
		if err != nil {
			return r, err
		}
		defer server.Kill()
		if err := server.Until(l.ctx, 10*time.Second, "listening", func() bool {
			return l.line.Source.Do(func() error {
				c, err := net.Dial("tcp", l.line.Source.Addr+":7600")
				if err == nil {
					c.Close()
				}
				return err
			}) == nil
		}); err != nil {
			return r, err
		}
		q, err := dialQMP(control)
		if err != nil {
			return r, err
		}
		defer q.Close()
		mode := "background"
		if name == qemuBlocking {
			mode = "write-blocking"
		}
		for _, order := range []string{
			`{"execute": "qmp_capabilities"}`,
			`{"execute": "blockdev-add", "arguments": {"driver": "nbd", "node-name": "far", "export": "vol",
				"server": {"type": "inet", "host": "` + l.line.Source.Addr + `", "port": "7600"}}}`,
			`{"execute": "blockdev-mirror", "arguments": {"job-id": "m", "device": "disk", "target": "far", "sync": "none",
				"granularity": 16384, "copy-mode": "` + mode + `"}}`,
		} {
			if err := q.do(order); err != nil {
				return r, err
			}
		}
		drain = l.quiet
	}
	if err := l.quiet(); err != nil {
		return r, err
	}
	return l.write("nbd+unix:///vol?socket="+sock, drain)
}

// qmp is a connection to QEMU's monitor.
type qmp struct {
	net.Conn
	in *bufio.Scanner
}

func dialQMP(path string) (*qmp, error) {
	c, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	q := &qmp{Conn: c, in: bufio.NewScanner(c)}
	q.in.Scan() // the greeting
	return q, nil
}

// do gives one order and waits for its answer; events are passed over.
func (q *qmp) do(order string) error {
	if _, err := fmt.Fprintln(q, order); err != nil {
		return err
	}
	for q.in.Scan() {
		var m struct {
			Return *json.RawMessage
			Error  *struct{ Desc string }
		}
		if err := json.Unmarshal(q.in.Bytes(), &m); err != nil {
			return err
		}
		if m.Error != nil {
			return fmt.Errorf("qmp %s: %s", order, m.Error.Desc)
		}
		if m.Return != nil {
			return nil
		}
	}
	return errors.Join(fmt.Errorf("qmp %s: no answer", order), q.in.Err())
}

func (l *linkRun) judge() {
	med := func(name string, f func(linkResult) float64) float64 {
		var v []float64
		for _, r := range l.got[name] {
			v = append(v, f(r))
		}
		return median(v)
	}
	rate := func(r linkResult) float64 { return r.rate() / (1 << 20) }
	p50 := func(r linkResult) float64 { return r.p50() }
	mean := func(r linkResult) float64 { return r.Clat.Mean / 1e3 }
	share := func(r linkResult) float64 { return float64(r.crossed) / float64(r.Bytes) }
	for _, name := range linkServers {
		if len(l.got[name]) == 0 {
			continue
		}
		l.Measure(name+": written", med(name, rate), "MiB/s")
		l.Measure(name+": write p50", med(name, p50), "us")
		l.Measure(name+": write p99", med(name, func(r linkResult) float64 { return r.p99() }), "us")
		l.Measure(name+": write mean", med(name, mean), "us")
		l.Measure(name+": longest write", med(name, func(r linkResult) float64 { return r.Clat.Max / 1e6 }), "ms")
		l.Measure(name+": link bytes / changed bytes", med(name, share), "x")
		l.Measure(name+": drained in", med(name, func(r linkResult) float64 { return r.drain.Seconds() }), "s")
	}
	if len(l.got[writtenBack]) > 0 {
		l.AtMost("link bytes / changed bytes", med(writtenBack, share), 1.15, "x")
	}
	if len(l.got[writtenBack]) > 0 && len(l.got[isolated]) > 0 {
		l.AtLeast("writer's rate, write-back / off", med(writtenBack, rate)/med(isolated, rate), 0.95, "x")
		// What the writer is promised is its rate; how long one write takes also
		// tells how busy the machine is with all ends of the line on it.
		l.Measure("write p50, write-back / off", med(writtenBack, p50)/med(isolated, p50), "x")
	}
	for _, name := range []string{qemuBehind, qemuBlocking} {
		if len(l.got[name]) > 0 && len(l.got[qemuAlone]) > 0 {
			l.Measure("write p50, "+name+" / none", med(name, p50)/med(qemuAlone, p50), "x")
		}
	}
}
