package sim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
	"forerun/data/fence"
	"forerun/data/journal"
	"forerun/data/replica"
	"forerun/data/writeback"
	"forerun/disk"
	"forerun/disk/disktest"
	"forerun/internal/msg"
)

// groupName is the consistency group of all volumes.
const groupName = "group"

func volumeName(vol int) string { return fmt.Sprintf("v%d", vol) }

// pair is the real thing: two nodes, the backend and the arbiter.
type pair struct {
	s     Schedule
	h     *History
	log   *Log
	net   *network
	truth *truth
	base  [][]byte

	ctx  context.Context // of timers
	stop context.CancelFunc
	all  sync.WaitGroup

	mu     sync.Mutex // held while an answer is noted and while a machine goes down
	m      [machines]*machine
	gone   bool                // nobody starts any more
	silent [machines]time.Time // since when nothing gets to or from it, zero while it can
}

// machine outlives its processes.
type machine struct {
	id int

	slow slowness
	proc atomic.Pointer[process] // nil while it is down

	// Guarded by pair.mu.
	fs    *disktest.FS
	downs int // events that keep it down
	lives int // times it went down
	boot  int // power cuts

	booted int // boot when a process last opened all volumes
}

// process is one life of what runs on a machine.
type process struct {
	ctx  context.Context
	stop context.CancelFunc
	all  sync.WaitGroup
	ends []func() // called when it ends, last first

	listeners []net.Listener

	vols    []*nodeVolume
	ship    *writeback.Shipper
	arbiter *fence.Arbiter
	backend *writeback.Receiver
	sources []*image
}

// nodeVolume is a volume at a node; it is the device of clients and what the
// shipper sees.
type nodeVolume struct {
	*replica.Volume
	p       *process
	name    string
	journal *journal.Journal
	exact   bool
}

func newPair(s Schedule, h *History, log *Log) (cluster, error) {
	p := &pair{s: s, h: h, log: log, net: newNetwork(s)}
	p.truth = &truth{h: h, log: log, away: p.away}
	p.ctx, p.stop = context.WithCancel(context.Background())
	for v := range s.Volumes {
		p.base = append(p.base, untouched(v, volumeSize))
		p.truth.vols = append(p.truth.vols, &standing{})
	}
	for i := range p.m {
		p.m[i] = &machine{id: i, fs: disktest.New(s.Seed*8 + uint64(i)), slow: slowness{r: rand.New(rand.NewPCG(s.Seed, uint64(i)))}}
	}
	p.all.Go(func() {
		for ; p.ctx.Err() == nil; wait(p.ctx, 50*time.Millisecond) {
			p.mu.Lock()
			p.watch()
			p.mu.Unlock()
		}
	})
	for _, i := range []int{Arbiter, Backend, NodeA, NodeB} {
		if i == Arbiter && !s.Remote {
			continue
		}
		p.start(p.m[i])
		if p.m[i].proc.Load() == nil {
			p.close()
			return nil, fmt.Errorf("%s did not start", machineNames[i])
		}
	}
	return p, nil
}

// arbiterAt is the machine of the arbiter.
func (p *pair) arbiterAt() int {
	if p.s.Remote {
		return Arbiter
	}
	return Backend
}

// clock is a machine's: it runs at a rate of its own.
func (p *pair) clock(rate float64) func() time.Time {
	begin := time.Now()
	return func() time.Time { return begin.Add(time.Duration(float64(time.Since(begin)) * rate)) }
}

// start runs what belongs on a machine. With a full disk it tries until there is room.
func (p *pair) start(m *machine) {
	p.mu.Lock()
	life := m.lives
	p.mu.Unlock()
	for p.ctx.Err() == nil {
		p.mu.Lock()
		fs, gone := m.fs, m.lives != life || p.gone && m.id < Backend
		p.mu.Unlock()
		if gone {
			return
		}
		r := &process{}
		r.ctx, r.stop = context.WithCancel(p.ctx)
		err := p.run(m, r, fs)
		if err == nil {
			p.mu.Lock()
			ok := m.downs == 0 && m.lives == life
			if ok {
				m.proc.Store(r)
			}
			p.mu.Unlock()
			if ok {
				p.log.Add("%s is up", machineNames[m.id])
				return
			}
		}
		r.end()
		p.mu.Lock()
		mine := m.downs == 0 && m.lives == life
		p.mu.Unlock()
		switch {
		case !mine:
			return // it went down again meanwhile
		case block.KindOf(err) == block.KindNoSpace:
			wait(p.ctx, spaceRetry)
		default:
			p.h.Fail("%s cannot start: %v", machineNames[m.id], err)
			return
		}
	}
}

