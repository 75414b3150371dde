package source

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"forerun/block"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var ctx = context.Background()

func need(t *testing.T, names ...string) {
	t.Helper()
	for _, n := range names {
		if _, err := exec.LookPath(n); err != nil {
			t.Skipf("%s is not installed", n)
		}
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v %s", name, args, err, out)
	}
	return string(out)
}

func kindIs(t *testing.T, err error, k block.Kind) {
	t.Helper()
	if block.KindOf(err) != k {
		t.Fatalf("%v is of kind %v, want %v", err, block.KindOf(err), k)
	}
}

func open(t *testing.T, spec string, o Options) block.Device {
	t.Helper()
	d, err := Open(ctx, spec, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// patterned makes a raw image of data and holes.
func patterned(t *testing.T, dir string, size int64) (string, []byte) {
	t.Helper()
	r := rand.New(rand.NewPCG(3, 4))
	content := make([]byte, size)
	path := filepath.Join(dir, "plain.raw")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for range 40 {
		n := 512 * (1 + r.Int64N(300))
		off := r.Int64N((size/8-n)/512) * 512 // the rest is a hole, but for the very end
		if r.IntN(8) == 0 {
			off = size - n
		}
		for i := range n {
			content[off+i] = byte(i>>9) ^ byte(off>>9) // compressible
		}
		if _, err := f.WriteAt(content[off:off+n], off); err != nil {
			t.Fatal(err)
		}
	}
	return path, content
}

// same reads the whole device, guided by extents, and compares.
func same(t *testing.T, d block.Device, want []byte) (holes int64) {
	t.Helper()
	size := d.Info().Size
	if size < int64(len(want)) {
		t.Fatalf("%d bytes, want at least %d", size, len(want))
	}
	want = append(bytes.Clone(want), make([]byte, size-int64(len(want)))...)
	for off := int64(0); off < size; {
		ext, err := d.Extents(ctx, nil, off, size-off, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range ext {
			if e.Off != off {
				t.Fatalf("extent %+v where %d was due", e, off)
			}
			off = e.End()
			if e.Kind.Zero() {
				holes += e.Len
				if !bytes.Equal(want[e.Off:e.End()], make([]byte, e.Len)) {
					t.Fatalf("%+v holds data", e)
				}
			}
		}
	}
	got := make([]byte, size)
	const step = 1 << 20
	for off := int64(0); off < size; off += step {
		if err := d.ReadAt(ctx, got[off:min(off+step, size)], off, 0); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(got, want) {
		t.Fatal("wrong bytes")
	}
	return holes
}

// TestFormats reads images of all formats and kinds that qemu-img makes.
func TestFormats(t *testing.T) {
	need(t, "qemu-img", "qemu-nbd")
	dir := t.TempDir()
	const size = 24<<20 + 512*7 // not a whole number of clusters or cylinders
	plain, content := patterned(t, dir, size)
	for _, c := range []struct{ name, format, opts string }{
		{"raw", "raw", ""},
		{"qcow2", "qcow2", ""},
		{"qcow2 compressed", "qcow2", "-c"},
		{"qcow2 extended L2", "qcow2", "-o extended_l2=on,cluster_size=128k"},
		{"qcow2 version 2", "qcow2", "-o compat=0.10"},
		{"vmdk sparse", "vmdk", "-o subformat=monolithicSparse"},
		{"vmdk stream", "vmdk", "-o subformat=streamOptimized"},
		{"vmdk flat", "vmdk", "-o subformat=monolithicFlat"},
		{"vmdk split", "vmdk", "-o subformat=twoGbMaxExtentSparse"},
		{"vpc dynamic", "vpc", "-o subformat=dynamic,force_size=on"},
		{"vpc dynamic, rounded by geometry", "vpc", "-o subformat=dynamic"},
		{"vpc fixed", "vpc", "-o subformat=fixed,force_size=on"},
		{"vhdx", "vhdx", ""},
		{"vhdx fixed", "vhdx", "-o subformat=fixed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(dir, strings.ReplaceAll(c.name, " ", "-")+"."+c.format)
			args := append([]string{"convert", "-t", "unsafe", "-f", "raw", "-O", c.format}, strings.Fields(c.opts)...)
			run(t, "qemu-img", append(args, plain, path)...)
			// What QEMU itself reads, whatever it did to the size.
			back := path + ".back"
			run(t, "qemu-img", "convert", "-t", "unsafe", "-f", c.format, "-O", "raw", path, back)
			want, err := os.ReadFile(back)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(want[:size], content) {
				t.Fatal("qemu-img gives other bytes")
			}
			if c.format != "raw" {
				_, err := Open(ctx, path, Options{})
				kindIs(t, err, block.KindInvalid)
				if !strings.Contains(err.Error(), "?format="+c.format) {
					t.Fatalf("%v does not name the flag", err)
				}
			}
			began := time.Now()
			d := open(t, path+"?format="+c.format, Options{})
			t.Logf("opened in %v: %+v", time.Since(began).Round(time.Millisecond), d.Info())
			if c.format != "raw" && !d.Info().ReadOnly {
				t.Fatal("an image was opened for writing unasked")
			}
			holes := same(t, d, want)
			t.Logf("%d of %d bytes are zero by extents", holes, len(want))
			if c.format != "vhdx" && holes < size/4 { // QEMU does not tell the holes of a VHDX
				t.Fatalf("only %d bytes of holes", holes)
			}
		})
	}
}

func TestBackingChain(t *testing.T) {
	need(t, "qemu-img", "qemu-nbd", "qemu-io")
	dir := t.TempDir()
	plain, content := patterned(t, dir, 8<<20)
	base, mid, top := filepath.Join(dir, "base.qcow2"), filepath.Join(dir, "mid.qcow2"), filepath.Join(dir, "top.qcow2")
	run(t, "qemu-img", "convert", "-O", "qcow2", plain, base)
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", mid)
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 17 64k 200k", mid)
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", top)
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 18 128k 64k", "-c", "write -z 1M 1M", top)
	copy(content[64<<10:], bytes.Repeat([]byte{17}, 200<<10))
	copy(content[128<<10:], bytes.Repeat([]byte{18}, 64<<10))
	clear(content[1<<20 : 2<<20])
	same(t, open(t, top+"?format=qcow2", Options{}), content)
}

// TestHugeImage: opening and listing 64 TiB takes no time that grows with it.
func TestHugeImage(t *testing.T) {
	need(t, "qemu-img", "qemu-nbd", "qemu-io")
	path := filepath.Join(t.TempDir(), "huge.qcow2")
	const size = 64 << 40
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path, "64T")
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", "-c", "write -P 2 33T 1M", "-c", "write -P 3 68719476672k 64k", path)
	began := time.Now()
	d := open(t, path+"?format=qcow2", Options{})
	opening := time.Since(began)
	if opening > 3*time.Second {
		t.Errorf("opening took %v", opening)
	}
	began = time.Now()
	var data, at int64
	for calls := 0; at < size; calls++ {
		ext, err := d.Extents(ctx, nil, at, size-at, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range ext {
			if e.Off != at {
				t.Fatalf("%+v where %d was due", e, at)
			}
			at = e.End()
			if e.Kind == block.Data {
				data += e.Len
			}
		}
	}
	t.Logf("opened in %v, listed in %v: %d bytes of data; %+v", opening, time.Since(began), data, d.(*Image).Stats())
	if data < 64<<10+1<<20 || data > 8<<20 {
		t.Fatalf("%d bytes of data", data)
	}
	if time.Since(began) > 15*time.Second {
		t.Errorf("listing took %v", time.Since(began))
	}
}

// TestImageIsOwned: others are kept out while an image is served, also while
// qemu-nbd is being started again, and it survives being killed.
func TestImageIsOwned(t *testing.T) {
	need(t, "qemu-img", "qemu-nbd", "qemu-io")
	dir := t.TempDir()
	plain, content := patterned(t, dir, 4<<20)
	path := filepath.Join(dir, "d.qcow2")
	run(t, "qemu-img", "convert", "-O", "qcow2", plain, path)
	d := open(t, path+"?format=qcow2", Options{StateDir: dir})
	kept := func() {
		t.Helper()
		out, err := exec.Command("qemu-io", "-f", "qcow2", "-c", "write 0 512", path).CombinedOutput()
		if err == nil || !strings.Contains(string(out), `Failed to get "write" lock`) {
			t.Fatalf("qemu-io wrote an image we own: %v %s", err, out)
		}
	}
	kept()
	_, err := Open(ctx, path+"?format=qcow2", Options{})
	kindIs(t, err, block.KindBusy)
	for range 3 {
		killChild(t, d.(*Image))
		kept()
		same(t, d, content)
	}
	if n := d.(*Image).Restarts(); n != 3 {
		t.Errorf("%d restarts", n)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "forerun-source-*")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	kindIs(t, d.ReadAt(ctx, make([]byte, 512), 0, 0), block.KindClosed)
	run(t, "qemu-io", "-f", "qcow2", "-c", "write 0 512", path)
}

// killChild kills the qemu-nbd of m, which it finds by the socket it was given.
func killChild(t *testing.T, m *Image) {
	t.Helper()
	for range 500 {
		procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, p := range procs {
			b, _ := os.ReadFile(p)
			if bytes.Contains(b, []byte("--socket="+m.srv.socket()+"\x00")) {
				var pid int
				for _, c := range strings.Split(p, "/")[2] {
					pid = pid*10 + int(c-'0')
				}
				if err := unix.Kill(pid, unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
				return
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("there is no qemu-nbd")
}

func TestWritableImage(t *testing.T) {
	need(t, "qemu-img", "qemu-nbd")
	path := filepath.Join(t.TempDir(), "d.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
	d := open(t, path+"?format=qcow2", Options{WriteImages: true})
	if d.Info().ReadOnly {
		t.Fatal("read-only")
	}
	want := make([]byte, 4<<20)
	copy(want[1<<20:], bytes.Repeat([]byte{9}, 1<<20))
	if err := d.WriteAt(ctx, want[1<<20:2<<20], 1<<20, block.FUA); err != nil {
		t.Fatal(err)
	}
	_, err := Open(ctx, path+"?format=qcow2", Options{})
	kindIs(t, err, block.KindBusy)
	if out, err := exec.Command("qemu-io", "-f", "qcow2", "-c", "write 0 512", path).CombinedOutput(); err == nil {
		t.Fatalf("qemu-io wrote an image we own: %s", out)
	}
	killChild(t, d.(*Image))
	same(t, d, want)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	run(t, "qemu-img", "check", "-f", "qcow2", path)
	same(t, open(t, path+"?format=qcow2", Options{}), want)
}

// TestRunningMachine: an image that a QEMU writes is refused before qemu-nbd starts.
func TestRunningMachine(t *testing.T) {
	need(t, "qemu-img", "qemu-nbd")
	dir := t.TempDir()
	path, sock := filepath.Join(dir, "d.qcow2"), filepath.Join(dir, "s")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
	cmd := exec.Command("qemu-nbd", "-t", "-f", "qcow2", "-k", sock, path)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	for range 500 { // it greets once the image is open
		if c, err := net.Dial("unix", sock); err == nil {
			n, _ := c.Read(make([]byte, 8))
			c.Close()
			if n > 0 {
				break
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
	for _, o := range []Options{{}, {WriteImages: true}} {
		d, err := Open(ctx, path+"?format=qcow2", o)
		if err == nil {
			d.Close()
		}
		kindIs(t, err, block.KindBusy)
	}
}

func TestImageThatCannotBeOpened(t *testing.T) {
	need(t, "qemu-nbd")
	path := filepath.Join(t.TempDir(), "d.qcow2")
	if err := os.WriteFile(path, bytes.Repeat([]byte("nothing "), 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Open(ctx, path+"?format=qcow2", Options{})
	kindIs(t, err, block.KindInvalid)
	if !strings.Contains(err.Error(), "Image is not in qcow2 format") {
		t.Fatalf("%v does not say what qemu-nbd said", err)
	}
	t.Log(err)
	d := open(t, path, Options{}) // its locks were given back
	d.Close()
	t.Setenv("PATH", t.TempDir())
	_, err = Open(ctx, path+"?format=qcow2", Options{})
	kindIs(t, err, block.KindUnsupported)
	if !strings.Contains(err.Error(), "qemu-utils") {
		t.Fatal(err)
	}
}

func TestParse(t *testing.T) {
	for spec, want := range map[string]parsed{
		"/a/b.img":              {path: "/a/b.img"},
		"/a/b?c":                {path: "/a/b?c"},
		"/a/b?c?format=raw":     {path: "/a/b?c", format: "raw"},
		"b:c":                   {path: "b:c"},
		"./nbd:x?format=vpc":    {path: "./nbd:x", format: "vpc"},
		"/a?format=qcow2":       {path: "/a", format: "qcow2"},
		"nbd://h/x":             {uri: true},
		"nbds+unix:///?socket=": {uri: true},
	} {
		got, err := parse(spec)
		if err != nil || got != want {
			t.Errorf("%s: %+v %v", spec, got, err)
		}
	}
	for _, spec := range []string{"", "/a\x00b", "http://x/y", "/a?format=vdi", "/a?format=", "/a?fromat=raw", "?format=raw", "/a?format=raw&format=raw", "/a?format=raw&x=1"} {
		_, err := parse(spec)
		if block.KindOf(err) != block.KindInvalid {
			t.Errorf("%q: %v", spec, err)
		}
	}
}

// TestMarks: what looks like an image is refused, ?format=raw insists.
func TestMarks(t *testing.T) {
	at := func(size, off int, s string) []byte {
		b := make([]byte, size)
		copy(b[off:], s)
		return b
	}
	for name, c := range map[string]struct {
		content []byte
		want    string
	}{
		"nothing":       {at(4096, 0, ""), ""},
		"one byte":      {[]byte("Q"), ""},
		"boot sector":   {at(4096, 510, "\x55\xaa"), ""},
		"qcow2":         {at(4096, 0, "QFI\xfb"), "qcow2"},
		"vmdk":          {at(4096, 0, "KDMV"), "vmdk"},
		"esx":           {at(4096, 0, "COWD"), "vmdk"},
		"descriptor":    {[]byte("# Disk DescriptorFile\nversion=1\n"), "vmdk"},
		"vhdx":          {at(4096, 0, "vhdxfile"), "vhdx"},
		"vhd":           {at(4096, 0, "conectix"), "vpc"},
		"fixed vhd":     {at(8192, 7680, "conectix"), "vpc"},
		"vhd, 511":      {at(8191, 7680, "conectix"), "vpc"},
		"vdi":           {at(4096, 64, "\x7f\x10\xda\xbe"), "vdi"},
		"qed":           {at(4096, 0, "QED\x00"), "qed"},
		"inside a disk": {at(8192, 4096, "QFI\xfb"), ""},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "d")
			if err := os.WriteFile(path, c.content, 0o600); err != nil {
				t.Fatal(err)
			}
			d, err := Open(ctx, path, Options{})
			if c.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				d.Close()
			} else {
				kindIs(t, err, block.KindInvalid)
				if !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "?format=raw") {
					t.Fatal(err)
				}
			}
			open(t, path+"?format=raw", Options{ReadOnly: true})
		})
	}
}

func TestURIs(t *testing.T) {
	need(t, "nbdkit")
	dir, err := os.MkdirTemp("", "src")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	sock := filepath.Join(dir, "s")
	cmd := exec.Command("nbdkit", "-f", "--exit-with-parent", "-U", sock, "pattern", "1M")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	var d block.Device
	for range 500 {
		if d, err = Open(ctx, "nbd+unix:///?socket="+sock, Options{}); err == nil {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if !d.Info().ReadOnly || d.Info().Size != 1<<20 {
		t.Fatalf("%+v", d.Info())
	}
	_, err = Open(ctx, "nbd+unix:///x", Options{})
	kindIs(t, err, block.KindInvalid)
	_, err = Open(ctx, filepath.Join(dir, "nowhere"), Options{})
	kindIs(t, err, block.KindNotFound)
	if !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
}

func FuzzSpec(f *testing.F) {
	for _, s := range []string{"/a?format=qcow2", "nbd://[::1]:1/x?y", "a:b", "?", "/a?b=c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, spec string) {
		p, err := parse(spec)
		if err == nil && !p.uri && (p.path == "" || !strings.HasPrefix(spec, p.path)) {
			t.Fatalf("%q became %+v", spec, p)
		}
		mark([]byte(spec), []byte(spec))
	})
}

// TestOrphan: qemu-nbd does not outlive a process that is killed.
func TestOrphan(t *testing.T) {
	need(t, "qemu-img", "qemu-nbd")
	if path := os.Getenv("FORERUN_TEST_ORPHAN"); path != "" { // the one that is killed
		d, err := Open(ctx, path, Options{})
		if err != nil {
			os.Exit(1)
		}
		os.Stdout.WriteString(d.(*Image).srv.socket() + "\n")
		select {}
	}
	path := filepath.Join(t.TempDir(), "d.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
	cmd := exec.Command(os.Args[0], "-test.run=^TestOrphan$")
	cmd.Env = append(os.Environ(), "FORERUN_TEST_ORPHAN="+path+"?format=qcow2")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	sock, err := bufio.NewReader(out).ReadString('\n')
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if err != nil {
		t.Fatal(err)
	}
	sock = strings.TrimSpace(sock)
	defer os.RemoveAll(filepath.Dir(sock))
	for range 200 {
		c, err := net.Dial("unix", sock)
		if err != nil {
			open(t, path+"?format=qcow2", Options{}) // all locks ended too
			return
		}
		c.Close()
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("qemu-nbd goes on")
}
