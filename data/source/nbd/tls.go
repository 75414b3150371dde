package nbd

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Names of the files in a directory of certificates, as QEMU, nbdkit and libnbd use them.
const (
	caFile   = "ca-cert.pem"
	certFile = "client-cert.pem"
	keyFile  = "client-key.pem"
)

// tlsConfig reads the certificates anew for each connection, so that renewed
// ones are used by the next reconnect.
func tlsConfig(t Target) (*tls.Config, error) {
	if t.Config != nil {
		c := t.Config.Clone()
		c.ServerName = t.Hostname
		if c.ServerName == "" {
			c.ServerName = "localhost" // a unix socket is on this host
		}
		return c, nil
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: t.Hostname}
	if t.CertDir != "" {
		ca := filepath.Join(t.CertDir, caFile)
		pem, err := os.ReadFile(ca)
		if err != nil {
			return nil, fmt.Errorf("tls-certificates: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("tls-certificates: %s holds no certificate", ca)
		}
		cert, err := tls.LoadX509KeyPair(filepath.Join(t.CertDir, certFile), filepath.Join(t.CertDir, keyFile))
		switch {
		case err == nil:
			c.Certificates = []tls.Certificate{cert}
		case errors.Is(err, fs.ErrNotExist): // then none is shown
		default:
			return nil, fmt.Errorf("tls-certificates: %w", err)
		}
	}
	switch {
	case t.NoVerify:
		c.InsecureSkipVerify = true
	case t.Hostname == "":
		// The chain is verified, the name is not: a socket's path has none.
		c.InsecureSkipVerify = true
		c.VerifyConnection = func(cs tls.ConnectionState) error {
			o := x509.VerifyOptions{Roots: c.RootCAs, Intermediates: x509.NewCertPool()}
			for _, ic := range cs.PeerCertificates[1:] {
				o.Intermediates.AddCert(ic)
			}
			_, err := cs.PeerCertificates[0].Verify(o)
			return err
		}
	}
	return c, nil
}
