package proxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"forerun/api"
	"forerun/api/client"
	"forerun/block"
	"forerun/block/blocktest"
	export "forerun/data/export/nbd"
	"forerun/data/source/nbd"
	"forerun/internal/pki"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const size = 1 << 20

// volumes are what both frontends of a pair serve.
type volumes map[string]block.Device

func (v volumes) Lookup(name string) (block.Device, string, error) {
	if d := v[name]; d != nil {
		return d, "", nil
	}
	return nil, "", block.E("export", name, block.KindNotFound, nil)
}

func (v volumes) List() []string {
	names := []string{}
	for n := range v {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

// frontend is a server of volumes that can be taken away and brought back.
type frontend struct {
	t    *testing.T
	uri  string // to listen on
	vols volumes
	tls  *tls.Config
	stop func()
}

func (f *frontend) start() {
	f.t.Helper()
	s := export.NewServer(export.Options{Exports: f.vols, TLS: f.tls, DrainTimeout: time.Millisecond})
	ln, err := s.Listen(f.uri)
	if err != nil {
		f.t.Fatal(err)
	}
	f.uri = ln.URI()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, ln) }()
	f.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			f.t.Error(err)
		}
	})
	f.t.Cleanup(f.stop)
}

// short is a directory whose paths fit in a socket's address.
func short(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "proxy")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func newPair(t *testing.T, dir string, vols volumes) (a, b *frontend) {
	t.Helper()
	a = &frontend{t: t, uri: "nbd+unix:///?socket=" + filepath.Join(dir, "a"), vols: vols}
	b = &frontend{t: t, uri: "nbd+unix:///?socket=" + filepath.Join(dir, "b"), vols: vols}
	a.start()
	b.start()
	return a, b
}

// run runs a proxy until the test ends.
func run(t *testing.T, cfg Config) (p *Proxy, stop func()) {
	t.Helper()
	p, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	p.drain = 100 * time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		p.mu.Lock()
		n := len(p.uris)
		p.mu.Unlock()
		if n == len(cfg.Exports) {
			return p, stop
		}
		if time.Now().After(end) {
			t.Fatal("the proxy does not listen")
		}
	}
}

func dial(t *testing.T, uri string, tc *tls.Config) (*nbd.Client, error) {
	t.Helper()
	tg, err := nbd.ParseURI(uri)
	if err != nil {
		t.Fatal(err)
	}
	tg.Config = tc
	c, err := nbd.Open(t.Context(), tg, nbd.Options{})
	if err == nil {
		t.Cleanup(func() { c.Close() })
	}
	return c, err
}

func kindIs(t *testing.T, err error, k block.Kind) {
	t.Helper()
	if block.KindOf(err) != k {
		t.Fatalf("%v is %v, should be %v", err, block.KindOf(err), k)
	}
}

