package store

import "sync/atomic"

// Stats is what a store holds and has done since Open. Bytes are bytes.
type Stats struct {
	Chunks      int64 // chunks held; recipes and pieces are chunks too
	PlainBytes  int64 // their plain bytes; those of a recipe are its pieces'
	StoredBytes int64 // the bytes of their records in packs
	DiskBytes   int64 // the bytes of all packs, with what Sweep could free
	Packs       int

	Puts        int64 // chunks stored
	Duplicates  int64 // Puts of what was there
	Hits        int64 // Get, GetPacked, Has: found
	Misses      int64 // Get, GetPacked, Has: not held
	Corrupt     int64 // chunks dropped because their bytes were not theirs
	Syncs       int64 // groups of synced packs; many Sync calls share one
	SyncErrors  int64
	Checkpoints int64 // of the block map
	Merges      int64 // of its runs
	Swept       int64 // bytes freed by Sweep

	EvictedChunks int64 // chunks that went because of Options.LimitBytes
	EvictedBytes  int64 // bytes of the packs they were in

	MapRuns    int   // sorted files of the block map
	MapEntries int64 // entries in them, dead ones too
	MapBytes   int64 // their bytes on disk
	MapMemory  int64 // what they keep in memory
	MapPending int   // entries in memory that no run has yet
	MapDamaged int64 // pages of the map found damaged; it is repaired from the packs
}

type counters struct {
	puts, dups, hits, misses, corrupt, syncs, syncErrors, checkpoints, merges, swept, damaged, evictedChunks, evictedBytes atomic.Int64
}

// Stats returns the numbers of the moment.
func (s *Store) Stats() Stats {
	c := &s.count
	st := Stats{
		Puts: c.puts.Load(), Duplicates: c.dups.Load(), Hits: c.hits.Load(), Misses: c.misses.Load(),
		Corrupt: c.corrupt.Load(), Syncs: c.syncs.Load(), SyncErrors: c.syncErrors.Load(),
		Checkpoints: c.checkpoints.Load(), Merges: c.merges.Load(), Swept: c.swept.Load(), MapDamaged: c.damaged.Load(),
		EvictedChunks: c.evictedChunks.Load(), EvictedBytes: c.evictedBytes.Load(),
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, p := range s.packs {
		st.Chunks += p.live.chunks
		st.PlainBytes += p.live.plain
		st.StoredBytes += p.live.stored
		st.DiskBytes += p.end
	}
	st.Packs = len(s.packs)
	st.MapPending = len(s.mem) + len(s.imm)
	if s.ver != nil {
		st.MapRuns = len(s.ver.runs)
		for _, r := range s.ver.runs {
			st.MapEntries += int64(r.Count())
			st.MapBytes += r.Size()
			st.MapMemory += r.Memory()
		}
	}
	return st
}
