// Package pki is the certificate authority of a Forerun installation and the
// TLS settings made from it. A directory holds ca.crt, ca.key and one NAME.crt
// and NAME.key per node, all PEM; ca.key stays on the machine that issues.
//
// A certificate says who a node is in a URI subject alternative name of the
// form spiffe://forerun/ROLE/NAME (the SPIFFE ID format, so that another
// SPIFFE issuer can take this package's place), and where it may be reached in
// DNS and IP names. Keys are ECDSA P-256 (FIPS 186-4).
//
// Both sides of a connection verify the other's chain and role. A node's own
// certificate is read again when its files change, so renewal needs no
// restart; the CA is read when the settings are made.
package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"forerun/block"
)

// Role says what a node may do. Roles are plain strings because they stand in
// certificates and configuration.
type Role = string

// The roles.
const (
	RoleBackend  Role = "backend"  // serves a source disk
	RoleFrontend Role = "frontend" // serves a workload
	RoleOperator Role = "operator" // a person or program that gives orders
)

var roles = []Role{RoleBackend, RoleFrontend, RoleOperator}

// The trust domain and scheme of the URI names.
const (
	scheme = "spiffe"
	domain = "forerun"
)

// Lifetimes used where none is asked for.
const (
	CALifetime   = 10 * 365 * 24 * time.Hour
	LeafLifetime = 365 * 24 * time.Hour
)

// backdate allows for clocks that are behind the issuer's.
const backdate = time.Hour

// Request is what a certificate is to say.
type Request struct {
	Role  Role
	Name  string   // the node's, see CheckName; also the file name
	Hosts []string // DNS names and IP addresses a server is reached by; clients need none
	// NotAfter ends the certificate; if zero it lives for Lifetime, and if that
	// is zero too for LeafLifetime. It never outlives the CA.
	NotAfter time.Time
	Lifetime time.Duration
	// Renew replaces an existing certificate of that name. Without it an
	// existing one is an error of KindExists.
	Renew bool
}