// TestAllVolumes passes every name through, and survives each frontend in turn.
func TestAllVolumes(t *testing.T) {
	dir := short(t)
	web, db := blocktest.NewTwin(size, 512), blocktest.NewTwin(2*size, 512)
	a, b := newPair(t, dir, volumes{"web": web, "db": db})
	sock := filepath.Join(dir, "s")
	p, _ := run(t, Config{Exports: []string{"nbd+unix:///?socket=" + sock}, Targets: []string{a.uri, b.uri}, StateDir: filepath.Join(dir, "state")})
	if got := p.List(); !slices.Equal(got, []string{"db", "web"}) {
		t.Errorf("it lists %q", got)
	}
	_, err := dial(t, "nbd+unix:///other?socket="+sock, nil)
	kindIs(t, err, block.KindNotFound)
	w, err := dial(t, "nbd+unix:///web?socket="+sock, nil)
	if err != nil {
		t.Fatal(err)
	}
	d, err := dial(t, "nbd+unix:///db?socket="+sock, nil)
	if err != nil {
		t.Fatal(err)
	}
	if w.Info().Size != size || d.Info().Size != 2*size {
		t.Fatalf("%+v %+v", w.Info(), d.Info())
	}
	ctx := t.Context()
	for i, f := range []*frontend{a, b, a} {
		p := bytes.Repeat([]byte{byte(i + 1)}, 4096)
		f.stop()
		if err := w.WriteAt(ctx, p, int64(i)*4096, block.FUA); err != nil {
			t.Fatal(err)
		}
		if err := d.Flush(ctx, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(web.Durable()[i*4096:][:4096], p) {
			t.Error("an acknowledged write is not there")
		}
		f.start()
	}
	api := client.New(filepath.Join(dir, "state"))
	v, err := api.Volume(ctx, "web")
	if err != nil {
		t.Fatal(err)
	}
	if v.Role != "proxy" || v.SizeBytes != size || v.Clients < 1 || v.Failover == nil || v.Failover.Moves != 4 || v.Failover.Target != b.uri || len(v.Failover.Targets) != 2 {
		t.Errorf("%+v %+v", v, v.Failover)
	}
	if vs, err := api.Volumes(ctx); err != nil || len(vs) != 2 {
		t.Errorf("%v %v", vs, err)
	}
	if n, err := api.Node(ctx); err != nil || n.Role != "proxy" || len(n.Targets) != 2 || len(n.Exports) != 1 {
		t.Errorf("%+v %v", n, err)
	}
	_, err = api.Volume(ctx, "other")
	kindIs(t, err, block.KindNotFound)
}

// TestOneVolume serves one export by name and as the default, also when no
// frontend is there at first.
func TestOneVolume(t *testing.T) {
	dir := short(t)
	web := blocktest.NewTwin(size, 512)
	a := &frontend{t: t, uri: "nbd+unix:///?socket=" + filepath.Join(dir, "a"), vols: volumes{"web": web, "db": web}}
	sock := filepath.Join(dir, "s")
	p, stop := run(t, Config{Exports: []string{"nbd+unix:///?socket=" + sock},
		Targets: []string{"nbd+unix:///web?socket=" + filepath.Join(dir, "none"), "nbd+unix:///web?socket=" + filepath.Join(dir, "a")}})
	if v, err := p.Volume("web"); err == nil && (v.Waiting == "" || v.Phase != api.PhaseStarting) {
		t.Errorf("%+v", v)
	}
	opened := make(chan error, 1)
	go func() {
		_, err := dial(t, "nbd+unix:///?socket="+sock, nil)
		opened <- err
	}()
	time.Sleep(50 * time.Millisecond)
	a.start()
	if err := <-opened; err != nil {
		t.Fatal(err)
	}
	if _, err := dial(t, "nbd+unix:///web?socket="+sock, nil); err != nil {
		t.Fatal(err)
	}
	_, err := dial(t, "nbd+unix:///db?socket="+sock, nil)
	kindIs(t, err, block.KindNotFound)
	if !slices.Equal(p.List(), []string{"web"}) {
		t.Error(p.List())
	}
	v, err := p.Volume("web")
	// The first target is tried again now and then, and failed in between.
	for range 500 {
		if err != nil || v.Failover.Targets[0].State == "failed" {
			break
		}
		time.Sleep(10 * time.Millisecond)
		v, err = p.Volume("web")
	}
	if err != nil || v.Waiting != "" || v.Clients == 0 || v.Failover.Targets[0].State != "failed" || v.Failover.Targets[0].Error == "" {
		t.Errorf("%+v %+v %v", v, v.Failover, err)
	}
	stop()
	_, _, err = p.Lookup("web")
	if err == nil {
		t.Error("a stopped proxy serves")
	}
}

// TestShutdownWithoutTargets ends although calls wait for a target.
func TestShutdownWithoutTargets(t *testing.T) {
	dir := short(t)
	a, b := newPair(t, dir, volumes{"web": blocktest.NewTwin(size, 512)})
	sock := filepath.Join(dir, "s")
	p, stop := run(t, Config{Exports: []string{"nbd+unix:///?socket=" + sock}, Targets: []string{a.uri, b.uri}})
	c, err := dial(t, "nbd+unix:///web?socket="+sock, nil)
	if err != nil {
		t.Fatal(err)
	}
	a.stop()
	b.stop()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.ReadAt(ctx, make([]byte, 512), 0, 0) }()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if v, err := p.Volume("web"); err != nil {
			t.Fatal(err)
		} else if strings.Contains(v.Waiting, "no target works") {
			break
		}
		if time.Now().After(end) {
			t.Fatal("status does not say that nothing works")
		}
	}
	cancel()
	kindIs(t, <-done, block.KindCanceled)
	c.Close()
	stop()
}

