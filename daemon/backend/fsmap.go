package backend

import (
	"context"
	"errors"
	"time"

	"forerun/api"
	"forerun/data/fsmap"

	"golang.org/x/sync/errgroup"
)

// learnTime bounds how long the file systems of a source are read. Their
// bitmaps are 32 MiB for each TiB at most.
const learnTime = 10 * time.Minute

// learn reads the file systems of all sources, once, beside the serving. It
// must begin when the sources are what they were promised to be, and before
// anything else may write to them. What goes wrong is in the log and the status.
func (b *Backend) learn(ctx context.Context) error {
	var g errgroup.Group
	for _, s := range b.open {
		if s.watch == nil {
			continue
		}
		g.Go(func() error {
			log := b.cfg.Log.With("volume", s.spec.Name)
			limited, cancel := context.WithTimeoutCause(ctx, learnTime, errors.New("it took too long"))
			defer cancel()
			m, err := s.watch.Learn(limited, int64(b.cfg.ChunkBytes))
			if ctx.Err() != nil {
				return nil
			}
			if err != nil {
				log.Warn("the file systems of the source are not known; nothing of it counts as free", "err", err)
				return nil
			}
			for _, f := range m.FileSystems() {
				log.Info("found on the source", "file_system", f.String())
			}
			log.Info("free space of the source is known", "free_bytes", m.FreeBytes(), "partitions", m.Table())
			return nil
		})
	}
	return g.Wait()
}

// fsStatus adds what is known of the file systems.
func fsStatus(w *fsmap.Watched, v *api.Volume) {
	if w == nil {
		return
	}
	if why := w.Problem(); why != "" {
		v.Warnings = append(v.Warnings, "the file systems of the source are not known, so nothing of it counts as free: "+why)
	}
	m := w.Map()
	if m == nil {
		return
	}
	for _, f := range m.FileSystems() {
		v.FileSystems = append(v.FileSystems, api.FileSystem{OffsetBytes: f.Off, SizeBytes: f.Size, Partition: f.Partition,
			Type: f.Type, Label: f.Label, UUID: f.UUID, FreeBytes: f.FreeBytes, Reason: f.Reason})
	}
}
