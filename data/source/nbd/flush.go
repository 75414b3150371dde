package nbd

import (
	"errors"
	"sync"
)

// flushState knows whether acknowledged writes may be lost. Two rules make it
// complete: a flush goes to the oldest connection that lives, so that all
// connections to an earlier life of the server have been given up when one
// succeeds; and giving up a connection on which writes were acknowledged since
// the last good flush is a doubt.
type flushState struct {
	mu      sync.Mutex
	acked   uint64 // changes acknowledged without FUA
	synced  uint64 // of those, durable or reported as doubtful
	doubt   bool
	losses  uint64 // times a doubt arose
	reports uint64 // times a doubt was told
}

// mark is the state when a flush began.
type mark struct{ acked, losses, reports uint64 }

var errDoubt = errors.New("the connection was lost after writes that were not flushed yet, and the server may have lost them: what was written since the last good flush must be written again")

// wrote notes a change acknowledged on c without being durable.
func (s *flushState) wrote(c *conn) {
	s.mu.Lock()
	s.acked++
	c.lastAck = s.acked
	s.mu.Unlock()
}

// lost notes the end of c.
func (s *flushState) lost(c *conn) {
	s.mu.Lock()
	if c.lastAck > s.synced {
		s.doubt = true
		s.losses++
	}
	s.mu.Unlock()
}

func (s *flushState) begin() mark {
	s.mu.Lock()
	defer s.mu.Unlock()
	return mark{s.acked, s.losses, s.reports}
}

// end says what a flush that the server answered well is worth. A doubt is
// told once, and to every flush that was under way when it was told.
func (s *flushState) end(m mark) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.synced = max(s.synced, m.acked)
	switch {
	case s.doubt:
		s.doubt = false
		s.reports++
		return errDoubt
	case s.reports != m.reports:
		return errDoubt
	}
	return nil
}

// endFUA is end for a flush that stands in for FUA of one write made after m:
// only a loss since then matters, and it is left to be told by Flush.
func (s *flushState) endFUA(m mark) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.losses != m.losses {
		return errDoubt
	}
	return nil
}
