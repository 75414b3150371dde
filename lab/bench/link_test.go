package bench

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
)

func TestCrossed(t *testing.T) {
	ms := time.Millisecond
	at := func(d time.Duration, n int64) sample { return sample{d, n, n / 10} }
	// 10 KiB of greeting, a pause, 10 MB in a second, pings for a minute.
	s := []sample{at(0, 500), at(10*ms, 500+10<<10), at(2000*ms, 500+10<<10)}
	for i := int64(1); i <= 100; i++ {
		s = append(s, at(2000*ms+time.Duration(i)*10*ms, 500+10<<10+i*100_000))
	}
	end := s[len(s)-1].target
	for i := int64(1); i <= 60; i++ {
		s = append(s, at(3*time.Second+time.Duration(i)*time.Second, end+i*100))
	}
	c := crossed(s)
	if c.target != end+6000-500 || c.first < 1.99 || c.first > 2.02 || c.last < 2.97 || c.last > 3.01 {
		t.Errorf("%+v", c)
	}
	if r := c.rate(); r < 9.9e6 || r > 10.1e6 {
		t.Errorf("a rate of %v", r)
	}
	if c := crossed(s[:3]); c.rate() != 0 || c.target != 10<<10 {
		t.Errorf("greetings alone are a transfer: %+v", c)
	}
	if c := crossed(nil); c != (crossing{}) {
		t.Errorf("%+v", c)
	}
}

func TestPercentile(t *testing.T) {
	var v []time.Duration
	for i := range 300 {
		v = append(v, time.Duration(300-i))
	}
	for q, want := range map[float64]time.Duration{0.5: 150, 0.99: 297, 1: 300, 0: 1} {
		if got := percentile(v, q); got != want {
			t.Errorf("%v: %v, not %v", q, got, want)
		}
	}
	if v[0] != 300 || percentile(nil, 0.5) != 0 {
		t.Error("it was sorted in place, or nothing has a percentile")
	}
}

func TestPoints(t *testing.T) {
	all := []point{{rate: 1, peers: true}, {rate: 2}}
	b := &linkBench{stage: &stage{Options: Options{Rate: 7, RTT: time.Second}}}
	if got := b.points(all, all[:1]); len(got) != 2 || !got[0].peers {
		t.Error(got)
	}
	b.o.Alone, b.o.Quick = true, true
	if got := b.points(all, all[:1]); len(got) != 1 || got[0].peers || !all[0].peers {
		t.Error(got, all)
	}
	b.o.One, b.o.Loss = true, 0.01
	if got := b.points(all, nil); len(got) != 1 || got[0].rate != 7 || got[0].loss != 0.01 || got[0].rtt != time.Second {
		t.Error(got)
	}
}

func TestColdChunks(t *testing.T) {
	c := coldChunks(1)
	if !slices.Equal(c, coldChunks(1)) || slices.Equal(c, coldChunks(2)) {
		t.Error("the order does not follow from the seed")
	}
	slices.Sort(c)
	if c[0]*demandChunk < demandFrom || c[len(c)-1]*demandChunk >= demandDisk {
		t.Error("outside the region", c[0], c[len(c)-1])
	}
	for i := range c[1:] {
		if c[i+1]-c[i] < 2 {
			t.Fatal("neighbours", c[i], c[i+1])
		}
	}
	// Enough for the slowest case: a phase that lasts as long as it may, at 5 ms a read.
	if len(c) < 2*demandReads {
		t.Error("too few:", len(c))
	}
}

// packs is what zstd makes of a byte.
func packs(t *testing.T, p []byte) float64 {
	t.Helper()
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		t.Fatal(err)
	}
	return float64(len(e.EncodeAll(p, nil))) / float64(len(p))
}

func TestContents(t *testing.T) {
	made := func(f func(io.Writer, uint64, int64) error, seed uint64) []byte {
		var b bytes.Buffer
		if err := f(&b, seed, 1<<20); err != nil || b.Len() != 1<<20 {
			t.Fatal(err, b.Len())
		}
		return b.Bytes()
	}
	if r := packs(t, made(noise, 1)); r < 1 {
		t.Errorf("noise packs to %v", r)
	}
	if r := packs(t, made(half, 1)); r < 0.49 || r > 0.55 {
		t.Errorf("half packs to %v", r)
	}
	if r := packs(t, text(rand.New(rand.NewPCG(1, 1)), demandChunk)); r < 0.3 || r > 0.42 {
		t.Errorf("a chunk of text packs to %v", r)
	}
	for _, f := range []func(io.Writer, uint64, int64) error{noise, half} {
		p := made(f, 1)
		if !bytes.Equal(p, made(f, 1)) || bytes.Equal(p[:4096], made(f, 2)[:4096]) || bytes.Equal(p[:2048], p[4096:4096+2048]) {
			t.Error("not made from the seed, or it repeats itself")
		}
	}
}

func TestChangedCopy(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	f, err := os.Create(src)
	if err != nil {
		t.Fatal(err)
	}
	if err := noise(f, 3, 100*demandChunk); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(1000 * demandChunk); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := changedCopy(dst, src, 5, 0.1); err != nil {
		t.Fatal(err)
	}
	a, _ := os.ReadFile(src)
	b, _ := os.ReadFile(dst)
	if len(a) != len(b) {
		t.Fatal(len(a), len(b))
	}
	changed := 0
	for i := 0; i < len(a); i += demandChunk {
		if !bytes.Equal(a[i:i+demandChunk], b[i:i+demandChunk]) {
			changed++
		}
	}
	if changed != 10 {
		t.Errorf("%d of 100 blocks with data were changed", changed)
	}
	whole, err := withoutHoles(filepath.Join(dir, "data"), src)
	if err != nil || whole != 100*demandChunk {
		t.Error(whole, err)
	}
	if d, err := os.ReadFile(filepath.Join(dir, "data")); err != nil || !bytes.Equal(a[:whole], d) {
		t.Error("the data is another one", err)
	}
}
