package converge

import "time"

// State is what the job is doing.
type State string

// The states of a Job.
const (
	Idle          State = "idle"           // no Run under way; a plan may be there to go on with
	Copying       State = "copying"        // rounds
	Held          State = "held"           // paused by the operator
	Waiting       State = "waiting"        // the target is full or one side cannot be reached; Reason says which
	Cutting       State = "cutting"        // the gate is closing or closed
	Undecided     State = "undecided"      // the gate is closed until the plan can be written; see Job
	NotConverging State = "not-converging" // the operator must choose
	Stopped       State = "stopped"        // ctx ended or Cancel; Run goes on
	Failed        State = "failed"         // Run returned an error; Run goes on
	Switched      State = "switched"       // the target is primary
)

// Round is one pass of the loop.
type Round struct {
	Bytes int64 // the changeset at its beginning
	Took  time.Duration
	Last  bool // behind the closed gate; Took is the pause
}

// maxRoundsKept bounds the log of rounds; the first one is always kept.
const maxRoundsKept = 100

// Stats is how a job stands.
type Stats struct {
	State     State
	Reason    string // why it waits, failed or was put off
	Target    string
	Threshold int64 // bytes

	Rounds    []Round       // finished, of the last Run
	Changeset int64         // bytes to be copied at least, now
	Size      int64         // bytes of the round under way
	Copied    int64         // bytes of it that are done
	Written   int64         // bytes written to the target since the job was made
	Rate      float64       // bytes per second in the round under way
	ETA       time.Duration // of the round under way; 0 when unknown
	Pause     time.Duration // how long the gate was closed at the last attempt
}

// Stats returns a snapshot.
func (j *Job) Stats() Stats {
	changeset := int64(0)
	if t := j.opt.Tracker; t != nil && t.on.Load() {
		changeset = t.changeset()
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	s := Stats{
		State: j.state, Reason: j.reason, Target: j.plan.Target, Threshold: j.plan.Threshold,
		Rounds: append([]Round(nil), j.rounds...), Changeset: changeset,
		Size: j.size, Copied: min(j.done.Load(), j.size), Written: j.written.Load(), Pause: j.pause,
	}
	if s.State == Copying && j.held != nil {
		s.State = Held
	}
	if j.state == Switched && j.cancel == nil && len(j.rounds) == 0 { // before a restart
		s.Pause = time.Duration(j.plan.PauseUs) * time.Microsecond
	}
	if j.cancel != nil {
		// What the sweep has claimed and not copied yet is in no mark.
		s.Changeset = max(s.Changeset, s.Size-s.Copied)
	}
	if d := time.Since(j.began).Seconds(); j.cancel != nil && s.Size > 0 && d > 0 {
		s.Rate = float64(s.Copied) / d
		if s.Rate > 0 {
			s.ETA = time.Duration(float64(s.Size-s.Copied) / s.Rate * float64(time.Second))
		}
	}
	return s
}
