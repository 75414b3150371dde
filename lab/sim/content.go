package sim

import (
	"encoding/binary"
	"fmt"
)

// Sector is the unit of histories, in bytes.
const Sector = 512

const magic = 0x6d69736672 // "frsim"

func mix(x uint64) uint64 { // splitmix64
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// stamp fills one sector with the content of a write: it names volume, sector
// and write, and the rest follows from them. Write 0 is the untouched disk.
func stamp(p []byte, vol int, sector int64, id int) {
	le := binary.LittleEndian
	le.PutUint64(p, magic)
	le.PutUint64(p[8:], uint64(vol))
	le.PutUint64(p[16:], uint64(sector))
	le.PutUint64(p[24:], uint64(id))
	x := mix(uint64(vol)<<56 ^ uint64(sector)<<32 ^ uint64(id))
	for i := 32; i < Sector; i += 8 {
		le.PutUint64(p[i:], x)
		x += 0x9e3779b97f4a7c15
	}
}

// unstamp says which write a sector's bytes are of: zero is all zeros, and err
// says what else they are when they are of none.
func unstamp(p []byte, vol int, sector int64) (id int, zero bool, err error) {
	le := binary.LittleEndian
	if le.Uint64(p) != magic {
		for _, b := range p {
			if b != 0 {
				return 0, false, fmt.Errorf("foreign bytes, first %x", p[:16])
			}
		}
		return 0, true, nil
	}
	v, s, id := int(le.Uint64(p[8:])), int64(le.Uint64(p[16:])), int(le.Uint64(p[24:]))
	x := mix(uint64(v)<<56 ^ uint64(s)<<32 ^ uint64(id))
	for i := 32; i < Sector; i += 8 {
		if le.Uint64(p[i:]) != x {
			return 0, false, fmt.Errorf("a torn sector, write %d in front", id)
		}
		x += 0x9e3779b97f4a7c15
	}
	if v != vol || s != sector {
		return 0, false, fmt.Errorf("write %d of sector %d of volume %d", id, s, v)
	}
	return id, false, nil
}

// untouched is the content of a volume that nobody wrote.
func untouched(vol int, size int64) []byte {
	p := make([]byte, size)
	for s := int64(0); s < size/Sector; s++ {
		stamp(p[s*Sector:][:Sector], vol, s, 0)
	}
	return p
}
