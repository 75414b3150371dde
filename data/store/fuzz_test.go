package store

import (
	"bytes"
	"hash/crc32"
	"testing"

	"forerun/data/store/internal/runs"
	"forerun/disk/disktest"
	"forerun/internal/chunk"
)

// FuzzScan: whatever a pack holds, a scan ends, stays inside, and yields only
// records whose checksums hold.
func FuzzScan(f *testing.F) {
	var id storeID
	salt := saltOf(id, 1)
	var pack []byte
	head := make([]byte, packHeader)
	putPackHeader(head, id, chunk.KeyID{}, 1)
	pack = append(pack, head...)
	for i := range 4 {
		x := small(i)
		b := make([]byte, recordSize(len(x.Data)))
		putRecord(b, salt, &x.Sig, runs.Loc{Pack: 1, Len: uint32(len(x.Data)), Plain: uint32(x.Plain), Codec: x.Codec, Algo: 1,
			CRC: crc32.Checksum(x.Data, castagnoli)}, x.Data)
		pack = append(pack, b...)
	}
	f.Add(pack)
	f.Add(pack[:len(pack)-9])
	f.Add(append(bytes.Clone(pack[:300]), pack[100:]...))
	f.Add(pack[packHeader+13:])
	f.Fuzz(func(t *testing.T, b []byte) {
		parsePackHeader(b, 1)
		size, last := int64(len(b)), int64(0)
		sc, err := scan(bytes.NewReader(b), size, 0, salt, 1, make([]byte, len(b)), func(e runs.Entry, data []byte) error {
			if e.At() < last || e.At()+recordHeader+int64(e.Len) > size {
				t.Fatalf("record at %d with %d bytes, after %d, in %d bytes", e.At(), e.Len, last, size)
			}
			if crc32.Checksum(data, castagnoli) != e.CRC || !bytes.Equal(data, b[e.At()+recordHeader:][:e.Len]) {
				t.Fatal("a payload that does not match")
			}
			last = e.At() + recordHeader + int64(e.Len)
			return nil
		})
		if err != nil || sc.End > size || sc.Unreadable {
			t.Fatalf("%+v %v", sc, err)
		}
	})
}

// FuzzOpenPack opens a store around whatever is in its only pack. A store's id is
// random, so run it with -fuzzminimizetime 10x: minimizing does not converge.
func FuzzOpenPack(f *testing.F) {
	for name, b := range closedStore(f, 3, Options{inline: true}) {
		if name == "/s/packs/00000001.pack" {
			f.Add(b)
			f.Add(b[:len(b)-1])
			f.Add(append(b, b[packHeader:]...))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		fs := disktest.New(1)
		writeAll(t, fs, "/s/packs/00000001.pack", b)
		s, err := Open(fs, "/s", Options{inline: true})
		if err != nil {
			return
		}
		defer s.Close()
		for i := range 3 {
			if _, err := s.Put(small(i).Packed); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 3 {
			// A crafted record can hold other bytes under a signature: they are refused.
			if err := check(s, small(i)); err != nil {
				if _, err := s.Put(small(i).Packed); err != nil {
					t.Fatal(err)
				}
				mustGet(t, s, small(i))
			}
		}
	})
}

// FuzzManifest: parse and marshal agree.
func FuzzManifest(f *testing.F) {
	m := &manifest{key: chunk.KeyID{1, 2, 3}, gen: 3, nextRun: 9, nextPack: 4, pos: position{3, 640}, runs: []uint32{8, 2},
		packs: []packState{{1, 99, tally{1, 2, 3}}, {3, 640, tally{4, 5, 6}}}, building: true}
	f.Add(m.marshal())
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		for range 2 {
			if m, err := parseManifest(b); err == nil {
				if n, err := parseManifest(m.marshal()); err != nil || len(n.runs) != len(m.runs) || len(n.packs) != len(m.packs) || n.pos != m.pos || n.key != m.key {
					t.Fatalf("%+v became %+v: %v", m, n, err)
				}
			}
			if len(b) < 4 {
				return
			}
			// Past the checksum, which chance does not find.
			b = bytes.Clone(b)
			n := len(b) - 4
			c := crc32.Checksum(b[:n], castagnoli)
			b[n], b[n+1], b[n+2], b[n+3] = byte(c), byte(c>>8), byte(c>>16), byte(c>>24)
		}
	})
}
