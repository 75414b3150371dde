package store

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"testing"

	"forerun/block"
	"forerun/disk/disktest"
	"forerun/internal/chunk"
)

func testKey() chunk.Key {
	var k chunk.Key
	for i := range k {
		k[i] = byte(3*i + 1)
	}
	return k
}

func keyed(k chunk.Key, plain []byte) sample {
	p := chunk.SealUnder(&k, nil, plain, chunk.Zstd)
	p.Data = bytes.Clone(p.Data)
	return sample{p, plain}
}

// TestDomain: a store is one domain. It verifies under its key, and another
// key does not open it, whatever is left of it.
func TestDomain(t *testing.T) {
	for _, left := range []string{"everything", "no map", "never closed"} {
		fs := disktest.New(1)
		o := tiny()
		o.Key, o.Verify = testKey(), true
		s := mustOpen(t, fs, o)
		var in []sample
		for _, x := range samples()[:60] {
			in = append(in, keyed(o.Key, x.plain))
		}
		for _, x := range in {
			mustPut(t, s, x, true)
			dst := make([]byte, len(x.plain))
			if err := s.Get(x.Sig, dst); err != nil || !bytes.Equal(dst, x.plain) {
				t.Fatal(err)
			}
		}
		_, err := s.Put(samples()[0].Packed)
		wantKind(t, err, block.KindCorrupt)
		switch left {
		case "never closed":
			if err := s.Sync(); err != nil {
				t.Fatal(err)
			}
			fs = fs.Kill()
			abandon(s)
		default:
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if left == "no map" {
			names, err := fs.List("/s/map")
			if err != nil {
				t.Fatal(err)
			}
			for _, n := range names {
				if err := fs.Remove("/s/map/" + n); err != nil {
					t.Fatal(err)
				}
			}
		}
		other := o
		other.Key[0]++
		for _, wrong := range []Options{tiny(), other} {
			_, err := Open(fs, "/s", wrong)
			wantKind(t, err, block.KindInvalid)
		}
		s = mustOpen(t, fs, o)
		for _, x := range in {
			mustPut(t, s, x, false)
			if err := s.Get(x.Sig, make([]byte, len(x.plain))); err != nil {
				t.Fatalf("%s: %v", left, err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestReadsVersion1: a store from before there were keys is one of the common domain.
func TestReadsVersion1(t *testing.T) {
	for _, withMap := range []bool{true, false} {
		fs := disktest.New(1)
		for name, b := range closedStore(t, 6, Options{inline: true}) {
			le := binary.LittleEndian
			seal := func(b []byte, at int) { le.PutUint32(b[at:], crc32.Checksum(b[:at], castagnoli)) }
			switch {
			case name == "/s/map/MAP":
				le.PutUint32(b[4:], 1)
				b = append(b[:manifestHeader1:manifestHeader1], b[manifestHeader:]...)
				seal(b, len(b)-4)
			case name == "/s/packs/00000001.pack":
				le.PutUint32(b[4:], 1)
				copy(b[32:40], "reserved") // was not looked at
				seal(b, 60)
			}
			if withMap || name == "/s/packs/00000001.pack" {
				writeAll(t, fs, name, b)
			}
		}
		s := mustOpen(t, fs, Options{inline: true})
		for i := range 6 {
			mustGet(t, s, small(i))
		}
		mustPut(t, s, small(7), true)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = mustOpen(t, fs, Options{inline: true})
		mustGet(t, s, small(7))
		s.Close()
		_, err := Open(fs, "/s", Options{Key: testKey(), inline: true})
		wantKind(t, err, block.KindInvalid)
	}
}
