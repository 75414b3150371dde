package cli

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"forerun/api"
	"forerun/api/client"
	"forerun/api/serve"
	"forerun/block"

	"github.com/spf13/cobra"
)

// fake is a daemon with one volume, v, whose status a test sets.
type fake struct {
	serve.Unsupported
	mu    sync.Mutex
	v     api.Volume
	abort func(*fake, api.AbortRequest) error
}

func (f *fake) set(change func(*api.Volume)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(&f.v)
}

func (f *fake) Node() api.Node { return api.Node{Name: "f"} }
func (f *fake) Volumes() []api.Volume {
	f.mu.Lock()
	defer f.mu.Unlock()
	return []api.Volume{f.v}
}
func (f *fake) Volume(n string) (api.Volume, error) {
	if n != f.v.Volume {
		return api.Volume{}, block.E("status", n, block.KindNotFound, nil)
	}
	return f.Volumes()[0], nil
}
func (f *fake) Abort(_ context.Context, _ string, r api.AbortRequest) error { return f.abort(f, r) }
func (f *fake) Checkpoint(context.Context, string) error {
	f.set(func(v *api.Volume) {
		v.Writeback = &api.Writeback{Policy: api.PolicyWriteBack, LastID: 8, LastCheckpoint: "2026-01-02T03:04:05Z"}
	})
	return nil
}
func (f *fake) SetPolicy(_ context.Context, _ string, r api.PolicyRequest) error {
	f.set(func(v *api.Volume) {
		v.Writeback = &api.Writeback{Policy: r.Policy}
		v.Warnings = []string{"the source stays at its last checkpoint"}
	})
	return nil
}

// run gives the command line to the commands and returns what they print.
func run(t *testing.T, f *fake, line ...string) (out, progress string, err error) {
	t.Helper()
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- serve.Run(ctx, dir, serve.Handler(f, nil, "test", http.NotFoundHandler(), f)) }()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := client.New(dir).Node(ctx); err == nil {
			break
		} else if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	root := &cobra.Command{Use: "forerun", SilenceUsage: true, SilenceErrors: true}
	root.AddCommand(Commands()...)
	var o, e bytes.Buffer
	root.SetOut(&o)
	root.SetErr(&e)
	root.SetArgs(append(line, "--state", dir))
	err = root.ExecuteContext(t.Context())
	cancel()
	if e := <-done; e != nil {
		t.Error(e)
	}
	return o.String(), e.String(), err
}

func volume() api.Volume {
	return api.Volume{Volume: "v", Role: api.RoleFrontend, Phase: api.PhaseRunning, Primary: api.PrimarySource, SizeBytes: 1 << 30, ChunkBytes: 65536}
}

func contains(t *testing.T, text string, wants ...string) {
	t.Helper()
	for _, w := range wants {
		if !strings.Contains(text, w) {
			t.Errorf("%q does not say %q", text, w)
		}
	}
}

func TestAbortFollowsToTheEnd(t *testing.T) {
	f := &fake{v: volume()}
	f.abort = func(f *fake, r api.AbortRequest) error {
		f.set(func(v *api.Volume) { v.Abort = &api.Abort{State: api.AbortDraining, RemainingBytes: 3 << 20} })
		time.AfterFunc(700*time.Millisecond, func() {
			f.set(func(v *api.Volume) {
				v.Phase, v.Abort = api.PhaseAborted, &api.Abort{State: api.AbortDone}
			})
		})
		return nil
	}
	out, progress, err := run(t, f, "abort", "--volume", "v")
	if err != nil {
		t.Fatal(err)
	}
	contains(t, out, "v: aborted; the source is up to date")
	contains(t, progress, "draining, 3 MiB left")
}

func TestAbortByForceSaysWhatIsLost(t *testing.T) {
	for _, c := range []struct {
		a    api.Abort
		want string
	}{
		{api.Abort{LastID: 4, LastCheckpoint: "2026-01-02T03:04:05Z", LostBytes: 5 << 20, LostS: 7.25}, "checkpoint 4, cut at 2026-01-02T03:04:05Z; lost are 5 MiB of changes, made in the 7.3s before"},
		{api.Abort{LastID: 4, LastCheckpoint: "x", LostBytes: -1}, "nobody here knows"},
		{api.Abort{LastID: 4, LastCheckpoint: "x"}, "nothing is lost"},
		{api.Abort{LostBytes: -1}, "as it was when it was taken over"},
	} {
		f := &fake{v: volume()}
		f.abort = func(f *fake, r api.AbortRequest) error {
			if !r.Force {
				return block.E("abort", "v", block.KindBusy, errors.New("not forced"))
			}
			c.a.State, c.a.Forced = api.AbortDone, true
			f.set(func(v *api.Volume) { v.Abort = &c.a })
			return nil
		}
		out, _, err := run(t, f, "abort", "--volume", "v", "--force")
		if err != nil {
			t.Fatal(err)
		}
		contains(t, out, c.want)
	}
}

