package volume

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"

	"forerun/block"
)

// The parts of a snapshot; FORMAT.md has the offsets.
const (
	mapMagic     = "FRVMAPS1"
	mapVersion   = 1
	mapFixed     = 40
	pageHead     = 16
	pageUniform  = 1
	pageExplicit = 2
	pageEnd      = math.MaxUint32
)

func encodeMapHeader(id identity, gen uint64) []byte {
	b := make([]byte, mapFixed, mapFixed+len(id.source)+4)
	copy(b, mapMagic)
	le := binary.LittleEndian
	le.PutUint32(b[8:], mapVersion)
	le.PutUint32(b[12:], uint32(mapFixed+len(id.source)+4))
	le.PutUint64(b[16:], gen)
	le.PutUint64(b[24:], uint64(id.size))
	le.PutUint32(b[32:], uint32(id.chunkBytes))
	le.PutUint32(b[36:], uint32(len(id.source)))
	b = append(b, id.source...)
	return le.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// writeSnapshot writes the map as it is to w, a page at a time.
func (t *table) writeSnapshot(w io.Writer, id identity, gen uint64) error {
	if _, err := w.Write(encodeMapHeader(id, gen)); err != nil {
		return err
	}
	var b []byte
	count := uint32(0)
	for pi := range t.pages {
		if t.pages[pi].Load() == nil {
			continue
		}
		b = t.encodePage(b[:0], pi)
		if _, err := w.Write(b); err != nil {
			return err
		}
		count++
	}
	b = append(b[:0], make([]byte, pageHead)...)
	binary.LittleEndian.PutUint32(b, pageEnd)
	binary.LittleEndian.PutUint32(b[8:], count)
	_, err := w.Write(binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli)))
	return err
}

func (t *table) encodePage(b []byte, pi int) []byte {
	le := binary.LittleEndian
	p := t.pages[pi].Load()
	if p != t.zero {
		p.mu.Lock()
		defer p.mu.Unlock()
	}
	b = append(b, make([]byte, pageHead)...)
	le.PutUint32(b, uint32(pi))
	n := t.pageLen(pi)
	if s, ok := p.uniform(n); ok {
		b[4], b[5] = pageUniform, s
		return le.AppendUint32(b, crc32.Checksum(b, castagnoli))
	}
	b[4] = pageExplicit
	for w := range p.state {
		v := p.state[w].Load()
		if w >= n>>4 { // chunks beyond the end of the volume
			v &= 1<<(uint(max(n-w<<4, 0))*4) - 1
		}
		b = le.AppendUint64(b, v)
	}
	if words := p.coarse.Load(); words != nil {
		le.PutUint32(b[8:], uint32(len(*words)))
		for _, w := range *words {
			b = le.AppendUint64(b, w)
		}
	}
	le.PutUint32(b[12:], uint32(len(p.fine)))
	for k, m := range p.fine {
		b = append(le.AppendUint32(b, k), m)
	}
	return le.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// uniform says whether the n chunks of p are all in the same state, one
// without a partial mask, and which.
func (p *page) uniform(n int) (uint8, bool) {
	s := p.nib(0)
	if s&nibMod != 0 && s&nibFull == 0 {
		return 0, false
	}
	word := uint64(s) * 0x1111111111111111
	for w := range n >> 4 {
		if p.state[w].Load() != word {
			return 0, false
		}
	}
	for c := n &^ 15; c < n; c++ {
		if p.nib(c) != s {
			return 0, false
		}
	}
	return s, true
}

func corrupt(format string, args ...any) error {
	return block.E("volume.map", "", block.KindCorrupt, fmt.Errorf(format, args...))
}

// readSnapshot fills an empty table from a snapshot and returns its generation. A
// snapshot of another volume is KindInvalid, a damaged one KindCorrupt.
func (t *table) readSnapshot(r io.Reader, id identity) (gen uint64, err error) {
	br := bufio.NewReaderSize(r, 1<<18)
	le := binary.LittleEndian
	head := make([]byte, mapFixed)
	if _, err := io.ReadFull(br, head); err != nil {
		return 0, cut(err, "header")
	}
	n := le.Uint32(head[36:])
	if string(head[:8]) != mapMagic || n > maxSourceID || le.Uint32(head[12:]) != mapFixed+n+4 {
		return 0, corrupt("the file does not begin as a map")
	}
	rest := make([]byte, n+4)
	if _, err := io.ReadFull(br, rest); err != nil {
		return 0, cut(err, "header")
	}
	head = append(head, rest...)
	if crc32.Checksum(head[:len(head)-4], castagnoli) != le.Uint32(head[len(head)-4:]) {
		return 0, corrupt("the header of the map does not match its checksum")
	}
	if v := le.Uint32(head[8:]); v != mapVersion {
		return 0, block.E("volume.map", "", block.KindUnsupported, fmt.Errorf("the map has version %d, this program reads %d", v, mapVersion))
	}
	if err := id.matches(int64(le.Uint64(head[24:])), int(le.Uint32(head[32:])), string(rest[:n])); err != nil {
		return 0, block.E("volume.map", "", block.KindInvalid, err)
	}
	for count, next := uint32(0), 0; ; count++ {
		pi, done, err := t.readPage(br, count, next)
		if done || err != nil {
			return le.Uint64(head[16:]), err
		}
		next = pi + 1
	}
}

func (id identity) matches(size int64, chunkBytes int, source string) error {
	switch {
	case size != id.size:
		return fmt.Errorf("the directory holds a volume of %d bytes, asked for is one of %d; use another directory, or the size it was made for", size, id.size)
	case chunkBytes != id.chunkBytes:
		return fmt.Errorf("the directory holds a volume with chunks of %d bytes, asked for are %d; use another directory, or the chunk size it was made for", chunkBytes, id.chunkBytes)
	case source != id.source:
		return fmt.Errorf("the directory holds a volume of source %q, asked for is %q; the source disk may have been swapped", source, id.source)
	}
	return nil
}

func cut(err error, what string) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return corrupt("the map ends inside a %s", what)
	}
	return block.E("volume.map", "", 0, err)
}

