package fsmap_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
	"forerun/block/blocktest"
	"forerun/data/fsmap"
)

const mib = 1 << 20

func need(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s is not installed; make setup installs it", p)
		}
	}
}

func output(t testing.TB, stdin, name string, args ...string) []byte {
	t.Helper()
	c := exec.Command(name, args...)
	c.Stdin = strings.NewReader(stdin)
	var errs bytes.Buffer
	c.Stderr = &errs
	out, err := c.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, errs.Bytes())
	}
	return out
}

// ext makes a file system of so many bytes, ten files in it.
func ext(t testing.TB, size int64, args ...string) []byte {
	t.Helper()
	src, img := t.TempDir(), filepath.Join(t.TempDir(), "img")
	for i := range 10 {
		if err := os.WriteFile(filepath.Join(src, fmt.Sprint(i)), bytes.Repeat([]byte("text"), 20000), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	output(t, "", "mkfs.ext4", append(append([]string{"-q", "-F", "-b", "4096", "-d", src}, args...), img, fmt.Sprintf("%dK", size>>10))...)
	b, err := os.ReadFile(img)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func twin(b []byte) *blocktest.Twin { return blocktest.NewTwin(int64(len(b)), 512).Fill(0, b) }

// ranges lists what a map has.
func ranges(m *fsmap.Map) (out [][2]int64) {
	for at := int64(0); ; {
		from, to, ok := m.Next(at)
		if !ok {
			return out
		}
		out = append(out, [2]int64{from, to})
		at = to
	}
}

func learn(t *testing.T, dev block.Device, unit int64) *fsmap.Map {
	t.Helper()
	m, err := fsmap.Free(t.Context(), dev, unit)
	if err != nil {
		t.Fatal(err)
	}
	var sum int64
	for _, r := range ranges(m) {
		sum += r[1] - r[0]
	}
	if sum != m.FreeBytes() {
		t.Errorf("ranges of %d bytes, the map says %d", sum, m.FreeBytes())
	}
	return m
}

// TestPartitioned: file systems of three kinds in one disk; only what they do
// not use is free, at the places where it is.
func TestPartitioned(t *testing.T) {
	need(t, "sfdisk", "mkfs.ext4", "mkntfs")
	img := filepath.Join(t.TempDir(), "disk")
	output(t, "", "truncate", "-s", "80M", img)
	output(t, "label: gpt\nstart=1M,size=20M,name=ext\nsize=8M,type=EBD0A0A2-B9E5-4433-87C0-68B6B72699C7,name=ntfs\nsize=9M,name=nothing\n"+
		"start=60M,size=9M,type=E6D6D379-F507-44C2-A23C-238F2A3DF928,name=lvm\n", "sfdisk", "-q", img)
	disk, err := os.ReadFile(img)
	if err != nil {
		t.Fatal(err)
	}
	fs := ext(t, 20*mib)
	copy(disk[mib:], fs)
	copy(disk[60*mib:], ext(t, 9*mib)) // in a partition that is not for file systems
	n := filepath.Join(t.TempDir(), "ntfs")
	output(t, "", "truncate", "-s", "8M", n)
	output(t, "", "mkntfs", "-q", "-F", "-s", "512", "-p", "43008", "-H", "16", "-S", "63", n)
	nt, err := os.ReadFile(n)
	if err != nil {
		t.Fatal(err)
	}
	copy(disk[21*mib:], nt)

	m := learn(t, twin(disk), 4096)
	if m.Table() != "gpt" || len(m.FileSystems()) != 4 {
		t.Fatalf("%s %v", m.Table(), m.FileSystems())
	}
	var want [][2]int64
	for off, fs := range map[int64][]byte{mib: fs, 21 * mib: nt} {
		for _, r := range ranges(learn(t, twin(fs), 4096)) {
			want = append(want, [2]int64{r[0] + off, r[1] + off})
		}
	}
	slices.SortFunc(want, func(a, b [2]int64) int { return int(a[0] - b[0]) })
	if got := ranges(m); !slices.Equal(got, want) {
		t.Errorf("%v, should be %v", got, want)
	}
	for i, w := range []struct {
		kind string
		ok   bool
	}{{"ext4", true}, {"ntfs", true}, {"", false}, {"ext", false}} {
		f := m.FileSystems()[i]
		if f.Type != w.kind || (f.Reason == "") != w.ok || (f.FreeBytes > 0) != w.ok {
			t.Errorf("%+v", f)
		}
	}
	// In larger units only what fills one is free, and never more.
	coarse := learn(t, twin(disk), 64<<10)
	for _, r := range ranges(coarse) {
		if from, to, ok := m.Next(r[0]); !ok || from > r[0] || to < r[1] || r[0]%(64<<10) != 0 || r[1]%(64<<10) != 0 {
			t.Errorf("%v is free in units of 64 KiB, %d to %d in smaller ones", r, from, to)
		}
	}
	if c := coarse.FreeBytes(); c == 0 || c > m.FreeBytes() {
		t.Errorf("%d bytes in units of 64 KiB, %d in units of 4 KiB", c, m.FreeBytes())
	}
}

// TestUncertain: marks of something else, two tables, an error of the disk.
func TestUncertain(t *testing.T) {
	need(t, "mkfs.ext4")
	fs := ext(t, 20*mib)
	if m := learn(t, twin(fs), 4096); m.FreeBytes() < 10*mib || m.Table() != "none" {
		t.Fatalf("%v", m.FileSystems())
	}
	for what, f := range map[string]func(b []byte){
		"LVM beneath": func(b []byte) { copy(b[0x218:], "LVM2 001") },
		"an array's member, version 1.0": func(b []byte) {
			copy(b[len(b)-8<<10:], "\xfc\x4e\x2b\xa9")
		},
		"an array's member, version 0.90": func(b []byte) { copy(b[len(b)-64<<10:], "\xfc\x4e\x2b\xa9") },
		"btrfs too":                       func(b []byte) { copy(b[64<<10+64:], "_BHRfS_M") },
		"XFS too":                         func(b []byte) { copy(b, "XFSB") },
		"a partition table too": func(b []byte) {
			copy(b[446:], []byte{0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0})
			copy(b[510:], "\x55\xaa")
		},
		"mounted": func(b []byte) { b[1024+0x60] |= 4 },
		"nothing": func(b []byte) { clear(b[1024:2048]) },
	} {
		b := slices.Clone(fs)
		f(b)
		if m := learn(t, twin(b), 4096); m.FreeBytes() != 0 || len(m.FileSystems()) != 1 || m.FileSystems()[0].Reason == "" {
			t.Errorf("%s: %v", what, m.FileSystems())
		}
	}
	// Wherever the disk fails, nothing is free, and nothing is said to be.
	reads := int64(0)
	count := blocktest.Hook(twin(fs), func(context.Context, blocktest.Call) error { reads++; return nil })
	learn(t, count, 4096)
	for k := int64(1); k <= reads/2; k++ {
		dev := blocktest.Hook(twin(fs), func(_ context.Context, c blocktest.Call) error {
			if c.N == k {
				return block.E("read", "", block.KindIO, errors.New("a bad sector"))
			}
			return nil
		})
		if m := learn(t, dev, 4096); m.FreeBytes() != 0 {
			t.Errorf("call %d failed: %v", k, m.FileSystems())
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := fsmap.Free(ctx, twin(fs), 4096); block.KindOf(err) != block.KindCanceled {
		t.Error(err)
	}
	if _, err := fsmap.Free(t.Context(), twin(fs), 5000); block.KindOf(err) != block.KindInvalid {
		t.Error(err)
	}
}

// TestMapAgainstBits compares the map with a plain array under random changes.
func TestMapAgainstBits(t *testing.T) {
	need(t, "mkfs.ext4")
	// A file system of 100 GiB with nothing in it: pages that are all free,
	// and some that are mixed.
	img := filepath.Join(t.TempDir(), "img")
	output(t, "", "mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", img, "100G")
	f, err := os.Open(img)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m := learn(t, fileDevice{blocktest.NewNull(100 << 30), f}, 64<<10)
	bits := make([]bool, 100<<30>>16)
	for _, r := range ranges(m) {
		for u := r[0] >> 16; u < r[1]>>16; u++ {
			bits[u] = true
		}
	}
	r := rand.New(rand.NewPCG(1, 1))
	for range 2000 {
		off := r.Int64N(100 << 30)
		n := 1 + r.Int64N(min(100<<30-off, int64(1)<<r.IntN(31)))
		m.Use(off, n)
		for u := off >> 16; u <= (off+n-1)>>16; u++ {
			bits[u] = false
		}
		if r.IntN(40) > 0 {
			continue
		}
		at := r.Int64N(100 << 30)
		from, to, ok := m.Next(at)
		u := at >> 16
		for u < int64(len(bits)) && !bits[u] {
			u++
		}
		if ok != (u < int64(len(bits))) || ok && (from>>16 != u || !bits[to>>16-1]) {
			t.Fatalf("after %d: %d to %d, %v; should begin at %d", at, from, to, ok, u<<16)
		}
	}
	n := int64(0)
	for _, b := range bits {
		if b {
			n += 64 << 10
		}
	}
	if m.FreeBytes() != n {
		t.Errorf("%d bytes, should be %d", m.FreeBytes(), n)
	}
}

// fileDevice reads a file.
type fileDevice struct {
	*blocktest.Null
	f *os.File
}

func (d fileDevice) ReadAt(_ context.Context, p []byte, off int64, _ block.Flags) error {
	_, err := d.f.ReadAt(p, off)
	return err
}

func TestWatchSuite(t *testing.T) {
	need(t, "mkfs.ext4")
	fs := ext(t, 20*mib)
	blocktest.Test(t, func(t *testing.T) block.Device {
		w := fsmap.Watch(twin(fs))
		if m, err := w.Learn(t.Context(), 4096); err != nil || m.FreeBytes() == 0 {
			t.Fatal(err)
		}
		return w
	}, blocktest.Options{Content: fs})
}

// kinds sums the bytes of a range by kind.
func kinds(t *testing.T, dev block.Device, off, n int64, f block.Flags) (sum [4]int64) {
	t.Helper()
	c := block.NewChecked("watch", dev) // holds the answer to the contract
	for end := off + n; off < end; {
		out, err := c.Extents(t.Context(), nil, off, end-off, f)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range out {
			sum[e.Kind] += e.Len
		}
		off = out[len(out)-1].End()
	}
	return sum
}

// TestWatchForgetsWhatIsWritten: a range that is written or zeroed is not free
// any more, one that is trimmed stays so, and reading changes nothing.
func TestWatchForgetsWhatIsWritten(t *testing.T) {
	need(t, "mkfs.ext4")
	fs := ext(t, 20*mib)
	for i := 15 * mib; i < 20*mib; i++ { // what was there before it was freed
		fs[i] = 7
	}
	below := twin(fs)
	w := fsmap.Watch(below)
	if k := kinds(t, w, 0, 20*mib, block.Demand); k[block.Free] != 0 {
		t.Error("something is free before anything was read")
	}
	m, err := w.Learn(t.Context(), 4096)
	if err != nil {
		t.Fatal(err)
	}
	from, to, ok := m.Next(16 * mib)
	if !ok || from != 16*mib || to < 18*mib {
		t.Fatalf("%d to %d is free", from, to)
	}
	all, before := kinds(t, w, 0, 20*mib, block.Background), m.FreeBytes()
	if all[block.Free] == 0 || all[block.Free] > m.FreeBytes() || all[block.Data] == 0 {
		t.Fatalf("%v of %d", all, m.FreeBytes())
	}
	p := make([]byte, 4096)
	if err := w.ReadAt(t.Context(), p, 16*mib, 0); err != nil || p[0] != 7 {
		t.Fatalf("%v %v", p[0], err)
	}
	if err := w.WriteAt(t.Context(), p[:512], 16*mib+512, 0); err != nil {
		t.Fatal(err)
	}
	if err := w.Zero(t.Context(), 16*mib+8192, 4608, 0); err != nil {
		t.Fatal(err)
	}
	if err := w.Trim(t.Context(), 17*mib, 4096, 0); err != nil {
		t.Fatal(err)
	}
	if k := kinds(t, w, 16*mib, 4096, 0); k[block.Free] != 0 {
		t.Errorf("written: %v", k)
	}
	if k := kinds(t, w, 16*mib+4096, 4096, 0); k[block.Free] != 4096 {
		t.Errorf("beside it: %v", k)
	}
	if k := kinds(t, w, 16*mib+8192, 8192, 0); k[block.Free] != 0 {
		t.Errorf("zeroed: %v", k)
	}
	if got := m.FreeBytes(); got != before-3*4096 {
		t.Errorf("%d bytes are free, %d were", got, before)
	}
	if _, to, ok := m.Next(17 * mib); !ok || to <= 17*mib+4096 {
		t.Error("what was trimmed is not free any more")
	}
}

// TestLearnMustBeAlone: a write while the file systems are read, or one that
// was under way before, makes the map worthless.
func TestLearnMustBeAlone(t *testing.T) {
	need(t, "mkfs.ext4")
	fs := ext(t, 20*mib)
	write := func(w *fsmap.Watched) {
		if err := w.WriteAt(t.Context(), make([]byte, 512), 19*mib, 0); err != nil {
			t.Error(err)
		}
	}
	var w *fsmap.Watched
	w = fsmap.Watch(blocktest.Hook(twin(fs), func(_ context.Context, c blocktest.Call) error {
		if c.Op == "read" && c.N == 3 {
			write(w)
		}
		return nil
	}))
	if m, err := w.Learn(t.Context(), 4096); block.KindOf(err) != block.KindBusy || m != nil || w.Problem() == "" {
		t.Errorf("%v, %v", m, err)
	}
	if k := kinds(t, w, 0, 20*mib, 0); k[block.Free] != 0 {
		t.Errorf("%v", k)
	}
	inside, let := make(chan bool), make(chan bool)
	w = fsmap.Watch(blocktest.Hook(twin(fs), func(_ context.Context, c blocktest.Call) error {
		if c.Op == "write" && c.Before {
			close(inside)
			<-let
		}
		return nil
	}))
	done := make(chan bool)
	go func() { write(w); close(done) }()
	<-inside
	if _, err := w.Learn(t.Context(), 4096); block.KindOf(err) != block.KindBusy {
		t.Error(err)
	}
	close(let)
	<-done
}

// TestBackgroundWaits: a question of the background waits for the map, though
// not for ever; one that somebody waits for does not.
func TestBackgroundWaits(t *testing.T) {
	need(t, "mkfs.ext4")
	fs := ext(t, 20*mib)
	for i := 15 * mib; i < 20*mib; i++ {
		fs[i] = 7
	}
	synctest.Test(t, func(t *testing.T) {
		w := fsmap.Watch(twin(fs))
		began := time.Now()
		if k := kinds(t, w, 0, 20*mib, block.Demand); k[block.Free] != 0 || time.Since(began) > 0 {
			t.Errorf("%v after %v", k, time.Since(began))
		}
		go func() {
			time.Sleep(3 * time.Second)
			if _, err := w.Learn(t.Context(), 4096); err != nil {
				t.Error(err)
			}
		}()
		if k := kinds(t, w, 0, 20*mib, block.Background); k[block.Free] == 0 || time.Since(began) != 3*time.Second {
			t.Errorf("%v after %v", k, time.Since(began))
		}
		w = fsmap.Watch(twin(fs))
		began = time.Now()
		if k := kinds(t, w, 0, 20*mib, block.Background); k[block.Free] != 0 || time.Since(began) != 15*time.Second {
			t.Errorf("%v after %v", k, time.Since(began))
		}
		w = fsmap.Watch(twin(fs))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := w.Extents(ctx, nil, 0, 4096, block.Background); block.KindOf(err) != block.KindCanceled {
			t.Error(err)
		}
	})
}
