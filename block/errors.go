package block

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"
)

// Kind classifies every error a device can return. The numbers travel over
// the wire and stand in formats: they are never reordered or reused. Text is
// never matched.
type Kind uint16

// The kinds.
const (
	KindNone        Kind = 0  // not an error
	KindInvalid     Kind = 1  // the request makes no sense: bad flags, bad alignment, bad length
	KindRange       Kind = 2  // beyond the end of the device
	KindReadOnly    Kind = 3  // the device cannot be written
	KindNoSpace     Kind = 4  // a disk of ours is full; it may be tried again
	KindIO          Kind = 5  // a device or file failed
	KindCorrupt     Kind = 6  // bytes do not match their checksum or signature
	KindUnsupported Kind = 7  // the device cannot do this
	KindUnavailable Kind = 8  // the other side cannot be reached now; it may be tried again
	KindFenced      Kind = 9  // a newer epoch owns the volume
	KindBusy        Kind = 10 // somebody else holds it
	KindClosed      Kind = 11 // the device was closed
	KindCanceled    Kind = 12 // the caller gave up
	KindDenied      Kind = 13 // the peer may not do this
	KindNotFound    Kind = 14 // no volume, file or chunk of that name
	KindExists      Kind = 15 // there is one already
)

var kindNames = [...]string{"ok", "invalid request", "out of range", "read-only", "no space",
	"input/output error", "corrupt", "not supported", "unavailable", "fenced", "busy",
	"closed", "canceled", "denied", "not found", "exists"}

// String names the kind.
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("kind %d", uint16(k))
}

// Error is an error of a device: what was done, to what, which kind, and why.
type Error struct {
	Op     string // "journal.append", "store.get"
	Object string // what it was done to: a path, a chunk, a volume
	Kind   Kind
	Err    error // the cause, may be nil
}

// Error puts operation, object, kind and cause in one line.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Op)
	if e.Object != "" {
		b.WriteString(" ")
		b.WriteString(e.Object)
	}
	b.WriteString(": ")
	if e.Err == nil {
		b.WriteString(e.Kind.String())
		return b.String()
	}
	b.WriteString(e.Err.Error())
	return b.String()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// E builds an *Error. A zero kind is taken from err.
func E(op, object string, kind Kind, err error) error {
	if kind == KindNone {
		kind = KindOf(err)
	}
	return &Error{Op: op, Object: object, Kind: kind, Err: err}
}

// KindOf returns the kind of err: that of the outermost *Error in its chain,
// else one derived from the operating system's error number. It is KindNone
// only for nil.
func KindOf(err error) Kind {
	if err == nil {
		return KindNone
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return KindCanceled
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG):
		return KindNoSpace
	case errors.Is(err, syscall.EROFS):
		return KindReadOnly
	case errors.Is(err, syscall.EBUSY), errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.ETXTBSY):
		return KindBusy
	case errors.Is(err, syscall.EOPNOTSUPP), errors.Is(err, syscall.ENOSYS):
		return KindUnsupported
	case errors.Is(err, fs.ErrNotExist):
		return KindNotFound
	case errors.Is(err, fs.ErrExist):
		return KindExists
	case errors.Is(err, fs.ErrPermission):
		return KindDenied
	case errors.Is(err, fs.ErrClosed):
		return KindClosed
	}
	return KindIO
}
