package chunk

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"
)

func samples() map[string][]byte {
	r := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, DefaultSize)
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	return map[string][]byte{
		"noise": noise,
		"text":  bytes.Repeat([]byte("the workload runs ahead of its data\n"), 1830)[:DefaultSize],
		"short": []byte("x"),
		"zeros": make([]byte, MinSize),
		"max":   bytes.Repeat([]byte{1, 2, 3, 4, 5, 6, 7, 8}, MaxSize/8),
	}
}

func TestSealOpen(t *testing.T) {
	for name, plain := range samples() {
		for _, codec := range []Codec{Raw, Zstd, S2} {
			p := Seal(nil, plain, codec)
			got := make([]byte, len(plain))
			if err := p.Open(got); err != nil {
				t.Fatalf("%s codec %d: %v", name, codec, err)
			}
			if !bytes.Equal(got, plain) {
				t.Fatalf("%s codec %d: other bytes came back", name, codec)
			}
			if name == "noise" && p.Codec != Raw {
				t.Errorf("noise was packed with codec %d into %d bytes", p.Codec, len(p.Data))
			}
			if name == "text" && codec != Raw && len(p.Data) > len(plain)/4 {
				t.Errorf("text packed into %d of %d bytes", len(p.Data), len(plain))
			}
		}
	}
}

func TestOpenRefusesEveryFlippedBit(t *testing.T) {
	plain := samples()["text"][:4096]
	for _, codec := range []Codec{Raw, Zstd, S2} {
		p := Seal(nil, plain, codec)
		got := make([]byte, len(plain))
		for i := 0; i < len(p.Data)*8; i += 7 {
			q := p
			q.Data = bytes.Clone(p.Data)
			q.Data[i/8] ^= 1 << (i % 8)
			// A flip in a header's unused bit may still give the right bytes; wrong ones never pass.
			if err := q.Open(got); err == nil && !bytes.Equal(got, plain) {
				t.Fatalf("codec %d bit %d: wrong bytes were accepted", codec, i)
			} else if err != nil && !errors.Is(err, ErrMismatch) {
				t.Fatalf("codec %d bit %d: %v does not wrap ErrMismatch", codec, i, err)
			}
		}
	}
}

func FuzzOpen(f *testing.F) {
	for _, plain := range samples() {
		for _, codec := range []Codec{Raw, Zstd, S2} {
			p := Seal(nil, plain[:min(len(plain), 512)], codec)
			f.Add(uint8(p.Codec), uint32(p.Plain), p.Data)
		}
	}
	f.Fuzz(func(t *testing.T, codec uint8, n uint32, data []byte) {
		p := Packed{Codec: Codec(codec), Plain: int(n % MaxSize), Data: data}
		dst := make([]byte, p.Plain)
		if p.Open(dst) == nil && !(p.Codec == Zeros && AllZero(dst)) {
			t.Fatal("a zero signature matched")
		}
	})
}

func BenchmarkSeal(b *testing.B) {
	plain := bytes.Repeat(samples()["noise"][:64], DefaultSize/64)
	for i := range plain {
		if i%3 == 0 {
			plain[i] = byte(i)
		}
	}
	buf := make([]byte, 0, 2*DefaultSize)
	for _, c := range []Codec{Zstd, S2} {
		b.Run(map[Codec]string{Zstd: "zstd", S2: "s2"}[c], func(b *testing.B) {
			b.SetBytes(DefaultSize)
			b.ReportAllocs()
			for b.Loop() {
				Seal(buf, plain, c)
			}
		})
	}
}
