package raw

import "sync/atomic"

// Stats are counts since the device was opened.
type Stats struct {
	Reads, ReadBytes   int64
	Writes, WriteBytes int64
	Zeros, Trims       int64
	Flushes, Extents   int64
	Errors             int64 // calls that failed
}

type counters struct {
	reads, readBytes, writes, writeBytes atomic.Int64
	zeros, trims, flushes, extents       atomic.Int64
	errors                               atomic.Int64
}

// Stats returns the counts.
func (d *Device) Stats() Stats {
	c := &d.stats
	return Stats{
		Reads: c.reads.Load(), ReadBytes: c.readBytes.Load(),
		Writes: c.writes.Load(), WriteBytes: c.writeBytes.Load(),
		Zeros: c.zeros.Load(), Trims: c.trims.Load(),
		Flushes: c.flushes.Load(), Extents: c.extents.Load(), Errors: c.errors.Load(),
	}
}
