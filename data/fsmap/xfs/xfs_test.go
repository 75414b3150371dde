package xfs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func need(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s is not installed; make setup installs it", p)
		}
	}
}

func output(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// mkfs makes a file system with a few files in it.
func mkfs(t testing.TB, img, size string, args ...string) {
	t.Helper()
	var proto strings.Builder
	proto.WriteString("/\n0 0\nd--755 0 0\n")
	r := rand.New(rand.NewPCG(1, 2))
	dir := t.TempDir()
	for i := range 40 {
		b := make([]byte, r.IntN(100<<10))
		for k := range b {
			b[k] = byte(r.Uint32())
		}
		p := filepath.Join(dir, fmt.Sprint(i))
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&proto, "f%d ---644 0 0 %s\n", i, p)
	}
	proto.WriteString("$\n")
	p := filepath.Join(dir, "proto")
	if err := os.WriteFile(p, []byte(proto.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	output(t, "truncate", "-s", size, img)
	args = append(append([]string{"-q", "-f", "-p", p}, args...), img)
	// Small ones are refused by newer versions, which have a word against it.
	if exec.Command("mkfs.xfs", append([]string{"--unsupported"}, args...)...).Run() != nil {
		output(t, "mkfs.xfs", args...)
	}
}

// mount mounts an image, and skips the test where that is not possible.
func mount(t testing.TB, img string) (dir string, umount func()) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can mount")
	}
	dir = t.TempDir()
	if out, err := exec.Command("mount", "-t", "xfs", "-o", "loop,nouuid", img, dir).CombinedOutput(); err != nil {
		t.Skipf("an image cannot be mounted here: %s", out)
	}
	mounted := true
	umount = func() {
		if mounted {
			mounted = false
			output(t, "umount", dir)
		}
	}
	t.Cleanup(umount)
	return dir, umount
}

// churn makes n files of up to a few blocks and removes every other one.
func churn(t testing.TB, dir string, n int, seed uint64) {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 5))
	b := make([]byte, 12<<10)
	long := strings.Repeat("long", 60) // so that there is much to log
	for i := range n {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(long, i)), b[:1+r.IntN(len(b))], 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for i := 0; i < n; i += 2 {
		if err := os.Remove(filepath.Join(dir, fmt.Sprint(long, i))); err != nil {
			t.Fatal(err)
		}
	}
}

type span struct{ off, n int64 }

func join(s []span) (out []span) {
	for _, x := range s {
		if n := len(out); n > 0 && out[n-1].off+out[n-1].n == x.off {
			out[n-1].n += x.n
			continue
		}
		out = append(out, x)
	}
	return out
}

func free(t testing.TB, img string) (got []span, info Info, err error) {
	t.Helper()
	f, err := os.Open(img)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	info, err = Free(f, st.Size(), func(off, n int64) error {
		got = append(got, span{off, n})
		return nil
	})
	return join(got), info, err
}

// dumped is what xfs_db says is free, without the lists of blocks that are
// kept back for the trees: xfs_db tells those first in each group.
func dumped(t testing.TB, img string) (out []span) {
	t.Helper()
	number := func(cmd ...string) int64 {
		args := []string{"-r"}
		for _, c := range cmd {
			args = append(args, "-c", c)
		}
		s := output(t, "xfs_db", append(args, img)...)
		_, v, _ := strings.Cut(s, " = ")
		n, err := strconv.ParseInt(strings.TrimSpace(v), 10, 64)
		if err != nil {
			t.Fatal(s)
		}
		return n
	}
	block, agBlocks := number("sb 0", "p blocksize"), number("sb 0", "p agblocks")
	ag, skip := int64(-1), int64(0)
	for _, l := range strings.Split(output(t, "xfs_db", "-r", "-c", "freesp -d", img), "\n") {
		f := strings.Fields(l)
		if len(f) != 3 || f[0] == "agno" {
			if len(f) > 0 && f[0] == "from" {
				break
			}
			continue
		}
		var v [3]int64
		for i := range v {
			n, err := strconv.ParseInt(f[i], 10, 64)
			if err != nil {
				t.Fatal(l)
			}
			v[i] = n
		}
		if v[0] != ag {
			ag = v[0]
			skip = number(fmt.Sprint("agf ", ag), "p flcount")
		}
		if skip > 0 {
			skip--
			continue
		}
		out = append(out, span{(ag*agBlocks + v[1]) * block, v[2] * block})
	}
	return join(out)
}

