package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"forerun/lab/rig"
)

// nbdkit serves the file at the source, read-only, as export "vol" among others.
func (b *linkBench) nbdkit(source string) (*rig.Proc, string, error) {
	const port = "10809"
	addr := b.line.Source.Addr
	cmd := b.line.Source.Command(context.WithoutCancel(b.ctx), "nbdkit", "--foreground", "--readonly", "--ipaddr="+addr, "--port="+port, "file", source)
	p, err := rig.Launch(cmd, "nbdkit", b.path("nbdkit.log"))
	if err != nil {
		return nil, "", err
	}
	b.atEnd(func() error { p.Kill(); return nil })
	return p, net.JoinHostPort(addr, port), p.Until(b.ctx, 10*time.Second, "listening", func() bool { return b.listens(b.line.Source, port) })
}

// qsd is qemu-storage-daemon at the target with a qcow2 overlay whose backing
// is an NBD export at the source.
type qsd struct {
	proc   *rig.Proc
	conn   net.Conn
	events chan event
}

type event struct {
	Event  string
	Return json.RawMessage
	Error  *struct{ Desc string }
	Data   struct{ Type, Error string }
}

// startQSD starts it with its files in dir. With a socket it serves the disk
// there as export "vol".
func (b *linkBench) startQSD(ctx context.Context, dir, addr, socket string) (_ *qsd, err error) {
	overlay, control := filepath.Join(dir, "overlay.qcow2"), filepath.Join(dir, "qmp")
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	// Only the size is looked at when it is made, over the line like all else.
	out, err := b.line.Target.Command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "nbd://"+addr+"/vol", overlay).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("qemu-img create: %w: %s", err, out)
	}
	args := []string{
		"--blockdev", "driver=nbd,node-name=base,read-only=on,server.type=inet,server.host=" + host + ",server.port=" + port + ",export=vol",
		"--blockdev", "driver=file,node-name=file,filename=" + overlay,
		"--blockdev", "driver=qcow2,node-name=top,file=file,backing=base",
		"--chardev", "socket,id=qmp,server=on,wait=off,path=" + control, "--monitor", "chardev=qmp",
	}
	if socket != "" {
		args = append(args, "--nbd-server", "addr.type=unix,addr.path="+socket,
			"--export", "type=nbd,id=vol,node-name=top,name=vol,writable=off")
	}
	p, err := rig.Launch(b.line.Target.Command(context.WithoutCancel(b.ctx), "qemu-storage-daemon", args...), "qemu-storage-daemon", b.path("qsd.log"))
	if err != nil {
		return nil, err
	}
	b.atEnd(func() error { p.Kill(); return nil })
	q := &qsd{proc: p, events: make(chan event, 64)}
	defer func() {
		if err != nil {
			q.kill()
		}
	}()
	err = p.Until(ctx, 20*time.Second, "serving", func() bool {
		if socket != "" {
			if _, err := os.Stat(socket); err != nil {
				return false
			}
		}
		q.conn, err = net.Dial("unix", control)
		return err == nil
	})
	if err != nil {
		return nil, err
	}
	go func() {
		defer close(q.events)
		for in := bufio.NewScanner(q.conn); in.Scan(); {
			var e event
			if json.Unmarshal(in.Bytes(), &e) == nil {
				q.events <- e
			}
		}
	}()
	return q, q.ask(`{"execute":"qmp_capabilities"}`)
}

// ask sends a command and waits for its answer.
func (q *qsd) ask(command string) error {
	if _, err := fmt.Fprintln(q.conn, command); err != nil {
		return err
	}
	for {
		select {
		case e, ok := <-q.events:
			switch {
			case !ok:
				return q.proc.Trouble("hung up")
			case e.Error != nil:
				return fmt.Errorf("%s: %s", command, e.Error.Desc)
			case e.Return != nil:
				return nil
			}
		case <-time.After(20 * time.Second):
			return q.proc.Trouble("does not answer " + command)
		}
	}
}

// stream starts to copy the backing file into the overlay, at most rate bytes a
// second; 0 is no limit.
func (q *qsd) stream(rate int64) error {
	return q.ask(fmt.Sprintf(`{"execute":"block-stream","arguments":{"job-id":"s","device":"top","speed":%d}}`, rate))
}

// wait waits for the end of the stream.
func (q *qsd) wait(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e, ok := <-q.events:
			if !ok {
				return q.proc.Trouble("hung up")
			}
			if e.Event == "BLOCK_JOB_COMPLETED" {
				if e.Data.Error != "" {
					return errors.New("block-stream: " + e.Data.Error)
				}
				return nil
			}
		}
	}
}

func (q *qsd) kill() {
	if q.conn != nil {
		q.conn.Close()
	}
	q.proc.Kill()
}

// cached starts nbdkit at the target with an export of the source behind a
// copy-on-read filter, and serves it on the socket. With scan it fetches all of
// it in disk order while a client is connected.
func (b *linkBench) cached(dir, addr, socket string, scan bool) (*rig.Proc, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	args := []string{"--foreground", "--readonly", "--unix=" + socket}
	if scan {
		args = append(args, "--filter=scan")
	}
	// The filter scans the default export only, which is the one without a name.
	args = append(args, "--filter=cow", "nbd", "hostname="+host, "port="+port, "cow-on-cache=true", "cow-on-read=true")
	if scan {
		args = append(args, "scan-ahead=false")
	}
	cmd := b.line.Target.Command(context.WithoutCancel(b.ctx), "nbdkit", args...)
	cmd.Env = append(os.Environ(), "TMPDIR="+dir)
	p, err := rig.Launch(cmd, "nbdkit at the target", b.path("nbdkit-target.log"))
	if err != nil {
		return nil, err
	}
	b.atEnd(func() error { p.Kill(); return nil })
	return p, p.Until(b.ctx, 20*time.Second, "listening", func() bool {
		c, err := net.Dial("unix", socket)
		if err == nil {
			c.Close() // it never said hello, so it is not the client that starts the scan
		}
		return err == nil
	})
}
