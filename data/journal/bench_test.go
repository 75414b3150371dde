package journal

import (
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"

	"forerun/block/blocktest"
	"forerun/disk"
)

// What does the journal add to a 4 KiB random write, in time and in CPU, alone
// and with 32 writers? The device below does nothing.
func BenchmarkWrite(b *testing.B) {
	for _, depth := range []int{1, 32} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			j := open(b, disk.OS(), b.TempDir(), blocktest.NewNull(1<<30), Options{})
			b.SetBytes(4096)
			b.ReportAllocs()
			b.SetParallelism((depth + 1) / 2)
			start := cpu()
			b.ResetTimer()
			if depth == 1 {
				p := make([]byte, 4096)
				for b.Loop() {
					if err := j.WriteAt(bg, p, rand.Int64N(1<<18)<<12, 0); err != nil {
						b.Fatal(err)
					}
				}
			} else {
				b.RunParallel(func(pb *testing.PB) {
					p := make([]byte, 4096)
					for pb.Next() {
						if err := j.WriteAt(bg, p, rand.Int64N(1<<18)<<12, 0); err != nil {
							b.Fatal(err)
						}
					}
				})
			}
			b.StopTimer()
			b.ReportMetric(float64(cpu()-start)/float64(b.N), "cpu-ns/op")
			s := j.Stats()
			b.ReportMetric(float64(s.Records)/float64(max(s.Groups, 1)), "records/pwrite")
		})
	}
}

func cpu() int64 {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return u.Utime.Nano() + u.Stime.Nano()
}
