package journal

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"forerun/block"
	"forerun/block/blocktest"
	"forerun/disk"
	"forerun/disk/disktest"
)

// file is a device in a file of the same crashing disk: what was not flushed
// may be lost or torn, like a volume's overlay.
type file struct {
	f    disk.File
	size int64
	path string
}

func newFile(fs disk.FS, path string, size int64) (*file, error) {
	f, err := fs.Open(path, disk.Write|disk.Create)
	if err != nil {
		return nil, err
	}
	if err = f.Allocate(0, size); err == nil {
		if err = f.Sync(); err == nil {
			err = fs.SyncDir(filepath.Dir(path))
		}
	}
	return &file{f, size, path}, err
}

func (d *file) wrap(op string, err error) error {
	if err != nil {
		return block.E("file."+op, d.path, 0, err)
	}
	return nil
}
func (d *file) Info() block.Info { return block.Info{Size: d.size, BlockSize: 512} }
func (d *file) ReadAt(_ context.Context, p []byte, off int64, _ block.Flags) error {
	_, err := d.f.ReadAt(p, off)
	if err == io.EOF {
		err = nil
	}
	return d.wrap("read", err)
}
func (d *file) WriteAt(_ context.Context, p []byte, off int64, _ block.Flags) error {
	_, err := d.f.WriteAt(p, off)
	return d.wrap("write", err)
}
func (d *file) Zero(ctx context.Context, off, n int64, _ block.Flags) error {
	return d.WriteAt(ctx, make([]byte, n), off, 0)
}
func (d *file) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	return d.Zero(ctx, off, n, f)
}
func (d *file) Flush(context.Context, block.Flags) error {
	if err := d.f.Sync(); err != nil { // whatever the cause: pages may be lost
		return block.E("file.flush", d.path, block.KindIO, err)
	}
	return nil
}
func (d *file) Extents(_ context.Context, dst []block.Extent, off, n int64, _ block.Flags) ([]block.Extent, error) {
	return append(dst, block.Extent{Off: off, Len: n}), nil
}
func (d *file) Prefetch(context.Context, int64, int64, block.Flags) error { return nil }
func (d *file) Close() error                                              { return d.f.Close() }

const (
	volSize = 96 << 10
	sector  = 512
)

// oracle knows for each sector which values it may hold. A value is the byte
// that fills it; a power cut may tear a sector, so each byte counts by itself.
type oracle struct {
	// now: the last acknowledged value, then those of failed writes since.
	// cut: the flushed value, then every value written since, acknowledged or not.
	now, cut [volSize / sector][]byte
	pending  [volSize / sector]int    // entries of cut that were there when the flush began
	ever     [volSize / sector][]byte // every value begun
	mu       sync.Mutex
}

func newOracle() *oracle {
	o := &oracle{}
	for i := range o.now {
		o.now[i], o.cut[i] = []byte{0}, []byte{0}
	}
	return o
}

func (o *oracle) begin(off, n int64, v byte) { // from here the write may be seen
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := off / sector; i < (off+n)/sector; i++ {
		o.now[i] = append(o.now[i], v)
		o.cut[i] = append(o.cut[i], v)
		o.ever[i] = append(o.ever[i], v)
	}
}

func (o *oracle) acked(off, n int64, v byte, fua bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := off / sector; i < (off+n)/sector; i++ {
		o.now[i] = []byte{v}
		if fua {
			o.cut[i] = []byte{v}
		}
	}
}

func (o *oracle) flushing() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := range o.cut {
		o.pending[i] = len(o.cut[i])
	}
}

func (o *oracle) flushed() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := range o.cut {
		// Of what was there, only the last acknowledged value and failed ones after it remain.
		keep := append([]byte(nil), o.now[i]...)
		o.cut[i] = append(keep, o.cut[i][o.pending[i]:]...)
	}
}

func (o *oracle) clone() *oracle {
	o.mu.Lock()
	defer o.mu.Unlock()
	c := &oracle{}
	for i := range o.now {
		c.now[i] = append([]byte(nil), o.now[i]...)
		c.cut[i] = append([]byte(nil), o.cut[i]...)
		c.ever[i] = append([]byte(nil), o.ever[i]...)
	}
	return c
}

