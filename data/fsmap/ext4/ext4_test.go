package ext4

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"forerun/data/fsmap/internal/layout"
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
	c := exec.Command(name, args...)
	c.Env = append(os.Environ(), "MKE2FS_DETERMINISTIC=1", "LC_ALL=C")
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// tree makes a directory of files of many sizes.
func tree(t testing.TB, files int) string {
	t.Helper()
	dir := t.TempDir()
	r := rand.New(rand.NewPCG(1, 2))
	for i := range files {
		d := filepath.Join(dir, fmt.Sprint("d", i%7))
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, r.IntN(200<<10))
		for k := range b {
			b[k] = byte(r.Uint32())
		}
		if err := os.WriteFile(filepath.Join(d, fmt.Sprint("f", i)), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

type span struct{ off, n int64 }

// join merges what touches.
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

func free(t testing.TB, img string) ([]span, Info, error) {
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
	var got []span
	info, err := Free(f, st.Size(), func(off, n int64) error {
		got = append(got, span{off, n})
		return nil
	})
	return join(got), info, err
}

var freeLine = regexp.MustCompile(`(?m)^  Free blocks: (.*)$`)

// dumped is what dumpe2fs says is free.
func dumped(t testing.TB, img string, info Info) (out []span) {
	t.Helper()
	all := output(t, "dumpe2fs", img)
	cluster := int64(info.BlockBytes)
	if m := regexp.MustCompile(`(?m)^Cluster size: +(\d+)$`).FindStringSubmatch(all); m != nil {
		cluster, _ = strconv.ParseInt(m[1], 10, 64)
	}
	for _, m := range freeLine.FindAllStringSubmatch(all, -1) {
		for _, r := range strings.Split(m[1], ",") {
			if r = strings.TrimSpace(r); r == "" {
				continue
			}
			a, b, two := strings.Cut(r, "-")
			from, err := strconv.ParseInt(a, 10, 64)
			to := from
			if two && err == nil {
				to, err = strconv.ParseInt(b, 10, 64)
			}
			if err != nil {
				t.Fatal(m[0])
			}
			off := from * int64(info.BlockBytes)
			out = append(out, span{off, to*int64(info.BlockBytes) + cluster - off})
		}
	}
	if n := len(out); n > 0 { // a last cluster may be cut
		out[n-1].n = min(out[n-1].n, info.Size-out[n-1].off)
	}
	return join(out)
}

func same(t *testing.T, got, want []span) {
	t.Helper()
	if slices.Equal(got, want) {
		return
	}
	for i := range got {
		if i >= len(want) || got[i] != want[i] {
			t.Fatalf("range %d is %v, the tool says %v (%d and %d ranges)", i, got[i], want[min(i, len(want)-1)], len(got), len(want))
		}
	}
	t.Fatalf("%d ranges, the tool says %d", len(got), len(want))
}

var variants = []struct {
	name, size string
	args       []string
}{
	{"ext2", "40M", []string{"-t", "ext2"}},
	{"ext2-1k", "40M", []string{"-t", "ext2", "-b", "1024"}},
	{"ext2-old", "20M", []string{"-t", "ext2", "-b", "1024", "-r", "0", "-O", "none"}},
	{"ext3", "60M", []string{"-t", "ext3"}},
	{"default", "200M", nil},
	{"1k", "100M", []string{"-b", "1024"}},
	{"2k", "100M", []string{"-b", "2048"}},
	{"64bit", "300M", []string{"-O", "64bit,metadata_csum"}},
	{"32bit", "300M", []string{"-O", "^64bit,metadata_csum"}},
	{"nosum", "300M", []string{"-O", "^metadata_csum,^uninit_bg"}},
	{"gdtsum", "300M", []string{"-O", "^metadata_csum,uninit_bg,^64bit"}},
	{"gdtsum64", "300M", []string{"-O", "^metadata_csum,uninit_bg,64bit"}},
	{"csumseed", "200M", []string{"-O", "metadata_csum_seed"}},
	{"metabg", "700M", []string{"-b", "1024", "-O", "meta_bg,^resize_inode"}},
	{"metabg64", "700M", []string{"-b", "1024", "-O", "meta_bg,^resize_inode,64bit,metadata_csum"}},
	{"metabg-nosum", "700M", []string{"-b", "1024", "-O", "meta_bg,^resize_inode,^metadata_csum,^flex_bg"}},
	{"noflex", "400M", []string{"-O", "^flex_bg"}},
	{"sparse2", "700M", []string{"-b", "1024", "-O", "sparse_super2,^resize_inode"}},
	{"nosparse", "300M", []string{"-O", "^sparse_super,^resize_inode"}},
	{"bigalloc", "500M", []string{"-O", "bigalloc", "-C", "65536"}},
	{"bigalloc-16k", "500M", []string{"-O", "bigalloc,64bit", "-C", "16384"}},
	{"smallgroups", "200M", []string{"-g", "1024"}},
	{"odd", "200001K", []string{"-b", "1024"}},
	{"flex64", "2G", []string{"-G", "64"}},
	{"orphanfile", "200M", []string{"-O", "orphan_file"}},
	{"quota-project", "200M", []string{"-O", "quota,project", "-I", "512"}},
	{"large", "100G", []string{"-E", "lazy_itable_init=1,lazy_journal_init=1", "-J", "size=4"}},
}

// TestAgainstDumpe2fs compares the free blocks, block for block.
func TestAgainstDumpe2fs(t *testing.T) {
	need(t, "mkfs.ext4", "dumpe2fs", "debugfs")
	src := tree(t, 60)
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			img := filepath.Join(t.TempDir(), "img")
			args := append([]string{"-q", "-F", "-d", src, "-L", "label", "-U", "01234567-89ab-cdef-0123-456789abcdef"}, v.args...)
			output(t, "mkfs.ext4", append(args, img, v.size)...)
			var rm []string // every third file leaves a hole
			for i := 0; i < 60; i += 3 {
				rm = append(rm, fmt.Sprintf("rm /d%d/f%d", i%7, i))
			}
			cmds := filepath.Join(t.TempDir(), "cmds")
			if err := os.WriteFile(cmds, []byte(strings.Join(rm, "\n")+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			output(t, "debugfs", "-w", "-f", cmds, img)
			got, info, err := free(t, img)
			if err != nil {
				t.Fatal(err)
			}
			want := dumped(t, img, info)
			same(t, got, want)
			if len(want) < 5 {
				t.Errorf("only %d free ranges: nothing was compared", len(want))
			}
			if info.Label != "label" || info.UUID != "01234567-89ab-cdef-0123-456789abcdef" {
				t.Errorf("%+v", info)
			}
		})
	}
}

// TestKind names what mkfs was asked for.
func TestKind(t *testing.T) {
	need(t, "mkfs.ext4")
	for _, k := range []string{"ext2", "ext3", "ext4"} {
		img := filepath.Join(t.TempDir(), "img")
		output(t, "mkfs.ext4", "-q", "-F", "-t", k, img, "40M")
		if _, info, err := free(t, img); err != nil || info.Type != k {
			t.Errorf("%s: %+v, %v", k, info, err)
		}
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

func (s *sparse) ReadAt(p []byte, off int64) (int, error) {
	for n := range p {
		at := off + int64(n)
		if at >= s.size {
			return n, io.EOF
		}
		if b := s.m[at&^(sparsePart-1)]; int(at%sparsePart) < len(b) {
			p[n] = b[at%sparsePart]
		} else {
			p[n] = 0
		}
	}
	return len(p), nil
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

// TestRefuses: dirty states, damage, unknown features and other sizes are reasons.
func TestRefuses(t *testing.T) {
	need(t, "mkfs.ext4")
	img := filepath.Join(t.TempDir(), "img")
	output(t, "mkfs.ext4", "-q", "-F", "-b", "4096", "-O", "^metadata_csum,^uninit_bg", img, "40M")
	plain := load(t, img)
	output(t, "mkfs.ext4", "-q", "-F", "-b", "4096", "-O", "metadata_csum", img, "40M")
	summed := load(t, img)
	if _, err := Free(plain, plain.size, noEmit); err != nil {
		t.Fatal(err)
	}
	set := func(v byte) func(byte) byte { return func(byte) byte { return v } }
	or := func(v byte) func(byte) byte { return func(b byte) byte { return b | v } }
	for _, c := range []struct {
		what  string
		s     *sparse
		at    int64
		f     func(byte) byte
		dirty bool
	}{
		{"journal to be recovered", plain, superAt + 0x60, or(incompatRecover), true},
		{"not valid", plain, superAt + 0x3a, set(0), true},
		{"with errors", plain, superAt + 0x3a, set(3), true},
		{"orphans", plain, superAt + 0xe8, set(12), true},
		{"orphan file in use", plain, superAt + 0x66, or(1), true},
		{"unknown incompat", plain, superAt + 0x63, or(0x80), false},
		{"multi-mount protection", plain, superAt + 0x61, or(1), false},
		{"unknown ro_compat", plain, superAt + 0x67, or(0x80), false},
		{"larger than its disk", plain, superAt + 0x07, set(1), false},
		{"block size", plain, superAt + 0x18, set(7), false},
		{"blocks per group", plain, superAt + 0x20, set(1), false},
		{"free count", plain, superAt + 0x0c, func(b byte) byte { return b + 1 }, false},
		{"a group's free count", plain, 4096 + 0x0c, func(b byte) byte { return b + 1 }, false},
		{"bitmap outside", plain, 4096 + 3, set(1), false},
		{"superblock's checksum", summed, superAt + 0x78, set('x'), false},
		{"descriptor's checksum", summed, 4096 + 0x1c, func(b byte) byte { return b + 1 }, false},
	} {
		s := c.s.clone()
		s.poke(c.at, c.f)
		if _, err := Free(s, s.size, noEmit); err == nil || errors.Is(err, ErrDirty) != c.dirty || errors.Is(err, ErrOther) {
			t.Errorf("%s: %v", c.what, err)
		}
	}
	if _, err := Free(plain, plain.size/2, noEmit); err == nil {
		t.Error("half of it was believed")
	}
	if _, err := Free(&sparse{size: 1 << 20}, 1<<20, noEmit); !errors.Is(err, ErrOther) {
		t.Error(err)
	}
	stop := errors.New("enough")
	if _, err := Free(plain, plain.size, func(int64, int64) error { return stop }); !errors.Is(err, stop) {
		t.Error(err)
	}
	// One bit of any bitmap, or of the descriptors, is noticed.
	r := rand.New(rand.NewPCG(3, 4))
	f := &fs{r: summed}
	if err := f.super(summed.size); err != nil {
		t.Fatal(err)
	}
	d := make([]byte, f.descLen)
	if err := layout.Read(summed, d, f.tableBlock(0)*f.block); err != nil {
		t.Fatal(err)
	}
	g, err := f.descriptor(d, 0)
	if err != nil {
		t.Fatal(err)
	}
	for range 50 {
		s := summed.clone()
		at := g.bitmap*f.block + r.Int64N(f.clusters/8)
		if r.IntN(2) == 0 {
			at = f.tableBlock(0)*f.block + r.Int64N(f.descLen)
		}
		s.poke(at, func(b byte) byte { return b ^ 1<<r.IntN(8) })
		if _, err := Free(s, s.size, noEmit); err == nil {
			t.Errorf("a changed bit of byte %d was not noticed", at)
		}
	}
}

// FuzzFree changes up to eight bytes of a small file system: no panic, and
// what is emitted lies inside, in order.
func FuzzFree(f *testing.F) {
	need(f, "mkfs.ext4")
	var imgs []*sparse
	for i, args := range [][]string{{"-b", "1024", "-O", "^metadata_csum,^has_journal"}, {"-b", "1024", "-O", "metadata_csum,64bit,^has_journal"},
		{"-b", "1024", "-O", "meta_bg,^resize_inode,^metadata_csum,uninit_bg,^has_journal"}, {"-O", "bigalloc,^has_journal,^metadata_csum", "-C", "16384"}} {
		img := filepath.Join(f.TempDir(), fmt.Sprint(i))
		output(f, "mkfs.ext4", append(append([]string{"-q", "-F"}, args...), img, "9M")...)
		imgs = append(imgs, load(f, img))
		f.Add(uint8(i), []byte{})
		f.Add(uint8(i), []byte{0, 4, 0x20, 1, 0, 4, 0x22, 0xff})
		f.Add(uint8(i), []byte{0, 8, 0, 0xff, 0, 8, 3, 0xff})
		f.Add(uint8(i), []byte{0, 4, 0x18, 0, 0, 4, 0x4c, 0, 0, 4, 0xfe, 3})
	}
	f.Fuzz(func(t *testing.T, which uint8, changes []byte) {
		s := imgs[int(which)%len(imgs)].clone()
		for ; len(changes) >= 4; changes = changes[4:] {
			at := int64(changes[0])<<16 | int64(changes[1])<<8 | int64(changes[2])
			s.poke(at%s.size, func(byte) byte { return changes[3] })
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
