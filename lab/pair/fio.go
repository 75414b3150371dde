package pair

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"forerun/lab/rig"
)

// fioWrites is what fio says about a job of writes.
type fioWrites struct {
	IOPS    float64 `json:"iops"`
	Bytes   int64   `json:"io_bytes"`
	Runtime int64   `json:"runtime"` // ms
	Clat    struct {
		Mean       float64            `json:"mean"`
		Max        float64            `json:"max"`
		Percentile map[string]float64 `json:"percentile"`
	} `json:"clat_ns"`
}

func (f fioWrites) percentile(prefix string) float64 {
	for k, v := range f.Clat.Percentile {
		if strings.HasPrefix(k, prefix) {
			return v / 1e3
		}
	}
	return 0
}

// p50 and p99 are in microseconds.
func (f fioWrites) p50() float64 { return f.percentile("50.0000") }
func (f fioWrites) p99() float64 { return f.percentile("99.0000") }

// rate is in bytes a second.
func (f fioWrites) rate() float64 { return float64(f.Bytes) / (float64(f.Runtime) / 1e3) }

// fioWrite runs random writes against an export; their bytes do not compress.
func fioWrite(ctx context.Context, uri, bs string, depth int, args ...string) (f fioWrites, err error) {
	all := append([]string{"--output-format=json", "--name=j", "--ioengine=nbd", "--uri=" + uri, "--rw=randwrite", "--bs=" + bs,
		fmt.Sprintf("--iodepth=%d", depth), "--refill_buffers"}, args...)
	out, err := rig.Local(ctx, "fio", all...).Output()
	if err != nil {
		return f, fmt.Errorf("fio on %s: %w: %s", uri, err, out)
	}
	if i := strings.IndexByte(string(out), '{'); i > 0 { // notes before the object
		out = out[i:]
	}
	var r struct {
		Jobs []struct{ Write fioWrites }
	}
	if err := json.Unmarshal(out, &r); err != nil || len(r.Jobs) != 1 {
		return f, errors.Join(fmt.Errorf("fio on %s printed %.500s", uri, out), err)
	}
	return r.Jobs[0].Write, nil
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// seconds is d for a flag of fio.
func seconds(d time.Duration) string { return fmt.Sprintf("%d", max(1, int(d.Seconds()))) }
