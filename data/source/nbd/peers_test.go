package nbd

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"forerun/block"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var ctx = context.Background()

func kindIs(t *testing.T, err error, k block.Kind) {
	t.Helper()
	if block.KindOf(err) != k {
		t.Fatalf("%v is of kind %v, want %v", err, block.KindOf(err), k)
	}
}

// peer is a server process on a unix socket or a TCP port.
type peer struct {
	t    *testing.T
	argv []string
	addr [2]string // network, address
	cmd  *exec.Cmd
}

func need(t *testing.T, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("%s is not installed", name)
	}
}

// socketPath is short whatever the test is called.
func socketPath(t *testing.T) string {
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

// serve runs a server; SOCKET in argv is replaced.
func serve(t *testing.T, argv ...string) (*peer, Target) {
	t.Helper()
	need(t, argv[0])
	sock := socketPath(t)
	p := &peer{t: t, addr: [2]string{"unix", sock}}
	for _, a := range argv {
		p.argv = append(p.argv, strings.ReplaceAll(a, "SOCKET", sock))
	}
	p.start()
	t.Cleanup(p.kill)
	return p, target(t, "nbd+unix:///?socket="+sock)
}

func target(t *testing.T, uri string) Target {
	t.Helper()
	tg, err := ParseURI(uri)
	if err != nil {
		t.Fatal(err)
	}
	return tg
}

func (p *peer) start() {
	p.t.Helper()
	if p.addr[0] == "unix" {
		os.Remove(p.addr[1])
	}
	p.cmd = exec.Command(p.argv[0], p.argv[1:]...)
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	for range 500 {
		if c, err := net.Dial(p.addr[0], p.addr[1]); err == nil {
			c.Close()
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	p.t.Fatalf("%v does not listen", p.argv)
}

func (p *peer) kill() {
	if p.cmd != nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
		p.cmd = nil
	}
}

func open(t *testing.T, tg Target, o Options) *Client {
	t.Helper()
	c, err := Open(ctx, tg, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// TestTwin runs random calls against a byte slice, on servers of every ability.
func TestTwin(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, 3<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	kit := []string{"nbdkit", "-f", "--exit-with-parent", "-U", "SOCKET"}
	for _, s := range []struct {
		name  string
		argv  []string
		check func(c *Client) bool // what the case is for
	}{
		{"memory", append(kit, "memory", "3M"), func(c *Client) bool { return c.ex.structured && c.ex.status && len(c.lanes) == 4 }},
		{"simple replies", append(kit, "--no-sr", "memory", "3M"), func(c *Client) bool { return !c.ex.structured && !c.info.CanExtents }},
		{"only the oldest options", append(kit, "--mask-handshake=0", "memory", "3M"), func(c *Client) bool { return !c.ex.structured }},
		{"no extents", append(kit, "--filter=noextents", "memory", "3M"), nil},
		{"no zeroes", append(kit, "--filter=nozero", "memory", "3M"), nil},
		{"no FUA", append(kit, "--filter=fua", "memory", "3M", "fuamode=discard"), nil},
		{"one connection", append(kit, "--filter=multi-conn", "memory", "3M", "multi-conn-mode=disable"), func(c *Client) bool { return len(c.lanes) == 1 }},
		{"blocks of 4096, at most 64 KiB", append(kit, "--filter=blocksize-policy", "memory", "3M", "blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=65536", "blocksize-error-policy=error"),
			func(c *Client) bool { return c.ex.minBlock == 4096 && c.ex.maxBlock == 65536 }},
		{"not whole sectors", append(kit, "memory", "3145429"), func(c *Client) bool { return c.info.Size == 3<<20 }},
		{"file", append(kit, "file", file), nil},
		{"qemu-nbd", []string{"qemu-nbd", "-f", "raw", "-t", "-e", "8", "-k", "SOCKET", file}, func(c *Client) bool { return c.ex.status }},
	} {
		t.Run(s.name, func(t *testing.T) {
			_, tg := serve(t, s.argv...)
			c := open(t, tg, Options{})
			if s.check != nil && !s.check(c) {
				t.Fatalf("not the server this case is for: %+v %+v", c.ex, c.info)
			}
			twinTest(t, c, 150)
		})
	}
}

func twinTest(t *testing.T, c *Client, rounds int) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	size := c.Info().Size
	twin := make([]byte, size)
	if err := c.ReadAt(ctx, twin, 0, 0); err != nil {
		t.Fatal(err)
	}
	for range rounds {
		off := r.Int64N(size/512) * 512
		n := min((1+r.Int64N(400))*512, size-off)
		f := []block.Flags{0, block.FUA, block.MayTrim, block.FUA | block.MayTrim}[r.IntN(4)]
		switch r.IntN(7) {
		case 0, 1:
			p := make([]byte, n)
			for i := range p {
				p[i] = byte(r.Uint32())
			}
			if off+n > c.ex.size {
				clear(p[c.ex.size-off:])
			}
			if err := c.WriteAt(ctx, p, off, f&block.FUA); err != nil {
				t.Fatal(err)
			}
			copy(twin[off:], p)
		case 2:
			if err := c.Zero(ctx, off, n, f); err != nil {
				t.Fatal(err)
			}
			clear(twin[off : off+n])
		case 3:
			if err := c.Trim(ctx, off, n, f&block.FUA); err != nil {
				t.Fatal(err)
			}
			p := make([]byte, n)
			if err := c.ReadAt(ctx, p, off, 0); err != nil {
				t.Fatal(err)
			}
			for i := range p { // zero or as it was
				if p[i] != 0 && p[i] != twin[off+int64(i)] {
					t.Fatalf("trim made other bytes at %d", off+int64(i))
				}
			}
			copy(twin[off:], p)
		case 4:
			if err := c.Flush(ctx, 0); err != nil {
				t.Fatal(err)
			}
			ext, err := c.Extents(ctx, nil, off, n, 0)
			if err != nil {
				t.Fatal(err)
			}
			at := off
			for _, e := range ext {
				if e.Off != at || e.Len <= 0 || e.Len%512 != 0 {
					t.Fatalf("extent %+v where %d was due", e, at)
				}
				at = e.End()
				if e.Kind.Zero() && !bytes.Equal(twin[e.Off:e.End()], make([]byte, e.Len)) {
					t.Fatalf("%+v holds data", e)
				}
			}
			if at > off+n {
				t.Fatalf("extents end at %d, not %d", at, off+n)
			}
		case 5:
			if err := c.Prefetch(ctx, off, n, 0); err != nil {
				t.Fatal(err)
			}
		case 6:
			p := bytes.Repeat([]byte{0xee}, int(n))
			if err := c.ReadAt(ctx, p, off, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(p, twin[off:off+n]) {
				t.Fatalf("%d bytes at %d differ", n, off)
			}
		}
	}
	p := make([]byte, size)
	if err := c.ReadAt(ctx, p, 0, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p, twin) {
		t.Fatal("the disk differs at the end")
	}
	err := c.Zero(ctx, 0, 4096, block.FastZero|block.MayTrim)
	if k := block.KindOf(err); k != block.KindNone && k != block.KindUnsupported {
		t.Fatal(err)
	}
}

// TestReconnect kills the server again and again under load. Nobody sees an
// error but Flush, which must tell of the loss.
func TestReconnect(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk")
	const part = 1 << 20
	const workers = 6
	if err := os.WriteFile(file, make([]byte, workers*part), 0o600); err != nil {
		t.Fatal(err)
	}
	p, tg := serve(t, "nbdkit", "-f", "--exit-with-parent", "-U", "SOCKET", "--filter=delay", "file", file, "rdelay=1ms", "wdelay=1ms")
	c := open(t, tg, Options{})
	var wg sync.WaitGroup
	var stop atomic.Bool
	for w := range workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 7))
			twin := make([]byte, part)
			base := int64(w) * part
			for !stop.Load() {
				off := r.Int64N(part/512) * 512
				n := min((1+r.Int64N(100))*512, part-off)
				b := make([]byte, n)
				if r.IntN(2) == 0 {
					for i := range b {
						b[i] = byte(r.Uint32())
					}
					if err := c.WriteAt(ctx, b, base+off, 0); err != nil {
						t.Error(err)
						return
					}
					copy(twin[off:], b)
				} else {
					if err := c.ReadAt(ctx, b, base+off, 0); err != nil {
						t.Error(err)
						return
					}
					if !bytes.Equal(b, twin[off:off+n]) {
						t.Errorf("worker %d: %d bytes at %d differ", w, n, off)
						return
					}
				}
			}
		})
	}
	for range 8 {
		time.Sleep(100 * time.Millisecond)
		p.kill()
		time.Sleep(20 * time.Millisecond)
		p.start()
	}
	time.Sleep(100 * time.Millisecond)
	stop.Store(true)
	wg.Wait()
	s := c.Stats()
	t.Logf("%+v", s)
	if s.Reconnects == 0 || s.Resent == 0 {
		t.Error("nothing was lost: the test tested nothing")
	}
	kindIs(t, c.Flush(ctx, 0), block.KindIO)
	if err := c.Flush(ctx, 0); err != nil {
		t.Fatal(err)
	}
	// A loss with nothing unflushed is no doubt.
	p.kill()
	p.start()
	if err := c.Flush(ctx, 0); err != nil {
		t.Fatal(err)
	}
}

