package volume

import (
	"io"
	"path"

	"forerun/block"
	"forerun/disk"
	"forerun/internal/chunk"
)

// sigs is the flat file of signatures: that of chunk i at i*32. It is a cache
// of the map log until a checkpoint syncs it. An entry that was torn or lost
// names no chunk of the store, so it costs a fetch and never a wrong byte.
type sigs struct {
	disk.File
	name string
	lost error // a sync failed; under commitMu
}

func openSigs(fs disk.FS, dir string) (*sigs, error) {
	name := path.Join(dir, "sigs")
	f, err := fs.Open(name, disk.Write|disk.Create)
	if err != nil {
		return nil, block.E("volume.open", name, 0, err)
	}
	return &sigs{File: f, name: name}, nil
}

// readRun fills dst with the signatures of the chunks from i on; those never
// written are zeros.
func (s *sigs) readRun(dst []byte, i int64) error {
	n, err := s.ReadAt(dst, i*chunk.SigLen)
	clear(dst[n:])
	if err != nil && err != io.EOF {
		return block.E("volume.sigs", s.name, 0, err)
	}
	return nil
}

func (s *sigs) read(i int64) (sig chunk.Sig, err error) {
	err = s.readRun(sig[:], i)
	return sig, err
}

func (s *sigs) writeRun(p []byte, i int64) error {
	if _, err := s.WriteAt(p, i*chunk.SigLen); err != nil {
		return block.E("volume.sigs", s.name, 0, err)
	}
	return nil
}

// sync makes the signatures durable. Once it has failed it fails until the
// file is opened again and the log replayed into it; see overlay.sync.
func (s *sigs) sync() error {
	if s.lost == nil {
		if err := s.Sync(); err != nil {
			s.lost = block.E("volume.sigs", s.name, block.KindIO, err)
		}
	}
	return s.lost
}