// around takes an image of the disk and what it may hold, while writes may be
// under way in another goroutine: what was promised before, and what was begun
// until after.
func (o *oracle) around(image func() *disktest.FS) (*disktest.FS, *oracle) {
	before := o.clone()
	fs := image()
	after := o.clone()
	for i := range before.cut {
		before.cut[i] = append(before.cut[i], after.ever[i][len(before.ever[i]):]...)
	}
	return fs, before
}

func (o *oracle) check(got []byte, afterCut bool) error {
	for i := range o.now {
		allowed := o.now[i]
		if afterCut {
			allowed = o.cut[i]
		}
		var may [256]bool
		for _, v := range allowed {
			may[v] = true
		}
		for k, b := range got[i*sector : (i+1)*sector] {
			if !may[b] {
				return fmt.Errorf("sector %d byte %d is %#x, allowed are %x", i, k, b, allowed)
			}
		}
	}
	return nil
}

// workload does ops random changes on a journal over a volume, both on fs.
// Calls that fail are allowed; the oracle knows them. With crashOptions it is
// deterministic: checkpoints are made by call.
func workload(fs *disktest.FS, seed uint64, ops int, o *oracle, opt Options) (*Journal, error) {
	vol, err := newFile(fs, "/vol", volSize)
	if err != nil {
		return nil, err
	}
	j, err := Open(fs, "/journal", vol, opt)
	if err != nil {
		return nil, err
	}
	r := rand.New(rand.NewPCG(seed, 11))
	for i := range ops {
		off := r.Int64N(volSize/sector) * sector
		n := min((1+r.Int64N(30))*sector, volSize-off)
		v := byte(1 + i%255)
		switch k := r.IntN(16); {
		case k < 3:
			o.flushing()
			if j.Flush(bg, 0) == nil {
				o.flushed()
			}
		case k == 3 && r.IntN(2) == 0:
			j.Checkpoint(bg)
		case k == 4:
			o.begin(off, n, 0)
			if j.Zero(bg, off, n, block.MayTrim) == nil {
				o.acked(off, n, 0, false)
			}
		default:
			p := make([]byte, n)
			for i := range p {
				p[i] = v
			}
			fua := block.Flags(0)
			if k == 5 {
				fua = block.FUA
			}
			o.begin(off, n, v)
			if j.WriteAt(bg, p, off, fua) == nil {
				o.acked(off, n, v, fua != 0) // only this range is promised
			}
		}
	}
	return j, nil
}

var crashOptions = Options{SegmentBytes: 64 << 10, MaxBytes: 8 << 20, CheckpointBytes: 1 << 30, CheckpointInterval: 1 << 40, InFlight: 8}

// reread opens what a crash left and returns the volume's bytes.
func reread(fs *disktest.FS) ([]byte, error) {
	vol, err := newFile(fs, "/vol", volSize)
	if err != nil {
		return nil, err
	}
	j, err := Open(fs, "/journal", vol, crashOptions)
	if err != nil {
		return nil, err
	}
	defer j.Close()
	got := make([]byte, volSize)
	return got, j.ReadAt(bg, got, 0, 0)
}