func TestOutOfReach(t *testing.T) {
	p, tg := serve(t, "nbdkit", "-f", "--exit-with-parent", "-U", "SOCKET", "memory", "1M")
	c := open(t, tg, Options{ReconnectTimeout: 150 * time.Millisecond})
	p.kill()
	b := make([]byte, 512)
	err := c.ReadAt(ctx, b, 0, 0)
	kindIs(t, err, block.KindUnavailable)
	t.Log(err)
	short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	p.start()
	for range 200 {
		if err = c.ReadAt(ctx, b, 0, 0); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		t.Fatal(err)
	}
	p.kill()
	<-short.Done()
	kindIs(t, c.ReadAt(short, b, 0, 0), block.KindCanceled)

	// For ever: until the caller gives up, or Close.
	p.start()
	c2 := open(t, tg, Options{})
	p.kill()
	short, cancel = context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	err = c2.ReadAt(short, b, 0, 0)
	kindIs(t, err, block.KindCanceled)
	t.Log(err)
	done := make(chan error)
	go func() { done <- c2.ReadAt(ctx, b, 0, 0) }()
	time.Sleep(20 * time.Millisecond)
	if err := c2.Close(); err != nil {
		t.Fatal(err)
	}
	kindIs(t, <-done, block.KindClosed)
	_, err = Open(ctx, tg, Options{})
	kindIs(t, err, block.KindUnavailable)
	t.Log(err)
}

