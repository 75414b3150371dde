package journal

import (
	"context"
	"fmt"
	"hash/crc32"
	"math"

	"forerun/block"
)

const (
	pageSize    = 4096
	groupBytes  = 512 << 10 // most bytes copied together for one pwrite
	directBytes = 64 << 10  // payloads longer than this are written from the caller's memory
)

var zeroPage [pageSize]byte

// op is one write on its way: its turn in ranges, its place in the queue, and
// its record. Ops are taken from a fixed pool.
type op struct {
	wake chan struct{} // capacity 1: turn in ranges, then end of append
	self [1]*op

	off, n   int64 // the locked range
	blockers int   // guarded by ranges.mu

	rec     recInfo
	data    []byte
	seg     *segment
	promote bool // leads next; guarded by Journal.mu
	err     error
}

// WriteAt appends, applies and acknowledges; with FUA it syncs the journal too.
func (j *Journal) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	return j.change(ctx, "write", TypeWrite, p, off, int64(len(p)), f)
}

// Zero appends a record without payload, applies and acknowledges.
func (j *Journal) Zero(ctx context.Context, off, n int64, f block.Flags) error {
	return j.change(ctx, "zero", TypeZero, nil, off, n, f)
}

// Trim appends a record without payload, applies and acknowledges.
func (j *Journal) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	return j.change(ctx, "trim", TypeTrim, nil, off, n, f)
}

func (j *Journal) change(ctx context.Context, name string, typ Type, p []byte, off, n int64, f block.Flags) error {
	if err := j.enter(name); err != nil {
		return err
	}
	defer j.life.RUnlock()
	if err := j.check(name, off, n); err != nil {
		return err
	}
	o, err := j.take(ctx)
	if err != nil {
		return block.E("journal."+name, j.dir, 0, err)
	}
	o.off, o.n = off, n
	if err := j.ranges.lock(ctx, o); err != nil {
		j.free <- o
		return block.E("journal."+name, j.dir, 0, err)
	}
	if typ != TypeWrite {
		err = j.put(ctx, o, typ, nil, off, n, f)
	}
	for len(p) > 0 && err == nil {
		k := min(len(p), j.piece)
		err = j.put(ctx, o, typ, p[:k], off, int64(k), f)
		p, off = p[k:], off+int64(k)
	}
	last := o.rec.seq
	j.ranges.unlock(o)
	o.data = nil
	j.free <- o
	if err == nil && f.Has(block.FUA) {
		err = j.syncTo(ctx, last)
	}
	return err
}

// check refuses what must never stand in the log, because it could not be replayed.
func (j *Journal) check(name string, off, n int64) error {
	switch {
	case j.info.ReadOnly:
		return block.E("journal."+name, j.dir, block.KindReadOnly, nil)
	case off < 0 || n <= 0 || off > math.MaxInt64-n:
		return block.E("journal."+name, j.dir, block.KindInvalid, fmt.Errorf("%d bytes at %d is not a range", n, off))
	case off+n > j.info.Size:
		return block.E("journal."+name, j.dir, block.KindRange,
			fmt.Errorf("%d bytes at %d end beyond the device's %d bytes", n, off, j.info.Size))
	}
	return nil
}

