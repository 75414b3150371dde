package bench

import (
	"errors"
	"fmt"
	"os"
	"time"

	"forerun/api"
	"forerun/lab/guest"
)

// fillUnderGuest is part a2: a guest boots from the volume while the fill runs.
// Beside it a compressed copy that serves nobody, and a boot while nothing fills.
func (b *linkBench) fillUnderGuest() error {
	source, err := b.guestDisk()
	if err != nil {
		return err
	}
	p := point{rate: mbit100, rtt: 40 * time.Millisecond}
	var filled, piped, ready, alone []float64
	for rep := range b.o.N {
		was := lookAtMachine()
		var d time.Duration
		err := b.over(p, rep, func() (err error) { d, err = b.pipeCopy(source); return err })
		if err != nil {
			return err
		}
		piped = append(piped, d.Seconds())
		b.Noted("a2: zstd -1, the line, zstd -d", d.Seconds(), "s", was.since())
		for i := range 2 {
			fills := (i+rep)%2 == 0
			was = lookAtMachine()
			var r, f float64
			err := b.over(p, rep, func() (err error) { r, f, err = b.bootOver(source, fills); return err })
			if err != nil {
				return err
			}
			if !fills {
				alone = append(alone, r)
				b.Noted("a2: ready, without the fill", r, "s", was.since())
				continue
			}
			ready, filled = append(ready, r), append(filled, f)
			b.Noted("a2: ready, with the fill", r, "s", was.since())
			b.Noted("a2: whole disk under the guest", f, "s", was.since())
		}
	}
	b.AtMost("a2: whole disk under the guest / zstd pipe that serves nobody", ratio(median(filled), median(piped)), 1.0, "x")
	b.AtMost("a2: ready with the fill / without", ratio(median(ready), median(alone)), 1.10, "x")
	return nil
}

// guestDisk is the guest's image, built when nobody did, copied to the source.
func (b *linkBench) guestDisk() (string, error) {
	if b.image.Path == "" {
		if err := b.buildGuest(); err != nil {
			return "", err
		}
	}
	source := b.path("guest.raw")
	if _, err := os.Stat(source); err == nil {
		return source, nil
	}
	return source, guest.Copy(source, b.image.Path)
}

// bootOver boots the guest from the product, with or without the fill, and
// returns the seconds to the ready guest and to the whole disk.
func (b *linkBench) bootOver(source string, fills bool) (ready, whole float64, err error) {
	dir, err := b.dir("boot")
	if err != nil {
		return 0, 0, err
	}
	defer os.RemoveAll(dir)
	var args []string
	if !fills {
		args = append(args, "--fill-paused")
	}
	g, err := b.linkRig(dir, source, args...)
	if err != nil {
		return 0, 0, err
	}
	defer g.Kill()
	if err := errors.Join(g.PKI(b.ctx), g.StartBackend(b.ctx)); err != nil {
		return 0, 0, err
	}
	start := time.Now()
	if _, err := g.StartFrontend(b.ctx); err != nil {
		return 0, 0, err
	}
	type end struct {
		took float64
		err  error
	}
	done := make(chan end, 1)
	if fills {
		go func() {
			// It may be filled before the guest is ready.
			_, err := g.WaitFilled(b.ctx, time.Hour, func(api.Volume) {})
			done <- end{time.Since(start).Seconds(), err}
		}()
	} else {
		done <- end{}
	}
	b.runs++
	v, err := b.boot(fmt.Sprint("link", b.runs), guest.Drive{Unix: g.Socket(), Export: g.Volume}, nil)
	if err != nil {
		g.Kill() // which ends the wait for the fill
		<-done
		return 0, 0, errors.Join(err, g.Frontend.Trouble("was running"))
	}
	defer v.Kill()
	e := <-done
	return v.ToReady().Seconds(), e.took, e.err
}
