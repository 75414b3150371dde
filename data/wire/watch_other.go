//go:build !linux

package wire

import "time"

// threadTime is not known here.
func threadTime() time.Duration { return 0 }

func idleProcessors() func() (float64, bool) { return nil }
