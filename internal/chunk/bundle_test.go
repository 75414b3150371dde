package chunk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// content is noise, text and zeros, as a disk has them.
func content(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 3))
	b := make([]byte, n)
	for at := 0; at < n; {
		m := min(n-at, 1+r.IntN(40000))
		switch r.IntN(4) {
		case 0:
		case 1:
			copy(b[at:at+m], bytes.Repeat(fmt.Appendf(nil, "line %d of a file; ", r.IntN(1000)), m/12+1))
		default:
			for k := at; k < at+m; k++ {
				b[k] = byte(r.Uint32())
			}
		}
		at += m
	}
	return b
}

func cutter(t testing.TB, region int) *Cutter {
	t.Helper()
	c, err := NewCutter(region)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func zstdPack(buf, plain []byte) (Codec, []byte) { return Pack(buf, plain, Zstd) }

// golden is content that is the same for ever: of 8 KiB each, SHA-256 of
// numbers, text, and zeros.
func golden(n int) []byte {
	b := make([]byte, 0, n+32)
	for i := uint64(0); len(b) < n; i++ {
		switch i >> 8 % 7 {
		case 2:
			b = append(b, "the workload runs ahead of its d"...)
		case 5:
			b = append(b, make([]byte, 32)...)
		default:
			s := Sum(binary.LittleEndian.AppendUint64(nil, i))
			b = append(b, s[:]...)
		}
	}
	return b[:n]
}

// The cut points decide signatures that stores keep: they must be these in
// every release, on every machine.
func TestCutsAreForEver(t *testing.T) {
	for region, want := range map[int]string{
		MinSize:     "985e5ebb396100c0083c1efa92391ab9373cecdafc8929a39122d4fe2ba195c7",
		DefaultSize: "6b630faefe147bd5b298647a8fe5936d8aa3a5050b9dbde85d953e46212f5c2c",
		256 << 10:   "df8a8a73095597d9e5de2f8a5b0d56720ce4b270b25da0c4b2ec075fdba35d50",
		MaxSize:     "70bdbb2578a50fccaa30eaa69416e2595a3000b746083f76d646a9baa650839b",
	} {
		b := golden(4<<20 - 5000)
		var all []byte
		for at := 0; at < len(b); at += region {
			for _, n := range cutter(t, region).Cut(nil, b[at:min(at+region, len(b))]) {
				all = binary.LittleEndian.AppendUint32(all, uint32(n))
			}
		}
		if got := Sum(all).String(); got != want {
			t.Errorf("regions of %d: the cuts' sum is %s, was %s", region, got, want)
		}
	}
	want := []int{3502, 4035, 5313, 3150, 3083, 5773, 3739, 3192, 3301, 4310, 3072, 3072, 3072, 3139, 5785, 3338, 4660}
	if got := cutter(t, DefaultSize).Cut(nil, golden(DefaultSize)); !slices.Equal(got, want) {
		t.Errorf("cut into %v, was %v", got, want)
	}
	p := BuildBundle(nil, golden(DefaultSize), cutter(t, DefaultSize), &common, zstdPack, nil)
	if got, want := p.Sig.String(), "450a159f568bfa8aa80d2ad7d00918131cfbe96ba49e3c5102ae69c3e4540ad5"; got != want {
		t.Errorf("the signature of the region is %s, was %s", got, want)
	}
	p = BuildBundle(nil, golden(DefaultSize), cutter(t, DefaultSize), testKey(), zstdPack, nil)
	if got, want := p.Sig.String(), "2870c63dbfa56dfe8a875124517e876488f4da23fde8f0ff78f5e6441edd9b65"; got != want {
		t.Errorf("the signature of the region under a key is %s, was %s", got, want)
	}
}

func TestCutSizes(t *testing.T) {
	for region := MinSize; region <= MaxSize; region *= 2 {
		c, least := cutter(t, region), max(MinPiece, region*3/64)
		for _, n := range []int{512, least, 2*least - 1, 2 * least, region - 512, region} {
			for seed := range uint64(4) {
				cuts, sum := c.Cut(nil, content(seed, n)), 0
				for _, k := range cuts {
					sum += k
					if k >= 2*least || k < least && len(cuts) > 1 {
						t.Fatalf("a piece of %d of %d bytes in regions of %d", k, n, region)
					}
				}
				if sum != n || len(cuts) > maxPieces(n) {
					t.Fatalf("%d pieces of %d bytes together, of %d", len(cuts), sum, n)
				}
			}
		}
	}
	for _, n := range []int{0, MinSize - 1, MinSize / 2, 3 * MinSize, 2 * MaxSize} {
		if _, err := NewCutter(n); err == nil {
			t.Errorf("a region of %d bytes", n)
		}
	}
}

// Content that moved by a few bytes is found again, and is not with chunks of
// one size.
func TestShiftedContentIsFound(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	was := make([]byte, 4<<20)
	for i := range was {
		was[i] = byte(r.Uint32())
	}
	is := append([]byte("moved by some"), was...)[:len(was)]
	for _, region := range []int{DefaultSize, MaxSize} {
		c := cutter(t, region)
		have, fixed := map[Sig]bool{}, map[Sig]bool{}
		for at := 0; at < len(was); at += region {
			fixed[Sum(was[at:at+region])] = true
			for _, p := range c.pieces(was[at:at+region], &common) {
				have[p.Sig] = true
			}
		}
		fresh, freshFixed := 0, 0
		for at := 0; at < len(is); at += region {
			if !fixed[Sum(is[at:at+region])] {
				freshFixed += region
			}
			b := BuildBundle(nil, is[at:at+region], c, &common, zstdPack, func(s Sig) bool { return have[s] })
			fresh += len(b.Data)
		}
		t.Logf("regions of %d: %.1f %% of the bytes go over, %.1f %% with chunks of one size", region,
			100*float64(fresh)/float64(len(is)), 100*float64(freshFixed)/float64(len(is)))
		if fresh > len(is)/5 || freshFixed < len(is) {
			t.Errorf("regions of %d: %d of %d bytes", region, fresh, len(is))
		}
	}
}

// assemble does what a receiver does, with a map in place of a store.
func assemble(key *Key, p Packed, store map[Sig][]byte) ([]byte, error) {
	if p.Codec == Zeros {
		return make([]byte, p.Plain), nil
	}
	recipe, pieces, err := ParseBundle(key, p, nil)
	if err != nil {
		return nil, err
	}
	listed, err := ParseRecipe(key, Packed{Sig: p.Sig, Codec: Recipe, Plain: p.Plain, Data: recipe}, nil)
	if err != nil || len(listed) != len(pieces) {
		return nil, fmt.Errorf("the bundle's recipe: %d pieces of %d: %v", len(listed), len(pieces), err)
	}
	dst := make([]byte, p.Plain)
	for at, i := 0, 0; i < len(pieces); i++ {
		q := pieces[i]
		part := dst[at : at+q.Plain]
		at += q.Plain
		if q.Sig != listed[i].Sig || q.Plain != listed[i].Plain {
			return nil, errors.New("recipe and bundle list other pieces")
		}
		if q.Codec == Known {
			if len(store[q.Sig]) != q.Plain {
				return nil, errNotHeld
			}
			copy(part, store[q.Sig])
			continue
		}
		if err := q.OpenUnder(key, part); err != nil {
			return nil, err
		}
		store[q.Sig] = part
	}
	return dst, nil
}

var errNotHeld = errors.New("not held")

func TestBundle(t *testing.T) {
	for _, key := range []*Key{&common, testKey()} {
		for _, region := range []int{MinSize, DefaultSize, MaxSize} {
			c := cutter(t, region)
			store := map[Sig][]byte{}
			buf := make([]byte, 0, 100)
			for seed := range uint64(8) {
				plain := content(seed, region-int(seed%3)*512)
				plain[0] |= 1
				if seed == 4 {
					copy(plain[region/2:], plain[:region/2-2048]) // pieces that come twice
				}
				full := BuildBundle(buf, plain, c, key, zstdPack, nil)
				if len(full.Data) > MaxPacked(len(plain)) || full.Codec != Bundle {
					t.Fatalf("%d bytes packed with codec %d into %d", len(plain), full.Codec, len(full.Data))
				}
				buf = full.Data[:0]
				got, err := assemble(key, full, map[Sig][]byte{})
				if err != nil || !bytes.Equal(got, plain) {
					t.Fatalf("region %d seed %d: %v", region, seed, err)
				}
				full.Data = bytes.Clone(full.Data)
				if _, err := assemble(key, full, store); err != nil {
					t.Fatal(err)
				}
				// All pieces held: little more than the signatures goes over.
				none := BuildBundle(nil, plain, c, key, zstdPack, func(s Sig) bool { return store[s] != nil })
				if got, err = assemble(key, none, store); err != nil || !bytes.Equal(got, plain) || none.Sig != full.Sig {
					t.Fatalf("region %d seed %d, all held: %v", region, seed, err)
				}
				if n := len(c.Cut(nil, plain)); len(none.Data) > bundleHeader+1+n*(pieceWord+SigLen+pieceWord) {
					t.Fatalf("%d bytes for %d pieces that are held", len(none.Data), n)
				}
				if known := BuildBundle(nil, plain, c, key, zstdPack, func(s Sig) bool { return s == full.Sig }); known.Codec != Known ||
					known.Sig != full.Sig || len(known.Data) != 0 || known.Plain != len(plain) {
					t.Fatalf("the region is held: %+v", known)
				}
				for _, other := range []*Key{&common, testKey()} {
					if _, _, err := ParseBundle(other, full, nil); (err == nil) != (*other == *key) {
						t.Fatalf("another domain's bundle: %v", err)
					}
				}
			}
			if p := BuildBundle(nil, make([]byte, region), c, key, zstdPack, nil); p.Codec != Zeros || p.Plain != region {
				t.Fatalf("zeros: %+v", p)
			}
		}
	}
}

// Noise is what grows most.
func TestMaxPacked(t *testing.T) {
	r := rand.New(rand.NewPCG(4, 4))
	for region := MinSize; region <= MaxSize; region *= 2 {
		plain := make([]byte, region)
		for i := range plain {
			plain[i] = byte(r.Uint32())
		}
		for _, codec := range []Codec{Raw, Zstd, S2} {
			p := BuildBundle(nil, plain, cutter(t, region), &common, func(buf, p []byte) (Codec, []byte) { return Pack(buf, p, codec) }, nil)
			if len(p.Data) > MaxPacked(region) {
				t.Errorf("%d bytes packed into %d, the bound is %d", region, len(p.Data), MaxPacked(region))
			}
			if got, err := assemble(&common, p, map[Sig][]byte{}); err != nil || !bytes.Equal(got, plain) {
				t.Error(err)
			}
		}
		if over := float64(MaxPacked(region))/float64(region) - 1; over > 0.02 {
			t.Errorf("the bound of %d bytes is %.1f %% more", region, 100*over)
		}
	}
}

func TestPlainBytesAreNoRecipe(t *testing.T) {
	p := BuildBundle(nil, content(1, DefaultSize), cutter(t, DefaultSize), &common, zstdPack, nil)
	recipe, _, err := ParseBundle(&common, p, nil)
	if err != nil {
		t.Fatal(err)
	}
	if Sum(recipe) == p.Sig {
		t.Fatal("a disk that holds the recipe's bytes has a chunk with its signature")
	}
}

// TestBundleRefusesEveryFlippedBit: what is accepted has the right bytes.
func TestBundleRefusesEveryFlippedBit(t *testing.T) {
	plain := content(6, MinSize)
	p := BuildBundle(nil, plain, cutter(t, MinSize), testKey(), zstdPack, nil)
	for i := 0; i < len(p.Data)*8; i++ {
		if i > 8*600 && i%97 != 0 {
			continue
		}
		q := p
		q.Data = bytes.Clone(p.Data)
		q.Data[i/8] ^= 1 << (i % 8)
		got, err := assemble(testKey(), q, map[Sig][]byte{})
		if err == nil && !bytes.Equal(got, plain) {
			t.Fatalf("bit %d: wrong bytes were accepted", i)
		}
		if err != nil && !errors.Is(err, ErrMismatch) && !errors.Is(err, errNotHeld) {
			t.Fatalf("bit %d: %v", i, err)
		}
	}
	for n := range len(p.Data) {
		q := p
		q.Data = p.Data[:n]
		if _, err := assemble(testKey(), q, map[Sig][]byte{}); err == nil {
			t.Fatalf("cut to %d bytes it was accepted", n)
		}
	}
}

// Of the recipes that list the same bytes one is right.
func TestRecipeIsCanonical(t *testing.T) {
	sig := Sum([]byte("x"))
	word := func(w uint32) []byte { return binary.LittleEndian.AppendUint32(nil, w) }
	piece := func(n uint32) []byte { return append(word(n), sig[:]...) }
	zeros := func(n uint32) []byte { return word(n | pieceZeros) }
	version := []byte{recipeVersion}
	for name, c := range map[string]struct {
		data []byte
		ok   bool
	}{
		"one piece":        {slices.Concat(version, piece(9000)), true},
		"zeros and data":   {slices.Concat(version, zeros(5000), piece(4000)), true},
		"empty":            {nil, false},
		"no piece":         {version, false},
		"another version":  {slices.Concat([]byte{2}, piece(9000)), false},
		"too short":        {slices.Concat(version, piece(8999)), false},
		"too long":         {slices.Concat(version, piece(9001)), false},
		"all zeros":        {slices.Concat(version, zeros(9000)), false},
		"zeros twice":      {slices.Concat(version, zeros(1000), zeros(1000), piece(7000)), false},
		"nothing":          {slices.Concat(version, piece(0), piece(9000)), false},
		"zeros of nothing": {slices.Concat(version, zeros(0), piece(9000)), false},
		"reserved bits":    {slices.Concat(version, piece(9000|1<<24)), false},
		"too many":         {slices.Concat(version, piece(3000), piece(3000), piece(2000), piece(1000)), false},
		"cut signature":    {slices.Concat(version, piece(9000)[:20]), false},
		"cut length":       {slices.Concat(version, piece(9000), []byte{1, 2}), false},
	} {
		p := Packed{Codec: Recipe, Plain: 9000, Data: c.data, Sig: common.recipeSum(c.data)}
		if pieces, err := ParseRecipe(&common, p, nil); (err == nil) != c.ok || err != nil && !errors.Is(err, ErrMismatch) {
			t.Errorf("%s: %v %v", name, pieces, err)
		} else if c.ok && !bytes.Equal(appendRecipe(nil, pieces), c.data) {
			t.Errorf("%s: written again it is another", name)
		}
	}
}

// FuzzParseRecipe: what is accepted is canonical and adds up.
func FuzzParseRecipe(f *testing.F) {
	add := func(plain []byte) {
		p := BuildBundle(nil, plain, cutter(f, DefaultSize), &common, zstdPack, nil)
		recipe, _, err := ParseBundle(&common, p, nil)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint32(len(plain)), recipe)
	}
	add(content(1, DefaultSize))
	add(content(1, DefaultSize)[20000:22560])
	f.Fuzz(func(t *testing.T, plain uint32, data []byte) {
		p := Packed{Codec: Recipe, Plain: int(plain % (MaxSize + 2)), Data: data, Sig: common.recipeSum(data)}
		pieces, err := ParseRecipe(&common, p, nil)
		if err != nil {
			return
		}
		sum := 0
		for _, q := range pieces {
			sum += q.Plain
		}
		if sum != p.Plain || len(pieces) > maxPieces(p.Plain) || !bytes.Equal(appendRecipe(nil, pieces), data) {
			t.Fatalf("%d bytes in %d pieces of %d", sum, len(pieces), p.Plain)
		}
	})
}