func compare(t *testing.T, img string) {
	t.Helper()
	got, _, err := free(t, img)
	if err != nil {
		t.Fatal(err)
	}
	want := dumped(t, img)
	if !slices.Equal(got, want) {
		for i := range got {
			if i >= len(want) || got[i] != want[i] {
				t.Fatalf("range %d is %v, the tool says %v (%d and %d ranges)", i, got[i], want[min(i, len(want)-1)], len(got), len(want))
			}
		}
		t.Fatalf("%d ranges, the tool says %d", len(got), len(want))
	}
	if len(want) < 4 {
		t.Errorf("only %d ranges: nothing was compared", len(want))
	}
}

var variants = []struct {
	name, size string
	busy       bool // many files come and go, too
	args       []string
}{
	{"default", "300M", true, nil},
	{"v4", "300M", false, []string{"-m", "crc=0"}},
	{"rmapbt", "300M", true, []string{"-m", "rmapbt=1"}},
	{"1k", "300M", true, []string{"-b", "size=1024"}},
	{"v4-512", "300M", false, []string{"-m", "crc=0", "-b", "size=512"}},
	{"sector4k", "300M", true, []string{"-s", "size=4096"}},
	{"64k", "600M", false, []string{"-b", "size=65536"}},
	{"stripe", "700M", true, []string{"-d", "su=64k,sw=4", "-l", "su=256k"}},
	{"manyags", "600M", false, []string{"-d", "agcount=13", "-l", "size=12m"}},
	{"oldlog", "300M", false, []string{"-m", "crc=0", "-l", "version=1"}},
	{"bare", "300M", false, []string{"-m", "finobt=0,reflink=0,inobtcount=0,bigtime=0", "-i", "sparse=0"}},
	{"large", "5T", false, nil},
}

// TestAgainstXfsDB compares the free blocks, block for block: as mkfs left
// them, and where an image can be mounted, after many files came and went.
func TestAgainstXfsDB(t *testing.T) {
	need(t, "mkfs.xfs", "xfs_db")
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			img := filepath.Join(t.TempDir(), "img")
			mkfs(t, img, v.size, append([]string{"-L", "label", "-m", "uuid=01234567-89ab-cdef-0123-456789abcdef"}, v.args...)...)
			compare(t, img)
			_, info, _ := free(t, img)
			if info.Label != "label" || info.UUID != "01234567-89ab-cdef-0123-456789abcdef" {
				t.Errorf("%+v", info)
			}
			if !v.busy {
				return
			}
			dir, umount := mount(t, img)
			churn(t, dir, 400, 1)
			umount()
			compare(t, img)
		})
	}
}

