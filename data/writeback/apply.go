package writeback

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
)

const (
	applyWidth = 8 // writes to the sources under way at once
	firstRetry = 200 * time.Millisecond
	lastRetry  = 10 * time.Second
)

// contentLock is the lock on what a volume's source holds: applying has it, and
// whoever begins a clone. r.mu is held.
func (r *Receiver) contentLock(volume string) chan struct{} {
	l := r.content[volume]
	if l == nil {
		l = make(chan struct{}, 1)
		r.content[volume] = l
	}
	return l
}

// lockContent locks the content of several volumes, in order of name.
func (r *Receiver) lockContent(ctx context.Context, vols []beginVolume) (unlock func(), err error) {
	names := make([]string, len(vols))
	for i, v := range vols {
		names[i] = v.Name
	}
	slices.Sort(names)
	var held []chan struct{}
	unlock = func() {
		for _, l := range held {
			<-l
		}
	}
	for _, n := range names {
		r.mu.Lock()
		l := r.contentLock(n)
		r.mu.Unlock()
		select {
		case l <- struct{}{}:
			held = append(held, l)
		case <-ctx.Done():
			unlock()
			return nil, block.E("writeback.wait", n, block.KindBusy, fmt.Errorf("a checkpoint is being carried out: %w", ctx.Err()))
		}
	}
	return unlock, nil
}

// carryOut applies a stored checkpoint, as often as it takes.
func (r *Receiver) carryOut(g *group, c *checkpointFile) {
	unlock, err := r.lockContent(r.ctx, c.header.Volumes)
	if err != nil {
		return // it closes
	}
	defer unlock()
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		err := r.finish(r.ctx, g, c)
		if err == nil || r.ctx.Err() != nil {
			return
		}
		r.mu.Lock()
		first := g.reason == ""
		g.reason = err.Error()
		r.mu.Unlock()
		if first {
			r.log.Warn("a stored checkpoint cannot be carried out yet; it is tried again", "group", g.name, "id", c.header.ID, "err", err)
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-r.ctx.Done():
			t.Stop()
			return
		}
	}
}

// finish applies c, flushes, notes it and removes the file. The contents of its
// volumes are locked.
func (r *Receiver) finish(ctx context.Context, g *group, c *checkpointFile) error {
	err := r.apply(ctx, c)
	if block.KindOf(err) == block.KindCorrupt {
		err = r.damaged(c.path, g, err)
		if err == nil {
			c.close()
		}
		return err
	}
	if err != nil {
		return err
	}
	names := make([]string, len(c.header.Volumes))
	for i, v := range c.header.Volumes {
		names[i] = v.Name
	}
	if err := r.change("writeback.apply", func(st *state) {
		st.Groups[g.name] = groupState{Applied: c.header.checkpointID, Cut: c.commit.Cut, At: time.Now(), Volumes: names}
		for _, v := range c.header.Volumes {
			s := st.Volumes[v.Name]
			s.Known = true
			s.Damaged = s.Damaged && !v.Full
			st.Volumes[v.Name] = s
		}
	}); err != nil {
		return err
	}
	c.close()
	if err := remove(r.fs, c.path); err != nil { // the next start removes it: the state says that it is done
		r.log.Warn("the file of a checkpoint that was carried out stays behind", "file", c.path, "err", err)
	}
	r.settle(g)
	return nil
}

func (r *Receiver) settle(g *group) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if g.reason != "" {
		r.log.Info("checkpoints are carried out again", "group", g.name)
	}
	g.stored, g.reason = nil, ""
	g.ring()
}

// damaged puts a stored checkpoint aside whose bytes are not what was stored.
// Part of it may have been carried out, so everything has to be compared.
func (r *Receiver) damaged(name string, g *group, cause error) error {
	if g == nil {
		return block.E("writeback.recover", name, block.KindCorrupt,
			fmt.Errorf("it belongs to no group that is known: move it away, and have everything compared: %w", cause))
	}
	r.log.Error("a stored checkpoint is damaged; the source is no checkpoint's content until everything was compared",
		"group", g.name, "file", name, "err", cause)
	if err := r.change("writeback.damaged", func(st *state) {
		for _, n := range st.Groups[g.name].Volumes {
			v := st.Volumes[n]
			v.Damaged = true
			st.Volumes[n] = v
		}
		gs := st.Groups[g.name]
		gs.Applied = g.last // its id is used up
		st.Groups[g.name] = gs
	}); err != nil {
		return err
	}
	if err := r.fs.Rename(name, name+".damaged"); err != nil && block.KindOf(err) != block.KindNotFound {
		return block.E("writeback.damaged", name, 0, err)
	}
	r.settle(g)
	return nil
}

// apply writes a checkpoint to its sources and flushes them. It may be done
// again at any time before the next one: the bytes are the same.
func (r *Receiver) apply(ctx context.Context, c *checkpointFile) error {
	devs := make([]block.Device, len(c.header.Volumes))
	for i, v := range c.header.Volumes {
		dev, err := r.o.Source(v.Name)
		if err != nil {
			return err
		}
		if info := dev.Info(); info.Size != v.Size {
			return invalid("writeback.apply", v.Name, "the source has %d bytes, the checkpoint is of one with %d", info.Size, v.Size)
		}
		devs[i] = dev
	}
	if err := r.preserve(ctx, c, devs); err != nil {
		return err
	}
	if err := c.pieces(func(table []extent, data []byte) error {
		return applyPiece(ctx, devs, table, data)
	}); err != nil {
		return err
	}
	for i, dev := range devs {
		if err := dev.Flush(ctx, block.WriteBack); err != nil {
			return block.E("writeback.flush", c.header.Volumes[i].Name, sourceKind(err), err)
		}
	}
	return nil
}

