package nbd

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"forerun/block"
	"forerun/internal/nbdproto"
)

// peerRun runs another implementation's program, or skips the test without it.
func peerRun(t *testing.T, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("%s is not installed: install it to test against it", name)
	}
	cmd := exec.CommandContext(t.Context(), name, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out.String(), errs.String())
	}
	return out.String()
}

// peerDisk is a checked disk of 8 MiB with data, zeros and holes, and its server.
func peerDisk(t *testing.T, bs int) (*mem, string) {
	t.Helper()
	m := newMem(8<<20, bs)
	copy(m.data[1<<20:], pattern(2<<20, 1))
	copy(m.data[5<<20:], pattern(1<<20, 2))
	m.state = func(off int64) (block.ExtentKind, block.State) {
		switch mib := off >> 20; {
		case mib == 1 || mib == 2:
			return block.Data, block.Untouched
		case mib == 5:
			return block.Data, block.Modified
		case mib == 6:
			return block.ZeroData, block.ZeroState
		}
		return block.Hole, block.Held
	}
	_, l := start(t, Options{Exports: table{"": m.checked(), "disk": m.checked()}})
	return m, l.URI()
}

func TestPeerInfo(t *testing.T) {
	_, uri := peerDisk(t, 512)
	var info struct {
		Protocol string
		TLS      bool
		Exports  []map[string]any
	}
	if err := json.Unmarshal([]byte(peerRun(t, "nbdinfo", "--json", uri)), &info); err != nil {
		t.Fatal(err)
	}
	if len(info.Exports) != 1 {
		t.Fatalf("%+v", info)
	}
	for k, want := range map[string]any{
		"export-size": 8388608.0, "is_read_only": false, "can_multi_conn": true, "can_trim": true, "can_fua": true,
		"can_flush": true, "can_zero": true, "can_fast_zero": true, "can_df": true, "can_cache": true,
		"block_size_minimum": 1.0, "block_size_preferred": 65536.0, "block_size_maximum": 33554432.0,
	} {
		if got := info.Exports[0][k]; got != want {
			t.Errorf("%s is %v, want %v", k, got, want)
		}
	}
	if out := peerRun(t, "nbdinfo", "--list", uri); !strings.Contains(out, `export="disk"`) {
		t.Errorf("list: %s", out)
	}
	type entry struct {
		Offset, Length int64
		Type           int
	}
	for ctx, want := range map[string][]entry{
		"--map":               {{0, 1 << 20, 3}, {1 << 20, 2 << 20, 0}, {3 << 20, 2 << 20, 3}, {5 << 20, 1 << 20, 0}, {6 << 20, 1 << 20, 2}, {7 << 20, 1 << 20, 3}},
		"--map=forerun:state": {{0, 1 << 20, 2}, {1 << 20, 2 << 20, 1}, {3 << 20, 2 << 20, 2}, {5 << 20, 1 << 20, 4}, {6 << 20, 1 << 20, 3}, {7 << 20, 1 << 20, 2}},
	} {
		var got []entry
		if err := json.Unmarshal([]byte(peerRun(t, "nbdinfo", ctx, "--json", uri)), &got); err != nil {
			t.Fatal(err)
		}
		if len(got) != len(want) {
			t.Fatalf("%s: %+v", ctx, got)
		}
		for i := range want {
			if got[i] != want[i] {
				t.Errorf("%s: entry %d is %+v, want %+v", ctx, i, got[i], want[i])
			}
		}
	}
}

func TestPeerCopy(t *testing.T) {
	m, uri := peerDisk(t, 4096)
	raw := filepath.Join(t.TempDir(), "raw")
	peerRun(t, "nbdcopy", uri, raw)
	got, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, m.data) {
		t.Error("the copy differs")
	}
	n := newMem(8<<20, 4096)
	copy(n.data, pattern(8<<20, 77))
	s, l := start(t, Options{Exports: table{"": n.checked()}})
	peerRun(t, "nbdcopy", "--connections=4", "--flush", raw, l.URI())
	n.mu.Lock()
	defer n.mu.Unlock()
	if !bytes.Equal(n.data, m.data) {
		t.Error("the copy back differs")
	}
	if st := s.Stats(); st.Handshakes < 2 || st.Command[Flush].Requests == 0 {
		t.Errorf("%+v", st)
	}
}

