package nbd

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"forerun/block"
	"forerun/internal/nbdproto"
)

func TestHandshake(t *testing.T) {
	ro := newMem(1<<20, 512)
	ro.info.ReadOnly = true
	ro.info.PreferredIO = 100_000
	s, l := start(t, Options{Exports: table{"disk": newMem(3<<20, 1).checked(), "ro": ro.checked()}})

	t.Run("options", func(t *testing.T) {
		c := dial(t, l)
		if r := c.last(99, []byte("what?")); r != nbdproto.RepErrUnsup {
			t.Errorf("an unknown option: %#x", r)
		}
		if r := c.last(nbdproto.OptStartTLS, nil); r != nbdproto.RepErrPolicy {
			t.Errorf("TLS without a certificate: %#x", r)
		}
		if r := c.last(nbdproto.OptList, []byte{1}); r != nbdproto.RepErrInvalid {
			t.Errorf("list with data: %#x", r)
		}
		if r := c.last(nbdproto.OptStructuredReply, []byte{1}); r != nbdproto.RepErrInvalid {
			t.Errorf("structured replies with data: %#x", r)
		}
		if r := c.last(nbdproto.OptSetMetaContext, nbdproto.AppendMetaContext(nil, "disk", "base:allocation")); r != nbdproto.RepErrInvalid {
			t.Errorf("contexts without structured replies: %#x", r)
		}
		if r := c.last(nbdproto.OptGo, nbdproto.AppendInfo(nil, "nothing")); r != nbdproto.RepErrUnknown {
			t.Errorf("an unknown export: %#x", r)
		}
		for _, bad := range [][]byte{{}, {0, 0, 0, 9, 'x', 0, 0}, {0, 0, 0, 0, 0, 2, 0, 1}, {0xff, 0xff, 0xff, 0xff, 0, 0}} {
			if r := c.last(nbdproto.OptInfo, bad); r != nbdproto.RepErrInvalid {
				t.Errorf("info %x: %#x", bad, r)
			}
		}
		if r := c.last(nbdproto.OptInfo, make([]byte, maxOption+1)); r != nbdproto.RepErrTooBig {
			t.Errorf("a large option: %#x", r)
		}
		names := map[string]bool{}
		for _, r := range c.acked(nbdproto.OptList, nil) {
			names[string(r.data[4:4+be.Uint32(r.data)])] = true
		}
		if len(names) != 2 || !names["disk"] || !names["ro"] {
			t.Errorf("list: %v", names)
		}
		c.acked(nbdproto.OptAbort, nil)
		c.ended()
	})

	t.Run("info", func(t *testing.T) {
		c := dial(t, l)
		infos := map[uint16][]byte{}
		for _, r := range c.acked(nbdproto.OptInfo, nbdproto.AppendInfo(nil, "ro", 3, 2, 1, 3, 77)) {
			k := be.Uint16(r.data)
			if infos[k] != nil {
				t.Errorf("info %d twice", k)
			}
			infos[k] = r.data[2:]
		}
		want := nbdproto.FlagHasFlags | nbdproto.FlagReadOnly | nbdproto.FlagSendFlush | nbdproto.FlagSendFUA |
			nbdproto.FlagCanMultiConn | nbdproto.FlagSendCache
		if e := infos[0]; be.Uint64(e) != 1<<20 || be.Uint16(e[8:]) != want {
			t.Errorf("export info %x", e)
		}
		if string(infos[1]) != "ro" || string(infos[2]) != "the disk called ro" {
			t.Errorf("name %q, description %q", infos[1], infos[2])
		}
		if b := infos[3]; be.Uint32(b) != 1 || be.Uint32(b[4:]) != 65536 || be.Uint32(b[8:]) != nbdproto.MaxPayload {
			t.Errorf("block sizes %x", b)
		}
		c.acked(nbdproto.OptStructuredReply, nil)
		e := c.acked(nbdproto.OptGo, nbdproto.AppendInfo(nil, "disk"))[0].data
		want = want&^nbdproto.FlagReadOnly | nbdproto.FlagSendDF | nbdproto.FlagSendTrim | nbdproto.FlagSendWriteZeroes | nbdproto.FlagSendFastZero
		if be.Uint64(e[2:]) != 3<<20 || be.Uint16(e[10:]) != want {
			t.Errorf("export info %x", e)
		}
		c.bytes(0, 512)
	})

	t.Run("export name", func(t *testing.T) {
		c := dial(t, l)
		c.write(nbdproto.AppendOption(nil, nbdproto.OptExportName, []byte("disk")))
		if e := c.read(nbdproto.ExportNameReply); be.Uint64(e) != 3<<20 {
			t.Errorf("export %x", e)
		}
		c.bytes(0, 512)

		nc, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c = greet(t, nc, 0)
		c.write(nbdproto.AppendOption(nil, nbdproto.OptExportName, []byte("disk")))
		if pad := c.read(nbdproto.ExportNameReply + nbdproto.ExportNamePadding)[10:]; !bytes.Equal(pad, make([]byte, 124)) {
			t.Errorf("padding %x", pad)
		}
		c.bytes(0, 512)

		c = dial(t, l)
		c.write(nbdproto.AppendOption(nil, nbdproto.OptExportName, []byte("nothing")))
		c.ended()
	})

	t.Run("contexts", func(t *testing.T) {
		c := dial(t, l)
		c.acked(nbdproto.OptStructuredReply, nil)
		for _, x := range []struct {
			opt     uint32
			queries []string
			want    string
		}{
			{nbdproto.OptListMetaContext, nil, "0 base:allocation, 0 forerun:state"},
			{nbdproto.OptListMetaContext, []string{"base:"}, "0 base:allocation"},
			{nbdproto.OptListMetaContext, []string{"forerun:", "qemu:dirty-bitmap:x"}, "0 forerun:state"},
			{nbdproto.OptListMetaContext, []string{"base:nothing"}, ""},
			{nbdproto.OptSetMetaContext, nil, ""},
			{nbdproto.OptSetMetaContext, []string{"base:"}, ""},
			{nbdproto.OptSetMetaContext, []string{"forerun:state", "base:allocation", "base:allocation"}, "1 base:allocation, 2 forerun:state"},
			{nbdproto.OptSetMetaContext, []string{"forerun:state"}, "2 forerun:state"},
		} {
			var got []string
			for _, r := range c.acked(x.opt, nbdproto.AppendMetaContext(nil, "disk", x.queries...)) {
				got = append(got, fmt.Sprintf("%d %s", be.Uint32(r.data), r.data[4:]))
			}
			if g := strings.Join(got, ", "); g != x.want {
				t.Errorf("option %d, queries %q: %q, want %q", x.opt, x.queries, g, x.want)
			}
		}
		if r := c.last(nbdproto.OptSetMetaContext, nbdproto.AppendMetaContext(nil, "disk", "colonless")); r != nbdproto.RepErrInvalid {
			t.Errorf("a query without namespace: %#x", r)
		}
		if r := c.last(nbdproto.OptSetMetaContext, nbdproto.AppendMetaContext(nil, "disk", make([]string, maxQueries+1)...)); r != nbdproto.RepErrTooBig {
			t.Errorf("many queries: %#x", r)
		}
		// Contexts of another export do not count.
		c.acked(nbdproto.OptSetMetaContext, nbdproto.AppendMetaContext(nil, "ro", "base:allocation"))
		c.acked(nbdproto.OptGo, nbdproto.AppendInfo(nil, "disk"))
		c.fails(nbdproto.EINVAL, nbdproto.CmdBlockStatus, 0, 0, 512, nil)
	})

	t.Run("bad clients", func(t *testing.T) {
		for name, b := range map[string][]byte{
			"flags":       {0, 0, 0, 8},
			"magic":       append([]byte{0, 0, 0, 3}, make([]byte, 16)...),
			"huge option": append([]byte{0, 0, 0, 3}, nbdproto.AppendOption(nil, 3, nil)[:12]...),
		} {
			if name == "huge option" {
				b = append(b, 0xff, 0xff, 0xff, 0xff)
			}
			nc, err := net.Dial("unix", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			c := &client{t: t, nc: nc}
			c.read(nbdproto.ServerHelloLen)
			c.write(b)
			c.ended()
			nc.Close()
		}
	})

	for range 500 {
		if s.Stats().Connections == 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if st := s.Stats(); st.Handshakes != 4 || st.Accepted < 8 {
		t.Errorf("%+v", st)
	}
}

func TestHandshakeTimeout(t *testing.T) {
	s, l := start(t, Options{Exports: table{}, HandshakeTimeout: 50 * time.Millisecond, MaxConns: 1})
	c := dial(t, l)
	// One more is turned away.
	nc, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	(&client{t: t, nc: nc}).ended()
	c.ended()
	if st := s.Stats(); st.Refused != 1 {
		t.Errorf("%+v", st)
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	s := NewServer(Options{Exports: table{}})
	path := filepath.Join(dir, "s")
	uri := "nbd+unix:///?socket=" + path
	// What a killed server leaves behind.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	a, err := s.Listen(uri)
	if err != nil {
		t.Fatal(err)
	}
	if a.URI() != uri {
		t.Errorf("listening on %s", a.URI())
	}
	if _, err := s.Listen(uri); block.KindOf(err) != block.KindBusy {
		t.Errorf("the same again: %v", err)
	}
	stop := serveUntilEnd(t, s, a)
	stop()
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for uri, kind := range map[string]block.Kind{
		uri:                           block.KindExists,
		"nbds://127.0.0.1:0":          block.KindInvalid, // no certificate
		"nbd://127.0.0.1:0/disk":      block.KindInvalid,
		"nbd://127.0.0.1:0?tls-type=": block.KindInvalid,
		"http://x":                    block.KindInvalid,
	} {
		if _, err := s.Listen(uri); block.KindOf(err) != kind {
			t.Errorf("%s: %v", uri, err)
		}
	}
	tcp, err := s.Listen("nbd://127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	if strings.HasSuffix(tcp.URI(), ":0/") {
		t.Errorf("listening on %s", tcp.URI())
	}
}
