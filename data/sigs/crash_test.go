package sigs

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"syscall"
	"testing"

	"forerun/disk"
	"forerun/disk/disktest"
	"forerun/internal/chunk"
)

const (
	twinChunks = 600 // five pages, the last one not whole
	tableName  = "/state/sigs"
)

// twin is a source whose chunks are eight bytes each, with a counter as its
// change state.
type twin struct {
	now, safe []uint64
	at, sure  int // the change state, and the one on the platter
	clock     *int
}

func newTwin() *twin {
	return &twin{now: make([]uint64, twinChunks), safe: make([]uint64, twinChunks), at: 1, sure: 1, clock: new(int)}
}

func (s *twin) state() string { return strconv.Itoa(s.at) }

func (s *twin) write(i int64, v uint64) {
	*s.clock++
	s.now[i], s.at = v, 1+*s.clock
}

func (s *twin) flush() {
	copy(s.safe, s.now)
	s.sure = s.at
}

func (s *twin) clone() *twin {
	c := *s
	c.now, c.safe = slices.Clone(s.now), slices.Clone(s.safe)
	return &c
}

// cut is what is left of the source when the power is cut: of what was not
// flushed any bytes. If it lags, its change state may be that of the last flush
// even where the bytes are newer.
func (s *twin) cut(r *rand.Rand, lags bool) *twin {
	c := s.clone()
	luck := r.IntN(3)
	for i := range c.now {
		var mask uint64
		for b := range 8 {
			if luck == 0 || luck == 1 && r.IntN(2) == 0 {
				mask |= 0xff << (8 * b)
			}
		}
		c.now[i] = c.now[i]&^mask | c.safe[i]&mask
	}
	if lags && r.IntN(2) == 0 {
		c.at = c.sure
	}
	c.flush()
	return c
}

func sumOf(v uint64) chunk.Sig {
	return chunk.Sum(binary.LittleEndian.AppendUint64(nil, v))
}

func kindOf(v uint64) (Kind, chunk.Sig) {
	if v == 0 {
		return Zero, chunk.Sig{}
	}
	return Data, sumOf(v)
}

// check compares what the table says of chunk i with the source.
func (s *twin) check(t *Table, i int64) (known bool, err error) {
	kind, sig := t.Get(i)
	if kind == Unknown {
		return false, nil
	}
	if k, want := kindOf(s.now[i]); k != kind || sig != want {
		return true, fmt.Errorf("chunk %d holds %#x; the table says %s %s", i, s.now[i], kind, sig)
	}
	return true, nil
}

func (s *twin) checkAll(t *Table) (known int64, err error) {
	for i := range int64(len(s.now)) {
		k, err := s.check(t, i)
		if err != nil {
			return known, err
		}
		if k {
			known++
		}
	}
	if data, zero := t.Known(); data+zero != known && t.Stats().Off == "" {
		return known, fmt.Errorf("%d chunks are known, %d and %d are counted", known, data, zero)
	}
	return known, nil
}

func openTwin(tb testing.TB, fs disk.FS, s *twin) *Table {
	tb.Helper()
	s.flush()
	t, err := Open(fs, tableName, Options{Chunks: int64(len(s.now)), ChunkBytes: 8, Params: "fixed", State: s.state()})
	if err != nil {
		tb.Fatal(err)
	}
	return t
}

// life does random things with a table until n are done.
type life struct {
	r    *rand.Rand
	t    *Table
	s    *twin
	fs   disk.FS
	open []func() // changes under way
	busy map[int64]bool
}

func (l *life) span() (first, n int64) {
	first = l.r.Int64N(twinChunks)
	switch l.r.IntN(4) {
	case 0: // whole pages
		first = first / perPage * perPage
		n = perPage * (1 + l.r.Int64N(3))
	case 1:
		n = 1 + l.r.Int64N(300)
	default:
		n = 1 + l.r.Int64N(4)
	}
	return first, min(n, twinChunks-first)
}

