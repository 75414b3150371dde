package sim

import (
	"context"
	"slices"
	"sync"
	"time"

	"forerun/block"
)

// lie is a way in which a toy is broken.
type lie int

const (
	honest        lie = iota
	ackEarly          // the peer gets a write after it was acknowledged
	grantTwice        // while the nodes are apart both are primary
	oldEpoch          // a primary that lost its role answers once more
	staleReads        // the secondary answers reads from its own copy, late
	noFlush           // a flush is acknowledged and forgotten
	noSync            // alone, writes are not synced before they are acknowledged
	poorResync        // a node that comes back misses what is not written often
	tearCut           // a checkpoint copies sectors one after the other, under writes
	apartCut          // the volumes of a checkpoint are cut at different moments
	noRedo            // a backend that dies while it applies leaves it half done
	stateTooMuch      // the backend states a checkpoint that it does not have
	lateDuplicate     // a write whose client has gone happens a second time, later
	forgetsLast       // the last change is never written back
	lies
)

var lieNames = [lies]struct {
	name string
	seed uint64
}{
	ackEarly: {"ack early", 31}, grantTwice: {"grant twice", 0}, oldEpoch: {"old epoch", 131}, staleReads: {"stale reads", 0},
	noFlush: {"no flush", 272}, noSync: {"no sync", 93}, poorResync: {"poor resync", 0}, tearCut: {"torn cut", 0},
	apartCut: {"volumes cut apart", 0}, noRedo: {"no redo", 6}, stateTooMuch: {"states too much", 0},
	lateDuplicate: {"late duplicate", 0}, forgetsLast: {"forgets the last", 0},
}

// toy is a pair with a backend that does everything in one moment: what can be
// said about a cluster with the least code.
type toy struct {
	lie  lie
	s    Schedule
	h    *History
	stop chan struct{}
	wg   sync.WaitGroup

	mu      sync.Mutex
	node    [2]toyNode
	primary int
	epoch   int64
	members [2]bool
	apart   bool
	since   [2]time.Time // down since
	other   bool         // grantTwice: the other one is primary as well
	store   [][]byte     // last checkpoint
	cutAt   int64
	stated  int64
}

type toyNode struct {
	up      bool
	life    int
	mem     [][]byte
	platter [][]byte
}

func clone(v [][]byte) [][]byte {
	out := make([][]byte, len(v))
	for i := range v {
		out[i] = slices.Clone(v[i])
	}
	return out
}

func newToy(l lie) func(Schedule, *History, *Log) (cluster, error) {
	return func(s Schedule, h *History, _ *Log) (cluster, error) {
		var base [][]byte
		for v := range s.Volumes {
			base = append(base, untouched(v, volumeSize))
		}
		t := &toy{lie: l, s: s, h: h, stop: make(chan struct{}), epoch: 1, members: [2]bool{true, true}, store: clone(base)}
		for n := range t.node {
			t.node[n] = toyNode{up: true, mem: clone(base), platter: clone(base)}
		}
		for v := range s.Volumes {
			h.Granted(v, 1)
		}
		t.wg.Go(t.keep)
		return t, nil
	}
}

// keep takes over, takes back and checkpoints.
func (t *toy) keep() {
	for n := 0; ; n++ {
		select {
		case <-t.stop:
			return
		case <-time.After(100 * time.Millisecond):
		}
		t.mu.Lock()
		p, o := t.primary, 1-t.primary
		if !t.node[p].up && t.node[o].up && t.members[o] && time.Since(t.since[p]) > time.Second {
			t.takeover(o)
		}
		if t.node[p].up && t.node[o].up && !t.apart && !t.members[o] {
			t.resync(o)
		}
		if t.lie == grantTwice && t.apart && !t.other {
			t.other = true
		}
		t.mu.Unlock()
		if n%20 == 0 {
			t.checkpoint()
		}
	}
}

func (t *toy) takeover(n int) {
	t.epoch++
	t.primary, t.members = n, [2]bool{}
	t.members[n] = true
	for v := range t.s.Volumes {
		t.h.Granted(v, t.epoch)
		t.h.Took(v, t.epoch)
	}
}

