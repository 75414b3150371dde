package replica

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
)

// session is the primary's side of a time in which the other node gets every
// write. Whatever ends with an unknown outcome ends the session, and a new one
// begins with a resynchronisation. The token is the other node's choice; it
// refuses messages of older sessions and has none of them under way any more.
type session struct {
	token  uint64
	node   string // who is at the other end
	whole  bool   // it had everything when the session began
	ctx    context.Context
	cancel context.CancelFunc
	slow   atomic.Bool
}

// open begins a session.
func (v *Volume) open(r *reign) (*session, error) {
	s, err := v.ask(r.ctx, typOpen, v.say())
	if err != nil {
		return nil, err
	}
	if !s.agreed {
		v.learn(event{kind: learned, rec: s.rec})
		return nil, block.E("replica.open", v.cfg.Volume, block.KindFenced, fmt.Errorf("%s knows of epoch %d", s.node, s.rec.Epoch))
	}
	n := &session{token: s.token, node: s.node, whole: s.inSync}
	n.ctx, n.cancel = context.WithCancel(r.ctx)
	return n, nil
}

// send sends one piece of a change and waits until the other node has it. o's
// range is locked.
func (v *Volume) send(s *session, o *op, typ uint8, p []byte, off, n int64, f block.Flags) error {
	o.head = body{s.token, off, n, f &^ block.FUA}.append(o.head[:len(v.name)])
	o.parts = [2][]byte{o.head, p}
	o.sent.Store(max(1, int64(v.ticks())))
	_, err := v.cfg.Peer.Call(s.ctx, typ, o.parts[:]...)
	o.sent.Store(0)
	o.parts[1] = nil
	return err
}

// call sends a message of a session that is no change.
func (v *Volume) call(s *session, d time.Duration, typ uint8, b body, more ...byte) ([]byte, error) {
	c, cancel := context.WithTimeout(s.ctx, d)
	defer cancel()
	b.token = s.token
	return v.cfg.Peer.Call(c, typ, append(b.append(slices.Clone(v.name)), more...))
}

// inbound is the other side of a session.
type inbound struct {
	token uint64
	epoch uint64
	ctx   context.Context
	stop  context.CancelFunc

	mu     sync.Mutex
	n      int
	closed bool
	idle   chan struct{} // closed when it is closed and nothing is under way
}

func (s *inbound) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.n++
	return true
}

func (s *inbound) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.n--; s.n == 0 && s.closed {
		close(s.idle)
	}
}

func (s *inbound) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.closed = true
	s.stop()
	if s.n == 0 {
		close(s.idle)
	}
}

// drain waits until nothing of a closed session is under way.
func (s *inbound) drain(ctx context.Context) error {
	select {
	case <-s.idle:
		return nil
	case <-ctx.Done():
		return block.E("replica.session", "", block.KindBusy, errors.New("changes of the session before are still under way"))
	}
}
