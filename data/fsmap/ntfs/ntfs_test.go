package ntfs

import (
	"bytes"
	"encoding/binary"
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
)

func need(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s is not installed; make setup installs it", p)
		}
	}
}

func output(t testing.TB, name string, args ...string) []byte {
	t.Helper()
	out, err := exec.Command(name, args...).Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// mkfs makes a volume with a few files in it.
func mkfs(t testing.TB, img, size string, args ...string) {
	t.Helper()
	output(t, "truncate", "-s", size, img)
	output(t, "mkntfs", append(append([]string{"-q", "-F", "-s", "512", "-p", "0", "-H", "16", "-S", "63"}, args...), img)...)
	r := rand.New(rand.NewPCG(1, 2))
	p := filepath.Join(t.TempDir(), "file")
	// ntfscp finds only files that are there: these are.
	for i, name := range []string{"$AttrDef:one", "$UpCase:two", "$AttrDef:three"} {
		b := make([]byte, 1+r.IntN(100<<10))
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		file, stream, _ := strings.Cut(name, ":")
		if out, err := exec.Command("ntfscp", "-f", "-q", "-N", stream, img, p, file).CombinedOutput(); err != nil {
			t.Fatalf("ntfscp of stream %d: %v\n%s", i, err, out)
		}
	}
}

// mount mounts an image, and skips the test where that is not possible.
func mount(t testing.TB, img string) (dir string, umount func()) {
	t.Helper()
	need(t, "ntfs-3g")
	if os.Getuid() != 0 {
		t.Skip("only root can mount")
	}
	dir = t.TempDir()
	if out, err := exec.Command("ntfs-3g", img, dir).CombinedOutput(); err != nil {
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

type span struct{ off, n int64 }

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
		if k := len(got) - 1; k >= 0 && got[k].off+got[k].n == off {
			got[k].n += n
			return nil
		}
		got = append(got, span{off, n})
		return nil
	})
	return got, info, err
}

// compare compares the free clusters with the bitmap as ntfscat reads it, and
// their number with what ntfsinfo says.
func compare(t *testing.T, img string) {
	t.Helper()
	got, info, err := free(t, img)
	if err != nil {
		t.Fatal(err)
	}
	bitmap := output(t, "ntfscat", "-f", "-i", "6", img)
	var want []span
	var count int64
	cluster := int64(info.ClusterBytes)
	for c := int64(0); c*cluster < info.Size; c++ {
		if bitmap[c/8]>>(c%8)&1 != 0 {
			continue
		}
		count++
		if k := len(want) - 1; k >= 0 && want[k].off+want[k].n == c*cluster {
			want[k].n += cluster
			continue
		}
		want = append(want, span{c * cluster, cluster})
	}
	if !slices.Equal(got, want) {
		t.Fatalf("%v, the tool says %v", got, want)
	}
	said := regexp.MustCompile(`Free Clusters: (\d+)`).FindSubmatch(output(t, "ntfsinfo", "-f", "-m", img))
	if said == nil {
		t.Fatal("ntfsinfo does not say how many clusters are free")
	}
	if n, err := strconv.ParseInt(string(said[1]), 10, 64); err != nil || n != count {
		t.Errorf("%d clusters are free, ntfsinfo says %s", count, said[1])
	}
}

func TestAgainstNtfsprogs(t *testing.T) {
	need(t, "mkntfs", "ntfscat", "ntfsinfo", "ntfscp")
	for _, v := range []struct {
		name, size string
		args       []string
	}{
		{"default", "64M", nil}, {"512", "20M", []string{"-c", "512"}}, {"64k", "200M", []string{"-c", "65536"}},
		{"2k", "33000K", []string{"-c", "2048"}}, {"large", "40G", []string{"-f"}},
	} {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			img := filepath.Join(t.TempDir(), "img")
			mkfs(t, img, v.size, append([]string{"-L", "Ein Läbel"}, v.args...)...)
			compare(t, img)
			if _, info, _ := free(t, img); info.Label != "Ein Läbel" {
				t.Errorf("%+v", info)
			}
			dir, umount := mount(t, img)
			r := rand.New(rand.NewPCG(1, 5))
			b := make([]byte, 40<<10)
			for i := range 120 {
				if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("f", i)), b[:r.IntN(len(b))], 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for i := 0; i < 120; i += 2 {
				if err := os.Remove(filepath.Join(dir, fmt.Sprint("f", i))); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.WriteFile(filepath.Join(dir, "HIBERFIL.SYS"), make([]byte, 10000), 0o600); err != nil {
				t.Fatal(err)
			}
			umount()
			compare(t, img)
			// Windows hibernates: the file begins so.
			dir, umount = mount(t, img)
			if err := os.WriteFile(filepath.Join(dir, "HIBERFIL.SYS"), append([]byte("HIBR"), b...), 0o600); err != nil {
				t.Fatal(err)
			}
			umount()
			if _, _, err := free(t, img); err == nil || !strings.Contains(err.Error(), "hibernated") {
				t.Errorf("hibernated: %v", err)
			}
		})
	}
}

