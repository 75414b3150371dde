package nbd

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"

	"forerun/block"
	"forerun/internal/nbdproto"
)

const maxSocketPath = 107 // bytes, sockaddr_un(7)

// Target is where an export is, parsed from an NBD URI.
type Target struct {
	URI     string // as it was given, for errors and logs
	Network string // "tcp" or "unix"
	Address string // host:port, or the socket's path
	Export  string // name, may be empty
	TLS     bool
	// CertDir holds ca-cert.pem, and client-cert.pem with client-key.pem where
	// the server asks for them. Empty: the system's authorities.
	CertDir string
	// Hostname is what the server's certificate must be for. Empty over a unix
	// socket: any name, from the right authority.
	Hostname string
	// NoVerify accepts any certificate.
	NoVerify bool
	// Config replaces CertDir and NoVerify; no URI sets it. Its ServerName is
	// Hostname, and localhost over a unix socket.
	Config *tls.Config
}

// ParseURI reads nbd://, nbds://, nbd+unix:// and nbds+unix:// URIs. Errors are
// of KindInvalid and say which parameters exist.
func ParseURI(s string) (Target, error) {
	bad := func(format string, a ...any) (Target, error) {
		return Target{}, block.E("source.open", s, block.KindInvalid, fmt.Errorf(format, a...))
	}
	u, err := nbdproto.ParseURI(s)
	if err != nil {
		return bad("%w", err)
	}
	if p, err := url.Parse(s); err == nil && p.User != nil {
		return bad("a user name in an NBD URI is for TLS with pre-shared keys, which is not supported: use certificates (tls-certificates=DIR)")
	}
	t := Target{URI: s, Network: "tcp", Address: u.Addr, Export: u.Export, TLS: u.TLS}
	if u.Unix {
		t.Network = "unix"
		if len(t.Address) > maxSocketPath {
			return bad("the socket's path has %d bytes, the system allows %d: use a shorter link to it", len(t.Address), maxSocketPath)
		}
	} else {
		host, port, err := net.SplitHostPort(u.Addr)
		if err != nil {
			return bad("%w", err)
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return bad("%q is not a port", port)
		}
		if host == "" {
			host = "localhost"
		}
		t.Address, t.Hostname = net.JoinHostPort(host, port), host
	}
	for k, vs := range u.Query {
		v := vs[len(vs)-1]
		if len(vs) > 1 {
			return bad("%s= is given %d times", k, len(vs))
		}
		switch {
		case k == "tls-certificates" && t.TLS:
			t.CertDir = v
		case k == "tls-hostname" && t.TLS:
			t.Hostname = v
		case k == "tls-verify-peer" && t.TLS:
			on, err := truth(v)
			if err != nil {
				return bad("tls-verify-peer=%s: %w", v, err)
			}
			t.NoVerify = !on
		default:
			return bad("%s= does not belong here; there are socket= (unix), and tls-certificates=, tls-hostname=, tls-verify-peer= (nbds)", k)
		}
	}
	return t, nil
}

func truth(s string) (bool, error) {
	switch strings.ToLower(s) {
	case "1", "true", "on", "yes":
		return true, nil
	case "0", "false", "off", "no":
		return false, nil
	}
	return false, errors.New("say 1 or 0")
}
