package writeback

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"path"
	"strings"
	"time"

	"forerun/block"
	"forerun/disk"
	"forerun/internal/chunk"
)

// See FORMAT.md for the tables.
const (
	fileMagic   = "FRWBCKP1"
	fileVersion = 1
	fileHead    = 16 // bytes before the JSON of the header
	recordHead  = 16
	pieceMagic  = 0x50425746 // "FWBP"
	commitMagic = 0x43425746 // "FWBC"
	maxHeader   = 1 << 20
	maxRecord   = packedLen + maxPlain
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// fileHeader is what the file of a checkpoint says first.
type fileHeader struct {
	beginRequest
	Node string `json:"node"`
}

// fileCommit is what it says last.
type fileCommit struct {
	Sum string    `json:"digest"`
	Cut time.Time `json:"cut"`
}

// digest sums the signatures of pieces, in order.
type digest struct{ h hash.Hash }

func newDigest() digest { return digest{sha256.New()} }

func (d digest) add(s chunk.Sig) { d.h.Write(s[:]) }
func (d digest) sum() string     { return fmt.Sprintf("%x", d.h.Sum(nil)) }

// checkpointFile is a checkpoint on disk, on its way or complete. It is
// written by one goroutine at a time.
type checkpointFile struct {
	fs     disk.FS
	path   string
	file   disk.File
	header fileHeader
	seed   uint32 // checksum of the header: each record's begins with it
	next   uint32 // index of the next piece
	end    int64  // where it goes
	synced int64
	digest digest
	commit *fileCommit // nil until there is one
}

// name is the file's name without its directory and ending.
func (h *fileHeader) name() string { return fmt.Sprintf("%s-%016x", safeName(h.Group), h.ID) }

const (
	partEnd   = ".part"
	storedEnd = ".ckpt"
)

// safeName makes a file name of any name: its harmless characters, for people,
// and a hash, so that two never meet.
func safeName(name string) string {
	s := sha256.Sum256([]byte(name))
	plain := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '_' || r == '-' {
			return r
		}
		return '_'
	}, name)
	return fmt.Sprintf("%.40s-%x", plain, s[:6])
}

// createFile begins the file of a checkpoint.
func createFile(fs disk.FS, dir string, h fileHeader) (*checkpointFile, error) {
	name := path.Join(dir, h.name()+partEnd)
	f, err := fs.Open(name, disk.Write|disk.Create|disk.Trunc)
	if err != nil {
		return nil, err
	}
	js := encode(h)
	b := append(make([]byte, 0, fileHead+len(js)+4), fileMagic...)
	le := binary.LittleEndian
	b = le.AppendUint32(b, fileVersion)
	b = le.AppendUint32(b, uint32(len(js)))
	b = append(b, js...)
	seed := crc32.Checksum(b, castagnoli)
	b = le.AppendUint32(b, seed)
	if _, err := f.WriteAt(b, 0); err != nil {
		f.Close()
		return nil, errors.Join(err, fs.Remove(name))
	}
	return &checkpointFile{fs: fs, path: name, file: f, header: h, seed: seed, end: int64(len(b)), digest: newDigest()}, nil
}

// append writes a record behind the others. After an error it may be written
// again: nothing has been counted.
func (c *checkpointFile) append(magic, index uint32, body []byte) error {
	le := binary.LittleEndian
	b := make([]byte, recordHead, recordHead+len(body))
	le.PutUint32(b, magic)
	le.PutUint32(b[4:], index)
	le.PutUint32(b[8:], uint32(len(body)))
	b = append(b, body...)
	le.PutUint32(b[12:], recordSum(c.seed, b))
	if _, err := c.file.WriteAt(b, c.end); err != nil {
		return err
	}
	c.end += int64(len(b))
	return nil
}

// recordSum is the checksum of a record: everything but the field it stands in.
func recordSum(seed uint32, b []byte) uint32 {
	return crc32.Update(crc32.Update(seed, castagnoli, b[:12]), castagnoli, b[recordHead:])
}

// addPiece appends the piece that is due.
func (c *checkpointFile) addPiece(sig chunk.Sig, packed []byte) error {
	if err := c.append(pieceMagic, c.next, packed); err != nil {
		return err
	}
	c.next++
	c.digest.add(sig)
	return nil
}

// openFile reads the header and walks over the records. Bytes at the end that
// are no record are left alone: next and end say where the sound part ends.
// A header that is not sound is KindCorrupt. fn, if any, is given each piece.
func openFile(fs disk.FS, name string, fn func(packed []byte) error) (c *checkpointFile, err error) {
	f, err := fs.Open(name, disk.Write)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
			c = nil
		}
	}()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	c = &checkpointFile{fs: fs, path: name, file: f, digest: newDigest()}
	if err := c.readHeader(st.Size); err != nil {
		return c, err
	}
	return c, c.walk(st.Size, fn)
}

