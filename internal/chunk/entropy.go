package chunk

import (
	"encoding/binary"
	"math"
	"math/bits"

	"github.com/klauspost/compress/huff0"
)

// Codes of zstd sequences (RFC 8878, section 3.1.1.3.2.1): what each stands
// for at least, and how many bits follow to say how much more.
var (
	litBase   = [36]uint32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 24, 28, 32, 40, 48, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536}
	litBits   = [36]uint8{16: 1, 1, 1, 1, 2, 2, 3, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}
	matchBase = [53]uint32{3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 37, 39, 41, 43, 47, 51, 59, 67, 83, 99, 131, 259, 515, 1027, 2051, 4099, 8195, 16387, 32771, 65539}
	matchBits = [53]uint8{32: 1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}

	// The distributions that need no description, in the order of a block's
	// tables: literal lengths, offsets, match lengths.
	usual = [3][]int16{
		{4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 2, 1, 1, 1, 1, 1, -1, -1, -1, -1},
		{1, 1, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1},
		{1, 4, 3, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1},
	}
	usualLog = [3]uint8{6, 5, 6}
	mostLog  = [3]uint8{9, 8, 9}

	litCodes   = codesOf(litBase[:], 64)
	matchCodes = codesOf(matchBase[:], 131)
)

// codesOf tables the codes of the values below limit.
func codesOf(base []uint32, limit int) []uint8 {
	t := make([]uint8, limit)
	for v := range t {
		for c, b := range base {
			if uint32(v) >= b {
				t[v] = uint8(c)
			}
		}
	}
	return t
}

func litCode(n uint32) uint8 {
	if n < uint32(len(litCodes)) {
		return litCodes[n]
	}
	return uint8(bits.Len32(n)-1) + 19
}

func matchCode(n uint32) uint8 {
	if n < uint32(len(matchCodes)) {
		return matchCodes[n]
	}
	return uint8(bits.Len32(n-3)-1) + 36
}

// bitWriter appends bits, the first ones lowest.
type bitWriter struct {
	out []byte
	acc uint64
	n   uint
}

// add appends the low n bits of v, at most 32.
func (w *bitWriter) add(v uint32, n uint8) {
	w.acc |= uint64(v&(1<<n-1)) << w.n
	if w.n += uint(n); w.n >= 32 {
		w.out = binary.LittleEndian.AppendUint32(w.out, uint32(w.acc))
		w.acc >>= 32
		w.n -= 32
	}
}

// flush appends what is left, filled up with zero bits.
func (w *bitWriter) flush() []byte {
	for ; w.n > 0; w.n -= min(w.n, 8) {
		w.out = append(w.out, byte(w.acc))
		w.acc >>= 8
	}
	return w.out
}

// block appends the literals and sequences of a compressed block.
func (t *tight) block(dst []byte) []byte {
	dst = t.literals(dst)
	n := len(t.seqs)
	switch {
	case n == 0:
		return append(dst, 0)
	case n < 128:
		dst = append(dst, byte(n))
	case n < 0x7f00:
		dst = append(dst, byte(n>>8)+128, byte(n))
	default:
		dst = append(dst, 255, byte(n-0x7f00), byte((n-0x7f00)>>8))
	}
	for k := range t.codes {
		if cap(t.codes[k]) < n {
			t.codes[k] = make([]byte, n, 2*n)
		}
		t.codes[k] = t.codes[k][:n]
	}
	for i, s := range t.seqs {
		t.codes[0][i] = litCode(s.lit)
		t.codes[1][i] = uint8(bits.Len32(s.off) - 1)
		t.codes[2][i] = matchCode(s.match)
	}
	mode := len(dst)
	dst = append(dst, 0)
	for k := range t.codes {
		var m byte
		dst, m = t.fse[k].choose(dst, t.codes[k], usual[k], usualLog[k], mostLog[k])
		dst[mode] |= m << (6 - 2*k)
	}
	return t.sequences(dst)
}

