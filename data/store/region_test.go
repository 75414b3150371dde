package store

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"sync"
	"testing"

	"forerun/block"
	"forerun/disk/disktest"
	"forerun/internal/chunk"
)

// region is a chunk of a test that is cut by its content.
type region struct {
	sig   chunk.Sig
	plain []byte
}

var cutter = sync.OnceValue(func() *chunk.Cutter {
	c, err := chunk.NewCutter(chunk.MinSize)
	if err != nil {
		panic(err)
	}
	return c
})

// regions are n regions of one text that is shifted a little from each to the
// next, so that neighbours share most of their pieces.
func regions(seed uint64, n int) []region {
	r := rand.New(rand.NewPCG(seed, 8))
	text := make([]byte, chunk.MinSize)
	for i := range text {
		text[i] = byte(r.Uint32()) & 15
	}
	out := make([]region, n)
	for i := range out {
		at := r.IntN(len(text))
		text = append(append(bytes.Clone(text[:at]), byte(i), byte(seed)), text[at:]...)[:chunk.MinSize]
		if i%3 == 2 {
			clear(text[:3*chunk.MinPiece])
		}
		k := chunk.Key{}
		plain := bytes.Clone(text[:len(text)-512*(i%2)])
		out[i] = region{bundle(&k, plain, nil).Sig, plain}
	}
	return out
}

func bundle(k *chunk.Key, plain []byte, held func(chunk.Sig) bool) chunk.Packed {
	return chunk.BuildBundle(nil, plain, cutter(), k, func(buf, p []byte) (chunk.Codec, []byte) { return chunk.Pack(buf, p, chunk.S2) }, held)
}

