package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"forerun/block"
)

// ServerTLS returns the settings of a server named name: TLS 1.3 only, the
// client must show a certificate of the authority in dir and have one of the
// allowed roles (any role if none is given). Missing files are KindNotFound
// and the error names the command that makes them.
func ServerTLS(dir, name string, allowed ...Role) (*tls.Config, error) {
	for _, r := range allowed {
		if err := checkRole(r); err != nil {
			return nil, err
		}
	}
	l, pool, err := open(dir, name)
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return l.usable() },
		ClientCAs:      pool,
		// A certificate that is given is verified; one that is missing is refused
		// by VerifyConnection, with an error that says so.
		ClientAuth:             tls.VerifyClientCertIfGiven,
		VerifyConnection:       verifyRole("client", allowed),
		SessionTicketsDisabled: true, // a role taken away ends with the next connection
	}, nil
}

// ClientTLS returns the settings of a client named name: TLS 1.3 only, it
// shows its certificate, and the server must have a certificate of the
// authority in dir, for the host that was dialled, with the required role
// (any if empty). ServerName is left to the caller.
func ClientTLS(dir, name string, required Role) (*tls.Config, error) {
	var allowed []Role
	if required != "" {
		if err := checkRole(required); err != nil {
			return nil, err
		}
		allowed = []Role{required}
	}
	l, pool, err := open(dir, name)
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return l.usable()
		},
		RootCAs:                pool,
		VerifyConnection:       verifyRole("server", allowed),
		SessionTicketsDisabled: true,
	}, nil
}

// NBDServerTLS returns the settings of an NBD export. NBD clients bring their
// own TLS (GnuTLS in nbd-client, libnbd and QEMU), so TLS 1.2 is accepted and,
// with verifyPeer, any role of this authority; without verifyPeer the client
// is not asked for a certificate.
func NBDServerTLS(dir, name string, verifyPeer bool) (*tls.Config, error) {
	l, pool, err := open(dir, name)
	if err != nil {
		return nil, err
	}
	c := &tls.Config{
		MinVersion:             tls.VersionTLS12,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return l.usable() },
		SessionTicketsDisabled: true,
	}
	if verifyPeer {
		c.ClientCAs = pool
		c.ClientAuth = tls.VerifyClientCertIfGiven
		c.VerifyConnection = verifyRole("client", nil)
	}
	return c, nil
}

// PeerIdentity returns the role and name in the certificate the peer showed,
// both empty if it showed none or one without identity. The connection must
// have been verified, as those made with this package's settings are.
func PeerIdentity(cs tls.ConnectionState) (role Role, name string) {
	if len(cs.PeerCertificates) == 0 {
		return "", ""
	}
	return identity(cs.PeerCertificates[0])
}

// identity reads spiffe://forerun/ROLE/NAME. A certificate with more than one
// URI name has none: the SPIFFE X.509-SVID standard, section 2, allows one.
func identity(c *x509.Certificate) (Role, string) {
	if len(c.URIs) != 1 || c.URIs[0].Scheme != scheme || c.URIs[0].Host != domain {
		return "", ""
	}
	role, name, ok := strings.Cut(strings.TrimPrefix(c.URIs[0].Path, "/"), "/")
	if !ok || !slices.Contains(roles, role) || CheckName(name) != nil {
		return "", ""
	}
	return role, name
}

func denied(format string, args ...any) error {
	return &block.Error{Op: "pki.verify", Kind: block.KindDenied, Err: fmt.Errorf(format, args...)}
}

// verifyRole runs after the chain was verified, on every connection.
func verifyRole(peer string, allowed []Role) func(tls.ConnectionState) error {
	return func(cs tls.ConnectionState) error {
		if len(cs.PeerCertificates) == 0 {
			return denied("the %s showed no certificate; give it one with `forerun pki issue`", peer)
		}
		if len(cs.VerifiedChains) == 0 {
			return denied("the %s's certificate was not verified", peer)
		}
		role, name := identity(cs.PeerCertificates[0])
		if role == "" {
			return denied("the %s's certificate (%s) names no role; `forerun pki issue` makes ones that do", peer, cs.PeerCertificates[0].Subject)
		}
		if len(allowed) > 0 && !slices.Contains(allowed, role) {
			return denied("the %s %q has the role %s, but %s is needed here", peer, name, role, strings.Join(allowed, " or "))
		}
		return nil
	}
}