func TestNoSuchExport(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	_, tg := serve(t, "qemu-nbd", "-f", "raw", "-t", "-e", "8", "-x", "the disk", "-k", "SOCKET", file)
	_, err := Open(ctx, tg, Options{})
	kindIs(t, err, block.KindNotFound)
	if !strings.Contains(err.Error(), `"the disk"`) {
		t.Fatalf("%v does not name the export there is", err)
	}
	t.Log(err)
	tg = target(t, "nbd+unix:///the%20disk?socket="+tg.Address)
	open(t, tg, Options{ReadOnly: true})
}

// TestServerErrors injects errors.
func TestServerErrors(t *testing.T) {
	_, tg := serve(t, "nbdkit", "-f", "--exit-with-parent", "-U", "SOCKET", "--filter=error", "memory", "1M",
		"error-pread=EIO", "error-pread-rate=100%", "error-pwrite=ENOSPC", "error-pwrite-rate=100%")
	c := open(t, tg, Options{})
	b := make([]byte, 4096)
	kindIs(t, c.ReadAt(ctx, b, 0, 0), block.KindIO)
	kindIs(t, c.WriteAt(ctx, b, 0, 0), block.KindNoSpace)
	if c.Stats().Errors != 2 || c.Stats().Resent != 0 {
		t.Fatalf("%+v", c.Stats())
	}
}

