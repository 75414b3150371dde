package fence

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
	"forerun/disk/disktest"
)

// This is the lease argument as an experiment: two nodes that replicate a set
// of numbers by the rules of the package comment, an arbiter, and between them
// lines that lose, delay and repeat messages, one way or both; nodes and
// arbiter restart, clocks run at different rates. A read must show every number
// that was acknowledged before it was asked for.

// rig is the world of one run.
type rig struct {
	t     *testing.T
	rmu   sync.Mutex
	rnd   *rand.Rand
	arb   atomic.Pointer[Arbiter]
	calm  atomic.Bool
	cut   [3][3]atomic.Bool // from, to: 0 and 1 are the nodes, 2 the arbiter
	nodes [2]*node
	wg    sync.WaitGroup

	mu     sync.Mutex
	acked  []int
	next   int
	reads  int
	causes map[Cause]int
}

func (g *rig) intn(n int) int {
	g.rmu.Lock()
	defer g.rmu.Unlock()
	return g.rnd.IntN(n)
}

// carry delivers a message after a while, or not.
func (g *rig) carry(from, to int, deliver func()) {
	d := time.Duration(1+g.intn(20)) * time.Millisecond
	switch g.intn(30) {
	case 0:
		d = time.Duration(g.intn(4000)) * time.Millisecond
	case 1:
		return
	}
	g.wg.Go(func() {
		time.Sleep(d)
		if !g.cut[from][to].Load() {
			deliver()
		}
	})
}

// call is a request and its answer over two such deliveries.
func (g *rig) call(ctx context.Context, from, to int, serve func() ([]byte, error)) ([]byte, error) {
	type result struct {
		p   []byte
		err error
	}
	back := make(chan result, 3)
	times := 1
	if g.intn(10) == 0 {
		times = 2 // a repetition that comes at any time
	}
	for range times {
		g.carry(from, to, func() {
			p, err := serve()
			g.carry(to, from, func() { back <- result{p, err} })
		})
	}
	t := time.NewTimer(time.Second)
	defer t.Stop()
	select {
	case r := <-back:
		return r.p, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-t.C:
		return nil, &block.Error{Op: "test", Kind: block.KindUnavailable}
	}
}

// node is one frontend. What its process knows is in life.
type node struct {
	g    *rig
	i    int
	name string
	rate float64
	log  map[int]bool // kept over restarts
	life atomic.Pointer[life]
}

// life is a process of a node.
type life struct {
	*node
	c      *Client
	w      *Witness
	ctx    context.Context
	die    context.CancelFunc
	ended  chan struct{}
	freeze chan struct{} // one token: a write, a join or a handover

	mu       sync.Mutex // with log
	serving  uint64     // the epoch it serves as primary
	heard    time.Time
	taking   bool
	patience time.Duration // with a silent primary: whatever it is, only that and no more depends on it
}

func (n *node) now() time.Time {
	return t0.Add(time.Duration(float64(time.Since(t0)) * n.rate))
}

func (n *node) peer() *node { return n.g.nodes[1-n.i] }

// Call is the way to the arbiter.
func (n *node) Call(ctx context.Context, typ uint8, parts ...[]byte) ([]byte, error) {
	p := bytes.Join(parts, nil)
	return n.g.call(ctx, n.i, 2, func() ([]byte, error) {
		a := n.g.arb.Load()
		if a == nil {
			return nil, &block.Error{Op: "test", Kind: block.KindUnavailable}
		}
		return direct{a, n.name}.Call(bg, typ, p)
	})
}

func (n *node) start() {
	l := &life{node: n, c: NewClient(n, "v", n.name), w: NewWitness(n.now()), ended: make(chan struct{}), freeze: make(chan struct{}, 1),
		patience: time.Duration(250+n.g.intn(1000)) * time.Millisecond} // silent from the start: an eager one
	l.c.SetClock(n.now)
	l.ctx, l.die = context.WithCancel(bg)
	n.life.Store(l)
	go func() {
		defer close(l.ended)
		l.run()
	}()
}

