package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"time"
)

// joined makes a TCP connection over the line and returns its ends as files,
// for programs to inherit.
func (b *linkBench) joined() (atSource, atTarget *os.File, err error) {
	var ln net.Listener
	err = b.line.Source.Do(func() (err error) {
		ln, err = net.Listen("tcp", net.JoinHostPort(b.line.Source.Addr, "7500"))
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	defer ln.Close()
	var near net.Conn
	err = b.line.Target.Do(func() (err error) {
		near, err = net.DialTimeout("tcp", ln.Addr().String(), 10*time.Second)
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	defer near.Close()
	far, err := ln.Accept()
	if err != nil {
		return nil, nil, err
	}
	defer far.Close()
	if atSource, err = far.(*net.TCPConn).File(); err != nil {
		return nil, nil, err
	}
	if atTarget, err = near.(*net.TCPConn).File(); err != nil {
		atSource.Close()
		return nil, nil, err
	}
	return atSource, atTarget, nil
}

// pipeCopy is a compressed copy as one makes it by hand: zstd -1 at the source,
// one connection, zstd -d at the target. It returns how long it took.
func (b *linkBench) pipeCopy(source string) (time.Duration, error) {
	dir, err := b.dir("pipe")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	out, in, err := b.joined()
	if err != nil {
		return 0, err
	}
	var words bytes.Buffer
	pack := b.line.Source.Command(b.ctx, "zstd", "-1", "-q", "-c", source)
	pack.Stdout = out
	open := b.line.Target.Command(b.ctx, "zstd", "-d", "-q", "-o", dir+"/disk.raw")
	open.Stdin, open.Stderr = in, &words
	start := time.Now()
	err = errors.Join(open.Start(), pack.Start())
	out.Close()
	in.Close()
	if err == nil {
		err = errors.Join(pack.Wait(), open.Wait())
	}
	if err != nil {
		return 0, fmt.Errorf("zstd over the line: %w: %s", err, bytes.TrimSpace(words.Bytes()))
	}
	return time.Since(start), nil
}

// floor is what a compressed and encrypted copy costs at least.
type floor struct {
	front, back float64 // seconds of processor time at the target and at the source
	seconds     float64
}

// floorCopy copies the file with zstd -1, openssl s_client, openssl s_server and zstd -d.
func (b *linkBench) floorCopy(file string) (f floor, err error) {
	dir, err := b.dir("floor")
	if err != nil {
		return f, err
	}
	defer os.RemoveAll(dir)
	const port = "7501"
	key, cert := dir+"/key", dir+"/cert"
	out, err := exec.CommandContext(b.ctx, "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
		"-nodes", "-keyout", key, "-out", cert, "-subj", "/CN=floor", "-days", "2").CombinedOutput()
	if err != nil {
		return f, fmt.Errorf("openssl req: %w: %s", err, out)
	}
	var words bytes.Buffer
	plainR, plainW, err := os.Pipe()
	if err != nil {
		return f, err
	}
	defer plainR.Close()
	defer plainW.Close()
	packedR, packedW, err := os.Pipe()
	if err != nil {
		return f, err
	}
	defer packedR.Close()
	defer packedW.Close()
	ctx, cancel := context.WithTimeout(b.ctx, 10*time.Minute)
	defer cancel()
	take := b.line.Target.Command(ctx, "openssl", "s_server", "-quiet", "-accept", net.JoinHostPort(b.line.Target.Addr, port), "-naccept", "1",
		"-cert", cert, "-key", key, "-tls1_3")
	hold, err := take.StdinPipe() // it ends when its input does
	if err != nil {
		return f, err
	}
	defer hold.Close()
	take.Stdout, take.Stderr = plainW, &words
	open := b.line.Target.Command(ctx, "zstd", "-d", "-q", "-o", dir+"/plain")
	open.Stdin = plainR
	pack := b.line.Source.Command(ctx, "zstd", "-1", "-q", "-c", file)
	pack.Stdout = packedW
	send := b.line.Source.Command(ctx, "openssl", "s_client", "-quiet", "-nocommands", "-no_ign_eof", "-connect", net.JoinHostPort(b.line.Target.Addr, port),
		"-tls1_3", "-ciphersuites", "TLS_AES_128_GCM_SHA256")
	send.Stdin = packedR
	if err := errors.Join(take.Start(), open.Start()); err != nil {
		return f, err
	}
	plainW.Close()
	for limit := time.After(10 * time.Second); !b.listens(b.line.Target, port); {
		select {
		case <-limit:
			return f, fmt.Errorf("openssl s_server does not listen: %s", words.Bytes())
		case <-time.After(20 * time.Millisecond):
		}
	}
	start := time.Now()
	if err := errors.Join(pack.Start(), send.Start()); err != nil {
		return f, err
	}
	packedW.Close()
	packedR.Close()
	if err := errors.Join(pack.Wait(), send.Wait(), take.Wait(), open.Wait()); err != nil {
		return f, fmt.Errorf("zstd and openssl over the line: %w: %s", err, bytes.TrimSpace(words.Bytes()))
	}
	f.seconds = time.Since(start).Seconds()
	cpu := func(cc ...*exec.Cmd) (s float64) {
		for _, c := range cc {
			s += (c.ProcessState.UserTime() + c.ProcessState.SystemTime()).Seconds()
		}
		return s
	}
	f.front, f.back = cpu(take, open), cpu(pack, send)
	a, err1 := os.Stat(file)
	z, err2 := os.Stat(dir + "/plain")
	if err := errors.Join(err1, err2); err != nil {
		return f, err
	}
	if a.Size() != z.Size() {
		return f, fmt.Errorf("zstd and openssl delivered %d of %d bytes", z.Size(), a.Size())
	}
	return f, nil
}