func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// kill ends what others see of a process.
func (r *process) kill() {
	r.stop()
	for _, ln := range r.listeners {
		ln.Close()
	}
}

// end stops a process and waits for it.
func (r *process) end() {
	r.kill()
	for i := len(r.ends) - 1; i >= 0; i-- {
		r.ends[i]()
	}
	r.all.Wait()
}

func (p *pair) run(m *machine, r *process, fs disk.FS) error {
	if m.id == p.arbiterAt() {
		if err := p.runArbiter(m, r, fs); err != nil {
			return err
		}
	}
	switch m.id {
	case Backend:
		return p.runBackend(m, r, fs)
	case NodeA, NodeB:
		return p.runNode(m, r, fs)
	}
	return nil
}

// serve answers messages of one machine's connections to another's service.
func (p *pair) serve(r *process, from, to int, service string, f func(ctx context.Context, typ uint8, b []byte) ([]byte, error)) error {
	ln, err := p.net.listen(r.ctx, &r.all, from, to, service, func(ctx context.Context, nc net.Conn) {
		c := msg.New(nc, msg.Options{Serve: f, Idle: 3 * time.Second})
		c.Run(ctx)
		c.Wait()
	})
	if err == nil {
		r.listeners = append(r.listeners, ln)
	}
	return err
}

// client keeps a connection of a process to a service.
func (p *pair) client(r *process, from, to int, service string) *msg.Client {
	c := msg.NewClient(msg.ClientOptions{Addr: machineNames[to] + "/" + service, Conn: msg.Options{Idle: 3 * time.Second},
		Dial: func(ctx context.Context) (net.Conn, error) { return p.net.dial(ctx, from, to, service) }})
	r.all.Go(func() { c.Run(r.ctx) })
	return c
}

