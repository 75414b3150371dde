package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"forerun/api"
	"forerun/api/client"
)

const mib = 1 << 20

// long asks for the sizes and outages that take minutes (make long).
var long = os.Getenv("FORERUN_LONG") != ""

// TestEveryImageFormat serves a disk out of each format and copies it through
// the export with a foreign client.
func TestEveryImageFormat(t *testing.T) {
	need(t, "qemu-img", "qemu-nbd", "nbdcopy")
	s := newSite(t)
	raw := s.disk("src.raw", 96*mib, 1)
	vols := []string{"raw=" + raw}
	for _, f := range []struct{ name, format, options string }{
		{"qcow2", "qcow2", "cluster_size=65536"}, {"qcow2z", "qcow2", ""}, {"vmdk", "vmdk", ""},
		{"vmdks", "vmdk", "subformat=streamOptimized"}, {"vpc", "vpc", "force_size=on"}, {"vhdx", "vhdx", ""},
	} {
		img := s.path(f.name + ".img")
		args := []string{"convert", "-f", "raw", "-O", f.format}
		if f.options != "" {
			args = append(args, "-o", f.options)
		}
		if f.name == "qcow2z" {
			args = append(args, "-c")
		}
		output(t, "qemu-img", append(args, raw, img)...)
		vols = append(vols, f.name+"="+img+"?format="+f.format)
	}
	s.startBackend(vols...)
	var names []string
	for _, v := range vols {
		names = append(names, v[:strings.IndexByte(v, '=')])
	}
	s.startFrontend(names)
	for _, n := range names {
		out := s.path("out." + n)
		output(t, "nbdcopy", s.uri(n), out)
		// VHDX rounds the size up to a mebibyte and VHD to a sector; the content is the same.
		if st, err := os.Stat(out); err != nil || st.Size() < 96*mib || st.Size() > 97*mib {
			t.Fatalf("%s: %v %v", n, st.Size(), err)
		}
		if err := os.Truncate(out, 96*mib); err != nil {
			t.Fatal(err)
		}
		same(t, raw, out)
	}
	// The sources held the same content, so the store holds it once.
	v := s.awaitFilled("vhdx")
	if v.Store.PlainBytes > 100*mib {
		t.Errorf("seven equal disks of 96 MiB take %d bytes in the store", v.Store.PlainBytes)
	}
	for _, sig := range []*proc{s.frontend, s.backend} {
		sig.end(t, syscall.SIGTERM)
	}
}

