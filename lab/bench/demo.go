package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"forerun/api"
	"forerun/lab/guest"
	"forerun/lab/rig"
)

// Demo is the main job from end to end: a guest whose disk is on the far side
// of a line boots at once, runs and writes while its disk comes after it, is
// cut over to a native disk under load, and boots from that alone.
func Demo(ctx context.Context, o Options, r *Report) (err error) {
	s, err := newStage(ctx, o, r)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.buildForerun(); err != nil {
		return err
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
	m := migration{stage: s, source: source, native: s.path("native.raw")}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"start", m.start}, {"boot", m.boot}, {"work", m.work}, {"fill", m.fill}, {"cut over", m.cutover},
		{"verify in the guest", m.verify}, {"detach", m.detach}, {"boot the native disk alone", m.bootNative}, {"look at the disks", m.disks},
	} {
		s.Say("-- %s", step.what)
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
	}
	return nil
}

type migration struct {
	*stage
	source, native string
	rig            *rig.Rig
	vm             *guest.VM
	began          time.Time
}

func (m *migration) start() (err error) {
	if m.rig, err = m.newRig(m.path("run"), m.source); err != nil {
		return err
	}
	if err := m.rig.PKI(m.ctx); err != nil {
		return err
	}
	if err := m.rig.StartBackend(m.ctx); err != nil {
		return err
	}
	m.began = time.Now()
	took, err := m.rig.StartFrontend(m.ctx)
	if err != nil {
		return err
	}
	m.Measure("frontend start to serving", took.Seconds(), "s")
	return nil
}

func (m *migration) boot() (err error) {
	before := m.line.Stats()
	if m.vm, err = m.stage.boot("forerun", guest.Drive{Unix: m.rig.Socket(), Export: m.rig.Volume}, nil); err != nil {
		return errors.Join(err, m.rig.Frontend.Trouble("was running"))
	}
	down, up := m.crossed(before)
	m.Measure("guest ready after", m.vm.ToReady().Seconds(), "s")
	m.Measure("line to target, at ready", float64(down)/1e6, "MB")
	m.Measure("line to source, at ready", float64(up)/1e6, "MB")
	st, err := m.rig.Status(m.ctx)
	if err != nil {
		return err
	}
	m.Measure("demand bytes, at ready", float64(st.WAN.DemandBytes)/1e6, "MB")
	m.Measure("demand reads, at ready", float64(st.Demand.Reads), "")
	m.Measure("demand p50", float64(st.Demand.P50Us)/1e3, "ms")
	m.Measure("demand p99", float64(st.Demand.P99Us)/1e3, "ms")
	return nil
}

func (m *migration) guest(cmd string) (string, error) { return m.vm.Run(cmd, 10*time.Minute) }

func (m *migration) work() error {
	if _, err := m.guest("load write /root/files 7 200 200000"); err != nil {
		return err
	}
	_, err := m.guest("load start /root/log 0.05")
	return err
}

func (m *migration) fill() error {
	last := time.Now()
	st, err := m.rig.WaitFilled(m.ctx, time.Hour, func(v api.Volume) {
		if time.Since(last) > 10*time.Second {
			last = time.Now()
			m.Say("%d of %d MB here, fill %s at %.1f MB/s, eta %d s, demand p99 %.0f ms", rig.Here(v)>>20, v.SizeBytes>>20,
				v.Fill.State, v.Fill.RateBytes/1e6, v.Fill.ETAS, float64(v.Demand.P99Us)/1e3)
		}
	})
	if err != nil {
		return err
	}
	m.Measure("seen filled after (from frontend start)", time.Since(m.began).Seconds(), "s")
	ls := m.line.Stats()
	m.Measure("line to target, at filled", float64(ls.ToTarget.Bytes)/1e6, "MB")
	m.Measure("line to source, at filled", float64(ls.ToSource.Bytes)/1e6, "MB")
	if z, err := m.image.Zstd(m.ctx); err == nil {
		m.Measure("line to target / zstd -1 of the image", float64(ls.ToTarget.Bytes)/float64(z), "x")
	}
	m.Measure("store on disk", float64(st.StoreBytes)/1e6, "MB")
	m.Measure("frontend memory, largest", float64(m.rig.Frontend.Memory())/1e6, "MB")
	m.Measure("frontend CPU", m.rig.Frontend.CPU().Seconds(), "s")
	m.Measure("backend CPU", m.rig.Backend.CPU().Seconds(), "s")
	return nil
}

