package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"

	"forerun/block"
	"forerun/disk"
	"forerun/disk/disktest"
	"forerun/internal/chunk"
)

// sample is a chunk of a test: its plain bytes follow from its number.
type sample struct {
	chunk.Packed
	plain []byte
}

func makeSample(n uint64) sample {
	r := rand.New(rand.NewPCG(n, 77))
	plain := make([]byte, 1+r.IntN(3000))
	for i := range plain {
		plain[i] = byte(r.Uint32())
		if n%2 == 0 {
			plain[i] &= 3
		}
	}
	plain[0] = 1
	binary.LittleEndian.AppendUint64(plain[:0], n|1<<63)
	codec := []chunk.Codec{chunk.Raw, chunk.Zstd, chunk.S2}[n%3]
	if len(plain) < 8 {
		plain = binary.LittleEndian.AppendUint64(nil, n|1<<63)
	}
	p := chunk.Seal(nil, plain, codec)
	p.Data = bytes.Clone(p.Data)
	return sample{p, plain}
}

var samples = sync.OnceValue(func() []sample {
	out := make([]sample, 400)
	for i := range out {
		out[i] = makeSample(uint64(i))
	}
	return out
})

// tiny makes everything happen often.
func tiny() Options {
	return Options{PackBytes: 16 << 10, CheckpointBytes: 12 << 10, MapEntries: 24, OpenPacks: 2, inline: true}
}

func mustOpen(t testing.TB, fs disk.FS, o Options) *Store {
	t.Helper()
	s, err := Open(fs, "/s", o)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	return s
}

func mustPut(t testing.TB, s *Store, x sample, want bool) {
	t.Helper()
	added, err := s.Put(x.Packed)
	if err != nil || added != want {
		t.Fatalf("put %s: added %v, want %v, error %v", x.Sig, added, want, err)
	}
}

func mustGet(t testing.TB, s *Store, x sample) {
	t.Helper()
	if err := check(s, x); err != nil {
		t.Fatal(err)
	}
}

// check reads a chunk both ways.
func check(s *Store, x sample) error {
	dst := make([]byte, len(x.plain))
	if err := s.Get(x.Sig, dst); err != nil {
		return err
	}
	if !bytes.Equal(dst, x.plain) {
		return fmt.Errorf("WRONG BYTES for %s", x.Sig)
	}
	p, err := s.GetPacked(x.Sig, nil)
	if err != nil {
		return err
	}
	if err := p.Open(dst); err != nil {
		return fmt.Errorf("WRONG PACKED: %w", err)
	}
	return nil
}

func wantKind(t testing.TB, err error, k block.Kind) {
	t.Helper()
	if block.KindOf(err) != k {
		t.Fatalf("got %v (%v), want %v", err, block.KindOf(err), k)
	}
}

// abandon is kill -9 for the goroutine of a store whose FS is dead already.
func abandon(s *Store) {
	s.closing.Store(true)
	s.stopKeeper()
	s.news.end()
}

func TestPutGet(t *testing.T) {
	for name, fs := range map[string]disk.FS{"twin": disktest.New(1), "host": disk.OS()} {
		t.Run(name, func(t *testing.T) {
			dir := "/s"
			if name == "host" {
				dir = t.TempDir() + "/s"
			}
			s, err := Open(fs, dir, Options{Verify: true})
			if err != nil {
				t.Fatal(err)
			}
			for _, x := range samples()[:100] {
				wantKind(t, s.Get(x.Sig, nil), block.KindNotFound)
				if s.Has(x.Sig) {
					t.Fatal("has what was never put")
				}
				mustPut(t, s, x, true)
				mustGet(t, s, x)
				mustPut(t, s, x, false)
			}
			if st := s.Stats(); st.Chunks != 100 || st.Packs != 1 || st.Puts != 100 || st.Duplicates != 100 {
				t.Fatalf("%+v", st)
			}
			if _, err := Open(fs, dir, Options{}); block.KindOf(err) != block.KindBusy {
				t.Fatalf("second open: %v", err)
			}
			if err := s.Sync(); err != nil {
				t.Fatal(err)
			}
			before := s.Stats()
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			_, err = s.Put(samples()[0].Packed)
			wantKind(t, err, block.KindClosed)
			wantKind(t, s.Get(samples()[0].Sig, nil), block.KindClosed)
			if s, err = Open(fs, dir, Options{}); err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if st := s.Stats(); st.Chunks != before.Chunks || st.PlainBytes != before.PlainBytes ||
				st.StoredBytes != before.StoredBytes || st.DiskBytes != before.DiskBytes {
				t.Fatalf("%+v became %+v", before, st)
			}
			for _, x := range samples()[:100] {
				mustGet(t, s, x)
			}
			mustPut(t, s, samples()[100], true)
			if st := s.Stats(); st.Packs != 1 {
				t.Fatalf("after a clean close the log goes on in another pack: %+v", st)
			}
		})
	}
}

