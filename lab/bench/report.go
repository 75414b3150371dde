package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"sync"
	"text/tabwriter"
	"time"
)

// Result is one number or statement of a run.
type Result struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit,omitempty"`
	// Bar is what was promised, in words, empty for what is only measured.
	Bar string `json:"bar,omitempty"`
	// OK is false when the bar was missed.
	OK   bool   `json:"ok"`
	Note string `json:"note,omitempty"`
}

// Report is what a scenario found. Its methods may be called from many goroutines.
type Report struct {
	Scenario string    `json:"scenario"`
	Started  time.Time `json:"started"`
	Seconds  float64   `json:"seconds"`
	Error    string    `json:"error,omitempty"`
	Results  []Result  `json:"results"`

	mu    sync.Mutex
	out   io.Writer
	lines io.Writer
}

// NewReport begins a report that also prints each result to out as it comes.
func NewReport(scenario string, out io.Writer) *Report {
	return &Report{Scenario: scenario, Started: time.Now(), out: out}
}

// Lines makes the report also write each result to w as one line of JSON, as it
// comes, and a last one when the scenario broke off.
func (r *Report) Lines(w io.Writer) { r.lines = w }

func (r *Report) line(x Result) {
	if r.lines == nil {
		return
	}
	if b, err := json.Marshal(x); err == nil {
		r.lines.Write(append(b, '\n'))
	}
}

func (r *Report) add(x Result) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Results = append(r.Results, x)
	r.line(x)
	verdict := ""
	if x.Bar != "" {
		verdict = "  ok (" + x.Bar + ")"
		if !x.OK {
			verdict = "  FAILED (" + x.Bar + ")"
		}
	}
	note := ""
	if x.Note != "" {
		note = "  " + x.Note
	}
	fmt.Fprintf(r.out, "%8.1fs  %-46s %12.6g %-6s%s%s\n", time.Since(r.Started).Seconds(), x.Name, x.Value, x.Unit, verdict, note)
}

// Say prints a step.
func (r *Report) Say(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintf(r.out, "%8.1fs  %s\n", time.Since(r.Started).Seconds(), fmt.Sprintf(format, args...))
}

// Measure notes a number nothing was promised about.
func (r *Report) Measure(name string, v float64, unit string) {
	r.add(Result{Name: name, Value: v, Unit: unit, OK: true})
}

// Noted is Measure with a note about how it was seen.
func (r *Report) Noted(name string, v float64, unit, note string) {
	r.add(Result{Name: name, Value: v, Unit: unit, OK: true, Note: note})
}

// AtMost notes a number with a bar above it.
func (r *Report) AtMost(name string, v, bar float64, unit string) {
	r.add(Result{Name: name, Value: v, Unit: unit, Bar: fmt.Sprintf("at most %g", bar), OK: v <= bar})
}

// AtLeast notes a number with a bar below it.
func (r *Report) AtLeast(name string, v, bar float64, unit string) {
	r.add(Result{Name: name, Value: v, Unit: unit, Bar: fmt.Sprintf("at least %g", bar), OK: v >= bar})
}

// Check notes something that must be true; note says what was seen.
func (r *Report) Check(name string, ok bool, note string) {
	v := 0.0
	if ok {
		v = 1
	}
	r.add(Result{Name: name, Value: v, Bar: "true", OK: ok, Note: note})
}

// Failed says whether the scenario broke off or missed a bar.
func (r *Report) Failed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, x := range r.Results {
		if !x.OK {
			return true
		}
	}
	return r.Error != ""
}

// End notes how the scenario ended and prints the table.
func (r *Report) End(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Seconds = time.Since(r.Started).Seconds()
	if err != nil {
		r.Error = err.Error()
		r.line(Result{Name: "broke off", Note: r.Error})
	}
	w := tabwriter.NewWriter(r.out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "\n%s, %.0f s\n", r.Scenario, r.Seconds)
	for _, x := range r.Results {
		verdict := ""
		if x.Bar != "" {
			verdict = "ok"
			if !x.OK {
				verdict = "FAILED"
			}
		}
		fmt.Fprintf(w, "  %s\t%.6g\t%s\t%s\t%s\n", x.Name, x.Value, x.Unit, x.Bar, verdict)
	}
	if r.Error != "" {
		fmt.Fprintf(w, "  broke off: %s\n", r.Error)
	}
	w.Flush()
}

// Append adds the report to the file at path as one line of JSON.
func (r *Report) Append(path string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	if _, err := f.Write(append(b, '\n')); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}
