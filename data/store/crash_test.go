package store

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"forerun/block"
	"forerun/disk"
	"forerun/disk/disktest"
	"forerun/internal/chunk"
)

// story is a life of a store: puts, syncs, deletions, sweeps, a clean restart.
// It notes what must be there after a power cut at any moment, and goes on
// after errors.
type story struct {
	t       *testing.T
	fs      *disktest.FS
	o       Options
	s       *Store
	put     map[int]bool // acknowledged and not deleted
	durable map[int]bool // acknowledged by Sync
	failing bool         // errors are expected
}

func newStory(t *testing.T, fs *disktest.FS, failing bool) *story {
	return &story{t: t, fs: fs, o: tiny(), put: map[int]bool{}, durable: map[int]bool{}, failing: failing}
}

func (st *story) fail(op string, err error) bool {
	st.t.Helper()
	if err == nil {
		return false
	}
	if !st.failing {
		st.t.Fatalf("%s: %v", op, err)
	}
	if k := block.KindOf(err); k != block.KindNoSpace && k != block.KindIO {
		st.t.Fatalf("%s: kind %v: %v", op, k, err)
	}
	return true
}

func (st *story) open() {
	for range 3 {
		s, err := Open(st.fs, "/s", st.o)
		if !st.fail("open", err) {
			st.s = s
			return
		}
	}
	st.fs.Fail(disktest.Fault{})
	st.s = mustOpen(st.t, st.fs, st.o)
}

func (st *story) puts(from, to int) {
	for i := from; i < to; i++ {
		x := samples()[i]
		added, err := st.s.Put(x.Packed)
		if !st.fail("put", err) {
			if !added && !st.put[i] && !st.failing && i >= 40 { // the sweep may leave dead ones below

				st.t.Fatalf("chunk %d was not there and not added", i)
			}
			st.put[i] = true
		}
	}
}

func (st *story) sync() {
	if !st.fail("sync", st.s.Sync()) {
		for i := range st.put {
			st.durable[i] = true
		}
	}
}

func (st *story) remove(i int) {
	delete(st.put, i)
	delete(st.durable, i)
}

func (st *story) run() {
	st.open()
	st.puts(0, 12)
	st.sync()
	st.puts(12, 40)
	for i := 3; i < 9; i++ {
		st.remove(i)
		if err := st.s.Delete(samples()[i].Sig); block.KindOf(err) != block.KindNotFound {
			st.fail("delete", err)
		}
	}
	st.sync()
	st.puts(40, 60)
	for i := range 40 {
		if i%4 != 0 {
			st.remove(i)
		}
	}
	live := map[chunk.Sig]bool{}
	for i := range st.put {
		live[samples()[i].Sig] = true
	}
	_, err := st.s.Sweep(func(sig chunk.Sig) bool { return live[sig] })
	st.fail("sweep", err)
	st.puts(30, 45)
	st.sync()
	if !st.fail("close", st.s.Close()) {
		for i := range st.put {
			st.durable[i] = true
		}
	}
	st.open()
	st.puts(60, 90)
	st.sync()
	st.puts(90, 100)
}

