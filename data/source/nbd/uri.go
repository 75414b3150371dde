package nbd

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"

	"forerun/block"
)

const (
	defaultPort   = "10809"
	maxExportName = 4096 // bytes, the protocol's limit on strings
	maxSocketPath = 107  // bytes, sockaddr_un(7)
)

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
}

// ParseURI reads nbd://, nbds://, nbd+unix:// and nbds+unix:// URIs. Errors are
// of KindInvalid and say which parameters exist.
func ParseURI(s string) (Target, error) {
	t := Target{URI: s}
	bad := func(format string, a ...any) (Target, error) {
		return Target{}, block.E("source.open", s, block.KindInvalid, fmt.Errorf(format, a...))
	}
	u, err := url.Parse(s)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		return bad("not an NBD URI: %w", err)
	}
	switch u.Scheme {
	case "nbd", "nbds":
		t.Network = "tcp"
	case "nbd+unix", "nbds+unix":
		t.Network = "unix"
	default:
		return bad("%q is not a scheme of NBD: use nbd, nbds, nbd+unix or nbds+unix", u.Scheme)
	}
	t.TLS = strings.HasPrefix(u.Scheme, "nbds")
	if u.Opaque != "" {
		return bad("write %s:// with two slashes", u.Scheme)
	}
	if u.User != nil {
		return bad("a user name in an NBD URI is for TLS with pre-shared keys, which is not supported: use certificates (tls-certificates=DIR)")
	}
	if u.Fragment != "" {
		return bad("an NBD URI has no fragment (%q); write # as %%23", "#"+u.Fragment)
	}
	t.Export = strings.TrimPrefix(u.Path, "/")
	if len(t.Export) > maxExportName {
		return bad("the export name has %d bytes, at most %d are allowed", len(t.Export), maxExportName)
	}
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return bad("its parameters cannot be read: %w", err)
	}
	socket := ""
	for k, vs := range q {
		v := vs[len(vs)-1]
		if len(vs) > 1 {
			return bad("%s= is given %d times", k, len(vs))
		}
		switch {
		case k == "socket" && t.Network == "unix":
			socket = v
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
			return bad("%s= does not belong to a %s URI; there are socket= (unix), and tls-certificates=, tls-hostname=, tls-verify-peer= (nbds)", k, u.Scheme)
		}
	}
	if t.Network == "unix" {
		if socket == "" {
			return bad("add ?socket=PATH: a %s URI needs the path of the server's socket", u.Scheme)
		}
		if u.Host != "" {
			return bad("a unix socket has no host (%q): write three slashes, %s:///EXPORT?socket=PATH", u.Host, u.Scheme)
		}
		if len(socket) > maxSocketPath {
			return bad("the socket's path has %d bytes, the system allows %d: use a shorter link to it", len(socket), maxSocketPath)
		}
		t.Address = socket
		return t, nil
	}
	host, port := u.Hostname(), u.Port()
	if host == "" {
		host = "localhost"
	}
	if port == "" {
		port = defaultPort
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return bad("%q is not a port", port)
	}
	t.Address = net.JoinHostPort(host, port)
	if t.Hostname == "" {
		t.Hostname = host
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
