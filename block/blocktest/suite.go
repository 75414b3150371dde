package blocktest

import (
	"bytes"
	"context"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"forerun/block"
)

// Options of Test. The zero value suits a fresh writable device.
type Options struct {
	// Seed of the random operations; 0 takes FORERUN_SEED from the environment, else 1.
	Seed uint64
	// Ops is how many random operations are done (default 400, a quarter with -short).
	Ops int
	// Content, when set, is what the device must hold at first; it may be
	// shorter than the device. Otherwise what is read first counts.
	Content []byte
	// MaxLen bounds the length of random operations in bytes (default 256 KiB).
	MaxLen int64
	// Window bounds how much of a large device is used: so many bytes at its
	// beginning and at its end (default 8 MiB).
	Window int64
	// Workers is how many goroutines the concurrent part uses (default 4).
	Workers int
	// Reopen, when set, closes dev and returns the device opened anew; the
	// content must have survived. dev was flushed before.
	Reopen func(t *testing.T, dev block.Device) block.Device
}

// Test runs the suite: open returns a new device for each part; the suite
// closes it. The content is overwritten unless Info says ReadOnly.
func Test(t *testing.T, open func(t *testing.T) block.Device, o Options) {
	t.Helper()
	if o.Seed == 0 {
		o.Seed = 1
		if s, err := strconv.ParseUint(os.Getenv("FORERUN_SEED"), 10, 64); err == nil {
			o.Seed = s
		}
	}
	if o.Ops == 0 {
		o.Ops = 400
		if testing.Short() {
			o.Ops = 100
		}
	}
	if o.MaxLen == 0 {
		o.MaxLen = 256 << 10
	}
	if o.Window == 0 {
		o.Window = 8 << 20
	}
	if o.Workers == 0 {
		o.Workers = 4
	}
	parts := []struct {
		name  string
		write bool // needs a writable device
		run   func(*suite)
	}{
		{"Info", false, (*suite).info},
		{"Content", false, (*suite).content},
		{"Refusals", false, (*suite).refusals},
		{"Extents", false, (*suite).extents},
		{"Prefetch", false, (*suite).prefetch},
		{"Edges", true, (*suite).edges},
		{"Random", true, (*suite).random},
		{"Concurrent", true, (*suite).concurrent},
		{"Canceled", false, (*suite).canceled},
		{"Reopen", true, (*suite).reopen},
		{"Close", false, (*suite).close},
	}
	for _, part := range parts {
		t.Run(part.name, func(t *testing.T) {
			dev := open(t)
			s := &suite{T: t, o: o, dev: block.NewChecked("blocktest", dev), raw: dev, ctx: t.Context()}
			defer func() { s.dev.Close() }()
			s.Info = dev.Info()
			if part.write && s.Info.ReadOnly {
				t.Skip("the device is read-only")
			}
			s.load()
			part.run(s)
		})
	}
}

// region is a part of the device that the suite uses, with what it should hold.
type region struct {
	off  int64
	want []byte
}

func (r *region) end() int64 { return r.off + int64(len(r.want)) }

type suite struct {
	*testing.T
	o       Options
	dev     *block.Checked
	raw     block.Device
	ctx     context.Context
	Info    block.Info
	regions []*region
}

func (s *suite) bs() int64 { return int64(max(s.Info.BlockSize, 1)) }

func (s *suite) maxIO() int64 {
	if s.Info.MaxIO > 0 {
		return min(int64(s.Info.MaxIO)&^(s.bs()-1), 1<<20)
	}
	return 1 << 20
}

