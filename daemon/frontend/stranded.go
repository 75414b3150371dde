package frontend

import (
	"context"
	"errors"
	"fmt"
	"time"

	"forerun/api"
	"forerun/data/stack"
)

// stranded is a volume that was cut over to a native disk which cannot be
// opened. That disk alone is the volume: it is waited for, and neither the
// backend nor what is left here of the source stands in for it.
type stranded struct {
	meta   stack.Meta
	target string
}

// strandedRetry is how often a native disk that is not there is looked for.
const strandedRetry = 2 * time.Second

// strand notes a volume whose opening failed with err for want of its native
// disk, and says whether that is so.
func (f *Frontend) strand(meta stack.Meta, err error) bool {
	var t *stack.TargetError
	if !errors.As(err, &t) {
		return false
	}
	f.log.Error("the native disk of a volume is not there; serving the others, looking for it", "volume", meta.Volume, "target", t.Target, "err", err)
	f.mu.Lock()
	f.stranded[meta.Volume] = stranded{meta, t.Target}
	f.mu.Unlock()
	f.setProblem(meta.Volume, err.Error())
	return true
}

// allStranded are the volumes whose native disks are not there.
func (f *Frontend) allStranded() []stranded {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []stranded
	for _, p := range f.stranded {
		all = append(all, p)
	}
	return all
}

func (f *Frontend) isStranded(name string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, ok := f.stranded[name]
	return ok
}

// awaitTarget opens the volume when its native disk is there.
func (f *Frontend) awaitTarget(ctx context.Context, p stranded) error {
	name := p.meta.Volume
	for sleep(ctx, strandedRetry); ctx.Err() == nil; sleep(ctx, strandedRetry) {
		err := f.openVolume(ctx, p.meta)
		if err == nil {
			f.mu.Lock()
			delete(f.stranded, name)
			f.mu.Unlock()
			f.setProblem(name, "")
			f.told()
			return nil
		}
		if f.setProblem(name, err.Error()) {
			f.log.Error("the volume cannot be opened yet", "volume", name, "err", err)
		}
	}
	return nil
}

// notOpen says why a volume of this node is not open.
func (f *Frontend) notOpen(name string) error {
	f.mu.Lock()
	_, stranded := f.stranded[name]
	problem := f.problems[name]
	f.mu.Unlock()
	if stranded {
		return errors.New(problem)
	}
	return fmt.Errorf("the volume is not open yet; the backend %s has not answered", f.link(name).addr)
}

// strandedStatus is what is known of a volume whose native disk is not there.
func (f *Frontend) strandedStatus(name string, s *api.Volume) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p, ok := f.stranded[name]
	if !ok {
		return
	}
	s.Phase, s.Primary, s.Waiting = api.PhaseSwitched, api.PrimaryTarget, f.problems[name]
	s.SizeBytes, s.ChunkBytes = p.meta.SizeBytes, int64(p.meta.ChunkBytes)
	s.Cutover.State, s.Cutover.Target = "switched", p.target
}
