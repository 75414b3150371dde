package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"forerun/block"
	"forerun/data/replica"
)

// Geometry of the volumes: small, so that writes meet.
const (
	volumeSize = 96 << 10
	maxWrite   = 24 // sectors
)

// cluster is what a run drives: two nodes that serve volumes, and the old home.
type cluster interface {
	// device is what clients of a node get for a volume, nil while it is down.
	device(node, vol int) block.Device
	// answer runs f if the node has not gone down since device gave dev. No
	// node goes down meanwhile.
	answer(node, vol int, dev block.Device, f func()) bool
	// serving says in which epoch the node is primary, 0 when it is not. While
	// alone stays the same number above 0, what the node acknowledges is promised
	// to be durable.
	serving(node, vol int) (epoch, alone int64)
	// fault makes an event happen. It returns at once.
	fault(e Event)
	// heal ends all faults and waits until the nodes are in sync; it says what is
	// missing if that takes too long.
	heal() error
	// settle has everything written back and gives the content of the sources.
	settle() ([][]byte, error)
	// disaster ends both nodes for good and gives the sources as the backend
	// leaves them, with the moments of the cut that it states.
	disaster() (images [][]byte, after, before int64, err error)
	// survive cuts the power of both nodes, brings one back that was in sync
	// and has an operator make it primary of everything: the other is gone for good. It
	// answers -1 when no node was in sync in all volumes.
	survive() (node int, err error)
	// close ends everything that runs.
	close()
}

// Result is what a run gives.
type Result struct {
	Schedule Schedule
	Err      error
	Log      *Log
	Stats    HistoryStats
	Faults   [faults]int
	Stall    time.Duration // longest time that a client waited
}

// run drives a cluster through a schedule, in the time of the bubble it is
// called in.
func run(s Schedule, make func(Schedule, *History, *Log) (cluster, error)) (res *Result) {
	log := &Log{}
	res = &Result{Schedule: s, Log: log}
	log.Add("begin")
	h := NewHistory(s.Volumes, volumeSize)
	c, err := make(s, h, log)
	if err != nil {
		res.Err = err
		return res
	}
	d := &driver{Schedule: s, h: h, log: log, c: c, move: [2]chan struct{}{newSignal(), newSignal()}}
	d.ctx, d.stop = context.WithCancel(context.Background())
	defer func() {
		d.stop()
		c.close()
		d.busy.Wait()
		d.all.Wait()
		res.Stats, res.Stall = h.Stats(), d.stall
		if res.Err == nil {
			res.Err = h.Err()
		}
	}()
	res.Err = d.drive(res)
	return res
}

func newSignal() chan struct{} { return make(chan struct{}) }

// driver is a run under way.
type driver struct {
	Schedule
	h   *History
	log *Log
	c   cluster

	ctx  context.Context
	stop context.CancelFunc
	all  sync.WaitGroup // attempts, also those given up
	busy sync.WaitGroup // clients

	mu    sync.Mutex
	move  [2]chan struct{} // closed: clients of the node go to the other one
	quiet bool             // no new requests
	stall time.Duration

	contents [][]byte // of the volumes, as read last
}

// settleTime is how long clients may still wait when all faults have ended.
const settleTime = 60 * time.Second

