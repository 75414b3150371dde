package nbdproto

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
)

// DefaultPort is the TCP port that IANA assigned to NBD.
const DefaultPort = "10809"

// URI is an NBD URI as the NBD project's doc/uri.md defines it.
type URI struct {
	TLS    bool   // nbds, nbds+unix: the connection must be encrypted
	Unix   bool   // nbd+unix, nbds+unix
	Addr   string // host:port, or the socket's path; "@name" for an abstract socket
	Export string // name of the export, may be empty
	// Query holds the other parameters (tls-type, tls-hostname, ...), without socket.
	Query url.Values
}

// ParseURI reads an NBD URI. The host may be empty, the port defaults to
// DefaultPort. The error says what is wrong with s, not which call failed.
func ParseURI(s string) (URI, error) {
	var u URI
	p, err := url.Parse(s)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		return u, fmt.Errorf("%q is not an NBD URI: %w", s, err)
	}
	switch p.Scheme {
	case "nbd":
	case "nbds":
		u.TLS = true
	case "nbd+unix":
		u.Unix = true
	case "nbds+unix":
		u.TLS, u.Unix = true, true
	default:
		return u, fmt.Errorf("%q is not an NBD URI: it must begin with nbd://, nbds://, nbd+unix:// or nbds+unix://", s)
	}
	if p.Opaque != "" {
		return u, fmt.Errorf("%q is not an NBD URI: write it as %s://", s, p.Scheme)
	}
	if p.Fragment != "" {
		return u, fmt.Errorf("%q is not an NBD URI: it has a fragment; write # as %%23", s)
	}
	// RFC 3986 knows no + for a space, and other clients take it for a plus.
	if u.Query, err = url.ParseQuery(strings.ReplaceAll(p.RawQuery, "+", "%2B")); err != nil {
		return u, fmt.Errorf("%q is not an NBD URI: %w", s, err)
	}
	u.Export = strings.TrimPrefix(p.Path, "/")
	if len(u.Export) > MaxString {
		return u, fmt.Errorf("the export name has %d bytes, at most %d are allowed", len(u.Export), MaxString)
	}
	socket := u.Query.Get("socket")
	u.Query.Del("socket")
	if u.Unix {
		switch {
		case socket == "" || socket == "\x00":
			return u, fmt.Errorf("%q names no socket: write %s:///?socket=PATH", s, p.Scheme)
		case p.Host != "":
			return u, fmt.Errorf("%q names a host and a Unix socket: write %s:///?socket=PATH", s, p.Scheme)
		case socket[0] == 0:
			socket = "@" + socket[1:]
		}
		u.Addr = socket
		return u, nil
	}
	if socket != "" {
		return u, fmt.Errorf("%q names a socket: write %s+unix:///?socket=PATH", s, p.Scheme)
	}
	port := p.Port()
	if port == "" {
		port = DefaultPort
	}
	u.Addr = net.JoinHostPort(p.Hostname(), port)
	return u, nil
}

// String writes u as an NBD URI.
func (u URI) String() string {
	p := url.URL{Scheme: "nbd", Path: "/" + u.Export}
	if u.TLS {
		p.Scheme = "nbds"
	}
	if !u.Unix {
		p.Host = u.Addr
		p.RawQuery = u.Query.Encode()
		return p.String()
	}
	p.Scheme += "+unix"
	socket := u.Addr
	if strings.HasPrefix(socket, "@") {
		socket = "\x00" + socket[1:]
	}
	// Clients split the query by hand: the slashes of a path stay as they are.
	p.RawQuery = "socket=" + strings.NewReplacer("%2F", "/", "+", "%20").Replace(url.QueryEscape(socket))
	if len(u.Query) > 0 {
		p.RawQuery += "&" + u.Query.Encode()
	}
	p.Host = ""
	return p.Scheme + "://" + p.EscapedPath() + "?" + p.RawQuery
}
