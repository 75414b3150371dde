package linktest

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"forerun/block"
)

const (
	helloLen  = 32
	headerLen = 8
	reportLen = 56
	orderLen  = 16
	// maxData makes a data frame one TLS record.
	maxData = 16<<10 - headerLen
	maxText = 1024
	// maxCongestion is TCP_CA_NAME_MAX of Linux.
	maxCongestion = 16
)

// magic opens the hello: a name and the version.
var magic = [8]byte{'F', 'R', 'L', 'N', 'K', '\n', 0, 1}

const flagForce = 1

type frameType uint8

const (
	tWelcome frameType = 1 + iota
	tError
	tPing
	tPong
	tSend
	tTake
	tData
	tEnd
	tProgress
	tReport
)

// sizes are the lengths of payloads by type, smallest and largest.
var sizes = [...]struct{ min, max uint32 }{
	tWelcome: {8, 8}, tError: {2, 2 + maxText}, tPing: {8, 8}, tPong: {8, 8}, tSend: {orderLen, orderLen}, tTake: {orderLen, orderLen},
	tData: {1, maxData}, tEnd: {0, 0}, tProgress: {16, 16}, tReport: {reportLen, reportLen},
}

func protocol(format string, args ...any) error {
	return &block.Error{Op: "linktest.frame", Kind: block.KindInvalid, Err: fmt.Errorf("protocol error: "+format, args...)}
}

type testID [16]byte

type hello struct {
	force bool
	id    testID
}

func appendHello(b []byte, h hello) []byte {
	b = append(b, magic[:]...)
	var f uint32
	if h.force {
		f = flagForce
	}
	b = binary.BigEndian.AppendUint32(b, f)
	b = binary.BigEndian.AppendUint32(b, 0)
	return append(b, h.id[:]...)
}

func parseHello(b []byte) (h hello, err error) {
	switch {
	case len(b) != helloLen:
		return h, protocol("a hello of %d bytes", len(b))
	case !bytes.Equal(b[:6], magic[:6]):
		return h, protocol("this is no hello")
	case !bytes.Equal(b[6:8], magic[6:]):
		return h, &block.Error{Op: "linktest.hello", Kind: block.KindUnsupported,
			Err: fmt.Errorf("version %d of the link test is not known here", binary.BigEndian.Uint16(b[6:]))}
	}
	h.force = binary.BigEndian.Uint32(b[8:])&flagForce != 0
	copy(h.id[:], b[16:])
	return h, nil
}

func appendHeader(b []byte, t frameType, n int) []byte {
	b = append(b, byte(t), 0, 0, 0)
	return binary.BigEndian.AppendUint32(b, uint32(n))
}

func parseHeader(b []byte) (frameType, int, error) {
	t, n := frameType(b[0]), binary.BigEndian.Uint32(b[4:])
	switch {
	case t < tWelcome || t > tReport:
		return 0, 0, protocol("a frame of type %d", t)
	case b[1] != 0 || b[2] != 0 || b[3] != 0:
		return 0, 0, protocol("reserved bytes %x", b[1:4])
	case n < sizes[t].min || n > sizes[t].max:
		return 0, 0, protocol("a frame of type %d with %d bytes", t, n)
	}
	return t, int(n), nil
}

// readHeader reads a frame up to its payload.
func readHeader(br *bufio.Reader) (frameType, int, error) {
	var b [headerLen]byte
	if _, err := io.ReadFull(br, b[:]); err != nil {
		return 0, 0, err
	}
	return parseHeader(b[:])
}

// readPayload reads a payload other than data.
func readPayload(br *bufio.Reader, n int) ([]byte, error) {
	p := make([]byte, n)
	_, err := io.ReadFull(br, p)
	return p, noEOF(err)
}

// drain reads n bytes of data and tells of them as they come: a frame may take
// long on a slow line.
func drain(br *bufio.Reader, n int, got func(k int)) error {
	for n > 0 {
		if _, err := br.Peek(1); err != nil {
			return noEOF(err)
		}
		k, err := br.Discard(min(n, br.Buffered()))
		if err != nil {
			return noEOF(err)
		}
		n -= k
		got(k)
	}
	return nil
}

// noEOF: inside a frame the end of the stream is not an orderly one.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

type welcome struct {
	longest time.Duration
	conns   int
}

func appendWelcome(b []byte, w welcome) []byte {
	b = appendHeader(b, tWelcome, 8)
	b = binary.BigEndian.AppendUint32(b, uint32(w.longest.Milliseconds()))
	return binary.BigEndian.AppendUint32(b, uint32(w.conns))
}

func parseWelcome(p []byte) (w welcome, err error) {
	w.longest = time.Duration(binary.BigEndian.Uint32(p)) * time.Millisecond
	w.conns = int(min(binary.BigEndian.Uint32(p[4:]), 1<<16))
	if w.longest == 0 || w.conns == 0 {
		return w, protocol("a welcome to nothing")
	}
	return w, nil
}

