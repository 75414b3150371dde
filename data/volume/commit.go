package volume

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"forerun/block"
	"forerun/disk"
	"forerun/internal/chunk"
)

const (
	mapName = "map"
	logName = "map.log"
	tmpName = ".new"
)

// mapLog is the log that follows the snapshot. Under commitMu.
type mapLog struct {
	file   disk.File
	gen    uint64 // of snapshot and log
	seq    uint64 // of the last batch
	end    int64
	limit  int64 // a checkpoint when the log is longer
	broken bool  // nothing may be appended: the next commit is a checkpoint
	buf    []byte
}

// commitLoop records by itself what arrived, so that a crash loses little of the fill.
func (v *Volume) commitLoop(ctx context.Context) {
	defer v.bg.Done()
	tick := time.NewTicker(v.opt.Tune.CommitEvery)
	defer tick.Stop()
	failing := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		err := v.commit(false)
		if (err != nil) != failing {
			failing = err != nil
			if failing {
				v.opt.Log.Warn("recording what arrived fails and is tried again", "volume", v.opt.Name, "err", err)
			} else {
				v.opt.Log.Info("recording what arrived works again", "volume", v.opt.Name)
			}
		}
	}
}

// Commit records which chunks arrived, after the store has synced them. It
// says nothing about writes; Flush does both.
func (v *Volume) Commit() error {
	if err := v.enter("volume.commit"); err != nil {
		return err
	}
	defer v.gate.leave()
	return v.commit(false)
}

// commit makes durable what changed: bases only, or, when full, the overlay
// and the masks as well. The states are read first, then the data they speak
// of is synced, then they are logged.
func (v *Volume) commit(full bool) error {
	v.commitMu.Lock()
	defer v.commitMu.Unlock()
	v.table.mu.Lock()
	d := v.table.dirty.take(full)
	v.table.mu.Unlock()
	if d.empty() && !(full && v.maplog.broken) {
		if full {
			return v.overlay.sync()
		}
		return nil
	}
	start := time.Now()
	again, err := v.record(&d, full)
	if again {
		v.table.mu.Lock()
		v.table.dirty.merge(d)
		v.table.mu.Unlock()
	}
	took := int64(time.Since(start))
	v.n.commits.Add(1)
	v.n.commitNanos.Add(took)
	v.n.commitMaxNanos.Store(max(v.n.commitMaxNanos.Load(), took))
	v.n.logBytes.Store(v.maplog.end)
	if err != nil {
		v.n.commitFailures.Add(1)
	}
	return err
}

// record is commit for what d names. It says whether d, or part of it, has to be tried again.
func (v *Volume) record(d *dirtySet, full bool) (again bool, err error) {
	l := &v.maplog
	ch := v.table.collect(d)
	if l.broken || l.end+ch.bytes() > l.limit || ch.bytes() > maxBatch/2 {
		err := v.checkpoint()
		if err == nil || l.broken || ch.bytes() > maxBatch/2 {
			return err != nil, err
		}
		// No room for a snapshot, perhaps. The log still serves; it is only longer.
		v.opt.Log.Warn("the map log grows beyond its bound because no snapshot can be made", "volume", v.opt.Name, "bytes", l.end, "err", err)
	}
	if full {
		if err := v.overlay.sync(); err != nil {
			return true, err
		}
	}
	var serr error
	if len(ch.held) > 0 {
		// The signatures are read before the store syncs: one that changes
		// meanwhile is of a chunk that the sync may not cover.
		if l.buf, err = ch.encode(newBatch(l.buf), v.sigs); err != nil {
			return true, err
		}
		if serr = v.opt.Store.Sync(); serr != nil {
			serr = block.E("volume.commit", v.opt.Name, 0, fmt.Errorf("the store does not sync: %w", serr))
			ch.held, ch.heldChunks = nil, 0
			l.buf, _ = ch.encode(newBatch(l.buf), v.sigs)
		}
	} else if l.buf, err = ch.encode(newBatch(l.buf), v.sigs); err != nil {
		return true, err
	}
	if ch.none() {
		return serr != nil, serr
	}
	if err := l.append(); err != nil {
		return true, block.E("volume.commit", path.Join(v.dir, logName), 0, err)
	}
	if cap(l.buf) > 4<<20 {
		l.buf = nil
	}
	if full && serr != nil { // what was written is durable, what arrived waits
		v.opt.Log.Warn("chunks that arrived are not recorded yet", "volume", v.opt.Name, "err", serr)
		return true, nil
	}
	return serr != nil, serr
}

// append writes the batch in buf and syncs it. After a failed write the next
// batch goes to the same place; after a failed sync nobody knows what is there.
func (l *mapLog) append() error {
	b := sealBatch(l.buf, l.gen, l.seq+1)
	l.buf = b
	if _, err := l.file.WriteAt(b, l.end); err != nil {
		return err
	}
	if err := l.file.Sync(); err != nil {
		l.broken = true
		return err
	}
	l.seq++
	l.end += int64(len(b))
	return nil
}

