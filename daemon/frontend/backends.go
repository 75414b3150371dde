package frontend

import (
	"context"
	"slices"

	"forerun/daemon"
	"forerun/data/wire"
	"forerun/internal/msg"
)

// backendLink is how this node reaches one backend. All volumes of the backend
// share it, and what is amiss with it concerns no others.
type backendLink struct {
	addr    string
	volumes []string    // in the order of Config.Volumes
	back    *msg.Client // takes changes back
	arbiter *msg.Client // decides which node is primary; nil without a peer, one for all with Config.Arbiter
	rates   rates
	sender  sender

	background, writeback string // HOST:PORT of these classes, empty: where the backend says

	client  *wire.Client      // guarded by Frontend.mu: nil until it has answered
	problem string            // guarded by Frontend.mu: why it cannot be used
	away    map[string]string // guarded by Frontend.mu: by volume, why its source does not answer the backend
}

// watchSources asks the backend which of its volumes' sources do not answer it:
// what the workload waits for then is not the line.
func (f *Frontend) watchSources(ctx context.Context, b *backendLink) error {
	for ; ctx.Err() == nil; sleep(ctx, askEvery) {
		var away map[string]string
		c, cancel := context.WithTimeout(ctx, askEvery)
		if p, err := b.back.Call(c, daemon.MsgSources, daemon.AskSources(b.volumes)); err == nil {
			away, _ = daemon.ReadSources(p) // what it does not say is not known
		}
		cancel()
		f.mu.Lock()
		b.away = away
		f.mu.Unlock()
	}
	return nil
}

// newLinks makes a link for each backend that c names.
func newLinks(c *Config) []*backendLink {
	var links []*backendLink
	for _, v := range c.Volumes {
		addr := c.backendOf(v)
		i := slices.IndexFunc(links, func(b *backendLink) bool { return b.addr == addr })
		if i < 0 {
			b := &backendLink{addr: addr}
			if addr == c.Backend {
				b.background, b.writeback = c.BackendBackground, c.BackendWriteBack
			}
			i, links = len(links), append(links, b)
		}
		links[i].volumes = append(links[i].volumes, v)
	}
	return links
}

// link is that of a volume of this node.
func (f *Frontend) link(volume string) *backendLink {
	i := slices.IndexFunc(f.links, func(b *backendLink) bool { return slices.Contains(b.volumes, volume) })
	return f.links[i]
}

// addresses are those of all backends.
func (f *Frontend) addresses() []string {
	var all []string
	for _, b := range f.links {
		all = append(all, b.addr)
	}
	return all
}

// session is the link's, nil until the backend has answered.
func (f *Frontend) session(b *backendLink) *wire.Client {
	f.mu.Lock()
	defer f.mu.Unlock()
	return b.client
}

// needs says whether a volume needs the backend: it is new, or not on its
// native target.
func (f *Frontend) needs(b *backendLink) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.ContainsFunc(b.volumes, func(name string) bool {
		v := f.volumes[name]
		if v == nil {
			_, stranded := f.stranded[name]
			return f.over[name] == "" && !stranded
		}
		return !v.Switched()
	})
}

// leave hangs up on the backend when no volume needs it any more.
func (f *Frontend) leave(b *backendLink) {
	if !f.needs(b) && f.hangUp(b) {
		f.log.Info("no volume needs the backend any more", "backend", b.addr)
	}
}

// hangUp ends the session and says whether there was one.
func (f *Frontend) hangUp(b *backendLink) bool {
	f.mu.Lock()
	c := b.client
	b.client, b.problem = nil, ""
	f.mu.Unlock()
	if c == nil {
		return false
	}
	_ = c.Close() // what it may fail with concerns nobody now
	return true
}

// setDown notes why the backend cannot be used; no text ends it. It says
// whether it was usable before, as far as was known.
func (f *Frontend) setDown(b *backendLink, text string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	first := b.problem == ""
	b.problem = text
	return first
}
