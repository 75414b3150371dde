package wire

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
	"forerun/lab/wan"
)

func TestReads(t *testing.T) {
	src := newSource(5<<20+17*512, 1, "disk-1")
	clear(src.data[1<<20 : 2<<20])
	copy(src.data[3<<20:], bytes.Repeat([]byte("compressible "), 40000))
	inWorld(t, line, src, func(w *world) {
		c, r := w.start()
		defer c.Close()
		if in := r.Info(); !in.ReadOnly || in.Size != int64(len(src.data)) || in.BlockSize != 512 || in.ID != "disk-1" || in.CanTrim || r.ChunkBytes() != 64*kib {
			t.Fatalf("%+v", in)
		}
		size := int64(len(src.data))
		for _, x := range [][2]int64{{0, 512}, {0, 64 * kib}, {64*kib - 512, 1024}, {size - 512, 512}, {size - 100*512, 100 * 512}, {0, size}, {1<<20 - 512, 1<<20 + 1024}} {
			if err := w.read(r, x[0], x[1]); err != nil {
				t.Fatalf("%d bytes at %d: %v", x[1], x[0], err)
			}
		}
		rng := rand.New(rand.NewPCG(7, 7))
		for range 50 {
			off := rng.Int64N(size/512) * 512
			if err := w.read(r, off, min(size-off, 512*(1+rng.Int64N(400)))); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.ReadAt(w.ctx, make([]byte, 512), size, 0); block.KindOf(err) != block.KindRange {
			t.Errorf("read beyond the end: %v", err)
		}
		for name, err := range map[string]error{
			"write": r.WriteAt(w.ctx, make([]byte, 512), 0, 0), "zero": r.Zero(w.ctx, 0, 512, 0), "trim": r.Trim(w.ctx, 0, 512, 0),
		} {
			if block.KindOf(err) != block.KindReadOnly {
				t.Errorf("%s: %v", name, err)
			}
		}
		if err := errors.Join(r.Flush(w.ctx, 0), r.Prefetch(w.ctx, 0, 512, 0)); err != nil {
			t.Error(err)
		}
		r.Close()
		if err := r.ReadAt(w.ctx, make([]byte, 512), 0, 0); block.KindOf(err) != block.KindClosed {
			t.Errorf("read after close: %v", err)
		}
		// A session that lives on can open it again.
		if err := w.read(w.open(c), 0, 512); err != nil {
			t.Error(err)
		}
		c.Close()
		if _, err := c.Open(w.ctx, "disk"); block.KindOf(err) != block.KindClosed {
			t.Errorf("open after close: %v", err)
		}
	})
}

func TestFetch(t *testing.T) {
	src := newSource(8<<20, 2, "")
	clear(src.data[:2<<20])
	copy(src.data[2<<20:4<<20], bytes.Repeat([]byte("some text that packs well; "), 1<<21/27))
	inWorld(t, line, src, func(w *world) {
		c, r := w.start()
		defer c.Close()
		for _, f := range []block.Flags{block.Demand, block.WriteBack, block.Background, block.Background | block.Soon, block.Demand | block.Soon} {
			s := w.sink()
			idx := upTo(0, 128)
			if err := r.Fetch(w.ctx, idx, f, s.deliver); err != nil {
				t.Fatal(err)
			}
			s.once(idx)
			if s.codec[chunk.Zeros] != 32 || s.codec[chunk.Raw] != 64 || s.codec[chunk.Zstd] != 32 {
				t.Errorf("%v: codecs %v", f, s.codec)
			}
		}
		for name, bad := range map[string]struct {
			idx  []int64
			f    block.Flags
			kind block.Kind
		}{
			"beyond":  {[]int64{1, 128}, 0, block.KindRange},
			"below":   {[]int64{-1}, 0, block.KindRange},
			"twice":   {[]int64{3, 4, 3}, 0, block.KindInvalid},
			"flags":   {[]int64{3}, block.FUA, block.KindInvalid},
			"class 3": {[]int64{3}, 3, block.KindInvalid},
		} {
			n := 0
			err := r.Fetch(w.ctx, bad.idx, bad.f, func(_ int64, _ chunk.Packed, err error) {
				if block.KindOf(err) != bad.kind {
					t.Errorf("%s delivered: %v", name, err)
				}
				n++
			})
			if block.KindOf(err) != bad.kind || n != len(bad.idx) {
				t.Errorf("%s: %v after %d deliveries", name, err, n)
			}
		}
		if len(r.wanted) != 0 {
			t.Errorf("%d entries left", len(r.wanted))
		}
		if st := w.server.Stats(); st.Queued != 0 || st.DemandReads+st.BackgroundReads != 0 || w.server.demandBusy != 0 {
			t.Errorf("server: %+v, demand %d", st, w.server.demandBusy)
		}
	})
}

func TestZerosAndTextCostLittle(t *testing.T) {
	const size = 16 << 20
	src := newSource(size, 3, "")
	clear(src.data)
	inWorld(t, line, src, func(w *world) {
		c, r := w.start()
		defer c.Close()
		cost := func() int64 {
			before := w.wan.Stats()
			s := w.sink()
			if err := r.Fetch(w.ctx, upTo(0, 256), block.Background, s.deliver); err != nil {
				t.Fatal(err)
			}
			after := w.wan.Stats()
			return after.Forward.Bytes + after.Backward.Bytes - before.Forward.Bytes - before.Backward.Bytes
		}
		if n := cost(); n > 16*kib {
			t.Errorf("16 MiB of zeros cost %d bytes", n)
		}
		copy(src.data, bytes.Repeat([]byte("2026-11-23 22:47:19 INFO worker started, nothing to do\n"), size/54))
		if n := cost(); n > size/20 {
			t.Errorf("16 MiB of text cost %d bytes", n)
		}
		src.data = newSource(size, 4, "").data
		if n := cost(); n > size+size/100 {
			t.Errorf("16 MiB of noise cost %d bytes", n)
		} else {
			t.Logf("noise: %.2f%% more than its bytes", 100*float64(n-size)/size)
		}
		if st := c.Stats(); st.BackgroundBytes < size || st.DemandBytes != 0 || st.ZeroChunks != 256 || st.ReceivedBytes < st.BackgroundBytes || !st.Up {
			t.Errorf("%+v", st)
		}
	})
}

// TestRateDoesNotDependOnDelay fills 8 MiB at several round trip times and a
// source latency.
func TestRateDoesNotDependOnDelay(t *testing.T) {
	const size = 8 << 20
	rate := int64(50e6 / 8)
	base := time.Duration(0)
	for _, tc := range []struct {
		name    string
		rtt     time.Duration
		latency time.Duration
		random  bool
	}{{"0 ms", 0, 0, false}, {"50 ms", 50 * time.Millisecond, 0, false}, {"200 ms", 200 * time.Millisecond, 0, false},
		{"50 ms, source 10 ms", 50 * time.Millisecond, 10 * time.Millisecond, false},
		{"50 ms, source 10 ms, every second chunk", 50 * time.Millisecond, 10 * time.Millisecond, true}} {
		t.Run(tc.name, func(t *testing.T) {
			src := newSource(size, 5, "")
			src.latency = tc.latency
			inWorld(t, wan.Link{Delay: tc.rtt / 2, Rate: rate}, src, func(w *world) {
				c, r := w.start()
				defer c.Close()
				time.Sleep(5*tc.rtt + time.Millisecond) // background connections come up
				idx := upTo(0, 128)
				if tc.random {
					idx = idx[:0]
					for i := int64(0); i < 128; i++ {
						idx = append(idx, i*2%127)
					}
					idx[127] = 127
				}
				began := time.Now()
				s := w.sink()
				if err := r.Fetch(w.ctx, idx, block.Background, s.deliver); err != nil {
					t.Fatal(err)
				}
				took := time.Since(began)
				s.once(idx)
				if base == 0 {
					base = took
				}
				ideal := time.Duration(float64(size) / float64(rate) * 1e9)
				t.Logf("%v, %.1f%% of the line; %d source calls, %d at once", took, 100*float64(ideal)/float64(took), src.calls, src.most.Load())
				if took > base+base/20+2*tc.rtt {
					t.Errorf("%v, with no delay %v", took, base)
				}
				if !tc.random && src.calls > 16 {
					t.Errorf("%d source reads for 128 adjacent chunks", src.calls)
				}
			})
		})
	}
}

func TestDemandOvertakesBackground(t *testing.T) {
	src := newSource(32<<20, 6, "")
	src.latency = 5 * time.Millisecond
	inWorld(t, wan.Link{Delay: 10 * time.Millisecond, Rate: 50e6 / 8, Queue: 64 * kib}, src, func(w *world) {
		w.opts.Workers = 4
		c, r := w.start()
		defer c.Close()
		time.Sleep(time.Second)
		bg, fg := w.sink(), w.sink()
		done := make(chan error, 1)
		go func() { done <- r.Fetch(w.ctx, upTo(0, 100), block.Background, bg.deliver) }()
		time.Sleep(100 * time.Millisecond)
		began := time.Now()
		if err := r.Fetch(w.ctx, []int64{400}, block.Demand, fg.deliver); err != nil {
			t.Fatal(err)
		}
		took := time.Since(began)
		bg.mu.Lock()
		n := len(bg.got)
		bg.mu.Unlock()
		t.Logf("demand took %v, %d of 100 background chunks were there", took, n)
		if n > 30 {
			t.Errorf("%d background chunks came before the demand one", n)
		}
		// 20 ms there and back, 5 to 10 ms source, 10.5 ms at the line's rate,
		// 10.5 ms behind what the line has queued, and what background had in
		// the connection's window.
		if took > 250*time.Millisecond {
			t.Errorf("demand took %v", took)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		bg.once(upTo(0, 100))
	})
}

func TestBackgroundKeepsAFloor(t *testing.T) {
	src := newSource(64<<20, 7, "")
	inWorld(t, wan.Link{Delay: time.Millisecond, Rate: 10e6}, src, func(w *world) {
		c, r := w.start()
		defer c.Close()
		time.Sleep(100 * time.Millisecond)
		ctx, cancel := context.WithCancel(w.ctx)
		busy := make(chan struct{})
		go func() { // demand without a pause, more than the line takes
			defer close(busy)
			for i := int64(0); ctx.Err() == nil; i = (i + 64) % 512 {
				r.Fetch(ctx, upTo(512+i%448, 512+i%448+64), block.Demand, func(int64, chunk.Packed, error) {})
			}
		}()
		s := w.sink()
		began := time.Now()
		if err := r.Fetch(w.ctx, upTo(0, 100), block.Background, s.deliver); err != nil {
			t.Fatal(err)
		}
		took := time.Since(began)
		cancel()
		<-busy
		t.Logf("100 background chunks under full demand: %v", took)
		if took > 6*time.Second || took < time.Second {
			t.Errorf("100 background chunks took %v under full demand; the floor allows 20 a second and connection", took)
		}
	})
}

func TestPromote(t *testing.T) {
	src := newSource(8<<20, 8, "")
	src.latency = 2 * time.Millisecond
	for _, when := range []time.Duration{0, 30 * time.Millisecond, 500 * time.Millisecond} {
		inWorld(t, wan.Link{Delay: 10 * time.Millisecond, Rate: 10e6 / 8, Window: 256 * kib}, src, func(w *world) {
			c, r := w.start()
			defer c.Close()
			time.Sleep(time.Second)
			s := w.sink()
			done := make(chan error, 1)
			began := time.Now()
			go func() { done <- r.Fetch(w.ctx, upTo(0, 112), block.Background, s.deliver) }()
			time.Sleep(when)
			synctest.Wait()
			r.Promote([]int64{111, 110, 7, 120})
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			s.once(upTo(0, 112))
			took := s.at[111].Sub(began) - when
			total := time.Since(began)
			t.Logf("promoted after %v: chunk 111 came %v later, all took %v; server promoted %d", when, took, total, w.server.Stats().Promoted)
			if took > 1200*time.Millisecond || total < 4*time.Second {
				t.Errorf("promoted after %v: chunk 111 took %v of %v", when, took, total)
			}
			if d := c.Stats(); d.DemandBytes < 2*64*kib || d.Promoted < 2 {
				t.Errorf("%+v", d)
			}
		})
	}
}

func TestSlowBackgroundHoldsUpOnlyBackground(t *testing.T) {
	src := newSource(8<<20, 9, "")
	src.unit = 16 * kib
	inWorld(t, line, src, func(w *world) {
		c, r := w.start()
		defer c.Close()
		s := w.sink()
		gate := make(chan struct{})
		s.wait = func(int64) { <-gate }
		done := make(chan error, 1)
		go func() { done <- r.Fetch(w.ctx, upTo(0, 300), block.Background, s.deliver) }()
		for range 60 { // a minute of a sink that takes nothing
			time.Sleep(time.Second)
			if err := w.read(r, 7<<20, 4096); err != nil {
				t.Fatal(err)
			}
		}
		if held := w.server.Stats(); held.Conns != 3 || c.Stats().Reconnects != 0 {
			t.Errorf("connections were given up: %+v", held)
		}
		close(gate)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		s.once(upTo(0, 300))
		for i, n := range src.reads { // sent once, received once
			if i < 300 && n != 1 {
				t.Errorf("chunk %d was read %d times", i, n)
			}
		}
	})
}

func TestCancel(t *testing.T) {
	src := newSource(32<<20, 10, "")
	src.latency = 50 * time.Millisecond
	inWorld(t, line, src, func(w *world) {
		c, r := w.start()
		defer c.Close()
		for _, f := range []block.Flags{block.Demand, block.Background} {
			ctx, cancel := context.WithTimeout(w.ctx, 200*time.Millisecond)
			n := 0
			s := w.sink()
			err := r.Fetch(ctx, upTo(0, 400), f, func(i int64, p chunk.Packed, err error) {
				s.deliver(i, p, err)
			})
			cancel()
			for _, k := range s.got {
				n += k
			}
			if !errors.Is(err, context.DeadlineExceeded) || block.KindOf(err) != block.KindCanceled || n != 400 {
				t.Errorf("%v: %v after %d deliveries", f, err, n)
			}
			if c.Stats().Canceled == 0 {
				t.Error("nothing was canceled at the server")
			}
			time.Sleep(time.Second)
			if st := w.server.Stats(); st.Queued != 0 || st.Canceled == 0 {
				t.Errorf("server still has %+v", st)
			}
			if st := c.Stats(); st.DemandOutstanding+st.BackgroundOutstanding != 0 {
				t.Errorf("client still has %+v", st)
			}
		}
		if err := w.read(r, 0, 1<<20); err != nil {
			t.Error(err)
		}
	})
}

func TestBadChunkFailsAlone(t *testing.T) {
	src := newSource(4<<20, 11, "")
	src.bad = func(off, n int64) error {
		if off <= 20*64*kib && 20*64*kib < off+n {
			return &block.Error{Op: "disk.read", Kind: block.KindIO, Err: errors.New("bad sector")}
		}
		return nil
	}
	inWorld(t, line, src, func(w *world) {
		c, r := w.start()
		defer c.Close()
		s := w.sink()
		err := r.Fetch(w.ctx, upTo(0, 64), block.Background, s.deliver)
		if block.KindOf(err) != block.KindIO || !strings.Contains(err.Error(), "bad sector") {
			t.Errorf("Fetch: %v", err)
		}
		for i := range int64(64) {
			if s.got[i] != 1 || (s.errs[i] != nil) != (i == 20) {
				t.Errorf("chunk %d: %d times, %v", i, s.got[i], s.errs[i])
			}
		}
		if err := r.ReadAt(w.ctx, make([]byte, 4096), 20*64*kib, 0); block.KindOf(err) != block.KindIO {
			t.Errorf("ReadAt: %v", err)
		}
	})
}

func TestExtents(t *testing.T) {
	const size = 24 << 20
	src := newSource(size, 12, "")
	src.extents = []block.Extent{}
	for off := int64(0); off < size; off += 1024 {
		k := block.Data
		if off%2048 != 0 {
			k = block.Hole
		}
		src.extents = append(src.extents, block.Extent{Off: off, Len: 1024, Kind: k})
	}
	inWorld(t, line, src, func(w *world) {
		c, r := w.start()
		defer c.Close()
		for _, f := range []block.Flags{block.Demand, block.Background} {
			var es []block.Extent
			calls := 0
			for at := int64(512); at < size; calls++ {
				var err error
				if es, err = r.Extents(w.ctx, es, at, size-at, f); err != nil {
					t.Fatal(err)
				}
				at = es[len(es)-1].End()
			}
			if len(es) != size/1024 || es[0] != (block.Extent{Off: 512, Len: 512, Kind: block.Data}) || es[9] != src.extents[9] {
				t.Errorf("%d extents, %v, %v", len(es), es[0], es[9])
			}
			if calls > 2 {
				t.Errorf("%d round trips", calls)
			}
		}
		before := w.wan.Stats().Forward.Segments
		es, err := r.Extents(w.ctx, nil, 0, 1<<20, block.Local)
		if err != nil || len(es) != 1 || es[0].Kind != block.Data || es[0].Len != 1<<20 {
			t.Errorf("local: %v %v", es, err)
		}
		if w.wan.Stats().Forward.Segments != before {
			t.Error("local extents crossed the link")
		}
	})
}

func TestOpenRefusals(t *testing.T) {
	src := newSource(1<<20, 13, "")
	inWorld(t, line, src, func(w *world) {
		w.opts.Authorize = func(role, name, volume string) error {
			if role != "frontend" || name != "f1" {
				return errors.New("not yours")
			}
			return nil
		}
		w.serve()
		c := w.dial()
		defer c.Close()
		if _, err := c.Open(w.ctx, "other"); block.KindOf(err) != block.KindNotFound {
			t.Errorf("no such volume: %v", err)
		}
		if _, err := c.Open(w.ctx, ""); block.KindOf(err) != block.KindInvalid {
			t.Errorf("no name: %v", err)
		}
		w.chunk = 100
		if _, err := c.Open(w.ctx, "disk"); block.KindOf(err) != block.KindUnsupported {
			t.Errorf("odd chunk size: %v", err)
		}
		w.chunk = 64 * kib
		w.client.TLS = clientTLS(w, "f2")
		d := w.dial()
		defer d.Close()
		if _, err := d.Open(w.ctx, "disk"); block.KindOf(err) != block.KindDenied || !strings.Contains(err.Error(), "not yours") {
			t.Errorf("foreign volume: %v", err)
		}
		if err := w.read(w.open(c), 0, 1<<20); err != nil {
			t.Error(err)
		}
	})
}

func TestDialRefusals(t *testing.T) {
	src := newSource(1<<20, 14, "")
	inWorld(t, line, src, func(w *world) {
		if _, err := Dial(w.ctx, w.client); block.KindOf(err) != block.KindUnavailable {
			t.Errorf("nobody there: %v", err)
		}
		w.serve()
		o := w.client
		o.TLS = clientTLS(w, "o1")
		if _, err := Dial(w.ctx, o); block.KindOf(err) != block.KindDenied {
			t.Errorf("wrong role: %v", err)
		}
		o.TLS = w.client.TLS.Clone()
		o.TLS.ServerName = "elsewhere"
		if _, err := Dial(w.ctx, o); block.KindOf(err) != block.KindDenied || !strings.Contains(err.Error(), "elsewhere") {
			t.Errorf("wrong host: %v", err)
		}
		o.TLS = w.client.TLS.Clone()
		o.TLS.GetClientCertificate = nil
		if _, err := Dial(w.ctx, o); block.KindOf(err) != block.KindDenied {
			t.Errorf("no certificate: %v", err)
		}
		ctx, cancel := context.WithTimeout(w.ctx, 30*time.Millisecond)
		defer cancel()
		if _, err := Dial(ctx, w.client); block.KindOf(err) != block.KindCanceled {
			t.Errorf("canceled: %v", err)
		}
		if st := w.server.Stats(); st.Sessions != 0 {
			t.Errorf("%+v", st)
		}
	})
	for name, o := range map[string]ClientOptions{"no port": {Addr: "x"}, "no TLS": {Addr: "x:1"}} {
		if _, err := Dial(t.Context(), o); block.KindOf(err) != block.KindInvalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := NewServer(ServerOptions{}); block.KindOf(err) != block.KindInvalid {
		t.Error(err)
	}
}

func TestLookupErrorKeepsItsKind(t *testing.T) {
	src := newSource(1<<20, 15, "")
	inWorld(t, line, src, func(w *world) {
		w.serve()
		f := func(string) (Served, error) { return Served{}, fs.ErrPermission }
		w.lookup.Store(&f)
		c := w.dial()
		defer c.Close()
		if _, err := c.Open(w.ctx, "disk"); block.KindOf(err) != block.KindDenied {
			t.Error(err)
		}
	})
}

func TestManyVolumesAndSizes(t *testing.T) {
	src := newSource(1<<20+512, 16, "")
	for _, size := range []int{16 * kib, 256 * kib, 1 << 20} {
		inWorld(t, line, src, func(w *world) {
			w.chunk = size
			w.serve()
			f := func(string) (Served, error) { return Served{Device: src, ChunkBytes: size}, nil }
			w.lookup.Store(&f)
			c := w.dial()
			defer c.Close()
			done := make(chan error, 8)
			for i := range 8 {
				go func() {
					r, err := c.Open(w.ctx, strings.Repeat("v", 1+i))
					if err == nil {
						err = w.read(r, 0, int64(len(src.data)))
					}
					if err == nil {
						err = r.Close()
					}
					done <- err
				}()
			}
			for range 8 {
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
		})
	}
}
