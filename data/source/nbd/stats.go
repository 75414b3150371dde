package nbd

import "sync/atomic"

// Stats are counts since the client was opened.
type Stats struct {
	Connections        int   // alive now
	Reconnects         int64 // connections made again after a loss
	Resent             int64 // requests sent again
	Reads, ReadBytes   int64 // requests and bytes asked, pieces counted singly
	Writes, WriteBytes int64
	StatusRequests     int64 // block status requests
	Errors             int64 // requests the server answered with an error
}

type counters struct {
	reconnects, resent, reads, readBytes     atomic.Int64
	writes, writeBytes, statusReqs, srvError atomic.Int64
}

// Stats returns the counts.
func (c *Client) Stats() Stats {
	n := &c.stats
	s := Stats{
		Reconnects: n.reconnects.Load(), Resent: n.resent.Load(),
		Reads: n.reads.Load(), ReadBytes: n.readBytes.Load(),
		Writes: n.writes.Load(), WriteBytes: n.writeBytes.Load(),
		StatusRequests: n.statusReqs.Load(), Errors: n.srvError.Load(),
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s.Connections = c.alive
	return s
}
