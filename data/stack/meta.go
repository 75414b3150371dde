package stack

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"path"

	"forerun/block"
	"forerun/disk"
)

// Meta is what the source said of a volume when it was first opened. It is
// kept so that a frontend can restart, and serve what it holds, without the
// backend. All sizes are bytes.
type Meta struct {
	Version    int    `json:"version"`
	Volume     string `json:"volume"`
	SizeBytes  int64  `json:"size_bytes"`
	BlockBytes int    `json:"block_bytes"`
	ChunkBytes int    `json:"chunk_bytes"`
	SourceID   string `json:"source_id"`
	// ReadOnly: the source cannot be written, nothing goes back to it.
	ReadOnly bool `json:"read_only,omitempty"`
	// CRC is CRC32C over the JSON of the other fields.
	CRC uint32 `json:"crc32c"`
}

const (
	metaName    = "volume.json"
	metaVersion = 1
	metaMax     = 64 << 10
)

func (m Meta) sum() uint32 {
	m.CRC = 0
	b, err := json.Marshal(m)
	if err != nil {
		panic(err) // plain numbers and strings always marshal
	}
	return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli))
}

// ReadMeta reads the description of the volume in dir; KindNotFound if there
// is none yet.
func ReadMeta(fs disk.FS, dir string) (Meta, error) {
	const op = "stack.meta"
	name := path.Join(dir, metaName)
	b, err := readSmall(fs, name)
	if err != nil {
		return Meta{}, block.E(op, name, block.KindNone, err)
	}
	var m Meta
	if err := json.Unmarshal(b, &m); err != nil {
		return Meta{}, block.E(op, name, block.KindCorrupt, err)
	}
	if m.Version != metaVersion {
		return Meta{}, block.E(op, name, block.KindUnsupported, fmt.Errorf("version %d was written by another release; this one reads %d", m.Version, metaVersion))
	}
	if m.CRC != m.sum() {
		return Meta{}, block.E(op, name, block.KindCorrupt, errors.New("checksum mismatch"))
	}
	return m, nil
}

// writeMeta publishes m in dir, durably.
func writeMeta(fs disk.FS, dir string, m Meta) error {
	const op = "stack.meta"
	name := path.Join(dir, metaName)
	if err := fs.MkdirAll(dir); err != nil {
		return block.E(op, dir, block.KindNone, err)
	}
	m.Version = metaVersion
	m.CRC = m.sum()
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return block.E(op, name, block.KindInvalid, err)
	}
	if err = disk.PublishBytes(fs, name, append(b, '\n')); err == nil {
		err = fs.SyncDir(path.Dir(dir))
	}
	if err != nil {
		return block.E(op, name, block.KindNone, err)
	}
	return nil
}
