package volume

import (
	"bytes"
	"context"
	"testing"

	"forerun/block"
	"forerun/internal/chunk"
)

// TestHeldByContent: what the store has from elsewhere is held as soon as the
// source says so, asked or unasked, and read without the source; what it does
// not have is asked for with its bytes. Writes stay on top of all of it.
func TestHeldByContent(t *testing.T) {
	content := source(5, 4<<20)
	for i := 0; i < len(content); i += cb {
		content[i] |= 1 // no chunk is zeros
	}
	clear(content[10*cb : 12*cb])
	g := newRig(t, twinFS(5), content, cb)
	sig := func(i int) chunk.Sig { return chunk.Sum(content[i*cb : (i+1)*cb]) }
	for i := range 32 {
		if i < 10 || i >= 12 {
			if _, err := g.store.Put(chunk.Seal(nil, content[i*cb:(i+1)*cb], chunk.S2)); err != nil {
				t.Fatal(err)
			}
		}
	}
	want := bytes.Clone(content)
	p := bytes.Repeat([]byte{9}, 4096)
	g.write(t, 3*cb+8192, p)
	copy(want[3*cb+8192:], p)

	g.remote.down.Store(true)
	for i := range 8 {
		g.v.Same(int64(i), sig(i))
	}
	g.v.Same(40, sig(40)) // the store does not have it
	g.v.Same(64, sig(0))  // there is no such chunk
	g.v.Zeros(10, 2)
	g.v.Zeros(63, 2) // nor such a run
	if st := g.v.Stats(); st.Held != 7 || st.Zero != 2 || st.Modified != 1 || st.PartlyAbsent != 0 || st.Adopted != 8 {
		t.Fatalf("%+v", st)
	}
	if got := g.read(t, 0, 8*cb); !bytes.Equal(got, want[:8*cb]) {
		t.Fatal("other bytes")
	}
	if got := g.read(t, 10*cb, 2*cb); !bytes.Equal(got, want[10*cb:12*cb]) {
		t.Fatal("zeros are not zeros")
	}
	err := g.v.ReadAt(context.Background(), make([]byte, cb), 40*cb, 0)
	wantKind(t, err, block.KindUnavailable)

	// Asked for, answered by signature: 20 is there, 50 is not.
	g.remote.down.Store(false)
	g.remote.bySig.Store(true)
	for _, i := range []int{20, 50} {
		if got := g.read(t, int64(i*cb), cb); !bytes.Equal(got, want[i*cb:(i+1)*cb]) {
			t.Fatalf("chunk %d has other bytes", i)
		}
	}
	if st := g.v.Stats(); st.Unknown != 1 || st.Adopted != 9 {
		t.Fatalf("%+v", st)
	}
	must(t, g.v.Fetch(context.Background(), []int64{21, 22, 51}, block.Background))
	g.flush(t)
	g.reopen(t)
	g.same(t, want)
	consistent(t, g.v)

	// A signature that the store lost since is no loss.
	g.remote.bySig.Store(false)
	g.store.mu.Lock()
	clear(g.store.all)
	g.store.mu.Unlock()
	g.v.opt.Tier.Drop(2)
	g.same(t, want)
}
