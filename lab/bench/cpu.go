package bench

import (
	"syscall"
	"time"
)

// selfCPU is the processor time of this process, which is mostly the relay's.
func selfCPU() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
