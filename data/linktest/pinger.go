package linktest

import (
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"time"
)

// pingEvery is the interval of pings: with what TLS, TCP and the answers add,
// about 20 kbit/s each way.
const pingEvery = 50 * time.Millisecond

// pinger measures the round trip all the time, on a connection of its own.
type pinger struct {
	c  *conn
	t0 time.Time
	wg sync.WaitGroup

	mu    sync.Mutex
	pings []ping
	err   error
	moved chan struct{} // closed and made anew when a pong came, or all ended
}

type ping struct{ sent, took time.Duration } // took is 0 until it was answered

// newPinger starts to ping. failed is told when that cannot go on.
func newPinger(ctx context.Context, c *conn, t0 time.Time, failed func(error)) *pinger {
	p := &pinger{c: c, t0: t0, moved: make(chan struct{})}
	end := func(err error) {
		c.raw.Close() // the other half sees it
		p.mu.Lock()
		first := p.err == nil
		if first {
			p.err = c.explain(ctx, err)
			close(p.moved)
		}
		err = p.err
		p.mu.Unlock()
		if first {
			failed(err)
		}
	}
	p.wg.Go(func() { end(p.send(ctx)) })
	p.wg.Go(func() { end(p.receive()) })
	return p
}

// close ends the pinger's connection and waits for its goroutines.
func (p *pinger) close() {
	p.c.close()
	p.wg.Wait()
}

func (p *pinger) send(ctx context.Context) error {
	t := time.NewTicker(pingEvery)
	defer t.Stop()
	var b [headerLen + 8]byte
	for i := uint64(0); ; i++ {
		p.mu.Lock()
		ended := p.err != nil
		p.pings = append(p.pings, ping{sent: time.Since(p.t0)})
		p.mu.Unlock()
		if ended {
			return nil
		}
		binary.BigEndian.PutUint64(appendHeader(b[:0], tPing, 8)[headerLen:headerLen+8], i)
		p.c.nc.SetDeadline(time.Now().Add(grace))
		if _, err := p.c.nc.Write(b[:]); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-t.C:
		}
	}
}

func (p *pinger) receive() error {
	for {
		b, err := p.c.expect(tPong)
		if err != nil {
			return err
		}
		i, now := binary.BigEndian.Uint64(b), time.Since(p.t0)
		p.mu.Lock()
		if i >= uint64(len(p.pings)) || p.pings[i].took != 0 {
			p.mu.Unlock()
			return protocol("an answer to a ping that was not sent")
		}
		p.pings[i].took = max(now-p.pings[i].sent, 1)
		close(p.moved)
		p.moved = make(chan struct{})
		p.mu.Unlock()
	}
}

// between returns the round trips of the pings sent in a window, once that has
// passed and they are all answered.
func (p *pinger) between(ctx context.Context, from, to time.Duration) ([]time.Duration, error) {
	for {
		p.mu.Lock()
		err, moved := p.err, p.moved
		var out []time.Duration
		missing := 0
		for _, g := range p.pings {
			switch {
			case g.sent < from || g.sent > to:
			case g.took == 0:
				missing++
			default:
				out = append(out, g.took)
			}
		}
		p.mu.Unlock()
		switch {
		case err != nil:
			return nil, err
		case missing == 0 && time.Since(p.t0) > to:
			return out, nil
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-moved:
		}
	}
}

var errEnough = errors.New("the test has ended")