// image is one in memory.
type image []byte

func (i image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off >= int64(len(i)) {
		return 0, io.EOF
	}
	n := copy(p, i[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// at says where file record i is.
func (i image) at(t testing.TB, file int64) int64 {
	t.Helper()
	v := opened(t, i)
	return v.mft[0].to*v.cluster + file*v.record
}

func opened(t testing.TB, i image) *volume {
	t.Helper()
	v := &volume{r: i}
	if err := errors.Join(v.boot(int64(len(i))), v.open()); err != nil {
		t.Fatal(err)
	}
	return v
}

func small(t testing.TB) image {
	t.Helper()
	img := filepath.Join(t.TempDir(), "img")
	mkfs(t, img, "8M")
	b, err := os.ReadFile(img)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// setLog writes restart pages as Windows does.
func (i image) setLog(t testing.TB, page int, lsn int64, major, client, flags uint16) {
	t.Helper()
	v := opened(t, i)
	s, err := v.content(fileLog)
	if err != nil {
		t.Fatal(err)
	}
	b := i[s.runs[0].to*v.cluster+int64(page)*4096:][:4096]
	clear(b)
	copy(b, "RSTR")
	le := binary.LittleEndian
	le.PutUint16(b[4:], 30)
	le.PutUint16(b[6:], 9)
	le.PutUint32(b[16:], 4096)
	le.PutUint32(b[20:], 4096)
	le.PutUint16(b[24:], 48)
	le.PutUint16(b[26:], major%2)
	le.PutUint16(b[28:], major)
	le.PutUint64(b[48:], uint64(lsn))
	le.PutUint16(b[48+12:], client)
	le.PutUint16(b[48+14:], flags)
	le.PutUint16(b[30:], 7)
	for k := 1; k <= 8; k++ {
		le.PutUint16(b[k*512-2:], 7)
	}
}

// TestLog: only a log that says that the volume was dismounted is believed.
func TestLog(t *testing.T) {
	need(t, "mkntfs", "ntfscp")
	base := small(t)
	for _, c := range []struct {
		what string
		set  func(i image)
		ok   bool
	}{
		{"empty", func(image) {}, true},
		{"clean, no client", func(i image) { i.setLog(t, 0, 5, 1, noClient, 0); i.setLog(t, 1, 4, 1, noClient, 0) }, true},
		{"clean by flag", func(i image) { i.setLog(t, 0, 5, 1, 0, restartClean); i.setLog(t, 1, 4, 1, 0, 0) }, true},
		{"in use", func(i image) { i.setLog(t, 0, 5, 1, 0, 0); i.setLog(t, 1, 4, 1, noClient, 0) }, false},
		{"in use, the second is newer", func(i image) { i.setLog(t, 0, 5, 1, noClient, 0); i.setLog(t, 1, 6, 1, 0, 0) }, false},
		{"version of a fast start", func(i image) { i.setLog(t, 0, 5, 2, noClient, 0) }, false},
		{"torn", func(i image) {
			i.setLog(t, 0, 5, 1, noClient, 0)
			v := opened(t, i)
			s, _ := v.content(fileLog)
			i[s.runs[0].to*v.cluster+1022]++
		}, false},
		{"overwritten", func(i image) {
			v := opened(t, i)
			s, _ := v.content(fileLog)
			copy(i[s.runs[0].to*v.cluster:], "CHKD")
		}, false},
	} {
		i := slices.Clone(base)
		c.set(i)
		if _, err := Free(i, int64(len(i)), func(int64, int64) error { return nil }); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.what, err)
		}
	}
}

// TestRefuses: a dirty volume, damage and sizes that cannot be are reasons.
func TestRefuses(t *testing.T) {
	need(t, "mkntfs", "ntfscp")
	base := small(t)
	vol := base.at(t, fileVolume)
	info := vol + int64(bytes.Index(base[vol:vol+1024], []byte{0x70, 0, 0, 0})) + 24
	v := opened(t, base)
	bitmap := v.bitmap.runs[0].to * v.cluster
	set := func(at int64, b byte) func(image) { return func(i image) { i[at] = b } }
	for _, c := range []struct {
		what  string
		f     func(image)
		dirty bool
	}{
		{"dirty", set(info+10, 1), true},
		{"being repaired", set(info+11, 0x40), true},
		{"version", set(info+8, 2), false},
		{"boot sector without signature", set(510, 0), false},
		{"cluster size", set(13, 3), false},
		{"larger than its disk", set(43, 1), false},
		{"file table elsewhere", set(50, 1), false},
		{"torn record", set(vol+510, 0xee), false},
		{"record with another's number", set(vol+44, 9), false},
		{"record not in use", set(vol+22, 0), false},
		{"a used cluster called free", set(bitmap, base[bitmap]&^1), false},
		{"the table called free", func(i image) { i[bitmap+v.mft[0].to/8] &^= 1 << (v.mft[0].to % 8) }, false},
	} {
		i := slices.Clone(base)
		c.f(i)
		if _, err := Free(i, int64(len(i)), func(int64, int64) error { return nil }); err == nil || errors.Is(err, ErrDirty) != c.dirty || errors.Is(err, ErrOther) {
			t.Errorf("%s: %v", c.what, err)
		}
	}
	if _, err := Free(base, int64(len(base)), func(int64, int64) error { return nil }); err != nil {
		t.Error(err)
	}
	if _, err := Free(base[:4<<20], 4<<20, func(int64, int64) error { return nil }); err == nil {
		t.Error("half of it was believed")
	}
	if _, err := Free(make(image, 1<<20), 1<<20, nil); !errors.Is(err, ErrOther) {
		t.Error(err)
	}
	stop := errors.New("enough")
	if _, err := Free(base, int64(len(base)), func(int64, int64) error { return stop }); !errors.Is(err, stop) {
		t.Error(err)
	}
}

// TestEmptyLogIsChecked: with nothing in the log, a file whose clusters the
// bitmap calls free shows that the volume was not unmounted.
func TestEmptyLogIsChecked(t *testing.T) {
	need(t, "mkntfs", "ntfs-3g")
	img := filepath.Join(t.TempDir(), "img")
	output(t, "truncate", "-s", "16M", img)
	output(t, "mkntfs", "-q", "-F", "-s", "512", "-p", "0", "-H", "16", "-S", "63", img)
	dir, umount := mount(t, img)
	mark := bytes.Repeat([]byte("find this "), 5000)
	if err := os.WriteFile(filepath.Join(dir, "file"), mark, 0o600); err != nil {
		t.Fatal(err)
	}
	umount()
	b, err := os.ReadFile(img)
	if err != nil {
		t.Fatal(err)
	}
	i := image(b)
	if _, err := Free(i, int64(len(i)), func(int64, int64) error { return nil }); err != nil {
		t.Fatal(err)
	}
	v := opened(t, i)
	at := int64(bytes.Index(i, mark)) / v.cluster
	if at <= 0 {
		t.Fatal("the file is nowhere")
	}
	i[v.bitmap.runs[0].to*v.cluster+at/8] &^= 1 << (at % 8)
	if _, err := Free(i, int64(len(i)), func(int64, int64) error { return nil }); err == nil || !strings.Contains(err.Error(), ErrDirty.Error()) {
		t.Errorf("%v", err)
	}
	i.setLog(t, 0, 5, 1, noClient, 0) // a log that says it was: it is believed
	if _, err := Free(i, int64(len(i)), func(int64, int64) error { return nil }); err != nil {
		t.Error(err)
	}
}

func TestSigned(t *testing.T) {
	for _, c := range []struct {
		b []byte
		n int64
	}{{nil, 0}, {[]byte{0x7f}, 127}, {[]byte{0x80}, -128}, {[]byte{0xff}, -1}, {[]byte{0x80, 0}, 128}, {[]byte{0, 0x80}, -32768},
		{[]byte{1, 2, 3, 4, 5, 6, 7, 8}, 0x0807060504030201}, {[]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, -1}} {
		if n := signed(c.b); n != c.n {
			t.Errorf("%x: %d, should be %d", c.b, n, c.n)
		}
	}
}

// FuzzFree changes bytes of the records of a small volume, with their update
// sequences intact: no panic, and what is emitted lies inside, in order.
func FuzzFree(f *testing.F) {
	need(f, "mkntfs", "ntfscp")
	base := small(f)
	mft := base.at(f, 0)
	v := opened(f, base)
	s, err := v.content(fileLog)
	if err != nil {
		f.Fatal(err)
	}
	logged := slices.Clone(base)
	logged.setLog(f, 0, 5, 1, noClient, 0)
	places := []int64{0, mft, mft + 1024*fileLog, mft + 1024*fileVolume, mft + 1024*fileRoot, mft + 1024*fileBitmap, s.runs[0].to * v.cluster, mft + 1024*8}
	for k := range places {
		f.Add([]byte{byte(k), 0, 24, 0xff})
		f.Add([]byte{byte(k), 0, 20, 0xf0, byte(k), 0, 64, 0xff})
		f.Add([]byte{byte(k), 1, 4, 0x80, byte(k), 1, 20, 0x80, byte(k), 0, 60, 1})
	}
	f.Fuzz(func(t *testing.T, changes []byte) {
		i := slices.Clone(base)
		if len(changes)%2 == 1 {
			i = slices.Clone(logged)
		}
		for ; len(changes) >= 4; changes = changes[4:] {
			at := int64(changes[1]&3)<<8 | int64(changes[2])
			if at%512 < 510 {
				i[places[changes[0]%8]+at] = changes[3]
			}
		}
		last := int64(0)
		_, _ = Free(i, int64(len(i)), func(off, n int64) error {
			if off < last || n <= 0 || off+n > int64(len(i)) {
				t.Fatalf("%d bytes at %d, after %d, of %d", n, off, last, len(i))
			}
			last = off + n
			return nil
		})
	})
}
