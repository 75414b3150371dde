package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"forerun/block"
	"forerun/internal/nbdproto"
)

// Listener is an address that a Server serves on.
type Listener struct {
	net.Listener
	uri   nbdproto.URI
	close sync.Once
	err   error
}

// URI is the address as an NBD URI without an export's name, with the port
// that was chosen if port 0 was asked for.
func (l *Listener) URI() string {
	u := l.uri
	if !u.Unix {
		u.Addr = l.Addr().String()
	}
	return u.String()
}

// Close stops listening and removes a Unix socket from the file system.
func (l *Listener) Close() error {
	l.close.Do(func() { l.err = l.Listener.Close() })
	return l.err
}

// Listen listens on an NBD URI: nbd://HOST:PORT, nbds://HOST:PORT,
// nbd+unix:///?socket=PATH or nbds+unix:///?socket=PATH. The port defaults to
// 10809, an empty host is every address of this machine. With nbds a client
// must begin TLS before anything else. A Unix socket that nobody listens on any
// more is replaced; one that somebody listens on is KindBusy.
func (s *Server) Listen(uri string) (*Listener, error) {
	u, err := parseAddress(uri)
	if err != nil {
		return nil, err
	}
	if u.TLS && s.opt.TLS == nil {
		return nil, block.E("nbd.listen", uri, block.KindInvalid,
			errors.New("nbds needs a certificate; give one, or listen on nbd"))
	}
	network := "tcp"
	if u.Unix {
		network = "unix"
		if err := removeStale(u.Addr); err != nil {
			return nil, err
		}
	}
	l, err := new(net.ListenConfig).Listen(context.Background(), network, u.Addr)
	if err != nil {
		kind := block.KindNone
		if errors.Is(err, syscall.EADDRINUSE) {
			kind = block.KindBusy
		}
		return nil, block.E("nbd.listen", uri, kind, err)
	}
	return &Listener{Listener: l, uri: u}, nil
}

// CheckAddress says what Listen would refuse about the text of uri alone.
func CheckAddress(uri string) error {
	_, err := parseAddress(uri)
	return err
}

// maxSocketPath is the room for a path in a sockaddr_un(7), bytes.
const maxSocketPath = 107

func parseAddress(uri string) (nbdproto.URI, error) {
	u, err := nbdproto.ParseURI(uri)
	if err != nil {
		return u, block.E("nbd.listen", "", block.KindInvalid, err)
	}
	bad := func(format string, a ...any) (nbdproto.URI, error) {
		return u, block.E("nbd.listen", uri, block.KindInvalid, fmt.Errorf(format, a...))
	}
	switch {
	case u.Export != "":
		return bad("an address to listen on names no export; leave %q out", u.Export)
	case len(u.Query) > 0:
		return bad("parameters are for clients; leave %q out", u.Query.Encode())
	case u.Unix && len(u.Addr) > maxSocketPath:
		return bad("the socket's path has %d bytes, the system allows %d: use a shorter one", len(u.Addr), maxSocketPath)
	}
	return u, nil
}

// removeStale removes a socket that a process left behind which did not live
// to remove it.
func removeStale(path string) error {
	if strings.HasPrefix(path, "@") {
		return nil
	}
	st, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return block.E("nbd.listen", path, block.KindNone, err)
	}
	if st.Mode().Type() != os.ModeSocket {
		return block.E("nbd.listen", path, block.KindExists,
			errors.New("there is a file of that name that is no socket; remove it or give another path"))
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		c.Close()
		return block.E("nbd.listen", path, block.KindBusy,
			errors.New("another process listens on this socket; stop it or give another path"))
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return block.E("nbd.listen", path, block.KindNone, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return block.E("nbd.listen", path, block.KindNone, err)
	}
	return nil
}