func (p *pair) runArbiter(m *machine, r *process, fs disk.FS) error {
	a, err := fence.Open(fence.Options{FS: fs, Dir: "/fence", Log: p.log.Logger(machineNames[m.id]), Now: p.clock(p.s.Rate)})
	if err != nil {
		return err
	}
	r.arbiter = a
	r.ends = append(r.ends, func() { a.Close() })
	for _, node := range []int{NodeA, NodeB} {
		name := machineNames[node]
		err := p.serve(r, node, m.id, "arbiter", func(ctx context.Context, typ uint8, b []byte) ([]byte, error) {
			out, err := a.Serve(ctx, "frontend", name, typ, b)
			p.mu.Lock()
			defer p.mu.Unlock()
			if r.ctx.Err() != nil {
				return nil, r.ctx.Err() // it went down before it said so
			}
			for vol := range p.s.Volumes {
				if rec, ok := a.Record(volumeName(vol)); ok {
					p.truth.granted(vol, rec)
				}
			}
			return out, err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (p *pair) runBackend(m *machine, r *process, fs disk.FS) error {
	log := p.log.Logger(machineNames[m.id])
	if err := fs.MkdirAll("/sources"); err != nil {
		return err
	}
	for v := range p.s.Volumes {
		d, err := newImage(fs, "/sources/"+volumeName(v), p.base[v])
		if err != nil {
			return err
		}
		r.sources = append(r.sources, d)
	}
	o := writeback.ReceiverOptions{FS: fs, Dir: "/state", Grain: 4096, Log: log,
		Source: func(name string) (block.Device, error) {
			for v, d := range r.sources {
				if name == volumeName(v) {
					return d, nil
				}
			}
			return nil, block.E("sim.source", name, block.KindNotFound, nil)
		}}
	if r.arbiter != nil {
		o.Owner = func(volume string) (uint64, string, bool) {
			rec, ok := r.arbiter.Record(volume)
			return rec.Epoch, rec.Primary, ok
		}
	}
	rec, err := writeback.NewReceiver(o)
	if err != nil {
		return err
	}
	r.ends = append(r.ends, func() { rec.Close() })
	if err := rec.Recover(r.ctx); err != nil {
		return err
	}
	r.backend = rec
	// What was stored is in the sources now, and nothing that came later.
	images, after, before := p.stated(rec, r.sources)
	if err := p.h.Image(images, after, before); err != nil {
		p.h.Fail("the backend has started, and %v", err)
	}
	for _, node := range []int{NodeA, NodeB} {
		name := machineNames[node]
		err := p.serve(r, node, m.id, "writeback", func(ctx context.Context, typ uint8, b []byte) ([]byte, error) {
			return rec.Serve(ctx, "frontend", name, typ, b)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (p *pair) runNode(m *machine, r *process, fs disk.FS) error {
	me, other := m.id, 1-m.id
	name := machineNames[me]
	log := p.log.Logger(name)
	arb := p.client(r, me, p.arbiterAt(), "arbiter")
	peer := p.client(r, me, other, "peer")
	forward := p.client(r, me, other, "forward")
	back := p.client(r, me, Backend, "writeback")
	mux := &replica.Mux{}
	var list []writeback.Volume
	for v := range p.s.Volumes {
		nv, err := p.openVolume(m, r, fs, v, log, arb, peer, forward)
		if err != nil {
			return err
		}
		mux.Add(nv.Volume)
		r.vols = append(r.vols, nv)
		list = append(list, nv)
	}
	m.booted = m.boot // as a daemon that writes down the boot id
	for _, service := range []string{"peer", "forward"} {
		err := p.serve(r, other, me, service, func(ctx context.Context, typ uint8, b []byte) ([]byte, error) {
			return mux.Serve(ctx, machineNames[other], typ, b)
		})
		if err != nil {
			return err
		}
	}
	ship, err := writeback.NewShipper(writeback.ShipperOptions{Group: groupName, Volumes: list, Backend: back,
		Interval: p.s.Interval, MaxBytes: 256 << 10, Log: log})
	if err != nil {
		return err
	}
	r.ship = ship
	for _, nv := range r.vols {
		r.all.Go(func() { nv.Volume.Run(r.ctx) })
	}
	r.all.Go(func() { ship.Run(r.ctx) })
	return nil
}

// openVolume puts a volume's stack together at a node.
func (p *pair) openVolume(m *machine, r *process, fs disk.FS, v int, log *slog.Logger, arb, peer, forward *msg.Client) (*nodeVolume, error) {
	var full []byte
	if p.s.Filled {
		full = p.base[v]
	}
	name := volumeName(v)
	below, err := newOverlay(fs, path.Join("/", name), volumeSize, full, func(ctx context.Context, b []byte, off int64) error {
		return p.fetch(ctx, r, m.id, v, b, off)
	})
	if err != nil {
		return nil, err
	}
	o := journal.Options{SegmentBytes: 64 << 10, MaxBytes: p.s.Journal, CheckpointBytes: p.s.Journal / 4,
		CheckpointInterval: 2 * time.Second, InFlight: 32, Log: log}
	j, err := journal.Open(fs, path.Join("/", name, "journal"), below, o)
	if err != nil {
		below.Close()
		return nil, err
	}
	stack := &local{Device: j, life: r.ctx, slow: m.slow.now}
	clean := m.booted == m.boot
	if err := writeback.Prepare(j, clean); err != nil {
		j.Close()
		return nil, err
	}
	policy := replica.Wait
	if p.s.Degrade {
		policy = replica.Degrade
	}
	vol, err := replica.Open(replica.Config{Volume: name, Node: machineNames[m.id], Local: stack, Log: j,
		Fence: fence.NewClient(&asker{arb, p, m.id, v}, name, machineNames[m.id]),
		Peer:  &teller{peer, p, m.id, v}, Forward: forward, OnPeerLoss: policy, CleanStart: clean, FailBackAfter: p.s.FailBack, InFlight: 32, Logger: log})
	if err != nil {
		j.Close()
		return nil, err
	}
	r.ends = append(r.ends, func() { vol.Close() })
	return &nodeVolume{vol, r, name, j, clean}, nil
}

// fetch brings a piece of the source, as soon as the backend can be reached.
func (p *pair) fetch(ctx context.Context, r *process, node, v int, b []byte, off int64) error {
	for {
		if err := errors.Join(ctx.Err(), r.ctx.Err()); err != nil {
			return block.E("sim.fetch", "", block.KindClosed, err)
		}
		if back := p.m[Backend].proc.Load(); back != nil && p.net.open(node, Backend) {
			wait(r.ctx, p.s.WANRTT)
			if back.sources[v].ReadAt(ctx, b, off, 0) == nil {
				return nil
			}
		}
		wait(r.ctx, 100*time.Millisecond)
	}
}

// asker passes a node's requests to the arbiter, and notes what it learns.
type asker struct {
	fence.Caller
	p    *pair
	node int
	vol  int
}

// Call is fence.Caller.Call.
func (a *asker) Call(ctx context.Context, typ uint8, parts ...[]byte) ([]byte, error) {
	a.p.mu.Lock()
	a.p.took(a.vol)
	a.p.mu.Unlock()
	return a.Caller.Call(ctx, typ, parts...)
}

// took notes when a node knows that it has an epoch. mu is held.
func (p *pair) took(vol int) {
	rec := p.truth.vols[vol].rec
	if rec.Epoch == 0 {
		return
	}
	if r := p.m[nodeOf(rec.Primary)].proc.Load(); r != nil && r.vols[vol].Volume.Status().Epoch >= rec.Epoch {
		p.h.Took(vol, int64(rec.Epoch))
	}
}

// teller passes a node's messages to the other one, and notes when that one
// was brought up to date.
type teller struct {
	msg.Caller
	p    *pair
	node int
	vol  int
}

// typSettle is that message, in data/replica/SPEC.md.
const typSettle = 39

// Call is msg.Caller.Call.
func (t *teller) Call(ctx context.Context, typ uint8, parts ...[]byte) ([]byte, error) {
	if typ != typSettle {
		return t.Caller.Call(ctx, typ, parts...)
	}
	s := t.p.truth.vols[t.vol]
	t.p.mu.Lock()
	life := s.life[1-t.node]
	t.p.mu.Unlock()
	out, err := t.Caller.Call(ctx, typ, parts...)
	if err == nil {
		t.p.mu.Lock()
		s.settled[t.node], s.once[t.node] = life, true
		t.p.mu.Unlock()
	}
	return out, err
}

// Name is writeback.Volume.Name.
func (v *nodeVolume) Name() string { return v.name }

// Epoch is writeback.Volume.Epoch.
func (v *nodeVolume) Epoch() (uint64, bool) {
	s := v.Volume.Status()
	return s.Epoch, s.Role == "primary"
}

// Log is writeback.Volume.Log.
func (v *nodeVolume) Log() writeback.Log { return v.journal }

// Exact is writeback.Volume.Exact.
func (v *nodeVolume) Exact() bool { return v.exact }

// device gives clients a volume whose calls end with the process.
func (p *pair) device(node, vol int) block.Device {
	r := p.m[node].proc.Load()
	if r == nil {
		return nil
	}
	return &served{r.vols[vol], r}
}

func (p *pair) answer(node, _ int, dev block.Device, f func()) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.m[node].proc.Load() != dev.(*served).r {
		return false
	}
	f()
	return true
}

func (p *pair) serving(node, vol int) (epoch, alone int64) {
	r := p.m[node].proc.Load()
	if r == nil {
		return 0, 0
	}
	s := r.vols[vol].Volume.Status()
	if s.Role != "primary" {
		return 0, 0
	}
	if s.Mode == "degraded" || s.Mode == "resync" { // nobody else has everything
		alone = int64(s.Epoch)
	}
	return int64(s.Epoch), alone
}

// served binds the calls of clients to the life of a process, as its
// connections do.
type served struct {
	*nodeVolume
	r *process
}

func (d *served) with(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(d.r.ctx, cancel)()
	return f(ctx)
}

// ReadAt is block.Device.ReadAt.
func (d *served) ReadAt(ctx context.Context, b []byte, off int64, f block.Flags) error {
	return d.with(ctx, func(ctx context.Context) error { return d.Volume.ReadAt(ctx, b, off, f) })
}

// WriteAt is block.Device.WriteAt.
func (d *served) WriteAt(ctx context.Context, b []byte, off int64, f block.Flags) error {
	return d.with(ctx, func(ctx context.Context) error { return d.Volume.WriteAt(ctx, b, off, f) })
}

// Zero is block.Device.Zero.
func (d *served) Zero(ctx context.Context, off, n int64, f block.Flags) error {
	return d.with(ctx, func(ctx context.Context) error { return d.Volume.Zero(ctx, off, n, f) })
}

// Trim is block.Device.Trim.
func (d *served) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	return d.with(ctx, func(ctx context.Context) error { return d.Volume.Trim(ctx, off, n, f) })
}

// Flush is block.Device.Flush.
func (d *served) Flush(ctx context.Context, f block.Flags) error {
	return d.with(ctx, func(ctx context.Context) error { return d.Volume.Flush(ctx, f) })
}

// down ends what runs on a machine, or leaves it down for one more reason.
func (p *pair) down(m *machine, power bool) {
	p.mu.Lock()
	m.downs++
	first := m.downs == 1
	p.watch()
	r := m.proc.Swap(nil)
	if first {
		m.lives++
		if power {
			m.fs = m.fs.Crash()
			m.boot++
		} else {
			m.fs = m.fs.Kill()
		}
	}
	if first && m.id < Backend {
		p.truth.down(m.id, power)
	}
	p.mu.Unlock()
	if r == nil {
		return
	}
	r.kill()
	for o := range machines {
		if !power {
			p.net.cut(m.id, o)
		}
	}
	p.all.Go(r.end)
}

// up starts it when no reason is left.
func (p *pair) up(m *machine) {
	p.mu.Lock()
	m.downs--
	last := m.downs == 0
	p.mu.Unlock()
	if last {
		p.start(m)
	}
}

// after does something later, unless the run ends.
func (p *pair) after(d time.Duration, f func()) {
	p.all.Go(func() {
		wait(p.ctx, d)
		if p.ctx.Err() == nil {
			f()
		}
	})
}

// quiet stops or allows everything between a machine and all others.
func (p *pair) quiet(m int, on bool) {
	for o := range machines {
		if on {
			p.net.stop(m, o)
			p.net.stop(o, m)
		} else {
			p.net.allow(m, o)
			p.net.allow(o, m)
		}
	}
}

// away says since when nobody who needs it hears of a node: it is down, or
// cut off from the other one, or from the arbiter. mu is held.
func (p *pair) away(node int) time.Time { return p.silent[node] }

// watch keeps account of that. mu is held.
func (p *pair) watch() {
	for n := range p.silent[:Backend] {
		heard := p.m[n].proc.Load() != nil && p.net.open(n, 1-n) && p.net.open(n, p.arbiterAt())
		if heard {
			p.silent[n] = time.Time{}
		} else if p.silent[n].IsZero() {
			p.silent[n] = time.Now()
		}
	}
	// A member that comes back is brought up to date without a new record.
	for v, s := range p.truth.vols {
		if s.rec.Epoch == 0 {
			continue
		}
		p.took(v)
		at := nodeOf(s.rec.Primary)
		a, b := p.m[at].proc.Load(), p.m[1-at].proc.Load()
		if a == nil || b == nil || !s.whole[at] || s.whole[1-at] && !s.killed[1-at] {
			continue
		}
		one, two := a.vols[v].Volume.Status(), b.vols[v].Volume.Status()
		if one.Role == "primary" && two.Role == "secondary" && one.InSync && two.InSync && one.Epoch == s.rec.Epoch && two.Epoch == s.rec.Epoch {
			p.log.Add("%s has everything of volume %d again", machineNames[1-at], v)
			s.whole[1-at], s.killed[1-at] = true, false
		}
	}
}

func (p *pair) fault(e Event) {
	on, to := e.On, e.To
	if !p.s.Remote {
		if on == Arbiter {
			on = Backend
		}
		if to == Arbiter {
			to = Backend
		}
	}
	m := p.m[on]
	switch e.Fault {
	case Kill:
		p.down(m, false)
		p.after(e.For, func() { p.up(m) })
	case PowerCut:
		p.quiet(on, true)
		p.down(m, true)
		p.after(e.For, func() {
			for o := range machines {
				p.net.cut(on, o) // nobody knows the connections any more
			}
			p.quiet(on, false)
			p.up(m)
		})
	case OneWay:
		p.net.stop(on, to)
		p.after(e.For, func() { p.net.allow(on, to) })
	case Isolate:
		p.quiet(on, true)
		p.after(e.For, func() { p.quiet(on, false) })
	case Cut:
		p.net.cut(on, to)
	case Stall:
		p.net.stop(on, to)
		p.net.stop(to, on)
		p.after(e.For, func() {
			p.net.allow(on, to)
			p.net.allow(to, on)
		})
	case Far:
		p.net.far(on, to, true)
		p.after(e.For, func() { p.net.far(on, to, false) })
	case Slow:
		m.slow.set(e.For)
	case Handover:
		if r := m.proc.Load(); r != nil {
			for _, v := range r.vols {
				r.all.Go(func() {
					ctx, cancel := context.WithTimeout(r.ctx, 3*time.Second)
					defer cancel()
					if err := v.Volume.Handover(ctx); err != nil {
						p.log.Add("%s: hand-over of %s: %v", machineNames[on], v.name, err)
					}
				})
			}
		}
	case Checkpoint:
		if r := m.proc.Load(); r != nil {
			r.all.Go(func() {
				ctx, cancel := context.WithTimeout(r.ctx, 5*time.Second)
				defer cancel()
				if res, err := r.ship.Checkpoint(ctx); err == nil {
					p.log.Add("%s: checkpoint %d", machineNames[on], res.ID)
				}
			})
		}
	case Full:
		p.full(m, true)
		p.after(e.For, func() { p.full(m, false) })
	}
}

func (p *pair) full(m *machine, on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if on {
		m.fs.SetCapacity(max(1, m.fs.Used()))
	} else {
		m.fs.SetCapacity(0)
	}
}

var errLate = errors.New("it takes too long")

// heal waits until all faults have ended and the nodes are in sync.
func (p *pair) heal() error {
	var missing string
	for begin := time.Now(); time.Since(begin) < settleTime; wait(p.ctx, 100*time.Millisecond) {
		if p.h.Err() != nil {
			return nil
		}
		if missing = p.missing(); missing == "" {
			return nil
		}
	}
	return fmt.Errorf("%s, %v after the last fault began: %w", missing, settleTime, errLate)
}

func (p *pair) missing() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, m := range p.m {
		if i == Arbiter && !p.s.Remote {
			continue
		}
		if m.proc.Load() == nil {
			return machineNames[i] + " is down"
		}
	}
	p.watch()
	for v, s := range p.truth.vols {
		if !s.whole[0] || !s.whole[1] || len(s.rec.Members) < 2 {
			return fmt.Sprintf("volume %d is not in sync (%s)%s", v, s.rec, p.why(v))
		}
		r := p.m[nodeOf(s.rec.Primary)].proc.Load()
		if st := r.vols[v].Volume.Status(); !st.InSync || st.Role != "primary" {
			return fmt.Sprintf("volume %d: the primary %s is not in sync (%+v)", v, s.rec.Primary, st)
		}
	}
	return ""
}

func (p *pair) why(v int) string {
	var b strings.Builder
	for n := range 2 {
		if r := p.m[n].proc.Load(); r != nil {
			fmt.Fprintf(&b, "\n%s: %+v", machineNames[n], r.vols[v].Volume.Status())
		}
	}
	return b.String()
}

// settle writes everything back.
func (p *pair) settle() ([][]byte, error) {
	ctx, cancel := context.WithTimeout(p.ctx, settleTime)
	defer cancel()
	// A group is shipped by the node that is primary of all its volumes.
	for v := range p.s.Volumes {
		r := p.m[NodeB].proc.Load()
		if r.vols[v].Volume.Status().Role != "primary" {
			continue
		}
		if err := r.vols[v].Volume.Handover(ctx); err != nil {
			return nil, fmt.Errorf("the last hand-over: %w", err)
		}
	}
	var res writeback.Result
	for {
		var err error
		if res, err = p.m[NodeA].proc.Load().ship.Checkpoint(ctx); err == nil {
			break
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("the last checkpoint: %w", err)
		}
		wait(ctx, 100*time.Millisecond)
	}
	p.log.Add("last checkpoint %d: %d bytes", res.ID, res.Bytes)
	if p.s.Abort { // the move is called off
		for v := range p.s.Volumes {
			if err := p.m[NodeA].proc.Load().ship.Release(ctx, volumeName(v)); err != nil {
				return nil, fmt.Errorf("giving the source of volume %d back: %w", v, err)
			}
		}
	}
	images, _, _ := p.stated(p.m[Backend].proc.Load().backend, p.m[Backend].proc.Load().sources)
	return images, p.h.Err()
}

// disaster ends both nodes for good, cuts the power of the backend, and takes
// what it has when it is back.
func (p *pair) disaster() ([][]byte, int64, int64, error) {
	p.mu.Lock()
	p.gone = true
	p.mu.Unlock()
	for _, m := range p.m[:Backend] {
		p.down(m, true)
	}
	m := p.m[Backend]
	wait(p.ctx, 200*time.Millisecond)
	p.down(m, true)
	for o := range machines {
		p.net.cut(Backend, o)
	}
	p.up(m)
	for begin := time.Now(); p.m[Backend].proc.Load() == nil; wait(p.ctx, 100*time.Millisecond) {
		if time.Since(begin) > settleTime || p.h.Err() != nil {
			return nil, 0, 0, errors.Join(p.h.Err(), fmt.Errorf("the backend does not come back: %w", errLate))
		}
	}
	r := p.m[Backend].proc.Load()
	images, after, before := p.stated(r.backend, r.sources)
	return images, after, before, nil
}

func (p *pair) survive() (int, error) {
	for _, m := range p.m { // what is down comes back by itself
		for begin := time.Now(); p.at(m).proc.Load() == nil; wait(p.ctx, 50*time.Millisecond) {
			if time.Since(begin) > settleTime || p.h.Err() != nil {
				return -1, errors.Join(p.h.Err(), fmt.Errorf("%s does not come back: %w", machineNames[m.id], errLate))
			}
		}
	}
	p.mu.Lock()
	p.watch()
	node := -1
	for _, n := range []int{NodeA, NodeB} { // rather a secondary: it must have what was flushed as well
		in, office := true, false
		for _, s := range p.truth.vols {
			in = in && s.whole[n] && !s.killed[n] && s.rec.Member(machineNames[n])
			office = office || s.rec.Primary == machineNames[n]
		}
		if in && (node < 0 || !office) {
			node = n
		}
	}
	p.mu.Unlock()
	if node < 0 {
		return -1, nil
	}
	p.h.OneDisk()
	p.quiet(1-node, true)
	p.down(p.m[1-node], true)
	p.down(p.m[node], true)
	for o := range machines {
		p.net.cut(node, o)
	}
	wait(p.ctx, 100*time.Millisecond)
	p.up(p.m[node])
	p.log.Add("%s is alone", machineNames[node])
	var last error
	for begin := time.Now(); time.Since(begin) < settleTime && p.h.Err() == nil; wait(p.ctx, 200*time.Millisecond) {
		r := p.m[node].proc.Load()
		if r == nil {
			continue
		}
		last = nil
		for _, v := range r.vols {
			ctx, cancel := context.WithTimeout(r.ctx, 5*time.Second)
			last = errors.Join(last, v.Volume.TakeOver(ctx, true))
			cancel()
		}
		if last == nil {
			return node, nil
		}
	}
	return node, errors.Join(p.h.Err(), fmt.Errorf("%s is not made primary by force: %w: %w", machineNames[node], errLate, last))
}

// at is the machine that stands for m.
func (p *pair) at(m *machine) *machine {
	if m.id == Arbiter {
		return p.m[p.arbiterAt()]
	}
	return m
}

// stated reads the sources, and gives the moments of the cut that the backend
// says they are.
func (p *pair) stated(rec *writeback.Receiver, sources []*image) (images [][]byte, after, before int64) {
	before = never
	for v, d := range sources {
		b := make([]byte, volumeSize)
		if err := d.ReadAt(p.ctx, b, 0, 0); err != nil && p.ctx.Err() == nil {
			p.log.Add("reading a source: %v", err)
			return p.base, 0, never // it went down again
		}
		images = append(images, b)
		st, err := rec.Status(volumeName(v))
		if err != nil || st.LastID == 0 {
			continue
		}
		last, next := p.h.Around(st.LastCut)
		p.log.Add("the backend states checkpoint %d of volume %d, cut at %d to %d", st.LastID, v, last, next)
		after, before = max(after, last+1), min(before, next-1)
	}
	return images, after, before
}

func (p *pair) close() {
	p.mu.Lock()
	p.gone = true
	for _, m := range p.m {
		m.downs++
	}
	p.mu.Unlock()
	p.stop()
	p.net.close()
	for _, m := range p.m {
		if r := m.proc.Swap(nil); r != nil {
			r.end()
		}
	}
	p.all.Wait()
}
