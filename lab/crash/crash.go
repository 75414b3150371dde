package crash

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"forerun/api"
	"forerun/lab/load"
	"forerun/lab/oracle"
	"forerun/lab/rig"
)

// The daemons and moments that can be hit.
const (
	Frontend = "frontend"
	Backend  = "backend"
	Cutover  = "cutover"
)

// Config is a campaign.
type Config struct {
	Target string // Frontend, Backend or Cutover
	N      int    // how many kills
	Seed   uint64
	Bin    string // the forerun binary
	Dir    string // for state and disks; a failing round leaves it as it was
	// Size of the disk in bytes, 0 is 256 MiB, for Cutover 64 MiB.
	Size int64
	// FillRate bounds the background in bytes a second on the link, so that
	// kills hit a fill; 0 is 3 MB, negative is none.
	FillRate int64
	// Say prints a line of progress.
	Say func(format string, args ...any)
	// AtSource and AtTarget run the daemons; nil is on this host.
	AtSource, AtTarget rig.Command
	// Host is the backend's address, empty is 127.0.0.1.
	Host string
}

// Result is what a campaign found.
type Result struct {
	Rounds   int
	Switched int // Cutover: rounds after which the native disk was primary at once
	// LongestRestart is how long a frontend took to serve again.
	LongestRestart time.Duration
	// LongestStall is the longest request of a workload whose frontend lived.
	LongestStall time.Duration
	// FillLost is the most fill progress that was older than a second and lost, in bytes.
	FillLost int64
	// LateKills are those that hit nothing: the work was over before.
	LateKills int
	Load      load.Stats
	History   oracle.Stats
}

// Run runs the campaign. The first broken promise ends it with an error; Dir
// then holds the evidence.
func Run(ctx context.Context, c Config) (Result, error) {
	if c.Size == 0 {
		c.Size = 256 << 20
		if c.Target == Cutover {
			c.Size = 64 << 20
		}
	}
	if c.FillRate == 0 {
		c.FillRate = 3_000_000
	}
	if c.Host == "" {
		c.Host = "127.0.0.1"
	}
	k := campaign{Config: c, rng: rand.New(rand.NewPCG(c.Seed, 0x6b696c6c))}
	defer k.kill()
	var round func(context.Context) error
	switch c.Target {
	case Frontend:
		round = k.frontend
	case Backend:
		round = k.backend
	case Cutover:
		round = k.cutover
	default:
		return k.Result, fmt.Errorf("the target is frontend, backend or cutover, not %q", c.Target)
	}
	for k.Rounds = 0; k.Rounds < c.N; k.Rounds++ {
		if err := ctx.Err(); err != nil {
			return k.Result, err
		}
		start := time.Now()
		if err := round(ctx); err != nil {
			return k.Result, fmt.Errorf("seed %d, round %d: %w", c.Seed, k.Rounds+1, err)
		}
		k.note()
		c.Say("round %d of %d is right, %.1f s; %d writes acknowledged, %d sectors judged, %d went back", k.Rounds+1, c.N,
			time.Since(start).Seconds(), k.History.Acked, k.History.Checked, k.History.Rewound)
	}
	if k.rig != nil {
		if err := k.end(); err != nil {
			return k.Result, err
		}
		k.note()
	}
	return k.Result, k.sourceIntact()
}

type campaign struct {
	Config
	Result
	rng    *rand.Rand
	rig    *rig.Rig
	hist   *oracle.History
	client *load.Client
	past   oracle.Stats // of histories before this one
	life   int
	source string
	window time.Duration // kills hit a cut-over so long after its start at most
}

func (k *campaign) kill() {
	if k.client != nil {
		k.client.Close()
	}
	if k.rig != nil {
		k.rig.Kill()
	}
}

// note brings the counters up to date.
func (k *campaign) note() {
	k.History = k.past
	if k.hist != nil {
		add(&k.History, k.hist.Stats())
	}
}

func add(a *oracle.Stats, b oracle.Stats) {
	a.Writes += b.Writes
	a.Acked += b.Acked
	a.Flushes += b.Flushes
	a.Crashes += b.Crashes
	a.Checked += b.Checked
	a.Rewound += b.Rewound
}

// begin starts a life: both daemons with nothing local.
func (k *campaign) begin(ctx context.Context, frontendArgs ...string) error {
	if k.rig != nil {
		if err := k.end(); err != nil {
			return err
		}
	}
	k.life++
	if k.source == "" {
		k.source = filepath.Join(k.Dir, "source.raw")
		if err := os.MkdirAll(k.Dir, 0o755); err != nil {
			return err
		}
		if err := oracle.WriteBase(k.source, k.Seed, k.Size); err != nil {
			return err
		}
	}
	dir := filepath.Join(k.Dir, fmt.Sprintf("life%d", k.life))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	k.rig = &rig.Rig{Bin: k.Bin, Dir: dir, Volume: "vol", Source: k.source, Listen: k.Host + ":7411", BackendHosts: []string{k.Host},
		AtSource: k.AtSource, AtTarget: k.AtTarget, FrontendArgs: frontendArgs}
	k.hist = oracle.New(k.Seed, k.Size)
	if err := k.rig.Start(ctx); err != nil {
		return err
	}
	return k.dial(ctx)
}

