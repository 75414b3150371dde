package runs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"forerun/disk"
	"forerun/disk/disktest"
	"forerun/internal/chunk"
)

func entry(n uint64) Entry {
	return Entry{chunk.Sum(binary.LittleEndian.AppendUint64(nil, n)),
		Loc{Pack: uint32(n % 7), Off: uint32(n), Len: 1 + uint32(n%100), Plain: uint32(2 * n), CRC: uint32(n * n), Codec: chunk.Codec(n % 3), Algo: 1}}
}

func write(t testing.TB, fs disk.FS, path string, id uint32, from, to uint64) *Run {
	t.Helper()
	var es []Entry
	for n := from; n < to; n++ {
		es = append(es, entry(n))
	}
	r, err := Write(fs, path, id, es)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestFind(t *testing.T) {
	for _, n := range []uint64{1, PerPage - 1, PerPage, PerPage + 1, 5000} {
		fs := disktest.New(1)
		made := write(t, fs, "/r", 3, 0, n)
		again, err := Open(fs, "/r", 3)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range []*Run{made, again} {
			if r.Count() != int(n) {
				t.Fatalf("%d entries, want %d", r.Count(), n)
			}
			for i := range 2 * n {
				e := entry(i)
				l, ok, err := r.Find(&e.Sig)
				if err != nil || ok != (i < n) || ok && l != e.Loc {
					t.Fatalf("entry %d of %d: %v %v %v", i, n, l, ok, err)
				}
			}
			it, last := r.Iter(false), chunk.Sig{}
			for i := range n + 1 {
				e, err := it.Next()
				if err != nil || (e == nil) != (i == n) {
					t.Fatalf("entry %d of %d: %v %v", i, n, e, err)
				}
				if e != nil {
					if bytes.Compare(last[:], e.Sig[:]) >= 0 {
						t.Fatal("out of order")
					}
					last = e.Sig
				}
			}
		}
		if _, err := Open(fs, "/r", 4); !errors.Is(err, ErrDamaged) {
			t.Fatalf("a run under another's name: %v", err)
		}
	}
}

// Hashes never share eight bytes; the code must not rely on it.
func TestFindWithEqualPrefixes(t *testing.T) {
	var es []Entry
	for i := range 500 {
		e := entry(uint64(i))
		clear(e.Sig[:8])
		if i%100 == 0 {
			e.Sig[0] = 9
		}
		es = append(es, e)
	}
	r, err := Write(disktest.New(1), "/r", 1, slices.Clone(es))
	if err != nil {
		t.Fatal(err)
	}
	for i, e := range es {
		if l, ok, err := r.Find(&e.Sig); !ok || err != nil || l != e.Loc {
			t.Fatalf("entry %d: %v %v %v", i, l, ok, err)
		}
	}
}

func TestOrderIsChecked(t *testing.T) {
	w, err := Create(disktest.New(1), "/r", 1, 2)
	if err != nil {
		t.Fatal(err)
	}
	e := entry(1)
	if err := w.Add(&e); err != nil {
		t.Fatal(err)
	}
	if w.Add(&e) == nil {
		t.Fatal("the same signature twice")
	}
	w.Abort()
}

func TestMergeNewestWins(t *testing.T) {
	fs := disktest.New(1)
	r := rand.New(rand.NewPCG(1, 1))
	want := map[chunk.Sig]Loc{}
	var rs []*Run
	for id := range uint32(6) {
		set := map[chunk.Sig]Entry{}
		for range 300 {
			e := entry(r.Uint64N(800))
			e.Pack = 100 + id
			set[e.Sig] = e
			want[e.Sig] = e.Loc
		}
		var es []Entry
		for _, e := range set {
			es = append(es, e)
		}
		run, err := Write(fs, string(rune('a'+id)), id, es)
		if err != nil {
			t.Fatal(err)
		}
		rs = append([]*Run{run}, rs...)
	}
	m, err := Merge(rs, false)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for {
		e, err := m.Next()
		if err != nil {
			t.Fatal(err)
		}
		if e == nil {
			break
		}
		if want[e.Sig] != e.Loc {
			t.Fatalf("%s: %v, want %v", e.Sig, e.Loc, want[e.Sig])
		}
		n++
	}
	if n != len(want) {
		t.Fatalf("%d entries, want %d", n, len(want))
	}
}

// TestEveryByteFlipped: the right answer or ErrDamaged, at Open or later.
func TestEveryByteFlipped(t *testing.T) {
	fs := disktest.New(1)
	size := write(t, fs, "/r", 1, 0, 100).Size()
	step := int64(1)
	if testing.Short() {
		step = 5
	}
	for off := int64(0); off < size; off += step {
		fs.Flip("/r", off)
		r, err := Open(fs, "/r", 1)
		if err != nil {
			if !errors.Is(err, ErrDamaged) {
				t.Fatalf("byte %d: %v", off, err)
			}
		} else {
			for i := uint64(off % 9); i < 100; i += 9 {
				e := entry(i)
				if l, ok, err := r.Find(&e.Sig); err != nil && !errors.Is(err, ErrDamaged) || err == nil && (!ok || l != e.Loc) {
					t.Fatalf("byte %d entry %d: %v %v %v", off, i, l, ok, err)
				}
			}
			it := r.Iter(true)
			for {
				e, err := it.Next()
				if err != nil {
					t.Fatal(err)
				}
				if e == nil {
					break
				}
			}
			if it.Damaged != 1 {
				t.Fatalf("byte %d: %d damaged pages", off, it.Damaged)
			}
			r.Close()
		}
		fs.Flip("/r", off)
	}
}

func FuzzOpen(f *testing.F) {
	fs := disktest.New(1)
	r := write(f, fs, "/r", 1, 0, 3)
	b := make([]byte, r.Size())
	r.f.ReadAt(b, 0)
	f.Add(b)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		fs := disktest.New(1)
		h, err := fs.Open("/r", disk.Write|disk.Create)
		if err != nil {
			t.Fatal(err)
		}
		h.WriteAt(b, 0)
		h.Close()
		r, err := Open(fs, "/r", 1)
		if err != nil {
			return
		}
		e := entry(1)
		r.Find(&e.Sig)
		for it, n := r.Iter(true), 0; ; n++ {
			if e, err := it.Next(); e == nil || err != nil {
				break
			}
			if n > len(b) {
				t.Fatal("the walk does not end")
			}
		}
	})
}

func BenchmarkFind(b *testing.B) {
	dir := b.TempDir()
	r := write(b, disk.OS(), dir+"/r", 1, 0, 1<<20)
	b.ReportMetric(float64(r.Memory())/float64(r.Count()), "mem-B/entry")
	b.Run("there", func(b *testing.B) {
		b.ReportAllocs()
		for i := uint64(0); b.Loop(); i++ {
			e := entry(i * 7919 % (1 << 20))
			if _, ok, err := r.Find(&e.Sig); !ok || err != nil {
				b.Fatal(ok, err)
			}
		}
	})
	b.Run("absent", func(b *testing.B) {
		for i := uint64(1 << 20); b.Loop(); i++ {
			e := entry(i)
			r.Find(&e.Sig)
		}
	})
}
