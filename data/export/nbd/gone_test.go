package nbd

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"testing"
	"time"

	"forerun/block"
	"forerun/internal/nbdproto"
)

// TestRequestsOfTheGone: what lay for long is carried out while its client is
// there, and not begun when that has gone; a device that is under way can ask.
func TestRequestsOfTheGone(t *testing.T) {
	serverTLS, clientTLS := certificates(t, t.TempDir())
	for _, c := range []struct {
		scheme string
		tls    bool
	}{{"unix", false}, {"nbd", false}, {"nbds", true}} {
		for _, leaves := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s leaves %v", c.scheme, leaves), func(t *testing.T) {
				t.Parallel()
				m := newMem(1<<20, 1)
				entered, release := make(chan struct{}, 8), make(chan struct{})
				seen := make(chan bool, 8) // what OriginGone says after release
				m.gate = func(ctx context.Context, op string, _, _ int64, _ block.Flags) error {
					if block.OriginGone(ctx) {
						t.Error("the client is there and said to be gone")
					}
					entered <- struct{}{}
					<-release
					seen <- block.OriginGone(ctx)
					return nil
				}
				// One request at a time: the second is read and waits for room, the
				// third stays in the socket.
				o := Options{Exports: table{"": m}, MaxRequests: 1}
				if c.tls {
					o.TLS = serverTLS
				}
				s := NewServer(o)
				uri := c.scheme + "://127.0.0.1:0"
				if c.scheme == "unix" {
					uri = nbdproto.URI{Unix: true, Addr: t.TempDir() + "/s"}.String()
				}
				l, err := s.Listen(uri)
				if err != nil {
					t.Fatal(err)
				}
				serveUntilEnd(t, s, l)
				k := dial(t, l)
				if c.tls {
					k.startTLS(clientTLS)
				}
				k.open("", true)
				for i := range uint64(3) {
					k.send(nbdproto.CmdWrite, 0, i*4096, 4096, pattern(4096, 8))
				}
				<-entered
				time.Sleep(stale + 50*time.Millisecond)
				if leaves {
					nc := k.nc
					if x, ok := nc.(*tls.Conn); ok {
						nc = x.NetConn() // as a process that died
					}
					nc.Close()
					gone := func() (gone bool) {
						s.each(func(ss *session) { gone = gone || ss.conn != nil && ss.conn.t.gone() })
						return gone
					}
					for end := time.Now().Add(20 * time.Second); !gone(); time.Sleep(time.Millisecond) {
						if time.Now().After(end) {
							t.Fatal("the server does not know that the client has gone")
						}
					}
				}
				m.gate = nil // read by the leader after the gate was passed
				close(release)
				if got := <-seen; got != leaves {
					t.Errorf("OriginGone says %v", got)
				}
				if !leaves {
					for range 3 {
						if r := k.next(0); r.errno != 0 {
							t.Errorf("error %d", r.errno)
						}
					}
				}
				for end := time.Now().Add(20 * time.Second); leaves && s.Stats().Connections > 0; time.Sleep(time.Millisecond) {
					if time.Now().After(end) {
						t.Fatal("the connection does not end")
					}
				}
				m.mu.Lock()
				defer m.mu.Unlock()
				for i := range 3 {
					want := make([]byte, 4096)
					if i == 0 || !leaves {
						want = pattern(4096, 8)
					}
					if !bytes.Equal(m.data[i*4096:][:4096], want) {
						t.Errorf("write %d: wrong bytes", i)
					}
				}
			})
		}
	}
}

func TestGoneOfPipes(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	b.Close()
	if connGone(a) {
		t.Error("nobody can know that of a pipe")
	}
}
