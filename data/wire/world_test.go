package wire

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"sort"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"forerun/block"
	"forerun/internal/chunk"
	"forerun/internal/pki"
	"forerun/lab/wan"
)

func TestMain(m *testing.M) {
	// The codecs make channels at first use, which must not happen inside a
	// synctest bubble that ends before they do.
	for _, c := range []chunk.Codec{chunk.Zstd, chunk.S2} {
		plain := bytes.Repeat([]byte("warm"), 1000)
		if err := chunk.Seal(nil, plain, c).Open(make([]byte, len(plain))); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

const kib = 1 << 10

// source is a disk in memory that counts reads and can be slow or bad.
type source struct {
	data    []byte
	block   int
	id      string
	latency time.Duration
	extents []block.Extent // none: all data
	bad     func(off, n int64) error

	mu      sync.Mutex
	unit    int64 // the chunk size reads are counted by
	reads   map[int64]int
	calls   int
	largest int
	atOnce  atomic.Int64
	most    atomic.Int64
}

func newSource(size int64, seed uint64, id string) *source {
	s := &source{data: make([]byte, size), block: 512, id: id, unit: 64 * kib, reads: map[int64]int{}}
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	r.Read(s.data)
	return s
}

func (s *source) Info() block.Info {
	return block.Info{Size: int64(len(s.data)), BlockSize: s.block, ID: s.id, CanExtents: s.extents != nil, CanTrim: true}
}

func (s *source) ReadAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	n := s.atOnce.Add(1)
	defer s.atOnce.Add(-1)
	for m := s.most.Load(); n > m && !s.most.CompareAndSwap(m, n); m = s.most.Load() {
	}
	if s.latency > 0 {
		select {
		case <-time.After(s.latency):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls++
	s.largest = max(s.largest, len(p))
	for at := off &^ (s.unit - 1); at < off+int64(len(p)); at += s.unit {
		s.reads[at/s.unit]++
	}
	if s.bad != nil {
		if err := s.bad(off, int64(len(p))); err != nil {
			return err
		}
	}
	copy(p, s.data[off:off+int64(len(p))])
	return nil
}

func (s *source) WriteAt(context.Context, []byte, int64, block.Flags) error { panic("written") }
func (s *source) Zero(context.Context, int64, int64, block.Flags) error     { panic("written") }
func (s *source) Trim(context.Context, int64, int64, block.Flags) error     { panic("written") }
func (s *source) Flush(context.Context, block.Flags) error                  { return nil }
func (s *source) Prefetch(context.Context, int64, int64, block.Flags) error { return nil }
func (s *source) Close() error                                              { return nil }
func (s *source) Extents(_ context.Context, dst []block.Extent, off, n int64, f block.Flags) ([]block.Extent, error) {
	if s.extents == nil {
		return append(dst, block.Extent{Off: off, Len: n}), nil
	}
	// At most 100 at a time: an answer may be shorter than what was asked.
	first := sort.Search(len(s.extents), func(i int) bool { return s.extents[i].End() > off })
	for i, k := first, 0; i < len(s.extents) && k < 100; i++ {
		from, to := max(off, s.extents[i].Off), min(off+n, s.extents[i].End())
		if from < to {
			dst = append(dst, block.Extent{Off: from, Len: to - from, Kind: s.extents[i].Kind})
			k++
		}
	}
	return dst, nil
}

// world is a backend and what a frontend needs to reach it.
type world struct {
	t      *testing.T
	ctx    context.Context
	wan    *wan.WAN
	src    *source
	chunk  int
	dir    string
	opts   ServerOptions
	server *Server
	stop   func()
	client ClientOptions
	lookup atomic.Pointer[func(string) (Served, error)]
}

func logger(t *testing.T) *slog.Logger {
	if testing.Verbose() {
		return slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	return slog.New(slog.DiscardHandler)
}

func certificates(t *testing.T) string {
	dir := t.TempDir()
	if err := pki.Init(dir); err != nil {
		t.Fatal(err)
	}
	for _, r := range []pki.Request{
		{Role: pki.RoleBackend, Name: "b1", Hosts: []string{"backend", "127.0.0.1"}},
		{Role: pki.RoleFrontend, Name: "f1"}, {Role: pki.RoleFrontend, Name: "f2"}, {Role: pki.RoleOperator, Name: "o1"},
	} {
		if err := pki.Issue(dir, r); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// inWorld makes a world inside a bubble of virtual time. If f leaves a goroutine
// behind, synctest reports it.
func inWorld(t *testing.T, l wan.Link, src *source, f func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		dir := certificates(t)
		w := &world{t: t, ctx: t.Context(), wan: wan.New(l), src: src, chunk: int(src.unit), dir: dir}
		w.opts = ServerOptions{TLS: must(pki.ServerTLS(dir, "b1", pki.RoleFrontend)), Log: logger(t), Node: "b1",
			Lookup: func(v string) (Served, error) {
				if g := w.lookup.Load(); g != nil {
					return (*g)(v)
				}
				if v != "disk" {
					return Served{}, &block.Error{Op: "test.lookup", Object: v, Kind: block.KindNotFound}
				}
				return Served{Device: src, ChunkBytes: w.chunk}, nil
			}}
		w.client = ClientOptions{Addr: "backend:1", TLS: must(pki.ClientTLS(dir, "f1", pki.RoleBackend)), Node: "f1", Log: logger(t),
			Dial: w.wan.DialContext}
		defer func() {
			if w.stop != nil {
				w.stop()
			}
			w.wan.Close()
		}()
		f(w)
	})
}

// serve starts the backend.
func (w *world) serve() {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w.server = must(NewServer(w.opts))
	ln := must(w.wan.Listen("backend:1"))
	done := make(chan error, 1)
	go func() { done <- w.server.Serve(ctx, ln) }()
	w.stop = func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("Serve: %v", err)
		}
		w.stop = nil
	}
}

func (w *world) dial() *Client {
	w.t.Helper()
	c, err := Dial(w.ctx, w.client)
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

func (w *world) open(c *Client) *Remote {
	w.t.Helper()
	r, err := c.Open(w.ctx, "disk")
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

// start serves, dials and opens; the caller closes.
func (w *world) start() (*Client, *Remote) {
	w.t.Helper()
	w.serve()
	c := w.dial()
	return c, w.open(c)
}

func upTo(from, to int64) []int64 {
	var idx []int64
	for i := from; i < to; i++ {
		idx = append(idx, i)
	}
	return idx
}

// sink collects what is delivered and holds it to the source's bytes.
type sink struct {
	w     *world
	mu    sync.Mutex
	got   map[int64]int
	errs  map[int64]error
	codec map[chunk.Codec]int
	at    map[int64]time.Time
	order []int64
	wait  func(i int64)
}

func (w *world) sink() *sink {
	return &sink{w: w, got: map[int64]int{}, errs: map[int64]error{}, codec: map[chunk.Codec]int{}, at: map[int64]time.Time{}}
}

func (s *sink) deliver(i int64, p chunk.Packed, err error) {
	if s.wait != nil {
		s.wait(i)
	}
	var bad error
	if err == nil {
		plain := make([]byte, p.Plain)
		from := i * int64(s.w.chunk)
		if e := p.Open(plain); e != nil {
			bad = e
		} else if want := s.w.src.data[from:min(from+int64(s.w.chunk), int64(len(s.w.src.data)))]; !bytes.Equal(plain, want) {
			bad = errors.New("other bytes")
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.got[i]++
	s.errs[i] = err
	s.at[i] = time.Now()
	s.order = append(s.order, i)
	if err == nil {
		s.codec[p.Codec]++
	}
	if bad != nil {
		s.w.t.Errorf("chunk %d: %v", i, bad)
	}
}

// once fails the test unless each chunk was delivered exactly once, without error.
func (s *sink) once(idx []int64) {
	s.w.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, i := range idx {
		if s.got[i] != 1 || s.errs[i] != nil {
			s.w.t.Fatalf("chunk %d was delivered %d times, error %v", i, s.got[i], s.errs[i])
		}
	}
	if len(s.got) != len(idx) {
		s.w.t.Fatalf("%d chunks were delivered, %d asked for", len(s.got), len(idx))
	}
}

func (w *world) read(r *Remote, off, n int64) error {
	p := make([]byte, n)
	if err := r.ReadAt(w.ctx, p, off, block.Demand); err != nil {
		return err
	}
	if !bytes.Equal(p, w.src.data[off:off+n]) {
		return fmt.Errorf("other bytes at %d", off)
	}
	return nil
}

// slow has a quarter of line's rate, for tests of what happens in between.
var slow = wan.Link{Delay: 20 * time.Millisecond, Rate: 25e6 / 8}

var line = wan.Link{Delay: 20 * time.Millisecond, Rate: 100e6 / 8} // 40 ms, 100 Mbit/s

func clientTLS(w *world, name string) *tls.Config {
	return must(pki.ClientTLS(w.dir, name, pki.RoleBackend))
}

// nothingLeft fails the test unless both ends have forgotten all requests.
func (w *world) nothingLeft(c *Client, r *Remote) {
	w.t.Helper()
	st, cs := w.server.Stats(), c.Stats()
	if st.Queued != 0 || w.server.demandBusy != 0 || st.Violations != 0 || cs.DemandOutstanding+cs.BackgroundOutstanding != 0 || len(r.wanted) != 0 {
		w.t.Errorf("left over: %+v %+v", st, cs)
	}
	for _, ss := range w.server.sessions {
		for _, sc := range ss.conns {
			if sc != nil && (sc.outstanding != 0 || sc.inflight != 0 || len(sc.out) != 0) {
				w.t.Errorf("%v %d: %d outstanding, %d in flight, %d to send", sc.role, sc.index, sc.outstanding, sc.inflight, len(sc.out))
			}
		}
	}
}
