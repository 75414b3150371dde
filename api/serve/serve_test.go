package serve_test

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"forerun/api"
	"forerun/api/client"
	"forerun/api/serve"
	"forerun/block"
)

type fake struct{ got []any }

func (f *fake) Node() api.Node { return api.Node{Name: "f1", Role: api.RoleFrontend} }
func (f *fake) Volumes() []api.Volume {
	return []api.Volume{{Volume: "v", Phase: api.PhaseRunning, Primary: api.PrimarySource}}
}
func (f *fake) Volume(n string) (api.Volume, error) {
	if n != "v" {
		return api.Volume{}, block.E("status", n, block.KindNotFound, nil)
	}
	return f.Volumes()[0], nil
}
func (f *fake) Fill(_ context.Context, v string, r api.FillRequest) error {
	f.got = append(f.got, v, r)
	return nil
}
func (f *fake) Cutover(_ context.Context, v string, r api.CutoverRequest) error {
	return block.E("cutover", v, block.KindBusy, os.ErrExist)
}
func (f *fake) CancelCutover(context.Context, string) error { return nil }

// pair is a fake that takes the orders of a pair, all but two.
type pair struct {
	serve.Unsupported
	*fake
}

func (p *pair) Abort(_ context.Context, v string, r api.AbortRequest) error {
	p.got = append(p.got, v, r)
	return nil
}
func (p *pair) Checkpoint(ctx context.Context, v string) error {
	p.got = append(p.got, v, "checkpoint")
	return nil
}
func (p *pair) SetPolicy(_ context.Context, v string, r api.PolicyRequest) error {
	p.got = append(p.got, v, r)
	return block.E("policy", v, block.KindReadOnly, os.ErrPermission)
}

func start(t *testing.T) (*fake, string) {
	f := &fake{}
	return f, run(t, f)
}

func run(t *testing.T, f *fake, pc ...serve.PairController) string {
	t.Helper()
	return handle(t, f, f, pc...)
}

func handle(t *testing.T, f *fake, orders serve.Controller, pc ...serve.PairController) string {
	t.Helper()
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	metrics := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "m 1\n") })
	go func() { done <- serve.Run(ctx, dir, serve.Handler(f, orders, "test", metrics, pc...)) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if c, err := net.Dial("unix", filepath.Join(dir, api.SocketName)); err == nil {
			c.Close()
			return dir
		}
	}
	t.Fatal("the API did not come up")
	return ""
}

func TestClientAndServer(t *testing.T) {
	f, dir := start(t)
	ctx := context.Background()
	c := client.New(dir)
	if n, err := c.Node(ctx); err != nil || n.Name != "f1" {
		t.Fatalf("node: %v %v", n, err)
	}
	if v, err := c.Volumes(ctx); err != nil || len(v) != 1 || v[0].Volume != "v" {
		t.Fatalf("volumes: %v %v", v, err)
	}
	if _, err := c.Volume(ctx, "w"); block.KindOf(err) != block.KindNotFound {
		t.Fatalf("an unknown volume answers %v", err)
	}
	if _, err := c.Fill(ctx, "v", api.FillRequest{Action: "limit", RateBytes: 7}); err != nil {
		t.Fatal(err)
	}
	if len(f.got) != 2 || f.got[1].(api.FillRequest).RateBytes != 7 {
		t.Fatalf("the daemon got %v", f.got)
	}
	if _, err := c.Fill(ctx, "v", api.FillRequest{Action: "fly"}); block.KindOf(err) != block.KindInvalid {
		t.Fatalf("an unknown action answers %v", err)
	}
	_, err := c.Cutover(ctx, "v", api.CutoverRequest{To: "/x"})
	if block.KindOf(err) != block.KindBusy || !strings.Contains(err.Error(), "exist") {
		t.Fatalf("a refused cut-over answers %v", err)
	}
	if _, err := client.New(t.TempDir()).Node(ctx); block.KindOf(err) != block.KindUnavailable {
		t.Fatalf("no daemon answers %v", err)
	}
}