// TestMounted: what is mounted, or was when the power went, is not believed;
// once it is unmounted it is, lap after lap of the log.
func TestMounted(t *testing.T) {
	need(t, "mkfs.xfs", "xfs_db")
	img, copied := filepath.Join(t.TempDir(), "img"), filepath.Join(t.TempDir(), "copy")
	mkfs(t, img, "64M")
	laps := map[uint32]bool{}
	for i := range 3 {
		dir, umount := mount(t, img)
		if i == 1 { // a mount that changes nothing leaves everything as it was
			umount()
			compare(t, img)
			continue
		}
		for k := range 14 - 2*i {
			churn(t, dir, 400, uint64(k))
			output(t, "sync", "-f", dir)
		}
		output(t, "cp", "--sparse=always", img, copied)
		if _, _, err := free(t, copied); !errors.Is(err, ErrDirty) {
			t.Errorf("round %d: mounted: %v", i, err)
		}
		umount()
		compare(t, img)
		var b [8]byte
		f, err := os.Open(img)
		if err != nil {
			t.Fatal(err)
		}
		s := &fs{r: f}
		if err := s.super(64 << 20); err != nil {
			t.Fatal(err)
		}
		l := &logRing{s, s.logBlocks * (s.block / logBlock)}
		if err := l.read(b[:], 0); err != nil {
			t.Fatal(err)
		}
		laps[lap(b[:])] = true
		f.Close()
	}
	if len(laps) < 2 {
		t.Errorf("the log never came round: %v", laps)
	}
}

// sparse is an image in memory, of which only what is not zero is kept.
type sparse struct {
	size int64
	m    map[int64][]byte
}

const sparsePart = 4096

func load(t testing.TB, img string) *sparse {
	t.Helper()
	f, err := os.Open(img)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := &sparse{m: map[int64][]byte{}}
	b := make([]byte, 1<<20)
	for {
		n, err := io.ReadFull(f, b)
		for at := 0; at < n; at += sparsePart {
			if p := b[at:min(n, at+sparsePart)]; len(bytes.TrimLeft(p, "\x00")) > 0 {
				s.m[s.size+int64(at)] = slices.Clone(p)
			}
		}
		s.size += int64(n)
		if err != nil {
			return s
		}
	}
}

func (s *sparse) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		at := off + int64(n)
		if at < 0 || at >= s.size {
			return n, io.EOF
		}
		lo := at % sparsePart
		m := int(min(sparsePart-lo, int64(len(p)-n), s.size-at))
		if b := s.m[at-lo]; b != nil {
			copy(p[n:n+m], b[lo:])
		} else {
			clear(p[n : n+m])
		}
		n += m
	}
	return n, nil
}

func (s *sparse) poke(off int64, f func(byte) byte) {
	k := off &^ (sparsePart - 1)
	b := make([]byte, sparsePart)
	copy(b, s.m[k])
	b[off-k] = f(b[off-k])
	s.m[k] = b
}

func (s *sparse) clone() *sparse {
	c := &sparse{size: s.size, m: make(map[int64][]byte, len(s.m))}
	for k, v := range s.m {
		c.m[k] = v // poke copies
	}
	return c
}

func noEmit(int64, int64) error { return nil }

