package part

import (
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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

// image is one in memory, whose middle is zeros.
type image struct {
	size int64
	b    map[int64][]byte // by blocks of 512
}

func (i *image) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		at := off + int64(n)
		if at < 0 || at >= i.size {
			return n, io.EOF
		}
		lo := at % 512
		m := int(min(512-lo, int64(len(p)-n), i.size-at))
		clear(p[n : n+m])
		if b := i.b[at-lo]; b != nil {
			copy(p[n:n+m], b[lo:])
		}
		n += m
	}
	return n, nil
}

func (i *image) clone() *image {
	c := &image{i.size, map[int64][]byte{}}
	for k, v := range i.b {
		c.b[k] = slices.Clone(v)
	}
	return c
}

func (i *image) poke(at int64, v ...byte) {
	for k, x := range v {
		o := (at + int64(k)) &^ 511
		if i.b[o] == nil {
			i.b[o] = make([]byte, 512)
		}
		i.b[o][at+int64(k)-o] = x
	}
}

// made are the disks that were made already, by script: sfdisk syncs a lot.
var made = map[string]disk{}

type disk struct {
	i    *image
	want []Partition
}

// sfdisk makes a table and returns the disk, which is not to be changed, and
// what sfdisk reads from it.
func sfdisk(t testing.TB, size, script string) (*image, []Partition) {
	t.Helper()
	if d, ok := made[script]; ok {
		return d.i, d.want
	}
	p := filepath.Join(t.TempDir(), "img")
	if out, err := exec.Command("truncate", "-s", size, p).CombinedOutput(); err != nil {
		t.Fatalf("%s", out)
	}
	c := exec.Command("sfdisk", "-q", p)
	c.Stdin = strings.NewReader(script)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	out, err := exec.Command("sfdisk", "-J", p).Output()
	if err != nil {
		t.Fatal(err)
	}
	var said struct {
		Table struct {
			SectorSize int64 `json:"sectorsize"`
			Partitions []struct {
				Start, Size int64
				Type, Name  string
			} `json:"partitions"`
		} `json:"partitiontable"`
	}
	if err := json.Unmarshal(out, &said); err != nil {
		t.Fatal(err)
	}
	var want []Partition
	for _, q := range said.Table.Partitions {
		if q.Type == "f" || q.Type == "5" {
			continue // a container
		}
		if len(q.Type) == 1 {
			q.Type = "0" + q.Type
		}
		want = append(want, Partition{Off: q.Start * said.Table.SectorSize, Size: q.Size * said.Table.SectorSize, Type: q.Type, Name: q.Name})
	}
	slices.SortFunc(want, func(a, b Partition) int { return int(a.Off/512) - int(b.Off/512) })
	f, err := os.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	i := &image{st.Size(), map[int64][]byte{}}
	for at := int64(0); at < i.size; at += 512 {
		b := make([]byte, 512)
		if _, err := f.ReadAt(b, at); err != nil {
			t.Fatal(err)
		}
		if slices.ContainsFunc(b, func(c byte) bool { return c != 0 }) {
			i.b[at] = b
		}
	}
	made[script] = disk{i, want}
	return i, want
}

const (
	mbrScript = "label: dos\nsize=2M,type=83\nsize=12M,type=f\nsize=2M,type=7,bootable\nsize=1M,type=8e\nsize=2M,type=83\nsize=3M,type=82\nsize=1M,type=7\n"
	gptScript = "label: gpt\nsize=3M,type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B,name=EFI\nsize=4M,type=0FC63DAF-8483-4772-8E79-3D69D8477DE4,name=\"Größe\"\n" +
		"size=2M,type=EBD0A0A2-B9E5-4433-87C0-68B6B72699C7\nsize=1M,type=E6D6D379-F507-44C2-A23C-238F2A3DF928\n"
)

func TestAgainstSfdisk(t *testing.T) {
	need(t, "sfdisk")
	for _, c := range []struct {
		table         Table
		script        string
		systems, most int
	}{{MBR, mbrScript, 4, 6}, {GPT, gptScript, 2, 4}, {MBR, "label: dos\nsize=1M,type=83\n", 1, 1}} {
		i, want := sfdisk(t, "24M", c.script)
		table, got, err := Read(i, i.size, 512)
		if err != nil || table != c.table || len(got) != c.most {
			t.Fatalf("%v, %v, %v", table, got, err)
		}
		systems := 0
		for k := range got {
			if got[k].FileSystem {
				systems++
			}
			got[k].FileSystem = false
		}
		if systems != c.systems {
			t.Errorf("%d partitions of %v hold file systems, should be %d", systems, got, c.systems)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%v, sfdisk says %v", got, want)
		}
	}
}

