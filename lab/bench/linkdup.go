package bench

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"time"

	"forerun/lab/load"
	"forerun/lab/rig"
)

// duplicates is part e: reads of a second disk whose chunks the site holds
// already, because a first one with the same content is here.
func (b *linkBench) duplicates() error {
	const size, reads = 64 << 20, 64
	one, err := b.prepare("twin", size, noise)
	if err != nil {
		return err
	}
	two := b.path("twin2.raw")
	in, err := os.ReadFile(one)
	if err != nil {
		return err
	}
	if err := os.WriteFile(two, in, 0o644); err != nil {
		return err
	}
	defer os.Remove(two)
	p := point{rate: mbit100, rtt: 40 * time.Millisecond}
	for _, ahead := range []bool{false, true} {
		err := b.over(p, 0, func() error {
			dir, err := b.dir("twins")
			if err != nil {
				return err
			}
			defer os.RemoveAll(dir)
			g, err := b.linkRig(dir, one, "--fill-paused")
			if err != nil {
				return err
			}
			g.More = []rig.Disk{{Volume: "two", Source: two}}
			defer g.Kill()
			if err := g.Start(b.ctx); err != nil {
				return err
			}
			if err := g.FillOf(b.ctx, g.Volume, "resume", 0); err != nil {
				return err
			}
			if _, err := g.WaitFilled(b.ctx, 5*time.Minute, nil); err != nil {
				return err
			}
			when := "no signature ahead"
			if ahead {
				// At this rate the signatures of all chunks are here after a few
				// seconds, and of their bytes next to none.
				when = "signatures ahead"
				if err := g.FillOf(b.ctx, "two", "limit", 32<<10); err != nil {
					return err
				}
				if err := g.FillOf(b.ctx, "two", "resume", 0); err != nil {
					return err
				}
			}
			time.Sleep(5 * time.Second)
			return b.readTwin(g, "e: duplicate, "+when+": ", in, reads, ahead)
		})
		if err != nil {
			return err
		}
	}
	g := &rig.Rig{Bin: b.bin}
	if !g.Knows(b.ctx, "frontend", "--store-limit") {
		b.Say("e: the frontend knows no --store-limit: eviction is left out")
		return nil
	}
	return b.evicted(p, one, two, in)
}

// readTwin reads 4 KiB of so many chunks of volume two, here and there in its
// second half, and compares.
func (b *linkBench) readTwin(g *rig.Rig, name string, want []byte, reads int, ahead bool) error {
	c, err := load.Dial(b.ctx, g.Socket(), "two")
	if err != nil {
		return err
	}
	defer c.Close()
	st, err := g.StatusOf(b.ctx, "two")
	if err != nil {
		return err
	}
	before, from := b.line.Stats(), st.Demand.Reads
	var waits []time.Duration
	buf := make([]byte, 4096)
	same := true
	half := len(want) / 2
	for _, i := range rand.New(rand.NewPCG(b.Seed, 0x7477696e)).Perm(half / demandChunk)[:reads] {
		off := int64(half) + int64(i)*demandChunk
		t := time.Now()
		if _, err := c.ReadAt(buf, off); err != nil {
			return err
		}
		waits = append(waits, time.Since(t))
		same = same && bytes.Equal(buf, want[off:off+int64(len(buf))])
	}
	down, _ := b.crossed(before)
	if st, err = g.StatusOf(b.ctx, "two"); err != nil {
		return err
	}
	b.Check(name+"right bytes", same, fmt.Sprintf("%d reads", reads))
	b.Measure(name+"p50", float64(percentile(waits, 0.5).Microseconds())/1e3, "ms")
	trips := float64(st.Demand.Reads - from)
	if ahead {
		b.AtMost(name+"reads that needed the link", trips, 0, "")
		b.Measure(name+"bytes on the line per read", float64(down)/float64(reads), "B")
		return nil
	}
	b.Measure(name+"reads that needed the link", trips, "")
	b.AtMost(name+"bytes on the line per read", float64(down)/float64(reads), 1024, "B")
	return nil
}

// evicted fills two equal disks at a site whose store has room for a quarter of
// one: what was evicted is asked for again, and what is read is right.
func (b *linkBench) evicted(p point, one, two string, want []byte) error {
	return b.over(p, 0, func() error {
		dir, err := b.dir("evicted")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		g, err := b.linkRig(dir, one, "--fill-paused", "--store-limit", fmt.Sprint(len(want)/4))
		if err != nil {
			return err
		}
		g.More = []rig.Disk{{Volume: "two", Source: two}}
		defer g.Kill()
		if err := g.Start(b.ctx); err != nil {
			return err
		}
		buf := make([]byte, demandChunk)
		rng := rand.New(rand.NewPCG(b.Seed, 0x6576696374))
		// All of one, and then here and there in two: hits and misses of the store.
		order := map[string][]int{g.Volume: rng.Perm(len(want) / demandChunk), "two": rng.Perm(len(want) / demandChunk)[:256]}
		for _, volume := range []string{g.Volume, "two"} {
			c, err := load.Dial(b.ctx, g.Socket(), volume)
			if err != nil {
				return err
			}
			defer c.Close()
			same := true
			for _, i := range order[volume] {
				off := int64(i) * demandChunk
				if _, err := c.ReadAt(buf, off); err != nil {
					return err
				}
				same = same && bytes.Equal(buf, want[off:off+demandChunk])
			}
			b.Check("e: bounded store, "+volume+": right bytes", same, fmt.Sprintf("%d chunks", len(order[volume])))
		}
		st, err := g.StatusOf(b.ctx, "two")
		if err != nil {
			return err
		}
		b.AtMost("e: bounded store: bytes / limit", float64(st.StoreBytes)/float64(len(want)/4), 1.1, "x")
		return nil
	})
}

// starvation is part c: the tests that no class starves another, which run in
// virtual time.
func (b *linkBench) starvation() error {
	mod, err := exec.CommandContext(b.ctx, "go", "env", "GOMOD").Output()
	root := strings.TrimSuffix(strings.TrimSpace(string(mod)), "/go.mod")
	if err != nil || root == "" || root == "/dev/null" {
		b.Say("c: not inside the source tree, left out")
		return nil
	}
	cmd := exec.CommandContext(b.ctx, "go", "test", "-count=1", "-v", "-run", "Starv", "./data/sched", "./data/wire", "./data/stack")
	cmd.Dir = root
	out, err := cmd.CombinedOutput()
	for _, m := range regexp.MustCompile(`(?m)^--- (PASS|FAIL|SKIP): (\S+) \((.*)\)`).FindAllStringSubmatch(string(out), -1) {
		b.Check("c: "+m[2], m[1] == "PASS", m[1]+" after "+m[3])
	}
	if err != nil {
		end := string(out[max(0, len(out)-2000):])
		b.Check("c: go test", false, err.Error())
		b.Say("%s", end)
	}
	return nil
}