// piecesOf lists the signatures of a region's pieces.
func piecesOf(t testing.TB, k *chunk.Key, plain []byte) (sigs []chunk.Sig) {
	t.Helper()
	_, pieces, err := chunk.ParseBundle(k, bundle(k, plain, nil), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pieces {
		if p.Codec != chunk.Zeros {
			sigs = append(sigs, p.Sig)
		}
	}
	return sigs
}

// putRegion sends what the store does not hold of a region, and all if it asks for it.
func putRegion(s *Store, x region) error {
	pieceHeld := func(sig chunk.Sig) bool { return sig != x.sig && s.Has(sig) }
	dst := make([]byte, len(x.plain))
	err := s.PutBundle(bundle(&s.opt.Key, x.plain, pieceHeld), dst)
	if block.KindOf(err) == block.KindNotFound {
		err = s.PutBundle(bundle(&s.opt.Key, x.plain, nil), dst)
	}
	switch block.KindOf(err) {
	case block.KindNone, block.KindNoSpace, block.KindIO:
		if !bytes.Equal(dst, x.plain) {
			return fmt.Errorf("WRONG BYTES put together, %v", err)
		}
	}
	return err
}

func getRegion(s *Store, x region) error {
	dst := bytes.Repeat([]byte{0xa5}, len(x.plain))
	err := s.Get(x.sig, dst)
	if err == nil && !bytes.Equal(dst, x.plain) {
		return fmt.Errorf("WRONG BYTES for %s", x.sig)
	}
	return err
}

func TestRegion(t *testing.T) {
	for _, key := range []chunk.Key{{}, testKey()} {
		fs := disktest.New(1)
		o := tiny()
		o.Key = key
		s := mustOpen(t, fs, o)
		xs := regions(1, 12)
		sent := 0
		for i := range xs {
			x := &xs[i]
			p := bundle(&key, x.plain, s.Has)
			x.sig = p.Sig
			sent += len(p.Data)
			wantKind(t, getRegion(s, *x), block.KindNotFound)
			dst := make([]byte, len(x.plain))
			if err := s.PutBundle(p, dst); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(dst, x.plain) {
				t.Fatal("other bytes were put together")
			}
			if err := getRegion(s, *x); err != nil || !s.Has(x.sig) {
				t.Fatal(err)
			}
			if err := s.PutBundle(bundle(&key, x.plain, nil), dst); err != nil {
				t.Fatal(err)
			}
			if got, err := s.GetPacked(x.sig, nil); err != nil || got.Codec != chunk.Recipe || got.Plain != len(x.plain) {
				t.Fatalf("%+v %v", got, err)
			} else if _, err := chunk.ParseRecipe(&key, got, nil); err != nil {
				t.Fatal(err)
			}
			wantKind(t, s.Get(x.sig, dst[:100]), block.KindInvalid)
		}
		if sent > 6*chunk.MinSize {
			t.Errorf("%d bytes were sent for 12 regions of 16 KiB that hardly differ", sent)
		}
		if st := s.Stats(); st.PlainBytes > 8*chunk.MinSize {
			t.Errorf("plain bytes are counted more than once: %+v", st)
		}
		for range 2 { // also after a restart, with the map in runs
			for _, x := range xs {
				if err := getRegion(s, x); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = mustOpen(t, fs, o)
		}
		s.Close()
	}
}

func TestBundleIsRefused(t *testing.T) {
	s := mustOpen(t, disktest.New(1), tiny())
	defer s.Close()
	x := regions(2, 1)[0]
	dst := make([]byte, len(x.plain))
	full := bundle(&chunk.Key{}, x.plain, nil)
	if _, err := s.Put(full); block.KindOf(err) != block.KindInvalid {
		t.Fatal(err)
	}
	wantKind(t, s.PutBundle(samples()[0].Packed, dst), block.KindInvalid)
	wantKind(t, s.PutBundle(full, dst[:100]), block.KindInvalid)
	k := testKey()
	wantKind(t, s.PutBundle(bundle(&k, x.plain, nil), dst), block.KindCorrupt)
	// A piece that is believed to be here and is not: nothing is kept.
	n := 0
	wantKind(t, s.PutBundle(bundle(&chunk.Key{}, x.plain, func(chunk.Sig) bool { n++; return n == 4 }), dst), block.KindNotFound)
	for at := 0; at < len(full.Data); at += 5 {
		bad := full
		bad.Data = bytes.Clone(full.Data)
		bad.Data[at] ^= 0x10
		err := s.PutBundle(bad, dst)
		if k := block.KindOf(err); k != block.KindCorrupt && k != block.KindNotFound && (err != nil || !bytes.Equal(dst, x.plain)) {
			t.Fatalf("byte %d: %v", at, err)
		}
	}
	if s.Has(x.sig) != (getRegion(s, x) == nil) {
		t.Fatal("Has and Get do not agree")
	}
	if err := s.PutBundle(full, dst); err != nil {
		t.Fatal(err)
	}
	if err := getRegion(s, x); err != nil {
		t.Fatal(err)
	}
}

// TestRegionLosesPiece: a region without one of its pieces is not held, and can
// be put again.
func TestRegionLosesPiece(t *testing.T) {
	for _, how := range []string{"deleted", "damaged", "recipe damaged"} {
		for _, ask := range []string{"Get", "Has"} {
			fs := disktest.New(1)
			var mu sync.Mutex
			gone := map[chunk.Sig]bool{}
			o := Options{inline: true, OnGone: func(sigs []chunk.Sig) {
				mu.Lock()
				defer mu.Unlock()
				for _, sig := range sigs {
					gone[sig] = true
				}
			}}
			s := mustOpen(t, fs, o)
			x := regions(3, 1)[0]
			if err := putRegion(s, x); err != nil {
				t.Fatal(err)
			}
			piece := piecesOf(t, &chunk.Key{}, x.plain)[2]
			if how == "deleted" {
				if err := s.Delete(piece); err != nil {
					t.Fatal(err)
				}
			} else {
				hit := piece
				if how == "recipe damaged" {
					hit = x.sig
				}
				at, err := s.lookup(&hit)
				if err != nil {
					t.Fatal(err)
				}
				fs.Flip("/s/packs/"+packName(at.Pack), at.At()+recordHeader+40)
			}
			switch {
			case ask == "Get":
				want := block.KindCorrupt
				if how == "deleted" {
					want = block.KindNotFound
				}
				wantKind(t, getRegion(s, x), want)
			case how == "damaged":
				if !s.Has(x.sig) {
					t.Fatal("Has reads no pieces, yet it knows of the damage")
				}
				wantKind(t, getRegion(s, x), block.KindCorrupt)
			case s.Has(x.sig):
				t.Fatalf("%s: the region is held", how)
			}
			wantKind(t, getRegion(s, x), block.KindNotFound)
			if s.Has(x.sig) {
				t.Fatal("held again")
			}
			if err := putRegion(s, x); err != nil {
				t.Fatal(err)
			}
			if err := getRegion(s, x); err != nil || !s.Has(x.sig) {
				t.Fatal(err)
			}
			s.Close()
			if !gone[x.sig] || gone[piece] != (how != "recipe damaged") {
				t.Errorf("%s, %s: told that these are gone: %v", how, ask, gone)
			}
		}
	}
}

// TestSweepKeepsPieces: pieces live as long as a region that needs them.
func TestSweepKeepsPieces(t *testing.T) {
	fs := disktest.New(1)
	s := mustOpen(t, fs, tiny())
	xs := regions(4, 10)
	for _, x := range xs {
		if err := putRegion(s, x); err != nil {
			t.Fatal(err)
		}
	}
	for n := len(xs); n >= 0; n -= 2 {
		live, needed := map[chunk.Sig]bool{}, map[chunk.Sig]bool{}
		for _, x := range xs[:n] {
			live[x.sig] = true
			for _, sig := range piecesOf(t, &chunk.Key{}, x.plain) {
				needed[sig] = true
			}
		}
		s.opt.SweepBelow = 1 // all that is dead goes
		if _, err := s.Sweep(func(sig chunk.Sig) bool { return live[sig] }); err != nil {
			t.Fatal(err)
		}
		for _, x := range xs[:n] {
			if err := getRegion(s, x); err != nil {
				t.Fatalf("%d live: %v", n, err)
			}
		}
		maps.Copy(needed, live)
		held := 0
		if err := s.Each(func(chunk.Sig) bool { held++; return true }); err != nil {
			t.Fatal(err)
		}
		if held != len(needed) {
			t.Fatalf("%d live: %d chunks are held of %d that are needed", n, held, len(needed))
		}
	}
	s.Close()
}

// TestRegionDuringSweep: what a region needs that is put or confirmed while a
// sweep runs stays, though nobody else needs it.
func TestRegionDuringSweep(t *testing.T) {
	for at := 1; at < 60; at += 3 {
		o := tiny()
		o.inline = false // what Put leaves to the keeper waits for the sweep
		s := mustOpen(t, disktest.New(1), o)
		xs := regions(5, 6)
		for _, x := range xs[:5] {
			if err := putRegion(s, x); err != nil {
				t.Fatal(err)
			}
		}
		n := 0
		if _, err := s.Sweep(func(chunk.Sig) bool {
			if n++; n == at {
				if !s.Has(xs[0].sig) {
					t.Error("gone before its time")
				}
				if err := putRegion(s, xs[5]); err != nil {
					t.Error(err)
				}
			}
			return false
		}); err != nil {
			t.Fatal(err)
		}
		if n < at {
			s.Close()
			break
		}
		for _, i := range []int{0, 5} {
			if err := getRegion(s, xs[i]); err != nil {
				t.Errorf("asked %d times: region %d: %v", at, i, err)
			}
		}
		s.Close()
	}
}

// regionStory is a life with regions: puts, a sync, a sweep, eviction if there
// is a limit.
func regionStory(t *testing.T, fs *disktest.FS, o Options, xs []region, durable map[int]bool, failing bool) *Store {
	t.Helper()
	fail := func(what string, err error) bool {
		if err != nil && (!failing || block.KindOf(err) != block.KindNoSpace && block.KindOf(err) != block.KindIO) {
			t.Fatalf("%s: %v", what, err)
		}
		return err != nil
	}
	s, err := Open(fs, "/s", o)
	for try := 0; fail("open", err); try++ {
		if try == 2 {
			fs.Fail(disktest.Fault{})
		}
		s, err = Open(fs, "/s", o)
	}
	there := map[int]bool{}
	puts := func(from, to int) {
		for i := from; i < to; i++ {
			if !fail("put", putRegion(s, xs[i])) {
				there[i] = true
			}
		}
	}
	sync := func() {
		if !fail("sync", s.Sync()) && o.LimitBytes == 0 {
			maps.Copy(durable, there)
		}
	}
	puts(0, 2)
	sync()
	puts(2, 4)
	for _, i := range []int{0, 3} {
		delete(there, i)
		delete(durable, i)
	}
	live := map[chunk.Sig]bool{}
	for i := range there {
		live[xs[i].sig] = true
	}
	_, err = s.Sweep(func(sig chunk.Sig) bool { return live[sig] })
	fail("sweep", err)
	puts(4, 6)
	sync()
	return s
}

func regionOptions(limit int64) Options {
	return Options{PackBytes: 8 << 10, CheckpointBytes: 12 << 10, MapEntries: 24, OpenPacks: 2, LimitBytes: limit, inline: true}
}

// TestRegionPowerCutAnywhere cuts the power before every call: what was synced
// is there, and whatever is there is right and whole.
func TestRegionPowerCutAnywhere(t *testing.T) {
	t.Parallel()
	images := uint64(3)
	if testing.Short() || raceEnabled {
		images = 1
	}
	xs := regions(6, 6)
	for _, limit := range []int64{0, 32 << 10} {
		fs := disktest.New(21)
		durable := map[int]bool{}
		fs.OnCall(func(n int64, op disktest.Op) {
			for k := range images {
				img := fs.Image(uint64(n)*10 + k)
				s := mustOpen(t, img, regionOptions(limit))
				for i, x := range xs {
					has := s.Has(x.sig)
					err := getRegion(s, x)
					if has != (err == nil) || err != nil && block.KindOf(err) != block.KindNotFound || err != nil && durable[i] {
						t.Fatalf("limit %d, power cut %d (%v), image %d: region %d, durable %v: Has says %v, Get %v", limit, n, op, k, i, durable[i], has, err)
					}
				}
				for i, x := range xs[:3] {
					if err := putRegion(s, x); err != nil {
						t.Fatal(err)
					}
					// So small a bound can take a piece while the region is put.
					if err := getRegion(s, x); err != nil && (limit == 0 || block.KindOf(err) != block.KindNotFound) {
						t.Fatalf("limit %d, power cut %d: region %d, put again: %v", limit, n, i, err)
					}
				}
				img.Kill()
				abandon(s)
			}
		})
		s := regionStory(t, fs, regionOptions(limit), xs, durable, false)
		fs.OnCall(nil)
		if fs.Calls() < 60 || limit == 0 && len(durable) != 4 || limit > 0 && s.Stats().EvictedChunks == 0 {
			t.Fatalf("%d calls, durable %v, %+v", fs.Calls(), durable, s.Stats())
		}
		s.Close()
	}
}

// TestRegionEveryCallFails fails each call with each error: no wrong byte, and
// the store goes on when the fault has gone.
func TestRegionEveryCallFails(t *testing.T) {
	t.Parallel()
	xs := regions(7, 6)
	step := int64(1)
	if testing.Short() || raceEnabled {
		step = 7
	}
	for _, limit := range []int64{0, 32 << 10} {
		fs := disktest.New(22)
		regionStory(t, fs, regionOptions(limit), xs, map[int]bool{}, false).Close()
		calls := fs.Calls()
		for n := int64(1); n <= calls; n += step {
			for _, err := range []error{enospc, eio} {
				fs := disktest.New(uint64(n))
				fs.Fail(disktest.Fault{At: n, Err: err, Lasting: n%2 == 0})
				s := regionStory(t, fs, regionOptions(limit), xs, map[int]bool{}, true)
				fs.Fail(disktest.Fault{})
				for i, x := range xs {
					if err := putRegion(s, x); err != nil {
						t.Fatalf("limit %d, call %d: put after the fault: region %d: %v", limit, n, i, err)
					}
					if err := getRegion(s, x); err != nil && (limit == 0 || block.KindOf(err) != block.KindNotFound) {
						t.Fatalf("limit %d, call %d: region %d: %v", limit, n, i, err)
					}
				}
				if err := s.Sync(); err != nil {
					t.Fatal(err)
				}
				s.Close()
			}
		}
	}
}

// FuzzPutBundle: whatever comes, the store holds right bytes or none.
func FuzzPutBundle(f *testing.F) {
	x := regions(8, 1)[0]
	f.Add(bundle(&chunk.Key{}, x.plain, nil).Data, uint16(0))
	f.Add(bundle(&chunk.Key{}, x.plain, func(s chunk.Sig) bool { return s[0]&1 == 0 }).Data, uint16(0))
	f.Fuzz(func(t *testing.T, data []byte, flip uint16) {
		s := mustOpen(t, disktest.New(1), Options{inline: true})
		defer s.Close()
		p := chunk.Packed{Sig: x.sig, Codec: chunk.Bundle, Plain: len(x.plain), Data: bytes.Clone(data)}
		if len(data) > 0 {
			p.Data[int(flip)%len(data)] ^= byte(flip >> 8)
		}
		dst := make([]byte, p.Plain)
		err := s.PutBundle(p, dst)
		if err == nil && !bytes.Equal(dst, x.plain) {
			t.Fatal("wrong bytes were accepted")
		}
		if held := getRegion(s, x) == nil; held != (err == nil) {
			t.Fatalf("put: %v, held: %v", err, held)
		}
	})
}

func BenchmarkPutBundle(b *testing.B) {
	s := benchStore(b)
	x := regions(9, 1)[0]
	full := bundle(&chunk.Key{}, x.plain, nil)
	dst := make([]byte, len(x.plain))
	b.SetBytes(int64(len(dst)))
	b.ReportAllocs()
	for b.Loop() {
		if err := s.PutBundle(full, dst); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkGetRegion(b *testing.B) {
	s := benchStore(b)
	x := regions(9, 1)[0]
	if err := putRegion(s, x); err != nil {
		b.Fatal(err)
	}
	dst := make([]byte, len(x.plain))
	b.Run("Get", func(b *testing.B) {
		b.SetBytes(int64(len(dst)))
		b.ReportAllocs()
		for b.Loop() {
			if err := s.Get(x.sig, dst); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("Has", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if !s.Has(x.sig) {
				b.Fatal("not held")
			}
		}
	})
}
