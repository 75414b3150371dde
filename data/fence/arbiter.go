package fence

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"forerun/block"
	"forerun/disk"
	"forerun/internal/msg"
)

// maxVolumes bounds what strangers with a good certificate can make.
const maxVolumes = 1 << 16

// Options of an Arbiter. FS and Dir are needed.
type Options struct {
	FS  disk.FS
	Dir string // made if it is not there; nobody else's
	// Authorize says whether a node, known by its certificate, may ask about a
	// volume; nil allows all.
	Authorize func(role, name, volume string) error
	Log       *slog.Logger     // changes of primary and members; none if nil
	Now       func() time.Time // default time.Now; needs a monotonic reading
}

// Arbiter decides who may write which volume. Make it with Open.
type Arbiter struct {
	o       Options
	lock    disk.File
	started time.Time

	mu      sync.Mutex
	volumes map[string]*volume
	damaged map[string]error // by name of file
	closed  bool
}

// volume is the arbiter's part in one. Who holds turn decides.
type volume struct {
	turn chan struct{} // one token
	// Under turn.
	unsure bool // the disk may hold another record than st
	// Written under turn and Arbiter.mu, so that either is enough to read it.
	st state
}

// Open reads what the arbiter knew when it ended.
func Open(o Options) (*Arbiter, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if err := o.FS.MkdirAll(o.Dir); err != nil {
		return nil, block.E("fence.open", o.Dir, 0, err)
	}
	lock, err := o.FS.Lock(path.Join(o.Dir, lockName))
	if err != nil {
		return nil, block.E("fence.open", o.Dir, 0, fmt.Errorf("is another arbiter running there? %w", err))
	}
	a := &Arbiter{o: o, lock: lock, started: o.Now(), volumes: map[string]*volume{}}
	records, damaged, err := load(o.FS, o.Dir)
	if err != nil {
		lock.Close()
		return nil, block.E("fence.open", o.Dir, 0, err)
	}
	// A record that was renamed into place just before the power went may be
	// visible now and not be durable: make sure before acting on it.
	if err := o.FS.SyncDir(o.Dir); err != nil {
		lock.Close()
		return nil, block.E("fence.open", o.Dir, 0, err)
	}
	a.damaged = damaged
	for n, err := range damaged {
		o.Log.Error("a record of who may write a volume is damaged, the volume is refused", "file", path.Join(o.Dir, n), "err", err)
	}
	for _, r := range records {
		v := a.newVolume(r.Volume)
		v.st.rec = r
		a.volumes[r.Volume] = v
	}
	return a, nil
}

func (a *Arbiter) newVolume(name string) *volume {
	v := &volume{turn: make(chan struct{}, 1), st: state{rec: Record{Volume: name}, renewed: a.started}}
	v.turn <- struct{}{}
	return v
}

// Close ends the arbiter. Requests after it are refused with KindUnavailable.
func (a *Arbiter) Close() error {
	a.mu.Lock()
	if a.closed {
		a.mu.Unlock()
		return nil
	}
	a.closed = true
	all := make([]*volume, 0, len(a.volumes))
	for _, v := range a.volumes {
		all = append(all, v)
	}
	a.mu.Unlock()
	for _, v := range all {
		<-v.turn // whoever was writing has ended, and whoever waits will see that it is over
		v.turn <- struct{}{}
	}
	return a.lock.Close()
}

// get returns a volume, with its turn taken.
func (a *Arbiter) get(ctx context.Context, name string, make bool) (*volume, error) {
	a.mu.Lock()
	v := a.volumes[name]
	var err error
	switch {
	case a.closed:
		err = stopping(name)
	case v != nil:
	case a.damaged[fileName(name)] != nil:
		err = &block.Error{Op: "fence.serve", Object: name, Kind: block.KindCorrupt,
			Err: fmt.Errorf("the arbiter's record of the volume, %s, cannot be read, so nobody can say who may write it: %w",
				path.Join(a.o.Dir, fileName(name)), a.damaged[fileName(name)])}
	case !make:
		v = a.newVolume(name) // not kept
	case len(a.volumes) >= maxVolumes:
		err = &block.Error{Op: "fence.serve", Object: name, Kind: block.KindNoSpace,
			Err: fmt.Errorf("the arbiter keeps %d volumes already", len(a.volumes))}
	default:
		v = a.newVolume(name)
		a.volumes[name] = v
	}
	a.mu.Unlock()
	if err != nil {
		return nil, err
	}
	select {
	case <-v.turn:
	case <-ctx.Done():
		return nil, &block.Error{Op: "fence.serve", Object: name, Kind: block.KindCanceled, Err: ctx.Err()}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		v.turn <- struct{}{}
		return nil, stopping(name)
	}
	return v, nil
}

func stopping(volume string) error {
	return &block.Error{Op: "fence.serve", Object: volume, Kind: block.KindUnavailable, Err: errors.New("the arbiter is stopping")}
}

// set replaces what is known of v; its turn is taken.
func (a *Arbiter) set(v *volume, s state) {
	a.mu.Lock()
	v.st = s
	a.mu.Unlock()
}