// sourceKind keeps an error of a source from being taken for one of our file.
func sourceKind(err error) block.Kind {
	if k := block.KindOf(err); k != block.KindCorrupt {
		return k
	}
	return block.KindIO
}

// applyPiece carries out the extents of one piece, which do not overlap, side
// by side.
func applyPiece(ctx context.Context, devs []block.Device, table []extent, data []byte) error {
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		errs []error
	)
	slots := make(chan struct{}, applyWidth)
	for _, e := range table {
		var p []byte
		if e.kind == kindData {
			p, data = data[:e.n], data[e.n:]
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			if err := applyExtent(ctx, devs[e.vol], e, p); err != nil {
				mu.Lock()
				errs = append(errs, err)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if len(errs) > 0 {
		return block.E("writeback.apply", "", sourceKind(errs[0]), errs[0])
	}
	return nil
}

func applyExtent(ctx context.Context, dev block.Device, e extent, p []byte) error {
	info := dev.Info()
	switch e.kind {
	case kindZero:
		return dev.Zero(ctx, e.off, e.n, block.WriteBack)
	case kindHole:
		return dev.Zero(ctx, e.off, e.n, block.WriteBack|block.MayTrim)
	}
	for off := e.off; len(p) > 0; {
		k := len(p)
		if info.MaxIO > 0 {
			k = min(k, info.MaxIO)
		}
		if err := dev.WriteAt(ctx, p[:k], off, block.WriteBack); err != nil {
			return err
		}
		p, off = p[k:], off+int64(k)
	}
	return nil
}

// probe compares ranges with the sources, as they are after everything that
// was stored. The answer is a bit for each, lowest first: 1 where they differ.
func (r *Receiver) probe(ctx context.Context, node string, b []byte) ([]byte, error) {
	const op = "writeback.probe"
	var p *part
	all, err := parseProbes(b, func(handle uint64) (l []bounds, err error) {
		if p, err = r.find(op, node, handle); err == nil {
			l = p.limits
		}
		return l, err
	})
	if err != nil {
		return nil, err
	}
	if err := r.settled(ctx, p.group); err != nil {
		return nil, err
	}
	if err := r.seal(ctx); err != nil {
		return nil, err
	}
	defer func() { <-r.seals }()
	mem := probeBuffers.Get().(*[]byte)
	defer probeBuffers.Put(mem)
	out := make([]byte, (len(all)+7)/8)
	for i, q := range all {
		name := p.f.header.Volumes[q.vol].Name
		dev, err := r.o.Source(name)
		if err != nil {
			return nil, err
		}
		same, err := false, error(nil)
		if q.kind == kindData {
			buf := (*mem)[:q.n]
			if err = readAll(ctx, dev, buf, q.off); err == nil {
				same = chunk.Sum(buf) == q.sig
			}
		} else {
			same, err = isZero(ctx, dev, *mem, q.off, q.n)
		}
		if err != nil {
			return nil, block.E(op, name, sourceKind(err), err)
		}
		if !same {
			out[i/8] |= 1 << (i % 8)
		}
	}
	return out, nil
}

var probeBuffers = sync.Pool{New: func() any { b := make([]byte, chunk.MaxSize); return &b }}

// reader is what can be read.
type reader interface {
	Info() block.Info
	ReadAt(ctx context.Context, p []byte, off int64, f block.Flags) error
}

// readAll reads, in pieces the device allows.
func readAll(ctx context.Context, dev reader, p []byte, off int64) error {
	step := len(p)
	if m := dev.Info().MaxIO; m > 0 {
		step = min(step, m)
	}
	for len(p) > 0 {
		k := min(step, len(p))
		if err := dev.ReadAt(ctx, p[:k], off, block.WriteBack); err != nil {
			return err
		}
		p, off = p[k:], off+int64(k)
	}
	return nil
}

// isZero says whether a range reads as zeros. What the device does not know is
// read, up to the first byte that is none.
func isZero(ctx context.Context, dev block.Device, mem []byte, off, n int64) (bool, error) {
	var exts []block.Extent
	for end := off + n; off < end; {
		var err error
		if exts, err = dev.Extents(ctx, exts[:0], off, end-off, block.WriteBack); err != nil {
			return false, err
		}
		if len(exts) == 0 {
			return false, errors.New("the source described nothing")
		}
		for _, e := range exts {
			for !e.Kind.Zero() && e.Len > 0 {
				k := min(e.Len, int64(len(mem)))
				if err := readAll(ctx, dev, mem[:k], e.Off); err != nil {
					return false, err
				}
				if !chunk.AllZero(mem[:k]) {
					return false, nil
				}
				e.Off, e.Len = e.Off+k, e.Len-k
			}
			off = e.End()
		}
	}
	return true, nil
}