func readFull(f disk.File, b []byte, off int64) (bool, error) {
	n, err := f.ReadAt(b, off)
	if err == io.EOF || err == nil {
		return n == len(b), nil
	}
	return false, err
}

func (c *checkpointFile) readHeader(size int64) error {
	le := binary.LittleEndian
	b := make([]byte, fileHead, fileHead+4096)
	ok, err := readFull(c.file, b, 0)
	if err != nil {
		return err
	}
	if !ok || string(b[:8]) != fileMagic {
		return block.E("writeback.file", c.path, block.KindCorrupt, errors.New("it does not begin like a checkpoint"))
	}
	n := int64(le.Uint32(b[12:]))
	if n > maxHeader || fileHead+n+4 > size {
		return block.E("writeback.file", c.path, block.KindCorrupt, errFormat)
	}
	b = append(b, make([]byte, n+4)...)
	if ok, err = readFull(c.file, b[fileHead:], fileHead); err != nil {
		return err
	}
	body := b[:fileHead+n]
	c.seed = crc32.Checksum(body, castagnoli)
	if !ok || le.Uint32(b[len(body):]) != c.seed {
		return block.E("writeback.file", c.path, block.KindCorrupt, errFormat)
	}
	if v := le.Uint32(b[8:]); v != fileVersion {
		return block.E("writeback.file", c.path, block.KindUnsupported, fmt.Errorf("version %d is not known here; run the release that wrote it", v))
	}
	if err := json.Unmarshal(body[fileHead:], &c.header); err != nil {
		return block.E("writeback.file", c.path, block.KindCorrupt, err)
	}
	if err := c.header.check(); err != nil {
		return block.E("writeback.file", c.path, block.KindCorrupt, err)
	}
	c.end = int64(len(b))
	return nil
}

// walk goes over the records from the header on.
func (c *checkpointFile) walk(size int64, fn func(packed []byte) error) error {
	le := binary.LittleEndian
	b := make([]byte, recordHead+maxRecord)
	for c.commit == nil {
		if ok, err := readFull(c.file, b[:recordHead], c.end); err != nil || !ok {
			return err
		}
		magic, index, n := le.Uint32(b), le.Uint32(b[4:]), int64(le.Uint32(b[8:]))
		if n > maxRecord || c.end+recordHead+n > size || magic != pieceMagic && magic != commitMagic || index != c.next {
			return nil
		}
		rec := b[:recordHead+n]
		if ok, err := readFull(c.file, rec[recordHead:], c.end+recordHead); err != nil {
			return err
		} else if !ok || recordSum(c.seed, rec) != le.Uint32(b[12:]) {
			return nil
		}
		body := rec[recordHead:]
		if magic == commitMagic {
			var m fileCommit
			if json.Unmarshal(body, &m) != nil || m.Sum != c.digest.sum() {
				return nil
			}
			c.commit = &m
		} else {
			p, err := parsePacked(body)
			if err != nil {
				return nil
			}
			if fn != nil {
				if err := fn(body); err != nil {
					return err
				}
			}
			c.digest.add(p.Sig)
			c.next++
		}
		c.end += recordHead + n
	}
	return nil
}

// pieces reads a complete checkpoint again and gives fn each piece, opened.
func (c *checkpointFile) pieces(fn func(table []extent, data []byte) error) error {
	limits := c.header.bounds()
	plain := make([]byte, maxPlain)
	var table []extent
	d, err := openFile(c.fs, c.path, func(b []byte) error {
		p, err := parsePacked(b)
		if err == nil {
			err = p.Open(plain[:p.Plain])
		}
		var data []byte
		if err == nil {
			table, data, err = parsePlain(table[:0], plain[:p.Plain], limits)
		}
		if err != nil {
			return block.E("writeback.file", c.path, block.KindCorrupt, err)
		}
		return fn(table, data)
	})
	if err != nil {
		return err
	}
	defer d.close()
	if d.commit == nil || d.next != c.next {
		return block.E("writeback.file", c.path, block.KindCorrupt, errors.New("the end of a stored checkpoint is missing"))
	}
	return nil
}

// bounds are the limits of each volume. Blocks are not in the file: what is in
// it was checked when it arrived.
func (h *fileHeader) bounds() []bounds {
	out := make([]bounds, len(h.Volumes))
	for i, v := range h.Volumes {
		out[i] = bounds{size: v.Size}
	}
	return out
}

func (c *checkpointFile) close() {
	if c.file != nil {
		c.file.Close() // everything that matters was synced
		c.file = nil
	}
}

// remove removes a file that may not be there.
func remove(fs disk.FS, name string) error {
	if err := fs.Remove(name); err != nil && block.KindOf(err) != block.KindNotFound {
		return err
	}
	return nil
}
