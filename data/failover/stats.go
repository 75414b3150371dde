package failover

import (
	"sync/atomic"
	"time"
)

// phase is what is being done with a target.
type phase uint8

const (
	phaseStandby phase = iota
	phaseTrying
	phaseServing
	phaseFailed
	phaseRefused
)

func (p phase) String() string {
	return [...]string{"standby", "trying", "serving", "failed", "refused"}[p]
}

type counts struct {
	moves, stalls int64         // under Device.mu
	longest       time.Duration // under Device.mu
	repeated      atomic.Int64
}

// TargetStatus is how one target stands.
type TargetStatus struct {
	Name  string
	State string // standby, trying, serving, failed, refused
	Err   error  // why it was left, or could not be opened; nil while it serves
}

// Status is how the device stands.
type Status struct {
	Target   string // in use, empty while there is none
	Targets  []TargetStatus
	Waiting  int64         // calls at the target
	Moves    int64         // times a target began to be used, the first included
	Repeated int64         // calls made again at another target
	Stalls   int64         // times a target was left because it answered nothing
	Longest  time.Duration // longest time without a target that answered
	Without  time.Duration // how long there has been no target now
}

// Status says how the device stands.
func (d *Device) Status() Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := Status{Waiting: d.waiting.Load(), Moves: d.stats.moves, Repeated: d.stats.repeated.Load(), Stalls: d.stats.stalls, Longest: d.stats.longest}
	if dr := d.at.Load(); dr != nil {
		s.Target = d.opt.Targets[dr.target].Name
	} else {
		s.Without = time.Since(d.since)
	}
	for i, t := range d.targets {
		s.Targets = append(s.Targets, TargetStatus{Name: d.opt.Targets[i].Name, State: t.phase.String(), Err: t.err})
	}
	return s
}