// TestHugeSparseDisk: 64 TiB with little data is served at once and costs
// memory and link for the data only.
func TestHugeSparseDisk(t *testing.T) {
	need(t, "qemu-img", "qemu-io", "qemu-nbd", "nbdcopy")
	s := newSite(t)
	img := s.path("huge.qcow2")
	output(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", img, "64T")
	noise := s.path("noise")
	f, err := os.Create(noise)
	if err != nil {
		t.Fatal(err)
	}
	piece := int64(64 * mib)
	if long {
		piece = 256 * mib
	}
	b := make([]byte, piece)
	fillNoise(rand.New(rand.NewPCG(2, 2)), b)
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
	f.Close()
	const pieces = 4
	args := []string{"-f", "qcow2"}
	for i := range pieces {
		args = append(args, "-c", fmt.Sprintf("write -s %s %dG %d", noise, i*16000+7, piece))
	}
	output(t, "qemu-io", append(args, img)...)
	began := time.Now()
	s.startBackend("huge=" + img + "?format=qcow2")
	s.startFrontend([]string{"huge"})
	output(t, "qemu-io", "-r", "-f", "raw", "-c", "read -P 0 1T 4k", s.uri("huge"))
	served := time.Since(began)
	if served > 5*time.Second {
		t.Errorf("served after %v", served)
	}
	output(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", "-U", img, s.uri("huge"))
	v := s.awaitFilled("huge")
	data := pieces * piece
	// All pieces hold the same, so it crosses about once.
	if got := v.WAN.ReceivedBytes; got < piece || got > piece+data/10+8*mib {
		t.Errorf("%d bytes crossed the link for %d bytes of data, %d of them different", got, data, piece)
	}
	if m := peakMemory(t, s.frontend); m > 512*mib {
		t.Errorf("the frontend took %d MiB of memory", m/mib)
	} else {
		t.Logf("served after %v, peak memory %d MiB, link %.1f MiB for %d MiB of data", served, m/mib, float64(v.WAN.ReceivedBytes)/mib, data/mib)
	}
	if n := v.Chunks.Untouched + v.Chunks.Held + v.Chunks.Zero + v.Chunks.Modified; n != v.SizeBytes/v.ChunkBytes {
		t.Errorf("%d chunks of %d are accounted for", n, v.SizeBytes/v.ChunkBytes)
	}
}

// TestForeignClients writes and reads through clients of other projects.
func TestForeignClients(t *testing.T) {
	need(t, "qemu-img", "qemu-io", "nbdinfo", "nbdcopy", "fio")
	s := newSite(t)
	src := s.disk("src.raw", 128*mib, 3)
	before := sum(t, src)
	s.startBackend("d=" + src)
	s.startFrontend([]string{"d"}, "--policy", "isolated", "--fill-limit", "20000000")
	t.Run("nbdinfo", func(t *testing.T) {
		info := decode[struct {
			Exports []struct {
				Name     string   `json:"export-name"`
				Size     int64    `json:"export-size"`
				Contexts []string `json:"contexts"`
				FUA      bool     `json:"can_fua"`
				Multi    bool     `json:"can_multi_conn"`
				Fast     bool     `json:"can_fast_zero"`
				Cache    bool     `json:"can_cache"`
			} `json:"exports"`
		}](t, output(t, "nbdinfo", "--json", s.uri("d")))
		e := info.Exports[0]
		if e.Name != "d" || e.Size != 128*mib || !e.FUA || !e.Multi || !e.Fast || !e.Cache ||
			!strings.Contains(strings.Join(e.Contexts, " "), "base:allocation forerun:state") {
			t.Errorf("%+v", e)
		}
		if l := output(t, "nbdinfo", "--list", s.uri("")); !strings.Contains(l, `export="d"`) {
			t.Error(l)
		}
		if m := output(t, "nbdinfo", "--map=forerun:state", s.uri("d")); !strings.Contains(m, "134217728") && len(strings.Split(m, "\n")) < 2 {
			t.Error(m)
		}
		output(t, "nbdinfo", "--map", s.uri("d"))
	})
	t.Run("qemu-img convert and compare", func(t *testing.T) {
		output(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", s.uri("d"), s.path("c.qcow2"))
		output(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", s.path("c.qcow2"), src)
	})
	t.Run("qemu-io", func(t *testing.T) {
		out := output(t, "qemu-io", "-f", "raw", s.uri("d"),
			"-c", "write -P 0x11 1000 3000", "-c", "read -P 0x11 1000 3000", // not even a sector
			"-c", "write -f -P 0x22 5M 64k", "-c", "write -z 6M 256k", "-c", "write -z -u 7M 1M",
			"-c", "discard 8M 1M", "-c", "flush", "-c", "read -P 0x22 5M 64k", "-c", "read -P 0 6M 256k", "-c", "read -P 0 7M 1M",
			"-c", "aio_write -P 0x33 9M 1M", "-c", "aio_flush", "-c", "read -P 0x33 9M 1M")
		if strings.Contains(out, "Pattern verification failed") {
			t.Fatal(out)
		}
	})
	t.Run("nbdcopy there and back", func(t *testing.T) {
		in := s.disk("in.raw", 128*mib, 4)
		output(t, "nbdcopy", "--flush", in, s.uri("d"))
		output(t, "nbdcopy", s.uri("d"), s.path("back.raw"))
		same(t, in, s.path("back.raw"))
	})
	t.Run("fio verify", func(t *testing.T) {
		if !strings.Contains(output(t, "fio", "--enghelp"), "nbd") {
			t.Skip("this fio has no nbd engine")
		}
		out := output(t, "fio", "--name=v", "--ioengine=nbd", "--uri="+s.uri("d"), "--rw=randwrite", "--bsrange=512-64k", "--bs_unaligned=0",
			"--blockalign=512", "--size=128m", "--io_size=64m", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--do_verify=1", "--randseed=7")
		if strings.Contains(out, "verify:") && strings.Contains(out, "bad") {
			t.Fatal(out)
		}
	})
	t.Run("libnbd", func(t *testing.T) {
		if exec.Command("/usr/bin/python3", "-c", "import nbd").Run() != nil {
			t.Skip("python3-libnbd is not installed")
		}
		output(t, "/usr/bin/python3", "-c", `
import nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
a = bytes(range(256)) * 16
h.pwrite(a, 12345)
h.cache(65536, 0)
h.flush()
assert h.pread(len(a), 12345) == a
h.pwrite(b"z" * 4096, 1048576, nbd.CMD_FLAG_FUA)
h.zero(4096, 1048576, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(4096, 1048576) == bytes(4096)
for bad in [lambda: h.pread(4096, h.get_size()), lambda: h.pwrite(b"x" * 512, h.get_size() - 1)]:
    h.set_strict_mode(0)
    try: bad()
    except nbd.Error: pass
    else: raise SystemExit("beyond the end was served")
assert h.pread(len(a), 12345) == a
h.shutdown()`, s.uri("d"))
	})
	if sum(t, src) != before {
		t.Error("the source was changed")
	}
}

// TestFileSystemThroughLoop mounts an ext4 file system of the export by way of
// nbdfuse and a loop device, works in it, and checks it at both ends.
func TestFileSystemThroughLoop(t *testing.T) {
	need(t, "nbdfuse", "losetup", "mkfs.ext4", "e2fsck", "mount")
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
	s := newSite(t)
	src := s.path("src.raw")
	f, err := os.Create(src)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(256 * mib); err != nil {
		t.Fatal(err)
	}
	f.Close()
	output(t, "mkfs.ext4", "-q", "-d", "/usr/lib/python3", src)
	s.startBackend("fs=" + src)
	s.startFrontend([]string{"fs"})
	mnt, point := s.path("fuse"), s.path("mnt")
	for _, d := range []string{mnt, point} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	fuse := start(t, s.path("nbdfuse.log"), "nbdfuse", mnt+"/nbd", s.uri("fs"))
	defer func() {
		_ = exec.Command("umount", mnt).Run()
		fuse.end(t, syscall.SIGKILL)
	}()
	s.await(fuse, func() bool { _, err := os.Stat(mnt + "/nbd"); return err == nil })
	loop := strings.TrimSpace(output(t, "losetup", "--find", "--show", mnt+"/nbd"))
	defer exec.Command("losetup", "-d", loop).Run()
	output(t, "mount", loop, point)
	mounted := true
	defer func() {
		if mounted {
			_ = exec.Command("umount", point).Run()
		}
	}()
	output(t, "diff", "-r", "--no-dereference", "--exclude=lost+found", "/usr/lib/python3", point)
	output(t, "cp", "-a", "/usr/share/perl", point+"/copy")
	output(t, "sync")
	output(t, "diff", "-r", "--no-dereference", "/usr/share/perl", point+"/copy")
	output(t, "umount", point)
	mounted = false
	output(t, "losetup", "-d", loop)
	s.awaitFilled("fs")
	native := s.path("native.raw")
	output(t, binary, "cutover", "--state", s.path("fstate"), "--volume", "fs", "--to", native)
	s.frontend.end(t, syscall.SIGTERM)
	output(t, "e2fsck", "-fn", native)
}

// TestCutoverUnderWrites moves a disk while it is written, restarts the
// frontend on the target, and finds the native image alone to be the disk.
func TestCutoverUnderWrites(t *testing.T) {
	need(t, "fio", "qemu-io", "qemu-img")
	s := newSite(t)
	src := s.disk("src.raw", 128*mib, 5)
	before := sum(t, src)
	s.startBackend("d=" + src)
	s.startFrontend([]string{"d"}, "--policy", "isolated", "--fill-paused")
	native := s.path("native.raw")
	cut := func(more ...string) ([]byte, error) {
		args := append([]string{"cutover", "--state", s.path("fstate"), "--volume", "d", "--to", native}, more...)
		return exec.Command(binary, args...).CombinedOutput()
	}
	if out, err := cut(); err == nil || !strings.Contains(string(out), "--wait") {
		t.Fatalf("a cut-over before everything is here: %v\n%s", err, out)
	}
	output(t, binary, "fill", "resume", "--state", s.path("fstate"), "--volume", "d")
	load := start(t, s.path("fio.log"), "fio", "--name=w", "--ioengine=nbd", "--uri="+s.uri("d"), "--rw=randwrite", "--bs=4k", "--size=128m",
		"--io_size=1g", "--iodepth=8", "--rate_iops=1500", "--time_based", "--runtime=6", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0")
	time.Sleep(time.Second)
	out, err := cut("--wait", "--threshold", "1M")
	if err != nil || !strings.Contains(string(out), "the pause was") {
		t.Fatalf("%v\n%s", err, out)
	}
	v := s.status("d")
	if v.Primary != api.PrimaryTarget || v.Phase != api.PhaseSwitched || v.Cutover.PauseUs <= 0 || v.Cutover.PauseUs > 1e6 || v.Cutover.Rounds < 2 {
		t.Errorf("%+v", v.Cutover)
	}
	t.Logf("%s", strings.TrimSpace(string(out)))
	if err := <-load.done; err != nil {
		b, _ := os.ReadFile(s.path("fio.log"))
		t.Fatalf("the load across the cut-over: %v\n%s", err, b)
	}
	load.done <- nil
	s.backend.end(t, syscall.SIGTERM)
	// Without a backend, and after a crash, the frontend goes on with the target.
	output(t, "qemu-io", "-f", "raw", "-c", "write -P 0x77 1M 64k", "-c", "flush", s.uri("d"))
	s.frontend.end(t, syscall.SIGKILL)
	s.startFrontend([]string{"d"}, "--policy", "isolated")
	output(t, "qemu-io", "-f", "raw", "-c", "read -P 0x77 1M 64k", s.uri("d"))
	output(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", s.uri("d"), s.path("last.raw"))
	s.frontend.end(t, syscall.SIGTERM)
	same(t, s.path("last.raw"), native)
	if sum(t, src) != before {
		t.Error("the source was changed")
	}
}

// TestKilledAndRestarted kills both daemons during fill and writes.
func TestKilledAndRestarted(t *testing.T) {
	need(t, "qemu-io", "nbdcopy")
	s := newSite(t)
	src := s.disk("src.raw", 256*mib, 6)
	s.startBackend("d=" + src)
	s.startFrontend([]string{"d"}, "--fill-limit", "15000000")
	output(t, "qemu-io", "-f", "raw", "-c", "write -P 0x5a 10M 3M", "-c", "write -P 0x5b 77777 100", "-c", "flush", s.uri("d"))
	time.Sleep(2 * time.Second)
	held := s.status("d").Chunks
	s.frontend.end(t, syscall.SIGKILL)
	s.backend.end(t, syscall.SIGKILL)
	// The frontend alone serves what it holds.
	s.startFrontend([]string{"d"}, "--fill-limit", "15000000")
	output(t, "qemu-io", "-f", "raw", "-c", "read -P 0x5a 10M 3M", s.uri("d"))
	now := s.status("d")
	if lost := held.Held - now.Chunks.Held; lost*now.ChunkBytes > 64*mib || now.Chunks.Held == 0 {
		t.Errorf("%d chunks were held before the kill, %d after", held.Held, now.Chunks.Held)
	}
	if now.Waiting == "" {
		t.Error("nothing says that the backend is away")
	}
	s.startBackend("d=" + src)
	output(t, binary, "fill", "limit", "--rate", "0", "--state", s.path("fstate"), "--volume", "d")
	s.awaitFilled("d")
	output(t, "nbdcopy", s.uri("d"), s.path("out.raw"))
	patch(t, src, 10*mib, 3*mib, 0x5a)
	patch(t, src, 77777, 100, 0x5b)
	same(t, src, s.path("out.raw"))
}

func patch(t *testing.T, p string, off, n int64, b byte) {
	t.Helper()
	f, err := os.OpenFile(p, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, n)
	for i := range buf {
		buf[i] = b
	}
	if _, err := f.WriteAt(buf, off); err != nil {
		t.Fatal(err)
	}
}

// TestLinkCut holds the link back under a load that needs it.
func TestLinkCut(t *testing.T) {
	need(t, "nbdcopy")
	s := newSite(t)
	src := s.disk("src.raw", 192*mib, 7)
	s.startBackend("d=" + src)
	r := newRelay(t, s.addr)
	real := s.addr
	s.addr = r.ln.Addr().String()
	s.startFrontend([]string{"d"}, "--fill-limit", "20000000")
	s.addr = real
	done := make(chan error, 1)
	go func() {
		out, err := exec.Command("nbdcopy", s.uri("d"), s.path("out.raw")).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		done <- err
	}()
	time.Sleep(300 * time.Millisecond)
	r.hold(true)
	cut := 8 * time.Second // longer than a dead peer is believed in
	if long {
		cut = time.Minute
	}
	time.Sleep(cut)
	if v := s.status("d"); v.WAN.Connected || v.Waiting == "" {
		t.Errorf("cut for %v, and status says %+v, waiting %q", cut, v.WAN, v.Waiting)
	}
	r.hold(false)
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("the copy did not go on")
	}
	same(t, src, s.path("out.raw"))
	v := s.awaitFilled("d")
	if v.WAN.Reconnects == 0 {
		t.Error("no reconnect was counted")
	}
}

// TestRefusals: who may not talk is told why.
func TestRefusals(t *testing.T) {
	s := newSite(t)
	src := s.disk("src.raw", mib, 8)
	s.startBackend("d=" + src)
	other := s.path("other")
	output(t, binary, "pki", "init", "--dir", other)
	output(t, binary, "pki", "issue", "--dir", other, "--role", "frontend", "--name", "new", "--host", "localhost")
	output(t, binary, "pki", "issue", "--dir", s.path("pki"), "--role", "operator", "--name", "op", "--host", "localhost")
	output(t, binary, "pki", "issue", "--dir", s.path("pki"), "--role", "frontend", "--name", "late", "--host", "localhost", "--days", "-1")
	for _, c := range []struct {
		name, pki, node, addr string
		want                  string
	}{
		{"no certificate", s.path("pki"), "nobody", s.addr, "pki issue"},
		{"wrong CA", other, "new", s.addr, "authority"},
		{"wrong role", s.path("pki"), "op", s.addr, "operator"},
		{"expired", s.path("pki"), "late", s.addr, "expired"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			out, err := exec.CommandContext(ctx, binary, "frontend", "--pki", c.pki, "--name", c.node, "--state", filepath.Join(t.TempDir(), "s"),
				"--backend", c.addr, "--volume", "d", "--export", "nbd+unix:///?socket="+filepath.Join(t.TempDir(), "x")).CombinedOutput()
			if err == nil || ctx.Err() != nil || !strings.Contains(string(out), c.want) {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
	t.Run("no such volume", func(t *testing.T) {
		out, err := exec.Command(binary, "frontend", "--pki", s.path("pki"), "--name", "new", "--state", s.path("x"),
			"--backend", s.addr, "--volume", "nope", "--export", "nbd+unix:///?socket="+s.path("y")).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "no such volume") {
			t.Errorf("%v\n%s", err, out)
		}
	})
	t.Run("second backend", func(t *testing.T) {
		out, err := exec.Command(binary, "backend", "--pki", s.path("pki"), "--name", "old", "--state", s.path("b2"),
			"--listen", "127.0.0.1:0", "--volume", "d="+src).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "src.raw") {
			t.Errorf("%v\n%s", err, out)
		}
	})
	t.Run("the old guest", func(t *testing.T) {
		need(t, "qemu-io")
		if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 4k", src).CombinedOutput(); err == nil {
			t.Errorf("qemu could write an owned source:\n%s", out)
		}
	})
	t.Run("an image whose format is not said", func(t *testing.T) {
		need(t, "qemu-img")
		output(t, "qemu-img", "create", "-q", "-f", "qcow2", s.path("i.qcow2"), "10M")
		out, err := exec.Command(binary, "backend", "--pki", s.path("pki"), "--name", "old", "--state", s.path("b3"),
			"--listen", "127.0.0.1:0", "--volume", "d="+s.path("i.qcow2")).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "format=qcow2") {
			t.Errorf("%v\n%s", err, out)
		}
	})
}

// TestCorruptPackIsRefetched flips bytes of the store while the frontend is down.
func TestCorruptPackIsRefetched(t *testing.T) {
	need(t, "nbdcopy")
	s := newSite(t)
	src := s.disk("src.raw", 64*mib, 9)
	s.startBackend("d=" + src)
	s.startFrontend([]string{"d"})
	s.awaitFilled("d")
	s.frontend.end(t, syscall.SIGTERM)
	r := rand.New(rand.NewPCG(9, 9))
	flips := 0
	err := filepath.WalkDir(s.path("fstate/store"), func(p string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(p, ".pack") {
			return err
		}
		f, err := os.OpenFile(p, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			return err
		}
		for range 40 {
			var b [1]byte
			at := 4096 + r.Int64N(max(st.Size()-8192, 1))
			if _, err := f.ReadAt(b[:], at); err != nil {
				return err
			}
			b[0] ^= 1 << r.IntN(8)
			if _, err := f.WriteAt(b[:], at); err != nil {
				return err
			}
			flips++
		}
		return nil
	})
	if err != nil || flips == 0 {
		t.Fatalf("%d flips, %v", flips, err)
	}
	s.startFrontend([]string{"d"})
	output(t, "nbdcopy", s.uri("d"), s.path("out.raw"))
	same(t, src, s.path("out.raw"))
	if v := s.status("d"); v.Chunks.Corrupt == 0 {
		t.Errorf("%d bits were flipped and nothing was counted: %+v", flips, v.Chunks)
	}
}

// TestFullDisk runs the frontend's disk full, then gives it space.
func TestFullDisk(t *testing.T) {
	need(t, "qemu-io", "nbdcopy", "mount")
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
	s := newSite(t)
	src := s.disk("src.raw", 256*mib, 10)
	if err := os.Mkdir(s.path("fstate"), 0o700); err != nil {
		t.Fatal(err)
	}
	output(t, "mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", s.path("fstate"))
	defer func() {
		s.frontend.end(t, syscall.SIGKILL)
		output(t, "umount", s.path("fstate"))
	}()
	s.startBackend("d=" + src)
	s.startFrontend([]string{"d"}, "--fill-paused", "--scratch", "0")
	done := make(chan error, 1)
	go func() {
		out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write -P 0x41 0 30M", "-c", "write -P 0x42 32M 30M", "-c", "write -P 0x43 64M 30M",
			"-c", "write -P 0x44 96M 30M", "-c", "write -P 0x45 128M 30M", "-c", "flush", s.uri("d")).CombinedOutput()
		if err == nil && strings.Contains(string(out), "failed") {
			err = fmt.Errorf("%s", out)
		}
		done <- err
	}()
	waiting := ""
	s.await(s.frontend, func() bool { waiting = s.status("d").Waiting; return waiting != "" })
	t.Logf("waiting: %s", waiting)
	select {
	case err := <-done:
		t.Fatalf("the writes ended on a full disk: %v", err)
	default:
	}
	output(t, "mount", "-o", "remount,size=2g", s.path("fstate"))
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	output(t, binary, "fill", "resume", "--state", s.path("fstate"), "--volume", "d")
	s.awaitFilled("d")
	output(t, "nbdcopy", s.uri("d"), s.path("out.raw"))
	for i := range int64(5) {
		patch(t, src, i*32*mib, 30*mib, byte(0x41+i))
	}
	same(t, src, s.path("out.raw"))
}

// TestTLSExport serves nbds and refuses clients without a certificate.
func TestTLSExport(t *testing.T) {
	need(t, "nbdinfo", "nbdcopy")
	s := newSite(t)
	src := s.disk("src.raw", 8*mib, 11)
	s.startBackend("d=" + src)
	addr := freePort(t)
	s.startFrontend([]string{"d"}, "--export", "nbds://"+addr)
	certs := s.path("certs")
	if err := os.Mkdir(certs, 0o700); err != nil {
		t.Fatal(err)
	}
	output(t, binary, "pki", "issue", "--dir", s.path("pki"), "--role", "operator", "--name", "vm", "--host", "localhost")
	for from, to := range map[string]string{"ca.crt": "ca-cert.pem", "vm.crt": "client-cert.pem", "vm.key": "client-key.pem"} {
		output(t, "cp", s.path("pki/"+from), certs+"/"+to)
	}
	uri := "nbds://localhost:" + addr[strings.LastIndexByte(addr, ':')+1:] + "/d?tls-certificates=" + certs
	output(t, "nbdcopy", uri, s.path("out.raw"))
	same(t, src, s.path("out.raw"))
	for _, n := range []string{"client-cert.pem", "client-key.pem"} {
		if err := os.Remove(certs + "/" + n); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("nbdinfo", uri).CombinedOutput(); err == nil {
		t.Errorf("a client without a certificate was served:\n%s", out)
	}
	if out, err := exec.Command("nbdinfo", strings.Replace(strings.SplitN(uri, "?", 2)[0], "nbds", "nbd", 1)).CombinedOutput(); err == nil {
		t.Errorf("a client without TLS was served:\n%s", out)
	}
}

// TestStatusAndFillCommands drives the background from the command line.
func TestStatusAndFillCommands(t *testing.T) {
	s := newSite(t)
	src := s.disk("src.raw", 128*mib, 12)
	s.startBackend("a="+src, "b="+s.disk("b.raw", 8*mib, 13))
	s.startFrontend([]string{"a", "b"}, "--fill-limit", "1000000")
	st := s.path("fstate")
	both := decode[[]api.Volume](t, output(t, binary, "status", "--state", st, "--json"))
	if len(both) != 2 {
		t.Fatalf("%d volumes", len(both))
	}
	one := decode[map[string]any](t, output(t, binary, "status", "--state", st, "--volume", "a", "--json"))
	for _, f := range []string{"volume", "phase", "primary", "size_bytes", "chunk_bytes", "chunks", "wan", "demand", "fill", "store_bytes", "cutover"} {
		if _, ok := one[f]; !ok {
			t.Errorf("status lacks %s", f)
		}
	}
	output(t, binary, "fill", "pause", "--state", st, "--volume", "a")
	s.await(s.frontend, func() bool { return s.status("a").Fill.State == "paused" })
	time.Sleep(300 * time.Millisecond)
	before := s.status("a").WAN.BackgroundBytes
	time.Sleep(700 * time.Millisecond)
	if now := s.status("a"); now.WAN.BackgroundBytes != before {
		t.Errorf("paused, and %d bytes came", now.WAN.BackgroundBytes-before)
	}
	output(t, binary, "fill", "limit", "--state", st, "--volume", "a", "--rate", "0")
	output(t, binary, "fill", "resume", "--state", st, "--volume", "a")
	v := s.awaitFilled("a")
	if v.WAN.BackgroundBytes > v.SizeBytes {
		t.Errorf("%d bytes for a disk of %d: something came twice", v.WAN.BackgroundBytes, v.SizeBytes)
	}
	for _, bad := range [][]string{
		{"status", "--state", s.path("nowhere")}, {"status", "--state", st, "--volume", "zz"},
		{"fill", "limit", "--state", st, "--volume", "a", "--rate", "fast"}, {"fill", "stop", "--state", st, "--volume", "a"},
		{"cutover", "--state", st, "--volume", "a"}, {"cutover", "--state", st, "--volume", "a", "--to", st + "/inside"},
		{"backend", "--volume", "x"}, {"nonsense"},
	} {
		if out, err := exec.Command(binary, bad...).CombinedOutput(); err == nil || len(out) < 20 {
			t.Errorf("%v: %v %s", bad, err, out)
		}
	}
	if n, err := client.New(st).Node(context.Background()); err != nil || len(n.Exports) != 1 || n.Role != api.RoleFrontend {
		t.Errorf("%+v, %v", n, err)
	}
	s.frontend.end(t, syscall.SIGTERM)
	s.backend.end(t, syscall.SIGTERM)
}

// TestManyReadersMeetOnOneChunk counts that a chunk crosses the link once.
func TestManyReadersMeetOnOneChunk(t *testing.T) {
	need(t, "qemu-io")
	s := newSite(t)
	s.startBackend("d=" + s.disk("src.raw", 16*mib, 14))
	s.startFrontend([]string{"d"}, "--fill-paused")
	var g sync.WaitGroup
	for range 6 {
		g.Go(func() {
			if out, err := exec.Command("qemu-io", "-r", "-f", "raw", "-c", "read 4M 1M", s.uri("d")).CombinedOutput(); err != nil {
				t.Errorf("%s", out)
			}
		})
	}
	g.Wait()
	first := s.status("d").WAN
	if max := int64(2 * mib); first.DemandBytes+first.BackgroundBytes > max {
		t.Errorf("six readers of the same MiB cost %d bytes", first.DemandBytes+first.BackgroundBytes)
	}
	output(t, "qemu-io", "-r", "-f", "raw", "-c", "read 4M 1M", s.uri("d"))
	if now := s.status("d").WAN; now.DemandBytes != first.DemandBytes {
		t.Errorf("a second read cost %d bytes", now.DemandBytes-first.DemandBytes)
	}
}
