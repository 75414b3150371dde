package writeback

import (
	"context"
	"slices"

	"forerun/block"
	"forerun/internal/chunk"
)

// preserve copies what a checkpoint is about to change into the clones that
// lack it: the old bytes, a sync, the bits, and the map, durably. Only then
// may the checkpoint be carried out. After a crash it is called again: what the
// map has is not copied again, and of what it lacks nothing was changed.
func (r *Receiver) preserve(ctx context.Context, c *checkpointFile, devs []block.Device) error {
	clones := make([][]*clone, len(devs))
	some := false
	r.mu.Lock()
	for i, v := range c.header.Volumes {
		for _, cl := range r.clones {
			if cl.meta.Volume == v.Name {
				clones[i] = append(clones[i], cl)
				some = true
			}
		}
	}
	r.mu.Unlock()
	if !some {
		return nil
	}
	fresh := map[*clone]map[int64]struct{}{}
	mem := make([]byte, 0)
	err := c.pieces(func(table []extent, _ []byte) error {
		for _, e := range table {
			for _, cl := range clones[e.vol] {
				if fresh[cl] == nil {
					fresh[cl] = map[int64]struct{}{}
				}
				g := cl.meta.Grain
				if int64(cap(mem)) < g {
					mem = make([]byte, g)
				}
				for i := e.off / g; i*g < e.end(); i++ {
					if _, done := fresh[cl][i]; done || cl.has(i) {
						continue
					}
					p := mem[:min(g, cl.meta.Size-i*g)]
					if err := cl.keep(ctx, devs[e.vol], p, i); err != nil {
						return err
					}
					fresh[cl][i] = struct{}{}
				}
				if len(fresh[cl]) >= maxFresh {
					if err := cl.settle(fresh[cl]); err != nil {
						return err
					}
					clear(fresh[cl])
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, list := range clones {
		for _, cl := range list {
			if err := cl.settle(fresh[cl]); err != nil {
				return err
			}
			if err := cl.persist(); err != nil {
				return err
			}
		}
	}
	return nil
}

// maxFresh bounds the grains that are copied and not yet in the bits.
const maxFresh = 1 << 16

// keep copies one grain from the source.
func (c *clone) keep(ctx context.Context, dev block.Device, p []byte, grain int64) error {
	off := grain * c.meta.Grain
	if err := readAll(ctx, dev, p, off); err != nil {
		return block.E("clone.keep", c.dir, sourceKind(err), err)
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.closed {
		return nil
	}
	// Zeros need no space, but a copy that failed half way may have left bytes.
	zero := true
	for q := range slices.Chunk(p, chunk.MaxSize) {
		zero = zero && chunk.AllZero(q)
	}
	var err error
	if zero {
		err = c.kept.Punch(off, int64(len(p)))
	} else {
		_, err = c.kept.WriteAt(p, off)
	}
	if err != nil {
		return block.E("clone.keep", c.dir, sourceKind(err), err)
	}
	return nil
}

// settle makes the copies durable and has readers take them.
func (c *clone) settle(grains map[int64]struct{}) error {
	if len(grains) == 0 {
		return nil
	}
	c.mu.RLock()
	closed, err := c.closed, error(nil)
	if !closed {
		err = c.kept.Sync()
	}
	c.mu.RUnlock()
	if err != nil {
		return block.E("clone.keep", c.dir, sourceKind(err), err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if closed {
		return nil
	}
	for g := range grains {
		c.bits[g/64] |= 1 << (g % 64)
	}
	c.unsaved = true
	return nil
}

// persist makes the bits durable.
func (c *clone) persist() error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.closed || !c.unsaved {
		return nil
	}
	if err := c.saveMap(); err != nil {
		return block.E("clone.keep", c.dir, sourceKind(err), err)
	}
	c.unsaved = false
	return nil
}
