package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"forerun/api"
	"forerun/lab/guest"
	"forerun/lab/rig"
)

// BootOptions are what Boot needs beside Options.
type BootOptions struct {
	Options
	// Rounds of all parts, 0 is 1. Ratios are those of the medians: other
	// work on the machine hits all parts alike only over several rounds.
	Rounds int
	// Only names the parts to run, from local, qemu, nbdcopy, forerun; empty is all.
	Only []string
}

// Boot compares the time to a ready guest: from the local file, over the line
// with qemu-nbd, over the line with this product; and the time to have the
// whole disk: nbdcopy over the same line against the fill under a running guest.
func Boot(ctx context.Context, o BootOptions, r *Report) (err error) {
	s, err := newStage(ctx, o.Options, r)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	want := func(part string) bool {
		for _, p := range o.Only {
			if p == part {
				return true
			}
		}
		return len(o.Only) == 0
	}
	if want("forerun") {
		if err := s.buildForerun(); err != nil {
			return err
		}
	}
	if err := s.buildGuest(); err != nil {
		return err
	}
	source := s.path("source.raw")
	if err := guest.Copy(source, s.image.Path); err != nil {
		return err
	}
	if err := s.openLine(); err != nil {
		return err
	}
	b := bootBench{stage: s, source: source}
	for b.round = 1; b.round <= max(o.Rounds, 1); b.round++ {
		for _, part := range []struct {
			name string
			do   func() error
		}{{"local", b.local}, {"qemu", b.qemu}, {"nbdcopy", b.nbdcopy}, {"forerun", b.forerun}} {
			if !want(part.name) {
				continue
			}
			s.Say("-- %s, round %d", part.name, b.round)
			if err := part.do(); err != nil {
				return fmt.Errorf("%s: %w", part.name, err)
			}
		}
	}
	ratio := func(name string, x, y []float64, bar float64) {
		switch {
		case len(x) == 0 || len(y) == 0:
		case bar == 0:
			s.Measure(name, median(x)/median(y), "x")
		default:
			s.AtMost(name, median(x)/median(y), bar, "x")
		}
	}
	ratio("ready: qemu over the line / local", b.qemuT, b.localT, 0)
	ratio("ready: forerun / local", b.ourT, b.localT, 0)
	ratio("ready: forerun / qemu over the line", b.ourT, b.qemuT, 0.7)
	ratio("whole disk: forerun's fill / nbdcopy", b.fillT, b.copyT, 0.6)
	return nil
}

type bootBench struct {
	*stage
	source                            string
	round                             int
	localT, qemuT, copyT, ourT, fillT []float64 // seconds, one a round
}

func (b *bootBench) local() error {
	disk := b.path("local.raw")
	if err := guest.Copy(disk, b.image.Path); err != nil {
		return err
	}
	defer os.Remove(disk)
	v, err := b.boot("local", guest.Drive{File: disk}, nil)
	if err != nil {
		return err
	}
	b.localT = append(b.localT, v.ToReady().Seconds())
	b.Measure("ready: local file", v.ToReady().Seconds(), "s")
	out, err := v.Run("cut -d' ' -f3,6 /sys/block/vda/stat; awk '{print $3*512/1e6}' /sys/block/vda/stat", time.Minute)
	if err == nil {
		f := strings.Fields(out)
		b.Say("the boot read %s MB", f[len(f)-1])
	}
	return v.Poweroff(5 * time.Minute)
}

// serve starts qemu-nbd at the source, with writes going to a temporary file.
func (b *bootBench) serve() (*rig.Proc, string, error) {
	addr := b.line.Source.Addr
	cmd := b.line.Source.Command(context.WithoutCancel(b.ctx), "qemu-nbd", "--format=raw", "--snapshot", "--persistent", "--shared=8",
		"--bind="+addr, "--port=10809", "--export-name=vol", b.source)
	cmd.Env = append(os.Environ(), "TMPDIR="+b.Dir)
	p, err := rig.Launch(cmd, "qemu-nbd", b.path("qemu-nbd.log"))
	if err != nil {
		return nil, "", err
	}
	b.atEnd(func() error { p.Kill(); return nil })
	hostport := net.JoinHostPort(addr, "10809")
	err = p.Until(b.ctx, 10*time.Second, "listening", func() bool {
		return b.line.Target.Do(func() error {
			c, err := net.DialTimeout("tcp", hostport, time.Second)
			if err == nil {
				c.Close()
			}
			return err
		}) == nil
	})
	return p, hostport, err
}