func TestAbortThatStopsIsAnError(t *testing.T) {
	f := &fake{v: volume()}
	f.abort = func(f *fake, _ api.AbortRequest) error {
		f.set(func(v *api.Volume) {
			v.Abort = &api.Abort{State: api.AbortFailed, Error: "the source's disk is gone"}
		})
		return nil
	}
	if _, _, err := run(t, f, "abort", "--volume", "v"); err == nil || !strings.Contains(err.Error(), "the source's disk is gone") {
		t.Errorf("%v", err)
	}
	f.abort = func(*fake, api.AbortRequest) error {
		return block.E("abort", "v", block.KindBusy, errors.New("it has switched"))
	}
	if _, _, err := run(t, f, "abort", "--volume", "v"); block.KindOf(err) != block.KindBusy {
		t.Errorf("%v", err)
	}
}

func TestOrders(t *testing.T) {
	out, _, err := run(t, &fake{v: volume()}, "checkpoint", "--volume", "v")
	if err != nil {
		t.Fatal(err)
	}
	contains(t, out, "v: checkpoint 8, cut at 2026-01-02T03:04:05Z, is stored")
	out, warned, err := run(t, &fake{v: volume()}, "policy", "--volume", "v", "--set", "isolated")
	if err != nil {
		t.Fatal(err)
	}
	contains(t, out, "isolated")
	contains(t, warned, "warning: the source stays")
	if _, _, err = run(t, &fake{v: volume()}, "failover", "--volume", "v"); block.KindOf(err) != block.KindUnsupported {
		t.Errorf("%v", err)
	}
	if _, _, err = run(t, &fake{v: volume()}, "discard"); err == nil {
		t.Error("an order without a volume was taken")
	}
}

func TestStatusShowsThePair(t *testing.T) {
	f := &fake{v: volume()}
	f.v.Replica = &api.Replica{Role: api.ReplicaPrimary, Peer: "b", Epoch: 3, Mode: api.ModeDegraded, ResyncBytes: 1 << 20, Reason: "b cannot be reached"}
	f.v.Writeback = &api.Writeback{Policy: api.PolicyWriteBack, State: "waiting", UnwrittenBytes: 2 << 20, OldestS: 4, RPOS: 5.5, LastID: 2,
		LastCheckpoint: "2026-01-02T03:04:05Z", Reason: "the backend's disk is full"}
	out, _, err := run(t, f, "status")
	if err != nil {
		t.Fatal(err)
	}
	contains(t, out, "replica    primary, the other one is b, epoch 3, not in sync, degraded, 1 MiB to copy (b cannot be reached)",
		"write-back waiting, 2 MiB unwritten, the oldest 4s ago, checkpoint 2 cut at 2026-01-02T03:04:05Z, rpo 5.5s (the backend's disk is full)")
	contains(t, statusLine(f.v), "primary epoch 3 not in sync 1 MiB to copy degraded", "write-back 2 MiB unwritten rpo 5.5s")
	f.v.Abort = &api.Abort{State: api.AbortDraining, RemainingBytes: 1024}
	contains(t, statusLine(f.v), "abort draining 1 KiB left")

	p := &fake{v: api.Volume{Volume: "v", Role: api.RoleProxy, SizeBytes: 1 << 30, Waiting: "no target can be reached",
		Failover: &api.Failover{Moves: 3, Repeated: 4, Stalls: 1, LongestUs: 1500, Targets: []api.FailoverTarget{{Target: "nbd://a", State: "failed", Error: "refused"}}}}}
	if out, _, err = run(t, p, "status"); err != nil {
		t.Fatal(err)
	}
	contains(t, out, "served through no target", "nbd://a: failed (refused)", "3, 1 because a target answered nothing", "1.5ms", "waiting")
	contains(t, statusLine(p.v), "no target", "3 moves", "4 repeated")
}
