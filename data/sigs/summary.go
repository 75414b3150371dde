package sigs

import (
	"io"
	"slices"
)

// entry is what the summary says of page p, whose stripe is locked.
func (t *Table) entry(p int64) entry {
	g := t.groups[p/perGroup].Load()
	if g == nil {
		return 0
	}
	return g.e[p%perGroup]
}

// setEntry changes it, and what is counted. The stripe is locked.
func (t *Table) setEntry(p int64, e entry) {
	g := t.group(p / perGroup)
	old := g.e[p%perGroup]
	if old == e {
		return
	}
	g.e[p%perGroup] = e
	g.stale.Store(true)
	t.data.Add(int64(e.data() - old.data()))
	t.zero.Add(int64(e.zero() - old.zero()))
	g.known.Add(int64(e.known() - old.known()))
}

func (t *Table) group(i int64) *group {
	if g := t.groups[i].Load(); g != nil {
		return g
	}
	g := new(group)
	if !t.groups[i].CompareAndSwap(nil, g) { // somebody of another stripe was first
		g = t.groups[i].Load()
	}
	return g
}

// chunksOfGroup is how many chunks the pages of a group have.
func (t *Table) chunksOfGroup(i int64) int64 {
	return min(perGroup*perPage, t.o.Chunks-i*perGroup*perPage)
}

// load reads the summary of a file that is believed. exact: it was written when
// everything else was. Otherwise pages may have been written since, and some of
// the summary may be torn: then it is taken at its word only for pages it calls
// zero, and any other page that takes space may hold something.
func (t *Table) load(exact bool) error {
	look := make([]bool, len(t.groups))
	b := new(page)
	for i := range int64(len(t.groups)) {
		n, err := t.f.ReadAt(b[:], (1+i)*pageBytes)
		if err != nil && err != io.EOF {
			return err
		}
		clear(b[n:])
		if !b.valid(typeSummary, i, &t.id) {
			look[i] = !exact || *b != page{}
			continue
		}
		look[i] = !exact
		for j := range min(perGroup, t.pages-i*perGroup) {
			p := i*perGroup + j
			e, all := entry(le.Uint16(b[32+2*j:])), t.chunksOf(p)
			switch {
			case e.where() == allNil:
				t.setEntry(p, makeEntry(allNil, 0, all))
			case e.where() == none || !exact:
			case e.where() == inPage && e.known() <= all:
				t.setEntry(p, e)
			default:
				t.setEntry(p, makeEntry(maybe, 0, 0))
			}
		}
		if g := t.groups[i].Load(); g != nil {
			g.stale.Store(!exact)
		}
	}
	for at := t.first; slices.Contains(look, true); {
		start, end, err := t.f.Data(at)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		last := min((end-t.first+pageBytes-1)/pageBytes, t.pages)
		for p := (start - t.first) / pageBytes; p < last; p++ {
			if look[p/perGroup] && t.entry(p).where() == none {
				t.setEntry(p, makeEntry(maybe, 0, 0))
			}
		}
		at = end
	}
	return nil
}

// save writes what changed of the summary to the file, without a sync, so that
// the zeros are known to a process that comes after a kill.
func (t *Table) save() {
	t.saving.Lock()
	defer t.saving.Unlock()
	b := new(page)
	for i := range int64(len(t.groups)) {
		g := t.groups[i].Load()
		if g == nil || !g.stale.Swap(false) {
			continue
		}
		b.begin(typeSummary, i, &t.id)
		for j := range min(perGroup, t.pages-i*perGroup) {
			s := t.stripe(i*perGroup + j)
			s.mu.Lock()
			le.PutUint16(b[32+2*j:], uint16(g.e[j]))
			s.mu.Unlock()
		}
		b.seal()
		if t.head.RLock(); t.head.gone {
			t.head.RUnlock()
			return
		}
		t.head.RUnlock()
		if _, err := t.f.WriteAt(b[:], (1+i)*pageBytes); err != nil {
			t.fail(err)
			return
		}
	}
}

// nextUnknown is the first chunk from i on that is unknown, or the number of
// chunks. Pages that were not looked at yet are.
func (t *Table) nextUnknown(i int64) int64 {
	for i < t.o.Chunks && !t.shut.Load() {
		p, k, s := t.at(i)
		gi := p / perGroup
		if g := t.groups[gi].Load(); g == nil {
			return i
		} else if g.known.Load() == t.chunksOfGroup(gi) {
			i = (gi + 1) * perGroup * perPage
			continue
		}
		s.mu.Lock()
		all := t.chunksOf(p)
		if t.entry(p).known() < all {
			for ; k < all; k++ {
				if kind, _ := t.get(s, p, k); kind == Unknown {
					s.mu.Unlock()
					return p*perPage + int64(k)
				}
			}
		}
		s.mu.Unlock()
		i = (p + 1) * perPage
	}
	return t.o.Chunks
}

// unknownRun is how many chunks from i on are unknown, at most most.
func (t *Table) unknownRun(i, most int64) int64 {
	n := int64(0)
	for n < most && i+n < t.o.Chunks {
		if kind, _ := t.Get(i + n); kind != Unknown {
			break
		}
		n++
	}
	return n
}
