package nbdproto

import (
	"bytes"
	"encoding/hex"
	"reflect"
	"testing"

	"forerun/block"
)

func TestWireForms(t *testing.T) {
	r := Request{Flags: CmdFlagFUA, Type: CmdWrite, Cookie: 0x0102030405060708, Offset: 0x1000, Length: 512}
	b := r.Append(nil)
	if got := hex.EncodeToString(b); got != "25609513"+"0001"+"0001"+"0102030405060708"+"0000000000001000"+"00000200" {
		t.Errorf("request %s", got)
	}
	if back, ok := ParseRequest(b); !ok || back != r {
		t.Errorf("request came back as %+v, %v", back, ok)
	}
	var s [SimpleReplyLen]byte
	SimpleReply{EIO, 7}.Put(s[:])
	if got := hex.EncodeToString(s[:]); got != "67446698"+"00000005"+"0000000000000007" {
		t.Errorf("simple reply %s", got)
	}
	if back, ok := ParseSimpleReply(s[:]); !ok || back != (SimpleReply{EIO, 7}) {
		t.Errorf("simple reply came back as %+v, %v", back, ok)
	}
	c := Chunk{ReplyFlagDone, ReplyTypeError, 9, 6}
	var h [StructuredReplyLen]byte
	c.Put(h[:])
	if got := hex.EncodeToString(h[:]); got != "668e33ef"+"0001"+"8001"+"0000000000000009"+"00000006" {
		t.Errorf("chunk %s", got)
	}
	if back, ok := ParseChunk(h[:]); !ok || back != c {
		t.Errorf("chunk came back as %+v, %v", back, ok)
	}
	for _, p := range []func([]byte) bool{
		func(b []byte) bool { _, ok := ParseRequest(b); return ok },
		func(b []byte) bool { _, ok := ParseSimpleReply(b); return ok },
		func(b []byte) bool { _, ok := ParseChunk(b); return ok },
		func(b []byte) bool { _, _, ok := ParseOption(b); return ok },
		func(b []byte) bool { _, _, _, ok := ParseOptionReply(b); return ok },
	} {
		if p(make([]byte, 28)) {
			t.Error("zeros were taken for a message")
		}
	}
}

func TestOptions(t *testing.T) {
	o := AppendOption(nil, OptGo, AppendInfo(nil, "disk", InfoBlockSize, InfoName))
	opt, n, ok := ParseOption(o)
	if !ok || opt != OptGo || int(n) != len(o)-OptionLen {
		t.Fatalf("option %d, %d bytes, %v", opt, n, ok)
	}
	name, infos, ok := ParseInfo(o[OptionLen:])
	if !ok || name != "disk" || !reflect.DeepEqual(infos, []uint16{InfoBlockSize, InfoName}) {
		t.Errorf("info %q %v %v", name, infos, ok)
	}
	p := AppendOptionReply(nil, OptSetMetaContext, RepMetaContext, AppendMetaContext(nil, "d", "base:", "x:y"))
	opt, typ, n, ok := ParseOptionReply(p)
	if !ok || opt != OptSetMetaContext || typ != RepMetaContext || int(n) != len(p)-OptionReplyLen {
		t.Fatalf("reply %d %d %d %v", opt, typ, n, ok)
	}
	name, queries, ok := ParseMetaContext(p[OptionReplyLen:])
	if !ok || name != "d" || !reflect.DeepEqual(queries, []string{"base:", "x:y"}) {
		t.Errorf("meta %q %q %v", name, queries, ok)
	}
}

func FuzzOptions(f *testing.F) {
	f.Add(AppendInfo(nil, "disk", 1, 2))
	f.Add(AppendMetaContext(nil, "disk", "base:allocation"))
	f.Add([]byte{0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		if name, infos, ok := ParseInfo(b); ok && !bytes.Equal(AppendInfo(nil, name, infos...), b) {
			t.Error("info does not come back as it was")
		}
		if name, qs, ok := ParseMetaContext(b); ok && !bytes.Equal(AppendMetaContext(nil, name, qs...), b) {
			t.Error("meta context does not come back as it was")
		}
	})
}

func TestURI(t *testing.T) {
	for _, c := range []struct {
		in, out string
		u       URI
	}{
		{"nbd://example.com/disk", "nbd://example.com:10809/disk", URI{Addr: "example.com:10809", Export: "disk"}},
		{"nbd://example.com//disk", "nbd://example.com:10809//disk", URI{Addr: "example.com:10809", Export: "/disk"}},
		{"nbd://h/hello%20world", "nbd://h:10809/hello%20world", URI{Addr: "h:10809", Export: "hello world"}},
		{"nbds://[::1]:9", "nbds://[::1]:9/", URI{TLS: true, Addr: "[::1]:9"}},
		{"nbd://", "nbd://:10809/", URI{Addr: ":10809"}},
		{"nbd+unix:///disk?socket=/run/a%20b", "nbd+unix:///disk?socket=/run/a%20b", URI{Unix: true, Addr: "/run/a b", Export: "disk"}},
		{"nbd+unix:///?socket=/run/a+b", "nbd+unix:///?socket=/run/a%2Bb", URI{Unix: true, Addr: "/run/a+b"}},
		{"nbds+unix:///?socket=%00/abstract", "nbds+unix:///?socket=%00/abstract", URI{TLS: true, Unix: true, Addr: "@/abstract"}},
	} {
		u, err := ParseURI(c.in)
		if err != nil {
			t.Errorf("%s: %v", c.in, err)
			continue
		}
		if len(u.Query) != 0 {
			t.Errorf("%s: query %v", c.in, u.Query)
		}
		u.Query = nil
		if !reflect.DeepEqual(u, c.u) {
			t.Errorf("%s: %+v, want %+v", c.in, u, c.u)
		}
		if u.String() != c.out {
			t.Errorf("%s is written as %s, want %s", c.in, u.String(), c.out)
		}
		if again, err := ParseURI(u.String()); err != nil || again.Addr != u.Addr || again.Export != u.Export {
			t.Errorf("%s does not come back: %+v, %v", u.String(), again, err)
		}
	}
	for _, s := range []string{"", "http://x", "nbd:x", "nbd+unix:///x", "nbd+unix://h/?socket=/s", "nbd://h/?socket=/s", "nbd://h:p/", "nbd://%zz"} {
		if u, err := ParseURI(s); err == nil {
			t.Errorf("%q was taken for %+v", s, u)
		}
	}
}

func TestErrno(t *testing.T) {
	for k := block.KindNone; k <= block.KindExists; k++ {
		for _, write := range []bool{false, true} {
			e := Errno(k, write)
			if (e == 0) != (k == block.KindNone) {
				t.Errorf("%v is error %d", k, e)
			}
			if (Kind(e) == block.KindNone) != (e == 0) {
				t.Errorf("error %d is %v", e, Kind(e))
			}
		}
	}
}
