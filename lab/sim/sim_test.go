package sim

import (
	"os"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"

	"forerun/internal/chunk"
)

// number reads a number from the environment.
func number(name string, other int) int {
	if n, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return n
	}
	return other
}

// warm makes what package chunk makes when it is first used, outside of any
// bubble: channels belong to the bubble that makes them.
var warm = sync.OnceFunc(func() {
	plain := make([]byte, 64<<10)
	copy(plain, "so that it is not zeros")
	p := chunk.Seal(nil, plain, chunk.Zstd)
	if err := p.Open(plain); err != nil {
		panic(err)
	}
})

func simulate(t *testing.T, s Schedule, make func(Schedule, *History, *Log) (cluster, error)) (res *Result) {
	warm()
	synctest.Test(t, func(*testing.T) { res = run(s, make) })
	return res
}

// TestToy runs a pair that cannot be wrong: nobody may be accused.
func TestToy(t *testing.T) {
	seeds := 20
	if testing.Short() {
		seeds = 3
	}
	for seed := range uint64(number("FORERUN_SIM_TOYS", seeds)) {
		res := simulate(t, Plan(seed), newToy(honest))
		if res.Err != nil {
			t.Fatalf("an honest pair is accused: %v\n%s\n%s", res.Err, res.Schedule, res.Log)
		}
	}
}

// TestLies runs pairs that are wrong in one way each: each is caught. The seed
// that is tried first is one that is known to show it.
func TestLies(t *testing.T) {
	if testing.Short() {
		t.Skip("hundreds of histories, which nothing runs beside; the long run judges the judge")
	}
	for l := honest + 1; l < lies; l++ {
		t.Run(lieNames[l].name, func(t *testing.T) {
			for i := range uint64(400) {
				seed := lieNames[l].seed + i
				if res := simulate(t, Plan(seed), newToy(l)); res.Err != nil {
					t.Logf("seed %d, %d requests: %v", seed, res.Stats.Writes+res.Stats.Reads, res.Err)
					return
				}
			}
			t.Error("never caught")
		})
	}
}
