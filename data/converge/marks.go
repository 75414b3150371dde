package converge

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"path"

	"forerun/block"
	"forerun/disk"
)

// See FORMAT.md.
const (
	marksMagic  = "FRMARKS\x01"
	marksHead   = 192
	bootMax     = 64
	marksClean  = 1
	fullPage    = uint64(1) << 63
	marksBuffer = 256 << 10
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var errGrain = errors.New("the unit of marks must be a power of two from 4 KiB to 1 MiB")

func validGrain(g int64) bool { return g >= 4<<10 && g <= 1<<20 && g&(g-1) == 0 }

func dirOf(p string) string { return path.Dir(p) }

// planID ties marks to the plan they belong to.
type planID [16]byte

type marksHeader struct {
	id    planID
	clean bool
	boot  string
	grain int64
	size  int64
	swept int64
	pages int64
}

func (m *marksHeader) encode() []byte {
	b := make([]byte, marksHead)
	copy(b, marksMagic)
	le := binary.LittleEndian
	if m.clean {
		le.PutUint32(b[12:], marksClean)
	}
	le.PutUint64(b[16:], uint64(m.grain))
	le.PutUint64(b[24:], uint64(m.size))
	le.PutUint64(b[32:], uint64(m.swept))
	le.PutUint64(b[40:], uint64(m.pages))
	copy(b[48:64], m.id[:])
	copy(b[64:64+bootMax], m.boot)
	return b
}

// saveMarks publishes the file: what get answers for each of keys. Pages that
// are empty by then are left out.
func saveMarks(fsys disk.FS, name string, m marksHeader, keys []int64, get func(k int64, p *page)) error {
	if len(m.boot) > bootMax {
		m.boot = m.boot[:bootMax]
	}
	return publish(fsys, name, func(f disk.File) error {
		buf := make([]byte, 0, marksBuffer+8+pageBytes)
		at, sum := int64(marksHead), uint32(0)
		flush := func() error {
			_, err := f.WriteAt(buf, at)
			sum = crc32.Update(sum, castagnoli, buf)
			at += int64(len(buf))
			buf = buf[:0]
			return err
		}
		var p page
		for _, k := range keys {
			get(k, &p)
			switch {
			case p == page{}:
				continue
			case p == *full:
				buf = binary.LittleEndian.AppendUint64(buf, uint64(k)|fullPage)
			default:
				buf = binary.LittleEndian.AppendUint64(buf, uint64(k))
				for _, w := range p {
					buf = binary.LittleEndian.AppendUint64(buf, w)
				}
			}
			m.pages++
			if len(buf) >= marksBuffer {
				if err := flush(); err != nil {
					return err
				}
			}
		}
		if len(buf) > 0 {
			if err := flush(); err != nil {
				return err
			}
		}
		h := m.encode()
		binary.LittleEndian.PutUint32(h[8:], crc32.Update(sum, castagnoli, h))
		_, err := f.WriteAt(h, 0)
		return err
	})
}

type marks struct {
	marksHeader
	bits *bitmap
}

// loadMarks reads the file. Errors: KindNotFound, KindCorrupt.
func loadMarks(fsys disk.FS, name string) (*marks, error) {
	f, err := fsys.Open(name, disk.Read)
	if err != nil {
		return nil, block.E("tracker.open", name, 0, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, block.E("tracker.open", name, 0, err)
	}
	m, err := parseMarks(io.NewSectionReader(f, 0, st.Size), st.Size)
	if err != nil {
		return nil, block.E("tracker.open", name, 0, err)
	}
	return m, nil
}

func corrupt(format string, args ...any) error {
	return block.E("converge.parse", "", block.KindCorrupt, fmt.Errorf(format, args...))
}

// parseMarks reads size bytes of r. Memory is bounded by what the file holds.
func parseMarks(r io.Reader, size int64) (*marks, error) {
	h := make([]byte, marksHead)
	if _, err := io.ReadFull(r, h); err == io.EOF || err == io.ErrUnexpectedEOF {
		return nil, corrupt("%d bytes are too short", size)
	} else if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if string(h[:8]) != marksMagic {
		return nil, corrupt("not a file of marks, or one of another version")
	}
	want := le.Uint32(h[8:])
	clear(h[8:12])
	m := &marks{bits: newBitmap()}
	m.clean = le.Uint32(h[12:])&marksClean != 0
	m.grain, m.size, m.swept = int64(le.Uint64(h[16:])), int64(le.Uint64(h[24:])), int64(le.Uint64(h[32:]))
	m.pages = int64(le.Uint64(h[40:]))
	copy(m.id[:], h[48:])
	boot := h[64 : 64+bootMax]
	for len(boot) > 0 && boot[len(boot)-1] == 0 {
		boot = boot[:len(boot)-1]
	}
	m.boot = string(boot)
	if !validGrain(m.grain) || m.size <= 0 || m.swept < 0 || m.swept > m.size || m.pages < 0 || m.pages > size/8 {
		return nil, corrupt("grain %d, size %d, offset %d, %d pages make no sense", m.grain, m.size, m.swept, m.pages)
	}
	last := (m.size + m.grain - 1) / m.grain // grains
	sum, prev := uint32(0), int64(-1)
	buf := make([]byte, 8+pageBytes)
	for range m.pages {
		if _, err := io.ReadFull(r, buf[:8]); err != nil {
			return nil, short(err)
		}
		v := le.Uint64(buf)
		k := int64(v &^ fullPage)
		if k <= prev || k > (last-1)/pageBits {
			return nil, corrupt("page %d is out of order or beyond the volume", k)
		}
		prev = k
		n := 8
		if v&fullPage != 0 {
			m.bits.set(k*pageBits, (k+1)*pageBits)
		} else {
			if _, err := io.ReadFull(r, buf[8:]); err != nil {
				return nil, short(err)
			}
			n = len(buf)
			p := new(page)
			for i := range p {
				p[i] = le.Uint64(buf[8+8*i:])
			}
			m.bits.pages[k] = p
			m.bits.n += p.count()
		}
		sum = crc32.Update(sum, castagnoli, buf[:n])
	}
	if got := crc32.Update(sum, castagnoli, h); got != want {
		return nil, corrupt("checksum %08x, %08x expected", got, want)
	}
	return m, nil
}

func short(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return corrupt("the file ends too early")
	}
	return err
}

// errUnsure wraps an error of publish after which the old or the new file may
// be there after a power cut.
var errUnsure = errors.New("it is not known which of two states is recorded")

// publish replaces the file at name by what write makes: temporary name, sync,
// rename, sync of the directory. An error from the rename on wraps errUnsure.
func publish(fsys disk.FS, name string, write func(disk.File) error) error {
	tmp := name + ".tmp"
	f, err := fsys.Open(tmp, disk.Write|disk.Create|disk.Trunc)
	if err != nil {
		return err
	}
	if err = write(f); err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		fsys.Remove(tmp)
		return err
	}
	if err = fsys.Rename(tmp, name); err == nil {
		err = fsys.SyncDir(dirOf(name))
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errUnsure, err)
	}
	return nil
}
