package volume

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"math/rand/v2"
	"testing"

	"forerun/disk"
	"forerun/internal/chunk"
)

var fuzzID = identity{size: 3*pageChunks*(16<<10) - 512, chunkBytes: 16 << 10, source: "s"}

func fuzzTable() *table { return newTable(newGeometry(fuzzID.size, fuzzID.chunkBytes)) }

// nullReplay takes signatures and forgets them.
type nullReplay struct{ replay }

func (r *nullReplay) held(start int64, sums []byte) error {
	r.base(start, int64(len(sums)/chunk.SigLen), baseHeld)
	return nil
}

// sampleTable is a map with everything in it.
func sampleTable(seed uint64) *table {
	t := fuzzTable()
	r := rand.New(rand.NewPCG(seed, 4))
	rep := &nullReplay{replay{t: t}}
	rep.base(0, pageChunks, baseZero)
	for range 300 {
		i := r.Int64N(t.chunks)
		n := min(1+r.Int64N(50), t.chunks-i)
		switch r.IntN(5) {
		case 0:
			rep.base(i, n, baseHeld)
		case 1:
			rep.base(i, n, baseZero)
		case 2:
			rep.masks(i, n, true)
		case 3:
			rep.masks(i, n, false)
		default:
			var m mask
			from := r.IntN(t.sectors(i))
			m.setRange(from, from+1+r.IntN(t.sectors(i)-from))
			rep.bits(i, &m)
		}
	}
	t.settle()
	return t
}

// sameTable compares all states and masks.
func sameTable(t *testing.T, a, b *table) {
	t.Helper()
	for i := range a.chunks {
		na, nb := a.nib(i), b.nib(i)
		if na != nb {
			t.Fatalf("chunk %d is in state %d and %d", i, na, nb)
		}
		if na&(nibMod|nibFull) == nibMod {
			for s := range a.sectors(i) {
				if a.covered(i, s, s+1) != b.covered(i, s, s+1) {
					t.Fatalf("chunk %d sector %d differs", i, s)
				}
			}
		}
	}
	if a.counts != b.counts {
		t.Fatalf("%+v and %+v", a.counts, b.counts)
	}
}

func TestSnapshotRoundTrip(t *testing.T) {
	for seed := range uint64(5) {
		a := sampleTable(seed)
		var buf bytes.Buffer
		must(t, a.writeSnapshot(&buf, fuzzID, 17))
		b := fuzzTable()
		gen, err := b.readSnapshot(bytes.NewReader(buf.Bytes()), fuzzID)
		if err != nil || gen != 17 {
			t.Fatal(gen, err)
		}
		b.settle()
		sameTable(t, a, b)
	}
}

// TestLogRoundTrip: all of a map, through the log.
func TestLogRoundTrip(t *testing.T) {
	for seed := range uint64(5) {
		a := sampleTable(seed)
		for pi := range a.pages {
			a.dirty.page(pi, true, true)
		}
		d := a.dirty.take(true)
		ch := a.collect(&d)
		data := logOf(ch, &sigs{File: noFile{}})
		b := fuzzTable()
		end, seq, err := replayLog(data, 9, &b.geometry, &nullReplay{replay{t: b}})
		if err != nil || end != int64(len(data)) || seq != 1 {
			t.Fatal(end, seq, err)
		}
		b.settle()
		sameTable(t, a, b)
	}
}

type noFile struct{ disk.File }

func (noFile) ReadAt(p []byte, _ int64) (int, error) { clear(p); return len(p), nil }

func logOf(ch *changes, s *sigs) []byte {
	b, err := ch.encode(newBatch(nil), s)
	if err != nil {
		panic(err)
	}
	return append(encodeLogHeader(fuzzID, 9), sealBatch(b, 9, 1)...)
}

// TestSnapshotAnyFlip: no flipped byte is taken for a map.
func TestSnapshotAnyFlip(t *testing.T) {
	a := sampleTable(1)
	var buf bytes.Buffer
	must(t, a.writeSnapshot(&buf, fuzzID, 17))
	for at := 0; at < buf.Len(); at += 1 + at/50 {
		b := bytes.Clone(buf.Bytes())
		b[at] ^= 0x10
		if _, err := fuzzTable().readSnapshot(bytes.NewReader(b), fuzzID); err == nil {
			t.Fatalf("byte %d flipped and not noticed", at)
		}
		if _, err := fuzzTable().readSnapshot(bytes.NewReader(buf.Bytes()[:at]), fuzzID); err == nil {
			t.Fatalf("cut at %d and not noticed", at)
		}
	}
}

