package wire

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"time"

	"forerun/block"
)

// magic opens each connection, before the first frame.
const magic = "FORERUN\n"

// The protocol versions this end speaks.
const (
	minVersion = 2
	maxVersion = 2
)

// featureRoams: the server may answer what was asked for on one background
// connection on another one, whichever has room; when a background connection
// ends, the client asks again for all background that it has not got.
const featureRoams = 1 << 0

// alpn is the application protocol in the TLS handshake (RFC 7301).
const alpn = "forerun-wire"

// connRole says what a connection carries.
type connRole uint8

const (
	roleDemand     connRole = 0
	roleBackground connRole = 1
)

func (r connRole) String() string {
	if r == roleDemand {
		return "demand"
	}
	return "background"
}

// maxBackground is the most background connections of one session.
const maxBackground = 16

// firstBackground is how many a session begins with.
const firstBackground = 2

type sessionID [16]byte

// hello is what the client says first.
type hello struct {
	min, max uint16
	features uint64
	session  sessionID
	role     connRole
	index    uint8 // 0 for demand, 0…15 for background
	node     string
}

func appendHello(b []byte, h hello) []byte {
	p := binary.BigEndian.AppendUint16(nil, h.min)
	p = binary.BigEndian.AppendUint16(p, h.max)
	p = binary.BigEndian.AppendUint64(p, h.features)
	p = append(p, h.session[:]...)
	p = append(p, byte(h.role), h.index, byte(len(h.node)))
	p = append(p, h.node...)
	return appendFrame(append(b, magic...), header{typ: tHello}, p)
}

// parseHello reads the payload of HELLO. Bytes after what version 2 knows are
// left to later versions.
func parseHello(b []byte) (hello, error) {
	if len(b) < 31 || len(b) < 31+int(b[30]) {
		return hello{}, protocol("a hello of %d bytes", len(b))
	}
	h := hello{
		min:      binary.BigEndian.Uint16(b),
		max:      binary.BigEndian.Uint16(b[2:]),
		features: binary.BigEndian.Uint64(b[4:]),
		session:  sessionID(b[12:28]),
		role:     connRole(b[28]),
		index:    b[29],
		node:     printable(b[31 : 31+int(b[30])]),
	}
	if h.role > roleBackground || h.index >= maxBackground || h.role == roleDemand && h.index != 0 || h.min > h.max {
		return hello{}, protocol("a hello for connection %d of role %d, versions %d to %d", h.index, h.role, h.min, h.max)
	}
	return h, nil
}

// readHello reads magic and HELLO.
func readHello(br *bufio.Reader) (hello, error) {
	var m [len(magic)]byte
	if _, err := io.ReadFull(br, m[:]); err != nil {
		return hello{}, err
	}
	if !bytes.Equal(m[:], []byte(magic)) {
		return hello{}, protocol("the client does not speak this protocol (it began with %q)", m[:])
	}
	h, p, err := readFrame(br)
	if err != nil {
		return hello{}, err
	}
	if h.typ != tHello {
		return hello{}, protocol("frame type %d where a hello was due", h.typ)
	}
	return parseHello(p)
}

// welcome is what the server answers.
type welcome struct {
	version  uint16
	features uint64
	credit   uint32        // chunks that may be outstanding on this connection
	idle     time.Duration // the server gives up a connection that is silent for so long
	node     string
	// Ports for the classes, 0: the same one; an older server says nothing.
	backgroundPort, writeBackPort uint16
	paced                         bool // the server bounds the queue on the way itself
}

func appendWelcome(b []byte, w welcome) []byte {
	p := binary.BigEndian.AppendUint16(nil, w.version)
	p = binary.BigEndian.AppendUint64(p, w.features)
	p = binary.BigEndian.AppendUint32(p, w.credit)
	p = binary.BigEndian.AppendUint32(p, MaxPayload)
	p = binary.BigEndian.AppendUint32(p, uint32(w.idle/time.Millisecond))
	p = append(p, byte(len(w.node)))
	p = append(p, w.node...)
	p = binary.BigEndian.AppendUint16(p, w.backgroundPort)
	p = binary.BigEndian.AppendUint16(p, w.writeBackPort)
	paced := byte(0)
	if w.paced {
		paced = 1
	}
	p = append(p, paced)
	return appendFrame(b, header{typ: tWelcome}, p)
}

func parseWelcome(b []byte) (welcome, error) {
	if len(b) < 23 || len(b) < 23+int(b[22]) {
		return welcome{}, protocol("a welcome of %d bytes", len(b))
	}
	w := welcome{
		version:  binary.BigEndian.Uint16(b),
		features: binary.BigEndian.Uint64(b[2:]),
		credit:   binary.BigEndian.Uint32(b[10:]),
		idle:     time.Duration(binary.BigEndian.Uint32(b[18:])) * time.Millisecond,
		node:     printable(b[23 : 23+int(b[22])]),
	}
	if w.version < minVersion || w.version > maxVersion || w.credit == 0 || binary.BigEndian.Uint32(b[14:]) < MaxPayload {
		return welcome{}, protocol("a welcome with version %d, credit %d, frames of %d", w.version, w.credit, binary.BigEndian.Uint32(b[14:]))
	}
	if more := b[23+int(b[22]):]; len(more) >= 5 {
		w.backgroundPort, w.writeBackPort, w.paced = binary.BigEndian.Uint16(more), binary.BigEndian.Uint16(more[2:]), more[4]&1 != 0
	}
	return w, nil
}

// chooseVersion returns the highest version both ends speak.
func chooseVersion(h hello) (uint16, error) {
	v := min(h.max, maxVersion)
	if v < h.min || v < minVersion {
		return 0, &block.Error{Op: "wire.hello", Kind: block.KindUnsupported,
			Err: fmt.Errorf("the client speaks protocol versions %d to %d, this server %d to %d; update the older one", h.min, h.max, minVersion, maxVersion)}
	}
	return v, nil
}

// readWelcome reads WELCOME, or the ERROR that stands in its place.
func readWelcome(br *bufio.Reader) (welcome, error) {
	h, p, err := readFrame(br)
	if err != nil {
		return welcome{}, err
	}
	switch h.typ {
	case tWelcome:
		return parseWelcome(p)
	case tError:
		e, err := parseError(p, 0, 0)
		if err != nil {
			return welcome{}, err
		}
		return welcome{}, &block.Error{Op: "wire.hello", Kind: e.kind, Err: fmt.Errorf("the server says: %s", e.text)}
	}
	return welcome{}, protocol("frame type %d where a welcome was due", h.typ)
}
