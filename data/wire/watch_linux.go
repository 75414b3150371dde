package wire

import (
	"os"
	"strconv"
	"strings"
	"sync"

	"time"

	"golang.org/x/sys/unix"
)

// threadTime is the processor time of the calling thread.
func threadTime() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// idleProcessors returns a function that says how many processors of the
// machine had nothing to do since it was called last (proc_stat(5)).
func idleProcessors() func() (float64, bool) {
	var mu sync.Mutex
	var idle, all uint64
	return func() (float64, bool) {
		mu.Lock()
		defer mu.Unlock()
		b, err := os.ReadFile("/proc/stat")
		if err != nil {
			return 0, false
		}
		line, rest, _ := strings.Cut(string(b), "\n")
		f := strings.Fields(line)
		if len(f) < 9 || f[0] != "cpu" {
			return 0, false
		}
		var now, total uint64
		for i, s := range f[1:9] { // user nice system idle iowait irq softirq steal
			n, err := strconv.ParseUint(s, 10, 64)
			if err != nil {
				return 0, false
			}
			if total += n; i == 3 || i == 4 {
				now += n
			}
		}
		processors := strings.Count(rest, "cpu")
		first := all == 0
		di, da := now-idle, total-all
		idle, all = now, total
		if first || da == 0 || di > da {
			return 0, false
		}
		return float64(processors) * float64(di) / float64(da), true
	}
}