// TestPowerCutAtEverySync takes the disk away at each sync, before it takes
// effect, and in every write after it, and looks what is left.
func TestPowerCutAtEverySync(t *testing.T) {
	for seed := range uint64(6) {
		fs := disktest.New(seed)
		o := newOracle()
		opt := crashOptions
		if seed%2 == 1 { // the keeper makes checkpoints meanwhile
			opt.MaxBytes, opt.CheckpointBytes = 512<<10, 64<<10
		}
		type cut struct {
			fs *disktest.FS
			o  *oracle
			at string
		}
		var mu sync.Mutex
		var cuts []cut
		fs.OnCall(func(n int64, op disktest.Op) {
			if op&disktest.Syncs != 0 || n%11 == int64(seed) {
				for s := range uint64(2) {
					img, can := o.around(func() *disktest.FS { return fs.Image(s + uint64(n)<<8) })
					mu.Lock()
					cuts = append(cuts, cut{img, can, fmt.Sprintf("call %d (%v) image %d", n, op, s)})
					mu.Unlock()
				}
			}
		})
		j, err := workload(fs, seed, 90, o, opt)
		if err != nil {
			t.Fatal(err)
		}
		j.Close()
		fs.OnCall(nil)
		for _, c := range cuts {
			if strings.HasPrefix(c.at, "call 1 ") || strings.HasPrefix(c.at, "call 2 ") {
				continue // the volume itself is not made yet
			}
			got, err := reread(c.fs)
			if err == nil {
				err = c.o.check(got, true)
			}
			if err == nil { // a second power cut right after the restart
				var again []byte
				if again, err = reread(c.fs.Crash()); err == nil {
					if err = c.o.check(again, true); err == nil && string(again) != string(got) {
						err = errors.New("a second power cut gives another content")
					}
				}
			}
			if err != nil {
				t.Fatalf("seed %d, %s: %v\n%s", seed, c.at, err, c.fs.Trace())
			}
		}
		t.Logf("seed %d: %d power cuts", seed, len(cuts))
	}
}

// TestEveryCallFails lets call N fail, once or for ever, then kills the process
// or cuts the power: what was acknowledged or flushed is there.
func TestEveryCallFails(t *testing.T) {
	for _, e := range []error{syscall.EIO, syscall.ENOSPC} {
		for _, lasting := range []bool{false, true} {
			name := fmt.Sprintf("%v lasting=%v", e, lasting)
			failed, refused, rescued := 0, 0, 0
			step := int64(3)
			if e == syscall.EIO && !lasting {
				step = 1
			}
			for n := int64(1); ; n += step {
				opt := crashOptions
				if n%2 == 1 { // the keeper makes checkpoints meanwhile
					opt.MaxBytes, opt.CheckpointBytes = 512<<10, 64<<10
				}
				fs := disktest.New(uint64(n))
				o := newOracle()
				fs.Fail(disktest.Fault{At: n, Err: e, Lasting: lasting})
				j, err := workload(fs, uint64(n%5), 60, o, opt)
				hit := fs.Failed()
				fs.Fail(disktest.Fault{})
				if err != nil {
					if n > 20 {
						t.Fatalf("%s at call %d: open: %v", name, n, err)
					}
					continue
				}
				if !hit && n > 150 {
					j.Close()
					t.Logf("%s: %d calls, %d journals failed, %d appends refused, %d rescues", name, n, failed, refused, rescued)
					break
				}
				s := j.Stats()
				if strings.HasPrefix(s.Waiting, "failed") {
					failed++
				}
				refused += int(s.Refused)
				rescued += int(s.Rescues)
				live := make([]byte, volSize)
				if err := j.ReadAt(bg, live, 0, 0); err != nil {
					t.Fatal(err)
				}
				if err := o.check(live, false); err != nil {
					t.Fatalf("%s at call %d, alive: %v", name, n, err)
				}
				cut := fs.Image(uint64(n))
				killed := fs.Kill()
				got, err := reread(killed)
				if err == nil {
					err = o.check(got, false)
				}
				if err != nil {
					t.Fatalf("%s at call %d, killed: %v\n%s", name, n, err, fs.Trace())
				}
				if got, err = reread(cut); err == nil {
					err = o.check(got, true)
				}
				if err != nil {
					t.Fatalf("%s at call %d, power cut: %v\n%s", name, n, err, fs.Trace())
				}
			}
		}
	}
}