func (t *toy) resync(n int) {
	const cold = 20 * Sector // what is written often heals
	keep := slices.Clone(t.node[n].mem[0][cold:])
	t.node[n].mem = clone(t.node[1-n].mem)
	if t.lie == poorResync {
		copy(t.node[n].mem[0][cold:], keep)
	}
	t.node[n].platter = clone(t.node[n].mem)
	t.members[n], t.other = true, false
}

func (t *toy) checkpoint() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.lie == forgetsLast && t.h.Stats().Acked%2 == 0 {
		return
	}
	if !t.node[t.primary].up {
		return
	}
	next := clone(t.node[t.primary].mem)
	at := t.h.Now()
	if t.lie == apartCut || t.lie == tearCut {
		for v := range next {
			for s := 0; s < volumeSize; s += Sector {
				if t.lie == tearCut && s%(4*Sector) == 0 && s < 64*Sector || t.lie == apartCut && s == 0 {
					t.mu.Unlock()
					time.Sleep(20 * time.Millisecond)
					t.mu.Lock()
				}
				if t.lie == tearCut || s == 0 {
					copy(next[v][s:], t.node[t.primary].mem[v][s:])
				}
			}
		}
	}
	t.stated = at
	if t.lie == stateTooMuch {
		return
	}
	if t.lie == noRedo && at%4 == 0 {
		for v := range next {
			copy(next[v][volumeSize/64:], t.store[v][volumeSize/64:])
		}
	}
	t.store, t.cutAt = next, at
}

// toyDevice is one life of one volume at one node.
type toyDevice struct {
	*toy
	n, vol, life int
}

func (t *toy) device(n, vol int) block.Device {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.node[n].up {
		return nil
	}
	return &toyDevice{t, n, vol, t.node[n].life}
}

func (t *toy) answer(n, _ int, dev block.Device, f func()) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.node[n].life != dev.(*toyDevice).life || !t.node[n].up {
		return false
	}
	t.mu.Unlock()
	f()
	t.mu.Lock()
	return true
}

func (t *toy) serving(n, _ int) (int64, int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n != t.primary {
		if t.other {
			return 1, 0
		}
		if t.lie == oldEpoch && t.epoch > 1 {
			return t.epoch - 1, 0
		}
		return 0, 0
	}
	if !t.members[1-n] {
		return t.epoch, t.epoch
	}
	return t.epoch, 0
}

// do runs f once the primary can be reached, at one moment of the call.
func (d *toyDevice) do(ctx context.Context, f func(p, o *toyNode) error) error {
	wait := func(t time.Duration) error {
		select {
		case <-time.After(t):
			return nil
		case <-ctx.Done():
			return block.E("toy", "", block.KindCanceled, ctx.Err())
		}
	}
	if err := wait(time.Millisecond); err != nil {
		return err
	}
	for {
		d.mu.Lock()
		p, o := d.primary, 1-d.primary
		if d.other {
			p, o = d.n, 1-d.n
		}
		ready := d.node[d.n].up && d.node[d.n].life == d.life && d.node[p].up && (p == d.n || !d.apart)
		if ready && d.members[o] && (!d.node[o].up || d.apart) && !d.other {
			// The peer is lost. Nobody has come before us: it is one moment.
			d.members[o] = false
			d.node[p].platter = clone(d.node[p].mem)
		}
		if ready {
			var peer *toyNode
			if d.members[o] && !d.other {
				peer = &d.node[o]
			}
			err := f(&d.node[p], peer)
			d.mu.Unlock()
			if e := wait(time.Millisecond); err == nil {
				err = e
			}
			return err
		}
		d.mu.Unlock()
		if err := wait(10 * time.Millisecond); err != nil {
			return err
		}
	}
}

func (d *toyDevice) Info() block.Info { return block.Info{Size: volumeSize, BlockSize: Sector} }

func (d *toyDevice) ReadAt(ctx context.Context, b []byte, off int64, _ block.Flags) error {
	if d.lie == staleReads {
		d.mu.Lock()
		copy(b, d.node[d.n].platter[d.vol][off:])
		d.mu.Unlock()
		return nil
	}
	return d.do(ctx, func(p, _ *toyNode) error {
		copy(b, p.mem[d.vol][off:])
		return nil
	})
}

