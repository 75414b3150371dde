package netns

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	addrSource = "10.71.0.1"
	addrTarget = "10.71.0.2"
)

// Link says how one direction of the line behaves.
type Link struct {
	// Delay is the time a packet travels, one way.
	Delay time.Duration
	// Rate is the bottleneck in bytes of IP packets per second, 0 for none.
	Rate int64
	// Loss is the share of packets that vanish, 0 to below 1.
	Loss float64
	// Queue is how much the bottleneck holds, as time at Rate; 0 is 100 ms.
	Queue time.Duration
	// First is the DSCP (RFC 2474) of packets that overtake all others at the
	// bottleneck, in a queue of the same size of their own; 0: none do.
	First int
}

func (l Link) queue() int64 {
	q := l.Queue
	if q == 0 {
		q = 100 * time.Millisecond
	}
	return max(3000, int64(q.Seconds()*float64(l.Rate)))
}

// Config is what Open needs. The zero value is a line without any limits.
type Config struct {
	// Link is both directions'.
	Link
	// MTU of the line, 0 is 1500.
	MTU int
	// Offload lets the kernel hand over up to 64 KiB at once, as a network
	// card with segmentation offload takes it. It costs a fraction of the
	// CPU, and the bottleneck then works in pieces of that size.
	Offload bool
	// Congestion selects the TCP congestion control of both sites, empty is the host's.
	Congestion string
	// Tick is how long packets are put off on each side of the relay to do
	// several at once; 0 is 500 microseconds.
	Tick time.Duration
	// Seed makes Loss repeatable.
	Seed uint64
}

// Line is two sites and what joins them. Its methods may be called from any goroutine.
type Line struct {
	// Source and Target are the two sites.
	Source, Target Site

	lanes  [2]*relay // 0 to the target, 1 to the source
	tuns   []int
	bell   int // eventfd: the loop is to end
	wg     sync.WaitGroup
	mu     sync.Mutex
	closed bool
	timers map[*time.Timer]struct{}
}

var serial atomic.Int64

// Open makes two namespaces and joins them. Close removes them.
func Open(c Config) (l *Line, err error) {
	if c.MTU == 0 {
		c.MTU = 1500
	}
	if c.Tick == 0 {
		c.Tick = 500 * time.Microsecond
	}
	if err := Clean(); err != nil {
		return nil, fmt.Errorf("remove namespaces of earlier runs: %w", err)
	}
	id := fmt.Sprintf("%s%d-%d-", prefix, os.Getpid(), serial.Add(1))
	l = &Line{
		Source: Site{Name: id + "source", Addr: addrSource},
		Target: Site{Name: id + "target", Addr: addrTarget},
		timers: map[*time.Timer]struct{}{},
		bell:   -1,
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
			l = nil
		}
	}()
	for _, s := range []Site{l.Source, l.Target} {
		if err := ip("netns", "add", s.Name); err != nil {
			return l, err
		}
		tun, err := s.openTUN(c.MTU, c.Offload)
		if err != nil {
			return l, err
		}
		l.tuns = append(l.tuns, tun)
		if c.Congestion != "" {
			if err := s.congestion(c.Congestion); err != nil {
				return l, fmt.Errorf("congestion control %s: %w", c.Congestion, err)
			}
		}
	}
	l.lanes[0] = newRelay(l.tuns[0], l.tuns[1], c)
	c.Seed++
	l.lanes[1] = newRelay(l.tuns[1], l.tuns[0], c)
	if l.bell, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		return l, fmt.Errorf("eventfd: %w", err)
	}
	l.wg.Go(func() { l.run(c.Tick) })
	return l, nil
}

// run is the relay: it looks at both devices, takes and gives all there is,
// and sleeps. A wakeup costs far more than a packet, so after work it sleeps
// a whole tick; only when there was none it waits for the devices.
func (l *Line) run(tick time.Duration) {
	// Its own thread: the blocking calls would otherwise cost a handover of
	// the scheduler's processor each.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fds := []unix.PollFd{
		{Fd: int32(l.tuns[0]), Events: unix.POLLIN},
		{Fd: int32(l.tuns[1]), Events: unix.POLLIN},
		{Fd: int32(l.bell), Events: unix.POLLIN},
	}
	for fds[2].Revents == 0 {
		busy := false
		next := now() + int64(50*time.Millisecond) // a change of the link is seen by then
		for _, r := range l.lanes {
			busy = r.receive() || busy
			if t := r.deliver(); t > 0 {
				next = min(next, t)
			}
		}
		watch := fds
		if busy {
			watch = fds[2:]
		}
		ts := unix.NsecToTimespec(max(next-now(), int64(tick)))
		if busy {
			ts = unix.NsecToTimespec(int64(tick))
		}
		unix.Ppoll(watch, &ts, nil)
	}
}

// Set changes both directions from now on.
func (l *Line) Set(link Link) {
	for _, r := range l.lanes {
		r.set(link)
	}
}

// Link returns how the line behaves now.
func (l *Line) Link() Link {
	r := l.lanes[0]
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.link
}

// Stall holds all packets for d, in both directions. Those that do not fit in
// the queue meanwhile are dropped.
func (l *Line) Stall(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || d <= 0 {
		return
	}
	for _, r := range l.lanes {
		r.stall()
	}
	var t *time.Timer
	t = time.AfterFunc(d, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.timers, t)
		for _, r := range l.lanes {
			r.resume()
		}
	})
	l.timers[t] = struct{}{}
}

// Partition loses every packet, in both directions, until it is called with false.
func (l *Line) Partition(on bool) {
	for _, r := range l.lanes {
		r.change(func() { r.partitioned = on })
	}
}

// Close ends the relay and removes the namespaces. Programs that still run in
// them lose their network.
func (l *Line) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	for t := range l.timers {
		t.Stop()
	}
	l.mu.Unlock()
	var errs []error
	if l.bell >= 0 {
		unix.Write(l.bell, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		l.wg.Wait()
		errs = append(errs, unix.Close(l.bell))
	}
	for _, fd := range l.tuns {
		errs = append(errs, unix.Close(fd))
	}
	for _, s := range []Site{l.Source, l.Target} {
		if _, err := os.Stat(runDir + "/" + s.Name); err == nil {
			errs = append(errs, ip("netns", "delete", s.Name))
		}
	}
	return errors.Join(errs...)
}
