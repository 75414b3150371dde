package oracle

import (
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const seed, size = 2, 1 << 20

func write(t *testing.T, h *History, off int64, n int64, fua bool) (*Op, []byte) {
	t.Helper()
	p := make([]byte, n)
	op := h.BeginWrite(off, n, p, fua)
	if op == nil {
		t.Fatal("busy")
	}
	return op, p
}

// TestRules plays the histories the rules are about; each step's bytes are
// offered in turn and must be taken or refused.
func TestRules(t *testing.T) {
	const off = 512 * 1024 // not a zero run
	old := func() []byte {
		p := make([]byte, 1024)
		if !zeroBase(seed, off/Sector) {
			fill(p, seed, off/Sector, 0)
			fill(p[Sector:], seed, off/Sector+1, 0)
		}
		return p
	}
	right := func(t *testing.T, h *History, p []byte) {
		t.Helper()
		if err := h.Check(off, p); err != nil {
			t.Error(err)
		}
	}
	wrong := func(t *testing.T, h *History, p []byte) {
		t.Helper()
		var w *Wrong
		if err := h.Check(off, p); !errors.As(err, &w) {
			t.Errorf("accepted: %v", err)
		}
	}
	t.Run("read your writes", func(t *testing.T) {
		h := New(seed, size)
		right(t, h, old())
		op, a := write(t, h, off, 1024, false)
		if h.BeginWrite(off+512, 512, make([]byte, 512), false) != nil || h.BeginRead(off, 512) != nil {
			t.Error("an overlapping request was let in")
		}
		op.Done()
		right(t, h, a)
		wrong(t, h, old())
	})
	t.Run("acknowledged, not flushed, crash", func(t *testing.T) {
		h := New(seed, size)
		op, a := write(t, h, off, 1024, false)
		op.Done()
		h.Crash()
		mixed := append(append([]byte{}, a[:512]...), old()[512:]...)
		right(t, h, mixed) // half of it survived
		wrong(t, h, a)     // and what did not never comes back
		right(t, h, mixed)
		if h.Stats().Rewound != 1 {
			t.Errorf("%+v", h.Stats())
		}
	})
	t.Run("flushed, crash", func(t *testing.T) {
		h := New(seed, size)
		op, a := write(t, h, off, 1024, false)
		op.Done()
		f := h.BeginFlush()
		f.Done()
		op, b := write(t, h, off, 1024, false)
		op.Done()
		h.Crash()
		wrong(t, h, old())
		right(t, h, a)
		wrong(t, h, b)
	})
	t.Run("fua, crash", func(t *testing.T) {
		h := New(seed, size)
		op, a := write(t, h, off, 1024, true)
		op.Done()
		h.Crash()
		wrong(t, h, old())
		right(t, h, a)
	})
	t.Run("flush begun before the acknowledgement", func(t *testing.T) {
		h := New(seed, size)
		op, _ := write(t, h, off, 1024, false)
		f := h.BeginFlush()
		op.Done()
		f.Done()
		h.Crash()
		right(t, h, old())
	})
	t.Run("unknown outcome", func(t *testing.T) {
		h := New(seed, size)
		op, a := write(t, h, off, 1024, false)
		op.Failed()
		right(t, h, a)
		wrong(t, h, old())
		op, b := write(t, h, off, 1024, false)
		op.Failed()
		right(t, h, a)
		wrong(t, h, b)
	})
	t.Run("zeros", func(t *testing.T) {
		h := New(seed, size)
		op, _ := write(t, h, off, 1024, true)
		op.Done()
		op = h.BeginWrite(off, 1024, nil, false)
		op.Done()
		right(t, h, make([]byte, 1024))
		wrong(t, h, old())
	})
	t.Run("torn and moved", func(t *testing.T) {
		h := New(seed, size)
		op, a := write(t, h, off, 1024, true)
		op.Done()
		torn := append([]byte{}, a...)
		torn[300] ^= 1
		wrong(t, h, torn)
		err := h.Check(off, append(append([]byte{}, a[512:]...), a[:512]...))
		if err == nil || !strings.Contains(err.Error(), "of sector 1025") {
			t.Error(err)
		}
	})
}

// TestAgainstADisk runs random histories on a model of a disk with a volatile
// cache: a good one is never accused, and one that loses a flushed write is caught.
func TestAgainstADisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "base")
	if err := WriteBase(path, seed, size); err != nil {
		t.Fatal(err)
	}
	base, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	caught := 0
	for s := range uint64(12) {
		for _, liar := range []bool{false, true} {
			rng := rand.New(rand.NewPCG(s, 9))
			h := New(seed, size)
			durable, now := append([]byte{}, base...), append([]byte{}, base...)
			bad := false
			for range 300 {
				n := int64(1+rng.IntN(16)) * Sector
				off := int64(rng.IntN(256)) * Sector // a small range, so that versions pile up
				switch k := rng.IntN(20); {
				case k < 12:
					var p []byte
					if k > 1 {
						p = make([]byte, n)
					}
					op := h.BeginWrite(off, n, p, false)
					if rng.IntN(20) == 0 {
						op.Failed()
						if rng.IntN(2) == 0 {
							continue
						}
					}
					if p == nil {
						p = make([]byte, n)
					}
					copy(now[off:], p)
					op.Done()
				case k < 15:
					op := h.BeginRead(off, n)
					if err := h.Check(off, now[off:off+n]); err != nil {
						bad = true
						if !liar {
							t.Fatalf("seed %d: %v", s, err)
						}
					}
					op.Done()
				case k < 19:
					op := h.BeginFlush()
					if !liar || rng.IntN(2) == 0 {
						copy(durable, now)
					}
					op.Done()
				default:
					h.Crash()
					for i := int64(0); i < size; i += Sector {
						if rng.IntN(2) == 0 {
							copy(now[i:i+Sector], durable[i:])
						}
					}
					copy(durable, now)
					check := h.Verify
					if rng.IntN(2) == 0 {
						check = func(r io.ReaderAt) error { return h.VerifyTouched(r, 4, 1) }
					}
					if err := check(strings.NewReader(string(now))); err != nil {
						bad = true
						if !liar {
							t.Fatalf("seed %d: %v", s, err)
						}
					}
				}
				if bad {
					caught++
					break
				}
			}
		}
	}
	if caught < 8 {
		t.Errorf("a disk that forgets flushed writes was caught %d times in 12", caught)
	}
}

func TestBaseHasBoth(t *testing.T) {
	var n int
	for s := uint64(0); s < size/Sector; s += 512 {
		if zeroBase(seed, s) {
			n++
		}
	}
	if n == 0 || n == size/Sector/512 || zeroBase(seed, 1024) {
		t.Errorf("%d of %d runs are zero, and that at 512 KiB: %v; choose another seed", n, size/Sector/512, zeroBase(seed, 1024))
	}
}
