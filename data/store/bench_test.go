package store

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"forerun/disk"
	"forerun/internal/chunk"
)

// benchChunks makes chunks of 64 KiB that compress to about half.
func benchChunks(n int) []sample {
	r := rand.New(rand.NewPCG(1, 1))
	out := make([]sample, n)
	for i := range out {
		plain := make([]byte, chunk.DefaultSize)
		for j := 0; j < len(plain); j += 8 {
			binary.LittleEndian.PutUint64(plain[j:], r.Uint64()&0x0f0f0f0f0f0f0f0f)
		}
		p := chunk.Seal(nil, plain, chunk.Zstd)
		out[i] = sample{p, plain}
	}
	return out
}

func benchStore(b *testing.B) *Store {
	s, err := Open(disk.OS(), b.TempDir()+"/s", Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { s.Close() })
	return s
}

func BenchmarkPut(b *testing.B) {
	xs := benchChunks(16)
	s := benchStore(b)
	b.SetBytes(chunk.DefaultSize)
	b.ReportAllocs()
	for i := uint64(0); b.Loop(); i++ {
		p := xs[i%16].Packed
		binary.LittleEndian.PutUint64(p.Sig[:], i*0x9e3779b97f4a7c15) // another chunk, for all Put knows
		binary.LittleEndian.PutUint64(p.Sig[8:], i*0xd1342543de82ef95)
		if added, err := s.Put(p); !added || err != nil {
			b.Fatal(added, err)
		}
	}
}

func BenchmarkPutDuplicate(b *testing.B) {
	x := benchChunks(1)[0]
	s := benchStore(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Put(x.Packed); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkGet(b *testing.B) {
	xs := benchChunks(256)
	s := benchStore(b)
	for _, x := range xs {
		if _, err := s.Put(x.Packed); err != nil {
			b.Fatal(err)
		}
	}
	s.syncMu.Lock()
	err := s.checkpointLocked() // the map on disk
	s.syncMu.Unlock()
	if err != nil {
		b.Fatal(err)
	}
	dst := make([]byte, chunk.DefaultSize)
	b.SetBytes(chunk.DefaultSize)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if err := s.Get(xs[i%256].Sig, dst); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkOpen opens a store after a clean close; memory and time of a map of a
// TiB are those of internal/runs times its runs.
func BenchmarkOpen(b *testing.B) {
	dir := b.TempDir() + "/s"
	s, err := Open(disk.OS(), dir, Options{})
	if err != nil {
		b.Fatal(err)
	}
	for i := range uint64(200_000) {
		if _, err := s.Put(makeTiny(i).Packed); err != nil {
			b.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		s, err := Open(disk.OS(), dir, Options{})
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		b.ReportMetric(float64(s.Stats().MapMemory)/200_000, "mem-B/chunk")
		s.Close()
		b.StartTimer()
	}
}