func appendError(b []byte, err error) []byte {
	text := err.Error()
	var e *block.Error
	if errors.As(err, &e) && e.Err != nil {
		text = e.Err.Error() // the reader names the operation
	}
	// In whole characters, as the reader asks for.
	for i := range text {
		if i > maxText-utf8.UTFMax {
			text = text[:i]
			break
		}
	}
	text = strings.ToValidUTF8(text, "?")
	b = appendHeader(b, tError, 2+len(text))
	b = binary.BigEndian.AppendUint16(b, uint16(block.KindOf(err)))
	return append(b, text...)
}

// parseError returns the error the other side sent. What it says is shown to
// an operator, so nothing that a terminal would act on is in it.
func parseError(p []byte) error {
	kind := block.Kind(binary.BigEndian.Uint16(p))
	if kind == block.KindNone {
		kind = block.KindIO
	}
	text := strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, string(p[2:]))
	return &block.Error{Op: "linktest", Kind: kind, Err: fmt.Errorf("the backend says: %s", text)}
}

// order asks for bulk in one direction.
type order struct {
	duration time.Duration // in whole milliseconds on the wire
	skip     time.Duration // the sender's counters begin then
	bytes    uint64        // 0 for no bound
}

func appendOrder(b []byte, t frameType, o order) []byte {
	b = appendHeader(b, t, orderLen)
	b = binary.BigEndian.AppendUint32(b, uint32(o.duration.Milliseconds()))
	b = binary.BigEndian.AppendUint32(b, uint32(o.skip.Milliseconds()))
	return binary.BigEndian.AppendUint64(b, o.bytes)
}

func parseOrder(p []byte) (o order, err error) {
	o.duration = time.Duration(binary.BigEndian.Uint32(p)) * time.Millisecond
	o.skip = time.Duration(binary.BigEndian.Uint32(p[4:])) * time.Millisecond
	o.bytes = binary.BigEndian.Uint64(p[8:])
	if o.duration == 0 || o.duration > MaxDuration {
		return o, &block.Error{Op: "linktest.order", Kind: block.KindInvalid,
			Err: fmt.Errorf("a phase of %s was asked for; it may take 1ms to %s", o.duration, MaxDuration)}
	}
	if o.skip > o.duration {
		return o, protocol("a skip of %s in a phase of %s", o.skip, o.duration)
	}
	return o, nil
}

type progress struct {
	bytes uint64
	at    time.Duration
}

func appendProgress(b []byte, p progress) []byte {
	b = appendHeader(b, tProgress, 16)
	b = binary.BigEndian.AppendUint64(b, p.bytes)
	return binary.BigEndian.AppendUint64(b, uint64(p.at))
}

func parseProgress(b []byte) (p progress, err error) {
	p.bytes = binary.BigEndian.Uint64(b)
	n := binary.BigEndian.Uint64(b[8:])
	if n > uint64(24*time.Hour) || p.bytes > 1<<62 {
		return p, protocol("progress beyond belief")
	}
	p.at = time.Duration(n)
	return p, nil
}

// report is what a server did about an order.
type report struct {
	progress
	known bool // tcp is
	tcp   tcpInfo
}

// tcpInfo is what a sender's TCP says of itself.
type tcpInfo struct {
	segments, again uint32 // data segments sent, and sent again
	minRTT, rtt     time.Duration
	congestion      string
}

// since makes the counters of t those that came after base.
func (t tcpInfo) since(base tcpInfo) tcpInfo {
	t.segments -= base.segments
	t.again -= base.again
	return t
}

func appendReport(b []byte, r report) []byte {
	b = appendHeader(b, tReport, reportLen)
	b = binary.BigEndian.AppendUint64(b, r.bytes)
	b = binary.BigEndian.AppendUint64(b, uint64(r.at))
	var f uint32
	if r.known {
		f = 1
	}
	for _, v := range []uint32{f, r.tcp.segments, r.tcp.again, uint32(r.tcp.minRTT.Microseconds()), uint32(r.tcp.rtt.Microseconds()), 0} {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	var name [maxCongestion]byte
	copy(name[:], r.tcp.congestion)
	return append(b, name[:]...)
}

func parseReport(b []byte) (r report, err error) {
	if r.progress, err = parseProgress(b); err != nil {
		return r, err
	}
	u := func(i int) uint32 { return binary.BigEndian.Uint32(b[16+4*i:]) }
	r.known = u(0)&1 != 0
	if !r.known {
		return r, nil
	}
	name, _, _ := bytes.Cut(b[reportLen-maxCongestion:], []byte{0})
	for _, c := range name {
		if c <= ' ' || c > '~' {
			return r, protocol("a congestion control named %q", name)
		}
	}
	r.tcp = tcpInfo{u(1), u(2), time.Duration(u(3)) * time.Microsecond, time.Duration(u(4)) * time.Microsecond, string(name)}
	return r, nil
}