// sequences appends the bits of all sequences, from the last to the first, as
// they are read backwards.
func (t *tight) sequences(dst []byte) []byte {
	w := bitWriter{out: dst}
	ll, of, ml := &t.fse[0], &t.fse[1], &t.fse[2]
	for i := len(t.seqs) - 1; i >= 0; i-- {
		s := &t.seqs[i]
		lc, oc, mc := t.codes[0][i], t.codes[1][i], t.codes[2][i]
		if i == len(t.seqs)-1 {
			ml.first(mc)
			of.first(oc)
			ll.first(lc)
		} else {
			of.put(&w, oc)
			ml.put(&w, mc)
			ll.put(&w, lc)
		}
		w.add(s.lit-litBase[lc], litBits[lc])
		w.add(s.match-matchBase[mc], matchBits[mc])
		w.add(s.off, oc)
	}
	w.add(ml.state, ml.log)
	w.add(of.state, of.log)
	w.add(ll.state, ll.log)
	w.add(1, 1)
	return w.flush()
}

// literals appends the section with the literals, by Huffman codes if that is
// shorter.
func (t *tight) literals(dst []byte) []byte {
	lits := t.lits
	n := uint32(len(lits))
	if len(lits) >= 32 {
		t.huff.Reuse = huff0.ReusePolicyNone
		var out []byte
		var err error
		single := len(lits) < 256
		if single {
			out, _, err = huff0.Compress1X(lits, &t.huff)
		} else {
			out, _, err = huff0.Compress4X(lits, &t.huff)
		}
		switch m := uint32(len(out)); {
		case err == huff0.ErrUseRLE:
			return append(litHeader(dst, 1, n), lits[0])
		case err == nil && m+5 < n:
			switch {
			case single:
				h := 2 | n<<4 | m<<14
				dst = append(dst, byte(h), byte(h>>8), byte(h>>16))
			case n < 1<<10:
				h := 2 | 1<<2 | n<<4 | m<<14
				dst = append(dst, byte(h), byte(h>>8), byte(h>>16))
			case n < 1<<14:
				dst = binary.LittleEndian.AppendUint32(dst, 2|2<<2|n<<4|m<<18)
			default:
				h := 2 | 3<<2 | uint64(n)<<4 | uint64(m)<<22
				dst = append(binary.LittleEndian.AppendUint32(dst, uint32(h)), byte(h>>32))
			}
			return append(dst, out...)
		}
	}
	return append(litHeader(dst, 0, n), lits...)
}

// litHeader appends the header of raw (0) or repeated (1) literals.
func litHeader(dst []byte, kind, n uint32) []byte {
	switch {
	case n < 1<<5:
		return append(dst, byte(kind|n<<3))
	case n < 1<<12:
		return binary.LittleEndian.AppendUint16(dst, uint16(kind|1<<2|n<<4))
	}
	h := kind | 3<<2 | n<<4
	return append(dst, byte(h), byte(h>>8), byte(h>>16))
}

// fseTable encodes one kind of code by finite state entropy (RFC 8878, section 4.1).
type fseTable struct {
	log    uint8
	state  uint32
	single bool // there is one code only, which takes no bits
	norm   [53]int16
	next   [1 << 9]uint16
	delta  [53]struct {
		bits  uint32 // that a state gives off, times 1<<16, less where one fewer begins
		state int32
	}
}

// choose takes the cheapest way to describe codes, appends the description, if
// it has one, to dst, and returns its mode.
func (f *fseTable) choose(dst []byte, codes []byte, usual []int16, usualLog, mostLog uint8) ([]byte, byte) {
	var count [53]uint32
	most := 0
	for _, c := range codes {
		count[c]++
		most = max(most, int(c))
	}
	total := uint32(len(codes))
	f.single = false
	if count[most] == total {
		f.single, f.log, f.state = true, 0, 0
		return append(dst, byte(most)), 1
	}
	plain := math.Inf(1)
	if most < len(usual) {
		plain = price(count[:most+1], usual, usualLog)
	}
	log := uint8(min(max(bits.Len32(total-1)-2, 5), int(mostLog)))
	if total > 1 {
		log = max(log, uint8(bits.Len(uint(most))))
		log = min(log, mostLog)
	}
	f.log = log
	normalize(f.norm[:most+1], count[:most+1], total, log)
	at := len(dst)
	dst = describe(dst, f.norm[:most+1], log)
	if own := price(count[:most+1], f.norm[:most+1], log) + 8*float64(len(dst)-at); own < plain {
		f.build(f.norm[:most+1])
		return dst, 2
	}
	f.log = usualLog
	f.build(usual)
	return dst[:at], 0
}

