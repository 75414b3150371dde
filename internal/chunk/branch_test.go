package chunk

import (
	"bytes"
	"testing"
)

func TestBranches(t *testing.T) {
	// The same function called from two places.
	p := []byte{0xe8, 0x10, 0, 0, 0, 0x90, 0xe8, 0x0a, 0, 0, 0, 0x90, 0x48, 0x8b, 0x05, 1, 0, 0, 0, 0x90}
	q := bytes.Clone(p)
	if n := branches(q, true); n != 3 {
		t.Fatalf("%d references were found", n)
	}
	if !bytes.Equal(q[1:5], q[7:11]) {
		t.Errorf("two calls of one function are %x and %x", q[1:5], q[7:11])
	}
	branches(q, false)
	if !bytes.Equal(p, q) {
		t.Errorf("%x became %x", p, q)
	}
}

func FuzzBranches(f *testing.F) {
	f.Add([]byte{0xe8, 0xe8, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0})
	f.Add([]byte{0x0f, 0x84, 0xe9, 0, 0, 0, 0x8d, 0x05, 0xff, 0xff, 0xff, 0x00, 0xe8})
	f.Fuzz(func(t *testing.T, p []byte) {
		p = p[:min(len(p), MaxSize)]
		q := bytes.Clone(p)
		n := branches(q, true)
		if m := branches(q, false); m != n || !bytes.Equal(p, q) {
			t.Fatalf("%d references there, %d back: %x became %x", n, m, p, q)
		}
		if m, k := branches(q, false), branches(q, true); m != k || !bytes.Equal(p, q) {
			t.Fatalf("%d references there, %d back: %x became %x", m, k, p, q)
		}
	})
}
