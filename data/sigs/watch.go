package sigs

import (
	"context"

	"forerun/block"
)

// Watch keeps t true while dev is written: a storey over the source that
// brackets what changes it. Whatever writes the source goes through it.
func Watch(dev block.Device, t *Table) block.Device { return &watched{dev, t} }

type watched struct {
	block.Device
	t *Table
}

// WriteAt is block.Device.WriteAt.
func (w *watched) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	return w.change(off, int64(len(p)), func() error { return w.Device.WriteAt(ctx, p, off, f) })
}

// Zero is block.Device.Zero.
func (w *watched) Zero(ctx context.Context, off, n int64, f block.Flags) error {
	return w.change(off, n, func() error { return w.Device.Zero(ctx, off, n, f) })
}

// Trim is block.Device.Trim.
func (w *watched) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	return w.change(off, n, func() error { return w.Device.Trim(ctx, off, n, f) })
}

func (w *watched) change(off, n int64, do func() error) error {
	info := w.Device.Info()
	if info.ReadOnly || n <= 0 || off < 0 || off > info.Size-n { // it will be refused
		return do()
	}
	first := off / w.t.o.ChunkBytes
	done := w.t.Change(first, (off+n-1)/w.t.o.ChunkBytes-first+1)
	err := do()
	if over(err) {
		done()
	}
	return err
}

// over says whether nothing more of a call can happen. One that ended because
// its caller gave up, or because a server could not be reached, may still be
// carried out there: then its change never ends for the table, which is not
// settled any more, and is believed again when it was built anew.
func over(err error) bool {
	switch block.KindOf(err) {
	case block.KindCanceled, block.KindUnavailable, block.KindClosed:
		return false
	}
	return true
}
