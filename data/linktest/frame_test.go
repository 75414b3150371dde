package linktest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"forerun/block"
)

func TestFramesSurviveTheWire(t *testing.T) {
	h := hello{true, testID{1, 2, 3}}
	if got, err := parseHello(appendHello(nil, h)); err != nil || got != h {
		t.Errorf("%+v %v", got, err)
	}
	body := func(b []byte, want frameType) []byte {
		t.Helper()
		typ, n, err := parseHeader(b)
		if err != nil || typ != want || n != len(b)-headerLen {
			t.Fatalf("type %d, %d bytes of %d, %v", typ, n, len(b)-headerLen, err)
		}
		return b[headerLen:]
	}
	w := welcome{30 * time.Second, 9}
	if got, err := parseWelcome(body(appendWelcome(nil, w), tWelcome)); err != nil || got != w {
		t.Errorf("%+v %v", got, err)
	}
	o := order{2 * time.Second, 300 * time.Millisecond, 1 << 40}
	if got, err := parseOrder(body(appendOrder(nil, tTake, o), tTake)); err != nil || got != o {
		t.Errorf("%+v %v", got, err)
	}
	p := progress{1 << 50, 3 * time.Second}
	if got, err := parseProgress(body(appendProgress(nil, p), tProgress)); err != nil || got != p {
		t.Errorf("%+v %v", got, err)
	}
	r := report{p, true, tcpInfo{7, 6, 5 * time.Microsecond, 4 * time.Microsecond, "cubic"}}
	if got, err := parseReport(body(appendReport(nil, r), tReport)); err != nil || got != r {
		t.Errorf("%+v %v", got, err)
	}
	e := parseError(body(appendError(nil, &block.Error{Op: "x", Kind: block.KindBusy, Err: errors.New(strings.Repeat("ü", 2000))}), tError))
	if block.KindOf(e) != block.KindBusy || !strings.Contains(e.Error(), "üü") || strings.Contains(e.Error(), "?") {
		t.Error(e)
	}
	if e := parseError([]byte("\x00\x0a\x1b[2Jred")); strings.ContainsRune(e.Error(), 0x1b) {
		t.Errorf("%q would reach a terminal", e)
	}
}

func TestFramesThatAreRefused(t *testing.T) {
	if _, err := parseHello(append([]byte{'F', 'R', 'L', 'N', 'K', '\n', 0, 9}, make([]byte, 24)...)); block.KindOf(err) != block.KindUnsupported {
		t.Error(err)
	}
	for _, b := range [][]byte{
		{0, 0, 0, 0, 0, 0, 0, 0}, {11, 0, 0, 0, 0, 0, 0, 0}, {3, 1, 0, 0, 0, 0, 0, 8}, {3, 0, 0, 0, 0, 0, 0, 9},
		{7, 0, 0, 0, 0, 0, 0, 0}, {7, 0, 0, 0, 0, 1, 0, 0}, {8, 0, 0, 0, 0, 0, 0, 1},
	} {
		if _, _, err := parseHeader(b); block.KindOf(err) != block.KindInvalid {
			t.Errorf("%v: %v", b, err)
		}
	}
	for _, o := range []order{{}, {duration: MaxDuration + time.Millisecond}, {duration: time.Second, skip: 2 * time.Second}} {
		if _, err := parseOrder(appendOrder(nil, tSend, o)[headerLen:]); block.KindOf(err) != block.KindInvalid {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

// script is a connection that says what it was given, and takes so much.
type script struct {
	net.Conn
	in   io.Reader
	room int
	out  bytes.Buffer
}

func (s *script) Read(p []byte) (int, error) { return s.in.Read(p) }
func (s *script) Write(p []byte) (int, error) {
	if s.room -= len(p); s.room < 0 {
		return 0, io.ErrClosedPipe
	}
	return s.out.Write(p)
}
func (s *script) Close() error                     { return nil }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

// FuzzServer: whatever a client says, the server ends, answers in whole frames
// of its own kinds, and forgets the connection.
func FuzzServer(f *testing.F) {
	hi := appendHello(nil, hello{})
	f.Add(hi)
	f.Add(append(bytes.Clone(hi), append(appendHeader(nil, tPing, 8), "12345678"...)...))
	f.Add(appendOrder(bytes.Clone(hi), tSend, order{duration: time.Minute}))
	f.Add(appendHeader(shorter(make([]byte, 99), 10), tEnd, 0))
	take := appendOrder(bytes.Clone(hi), tTake, order{duration: time.Second, bytes: 10})
	f.Add(append(append(take, shorter(make([]byte, 99), 10)...), appendHeader(nil, tEnd, 0)...))
	f.Add(appendHeader(bytes.Clone(hi), tReport, reportLen))
	s := NewServer(ServerOptions{})
	f.Fuzz(func(t *testing.T, in []byte) {
		c := &script{in: bytes.NewReader(in), room: 256 << 10}
		s.Attend(context.Background(), c, "frontend", "f")
		s.mu.Lock()
		if len(s.tests) != 0 || len(s.peers) != 0 {
			t.Errorf("%d tests and %d peers are left", len(s.tests), len(s.peers))
		}
		s.mu.Unlock()
		br := bufio.NewReader(&c.out)
		for {
			typ, n, err := readHeader(br)
			if err == io.EOF {
				return
			}
			if err != nil || typ == tPing || typ == tSend || typ == tTake || typ == tEnd {
				t.Fatalf("type %d, %v", typ, err)
			}
			if _, err := readPayload(br, n); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// FuzzClient: whatever a server says, the client ends with an error or a
// result that is in order.
func FuzzClient(f *testing.F) {
	f.Add(append(shorter(make([]byte, 99), 10), appendReport(nil, report{})...))
	f.Add(appendReport(appendProgress(nil, progress{bytes: 5, at: 1}), report{known: true, tcp: tcpInfo{congestion: "bbr"}}))
	f.Add(appendError(nil, errors.New("no")))
	f.Fuzz(func(t *testing.T, in []byte) {
		for _, up := range []bool{false, true} {
			s := &script{in: bytes.NewReader(in), room: 64 << 10}
			c := &conn{nc: s, raw: s, br: bufio.NewReader(s), release: func() bool { return true }}
			var tr track
			var err error
			if up {
				tr, err = c.taken(time.Now())
			} else {
				tr, _, err = c.download(t.Context(), time.Now(), order{duration: time.Second})
			}
			if err == nil && (tr.total < 0 || up && len(tr.points) == 0) {
				t.Errorf("%+v", tr)
			}
		}
	})
}