func (k *campaign) fillArgs() []string {
	if k.FillRate < 0 {
		return nil
	}
	return []string{"--fill-limit", fmt.Sprint(k.FillRate)}
}

// end judges the whole disk, ends a life well and removes what it left.
func (k *campaign) end() error {
	if err := k.judgeAll("at the end of a life"); err != nil {
		return err
	}
	k.client.Close()
	k.client = nil
	if err := k.rig.Stop(); err != nil {
		return err
	}
	add(&k.past, k.hist.Stats())
	k.hist = nil
	dir := k.rig.Dir
	k.rig = nil
	return os.RemoveAll(dir)
}

func (k *campaign) dial(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if k.client, err = load.Dial(ctx, k.rig.Socket(), "vol"); err != nil {
		return errors.Join(err, k.rig.Frontend.Trouble("was asked for its export"))
	}
	if k.client.Size != k.Size {
		return fmt.Errorf("the export has %d bytes, the source %d", k.client.Size, k.Size)
	}
	return nil
}

// judge reads all that was written and a sixteenth of the rest, so that there
// is still something to be filled.
func (k *campaign) judge(what string) error {
	if err := k.hist.VerifyTouched(k.client, 16, k.rng.Int64N(16)); err != nil {
		return errors.Join(fmt.Errorf("%s: %w", what, err), k.rig.Frontend.Trouble("served it"))
	}
	return nil
}

// judgeAll reads the whole disk.
func (k *campaign) judgeAll(what string) error {
	if err := k.hist.Verify(k.client); err != nil {
		return errors.Join(fmt.Errorf("%s: %w", what, err), k.rig.Frontend.Trouble("served it"))
	}
	return nil
}

// working runs the load on the first half of the disk until stop is called, which returns how it ended.
func (k *campaign) working(ctx context.Context, pause time.Duration) (stop func() error) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	client, cfg := k.client, load.Config{Seed: k.rng.Uint64(), Depth: 6, Pause: pause, To: k.Size / 2}
	go func() {
		st, err := load.Run(ctx, client, k.hist, cfg)
		k.Load.Writes += st.Writes
		k.Load.Zeros += st.Zeros
		k.Load.Reads += st.Reads
		k.Load.Flushes += st.Flushes
		k.Load.Bytes += st.Bytes
		k.Load.Longest = max(k.Load.Longest, st.Longest)
		done <- err
	}()
	return func() error {
		cancel()
		return <-done
	}
}

func wrong(err error) bool {
	var w *oracle.Wrong
	return errors.As(err, &w)
}

// restartFrontend starts the killed frontend again and connects.
func (k *campaign) restartFrontend(ctx context.Context) error {
	took, err := k.rig.StartFrontend(ctx)
	if err != nil {
		return fmt.Errorf("restart: %w", err)
	}
	k.LongestRestart = max(k.LongestRestart, took)
	return k.dial(ctx)
}

// moment is when to kill, from now: soon after the start, or well into the work.
func (k *campaign) moment(most time.Duration) time.Duration {
	if k.rng.IntN(4) == 0 {
		most /= 10
	}
	return time.Duration(k.rng.Int64N(int64(most)))
}

func (k *campaign) frontend(ctx context.Context) error {
	if k.rig == nil {
		if err := k.begin(ctx, k.fillArgs()...); err != nil {
			return err
		}
	}
	watching := watch(ctx, k.rig)
	stop := k.working(ctx, 0)
	time.Sleep(k.moment(2500 * time.Millisecond))
	k.rig.Frontend.Kill()
	killed := time.Now()
	<-k.client.Done()
	if err := stop(); wrong(err) {
		watching.before(killed)
		return err
	}
	had := watching.before(killed.Add(-time.Second))
	k.hist.Crash()
	if err := k.restartFrontend(ctx); err != nil {
		return err
	}
	if err := k.fillKept(ctx, had); err != nil {
		return err
	}
	if err := k.judge("after the crash"); err != nil {
		return err
	}
	v, err := k.rig.Status(ctx)
	if err != nil {
		return err
	}
	if rig.Filled(v) { // no fill left to hit: a new life
		return k.end()
	}
	return nil
}

// fillKept compares what is here now with what was here a second before the kill.
func (k *campaign) fillKept(ctx context.Context, had int64) error {
	v, err := k.rig.Status(ctx)
	if err != nil {
		return err
	}
	if lost := had - rig.Here(v); lost > 0 {
		k.FillLost = max(k.FillLost, lost)
		return fmt.Errorf("%d bytes of fill were lost that had been here for a second: %d, now %d", lost, had, rig.Here(v))
	}
	return nil
}

