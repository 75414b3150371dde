package source

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"time"

	"forerun/block"
	"forerun/data/source/nbd"
	"forerun/data/source/raw"
)

// Options of Open. The zero value opens for writing where that is permitted.
type Options struct {
	// Log gets changes of state. Nil is silent.
	Log *slog.Logger
	// ReadOnly never changes the source.
	ReadOnly bool
	// OnState, if set, is told why calls wait for the server of the source, and
	// with an empty text when they do not any more. It must not call the source.
	OnState func(why string)
	// WriteImages lets an image with ?format= be written, which is read-only otherwise.
	WriteImages bool
	// StateDir is where directories for private sockets are made. Empty is the
	// system's directory for temporary files.
	StateDir string
	// Connections to an NBD server that allows several; 0 is nbd.DefaultConnections.
	Connections int
	// ReconnectTimeout is how long calls wait for an NBD server out of reach; 0 is
	// until their context ends.
	ReconnectTimeout time.Duration
	// QEMUNBD is the qemu-nbd to run; empty is the one on PATH.
	QEMUNBD string
}

// formats are the values of ?format=, named as QEMU names them.
var formats = []string{"raw", "qcow2", "vmdk", "vpc", "vhdx"}

// Open opens and claims the source that spec names, see the package comment.
// ctx bounds the opening only. Errors: KindInvalid for a spec that makes no
// sense or a file that needs ?format=, KindBusy when somebody else uses the
// source, KindNotFound, KindDenied, KindUnavailable when a server cannot be
// reached, KindUnsupported when qemu-nbd is needed and not installed.
func Open(ctx context.Context, spec string, o Options) (block.Device, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s, err := parse(spec)
	if err != nil {
		return nil, err
	}
	switch {
	case s.uri:
		t, err := nbd.ParseURI(spec)
		if err != nil {
			return nil, err
		}
		return device(nbd.Open(ctx, t, nbd.Options{
			Connections: o.Connections, ReadOnly: o.ReadOnly, ReconnectTimeout: o.ReconnectTimeout, Log: o.Log,
			OnState: o.OnState,
		}))
	case s.format != "" && s.format != "raw":
		return device(openImage(ctx, s.path, s.format, o))
	}
	d, err := raw.Open(s.path, raw.Options{ReadOnly: o.ReadOnly, Log: o.Log})
	if err != nil {
		return nil, err
	}
	if s.format == "" {
		format, err := probe(d)
		if err == nil && format != "" {
			err = looksLike(format)
		}
		if err != nil {
			_ = d.Close() // the error to tell is the first one
			return nil, block.E("source.open", spec, block.KindInvalid, err)
		}
	}
	return d, nil
}

// File is the path of a source that is one raw file or block device, and
// whether spec names such a one.
func File(spec string) (path string, ok bool) {
	s, err := parse(spec)
	if err != nil || s.uri || s.format != "" && s.format != "raw" {
		return "", false
	}
	return s.path, true
}

// device avoids a nil pointer in a non-nil interface.
func device[D block.Device](d D, err error) (block.Device, error) {
	if err != nil {
		return nil, err
	}
	return d, nil
}

type parsed struct {
	uri    bool // an NBD URI
	path   string
	format string
}

// parse takes a spec apart. A question mark that is not followed by name=value
// belongs to the path.
func parse(spec string) (parsed, error) {
	bad := func(format string, a ...any) (parsed, error) {
		return parsed{}, block.E("source.open", spec, block.KindInvalid, fmt.Errorf(format, a...))
	}
	if spec == "" {
		return bad("the source is empty; name a file, a block device or an NBD URI")
	}
	if strings.ContainsRune(spec, 0) {
		return bad("the source has a zero byte in its name")
	}
	if scheme, _, ok := strings.Cut(spec, ":"); ok && !strings.ContainsAny(scheme, "/?") {
		switch {
		case slices.Contains([]string{"nbd", "nbds", "nbd+unix", "nbds+unix"}, scheme):
			return parsed{uri: true}, nil
		case strings.HasPrefix(spec[len(scheme):], "://"):
			return bad("%s:// is not a source that can be opened; there are paths and nbd, nbds, nbd+unix and nbds+unix URIs (a file of that name is ./%s)", scheme, spec)
		}
	}
	path, query, found := cutLast(spec, "?")
	if !found || !strings.Contains(query, "=") {
		return parsed{path: spec}, nil
	}
	q, err := url.ParseQuery(query)
	if err != nil {
		return bad("what follows the question mark cannot be read: %w", err)
	}
	for k := range q {
		if k != "format" {
			return bad("%s= is no parameter of a path; there is format= (%s)", k, strings.Join(formats, ", "))
		}
	}
	f := q["format"]
	switch {
	case len(f) != 1:
		return bad("format= is given %d times", len(f))
	case !slices.Contains(formats, f[0]):
		return bad("format=%s is not known; the formats are %s", f[0], strings.Join(formats, ", "))
	case path == "":
		return bad("there is no path before the question mark")
	}
	return parsed{path: path, format: f[0]}, nil
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

func looksLike(format string) error {
	if !slices.Contains(formats, format) {
		return fmt.Errorf("the file looks like a %s image, which cannot be opened: convert it (qemu-img convert), or add ?format=raw if the raw bytes are meant", format)
	}
	return fmt.Errorf("the file looks like a %s image: add ?format=%s, or ?format=raw if the raw bytes are meant", format, format)
}

var errNoQEMU = errors.New("reading this format needs the program qemu-nbd, which is not installed or not on PATH: install it (Debian and Ubuntu: apt install qemu-utils)")
