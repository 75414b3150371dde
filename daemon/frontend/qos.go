package frontend

import (
	"cmp"
	"context"
	"crypto/tls"
	"net"
	"sync/atomic"
	"time"

	"forerun/api"
	"forerun/block"
	"forerun/data/sched"
	"forerun/data/wire"
	"forerun/internal/msg"
)

// sender is what keeps write-back to one backend from hurting demand.
type sender struct {
	throttle wire.Throttle
	tries    atomic.Int64 // at the write-back port
}

// limits says what bounds background and write-back now.
func (f *Frontend) limits() api.Limits {
	l := api.Limits{Rules: f.limiter.Rules()}
	for _, r := range f.limiter.InForce(time.Now()) {
		u := api.LimitInUse{Class: r.Class.String(), RateBytes: r.RateBytes, Rule: r.Rule}
		if !r.Until.IsZero() {
			u.Until = r.Until.Format(time.RFC3339)
		}
		l.Now = append(l.Now, u)
	}
	return l
}

// SetLimits is serve.Limiter.
func (f *Frontend) SetLimits(_ context.Context, req api.LimitsRequest) (api.Limits, error) {
	l, err := sched.ParseLimits(req.Rules)
	if err != nil {
		return api.Limits{}, block.E("limit", "", block.KindInvalid, err)
	}
	f.limiter.Set(l)
	f.log.Info("the limits were changed", "rules", req.Rules)
	return f.limits(), nil
}

// dialWriteBack connects to where a backend takes write-back: what was
// configured, else what it said, and every other time in vain the port that
// is there for all.
func (f *Frontend) dialWriteBack(b *backendLink, cfg *tls.Config) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		addr := b.addr
		if b.sender.tries.Add(1)%2 == 1 {
			addr = cmp.Or(b.writeback, f.namedWriteBack(ctx, b), addr)
		}
		nc, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		if err != nil {
			return nil, block.E("msg.dial", addr, block.KindUnavailable, err)
		}
		tc, err := msg.ClientTLS(ctx, nc, addr, msg.ProtoWriteBack, cfg)
		if err != nil {
			return nil, err
		}
		b.sender.tries.Store(0)
		f.cfg.Socket.Apply(nc, block.WriteBack)
		if f.cfg.QoS != api.QoSReady {
			b.sender.throttle.Use(nc)
		}
		return tc, nil
	}
}

// namedWriteBack is what the backend said, empty when it has said nothing yet.
// It is asked when the daemon starts, at the same time as this.
func (f *Frontend) namedWriteBack(ctx context.Context, b *backendLink) string {
	for range 20 {
		if c := f.session(b); c != nil {
			return c.WriteBackAddr()
		}
		sleep(ctx, 50*time.Millisecond)
	}
	return ""
}

// paceFloor is the longest that a piece of write-back waits for demand: it is
// below demand, and never starves.
const paceFloor = 50 * time.Millisecond

// pace holds a piece of write-back back while the workload waits for the link,
// to what the way to the backend carries without a queue in which requests of
// demand would stand, and to the limits.
func (f *Frontend) pace(ctx context.Context, to *backendLink, n int) error {
	if err := f.limiter.Wait(ctx, sched.ClassWriteBack, n); err != nil {
		return err
	}
	if f.cfg.QoS == api.QoSReady {
		return nil
	}
	const look = 5 * time.Millisecond
	for waited := time.Duration(0); waited < paceFloor && f.demandWaits(to); waited += look {
		sleep(ctx, look)
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return to.sender.throttle.Wait(ctx, n, f.demandWaits(to))
}
