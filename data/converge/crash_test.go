package converge

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"time"

	"forerun/block"
	"forerun/disk/disktest"
)

const (
	volSize = 64 << 10
	sector  = 512
)

// oracle knows for each sector which values it may hold. A value is the byte
// that fills it; a power cut may tear a sector, so each byte counts by itself.
type oracle struct {
	mu sync.Mutex
	// now: the last acknowledged value, then those begun since. cut: the flushed
	// value, then every value begun since. ever: every value begun.
	now, cut, ever [volSize / sector][]byte
	pending        [volSize / sector]int
}

func newOracle() *oracle {
	o := &oracle{}
	for i := range o.now {
		o.now[i], o.cut[i] = []byte{0}, []byte{0}
	}
	return o
}

func (o *oracle) each(off, n int64, f func(i int64)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := off / sector; i < (off+n)/sector; i++ {
		f(i)
	}
}

func (o *oracle) begin(off, n int64, v byte) {
	o.each(off, n, func(i int64) {
		o.now[i], o.cut[i], o.ever[i] = append(o.now[i], v), append(o.cut[i], v), append(o.ever[i], v)
	})
}

func (o *oracle) acked(off, n int64, v byte, fua bool) {
	o.each(off, n, func(i int64) {
		o.now[i] = []byte{v}
		if fua {
			o.cut[i] = []byte{v}
		}
	})
}

func (o *oracle) flushing() { o.each(0, volSize, func(i int64) { o.pending[i] = len(o.cut[i]) }) }
func (o *oracle) flushed() {
	o.each(0, volSize, func(i int64) {
		o.cut[i] = append(bytes.Clone(o.now[i]), o.cut[i][o.pending[i]:]...)
	})
}

// around takes an image of the disk and says what it may hold, while writes may
// be under way: what was promised before, and what was begun until after.
func (o *oracle) around(image func() *disktest.FS) (*disktest.FS, *oracle) {
	before := newOracle()
	o.each(0, volSize, func(i int64) {
		before.now[i], before.cut[i], before.pending[i] = bytes.Clone(o.now[i]), bytes.Clone(o.cut[i]), len(o.ever[i])
	})
	fs := image()
	o.each(0, volSize, func(i int64) {
		more := o.ever[i][before.pending[i]:]
		before.now[i], before.cut[i] = append(before.now[i], more...), append(before.cut[i], more...)
	})
	return fs, before
}

func (o *oracle) check(got []byte, cut bool) error {
	for i := range o.now {
		allowed := o.now[i]
		if cut {
			allowed = o.cut[i]
		}
		for k, b := range got[i*sector : (i+1)*sector] {
			if bytes.IndexByte(allowed, b) < 0 {
				return fmt.Errorf("sector %d byte %d is %#x, allowed are %x", i, k, b, allowed)
			}
		}
	}
	return nil
}

// workload writes before, during and after a cut-over. What fails is known to
// the oracle. The writer goes on until the job has ended and some more.
// When dead ends (the disk is no more), whoever waits at a closed gate is let go.
func workload(fs *disktest.FS, seed uint64, o *oracle, dead context.Context) (*stack, State, error) {
	s, err := build(fs, volSize, "a")
	if err != nil {
		return nil, Failed, err
	}
	defer context.AfterFunc(dead, func() { s.sw.Close() })()
	ended := make(chan struct{})
	r := rand.New(rand.NewPCG(seed, 5))
	write := func(i int) {
		off := r.Int64N(volSize/sector) * sector
		n := min((1+r.Int64N(16))*sector, volSize-off)
		v := byte(1 + i%255)
		switch k := r.IntN(10); k {
		case 0, 1:
			o.flushing()
			if s.sw.Flush(bg, 0) == nil {
				o.flushed()
			}
		case 2:
			o.begin(off, n, 0)
			if s.sw.Zero(bg, off, n, block.MayTrim) == nil {
				o.acked(off, n, 0, false)
			}
		default:
			var f block.Flags
			if k == 3 {
				f = block.FUA
			}
			o.begin(off, n, v)
			if s.sw.WriteAt(bg, bytes.Repeat([]byte{v}, int(n)), off, f) == nil {
				o.acked(off, n, v, f != 0)
			}
		}
	}
	i := 0
	for ; i < 25; i++ {
		write(i)
	}
	state := Failed
	go func() {
		defer close(ended)
		for range 10 {
			if state, err = s.job.Run(bg, Request{Target: "/target", Threshold: 4 * grain}); state != NotConverging {
				break
			}
		}
	}()
	for more := 15; more > 0; i++ {
		write(i)
		time.Sleep(50 * time.Microsecond) // lets the copy win
		select {
		case <-ended:
			more--
		default:
		}
	}
	return s, state, err
}

