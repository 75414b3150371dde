package wan

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// connect makes one connection and returns both ends.
func connect(t *testing.T, w *WAN) (near, far net.Conn) {
	t.Helper()
	l, err := w.Listen("far:1")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan net.Conn, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			t.Error(err)
		}
		got <- c
	}()
	near, err = w.Dial("far:1")
	if err != nil {
		t.Fatal(err)
	}
	return near, <-got
}

func within(t *testing.T, what string, got, want, slack time.Duration) {
	t.Helper()
	if got < want || got > want+slack {
		t.Errorf("%s took %v, want %v to %v", what, got, want, want+slack)
	}
}

func TestDelayAndRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(Link{Delay: 20 * time.Millisecond, Rate: 12_500_000})
		start := time.Now()
		a, b := connect(t, w)
		within(t, "dial", time.Since(start), 40*time.Millisecond, time.Millisecond)

		start = time.Now()
		go a.Write([]byte("ping"))
		buf := make([]byte, 10)
		n, err := b.Read(buf)
		if err != nil || string(buf[:n]) != "ping" {
			t.Fatalf("%q %v", buf[:n], err)
		}
		within(t, "one way", time.Since(start), 20*time.Millisecond, time.Millisecond)

		const size = 125_000_000 / 4
		start = time.Now()
		go func() {
			p := make([]byte, 1<<20)
			for left := size; left > 0; left -= len(p) {
				p = p[:min(len(p), left)]
				if _, err := a.Write(p); err != nil {
					t.Error(err)
				}
			}
			a.Close()
		}()
		m, err := io.Copy(io.Discard, b)
		if err != nil || m != size {
			t.Fatal(m, err)
		}
		within(t, "2.5 s of line", time.Since(start), 2500*time.Millisecond, 60*time.Millisecond)
		b.Close()
		if s := w.Stats(); s.Conns != 0 || s.Forward.Bytes < size {
			t.Errorf("%+v", s)
		}
	})
}

// TestQueueDelaysDemand shows what the model is for: a byte behind a bulk
// transfer waits for the queue.
func TestQueueDelaysDemand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(Link{Delay: 20 * time.Millisecond, Rate: 12_500_000, Queue: 1_250_000})
		bulk, bulkFar := connect(t, w)
		go io.Copy(io.Discard, bulkFar)
		stop := make(chan struct{})
		go func() {
			p := make([]byte, 1<<20)
			for {
				if _, err := bulk.Write(p); err != nil {
					close(stop)
					return
				}
			}
		}()
		a, b := connect(t, w)
		time.Sleep(time.Second)
		start := time.Now()
		go a.Write([]byte{1})
		b.Read(make([]byte, 1))
		within(t, "demand behind a full queue", time.Since(start), 119*time.Millisecond, 3*time.Millisecond)
		if q := w.Stats().Forward.Queued; q < 1_200_000 || q > 1_250_000 {
			t.Errorf("queued %d", q)
		}
		w.Cut()
		<-stop
	})
}

// TestShare: two connections of one direction get half each.
func TestShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(Link{Delay: time.Millisecond, Rate: 1_000_000})
		var got [2]int64
		var wg sync.WaitGroup
		for i := range got {
			a, b := connect(t, w)
			wg.Go(func() {
				for p := make([]byte, 100_000); ; {
					if _, err := a.Write(p); err != nil {
						return
					}
				}
			})
			wg.Go(func() { got[i], _ = io.Copy(io.Discard, b) })
		}
		time.Sleep(10 * time.Second)
		w.Cut()
		wg.Wait()
		for _, n := range got {
			if n < 4_700_000 || n > 5_300_000 {
				t.Errorf("shares %v", got)
			}
		}
	})
}

func TestWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(Link{Delay: 100 * time.Millisecond, Rate: 125_000_000, Window: 1 << 20})
		a, b := connect(t, w)
		go func() {
			a.Write(make([]byte, 10<<20))
			a.Close()
		}()
		start := time.Now()
		io.Copy(io.Discard, b)
		// One window per round trip: nine and a half of them.
		if d := time.Since(start); d < 1800*time.Millisecond || d > 2200*time.Millisecond {
			t.Errorf("10 windows over 200 ms took %v", d)
		}
	})
}

func TestStallAndPartition(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(Link{Delay: 20 * time.Millisecond})
		a, b := connect(t, w)
		go a.Write([]byte("x"))
		time.Sleep(10 * time.Millisecond)
		w.Stall(time.Minute)
		start := time.Now()
		b.Read(make([]byte, 1))
		within(t, "a byte half way when the line stalled", time.Since(start), time.Minute+10*time.Millisecond, 0)

		w.Partition(Forward, true)
		b.Write([]byte("y")) // the other way is open
		a.Read(make([]byte, 1))
		b.SetReadDeadline(time.Now().Add(time.Second))
		a.Write([]byte("z"))
		if _, err := b.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read across a partition: %v", err)
		}
		b.SetReadDeadline(time.Time{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := w.DialContext(ctx, "", "far:1"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("dial across a partition: %v", err)
		}
		w.Partition(Forward, false)
		if n, err := b.Read(make([]byte, 9)); n != 1 || err != nil {
			t.Error(n, err)
		}
	})
}

func TestWriteDeadlineWhileQueueIsFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(Link{Rate: 1000, Queue: 4000})
		a, b := connect(t, w)
		c, d := connect(t, w)
		go c.Write(make([]byte, 20_000))
		time.Sleep(time.Millisecond)
		a.SetWriteDeadline(time.Now().Add(time.Second))
		if _, err := a.Write(make([]byte, 9000)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(err)
		}
		go b.Close()
		n, err := io.ReadFull(d, make([]byte, 20_000))
		if err != nil {
			t.Errorf("the other connection stands after %d bytes: %v", n, err)
		}
	})
}

func TestCloseAndCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(Link{Delay: 10 * time.Millisecond})
		a, b := connect(t, w)
		a.Write([]byte("bye"))
		a.(interface{ CloseWrite() error }).CloseWrite()
		if p, err := io.ReadAll(b); string(p) != "bye" || err != nil {
			t.Errorf("%q %v", p, err)
		}
		if _, err := a.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
			t.Error(err)
		}
		b.Close()
		time.Sleep(time.Second)
		if _, err := a.Read(make([]byte, 1)); err != io.EOF {
			t.Error(err)
		}

		a, b = connect(t, w)
		b.Close()
		var err error
		for i := 0; err == nil && i < 100; i++ {
			_, err = a.Write(make([]byte, 1<<20))
		}
		if !errors.Is(err, syscall.EPIPE) {
			t.Errorf("writing to a closed end: %v", err)
		}

		a, b = connect(t, w)
		errs := make(chan error, 2)
		for _, c := range []net.Conn{a, b} {
			go func() {
				_, err := c.Read(make([]byte, 1))
				errs <- err
			}()
		}
		time.Sleep(time.Second)
		w.Cut()
		for range 2 {
			if err := <-errs; !errors.Is(err, syscall.ECONNRESET) {
				t.Error(err)
			}
		}
		if _, err := w.Dial("nobody"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Error(err)
		}
		a, b = connect(t, w)
		go func() {
			time.Sleep(time.Second)
			a.Close()
		}()
		if _, err := a.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		b.Close()
		w.Close()
	})
}

// TestLossKeepsTheStream sends random pieces both ways over a bad line whose
// behaviour changes all the time and compares what arrives.
func TestLossKeepsTheStream(t *testing.T) {
	for seed := range uint64(10) {
		synctest.Test(t, func(t *testing.T) {
			t.Logf("seed %d", seed)
			rng := rand.New(rand.NewPCG(seed, 1))
			link := Link{Delay: 5 * time.Millisecond, Rate: 1_000_000, Loss: 0.05, Jitter: 30 * time.Millisecond, Queue: 10_000, Seed: seed}
			w := New(link)
			a, b := connect(t, w)
			var wg sync.WaitGroup
			for i, ends := range [][2]net.Conn{{a, b}, {b, a}} {
				data := make([]byte, 300_000+rng.IntN(100_000))
				src := rand.NewPCG(seed, uint64(i))
				for i := 0; i+8 <= len(data); i += 8 {
					binary.LittleEndian.PutUint64(data[i:], src.Uint64())
				}
				cuts := rand.New(rand.NewPCG(seed, uint64(i)+2))
				wg.Go(func() {
					for p := data; len(p) > 0; {
						k := min(len(p), 1+cuts.IntN(20_000))
						if _, err := ends[0].Write(p[:k]); err != nil {
							t.Error(err)
							return
						}
						p = p[k:]
					}
				})
				wg.Go(func() {
					got := make([]byte, len(data))
					if _, err := io.ReadFull(ends[1], got); err != nil {
						t.Error(err)
					}
					if !bytes.Equal(got, data) {
						t.Errorf("sent %x, got %x", sha256.Sum256(data), sha256.Sum256(got))
					}
				})
			}
			for range 20 {
				time.Sleep(time.Duration(rng.IntN(100)) * time.Millisecond)
				switch rng.IntN(3) {
				case 0:
					w.Stall(time.Duration(rng.IntN(300)) * time.Millisecond)
				case 1:
					way := Way(1 + rng.IntN(3))
					w.Partition(way, true)
					time.Sleep(time.Duration(rng.IntN(300)) * time.Millisecond)
					w.Partition(way, false)
				case 2:
					l := link
					l.Rate = int64(500_000 + rng.IntN(5_000_000))
					w.Set(Both, l)
				}
			}
			wg.Wait()
			if s := w.Stats(); s.Forward.Lost == 0 {
				t.Errorf("nothing was lost: %+v", s)
			}
			a.Close()
			b.Close()
		})
	}
}

func BenchmarkThroughput(b *testing.B) {
	w := New(Link{})
	l, _ := w.Listen("x")
	go func() {
		c, _ := l.Accept()
		io.Copy(io.Discard, c)
	}()
	c, err := w.Dial("x")
	if err != nil {
		b.Fatal(err)
	}
	p := make([]byte, 64<<10)
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		c.Write(p)
	}
	w.Close()
}
