package chunk

import (
	"bytes"
	"compress/flate"
	"crypto/sha256"
	"math/rand/v2"
	"os"
	"testing"
)

// program is a part of this test's own machine code.
func program(t testing.TB, n int) []byte {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil || len(b) < n+1<<20 {
		t.Fatalf("%d bytes of %s: %v", len(b), path, err)
	}
	return b[1<<20:][:n]
}

func TestLevels(t *testing.T) {
	in := samples()
	in["program"] = program(t, DefaultSize)
	in["big program"] = program(t, MaxSize)
	for name, plain := range in {
		before := sha256.Sum256(plain)
		last := len(plain) + 1
		for l := Plain; l < levels; l++ {
			codec, out := Squeeze(nil, plain, l)
			p := Packed{Sig: Sum(plain), Codec: codec, Plain: len(plain), Data: out}
			got := make([]byte, len(plain))
			if err := p.Open(got); err != nil {
				t.Fatalf("%s, %v: %v", name, l, err)
			}
			if !bytes.Equal(got, plain) || sha256.Sum256(plain) != before {
				t.Fatalf("%s, %v: other bytes came back", name, l)
			}
			if !codec.Packs() {
				t.Errorf("%s, %v: codec %d cannot be stored", name, l, codec)
			}
			if name == "noise" && codec != Raw {
				t.Errorf("noise was packed at %v", l)
			}
			if name == "program" && len(out) >= last {
				t.Errorf("%s, %v: %d bytes, one level below %d", name, l, len(out), last)
			}
			last = len(out)
		}
	}
}

func TestCompressible(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	noise := make([]byte, DefaultSize)
	for range 100 {
		for i := range noise {
			noise[i] = byte(r.Uint32())
		}
		if Compressible(noise) {
			t.Fatal("noise looks compressible")
		}
	}
	var packed bytes.Buffer
	w, err := flate.NewWriter(&packed, flate.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(program(t, MaxSize))
	w.Close()
	if Compressible(packed.Bytes()[:DefaultSize]) {
		t.Error("what flate packed looks compressible")
	}
	for name, p := range map[string][]byte{"text": samples()["text"], "program": program(t, DefaultSize), "short": noise[:100]} {
		if !Compressible(p) {
			t.Errorf("%s looks incompressible", name)
		}
	}
	half := append(bytes.Clone(noise[:DefaultSize/2]), samples()["text"][:DefaultSize/2]...)
	if !Compressible(half) {
		t.Error("half text looks incompressible")
	}
}

func BenchmarkSqueeze(b *testing.B) {
	noise := samples()["noise"]
	code := program(b, 16*DefaultSize)
	buf := make([]byte, 0, 2*DefaultSize)
	for l := Quick; l < levels; l++ {
		b.Run(l.String()+"/program", func(b *testing.B) {
			b.SetBytes(DefaultSize)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				Squeeze(buf, code[i%16*DefaultSize:][:DefaultSize], l)
			}
		})
		b.Run(l.String()+"/noise", func(b *testing.B) {
			b.SetBytes(DefaultSize)
			b.ReportAllocs()
			for b.Loop() {
				Squeeze(buf, noise, l)
			}
		})
	}
}