func (b *bootBench) qemu() error {
	srv, addr, err := b.serve()
	if err != nil {
		return err
	}
	defer srv.Kill()
	before := b.line.Stats()
	v, err := b.boot("qemu-nbd", guest.Drive{Host: addr, Export: "vol"}, b.line.Target.Command)
	if err != nil {
		return err
	}
	down, _ := b.crossed(before)
	b.qemuT = append(b.qemuT, v.ToReady().Seconds())
	b.Measure("ready: qemu over the line from qemu-nbd", v.ToReady().Seconds(), "s")
	b.Measure("line to target, qemu at ready", float64(down)/1e6, "MB")
	v.Kill()
	return nil
}

func (b *bootBench) nbdcopy() error {
	srv, addr, err := b.serve()
	if err != nil {
		return err
	}
	defer srv.Kill()
	dst := b.path("nbdcopy.raw")
	defer os.Remove(dst)
	before, start := b.line.Stats(), time.Now()
	cpu := selfCPU()
	out, err := b.line.Target.Command(b.ctx, "nbdcopy", "nbd://"+addr+"/vol", dst).CombinedOutput()
	if err != nil {
		return fmt.Errorf("nbdcopy: %w: %s", err, out)
	}
	took := time.Since(start)
	down, _ := b.crossed(before)
	b.copyT = append(b.copyT, took.Seconds())
	b.Measure("whole disk: nbdcopy over the line", took.Seconds(), "s")
	b.Measure("line to target, nbdcopy", float64(down)/1e6, "MB")
	if b.Rate > 0 {
		b.Measure("nbdcopy: share of the line used", float64(down)/took.Seconds()/float64(b.Rate), "x")
	}
	b.Measure("relay CPU meanwhile, of one core", (selfCPU()-cpu).Seconds()/took.Seconds(), "x")
	return nil
}

func (b *bootBench) forerun() error {
	g, err := b.newRig(filepath.Join(b.Dir, fmt.Sprintf("run%d", b.round)), b.source)
	if err != nil {
		return err
	}
	if err := g.PKI(b.ctx); err != nil {
		return err
	}
	if err := g.StartBackend(b.ctx); err != nil {
		return err
	}
	before, start := b.line.Stats(), time.Now()
	if _, err := g.StartFrontend(b.ctx); err != nil {
		return err
	}
	// The fill may be complete before the guest is ready.
	type filled struct {
		took float64
		down int64
		err  error
	}
	done := make(chan filled, 1)
	ctx, cancel := context.WithCancel(b.ctx)
	go func() {
		_, err := g.WaitFilled(ctx, time.Hour, func(api.Volume) {})
		down, _ := b.crossed(before)
		done <- filled{time.Since(start).Seconds(), down, err}
	}()
	v, err := b.boot("forerun", guest.Drive{Unix: g.Socket(), Export: g.Volume}, nil)
	if err != nil {
		cancel()
		<-done
		return errors.Join(err, g.Frontend.Trouble("was running"))
	}
	defer cancel()
	down, _ := b.crossed(before)
	ready := v.ToReady().Seconds()
	b.ourT = append(b.ourT, ready)
	b.Measure("ready: forerun over the line", ready, "s")
	b.Measure("ready: forerun, with the frontend's start", v.Ready.Sub(start).Seconds(), "s")
	b.Measure("line to target, forerun at ready", float64(down)/1e6, "MB")
	st, err := g.Status(b.ctx)
	if err != nil {
		cancel()
		<-done
		return err
	}
	b.Measure("demand bytes at ready", float64(st.WAN.DemandBytes)/1e6, "MB")
	b.Measure("demand reads at ready", float64(st.Demand.Reads), "")
	b.Measure("demand p99 at ready", float64(st.Demand.P99Us)/1e3, "ms")
	f := <-done
	if f.err != nil {
		return f.err
	}
	down = f.down
	b.fillT = append(b.fillT, f.took)
	b.Measure("whole disk: forerun's fill under the guest", f.took, "s")
	b.Measure("line to target, forerun at filled", float64(down)/1e6, "MB")
	if b.Rate > 0 {
		b.Measure("forerun: share of the line used", float64(down)/f.took/float64(b.Rate), "x")
	}
	if z, err := b.image.Zstd(b.ctx); err == nil {
		b.Measure("line to target / zstd -1 of the image", float64(down)/float64(z), "x")
	}
	b.Measure("frontend CPU", g.Frontend.CPU().Seconds(), "s")
	b.Measure("backend CPU", g.Backend.CPU().Seconds(), "s")
	b.Measure("frontend memory, largest", float64(g.Frontend.Memory())/1e6, "MB")
	if err := v.Poweroff(5 * time.Minute); err != nil {
		return err
	}
	return g.Stop()
}