func (n *node) stop() {
	l := n.life.Load()
	l.die()
	<-l.ended
}

func (l *life) sleep(d time.Duration) {
	select {
	case <-time.After(d):
	case <-l.ctx.Done():
	}
}

func (l *life) run() {
	l.c.ClaimWait(l.ctx)
	for l.ctx.Err() == nil {
		r, ok := l.c.Record()
		switch {
		case !ok:
			l.sleep(100 * time.Millisecond)
		case r.Primary == l.name:
			l.primary(r)
		default:
			l.secondary(r)
		}
	}
}

func (l *life) secondary(r Record) {
	l.mu.Lock()
	silent := time.Since(l.heard)
	l.taking = silent > l.patience && r.Member(l.name)
	taking := l.taking
	l.mu.Unlock()
	if !taking {
		if silent > l.patience {
			l.c.Get(l.ctx)
		}
		l.sleep(100 * time.Millisecond)
		return
	}
	_, err := l.c.Takeover(l.ctx, r.Epoch, false)
	if block.KindOf(err) == block.KindDenied {
		l.c.Settle(l.ctx)
	}
	l.mu.Lock()
	l.taking = false // hears the old primary again, whatever is still on its way
	l.mu.Unlock()
	l.sleep(150 * time.Millisecond)
}

