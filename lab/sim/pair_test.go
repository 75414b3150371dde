package sim

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"
)

// stuckAfter is how long one run may take in real time: a goroutine that waits
// for a mutex or spins stops the time of the bubble.
const stuckAfter = 2 * time.Minute

// watchdog ends the process, with all stacks, when a run gets stuck.
func watchdog(s Schedule) (stop func() bool) {
	return time.AfterFunc(stuckAfter, func() {
		b := make([]byte, 4<<20)
		fmt.Fprintf(os.Stderr, "a run is stuck\n%s\n%s\n", s, b[:runtime.Stack(b, true)])
		os.Exit(3)
	}).Stop
}

func pairRun(t *testing.T, s Schedule) *Result {
	defer watchdog(s)()
	return simulate(t, s, newPair)
}

// TestMove has clients leave a node while nothing gets from it to the other
// one: what it had sent there arrives when they have gone on there.
func TestMove(t *testing.T) {
	seeds := 5
	if testing.Short() {
		seeds = 2
	}
	for seed := range uint64(number("FORERUN_SIM_MOVES", seeds)) {
		s := Plan(seed)
		s.Volumes, s.Clients, s.Length, s.Pause, s.Apart, s.Disaster = 2, 3, 9*time.Second, 10*time.Millisecond, true, false
		s.Events = nil
		for i := range 2 {
			at := 2*time.Second + time.Duration(i)*3*time.Second
			s.Events = append(s.Events, Event{At: at, Fault: OneWay, On: i, To: 1 - i, For: 1800 * time.Millisecond},
				Event{At: at + 300*time.Millisecond, Fault: Move, On: i})
		}
		if res := pairRun(t, s); res.Err != nil {
			t.Fatalf("seed %d: %v\n%s\n%s", seed, res.Err, s, res.Log)
		}
	}
}

// TestSim runs the real rooms through FORERUN_SIM_SEEDS seeds from
// FORERUN_SIM_FROM on. A failure prints the schedule and what happened;
// FORERUN_SIM_SHRINK leaves out what it does not need.
func TestSim(t *testing.T) {
	seeds := 60
	if testing.Short() {
		seeds = 5
	}
	from, n := number("FORERUN_SIM_FROM", 0), number("FORERUN_SIM_SEEDS", seeds)
	step := number("FORERUN_SIM_STEP", 1)
	var total HistoryStats
	var hit [faults]int
	var stall time.Duration
	failed := 0
	for seed := from; seed < from+n; seed += step {
		res := pairRun(t, Plan(uint64(seed)))
		if res.Err != nil {
			failed++
			t.Errorf("seed %d: %v", seed, res.Err)
			if dir := os.Getenv("FORERUN_SIM_DIR"); dir != "" {
				text := fmt.Sprintf("%v\n%s\n%s\n", res.Err, res.Schedule, res.Log)
				if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("seed-%d.txt", seed)), []byte(text), 0o644); err != nil {
					t.Error(err)
				}
			}
			if failed == 1 {
				report(t, res)
			}
			if failed == number("FORERUN_SIM_FAILURES", 1) {
				return
			}
		}
		total.add(res.Stats)
		for i, k := range res.Faults {
			hit[i] += k
		}
		stall = max(stall, res.Stall)
	}
	t.Logf("%d seeds: %+v, longest wait of a client %v", n, total, stall)
	for i, k := range hit {
		t.Logf("%6d %s", k, faultNames[i])
	}
}

func report(t *testing.T, res *Result) {
	t.Logf("%s\n%s", res.Schedule, res.Log)
	if number("FORERUN_SIM_SHRINK", 0) == 0 {
		return
	}
	s := Shrink(res.Schedule, func(s Schedule) bool {
		for range 3 { // what the scheduler of Go decides is not in the seed
			if pairRun(t, s).Err != nil {
				return true
			}
		}
		return false
	})
	for range 20 {
		if res := pairRun(t, s); res.Err != nil {
			t.Logf("shrunk: %v\n%s\n%s", res.Err, res.Schedule, res.Log)
			return
		}
	}
}

func (s *HistoryStats) add(o HistoryStats) {
	s.Writes += o.Writes
	s.Acked += o.Acked
	s.Reads += o.Reads
	s.Flushes += o.Flushes
	s.Losses += o.Losses
	s.Images += o.Images
	s.Sectors += o.Sectors
}