// TestTLS reaches frontends over nbds, and is reached so.
func TestTLS(t *testing.T) {
	dir := short(t)
	certs := filepath.Join(dir, "pki")
	if err := pki.Init(certs); err != nil {
		t.Fatal(err)
	}
	for name, role := range map[string]pki.Role{"a": pki.RoleFrontend, "p": pki.RoleFrontend, "guest": pki.RoleOperator} {
		if err := pki.Issue(certs, pki.Request{Name: name, Role: role, Hosts: []string{"localhost", "127.0.0.1"}, Lifetime: time.Hour}); err != nil {
			t.Fatal(err)
		}
	}
	serverTLS, err := pki.NBDServerTLS(certs, "a", true)
	if err != nil {
		t.Fatal(err)
	}
	web := blocktest.NewTwin(size, 512)
	a := &frontend{t: t, uri: "nbds+unix:///?socket=" + filepath.Join(dir, "a"), vols: volumes{"web": web}, tls: serverTLS}
	b := &frontend{t: t, uri: "nbds://127.0.0.1:0", vols: volumes{"web": web}, tls: serverTLS}
	a.start()
	b.start()
	p, _ := run(t, Config{Exports: []string{"nbds://127.0.0.1:0"}, Targets: []string{a.uri, b.uri}, PKI: certs, Name: "p", VerifyClients: true})
	guest, err := pki.ClientTLS(certs, "guest", "")
	if err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	uri := p.uris[0]
	p.mu.Unlock()
	c, err := dial(t, uri+"web", guest)
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte{9}, 512)
	a.stop()
	if err := c.WriteAt(t.Context(), data, 0, block.FUA); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(web.Durable()[:512], data) {
		t.Error("the write is not there")
	}
	if _, err := dial(t, strings.Replace(uri, "nbds:", "nbd:", 1)+"web", nil); err == nil {
		t.Error("nbds was spoken in the clear")
	}
}

func TestConfig(t *testing.T) {
	ok := []string{"nbd+unix:///?socket=/s"}
	for _, c := range []struct {
		cfg  Config
		want string
	}{
		{Config{Targets: ok}, "--export"},
		{Config{Exports: ok}, "--to URI"},
		{Config{Exports: ok, Targets: []string{"/dev/sda"}}, "not an NBD URI"},
		{Config{Exports: ok, Targets: []string{"nbd://a", "nbd://a"}}, "given twice"},
		{Config{Exports: ok, Targets: []string{"nbd://a/web", "nbd://b"}}, "some do not"},
		{Config{Exports: ok, Targets: []string{"nbds://a/web"}, PKI: "/none", Name: "p"}, "forerun pki init"},
	} {
		if _, err := New(c.cfg); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, should say %q", c.cfg, err, c.want)
		}
	}
	p, err := New(Config{Exports: []string{"nbds+unix:///?socket=/s"}, Targets: ok})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "--pki DIR") {
		t.Error(err)
	}
}

// TestNoSuchExport ends the daemon rather than waiting for what never comes.
func TestNoSuchExport(t *testing.T) {
	dir := short(t)
	newPair(t, dir, volumes{"web": blocktest.NewTwin(size, 512)})
	p, err := New(Config{Exports: []string{"nbd+unix:///?socket=" + filepath.Join(dir, "s")},
		Targets: []string{"nbd+unix:///wbe?socket=" + filepath.Join(dir, "a"), "nbd+unix:///wbe?socket=" + filepath.Join(dir, "b")}})
	if err != nil {
		t.Fatal(err)
	}
	err = p.Run(t.Context())
	kindIs(t, err, block.KindNotFound)
	if !strings.Contains(err.Error(), `"web"`) {
		t.Errorf("%v does not name what there is", err)
	}
}
