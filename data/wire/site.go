package wire

import (
	"context"
	"errors"
	"sync"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
)

// Site is what the client's side holds in one dedup domain, as far as backends
// are told: once in full for each session, then every change. A backend then
// answers by signature what is held already. One Site serves all clients.
type Site struct {
	key  chunk.Key
	each func(func(chunk.Sig) bool) error

	mu    sync.Mutex
	tells map[*telling]struct{}
}

// NewSite describes a domain whose signatures are made with key. each calls
// its argument with every signature that is held until that returns false;
// what is added or goes meanwhile may be among them or not.
func NewSite(key chunk.Key, each func(func(chunk.Sig) bool) error) *Site {
	return &Site{key: key, each: each, tells: map[*telling]struct{}{}}
}

// Added tells that a chunk is held from now on. It does not wait.
func (s *Site) Added(sig chunk.Sig) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for t := range s.tells {
		t.note(change{markOf(&sig), false})
	}
}

// Gone tells that chunks are not held any more. It does not wait.
func (s *Site) Gone(sigs []chunk.Sig) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for t := range s.tells {
		for i := range sigs {
			t.note(change{markOf(&sigs[i]), true})
		}
	}
}

// change is a mark that came or went.
type change struct {
	mark mark
	gone bool
}

// telling tells one connection of one site: everything, then what changes.
type telling struct {
	wake chan struct{}

	mu      sync.Mutex
	changes []change
	lost    bool // there were too many to keep: everything is told again
}

// maxChanges bounds what waits to be told, 16 bytes each.
const maxChanges = 1 << 16

// note is called with Site.mu held, which keeps the order of changes.
func (t *telling) note(c change) {
	t.mu.Lock()
	if len(t.changes) >= maxChanges {
		t.changes, t.lost = nil, true
	}
	if !t.lost {
		t.changes = append(t.changes, c)
	}
	t.mu.Unlock()
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

func (t *telling) take() (cs []change, lost bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	cs, lost = t.changes, t.lost
	t.changes, t.lost = nil, false
	return cs, lost
}

const (
	// marksPerFrame keeps a frame of marks small: requests wait behind it.
	marksPerFrame = 512
	// tellEvery is how long changes are gathered.
	tellEvery = 50 * time.Millisecond
)

// tell keeps the backend informed about a site over l until ctx ends. send
// queues a frame and waits until there is little unsent before it.
func (s *Site) tell(ctx context.Context, send func(typ frameType, flags uint8, ms []mark) bool) {
	t := &telling{wake: make(chan struct{}, 1)}
	s.mu.Lock()
	s.tells[t] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.tells, t)
	}()
	if !s.tellAll(ctx, send) {
		return
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.wake:
		}
		if !pause(ctx, tellEvery) {
			return
		}
		cs, lost := t.take()
		if lost {
			if !s.tellAll(ctx, send) {
				return
			}
			continue
		}
		if !tellChanges(cs, send) {
			return
		}
	}
}

// tellAll sends every mark, the first frame saying that it begins anew.
func (s *Site) tellAll(ctx context.Context, send func(frameType, uint8, []mark) bool) bool {
	ms := make([]mark, 0, marksPerFrame)
	flags, ok := uint8(flagAnew), true
	flush := func(more uint8) bool {
		ok = send(tHave, flags|more, ms) && ctx.Err() == nil
		ms, flags = ms[:0], 0
		return ok
	}
	// A store that cannot name all it holds has told of some, and the rest is
	// sent as data: that costs bytes, nothing else.
	_ = s.each(func(sig chunk.Sig) bool {
		if ms = append(ms, markOf(&sig)); len(ms) == marksPerFrame {
			return flush(0)
		}
		return true
	})
	return ok && flush(flagWhole)
}

// tellChanges sends changes in order, in as few frames as that takes.
func tellChanges(cs []change, send func(frameType, uint8, []mark) bool) bool {
	ms := make([]mark, 0, marksPerFrame)
	for len(cs) > 0 {
		typ := tHave
		if cs[0].gone {
			typ = tGone
		}
		ms = ms[:0]
		for len(cs) > 0 && len(ms) < marksPerFrame && cs[0].gone == (typ == tGone) {
			ms = append(ms, cs[0].mark)
			cs = cs[1:]
		}
		if !send(typ, 0, ms) {
			return false
		}
	}
	return true
}

// tellSlot is the connection that marks go on: the first background one, where
// no demand stands behind them.
const tellSlot = 1

// siteOf is a Site as one client has it. number is constant, heard is under Client.mu.
type siteOf struct {
	site   *Site
	number uint8
	// heard: the backend knows all that the site holds. Background waits for it,
	// a while, or it would bring what is there.
	heard bool
}

// hearing is how long background waits for the backend to have heard.
const hearing = 3 * time.Second

// register enters a site, and begins to tell of it. Client.mu is held.
func (c *Client) register(s *Site) (*siteOf, error) {
	if so := c.sites[s]; so != nil {
		return so, nil
	}
	if len(c.sites) == 255 {
		return nil, &block.Error{Op: "wire.open", Object: c.o.Addr, Kind: block.KindBusy,
			Err: errors.New("a session has at most 255 dedup domains")}
	}
	so := &siteOf{site: s, number: uint8(len(c.sites) + 1)}
	c.sites[s] = so
	if l := c.slots[tellSlot]; l != nil {
		l.tell(so)
	}
	c.wg.Go(func() {
		if c.sleep(hearing) {
			c.hear(so)
		}
	})
	return so, nil
}

func (c *Client) hear(so *siteOf) {
	c.mu.Lock()
	defer c.mu.Unlock()
	so.heard = true
	c.pump()
}

// heard takes the server's word that it has been told everything of a site.
func (l *link) heard(h header) {
	l.c.mu.Lock()
	defer l.c.mu.Unlock()
	for _, so := range l.c.sites {
		if uint16(so.number) == h.volume {
			so.heard = true
		}
	}
	l.c.pump()
}

// maxUntold bounds the marks that wait to be written to a connection, which
// requests would stand behind.
const maxUntold = 8 << 10

// tell begins to tell the backend of a site on l. Client.mu is held.
func (l *link) tell(so *siteOf) {
	c := l.c
	c.wg.Go(func() {
		ctx, cancel := until(c.ctx, &c.wg, l.done)
		defer cancel()
		so.site.tell(ctx, func(typ frameType, flags uint8, ms []mark) bool {
			for {
				c.mu.Lock()
				if l.dead || l.leaving || c.closed {
					c.mu.Unlock()
					return false
				}
				if len(l.out) < maxUntold {
					l.tail = tail{}
					l.out = appendFrame(l.out, header{typ: typ, flags: flags, volume: uint16(so.number)}, appendMarks(nil, ms))
					l.poke()
					c.mu.Unlock()
					return true
				}
				c.mu.Unlock()
				select {
				case <-l.done:
					return false
				case <-l.room:
				}
			}
		})
	})
}