// load reads what the device holds and compares it with Options.Content.
func (s *suite) load() {
	s.Helper()
	if s.Info.Size <= 0 || s.Info.BlockSize < 0 || s.Info.BlockSize&(s.Info.BlockSize-1) != 0 || s.Info.Size%s.bs() != 0 {
		s.Fatalf("the device says Size %d, BlockSize %d", s.Info.Size, s.Info.BlockSize)
	}
	if w := s.o.Window &^ (s.bs() - 1); s.Info.Size > 2*w {
		s.regions = []*region{{0, make([]byte, w)}, {s.Info.Size - w, make([]byte, w)}}
	} else {
		s.regions = []*region{{0, make([]byte, s.Info.Size)}}
	}
	for _, r := range s.regions {
		s.readAll(r.want, r.off, 0)
		if r.off < int64(len(s.o.Content)) {
			c := s.o.Content[r.off:min(int64(len(s.o.Content)), r.end())]
			s.same(r.want[:len(c)], c, r.off, "at first")
		}
	}
}

func (s *suite) readAll(p []byte, off int64, f block.Flags) {
	s.Helper()
	for len(p) > 0 {
		n := min(int64(len(p)), s.maxIO())
		if err := s.dev.ReadAt(s.ctx, p[:n], off, f); err != nil {
			s.Fatalf("reading %d bytes at %d: %v", n, off, err)
		}
		p, off = p[n:], off+n
	}
}

func (s *suite) same(got, want []byte, off int64, when string) {
	s.Helper()
	if bytes.Equal(got, want) {
		return
	}
	i := 0
	for got[i] == want[i] {
		i++
	}
	s.Fatalf("%s (seed %d): byte %d is %#02x, should be %#02x (in a range of %d at %d)", when, s.o.Seed, off+int64(i), got[i], want[i], len(got), off)
}

// check reads [off, off+n) of r and compares.
func (s *suite) check(r *region, off, n int64, f block.Flags, when string) {
	s.Helper()
	got := make([]byte, n)
	s.readAll(got, off, f)
	s.same(got, r.want[off-r.off:off-r.off+n], off, when)
}

func (s *suite) info() {
	if again := s.raw.Info(); again != s.Info {
		s.Errorf("Info changed from %+v to %+v", s.Info, again)
	}
	if s.Info.MaxIO < 0 || s.Info.PreferredIO < 0 || s.Info.MaxIO > 0 && int64(s.Info.MaxIO) < s.bs() {
		s.Errorf("MaxIO %d, PreferredIO %d", s.Info.MaxIO, s.Info.PreferredIO)
	}
	if s.Info.MaxIO > 0 && s.Info.PreferredIO > s.Info.MaxIO {
		s.Errorf("PreferredIO %d is more than MaxIO %d", s.Info.PreferredIO, s.Info.MaxIO)
	}
}

func (s *suite) content() {
	for _, r := range s.regions {
		for _, f := range []block.Flags{block.Demand, block.WriteBack, block.Background, block.Background | block.Soon} {
			s.check(r, r.off, int64(len(r.want)), f, "read again as "+f.String())
		}
	}
	if err := s.dev.Flush(s.ctx, 0); err != nil {
		s.Errorf("flush of an unwritten device: %v", err)
	}
}

// wantKind fails unless err is of the kind.
func (s *suite) wantKind(what string, err error, k block.Kind) {
	s.Helper()
	if block.KindOf(err) != k {
		s.Errorf("%s: %v (%v), should be %v", what, err, block.KindOf(err), k)
	}
}

func (s *suite) refusals() {
	p := make([]byte, s.bs())
	s.wantKind("read beyond the end", s.dev.ReadAt(s.ctx, p, s.Info.Size, 0), block.KindRange)
	s.wantKind("read before the beginning", s.dev.ReadAt(s.ctx, p, -s.bs(), 0), block.KindInvalid)
	s.wantKind("empty read", s.dev.ReadAt(s.ctx, nil, 0, 0), block.KindInvalid)
	if s.bs() > 1 {
		s.wantKind("unaligned read", s.dev.ReadAt(s.ctx, p[1:], 0, 0), block.KindInvalid)
	}
	if s.Info.ReadOnly {
		s.wantKind("write", s.dev.WriteAt(s.ctx, p, 0, 0), block.KindReadOnly)
		s.wantKind("zero", s.dev.Zero(s.ctx, 0, s.bs(), 0), block.KindReadOnly)
		s.wantKind("trim", s.dev.Trim(s.ctx, 0, s.bs(), 0), block.KindReadOnly)
		s.wantKind("write below the checker", s.raw.WriteAt(s.ctx, p, 0, 0), block.KindReadOnly)
		return
	}
	s.wantKind("write beyond the end", s.dev.WriteAt(s.ctx, p, s.Info.Size, 0), block.KindRange)
}