func (d *toyDevice) WriteAt(ctx context.Context, b []byte, off int64, f block.Flags) error {
	return d.do(ctx, func(p, o *toyNode) error {
		apply := func(n *toyNode, f block.Flags) {
			copy(n.mem[d.vol][off:], b)
			if f.Has(block.FUA) {
				copy(n.platter[d.vol][off:], b)
			}
		}
		if o == nil && d.lie != noSync {
			f |= block.FUA
		}
		apply(p, f)
		if o != nil {
			if d.lie == ackEarly {
				life := o.life
				d.later(30*time.Millisecond, func() {
					if p.up && o.life == life {
						apply(o, f)
					}
				})
			} else {
				apply(o, f)
			}
		}
		if d.lie == lateDuplicate && off%(8*Sector) == 0 {
			d.later(300*time.Millisecond, func() { apply(p, f) })
		}
		return nil
	})
}

func (t *toy) later(d time.Duration, f func()) {
	t.wg.Go(func() {
		select {
		case <-t.stop:
		case <-time.After(d):
			t.mu.Lock()
			defer t.mu.Unlock()
			f()
		}
	})
}

func (d *toyDevice) Zero(ctx context.Context, off, n int64, f block.Flags) error {
	return d.WriteAt(ctx, make([]byte, n), off, f&block.FUA)
}

func (d *toyDevice) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	return d.WriteAt(ctx, make([]byte, n), off, f)
}

func (d *toyDevice) Flush(ctx context.Context, _ block.Flags) error {
	return d.do(ctx, func(p, o *toyNode) error {
		if d.lie == noFlush {
			return nil
		}
		p.platter = clone(p.mem)
		if o != nil {
			o.platter = clone(o.mem)
		}
		return nil
	})
}

func (d *toyDevice) Extents(_ context.Context, dst []block.Extent, off, n int64, _ block.Flags) ([]block.Extent, error) {
	return append(dst, block.Extent{Off: off, Len: n}), nil
}
func (d *toyDevice) Prefetch(context.Context, int64, int64, block.Flags) error { return nil }
func (d *toyDevice) Close() error                                              { return nil }

func (t *toy) fault(e Event) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch e.Fault {
	case Kill, PowerCut:
		if e.On > NodeB || !t.node[e.On].up {
			return
		}
		n := &t.node[e.On]
		n.up = false
		n.life++
		t.since[e.On] = time.Now()
		if e.Fault == PowerCut {
			// What is left is all that was acknowledged only if the other has it.
			if o := &t.node[1-e.On]; !t.members[1-e.On] || !o.up {
				for v := range t.s.Volumes {
					t.h.Lose(v)
				}
				t.members[1-e.On] = false
				if t.primary != e.On {
					t.takeover(e.On)
				}
			} else {
				if t.primary == e.On {
					t.takeover(1 - e.On)
				}
				t.members[e.On] = false
			}
			n.mem = clone(n.platter)
		} else if t.members[e.On] && t.members[1-e.On] && t.primary != e.On {
			t.members[e.On] = false
			t.node[1-e.On].platter = clone(t.node[1-e.On].mem)
		}
		t.later(e.For, func() { n.up = true })
	case OneWay, Isolate, Stall, Cut:
		if e.On > NodeB || e.To > NodeB || t.apart {
			return
		}
		t.apart = true
		t.later(max(e.For, time.Millisecond), func() { t.apart = false })
	}
}

func (t *toy) heal() error {
	time.Sleep(10 * time.Second)
	return nil
}

func (t *toy) settle() ([][]byte, error) {
	t.checkpoint()
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.store, nil
}

func (t *toy) disaster() ([][]byte, int64, int64, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for n := range t.node {
		t.node[n].up = false
		t.node[n].life++
	}
	return t.store, t.stated, t.stated, nil
}

func (t *toy) survive() (int, error) { return -1, nil }

func (t *toy) close() {
	close(t.stop)
	t.wg.Wait()
}
