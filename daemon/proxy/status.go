package proxy

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"forerun/api"
	"forerun/block"
	"forerun/internal/version"
)

// Node is serve.Daemon.
func (p *Proxy) Node() api.Node {
	p.mu.Lock()
	defer p.mu.Unlock()
	return api.Node{Name: p.cfg.Name, Role: api.RoleProxy, Version: version.String(),
		UptimeS: int64(time.Since(p.started).Seconds()), Exports: p.uris, Targets: p.cfg.Targets}
}

// Volumes is serve.Daemon: those that were asked for since the start.
func (p *Proxy) Volumes() []api.Volume {
	p.mu.Lock()
	var vs []*volume
	for _, v := range p.open {
		vs = append(vs, v)
	}
	p.mu.Unlock()
	slices.SortFunc(vs, func(a, b *volume) int { return strings.Compare(a.name, b.name) })
	out := make([]api.Volume, 0, len(vs))
	for _, v := range vs {
		out = append(out, p.status(v))
	}
	return out
}

// Volume is serve.Daemon.
func (p *Proxy) Volume(name string) (api.Volume, error) {
	p.mu.Lock()
	v := p.open[name]
	p.mu.Unlock()
	if v == nil {
		return api.Volume{}, block.E("volume", name, block.KindNotFound, fmt.Errorf("no client has asked this proxy for %q", name))
	}
	return p.status(v), nil
}

func (p *Proxy) status(v *volume) api.Volume {
	s := api.Volume{Volume: v.name, Role: api.RoleProxy, Phase: api.PhaseServing, Primary: api.PrimarySource,
		Clients: p.nbd.Connections(v.name), Failover: &api.Failover{Targets: []api.FailoverTarget{}},
		Fill: api.Fill{State: "stopped", ETAS: -1}, Cutover: api.Cutover{State: "idle"}}
	if p.export != "" {
		s.Clients += p.nbd.Connections("") // it is the default as well
	}
	p.mu.Lock()
	fail := v.fail
	p.mu.Unlock()
	if fail == nil {
		s.Phase = api.PhaseStarting
		s.Waiting = "no target could be reached yet"
		for _, t := range p.cfg.Targets {
			s.Failover.Targets = append(s.Failover.Targets, api.FailoverTarget{Target: t, State: "trying"})
		}
		return s
	}
	info := fail.Info()
	st := fail.Status()
	s.SizeBytes, s.ReadOnly, s.Source = info.Size, info.ReadOnly, st.Target
	f := s.Failover
	f.Target, f.Waiting, f.Moves, f.Repeated, f.Stalls, f.LongestUs = st.Target, st.Waiting, st.Moves, st.Repeated, st.Stalls, st.Longest.Microseconds()
	var why []string
	for _, t := range st.Targets {
		ft := api.FailoverTarget{Target: t.Name, State: t.State}
		if t.Err != nil {
			ft.Error = t.Err.Error()
			why = append(why, t.Name+": "+ft.Error)
		}
		f.Targets = append(f.Targets, ft)
	}
	if st.Target == "" {
		s.Waiting = fmt.Sprintf("no target works since %v: %s", st.Without.Round(time.Second), strings.Join(why, "; "))
	}
	return s
}