func TestOrdersOfAPair(t *testing.T) {
	f := &fake{}
	ctx := context.Background()
	c := client.New(run(t, f, &pair{fake: f}))
	if v, err := c.Abort(ctx, "v", api.AbortRequest{Force: true}); err != nil || v.Volume != "v" {
		t.Fatalf("abort: %v %v", v, err)
	}
	if _, err := c.Checkpoint(ctx, "v"); err != nil {
		t.Fatal(err)
	}
	if len(f.got) != 4 || f.got[1] != (api.AbortRequest{Force: true}) || f.got[3] != "checkpoint" {
		t.Fatalf("the daemon got %v", f.got)
	}
	if _, err := c.Policy(ctx, "v", api.PolicyRequest{Policy: api.PolicyWriteBack}); block.KindOf(err) != block.KindBusy {
		t.Fatalf("a refused policy answers %v", err)
	}
	if _, err := c.Policy(ctx, "v", api.PolicyRequest{Policy: "hope"}); block.KindOf(err) != block.KindInvalid {
		t.Fatalf("an unknown policy answers %v", err)
	}
	if _, err := c.Discard(ctx, "v", api.DiscardRequest{}); block.KindOf(err) != block.KindUnsupported || !strings.Contains(err.Error(), "--isolated") {
		t.Fatalf("what the daemon cannot do answers %v", err)
	}
}

func TestOrdersWithoutAPair(t *testing.T) {
	_, dir := start(t)
	ctx, c := context.Background(), client.New(dir)
	for what, call := range map[string]func() (api.Volume, error){
		"abort":      func() (api.Volume, error) { return c.Abort(ctx, "v", api.AbortRequest{}) },
		"checkpoint": func() (api.Volume, error) { return c.Checkpoint(ctx, "v") },
		"discard":    func() (api.Volume, error) { return c.Discard(ctx, "v", api.DiscardRequest{Force: true}) },
		"failover":   func() (api.Volume, error) { return c.Failover(ctx, "v", api.FailoverRequest{}) },
		"policy": func() (api.Volume, error) {
			return c.Policy(ctx, "v", api.PolicyRequest{Policy: api.PolicyIsolated})
		},
	} {
		if _, err := call(); block.KindOf(err) != block.KindUnsupported || !strings.Contains(err.Error(), "this daemon") {
			t.Errorf("%s answers %v", what, err)
		}
	}
}

// TestOrdersOfAFrontend: a daemon that is none says who takes them.
func TestOrdersOfAFrontend(t *testing.T) {
	dir := handle(t, &fake{}, nil)
	ctx, c := t.Context(), client.New(dir)
	for what, call := range map[string]func() (api.Volume, error){
		"fill":    func() (api.Volume, error) { return c.Fill(ctx, "v", api.FillRequest{Action: "pause"}) },
		"cutover": func() (api.Volume, error) { return c.Cutover(ctx, "v", api.CutoverRequest{To: "/x"}) },
		"cancel":  func() (api.Volume, error) { return c.CancelCutover(ctx, "v") },
	} {
		if _, err := call(); block.KindOf(err) != block.KindUnsupported || !strings.Contains(err.Error(), "frontend that serves the volume") {
			t.Errorf("%s answers %v", what, err)
		}
	}
}

func TestOpenAPIAndMetrics(t *testing.T) {
	_, dir := start(t)
	hc := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return net.Dial("unix", filepath.Join(dir, api.SocketName))
	}}}
	defer hc.CloseIdleConnections()
	get := func(p string) []byte {
		r, err := hc.Get("http://x" + p)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, _ := io.ReadAll(r.Body)
		return b
	}
	var doc struct {
		OpenAPI string                    `json:"openapi"`
		Paths   map[string]map[string]any `json:"paths"`
	}
	if err := json.Unmarshal(get(api.PathOpenAPI), &doc); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{api.PathNode, api.PathVolumes, api.PathVolume, api.PathFill, api.PathCutover,
		api.PathAbort, api.PathCheckpoint, api.PathDiscard, api.PathFailover, api.PathPolicy} {
		if len(doc.Paths[p]) == 0 {
			t.Errorf("the OpenAPI document (%s) does not know %s", doc.OpenAPI, p)
		}
	}
	if got := string(get(api.PathMetrics)); got != "m 1\n" {
		t.Errorf("metrics answer %q", got)
	}
	if fi, err := os.Stat(filepath.Join(dir, api.SocketName)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the socket is %v, %v", fi.Mode(), err)
	}
}
