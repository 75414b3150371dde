package pair

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"forerun/lab/guest"
)

// Boot runs a guest on a pair, kills the primary frontend N times under it,
// then destroys both frontends' machines and the guest's, and boots the guest
// from its source.
func Boot(ctx context.Context, o LostOptions, r Report) (err error) {
	if o.Interval == 0 {
		o.Interval = 3 * time.Second
	}
	k, err := begin(ctx, o.Options, r)
	if err != nil {
		return err
	}
	defer k.end(&err)
	b := bootRun{run: k, interval: o.Interval, source: k.path("guest.raw")}
	if err := b.onPair(); err != nil {
		return err
	}
	return b.onSource()
}

type bootRun struct {
	*run
	interval time.Duration
	source   string
	p        *Pair
	synced   []syncedAt
	gone     time.Time
}

// syncedAt is how many records the guest had synced at a moment.
type syncedAt struct {
	n  int
	at time.Time // before the guest was asked
}

// boot boots a guest and waits for it.
func (b *bootRun) boot(name string, d guest.Drive) (*guest.VM, error) {
	dir := b.path(name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	v, err := guest.Start(b.ctx, guest.Config{Drive: d, Dir: dir})
	if err != nil {
		return nil, err
	}
	b.atEnd(func() error {
		v.Kill()
		return nil
	})
	if err := v.WaitReady(20 * time.Minute); err != nil {
		return nil, fmt.Errorf("boot from %s: %w", name, err)
	}
	b.Measure("guest ready from "+name+" after", v.ToReady().Seconds(), "s")
	return v, nil
}

func (b *bootRun) onPair() error {
	cache, err := guest.CacheDir()
	if err != nil {
		return err
	}
	im, err := guest.Build(b.ctx, cache, guest.Small(), slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	if err := guest.Copy(b.source, im.Path); err != nil {
		return err
	}
	if b.p, err = b.pair(Config{Volumes: []Volume{{"vol", b.source}}, Interval: b.interval}); err != nil {
		return err
	}
	if err := b.p.Start(b.ctx); err != nil {
		return err
	}
	v, err := b.boot("pair", guest.Drive{Unix: b.p.Proxy.Socket, Export: "vol"})
	if err != nil {
		return errors.Join(err, b.p.Words())
	}
	for _, cmd := range []string{"load write /root/files 7 50 100000", "load start /root/log 0.02"} {
		if _, err := v.Run(cmd, 10*time.Minute); err != nil {
			return err
		}
	}
	for range b.N {
		if err := b.kill(); err != nil {
			return err
		}
	}
	end := time.Now().Add(b.between(2*b.interval, 3*b.interval))
	for len(b.synced) < 3 || time.Now().Before(end) {
		at := time.Now()
		out, err := v.Run("cat /run/load.synced", time.Minute)
		if err != nil {
			return err
		}
		n, err := strconv.Atoi(strings.TrimLeft(strings.TrimSpace(out), "0"))
		if err != nil {
			return fmt.Errorf("the guest has synced %q records: %w", out, err)
		}
		b.synced = append(b.synced, syncedAt{n, at})
	}
	out, err := v.Run("dmesg | grep -iE 'I/O error|EXT4-fs error' | head -5; true", time.Minute)
	b.Check("no I/O errors in the guest's log", err == nil && strings.TrimSpace(out) == "", strings.TrimSpace(out))
	var wg sync.WaitGroup
	for _, n := range b.p.Frontends() {
		wg.Go(n.Proc.Kill)
	}
	wg.Go(v.Kill)
	wg.Wait()
	b.gone = time.Now()
	b.p.Proxy.Proc.Kill()
	for _, n := range b.p.Frontends() {
		if err := os.RemoveAll(n.State); err != nil {
			return err
		}
	}
	return nil
}

func (b *bootRun) kill() error {
	first, _, err := b.p.Primary(b.ctx, "vol")
	if err != nil {
		return err
	}
	b.sleep(b.between(time.Second, 3*time.Second))
	first.Proc.Kill()
	b.sleep(b.between(0, 3*time.Second))
	if err := first.Start(b.ctx); err != nil {
		return err
	}
	_, err = b.p.WaitInSync(b.ctx, time.Minute)
	return err
}

func (b *bootRun) onSource() error {
	a, err := b.p.forceAbort(b.ctx, "vol")
	if err != nil {
		return err
	}
	b.Say("stated: %s", a.Loss)
	if err := b.p.Stop(); err != nil {
		return err
	}
	v, err := b.boot("source", guest.Drive{File: b.source})
	if err != nil {
		return err
	}
	out, err := v.Run("load verify /root/files", 10*time.Minute)
	b.Check("the guest's files are whole", err == nil, strings.TrimSpace(out))
	// The load keeps no account of itself before it is stopped.
	out, err = v.Run(`n=$(($(stat -c %s /root/log) / 4096)); echo "{\"records\": $n}" >/root/log.sum; load check /root/log >&2; r=$?; echo $n; exit $r`, 10*time.Minute)
	if err != nil {
		return fmt.Errorf("the guest's records: %w: %s", err, out)
	}
	f := strings.Fields(out)
	n, err := strconv.Atoi(f[len(f)-1])
	if err != nil {
		return fmt.Errorf("the guest has %q records: %w", out, err)
	}
	last := b.synced[len(b.synced)-1]
	behind := time.Duration(0)
	for _, s := range b.synced {
		if s.n > n { // the first that is missing was synced by then
			behind = b.gone.Sub(s.at)
			break
		}
	}
	b.Measure("records synced in the guest", float64(last.n), "")
	b.Measure("records on the source", float64(n), "")
	b.AtMost("the source is behind by", behind.Seconds(), b.interval.Seconds()+1, "s")
	if err := v.Poweroff(5 * time.Minute); err != nil {
		return err
	}
	if err := fsck(b.ctx, fmt.Sprintf("%s?offset=%d", b.source, guest.PartitionStart)); err != nil {
		return err
	}
	b.Check("e2fsck finds the source clean", true, "")
	return nil
}
