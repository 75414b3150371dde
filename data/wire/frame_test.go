package wire

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"

	"forerun/block"
	"forerun/internal/chunk"
)

func fuzzSeeds(f *testing.F) {
	v := volumeInfo{block.Info{Size: 1 << 20, BlockSize: 512, ID: "disk-1"}, 64 << 10}
	add := func(typ frameType, p []byte) { f.Add(appendFrame(nil, header{typ: typ, volume: 1, req: 3}, p)) }
	add(tPing, make([]byte, 8))
	add(tOpen, appendOpen(nil, openOrder{site: 1, name: "disk"}))
	add(tHave, appendMarks(nil, []mark{5, 1 << 39, 3}))
	add(tSame, append(binary.BigEndian.AppendUint64(nil, 2), make([]byte, 64)...))
	add(tVolume, appendVolume(nil, v))
	add(tFetch, fetchOf(block.Background|block.Soon, run{0, 4}, run{9, 1}))
	add(tPromote, appendRun(nil, run{2, 2}))
	add(tChunk, append(appendChunkHead(nil, &piece{index: 3, plain: 100, packed: 10, codec: chunk.Zstd}), 1, 2, 3))
	add(tMore, make([]byte, 20))
	add(tExtents, appendExtentsOrder(nil, 0, 512, 1024))
	add(tRanges, appendRanges(nil, []block.Extent{{Off: 512, Len: 512, Kind: block.Hole}, {Off: 1024, Len: 512}}))
	add(tBye, appendText(nil, block.KindClosed, "so long"))
	f.Add(appendError(nil, 1, 3, wireError{block.KindIO, []run{{1, 1}}, "bad sector"}))
	f.Add(appendHello(nil, hello{min: 2, max: 2, node: "f1"}))
	f.Add(appendWelcome(nil, welcome{version: 2, credit: 9, node: "b1"}))
}

// FuzzFrames reads bytes as frames and parses each as every type there is, as
// both ends do. Nothing may panic, and whatever is accepted keeps to the limits.
func FuzzFrames(f *testing.F) {
	fuzzSeeds(f)
	v := volumeInfo{block.Info{Size: 1<<20 + 512, BlockSize: 512}, 64 << 10}
	f.Fuzz(func(t *testing.T, b []byte) {
		br := newFrameReader(bytes.NewReader(b))
		for {
			h, p, err := readFrame(br)
			if err != nil {
				return
			}
			if len(p) > MaxPayload || int(h.n) != len(p) {
				t.Fatalf("a payload of %d bytes", len(p))
			}
			if fl, runs, err := parseFetch(nil, p, v.chunks(), 100); err == nil {
				var n int64
				for _, r := range runs {
					if r.first < 0 || r.n < 1 || r.first+r.n > v.chunks() {
						t.Fatalf("run %v", r)
					}
					n += r.n
				}
				if n > 100 || !fl.Valid() {
					t.Fatalf("%d chunks, flags %v", n, fl)
				}
			}
			if pc, err := parseChunk(p); err == nil {
				if len(pc.data) > pc.packed || pc.packed > chunk.MaxPacked(pc.plain) || pc.plain > chunk.MaxSize || pc.index < 0 {
					t.Fatalf("%+v", pc)
				}
			}
			parseMore(p)
			if o, err := parseOpen(p); err == nil && (o.name == "" || len(o.name) > maxName) {
				t.Fatalf("%+v", o)
			}
			if ms, err := parseMarks(nil, p); err == nil {
				if again, err := parseMarks(nil, appendMarks(nil, ms)); err != nil || !slices.Equal(again, ms) {
					t.Fatalf("marks %x came back as %x, %v", ms, again, err)
				}
			}
			if first, sigs, err := parseSame(p, v.chunks()); err == nil {
				if n := int64(len(sigs)) / chunk.SigLen; first < 0 || n < 1 || first+n > v.chunks() {
					t.Fatalf("signatures of %d chunks from %d on", n, first)
				}
			}
			if w, err := parseVolume(p); err == nil {
				if w.chunks() < 1 || w.length(w.chunks()-1) < 1 || w.length(0) > w.chunk {
					t.Fatalf("%+v", w)
				}
			}
			if e, err := parseError(p, v.chunks(), 100); err == nil && (e.kind == 0 || len(e.text) > 4*maxText) {
				t.Fatalf("%+v", e)
			}
			if _, off, n, err := parseExtentsOrder(p, v); err == nil && (off < 0 || n <= 0 || off+n > v.info.Size) {
				t.Fatalf("extents of %d at %d", n, off)
			}
			if es, err := parseRanges(nil, p, 512, v.info.Size); err == nil {
				at := int64(512)
				for _, e := range es {
					if e.Off != at || e.Len <= 0 || e.End() > v.info.Size {
						t.Fatalf("extent %+v", e)
					}
					at = e.End()
				}
			}
			parseText(p)
			parseWelcome(p)
		}
	})
}

