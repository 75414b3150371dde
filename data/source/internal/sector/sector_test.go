package sector

import (
	"math/rand/v2"
	"testing"

	"forerun/block"
)

// TestAlign holds Align to a map of bytes: no sector with a byte of data may be
// called zero, and every wholly zero sector inside one extent stays zero.
func TestAlign(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for range 2000 {
		base := int64(r.IntN(4)) * Size
		end := base + 1 + r.Int64N(6*Size)
		real := end + r.Int64N(2)*100 // some answers stop short of the end
		kinds := make([]block.ExtentKind, end-base)
		var ext []block.Extent
		for at := base; at < end; {
			n := 1 + r.Int64N(end-at)
			if r.IntN(2) == 0 {
				n = min(n, 1+r.Int64N(200))
			}
			e := block.Extent{Off: at, Len: n, Kind: block.ExtentKind(r.IntN(3))}
			for i := range n {
				kinds[at-base+i] = e.Kind
			}
			ext = block.AppendExtent(ext, e)
			at += n
		}
		out := Align(ext, real)
		at := base
		for _, e := range out {
			if e.Off != at || e.Len <= 0 || e.End()%Size != 0 {
				t.Fatalf("extent %+v where %d was due", e, at)
			}
			at = e.End()
			for s := e.Off; s < e.End(); s += Size {
				allZero, one := true, true
				for i := s; i < min(s+Size, end); i++ {
					allZero = allZero && kinds[i-base].Zero()
					one = one && kinds[i-base] == kinds[s-base]
				}
				allZero = allZero && (s+Size <= end || end == real) // what is unknown is not zero
				if e.Kind.Zero() && !allZero {
					t.Fatalf("sector %d has data and is called %v", s, e.Kind)
				}
				if one && s+Size <= end && e.Kind != kinds[s-base] {
					t.Fatalf("sector %d is all %v and is called %v", s, kinds[s-base], e.Kind)
				}
			}
		}
		if at != Up(end) {
			t.Fatalf("extents end at %d, not %d", at, Up(end))
		}
	}
}

func TestCheck(t *testing.T) {
	for _, c := range []struct {
		off, n int64
		want   block.Kind
	}{
		{0, 512, block.KindNone}, {512, 512, block.KindNone}, {0, 0, block.KindInvalid}, {-512, 512, block.KindInvalid},
		{0, 511, block.KindInvalid}, {1, 512, block.KindInvalid}, {512, 1024, block.KindRange}, {1 << 62, 1 << 62, block.KindInvalid},
	} {
		if k := block.KindOf(Check("op", "o", c.off, c.n, 1024)); k != c.want {
			t.Errorf("Check(%d, %d) = %v, want %v", c.off, c.n, k, c.want)
		}
	}
}
