package msg

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"forerun/block"
)

const (
	headerLen = 16
	helloLen  = 28
	maxText   = 1024

	// Urgent is the first of the types that overtake others: see the package comment.
	Urgent uint8 = 0x80
	// MaxUrgent is the largest payload of an urgent request and of its answer.
	MaxUrgent = 64 << 10
)

const (
	flagAnswer  uint8 = 1
	flagError   uint8 = 2
	flagControl uint8 = 4

	ctlPing  uint8 = 0
	ctlHello uint8 = 1
)

// magic opens the hello: a name and the version.
var magic = [8]byte{'F', 'R', 'M', 'S', 'G', '\n', 0, 1}

type header struct {
	n     uint32
	typ   uint8
	flags uint8
	kind  uint16
	id    uint64
}

func (h header) urgent() bool { return h.typ >= Urgent && h.flags&flagControl == 0 }

func protocol(format string, args ...any) error {
	return &block.Error{Op: "msg.frame", Kind: block.KindInvalid, Err: fmt.Errorf("protocol error: "+format, args...)}
}

func appendHeader(b []byte, h header) []byte {
	b = binary.BigEndian.AppendUint32(b, h.n)
	b = append(b, h.typ, h.flags)
	b = binary.BigEndian.AppendUint16(b, h.kind)
	return binary.BigEndian.AppendUint64(b, h.id)
}

// parseHeader checks all that can be told from a header alone. most is the
// largest payload accepted here.
func parseHeader(b []byte, most int) (header, error) {
	h := header{n: binary.BigEndian.Uint32(b), typ: b[4], flags: b[5], kind: binary.BigEndian.Uint16(b[6:]), id: binary.BigEndian.Uint64(b[8:])}
	limit := most
	switch h.flags {
	case 0, flagAnswer:
		if h.typ >= Urgent {
			limit = min(most, MaxUrgent)
		}
	case flagAnswer | flagError:
		limit = maxText
	case flagControl:
		switch h.typ {
		case ctlPing:
			limit = 0
		case ctlHello:
			limit = maxText
		default:
			return h, protocol("control frame of type %d", h.typ)
		}
	case flagControl | flagAnswer:
		if limit = 0; h.typ != ctlPing {
			return h, protocol("answer to a control frame of type %d", h.typ)
		}
	default:
		return h, protocol("flags %#x", h.flags)
	}
	if int64(h.n) > int64(limit) {
		return h, protocol("%d bytes in a frame of type %d with flags %d, at most %d are allowed", h.n, h.typ, h.flags, limit)
	}
	if h.kind != 0 && h.flags&flagError == 0 {
		return h, protocol("a kind of error in a frame that is none")
	}
	return h, nil
}

// hello is what each side takes on.
type hello struct {
	max    uint32
	limit  uint32
	urgent uint32
	bytes  uint64
}

func appendHello(b []byte, h hello) []byte {
	b = appendHeader(b, header{n: helloLen, typ: ctlHello, flags: flagControl})
	b = append(b, magic[:]...)
	b = binary.BigEndian.AppendUint32(b, h.max)
	b = binary.BigEndian.AppendUint32(b, h.limit)
	b = binary.BigEndian.AppendUint32(b, h.urgent)
	return binary.BigEndian.AppendUint64(b, h.bytes)
}

func parseHello(b []byte) (hello, error) {
	if len(b) < helloLen || string(b[:6]) != string(magic[:6]) {
		return hello{}, protocol("the other side does not speak this protocol")
	}
	if v := binary.BigEndian.Uint16(b[6:]); v != 1 {
		return hello{}, &block.Error{Op: "msg.hello", Kind: block.KindUnsupported,
			Err: fmt.Errorf("the other side speaks version %d of the protocol, this one version 1; update the older one", v)}
	}
	h := hello{binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[12:]), binary.BigEndian.Uint32(b[16:]), binary.BigEndian.Uint64(b[20:])}
	if h.max < MaxUrgent || h.limit == 0 || h.urgent == 0 {
		return hello{}, protocol("a hello that takes %d bytes, %d requests, %d urgent ones", h.max, h.limit, h.urgent)
	}
	return h, nil
}

// printable makes text of the other side safe for logs and terminals.
func printable(b []byte) string {
	s := strings.ToValidUTF8(string(b), "?")
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return '?'
		}
		return r
	}, s)
}

// clip cuts text for the wire, at the end of a character.
func clip(s string) string {
	if len(s) <= maxText {
		return s
	}
	n := maxText
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// answerError is the error in an answer.
func answerError(kind uint16, text []byte) error {
	k := block.Kind(kind)
	if k == block.KindNone || k > block.KindExists {
		k = block.KindIO
	}
	return &block.Error{Op: "msg.answer", Kind: k, Err: errors.New(printable(text))}
}
