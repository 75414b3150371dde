package bench

import (
	"errors"
	"fmt"
	"os"
	"time"
)

// cost is part f: processor time for the whole of a real disk at a rate that is
// no obstacle, against what compressing, encrypting and sending it costs at
// least; and how many processors a full line takes.
func (b *linkBench) cost() error {
	source, err := b.guestDisk()
	if err != nil {
		return err
	}
	data := b.path("guest-data")
	plain, err := withoutHoles(data, source)
	if err != nil {
		return err
	}
	p := point{rate: gbit}
	gib := float64(plain) / (1 << 30)
	var ours, bare, front, back, frontBare, backBare, memory []float64
	for rep := range b.o.N {
		var t transfer
		err := b.over(p, rep, func() (err error) { t, err = b.fill(source, 20*time.Minute); return err })
		if err != nil {
			return err
		}
		if !t.complete {
			return errors.New("the volume was not filled within 20 minutes")
		}
		b.Noted("f: fill, processor time per GiB", (t.front+t.back)/gib, "s", fmt.Sprintf("target %.2f s, source %.2f s for %.2f GiB in %.1f s; peak memory target %.0f MB, source %.0f MB; %s",
			t.front, t.back, gib, t.last, float64(t.frontMemory)/1e6, float64(t.backMemory)/1e6, t.machine))
		ours, front, back = append(ours, t.front+t.back), append(front, t.front), append(back, t.back)
		memory = append(memory, float64(t.frontMemory)/1e6)
		was := lookAtMachine()
		var f floor
		err = b.over(p, rep, func() (err error) { f, err = b.floorCopy(data); return err })
		if err != nil {
			return err
		}
		b.Noted("f: zstd and openssl, processor time per GiB", (f.front+f.back)/gib, "s", fmt.Sprintf("target %.2f s, source %.2f s in %.1f s; %s",
			f.front, f.back, f.seconds, was.since()))
		bare, frontBare, backBare = append(bare, f.front+f.back), append(frontBare, f.front), append(backBare, f.back)
	}
	b.Measure("f: target, fill / zstd and openssl", ratio(median(front), median(frontBare)), "x")
	b.Measure("f: source, fill / zstd and openssl", ratio(median(back), median(backBare)), "x")
	b.Measure("f: frontend memory, largest, median", median(memory), "MB")
	b.AtMost("f: processor time, fill / zstd and openssl", ratio(median(ours), median(bare)), 1.5, "x")
	if err := os.Remove(data); err != nil {
		return err
	}
	noisy, err := b.prepare("noise", (gbit*8+(1<<20)-1)>>20<<20, noise)
	if err != nil {
		return err
	}
	var cores [2][]float64
	for rep := range b.o.N {
		var t transfer
		err := b.over(p, rep, func() (err error) { t, err = b.fill(noisy, 20*time.Second); return err })
		if err != nil {
			return err
		}
		cores[0], cores[1] = append(cores[0], ratio(t.front, t.seconds)), append(cores[1], ratio(t.back, t.seconds))
		b.Noted("f: fill of noise", t.rate()/125e3, "Mbit/s", fmt.Sprintf("target %.2f and source %.2f processors; %s", ratio(t.front, t.seconds), ratio(t.back, t.seconds), t.machine))
	}
	b.AtMost("f: processors at the target, 1 Gbit/s of noise", median(cores[0]), 1.0, "")
	b.AtMost("f: processors at the source, 1 Gbit/s of noise", median(cores[1]), 1.0, "")
	return nil
}