// FuzzHello is what the server reads from somebody it knows only by certificate.
func FuzzHello(f *testing.F) {
	fuzzSeeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := readHello(newFrameReader(bytes.NewReader(b)))
		if err != nil {
			return
		}
		if h.index >= maxBackground || h.role > roleBackground || h.min > h.max || len(h.node) > 4*maxName {
			t.Fatalf("%+v", h)
		}
		if v, err := chooseVersion(h); err == nil && (v < minVersion || v > maxVersion || v < h.min || v > h.max) {
			t.Fatalf("version %d for %+v", v, h)
		}
	})
}

func TestFramesComeBack(t *testing.T) {
	v := volumeInfo{block.Info{Size: 1 << 40, BlockSize: 4096, ID: "x", CanExtents: true, PreferredIO: 1 << 20, ReadOnly: true}, 1 << 20}
	if w, err := parseVolume(appendVolume(nil, v)); err != nil || w != v {
		t.Errorf("%+v, %v", w, err)
	}
	h := hello{min: 1, max: 3, features: 7, session: sessionID{1, 2}, role: roleBackground, index: 3, node: "f1"}
	if g, err := readHello(newFrameReader(bytes.NewReader(appendHello(nil, h)))); err != nil || g != h {
		t.Errorf("%+v, %v", g, err)
	}
	if ver, err := chooseVersion(h); ver != 2 || err != nil {
		t.Errorf("version %d, %v", ver, err)
	}
	long := bytes.Repeat([]byte("x"), 5000)
	b := appendError(nil, 1, 2, wireError{block.KindBusy, []run{{3, 4}}, string(long)})
	hd, p, err := readFrame(newFrameReader(bytes.NewReader(b)))
	if err != nil || hd.req != 2 || hd.volume != 1 {
		t.Fatal(hd, err)
	}
	if e, err := parseError(p, 10, 10); err != nil || e.kind != block.KindBusy || e.runs[0] != (run{3, 4}) || len(e.text) != maxText {
		t.Errorf("%+v, %v", e, err)
	}
	if s := printable([]byte("a\x1b[31m\n\xff")); s != "a?[31m??" {
		t.Errorf("%q", s)
	}
	if err := unknown(header{typ: 0x80 + 5}); err != nil {
		t.Error(err)
	}
	if unknown(header{typ: 0x7f}) == nil {
		t.Error("a frame that must be understood was skipped")
	}
}

// TestQueueAgainstTwin does random things to the queue and to a slice.
func TestQueueAgainstTwin(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	var q queue
	owners := make([]*owner, 4)
	for i := range owners {
		owners[i] = &owner{of: i}
	}
	type twin struct {
		o  *owner
		it *item
	}
	var all []twin // in order, per owner and level
	for step := range 20000 {
		switch rng.IntN(4) {
		case 0, 1:
			o := owners[rng.IntN(4)]
			it := &item{level: uint8(rng.IntN(numLevels)), index: int64(rng.IntN(30)), volume: uint16(rng.IntN(2))}
			front := rng.IntN(4) == 0
			q.push(o, it, front)
			if front {
				all = append([]twin{{o, it}}, all...)
			} else {
				all = append(all, twin{o, it})
			}
		case 2:
			if len(all) == 0 {
				continue
			}
			i := rng.IntN(len(all))
			q.remove(all[i].it)
			all = append(all[:i], all[i+1:]...)
		case 3:
			from := uint8(rng.IntN(numLevels))
			shut := rng.IntN(4)
			most := 1 + rng.IntN(4)
			got := q.take(nil, from, numLevels, func(o *owner, head *item) int {
				if o.of == shut {
					return 0
				}
				return most
			})
			best := uint8(numLevels)
			for _, x := range all {
				if x.o.of != shut && x.it.level >= from {
					best = min(best, x.it.level)
				}
			}
			if best == numLevels {
				if len(got) != 0 {
					t.Fatalf("step %d: took %d of nothing", step, len(got))
				}
				continue
			}
			if len(got) == 0 || got[0].level != best || len(got) > most {
				t.Fatalf("step %d: took %d, first due level %d", step, len(got), best)
			}
			for n, it := range got {
				i := 0
				for i < len(all) && all[i].it != it {
					i++
				}
				o := all[i].o
				for _, x := range all[:i] {
					if x.o == o && x.it.level == best {
						t.Fatalf("step %d: an older one of its owner was left", step)
					}
				}
				if it.in != nil || n > 0 && (it.index != got[n-1].index+1 || it.volume != got[0].volume) {
					t.Fatalf("step %d: item %d of a run is %+v", step, n, it)
				}
				all = append(all[:i], all[i+1:]...)
			}
		}
		if q.n != len(all) || q.waiting(0, numLevels) != len(all) {
			t.Fatalf("step %d: %d items, %d in the twin", step, q.n, len(all))
		}
	}
}

func TestQueueIsFair(t *testing.T) {
	var q queue
	a, b := &owner{of: "a"}, &owner{of: "b"}
	for i := range int64(100) {
		q.push(a, &item{index: i * 2, of: a}, false)
	}
	for i := range int64(3) {
		q.push(b, &item{index: i * 2, of: b}, false)
	}
	n := 0
	for range 6 {
		if q.take(nil, 0, numLevels, func(*owner, *item) int { return 1 })[0].of == b {
			n++
		}
	}
	if n != 3 {
		t.Errorf("the short list had %d of the first 6 turns", n)
	}
}