// readPage reads one page record, or the end.
func (t *table) readPage(r io.Reader, count uint32, next int) (pi int, done bool, err error) {
	le := binary.LittleEndian
	b := make([]byte, pageHead, pageHead+pageWords*8+4)
	if _, err := io.ReadFull(r, b); err != nil {
		return 0, false, cut(err, "page")
	}
	index, coarse, fine := le.Uint32(b), le.Uint32(b[8:]), le.Uint32(b[12:])
	kind := b[4]
	body := 0
	switch {
	case index == pageEnd && kind == 0:
		if coarse != count {
			return 0, false, corrupt("the map says it has %d pages and has %d", coarse, count)
		}
	case index >= uint32(len(t.pages)) || int(index) < next:
		return 0, false, corrupt("the map has page %d where one of %d to %d was due", index, next, len(t.pages)-1)
	case kind == pageUniform && coarse == 0 && fine == 0:
	case kind == pageExplicit && (coarse == 0 || int(coarse) == pageChunks*t.blocks/64) &&
		int64(fine) <= int64(coarse)*64:
		body = pageWords*8 + int(coarse)*8 + int(fine)*5
	default:
		return 0, false, corrupt("page %d of the map is of an unknown kind", index)
	}
	b = append(b, make([]byte, body+4)...)
	if _, err := io.ReadFull(r, b[pageHead:]); err != nil {
		return 0, false, cut(err, "page")
	}
	if crc32.Checksum(b[:len(b)-4], castagnoli) != le.Uint32(b[len(b)-4:]) {
		return 0, false, corrupt("page %d of the map does not match its checksum", index)
	}
	if index == pageEnd {
		return 0, true, nil
	}
	return int(index), false, t.fillPage(int(index), kind, b[5], b[pageHead:len(b)-4], int(coarse), int(fine))
}

func (t *table) fillPage(pi int, kind, s uint8, b []byte, coarse, fine int) error {
	n := t.pageLen(pi)
	if kind == pageUniform {
		if !validState(s) || s&nibMod != 0 && s&nibFull == 0 {
			return corrupt("page %d of the map has chunks in state %d", pi, s)
		}
		if s == baseZero {
			t.pages[pi].Store(t.zero)
			return nil
		}
		p := new(page)
		for c := range n {
			p.setNib(c, s)
		}
		t.pages[pi].Store(p)
		return nil
	}
	le := binary.LittleEndian
	p := new(page)
	for w := range p.state {
		p.state[w].Store(le.Uint64(b[w*8:]))
	}
	b = b[pageWords*8:]
	if coarse > 0 {
		words := make([]uint64, coarse)
		for w := range words {
			words[w] = le.Uint64(b[w*8:])
		}
		p.coarse.Store(&words)
		b = b[coarse*8:]
	}
	for ; fine > 0; fine-- {
		if p.fine == nil {
			p.fine = make(map[uint32]uint8, fine)
		}
		k, m := le.Uint32(b), b[4]
		if int64(k) >= int64(n*t.blocks) || m == 0 || m == 0xff {
			return corrupt("page %d of the map has block %d written in part as %#x", pi, k, m)
		}
		p.fine[k] = m
		b = b[5:]
	}
	p.nfine.Store(int32(len(p.fine)))
	for c := range pageChunks {
		s := p.nib(c)
		if c >= n && s != 0 || !validState(s) {
			return corrupt("page %d of the map has a chunk in state %d", pi, s)
		}
		if s&(nibMod|nibFull) == nibMod {
			i := int64(pi)<<pageShift + int64(c)
			if coarse == 0 {
				return corrupt("chunk %d of the map is written in part and has no mask", i)
			}
			if k := t.partly(p, i); k == 0 || k == t.sectors(i) {
				return corrupt("chunk %d of the map is written in part and has %d sectors written", i, k)
			}
		}
	}
	t.pages[pi].Store(p)
	return nil
}

func validState(s uint8) bool {
	return s < 16 && s&baseMask != 3 && (s&nibFull == 0 || s&nibMod != 0)
}