// price is how many bits codes with these counts take under a distribution.
func price(count []uint32, norm []int16, log uint8) (sum float64) {
	for s, c := range count {
		if c > 0 {
			p := norm[s]
			if p < 0 {
				p = 1
			}
			sum += float64(c) * (float64(log) - math.Log2(float64(p)))
		}
	}
	return sum
}

// normalize scales counts so that they add up to 1<<log, none to nothing.
func normalize(norm []int16, count []uint32, total uint32, log uint8) {
	size := int32(1) << log
	left := size
	for s, c := range count {
		norm[s] = 0
		if c > 0 {
			n := max(int16((uint64(c)<<log+uint64(total)/2)/uint64(total)), 1)
			norm[s] = n
			left -= int32(n)
		}
	}
	// Each step goes where it costs, or gains, most.
	for ; left != 0; left -= sign(left) {
		best, bestGain := -1, math.Inf(-1)
		for s, c := range count {
			n := norm[s]
			if c == 0 || left < 0 && n == 1 {
				continue
			}
			gain := float64(c) * math.Log2(float64(int32(n)+sign(left))/float64(n))
			if gain > bestGain {
				best, bestGain = s, gain
			}
		}
		norm[best] += int16(sign(left))
	}
}

func sign(v int32) int32 {
	if v < 0 {
		return -1
	}
	return 1
}

// describe appends a distribution (RFC 8878, section 4.1.1).
func describe(dst []byte, norm []int16, log uint8) []byte {
	w := bitWriter{out: dst}
	w.add(uint32(log-5), 4)
	left := int32(1)<<log + 1 // and one more
	size := int32(1) << log
	width := log + 1
	for s := 0; left > 1; {
		c := int32(norm[s])
		s++
		spare := 2*size - 1 - left
		left -= max(c, -c)
		v := c + 1
		if v >= size {
			v += spare
		}
		n := width
		if v < spare {
			n--
		}
		w.add(uint32(v), n)
		for left < size {
			width--
			size >>= 1
		}
		if c != 0 || left <= 1 {
			continue
		}
		zeros := 0
		for norm[s] == 0 {
			s++
			zeros++
		}
		for ; zeros >= 3; zeros -= 3 {
			w.add(3, 2)
		}
		w.add(uint32(zeros), 2)
	}
	return w.flush()
}

// build makes the encoding table of a distribution with f.log.
func (f *fseTable) build(norm []int16) {
	size := 1 << f.log
	var at [54]uint16
	var spread [1 << 9]uint8
	high := size - 1
	for s, n := range norm {
		if n < 0 {
			at[s+1] = at[s] + 1
			spread[high] = uint8(s)
			high--
		} else {
			at[s+1] = at[s] + uint16(n)
		}
	}
	step, pos := size>>1+size>>3+3, 0
	for s, n := range norm {
		for range n {
			spread[pos] = uint8(s)
			for pos = (pos + step) & (size - 1); pos > high; {
				pos = (pos + step) & (size - 1)
			}
		}
	}
	place := at
	for u := range size {
		s := spread[u]
		f.next[place[s]] = uint16(size + u)
		place[s]++
	}
	for s, n := range norm {
		d := &f.delta[s]
		switch n {
		case 0:
			d.bits, d.state = 0, 0
		case -1, 1:
			d.bits = uint32(f.log)<<16 - uint32(size)
			d.state = int32(at[s]) - 1
		default:
			most := uint32(f.log) - uint32(bits.Len16(uint16(n-1))-1)
			d.bits = most<<16 - uint32(n)<<most
			d.state = int32(at[s]) - int32(n)
		}
	}
}

// first sets the state for the last code.
func (f *fseTable) first(c uint8) {
	if f.single {
		return
	}
	d := &f.delta[c]
	n := (d.bits + 1<<15) >> 16
	f.state = uint32(f.next[int32((n<<16-d.bits)>>n)+d.state])
}

// put adds the bits that lead from the state to that of the code before.
func (f *fseTable) put(w *bitWriter, c uint8) {
	if f.single {
		return
	}
	d := &f.delta[c]
	n := (f.state + d.bits) >> 16
	w.add(f.state, uint8(n))
	f.state = uint32(f.next[int32(f.state>>n)+d.state])
}
