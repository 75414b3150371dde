package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"forerun/api"
	"forerun/lab/oracle"
	"forerun/lab/rig"
)

// LocalOptions are what Local needs beside Options.
type LocalOptions struct {
	Options
	// Rounds of all jobs on all servers, interleaved; 0 is 3.
	Rounds int
	// Seconds of each job, 0 is 4.
	Seconds int
	// Memory is the frontend's memory tier in bytes, 0 is 32 MiB; the working
	// set is four times that.
	Memory int64
	// Only names the parts to run, from io and write-latency; empty is both.
	Only []string
}

// job is one fio workload.
type job struct {
	name  string
	rw    string
	bs    string
	depth int
	bar   float64 // of qemu-nbd, 0 for none
	rate  bool    // compare bytes a second rather than operations
}

var jobs = []job{
	{"4k random read, depth 1", "randread", "4k", 1, 1.0, false},
	{"4k random read, depth 32", "randread", "4k", 32, 1.0, false},
	{"4k random write, depth 1", "randwrite", "4k", 1, 1.0, false},
	{"4k random write, depth 32", "randwrite", "4k", 32, 1.0, false},
	{"64k sequential read, depth 8", "read", "64k", 8, 0, true},
	{"1m sequential read, depth 4", "read", "1m", 4, 0, true},
	{"64k sequential write, depth 8", "write", "64k", 8, 0, true},
	{"1m sequential write, depth 4", "write", "1m", 4, 0, true},
}

// fioResult is one direction of one job.
type fioResult struct {
	IOPS  float64                                 `json:"iops"`
	BW    float64                                 `json:"bw_bytes"`
	Clat  struct{ Percentile map[string]float64 } `json:"clat_ns"`
	Total int64                                   `json:"total_ios"`
}

func (f fioResult) p99() time.Duration {
	for k, v := range f.Clat.Percentile {
		if strings.HasPrefix(k, "99.000") {
			return time.Duration(v)
		}
	}
	return 0
}

// fio runs one job on [off, off+size) of an NBD export.
func fio(ctx context.Context, uri string, j job, off, size int64, seconds int, extra ...string) (fioResult, error) {
	args := append([]string{"--output-format=json", "--name=j", "--ioengine=nbd", "--uri=" + uri, "--rw=" + j.rw, "--bs=" + j.bs,
		"--iodepth=" + strconv.Itoa(j.depth), fmt.Sprintf("--offset=%d", off), fmt.Sprintf("--size=%d", size),
		"--time_based", "--runtime=" + strconv.Itoa(seconds), "--ramp_time=1", "--randrepeat=0", "--norandommap", "--refill_buffers",
		"--buffer_compress_percentage=50"}, extra...)
	out, err := rig.Local(ctx, "fio", args...).Output()
	if err != nil {
		return fioResult{}, fmt.Errorf("fio %s: %w: %s", j.name, err, out)
	}
	var r struct {
		Jobs []struct{ Read, Write fioResult }
	}
	// fio may print notes before the object.
	if i := strings.IndexByte(string(out), '{'); i > 0 {
		out = out[i:]
	}
	if err := json.Unmarshal(out, &r); err != nil || len(r.Jobs) != 1 {
		return fioResult{}, fmt.Errorf("fio %s: output: %w", j.name, errors.Join(err, errors.New(string(out[:min(len(out), 500)]))))
	}
	if strings.Contains(j.rw, "read") {
		return r.Jobs[0].Read, nil
	}
	return r.Jobs[0].Write, nil
}

// Local compares a local hit with what a workload would have without the
// product, and shows that writes to chunks that are not here do not wait.
func Local(ctx context.Context, o LocalOptions, r *Report) (err error) {
	if o.Rounds == 0 {
		o.Rounds = 3
	}
	if o.Seconds == 0 {
		o.Seconds = 4
	}
	if o.Memory == 0 {
		o.Memory = 32 << 20
	}
	s, err := newStage(ctx, o.Options, r)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.buildForerun(); err != nil {
		return err
	}
	want := func(p string) bool { return len(o.Only) == 0 || slices.Contains(o.Only, p) }
	if want("io") {
		if err := localIO(s, o); err != nil {
			return fmt.Errorf("io: %w", err)
		}
	}
	if want("write-latency") {
		if err := writeLatency(s, o); err != nil {
			return fmt.Errorf("write latency: %w", err)
		}
	}
	return nil
}

type server struct {
	name, uri string
	proc      *rig.Proc // nil for the product
}

