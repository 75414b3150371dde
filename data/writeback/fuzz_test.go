package writeback

import (
	"bytes"
	"context"
	"encoding/binary"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"forerun/block"
	"forerun/disk"
	"forerun/disk/disktest"
	"forerun/internal/chunk"
)

// TestNewestIsWhatATwinSays: byte by byte, the last change wins.
func TestNewestIsWhatATwinSays(t *testing.T) {
	for seed := range uint64(300) {
		rnd := rand.New(rand.NewPCG(seed, 5))
		const size = 200
		var all []change
		var twin [size]change
		for i := range 1 + rnd.IntN(40) {
			off := rnd.Int64N(size)
			c := change{seq: uint64(i + 1), off: off, n: 1 + rnd.Int64N(min(30, size-off)), kind: kind(rnd.IntN(3))}
			all = append(all, c)
			for b := c.off; b < c.end(); b++ {
				twin[b] = c
			}
		}
		out := newest(all)
		var got [size]change
		for i, c := range out {
			if i > 0 && (out[i-1].seq > c.seq || out[i-1].seq == c.seq && out[i-1].end() >= c.off) {
				t.Fatalf("seed %d: out of order or not joined: %v", seed, out)
			}
			for b := c.off; b < c.end(); b++ {
				if got[b].seq != 0 {
					t.Fatalf("seed %d: byte %d twice", seed, b)
				}
				got[b] = c
			}
		}
		for b := range twin {
			if got[b].seq != twin[b].seq || got[b].kind != twin[b].kind {
				t.Fatalf("seed %d: byte %d is of %d, not %d", seed, b, got[b].seq, twin[b].seq)
			}
		}
	}
}

// examplePiece is a sound packed piece.
func examplePiece() []byte {
	var b builder
	b.add(extent{0, kindData, 512, 1024}, bytes.Repeat([]byte("forerun."), 128))
	b.add(extent{0, kindHole, 8192, 4096}, nil)
	b.add(extent{0, kindZero, 65536, 512}, nil)
	return appendPacked(nil, chunk.Seal(nil, b.plain(nil), chunk.Zstd))
}

func FuzzPiece(f *testing.F) {
	p, err := parsePacked(examplePiece())
	if err != nil {
		f.Fatal(err)
	}
	plain := make([]byte, p.Plain)
	if err := p.Open(plain); err != nil {
		f.Fatal(err)
	}
	f.Add(plain)
	f.Add([]byte{0, 0, 0, 1})
	limits := []bounds{{1 << 20, 512}, {1 << 40, 4096}}
	f.Fuzz(func(t *testing.T, b []byte) {
		table, data, err := parsePlain(nil, b, limits)
		if err != nil {
			return
		}
		total := 0
		for i, e := range table {
			l := limits[e.vol]
			if e.off < 0 || e.n <= 0 || e.end() > l.size || (e.off|e.n)%l.block != 0 {
				t.Fatalf("extent %+v is not within %+v", e, l)
			}
			for _, o := range table[:i] {
				if o.vol == e.vol && o.off < e.end() && e.off < o.end() {
					t.Fatalf("%+v and %+v overlap", o, e)
				}
			}
			if e.kind == kindData {
				total += int(e.n)
			}
		}
		if total != len(data) {
			t.Fatalf("%d bytes for %d", len(data), total)
		}
		again := builder{table: table, data: data}
		if !bytes.Equal(again.plain(nil), b) {
			t.Fatal("it does not come out as it went in")
		}
	})
}

// FuzzServe: whatever a frontend asks, the backend neither dies nor waits for
// ever, and a source changes only by sound pieces.
func FuzzServe(f *testing.F) {
	begin := encode(beginRequest{Version: 1, Group: "g", checkpointID: checkpointID{ID: 1}, Volumes: []beginVolume{{"a", 1, 128 << 10, false}}})
	f.Add(uint8(typHello), encode(helloRequest{1, "g", []string{"a"}}))
	f.Add(uint8(typBegin), begin)
	f.Add(uint8(typData), append(appendDataHead(nil, 0, 0), examplePiece()...))
	f.Add(uint8(typProbe), appendProbe(appendHandle(nil, 0), probe{extent{0, kindHole, 0, 512}, chunk.Sig{}}))
	f.Add(uint8(typCommit), encode(commitRequest{Group: "g", checkpointID: checkpointID{ID: 1}, Pieces: 1}))
	f.Add(uint8(typApplied), encode(appliedRequest{"g", 1}))
	f.Add(uint8(typReport), encode(reportRequest{"g", []reportVolume{{"a", 1, Unwritten{Bytes: 1}}}}))
	f.Add(uint8(typRelease), encode(releaseRequest{"g", "a", 1, 0}))
	f.Add(uint8(typDiscard), encode(discardRequest{"a", "f1"}))
	f.Fuzz(func(t *testing.T, typ uint8, p []byte) {
		b, err := openBack(disktest.New(1), 128<<10, "a")
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		defer cancel()
		if _, err = b.Serve(ctx, "frontend", "f1", typBegin, begin); err != nil {
			t.Fatal(err)
		}
		b.mu.Lock()
		for h := range b.parts { // a handle that the request knows
			if typ == typData || typ == typProbe {
				if len(p) >= 8 {
					p = bytes.Clone(p)
					binary.BigEndian.PutUint64(p, h)
				}
			}
		}
		b.mu.Unlock()
		_, err = b.Serve(ctx, "frontend", "f1", typ, p)
		if k := block.KindOf(err); k == block.KindIO {
			t.Fatalf("an error of nobody's kind: %v", err)
		}
		if !chunk.AllZero(b.sources["a"].bytes(t)) {
			t.Fatal("the source was changed without a checkpoint")
		}
	})
}

