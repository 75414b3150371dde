package main

import (
	"context"
	"math/rand/v2"
	"os"
	"syscall"
	"testing"
	"time"

	"forerun/api"
	"forerun/api/client"
)

func (s *site) fill(volume, action string) {
	s.t.Helper()
	output(s.t, binary, "fill", action, "--state", s.path("fstate"), "--volume", volume)
}

func (s *site) backendStatus(volume string) api.Volume {
	s.t.Helper()
	v, err := client.New(s.path("bstate")).Volume(context.Background(), volume)
	if err != nil {
		s.t.Fatal(err)
	}
	return v
}

// TestWhatIsHereNeedNotCross: a clone of a volume that is here is here too,
// before anybody asks for it, by signatures alone; a volume in a domain of its
// own shares nothing; what was hashed once is known after a restart.
func TestWhatIsHereNeedNotCross(t *testing.T) {
	need(t, "nbdcopy")
	s := newSite(t)
	raw := s.disk("a.raw", 48*mib, 11)
	output(t, "cp", "--sparse=never", raw, s.path("b.raw"))
	output(t, "cp", raw, s.path("c.raw"))
	vols := []string{"a=" + raw, "b=" + s.path("b.raw"), "c=" + s.path("c.raw")}
	s.startBackend(vols...)
	s.startFrontend([]string{"a", "b", "c"}, "--fill-paused", "--domain", "c=tenant7", "--policy", "isolated")
	s.fill("a", "resume")
	a := s.awaitFilled("a")

	// Nobody asks for b.
	b := s.awaitFilled("b")
	chunks := b.SizeBytes / b.ChunkBytes
	if b.Dedup.Chunks != a.Chunks.Held || b.WAN.BackgroundBytes+b.WAN.DemandBytes > 0 || b.Chunks.Zero+b.Chunks.Held != chunks {
		t.Errorf("the clone: %+v, %+v, %+v", b.Chunks, b.Dedup, b.WAN)
	}
	output(t, "nbdcopy", s.uri("b"), s.path("b.out"))
	same(t, raw, s.path("b.out"))
	if b = s.status("b"); b.Demand.Reads != 0 || b.Dedup.Repairs != 0 {
		t.Errorf("reading the clone: %+v, %+v", b.Demand, b.Dedup)
	}
	if b.Store.PlainBytes > a.Store.PlainBytes {
		t.Errorf("the clone took %d bytes of store", b.Store.PlainBytes-a.Store.PlainBytes)
	}

	// Another tenant's: nothing is shared, everything crosses.
	if c := s.status("c"); c.Chunks.Held != 0 {
		t.Fatalf("of another domain's chunks %d are here", c.Chunks.Held)
	}
	s.fill("c", "resume")
	c := s.awaitFilled("c")
	if c.Dedup.Domain != "tenant7" || c.WAN.BackgroundBytes < a.WAN.BackgroundBytes*9/10 || c.Store.Chunks == 0 {
		t.Errorf("of another domain %d bytes crossed, of the common one %d; %+v", c.WAN.BackgroundBytes, a.WAN.BackgroundBytes, c.Dedup)
	}
	output(t, "nbdcopy", s.uri("c"), s.path("c.out"))
	same(t, raw, s.path("c.out"))

	known := s.backendStatus("b").Dedup.KnownChunks
	if known < b.Chunks.Held {
		t.Errorf("the backend knows %d chunks", known)
	}
	s.frontend.end(t, syscall.SIGTERM)
	s.backend.end(t, syscall.SIGTERM)
	s.startBackend(vols...)
	if got := s.backendStatus("b").Dedup; got.KnownChunks != known || got.HashedBytes != 0 {
		t.Errorf("after a restart %+v, before it knew %d", got, known)
	}
	s.startFrontend([]string{"a", "b", "c"}, "--domain", "c=tenant7", "--policy", "isolated")
	output(t, "nbdcopy", s.uri("c"), s.path("c.out"))
	same(t, raw, s.path("c.out"))
}