// TestFullDisk fills the disk: writes are refused, nothing breaks, and they
// succeed when there is space again.
func TestFullDisk(t *testing.T) {
	fs := disktest.New(1)
	vol := blocktest.NewTwin(1<<20, 512)
	opt := crashOptions
	fs.SetCapacity(140 << 10) // two segments and not one more
	j, err := Open(fs, "/journal", vol, opt)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 8<<10)
	for i := range 100 { // recycles what it has: nothing is refused
		p[0] = byte(i)
		if err := j.WriteAt(bg, p, int64(i)*int64(len(p)), 0); err != nil {
			t.Fatal(i, err)
		}
	}
	j.Close()

	fs = disktest.New(2)
	fs.SetCapacity(72 << 10) // one segment only
	vol = blocktest.NewTwin(1<<20, 512)
	if j, err = Open(fs, "/journal", vol, opt); err != nil {
		t.Fatal(err)
	}
	var refused error
	i := 0
	for ; i < 100 && refused == nil; i++ {
		refused = j.WriteAt(bg, p, int64(i)*int64(len(p)), 0)
	}
	if block.KindOf(refused) != block.KindNoSpace {
		t.Fatalf("write %d: %v, no space expected", i, refused)
	}
	if err := j.Flush(bg, 0); err != nil {
		t.Fatal(err)
	}
	fs.SetCapacity(0)
	if err := j.WriteAt(bg, p, 0, block.FUA); err != nil {
		t.Fatal("with space again:", err)
	}
	j.Close()
	if j, err = Open(fs.Crash(), "/journal", blocktest.NewTwin(1<<20, 512), opt); err != nil {
		t.Fatal(err)
	}
	j.Close()
}

// TestHoldGivesWay: on a full disk a hold is given up before a write is refused.
func TestHoldGivesWay(t *testing.T) {
	fs := disktest.New(1)
	opt := crashOptions
	opt.MaxBytes = 64 << 20 // the hold is far from keeping half of it
	fs.SetCapacity(300 << 10)
	j, err := Open(fs, "/journal", blocktest.NewTwin(1<<20, 512), opt)
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	if err := j.Hold("writeback", j.Position()); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 8<<10)
	for i := range 100 {
		err := j.WriteAt(bg, p, int64(i)*int64(len(p)), 0)
		for try := 0; block.KindOf(err) == block.KindNoSpace && try < 3; try++ { // who waits for space tries again
			err = j.WriteAt(bg, p, int64(i)*int64(len(p)), 0)
		}
		if err != nil {
			t.Fatal(i, err)
		}
	}
	if _, held := j.Held("writeback"); held {
		t.Error("the hold stands although the disk is smaller than what it keeps")
	}
	if n := j.Stats().BrokenHolds; n != 1 {
		t.Errorf("%d holds were given up", n)
	}
}

// TestDamage flips a byte in what was flushed: the journal is not opened; in
// what was not, the log ends there.
func TestDamage(t *testing.T) {
	build := func() (*disktest.FS, *Journal) {
		fs := disktest.New(3)
		j, err := Open(fs, "/journal", blocktest.NewTwin(1<<20, 512), crashOptions)
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 4096)
		for i := range 40 { // three segments
			if err := j.WriteAt(bg, p, int64(i)*4096, 0); err != nil {
				t.Fatal(err)
			}
			if i == 30 {
				if err := j.Flush(bg, 0); err != nil {
					t.Fatal(err)
				}
			}
		}
		return fs, j
	}
	for _, c := range []struct {
		name string
		seg  int
		off  int64
		kind block.Kind
	}{
		{"a record of the first segment", 0, segHeader + 5000, block.KindCorrupt},
		{"the header of the first segment", 0, 40, block.KindCorrupt},
		{"a flushed record of the last", -1, segHeader + 4152 + 100, block.KindCorrupt},
		{"an unflushed record", -1, segHeader + 9*4152 + 100, block.KindNone},
	} {
		fs, j := build()
		segs := j.segs
		s := segs[(c.seg+len(segs))%len(segs)]
		j.Close()
		fs.Flip(s.path, c.off)
		j, err := Open(fs, "/journal", blocktest.NewTwin(1<<20, 512), crashOptions)
		if block.KindOf(err) != c.kind {
			t.Errorf("%s: %v", c.name, err)
		}
		if err == nil {
			j.Close()
		}
	}
}

