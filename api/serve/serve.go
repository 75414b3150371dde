// Package serve answers the API over a unix socket: handlers over two small
// interfaces, one table of routes, the OpenAPI document made from the types.
package serve

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"forerun/api"
	"forerun/block"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"
)

// Daemon is what every daemon can say.
type Daemon interface {
	Node() api.Node
	Volumes() []api.Volume
	// Volume answers KindNotFound for an unknown name.
	Volume(name string) (api.Volume, error)
}

// Controller is what a frontend can be told to do.
type Controller interface {
	Fill(ctx context.Context, volume string, req api.FillRequest) error
	Cutover(ctx context.Context, volume string, req api.CutoverRequest) error
	CancelCutover(ctx context.Context, volume string) error
}

// Limiter is a Controller that holds the background of its node to limits.
type Limiter interface {
	// SetLimits replaces them at once; KindInvalid for a rule that is none.
	SetLimits(ctx context.Context, req api.LimitsRequest) (api.Limits, error)
}

// PairController is what a daemon can be told to do with a volume that two
// frontends hold and whose changes go back to the source. Each method answers
// KindNotFound for an unknown volume and KindUnsupported for what this daemon
// cannot do; Unsupported can be embedded for those.
type PairController interface {
	// Abort calls the move off. It may return as soon as it is under way:
	// Volume.Abort shows how it goes. Asked again it goes on, or has nothing to do.
	Abort(ctx context.Context, volume string, req api.AbortRequest) error
	// Checkpoint returns when a checkpoint cut after the call is stored.
	Checkpoint(ctx context.Context, volume string) error
	// Discard removes a test clone.
	Discard(ctx context.Context, volume string, req api.DiscardRequest) error
	// Failover makes the other frontend primary and returns when it is.
	Failover(ctx context.Context, volume string, req api.FailoverRequest) error
	// SetPolicy is on disk when it returns.
	SetPolicy(ctx context.Context, volume string, req api.PolicyRequest) error
}

// Unsupported is a PairController that can do nothing, and says so.
type Unsupported struct{}

var _ PairController = Unsupported{}

func cannot(op, volume, what string) error {
	return block.E(op, volume, block.KindUnsupported, errors.New(what))
}

// Abort refuses.
func (Unsupported) Abort(_ context.Context, volume string, _ api.AbortRequest) error {
	return cannot("abort", volume, "this daemon has nothing to call off; ask the frontend that serves the volume, or with --force the backend that owns its source")
}

// Checkpoint refuses.
func (Unsupported) Checkpoint(_ context.Context, volume string) error {
	return cannot("checkpoint", volume, "this daemon writes nothing back; ask a frontend that serves the volume with the policy write-back")
}

// Discard refuses.
func (Unsupported) Discard(_ context.Context, volume string, _ api.DiscardRequest) error {
	return cannot("discard", volume, "this daemon has no test clone; ask the frontend that was started with --isolated")
}

// Failover refuses.
func (Unsupported) Failover(_ context.Context, volume string, _ api.FailoverRequest) error {
	return cannot("failover", volume, "this daemon has no peer to hand the volume to; ask a frontend that was started with --peer")
}

// SetPolicy refuses.
func (Unsupported) SetPolicy(_ context.Context, volume string, _ api.PolicyRequest) error {
	return cannot("policy", volume, "this daemon keeps no changes; ask the frontend that serves the volume")
}

// noOrders is the Controller of a daemon that is no frontend: it says so.
type noOrders struct{}

func (noOrders) Fill(_ context.Context, volume string, _ api.FillRequest) error {
	return cannot("fill", volume, "this daemon fills nothing; give the --state of the frontend that serves the volume")
}

func (noOrders) Cutover(_ context.Context, volume string, _ api.CutoverRequest) error {
	return cannot("cutover", volume, "this daemon has no volume to move to a native disk; give the --state of the frontend that serves the volume")
}

func (noOrders) CancelCutover(_ context.Context, volume string) error {
	return cannot("cutover", volume, "this daemon moves nothing to a native disk; give the --state of the frontend that serves the volume")
}

type (
	nodeOut    struct{ Body api.Node }
	volumesOut struct{ Body []api.Volume }
	volumeOut  struct{ Body api.Volume }
	volumeIn   struct {
		Volume string `path:"volume" doc:"name of the volume"`
	}
	fillIn struct {
		Volume string `path:"volume"`
		Body   api.FillRequest
	}
	cutoverIn struct {
		Volume string `path:"volume"`
		Body   api.CutoverRequest
	}
	abortIn struct {
		Volume string `path:"volume"`
		Body   api.AbortRequest
	}
	discardIn struct {
		Volume string `path:"volume"`
		Body   api.DiscardRequest
	}
	failoverIn struct {
		Volume string `path:"volume"`
		Body   api.FailoverRequest
	}
	limitsIn  struct{ Body api.LimitsRequest }
	limitsOut struct{ Body api.Limits }
	policyIn  struct {
		Volume string `path:"volume"`
		Body   api.PolicyRequest
	}
)