// recovered builds the stack on what a crash left, checks it, lets the cut-over
// go on, and checks that it changes nothing.
func recovered(fs *disktest.FS, o *oracle, boot string, cut bool) (onTarget bool, err error) {
	s, err := build(fs, volSize, boot)
	if err != nil {
		return false, err
	}
	defer s.close()
	onTarget = s.plan.OnTarget()
	got := make([]byte, volSize)
	if err := s.sw.ReadAt(bg, got, 0, 0); err != nil {
		return onTarget, err
	}
	if err := o.check(got, cut); err != nil {
		return onTarget, fmt.Errorf("on target %v: %w", onTarget, err)
	}
	if onTarget || s.plan.Phase == PhaseNone {
		return onTarget, nil
	}
	state, err := s.job.Run(bg, Request{})
	if state != Switched {
		return onTarget, fmt.Errorf("going on: %s, %w", state, err)
	}
	after := make([]byte, volSize)
	if err := s.sw.ReadAt(bg, after, 0, 0); err != nil {
		return onTarget, err
	}
	for i := range got {
		if got[i] != after[i] {
			return onTarget, fmt.Errorf("byte %d was %#x on the source side and is %#x on the target", i, got[i], after[i])
		}
	}
	return onTarget, nil
}

// TestPowerCut takes images at syncs, before, during and after the switch.
func TestPowerCut(t *testing.T) {
	for seed := range uint64(6) {
		fs := disktest.New(seed)
		o := newOracle()
		type image struct {
			fs *disktest.FS
			o  *oracle
			at string
		}
		var mu sync.Mutex
		var images []image
		fs.OnCall(func(n int64, op disktest.Op) {
			if op&disktest.Syncs != 0 && n > 20 || n%9 == int64(seed) && n > 20 {
				g, can := o.around(func() *disktest.FS { return fs.Image(uint64(n)) })
				mu.Lock()
				images = append(images, image{g, can, fmt.Sprintf("call %d (%v)", n, op)})
				mu.Unlock()
			}
		})
		s, state, err := workload(fs, seed, o, bg)
		if state != Switched {
			t.Fatal(state, err)
		}
		s.close()
		fs.OnCall(nil)
		sides := [2]int{}
		for _, im := range images {
			on, err := recovered(im.fs, im.o, "b", true)
			if err != nil {
				t.Fatalf("seed %d, %s: %v\n%s", seed, im.at, err, im.fs.Trace())
			}
			if on {
				sides[1]++
			} else {
				sides[0]++
			}
		}
		t.Logf("seed %d: %d power cuts left the source side primary, %d the target", seed, sides[0], sides[1])
	}
}

// TestKill kills the process at call N, in the same run of the machine: the
// marks are trusted, and nothing acknowledged is lost.
func TestKill(t *testing.T) {
	sides := [2]int{}
	for n := int64(21); ; n += 3 {
		fs := disktest.New(uint64(n))
		o := newOracle()
		dead, die := context.WithCancel(bg)
		var once sync.Once
		var left *disktest.FS
		var can *oracle
		fs.OnCall(func(i int64, op disktest.Op) {
			if i >= n {
				once.Do(func() {
					left, can = o.around(fs.Kill)
					die()
				})
			}
		})
		s, _, _ := workload(fs, uint64(n%7), o, dead)
		die()
		if s != nil {
			s.close()
		}
		if left == nil {
			break
		}
		on, err := recovered(left, can, "a", false)
		if err != nil {
			t.Fatalf("killed at call %d: %v\n%s", n, err, fs.Trace())
		}
		if on {
			sides[1]++
		} else {
			sides[0]++
		}
	}
	t.Logf("%d kills left the source side primary, %d the target", sides[0], sides[1])
}

// TestEveryCallFails lets call N fail once: whatever happens, the side that
// serves has what was acknowledged, then and after a kill or a power cut.
func TestEveryCallFails(t *testing.T) {
	states := map[State]int{}
	for _, e := range []error{syscall.EIO, syscall.ENOSPC} {
		for n := int64(21); n < 220; n += 3 {
			fs := disktest.New(uint64(n))
			o := newOracle()
			fs.Fail(disktest.Fault{At: n, Err: e})
			s, state, err := workload(fs, uint64(n%5), o, bg)
			if s == nil {
				t.Fatal(n, err)
			}
			states[state]++
			got := make([]byte, volSize)
			if err := s.sw.ReadAt(bg, got, 0, 0); err != nil {
				t.Fatal(err)
			}
			if err := o.check(got, false); err != nil {
				t.Fatalf("%v at call %d, alive and %s: %v", e, n, state, err)
			}
			cut := fs.Image(uint64(n))
			killed := fs.Kill()
			if _, err := recovered(killed, o, "a", false); err != nil {
				t.Fatalf("%v at call %d, killed when %s: %v\n%s", e, n, state, err, fs.Trace())
			}
			if _, err := recovered(cut, o, "b", true); err != nil {
				t.Fatalf("%v at call %d, power cut when %s: %v\n%s", e, n, state, err, fs.Trace())
			}
		}
	}
	t.Log(states)
}