func writeFile(t testing.TB, fs disk.FS, name string, b []byte) {
	t.Helper()
	f := must[disk.File](t)(fs.Open(name, disk.Write|disk.Create|disk.Trunc))
	defer f.Close()
	if _, err := f.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
}

// exampleFile is a whole checkpoint.
func exampleFile(t testing.TB) []byte {
	fs := disktest.New(1)
	h := fileHeader{beginRequest{1, "g", checkpointID{ID: 1}, []beginVolume{{"a", 1, 1 << 20, false}}}, "f1"}
	c := must[*checkpointFile](t)(createFile(fs, ".", h))
	defer c.close()
	packed := examplePiece()
	p := must[chunk.Packed](t)(parsePacked(packed))
	for range 2 {
		if err := c.addPiece(p.Sig, packed); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.append(commitMagic, c.next, encode(fileCommit{Sum: c.digest.sum()})); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, c.end)
	if _, err := c.file.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// FuzzFile: a file that was damaged is never taken for whole with other bytes.
func FuzzFile(f *testing.F) {
	good := exampleFile(f)
	f.Add(good)
	f.Add(good[:len(good)-1])
	f.Add(good[:40])
	f.Fuzz(func(t *testing.T, b []byte) {
		fs := disktest.New(1)
		writeFile(t, fs, "f", b)
		c, err := openFile(fs, "f", nil)
		if err != nil {
			if k := block.KindOf(err); k != block.KindCorrupt && k != block.KindUnsupported {
				t.Fatal(err)
			}
			return
		}
		defer c.close()
		if c.end > int64(len(b)) {
			t.Fatalf("it ends at %d of %d", c.end, len(b))
		}
		pieces := uint32(0)
		err = c.pieces(func([]extent, []byte) error { pieces++; return nil })
		if err == nil && (c.commit == nil || pieces != c.next) {
			t.Fatalf("%d pieces of %d, end %+v", pieces, c.next, c.commit)
		}
	})
}

// TestEveryFlippedByteIsSeen in the file of a checkpoint.
func TestEveryFlippedByteIsSeen(t *testing.T) {
	good := exampleFile(t)
	for i := range good {
		fs := disktest.New(1)
		b := bytes.Clone(good)
		b[i] ^= 0x10
		writeFile(t, fs, "f", b)
		c, err := openFile(fs, "f", nil)
		if err == nil {
			err = c.pieces(func([]extent, []byte) error { return nil })
			c.close()
		}
		if err == nil {
			t.Fatalf("byte %d of %d", i, len(good))
		}
	}
}

func FuzzState(f *testing.F) {
	f.Add(newState().marshal())
	s := newState()
	s.Groups["g"] = groupState{Applied: checkpointID{ID: 7}, Volumes: []string{"a"}}
	s.Volumes["a"] = volumeState{Group: "g", Epoch: 3, Node: "f1", Known: true}
	f.Add(s.marshal())
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseState(b)
		if err != nil {
			return
		}
		if again, err := parseState(s.marshal()); err != nil || len(again.Volumes) != len(s.Volumes) {
			t.Fatal(err)
		}
	})
}

func FuzzClone(f *testing.F) {
	fs := disktest.New(1)
	m := cloneMeta{Version: 1, Volume: "a", Clone: "x", Size: 1 << 20, Grain: 4096, Nonce: nonce{1}}
	r := &Receiver{fs: fs}
	c := r.newClone(m, "c")
	if err := c.create(); err != nil {
		f.Fatal(err)
	}
	c.shut()
	for _, n := range []string{cloneName, mapName} {
		h := must[disk.File](f)(fs.Open("c/"+n, disk.Read))
		st := must[disk.Stat](f)(h.Stat())
		b := make([]byte, st.Size)
		if _, err := h.ReadAt(b, 0); err != nil {
			f.Fatal(err)
		}
		h.Close()
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := parseCloneMeta(b); err == nil && m.Size <= 1<<30 {
			_ = r.newClone(m, "d")
		}
		if err := r.newClone(m, "d").parseMap(b); err == nil && len(b) != mapHead+8*4+4 {
			t.Fatalf("a map of %d bytes", len(b))
		}
	})
}