// checkpoint writes the whole map as a new snapshot and begins a new log.
func (v *Volume) checkpoint() error {
	t := v.table
	t.mu.Lock()
	d := t.dirty.take(true)
	t.mu.Unlock()
	err := v.snapshot()
	if err != nil {
		t.mu.Lock()
		t.dirty.merge(d)
		t.mu.Unlock()
		return err
	}
	v.n.checkpoints.Add(1)
	return nil
}

// snapshot publishes the map of this moment: states, then the data they speak
// of, then the name. The old log ends with it: its generation is the old one.
func (v *Volume) snapshot() (err error) {
	l := &v.maplog
	name := path.Join(v.dir, mapName)
	fail := func(err error) error { return block.E("volume.checkpoint", name, 0, err) }
	f, err := v.fs.Open(name+tmpName, disk.Write|disk.Create|disk.Trunc)
	if err != nil {
		return fail(err)
	}
	out := &appender{f: f}
	w := bufio.NewWriterSize(out, 1<<20)
	if err = v.table.writeSnapshot(w, v.id, l.gen+1); err == nil {
		err = w.Flush()
	}
	if err == nil {
		err = v.overlay.sync()
	}
	if err == nil {
		err = v.opt.Store.Sync()
	}
	if err == nil {
		err = v.sigs.sync()
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		_ = v.fs.Remove(name + tmpName) // it takes space that may be wanted
		return fail(err)
	}
	l.broken = true // until a log of the new generation is there
	l.gen++
	if err := v.fs.Rename(name+tmpName, name); err != nil {
		return fail(err)
	}
	if err := v.fs.SyncDir(v.dir); err != nil {
		return fail(err)
	}
	l.limit = max(v.opt.Tune.LogBytes, min(out.off, maxBatch))
	return v.newLog()
}

// newLog begins an empty log of the generation of the snapshot.
func (v *Volume) newLog() error {
	l := &v.maplog
	name := path.Join(v.dir, logName)
	fail := func(err error) error { return block.E("volume.checkpoint", name, 0, err) }
	f, err := v.fs.Open(name+tmpName, disk.Write|disk.Create|disk.Trunc)
	if err != nil {
		return fail(err)
	}
	if _, err = f.WriteAt(encodeLogHeader(v.id, l.gen), 0); err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = v.fs.Rename(name+tmpName, name)
	}
	if err == nil {
		err = v.fs.SyncDir(v.dir)
	}
	if err != nil {
		f.Close()
		return fail(err)
	}
	if l.file != nil {
		l.file.Close() // read no more; what it held is in the snapshot
	}
	l.file, l.seq, l.end, l.broken = f, 0, logHeader, false
	return nil
}

type appender struct {
	f   disk.File
	off int64
}

func (a *appender) Write(p []byte) (int, error) {
	n, err := a.f.WriteAt(p, a.off)
	a.off += int64(n)
	return n, err
}

// loadMap reads snapshot and log, or begins both in an empty directory.
func (v *Volume) loadMap() error {
	t, l := v.table, &v.maplog
	name := path.Join(v.dir, mapName)
	for _, left := range []string{mapName, logName} {
		_ = v.fs.Remove(path.Join(v.dir, left+tmpName))
	}
	f, err := v.fs.Open(name, disk.Read)
	if block.KindOf(err) == block.KindNotFound {
		if err := v.noOverlay("the map is missing"); err != nil {
			return err
		}
		return v.snapshot()
	}
	if err != nil {
		return block.E("volume.open", name, 0, err)
	}
	st, err := f.Stat()
	if err == nil {
		l.gen, err = t.readSnapshot(io.NewSectionReader(f, 0, st.Size), v.id)
	}
	f.Close()
	if err != nil {
		if block.KindOf(err) == block.KindCorrupt {
			err = fmt.Errorf("the map is damaged and says what the workload wrote; restore it from a copy, or use an empty directory and the journal: %w", err)
		}
		return block.E("volume.open", name, 0, err)
	}
	l.limit = max(v.opt.Tune.LogBytes, min(st.Size, maxBatch))
	if err := v.loadLog(); err != nil {
		return err
	}
	t.settle()
	return nil
}

// noOverlay is an error if the workload wrote something here.
func (v *Volume) noOverlay(what string) error {
	names, err := v.fs.List(v.dir)
	if err != nil {
		return block.E("volume.open", v.dir, 0, err)
	}
	for _, n := range names {
		if strings.HasPrefix(n, "overlay.") {
			return block.E("volume.open", v.dir, block.KindCorrupt,
				fmt.Errorf("%s, but %s is there: what the workload wrote cannot be told from what it did not; restore the missing file", what, n))
		}
	}
	return nil
}

