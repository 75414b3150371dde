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

// fifo is packets in the order in which they leave.
type fifo struct {
	ring        []packet
	head, count int
}

func (q *fifo) push(p packet) {
	if q.count == len(q.ring) {
		bigger := make([]packet, max(2*len(q.ring), 1024))
		k := copy(bigger, q.ring[q.head:])
		copy(bigger[k:], q.ring[:q.head])
		q.ring, q.head = bigger, 0
	}
	q.ring[(q.head+q.count)%len(q.ring)] = p
	q.count++
}

func (q *fifo) at(i int) *packet { return &q.ring[(q.head+i)%len(q.ring)] }

func (q *fifo) pop() {
	q.ring[q.head].p = nil
	q.head = (q.head + 1) % len(q.ring)
	q.count--
}

// putOff lets all that have not left at t leave later by d.
func (q *fifo) putOff(t, d int64) {
	for i := q.count - 1; i >= 0 && q.at(i).at > t; i-- {
		q.at(i).at += d
	}
}

// relay is one direction of the line.
type relay struct {
	from, to int // file descriptors of the two devices, not blocking
	header   int // bytes before the packet that do not travel (virtio-net header)
	size     int // largest packet with its header

	mu          sync.Mutex
	link        Link
	rng         *rand.Rand
	free        int64    // when the bottleneck has sent all it was given
	freeFirst   int64    // the same of what goes first
	first, rest fifo     // what goes first, see Link.First, and what does not
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
		rng: rand.New(rand.NewPCG(c.Seed, 0x6e65746e73))}
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

// backlog is how many bytes the bottleneck still has to send until free.
func (r *relay) backlog(free, t int64) int64 {
	if r.link.Rate == 0 || free <= t {
		return 0
	}
	return int64(float64(free-t) / 1e9 * float64(r.link.Rate))
}

// dscp is the code point of an IP packet (RFC 2474), 0 of what is none.
func dscp(p []byte) int {
	if len(p) < 20 || p[0]>>4 != 4 {
		return 0
	}
	return int(p[1] >> 2)
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
	case r.first.count+r.rest.count == maxPackets:
		r.stats.Dropped++
		return buf
	}
	first := r.link.First > 0 && dscp(buf[r.header:n]) == r.link.First
	if rate := r.link.Rate; rate > 0 {
		free := &r.free
		if first {
			free = &r.freeFirst
		}
		if back := r.backlog(*free, t); back > 0 && back+wire > r.link.queue() {
			r.stats.Dropped++
			return buf
		}
		d := int64(float64(wire) / float64(rate) * 1e9)
		*free = max(*free, t) + d
		if first {
			r.rest.putOff(t, d)
			r.free = max(r.free, t) + d
		}
	} else {
		r.free, r.freeFirst = t, t
	}
	r.stats.Packets++
	r.stats.Bytes += wire
	if first {
		r.first.push(packet{r.freeFirst, buf[:n]})
	} else {
		r.rest.push(packet{r.free, buf[:n]})
	}
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
	for _, q := range [2]*fifo{&r.first, &r.rest} {
		for q.count > 0 {
			p := q.at(0)
			if p.at+delay > t {
				if at := p.at + delay + r.behind; next == 0 || at < next {
					next = at
				}
				break
			}
			// An error here is a packet lost, as on any line.
			unix.Write(r.to, p.p)
			if len(r.spare) < 4096 {
				r.spare = append(r.spare, p.p)
			}
			q.pop()
		}
	}
	return next
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
		back, first := r.backlog(r.free, t), r.backlog(r.freeFirst, t)
		r.link = l
		if l.Rate > 0 {
			r.free = t + int64(float64(back)/float64(l.Rate)*1e9)
			r.freeFirst = t + int64(float64(first)/float64(l.Rate)*1e9)
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
