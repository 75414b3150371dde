package pki

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"forerun/block"
)

func authority(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "pki")
	if err := Init(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

func issue(t *testing.T, dir string, r Request) {
	t.Helper()
	if err := Issue(dir, r); err != nil {
		t.Fatal(err)
	}
}

// shake runs a handshake and one byte each way, which TLS 1.3 needs for the
// client to learn that it was refused.
func shake(t *testing.T, server, client *tls.Config, host string) (cs, ss tls.ConnectionState, cerr, serr error) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		raw, err := ln.Accept()
		if err != nil {
			serr = err
			return
		}
		defer raw.Close()
		raw.SetDeadline(time.Now().Add(5 * time.Second))
		c := tls.Server(raw, server)
		if serr = Explain(c.Handshake()); serr == nil {
			_, serr = c.Write([]byte{1})
		}
		ss = c.ConnectionState()
	}()
	raw, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	raw.SetDeadline(time.Now().Add(5 * time.Second))
	cfg := client.Clone()
	cfg.ServerName = host
	c := tls.Client(raw, cfg)
	_, cerr = c.Read(make([]byte, 1))
	cerr = Explain(cerr)
	cs = c.ConnectionState()
	raw.Close()
	<-done
	return
}

func TestFiles(t *testing.T) {
	dir := authority(t)
	issue(t, dir, Request{Role: RoleBackend, Name: "b1", Hosts: []string{"b1.example", "192.0.2.1"}})
	for _, n := range []string{"ca.key", "b1.key"} {
		st, err := os.Stat(filepath.Join(dir, n))
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v, want mode 0600", n, st.Mode(), err)
		}
	}
	data, _ := os.ReadFile(filepath.Join(dir, "b1.crt"))
	cs, err := parseCerts("b1.crt", data)
	if err != nil {
		t.Fatal(err)
	}
	c := cs[0]
	if c.URIs[0].String() != "spiffe://forerun/backend/b1" || c.DNSNames[0] != "b1.example" || c.IPAddresses[0].String() != "192.0.2.1" || c.Subject.CommonName != "b1" {
		t.Errorf("certificate says %v %v %v %v", c.URIs, c.DNSNames, c.IPAddresses, c.Subject)
	}
	if k, ok := c.PublicKey.(*ecdsa.PublicKey); !ok || k.Params().Name != "P-256" {
		t.Errorf("key is %T", c.PublicKey)
	}
	if len(c.ExtKeyUsage) != 2 {
		t.Errorf("usages %v", c.ExtKeyUsage)
	}
	before, _ := os.ReadFile(filepath.Join(dir, "ca.key"))
	if err := Init(dir); block.KindOf(err) != block.KindExists {
		t.Errorf("second Init: %v", err)
	}
	if after, _ := os.ReadFile(filepath.Join(dir, "ca.key")); string(after) != string(before) {
		t.Error("second Init changed the key")
	}
	if err := Issue(dir, Request{Role: RoleBackend, Name: "b1"}); block.KindOf(err) != block.KindExists {
		t.Errorf("second Issue: %v", err)
	}
	issue(t, dir, Request{Role: RoleBackend, Name: "b1", Renew: true})
	if l, _ := filepath.Glob(filepath.Join(dir, ".new-*")); len(l) != 0 {
		t.Errorf("left behind: %v", l)
	}
}

func TestInvalidRequests(t *testing.T) {
	dir := authority(t)
	for _, r := range []Request{
		{Role: "king", Name: "a"}, {Role: RoleBackend}, {Role: RoleBackend, Name: "ca"},
		{Role: RoleBackend, Name: "../x"}, {Role: RoleBackend, Name: strings.Repeat("x", 64)}, {Role: RoleBackend, Name: ".x"},
		{Role: RoleBackend, Name: "x", Hosts: []string{"old.example:7410"}}, {Role: RoleBackend, Name: "x", Hosts: []string{"a b"}},
		{Role: RoleBackend, Name: "x", Hosts: []string{"https://old.example"}},
	} {
		if err := Issue(dir, r); block.KindOf(err) != block.KindInvalid {
			t.Errorf("%+v: %v", r, err)
		}
	}
	if _, err := ServerTLS(dir, "x", "king"); block.KindOf(err) != block.KindInvalid {
		t.Errorf("role king: %v", err)
	}
}

