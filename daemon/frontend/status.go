package frontend

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"forerun/api"
	"forerun/block"
	"forerun/data/stack"
)

// rates turns a counter that is read now and then into bytes a second.
type rates struct {
	mu   sync.Mutex
	at   time.Time
	seen int64
	rate float64
}

// rateSpan is the least time between two readings that are compared.
const rateSpan = 500 * time.Millisecond

func (r *rates) note(now time.Time, bytes int64) float64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch d := now.Sub(r.at); {
	case r.at.IsZero():
		r.at, r.seen = now, bytes
	case d >= rateSpan:
		r.rate = float64(bytes-r.seen) / d.Seconds()
		r.at, r.seen = now, bytes
	}
	return r.rate
}

// Volumes is serve.Daemon.
func (f *Frontend) Volumes() []api.Volume {
	out := make([]api.Volume, 0, len(f.cfg.Volumes))
	for _, n := range f.cfg.Volumes {
		out = append(out, f.status(n))
	}
	return out
}

// Volume is serve.Daemon.
func (f *Frontend) Volume(name string) (api.Volume, error) {
	for _, n := range f.cfg.Volumes {
		if n == name {
			return f.status(name), nil
		}
	}
	return api.Volume{}, f.unknown(name)
}

func (f *Frontend) unknown(name string) error {
	return block.E("volume", name, block.KindNotFound,
		fmt.Errorf("this frontend has no volume %q; it has %s", name, strings.Join(f.cfg.Volumes, ", ")))
}

func (f *Frontend) status(name string) api.Volume {
	b := f.link(name)
	f.mu.Lock()
	v, client, problem, over := f.volumes[name], b.client, f.problems[name], f.over[name] != ""
	if problem == "" {
		problem = b.problem
	}
	away := b.away[name]
	f.mu.Unlock()
	s := api.Volume{Volume: name, Role: api.RoleFrontend, Phase: api.PhaseStarting, Primary: api.PrimarySource,
		Fill: api.Fill{State: "stopped", ETAS: -1}, Cutover: api.Cutover{State: "idle"}}
	if v != nil {
		s = v.Status()
	} else {
		f.strandedStatus(name, &s)
	}
	s.Backend = b.addr
	if s.Primary == api.PrimarySource {
		s.WAN.LastError = problem
	}
	if client != nil {
		c := client.Stats()
		s.WAN.Connected = c.Up
		s.WAN.SentBytes, s.WAN.ReceivedBytes = c.SentBytes, c.ReceivedBytes
		s.WAN.RTTUs, s.WAN.Reconnects = c.RTT.Microseconds(), c.Reconnects
		s.WAN.RateBytes = b.rates.note(time.Now(), c.ReceivedBytes)
	}
	if s.Waiting == "" && !over && (!s.WAN.Connected || problem != "") && s.Primary == api.PrimarySource && (v == nil || s.Chunks.Absent > 0) {
		s.Waiting = "the backend " + b.addr + " cannot be reached; reads of data that is not here wait"
		if problem != "" {
			s.Waiting = problem
		}
	}
	if s.Waiting == "" && away != "" && s.Primary == api.PrimarySource && s.Chunks.Absent > 0 {
		s.Waiting = "the source does not answer the backend " + b.addr + ": " + away
	}
	f.pairStatus(name, v, &s)
	d := f.domain(name)
	st := d.store.Stats()
	s.StoreBytes = st.DiskBytes + st.MapBytes
	s.Dedup.Domain, s.Dedup.EvictedBytes, s.Dedup.LimitBytes = d.name, st.EvictedBytes, f.cfg.StoreLimit
	s.Store = api.Store{Chunks: st.Chunks, PlainBytes: st.PlainBytes, Packs: int64(st.Packs), Corrupt: st.Corrupt}
	s.Limits = f.limits().Now
	s.Clients = int(f.nbd.Stats().Connections)
	return s
}

func (f *Frontend) opened(name string) (*stack.Volume, error) {
	if v := f.volume(name); v != nil {
		return v, nil
	}
	if phase := f.ended(name); phase != "" {
		return nil, block.E("volume", name, block.KindClosed, fmt.Errorf("the volume is over (%s)", phase))
	}
	if _, err := f.Volume(name); err != nil {
		return nil, err
	}
	return nil, block.E("volume", name, block.KindUnavailable, f.notOpen(name))
}

// Fill is serve.Controller.
func (f *Frontend) Fill(_ context.Context, name string, req api.FillRequest) error {
	v, err := f.opened(name)
	if err != nil {
		return err
	}
	switch req.Action {
	case "pause":
		return v.PauseFill(true)
	case "resume":
		return v.PauseFill(false)
	case "limit":
		return v.LimitFill(req.RateBytes)
	}
	return block.E("fill", name, block.KindInvalid, fmt.Errorf("action %q is not pause, resume or limit", req.Action))
}

// Cutover is serve.Controller. It starts the cut-over and returns.
func (f *Frontend) Cutover(_ context.Context, name string, req api.CutoverRequest) error {
	v, err := f.opened(name)
	if err != nil {
		return err
	}
	if err := primaryHere("cutover", v); err != nil {
		return err
	}
	return v.StartCutover(stack.CutoverOptions{Target: req.To, Threshold: req.ThresholdBytes, Wait: req.Wait, Force: req.Force})
}

// CancelCutover is serve.Controller.
func (f *Frontend) CancelCutover(ctx context.Context, name string) error {
	v, err := f.opened(name)
	if err != nil {
		return err
	}
	return v.CancelCutover(ctx)
}