// put writes to the source, mostly zeros when there is much to write.
func (l *life) put(first, n int64) {
	zeros := l.r.IntN(3) == 0
	for i := first; i < first+n; i++ {
		if v := l.r.Uint64(); zeros {
			l.s.write(i, 0)
		} else {
			l.s.write(i, v|1)
		}
	}
}

func (l *life) end() {
	for _, done := range l.open {
		done()
	}
	l.open, l.busy = nil, map[int64]bool{}
}

func (l *life) settle() (string, error) {
	if l.r.IntN(6) == 0 { // not so quiet a moment
		first, n := l.span()
		done := l.t.Change(first, n)
		l.put(first, n)
		done()
		if l.r.IntN(2) == 0 {
			l.s.flush()
		}
		return l.s.state(), nil
	}
	l.s.flush()
	return l.s.state(), nil
}

func (l *life) step() error {
	switch k := l.r.IntN(24); {
	case k < 7: // learn some in a row
		first, n := l.span()
		facts := make([]fact, 0, n)
		for i := first; i < first+n; i++ {
			kind, sig := kindOf(l.s.now[i])
			facts = append(facts, fact{l.t.Token(i), kind, sig})
		}
		if l.r.IntN(4) == 0 { // too late
			at, m := l.span()
			done := l.t.Change(at, m)
			l.put(at, m)
			done()
		}
		l.t.learn(first, facts)
	case k < 9:
		i := l.r.Int64N(twinChunks)
		kind, sig := kindOf(l.s.now[i])
		if !l.t.Learn(i, l.t.Token(i), kind, sig) && len(l.open) == 0 && l.t.Stats().Off == "" {
			return fmt.Errorf("chunk %d was not learned", i)
		}
	case k < 12: // a run of zeros
		tokens := l.t.tokens()
		i := l.r.Int64N(twinChunks)
		for i > 0 && l.s.now[i-1] == 0 {
			i--
		}
		n := int64(0)
		for i+n < twinChunks && l.s.now[i+n] == 0 {
			n++
		}
		l.t.learnZeros(i, n, tokens)
	case k < 15:
		first, n := l.span()
		done := l.t.Change(first, n)
		for i := first; i < first+n; i++ {
			if kind, _ := l.t.Get(i); kind != Unknown {
				return fmt.Errorf("chunk %d is being changed and %s", i, kind)
			}
		}
		l.put(first, n)
		if l.r.IntN(5) > 0 {
			done()
			break
		}
		l.open = append(l.open, done)
		for i := first; i < first+n; i++ {
			l.busy[i] = true
		}
	case k < 16: // under way still: anything may happen to them
		for i := range l.busy {
			l.s.write(i, l.r.Uint64())
		}
	case k < 17:
		l.end()
	case k < 18:
		l.s.flush()
	case k < 20:
		if l.r.IntN(2) == 0 {
			l.end()
		}
		if _, err := l.t.Settle(l.settle); err != nil {
			return err
		}
	case k < 21:
		l.t.save()
	case k < 22:
		l.t.nextUnknown(l.r.Int64N(twinChunks))
	case k < 23 && l.r.IntN(3) == 0:
		l.end()
		if err := l.t.Close(l.settle); err != nil {
			return err
		}
		l.t = openTwin(panics{}, l.fs, l.s)
	}
	for range 4 {
		if _, err := l.s.check(l.t, l.r.Int64N(twinChunks)); err != nil {
			return err
		}
	}
	return nil
}

