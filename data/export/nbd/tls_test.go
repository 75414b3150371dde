package nbd

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"forerun/internal/nbdproto"
)

// certificates makes an authority, a server and a client, and writes the files
// that libnbd looks for to dir.
func certificates(t *testing.T, dir string) (server, client *tls.Config) {
	t.Helper()
	must := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	write := func(name, typ string, der []byte) []byte {
		p := pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der})
		must(os.WriteFile(filepath.Join(dir, name), p, 0o600))
		return p
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	must(err)
	caPEM := write("ca-cert.pem", "CERTIFICATE", caDER)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(caPEM)
	leaf := func(name string, use x509.ExtKeyUsage) tls.Certificate {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(err)
		serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
		must(err)
		tmpl := &x509.Certificate{
			SerialNumber: serial, Subject: pkix.Name{CommonName: name}, DNSNames: []string{"localhost"},
			IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{use},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, ca, key.Public(), caKey)
		must(err)
		kder, err := x509.MarshalPKCS8PrivateKey(key)
		must(err)
		c, err := tls.X509KeyPair(write(name+"-cert.pem", "CERTIFICATE", der), write(name+"-key.pem", "PRIVATE KEY", kder))
		must(err)
		return c
	}
	return &tls.Config{Certificates: []tls.Certificate{leaf("server", x509.ExtKeyUsageServerAuth)}, ClientCAs: pool,
			ClientAuth: tls.RequireAndVerifyClientCert},
		&tls.Config{Certificates: []tls.Certificate{leaf("client", x509.ExtKeyUsageClientAuth)}, RootCAs: pool, ServerName: "localhost"}
}

func TestTLS(t *testing.T) {
	srv, cli := certificates(t, t.TempDir())
	m := newMem(64<<20, 1)
	s := NewServer(Options{Exports: table{"": m}, TLS: srv})
	must := func(uri string) *Listener {
		l, err := s.Listen(uri)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	forced := must("nbds://127.0.0.1:0")
	free := must("nbd+unix:///?socket=" + filepath.Join(t.TempDir(), "s"))
	stop := serveUntilEnd(t, s, forced, free)

	c := dial(t, forced)
	for _, opt := range []uint32{nbdproto.OptList, nbdproto.OptGo, nbdproto.OptInfo, nbdproto.OptStructuredReply, 99} {
		if r := c.last(opt, nil); r != nbdproto.RepErrTLSReqd {
			t.Errorf("option %d before TLS: %#x", opt, r)
		}
	}
	if r := c.last(nbdproto.OptStartTLS, []byte{1}); r != nbdproto.RepErrInvalid {
		t.Errorf("TLS with data: %#x", r)
	}
	c.startTLS(cli)
	if r := c.last(nbdproto.OptStartTLS, nil); r != nbdproto.RepErrInvalid {
		t.Errorf("TLS twice: %#x", r)
	}
	c.open("", true)
	p := pattern(20<<20, 4)
	c.ok(nbdproto.CmdWrite, 0, 12345, 20<<20, p)
	for range 3 {
		if !bytes.Equal(c.bytes(12345, 20<<20), p) {
			t.Fatal("wrong bytes through TLS")
		}
	}
	for i := range 100 {
		if !bytes.Equal(c.bytes(12345+uint64(i), 100), p[i:i+100]) {
			t.Fatal("wrong bytes through TLS")
		}
	}
	c.send(nbdproto.CmdDisc, 0, 0, 0, nil)
	c.ended()

	c = dial(t, forced)
	c.write(nbdproto.AppendOption(nil, nbdproto.OptExportName, nil))
	c.ended()

	// What was agreed on in plain text is forgotten.
	c = dial(t, free)
	c.acked(nbdproto.OptStructuredReply, nil)
	c.acked(nbdproto.OptSetMetaContext, nbdproto.AppendMetaContext(nil, "", "base:allocation"))
	c.startTLS(cli)
	c.open("", false)
	if r := c.do(nbdproto.CmdRead, 0, 0, 512, nil); r.structured {
		t.Error("structured replies outlived plain text")
	}
	c.fails(nbdproto.EINVAL, nbdproto.CmdBlockStatus, 0, 0, 512, nil)

	// What was sent in plain text behind STARTTLS is no option.
	c = dial(t, free)
	c.write(append(nbdproto.AppendOption(nil, nbdproto.OptStartTLS, nil), nbdproto.AppendOption(nil, nbdproto.OptList, nil)...))
	if _, typ, _, _ := nbdproto.ParseOptionReply(c.read(nbdproto.OptionReplyLen)); typ != nbdproto.RepAck {
		t.Errorf("STARTTLS: %#x", typ)
	}
	buf := make([]byte, 64)
	for {
		n, err := c.nc.Read(buf)
		if bytes.Contains(buf[:n], be.AppendUint64(nil, nbdproto.RepMagic)) {
			t.Error("an option in plain text was answered under TLS")
		}
		if err != nil {
			break
		}
	}

	// A stranger.
	c = dial(t, free)
	c.acked(nbdproto.OptStartTLS, nil)
	stranger := cli.Clone()
	stranger.Certificates = nil
	tc := tls.Client(c.nc, stranger)
	_ = tc.Handshake()
	if _, err := tc.Read(buf); err == nil {
		t.Error("a client without a certificate is served")
	}

	// Draining reaches a client in TLS that waits.
	c = dial(t, free)
	c.startTLS(cli)
	c.open("", true)
	c.bytes(0, 512)
	began := time.Now()
	stop()
	if d := time.Since(began); d > 3*time.Second {
		t.Errorf("shutdown took %v", d)
	}
	if st := s.Stats(); st.Connections != 0 {
		t.Errorf("%+v", st)
	}
}