// askExtents walks the extents of [off, off+n) of r and checks them.
func (s *suite) askExtents(r *region, off, n int64, f block.Flags) {
	s.Helper()
	var buf [4]block.Extent
	for end := off + n; off < end; {
		out, err := s.dev.Extents(s.ctx, buf[:1], off, end-off, f)
		if err != nil {
			s.Fatalf("extents of %d bytes at %d: %v", end-off, off, err)
		}
		if out[0] != buf[0] {
			s.Fatalf("extents changed what was in dst before")
		}
		for _, e := range out[1:] { // order and cover are the checker's business
			if e.Kind > block.Free || e.State > block.Modified {
				s.Fatalf("extent %+v", e)
			}
			if e.Kind.Zero() && !allZero(r.want[e.Off-r.off:e.End()-r.off]) {
				s.Fatalf("seed %d: extent %+v does not read as zeros", s.o.Seed, e)
			}
			if !s.Info.CanExtents && e.Kind != block.Data {
				s.Fatalf("extent %+v of a device that cannot tell", e)
			}
			off = e.End()
		}
	}
}

func (s *suite) extents() {
	for _, r := range s.regions {
		n := int64(len(r.want))
		for _, f := range []block.Flags{0, block.Local, block.Background} {
			s.askExtents(r, r.off, n, f)
			s.askExtents(r, r.off, s.bs(), f)
			s.askExtents(r, r.end()-s.bs(), s.bs(), f)
			if n > 3*s.bs() {
				s.askExtents(r, r.off+s.bs(), n-2*s.bs(), f)
			}
		}
	}
}

func (s *suite) prefetch() {
	for _, r := range s.regions {
		n := int64(len(r.want))
		for _, f := range []block.Flags{0, block.Background, block.Background | block.Soon} {
			if err := s.dev.Prefetch(s.ctx, r.off, n, f); err != nil {
				s.Errorf("prefetch of %d bytes at %d: %v", n, r.off, err)
			}
		}
		s.check(r, r.off, n, 0, "after prefetch")
	}
}

// write stores random bytes and notes them.
func (s *suite) write(rnd *rand.Rand, r *region, off, n int64, f block.Flags) {
	s.Helper()
	p := make([]byte, n)
	scramble(rnd, p)
	keep := bytes.Clone(p)
	for at := int64(0); at < n; at += s.maxIO() {
		q := p[at:min(at+s.maxIO(), n)]
		if err := s.dev.WriteAt(s.ctx, q, off+at, f); err != nil {
			s.Fatalf("seed %d: writing %d bytes at %d: %v", s.o.Seed, len(q), off+at, err)
		}
	}
	if !bytes.Equal(p, keep) {
		s.Fatalf("WriteAt changed the caller's bytes")
	}
	copy(r.want[off-r.off:], p)
	scramble(rnd, p) // a device that kept p shows now
}

// scramble fills p with bytes that are never all zero in a sector.
func scramble(rnd *rand.Rand, p []byte) {
	for len(p) >= 8 {
		binary.LittleEndian.PutUint64(p, rnd.Uint64())
		p = p[8:]
	}
	for i := range p {
		p[i] = byte(rnd.Uint32()) | 1
	}
}

func (s *suite) zero(r *region, off, n int64, f block.Flags) {
	s.Helper()
	err := s.dev.Zero(s.ctx, off, n, f)
	if err != nil && f.Has(block.FastZero) && block.KindOf(err) == block.KindUnsupported {
		return
	}
	if err != nil {
		s.Fatalf("seed %d: zeroing %d bytes at %d (%v): %v", s.o.Seed, n, off, f, err)
	}
	clear(r.want[off-r.off : off-r.off+n])
}

