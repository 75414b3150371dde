package replica

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"

	"forerun/block"
	"forerun/data/journal"
	"forerun/internal/msg"
)

// Mux gives messages of the other node to the volume they are for. Its zero
// value is ready.
type Mux struct {
	mu   sync.RWMutex
	vols map[string]*Volume
}

// Add makes v known under its name.
func (m *Mux) Add(v *Volume) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.vols == nil {
		m.vols = map[string]*Volume{}
	}
	m.vols[v.cfg.Volume] = v
}

// Remove forgets v.
func (m *Mux) Remove(v *Volume) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.vols[v.cfg.Volume] == v {
		delete(m.vols, v.cfg.Volume)
	}
}

// Serve answers one message; from is the other node's name.
func (m *Mux) Serve(ctx context.Context, from string, typ uint8, p []byte) ([]byte, error) {
	name, rest, err := Split(p)
	if err != nil {
		return nil, err
	}
	m.mu.RLock()
	v := m.vols[name]
	m.mu.RUnlock()
	if v == nil {
		return nil, unknown(name)
	}
	return v.ServePeer(ctx, from, typ, rest)
}

// Serves says whether messages of that type are for a Mux.
func Serves(typ uint8) bool {
	return typ >= typOpen && typ < 64 || typ >= msg.Urgent+32 && typ < msg.Urgent+64
}

// ServePeer answers a message of the other node for this volume; p is what
// follows the volume's name (see Split).
func (v *Volume) ServePeer(ctx context.Context, from string, typ uint8, p []byte) ([]byte, error) {
	if err := v.enter("serve"); err != nil {
		return nil, err
	}
	defer v.life.RUnlock()
	if v.solo {
		return nil, v.fault("serve", block.KindUnsupported, "this node serves the volume alone; start it with an arbiter and a peer")
	}
	switch typ {
	case typOpen, typBeat, typAsk, typOffice:
		s, err := parseState(v.cfg.Volume, p)
		if err != nil {
			return nil, err
		}
		if s.node != from && from != "" {
			return nil, v.fault("serve", block.KindDenied, "node %q speaks as %q", from, s.node)
		}
		return v.serveState(ctx, typ, s)
	}
	b, rest, err := parseBody(p)
	if err != nil {
		return nil, err
	}
	if typ >= typFwdOpen && typ <= typFwdPrefetch {
		return v.serveForward(ctx, typ, b, rest)
	}
	s := v.inbound.Load()
	if s == nil || s.token != b.token || !s.enter() {
		return nil, v.fault("serve", block.KindFenced, "this session is over")
	}
	defer s.leave()
	return v.serveSession(s, typ, b, rest)
}

func (v *Volume) fault(op string, k block.Kind, format string, args ...any) error {
	return block.E("replica."+op, v.cfg.Volume, k, fmt.Errorf(format, args...))
}

// inside refuses ranges that are none.
func (v *Volume) inside(b body) error {
	if b.n <= 0 || b.off > v.info.Size-b.n {
		return v.fault("serve", block.KindRange, "%d bytes at %d end beyond the volume's %d; are both nodes' volumes of one source?", b.n, b.off, v.info.Size)
	}
	return nil
}

func (v *Volume) serveState(ctx context.Context, typ uint8, s state) ([]byte, error) {
	v.mu.Lock()
	decided := v.decided
	v.mu.Unlock()
	if !decided && typ != typAsk {
		// What this node acknowledged in an earlier life is known to the arbiter only.
		return nil, v.fault("serve", block.KindBusy, "this node has not heard from the arbiter yet")
	}
	switch typ {
	case typBeat:
		v.learn(event{kind: beat, rec: s.rec, from: s.node})
	case typOffice:
		v.learn(event{kind: learned, rec: s.rec})
	case typOpen:
		v.learn(event{kind: beat, rec: s.rec, from: s.node})
	}
	say := v.say()
	say.agreed = typ != typAsk && say.rec.Epoch == s.rec.Epoch && say.rec.Primary == s.node
	cur := v.inbound.Load()
	switch {
	case typ == typOpen && say.agreed:
		token, err := v.welcome(ctx, s.rec.Epoch)
		if err != nil {
			return nil, err
		}
		say.token = token
	case cur != nil:
		say.token = cur.token
		if typ == typBeat && say.agreed && s.inSync && s.token == cur.token && cur.epoch == s.rec.Epoch {
			v.mu.Lock()
			v.known.whole = true
			v.mu.Unlock()
		}
	}
	return say.append(nil), nil
}

