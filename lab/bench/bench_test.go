package bench

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	var out bytes.Buffer
	var each bytes.Buffer
	r := NewReport("test", &out)
	r.Lines(&each)
	r.Measure("a", 1, "s")
	r.AtMost("b", 1.5, 1.5, "x")
	r.AtLeast("c", 1, 0.9, "x")
	r.Check("d", true, "")
	if r.Failed() {
		t.Error("failed without a reason")
	}
	r.AtMost("e", 2, 1, "x")
	if !r.Failed() {
		t.Error("a missed bar is a success")
	}
	r.End(errors.New("broken"))
	for _, want := range []string{"FAILED", "broke off: broken"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in\n%s", want, out.String())
		}
	}
	var names []string
	for d := json.NewDecoder(&each); ; {
		var x Result
		if err := d.Decode(&x); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		names = append(names, fmt.Sprint(x.Name, x.OK))
	}
	if got, want := strings.Join(names, " "), "atrue btrue ctrue dtrue efalse broke offfalse"; got != want {
		t.Errorf("as lines: %s", got)
	}
	path := filepath.Join(t.TempDir(), "r.jsonl")
	for range 2 {
		if err := r.Append(path); err != nil {
			t.Fatal(err)
		}
	}
	b, _ := os.ReadFile(path)
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	var back Report
	if len(lines) != 2 || json.Unmarshal([]byte(lines[1]), &back) != nil || len(back.Results) != 5 || back.Error != "broken" {
		t.Errorf("%s", b)
	}
}

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		v    []float64
		want float64
	}{{nil, 0}, {[]float64{3}, 3}, {[]float64{9, 1, 5}, 5}, {[]float64{4, 1, 2, 9}, 3}} {
		if got := median(c.v); got != c.want {
			t.Errorf("%v: %v", c.v, got)
		}
	}
}

// TestSweep removes what a dead run left, and not what it wanted to keep.
func TestSweep(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	dead := exec.Command("true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	mk := func(pid int, tail string) string {
		d := filepath.Join(os.TempDir(), fmt.Sprintf("forerun-lab-%d-%s", pid, tail))
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
		return d
	}
	gone, kept, mine := mk(dead.Process.Pid, "a"), mk(dead.Process.Pid, "b"), mk(os.Getpid(), "c")
	if err := os.WriteFile(filepath.Join(kept, keptMark), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	sweep()
	for d, want := range map[string]bool{gone: false, kept: true, mine: true} {
		if _, err := os.Stat(d); (err == nil) != want {
			t.Errorf("%s is there: %v, want %v", d, err == nil, want)
		}
	}
}

// TestFioOutput runs one short job against nbdkit and reads what fio says.
func TestFioOutput(t *testing.T) {
	for _, p := range []string{"fio", "nbdkit"} {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s is missing: forerun-lab setup", p)
		}
	}
	sock := filepath.Join(t.TempDir(), "s")
	srv := exec.Command("nbdkit", "--foreground", "--exit-with-parent", "--unix="+sock, "memory", "16M")
	if err := srv.Start(); err != nil {
		t.Fatal(err)
	}
	defer srv.Wait()
	defer srv.Process.Kill()
	for range 200 {
		if _, err := os.Stat(sock); err == nil {
			break
		}
		exec.Command("sleep", "0.05").Run()
	}
	t.Chdir(t.TempDir())
	res, err := fio(t.Context(), "nbd+unix:///?socket="+sock, job{"j", "randwrite", "4k", 4, 0, false}, 0, 16<<20, 1)
	if err != nil {
		t.Skipf("fio has no nbd engine here: %v", err)
	}
	if res.IOPS <= 0 || res.p99() <= 0 {
		t.Errorf("%+v", res)
	}
}