func (k *campaign) backend(ctx context.Context) error {
	if k.rig == nil {
		if err := k.begin(ctx, k.fillArgs()...); err != nil {
			return err
		}
	}
	stop := k.working(ctx, 0)
	time.Sleep(k.moment(2 * time.Second))
	k.rig.Backend.Kill()
	time.Sleep(k.moment(time.Second))
	if err := k.rig.StartBackend(ctx); err != nil {
		return errors.Join(err, stop())
	}
	time.Sleep(500 * time.Millisecond)
	if err := stop(); err != nil {
		return fmt.Errorf("the workload saw the backend's end: %w", err)
	}
	k.LongestStall = max(k.LongestStall, k.Load.Longest)
	if err := k.judge("after the backend's crash"); err != nil {
		return err
	}
	v, err := k.rig.Status(ctx)
	if err != nil {
		return err
	}
	if v.WAN.Connected && rig.Filled(v) {
		return k.end()
	}
	return nil
}

func (k *campaign) cutover(ctx context.Context) error {
	if err := k.begin(ctx); err != nil {
		return err
	}
	if _, err := k.rig.WaitFilled(ctx, 2*time.Minute, func(api.Volume) {}); err != nil {
		return err
	}
	native := filepath.Join(k.rig.Dir, "native.raw")
	// A load with pauses: the rounds are to converge.
	stop := k.working(ctx, 20*time.Millisecond)
	time.Sleep(300 * time.Millisecond)
	cut := k.rig.CutoverCommand(ctx, native)
	if err := cut.Start(); err != nil {
		return errors.Join(err, stop())
	}
	cutDone := make(chan struct{})
	go func() {
		cut.Wait()
		close(cutDone)
	}()
	if k.window == 0 {
		k.window = time.Second
	}
	time.Sleep(k.moment(k.window))
	select {
	case <-cutDone:
		// Nothing was hit. How long a cut-over takes is the machine's affair;
		// the window follows it.
		k.LateKills++
		k.window = max(k.window*2/3, 50*time.Millisecond)
	default:
		k.window = k.window * 11 / 10
	}
	k.rig.Frontend.Kill()
	<-k.client.Done()
	err := stop()
	<-cutDone
	if wrong(err) {
		return err
	}
	k.hist.Crash()
	if err := k.restartFrontend(ctx); err != nil {
		return err
	}
	if err := k.judge("after the crash in the cut-over"); err != nil {
		return err
	}
	v, err := k.rig.Status(ctx)
	if err != nil {
		return err
	}
	if v.Primary == api.PrimaryTarget {
		k.Switched++
	} else if err := k.finish(ctx, native); err != nil {
		return err
	}
	return k.judgeNative(ctx, native)
}

// finish lets an interrupted cut-over end, or makes it again.
func (k *campaign) finish(ctx context.Context, native string) error {
	stop := k.working(ctx, 20*time.Millisecond)
	deadline := time.Now().Add(2 * time.Minute)
	var last error
	for {
		v, err := k.rig.Status(ctx)
		if err != nil {
			return errors.Join(err, stop())
		}
		if v.Primary == api.PrimaryTarget {
			break
		}
		if time.Now().After(deadline) {
			return errors.Join(fmt.Errorf("the cut-over cannot be finished: %+v", v.Cutover), last, stop())
		}
		switch v.Cutover.State {
		case "waiting", "copying", "paused", "switching": // it goes on by itself
		default:
			c := k.rig.CutoverCommand(ctx, native)
			c.Args = append(c.Args, "--force")
			if out, err := c.CombinedOutput(); err != nil {
				last = fmt.Errorf("cutover: %w: %s", err, out)
			}
		}
		time.Sleep(200 * time.Millisecond)
	}
	time.Sleep(200 * time.Millisecond)
	if err := stop(); err != nil {
		return fmt.Errorf("the workload saw the cut-over: %w", err)
	}
	return k.judge("after the cut-over")
}

// judgeNative ends the frontend and reads the native disk alone.
func (k *campaign) judgeNative(ctx context.Context, native string) error {
	if err := k.client.Flush(); err != nil {
		return err
	}
	k.client.Close()
	if err := k.rig.Stop(); err != nil {
		return err
	}
	f, err := os.Open(native)
	if err != nil {
		return err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || st.Size() != k.Size {
		return fmt.Errorf("the native disk has %d bytes, the volume %d: %w", st.Size(), k.Size, errors.Join(err, io.ErrUnexpectedEOF))
	}
	if err := k.hist.Verify(f); err != nil {
		return fmt.Errorf("the native disk: %w", err)
	}
	add(&k.past, k.hist.Stats())
	dir := k.rig.Dir
	k.hist, k.rig, k.client = nil, nil, nil
	return os.RemoveAll(dir)
}

// sourceIntact compares the source disk with what was written at the start.
func (k *campaign) sourceIntact() error {
	if k.source == "" {
		return nil
	}
	f, err := os.Open(k.source)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := oracle.New(k.Seed, k.Size).Verify(f); err != nil {
		return fmt.Errorf("the source disk was changed: %w", err)
	}
	return nil
}
