package sigs

import (
	"fmt"
	"sync"

	"forerun/block"
)

// Change brackets a write to the source: it is called before the n chunks from
// first on are touched, and what it returns, when nothing of the write can
// happen any more. Until then Get answers unknown for them and Learn is
// ignored. The first one since the table was opened or settled waits for a sync
// of the table's file.
func (t *Table) Change(first, n int64) (done func()) {
	end := t.o.Chunks
	if n < end-first {
		end = first + n
	}
	if first = max(first, 0); first >= end {
		return func() {}
	}
	// Registered before head is looked at, and in this order: see record.
	t.active.Add(1)
	t.changes.Add(1)
	t.turn(first, end, 1)
	t.markDirty()
	t.forget(first, end)
	return sync.OnceFunc(func() {
		t.turn(first, end, -1)
		t.active.Add(-1)
		t.forgot.ring()
	})
}

// turn moves the stripes of [first, end) on to another generation.
func (t *Table) turn(first, end int64, active int) {
	p, last := first/perPage, (end-1)/perPage
	last = min(last, p+int64(len(t.stripes))-1) // each once
	for ; p <= last; p++ {
		s := t.stripe(p)
		s.mu.Lock()
		s.gen++
		s.active += active
		s.mu.Unlock()
	}
}

// markDirty returns when the file durably says that it is not to be believed,
// or when there is nothing that could be done about it.
func (t *Table) markDirty() {
	t.head.RLock()
	enough := t.head.dirty || t.head.gone
	t.head.RUnlock()
	if enough {
		return
	}
	t.head.Lock()
	defer t.head.Unlock()
	if t.head.dirty || t.head.gone {
		return
	}
	if err := t.writeHeader(dirty, t.head.state); err != nil {
		t.failLocked(err)
		return
	}
	t.head.dirty = true
}

// forget makes [first, end) unknown, in memory and in the file.
func (t *Table) forget(first, end int64) {
	from, to := int64(-1), int64(0) // whole pages that are not void in the file
	for i := first; i < end && !t.off.Load(); {
		p, k, s := t.at(i)
		if t.groups[p/perGroup].Load() == nil {
			i = (p/perGroup + 1) * perGroup * perPage
			continue
		}
		n := int(min(end-i, int64(t.chunksOf(p)-k)))
		if t.forgetPage(s, p, k, n) {
			if from < 0 {
				from = p
			}
			to = p + 1
		}
		i += int64(n)
	}
	if from >= 0 && !t.off.Load() {
		if err := t.f.Punch(t.first+from*pageBytes, (to-from)*pageBytes); err != nil {
			t.fail(err)
		}
	}
}

// forgetPage says whether the page is to be made void in the file.
func (t *Table) forgetPage(s *stripe, p int64, k, n int) (punch bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	where := t.entry(p).where()
	switch {
	case where == none:
		return false
	case n == t.chunksOf(p):
		t.count.forgotten.Add(int64(t.entry(p).known()))
		if s.cached == p {
			s.cached = -1
		}
		t.setEntry(p, 0)
		return where != allNil
	}
	if where != allNil && t.fetch(s, p) == nil {
		return false
	}
	b := t.edit(s, p)
	changed := false
	for j := k; j < k+n; j++ {
		if b.set(j, Unknown, [32]byte{}) {
			t.count.forgotten.Add(1)
			changed = true
		}
	}
	if changed {
		t.store(s, p)
	}
	return false
}

// Settle is called at a quiet moment, such as after a checkpoint was applied,
// so that what is known is believed again after a crash. state flushes the
// source and answers its change state (FileState), or "" when it has none that
// can be told. It is called only if there is something to settle, and what it
// answers is recorded only if nothing was being changed from before it was
// called until after it returned; done says whether everything is settled. The
// error is that of state.
func (t *Table) Settle(state func() (string, error)) (done bool, err error) {
	return t.record(open, state)
}

// Close settles what was changed, as Settle does, and closes the table: Get
// answers unknown, Learn is ignored and Change does nothing. It is called when
// the source will not be changed any more but is still owned. state may be nil:
// then what was changed since the last Settle costs all that is known. The error
// is that of state.
func (t *Table) Close(state func() (string, error)) error {
	t.shut.Store(true)
	t.learned.ring()
	t.forgot.ring()
	for i := range t.stripes { // who has one may still be learning
		s := &t.stripes[i]
		s.mu.Lock()
		s.cached, s.buf = -1, nil
		s.mu.Unlock()
	}
	_, err := t.record(closed, state)
	t.head.Lock()
	defer t.head.Unlock()
	t.head.gone = true
	if t.f != nil && !t.head.ended {
		t.head.ended = true
		if cerr := t.f.Close(); cerr != nil { // what had to be durable is
			t.log.Warn("the file of signatures was not closed", "file", t.name, "err", cerr)
		}
	}
	return err
}

// record makes the file durable and its header say what it is, if nothing was
// changed meanwhile.
func (t *Table) record(status uint32, state func() (string, error)) (bool, error) {
	t.settling.Lock()
	defer t.settling.Unlock()
	// A Change that is counted in seen has been counted in active before: so it
	// either has ended or is seen there, and one that is not makes seen differ.
	seen := t.changes.Load()
	if t.active.Load() > 0 {
		return false, nil
	}
	t.head.RLock()
	isDirty, gone, now := t.head.dirty, t.head.gone, t.head.state
	t.head.RUnlock()
	switch {
	case gone:
		return false, nil
	case isDirty || now == "":
		if state == nil {
			return false, nil
		}
		var err error
		if now, err = state(); err == nil && len(now) > maxString {
			err = fmt.Errorf("a state of %d bytes; there is room for %d", len(now), maxString)
		}
		if err != nil {
			return false, block.E("sigs.settle", t.name, 0, err)
		}
		if now == "" {
			return false, nil
		}
	case status == open:
		return true, nil
	}
	// Whatever was forgotten is in the file, and durable, before it is believed.
	t.save()
	t.head.RLock()
	gone = t.head.gone
	t.head.RUnlock()
	if gone {
		return false, nil
	}
	if err := t.f.Sync(); err != nil {
		t.fail(err)
		return false, nil
	}
	t.head.Lock()
	defer t.head.Unlock()
	if t.head.gone || t.changes.Load() != seen {
		return false, nil
	}
	if err := t.writeHeader(status, now); err != nil {
		t.failLocked(err)
		return false, nil
	}
	t.head.dirty, t.head.state = false, now
	return true, nil
}