// Explain turns an error of a TLS handshake into one that says what is wrong
// with whose certificate and what to do, of KindDenied. Errors that are not
// about certificates come back as they are.
func Explain(err error) error {
	if err == nil {
		return nil
	}
	var be *block.Error
	if errors.As(err, &be) {
		return err // verifyRole's, clear already
	}
	var who string
	var cert *x509.Certificate
	var ve *tls.CertificateVerificationError
	if errors.As(err, &ve) && len(ve.UnverifiedCertificates) > 0 {
		cert = ve.UnverifiedCertificates[0]
		who = cert.Subject.CommonName
		if role, name := identity(cert); role != "" {
			who = role + " " + name
		}
	}
	var inv x509.CertificateInvalidError
	var unk x509.UnknownAuthorityError
	var host x509.HostnameError
	var op *net.OpError
	switch {
	case errors.As(err, &inv) && inv.Reason == x509.Expired && inv.Cert != nil:
		if now := time.Now(); now.Before(inv.Cert.NotBefore) {
			return denied("the certificate of %q is valid only from %s on; are the clocks right? (%w)", who, stamp(inv.Cert.NotBefore), err)
		}
		return denied("the certificate of %q expired on %s; renew it with `forerun pki issue --renew` (%w)", who, stamp(inv.Cert.NotAfter), err)
	case errors.As(err, &unk):
		issuer := ""
		if cert != nil {
			issuer = cert.Issuer.CommonName
		}
		return denied("the certificate of %q was issued by %q, not by the authority in ca.crt here; both sides need certificates of the same authority (%w)", who, issuer, err)
	case errors.As(err, &host):
		var names []string
		if host.Certificate != nil {
			names = append(names, host.Certificate.DNSNames...)
			for _, ip := range host.Certificate.IPAddresses {
				names = append(names, ip.String())
			}
		}
		return denied("the certificate of %q is for the hosts %v, not for %s; issue it with --host %s (%w)", who, names, host.Host, host.Host, err)
	case errors.As(err, &ve):
		return denied("the certificate of %q was refused: %w", who, err)
	case errors.As(err, &op) && op.Op == "remote error":
		return denied("the other side refused this node's certificate or TLS settings; its log says why (%w)", err)
	}
	return err
}

// CheckOwn says whether the node's own certificate has the role its daemon
// needs, so that the mistake is named here and not by the other side's alert.
func CheckOwn(dir, name string, needed Role) error {
	l, _, err := open(dir, name)
	if err != nil {
		return err
	}
	c, err := l.usable()
	if err != nil {
		return err
	}
	if role, _ := identity(c.Leaf); role != needed {
		return denied("%s has the role %q, and this daemon needs %q; %s makes one", l.crt, role, needed, issueCommand(dir, name, needed))
	}
	return nil
}

// leaf is a node's own certificate, read again when its files change.
type leaf struct {
	crt, key string
	dir      string
	name     string

	mu    sync.Mutex
	stamp [2]fileStamp
	cert  *tls.Certificate
}

type fileStamp struct {
	mod  time.Time
	size int64
}

func open(dir, name string) (*leaf, *x509.CertPool, error) {
	if err := CheckName(name); err != nil {
		return nil, nil, err
	}
	ca := filepath.Join(dir, "ca.crt")
	data, err := os.ReadFile(ca)
	if err != nil {
		return nil, nil, missing(ca, initCommand(dir)+" (or copy it from where that was run)", err)
	}
	certs, err := parseCerts(ca, data)
	if err != nil {
		return nil, nil, err
	}
	pool := x509.NewCertPool()
	for _, c := range certs {
		pool.AddCert(c)
	}
	l := &leaf{crt: filepath.Join(dir, name+".crt"), key: filepath.Join(dir, name+".key"), dir: dir, name: name}
	if _, err := l.current(); err != nil {
		return nil, nil, err
	}
	return l, pool, nil
}

// usable returns the current certificate if it has not expired. Showing an
// expired one would only earn an alert without an explanation.
func (l *leaf) usable() (*tls.Certificate, error) {
	c, err := l.current()
	if err != nil {
		return nil, err
	}
	if x := c.Leaf; x != nil && time.Now().After(x.NotAfter) {
		role, _ := identity(x)
		return nil, &block.Error{Op: "pki.load", Object: l.crt, Kind: block.KindDenied,
			Err: fmt.Errorf("this node's own certificate expired on %s; %s with --renew makes a new one", stamp(x.NotAfter), issueCommand(l.dir, l.name, role))}
	}
	return c, nil
}

// current returns the certificate as the files have it. While a renewal is
// half done (new key, old certificate) and when the files have become
// unreadable, the one read last goes on being used.
func (l *leaf) current() (*tls.Certificate, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var now [2]fileStamp
	for i, p := range []string{l.crt, l.key} {
		st, err := os.Stat(p)
		if err != nil {
			if l.cert != nil {
				return l.cert, nil
			}
			return nil, missing(p, issueCommand(l.dir, l.name, ""), err)
		}
		now[i] = fileStamp{st.ModTime(), st.Size()}
	}
	if l.cert != nil && now == l.stamp {
		return l.cert, nil
	}
	c, err := tls.LoadX509KeyPair(l.crt, l.key)
	if err != nil {
		if l.cert != nil {
			return l.cert, nil
		}
		return nil, block.E("pki.load", l.crt, block.KindCorrupt, fmt.Errorf("with %s: %w", l.key, err))
	}
	l.cert, l.stamp = &c, now
	return l.cert, nil
}