// Serve answers a request of a node, known by the role and name in its
// certificate: the handler of a message. An error means that it is not decided.
func (a *Arbiter) Serve(ctx context.Context, role, name string, typ uint8, p []byte) ([]byte, error) {
	arrived := a.o.Now()
	q, err := parseRequest(typ, p)
	if err != nil {
		return nil, err
	}
	if q.node != name {
		return nil, &block.Error{Op: "fence.serve", Object: q.volume, Kind: block.KindDenied,
			Err: fmt.Errorf("the certificate is that of %q, the request is %q's; run the frontend under the name in its certificate", name, q.node)}
	}
	if a.o.Authorize != nil {
		if err := a.o.Authorize(role, name, q.volume); err != nil {
			return nil, err
		}
	}
	v, err := a.get(ctx, q.volume, q.op == opClaim)
	if err != nil {
		return nil, err
	}
	defer func() { v.turn <- struct{}{} }()
	if err := a.settle(v); err != nil {
		return nil, err
	}
	now := a.o.Now()
	// Whoever asked and has gone since, or was kept waiting by a slow disk,
	// decided on what may not be so any more.
	if ctx.Err() != nil {
		return nil, &block.Error{Op: "fence.serve", Object: q.volume, Kind: block.KindCanceled, Err: ctx.Err()}
	}
	if now.Sub(arrived) > LeaseTime && q.op != opGet && q.op != opRenew {
		late := answer{kind: block.KindBusy, text: "the arbiter was busy for too long, perhaps with a slow disk; ask again"}
		return appendAnswer(nil, late, v.st.rec), nil
	}
	next, ans := step(v.st, q, now)
	if err := a.keep(v, next, q.String()); err != nil {
		return nil, err
	}
	return appendAnswer(nil, ans, v.st.rec), nil
}

// keep makes a decision durable and then the truth.
func (a *Arbiter) keep(v *volume, next state, why string) error {
	if next.rec.equal(v.st.rec) {
		a.set(v, next)
		return nil
	}
	if err := save(a.o.FS, a.o.Dir, next.rec); err != nil {
		v.unsure = true
		a.o.Log.Error("the arbiter cannot write a record", "volume", next.rec.Volume, "err", err)
		return unsaved(next.rec.Volume, err)
	}
	a.o.Log.Info("who may write a volume has changed", "volume", next.rec.Volume, "now", next.rec.String(), "by", why)
	a.set(v, next)
	return nil
}

func unsaved(volume string, err error) error {
	return block.E("fence.save", volume, 0, fmt.Errorf("the arbiter cannot write down who may write the volume, so nothing was decided; "+
		"see to the disk of its state directory: %w", err))
}

// settle makes memory and disk one again after a write that failed. Until then
// not even a renewal is answered: after a crash the disk could say that another
// one is primary.
func (a *Arbiter) settle(v *volume) error {
	if !v.unsure {
		return nil
	}
	var err error
	if v.st.rec.Epoch == 0 {
		err = a.forget(v.st.rec.Volume)
	} else {
		err = save(a.o.FS, a.o.Dir, v.st.rec)
	}
	if err != nil {
		return unsaved(v.st.rec.Volume, err)
	}
	v.unsure = false
	return nil
}

// forget removes the file of a first claim that failed.
func (a *Arbiter) forget(volume string) error {
	err := a.o.FS.Remove(path.Join(a.o.Dir, fileName(volume)))
	if err != nil && block.KindOf(err) != block.KindNotFound {
		return err
	}
	return a.o.FS.SyncDir(a.o.Dir)
}

// Attend serves the connection of a node until it ends: what a listener does
// with those of protocol msg.ProtoArbiter.
func (a *Arbiter) Attend(ctx context.Context, nc net.Conn, role, name string) {
	c := msg.New(nc, msg.Options{Max: msg.MaxUrgent, Limit: 256, Log: a.o.Log,
		Serve: func(ctx context.Context, typ uint8, p []byte) ([]byte, error) {
			return a.Serve(ctx, role, name, typ, p)
		}})
	c.Run(ctx)
	c.Wait()
}

// Record returns the record of a volume, false when nobody holds it.
func (a *Arbiter) Record(volume string) (Record, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	v := a.volumes[volume]
	if v == nil || v.st.rec.Primary == "" {
		return Record{}, false
	}
	return v.st.rec.clone(), true
}

// Epoch returns the newest epoch of a volume, also of one that was dropped, and
// 0 when there was none: whoever acts in a lower one is to be refused.
func (a *Arbiter) Epoch(volume string) uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	if v := a.volumes[volume]; v != nil {
		return v.st.rec.Epoch
	}
	return 0
}

// Records returns those of all volumes that somebody holds, sorted.
func (a *Arbiter) Records() []Record {
	a.mu.Lock()
	defer a.mu.Unlock()
	var all []Record
	for _, v := range a.volumes {
		if v.st.rec.Primary != "" {
			all = append(all, v.st.rec.clone())
		}
	}
	slices.SortFunc(all, func(a, b Record) int { return strings.Compare(a.Volume, b.Volume) })
	return all
}

// Drop makes a volume nobody's, whoever holds it: for a forced abort, when
// those who held it are gone. Whoever still acts is fenced.
func (a *Arbiter) Drop(ctx context.Context, volume string) error {
	v, err := a.get(ctx, volume, false)
	if err != nil {
		return err
	}
	defer func() { v.turn <- struct{}{} }()
	if err := a.settle(v); err != nil {
		return err
	}
	r := v.st.rec
	if r.Primary == "" {
		return nil
	}
	return a.keep(v, state{r.dropped(), v.st.renewed}, "drop by the operator")
}
