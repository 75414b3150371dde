package volume

import (
	"bytes"
	"context"
	"testing"
	"time"

	"forerun/block"
	"forerun/data/store"
	"forerun/disk/disktest"
	"forerun/internal/chunk"
)

// TestEvictedChunksAreFetchedAgain: two volumes with the same content share the
// chunks of a store that is too small for them. What was held by the other's
// arrival and evicted since is fetched again, before and after a restart.
func TestEvictedChunksAreFetchedAgain(t *testing.T) {
	ctx := context.Background()
	const cb = chunk.MinSize
	shared := source(3, 24*cb)
	fs := disktest.New(1)
	var st *store.Store
	var vols [2]*Volume
	var remotes [2]*remote
	open := func() {
		t.Helper()
		var err error
		st, err = store.Open(fs, "store", store.Options{LimitBytes: 32 * cb})
		must(t, err)
		for i := range vols {
			v, err := Open(fs, "vol"+string(rune('0'+i)), Options{Name: "v", Size: int64(len(shared)), ChunkBytes: cb,
				SourceID: "disk", Store: st, Tune: Tuning{CommitEvery: time.Hour, AheadMax: -1}})
			must(t, err)
			vols[i], remotes[i] = v, &remote{content: shared, cb: cb, codec: chunk.S2, v: v}
			v.SetRemote(remotes[i])
		}
	}
	closeAll := func() {
		t.Helper()
		for _, v := range vols {
			must(t, v.Close())
		}
		must(t, st.Close())
	}
	read := func(i int) {
		t.Helper()
		got := make([]byte, len(shared))
		for off := 0; off < len(got); off += 8 * cb {
			must(t, vols[i].ReadAt(ctx, got[off:min(off+8*cb, len(got))], int64(off), block.Demand))
		}
		if !bytes.Equal(got, shared) {
			t.Fatalf("volume %d reads other bytes", i)
		}
	}
	press := func(seed uint64) { // what other volumes bring
		t.Helper()
		before := st.Stats().EvictedChunks
		for other := source(seed, 100*cb); len(other) > 0; other = other[cb:] {
			if p := chunk.Seal(nil, other[:cb], chunk.Raw); p.Codec != chunk.Zeros {
				_, err := st.Put(p)
				must(t, err)
			}
		}
		if st.Stats().EvictedChunks == before {
			t.Fatal("there was no pressure")
		}
	}

	open()
	must(t, vols[0].Prefetch(ctx, 0, int64(len(shared)), block.Background))
	must(t, vols[1].Prefetch(ctx, 0, int64(len(shared)), block.Background)) // hits: the store has them
	if n := st.Stats().Duplicates; n == 0 {
		t.Fatal("the volumes share nothing")
	}
	for _, v := range vols {
		must(t, v.Flush(ctx, 0))
		if v.Stats().Untouched != 0 {
			t.Fatalf("%+v", v.Stats())
		}
	}
	press(10)
	read(1)
	if vols[1].Stats().Refetched == 0 {
		t.Fatal("nothing was fetched again")
	}

	// The map says held, and the store has it no more.
	read(0)
	for _, v := range vols {
		must(t, v.Flush(ctx, 0))
	}
	press(11)
	closeAll()
	open()
	defer closeAll()
	if vols[0].Stats().Held == 0 {
		t.Fatal("the volume forgot what it held")
	}
	read(0)
	read(1)
	if vols[0].Stats().Refetched == 0 || len(remotes[0].brought) == 0 {
		t.Fatal("nothing was fetched again after the restart")
	}
	consistent(t, vols[0])
	consistent(t, vols[1])
}
