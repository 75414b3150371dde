package sigs

import (
	"testing"

	"forerun/disk"
	"forerun/disk/disktest"
	"forerun/internal/chunk"
)

// FuzzFile opens any bytes as a table and uses it. With fix, the checksums are
// made right first, so that what lies behind them is reached.
func FuzzFile(f *testing.F) {
	o := Options{Chunks: 300, ChunkBytes: 8, Params: "p", State: "s"}
	fs := disktest.New(1)
	tab, err := Open(fs, "/t", o)
	if err != nil {
		f.Fatal(err)
	}
	for i := range int64(200) {
		tab.Learn(i, tab.Token(i), Kind(1+i%2), chunk.Sig{byte(i)})
	}
	tab.learnZeros(252, 48, tab.tokens())
	seed := func() {
		h, err := fs.Open("/t", disk.Read)
		if err != nil {
			f.Fatal(err)
		}
		defer h.Close()
		st, err := h.Stat()
		if err != nil {
			f.Fatal(err)
		}
		b := make([]byte, st.Size)
		if _, err := h.ReadAt(b, 0); err != nil {
			f.Fatal(err)
		}
		f.Add(b, false)
		f.Add(b, true)
		f.Add(b[:len(b)-100], true)
	}
	tab.save()
	seed()
	if err := tab.Close(nil); err != nil {
		f.Fatal(err)
	}
	seed()
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if fix {
			for at := 0; at+pageBytes <= len(b); at += pageBytes {
				p := (*[pageBytes]byte)(b[at:])
				if at == 0 {
					le.PutUint32(p[headerSum:], sum(p, headerSum))
				} else {
					(*page)(p).seal()
				}
			}
		}
		fs := disktest.New(1)
		h, err := fs.Open("/t", disk.Write|disk.Create)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		tab, err := Open(fs, "/t", o)
		if err != nil {
			t.Fatal(err)
		}
		count := func() (n int64) {
			for i := range o.Chunks {
				if k, _ := tab.Get(i); k != Unknown {
					n++
				}
			}
			return n
		}
		known := count()
		if st := tab.Stats(); st.Off != "" || known > 0 && !st.Kept || !fix && st.Kept && st.Data+st.Zero != known {
			t.Fatalf("%d known, %+v", known, st)
		}
		tab.Change(0, 130)()
		if i := tab.nextUnknown(0); i != 0 {
			t.Fatalf("the first unknown chunk is %d", i)
		}
		tab.learnZeros(0, 300, tab.tokens())
		if tab.Learn(1, tab.Token(1), Data, chunk.Sig{9}); count() < 130 {
			t.Fatal("chunks that were learned are unknown")
		}
		if k, sig := tab.Get(1); k != Data || sig != (chunk.Sig{9}) {
			t.Fatal(k, sig)
		}
		if err := tab.Close(func() (string, error) { return "s", nil }); err != nil {
			t.Fatal(err)
		}
		if tab, err = Open(fs, "/t", o); err != nil || !tab.Stats().Kept {
			t.Fatal(err, tab.Stats())
		}
		if k, sig := tab.Get(1); k != Data || sig != (chunk.Sig{9}) {
			t.Fatal(k, sig)
		}
	})
}