// verify opens an image. What is in must is there; whatever is there is right;
// and the store can be filled and goes through another power cut.
func verify(t *testing.T, fs *disktest.FS, must map[int]bool, deep bool, what string) {
	t.Helper()
	s, err := Open(fs, "/s", tiny())
	if err != nil {
		t.Fatalf("%s: open: %v", what, err)
	}
	chunks := int64(0)
	for i, x := range samples()[:100] {
		switch err := check(s, x); {
		case err == nil:
			chunks++
		case block.KindOf(err) != block.KindNotFound:
			t.Fatalf("%s: chunk %d: %v", what, i, err)
		case must[i]:
			t.Fatalf("%s: chunk %d was durable and is lost", what, i)
		}
	}
	if st := s.Stats(); st.Chunks != chunks || st.DiskBytes < st.StoredBytes {
		t.Fatalf("%s: %d chunks are there: %+v", what, chunks, st)
	}
	if !deep {
		fs.Kill()
		abandon(s)
		return
	}
	for _, x := range samples()[:100] {
		if _, err := s.Put(x.Packed); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	if err := s.Sync(); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	fs = fs.Crash()
	abandon(s)
	s = mustOpen(t, fs, tiny())
	for i, x := range samples()[:100] {
		if err := check(s, x); err != nil {
			t.Fatalf("%s: chunk %d after a second power cut: %v", what, i, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// TestPowerCutAnywhere cuts the power before every call that changes something,
// with several outcomes each.
func TestPowerCutAnywhere(t *testing.T) {
	t.Parallel()
	images := uint64(3)
	if testing.Short() || raceEnabled {
		images = 1
	}
	fs := disktest.New(11)
	st := newStory(t, fs, false)
	fs.OnCall(func(n int64, op disktest.Op) {
		for k := range images {
			verify(t, fs.Image(uint64(n)*10+k), st.durable, (n+int64(k))%5 == 0, fmt.Sprintf("power cut %d (%v), image %d", n, op, k))
		}
	})
	st.run()
	fs.OnCall(nil)
	if n := fs.Calls(); n < 200 {
		t.Fatalf("only %d calls", n)
	}
}

// TestEveryCallFails fails each call once, with each error, and all calls from
// every third one on.
// Nothing acknowledged is lost while the store runs; when the fault has gone
// it goes on without being opened again, and what it then syncs is durable.
func TestEveryCallFails(t *testing.T) {
	t.Parallel()
	fs := disktest.New(12)
	newStory(t, fs, false).run()
	calls := fs.Calls()
	step := int64(1)
	if testing.Short() || raceEnabled {
		step = 5
	}
	for _, err := range []error{enospc, eio} {
		for _, lasting := range []bool{false, true} {
			step := step
			if lasting {
				step = 3
			}
			for n := int64(1); n <= calls; n += step {
				what := fmt.Sprintf("call %d fails with %v, lasting %v", n, err, lasting)
				fs := disktest.New(uint64(n))
				st := newStory(t, fs, true)
				fs.Fail(disktest.Fault{At: n, Err: err, Lasting: lasting})
				st.run()
				for i := range st.put {
					if err := check(st.s, samples()[i]); err != nil {
						t.Fatalf("%s: chunk %d: %v", what, i, err)
					}
				}
				if n%7 == 0 { // power cut while it fails
					verify(t, fs.Image(uint64(n)), st.durable, false, what+", power cut")
				}
				fs.Fail(disktest.Fault{})
				for i, x := range samples()[:100] {
					if _, err := st.s.Put(x.Packed); err != nil {
						t.Fatalf("%s: put after the fault: chunk %d: %v", what, i, err)
					}
				}
				if err := st.s.Sync(); err != nil {
					t.Fatalf("%s: sync after the fault: %v", what, err)
				}
				all := map[int]bool{}
				for i := range 100 {
					all[i] = true
				}
				fs = fs.Crash()
				abandon(st.s)
				verify(t, fs, all, false, what+", synced, power cut")
			}
		}
	}
}

// TestReadErrors fails each read: the chunk is dropped or the call fails, and
// no wrong byte comes.
func TestReadErrors(t *testing.T) {
	for n := int64(1); n < 160; n++ {
		fs := disktest.New(1)
		s := mustOpen(t, fs, tiny())
		for _, x := range samples()[:60] {
			mustPut(t, s, x, true)
		}
		fs.Fail(disktest.Fault{At: n, Ops: disktest.OpRead, Err: eio})
		lost := 0
		for _, x := range samples()[:60] {
			err := check(s, x)
			if err != nil && block.KindOf(err) != block.KindCorrupt {
				t.Fatalf("read %d: %v", n, err)
			}
			if err != nil {
				lost++
				if _, err := s.Put(x.Packed); err != nil {
					t.Fatal(err)
				}
				mustGet(t, s, x)
			}
		}
		if lost > 1 {
			t.Fatalf("read %d: %d chunks failed for one error", n, lost)
		}
		s.keep()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestFailedSyncIsNotPretended: after a failed fdatasync the kernel calls the
// pages clean, so a second one that succeeds proves nothing.
func TestFailedSyncIsNotPretended(t *testing.T) {
	for _, op := range []disktest.Op{disktest.OpSync, disktest.OpSyncDir} {
		for _, how := range []string{"same process", "killed between"} {
			for seed := range uint64(10) {
				fs := disktest.New(seed)
				o := Options{inline: true}
				s := mustOpen(t, fs, o)
				mustPut(t, s, samples()[50], true)
				if err := s.Sync(); err != nil {
					t.Fatal(err)
				}
				if op == disktest.OpSyncDir { // a new pack, for its name to fail
					s.appendMu.Lock()
					s.retire(s.active)
					s.appendMu.Unlock()
				}
				for _, x := range samples()[:20] {
					mustPut(t, s, x, true)
				}
				fs.Fail(disktest.Fault{At: 1, Ops: op, Err: eio})
				wantKind(t, s.Sync(), block.KindIO)
				for _, x := range samples()[:20] {
					mustGet(t, s, x)
				}
				if how == "killed between" {
					fs = fs.Kill()
					abandon(s)
					s = mustOpen(t, fs, o)
				}
				for _, x := range samples()[:20] {
					mustPut(t, s, x, false)
				}
				if err := s.Sync(); err != nil {
					t.Fatal(err)
				}
				if st := s.Stats(); st.Chunks != 21 || st.DiskBytes > st.StoredBytes+int64(st.Packs*packHeader) {
					t.Fatalf("what was suspect was not cut off: %+v", st)
				}
				fs = fs.Crash()
				abandon(s)
				s = mustOpen(t, fs, o)
				for i, x := range samples()[:20] {
					if err := check(s, x); err != nil {
						t.Fatalf("%v, %s, seed %d: chunk %d: %v", op, how, seed, i, err)
					}
				}
				mustGet(t, s, samples()[50])
				s.Close()
			}
		}
	}
}

// TestFullDisk fills a small disk until Put fails, then makes space.
func TestFullDisk(t *testing.T) {
	for seed := range uint64(10) {
		fs := disktest.New(seed)
		fs.SetCapacity(180 << 10)
		s := mustOpen(t, fs, tiny())
		var in []sample
		full := 0
		for _, x := range samples() {
			added, err := s.Put(x.Packed)
			if err != nil {
				wantKind(t, err, block.KindNoSpace)
				full++
			} else if added {
				in = append(in, x)
			}
			if full == 30 {
				break
			}
		}
		if full != 30 {
			t.Fatal("the disk was never full")
		}
		for _, x := range in {
			mustGet(t, s, x)
		}
		if err := s.Sync(); err != nil {
			wantKind(t, err, block.KindNoSpace)
		}
		// A sweep helps on a full disk.
		live := map[chunk.Sig]bool{}
		for i, x := range in {
			live[x.Sig] = i > len(in)*2/3
		}
		if freed, err := s.Sweep(func(sig chunk.Sig) bool { return live[sig] }); freed <= 0 {
			t.Fatalf("seed %d: a sweep on a full disk freed %d: %v", seed, freed, err)
		}
		fs.SetCapacity(2 << 20)
		for _, x := range samples() {
			if _, err := s.Put(x.Packed); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Sync(); err != nil {
			t.Fatal(err)
		}
		fs = fs.Crash()
		abandon(s)
		s = mustOpen(t, fs, tiny())
		for _, x := range samples() {
			mustGet(t, s, x)
		}
		s.Close()
	}
}

// TestOpenOnFullDisk: a store can be opened and read when nothing can be written.
func TestOpenOnFullDisk(t *testing.T) {
	fs := disktest.New(1)
	s := mustOpen(t, fs, tiny())
	for _, x := range samples()[:50] {
		mustPut(t, s, x, true)
	}
	fs = fs.Kill()
	abandon(s)
	fs.SetCapacity(4096)
	s = mustOpen(t, fs, tiny())
	for _, x := range samples()[:50] {
		mustGet(t, s, x)
	}
	wantKind(t, s.Close(), block.KindNoSpace)
	fs.SetCapacity(0)
	s = mustOpen(t, fs, tiny())
	defer s.Close()
	for _, x := range samples()[:50] {
		mustGet(t, s, x)
	}
}

// readAll reads a file of the twin.
func readAll(t testing.TB, fs disk.FS, path string) []byte {
	t.Helper()
	f, err := fs.Open(path, disk.Read)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, st.Size)
	if n, err := f.ReadAt(b, 0); n < len(b) {
		t.Fatal(err)
	}
	return b
}

func writeAll(t testing.TB, fs disk.FS, path string, b []byte) {
	t.Helper()
	if i := strings.LastIndex(path, "/"); i > 0 {
		if err := fs.MkdirAll(path[:i]); err != nil {
			t.Fatal(err)
		}
	}
	f, err := fs.Open(path, disk.Write|disk.Create|disk.Trunc)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
}

// closedStore returns the files of a small store.
func closedStore(t testing.TB, n int, o Options) (files map[string][]byte) {
	fs := disktest.New(1)
	s := mustOpen(t, fs, o)
	for i := range n {
		if _, err := s.Put(small(i).Packed); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	files = map[string][]byte{}
	for _, d := range []string{"/s/packs", "/s/map"} {
		names, err := fs.List(d)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			files[d+"/"+n] = readAll(t, fs, d+"/"+n)
		}
	}
	return files
}

func small(i int) sample {
	plain := bytes.Repeat([]byte{byte(i + 1), 2, 3, 4, byte(i)}, 20+i)
	p := chunk.Seal(nil, plain, []chunk.Codec{chunk.Raw, chunk.Zstd, chunk.S2}[i%3])
	p.Data = bytes.Clone(p.Data)
	return sample{p, plain}
}

// TestEveryBitFlipped flips each bit of a pack and of the map, with the map
// and without it. A flip in a payload costs that chunk, one anywhere else
// nothing but the work to find it (but see alone).
func TestEveryBitFlipped(t *testing.T) {
	t.Parallel()
	files := closedStore(t, 6, Options{inline: true})
	step := 1
	if testing.Short() || raceEnabled {
		step = 9
	}
	for name, content := range files {
		for _, withMap := range []bool{true, false} {
			if !withMap && !strings.Contains(name, "/packs/") {
				continue
			}
			for i := 0; i < len(content); i += step {
				if strings.HasSuffix(name, ".run") && i > 500 && i < 4090 && i%31 != 0 {
					continue // an empty part of the page, as all of it under one checksum
				}
				bit := 8*i + i%8
				fs := disktest.New(1)
				for n, b := range files {
					if n == name {
						b = bytes.Clone(b)
						b[bit/8] ^= 1 << (bit % 8)
					}
					if withMap || strings.Contains(n, "/packs/") {
						writeAll(t, fs, n, b)
					}
				}
				flipped(t, fs, fmt.Sprintf("%s bit %d, map %v", name, bit, withMap), strings.Contains(name, "/packs/"), !withMap && i < packHeader)
			}
		}
	}
}

func flipped(t *testing.T, fs *disktest.FS, what string, pack, alone bool) {
	s, err := Open(fs, "/s", Options{inline: true})
	if err != nil {
		if block.KindOf(err) != block.KindUnsupported {
			t.Fatalf("%s: open: %v", what, err)
		}
		return
	}
	lost := 0
	for i := range 6 {
		x := small(i)
		if err := check(s, x); err != nil {
			if k := block.KindOf(err); k != block.KindNotFound && k != block.KindCorrupt {
				t.Fatalf("%s: chunk %d: %v", what, i, err)
			}
			lost++
		}
	}
	switch {
	case alone:
		// With the map lost and the header of the only pack damaged, nothing is left
		// that tells the store's id, without which records are not known.
	case pack && lost > 1:
		t.Fatalf("%s: %d chunks are lost", what, lost)
	case !pack:
		s.keep() // a damaged page is repaired
		for i := range 6 {
			if err := check(s, small(i)); err != nil {
				t.Fatalf("%s: chunk %d after repair: %v", what, i, err)
			}
		}
	}
	for i := range 6 {
		if _, err := s.Put(small(i).Packed); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if err := check(s, small(i)); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatalf("%s: close: %v", what, err)
	}
}

// TestRebuild loses the map in several ways.
func TestRebuild(t *testing.T) {
	for _, lose := range []string{"everything", "MAP", "runs", "half way"} {
		t.Run(lose, func(t *testing.T) {
			fs := disktest.New(1)
			o := tiny()
			s := mustOpen(t, fs, o)
			for _, x := range samples()[:300] {
				mustPut(t, s, x, true)
			}
			if err := s.Delete(samples()[299].Sig); err != nil {
				t.Fatal(err)
			}
			before := s.Stats()
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			names, err := fs.List("/s/map")
			if err != nil {
				t.Fatal(err)
			}
			for _, n := range names {
				if lose == "everything" || lose == "half way" || (lose == "MAP") == (n == manifestName) {
					if err := fs.Remove("/s/map/" + n); err != nil {
						t.Fatal(err)
					}
				}
			}
			if lose == "half way" {
				// The rebuild itself fails after some checkpoints, then the power.
				for n := int64(5); n < 200; n += 13 {
					fs.Fail(disktest.Fault{At: n, Err: eio, Lasting: true})
					if s, err := Open(fs, "/s", o); err == nil {
						abandon(s)
						s.closeFiles()
					}
					fs.Fail(disktest.Fault{})
					fs = fs.Crash()
				}
			}
			s = mustOpen(t, fs, o)
			defer s.Close()
			for i, x := range samples()[:299] {
				if err := check(s, x); err != nil {
					t.Fatalf("chunk %d: %v", i, err)
				}
			}
			if st := s.Stats(); st.Chunks < before.Chunks || st.Chunks > before.Chunks+1 {
				t.Fatalf("%+v became %+v", before, st)
			}
			mustPut(t, s, samples()[300], true)
		})
	}
}

// TestRepairWhileOpen damages pages of the map under a running store.
func TestRepairWhileOpen(t *testing.T) {
	fs := disktest.New(1)
	s := mustOpen(t, fs, tiny())
	defer s.Close()
	for i := range uint64(1000) {
		mustPut(t, s, makeTiny(i), true)
	}
	for _, r := range s.ver.runs {
		for p := int64(0); p*4096 < r.Size()-4096; p += 3 {
			fs.Flip(r.Path(), p*4096+100)
		}
	}
	hidden := 0
	for i := range uint64(1000) {
		if err := check(s, makeTiny(i)); err != nil {
			wantKind(t, err, block.KindCorrupt)
			hidden++
		}
	}
	if hidden == 0 {
		t.Fatal("nothing was damaged")
	}
	s.keep()
	for i := range uint64(1000) {
		mustGet(t, s, makeTiny(i))
	}
	if st := s.Stats(); st.Chunks != 1000 || st.MapDamaged == 0 {
		t.Fatalf("%+v", st)
	}
}