// TestChunksByContent: bytes that moved by 1 KiB are found again where chunks
// are cut by content, and not where they are fixed.
func TestChunksByContent(t *testing.T) {
	need(t, "nbdcopy")
	crossed := map[string][2]int64{}
	for _, how := range []string{"fixed", "content"} {
		s := newSite(t)
		b := make([]byte, 24*mib)
		fillNoise(rand.New(rand.NewPCG(4, 4)), b)
		if err := os.WriteFile(s.path("a.raw"), b, 0o600); err != nil {
			t.Fatal(err)
		}
		moved := append(append(make([]byte, 1024), b...), make([]byte, 1<<20-1024)...)
		if err := os.WriteFile(s.path("b.raw"), moved, 0o600); err != nil {
			t.Fatal(err)
		}
		s.backendFlags = []string{"--chunking", how, "--chunk", "b=262144", "--chunk", "a=262144"}
		s.startBackend("a="+s.path("a.raw"), "b="+s.path("b.raw"))
		s.startFrontend([]string{"a", "b"}, "--fill-paused", "--policy", "isolated")
		s.fill("a", "resume")
		a := s.awaitFilled("a")
		time.Sleep(200 * time.Millisecond) // the backend hears what is held
		s.fill("b", "resume")
		v := s.awaitFilled("b")
		crossed[how] = [2]int64{a.WAN.BackgroundBytes, v.WAN.BackgroundBytes}
		for _, n := range []string{"a", "b"} {
			output(t, "nbdcopy", s.uri(n), s.path(n+".out"))
			same(t, s.path(n+".raw"), s.path(n+".out"))
		}
		if how == "content" {
			// Stored pieces serve after a restart as well.
			s.frontend.end(t, syscall.SIGKILL)
			s.startFrontend([]string{"a", "b"}, "--policy", "isolated")
			output(t, "nbdcopy", s.uri("b"), s.path("b.out"))
			same(t, s.path("b.raw"), s.path("b.out"))
		}
		s.frontend.end(t, syscall.SIGTERM)
		s.backend.end(t, syscall.SIGTERM)
	}
	t.Logf("bytes that crossed: %v", crossed)
	if c := crossed["fixed"]; c[1] < c[0]*9/10 {
		t.Errorf("fixed chunks: %d bytes, then %d for the moved content", c[0], c[1])
	}
	if c := crossed["content"]; c[1] > c[0]*3/10 {
		t.Errorf("chunks by content: %d bytes, then %d for the moved content", c[0], c[1])
	}
}

// TestBoundedStore: a store smaller than the volume drops what was read least
// lately, a backend that takes it to be there is put right, and every byte is
// the source's.
func TestBoundedStore(t *testing.T) {
	need(t, "nbdcopy")
	s := newSite(t)
	raw := s.disk("a.raw", 96*mib, 12)
	output(t, "cp", raw, s.path("b.raw"))
	s.startBackend("a="+raw, "b="+s.path("b.raw"))
	s.startFrontend([]string{"a", "b"}, "--fill-paused", "--policy", "isolated", "--store-limit", "16777216", "--memory", "0", "--scratch", "0")
	for range 2 {
		for _, n := range []string{"a", "b"} {
			output(t, "nbdcopy", s.uri(n), s.path(n+".out"))
			same(t, raw, s.path(n+".out"))
		}
	}
	v := s.status("a")
	if v.Dedup.EvictedBytes == 0 || v.StoreBytes > 20*mib || v.Dedup.LimitBytes != 16*mib {
		t.Errorf("%d bytes on disk, %+v", v.StoreBytes, v.Dedup)
	}
	s.frontend.end(t, syscall.SIGKILL)
	s.startFrontend([]string{"a", "b"}, "--policy", "isolated", "--store-limit", "16777216")
	output(t, "nbdcopy", s.uri("a"), s.path("a.out"))
	same(t, raw, s.path("a.out"))
}

// TestWhatAnotherBackendSent: what came from one backend need not come from
// another, which is told of it as it arrives.
func TestWhatAnotherBackendSent(t *testing.T) {
	need(t, "nbdcopy")
	s := newTwoBackends(t)
	raw := s.disk("a.raw", 32*mib, 13)
	output(t, "cp", "--sparse=never", raw, s.path("b.raw"))
	s.startBackend("a=" + raw)
	s.startSecond("b=" + s.path("b.raw"))
	s.startFrontend([]string{"a", "b=" + s.addr2}, "--fill-paused", "--policy", "isolated")
	s.site.fill("a", "resume")
	a := s.awaitFilled("a")
	b := s.awaitFilled("b") // nobody asks for it
	if b.WAN.BackgroundBytes+b.WAN.DemandBytes > 0 || b.Dedup.Chunks != a.Chunks.Held {
		t.Errorf("%+v, %+v", b.WAN, b.Dedup)
	}
	s.copied("b", raw)
}
