package oracle

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// follower is a disk and a copy that follows it, with requests under way.
type follower struct {
	h         *History
	rng       *rand.Rand
	now, copy []byte
	way       []*pending
}

type pending struct {
	op      *Op
	off     int64
	p       []byte
	applied bool
}

func (f *follower) apply(k *pending) {
	if !k.applied {
		copy(f.now[k.off:], k.p)
		k.applied = true
	}
}

// step begins or ends a write; a write is applied somewhere between the two.
func (f *follower) step() {
	if len(f.way) > 0 && f.rng.IntN(2) == 0 {
		i := f.rng.IntN(len(f.way))
		f.apply(f.way[i])
		f.way[i].op.Done()
		f.way = append(f.way[:i], f.way[i+1:]...)
		return
	}
	n := int64(1+f.rng.IntN(12)) * Sector
	off := int64(f.rng.IntN(200)) * Sector
	p := make([]byte, n)
	var op *Op
	if f.rng.IntN(6) == 0 {
		op = f.h.BeginWrite(off, n, nil, false)
	} else {
		op = f.h.BeginWrite(off, n, p, false)
	}
	if op != nil {
		k := &pending{op: op, off: off, p: p}
		f.way = append(f.way, k)
		if f.rng.IntN(3) == 0 {
			f.apply(k)
		}
	}
}

func newFollower(t *testing.T, s uint64) *follower {
	t.Helper()
	path := filepath.Join(t.TempDir(), "base")
	if err := WriteBase(path, seed, size); err != nil {
		t.Fatal(err)
	}
	base, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f := &follower{h: New(seed, size), rng: rand.New(rand.NewPCG(s, 4)), now: base, copy: append([]byte{}, base...)}
	f.h.TrackCuts()
	return f
}

// seeds is how many histories each test plays.
func seeds() uint64 {
	if testing.Short() {
		return 5
	}
	return 20
}

// TestCuts lets copies follow honestly, and finds each to be a cut that covers
// what had been acknowledged and misses what was written after.
func TestCuts(t *testing.T) {
	for s := range seeds() {
		f := newFollower(t, s)
		for range 8 {
			for range f.rng.IntN(40) {
				f.step()
			}
			covered := f.h.Tick()
			copy(f.copy, f.now)
			for range f.rng.IntN(40) {
				f.step()
			}
			c, err := f.h.JudgeCut(strings.NewReader(string(f.copy)))
			if err != nil {
				t.Fatalf("seed %d: %v", s, err)
			}
			if !c.Covers(covered) {
				t.Fatalf("seed %d: %+v does not cover %d", s, c, covered)
			}
			if (c.Missing == 0) != c.Oldest.IsZero() || c.Missing == 0 && c.MissingBytes != 0 || c.MissingBytes%Sector != 0 {
				t.Fatalf("seed %d: %+v", s, c)
			}
		}
		for _, k := range f.way {
			f.apply(k)
			k.op.Done()
		}
		f.way = nil
		if c, err := f.h.JudgeCut(strings.NewReader(string(f.now))); err != nil || c.Missing != 0 {
			t.Fatalf("seed %d: %+v %v", s, c, err)
		}
	}
}

// TestNotCuts spoils copies in each way they are known to be spoilt.
func TestNotCuts(t *testing.T) {
	for name, spoil := range map[string]func(f *follower, older []byte){
		"a sector of an older copy":    func(f *follower, older []byte) { one(f, older, 1) },
		"half of an older copy":        func(f *follower, older []byte) { copy(f.copy[:size/2], older) },
		"a copy older than the newest": func(f *follower, older []byte) { copy(f.copy, older) },
		"foreign bytes":                func(f *follower, _ []byte) { f.copy[17*Sector+3] ^= 1 },
	} {
		t.Run(name, func(t *testing.T) {
			caught, tried := 0, 0
			for s := range seeds() {
				f := newFollower(t, s)
				for range 60 {
					f.step()
				}
				copy(f.copy, f.now)
				older := append([]byte{}, f.copy...)
				for range 200 {
					f.step()
				}
				copy(f.copy, f.now)
				if _, err := f.h.JudgeCut(strings.NewReader(string(f.copy))); err != nil {
					t.Fatal(err)
				}
				for range 200 {
					f.step()
				}
				copy(f.copy, f.now)
				spoil(f, older)
				tried++
				_, err := f.h.JudgeCut(strings.NewReader(string(f.copy)))
				var w *Wrong
				if errors.As(err, &w) {
					caught++
				} else if err != nil {
					t.Fatal(err)
				}
			}
			if caught != tried {
				t.Errorf("%d of %d were caught", caught, tried)
			}
		})
	}
	t.Run("two moments in one copy", func(t *testing.T) {
		caught := 0
		for s := range seeds() {
			f := newFollower(t, s)
			for range 300 {
				f.step()
			}
			copy(f.copy, f.now)
			for range 100 {
				f.step()
			}
			copy(f.copy[size/16:], f.now[size/16:]) // the writes go to the first 100 KiB
			if _, err := f.h.JudgeCut(strings.NewReader(string(f.copy))); err != nil {
				caught++
			}
		}
		if n := int(seeds()); caught < n-n/10-1 {
			t.Errorf("%d of %d were caught", caught, n)
		}
	})
}

// one takes n sectors that differ from the older copy.
func one(f *follower, older []byte, n int) {
	for s := 0; s < size/Sector && n > 0; s++ {
		a, b := f.copy[s*Sector:][:Sector], older[s*Sector:][:Sector]
		if string(a) != string(b) {
			copy(a, b)
			n--
		}
	}
}