// TestLogTails: a torn last batch is cut, a damaged one before the last is an error.
func TestLogTails(t *testing.T) {
	b := encodeLogHeader(fuzzID, 9)
	var ends []int
	for seq := uint64(1); seq <= 4; seq++ {
		ch := &changes{zero: []span{{int64(seq) * 10, 3}}, bits: nil}
		rec, _ := ch.encode(newBatch(nil), nil)
		b = append(b, sealBatch(rec, 9, seq)...)
		ends = append(ends, len(b))
	}
	run := func(data []byte) (int64, uint64, error) {
		tab := fuzzTable()
		return replayLog(data, 9, &tab.geometry, &nullReplay{replay{t: tab}})
	}
	for at := ends[2]; at < ends[3]; at++ {
		end, seq, err := run(b[:at])
		if err != nil || end != int64(ends[2]) || seq != 3 {
			t.Fatal(at, end, seq, err)
		}
		c := bytes.Clone(b)
		c[at] ^= 4
		if end, seq, err = run(c); err != nil || end != int64(ends[2]) || seq != 3 {
			t.Fatal("flipped at", at, end, seq, err)
		}
	}
	for at := logHeader; at < ends[2]; at++ {
		c := bytes.Clone(b)
		c[at] ^= 4
		if _, _, err := run(c); err == nil {
			t.Fatalf("flipped at %d: batches after it are there", at)
		}
	}
}

func FuzzSnapshot(f *testing.F) {
	for seed := range uint64(2) {
		var buf bytes.Buffer
		_ = sampleTable(seed).writeSnapshot(&buf, fuzzID, 3)
		f.Add(buf.Bytes())
	}
	var buf bytes.Buffer
	_ = fuzzTable().writeSnapshot(&buf, fuzzID, 1)
	f.Add(buf.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		// Checksums are made right, so that what is behind them is reached.
		b = fixSums(bytes.Clone(b))
		tab := fuzzTable()
		if _, err := tab.readSnapshot(bytes.NewReader(b), fuzzID); err != nil {
			return
		}
		tab.settle()
		st := tab.counts
		if st.cat[0]+st.cat[1]+st.cat[2]+st.cat[3] != tab.chunks {
			t.Fatalf("%+v", st)
		}
		var out bytes.Buffer
		must(t, tab.writeSnapshot(&out, fuzzID, 1))
		again := fuzzTable()
		if _, err := again.readSnapshot(&out, fuzzID); err != nil {
			t.Fatal("what was read and written is refused: ", err)
		}
		again.settle()
		sameTable(t, tab, again)
	})
}

func fixSums(b []byte) []byte {
	le := binary.LittleEndian
	if len(b) < mapFixed+4 {
		return b
	}
	sum := func(from, to int) int {
		if to < from || to+4 > len(b) {
			return len(b)
		}
		le.PutUint32(b[to:], crc32.Checksum(b[from:to], castagnoli))
		return to + 4
	}
	at := sum(0, mapFixed+int(le.Uint32(b[36:])))
	for at+pageHead+4 <= len(b) {
		body := 0
		if b[at+4] == pageExplicit {
			body = pageWords*8 + int(le.Uint32(b[at+8:])%70000)*8 + int(le.Uint32(b[at+12:])%70000)*5
		}
		at = sum(at, at+pageHead+body)
	}
	return b
}

func FuzzLog(f *testing.F) {
	for seed := range uint64(2) {
		a := sampleTable(seed)
		for pi := range a.pages {
			a.dirty.page(pi, true, true)
		}
		d := a.dirty.take(true)
		f.Add(logOf(a.collect(&d), &sigs{File: noFile{}})[logHeader+batchHeader:])
	}
	f.Add([]byte{recBits, 5, 0xff, 0, 1, 0})
	f.Add([]byte{recZero, 0, 100, recFull, 3, 9, recEmpty, 4, 1, 0})
	f.Fuzz(func(t *testing.T, records []byte) {
		tab := fuzzTable()
		rep := &nullReplay{replay{t: tab}}
		b := append(encodeLogHeader(fuzzID, 9), sealBatch(append(newBatch(nil), records...), 9, 1)...)
		_, _, _ = replayLog(b, 9, &tab.geometry, rep)
		tab.settle()
		st := tab.counts
		if st.cat[0]+st.cat[1]+st.cat[2]+st.cat[3] != tab.chunks || st.sectors < 0 || st.sectors > tab.size/512 {
			t.Fatalf("%+v", st)
		}
		// As bytes that are no batch at all.
		_, _ = parseLogHeader(records, fuzzID)
		if _, _, err := replayLog(append(encodeLogHeader(fuzzID, 9), records...), 9, &tab.geometry, rep); err != nil {
			return
		}
	})
}

// TestMaskNeverWithoutItsZero: between taking the names of what changed and
// reading the states, a chunk that was written may be zeroed. Its empty mask in
// the log, without its base, would bring the source's bytes back.
func TestMaskNeverWithoutItsZero(t *testing.T) {
	for _, whole := range []bool{false, true} {
		for _, again := range []bool{false, true} {
			a := fuzzTable()
			a.setMask(5, 0, 4)
			d := a.dirty.take(true)
			if whole {
				a.zeroPage(0)
			} else {
				a.zeroChunk(5)
			}
			if again {
				a.setMask(5, 8, 9)
			}
			b := fuzzTable()
			if _, _, err := replayLog(logOf(a.collect(&d), &sigs{File: noFile{}}), 9, &b.geometry, &nullReplay{replay{t: b}}); err != nil {
				t.Fatal(err)
			}
			if n := b.nib(5); n&baseMask != baseZero || b.covered(5, 8, 9) != again || b.covered(5, 0, 1) {
				t.Fatalf("whole page %v, written again %v: chunk 5 is in state %d", whole, again, n)
			}
		}
	}
}