func TestCallersFaults(t *testing.T) {
	s := mustOpen(t, disktest.New(1), Options{Verify: true})
	defer s.Close()
	x := samples()[0]
	_, err := s.Put(chunk.Seal(nil, make([]byte, 100), chunk.Zstd))
	wantKind(t, err, block.KindInvalid)
	_, err = s.Put(chunk.Packed{Sig: x.Sig, Plain: chunk.MaxSize + 1, Data: x.Data})
	wantKind(t, err, block.KindInvalid)
	_, err = s.Put(chunk.Packed{Sig: x.Sig, Plain: 10})
	wantKind(t, err, block.KindInvalid)
	bad := x.Packed
	bad.Sig[0]++
	_, err = s.Put(bad)
	wantKind(t, err, block.KindCorrupt)
	mustPut(t, s, x, true)
	wantKind(t, s.Get(x.Sig, make([]byte, len(x.plain)+1)), block.KindInvalid)
	mustGet(t, s, x)
	if _, err := Open(disktest.New(1), "/s", Options{PackBytes: 1}); block.KindOf(err) != block.KindInvalid {
		t.Fatal(err)
	}
}

// A caller that does not verify can store bytes that are not the chunk's. They
// never come back.
func TestWrongBytesNeverComeBack(t *testing.T) {
	s := mustOpen(t, disktest.New(1), Options{})
	defer s.Close()
	x := samples()[0]
	bad := x.Packed
	bad.Data = bytes.Clone(bad.Data)
	bad.Data[3] ^= 1
	if added, err := s.Put(bad); !added || err != nil {
		t.Fatal(added, err)
	}
	err := s.Get(x.Sig, make([]byte, len(x.plain)))
	wantKind(t, err, block.KindCorrupt)
	var d *Damage
	if !errors.As(err, &d) || d.Sig != x.Sig || d.Expected == "" || d.Found == "" || d.Pack == "" {
		t.Fatalf("%#v", d)
	}
	wantKind(t, s.Get(x.Sig, make([]byte, len(x.plain))), block.KindNotFound)
	if st := s.Stats(); st.Corrupt != 1 || st.Chunks != 0 {
		t.Fatalf("%+v", st)
	}
	mustPut(t, s, x, true)
	mustGet(t, s, x)
}

// TestRandomAgainstTwin does what may be done in any order, with clean closes,
// kills and power cuts, against a map.
func TestRandomAgainstTwin(t *testing.T) {
	t.Parallel()
	seeds := 20
	if testing.Short() || raceEnabled {
		seeds = 6
	}
	for seed := range uint64(seeds) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { randomOps(t, seed, 900) })
	}
}

// Twin states of a chunk.
const (
	absent  = iota
	held    // durable
	fresh   // put, not synced
	either  // deleted, not synced
	garbage // a sweep may or may not have taken it
)

