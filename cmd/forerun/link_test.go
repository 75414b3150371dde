package main

import (
	"os/exec"
	"runtime"
	"strings"
	"testing"
)

// TestLinkTest measures the loopback, with a little of everything, and is told
// no by a backend that has a frontend.
func TestLinkTest(t *testing.T) {
	s := newSite(t)
	s.startBackend("d=" + s.disk("src.raw", 8*mib, 1))
	args := []string{"link", "test", "--pki", s.path("pki"), "--name", "new", "--backend", s.addr,
		"--connections", "2", "--time", "500ms", "--limit", "8388608", "--size", "100"}
	run := func(more ...string) (string, string, error) {
		var out, progress strings.Builder
		cmd := exec.CommandContext(t.Context(), binary, append(args, more...)...)
		cmd.Stdout, cmd.Stderr = &out, &progress
		err := cmd.Run()
		return out.String(), progress.String(), err
	}
	out, progress, err := run("--json")
	if err != nil || !strings.Contains(progress, "download over 2 connections") {
		t.Fatalf("%v\n%s", err, progress)
	}
	type phase struct {
		Direction   string  `json:"direction"`
		Connections int     `json:"connections"`
		Rate        float64 `json:"rate_bytes_s"`
		Loss        *struct {
			Segments int64 `json:"segments"`
		} `json:"loss"`
	}
	r := decode[struct {
		Idle struct {
			Samples int     `json:"samples"`
			Median  float64 `json:"median_ms"`
		} `json:"idle"`
		Downloads []phase `json:"downloads"`
		Uploads   []phase `json:"uploads"`
		Expect    struct {
			Size  int64    `json:"size_bytes"`
			FillS float64  `json:"fill_s"`
			Lines []string `json:"lines"`
		} `json:"expect"`
	}](t, out)
	if r.Idle.Samples < 20 || r.Idle.Median <= 0 || len(r.Downloads) != 2 || len(r.Uploads) != 2 ||
		r.Expect.Size != 100<<30 || r.Expect.FillS <= 0 || len(r.Expect.Lines) != 7 {
		t.Errorf("%+v", r)
	}
	for _, p := range append(r.Downloads, r.Uploads...) {
		// The server's counters come through the backend's own layers.
		if p.Rate < 1e6 || runtime.GOOS == "linux" && (p.Loss == nil || p.Loss.Segments == 0) {
			t.Errorf("%+v", p)
		}
	}

	s.startFrontend([]string{"d"}, "--policy", "isolated")
	if _, said, err := run(); err == nil || !strings.Contains(said, "a frontend's session is open") || !strings.Contains(said, "--force") {
		t.Errorf("%v\n%s", err, said)
	}
	out, said, err := run("--force", "--quiet")
	if err != nil || said != "" || !strings.Contains(out, "upload, 2 conn") || !strings.Contains(out, "100 GiB of data") {
		t.Errorf("%v\n%s%s", err, out, said)
	}
	for _, c := range []struct{ flag, value, want string }{
		{"--ratio", "0", "--ratio"}, {"--size", "-1", "--size"}, {"--connections", "40", "1 to 15"}, {"--time", "2h", "1m0s"},
		{"--name", "old", "needs \"frontend\""}, {"--backend", "127.0.0.1:1", "cannot be reached"},
	} {
		if out, said, err := run(c.flag, c.value); err == nil || out != "" || !strings.Contains(said, c.want) {
			t.Errorf("%s %s: %v\n%s%s", c.flag, c.value, err, out, said)
		}
	}
}