func (l *life) primary(r Record) {
	l.g.mu.Lock()
	l.g.causes[r.Cause]++
	l.g.mu.Unlock()
	for r.Cause != CauseHandover && !l.w.Clear(l.now()) && l.ctx.Err() == nil {
		l.sleep(l.w.Left(l.now()))
	}
	ctx, cancel := context.WithCancel(l.ctx)
	var wg sync.WaitGroup
	defer func() {
		l.mu.Lock()
		l.serving, l.heard = 0, time.Now()
		l.mu.Unlock()
		cancel()
		wg.Wait()
	}()
	wg.Go(func() {
		l.c.Keep(ctx, r.Epoch)
		cancel()
	})
	l.mu.Lock()
	l.serving = r.Epoch
	l.mu.Unlock()
	heard := time.Now().Add(-500 * time.Millisecond) // neither there nor gone
	var hmu sync.Mutex
	for ctx.Err() == nil {
		now, _ := l.c.Record()
		if now.Epoch != r.Epoch {
			return
		}
		wg.Go(func() {
			sent := l.now()
			one, done := context.WithTimeout(ctx, 400*time.Millisecond)
			defer done()
			if l.ask(one, func(p *life) bool { return p.beat(now) }) {
				hmu.Lock()
				heard = time.Now()
				hmu.Unlock()
				if now.Member(l.peer().name) {
					l.c.Lease().Renewed(sent)
				}
			}
		})
		hmu.Lock()
		silent := time.Since(heard)
		hmu.Unlock()
		in := now.Member(l.peer().name)
		switch {
		case in && silent > time.Second:
			one, done := context.WithTimeout(ctx, time.Second)
			l.c.SetMembersWait(one, r.Epoch, l.name)
			done()
		case !in && silent < 300*time.Millisecond:
			l.join(ctx, r.Epoch)
		case in && l.g.intn(60) == 0 && !l.g.calm.Load():
			l.handover(ctx, r.Epoch)
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// ask asks the peer, whatever process of it is there when the question arrives.
func (l *life) ask(ctx context.Context, f func(*life) bool) bool {
	_, err := l.g.call(ctx, l.i, 1-l.i, func() ([]byte, error) {
		if p := l.peer().life.Load(); p.ctx.Err() == nil && f(p) {
			return nil, nil
		}
		return nil, errors.New("no")
	})
	return err == nil
}

func (l *life) beat(r Record) bool {
	l.c.Saw(r)
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.c.MayAnswer(r.Epoch) || l.taking {
		return false
	}
	l.heard = time.Now()
	l.w.Answered(l.now())
	return true
}

func (l *life) take(epoch uint64, ids ...int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.c.MayAnswer(epoch) {
		return false
	}
	for _, id := range ids {
		l.log[id] = true
	}
	return true
}

func (l *life) join(ctx context.Context, epoch uint64) {
	l.freeze <- struct{}{}
	defer func() { <-l.freeze }()
	l.mu.Lock()
	var all []int
	for id := range maps.Keys(l.log) {
		all = append(all, id)
	}
	l.mu.Unlock()
	if !l.ask(ctx, func(p *life) bool { return p.take(epoch, all...) }) {
		return
	}
	one, done := context.WithTimeout(ctx, 500*time.Millisecond)
	defer done()
	l.c.SetMembers(one, epoch, l.name, l.peer().name)
}

func (l *life) handover(ctx context.Context, epoch uint64) {
	l.freeze <- struct{}{}
	defer func() { <-l.freeze }()
	one, done := context.WithTimeout(ctx, time.Second)
	defer done()
	if _, err := l.c.Handover(one, epoch, l.peer().name, false); err != nil && !Decided(err) {
		l.c.Settle(ctx)
	}
}

// write returns when the number is acknowledged or its fate unknown.
func (l *life) write() {
	l.freeze <- struct{}{}
	defer func() { <-l.freeze }()
	l.mu.Lock()
	epoch := l.serving
	l.mu.Unlock()
	if epoch == 0 {
		return
	}
	l.g.mu.Lock()
	id := l.g.next
	l.g.next++
	l.g.mu.Unlock()
	l.mu.Lock()
	l.log[id] = true
	l.mu.Unlock()
	for begin := time.Now(); l.ctx.Err() == nil && time.Since(begin) < 2*time.Second; l.sleep(50 * time.Millisecond) {
		r, _ := l.c.Record()
		if r.Epoch != epoch {
			return
		}
		if r.Alone(l.name) && !l.c.Doubt() || l.ask(l.ctx, func(p *life) bool { return p.take(epoch, id) }) {
			l.g.mu.Lock()
			l.g.acked = append(l.g.acked, id)
			l.g.mu.Unlock()
			return
		}
	}
}

// read shows the set if it may, perhaps after a long breath.
func (l *life) read() {
	l.g.mu.Lock()
	must := len(l.g.acked)
	l.g.mu.Unlock()
	l.mu.Lock()
	serving := l.serving
	l.mu.Unlock()
	if serving == 0 || !l.c.MayRead(l.now()) {
		return
	}
	if l.g.intn(20) == 0 {
		l.sleep(time.Duration(l.g.intn(3000)) * time.Millisecond)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.g.mu.Lock()
	defer l.g.mu.Unlock()
	l.g.reads++
	for _, id := range l.g.acked[:must] {
		if !l.log[id] {
			r, _ := l.c.Record()
			l.g.t.Errorf("%v: %s answers a read in epoch %d (knows %v) without %d, which was acknowledged before", time.Since(t0), l.name, serving, r, id)
			return
		}
	}
}

func runPair(t *testing.T, seed uint64, long time.Duration) (acked, reads int, causes map[Cause]int) {
	synctest.Test(t, func(t *testing.T) {
		t0 = time.Now()
		g := &rig{t: t, rnd: rand.New(rand.NewPCG(seed, 11)), causes: map[Cause]int{}}
		skew := func() float64 { return 0.9 + float64(g.intn(200))/1000 }
		fs := disktest.New(seed)
		rate := skew()
		open := func() {
			a, err := Open(Options{FS: fs, Dir: "/fence", Now: func() time.Time { return t0.Add(time.Duration(float64(time.Since(t0)) * rate)) }})
			if err != nil {
				t.Fatal(err)
			}
			g.arb.Store(a)
		}
		open()
		for i := range g.nodes {
			g.nodes[i] = &node{g: g, i: i, name: string(rune('a' + i)), rate: skew(), log: map[int]bool{}}
		}
		for _, n := range g.nodes {
			n.start()
		}
		stop := make(chan struct{})
		var work sync.WaitGroup
		for _, n := range g.nodes {
			for range 2 {
				work.Go(func() {
					for {
						select {
						case <-stop:
							return
						case <-time.After(time.Duration(10+g.intn(60)) * time.Millisecond):
						}
						n.life.Load().write()
					}
				})
				work.Go(func() {
					for {
						select {
						case <-stop:
							return
						case <-time.After(time.Duration(10+g.intn(30)) * time.Millisecond):
						}
						n.life.Load().read()
					}
				})
			}
		}
		heal := func() {
			for i := range g.cut {
				for k := range g.cut[i] {
					g.cut[i][k].Store(false)
				}
			}
		}
		for begin := time.Now(); time.Since(begin) < long; time.Sleep(time.Duration(100+g.intn(1500)) * time.Millisecond) {
			switch g.intn(10) {
			case 0, 1:
				heal()
			case 2, 3:
				g.cut[g.intn(3)][g.intn(3)].Store(true)
			case 4: // one side from all others
				i := g.intn(3)
				for k := range 3 {
					g.cut[i][k].Store(true)
					g.cut[k][i].Store(true)
				}
			case 5:
				n := g.nodes[g.intn(2)]
				n.stop()
				time.Sleep(time.Duration(g.intn(10)*g.intn(150)) * time.Millisecond)
				n.start()
			case 6, 7:
				// The primary lives on its peer's word alone, and loses that.
				p := 0
				if r, _ := g.arb.Load().Record("v"); r.Primary == "b" {
					p = 1
				}
				heal()
				time.Sleep(2 * time.Second)
				g.cut[p][2].Store(true)
				time.Sleep(2 * time.Second)
				if g.intn(2) == 0 {
					g.nodes[1-p].stop()
					g.nodes[1-p].start()
				}
				g.cut[p][1-p].Store(true)
				g.cut[1-p][p].Store(true)
				time.Sleep(time.Second)
			case 8:
				// Or on the arbiter's, and that one forgets it.
				heal()
				time.Sleep(2 * time.Second)
				g.cut[0][1].Store(true)
				g.cut[1][0].Store(true)
				time.Sleep(time.Duration(500+g.intn(1000)) * time.Millisecond)
				g.arb.Swap(nil).Close()
				open()
				time.Sleep(time.Second)
			case 9:
				g.arb.Swap(nil).Close()
				fs = fs.Crash()
				time.Sleep(time.Duration(g.intn(10)*g.intn(80)) * time.Millisecond)
				open()
			}
		}
		heal()
		g.calm.Store(true)
		time.Sleep(15 * time.Second)
		g.mu.Lock()
		before := len(g.acked)
		g.mu.Unlock()
		time.Sleep(10 * time.Second)
		g.mu.Lock()
		if len(g.acked) == before {
			t.Errorf("nothing is acknowledged though all is well; a knows %v, b knows %v", g.nodes[0].life.Load().c.rec, g.nodes[1].life.Load().c.rec)
		}
		g.mu.Unlock()
		close(stop)
		for _, n := range g.nodes {
			n.stop()
		}
		work.Wait()
		g.wg.Wait()
		g.arb.Load().Close()
		acked, reads, causes = len(g.acked), g.reads, g.causes
	})
	return
}

func TestPairNeverServesTwice(t *testing.T) {
	old := t0
	defer func() { t0 = old }()
	seeds := uint64(40)
	if testing.Short() {
		seeds = 8
	}
	all := map[Cause]int{}
	acked, reads := 0, 0
	for seed := range seeds {
		a, r, c := runPair(t, seed, 40*time.Second)
		acked, reads = acked+a, reads+r
		for k, n := range c {
			all[k] += n
		}
		if t.Failed() {
			t.Fatal("seed", seed)
		}
	}
	if acked == 0 || reads == 0 || all[CauseTakeover] == 0 || all[CauseHandover] == 0 {
		t.Error("too little happened")
	}
	t.Logf("%d writes acknowledged, %d reads answered, primaries by %v", acked, reads, all)
}
