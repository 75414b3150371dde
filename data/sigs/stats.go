package sigs

import "sync/atomic"

// counters only grow.
type counters struct {
	learned, ignored, forgotten, torn atomic.Int64
	kept                              atomic.Bool
}

// Stats is where a table stands.
type Stats struct {
	Chunks, Data, Zero int64  // of the source; of them known to be data, to be zero
	Learned            int64  // chunks, since Open
	Ignored            int64  // chunks that were changed while they were learned
	Forgotten          int64  // chunks that were known when they were changed
	Torn               int64  // pages of the file that a crash or damage made void
	Kept               bool   // Open believed what the file said
	Dirty              bool   // the source was changed since the table was last settled
	Off                string // why the table is off, else empty
}

// Stats returns the numbers now.
func (t *Table) Stats() Stats {
	s := Stats{Chunks: t.o.Chunks, Learned: t.count.learned.Load(), Ignored: t.count.ignored.Load(),
		Forgotten: t.count.forgotten.Load(), Torn: t.count.torn.Load(), Kept: t.count.kept.Load()}
	s.Data, s.Zero = t.Known()
	t.head.RLock()
	defer t.head.RUnlock()
	s.Dirty, s.Off = t.head.dirty, t.head.why
	return s
}