func (s *suite) trim(r *region, off, n int64, f block.Flags) {
	s.Helper()
	if err := s.dev.Trim(s.ctx, off, n, f); err != nil {
		s.Fatalf("seed %d: trimming %d bytes at %d: %v", s.o.Seed, n, off, err)
	}
	s.adopt(r, off, n, make([]byte, n), "after trim")
}

// adopt reads [off, off+n), demands that each 512-byte sector is as before or
// as in other, and goes on with what it found.
func (s *suite) adopt(r *region, off, n int64, other []byte, when string) {
	s.Helper()
	got := make([]byte, n)
	s.readAll(got, off, 0)
	want := r.want[off-r.off : off-r.off+n]
	for at := int64(0); at < n; {
		to := min((off+at)&^511+512-off, n)
		if g := got[at:to]; !bytes.Equal(g, want[at:to]) && !bytes.Equal(g, other[at:to]) {
			s.Fatalf("%s (seed %d): the sector at %d is neither as before nor as asked for", when, s.o.Seed, off+at)
		}
		at = to
	}
	copy(want, got)
}

func (s *suite) edges() {
	rnd := rand.New(rand.NewPCG(s.o.Seed, 10))
	for _, r := range s.regions {
		bs, n := s.bs(), int64(len(r.want))
		type rng struct{ off, n int64 }
		ranges := []rng{{r.off, bs}, {r.end() - bs, bs}, {r.off, n}}
		for _, b := range []int64{4 << 10, 64 << 10, 1 << 20} {
			if bs >= b {
				continue
			}
			for _, c := range []rng{{b - bs, 2 * bs}, {b, bs}, {b - bs, bs}, {b, b}, {b - bs, b + 2*bs}, {bs, b}, {bs, bs}} {
				if c.off+c.n <= n {
					ranges = append(ranges, rng{r.off + c.off, c.n})
				}
			}
		}
		for i, c := range ranges {
			f := block.Flags(0)
			if i%3 == 1 {
				f = block.FUA
			}
			s.write(rnd, r, c.off, c.n, f)
			s.around(r, c.off, c.n, "written")
			s.zero(r, c.off, c.n, f|[...]block.Flags{0, block.MayTrim, block.FastZero, block.MayTrim | block.FastZero}[i%4])
			s.around(r, c.off, c.n, "zeroed")
			s.askExtents(r, c.off, c.n, 0)
			s.write(rnd, r, c.off, c.n, f)
			s.trim(r, c.off, c.n, f)
			s.around(r, c.off, c.n, "trimmed")
			s.askExtents(r, c.off, c.n, block.Local)
			s.write(rnd, r, c.off, c.n, f)
			if err := s.dev.Flush(s.ctx, 0); err != nil {
				s.Fatalf("flush: %v", err)
			}
			s.around(r, c.off, c.n, "flushed")
		}
		s.check(r, r.off, n, 0, "after all edges")
	}
}

// around checks a range and 64 KiB on both sides of it.
func (s *suite) around(r *region, off, n int64, when string) {
	s.Helper()
	a := max(r.off, (off-64<<10)&^(s.bs()-1))
	b := min(r.end(), off+n+64<<10)
	s.check(r, a, b-a, 0, when)
}

// pick is a random range of r: often small, sometimes at a boundary.
func (s *suite) pick(rnd *rand.Rand, r *region) (off, n int64) {
	bs := s.bs()
	blocks := int64(len(r.want)) / bs
	most := max(1, min(blocks, s.o.MaxLen/bs))
	switch rnd.IntN(4) {
	case 0:
		n = 1 + rnd.Int64N(most)
	case 1:
		n = max(1, min(most, (4<<10)/bs*(1+rnd.Int64N(4))))
	default:
		n = 1 + rnd.Int64N(min(most, max(1, (16<<10)/bs)))
	}
	off = rnd.Int64N(blocks - n + 1)
	if g := max(1, (4<<10)/bs); rnd.IntN(3) == 0 {
		off -= off % g
	}
	return r.off + off*bs, n * bs
}