// TestRefuses: a log that does not end in an unmount, damage, unknown features
// and other sizes are reasons.
func TestRefuses(t *testing.T) {
	need(t, "mkfs.xfs")
	img := filepath.Join(t.TempDir(), "img")
	mkfs(t, img, "48M", "-m", "crc=0")
	old := load(t, img)
	mkfs(t, img, "48M")
	summed := load(t, img)
	f := &fs{r: old}
	if err := f.super(old.size); err != nil {
		t.Fatal(err)
	}
	log := f.logStart * f.block
	ag := f.agBlocks * f.block
	set := func(v byte) func(byte) byte { return func(byte) byte { return v } }
	inc := func(b byte) byte { return b + 1 }
	for _, c := range []struct {
		what  string
		s     *sparse
		at    int64
		f     func(byte) byte
		dirty bool
	}{
		{"mkfs that has not ended", old, 126, set(1), true},
		{"a newer block behind the head", old, log + 100*512 + 3, set(1), true},
		{"a block of a later lap at the end of the log", old, log + f.logBlocks*f.block - 512 + 3, set(2), false},
		{"the last record is no unmount", old, log + 512 + 9, set(0), true},
		{"the last record has two operations", old, log + 43, set(2), true},
		{"version", old, 101, set(6), false},
		{"larger than its disk", old, 11, set(1), false},
		{"group length", old, ag + 512 + 15, inc, false},
		{"group's free count", old, ag + 512 + 55, inc, false},
		{"root of the tree", old, ag + 512 + 19, inc, false},
		{"free count", old, 151, inc, false},
		{"log elsewhere", old, 52, set(0x7f), false},
		{"superblock's checksum", summed, 110, inc, false},
		{"group's checksum", summed, ag + 512 + 100, inc, false},
		{"tree's checksum", summed, ag + 4096 + 60, inc, false},
	} {
		s := c.s.clone()
		s.poke(c.at, c.f)
		_, err := Free(s, s.size, noEmit)
		if err == nil || c.dirty && !errors.Is(err, ErrDirty) || errors.Is(err, ErrOther) {
			t.Errorf("%s: %v", c.what, err)
		}
	}
	for _, s := range []*sparse{old, summed} {
		if _, err := Free(s, s.size, noEmit); err != nil {
			t.Error(err)
		}
		if _, err := Free(s, s.size/2, noEmit); err == nil {
			t.Error("half of it was believed")
		}
	}
	if _, err := Free(&sparse{size: 1 << 20}, 1<<20, noEmit); !errors.Is(err, ErrOther) {
		t.Error(err)
	}
	stop := errors.New("enough")
	if _, err := Free(old, old.size, func(int64, int64) error { return stop }); !errors.Is(err, stop) {
		t.Error(err)
	}
	// A log of zeros was never written.
	s := old.clone()
	for at := log; at < log+f.logBlocks*f.block; at += sparsePart {
		delete(s.m, at)
	}
	if _, err := Free(s, s.size, noEmit); err != nil {
		t.Error(err)
	}
	s.poke(log+f.logBlocks*f.block-1, set(1))
	if _, err := Free(s, s.size, noEmit); !errors.Is(err, ErrDirty) {
		t.Error(err)
	}
}

// FuzzFree changes bytes where the metadata is: no panic, and what is emitted
// lies inside, in order.
func FuzzFree(f *testing.F) {
	need(f, "mkfs.xfs")
	var imgs []*sparse
	var places [][]int64
	for i, args := range [][]string{{"-m", "crc=0"}, nil, {"-m", "crc=0", "-b", "size=512"}} {
		img := filepath.Join(f.TempDir(), fmt.Sprint(i))
		mkfs(f, img, "48M", args...)
		s := load(f, img)
		x := &fs{r: s}
		if err := x.super(s.size); err != nil {
			f.Fatal(err)
		}
		imgs = append(imgs, s)
		places = append(places, []int64{0, x.sector, x.block, x.agBlocks * x.block, x.agBlocks*x.block + x.sector,
			x.agBlocks*x.block + 4*max(x.sector, x.block/4), x.logStart * x.block, x.logStart*x.block + 512})
		f.Add(uint8(i), []byte{})
		f.Add(uint8(i), []byte{4, 0, 28, 2, 4, 0, 31, 2})
		f.Add(uint8(i), []byte{0, 0, 88, 0xff, 0, 0, 84, 0})
		f.Add(uint8(i), []byte{6, 0, 12, 0xff, 6, 1, 64, 0xff, 7, 0, 0, 0})
	}
	f.Fuzz(func(t *testing.T, which uint8, changes []byte) {
		k := int(which) % len(imgs)
		s := imgs[k].clone()
		for ; len(changes) >= 4; changes = changes[4:] {
			at := places[k][changes[0]%8] + int64(changes[1])<<8 | int64(changes[2])
			s.poke(at, func(byte) byte { return changes[3] })
		}
		last := int64(0)
		_, _ = Free(s, s.size, func(off, n int64) error {
			if off < last || n <= 0 || off+n > s.size {
				t.Fatalf("%d bytes at %d, after %d, of %d", n, off, last, s.size)
			}
			last = off + n
			return nil
		})
	})
}