// TestSyncFailsThenBelowToo: the flush fails, and the journal stays failed until
// it is opened again.
func TestSyncFailsThenBelowToo(t *testing.T) {
	fs := disktest.New(4)
	twin := blocktest.NewTwin(1<<20, 512)
	below := blocktest.Fail(twin)
	j, err := Open(fs, "/journal", below, crashOptions)
	if err != nil {
		t.Fatal(err)
	}
	p := []byte(strings.Repeat("x", 4096))
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(j.WriteAt(bg, p, 0, 0))
	fs.Fail(disktest.Fault{At: 1, Ops: disktest.OpSync, Err: syscall.EIO})
	must(j.Flush(bg, 0)) // answered by flushing below
	if s := j.Stats(); s.Rescues != 1 || s.SyncFailures != 1 || twin.Durable()[0] != 'x' {
		t.Fatalf("%+v", s)
	}
	must(j.WriteAt(bg, p, 4096, 0))
	fs.Fail(disktest.Fault{At: 1, Ops: disktest.OpSync, Err: syscall.EIO})
	below.Always("flush", block.KindIO)
	if err := j.Flush(bg, 0); block.KindOf(err) != block.KindIO {
		t.Fatal(err)
	}
	fs.Fail(disktest.Fault{})
	below.Set(nil)
	if err := j.Flush(bg, 0); block.KindOf(err) != block.KindIO {
		t.Fatal("a failed journal flushed:", err)
	}
	if err := j.WriteAt(bg, p, 0, 0); block.KindOf(err) != block.KindIO {
		t.Fatal("a failed journal wrote:", err)
	}
	must(j.ReadAt(bg, p, 0, 0))
	j.Close()
	j, err = Open(fs.Kill(), "/journal", twin, crashOptions)
	if err == nil {
		j.Close()
	}
	if k := block.KindOf(err); err != nil && k != block.KindClosed { // the twin was closed with the journal
		t.Fatal(err)
	}
}

// TestBackPressure: a device below that is slow to flush makes writers wait, it
// does not make the journal grow; and a ctx ends the wait.
func TestBackPressure(t *testing.T) {
	fs := disktest.New(5)
	gate := make(chan struct{})
	var shut bool
	below := blocktest.Hook(blocktest.NewTwin(1<<20, 512), func(ctx context.Context, c blocktest.Call) error {
		if c.Op == "flush" && shut {
			<-gate
		}
		return nil
	})
	opt := crashOptions
	opt.MaxBytes = 256 << 10 // four segments
	j, err := Open(fs, "/journal", below, opt)
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	shut = true
	p := make([]byte, 8<<10)
	ctx, cancel := context.WithTimeout(bg, 300*time.Millisecond)
	defer cancel()
	for err == nil {
		err = j.WriteAt(ctx, p, 0, 0)
	}
	if block.KindOf(err) != block.KindCanceled {
		t.Fatal(err)
	}
	s := j.Stats()
	if s.Retained > opt.MaxBytes || s.Waits == 0 {
		t.Fatalf("%+v", s)
	}
	close(gate)
	if err := j.WriteAt(bg, p, 0, 0); err != nil {
		t.Fatal(err)
	}
}

