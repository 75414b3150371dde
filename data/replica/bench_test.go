package replica

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"sort"
	"sync"
	"testing"
	"time"

	"forerun/block"
	"forerun/block/blocktest"
	"forerun/data/fence"
	"forerun/data/journal"
	"forerun/disk"
	"forerun/internal/msg"
)

// TestSoloIsFree: without an arbiter a call costs no allocation; through a
// session it costs what its message does.
func TestSoloIsFree(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	v, err := Open(Config{Volume: "v", Local: blocktest.NewNull(1 << 20)})
	must(t, err)
	defer v.Close()
	ctx := context.Background()
	p := make([]byte, 4096)
	if n := testing.AllocsPerRun(100, func() {
		if v.WriteAt(ctx, p, 0, 0) != nil || v.ReadAt(ctx, p, 0, 0) != nil || v.Flush(ctx, 0) != nil {
			t.Fatal("refused")
		}
	}); n != 0 {
		t.Errorf("alone: %v allocations a call", n)
	}
}

type silent struct{}

func (silent) Call(context.Context, uint8, ...[]byte) ([]byte, error) { return nil, nil }

// TestShippingDoesNotAllocate: a replicated write brings nothing of its own.
func TestShippingDoesNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	v := stub(t)
	defer v.Close()
	defer v.cfg.Local.Close()
	v.cfg.Peer, v.cfg.Local = silent{}, blocktest.NewNull(1<<20)
	r := &reign{ctx: context.Background()}
	s := &session{token: 1, ctx: context.Background(), cancel: func() {}}
	v.now.Store(&standing{role: primary, reign: r, ship: s, inSync: true, open: true, settled: true, changed: make(chan struct{})})
	ctx := context.Background()
	p := make([]byte, 4096)
	if n := testing.AllocsPerRun(100, func() {
		if err := v.WriteAt(ctx, p, 0, 0); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations a write", n)
	}
}

func BenchmarkSolo(b *testing.B) {
	ctx := context.Background()
	p := make([]byte, 4096)
	null := blocktest.NewNull(1 << 30)
	v, err := Open(Config{Volume: "v", Local: null})
	must(b, err)
	defer v.Close()
	for _, c := range []struct {
		name string
		d    block.Device
	}{{"below", null}, {"solo", v}} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				c.d.WriteAt(ctx, p, 0, 0)
			}
		})
	}
}

// late is a connection that delivers what is written half a round trip later,
// in order, over the loopback.
type late struct {
	net.Conn
	delay time.Duration
	ch    chan parcel
	done  chan struct{}
	once  sync.Once
}

func (l *late) Close() error {
	l.once.Do(func() { close(l.done) })
	return l.Conn.Close()
}

type parcel struct {
	at time.Time
	p  []byte
}

func newLate(nc net.Conn, delay time.Duration) *late {
	l := &late{Conn: nc, delay: delay, ch: make(chan parcel, 4096), done: make(chan struct{})}
	go func() {
		for {
			var q parcel
			select {
			case q = <-l.ch:
			case <-l.done:
				return
			}
			// The runtime's timers are a millisecond off under load: sleep most of it, spin the rest.
			if d := time.Until(q.at) - 200*time.Microsecond; d > 0 {
				time.Sleep(d)
			}
			for time.Now().Before(q.at) {
			}
			if _, err := nc.Write(q.p); err != nil {
				return
			}
		}
	}()
	return l
}

func (l *late) Write(p []byte) (int, error) {
	select {
	case l.ch <- parcel{time.Now().Add(l.delay), append([]byte(nil), p...)}:
		return len(p), nil
	case <-l.done:
		return 0, net.ErrClosed
	}
}

// far makes a client of serve, a round trip away.
func far(b *testing.B, ctx context.Context, rtt time.Duration, serve func(ctx context.Context, typ uint8, p []byte) ([]byte, error)) *msg.Client {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(b, err)
	b.Cleanup(func() { ln.Close() })
	go func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			go msg.New(newLate(nc, rtt/2), msg.Options{Serve: serve}).Run(ctx)
		}
	}()
	c := msg.NewClient(msg.ClientOptions{Addr: ln.Addr().String(), Dial: func(context.Context) (net.Conn, error) {
		nc, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			return nil, err
		}
		return newLate(nc, rtt/2), nil
	}})
	var wg sync.WaitGroup
	wg.Go(func() { c.Run(ctx) })
	b.Cleanup(wg.Wait)
	must(b, c.WaitUp(ctx))
	return c
}

// BenchmarkReplicated measures a 4 KiB write to a pair a millisecond apart, and
// the floor: one round trip of the same bytes, answered after a local append,
// then a local append. Both nodes have a journal on the disk of the host.
func BenchmarkReplicated(b *testing.B) {
	const size, rtt = 256 << 20, time.Millisecond
	for _, depth := range []int{1, 32} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			arb := newCourt(b)
			var muxes [2]Mux
			var vols [2]*Volume
			var journals [2]*journal.Journal
			for i, name := range []string{"a", "b"} {
				j, err := journal.Open(disk.OS(), b.TempDir(), blocktest.NewNull(size), journal.Options{})
				must(b, err)
				to := &muxes[1-i]
				peer := far(b, ctx, rtt, func(ctx context.Context, typ uint8, p []byte) ([]byte, error) {
					return to.Serve(ctx, name, typ, p)
				})
				v, err := Open(Config{Volume: "v", Node: name, Local: j, Log: j, CleanStart: true,
					Fence: fence.NewClient(court{arb, name}, "v", name), Peer: peer})
				must(b, err)
				muxes[i].Add(v)
				defer v.Close()
				vols[i], journals[i] = v, j
				go v.Run(ctx)
				for v.Status().Role == "undecided" {
					time.Sleep(time.Millisecond)
				}
			}
			for vols[0].Status().Mode != "pair" {
				time.Sleep(10 * time.Millisecond)
			}
			echo := far(b, ctx, rtt, func(ctx context.Context, typ uint8, p []byte) ([]byte, error) {
				return nil, journals[1].WriteAt(ctx, p, 0, 0)
			})
			run := func(write func(p []byte, off int64) error) (p50 time.Duration) {
				var mu sync.Mutex
				var all []time.Duration
				var wg sync.WaitGroup
				each := max(b.N/depth, 20)
				for range depth {
					wg.Go(func() {
						p := make([]byte, 4096)
						mine := make([]time.Duration, 0, each)
						for range each {
							begin := time.Now()
							if err := write(p, rand.Int64N(size>>12)<<12); err != nil {
								b.Error(err)
								return
							}
							mine = append(mine, time.Since(begin))
						}
						mu.Lock()
						all = append(all, mine...)
						mu.Unlock()
					})
				}
				wg.Wait()
				sort.Slice(all, func(i, j int) bool { return all[i] < all[j] })
				return all[len(all)/2]
			}
			floor := run(func(p []byte, off int64) error {
				if _, err := echo.Call(ctx, 1, p); err != nil {
					return err
				}
				return journals[0].WriteAt(ctx, p, off, 0)
			})
			b.ResetTimer()
			pair := run(func(p []byte, off int64) error { return vols[0].WriteAt(ctx, p, off, 0) })
			b.StopTimer()
			b.ReportMetric(float64(floor.Microseconds()), "floor-µs")
			b.ReportMetric(float64(pair.Microseconds()), "p50-µs")
			b.ReportMetric(float64(pair)/float64(floor), "ratio")
		})
	}
}