func (m *migration) cutover() error {
	start := time.Now()
	if err := m.rig.Cutover(m.ctx, m.native); err != nil {
		return errors.Join(err, m.rig.Frontend.Trouble("was running"))
	}
	m.Measure("cut-over took", time.Since(start).Seconds(), "s")
	st, err := m.rig.Status(m.ctx)
	if err != nil {
		return err
	}
	m.Check("primary is the target", st.Primary == api.PrimaryTarget, "phase "+st.Phase)
	m.Measure("cut-over rounds", float64(st.Cutover.Rounds), "")
	m.AtMost("cut-over pause", float64(st.Cutover.PauseUs)/1e3, 100, "ms")
	return nil
}

// verify asks the guest about its files; the native disk answers already.
func (m *migration) verify() error {
	time.Sleep(2 * time.Second) // the write load goes on after the switch
	out, err := m.guest("load stop /root/log")
	if err != nil {
		return err
	}
	var load struct {
		Records int     `json:"records"`
		Worst   float64 `json:"worst_ms"`
	}
	if err := json.Unmarshal([]byte(out), &load); err != nil {
		return fmt.Errorf("load stop answered %q: %w", out, err)
	}
	m.Measure("records written under fill and cut-over", float64(load.Records), "")
	m.Measure("longest write and sync in the guest", load.Worst, "ms")
	if _, err := m.guest("echo 3 >/proc/sys/vm/drop_caches"); err != nil {
		return err
	}
	return m.files("after cut-over")
}

func (m *migration) files(when string) error {
	for _, cmd := range []string{"load verify /root/files", "load check /root/log"} {
		out, err := m.guest(cmd)
		m.Check(cmd+" "+when, err == nil, strings.TrimSpace(out))
		if err != nil && out == "" {
			return err
		}
	}
	out, err := m.guest("dmesg | grep -iE 'I/O error|EXT4-fs error|EXT4-fs warning' | head -5; true")
	m.Check("no I/O errors in the guest's log "+when, err == nil && strings.TrimSpace(out) == "", strings.TrimSpace(out))
	return nil
}

func (m *migration) detach() error {
	if err := m.vm.Poweroff(5 * time.Minute); err != nil {
		return err
	}
	err := m.rig.Stop()
	note := ""
	if err != nil {
		note = err.Error()
	}
	m.Check("frontend and backend end cleanly", err == nil, note)
	return nil
}

func (m *migration) bootNative() (err error) {
	if m.vm, err = m.stage.boot("native", guest.Drive{File: m.native}, nil); err != nil {
		return err
	}
	m.Measure("guest ready from the native disk after", m.vm.ToReady().Seconds(), "s")
	if err := m.files("on the native disk"); err != nil {
		return err
	}
	return m.vm.Poweroff(5 * time.Minute)
}

func (m *migration) disks() error {
	out, err := exec.CommandContext(m.ctx, "e2fsck", "-fn", fmt.Sprintf("%s?offset=%d", m.native, guest.PartitionStart)).CombinedOutput()
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	m.Check("e2fsck finds the native disk clean", err == nil, lines[len(lines)-1])
	sum, err := guest.SHA256(m.source)
	if err != nil {
		return err
	}
	m.Check("the source disk was not changed", sum == m.image.SHA256, sum[:16])
	return nil
}
