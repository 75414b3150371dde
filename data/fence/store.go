package fence

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"io"
	"path"
	"strings"

	"forerun/block"
	"forerun/disk"
)

// See FORMAT.md.
const (
	fileHead = 16
	fileMax  = 4 << 10
	suffix   = ".fence"
	lockName = "lock"
)

// fileMagic is a name and the version.
var fileMagic = [8]byte{'F', 'R', 'F', 'E', 'N', 'C', 'E', 1}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// fileName is that of a volume's record: any name of a volume makes one.
func fileName(volume string) string {
	h := sha256.Sum256([]byte(volume))
	return hex.EncodeToString(h[:16]) + suffix
}

func encodeRecord(r Record) []byte {
	b := append(fileMagic[:], make([]byte, fileHead-len(fileMagic))...)
	return seal(appendRecord(appendString(b, r.Volume), r))
}

// seal fills in length and checksum.
func seal(b []byte) []byte {
	binary.BigEndian.PutUint32(b[12:], uint32(len(b)))
	binary.BigEndian.PutUint32(b[8:], crc32.Checksum(b[12:], castagnoli))
	return b
}

func decodeRecord(b []byte) (Record, error) {
	corrupt := func(format string, args ...any) (Record, error) {
		return Record{}, &block.Error{Op: "fence.decode", Kind: block.KindCorrupt, Err: fmt.Errorf(format, args...)}
	}
	if len(b) < fileHead || string(b[:7]) != string(fileMagic[:7]) {
		return corrupt("it is not a record of who may write a volume")
	}
	if b[7] != fileMagic[7] {
		return Record{}, &block.Error{Op: "fence.decode", Kind: block.KindUnsupported,
			Err: fmt.Errorf("version %d of the format is not known here; use the Forerun that wrote it", b[7])}
	}
	if n := binary.BigEndian.Uint32(b[12:]); int64(n) != int64(len(b)) || binary.BigEndian.Uint32(b[8:]) != crc32.Checksum(b[12:], castagnoli) {
		return corrupt("the checksum does not fit")
	}
	c := cursor{b: b[fileHead:]}
	volume := c.string()
	r := c.record(volume)
	if !c.end() {
		return corrupt("it does not end where it should")
	}
	return r, r.check()
}

// save makes a record durable. When it fails either record may be there after a crash.
func save(fsys disk.FS, dir string, r Record) error {
	name := path.Join(dir, fileName(r.Volume))
	err := disk.PublishBytes(fsys, name, encodeRecord(r))
	if err != nil {
		fsys.Remove(name + disk.TmpSuffix)
	}
	return err
}

// load reads all records. Those that cannot be read are told by their files' names.
func load(fsys disk.FS, dir string) (records []Record, damaged map[string]error, err error) {
	names, err := fsys.List(dir)
	if err != nil {
		return nil, nil, err
	}
	damaged = map[string]error{}
	for _, n := range names {
		switch {
		case strings.HasSuffix(n, disk.TmpSuffix):
			if err := fsys.Remove(path.Join(dir, n)); err != nil {
				return nil, nil, err
			}
		case strings.HasSuffix(n, suffix):
			r, err := read(fsys, path.Join(dir, n))
			if err == nil && fileName(r.Volume) != n {
				err = &block.Error{Op: "fence.load", Kind: block.KindCorrupt, Err: fmt.Errorf("it holds the record of another volume, %q", r.Volume)}
			}
			if err != nil {
				damaged[n] = err
				continue
			}
			records = append(records, r)
		}
	}
	return records, damaged, nil
}

func read(fsys disk.FS, name string) (Record, error) {
	f, err := fsys.Open(name, disk.Read)
	if err != nil {
		return Record{}, err
	}
	defer f.Close()
	b := make([]byte, fileMax)
	n, err := f.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		return Record{}, err
	}
	return decodeRecord(b[:n])
}
