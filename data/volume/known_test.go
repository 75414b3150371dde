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

// TestChunksInPieces: a chunk that comes as a bundle is served, kept and held by
// its recipe; without a piece it needs it is refused, on a full disk it is
// served all the same, damaged it is not.
func TestChunksInPieces(t *testing.T) {
	content := source(6, 2<<20)
	g := newRig(t, twinFS(6), content, 256<<10)
	cut, err := chunk.NewCutter(256 << 10)
	must(t, err)
	pack := func(buf, p []byte) (chunk.Codec, []byte) { return chunk.Pack(buf, p, chunk.S2) }
	bundle := func(i int, held func(chunk.Sig) bool) chunk.Packed {
		return chunk.BuildBundle(nil, content[i<<18:(i+1)<<18], cut, &chunk.Key{}, pack, held)
	}
	all := func(s chunk.Sig) bool { return s != cut.Sum(&chunk.Key{}, content[1<<18:2<<18]) }
	wantKind(t, g.v.Deliver(1, bundle(1, all)), block.KindNotFound)
	must(t, g.v.Deliver(1, bundle(1, nil)))
	must(t, g.v.Deliver(2, bundle(2, nil)))
	if got := g.read(t, 1<<18, 2<<18); !bytes.Equal(got, content[1<<18:3<<18]) {
		t.Fatal("other bytes")
	}
	bad := bundle(3, nil)
	bad.Data[len(bad.Data)-1] ^= 1
	wantKind(t, g.v.Deliver(3, bad), block.KindCorrupt)

	g.remote.bundles = bundle
	g.store.mu.Lock()
	g.store.full = true
	g.store.mu.Unlock()
	if got := g.read(t, 4<<18, 1<<18); !bytes.Equal(got, content[4<<18:5<<18]) {
		t.Fatal("other bytes from a full disk")
	}
	if st := g.v.Stats(); st.Unknown != 1 || st.Corrupt != 1 || st.Held != 2 || st.Refused == 0 {
		t.Fatalf("%+v", st)
	}
	g.store.mu.Lock()
	g.store.full = false
	g.store.mu.Unlock()
	g.flush(t)
	g.reopen(t)
	g.same(t, content)
	consistent(t, g.v)
}