// TestHosts: addresses may be written as in a URL, and a list may end in a comma.
func TestHosts(t *testing.T) {
	dir := authority(t)
	issue(t, dir, Request{Role: RoleBackend, Name: "b", Hosts: []string{"old.example", " 192.0.2.1", "[2001:db8::1]", "::1", ""}})
	b, err := os.ReadFile(filepath.Join(dir, "b.crt"))
	if err != nil {
		t.Fatal(err)
	}
	p, _ := pem.Decode(b)
	c, err := x509.ParseCertificate(p.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range []string{"old.example", "192.0.2.1", "2001:db8::1", "::1"} {
		if err := c.VerifyHostname(h); err != nil {
			t.Error(err)
		}
	}
	if len(c.DNSNames) != 1 || len(c.IPAddresses) != 3 {
		t.Errorf("%q, %v", c.DNSNames, c.IPAddresses)
	}
}

func TestMissingFilesNameTheCommand(t *testing.T) {
	empty := t.TempDir()
	if err := Issue(empty, Request{Role: RoleBackend, Name: "b1"}); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "forerun pki init") {
		t.Errorf("no authority: %v", err)
	}
	_, err := ServerTLS(empty, "b1")
	if block.KindOf(err) != block.KindNotFound || !strings.Contains(err.Error(), "ca.crt") {
		t.Errorf("no ca.crt: %v", err)
	}
	dir := authority(t)
	_, err = ClientTLS(dir, "f1", RoleBackend)
	if block.KindOf(err) != block.KindNotFound || !strings.Contains(err.Error(), "f1.crt") || !strings.Contains(err.Error(), "forerun pki issue") {
		t.Errorf("no f1.crt: %v", err)
	}
	issue(t, dir, Request{Role: RoleFrontend, Name: "f1"})
	os.Remove(filepath.Join(dir, "f1.key"))
	if _, err = NBDServerTLS(dir, "f1", true); block.KindOf(err) != block.KindNotFound || !strings.Contains(err.Error(), "f1.key") {
		t.Errorf("no f1.key: %v", err)
	}
	os.Remove(filepath.Join(dir, "ca.key"))
	if err := Issue(dir, Request{Role: RoleBackend, Name: "b2"}); !strings.Contains(err.Error(), "ca.key") {
		t.Errorf("no ca.key: %v", err)
	}
	os.WriteFile(filepath.Join(dir, "ca.crt"), []byte("rubbish"), 0o644)
	if _, err := ServerTLS(dir, "f1"); block.KindOf(err) != block.KindCorrupt {
		t.Errorf("rubbish ca.crt: %v", err)
	}
}