// TestHoldsAndReader: what is held can be read after checkpoints and a restart.
func TestHoldsAndReader(t *testing.T) {
	fs := disktest.New(6)
	opt := crashOptions
	opt.MaxBytes = 4 << 20
	openIt := func(fs *disktest.FS) *Journal {
		j, err := Open(fs, "/journal", blocktest.NewTwin(1<<20, 512), opt)
		if err != nil {
			t.Fatal(err)
		}
		return j
	}
	write := func(j *Journal, i int) {
		p := []byte(strings.Repeat(string(rune('a'+i%26)), 4096))
		if err := j.WriteAt(bg, p, int64(i%200)*4096, 0); err != nil {
			t.Fatal(err)
		}
	}
	j := openIt(fs)
	write(j, 0)
	from := j.Position()
	if err := j.Hold("replica", from); err != nil {
		t.Fatal(err)
	}
	for i := 1; i < 60; i++ {
		write(j, i)
		if i%10 == 0 {
			if err := j.Checkpoint(bg); err != nil {
				t.Fatal(err)
			}
		}
	}
	j.Close()
	j = openIt(fs.Kill())
	for i := 60; i < 70; i++ {
		write(j, i)
	}
	r, err := j.Reader(from)
	if err != nil {
		t.Fatal(err)
	}
	for i := 1; i < 70; i++ {
		rec, err := r.Next(bg)
		if err != nil {
			t.Fatal(i, err)
		}
		if rec.Type != TypeWrite || rec.Off != int64(i%200)*4096 || rec.Payload[7] != byte('a'+i%26) || rec.Sequence != uint64(i+1) {
			t.Fatalf("record %d is %v %d %q", i, rec.Position, rec.Off, rec.Payload[:4])
		}
	}
	if r.Position() != j.Position() {
		t.Fatal(r.Position(), j.Position())
	}
	go func() { time.Sleep(20 * time.Millisecond); write(j, 70) }()
	if rec, err := r.Next(bg); err != nil || rec.Sequence != 71 {
		t.Fatal(rec.Position, err)
	}
	if _, err := j.Reader(Position{from.Sequence, from.Checksum + 1}); block.KindOf(err) != block.KindCorrupt {
		t.Fatal(err)
	}
	r.Close()
	if err := j.Release("replica"); err != nil {
		t.Fatal(err)
	}
	if err := j.Checkpoint(bg); err != nil {
		t.Fatal(err)
	}
	if _, err := j.Reader(from); block.KindOf(err) != block.KindNotFound {
		t.Fatal(err)
	}
	if s := j.Stats(); s.Segments != 1 {
		t.Fatalf("%+v", s)
	}
	j.Close()
	for _, err := range []error{j.Hold("replica", from), j.Release("replica")} {
		if block.KindOf(err) != block.KindClosed {
			t.Fatal(err)
		}
	}
}

var update = flag.Bool("update", false, "write the golden files")

// TestSyncOrder compares the order of calls on the disk with a reviewed one.
func TestSyncOrder(t *testing.T) {
	fs := disktest.New(7)
	j, err := Open(fs, "/journal", blocktest.NewTwin(1<<20, 512), crashOptions)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 4096)
	for i := range 16 { // one segment and a bit
		if err := j.WriteAt(bg, p, int64(i)*4096, 0); err != nil {
			t.Fatal(err)
		}
	}
	for _, do := range []func() error{
		func() error { return j.Flush(bg, 0) },
		func() error { return j.WriteAt(bg, p, 0, block.FUA) },
		func() error { return j.Hold("replica", j.Position()) },
		func() error { return j.Checkpoint(bg) },
		func() error { return j.Release("replica") },
		j.Close,
	} {
		if err := do(); err != nil {
			t.Fatal(err)
		}
	}
	got := fs.Trace()
	golden := filepath.Join("testdata", "sync-order.txt")
	if *update {
		os.MkdirAll("testdata", 0o777)
		if err := os.WriteFile(golden, []byte(got), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the order of calls changed; review it and run with -update:\n%s", got)
	}
}

// stays is a device that outlives the journals above it.
type stays struct{ block.Device }

func (stays) Close() error { return nil }

// TestSuite is the suite each device passes.
func TestSuite(t *testing.T) {
	fs, below := disktest.New(1), block.Device(nil)
	open := func(t *testing.T) block.Device {
		j, err := Open(fs, "/journal", below, Options{SegmentBytes: 4 << 20})
		if err != nil {
			t.Fatal(err)
		}
		return block.NewChecked("journal", j)
	}
	blocktest.Test(t, func(t *testing.T) block.Device {
		fs, below = disktest.New(1), stays{blocktest.NewTwin(4<<20, 512)}
		return open(t)
	}, blocktest.Options{Reopen: func(t *testing.T, dev block.Device) block.Device {
		dev.Close()
		fs = fs.Crash()
		return open(t)
	}})
}