// seedCount is how many seeds a test goes through: FORERUN_SEEDS, or what takes a second.
func seedCount(t *testing.T) uint64 {
	t.Helper()
	if s := os.Getenv("FORERUN_SEEDS"); s != "" {
		n, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if testing.Short() || racing {
		return 30
	}
	return 150
}

// TestAnyCrash lives many lives, one after the other, each cut short at any call
// or between two; what the next one is told must be true of the source.
func TestAnyCrash(t *testing.T) {
	seeds := seedCount(t)
	kept, full := 0, 0
	for seed := range seeds {
		r := rand.New(rand.NewPCG(seed, 77))
		fs, s := disktest.New(seed), newTwin()
		for n := range 12 {
			l := &life{r: r, s: s, fs: fs, busy: map[int64]bool{}}
			var (
				next    *disktest.FS
				left    *twin
				powered = r.IntN(3) > 0
			)
			crash := func() {
				if powered {
					next, left = fs.Crash(), s.cut(r, true)
				} else {
					next, left = fs.Kill(), s.clone()
				}
			}
			at := int64(-1)
			if r.IntN(3) > 0 {
				at = 1 + r.Int64N(120)
			}
			base := fs.Calls()
			fs.OnCall(func(k int64, _ disktest.Op) {
				if k-base == at {
					crash()
				}
			})
			l.t = openTwin(t, fs, s)
			known, err := s.checkAll(l.t)
			if err != nil {
				t.Fatalf("seed %d life %d, opened: %v\n%s", seed, n, err, fs.Trace())
			}
			if n > 0 && known > 0 {
				kept++
			}
			if known > twinChunks/2 {
				full++
			}
			for i := 0; next == nil && i < 10+r.IntN(60); i++ {
				if err := l.step(); err != nil && next == nil {
					t.Fatalf("seed %d life %d step %d: %v\n%s", seed, n, i, err, fs.Trace())
				}
			}
			if next == nil {
				if r.IntN(8) == 0 {
					l.end()
					if err := l.t.Close(l.settle); err != nil {
						t.Fatal(err)
					}
				}
				if next == nil {
					crash()
				}
			}
			fs, s = next, left
		}
	}
	t.Logf("%d of %d lives knew something of the one before, %d more than half", kept, seeds*11, full)
	if kept < int(seeds) || full == 0 {
		t.Errorf("only %d of %d lives knew something of the one before, %d more than half", kept, seeds*11, full)
	}
}

// TestAnyFault makes calls of the file fail: nothing is told to whom writes the
// source, and nothing wrong is ever believed.
func TestAnyFault(t *testing.T) {
	seeds := seedCount(t)
	off := 0
	for seed := range seeds {
		r := rand.New(rand.NewPCG(seed, 78))
		fs, s := disktest.New(seed), newTwin()
		for n := range 8 {
			l := &life{r: r, s: s, fs: fs, busy: map[int64]bool{}}
			fault := disktest.Fault{At: 1 + r.Int64N(60), Err: syscall.EIO, Lasting: r.IntN(2) == 0}
			switch r.IntN(4) {
			case 0:
				fault.Ops = disktest.OpRead
			case 1:
				fault.Ops = disktest.OpWrite
				fault.Err = syscall.ENOSPC
			case 2:
				fault.Ops = disktest.Syncs
			}
			fs.Fail(fault)
			l.t = openTwin(t, fs, s)
			if _, err := s.checkAll(l.t); err != nil {
				t.Fatalf("seed %d life %d, opened: %v\n%s", seed, n, err, fs.Trace())
			}
			for i := range 10 + r.IntN(60) {
				if err := l.step(); err != nil {
					t.Fatalf("seed %d life %d step %d: %v\n%s", seed, n, i, err, fs.Trace())
				}
			}
			if st := l.t.Stats(); st.Off != "" {
				off++
				if known, _ := s.checkAll(l.t); known > 0 || st.Data+st.Zero > 0 || l.t.nextUnknown(0) != twinChunks {
					t.Fatalf("seed %d: a table that is off knows %d chunks: %+v", seed, known, st)
				}
			}
			if r.IntN(3) == 0 {
				l.end()
				if err := l.t.Close(l.settle); err != nil {
					t.Fatal(err)
				}
			}
			if r.IntN(2) == 0 {
				fs, s = fs.Crash(), s.cut(r, false)
			} else {
				fs = fs.Kill()
				s = s.clone()
			}
		}
	}
	if off < int(seeds) {
		t.Errorf("only %d tables were turned off", off)
	}
}

// panics is a testing.TB for a place that has none.
type panics struct{ testing.TB }

func (panics) Helper()        {}
func (panics) Fatal(a ...any) { panic(fmt.Sprint(a...)) }