func (j *Journal) take(ctx context.Context) (*op, error) {
	select {
	case o := <-j.free:
		return o, nil
	default:
	}
	select {
	case o := <-j.free:
		return o, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// put appends one record and applies it.
func (j *Journal) put(ctx context.Context, o *op, typ Type, p []byte, off, n int64, f block.Flags) error {
	if err := j.append(ctx, o, typ, p, off, n, f); err != nil {
		return err
	}
	var err error
	switch below := f &^ block.FUA; typ {
	case TypeWrite:
		err = j.below.WriteAt(ctx, p, off, below)
	case TypeZero:
		err = j.below.Zero(ctx, off, n, below)
	case TypeTrim:
		err = j.below.Trim(ctx, off, n, below)
	}
	j.settle(o.seg) // before the void: a checkpoint must not wait for what waits for it
	if err != nil {
		// The caller is told that it failed, so a restart must not do it after all.
		// When even this record cannot be written, the write stays one that "may
		// have happened or not".
		if j.append(context.Background(), o, TypeVoid, nil, int64(o.rec.seq), 0, 0) == nil {
			j.settle(o.seg)
		}
	}
	return err
}

// settle counts a record of seg as applied.
func (j *Journal) settle(seg *segment) {
	if seg.pending.Add(-1) == 0 && seg.sealed.Load() {
		j.mu.Lock()
		j.drained.ring()
		j.mu.Unlock()
	}
}

// append puts one record into the log: o.rec and o.seg say where. When the
// disk is full and a checkpoint could give back space, it makes one and tries
// once more.
func (j *Journal) append(ctx context.Context, o *op, typ Type, p []byte, off, n int64, f block.Flags) error {
	err := j.appendOnce(ctx, o, typ, p, off, n, f)
	if block.KindOf(err) == block.KindNoSpace {
		j.stats.refused.Add(1)
		j.tight.Store(true) // a hold is worth a copy anew, a write is worth more
		if j.checkpoint(false) == nil {
			err = j.appendOnce(ctx, o, typ, p, off, n, f)
		}
		j.tight.Store(false)
	}
	if err != nil {
		return block.E("journal.append", j.dir, 0, err)
	}
	return nil
}

func (j *Journal) appendOnce(ctx context.Context, o *op, typ Type, p []byte, off, n int64, f block.Flags) error {
	o.rec = recInfo{typ: typ, flags: uint32(f), off: uint64(off), length: uint64(n)}
	o.data, o.err, o.promote = p, nil, false
	if typ == TypeWrite {
		o.rec.payload = crc32.Checksum(p, castagnoli)
	}
	need := o.rec.size()

	j.mu.Lock()
	if err := j.admit(ctx, need); err != nil {
		j.mu.Unlock()
		return err
	}
	j.reserved += need
	batch := o.self[:]
	if j.leading || j.wanted {
		j.queue = append(j.queue, o)
		if !j.leading { // the keeper is about to; it passes the lead on
			j.lead1.ring()
		}
		j.mu.Unlock()
		<-o.wake // bounded: a leader does pwrites only, it waits for nobody
		j.mu.Lock()
		if !o.promote {
			j.reserved -= need
			j.mu.Unlock()
			return o.err
		}
		j.batch, j.queue = j.queue, j.batch[:0]
		batch = j.batch
	}
	j.leading = true
	j.mu.Unlock()

	for i := 0; i < len(batch); {
		n, err := j.group(batch[i:])
		for _, b := range batch[i : i+n] {
			b.err = err
		}
		i += n
	}

	j.mu.Lock()
	j.reserved -= need
	for _, b := range batch {
		if b != o {
			b.wake <- struct{}{}
		}
	}
	j.handOver()
	j.mu.Unlock()
	return o.err
}

// handOver ends a lead: the keeper leads next if it asked, else the first in
// the queue, else nobody. mu is held.
func (j *Journal) handOver() {
	switch {
	case j.wanted:
		j.leading = false
		j.lead1.ring()
	case len(j.queue) > 0:
		j.leading = true
		o := j.queue[0]
		o.promote = true
		o.wake <- struct{}{}
	default:
		j.leading = false
	}
}

// admit waits until the journal may grow by need bytes. mu is held, and
// released while it waits.
func (j *Journal) admit(ctx context.Context, need int64) error {
	for waits := 0; ; waits++ {
		if j.failed != nil {
			return j.failed
		}
		if j.fits(need) {
			if waits > 0 {
				j.waiting--
			}
			return nil
		}
		if waits == 0 {
			j.waiting++
			j.stats.waits.Add(1)
		} else if j.stuck != nil {
			j.waiting--
			return block.E("journal.checkpoint", j.dir, 0,
				fmt.Errorf("the journal is full (%d bytes) and the device below cannot be flushed: %w", j.opt.MaxBytes, j.stuck))
		}
		ch := j.space.wait()
		j.mu.Unlock()
		j.poke()
		var err error
		select {
		case <-ch:
		case <-ctx.Done():
			err = ctx.Err()
		case <-j.stop:
			err = block.E("journal.append", j.dir, block.KindClosed, nil)
		}
		j.mu.Lock()
		if err != nil {
			j.waiting--
			return err
		}
	}
}

// fits says whether need more bytes keep the journal within MaxBytes. A record
// takes at most a quarter of a segment, so at most a quarter of one is left
// over at its end. mu is held.
func (j *Journal) fits(need int64) bool {
	if len(j.segs) <= 1 && j.reserved == 0 {
		return true
	}
	size := j.opt.SegmentBytes
	used, room := size, int64(0) // a checkpoint needs a new segment
	for _, s := range j.segs {
		used += s.size
		if !s.sealed.Load() {
			room = s.size - s.tail
		}
	}
	if more := (j.reserved+need)*4/3 - room; more > 0 {
		used += (more + size - 1) / size * size
	}
	return used <= j.opt.MaxBytes
}

// group writes records for the first ops of batch with one pwrite (three when
// a long payload is among them) and answers how many it settled, all with the
// same error. The caller is the leader.
func (j *Journal) group(batch []*op) (int, error) {
	if j.cur == nil || j.cur.tail+batch[0].rec.size() > j.cur.size {
		if err := j.roll(); err != nil {
			return len(batch), err
		}
	}
	seg, pos, claim := j.cur, j.pos, j.claim.Load()
	buf, at, n := j.buf[:0], j.cur.tail, 0
	var direct []byte
	for n < len(batch) && direct == nil {
		o := batch[n]
		if at+int64(len(buf))+o.rec.size() > seg.size {
			break
		}
		long := len(o.data) > directBytes
		if n > 0 && !long && int64(len(buf))+o.rec.size() > groupBytes {
			break
		}
		o.rec.seq, o.rec.prev, o.rec.durable = pos.Sequence+1, pos.Checksum, claim
		h := len(buf)
		buf = buf[:h+recHeader]
		pos = Position{o.rec.seq, o.rec.encode(buf[h:], seg.seed)}
		o.seg = seg
		n++
		if long {
			direct = o.data
			break
		}
		buf = append(buf, o.data...)
		buf = append(buf, zeroPage[:-len(buf)&(recAlign-1)]...)
	}
	end := at + int64(len(buf)) + (int64(len(direct))+recAlign-1)&^(recAlign-1)
	err := j.pwrite(seg, buf, direct, at)
	if err != nil {
		// What did land must not be taken for records: the next append overwrites it,
		// and until then this does.
		seg.file.WriteAt(zeroPage[:recHeader], at)
		return n, block.E("journal.append", seg.path, 0, err)
	}

	seg.pending.Add(int64(n))
	j.mu.Lock()
	seg.tail, seg.last = end, pos
	j.pos = pos
	if j.readers > 0 {
		j.arrived.ring()
	}
	j.mu.Unlock()
	j.stats.records.Add(int64(n))
	j.stats.bytes.Add(end - at)
	j.stats.groups.Add(1)
	if j.since.Add(end-at) >= j.opt.CheckpointBytes {
		j.poke()
	}
	return n, nil
}

// pwrite writes buf, then direct behind it, and fills the last page with
// zeros: nothing stale follows the tail, and a page of a recycled segment is
// never read from disk in order to be changed in part.
func (j *Journal) pwrite(seg *segment, buf, direct []byte, at int64) error {
	if direct == nil {
		buf = append(buf, zeroPage[:-(at+int64(len(buf)))&(pageSize-1)]...)
		_, err := seg.file.WriteAt(buf, at)
		return err
	}
	if _, err := seg.file.WriteAt(buf, at); err != nil {
		return err
	}
	at += int64(len(buf))
	if _, err := seg.file.WriteAt(direct, at); err != nil {
		return err
	}
	at += int64(len(direct))
	if pad := -at & (pageSize - 1); pad > 0 {
		_, err := seg.file.WriteAt(zeroPage[:pad], at)
		return err
	}
	return nil
}

// poke asks the keeper to look whether a checkpoint is due.
func (j *Journal) poke() {
	select {
	case j.kick <- struct{}{}:
	default:
	}
}
