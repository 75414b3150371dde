package chunk

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/klauspost/compress/zstd"
)

func TestTight(t *testing.T) {
	in := samples()
	r := rand.New(rand.NewPCG(3, 4))
	words := [][]byte{[]byte("the "), []byte("workload "), []byte("disk"), {0, 0, 0, 0, 0}, []byte("\x48\x8b\x05"), []byte("e")}
	var mixed []byte
	for len(mixed) < 300<<10 {
		mixed = append(mixed, words[r.IntN(len(words))]...)
		if r.IntN(4) == 0 {
			mixed = append(mixed, byte(r.Uint32()))
		}
		if n := len(mixed); n > 100 && r.IntN(9) == 0 {
			at := r.IntN(n - 50)
			mixed = append(mixed, mixed[at:at+r.IntN(50)]...)
		}
	}
	in["mixed"] = mixed
	in["empty"] = nil
	in["noise then text"] = append(bytes.Clone(in["noise"]), in["text"]...)
	in["noise twice"] = append(bytes.Clone(in["noise"]), in["noise"]...)
	in["noise three times"] = append(bytes.Clone(in["noise twice"]), in["noise"]...)
	for _, n := range []int{1, 12, 13, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 4096, 16383, 16384, 65535, 65536, 65792, 131072, 131073} {
		in["mixed "+string(rune('0'+n%10))] = mixed[:n]
		one := new(tight)
		check(t, one, mixed[n/2:n/2+n])
	}
	one := new(tight)
	for range 2 { // what one call leaves does not disturb the next
		for name, p := range in {
			t.Log(name)
			check(t, one, p)
		}
	}
	one.base = 1<<32 - 3<<20
	for range 4 {
		check(t, one, mixed)
	}
}

func check(t testing.TB, one *tight, p []byte) {
	t.Helper()
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	packed := one.encode(nil, p)
	got, err := d.DecodeAll(packed, nil)
	if err != nil {
		t.Fatalf("%d bytes packed into %d: %v", len(p), len(packed), err)
	}
	if !bytes.Equal(got, p) {
		t.Fatalf("%d bytes packed into %d: other bytes came back", len(p), len(packed))
	}
	if len(packed) > len(p)+3*(len(p)/blockMax+1)+9 {
		t.Fatalf("%d bytes packed into %d", len(p), len(packed))
	}
}

func FuzzTight(f *testing.F) {
	for _, p := range samples() {
		f.Add(p[:min(len(p), 700)], uint16(1))
	}
	f.Add([]byte("abcdabcdabcdabcd----abcd"), uint16(40))
	one := new(tight)
	f.Fuzz(func(t *testing.T, p []byte, times uint16) {
		// Repeated, it reaches lengths and offsets that no fuzzer would write out.
		p = bytes.Repeat(p, 1+int(times)%(MaxSize/4/max(len(p), 1)+1))
		check(t, one, p[:min(len(p), MaxSize)])
	})
}