// one does one random operation inside r, which no other goroutine uses.
func (s *suite) one(rnd *rand.Rand, r *region) {
	s.Helper()
	off, n := s.pick(rnd, r)
	var fua block.Flags
	if rnd.IntN(8) == 0 {
		fua = block.FUA
	}
	class := block.Flags(rnd.IntN(3))
	switch k := rnd.IntN(20); {
	case k < 6:
		s.check(r, off, n, class, "read")
	case k < 13:
		s.write(rnd, r, off, n, class|fua)
	case k < 15:
		s.zero(r, off, n, class|fua|block.Flags(rnd.IntN(2))*block.MayTrim|block.Flags(rnd.IntN(2))*block.FastZero)
	case k == 15:
		s.trim(r, off, n, class|fua)
	case k == 16:
		if err := s.dev.Flush(s.ctx, class); err != nil {
			s.Fatalf("flush: %v", err)
		}
	case k == 17:
		if err := s.dev.Prefetch(s.ctx, off, n, class); err != nil {
			s.Fatalf("prefetch: %v", err)
		}
	default:
		s.askExtents(r, off, n, block.Flags(rnd.IntN(2))*block.Local)
	}
}

func (s *suite) random() {
	rnd := rand.New(rand.NewPCG(s.o.Seed, 11))
	for range s.o.Ops {
		s.one(rnd, s.regions[rnd.IntN(len(s.regions))])
	}
	for _, r := range s.regions {
		s.check(r, r.off, int64(len(r.want)), 0, "after all operations")
	}
}

// concurrent gives each worker a part of every region. The parts meet at
// blocks, not at chunks, so that workers share chunks, pages and map words.
func (s *suite) concurrent() {
	var wg sync.WaitGroup
	for w := range s.o.Workers {
		var mine []*region
		for _, r := range s.regions {
			blocks := int64(len(r.want)) / s.bs()
			a, b := blocks*int64(w)/int64(s.o.Workers), blocks*int64(w+1)/int64(s.o.Workers)
			if a < b {
				mine = append(mine, &region{r.off + a*s.bs(), r.want[a*s.bs() : b*s.bs()]})
			}
		}
		if mine == nil {
			continue
		}
		wg.Go(func() {
			// A fatal error ends this goroutine only; the suite sees that it failed.
			rnd := rand.New(rand.NewPCG(s.o.Seed, 100+uint64(w)))
			for range s.o.Ops / s.o.Workers {
				if s.Failed() {
					return
				}
				s.one(rnd, mine[rnd.IntN(len(mine))])
			}
		})
	}
	wg.Wait()
	if s.Failed() {
		return
	}
	for _, r := range s.regions {
		s.check(r, r.off, int64(len(r.want)), 0, "after all workers")
	}
}