// TestRefusals: requests that make no sense, or that nobody may make.
func TestRefusals(t *testing.T) {
	b := must[*back](t)(openBack(disktest.New(1), 1<<20, "a"))
	defer b.Close()
	ctx := within(t)
	ask := func(node string, typ uint8, p []byte) error {
		_, err := b.Serve(ctx, "frontend", node, typ, p)
		return err
	}
	_, err := b.Serve(ctx, "operator", "o", typHello, nil)
	kindIs(t, err, block.KindDenied)
	kindIs(t, ask("f1", 99, nil), block.KindUnsupported)
	req := func(change func(*beginRequest)) []byte {
		q := beginRequest{Version: 1, Group: "g", checkpointID: checkpointID{ID: 1}, Volumes: []beginVolume{{"a", 4, 1 << 20, false}}}
		change(&q)
		return encode(q)
	}
	for want, change := range map[block.Kind]func(*beginRequest){
		block.KindUnsupported: func(q *beginRequest) { q.Version = 2 },
		block.KindNotFound:    func(q *beginRequest) { q.Volumes[0].Name = "zzz" },
		block.KindExists:      func(q *beginRequest) { q.ID = 3 },
	} {
		kindIs(t, ask("f1", typBegin, req(change)), want)
	}
	for _, change := range []func(*beginRequest){
		func(q *beginRequest) { q.ID = 0 },
		func(q *beginRequest) { q.Group = "a/b" },
		func(q *beginRequest) { q.Volumes = nil },
		func(q *beginRequest) { q.Volumes[0].Size++ },
		func(q *beginRequest) { q.Volumes = append(q.Volumes, q.Volumes[0]) },
		func(q *beginRequest) { q.Volumes[0].Name = strings.Repeat("x", 300) },
	} {
		kindIs(t, ask("f1", typBegin, req(change)), block.KindInvalid)
	}
	a, err := b.Serve(ctx, "frontend", "f1", typBegin, req(func(*beginRequest) {}))
	if err != nil {
		t.Fatal(err)
	}
	var got beginAnswer
	if err := decode("test", a, &got); err != nil {
		t.Fatal(err)
	}
	kindIs(t, ask("f2", typBegin, req(func(*beginRequest) {})), block.KindFenced)
	kindIs(t, ask("f2", typBegin, req(func(q *beginRequest) { q.Volumes[0].Epoch = 3 })), block.KindFenced)
	piece := examplePiece()
	kindIs(t, ask("f2", typData, append(appendDataHead(nil, got.Handle, 0), piece...)), block.KindNotFound)
	kindIs(t, ask("f1", typData, append(appendDataHead(nil, got.Handle+1, 0), piece...)), block.KindNotFound)
	kindIs(t, ask("f1", typData, append(appendDataHead(nil, got.Handle, 1<<31), piece...)), block.KindInvalid)
	for i := range piece {
		bad := bytes.Clone(piece)
		bad[i] ^= 1
		if ask("f1", typData, append(appendDataHead(nil, got.Handle, 0), bad...)) == nil {
			t.Fatalf("a piece with byte %d changed was taken", i)
		}
	}
	if err := ask("f1", typData, append(appendDataHead(nil, got.Handle, 0), piece...)); err != nil {
		t.Fatal(err)
	}
	commit := func(change func(*commitRequest)) []byte {
		d := newDigest()
		p := must[chunk.Packed](t)(parsePacked(piece))
		d.add(p.Sig)
		q := commitRequest{Group: "g", checkpointID: checkpointID{ID: 1}, Handle: got.Handle, Pieces: 1, Sum: d.sum()}
		change(&q)
		return encode(q)
	}
	kindIs(t, ask("f1", typCommit, commit(func(q *commitRequest) { q.Pieces = 2 })), block.KindInvalid)
	kindIs(t, ask("f1", typCommit, commit(func(q *commitRequest) { q.Sum = "" })), block.KindInvalid)
	kindIs(t, ask("f1", typCommit, commit(func(q *commitRequest) { q.Nonce[0]++ })), block.KindNotFound)
	kindIs(t, ask("f1", typCommit, commit(func(q *commitRequest) { q.Group = "h" })), block.KindNotFound)
	kindIs(t, ask("f2", typCommit, commit(func(*commitRequest) {})), block.KindNotFound)
	kindIs(t, ask("f2", typRelease, encode(releaseRequest{"g", "a", 4, 1})), block.KindFenced)
	kindIs(t, ask("f2", typDiscard, encode(discardRequest{"a", "f1"})), block.KindDenied)
	if !chunk.AllZero(b.sources["a"].bytes(t)) {
		t.Fatal("the source was changed")
	}
	if err := ask("f1", typCommit, commit(func(*commitRequest) {})); err != nil {
		t.Fatal(err)
	}
	if err := ask("f1", typCommit, commit(func(*commitRequest) {})); err != nil {
		t.Fatal("again:", err)
	}
}