func localIO(s *stage, o LocalOptions) error {
	// Reads go to the first half, writes to the second, so that reads stay
	// reads of held chunks.
	work := 4 * o.Memory
	size := 2 * work
	source := s.path("source.raw")
	if err := oracle.WriteBase(source, o.Seed, size); err != nil {
		return err
	}
	g, err := s.newRig(s.path("local"), source)
	if err != nil {
		return err
	}
	g.FrontendArgs = []string{"--memory", strconv.FormatInt(o.Memory, 10)}
	if err := g.Start(s.ctx); err != nil {
		return err
	}
	if _, err := g.WaitFilled(s.ctx, 10*time.Minute, func(api.Volume) {}); err != nil {
		return err
	}
	servers := []server{{name: "forerun", uri: g.URI()}}
	for _, p := range []struct {
		name string
		args func(disk, sock string) []string
	}{
		{"qemu-nbd", func(disk, sock string) []string {
			return []string{"--format=raw", "--persistent", "--shared=8", "--cache=writeback", "--aio=threads", "--export-name=vol", "--socket=" + sock, disk}
		}},
		{"nbdkit", func(disk, sock string) []string {
			return []string{"--foreground", "--exit-with-parent", "--unix=" + sock, "file", disk}
		}},
	} {
		disk, sock := s.path(p.name+".raw"), s.path(p.name+".sock")
		if err := oracle.WriteBase(disk, o.Seed, size); err != nil {
			return err
		}
		proc, err := rig.Launch(rig.Local(context.WithoutCancel(s.ctx), p.name, p.args(disk, sock)...), p.name, s.path(p.name+".log"))
		if err != nil {
			return err
		}
		s.atEnd(func() error { proc.Kill(); return nil })
		if err := proc.Until(s.ctx, 10*time.Second, "listening", func() bool { _, err := os.Stat(sock); return err == nil }); err != nil {
			return err
		}
		servers = append(servers, server{p.name, "nbd+unix:///vol?socket=" + sock, proc})
	}
	got := map[string][]float64{}
	p99 := map[string][]float64{}
	for round := range o.Rounds {
		for _, j := range jobs {
			off := int64(0)
			if strings.Contains(j.rw, "write") {
				off = work
			}
			line := ""
			for k := range servers {
				sv := servers[(k+round)%len(servers)]
				res, err := fio(s.ctx, sv.uri, j, off, work, o.Seconds)
				if err != nil {
					return fmt.Errorf("%s: %w", sv.name, err)
				}
				v := res.IOPS
				if j.rate {
					v = res.BW / 1e6
				}
				key := sv.name + j.name
				got[key] = append(got[key], v)
				p99[key] = append(p99[key], float64(res.p99())/1e3)
				line += fmt.Sprintf("  %s %.0f", sv.name, v)
			}
			s.Say("round %d, %s:%s", round+1, j.name, line)
		}
	}
	for _, j := range jobs {
		unit := "IO/s"
		if j.rate {
			unit = "MB/s"
		}
		best := 0.0
		for _, sv := range servers {
			m := median(got[sv.name+j.name])
			s.Measure(j.name+": "+sv.name, m, unit)
			s.Measure(j.name+": "+sv.name+" p99", median(p99[sv.name+j.name]), "us")
			if sv.proc != nil {
				best = max(best, m)
			}
		}
		ours := median(got["forerun"+j.name])
		if qemu := median(got["qemu-nbd"+j.name]); j.bar > 0 {
			s.AtLeast(j.name+": forerun / qemu-nbd", ours/qemu, j.bar, "x")
		} else {
			s.Measure(j.name+": forerun / qemu-nbd", ours/qemu, "x")
		}
		s.Measure(j.name+": forerun / better peer", ours/best, "x")
	}
	s.Measure("frontend memory, largest", float64(g.Frontend.Memory())/1e6, "MB")
	for _, sv := range servers[1:] {
		sv.proc.Kill()
	}
	return g.Stop()
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Clone(v)
	slices.Sort(v)
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// writeLatency compares 4 KiB writes to chunks that are here with writes to
// chunks that are 200 ms away.
func writeLatency(s *stage, o LocalOptions) error {
	const region = 64 << 20
	s.Options.RTT = 200 * time.Millisecond
	if s.Options.Rate == 0 {
		s.Options.Rate = 12_500_000
	}
	if err := s.openLine(); err != nil {
		return err
	}
	source := s.path("far.raw")
	if err := oracle.WriteBase(source, o.Seed, 4*region); err != nil {
		return err
	}
	g, err := s.newRig(s.path("far"), source)
	if err != nil {
		return err
	}
	g.FrontendArgs = []string{"--fill-paused", "--memory", strconv.FormatInt(o.Memory, 10)}
	if err := g.Start(s.ctx); err != nil {
		return err
	}
	// Reading the first region brings it here.
	read := job{"bring a region here", "read", "1m", 16, 0, true}
	if _, err := fio(s.ctx, g.URI(), read, 0, region, 1, "--time_based=0", "--runtime=0", "--ramp_time=0"); err != nil {
		return err
	}
	v, err := g.Status(s.ctx)
	if err != nil {
		return err
	}
	s.Say("%d chunks are held, %d untouched", v.Chunks.Held+v.Chunks.Zero, v.Chunks.Untouched)
	w := job{"4k random write, depth 1", "randwrite", "4k", 1, 0, false}
	var held, far []float64
	for round := range o.Rounds {
		// Fresh parts each round: a chunk is untouched only once.
		part := int64(region / o.Rounds &^ 0xfffff)
		for _, where := range []struct {
			off int64
			out *[]float64
		}{{int64(round) * part, &held}, {2*region + int64(round)*part, &far}} {
			res, err := fio(s.ctx, g.URI(), w, where.off, part, o.Seconds)
			if err != nil {
				return err
			}
			*where.out = append(*where.out, float64(res.p99())/1e3)
		}
	}
	s.Measure("4k write p99, held chunks", median(held), "us")
	s.Measure("4k write p99, untouched chunks at 200 ms", median(far), "us")
	s.AtMost("4k write p99: untouched / held", median(far)/median(held), 2, "x")
	return g.Stop()
}