// welcome begins a session of the primary of that epoch, when nothing of any
// earlier one can still happen here.
func (v *Volume) welcome(ctx context.Context, epoch uint64) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	select {
	case v.opening <- struct{}{}:
	case <-ctx.Done():
		return 0, v.fault("open", block.KindBusy, "another session is being opened")
	}
	defer func() { <-v.opening }()
	if old := v.inbound.Load(); old != nil {
		old.close()
		if err := old.drain(ctx); err != nil {
			return 0, err
		}
	}
	// Writes of the time when this node was primary.
	if err := v.ranges.barrier(ctx); err != nil {
		return 0, v.fault("open", block.KindBusy, "writes of this node's own time as primary are still under way")
	}
	n := &inbound{token: rand.Uint64() | 1, epoch: epoch, idle: make(chan struct{})}
	n.ctx, n.stop = context.WithCancel(v.base)
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.known.rec.Epoch != epoch || v.known.rec.Primary == v.cfg.Node {
		n.stop()
		return 0, v.fault("open", block.KindFenced, "a newer epoch has begun")
	}
	v.inbound.Store(n)
	return n.token, nil
}

// serveSession does what the primary asks for within a session.
func (v *Volume) serveSession(s *inbound, typ uint8, b body, rest []byte) ([]byte, error) {
	local := v.cfg.Local
	switch typ {
	case typWrite, typZero, typTrim, typHash:
		if err := v.inside(b); err != nil {
			return nil, err
		}
	}
	switch typ {
	case typWrite:
		if int64(len(rest)) != b.n {
			return nil, errShort
		}
		return nil, local.WriteAt(s.ctx, rest, b.off, b.flags&^block.FUA)
	case typZero:
		return nil, local.Zero(s.ctx, b.off, b.n, b.flags&^block.FUA)
	case typTrim:
		return nil, local.Trim(s.ctx, b.off, b.n, b.flags&^block.FUA)
	case typFlush:
		return nil, local.Flush(s.ctx, b.flags.Class())
	case typSettle:
		if err := local.Flush(s.ctx, block.Demand); err != nil {
			return nil, err
		}
		v.mu.Lock()
		v.known.whole = true
		v.mu.Unlock()
		return nil, nil
	case typRanges:
		if b.n != 0 && v.cfg.Compared != nil {
			if err := v.cfg.Compared(); err != nil {
				return nil, err
			}
		}
		list, known, err := v.changed(s.ctx, b.n != 0)
		if err != nil {
			return nil, err
		}
		out := make([]byte, 1, 1+len(list)*extentLen)
		if known {
			out[0] = 1
		}
		return appendExtents(out, list), nil
	case typHash:
		return v.hashes(s.ctx, b.off, b.n)
	case typMark:
		return []byte(v.cfg.Log.Position().String()), nil
	case typHold:
		name, pos, err := parseHold(rest)
		if err != nil {
			return nil, err
		}
		if err := local.Flush(s.ctx, block.Background); err != nil {
			return nil, err
		}
		return nil, v.cfg.Log.Hold(name, pos)
	}
	return nil, v.fault("serve", block.KindUnsupported, "message type %d is not known; do both nodes run the same version?", typ)
}

// A hold message carries the name and, behind a zero byte, the position.
func parseHold(p []byte) (name string, pos journal.Position, err error) {
	i := slices.Index(p, 0)
	if i < 0 {
		return "", pos, errShort
	}
	if err := pos.UnmarshalText(p[i+1:]); err != nil {
		return "", pos, block.E("replica.message", "", block.KindInvalid, errors.Join(errShort, err))
	}
	return string(p[:i]), pos, nil
}
