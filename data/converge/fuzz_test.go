package converge

import (
	"bytes"
	"io"
	"testing"

	"forerun/block"
	"forerun/disk"
	"forerun/disk/disktest"
)

// FuzzMarks parses any bytes as a file of marks; what is accepted is written
// again and read as the same.
func FuzzMarks(f *testing.F) {
	seed := func(set func(*bitmap)) {
		b := newBitmap()
		set(b)
		fs := disktest.New(1)
		save(f, fs, marksHeader{id: planID{1, 2}, boot: "boot", grain: 4096, size: 1 << 30, swept: 4096, clean: true}, b)
		f.Add(content(f, fs))
	}
	seed(func(*bitmap) {})
	seed(func(b *bitmap) { b.set(3, 70); b.set(2*pageBits, 3*pageBits) })
	f.Fuzz(func(t *testing.T, p []byte) {
		m, err := parseMarks(bytes.NewReader(p), int64(len(p)))
		if err != nil {
			if block.KindOf(err) != block.KindCorrupt {
				t.Fatal(err)
			}
			return
		}
		fs := disktest.New(1)
		save(t, fs, m.marksHeader, m.bits)
		again, err := loadMarks(fs, "/marks")
		if err != nil {
			t.Fatal(err)
		}
		if again.bits.n != m.bits.n || again.id != m.id || again.swept != m.swept || again.clean != m.clean || again.boot != m.boot {
			t.Fatalf("%+v became %+v", m.marksHeader, again.marksHeader)
		}
	})
}

func save(t testing.TB, fs disk.FS, m marksHeader, b *bitmap) {
	t.Helper()
	var keys []int64
	for k := int64(0); k <= m.size/m.grain/pageBits; k++ {
		if b.pages[k] != nil {
			keys = append(keys, k)
		}
	}
	m.pages = 0
	if err := saveMarks(fs, "/marks", m, keys, func(k int64, p *page) { *p = *b.pages[k] }); err != nil {
		t.Fatal(err)
	}
}

func content(t testing.TB, fs disk.FS) []byte {
	h, err := fs.Open("/marks", disk.Read)
	if err != nil {
		t.Fatal(err)
	}
	st, _ := h.Stat()
	p, err := io.ReadAll(io.NewSectionReader(h, 0, st.Size))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// FuzzPlan parses any bytes as a plan.
func FuzzPlan(f *testing.F) {
	fs := disktest.New(1)
	if err := savePlan(fs, "/", Plan{Phase: PhaseCopying, ID: newID(), Target: "/t", Size: 512}); err != nil {
		f.Fatal(err)
	}
	h, _ := fs.Open("/cutover", disk.Read)
	p, _ := io.ReadAll(io.NewSectionReader(h, 0, 1<<16))
	f.Add(p)
	f.Add([]byte("{}\n00000000\n"))
	f.Fuzz(func(t *testing.T, p []byte) {
		v, err := parsePlan(p)
		if err == nil && (v.Phase == PhaseNone || v.Target == "") {
			t.Fatalf("%+v was accepted", v)
		}
	})
}
