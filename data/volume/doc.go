// Package volume is one disk as the workload sees it, while its bytes are
// still on the way: a block.Device that answers each sector from the newest
// place that has it.
//
//	overlay   what the workload wrote, raw, at the volume's own offsets
//	base      what the source had: untouched (only there), held (here, by
//	          signature, in the store and perhaps a tier), or zero
//
// Per chunk the map knows the base and, per 512-byte sector, whether the
// overlay has it. A read takes masked sectors from the overlay and all others
// from the base. The two never merge: what arrives from the source goes to the
// store and changes the base only, what the workload writes goes to the
// overlay and changes the mask only. So nothing that arrives late can overwrite
// a write, and a write needs no bytes from the source, however small it is.
//
// # Invariants
//
//   - A mask bit is set after the bytes are in the overlay. A base becomes held
//     after the store took the chunk and its signature was written.
//   - Mask bits are cleared only when the base becomes zero, in one step, with
//     the chunk's region locked exclusively. A base that is zero stays zero.
//     So a sector that was ever written never shows the source's bytes again.
//   - On disk: data, then sync, then map. A map record that says held follows a
//     sync of the store, one that says written follows a sync of the overlay.
//     Records hold the whole state of a chunk, not a change, so replaying them
//     twice or from a later moment does no harm. A mask is never made durable
//     ahead of the base that belongs to it: when the base is zero, its record
//     stands before the mask's.
//   - Between two Flush calls the overlay may lose or tear anything after a
//     crash; the journal above replays it. What was there at the last Flush
//     that returned nil is there after any crash.
//   - A signature that does not match is never served: on arrival the chunk is
//     refused, in the store the chunk becomes untouched and is fetched again.
//
// # Locks, outermost first
//
//	gate        counts calls; Close waits for them
//	commitMu    one commit or checkpoint at a time
//	region      by stripes of 1 MiB of the volume: readers, writers and
//	            arrivals share it, Zero and Trim hold it alone; those that need
//	            several take them in ascending order
//	arrival     by stripes of chunks: one Deliver or invalidation of a chunk at a time
//	            (taken before region, never while one is held)
//	page.mu     changes of the 4096 chunks of a page; readers load words atomically
//	table.mu    counters and the set of changed chunks
//
// No lock is held while the remote is asked or the store reads.
//
// A reader must not see half of a sector from one write and half from another,
// and a buffered file gives no such promise between its reads and writes.
// Writers count themselves in a word of the stripe; a reader that saw one come or go reads
// again with the region held alone (a sequence lock as in Lameter, "Effective
// Synchronization on Linux/NUMA Systems", 2005).
package volume