// canceled calls with contexts that have ended or are about to.
func (s *suite) canceled() {
	rnd := rand.New(rand.NewPCG(s.o.Seed, 12))
	r := s.regions[0]
	ok := func(what string, err error) {
		s.Helper()
		if k := block.KindOf(err); k != block.KindNone && k != block.KindCanceled {
			s.Errorf("%s with an ended context: %v (%v)", what, err, k)
		}
	}
	for i := range 24 {
		ctx, cancel := context.WithCancel(s.ctx)
		if i%2 == 0 {
			cancel()
		} else {
			time.AfterFunc(time.Duration(rnd.IntN(200))*time.Microsecond, cancel)
		}
		off, n := s.pick(rnd, r)
		n = min(n, s.maxIO())
		p := make([]byte, n)
		err := s.dev.ReadAt(ctx, p, off, 0)
		ok("read", err)
		if err == nil {
			s.same(p, r.want[off-r.off:off-r.off+n], off, "read with an ended context")
		}
		_, err = s.dev.Extents(ctx, nil, off, n, 0)
		ok("extents", err)
		ok("prefetch", s.dev.Prefetch(ctx, off, n, block.Background))
		ok("flush", s.dev.Flush(ctx, 0))
		if !s.Info.ReadOnly {
			scramble(rnd, p)
			err = s.dev.WriteAt(ctx, p, off, 0)
			ok("write", err)
			s.adopt(r, off, n, p, "after a canceled write")
			// What was given up may still happen; a later write of the same
			// range that was acknowledged is the newest.
			s.write(rnd, r, off, n, 0)
			ok("zero", s.dev.Zero(ctx, off, n, 0))
			s.adopt(r, off, n, make([]byte, n), "after a canceled zero")
			s.write(rnd, r, off, n, 0)
			ok("trim", s.dev.Trim(ctx, off, n, 0))
			s.adopt(r, off, n, make([]byte, n), "after a canceled trim")
			s.write(rnd, r, off, n, 0)
		}
		cancel()
	}
	s.check(r, r.off, int64(len(r.want)), 0, "after canceled calls")
}

func (s *suite) reopen() {
	if s.o.Reopen == nil {
		s.Skip("the device cannot be opened again")
	}
	rnd := rand.New(rand.NewPCG(s.o.Seed, 13))
	for range 3 {
		for range s.o.Ops / 4 {
			s.one(rnd, s.regions[rnd.IntN(len(s.regions))])
		}
		if err := s.dev.Flush(s.ctx, 0); err != nil {
			s.Fatal(err)
		}
		s.raw = s.o.Reopen(s.T, s.raw)
		s.dev = block.NewChecked("blocktest", s.raw)
		if i := s.raw.Info(); i != s.Info {
			s.Fatalf("Info was %+v and is %+v", s.Info, i)
		}
		for _, r := range s.regions {
			s.check(r, r.off, int64(len(r.want)), 0, "opened again")
		}
	}
}

// close closes during calls: each is served or refused with KindClosed.
func (s *suite) close() {
	r := s.regions[0]
	var wg sync.WaitGroup
	for w := range s.o.Workers {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(s.o.Seed, 200+uint64(w)))
			for {
				off, n := s.pick(rnd, r)
				n = min(n, s.maxIO())
				p := make([]byte, n)
				err := s.dev.ReadAt(s.ctx, p, off, 0)
				if err != nil {
					s.wantKind("read during close", err, block.KindClosed)
					return
				}
				if !bytes.Equal(p, r.want[off-r.off:off-r.off+n]) {
					s.Errorf("seed %d: wrong bytes at %d while closing", s.o.Seed, off)
					return
				}
			}
		})
	}
	time.Sleep(2 * time.Millisecond)
	if err := s.dev.Close(); err != nil {
		s.Errorf("close: %v", err)
	}
	wg.Wait()
	if err := s.dev.Close(); err != nil {
		s.Errorf("second close: %v", err)
	}
	p := make([]byte, s.bs())
	s.wantKind("read after close", s.dev.ReadAt(s.ctx, p, 0, 0), block.KindClosed)
	s.wantKind("read below the checker after close", s.raw.ReadAt(s.ctx, p, 0, 0), block.KindClosed)
	s.wantKind("flush after close", s.dev.Flush(s.ctx, 0), block.KindClosed)
	s.wantKind("prefetch after close", s.dev.Prefetch(s.ctx, 0, s.bs(), 0), block.KindClosed)
	_, err := s.dev.Extents(s.ctx, nil, 0, s.bs(), 0)
	s.wantKind("extents after close", err, block.KindClosed)
	if !s.Info.ReadOnly {
		s.wantKind("write after close", s.dev.WriteAt(s.ctx, p, 0, 0), block.KindClosed)
		s.wantKind("zero after close", s.dev.Zero(s.ctx, 0, s.bs(), 0), block.KindClosed)
		s.wantKind("trim after close", s.dev.Trim(s.ctx, 0, s.bs(), 0), block.KindClosed)
	}
}
