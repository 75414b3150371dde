package nbd

import (
	"context"
	"io"
	"net"
	"testing"
	"time"

	"forerun/internal/nbdproto"
)

// throw sends b to a server over a pipe or, if sock, a socket, then goes away,
// and fails when the server does not end the connection.
func throw(t *testing.T, b []byte, sock bool) {
	m := newMem(1<<20, 512)
	s := NewServer(Options{Exports: table{"": m.checked()}, MaxRequests: 8, MaxBuffer: 64 << 10,
		HandshakeTimeout: 5 * time.Second, DrainTimeout: 5 * time.Second})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	near, far := net.Pipe()
	if sock {
		near.Close()
		far.Close()
		l, err := net.Listen("unix", "")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if near, err = net.Dial("unix", l.Addr().String()); err != nil {
			t.Fatal(err)
		}
		if far, err = l.Accept(); err != nil {
			t.Fatal(err)
		}
	}
	defer near.Close()
	if !s.Attach(far, false) {
		t.Fatal("the server takes nobody")
	}
	_ = near.SetDeadline(time.Now().Add(5 * time.Second))
	gone := make(chan struct{})
	go func() { defer close(gone); _, _ = io.Copy(io.Discard, near) }()
	_, _ = near.Write(b)
	near.Close()
	<-gone
	cancel()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("the server hangs")
	}
	if st := s.Stats(); st.Connections != 0 {
		t.Fatalf("%+v", st)
	}
}

func FuzzHandshake(f *testing.F) {
	flags := []byte{0, 0, 0, 3}
	opts := func(o ...[]byte) []byte {
		b := append([]byte(nil), flags...)
		for _, x := range o {
			b = append(b, x...)
		}
		return b
	}
	f.Add(opts(nbdproto.AppendOption(nil, nbdproto.OptStructuredReply, nil),
		nbdproto.AppendOption(nil, nbdproto.OptSetMetaContext, nbdproto.AppendMetaContext(nil, "", "base:allocation")),
		nbdproto.AppendOption(nil, nbdproto.OptGo, nbdproto.AppendInfo(nil, "", 3)),
		nbdproto.Request{Type: nbdproto.CmdBlockStatus, Length: 4096}.Append(nil)))
	f.Add(opts(nbdproto.AppendOption(nil, nbdproto.OptList, nil), nbdproto.AppendOption(nil, nbdproto.OptAbort, nil)))
	f.Add(opts(nbdproto.AppendOption(nil, nbdproto.OptStartTLS, nil), nbdproto.AppendOption(nil, nbdproto.OptExportName, nil)))
	f.Fuzz(func(t *testing.T, b []byte) { throw(t, b, false) })
}

func FuzzTransmission(f *testing.F) {
	for typ := range uint16(Commands) {
		r := nbdproto.Request{Type: typ, Cookie: 7, Offset: 4000, Length: 1000}.Append(nil)
		f.Add(append(r, make([]byte, 1000)...), typ%2 == 0)
	}
	f.Add(nbdproto.Request{Type: nbdproto.CmdWrite, Length: 0xffffffff}.Append(nil), true)
	f.Add(nbdproto.Request{Type: nbdproto.CmdRead, Offset: ^uint64(0), Length: 0xffffffff}.Append(nil), false)
	f.Fuzz(func(t *testing.T, b []byte, structured bool) {
		pre := []byte{0, 0, 0, 3}
		if structured {
			pre = nbdproto.AppendOption(pre, nbdproto.OptStructuredReply, nil)
			pre = nbdproto.AppendOption(pre, nbdproto.OptSetMetaContext,
				nbdproto.AppendMetaContext(nil, "", nbdproto.ContextAllocation, nbdproto.ContextState))
		}
		pre = nbdproto.AppendOption(pre, nbdproto.OptGo, nbdproto.AppendInfo(nil, ""))
		throw(t, append(pre, b...), true)
	})
}
