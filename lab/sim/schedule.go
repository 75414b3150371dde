package sim

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// The machines of a run.
const (
	NodeA   = 0
	NodeB   = 1
	Backend = 2
	Arbiter = 3

	machines = 4
)

var machineNames = [machines]string{"node-a", "node-b", "backend", "arbiter"}

// Fault is a kind of thing that happens to a run.
type Fault uint8

// The faults. Those with a duration end by themselves.
const (
	Kill       Fault = iota // the process of On ends, and starts again after For
	PowerCut                // On loses power, and starts again after For
	OneWay                  // nothing gets from On to To for For
	Isolate                 // nothing gets to or from On for For
	Cut                     // connections between On and To are reset
	Stall                   // everything between On and To stands still for For
	Far                     // the way between On and To is long and uneven for For
	Slow                    // the disk of On is slow for For
	Move                    // clients of node On go to the other one
	Handover                // a planned change of the primary
	Checkpoint              // the write-back is asked for a checkpoint
	Full                    // the disk of On is full for For
	faults
)

var faultNames = [faults]string{"kill", "power cut", "one way", "isolate", "cut", "stall", "far", "slow", "move", "handover", "checkpoint", "full"}

// Event is one fault at one time of the run.
type Event struct {
	At    time.Duration
	Fault Fault
	On    int
	To    int
	For   time.Duration
}

// String is one line of a schedule.
func (e Event) String() string {
	s := fmt.Sprintf("%8.3fs %s %s", e.At.Seconds(), faultNames[e.Fault], machineNames[e.On])
	switch e.Fault {
	case OneWay, Cut, Stall, Far:
		s += " -> " + machineNames[e.To]
	}
	if e.For > 0 {
		s += fmt.Sprintf(" for %.3fs", e.For.Seconds())
	}
	return s
}

// Schedule is everything about a run that chance decides beforehand. It is a
// pure function of the seed.
type Schedule struct {
	Seed     uint64
	Volumes  int
	Clients  int // of each volume
	Length   time.Duration
	Pause    time.Duration // of a client between requests, at most
	RTT      time.Duration // between the nodes
	WANRTT   time.Duration // to the backend
	Degrade  bool          // on loss of the peer: degrade, else wait
	Remote   bool          // the arbiter has a machine of its own
	Rate     float64       // how fast the arbiter's clock runs, by the nodes'
	Disaster bool          // in the end both nodes are gone for good
	Abort    bool          // in the end the sources are given back
	Apart    bool          // no two writes to a sector are under way at once
	Survive  bool          // in the end both lose power and one is gone for good
	Filled   bool          // the nodes have everything at first
	Journal  int64         // most bytes of a volume's journal
	Interval time.Duration // between checkpoints
	FailBack time.Duration // until the primary goes home, 0 for never
	Events   []Event
}

// String prints the schedule.
func (s Schedule) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d: %d volumes, %d clients each, %v long, pause %v, rtt %v, wan %v, degrade %v, own arbiter %v, clock %.3f, disaster %v, survive %v, abort %v, apart %v, filled %v, journal %d, interval %v, fail-back %v\n",
		s.Seed, s.Volumes, s.Clients, s.Length, s.Pause, s.RTT, s.WANRTT, s.Degrade, s.Remote, s.Rate, s.Disaster, s.Survive, s.Abort, s.Apart, s.Filled, s.Journal, s.Interval, s.FailBack)
	for _, e := range s.Events {
		fmt.Fprintln(&b, e)
	}
	return b.String()
}

// Plan makes the schedule of a seed. Each seed knows only some of the kinds of
// fault, so that rare combinations are not drowned by frequent ones (Groce et
// al., "Swarm Testing", ISSTA 2012).
func Plan(seed uint64) Schedule {
	r := rand.New(rand.NewPCG(seed, 0x73696d))
	ms := func(lo, hi int) time.Duration {
		return time.Duration(lo*1000+r.IntN((hi-lo)*1000+1)) * time.Microsecond
	}
	s := Schedule{
		Seed: seed, Volumes: 1 + r.IntN(2), Clients: 1 + r.IntN(3), Length: ms(4000, 16000), Pause: ms(40, 400),
		RTT: ms(0, 4), WANRTT: ms(1, 60), Degrade: r.IntN(4) > 0, Remote: r.IntN(3) > 0, Disaster: r.IntN(3) == 0,
		Rate: 1 + (r.Float64()-0.5)/4, Filled: r.IntN(2) == 0,
		Journal: []int64{256 << 10, 512 << 10, 4 << 20}[r.IntN(3)], Interval: ms(300, 4000),
		Apart: r.IntN(4) > 0, Abort: seed%2 == 0, FailBack: []time.Duration{0, 0, 2 * time.Second}[r.IntN(3)],
	}
	s.Survive = !s.Disaster && r.IntN(4) == 0
	weights := make([]int, faults)
	total := 0
	for f := range weights {
		if r.IntN(3) > 0 {
			weights[f] = 1 + r.IntN(4)
			total += weights[f]
		}
	}
	if total == 0 {
		return s
	}
	lone := r.IntN(3) > 0 // machines go down one at a time
	free := time.Duration(0)
	for range r.IntN(12) {
		e := Event{At: ms(0, int(s.Length.Milliseconds()))}
		n := r.IntN(total)
		for n >= weights[e.Fault] {
			n -= weights[e.Fault]
			e.Fault++
		}
		e.On = r.IntN(machines)
		e.To = (e.On + 1 + r.IntN(machines-1)) % machines
		if r.IntN(2) == 0 { // most of what matters is between the nodes
			e.On, e.To = r.IntN(2), 1-e.On%2
			if e.To == e.On {
				e.To = 1 - e.On
			}
		}
		switch e.Fault {
		case Kill, PowerCut:
			e.For = ms(1, 4000)
			if r.IntN(4) == 0 {
				e.For = ms(1, 100)
			}
		case OneWay, Isolate, Stall, Far, Full:
			e.For = ms(10, 6000)
		case Slow:
			e.On, e.For = r.IntN(2), ms(10, 4000)
		case Move, Handover, Checkpoint:
			e.On = r.IntN(2)
		}
		s.Events = append(s.Events, e)
	}
	slices.SortStableFunc(s.Events, func(a, b Event) int { return cmp.Compare(a.At, b.At) })
	if lone {
		kept := s.Events[:0]
		for _, e := range s.Events {
			if e.Fault == Kill || e.Fault == PowerCut {
				if e.At < free {
					continue
				}
				free = e.At + e.For + 4*time.Second
			}
			kept = append(kept, e)
		}
		s.Events = kept
	}
	return s
}

// Shrink leaves out events as long as fails still says yes.
func Shrink(s Schedule, fails func(Schedule) bool) Schedule {
	for size := max(1, len(s.Events)/2); ; size /= 2 {
		for at := 0; at+size <= len(s.Events); {
			t := s
			t.Events = slices.Delete(slices.Clone(s.Events), at, at+size)
			if fails(t) {
				s = t
			} else {
				at += size
			}
		}
		if size <= 1 {
			break
		}
	}
	for _, change := range []func(*Schedule){
		func(s *Schedule) { s.Volumes = 1 },
		func(s *Schedule) { s.Clients = 1 },
		func(s *Schedule) { s.Rate = 1 },
		func(s *Schedule) { s.Disaster, s.Survive = false, false },
	} {
		t := s
		change(&t)
		if fails(t) {
			s = t
		}
	}
	return s
}
