package cache

// Stats is what a cache holds and has done.
type Stats struct {
	MemoryHits  int64 // reads served from memory
	ScratchHits int64 // reads served from the scratch file
	Misses      int64 // reads not served
	Promoted    int64 // chunks taken from scratch into memory

	MemoryBytes   int64 // bytes in memory, of all volumes that share it
	ScratchChunks int64 // chunks in the scratch file
	ScratchSlots  int64 // slots it may have; less than asked for when its disk was full
	Evicted       int64 // chunks that made room in the scratch file
	Corrupt       int64 // reads from the scratch file that did not match their checksum
	Failures      int64 // reads and writes of the scratch file that failed
	ScratchOff    bool  // it is not written any more
}

// Stats returns the figures of this moment.
func (c *Cache) Stats() Stats {
	st := Stats{MemoryHits: c.memoryHits.Load(), ScratchHits: c.scratchHits.Load(), Misses: c.misses.Load(),
		Promoted: c.promoted.Load(), MemoryBytes: c.mem.Bytes()}
	if s := c.scratch; s != nil {
		s.mu.RLock()
		st.ScratchChunks, st.ScratchSlots, st.ScratchOff = int64(len(s.index)), int64(s.limit), s.off
		s.mu.RUnlock()
		st.Evicted, st.Corrupt, st.Failures = s.evicted.Load(), s.corrupt.Load(), s.failures.Load()
	}
	return st
}