func TestPeerQemuImg(t *testing.T) {
	m, uri := peerDisk(t, 512)
	q := filepath.Join(t.TempDir(), "q")
	peerRun(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, q)
	peerRun(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", q, uri)
	n := newMem(8<<20, 512)
	copy(n.data, pattern(8<<20, 77))
	_, l := start(t, Options{Exports: table{"": n.checked()}})
	peerRun(t, "qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", q, l.URI())
	n.mu.Lock()
	defer n.mu.Unlock()
	if !bytes.Equal(n.data, m.data) {
		t.Error("the copy back differs")
	}
}

func TestPeerQemuIO(t *testing.T) {
	for _, bs := range []int{1, 512, 4096} {
		m := newMem(8<<20, bs)
		s, l := start(t, Options{Exports: table{"": m.checked()}})
		out := peerRun(t, "qemu-io", "-f", "raw", "-d", "unmap", l.URI(),
			"-c", "write -P 0xa5 0 1M", "-c", "read -P 0xa5 0 1M",
			"-c", "write -P 0x11 1000 3000", "-c", "read -P 0x11 1000 3000", "-c", "read -P 0xa5 4000 10000",
			"-c", "write -f -P 0x22 2M 64k", "-c", "read -P 0x22 2M 64k",
			"-c", "write -z 64k 64k", "-c", "read -P 0 64k 64k",
			"-c", "write -z -u 200001 70000", "-c", "read -P 0 200001 70000", "-c", "read -P 0xa5 200000 1",
			"-c", "discard 512k 256k", "-c", "read -P 0 512k 256k",
			"-c", "aio_write -P 0x33 4M 1M", "-c", "aio_write -P 0x44 5M 1M", "-c", "aio_flush",
			"-c", "read -P 0x33 4M 1M", "-c", "read -P 0x44 5M 1M", "-c", "flush")
		if strings.Contains(out, "failed") || strings.Contains(out, "error") {
			t.Errorf("blocks of %d: %s", bs, out)
		}
		if st := s.Stats(); st.Command[Trim].Requests == 0 || st.Command[WriteZeroes].Requests == 0 {
			t.Errorf("blocks of %d: %+v", bs, st)
		}
	}
}

func TestPeerLibnbd(t *testing.T) {
	const python = "/usr/bin/python3"
	if exec.Command(python, "-c", "import nbd").Run() != nil {
		t.Skip("the Python binding of libnbd is not installed: install python3-libnbd to test against it")
	}
	_, uri := peerDisk(t, 512)
	peerRun(t, python, "-c", `
import nbd, os, errno, sys
h = nbd.NBD()
h.set_strict_mode(0)
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.add_meta_context("forerun:state")
h.set_export_name("disk")
h.set_full_info(True)
h.connect_uri(sys.argv[1].replace("///", "///disk"))
assert h.get_canonical_export_name() == "disk", h.get_canonical_export_name()
assert h.get_export_description() == "the disk called disk"
assert h.get_structured_replies_negotiated()
def fails(num, f, *a, **k):
    try:
        f(*a, **k)
    except nbd.Error as e:
        assert e.errnum == num, (e.errnum, num)
    else:
        raise AssertionError("no error")
h.pwrite(b"x" * 1000, 333)
assert h.pread(1002, 332) == b"\0" + b"x" * 1000 + b"\0"
h.pwrite(b"y" * 512, 0, nbd.CMD_FLAG_FUA)
h.zero(100, 400, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(300, 350)[50:150] == b"\0" * 100
fails(errno.EINVAL, h.pread, 512, 8 << 20)
fails(errno.ENOSPC, h.pwrite, b"z" * 512, 8 << 20)
fails(errno.ENOTSUP, h.zero, 100, 1, nbd.CMD_FLAG_FAST_ZERO)
h.trim(4096, 4096)
h.cache(4096, 0)
h.flush()
seen = {}
h.block_status(8 << 20, 0, lambda c, off, e, err: seen.__setitem__(c, e) or 0)
assert len(seen["base:allocation"]) == 12, seen
assert len(seen["forerun:state"]) == 12, seen
one = {}
h.block_status(7 << 20, 1 << 20, lambda c, off, e, err: one.__setitem__(c, e) or 0, nbd.CMD_FLAG_REQ_ONE)
assert one["base:allocation"] == [2 << 20, 0], one
df = []
b = h.pread_structured(65536, 1 << 20, lambda b, off, s, err: df.append((off, s)) or 0, nbd.CMD_FLAG_DF)
assert df == [(1 << 20, nbd.READ_DATA)], df
# Many at once, in any order.
bufs = [nbd.Buffer(4096) for _ in range(100)]
cookies = [h.aio_pread(x, i * 4096) for i, x in enumerate(bufs)]
while h.aio_in_flight() > 0:
    h.poll(-1)
assert all(h.aio_command_completed(c) for c in cookies)
h.shutdown()
`, uri)
}

func TestPeerFio(t *testing.T) {
	m := newMem(32<<20, 512)
	_, l := start(t, Options{Exports: table{"": m.checked()}})
	for _, job := range []string{"--bs=4k --iodepth=32", "--bsrange=512-256k --bs_unaligned=0 --iodepth=8", "--bs=1m --iodepth=4"} {
		args := append([]string{"--name=verify", "--ioengine=nbd", "--uri=" + l.URI(), "--rw=randwrite", "--size=16m",
			"--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--fsync=64"}, strings.Fields(job)...)
		out := peerRun(t, "fio", args...)
		if strings.Contains(out, "verify:") && strings.Contains(out, "bad") || !strings.Contains(out, "err= 0") {
			t.Errorf("%s: %s", job, out)
		}
	}
}

func TestPeerTLS(t *testing.T) {
	dir := t.TempDir()
	srv, _ := certificates(t, dir)
	m := newMem(8<<20, 1)
	copy(m.data, pattern(8<<20, 6))
	s := NewServer(Options{Exports: table{"": m}, TLS: srv})
	l, err := s.Listen("nbds://localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	serveUntilEnd(t, s, l)
	u, err := nbdproto.ParseURI(l.URI())
	if err != nil {
		t.Fatal(err)
	}
	port := u.Addr[strings.LastIndex(u.Addr, ":"):]
	raw := filepath.Join(dir, "raw")
	peerRun(t, "nbdcopy", "nbds://localhost"+port+"/?tls-certificates="+dir, raw)
	got, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, m.data) {
		t.Error("the copy differs")
	}
	// And back, with writes.
	m.mu.Lock()
	clear(m.data)
	m.mu.Unlock()
	peerRun(t, "nbdcopy", "--flush", raw, "nbds://localhost"+port+"/?tls-certificates="+dir)
	m.mu.Lock()
	defer m.mu.Unlock()
	if !bytes.Equal(got, m.data) {
		t.Error("the copy back differs")
	}
}