// authority makes a directory of certificates for servers and clients.
func authority(t *testing.T, names ...string) string {
	t.Helper()
	dir := t.TempDir()
	write := func(name, kind string, der []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	must(err)
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(crand.Reader, ca, ca, &caKey.PublicKey, caKey)
	must(err)
	write("ca-cert.pem", "CERTIFICATE", der)
	for i, who := range []string{"server", "client"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
		must(err)
		crt := &x509.Certificate{SerialNumber: big.NewInt(int64(i + 2)), Subject: pkix.Name{CommonName: who}, NotBefore: time.Now().Add(-time.Hour),
			NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature, DNSNames: names,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
		der, err := x509.CreateCertificate(crand.Reader, crt, ca, &key.PublicKey, caKey)
		must(err)
		write(who+"-cert.pem", "CERTIFICATE", der)
		der, err = x509.MarshalPKCS8PrivateKey(key)
		must(err)
		write(who+"-key.pem", "PRIVATE KEY", der)
	}
	return dir
}

func TestTLS(t *testing.T) {
	need(t, "nbdkit")
	certs, other := authority(t, "disks.example"), authority(t, "disks.example")
	_, tg := serve(t, "nbdkit", "-f", "--exit-with-parent", "--tls=require", "--tls-certificates="+certs, "--tls-verify-peer", "-U", "SOCKET", "memory", "3M")
	uri := func(args string, a ...any) Target {
		return target(t, "nbds+unix:///?socket="+tg.Address+fmt.Sprintf(args, a...))
	}
	twinTest(t, open(t, uri("&tls-certificates=%s", certs), Options{}), 100)
	open(t, uri("&tls-certificates=%s&tls-hostname=disks.example", certs), Options{})
	open(t, uri("&tls-certificates=%s&tls-hostname=other.example&tls-verify-peer=0", certs), Options{})
	for name, tg := range map[string]Target{
		"wrong name":      uri("&tls-certificates=%s&tls-hostname=other.example", certs),
		"wrong authority": uri("&tls-certificates=%s", other),
		"in the clear":    tg,
	} {
		_, err := Open(ctx, tg, Options{})
		t.Logf("%s: %v", name, err)
		kindIs(t, err, block.KindDenied)
	}
	_, err := Open(ctx, uri("&tls-certificates=/nowhere"), Options{})
	kindIs(t, err, block.KindInvalid)

	_, plain := serve(t, "nbdkit", "-f", "--exit-with-parent", "-U", "SOCKET", "memory", "1M")
	_, err = Open(ctx, target(t, "nbds+unix:///?socket="+plain.Address+"&tls-certificates="+certs), Options{})
	t.Log(err)
	kindIs(t, err, block.KindDenied)
}

func TestTCP(t *testing.T) {
	need(t, "nbdkit")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	_, port, _ := net.SplitHostPort(addr)
	p := &peer{t: t, addr: [2]string{"tcp", addr}, argv: []string{"nbdkit", "-f", "--exit-with-parent", "-i", "127.0.0.1", "-p", port, "memory", "3M"}}
	p.start()
	t.Cleanup(p.kill)
	twinTest(t, open(t, target(t, "nbd://"+addr), Options{}), 100)
}

func BenchmarkRead64K(b *testing.B) {
	if _, err := exec.LookPath("nbdkit"); err != nil {
		b.Skip("nbdkit is not installed")
	}
	sock := filepath.Join(b.TempDir(), "s")
	cmd := exec.Command("nbdkit", "-f", "--exit-with-parent", "-U", sock, "pattern", "1G")
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	tg, _ := ParseURI("nbd+unix:///?socket=" + sock)
	var c *Client
	for range 200 {
		var err error
		if c, err = Open(ctx, tg, Options{}); err == nil {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	defer c.Close()
	b.SetBytes(64 << 10)
	b.SetParallelism(8)
	b.ReportAllocs()
	var at atomic.Int64
	b.RunParallel(func(pb *testing.PB) {
		p := make([]byte, 64<<10)
		for pb.Next() {
			if err := c.ReadAt(ctx, p, at.Add(64<<10)%(1<<30-64<<10)&^511, 0); err != nil {
				b.Error(err)
			}
		}
	})
}

// TestCancelStress: callers give up at random moments while the server is
// killed now and then. A buffer is never touched after its call, and what is
// read is right.
func TestCancelStress(t *testing.T) {
	p, tg := serve(t, "nbdkit", "-f", "--exit-with-parent", "-U", "SOCKET", "--filter=delay", "pattern", "8M", "rdelay=1ms")
	c := open(t, tg, Options{})
	want := make([]byte, 8<<20)
	if err := c.ReadAt(ctx, want, 0, 0); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var stop atomic.Bool
	var gone, done atomic.Int64
	for w := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 9))
			b := make([]byte, 1<<20)
			canary := bytes.Repeat([]byte{0xcc}, len(b))
			for !stop.Load() {
				n := 512 * (1 + r.Int64N(256))
				off := r.Int64N((8<<20-n)/512+1) * 512
				short, cancel := context.WithTimeout(ctx, time.Duration(r.Int64N(int64(20*time.Millisecond))))
				err := c.ReadAt(short, b[:n], off, 0)
				cancel()
				switch block.KindOf(err) {
				case block.KindNone:
					done.Add(1)
					if !bytes.Equal(b[:n], want[off:off+n]) {
						t.Errorf("%d bytes at %d differ", n, off)
						return
					}
				case block.KindCanceled:
					gone.Add(1)
					copy(b, canary)
					time.Sleep(2 * time.Millisecond)
					if !bytes.Equal(b, canary) {
						t.Error("a buffer was touched after its call")
						return
					}
				default:
					t.Error(err)
					return
				}
			}
		})
	}
	for range 3 {
		time.Sleep(250 * time.Millisecond)
		p.kill()
		p.start()
	}
	time.Sleep(250 * time.Millisecond)
	stop.Store(true)
	wg.Wait()
	t.Logf("%d answered, %d given up; %+v", done.Load(), gone.Load(), c.Stats())
	if done.Load() == 0 || gone.Load() == 0 {
		t.Error("the test tested nothing")
	}
}