// FuzzParseBundle: whatever comes ends in an error or in pieces that lie in the
// bundle and add up.
func FuzzParseBundle(f *testing.F) {
	for seed := range uint64(3) {
		plain := content(seed, MinSize)
		n := uint64(0)
		p := BuildBundle(nil, plain, cutter(f, MinSize), &common, zstdPack, func(Sig) bool { n++; return n%(seed+2) == 2 })
		f.Add(uint32(p.Plain), p.Data)
	}
	f.Fuzz(func(t *testing.T, plain uint32, data []byte) {
		p := Packed{Codec: Bundle, Plain: int(plain % (MaxSize + 2)), Data: data}
		if len(data) >= bundleHeader { // past the signature, which chance does not find
			n := int(binary.LittleEndian.Uint32(data) & lengthMask)
			if n <= len(data)-bundleHeader {
				p.Sig = common.recipeSum(data[bundleHeader : bundleHeader+n])
			}
		}
		recipe, pieces, err := ParseBundle(&common, p, nil)
		if err != nil {
			return
		}
		sum, packed, words := 0, 0, 0
		for _, q := range pieces {
			sum += q.Plain
			packed += len(q.Data)
			if q.Codec != Zeros {
				words++
			}
			if len(q.Data) > q.Plain {
				t.Fatalf("a piece of %d packed and %d plain bytes", len(q.Data), q.Plain)
			}
			q.Open(make([]byte, q.Plain))
		}
		if sum != p.Plain || bundleHeader+len(recipe)+words*pieceWord+packed != len(data) {
			t.Fatalf("%d of %d plain bytes, %d packed of %d", sum, p.Plain, packed, len(data))
		}
	})
}

func BenchmarkBundle(b *testing.B) {
	for _, region := range []int{DefaultSize, MaxSize} {
		plain, c := content(9, region), cutter(b, region)
		for _, held := range []bool{false, true} {
			b.Run(fmt.Sprintf("%dK/held=%v", region>>10, held), func(b *testing.B) {
				var buf []byte
				b.SetBytes(int64(region))
				for b.Loop() {
					asked := 0 // first for the region
					buf = BuildBundle(buf, plain, c, &common, zstdPack, func(Sig) bool { asked++; return held && asked > 1 }).Data
				}
			})
		}
	}
}