func (d *driver) drive(res *Result) error {
	begin := time.Now()
	for vol := range d.Volumes {
		for i := range d.Clients {
			d.busy.Add(1)
			go d.client(vol, rand.New(rand.NewPCG(d.Seed, uint64(vol*100+i))))
		}
	}
	sleep := func(until time.Duration) bool {
		for d.h.Err() == nil {
			left := until - time.Since(begin)
			if left <= 0 {
				return true
			}
			time.Sleep(min(left, 200*time.Millisecond))
		}
		return false
	}
	for _, e := range d.Events {
		if !sleep(e.At) {
			return d.h.Err()
		}
		d.log.Add("FAULT %s", e)
		res.Faults[e.Fault]++
		if e.Fault == Move {
			d.moveFrom(e.On)
			continue
		}
		d.c.fault(e)
	}
	if !sleep(d.Length) {
		return d.h.Err()
	}
	if d.Disaster {
		return d.disaster()
	}
	if d.Survive {
		d.log.Add("only one survives")
		node, err := d.c.survive()
		if err != nil || node < 0 {
			return errors.Join(d.h.Err(), err)
		}
		return d.read(node)
	}
	d.log.Add("heal")
	if err := d.c.heal(); err != nil {
		return errors.Join(d.h.Err(), err)
	}
	d.mu.Lock()
	d.quiet = true
	d.mu.Unlock()
	if err := d.drain(); err != nil {
		return errors.Join(d.h.Err(), err)
	}
	d.log.Add("settle")
	if err := d.read(0, 1); err != nil {
		return err
	}
	for node := range 2 { // each must have all, also without the other
		d.log.Add("%s goes", machineNames[node])
		d.c.fault(Event{Fault: Kill, On: node, For: 4 * time.Second})
		if err := d.read(1 - node); err != nil {
			return err
		}
		if err := d.c.heal(); err != nil {
			return errors.Join(d.h.Err(), err)
		}
	}
	if err := d.read(0, 1); err != nil {
		return err
	}
	images, err := d.c.settle()
	if err != nil {
		return err
	}
	for vol := range images {
		for at := 0; at < volumeSize; at += Sector {
			a, b := images[vol][at:at+Sector], d.contents[vol][at:at+Sector]
			if string(a) != string(b) {
				return fmt.Errorf("volume %d sector %d: the source holds %s, the volume %s, when everything was written back", vol, at/Sector, describe(a, vol, at), describe(b, vol, at))
			}
		}
	}
	return d.h.Image(images, 0, never)
}

func describe(p []byte, vol, at int) string {
	id, zero, err := unstamp(p, vol, int64(at/Sector))
	switch {
	case err != nil:
		return err.Error()
	case zero:
		return "zeros"
	}
	return fmt.Sprintf("write %d", id)
}

// drain waits until every client has its answer.
func (d *driver) drain() error {
	done := make(chan struct{})
	go func() {
		d.busy.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-time.After(settleTime):
		return fmt.Errorf("a client still waits %v after all faults have ended", settleTime)
	}
}

// read reads everything through each of the nodes.
func (d *driver) read(nodes ...int) error {
	d.contents = make([][]byte, d.Volumes)
	for vol := range d.contents {
		for _, node := range nodes {
			d.contents[vol] = make([]byte, volumeSize)
			if err := d.final(node, vol, d.contents[vol]); err != nil {
				return err
			}
		}
	}
	return d.h.Err()
}

// final reads a whole volume through one node.
func (d *driver) final(node, vol int, p []byte) error {
	ctx, cancel := context.WithTimeout(d.ctx, settleTime)
	defer cancel()
	begin := d.h.Now()
	dev := d.c.device(node, vol)
	if dev == nil {
		return fmt.Errorf("node %s is down after all faults have ended", machineNames[node])
	}
	if err := dev.ReadAt(ctx, p, 0, 0); err != nil {
		return fmt.Errorf("reading volume %d at node %s after all faults have ended: %w", vol, machineNames[node], err)
	}
	d.h.EndRead(vol, 0, p, begin)
	return nil
}

func (d *driver) disaster() error {
	d.log.Add("disaster")
	images, after, before, err := d.c.disaster()
	if err != nil {
		return err
	}
	if err := d.h.Err(); err != nil {
		return err
	}
	return d.h.Image(images, after, before)
}

func (d *driver) moveFrom(node int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.move[node])
	d.move[node] = newSignal()
}

func (d *driver) moved(node int) chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.move[node]
}

func (d *driver) ended() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.quiet || d.ctx.Err() != nil
}

