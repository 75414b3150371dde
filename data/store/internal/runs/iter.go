package runs

import (
	"bytes"
)

const readBatch = 16 // pages

// Iter walks a run in order of signature.
type Iter struct {
	r    *Run
	skip bool
	buf  []byte
	base uint32 // number of the first page in buf
	have int    // pages in buf
	page uint32 // page of the next entry
	i, n int    // next entry in it, entries in it
	cur  Entry

	// Damaged counts the pages passed over.
	Damaged int
}

// Iter begins a walk. With skip, damaged pages are passed over and counted;
// without it they end the walk with an error.
func (r *Run) Iter(skip bool) *Iter {
	return &Iter{r: r, skip: skip, buf: make([]byte, min(readBatch, int(r.pages))*PageSize)}
}

// Next returns the next entry, nil at the end. It is valid until the next call.
func (it *Iter) Next() (*Entry, error) {
	for it.i == it.n {
		if it.page >= it.r.pages {
			return nil, nil
		}
		n, err := it.load(it.page)
		it.page++
		if err != nil {
			if !it.skip {
				return nil, err
			}
			it.Damaged++
			continue
		}
		it.i, it.n = 0, n
	}
	at := int(it.page-1-it.base)*PageSize + pageHeader + it.i*EntrySize
	e := it.buf[at : at+EntrySize]
	copy(it.cur.Sig[:], e)
	it.cur.Loc = getLoc(e)
	it.i++
	return &it.cur, nil
}

func (it *Iter) load(p uint32) (int, error) {
	if it.have == 0 || p >= it.base+uint32(it.have) {
		n := min(readBatch, int(it.r.pages-p))
		it.base, it.have = p, n
		if readFull(it.r.f, it.buf[:n*PageSize], int64(p)*PageSize) != nil {
			// One bad sector must not cost the whole batch.
			it.have = 1
			return it.r.page(it.buf[:PageSize], p)
		}
	}
	at := int(p-it.base) * PageSize
	n, ok := checkPage(it.buf[at:at+PageSize], it.r.id, p)
	if !ok {
		return 0, &pageError{it.r.path, p, nil}
	}
	return n, nil
}

// Merged walks several runs at once; where more than one holds a signature,
// the entry of the first of them wins.
type Merged struct {
	its  []*Iter
	head []*Entry
	cur  Entry
}

// Merge begins a walk over rs, the newest first.
func Merge(rs []*Run, skip bool) (*Merged, error) {
	m := &Merged{its: make([]*Iter, len(rs)), head: make([]*Entry, len(rs))}
	for i, r := range rs {
		m.its[i] = r.Iter(skip)
		var err error
		if m.head[i], err = m.its[i].Next(); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// Next returns the next entry, nil at the end. It is valid until the next call.
func (m *Merged) Next() (*Entry, error) {
	best := -1
	for i, e := range m.head {
		if e != nil && (best < 0 || bytes.Compare(e.Sig[:], m.head[best].Sig[:]) < 0) {
			best = i
		}
	}
	if best < 0 {
		return nil, nil
	}
	m.cur = *m.head[best]
	for i, e := range m.head {
		if e != nil && e.Sig == m.cur.Sig {
			var err error
			if m.head[i], err = m.its[i].Next(); err != nil {
				return nil, err
			}
		}
	}
	return &m.cur, nil
}

// Damaged is how many pages were passed over.
func (m *Merged) Damaged() (n int) {
	for _, it := range m.its {
		n += it.Damaged
	}
	return n
}
