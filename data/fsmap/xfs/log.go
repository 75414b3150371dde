package xfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"forerun/data/fsmap/internal/layout"
)

// The log is a ring of 512-byte blocks. The first word of each block is the
// number of the lap in which it was written, and a block that begins a record
// has a mark there and the lap after it. So before the head all blocks have
// lap n, and from the head on n-1, or zero in the first lap.
//
// A clean log has at its head one record of one operation, "unmount". As much
// as a kernel may have had in flight at once is looked at on both sides of the
// head: one block of another lap there means that something was under way.
const (
	logBlock     = 512
	recordMagic  = 0xfeedbabe
	recordMost   = 256<<10/logBlock + 8 // blocks of the largest record and its headers
	inFlight     = 8 * 256 << 10 / logBlock
	headerCycles = 32 << 10  // bytes of data that one header block has the words of
	zeroLogMost  = 128 << 20 // bytes: a longer log is not read whole
	opUnmount    = 0x20
	opLogClient  = 0xaa
	sumAtRecord  = 32
	maxLogBlocks = 1 << 32 // of 512 bytes
)

// logRing is the log as a ring.
type logRing struct {
	*fs
	n int64 // blocks of 512 bytes
}

func (l *logRing) read(b []byte, at int64) error {
	return layout.Read(l.r, b, l.logStart*l.block+at*logBlock)
}

// lap is the lap of a block.
func lap(b []byte) uint32 {
	if v := be.Uint32(b); v != recordMagic {
		return v
	}
	return be.Uint32(b[4:])
}

func (l *logRing) lapAt(at int64) (uint32, error) {
	var b [logBlock]byte
	err := l.read(b[:], at)
	return lap(b[:]), err
}

// laps says whether all blocks of [from, to) have the lap; none when the range is empty.
func (l *logRing) laps(from, to int64, want uint32) (bool, error) {
	b := make([]byte, 128*logBlock)
	for from < to {
		p := b[:min(int64(len(b)), (to-from)*logBlock)]
		if err := l.read(p, from); err != nil {
			return false, err
		}
		for i := 0; i < len(p); i += logBlock {
			if lap(p[i:]) != want {
				return false, nil
			}
		}
		from += int64(len(p) / logBlock)
	}
	return true, nil
}

// cleanLog is nil when the log says that the file system was unmounted cleanly.
func (f *fs) cleanLog() error {
	l := &logRing{f, f.logBlocks * (f.block / logBlock)}
	if l.n > maxLogBlocks {
		return fmt.Errorf("a log of %d blocks", f.logBlocks)
	}
	now, err := l.lapAt(0)
	if err != nil {
		return err
	}
	if now == 0 {
		return l.zeros()
	}
	head, err := l.head(now)
	if err != nil {
		return err
	}
	before := min(head, inFlight)
	ok, err := l.laps(head-before, head, now)
	if ok && err == nil && before < inFlight { // the end of the ring, in the lap before
		ok, err = l.laps(max(head, l.n-(inFlight-before)), l.n, now-1)
	}
	if ok && err == nil {
		ok, err = l.laps(head, min(head+inFlight, l.n), now-1)
	}
	if ok && err == nil && head+inFlight > l.n {
		ok, err = l.laps(0, min(head, head+inFlight-l.n), now)
	}
	switch {
	case err != nil:
		return err
	case !ok:
		return ErrDirty
	}
	return l.unmounted(head, now)
}

// zeros accepts a log that was never written.
func (l *logRing) zeros() error {
	if l.n*logBlock > zeroLogMost {
		return errors.New("its log begins with zeros and is too long to be searched")
	}
	b := make([]byte, 64<<10)
	for at := int64(0); at < l.n; at += int64(len(b) / logBlock) {
		p := b[:min(int64(len(b)), (l.n-at)*logBlock)]
		if err := l.read(p, at); err != nil {
			return err
		}
		for _, c := range p {
			if c != 0 {
				return ErrDirty
			}
		}
	}
	return nil
}

// head is the first block that is not of the newest lap, or the end.
func (l *logRing) head(now uint32) (int64, error) {
	lo, hi := int64(1), l.n
	for lo < hi {
		mid := (lo + hi) / 2
		c, err := l.lapAt(mid)
		if err != nil {
			return 0, err
		}
		if c == now {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo, nil
}

// unmounted is nil when the record that ends at head is the one of an unmount.
func (l *logRing) unmounted(head int64, now uint32) error {
	from := max(0, head-recordMost)
	b := make([]byte, (head-from)*logBlock)
	if err := l.read(b, from); err != nil {
		return err
	}
	at := int64(len(b)) - logBlock
	for at >= 0 && be.Uint32(b[at:]) != recordMagic {
		at -= logBlock
	}
	if at < 0 {
		return ErrDirty
	}
	b = b[at:]
	at = from + at/logBlock
	version, length, sized := be.Uint32(b[8:]), int64(be.Uint32(b[12:])), int64(be.Uint32(b[320:]))
	headers := int64(1)
	if version&2 != 0 && sized > headerCycles {
		headers = (sized + headerCycles - 1) / headerCycles
	}
	switch {
	case version == 0 || version > 2, length < 1 || length > 256<<10, sized > 256<<10:
		return ErrDirty
	case be.Uint32(b[4:]) != now, be.Uint64(b[16:]) != uint64(now)<<32|uint64(at),
		at+headers+(length+logBlock-1)/logBlock != head, be.Uint32(b[40:]) != 1:
		return ErrDirty
	case [16]byte(b[304:320]) != l.uuid && [16]byte(b[304:320]) != l.meta:
		return errors.New("its log is another file system's")
	case be.Uint32(b[sumAtRecord:]) != 0 && !recordSum(b, headers, length):
		return errors.New("the last record of its log does not match its checksum")
	}
	op := b[headers*logBlock:]
	if op[8] != opLogClient || op[9]&opUnmount == 0 {
		return ErrDirty
	}
	return nil
}

// recordSum checks a record. Its first header has a length in the sum that
// depends on the machine it was written on.
func recordSum(b []byte, headers, length int64) bool {
	want := binary.LittleEndian.Uint32(b[sumAtRecord:])
	for _, n := range []int64{328, 324} {
		crc := crc32.Update(0, castagnoli, b[:sumAtRecord])
		crc = crc32.Update(crc, castagnoli, []byte{0, 0, 0, 0})
		crc = crc32.Update(crc, castagnoli, b[sumAtRecord+4:n])
		for h := int64(1); h < min(headers, (length+headerCycles-1)/headerCycles); h++ { // those that the data needs
			crc = crc32.Update(crc, castagnoli, b[h*logBlock:][:4+256])
		}
		crc = crc32.Update(crc, castagnoli, b[headers*logBlock:][:length])
		if crc == want {
			return true
		}
	}
	return false
}