func (v *Volume) loadLog() error {
	l := &v.maplog
	name := path.Join(v.dir, logName)
	f, err := v.fs.Open(name, disk.Write)
	if block.KindOf(err) == block.KindNotFound {
		// A crash may come between the first snapshot and its log, never later.
		if l.gen != 1 {
			return block.E("volume.open", name, block.KindCorrupt, errors.New("the map log is missing; restore it"))
		}
		if err := v.noOverlay("the map log is missing"); err != nil {
			return err
		}
		return v.newLog()
	}
	if err != nil {
		return block.E("volume.open", name, 0, err)
	}
	l.file = f
	st, err := f.Stat()
	if err != nil {
		return block.E("volume.open", name, 0, err)
	}
	data := make([]byte, st.Size)
	if n, err := f.ReadAt(data, 0); n < len(data) {
		return block.E("volume.open", name, 0, err)
	}
	bad := func(err error) error {
		k := block.KindOf(err)
		var e *block.Error
		if !errors.As(err, &e) {
			k = block.KindCorrupt
		}
		return block.E("volume.open", name, k, err)
	}
	gen, err := parseLogHeader(data, v.id)
	switch {
	case err != nil:
		return bad(err)
	case gen < l.gen:
		return v.newLog() // its records are in the snapshot
	case gen > l.gen:
		return bad(fmt.Errorf("the log follows map %d, the map is number %d: an old map was put back", gen, l.gen))
	}
	if l.end, l.seq, err = replayLog(data, gen, &v.table.geometry, &replay{v.table, v.sigs}); err != nil {
		return bad(err)
	}
	if l.end < st.Size {
		v.opt.Log.Info("cutting what a crash left of an unfinished commit", "volume", v.opt.Name, "bytes", st.Size-l.end)
		if err := f.Truncate(l.end); err != nil {
			return block.E("volume.open", name, 0, err)
		}
		if err := f.Sync(); err != nil {
			return block.E("volume.open", name, 0, err)
		}
	}
	v.n.logBytes.Store(l.end)
	return nil
}

// replay applies a log to a table that nobody else uses yet.
type replay struct {
	t *table
	s *sigs
}

func (r *replay) held(start int64, sums []byte) error {
	// Even what reads the same is written again: it may be in memory only, and
	// clean there after a sync that failed.
	if err := r.s.writeRun(sums, start); err != nil {
		return err
	}
	r.base(start, int64(len(sums)/chunk.SigLen), baseHeld)
	return nil
}

func (r *replay) base(start, n int64, to uint8) {
	for i := start; i < start+n; {
		pi := int(i >> pageShift)
		p, end := r.t.pages[pi].Load(), min(start+n, int64(pi)<<pageShift+int64(r.t.pageLen(pi)))
		whole := i == int64(pi)<<pageShift && end == i+int64(r.t.pageLen(pi))
		switch {
		case p == nil && to == baseUntouched, p == r.t.zero && to == baseZero:
			i = end
			continue
		case p == nil && to == baseZero && whole:
			r.t.pages[pi].Store(r.t.zero)
			i = end
			continue
		}
		p = r.t.own(i)
		for ; i < end; i++ {
			c := int(i & (pageChunks - 1))
			p.setNib(c, p.nib(c)&^baseMask|to)
		}
	}
}

func (r *replay) masks(start, n int64, full bool) {
	for i := start; i < start+n; i++ {
		pi := int(i >> pageShift)
		if p := r.t.pages[pi].Load(); !full && (p == nil || p == r.t.zero) {
			i = int64(pi+1)<<pageShift - 1
			continue
		}
		p, c := r.t.own(i), int(i&(pageChunks-1))
		s := p.nib(c)
		r.t.clearMask(p, i, s)
		s &= baseMask
		if full {
			s |= nibMod | nibFull
		}
		p.setNib(c, s)
	}
}

func (r *replay) bits(i int64, m *mask) {
	p, c := r.t.own(i), int(i&(pageChunks-1))
	s := p.nib(c)
	r.t.clearMask(p, i, s)
	s &= baseMask
	total := r.t.sectors(i)
	for from := m.run(0, total, false); from < total; {
		end := m.run(from, total, true)
		r.t.addSectors(p, i, from, end)
		s |= nibMod
		from = m.run(end, total, false)
	}
	if s&nibMod != 0 && r.t.wholeBlocks(p, i) {
		s |= nibFull
	}
	p.setNib(c, s)
}

// settle counts what a table that was read holds, and shares what is uniform.
func (t *table) settle() {
	t.counts = counts{}
	for pi := range t.pages {
		p, n := t.pages[pi].Load(), t.pageLen(pi)
		if p != nil && p != t.zero {
			switch s, ok := p.uniform(n); {
			case ok && s == baseZero:
				p = t.zero
			case ok && s == baseUntouched:
				p = nil
			}
			t.pages[pi].Store(p)
		}
		switch p {
		case nil:
			t.counts.cat[catUntouched] += int64(n)
		case t.zero:
			t.counts.cat[catZero] += int64(n)
		default:
			sum := t.countPage(pi, p)
			for c := range sum.cat {
				t.counts.cat[c] += sum.cat[c]
			}
			t.counts.partial += sum.partial
			t.counts.sectors += sum.sectors
		}
	}
	t.dirty = dirtySet{pages: len(t.pages)}
}
