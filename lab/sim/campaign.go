package sim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"time"
)

// Options of a Campaign.
type Options struct {
	From, Seeds int
	Jobs        int    // processes at once
	Batch       int    // seeds of one process
	Failures    int    // failed batches after which it ends
	Dir         string // where schedule and log of each failed seed go
	Shrink      bool   // print the smallest schedule that still fails
	Go          string // the go command
	Out         io.Writer
}

// Campaign runs many seeds. The time of a bubble needs package testing, so it
// builds the tests of this package and runs them in processes with one
// processor each, where a seed repeats itself best. Its current directory is
// in the module.
func Campaign(ctx context.Context, o Options) error {
	dir, err := os.MkdirTemp("", "forerun-sim")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	test := filepath.Join(dir, "sim.test")
	build := exec.CommandContext(ctx, o.Go, "test", "-c", "-o", test, "forerun/lab/sim")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building the simulation: %w\n%s", err, out)
	}
	if err := os.MkdirAll(o.Dir, 0o755); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		mu           sync.Mutex
		wg           sync.WaitGroup
		next         = o.From
		done, failed int
		begin, told  = time.Now(), time.Now()
	)
	take := func() (from, n int) {
		mu.Lock()
		defer mu.Unlock()
		from, n = next, min(o.Batch, o.From+o.Seeds-next)
		next += n
		return from, n
	}
	for range max(1, o.Jobs) {
		wg.Go(func() {
			for ctx.Err() == nil {
				from, n := take()
				if n <= 0 {
					return
				}
				out, err := batch(ctx, test, from, n, o)
				if ctx.Err() != nil {
					return
				}
				mu.Lock()
				done += n
				if err != nil {
					failed++
					fmt.Fprintf(o.Out, "seeds %d to %d: %v\n%s\n", from, from+n-1, err, out)
					if failed >= o.Failures {
						cancel()
					}
				}
				if time.Since(told) > 10*time.Second || done == o.Seeds {
					told = time.Now()
					fmt.Fprintf(o.Out, "%d seeds of %d in %v, %d batches failed\n", done, o.Seeds, time.Since(begin).Round(time.Second), failed)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if failed > 0 {
		return fmt.Errorf("%d batches of seeds failed; their schedules and logs are in %s", failed, o.Dir)
	}
	if done < o.Seeds {
		return errors.Join(ctx.Err(), fmt.Errorf("%d of %d seeds were run", done, o.Seeds))
	}
	return nil
}

func batch(ctx context.Context, test string, from, n int, o Options) ([]byte, error) {
	c := exec.CommandContext(ctx, test, "-test.run", "^TestSim$", "-test.v", "-test.cpu", "1", "-test.timeout", "0")
	c.Env = append(os.Environ(), "FORERUN_SIM_FROM="+strconv.Itoa(from), "FORERUN_SIM_SEEDS="+strconv.Itoa(n), "FORERUN_SIM_DIR="+o.Dir)
	if o.Shrink {
		c.Env = append(c.Env, "FORERUN_SIM_SHRINK=1")
	}
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	err := c.Run()
	return out.Bytes(), err
}