func TestNone(t *testing.T) {
	empty := &image{1 << 20, map[int64][]byte{}}
	boot := empty.clone() // the boot sector of a file system: a signature, and code where a table would be
	boot.poke(446, 0x90, 1, 2, 3, 0x83)
	boot.poke(510, 0x55, 0xaa)
	for _, i := range []*image{empty, boot, {0, nil}, {512, nil}} {
		if table, p, err := Read(i, i.size, 512); table != None || p != nil || err != nil {
			t.Errorf("%v, %v, %v", table, p, err)
		}
	}
}

func TestRefuses(t *testing.T) {
	need(t, "sfdisk")
	mbr, _ := sfdisk(t, "24M", mbrScript)
	gpt, _ := sfdisk(t, "24M", gptScript)
	ebr := int64(mbr.b[0][446+16+8]) | int64(mbr.b[0][446+16+9])<<8 | int64(mbr.b[0][446+16+10])<<16
	ebr *= 512
	for _, c := range []struct {
		what string
		i    *image
		f    func(*image)
	}{
		{"beyond the disk", mbr, func(i *image) { i.poke(446+15, 1) }},
		{"overlap", mbr, func(i *image) { i.poke(446+13, 0x80) }},
		{"no extended boot record", mbr, func(i *image) { i.poke(ebr+510, 0) }},
		{"chain without end", mbr, func(i *image) { copy(i.b[ebr][446+16:], i.b[ebr][446+16:446+32]); i.poke(ebr+446+16+8, 0, 0, 0, 0) }},
		{"chain that leaves", mbr, func(i *image) { i.poke(ebr+446+16+11, 1) }},
		{"third entry of a link", mbr, func(i *image) { i.poke(ebr+446+32+4, 0x83) }},
		{"GPT without protection", gpt, func(i *image) { i.poke(446+4, 0x83) }},
		{"GPT beside others", gpt, func(i *image) { i.poke(446+16, 0, 0, 0, 0, 0x83, 0, 0, 0, 1, 0, 0, 0, 1) }},
		{"GPT gone", gpt, func(i *image) { i.poke(512, 'x') }},
		{"header's checksum", gpt, func(i *image) { i.poke(512+48, 1) }},
		{"entries' checksum", gpt, func(i *image) { i.poke(1024+40, 1) }},
		{"backup gone", gpt, func(i *image) { i.poke(i.size-512, 'x') }},
		{"backup's checksum", gpt, func(i *image) { i.poke(i.size-512+56, 1) }},
		{"backup's entries", gpt, func(i *image) { i.poke(i.size-33*512+40, 1) }},
	} {
		i := c.i.clone()
		c.f(i)
		if table, p, err := Read(i, i.size, 512); err == nil || p != nil {
			t.Errorf("%s: %v, %v, %v", c.what, table, p, err)
		}
	}
	if _, p, err := Read(gpt, gpt.size/2, 512); err == nil {
		t.Errorf("half of it was believed: %v", p)
	}
}

// FuzzRead changes bytes of a table: no panic, and partitions lie inside the
// disk, in order.
func FuzzRead(f *testing.F) {
	need(f, "sfdisk")
	mbr, _ := sfdisk(f, "24M", mbrScript)
	gpt, _ := sfdisk(f, "24M", gptScript)
	at := int64(mbr.b[0][446+16+8]) | int64(mbr.b[0][446+16+9])<<8 | int64(mbr.b[0][446+16+10])<<16
	places := []int64{0, 512, 1024, 4096, at * 512, gpt.size - 512, gpt.size - 33*512, 24 << 19}
	f.Add(false, []byte{0, 1, 190, 0xee})
	f.Add(false, []byte{4, 1, 198, 0xff, 4, 1, 210, 5})
	f.Add(true, []byte{1, 0, 80, 0xff, 2, 0, 32, 0xff})
	f.Add(true, []byte{0, 1, 194, 0x83})
	f.Fuzz(func(t *testing.T, which bool, changes []byte) {
		i := mbr
		if which {
			i = gpt
		}
		i = i.clone()
		for ; len(changes) >= 4; changes = changes[4:] {
			if at := places[changes[0]%8] + int64(changes[1]&1)<<8 + int64(changes[2]); at < i.size {
				i.poke(at, changes[3])
			}
		}
		_, all, _ := Read(i, i.size, 512)
		end := int64(0)
		for _, p := range all {
			if p.Off < end || p.Size <= 0 || p.Off+p.Size > i.size {
				t.Fatalf("%v in a disk of %d bytes", all, i.size)
			}
			end = p.Off + p.Size
		}
	})
}