func TestHandshakes(t *testing.T) {
	dir, other := authority(t), authority(t)
	for _, d := range []string{dir, other} {
		issue(t, d, Request{Role: RoleBackend, Name: "b1", Hosts: []string{"backend.example", "127.0.0.1"}})
		issue(t, d, Request{Role: RoleFrontend, Name: "f1", Hosts: []string{"backend.example"}})
		issue(t, d, Request{Role: RoleOperator, Name: "o1"})
	}
	ago := time.Now().Add(-48 * time.Hour)
	issue(t, dir, Request{Role: RoleFrontend, Name: "old", NotAfter: ago, Hosts: []string{"backend.example"}})
	server := func(d, n string, r ...Role) *tls.Config {
		c, err := ServerTLS(d, n, r...)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	client := func(d, n string, r Role) *tls.Config {
		c, err := ClientTLS(d, n, r)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	// stubborn shows its certificate whatever its state.
	stubborn := func(c *tls.Config, n string) *tls.Config {
		kp, err := tls.LoadX509KeyPair(filepath.Join(dir, n+".crt"), filepath.Join(dir, n+".key"))
		if err != nil {
			t.Fatal(err)
		}
		c = c.Clone()
		c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &kp, nil }
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &kp, nil }
		return c
	}
	nobody := client(dir, "f1", RoleBackend).Clone()
	nobody.GetClientCertificate = nil
	old12 := client(dir, "f1", RoleBackend).Clone()
	old12.MinVersion, old12.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	since := stamp(ago)

	for _, tc := range []struct {
		name     string
		srv, cli *tls.Config
		host     string
		serr     string // what the server's error says, "" for none asked
		cerr     string
	}{
		{"good", server(dir, "b1", RoleFrontend), client(dir, "f1", RoleBackend), "backend.example", "", ""},
		{"good by address", server(dir, "b1", RoleFrontend), client(dir, "f1", RoleBackend), "127.0.0.1", "", ""},
		{"any role", server(dir, "b1"), client(dir, "o1", ""), "backend.example", "", ""},
		{"two roles", server(dir, "b1", RoleFrontend, RoleOperator), client(dir, "o1", RoleBackend), "backend.example", "", ""},
		{"no client certificate", server(dir, "b1", RoleFrontend), nobody, "backend.example", "showed no certificate", "its log says why"},
		{"wrong client role", server(dir, "b1", RoleFrontend), client(dir, "o1", RoleBackend), "backend.example", `"o1" has the role operator, but frontend is needed`, "its log says why"},
		{"wrong server role", server(dir, "f1"), client(dir, "f1", RoleBackend), "backend.example", "*", `"f1" has the role frontend, but backend is needed`},
		{"server of another authority", server(other, "b1"), client(dir, "f1", RoleBackend), "backend.example", "*", `certificate of "backend b1" was issued by "Forerun CA`},
		{"client of another authority", server(dir, "b1"), stubborn(client(other, "f1", RoleBackend), "old"), "backend.example", "*", "*"},
		{"expired client", server(dir, "b1", RoleFrontend), stubborn(client(dir, "old", RoleBackend), "old"), "backend.example", `certificate of "frontend old" expired on ` + since, "its log says why"},
		{"expired client knows", server(dir, "b1", RoleFrontend), client(dir, "old", RoleBackend), "backend.example", "*", "own certificate expired on " + since},
		{"expired server", stubborn(server(dir, "old"), "old"), client(dir, "f1", RoleFrontend), "backend.example", "*", `certificate of "frontend old" expired on ` + since},
		{"other host", server(dir, "b1"), client(dir, "f1", RoleBackend), "elsewhere.example", "*", "for the hosts [backend.example 127.0.0.1], not for elsewhere.example"},
		{"TLS 1.2", server(dir, "b1"), old12, "backend.example", "*", "*"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cs, ss, cerr, serr := shake(t, tc.srv, tc.cli, tc.host)
			for _, c := range []struct {
				who  string
				err  error
				want string
			}{{"client", cerr, tc.cerr}, {"server", serr, tc.serr}} {
				switch {
				case c.want == "" && c.err != nil:
					t.Errorf("%s: %v", c.who, c.err)
				case c.want != "" && c.err == nil:
					t.Errorf("%s saw no error", c.who)
				case c.want != "" && c.want != "*" && !strings.Contains(c.err.Error(), c.want):
					t.Errorf("%s: %q does not say %q", c.who, c.err, c.want)
				case c.want != "" && c.want != "*" && block.KindOf(c.err) != block.KindDenied:
					t.Errorf("%s: kind %v", c.who, block.KindOf(c.err))
				}
			}
			if tc.serr == "" && tc.cerr == "" {
				if r, n := PeerIdentity(cs); r != RoleBackend || n != "b1" {
					t.Errorf("client sees %s %s", r, n)
				}
				if r, n := PeerIdentity(ss); r == "" || n == "" {
					t.Errorf("server sees %s %s", r, n)
				}
			}
		})
	}

	t.Run("unknown client authority", func(t *testing.T) {
		// The client trusts the server's authority but was issued by another.
		c := client(dir, "f1", RoleBackend).Clone()
		kp, _ := tls.LoadX509KeyPair(filepath.Join(other, "f1.crt"), filepath.Join(other, "f1.key"))
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &kp, nil }
		_, _, cerr, serr := shake(t, server(dir, "b1"), c, "backend.example")
		if serr == nil || !strings.Contains(serr.Error(), "not by the authority in ca.crt here") || block.KindOf(cerr) != block.KindDenied {
			t.Errorf("server: %v; client: %v", serr, cerr)
		}
	})
	t.Run("nbd", func(t *testing.T) {
		open, err := NBDServerTLS(dir, "b1", false)
		if err != nil {
			t.Fatal(err)
		}
		shut, _ := NBDServerTLS(dir, "b1", true)
		plain := &tls.Config{RootCAs: nobody.RootCAs, MaxVersion: tls.VersionTLS12}
		if _, _, cerr, serr := shake(t, open, plain, "backend.example"); cerr != nil || serr != nil {
			t.Errorf("no peer verification: %v %v", cerr, serr)
		}
		if _, _, _, serr := shake(t, shut, plain, "backend.example"); serr == nil {
			t.Error("a client without certificate was let in")
		}
		if _, _, cerr, serr := shake(t, shut, old12, "backend.example"); cerr != nil || serr != nil {
			t.Errorf("client with certificate by TLS 1.2: %v %v", cerr, serr)
		}
	})
}

func TestNoRoleInCertificate(t *testing.T) {
	err := verifyRole("client", nil)(tls.ConnectionState{PeerCertificates: []*x509.Certificate{{}}, VerifiedChains: [][]*x509.Certificate{{}}})
	if block.KindOf(err) != block.KindDenied {
		t.Fatal(err)
	}
}

func TestRenewalIsNoticed(t *testing.T) {
	dir := authority(t)
	issue(t, dir, Request{Role: RoleBackend, Name: "b1", Hosts: []string{"b"}})
	issue(t, dir, Request{Role: RoleFrontend, Name: "f1"})
	s, err := ServerTLS(dir, "b1")
	if err != nil {
		t.Fatal(err)
	}
	c, err := ClientTLS(dir, "f1", RoleBackend)
	if err != nil {
		t.Fatal(err)
	}
	one, _, _, _ := shake(t, s, c, "b")
	issue(t, dir, Request{Role: RoleBackend, Name: "b1", Hosts: []string{"b"}, Renew: true})
	future := time.Now().Add(time.Minute) // coarse file times must not hide it
	os.Chtimes(filepath.Join(dir, "b1.crt"), future, future)
	two, _, cerr, _ := shake(t, s, c, "b")
	if cerr != nil {
		t.Fatal(cerr)
	}
	if one.PeerCertificates[0].Equal(two.PeerCertificates[0]) {
		t.Error("the old certificate is still served")
	}
	// A half done renewal goes on with the old pair.
	os.WriteFile(filepath.Join(dir, "b1.crt"), []byte("half"), 0o644)
	three, _, cerr, _ := shake(t, s, c, "b")
	if cerr != nil || !three.PeerCertificates[0].Equal(two.PeerCertificates[0]) {
		t.Errorf("after a broken file: %v", cerr)
	}
}