func randomOps(t *testing.T, seed uint64, steps int) {
	r := rand.New(rand.NewPCG(seed, 5))
	fs := disktest.New(seed)
	o := tiny()
	s := mustOpen(t, fs, o)
	pool := samples()[:150]
	state := make([]int, len(pool))
	reopen := func(how string) {
		s = mustOpen(t, fs, o)
		for i, x := range pool {
			ok := s.Has(x.Sig)
			err := check(s, x)
			if ok != (err == nil) {
				t.Fatalf("seed %d: after %s: chunk %d: Has says %v, Get %v", seed, how, i, ok, err)
			}
			if err != nil && block.KindOf(err) != block.KindNotFound {
				t.Fatalf("seed %d: after %s: chunk %d: %v", seed, how, i, err)
			}
			must := state[i] == held || state[i] == fresh && how != "crash"
			if must && !ok || state[i] == absent && ok {
				t.Fatalf("seed %d: after %s: chunk %d in state %d: held %v", seed, how, i, state[i], ok)
			}
			if ok {
				state[i] = fresh // durable only if nothing follows; Sync tells
			} else {
				state[i] = absent
			}
		}
	}
	settle := func() {
		for i := range state {
			switch state[i] {
			case fresh:
				state[i] = held
			case either:
				state[i] = absent
			}
		}
	}
	for step := range steps {
		i := r.IntN(len(pool))
		x := pool[i]
		switch c := r.IntN(100); {
		case c < 45:
			added, err := s.Put(x.Packed)
			if err != nil {
				t.Fatalf("seed %d step %d: %v", seed, step, err)
			}
			switch state[i] {
			case held, fresh:
				if added {
					t.Fatalf("seed %d step %d: chunk %d was there and was added", seed, step, i)
				}
			case absent, either:
				if !added {
					t.Fatalf("seed %d step %d: chunk %d was not there and was not added", seed, step, i)
				}
				state[i] = fresh
			case garbage:
				state[i] = fresh
			}
		case c < 75:
			err := check(s, x)
			if s.Has(x.Sig) != (err == nil) {
				t.Fatalf("seed %d step %d: Has and Get do not agree: %v", seed, step, err)
			}
			if state[i] != garbage && (err == nil) != (state[i] == held || state[i] == fresh) {
				t.Fatalf("seed %d step %d: chunk %d in state %d: %v", seed, step, i, state[i], err)
			}
		case c < 83:
			err := s.Delete(x.Sig)
			if err == nil {
				state[i] = either
			} else if block.KindOf(err) != block.KindNotFound || state[i] == held || state[i] == fresh {
				t.Fatalf("seed %d step %d: delete: %v", seed, step, err)
			} else if state[i] == garbage {
				state[i] = either
			}
		case c < 91:
			if err := s.Sync(); err != nil {
				t.Fatalf("seed %d step %d: %v", seed, step, err)
			}
			settle()
		case c < 93:
			keep := map[chunk.Sig]bool{}
			for j, y := range pool {
				if r.IntN(3) > 0 && state[j] != absent {
					keep[y.Sig] = true
				}
			}
			if err := s.Sync(); err != nil {
				t.Fatalf("seed %d step %d: %v", seed, step, err)
			}
			settle()
			used := s.Stats()
			freed, err := s.Sweep(func(sig chunk.Sig) bool { return keep[sig] })
			if err != nil {
				t.Fatalf("seed %d step %d: sweep: %v", seed, step, err)
			}
			now := s.Stats()
			if extra := freed - (used.DiskBytes - now.DiskBytes); extra < 0 || extra > int64(packHeader*(1+now.Packs)) {
				t.Fatalf("seed %d step %d: sweep says it freed %d: %+v, %+v", seed, step, freed, used, now)
			}
			for j, y := range pool {
				if !keep[y.Sig] && state[j] != absent {
					if state[j] = garbage; !s.Has(y.Sig) {
						state[j] = either // removed; a power cut may bring the pack back
					}
				}
			}
		case c < 95:
			if err := s.Close(); err != nil {
				t.Fatalf("seed %d step %d: close: %v", seed, step, err)
			}
			settle()
			reopen("close")
			settle()
		case c < 97:
			fs = fs.Kill()
			abandon(s)
			reopen("kill")
		case c < 99:
			fs = fs.Crash()
			abandon(s)
			reopen("crash")
		default:
			chunks := int64(0)
			for _, y := range pool {
				if s.Has(y.Sig) {
					chunks++
				}
			}
			if st := s.Stats(); st.Chunks != chunks {
				t.Fatalf("seed %d step %d: %d chunks are there, Stats says %+v", seed, step, chunks, st)
			}
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestSharedChunk: two users put the same chunk, one drops its reference
// because it was overwritten there; the other still reads the original.
func TestSharedChunk(t *testing.T) {
	s := mustOpen(t, disktest.New(1), tiny())
	defer s.Close()
	shared, other := samples()[0], samples()[1]
	mustPut(t, s, shared, true)  // user A
	mustPut(t, s, shared, false) // user B
	mustPut(t, s, other, true)   // A overwrote its copy
	live := map[chunk.Sig]bool{shared.Sig: true, other.Sig: true}
	if _, err := s.Sweep(func(sig chunk.Sig) bool { return live[sig] }); err != nil {
		t.Fatal(err)
	}
	mustGet(t, s, shared)
	mustGet(t, s, other)
}

func TestConcurrentPutsStoreOnce(t *testing.T) {
	s := mustOpen(t, disktest.New(1), Options{PackBytes: 64 << 10, CheckpointBytes: 16 << 10, MapEntries: 30})
	defer s.Close()
	var wg sync.WaitGroup
	added := make([]int32, 100)
	var mu sync.Mutex
	for range 8 {
		wg.Go(func() {
			for i, x := range samples()[:100] {
				ok, err := s.Put(x.Packed)
				if err != nil {
					t.Error(err)
				}
				if ok {
					mu.Lock()
					added[i]++
					mu.Unlock()
				}
				if err := check(s, x); err != nil {
					t.Error(err)
				}
			}
			if err := s.Sync(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for i, n := range added {
		if n != 1 {
			t.Errorf("chunk %d was added %d times", i, n)
		}
	}
	if st := s.Stats(); st.Chunks != 100 || st.Puts != 100 || st.Duplicates != 700 {
		t.Errorf("%+v", st)
	}
}

// TestConcurrentEverything: readers, writers, deleters, syncs and sweeps at
// once. Chunks below 50 are always live and never deleted: they must always read.
func TestConcurrentEverything(t *testing.T) {
	fs := disktest.New(3)
	s := mustOpen(t, fs, Options{PackBytes: 16 << 10, CheckpointBytes: 12 << 10, MapEntries: 24, OpenPacks: 2})
	keep := map[chunk.Sig]bool{}
	for _, x := range samples()[:50] {
		keep[x.Sig] = true
		mustPut(t, s, x, true)
	}
	var workers, sweeper sync.WaitGroup
	stop := make(chan struct{})
	for w := range 4 {
		workers.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 9))
			for range 1500 {
				i := r.IntN(200)
				x := samples()[i]
				switch c := r.IntN(10); {
				case c < 4:
					if _, err := s.Put(x.Packed); err != nil {
						t.Error(err)
					}
				case c < 8:
					if err := check(s, x); err != nil && (i < 50 || block.KindOf(err) != block.KindNotFound) {
						t.Errorf("chunk %d: %v", i, err)
					}
				case c < 9 && i >= 50:
					if err := s.Delete(x.Sig); err != nil && block.KindOf(err) != block.KindNotFound {
						t.Error(err)
					}
				default:
					if err := s.Sync(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	sweeper.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := s.Sweep(func(sig chunk.Sig) bool { return keep[sig] }); err != nil {
				t.Error(err)
			}
		}
	})
	workers.Wait()
	close(stop)
	sweeper.Wait()
	for _, x := range samples()[:50] {
		mustGet(t, s, x)
	}
	n := int64(0)
	for _, x := range samples()[:200] {
		if s.Has(x.Sig) {
			n++
		}
	}
	if st := s.Stats(); st.Chunks != n {
		t.Errorf("%d chunks are there, Stats says %d", n, st.Chunks)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = mustOpen(t, fs, tiny())
	defer s.Close()
	for _, x := range samples()[:50] {
		mustGet(t, s, x)
	}
}

// TestPutDuringSweepIsKept: what a caller was told is there stays, though the
// sweep's caller says it is dead.
func TestPutDuringSweepIsKept(t *testing.T) {
	fs := disktest.New(1)
	s := mustOpen(t, fs, tiny())
	defer s.Close()
	all := samples()[:60]
	for _, x := range all {
		mustPut(t, s, x, true)
	}
	told := 0
	var fresh sample
	if _, err := s.Sweep(func(chunk.Sig) bool {
		switch told++; told {
		case 30:
			mustPut(t, s, all[0], false)
			mustPut(t, s, all[59], false)
		case 40:
			if !s.Has(all[20].Sig) {
				t.Error("gone before the end of the judgement")
			}
			fresh = samples()[100]
			mustPut(t, s, fresh, true)
		}
		return false
	}); err != nil {
		t.Fatal(err)
	}
	for _, x := range []sample{all[0], all[59], all[20], fresh} {
		mustGet(t, s, x)
	}
	if st := s.Stats(); st.Chunks > 30 {
		t.Errorf("little was swept: %+v", st)
	}
}

func TestSweepFrees(t *testing.T) {
	fs := disktest.New(1)
	s := mustOpen(t, fs, tiny())
	for _, x := range samples()[:200] {
		mustPut(t, s, x, true)
	}
	before := s.Stats()
	keep := map[chunk.Sig]bool{}
	for i, x := range samples()[:200] {
		keep[x.Sig] = i%10 == 0
	}
	freed, err := s.Sweep(func(sig chunk.Sig) bool { return keep[sig] })
	if err != nil {
		t.Fatal(err)
	}
	after := s.Stats()
	if freed < before.DiskBytes*8/10 || freed-(before.DiskBytes-after.DiskBytes) > 4*packHeader || after.Chunks != 20 || after.Swept != freed {
		t.Fatalf("freed %d: %+v, %+v", freed, before, after)
	}
	again, err := s.Sweep(func(sig chunk.Sig) bool { return keep[sig] })
	if again != 0 || err != nil {
		t.Fatal(again, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = mustOpen(t, fs, tiny())
	defer s.Close()
	for i, x := range samples()[:200] {
		if i%10 == 0 {
			mustGet(t, s, x)
		} else if s.Has(x.Sig) {
			t.Fatalf("chunk %d was swept and is there", i)
		}
	}
}

// TestSweepKeepsWhatDamageHides: a record whose header is damaged is not met
// by a scan, but the map has it; it must survive the rewriting of its pack.
func TestSweepKeepsWhatDamageHides(t *testing.T) {
	fs := disktest.New(1)
	s := mustOpen(t, fs, Options{inline: true})
	defer s.Close()
	for _, x := range samples()[:50] {
		mustPut(t, s, x, true)
	}
	at, err := s.lookup(&samples()[7].Sig)
	if err != nil {
		t.Fatal(err)
	}
	fs.Flip("/s/packs/"+packName(at.Pack), at.At()+10)
	keep := samples()[7].Sig
	if freed, err := s.Sweep(func(sig chunk.Sig) bool { return sig == keep }); err != nil || freed == 0 {
		t.Fatal(freed, err)
	}
	mustGet(t, s, samples()[7])
	if st := s.Stats(); st.Chunks != 1 {
		t.Fatalf("%+v", st)
	}
}

func TestSyncIsShared(t *testing.T) {
	s := mustOpen(t, disktest.New(1), Options{inline: true})
	defer s.Close()
	mustPut(t, s, samples()[0], true)
	for range 5 {
		if err := s.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	if st := s.Stats(); st.Syncs != 1 {
		t.Fatalf("%d syncs for one change", st.Syncs)
	}
}

func TestMapStaysSmall(t *testing.T) {
	fs := disktest.New(1)
	o := tiny()
	o.PackBytes = 1 << 20
	s := mustOpen(t, fs, o)
	defer s.Close()
	for i := range uint64(3000) {
		mustPut(t, s, makeTiny(i), true)
	}
	st := s.Stats()
	if st.MapRuns > 16 || st.Merges == 0 || st.MapEntries+int64(st.MapPending) != 3000 {
		t.Fatalf("%+v", st)
	}
	names, err := fs.List("/s/map")
	if err != nil || len(names) != st.MapRuns+1 {
		t.Fatalf("%d runs, files %v, %v", st.MapRuns, names, err)
	}
	for i := range uint64(3000) {
		mustGet(t, s, makeTiny(i))
	}
}

func makeTiny(i uint64) sample {
	plain := binary.LittleEndian.AppendUint64(nil, i+1)
	return sample{chunk.Seal(nil, plain, chunk.Raw), plain}
}

func TestGetDoesNotAllocate(t *testing.T) {
	s, err := Open(disk.OS(), t.TempDir()+"/s", Options{MapEntries: 50, inline: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, x := range samples()[:200] {
		mustPut(t, s, x, true)
	}
	for _, i := range []int{0, 1, 2, 199} {
		x := samples()[i]
		dst := make([]byte, len(x.plain))
		n := testing.AllocsPerRun(200, func() {
			if err := s.Get(x.Sig, dst); err != nil {
				t.Fatal(err)
			}
		})
		if n >= 1 && !raceEnabled {
			t.Errorf("codec %d: %v allocations for a Get", x.Codec, n)
		}
	}
}

var eio, enospc error = syscall.EIO, syscall.ENOSPC
