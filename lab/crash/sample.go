package crash

import (
	"context"
	"sync"
	"time"

	"forerun/lab/rig"
)

// sampler watches how much of the volume is here.
type sampler struct {
	mu      sync.Mutex
	samples []sample
	stop    context.CancelFunc
	done    chan struct{}
}

type sample struct {
	at   time.Time // before the question was asked
	here int64
}

func watch(ctx context.Context, r *rig.Rig) *sampler {
	ctx, stop := context.WithCancel(ctx)
	s := &sampler{stop: stop, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			v, err := r.Status(ctx)
			if err == nil {
				s.mu.Lock()
				s.samples = append(s.samples, sample{time.Now(), rig.Here(v)})
				s.mu.Unlock()
			}
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	}()
	return s
}

// before is the most that was seen here up to t.
func (s *sampler) before(t time.Time) (here int64) {
	s.stop()
	<-s.done
	for _, x := range s.samples {
		if x.at.Before(t) {
			here = max(here, x.here)
		}
	}
	return here
}