// Handler serves the API of d. With a nil c the orders of Controller, and
// without a pair (the first one counts) those of PairController, are answered
// with 501 and who takes them; metrics answers at api.PathMetrics.
func Handler(d Daemon, c Controller, version string, metrics http.Handler, pair ...PairController) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET "+api.PathMetrics, metrics)
	cfg := huma.DefaultConfig("Forerun", version)
	cfg.DocsPath = ""
	cfg.CreateHooks = nil // no $schema member in answers
	h := humago.New(mux, cfg)

	huma.Get(h, api.PathNode, func(context.Context, *struct{}) (*nodeOut, error) {
		return &nodeOut{d.Node()}, nil
	})
	huma.Get(h, api.PathVolumes, func(context.Context, *struct{}) (*volumesOut, error) {
		return &volumesOut{d.Volumes()}, nil
	})
	huma.Get(h, api.PathVolume, func(_ context.Context, in *volumeIn) (*volumeOut, error) {
		v, err := d.Volume(in.Volume)
		return &volumeOut{v}, status(err)
	})
	answer := func(name string, err error) (*volumeOut, error) {
		if err != nil {
			return nil, status(err)
		}
		v, err := d.Volume(name)
		return &volumeOut{v}, status(err)
	}
	var p PairController = Unsupported{}
	if len(pair) > 0 && pair[0] != nil {
		p = pair[0]
	}
	huma.Post(h, api.PathAbort, func(ctx context.Context, in *abortIn) (*volumeOut, error) {
		return answer(in.Volume, p.Abort(ctx, in.Volume, in.Body))
	})
	huma.Post(h, api.PathCheckpoint, func(ctx context.Context, in *volumeIn) (*volumeOut, error) {
		return answer(in.Volume, p.Checkpoint(ctx, in.Volume))
	})
	huma.Post(h, api.PathDiscard, func(ctx context.Context, in *discardIn) (*volumeOut, error) {
		return answer(in.Volume, p.Discard(ctx, in.Volume, in.Body))
	})
	huma.Post(h, api.PathFailover, func(ctx context.Context, in *failoverIn) (*volumeOut, error) {
		return answer(in.Volume, p.Failover(ctx, in.Volume, in.Body))
	})
	huma.Post(h, api.PathPolicy, func(ctx context.Context, in *policyIn) (*volumeOut, error) {
		return answer(in.Volume, p.SetPolicy(ctx, in.Volume, in.Body))
	})
	if c == nil {
		c = noOrders{}
	}
	if l, ok := c.(Limiter); ok {
		huma.Put(h, api.PathLimits, func(ctx context.Context, in *limitsIn) (*limitsOut, error) {
			out, err := l.SetLimits(ctx, in.Body)
			return &limitsOut{out}, status(err)
		})
	}
	huma.Post(h, api.PathFill, func(ctx context.Context, in *fillIn) (*volumeOut, error) {
		return answer(in.Volume, c.Fill(ctx, in.Volume, in.Body))
	})
	huma.Post(h, api.PathCutover, func(ctx context.Context, in *cutoverIn) (*volumeOut, error) {
		return answer(in.Volume, c.Cutover(ctx, in.Volume, in.Body))
	})
	huma.Delete(h, api.PathCutover, func(ctx context.Context, in *volumeIn) (*volumeOut, error) {
		return answer(in.Volume, c.CancelCutover(ctx, in.Volume))
	})
	return mux
}

// status turns the kind of err into an HTTP status; the text goes along.
func status(err error) error {
	if err == nil {
		return nil
	}
	code := http.StatusInternalServerError
	switch block.KindOf(err) {
	case block.KindInvalid, block.KindRange:
		code = http.StatusBadRequest
	case block.KindNotFound:
		code = http.StatusNotFound
	case block.KindBusy, block.KindExists, block.KindReadOnly, block.KindFenced:
		code = http.StatusConflict
	case block.KindDenied:
		code = http.StatusForbidden
	case block.KindUnavailable, block.KindClosed:
		code = http.StatusServiceUnavailable
	case block.KindNoSpace:
		code = http.StatusInsufficientStorage
	case block.KindUnsupported:
		code = http.StatusNotImplemented
	}
	return huma.NewError(code, err.Error())
}

// Run serves handler on the unix socket in stateDir until ctx ends. The caller
// holds the lock of stateDir, so a socket that is there already is stale.
func Run(ctx context.Context, stateDir string, handler http.Handler) error {
	path := filepath.Join(stateDir, api.SocketName)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return block.E("api.listen", path, block.KindNone, err)
	}
	ln, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return block.E("api.listen", path, block.KindNone, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		ln.Close()
		return block.E("api.listen", path, block.KindNone, err)
	}
	srv := &http.Server{Handler: handler, ReadHeaderTimeout: 5 * time.Second}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	select {
	case err := <-done:
		return block.E("api.serve", path, block.KindNone, err)
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if srv.Shutdown(stop) != nil {
		srv.Close()
	}
	<-done
	return nil
}