// client sends one request after the other and repeats each until it is
// answered, at one node or the other.
func (d *driver) client(vol int, r *rand.Rand) {
	defer d.busy.Done()
	node := r.IntN(2)
	area := int64(volumeSize / Sector)
	tries := 0
	for !d.ended() {
		if tries++; r.IntN(4) > 0 || tries%4 == 0 {
			d.pause(1 + time.Duration(r.Int64N(int64(d.Pause))))
		}
		n := 1 + r.Int64N(8)
		if r.IntN(10) == 0 {
			n = 1 + r.Int64N(maxWrite)
		}
		from := r.Int64N(area - n)
		if r.IntN(2) == 0 { // half of all go to a few sectors
			from = r.Int64N(16)
		}
		off, size := from*Sector, n*Sector
		switch k := r.IntN(20); {
		case k < 10:
			var f block.Flags
			if r.IntN(6) == 0 {
				f = block.FUA
			}
			p := make([]byte, size)
			w := d.h.BeginWrite(vol, off, size, p, f != 0, d.Apart)
			if w == nil {
				continue
			}
			d.until(&node, vol, r, func(ctx context.Context, dev block.Device) (func(int64), error) {
				return nil, dev.WriteAt(ctx, p, off, f)
			}, func(synced bool) { d.h.EndWrite(w, synced) })
		case k == 10:
			w := d.h.BeginWrite(vol, off, size, nil, false, d.Apart)
			if w == nil {
				continue
			}
			trim := r.IntN(2) == 0
			d.until(&node, vol, r, func(ctx context.Context, dev block.Device) (func(int64), error) {
				if trim {
					return nil, dev.Trim(ctx, off, size, 0)
				}
				return nil, dev.Zero(ctx, off, size, block.MayTrim)
			}, func(synced bool) { d.h.EndWrite(w, synced) })
		case k < 13:
			d.until(&node, vol, r, func(ctx context.Context, dev block.Device) (func(int64), error) {
				return func(begin int64) { d.h.EndFlush(vol, begin) }, dev.Flush(ctx, 0)
			}, nil)
		default:
			d.until(&node, vol, r, func(ctx context.Context, dev block.Device) (func(int64), error) {
				p := make([]byte, size) // of its own: a try given up may still write to it
				err := dev.ReadAt(ctx, p, off, 0)
				return func(begin int64) { d.h.EndRead(vol, off, p, begin) }, err
			}, nil)
		}
	}
}

func (d *driver) pause(t time.Duration) {
	timer := time.NewTimer(t)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-d.ctx.Done():
	}
}

// until tries a request until it is answered: try does it and says what to
// note about an answer, given the moment when the try began; done notes what
// is the same for all tries.
func (d *driver) until(node *int, vol int, r *rand.Rand, try func(context.Context, block.Device) (func(int64), error), done func(synced bool)) {
	asked := time.Now()
	patience := 3*time.Second + time.Duration(r.Int64N(int64(4*time.Second)))
	for d.ctx.Err() == nil {
		dev := d.c.device(*node, vol)
		if dev == nil {
			d.pause(20 * time.Millisecond)
			*node = 1 - *node
			continue
		}
		t := &attempt{}
		moved := d.moved(*node)
		ctx, cancel := context.WithCancel(d.ctx)
		got := make(chan error, 1)
		at, begin := *node, d.h.Now()
		_, alone := d.c.serving(at, vol)
		d.all.Go(func() {
			note, err := try(ctx, dev)
			up := d.c.answer(at, vol, dev, func() {
				if err != nil || !t.settle() {
					return // nobody hears it any more
				}
				epoch, still := d.c.serving(at, vol)
				if epoch > 0 {
					d.h.Served(vol, machineNames[at], epoch, begin)
				}
				if note != nil {
					note(begin)
				}
				if done != nil {
					done(alone > 0 && still == alone)
				}
			})
			if err != nil && up && ctx.Err() == nil {
				d.h.Fail("volume %d: node %s answered a client with an error (%v): %v", vol, machineNames[at], block.KindOf(err), err)
			}
			got <- err
		})
		timer := time.NewTimer(patience)
		select {
		case <-got:
		case <-timer.C:
		case <-moved:
		case <-d.ctx.Done():
		}
		timer.Stop()
		cancel()
		if !t.settle() {
			d.mu.Lock()
			d.stall = max(d.stall, time.Since(asked))
			d.mu.Unlock()
			return
		}
		*node = 1 - *node
		d.pause(moveAfter)
	}
}

// moveAfter is how long a client waits before it repeats at one node what it
// sent to the other: what that one had forwarded is too old by then to be done.
const moveAfter = replica.Stale + 100*time.Millisecond

// attempt is one try of a request. It is answered or given up, whichever
// comes first.
type attempt struct{ settled atomic.Bool }

func (t *attempt) settle() bool { return t.settled.CompareAndSwap(false, true) }
