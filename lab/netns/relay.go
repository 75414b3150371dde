package netns

import (
	"math/rand/v2"
	"sync"

	"golang.org/x/sys/unix"
)

// now is the monotonic clock in nanoseconds, the one the line sleeps on.
func now() int64 {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return ts.Nano()
}

type packet struct {
	at int64 // leaves the bottleneck
	p  []byte
}

// relay is one direction of the line.
type relay struct {
	from, to int // file descriptors of the two devices, not blocking
	header   int // bytes before the packet that do not travel (virtio-net header)
	size     int // largest packet with its header

	mu          sync.Mutex
	link        Link
	rng         *rand.Rand
	free        int64 // when the bottleneck has sent all it was given
	ring        []packet
	head, count int
	buf         []byte   // the next packet is read into it
	spare       [][]byte // free buffers
	stalled     int      // reasons for the line's clock to stand still
	stalledAt   int64    // since when
	behind      int64    // how much the line's clock is behind the monotonic one
	partitioned bool
	stats       LaneStats
}

func newRelay(from, to int, c Config) *relay {
	r := &relay{from: from, to: to, size: c.MTU, link: c.Link,
		rng: rand.New(rand.NewPCG(c.Seed, 0x6e65746e73)), ring: make([]packet, 1024)}
	if c.Offload {
		r.header, r.size = 10, 10+64<<10
	}
	return r
}

// clock is line time: monotonic time without the stalls.
func (r *relay) clock() int64 {
	if r.stalled > 0 {
		return r.stalledAt - r.behind
	}
	return now() - r.behind
}

func (r *relay) backlog(t int64) int64 {
	if r.link.Rate == 0 || r.free <= t {
		return 0
	}
	return int64(float64(r.free-t) / 1e9 * float64(r.link.Rate))
}

// receive takes all packets the near device has and says whether there were any.
func (r *relay) receive() (any bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.buf == nil {
		r.buf = make([]byte, r.size)
	}
	for {
		n, err := unix.Read(r.from, r.buf)
		if err != nil {
			return any
		}
		any = true
		if n > r.header {
			r.buf = r.admit(r.buf, n)
		}
	}
}

// admit queues the packet in buf[:n] or drops it, and returns a buffer for the
// next one.
func (r *relay) admit(buf []byte, n int) []byte {
	wire := int64(n - r.header)
	t := r.clock()
	switch {
	case r.partitioned || r.link.Loss > 0 && r.rng.Float64() < r.link.Loss:
		r.stats.Lost++
		return buf
	case r.count == maxPackets:
		r.stats.Dropped++
		return buf
	}
	if rate := r.link.Rate; rate > 0 {
		if back := r.backlog(t); back > 0 && back+wire > r.link.queue() {
			r.stats.Dropped++
			return buf
		}
		r.free = max(r.free, t) + int64(float64(wire)/float64(rate)*1e9)
	} else {
		r.free = t
	}
	r.stats.Packets++
	r.stats.Bytes += wire
	if r.count == len(r.ring) {
		bigger := make([]packet, 2*len(r.ring))
		k := copy(bigger, r.ring[r.head:])
		copy(bigger[k:], r.ring[:r.head])
		r.ring, r.head = bigger, 0
	}
	r.ring[(r.head+r.count)%len(r.ring)] = packet{r.free, buf[:n]}
	r.count++
	if k := len(r.spare); k > 0 {
		buf = r.spare[k-1]
		r.spare = r.spare[:k-1]
		return buf[:r.size]
	}
	return make([]byte, r.size)
}

// maxPackets bounds what is on its way: 25 MB of full packets at 1 Gbit/s and
// 200 ms are 17,000.
const maxPackets = 1 << 16

// deliver writes the packets whose time has come, and returns the monotonic
// time of the next one, 0 when there is none to wait for.
func (r *relay) deliver() (next int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stalled > 0 {
		return 0
	}
	t, delay := r.clock(), int64(r.link.Delay)
	for r.count > 0 {
		p := &r.ring[r.head]
		if p.at+delay > t {
			return p.at + delay + r.behind
		}
		// An error here is a packet lost, as on any line.
		unix.Write(r.to, p.p)
		if len(r.spare) < 4096 {
			r.spare = append(r.spare, p.p)
		}
		p.p = nil
		r.head = (r.head + 1) % len(r.ring)
		r.count--
	}
	return 0
}

func (r *relay) change(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
}

// set changes the link and carries what is queued over to the new rate.
func (r *relay) set(l Link) {
	r.change(func() {
		t := r.clock()
		back := r.backlog(t)
		r.link = l
		if l.Rate > 0 {
			r.free = t + int64(float64(back)/float64(l.Rate)*1e9)
		}
	})
}

func (r *relay) stall() {
	r.change(func() {
		if r.stalled == 0 {
			r.stalledAt = now()
		}
		r.stalled++
	})
}

func (r *relay) resume() {
	r.change(func() {
		if r.stalled--; r.stalled == 0 {
			r.behind += now() - r.stalledAt
		}
	})
}