var nameRE = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$`)

// CheckName says whether name can be a node's: 1 to 63 letters, digits, dots,
// underscores and dashes, beginning with a letter or digit, and not "ca".
func CheckName(name string) error {
	if !nameRE.MatchString(name) || name == "ca" {
		return &block.Error{Op: "pki.name", Object: fmt.Sprintf("%q", name), Kind: block.KindInvalid,
			Err: errors.New(`not a node name: use 1 to 63 letters, digits, ".", "_" and "-", beginning with a letter or digit (and not "ca")`)}
	}
	return nil
}

func checkRole(r Role) error {
	if !slices.Contains(roles, r) {
		return &block.Error{Op: "pki.role", Object: fmt.Sprintf("%q", r), Kind: block.KindInvalid,
			Err: fmt.Errorf("no such role; there are %v", roles)}
	}
	return nil
}

// Init makes a new authority in dir (created if needed, mode 0700): ca.crt and
// ca.key. An authority that is there already is KindExists and stays as it is.
func Init(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return block.E("pki.init", dir, 0, err)
	}
	crt, key := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key")
	for _, p := range []string{crt, key} {
		if _, err := os.Lstat(p); err == nil {
			return &block.Error{Op: "pki.init", Object: p, Kind: block.KindExists,
				Err: errors.New("an authority is there already; certificates it issued would stop working if it were replaced")}
		}
	}
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return block.E("pki.init", dir, 0, err)
	}
	now := time.Now()
	serial, err := newSerial()
	if err != nil {
		return block.E("pki.init", dir, 0, err)
	}
	t := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "Forerun CA " + serial.Text(16)[:8]},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(CALifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &k.PublicKey, k)
	if err != nil {
		return block.E("pki.init", dir, 0, err)
	}
	// The key first: a certificate without its key would look like an authority.
	if err := writeKey(key, k, false); err != nil {
		return block.E("pki.init", key, 0, err)
	}
	if err := writeFile(crt, pemOf("CERTIFICATE", der), 0o644, false); err != nil {
		return block.E("pki.init", crt, 0, err)
	}
	return nil
}

// addHosts puts the names and addresses into t. A name that no client could ask
// for would only be found out when it is refused.
func addHosts(t *x509.Certificate, r Request) error {
	bad := func(h, why string) error {
		return block.E("pki.issue", r.Name, block.KindInvalid, fmt.Errorf("host %q %s", h, why))
	}
	for _, h := range r.Hosts {
		h = strings.TrimSpace(h)
		if ip := net.ParseIP(strings.TrimSuffix(strings.TrimPrefix(h, "["), "]")); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
			continue
		}
		switch {
		case h == "": // of a list like "a,"
			continue
		case strings.ContainsAny(h, ":/[] \t"):
			return bad(h, "is neither a host name nor an address; give it without a port")
		}
		t.DNSNames = append(t.DNSNames, h)
	}
	return nil
}

// Issue writes dir/NAME.key (PKCS 8, mode 0600) and dir/NAME.crt, signed by
// the authority in dir.
func Issue(dir string, r Request) error {
	if err := checkRole(r.Role); err != nil {
		return err
	}
	if err := CheckName(r.Name); err != nil {
		return err
	}
	crt, key := filepath.Join(dir, r.Name+".crt"), filepath.Join(dir, r.Name+".key")
	if !r.Renew {
		for _, p := range []string{crt, key} {
			if _, err := os.Lstat(p); err == nil {
				return &block.Error{Op: "pki.issue", Object: p, Kind: block.KindExists,
					Err: errors.New("it is there already; renew it, or choose another name")}
			}
		}
	}
	ca, cakey, err := loadCA(dir)
	if err != nil {
		return err
	}
	now := time.Now()
	end := r.NotAfter
	if end.IsZero() {
		life := r.Lifetime
		if life == 0 {
			life = LeafLifetime
		}
		end = now.Add(life)
	}
	if end.After(ca.NotAfter) {
		end = ca.NotAfter
	}
	begin := now.Add(-backdate)
	if end.Before(begin) {
		begin = end.Add(-backdate) // an expired certificate: drills and tests ask for one
	}
	serial, err := newSerial()
	if err != nil {
		return block.E("pki.issue", r.Name, 0, err)
	}
	t := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: r.Name, OrganizationalUnit: []string{r.Role}},
		NotBefore:    begin,
		NotAfter:     end,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:         []*url.URL{{Scheme: scheme, Host: domain, Path: "/" + r.Role + "/" + r.Name}},
	}
	if err := addHosts(t, r); err != nil {
		return err
	}
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return block.E("pki.issue", r.Name, 0, err)
	}
	der, err := x509.CreateCertificate(rand.Reader, t, ca, &k.PublicKey, cakey)
	if err != nil {
		return block.E("pki.issue", r.Name, 0, err)
	}
	if err := writeKey(key, k, r.Renew); err != nil {
		return block.E("pki.issue", key, 0, err)
	}
	if err := writeFile(crt, pemOf("CERTIFICATE", der), 0o644, r.Renew); err != nil {
		return block.E("pki.issue", crt, 0, err)
	}
	return nil
}

func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 126))
	if err != nil {
		return nil, err
	}
	return n.SetBit(n, 126, 1), nil // never short: RFC 5280 4.1.2.2 asks for a positive number
}

func pemOf(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func writeKey(path string, k *ecdsa.PrivateKey, replace bool) error {
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return err
	}
	return writeFile(path, pemOf("PRIVATE KEY", der), 0o600, replace)
}

// writeFile publishes the file by name when it is complete and durable. Without
// replace an existing file of that name is an error.
func writeFile(path string, data []byte, mode fs.FileMode, replace bool) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, ".new-*") // 0600 from the beginning
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	if replace {
		err = os.Rename(f.Name(), path)
	} else {
		err = os.Link(f.Name(), path) // unlike rename, link refuses to replace
	}
	if err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func missing(path, command string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return &block.Error{Op: "pki.load", Object: path, Kind: block.KindNotFound,
			Err: fmt.Errorf("there is no such file; %s makes it: %w", command, fs.ErrNotExist)}
	}
	return block.E("pki.load", path, 0, err)
}

func initCommand(dir string) string { return fmt.Sprintf("`forerun pki init --dir %s`", dir) }

func issueCommand(dir, name, role string) string {
	if role == "" {
		role = "ROLE"
	}
	return fmt.Sprintf("`forerun pki issue --dir %s --role %s --name %s` (where ca.key is)", dir, role, name)
}

func parseCerts(path string, data []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for {
		var b *pem.Block
		if b, data = pem.Decode(data); b == nil {
			break
		}
		if b.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, block.E("pki.load", path, block.KindCorrupt, err)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, block.E("pki.load", path, block.KindCorrupt, errors.New("no certificate in it (PEM, type CERTIFICATE)"))
	}
	return out, nil
}

func loadCA(dir string) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	crt, key := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key")
	data, err := os.ReadFile(crt)
	if err != nil {
		return nil, nil, missing(crt, initCommand(dir), err)
	}
	certs, err := parseCerts(crt, data)
	if err != nil {
		return nil, nil, err
	}
	data, err = os.ReadFile(key)
	if err != nil {
		return nil, nil, missing(key, initCommand(dir)+" (certificates are issued where ca.key is)", err)
	}
	b, _ := pem.Decode(bytes.TrimSpace(data))
	if b == nil || b.Type != "PRIVATE KEY" {
		return nil, nil, block.E("pki.load", key, block.KindCorrupt, errors.New("no key in it (PEM, type PRIVATE KEY)"))
	}
	k, err := x509.ParsePKCS8PrivateKey(b.Bytes)
	if err != nil {
		return nil, nil, block.E("pki.load", key, block.KindCorrupt, err)
	}
	ec, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return nil, nil, block.E("pki.load", key, block.KindCorrupt, fmt.Errorf("a key of type %T, not ECDSA", k))
	}
	// ca.crt may hold former authorities too; the one that signs is the key's.
	for _, c := range certs {
		if ec.PublicKey.Equal(c.PublicKey) {
			if time.Now().After(c.NotAfter) {
				return nil, nil, block.E("pki.load", crt, block.KindInvalid, fmt.Errorf("the authority expired on %s", stamp(c.NotAfter)))
			}
			return c, ec, nil
		}
	}
	return nil, nil, block.E("pki.load", key, block.KindCorrupt, fmt.Errorf("it is not the key of %s", crt))
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }
