package chunk

import (
	"bytes"
	"sync"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// Level says how much time packing may take. A higher one takes longer and
// gives fewer bytes.
type Level uint8

// The levels, with what each makes of 64 KiB chunks of a Debian guest, in
// bytes, and how much one 2.3 GHz core packs in a second.
const (
	Plain Level = iota // nothing is packed
	Quick              // S2: 49 %, 770 MB
	Fast               // zstd, its fastest: 39 %, 200 MB
	Good               // zstd, its default, with branches: 35.7 %, 160 MB
	Tight              // zstd of our own, with branches: 33.7 %, 85 MB
	levels
)

var levelNames = [...]string{"plain", "quick", "fast", "good", "tight"}

// String is the level's name.
func (l Level) String() string {
	if l < levels {
		return levelNames[l]
	}
	return "unknown"
}

// encoders serve all goroutines: EncodeAll is safe for concurrent use and keeps
// a pool of its own. SpeedBestCompression is not among them: it has been
// found to make frames that give other bytes.
var encoders = [...]func() *zstd.Encoder{
	Fast: encoderOf(zstd.SpeedFastest),
	Good: encoderOf(zstd.SpeedDefault),
}

func encoderOf(l zstd.EncoderLevel) func() *zstd.Encoder {
	return sync.OnceValue(func() *zstd.Encoder {
		e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(l), zstd.WithEncoderCRC(false),
			zstd.WithWindowSize(MaxSize), zstd.WithZeroFrames(true))
		if err != nil {
			panic(err) // the options are constants
		}
		return e
	})
}

var tights = sync.Pool{New: func() any { return new(tight) }}

// scratches hold a chunk with its branches rewritten, or one opened for a check.
var scratches = sync.Pool{New: func() any { return new([]byte) }}

func scratchOf(n int) *[]byte {
	b := scratches.Get().(*[]byte)
	if cap(*b) < n {
		*b = make([]byte, n)
	}
	*b = (*b)[:n]
	return b
}

// Squeeze packs plain at a level into buf's space (buf may be nil; it is grown
// as needed and its content overwritten) and says by which codec. When
// packing does not pay the codec is Raw and what is returned is plain itself.
func Squeeze(buf, plain []byte, l Level) (Codec, []byte) {
	if l > Fast && !Compressible(plain) {
		l = Fast // which finds out soon, and loses little if it was not so
	}
	codec, out := Zstd, []byte(nil)
	switch l {
	case Quick:
		codec, out = S2, s2.Encode(buf[:cap(buf)], plain)
	case Fast:
		out = encoders[Fast]().EncodeAll(plain, buf[:0])
	case Good, Tight:
		b := scratchOf(len(plain))
		defer scratches.Put(b)
		copy(*b, plain)
		if branches(*b, true) >= len(plain)/codeShare {
			codec = Branch
		} else {
			copy(*b, plain)
		}
		out = zstdOf(buf, *b, l)
	default:
		return Raw, plain
	}
	if len(out) >= len(plain)-len(plain)/minGain {
		return Raw, plain
	}
	return codec, out
}

// zstdOf packs p at Good or Tight.
func zstdOf(buf, p []byte, l Level) []byte {
	if l == Tight {
		t := tights.Get().(*tight)
		out := t.encode(buf[:0], p)
		tights.Put(t)
		// What was sealed wrong would be refused by every receiver for ever, so
		// our own encoder is held to what a decoder that many use makes of it.
		// That takes a twentieth of its time.
		b := scratchOf(len(p))
		defer scratches.Put(b)
		got, err := decoder().DecodeAll(out, (*b)[:0])
		if err == nil && bytes.Equal(got, p) {
			return out
		}
		buf = out
	}
	return encoders[Good]().EncodeAll(p, buf[:0])
}

// probes samples of probeBytes each are what Compressible looks at.
const probes, probeBytes = 32, 64

// Compressible says whether packing is likely to pay, by the frequency of
// bytes in a sample: of 2 KiB, in 64 KiB. Packed and encrypted data is told
// from other in about a microsecond. It can take bytes for incompressible that
// repeat over a long distance and look like noise.
func Compressible(plain []byte) bool {
	if len(plain) < 2*probes*probeBytes {
		return true
	}
	var count [256]uint16
	step := (len(plain) - probeBytes) / (probes - 1)
	for i := range probes {
		for _, b := range plain[i*step:][:probeBytes] {
			count[b]++
		}
	}
	// How many pairs of equal bytes are there? Noise has few; a skewed distribution, many.
	pairs := 0
	for _, c := range count {
		pairs += int(c) * int(c)
	}
	const n = probes * probeBytes
	noise := n + n*n/256
	return pairs > noise+noise/16
}

// LevelOf is the level that makes a codec by itself.
func LevelOf(c Codec) Level {
	switch c {
	case S2:
		return Quick
	case Zstd:
		return Fast
	case Branch:
		return Good
	}
	return Plain
}
